//! AdamW (arXiv 1711.05101), equal to `torch.optim.AdamW`: decay comes first, and the bias is
//! corrected as torch corrects it.

use candle_core::{DType, Result, Tensor};

use crate::backend::Backend;
use crate::paged::{MomentPlacement, PagedVector, PinnedTensor, StagingBuffers, half_window, windows};
use crate::transfer::{to_device, zeros};

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;

/// Settings of AdamW, except the learning rate, which changes from step to step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWSettings {
    /// Decay rate of the first moment.
    pub beta1: f64,
    /// Decay rate of the second moment.
    pub beta2: f64,
    /// Added to the square root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
}

impl AdamWSettings {
    /// Returns the coefficients of step number `t` (from 1) with the learning rate `lr`. The
    /// gradient is multiplied by `factor`, the clipping factor, before anything else.
    pub fn coefficients(&self, lr: f64, t: u64, factor: f32) -> Coefficients {
        let power = t.min(i32::MAX as u64) as i32;
        Coefficients {
            factor,
            beta1: self.beta1 as f32,
            one_minus_beta1: (1.0 - self.beta1) as f32,
            beta2: self.beta2 as f32,
            one_minus_beta2: (1.0 - self.beta2) as f32,
            sqrt_bias_correction2: (1.0 - self.beta2.powi(power)).sqrt() as f32,
            eps: self.eps as f32,
            decay: (1.0 - lr * self.weight_decay) as f32,
            step_size: (lr / (1.0 - self.beta1.powi(power))) as f32,
        }
    }
}

/// The coefficients of a step, equal for all elements and computed once, in f64.
#[derive(Debug, Clone, Copy)]
pub struct Coefficients {
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

/// Updates parameters and moments in place with a gradient of the same length.
#[tracing::instrument(level = "trace", name = "adamw", skip_all)]
pub fn step(coefficients: &Coefficients, state: AdamWTensors, gradient: &Tensor) -> Result<()> {
    check_lengths(state, gradient)?;
    let AdamWTensors { params, m, v } = state;
    match Backend::of_tensors(&[params, m, v, gradient])? {
        Backend::Cpu => cpu::step(coefficients, state, gradient),
        #[cfg(feature = "cuda")]
        Backend::Cuda(gpu) => cuda::step(&gpu, coefficients, state, gradient),
    }
}

/// Does the same as [`step`], bit for bit, with at most `window` elements of each moment (at least
/// two) on the parameters' device at a time: the moments of parameters on a GPU may be in the
/// host's memory.
pub fn step_in_windows(
    coefficients: &Coefficients,
    state: AdamWTensors,
    gradient: &Tensor,
    window: usize,
) -> Result<()> {
    step_with_buffers(&buffers(state, window)?, coefficients, state, gradient, window)
}

/// Makes a step through `buffers`, which must have been allocated for moments on the same device as
/// these and at least as long.
pub(crate) fn step_with_buffers(
    buffers: &StagingBuffers,
    coefficients: &Coefficients,
    state: AdamWTensors,
    gradient: &Tensor,
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
        step(coefficients, AdamWTensors { params: &part(state.params)?, m, v }, &part(gradient)?)
    })
}

/// Names of the f32 moments, as in torch.
const NAMES: [&str; 2] = ["exp_avg", "exp_avg_sq"];

/// Both moments in f32.
#[derive(Debug)]
pub(crate) struct F32Moments {
    m: Tensor,
    v: Tensor,
    /// Elements of each moment that are on the parameters' device at a time.
    window: usize,
    _pinned: Vec<PinnedTensor>,
}

impl F32Moments {
    /// Creates moments of zero for `len` parameters.
    pub(crate) fn zeros(len: usize, placement: MomentPlacement) -> Result<Self> {
        Self::from_parts(placement, |_| zeros(len, DType::F32, placement.moment_device()))
    }

    /// Creates moments for `len` parameters from the tensors that `find` returns by their names.
    /// Steps may change these tensors.
    ///
    /// # Errors
    /// Those of `find`; a tensor that is not f32 of this length.
    pub(crate) fn from_tensors(
        len: usize,
        placement: MomentPlacement,
        mut find: impl FnMut(&str) -> Result<Tensor>,
    ) -> Result<Self> {
        Self::from_parts(placement, |name| {
            let tensor = find(name)?;
            if tensor.dtype() != DType::F32 || tensor.dims() != [len] {
                candle_core::bail!("{name} is not f32 [{len}]");
            }
            to_device(&tensor, placement.moment_device())
        })
    }

    fn from_parts(
        placement: MomentPlacement,
        mut part: impl FnMut(&'static str) -> Result<Tensor>,
    ) -> Result<Self> {
        let (m, v) = (part(NAMES[0])?, part(NAMES[1])?);
        let mut pinned = Vec::new();
        for moment in [&m, &v] {
            pinned.extend(placement.pin(moment)?);
        }
        Ok(Self { m, v, window: placement.window(), _pinned: pinned })
    }

    /// Returns the tensors with their names.
    pub(crate) fn tensors(&self) -> [(&'static str, &Tensor); 2] {
        [(NAMES[0], &self.m), (NAMES[1], &self.v)]
    }

    /// Updates `params` and the moments.
    pub(crate) fn step(&self, coefficients: &Coefficients, params: &Tensor, gradient: &Tensor) -> Result<()> {
        let state = AdamWTensors { params, m: &self.m, v: &self.v };
        step_in_windows(coefficients, state, gradient, self.window)
    }
}

/// Allocates buffers for both moments of [`step_with_buffers`] on the parameters' device.
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

/// The factor of `torch.nn.utils.clip_grad_norm_`: `min(1, max_norm / (norm + 1e-6))`; 1 if
/// `max_norm` is 0.
pub fn clip_factor(norm: f64, max_norm: f64) -> f32 {
    if max_norm == 0.0 { 1.0 } else { (max_norm / (norm + 1e-6)).min(1.0) as f32 }
}
