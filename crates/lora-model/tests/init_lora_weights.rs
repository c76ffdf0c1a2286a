//! Compares adapters that are initialized from the base's weights with PEFT's
//! (`tests/golden/initial`).

#![expect(clippy::unwrap_used, reason = "helpers of tests fail the test")]

use std::path::Path;

use candle_core::safetensors::load;
use candle_core::{Device, Tensor};
use lora_model::{Adapter, Base, BaseKey, PeftAdapter, logits, write_adapter};
use lora_ops::gemm::{no_trans, product};
use lora_spec::{
    AdapterSpec, BaseDtype, BaseFormat, BaseLayout, Document, InitLoraWeights, JobSpec, MicroBatch,
    ModelSpec, Quantization, QuantizationType, SourceDir,
};
use lora_test_kit::golden;

fn spec(init_lora_weights: InitLoraWeights, lora_alpha: f64) -> AdapterSpec {
    AdapterSpec { r: 4, lora_alpha, init_lora_weights, ..AdapterSpec::default() }
}

fn dir(model: &str) -> SourceDir {
    golden("models").join(model).into()
}

fn base(model: &str, layout: impl Into<BaseLayout>) -> Base {
    Base::load(&dir(model), layout, &Device::Cpu).unwrap()
}

/// `s B A` of a module, from flat parameters in the adapter's layout.
fn product_of(adapter: &Adapter, params: &Tensor, module: &str) -> Tensor {
    let name = format!("model.layers.{module}");
    let slot = adapter.layout().modules.iter().find(|slot| slot.module.name == name).unwrap();
    let (rows, cols, r) = (slot.module.out_features, slot.module.in_features, slot.r);
    let a = params.narrow(0, slot.a.start, slot.a.len()).unwrap().reshape((r, cols)).unwrap();
    let b = params.narrow(0, slot.b.start, slot.b.len()).unwrap().reshape((rows, r)).unwrap();
    let out = Tensor::zeros((rows, cols), candle_core::DType::F32, &Device::Cpu).unwrap();
    product(adapter.scaling() as f32, no_trans(&b), no_trans(&a), 0.0, &out).unwrap();
    out
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

/// `max|a - b| / max|b|`.
fn error(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    let most = |values: &mut dyn Iterator<Item = f32>| values.fold(0.0, |most: f32, v| most.max(v.abs()));
    most(&mut a.iter().zip(b).map(|(a, b)| a - b)) / most(&mut b.iter().copied())
}

/// The weight of a module in a checkpoint.
fn weight(model: &str, module: &str) -> Tensor {
    let path = golden("models").join(model).join("model.safetensors");
    load(path, &Device::Cpu).unwrap()[&format!("model.layers.{module}.weight")].clone()
}

const MODULES: [&str; 4] = ["0.self_attn.q_proj", "0.self_attn.k_proj", "1.mlp.gate_proj", "1.mlp.down_proj"];

#[test]
fn pissa_and_olora_match_peft() {
    let (pissa, olora) = (InitLoraWeights::Pissa, InitLoraWeights::Olora);
    for (case, model, spec) in [
        ("pissa", "llama-gqa", spec(pissa, 8.0)),
        ("pissa-rslora", "qwen2", AdapterSpec { use_rslora: true, ..spec(pissa, 8.0) }),
        ("olora", "llama-gqa", spec(olora, 8.0)),
        // With enough rounds the randomized decomposition finds the same product.
        ("pissa", "llama-gqa", spec(InitLoraWeights::PissaNiter(40), 8.0)),
    ] {
        let base = base(model, BaseDtype::F32);
        let adapter = Adapter::init(&base, &dir(model), &spec, 1).unwrap();
        let expected = load(golden("initial").join(format!("{case}.safetensors")), &Device::Cpu).unwrap();
        for module in MODULES {
            let product = product_of(&adapter, adapter.params(), module);
            let e = error(&values(&product), &values(&expected[&format!("{module}.product")]));
            assert!(e < 1e-4, "{case} {module}: s B A is off by {e}");
            let initial = product_of(&adapter, adapter.initial().unwrap(), module);
            let frozen = (weight(model, module) - initial).unwrap();
            let e = error(&values(&frozen), &values(&expected[&format!("{module}.frozen")]));
            assert!(e < 1e-4, "{case} {module}: the frozen weight is off by {e}");
        }
    }
}

#[test]
fn loftq_matches_peft() {
    for (case, rounds) in [("loftq", 1), ("loftq-iter-5", 5)] {
        let job = JobSpec {
            model: ModelSpec { quantization: QuantizationType::Nf4, ..ModelSpec::default() },
            adapter: AdapterSpec { loftq_iter: rounds, ..spec(InitLoraWeights::Loftq, 4.0) },
            ..JobSpec::default()
        };
        let base = base("qwen2", job.base_layout());
        let adapter = Adapter::init(&base, &dir("qwen2"), &job.adapter, 1).unwrap();
        assert!(adapter.initial().is_none());
        // The base's hash includes requantized weights, which are not in the files.
        let plain = self::base("qwen2", job.base_layout().format);
        assert_eq!(base.sha256() == plain.sha256(), rounds == 1);
        assert_eq!(base.sha256(), self::base("qwen2", job.base_layout()).sha256());
        let expected = load(golden("initial").join(format!("{case}.safetensors")), &Device::Cpu).unwrap();
        // The factors compensate for a scaling that is not 1.
        let scaled = AdapterSpec { lora_alpha: 32.0, ..job.adapter.clone() };
        let scaled = Adapter::init(&base, &dir("qwen2"), &scaled, 1).unwrap();
        for module in MODULES {
            let product = values(&product_of(&adapter, adapter.params(), module));
            let e = error(&product, &values(&expected[&format!("{module}.product")]));
            assert!(e < 1e-4, "{case} {module}: B A is off by {e}");
            let e = error(&values(&product_of(&scaled, scaled.params(), module)), &product);
            assert!(e < 1e-5, "{case} {module}: s B A is off by {e}");
            let name = format!("{module}.frozen");
            let e = error(
                &values(&base.dense_weight(&format!("model.layers.{module}")).unwrap()),
                &values(&expected[&name]),
            );
            assert!(e < 1e-6, "{case} {module}: the frozen weight is off by {e}");
            // With the adapter, the base is closer to the weight than with quantization alone.
            let weight = values(&weight("qwen2", module));
            let frozen = values(&expected[&name]);
            let corrected: Vec<f32> = frozen.iter().zip(&product).map(|(q, p)| q + p).collect();
            let squares = |a: &[f32]| a.iter().zip(&weight).map(|(a, b)| (a - b).powi(2)).sum::<f32>();
            assert!(squares(&corrected) < 0.8 * squares(&frozen), "{case} {module}");
        }
    }
}

fn sample(base: &Base, adapter: Option<&Adapter>) -> Vec<f32> {
    let tokens: Vec<u32> = (0..24).map(|i| (i * 7 + 3) % base.config.vocab_size as u32).collect();
    let batch = MicroBatch {
        rows: Document::whole_rows([0, 1], 12),
        seq_len: 12,
        targets: tokens.clone(),
        tokens,
        weights: vec![1.0; 24],
    };
    values(&logits(base, adapter, &batch).unwrap())
}

#[test]
fn initial_logits_match_the_base_and_the_export() {
    let nf4 = BaseFormat { dtype: BaseDtype::Auto, quantization: Quantization::Nf4 { double_quant: true } };
    for (model, layout) in [("llama-gqa", BaseLayout::default()), ("qwen2", nf4.into())] {
        let base = base(model, layout);
        for init in [InitLoraWeights::Pissa, InitLoraWeights::PissaNiter(2), InitLoraWeights::Olora] {
            let spec = spec(init, 8.0);
            let adapter = Adapter::init(&base, &dir(model), &spec, 1).unwrap();
            let e = error(&sample(&base, Some(&adapter)), &sample(&base, None));
            assert!(e < 1e-5, "{model} {init}: off by {e}");

            let moved: Vec<f32> = values(adapter.params()).iter().map(|p| 1.25 * p + 0.01).collect();
            let trained = adapter.with_params(moved, None).unwrap();
            let logits = sample(&base, Some(&trained));
            assert!(error(&logits, &sample(&base, None)) > 0.01, "{model} {init}");
            let [(_, weights), (_, config)] = write_adapter(&trained, &spec, "base", None).unwrap();
            let config_json: serde_json::Value = serde_json::from_slice(&config).unwrap();
            assert_eq!((&config_json["r"], &config_json["lora_alpha"]), (&8.into(), &16.into()));
            assert_eq!(config_json["init_lora_weights"], true);
            let export = PeftAdapter::parse(&Path::new("x").into(), &config, &weights)
                .unwrap()
                .to_adapter(&base.config)
                .unwrap();
            let e = error(&sample(&base, Some(&export)), &logits);
            assert!(e < 1e-5, "{model} {init}: the export is off by {e}");
        }
    }
}

/// Jobs share a base in memory unless LoftQ requantizes it.
#[test]
fn loftq_bases_have_distinct_keys_and_hashes() {
    let key = |init_lora_weights, loftq_iter, r| {
        let job = JobSpec {
            model: ModelSpec { quantization: QuantizationType::Nf4, ..ModelSpec::default() },
            adapter: AdapterSpec { r, loftq_iter, ..spec(init_lora_weights, 8.0) },
            ..JobSpec::default()
        };
        BaseKey::from_dir(&golden("models/qwen2").into(), job.base_layout()).unwrap()
    };
    let plain = key(InitLoraWeights::Default, 1, 4);
    for shared in [InitLoraWeights::Pissa, InitLoraWeights::Olora, InitLoraWeights::Loftq] {
        assert_eq!(key(shared, 1, 8), plain);
    }
    let twice = key(InitLoraWeights::Loftq, 2, 4);
    assert_eq!(key(InitLoraWeights::Loftq, 2, 4), twice);
    assert!(twice != plain && twice != key(InitLoraWeights::Loftq, 3, 4));
    assert!(twice != key(InitLoraWeights::Loftq, 2, 8));
}

#[test]
fn initialization_is_independent_of_threads() {
    let base = base("llama-gqa", BaseDtype::F32);
    for init in [InitLoraWeights::Pissa, InitLoraWeights::PissaNiter(4), InitLoraWeights::Olora] {
        let bits = |threads: usize| -> Vec<u32> {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let adapter =
                pool.install(|| Adapter::init(&base, &dir("llama-gqa"), &spec(init, 8.0), 1).unwrap());
            values(adapter.params()).into_iter().map(f32::to_bits).collect()
        };
        let one = bits(1);
        assert!(one.iter().any(|bits| *bits != 0));
        assert!(one == bits(2) && one == bits(3), "{init}");
    }
}

#[test]
fn invalid_ranks_and_bases_are_named() {
    let dense = base("llama-gqa", BaseDtype::F32);
    let large = AdapterSpec { r: 4000, ..spec(InitLoraWeights::Pissa, 8.0) };
    let error = Adapter::init(&dense, &dir("llama-gqa"), &large, 1).unwrap_err().to_string();
    assert!(error.contains("adapter.r: is 4000") && error.contains("model.layers.0."), "{error}");

    let quantized = base("llama-nf4", BaseDtype::Auto);
    let loftq = spec(InitLoraWeights::Loftq, 8.0);
    let error = Adapter::init(&quantized, &dir("llama-nf4"), &loftq, 1).unwrap_err().to_string();
    assert!(error.contains("adapter.init_lora_weights: loftq needs the weights before"), "{error}");
}
