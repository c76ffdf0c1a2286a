//! The attention of a block, with its projections.

use candle_core::Tensor;
use lora_ops::add_assign;
use lora_ops::attention::{self, AttentionShape};
use lora_ops::lora::LoraActivations;
use lora_spec::AttentionConfig;

use crate::norm::{Norm, NormActivations};
use crate::pass::Pass;
use crate::projection::{Linear, Projection};
use crate::rotary_heads::RotaryHeads;
use crate::split_projection::{Parts, SplitProjection};
use crate::weight_source::WeightSource;
use crate::{Gradients, ModelError};

/// Grouped-query attention.
#[derive(Debug)]
pub(crate) struct Attention {
    qkv_proj: SplitProjection,
    queries: RotaryHeads,
    keys: RotaryHeads,
    values: RotaryHeads,
    /// Index of the block.
    layer: usize,
    /// Index of the block whose keys and values this block shares.
    kv_source: Option<usize>,
    /// Whether later blocks share the keys and values of this block.
    is_kv_source: bool,
    o_proj: Linear,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    scale: f32,
    softcap: Option<f32>,
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
    qkv: Parts,
    q_norm: Option<NormActivations>,
    k_norm: Option<NormActivations>,
    v_norm: Option<NormActivations>,
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
        let (q, kv) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
        let widths = match (config.kv_source, config.values_are_keys) {
            (Some(_), _) => vec![q],
            (None, true) => vec![q, kv],
            (None, false) => vec![q, kv, kv],
        };
        let rope = config.rope;
        Ok(Self {
            qkv_proj: SplitProjection::load(&config.qkv_proj, widths, weights)?,
            queries: RotaryHeads::load(config.q_norm.as_ref(), rope.map(|rope| rope.queries), weights)?,
            keys: RotaryHeads::load(config.k_norm.as_ref(), rope.map(|rope| rope.keys), weights)?,
            values: RotaryHeads::load(config.v_norm.as_ref(), None, weights)?,
            layer: config.o_proj.layer,
            kv_source: config.kv_source,
            is_kv_source: config.is_kv_source,
            o_proj: Linear::load(&config.o_proj, weights)?,
            heads: config.heads,
            kv_heads: config.kv_heads,
            head_dim: config.head_dim,
            scale: config.scale as f32,
            softcap: config.softcap.map(|cap| cap as f32),
            sliding_window: config.sliding_window,
        })
    }

    /// Iterates over the linear modules in the order of computation.
    pub(crate) fn linears(&self) -> impl Iterator<Item = &Linear> {
        self.qkv_proj.modules.iter().chain([&self.o_proj])
    }

    /// Iterates over the norms of queries, keys and values.
    pub(crate) fn norms(&self) -> impl Iterator<Item = &Norm> {
        [&self.queries.norm, &self.keys.norm, &self.values.norm].into_iter().flatten()
    }

    /// Returns whether a projection has an adapter in `pass`.
    pub(crate) fn is_trained(&self, pass: &Pass) -> bool {
        self.linears().any(|linear| pass.projection(linear).is_trained())
    }

    /// Returns the output for `x`, both `[tokens, hidden]`, and the activations.
    pub(crate) fn forward(
        &self,
        x: Tensor,
        pass: &Pass,
        source: AttentionSource,
    ) -> Result<(Tensor, AttentionActivations), ModelError> {
        let qkv = self.qkv_proj.forward(&x, pass)?;
        drop(x);
        let (q, kv) = queries_and_keys_values(&qkv)?;
        let (queries, q_norm) = self.queries.forward(q, pass)?;
        let ((keys, values), [k_norm, v_norm]) = match (kv, self.kv_source) {
            (Some([k, v]), _) => {
                let (values, v_norm) = self.values.forward(v, pass)?;
                let (keys, k_norm) = self.keys.forward(k, pass)?;
                ((keys, values), [k_norm, v_norm])
            }
            (None, source) => (pass.shared_keys_values.get(source.unwrap_or(self.layer))?, [None, None]),
        };
        let (keys, values, saved) = match source {
            AttentionSource::Pass => (keys, values, None),
            AttentionSource::Cache(cache) if kv.is_some() => {
                let (keys, values) = cache.append(keys, values)?;
                (keys, values, None)
            }
            AttentionSource::Cache(_) => (keys, values, None),
            AttentionSource::Saved(attended) => (keys, values, Some(attended)),
        };
        if self.is_kv_source {
            pass.shared_keys_values.put(self.layer, &keys, &values);
        }
        let attended = match saved {
            Some(attended) => attended,
            None => self.attend(&queries, &keys, &values, pass)?,
        };
        let o = pass.projection(&self.o_proj).forward(&attended.values)?;
        Ok((o.y, AttentionActivations { qkv, q_norm, k_norm, v_norm, attended, o: o.lora }))
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
        let AttentionActivations { qkv, q_norm, k_norm, v_norm, attended, o } = saved;
        let (q, kv) = queries_and_keys_values(qkv)?;
        let o_proj = pass.projection(&self.o_proj);
        let need_d_attended = need_dx || self.qkv_proj.is_trained(pass);
        let d_attended = Projection::backward(
            &[o_proj.output_grad(o, dy)],
            || Ok(attended.values.clone()),
            grads,
            need_d_attended,
        )?;
        let Some(d_attended) = d_attended else { return Ok(None) };
        let (keys, values) = match (kv, self.kv_source) {
            (Some([k, v]), _) => {
                (self.keys.recompute(k_norm, k, pass)?, self.values.recompute(v_norm, v, pass)?)
            }
            (None, source) => pass.shared_keys_values.get(source.unwrap_or(self.layer))?,
        };
        let (d_q, d_k, d_v) = attention::backward(
            &attended.saved,
            (&self.queries.recompute(q_norm, q, pass)?, &keys, &values),
            &attended.values,
            &d_attended,
            self.shape(pass),
            pass.first_keys(self.sliding_window),
        )?;
        drop((d_attended, keys, values));
        let mut d_qkv = vec![self.queries.backward(q_norm, q, d_q, pass)?];
        match (kv, self.kv_source) {
            (Some([k, v]), _) => {
                if let Some((d_keys, d_values)) = pass.shared_keys_values.take_gradients(self.layer) {
                    add_assign(&d_k, &d_keys)?;
                    add_assign(&d_v, &d_values)?;
                }
                let d_k = self.keys.backward(k_norm, k, d_k, pass)?;
                let d_v = self.values.backward(v_norm, v, d_v, pass)?;
                d_qkv.push(d_k);
                if qkv.y.len() == 2 {
                    add_assign(&d_qkv[1], &d_v)?;
                } else {
                    d_qkv.push(d_v);
                }
            }
            (None, source) => {
                pass.shared_keys_values.add_gradients(source.unwrap_or(self.layer), d_k, d_v)?;
            }
        }
        self.qkv_proj.backward(qkv, d_qkv, x, pass, grads, need_dx)
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
            softcap: self.softcap,
        }
    }
}

/// Returns the projected queries, keys and values; without keys and values if the block shares
/// those of another one.
fn queries_and_keys_values(qkv: &Parts) -> Result<(&Tensor, Option<[&Tensor; 2]>), ModelError> {
    match qkv.y.as_slice() {
        [q, k, v] => Ok((q, Some([k, v]))),
        [q, k] => Ok((q, Some([k, k]))),
        [q] => Ok((q, None)),
        others => Err(candle_core::Error::Msg(format!("attention has {} inputs", others.len())).into()),
    }
}
