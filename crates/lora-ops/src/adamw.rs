//! AdamW (arXiv 1711.05101), equal to `torch.optim.AdamW`: decay first, bias correction as torch applies it.

use candle_core::{Result, Tensor};

use crate::paged::Room;
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

    /// As [`Self::step`], to the same bits, `window` elements at a time (at least one): of parameters on a GPU the moments may be
    /// in the host's memory.
    pub fn step_paged(
        &self,
        t: u64,
        state: State,
        gradient: &Tensor,
        factor: f32,
        window: usize,
    ) -> Result<()> {
        let rooms = Rooms::new(state, window)?;
        self.step_in(&rooms, t, state, gradient, factor)
    }

    /// A step in `rooms`, which were made for moments that lie where these do.
    pub(crate) fn step_in(
        &self,
        rooms: &Rooms,
        t: u64,
        state: State,
        gradient: &Tensor,
        factor: f32,
    ) -> Result<()> {
        let n = check_lengths(state, gradient)?;
        for first in (0..n).step_by(rooms.window) {
            let part = |vector: &Tensor| vector.narrow(0, first, rooms.window.min(n - first));
            let (params, m, v) = (part(state.params)?, part(state.m)?, part(state.v)?);
            let (m_copy, v_copy) = (rooms.m.load(&m)?, rooms.v.load(&v)?);
            self.step(t, State { params: &params, m: &m_copy, v: &v_copy }, &part(gradient)?, factor)?;
            rooms.m.store(&m_copy, &m)?;
            rooms.v.store(&v_copy, &v)?;
        }
        Ok(())
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

/// Room for a window of both moments where the parameters are. It is all there before a step begins: a step is not left half done
/// for want of memory.
pub(crate) struct Rooms {
    window: usize,
    m: Room,
    v: Room,
}

impl Rooms {
    pub(crate) fn new(state: State, window: usize) -> Result<Self> {
        let window = window.max(1);
        let room = |vector| Room::new(vector, window, state.params.device());
        Ok(Self { window, m: room(state.m)?, v: room(state.v)? })
    }
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
