//! A frozen base model in memory.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use candle_core::{DType, Device, Tensor};
use lora_ops::linear::{FrozenLinear, Weight};
use lora_ops::reduce::fingerprint;
use lora_ops::rope::RopeTable;
use lora_spec::{BaseDtype, BaseFormat, BaseLayout, LinearModule, ModelConfig, SafetensorsIndex};
use rayon::prelude::*;

use crate::ModelError;
use crate::block::Block;
use crate::hash::{sha256, sha256_file};
use crate::init::loftq_weights;
use crate::random;
use crate::weights::WeightReader;

/// A frozen base model. It is read once and never changes.
#[derive(Debug)]
pub struct Base {
    /// The contents of `config.json`.
    pub config: ModelConfig,
    /// Directory that the base was read from; empty for random weights.
    pub dir: PathBuf,
    pub(crate) embedding: Tensor,
    pub(crate) blocks: Vec<Block>,
    pub(crate) norm: Tensor,
    /// `[vocab, hidden]`, never quantized.
    pub(crate) head: Tensor,
    device: Device,
    /// The longest RoPE table that was needed so far, and its number of positions.
    rope: Mutex<Option<(usize, Arc<RopeTable>)>>,
    sha256: String,
}

/// Identifies a base in memory without reading its weights: path, size and modification time of
/// each file, and the layout of the weights in memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BaseKey {
    files: Vec<(PathBuf, u64, SystemTime)>,
    layout: BaseLayout,
}

impl BaseKey {
    /// Returns the key of the base in `dir`, loaded in `layout`.
    pub fn from_dir(dir: &Path, layout: impl Into<BaseLayout>) -> Result<Self, ModelError> {
        let mut files = SafetensorsIndex::open(dir)?.files;
        files.push(dir.join("config.json"));
        let describe = |path: PathBuf| {
            let io = |source| ModelError::Io { path: path.clone(), source };
            let path = path.canonicalize().map_err(io)?;
            let meta = path.metadata().map_err(io)?;
            let modified = meta.modified().map_err(io)?;
            Ok((path, meta.len(), modified))
        };
        let files = files.into_iter().map(describe).collect::<Result<_, ModelError>>()?;
        Ok(Self { files, layout: layout.into() })
    }
}

impl Base {
    /// Reads the model in `dir` (Hugging Face layout) onto `device`, with matrices in the given
    /// layout; norms and biases are f32. On a GPU all dense matrices have the same type. With
    /// `auto` this is bf16 if the checkpoint has no other floats, and otherwise f32.
    pub fn load(dir: &Path, layout: impl Into<BaseLayout>, device: &Device) -> Result<Self, ModelError> {
        let config = ModelConfig::read(dir)?;
        let index = SafetensorsIndex::open(dir)?;
        index.check(&config)?;
        let layout = layout.into();
        let mut format = layout.format;
        index.check_format(&config, format)?;
        if !device.is_cpu() {
            format.dtype = common_dtype(format.dtype, &config, &index);
        }
        let reader = WeightReader::open(&index, device)?;
        let requantized = loftq_weights(&reader, &config, &layout)?;
        let sha256 = hash_with_weights(hash_files(dir, &index)?, &requantized)?;
        Self::build(
            config,
            dir.to_owned(),
            sha256,
            device,
            |name| reader.read(name, format.dtype),
            |name| reader.read(name, BaseDtype::F32),
            |module| match requantized.get(&module.name) {
                Some(weight) => Ok(weight.to_device(device)?),
                None => reader.weight(module, format),
            },
        )
    }

    /// Creates a model of the given configuration with random weights on `device`, for
    /// measurements. Dense matrices (`auto`: f32) are uniform with a standard deviation of 0.02,
    /// norms 1 and biases 0. Quantized matrices have uniform codes and random scales that give the
    /// same standard deviation ([`FourBit::random`](lora_ops::quant::FourBit::random),
    /// [`Int8::random`](lora_ops::quant::Int8::random)). Each part is a pure function of the seed,
    /// its name and the index of an element, with the same bits on every device.
    pub fn random(
        config: ModelConfig,
        format: impl Into<BaseFormat>,
        seed: u64,
        device: &Device,
    ) -> Result<Self, ModelError> {
        let format = format.into();
        let shapes: HashMap<String, Vec<usize>> = config.tensors().into_iter().collect();
        let sha256 = sha256(format!("random {seed} {format:?} {config:?}").as_bytes());
        let tensor = |name: &str, dtype| random::tensor(name, &shapes[name], dtype, seed, device);
        let weight = |module: &LinearModule| {
            let shape = (module.out_features, module.in_features);
            random::weight(&format!("{}.weight", module.name), shape, format, seed, device)
        };
        let matrix = |name: &str| tensor(name, format.dtype);
        let vector = |name: &str| tensor(name, BaseDtype::F32);
        Self::build(config.clone(), PathBuf::new(), sha256, device, matrix, vector, weight)
    }

    /// Builds a base from a checkpoint's tensors. `matrix` and `vector` return the dense matrix or
    /// vector of a name, `weight` the weight of a linear module.
    pub(crate) fn build(
        config: ModelConfig,
        dir: PathBuf,
        sha256: String,
        device: &Device,
        matrix: impl Fn(&str) -> Result<Tensor, ModelError>,
        vector: impl Fn(&str) -> Result<Tensor, ModelError>,
        weight: impl Fn(&LinearModule) -> Result<Weight, ModelError>,
    ) -> Result<Self, ModelError> {
        let mut modules = config.linear_modules().into_iter();
        let mut blocks = Vec::with_capacity(config.num_hidden_layers);
        for layer in 0..config.num_hidden_layers {
            let mut projections = Vec::new();
            for module in modules.by_ref().take(Block::PROJECTIONS) {
                let bias = module.bias.then(|| vector(&format!("{}.bias", module.name))).transpose()?;
                projections.push(FrozenLinear::new(weight(&module)?, bias)?);
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
            head,
            device: device.clone(),
            rope: Mutex::default(),
            embedding,
            blocks,
            config,
            dir,
            sha256,
        })
    }

    /// Returns the logits of normalized hidden states `[tokens, hidden]`, f32 `[tokens, vocab]`.
    pub(crate) fn logits(&self, normed: &Tensor) -> Result<Tensor, ModelError> {
        Ok(FrozenLinear::new(self.head.clone(), None)?.forward_f32(normed)?)
    }

    /// Returns the tensors of a dense base with their names in a checkpoint.
    ///
    /// # Errors
    /// A weight is quantized.
    pub(crate) fn tensors(&self) -> Result<Vec<(String, Tensor)>, ModelError> {
        let mut tensors = vec![
            ("model.embed_tokens.weight".to_owned(), self.embedding.clone()),
            ("model.norm.weight".to_owned(), self.norm.clone()),
        ];
        if !self.config.tie_word_embeddings {
            tensors.push(("lm_head.weight".to_owned(), self.head.clone()));
        }
        let modules = self.config.linear_modules();
        for (layer, (block, modules)) in
            self.blocks.iter().zip(modules.chunks(Block::PROJECTIONS)).enumerate()
        {
            let (projections, norms) = block.parts();
            for (name, norm) in norms {
                tensors.push((format!("model.layers.{layer}.{name}.weight"), norm.clone()));
            }
            for (module, projection) in modules.iter().zip(projections) {
                let Weight::Dense(weight) = projection.weight() else {
                    return Err(candle_core::Error::Msg(format!("{} is quantized", module.name)).into());
                };
                tensors.push((format!("{}.weight", module.name), weight.clone()));
                tensors.extend(projection.bias().map(|bias| (format!("{}.bias", module.name), bias.clone())));
            }
        }
        Ok(tensors)
    }

    /// Returns the (dequantized) weight of a linear module by the module's name, as f32 on the CPU.
    ///
    /// # Errors
    /// The module does not exist.
    pub fn dense_weight(&self, module: &str) -> Result<Tensor, ModelError> {
        let modules = self.config.linear_modules();
        let Some(at) = modules.iter().position(|it| it.name == module) else {
            return Err(candle_core::Error::Msg(format!("module {module} does not exist")).into());
        };
        Ok(self.blocks[at / Block::PROJECTIONS].weight(at % Block::PROJECTIONS).dense()?)
    }

    /// Returns the size of the weights in bytes.
    pub fn bytes(&self) -> usize {
        let dense = |tensor: &Tensor| tensor.elem_count() * tensor.dtype().size_in_bytes();
        let head = if self.config.tie_word_embeddings { 0 } else { dense(&self.head) };
        let blocks: usize = self.blocks.iter().map(Block::bytes).sum();
        dense(&self.embedding) + head + dense(&self.norm) + blocks
    }

    /// Returns the device of the weights.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Returns the type of the activations: f32 on the CPU, the type of the matrices on a GPU.
    pub fn activation_dtype(&self) -> DType {
        if self.device.is_cpu() { DType::F32 } else { self.embedding.dtype() }
    }

    /// Returns a RoPE table of at least `positions` positions.
    pub(crate) fn rope(&self, positions: usize) -> Result<Arc<RopeTable>, ModelError> {
        let mut longest = self.rope.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((length, table)) = &*longest
            && *length >= positions
        {
            return Ok(table.clone());
        }
        let length = positions.next_power_of_two();
        let table = Arc::new(RopeTable::new(&self.config.rope, self.config.head_dim, length, &self.device)?);
        *longest = Some((length, table.clone()));
        Ok(table)
    }

    /// Returns the SHA-256 over the names and hashes of `config.json` and the safetensors files,
    /// and over the weights that LoftQ requantized, because another processor may compute them with
    /// other bits. For random weights it is the SHA-256 over seed, format and configuration.
    pub fn sha256(&self) -> &str {
        &self.sha256
    }
}

/// Returns the type of all dense matrices on a GPU.
fn common_dtype(dtype: BaseDtype, config: &ModelConfig, index: &SafetensorsIndex) -> BaseDtype {
    let is_bf16 = |(name, _): (String, _)| match index.tensors.get(&name).map(|entry| entry.dtype.as_str()) {
        // A quantized weight does not decide the type.
        Some("U8" | "I8") => true,
        dtype => dtype == Some("BF16"),
    };
    match dtype {
        BaseDtype::Auto if config.tensors().into_iter().all(is_bf16) => BaseDtype::Bf16,
        BaseDtype::Auto => BaseDtype::F32,
        given => given,
    }
}

/// Returns the hash of `files` (the hash of the files) and of the requantized `weights`; if there
/// are no such weights, returns `files`.
fn hash_with_weights(files: String, weights: &HashMap<String, Weight>) -> Result<String, ModelError> {
    if weights.is_empty() {
        return Ok(files);
    }
    let names: BTreeMap<&String, &Weight> = weights.iter().collect();
    let mut text = files;
    for (name, weight) in names {
        for part in weight.tensors() {
            let [low, high] = fingerprint(&[&part.flatten_all()?])?;
            text += &format!("\n{name} {high:016x}{low:016x}");
        }
    }
    Ok(sha256(text.as_bytes()))
}

/// Returns the SHA-256 over the names and hashes of `config.json` and the safetensors files.
fn hash_files(dir: &Path, index: &SafetensorsIndex) -> Result<String, ModelError> {
    let mut files = index.files.clone();
    files.push(dir.join("config.json"));
    files.sort();
    let line = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        Ok(format!("{name} {}\n", sha256_file(path)?))
    };
    let lines = files.par_iter().map(line).collect::<Result<Vec<_>, ModelError>>()?;
    Ok(sha256(lines.concat().as_bytes()))
}
