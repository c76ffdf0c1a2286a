//! AdamW and clipping, compared with torch (`tests/golden`).

use std::collections::HashMap;

use candle_core::{Device, Tensor};
use lora_ops::Optimizer;
use lora_ops::adamw::{AdamWSettings, AdamWTensors, clip_factor, step, step_in_windows};
use lora_ops::reduce::sum_of_squares;
use lora_spec::Optim;
use serde_json::Value;

use crate::common::{assert_close, bits, random, wide};

fn golden(name: &str) -> Vec<Value> {
    let path = lora_test_kit::golden(name);
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
        let adamw = AdamWSettings {
            beta1: case["betas"][0].as_f64().unwrap(),
            beta2: case["betas"][1].as_f64().unwrap(),
            eps: number("eps"),
            weight_decay: number("weight_decay"),
        };
        let params = vector(&numbers(&case["initial"]));
        let (m, v) = (params.zeros_like().unwrap(), params.zeros_like().unwrap());
        for (t, expected) in case["steps"].as_array().unwrap().iter().enumerate() {
            // The factor is applied before anything else.
            let gradient: Vec<f32> = numbers(&expected["grad"]).iter().map(|g| g * 2.0).collect();
            let state = AdamWTensors { params: &params, m: &m, v: &v };
            let coefficients = adamw.coefficients(number("lr"), t as u64 + 1, 0.5);
            step(&coefficients, state, &vector(&gradient)).unwrap();
            for (what, got) in [("param", &params), ("exp_avg", &m), ("exp_avg_sq", &v)] {
                let expected = wide(&vector(&numbers(&expected[what])));
                assert_close(&format!("case {i}, step {}: {what}", t + 1), got, &expected, 1e-6);
            }
        }
    }
}

#[test]
fn paged_steps_match_unpaged_bit_for_bit() {
    let adamw = AdamWSettings { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.1 };
    for (n, window) in [(700, 0), (40_001, 33), (40_001, 4096), (40_001, 40_001), (40_001, 1 << 22)] {
        let vectors = || [random(n, 1), vec![0.0; n], vec![0.0; n]].map(|values| vector(&values));
        let (whole, paged) = (vectors(), vectors());
        let state = |[params, m, v]: [_; 3]| AdamWTensors { params, m, v };
        for t in 1..3 {
            let gradient = vector(&random(n, 1 + t));
            let coefficients = adamw.coefficients(1e-2, t, 0.5);
            step(&coefficients, state(whole.each_ref()), &gradient).unwrap();
            step_in_windows(&coefficients, state(paged.each_ref()), &gradient, window).unwrap();
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

/// Every optimizer counts its steps and continues from its tensors with the same bits. Paged
/// moments have the bits of unpaged ones.
#[test]
fn optimizers_continue_from_their_tensors() {
    let settings = AdamWSettings { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.1 };
    let (n, ranges) = (6000, vec![0..5000, 5000..6000]);
    let gradients = [2, 3, 4].map(|seed| vector(&random(n, seed)));
    let finals =
        [Optim::Adamw, Optim::PagedAdamw32bit, Optim::Adamw8bit, Optim::PagedAdamw8bit].map(|optim| {
            let mut optimizer = Optimizer::new(optim, settings, ranges.clone(), &Device::Cpu).unwrap();
            let params = vector(&random(n, 1));
            for gradient in &gradients[..2] {
                optimizer.step(1e-2, &params, gradient, 0.5).unwrap();
            }
            assert_eq!(optimizer.updates(), 2);
            let saved: HashMap<&str, Tensor> = optimizer
                .tensors()
                .into_iter()
                .map(|(name, tensor)| (name, tensor.copy().unwrap()))
                .collect();
            let mut restored = optimizer.restored(2, |name| Ok(saved[name].clone())).unwrap();
            let restored_params = params.copy().unwrap();
            optimizer.step(1e-2, &params, &gradients[2], 0.5).unwrap();
            restored.step(1e-2, &restored_params, &gradients[2], 0.5).unwrap();
            assert_eq!(bits(&params), bits(&restored_params), "{optim:?}");
            bits(&params)
        });
    assert_eq!(finals[0], finals[1]);
    assert_eq!(finals[2], finals[3]);
    assert_ne!(finals[0], finals[2]);
}
