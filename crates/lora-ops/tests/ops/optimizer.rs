//! AdamW and clipping against torch's (`tests/golden`).

use std::path::Path;

use lora_ops::adamw::{AdamW, State, clip_factor};
use lora_ops::reduce::sum_of_squares;
use serde_json::Value;

use crate::common::error;

fn golden(name: &str) -> Vec<Value> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden").join(name);
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn numbers(value: &Value) -> Vec<f32> {
    value.as_array().unwrap().iter().map(|v| v.as_f64().unwrap() as f32).collect()
}

fn assert_close(what: &str, got: &[f32], expected: &Value, limit: f64) {
    let widen = |x: &[f32]| x.iter().map(|x| f64::from(*x)).collect::<Vec<_>>();
    let error = error(&widen(got), &widen(&numbers(expected)));
    assert!(error <= limit, "{what} is off by {error:e}");
}

#[test]
fn adamw_follows_torch_step_by_step() {
    for (i, case) in golden("adamw.json").iter().enumerate() {
        let number = |key: &str| case[key].as_f64().unwrap();
        let adamw = AdamW {
            lr: number("lr"),
            beta1: case["betas"][0].as_f64().unwrap(),
            beta2: case["betas"][1].as_f64().unwrap(),
            eps: number("eps"),
            weight_decay: number("weight_decay"),
        };
        let mut params = numbers(&case["initial"]);
        let (mut m, mut v) = (vec![0.0; params.len()], vec![0.0; params.len()]);
        for (t, step) in case["steps"].as_array().unwrap().iter().enumerate() {
            // The factor is applied before anything else.
            let gradient: Vec<f32> = numbers(&step["grad"]).iter().map(|g| g * 2.0).collect();
            let state = State { params: &mut params, m: &mut m, v: &mut v };
            adamw.step(t as u64 + 1, state, &gradient, 0.5);
            let what = |of: &str| format!("case {i}, step {}: {of}", t + 1);
            assert_close(&what("parameters"), &params, &step["param"], 1e-6);
            assert_close(&what("first moments"), &m, &step["exp_avg"], 1e-6);
            assert_close(&what("second moments"), &v, &step["exp_avg_sq"], 1e-6);
        }
    }
}

#[test]
fn clipping_follows_torch() {
    for case in golden("clip.json") {
        let tensors = case["grads"].as_array().unwrap();
        let all: Vec<f32> = tensors.iter().flat_map(numbers).collect();
        let norm = sum_of_squares(&all).sqrt();
        let expected = case["norm"].as_f64().unwrap();
        assert!((norm - expected).abs() <= 1e-6 * expected, "norm {norm} instead of {expected}");
        let factor = clip_factor(norm, case["max_norm"].as_f64().unwrap());
        for (gradient, clipped) in tensors.iter().zip(case["clipped"].as_array().unwrap()) {
            let got: Vec<f32> = numbers(gradient).iter().map(|g| g * factor).collect();
            let largest = numbers(clipped).iter().fold(0.0_f32, |m, v| m.max(v.abs()));
            for (got, expected) in got.iter().zip(numbers(clipped)) {
                assert!((got - expected).abs() <= 3e-7 * largest, "{got} instead of {expected}");
            }
        }
    }
}

#[test]
fn no_limit_means_no_clipping() {
    assert_eq!(clip_factor(1e9, 0.0), 1.0);
    assert_eq!(clip_factor(0.5, 1.0), 1.0);
    assert!(clip_factor(2.0, 1.0) < 0.5);
}
