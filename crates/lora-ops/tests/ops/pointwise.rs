//! RMSNorm, rotary embedding, gated activation, embedding, sums.

use candle_core::{DType, Tensor};
use lora_ops::reduce::{scale, sum_of_squares};
use lora_ops::rope::RopeTable;
use lora_ops::{add_assign, embedding, rms_norm, swiglu};
use lora_spec::{Rope, RopeScaling};

use crate::common::{
    assert_close, assert_gradient, dot, error, matrix, random, sigmoid, tensor, vector, wide,
};

fn norm_reference(x: &[f64], w: &[f64], eps: f64) -> Vec<f64> {
    let row = |x: &[f64]| {
        let rstd = 1.0 / (dot(x, x) / x.len() as f64 + eps).sqrt();
        x.iter().zip(w).map(|(x, w)| w * x * rstd).collect::<Vec<_>>()
    };
    x.chunks(w.len()).flat_map(row).collect()
}

#[test]
fn rms_norm_and_its_gradient_follow_the_definition() {
    for (tokens, features) in [(1, 1), (3, 7), (5, 64), (9, 83)] {
        let (x, w, dy) = (matrix((tokens, features), 1), vector(features, 2), matrix((tokens, features), 3));
        let (y, saved) = rms_norm::forward(&x, &w, 1e-3).unwrap();
        let (weight, upstream) = (wide(&w), wide(&dy));
        assert_close("output", &y, &norm_reference(&wide(&x), &weight, 1e-3), 1e-6);
        let again = rms_norm::again(&saved, &x, &w).unwrap();
        assert_eq!(wide(&again), wide(&y));
        let dx = rms_norm::backward(&saved, &x, &w, &dy).unwrap();
        let loss = |inputs: &[Vec<f64>]| dot(&norm_reference(&inputs[0], &weight, 1e-3), &upstream);
        // One feature's gradient is nearly zero: a difference of equal numbers.
        let limit = if features == 1 { 1e-3 } else { 1e-5 };
        assert_gradient("gradient", &dx, &[&x], 0, loss, limit);
    }
}

#[test]
fn gated_activation_and_its_gradients_follow_the_definition() {
    let shape = (6, 37);
    let (gate, up) = (matrix(shape, 1).affine(6.0, 0.0).unwrap(), matrix(shape, 2));
    let dy = matrix(shape, 3);
    let upstream = wide(&dy);
    let reference = |inputs: &[Vec<f64>]| -> Vec<f64> {
        inputs[0].iter().zip(&inputs[1]).map(|(g, u)| g * sigmoid(*g) * u).collect()
    };
    let y = swiglu::forward(&gate, &up).unwrap();
    assert_close("output", &y, &reference(&[wide(&gate), wide(&up)]), 1e-6);
    let (dgate, dup) = swiglu::backward(&gate, &up, &dy).unwrap();
    let loss = |inputs: &[Vec<f64>]| dot(&reference(inputs), &upstream);
    assert_gradient("gradient of gate", &dgate, &[&gate, &up], 0, loss, 1e-5);
    assert_gradient("gradient of up", &dup, &[&gate, &up], 1, loss, 1e-5);
}

#[test]
fn gated_activation_of_extreme_gates_is_finite() {
    let gate = tensor(&[-1e30, -200.0, -90.0, 90.0, 200.0, 1e30], (1, 6));
    let ones = tensor(&[1.0; 6], (1, 6));
    let y = wide(&swiglu::forward(&gate, &ones).unwrap());
    assert!(y[..3].iter().all(|y| y.abs() < 1e-6), "{y:?}");
    assert_eq!(y[3..], [90.0, 200.0, f64::from(1e30_f32)]);
    let (dgate, _) = swiglu::backward(&gate, &ones, &ones).unwrap();
    assert!(error(&wide(&dgate), &[0.0, 0.0, 0.0, 1.0, 1.0, 1.0]) < 1e-6);
}

/// Angle of pair `i` at `position` where frequencies are not scaled.
fn angle(theta: f64, head_dim: usize, i: usize, position: usize) -> f64 {
    position as f64 * theta.powf(-2.0 * i as f64 / head_dim as f64)
}

/// Rotates by `angle(pair, position)`.
fn rope_reference(
    x: &[f64],
    features: usize,
    head_dim: usize,
    angle: impl Fn(usize, usize) -> f64,
    position: impl Fn(usize) -> usize,
) -> Vec<f64> {
    let half = head_dim / 2;
    let mut y = x.to_vec();
    for (token, row) in y.chunks_mut(features).enumerate() {
        for head in row.chunks_mut(head_dim) {
            for i in 0..half {
                let (sin, cos) = angle(i, position(token)).sin_cos();
                (head[i], head[i + half]) =
                    (head[i] * cos - head[i + half] * sin, head[i + half] * cos + head[i] * sin);
            }
        }
    }
    y
}

#[test]
fn rotary_embedding_and_its_gradient_follow_the_definition() {
    let (seq, heads, head_dim, first) = (5, 3, 10, 4);
    let rope = Rope { theta: 100.0, scaling: RopeScaling::None };
    let table = RopeTable::new(&rope, head_dim, seq + first);
    let angle = |i, position| angle(100.0, head_dim, i, position);
    let x = matrix((2 * seq, heads * head_dim), 1);
    for first in [0, first] {
        let y = x.copy().unwrap();
        table.forward(&y, seq, first).unwrap();
        let expected = rope_reference(&wide(&x), heads * head_dim, head_dim, angle, |t| first + t % seq);
        assert_close("output", &y, &expected, 2e-6);
    }
    let dy = matrix((2 * seq, heads * head_dim), 2);
    let upstream = wide(&dy);
    let dx = dy.copy().unwrap();
    table.backward(&dx, seq).unwrap();
    let loss = |inputs: &[Vec<f64>]| {
        dot(&rope_reference(&inputs[0], heads * head_dim, head_dim, angle, |t| t % seq), &upstream)
    };
    assert_gradient("gradient", &dx, &[&x], 0, loss, 1e-5);
}

#[test]
fn rotary_scaling_stretches_the_frequencies_it_should() {
    let (head_dim, positions, theta) = (32, 64, 10_000.0);
    // Unit vectors (1, 0) turn into (cos, sin) of each pair's angle.
    let turned = |scaling| {
        let mut x = vec![0.0; positions * head_dim];
        x.chunks_mut(head_dim).for_each(|row| row[..head_dim / 2].fill(1.0));
        let x = tensor(&x, (positions, head_dim));
        RopeTable::new(&Rope { theta, scaling }, head_dim, positions).forward(&x, positions, 0).unwrap();
        wide(&x)
    };
    let expected = |factor: &dyn Fn(f64) -> f64| {
        let frequency = |i: usize| theta.powf(-2.0 * i as f64 / head_dim as f64);
        let angle = |i: usize, position: usize| position as f64 * frequency(i) * factor(frequency(i));
        let mut x = vec![0.0; positions * head_dim];
        x.chunks_mut(head_dim).for_each(|row| row[..head_dim / 2].fill(1.0));
        rope_reference(&x, head_dim, head_dim, angle, |t| t)
    };
    let linear = turned(RopeScaling::Linear { factor: 4.0 });
    assert!(error(&linear, &expected(&|_| 0.25)) < 1e-5);

    let (factor, low, high, original) = (8.0, 1.0, 4.0, 64.0);
    let llama3 = RopeScaling::Llama3 {
        factor,
        low_freq_factor: low,
        high_freq_factor: high,
        original_max_position_embeddings: original,
    };
    // The paper's code: wavelengths below 16 are kept, above 64 divided by 8, a ramp between.
    let scale = |frequency: f64| {
        let turns = original * frequency / (2.0 * std::f64::consts::PI);
        let smooth = ((turns - low) / (high - low)).clamp(0.0, 1.0);
        smooth + (1.0 - smooth) / factor
    };
    let kinds: Vec<f64> =
        (0..head_dim / 2).map(|i| scale(theta.powf(-2.0 * i as f64 / head_dim as f64))).collect();
    assert!(kinds.contains(&1.0) && kinds.contains(&0.125) && kinds.iter().any(|k| *k > 0.125 && *k < 1.0));
    assert!(error(&turned(llama3), &expected(&scale)) < 1e-5);
}

#[test]
fn embedding_takes_rows_of_either_type() {
    let weight = matrix((10, 3), 1);
    let tokens = [9, 0, 9, 4];
    let rows = |weight: &Tensor| -> Vec<f64> {
        let weight = wide(weight);
        tokens.iter().flat_map(|&t| weight[t as usize * 3..(t as usize + 1) * 3].to_vec()).collect()
    };
    for weight in [weight.clone(), weight.to_dtype(DType::BF16).unwrap()] {
        let y = embedding::forward(&weight, &tokens).unwrap();
        assert_eq!((y.dtype(), y.dims()), (DType::F32, &[4, 3][..]));
        assert_eq!(wide(&y), rows(&weight));
    }
}

#[test]
fn sums_and_scalings_cover_long_vectors() {
    let mut x = random(100_003, 1);
    let exact: f64 = x.iter().map(|x| f64::from(*x).powi(2)).sum();
    assert!((sum_of_squares(&x) - exact).abs() < 1e-6 * exact);
    assert_eq!(sum_of_squares(&[]), 0.0);
    let before = x.clone();
    scale(&mut x, 0.5);
    assert!(x.iter().zip(&before).all(|(x, b)| *x == b * 0.5));
    x[70_000] = f32::NAN;
    assert!(!sum_of_squares(&x).is_finite());

    let (a, b) = (matrix((300, 100), 1), matrix((300, 100), 2));
    let expected: Vec<f64> =
        random(30_000, 1).iter().zip(random(30_000, 2)).map(|(a, b)| f64::from(a + b)).collect();
    add_assign(&a, &b).unwrap();
    assert_eq!(wide(&a), expected);
}
