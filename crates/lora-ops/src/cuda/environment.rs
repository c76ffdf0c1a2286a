//! Environment variables that have cuBLAS compute other bits.

/// Variables that change how cuBLAS multiplies f32 and bf16 matrices. `CUBLAS_WORKSPACE_CONFIG` is not one of
/// them: the program sets the workspace.
const VARIABLES: [&str; 3] =
    ["NVIDIA_TF32_OVERRIDE", "CUBLAS_EMULATE_SINGLE_PRECISION", "CUBLAS_EMULATION_STRATEGY"];

/// The variables of this process that change cuBLAS's products, with their values.
pub(super) fn that_changes_products() -> Vec<(&'static str, String)> {
    VARIABLES.into_iter().filter_map(|variable| Some((variable, std::env::var(variable).ok()?))).collect()
}
