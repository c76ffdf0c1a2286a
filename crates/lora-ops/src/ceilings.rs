//! Measured upper bounds of a device's speed: the rates of its matrix product library and of its
//! memory copies.

use candle_core::{DType, Device, Result};
use lora_spec::Philox;

use crate::DeviceTimestamp;
use crate::device::memory;
use crate::gemm::{no_trans, product};
use crate::random::uniform;
use crate::transfer::zeros;

/// Rows and columns of the product's matrices.
const PRODUCT_SIDE: usize = 8192;
/// Bytes of the copy.
const COPY_BYTES: usize = 4 << 30;
/// Runs before the measured ones.
const WARMUP_RUNS: usize = 3;
/// Measured runs; the result is their median.
const MEASURED_RUNS: usize = 7;

/// Measured rates of a device.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Ceilings {
    /// Rows and columns of the multiplied matrices, which are bf16 (f32 on the CPU).
    pub product_side: usize,
    /// Rate of that product, in 10^12 floating-point operations per second.
    pub tflop_s: f64,
    /// Size of the copy, in bytes.
    pub copy_bytes: usize,
    /// Bytes read and written by a copy inside the device's memory, in 10^9 bytes per second.
    pub gb_s: f64,
}

impl Ceilings {
    /// Measures `device` with a product of 8192 x 8192 matrices and a copy of 4 GiB. Both sizes are
    /// divided by `scale` (at least 1), and halved until they fit if a GPU has less free memory.
    pub fn measure(device: &Device, scale: usize) -> Result<Self> {
        let scale = scale.max(1);
        let free =
            memory(device)?.map_or(u64::MAX, |memory| memory.free_bytes.saturating_sub(memory.used_bytes));
        let fits = |bytes: usize| (bytes as u64) < free / 2;
        let mut product_side = (PRODUCT_SIDE / scale).max(16);
        while product_side > 16 && !fits(3 * 2 * product_side * product_side) {
            product_side /= 2;
        }
        let mut copy_bytes = (COPY_BYTES / scale).max(4);
        while copy_bytes > 4 && !fits(2 * copy_bytes) {
            copy_bytes /= 2;
        }
        let operations = 2.0 * (product_side as f64).powi(3);
        Ok(Self {
            product_side,
            tflop_s: operations / (product_milliseconds(device, product_side)? / 1e3) / 1e12,
            copy_bytes,
            gb_s: 2.0 * copy_bytes as f64 / (copy_milliseconds(device, copy_bytes)? / 1e3) / 1e9,
        })
    }
}

fn product_milliseconds(device: &Device, side: usize) -> Result<f64> {
    let dtype = if device.is_cpu() { DType::F32 } else { DType::BF16 };
    // Random elements, not zeros: a GPU's clock depends on how many bits change.
    let matrix = |name| uniform((side, side), 1.0, dtype, &Philox::new(0, name), device);
    let (a, b, c) = (matrix("a")?, matrix("b")?, matrix("c")?);
    median_milliseconds(device, || product(1.0, no_trans(&a), no_trans(&b), 0.0, &c))
}

fn copy_milliseconds(device: &Device, bytes: usize) -> Result<f64> {
    let from = zeros(bytes / size_of::<f32>(), DType::F32, device)?;
    median_milliseconds(device, || from.copy().map(drop))
}

fn median_milliseconds(device: &Device, run: impl Fn() -> Result<()>) -> Result<f64> {
    for _ in 0..WARMUP_RUNS {
        run()?;
    }
    let mut timestamps = vec![DeviceTimestamp::now(device)?];
    for _ in 0..MEASURED_RUNS {
        run()?;
        timestamps.push(DeviceTimestamp::now(device)?);
    }
    let mut times = timestamps
        .windows(2)
        .map(|pair| pair[0].milliseconds_until(&pair[1]))
        .collect::<Result<Vec<f64>>>()?;
    times.sort_by(f64::total_cmp);
    Ok(times[MEASURED_RUNS / 2])
}
