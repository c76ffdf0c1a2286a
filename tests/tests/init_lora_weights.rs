//! Jobs whose adapters are initialized from the base's weights.

use std::path::Path;

use lora_e2e::{Finished, Fixture, json, loractl};
use serde_json::{Value, json};

fn start(fixture: &Fixture, settings: &str) {
    fixture.edit("job.yaml", "  r: 4\n", &format!("  r: 4\n  init_lora_weights: {settings}\n"));
    fixture.edit("job.yaml", "max_steps: 12", "max_steps: 6");
}

fn generated(base: &Path, adapter: Option<&Path>) -> String {
    let mut command = loractl();
    command
        .args(["generate", "--chat", "--prompt", "May 1, 2020", "--max-new-tokens", "8", "--base"])
        .arg(base);
    if let Some(adapter) = adapter {
        command.arg("--adapter").arg(adapter);
    }
    Finished::run(&mut command).expect_code(0).stdout
}

#[test]
fn the_subtracted_initial_term_is_exported() {
    let plain = Fixture::default();
    plain.edit("job.yaml", "max_steps: 12", "max_steps: 6");
    let mut adapters = vec![plain.finish("one", &["--threads", "1"]).adapter_sha256];
    for settings in ["pissa", "pissa_niter_4", "olora"] {
        let fixture = Fixture::default();
        start(&fixture, settings);
        let one = fixture.finish("one", &["--workers", "1", "--threads", "1"]);
        assert_eq!(fixture.finish("three", &["--workers", "3", "--threads", "1"]), one, "{settings}");
        assert!(!adapters.contains(&one.adapter_sha256), "{settings} changes nothing");
        adapters.push(one.adapter_sha256);
        let config = json(&fixture.path("one/adapter_config.json"));
        assert_eq!(
            (&config["r"], &config["lora_alpha"], &config["init_lora_weights"]),
            (&json!(8), &json!(16), &json!(true)),
            "{settings}"
        );
        let verified = Finished::run(loractl().arg("verify").arg(fixture.path("one"))).expect_code(0);
        assert!(verified.stdout.contains("same bits"), "{}", verified.stdout);
        let plan = Finished::run(loractl().arg("plan").arg(fixture.job())).expect_code(0);
        assert!(plan.stdout.contains("an adapter of rank 8"), "{}", plan.stdout);
        generated(&fixture.path("base"), Some(&fixture.path("one")));
    }
}

/// From its second iteration on, LoftQ has a base of its own, which `generate`, `verify` and
/// `merge` create again.
#[test]
fn loftq_adapters_are_used_with_the_requantized_base() {
    let fixture = Fixture::default();
    fixture.edit("job.yaml", "  base: base\n", "  base: base\n  quantization: nf4\n");
    start(&fixture, "loftq\n  loftq_iter: 3");
    let one = fixture.finish("one", &["--workers", "1", "--threads", "1"]);
    assert_eq!(fixture.finish("two", &["--workers", "2", "--threads", "1"]), one);
    let verified = Finished::run(loractl().arg("verify").arg(fixture.path("one"))).expect_code(0);
    assert!(verified.stdout.contains("same bits"), "{}", verified.stdout);

    let mut command = loractl();
    command.args(["merge", "--dtype", "f32", "-o", "json", "--base"]).arg(fixture.path("base"));
    command.arg("--adapter").arg(fixture.path("one")).arg("--out").arg(fixture.path("merged"));
    let merged: Value =
        serde_json::from_str(&Finished::run(&mut command).expect_code(0).stdout).unwrap_or_default();
    assert_eq!(merged["written"], json!("dequantized"));
    assert!(merged["differences"][1]["kl_divergence"].as_f64().is_some_and(|kl| kl < 1e-9), "{merged}");
    assert_eq!(
        generated(&fixture.path("merged"), None),
        generated(&fixture.path("base"), Some(&fixture.path("one")))
    );
    let plan = Finished::run(loractl().arg("plan").arg(fixture.job())).expect_code(0);
    assert!(plan.stdout.contains("serve the result with loractl merge"), "{}", plan.stdout);
}
