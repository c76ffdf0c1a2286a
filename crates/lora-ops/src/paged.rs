//! Paged moments, which are in the host's memory. During a step a GPU has two windows of them at a
//! time.
//!
//! Paged moments are CPU tensors of candle, so hashes and checkpoints read them like other tensors.
//! While the kernel of unpaged moments runs over one window, the next window is copied to the GPU
//! and the previous one back. Their memory is pinned, so that the copies overlap with the kernels.
//! A step ends with a wait for the copies.

use std::ops::Range;

use candle_core::{DType, Device, Result, Tensor};

use crate::transfer;

/// The device of the moments, which may differ from that of the parameters.
#[derive(Debug, Clone, Copy)]
pub struct MomentPlacement<'a> {
    /// The parameters' device.
    pub device: &'a Device,
    /// If set, the moments are paged: at most this many elements of each moment (at least two) are
    /// on the device at a time. If `None`, all are on the parameters' device.
    pub window: Option<usize>,
}

impl<'a> From<&'a Device> for MomentPlacement<'a> {
    fn from(device: &'a Device) -> Self {
        Self { device, window: None }
    }
}

impl MomentPlacement<'_> {
    /// The device of the moments' tensors.
    pub fn moment_device(&self) -> &Device {
        if self.window.is_some() { &Device::Cpu } else { self.device }
    }

    /// Elements of each moment that are on the device at a time.
    pub fn window(&self) -> usize {
        self.window.unwrap_or(usize::MAX)
    }

    /// Pins the memory of a moment's tensor if that makes its copies faster.
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

/// Pinned memory of a tensor. The tensor lives at least as long as the registration.
#[derive(Debug)]
pub struct PinnedTensor {
    // Fields are dropped in this order: memory must be unpinned before it is freed.
    #[cfg(feature = "cuda")]
    _registration: crate::cuda::PinnedRegistration,
    #[cfg(feature = "cuda")]
    _tensor: Tensor,
}

/// Half of `window`, rounded up: the number of elements of a step's window if the device has two
/// windows at a time.
pub(crate) fn half_window(window: usize) -> usize {
    window.div_ceil(2).max(1)
}

/// Splits a vector of `len` elements into windows of `half` elements, in order.
pub(crate) fn windows(len: usize, half: usize) -> Vec<Range<usize>> {
    (0..len).step_by(half).map(|first| first..len.min(first.saturating_add(half))).collect()
}

/// A vector that a step updates window by window.
#[derive(Clone, Copy)]
pub(crate) struct PagedVector<'a> {
    pub(crate) tensor: &'a Tensor,
    /// Whether a step changes the vector, so that it must be copied back.
    pub(crate) is_changed: bool,
}

/// Two buffers on the device for windows of each vector on another device. All are allocated before
/// a step begins, so a step cannot run out of memory halfway.
pub(crate) struct StagingBuffers {
    device: Device,
    /// One pair for each vector; `None` if the vector is already on the device.
    pairs: Vec<Option<[Tensor; 2]>>,
}

impl StagingBuffers {
    /// Allocates buffers for windows of up to `longest` elements of each of `vectors`.
    pub(crate) fn new(vectors: &[(&Tensor, usize)], device: &Device) -> Result<Self> {
        let pair = |&(vector, longest): &(&Tensor, usize)| -> Result<Option<[Tensor; 2]>> {
            if vector.device().same_device(device) {
                return Ok(None);
            }
            let len = vector.elem_count();
            let buffer = |len: usize| zeros(len, vector.dtype(), device);
            // The second buffer is needed only if there is a second window.
            let (first, second) = (longest.min(len), if len > longest { longest } else { 0 });
            Ok(Some([buffer(first)?, buffer(second)?]))
        };
        Ok(Self { device: device.clone(), pairs: vectors.iter().map(pair).collect::<Result<_>>()? })
    }

    /// Calls `step(number, parts)` for each window in order. `parts` are the ranges
    /// `ranges(number)` of `vectors`, as tensors on the device. All changes have been copied back
    /// to `vectors` when this returns.
    pub(crate) fn for_each(
        &self,
        vectors: &[PagedVector],
        count: usize,
        ranges: impl Fn(usize) -> Vec<Range<usize>>,
        mut step: impl FnMut(usize, &[Tensor]) -> Result<()>,
    ) -> Result<()> {
        let window = |number: usize| -> Result<Vec<WindowPart>> {
            let parts = vectors.iter().zip(&self.pairs).zip(ranges(number)).map(|((vector, pair), range)| {
                let original = vector.tensor.narrow(0, range.start, range.len())?;
                let on_device = match pair {
                    Some(pair) => pair[number % 2].narrow(0, 0, range.len())?,
                    None => original.clone(),
                };
                let (is_copied, is_changed) = (pair.is_some(), vector.is_changed);
                Ok(WindowPart { original, on_device, is_copied, is_changed })
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
            candle_core::bail!("the moments are on a GPU, but the parameters are not")
        };
        let window_copies = gpu.window_copies()?;
        let upload = |parts: &[WindowPart], free: Option<&_>| {
            let copied = parts.iter().filter(|part| part.is_copied);
            window_copies
                .upload(&copied.map(|part| (&part.original, &part.on_device)).collect::<Vec<_>>(), free)
        };
        // For each of the two buffers, the event after which its content has been copied back.
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
            let pairs: Vec<_> = changed.map(|part| (&part.on_device, &part.original)).collect();
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
        candle_core::bail!(
            "the moments are in the host's memory, but the parameters are on {:?}",
            self.device.location()
        )
    }
}

/// A window of a vector.
#[cfg_attr(not(feature = "cuda"), expect(dead_code, reason = "only a GPU's moments are copied"))]
struct WindowPart {
    /// The window of the vector itself, on the vector's device.
    original: Tensor,
    /// Its copy on the parameters' device, or the window itself.
    on_device: Tensor,
    is_copied: bool,
    is_changed: bool,
}

fn device_tensors(parts: &[WindowPart]) -> Vec<Tensor> {
    parts.iter().map(|part| part.on_device.clone()).collect()
}

/// Creates `n` zeros. CUDA rejects an allocation of zero bytes, so at least one element is
/// allocated.
pub(crate) fn zeros(n: usize, dtype: DType, device: &Device) -> Result<Tensor> {
    transfer::zeros(n.max(1), dtype, device)?.narrow(0, 0, n)
}
