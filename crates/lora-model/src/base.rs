//! A frozen base model in memory.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{DType, Device, Tensor};
use lora_ops::cross_entropy::Head;
use lora_ops::linear::{FrozenLinear, Weight};
use lora_ops::pointwise::{scaled, softcapped};
use lora_ops::rope::RopeTable;
use lora_ops::{Ids, embedding};
use lora_spec::{MicroBatch, ModelConfig};

use crate::attention::KvCache;
use crate::block::{Activations, Block};
use crate::norm::Norm;
use crate::pass::{FirstKeys, Pass, Positions, Rotations};
use crate::per_layer_embedding::PerLayerEmbedding;
use crate::projection::Linear;
use crate::shared_inputs::LayerInputs;
use crate::weight_source::WeightSource;
use crate::{Adapter, ModelError};

/// A frozen base model. It is read once and never changes.
#[derive(Debug)]
pub struct Base {
    /// The contents of `config.json`.
    pub config: ModelConfig,
    pub(crate) embedding: Tensor,
    pub(crate) per_layer_embedding: Option<PerLayerEmbedding>,
    pub(crate) blocks: Vec<Block>,
    pub(crate) norm: Norm,
    /// `[vocab, hidden]`, never quantized.
    head: Tensor,
    device: Device,
    /// The newest table of each of the rotary embeddings.
    ropes: Mutex<Vec<Arc<RopeTable>>>,
    sha256: String,
}

impl Base {
    /// Builds a base on `device`. `sha256` identifies `weights`.
    pub(crate) fn from_weights(
        config: ModelConfig,
        sha256: String,
        device: &Device,
        weights: &impl WeightSource,
    ) -> Result<Self, ModelError> {
        let blocks = config.blocks().map(|block| Block::load(&block, weights)).collect::<Result<_, _>>()?;
        let embedding = weights.matrix("model.embed_tokens.weight")?;
        let head =
            if config.tie_word_embeddings { embedding.clone() } else { weights.matrix("lm_head.weight")? };
        let per_layer_embedding = config.per_layer_embedding();
        let load = |config| PerLayerEmbedding::load(config, weights);
        Ok(Self {
            per_layer_embedding: per_layer_embedding.as_ref().map(load).transpose()?,
            norm: Norm::load(&config.final_norm(), weights)?,
            head,
            device: device.clone(),
            ropes: Mutex::default(),
            embedding,
            blocks,
            config,
            sha256,
        })
    }

    /// Returns the logits of normalized hidden states `[tokens, hidden]`, f32 `[tokens, vocab]`.
    pub fn logits(&self, normed: &Tensor) -> Result<Tensor, ModelError> {
        let logits = FrozenLinear::new(self.head.clone(), None)?.forward_f32(normed)?;
        match self.head().softcap {
            None => Ok(logits),
            Some(cap) => Ok(softcapped(&logits, cap)?),
        }
    }

    /// Returns the head for the loss.
    pub(crate) fn head(&self) -> Head<'_> {
        Head { weight: &self.head, softcap: self.config.logit_softcap.map(|cap| cap as f32) }
    }

    /// Returns the tensors of a dense base with their names in safetensors files.
    ///
    /// # Errors
    /// A weight is quantized.
    pub(crate) fn tensors(&self) -> Result<Vec<(String, Tensor)>, ModelError> {
        let mut tensors = vec![("model.embed_tokens.weight".to_owned(), self.embedding.clone())];
        if !self.config.tie_word_embeddings {
            tensors.push(("lm_head.weight".to_owned(), self.head.clone()));
        }
        let per_layer = self.per_layer_embedding.as_ref();
        tensors.extend(
            per_layer.map(|embedding| (format!("{}.weight", embedding.name), embedding.table.clone())),
        );
        let norms = self.blocks.iter().flat_map(Block::norms).chain([&self.norm]);
        for norm in norms.chain(per_layer.map(|embedding| &embedding.norm)) {
            tensors.extend(norm.tensors());
        }
        let scales = self.blocks.iter().filter_map(|block| block.output_scale.as_ref());
        tensors.extend(scales.map(|scale| (scale.name.clone(), scale.stored.clone())));
        for Linear { name, frozen } in self.linears() {
            let Weight::Dense(weight) = frozen.weight() else {
                return Err(candle_core::Error::Msg(format!("{name} is quantized")).into());
            };
            tensors.push((format!("{name}.weight"), weight.clone()));
            tensors.extend(frozen.bias().map(|bias| (format!("{name}.bias"), bias.clone())));
        }
        Ok(tensors)
    }

    /// Returns the (dequantized) weight of a linear module by the module's name, as f32 on the CPU.
    ///
    /// # Errors
    /// The module does not exist.
    pub fn dense_weight(&self, module: &str) -> Result<Tensor, ModelError> {
        let Some(linear) = self.linears().find(|linear| linear.name == module) else {
            return Err(candle_core::Error::Msg(format!("module {module} does not exist")).into());
        };
        Ok(linear.frozen.weight().dense()?)
    }

    /// Iterates over the linear modules in the order of computation.
    fn linears(&self) -> impl Iterator<Item = &Linear> {
        let per_layer = self.per_layer_embedding.iter().map(|embedding| &embedding.projection);
        per_layer.chain(self.blocks.iter().flat_map(Block::linears))
    }

    /// Returns the size of the weights in bytes.
    pub fn bytes(&self) -> usize {
        let dense = |tensor: &Tensor| tensor.elem_count() * tensor.dtype().size_in_bytes();
        let head = if self.config.tie_word_embeddings { 0 } else { dense(&self.head) };
        let blocks: usize = self.blocks.iter().map(Block::bytes).sum();
        let per_layer = self.per_layer_embedding.as_ref().map_or(0, PerLayerEmbedding::bytes);
        dense(&self.embedding) + per_layer + head + self.norm.bytes() + blocks
    }

    /// Returns the device of the weights.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Returns the type of the activations: f32 on the CPU, the type of the matrices on a GPU.
    pub fn activation_dtype(&self) -> DType {
        if self.device.is_cpu() { DType::F32 } else { self.embedding.dtype() }
    }

    /// Returns the embeddings of `tokens` `[tokens, hidden]`. The pass gets those of the blocks.
    fn embed(&self, tokens: &[u32], pass: &mut Pass) -> Result<Tensor, ModelError> {
        let tokens = Ids::new(tokens, &self.device)?;
        let x = embedding::forward(&self.embedding, &tokens)?;
        let multiplier = self.config.embedding_multiplier;
        let x = if multiplier == 1.0 { x } else { scaled(&x, multiplier)? };
        if let Some(embedding) = &self.per_layer_embedding {
            let (inputs, activations) = embedding.forward(&tokens, &x, pass)?;
            pass.layer_inputs = LayerInputs::new(inputs, activations);
        }
        Ok(x)
    }

    /// Prepares a pass over tokens at `positions`, without dropout.
    pub(crate) fn pass<'a>(
        &self,
        adapter: Option<&'a Adapter>,
        positions: Positions,
    ) -> Result<Pass<'a>, ModelError> {
        let first_keys = FirstKeys::new(self.windows(), positions, None, &self.device)?;
        let length = positions.past + positions.seq;
        let ropes = self.ropes(length, length)?;
        Ok(Pass::new(adapter, positions, Rotations::Shared(ropes), first_keys))
    }

    /// Prepares a pass over the tokens of `batch`, without dropout.
    pub(crate) fn pass_over<'a>(
        &self,
        adapter: Option<&'a Adapter>,
        batch: &MicroBatch,
    ) -> Result<Pass<'a>, ModelError> {
        let positions = Positions { batch: batch.rows.len(), seq: batch.seq_len, past: 0 };
        // Padding, which belongs to the last document of a row, makes no sequence longer.
        let length = batch.longest_document();
        if !batch.is_packed() {
            let first_keys = FirstKeys::new(self.windows(), positions, None, &self.device)?;
            let rotations = Rotations::Shared(self.ropes(batch.seq_len, length)?);
            return Ok(Pass::new(adapter, positions, rotations, first_keys));
        }
        let starts: Vec<u32> = batch.documents().map(|(_, document)| document.start as u32).collect();
        let within: Vec<u32> =
            batch.documents().map(|(position, document)| (position - document.start) as u32).collect();
        let last = within.iter().max().map_or(0, |last| *last as usize);
        let within = Ids::new(within, &self.device)?;
        let ropes = self.ropes(last + 1, length)?;
        let ropes = ropes.iter().map(|rope| rope.at_positions(&within)).collect::<Result<_, _>>()?;
        let first_keys = FirstKeys::new(self.windows(), positions, Some(&starts), &self.device)?;
        Ok(Pass::new(adapter, positions, Rotations::OfTokens(ropes), first_keys))
    }

    /// The sliding windows of the blocks.
    fn windows(&self) -> impl Iterator<Item = usize> {
        self.blocks.iter().filter_map(|block| block.attn.sliding_window)
    }

    /// Computes the hidden states of `tokens` after the last block, `[tokens, hidden]`. `caches`
    /// has one cache for each block. `save` takes the index, the input and the activations of each
    /// block.
    pub(crate) fn forward(
        &self,
        tokens: &[u32],
        pass: &mut Pass,
        mut caches: Option<&mut [KvCache]>,
        mut save: impl FnMut(usize, Tensor, Activations),
    ) -> Result<Tensor, ModelError> {
        let mut x = self.embed(tokens, pass)?;
        let pass = &*pass;
        for (layer, block) in self.blocks.iter().enumerate() {
            let cache = caches.as_deref_mut().map(|caches| &mut caches[layer]);
            let (y, activations) = block.forward(&x, pass, cache)?;
            save(layer, x, activations);
            x = y;
        }
        Ok(x)
    }

    /// Returns the tables of the rotary embeddings for `positions` positions, with the frequencies
    /// for sequences of `length` tokens.
    fn ropes(&self, positions: usize, length: usize) -> Result<Vec<Arc<RopeTable>>, ModelError> {
        let mut tables = self.ropes.lock().unwrap_or_else(PoisonError::into_inner);
        for (index, rope) in self.config.ropes.iter().enumerate() {
            let context = rope.context(length);
            if tables.get(index).is_some_and(|table| table.serves(positions, context)) {
                continue;
            }
            let longest = positions.next_power_of_two();
            let table = Arc::new(RopeTable::with_context(rope, longest, context, &self.device)?);
            match tables.get_mut(index) {
                Some(shorter) => *shorter = table,
                None => tables.push(table),
            }
        }
        Ok(tables.clone())
    }

    /// Returns the SHA-256 over the names and hashes of `config.json` and the safetensors files,
    /// and over the weights that LoftQ requantized, because another processor may compute them with
    /// other bits. For random weights it is the SHA-256 over seed, format and configuration.
    pub fn sha256(&self) -> &str {
        &self.sha256
    }
}
