//! Moments that lie in the host's memory: a GPU has two windows of them at a time, while it makes a step.
//!
//! They are candle's CPU tensors, so hashes and checkpoints read them as any others. While the kernel that
//! changes unpaged moments runs over one window, the next one is copied to the GPU and the one before back;
//! their memory is pinned, so that the copies run beside the kernels. A step ends with a wait for them.

use std::ops::Range;

use candle_core::{DType, Device, Result, Tensor};

use crate::transfer;

/// Where moments lie.
#[derive(Debug, Clone, Copy)]
pub struct MomentPlacement<'a> {
    /// Where the parameters are.
    pub device: &'a Device,
    /// Paged: of each moment at most so many elements are on the device at a time (but two at least).
    /// `None`: all of them, beside the parameters.
    pub window: Option<usize>,
}

impl<'a> From<&'a Device> for MomentPlacement<'a> {
    fn from(device: &'a Device) -> Self {
        Self { device, window: None }
    }
}

impl MomentPlacement<'_> {
    /// Where the moments' tensors are.
    pub fn moment_device(&self) -> &Device {
        if self.window.is_some() { &Device::Cpu } else { self.device }
    }

    /// Elements on the device at a time.
    pub fn window(&self) -> usize {
        self.window.unwrap_or(usize::MAX)
    }

    /// Pins the memory of a tensor of [`Self::tensors`], where that makes copies of it faster.
    ///
    /// # Errors
    /// The tensor is not contiguous.
    pub fn pin(&self, tensor: &Tensor) -> Result<Option<PinnedTensor>> {
        if self.device.is_cpu() || !tensor.device().is_cpu() {
            return Ok(None);
        }
        #[cfg(feature = "cuda")]
        if let crate::backend::Backend::Cuda(gpu) = crate::backend::Backend::of_device(self.device)? {
            let registration = gpu.pin(tensor)?;
            return Ok(registration
                .map(|registration| PinnedTensor { _registration: registration, _tensor: tensor.clone() }));
        }
        Ok(None)
    }
}

/// Pinned memory of a tensor, which it keeps alive.
#[derive(Debug)]
pub struct PinnedTensor {
    // In this order: memory is unpinned before it is freed.
    #[cfg(feature = "cuda")]
    _registration: crate::cuda::PinnedRegistration,
    #[cfg(feature = "cuda")]
    _tensor: Tensor,
}

/// Half of `window`, rounded up: what is stepped at a time where two halves are on the device.
pub(crate) fn half_window(window: usize) -> usize {
    window.div_ceil(2).max(1)
}

/// The windows of `half` elements of a vector of `len`, in order.
pub(crate) fn windows(len: usize, half: usize) -> Vec<Range<usize>> {
    (0..len).step_by(half).map(|first| first..len.min(first.saturating_add(half))).collect()
}

/// A vector that is stepped window by window.
#[derive(Clone, Copy)]
pub(crate) struct PagedVector<'a> {
    pub(crate) tensor: &'a Tensor,
    /// A step changes it, so that it is copied back.
    pub(crate) is_changed: bool,
}

/// Two buffers on a device for windows of vectors that lie elsewhere. They are all there before a step
/// begins: a step is not left half done for want of memory.
pub(crate) struct StagingBuffers {
    device: Device,
    /// Of each vector; none of one that is on the device already.
    pairs: Vec<Option<[Tensor; 2]>>,
}

impl StagingBuffers {
    /// For windows of up to `longest` elements of each of `vectors`.
    pub(crate) fn new(vectors: &[(&Tensor, usize)], device: &Device) -> Result<Self> {
        let pair = |&(vector, longest): &(&Tensor, usize)| -> Result<Option<[Tensor; 2]>> {
            if vector.device().same_device(device) {
                return Ok(None);
            }
            let len = vector.elem_count();
            let buffer = |len: usize| zeros(len, vector.dtype(), device);
            // The second one is needed only for a second window.
            let (first, second) = (longest.min(len), if len > longest { longest } else { 0 });
            Ok(Some([buffer(first)?, buffer(second)?]))
        };
        Ok(Self { device: device.clone(), pairs: vectors.iter().map(pair).collect::<Result<_>>()? })
    }

    /// Calls `step(number, parts)` for each window in order: the part of each of `vectors` as the device has
    /// it, from `ranges(number)`. All changes are back in `vectors` when this returns.
    pub(crate) fn for_each(
        &self,
        vectors: &[PagedVector],
        count: usize,
        ranges: impl Fn(usize) -> Vec<Range<usize>>,
        mut step: impl FnMut(usize, &[Tensor]) -> Result<()>,
    ) -> Result<()> {
        let window = |number: usize| -> Result<Vec<WindowPart>> {
            let parts = vectors.iter().zip(&self.pairs).zip(ranges(number)).map(|((vector, pair), range)| {
                let host = vector.tensor.narrow(0, range.start, range.len())?;
                let on_device = match pair {
                    Some(pair) => pair[number % 2].narrow(0, 0, range.len())?,
                    None => host.clone(),
                };
                Ok(WindowPart { is_copied: pair.is_some(), is_changed: vector.is_changed, host, on_device })
            });
            parts.collect()
        };
        if self.pairs.iter().all(Option::is_none) {
            for number in 0..count {
                step(number, &device_tensors(&window(number)?))?;
            }
            return Ok(());
        }
        self.for_each_staged(count, window, |number, parts| step(number, &device_tensors(parts)))
    }

    #[cfg(feature = "cuda")]
    fn for_each_staged(
        &self,
        count: usize,
        window: impl Fn(usize) -> Result<Vec<WindowPart>>,
        mut step: impl FnMut(usize, &[WindowPart]) -> Result<()>,
    ) -> Result<()> {
        use crate::backend::Backend;

        let Backend::Cuda(gpu) = Backend::of_device(&self.device)? else {
            candle_core::bail!("moments on a GPU with parameters that are not")
        };
        let window_copies = gpu.window_copies()?;
        let upload = |parts: &[WindowPart], free: Option<&_>| {
            let copied = parts.iter().filter(|part| part.is_copied);
            window_copies.upload(&copied.map(|part| (&part.host, &part.on_device)).collect::<Vec<_>>(), free)
        };
        // When what was in each of the two buffers was copied back.
        let mut free = [None, None];
        let mut next = match count {
            0 => None,
            _ => Some(window(0)?).map(|parts| Ok::<_, candle_core::Error>((upload(&parts, None)?, parts))),
        }
        .transpose()?;
        for number in 0..count {
            let Some((uploaded, parts)) = next.take() else { break };
            if number + 1 < count {
                let parts = window(number + 1)?;
                next = Some((upload(&parts, free[(number + 1) % 2].as_ref())?, parts));
            }
            window_copies.compute_after(&uploaded)?;
            step(number, &parts)?;
            let changed = parts.iter().filter(|part| part.is_copied && part.is_changed);
            let pairs: Vec<_> = changed.map(|part| (&part.on_device, &part.host)).collect();
            free[number % 2] = Some(window_copies.download(&pairs)?);
        }
        window_copies.finish()
    }

    #[cfg(not(feature = "cuda"))]
    fn for_each_staged(
        &self,
        _: usize,
        _: impl Fn(usize) -> Result<Vec<WindowPart>>,
        _: impl FnMut(usize, &[WindowPart]) -> Result<()>,
    ) -> Result<()> {
        candle_core::bail!("moments in the host's memory, parameters on {:?}", self.device.location())
    }
}

/// A window of a vector.
#[cfg_attr(not(feature = "cuda"), expect(dead_code, reason = "only a GPU's moments are copied"))]
struct WindowPart {
    /// Where it lies.
    host: Tensor,
    /// Its copy on the device, or itself.
    on_device: Tensor,
    is_copied: bool,
    is_changed: bool,
}

fn device_tensors(parts: &[WindowPart]) -> Vec<Tensor> {
    parts.iter().map(|part| part.on_device.clone()).collect()
}

/// An allocation of nothing is an error of CUDA's.
pub(crate) fn zeros(n: usize, dtype: DType, device: &Device) -> Result<Tensor> {
    transfer::zeros(n.max(1), dtype, device)?.narrow(0, 0, n)
}
