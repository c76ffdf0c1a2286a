//! Compares learning rates and training curves with Transformers, PEFT and torch (`tests/golden`).

#![expect(clippy::unwrap_used, reason = "helpers of tests fail the test")]

use std::collections::HashMap;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use lora_model::{Adapter, Base, PassOptions, PeftAdapter};
use lora_ops::adamw::AdamWSettings;
use lora_spec::{
    ActivationCheckpointing, AdapterSpec, BaseDtype, BaseFormat, BaseLayout, Document, InitLoraWeights,
    JobSpec, MicroBatch, ModelSpec, Optim, Quantization, QuantizationType, SourceDir, TrainingSpec,
};
use lora_test_kit::golden;
use lora_train::{Engine, GradientAccumulation, Partition, ProcessGroup, learning_rate};
use serde_json::Value;

fn json(path: &str) -> Value {
    serde_json::from_slice(&std::fs::read(golden(path)).unwrap()).unwrap()
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap()
}

#[test]
fn learning_rates_match_transformers() {
    let json = json("schedules.json");
    let cases = json["schedules"].as_array().unwrap();
    assert!(cases.len() > 10);
    for case in cases {
        let training = TrainingSpec {
            learning_rate: 1.0,
            lr_scheduler_type: serde_json::from_value(case["lr_scheduler_type"].clone()).unwrap(),
            warmup_steps: number(&case["warmup_steps"]),
            ..TrainingSpec::default()
        };
        let total = case["max_steps"].as_u64().unwrap();
        for (step, expected) in case["multipliers"].as_array().unwrap().iter().enumerate() {
            let got = learning_rate(&training, step as u64, total);
            assert!((got - number(expected)).abs() < 1e-12, "{case} step {step}: {got}");
        }
    }
}

#[test]
fn fractional_warmup_matches_transformers() {
    for case in json("schedules.json")["warmups"].as_array().unwrap() {
        let warmup = case["resolved"].as_u64().unwrap();
        let total = case["max_steps"].as_u64().unwrap();
        let training = TrainingSpec {
            learning_rate: 1.0,
            lr_scheduler_type: lora_spec::LrSchedulerType::ConstantWithWarmup,
            warmup_steps: number(&case["warmup_steps"]),
            ..TrainingSpec::default()
        };
        let rates: Vec<f64> = (0..=total).map(|step| learning_rate(&training, step, total)).collect();
        assert_eq!(rates.iter().take_while(|rate| **rate < 1.0).count() as u64, warmup, "{case}");
    }
}

/// Trains with the settings of PEFT's run and compares the curves. `start` returns the initial
/// adapter over the base.
fn curve(name: &str, layout: impl Into<BaseLayout>, start: impl Fn(&Base, &SourceDir) -> Adapter) {
    let dir = golden("curve").join(name);
    let curve = json(&format!("curve/{name}/curve.json"));
    let settings = &curve["settings"];
    let training = TrainingSpec {
        learning_rate: number(&settings["learning_rate"]),
        warmup_steps: number(&settings["warmup_steps"]),
        lr_scheduler_type: serde_json::from_value(settings["lr_scheduler_type"].clone()).unwrap(),
        ..TrainingSpec::default()
    };
    let total = settings["max_steps"].as_u64().unwrap();
    let model = golden("models").join(curve["model"].as_str().unwrap()).into();
    let base = Arc::new(Base::load(&model, layout, &Device::Cpu).unwrap());
    let adapter = start(&base, &model);
    let adamw = AdamWSettings {
        beta1: number(&settings["adam_beta1"]),
        beta2: number(&settings["adam_beta2"]),
        eps: number(&settings["adam_epsilon"]),
        weight_decay: number(&settings["weight_decay"]),
    };
    let mut engine = Engine::new(base, adapter, Optim::Adamw, adamw).unwrap();
    let batches: HashMap<String, Tensor> =
        candle_core::safetensors::load(dir.join("batches.safetensors"), &Device::Cpu).unwrap();
    let (steps, leaves, rows, seq) = batches["tokens"].dims4().unwrap();
    let values = |name: &str| -> Vec<f64> {
        batches[name].to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
    };
    let (tokens, labels) = (values("tokens"), values("labels"));
    let mut alone = ProcessGroup::single();
    for step in 0..steps {
        let partition = Partition::new(leaves, 1).unwrap();
        let mut accumulation = GradientAccumulation::begin(&mut engine, partition, &mut alone).unwrap();
        for leaf in 0..leaves {
            let size = rows * seq;
            let at = (step * leaves + leaf) * size;
            let next = |i: usize| if i % seq + 1 < seq { labels[at + i + 1] } else { -100.0 };
            let batch = MicroBatch {
                rows: Document::whole_rows(vec![0; rows], seq),
                seq_len: seq,
                tokens: tokens[at..at + size].iter().map(|t| *t as u32).collect(),
                targets: (0..size).map(|i| next(i).max(0.0) as u32).collect(),
                weights: (0..size).map(|i| if next(i) >= 0.0 { 1.0 } else { 0.0 }).collect(),
            };
            let pass =
                PassOptions { checkpointing: ActivationCheckpointing::None, dropout: 0.0, seed: 0, step: 0 };
            accumulation.forward_backward(&batch, pass, &mut alone).unwrap();
        }
        let accumulated = accumulation.finish().unwrap();
        let sums = accumulated.losses().iter().fold((0.0, 0.0), |sums, (l, w)| (sums.0 + l, sums.1 + w));
        let reduced = accumulated.reduce(&mut alone, sums.1).unwrap();
        let norm = reduced.norm();
        let lr = learning_rate(&training, step as u64, total);
        reduced.optim_step(lr, number(&settings["max_grad_norm"])).unwrap();
        for (what, got) in [("loss", sums.0 / sums.1), ("grad_norm", norm), ("learning_rate", lr)] {
            let expected = number(&curve[what][step]);
            assert!(
                (got - expected).abs() <= 1e-4 * expected,
                "{name} step {step}: {what} {got}, not {expected}"
            );
        }
    }
}

/// Returns a function that reads the initial adapter of PEFT's run from its file.
fn stored(name: &str) -> impl Fn(&Base, &SourceDir) -> Adapter {
    let dir = golden("curve").join(name).join("adapter");
    move |base, _| PeftAdapter::read(&dir.as_path().into()).unwrap().to_adapter(&base.config).unwrap()
}

#[test]
fn ten_steps_match_transformers_and_peft() {
    for name in [
        "llama-gqa",
        "qwen2",
        "qwen3",
        "mistral",
        "smollm3",
        "olmo2",
        "olmo3",
        "granite",
        "gemma2",
        "gemma3",
        "phi3",
        "ministral3",
        "granite4",
        "gemma4",
        "gemma4-shared",
        "starcoder2",
        "cohere2",
    ] {
        curve(name, BaseLayout::default(), stored(name));
    }
}

/// The base is quantized while it is read, as Transformers does with a `BitsAndBytesConfig`.
#[test]
fn twenty_qlora_steps_match_peft_and_bitsandbytes() {
    let format =
        BaseFormat { dtype: BaseDtype::Auto, quantization: Quantization::Nf4 { double_quant: true } };
    curve("qwen2-nf4", format, stored("qwen2-nf4"));
}

/// PEFT changes the base for such an adapter. This implementation keeps the base, and subtracts the
/// initial adapter as a separate term.
#[test]
fn ten_steps_with_pissa_and_olora_match_peft() {
    for (name, init_lora_weights, lora_alpha, quantization) in [
        ("llama-gqa-pissa", InitLoraWeights::Pissa, 8.0, QuantizationType::None),
        ("llama-gqa-olora", InitLoraWeights::Olora, 8.0, QuantizationType::None),
        ("qwen2-loftq", InitLoraWeights::Loftq, 4.0, QuantizationType::Nf4),
    ] {
        let loftq_iter = if init_lora_weights == InitLoraWeights::Loftq { 5 } else { 1 };
        let job = JobSpec {
            model: ModelSpec { quantization, ..ModelSpec::default() },
            adapter: AdapterSpec {
                r: 4,
                lora_alpha,
                init_lora_weights,
                loftq_iter,
                ..AdapterSpec::default()
            },
            ..JobSpec::default()
        };
        curve(name, job.base_layout(), |base, dir| Adapter::init(base, dir, &job.adapter, 1).unwrap());
    }
}
