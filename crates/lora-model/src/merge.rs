//! Merging: adds an adapter to the weights of its base, which gives a dense model.

use std::collections::HashMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use lora_ops::gemm::{no_trans, product};
use lora_ops::linear::Weight;
use lora_ops::read_f32;
use lora_spec::{
    BaseDtype, BaseLayout, LinearModule, ModelConfig, ModelConfigError, SafetensorsIndex, SourceDir,
    file_names,
};
use serde_json::{Map, Value};

use crate::adapter::AdapterTerms;
use crate::load::FileWeights;
use crate::weight_source::WeightSource;
use crate::weights::WeightReader;
use crate::{Adapter, Base, ModelError};

/// The weights to which an adapter is added.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MergeTarget {
    /// The weights of the base's files.
    Original,
    /// The dequantized weights that training used, if the base was quantized.
    Dequantized,
}

/// The weights of a base's files with an adapter added.
struct MergedWeights<'a> {
    frozen: FileWeights<'a>,
    adapter: &'a Adapter,
    /// Type of the merged matrices.
    dtype: BaseDtype,
}

impl WeightSource for MergedWeights<'_> {
    fn device(&self) -> &Device {
        self.frozen.device()
    }

    fn matrix(&self, name: &str) -> Result<Tensor, ModelError> {
        self.frozen.reader.read(name, self.dtype)
    }

    fn vector(&self, name: &str) -> Result<Tensor, ModelError> {
        self.frozen.vector(name)
    }

    fn weight(&self, module: &LinearModule) -> Result<Weight, ModelError> {
        let dense = self.frozen.weight(module)?.dense()?;
        if let Some(AdapterTerms { trained, scaling, .. }) = self.adapter.terms(&module.name) {
            product(scaling as f32, no_trans(&trained.b), no_trans(&trained.a), 1.0, &dense)?;
            let limit = match self.dtype {
                BaseDtype::Bf16 => half::bf16::MAX.to_f32(),
                BaseDtype::F32 | BaseDtype::Auto => f32::MAX,
            };
            if let Some(value) = read_f32(&dense)?.iter().find(|value| value.is_nan() || value.abs() > limit)
            {
                return Err(ModelError::NotFinite { module: module.name.clone(), value: *value });
            }
        }
        let rounded = match self.dtype {
            BaseDtype::Bf16 => dense.to_dtype(DType::BF16)?,
            BaseDtype::F32 | BaseDtype::Auto => dense,
        };
        Ok(rounded.into())
    }
}

/// Sets `tie_word_embeddings` to false, for a head of its own that every program loads.
fn untie(config: &mut Map<String, Value>) {
    const KEY: &str = "tie_word_embeddings";
    config.insert(KEY.into(), false.into());
    if let Some(Value::Object(text)) = config.get_mut("text_config") {
        text.insert(KEY.into(), false.into());
    }
}

impl Base {
    /// Returns the dense model of `W + s B A` on the CPU, computed in f32 and then rounded to
    /// `dtype`. `trained` is the layout of the base in `dir` with which `adapter` was trained.
    /// `adapter` must be on the CPU.
    pub fn merged(
        dir: &SourceDir,
        trained: &BaseLayout,
        onto: MergeTarget,
        dtype: BaseDtype,
        adapter: &Adapter,
    ) -> Result<Self, ModelError> {
        let mut config = ModelConfig::read(dir)?;
        let index = SafetensorsIndex::open(dir)?;
        index.untie_head(&mut config)?;
        index.check(&config)?;
        let original = BaseLayout::from(BaseDtype::F32);
        let layout = if onto == MergeTarget::Original { &original } else { trained };
        let frozen = FileWeights::open(&index, &config, layout, &Device::Cpu)?;
        let weights = MergedWeights { frozen, adapter, dtype };
        Self::from_weights(config, String::new(), &Device::Cpu, &weights)
    }

    /// Returns the tensors of a multimodal model that are not part of its text tower.
    fn other_tensors(&self, index: &SafetensorsIndex) -> Result<HashMap<String, Tensor>, ModelError> {
        if !self.config.is_multimodal() {
            return Ok(HashMap::new());
        }
        let reader = WeightReader::open(index, &Device::Cpu)?;
        let read = |(name, entry): (&String, &_)| Ok((name.clone(), reader.stored(name, entry)?));
        index.other_tensors().map(read).collect()
    }

    /// Writes a dense base as `config.json` and `model.safetensors` into the existing directory
    /// `out`. The settings of `config.json` in `dir` are kept, except the type of the weights and
    /// `tie_word_embeddings`, if the head differs from the embedding. The names of the tensors and
    /// what a multimodal model has besides its text tower are kept too.
    ///
    /// # Errors
    /// A weight is quantized, or a file cannot be written.
    pub fn save(&self, dir: &SourceDir, out: &Path) -> Result<(), ModelError> {
        let io = |path: &Path| {
            let path = path.to_owned();
            move |source| ModelError::Io { name: path, source }
        };
        let dtype = self.embedding.dtype();
        let index = SafetensorsIndex::open(dir)?;
        let mut tensors = self.other_tensors(&index)?;
        for (name, tensor) in self.tensors()? {
            let name = index.stored_name(&name);
            if tensor.dtype() == dtype {
                tensors.insert(name, tensor);
                continue;
            }
            let rounded = tensor.to_dtype(dtype)?;
            // Norms and biases stay f32 if rounding to the matrices' type would change them.
            let is_exact = rounded.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?
                == tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
            tensors.insert(name, if is_exact { rounded } else { tensor });
        }
        let weights = out.join(file_names::MODEL_WEIGHTS);
        candle_core::safetensors::save(&tensors, &weights)
            .map_err(|error| io(&weights)(std::io::Error::other(error)))?;

        let file = dir.file(file_names::MODEL_CONFIG);
        let text = file.read().map_err(|source| ModelError::io(&file, source))?;
        let wrong =
            |e: serde_json::Error| ModelConfigError { name: file.name().to_owned(), message: e.to_string() };
        let mut config: Value = serde_json::from_slice(&text).map_err(wrong)?;
        if let Value::Object(fields) = &mut config {
            fields.remove("quantization_config");
            fields.remove("torch_dtype");
            let name = if dtype == DType::BF16 { "bfloat16" } else { "float32" };
            fields.insert("dtype".into(), name.into());
            if !self.config.tie_word_embeddings && ModelConfig::read(dir)?.tie_word_embeddings {
                untie(fields);
            }
        }
        let text = serde_json::to_vec_pretty(&config).map_err(wrong)?;
        let path = out.join(file_names::MODEL_CONFIG);
        std::fs::write(&path, text).map_err(io(&path))?;
        // The library gives only the owner access to the file that it writes.
        let permissions = path.metadata().map_err(io(&path))?.permissions();
        std::fs::set_permissions(&weights, permissions).map_err(io(&weights))
    }
}
