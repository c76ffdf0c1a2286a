//! A frozen base model in memory.

use std::path::{Path, PathBuf};
use std::time::SystemTime;

use candle_core::Tensor;
use lora_ops::linear::FrozenLinear;
use lora_spec::{BaseDtype, Checkpoint, ModelConfig};
use rayon::prelude::*;

use crate::ModelError;
use crate::block::Block;
use crate::hash::{sha256, sha256_file};
use crate::read::Reader;

/// A frozen base model: read once, never changed.
#[derive(Debug)]
pub struct Base {
    /// What `config.json` says.
    pub config: ModelConfig,
    /// Where it was read from.
    pub dir: PathBuf,
    pub(crate) embedding: Tensor,
    pub(crate) blocks: Vec<Block>,
    pub(crate) norm: Tensor,
    pub(crate) head: FrozenLinear,
    sha256: String,
}

/// What tells two bases on disk apart without reading them: path, sizes and modification times of the files, and how
/// the weights are held.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BaseKey {
    files: Vec<(PathBuf, u64, SystemTime)>,
    dtype: BaseDtype,
}

impl BaseKey {
    /// The key of the base in `dir`.
    pub fn of(dir: &Path, dtype: BaseDtype) -> Result<Self, ModelError> {
        let mut files = Checkpoint::open(dir)?.files;
        files.push(dir.join("config.json"));
        let describe = |path: PathBuf| {
            let io = |source| ModelError::Io { path: path.clone(), source };
            let path = path.canonicalize().map_err(io)?;
            let meta = path.metadata().map_err(io)?;
            let modified = meta.modified().map_err(io)?;
            Ok((path, meta.len(), modified))
        };
        let files = files.into_iter().map(describe).collect::<Result<_, ModelError>>()?;
        Ok(Self { files, dtype })
    }
}

impl Base {
    /// Reads the model in `dir` (Hugging Face layout) and holds its matrices as `dtype`; norms and biases are f32.
    pub fn load(dir: &Path, dtype: BaseDtype) -> Result<Self, ModelError> {
        let config = ModelConfig::read(dir)?;
        let checkpoint = Checkpoint::open(dir)?;
        checkpoint.check(&config)?;
        let reader = Reader::open(&checkpoint)?;
        let matrix = |name: &str| reader.read(name, dtype);
        let vector = |name: &str| reader.read(name, BaseDtype::F32);
        let mut modules = config.linear_modules().into_iter();
        let mut blocks = Vec::with_capacity(config.num_hidden_layers);
        for layer in 0..config.num_hidden_layers {
            let mut projections = Vec::new();
            for module in modules.by_ref().take(Block::PROJECTIONS) {
                let bias = module.bias.then(|| vector(&format!("{}.bias", module.name))).transpose()?;
                projections.push(FrozenLinear::new(matrix(&format!("{}.weight", module.name))?, bias)?);
            }
            let norm = |name: &str| vector(&format!("model.layers.{layer}.{name}.weight"));
            blocks.push(Block::new(
                projections,
                norm("input_layernorm")?,
                norm("post_attention_layernorm")?,
            )?);
        }
        let embedding = matrix("model.embed_tokens.weight")?;
        let head = if config.tie_word_embeddings { embedding.clone() } else { matrix("lm_head.weight")? };
        Ok(Self {
            norm: vector("model.norm.weight")?,
            head: FrozenLinear::new(head, None)?,
            sha256: hash_of(dir, &checkpoint)?,
            dir: dir.to_owned(),
            embedding,
            blocks,
            config,
        })
    }

    /// SHA-256 over the names and SHA-256s of `config.json` and the safetensors files.
    pub fn sha256(&self) -> &str {
        &self.sha256
    }
}

fn hash_of(dir: &Path, checkpoint: &Checkpoint) -> Result<String, ModelError> {
    let mut files = checkpoint.files.clone();
    files.push(dir.join("config.json"));
    files.sort();
    let line = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        Ok(format!("{name} {}\n", sha256_file(path)?))
    };
    let lines = files.par_iter().map(line).collect::<Result<Vec<_>, ModelError>>()?;
    Ok(sha256(lines.concat().as_bytes()))
}
