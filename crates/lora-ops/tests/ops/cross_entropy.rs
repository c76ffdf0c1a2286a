//! Fused linear + cross-entropy against the definition, row by row.

use candle_core::{DType, Tensor};
use lora_ops::cross_entropy::{Targets, forward_backward};

use crate::common::{bits, dot, error, matrix, wide};

/// `weight * -log softmax(x W^T)[target]` of one row.
fn row_loss(x: &[f64], weight: &[f64], target: usize, row_weight: f64) -> f64 {
    let logits: Vec<f64> = weight.chunks(x.len()).map(|w| dot(x, w)).collect();
    let top = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let total: f64 = logits.iter().map(|l| (l - top).exp()).sum();
    row_weight * (total.ln() + top - logits[target])
}

fn check(tokens: usize, features: usize, vocab: usize, dtype: DType, row_weight: impl Fn(usize) -> f32) {
    let what = format!("{tokens} x {features} x {vocab} {dtype:?}");
    let x = matrix((tokens, features), 1).affine(2.0, 0.0).unwrap();
    let weight = matrix((vocab, features), 2).to_dtype(dtype).unwrap();
    let target = |row: usize| (row * 7919 + 3) % vocab;
    let weights: Vec<f32> = (0..tokens).map(row_weight).collect();
    let target_tokens: Vec<u32> = (0..tokens).map(|row| target(row) as u32).collect();
    let targets = Targets { tokens: &target_tokens, weights: &weights };
    let loss = forward_backward(&x, &weight, targets, true).unwrap();

    let (values, weight_values) = (wide(&x), wide(&weight));
    let losses: Vec<f64> = values
        .chunks(features)
        .enumerate()
        .map(|(row, x)| row_loss(x, &weight_values, target(row), f64::from(weights[row])))
        .collect();
    let sum: f64 = losses.iter().sum();
    assert!((loss.loss_sum - sum).abs() <= 1e-6 * sum.abs(), "{what}: {} instead of {sum}", loss.loss_sum);
    assert_eq!(loss.weight_sum, weights.iter().map(|w| f64::from(*w)).sum::<f64>(), "{what}");

    let dx = wide(&loss.dx.unwrap());
    let (mut got, mut expected) = (Vec::new(), Vec::new());
    for row in (0..tokens).step_by((tokens / 12).max(1)).chain([tokens - 1]) {
        for feature in 0..features {
            let at = |change: f64| {
                let mut x = values[row * features..(row + 1) * features].to_vec();
                x[feature] += change;
                row_loss(&x, &weight_values, target(row), f64::from(weights[row]))
            };
            got.push(dx[row * features + feature]);
            expected.push((at(1e-4) - at(-1e-4)) / 2e-4);
        }
    }
    let error = error(&got, &expected);
    assert!(error <= 1e-5, "{what}: gradient is off by {error:e}");
    for (row, dx) in dx.chunks(features).enumerate() {
        assert_eq!(dx.iter().all(|d| *d == 0.0), weights[row] == 0.0, "{what}: row {row}");
    }

    let without = forward_backward(&x, &weight, targets, false).unwrap();
    assert!(without.dx.is_none());
    assert_eq!(without.loss_sum.to_bits(), loss.loss_sum.to_bits(), "{what}");
}

#[test]
fn loss_and_gradient_follow_the_definition() {
    let weight = |row: usize| [1.0, 0.0, 0.25, 2.5][row % 4];
    for dtype in [DType::F32, DType::BF16] {
        check(1, 3, 5, dtype, |_| 1.0);
        check(11, 16, 101, dtype, weight);
    }
}

#[test]
fn several_chunks_of_rows_and_panels_of_the_head_add_up() {
    // More logits than a chunk holds, and a bf16 head of two panels.
    check(700, 8, 40_000, DType::F32, |row| if row % 3 == 0 { 0.5 } else { 0.0 });
    check(160, 24, 90_000, DType::BF16, |_| 1.0);
}

#[test]
fn rows_without_weight_do_not_matter_even_if_they_are_not_finite() {
    let (x, head) = (matrix((4, 6), 1), matrix((20, 6), 2));
    let weights = [1.0, 0.0, 1.0, 0.0];
    let targets = Targets { tokens: &[1, 2, 3, 4], weights: &weights };
    let expected = forward_backward(&x, &head, targets, true).unwrap();
    lora_ops::update_f32(&x, |x| x[6..12].fill(f32::NAN)).unwrap();
    let got = forward_backward(&x, &head, Targets { tokens: &[1, u32::MAX, 3, 0], ..targets }, true).unwrap();
    assert_eq!(got.loss_sum, expected.loss_sum);
    assert_eq!(bits(&got.dx.unwrap()), bits(&expected.dx.unwrap()));
}

#[test]
fn no_weights_at_all_give_zero() {
    let (x, head) = (matrix((4, 6), 1), matrix((20, 6), 2));
    let targets = Targets { tokens: &[0; 4], weights: &[0.0; 4] };
    let loss = forward_backward(&x, &head, targets, true).unwrap();
    assert_eq!((loss.loss_sum, loss.weight_sum), (0.0, 0.0));
    assert!(wide(&loss.dx.unwrap()).iter().all(|d| *d == 0.0));
}

#[test]
fn large_logits_do_not_overflow_and_not_a_number_is_not_hidden() {
    let x = matrix((3, 4), 1).affine(1e4, 0.0).unwrap();
    let head = matrix((30, 4), 2);
    let targets = Targets { tokens: &[0, 1, 2], weights: &[1.0; 3] };
    let loss = forward_backward(&x, &head, targets, true).unwrap();
    assert!(loss.loss_sum.is_finite() && wide(&loss.dx.unwrap()).iter().all(|d| d.is_finite()));
    let not_finite = Tensor::full(f32::NAN, (3, 4), x.device()).unwrap();
    assert!(!forward_backward(&not_finite, &head, targets, true).unwrap().loss_sum.is_finite());
}
