//! Random tensors, and gradient checks by finite differences of an f64 reference.

use candle_core::{DType, Device, Tensor};
use lora_ops::Ids;
use lora_spec::Philox;

/// Uniform numbers in [-1, 1) that f32 represents exactly.
pub(crate) fn random(n: usize, seed: u64) -> Vec<f32> {
    let philox = Philox::new(seed, "test");
    (0..n).map(|i| 2.0 * Philox::unit(philox.words([i as u32, 0, 0, 0])[0]) - 1.0).collect()
}

pub(crate) fn tensor(values: &[f32], shape: (usize, usize)) -> Tensor {
    Tensor::from_slice(values, shape, &Device::Cpu).unwrap()
}

/// A random matrix.
pub(crate) fn matrix(shape: (usize, usize), seed: u64) -> Tensor {
    tensor(&random(shape.0 * shape.1, seed), shape)
}

pub(crate) fn vector(n: usize, seed: u64) -> Tensor {
    Tensor::from_vec(random(n, seed), n, &Device::Cpu).unwrap()
}

pub(crate) fn ids(values: &[u32]) -> Ids {
    Ids::new(values, &Device::Cpu).unwrap()
}

/// Dataset row and position of each token, in the layout that dropout takes.
pub(crate) fn places(tokens: &[(u32, u32)]) -> Ids {
    ids(&tokens.iter().flat_map(|&(row, position)| [row, position]).collect::<Vec<_>>())
}

/// The elements of a tensor, as f64.
pub(crate) fn wide(tensor: &Tensor) -> Vec<f64> {
    tensor.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

pub(crate) fn bits(tensor: &Tensor) -> Vec<u32> {
    tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
}

/// `max|a - b| / max|b|`.
pub(crate) fn error(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    let largest = b.iter().fold(0.0_f64, |m, v| m.max(v.abs()));
    let furthest =
        a.iter().zip(b).fold(0.0_f64, |m, (a, b)| if a.is_nan() { f64::NAN } else { m.max((a - b).abs()) });
    furthest / largest
}

/// Fails if `got` differs from `expected` by more than `limit`.
pub(crate) fn assert_close(what: &str, got: &Tensor, expected: &[f64], limit: f64) {
    let error = error(&wide(got), expected);
    assert!(error <= limit, "{what} is off by {error:e}");
}

/// Fails if `gradient` differs from the central differences of `f` with respect to `inputs[which]`
/// by more than `limit`.
///
/// Of a long input, `SAMPLES` elements that are spread over all of it are checked.
pub(crate) fn assert_gradient(
    what: &str,
    gradient: &Tensor,
    inputs: &[&Tensor],
    which: usize,
    f: impl Fn(&[Vec<f64>]) -> f64,
    limit: f64,
) {
    const SAMPLES: usize = 60;
    const STEP: f64 = 1e-4;
    let mut inputs: Vec<Vec<f64>> = inputs.iter().map(|t| wide(t)).collect();
    let gradient = wide(gradient);
    let n = gradient.len();
    assert_eq!(n, inputs[which].len(), "{what}");
    let samples = n.min(SAMPLES);
    let (mut got, mut expected) = (Vec::new(), Vec::new());
    for sample in 0..samples {
        // One element of each of `samples` equal parts, at a different offset in each part.
        let (from, to) = (sample * n / samples, (sample + 1) * n / samples);
        let i = from + (sample * 7919) % (to - from);
        let value = inputs[which][i];
        let mut at = |value: f64| {
            inputs[which][i] = value;
            f(&inputs)
        };
        expected.push((at(value + STEP) - at(value - STEP)) / (2.0 * STEP));
        inputs[which][i] = value;
        got.push(gradient[i]);
    }
    let error = error(&got, &expected);
    assert!(error <= limit, "{what} is off by {error:e}");
}

/// The scalar product of `a` and `b`, whose gradient with respect to `a` is `b`.
pub(crate) fn dot(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// `a` `[m, k]` times the transpose of `b` `[n, k]`.
pub(crate) fn product(a: &[f64], b: &[f64], k: usize) -> Vec<f64> {
    a.chunks(k).flat_map(|a| b.chunks(k).map(|b| dot(a, b)).collect::<Vec<_>>()).collect()
}

pub(crate) fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}
