//! AdamW. Each of its operations is rounded according to IEEE 754 on both devices, so the results
//! have the same bits.

use anyhow::{Context as _, Result, ensure};
use candle_core::{DType, Device, Tensor};
use lora_ops::adamw::{self, AdamWSettings, AdamWTensors};
use lora_ops::adamw_8bit;
use lora_ops::device::{MemoryUsage, memory};
use lora_ops::paged::MomentPlacement;
use lora_ops::reduce::fingerprint;
use lora_ops::transfer::{to_device, zeros};

use crate::check::{Check, TestBench, values};

const ADAMW: AdamWSettings = AdamWSettings { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01 };
const LR: f64 = 1e-3;

pub(crate) fn checks() -> Vec<Check> {
    vec![
        Check::new("adamw f32", steps),
        Check::new("adamw, moments in 8 bits", steps_8bit),
        Check::new("adamw, memory of paged moments", memory_of_paged),
    ]
}

/// Checks tensors with moments in 8 bits, whose last block is not full, between tensors with f32
/// moments, and each kind alone. Moments are also paged, with windows of one block, windows that
/// end inside a tensor and span others, and one window for all.
fn steps_8bit(bench: &TestBench) -> Result<String> {
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
            on_cpu.step(&ADAMW.coefficients(LR, t, 0.7), &params.0, &gradient.0)?;
            let hash =
                |state: &adamw_8bit::AdamW8bitState| fingerprint(&state.tensors().map(|(_, tensor)| tensor));
            for (placement, gpu_params, state) in &mut on_gpu {
                state.step(&ADAMW.coefficients(LR, t, 0.7), gpu_params, &gradient.1)?;
                let which = format!("after step {t} of {sizes:?}, window {:?}", placement.window);
                ensure!(values(gpu_params)? == values(&params.0)?, "parameters differ {which}");
                ensure!(hash(&on_cpu)? == hash(state)?, "moments differ {which}");
                // The state is copied through the CPU, like a checkpoint.
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
    // `skip` gives views that do not start at an aligned address.
    for (n, skip) in [(1, 0), (6, 1), (100_003, 0), (1025, 3)] {
        let random = |name: &str, scale: f32| bench.random(name, &[n + skip], scale, DType::F32);
        let (params, m, v) = (random("params", 1.0)?, random("m", 0.0)?, random("v", 0.0)?);
        // Moments in the host's memory, with windows that end inside the tensor, that are larger,
        // and that have a single element.
        let mut paged = Vec::new();
        for window in [4096, 333, 1 << 20, 1] {
            if window > 1 || n < 10_000 {
                paged.push((window, params.1.copy()?, [m.0.copy()?, v.0.copy()?]));
            }
        }
        for t in 1..4 {
            // Gradients of many magnitudes. The squares of the smallest are subnormal.
            let gradient = random(&format!("gradient {t}"), 10.0_f32.powi(-(t as i32 - 1) * 10))?;
            let step = |params: &Tensor, m: &Tensor, v: &Tensor, gradient: &Tensor| -> Result<()> {
                let view = |x: &Tensor| x.narrow(0, skip, n);
                let (params, m, v) = (view(params)?, view(m)?, view(v)?);
                let state = AdamWTensors { params: &params, m: &m, v: &v };
                Ok(adamw::step(&ADAMW.coefficients(LR, t, 0.7), state, &view(gradient)?)?)
            };
            step(&params.0, &m.0, &v.0, &gradient.0)?;
            step(&params.1, &m.1, &v.1, &gradient.1)?;
            for (window, gpu_params, [host_m, host_v]) in &paged {
                let view = |x: &Tensor| x.narrow(0, skip, n);
                let state = AdamWTensors { params: &view(gpu_params)?, m: &view(host_m)?, v: &view(host_v)? };
                adamw::step_in_windows(&ADAMW.coefficients(LR, t, 0.7), state, &view(&gradient.1)?, *window)?;
                let same = values(gpu_params)? == values(&params.0)?
                    && values(host_m)? == values(&m.0)?
                    && values(host_v)? == values(&v.0)?;
                ensure!(same, "results differ with windows of {window}, after step {t} of {n} elements");
            }
            for (what, (want, got)) in
                [("parameters", &params), ("first moments", &m), ("second moments", &v)]
            {
                ensure!(values(got)? == values(want)?, "{what} differ after step {t} of {n} elements");
            }
        }
    }
    Ok("exact".into())
}

/// Checks that paged moments use the GPU's memory only during a step, and only for their windows.
fn memory_of_paged(bench: &TestBench) -> Result<String> {
    const WINDOW: usize = 1 << 14;
    const LEN: usize = 20 * WINDOW + 5;
    // The pool rounds up the sizes of at most 32 tensors, and windows are rounded up to blocks.
    let rounded = 32 * crate::memory::pool_granularity(bench)? + (4 << 10);
    let (_, params) = bench.random("params", &[LEN], 1.0, DType::F32)?;
    let (_, gradient) = bench.random("gradient", &[LEN], 1.0, DType::F32)?;
    let now = || -> Result<MemoryUsage> {
        bench.device.synchronize()?;
        memory(&bench.device)?.context("the GPU's memory cannot be read")
    };
    let before = now()?;
    let placement = MomentPlacement { device: &bench.device, window: Some(WINDOW) };
    let moment = || zeros(LEN, DType::F32, placement.moment_device());
    let (m, v) = (moment()?, moment()?);
    let _pinned = [placement.pin(&m)?, placement.pin(&v)?];
    let state = adamw_8bit::AdamW8bitState::new(&[0..LEN - 100, LEN - 100..LEN], placement)?;
    let created = now()?;
    let used = created.used_bytes.saturating_sub(before.used_bytes);
    ensure!(used <= rounded, "the moments use {used} bytes of the GPU's memory");
    let mut details = Vec::new();
    for (what, most) in [("f32", 8 * WINDOW), ("8 bits", 2 * WINDOW + 20 * WINDOW / 256 + 8 * 100)] {
        // Fill the memory up to its peak, so that the step raises the peak.
        let rest = now()?;
        let rest = (rest.peak_bytes - rest.used_bytes).max(1) as usize;
        let _ballast = zeros(rest, DType::U8, &bench.device)?;
        let before = now()?;
        if what == "f32" {
            let state = AdamWTensors { params: &params, m: &m, v: &v };
            adamw::step_in_windows(&ADAMW.coefficients(LR, 1, 1.0), state, &gradient, WINDOW)?;
        } else {
            state.step(&ADAMW.coefficients(LR, 1, 1.0), &params, &gradient)?;
        }
        let after = now()?;
        ensure!(after.used_bytes == before.used_bytes, "{what}: {before:?}, then {after:?}");
        let used = after.peak_bytes - before.peak_bytes;
        let fits = 0 < used && used <= most as u64 + rounded;
        ensure!(fits, "{what}: {used} bytes instead of {most}");
        details.push(format!("{what}: {used} bytes"));
    }
    Ok(details.join(", "))
}
