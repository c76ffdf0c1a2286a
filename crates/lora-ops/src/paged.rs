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
pub struct Home<'a> {
    /// Where the parameters are.
    pub device: &'a Device,
    /// Paged: of each moment at most so many elements are on the device at a time (but two at least).
    /// `None`: all of them, beside the parameters.
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

    /// Elements on the device at a time.
    pub fn window(&self) -> usize {
        self.window.unwrap_or(usize::MAX)
    }

    /// Pins the memory of a tensor of [`Self::tensors`], where that makes copies of it faster.
    ///
    /// # Errors
    /// The tensor is not contiguous.
    pub fn pin(&self, tensor: &Tensor) -> Result<Option<Pinned>> {
        if self.device.is_cpu() || !tensor.device().is_cpu() {
            return Ok(None);
        }
        #[cfg(feature = "cuda")]
        if let crate::place::Place::Cuda(gpu) = crate::place::Place::on(self.device)? {
            let registration = gpu.pin(tensor)?;
            return Ok(registration
                .map(|registration| Pinned { _registration: registration, _tensor: tensor.clone() }));
        }
        Ok(None)
    }
}

/// Pinned memory of a tensor, which it keeps alive.
#[derive(Debug)]
pub struct Pinned {
    // In this order: memory is unpinned before it is freed.
    #[cfg(feature = "cuda")]
    _registration: crate::cuda::Pinned,
    #[cfg(feature = "cuda")]
    _tensor: Tensor,
}

/// Half of `window`, rounded up: what is stepped at a time where two halves are on the device.
pub(crate) fn half(window: usize) -> usize {
    window.div_ceil(2).max(1)
}

/// The windows of `half` elements of a vector of `len`, in order.
pub(crate) fn windows(len: usize, half: usize) -> Vec<Range<usize>> {
    (0..len).step_by(half).map(|first| first..len.min(first.saturating_add(half))).collect()
}

/// A vector that is stepped window by window.
#[derive(Clone, Copy)]
pub(crate) struct Vector<'a> {
    pub(crate) tensor: &'a Tensor,
    /// A step changes it, so that it is copied back.
    pub(crate) is_changed: bool,
}

/// Two buffers on a device for windows of vectors that lie elsewhere. They are all there before a step
/// begins: a step is not left half done for want of memory.
pub(crate) struct Buffers {
    device: Device,
    /// Of each vector; none of one that is on the device already.
    pairs: Vec<Option<[Tensor; 2]>>,
}

impl Buffers {
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
        vectors: &[Vector],
        count: usize,
        ranges: impl Fn(usize) -> Vec<Range<usize>>,
        mut step: impl FnMut(usize, &[Tensor]) -> Result<()>,
    ) -> Result<()> {
        let window = |number: usize| -> Result<Vec<Part>> {
            let parts = vectors.iter().zip(&self.pairs).zip(ranges(number)).map(|((vector, pair), range)| {
                let home = vector.tensor.narrow(0, range.start, range.len())?;
                let there = match pair {
                    Some(pair) => pair[number % 2].narrow(0, 0, range.len())?,
                    None => home.clone(),
                };
                Ok(Part { is_copied: pair.is_some(), is_changed: vector.is_changed, home, there })
            });
            parts.collect()
        };
        if self.pairs.iter().all(Option::is_none) {
            for number in 0..count {
                step(number, &there(&window(number)?))?;
            }
            return Ok(());
        }
        self.step_copies(count, window, |number, parts| step(number, &there(parts)))
    }

    #[cfg(feature = "cuda")]
    fn step_copies(
        &self,
        count: usize,
        window: impl Fn(usize) -> Result<Vec<Part>>,
        mut step: impl FnMut(usize, &[Part]) -> Result<()>,
    ) -> Result<()> {
        use crate::place::Place;

        let Place::Cuda(gpu) = Place::on(&self.device)? else {
            candle_core::bail!("moments on a GPU with parameters that are not")
        };
        let transfers = gpu.transfers()?;
        let upload = |parts: &[Part], free: Option<&_>| {
            let copied = parts.iter().filter(|part| part.is_copied);
            transfers.upload(&copied.map(|part| (&part.home, &part.there)).collect::<Vec<_>>(), free)
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
            transfers.compute_after(&uploaded)?;
            step(number, &parts)?;
            let changed = parts.iter().filter(|part| part.is_copied && part.is_changed);
            let pairs: Vec<_> = changed.map(|part| (&part.there, &part.home)).collect();
            free[number % 2] = Some(transfers.download(&pairs)?);
        }
        transfers.finish()
    }

    #[cfg(not(feature = "cuda"))]
    fn step_copies(
        &self,
        _: usize,
        _: impl Fn(usize) -> Result<Vec<Part>>,
        _: impl FnMut(usize, &[Part]) -> Result<()>,
    ) -> Result<()> {
        candle_core::bail!("moments in the host's memory, parameters on {:?}", self.device.location())
    }
}

/// A window of a vector.
#[cfg_attr(not(feature = "cuda"), expect(dead_code, reason = "only a GPU's moments are copied"))]
struct Part {
    /// Where it lies.
    home: Tensor,
    /// Its copy on the device, or itself.
    there: Tensor,
    is_copied: bool,
    is_changed: bool,
}

fn there(parts: &[Part]) -> Vec<Tensor> {
    parts.iter().map(|part| part.there.clone()).collect()
}

/// An allocation of nothing is an error of CUDA's.
pub(crate) fn zeros(n: usize, dtype: DType, device: &Device) -> Result<Tensor> {
    transfer::zeros(n.max(1), dtype, device)?.narrow(0, 0, n)
}
