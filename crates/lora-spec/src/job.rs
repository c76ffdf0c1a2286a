//! The settings of a job, their defaults, and the checks that read no files.
//!
//! A setting that also exists in PEFT's `LoraConfig` or Transformers' `TrainingArguments` has the
//! same name and meaning.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::adapter_spec::{AdapterSpec, TargetModules};
use crate::model_spec::{BaseLayout, Loftq, ModelSpec, QuantizationType};
use crate::{FieldError, InitLoraWeights};

/// The settings of a job, as in `job.yaml`.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct JobSpec {
    /// Display name: letters, digits, `-`, `_` and `.`, at most 63 characters.
    pub name: String,
    /// The frozen base model.
    pub model: ModelSpec,
    /// The adapter that is trained.
    pub adapter: AdapterSpec,
    /// The training and evaluation data.
    pub data: DataSpec,
    /// The settings of training.
    pub training: TrainingSpec,
    /// The number of workers.
    pub workers: WorkersSpec,
}

/// The training and evaluation data of a job.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DataSpec {
    /// JSONL or Parquet file with training rows.
    pub train: PathBuf,
    /// JSONL or Parquet file with evaluation rows; `None`: no evaluation.
    pub eval: Option<PathBuf>,
    /// Maximum number of tokens of a row.
    pub max_length: usize,
    /// The handling of longer rows.
    pub long_rows: LongRows,
    /// Shuffle the rows again in each epoch (with `training.seed`).
    pub shuffle: bool,
}

impl Default for DataSpec {
    fn default() -> Self {
        Self { train: PathBuf::new(), eval: None, max_length: 512, long_rows: LongRows::Error, shuffle: true }
    }
}

/// The handling of rows longer than `max_length`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LongRows {
    /// Refuse the job with an error that names the rows.
    #[default]
    Error,
    /// Truncate the rows at the right end.
    Truncate,
    /// Drop the rows.
    Drop,
}

/// The settings of training, in the terms of `TrainingArguments`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TrainingSpec {
    /// Passes over the data. With a fraction, training ends within a pass.
    pub num_train_epochs: f64,
    /// Number of steps after which the job ends; overrides `num_train_epochs`.
    pub max_steps: Option<u64>,
    /// Rows in one optimizer step, over all workers.
    pub global_batch_size: usize,
    /// Rows that are computed at a time. Memory grows with this number. The result of a step is the
    /// sum over all its micro-batches.
    pub micro_batch_size: usize,
    /// Peak learning rate.
    pub learning_rate: f64,
    /// Learning-rate schedule.
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
    /// Seed of the adapter, the order of the rows and dropout.
    pub seed: u64,
    /// Activations that the backward pass recomputes instead of keeping them.
    pub activation_checkpointing: ActivationCheckpointing,
    /// Number of steps between evaluations, which also run at the end; needs `data.eval`.
    pub eval_steps: u64,
    /// Number of steps between checkpoints.
    pub save_steps: u64,
    /// Number of newest checkpoints to keep. The best adapter is part of each checkpoint, so it is
    /// never removed with an older one.
    pub save_total_limit: usize,
    /// Number of steps between reports of metrics.
    pub logging_steps: u64,
    /// Export the adapter with the lowest `eval_loss` instead of the last one.
    pub load_best_model_at_end: bool,
    /// Number of evaluations in a row without improvement after which training stops; `None`:
    /// never.
    pub early_stopping_patience: Option<u64>,
    /// `eval_loss` must fall by more than this value to count as an improvement.
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
    /// Returns the number of steps of the job: `max_steps`, or the steps of `num_train_epochs`,
    /// rounded up.
    pub fn total_steps(&self, steps_per_epoch: u64) -> u64 {
        self.max_steps
            .unwrap_or_else(|| ((self.num_train_epochs * steps_per_epoch as f64).ceil() as u64).max(1))
    }

    /// Returns the number of warm-up steps of a job of `total` steps. A fraction is rounded up, as
    /// in Transformers.
    pub fn resolved_warmup_steps(&self, total: u64) -> u64 {
        if self.warmup_steps < 1.0 {
            (total as f64 * self.warmup_steps).ceil() as u64
        } else {
            self.warmup_steps as u64
        }
    }

    /// Returns the number of micro-batches of a full step.
    pub fn micro_batches(&self) -> usize {
        self.global_batch_size.div_ceil(self.micro_batch_size.max(1))
    }
}

/// Learning-rate schedules, as in Transformers' `get_scheduler`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LrSchedulerType {
    /// Warm-up, then a linear decay to 0.
    Linear,
    /// Warm-up, then a decay to 0 along half a cosine.
    Cosine,
    /// The peak from the first step; warm-up is ignored, as in Transformers.
    Constant,
    /// Warm-up, then the peak.
    ConstantWithWarmup,
}

/// The optimizer: AdamW, with its moments in f32 or in 8 bits. Paged moments have the same values.
/// If a GPU trains, they are in the host's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum Optim {
    /// `torch.optim.AdamW`.
    #[default]
    #[serde(rename = "adamw")]
    Adamw,
    /// bitsandbytes' `AdamW8bit`: 2 bytes a parameter for the moments instead of 8 (arXiv
    /// 2110.02861).
    #[serde(rename = "adamw_8bit")]
    Adamw8bit,
    /// `adamw` with paged moments.
    #[serde(rename = "paged_adamw_32bit")]
    PagedAdamw32bit,
    /// `adamw_8bit` with paged moments.
    #[serde(rename = "paged_adamw_8bit")]
    PagedAdamw8bit,
}

impl Optim {
    /// Returns whether the moments are in 8 bits. The moments of small tensors are always f32.
    pub fn is_8bit(self) -> bool {
        matches!(self, Self::Adamw8bit | Self::PagedAdamw8bit)
    }

    /// Returns whether the moments are in the host's memory, on every device.
    pub fn is_paged(self) -> bool {
        matches!(self, Self::PagedAdamw32bit | Self::PagedAdamw8bit)
    }
}

/// The activations that the backward pass recomputes instead of keeping them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ActivationCheckpointing {
    /// All activations are kept.
    #[default]
    None,
    /// Only the input of each decoder block is kept, and the rest is recomputed.
    Block,
    /// Like `block`, but the output of attention is kept too. In long rows it takes the most
    /// operations for its size.
    BlockSaveAttention,
}

/// The number of workers of a job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct WorkersSpec {
    /// The job starts when this many workers are available.
    pub min: usize,
    /// Maximum number of workers.
    pub max: usize,
}

impl Default for WorkersSpec {
    fn default() -> Self {
        Self { min: 1, max: 1 }
    }
}

impl JobSpec {
    /// Returns the layout of the base in memory.
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

    /// Joins the relative paths of the job to `dir`, the directory of the job file. A base that is
    /// a URL stays as it is.
    pub fn resolve_paths(&mut self, dir: &Path) {
        let set = |path: &mut PathBuf| *path = dir.join(&path);
        if self.model.base_url().is_none() {
            set(&mut self.model.base);
        }
        set(&mut self.data.train);
        self.data.eval.as_mut().map(set);
        self.adapter.init_from.as_mut().map(set);
    }

    /// Returns an error about the first setting that differs from `earlier`, with both values. The
    /// number of workers does not change results, so it is not compared.
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

    /// Checks every value that can be checked without reading a file.
    ///
    /// # Errors
    /// The first invalid field.
    pub fn check(&self) -> Result<(), FieldError> {
        let fail = |field: &str, message: String| Err(FieldError::new(field, message));
        let legal = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        if self.name.is_empty() || self.name.len() > 63 || !self.name.chars().all(legal) {
            return fail(
                "name",
                format!("{:?} is not a name; it must be 1 to 63 letters, digits, '-', '_' or '.'", self.name),
            );
        }
        if self.name.starts_with('.') {
            return fail("name", format!("{:?} starts with a dot; start with another character", self.name));
        }
        for (field, path) in [("model.base", &self.model.base), ("data.train", &self.data.train)] {
            if path.as_os_str().is_empty() {
                return fail(field, "is missing".into());
            }
        }
        if self.model.bnb_4bit_use_double_quant && self.model.quantization != QuantizationType::Nf4 {
            return fail(
                "model.bnb_4bit_use_double_quant",
                "needs model.quantization: nf4; a base that is already quantized keeps its scales".into(),
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
                "loftq reduces the quantization error; set model.quantization to nf4 or int8".into(),
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
                    "{} and adapter.init_from both set the initial adapter; remove one of them",
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
                    "{} is more than global_batch_size {}; lower it",
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
                    "{} workers are more than the {micro_batches} micro-batches of a step \
                     (global_batch_size {} / micro_batch_size {}); lower it to {micro_batches} or make \
                     micro_batch_size smaller",
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
        return Err(FieldError::new(field, format!("is {value}; it must be at most {most}")));
    }
    Ok(())
}

fn check_range(field: &str, value: f64, low: f64, high: f64, bounds: Bounds) -> Result<(), FieldError> {
    let (ok, words) = match bounds {
        Bounds::Inclusive => (value >= low && value <= high, format!("of at least {low}")),
        Bounds::ExclusiveLow => (value > low && value <= high, format!("above {low}")),
        Bounds::ExclusiveHigh => {
            (value >= low && value < high, format!("of at least {low} and below {high}"))
        }
    };
    if ok && value.is_finite() {
        return Ok(());
    }
    Err(FieldError::new(field, format!("is {value}; it must be a finite number {words}")))
}
