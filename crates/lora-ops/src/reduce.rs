//! Sums over long vectors in a fixed order.

use candle_core::{Result, Tensor};

use crate::backend::Backend;

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;

#[cfg(feature = "cuda")]
pub use cuda::tree_combine;

/// Elements whose squares are summed in f32; the sums of these chunks are added in f64.
const SUM_CHUNK: usize = 4096;

/// Keys of the two sums of a fingerprint: digits of pi.
const FINGERPRINT_KEYS: [u64; 2] = [0x243f_6a88_85a3_08d3, 0x1319_8a2e_0370_7344];

/// Returns the sum of squares of an f32 vector. Chunks of 4096 elements are summed in f32, and
/// their sums are added in f64, in order. The result is not finite if an element is not. Waits for
/// the GPU.
pub fn sum_of_squares(x: &Tensor) -> Result<f64> {
    let partial = match Backend::of_tensors(&[x])? {
        Backend::Cpu => cpu::sums_of_squares(x)?,
        #[cfg(feature = "cuda")]
        Backend::Cuda(gpu) => cuda::sums_of_squares(&gpu, x)?,
    };
    Ok(partial.iter().map(|p| f64::from(*p)).sum())
}

/// Computes `x *= factor` for an f32 vector, in place.
pub fn scale(x: &Tensor, factor: f32) -> Result<()> {
    match Backend::of_tensors(&[x])? {
        Backend::Cpu => cpu::scale(x, factor),
        #[cfg(feature = "cuda")]
        Backend::Cuda(gpu) => cuda::scale(&gpu, x, factor),
    }
}

/// Hashes the bits of vectors, f32 or u8, as if they were one vector. The hash is the same on every
/// device, also if the vectors are on several devices. Waits for the GPU.
///
/// The bits of each element (32; a byte is the lowest 8) and its index are mixed by the finalizer
/// of splitmix64 under two keys. The results are summed, together with the number of elements,
/// modulo 2^64. Integer sums do not depend on their order.
pub fn fingerprint(parts: &[&Tensor]) -> Result<[u64; 2]> {
    let mut sums = [0; 2];
    let mut first = 0;
    for parts in parts.chunk_by(|a, b| a.device().same_device(b.device())) {
        let of_parts = match Backend::of_tensors(parts)? {
            Backend::Cpu => cpu::hashes(parts, first)?,
            #[cfg(feature = "cuda")]
            Backend::Cuda(gpu) => cuda::hashes(&gpu, parts, first)?,
        };
        sums = [0, 1].map(|i| of_parts[i].wrapping_add(sums[i]));
        first += parts.iter().map(|part| part.elem_count() as u64).sum::<u64>();
    }
    Ok(sums.map(|sum| sum.wrapping_add(first)))
}
