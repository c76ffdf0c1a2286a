//! The section `training` of a job.

use std::ops::Bound::{Included, Unbounded};

use serde::{Deserialize, Serialize};

use crate::range::{above, check_count, check_number};
use crate::{DataSpec, FieldError, foreign_values};

/// The settings of training, in the terms of `TrainingArguments`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TrainingSpec {
    /// Passes over the data. With a fraction, training ends within a pass.
    pub num_train_epochs: f64,
    /// Number of steps after which the job ends; overrides `num_train_epochs`.
    #[serde(deserialize_with = "foreign_values::max_steps")]
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

    /// Checks every value that can be checked without reading a file. Evaluations need `data.eval`.
    pub(crate) fn check(&self, data: &DataSpec) -> Result<(), FieldError> {
        check_number("training.num_train_epochs", self.num_train_epochs, above(0.0, Included(1e6)))?;
        if let Some(steps) = self.max_steps {
            check_count("training.max_steps", steps, 1..)?;
        }
        self.check_batch_sizes()?;
        check_number("training.learning_rate", self.learning_rate, above(0.0, Unbounded))?;
        check_number("training.warmup_steps", self.warmup_steps, 0.0..=1e15)?;
        if self.warmup_steps >= 1.0 && self.warmup_steps.fract() != 0.0 {
            let message = format!("{} is neither a whole number nor a fraction below 1", self.warmup_steps);
            return Err(FieldError::new("training.warmup_steps", message));
        }
        check_number("training.adam_beta1", self.adam_beta1, 0.0..1.0)?;
        check_number("training.adam_beta2", self.adam_beta2, 0.0..1.0)?;
        check_number("training.adam_epsilon", self.adam_epsilon, above(0.0, Included(1.0)))?;
        check_number("training.weight_decay", self.weight_decay, 0.0..=1e3)?;
        check_number("training.max_grad_norm", self.max_grad_norm, 0.0..)?;
        check_count("training.eval_steps", self.eval_steps, 1..)?;
        check_count("training.save_steps", self.save_steps, 1..)?;
        check_count("training.save_total_limit", self.save_total_limit as u64, 1..)?;
        check_count("training.logging_steps", self.logging_steps, 1..)?;
        check_number("training.early_stopping_threshold", self.early_stopping_threshold, 0.0..=1e9)?;
        if let Some(patience) = self.early_stopping_patience {
            check_count("training.early_stopping_patience", patience, 1..)?;
        }
        for (field, is_set) in [
            ("training.load_best_model_at_end", self.load_best_model_at_end),
            ("training.early_stopping_patience", self.early_stopping_patience.is_some()),
        ] {
            if is_set && data.eval.is_none() {
                return Err(FieldError::new(field, "needs evaluation rows: set data.eval".into()));
            }
        }
        Ok(())
    }

    fn check_batch_sizes(&self) -> Result<(), FieldError> {
        let (global, micro) = (self.global_batch_size, self.micro_batch_size);
        check_count("training.global_batch_size", global as u64, 1..=1 << 20)?;
        if micro > global {
            let message = format!("{micro} is more than global_batch_size {global}; lower it");
            return Err(FieldError::new("training.micro_batch_size", message));
        }
        check_count("training.micro_batch_size", micro as u64, 1..=global as u64)
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
#[serde(try_from = "String", into = "&'static str")]
pub enum Optim {
    /// `torch.optim.AdamW`.
    #[default]
    Adamw,
    /// bitsandbytes' `AdamW8bit`: 2 bytes a parameter for the moments instead of 8 (arXiv
    /// 2110.02861).
    Adamw8bit,
    /// `adamw` with paged moments.
    PagedAdamw32bit,
    /// `adamw_8bit` with paged moments.
    PagedAdamw8bit,
}

impl Optim {
    const ALL: [Self; 4] = [Self::Adamw, Self::Adamw8bit, Self::PagedAdamw32bit, Self::PagedAdamw8bit];

    /// Returns the name in a job file.
    fn name(self) -> &'static str {
        match self {
            Self::Adamw => "adamw",
            Self::Adamw8bit => "adamw_8bit",
            Self::PagedAdamw32bit => "paged_adamw_32bit",
            Self::PagedAdamw8bit => "paged_adamw_8bit",
        }
    }

    /// Returns whether the moments are in 8 bits. The moments of small tensors are always f32.
    pub fn is_8bit(self) -> bool {
        match self {
            Self::Adamw8bit | Self::PagedAdamw8bit => true,
            Self::Adamw | Self::PagedAdamw32bit => false,
        }
    }

    /// Returns whether the moments are in the host's memory, on every device.
    pub fn is_paged(self) -> bool {
        match self {
            Self::PagedAdamw32bit | Self::PagedAdamw8bit => true,
            Self::Adamw | Self::Adamw8bit => false,
        }
    }
}

impl TryFrom<String> for Optim {
    type Error = String;

    fn try_from(name: String) -> Result<Self, String> {
        let own = Self::ALL.into_iter().find(|optim| optim.name() == name);
        own.or_else(|| foreign_values::optimizer(&name)).ok_or_else(|| {
            format!("{name:?} is not supported; supported: {}", Self::ALL.map(Self::name).join(", "))
        })
    }
}

impl From<Optim> for &'static str {
    fn from(optim: Optim) -> Self {
        optim.name()
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
