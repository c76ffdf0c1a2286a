//! Adapters as PEFT stores them: `adapter_config.json` and `adapter_model.safetensors`.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use lora_ops::read_f32;
use lora_ops::transfer::to_device;
use lora_spec::file_names::{ADAPTER_CONFIG, ADAPTER_WEIGHTS};
use lora_spec::{AdapterSpec, ModelConfig, SourceDir, TargetModules};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

use crate::adapter::peft_name;
use crate::{Adapter, AdapterLayout, ModelError};

/// The part of `adapter_config.json` that decides how an adapter is applied.
#[derive(Debug, Clone)]
pub struct PeftConfig {
    /// Rank.
    pub r: usize,
    /// Numerator of the scaling.
    pub lora_alpha: f64,
    /// The scaling is `lora_alpha / sqrt(r)` instead of `lora_alpha / r`.
    pub use_rslora: bool,
    /// Revision of the base on the hub.
    pub revision: Option<String>,
    /// The modules that PEFT gives an adapter.
    target_modules: TargetModules,
    exclude_modules: Option<TargetModules>,
    layers_to_transform: Option<Layers>,
}

/// `layers_to_transform`: one block, or several.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
enum Layers {
    One(usize),
    Several(Vec<usize>),
}

/// The contents of an adapter directory.
#[derive(Debug)]
pub struct PeftAdapter {
    /// The configuration.
    pub config: PeftConfig,
    dir: SourceDir,
    tensors: BTreeMap<String, (Vec<usize>, Vec<f32>)>,
}

impl PeftAdapter {
    /// Reads the adapter in `dir`.
    ///
    /// # Errors
    /// A file cannot be read or is invalid, or the adapter needs more than plain LoRA.
    pub fn read(dir: &SourceDir) -> Result<Self, ModelError> {
        let read = |name| {
            let file = dir.file(name);
            file.read().map_err(|source| match source.kind() {
                ErrorKind::NotFound => {
                    let message = format!("is not the directory of an adapter: it has no {name}");
                    ModelError::Adapter { name: dir.name().to_owned(), message }
                }
                _ => ModelError::io(&file, source),
            })
        };
        Self::parse(dir, &read(ADAPTER_CONFIG)?, &read(ADAPTER_WEIGHTS)?)
    }

    /// Parses the two files of an adapter. Errors name the files as files of `dir`.
    ///
    /// # Errors
    /// A file is invalid, a value is not finite, or the adapter needs more than plain LoRA.
    pub fn parse(dir: &SourceDir, config: &[u8], weights: &[u8]) -> Result<Self, ModelError> {
        let fail = |file: &str, message: String| adapter_error(dir, file, message);
        let config: Map<String, Value> =
            serde_json::from_slice(config).map_err(|e| fail(ADAPTER_CONFIG, e.to_string()))?;
        let config = PeftConfig::from_fields(config).map_err(|message| fail(ADAPTER_CONFIG, message))?;
        let loaded = candle_core::safetensors::load_buffer(weights, &Device::Cpu)
            .map_err(|e| fail(ADAPTER_WEIGHTS, format!("is not a readable safetensors file: {e}")))?;
        let mut tensors = BTreeMap::new();
        for (name, tensor) in loaded {
            let values = tensor.to_dtype(DType::F32)?.contiguous()?;
            let values = read_f32(&values)?.to_vec();
            if let Some(value) = values.iter().find(|value| !value.is_finite()) {
                return Err(fail(ADAPTER_WEIGHTS, format!("tensor {name} has the value {value}")));
            }
            tensors.insert(name, (tensor.dims().to_vec(), values));
        }
        Ok(Self { config, dir: dir.clone(), tensors })
    }

    /// Whether it is an adapter of the text tower of a multimodal model.
    pub fn is_multimodal(&self) -> bool {
        self.tensors.keys().any(|name| name.contains("language_model."))
    }

    /// Converts to an adapter of `model`. Its modules are those for which the file has matrices.
    ///
    /// # Errors
    /// A tensor is missing, has another shape, or does not belong to a linear module of `model`.
    pub fn to_adapter(&self, model: &ModelConfig) -> Result<Adapter, ModelError> {
        let fail = |message: String| adapter_error(&self.dir, ADAPTER_WEIGHTS, message);
        let modules: Vec<_> = model
            .linear_modules()
            .into_iter()
            .filter(|m| {
                let path = model.module_path(m);
                ["A", "B"].iter().any(|matrix| self.tensors.contains_key(&peft_name(&path, matrix)))
            })
            .collect();
        for module in &modules {
            let path = model.module_path(module);
            if let Some(field) = self.config.leaves_out(&path, module.layer) {
                let message = format!(
                    "{field}: leaves out {path}, for which {ADAPTER_WEIGHTS} has tensors; PEFT would ignore \
                     them"
                );
                return Err(adapter_error(&self.dir, ADAPTER_CONFIG, message));
            }
        }
        // Before anything of this size is allocated.
        let r = self.config.r;
        let other = |(name, (shape, _)): &(&String, &(Vec<usize>, Vec<f32>))| {
            name.ends_with("lora_A.weight") && shape.first() != Some(&r)
        };
        if let Some((name, (shape, _))) = self.tensors.iter().find(other) {
            return Err(fail(format!("tensor {name} has shape {shape:?}, but r is {r}")));
        }
        let layout = AdapterLayout::new(model, &modules, r);
        let mut params = vec![0.0; layout.len];
        let mut used = 0;
        for (name, shape, range) in layout.tensors() {
            let Some((found, values)) = self.tensors.get(&name) else {
                return Err(fail(format!("tensor {name} is missing")));
            };
            if found != &shape {
                return Err(fail(format!(
                    "tensor {name} has shape {found:?}; the base and r require {shape:?}"
                )));
            }
            params[range].copy_from_slice(values);
            used += 1;
        }
        if used != self.tensors.len() || used == 0 {
            let known: Vec<String> = layout.tensors().map(|(name, ..)| name).collect();
            let stray = self.tensors.keys().find(|name| !known.contains(name));
            let message = match stray {
                Some(name) => {
                    format!("tensor {name} does not belong to a linear module of the base's blocks")
                }
                None => "contains no tensors".into(),
            };
            return Err(fail(message));
        }
        Adapter::from_params(Arc::new(layout), params, self.config.scaling())
    }
}

fn adapter_error(dir: &SourceDir, file: &str, message: String) -> ModelError {
    ModelError::Adapter { name: dir.name().join(file), message }
}

impl PeftConfig {
    /// Returns the factor of `B A`.
    pub fn scaling(&self) -> f64 {
        let spec = AdapterSpec {
            r: self.r,
            lora_alpha: self.lora_alpha,
            use_rslora: self.use_rslora,
            ..AdapterSpec::default()
        };
        spec.scaling()
    }

    /// Returns the field because of which PEFT gives a module of a block no adapter. What a regular
    /// expression selects that only Python has is not known.
    fn leaves_out(&self, path: &str, layer: usize) -> Option<&'static str> {
        if self.target_modules.selects(path) == Some(false) {
            return Some("target_modules");
        }
        if self.exclude_modules.as_ref().is_some_and(|excluded| excluded.selects(path) == Some(true)) {
            return Some("exclude_modules");
        }
        let transforms = match &self.layers_to_transform {
            None => true,
            Some(Layers::One(only)) => *only == layer,
            // PEFT takes an empty list for none.
            Some(Layers::Several(layers)) => layers.is_empty() || layers.contains(&layer),
        };
        (!transforms).then_some("layers_to_transform")
    }

    /// Reads the fields of `adapter_config.json`.
    ///
    /// # Errors
    /// A field has another type, or the adapter needs more than plain LoRA. The message names the
    /// field.
    fn from_fields(mut fields: Map<String, Value>) -> Result<Self, String> {
        let peft_type = fields.remove("peft_type").unwrap_or(Value::Null);
        if peft_type != "LORA" {
            return Err(format!("peft_type: {peft_type} is not supported; supported: \"LORA\""));
        }
        let config = Self {
            r: required(&mut fields, "r", "a whole number from 1 on")?,
            lora_alpha: required(&mut fields, "lora_alpha", "a number")?,
            use_rslora: optional(&mut fields, "use_rslora", "true or false")?.unwrap_or(false),
            revision: optional(&mut fields, "revision", "a text")?,
            target_modules: required(&mut fields, "target_modules", "a list of names, or a text")?,
            exclude_modules: optional(&mut fields, "exclude_modules", "a list of names, or a text")?,
            layers_to_transform: optional(
                &mut fields,
                "layers_to_transform",
                "the number of a block, or a list",
            )?,
        };
        if config.r == 0 {
            return Err("r: is 0; it must be at least 1".into());
        }
        if !config.scaling().is_finite() {
            return Err(format!("lora_alpha: is {}", config.lora_alpha));
        }
        if let Some(init) = fields.remove("init_lora_weights").as_ref().and_then(Value::as_str)
            && !["gaussian", "eva", "orthogonal"].contains(&init)
        {
            return Err(format!(
                "init_lora_weights: {init:?} means that PEFT changes the base's weights when it loads the \
                 adapter; convert the adapter (save_pretrained with \
                 path_initial_model_for_weight_conversion), which sets this to true"
            ));
        }
        for (key, value) in fields {
            if WITHOUT_EFFECT.contains(&key.as_str()) || is_unset(&value) {
                continue;
            }
            return Err(format!(
                "{key}: {value} is not supported: it is not a setting of plain LoRA; if it has no effect, \
                 remove it"
            ));
        }
        Ok(config)
    }
}

/// Fields of PEFT 0.21 that do not change how a plain LoRA adapter of `r`, `lora_alpha` and its
/// tensors is applied.
const WITHOUT_EFFECT: [&str; 15] = [
    "task_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "inference_mode",
    "lora_dropout",
    "layers_pattern",
    "megatron_core",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "qalora_group_size",
    "runtime_config",
    "ensure_weight_tying",
];

/// Whether a field has the value of one that is not used.
fn is_unset(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(values) => values.is_empty(),
        Value::Object(fields) => fields.is_empty(),
        other => other == "none",
    }
}

fn required<T: DeserializeOwned>(
    fields: &mut Map<String, Value>,
    key: &str,
    kind: &str,
) -> Result<T, String> {
    optional(fields, key, kind)?.ok_or_else(|| format!("{key}: is missing"))
}

fn optional<T: DeserializeOwned>(
    fields: &mut Map<String, Value>,
    key: &str,
    kind: &str,
) -> Result<Option<T>, String> {
    let Some(value) = fields.remove(key).filter(|value| !value.is_null()) else { return Ok(None) };
    serde_json::from_value(value.clone())
        .map(Some)
        .map_err(|_| format!("{key}: is {value}; it must be {kind}"))
}

/// Returns the two files of an adapter as PEFT 0.21 writes them: (file name, contents). The initial
/// adapter, which is subtracted from the base, becomes part of the written adapter: `[A; A0]` and
/// `[B, -B0]`, like PEFT's conversion with `path_initial_model_for_weight_conversion`.
///
/// `spec` is the adapter of the job. `base` and `revision` are written as `base_model_name_or_path`
/// and `revision`.
pub fn write_adapter(
    adapter: &Adapter,
    spec: &AdapterSpec,
    base: &str,
    revision: Option<&str>,
) -> Result<[(&'static str, Vec<u8>); 2], ModelError> {
    let layout = adapter.layout();
    let flat = to_device(adapter.params(), &Device::Cpu)?;
    let initial = adapter.initial().map(|params| to_device(params, &Device::Cpu)).transpose()?;
    let spec = spec.exported();
    let mut matrices = Vec::new();
    for (i, (name, shape, range)) in layout.tensors().enumerate() {
        let of = |flat: &Tensor| flat.narrow(0, range.start, range.len())?.reshape(&shape);
        let mut matrix = of(&flat)?;
        if let Some(initial) = &initial {
            let is_b = i % 2 == 1;
            let subtracted = if is_b { of(initial)?.neg()? } else { of(initial)? };
            matrix = Tensor::cat(&[matrix, subtracted], usize::from(is_b))?;
        }
        let matrix = matrix.contiguous()?;
        let bytes: Vec<u8> = read_f32(&matrix)?.iter().flat_map(|p| p.to_le_bytes()).collect();
        matrices.push((name, matrix.dims().to_vec(), bytes));
    }
    let mut views = Vec::new();
    for (name, shape, bytes) in &matrices {
        let view = TensorView::new(Dtype::F32, shape.clone(), bytes).map_err(candle_core::Error::from)?;
        views.push((name, view));
    }
    // PEFT does not load a file without this entry.
    let metadata = [("format".to_owned(), "pt".to_owned())].into();
    let weights = safetensors::serialize(views, Some(metadata)).map_err(candle_core::Error::from)?;
    let config = json!({
        "alpha_pattern": {},
        "auto_mapping": null,
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": false,
        "inference_mode": true,
        "init_lora_weights": true,
        "layers_pattern": null,
        "layers_to_transform": null,
        "lora_alpha": integer_value(spec.lora_alpha),
        "lora_dropout": spec.lora_dropout,
        "modules_to_save": null,
        "peft_type": "LORA",
        "r": spec.r,
        "rank_pattern": {},
        "revision": revision,
        "target_modules": target_modules(layout),
        "task_type": "CAUSAL_LM",
        "use_dora": false,
        "use_rslora": spec.use_rslora,
    });
    let mut config = serde_json::to_vec_pretty(&config).unwrap_or_default();
    config.push(b'\n');
    Ok([(ADAPTER_WEIGHTS, weights), (ADAPTER_CONFIG, config)])
}

/// Writes a whole number as a JSON integer, as PEFT does for `lora_alpha`.
fn integer_value(number: f64) -> Value {
    let is_whole = number.fract() == 0.0 && number.abs() < 1e15;
    if is_whole { json!(number as i64) } else { json!(number) }
}

/// Module names as inference servers expect them: only the last part of each name, if that selects
/// the same modules in every block. In a multimodal model it would also select modules of the other
/// tower.
fn target_modules(layout: &AdapterLayout) -> Vec<String> {
    let last = |path: &str| path.rsplit('.').next().unwrap_or_default().to_owned();
    let mut names: Vec<String> = layout.modules.iter().map(|adapted| last(&adapted.path)).collect();
    names.sort();
    names.dedup();
    if !layout.is_multimodal() && names.len() * layout.layers() == layout.modules.len() {
        return names;
    }
    layout.modules.iter().map(|adapted| adapted.path.clone()).collect()
}
