//! Jobs over a base that is quantized while it is read, and the memory that `plan` reports.

use lora_e2e::{Finished, Fixture, json, loractl};
use serde_json::{Value, json};

fn quantize(fixture: &Fixture, settings: &str) {
    fixture.edit("job.yaml", "  base: base\n", &format!("  base: base\n{settings}"));
}

#[test]
fn a_quantized_base_gives_the_same_files_on_every_number_of_workers() {
    let dense = Fixture::default().finish("out", &["--threads", "1"]);
    let mut adapters = vec![dense.adapter_sha256];
    for settings in [
        "  quantization: nf4\n",
        "  quantization: nf4\n  bnb_4bit_use_double_quant: true\n",
        "  quantization: int8\n",
    ] {
        let fixture = Fixture::default();
        quantize(&fixture, settings);
        fixture.edit(
            "job.yaml",
            "max_steps: 12",
            "max_steps: 6\n  activation_checkpointing: block_save_attention",
        );
        let one = fixture.finish("one", &["--workers", "1", "--threads", "1"]);
        assert_eq!(fixture.finish("three", &["--workers", "3", "--threads", "1"]), one, "{settings}");
        assert!(!adapters.contains(&one.adapter_sha256), "{settings} changes nothing");
        adapters.push(one.adapter_sha256);
        let verified = Finished::run(loractl().arg("verify").arg(fixture.path("one"))).expect_code(0);
        assert!(verified.stdout.contains("same bits"), "{}", verified.stdout);
    }
}

#[test]
fn generate_uses_the_quantization_of_the_training() {
    let fixture = Fixture::default();
    quantize(&fixture, "  quantization: nf4\n");
    fixture.finish("out", &[]);
    let generate = |adapter: &str| {
        let mut command = loractl();
        command
            .arg("generate")
            .arg("--base")
            .arg(fixture.path("base"))
            .arg("--adapter")
            .arg(fixture.path(adapter));
        Finished::run(command.args(["--chat", "--prompt", "May 1, 2020", "--max-new-tokens", "8"]))
    };
    generate("out").expect_code(0);
    // Only the receipt contains the quantization.
    let receipt = json(&fixture.path("out").join("receipt.json"));
    assert_eq!(receipt["job"]["model"]["quantization"], json!("nf4"));
    fixture.write("out/receipt.json", "{");
    let broken = generate("out").expect_code(1);
    assert!(broken.error().unwrap().contains("receipt.json"), "{}", broken.stderr);
}

#[test]
fn plan_reports_memory_and_smaller_settings() {
    let fixture = Fixture::default();
    let plan = |arguments: &[&str]| Finished::run(loractl().arg("plan").arg(fixture.job()).args(arguments));
    let parts = |finished: &Finished| -> Value {
        serde_json::from_str::<Value>(&finished.stdout).unwrap()["memory"]["gpu"].clone()
    };
    let whole = plan(&["-o", "json"]).expect_code(0);
    let memory = parts(&whole);
    let sum: u64 = ["base", "adapter", "moments", "gradients", "activations", "workspace"]
        .iter()
        .map(|part| memory[part].as_u64().unwrap())
        .sum();
    assert_eq!(memory["peak"], json!(sum));

    let enough = format!("{}KiB", sum / 1024 + 1);
    plan(&["--gpu-memory", &enough]).expect_code(0);
    let less = format!("{}KiB", sum / 1024 - 500);
    let refused = plan(&["--gpu-memory", &less]).expect_code(1);
    let error = refused.error().unwrap();
    for words in ["of a GPU's memory, more than", "it would fit with training.", "micro_batch_size: 1"] {
        assert!(error.contains(words), "{words}: {error}");
    }
    // The suggested setting fits.
    fixture.edit("job.yaml", "micro_batch_size: 2", "micro_batch_size: 1");
    plan(&["--gpu-memory", &less]).expect_code(0);
    let hopeless = plan(&["--cpu-memory", "1MiB"]).expect_code(1);
    assert!(hopeless.error().unwrap().contains("or quantization would make it fit"), "{}", hopeless.stderr);

    quantize(&fixture, "  quantization: nf4\n");
    let nf4 = parts(&plan(&["-o", "json"]).expect_code(0));
    assert!(nf4["base"].as_u64() < memory["base"].as_u64(), "{nf4} {memory}");
}

#[test]
fn plan_measures_the_throughput() {
    let fixture = Fixture::default();
    let plan = |arguments: &[&str]| Finished::run(loractl().arg("plan").arg(fixture.job()).args(arguments));
    let measured = plan(&["--measure", "-o", "json"]).expect_code(0);
    let measured = serde_json::from_str::<Value>(&measured.stdout).unwrap();
    let number = |key: &str| measured["rate"][key].as_f64().unwrap();
    let (rate, seconds) = (number("measured_tflops"), number("seconds"));
    assert!(rate > 0.0 && rate < 100.0, "{measured}");
    let flops = measured["flops"].as_f64().unwrap();
    assert!((seconds - flops / (rate * 1e12)).abs() < 1e-6 * seconds, "{measured}");
    let table = plan(&["--tflops", "0.5"]).expect_code(0).stdout;
    assert!(table.contains(" at 0.5 TFLOP/s"), "{table}");
    plan(&["--measure", "--tflops", "1"]).expect_code(2);

    quantize(&fixture, "  quantization: nf4\n");
    let table = plan(&["--measure"]).expect_code(0).stdout;
    assert!(
        table.contains(" on one such worker, at ") && table.contains(" TFLOP/s measured here"),
        "{table}"
    );

    // The modules of this job are not in the blocks that are timed.
    fixture.edit("job.yaml", "all-linear", "\".*layers.3.*q_proj\"");
    let table = plan(&["--measure"]).expect_code(0).stdout;
    assert!(table.contains("not measured: with only the first blocks, adapter.target_modules"), "{table}");
}

#[test]
fn merge_reports_the_difference_to_the_trained_model() {
    let fixture = Fixture::default();
    quantize(&fixture, "  quantization: nf4\n");
    fixture.finish("out", &[]);
    let merge = |out: &str, arguments: &[&str]| {
        let mut command = loractl();
        command
            .arg("merge")
            .arg("--base")
            .arg(fixture.path("base"))
            .arg("--adapter")
            .arg(fixture.path("out"));
        Finished::run(command.arg("--out").arg(fixture.path(out)).args(["-o", "json"]).args(arguments))
    };
    let outcome =
        |finished: Finished| serde_json::from_str::<Value>(&finished.expect_code(0).stdout).unwrap();
    let merged = outcome(merge("merged", &["--dtype", "f32"]));
    assert_eq!(merged["written"], json!("dequantized"));
    let number = |onto: usize, key: &str| merged["differences"][onto][key].as_f64().unwrap();
    // In f32 the merged model equals the dequantized weights that were trained on. It differs from
    // the original weights.
    assert!(
        number(1, "kl_divergence") < 1e-9
            && number(1, "largest_difference") < 1e-4
            && number(1, "same_token") > 0.999,
        "{merged}"
    );
    assert!(number(0, "kl_divergence") > 1e-5 && number(0, "same_token") < 1.0, "{merged}");
    let card = std::fs::read_to_string(fixture.path("merged/README.md")).unwrap();
    assert!(card.contains("| the dequantized weights |") && card.contains("KL divergence"), "{card}");

    // The merged model is a base that generates the text of the trained model.
    let generate = |arguments: &[(&str, &str)]| {
        let mut command = loractl();
        command.arg("generate").args(["--chat", "--prompt", "May 1, 2020", "--max-new-tokens", "8"]);
        for (flag, dir) in arguments {
            command.arg(flag).arg(fixture.path(dir));
        }
        Finished::run(&mut command).expect_code(0).stdout
    };
    assert_eq!(generate(&[("--base", "merged")]), generate(&[("--base", "base"), ("--adapter", "out")]));
    assert_eq!(json(&fixture.path("merged/config.json"))["dtype"], json!("float32"));

    let original = outcome(merge("original", &["--onto", "original"]));
    assert_eq!(original["written"], json!("original"));
    let again = merge("merged", &[]).expect_code(1);
    assert!(again.error().unwrap().contains("already exists"), "{}", again.stderr);
    let elsewhere = merge("other", &["--data", "missing.jsonl"]).expect_code(1);
    assert!(elsewhere.error().unwrap().contains("missing.jsonl") && !fixture.path("other").exists());
}
