//! Random tensors for measurements. Each element is a pure function of a key and its index, with
//! the same bits on the CPU and on a GPU.
//!
//! A tensor is drawn from one Philox key. The third word of the counter, the stream, separates the
//! tensors of one key.

use candle_core::{DType, Device, Result, Shape, Tensor};
use lora_spec::Philox;

use crate::backend::Backend;

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;

/// The tensors that are drawn from one key.
#[derive(Debug, Clone, Copy)]
pub(crate) enum RandomStream {
    /// Dense matrices.
    Dense = 0,
    /// Codes of a quantized matrix.
    Codes = 1,
    /// Scales of a quantized matrix or, if the scales are quantized too, the second-level scales.
    Scales = 2,
    /// Quantized scales.
    ScaleCodes = 3,
}

/// A uniform distribution over `[center - bound, center + bound)`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Uniform {
    pub(crate) center: f32,
    pub(crate) bound: f32,
}

impl Uniform {
    /// Maps a random word to a value of the distribution.
    fn value(self, word: u32) -> f32 {
        self.center + (2.0 * Philox::unit(word) - 1.0) * self.bound
    }
}

/// Creates a tensor of `dtype` (f32 or bf16) on `device` with elements that are uniform in
/// `[-bound, bound)`.
///
/// Element `i` in row-major order is made from word `i % 4` at the counter `i / 4` of `philox`.
pub fn uniform(
    shape: impl Into<Shape>,
    bound: f32,
    dtype: DType,
    philox: &Philox,
    device: &Device,
) -> Result<Tensor> {
    let distribution = Uniform { center: 0.0, bound };
    draw(shape.into(), distribution, dtype, philox, RandomStream::Dense, device)
}

/// Does the same as [`uniform`] with any distribution and stream.
pub(crate) fn draw(
    shape: Shape,
    distribution: Uniform,
    dtype: DType,
    philox: &Philox,
    stream: RandomStream,
    device: &Device,
) -> Result<Tensor> {
    match Backend::of_device(device)? {
        Backend::Cpu => cpu::uniform(shape, distribution, dtype, philox, stream),
        #[cfg(feature = "cuda")]
        Backend::Cuda(gpu) => cuda::uniform(&gpu, shape, distribution, dtype, philox, stream),
    }
}

/// Creates a u8 vector of `len` random bytes on `device`.
///
/// Byte `i` is byte `i % 16` of the words at the counter `i / 16` of `philox`, with the lowest byte
/// of each word first.
pub(crate) fn bytes(len: usize, philox: &Philox, stream: RandomStream, device: &Device) -> Result<Tensor> {
    match Backend::of_device(device)? {
        Backend::Cpu => cpu::bytes(len, philox, stream),
        #[cfg(feature = "cuda")]
        Backend::Cuda(gpu) => cuda::bytes(&gpu, len, philox, stream),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Elements are word `i % 4` of draw `i / 4`, bytes are byte `i % 16` of draw `i / 16`. One
    /// length is greater than the part of a tensor that one thread fills.
    #[test]
    fn elements_are_the_philox_words_and_bytes() {
        let philox = Philox::new(7, "model.layers.0.mlp.up_proj.weight");
        for len in [1, 6, 40_003] {
            let floats: Vec<f32> =
                uniform(len, 0.25, DType::F32, &philox, &Device::Cpu).unwrap().to_vec1().unwrap();
            let rounded = uniform(len, 0.25, DType::BF16, &philox, &Device::Cpu).unwrap();
            let rounded: Vec<half::bf16> = rounded.to_vec1().unwrap();
            for i in 0..len {
                let word = philox.words([i as u32 / 4, 0, 0, 0])[i % 4];
                let value = (2.0 * Philox::unit(word) - 1.0) * 0.25;
                assert_eq!((floats[i], rounded[i]), (value, half::bf16::from_f32(value)), "element {i}");
            }
            let drawn: Vec<u8> =
                bytes(len, &philox, RandomStream::ScaleCodes, &Device::Cpu).unwrap().to_vec1().unwrap();
            for (i, byte) in drawn.into_iter().enumerate() {
                let word = philox.words([i as u32 / 16, 0, 3, 0])[i % 16 / 4];
                assert_eq!(byte, word.to_le_bytes()[i % 4], "byte {i}");
            }
        }
        assert!(uniform(4, 1.0, DType::U8, &philox, &Device::Cpu).is_err());
    }
}
