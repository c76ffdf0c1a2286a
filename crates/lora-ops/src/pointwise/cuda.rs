use candle_core::{DType, Result, Tensor};

use crate::cuda::{Gpu, suffix};

pub(super) fn add_assign(gpu: &Gpu, a: &Tensor, b: &Tensor) -> Result<()> {
    let (dtype, n) = (a.dtype(), a.elem_count());
    let args = [gpu.arg(a, dtype)?.updated(), gpu.arg(b, dtype)?, (n as u64).into()];
    gpu.launch_flat(&format!("pointwise_add_{}", suffix(dtype)?), n, &args)
}

pub(super) fn scaled(gpu: &Gpu, x: &Tensor, factor: f32) -> Result<Tensor> {
    let (dtype, n) = (x.dtype(), x.elem_count());
    let y = gpu.empty(x.shape(), dtype)?;
    let args = [gpu.arg(x, dtype)?, gpu.arg(&y, dtype)?, factor.into(), (n as u64).into()];
    gpu.launch_flat(&format!("pointwise_scale_{}", suffix(dtype)?), n, &args)?;
    Ok(y)
}

pub(super) fn softcapped(gpu: &Gpu, x: &Tensor, cap: f32) -> Result<Tensor> {
    let n = x.elem_count();
    let y = gpu.empty(x.shape(), DType::F32)?;
    let args = [gpu.arg(x, DType::F32)?, gpu.arg(&y, DType::F32)?, cap.into(), (n as u64).into()];
    gpu.launch_flat("pointwise_softcap_f32", n, &args)?;
    Ok(y)
}

pub(super) fn round_into(gpu: &Gpu, from: &Tensor, to: &Tensor) -> Result<()> {
    let (dtype, n) = (to.dtype(), to.elem_count());
    let args = [gpu.arg(from, DType::F32)?, gpu.arg(to, dtype)?, (n as u64).into()];
    gpu.launch_flat(&format!("pointwise_round_{}", suffix(dtype)?), n, &args)
}
