//! Compares logits, loss and every adapter gradient with Transformers + PEFT (`tests/golden`, made
//! by `tests/oracle`).

#![expect(clippy::unwrap_used, reason = "helpers of tests fail the test")]

use std::collections::HashMap;
use std::path::Path;

use candle_core::{Device, Tensor};
use lora_model::{
    AdaptedModule, Adapter, Base, Generator, Gradients, MergeTarget, PassOptions, PeftAdapter, Sampling,
    forward_backward, logits,
};
use lora_spec::{
    ActivationCheckpointing, AdapterSpec, BaseDtype, BaseLayout, Document, MicroBatch, SourceDir,
};
use lora_test_kit::golden;
use serde_json::Value;

fn load(path: &Path) -> HashMap<String, Tensor> {
    candle_core::safetensors::load(path, &Device::Cpu).unwrap()
}

fn values(tensor: &Tensor) -> Vec<f64> {
    tensor.to_dtype(candle_core::DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// `max|a - b| / max|b|`.
fn error(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    let largest = b.iter().fold(0.0_f64, |m, v| m.max(v.abs()));
    a.iter().zip(b).fold(0.0_f64, |m, (a, b)| m.max((a - b).abs())) / largest
}

struct Case {
    base: Base,
    adapter: Adapter,
    batch: MicroBatch,
    expected: HashMap<String, Tensor>,
    /// The files of the base.
    dir: SourceDir,
    /// `true` for positions that are not padding.
    real: Vec<bool>,
}

impl Case {
    fn read(name: &str, model: Option<&str>) -> Self {
        let dir = golden("cases").join(name);
        let case: Value = serde_json::from_slice(&std::fs::read(dir.join("case.json")).unwrap()).unwrap();
        let model = model.unwrap_or_else(|| case["model"].as_str().unwrap());
        let files = golden("models").join(model).into();
        let base = Base::load(&files, BaseDtype::Auto, &Device::Cpu).unwrap();
        let adapter =
            PeftAdapter::read(&dir.join("adapter").into()).unwrap().to_adapter(&base.config).unwrap();
        let inputs = load(&dir.join("inputs.safetensors"));
        let (rows, seq_len) = inputs["tokens"].dims2().unwrap();
        let labels = values(&inputs["labels"]);
        // Labels are not shifted: position t predicts label t + 1.
        let next = |i: usize| if i % seq_len + 1 < seq_len { labels[i + 1] } else { -100.0 };
        Self {
            dir: files,
            batch: MicroBatch {
                rows: Document::whole_rows(vec![0; rows], seq_len),
                seq_len,
                tokens: values(&inputs["tokens"]).iter().map(|t| *t as u32).collect(),
                targets: (0..rows * seq_len).map(|i| next(i).max(0.0) as u32).collect(),
                weights: (0..rows * seq_len).map(|i| if next(i) >= 0.0 { 1.0 } else { 0.0 }).collect(),
            },
            real: values(&inputs["attention_mask"]).iter().map(|m| *m > 0.0).collect(),
            expected: load(&dir.join("expected.safetensors")),
            base,
            adapter,
        }
    }

    fn logits_error(&self, adapter: Option<&Adapter>, expected: &str) -> f64 {
        let got = values(&logits(&self.base, adapter, &self.batch).unwrap());
        let vocab = self.base.config.vocab_size;
        let keep = |all: Vec<f64>| -> Vec<f64> {
            all.chunks(vocab)
                .zip(&self.real)
                .filter(|(_, real)| **real)
                .flat_map(|(row, _)| row.to_vec())
                .collect()
        };
        error(&keep(got), &keep(values(&self.expected[expected])))
    }

    /// Checks logits, loss and gradients; returns the flat gradients.
    fn check(&self, name: &str, checkpointing: ActivationCheckpointing) -> Vec<f32> {
        for (adapter, expected) in [(Some(&self.adapter), "logits"), (None, "base_logits")] {
            let error = self.logits_error(adapter, expected);
            assert!(error <= 1e-5, "{name}: {expected} are off by {error:e}");
        }
        self.check_gradients(name, &self.batch, checkpointing)
    }

    /// Checks loss and gradients of the case's rows in `batch`; returns the flat gradients.
    fn check_gradients(
        &self,
        name: &str,
        batch: &MicroBatch,
        checkpointing: ActivationCheckpointing,
    ) -> Vec<f32> {
        let grads = Gradients::zeros(self.adapter.layout(), &Device::Cpu).unwrap();
        let pass = PassOptions { checkpointing, dropout: 0.0, seed: 0, step: 0 };
        let loss = forward_backward(&self.base, &self.adapter, &grads, batch, pass).unwrap();
        let expected = values(&self.expected["loss_sum"])[0];
        let sum = loss.sum().unwrap();
        assert!((sum - expected).abs() <= 1e-5 * expected, "{name}: loss {sum}");
        let flat = grads.flat().to_vec1::<f32>().unwrap();
        for (tensor, _, range) in self.adapter.layout().tensors() {
            let got: Vec<f64> = flat[range].iter().map(|g| f64::from(*g) / loss.weight_sum).collect();
            let error = error(&got, &values(&self.expected[&format!("grad.{tensor}")]));
            assert!(error <= 1e-4, "{name}: gradient of {tensor} is off by {error:e}");
            assert!(got.iter().any(|g| *g != 0.0), "{name}: gradient of {tensor} is zero");
        }
        flat
    }
}

/// Packs all rows of `batch` into one, without their padding (`real` is false there).
fn packed(batch: &MicroBatch, real: &[bool]) -> MicroBatch {
    let mut packed = MicroBatch {
        rows: vec![Vec::new()],
        seq_len: 0,
        tokens: Vec::new(),
        targets: Vec::new(),
        weights: Vec::new(),
    };
    for (i, real) in real.chunks(batch.seq_len).enumerate() {
        let at = i * batch.seq_len..i * batch.seq_len + real.iter().filter(|real| **real).count();
        packed.rows[0].push(Document { start: packed.tokens.len(), ..batch.rows[i][0] });
        packed.tokens.extend_from_slice(&batch.tokens[at.clone()]);
        packed.targets.extend_from_slice(&batch.targets[at.clone()]);
        packed.weights.extend_from_slice(&batch.weights[at]);
    }
    packed.seq_len = packed.tokens.len();
    packed
}

const CASES: &[&str] = &[
    "llama-gqa",
    "llama-gqa-list",
    "llama-gqa-regex",
    "llama-gqa-rslora",
    "llama3-rope",
    "llama-linear-rope",
    "qwen2",
    "llama-bf16",
    "qwen2-window",
    "llama-geglu",
    "llama-nf4",
    "qwen2-nf4",
    "llama-int8",
    "qwen3",
    "mistral",
    "smollm3",
    "olmo2",
    "olmo3",
    "granite",
    "llama-yarn",
    "gemma3",
    "llama-dynamic",
    "phi3",
    "phi3-longrope",
    "phi3-longrope-short",
    "ministral3",
    "phi3-nf4",
    "qwen3-int8",
    "gemma2",
    "gemma3-vision",
    "granite4",
    "granite4-nope",
    "gemma4",
    "gemma4-vision",
    "gemma4-shared",
    "gemma4-shared-blocks",
    "gemma4-shared-embedding",
    "starcoder2",
    "cohere2",
    "cohere2-attention",
];

#[test]
fn every_case_matches_transformers_and_peft() {
    for name in CASES {
        let case = Case::read(name, None);
        let kept = case.check(name, ActivationCheckpointing::None);
        let bits = |grads: &[f32]| grads.iter().map(|g| g.to_bits()).collect::<Vec<_>>();
        for checkpointing in [ActivationCheckpointing::Block, ActivationCheckpointing::BlockSaveAttention] {
            let recomputed = case.check(name, checkpointing);
            assert_eq!(bits(&kept), bits(&recomputed), "{name}: {checkpointing:?} changed the gradients");
        }
    }
}

#[test]
fn packed_rows_have_the_loss_and_the_gradients_of_their_samples() {
    for name in CASES {
        let case = Case::read(name, None);
        let batch = packed(&case.batch, &case.real);
        assert!(batch.is_packed(), "{name}");
        for checkpointing in [ActivationCheckpointing::None, ActivationCheckpointing::Block] {
            case.check_gradients(&format!("{name}, packed"), &batch, checkpointing);
        }
    }
}

/// The last token of a row is only a target, and rows are padded: neither changes the frequencies
/// that depend on the number of a row's tokens.
#[test]
fn frequencies_depend_on_the_tokens_of_a_row_and_not_on_its_padding() {
    for name in ["llama-dynamic", "phi3-longrope", "phi3-longrope-short"] {
        let case = Case::read(name, None);
        let none = ActivationCheckpointing::None;
        for inputs in [case.batch.seq_len - 1, case.batch.seq_len] {
            let separate = padded(&case.batch, inputs);
            case.check_gradients(&format!("{name}, padded"), &separate, none);
        }
        let one = packed(&case.batch, &case.real);
        let padded = padded(&one, one.seq_len);
        case.check_gradients(&format!("{name}, packed and padded"), &padded, none);
    }
}

/// Returns the first `inputs` positions of each row of `batch` with 50 positions of padding.
fn padded(batch: &MicroBatch, inputs: usize) -> MicroBatch {
    fn rows<T: Copy + Default>(values: &[T], seq_len: usize, inputs: usize) -> Vec<T> {
        let row = |row: &[T]| [&row[..inputs], &[T::default(); 50]].concat();
        values.chunks(seq_len).flat_map(row).collect()
    }
    let of = batch.seq_len;
    MicroBatch {
        rows: batch.rows.clone(),
        seq_len: inputs + 50,
        tokens: rows(&batch.tokens, of, inputs),
        targets: rows(&batch.targets, of, inputs),
        weights: rows(&batch.weights, of, inputs),
    }
}

/// The random numbers of a token are those of its sample and of its position there.
#[test]
fn packing_keeps_the_dropout_of_each_sample() {
    let mut case = Case::read("gemma3", None);
    for (i, row) in case.batch.rows.iter_mut().enumerate() {
        row[0].sample = 7 * i as u64;
    }
    let run = |batch: &MicroBatch| {
        let grads = Gradients::zeros(case.adapter.layout(), &Device::Cpu).unwrap();
        let pass =
            PassOptions { checkpointing: ActivationCheckpointing::None, dropout: 0.4, seed: 1, step: 2 };
        let loss = forward_backward(&case.base, &case.adapter, &grads, batch, pass).unwrap();
        (loss.sum().unwrap(), values(grads.flat()))
    };
    let (unpacked, packed) = (run(&case.batch), run(&packed(&case.batch, &case.real)));
    assert!((unpacked.0 - packed.0).abs() <= 1e-5 * unpacked.0);
    let error = error(&packed.1, &unpacked.1);
    assert!(error <= 1e-5, "{error:e}");
}

/// The expected value is from `sha256sum`, over a line with name and hash for each file.
#[test]
fn a_base_is_identified_by_the_hashes_of_its_files() {
    let dir = golden("models/llama-gqa").into();
    let base = Base::load(&dir, BaseDtype::F32, &Device::Cpu).unwrap();
    assert_eq!(base.sha256(), "147bfe2a48ed9416634ad8a39ca2283c610629a719bdc21612e05b60916d31d1");
}

#[test]
fn transformers_4_configs_give_the_same_model() {
    Case::read("qwen2", Some("qwen2-v4")).check("qwen2-v4", ActivationCheckpointing::None);
}

/// Decoding with a cache chooses the tokens that the forward pass over the whole row ranks first,
/// from prompts shorter and longer than a window, and with rotary embeddings that change with the
/// length of the row.
#[test]
fn decoding_agrees_with_the_forward_pass() {
    for name in CASES {
        let case = Case::read(name, None);
        let vocab = case.base.config.vocab_size;
        for adapter in [Some(&case.adapter), None] {
            let generator = Generator { base: &case.base, adapter };
            for (row, prompt) in
                (0..case.batch.rows.len()).flat_map(|row| (1..9).chain([16]).map(move |length| (row, length)))
            {
                let mut tokens = case.batch.tokens[row * case.batch.seq_len..][..prompt].to_vec();
                let generated = generator.generate(&tokens, &[], 12, Sampling::Greedy).unwrap();
                assert_eq!(generated.len(), 12, "{name}");
                tokens.extend(&generated);
                let logits_of = |tokens: &[u32]| {
                    let batch = MicroBatch {
                        rows: Document::whole_rows([0], tokens.len()),
                        seq_len: tokens.len(),
                        targets: vec![0; tokens.len()],
                        weights: vec![0.0; tokens.len()],
                        tokens: tokens.to_vec(),
                    };
                    values(&logits(&case.base, adapter, &batch).unwrap())
                };
                let all = logits_of(&tokens);
                let context = |length: usize| case.base.config.ropes.first().map(|rope| rope.context(length));
                for (position, chosen) in (prompt - 1..).zip(&generated) {
                    let other = context(position + 1) != context(tokens.len());
                    let logits = if other { &logits_of(&tokens[..=position]) } else { &all };
                    let logits = &logits[position * vocab..][..vocab];
                    let best = (0..vocab).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap();
                    assert_eq!(*chosen as usize, best, "{name}: after {position} of a prompt of {prompt}");
                }
            }
        }
    }
}

/// `W + s B A` gives the logits that PEFT computed with the adapter beside the base.
#[test]
fn a_merged_base_gives_the_logits_of_the_adapter() {
    for name in CASES {
        let case = Case::read(name, None);
        let trained = BaseLayout::from(BaseDtype::Auto);
        let merged =
            Base::merged(&case.dir, &trained, MergeTarget::Dequantized, BaseDtype::F32, &case.adapter)
                .unwrap();
        let merged = Case { base: merged, ..case };
        let error = merged.logits_error(None, "logits");
        assert!(error <= 1e-5, "{name}: {error:e}");
    }
}

/// The names are those of the class for text, of the bare model, and of a class with a vision tower
/// before and since Transformers 4.52.
#[test]
fn a_base_is_read_under_every_name_of_its_tensors() {
    let (dir, out) = (golden("models/llama-gqa"), tempfile::tempdir().unwrap());
    std::fs::copy(dir.join("config.json"), out.path().join("config.json")).unwrap();
    let stored = load(&dir.join("model.safetensors"));
    let base = |dir: &Path| Base::load(&dir.into(), BaseDtype::F32, &Device::Cpu).map_err(|e| e.to_string());
    let expected = base(&dir).unwrap();
    for (decoder, head) in [
        ("", "lm_head"),
        ("language_model.model.", "language_model.lm_head"),
        ("model.language_model.", "lm_head"),
    ] {
        let renamed = stored.iter().map(|(name, tensor)| match name.strip_prefix("model.") {
            Some(rest) => (format!("{decoder}{rest}"), tensor.clone()),
            None => (format!("{head}.weight"), tensor.clone()),
        });
        let renamed: HashMap<String, Tensor> = renamed.collect();
        candle_core::safetensors::save(&renamed, out.path().join("model.safetensors")).unwrap();
        let read = base(out.path()).unwrap();
        for module in expected.config.linear_modules() {
            let weight = |base: &Base| values(&base.dense_weight(&module.name).unwrap());
            assert_eq!(weight(&read), weight(&expected), "{decoder}{}", module.name);
        }
    }
}

/// Bases whose `config.json` says a thing twice, in another word, or not at all
/// (`tests/oracle/configs.py`).
#[test]
fn unusual_configs_give_the_logits_of_transformers() {
    let path = golden("configs.safetensors");
    let expected = load(&path);
    let bytes = std::fs::read(&path).unwrap();
    let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    let variants = header.metadata().as_ref().unwrap();
    assert_eq!(2 * variants.len(), expected.len());
    for (name, variant) in variants {
        let variant: Value = serde_json::from_str(variant).unwrap();
        let out = tempfile::tempdir().unwrap();
        let base = with_changes(variant["model"].as_str().unwrap(), &variant["changes"], out.path());
        let tokens: Vec<u32> =
            values(&expected[&format!("{name}.tokens")]).iter().map(|token| *token as u32).collect();
        let batch = MicroBatch {
            rows: Document::whole_rows([0], tokens.len()),
            seq_len: tokens.len(),
            targets: vec![0; tokens.len()],
            weights: vec![0.0; tokens.len()],
            tokens,
        };
        let error = error(&values(&logits(&base, None, &batch).unwrap()), &values(&expected[name]));
        assert!(error <= 1e-5, "{name}: {error:e}");
    }
}

/// Copies a golden base to `out`, changes its `config.json`, and loads it.
fn with_changes(model: &str, changes: &Value, out: &Path) -> Base {
    let dir = golden("models").join(model);
    let mut config: Value = serde_json::from_slice(&std::fs::read(dir.join("config.json")).unwrap()).unwrap();
    for (key, value) in changes.as_object().unwrap() {
        config[key] = value.clone();
    }
    for file in std::fs::read_dir(&dir).unwrap().map(Result::unwrap) {
        std::fs::copy(file.path(), out.join(file.file_name())).unwrap();
    }
    std::fs::write(out.join("config.json"), config.to_string()).unwrap();
    Base::load(&out.into(), BaseDtype::F32, &Device::Cpu).unwrap()
}

/// A merged base has both matrices, and says so.
#[test]
fn a_head_that_differs_from_the_embedding_is_kept_apart() {
    let [tied, merged] = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let base = with_changes("llama-gqa", &serde_json::json!({"tie_word_embeddings": true}), tied.path());
    assert!(!base.config.tie_word_embeddings);
    let adapter = Adapter::new(&base.config, &AdapterSpec::default(), 1).unwrap();
    let (dir, trained) = (SourceDir::from(tied.path()), BaseLayout::from(BaseDtype::Auto));
    let written = Base::merged(&dir, &trained, MergeTarget::Original, BaseDtype::F32, &adapter).unwrap();
    written.save(&dir, merged.path()).unwrap();
    let config = std::fs::read(merged.path().join("config.json")).unwrap();
    let config: Value = serde_json::from_slice(&config).unwrap();
    assert_eq!(config["tie_word_embeddings"], Value::Bool(false));
    let [before, after] = [tied.path(), merged.path()]
        .map(|dir| values(&load(&dir.join("model.safetensors"))["lm_head.weight"]));
    assert_eq!(before, after);

    // A head that equals the embedding is not loaded a second time.
    let mut tensors = load(&tied.path().join("model.safetensors"));
    tensors.insert("lm_head.weight".into(), tensors["model.embed_tokens.weight"].clone());
    candle_core::safetensors::save(&tensors, tied.path().join("model.safetensors")).unwrap();
    let equal = Base::load(&dir, BaseDtype::F32, &Device::Cpu).unwrap();
    assert!(equal.config.tie_word_embeddings && equal.bytes() < base.bytes());
}

/// The vision tower is copied, and every tensor keeps its name.
#[test]
fn a_merged_multimodal_base_is_complete() {
    for name in ["gemma3-vision", "gemma4-vision"] {
        let (case, out) = (Case::read(name, None), tempfile::tempdir().unwrap());
        let trained = BaseLayout::from(BaseDtype::Auto);
        let merged =
            Base::merged(&case.dir, &trained, MergeTarget::Original, BaseDtype::F32, &case.adapter).unwrap();
        merged.save(&case.dir, out.path()).unwrap();
        let (before, after) =
            (load(case.dir.file("model.safetensors").path()), load(&out.path().join("model.safetensors")));
        assert_eq!(before.len(), after.len());
        for (name, tensor) in &before {
            let same = values(tensor) == values(&after[name]);
            assert_eq!(same, !name.ends_with("_proj.weight") || name.contains("vision"), "{name}");
        }
    }
}

/// PEFT draws `A` from the uniform distribution between `-1/sqrt(in_features)` and
/// `1/sqrt(in_features)` (Kaiming uniform with `a = sqrt(5)`), and sets `B` to zero.
#[test]
fn initial_adapters_have_the_distribution_of_peft() {
    let base = Case::read("llama-gqa", None).base;
    let stored = PeftAdapter::read(&golden("curve/llama-gqa/adapter").into()).unwrap();
    let stored = stored.to_adapter(&base.config).unwrap();
    let spec = AdapterSpec { r: 256, ..AdapterSpec::default() };
    let adapter = Adapter::new(&base.config, &spec, 1).unwrap();
    let of = |adapter: &Adapter| adapter.params().to_vec1::<f32>().unwrap();
    let (ours, pefts) = (of(&adapter), of(&stored));
    for AdaptedModule { module, a, b, .. } in &adapter.layout().modules {
        let bound = 1.0 / (module.in_features as f64).sqrt();
        let a: Vec<f64> = ours[a.clone()].iter().map(|v| f64::from(*v) / bound).collect();
        assert!(a.iter().all(|v| v.abs() <= 1.0), "{}", module.name);
        let mean = a.iter().sum::<f64>() / a.len() as f64;
        let square = a.iter().map(|v| v * v).sum::<f64>() / a.len() as f64;
        assert!(mean.abs() < 0.04 && (square - 1.0 / 3.0).abs() < 0.02, "{}: {mean} {square}", module.name);
        assert!(ours[b.clone()].iter().all(|v| *v == 0.0), "{}", module.name);
    }
    for AdaptedModule { module, a, .. } in &stored.layout().modules {
        let bound = 1.0 / (module.in_features as f64).sqrt();
        let largest = pefts[a.clone()].iter().fold(0.0_f64, |m, v| m.max(f64::from(v.abs())));
        assert!((0.9 * bound..=bound).contains(&largest), "{}: {largest} of {bound}", module.name);
    }
}
