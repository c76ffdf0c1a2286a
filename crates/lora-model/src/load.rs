//! Loading of a base from its files.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsString;
use std::path::PathBuf;
use std::time::SystemTime;

use candle_core::{Device, Tensor};
use lora_ops::linear::Weight;
use lora_ops::reduce::fingerprint;
use lora_spec::{
    BaseDtype, BaseFormat, BaseLayout, LinearModule, ModelConfig, SafetensorsIndex, SourceDir, SourceFile,
    file_names,
};
use rayon::prelude::*;

use crate::hash::{sha256, sha256_file};
use crate::init::loftq_weights;
use crate::weight_source::WeightSource;
use crate::weights::WeightReader;
use crate::{Base, ModelError};

/// Identifies a base in memory without reading its weights: name, path, size and modification time
/// of each file, and the layout of the weights in memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BaseKey {
    files: Vec<(OsString, PathBuf, u64, SystemTime)>,
    layout: BaseLayout,
}

impl BaseKey {
    /// Returns the key of the base in `dir`, loaded in `layout`.
    pub fn from_dir(dir: &SourceDir, layout: impl Into<BaseLayout>) -> Result<Self, ModelError> {
        let mut files = SafetensorsIndex::open(dir)?.files;
        files.push(dir.file(file_names::MODEL_CONFIG));
        let describe = |file: &SourceFile| {
            let io = |source| ModelError::io(file, source);
            let path = file.path().canonicalize().map_err(io)?;
            let meta = path.metadata().map_err(io)?;
            let modified = meta.modified().map_err(io)?;
            // The hash of the base has the files' names.
            let name = file.name().file_name().unwrap_or_default().to_owned();
            Ok((name, path, meta.len(), modified))
        };
        let files = files.iter().map(describe).collect::<Result<_, ModelError>>()?;
        Ok(Self { files, layout: layout.into() })
    }
}

/// The weights of safetensors files in the layout of a base.
pub(crate) struct FileWeights<'a> {
    pub(crate) reader: WeightReader<'a>,
    format: BaseFormat,
    /// The weights that LoftQ requantizes, by the names of their modules.
    requantized: HashMap<String, Weight>,
}

impl<'a> FileWeights<'a> {
    /// Opens the weights of `index` for a base on `device`.
    pub(crate) fn open(
        index: &'a SafetensorsIndex,
        config: &ModelConfig,
        layout: &BaseLayout,
        device: &'a Device,
    ) -> Result<Self, ModelError> {
        let mut format = layout.format;
        if !device.is_cpu() {
            format.dtype = index.gpu_dtype(config, format.dtype);
        }
        let reader = WeightReader::open(index, device)?;
        let requantized = loftq_weights(&reader, config, layout)?;
        Ok(Self { reader, format, requantized })
    }
}

impl WeightSource for FileWeights<'_> {
    fn device(&self) -> &Device {
        self.reader.device()
    }

    fn matrix(&self, name: &str) -> Result<Tensor, ModelError> {
        self.reader.read(name, self.format.dtype)
    }

    fn vector(&self, name: &str) -> Result<Tensor, ModelError> {
        self.reader.read(name, BaseDtype::F32)
    }

    fn weight(&self, module: &LinearModule) -> Result<Weight, ModelError> {
        match self.requantized.get(&module.name) {
            Some(weight) => Ok(weight.to_device(self.reader.device())?),
            None => self.reader.weight(module, self.format),
        }
    }
}

impl Base {
    /// Reads the model in `dir` (Hugging Face layout) onto `device`, with matrices in the given
    /// layout; norms and biases are f32. On a GPU all dense matrices have the same type. With
    /// `auto` this is bf16 if the files have no other floats, and otherwise f32.
    pub fn load(dir: &SourceDir, layout: impl Into<BaseLayout>, device: &Device) -> Result<Self, ModelError> {
        let mut config = ModelConfig::read(dir)?;
        let index = SafetensorsIndex::open(dir)?;
        index.untie_head(&mut config)?;
        index.check(&config)?;
        let layout = layout.into();
        index.check_format(&config, layout.format)?;
        let weights = FileWeights::open(&index, &config, &layout, device)?;
        let sha256 = hash_with_weights(hash_files(dir, &index)?, &weights.requantized)?;
        Self::from_weights(config, sha256, device, &weights)
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
fn hash_files(dir: &SourceDir, index: &SafetensorsIndex) -> Result<String, ModelError> {
    let mut files = index.files.clone();
    files.push(dir.file(file_names::MODEL_CONFIG));
    files.sort();
    let line = |file: &SourceFile| {
        let name = file.name().file_name().unwrap_or_default().to_string_lossy();
        Ok(format!("{name} {}\n", sha256_file(file)?))
    };
    let lines = files.par_iter().map(line).collect::<Result<Vec<_>, ModelError>>()?;
    Ok(sha256(lines.concat().as_bytes()))
}
