//! Random tensors and weights, which must have the CPU's bits.

use anyhow::{Result, ensure};
use candle_core::{DType, Device, Tensor};
use lora_model::Base;
use lora_ops::linear::Weight;
use lora_ops::quant::{Codebook, FourBit, Int8, Scales};
use lora_ops::random::uniform;
use lora_spec::{BaseDtype, BaseFormat, ModelConfig, Philox, Quantization};

use crate::check::{Check, DTYPES, TestBench, values};

/// Shapes that include partial draws, bytes and blocks.
const SHAPES: [(usize, usize); 5] = [(1, 1), (3, 7), (64, 64), (33, 97), (300, 1027)];

pub(crate) fn checks() -> Vec<Check> {
    vec![
        Check::new("random tensors as on the CPU", tensors),
        Check::new("random quantized weights as on the CPU", weights),
        Check::new("random bases as on the CPU", bases),
    ]
}

fn tensors(bench: &TestBench) -> Result<String> {
    for dtype in DTYPES {
        for shape in SHAPES {
            let draw = |device| uniform(shape, 0.034_641, dtype, &Philox::new(bench.seed, "random"), device);
            same(&draw(&bench.device)?, &draw(&Device::Cpu)?)?;
        }
    }
    Ok("the same bits".into())
}

fn weights(bench: &TestBench) -> Result<String> {
    let philox = Philox::new(bench.seed, "random");
    for shape in SHAPES {
        let draw = |device: &Device| -> Result<[Weight; 3]> {
            let four_bit = |nested| FourBit::random(shape, Codebook::Nf4, nested, 0.02, &philox, device);
            Ok([
                four_bit(false)?.into(),
                four_bit(true)?.into(),
                Int8::random(shape, 0.02, &philox, device)?.into(),
            ])
        };
        for (gpu, cpu) in draw(&bench.device)?.iter().zip(&draw(&Device::Cpu)?) {
            for (gpu, cpu) in gpu.tensors().into_iter().zip(cpu.tensors()) {
                same(gpu, cpu)?;
            }
            if let (Weight::FourBit(gpu), Weight::FourBit(cpu)) = (gpu, cpu)
                && let (Scales::Nested { offset, .. }, Scales::Nested { offset: want, .. }) =
                    (gpu.scales(), cpu.scales())
            {
                ensure!(offset == want, "offset {offset} instead of {want}");
            }
            same(&gpu.dense()?, &cpu.dense()?)?;
        }
    }
    Ok("the same bits".into())
}

/// Checks every linear weight of a small model, in each format.
fn bases(bench: &TestBench) -> Result<String> {
    let config = ModelConfig::parse(
        r#"{"architectures": ["Qwen2ForCausalLM"], "hidden_size": 48, "intermediate_size": 80,
        "vocab_size": 50, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}"#,
    )
    .map_err(anyhow::Error::msg)?;
    let mut compared = 0;
    for (dtype, quantization) in [
        (BaseDtype::F32, Quantization::None),
        (BaseDtype::Bf16, Quantization::None),
        (BaseDtype::Bf16, Quantization::Nf4 { double_quant: false }),
        (BaseDtype::Bf16, Quantization::Nf4 { double_quant: true }),
        (BaseDtype::Bf16, Quantization::Int8),
    ] {
        let format = BaseFormat { dtype, quantization };
        let base = |device| Base::random(config.clone(), format, bench.seed, device);
        let (gpu, cpu) = (base(&bench.device)?, base(&Device::Cpu)?);
        ensure!(gpu.bytes() == cpu.bytes(), "{format:?}: {} bytes instead of {}", gpu.bytes(), cpu.bytes());
        for module in config.linear_modules() {
            same(&gpu.dense_weight(&module.name)?, &cpu.dense_weight(&module.name)?)?;
            compared += 1;
        }
    }
    Ok(format!("the same bits in {compared} weights"))
}

/// Checks that two tensors have the same type, shape and bits, so -0 differs from 0.
fn same(gpu: &Tensor, cpu: &Tensor) -> Result<()> {
    ensure!((gpu.dtype(), gpu.dims()) == (cpu.dtype(), cpu.dims()), "{gpu:?} instead of {cpu:?}");
    // f64 represents all values of f32, bf16 and u8.
    let pairs = values(gpu)?.into_iter().zip(values(cpu)?);
    for (i, (got, want)) in pairs.enumerate() {
        let dtype: DType = cpu.dtype();
        ensure!(
            got.to_bits() == want.to_bits(),
            "element {i} of {:?} {dtype:?} is {got}, not {want}",
            cpu.dims()
        );
    }
    Ok(())
}
