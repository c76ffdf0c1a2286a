//! What a run starts from: its initial adapter, and the identity of its job.

use lora_data::Dataset;
use lora_model::{Adapter, AdapterLayout, Base, PeftAdapter, sha256};
use lora_ops::transfer::to_vec;
use lora_spec::{FieldError, InitLoraWeights, JobFiles, JobSpec, ModelConfig, SourceDir};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::TrainError;

/// Returns the adapter with which `job` starts over `base`: the one of `adapter.init_from`, or a
/// newly initialized one.
pub(crate) fn initial_adapter(job: &JobSpec, files: &JobFiles, base: &Base) -> Result<Adapter, TrainError> {
    match &files.init_from {
        Some(dir) => load_adapter(dir, job, &base.config),
        None => Ok(Adapter::init(base, &files.base, &job.adapter, job.training.seed)?),
    }
}

/// Loads the adapter in `dir` (`adapter.init_from`) over a base of `config`.
///
/// # Errors
/// The adapter cannot be read, or its rank, scaling or modules are not those of the job.
pub fn load_adapter(dir: &SourceDir, job: &JobSpec, config: &ModelConfig) -> Result<Adapter, TrainError> {
    let modules = job.adapter.target_modules.resolve(config)?;
    let layout = AdapterLayout::new(config, &modules, job.adapter.r);
    let field = |message: String| FieldError::new("adapter.init_from", message);
    let adapter = PeftAdapter::read(dir)
        .and_then(|adapter| adapter.to_adapter(config))
        .map_err(|e| field(e.to_string()))?;
    if **adapter.layout() != layout || adapter.scaling() != job.adapter.scaling() {
        return Err(field(format!(
            "the adapter in {dir} has another r, scaling or set of modules than adapter.r, \
             adapter.lora_alpha, adapter.use_rslora and adapter.target_modules specify; make them equal"
        ))
        .into());
    }
    Ok(adapter)
}

/// Hashes of a job's token rows, which depend on its data, its tokenizer and its chat template.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct TokenHashes {
    train: String,
    eval: Option<String>,
}

impl TokenHashes {
    pub(crate) fn new(train: &Dataset, eval: Option<&Dataset>) -> Self {
        Self { train: train.tokens_sha256(), eval: eval.map(Dataset::tokens_sha256) }
    }

    /// Returns whether the rows that both have differ.
    pub(crate) fn differ(&self, other: &Self) -> bool {
        let eval = self.eval.as_ref().zip(other.eval.as_ref());
        self.train != other.train || eval.is_some_and(|(ours, theirs)| ours != theirs)
    }
}

/// Returns the hash of everything that the job's bits depend on, except the build: settings and
/// contents, but not names and paths.
pub(crate) fn job_identity(
    job: &JobSpec,
    base: &Base,
    train: &Dataset,
    eval: Option<&Dataset>,
    tokens: &TokenHashes,
    adapter: &Adapter,
) -> Result<String, TrainError> {
    let mut adapter_spec = serde_json::json!(job.adapter);
    // Unused settings are omitted, so that the identity of an old job stays the same when a setting
    // is added.
    if let Some(spec) = adapter_spec.as_object_mut() {
        spec["init_from"] = Value::Null;
        if job.adapter.init_lora_weights == InitLoraWeights::Default {
            spec.retain(|key, _| !["init_lora_weights", "loftq_iter"].contains(&key.as_str()));
        }
    }
    // An adapter that is computed from the base may have other bits on another machine. It is not
    // part of the identity, because it is sent with the state.
    let initial = match job.adapter.init_lora_weights {
        InitLoraWeights::Default => {
            let params: Vec<f32> = to_vec(adapter.params())?;
            Some(sha256(&params.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>()))
        }
        _ => None,
    };
    let mut everything = serde_json::json!({
        "base": base.sha256(),
        "format": job.model.format(),
        "adapter": adapter_spec,
        "initial_parameters": initial,
        "train": train.sha256,
        "eval": eval.map(|eval| &eval.sha256),
        // The tokenizer and the chat template of the base are not in its hash.
        "tokens": tokens,
        "max_length": job.data.max_length,
        "long_rows": job.data.long_rows,
        "shuffle": job.data.shuffle,
        "training": job.training,
    });
    if job.data.packing {
        everything["packing"] = true.into();
    }
    Ok(sha256(everything.to_string().as_bytes()))
}
