//! Projections of the same input whose outputs belong together: queries, keys and values, or the
//! gate and the gated values of an MLP.

use candle_core::Tensor;
use lora_ops::columns;
use lora_ops::lora::LoraActivations;
use lora_spec::LinearModule;

use crate::pass::Pass;
use crate::projection::{Linear, Projection};
use crate::weight_source::WeightSource;
use crate::{Gradients, ModelError};

/// Linear modules over the same input with several outputs: a module for each of them, or one
/// module whose output is all of them side by side.
#[derive(Debug)]
pub(crate) struct SplitProjection {
    pub(crate) modules: Vec<Linear>,
    /// Widths of the outputs.
    widths: Vec<usize>,
}

/// Outputs `[tokens, width]`, and the activations of the modules' adapters.
pub(crate) struct Parts {
    pub(crate) y: Vec<Tensor>,
    lora: Vec<Option<LoraActivations>>,
}

impl SplitProjection {
    pub(crate) fn load(
        modules: &[LinearModule],
        widths: Vec<usize>,
        weights: &impl WeightSource,
    ) -> Result<Self, ModelError> {
        let modules = modules.iter().map(|module| Linear::load(module, weights)).collect::<Result<_, _>>()?;
        Ok(Self { modules, widths })
    }

    /// Returns whether a module has an adapter in `pass`.
    pub(crate) fn is_trained(&self, pass: &Pass) -> bool {
        self.modules.iter().any(|module| pass.projection(module).is_trained())
    }

    /// Computes the outputs for `x` `[tokens, in_features]`.
    pub(crate) fn forward(&self, x: &Tensor, pass: &Pass) -> Result<Parts, ModelError> {
        let mut y = Vec::with_capacity(self.widths.len());
        let mut lora = Vec::with_capacity(self.modules.len());
        for module in &self.modules {
            let projected = pass.projection(module).forward(x)?;
            y.push(projected.y);
            lora.push(projected.lora);
        }
        if let [all] = y.as_slice()
            && self.widths.len() > 1
        {
            y = columns::split(all, &self.widths)?;
        }
        Ok(Parts { y, lora })
    }

    /// The backward pass from the gradients of the outputs: adds the gradients of the adapters to
    /// `grads` and returns the gradient of the input if `need_dx` is set. `x` returns the input; it
    /// is called if a module is trained.
    pub(crate) fn backward(
        &self,
        saved: &Parts,
        dy: Vec<Tensor>,
        x: impl FnOnce() -> Result<Tensor, ModelError>,
        pass: &Pass,
        grads: &Gradients,
        need_dx: bool,
    ) -> Result<Option<Tensor>, ModelError> {
        let gradients: Vec<Tensor> = if self.modules.len() == self.widths.len() {
            dy
        } else {
            let joined = columns::join(&dy)?;
            drop(dy);
            vec![joined]
        };
        let outputs = self.modules.iter().zip(&saved.lora).zip(&gradients);
        let outputs: Vec<_> =
            outputs.map(|((module, lora), dy)| pass.projection(module).output_grad(lora, dy)).collect();
        Projection::backward(&outputs, x, grads, need_dx)
    }
}
