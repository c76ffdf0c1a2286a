//! Copies of tensors between the host and the device that computes. Every function waits until its
//! copy is done.
//!
//! candle's own copies (`to_vec1`, `to_device`, `from_vec`) do not wait if one of their ends is a
//! GPU: CUDA does not define whether a copy from or to pageable memory is done when the call
//! returns.

use candle_core::{DType, Device, Result, Shape, Tensor, WithDType};

use crate::backend::Backend;

/// Returns the elements of a contiguous tensor, in row-major order.
///
/// # Errors
/// The tensor is not of type `T`, or it is on a GPU and not contiguous.
pub fn to_vec<T: WithDType>(tensor: &Tensor) -> Result<Vec<T>> {
    match Backend::of_tensors(&[tensor])? {
        Backend::Cpu => tensor.flatten_all()?.to_vec1(),
        #[cfg(feature = "cuda")]
        Backend::Cuda(gpu) => {
            let mut values = vec![T::zero(); tensor.elem_count()];
            if !values.is_empty() {
                gpu.read(tensor, &mut values)?;
            }
            Ok(values)
        }
    }
}

/// Creates a tensor on `device` with the elements `values`.
///
/// # Errors
/// The number of elements is not that of `shape`, or the GPU is out of memory.
pub fn from_vec<T: WithDType>(values: Vec<T>, shape: impl Into<Shape>, device: &Device) -> Result<Tensor> {
    match Backend::of_device(device)? {
        Backend::Cpu => Tensor::from_vec(values, shape.into(), device),
        #[cfg(feature = "cuda")]
        Backend::Cuda(gpu) => {
            let tensor = gpu.empty(shape, T::DTYPE)?;
            if tensor.elem_count() != values.len() {
                candle_core::bail!(
                    "invalid number of values: {} for a tensor {:?}",
                    values.len(),
                    tensor.shape()
                );
            }
            if !values.is_empty() {
                gpu.write(&tensor, &values)?;
            }
            Ok(tensor)
        }
    }
}

/// Copies a contiguous tensor to `device`; returns the tensor itself if it is already there.
///
/// # Errors
/// The tensor is on another GPU, or is not f32, bf16, f64, u32 or u8; the GPU is out of memory.
pub fn to_device(tensor: &Tensor, device: &Device) -> Result<Tensor> {
    if tensor.device().same_device(device) {
        return Ok(tensor.clone());
    }
    match tensor.dtype() {
        DType::F32 => copy::<f32>(tensor, device),
        DType::BF16 => copy::<half::bf16>(tensor, device),
        DType::F64 => copy::<f64>(tensor, device),
        DType::U32 => copy::<u32>(tensor, device),
        DType::U8 => copy::<u8>(tensor, device),
        other => candle_core::bail!("tensors of {other:?} cannot be copied between devices"),
    }
}

fn copy<T: WithDType>(tensor: &Tensor, device: &Device) -> Result<Tensor> {
    match Backend::of_device(device)? {
        Backend::Cpu => from_vec(to_vec::<T>(tensor)?, tensor.shape(), device),
        #[cfg(feature = "cuda")]
        Backend::Cuda(gpu) => {
            let copy = gpu.empty(tensor.shape(), T::DTYPE)?;
            if tensor.elem_count() > 0 {
                gpu.write::<T>(&copy, &crate::cpu::read(tensor)?)?;
            }
            Ok(copy)
        }
    }
}

/// Creates zeros on `device`.
///
/// # Errors
/// The GPU is out of memory.
pub fn zeros(shape: impl Into<Shape>, dtype: DType, device: &Device) -> Result<Tensor> {
    match Backend::of_device(device)? {
        Backend::Cpu => Tensor::zeros(shape, dtype, device),
        #[cfg(feature = "cuda")]
        Backend::Cuda(gpu) => {
            let tensor = gpu.empty(shape, dtype)?;
            gpu.zero(&tensor)?;
            Ok(tensor)
        }
    }
}
