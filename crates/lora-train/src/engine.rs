//! The operations of training. [`crate::Run`] decides which of them run when.
//!
//! A step is a sequence of three values, each of which consumes the one before:
//! [`GradientAccumulation`] runs the micro-batches of this rank, [`AccumulatedGradients`] has their
//! losses and gradients, and [`ReducedGradients`] has the mean gradient of all ranks and updates
//! the parameters. Nothing else changes parameters, except a restored checkpoint.

mod accumulated_gradients;
mod gradient_accumulation;
mod reduced_gradients;

use std::sync::Arc;

use candle_core::{DType, Tensor};
use lora_collective::tree::TreeAccumulator;
use lora_model::{Adapter, Base, Gradients, loss};
use lora_ops::Optimizer;
use lora_ops::adamw::AdamWSettings;
use lora_ops::reduce::fingerprint;
use lora_ops::transfer::zeros;
use lora_spec::{MicroBatch, Optim};

pub use self::accumulated_gradients::AccumulatedGradients;
pub use self::gradient_accumulation::GradientAccumulation;
pub use self::reduced_gradients::ReducedGradients;
use crate::error::TrainError;

/// The sum of the weighted losses of a micro-batch, and the sum of the weights.
pub type LossSums = (f64, f64);

/// An adapter that is trained over a frozen base, with its optimizer.
pub struct Engine {
    base: Arc<Base>,
    adapter: Adapter,
    optimizer: Optimizer,
    /// Sums of this rank's gradients in the current step.
    accumulator: TreeAccumulator<Gradients>,
    /// Buffer for the sum of all ranks' gradients, f32, in the adapter's layout.
    sum_buffer: Tensor,
}

impl Engine {
    /// Creates an engine before its first step, on the device of the base.
    pub fn new(
        base: Arc<Base>,
        adapter: Adapter,
        optim: Optim,
        settings: AdamWSettings,
    ) -> Result<Self, TrainError> {
        let adapter = adapter.to_device_of(&base)?;
        let ranges = adapter.layout().tensors().map(|(_, _, range)| range).collect();
        Ok(Self {
            sum_buffer: zeros(adapter.layout().len, DType::F32, base.device())?,
            accumulator: TreeAccumulator::new(),
            optimizer: Optimizer::new(optim, settings, ranges, base.device())?,
            base,
            adapter,
        })
    }

    /// Returns the frozen base.
    pub fn base(&self) -> &Arc<Base> {
        &self.base
    }

    /// Returns the adapter in its current state.
    pub fn adapter(&self) -> &Adapter {
        &self.adapter
    }

    /// Returns the optimizer in its current state.
    pub(crate) fn optimizer(&self) -> &Optimizer {
        &self.optimizer
    }

    /// Replaces the parameters and moments. `params` is in the adapter's layout; for `initial` see
    /// [`Adapter::with_params`]; `find` returns each tensor of the moments by its name. On an error
    /// nothing changes.
    pub(crate) fn set_state(
        &mut self,
        params: Vec<f32>,
        initial: Option<Vec<f32>>,
        find: impl FnMut(&str) -> lora_ops::Result<Tensor>,
        updates: u64,
    ) -> Result<(), TrainError> {
        let optimizer = self.optimizer.restored(updates, find)?;
        let adapter = self.adapter.with_params(params, initial)?;
        (self.adapter, self.optimizer) = (adapter, optimizer);
        Ok(())
    }

    /// Returns the loss of a micro-batch with the current adapter, without dropout.
    pub fn eval(&self, batch: &MicroBatch) -> Result<LossSums, TrainError> {
        let loss = loss(&self.base, Some(&self.adapter), batch)?;
        Ok((loss.sum()?, loss.weight_sum))
    }

    /// Returns the hash of the parameters, the initial term and the moments: 128 bits in
    /// hexadecimal.
    pub fn state_hash(&self) -> Result<String, TrainError> {
        let moments = self.optimizer.tensors().into_iter().map(|(_, tensor)| tensor);
        let adapter = std::iter::once(self.adapter.params()).chain(self.adapter.initial());
        let parts: Vec<&Tensor> = adapter.chain(moments).collect();
        let [low, high] = fingerprint(&parts)?;
        Ok(format!("{high:016x}{low:016x}"))
    }
}
