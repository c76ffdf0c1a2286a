//! What blocks get in a pass beside the residual stream, and the gradients of it.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use candle_core::Tensor;
use lora_ops::add_assign;
use lora_ops::lora::LoraActivations;

use crate::ModelError;
use crate::norm::NormActivations;

/// Keys and values, each `[tokens, kv_heads * head_dim]`.
type KeysValues = (Tensor, Tensor);

/// Keys and values that later blocks share, by the index of the block that computes them.
#[derive(Default)]
pub(crate) struct SharedKeysValues {
    keys_values: Mutex<HashMap<usize, KeysValues>>,
    gradients: Mutex<HashMap<usize, KeysValues>>,
}

/// What the backward pass of the embeddings of blocks reads of their forward pass.
pub(crate) struct PerLayerActivations {
    /// The output of the projection, `[tokens, layers * features]`.
    pub(crate) projected: Tensor,
    pub(crate) norm: NormActivations,
    pub(crate) lora: Option<LoraActivations>,
}

/// The embedding of each block.
#[derive(Default)]
pub(crate) struct LayerInputs {
    /// `[tokens, features]` for each block.
    inputs: Vec<Tensor>,
    /// What the backward pass needs, if the embeddings depend on an adapter.
    activations: Option<PerLayerActivations>,
    /// By block.
    gradients: Mutex<HashMap<usize, Tensor>>,
}

fn lock<T>(map: &Mutex<T>) -> MutexGuard<'_, T> {
    map.lock().unwrap_or_else(PoisonError::into_inner)
}

fn missing(what: &str, layer: usize) -> ModelError {
    candle_core::Error::Msg(format!("{what} of block {layer} is missing")).into()
}

impl SharedKeysValues {
    /// Keeps the keys and values of block `layer`.
    pub(crate) fn put(&self, layer: usize, keys: &Tensor, values: &Tensor) {
        lock(&self.keys_values).insert(layer, (keys.clone(), values.clone()));
    }

    /// Returns the keys and values of block `layer`.
    ///
    /// # Errors
    /// The block has not computed them.
    pub(crate) fn get(&self, layer: usize) -> Result<KeysValues, ModelError> {
        lock(&self.keys_values).get(&layer).cloned().ok_or_else(|| missing("the input", layer))
    }

    /// Adds the gradients of a block that shares the keys and values of block `layer`.
    pub(crate) fn add_gradients(
        &self,
        layer: usize,
        d_keys: Tensor,
        d_values: Tensor,
    ) -> Result<(), ModelError> {
        let mut gradients = lock(&self.gradients);
        match gradients.get(&layer) {
            None => {
                gradients.insert(layer, (d_keys, d_values));
            }
            Some((keys, values)) => {
                add_assign(keys, &d_keys)?;
                add_assign(values, &d_values)?;
            }
        }
        Ok(())
    }

    /// Removes and returns the sum of the gradients of the blocks that share the keys and values of
    /// block `layer`.
    pub(crate) fn take_gradients(&self, layer: usize) -> Option<KeysValues> {
        lock(&self.gradients).remove(&layer)
    }
}

impl LayerInputs {
    /// `activations`: what the backward pass needs, if the embeddings depend on an adapter.
    pub(crate) fn new(inputs: Vec<Tensor>, activations: Option<PerLayerActivations>) -> Self {
        Self { inputs, activations, gradients: Mutex::default() }
    }

    /// Returns the embedding of block `layer`.
    pub(crate) fn get(&self, layer: usize) -> Result<&Tensor, ModelError> {
        self.inputs.get(layer).ok_or_else(|| missing("the embedding", layer))
    }

    /// Whether the embeddings depend on an adapter.
    pub(crate) fn are_trained(&self) -> bool {
        self.activations.is_some()
    }

    /// Keeps the gradient of the embedding of block `layer`, if it is needed.
    pub(crate) fn put_gradient(&self, layer: usize, gradient: Tensor) {
        if self.are_trained() {
            lock(&self.gradients).insert(layer, gradient);
        }
    }

    /// Returns the activations of the embeddings, and the gradients of all blocks; `None`: the
    /// embeddings do not depend on an adapter.
    ///
    /// # Errors
    /// The gradient of a block is missing.
    pub(crate) fn gradients(&self) -> Result<Option<(&PerLayerActivations, Vec<Tensor>)>, ModelError> {
        let Some(activations) = &self.activations else { return Ok(None) };
        let mut gradients = lock(&self.gradients);
        let take = |layer| gradients.remove(&layer).ok_or_else(|| missing("the gradient", layer));
        let all = (0..self.inputs.len()).map(take).collect::<Result<_, _>>()?;
        Ok(Some((activations, all)))
    }
}
