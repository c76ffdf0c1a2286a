//! The trained parameters: LoRA matrices in one flat f32 buffer, ordered by block.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use lora_ops::lora::LoraPair;
use lora_ops::pointwise::{round_into, zero};
use lora_ops::transfer::{from_vec, to_device, to_vec, zeros};
use lora_spec::{AdapterSpec, LinearModule, ModelConfig, Philox};

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
    /// The name of the module in PEFT's files, after `base_model.model.`.
    pub path: String,
    /// Rank.
    pub r: usize,
    /// Elements of `lora_A.weight` `[r, in_features]`.
    pub a: Range<usize>,
    /// Elements of `lora_B.weight` `[out_features, r]`.
    pub b: Range<usize>,
}

impl AdapterLayout {
    /// Lays out an adapter of rank `r` on `modules` (in the order of computation) of `model`.
    pub fn new(model: &ModelConfig, modules: &[LinearModule], r: usize) -> Self {
        let mut len = 0;
        let mut take = |n: usize| {
            len += n;
            len - n..len
        };
        let adapted = model.linear_modules().into_iter().filter(|module| modules.contains(module));
        let modules = adapted
            .map(|module| AdaptedModule {
                r,
                a: take(r * module.in_features),
                b: take(module.out_features * r),
                path: model.module_path(&module),
                module,
            })
            .collect();
        Self { modules, len, layers: model.layers.len() }
    }

    /// Number of decoder blocks of the model, adapted or not.
    pub(crate) fn layers(&self) -> usize {
        self.layers
    }

    /// Whether the adapted modules are in the text tower of a multimodal model.
    pub(crate) fn is_multimodal(&self) -> bool {
        self.modules.iter().any(|adapted| adapted.path != adapted.module.name)
    }

    /// Iterates over all matrices: name in a PEFT file, shape, and range in the flat buffer.
    pub fn tensors(&self) -> impl Iterator<Item = (String, [usize; 2], Range<usize>)> {
        self.modules.iter().flat_map(|AdaptedModule { module, path, r, a, b }| {
            let name = |matrix| peft_name(path, matrix);
            [
                (name("A"), [*r, module.in_features], a.clone()),
                (name("B"), [module.out_features, *r], b.clone()),
            ]
        })
    }

    /// Returns the range of a block's matrices. It is empty if the block has none.
    pub fn block(&self, layer: usize) -> Range<usize> {
        let in_block = |adapted: &&AdaptedModule| adapted.module.layer == layer;
        let start = self.modules.iter().find(in_block).map_or(0, |first| first.a.start);
        start..self.modules.iter().rfind(in_block).map_or(start, |last| last.b.end)
    }

    /// Returns the name of the matrix that element `index` belongs to.
    pub fn name_of(&self, index: usize) -> String {
        self.tensors()
            .find(|(_, _, range)| range.contains(&index))
            .map_or_else(String::new, |(name, ..)| name)
    }

    /// Returns the matrices as views of a flat buffer, by the names of their modules.
    fn pairs(&self, flat: &Tensor) -> Result<HashMap<String, LoraPair>, ModelError> {
        let view = |range: &Range<usize>, rows: usize, cols: usize| {
            flat.narrow(0, range.start, range.len())?.reshape((rows, cols))
        };
        let pair = |AdaptedModule { module, r, a, b, .. }: &AdaptedModule| {
            let pair = LoraPair { a: view(a, *r, module.in_features)?, b: view(b, module.out_features, *r)? };
            Ok((module.name.clone(), pair))
        };
        self.modules.iter().map(pair).collect()
    }
}

/// Returns the name of a matrix, `A` or `B`, of a module in PEFT's files.
pub(crate) fn peft_name(module: &str, matrix: &str) -> String {
    format!("base_model.model.{module}.lora_{matrix}.weight")
}

/// An adapter over a base: the parameters and the scaling `s` of `W0 + s B A`.
#[derive(Debug)]
pub struct Adapter {
    layout: Arc<AdapterLayout>,
    trained: AdapterMatrices,
    /// The initial adapter, which is subtracted from the base: `W0 - s B0 A0` is frozen.
    initial: Option<AdapterMatrices>,
    scaling: f64,
}

/// The terms `s B A - s B0 A0` that an adapter adds to the frozen weight of one module.
#[derive(Debug, Clone, Copy)]
pub(crate) struct AdapterTerms<'a> {
    /// `A` and `B`.
    pub(crate) trained: &'a LoraPair,
    /// `A0` and `B0`.
    pub(crate) initial: Option<&'a LoraPair>,
    /// `s`.
    pub(crate) scaling: f64,
}

/// The matrices of all modules.
#[derive(Debug)]
struct AdapterMatrices {
    /// f32 `[layout.len]`.
    params: Tensor,
    /// The parameters in the type of the activations. If that is f32, this is `params` itself.
    rounded: Tensor,
    /// Views of `rounded`, by the names of their modules.
    pairs: HashMap<String, LoraPair>,
}

impl AdapterMatrices {
    fn new(layout: &AdapterLayout, params: Tensor, dtype: DType) -> Result<Self, ModelError> {
        let rounded = match dtype {
            DType::F32 => params.clone(),
            dtype => zeros(layout.len, dtype, params.device())?,
        };
        let matrices = Self { pairs: layout.pairs(&rounded)?, params, rounded };
        matrices.refresh()?;
        Ok(matrices)
    }

    fn refresh(&self) -> Result<(), ModelError> {
        if self.rounded.dtype() != DType::F32 {
            round_into(&self.params, &self.rounded)?;
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
        for AdaptedModule { module, a, .. } in &layout.modules {
            let philox = Philox::new(seed, &format!("init {}.lora_A", module.name));
            let bound = 1.0 / (module.in_features as f32).sqrt();
            fill_uniform(&mut params[a.clone()], &philox, bound);
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
        let params = self.trained.params;
        let copy = from_vec(to_vec::<f32>(&params)?, self.layout.len, params.device())?;
        Self::assemble(self.layout, params, Some(copy), DType::F32, self.scaling)
    }

    /// Copies the adapter to the device of `base`, with matrices in the type of its activations.
    pub fn to_device_of(self, base: &Base) -> Result<Self, ModelError> {
        let copy = |matrices: &AdapterMatrices| to_device(&matrices.params, base.device());
        let initial = self.initial.as_ref().map(copy).transpose()?;
        Self::assemble(self.layout, copy(&self.trained)?, initial, base.activation_dtype(), self.scaling)
    }

    /// Returns an adapter with other parameters, and the same layout, device and dtypes. `initial`
    /// replaces the parameters of the initial term; `None` keeps them.
    pub fn with_params(&self, params: Vec<f32>, initial: Option<Vec<f32>>) -> Result<Self, ModelError> {
        let to_tensor = |params: Vec<f32>| from_vec(params, self.layout.len, self.params().device());
        let initial = match initial {
            Some(params) => Some(to_tensor(params)?),
            None => self.initial().cloned(),
        };
        let dtype = self.trained.rounded.dtype();
        Self::assemble(self.layout.clone(), to_tensor(params)?, initial, dtype, self.scaling)
    }

    fn assemble(
        layout: Arc<AdapterLayout>,
        params: Tensor,
        initial: Option<Tensor>,
        dtype: DType,
        scaling: f64,
    ) -> Result<Self, ModelError> {
        let trained = AdapterMatrices::new(&layout, params, dtype)?;
        let initial = initial.map(|params| AdapterMatrices::new(&layout, params, dtype)).transpose()?;
        Ok(Self { layout, trained, initial, scaling })
    }

    /// Updates the matrices in the type of the activations. Must be called after every change of
    /// the parameters.
    pub fn refresh(&self) -> Result<(), ModelError> {
        self.trained.refresh()
    }

    /// Returns the layout of the matrices in `params`.
    pub fn layout(&self) -> &Arc<AdapterLayout> {
        &self.layout
    }

    /// Returns the flat parameters, f32 `[layout.len]`.
    pub fn params(&self) -> &Tensor {
        &self.trained.params
    }

    /// Returns the parameters of the initial term, which is subtracted from the base, f32
    /// `[layout.len]`.
    pub fn initial(&self) -> Option<&Tensor> {
        self.initial.as_ref().map(|initial| &initial.params)
    }

    /// Returns the factor of `B A`.
    pub fn scaling(&self) -> f64 {
        self.scaling
    }

    /// Returns the adapter's terms of a module by its full name.
    pub(crate) fn terms(&self, module: &str) -> Option<AdapterTerms<'_>> {
        let trained = self.trained.pairs.get(module)?;
        let initial = self.initial.as_ref().and_then(|initial| initial.pairs.get(module));
        Some(AdapterTerms { trained, initial, scaling: self.scaling })
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
    /// Views of `flat`, by the names of their modules.
    pairs: HashMap<String, LoraPair>,
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

    /// Returns the gradients of a module's adapter by the module's full name.
    pub(crate) fn pair(&self, module: &str) -> Option<&LoraPair> {
        self.pairs.get(module)
    }
}
