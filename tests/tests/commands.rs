//! The commands `plan`, `generate` and `verify`.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail the test")]

use std::fs;

use lora_e2e::{Finished, Fixture, json, loractl};
use serde_json::{Value, json};

const PROMPT: &str = "the 3rd of March 2021";

#[test]
fn plan_reports_the_job_and_creates_nothing() {
    let fixture = Fixture::default();
    let before: Vec<_> = fs::read_dir(fixture.path("")).unwrap().map(|entry| entry.unwrap().path()).collect();
    let table = Finished::run(loractl().arg("plan").arg(fixture.job())).expect_code(0).stdout;
    let plan = Finished::run(loractl().arg("plan").arg(fixture.job()).args(["-o", "json"])).expect_code(0);
    let plan: Value = serde_json::from_str(&plan.stdout).unwrap();
    let after: Vec<_> = fs::read_dir(fixture.path("")).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert_eq!(after, before);

    let config = json(&fixture.path("base/config.json"));
    let count = |key: &str| config[key].as_u64().unwrap();
    let (hidden, mlp, layers) =
        (count("hidden_size"), count("intermediate_size"), count("num_hidden_layers"));
    let (q, kv) =
        (count("num_attention_heads") * count("head_dim"), count("num_key_value_heads") * count("head_dim"));
    let widths = 2 * (hidden + q) + 2 * (hidden + kv) + 3 * (hidden + mlp);
    let trainable = 4 * layers * widths;
    for (key, value) in [
        ("name", json!("small")),
        ("trainable_parameters", json!(trainable)),
        ("adapter_bytes", json!(4 * trainable)),
        ("total_steps", json!(12)),
        ("steps_per_epoch", json!(5)),
        ("warmup_steps", json!(1)),
        ("micro_batches", json!(6)),
        ("problems", json!([])),
    ] {
        assert_eq!(plan[key], value, "{key}");
    }
    assert_eq!(
        (&plan["train"]["report"]["rows_kept"], &plan["eval"]["report"]["rows_kept"]),
        (&json!(57), &json!(10))
    );
    assert_eq!(plan["modules"].as_object().unwrap().len(), 7);

    // A run reports the same numbers.
    let run = Finished::run(&mut fixture.run("out", &["-o", "json"])).expect_code(0);
    let summary: Value = serde_json::from_str(&run.stdout).unwrap();
    assert_eq!(summary["trainable_parameters"], plan["trainable_parameters"]);
    let base = plan["base_parameters"].as_u64().unwrap();
    assert_eq!(summary["total_parameters"].as_u64().unwrap(), base + trainable);
    assert_eq!(lora_e2e::metrics(&fixture.path("out"))[11]["num_tokens"], plan["tokens"]);

    // In the first row the answer and the token that ends it are trained, and the question is not.
    let row = fs::read_to_string(fixture.path("train.jsonl")).unwrap();
    let row: Value = serde_json::from_str(row.lines().next().unwrap()).unwrap();
    let turn = |i: usize| row["messages"][i]["content"].as_str().unwrap();
    let sample = plan["sample"].as_str().unwrap();
    let (before, rest) = sample.split_once('⟦').unwrap();
    let (trained, _) = rest.split_once('⟧').unwrap();
    assert!(before.contains(turn(0)) && !before.contains(turn(1)), "{sample}");
    assert!(trained.starts_with(turn(1)) && !trained.contains(turn(0)), "{sample}");

    assert!(table.contains(sample), "{table}");
    for (name, value) in [
        ("trained parameters", grouped(trainable)),
        ("training rows", "57 of 57".into()),
        ("steps", "12 (5 an epoch".into()),
        ("tokens", grouped(plan["tokens"].as_u64().unwrap())),
    ] {
        let row = table.lines().find(|line| line.starts_with(name)).unwrap_or_default();
        assert!(row.contains(&value), "{name} {value}: {table}");
    }
}

#[test]
fn greedy_text_is_repeatable_and_sampled_text_follows_its_seed() {
    let fixture = Fixture::default();
    let generate = |arguments: &[&str]| generate(&fixture, PROMPT, arguments);
    assert_eq!(generate(&[]), generate(&[]));
    let sampled = |seed: &str| generate(&["--temperature", "2", "--seed", seed]);
    assert_eq!(sampled("1"), sampled("1"));
    assert_ne!(sampled("1"), sampled("2"));
    assert_eq!(
        generate(&["--temperature", "2", "--top-k", "1"]),
        generate(&[]),
        "only the most probable token is left"
    );
}

#[test]
fn chat_puts_the_prompt_into_the_template() {
    let fixture = Fixture::default();
    let rendered = |system: &str| format!("<|begin|>{system}<|user|>{PROMPT}<|end|><|assistant|>");
    let chat = generate(&fixture, PROMPT, &["--chat"]);
    assert_eq!(chat, generate(&fixture, &rendered(""), &[]));
    assert_ne!(chat, generate(&fixture, PROMPT, &[]));
    let system = generate(&fixture, PROMPT, &["--chat", "--system", "Be brief."]);
    assert_eq!(system, generate(&fixture, &rendered("<|system|>Be brief.<|end|>"), &[]));
}

#[test]
fn generate_rejects_invalid_arguments() {
    let fixture = Fixture::default();
    for (arguments, code, expected) in [
        (&["--temperature", "0"][..], 1, "--temperature"),
        (&["--temperature", "NaN"], 1, "--temperature"),
        (&["--temperature", "1", "--top-p", "2"], 1, "--top-p"),
        (&["--seed", "1"], 2, "--temperature"),
        (&["--adapter", "nowhere"], 1, "nowhere"),
    ] {
        let mut command = loractl();
        command
            .arg("generate")
            .arg("--base")
            .arg(fixture.path("base"))
            .args(["--prompt", PROMPT])
            .args(arguments);
        let refused = Finished::run(&mut command).expect_code(code);
        assert!(refused.stdout.is_empty() && refused.error().is_some(), "{refused:?}");
        assert!(refused.stderr.contains(expected), "{arguments:?}: {}", refused.stderr);
    }
}

#[test]
fn an_adapter_changes_the_text_and_verifies_until_modified() {
    let fixture = Fixture::default();
    fixture.edit("job.yaml", "5.0e-3", "2.0e-2");
    fixture.finish("out", &["--workers", "2"]);
    let out = fixture.path("out");
    let adapted = generate(&fixture, PROMPT, &["--chat", "--adapter", out.to_str().unwrap()]);
    assert_ne!(adapted, generate(&fixture, PROMPT, &["--chat"]));

    let verify = || Finished::run(loractl().arg("verify").arg(&out).args(["-o", "json"]));
    let verified: Value = serde_json::from_str(&verify().expect_code(0).stdout).unwrap();
    assert_eq!((&verified["replayed_steps"], &verified["steps"]), (&json!(3), &json!(12)));
    assert_eq!(verified["adapter_sha256"], json(&out.join("receipt.json"))["adapter_sha256"]);
    let table = Finished::run(loractl().arg("verify").arg(&out)).expect_code(0).stdout;
    assert!(table.contains("3 of 12"), "{table}");

    for name in ["adapter_model.safetensors", "adapter_config.json", "tokenizer.json"] {
        let whole = fs::read(out.join(name)).unwrap();
        let mut changed = whole.clone();
        *changed.last_mut().unwrap() ^= 1;
        fs::write(out.join(name), changed).unwrap();
        let refused = verify().expect_code(1);
        assert!(refused.error().unwrap_or_default().contains(name), "{}", refused.stderr);
        fs::write(out.join(name), whole).unwrap();
    }

    let mut receipt = json(&out.join("receipt.json"));
    let loss = receipt["steps"][1]["loss"].as_f64().unwrap();
    receipt["steps"][1]["loss"] = json!(loss.next_up());
    fs::write(out.join("receipt.json"), receipt.to_string()).unwrap();
    let refused = verify().expect_code(1);
    assert!(refused.error().unwrap_or_default().contains("step 2 "), "{}", refused.stderr);

    receipt["steps"][1]["loss"] = json!(loss);
    fs::write(out.join("receipt.json"), receipt.to_string()).unwrap();
    verify().expect_code(0);
    fixture.append("train.jsonl", r#"{"prompt": "a", "completion": "b"}"#);
    let refused = verify().expect_code(1);
    assert!(refused.error().unwrap_or_default().contains("data.train"), "{}", refused.stderr);
}

/// The text that `loractl generate` writes for `prompt`, at most 16 tokens.
fn generate(fixture: &Fixture, prompt: &str, arguments: &[&str]) -> String {
    let mut command = loractl();
    command.arg("generate").arg("--base").arg(fixture.path("base"));
    command.args(["--prompt", prompt, "--max-new-tokens", "16"]).args(arguments);
    Finished::run(&mut command).expect_code(0).stdout
}

/// A number with its digits in groups of three.
fn grouped(n: u64) -> String {
    let digits = n.to_string();
    let groups: Vec<&str> =
        digits.as_bytes().rchunks(3).rev().map(|g| std::str::from_utf8(g).unwrap()).collect();
    groups.join(",")
}
