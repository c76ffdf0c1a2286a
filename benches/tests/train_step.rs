//! The benchmark on the CPU with a small model.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail the test")]

use std::process::{Command, Output};

use serde_json::{Value, json};
use tempfile::TempDir;

/// Runs the program with micro-batches of 3 x 12 tokens: one step that is not measured, and two
/// that are.
fn bench(flags: &[&str]) -> Output {
    program(&[&["--sequence", "12", "--micro-batch", "3"], flags].concat()).output().unwrap()
}

/// Returns the program with a small model. Dropping the result removes the directory of the model.
fn program(flags: &[&str]) -> Program {
    let config = json!({
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 100,
    });
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("config.json");
    std::fs::write(&path, config.to_string()).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_train_step"));
    command.args(["--warmup", "1", "--steps", "2", "--model"]).arg(path).args(flags);
    Program { command, _dir: dir }
}

struct Program {
    command: Command,
    _dir: TempDir,
}

impl Program {
    fn output(&mut self) -> std::io::Result<Output> {
        self.command.output()
    }
}

/// Parses the lines of JSON that a run printed.
fn lines(output: &Output) -> Vec<Value> {
    let text = String::from_utf8_lossy(&output.stdout);
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn a_run_on_the_cpu_reports_all_numbers() {
    for (dtype, checkpointing) in [("bf16", "none"), ("f32", "block")] {
        let flags =
            ["--dtype", dtype, "--activation-checkpointing", checkpointing, "--peak-tflops", "0.5", "--json"];
        let output = bench(&flags);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let result: Value = serde_json::from_slice(&output.stdout).unwrap();
        let number = |field: &str| result[field].as_f64().unwrap();
        // Rank 16 on two matrices of 32 x 32, two of 16 x 32 and three of 32 x 48, in each of two
        // blocks.
        assert_eq!(number("trainable_parameters"), 2.0 * 16.0 * (2.0 * 64.0 + 2.0 * 48.0 + 3.0 * 80.0));
        let frozen = 2.0 * (2.0 * 32.0 * 32.0 + 2.0 * 32.0 * 16.0 + 3.0 * 32.0 * 48.0) + 100.0 * 32.0;
        let attention = 6.0 * 2.0 * 32.0 * 13.0;
        let flops = 4.0 * frozen + 6.0 * number("trainable_parameters") + attention;
        assert_eq!(number("flops_per_token"), flops);
        let mfu = number("tokens_per_s") * flops / 0.5e12;
        assert!((number("mfu") - mfu).abs() < 1e-9 * mfu, "{result}");
        assert_eq!(result["step_seconds"].as_array().unwrap().len(), 2);
        // Random tokens cannot be learned, so the loss is that of a uniform distribution.
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
fn without_json_it_prints_text() {
    let output = bench(&[]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(
        output.status.success() && text.contains("tokens/s ") && text.contains("3 x 12 tokens"),
        "{text}"
    );
    assert!(!text.contains("MFU"), "the peak of a CPU is unknown: {text}");
}

#[test]
fn each_case_has_a_line_equal_to_a_single_run() {
    for quantization in ["none", "nf4", "nf4-double", "int8"] {
        let flags = ["--quantization", quantization, "--json"];
        let output = program(&[&["--cases", "1x7,3x12"], &flags[..]].concat()).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let results = lines(&output);
        let shapes: Vec<_> =
            results.iter().map(|result| (&result["micro_batch"], &result["sequence"])).collect();
        assert_eq!(shapes, [(&json!(1), &json!(7)), (&json!(3), &json!(12))]);
        let alone = lines(&bench(&flags)).remove(0);
        assert_eq!(
            (&results[1]["loss"], &results[1]["quantization"]),
            (&alone["loss"], &json!(quantization))
        );
        let loss = alone["loss"].as_f64().unwrap();
        assert!((loss - 100_f64.ln()).abs() < 0.5, "{quantization}: {loss}");
        assert!(results.iter().all(|result| result["peak_memory_bytes"].as_f64().unwrap() > 1e6));
    }
}

#[test]
fn a_cpu_profile_lists_operations() {
    let output = program(&["--cases", "2x5,2x9", "--profile", "--json"]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    for result in lines(&output) {
        let rows = result["profile"].as_array().unwrap();
        let row = |name: &str| rows.iter().find(|row| row["name"] == name).unwrap();
        // The model has two blocks.
        assert_eq!(row("attention forward")["calls"], json!(2));
        assert_eq!(row("linear forward")["calls"], json!(14));
        let percent: f64 = rows.iter().map(|row| row["percent"].as_f64().unwrap()).sum();
        assert!((percent - 100.0).abs() < 1e-6, "{percent}");
    }
    let text = String::from_utf8(bench(&["--profile"]).stdout).unwrap();
    assert!(text.contains("ms per step") && text.contains("attention backward"), "{text}");
}

/// Tests on the simulated GPU.
#[cfg(feature = "cuda")]
mod gpu {
    use super::*;

    #[test]
    fn a_gpu_profile_lists_kernels_and_products() {
        let flags =
            ["--device", "cuda:0", "--dtype", "bf16", "--profile", "--ceilings-scale", "128", "--json"];
        for quantization in ["none", "nf4"] {
            let flags = [&flags[..], &["--quantization", quantization, "--cases", "3x12"]].concat();
            let output = program(&flags).output().unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            let result = lines(&output).remove(0);
            let number = |field: &str| result[field].as_f64().unwrap();
            let rows = result["profile"].as_array().unwrap();
            let count = |begin: &str| -> f64 {
                let rows = rows.iter().filter(|row| row["name"].as_str().unwrap().starts_with(begin));
                rows.map(|row| row["count"].as_f64().unwrap()).sum()
            };
            // Forward, each of the two blocks has 7 products with frozen weights and 14 of LoRA.
            // Backward, each of the 7 layers has 3 for dA and dB, and 2 for the gradient of its
            // input, which q, k and v of the lower block do not need. The head has 2.
            assert_eq!(count("product "), f64::from(2 * (7 + 14) + 2 * 3 * 7 + 2 * (7 + 4) + 2));
            assert_eq!(count("attention_forward"), 2.0);
            assert_eq!(count("adamw_step_f32"), 1.0);
            assert_eq!(count("quant_") > 0.0, quantization == "nf4");
            let sum: f64 = rows.iter().map(|row| row["milliseconds"].as_f64().unwrap()).sum();
            assert!((sum - number("kernel_milliseconds")).abs() < 1e-9 * sum);
            let classes = result["profile_classes"].as_array().unwrap();
            let class_sum: f64 = classes.iter().map(|class| class["milliseconds"].as_f64().unwrap()).sum();
            assert!((sum - class_sum).abs() < 1e-9 * sum);
            assert!(number("profiled_gap_milliseconds") > 0.0, "{result}");
            assert!(result["ceilings"]["gb_s"].as_f64().unwrap() > 0.0);
        }
    }

    #[test]
    fn an_out_of_memory_case_is_reported_and_the_next_one_runs() {
        let cases = ["--device", "cuda:0", "--dtype", "bf16", "--json", "--cases"];
        let mut failing = program(&[&cases[..], &["4000x512,2x8"]].concat());
        let output = failing.command.env("LORA_SIM_MEMORY", "96M").output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let results = lines(&output);
        assert_eq!(results.len(), 2);
        assert_eq!((&results[0]["micro_batch"], &results[0]["sequence"]), (&json!(4000), &json!(512)));
        let error = results[0]["error"].as_str().unwrap();
        assert!(error.contains("out of memory") && !error.contains('\n'), "{error}");
        let number = |field: &str| results[1][field].as_f64().unwrap();
        assert!(results[1]["error"].is_null() && number("tokens_per_s") > 0.0);
        // The peaks of the first case do not count for the second one.
        assert!(number("peak_memory_bytes") <= number("peak_reserved_memory_bytes"), "{}", results[1]);
        assert!(number("peak_reserved_memory_bytes") < 48e6, "{}", results[1]);

        let mut alone = program(&[&cases[..], &["4000x512"]].concat());
        let output = alone.command.env("LORA_SIM_MEMORY", "96M").output().unwrap();
        assert!(!output.status.success());
        assert!(String::from_utf8_lossy(&output.stderr).contains("memory"));
    }
}
