//! Measurements of a worker's device for `loractl doctor`: its description, the speed of matrix
//! products and of its memory, and the speed of an all-reduce.

use std::time::Instant;

use candle_core::{DType, Tensor};
use lora_collective::Group;
use lora_collective::backend_choice::{Collective, CollectiveBackend};
use lora_collective::tree::{NodeId, nodes_in};
use lora_ops::device::{StreamEvent, describe};
use lora_ops::gemm::{no_trans, product};
use lora_ops::pointwise::add_assign;
use lora_ops::transfer::{from_vec, to_device, to_vec, zeros};
use serde::{Deserialize, Serialize};

use crate::device::ComputeDevice;
use crate::error::TrainError;
use crate::gradient_reducer::GradientSums;
use crate::partition::Partition;
use crate::process_group::ProcessGroup;

/// Rows and columns of the timed matrix products; see [`time_largest`].
const PRODUCT_SIDES: [usize; 4] = [512, 1024, 2048, 4096];
/// Numbers of elements of the f32 vectors that are added; see [`time_largest`].
const VECTOR_LENGTHS: [usize; 4] = [1 << 20, 4 << 20, 16 << 20, 64 << 20];
/// Shortest time, in seconds, that is measured precisely enough.
const MIN_TIMED_SECONDS: f64 = 0.01;
/// Number of timed runs. Their median is reported.
const TIMED_RUNS: usize = 9;

/// The speed of a device.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DeviceMeasurement {
    /// The device, as in [`crate::numerics_id`].
    pub device: String,
    /// Rows and columns of the multiplied matrices, which are bf16 on a GPU and f32 on the CPU.
    pub product_side: usize,
    /// Speed of products of these matrices, in 10^12 floating-point operations per second.
    pub product_tflops: f64,
    /// Speed of `a += b` of long f32 vectors, in 10^9 bytes read and written per second.
    pub memory_gb_s: f64,
}

/// The speed of an all-reduce.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AllReduceMeasurement {
    /// `nccl` or `tcp`.
    pub through: String,
    /// Why it is `tcp` although the group's machines have several GPUs, and the remedy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fallback: Option<String>,
    /// Number of ranks.
    pub world_size: usize,
    /// Size of one rank's vector in bytes.
    pub bytes: u64,
    /// Median time of a run.
    pub seconds: f64,
}

/// Measures matrix products and memory of `device`.
pub fn measure_device(device: &ComputeDevice) -> Result<DeviceMeasurement, TrainError> {
    let dtype = if device.is_cpu() { DType::F32 } else { DType::BF16 };
    let (product_side, seconds) = time_largest(device, &PRODUCT_SIDES, |side| {
        let random = || {
            let random = Tensor::rand(-1.0_f32, 1.0, (side, side), &ComputeDevice::Cpu)?.to_dtype(dtype)?;
            to_device(&random, device)
        };
        let (a, b, c) = (random()?, random()?, zeros((side, side), dtype, device)?);
        Ok(move || Ok(product(1.0, no_trans(&a), no_trans(&b), 0.0, &c)?))
    })?;
    let product_tflops = 2.0 * (product_side as f64).powi(3) / seconds / 1e12;
    let (length, seconds) = time_largest(device, &VECTOR_LENGTHS, |length| {
        let vector = || zeros(length, DType::F32, device);
        let (x, y) = (vector()?, vector()?);
        Ok(move || Ok(add_assign(&x, &y)?))
    })?;
    let memory_gb_s = 12.0 * length as f64 / seconds / 1e9;
    Ok(DeviceMeasurement { device: describe(device)?, product_side, product_tflops, memory_gb_s })
}

/// Measures the sum of the ranks' vectors, of `elements` f32 each, over the ranks of `group`.
pub fn measure_all_reduce(
    group: Group,
    collective: Collective,
    device: &ComputeDevice,
    elements: usize,
) -> Result<AllReduceMeasurement, TrainError> {
    let (rank, world_size) = (group.rank(), group.world_size());
    let mut process_group = ProcessGroup::new(group, &collective.into(), device)?;
    let partition = Partition::new(world_size, world_size)?;
    let ids = nodes_in(world_size, &partition.range(rank))?;
    let (node, out) =
        (from_vec(vec![1.0_f32; elements], elements, device)?, zeros(elements, DType::F32, device)?);
    let nodes: Vec<(NodeId, Tensor)> = ids.into_iter().map(|id| (id, node.clone())).collect();
    let all = GradientSums { partition: &partition, nodes: &nodes, out: &out };
    let through = match process_group.backend() {
        CollectiveBackend::Nccl => "nccl",
        CollectiveBackend::Tcp | CollectiveBackend::Fallback(_) => "tcp",
    };
    let fallback = process_group.fallback().map(str::to_owned);
    let mut run = || {
        process_group.block_ready(&all)?;
        process_group.finish_reduction(&all).map(drop)
    };
    time(device, 1, &mut run)?;
    let seconds = median(|| time(device, 1, &mut run))?;
    let sums: Vec<f32> = to_vec(&out)?;
    if let Some(wrong) = sums.iter().find(|sum| **sum != world_size as f32) {
        let message = format!("the sum of {world_size} ones is {wrong}, not {world_size}");
        return Err(candle_core::Error::Msg(message).into());
    }
    Ok(AllReduceMeasurement {
        through: through.to_owned(),
        fallback,
        world_size,
        bytes: 4 * elements as u64,
        seconds,
    })
}

/// Times the closure that `make` returns for a size. The first of `sizes` is used whose run takes
/// at least [`MIN_TIMED_SECONDS`], or else the last one. Returns this size and the seconds of a
/// run.
fn time_largest<R: FnMut() -> Result<(), TrainError>>(
    device: &ComputeDevice,
    sizes: &[usize],
    make: impl Fn(usize) -> Result<R, TrainError>,
) -> Result<(usize, f64), TrainError> {
    let mut sizes = sizes.iter().copied().peekable();
    while let Some(size) = sizes.next() {
        let mut run = make(size)?;
        time(device, 1, &mut run)?;
        let once = time(device, 1, &mut run)?;
        if once >= MIN_TIMED_SECONDS || sizes.peek().is_none() {
            // Several runs in a row, so that the wait for their end is negligible.
            let together = (MIN_TIMED_SECONDS / once).clamp(1.0, 20.0) as usize;
            return Ok((size, median(|| time(device, together, &mut run))?));
        }
    }
    Ok((0, f64::INFINITY))
}

/// Returns the median of [`TIMED_RUNS`] times.
fn median(mut time: impl FnMut() -> Result<f64, TrainError>) -> Result<f64, TrainError> {
    let mut seconds = (0..TIMED_RUNS).map(|_| time()).collect::<Result<Vec<f64>, TrainError>>()?;
    seconds.sort_by(f64::total_cmp);
    Ok(seconds[TIMED_RUNS / 2])
}

/// Times `runs` runs in a row and returns the seconds of one of them.
fn time(
    device: &ComputeDevice,
    runs: usize,
    mut run: impl FnMut() -> Result<(), TrainError>,
) -> Result<f64, TrainError> {
    let started = Instant::now();
    for _ in 0..runs {
        run()?;
    }
    if let Some(mark) = StreamEvent::record(device)? {
        mark.wait()?;
    }
    Ok(started.elapsed().as_secs_f64() / runs as f64)
}
