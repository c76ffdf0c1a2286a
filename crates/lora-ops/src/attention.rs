//! Causal grouped-query attention by tiles with an online softmax (FlashAttention, arXiv 2205.14135; GQA, arXiv 2305.13245):
//! no matrix of positions x positions is ever kept, only the log-sum-exp of each row.

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use crate::cpu::{Shared, filled, read_f32};
use crate::gemm::{RawMat, gemm_serial};
use crate::simd::{dot, exp, max, sum, vectorize};

/// Query rows and key rows of a tile.
const Q_TILE: usize = 64;
const K_TILE: usize = 128;

/// Sizes of one attention: `seq` queries and `kv_seq` keys a sequence, the last query sees the last key.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    /// Sequences.
    pub batch: usize,
    /// Queries of a sequence.
    pub seq: usize,
    /// Keys of a sequence; at least `seq`, more when decoding with a cache.
    pub kv_seq: usize,
    /// Query heads.
    pub heads: usize,
    /// Key/value heads; divides `heads`.
    pub kv_heads: usize,
    /// Features of a head.
    pub head_dim: usize,
}

impl Shape {
    fn scale(&self) -> f32 {
        1.0 / (self.head_dim as f32).sqrt()
    }

    fn check(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<()> {
        let Self { batch, seq, kv_seq, heads, kv_heads, head_dim } = *self;
        let is = |x: &Tensor, rows: usize, heads: usize| -> Result<bool> {
            let (tokens, features) = x.dims2()?;
            Ok(batch.checked_mul(rows) == Some(tokens) && heads.checked_mul(head_dim) == Some(features))
        };
        let fits = head_dim > 0
            && kv_heads > 0
            && heads % kv_heads == 0
            && kv_seq >= seq
            && is(q, seq, heads)?
            && is(k, kv_seq, kv_heads)?
            && is(v, kv_seq, kv_heads)?;
        if !fits {
            candle_core::bail!("attention {self:?} of {:?}, {:?}, {:?}", q.shape(), k.shape(), v.shape());
        }
        Ok(())
    }

    /// (sequence, key/value head) pairs, which are independent of each other.
    fn tasks(&self) -> impl IndexedParallelIterator<Item = (usize, usize)> + use<> {
        let kv_heads = self.kv_heads;
        (0..self.batch * kv_heads).into_par_iter().map(move |task| (task / kv_heads, task % kv_heads))
    }

    /// Calls `f(query head, first query, queries)` for each query tile of a key/value head.
    fn query_tiles(&self, kv_head: usize, mut f: impl FnMut(usize, usize, usize)) {
        let group = self.heads / self.kv_heads;
        for head in kv_head * group..(kv_head + 1) * group {
            for first in (0..self.seq).step_by(Q_TILE) {
                f(head, first, Q_TILE.min(self.seq - first));
            }
        }
    }

    /// Calls `f(first key, keys)` for each key tile that the queries `first..first + rows` see.
    fn key_tiles(&self, first: usize, rows: usize, mut f: impl FnMut(usize, usize)) {
        let end = self.kv_seq - self.seq + first + rows;
        for key in (0..end).step_by(K_TILE) {
            f(key, K_TILE.min(end - key));
        }
    }

    /// How many of the keys `key..key + keys` query `query` sees.
    fn visible(&self, query: usize, key: usize, keys: usize) -> usize {
        (self.kv_seq - self.seq + query + 1).saturating_sub(key).min(keys)
    }
}

/// What the backward pass needs beside the inputs: the output, and the log-sum-exp of each row of scores.
#[derive(Debug)]
pub struct Saved {
    /// `[batch, heads, seq]`.
    lse: Vec<f32>,
}

/// `q` `[batch * seq, heads * head_dim]`, `k` and `v` `[batch * kv_seq, kv_heads * head_dim]`, to the attended values
/// `[batch * seq, heads * head_dim]`. Scores are scaled by `1 / sqrt(head_dim)`.
#[tracing::instrument(level = "trace", name = "attention forward", skip_all)]
pub fn forward(q: &Tensor, k: &Tensor, v: &Tensor, shape: Shape) -> Result<(Tensor, Saved)> {
    shape.check(q, k, v)?;
    let Shape { batch, seq, kv_seq, heads, kv_heads, head_dim } = shape;
    let (q_width, k_width) = (heads * head_dim, kv_heads * head_dim);
    let mut lse = vec![0.0; batch * heads * seq];
    let lse_out = Shared::new(&mut lse);
    let output = read_f32(q, |q| -> Result<Tensor> {
        read_f32(k, |k| -> Result<Tensor> {
            read_f32(v, |v| {
                filled((batch * seq, q_width), |o| {
                    let o = Shared::new(o);
                    shape.tasks().for_each(|(sequence, kv_head)| {
                        let mut scores = vec![0.0; Q_TILE * K_TILE];
                        let mut values = vec![0.0; Q_TILE * head_dim];
                        shape.query_tiles(kv_head, |head, first, rows| {
                            let q = &q[(sequence * seq + first) * q_width + head * head_dim..];
                            let mut top = [f32::NEG_INFINITY; Q_TILE];
                            let mut total = [0.0_f32; Q_TILE];
                            values.fill(0.0);
                            shape.key_tiles(first, rows, |key, keys| {
                                let at = (sequence * kv_seq + key) * k_width + kv_head * head_dim;
                                let (k, v) = (&k[at..], &v[at..]);
                                // SAFETY: `check` holds the slices against the shape; scores and values are ours.
                                unsafe {
                                    let q = RawMat::rows(q.as_ptr(), q_width);
                                    let k = RawMat::rows(k.as_ptr(), k_width);
                                    let mnk = (rows, keys, head_dim);
                                    gemm_serial(
                                        mnk,
                                        shape.scale(),
                                        q,
                                        k.t(),
                                        0.0,
                                        scores.as_mut_ptr(),
                                        K_TILE,
                                    );
                                }
                                vectorize(|| {
                                    for row in 0..rows {
                                        let seen = shape.visible(first + row, key, keys);
                                        let scores = &mut scores[row * K_TILE..row * K_TILE + keys];
                                        let values = &mut values[row * head_dim..(row + 1) * head_dim];
                                        softmax_step(scores, seen, &mut top[row], &mut total[row], values);
                                    }
                                });
                                // SAFETY: as above.
                                unsafe {
                                    let p = RawMat::rows(scores.as_ptr(), K_TILE);
                                    let v = RawMat::rows(v.as_ptr(), k_width);
                                    let mnk = (rows, head_dim, keys);
                                    gemm_serial(mnk, 1.0, p, v, 1.0, values.as_mut_ptr(), head_dim);
                                }
                            });
                            for row in 0..rows {
                                let inverse = 1.0 / total[row];
                                let at = (sequence * seq + first + row) * q_width + head * head_dim;
                                // SAFETY: this (sequence, head) belongs to this task alone.
                                let o = unsafe { std::slice::from_raw_parts_mut(o.at(at), head_dim) };
                                let values = &values[row * head_dim..(row + 1) * head_dim];
                                o.iter_mut().zip(values).for_each(|(o, v)| *o = v * inverse);
                                // SAFETY: as above.
                                unsafe {
                                    *lse_out.at((sequence * heads + head) * seq + first + row) =
                                        top[row] + total[row].ln();
                                }
                            }
                        });
                    });
                })
            })?
        })?
    })??;
    Ok((output, Saved { lse }))
}

/// One row's step over a tile of keys: scores become unnormalized probabilities under the running maximum `top`, and
/// what was summed under the old maximum is rescaled.
#[inline(always)]
fn softmax_step(scores: &mut [f32], seen: usize, top: &mut f32, total: &mut f32, values: &mut [f32]) {
    let (visible, hidden) = scores.split_at_mut(seen);
    hidden.fill(0.0);
    if visible.is_empty() {
        return;
    }
    let tile_top = max(visible);
    let new_top = if tile_top > *top { tile_top } else { *top };
    let rescale = exp(*top - new_top);
    visible.iter_mut().for_each(|s| *s = exp(*s - new_top));
    *total = *total * rescale + sum(visible.len(), |i| visible[i]);
    values.iter_mut().for_each(|v| *v *= rescale);
    *top = new_top;
}

/// `d_output` `[batch * seq, heads * head_dim]` to the gradients of `q`, `k` and `v`. `shape.kv_seq` is `shape.seq`.
#[tracing::instrument(level = "trace", name = "attention backward", skip_all)]
pub fn backward(
    saved: &Saved,
    (q, k, v): (&Tensor, &Tensor, &Tensor),
    output: &Tensor,
    d_output: &Tensor,
    shape: Shape,
) -> Result<(Tensor, Tensor, Tensor)> {
    shape.check(q, k, v)?;
    if shape.kv_seq != shape.seq || output.dims() != q.dims() || d_output.dims() != q.dims() {
        candle_core::bail!(
            "attention gradient {:?} of queries {:?} in {shape:?}",
            d_output.shape(),
            q.shape()
        );
    }
    if saved.lse.len() != shape.batch * shape.heads * shape.seq {
        candle_core::bail!("attention of {} rows was saved, not of {shape:?}", saved.lse.len());
    }
    let mut dq = vec![0.0; q.elem_count()];
    let mut dk = vec![0.0; k.elem_count()];
    let mut dv = vec![0.0; v.elem_count()];
    let grads = (Shared::new(&mut dq), Shared::new(&mut dk), Shared::new(&mut dv));
    read_f32(q, |q| -> Result<()> {
        read_f32(k, |k| -> Result<()> {
            read_f32(v, |v| -> Result<()> {
                read_f32(output, |o| -> Result<()> {
                    read_f32(d_output, |d_o| {
                        let operands = Operands { q, k, v, o, d_o, lse: &saved.lse, shape };
                        shape.tasks().for_each(|(sequence, kv_head)| operands.task(sequence, kv_head, grads));
                    })
                })?
            })?
        })?
    })??;
    let wrap = |data, like: &Tensor| Tensor::from_vec(data, like.shape(), like.device());
    Ok((wrap(dq, q)?, wrap(dk, k)?, wrap(dv, v)?))
}

struct Operands<'a> {
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
    o: &'a [f32],
    d_o: &'a [f32],
    lse: &'a [f32],
    shape: Shape,
}

impl Operands<'_> {
    /// Gradients of one key/value head of one sequence, and of the query heads that share it.
    fn task(&self, sequence: usize, kv_head: usize, (dq, dk, dv): (Shared, Shared, Shared)) {
        let shape = self.shape;
        let Shape { seq, kv_seq, heads, kv_heads, head_dim, .. } = shape;
        let (q_width, k_width) = (heads * head_dim, kv_heads * head_dim);
        let mut p = vec![0.0; Q_TILE * K_TILE];
        let mut ds = vec![0.0; Q_TILE * K_TILE];
        let mut delta = [0.0_f32; Q_TILE];
        shape.query_tiles(kv_head, |head, first, rows| {
            let q_at = (sequence * seq + first) * q_width + head * head_dim;
            let lse = &self.lse[(sequence * heads + head) * seq + first..][..rows];
            vectorize(|| {
                for (row, delta) in delta.iter_mut().enumerate().take(rows) {
                    let at = q_at + row * q_width;
                    *delta = dot(&self.o[at..at + head_dim], &self.d_o[at..at + head_dim]);
                }
            });
            shape.key_tiles(first, rows, |key, keys| {
                let k_at = (sequence * kv_seq + key) * k_width + kv_head * head_dim;
                let q = RawMat::rows(self.q[q_at..].as_ptr(), q_width);
                let d_o = RawMat::rows(self.d_o[q_at..].as_ptr(), q_width);
                let k = RawMat::rows(self.k[k_at..].as_ptr(), k_width);
                let v = RawMat::rows(self.v[k_at..].as_ptr(), k_width);
                // SAFETY: `check` holds the slices against the shape; p and ds are ours.
                unsafe {
                    let mnk = (rows, keys, head_dim);
                    gemm_serial(mnk, shape.scale(), q, k.t(), 0.0, p.as_mut_ptr(), K_TILE);
                    gemm_serial(mnk, 1.0, d_o, v.t(), 0.0, ds.as_mut_ptr(), K_TILE);
                }
                vectorize(|| {
                    for row in 0..rows {
                        let seen = shape.visible(first + row, key, keys);
                        let p = &mut p[row * K_TILE..row * K_TILE + keys];
                        let ds = &mut ds[row * K_TILE..row * K_TILE + keys];
                        p[seen..].fill(0.0);
                        ds[seen..].fill(0.0);
                        for (p, ds) in p[..seen].iter_mut().zip(&mut ds[..seen]) {
                            *p = exp(*p - lse[row]);
                            *ds = *p * (*ds - delta[row]) * shape.scale();
                        }
                    }
                });
                let (p, ds) = (RawMat::rows(p.as_ptr(), K_TILE), RawMat::rows(ds.as_ptr(), K_TILE));
                // SAFETY: as above; these parts of the gradients belong to this task alone.
                unsafe {
                    gemm_serial((keys, head_dim, rows), 1.0, p.t(), d_o, 1.0, dv.at(k_at), k_width);
                    gemm_serial((rows, head_dim, keys), 1.0, ds, k, 1.0, dq.at(q_at), q_width);
                    gemm_serial((keys, head_dim, rows), 1.0, ds.t(), q, 1.0, dk.at(k_at), k_width);
                }
            });
        });
    }
}
