//! The attention of a block, with its projections.

use candle_core::Tensor;
use lora_ops::attention::{self, AttentionShape};
use lora_ops::lora::LoraActivations;
use lora_spec::{AttentionConfig, Rope};

use crate::norm::Norm;
use crate::pass::Pass;
use crate::projection::{Linear, Projected, Projection};
use crate::rotary_heads::{RotaryActivations, RotaryHeads};
use crate::weight_source::WeightSource;
use crate::{Gradients, ModelError};

/// Grouped-query attention.
#[derive(Debug)]
pub(crate) struct Attention {
    queries: RotaryHeads,
    keys: RotaryHeads,
    v_proj: Linear,
    o_proj: Linear,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    scale: f32,
    pub(crate) sliding_window: Option<usize>,
}

/// Where the attended values of a pass come from.
pub(crate) enum AttentionSource<'a> {
    /// They are computed over the keys and values of the pass.
    Pass,
    /// They are computed over the keys and values of the cache and of the pass. The cache gets
    /// those of the pass.
    Cache(&'a mut KvCache),
    /// An earlier pass over the same input has computed them.
    Saved(AttendedValues),
}

/// Keys and values of all previous tokens, each `[tokens, kv_heads * head_dim]`.
#[derive(Debug, Default, Clone)]
pub(crate) struct KvCache {
    keys_values: Option<(Tensor, Tensor)>,
}

/// The input of `o_proj`.
pub(crate) struct AttendedValues {
    /// `[tokens, heads * head_dim]`.
    values: Tensor,
    /// What their backward pass needs in addition.
    saved: attention::AttentionActivations,
}

/// Intermediate results of the forward pass that the backward pass reads.
pub(crate) struct AttentionActivations {
    q: RotaryActivations,
    k: RotaryActivations,
    v: Projected,
    pub(crate) attended: AttendedValues,
    o: Option<LoraActivations>,
}

impl KvCache {
    /// Appends keys and values, and returns all of them.
    fn append(&mut self, k: Tensor, v: Tensor) -> Result<(Tensor, Tensor), ModelError> {
        let (k, v) = match self.keys_values.take() {
            Some((keys, values)) => (Tensor::cat(&[keys, k], 0)?, Tensor::cat(&[values, v], 0)?),
            None => (k, v),
        };
        self.keys_values = Some((k.clone(), v.clone()));
        Ok((k, v))
    }
}

impl Attention {
    pub(crate) fn load(config: &AttentionConfig, weights: &impl WeightSource) -> Result<Self, ModelError> {
        Ok(Self {
            queries: RotaryHeads::load(&config.q_proj, config.q_norm.as_ref(), config.rope, weights)?,
            keys: RotaryHeads::load(&config.k_proj, config.k_norm.as_ref(), config.rope, weights)?,
            v_proj: Linear::load(&config.v_proj, weights)?,
            o_proj: Linear::load(&config.o_proj, weights)?,
            heads: config.heads,
            kv_heads: config.kv_heads,
            head_dim: config.head_dim,
            scale: config.scale as f32,
            sliding_window: config.sliding_window,
        })
    }

    /// Returns the linear modules in the order of computation.
    pub(crate) fn linears(&self) -> [&Linear; 4] {
        [&self.queries.proj, &self.keys.proj, &self.v_proj, &self.o_proj]
    }

    /// The rotary embedding of queries and keys.
    pub(crate) fn rope(&self) -> Option<Rope> {
        self.queries.rope
    }

    /// Iterates over the norms of queries and keys.
    pub(crate) fn norms(&self) -> impl Iterator<Item = &Norm> {
        [&self.queries.norm, &self.keys.norm].into_iter().flatten()
    }

    /// Returns whether a projection has an adapter in `pass`.
    pub(crate) fn is_trained(&self, pass: &Pass) -> bool {
        self.linears().into_iter().any(|linear| pass.projection(linear).is_trained())
    }

    /// Returns the output for `x`, both `[tokens, hidden]`, and the activations.
    pub(crate) fn forward(
        &self,
        x: Tensor,
        pass: &Pass,
        source: AttentionSource,
    ) -> Result<(Tensor, AttentionActivations), ModelError> {
        let (queries, q) = self.queries.forward(&x, pass)?;
        let (keys, k) = self.keys.forward(&x, pass)?;
        let v = pass.projection(&self.v_proj).forward(&x)?;
        drop(x);
        let attended = match source {
            AttentionSource::Pass => self.attend(&queries, &keys, &v.y, pass)?,
            AttentionSource::Cache(cache) => {
                let (keys, values) = cache.append(keys, v.y.clone())?;
                self.attend(&queries, &keys, &values, pass)?
            }
            AttentionSource::Saved(attended) => attended,
        };
        let o = pass.projection(&self.o_proj).forward(&attended.values)?;
        Ok((o.y, AttentionActivations { q, k, v, attended, o: o.lora }))
    }

    fn attend(&self, q: &Tensor, k: &Tensor, v: &Tensor, pass: &Pass) -> Result<AttendedValues, ModelError> {
        let first_keys = pass.first_keys(self.sliding_window);
        let (values, saved) = attention::forward(q, k, v, self.shape(pass), first_keys)?;
        Ok(AttendedValues { values, saved })
    }

    /// The backward pass: adds the gradients of the adapters to `grads` and returns the gradient of
    /// the input if `need_dx` is set. `x` returns the input of the forward pass. The pass ends at
    /// the lowest projection whose gradient is needed.
    pub(crate) fn backward(
        &self,
        saved: &AttentionActivations,
        x: impl FnOnce() -> Result<Tensor, ModelError>,
        dy: &Tensor,
        pass: &Pass,
        grads: &Gradients,
        need_dx: bool,
    ) -> Result<Option<Tensor>, ModelError> {
        let AttentionActivations { q, k, v, attended, o } = saved;
        let [q_proj, k_proj, v_proj, o_proj] = self.linears().map(|linear| pass.projection(linear));
        let need_d_attended = need_dx || [&q_proj, &k_proj, &v_proj].into_iter().any(Projection::is_trained);
        let d_attended = Projection::backward(
            &[o_proj.output_grad(o, dy)],
            || Ok(attended.values.clone()),
            grads,
            need_d_attended,
        )?;
        let Some(d_attended) = d_attended else { return Ok(None) };
        let (d_q, d_k, d_v) = attention::backward(
            &attended.saved,
            (&self.queries.recompute(q, pass)?, &self.keys.recompute(k, pass)?, &v.y),
            &attended.values,
            &d_attended,
            self.shape(pass),
            pass.first_keys(self.sliding_window),
        )?;
        drop(d_attended);
        let d_q = self.queries.backward(q, d_q, pass)?;
        let d_k = self.keys.backward(k, d_k, pass)?;
        let outputs = [
            q_proj.output_grad(&q.projected.lora, &d_q),
            k_proj.output_grad(&k.projected.lora, &d_k),
            v_proj.output_grad(&v.lora, &d_v),
        ];
        Projection::backward(&outputs, x, grads, need_dx)
    }

    fn shape(&self, pass: &Pass) -> AttentionShape {
        let positions = pass.positions;
        AttentionShape {
            batch: positions.batch,
            seq: positions.seq,
            kv_seq: positions.past + positions.seq,
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            scale: self.scale,
        }
    }
}
