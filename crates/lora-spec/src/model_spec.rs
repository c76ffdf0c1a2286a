//! The base of a job, and how it is held in memory.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::TargetModules;

/// The frozen base model.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ModelSpec {
    /// Directory in Hugging Face layout (`config.json`, safetensors, tokenizer files); for a job that is submitted also
    /// `hf://org/name[@revision]` or an object store's URL, such as `s3://bucket/prefix`.
    pub base: PathBuf,
    /// What the base weights are held as.
    pub dtype: BaseDtype,
    /// What the weights of the blocks' linear modules are quantized to while they are read. A base that is quantized already
    /// stays as it is.
    pub quantization: QuantizationType,
    /// With `nf4`: quantize the scales too, which takes 4.13 bits a parameter instead of 4.5.
    pub bnb_4bit_use_double_quant: bool,
}

impl ModelSpec {
    /// How the base is held in memory.
    pub fn format(&self) -> BaseFormat {
        let quantization = match self.quantization {
            QuantizationType::None => Quantization::None,
            QuantizationType::Nf4 => Quantization::Nf4 { double_quant: self.bnb_4bit_use_double_quant },
            QuantizationType::Int8 => Quantization::Int8,
        };
        BaseFormat { dtype: self.dtype, quantization }
    }

    /// The base as a URL, if it is one rather than a directory.
    pub fn base_url(&self) -> Option<&str> {
        let text = self.base.to_str()?;
        let (scheme, rest) = text.split_once("://")?;
        let legal = scheme.chars().all(|c| c.is_ascii_alphanumeric()) && !scheme.is_empty();
        (legal && !rest.is_empty()).then_some(text)
    }
}

/// What the frozen weights are held as in memory. Adapters and moments are f32 whatever this says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BaseDtype {
    /// As the checkpoint stores them (f16 is held as f32).
    #[default]
    Auto,
    /// 32-bit floats.
    F32,
    /// bfloat16; products are computed in f32 from a widened copy of a tile.
    Bf16,
}

/// The words of `model.quantization`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum QuantizationType {
    /// As the checkpoint stores them.
    #[default]
    None,
    /// 4-bit NormalFloat in blocks of 64 (QLoRA, arXiv 2305.14314), as bitsandbytes makes it.
    Nf4,
    /// 8 bits with a scale for each row, as bitsandbytes makes them. Activations are not quantized.
    Int8,
}

/// How a base is held in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct BaseFormat {
    /// Type of what is not quantized.
    pub dtype: BaseDtype,
    /// What the weights of the blocks' linear modules are quantized to.
    pub quantization: Quantization,
}

impl From<BaseDtype> for BaseFormat {
    fn from(dtype: BaseDtype) -> Self {
        Self { dtype, quantization: Quantization::None }
    }
}

/// What a base in memory is beside its files: bases of one form are equal.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct BaseLayout {
    /// Types of the weights.
    pub format: BaseFormat,
    /// Where weights are quantized again, for an adapter that starts with what that took off them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loftq: Option<Loftq>,
}

impl<T: Into<BaseFormat>> From<T> for BaseLayout {
    fn from(format: T) -> Self {
        Self { format: format.into(), loftq: None }
    }
}

/// LoftQ beyond its first round: a weight `W` is held as `quantize(W - L R)`, with the matrices of rank `r` nearest to what the
/// round before took off it (arXiv 2310.08659, algorithm 1).
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Loftq {
    /// Roundings, at least 2.
    pub rounds: u32,
    /// The adapter's rank.
    pub r: usize,
    /// The weights it is about.
    pub target_modules: TargetModules,
}

/// What a dense weight is quantized to while it is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Quantization {
    /// It stays as it is.
    #[default]
    None,
    /// NF4 in blocks of 64.
    Nf4 {
        /// The scales in 8 bits.
        double_quant: bool,
    },
    /// 8 bits with a scale for each row.
    Int8,
}
