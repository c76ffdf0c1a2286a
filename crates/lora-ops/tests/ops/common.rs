//! Random tensors, and comparisons of tensors with an f64 reference.

use candle_core::{DType, Device, Tensor};
use lora_ops::Ids;
use lora_spec::Philox;
use lora_test_kit::numbers;

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
    numbers::bits(&tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap())
}

/// [`numbers::assert_close`] for a tensor.
pub(crate) fn assert_close(what: &str, got: &Tensor, expected: &[f64], limit: f64) {
    numbers::assert_close(what, &wide(got), expected, limit);
}

/// [`numbers::assert_gradient`] for tensors.
pub(crate) fn assert_gradient(
    what: &str,
    gradient: &Tensor,
    inputs: &[&Tensor],
    which: usize,
    f: impl Fn(&[Vec<f64>]) -> f64,
    limit: f64,
) {
    let inputs: Vec<Vec<f64>> = inputs.iter().map(|input| wide(input)).collect();
    numbers::assert_gradient(what, &wide(gradient), &inputs, which, f, limit);
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
