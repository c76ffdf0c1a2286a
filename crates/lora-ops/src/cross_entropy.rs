//! Fused linear and cross-entropy: the loss of a language model's head without `[tokens, vocab]`
//! logits.
//!
//! Rows of weight 0 cost nothing. The other rows are processed in chunks whose logits fit a fixed
//! budget. The logits of a chunk are overwritten with their gradient, so the gradient of `x` costs
//! one more product and almost no memory (the idea of Liger Kernel, arXiv 2410.10989, and of Cut
//! Cross-Entropy, arXiv 2411.09009).

use candle_core::{Device, Result, Tensor};

use crate::Ids;
use crate::backend::Backend;
use crate::transfer::to_vec;

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;

/// The target token and the loss weight of each row of the logits. Rows of weight 0 are skipped.
#[derive(Debug, Clone)]
pub struct Targets {
    /// Number of all rows, with and without a target.
    all_rows: usize,
    rows: Ids,
    tokens: Ids,
    /// f32, as their bits.
    weights: Ids,
    weight_sum: f64,
}

impl Targets {
    /// Takes for each row the target token and the weight of its loss (0: no target), for
    /// operations on `device`.
    ///
    /// # Errors
    /// Numbers of tokens and weights that differ, or 2^32 rows or more.
    pub fn new(tokens: &[u32], weights: &[f32], device: &Device) -> Result<Self> {
        let all_rows = tokens.len();
        if weights.len() != all_rows {
            candle_core::bail!("{all_rows} targets with {} weights", weights.len());
        }
        if u32::try_from(all_rows).is_err() {
            candle_core::bail!("{all_rows} targets are too many; there must be fewer than 2^32");
        }
        let rows: Vec<usize> = (0..all_rows).filter(|&row| weights[row] != 0.0).collect();
        let kept: Vec<f32> = rows.iter().map(|&row| weights[row]).collect();
        Ok(Self {
            all_rows,
            tokens: Ids::new(rows.iter().map(|&row| tokens[row]).collect::<Vec<_>>(), device)?,
            weights: Ids::from_f32_bits(&kept, device)?,
            weight_sum: kept.iter().map(|weight| f64::from(*weight)).sum(),
            rows: Ids::new(rows.iter().map(|&row| row as u32).collect::<Vec<_>>(), device)?,
        })
    }
}

/// A micro-batch's loss.
#[derive(Debug)]
pub struct Loss {
    /// `weight * -log p(target)`, in nats, for each row with a target: f64, on the device of `x`.
    pub row_losses: Tensor,
    /// The sum of the weights.
    pub weight_sum: f64,
    /// The gradient of the sum of the losses with respect to `x`, `[tokens, features]`; `None` if
    /// it was not requested.
    pub dx: Option<Tensor>,
}

impl Loss {
    /// Returns the sum of the losses, added in the order of the rows. Waits for the GPU.
    pub fn sum(&self) -> Result<f64> {
        Ok(to_vec::<f64>(&self.row_losses)?.iter().sum())
    }
}

/// The last linear module of a model.
#[derive(Debug, Clone, Copy)]
pub struct Head<'a> {
    /// `[vocab, features]`, f32 or bf16; on a GPU of the type of `x`.
    pub weight: &'a Tensor,
    /// Bound `c` of the logits `z`, which become `c tanh(z / c)` (Gemma 2, arXiv 2408.00118).
    pub softcap: Option<f32>,
}

impl<'a> From<&'a Tensor> for Head<'a> {
    fn from(weight: &'a Tensor) -> Self {
        Self { weight, softcap: None }
    }
}

/// Computes the losses of `x` `[tokens, features]` under `head`, and their gradient if `gradient`
/// is set.
///
/// # Errors
/// Shapes or types that do not fit, or a target outside the vocabulary.
#[tracing::instrument(level = "trace", name = "cross_entropy", skip_all)]
pub fn forward_backward<'a>(
    x: &Tensor,
    head: impl Into<Head<'a>>,
    targets: &Targets,
    gradient: bool,
) -> Result<Loss> {
    let head = head.into();
    let weight = head.weight;
    let (tokens, features) = x.dims2()?;
    let (vocab, weight_features) = weight.dims2()?;
    if weight_features != features || targets.all_rows != tokens {
        candle_core::bail!(
            "invalid cross-entropy of head {:?} and x {:?} with {} targets: the shapes do not fit",
            weight.shape(),
            x.shape(),
            targets.all_rows
        );
    }
    if let Some(token) = targets.tokens.host().iter().find(|token| **token as usize >= vocab) {
        candle_core::bail!("target {token} is outside the vocabulary of {vocab}");
    }
    let (row_losses, dx) = match Backend::of_tensors(&[x, weight])? {
        Backend::Cpu => cpu::forward_backward(x, head, targets, gradient)?,
        #[cfg(feature = "cuda")]
        Backend::Cuda(gpu) => cuda::forward_backward(&gpu, x, head, targets, gradient)?,
    };
    Ok(Loss { row_losses, weight_sum: targets.weight_sum, dx })
}
