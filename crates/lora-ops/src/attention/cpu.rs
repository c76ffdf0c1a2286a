//! Attention on the CPU: tile products by the serial matrix product, one task for each key/value
//! head of a sequence.

use candle_core::{Device, Result, Tensor};
use rayon::prelude::*;

use super::AttentionShape;
use crate::cpu::{SharedMutPtr, read_f32};
use crate::gemm::{RawMat, gemm_serial};
use crate::simd::{dot, exp, max, sum, tanh, vectorize};

/// Query rows and key rows of a tile.
const Q_TILE: usize = 64;
const K_TILE: usize = 128;

/// The division of the work into tasks and tiles, and the keys that each query sees.
#[derive(Clone, Copy)]
struct Tiling<'a> {
    shape: AttentionShape,
    first: Option<&'a [u32]>,
}

impl Tiling<'_> {
    /// (sequence, key/value head) pairs, which are independent of each other.
    fn tasks(&self) -> impl IndexedParallelIterator<Item = (usize, usize)> + use<> {
        let kv_heads = self.shape.kv_heads;
        (0..self.shape.batch * kv_heads).into_par_iter().map(move |task| (task / kv_heads, task % kv_heads))
    }

    /// Calls `f(query head, first query, queries)` for each query tile of a key/value head.
    fn query_tiles(&self, kv_head: usize, mut f: impl FnMut(usize, usize, usize)) {
        let group = self.shape.heads / self.shape.kv_heads;
        for head in kv_head * group..(kv_head + 1) * group {
            for first in (0..self.shape.seq).step_by(Q_TILE) {
                f(head, first, Q_TILE.min(self.shape.seq - first));
            }
        }
    }

    /// Calls `f(first key, keys)` for each key tile that the queries `first..first + rows` of a
    /// sequence see.
    fn key_tiles(&self, sequence: usize, first: usize, rows: usize, mut f: impl FnMut(usize, usize)) {
        let end = self.last_key(first + rows - 1) + 1;
        for key in (self.first_key(sequence, first)..end).step_by(K_TILE) {
            f(key, K_TILE.min(end - key));
        }
    }

    /// Returns the range of the keys `key..key + keys` that a query sees, relative to `key`.
    fn visible(&self, sequence: usize, query: usize, key: usize, keys: usize) -> (usize, usize) {
        let to = (self.last_key(query) + 1).saturating_sub(key).min(keys);
        (self.first_key(sequence, query).saturating_sub(key).min(to), to)
    }

    fn first_key(&self, sequence: usize, query: usize) -> usize {
        self.first.map_or(0, |first| first[sequence * self.shape.seq + query] as usize)
    }

    fn last_key(&self, query: usize) -> usize {
        self.shape.kv_seq - self.shape.seq + query
    }
}

/// Returns the output and the log-sum-exps.
pub(super) fn forward(
    (q, k, v): (&Tensor, &Tensor, &Tensor),
    shape: AttentionShape,
    first: Option<&[u32]>,
) -> Result<(Tensor, Tensor)> {
    let AttentionShape { batch, seq, heads, head_dim, .. } = shape;
    let mut output = vec![0.0; batch * seq * heads * head_dim];
    let mut lse = vec![0.0; batch * heads * seq];
    let outputs = (SharedMutPtr::new(&mut output), SharedMutPtr::new(&mut lse));
    let tiling = Tiling { shape, first };
    let inputs = Inputs { q: &read_f32(q)?, k: &read_f32(k)?, v: &read_f32(v)?, tiling };
    tiling.tasks().for_each(|(sequence, kv_head)| inputs.task(sequence, kv_head, outputs));
    let output = Tensor::from_vec(output, (batch * seq, heads * head_dim), &Device::Cpu)?;
    Ok((output, Tensor::from_vec(lse, (batch, heads, seq), &Device::Cpu)?))
}

/// The inputs, and the division of the work.
#[derive(Clone, Copy)]
struct Inputs<'a> {
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
    tiling: Tiling<'a>,
}

impl Inputs<'_> {
    /// Computes the output and the log-sum-exps of the query heads that share one key/value head of
    /// one sequence.
    fn task(&self, sequence: usize, kv_head: usize, (output, lse): (SharedMutPtr, SharedMutPtr)) {
        let (tiling, shape) = (self.tiling, self.tiling.shape);
        let AttentionShape { seq, kv_seq, heads, kv_heads, head_dim, .. } = shape;
        let (q_width, k_width) = (heads * head_dim, kv_heads * head_dim);
        let mut scores = vec![0.0; Q_TILE * K_TILE];
        let mut values = vec![0.0; Q_TILE * head_dim];
        tiling.query_tiles(kv_head, |head, first, rows| {
            let q_at = (sequence * seq + first) * q_width + head * head_dim;
            let q = RawMat::rows(self.q[q_at..].as_ptr(), q_width);
            let mut top = [f32::NEG_INFINITY; Q_TILE];
            let mut total = [0.0_f32; Q_TILE];
            values.fill(0.0);
            tiling.key_tiles(sequence, first, rows, |key, keys| {
                let k_at = (sequence * kv_seq + key) * k_width + kv_head * head_dim;
                let k = RawMat::rows(self.k[k_at..].as_ptr(), k_width);
                let v = RawMat::rows(self.v[k_at..].as_ptr(), k_width);
                let mnk = (rows, keys, head_dim);
                // SAFETY: `check` compared the slices with the shape; only this task uses scores
                // and values.
                unsafe { gemm_serial(mnk, shape.scale, q, k.t(), 0.0, scores.as_mut_ptr(), K_TILE) };
                vectorize(|| {
                    for row in 0..rows {
                        let (from, to) = tiling.visible(sequence, first + row, key, keys);
                        let scores = &mut scores[row * K_TILE..row * K_TILE + keys];
                        scores[..from].fill(0.0);
                        scores[to..].fill(0.0);
                        if let Some(cap) = shape.softcap {
                            scores[from..to].iter_mut().for_each(|s| *s = cap * tanh(*s / cap));
                        }
                        let values = &mut values[row * head_dim..(row + 1) * head_dim];
                        softmax_step(&mut scores[from..to], &mut top[row], &mut total[row], values);
                    }
                });
                let p = RawMat::rows(scores.as_ptr(), K_TILE);
                let mnk = (rows, head_dim, keys);
                // SAFETY: as above.
                unsafe { gemm_serial(mnk, 1.0, p, v, 1.0, values.as_mut_ptr(), head_dim) };
            });
            for (row, values) in values.chunks_exact(head_dim).enumerate().take(rows) {
                let inverse = 1.0 / total[row];
                // SAFETY: this (sequence, head) belongs to this task alone.
                let (o, lse) = unsafe {
                    let o = std::slice::from_raw_parts_mut(output.at(q_at + row * q_width), head_dim);
                    (o, &mut *lse.at((sequence * heads + head) * seq + first + row))
                };
                o.iter_mut().zip(values).for_each(|(o, v)| *o = v * inverse);
                *lse = top[row] + total[row].ln();
            }
        });
    }
}

/// Processes the visible keys of a tile for one row: scores become unnormalized probabilities under
/// the running maximum `top`, and the sums under the previous maximum are rescaled.
#[inline(always)]
fn softmax_step(scores: &mut [f32], top: &mut f32, total: &mut f32, values: &mut [f32]) {
    if scores.is_empty() {
        return;
    }
    let tile_top = max(scores);
    let new_top = if tile_top > *top { tile_top } else { *top };
    let rescale = exp(*top - new_top);
    scores.iter_mut().for_each(|s| *s = exp(*s - new_top));
    *total = *total * rescale + sum(scores.len(), |i| scores[i]);
    values.iter_mut().for_each(|v| *v *= rescale);
    *top = new_top;
}

/// Returns the gradients of `q`, `k` and `v`.
pub(super) fn backward(
    lse: &Tensor,
    (q, k, v): (&Tensor, &Tensor, &Tensor),
    output: &Tensor,
    d_output: &Tensor,
    shape: AttentionShape,
    first: Option<&[u32]>,
) -> Result<(Tensor, Tensor, Tensor)> {
    let mut dq = vec![0.0; q.elem_count()];
    let mut dk = vec![0.0; k.elem_count()];
    let mut dv = vec![0.0; v.elem_count()];
    let grads = (SharedMutPtr::new(&mut dq), SharedMutPtr::new(&mut dk), SharedMutPtr::new(&mut dv));
    let tiling = Tiling { shape, first };
    let operands = Operands {
        inputs: Inputs { q: &read_f32(q)?, k: &read_f32(k)?, v: &read_f32(v)?, tiling },
        o: &read_f32(output)?,
        d_o: &read_f32(d_output)?,
        lse: &read_f32(lse)?,
    };
    tiling.tasks().for_each(|(sequence, kv_head)| operands.task(sequence, kv_head, grads));
    let wrap = |data, like: &Tensor| Tensor::from_vec(data, like.shape(), like.device());
    Ok((wrap(dq, q)?, wrap(dk, k)?, wrap(dv, v)?))
}

/// Operands of the backward pass.
struct Operands<'a> {
    inputs: Inputs<'a>,
    o: &'a [f32],
    d_o: &'a [f32],
    lse: &'a [f32],
}

impl Operands<'_> {
    /// Computes the gradients of one key/value head of one sequence, and of the query heads that
    /// share it.
    fn task(
        &self,
        sequence: usize,
        kv_head: usize,
        (dq, dk, dv): (SharedMutPtr, SharedMutPtr, SharedMutPtr),
    ) {
        let Inputs { q, k, v, tiling } = self.inputs;
        let shape = tiling.shape;
        let AttentionShape { seq, kv_seq, heads, kv_heads, head_dim, .. } = shape;
        let (q_width, k_width) = (heads * head_dim, kv_heads * head_dim);
        let mut p = vec![0.0; Q_TILE * K_TILE];
        let mut ds = vec![0.0; Q_TILE * K_TILE];
        let mut delta = [0.0_f32; Q_TILE];
        tiling.query_tiles(kv_head, |head, first, rows| {
            let q_at = (sequence * seq + first) * q_width + head * head_dim;
            let lse = &self.lse[(sequence * heads + head) * seq + first..][..rows];
            vectorize(|| {
                for (row, delta) in delta.iter_mut().enumerate().take(rows) {
                    let at = q_at + row * q_width;
                    *delta = dot(&self.o[at..at + head_dim], &self.d_o[at..at + head_dim]);
                }
            });
            tiling.key_tiles(sequence, first, rows, |key, keys| {
                let k_at = (sequence * kv_seq + key) * k_width + kv_head * head_dim;
                let q = RawMat::rows(q[q_at..].as_ptr(), q_width);
                let d_o = RawMat::rows(self.d_o[q_at..].as_ptr(), q_width);
                let k = RawMat::rows(k[k_at..].as_ptr(), k_width);
                let v = RawMat::rows(v[k_at..].as_ptr(), k_width);
                // SAFETY: `check` compared the slices with the shape; only this task uses p and ds.
                unsafe {
                    let mnk = (rows, keys, head_dim);
                    gemm_serial(mnk, shape.scale, q, k.t(), 0.0, p.as_mut_ptr(), K_TILE);
                    gemm_serial(mnk, 1.0, d_o, v.t(), 0.0, ds.as_mut_ptr(), K_TILE);
                }
                vectorize(|| {
                    for row in 0..rows {
                        let (from, to) = tiling.visible(sequence, first + row, key, keys);
                        let p = &mut p[row * K_TILE..row * K_TILE + keys];
                        let ds = &mut ds[row * K_TILE..row * K_TILE + keys];
                        for hidden in [&mut *p, &mut *ds] {
                            hidden[..from].fill(0.0);
                            hidden[to..].fill(0.0);
                        }
                        let visible = p[from..to].iter_mut().zip(&mut ds[from..to]);
                        match shape.softcap {
                            None => visible.for_each(|(p, ds)| {
                                *p = exp(*p - lse[row]);
                                *ds = *p * (*ds - delta[row]) * shape.scale;
                            }),
                            Some(cap) => visible.for_each(|(p, ds)| {
                                let capped = tanh(*p / cap);
                                *p = exp(cap * capped - lse[row]);
                                *ds = *p * (*ds - delta[row]) * (1.0 - capped * capped) * shape.scale;
                            }),
                        }
                    }
                });
                let (p, ds) = (RawMat::rows(p.as_ptr(), K_TILE), RawMat::rows(ds.as_ptr(), K_TILE));
                // SAFETY: as above; only this task writes these parts of the gradients.
                unsafe {
                    gemm_serial((keys, head_dim, rows), 1.0, p.t(), d_o, 1.0, dv.at(k_at), k_width);
                    gemm_serial((rows, head_dim, keys), 1.0, ds, k, 1.0, dq.at(q_at), q_width);
                    gemm_serial((keys, head_dim, rows), 1.0, ds.t(), q, 1.0, dk.at(k_at), k_width);
                }
            });
        });
    }
}
