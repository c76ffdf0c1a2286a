use candle_core::{DType, Result, Tensor};
use rayon::prelude::*;

use super::{FINGERPRINT_KEYS, SUM_CHUNK};
use crate::cpu::{TASK_ELEMENTS, read, read_f32, update_f32};
use crate::simd::{dot, vectorize};

/// Returns the sum of squares of each chunk.
pub(super) fn sums_of_squares(x: &Tensor) -> Result<Vec<f32>> {
    let x = &*read_f32(x)?;
    Ok(x.par_chunks(SUM_CHUNK).map(|c| vectorize(|| dot(c, c))).collect())
}

pub(super) fn scale(x: &Tensor, factor: f32) -> Result<()> {
    let x = &mut *update_f32(x, &[])?;
    x.par_chunks_mut(TASK_ELEMENTS).for_each(|x| vectorize(|| x.iter_mut().for_each(|x| *x *= factor)));
    Ok(())
}

/// Returns the sums of the elements' hashes; the first element has the index `first`.
pub(super) fn hashes(parts: &[&Tensor], mut first: u64) -> Result<[u64; 2]> {
    let mut sums = [0; 2];
    for part in parts {
        let of_part = match part.dtype() {
            DType::U8 => hash(&read(part)?, first, |x: &u8| u32::from(*x)),
            _ => hash(&read_f32(part)?, first, |x| x.to_bits()),
        };
        sums = add(sums, of_part);
        first += part.elem_count() as u64;
    }
    Ok(sums)
}

fn hash<T: Sync>(x: &[T], first: u64, bits: impl Fn(&T) -> u32 + Sync) -> [u64; 2] {
    let of_chunk = |(i, chunk): (usize, &[T])| {
        vectorize(|| {
            chunk.iter().zip(first + (i * TASK_ELEMENTS) as u64..).fold([0; 2], |sums, (x, i)| {
                let word = u64::from(bits(x)) << 32 ^ i;
                add(sums, FINGERPRINT_KEYS.map(|key| mix(word ^ key)))
            })
        })
    };
    x.par_chunks(TASK_ELEMENTS).enumerate().map(of_chunk).reduce(|| [0; 2], add)
}

/// The finalizer of splitmix64.
#[inline(always)]
fn mix(z: u64) -> u64 {
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[inline(always)]
fn add(a: [u64; 2], b: [u64; 2]) -> [u64; 2] {
    [a[0].wrapping_add(b[0]), a[1].wrapping_add(b[1])]
}
