//! The verbs of training: forward and backward, reduction, optimizer step. What to compute when is [`crate::Run`]'s.

use std::ops::Range;
use std::sync::Arc;

use lora_collective::Group;
use lora_collective::tree::TreeAccumulator;
use lora_model::{Adapter, Base, Batch, Gradients, Loss, Pass, forward_backward, loss};
use lora_ops::adamw::{self, AdamW, clip_factor};
use lora_ops::reduce::{scale, sum_of_squares};
use lora_ops::{read_f32, update_f32};
use xxhash_rust::xxh3::Xxh3;

use crate::TrainError;

/// Sum of the weighted losses of a micro-batch, and of the weights.
pub type LossSums = (f64, f64);

/// An adapter in training over a frozen base, with its optimizer.
pub struct Engine {
    base: Arc<Base>,
    adapter: Adapter,
    /// AdamW's moments, in the adapter's layout.
    pub(crate) m: Vec<f32>,
    pub(crate) v: Vec<f32>,
    /// AdamW's `t`: optimizer steps so far.
    pub(crate) updates: u64,
    gradients: Gradients,
    accumulator: TreeAccumulator,
    reduced: Vec<f32>,
}

impl Engine {
    /// An engine before its first step.
    pub fn new(base: Arc<Base>, adapter: Adapter) -> Result<Self, TrainError> {
        let len = adapter.layout().len;
        Ok(Self {
            gradients: Gradients::zeros(adapter.layout())?,
            accumulator: TreeAccumulator::new(len),
            reduced: vec![0.0; len],
            m: vec![0.0; len],
            v: vec![0.0; len],
            updates: 0,
            base,
            adapter,
        })
    }

    /// The frozen base.
    pub fn base(&self) -> &Arc<Base> {
        &self.base
    }

    /// The adapter as it is now.
    pub fn adapter(&self) -> &Adapter {
        &self.adapter
    }

    /// Replaces parameters and moments, all in the adapter's layout.
    pub(crate) fn set(
        &mut self,
        params: Vec<f32>,
        m: Vec<f32>,
        v: Vec<f32>,
        updates: u64,
    ) -> Result<(), TrainError> {
        let layout = self.adapter.layout().clone();
        self.adapter = Adapter::from_params(layout, params, self.adapter.scaling())?;
        (self.m, self.v, self.updates) = (m, v, updates);
        Ok(())
    }

    /// Begins a step of `leaves` micro-batches, of which this rank computes `range`.
    pub fn start(&mut self, leaves: usize, range: Range<usize>) -> Result<(), TrainError> {
        Ok(self.accumulator.start(leaves, range)?)
    }

    /// The step's next micro-batch: its unnormalized gradient is accumulated. Returns its losses, and what of them or
    /// of the gradient is not finite, if anything.
    pub fn forward_backward(
        &mut self,
        batch: Batch,
        pass: Pass,
    ) -> Result<(LossSums, Option<String>), TrainError> {
        update_f32(self.gradients.flat(), |flat| flat.fill(0.0))?;
        let Loss { loss_sum, weight_sum, .. } =
            forward_backward(&self.base, &self.adapter, &self.gradients, batch, pass)?;
        let mut leaf = self.accumulator.buffer();
        read_f32(self.gradients.flat(), |flat| leaf.copy_from_slice(flat))?;
        let not_finite = self.first_not_finite(loss_sum, &leaf);
        self.accumulator.push(leaf)?;
        Ok(((loss_sum, weight_sum), not_finite))
    }

    /// Sums the gradients of all ranks and divides them by `weight_sum`; returns the 2-norm of the mean gradient.
    /// `ranges`: the micro-batches of each rank. `None`: the sum is not wanted, the step is dropped.
    pub fn reduce(
        &mut self,
        group: &mut Group,
        leaves: usize,
        ranges: &[Range<usize>],
        weight_sum: Option<f64>,
    ) -> Result<Option<f64>, TrainError> {
        let nodes = self.accumulator.finish()?;
        let norm = match weight_sum {
            None => None,
            Some(weight_sum) => {
                group.all_reduce_tree(leaves, ranges, &nodes, &mut self.reduced)?;
                scale(&mut self.reduced, (1.0 / weight_sum) as f32);
                Some(sum_of_squares(&self.reduced).sqrt())
            }
        };
        self.accumulator.recycle(nodes);
        Ok(norm)
    }

    /// AdamW on the reduced gradient, clipped from `grad_norm` to `max_grad_norm` (0: not clipped).
    pub fn optim_step(&mut self, adamw: AdamW, grad_norm: f64, max_grad_norm: f64) -> Result<(), TrainError> {
        let factor = clip_factor(grad_norm, max_grad_norm);
        self.updates += 1;
        let Self { adapter, m, v, updates, reduced, .. } = self;
        Ok(update_f32(adapter.params(), |params| {
            adamw.step(*updates, adamw::State { params, m, v }, reduced, factor);
        })?)
    }

    /// Losses of a micro-batch under the current adapter, without dropout.
    pub fn eval(&self, batch: Batch) -> Result<LossSums, TrainError> {
        let Loss { loss_sum, weight_sum, .. } = loss(&self.base, Some(&self.adapter), batch)?;
        Ok((loss_sum, weight_sum))
    }

    /// Hash of parameters and moments (XXH3, 128 bits), in hex.
    pub fn state_hash(&self) -> Result<String, TrainError> {
        let mut hasher = Xxh3::new();
        let mut add = |values: &[f32]| hasher.update(bytemuck::cast_slice(values));
        read_f32(self.adapter.params(), &mut add)?;
        add(&self.m);
        add(&self.v);
        Ok(format!("{:032x}", hasher.digest128()))
    }

    fn first_not_finite(&self, loss_sum: f64, gradient: &[f32]) -> Option<String> {
        if !loss_sum.is_finite() {
            return Some("the loss".into());
        }
        if sum_of_squares(gradient).is_finite() {
            return None;
        }
        let at = gradient.iter().position(|g| !g.is_finite());
        Some(at.map_or("the norm of a gradient".into(), |at| {
            format!("the gradient of {}", self.adapter.layout().name_of(at))
        }))
    }
}
