//! Short readings of this machine's devices, which `loractl doctor` asks for.

use std::io::{self, BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

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

/// All-reduces a vector among `ranks` processes, which `command` makes by their rank, each to call [`take_part`].
///
/// # Errors
/// One of them fails.
pub fn all_reduce(ranks: usize, command: impl Fn(usize) -> Command) -> Result<AllReduceReading, ProbeError> {
    let mut processes = Vec::new();
    for rank in 0..ranks {
        processes.push(Process::start(rank, command(rank))?);
    }
    let addresses = processes.iter_mut().map(Process::line).collect::<Result<Vec<_>, _>>()?;
    for process in &mut processes {
        process.tell(&addresses)?;
    }
    let answers = processes.iter_mut().map(Process::line).collect::<Result<Vec<_>, _>>()?;
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
    stdout: BufReader<ChildStdout>,
}

impl Process {
    fn start(rank: usize, mut command: Command) -> io::Result<Self> {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let (Some(stdin), Some(stdout)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(io::Error::other("a process without pipes"));
        };
        Ok(Self { rank, child, stdin, stdout: BufReader::new(stdout) })
    }

    /// Its next line.
    fn line(&mut self) -> Result<String, ProbeError> {
        let mut line = String::new();
        if self.stdout.read_line(&mut line)? == 0 {
            return Err(ProbeError::Rank { rank: self.rank });
        }
        Ok(line.trim_end().to_owned())
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
