//! AdamW and clipping, compared with torch (`tests/golden`).

use std::path::Path;

use candle_core::{Device, Tensor};
use lora_ops::adamw::{AdamW, AdamWTensors, clip_factor};
use lora_ops::reduce::sum_of_squares;
use serde_json::Value;

use crate::common::{assert_close, bits, random, wide};

fn golden(name: &str) -> Vec<Value> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden").join(name);
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn vector(values: &[f32]) -> Tensor {
    Tensor::new(values, &Device::Cpu).unwrap()
}

fn numbers(value: &Value) -> Vec<f32> {
    value.as_array().unwrap().iter().map(|v| v.as_f64().unwrap() as f32).collect()
}

#[test]
fn adamw_matches_torch_step_by_step() {
    for (i, case) in golden("adamw.json").iter().enumerate() {
        let number = |key: &str| case[key].as_f64().unwrap();
        let adamw = AdamW {
            lr: number("lr"),
            beta1: case["betas"][0].as_f64().unwrap(),
            beta2: case["betas"][1].as_f64().unwrap(),
            eps: number("eps"),
            weight_decay: number("weight_decay"),
        };
        let params = vector(&numbers(&case["initial"]));
        let (m, v) = (params.zeros_like().unwrap(), params.zeros_like().unwrap());
        for (t, step) in case["steps"].as_array().unwrap().iter().enumerate() {
            // The factor is applied before anything else.
            let gradient: Vec<f32> = numbers(&step["grad"]).iter().map(|g| g * 2.0).collect();
            let state = AdamWTensors { params: &params, m: &m, v: &v };
            adamw.step(t as u64 + 1, state, &vector(&gradient), 0.5).unwrap();
            for (what, got) in [("param", &params), ("exp_avg", &m), ("exp_avg_sq", &v)] {
                let expected = wide(&vector(&numbers(&step[what])));
                assert_close(&format!("case {i}, step {}: {what}", t + 1), got, &expected, 1e-6);
            }
        }
    }
}

#[test]
fn paged_steps_match_unpaged_bit_for_bit() {
    let adamw = AdamW { lr: 1e-2, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.1 };
    for (n, window) in [(700, 0), (40_001, 33), (40_001, 4096), (40_001, 40_001), (40_001, 1 << 22)] {
        let vectors = || [random(n, 1), vec![0.0; n], vec![0.0; n]].map(|values| vector(&values));
        let (whole, paged) = (vectors(), vectors());
        let state = |[params, m, v]: [_; 3]| AdamWTensors { params, m, v };
        for t in 1..3 {
            let gradient = vector(&random(n, 1 + t));
            adamw.step(t, state(whole.each_ref()), &gradient, 0.5).unwrap();
            adamw.step_in_windows(t, state(paged.each_ref()), &gradient, 0.5, window).unwrap();
        }
        for (whole, paged) in whole.iter().zip(&paged) {
            assert_eq!(bits(whole), bits(paged), "{n} elements, {window} at a time");
        }
    }
}

#[test]
fn clipping_matches_torch() {
    for case in golden("clip.json") {
        let tensors = case["grads"].as_array().unwrap();
        let all: Vec<f32> = tensors.iter().flat_map(numbers).collect();
        let norm = sum_of_squares(&vector(&all)).unwrap().sqrt();
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
fn max_norm_zero_disables_clipping() {
    assert_eq!(clip_factor(1e9, 0.0), 1.0);
    assert_eq!(clip_factor(0.5, 1.0), 1.0);
    assert!(clip_factor(2.0, 1.0) < 0.5);
}
