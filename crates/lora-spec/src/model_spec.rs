//! The base of a job, and its format in memory.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::{FieldError, TargetModules};

/// The frozen base model.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ModelSpec {
    /// Directory in Hugging Face layout (`config.json`, safetensors, tokenizer files). A submitted
    /// job may also have `hf://org/name[@revision]` or the URL of an object store, such as
    /// `s3://bucket/prefix`.
    pub base: PathBuf,
    /// Type of the base weights in memory.
    pub dtype: BaseDtype,
    /// Type to which the weights of the blocks' linear modules are quantized while they are read. A
    /// base that is already quantized stays as it is.
    pub quantization: QuantizationType,
    /// With `nf4`: quantize the scales too, which takes 4.13 bits a parameter instead of 4.5.
    pub bnb_4bit_use_double_quant: bool,
}

impl ModelSpec {
    /// Returns the format of the base in memory.
    pub fn format(&self) -> BaseFormat {
        let quantization = match self.quantization {
            QuantizationType::None => Quantization::None,
            QuantizationType::Nf4 => Quantization::Nf4 { double_quant: self.bnb_4bit_use_double_quant },
            QuantizationType::Int8 => Quantization::Int8,
        };
        BaseFormat { dtype: self.dtype, quantization }
    }

    /// Returns the base if it is a URL; `None` for a directory.
    pub fn base_url(&self) -> Option<&str> {
        let text = self.base.to_str()?;
        let (scheme, rest) = text.split_once("://")?;
        let legal = scheme.chars().all(|c| c.is_ascii_alphanumeric()) && !scheme.is_empty();
        (legal && !rest.is_empty()).then_some(text)
    }

    /// Returns the name and the revision of a base from the Hugging Face Hub; `None` for every
    /// other base.
    pub fn hub_repository(&self) -> Option<(&str, Option<&str>)> {
        let repository = self.base_url()?.strip_prefix("hf://")?;
        let (name, revision) = repository.split_once('@').unzip();
        Some((name.unwrap_or(repository), revision))
    }

    /// Checks every value that can be checked without reading a file.
    pub(crate) fn check(&self) -> Result<(), FieldError> {
        if self.base.as_os_str().is_empty() {
            return Err(FieldError::new("model.base", "is missing".into()));
        }
        if self.bnb_4bit_use_double_quant && self.quantization != QuantizationType::Nf4 {
            let message = "needs model.quantization: nf4; a base that is already quantized keeps its scales";
            return Err(FieldError::new("model.bnb_4bit_use_double_quant", message.into()));
        }
        Ok(())
    }
}

/// The type of the frozen weights in memory. It does not change the type of adapters and moments.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BaseDtype {
    /// The type in the base's files (f16 becomes f32).
    #[default]
    Auto,
    /// 32-bit floats.
    F32,
    /// bfloat16. On the CPU products are computed in f32 from a widened copy of a panel.
    Bf16,
}

/// The values of `model.quantization`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum QuantizationType {
    /// No quantization: the weights stay as the base stores them.
    #[default]
    None,
    /// 4-bit NormalFloat in blocks of 64 (QLoRA, arXiv 2305.14314), as in bitsandbytes.
    Nf4,
    /// 8 bits with a scale for each row, as in bitsandbytes. Activations are not quantized.
    Int8,
}

/// The format of a base in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct BaseFormat {
    /// Type of the weights that are not quantized.
    pub dtype: BaseDtype,
    /// Quantization of the weights of the blocks' linear modules.
    pub quantization: Quantization,
}

impl From<BaseDtype> for BaseFormat {
    fn from(dtype: BaseDtype) -> Self {
        Self { dtype, quantization: Quantization::None }
    }
}

/// The settings that determine a base in memory, in addition to its files: two bases with equal
/// files and layouts are equal.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct BaseLayout {
    /// Types of the weights.
    pub format: BaseFormat,
    /// Set if LoftQ quantizes weights again.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loftq: Option<Loftq>,
}

impl<T: Into<BaseFormat>> From<T> for BaseLayout {
    fn from(format: T) -> Self {
        Self { format: format.into(), loftq: None }
    }
}

/// LoftQ with more than one round: a weight `W` is stored as `quantize(W - L R)`, where `L R` is
/// the best approximation of rank `r` to the quantization error of the previous round (arXiv
/// 2310.08659, algorithm 1).
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Loftq {
    /// Number of quantizations, at least 2.
    pub rounds: u32,
    /// The adapter's rank.
    pub r: usize,
    /// The modules whose weights are quantized again.
    pub target_modules: TargetModules,
}

/// The type to which a dense weight is quantized while it is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Quantization {
    /// No quantization.
    #[default]
    None,
    /// NF4 in blocks of 64.
    Nf4 {
        /// Whether the scales are in 8 bits.
        double_quant: bool,
    },
    /// 8 bits with a scale for each row.
    Int8,
}

impl Quantization {
    /// The name of the format in texts; `None` without quantization.
    pub fn name(self) -> Option<&'static str> {
        match self {
            Self::None => None,
            Self::Nf4 { .. } => Some("NF4"),
            Self::Int8 => Some("int8"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_bases_from_the_hub_have_a_repository() {
        for (base, repository) in [
            ("hf://org/name@1a2b", Some(("org/name", Some("1a2b")))),
            ("hf://org/name", Some(("org/name", None))),
            ("s3://bucket/base", None),
            ("/models/a@b", None),
            ("org/name", None),
        ] {
            let model = ModelSpec { base: base.into(), ..ModelSpec::default() };
            assert_eq!(model.hub_repository(), repository, "{base}");
        }
    }
}
