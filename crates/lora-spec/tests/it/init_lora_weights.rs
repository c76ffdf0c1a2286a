//! What an initialization of the adapter needs from the base.

use lora_spec::{AdapterSpec, FieldError, InitLoraWeights, ModelConfig, SafetensorsIndex, TargetModules};
use lora_test_kit::golden;

fn check(model: &str, adapter: &AdapterSpec) -> Result<(), FieldError> {
    let dir = golden(format!("models/{model}")).into();
    adapter.check_base(&ModelConfig::read(&dir).unwrap(), &SafetensorsIndex::open(&dir).unwrap())
}

#[test]
fn only_an_initialization_from_the_weights_bounds_r() {
    // k_proj has 32 inputs and 16 outputs.
    let adapter = |r, init_lora_weights| AdapterSpec {
        r,
        init_lora_weights,
        target_modules: TargetModules::Names(vec!["q_proj".into(), "k_proj".into()]),
        ..AdapterSpec::default()
    };
    assert_eq!(check("llama-gqa", &adapter(17, InitLoraWeights::Default)), Ok(()));
    for init in [InitLoraWeights::Olora, InitLoraWeights::Pissa, InitLoraWeights::Loftq] {
        assert_eq!(check("llama-gqa", &adapter(16, init)), Ok(()), "{init}");
        let error = check("llama-gqa", &adapter(17, init)).unwrap_err();
        assert_eq!(error.field, "adapter.r");
        let bound = "is 17, but model.layers.0.self_attn.k_proj has rank 16 at most";
        assert!(error.message.starts_with(bound), "{error}");
    }
}

#[test]
fn loftq_needs_a_base_that_is_stored_dense() {
    let adapter = |init_lora_weights, module: &str| AdapterSpec {
        init_lora_weights,
        target_modules: TargetModules::Names(vec![module.into()]),
        ..AdapterSpec::default()
    };
    assert_eq!(check("llama-gqa", &adapter(InitLoraWeights::Loftq, "q_proj")), Ok(()));
    for model in ["llama-nf4", "llama-int8"] {
        assert_eq!(check(model, &adapter(InitLoraWeights::Pissa, "q_proj")), Ok(()), "{model}");
        let error = check(model, &adapter(InitLoraWeights::Loftq, "q_proj")).unwrap_err();
        assert_eq!(error.field, "adapter.init_lora_weights");
        assert!(error.message.contains("stores model.layers.0.self_attn.q_proj.weight quantized"), "{error}");
    }
}

#[test]
fn an_exported_adapter_needs_no_initialization() {
    let exported = |init_lora_weights, use_rslora| {
        let spec =
            AdapterSpec { r: 8, lora_alpha: 16.0, init_lora_weights, use_rslora, ..AdapterSpec::default() };
        let AdapterSpec { r, lora_alpha, init_lora_weights, .. } = spec.exported();
        assert_eq!(init_lora_weights, InitLoraWeights::Default);
        (r, lora_alpha)
    };
    // alpha / r, or alpha / sqrt(r) with rsLoRA, stays the same.
    for init in [InitLoraWeights::Olora, InitLoraWeights::Pissa, InitLoraWeights::PissaNiter(4)] {
        assert_eq!(exported(init, false), (16, 32.0), "{init}");
        assert_eq!(exported(init, true), (16, 16.0 * f64::sqrt(2.0)), "{init}");
    }
    for init in [InitLoraWeights::Default, InitLoraWeights::Loftq] {
        assert_eq!(exported(init, true), (8, 16.0), "{init}");
    }
}
