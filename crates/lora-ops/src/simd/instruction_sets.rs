//! Checks that the bits of each loop do not depend on the instruction set that it is compiled for.

use std::sync::atomic::{AtomicU8, Ordering};

use candle_core::{DType, Device, Result, Tensor};
use lora_spec::{ActivationFunction, NormKind, Philox, Rope};
use pulp::Arch;
use pulp::x86::{V3, V4};

use crate::adamw::{self, AdamWSettings, AdamWTensors};
use crate::attention::{self, AttentionShape};
use crate::cross_entropy::{Targets, forward_backward};
use crate::linear::FrozenLinear;
use crate::norm::{self, NormParams};
use crate::quant::{Codebook, FourBit, Int8};
use crate::rope::RopeTable;
use crate::{adamw_8bit, glu, pointwise, reduce};

/// One of the constants below, for all threads. Other tests that run at the same time may use any
/// of them.
static CHOICE: AtomicU8 = AtomicU8::new(BEST);
const BEST: u8 = 0;
const BASELINE: u8 = 1;
const AVX2: u8 = 2;
const AVX512: u8 = 3;

/// The instruction set that [`super::vectorize`] uses.
#[inline(always)]
pub(super) fn chosen() -> Arch {
    let found = match CHOICE.load(Ordering::Relaxed) {
        BASELINE => Some(Arch::Scalar),
        AVX2 => V3::try_new().map(Arch::V3),
        AVX512 => V4::try_new().map(Arch::V4),
        _ => None,
    };
    found.unwrap_or_else(Arch::new)
}

fn random(n: usize, seed: u64) -> Vec<f32> {
    let philox = Philox::new(seed, "instruction sets");
    (0..n as u32).map(|i| 2.0 * Philox::unit(philox.words([i, 0, 0, 0])[0]) - 1.0).collect()
}

fn vector(n: usize, seed: u64) -> Result<Tensor> {
    Tensor::from_vec(random(n, seed), n, &Device::Cpu)
}

fn matrix(rows: usize, cols: usize, seed: u64) -> Result<Tensor> {
    vector(rows * cols, seed)?.reshape((rows, cols))
}

/// Returns the outputs of each operation that has its own loop. No length is a multiple of the
/// vector width.
fn outputs() -> Result<Vec<(&'static str, Tensor)>> {
    let mut all = Vec::new();
    let (tokens, features) = (37, 75);
    let [x, dy, up] = [1, 2, 3].map(|seed| matrix(tokens, features, seed).unwrap());

    let weight = vector(features, 4)?;
    for kind in [NormKind::Rms, NormKind::Layer] {
        let params = NormParams { kind, weight: &weight, bias: Some(&weight), eps: 1e-5 };
        let (y, saved) = norm::forward(&x, params)?;
        all.push(("norm", y));
        all.push(("norm recomputed", norm::recompute(&saved, &x, params)?));
        all.push(("norm, backward", norm::backward(&saved, &x, params, &dy, Some(&up))?));
    }
    for activation in [ActivationFunction::Silu, ActivationFunction::GeluTanh] {
        let (dgate, dup) = glu::backward(&x, &up, &dy, activation)?;
        all.extend([("GLU", glu::forward(&x, &up, activation)?), ("dgate", dgate), ("dup", dup)]);
        let dx = glu::activation_backward(&x, &dy, activation)?;
        all.extend([("activation", glu::activation_forward(&x, activation)?), ("dx", dx)]);
    }
    let (sum, scaled) = (x.copy()?, x.copy()?);
    pointwise::add_assign(&sum, &dy)?;
    reduce::scale(&scaled, 0.3)?;
    all.extend([("addition", sum), ("scaling", scaled)]);
    let flat = vector(9001, 5)?;
    all.push(("sum of squares", Tensor::new(&[reduce::sum_of_squares(&flat)?], &Device::Cpu)?));
    let [low, high] = reduce::fingerprint(&[&flat])?.map(|sum| [sum as u32, (sum >> 32) as u32]);
    all.push(("fingerprint", Tensor::new(&[low, high], &Device::Cpu)?));

    for is_interleaved in [false, true] {
        let rope = Rope { is_interleaved, ..Rope::new(100.0, 22) };
        let rotated = matrix(tokens, 3 * 22, 6)?;
        RopeTable::new(&rope, tokens, &Device::Cpu)?.forward(&rotated, tokens, 0)?;
        all.push(("rotation", rotated));
    }

    let shape = AttentionShape {
        batch: 2,
        seq: 131,
        kv_seq: 131,
        heads: 4,
        kv_heads: 2,
        head_dim: 23,
        scale: 0.2,
        softcap: Some(2.0),
    };
    let q = matrix(262, 92, 7)?;
    let (k, v) = (matrix(262, 46, 8)?, matrix(262, 46, 9)?);
    let (output, saved) = attention::forward(&q, &k, &v, shape, None)?;
    let (dq, dk, dv) = attention::backward(&saved, (&q, &k, &v), &output, &q, shape, None)?;
    all.extend([("attention", output), ("dq", dq), ("dk", dk), ("dv", dv)]);

    let head = matrix(5003, features, 10)?;
    let targets: Vec<u32> = (0..tokens as u32).map(|i| i * 31).collect();
    let targets = Targets::new(&targets, &[0.7; 37], &Device::Cpu)?;
    for gradient in [false, true] {
        let loss = forward_backward(&x, &head, &targets, gradient)?;
        all.push(("cross-entropy", loss.row_losses));
        all.extend(loss.dx.map(|dx| ("cross-entropy, backward", dx)));
    }

    let values = random(features * 45, 11);
    let dense = matrix(45, features, 12)?.to_dtype(DType::BF16)?;
    let linear = FrozenLinear::new(dense, Some(vector(45, 13)?))?;
    all.push(("linear of bf16", linear.forward(&x)?));
    for nested in [false, true] {
        let weight = FourBit::quantize(&values, (45, features), Codebook::Nf4, nested)?;
        all.extend([("NF4", weight.codes().clone()), ("dequantized NF4", weight.dequantize()?)]);
    }
    let weight = Int8::quantize(&values, (45, features))?;
    all.extend([("int8", weight.codes().clone()), ("dequantized int8", weight.dequantize()?)]);

    let adamw = AdamWSettings { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.1 };
    let (params, m, v) = (vector(9001, 14)?, flat.zeros_like()?, flat.zeros_like()?);
    let params_8bit = params.copy()?;
    let state = adamw_8bit::AdamW8bitState::new(std::slice::from_ref(&(0..9001)), &Device::Cpu)?;
    for t in 1..4 {
        let gradient = vector(9001, 14 + t)?;
        let coefficients = adamw.coefficients(1e-2, t, 0.5);
        adamw::step(&coefficients, AdamWTensors { params: &params, m: &m, v: &v }, &gradient)?;
        state.step(&coefficients, &params_8bit, &gradient)?;
    }
    all.extend([("AdamW", params), ("AdamW in 8 bits", params_8bit)]);
    all.extend(state.tensors().map(|(name, tensor)| (name, tensor.clone())));
    Ok(all)
}

fn bits(tensor: &Tensor) -> Vec<u64> {
    let wide = tensor.to_dtype(DType::F64).unwrap().flatten_all().unwrap();
    wide.to_vec1::<f64>().unwrap().into_iter().map(f64::to_bits).collect()
}

#[test]
fn every_loop_has_the_same_bits_with_every_instruction_set() {
    let with = |choice: u8| {
        CHOICE.store(choice, Ordering::Relaxed);
        let all = outputs();
        CHOICE.store(BEST, Ordering::Relaxed);
        all.unwrap()
    };
    let expected = with(BASELINE);
    let sets = [("AVX2", AVX2, V3::try_new().is_some()), ("AVX-512", AVX512, V4::try_new().is_some())];
    for (set, choice, present) in sets {
        if !present {
            eprintln!("SKIPPED: this machine does not have {set}");
            continue;
        }
        for ((name, expected), (_, found)) in expected.iter().zip(with(choice)) {
            assert!(bits(expected) == bits(&found), "{name} differs with {set}");
        }
    }
}
