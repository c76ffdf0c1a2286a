//! `loractl run`: its files, its output and its errors.

use std::fs;

use lora_e2e::{
    Finished, Fixture, Running, Signal, json, json_lines, loractl, metrics, sha256, snapshot, wait_until,
};
use serde_json::{Value, json};

#[test]
fn a_result_has_the_documented_files() {
    let fixture = Fixture::default();
    let outcome = fixture.finish("out", &["--workers", "2"]);
    let out = fixture.path("out");

    let mut names: Vec<String> =
        fs::read_dir(&out).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    let expected = [
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "job.yaml",
        "metrics.jsonl",
        "receipt.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ];
    assert_eq!(names, expected);
    for name in ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"] {
        assert_eq!(sha256(&out.join(name)), sha256(&fixture.path("base").join(name)), "{name}");
    }

    let config = json(&out.join("adapter_config.json"));
    let modules = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"];
    for (key, value) in [
        ("peft_type", json!("LORA")),
        ("task_type", json!("CAUSAL_LM")),
        ("base_model_name_or_path", json!(fixture.path("base"))),
        ("r", json!(4)),
        ("lora_dropout", json!(0.1)),
        ("bias", json!("none")),
        ("use_rslora", json!(false)),
        ("target_modules", json!(modules)),
    ] {
        assert_eq!(config[key], value, "{key}");
    }
    assert_eq!(config["lora_alpha"].as_f64(), Some(8.0));

    let rows = json_lines(&outcome.metrics);
    assert_eq!(rows.len(), 12);
    for (index, row) in rows.iter().enumerate() {
        let step = index as u64 + 1;
        assert_eq!(row["step"], json!(step));
        for key in ["loss", "grad_norm", "learning_rate", "epoch", "num_tokens"] {
            assert!(row[key].is_number(), "{key} in {row}");
        }
        assert_eq!(row["epoch"].as_f64().unwrap(), step as f64 / 5.0);
        assert_eq!(row["eval_loss"].is_number(), step.is_multiple_of(4), "{row}");
    }

    let receipt = json(&out.join("receipt.json"));
    assert_eq!(receipt["adapter_sha256"], json!(outcome.adapter_sha256));
    assert_eq!(receipt["train_sha256"], json!(sha256(&fixture.path("train.jsonl"))));
    assert_eq!(receipt["eval_sha256"], json!(sha256(&fixture.path("eval.jsonl"))));
    let losses = |rows: &[Value]| rows.iter().map(|row| row["loss"].clone()).collect::<Vec<_>>();
    assert_eq!(losses(receipt["steps"].as_array().unwrap()), losses(&rows));
}

#[test]
fn the_resolved_job_reproduces_the_result() {
    let fixture = Fixture::default();
    let first = fixture.finish("first", &[]);
    let mut again = loractl();
    again.arg("run").arg(fixture.path("first/job.yaml")).arg("--out").arg(fixture.path("again"));
    Finished::run(&mut again).expect_code(0);
    assert_eq!(lora_e2e::RunOutcome::read(&fixture.path("again")), first);
}

#[test]
fn the_summary_is_a_table_or_json_on_stdout() {
    let fixture = Fixture::default();
    let table = Finished::run(&mut fixture.run("table", &["--workers", "2"])).expect_code(0);
    for (name, value) in [("state", "succeeded"), ("steps", "12 of 12"), ("workers", "2")] {
        let row = table.stdout.lines().find(|line| line.starts_with(name)).unwrap_or_default();
        assert!(row.ends_with(value), "{name}: {}", table.stdout);
    }
    assert!(table.stdout.contains(fixture.path("table").to_str().unwrap()));

    let summary = Finished::run(&mut fixture.run("json", &["--workers", "2", "-o", "json"])).expect_code(0);
    let summary: Value = serde_json::from_str(&summary.stdout).unwrap();
    let rows = metrics(&fixture.path("json"));
    for (key, value) in [
        ("state", json!("succeeded")),
        ("failure", Value::Null),
        ("steps", json!(12)),
        ("total_steps", json!(12)),
        ("workers", json!(2)),
        ("loss", rows.last().unwrap()["loss"].clone()),
        ("eval_loss", rows.last().unwrap()["eval_loss"].clone()),
        ("output_dir", json!(fixture.path("json"))),
        ("adapter_bytes", json!(fixture.path("json/adapter_model.safetensors").metadata().unwrap().len())),
    ] {
        assert_eq!(summary[key], value, "{key}");
    }
    for key in
        ["trainable_parameters", "total_parameters", "all_reduced_bytes", "seconds", "tokens_per_second"]
    {
        assert!(summary[key].as_f64().unwrap() > 0.0, "{key}: {}", summary[key]);
    }
}

#[test]
fn a_killed_worker_is_restarted_and_no_step_is_lost() {
    let fixture = Fixture::with_short_steps();
    let expected = fixture.finish("expected", &["--threads", "1"]);
    let out = fixture.path("out");
    let mut running = Running::start(&mut fixture.run("out", &["--workers", "2", "--threads", "1"]));
    wait_until("some steps", &mut running, |_| (metrics(&out).len() >= 5).then_some(()));
    let workers = running.children();
    let victim = workers.iter().find(|worker| worker.arguments.iter().any(|a| a == "worker-1")).unwrap();
    victim.signal(Signal::KILL);
    let finished = running.wait().expect_code(0);
    assert!(finished.stderr.contains("worker-1 ended with signal: 9"), "{}", finished.stderr);
    assert!(finished.stderr.contains("starting it again"), "{}", finished.stderr);
    for worker in workers {
        assert!(worker.wait(), "an orphan: {:?}", worker.arguments);
    }
    assert_eq!(lora_e2e::RunOutcome::read(&out), expected);
    assert!(!out.join(".run").exists());
}

#[test]
fn an_unfinished_run_can_only_be_resumed_unchanged() {
    let fixture = Fixture::default();
    let expected = fixture.finish("expected", &["--threads", "1"]);
    let out = fixture.path("out");
    let mut running = Running::start(&mut fixture.run("out", &["--workers", "2", "--threads", "1"]));
    wait_until("a step", &mut running, |_| (!metrics(&out).is_empty()).then_some(()));
    let refused = Finished::run(&mut fixture.run("out", &["--resume"])).expect_code(1);
    assert!(refused.error().unwrap_or_default().contains("in use by another run"), "{}", refused.stderr);
    running.process.signal(Signal::INT);
    running.wait().expect_code(4);

    // The refused command may change the files of the database, so only the metrics are compared.
    let before = fs::read(out.join("metrics.jsonl")).unwrap();
    let refused = Finished::run(&mut fixture.run("out", &[])).expect_code(1);
    let error = refused.error().unwrap_or_default();
    assert!(error.contains("unfinished run") && error.contains("--resume"), "{}", refused.stderr);
    fixture.edit("job.yaml", "5.0e-3", "6.0e-3");
    let refused = Finished::run(&mut fixture.run("out", &["--resume"])).expect_code(1);
    assert!(refused.error().unwrap_or_default().contains("training.learning_rate"), "{}", refused.stderr);
    fixture.edit("job.yaml", "6.0e-3", "5.0e-3");
    let rows = fs::read_to_string(fixture.path("train.jsonl")).unwrap();
    fixture.append("train.jsonl", r#"{"prompt": "a", "completion": "b"}"#);
    let refused = Finished::run(&mut fixture.run("out", &["--resume"])).expect_code(1);
    assert!(refused.error().unwrap_or_default().contains("data.train"), "{}", refused.stderr);
    fixture.write("train.jsonl", &rows);
    assert_eq!(fs::read(out.join("metrics.jsonl")).unwrap(), before);

    assert_eq!(fixture.finish("out", &["--resume", "--threads", "1"]), expected);
    assert!(!out.join(".run").exists());
}

#[test]
fn a_finished_result_is_refused_and_untouched() {
    let fixture = Fixture::default();
    fixture.edit("job.yaml", "max_steps: 12", "max_steps: 1");
    fixture.finish("out", &[]);
    let before = snapshot(&fixture.path("out"));
    for arguments in [&[][..], &["--resume"]] {
        let refused = Finished::run(&mut fixture.run("out", arguments)).expect_code(1);
        let error = refused.error().unwrap_or_default();
        let out = fixture.path("out");
        assert!(
            error.contains("finished result") && error.contains(out.to_str().unwrap()),
            "{}",
            refused.stderr
        );
        assert_eq!(snapshot(&out), before);
    }
}

#[test]
fn resume_in_a_new_directory_fails() {
    let fixture = Fixture::default();
    let refused = Finished::run(&mut fixture.run("out", &["--resume"])).expect_code(1);
    assert!(refused.error().unwrap_or_default().contains("no unfinished run"), "{}", refused.stderr);
    assert!(!fixture.path("out").exists());
}
