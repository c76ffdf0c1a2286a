//! The forward pass of training, evaluation and generation, and the inputs that its blocks share.

use std::collections::HashMap;
use std::sync::Arc;

use candle_core::Tensor;
use lora_ops::Ids;
use lora_ops::attention::first_visible_keys;
use lora_ops::dropout::Dropout;
use lora_ops::rope::RopeTable;
use lora_spec::Rope;

use crate::attention::KvCache;
use crate::block::Activations;
use crate::projection::{Linear, Projection};
use crate::{Adapter, Base, ModelError, PassOptions};

/// The positions of a pass: in each of `batch` sequences, `seq` tokens after `past` tokens whose
/// keys and values are in a cache.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Positions {
    pub(crate) batch: usize,
    pub(crate) seq: usize,
    pub(crate) past: usize,
}

/// A pass of a base with an adapter over some tokens.
pub(crate) struct Pass<'a> {
    pub(crate) base: &'a Base,
    adapter: Option<&'a Adapter>,
    pub(crate) positions: Positions,
    /// The tables of the rotary embeddings of the blocks.
    ropes: Vec<(Rope, Arc<RopeTable>)>,
    /// By sliding window: first visible key of each query. Windows that are not shorter than the
    /// sequences have no entry.
    first_keys: HashMap<usize, Ids>,
    dropout: Option<DropoutMasks>,
}

/// The dropout masks of all modules in one step.
struct DropoutMasks {
    options: PassOptions,
    /// Dataset row and position of each token.
    tokens: Ids,
}

impl<'a> Pass<'a> {
    /// Prepares a pass without dropout.
    pub(crate) fn new(
        base: &'a Base,
        adapter: Option<&'a Adapter>,
        positions: Positions,
    ) -> Result<Self, ModelError> {
        let ropes = base.ropes(positions.past + positions.seq)?;
        Ok(Self { first_keys: first_keys(base, positions)?, base, adapter, positions, ropes, dropout: None })
    }

    /// Adds the dropout of a training pass. `rows` has the dataset index of each sequence.
    pub(crate) fn with_dropout(mut self, rows: &[u64], options: PassOptions) -> Result<Self, ModelError> {
        if options.dropout > 0.0 {
            let seq = self.positions.seq as u32;
            let tokens =
                rows.iter().flat_map(|&row| (0..seq).flat_map(move |position| [row as u32, position]));
            let tokens = Ids::new(tokens.collect::<Vec<_>>(), self.base.device())?;
            self.dropout = Some(DropoutMasks { options, tokens });
        }
        Ok(self)
    }

    /// Computes the hidden states after the last block, `[tokens, hidden]`. `caches` has one cache
    /// for each block. `save` takes the index, the input and the activations of each block.
    pub(crate) fn forward(
        &self,
        tokens: &[u32],
        mut caches: Option<&mut [KvCache]>,
        mut save: impl FnMut(usize, Tensor, Activations),
    ) -> Result<Tensor, ModelError> {
        let mut x = self.base.embed(tokens)?;
        for (layer, block) in self.base.blocks.iter().enumerate() {
            let cache = caches.as_deref_mut().map(|caches| &mut caches[layer]);
            let (y, activations) = block.forward(&x, self, cache)?;
            save(layer, x, activations);
            x = y;
        }
        Ok(x)
    }

    /// Returns the view of a linear module in this pass.
    pub(crate) fn projection(&self, linear: &'a Linear) -> Projection<'_> {
        let adapter = self.adapter.and_then(|adapter| adapter.terms(&linear.name));
        let dropout = self.dropout.as_ref().filter(|_| adapter.is_some());
        Projection::new(linear, adapter, dropout.map(|masks| masks.of(&linear.name)))
    }

    /// Returns the first visible key of each query for a sliding window; `None`: the first key of
    /// its sequence.
    pub(crate) fn first_keys(&self, sliding_window: Option<usize>) -> Option<&Ids> {
        self.first_keys.get(&sliding_window?)
    }

    /// Applies a rotary embedding of the base to queries or keys `[tokens, heads * head_dim]`, in
    /// place. `None`: they stay as they are.
    pub(crate) fn rotate(&self, x: &Tensor, rope: Option<Rope>) -> Result<(), ModelError> {
        let Some(table) = self.table(rope) else { return Ok(()) };
        Ok(table.forward(x, self.positions.seq, self.positions.past)?)
    }

    /// Converts the gradient of rotated queries or keys into that of the original ones, in place.
    pub(crate) fn rotate_backward(&self, dx: &Tensor, rope: Option<Rope>) -> Result<(), ModelError> {
        let Some(table) = self.table(rope) else { return Ok(()) };
        Ok(table.backward(dx, self.positions.seq)?)
    }

    fn table(&self, rope: Option<Rope>) -> Option<&RopeTable> {
        self.ropes.iter().find(|(of, _)| Some(*of) == rope).map(|(_, table)| &**table)
    }
}

impl DropoutMasks {
    /// Returns the mask of a module by its full name.
    fn of(&self, module: &str) -> Dropout {
        let PassOptions { dropout, seed, step, .. } = self.options;
        Dropout::new(seed, module, step, dropout, self.tokens.clone())
    }
}

/// Returns for each sliding window of `base` the first visible key of each query.
fn first_keys(base: &Base, positions: Positions) -> Result<HashMap<usize, Ids>, ModelError> {
    let Positions { batch, seq, past } = positions;
    let mut first_keys = HashMap::new();
    for window in base.blocks.iter().filter_map(|block| block.attn.sliding_window) {
        if past + seq > window && !first_keys.contains_key(&window) {
            let all = first_visible_keys(batch, past + seq, Some(window), None);
            let queries: Vec<u32> = all.chunks(past + seq).flat_map(|row| &row[past..]).copied().collect();
            first_keys.insert(window, Ids::new(queries, base.device())?);
        }
    }
    Ok(first_keys)
}
