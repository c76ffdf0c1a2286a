//! Every operation gives the same bits with 1, 2 and 3 threads, at sizes at which it uses several.

use candle_core::{DType, Tensor};
use lora_ops::adamw::{self, AdamWSettings, AdamWTensors};
use lora_ops::attention::{self, AttentionShape};
use lora_ops::cross_entropy::{Targets, forward_backward};
use lora_ops::dropout::Dropout;
use lora_ops::linear::FrozenLinear;
use lora_ops::lora::{self, LoraPair};
use lora_ops::norm::{self, NormParams};
use lora_ops::reduce::sum_of_squares;
use lora_ops::rope::RopeTable;
use lora_ops::{Result, glu};
use lora_spec::{ActivationFunction, NormKind, Rope};

use crate::common::{matrix, places, vector, wide};

/// Fails if the tensors of `f` differ in a bit between numbers of threads.
pub(crate) fn assert_same_bits(what: &str, f: impl Fn() -> Result<Vec<Tensor>> + Sync) {
    let with = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let bits = |t: &Tensor| wide(t).into_iter().map(f64::to_bits).collect::<Vec<_>>();
        pool.install(|| f().unwrap().iter().map(bits).collect::<Vec<_>>())
    };
    let one = with(1);
    for threads in [2, 3] {
        assert!(with(threads) == one, "{what} differs with {threads} threads");
    }
}

#[test]
fn attention_has_the_same_bits_with_any_number_of_threads() {
    let shape = AttentionShape {
        batch: 3,
        seq: 200,
        kv_seq: 200,
        heads: 6,
        kv_heads: 2,
        head_dim: 32,
        scale: 0.2,
        softcap: None,
    };
    let q = matrix((600, 192), 1);
    let (k, v) = (matrix((600, 64), 2), matrix((600, 64), 3));
    assert_same_bits("attention", || {
        let (output, saved) = attention::forward(&q, &k, &v, shape, None)?;
        let (dq, dk, dv) = attention::backward(&saved, (&q, &k, &v), &output, &q, shape, None)?;
        Ok(vec![output, dq, dk, dv])
    });
}

#[test]
fn cross_entropy_has_the_same_bits_with_any_number_of_threads() {
    let (tokens, features, vocab) = (120, 64, 20_000);
    let x = matrix((tokens, features), 1);
    for dtype in [DType::F32, DType::BF16] {
        let head = matrix((vocab, features), 2).to_dtype(dtype).unwrap();
        let targets: Vec<u32> = (0..tokens as u32).map(|i| i * 31).collect();
        let targets = Targets::new(&targets, &[0.7; 120], x.device()).unwrap();
        assert_same_bits("cross-entropy", || {
            let loss = forward_backward(&x, &head, &targets, true)?;
            Ok(loss.dx.into_iter().chain([loss.row_losses]).collect())
        });
    }
}

#[test]
fn linear_and_lora_have_the_same_bits_with_any_number_of_threads() {
    let (tokens, in_features, out_features) = (300, 200, 6000);
    let x = matrix((tokens, in_features), 1);
    let dy = matrix((tokens, out_features), 2);
    let positions: Vec<(u32, u32)> = (0..tokens as u32).map(|t| (0, t)).collect();
    for dtype in [DType::F32, DType::BF16] {
        let weight = matrix((out_features, in_features), 3).to_dtype(dtype).unwrap();
        let layer = FrozenLinear::new(weight, Some(vector(out_features, 4))).unwrap();
        let pair = LoraPair { a: matrix((16, in_features), 5), b: matrix((out_features, 16), 6) };
        let dropout = Dropout::new(1, "m", 2, 0.1, places(&positions));
        assert_same_bits("linear with LoRA", || {
            let y = layer.forward(&x)?;
            let saved = lora::forward(&x, &pair, 2.0, Some(&dropout), &y)?;
            let dx = layer.backward(&dy)?;
            let grad = LoraPair { a: pair.a.zeros_like()?, b: pair.b.zeros_like()? };
            lora::backward(&saved, &x, &pair, 2.0, Some(&dropout), &dy, &grad, Some(&dx))?;
            Ok(vec![y, dx, grad.a, grad.b])
        });
    }
}

#[test]
fn pointwise_operations_have_the_same_bits_with_any_number_of_threads() {
    let shape = (257, 300);
    let (x, dy, w) = (matrix(shape, 1), matrix(shape, 2), vector(300, 3));
    assert_same_bits("pointwise", || {
        let rms = NormParams { kind: NormKind::Rms, weight: &w, bias: None, eps: 1e-5 };
        let (y, saved) = norm::forward(&x, rms)?;
        let dx = norm::backward(&saved, &x, rms, &dy, Some(&x))?;
        let layer = NormParams { kind: NormKind::Layer, bias: Some(&w), ..rms };
        let (centered, saved) = norm::forward(&x, layer)?;
        let d_centered = norm::backward(&saved, &x, layer, &dy, Some(&x))?;
        let (dgate, dup) = glu::backward(&x, &y, &dy, ActivationFunction::Silu)?;
        let squares = Tensor::new(&[sum_of_squares(&vector(70_000, 4))?], x.device())?;
        let gated = glu::forward(&x, &y, ActivationFunction::GeluTanh)?;
        let activated = glu::activation_forward(&x, ActivationFunction::GeluTanh)?;
        let d_activated = glu::activation_backward(&x, &dy, ActivationFunction::GeluTanh)?;
        let rope = Rope { is_interleaved: true, ..Rope::new(100.0, 30) };
        let rotated = x.copy()?;
        RopeTable::new(&rope, 257, x.device())?.forward(&rotated, 257, 0)?;
        Ok(vec![gated, y, dx, dgate, dup, squares, centered, d_centered, activated, d_activated, rotated])
    });
}

#[test]
fn adamw_has_the_same_bits_with_any_number_of_threads() {
    let adamw = AdamWSettings { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01 };
    assert_same_bits("AdamW", || {
        let params = vector(70_000, 1);
        let (m, v) = (params.zeros_like()?, params.zeros_like()?);
        for t in 1..4 {
            let state = AdamWTensors { params: &params, m: &m, v: &v };
            adamw::step(&adamw.coefficients(1e-3, t, 0.5), state, &vector(70_000, 1 + t))?;
        }
        Ok(vec![params, m, v])
    });
}
