//! AdamW: every operation of it is rounded as IEEE 754 says on either device, so the bits are the same.

use anyhow::{Context as _, Result, ensure};
use candle_core::{DType, Device, Tensor};
use lora_ops::adamw::{AdamW, AdamWTensors};
use lora_ops::adamw_8bit;
use lora_ops::device::{DeviceMemory, memory};
use lora_ops::paged::MomentPlacement;
use lora_ops::reduce::fingerprint;
use lora_ops::transfer::{to_device, zeros};

use crate::check::{Check, TestBench, values};

pub(crate) fn checks() -> Vec<Check> {
    vec![
        Check::new("adamw f32", steps),
        Check::new("adamw, moments in 8 bits", steps_8bit),
        Check::new("adamw, memory of paged moments", memory_of_paged),
    ]
}

/// Tensors with moments in 8 bits, whose last block is not full, between such with f32 ones; and each kind alone. Paged ones too, in
/// windows of one block, of some that end inside a tensor and span others, and of all.
fn steps_8bit(bench: &TestBench) -> Result<String> {
    let adamw = AdamW { lr: 1e-3, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01 };
    for sizes in [&[5000, 100, 4096, 33, 8191][..], &[4096], &[7, 4095]] {
        let mut end = 0;
        let ranges: Vec<_> = sizes
            .iter()
            .map(|size| {
                end += size;
                end - size..end
            })
            .collect();
        let params = bench.random("params", &[end], 1.0, DType::F32)?;
        let on_cpu = adamw_8bit::AdamW8bitState::new(&ranges, &Device::Cpu)?;
        let mut on_gpu = Vec::new();
        for window in [None, Some(1), Some(256 * 7), Some(1 << 20)] {
            let placement = MomentPlacement { device: &bench.device, window };
            on_gpu.push((placement, params.1.copy()?, adamw_8bit::AdamW8bitState::new(&ranges, placement)?));
        }
        for t in 1..5 {
            let gradient = bench.random(
                &format!("gradient {t}"),
                &[end],
                10.0_f32.powi(2 - t as i32 * 3),
                DType::F32,
            )?;
            adamw.step_8bit(t, &params.0, &on_cpu, &gradient.0, 0.7)?;
            let hash =
                |state: &adamw_8bit::AdamW8bitState| fingerprint(&state.tensors().map(|(_, tensor)| tensor));
            for (placement, params_there, state) in &mut on_gpu {
                adamw.step_8bit(t, params_there, state, &gradient.1, 0.7)?;
                let which = format!("after step {t} of {sizes:?}, window {:?}", placement.window);
                ensure!(values(params_there)? == values(&params.0)?, "parameters {which}");
                ensure!(hash(&on_cpu)? == hash(state)?, "moments {which}");
                // As a checkpoint does it, from one device to the other.
                let saved = |name: &str| -> candle_core::Result<Tensor> {
                    let tensors = state.tensors();
                    let tensor = tensors.iter().find(|(of, _)| *of == name).map(|(_, tensor)| *tensor);
                    let tensor = tensor.ok_or_else(|| candle_core::Error::Msg(name.to_owned()))?;
                    to_device(tensor, &Device::Cpu)
                };
                let read = adamw_8bit::AdamW8bitState::from_tensors(&ranges, *placement, saved)?;
                *state = read;
            }
        }
    }
    Ok("exact".into())
}

fn steps(bench: &TestBench) -> Result<String> {
    let adamw = AdamW { lr: 1e-3, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01 };
    // With views that lie on no boundary.
    for (n, skip) in [(1, 0), (6, 1), (100_003, 0), (1025, 3)] {
        let random = |name: &str, scale: f32| bench.random(name, &[n + skip], scale, DType::F32);
        let (params, m, v) = (random("params", 1.0)?, random("m", 0.0)?, random("v", 0.0)?);
        // With moments in the host's memory: windows that end inside, one that is larger, a single element.
        let mut paged = Vec::new();
        for window in [4096, 333, 1 << 20, 1] {
            if window > 1 || n < 10_000 {
                paged.push((window, params.1.copy()?, [m.0.copy()?, v.0.copy()?]));
            }
        }
        for t in 1..4 {
            // Gradients over many magnitudes: tiny ones square to numbers below the smallest normal one.
            let gradient = random(&format!("gradient {t}"), 10.0_f32.powi(-(t as i32 - 1) * 10))?;
            let step = |params: &Tensor, m: &Tensor, v: &Tensor, gradient: &Tensor| -> Result<()> {
                let view = |x: &Tensor| x.narrow(0, skip, n);
                let (params, m, v) = (view(params)?, view(m)?, view(v)?);
                let state = AdamWTensors { params: &params, m: &m, v: &v };
                Ok(adamw.step(t, state, &view(gradient)?, 0.7)?)
            };
            step(&params.0, &m.0, &v.0, &gradient.0)?;
            step(&params.1, &m.1, &v.1, &gradient.1)?;
            for (window, params_there, [m_here, v_here]) in &paged {
                let view = |x: &Tensor| x.narrow(0, skip, n);
                let state =
                    AdamWTensors { params: &view(params_there)?, m: &view(m_here)?, v: &view(v_here)? };
                adamw.step_in_windows(t, state, &view(&gradient.1)?, 0.7, *window)?;
                let same = values(params_there)? == values(&params.0)?
                    && values(m_here)? == values(&m.0)?
                    && values(v_here)? == values(&v.0)?;
                ensure!(same, "in windows of {window}, after step {t} of {n} elements");
            }
            for (what, (want, got)) in
                [("parameters", &params), ("first moments", &m), ("second moments", &v)]
            {
                ensure!(values(got)? == values(want)?, "{what} after step {t} of {n} elements");
            }
        }
    }
    Ok("exact".into())
}

/// Paged moments take a GPU's memory in a step alone, and no more of it than their windows.
fn memory_of_paged(bench: &TestBench) -> Result<String> {
    const WINDOW: usize = 1 << 14;
    const LEN: usize = 20 * WINDOW + 5;
    // Sizes are rounded up, by the pool (at most 32 tensors here) and to blocks.
    let rounded = 32 * crate::memory::pool_granularity(bench)? + (4 << 10);
    let adamw = AdamW { lr: 1e-3, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01 };
    let (_, params) = bench.random("params", &[LEN], 1.0, DType::F32)?;
    let (_, gradient) = bench.random("gradient", &[LEN], 1.0, DType::F32)?;
    let now = || -> Result<DeviceMemory> {
        bench.device.synchronize()?;
        memory(&bench.device)?.context("no reading of the GPU's memory")
    };
    let before = now()?;
    let placement = MomentPlacement { device: &bench.device, window: Some(WINDOW) };
    let moment = || zeros(LEN, DType::F32, placement.moment_device());
    let (m, v) = (moment()?, moment()?);
    let _pinned = [placement.pin(&m)?, placement.pin(&v)?];
    let state = adamw_8bit::AdamW8bitState::new(&[0..LEN - 100, LEN - 100..LEN], placement)?;
    let made = now()?;
    ensure!(made.used_bytes <= before.used_bytes + rounded, "{} bytes", made.used_bytes - before.used_bytes);
    let mut said = Vec::new();
    for (what, most) in [("f32", 8 * WINDOW), ("8 bits", 2 * WINDOW + 20 * WINDOW / 256 + 8 * 100)] {
        // Up to the peak so far, so that a step raises it.
        let rest = now()?;
        let rest = (rest.peak_bytes - rest.used_bytes).max(1) as usize;
        let _ballast = zeros(rest, DType::U8, &bench.device)?;
        let before = now()?;
        if what == "f32" {
            let state = AdamWTensors { params: &params, m: &m, v: &v };
            adamw.step_in_windows(1, state, &gradient, 1.0, WINDOW)?;
        } else {
            adamw.step_8bit(1, &params, &state, &gradient, 1.0)?;
        }
        let after = now()?;
        ensure!(after.used_bytes == before.used_bytes, "{what}: {before:?}, then {after:?}");
        let taken = after.peak_bytes - before.peak_bytes;
        let fits = 0 < taken && taken <= most as u64 + rounded;
        ensure!(fits, "{what}: {taken} bytes instead of {most}");
        said.push(format!("{what}: {taken} bytes"));
    }
    Ok(said.join(", "))
}
