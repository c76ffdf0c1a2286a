//! Random weights, for measurements that depend on a model's shape alone.

use candle_core::{Device, Tensor};
use half::bf16;
use lora_ops::transfer::from_vec;
use lora_spec::{BaseDtype, Philox};
use rayon::prelude::*;

use crate::ModelError;

/// Bound of the uniform matrices; their standard deviation is that of Transformers' initialization, 0.02.
const BOUND: f32 = 0.034_641;

/// A tensor of a checkpoint: a matrix of uniform numbers, a norm of ones or a bias of zeros. Every element is a pure function
/// of the seed, the name and its place.
pub(crate) fn tensor(
    name: &str,
    shape: &[usize],
    dtype: BaseDtype,
    seed: u64,
    device: &Device,
) -> Result<Tensor, ModelError> {
    let len = shape.iter().product();
    let philox = (shape.len() > 1).then(|| Philox::new(seed, name));
    let constant = if name.ends_with(".bias") { 0.0 } else { 1.0 };
    Ok(match dtype {
        BaseDtype::Bf16 => {
            from_vec(values(len, philox, bf16::from_f32(constant), bf16::from_f32), shape, device)?
        }
        BaseDtype::F32 | BaseDtype::Auto => from_vec(values(len, philox, constant, |v| v), shape, device)?,
    })
}

/// Uniform numbers from `philox`; without one, `constant`.
fn values<T: Copy + Send + Sync>(
    len: usize,
    philox: Option<Philox>,
    constant: T,
    round: impl Fn(f32) -> T + Sync,
) -> Vec<T> {
    let mut values = vec![constant; len];
    if let Some(philox) = philox {
        values.par_chunks_mut(4).enumerate().for_each(|(block, values)| {
            let words = philox.words([block as u32, (block >> 32) as u32, 0, 0]);
            for (value, word) in values.iter_mut().zip(words) {
                *value = round((2.0 * Philox::unit(word) - 1.0) * BOUND);
            }
        });
    }
    values
}

#[cfg(test)]
mod tests {
    use candle_core::DType;
    use lora_spec::ModelConfig;

    use super::*;
    use crate::{Base, Batch, logits};

    fn values_of(name: &str, shape: &[usize], dtype: BaseDtype, seed: u64) -> Vec<f32> {
        let tensor = tensor(name, shape, dtype, seed, &Device::Cpu).unwrap();
        let expected = if dtype == BaseDtype::Bf16 { DType::BF16 } else { DType::F32 };
        assert_eq!((tensor.dims(), tensor.dtype()), (shape, expected));
        tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
    }

    #[test]
    fn elements_are_a_function_of_seed_and_place() {
        let values = values_of("q_proj.weight", &[61, 97], BaseDtype::F32, 3);
        let mean =
            |f: fn(f64) -> f64| values.iter().map(|v| f(f64::from(*v))).sum::<f64>() / values.len() as f64;
        assert!(mean(|v| v).abs() < 1e-3);
        assert!((mean(|v| v * v).sqrt() - 0.02).abs() < 3e-4);
        let rounded: Vec<f32> = values.iter().map(|v| bf16::from_f32(*v).to_f32()).collect();
        assert_eq!(values_of("q_proj.weight", &[61, 97], BaseDtype::Bf16, 3), rounded);
        assert_ne!(values_of("q_proj.weight", &[61, 97], BaseDtype::F32, 4), values);
        assert_ne!(values_of("k_proj.weight", &[61, 97], BaseDtype::F32, 3), values);
        assert_eq!(values_of("norm.weight", &[5], BaseDtype::F32, 3), [1.0; 5]);
        assert_eq!(values_of("q_proj.bias", &[5], BaseDtype::Bf16, 3), [0.0; 5]);
    }

    #[test]
    fn a_random_base_computes() {
        for (architecture, tied) in [("LlamaForCausalLM", true), ("Qwen2ForCausalLM", false)] {
            let text = format!(
                r#"{{"architectures": ["{architecture}"], "hidden_size": 16, "intermediate_size": 24, "vocab_size": 50,
                "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": {tied}}}"#
            );
            let config = ModelConfig::parse(&text).unwrap();
            let run = |seed| {
                let base = Base::random(config.clone(), BaseDtype::Bf16, seed, &Device::Cpu).unwrap();
                let tokens = [3, 1, 4, 1, 5, 9];
                let batch = Batch {
                    batch: 2,
                    seq: 3,
                    tokens: &tokens,
                    targets: &tokens,
                    weights: &[1.0; 6],
                    rows: &[0, 1],
                };
                let logits = logits(&base, None, batch).unwrap();
                (base.sha256().to_owned(), logits.to_vec2::<f32>().unwrap())
            };
            let (sha256, first) = run(1);
            assert_eq!(run(1), (sha256.clone(), first.clone()));
            let (other_sha256, other) = run(2);
            assert!(other_sha256 != sha256 && other != first);
            assert!(first.iter().flatten().all(|logit| logit.is_finite() && *logit != 0.0), "{first:?}");
        }
    }
}
