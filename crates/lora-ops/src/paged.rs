//! Moments that lie in the host's memory: a GPU has a window of them at a time, while it makes a step.
//!
//! They are candle's CPU tensors, so hashes and checkpoints read them as any others. A part is copied to the GPU, changed there by
//! the kernel that changes unpaged moments, and copied back; the copies wait, so that nothing is under way when a step is over.

use candle_core::{DType, Device, Result, Tensor};

/// Where moments lie.
#[derive(Debug, Clone, Copy)]
pub struct Home<'a> {
    /// Where the parameters are.
    pub device: &'a Device,
    /// Paged: of each moment so many elements are on the device at a time. `None`: all of them, beside the parameters.
    pub window: Option<usize>,
}

impl<'a> From<&'a Device> for Home<'a> {
    fn from(device: &'a Device) -> Self {
        Self { device, window: None }
    }
}

impl Home<'_> {
    /// Where the moments' tensors are.
    pub fn tensors(&self) -> &Device {
        if self.window.is_some() { &Device::Cpu } else { self.device }
    }

    /// Elements that are stepped at a time, at least one.
    pub fn window(&self) -> usize {
        self.window.unwrap_or(usize::MAX).max(1)
    }
}

/// Room on a device for a part of a vector that lies elsewhere.
pub(crate) struct Room {
    /// `None`: the vector is on the device already.
    room: Option<Tensor>,
}

impl Room {
    /// For parts of `vector` of up to `len` elements.
    pub(crate) fn new(vector: &Tensor, len: usize, device: &Device) -> Result<Self> {
        let is_there = vector.device().same_device(device);
        let room = (!is_there).then(|| zeros(len.min(vector.elem_count()), vector.dtype(), device));
        Ok(Self { room: room.transpose()? })
    }

    /// A part as the device has it: its copy, or itself.
    pub(crate) fn load(&self, part: &Tensor) -> Result<Tensor> {
        let Some(room) = &self.room else { return Ok(part.clone()) };
        let copy = room.narrow(0, 0, part.elem_count())?;
        upload(part, &copy)?;
        Ok(copy)
    }

    /// Brings a changed `copy` of [`Self::load`] home.
    pub(crate) fn store(&self, copy: &Tensor, part: &Tensor) -> Result<()> {
        if self.room.is_some() { download(copy, part) } else { Ok(()) }
    }
}

/// An allocation of nothing is an error of CUDA's.
pub(crate) fn zeros(n: usize, dtype: DType, device: &Device) -> Result<Tensor> {
    Tensor::zeros(n.max(1), dtype, device)?.narrow(0, 0, n)
}

#[cfg(feature = "cuda")]
fn upload(from: &Tensor, to: &Tensor) -> Result<()> {
    use crate::cpu::read;

    let gpu = gpu(to)?;
    match from.dtype() {
        DType::U8 => read(from, |values: &[u8]| gpu.write(to, values))?,
        DType::U32 => read(from, |values: &[u32]| gpu.write(to, values))?,
        _ => read(from, |values: &[f32]| gpu.write(to, values))?,
    }
}

#[cfg(feature = "cuda")]
fn download(from: &Tensor, to: &Tensor) -> Result<()> {
    use crate::cpu::{update_f32, update_u8};

    let gpu = gpu(from)?;
    match from.dtype() {
        DType::U8 => update_u8(to, |values| gpu.read(from, values))?,
        _ => update_f32(to, |values| gpu.read(from, values))?,
    }
}

#[cfg(feature = "cuda")]
fn gpu(tensor: &Tensor) -> Result<std::sync::Arc<crate::cuda::Gpu>> {
    match crate::place::Place::of(&[tensor])? {
        crate::place::Place::Cuda(gpu) => Ok(gpu),
        crate::place::Place::Cpu => candle_core::bail!("moments on a GPU with parameters that are not"),
    }
}

#[cfg(not(feature = "cuda"))]
fn upload(from: &Tensor, to: &Tensor) -> Result<()> {
    candle_core::bail!(
        "moments on {:?}, parameters on {:?}",
        from.device().location(),
        to.device().location()
    )
}

#[cfg(not(feature = "cuda"))]
fn download(from: &Tensor, to: &Tensor) -> Result<()> {
    upload(to, from)
}
