//! Norms, rotary embedding, gated activation, embedding.

use candle_core::{DType, Device, Tensor};
use lora_ops::norm::{self, NormParams};
use lora_ops::rope::RopeTable;
use lora_ops::{embedding, glu};
use lora_spec::{ActivationFunction, NormKind, PositionScaling, Rope, RopeScaling};
use lora_test_kit::numbers::relative_error;

use crate::common::{assert_close, assert_gradient, dot, ids, matrix, sigmoid, tensor, vector, wide};

/// Row by row, in f64.
fn norm_reference(kind: NormKind, x: &[f64], w: &[f64], b: &[f64], eps: f64) -> Vec<f64> {
    let row = |x: &[f64]| {
        let mean = match kind {
            NormKind::Rms => 0.0,
            NormKind::Layer => x.iter().sum::<f64>() / x.len() as f64,
        };
        let centered: Vec<f64> = x.iter().map(|x| x - mean).collect();
        let rstd = 1.0 / (dot(&centered, &centered) / x.len() as f64 + eps).sqrt();
        centered.iter().zip(w).zip(b).map(|((x, w), b)| w * x * rstd + b).collect::<Vec<_>>()
    };
    x.chunks(w.len()).flat_map(row).collect()
}

#[test]
fn norms_and_their_gradients_match_the_definition() {
    // The mean is larger than the deviations from it in a LayerNorm.
    for (kind, mean) in [(NormKind::Rms, 0.0), (NormKind::Layer, 5.0)] {
        for (tokens, features) in [(1, 1), (3, 7), (5, 64), (9, 83)] {
            let x = matrix((tokens, features), 1).affine(1.0, mean).unwrap();
            let (w, b, dy) = (vector(features, 2), vector(features, 4), matrix((tokens, features), 3));
            for bias in [None, Some(&b)] {
                let params = NormParams { kind, weight: &w, bias, eps: 1e-3 };
                let (y, saved) = norm::forward(&x, params).unwrap();
                let of_bias = bias.map_or(vec![0.0; features], wide);
                let reference = |x: &[f64]| norm_reference(kind, x, &wide(&w), &of_bias, 1e-3);
                let is_own_mean = kind == NormKind::Layer && features == 1;
                if !is_own_mean || bias.is_some() {
                    let limit = if kind == NormKind::Rms { 1e-6 } else { 5e-6 };
                    assert_close("output", &y, &reference(&wide(&x)), limit);
                }
                assert_eq!(wide(&norm::recompute(&saved, &x, params).unwrap()), wide(&y));
                let dx = norm::backward(&saved, &x, params, &dy, None).unwrap();
                let loss = |inputs: &[Vec<f64>]| dot(&reference(&inputs[0]), &wide(&dy));
                if is_own_mean {
                    assert_eq!(wide(&dx), [0.0], "one feature is its own mean");
                    continue;
                }
                // The gradient of a single feature is nearly zero: a difference of equal numbers.
                let limit = match (kind, features) {
                    (NormKind::Rms, 1) => 1e-3,
                    (NormKind::Rms, _) => 1e-5,
                    (NormKind::Layer, _) => 2e-5,
                };
                assert_gradient("gradient", &dx, &[&x], 0, loss, limit);
            }
        }
    }
}

#[test]
fn norms_add_the_residual_and_its_gradient() {
    let shape = (5, 37);
    let w = vector(37, 3);
    for kind in [NormKind::Rms, NormKind::Layer] {
        let params = NormParams { kind, weight: &w, bias: None, eps: 1e-3 };
        let (x, residual) = (matrix(shape, 1), matrix(shape, 2));
        let sum = x.add(&residual).unwrap();
        let (expected, _) = norm::forward(&sum, params).unwrap();
        let (y, saved) = norm::add_forward(&x, &residual, params).unwrap();
        assert_eq!((wide(&x), wide(&y)), (wide(&sum), wide(&expected)));

        let (dy, beside) = (matrix(shape, 4), matrix(shape, 5));
        let alone = norm::backward(&saved, &x, params, &dy, None).unwrap();
        let both = norm::backward(&saved, &x, params, &dy, Some(&beside)).unwrap();
        assert_eq!(wide(&both), wide(&alone.add(&beside).unwrap()));
    }
}

/// The activations by their names in Transformers: `silu`, and torch's `gelu(approximate="tanh")`.
fn activated(activation: ActivationFunction, g: f64) -> f64 {
    match activation {
        ActivationFunction::Silu => g * sigmoid(g),
        ActivationFunction::GeluTanh => {
            0.5 * g * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (g + 0.044715 * g.powi(3))).tanh())
        }
    }
}

#[test]
fn gated_activations_and_their_gradients_match_the_definition() {
    let shape = (6, 37);
    let (gate, up) = (matrix(shape, 1).affine(6.0, 0.0).unwrap(), matrix(shape, 2));
    let dy = matrix(shape, 3);
    let upstream = wide(&dy);
    for activation in [ActivationFunction::Silu, ActivationFunction::GeluTanh] {
        let reference = |inputs: &[Vec<f64>]| -> Vec<f64> {
            inputs[0].iter().zip(&inputs[1]).map(|(g, u)| activated(activation, *g) * u).collect()
        };
        let what = |of: &str| format!("{activation:?}: {of}");
        let y = glu::forward(&gate, &up, activation).unwrap();
        assert_close(&what("output"), &y, &reference(&[wide(&gate), wide(&up)]), 1e-6);
        let (dgate, dup) = glu::backward(&gate, &up, &dy, activation).unwrap();
        let loss = |inputs: &[Vec<f64>]| dot(&reference(inputs), &upstream);
        assert_gradient(&what("gradient of gate"), &dgate, &[&gate, &up], 0, loss, 1e-5);
        assert_gradient(&what("gradient of up"), &dup, &[&gate, &up], 1, loss, 1e-5);

        let reference = |x: &[f64]| x.iter().map(|x| activated(activation, *x)).collect::<Vec<_>>();
        let y = glu::activation_forward(&gate, activation).unwrap();
        assert_close(&what("activation"), &y, &reference(&wide(&gate)), 1e-6);
        let dx = glu::activation_backward(&gate, &dy, activation).unwrap();
        let loss = |inputs: &[Vec<f64>]| dot(&reference(&inputs[0]), &upstream);
        assert_gradient(&what("gradient of the activation"), &dx, &[&gate], 0, loss, 1e-5);
    }
}

#[test]
fn gelu_matches_torch() {
    // torch 2.15 in f64: gate, gelu(gate, approximate="tanh"), its derivative.
    let torch = [
        (-9.0, 0.0, 0.0),
        (-3.0, -0.003_637_392_081_772_994, -0.011_584_166_630_969_65),
        (-1.5, -0.100_428_423_019_767_07, -0.127_710_793_151_433_1),
        (-0.5, -0.154_285_990_174_856_06, 0.132_630_096_465_357_65),
        (0.0, 0.0, 0.5),
        (0.7, 0.530_570_134_705_116_7, 0.976_357_218_656_104),
        (2.0, 1.954_597_694_087_775, 1.086_099_256_623_618_3),
        (5.0, 4.999_999_770_820_381, 1.000_001_546_361_988),
    ];
    let gate = tensor(&torch.map(|(gate, ..)| gate as f32), (1, 8));
    let ones = tensor(&[1.0; 8], (1, 8));
    let close = |got: &Tensor, expected: [f64; 8]| {
        for (got, expected) in wide(got).into_iter().zip(expected) {
            assert!((got - expected).abs() < 2e-6, "{got} is not {expected}");
        }
    };
    let y = glu::forward(&gate, &ones, ActivationFunction::GeluTanh).unwrap();
    close(&y, torch.map(|(_, y, _)| y));
    let (dgate, dup) = glu::backward(&gate, &ones, &ones, ActivationFunction::GeluTanh).unwrap();
    close(&dgate, torch.map(|(.., slope)| slope));
    assert_eq!(wide(&dup), wide(&y));
}

#[test]
fn gated_activations_of_extreme_gates_are_finite() {
    let gate = tensor(&[-1e38, -200.0, -90.0, 90.0, 200.0, 1e38], (1, 6));
    let ones = tensor(&[1.0; 6], (1, 6));
    for activation in [ActivationFunction::Silu, ActivationFunction::GeluTanh] {
        let y = wide(&glu::forward(&gate, &ones, activation).unwrap());
        assert!(y[..3].iter().all(|y| y.abs() < 1e-6), "{activation:?}: {y:?}");
        assert_eq!(y[3..], [90.0, 200.0, f64::from(1e38_f32)]);
        let (dgate, _) = glu::backward(&gate, &ones, &ones, activation).unwrap();
        assert!(relative_error(&wide(&dgate), &[0.0, 0.0, 0.0, 1.0, 1.0, 1.0]) < 1e-6, "{activation:?}");
        let not_finite = glu::forward(&tensor(&[f32::NAN], (1, 1)), &tensor(&[1.0], (1, 1)), activation);
        assert!(wide(&not_finite.unwrap())[0].is_nan());
    }
}

/// The angle of pair `i` at `position`, without scaling of frequencies.
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

/// All or some of the features of a head are rotated, with and without factors of the positions.
#[test]
fn rotary_embedding_and_its_gradient_match_the_definition() {
    let (seq, heads, head_dim, first) = (5, 3, 10, 4);
    let by_position = PositionScaling { beta: 0.5, original_max_position_embeddings: 3.0 };
    for (rotary_dim, position_scaling) in [(10, None), (4, None), (10, Some(by_position))] {
        let rope = Rope { position_scaling, rotary_dim, ..Rope::new(100.0, head_dim) };
        let table = RopeTable::new(&rope, seq + first, &Device::Cpu).unwrap();
        let reference = |x: &[f64], first: usize| {
            let mut y = x.to_vec();
            for (token, row) in y.chunks_mut(heads * head_dim).enumerate() {
                let position = first + token % seq;
                let factor = position_scaling.map_or(1.0, |_| 1.0 + 0.5 * (1.0 + (position / 3) as f64).ln());
                for head in row.chunks_mut(head_dim) {
                    let half = rotary_dim / 2;
                    for i in 0..half {
                        let (sin, cos) = angle(100.0, rotary_dim, i, position).sin_cos();
                        let (low, high) = (head[i], head[i + half]);
                        head[i] = factor * (low * cos - high * sin);
                        head[i + half] = factor * (high * cos + low * sin);
                    }
                }
            }
            y
        };
        let x = matrix((2 * seq, heads * head_dim), 1);
        for first in [0, first] {
            let y = x.copy().unwrap();
            table.forward(&y, seq, first).unwrap();
            assert_close("output", &y, &reference(&wide(&x), first), 2e-6);
        }
        let dy = matrix((2 * seq, heads * head_dim), 2);
        let upstream = wide(&dy);
        let dx = dy.copy().unwrap();
        table.backward(&dx, seq).unwrap();
        let loss = |inputs: &[Vec<f64>]| dot(&reference(&inputs[0], 0), &upstream);
        assert_gradient("gradient", &dx, &[&x], 0, loss, 1e-5);
    }
}

#[test]
fn rope_scaling_changes_the_expected_frequencies() {
    let (head_dim, positions, theta) = (32, 64, 10_000.0);
    // Unit vectors (1, 0) become (cos, sin) of each pair's angle.
    let turned = |scaling| {
        let mut x = vec![0.0; positions * head_dim];
        x.chunks_mut(head_dim).for_each(|row| row[..head_dim / 2].fill(1.0));
        let x = tensor(&x, (positions, head_dim));
        let rope = Rope { scaling, ..Rope::new(theta, head_dim) };
        let table = RopeTable::new(&rope, positions, &Device::Cpu).unwrap();
        table.forward(&x, positions, 0).unwrap();
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
    assert!(relative_error(&linear, &expected(&|_| 0.25)) < 1e-5);

    // The base grows with the length above 32 positions, so that the lowest frequency is divided by
    // `3 * 64 / 32 - 2`.
    let dynamic = turned(RopeScaling::Dynamic { factor: 3.0, max_position_embeddings: 32.0 });
    let growth = 4.0_f64.powf(32.0 / 30.0).ln() / theta.ln();
    assert!(relative_error(&dynamic, &expected(&|frequency| frequency.powf(growth))) < 1e-5);
    let short = turned(RopeScaling::Dynamic { factor: 3.0, max_position_embeddings: 64.0 });
    assert!(relative_error(&short, &expected(&|_| 1.0)) < 1e-5);

    // Divisors of short or of long sequences, and a factor of the rotated vectors.
    let divisors = |first: f64| (0..16).map(|i| first + f64::from(i)).collect::<Vec<_>>();
    for (original, first) in [(64.0, 1.0), (63.0, 2.0)] {
        let longrope = turned(RopeScaling::LongRope {
            short_factor: divisors(1.0),
            long_factor: divisors(2.0),
            original_max_position_embeddings: original,
            attention_factor: 1.5,
        });
        let pair = |frequency: f64| (-16.0 * frequency.ln() / theta.ln()).round();
        let unit = expected(&|frequency| 1.0 / (first + pair(frequency)));
        let scaled: Vec<f64> = unit.iter().map(|x| 1.5 * x).collect();
        assert!(relative_error(&longrope, &scaled) < 1e-5, "{original}");
    }

    let (factor, low, high, original) = (8.0, 1.0, 4.0, 64.0);
    let llama3 = RopeScaling::Llama3 {
        factor,
        low_freq_factor: low,
        high_freq_factor: high,
        original_max_position_embeddings: original,
    };
    // The code of the paper: wavelengths below 16 are kept, those above 64 are divided by 8, with a
    // ramp in between.
    let scale = |frequency: f64| {
        let turns = original * frequency / (2.0 * std::f64::consts::PI);
        let smooth = ((turns - low) / (high - low)).clamp(0.0, 1.0);
        smooth + (1.0 - smooth) / factor
    };
    let kinds: Vec<f64> =
        (0..head_dim / 2).map(|i| scale(theta.powf(-2.0 * i as f64 / head_dim as f64))).collect();
    assert!(kinds.contains(&1.0) && kinds.contains(&0.125) && kinds.iter().any(|k| *k > 0.125 && *k < 1.0));
    assert!(relative_error(&turned(llama3), &expected(&scale)) < 1e-5);
}

#[test]
fn embedding_reads_f32_and_bf16_rows() {
    let weight = matrix((10, 3), 1);
    let tokens = [9, 0, 9, 4];
    let rows = |weight: &Tensor| -> Vec<f64> {
        let weight = wide(weight);
        tokens.iter().flat_map(|&t| weight[t as usize * 3..(t as usize + 1) * 3].to_vec()).collect()
    };
    for weight in [weight.clone(), weight.to_dtype(DType::BF16).unwrap()] {
        let y = embedding::forward(&weight, &ids(&tokens)).unwrap();
        assert_eq!((y.dtype(), y.dims()), (DType::F32, &[4, 3][..]));
        assert_eq!(wide(&y), rows(&weight));
    }
}

#[test]
fn columns_are_split_and_joined() {
    let x = matrix((3, 7), 1);
    let parts = lora_ops::columns::split(&x, &[2, 5]).unwrap();
    let (a, b) = (parts[0].clone(), parts[1].clone());
    assert_eq!((a.dims(), b.dims()), (&[3, 2][..], &[3, 5][..]));
    let values = wide(&x);
    let of = |columns: std::ops::Range<usize>| -> Vec<f64> {
        (0..3).flat_map(|row| values[row * 7..][columns.clone()].to_vec()).collect()
    };
    assert_eq!((wide(&a), wide(&b)), (of(0..2), of(2..7)));
    assert_eq!(wide(&lora_ops::columns::join(&[a.clone(), b]).unwrap()), values);
    for widths in [[2, 4], [7, 0], [3, 5]] {
        let error = lora_ops::columns::split(&x, &widths).unwrap_err().to_string();
        assert!(error.contains(&format!("{widths:?} of [3, 7]")), "{error}");
    }
    assert!(lora_ops::columns::join(&[]).is_err());
    let error = lora_ops::columns::join(&[a, matrix((4, 1), 2)]).unwrap_err().to_string();
    assert!(error.contains("cannot put [4, 1] beside [3, 2]"), "{error}");
}

#[test]
fn a_rope_table_serves_shorter_sequences_of_the_same_frequencies() {
    let serves = |rope: &Rope, table: usize, positions: usize| {
        RopeTable::new(rope, table, &Device::Cpu).unwrap().serves(positions, rope.context(positions))
    };
    let plain = Rope::new(100.0, 4);
    assert!(serves(&plain, 9, 9) && serves(&plain, 9, 1) && !serves(&plain, 9, 10));
    let scaling = RopeScaling::LongRope {
        short_factor: vec![1.0, 1.5],
        long_factor: vec![2.0, 3.0],
        original_max_position_embeddings: 8.0,
        attention_factor: 1.0,
    };
    let long = Rope { scaling, ..plain.clone() };
    assert!(serves(&long, 20, 9) && serves(&long, 8, 7) && !serves(&long, 20, 8) && !serves(&long, 8, 9));
    let dynamic = RopeScaling::Dynamic { factor: 2.0, max_position_embeddings: 8.0 };
    let dynamic = Rope { scaling: dynamic, ..plain };
    assert!(serves(&dynamic, 8, 5) && serves(&dynamic, 20, 20) && !serves(&dynamic, 20, 19));
}

/// The features of a pair are adjacent: the rotation is that of the usual layout after the features
/// of each head have been sorted into the first and the second features of their pairs.
#[test]
fn interleaved_rotation_is_the_usual_one_of_reordered_features() {
    let (seq, heads, head_dim, rotary_dim) = (5, 3, 10, 6);
    let half = Rope { rotary_dim, ..Rope::new(100.0, head_dim) };
    let interleaved = Rope { is_interleaved: true, ..half.clone() };
    let x = matrix((2 * seq, heads * head_dim), 1);
    let from = |i: usize| if i < rotary_dim { 2 * (i % (rotary_dim / 2)) + i / (rotary_dim / 2) } else { i };
    let reordered = |values: Vec<f64>| -> Vec<f64> {
        values
            .chunks(head_dim)
            .flat_map(|head| (0..head_dim).map(|i| head[from(i)]).collect::<Vec<_>>())
            .collect()
    };
    let usual: Vec<f32> = reordered(wide(&x)).into_iter().map(|v| v as f32).collect();
    let usual = tensor(&usual, x.dims2().unwrap());
    let table = |rope: &Rope| RopeTable::new(rope, seq, &Device::Cpu).unwrap();
    table(&half).forward(&usual, seq, 0).unwrap();
    let original = wide(&x);
    table(&interleaved).forward(&x, seq, 0).unwrap();
    assert_eq!(reordered(wide(&x)), wide(&usual));
    table(&interleaved).backward(&x, seq).unwrap();
    assert!(relative_error(&wide(&x), &original) < 1e-6);
}
