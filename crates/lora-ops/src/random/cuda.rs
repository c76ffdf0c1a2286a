//! Random tensors on a GPU.

use candle_core::{DType, Result, Shape, Tensor};
use lora_spec::Philox;

use super::{RandomStream, Uniform};
use crate::cuda::{Gpu, suffix};

pub(super) fn uniform(
    gpu: &Gpu,
    shape: Shape,
    distribution: Uniform,
    dtype: DType,
    philox: &Philox,
    stream: RandomStream,
) -> Result<Tensor> {
    let kernel = format!("random_uniform_{}", suffix(dtype)?);
    let n = shape.elem_count();
    let out = gpu.empty(shape, dtype)?;
    let [key_low, key_high] = philox.key();
    let args = [
        gpu.arg(&out, dtype)?,
        (n as u64).into(),
        key_low.into(),
        key_high.into(),
        (stream as u32).into(),
        distribution.center.into(),
        distribution.bound.into(),
    ];
    gpu.launch_flat(&kernel, n, &args)?;
    Ok(out)
}

pub(super) fn bytes(gpu: &Gpu, len: usize, philox: &Philox, stream: RandomStream) -> Result<Tensor> {
    let bytes = gpu.empty(len, DType::U8)?;
    let [key_low, key_high] = philox.key();
    let args = [
        gpu.arg(&bytes, DType::U8)?,
        (len as u64).into(),
        key_low.into(),
        key_high.into(),
        (stream as u32).into(),
    ];
    // A thread writes a draw of four words.
    gpu.launch_flat("random_bytes_u8", len.div_ceil(4), &args)?;
    Ok(bytes)
}
