//! The report as data for JSON and YAML.

use std::path::PathBuf;

use lora_spec::DeviceSpec;
use lora_train::{AllReduceMeasurement, DeviceMeasurement};
use lora_worker::probe::{ProbeError, ProbeReport, read};
use serde::Serialize;

use super::remedies::{Environment, Problem, problems};
use crate::cuda::{Build, Candidate, ChildError, Driver, LIBRARIES, Loaded, version_text};

/// What this machine can train on, and what it lacks.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    pub(crate) cpu: CpuView,
    /// `None` if CUDA was not examined.
    pub(crate) cuda: Option<CudaView>,
}

/// The CPU, on which every machine can train.
#[derive(Debug, Serialize)]
pub(crate) struct CpuView {
    pub(crate) threads: usize,
    /// The measurements of this process.
    pub(crate) reading: DeviceMeasurement,
}

/// The state of CUDA and of the GPUs.
#[derive(Debug, Serialize)]
pub(crate) struct CudaView {
    /// Whether `loractl run --device cuda` has what it needs.
    pub(crate) works: bool,
    pub(crate) driver: Option<DriverView>,
    pub(crate) gpus: Vec<GpuView>,
    /// Pairs of GPU numbers; the first GPU of a pair can access the memory of the second.
    pub(crate) peers: Vec<(usize, usize)>,
    pub(crate) libraries: Vec<LibraryView>,
    pub(crate) workers: Vec<WorkerProgramView>,
    /// Measurement of an all-reduce among all GPUs, if there are several.
    pub(crate) all_reduce: Option<AllReduceMeasurement>,
    /// The problems that prevent training on GPUs.
    pub(crate) problems: Vec<Problem>,
}

/// The driver.
#[derive(Debug, Serialize)]
pub(crate) struct DriverView {
    /// Version of the kernel module.
    pub(crate) version: Option<String>,
    /// The newest CUDA version that the driver supports.
    pub(crate) cuda: String,
    pub(crate) path: Option<PathBuf>,
}

/// A GPU.
#[derive(Debug, Serialize)]
pub(crate) struct GpuView {
    pub(crate) name: String,
    pub(crate) memory_bytes: u64,
    pub(crate) compute_capability: String,
    /// The measurements of a worker.
    pub(crate) reading: Option<ProbeReport>,
}

/// A library of CUDA.
#[derive(Debug, Serialize)]
pub(crate) struct LibraryView {
    pub(crate) name: &'static str,
    pub(crate) file: &'static str,
    /// Whether training needs it.
    pub(crate) needed: bool,
    /// Whether it can be loaded.
    pub(crate) loads: bool,
    pub(crate) version: Option<String>,
    pub(crate) path: Option<PathBuf>,
}

/// A program `lora-worker`.
#[derive(Debug, Serialize)]
pub(crate) struct WorkerProgramView {
    pub(crate) path: PathBuf,
    /// `cuda` or `cpu`; `None` if the program does not report its build.
    pub(crate) build: Option<&'static str>,
}

impl Report {
    /// The report without CUDA and GPUs.
    pub(super) fn cpu_only() -> Result<Self, ProbeError> {
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let reading = read(DeviceSpec::Cpu)?.rates;
        Ok(Self { cpu: CpuView { threads, reading }, cuda: None })
    }

    /// The whole report; `libraries` are in the order of [`LIBRARIES`], `readings` in that of the
    /// GPUs.
    pub(super) fn new(
        driver: Result<Driver, ChildError>,
        libraries: Vec<Result<Loaded, ChildError>>,
        workers: Vec<Candidate>,
        readings: Vec<Result<ProbeReport, ChildError>>,
        all_reduce: Option<Result<AllReduceMeasurement, ChildError>>,
    ) -> Result<Self, ProbeError> {
        let environment = Environment::detect();
        let found = problems(&driver, &libraries, &workers, &readings, all_reduce.as_ref(), &environment);
        let (driver, devices, peers) = match driver {
            Ok(Driver { path, cuda, version, gpus, peers, .. }) => {
                (Some(DriverView { version, cuda: version_text(cuda), path }), gpus, peers)
            }
            Err(_) => (None, Vec::new(), Vec::new()),
        };
        let mut readings = readings.into_iter();
        let gpus = devices.into_iter().map(|gpu| GpuView {
            name: gpu.name,
            memory_bytes: gpu.memory_bytes,
            compute_capability: format!("{}.{}", gpu.compute_capability.0, gpu.compute_capability.1),
            reading: readings.next().and_then(Result::ok),
        });
        let libraries = LIBRARIES.iter().zip(libraries).map(|(library, loaded)| {
            let loaded = loaded.ok();
            LibraryView {
                name: library.name,
                file: library.file,
                needed: library.needed,
                loads: loaded.is_some(),
                version: loaded.as_ref().and_then(|loaded| loaded.version.clone()),
                path: loaded.and_then(|loaded| loaded.path),
            }
        });
        let workers = workers.into_iter().map(|Candidate { path, build }| WorkerProgramView {
            path,
            build: match build {
                Build::Cuda { .. } => Some("cuda"),
                Build::Cpu => Some("cpu"),
                Build::Unknown(_) => None,
            },
        });
        let cuda = CudaView {
            works: found.is_empty(),
            driver,
            gpus: gpus.collect(),
            peers,
            libraries: libraries.collect(),
            workers: workers.collect(),
            all_reduce: all_reduce.and_then(Result::ok),
            problems: found,
        };
        Ok(Self { cuda: Some(cuda), ..Self::cpu_only()? })
    }
}
