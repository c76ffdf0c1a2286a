//! Adapters that are initialized from the base's weights, as with PEFT's `init_lora_weights`, and
//! the weights that LoftQ requantizes.

use std::collections::HashMap;

use candle_core::{Device, Tensor};
use lora_ops::gemm::{no_trans, product};
use lora_ops::linear::Weight;
use lora_ops::read_f32;
use lora_spec::{
    AdapterSpec, BaseLayout, InitLoraWeights, Loftq, MAX_CONCURRENT_DECOMPOSITIONS, ModelConfig, Philox,
    SafetensorsError, SafetensorsIndex, SourceDir,
};
use rayon::prelude::*;

use crate::adapter::AdaptedModule;
use crate::svd::{LowRankFactors, randomized_svd, truncated_qr, truncated_svd};
use crate::weights::{WeightReader, quantize};
use crate::{Adapter, Base, ModelError};

impl Adapter {
    /// Initializes the adapter of `spec` over `base`, on the CPU. `dir` has the files of the base,
    /// which LoftQ reads. On machines of the same kind the
    /// result is a pure function of base, `spec` and seed.
    ///
    /// # Errors
    /// The rank or the base does not fit the method of initialization, or a weight is not finite.
    pub fn init(base: &Base, dir: &SourceDir, spec: &AdapterSpec, seed: u64) -> Result<Self, ModelError> {
        let fresh = Self::new(&base.config, spec, seed)?;
        let init = spec.init_lora_weights;
        if init == InitLoraWeights::Default {
            return Ok(fresh);
        }
        spec.modules(&base.config)?;
        let original = match init {
            InitLoraWeights::Loftq => Some(SafetensorsIndex::open(dir)?),
            _ => None,
        };
        if let Some(index) = &original {
            spec.check_base(&base.config, index)?;
        }
        let original = original.as_ref().map(|index| WeightReader::open(index, &Device::Cpu)).transpose()?;

        let scaling = spec.scaling();
        let factors = |adapted: &AdaptedModule| -> Result<LowRankFactors, ModelError> {
            let module = &adapted.module.name;
            let weight = base.dense_weight(module)?;
            let r = spec.r;
            let factors = match (init, &original) {
                (InitLoraWeights::Olora, _) => truncated_qr(&weight, r),
                (InitLoraWeights::PissaNiter(rounds), _) => {
                    let philox = Philox::new(seed, &format!("init {module}.pissa"));
                    randomized_svd(&weight, r, scaling, rounds, &philox)
                }
                // LoftQ starts from the quantization error.
                (_, Some(reader)) => {
                    truncated_svd(&(reader.dense(&format!("{module}.weight"))? - weight)?, r, scaling)
                }
                (_, None) => truncated_svd(&weight, r, scaling),
            };
            factors.map_err(|error| named(dir, module, &error))
        };
        let layout = fresh.layout().clone();
        let mut params = vec![0.0; layout.len];
        for modules in layout.modules.chunks(MAX_CONCURRENT_DECOMPOSITIONS) {
            let found = modules.par_iter().map(factors).collect::<Result<Vec<_>, _>>()?;
            for (adapted, LowRankFactors { a, b }) in modules.iter().zip(&found) {
                for (range, matrix) in [(&adapted.a, a), (&adapted.b, b)] {
                    params[range.clone()].copy_from_slice(&read_f32(matrix)?);
                }
            }
        }
        let adapter = Self::from_params(layout, params, scaling)?;
        if init.subtracts_initial() { adapter.with_initial_subtracted() } else { Ok(adapter) }
    }
}

fn named(dir: &SourceDir, module: &str, error: &candle_core::Error) -> ModelError {
    let message = format!("tensor {module}.weight: {error}");
    SafetensorsError { name: dir.name().to_owned(), message }.into()
}

/// Returns the weights that LoftQ requantizes for `layout`, by the names of their modules. The map
/// is empty if `layout` does not use LoftQ.
pub(crate) fn loftq_weights(
    reader: &WeightReader,
    model: &ModelConfig,
    layout: &BaseLayout,
) -> Result<HashMap<String, Weight>, ModelError> {
    let Some(Loftq { rounds, r, target_modules }) = &layout.loftq else { return Ok(HashMap::new()) };
    let modules = target_modules.resolve(model)?;
    let mut weights = HashMap::new();
    for modules in modules.chunks(MAX_CONCURRENT_DECOMPOSITIONS) {
        let found = modules.par_iter().map(|module| {
            let name = format!("{}.weight", module.name);
            let weight = requantize(&reader.dense(&name)?, *rounds, *r, layout);
            Ok((module.name.clone(), weight.map_err(|e| reader.tensor_error(&name, e.to_string()))?))
        });
        weights.extend(found.collect::<Result<Vec<_>, ModelError>>()?);
    }
    Ok(weights)
}

/// LoftQ (arXiv 2310.08659, algorithm 1): alternately quantizes the residual, and computes the
/// matrix of rank `r` that is nearest to the quantization error. Returns the last quantized
/// residual.
fn requantize(weight: &Tensor, rounds: u32, r: usize, layout: &BaseLayout) -> candle_core::Result<Weight> {
    let shape = weight.dims2()?;
    let quantized = |residual: &Tensor| quantize(&read_f32(residual)?, shape, layout.format.quantization);
    let mut result = quantized(weight)?;
    for _ in 1..rounds {
        let LowRankFactors { a, b } = truncated_svd(&(weight - result.dense()?)?, r, 1.0)?;
        let residual = weight.copy()?;
        product(-1.0, no_trans(&b), no_trans(&a), 1.0, &residual)?;
        result = quantized(&residual)?;
    }
    Ok(result)
}
