//! One decoder block: `x + attention(norm(x))`, then `x + mlp(norm(x))`.

use candle_core::Tensor;
use lora_ops::attention::{self, AttentionShape};
use lora_ops::dropout::Dropout;
use lora_ops::linear::{FrozenLinear, Weight};
use lora_ops::lora::{self, LoraPair};
use lora_ops::rope::RopeTable;
use lora_ops::{Ids, Result, add_assign, glu, rms_norm};
use lora_spec::{ActivationCheckpointing, ActivationFunction};

/// Projections of a block, in the order of `ModelConfig::linear_modules`.
const Q: usize = 0;
const K: usize = 1;
const V: usize = 2;
const O: usize = 3;
const GATE: usize = 4;
const UP: usize = 5;
const DOWN: usize = 6;

/// A block's frozen weights.
#[derive(Debug)]
pub(crate) struct Block {
    projections: Vec<FrozenLinear>,
    input_norm: Tensor,
    post_attention_norm: Tensor,
}

/// The operands of a block's computation, except its weights and its input.
pub(crate) struct BlockContext<'a> {
    pub(crate) shape: AttentionShape,
    pub(crate) rope: &'a RopeTable,
    pub(crate) eps: f64,
    pub(crate) activation: ActivationFunction,
    /// First visible key of each query; `None`: the first key of its row.
    pub(crate) first: Option<&'a Ids>,
    /// Adapters by projection.
    pub(crate) lora: Option<&'a [Option<LoraPair>]>,
    /// Initial adapters by projection. They are subtracted from the frozen weights, with the same
    /// scaling.
    pub(crate) initial: Option<&'a [Option<LoraPair>]>,
    pub(crate) scaling: f64,
    /// Dropout masks by projection.
    pub(crate) dropout: Option<&'a [Dropout]>,
}

impl BlockContext<'_> {
    /// Returns the adapter of a projection.
    fn pair(&self, p: usize) -> Option<&LoraPair> {
        self.lora.and_then(|pairs| pairs[p].as_ref())
    }

    /// Returns the initial adapter that is subtracted from a projection's frozen weight.
    fn initial(&self, p: usize) -> Option<&LoraPair> {
        self.initial.and_then(|pairs| pairs[p].as_ref())
    }

    /// Returns the dropout mask of a projection's adapter.
    fn mask(&self, p: usize) -> Option<&Dropout> {
        self.dropout.map(|masks| &masks[p])
    }
}

/// Keys and values of all previous tokens, each `[tokens, kv_heads * head_dim]`.
#[derive(Debug, Default, Clone)]
pub(crate) struct KvCache {
    keys_values: Option<(Tensor, Tensor)>,
}

/// Intermediate results of a block's forward pass that its backward pass reads.
pub(crate) struct Activations {
    input_norm: rms_norm::RmsNormActivations,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn: AttentionOutput,
    attention_residual: Tensor,
    post_attention_norm: rms_norm::RmsNormActivations,
    gate: Tensor,
    up: Tensor,
    lora: Vec<Option<lora::LoraActivations>>,
}

/// The output of attention `[tokens, heads * head_dim]`, and its other activations for the backward
/// pass.
pub(crate) struct AttentionOutput {
    output: Tensor,
    saved: attention::AttentionActivations,
}

/// The part of [`Activations`] that is kept between the passes. [`Block::recompute`] computes the
/// rest.
pub(crate) enum SavedActivations {
    Everything(Box<Activations>),
    Attention(AttentionOutput),
    Nothing,
}

impl Activations {
    /// Drops the activations that `checkpointing` recomputes.
    pub(crate) fn into_saved(self, checkpointing: ActivationCheckpointing) -> SavedActivations {
        match checkpointing {
            ActivationCheckpointing::None => SavedActivations::Everything(Box::new(self)),
            ActivationCheckpointing::BlockSaveAttention => SavedActivations::Attention(self.attn),
            ActivationCheckpointing::Block => SavedActivations::Nothing,
        }
    }
}

impl Block {
    /// Number of linear modules of a block.
    pub(crate) const PROJECTIONS: usize = 7;

    /// Creates a block from its projections, in the order of `ModelConfig::linear_modules`, and its
    /// norms.
    ///
    /// # Errors
    /// The number of projections is not [`Self::PROJECTIONS`].
    pub(crate) fn new(
        projections: Vec<FrozenLinear>,
        input_norm: Tensor,
        post_attention_norm: Tensor,
    ) -> Result<Self> {
        if projections.len() != Self::PROJECTIONS {
            candle_core::bail!("a block has {} projections, not {}", Self::PROJECTIONS, projections.len());
        }
        Ok(Self { projections, input_norm, post_attention_norm })
    }

    /// Returns the projections in the order of `ModelConfig::linear_modules`, and the norms with
    /// their names.
    pub(crate) fn parts(&self) -> (&[FrozenLinear], [(&'static str, &Tensor); 2]) {
        let norms =
            [("input_layernorm", &self.input_norm), ("post_attention_layernorm", &self.post_attention_norm)];
        (&self.projections, norms)
    }

    /// Returns the frozen weight of a projection.
    pub(crate) fn weight(&self, p: usize) -> &Weight {
        self.projections[p].weight()
    }

    /// Returns the size of the weights in bytes.
    pub(crate) fn bytes(&self) -> usize {
        let norms = self.input_norm.elem_count() + self.post_attention_norm.elem_count();
        4 * norms + self.projections.iter().map(FrozenLinear::bytes).sum::<usize>()
    }

    /// The forward pass: returns the block's output for `x`, both `[tokens, hidden]`, and the
    /// activations for the backward pass.
    pub(crate) fn forward(&self, x: &Tensor, ctx: &BlockContext) -> Result<(Tensor, Activations)> {
        let mut activations = self.forward_to_mlp(x, ctx, None)?;
        let (y, lora) =
            self.project(DOWN, &glu::forward(&activations.gate, &activations.up, ctx.activation)?, ctx)?;
        activations.lora.push(lora);
        add_assign(&y, &activations.attention_residual)?;
        Ok((y, activations))
    }

    /// Recomputes the activations that were not saved in the forward pass over `x`, with the same
    /// bits. The product with the frozen weight of the last projection is not recomputed, because
    /// the backward pass does not need it.
    pub(crate) fn recompute(
        &self,
        saved: SavedActivations,
        x: &Tensor,
        ctx: &BlockContext,
    ) -> Result<Activations> {
        let attn = match saved {
            SavedActivations::Everything(activations) => return Ok(*activations),
            SavedActivations::Attention(attn) => Some(attn),
            SavedActivations::Nothing => None,
        };
        let mut activations = self.forward_to_mlp(x, ctx, attn)?;
        let lora = match ctx.pair(DOWN) {
            Some(pair) => {
                let activated = glu::forward(&activations.gate, &activations.up, ctx.activation)?;
                Some(lora::recompute(&activated, pair, ctx.mask(DOWN))?)
            }
            None => None,
        };
        activations.lora.push(lora);
        Ok(activations)
    }

    /// The forward pass except the last projection. If `attn` is given, attention is not computed
    /// again.
    fn forward_to_mlp(
        &self,
        x: &Tensor,
        ctx: &BlockContext,
        attn: Option<AttentionOutput>,
    ) -> Result<Activations> {
        let mut lora = Vec::with_capacity(Self::PROJECTIONS);
        let mut project = |p: usize, x: &Tensor| -> Result<Tensor> {
            let (y, saved) = self.project(p, x, ctx)?;
            lora.push(saved);
            Ok(y)
        };
        let (normed, input_norm) = rms_norm::forward(x, &self.input_norm, ctx.eps)?;
        let (q, k, v) = (project(Q, &normed)?, project(K, &normed)?, project(V, &normed)?);
        drop(normed);
        ctx.rope.forward(&q, ctx.shape.seq, 0)?;
        ctx.rope.forward(&k, ctx.shape.seq, 0)?;
        let attn = match attn {
            Some(attn) => attn,
            None => {
                let (output, saved) = attention::forward(&q, &k, &v, ctx.shape, ctx.first)?;
                AttentionOutput { output, saved }
            }
        };
        let attention_residual = project(O, &attn.output)?;
        let (normed, post_attention_norm) =
            rms_norm::add_forward(&attention_residual, x, &self.post_attention_norm, ctx.eps)?;
        let (gate, up) = (project(GATE, &normed)?, project(UP, &normed)?);
        Ok(Activations { input_norm, q, k, v, attn, attention_residual, post_attention_norm, gate, up, lora })
    }

    /// Returns the block's output for new tokens of one sequence. `cache` has the keys and values
    /// of all previous tokens; those of the new tokens are appended.
    pub(crate) fn decode(&self, x: &Tensor, ctx: &BlockContext, cache: &mut KvCache) -> Result<Tensor> {
        let project = |p: usize, x: &Tensor| Ok::<_, candle_core::Error>(self.project(p, x, ctx)?.0);
        let first = ctx.shape.kv_seq - ctx.shape.seq;
        let (normed, _) = rms_norm::forward(x, &self.input_norm, ctx.eps)?;
        let (q, k, v) = (project(Q, &normed)?, project(K, &normed)?, project(V, &normed)?);
        ctx.rope.forward(&q, ctx.shape.seq, first)?;
        ctx.rope.forward(&k, ctx.shape.seq, first)?;
        let (k, v) = match cache.keys_values.take() {
            Some((keys, values)) => (Tensor::cat(&[keys, k], 0)?, Tensor::cat(&[values, v], 0)?),
            None => (k, v),
        };
        let (attn, _) = attention::forward(&q, &k, &v, ctx.shape, ctx.first)?;
        cache.keys_values = Some((k, v));
        let attention_residual = project(O, &attn)?;
        let (normed, _) = rms_norm::add_forward(&attention_residual, x, &self.post_attention_norm, ctx.eps)?;
        let activated = glu::forward(&project(GATE, &normed)?, &project(UP, &normed)?, ctx.activation)?;
        let y = project(DOWN, &activated)?;
        add_assign(&y, &attention_residual)?;
        Ok(y)
    }

    /// The backward pass: adds the gradients of the block's adapters to `grads` and returns the
    /// gradient of `x`. If `need_dx` is false, because no block below is trained, the pass ends at
    /// the lowest trained projection and returns `None`.
    pub(crate) fn backward(
        &self,
        activations: &Activations,
        x: &Tensor,
        dy: &Tensor,
        ctx: &BlockContext,
        grads: &[Option<LoraPair>],
        need_dx: bool,
    ) -> Result<Option<Tensor>> {
        let trained = |projections: &[usize]| projections.iter().any(|&p| grads[p].is_some());
        let below_attention = need_dx || trained(&[Q, K, V]);
        let below_mlp = below_attention || trained(&[O]);
        let below_down = below_mlp || trained(&[GATE, UP]);
        let project = |p: usize, x: &Tensor, dy: &Tensor, dx: Option<&Tensor>| {
            self.project_backward(p, &activations.lora[p], x, dy, ctx, grads, dx)
        };

        let activated = glu::forward(&activations.gate, &activations.up, ctx.activation)?;
        let d_activated = self.frozen_input_grad(DOWN, dy, ctx, below_down)?;
        project(DOWN, &activated, dy, d_activated.as_ref())?;
        drop(activated);
        let Some(d_activated) = d_activated else { return Ok(None) };
        let (d_gate, d_up) = glu::backward(&activations.gate, &activations.up, &d_activated, ctx.activation)?;
        drop(d_activated);
        let d_normed = self.frozen_input_grad(GATE, &d_gate, ctx, below_mlp)?;
        if let Some(d_normed) = &d_normed {
            self.add_frozen_input_grad(UP, &d_up, ctx, d_normed)?;
        }
        if trained(&[GATE, UP]) {
            let normed = rms_norm::recompute(
                &activations.post_attention_norm,
                &activations.attention_residual,
                &self.post_attention_norm,
            )?;
            project(GATE, &normed, &d_gate, d_normed.as_ref())?;
            project(UP, &normed, &d_up, d_normed.as_ref())?;
        }
        drop((d_gate, d_up));
        let Some(d_normed) = d_normed else { return Ok(None) };
        let d_attention_residual = rms_norm::backward(
            &activations.post_attention_norm,
            &activations.attention_residual,
            &self.post_attention_norm,
            &d_normed,
            Some(dy),
        )?;
        drop(d_normed);

        let d_attended = self.frozen_input_grad(O, &d_attention_residual, ctx, below_attention)?;
        project(O, &activations.attn.output, &d_attention_residual, d_attended.as_ref())?;
        let Some(d_attended) = d_attended else { return Ok(None) };
        let (d_q, d_k, d_v) = attention::backward(
            &activations.attn.saved,
            (&activations.q, &activations.k, &activations.v),
            &activations.attn.output,
            &d_attended,
            ctx.shape,
            ctx.first,
        )?;
        drop(d_attended);
        ctx.rope.backward(&d_q, ctx.shape.seq)?;
        ctx.rope.backward(&d_k, ctx.shape.seq)?;
        let d_normed = self.frozen_input_grad(Q, &d_q, ctx, need_dx)?;
        if let Some(d_normed) = &d_normed {
            self.add_frozen_input_grad(K, &d_k, ctx, d_normed)?;
            self.add_frozen_input_grad(V, &d_v, ctx, d_normed)?;
        }
        if trained(&[Q, K, V]) {
            let normed = rms_norm::recompute(&activations.input_norm, x, &self.input_norm)?;
            project(Q, &normed, &d_q, d_normed.as_ref())?;
            project(K, &normed, &d_k, d_normed.as_ref())?;
            project(V, &normed, &d_v, d_normed.as_ref())?;
        }
        let Some(d_normed) = d_normed else { return Ok(None) };
        let dx = rms_norm::backward(
            &activations.input_norm,
            x,
            &self.input_norm,
            &d_normed,
            Some(&d_attention_residual),
        )?;
        Ok(Some(dx))
    }

    /// Returns the output of a projection with its adapter and initial adapter, and the activations
    /// of the adapter.
    fn project(
        &self,
        p: usize,
        x: &Tensor,
        ctx: &BlockContext,
    ) -> Result<(Tensor, Option<lora::LoraActivations>)> {
        let y = self.projections[p].forward(x)?;
        if let Some(pair) = ctx.initial(p) {
            lora::forward(x, pair, -ctx.scaling, None, &y)?;
        }
        let forward = |pair| lora::forward(x, pair, ctx.scaling, ctx.mask(p), &y);
        let saved = ctx.pair(p).map(forward).transpose()?;
        Ok((y, saved))
    }

    /// Returns the frozen part of a projection's input gradient if it is `needed`.
    fn frozen_input_grad(
        &self,
        p: usize,
        dy: &Tensor,
        ctx: &BlockContext,
        needed: bool,
    ) -> Result<Option<Tensor>> {
        if !needed {
            return Ok(None);
        }
        let dx = self.projections[p].backward(dy)?;
        self.subtract_initial(p, dy, ctx, &dx)?;
        Ok(Some(dx))
    }

    /// Adds the frozen part of a projection's input gradient to `dx`.
    fn add_frozen_input_grad(&self, p: usize, dy: &Tensor, ctx: &BlockContext, dx: &Tensor) -> Result<()> {
        self.projections[p].backward_add(dy, dx)?;
        self.subtract_initial(p, dy, ctx, dx)
    }

    fn subtract_initial(&self, p: usize, dy: &Tensor, ctx: &BlockContext, dx: &Tensor) -> Result<()> {
        ctx.initial(p).map_or(Ok(()), |pair| lora::backward_frozen(pair, -ctx.scaling, dy, dx))
    }

    /// The adapter's part of a projection's backward pass: adds the gradients of the adapter to
    /// `grads`, and the adapter's part of the input gradient to `dx`.
    #[expect(clippy::too_many_arguments, reason = "the operands of the chain rule")]
    fn project_backward(
        &self,
        p: usize,
        saved: &Option<lora::LoraActivations>,
        x: &Tensor,
        dy: &Tensor,
        ctx: &BlockContext,
        grads: &[Option<LoraPair>],
        dx: Option<&Tensor>,
    ) -> Result<()> {
        if let (Some(saved), Some(pair), Some(grad)) = (saved, ctx.pair(p), &grads[p]) {
            lora::backward(saved, x, pair, ctx.scaling, ctx.mask(p), dy, grad, dx)?;
        }
        Ok(())
    }
}
