//! The trained parameters: LoRA matrices in one flat f32 buffer, block after block.

use std::ops::Range;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use lora_ops::lora::LoraPair;
use lora_ops::pointwise::{round_into, zero};
use lora_ops::transfer::{from_vec, to_device, to_vec, zeros};
use lora_spec::{AdapterSpec, LinearModule, ModelConfig, Philox};

use crate::block::Block;
use crate::{Base, ModelError};

/// Where each matrix of an adapter lies in a flat buffer. A block's matrices are contiguous.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdapterLayout {
    /// Adapted modules in the order of computation.
    pub modules: Vec<AdaptedModule>,
    /// Elements in all.
    pub len: usize,
    layers: usize,
}

/// One adapted module.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdaptedModule {
    /// The frozen module under it.
    pub module: LinearModule,
    /// Rank.
    pub r: usize,
    /// `lora_A.weight` `[r, in_features]`.
    pub a: Range<usize>,
    /// `lora_B.weight` `[out_features, r]`.
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

    /// Decoder blocks of the model, adapted or not.
    pub(crate) fn layers(&self) -> usize {
        self.layers
    }

    /// Name in a PEFT file, shape and place of every matrix.
    pub fn tensors(&self) -> impl Iterator<Item = (String, [usize; 2], Range<usize>)> {
        self.modules.iter().flat_map(|slot| {
            let name = |matrix: &str| format!("base_model.model.{}.lora_{matrix}.weight", slot.module.name);
            [
                (name("A"), [slot.r, slot.module.in_features], slot.a.clone()),
                (name("B"), [slot.module.out_features, slot.r], slot.b.clone()),
            ]
        })
    }

    /// Where a block's matrices lie.
    pub fn block(&self, layer: usize) -> Range<usize> {
        let of = |slot: &&AdaptedModule| slot.module.layer == layer;
        let first = self.modules.iter().find(of).map_or(0, |slot| slot.a.start);
        first..self.modules.iter().rfind(of).map_or(first, |slot| slot.b.end)
    }

    /// Name of the matrix that element `index` belongs to.
    pub fn name_of(&self, index: usize) -> String {
        self.tensors()
            .find(|(_, _, range)| range.contains(&index))
            .map_or_else(String::new, |(name, ..)| name)
    }

    /// Views of a flat buffer, `[block][projection]`.
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

/// An adapter over a base: its parameters and how they are applied, `W0 + s B A`.
#[derive(Debug)]
pub struct Adapter {
    layout: Arc<AdapterLayout>,
    params: Tensor,
    compute: ComputeMatrices,
    /// What is taken off the base: `W0 - s B0 A0` is frozen.
    initial: Option<(Tensor, ComputeMatrices)>,
    scaling: f64,
}

/// Matrices as they are computed with.
#[derive(Debug, Clone)]
struct ComputeMatrices {
    /// The parameters in the type of the activations; themselves where that is f32.
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
    /// A new adapter as PEFT initializes one: `A` uniform in ±1/sqrt(in_features) (Kaiming's rule with `a = sqrt(5)`),
    /// `B` zero. Every element is a pure function of the seed, its module and its place.
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

    /// An adapter on the CPU with given parameters (`layout.len` of them).
    pub fn from_params(
        layout: Arc<AdapterLayout>,
        params: Vec<f32>,
        scaling: f64,
    ) -> Result<Self, ModelError> {
        let params = Tensor::from_vec(params, layout.len, &Device::Cpu)?;
        Self::assemble(layout, params, None, DType::F32, scaling)
    }

    /// The adapter, and its parameters as they are taken off the base: together they change nothing.
    pub fn with_initial_subtracted(self) -> Result<Self, ModelError> {
        let initial_params = from_vec(to_vec::<f32>(&self.params)?, self.layout.len, self.params.device())?;
        Self::assemble(self.layout, self.params, Some(initial_params), DType::F32, self.scaling)
    }

    /// The adapter where `base` is, and computing in the type of its activations.
    pub fn to_device_of(self, base: &Base) -> Result<Self, ModelError> {
        let there = |params: &Tensor| to_device(params, base.device());
        let initial = self.initial.as_ref().map(|(initial_params, _)| there(initial_params)).transpose()?;
        Self::assemble(self.layout, there(&self.params)?, initial, base.activation_dtype(), self.scaling)
    }

    /// An adapter of this one's form and place with other parameters, in the same layout; `initial`: other ones of what is taken
    /// off the base too.
    pub fn with_params(&self, params: Vec<f32>, initial: Option<Vec<f32>>) -> Result<Self, ModelError> {
        let there = |params: Vec<f32>| from_vec(params, self.layout.len, self.params.device());
        let kept = self.initial.as_ref().map(|(initial_params, _)| initial_params.clone());
        let initial = initial.map(there).transpose()?.or(kept);
        let dtype = self.compute.flat.dtype();
        Self::assemble(self.layout.clone(), there(params)?, initial, dtype, self.scaling)
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

    /// Makes the computation use the parameters as they are now; to be called whenever they were changed.
    pub fn refresh(&self) -> Result<(), ModelError> {
        self.compute.refresh(&self.params)
    }

    /// Where each matrix lies in `params`.
    pub fn layout(&self) -> &Arc<AdapterLayout> {
        &self.layout
    }

    /// The flat parameters, f32 `[layout.len]`.
    pub fn params(&self) -> &Tensor {
        &self.params
    }

    /// The parameters of what is taken off the base, f32 `[layout.len]`.
    pub fn initial(&self) -> Option<&Tensor> {
        self.initial.as_ref().map(|(initial_params, _)| initial_params)
    }

    /// The factor of `B A`.
    pub fn scaling(&self) -> f64 {
        self.scaling
    }

    /// The adapters of a block, by projection.
    pub(crate) fn block(&self, layer: usize) -> &[Option<LoraPair>] {
        &self.compute.pairs[layer]
    }

    /// What is taken off a block's weights, by projection.
    pub(crate) fn initial_block(&self, layer: usize) -> Option<&[Option<LoraPair>]> {
        self.initial.as_ref().map(|(_, compute)| compute.pairs[layer].as_slice())
    }

    /// The adapter of a module by its full name.
    pub(crate) fn pair(&self, module: &str) -> Option<&LoraPair> {
        let slot = self.layout.modules.iter().find(|slot| slot.module.name == module)?;
        self.compute.pairs[slot.module.layer][slot.projection].as_ref()
    }
}

/// Fills `values` with uniform numbers in ±`bound`, each a pure function of its place.
pub(crate) fn fill_uniform(values: &mut [f32], philox: &Philox, bound: f32) {
    for (block, values) in values.chunks_mut(4).enumerate() {
        let words = philox.words([block as u32, (block >> 32) as u32, 0, 0]);
        for (value, word) in values.iter_mut().zip(words) {
            *value = (2.0 * Philox::unit(word) - 1.0) * bound;
        }
    }
}

/// Gradients of an adapter's parameters in its layout.
#[derive(Debug)]
pub struct Gradients {
    flat: Tensor,
    pairs: Vec<Vec<Option<LoraPair>>>,
}

impl Gradients {
    /// Zero gradients on `device`.
    pub fn zeros(layout: &AdapterLayout, device: &Device) -> Result<Self, ModelError> {
        let flat = zeros(layout.len, DType::F32, device)?;
        let pairs = layout.pairs(&flat)?;
        Ok(Self { flat, pairs })
    }

    /// Makes them zero again.
    pub fn clear(&self) -> Result<(), ModelError> {
        Ok(zero(&self.flat)?)
    }

    /// The flat gradients, f32 `[layout.len]`.
    pub fn flat(&self) -> &Tensor {
        &self.flat
    }

    pub(crate) fn block(&self, layer: usize) -> &[Option<LoraPair>] {
        &self.pairs[layer]
    }
}
