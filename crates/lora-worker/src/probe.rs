//! Short readings of this machine's devices, which `loractl doctor` asks for.

use std::io::{self, BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use lora_collective::device::Collective;
use lora_collective::{Cancel, Group, GroupSpec, PeerListener};
use lora_spec::Device;
use lora_train::{
    AllReduceReading, ComputeDevice, DeviceReading, TrainError, all_reduce_reading, device_reading,
    open_device,
};
use serde::{Deserialize, Serialize};

use crate::parent::end_with_stdin;

/// Elements of the vector that is all-reduced: 64 MiB.
const ELEMENTS: usize = 16 << 20;
/// How long the processes of an all-reduce may take to find each other, and to wait for one.
const FORMING: Duration = Duration::from_secs(60);
/// How long a process that takes part may take to end when its parent is gone.
const FAREWELL: Duration = Duration::from_secs(5);

/// What a device is and does.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Reading {
    /// Its rates.
    #[serde(flatten)]
    pub rates: DeviceReading,
    /// None: it is the CPU.
    pub gpu: Option<GpuFacts>,
}

/// A GPU as a worker sees it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GpuFacts {
    /// Its name.
    pub name: String,
    /// Major and minor number.
    pub compute_capability: (i32, i32),
    /// Memory that nobody holds, in bytes.
    pub free_bytes: u64,
    /// Memory that it has, in bytes.
    pub total_bytes: u64,
}

/// Why there is no reading.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// The device, or the group.
    #[error(transparent)]
    Train(#[from] TrainError),
    /// The GPU says nothing of itself.
    #[error("the GPU's facts: {0}")]
    Gpu(String),
    /// The processes that take part, or their pipes.
    #[error("the processes of the all-reduce: {0}")]
    Io(#[from] io::Error),
    /// A process ended.
    #[error("rank {rank} failed; see above")]
    Rank {
        /// Which one.
        rank: usize,
    },
    /// A process took too long.
    #[error("rank {rank} gave no answer within {} s and was killed", .limit.as_secs_f64())]
    Hung {
        /// Which one.
        rank: usize,
        /// How long all of it may take.
        limit: Duration,
    },
}

/// Reads a device.
///
/// # Errors
/// It cannot be opened or does not compute.
pub fn read(device: Device) -> Result<Reading, ProbeError> {
    let device = open_device(device)?;
    // First: the rates take memory.
    let gpu = gpu_facts(&device)?;
    Ok(Reading { rates: device_reading(&device)?, gpu })
}

#[cfg(feature = "cuda")]
fn gpu_facts(device: &ComputeDevice) -> Result<Option<GpuFacts>, ProbeError> {
    let Some(stream) = lora_ops::cuda::stream(device).map_err(TrainError::from)? else { return Ok(None) };
    let context = stream.context();
    let memory = context.mem_get_info();
    let facts = memory.and_then(|memory| Ok((memory, context.name()?, context.compute_capability()?)));
    let ((free, total), name, compute_capability) =
        facts.map_err(|error| ProbeError::Gpu(error.to_string()))?;
    Ok(Some(GpuFacts { name, compute_capability, free_bytes: free as u64, total_bytes: total as u64 }))
}

#[cfg(not(feature = "cuda"))]
fn gpu_facts(_: &ComputeDevice) -> Result<Option<GpuFacts>, ProbeError> {
    Ok(None)
}

/// Number of GPUs that this build can use on this machine.
pub fn gpus() -> usize {
    #[cfg(feature = "cuda")]
    {
        lora_ops::cuda::devices()
    }
    #[cfg(not(feature = "cuda"))]
    {
        0
    }
}

/// Device of rank `rank` in an all-reduce. `auto`: the machine's `gpus` in turn, or the CPU if
/// there are none. `cuda:N`: the GPU of rank 0; the next ranks take the next ones.
pub fn device_of_rank(device: Device, gpus: usize, rank: usize) -> Device {
    match device {
        Device::Auto if gpus == 0 => Device::Cpu,
        Device::Auto => Device::Cuda(rank % gpus),
        Device::Cuda(first) => Device::Cuda(first + rank),
        Device::Cpu => Device::Cpu,
    }
}

/// All-reduces a vector among `ranks` processes, which `command` makes by their rank, each to call [`take_part`].
///
/// # Errors
/// One of them fails, or is not done within `limit`.
pub fn all_reduce(
    ranks: usize,
    limit: Duration,
    command: impl Fn(usize) -> Command,
) -> Result<AllReduceReading, ProbeError> {
    let deadline = Instant::now() + limit;
    let mut processes = Vec::new();
    for rank in 0..ranks {
        processes.push(Process::start(rank, command(rank))?);
    }
    let lines = |processes: &[Process]| {
        let line = |process: &Process| process.line(deadline, limit);
        processes.iter().map(line).collect::<Result<Vec<_>, _>>()
    };
    let addresses = lines(&processes)?;
    for process in &mut processes {
        process.tell(&addresses)?;
    }
    let answers = lines(&processes)?;
    let first = answers.first().map_or("", String::as_str);
    Ok(serde_json::from_str(first).map_err(io::Error::from)?)
}

/// The part of rank `rank` in [`all_reduce`]: tells its address on stdout, reads those of all from stdin, and tells what came out.
///
/// # Errors
/// The device, the group, or the pipes.
pub fn take_part(rank: usize, device: Device, collective: Collective) -> Result<(), ProbeError> {
    let device = open_device(device)?;
    let listener = PeerListener::bind("127.0.0.1:0")?;
    say(&listener.local_addr()?.to_string())?;
    let mut line = String::new();
    io::stdin().read_line(&mut line)?;
    let cancel = Cancel::new();
    let token = cancel.clone();
    end_with_stdin(move || {
        token.cancel();
        std::thread::sleep(FAREWELL);
        std::process::exit(1);
    })?;
    let peers: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
    let spec = GroupSpec {
        job: "probe".into(),
        generation: 1,
        rank,
        peers,
        token: "probe".into(),
        form_timeout: FORMING,
        timeout: FORMING,
    };
    let group = Group::form(&spec, Some(&listener), cancel).map_err(TrainError::from)?;
    let reading = all_reduce_reading(group, collective, &device, ELEMENTS)?;
    say(&serde_json::to_string(&reading).map_err(io::Error::from)?)?;
    Ok(())
}

fn say(line: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{line}")?;
    out.flush()
}

/// A process that takes part. Dropping it kills it.
struct Process {
    rank: usize,
    child: Child,
    stdin: ChildStdin,
    /// What it writes to stdout, until that ends.
    lines: mpsc::Receiver<io::Result<String>>,
}

impl Process {
    fn start(rank: usize, mut command: Command) -> io::Result<Self> {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let (Some(stdin), Some(stdout)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(io::Error::other("a process without pipes"));
        };
        let (sender, lines) = mpsc::channel();
        let process = Self { rank, child, stdin, lines };
        // A read cannot be given up: the thread ends with the process.
        std::thread::Builder::new().name("probe-reader".into()).spawn(move || {
            let _ = BufReader::new(stdout).lines().try_for_each(|line| sender.send(line));
        })?;
        Ok(process)
    }

    /// Its next line, which must come before `deadline`: `limit` after the start of all.
    fn line(&self, deadline: Instant, limit: Duration) -> Result<String, ProbeError> {
        let rank = self.rank;
        match self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(line) => Ok(line?),
            Err(RecvTimeoutError::Timeout) => Err(ProbeError::Hung { rank, limit }),
            Err(RecvTimeoutError::Disconnected) => Err(ProbeError::Rank { rank }),
        }
    }

    fn tell(&mut self, addresses: &[String]) -> io::Result<()> {
        writeln!(self.stdin, "{}", addresses.join(" "))?;
        self.stdin.flush()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The error of two processes that run `script` with their rank.
    fn error(limit: Duration, script: &str) -> String {
        let command = |rank: usize| {
            let mut command = Command::new("sh");
            command.args(["-c", script, "sh", &rank.to_string()]);
            command
        };
        all_reduce(2, limit, command).unwrap_err().to_string()
    }

    #[test]
    fn automatic_ranks_take_the_gpus_in_turn() {
        let devices = |device, gpus| [0, 1, 2].map(|rank| device_of_rank(device, gpus, rank).to_string());
        assert_eq!(devices(Device::Auto, 0), ["cpu"; 3]);
        assert_eq!(devices(Device::Auto, 1), ["cuda:0"; 3]);
        assert_eq!(devices(Device::Auto, 2), ["cuda:0", "cuda:1", "cuda:0"]);
        assert_eq!(devices(Device::Auto, 4), ["cuda:0", "cuda:1", "cuda:2"]);
        assert_eq!(devices(Device::Cuda(1), 0), ["cuda:1", "cuda:2", "cuda:3"]);
        assert_eq!(devices(Device::Cpu, 0), ["cpu"; 3]);
    }

    #[test]
    fn a_process_that_hangs_is_killed_at_the_limit() {
        let short = Duration::from_millis(200);
        let hangs = "echo address; read addresses; exec sleep 1000";
        assert_eq!(error(short, hangs), "rank 0 gave no answer within 0.2 s and was killed");
    }

    #[test]
    fn a_process_that_fails_is_named() {
        let long = Duration::from_secs(60);
        let fails = "echo address; read addresses; [ $1 = 0 ] && echo '{}' && exec sleep 1000; exit 1";
        assert_eq!(error(long, fails), "rank 1 failed; see above");
    }
}
