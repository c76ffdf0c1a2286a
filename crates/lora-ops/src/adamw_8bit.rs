//! AdamW with both moments in 8 bits (arXiv 2110.02861), as bitsandbytes' `AdamW8bit` stores them
//! on a GPU.
//!
//! A tensor is cut into blocks of 256 elements; the last block may be shorter. A moment is one code
//! per element. The code stands for a number of the dynamic map (signed for the first moment,
//! unsigned for the second), which is multiplied by the absolute maximum of the element's block. A
//! step widens a block to f32, updates it with AdamW's formulas, and chooses the code nearest to
//! each new moment divided by the new maximum: of two equally near codes the even one, and never
//! zero for a negative first moment. Tensors of fewer than 4096 elements keep f32 moments.
//!
//! On a CPU bitsandbytes chooses other codes for small elements of a block, because it first rounds
//! to a grid of 65536 numbers that has no zero. On a GPU bitsandbytes decays a parameter after its
//! update; this module and bitsandbytes on a CPU decay it before.

use std::ops::Range;

use candle_core::{DType, Result, Tensor};
use lora_spec::{EIGHT_BIT_BLOCK_SIZE as BLOCK, EIGHT_BIT_MIN_ELEMENTS};

use crate::adamw::{self, AdamWTensors, Coefficients};
use crate::backend::Backend;
use crate::paged::{MomentPlacement, PinnedTensor, zeros};
use crate::transfer::to_device;

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
mod quant_map;
#[cfg(any(feature = "cuda", test))]
mod windows;

/// Names of a state's tensors: first the f32 moments, then codes and maxima of the 8-bit moments.
pub const TENSOR_NAMES: [&str; 6] =
    ["exp_avg", "exp_avg_sq", "exp_avg_codes", "exp_avg_sq_codes", "exp_avg_absmax", "exp_avg_sq_absmax"];

/// The moments of tensors that are contiguous in a flat vector.
///
/// Each tensor of the state has the values of its kind for all parameter tensors, in their order.
#[derive(Debug)]
pub struct AdamW8bitState {
    ranges: Vec<Range<usize>>,
    m: QuantizedMoment,
    v: QuantizedMoment,
    /// Elements that are on the device at a time.
    window: usize,
    _pinned: Vec<PinnedTensor>,
    /// Lookup tables of the kernel; `None` if the parameters are on the CPU.
    #[cfg(feature = "cuda")]
    tables: Option<cuda::Tables>,
}

#[derive(Debug)]
struct QuantizedMoment {
    /// f32, for the small tensors.
    full: Tensor,
    /// u8, for the other tensors.
    codes: Tensor,
    /// f32, one for each block.
    absmax: Tensor,
}

impl AdamW8bitState {
    /// Creates moments of zero at `placement`, for parameters whose tensors are at `ranges`.
    ///
    /// # Errors
    /// A range does not begin where the previous one ends; the first must begin at 0.
    pub fn new<'a>(ranges: &[Range<usize>], placement: impl Into<MomentPlacement<'a>>) -> Result<Self> {
        let (sizes, placement) = (TensorSizes::from_ranges(ranges)?, placement.into());
        Self::from_parts(ranges, placement, |i| {
            let (dtype, n) = sizes.tensor(i);
            zeros(n, dtype, placement.moment_device())
        })
    }

    /// Creates a state from copies of the tensors that `find` returns for each of [`TENSOR_NAMES`].
    ///
    /// # Errors
    /// Those of [`Self::new`] and of `find`; a tensor of another type or length.
    pub fn from_tensors<'a>(
        ranges: &[Range<usize>],
        placement: impl Into<MomentPlacement<'a>>,
        mut find: impl FnMut(&str) -> Result<Tensor>,
    ) -> Result<Self> {
        let (sizes, placement) = (TensorSizes::from_ranges(ranges)?, placement.into());
        Self::from_parts(ranges, placement, |i| {
            let (dtype, n) = sizes.tensor(i);
            let tensor = find(TENSOR_NAMES[i])?;
            if tensor.dtype() != dtype || tensor.dims() != [n] {
                candle_core::bail!(
                    "8-bit AdamW: {} is {} {:?} instead of {} [{n}]",
                    TENSOR_NAMES[i],
                    tensor.dtype().as_str(),
                    tensor.dims(),
                    dtype.as_str()
                );
            }
            match (n, placement.moment_device()) {
                (0, device) => zeros(0, dtype, device),
                // A step changes the tensor in place.
                (_, device) if tensor.device().same_device(device) => tensor.copy(),
                (_, device) => to_device(&tensor, device),
            }
        })
    }

    fn from_parts(
        ranges: &[Range<usize>],
        placement: MomentPlacement,
        mut part: impl FnMut(usize) -> Result<Tensor>,
    ) -> Result<Self> {
        let mut moments = |i| {
            Ok::<_, candle_core::Error>(QuantizedMoment {
                full: part(i)?,
                codes: part(i + 2)?,
                absmax: part(i + 4)?,
            })
        };
        let (m, v) = (moments(0)?, moments(1)?);
        let mut pinned = Vec::new();
        for tensor in [&m.full, &m.codes, &m.absmax, &v.full, &v.codes, &v.absmax] {
            pinned.extend(placement.pin(tensor)?);
        }
        Ok(Self {
            #[cfg(feature = "cuda")]
            tables: if placement.device.is_cpu() {
                None
            } else {
                Some(cuda::Tables::new(ranges, placement)?)
            },
            window: placement.window(),
            _pinned: pinned,
            m,
            v,
            ranges: ranges.to_vec(),
        })
    }

    /// The tensors with their [`TENSOR_NAMES`], all of them vectors; checkpoints and hashes cover
    /// them.
    pub fn tensors(&self) -> [(&'static str, &Tensor); 6] {
        let Self { m, v, .. } = self;
        let all = [&m.full, &v.full, &m.codes, &v.codes, &m.absmax, &v.absmax];
        std::array::from_fn(|i| (TENSOR_NAMES[i], all[i]))
    }

    /// Updates `params` and the moments as [`adamw::step`] does. `params` and `gradient` are f32
    /// vectors, as long as the state's ranges together, each with its own storage. An element that
    /// is not finite makes its block's moments invalid.
    #[tracing::instrument(level = "trace", name = "adamw_8bit", skip_all)]
    pub fn step(&self, coefficients: &Coefficients, params: &Tensor, gradient: &Tensor) -> Result<()> {
        let Self { ranges, m, v, window, .. } = self;
        let n = ranges.last().map_or(0, |last| last.end);
        if [params, gradient].iter().any(|x| x.dims() != [n]) {
            candle_core::bail!(
                "8-bit AdamW: parameters {:?} and gradient {:?} with moments of {n} elements",
                params.shape(),
                gradient.shape()
            );
        }
        let buffers = adamw::buffers(AdamWTensors { params, m: &m.full, v: &v.full }, *window)?;
        match Backend::of_tensors(&[params, gradient])? {
            Backend::Cpu => cpu::step(coefficients, params, self, gradient)?,
            #[cfg(feature = "cuda")]
            Backend::Cuda(gpu) => cuda::step(&gpu, coefficients, params, self, gradient)?,
        }
        let mut done = 0;
        // Small tensors that are adjacent are updated as one, because their moments are adjacent
        // too.
        for run in ranges.chunk_by(|a, b| is_8bit(a) == is_8bit(b)) {
            let (Some(first), Some(last)) = (run.first(), run.last()) else { continue };
            if is_8bit(first) {
                continue;
            }
            let len = last.end - first.start;
            let of = |flat: &Tensor| flat.narrow(0, first.start, len);
            let full = |moments: &QuantizedMoment| moments.full.narrow(0, done, len);
            let small = AdamWTensors { params: &of(params)?, m: &full(m)?, v: &full(v)? };
            adamw::step_with_buffers(&buffers, coefficients, small, &of(gradient)?, *window)?;
            done += len;
        }
        Ok(())
    }
}

/// Bytes of the state for parameters whose tensors are at `ranges`.
///
/// # Errors
/// Those of [`AdamW8bitState::new`].
pub fn bytes(ranges: &[Range<usize>]) -> Result<usize> {
    let sizes = TensorSizes::from_ranges(ranges)?;
    Ok((0..TENSOR_NAMES.len()).map(|i| sizes.tensor(i)).map(|(dtype, n)| dtype.size_in_bytes() * n).sum())
}

fn is_8bit(range: &Range<usize>) -> bool {
    range.len() >= EIGHT_BIT_MIN_ELEMENTS
}

/// Numbers of elements of the state's tensors.
struct TensorSizes {
    full: usize,
    codes: usize,
    blocks: usize,
}

impl TensorSizes {
    fn from_ranges(ranges: &[Range<usize>]) -> Result<Self> {
        let mut sizes = Self { full: 0, codes: 0, blocks: 0 };
        let mut end = 0;
        for range in ranges {
            if range.start != end || range.end < end {
                candle_core::bail!(
                    "8-bit AdamW: a tensor at {range:?} after one that ends at {end}; tensors must \
                     be adjacent"
                );
            }
            end = range.end;
            if is_8bit(range) {
                sizes.codes += range.len();
                sizes.blocks += range.len().div_ceil(BLOCK);
            } else {
                sizes.full += range.len();
            }
        }
        Ok(sizes)
    }

    /// Type and length of the tensor [`TENSOR_NAMES`]`[i]`.
    fn tensor(&self, i: usize) -> (DType, usize) {
        match i / 2 {
            0 => (DType::F32, self.full),
            1 => (DType::U8, self.codes),
            _ => (DType::F32, self.blocks),
        }
    }
}
