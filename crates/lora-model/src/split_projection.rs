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

/// Linear modules over the same input, with `PARTS` outputs: a module for each of them, or one
/// module whose output is all of them side by side.
#[derive(Debug)]
pub(crate) struct SplitProjection<const PARTS: usize> {
    pub(crate) modules: Vec<Linear>,
    /// Widths of the outputs.
    widths: [usize; PARTS],
}

/// Outputs `[tokens, width]`, and the activations of the modules' adapters.
pub(crate) struct Parts<const PARTS: usize> {
    pub(crate) y: [Tensor; PARTS],
    lora: Vec<Option<LoraActivations>>,
}

impl<const PARTS: usize> SplitProjection<PARTS> {
    pub(crate) fn load(
        modules: &[LinearModule],
        widths: [usize; PARTS],
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
    pub(crate) fn forward(&self, x: &Tensor, pass: &Pass) -> Result<Parts<PARTS>, ModelError> {
        let mut outputs = Vec::with_capacity(PARTS);
        let mut lora = Vec::with_capacity(self.modules.len());
        for module in &self.modules {
            let projected = pass.projection(module).forward(x)?;
            outputs.push(projected.y);
            lora.push(projected.lora);
        }
        let y = match <[Tensor; PARTS]>::try_from(outputs) {
            Ok(y) => y,
            // One module computed all of them.
            Err(outputs) => {
                let all = outputs.first().ok_or_else(|| candle_core::Error::Msg("no projection".into()))?;
                columns::split(all, self.widths)?
            }
        };
        Ok(Parts { y, lora })
    }

    /// The backward pass from the gradients of the outputs: adds the gradients of the adapters to
    /// `grads` and returns the gradient of the input if `need_dx` is set. `x` returns the input; it
    /// is called if a module is trained.
    pub(crate) fn backward(
        &self,
        saved: &Parts<PARTS>,
        dy: [Tensor; PARTS],
        x: impl FnOnce() -> Result<Tensor, ModelError>,
        pass: &Pass,
        grads: &Gradients,
        need_dx: bool,
    ) -> Result<Option<Tensor>, ModelError> {
        let gradients: Vec<Tensor> = if self.modules.len() == PARTS {
            dy.into()
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
