//! A tiny random base with a tokenizer, rows to train on, and groups of ranks in threads.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use candle_core::{Device, Tensor};
use lora_collective::{CancelToken, Group, GroupSpec, PeerListener};
use lora_model::Base;
use lora_spec::{JobFiles, JobSpec, ModelConfig, Philox};
use lora_train::{Run, StepOutcome};
use serde_json::json;

/// A directory with a base, training and evaluation rows, and a job over them.
pub(crate) struct Fixture {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) job: JobSpec,
}

impl Fixture {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        write_base(&dir.path().join("base"), |value| value);
        write_rows(&dir.path().join("train.jsonl"), 0..37);
        write_rows(&dir.path().join("eval.jsonl"), 100..109);
        let mut job = JobSpec { name: "test".into(), ..JobSpec::default() };
        job.model.base = dir.path().join("base");
        job.data.train = dir.path().join("train.jsonl").into();
        job.data.eval = Some(dir.path().join("eval.jsonl"));
        job.adapter.r = 4;
        job.training.global_batch_size = 12;
        job.training.micro_batch_size = 2;
        job.training.num_train_epochs = 2.0;
        job.training.learning_rate = 5e-3;
        job.training.eval_steps = 3;
        Self { dir, job }
    }

    pub(crate) fn base(&self) -> Arc<Base> {
        Arc::new(
            Base::load(&self.job.model.base.as_path().into(), self.job.base_layout(), &Device::Cpu).unwrap(),
        )
    }

    pub(crate) fn run(&self) -> Run {
        self.run_over(self.base())
    }

    pub(crate) fn run_over(&self, base: Arc<Base>) -> Run {
        Run::prepare(&self.job, &JobFiles::from_job(&self.job), base, &CancelToken::new()).unwrap()
    }
}

/// Writes a Llama of 2 blocks with the tokenizer of the golden chats. `change` is applied to every
/// weight except the norms.
pub(crate) fn write_base(dir: &Path, change: impl Fn(f32) -> f32) {
    fs::create_dir_all(dir).unwrap();
    let tokenizer = lora_test_kit::golden("chat/tokenizer");
    for entry in fs::read_dir(tokenizer).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, dir.join(path.file_name().unwrap())).unwrap();
    }
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32,
        "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 512,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": true, "hidden_act": "silu",
    })
    .to_string();
    fs::write(dir.join("config.json"), &config).unwrap();
    let mut tensors = HashMap::new();
    for (name, shape) in ModelConfig::parse(&config).unwrap().tensors() {
        let philox = Philox::new(1, &name);
        let elements: usize = shape.iter().product();
        let value = |i: u32| match name.contains("norm") {
            true => 1.0,
            false => change((Philox::unit(philox.words([i, 0, 0, 0])[0]) - 0.5) * 0.6),
        };
        let values: Vec<f32> = (0..elements as u32).map(value).collect();
        tensors.insert(name, Tensor::from_vec(values, shape, &Device::Cpu).unwrap());
    }
    candle_core::safetensors::save(&tensors, dir.join("model.safetensors")).unwrap();
}

pub(crate) fn write_rows(path: &Path, rows: std::ops::Range<usize>) {
    let line = |i: usize| {
        let words = vec!["word"; i % 7 + 1].join(" ");
        json!({"prompt": format!("say {words} {i}: "), "completion": format!("{words} {}", i * i)})
            .to_string()
            + "\n"
    };
    fs::write(path, rows.map(line).collect::<String>()).unwrap();
}

/// Runs `work` on every rank of a group of `ranks`, each in a thread with a pool of `threads`.
pub(crate) fn on_ranks<T: Send>(ranks: usize, threads: usize, work: impl Fn(Group) -> T + Sync) -> Vec<T> {
    let listeners: Vec<_> = (0..ranks).map(|_| PeerListener::bind("127.0.0.1:0").unwrap()).collect();
    let peers: Vec<String> = listeners.iter().map(|l| l.local_addr().unwrap().to_string()).collect();
    std::thread::scope(|scope| {
        let start = |(rank, listener)| {
            let (peers, work) = (peers.clone(), &work);
            scope.spawn(move || {
                let spec = GroupSpec {
                    job: "test".into(),
                    generation: 1,
                    rank,
                    peers,
                    token: "secret".into(),
                    form_timeout: Duration::from_secs(120),
                    timeout: Duration::from_secs(120),
                };
                let group = Group::form(&spec, Some(&listener), CancelToken::new()).unwrap();
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                pool.install(|| work(group))
            })
        };
        let handles: Vec<_> = listeners.into_iter().enumerate().map(start).collect();
        handles.into_iter().map(|handle| handle.join().unwrap()).collect()
    })
}

/// Runs all remaining steps and returns the exported files by name.
pub(crate) fn finish(run: &mut Run) -> HashMap<String, Vec<u8>> {
    while run.step(|| false).unwrap().outcome != StepOutcome::Finished {}
    run.export().unwrap().into_iter().map(|artifact| (artifact.name, artifact.bytes)).collect()
}

/// Writes exported files to a new directory below `dir`.
pub(crate) fn write_result(dir: &Path, files: &HashMap<String, Vec<u8>>) -> PathBuf {
    let out = dir.join("out");
    fs::create_dir_all(&out).unwrap();
    for (name, bytes) in files {
        fs::write(out.join(name), bytes).unwrap();
    }
    out
}
