//! Environment variables that change the bits of results on a GPU.

/// Variables that change how cuBLAS multiplies f32 and bf16 matrices. `CUBLAS_WORKSPACE_CONFIG` is not one of
/// them: the program sets the workspace.
const OF_PRODUCTS: [&str; 3] =
    ["NVIDIA_TF32_OVERRIDE", "CUBLAS_EMULATE_SINGLE_PRECISION", "CUBLAS_EMULATION_STRATEGY"];

/// Variables with which the driver translates PTX although there is machine code for the GPU, in this
/// program and in cuBLAS. `CUDA_DISABLE_PTX_JIT` and `CUDA_DISABLE_JIT` change no bits: kernels without
/// machine code for the GPU then fail to load.
const OF_TRANSLATION: [&str; 2] = ["CUDA_FORCE_PTX_JIT", "CUDA_FORCE_JIT"];

/// The variables that change the bits of results, with their values; `value` returns that of a variable.
pub(super) fn that_change_bits(
    value: impl Fn(&'static str) -> Option<String>,
) -> Vec<(&'static str, String)> {
    let set = |variable| Some((variable, value(variable)?));
    let of_products = OF_PRODUCTS.into_iter().filter_map(set);
    let of_translation = OF_TRANSLATION.into_iter().filter_map(set).filter(|(_, value)| is_on(value));
    of_products.chain(of_translation).collect()
}

/// Whether the driver translates kernels for which there is machine code.
pub(super) fn forces_translation(value: impl Fn(&'static str) -> Option<String>) -> bool {
    OF_TRANSLATION.into_iter().filter_map(value).any(|value| is_on(&value))
}

/// The value of a variable of this process.
pub(super) fn of_process(variable: &'static str) -> Option<String> {
    std::env::var_os(variable).map(|value| value.to_string_lossy().into_owned())
}

/// The documented values are 0 and 1.
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
