//! A corpus of users' mistakes. For each mistake `run` and `plan` print one clear error and create
//! nothing.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail the test")]

use std::fs::{self, OpenOptions};

use lora_e2e::{Finished, Fixture, loractl};
use serde_json::{Value, json};

/// A job with a mistake.
struct Case {
    /// The mistake, in words.
    name: &'static str,
    /// Makes the mistake in a valid job.
    break_job: fn(&Fixture),
    /// The location that the error names.
    at: At,
    /// Other words of the error: the field, the cause, and what would be right.
    expected: &'static [&'static str],
}

enum At {
    /// The line of the job file that contains this text.
    Job(&'static str),
    /// A path in the fixture, with the line number if the file has lines.
    File(&'static str),
}

const SETTINGS: &[Case] = &[
    Case {
        name: "an unknown key",
        break_job: |f| f.edit("job.yaml", "learning_rate:", "learning_rat:"),
        at: At::Job("learning_rat:"),
        expected: &["training.learning_rat:", "did you mean training.learning_rate?"],
    },
    Case {
        name: "an unknown section",
        break_job: |f| f.edit("job.yaml", "adapter:", "adaptor:"),
        at: At::Job("r: 4"),
        expected: &["adaptor", "did you mean adapter?"],
    },
    Case {
        name: "a key in the wrong section",
        break_job: |f| f.edit("job.yaml", "  r: 4\n", "  r: 4\n  max_length: 9\n"),
        at: At::Job("max_length: 9"),
        expected: &["adapter.max_length", "it belongs at data.max_length"],
    },
    Case {
        name: "a key of another trainer",
        break_job: |f| f.edit("job.yaml", "micro_batch_size:", "per_device_train_batch_size:"),
        at: At::Job("per_device_train_batch_size:"),
        expected: &["training.per_device_train_batch_size", "use training.micro_batch_size"],
    },
    Case {
        name: "a value of PEFT's init_lora_weights that is not supported",
        break_job: |f| f.edit("job.yaml", "  r: 4\n", "  r: 4\n  init_lora_weights: gaussian\n"),
        at: At::Job("init_lora_weights"),
        expected: &["adapter.init_lora_weights", "gaussian", "pissa_niter_N"],
    },
    Case {
        name: "LoftQ over a base that is not quantized",
        break_job: |f| f.edit("job.yaml", "  r: 4\n", "  r: 4\n  init_lora_weights: loftq\n"),
        at: At::Job("init_lora_weights"),
        expected: &["adapter.init_lora_weights: loftq", "model.quantization to nf4 or int8"],
    },
    Case {
        name: "a rank above the rank of a weight from which the adapter is initialized",
        break_job: |f| f.edit("job.yaml", "r: 4\n", "r: 200\n  init_lora_weights: pissa\n"),
        at: At::Job("r: 200"),
        expected: &["adapter.r: is 200", "has rank", "init_lora_weights: true"],
    },
    Case {
        name: "a value of the wrong type",
        break_job: |f| f.edit("job.yaml", "r: 4", "r: many"),
        at: At::Job("r: many"),
        expected: &["adapter.r"],
    },
    Case {
        name: "an unknown word",
        break_job: |f| f.append("job.yaml", "  lr_scheduler_type: cosin"),
        at: At::Job("cosin"),
        expected: &["training.lr_scheduler_type", "cosine", "constant_with_warmup"],
    },
    Case {
        name: "rank 0",
        break_job: |f| f.edit("job.yaml", "r: 4", "r: 0"),
        at: At::Job("r: 0"),
        expected: &["adapter.r", "at least 1"],
    },
    Case {
        name: "a learning rate that is not a number",
        break_job: |f| f.edit("job.yaml", "learning_rate: 5.0e-3", "learning_rate: .nan"),
        at: At::Job("learning_rate: .nan"),
        expected: &["training.learning_rate", "NaN", "finite number"],
    },
    Case {
        name: "a target module that the base does not have",
        break_job: |f| f.edit("job.yaml", "target_modules: all-linear", "target_modules: [q_proj, w_proj]"),
        at: At::Job("w_proj"),
        expected: &[
            "adapter.target_modules",
            "w_proj",
            "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj",
        ],
    },
    Case {
        name: "more workers than micro-batches",
        break_job: |f| f.append("job.yaml", "workers: {min: 7, max: 7}"),
        at: At::Job("workers:"),
        expected: &["workers.max", "7 workers", "6 micro-batches", "lower it to 6"],
    },
    Case {
        name: "invalid YAML",
        break_job: |f| f.edit("job.yaml", "model:\n", "model: {\n"),
        at: At::File("job.yaml:"),
        expected: &[],
    },
    Case {
        name: "no job file",
        break_job: |f| fs::remove_file(f.job()).unwrap(),
        at: At::File("job.yaml"),
        expected: &["No such file"],
    },
];

const BASES: &[Case] = &[
    Case {
        name: "no base directory",
        break_job: |f| f.edit("job.yaml", "base: base", "base: nowhere"),
        at: At::File("nowhere"),
        expected: &["model.base"],
    },
    Case {
        name: "an architecture that is not supported",
        break_job: |f| f.edit("base/config.json", "LlamaForCausalLM", "GPT2LMHeadModel"),
        at: At::File("base/config.json"),
        expected: &["architectures", "GPT2LMHeadModel", "supported: LlamaForCausalLM, MistralForCausalLM"],
    },
    Case {
        name: "a shard that is missing",
        break_job: |f| {
            let shard = "model-00001-of-00002.safetensors";
            fs::rename(f.path("base/model.safetensors"), f.path("base").join(shard)).unwrap();
            let other = "model-00002-of-00002.safetensors";
            let map = json!({"model.norm.weight": shard, "model.embed_tokens.weight": other});
            f.write("base/model.safetensors.index.json", &json!({"weight_map": map}).to_string());
        },
        at: At::File("base/model.safetensors.index.json"),
        expected: &["weight_map", "model-00002-of-00002.safetensors", "not in this directory"],
    },
    Case {
        name: "a truncated safetensors file",
        break_job: |f| {
            let file = OpenOptions::new().write(true).open(f.path("base/model.safetensors")).unwrap();
            file.set_len(file.metadata().unwrap().len() - 1).unwrap();
        },
        at: At::File("base/model.safetensors"),
        expected: &["is truncated", "bytes of"],
    },
    Case {
        name: "no weights",
        break_job: |f| fs::remove_file(f.path("base/model.safetensors")).unwrap(),
        at: At::File("base"),
        expected: &["neither model.safetensors nor model.safetensors.index.json"],
    },
    Case {
        name: "weights of another shape",
        break_job: |f| {
            let config = lora_e2e::json(&f.path("base/config.json"));
            let mlp = config["intermediate_size"].as_u64().unwrap();
            f.edit("base/config.json", &format!("\"intermediate_size\": {mlp}"), "\"intermediate_size\": 64");
        },
        at: At::File("base/model.safetensors"),
        expected: &["gate_proj", "config.json requires [64, "],
    },
    Case {
        name: "no tokenizer",
        break_job: |f| fs::remove_file(f.path("base/tokenizer.json")).unwrap(),
        at: At::File("base/tokenizer.json"),
        expected: &["No such file"],
    },
    Case {
        name: "an adapter of another rank to start from",
        break_job: |f| {
            f.edit("job.yaml", "max_steps: 12", "max_steps: 1");
            f.edit("job.yaml", "r: 4", "r: 8");
            f.finish("adapter", &[]);
            f.edit("job.yaml", "r: 8", "r: 4\n  init_from: adapter");
        },
        at: At::Job("init_from:"),
        expected: &["adapter.init_from", "another r", "adapter.r", "make them equal"],
    },
    Case {
        name: "no adapter to start from",
        break_job: |f| f.edit("job.yaml", "r: 4", "r: 4\n  init_from: nowhere"),
        at: At::Job("init_from:"),
        expected: &["adapter.init_from", "nowhere"],
    },
];

const DATA: &[Case] = &[
    Case {
        name: "no dataset",
        break_job: |f| f.edit("job.yaml", "train: train.jsonl", "train: nothing.jsonl"),
        at: At::Job("train:"),
        expected: &["data.train", "nothing.jsonl"],
    },
    Case {
        name: "no evaluation dataset",
        break_job: |f| f.edit("job.yaml", "eval: eval.jsonl", "eval: nothing.jsonl"),
        at: At::Job("eval:"),
        expected: &["data.eval", "nothing.jsonl"],
    },
    Case {
        name: "an empty dataset",
        break_job: |f| f.write("train.jsonl", "\n"),
        at: At::File("train.jsonl"),
        expected: &["has no rows"],
    },
    Case {
        name: "a dataset of an unknown kind",
        break_job: |f| {
            fs::rename(f.path("train.jsonl"), f.path("train.txt")).unwrap();
            f.edit("job.yaml", "train: train.jsonl", "train: train.txt");
        },
        at: At::File("train.txt"),
        expected: &[".jsonl", ".parquet"],
    },
    Case {
        name: "a line that is not valid JSON",
        break_job: |f| f.append("train.jsonl", r#"{"prompt": "a", "completion": "b"#),
        at: At::File("train.jsonl:58"),
        expected: &["invalid JSON"],
    },
    Case {
        name: "an invalid line in the evaluation rows",
        break_job: |f| f.append("eval.jsonl", "[1]x"),
        at: At::File("eval.jsonl:11"),
        expected: &["invalid JSON"],
    },
    Case {
        name: "a row of an unknown format",
        break_job: |f| f.append("train.jsonl", r#"{"question": "a", "answer": "b"}"#),
        at: At::File("train.jsonl:58"),
        expected: &["messages", "prompt", "text", "instruction"],
    },
    Case {
        name: "a row without target tokens",
        break_job: |f| f.append("train.jsonl", r#"{"messages": [{"role": "user", "content": "a"}]}"#),
        at: At::File("train.jsonl"),
        expected: &["line 58", "without target tokens", "assistant turn"],
    },
    Case {
        name: "rows that are too long",
        break_job: |f| {
            f.append("train.jsonl", &long_row());
            f.append("train.jsonl", &long_row());
        },
        at: At::File("train.jsonl"),
        expected: &["lines 58", "59", "tokens", "data.max_length 96", "data.long_rows", "truncate", "drop"],
    },
    Case {
        name: "no row left after rows that are too long were dropped",
        break_job: |f| {
            f.write("train.jsonl", &long_row());
            f.edit("job.yaml", "max_length: 96", "max_length: 96\n  long_rows: drop");
        },
        at: At::File("train.jsonl"),
        expected: &["no row is left", "data.max_length 96", "data.long_rows"],
    },
];

#[test]
fn bad_settings_get_one_clear_error() {
    check(SETTINGS);
}

#[test]
fn a_bad_base_gets_one_clear_error() {
    check(BASES);
}

#[test]
fn bad_data_gets_one_clear_error() {
    check(DATA);
}

#[test]
fn more_workers_than_micro_batches_are_refused() {
    let fixture = Fixture::default();
    let refused = Finished::run(&mut fixture.run("out", &["--workers", "7"])).expect_code(1);
    let error = refused.error().unwrap_or_default();
    for words in ["workers", "7 workers", "6 micro-batches", "lower it to 6"] {
        assert!(error.contains(words), "{words}: {}", refused.stderr);
    }
    assert!(!fixture.path("out").exists());
}

#[test]
fn long_rows_are_truncated_or_dropped_as_configured() {
    for (word, kept, truncated, dropped) in [("truncate", 58, 1, 0), ("drop", 57, 0, 1)] {
        let fixture = Fixture::default();
        fixture.append("train.jsonl", &long_row());
        fixture.edit("job.yaml", "max_length: 96", &format!("max_length: 96\n  long_rows: {word}"));
        fixture.edit("job.yaml", "max_steps: 12", "max_steps: 5");
        let plan =
            Finished::run(loractl().arg("plan").arg(fixture.job()).args(["-o", "json"])).expect_code(0);
        let plan: Value = serde_json::from_str(&plan.stdout).unwrap();
        let report = &plan["train"]["report"];
        for (key, rows) in
            [("rows_read", 58), ("rows_kept", kept), ("truncated", truncated), ("dropped", dropped)]
        {
            assert_eq!(report[key], json!(rows), "{word}: {key}");
        }
        fixture.finish("out", &[]);
        assert_eq!(
            lora_e2e::metrics(&fixture.path("out"))[4]["num_tokens"],
            plan["tokens"],
            "{word}: the tokens of an epoch"
        );
    }
}

#[test]
fn usage_errors_have_their_own_exit_code() {
    let fixture = Fixture::default();
    let (job, out) = (fixture.job(), fixture.path("out"));
    let (job, out) = (job.to_str().unwrap(), out.to_str().unwrap());
    for arguments in [
        &["run", job][..],
        &["run", "--out", out],
        &["run", job, "--out", out, "--workers", "0"],
        &["run", job, "--out", out, "--threads", "two"],
        &["run", job, "--out", out, "--output", "xml"],
        &["run", job, "--out", out, "--no-such-flag"],
        &["plan"],
        &["verify"],
        &["generate", "--prompt", "a"],
        &["no-such-command"],
    ] {
        let refused = Finished::run(loractl().args(arguments)).expect_code(2);
        assert!(refused.error().is_some() && refused.stdout.is_empty(), "{arguments:?}: {}", refused.stderr);
    }
    assert!(!fixture.path("out").exists());
}

/// A row of far more than 96 tokens, most of them targets.
fn long_row() -> String {
    json!({"prompt": "count:", "completion": "1 2 3 4 5 6 7 8 9 0 ".repeat(10)}).to_string()
}

/// Checks all cases before it fails.
fn check(cases: &[Case]) {
    let wrong: Vec<String> = cases.iter().flat_map(mismatches).collect();
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

/// The differences between the expected and the actual errors of a case.
fn mismatches(case: &Case) -> Vec<String> {
    let fixture = Fixture::default();
    (case.break_job)(&fixture);
    let location = match case.at {
        At::File(name) => fixture.path(name).display().to_string(),
        At::Job(text) => {
            let job = fs::read_to_string(fixture.job()).unwrap();
            let line = job.lines().position(|line| line.contains(text)).unwrap() + 1;
            format!("{}:{line}: ", fixture.job().display())
        }
    };
    let run = Finished::run(&mut fixture.run("out", &[]));
    let plan = Finished::run(loractl().arg("plan").arg(fixture.job()));
    let mut wrong = Vec::new();
    for (command, finished) in [("run", &run), ("plan", &plan)] {
        let stderr = &finished.stderr;
        let mut complain = |what: &str| wrong.push(format!("{} ({command}): {what}:\n{stderr}", case.name));
        if finished.code != Some(1) {
            complain(&format!("exit code {:?}", finished.code));
        }
        if stderr.contains("panicked") {
            complain("it panicked");
        }
        let Some(error) = finished.error() else {
            complain("not exactly one error");
            continue;
        };
        for words in case.expected.iter().copied().chain([location.as_str()]) {
            if !error.contains(words) {
                complain(&format!("the error does not contain {words:?}"));
            }
        }
    }
    if run.error() != plan.error() {
        wrong.push(format!("{}: run and plan differ:\n{}{}", case.name, run.stderr, plan.stderr));
    }
    if fixture.path("out").exists() {
        wrong.push(format!("{}: the output directory was created", case.name));
    }
    wrong
}
