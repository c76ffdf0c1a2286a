//! Values of other trainers that mean the same as a value of a job file. Only the job file's own
//! value is kept, so receipts and hashes do not depend on the spelling.

use serde::de::{Deserialize, Deserializer, Error};

use crate::{Optim, TargetModules};

/// Names of optimizers in Transformers and bitsandbytes with the same update rule. The
/// fused, XLA and NPU versions of torch's AdamW differ only in their kernels.
const OPTIMIZERS: [(&str, Optim); 7] = [
    ("adamw_torch", Optim::Adamw),
    ("adamw_torch_fused", Optim::Adamw),
    ("adamw_torch_xla", Optim::Adamw),
    ("adamw_torch_npu_fused", Optim::Adamw),
    ("adamw_apex_fused", Optim::Adamw),
    ("adamw_bnb_8bit", Optim::Adamw8bit),
    // The name of bitsandbytes' class, whose moments are in f32.
    ("paged_adamw", Optim::PagedAdamw32bit),
];

/// Returns the optimizer with this name of another trainer.
pub(crate) fn optimizer(name: &str) -> Option<Optim> {
    OPTIMIZERS.iter().find(|(foreign, _)| *foreign == name).map(|(_, optim)| *optim)
}

/// Returns the value of `adapter.target_modules` for a text. PEFT ignores the case of `all-linear`,
/// and LLaMA-Factory writes `all`.
pub(crate) fn target_pattern(text: String) -> TargetModules {
    let is_all = text == "all" || text.eq_ignore_ascii_case(TargetModules::ALL_LINEAR);
    TargetModules::Pattern(if is_all { TargetModules::ALL_LINEAR.into() } else { text })
}

/// Reads `training.max_steps`. With -1, which is Transformers' default, it is not set.
pub(crate) fn max_steps<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u64>, D::Error> {
    let Some(steps) = Option::<i64>::deserialize(deserializer)? else { return Ok(None) };
    match (steps, u64::try_from(steps)) {
        (-1, _) => Ok(None),
        (_, Ok(steps)) => Ok(Some(steps)),
        (_, Err(_)) => Err(D::Error::custom(format!(
            "is {steps}; it must be at least 1, or null for no limit (-1 is null too)"
        ))),
    }
}
