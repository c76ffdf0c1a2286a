//! The devices of the workers of a local run.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Result, anyhow, bail};
use clap::ValueEnum;
use lora_spec::DeviceSpec;

use crate::cuda::{
    ANSWER_LIMIT, Build, Candidate, Driver, MIN_CUDA_VERSION, ProbeQuery, candidates, version_text,
};
use crate::doctor::built_for_cuda;

/// Time limit for a worker on the CPU to connect.
const CPU_CONNECT_LIMIT: Duration = Duration::from_secs(60);
/// Time limit for a worker to open its GPU. Without NVIDIA's persistence daemon, the driver first
/// starts all GPUs. The driver also translates kernels that have no machine code for the GPU.
const OPEN_LIMIT: Duration = Duration::from_secs(120);

/// The value of `--device`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum DeviceChoice {
    /// GPUs if they can be used, else the CPU.
    Auto,
    /// The CPU.
    Cpu,
    /// GPUs.
    Cuda,
}

/// The devices of the workers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Fleet {
    /// The CPU, with this executable.
    Cpu,
    /// GPUs.
    Cuda(CudaFleet),
}

/// GPUs, and the worker program for them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct CudaFleet {
    /// A `lora-worker` that was built for CUDA.
    pub(crate) worker: PathBuf,
    pub(crate) gpus: usize,
}

impl Fleet {
    /// Chooses the devices. If `auto` does not use GPUs although `worker` was given, or a program
    /// was found that is not only for CPUs, the reason is printed to stderr.
    ///
    /// # Errors
    /// The reason why GPUs cannot be used, if `device` demands them.
    pub(crate) async fn choose(device: DeviceChoice, worker: Option<&Path>) -> Result<Self> {
        if device == DeviceChoice::Cpu {
            return Ok(Self::Cpu);
        }
        let workers = candidates(worker, ANSWER_LIMIT).await;
        let surprising = worker.is_some() || workers.iter().any(|worker| worker.build != Build::Cpu);
        match CudaFleet::from_candidates(&workers).await {
            Ok(fleet) => Ok(Self::Cuda(fleet)),
            Err(error) if device == DeviceChoice::Cuda => {
                Err(anyhow!("--device cuda: {error:#}; `loractl doctor` shows details"))
            }
            Err(error) => {
                if surprising {
                    eprintln!("on the CPU: {error:#}; `loractl doctor` shows details");
                }
                Ok(Self::Cpu)
            }
        }
    }

    /// The default number of workers: one on the CPU, or one for each GPU.
    pub(crate) fn size(&self) -> usize {
        match self {
            Self::Cpu => 1,
            Self::Cuda(fleet) => fleet.gpus,
        }
    }

    /// Time limit for workers to connect after their start. A worker on a GPU first loads CUDA's
    /// libraries, with the same time limit as the programs that [`Self::choose`] runs, and then
    /// opens its GPU.
    pub(crate) fn connect_limit(&self) -> Duration {
        match self {
            Self::Cpu => CPU_CONNECT_LIMIT,
            Self::Cuda(_) => ANSWER_LIMIT + OPEN_LIMIT,
        }
    }

    /// `cpu` or `cuda`.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Cuda(_) => "cuda",
        }
    }
}

impl CudaFleet {
    async fn from_candidates(workers: &[Candidate]) -> Result<Self> {
        let Some(Candidate { path, build: Build::Cuda { version } }) = built_for_cuda(workers) else {
            bail!("{}", without_worker(workers));
        };
        let ours = env!("CARGO_PKG_VERSION");
        if version != ours {
            bail!(
                "{} has version {version}, loractl has {ours}: install the same version of both",
                path.display()
            );
        }
        let driver: Driver =
            ProbeQuery::Driver.ask(ANSWER_LIMIT).await.map_err(|error| anyhow!("the driver: {error}"))?;
        if let Some(problem) = driver.problem {
            bail!("the driver: {problem}");
        }
        if driver.cuda < MIN_CUDA_VERSION {
            bail!(
                "the driver supports CUDA {}, workers need {}",
                version_text(driver.cuda),
                version_text(MIN_CUDA_VERSION)
            );
        }
        match driver.gpus.len() {
            0 => bail!("the driver reports no GPU"),
            gpus => Ok(Self { worker: path.clone(), gpus }),
        }
    }

    /// Returns the GPU of the worker with this number.
    pub(crate) fn device(&self, index: usize) -> DeviceSpec {
        DeviceSpec::Cuda(index % self.gpus)
    }

    /// Whether some GPU is shared if there are this many workers.
    pub(crate) fn is_shared_by(&self, workers: usize) -> bool {
        workers > self.gpus
    }
}

fn without_worker(workers: &[Candidate]) -> String {
    let broken = workers.iter().find_map(|worker| match &worker.build {
        Build::Unknown(why) => Some(format!("{} {why}", worker.path.display())),
        _ => None,
    });
    broken.unwrap_or_else(|| match workers {
        [] => "no lora-worker was found beside loractl or on PATH; build one with `--features cuda`".into(),
        [first, ..] => format!(
            "{} was not built for CUDA, and no other lora-worker beside loractl or on PATH was; build one \
             with `--features cuda`",
            first.path.display()
        ),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn candidate(build: Build) -> Candidate {
        Candidate { path: "/bin/lora-worker".into(), build }
    }

    #[test]
    fn workers_beyond_the_gpus_share_them() {
        let fleet = CudaFleet { worker: "/bin/lora-worker".into(), gpus: 2 };
        let devices: Vec<_> = (0..3).map(|index| fleet.device(index).to_string()).collect();
        assert_eq!(devices, ["cuda:0", "cuda:1", "cuda:0"]);
        assert_eq!([2, 3].map(|workers| fleet.is_shared_by(workers)), [false, true]);
        assert_eq!((Fleet::Cuda(fleet).size(), Fleet::Cpu.size()), (2, 1));
    }

    #[test]
    fn a_gpu_worker_has_longer_to_connect_than_a_program_has_to_answer() {
        let fleet = Fleet::Cuda(CudaFleet { worker: "/bin/lora-worker".into(), gpus: 1 });
        assert!(fleet.connect_limit() > ANSWER_LIMIT);
    }

    #[test]
    fn unsuitable_worker_programs_are_named() {
        assert!(without_worker(&[]).starts_with("no lora-worker was found"));
        let cpu = without_worker(&[candidate(Build::Cpu)]);
        assert!(cpu.starts_with("/bin/lora-worker was not built for CUDA"), "{cpu}");
        let broken = candidate(Build::Unknown("does not start: libnccl.so.2: no".into()));
        assert_eq!(
            without_worker(&[candidate(Build::Cpu), broken]),
            "/bin/lora-worker does not start: libnccl.so.2: no"
        );
    }

    #[tokio::test]
    async fn a_worker_of_another_version_is_refused() {
        let error = CudaFleet::from_candidates(&[candidate(Build::Cuda { version: "0.0.1".into() })])
            .await
            .unwrap_err();
        assert!(error.to_string().contains("has version 0.0.1"), "{error}");
    }
}
