//! The section `training` of a job. Missing settings get the defaults of `lora-spec`.

use lora_spec::{FieldError, TrainingSpec};

use super::field::{count, enum_text, parse_enum};
use crate::v1;

impl TryFrom<v1::TrainingSpec> for TrainingSpec {
    type Error = FieldError;

    fn try_from(t: v1::TrainingSpec) -> Result<Self, FieldError> {
        let default = TrainingSpec::default();
        Ok(Self {
            num_train_epochs: t.num_train_epochs.unwrap_or(default.num_train_epochs),
            max_steps: t.max_steps,
            global_batch_size: count(
                "training.global_batch_size",
                t.global_batch_size,
                default.global_batch_size,
            )?,
            micro_batch_size: count(
                "training.micro_batch_size",
                t.micro_batch_size,
                default.micro_batch_size,
            )?,
            learning_rate: t.learning_rate.unwrap_or(default.learning_rate),
            lr_scheduler_type: parse_enum(
                "training.lr_scheduler_type",
                t.lr_scheduler_type,
                default.lr_scheduler_type,
            )?,
            warmup_steps: t.warmup_steps.unwrap_or(default.warmup_steps),
            optim: parse_enum("training.optim", t.optim, default.optim)?,
            adam_beta1: t.adam_beta1.unwrap_or(default.adam_beta1),
            adam_beta2: t.adam_beta2.unwrap_or(default.adam_beta2),
            adam_epsilon: t.adam_epsilon.unwrap_or(default.adam_epsilon),
            weight_decay: t.weight_decay.unwrap_or(default.weight_decay),
            max_grad_norm: t.max_grad_norm.unwrap_or(default.max_grad_norm),
            seed: t.seed.unwrap_or(default.seed),
            activation_checkpointing: parse_enum(
                "training.activation_checkpointing",
                t.activation_checkpointing,
                default.activation_checkpointing,
            )?,
            eval_steps: t.eval_steps.unwrap_or(default.eval_steps),
            save_steps: t.save_steps.unwrap_or(default.save_steps),
            save_total_limit: count(
                "training.save_total_limit",
                t.save_total_limit,
                default.save_total_limit,
            )?,
            logging_steps: t.logging_steps.unwrap_or(default.logging_steps),
            load_best_model_at_end: t.load_best_model_at_end.unwrap_or(default.load_best_model_at_end),
            early_stopping_patience: t.early_stopping_patience,
            early_stopping_threshold: t.early_stopping_threshold.unwrap_or(default.early_stopping_threshold),
        })
    }
}

impl From<&TrainingSpec> for v1::TrainingSpec {
    fn from(t: &TrainingSpec) -> Self {
        Self {
            num_train_epochs: Some(t.num_train_epochs),
            max_steps: t.max_steps,
            global_batch_size: Some(t.global_batch_size as u64),
            micro_batch_size: Some(t.micro_batch_size as u64),
            learning_rate: Some(t.learning_rate),
            lr_scheduler_type: enum_text(&t.lr_scheduler_type),
            warmup_steps: Some(t.warmup_steps),
            optim: enum_text(&t.optim),
            adam_beta1: Some(t.adam_beta1),
            adam_beta2: Some(t.adam_beta2),
            adam_epsilon: Some(t.adam_epsilon),
            weight_decay: Some(t.weight_decay),
            max_grad_norm: Some(t.max_grad_norm),
            seed: Some(t.seed),
            activation_checkpointing: enum_text(&t.activation_checkpointing),
            eval_steps: Some(t.eval_steps),
            save_steps: Some(t.save_steps),
            save_total_limit: Some(t.save_total_limit as u64),
            logging_steps: Some(t.logging_steps),
            load_best_model_at_end: Some(t.load_best_model_at_end),
            early_stopping_patience: t.early_stopping_patience,
            early_stopping_threshold: Some(t.early_stopping_threshold),
        }
    }
}
