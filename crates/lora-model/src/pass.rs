//! What the blocks share in a pass of training, evaluation or generation.

use std::collections::HashMap;
use std::sync::Arc;

use candle_core::{Device, Tensor};
use lora_ops::Ids;
use lora_ops::attention::first_visible_keys;
use lora_ops::dropout::Dropout;
use lora_ops::rope::RopeTable;

use crate::projection::{Linear, Projection};
use crate::shared_inputs::{LayerInputs, SharedKeysValues};
use crate::{Adapter, ModelError, PassOptions};

/// The positions of a pass: in each of `batch` sequences, `seq` tokens after `past` tokens whose
/// keys and values are in a cache.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Positions {
    pub(crate) batch: usize,
    pub(crate) seq: usize,
    pub(crate) past: usize,
}

/// A pass over some tokens. Every block reads it.
pub(crate) struct Pass<'a> {
    pub(crate) adapter: Option<&'a Adapter>,
    pub(crate) positions: Positions,
    /// The tables of the base's rotary embeddings.
    pub(crate) ropes: Vec<Arc<RopeTable>>,
    pub(crate) first_keys: FirstKeys,
    pub(crate) dropout: Option<DropoutMasks>,
    pub(crate) shared_keys_values: SharedKeysValues,
    pub(crate) layer_inputs: LayerInputs,
}

/// By sliding window: the first visible key of each query. Windows that are not shorter than the
/// sequences have no entry.
#[derive(Default)]
pub(crate) struct FirstKeys(HashMap<usize, Ids>);

/// The dropout masks of all modules in one step.
pub(crate) struct DropoutMasks {
    options: PassOptions,
    /// Dataset row and position of each token.
    tokens: Ids,
}

impl Pass<'_> {
    /// Returns the view of a linear module in this pass.
    pub(crate) fn projection<'a>(&'a self, linear: &'a Linear) -> Projection<'a> {
        let adapter = self.adapter.and_then(|adapter| adapter.terms(&linear.name));
        let dropout = self.dropout.as_ref().filter(|_| adapter.is_some());
        Projection::new(linear, adapter, dropout.map(|masks| masks.of(&linear.name)))
    }

    /// Returns the first visible key of each query for a sliding window; `None`: the first key of
    /// its sequence.
    pub(crate) fn first_keys(&self, sliding_window: Option<usize>) -> Option<&Ids> {
        self.first_keys.0.get(&sliding_window?)
    }

    /// Applies the rotary embedding with this index to queries or keys
    /// `[tokens, heads * head_dim]`, in place. `None`: they stay as they are.
    pub(crate) fn rotate(&self, x: &Tensor, rope: Option<usize>) -> Result<(), ModelError> {
        let Some(rope) = rope else { return Ok(()) };
        Ok(self.ropes[rope].forward(x, self.positions.seq, self.positions.past)?)
    }

    /// Converts the gradient of rotated queries or keys into that of the original ones, in place.
    pub(crate) fn rotate_backward(&self, dx: &Tensor, rope: Option<usize>) -> Result<(), ModelError> {
        let Some(rope) = rope else { return Ok(()) };
        Ok(self.ropes[rope].backward(dx, self.positions.seq)?)
    }
}

impl DropoutMasks {
    /// Returns the masks of a training pass; `None`: it has no dropout. `rows` has the dataset
    /// index of each sequence.
    pub(crate) fn new(
        rows: &[u64],
        seq: usize,
        options: PassOptions,
        device: &Device,
    ) -> Result<Option<Self>, ModelError> {
        if options.dropout == 0.0 {
            return Ok(None);
        }
        let positions = 0..seq as u32;
        let tokens = rows.iter().flat_map(|&row| positions.clone().flat_map(move |at| [row as u32, at]));
        let tokens = Ids::new(tokens.collect::<Vec<_>>(), device)?;
        Ok(Some(Self { options, tokens }))
    }

    /// Returns the mask of a module by its full name.
    fn of(&self, module: &str) -> Dropout {
        let PassOptions { dropout, seed, step, .. } = self.options;
        Dropout::new(seed, module, step, dropout, self.tokens.clone())
    }
}

impl FirstKeys {
    /// Returns the first visible keys for each of `windows`.
    pub(crate) fn new(
        windows: impl Iterator<Item = usize>,
        positions: Positions,
        device: &Device,
    ) -> Result<Self, ModelError> {
        let Positions { batch, seq, past } = positions;
        let mut first_keys = HashMap::new();
        for window in windows {
            if past + seq > window && !first_keys.contains_key(&window) {
                let all = first_visible_keys(batch, past + seq, Some(window), None);
                let queries = all.chunks(past + seq).flat_map(|row| &row[past..]).copied();
                first_keys.insert(window, Ids::new(queries.collect::<Vec<u32>>(), device)?);
            }
        }
        Ok(Self(first_keys))
    }
}
