//! Fused linear and cross-entropy, compared with the definition, row by row.

use candle_core::{DType, Device, Tensor};
use lora_ops::cross_entropy::{Head, Targets, forward_backward};
use lora_test_kit::numbers::relative_error;

use crate::common::{assert_close, bits, dot, matrix, wide};

/// `weight * -log softmax(x W^T)[target]` of one row, with the logits capped.
fn row_loss(x: &[f64], weight: &[f64], target: usize, row_weight: f64, softcap: Option<f32>) -> f64 {
    let capped = |logit: f64| match softcap.map(f64::from) {
        None => logit,
        Some(cap) => cap * (logit / cap).tanh(),
    };
    let logits: Vec<f64> = weight.chunks(x.len()).map(|w| capped(dot(x, w))).collect();
    let top = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let total: f64 = logits.iter().map(|l| (l - top).exp()).sum();
    row_weight * (total.ln() + top - logits[target])
}

fn check(tokens: usize, features: usize, vocab: usize, dtype: DType, row_weight: impl Fn(usize) -> f32) {
    check_capped(tokens, features, vocab, dtype, row_weight, None);
}

fn check_capped(
    tokens: usize,
    features: usize,
    vocab: usize,
    dtype: DType,
    row_weight: impl Fn(usize) -> f32,
    softcap: Option<f32>,
) {
    let what = format!("{tokens} x {features} x {vocab} {dtype:?}");
    let x = matrix((tokens, features), 1).affine(2.0, 0.0).unwrap();
    let weight = matrix((vocab, features), 2).to_dtype(dtype).unwrap();
    let target = |row: usize| (row * 7919 + 3) % vocab;
    let weights: Vec<f32> = (0..tokens).map(row_weight).collect();
    let target_tokens: Vec<u32> = (0..tokens).map(|row| target(row) as u32).collect();
    let targets = Targets::new(&target_tokens, &weights, &Device::Cpu).unwrap();
    let head = Head { weight: &weight, softcap };
    let loss = forward_backward(&x, head, &targets, true).unwrap();

    let (values, weight_values) = (wide(&x), wide(&weight));
    let losses: Vec<f64> = values
        .chunks(features)
        .enumerate()
        .map(|(row, x)| row_loss(x, &weight_values, target(row), f64::from(weights[row]), softcap))
        .collect();
    let kept: Vec<f64> =
        losses.iter().zip(&weights).filter(|(_, w)| **w != 0.0).map(|(loss, _)| *loss).collect();
    assert_close(&what, &loss.row_losses, &kept, 1e-6);
    assert_eq!(loss.sum().unwrap(), wide(&loss.row_losses).iter().sum::<f64>(), "{what}");
    assert_eq!(loss.weight_sum, weights.iter().map(|w| f64::from(*w)).sum::<f64>(), "{what}");

    let dx = wide(loss.dx.as_ref().unwrap());
    let (mut got, mut expected) = (Vec::new(), Vec::new());
    for row in (0..tokens).step_by((tokens / 12).max(1)).chain([tokens - 1]) {
        for feature in 0..features {
            let at = |change: f64| {
                let mut x = values[row * features..(row + 1) * features].to_vec();
                x[feature] += change;
                row_loss(&x, &weight_values, target(row), f64::from(weights[row]), softcap)
            };
            got.push(dx[row * features + feature]);
            expected.push((at(1e-4) - at(-1e-4)) / 2e-4);
        }
    }
    let error = relative_error(&got, &expected);
    assert!(error <= 1e-5, "{what}: gradient is off by {error:e}");
    for (row, dx) in dx.chunks(features).enumerate() {
        assert_eq!(dx.iter().all(|d| *d == 0.0), weights[row] == 0.0, "{what}: row {row}");
    }

    let without = forward_backward(&x, head, &targets, false).unwrap();
    assert!(without.dx.is_none());
    assert_eq!(wide(&without.row_losses), wide(&loss.row_losses), "{what}");
}

#[test]
fn loss_and_gradient_match_the_definition() {
    let weight = |row: usize| [1.0, 0.0, 0.25, 2.5][row % 4];
    for dtype in [DType::F32, DType::BF16] {
        check(1, 3, 5, dtype, |_| 1.0);
        check(11, 16, 101, dtype, weight);
        // Some of the logits are above the cap.
        check_capped(11, 16, 101, dtype, weight, Some(1.5));
    }
}

#[test]
fn loss_is_independent_of_chunking() {
    // More logits than fit into a chunk, and a bf16 head of two panels.
    check(700, 8, 40_000, DType::F32, |row| if row % 3 == 0 { 0.5 } else { 0.0 });
    check(160, 24, 90_000, DType::BF16, |_| 1.0);
}

#[test]
fn large_vocabularies_keep_their_precision() {
    // Nearly equal terms: in a long f32 sum, each addition would be rounded in the same direction.
    let (rows, vocab) = (5, 262_144);
    let x = matrix((rows, 1), 1).affine(0.1, 0.0).unwrap();
    let head = matrix((vocab, 1), 2).to_dtype(DType::BF16).unwrap().to_dtype(DType::F32).unwrap();
    let targets = Targets::new(&[0, 7, 9, 100_000, 262_143], &[1.0; 5], &Device::Cpu).unwrap();
    let weight = wide(&head);
    let row = |(x, target): (&f64, &u32)| row_loss(&[*x], &weight, *target as usize, 1.0, None);
    let expected: Vec<f64> = wide(&x).iter().zip(&[0, 7, 9, 100_000, 262_143]).map(row).collect();
    for gradient in [false, true] {
        let loss = forward_backward(&x, &head, &targets, gradient).unwrap();
        assert_close("losses", &loss.row_losses, &expected, 5e-8);
    }
}

#[test]
fn rows_of_weight_zero_are_ignored_even_if_not_finite() {
    let (x, head) = (matrix((4, 6), 1), matrix((20, 6), 2));
    let run = |tokens: &[u32]| {
        let targets = Targets::new(tokens, &[1.0, 0.0, 1.0, 0.0], &Device::Cpu).unwrap();
        forward_backward(&x, &head, &targets, true).unwrap()
    };
    let expected = run(&[1, 2, 3, 4]);
    assert_eq!(expected.row_losses.dims(), [2]);
    lora_ops::update_f32(&x, &[]).unwrap()[6..12].fill(f32::NAN);
    let got = run(&[1, u32::MAX, 3, 0]);
    assert_eq!(wide(&got.row_losses), wide(&expected.row_losses));
    assert_eq!(bits(&got.dx.unwrap()), bits(&expected.dx.unwrap()));
}

#[test]
fn all_weights_zero_give_zero_loss() {
    let (x, head) = (matrix((4, 6), 1), matrix((20, 6), 2));
    let targets = Targets::new(&[0; 4], &[0.0; 4], &Device::Cpu).unwrap();
    let loss = forward_backward(&x, &head, &targets, true).unwrap();
    assert_eq!((loss.sum().unwrap(), loss.weight_sum), (0.0, 0.0));
    assert!(wide(&loss.dx.unwrap()).iter().all(|d| *d == 0.0));
}

#[test]
fn large_logits_do_not_overflow_and_nan_propagates() {
    let x = matrix((3, 4), 1).affine(1e4, 0.0).unwrap();
    let head = matrix((30, 4), 2);
    let targets = Targets::new(&[0, 1, 2], &[1.0; 3], &Device::Cpu).unwrap();
    let loss = forward_backward(&x, &head, &targets, true).unwrap();
    assert!(loss.sum().unwrap().is_finite() && wide(&loss.dx.unwrap()).iter().all(|d| d.is_finite()));
    let not_finite = Tensor::full(f32::NAN, (3, 4), x.device()).unwrap();
    assert!(!forward_backward(&not_finite, &head, &targets, true).unwrap().sum().unwrap().is_finite());
}
