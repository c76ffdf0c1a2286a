//! AdamW with moments in 8 bits, compared with bitsandbytes (`tests/oracle/adamw_8bit.py`) and with
//! f32 AdamW.

use std::collections::HashMap;
use std::ops::Range;

use candle_core::{DType, Device, Tensor};
use lora_ops::adamw::{self, AdamWSettings, AdamWTensors};
use lora_ops::adamw_8bit::{AdamW8bitState, TENSOR_NAMES, bytes};
use lora_ops::paged::MomentPlacement;
use lora_ops::quant::{dynamic_map, dynamic_map_unsigned};
use lora_ops::reduce::fingerprint;
use safetensors::SafeTensors;
use serde_json::Value;

use crate::common::{assert_close, bits, random, vector, wide};
use crate::threads::assert_same_bits;

const ADAMW: AdamWSettings = AdamWSettings { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.1 };
const LR: f64 = 1e-2;

/// Contiguous ranges for tensors of these sizes.
fn ranges(sizes: &[usize]) -> Vec<Range<usize>> {
    let mut end = 0;
    let next = |size: &usize| {
        end += size;
        end - size..end
    };
    sizes.iter().map(next).collect()
}

fn state(sizes: &[usize]) -> AdamW8bitState {
    AdamW8bitState::new(&ranges(sizes), &Device::Cpu).unwrap()
}

/// Copies of a state's tensors by name.
fn saved(state: &AdamW8bitState) -> HashMap<&'static str, Tensor> {
    state.tensors().into_iter().map(|(name, tensor)| (name, tensor.copy().unwrap())).collect()
}

fn golden() -> (HashMap<String, Tensor>, Value) {
    let path = lora_test_kit::golden("adamw_8bit.safetensors");
    let file = std::fs::read(path).unwrap();
    let (_, metadata) = SafeTensors::read_metadata(&file).unwrap();
    let settings = serde_json::from_str(&metadata.metadata().as_ref().unwrap()["settings"]).unwrap();
    (candle_core::safetensors::load_buffer(&file, &Device::Cpu).unwrap(), settings)
}

#[test]
fn quantization_maps_match_bitsandbytes() {
    let (golden, _) = golden();
    for (name, map) in [("signed", dynamic_map()), ("unsigned", dynamic_map_unsigned())] {
        assert_eq!(map.map(f32::to_bits).to_vec(), bits(&golden[name]), "{name}");
    }
}

#[test]
fn four_steps_match_bitsandbytes() {
    let (golden, settings) = golden();
    let number = |value: &Value| value.as_f64().unwrap();
    let list = |key: &str| settings[key].as_array().unwrap();
    let sizes: Vec<usize> = list("sizes").iter().map(|size| size.as_u64().unwrap() as usize).collect();
    let state = state(&sizes);
    let params = golden["initial"].to_dtype(DType::F32).unwrap();
    for (step, lr) in list("lr").iter().enumerate() {
        let (beta1, beta2) = (number(&settings["betas"][0]), number(&settings["betas"][1]));
        let (eps, weight_decay) = (number(&settings["eps"]), number(&settings["weight_decay"]));
        let adamw = AdamWSettings { beta1, beta2, eps, weight_decay };
        // The factor is applied before anything else.
        let gradient = (golden[&format!("{step}.gradient")].to_dtype(DType::F32).unwrap() * 2.0).unwrap();
        let coefficients = adamw.coefficients(number(lr), step as u64 + 1, 0.5);
        state.step(&coefficients, &params, &gradient).unwrap();
        // An update is at most about the learning rate and may leave a much smaller parameter, so
        // the error is relative to both.
        let expected = wide(&golden[&format!("{step}.params")]);
        let off = |(a, b): (f64, f64)| (a - b).abs() / (b.abs() + 1e-2);
        let furthest = wide(&params).into_iter().zip(expected).map(off).fold(0.0, f64::max);
        assert!(furthest <= 1e-6, "step {step}: parameters are off by {furthest:e}");
        for (name, found) in state.tensors() {
            let expected = &golden[&format!("{step}.{name}")];
            if found.dtype() == DType::U8 {
                assert_eq!(
                    found.to_vec1::<u8>().unwrap(),
                    expected.to_vec1::<u8>().unwrap(),
                    "{step}.{name}"
                );
            } else {
                assert_close(&format!("{step}.{name}"), found, &wide(expected), 1e-6);
            }
        }
    }
}

#[test]
fn tensors_are_updated_independently() {
    let sizes = [4100, 3, 9000, 4095, 0, 4096];
    let n = sizes.iter().sum();
    let (all, params) = (state(&sizes), vector(n, 1));
    let gradients = [vector(n, 2), vector(n, 3)];
    for (t, gradient) in (1..).zip(&gradients) {
        all.step(&ADAMW.coefficients(LR, t, 1.0), &params, gradient).unwrap();
    }
    for range in ranges(&sizes) {
        let of = |flat: &Tensor| flat.narrow(0, range.start, range.len()).unwrap();
        let alone = of(&vector(n, 1)).copy().unwrap();
        let state = state(&[range.len()]);
        let zeros = || alone.zeros_like().unwrap();
        let full = (zeros(), zeros());
        for (t, gradient) in (1..).zip(&gradients) {
            if range.len() < 4096 {
                let state = AdamWTensors { params: &alone, m: &full.0, v: &full.1 };
                adamw::step(&ADAMW.coefficients(LR, t, 1.0), state, &of(gradient)).unwrap();
            } else {
                state.step(&ADAMW.coefficients(LR, t, 1.0), &alone, &of(gradient)).unwrap();
            }
        }
        assert_eq!(bits(&of(&params)), bits(&alone), "{range:?}");
    }
}

#[test]
fn first_moments_keep_their_sign_and_zero() {
    let (state, params) = (state(&[4096]), vector(4096, 1));
    let mut gradient = vec![0.0_f32; 4096];
    (gradient[0], gradient[1], gradient[2]) = (1e4, -1e-6, 1e-6);
    let gradient = Tensor::new(gradient, &Device::Cpu).unwrap();
    state.step(&ADAMW.coefficients(LR, 1, 1.0), &params, &gradient).unwrap();
    let codes: Vec<u8> = saved(&state)["exp_avg_codes"].to_vec1().unwrap();
    // Zero is the 127th number. The other blocks are all zero and have code 0 everywhere.
    assert_eq!(codes[..4], [255, 126, 127, 127]);
    assert_eq!(codes[256], 0);
    state.step(&ADAMW.coefficients(LR, 2, 1.0), &params, &gradient.zeros_like().unwrap()).unwrap();
    let decay = (1.0 - 1e-2 * 0.1) as f32;
    for i in [3, 255, 256, 4095] {
        let decayed = random(4096, 1)[i] * decay * decay;
        assert_eq!(params.to_vec1::<f32>().unwrap()[i], decayed, "{i}");
    }
}

#[test]
fn a_restored_state_continues_bit_for_bit() {
    let sizes = [5000, 100, 4096];
    let params = vector(9196, 1);
    let before = state(&sizes);
    before.step(&ADAMW.coefficients(LR, 1, 0.5), &params, &vector(9196, 2)).unwrap();
    let (kept, kept_params) = (saved(&before), params.copy().unwrap());
    let find = |name: &str| Ok(kept[name].clone());
    let after = AdamW8bitState::from_tensors(&ranges(&sizes), &Device::Cpu, find).unwrap();
    let hash = |state: &AdamW8bitState| fingerprint(&state.tensors().map(|(_, tensor)| tensor)).unwrap();
    let first = hash(&after);
    assert_eq!(hash(&before), first);
    for (params, state) in [(&params, &before), (&kept_params, &after)] {
        state.step(&ADAMW.coefficients(LR, 2, 0.5), params, &vector(9196, 3)).unwrap();
    }
    assert_eq!(bits(&params), bits(&kept_params));
    assert_eq!(hash(&before), hash(&after));
    // The source tensors are not changed.
    let given = AdamW8bitState::from_tensors(&ranges(&sizes), &Device::Cpu, find).unwrap();
    assert_eq!(hash(&given), first);
    assert_ne!(hash(&after), first);
}

#[test]
fn the_same_bits_with_any_number_of_threads() {
    let sizes = [40_000, 100, 17_000, 4096];
    let n = sizes.iter().sum();
    assert_same_bits("8-bit AdamW", || {
        let (params, state) = (vector(n, 1), state(&sizes));
        for t in 1..4 {
            state.step(&ADAMW.coefficients(LR, t, 0.5), &params, &vector(n, 1 + t))?;
        }
        Ok(state.tensors().map(|(_, tensor)| tensor.clone()).into_iter().chain([params]).collect())
    });
}

/// With some of these sizes a window of f32 moments ends within a run of small tensors.
#[test]
fn paged_moments_have_the_same_bits() {
    let sizes = [300, 40, 5000, 100, 4096, 7];
    let n = sizes.iter().sum();
    for window in [1, 256, 300, 1 << 22] {
        let placement = MomentPlacement { device: &Device::Cpu, window: Some(window) };
        let (params, plain) = (vector(n, 1), state(&sizes));
        let (paged_params, paged) = (vector(n, 1), AdamW8bitState::new(&ranges(&sizes), placement).unwrap());
        for t in 1..3 {
            plain.step(&ADAMW.coefficients(LR, t, 0.5), &params, &vector(n, 1 + t)).unwrap();
            paged.step(&ADAMW.coefficients(LR, t, 0.5), &paged_params, &vector(n, 1 + t)).unwrap();
        }
        assert_eq!(bits(&paged_params), bits(&params), "{window}");
        let hash = |state: &AdamW8bitState| fingerprint(&state.tensors().map(|(_, tensor)| tensor)).unwrap();
        assert_eq!(hash(&paged), hash(&plain), "{window}");
    }
}

#[test]
fn bytes_equals_the_size_of_the_tensors() {
    let sizes = [4095, 4096, 5000];
    let of = |tensor: &Tensor| tensor.elem_count() * tensor.dtype().size_in_bytes();
    let held: usize = state(&sizes).tensors().iter().map(|(_, tensor)| of(tensor)).sum();
    assert_eq!(held, 8 * 4095 + 2 * (4096 + 5000) + 8 * (16 + 20));
    assert_eq!(bytes(&ranges(&sizes)).unwrap(), held);
}

#[test]
fn converges_like_f32_adamw_on_a_quadratic() {
    let n = 8192;
    // The minimum is 0 in every direction, and the curvatures are between 0.01 and 1.
    let curvature = (vector(n, 2).affine(0.495, 0.505)).unwrap();
    let adamw = AdamWSettings { weight_decay: 0.0, ..ADAMW };
    let lr = |t: u64| 0.05 * (1.0 - (t - 1) as f64 / 300.0);
    let loss = |params: &Tensor| wide(&(params.sqr().unwrap() * &curvature).unwrap()).iter().sum::<f64>();
    let (eight, full) = (vector(n, 1), vector(n, 1));
    let start = loss(&full);
    let state = state(&[n]);
    let (m, v) = (full.zeros_like().unwrap(), full.zeros_like().unwrap());
    for t in 1..=300 {
        let gradient = |params: &Tensor| (params * &curvature).unwrap();
        let coefficients = adamw.coefficients(lr(t), t, 1.0);
        state.step(&coefficients, &eight, &gradient(&eight)).unwrap();
        let of_full = AdamWTensors { params: &full, m: &m, v: &v };
        adamw::step(&coefficients, of_full, &gradient(&full)).unwrap();
        if t % 50 == 0 {
            let ratio = loss(&eight) / loss(&full);
            assert!((0.7..1.3).contains(&ratio), "after {t} steps the loss is {ratio} of the other");
        }
    }
    assert!(loss(&eight) < 1e-12 * start);
}

#[test]
fn mismatched_lengths_and_types_are_rejected() {
    let refused = |result: candle_core::Result<()>, expected: &str| {
        let message = result.err().map(|error| error.to_string()).unwrap_or_default();
        assert!(message.contains(expected), "{message:?} does not contain {expected:?}");
    };
    let new = |ranges: &[Range<usize>]| AdamW8bitState::new(ranges, &Device::Cpu).map(|_| ());
    refused(new(&[0..5, 6..7]), "a tensor at 6..7 after one that ends at 5");
    refused(new(&[1..5, 5..6]), "a tensor at 1..5 after one that ends at 0");
    let state = state(&[4096, 10]);
    let step = |params: usize, gradient: usize| {
        state.step(&ADAMW.coefficients(LR, 1, 1.0), &vector(params, 1), &vector(gradient, 2))
    };
    refused(step(4096, 4106), "parameters [4096] and gradient [4106] with moments of 4106");
    refused(step(4106, 4105), "gradient [4105]");
    for name in TENSOR_NAMES {
        let wrong = |wanted: &str| match wanted == name {
            true => Tensor::zeros(7, DType::F32, &Device::Cpu),
            false => Ok(saved(&state)[wanted].clone()),
        };
        let restored = AdamW8bitState::from_tensors(&ranges(&[4096, 10]), &Device::Cpu, wrong);
        refused(restored.map(|_| ()), &format!("{name} is f32 [7] instead of"));
    }
}
