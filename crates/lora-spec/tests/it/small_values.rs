//! Small functions of the public interface whose callers are in other crates.

use lora_spec::{
    BaseDtype, BaseFormat, BaseLayout, JobState, ModelConfig, ModelSpec, Philox, Quantization, RowFormat,
    SafetensorsIndex, SourceDir, TargetModules, TrainFiles, TrainingSpec,
};
use lora_test_kit::golden;

#[test]
fn states_are_stopped_active_or_terminal() {
    use JobState::{
        Cancelled, Cancelling, Failed, Paused, Pausing, Preparing, Queued, Recovering, Running, Succeeded,
        Validating, Waiting,
    };
    for (states, stopped, active, terminal) in [
        (&[Validating, Queued][..], false, false, false),
        (&[Preparing, Running, Recovering, Waiting, Pausing, Cancelling], false, true, false),
        (&[Paused, Failed], true, false, false),
        (&[Succeeded, Cancelled], true, false, true),
    ] {
        for state in states {
            let found = (state.is_stopped(), state.is_active(), state.is_terminal());
            assert_eq!(found, (stopped, active, terminal), "{}", state.name());
        }
    }
}

#[test]
fn steps_follow_from_epochs_unless_they_are_given() {
    let steps = |num_train_epochs, max_steps| {
        TrainingSpec { num_train_epochs, max_steps, ..TrainingSpec::default() }.total_steps(10)
    };
    assert_eq!((steps(3.0, None), steps(0.25, None), steps(1e-9, None), steps(3.0, Some(7))), (30, 3, 1, 7));
}

#[test]
fn philox_has_the_key_of_fnv_1a() {
    // FNV-1a of the empty text is its offset basis; of eight zero bytes it is this number.
    let hash = (0..8).fold(0xcbf2_9ce4_8422_2325_u64, |h, _| h.wrapping_mul(0x100_0000_01b3));
    let philox = Philox::new(0, "");
    assert_eq!(philox.key(), [hash as u32, (hash >> 32) as u32]);
    assert_ne!(philox.key(), Philox::new(0, "a").key());
    let words = philox.words([1, 2, 3, 4]);
    let draw = u128::from(u64::from(words[0]) | u64::from(words[1]) << 32);
    for bound in [1, 10, 1 << 40, u64::MAX] {
        let expected = ((draw * u128::from(bound)) >> 64) as u64;
        assert_eq!(philox.below(bound, [1, 2, 3, 4]), expected);
    }
}

#[test]
fn a_base_is_a_url_or_a_directory() {
    let url = |base: &str| {
        let model = ModelSpec { base: base.into(), ..ModelSpec::default() };
        (
            model.base_url().is_some(),
            model.hub_repository().map(|(name, revision)| (name.to_owned(), revision.map(str::to_owned))),
        )
    };
    assert_eq!(url("hf://org/name@v1"), (true, Some(("org/name".into(), Some("v1".into())))));
    assert_eq!(url("s3://bucket/dir"), (true, None));
    for directory in ["base", "://x", "a b://x", "hf://", "/models/a://"] {
        assert_eq!(url(directory), (false, None), "{directory}");
    }
}

#[test]
fn layouts_and_formats_keep_their_type() {
    assert_eq!(BaseFormat::from(BaseDtype::F32).dtype, BaseDtype::F32);
    assert_eq!(BaseLayout::from(BaseDtype::F32).format.dtype, BaseDtype::F32);
    let names = [Quantization::None, Quantization::Nf4 { double_quant: true }, Quantization::Int8];
    assert_eq!(names.map(Quantization::name), [None, Some("NF4"), Some("int8")]);
    assert_eq!(RowFormat::PromptCompletion.to_string(), "prompt/completion");
    assert_eq!(SourceDir::new("a/b", "/c").to_string(), "a/b");
    let files: TrainFiles = ["a.jsonl", "b.jsonl"].map(Into::into).into_iter().collect();
    assert_eq!(files.len(), 2);
    assert_eq!(TargetModules::default().selects("any"), Some(true));
}

#[test]
fn tensors_are_stored_under_the_names_of_the_files() {
    for (model, stored, head, others) in [
        ("llama-gqa", "model.embed_tokens.weight", "lm_head.weight", false),
        ("gemma3-vision", "language_model.model.embed_tokens.weight", "lm_head.weight", true),
    ] {
        let index = SafetensorsIndex::open(&golden("models").join(model).into()).unwrap();
        assert_eq!(index.stored_name("model.embed_tokens.weight"), stored);
        assert_eq!(index.stored_name("lm_head.weight"), head);
        assert_eq!(index.stored_name("vision_tower.a"), "vision_tower.a");
        assert_eq!(index.other_tensors().next().is_some(), others, "{model}");
    }
    for (model, expected) in [("llama-bf16", BaseDtype::Bf16), ("llama-gqa", BaseDtype::F32)] {
        let dir: SourceDir = golden("models").join(model).into();
        let (index, config) = (SafetensorsIndex::open(&dir).unwrap(), ModelConfig::read(&dir).unwrap());
        assert_eq!(index.gpu_dtype(&config, BaseDtype::Auto), expected, "{model}");
    }
}

#[test]
fn a_config_gives_sizes_and_factors() {
    let read = |model: &str| ModelConfig::read(&golden("models").join(model).into()).unwrap();
    let (plain, vision, shared) = (read("llama-gqa"), read("gemma3-vision"), read("gemma4-shared"));
    assert_eq!((plain.is_multimodal(), vision.is_multimodal()), (false, true));
    let head_dim = plain.layers[0].head_dim as f64;
    assert_eq!(plain.attention_scale, 1.0 / head_dim.sqrt());
    let embedding = shared.per_layer_embedding().unwrap();
    let features = shared.layer_input_size.unwrap();
    let projected = features * shared.layers.len();
    assert_eq!(
        (embedding.projection.in_features, embedding.projection.out_features),
        (shared.hidden_size, projected)
    );
    assert_eq!(embedding.norm.eps, shared.norm_eps * shared.hidden_size as f64);
    let expected = (features as f64 / 2.0).sqrt();
    assert!((embedding.multiplier - expected).abs() < 1e-12 * expected, "{}", embedding.multiplier);
}
