//! Short measurements of this machine's devices for `loractl doctor`.

mod message;
mod ranks;

use std::io;
use std::time::Duration;

use lora_collective::backend_choice::Collective;
use lora_collective::{CancelToken, Group, GroupSpec, PeerListener};
use lora_spec::DeviceSpec;
use lora_train::{
    DeviceMeasurement, TrainError, gpu_properties, measure_all_reduce, measure_device, open_device,
};
use serde::{Deserialize, Serialize};

use crate::end_with_stdin::end_with_stdin;
use message::RankMessage;

pub use ranks::{RankFailure, all_reduce};

/// Elements of the vector that is all-reduced: 64 MiB.
const ALL_REDUCE_ELEMENTS: usize = 16 << 20;
/// The limit of the all-reduce divided by this number is the time that a rank waits for its peers,
/// so that the rank reports which peer is missing before it is killed.
const WAITS_IN_LIMIT: u32 = 3;
/// How long a rank's process may take to end after its parent has ended.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(5);

/// The properties and measured rates of a device.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ProbeReport {
    /// The measured rates.
    #[serde(flatten)]
    pub rates: DeviceMeasurement,
    /// The properties of a GPU. `None` for the CPU.
    pub gpu: Option<GpuFacts>,
}

/// Properties of a GPU, as the driver reports them to a worker.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GpuFacts {
    /// The name of the model.
    pub name: String,
    /// Major and minor number.
    pub compute_capability: (i32, i32),
    /// Memory that no process uses, in bytes.
    pub free_bytes: u64,
    /// All of its memory, in bytes.
    pub total_bytes: u64,
}

/// The reason why a measurement failed.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// An error of the device or of the group.
    #[error(transparent)]
    Train(#[from] TrainError),
    /// An error of the ranks' processes or their pipes.
    #[error("the processes of the all-reduce: {0}")]
    Io(#[from] io::Error),
    /// Ranks of an all-reduce failed, in this order.
    #[error("{}", joined(.0, "; "))]
    Failed(Vec<RankFailure>),
    /// Ranks of an all-reduce took too long and were killed.
    #[error("no answer within {} s from rank {}", .limit.as_secs_f64(), joined(.ranks, ", "))]
    Hung {
        /// Ranks without an answer.
        ranks: Vec<usize>,
        /// Limit of the whole all-reduce.
        limit: Duration,
    },
}

fn joined<T: ToString>(items: &[T], separator: &str) -> String {
    items.iter().map(T::to_string).collect::<Vec<_>>().join(separator)
}

/// Measures a device.
///
/// # Errors
/// The device cannot be opened or does not compute.
pub fn read(device: DeviceSpec) -> Result<ProbeReport, ProbeError> {
    let device = open_device(device)?;
    // This comes first because measuring the rates takes memory.
    let gpu = gpu_properties(&device)?.map(|gpu| GpuFacts {
        name: gpu.name,
        compute_capability: gpu.compute_capability,
        free_bytes: gpu.free_bytes,
        total_bytes: gpu.total_bytes,
    });
    Ok(ProbeReport { rates: measure_device(&device)?, gpu })
}

/// The device of rank `rank` in an all-reduce. For `auto`: the machine's `gpus` round-robin, or the
/// CPU if there are none. For `cuda:N`: GPU `N` for rank 0 and the following GPUs for the next
/// ranks.
pub fn device_of_rank(device: DeviceSpec, gpus: usize, rank: usize) -> DeviceSpec {
    match device {
        DeviceSpec::Auto if gpus == 0 => DeviceSpec::Cpu,
        DeviceSpec::Auto => DeviceSpec::Cuda(rank % gpus),
        DeviceSpec::Cuda(first) => DeviceSpec::Cuda(first + rank),
        DeviceSpec::Cpu => DeviceSpec::Cpu,
    }
}

/// Runs rank `rank` of [`all_reduce`]: writes its address to stdout, reads the addresses of all
/// ranks from stdin, and writes its measurement to stdout. `limit` is the limit of the whole
/// all-reduce.
///
/// # Errors
/// An error of the device, of the group, or of the pipes.
pub fn run_rank(
    rank: usize,
    device: DeviceSpec,
    collective: Collective,
    limit: Duration,
) -> Result<(), ProbeError> {
    let device = open_device(device)?;
    let listener = PeerListener::bind("127.0.0.1:0")?;
    RankMessage::Address(listener.local_addr()?.to_string()).send()?;
    let mut line = String::new();
    io::stdin().read_line(&mut line)?;
    let cancel = CancelToken::new();
    let token = cancel.clone();
    end_with_stdin(move || {
        token.cancel();
        std::thread::sleep(SHUTDOWN_TIMEOUT);
        std::process::exit(1);
    })?;
    let peers: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
    let spec = GroupSpec {
        job: "probe".into(),
        generation: 1,
        rank,
        peers,
        token: "probe".into(),
        form_timeout: limit / WAITS_IN_LIMIT,
        timeout: limit / WAITS_IN_LIMIT,
    };
    let group = Group::form(&spec, Some(&listener), cancel).map_err(TrainError::from)?;
    let reading = measure_all_reduce(group, collective, &device, ALL_REDUCE_ELEMENTS)?;
    Ok(RankMessage::Reading(reading).send()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn auto_ranks_are_assigned_gpus_round_robin() {
        let devices = |device, gpus| [0, 1, 2].map(|rank| device_of_rank(device, gpus, rank).to_string());
        assert_eq!(devices(DeviceSpec::Auto, 0), ["cpu"; 3]);
        assert_eq!(devices(DeviceSpec::Auto, 1), ["cuda:0"; 3]);
        assert_eq!(devices(DeviceSpec::Auto, 2), ["cuda:0", "cuda:1", "cuda:0"]);
        assert_eq!(devices(DeviceSpec::Auto, 4), ["cuda:0", "cuda:1", "cuda:2"]);
        assert_eq!(devices(DeviceSpec::Cuda(1), 0), ["cuda:1", "cuda:2", "cuda:3"]);
        assert_eq!(devices(DeviceSpec::Cpu, 0), ["cpu"; 3]);
    }
}
