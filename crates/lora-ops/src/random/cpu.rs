//! Random tensors on the CPU.

use candle_core::{DType, Device, Result, Shape, Tensor, WithDType};
use half::bf16;
use lora_spec::Philox;
use rayon::prelude::*;

use super::{RandomStream, Uniform};
use crate::cpu::TASK_ELEMENTS;

pub(super) fn uniform(
    shape: Shape,
    distribution: Uniform,
    dtype: DType,
    philox: &Philox,
    stream: RandomStream,
) -> Result<Tensor> {
    match dtype {
        DType::F32 => floats(shape, philox, stream, |word| distribution.value(word)),
        DType::BF16 => floats(shape, philox, stream, |word| bf16::from_f32(distribution.value(word))),
        other => candle_core::bail!("random numbers must be f32 or bf16, not {other:?}"),
    }
}

fn floats<T: WithDType>(
    shape: Shape,
    philox: &Philox,
    stream: RandomStream,
    value: impl Fn(u32) -> T + Sync,
) -> Result<Tensor> {
    let mut values = vec![T::zero(); shape.elem_count()];
    values.par_chunks_mut(TASK_ELEMENTS).enumerate().for_each(|(chunk, values)| {
        for (block, values) in values.chunks_mut(4).enumerate() {
            let words = philox.words(counter(chunk * (TASK_ELEMENTS / 4) + block, stream));
            values.iter_mut().zip(words).for_each(|(to, word)| *to = value(word));
        }
    });
    Tensor::from_vec(values, shape, &Device::Cpu)
}

pub(super) fn bytes(len: usize, philox: &Philox, stream: RandomStream) -> Result<Tensor> {
    let mut bytes = vec![0_u8; len];
    bytes.par_chunks_mut(TASK_ELEMENTS).enumerate().for_each(|(chunk, bytes)| {
        for (block, bytes) in bytes.chunks_mut(16).enumerate() {
            let words = philox.words(counter(chunk * (TASK_ELEMENTS / 16) + block, stream));
            let drawn = words.into_iter().flat_map(u32::to_le_bytes);
            bytes.iter_mut().zip(drawn).for_each(|(to, byte)| *to = byte);
        }
    });
    Tensor::from_vec(bytes, len, &Device::Cpu)
}

fn counter(block: usize, stream: RandomStream) -> [u32; 4] {
    [block as u32, (block as u64 >> 32) as u32, stream as u32, 0]
}
