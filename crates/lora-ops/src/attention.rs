//! Causal grouped-query attention in tiles with an online softmax (FlashAttention, arXiv
//! 2205.14135, 2307.08691; GQA, arXiv 2305.13245). No positions x positions matrix is ever kept,
//! only the log-sum-exp of each row.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;

use candle_core::{Result, Tensor};

use crate::Ids;
use crate::backend::Backend;

/// Sizes of an attention: each sequence has `seq` queries and `kv_seq` keys, and the last query
/// sees the last key.
#[derive(Debug, Clone, Copy)]
pub struct AttentionShape {
    /// Number of sequences.
    pub batch: usize,
    /// Queries per sequence.
    pub seq: usize,
    /// Keys per sequence: at least `seq`, and more when decoding with a cache.
    pub kv_seq: usize,
    /// Query heads.
    pub heads: usize,
    /// Key/value heads; divides `heads`.
    pub kv_heads: usize,
    /// Features of a head.
    pub head_dim: usize,
    /// Factor of the products of queries and keys.
    pub scale: f32,
    /// Bound `c` of the scores `s`, which become `c tanh(s / c)` (Gemma 2, arXiv 2408.00118).
    pub softcap: Option<f32>,
}

impl AttentionShape {
    /// Sequences of `seq` tokens without cached keys, with the usual scale `1 / sqrt(head_dim)`.
    pub fn new(batch: usize, seq: usize, heads: usize, kv_heads: usize, head_dim: usize) -> Self {
        let scale = 1.0 / (head_dim as f32).sqrt();
        Self { batch, seq, kv_seq: seq, heads, kv_heads, head_dim, scale, softcap: None }
    }

    fn check(&self, (q, k, v): (&Tensor, &Tensor, &Tensor), first: Option<&Ids>) -> Result<()> {
        let Self { batch, seq, kv_seq, heads, kv_heads, head_dim, .. } = *self;
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
            candle_core::bail!(
                "invalid attention {self:?}: q is {:?}, k {:?} and v {:?}",
                q.shape(),
                k.shape(),
                v.shape()
            );
        }
        first.map_or(Ok(()), |first| self.check_first(first.host()))
    }

    /// Checks what the kernels rely on: every query sees at least one key, and no query sees a key
    /// before the first key of the previous query.
    fn check_first(&self, first: &[u32]) -> Result<()> {
        if first.len() != self.batch * self.seq {
            candle_core::bail!(
                "invalid first keys of {} queries for {self:?}: each query needs one",
                first.len()
            );
        }
        for (sequence, first) in first.chunks_exact(self.seq.max(1)).enumerate() {
            let mut before = 0;
            for (query, &key) in first.iter().enumerate() {
                let last = self.kv_seq - self.seq + query;
                if key < before || key as usize > last {
                    candle_core::bail!(
                        "invalid first keys: query {query} of sequence {sequence} sees the keys {key} to \
                         {last}, and the query before it those from {before} on; first keys must not \
                         decrease, and each query must see a key"
                    );
                }
                before = key;
            }
        }
        Ok(())
    }
}

/// Returns the first key that each query of `batch` sequences of `seq` tokens sees,
/// `[batch * seq]`. A query sees only keys of its own document, and of these the last `window`, its
/// own position included.
///
/// `window` is at least 1; `None` means no limit. `segments` has a number for each position, equal
/// within a document of a packed row; `None` means that each sequence is one document.
///
/// # Panics
/// If the length of `segments` is not the number of positions.
pub fn first_visible_keys(
    batch: usize,
    seq: usize,
    window: Option<usize>,
    segments: Option<&[u32]>,
) -> Vec<u32> {
    assert!(segments.is_none_or(|s| s.len() == batch * seq), "there must be {batch} x {seq} segments");
    let mut first = Vec::with_capacity(batch * seq);
    for sequence in 0..batch {
        let mut document = 0;
        for position in 0..seq {
            let at = sequence * seq + position;
            if position > 0 && segments.is_some_and(|segments| segments[at] != segments[at - 1]) {
                document = position;
            }
            let windowed = window.map_or(0, |window| (position + 1).saturating_sub(window));
            first.push(document.max(windowed) as u32);
        }
    }
    first
}

/// Activations that the backward pass needs in addition to the inputs and the output: the
/// log-sum-exp of each row of scores.
#[derive(Debug)]
pub struct AttentionActivations {
    /// f32 `[batch, heads, seq]`.
    lse: Tensor,
}

/// Computes attention of `q` `[batch * seq, heads * head_dim]` over `k` and `v`
/// `[batch * kv_seq, kv_heads * head_dim]`, and returns the attended values
/// `[batch * seq, heads * head_dim]`.
///
/// `first` has one number for each query: the first key of its sequence that the query sees
/// (`None`: 0 for all). The last key that it sees is the one at its own position. The numbers do
/// not decrease along a sequence. See [`first_visible_keys`].
///
/// # Errors
/// Sizes or first keys that do not fit; on a GPU, heads with more than 512 features.
#[tracing::instrument(level = "trace", name = "attention forward", skip_all)]
pub fn forward(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    shape: AttentionShape,
    first: Option<&Ids>,
) -> Result<(Tensor, AttentionActivations)> {
    shape.check((q, k, v), first)?;
    let (output, lse) = match Backend::of_tensors(&[q, k, v])? {
        Backend::Cpu => cpu::forward((q, k, v), shape, first.map(Ids::host))?,
        #[cfg(feature = "cuda")]
        Backend::Cuda(gpu) => cuda::forward(&gpu, (q, k, v), shape, first)?,
    };
    Ok((output, AttentionActivations { lse }))
}

/// Computes the gradients of `q`, `k` and `v` from `d_output` `[batch * seq, heads * head_dim]`.
/// `shape.kv_seq` must equal `shape.seq`.
///
/// # Errors
/// Sizes that do not fit, or that differ from those of the forward pass.
#[tracing::instrument(level = "trace", name = "attention backward", skip_all)]
pub fn backward(
    saved: &AttentionActivations,
    (q, k, v): (&Tensor, &Tensor, &Tensor),
    output: &Tensor,
    d_output: &Tensor,
    shape: AttentionShape,
    first: Option<&Ids>,
) -> Result<(Tensor, Tensor, Tensor)> {
    shape.check((q, k, v), first)?;
    if shape.kv_seq != shape.seq || output.dims() != q.dims() || d_output.dims() != q.dims() {
        candle_core::bail!(
            "invalid attention gradient {:?} for queries {:?} in {shape:?}",
            d_output.shape(),
            q.shape()
        );
    }
    if saved.lse.dims() != [shape.batch, shape.heads, shape.seq] {
        candle_core::bail!(
            "invalid attention activations: the log-sum-exp is {:?}, which does not fit {shape:?}",
            saved.lse.shape()
        );
    }
    let AttentionActivations { lse } = saved;
    match Backend::of_tensors(&[q, k, v, output, d_output, lse])? {
        Backend::Cpu => cpu::backward(lse, (q, k, v), output, d_output, shape, first.map(Ids::host)),
        #[cfg(feature = "cuda")]
        Backend::Cuda(gpu) => cuda::backward(&gpu, lse, (q, k, v), output, d_output, shape, first),
    }
}
