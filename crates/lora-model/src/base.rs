//! A frozen base model in memory.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{DType, Device, Tensor};
use lora_ops::cross_entropy::Head;
use lora_ops::linear::{FrozenLinear, Weight};
use lora_ops::pointwise::{scaled, softcapped};
use lora_ops::rope::RopeTable;
use lora_ops::{Ids, embedding};
use lora_spec::ModelConfig;

use crate::attention::KvCache;
use crate::block::{Activations, Block};
use crate::norm::Norm;
use crate::pass::{FirstKeys, Pass, Positions};
use crate::projection::Linear;
use crate::weight_source::WeightSource;
use crate::{Adapter, ModelError};

/// A frozen base model. It is read once and never changes.
#[derive(Debug)]
pub struct Base {
    /// The contents of `config.json`.
    pub config: ModelConfig,
    pub(crate) embedding: Tensor,
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
        Ok(Self {
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
    pub(crate) fn logits(&self, normed: &Tensor) -> Result<Tensor, ModelError> {
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
        for norm in self.blocks.iter().flat_map(Block::norms).chain([&self.norm]) {
            tensors
                .extend(norm.stored.iter().map(|weight| (format!("{}.weight", norm.name), weight.clone())));
        }
        let scales = self.blocks.iter().filter_map(|block| block.output_scale.as_ref());
        tensors.extend(scales.map(|scale| (scale.name.clone(), scale.stored.clone())));
        for Linear { name, frozen } in self.blocks.iter().flat_map(Block::linears) {
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
        let Some(linear) = self.blocks.iter().flat_map(Block::linears).find(|linear| linear.name == module)
        else {
            return Err(candle_core::Error::Msg(format!("module {module} does not exist")).into());
        };
        Ok(linear.frozen.weight().dense()?)
    }

    /// Returns the size of the weights in bytes.
    pub fn bytes(&self) -> usize {
        let dense = |tensor: &Tensor| tensor.elem_count() * tensor.dtype().size_in_bytes();
        let head = if self.config.tie_word_embeddings { 0 } else { dense(&self.head) };
        let blocks: usize = self.blocks.iter().map(Block::bytes).sum();
        dense(&self.embedding) + head + self.norm.bytes() + blocks
    }

    /// Returns the device of the weights.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Returns the type of the activations: f32 on the CPU, the type of the matrices on a GPU.
    pub fn activation_dtype(&self) -> DType {
        if self.device.is_cpu() { DType::F32 } else { self.embedding.dtype() }
    }

    /// Returns the embeddings of `tokens` `[tokens, hidden]`.
    fn embed(&self, tokens: &[u32]) -> Result<Tensor, ModelError> {
        let x = embedding::forward(&self.embedding, &Ids::new(tokens, &self.device)?)?;
        let multiplier = self.config.embedding_multiplier;
        if multiplier == 1.0 { Ok(x) } else { Ok(scaled(&x, multiplier)?) }
    }

    /// Prepares a pass over tokens at `positions`, without dropout.
    pub(crate) fn pass<'a>(
        &self,
        adapter: Option<&'a Adapter>,
        positions: Positions,
    ) -> Result<Pass<'a>, ModelError> {
        let windows = self.blocks.iter().filter_map(|block| block.attn.sliding_window);
        let first_keys = FirstKeys::new(windows, positions, &self.device)?;
        let ropes = self.ropes(positions.past + positions.seq)?;
        Ok(Pass { adapter, positions, ropes, first_keys, dropout: None })
    }

    /// Computes the hidden states of `tokens` after the last block, `[tokens, hidden]`. `caches`
    /// has one cache for each block. `save` takes the index, the input and the activations of each
    /// block.
    pub(crate) fn forward(
        &self,
        tokens: &[u32],
        pass: &Pass,
        mut caches: Option<&mut [KvCache]>,
        mut save: impl FnMut(usize, Tensor, Activations),
    ) -> Result<Tensor, ModelError> {
        let mut x = self.embed(tokens)?;
        for (layer, block) in self.blocks.iter().enumerate() {
            let cache = caches.as_deref_mut().map(|caches| &mut caches[layer]);
            let (y, activations) = block.forward(&x, pass, cache)?;
            save(layer, x, activations);
            x = y;
        }
        Ok(x)
    }

    /// Returns the tables of the rotary embeddings for sequences of `positions` positions.
    fn ropes(&self, positions: usize) -> Result<Vec<Arc<RopeTable>>, ModelError> {
        let mut tables = self.ropes.lock().unwrap_or_else(PoisonError::into_inner);
        for (index, rope) in self.config.ropes.iter().enumerate() {
            if tables.get(index).is_some_and(|table| table.serves(rope, positions)) {
                continue;
            }
            let (longest, context) = (positions.next_power_of_two(), rope.context(positions));
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
