//! Frozen weights in 4 and 8 bits, in the formats of bitsandbytes 0.50.
//!
//! A weight is created once, from a dense weight or from a checkpoint's tensors, and is not changed
//! after that. A product dequantizes one panel of rows at a time, in f32 on the CPU and in the type
//! of the activations on a GPU, where a panel may have all rows.

use candle_core::{DType, Device, Result, Tensor};
use lora_spec::FOUR_BIT_BLOCK_SIZES;

use crate::transfer::{from_vec, to_device, to_vec};

mod codebook;
mod cpu;
#[cfg(feature = "cuda")]
pub(crate) mod cuda;
mod random;

pub use codebook::{Codebook, dynamic_map, dynamic_map_unsigned};

/// Default number of elements that share a scale.
pub const BLOCK_SIZE: usize = 64;

/// Default number of scales that share a second-level scale (double quantization).
pub const NESTED_BLOCK_SIZE: usize = 256;

/// A matrix in 4 bits: element `i` in row-major order is `codebook[code i] * scale[i / block]`, in
/// f32.
#[derive(Debug, Clone)]
pub struct FourBit {
    shape: (usize, usize),
    /// The values of the codes, f32 `[16]`.
    values: Tensor,
    block: usize,
    /// Two codes per byte, the first in the upper half: U8 `[ceil(elements / 2)]`.
    codes: Tensor,
    scales: Scales,
}

/// The absolute maximum of each block.
#[derive(Debug, Clone)]
pub enum Scales {
    /// f32 `[blocks]`.
    Plain(Tensor),
    /// Quantized scales (double quantization): `map[code i] * absmax[i / block] + offset`.
    Nested {
        /// U8 `[blocks]`.
        codes: Tensor,
        /// The values of the codes, f32 `[256]`.
        map: Tensor,
        /// f32 `[ceil(blocks / block)]`.
        absmax: Tensor,
        /// The mean of the scales, which was subtracted before they were quantized.
        offset: f32,
        /// Number of scales that share an element of `absmax`: a power of two.
        block: usize,
    },
}

impl FourBit {
    /// Creates a weight from a checkpoint's tensors: `codes` U8 `[ceil(elements / 2)]` and the
    /// scales of blocks of `block` elements.
    ///
    /// # Errors
    /// Lengths or types that do not fit, or scales that are not finite.
    pub fn new(
        shape: (usize, usize),
        codebook: Codebook,
        block: usize,
        codes: Tensor,
        scales: Scales,
    ) -> Result<Self> {
        let elements = shape.0 * shape.1;
        if !FOUR_BIT_BLOCK_SIZES.contains(&block) {
            candle_core::bail!("a block of {block} elements is not one of {FOUR_BIT_BLOCK_SIZES:?}");
        }
        let blocks = elements.div_ceil(block);
        expect("the codes", &codes, DType::U8, elements.div_ceil(2))?;
        match &scales {
            Scales::Plain(absmax) => expect("absmax", absmax, DType::F32, blocks)?,
            Scales::Nested { codes, map, absmax, block, .. } => {
                if !block.is_power_of_two() {
                    candle_core::bail!("a nested block of {block} scales is not a power of two");
                }
                expect("absmax", codes, DType::U8, blocks)?;
                expect("the nested map", map, DType::F32, 256)?;
                expect("the nested absmax", absmax, DType::F32, blocks.div_ceil(*block))?;
            }
        }
        let values = from_vec(codebook.values().to_vec(), 16, codes.device())?;
        let weight = Self { shape, values, block, codes, scales };
        if !cpu::scales(&weight)?.iter().all(|scale| scale.is_finite()) {
            candle_core::bail!("a scale is not finite");
        }
        Ok(weight)
    }

    /// Quantizes `values`, in row-major order, in blocks of [`BLOCK_SIZE`]; with `nested` the
    /// scales too.
    ///
    /// # Errors
    /// A value that is not finite.
    pub fn quantize(values: &[f32], shape: (usize, usize), codebook: Codebook, nested: bool) -> Result<Self> {
        cpu::quantize(values, shape, codebook, nested)
    }

    /// The same weight on `device`.
    pub fn to_device(&self, device: &Device) -> Result<Self> {
        let scales = match &self.scales {
            Scales::Plain(absmax) => Scales::Plain(to_device(absmax, device)?),
            Scales::Nested { codes, map, absmax, offset, block } => Scales::Nested {
                codes: to_device(codes, device)?,
                map: to_device(map, device)?,
                absmax: to_device(absmax, device)?,
                offset: *offset,
                block: *block,
            },
        };
        let copied = |tensor: &Tensor| to_device(tensor, device);
        let (values, codes) = (copied(&self.values)?, copied(&self.codes)?);
        Ok(Self { values, codes, scales, ..*self })
    }

    /// Rows and columns.
    pub fn dims(&self) -> (usize, usize) {
        self.shape
    }

    /// Size in bytes of codes, their values and the scales.
    pub fn bytes(&self) -> usize {
        let scales = match &self.scales {
            Scales::Plain(absmax) => 4 * absmax.elem_count(),
            Scales::Nested { codes, map, absmax, .. } => {
                codes.elem_count() + 4 * (map.elem_count() + absmax.elem_count())
            }
        };
        self.codes.elem_count() + 4 * self.values.elem_count() + scales
    }

    /// Two codes per byte, U8.
    pub fn codes(&self) -> &Tensor {
        &self.codes
    }

    /// The scales as they are stored.
    pub fn scales(&self) -> &Scales {
        &self.scales
    }

    /// Returns the whole matrix in f32. The weight must be on the CPU.
    pub fn dequantize(&self) -> Result<Tensor> {
        let (rows, cols) = self.shape;
        let mut values = vec![0.0; rows * cols];
        FourBitView::new(self)?.dequantize(0, &mut values);
        Tensor::from_vec(values, self.shape, &Device::Cpu)
    }
}

/// A matrix in 8 bits: element (i, j) is `code * (scale[i] * (1 / 127))`, in f32, where the code is
/// a signed byte (the weights of LLM.int8(), arXiv 2208.07339; activations are not quantized here).
#[derive(Debug, Clone)]
pub struct Int8 {
    /// Signed bytes in a U8 tensor `[rows, cols]`.
    codes: Tensor,
    /// The absolute maximum of each row, f32 `[rows]` (bitsandbytes' `SCB`).
    scales: Tensor,
}

impl Int8 {
    /// Creates a weight from a checkpoint's tensors: signed bytes as U8 `[rows, cols]` and scales
    /// f32 `[rows]`.
    ///
    /// # Errors
    /// Lengths or types that do not fit, or scales that are not finite.
    pub fn new(codes: Tensor, scales: Tensor) -> Result<Self> {
        let (rows, cols) = codes.dims2()?;
        expect("the codes", &codes.flatten_all()?, DType::U8, rows * cols)?;
        expect("SCB", &scales, DType::F32, rows)?;
        if !to_vec::<f32>(&scales)?.iter().all(|scale| scale.is_finite()) {
            candle_core::bail!("a scale is not finite");
        }
        Ok(Self { codes, scales })
    }

    /// Quantizes `values`, in row-major order: `round(127 x / absmax)`, ties to even. As in
    /// bitsandbytes, the values are first rounded to f16.
    ///
    /// # Errors
    /// A value that is not finite, in f32 or in f16.
    pub fn quantize(values: &[f32], shape: (usize, usize)) -> Result<Self> {
        cpu::quantize_int8(values, shape)
    }

    /// The same weight on `device`.
    pub fn to_device(&self, device: &Device) -> Result<Self> {
        Ok(Self { codes: to_device(&self.codes, device)?, scales: to_device(&self.scales, device)? })
    }

    /// Rows and columns.
    pub fn dims(&self) -> (usize, usize) {
        (self.codes.dims()[0], self.codes.dims()[1])
    }

    /// Signed bytes in a U8 tensor `[rows, cols]`.
    pub fn codes(&self) -> &Tensor {
        &self.codes
    }

    /// The absolute maximum of each row, f32 `[rows]`.
    pub fn scales(&self) -> &Tensor {
        &self.scales
    }

    /// Returns the whole matrix in f32. The weight must be on the CPU.
    pub fn dequantize(&self) -> Result<Tensor> {
        let (rows, cols) = self.dims();
        let mut values = vec![0.0; rows * cols];
        Int8View::new(self)?.dequantize(0, &mut values);
        Tensor::from_vec(values, (rows, cols), &Device::Cpu)
    }
}

fn expect(what: &str, tensor: &Tensor, dtype: DType, len: usize) -> Result<()> {
    if tensor.dtype() != dtype || tensor.dims() != [len] {
        candle_core::bail!("{what} of {:?} {:?} should be {dtype:?} [{len}]", tensor.dtype(), tensor.dims());
    }
    Ok(())
}

pub(crate) use cpu::{FourBitView, Int8View};
