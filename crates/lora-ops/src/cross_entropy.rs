//! Fused linear + cross-entropy: the loss of a language model's head without the `[tokens, vocab]` logits.
//!
//! Rows with weight 0 cost nothing. The others are taken in chunks whose logits fit a fixed budget; a chunk's logits are
//! turned into the gradient in place, so the gradient of `x` costs one more product and no more memory
//! (the idea of Liger Kernel, arXiv 2410.10989, and of Cut Cross-Entropy, arXiv 2411.09009).

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use crate::cpu::{filled, read_f32};
use crate::gemm::{Mat, gemm};
use crate::linear::Panels;
use crate::simd::{exp, max, sum, vectorize};

/// Elements of a chunk's logits (48 MiB of f32).
const LOGITS: usize = 12 << 20;

/// A micro-batch's loss.
#[derive(Debug)]
pub struct Loss {
    /// `sum of weight * -log p(target)`, in nats.
    pub loss_sum: f64,
    /// Sum of the weights.
    pub weight_sum: f64,
    /// Gradient of `loss_sum` by `x` `[tokens, features]`; `None` where it was not asked for.
    pub dx: Option<Tensor>,
}

/// Which row of the logits predicts what, and how much it counts.
#[derive(Debug, Clone, Copy)]
pub struct Targets<'a> {
    /// Token that each row should predict.
    pub tokens: &'a [u32],
    /// Weight of each row's loss; 0: the row has no target.
    pub weights: &'a [f32],
}

/// The loss of `x` `[tokens, features]` under the head `weight` `[vocab, features]` (f32 or bf16), and its gradient.
#[tracing::instrument(level = "trace", name = "cross_entropy", skip_all)]
pub fn forward_backward(x: &Tensor, weight: &Tensor, targets: Targets, gradient: bool) -> Result<Loss> {
    let (tokens, features) = x.dims2()?;
    let (vocab, weight_features) = weight.dims2()?;
    if weight_features != features || targets.tokens.len() != tokens || targets.weights.len() != tokens {
        candle_core::bail!(
            "head {:?} over {:?} with {} targets and {} weights",
            weight.shape(),
            x.shape(),
            targets.tokens.len(),
            targets.weights.len()
        );
    }
    let rows: Vec<usize> = (0..tokens).filter(|&i| targets.weights[i] != 0.0).collect();
    if let Some(row) = rows.iter().find(|&&row| targets.tokens[row] as usize >= vocab) {
        candle_core::bail!("target {} is outside the vocabulary of {vocab}", targets.tokens[*row]);
    }
    let weight = Panels::of(weight)?;
    let chunk_rows = balanced_chunk(rows.len(), (LOGITS / vocab.max(1)).max(1));
    let mut logits = vec![0.0; chunk_rows * vocab];
    let mut row_losses = Vec::with_capacity(rows.len());
    let mut chunk = |x: &[f32], rows: &[usize], dx: Option<&mut [f32]>| {
        let n = rows.len();
        let mut gathered = gather(x, rows, features);
        let logits = &mut logits[..n * vocab];
        weight.for_each(|first, panel_rows, panel| {
            let (x, w) = (Mat::new(&gathered, n, features), Mat::new(panel, panel_rows, features));
            gemm(1.0, x, w.t(), 0.0, &mut logits[first..], vocab);
        });
        let losses = logits.par_chunks_mut(vocab).zip(rows).map(|(logits, &row)| {
            let target = targets.tokens[row] as usize;
            loss_row(logits, target, targets.weights[row], gradient)
        });
        row_losses.extend(losses.collect::<Vec<f64>>());
        let Some(dx) = dx else { return };
        weight.for_each(|first, panel_rows, panel| {
            let dlogits = Mat::new(logits, n, vocab).columns(first, panel_rows);
            let beta = if first == 0 { 0.0 } else { 1.0 };
            gemm(1.0, dlogits, Mat::new(panel, panel_rows, features), beta, &mut gathered, features);
        });
        for (row, gradient) in rows.iter().zip(gathered.chunks(features)) {
            dx[row * features..(row + 1) * features].copy_from_slice(gradient);
        }
    };
    let dx = read_f32(x, |x| {
        if gradient {
            let run = |dx: &mut [f32]| rows.chunks(chunk_rows).for_each(|rows| chunk(x, rows, Some(dx)));
            filled((tokens, features), run).map(Some)
        } else {
            rows.chunks(chunk_rows).for_each(|rows| chunk(x, rows, None));
            Ok(None)
        }
    })??;
    let weight_sum = rows.iter().map(|&row| f64::from(targets.weights[row])).sum();
    Ok(Loss { loss_sum: row_losses.iter().sum(), weight_sum, dx })
}

/// Rows of a chunk such that all chunks are about equally long.
fn balanced_chunk(rows: usize, most: usize) -> usize {
    rows.div_ceil(rows.div_ceil(most).max(1)).max(1)
}

fn gather(x: &[f32], rows: &[usize], features: usize) -> Vec<f32> {
    rows.iter().flat_map(|row| &x[row * features..(row + 1) * features]).copied().collect()
}

/// Loss of one row of logits, which become `weight * (softmax - one hot)` if `gradient`.
fn loss_row(logits: &mut [f32], target: usize, weight: f32, gradient: bool) -> f64 {
    vectorize(|| {
        let top = max(logits);
        let at_target = logits[target];
        let total = if gradient {
            logits.iter_mut().for_each(|l| *l = exp(*l - top));
            sum(logits.len(), |i| logits[i])
        } else {
            sum(logits.len(), |i| exp(logits[i] - top))
        };
        if gradient {
            let factor = weight / total;
            logits.iter_mut().for_each(|l| *l *= factor);
            logits[target] -= weight;
        }
        let log_p = f64::from(at_target) - f64::from(top) - f64::from(total).ln();
        -log_p * f64::from(weight)
    })
}
