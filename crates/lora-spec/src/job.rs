//! A job's settings, their defaults, and the checks that need nothing but the job itself.
//!
//! A setting that PEFT's `LoraConfig` or Transformers' `TrainingArguments` has keeps its name and meaning.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::adapter_spec::{AdapterSpec, TargetModules};
use crate::model_spec::{BaseLayout, Loftq, ModelSpec, QuantizationType};
use crate::{FieldError, InitLoraWeights};

/// A whole job, as `job.yaml` writes it.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct JobSpec {
    /// Name shown to people: letters, digits, `-`, `_` and `.`, at most 63 characters.
    pub name: String,
    /// The frozen base model.
    pub model: ModelSpec,
    /// The adapter that is trained.
    pub adapter: AdapterSpec,
    /// What it is trained and evaluated on.
    pub data: DataSpec,
    /// How it is trained.
    pub training: TrainingSpec,
    /// How many workers share it.
    pub workers: WorkersSpec,
}

/// What a job is trained and evaluated on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DataSpec {
    /// JSONL or Parquet file with training rows.
    pub train: PathBuf,
    /// The same for evaluation; none: no evaluation.
    pub eval: Option<PathBuf>,
    /// The most tokens a row may have.
    pub max_length: usize,
    /// What becomes of longer rows.
    pub long_rows: LongRows,
    /// Draw a new order of the rows for each epoch (from `training.seed`).
    pub shuffle: bool,
}

impl Default for DataSpec {
    fn default() -> Self {
        Self { train: PathBuf::new(), eval: None, max_length: 512, long_rows: LongRows::Error, shuffle: true }
    }
}

/// What becomes of rows longer than `max_length`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LongRows {
    /// The job is refused, and the rows are named.
    #[default]
    Error,
    /// Cut at the right end.
    Truncate,
    /// Left out.
    Drop,
}

/// How a job is trained, in `TrainingArguments`' terms.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TrainingSpec {
    /// Passes over the data; a fraction ends within a pass.
    pub num_train_epochs: f64,
    /// Ends the job after this many steps; overrides `num_train_epochs`.
    pub max_steps: Option<u64>,
    /// Rows in one optimizer step, over all workers.
    pub global_batch_size: usize,
    /// Rows computed at a time; memory grows with it, results of a step are sums over all of them.
    pub micro_batch_size: usize,
    /// Peak learning rate.
    pub learning_rate: f64,
    /// Shape of the learning rate over the job.
    pub lr_scheduler_type: LrSchedulerType,
    /// Steps of linear warm-up; a value below 1 is a fraction of all steps.
    pub warmup_steps: f64,
    /// The optimizer.
    pub optim: Optim,
    /// AdamW's first decay rate.
    pub adam_beta1: f64,
    /// AdamW's second decay rate.
    pub adam_beta2: f64,
    /// AdamW's epsilon.
    pub adam_epsilon: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Gradients are scaled down to this 2-norm; 0 turns clipping off.
    pub max_grad_norm: f64,
    /// Seeds the adapter, the order of the rows and dropout.
    pub seed: u64,
    /// What is recomputed in the backward pass instead of kept.
    pub activation_checkpointing: ActivationCheckpointing,
    /// Evaluate every so many steps (and at the end); needs `data.eval`.
    pub eval_steps: u64,
    /// Write a checkpoint every so many steps.
    pub save_steps: u64,
    /// Keep this many newest checkpoints. The best adapter is not lost with them: it is part of each checkpoint.
    pub save_total_limit: usize,
    /// Report metrics every so many steps.
    pub logging_steps: u64,
    /// Export the adapter with the lowest `eval_loss` rather than the last.
    pub load_best_model_at_end: bool,
    /// Stop after this many evaluations without improvement; none: never.
    pub early_stopping_patience: Option<u64>,
    /// What counts as an improvement of `eval_loss`.
    pub early_stopping_threshold: f64,
}

impl Default for TrainingSpec {
    fn default() -> Self {
        Self {
            num_train_epochs: 3.0,
            max_steps: None,
            global_batch_size: 32,
            micro_batch_size: 4,
            learning_rate: 2e-4,
            lr_scheduler_type: LrSchedulerType::Cosine,
            warmup_steps: 0.03,
            optim: Optim::Adamw,
            adam_beta1: 0.9,
            adam_beta2: 0.999,
            adam_epsilon: 1e-8,
            weight_decay: 0.0,
            max_grad_norm: 1.0,
            seed: 42,
            activation_checkpointing: ActivationCheckpointing::None,
            eval_steps: 50,
            save_steps: 50,
            save_total_limit: 3,
            logging_steps: 1,
            load_best_model_at_end: false,
            early_stopping_patience: None,
            early_stopping_threshold: 0.0,
        }
    }
}

impl TrainingSpec {
    /// Steps of the whole job: `max_steps`, or as many as `num_train_epochs` takes, rounded up.
    pub fn total_steps(&self, steps_per_epoch: u64) -> u64 {
        self.max_steps
            .unwrap_or_else(|| ((self.num_train_epochs * steps_per_epoch as f64).ceil() as u64).max(1))
    }

    /// Steps of warm-up among `total`; a fraction is rounded up, as Transformers does.
    pub fn resolved_warmup_steps(&self, total: u64) -> u64 {
        if self.warmup_steps < 1.0 {
            (total as f64 * self.warmup_steps).ceil() as u64
        } else {
            self.warmup_steps as u64
        }
    }

    /// Micro-batches of a full step.
    pub fn micro_batches(&self) -> usize {
        self.global_batch_size.div_ceil(self.micro_batch_size.max(1))
    }
}

/// Learning-rate schedules, as Transformers' `get_scheduler` has them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LrSchedulerType {
    /// Warm-up, then linearly down to 0.
    Linear,
    /// Warm-up, then half a cosine down to 0.
    Cosine,
    /// The peak from the first step on; warm-up is ignored, as in Transformers.
    Constant,
    /// Warm-up, then the peak.
    ConstantWithWarmup,
}

/// The optimizer: AdamW, with its moments in f32 or in 8 bits. Paged ones are the same numbers, but lie in the host's memory where a
/// GPU trains.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum Optim {
    /// `torch.optim.AdamW`.
    #[default]
    #[serde(rename = "adamw")]
    Adamw,
    /// bitsandbytes' `AdamW8bit`: 2 bytes a parameter for the moments instead of 8 (arXiv 2110.02861).
    #[serde(rename = "adamw_8bit")]
    Adamw8bit,
    /// `adamw`, paged.
    #[serde(rename = "paged_adamw_32bit")]
    PagedAdamw32bit,
    /// `adamw_8bit`, paged.
    #[serde(rename = "paged_adamw_8bit")]
    PagedAdamw8bit,
}

impl Optim {
    /// Whether moments are in 8 bits (those of small tensors are f32 all the same).
    pub fn is_8bit(self) -> bool {
        matches!(self, Self::Adamw8bit | Self::PagedAdamw8bit)
    }

    /// Whether moments lie in the host's memory, wherever the parameters are.
    pub fn is_paged(self) -> bool {
        matches!(self, Self::PagedAdamw32bit | Self::PagedAdamw8bit)
    }
}

/// What the backward pass recomputes instead of keeping it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ActivationCheckpointing {
    /// Everything is kept.
    #[default]
    None,
    /// A decoder block keeps its input alone; the rest is computed again.
    Block,
    /// As `block`, but attention's output is kept too: what costs the most for its size in long rows.
    BlockSaveAttention,
}

/// How many workers share a job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct WorkersSpec {
    /// The job starts once this many are there.
    pub min: usize,
    /// It never takes more.
    pub max: usize,
}

impl Default for WorkersSpec {
    fn default() -> Self {
        Self { min: 1, max: 1 }
    }
}

impl JobSpec {
    /// What the base is in memory.
    pub fn base_layout(&self) -> BaseLayout {
        let AdapterSpec { r, target_modules, init_lora_weights, loftq_iter: rounds, .. } = &self.adapter;
        let requantizes = *init_lora_weights == InitLoraWeights::Loftq && *rounds > 1;
        BaseLayout {
            format: self.model.format(),
            loftq: requantizes.then(|| Loftq {
                rounds: *rounds,
                r: *r,
                target_modules: target_modules.clone(),
            }),
        }
    }

    /// Makes the paths of the job absolute; relative ones count from `dir`, where the job file lies.
    pub fn resolve_paths(&mut self, dir: &Path) {
        let set = |path: &mut PathBuf| *path = dir.join(&path);
        if self.model.base_url().is_none() {
            set(&mut self.model.base);
        }
        set(&mut self.data.train);
        self.data.eval.as_mut().map(set);
        self.adapter.init_from.as_mut().map(set);
    }

    /// The first setting that is another in `earlier`, and both values. The number of workers changes no result and is
    /// not compared.
    pub fn difference(&self, earlier: &Self) -> Option<FieldError> {
        let json = |job: &Self| serde_json::to_value(job).unwrap_or_default();
        let (ours, theirs) = (json(self), json(earlier));
        crate::known_keys()
            .into_iter()
            .filter(|(key, section)| !section && !key.starts_with("workers."))
            .find_map(|(key, _)| {
                let pointer = format!("/{}", key.replace('.', "/"));
                let value = |job: &Value| job.pointer(&pointer).cloned().unwrap_or_default();
                let (given, kept) = (value(&ours), value(&theirs));
                let message = format!("is {given}, and was {kept}");
                (given != kept).then(|| FieldError::new(&key, message))
            })
    }

    /// Checks every value that can be judged without looking at a file.
    pub fn check(&self) -> Result<(), FieldError> {
        let fail = |field: &str, message: String| Err(FieldError::new(field, message));
        let legal = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        if self.name.is_empty() || self.name.len() > 63 || !self.name.chars().all(legal) {
            return fail(
                "name",
                format!("{:?} is no name: 1 to 63 letters, digits, '-', '_' or '.'", self.name),
            );
        }
        if self.name.starts_with('.') {
            return fail("name", format!("{:?} starts with a dot", self.name));
        }
        for (field, path) in [("model.base", &self.model.base), ("data.train", &self.data.train)] {
            if path.as_os_str().is_empty() {
                return fail(field, "is missing".into());
            }
        }
        if self.model.bnb_4bit_use_double_quant && self.model.quantization != QuantizationType::Nf4 {
            return fail(
                "model.bnb_4bit_use_double_quant",
                "needs model.quantization: nf4; a base that is quantized already keeps its scales".into(),
            );
        }
        let (adapter, training) = (&self.adapter, &self.training);
        check_positive("adapter.r", adapter.r as u64)?;
        check_at_most("adapter.r", adapter.r as u64, 4096)?;
        check_range("adapter.lora_alpha", adapter.lora_alpha, 0.0, f64::MAX, Bounds::ExclusiveLow)?;
        check_range("adapter.lora_dropout", adapter.lora_dropout, 0.0, 1.0, Bounds::ExclusiveHigh)?;
        if matches!(&adapter.target_modules, TargetModules::Names(names) if names.is_empty()) {
            return fail("adapter.target_modules", "is an empty list; name a module, or all-linear".into());
        }
        if adapter.init_lora_weights == InitLoraWeights::Loftq
            && self.model.quantization == QuantizationType::None
        {
            return fail(
                "adapter.init_lora_weights",
                "loftq makes up for quantization: set model.quantization to nf4 or int8".into(),
            );
        }
        check_positive("adapter.loftq_iter", u64::from(adapter.loftq_iter))?;
        check_at_most("adapter.loftq_iter", u64::from(adapter.loftq_iter), 100)?;
        if adapter.loftq_iter != 1 && adapter.init_lora_weights != InitLoraWeights::Loftq {
            return fail("adapter.loftq_iter", "needs adapter.init_lora_weights: loftq".into());
        }
        if adapter.init_from.is_some() && adapter.init_lora_weights != InitLoraWeights::Default {
            return fail(
                "adapter.init_lora_weights",
                format!(
                    "{} and adapter.init_from both say what the adapter starts as; leave one out",
                    adapter.init_lora_weights
                ),
            );
        }
        check_positive("data.max_length", self.data.max_length as u64)?;
        check_range("training.num_train_epochs", training.num_train_epochs, 0.0, 1e6, Bounds::ExclusiveLow)?;
        if let Some(steps) = training.max_steps {
            check_positive("training.max_steps", steps)?;
        }
        check_positive("training.global_batch_size", training.global_batch_size as u64)?;
        check_at_most("training.global_batch_size", training.global_batch_size as u64, 1 << 20)?;
        check_positive("training.micro_batch_size", training.micro_batch_size as u64)?;
        if training.micro_batch_size > training.global_batch_size {
            return fail(
                "training.micro_batch_size",
                format!(
                    "{} is more than global_batch_size {}",
                    training.micro_batch_size, training.global_batch_size
                ),
            );
        }
        check_range("training.learning_rate", training.learning_rate, 0.0, f64::MAX, Bounds::ExclusiveLow)?;
        check_range("training.warmup_steps", training.warmup_steps, 0.0, 1e15, Bounds::Inclusive)?;
        if training.warmup_steps >= 1.0 && training.warmup_steps.fract() != 0.0 {
            return fail(
                "training.warmup_steps",
                format!("{} is neither a whole number nor a fraction below 1", training.warmup_steps),
            );
        }
        check_range("training.adam_beta1", training.adam_beta1, 0.0, 1.0, Bounds::ExclusiveHigh)?;
        check_range("training.adam_beta2", training.adam_beta2, 0.0, 1.0, Bounds::ExclusiveHigh)?;
        check_range("training.adam_epsilon", training.adam_epsilon, 0.0, 1.0, Bounds::ExclusiveLow)?;
        check_range("training.weight_decay", training.weight_decay, 0.0, 1e3, Bounds::Inclusive)?;
        check_range("training.max_grad_norm", training.max_grad_norm, 0.0, f64::MAX, Bounds::Inclusive)?;
        check_positive("training.eval_steps", training.eval_steps)?;
        check_positive("training.save_steps", training.save_steps)?;
        check_positive("training.save_total_limit", training.save_total_limit as u64)?;
        check_positive("training.logging_steps", training.logging_steps)?;
        check_range(
            "training.early_stopping_threshold",
            training.early_stopping_threshold,
            0.0,
            1e9,
            Bounds::Inclusive,
        )?;
        if let Some(patience) = training.early_stopping_patience {
            check_positive("training.early_stopping_patience", patience)?;
        }
        for (field, set) in [
            ("training.load_best_model_at_end", training.load_best_model_at_end),
            ("training.early_stopping_patience", training.early_stopping_patience.is_some()),
        ] {
            if set && self.data.eval.is_none() {
                return fail(field, "needs evaluation rows: set data.eval".into());
            }
        }
        check_positive("workers.min", self.workers.min as u64)?;
        if self.workers.min > self.workers.max {
            return fail(
                "workers.max",
                format!("{} is less than workers.min {}", self.workers.max, self.workers.min),
            );
        }
        let micro_batches = training.micro_batches();
        if self.workers.max > micro_batches {
            return fail(
                "workers.max",
                format!(
                    "{} workers are more than the {micro_batches} micro-batches of a step (global_batch_size {} / micro_batch_size {}); \
                     lower it to {micro_batches} or make micro_batch_size smaller",
                    self.workers.max, training.global_batch_size, training.micro_batch_size
                ),
            );
        }
        Ok(())
    }
}

enum Bounds {
    Inclusive,
    ExclusiveLow,
    ExclusiveHigh,
}

fn check_positive(field: &str, value: u64) -> Result<(), FieldError> {
    if value == 0 { Err(FieldError::new(field, "is 0; it must be at least 1".into())) } else { Ok(()) }
}

fn check_at_most(field: &str, value: u64, most: u64) -> Result<(), FieldError> {
    if value > most {
        return Err(FieldError::new(field, format!("is {value}; at most {most} is possible")));
    }
    Ok(())
}

fn check_range(field: &str, value: f64, low: f64, high: f64, bounds: Bounds) -> Result<(), FieldError> {
    let (ok, words) = match bounds {
        Bounds::Inclusive => (value >= low && value <= high, format!("from {low} on")),
        Bounds::ExclusiveLow => (value > low && value <= high, format!("above {low}")),
        Bounds::ExclusiveHigh => (value >= low && value < high, format!("from {low} to below {high}")),
    };
    if ok && value.is_finite() {
        return Ok(());
    }
    Err(FieldError::new(field, format!("is {value}; it must be a finite number {words}")))
}
