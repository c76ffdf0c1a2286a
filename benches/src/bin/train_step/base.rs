//! A random base in Hugging Face layout.

use std::borrow::Cow;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, anyhow};
use half::bf16;
use lora_spec::{BaseDtype, ModelConfig, Philox};
use rayon::prelude::*;
use safetensors::{Dtype, View};
use serde_json::json;
use tempfile::TempDir;

/// Bound of the uniform weights; their standard deviation is that of Transformers' initialization, 0.02.
const BOUND: f32 = 0.034_641;

/// Writes a model of SmolLM2-135M's shape into a new directory beside this program.
///
/// A tensor exists only while it is written, so the process's peak memory stays that of the training.
pub(crate) fn write(dtype: BaseDtype) -> Result<TempDir> {
    let program = std::env::current_exe()?;
    let beside = program.parent().context("the program has no directory")?;
    let dir = tempfile::Builder::new().prefix("train_step-").tempdir_in(beside)?;
    let dtype = match dtype {
        BaseDtype::Bf16 => Dtype::BF16,
        BaseDtype::F32 | BaseDtype::Auto => Dtype::F32,
    };
    write_into(dir.path(), dtype)?;
    Ok(dir)
}

fn write_into(dir: &Path, dtype: Dtype) -> Result<()> {
    let config = json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_parameters": { "rope_type": "default", "rope_theta": 100000.0 },
        "tie_word_embeddings": true,
    });
    let text = serde_json::to_string_pretty(&config)?;
    let tensors = ModelConfig::parse(&text).map_err(|e| anyhow!(e))?.tensors();
    fs::write(dir.join("config.json"), text)?;
    let tensors = tensors.into_iter().map(|(name, shape)| {
        let tensor = RandomTensor { philox: Philox::new(0, &name), shape, dtype };
        (name, tensor)
    });
    let metadata = [("format".to_owned(), "pt".to_owned())].into();
    safetensors::serialize_to_file(tensors, Some(metadata), &dir.join("model.safetensors"))?;
    Ok(())
}

/// A matrix of uniform numbers, or a vector of ones (a norm's weight), made when it is asked for.
struct RandomTensor {
    philox: Philox,
    shape: Vec<usize>,
    dtype: Dtype,
}

impl View for RandomTensor {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let width = self.dtype.bitsize() / 8;
        let mut bytes = vec![0; self.data_len()];
        bytes.par_chunks_mut(4 * width).enumerate().for_each(|(block, bytes)| {
            let words = self.philox.words([block as u32, 0, 0, 0]);
            for (bytes, word) in bytes.chunks_mut(width).zip(words) {
                let random = (2.0 * Philox::unit(word) - 1.0) * BOUND;
                let value = if self.shape.len() > 1 { random } else { 1.0 };
                match self.dtype {
                    Dtype::BF16 => bytes.copy_from_slice(&bf16::from_f32(value).to_le_bytes()),
                    _ => bytes.copy_from_slice(&value.to_le_bytes()),
                }
            }
        });
        Cow::Owned(bytes)
    }

    fn data_len(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.bitsize() / 8
    }
}
