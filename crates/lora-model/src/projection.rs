//! Linear modules: the frozen weight that all jobs on a base share, and the view of a pass that
//! adds an adapter to it.

use candle_core::Tensor;
use lora_ops::dropout::Dropout;
use lora_ops::linear::FrozenLinear;
use lora_ops::lora::{self, LoraActivations};
use lora_spec::LinearModule;

use crate::adapter::AdapterTerms;
use crate::weight_source::WeightSource;
use crate::{Gradients, ModelError};

/// A frozen linear module.
#[derive(Debug)]
pub(crate) struct Linear {
    /// Full name, such as `model.layers.0.self_attn.q_proj`.
    pub(crate) name: String,
    pub(crate) frozen: FrozenLinear,
}

impl Linear {
    pub(crate) fn load(module: &LinearModule, weights: &impl WeightSource) -> Result<Self, ModelError> {
        let bias = module.bias.then(|| weights.vector(&format!("{}.bias", module.name))).transpose()?;
        Ok(Self { name: module.name.clone(), frozen: FrozenLinear::new(weights.weight(module)?, bias)? })
    }
}

/// A linear module in one pass: `y = x W0^T + b - s x A0^T B0^T + s dropout(x) A^T B^T`.
pub(crate) struct Projection<'a> {
    linear: &'a Linear,
    adapter: Option<AdapterTerms<'a>>,
    /// The mask of the trained term's input.
    dropout: Option<Dropout>,
}

/// The output of a projection `[tokens, out_features]`, and the activations of its adapter.
pub(crate) struct Projected {
    pub(crate) y: Tensor,
    pub(crate) lora: Option<LoraActivations>,
}

/// The gradient of a projection's output, from which the backward pass of the projection starts.
pub(crate) struct OutputGrad<'a> {
    projection: Projection<'a>,
    lora: Option<&'a LoraActivations>,
    dy: &'a Tensor,
}

impl<'a> Projection<'a> {
    pub(crate) fn new(
        linear: &'a Linear,
        adapter: Option<AdapterTerms<'a>>,
        dropout: Option<Dropout>,
    ) -> Self {
        Self { linear, adapter, dropout }
    }

    /// Returns whether the projection has an adapter.
    pub(crate) fn is_trained(&self) -> bool {
        self.adapter.is_some()
    }

    /// Computes the projection of `x` `[tokens, in_features]`.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Projected, ModelError> {
        let y = self.linear.frozen.forward(x)?;
        let Some(AdapterTerms { trained, initial, scaling }) = self.adapter else {
            return Ok(Projected { y, lora: None });
        };
        if let Some(initial) = initial {
            lora::forward(x, initial, -scaling, None, &y)?;
        }
        let lora = lora::forward(x, trained, scaling, self.dropout.as_ref(), &y)?;
        Ok(Projected { y, lora: Some(lora) })
    }

    /// Recomputes only the activations of the adapter. `x` is called if there is an adapter.
    pub(crate) fn recompute(
        &self,
        x: impl FnOnce() -> Result<Tensor, ModelError>,
    ) -> Result<Option<LoraActivations>, ModelError> {
        let Some(AdapterTerms { trained, .. }) = self.adapter else { return Ok(None) };
        Ok(Some(lora::recompute(&x()?, trained, self.dropout.as_ref())?))
    }

    /// Returns the start of the backward pass from `dy` `[tokens, out_features]`. `lora` are the
    /// activations of the forward pass.
    pub(crate) fn output_grad(self, lora: &'a Option<LoraActivations>, dy: &'a Tensor) -> OutputGrad<'a> {
        OutputGrad { projection: self, lora: lora.as_ref(), dy }
    }

    /// The backward pass of projections of the same input: adds the gradients of their adapters to
    /// `grads` and returns the gradient of the input `[tokens, in_features]` if `need_dx` is set.
    /// `x` returns the input; it is called if a projection is trained.
    pub(crate) fn backward(
        outputs: &[OutputGrad],
        x: impl FnOnce() -> Result<Tensor, ModelError>,
        grads: &Gradients,
        need_dx: bool,
    ) -> Result<Option<Tensor>, ModelError> {
        let mut dx = None;
        if need_dx {
            for output in outputs {
                match &dx {
                    None => dx = Some(output.frozen_input_grad()?),
                    Some(dx) => output.add_frozen_input_grad(dx)?,
                }
            }
        }
        if outputs.iter().any(|output| output.projection.is_trained()) {
            let x = x()?;
            for output in outputs {
                output.adapter_backward(&x, grads, dx.as_ref())?;
            }
        }
        Ok(dx)
    }
}

impl OutputGrad<'_> {
    /// Returns the gradient of the input through the frozen weight and the initial adapter.
    fn frozen_input_grad(&self) -> Result<Tensor, ModelError> {
        let dx = self.projection.linear.frozen.backward(self.dy)?;
        self.subtract_initial(&dx)?;
        Ok(dx)
    }

    /// Adds the gradient of the input through the frozen weight and the initial adapter to `dx`.
    fn add_frozen_input_grad(&self, dx: &Tensor) -> Result<(), ModelError> {
        self.projection.linear.frozen.backward_add(self.dy, dx)?;
        self.subtract_initial(dx)
    }

    fn subtract_initial(&self, dx: &Tensor) -> Result<(), ModelError> {
        match self.projection.adapter {
            Some(AdapterTerms { initial: Some(initial), scaling, .. }) => {
                Ok(lora::backward_frozen(initial, -scaling, self.dy, dx)?)
            }
            _ => Ok(()),
        }
    }

    /// Adds the gradients of the adapter to `grads`, and the gradient of the input through the
    /// adapter to `dx`.
    fn adapter_backward(&self, x: &Tensor, grads: &Gradients, dx: Option<&Tensor>) -> Result<(), ModelError> {
        let Projection { linear, adapter, dropout } = &self.projection;
        let grad = grads.pair(&linear.name);
        if let (Some(lora), Some(AdapterTerms { trained, scaling, .. }), Some(grad)) =
            (self.lora, adapter, grad)
        {
            lora::backward(lora, x, trained, *scaling, dropout.as_ref(), self.dy, grad, dx)?;
        }
        Ok(())
    }
}
