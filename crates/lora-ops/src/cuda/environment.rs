//! Environment variables that have cuBLAS compute other bits.

/// Of the variables that change how cuBLAS multiplies f32 and bf16 matrices those that are set, with their
/// values. (`CUBLAS_WORKSPACE_CONFIG` is not one of them: the workspace is set by the program.)
pub(super) fn that_changes_products() -> Vec<(&'static str, String)> {
    those_set(|variable| std::env::var(variable).ok())
}

const VARIABLES: [&str; 3] =
    ["NVIDIA_TF32_OVERRIDE", "CUBLAS_EMULATE_SINGLE_PRECISION", "CUBLAS_EMULATION_STRATEGY"];

fn those_set(value: impl Fn(&str) -> Option<String>) -> Vec<(&'static str, String)> {
    VARIABLES.into_iter().filter_map(|variable| Some((variable, value(variable)?))).collect()
}
