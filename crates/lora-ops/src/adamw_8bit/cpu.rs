use candle_core::{Result, Tensor};
use rayon::prelude::*;

use super::quant_map::{QuantMap, SIGNED_MAP, UNSIGNED_MAP, bucket};
use super::{AdamW8bitState, BLOCK, is_8bit};
use crate::adamw::Coefficients;
use crate::cpu::{TASK_ELEMENTS, read_f32, update_f32, update_u8};
use crate::simd::vectorize;

/// Updates the tensors whose moments are in 8 bits.
pub(super) fn step(
    coefficients: &Coefficients,
    params: &Tensor,
    state: &AdamW8bitState,
    gradient: &Tensor,
) -> Result<()> {
    let AdamW8bitState { ranges, m, v, .. } = state;
    let params = &mut *update_f32(params, &[gradient, &m.absmax, &v.absmax])?;
    let m_absmax = &mut *update_f32(&m.absmax, &[gradient, &v.absmax])?;
    let v_absmax = &mut *update_f32(&v.absmax, &[gradient])?;
    let m_codes = &mut *update_u8(&m.codes, &[&v.codes])?;
    let v_codes = &mut *update_u8(&v.codes, &[])?;
    let gradient = &*read_f32(gradient)?;
    let (m, v) =
        (MomentSlice { codes: m_codes, absmax: m_absmax }, MomentSlice { codes: v_codes, absmax: v_absmax });
    let mut rest = BlockSlice { params, gradient, m, v };
    let mut parts = Vec::new();
    for range in ranges {
        if !is_8bit(range) {
            rest.skip(range.len());
            continue;
        }
        let mut left = range.len();
        while left > 0 {
            parts.push(rest.split_front(left.min(TASK_ELEMENTS)));
            left -= left.min(TASK_ELEMENTS);
        }
    }
    parts.into_par_iter().for_each(|part| part.step(coefficients));
    Ok(())
}

/// Moments of whole blocks, or up to the end of a tensor.
struct MomentSlice<'a> {
    codes: &'a mut [u8],
    absmax: &'a mut [f32],
}

impl<'a> MomentSlice<'a> {
    fn split_front(&mut self, n: usize) -> Self {
        Self {
            codes: take_front(&mut self.codes, n),
            absmax: take_front(&mut self.absmax, n.div_ceil(BLOCK)),
        }
    }

    fn blocks(self) -> impl Iterator<Item = (&'a mut [u8], &'a mut f32)> {
        self.codes.chunks_mut(BLOCK).zip(self.absmax)
    }
}

/// The elements that a thread updates at a time: whole blocks, or up to the end of a tensor.
struct BlockSlice<'a> {
    params: &'a mut [f32],
    gradient: &'a [f32],
    m: MomentSlice<'a>,
    v: MomentSlice<'a>,
}

impl<'a> BlockSlice<'a> {
    /// Removes and returns the first `n` parameters and gradients.
    fn skip(&mut self, n: usize) -> (&'a mut [f32], &'a [f32]) {
        (take_front(&mut self.params, n), self.gradient.split_off(..n).unwrap_or_default())
    }

    /// Removes and returns the first `n` parameters and gradients with their moments.
    fn split_front(&mut self, n: usize) -> Self {
        let (params, gradient) = self.skip(n);
        Self { params, gradient, m: self.m.split_front(n), v: self.v.split_front(n) }
    }

    fn step(self, coefficients: &Coefficients) {
        let params = self.params.chunks_mut(BLOCK).zip(self.gradient.chunks(BLOCK));
        for ((params, m), v) in params.zip(self.m.blocks()).zip(self.v.blocks()) {
            vectorize(
                // Without inlining, the closure would be compiled for the baseline instruction set.
                #[inline(always)]
                || step_block(coefficients, params, m, v),
            );
        }
    }
}

/// Removes and returns the first `n` elements; a state's tensors have at least `n`.
fn take_front<'a, T>(rest: &mut &'a mut [T], n: usize) -> &'a mut [T] {
    rest.split_off_mut(..n).unwrap_or_default()
}

#[inline(always)]
fn step_block(
    coefficients: &Coefficients,
    (params, gradient): (&mut [f32], &[f32]),
    (m_codes, m_absmax): (&mut [u8], &mut f32),
    (v_codes, v_absmax): (&mut [u8], &mut f32),
) {
    let c = *coefficients;
    let (mut m, mut v) = ([0.0; BLOCK], [0.0; BLOCK]);
    dequantize(&SIGNED_MAP, m_codes, *m_absmax, &mut m);
    dequantize(&UNSIGNED_MAP, v_codes, *v_absmax, &mut v);
    for (((p, m), v), g) in params.iter_mut().zip(&mut m).zip(&mut v).zip(gradient) {
        let g = g * c.factor;
        *m = *m * c.beta1 + c.one_minus_beta1 * g;
        *v = *v * c.beta2 + c.one_minus_beta2 * g * g;
        let denominator = v.sqrt() / c.sqrt_bias_correction2 + c.eps;
        *p = *p * c.decay - c.step_size * (*m / denominator);
    }
    *m_absmax = quantize(&SIGNED_MAP, &m, m_codes);
    *v_absmax = quantize(&UNSIGNED_MAP, &v, v_codes);
}

#[inline(always)]
fn dequantize(map: &QuantMap, codes: &[u8], absmax: f32, out: &mut [f32; BLOCK]) {
    for (out, code) in out.iter_mut().zip(codes) {
        *out = map.value(*code) * absmax;
    }
}

/// Writes the codes of a block and returns its maximum. `block` is padded with zeros.
#[inline(always)]
fn quantize(map: &QuantMap, block: &[f32; BLOCK], codes: &mut [u8]) -> f32 {
    // The maximum of bit patterns is faster to find, and NaN is above all numbers.
    let bits = block.iter().fold(0, |largest, x| x.abs().to_bits().max(largest));
    let absmax = f32::from_bits(bits);
    if absmax == 0.0 {
        codes.fill(0);
    } else {
        // Finding buckets vectorizes; the lookups in the buckets do not.
        let (mut scaled, mut buckets) = ([0.0; BLOCK], [0; BLOCK]);
        for ((scaled, bucket_of), x) in scaled.iter_mut().zip(&mut buckets).zip(block) {
            *scaled = x / absmax;
            *bucket_of = bucket(*scaled);
        }
        for ((code, scaled), bucket) in codes.iter_mut().zip(scaled).zip(buckets) {
            *code = map.code(scaled, bucket);
        }
    }
    absmax
}
