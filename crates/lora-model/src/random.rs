//! Random weights, for measurements that depend only on a model's shape.

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor};
use lora_ops::linear::Weight;
use lora_ops::quant::{Codebook, FourBit, Int8};
use lora_ops::random::uniform;
use lora_ops::transfer::to_device;
use lora_spec::{BaseDtype, BaseFormat, LinearModule, ModelConfig, Philox, Quantization};

use crate::hash::sha256;
use crate::weight_source::WeightSource;
use crate::{Base, ModelError};

/// Standard deviation of Transformers' initialization.
const INIT_STD: f64 = 0.02;

/// Bound of uniform numbers with a standard deviation of [`INIT_STD`].
const UNIFORM_BOUND: f32 = 0.034_641;

impl Base {
    /// Creates a model of the given configuration with random weights on `device`, for
    /// measurements. Dense matrices (`auto`: f32) are uniform with a standard deviation of 0.02,
    /// norms 1 and biases 0. Quantized matrices have uniform codes and random scales that give the
    /// same standard deviation ([`FourBit::random`], [`Int8::random`]). Each part is a pure
    /// function of the seed, its name and the index of an element, with the same bits on every
    /// device.
    pub fn random(
        config: ModelConfig,
        format: impl Into<BaseFormat>,
        seed: u64,
        device: &Device,
    ) -> Result<Self, ModelError> {
        let format = format.into();
        let sha256 = sha256(format!("random {seed} {format:?} {config:?}").as_bytes());
        let shapes = config.tensors().into_iter().collect();
        let weights = RandomWeights { shapes, format, seed, device };
        Self::from_weights(config, sha256, device, &weights)
    }
}

/// Random weights of the given format.
struct RandomWeights<'a> {
    /// Shapes by the names of the tensors.
    shapes: HashMap<String, Vec<usize>>,
    format: BaseFormat,
    seed: u64,
    device: &'a Device,
}

impl RandomWeights<'_> {
    /// Creates a matrix of uniform numbers, a norm of ones or a bias of zeros.
    fn tensor(&self, name: &str, dtype: BaseDtype) -> Result<Tensor, ModelError> {
        let shape = self.shapes[name].as_slice();
        let dtype = match dtype {
            BaseDtype::Bf16 => DType::BF16,
            BaseDtype::F32 | BaseDtype::Auto => DType::F32,
        };
        if shape.len() > 1 {
            return Ok(uniform(shape, UNIFORM_BOUND, dtype, &Philox::new(self.seed, name), self.device)?);
        }
        let constant = if name.ends_with(".bias") { 0.0_f32 } else { 1.0 };
        let values = vec![constant; shape.iter().product()];
        Ok(to_device(&Tensor::from_vec(values, shape, &Device::Cpu)?.to_dtype(dtype)?, self.device)?)
    }
}

impl WeightSource for RandomWeights<'_> {
    fn device(&self) -> &Device {
        self.device
    }

    fn matrix(&self, name: &str) -> Result<Tensor, ModelError> {
        self.tensor(name, self.format.dtype)
    }

    fn vector(&self, name: &str) -> Result<Tensor, ModelError> {
        self.tensor(name, BaseDtype::F32)
    }

    /// A quantized weight has random codes and scales; it is created without a dense matrix.
    fn weight(&self, module: &LinearModule) -> Result<Weight, ModelError> {
        let name = format!("{}.weight", module.name);
        let shape = (module.out_features, module.in_features);
        let philox = Philox::new(self.seed, &name);
        Ok(match self.format.quantization {
            Quantization::None => self.matrix(&name)?.into(),
            Quantization::Nf4 { double_quant } => {
                FourBit::random(shape, Codebook::Nf4, double_quant, INIT_STD, &philox, self.device)?.into()
            }
            Quantization::Int8 => Int8::random(shape, INIT_STD, &philox, self.device)?.into(),
        })
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;
    use lora_spec::{Document, MicroBatch};

    use super::*;
    use crate::logits;

    /// Returns random weights with one tensor.
    fn one_tensor(name: &str, shape: &[usize], format: BaseFormat, seed: u64) -> RandomWeights<'static> {
        let shapes = HashMap::from([(name.to_owned(), shape.to_vec())]);
        RandomWeights { shapes, format, seed, device: &Device::Cpu }
    }

    fn values_of(name: &str, shape: &[usize], dtype: BaseDtype, seed: u64) -> Vec<f32> {
        let tensor = one_tensor(name, shape, dtype.into(), seed).tensor(name, dtype).unwrap();
        let expected = if dtype == BaseDtype::Bf16 { DType::BF16 } else { DType::F32 };
        assert_eq!((tensor.dims(), tensor.dtype()), (shape, expected));
        tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
    }

    #[test]
    fn elements_depend_on_seed_and_position_only() {
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

    /// Quantized weights have the standard deviation of dense weights, even if the last block, byte
    /// or random draw is incomplete. The mean of NF4's sixteen values is 4 % of the standard
    /// deviation, not 0.
    #[test]
    fn quantized_weights_have_the_configured_deviation() {
        for quantization in [
            Quantization::Nf4 { double_quant: false },
            Quantization::Nf4 { double_quant: true },
            Quantization::Int8,
        ] {
            let format = BaseFormat { dtype: BaseDtype::Bf16, quantization };
            let values = |name: &str, shape, seed| -> Vec<f32> {
                let (out_features, in_features) = shape;
                let module =
                    LinearModule { name: name.into(), layer: 0, in_features, out_features, bias: false };
                let weights =
                    one_tensor(&format!("{name}.weight"), &[out_features, in_features], format, seed);
                let weight = weights.weight(&module).unwrap();
                assert_eq!(weight.dims().unwrap(), shape);
                weight.dense().unwrap().flatten_all().unwrap().to_vec1().unwrap()
            };
            for shape in [(1031, 257), (512, 1024)] {
                let drawn = values("q_proj", shape, 3);
                let mean = |f: fn(f64) -> f64| {
                    drawn.iter().map(|v| f(f64::from(*v))).sum::<f64>() / drawn.len() as f64
                };
                assert!(mean(|v| v).abs() < 1e-3, "{quantization:?}: mean {}", mean(|v| v));
                let deviation = mean(|v| v * v).sqrt();
                assert!((deviation - 0.02).abs() < 8e-4, "{quantization:?}: deviation {deviation}");
                assert_eq!(values("q_proj", shape, 3), drawn);
                assert_ne!(values("q_proj", shape, 4), drawn);
                assert_ne!(values("k_proj", shape, 3), drawn);
            }
        }
    }

    #[test]
    fn a_random_base_gives_finite_losses() {
        for (architecture, tied) in
            [("LlamaForCausalLM", true), ("Qwen2ForCausalLM", false), ("Qwen3ForCausalLM", true)]
        {
            let text = format!(
                r#"{{"architectures": ["{architecture}"], "hidden_size": 16, "intermediate_size": 24,
                "vocab_size": 50, "num_hidden_layers": 2, "num_attention_heads": 4,
                "num_key_value_heads": 2, "tie_word_embeddings": {tied}}}"#
            );
            let config = ModelConfig::parse(&text).unwrap();
            let run = |seed| {
                let base = Base::random(config.clone(), BaseDtype::Bf16, seed, &Device::Cpu).unwrap();
                let tokens = vec![3, 1, 4, 1, 5, 9];
                let batch = MicroBatch {
                    rows: Document::whole_rows([0, 1], 3),
                    seq_len: 3,
                    targets: tokens.clone(),
                    tokens,
                    weights: vec![1.0; 6],
                };
                let logits = logits(&base, None, &batch).unwrap();
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
