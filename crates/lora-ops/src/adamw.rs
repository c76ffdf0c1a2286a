//! AdamW (arXiv 1711.05101), equal to `torch.optim.AdamW`: decay comes first, and the bias is
//! corrected as torch corrects it.

use candle_core::{Result, Tensor};

use crate::backend::Backend;
use crate::paged::{PagedVector, StagingBuffers, half_window, windows};

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;

/// Settings of one step.
#[derive(Debug, Clone, Copy)]
pub struct AdamW {
    /// Learning rate of this step.
    pub lr: f64,
    /// Decay rate of the first moment.
    pub beta1: f64,
    /// Decay rate of the second moment.
    pub beta2: f64,
    /// Added to the square root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
}

/// Parameters and moments: f32 vectors of equal length, each with its own storage.
#[derive(Debug, Clone, Copy)]
pub struct AdamWTensors<'a> {
    /// Parameters.
    pub params: &'a Tensor,
    /// First moments.
    pub m: &'a Tensor,
    /// Second moments.
    pub v: &'a Tensor,
}

impl AdamW {
    /// Updates parameters and moments in place with `gradient * factor`, as step number `t` (from
    /// 1). `factor` is the clipping factor.
    #[tracing::instrument(level = "trace", name = "adamw", skip_all)]
    pub fn step(&self, t: u64, state: AdamWTensors, gradient: &Tensor, factor: f32) -> Result<()> {
        check_lengths(state, gradient)?;
        let AdamWTensors { params, m, v } = state;
        let coefficients = self.coefficients(t, factor);
        match Backend::of_tensors(&[params, m, v, gradient])? {
            Backend::Cpu => cpu::step(&coefficients, state, gradient),
            #[cfg(feature = "cuda")]
            Backend::Cuda(gpu) => cuda::step(&gpu, &coefficients, state, gradient),
        }
    }

    /// Does the same as [`Self::step`], bit for bit, with at most `window` elements of each moment
    /// (at least two) on the parameters' device at a time: the moments of parameters on a GPU may
    /// be in the host's memory.
    pub fn step_in_windows(
        &self,
        t: u64,
        state: AdamWTensors,
        gradient: &Tensor,
        factor: f32,
        window: usize,
    ) -> Result<()> {
        let buffers = buffers(state, window)?;
        self.step_with_buffers(&buffers, t, state, gradient, factor, window)
    }

    /// Makes a step through `buffers`, which must have been allocated for moments on the same
    /// device as these and at least as long.
    pub(crate) fn step_with_buffers(
        &self,
        buffers: &StagingBuffers,
        t: u64,
        state: AdamWTensors,
        gradient: &Tensor,
        factor: f32,
        window: usize,
    ) -> Result<()> {
        let n = check_lengths(state, gradient)?;
        let windows = windows(n, half_window(window));
        let moments = [state.m, state.v].map(|tensor| PagedVector { tensor, is_changed: true });
        let ranges = |number: usize| vec![windows[number].clone(); 2];
        buffers.for_each(&moments, windows.len(), ranges, |number, moments| {
            let range = &windows[number];
            let part = |vector: &Tensor| vector.narrow(0, range.start, range.len());
            let [m, v] = moments else { candle_core::bail!("AdamW has two moments") };
            self.step(t, AdamWTensors { params: &part(state.params)?, m, v }, &part(gradient)?, factor)
        })
    }

    pub(crate) fn coefficients(&self, t: u64, factor: f32) -> Coefficients {
        let power = t.min(i32::MAX as u64) as i32;
        Coefficients {
            factor,
            beta1: self.beta1 as f32,
            one_minus_beta1: (1.0 - self.beta1) as f32,
            beta2: self.beta2 as f32,
            one_minus_beta2: (1.0 - self.beta2) as f32,
            sqrt_bias_correction2: (1.0 - self.beta2.powi(power)).sqrt() as f32,
            eps: self.eps as f32,
            decay: (1.0 - self.lr * self.weight_decay) as f32,
            step_size: (self.lr / (1.0 - self.beta1.powi(power))) as f32,
        }
    }
}

/// Allocates buffers for both moments of [`AdamW::step_with_buffers`] on the parameters' device.
pub(crate) fn buffers(state: AdamWTensors, window: usize) -> Result<StagingBuffers> {
    StagingBuffers::new(
        &[state.m, state.v].map(|moment| (moment, half_window(window))),
        state.params.device(),
    )
}

/// Checks that all vectors have the same length and returns it: the number of parameters.
fn check_lengths(AdamWTensors { params, m, v }: AdamWTensors, gradient: &Tensor) -> Result<usize> {
    let n = params.dims1()?;
    if [m, v, gradient].iter().any(|x| x.dims() != [n]) {
        candle_core::bail!(
            "AdamW: {n} parameters with moments {:?} and {:?} and gradient {:?}; the lengths must be equal",
            m.shape(),
            v.shape(),
            gradient.shape()
        );
    }
    Ok(n)
}

/// The coefficients of a step, equal for all elements and computed once, in f64.
#[derive(Clone, Copy)]
pub(crate) struct Coefficients {
    pub(crate) factor: f32,
    pub(crate) beta1: f32,
    pub(crate) one_minus_beta1: f32,
    pub(crate) beta2: f32,
    pub(crate) one_minus_beta2: f32,
    pub(crate) sqrt_bias_correction2: f32,
    pub(crate) eps: f32,
    pub(crate) decay: f32,
    pub(crate) step_size: f32,
}

/// The factor of `torch.nn.utils.clip_grad_norm_`: `min(1, max_norm / (norm + 1e-6))`; 1 if
/// `max_norm` is 0.
pub fn clip_factor(norm: f64, max_norm: f64) -> f32 {
    if max_norm == 0.0 { 1.0 } else { (max_norm / (norm + 1e-6)).min(1.0) as f32 }
}
