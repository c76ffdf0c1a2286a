//! Operations that only move memory: norms, rotation, gated activation, residual sum, embedding.

use anyhow::Result;
use candle_core::Tensor;
use lora_ops::norm::{self, NormParams};
use lora_ops::rope::RopeTable;
use lora_ops::{Ids, add_assign, embedding, glu};
use lora_spec::{ActivationFunction, NormKind, Philox, Rope};

use super::inputs::{BenchInputs, HIDDEN, INTERMEDIATE, KEY_VALUE, TOKENS, VOCAB};
use super::row::BenchRow;

const EPS: f64 = 1e-5;
const HEAD_DIM: usize = 128;

pub(super) fn rows(inputs: &BenchInputs) -> Vec<BenchRow> {
    let (tokens, hidden) = (inputs.size(TOKENS[1]), inputs.size(HIDDEN));
    let mut rows = norms(tokens, hidden);
    for (name, features) in [("q", HIDDEN), ("k", KEY_VALUE)] {
        // A whole number of heads.
        let features = inputs.size(features).next_multiple_of(HEAD_DIM);
        let seq = tokens / 2;
        rows.push(BenchRow::new(
            format!("rope {name} {tokens}x{features}"),
            4 * tokens * features,
            move |inputs| {
                let rope = Rope::new(5e5, HEAD_DIM);
                let table = RopeTable::new(&rope, seq, inputs.device())?;
                let x = inputs.bf16(&[tokens, features])?;
                Ok(Box::new(move || Ok(table.forward(&x, seq, 0)?)))
            },
        ));
    }
    let wide = inputs.size(INTERMEDIATE);
    rows.push(BenchRow::new(format!("glu forward {tokens}x{wide}"), 6 * tokens * wide, move |inputs| {
        let (gate, up) = (inputs.bf16(&[tokens, wide])?, inputs.bf16(&[tokens, wide])?);
        Ok(Box::new(move || Ok(glu::forward(&gate, &up, ActivationFunction::Silu).map(drop)?)))
    }));
    rows.push(BenchRow::new(format!("glu backward {tokens}x{wide}"), 10 * tokens * wide, move |inputs| {
        let tensor = || inputs.bf16(&[tokens, wide]);
        let (gate, up, dy) = (tensor()?, tensor()?, tensor()?);
        Ok(Box::new(move || Ok(glu::backward(&gate, &up, &dy, ActivationFunction::Silu).map(drop)?)))
    }));
    rows.push(BenchRow::new(format!("residual add {tokens}x{hidden}"), 6 * tokens * hidden, move |inputs| {
        let (a, b) = (inputs.bf16(&[tokens, hidden])?, inputs.bf16(&[tokens, hidden])?);
        Ok(Box::new(move || Ok(add_assign(&a, &b)?)))
    }));
    let vocab = inputs.size(VOCAB);
    rows.push(BenchRow::new(
        format!("embedding {tokens} of {vocab}x{hidden}"),
        4 * tokens * hidden,
        move |inputs| {
            let weight = inputs.bf16(&[vocab, hidden])?;
            let ids = Ids::new(tokens_of(tokens, vocab), inputs.device())?;
            Ok(Box::new(move || Ok(embedding::forward(&weight, &ids).map(drop)?)))
        },
    ));
    rows
}

fn rms(weight: &Tensor) -> NormParams<'_> {
    NormParams { kind: NormKind::Rms, weight, bias: None, eps: EPS }
}

fn norms(tokens: usize, hidden: usize) -> Vec<BenchRow> {
    let shape = [tokens, hidden];
    let name = |what: &str| format!("rms_norm {what} {tokens}x{hidden}");
    // Bytes of a tensor of activations.
    let tensor = 2 * tokens * hidden;
    vec![
        BenchRow::new(name("forward"), 2 * tensor, move |inputs| {
            let (x, weight) = (inputs.bf16(&shape)?, inputs.f32(&[hidden])?);
            Ok(Box::new(move || Ok(norm::forward(&x, rms(&weight)).map(drop)?)))
        }),
        BenchRow::new(name("add_forward"), 4 * tensor, move |inputs| {
            let (x, residual, weight) = (inputs.bf16(&shape)?, inputs.bf16(&shape)?, inputs.f32(&[hidden])?);
            Ok(Box::new(move || Ok(norm::add_forward(&x, &residual, rms(&weight)).map(drop)?)))
        }),
        BenchRow::new(name("again"), 2 * tensor, move |inputs| {
            let (x, weight) = (inputs.bf16(&shape)?, inputs.f32(&[hidden])?);
            let (_, saved) = norm::forward(&x, rms(&weight))?;
            Ok(Box::new(move || Ok(norm::recompute(&saved, &x, rms(&weight)).map(drop)?)))
        }),
        BenchRow::new(name("backward with residual"), 4 * tensor, move |inputs| {
            let (x, weight) = (inputs.bf16(&shape)?, inputs.f32(&[hidden])?);
            let (dy, residual) = (inputs.bf16(&shape)?, inputs.bf16(&shape)?);
            let (_, saved) = norm::forward(&x, rms(&weight))?;
            Ok(Box::new(move || -> Result<()> {
                Ok(norm::backward(&saved, &x, rms(&weight), &dy, Some(&residual)).map(drop)?)
            }))
        }),
    ]
}

/// Random token ids.
pub(super) fn tokens_of(count: usize, vocab: usize) -> Vec<u32> {
    let philox = Philox::new(0, "microbench tokens");
    (0..count as u32).map(|i| philox.below(vocab as u64, [i, 0, 0, 0]) as u32).collect()
}
