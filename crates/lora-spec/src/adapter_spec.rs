//! The adapter of a job, in PEFT's terms.

use std::ops::Bound::Unbounded;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::range::{above, check_count, check_number};
use crate::{
    FieldError, InitLoraWeights, LinearModule, ModelConfig, ModelSpec, QuantizationType, SafetensorsIndex,
    StoredWeight, TargetModules,
};

/// A LoRA adapter, in PEFT's terms.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AdapterSpec {
    /// Rank.
    pub r: usize,
    /// The update is scaled by `lora_alpha / r` (`lora_alpha / sqrt(r)` with `use_rslora`).
    pub lora_alpha: f64,
    /// Probability that an input feature of the adapter is dropped during training.
    pub lora_dropout: f64,
    /// Which linear modules get an adapter.
    pub target_modules: TargetModules,
    /// Scale by `lora_alpha / sqrt(r)` (rank-stabilized LoRA, arXiv 2312.03732).
    pub use_rslora: bool,
    /// Initialization of the adapter.
    pub init_lora_weights: InitLoraWeights,
    /// Rounds of LoftQ (`loftq_iter` of PEFT's `loftq_config`). With 2 or more, the base is
    /// quantized again for this adapter.
    pub loftq_iter: u32,
    /// Directory of an existing PEFT adapter to start from.
    pub init_from: Option<PathBuf>,
}

impl Default for AdapterSpec {
    fn default() -> Self {
        Self {
            r: 16,
            lora_alpha: 32.0,
            lora_dropout: 0.0,
            target_modules: TargetModules::default(),
            use_rslora: false,
            init_lora_weights: InitLoraWeights::Default,
            loftq_iter: 1,
            init_from: None,
        }
    }
}

impl AdapterSpec {
    /// Returns the factor of `B A` in the update (PEFT's `scaling`).
    pub fn scaling(&self) -> f64 {
        let r = self.r as f64;
        self.lora_alpha / if self.use_rslora { r.sqrt() } else { r }
    }

    /// Returns the settings of the exported adapter, which is an adapter of the unchanged base. The
    /// initial term is part of its matrices `[A; A0]` and `[B, -B0]`, and the scaling stays the
    /// same, as in PEFT's conversion of PiSSA and OLoRA.
    pub fn exported(&self) -> Self {
        if !self.init_lora_weights.subtracts_initial() {
            return Self { init_lora_weights: InitLoraWeights::Default, ..self.clone() };
        }
        let factor = if self.use_rslora { f64::sqrt(2.0) } else { 2.0 };
        Self {
            r: 2 * self.r,
            lora_alpha: self.lora_alpha * factor,
            init_lora_weights: InitLoraWeights::Default,
            ..self.clone()
        }
    }

    /// Returns the adapted modules of `model`, in the order of computation.
    ///
    /// # Errors
    /// A name that no module has, or an `r` above the rank of a weight that the adapter is
    /// initialized from.
    pub fn modules(&self, model: &ModelConfig) -> Result<Vec<LinearModule>, FieldError> {
        let modules = self.target_modules.resolve(model)?;
        let most = |module: &LinearModule| module.in_features.min(module.out_features);
        let small = modules.iter().find(|module| self.r > most(module));
        match small.filter(|_| self.init_lora_weights != InitLoraWeights::Default) {
            Some(module) => Err(FieldError::new(
                "adapter.r",
                format!(
                    "is {}, but {} has rank {} at most, and init_lora_weights: {} needs rank r; \
                     lower r, or use init_lora_weights: true",
                    self.r,
                    module.name,
                    most(module),
                    self.init_lora_weights
                ),
            )),
            None => Ok(modules),
        }
    }

    /// Checks every value that can be checked without reading a file. LoftQ needs a base that is
    /// quantized while it is read.
    pub(crate) fn check(&self, model: &ModelSpec) -> Result<(), FieldError> {
        let fail = |field: &str, message: String| Err(FieldError::new(field, message));
        let is_loftq = self.init_lora_weights == InitLoraWeights::Loftq;
        check_count("adapter.r", self.r as u64, 1..=4096)?;
        check_number("adapter.lora_alpha", self.lora_alpha, above(0.0, Unbounded))?;
        check_number("adapter.lora_dropout", self.lora_dropout, 0.0..1.0)?;
        if matches!(&self.target_modules, TargetModules::Names(names) if names.is_empty()) {
            return fail("adapter.target_modules", "is an empty list; name a module, or all-linear".into());
        }
        if is_loftq && model.quantization == QuantizationType::None {
            return fail(
                "adapter.init_lora_weights",
                "loftq reduces the quantization error; set model.quantization to nf4 or int8".into(),
            );
        }
        check_count("adapter.loftq_iter", u64::from(self.loftq_iter), 1..=100)?;
        if self.loftq_iter != 1 && !is_loftq {
            return fail("adapter.loftq_iter", "needs adapter.init_lora_weights: loftq".into());
        }
        if self.init_from.is_some() && self.init_lora_weights != InitLoraWeights::Default {
            return fail(
                "adapter.init_lora_weights",
                format!(
                    "{} and adapter.init_from both set the initial adapter; remove one of them",
                    self.init_lora_weights
                ),
            );
        }
        Ok(())
    }

    /// Checks that the adapter can be initialized over the base in `index`.
    ///
    /// # Errors
    /// The errors of [`Self::modules`], or LoftQ over a weight that is stored quantized.
    pub fn check_base(&self, model: &ModelConfig, index: &SafetensorsIndex) -> Result<(), FieldError> {
        let modules = self.modules(model)?;
        if self.init_lora_weights != InitLoraWeights::Loftq {
            return Ok(());
        }
        let is_dense = |module: &LinearModule| matches!(index.weight(module), Ok(StoredWeight::Dense));
        match modules.iter().find(|module| !is_dense(module)) {
            Some(module) => Err(FieldError::new(
                "adapter.init_lora_weights",
                format!(
                    "loftq needs the weights before quantization, but the base stores {}.weight \
                     quantized; use the dense base",
                    module.name
                ),
            )),
            None => Ok(()),
        }
    }
}
