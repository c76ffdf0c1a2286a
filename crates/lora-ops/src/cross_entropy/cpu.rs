use candle_core::{Device, Result, Tensor};
use lora_spec::{CPU_LOGITS_PER_CHUNK, chunk_rows};
use rayon::prelude::*;

use super::{Head, Targets};
use crate::cpu::read_f32;
use crate::gemm::{Mat, gemm};
use crate::linear::Panels;
use crate::simd::{exp, max, sum, tanh, vectorize};

/// Elements of a row that are summed in f32; the sums of these chunks are added in f64.
const SUM_CHUNK: usize = 4096;

/// Returns the losses of the rows, and the gradient of their sum.
pub(super) fn forward_backward(
    x: &Tensor,
    Head { weight, softcap }: Head,
    targets: &Targets,
    gradient: bool,
) -> Result<(Tensor, Option<Tensor>)> {
    let (tokens, features) = x.dims2()?;
    let vocab = weight.dims2()?.0;
    let (x, weight) = (&*read_f32(x)?, Panels::from_tensor(weight)?);
    let targets: Vec<Target> = targets.iter().collect();
    let chunk_rows = chunk_rows(targets.len(), vocab, CPU_LOGITS_PER_CHUNK);
    let mut logits = vec![0.0; chunk_rows * vocab];
    let mut row_losses = Vec::with_capacity(targets.len());
    let mut dx = gradient.then(|| vec![0.0; tokens * features]);
    for targets in targets.chunks(chunk_rows) {
        let n = targets.len();
        let mut gathered = gather(x, targets, features);
        let logits = &mut logits[..n * vocab];
        weight.for_each(|first, panel_rows, panel| {
            let (x, w) = (Mat::new(&gathered, n, features), Mat::new(panel, panel_rows, features));
            gemm(1.0, x, w.t(), 0.0, &mut logits[first..], vocab);
        });
        let losses = logits.par_chunks_mut(vocab).zip(targets);
        let loss = |logits: &mut [f32], target: &Target| match softcap {
            None => loss_row(logits, target, gradient),
            Some(cap) => capped_loss_row(logits, cap, target, gradient),
        };
        let losses = losses.map(|(logits, target)| loss(logits, target));
        row_losses.extend(losses.collect::<Vec<f64>>());
        let Some(dx) = &mut dx else { continue };
        weight.for_each(|first, panel_rows, panel| {
            let dlogits = Mat::new(logits, n, vocab).columns(first, panel_rows);
            let beta = if first == 0 { 0.0 } else { 1.0 };
            gemm(1.0, dlogits, Mat::new(panel, panel_rows, features), beta, &mut gathered, features);
        });
        for (Target { row, .. }, gradient) in targets.iter().zip(gathered.chunks(features)) {
            dx[row * features..(row + 1) * features].copy_from_slice(gradient);
        }
    }
    let dx = dx.map(|dx| Tensor::from_vec(dx, (tokens, features), &Device::Cpu)).transpose()?;
    let rows = row_losses.len();
    Ok((Tensor::from_vec(row_losses, rows, &Device::Cpu)?, dx))
}

/// A row that has a target.
struct Target {
    row: usize,
    token: usize,
    weight: f32,
}

impl Targets {
    fn iter(&self) -> impl Iterator<Item = Target> {
        let numbers = self.rows.host().iter().zip(self.tokens.host()).zip(self.weights.host());
        numbers.map(|((row, token), weight)| Target {
            row: *row as usize,
            token: *token as usize,
            weight: f32::from_bits(*weight),
        })
    }
}

fn gather(x: &[f32], targets: &[Target], features: usize) -> Vec<f32> {
    let rows = targets.iter().flat_map(|Target { row, .. }| &x[row * features..(row + 1) * features]);
    rows.copied().collect()
}

/// Like [`loss_row`], for logits `z` that become `cap tanh(z / cap)` before.
fn capped_loss_row(logits: &mut [f32], cap: f32, target: &Target, gradient: bool) -> f64 {
    let mut bent = vec![0.0; logits.len()];
    vectorize(|| {
        for (bent, logit) in bent.iter_mut().zip(&mut *logits) {
            *bent = tanh(*logit / cap);
            *logit = cap * *bent;
        }
    });
    let loss = loss_row(logits, target, gradient);
    if gradient {
        logits.iter_mut().zip(&bent).for_each(|(gradient, bent)| *gradient *= 1.0 - bent * bent);
    }
    loss
}

/// Returns the loss of one row of logits, which become `weight * (softmax - one hot)` if `gradient`
/// is set.
fn loss_row(logits: &mut [f32], &Target { token, weight, .. }: &Target, gradient: bool) -> f64 {
    vectorize(|| {
        let top = max(logits);
        let at_token = logits[token];
        // For large vocabularies: short sums in f32, and their sum in f64.
        let mut total = 0.0_f64;
        for logits in logits.chunks_mut(SUM_CHUNK) {
            total += f64::from(if gradient {
                logits.iter_mut().for_each(|l| *l = exp(*l - top));
                sum(logits.len(), |i| logits[i])
            } else {
                sum(logits.len(), |i| exp(logits[i] - top))
            });
        }
        if gradient {
            let factor = weight / total as f32;
            logits.iter_mut().for_each(|l| *l *= factor);
            logits[token] -= weight;
        }
        let log_p = f64::from(at_token) - f64::from(top) - total.ln();
        -log_p * f64::from(weight)
    })
}
