//! `loractl run` gives the numbers of PEFT and torch (`tests/golden/jobs`, made by
//! `tests/oracle/jobs.py`): losses, gradient norms, learning rates, evaluations, and the adapter.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail the test")]

use std::path::Path;

use lora_e2e::{Finished, Fixture, json, loractl, metrics};
use lora_test_kit::golden;
use safetensors::SafeTensors;
use serde_json::{Value, json};

/// Largest relative difference of metrics. PEFT computes in f64 and this implementation in f32.
const METRICS_TOLERANCE: f64 = 5e-5;
/// Largest difference of the adapter's elements, relative to the largest element of the tensor.
const ADAPTER_TOLERANCE: f64 = 1e-3;

/// Runs the job of a case with `workers` and compares its result with PEFT's.
fn follows_peft(case: &str, workers: &str) {
    let dir = tempfile::tempdir().unwrap();
    let expected = json(&golden("jobs").join(case).join("expected.json"));
    let mut job = expected["job"].clone();
    job["name"] = json!(case);
    job["model"]["base"] = json!(Fixture::example().join("base"));
    job["adapter"]["init_from"] = json!(golden("jobs").join(case).join("adapter"));
    job["data"] = json!({
        "train": golden("jobs/train.jsonl"), "eval": golden("jobs/eval.jsonl"), "shuffle": false,
    });
    // JSON is valid YAML.
    let (file, out) = (dir.path().join("job.yaml"), dir.path().join("out"));
    std::fs::write(&file, job.to_string()).unwrap();
    let mut run = loractl();
    run.arg("run").arg(&file).arg("--out").arg(&out).args(["--workers", workers]);
    Finished::run(&mut run).expect_code(0);

    let rows = metrics(&out);
    let expected_rows = expected["metrics"].as_array().unwrap();
    assert_eq!(rows.len(), expected_rows.len(), "{case}");
    for (row, expected) in rows.iter().zip(expected_rows) {
        for (key, expected) in expected.as_object().unwrap() {
            let (got, expected) = (row[key].as_f64().unwrap_or(f64::NAN), expected.as_f64().unwrap());
            let close = (got - expected).abs() <= METRICS_TOLERANCE * expected.abs();
            assert!(close, "{case}: {key} of step {} is {got}, not {expected}", row["step"]);
        }
        assert_eq!(row["eval_loss"].is_null(), expected["eval_loss"].is_null(), "{case}: {row}");
    }
    adapters_agree(&out, &golden("jobs").join(case).join("final"));
    assert_eq!(peft_settings(&out), peft_settings(&golden("jobs").join(case).join("final")), "{case}");
}

fn adapters_agree(got: &Path, expected: &Path) {
    let [got, expected] =
        [got, expected].map(|dir| std::fs::read(dir.join("adapter_model.safetensors")).unwrap());
    let [got, expected] = [&got, &expected].map(|bytes| SafeTensors::deserialize(bytes).unwrap());
    let mut names = [got.names(), expected.names()];
    names.iter_mut().for_each(|names| names.sort_unstable());
    assert_eq!(names[0], names[1]);
    for name in &names[0] {
        let [got, expected] = [&got, &expected].map(|file| values(file.tensor(name).unwrap().data()));
        assert_eq!(got.len(), expected.len(), "{name}");
        let largest = expected.iter().fold(0.0, |largest: f64, value| largest.max(value.abs()));
        let error = got.iter().zip(&expected).fold(0.0, |error: f64, (a, b)| error.max((a - b).abs()));
        assert!(error <= ADAPTER_TOLERANCE * largest, "{name}: {error} of {largest}");
    }
}

fn values(data: &[u8]) -> Vec<f64> {
    data.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes).into()).collect()
}

/// The settings that decide what an adapter computes.
fn peft_settings(dir: &Path) -> Vec<Value> {
    let config = json(&dir.join("adapter_config.json"));
    ["peft_type", "task_type", "r", "use_rslora", "lora_dropout", "bias"]
        .map(|key| config[key].clone())
        .into()
}

/// Every setting that changes a number has another value than its default. The last step of an
/// epoch has fewer rows than the others, and the last step is evaluated although `eval_steps` does
/// not divide it.
#[test]
fn a_job_with_other_settings_than_the_defaults() {
    follows_peft("settings", "2");
}

/// Quantized while it is read, with dropout, recomputation, and a linear schedule whose warm-up is
/// a fraction of the steps.
#[test]
fn a_qlora_job() {
    follows_peft("qlora", "1");
}
