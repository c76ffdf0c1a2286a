//! Environment variables that change the bits of results on a GPU.

/// Variables that change how cuBLAS multiplies f32 and bf16 matrices. `CUBLAS_WORKSPACE_CONFIG`
/// does not matter, because the program sets the workspace.
const PRODUCT_VARIABLES: [&str; 3] =
    ["NVIDIA_TF32_OVERRIDE", "CUBLAS_EMULATE_SINGLE_PRECISION", "CUBLAS_EMULATION_STRATEGY"];

/// Variables that make the driver translate PTX in this program and in cuBLAS, although both
/// contain machine code for the GPU. `CUDA_DISABLE_PTX_JIT` and `CUDA_DISABLE_JIT` do not change
/// bits: with them, kernels without machine code for the GPU fail to load.
const TRANSLATION_VARIABLES: [&str; 2] = ["CUDA_FORCE_PTX_JIT", "CUDA_FORCE_JIT"];

/// Returns the variables that change the bits of results, with their values. `value` returns the
/// value of a variable.
pub(super) fn that_change_bits(
    value: impl Fn(&'static str) -> Option<String>,
) -> Vec<(&'static str, String)> {
    let set = |variable| Some((variable, value(variable)?));
    let of_products = PRODUCT_VARIABLES.into_iter().filter_map(set);
    let of_translation = TRANSLATION_VARIABLES.into_iter().filter_map(set).filter(|(_, value)| is_on(value));
    of_products.chain(of_translation).collect()
}

/// Whether the driver translates kernels although there is machine code for them.
pub(super) fn forces_translation(value: impl Fn(&'static str) -> Option<String>) -> bool {
    TRANSLATION_VARIABLES.into_iter().filter_map(value).any(|value| is_on(&value))
}

/// Returns the value of a variable of this process.
pub(super) fn of_process(variable: &'static str) -> Option<String> {
    std::env::var_os(variable).map(|value| value.to_string_lossy().into_owned())
}

/// Whether a variable is set to anything but 0. The documented values are 0 and 1.
fn is_on(value: &str) -> bool {
    !matches!(value.trim(), "" | "0")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_that_change_bits_are_named_with_their_values() {
        let value = |set: &'static [(&str, &str)]| {
            move |variable| {
                set.iter().find(|(name, _)| *name == variable).map(|(_, value)| (*value).to_owned())
            }
        };
        let nothing =
            value(&[("CUDA_FORCE_PTX_JIT", "0"), ("CUDA_FORCE_JIT", ""), ("CUDA_DISABLE_PTX_JIT", "1")]);
        assert_eq!(that_change_bits(nothing), []);
        assert!(!forces_translation(nothing));
        let both = value(&[("CUDA_FORCE_JIT", "1"), ("NVIDIA_TF32_OVERRIDE", "0")]);
        let expected = [("NVIDIA_TF32_OVERRIDE", "0".to_owned()), ("CUDA_FORCE_JIT", "1".to_owned())];
        assert_eq!(that_change_bits(both), expected);
        assert!(forces_translation(both));
        assert!(forces_translation(value(&[("CUDA_FORCE_PTX_JIT", "1")])));
    }
}
