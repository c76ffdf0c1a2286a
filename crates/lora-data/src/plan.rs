//! The plan of a job, computed from `config.json`, checkpoint headers and the dataset. No weights
//! are read.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use lora_spec::{
    AdapterSpec, FieldError, InitLoraWeights, JobSpec, LinearModule, LrSchedulerType,
    MAX_CONCURRENT_DECOMPOSITIONS, MicroBatchShape, ModelConfig, ModelConfigError, SafetensorsError,
    SafetensorsIndex, row_flops,
};
use serde::Serialize;

use crate::{BatchPlan, DataError, DataReport, Dataset, Tokenizer};

mod memory_requirements;

use memory_requirements::PlanInputs;
pub use memory_requirements::{MemoryRequirements, PlanMemory};

/// The plan of a job.
#[derive(Debug, Clone, Serialize)]
pub struct Plan {
    /// The job's name.
    pub name: String,
    /// Directory of the base.
    pub base: PathBuf,
    /// Number of parameters of the base.
    pub base_parameters: u64,
    /// Number of trained parameters.
    pub trainable_parameters: u64,
    /// Bytes of the result's parameters (f32).
    pub adapter_bytes: u64,
    /// Number of adapted modules by the last part of their name.
    pub modules: BTreeMap<String, usize>,
    /// Optimizer steps of the job.
    pub total_steps: u64,
    /// Optimizer steps of a pass over the data.
    pub steps_per_epoch: u64,
    /// Warm-up steps.
    pub warmup_steps: u64,
    /// Micro-batches of a full step, which is the largest number of workers that can share the
    /// step.
    pub micro_batches: usize,
    /// Tokens that the model computes over the whole job, without padding.
    pub tokens: u64,
    /// Share of padding among the positions that are computed in the first epoch.
    pub padding: f64,
    /// Floating-point operations of the model over the whole job, without padding and
    /// recomputation.
    pub flops: f64,
    /// Memory of a worker.
    pub memory: PlanMemory,
    /// The largest micro-batch.
    #[serde(skip)]
    pub shape: MicroBatchShape,
    /// Memory that a worker needs, with these settings and with alternatives.
    #[serde(skip)]
    pub requirements: MemoryRequirements,
    /// The training data.
    pub train: PlanData,
    /// The evaluation data.
    pub eval: Option<PlanData>,
    /// The first training row, with trained tokens between ⟦ and ⟧.
    pub sample: String,
    /// Notes for the user, such as settings without effect.
    pub notes: Vec<String>,
    /// Reasons why the job would fail.
    pub problems: Vec<String>,
}

/// A dataset in a plan.
#[derive(Debug, Clone, Serialize)]
pub struct PlanData {
    /// The file.
    pub path: PathBuf,
    /// Statistics of its rows.
    pub report: DataReport,
}

/// The reason why a job cannot be planned.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// A setting is invalid.
    #[error(transparent)]
    Field(#[from] FieldError),
    /// The base's `config.json` is invalid.
    #[error(transparent)]
    Config(#[from] ModelConfigError),
    /// The base's weights are invalid.
    #[error(transparent)]
    Safetensors(#[from] SafetensorsError),
    /// The dataset, the tokenizer or the chat template is invalid.
    #[error(transparent)]
    Data(#[from] DataError),
}

impl Plan {
    /// Plans `job`, whose paths are absolute.
    ///
    /// # Errors
    /// An invalid setting, base, tokenizer or dataset. Rows that `data.long_rows` refuses and rows
    /// without targets do not fail the plan; they are listed in `problems`.
    pub fn new(job: &JobSpec) -> Result<Self, PlanError> {
        job.check()?;
        let base = &job.model.base;
        let config = ModelConfig::read(base)?;
        let index = SafetensorsIndex::open(base)?;
        index.check(&config)?;
        index.check_format(&config, job.model.format())?;
        for (field, path) in [("data.train", Some(&job.data.train)), ("data.eval", job.data.eval.as_ref())] {
            if let Some(path) = path {
                check_data_file(field, path)?;
            }
        }
        let mut modules = BTreeMap::new();
        let mut trainable_parameters = 0;
        job.adapter.check_base(&config, &index)?;
        for module in job.adapter.modules(&config)? {
            let last = module.name.rsplit('.').next().unwrap_or_default().to_owned();
            *modules.entry(last).or_default() += 1;
            trainable_parameters += (job.adapter.r * (module.in_features + module.out_features)) as u64;
        }
        let tokenizer = Tokenizer::load(base)?;
        let mut problems = Vec::new();
        let mut read = |path: &PathBuf| -> Result<Dataset, DataError> {
            let (dataset, found) =
                Dataset::inspect(path, &tokenizer, job.data.max_length, job.data.long_rows)?;
            problems.extend(found.iter().map(ToString::to_string));
            Ok(dataset)
        };
        let train = read(&job.data.train)?;
        let eval = job.data.eval.as_ref().map(|path| Ok::<_, DataError>((path, read(path)?))).transpose()?;
        let training = &job.training;
        let order = BatchPlan::for_job(job, &train);
        let total_steps =
            if train.rows.is_empty() { 0 } else { training.total_steps(order.steps_per_epoch()) };
        let inputs = PlanInputs {
            model: config.clone(),
            index,
            longest: train.report.longest,
            rows: train.rows.len(),
        };
        let sample = train.rows.first().map(|row| tokenizer.marked_text(row)).transpose()?;
        let data = |path: &PathBuf, dataset: &Dataset| PlanData {
            path: path.clone(),
            report: dataset.report.clone(),
        };
        Ok(Self {
            name: job.name.clone(),
            base: base.clone(),
            base_parameters: config.parameters(),
            trainable_parameters,
            adapter_bytes: 4 * trainable_parameters * (job.adapter.exported().r / job.adapter.r) as u64,
            modules,
            total_steps,
            steps_per_epoch: order.steps_per_epoch(),
            warmup_steps: training.resolved_warmup_steps(total_steps),
            micro_batches: training.micro_batches().min(train.rows.len().div_ceil(training.micro_batch_size)),
            tokens: order.tokens(total_steps),
            flops: flops(&train, &config, trainable_parameters) * total_steps as f64
                / order.steps_per_epoch().max(1) as f64,
            memory: inputs.memory(job)?,
            requirements: inputs.requirements(job)?,
            shape: inputs.shape(job),
            padding: order.padding(),
            notes: notes(job, &config, &train),
            train: data(&job.data.train, &train),
            eval: eval.map(|(path, eval)| data(path, &eval)),
            sample: sample.unwrap_or_default(),
            problems,
        })
    }
}

/// Returns the floating-point operations of a pass over the rows.
fn flops(train: &Dataset, config: &ModelConfig, adapter: u64) -> f64 {
    let mut rows: BTreeMap<usize, u64> = BTreeMap::new();
    for length in train.lengths() {
        *rows.entry(length.saturating_sub(1)).or_default() += 1;
    }
    let of = |(length, count): (usize, u64)| row_flops(config, adapter, length as u64) as f64 * count as f64;
    rows.into_iter().map(of).sum()
}

/// Checks that the data file of `field` exists.
///
/// # Errors
/// `path` does not exist, cannot be accessed, or is not a file.
pub fn check_data_file(field: &str, path: &Path) -> Result<(), FieldError> {
    let shown = path.display();
    match path.metadata() {
        Ok(metadata) if metadata.is_file() => Ok(()),
        Ok(_) => Err(FieldError::new(field, format!("{shown} is not a file"))),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            Err(FieldError::new(field, format!("the file {shown} does not exist")))
        }
        Err(error) => Err(FieldError::new(field, format!("{shown}: {error}"))),
    }
}

/// Possible values of vLLM's `--max-lora-rank` (its `MaxLoRARanks`, since version 0.14). The first
/// one is the default.
const VLLM_RANKS: [usize; 7] = [16, 32, 64, 128, 256, 320, 512];

/// Returns a note if vLLM does not serve an adapter of rank `r` with its default settings.
fn serving_note(r: usize) -> Option<String> {
    match VLLM_RANKS.iter().position(|most| r <= *most) {
        Some(0) => None,
        Some(i) => Some(format!(
            "vLLM serves rank {r} with --max-lora-rank {} (its default is {})",
            VLLM_RANKS[i], VLLM_RANKS[0]
        )),
        None => Some(format!("vLLM serves ranks up to {}, not {r}", VLLM_RANKS[VLLM_RANKS.len() - 1])),
    }
}

/// Returns the estimated seconds for the singular value decompositions of the adapted weights, with
/// [`MAX_CONCURRENT_DECOMPOSITIONS`] of them at a time; `None` if the initialization needs none.
fn decomposition_seconds(adapter: &AdapterSpec, config: &ModelConfig) -> Option<f64> {
    /// Seconds for a matrix of n x n divided by n^3, measured for 1024 and 2048 on one processor
    /// (Zen 5).
    const SECONDS: f64 = 1.2e-10;
    let rounds = match adapter.init_lora_weights {
        InitLoraWeights::Pissa => 1,
        InitLoraWeights::Loftq => adapter.loftq_iter,
        _ => return None,
    };
    let cost = |m: &LinearModule| {
        let (short, long) =
            (m.in_features.min(m.out_features) as f64, m.in_features.max(m.out_features) as f64);
        short * short * long
    };
    let all: f64 = adapter.modules(config).ok()?.iter().map(cost).sum();
    Some(f64::from(rounds) * all * SECONDS / MAX_CONCURRENT_DECOMPOSITIONS as f64)
}

fn notes(job: &JobSpec, config: &ModelConfig, train: &Dataset) -> Vec<String> {
    let mut notes = Vec::new();
    let training = &job.training;
    if training.lr_scheduler_type == LrSchedulerType::Constant && training.warmup_steps > 0.0 {
        notes.push(
            "training.warmup_steps has no effect with lr_scheduler_type constant (see constant_with_warmup)"
                .into(),
        );
    }
    if training.optim.is_paged() {
        notes.push(
            "training.optim: paging has no effect on CPUs, where moments are in the host's memory anyway"
                .into(),
        );
    }
    if train.report.longest > config.max_position_embeddings {
        notes.push(format!(
            "the longest row has {} tokens, more than the base's max_position_embeddings {}",
            train.report.longest, config.max_position_embeddings
        ));
    }
    let init = job.adapter.init_lora_weights;
    if init.subtracts_initial() {
        notes.push(format!(
            "init_lora_weights: {init} exports an adapter of rank {} for the unchanged base, which is \
             twice the trained rank",
            job.adapter.exported().r
        ));
    }
    if let Some(seconds) = decomposition_seconds(&job.adapter, config).filter(|seconds| *seconds > 60.0) {
        let faster =
            if init == InitLoraWeights::Pissa { "; pissa_niter_4 takes a fraction of that" } else { "" };
        notes.push(format!(
            "init_lora_weights: {init} decomposes the adapted weights before the first step, which takes \
             about {:.0} minutes on four processors{faster}",
            (seconds / 60.0).ceil()
        ));
    }
    if job.base_layout().loftq.is_some() {
        notes.push(
            "loftq_iter above 1 trains over a requantized base, which only this job's result describes; \
             serve the result with loractl merge"
                .into(),
        );
    }
    notes.extend(serving_note(job.adapter.exported().r));
    for (key, rows) in &train.report.ignored_keys {
        notes.push(format!("key {key:?} of {rows} training rows has no effect"));
    }
    notes
}

#[cfg(test)]
mod tests {
    use lora_spec::{AdapterSpec, InitLoraWeights, ModelConfig};

    use super::{decomposition_seconds, serving_note};

    #[test]
    fn decomposition_time_grows_cubically() {
        let config = |hidden: usize, mlp: usize| {
            ModelConfig::parse(&format!(
                r#"{{"architectures": ["LlamaForCausalLM"], "hidden_size": {hidden},
                "intermediate_size": {mlp}, "vocab_size": 50, "num_hidden_layers": 1,
                "num_attention_heads": 4, "num_key_value_heads": 4}}"#
            ))
            .unwrap()
        };
        let of = |init_lora_weights, loftq_iter, config: &ModelConfig| {
            let adapter = AdapterSpec { init_lora_weights, loftq_iter, ..AdapterSpec::default() };
            decomposition_seconds(&adapter, config)
        };
        let small = config(64, 128);
        // Four weights of 64 x 64 and three of 64 x 128; four are decomposed at a time.
        let cubes = (4 * 64 * 64 * 64 + 3 * 64 * 64 * 128) as f64;
        assert_eq!(of(InitLoraWeights::Pissa, 1, &small), Some(cubes * 1.2e-10 / 4.0));
        assert_eq!(of(InitLoraWeights::Loftq, 5, &small), Some(5.0 * cubes * 1.2e-10 / 4.0));
        assert_eq!(of(InitLoraWeights::Olora, 1, &small), None);
        assert_eq!(of(InitLoraWeights::Default, 1, &small), None);
    }

    #[test]
    fn ranks_above_the_vllm_default_get_a_note() {
        assert_eq!(serving_note(1), None);
        assert_eq!(serving_note(16), None);
        assert_eq!(
            serving_note(17).as_deref(),
            Some("vLLM serves rank 17 with --max-lora-rank 32 (its default is 16)")
        );
        assert!(serving_note(300).is_some_and(|note| note.contains("--max-lora-rank 320")));
        assert_eq!(serving_note(513).as_deref(), Some("vLLM serves ranks up to 512, not 513"));
    }
}
