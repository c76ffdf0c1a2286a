//! What the blocks share in a pass of training, evaluation or generation.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::Arc;

use candle_core::{Device, Tensor};
use lora_ops::Ids;
use lora_ops::attention::first_visible_keys;
use lora_ops::dropout::Dropout;
use lora_ops::rope::RopeTable;
use lora_spec::{Document, MicroBatch};

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
    rotations: Rotations,
    first_keys: FirstKeys,
    pub(crate) dropout: Option<DropoutMasks>,
    pub(crate) shared_keys_values: SharedKeysValues,
    pub(crate) layer_inputs: LayerInputs,
}

/// The tables of the base's rotary embeddings.
pub(crate) enum Rotations {
    /// A row of a table is a position; all sequences have the same positions.
    Shared(Vec<Arc<RopeTable>>),
    /// A row of a table is a token: packed sequences have several documents.
    OfTokens(Vec<RopeTable>),
}

/// By sliding window (`None`: none): the first visible key of each query. Where it is the first key
/// of the sequence, there is no entry.
#[derive(Default)]
pub(crate) struct FirstKeys(HashMap<Option<usize>, Ids>);

/// The dropout masks of all modules in one step.
pub(crate) struct DropoutMasks {
    options: PassOptions,
    /// Dataset index and position of each token.
    tokens: Ids,
}

impl<'a> Pass<'a> {
    /// Creates a pass without dropout.
    pub(crate) fn new(
        adapter: Option<&'a Adapter>,
        positions: Positions,
        rotations: Rotations,
        first_keys: FirstKeys,
    ) -> Self {
        let (shared_keys_values, layer_inputs) = Default::default();
        Self { adapter, positions, rotations, first_keys, dropout: None, shared_keys_values, layer_inputs }
    }
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
        self.first_keys.0.get(&sliding_window).or_else(|| self.first_keys.0.get(&None))
    }

    /// Applies the rotary embedding with this index to queries or keys
    /// `[tokens, heads * head_dim]`, in place. `None`: they stay as they are.
    pub(crate) fn rotate(&self, x: &Tensor, rope: Option<usize>) -> Result<(), ModelError> {
        let Some(rope) = rope else { return Ok(()) };
        let (table, seq) = self.rotation(rope);
        Ok(table.forward(x, seq, self.positions.past)?)
    }

    /// Converts the gradient of rotated queries or keys into that of the original ones, in place.
    pub(crate) fn rotate_backward(&self, dx: &Tensor, rope: Option<usize>) -> Result<(), ModelError> {
        let Some(rope) = rope else { return Ok(()) };
        let (table, seq) = self.rotation(rope);
        Ok(table.backward(dx, seq)?)
    }

    /// The table of a rotary embedding, and the number of its rows that repeat.
    fn rotation(&self, rope: usize) -> (&RopeTable, usize) {
        match &self.rotations {
            Rotations::Shared(tables) => (&tables[rope], self.positions.seq),
            Rotations::OfTokens(tables) => (&tables[rope], self.positions.batch * self.positions.seq),
        }
    }
}

impl DropoutMasks {
    /// Returns the masks of a training pass over `batch`; `None`: it has no dropout.
    pub(crate) fn new(
        batch: &MicroBatch,
        options: PassOptions,
        device: &Device,
    ) -> Result<Option<Self>, ModelError> {
        if options.dropout == 0.0 {
            return Ok(None);
        }
        let of_token =
            |(at, document): (usize, Document)| [document.sample as u32, (at - document.start) as u32];
        let tokens = Ids::new(batch.documents().flat_map(of_token).collect::<Vec<_>>(), device)?;
        Ok(Some(Self { options, tokens }))
    }

    /// Returns the mask of a module by its full name.
    fn of(&self, module: &str) -> Dropout {
        let PassOptions { dropout, seed, step, .. } = self.options;
        Dropout::new(seed, module, step, dropout, self.tokens.clone())
    }
}

impl FirstKeys {
    /// Returns the first visible keys for each of `windows`. `documents` has a number for each
    /// token, equal within a document of a packed sequence; `None`: each sequence is one document.
    pub(crate) fn new(
        windows: impl Iterator<Item = usize>,
        positions: Positions,
        documents: Option<&[u32]>,
        device: &Device,
    ) -> Result<Self, ModelError> {
        let Positions { batch, seq, past } = positions;
        let mut first_keys = HashMap::new();
        let windows = windows.filter(|window| past + seq > *window).map(Some);
        for window in windows.chain(documents.is_some().then_some(None)) {
            if let Entry::Vacant(entry) = first_keys.entry(window) {
                let all = first_visible_keys(batch, past + seq, window, documents);
                let queries = all.chunks(past + seq).flat_map(|row| &row[past..]).copied();
                entry.insert(Ids::new(queries.collect::<Vec<u32>>(), device)?);
            }
        }
        Ok(Self(first_keys))
    }
}
