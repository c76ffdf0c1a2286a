//! Checks of a GPU's memory: copies wait for the GPU, and the pool releases unused memory if
//! needed.

use anyhow::{Context as _, Result, ensure};
use candle_core::{DType, Tensor};
use lora_ops::device::{MemoryUsage, memory};
use lora_ops::gemm::{no_trans, product};
use lora_ops::transfer::{from_vec, to_device, to_vec, zeros};

use crate::check::{Check, TestBench};

pub(crate) fn checks() -> Vec<Check> {
    vec![Check::new("copies wait for the GPU", copies_wait), Check::new("memory of many sizes", many_sizes)]
}

/// Bytes of the pool that an allocation of one byte uses.
pub(crate) fn pool_granularity(bench: &TestBench) -> Result<u64> {
    let before = now(bench)?.used_bytes;
    let _byte = zeros(1, DType::U8, &bench.device)?;
    Ok(now(bench)?.used_bytes - before)
}

fn now(bench: &TestBench) -> Result<MemoryUsage> {
    bench.device.synchronize()?;
    memory(&bench.device)?.context("the GPU's memory cannot be read")
}

/// Checks, at several sizes, that a copy to the host waits for queued work, and that the source of
/// a copy to the GPU can be freed at once.
fn copies_wait(bench: &TestBench) -> Result<String> {
    // On real hardware this is about 0.3 s of products: 1.1 TFLOP each, in f32 without TF32.
    let (side, products) = if now(bench)?.total_bytes >= 32 << 30 { (8192, 14) } else { (96, 3) };
    let ones = zeros((side, side), DType::F32, &bench.device)?;
    let sums = zeros((side, side), DType::F32, &bench.device)?;
    for (i, len) in [1_usize, 1000, 100_003, 3_000_000].into_iter().enumerate() {
        for _ in 0..products {
            product(1.0, no_trans(&ones), no_trans(&ones), 1.0, &sums)?;
        }
        let values: Vec<f32> = (0..len).map(|at| (at % 1021 + i) as f32).collect();
        let on_gpu = from_vec(values.clone(), len, &bench.device)?;
        let sum = lora_ops::pointwise::add_assign;
        sum(&on_gpu, &on_gpu)?;
        let back: Vec<f32> = to_vec(&on_gpu)?;
        let wrong = back.iter().zip(&values).position(|(got, value)| *got != 2.0 * value);
        ensure!(wrong.is_none(), "element {wrong:?} of {len} was read before it was computed");
        let copied = to_device(&to_device(&on_gpu, &candle_core::Device::Cpu)?, &bench.device)?;
        ensure!(to_vec::<f32>(&copied)? == back, "{len} elements differ after copies to the host and back");
    }
    Ok("at 4 sizes".into())
}

/// Allocates larger and larger tensors, one at a time. No tensor fits into the memory that an
/// earlier one left, and all together are larger than the GPU's memory.
fn many_sizes(bench: &TestBench) -> Result<String> {
    let before = now(bench)?;
    let free = before.free_bytes.saturating_sub(before.used_bytes);
    let mut most = 0;
    for eighths in 1..=6 {
        let bytes = (free / 8 * eighths) as usize;
        let tensor: Tensor = zeros(bytes / 4, DType::F32, &bench.device)
            .with_context(|| format!("allocating {bytes} of {free} free bytes"))?;
        drop(tensor);
        most = now(bench)?.reserved_bytes.max(most);
    }
    let after = now(bench)?;
    ensure!(after.used_bytes == before.used_bytes, "{before:?}, then {after:?}");
    ensure!(most <= after.total_bytes && after.reserved_bytes >= after.used_bytes, "{after:?}");
    // An allocation of the GPU's whole memory must fail with its size, and must not change the
    // memory in use.
    let failed = zeros((after.total_bytes / 4) as usize, DType::F32, &bench.device);
    let Err(error) = failed else { anyhow::bail!("an allocation of the GPU's whole memory succeeded") };
    let text = error.to_string();
    ensure!(text.contains("the GPU is out of memory: an allocation of"), "{text}");
    let last = now(bench)?;
    ensure!(last.used_bytes == before.used_bytes, "{before:?}, then {last:?}");
    // The pool was trimmed before the allocation failed.
    ensure!(last.reserved_bytes <= most, "{last:?}");
    Ok(format!("up to {} MiB reserved, {} MiB after a failure", most >> 20, last.reserved_bytes >> 20))
}
