//! Quantizing and dequantizing on the CPU.

use candle_core::{Device, Result, Tensor};
use half::f16;
use rayon::prelude::*;

use super::{BLOCK_SIZE, Codebook, FourBit, Int8, NESTED_BLOCK_SIZE, Scales, dynamic_map};
use crate::cpu::{ReadGuard, TASK_ELEMENTS, read, read_f32};
use crate::simd::{lookup4, vectorize};

/// The parts of a 4-bit weight on the CPU that a product reads.
pub(crate) struct FourBitView<'a> {
    codebook: [f32; 16],
    /// log2 of the block size. Block sizes are powers of two, so shifts replace divisions.
    shift: u32,
    codes: ReadGuard<'a, u8>,
    scales: ScalesView<'a>,
}

enum ScalesView<'a> {
    Plain(ReadGuard<'a, f32>),
    Nested {
        codes: ReadGuard<'a, u8>,
        map: ReadGuard<'a, f32>,
        absmax: ReadGuard<'a, f32>,
        offset: f32,
        shift: u32,
    },
}

impl<'a> ScalesView<'a> {
    fn new(scales: &'a Scales) -> Result<Self> {
        Ok(match scales {
            Scales::Plain(absmax) => Self::Plain(read_f32(absmax)?),
            Scales::Nested { codes, map, absmax, offset, block } => Self::Nested {
                codes: read(codes)?,
                map: read_f32(map)?,
                absmax: read_f32(absmax)?,
                offset: *offset,
                shift: block.ilog2(),
            },
        })
    }

    fn at(&self, i: usize) -> f32 {
        match self {
            Self::Plain(absmax) => absmax[i],
            Self::Nested { codes, map, absmax, offset, shift } => {
                map[usize::from(codes[i])] * absmax[i >> shift] + offset
            }
        }
    }
}

impl<'a> FourBitView<'a> {
    pub(crate) fn new(weight: &'a FourBit) -> Result<Self> {
        let values = &*read_f32(&weight.values)?;
        Ok(Self {
            codebook: std::array::from_fn(|code| values[code]),
            shift: weight.block.ilog2(),
            codes: read(&weight.codes)?,
            scales: ScalesView::new(&weight.scales)?,
        })
    }

    /// Dequantizes the elements from `start` on into all of `out`.
    pub(crate) fn dequantize(&self, start: usize, out: &mut [f32]) {
        out.par_chunks_mut(TASK_ELEMENTS)
            .enumerate()
            .for_each(|(i, out)| self.dequantize_serial(start + i * TASK_ELEMENTS, out));
    }

    fn dequantize_serial(&self, mut start: usize, mut out: &mut [f32]) {
        while !out.is_empty() {
            let block = start >> self.shift;
            let end_of_block = (block + 1) << self.shift;
            let (now, rest) = out.split_at_mut(out.len().min(end_of_block - start));
            let scale = self.scales.at(block);
            let table = self.codebook.map(|value| value * scale);
            // A row of odd length may begin or end in the middle of a byte.
            let (first, now) = now.split_at_mut((start % 2).min(now.len()));
            first.iter_mut().for_each(|first| *first = table[usize::from(self.codes[start / 2] & 15)]);
            let byte = start.div_ceil(2);
            let (pairs, last) = now.split_at_mut(now.len() / 2 * 2);
            let end = byte + pairs.len() / 2;
            lookup4(&table, &self.codes[byte..end], pairs);
            last.iter_mut().for_each(|last| *last = table[usize::from(self.codes[end] >> 4)]);
            start = end_of_block;
            out = rest;
        }
    }
}

/// Returns the scale of every block.
pub(super) fn scales(weight: &FourBit) -> Result<Vec<f32>> {
    let blocks = (weight.shape.0 * weight.shape.1).div_ceil(weight.block);
    let weight = weight.to_device(&Device::Cpu)?;
    let scales = ScalesView::new(&weight.scales)?;
    Ok((0..blocks).map(|i| scales.at(i)).collect())
}

pub(super) fn quantize(
    values: &[f32],
    shape: (usize, usize),
    codebook: Codebook,
    nested: bool,
) -> Result<FourBit> {
    check_finite(values, shape)?;
    let (order, bounds) = sorted_codes(codebook);
    let blocks = values.len().div_ceil(BLOCK_SIZE);
    let mut codes = vec![0_u8; values.len().div_ceil(2)];
    let mut absmax = vec![0.0_f32; blocks];
    let chunks = codes.par_chunks_mut(BLOCK_SIZE / 2).zip(&mut absmax).zip(values.par_chunks(BLOCK_SIZE));
    chunks.with_min_len(TASK_ELEMENTS / BLOCK_SIZE).for_each(|((codes, absmax), values)| {
        vectorize(|| {
            let largest = values.iter().fold(0.0_f32, |m, v| m.max(v.abs()));
            // As in bitsandbytes, the elements of an incomplete block are divided by the maximum,
            // and those of a full block are multiplied by its inverse; 1e-38 keeps zeros finite.
            let divisor = largest.max(1e-38);
            let is_full = values.len() == BLOCK_SIZE;
            let mut indices = [0_u8; BLOCK_SIZE];
            // The unused half of the last byte is the code of zero.
            let mut scaled = [0.0_f32; BLOCK_SIZE];
            if is_full {
                let factor = 1.0 / divisor;
                scaled.iter_mut().zip(values).for_each(|(s, v)| *s = (v * factor).clamp(-1.0, 1.0));
                *absmax = largest;
            } else {
                scaled.iter_mut().zip(values).for_each(|(s, v)| *s = (v / divisor).clamp(-1.0, 1.0));
                *absmax = divisor;
            }
            for bound in bounds {
                indices.iter_mut().zip(scaled).for_each(|(i, s)| *i += u8::from(bound < s));
            }
            for (byte, pair) in codes.iter_mut().zip(indices.chunks_exact(2)) {
                *byte = order[usize::from(pair[0])] << 4 | order[usize::from(pair[1])];
            }
        });
    });
    let scales = if nested { double_quantize(absmax)? } else { Scales::Plain(vector(absmax)?) };
    FourBit::new(shape, codebook, BLOCK_SIZE, vector(codes)?, scales)
}

/// Returns the codes sorted by their values, and the midpoints between neighboring values.
fn sorted_codes(codebook: Codebook) -> ([u8; 16], [f32; 15]) {
    let values = codebook.values();
    let mut order: [u8; 16] = std::array::from_fn(|code| code as u8);
    order.sort_by(|&a, &b| values[usize::from(a)].total_cmp(&values[usize::from(b)]));
    let value = |i: usize| values[usize::from(order[i])];
    (order, std::array::from_fn(|i| (value(i) + value(i + 1)) / 2.0))
}

/// Quantizes the scales (double quantization).
fn double_quantize(absmax: Vec<f32>) -> Result<Scales> {
    let mean = absmax.iter().map(|a| f64::from(*a)).sum::<f64>() / absmax.len().max(1) as f64;
    let offset = mean as f32;
    let map = dynamic_map();
    let mut codes = vec![0_u8; absmax.len()];
    let mut outer = vec![0.0_f32; absmax.len().div_ceil(NESTED_BLOCK_SIZE)];
    let blocks =
        codes.par_chunks_mut(NESTED_BLOCK_SIZE).zip(&mut outer).zip(absmax.par_chunks(NESTED_BLOCK_SIZE));
    blocks.for_each(|((codes, outer), absmax)| {
        *outer = absmax.iter().fold(0.0, |m, a| (a - offset).abs().max(m));
        for (code, a) in codes.iter_mut().zip(absmax) {
            *code = nearest(&map, if *outer > 0.0 { (a - offset) / *outer } else { 0.0 });
        }
    });
    let (codes, map, absmax) = (vector(codes)?, vector(map.to_vec())?, vector(outer)?);
    Ok(Scales::Nested { codes, map, absmax, offset, block: NESTED_BLOCK_SIZE })
}

/// Returns the index of the nearest of ascending numbers; of two equally near ones, that of the
/// smaller.
fn nearest(map: &[f32; 256], value: f32) -> u8 {
    let above = map.partition_point(|m| *m <= value).clamp(1, 255);
    let (below, above) = (above - 1, above);
    if (map[above] - value).abs() < (value - map[below]).abs() { above as u8 } else { below as u8 }
}

pub(super) fn quantize_int8(values: &[f32], shape: (usize, usize)) -> Result<Int8> {
    check_finite(values, shape)?;
    let (rows, cols) = shape;
    let mut codes = vec![0_u8; values.len()];
    let mut scales = vec![0.0_f32; rows];
    let by_row = codes.par_chunks_mut(cols.max(1)).zip(&mut scales).zip(values.par_chunks(cols.max(1)));
    by_row.for_each(|((codes, scale), values)| {
        let half = |v: &f32| f16::from_f32(*v).to_f32();
        *scale = values.iter().fold(0.0, |m, v| half(v).abs().max(m));
        // As torch divides a number by a tensor, which decides values halfway between two codes.
        let factor = 127.0 * (1.0 / *scale);
        for (code, v) in codes.iter_mut().zip(values) {
            // In a row of zeros, 0 * infinity is NaN, and its code is 0.
            *code = (half(v) * factor).round_ties_even() as i8 as u8;
        }
    });
    if scales.iter().any(|scale| !scale.is_finite()) {
        candle_core::bail!("a value is too large for f16");
    }
    Int8::new(Tensor::from_vec(codes, shape, &Device::Cpu)?, vector(scales)?)
}

/// The parts of an 8-bit weight on the CPU that a product reads.
pub(crate) struct Int8View<'a> {
    cols: usize,
    codes: ReadGuard<'a, u8>,
    scales: ReadGuard<'a, f32>,
}

impl<'a> Int8View<'a> {
    pub(crate) fn new(weight: &'a Int8) -> Result<Self> {
        let cols = weight.dims().1;
        Ok(Self { cols, codes: read(&weight.codes)?, scales: read_f32(&weight.scales)? })
    }

    /// Dequantizes the rows from `first` on into all of `out`.
    pub(crate) fn dequantize(&self, first: usize, out: &mut [f32]) {
        let (codes, scales, cols) =
            (&self.codes[first * self.cols..], &self.scales[first..], self.cols.max(1));
        let rows = out.par_chunks_mut(cols).zip(codes.par_chunks(cols)).zip(scales);
        rows.with_min_len(TASK_ELEMENTS.div_ceil(cols)).for_each(|((out, codes), scale)| {
            let factor = scale * (1.0 / 127.0);
            vectorize(|| out.iter_mut().zip(codes).for_each(|(o, c)| *o = f32::from(*c as i8) * factor));
        });
    }
}

fn check_finite(values: &[f32], shape: (usize, usize)) -> Result<()> {
    if values.len() != shape.0 * shape.1 {
        candle_core::bail!("invalid number of values: {} for {shape:?}", values.len());
    }
    match values.par_iter().with_min_len(TASK_ELEMENTS).position_first(|v| !v.is_finite()) {
        Some(at) => candle_core::bail!(
            "element ({}, {}) is {}, which cannot be quantized",
            at / shape.1,
            at % shape.1,
            values[at]
        ),
        None => Ok(()),
    }
}

fn vector<T: candle_core::WithDType>(values: Vec<T>) -> Result<Tensor> {
    let len = values.len();
    Tensor::from_vec(values, len, &Device::Cpu)
}
