//! AdamW (arXiv 1711.05101), equal to `torch.optim.AdamW`: decay first, bias correction as torch applies it.

use candle_core::{Result, Tensor};

use crate::paged::{Buffers, Vector, half, windows};
use crate::place::Place;

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;

/// Settings of one step.
#[derive(Debug, Clone, Copy)]
pub struct AdamW {
    /// Learning rate of this step.
    pub lr: f64,
    /// First decay rate.
    pub beta1: f64,
    /// Second decay rate.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
}

/// Parameters and moments: f32 vectors, equally long, each of a storage of its own.
#[derive(Debug, Clone, Copy)]
pub struct State<'a> {
    /// Parameters.
    pub params: &'a Tensor,
    /// First moments.
    pub m: &'a Tensor,
    /// Second moments.
    pub v: &'a Tensor,
}

impl AdamW {
    /// Step number `t` (from 1) with `gradient * factor`, in place; `factor` carries clipping.
    #[tracing::instrument(level = "trace", name = "adamw", skip_all)]
    pub fn step(&self, t: u64, state: State, gradient: &Tensor, factor: f32) -> Result<()> {
        check_lengths(state, gradient)?;
        let State { params, m, v } = state;
        let numbers = self.numbers(t, factor);
        match Place::of(&[params, m, v, gradient])? {
            Place::Cpu => cpu::step(&numbers, state, gradient),
            #[cfg(feature = "cuda")]
            Place::Cuda(gpu) => cuda::step(&gpu, &numbers, state, gradient),
        }
    }

    /// As [`Self::step`], to the same bits, with at most `window` elements of each moment (but two at least)
    /// where the parameters are: of parameters on a GPU the moments may be in the host's memory.
    pub fn step_paged(
        &self,
        t: u64,
        state: State,
        gradient: &Tensor,
        factor: f32,
        window: usize,
    ) -> Result<()> {
        let buffers = buffers(state, window)?;
        self.step_in(&buffers, t, state, gradient, factor, window)
    }

    /// A step in `buffers`, which were made for moments that lie where these do, and are no shorter.
    pub(crate) fn step_in(
        &self,
        buffers: &Buffers,
        t: u64,
        state: State,
        gradient: &Tensor,
        factor: f32,
        window: usize,
    ) -> Result<()> {
        let n = check_lengths(state, gradient)?;
        let windows = windows(n, half(window));
        let moments = [state.m, state.v].map(|tensor| Vector { tensor, is_changed: true });
        let ranges = |number: usize| vec![windows[number].clone(); 2];
        buffers.for_each(&moments, windows.len(), ranges, |number, moments| {
            let range = &windows[number];
            let part = |vector: &Tensor| vector.narrow(0, range.start, range.len());
            let [m, v] = moments else { candle_core::bail!("AdamW has two moments") };
            self.step(t, State { params: &part(state.params)?, m, v }, &part(gradient)?, factor)
        })
    }

    pub(crate) fn numbers(&self, t: u64, factor: f32) -> Numbers {
        let power = t.min(i32::MAX as u64) as i32;
        Numbers {
            factor,
            beta1: self.beta1 as f32,
            rest1: (1.0 - self.beta1) as f32,
            beta2: self.beta2 as f32,
            rest2: (1.0 - self.beta2) as f32,
            correction2: (1.0 - self.beta2.powi(power)).sqrt() as f32,
            eps: self.eps as f32,
            decay: (1.0 - self.lr * self.weight_decay) as f32,
            step_size: (self.lr / (1.0 - self.beta1.powi(power))) as f32,
        }
    }
}

/// Buffers for both moments of [`AdamW::step_in`], where the parameters are.
pub(crate) fn buffers(state: State, window: usize) -> Result<Buffers> {
    Buffers::new(&[state.m, state.v].map(|moment| (moment, half(window))), state.params.device())
}

/// The number of parameters.
fn check_lengths(State { params, m, v }: State, gradient: &Tensor) -> Result<usize> {
    let n = params.dims1()?;
    if [m, v, gradient].iter().any(|x| x.dims() != [n]) {
        candle_core::bail!(
            "AdamW: {n} parameters with moments {:?} and {:?} and gradient {:?}",
            m.shape(),
            v.shape(),
            gradient.shape()
        );
    }
    Ok(n)
}

/// What a step does to every element: computed once, in f64.
pub(crate) struct Numbers {
    pub(crate) factor: f32,
    pub(crate) beta1: f32,
    pub(crate) rest1: f32,
    pub(crate) beta2: f32,
    pub(crate) rest2: f32,
    pub(crate) correction2: f32,
    pub(crate) eps: f32,
    pub(crate) decay: f32,
    pub(crate) step_size: f32,
}

/// The factor of `torch.nn.utils.clip_grad_norm_`: `min(1, max_norm / (norm + 1e-6))`; 1 where `max_norm` is 0.
pub fn clip_factor(norm: f64, max_norm: f64) -> f32 {
    if max_norm == 0.0 { 1.0 } else { (max_norm / (norm + 1e-6)).min(1.0) as f32 }
}
