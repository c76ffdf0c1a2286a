//! The attention of a block, with its projections.

use candle_core::Tensor;
use lora_ops::attention::{self, AttentionShape};
use lora_ops::lora::LoraActivations;
use lora_spec::AttentionConfig;

use crate::pass::Pass;
use crate::projection::{Linear, Projected, Projection};
use crate::weight_source::WeightSource;
use crate::{Gradients, ModelError};

/// Grouped-query attention with rotary embeddings.
#[derive(Debug)]
pub(crate) struct Attention {
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    o_proj: Linear,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
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
    q: Projected,
    k: Projected,
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
            q_proj: Linear::load(&config.q_proj, weights)?,
            k_proj: Linear::load(&config.k_proj, weights)?,
            v_proj: Linear::load(&config.v_proj, weights)?,
            o_proj: Linear::load(&config.o_proj, weights)?,
            heads: config.heads,
            kv_heads: config.kv_heads,
            head_dim: config.head_dim,
            sliding_window: config.sliding_window,
        })
    }

    /// Returns the linear modules in the order of computation.
    pub(crate) fn linears(&self) -> [&Linear; 4] {
        [&self.q_proj, &self.k_proj, &self.v_proj, &self.o_proj]
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
        let q = pass.projection(&self.q_proj).forward(&x)?;
        let mut k = pass.projection(&self.k_proj).forward(&x)?;
        let mut v = pass.projection(&self.v_proj).forward(&x)?;
        drop(x);
        pass.rotate(&q.y)?;
        pass.rotate(&k.y)?;
        let attended = match source {
            AttentionSource::Pass => self.attend(&q.y, &k.y, &v.y, pass)?,
            AttentionSource::Cache(cache) => {
                (k.y, v.y) = cache.append(k.y, v.y)?;
                self.attend(&q.y, &k.y, &v.y, pass)?
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
            (&q.y, &k.y, &v.y),
            &attended.values,
            &d_attended,
            self.shape(pass),
            pass.first_keys(self.sliding_window),
        )?;
        drop(d_attended);
        pass.rotate_backward(&d_q)?;
        pass.rotate_backward(&d_k)?;
        let outputs = [
            q_proj.output_grad(&q.lora, &d_q),
            k_proj.output_grad(&k.lora, &d_k),
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
        }
    }
}
