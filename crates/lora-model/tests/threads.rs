//! A whole training pass gives the same bits with 1, 2 and 3 threads, at a size where every product
//! is split.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::Path;

use candle_core::{Device, Tensor};
use lora_model::{Adapter, Base, Gradients, PassOptions, forward_backward};
use lora_spec::{
    ActivationCheckpointing, AdapterSpec, BaseDtype, BaseFormat, Document, MicroBatch, ModelConfig, Philox,
    Quantization,
};
use serde_json::json;

fn random(n: usize, seed: u64, bound: f32) -> Vec<f32> {
    let philox = Philox::new(seed, "threads");
    (0..n).map(|i| (2.0 * Philox::unit(philox.words([i as u32, 0, 0, 0])[0]) - 1.0) * bound).collect()
}

fn write_base(dir: &Path) {
    let config = json!({
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 192,
        "intermediate_size": 320,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": 3000,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": true,
    });
    let text = config.to_string();
    let tensors = ModelConfig::parse(&text).unwrap().tensors();
    std::fs::write(dir.join("config.json"), text).unwrap();
    let tensors = tensors.into_iter().enumerate().map(|(i, (name, shape))| {
        let values = random(shape.iter().product(), i as u64, 0.2);
        (name, Tensor::from_vec(values, shape, &Device::Cpu).unwrap())
    });
    candle_core::safetensors::save(&tensors.collect(), dir.join("model.safetensors")).unwrap();
}

#[test]
fn loss_and_gradients_have_the_same_bits_with_any_number_of_threads() {
    let dir = tempfile::tempdir().unwrap();
    write_base(dir.path());
    let tokens: Vec<u32> = (0..3 * 150).map(|i| i * 7 % 3000).collect();
    let batch = MicroBatch {
        rows: Document::whole_rows([4, 0, 9], 150),
        seq_len: 150,
        weights: (0..tokens.len()).map(|i| if i % 5 == 0 { 0.0 } else { 1.0 }).collect(),
        targets: tokens.clone(),
        tokens,
    };
    let quantized = |quantization| BaseFormat { dtype: BaseDtype::Auto, quantization };
    let quantized = [Quantization::Nf4 { double_quant: true }, Quantization::Int8].map(quantized);
    for format in [BaseDtype::F32, BaseDtype::Bf16].map(BaseFormat::from).into_iter().chain(quantized) {
        let base = Base::load(&dir.path().into(), format, &Device::Cpu).unwrap();
        let spec = AdapterSpec { r: 8, ..AdapterSpec::default() };
        let fresh = Adapter::new(&base.config, &spec, 1).unwrap();
        // With B = 0 the gradient of A would be zero.
        let params = random(fresh.layout().len, 99, 0.1);
        let adapter = Adapter::from_params(fresh.layout().clone(), params, fresh.scaling()).unwrap();
        let pass = |threads: usize, dropout: f64| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let grads = Gradients::zeros(adapter.layout(), &Device::Cpu).unwrap();
            let pass =
                PassOptions { checkpointing: ActivationCheckpointing::None, dropout, seed: 1, step: 2 };
            let loss = pool.install(|| forward_backward(&base, &adapter, &grads, &batch, pass).unwrap());
            let grads: Vec<u32> =
                grads.flat().to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect();
            (loss.sum().unwrap().to_bits(), grads)
        };
        let one = pass(1, 0.1);
        assert!(one.1.iter().all(|g| f32::from_bits(*g).is_finite()));
        for threads in [2, 3] {
            assert!(pass(threads, 0.1) == one, "{format:?}: a different result with {threads} threads");
        }
        assert_ne!(pass(1, 0.0).0, one.0, "{format:?}: dropout has no effect");
    }
}
