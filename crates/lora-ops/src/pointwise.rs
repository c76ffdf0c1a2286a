//! Elementwise operations: sums, multiples, zeros, copies into another type.

use candle_core::{Result, Tensor};

use crate::backend::Backend;

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;

/// Computes `a += b`, element by element. Both are f32 or, on a GPU, both bf16, and have different
/// storages.
#[tracing::instrument(level = "trace", name = "add", skip_all)]
pub fn add_assign(a: &Tensor, b: &Tensor) -> Result<()> {
    if a.elem_count() != b.elem_count() {
        candle_core::bail!("cannot add {:?} to {:?}", b.shape(), a.shape());
    }
    match Backend::of_tensors(&[a, b])? {
        Backend::Cpu => cpu::add_assign(a, b),
        #[cfg(feature = "cuda")]
        Backend::Cuda(gpu) => cuda::add_assign(&gpu, a, b),
    }
}

/// Returns `factor * x`.
#[tracing::instrument(level = "trace", name = "scale", skip_all)]
pub fn scaled(x: &Tensor, factor: f64) -> Result<Tensor> {
    match Backend::of_tensors(&[x])? {
        Backend::Cpu => cpu::scaled(x, factor as f32),
        #[cfg(feature = "cuda")]
        Backend::Cuda(gpu) => cuda::scaled(&gpu, x, factor as f32),
    }
}

/// Returns `cap tanh(x / cap)` of f32 elements.
#[tracing::instrument(level = "trace", name = "softcap", skip_all)]
pub fn softcapped(x: &Tensor, cap: f32) -> Result<Tensor> {
    match Backend::of_tensors(&[x])? {
        Backend::Cpu => cpu::softcapped(x, cap),
        #[cfg(feature = "cuda")]
        Backend::Cuda(gpu) => cuda::softcapped(&gpu, x, cap),
    }
}

/// Sets every element of a contiguous tensor to 0.
pub fn zero(x: &Tensor) -> Result<()> {
    match Backend::of_tensors(&[x])? {
        Backend::Cpu => x.zero_set(),
        #[cfg(feature = "cuda")]
        Backend::Cuda(gpu) => gpu.zero(x),
    }
}

/// Copies `from` (f32) into `to` (f32 or bf16), rounded to the nearest, ties to even. The tensors
/// have different storages.
pub fn round_into(from: &Tensor, to: &Tensor) -> Result<()> {
    if from.shape() != to.shape() {
        candle_core::bail!("cannot copy {:?} into {:?}", from.shape(), to.shape());
    }
    match Backend::of_tensors(&[from, to])? {
        Backend::Cpu => cpu::round_into(from, to),
        #[cfg(feature = "cuda")]
        Backend::Cuda(gpu) => cuda::round_into(&gpu, from, to),
    }
}
