//! Sums over long vectors in a fixed order.

use rayon::prelude::*;

use crate::simd::{dot, vectorize};

/// Elements whose squares are summed in f32 lanes before the sum goes on in f64.
const CHUNK: usize = 4096;

/// Sum of squares. Chunks of 4096 elements are summed in f32, those sums in f64 in order; not finite if an element is not.
pub fn sum_of_squares(x: &[f32]) -> f64 {
    let partial: Vec<f32> = x.par_chunks(CHUNK).map(|c| vectorize(|| dot(c, c))).collect();
    partial.iter().map(|p| f64::from(*p)).sum()
}

/// `x *= factor`.
pub fn scale(x: &mut [f32], factor: f32) {
    x.par_chunks_mut(crate::cpu::GRAIN).for_each(|x| vectorize(|| x.iter_mut().for_each(|x| *x *= factor)));
}
