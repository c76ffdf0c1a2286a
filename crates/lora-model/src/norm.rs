//! RMSNorm or LayerNorm with frozen parameters, of the residual stream, or of queries, keys and
//! values.

use candle_core::Tensor;
pub(crate) use lora_ops::norm::NormActivations;
use lora_ops::norm::{self, NormParams};
use lora_ops::transfer::{from_vec, to_vec};
use lora_spec::{NormKind, NormModule};

use crate::ModelError;
use crate::weight_source::WeightSource;

/// A norm.
#[derive(Debug)]
pub(crate) struct Norm {
    /// Full name, such as `model.layers.0.input_layernorm`.
    name: String,
    kind: NormKind,
    weight: Factors,
    bias: Option<Factors>,
    eps: f64,
}

/// Factors of the features, or what is added to them, `[features]`, f32.
#[derive(Debug)]
struct Factors {
    /// The tensor in the base's files, if there is one.
    stored: Option<Tensor>,
    /// What the norm computes with.
    values: Tensor,
}

impl Factors {
    /// Reads a tensor, and computes `scale (stored + offset)`.
    fn load(name: &str, offset: f64, scale: f64, weights: &impl WeightSource) -> Result<Self, ModelError> {
        let stored = weights.vector(name)?;
        let values = if offset == 0.0 && scale == 1.0 {
            stored.clone()
        } else {
            let on_cpu = to_vec::<f32>(&stored)?.into_iter();
            let values = on_cpu.map(|w| ((f64::from(w) + offset) * scale) as f32);
            from_vec(values.collect(), stored.shape(), stored.device())?
        };
        Ok(Self { stored: Some(stored), values })
    }

    fn bytes(&self) -> usize {
        let is_copied = self.stored.as_ref().is_some_and(|stored| stored.id() != self.values.id());
        4 * if is_copied { 2 } else { 1 } * self.values.elem_count()
    }
}

impl Norm {
    pub(crate) fn load(module: &NormModule, weights: &impl WeightSource) -> Result<Self, ModelError> {
        let NormModule { name, kind, features, has_weight, has_bias, eps, offset, scale } = module;
        let weight = match has_weight {
            true => Factors::load(&format!("{name}.weight"), *offset, *scale, weights)?,
            false => {
                let values = from_vec(vec![*scale as f32; *features], *features, weights.device())?;
                Factors { stored: None, values }
            }
        };
        let bias = has_bias.then(|| Factors::load(&format!("{name}.bias"), 0.0, *scale, weights));
        Ok(Self { name: name.clone(), kind: *kind, weight, bias: bias.transpose()?, eps: *eps })
    }

    /// Returns the size of the parameters in bytes.
    pub(crate) fn bytes(&self) -> usize {
        self.weight.bytes() + self.bias.as_ref().map_or(0, Factors::bytes)
    }

    /// Iterates over the tensors in the base's files, with their names.
    pub(crate) fn tensors(&self) -> impl Iterator<Item = (String, Tensor)> {
        let bias = self.bias.as_ref().and_then(|bias| bias.stored.as_ref());
        let parts = [("weight", self.weight.stored.as_ref()), ("bias", bias)];
        parts
            .into_iter()
            .filter_map(|(part, tensor)| Some((format!("{}.{part}", self.name), tensor?.clone())))
    }

    /// Normalizes `x` `[tokens, features]`.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<(Tensor, NormActivations), ModelError> {
        Ok(norm::forward(x, self.params())?)
    }

    /// Views `x` `[tokens, groups * features]` as `[tokens * groups, features]`: each group of
    /// features, such as a head, is normalized on its own.
    pub(crate) fn groups(&self, x: &Tensor) -> Result<Tensor, ModelError> {
        Ok(x.reshape(((), self.weight.values.elem_count()))?)
    }

    /// Adds `residual` to `x`, both `[tokens, features]`, in place, and returns the normalized sum.
    pub(crate) fn add_forward(
        &self,
        x: &Tensor,
        residual: &Tensor,
    ) -> Result<(Tensor, NormActivations), ModelError> {
        Ok(norm::add_forward(x, residual, self.params())?)
    }

    /// Recomputes the output of the forward pass over `x`.
    pub(crate) fn recompute(&self, saved: &NormActivations, x: &Tensor) -> Result<Tensor, ModelError> {
        Ok(norm::recompute(saved, x, self.params())?)
    }

    /// Returns the gradient of `x` from that of the output, plus `residual`: the gradient that
    /// reaches `x` on other paths than through the norm.
    pub(crate) fn backward(
        &self,
        saved: &NormActivations,
        x: &Tensor,
        dy: &Tensor,
        residual: Option<&Tensor>,
    ) -> Result<Tensor, ModelError> {
        Ok(norm::backward(saved, x, self.params(), dy, residual)?)
    }

    fn params(&self) -> NormParams<'_> {
        let bias = self.bias.as_ref().map(|bias| &bias.values);
        NormParams { kind: self.kind, weight: &self.weight.values, bias, eps: self.eps }
    }
}
