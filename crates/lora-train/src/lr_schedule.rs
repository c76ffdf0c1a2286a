//! Learning rate schedules, as in Transformers' `get_scheduler`.

use lora_spec::{LrSchedulerType, TrainingSpec};

/// Returns the learning rate of `step` (from 0) of `total` steps.
pub fn learning_rate(training: &TrainingSpec, step: u64, total: u64) -> f64 {
    let warmup = training.resolved_warmup_steps(total) as f64;
    let (step, total) = (step as f64, total as f64);
    let warming_up = step < warmup;
    let multiplier = match training.lr_scheduler_type {
        LrSchedulerType::Constant => 1.0,
        _ if warming_up => step / warmup.max(1.0),
        LrSchedulerType::ConstantWithWarmup => 1.0,
        LrSchedulerType::Linear => ((total - step) / (total - warmup).max(1.0)).max(0.0),
        LrSchedulerType::Cosine => {
            let progress = (step - warmup) / (total - warmup).max(1.0);
            (0.5 * (1.0 + (std::f64::consts::PI * progress).cos())).max(0.0)
        }
    };
    training.learning_rate * multiplier
}
