//! The benchmark on the CPU, with a model small enough for it.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail the test")]

use std::process::{Command, Output};

use serde_json::{Value, json};

fn bench(flags: &[&str]) -> Output {
    let config = json!({
        "architectures": ["Qwen2ForCausalLM"], "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100,
    });
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("config.json");
    std::fs::write(&path, config.to_string()).unwrap();
    let shape = ["--sequence", "12", "--micro-batch", "3", "--warmup", "1", "--steps", "2"];
    let mut program = Command::new(env!("CARGO_BIN_EXE_train_step"));
    program.args(["--model"]).arg(path).args(shape).args(flags);
    program.output().unwrap()
}

#[test]
fn a_run_on_the_cpu_gives_every_number() {
    for (dtype, checkpointing) in [("bf16", "none"), ("f32", "block")] {
        let flags =
            ["--dtype", dtype, "--activation-checkpointing", checkpointing, "--peak-tflops", "0.5", "--json"];
        let output = bench(&flags);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let result: Value = serde_json::from_slice(&output.stdout).unwrap();
        let number = |field: &str| result[field].as_f64().unwrap();
        // Rank 16 on matrices of 32 x 32, 16 x 32 twice, 32 x 32 and 32 x 48 three times, in two blocks.
        assert_eq!(number("trainable_parameters"), 2.0 * 16.0 * (2.0 * 64.0 + 2.0 * 48.0 + 3.0 * 80.0));
        let frozen = 2.0 * (2.0 * 32.0 * 32.0 + 2.0 * 32.0 * 16.0 + 3.0 * 32.0 * 48.0) + 100.0 * 32.0;
        let attention = 6.0 * 2.0 * 32.0 * 13.0;
        let flops = 4.0 * frozen + 6.0 * number("trainable_parameters") + attention;
        assert_eq!(number("flops_per_token"), flops);
        let mfu = number("tokens_per_s") * flops / 0.5e12;
        assert!((number("mfu") - mfu).abs() < 1e-9 * mfu, "{result}");
        assert_eq!(result["step_seconds"].as_array().unwrap().len(), 2);
        // Of random tokens nothing can be learned.
        assert!((number("loss") - 100_f64.ln()).abs() < 0.5, "{result}");
        assert!(number("peak_memory_bytes") > 1e6 && number("cpu_seconds_per_step") >= 0.0, "{result}");
        assert_eq!((&result["sequence"], &result["micro_batch"]), (&json!(12), &json!(3)));
        assert_eq!(
            (&result["dtype"], &result["activation_checkpointing"]),
            (&json!(dtype), &json!(checkpointing))
        );
    }
}

#[test]
fn without_json_it_prints_words() {
    let output = bench(&[]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(
        output.status.success() && text.contains("tokens/s ") && text.contains("3 x 12 tokens"),
        "{text}"
    );
    assert!(!text.contains("MFU"), "the peak of a CPU is not known: {text}");
}
