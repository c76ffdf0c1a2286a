//! The trained parameters: LoRA matrices in one flat f32 buffer, ordered by block.

use std::ops::Range;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use lora_ops::lora::LoraPair;
use lora_ops::pointwise::{round_into, zero};
use lora_ops::transfer::{from_vec, to_device, to_vec, zeros};
use lora_spec::{AdapterSpec, LinearModule, ModelConfig, Philox};

use crate::block::Block;
use crate::{Base, ModelError};

/// The layout of an adapter's matrices in a flat buffer. The matrices of a block are contiguous.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdapterLayout {
    /// Adapted modules in the order of computation.
    pub modules: Vec<AdaptedModule>,
    /// Total number of elements.
    pub len: usize,
    layers: usize,
}

/// One adapted module.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdaptedModule {
    /// The frozen module below the adapter.
    pub module: LinearModule,
    /// Rank.
    pub r: usize,
    /// Elements of `lora_A.weight` `[r, in_features]`.
    pub a: Range<usize>,
    /// Elements of `lora_B.weight` `[out_features, r]`.
    pub b: Range<usize>,
    projection: usize,
}

impl AdapterLayout {
    /// Lays out an adapter of rank `r` on `modules` (in the order of computation) of `model`.
    pub fn new(model: &ModelConfig, modules: &[LinearModule], r: usize) -> Self {
        let all = model.linear_modules();
        let mut len = 0;
        let mut take = |n: usize| {
            len += n;
            len - n..len
        };
        let modules = all
            .iter()
            .enumerate()
            .filter(|(_, module)| modules.contains(module))
            .map(|(i, module)| AdaptedModule {
                module: module.clone(),
                r,
                a: take(r * module.in_features),
                b: take(module.out_features * r),
                projection: i % Block::PROJECTIONS,
            })
            .collect();
        Self { modules, len, layers: model.num_hidden_layers }
    }

    /// Number of decoder blocks of the model, adapted or not.
    pub(crate) fn layers(&self) -> usize {
        self.layers
    }

    /// Iterates over all matrices: name in a PEFT file, shape, and range in the flat buffer.
    pub fn tensors(&self) -> impl Iterator<Item = (String, [usize; 2], Range<usize>)> {
        self.modules.iter().flat_map(|slot| {
            let name = |matrix: &str| format!("base_model.model.{}.lora_{matrix}.weight", slot.module.name);
            [
                (name("A"), [slot.r, slot.module.in_features], slot.a.clone()),
                (name("B"), [slot.module.out_features, slot.r], slot.b.clone()),
            ]
        })
    }

    /// Returns the range of a block's matrices. It is empty if the block has none.
    pub fn block(&self, layer: usize) -> Range<usize> {
        let of = |slot: &&AdaptedModule| slot.module.layer == layer;
        let first = self.modules.iter().find(of).map_or(0, |slot| slot.a.start);
        first..self.modules.iter().rfind(of).map_or(first, |slot| slot.b.end)
    }

    /// Returns the name of the matrix that element `index` belongs to.
    pub fn name_of(&self, index: usize) -> String {
        self.tensors()
            .find(|(_, _, range)| range.contains(&index))
            .map_or_else(String::new, |(name, ..)| name)
    }

    /// Returns the matrices as views of a flat buffer, `[block][projection]`.
    fn pairs(&self, flat: &Tensor) -> Result<Vec<Vec<Option<LoraPair>>>, ModelError> {
        let mut pairs = vec![vec![None; Block::PROJECTIONS]; self.layers];
        for slot in &self.modules {
            let view = |range: &Range<usize>, rows: usize, cols: usize| {
                flat.narrow(0, range.start, range.len())?.reshape((rows, cols))
            };
            let a = view(&slot.a, slot.r, slot.module.in_features)?;
            let b = view(&slot.b, slot.module.out_features, slot.r)?;
            pairs[slot.module.layer][slot.projection] = Some(LoraPair { a, b });
        }
        Ok(pairs)
    }
}

/// An adapter over a base: the parameters and the scaling `s` of `W0 + s B A`.
#[derive(Debug)]
pub struct Adapter {
    layout: Arc<AdapterLayout>,
    params: Tensor,
    compute: ComputeMatrices,
    /// The initial adapter, which is subtracted from the base: `W0 - s B0 A0` is frozen.
    initial: Option<(Tensor, ComputeMatrices)>,
    scaling: f64,
}

/// The matrices in the type of the activations.
#[derive(Debug, Clone)]
struct ComputeMatrices {
    /// The parameters in the type of the activations. If that is f32, this is the tensor of the
    /// parameters itself.
    flat: Tensor,
    pairs: Vec<Vec<Option<LoraPair>>>,
}

impl ComputeMatrices {
    fn new(layout: &AdapterLayout, params: &Tensor, dtype: DType) -> Result<Self, ModelError> {
        let flat = match dtype {
            DType::F32 => params.clone(),
            dtype => zeros(layout.len, dtype, params.device())?,
        };
        let compute = Self { pairs: layout.pairs(&flat)?, flat };
        compute.refresh(params)?;
        Ok(compute)
    }

    fn refresh(&self, params: &Tensor) -> Result<(), ModelError> {
        if self.flat.dtype() != DType::F32 {
            round_into(params, &self.flat)?;
        }
        Ok(())
    }
}

impl Adapter {
    /// Creates an adapter on the CPU as PEFT initializes it: `A` is uniform in ±1/sqrt(in_features)
    /// (Kaiming uniform with `a = sqrt(5)`), `B` is zero. Every element is a pure function of the
    /// seed, its module and its index.
    pub fn new(model: &ModelConfig, spec: &AdapterSpec, seed: u64) -> Result<Self, ModelError> {
        let modules = spec.target_modules.resolve(model)?;
        let layout = AdapterLayout::new(model, &modules, spec.r);
        let mut params = vec![0.0; layout.len];
        for slot in &layout.modules {
            let philox = Philox::new(seed, &format!("init {}.lora_A", slot.module.name));
            let bound = 1.0 / (slot.module.in_features as f32).sqrt();
            fill_uniform(&mut params[slot.a.clone()], &philox, bound);
        }
        Self::from_params(Arc::new(layout), params, spec.scaling())
    }

    /// Creates an adapter on the CPU with the given parameters (`layout.len` elements).
    pub fn from_params(
        layout: Arc<AdapterLayout>,
        params: Vec<f32>,
        scaling: f64,
    ) -> Result<Self, ModelError> {
        let params = Tensor::from_vec(params, layout.len, &Device::Cpu)?;
        Self::assemble(layout, params, None, DType::F32, scaling)
    }

    /// Adds a copy of the current parameters as the initial term, which is subtracted from the
    /// base. Until the parameters change, the adapter therefore does not change the base's outputs.
    pub fn with_initial_subtracted(self) -> Result<Self, ModelError> {
        let initial_params = from_vec(to_vec::<f32>(&self.params)?, self.layout.len, self.params.device())?;
        Self::assemble(self.layout, self.params, Some(initial_params), DType::F32, self.scaling)
    }

    /// Copies the adapter to the device of `base`, with matrices in the type of its activations.
    pub fn to_device_of(self, base: &Base) -> Result<Self, ModelError> {
        let copy = |params: &Tensor| to_device(params, base.device());
        let initial = self.initial.as_ref().map(|(initial_params, _)| copy(initial_params)).transpose()?;
        Self::assemble(self.layout, copy(&self.params)?, initial, base.activation_dtype(), self.scaling)
    }

    /// Returns an adapter with other parameters, and the same layout, device and dtypes. `initial`
    /// replaces the parameters of the initial term; `None` keeps them.
    pub fn with_params(&self, params: Vec<f32>, initial: Option<Vec<f32>>) -> Result<Self, ModelError> {
        let to_tensor = |params: Vec<f32>| from_vec(params, self.layout.len, self.params.device());
        let kept = self.initial.as_ref().map(|(initial_params, _)| initial_params.clone());
        let initial = initial.map(to_tensor).transpose()?.or(kept);
        let dtype = self.compute.flat.dtype();
        Self::assemble(self.layout.clone(), to_tensor(params)?, initial, dtype, self.scaling)
    }

    fn assemble(
        layout: Arc<AdapterLayout>,
        params: Tensor,
        initial: Option<Tensor>,
        dtype: DType,
        scaling: f64,
    ) -> Result<Self, ModelError> {
        let compute = ComputeMatrices::new(&layout, &params, dtype)?;
        let initial = initial
            .map(|initial_params| {
                Ok::<_, ModelError>((
                    initial_params.clone(),
                    ComputeMatrices::new(&layout, &initial_params, dtype)?,
                ))
            })
            .transpose()?;
        Ok(Self { layout, params, compute, initial, scaling })
    }

    /// Updates the matrices in the type of the activations. Must be called after every change of
    /// the parameters.
    pub fn refresh(&self) -> Result<(), ModelError> {
        self.compute.refresh(&self.params)
    }

    /// Returns the layout of the matrices in `params`.
    pub fn layout(&self) -> &Arc<AdapterLayout> {
        &self.layout
    }

    /// Returns the flat parameters, f32 `[layout.len]`.
    pub fn params(&self) -> &Tensor {
        &self.params
    }

    /// Returns the parameters of the initial term, which is subtracted from the base, f32
    /// `[layout.len]`.
    pub fn initial(&self) -> Option<&Tensor> {
        self.initial.as_ref().map(|(initial_params, _)| initial_params)
    }

    /// Returns the factor of `B A`.
    pub fn scaling(&self) -> f64 {
        self.scaling
    }

    /// Returns the adapters of a block, by projection.
    pub(crate) fn block(&self, layer: usize) -> &[Option<LoraPair>] {
        &self.compute.pairs[layer]
    }

    /// Returns the initial adapters that are subtracted from a block's weights, by projection.
    pub(crate) fn initial_block(&self, layer: usize) -> Option<&[Option<LoraPair>]> {
        self.initial.as_ref().map(|(_, compute)| compute.pairs[layer].as_slice())
    }

    /// Returns the adapter of a module by its full name.
    pub(crate) fn pair(&self, module: &str) -> Option<&LoraPair> {
        let slot = self.layout.modules.iter().find(|slot| slot.module.name == module)?;
        self.compute.pairs[slot.module.layer][slot.projection].as_ref()
    }
}

/// Fills `values` with uniform numbers in ±`bound`. Each is a pure function of its index.
pub(crate) fn fill_uniform(values: &mut [f32], philox: &Philox, bound: f32) {
    for (block, values) in values.chunks_mut(4).enumerate() {
        let words = philox.words([block as u32, (block >> 32) as u32, 0, 0]);
        for (value, word) in values.iter_mut().zip(words) {
            *value = (2.0 * Philox::unit(word) - 1.0) * bound;
        }
    }
}

/// Gradients of an adapter's parameters, in the adapter's layout.
#[derive(Debug)]
pub struct Gradients {
    flat: Tensor,
    pairs: Vec<Vec<Option<LoraPair>>>,
}

impl Gradients {
    /// Creates zero gradients on `device`.
    pub fn zeros(layout: &AdapterLayout, device: &Device) -> Result<Self, ModelError> {
        let flat = zeros(layout.len, DType::F32, device)?;
        let pairs = layout.pairs(&flat)?;
        Ok(Self { flat, pairs })
    }

    /// Sets all gradients to zero.
    pub fn clear(&self) -> Result<(), ModelError> {
        Ok(zero(&self.flat)?)
    }

    /// Returns the flat gradients, f32 `[layout.len]`.
    pub fn flat(&self) -> &Tensor {
        &self.flat
    }

    pub(crate) fn block(&self, layer: usize) -> &[Option<LoraPair>] {
        &self.pairs[layer]
    }
}
