//! The matrix products of a block, with frozen weights and with LoRA's matrices.

use candle_core::Tensor;
use lora_ops::gemm::{MatrixOperand, no_trans, product, trans};
use lora_ops::linear::FrozenLinear;

use super::inputs::{BenchInputs, HIDDEN, INTERMEDIATE, KEY_VALUE, RANK, TOKENS};
use super::row::BenchRow;

pub(super) fn rows(inputs: &BenchInputs) -> Vec<BenchRow> {
    let mut rows = Vec::new();
    for tokens in TOKENS.map(|tokens| inputs.size(tokens)) {
        rows.extend(frozen(inputs, tokens));
        rows.extend(lora(inputs, tokens));
    }
    rows
}

/// Name, m, n, k, and whether the product is added to the output.
struct ProductShape<'a>(&'a str, usize, usize, usize, bool);

impl ProductShape<'_> {
    fn row(&self, make: impl Fn(&BenchInputs) -> anyhow::Result<super::row::BenchFn> + 'static) -> BenchRow {
        let &Self(name, m, n, k, adds) = self;
        let bytes = 2 * (m * k + k * n + if adds { 2 } else { 1 } * m * n);
        BenchRow::new(format!("{name} {m}x{n}x{k}"), bytes, make).with_flops(2.0 * (m * n * k) as f64)
    }
}

fn frozen(inputs: &BenchInputs, tokens: usize) -> Vec<BenchRow> {
    let layers = [
        ("q,o", HIDDEN, HIDDEN),
        ("k,v", HIDDEN, KEY_VALUE),
        ("gate,up", HIDDEN, INTERMEDIATE),
        ("down", INTERMEDIATE, HIDDEN),
    ];
    let mut rows = Vec::new();
    for (name, in_features, out_features) in layers {
        let (from, to) = (inputs.size(in_features), inputs.size(out_features));
        rows.push(ProductShape(&format!("frozen forward {name}"), tokens, to, from, false).row(
            move |inputs| {
                let (layer, x) =
                    (FrozenLinear::new(inputs.bf16(&[to, from])?, None)?, inputs.bf16(&[tokens, from])?);
                Ok(Box::new(move || Ok(layer.forward(&x).map(drop)?)))
            },
        ));
        rows.push(ProductShape(&format!("frozen backward {name}"), tokens, from, to, false).row(
            move |inputs| {
                let (layer, dy) =
                    (FrozenLinear::new(inputs.bf16(&[to, from])?, None)?, inputs.bf16(&[tokens, to])?);
                Ok(Box::new(move || Ok(layer.backward(&dy).map(drop)?)))
            },
        ));
        // The input gradients of q, k and v are summed, and so are those of gate and up.
        if matches!(name, "k,v" | "gate,up") {
            rows.push(ProductShape(&format!("frozen backward += {name}"), tokens, from, to, true).row(
                move |inputs| {
                    let layer = FrozenLinear::new(inputs.bf16(&[to, from])?, None)?;
                    let (dy, dx) = (inputs.bf16(&[tokens, to])?, inputs.bf16(&[tokens, from])?);
                    Ok(Box::new(move || Ok(layer.backward_add(&dy, &dx)?)))
                },
            ));
        }
    }
    rows
}

/// The products of `lora_ops::lora`: `h = x A^T`, `y += h B^T`; `dh = dy B`, `dB += dy^T h`,
/// `dA += dh^T x`, `dx += dh A`.
fn lora(inputs: &BenchInputs, tokens: usize) -> Vec<BenchRow> {
    let mut rows = Vec::new();
    for features in [HIDDEN, INTERMEDIATE].map(|size| inputs.size(size)) {
        rows.push(low_rank_product("lora h = x A^T", (tokens, RANK, features), [false, true], Output::New));
        rows.push(low_rank_product(
            "lora dx += dh A",
            (tokens, features, RANK),
            [false, false],
            Output::Added,
        ));
        rows.push(low_rank_product(
            "lora dA += dh^T x",
            (RANK, features, tokens),
            [true, false],
            Output::Gradient,
        ));
    }
    for features in [HIDDEN, KEY_VALUE, INTERMEDIATE].map(|size| inputs.size(size)) {
        rows.push(low_rank_product(
            "lora y += h B^T",
            (tokens, features, RANK),
            [false, true],
            Output::Added,
        ));
        rows.push(low_rank_product("lora dh = dy B", (tokens, RANK, features), [false, false], Output::New));
        rows.push(low_rank_product(
            "lora dB += dy^T h",
            (features, RANK, tokens),
            [true, false],
            Output::Gradient,
        ));
    }
    rows
}

#[derive(Clone, Copy, PartialEq)]
enum Output {
    /// A bf16 matrix that is overwritten.
    New,
    /// A bf16 matrix to which the product is added.
    Added,
    /// An f32 matrix to which the product is added.
    Gradient,
}

fn low_rank_product(
    name: &str,
    (m, n, k): (usize, usize, usize),
    [a_t, b_t]: [bool; 2],
    output: Output,
) -> BenchRow {
    let element = match output {
        Output::New => 2,
        Output::Added => 4,
        Output::Gradient => 8,
    };
    let bytes = 2 * (m * k + k * n) + element * m * n;
    let row = BenchRow::new(format!("{name} {m}x{n}x{k}"), bytes, move |inputs| {
        fn factor(x: &Tensor, transposed: bool) -> MatrixOperand<'_> {
            if transposed { trans(x) } else { no_trans(x) }
        }
        let a = inputs.bf16(&if a_t { [k, m] } else { [m, k] })?;
        let b = inputs.bf16(&if b_t { [n, k] } else { [k, n] })?;
        let c = if output == Output::Gradient { inputs.f32(&[m, n])? } else { inputs.bf16(&[m, n])? };
        let beta = if output == Output::New { 0.0 } else { 1.0 };
        Ok(Box::new(move || Ok(product(1.0, factor(&a, a_t), factor(&b, b_t), beta, &c)?)))
    });
    row.with_flops(2.0 * (m * n * k) as f64)
}
