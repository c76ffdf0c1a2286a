//! Where a run reads from, and what it starts with.

use std::path::{Path, PathBuf};

use lora_data::Dataset;
use lora_model::{Adapter, AdapterLayout, Base, PeftAdapter, sha256};
use lora_ops::transfer::to_vec;
use lora_spec::{FieldError, InitLoraWeights, JobSpec, ModelConfig};
use serde_json::Value;

use crate::TrainError;

/// Where the files of a job lie on this machine. The job's own paths are those of the machine that it was written on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunInputs {
    /// The rows of `data.train`.
    pub train: PathBuf,
    /// The rows of `data.eval`; set if and only if the job has it.
    pub eval: Option<PathBuf>,
    /// The adapter of `adapter.init_from`; set if and only if the job has it.
    pub init_from: Option<PathBuf>,
}

impl RunInputs {
    /// The job's own paths.
    pub fn from_job(job: &JobSpec) -> Self {
        Self {
            train: job.data.train.clone(),
            eval: job.data.eval.clone(),
            init_from: job.adapter.init_from.clone(),
        }
    }
}

/// The adapter that `job` starts from over `base`: a fresh one, or that in `init_from`.
pub(crate) fn initial_adapter(
    job: &JobSpec,
    init_from: Option<&Path>,
    base: &Base,
) -> Result<Adapter, TrainError> {
    match init_from {
        Some(dir) => load_adapter(dir, job, &base.config),
        None => Ok(Adapter::init(base, &job.adapter, job.training.seed)?),
    }
}

/// The adapter in `dir`, `adapter.init_from`, over a base of `config`. It must have the form that the job asks for.
pub fn load_adapter(dir: &Path, job: &JobSpec, config: &ModelConfig) -> Result<Adapter, TrainError> {
    let modules = job.adapter.target_modules.resolve(config)?;
    let layout = AdapterLayout::new(config, &modules, job.adapter.r);
    let field = |message: String| FieldError::new("adapter.init_from", message);
    let adapter = PeftAdapter::read(dir)
        .and_then(|adapter| adapter.to_adapter(config))
        .map_err(|e| field(e.to_string()))?;
    if **adapter.layout() != layout || adapter.scaling() != job.adapter.scaling() {
        return Err(field(format!(
            "the adapter in {} has another r, scaling or set of modules than adapter.r, adapter.lora_alpha, \
             adapter.use_rslora and adapter.target_modules ask for; make them equal",
            dir.display()
        ))
        .into());
    }
    Ok(adapter)
}

/// Hash of everything the job's bits depend on, beside the build: settings and contents, not names and places.
pub(crate) fn job_identity(
    job: &JobSpec,
    base: &Base,
    train: &Dataset,
    eval: Option<&Dataset>,
    adapter: &Adapter,
) -> Result<String, TrainError> {
    let mut adapter_spec = serde_json::json!(job.adapter);
    // What is not used is left out, so that a new setting makes no other job of an old one.
    if let Some(spec) = adapter_spec.as_object_mut() {
        spec["init_from"] = Value::Null;
        if job.adapter.init_lora_weights == InitLoraWeights::Default {
            spec.retain(|key, _| !["init_lora_weights", "loftq_iter"].contains(&key.as_str()));
        }
    }
    // An adapter that is computed from the base may have other bits on another machine; it travels with the state.
    let initial = match job.adapter.init_lora_weights {
        InitLoraWeights::Default => {
            let params: Vec<f32> = to_vec(adapter.params())?;
            Some(sha256(&params.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>()))
        }
        _ => None,
    };
    let everything = serde_json::json!({
        "base": base.sha256(),
        "format": job.model.format(),
        "adapter": adapter_spec,
        "initial_parameters": initial,
        "train": train.sha256,
        "eval": eval.map(|eval| &eval.sha256),
        "max_length": job.data.max_length,
        "long_rows": job.data.long_rows,
        "shuffle": job.data.shuffle,
        "training": job.training,
    });
    Ok(sha256(everything.to_string().as_bytes()))
}
