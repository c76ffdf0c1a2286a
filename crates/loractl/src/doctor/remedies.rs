//! Problems that prevent training on GPUs, and their remedies.

use std::path::{Path, PathBuf};

use lora_train::AllReduceMeasurement;
use lora_worker::probe::ProbeReport;
use serde::Serialize;

use super::built_for_cuda;
use crate::cuda::{
    Build, Candidate, ChildError, Driver, DriverGpu, LIBRARIES, Library, Loaded, MIN_CUDA_VERSION,
    find_unsearched, version_text,
};

/// Lowest compute capability that the kernels are compiled for.
const MIN_COMPUTE_CAPABILITY: (i32, i32) = (8, 0);

const INSTALL_DRIVER: &str = "install NVIDIA's driver 580 or newer (Ubuntu: apt install nvidia-driver-580; \
                              Debian: cuda-drivers, from NVIDIA's repository) and restart the machine";

/// A problem and its remedy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Problem {
    pub(crate) what: String,
    pub(crate) remedy: String,
}

/// Facts about this machine that decide on remedies.
#[derive(Debug, Clone)]
pub(super) struct Environment {
    /// Whether this process runs in a container.
    pub(super) container: bool,
    /// Whether NVIDIA's device files exist.
    pub(super) device_files: bool,
    /// Whether there is an NVIDIA GPU on the PCI bus.
    pub(super) on_the_bus: bool,
    /// Finds the directory of a library outside of the loader's search path.
    pub(super) find_unsearched: fn(&str) -> Option<PathBuf>,
}

impl Environment {
    /// Detects the environment of this process.
    pub(super) fn detect() -> Self {
        let files = ["/.dockerenv", "/run/.containerenv"];
        Self {
            container: files.iter().any(|file| Path::new(file).exists())
                || std::env::var_os("KUBERNETES_SERVICE_HOST").is_some(),
            device_files: Path::new("/dev/nvidiactl").exists(),
            on_the_bus: on_the_bus(),
            find_unsearched,
        }
    }
}

/// Whether the PCI bus has a display or 3D controller of NVIDIA.
fn on_the_bus() -> bool {
    let devices = std::fs::read_dir("/sys/bus/pci/devices").into_iter().flatten().flatten();
    let word = |path: PathBuf| std::fs::read_to_string(path).unwrap_or_default();
    devices.map(|device| device.path()).any(|device| {
        word(device.join("vendor")).trim() == "0x10de" && word(device.join("class")).starts_with("0x03")
    })
}

/// Returns all problems that prevent training on GPUs; none if it works.
pub(super) fn problems(
    driver: &Result<Driver, ChildError>,
    libraries: &[Result<Loaded, ChildError>],
    workers: &[Candidate],
    readings: &[Result<ProbeReport, ChildError>],
    all_reduce: Option<&Result<AllReduceMeasurement, ChildError>>,
    environment: &Environment,
) -> Vec<Problem> {
    let mut problems: Vec<Problem> = check_driver(driver, environment).into_iter().collect();
    let gpus = driver.as_ref().map_or(&[][..], |driver| &driver.gpus);
    problems.extend(gpus.iter().enumerate().filter_map(|(number, gpu)| check_gpu(number, gpu)));
    problems.extend(check_libraries(libraries, environment));
    problems.extend(check_workers(workers));
    for (number, reading) in readings.iter().enumerate() {
        if let Err(error) = reading {
            problems.push(Problem {
                what: format!("GPU {number}: the worker's probe: {error}"),
                remedy: "if the libraries above are in order, nvidia-smi shows the state of the GPU, and \
                         dmesg the errors of the driver"
                    .into(),
            });
        }
    }
    if let Some(Err(error)) = all_reduce {
        let program = built_for_cuda(workers).map_or(Path::new("lora-worker"), |worker| &worker.path);
        problems.push(Problem {
            what: format!("all-reduce among the GPUs' workers: {error}"),
            remedy: format!(
                "NCCL_DEBUG=INFO {} probe --device cuda --all-reduce {} shows NCCL's log; workers with \
                 the setting collective = tcp (loractl run: --collective tcp) do not need NCCL",
                program.display(),
                gpus.len()
            ),
        });
    }
    problems
}

fn check_driver(driver: &Result<Driver, ChildError>, environment: &Environment) -> Option<Problem> {
    let (what, remedy) = match driver {
        Ok(Driver { cuda, version, .. }) if *cuda < MIN_CUDA_VERSION => {
            let version = version.as_ref().map_or(String::new(), |version| format!(" {version}"));
            let (supported, needed) = (version_text(*cuda), version_text(MIN_CUDA_VERSION));
            let what = format!(
                "the driver{version} is too old: it supports CUDA {supported}, workers need {needed}"
            );
            (what, format!("{INSTALL_DRIVER}{}", if environment.container { ", on the host" } else { "" }))
        }
        Ok(Driver { problem: Some(problem), .. }) => {
            (format!("the driver cannot be used: {problem}"), remedy_without_gpu(environment))
        }
        Ok(Driver { gpus, .. }) if gpus.is_empty() => {
            ("the driver reports no GPU".into(), remedy_without_gpu(environment))
        }
        Ok(_) => return None,
        Err(ChildError::Failed(error)) => {
            (format!("the driver's library cannot be loaded: {error}"), remedy_without_driver(environment))
        }
        Err(error) => (
            format!("the driver {error}"),
            "nvidia-smi and dmesg show the cause; if the driver hangs, restart the machine".into(),
        ),
    };
    Some(Problem { what, remedy })
}

fn remedy_without_gpu(environment: &Environment) -> String {
    if std::env::var_os("CUDA_VISIBLE_DEVICES").is_some() {
        return "CUDA_VISIBLE_DEVICES is set: this process sees only the GPUs that it lists".into();
    }
    if environment.container && !environment.device_files {
        return IN_CONTAINER.into();
    }
    "nvidia-smi shows whether the driver finds a GPU; after an update of the driver, restart the machine"
        .into()
}

fn remedy_without_driver(environment: &Environment) -> String {
    if let Some(directory) = (environment.find_unsearched)("libcuda.so.1") {
        return ld_library_path(&[directory]);
    }
    match (environment.container, environment.device_files, environment.on_the_bus) {
        (true, true, _) => "the container has the device files of the GPU without the driver's libraries: \
             NVIDIA_DRIVER_CAPABILITIES must include compute, such as compute,utility"
            .into(),
        (true, false, _) => IN_CONTAINER.into(),
        (false, _, true) | (false, true, _) => INSTALL_DRIVER.into(),
        (false, false, false) => {
            format!("no NVIDIA GPU was found in this machine; if it has one: {INSTALL_DRIVER}")
        }
    }
}

const IN_CONTAINER: &str = "this container has no GPU: start it with `docker run --gpus all` (the host needs \
                            the driver and NVIDIA's container toolkit), with the compose file's profile gpu, \
                            or on Kubernetes with the limit nvidia.com/gpu";

fn check_gpu(number: usize, gpu: &DriverGpu) -> Option<Problem> {
    let (major, minor) = gpu.compute_capability;
    (gpu.compute_capability < MIN_COMPUTE_CAPABILITY).then(|| Problem {
        what: format!("GPU {number}, {}, is too old: its compute capability is {major}.{minor}", gpu.name),
        remedy: format!(
            "use a GPU with at least {}.{} (Ampere); CUDA_VISIBLE_DEVICES can hide this one from workers",
            MIN_COMPUTE_CAPABILITY.0, MIN_COMPUTE_CAPABILITY.1
        ),
    })
}

fn check_libraries(libraries: &[Result<Loaded, ChildError>], environment: &Environment) -> Vec<Problem> {
    let mut problems = Vec::new();
    let (mut missing, mut unsearched): (Vec<&Library>, Vec<(&Library, PathBuf)>) = Default::default();
    for (library, loaded) in LIBRARIES.iter().zip(libraries).filter(|(library, _)| library.needed) {
        match loaded {
            Ok(_) => {}
            // The loader's message for a file that does not exist.
            Err(ChildError::Failed(error))
                if error.starts_with(&format!("{}: cannot open", library.file)) =>
            {
                match (environment.find_unsearched)(library.file) {
                    Some(directory) => unsearched.push((library, directory)),
                    None => missing.push(library),
                }
            }
            Err(error) => problems.push(Problem {
                what: format!("{}: {}: {error}", library.name, library.file),
                remedy: format!("reinstall it: {}", packages(&[library])),
            }),
        }
    }
    let names = |libraries: &[&Library]| {
        libraries
            .iter()
            .map(|library| format!("{} ({})", library.name, library.file))
            .collect::<Vec<_>>()
            .join(", ")
    };
    if !missing.is_empty() {
        problems
            .push(Problem { what: format!("not found: {}", names(&missing)), remedy: packages(&missing) });
    }
    if !unsearched.is_empty() {
        let (found, directories): (Vec<&Library>, Vec<PathBuf>) = unsearched.into_iter().unzip();
        problems.push(Problem {
            what: format!("outside of the loader's search path: {}", names(&found)),
            remedy: ld_library_path(&directories),
        });
    }
    problems
}

/// Returns the commands that install `libraries`.
fn packages(libraries: &[&Library]) -> String {
    let list = |name: fn(&Library) -> &'static str, quote: &str| {
        let mut names: Vec<String> =
            libraries.iter().map(|library| format!("{quote}{}{quote}", name(library))).collect();
        names.dedup();
        names.join(" ")
    };
    format!(
        "Debian or Ubuntu, with NVIDIA's repository: apt install {}\n\
         any Linux, in a virtual environment: pip install {}; then run doctor in this environment, which \
         prints the LD_LIBRARY_PATH",
        list(|library| library.package, ""),
        list(|library| library.wheel, "'")
    )
}

fn ld_library_path(directories: &[PathBuf]) -> String {
    let mut directories: Vec<String> =
        directories.iter().map(|directory| directory.display().to_string()).collect();
    directories.dedup();
    format!("export LD_LIBRARY_PATH={}${{LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}}", directories.join(":"))
}

fn check_workers(workers: &[Candidate]) -> Vec<Problem> {
    let ours = env!("CARGO_PKG_VERSION");
    let install = "build it (cargo build --release -p lora-worker --features cuda, which needs CUDA's nvcc) \
                   and put it beside loractl or on PATH, or name it with --worker";
    if let Some(Candidate { path, build: Build::Cuda { version } }) = built_for_cuda(workers) {
        let other = version != ours;
        let what = || format!("{} has version {version}, loractl has {ours}", path.display());
        return other
            .then(|| Problem { what: what(), remedy: "install the same version of both".into() })
            .into_iter()
            .collect();
    }
    let broken = workers.iter().filter_map(|worker| match &worker.build {
        Build::Unknown(why) => Some(Problem {
            what: format!("{} {why}", worker.path.display()),
            remedy: "it starts once the libraries above are found; if they are found, reinstall it".into(),
        }),
        _ => None,
    });
    let broken: Vec<Problem> = broken.collect();
    if !broken.is_empty() {
        return broken;
    }
    let what = match workers.first() {
        Some(worker) => {
            format!("no lora-worker was built for CUDA; {} supports only CPUs", worker.path.display())
        }
        None => "no lora-worker that was built for CUDA was found".into(),
    };
    vec![Problem { what, remedy: install.into() }]
}

#[cfg(test)]
mod tests {
    use super::*;

    const HERE: Environment =
        Environment { container: false, device_files: true, on_the_bus: true, find_unsearched: |_| None };

    fn driver() -> Driver {
        let gpu =
            DriverGpu { name: "NVIDIA H200".into(), memory_bytes: 150 << 30, compute_capability: (9, 0) };
        let version = Some("580.95.05".into());
        Driver { path: None, cuda: 13_000, version, gpus: vec![gpu], peers: Vec::new(), problem: None }
    }

    fn failed(text: &str) -> ChildError {
        ChildError::Failed(text.into())
    }

    /// The problem with this driver.
    fn driver_problem(driver: Result<Driver, ChildError>, environment: &Environment) -> Problem {
        check_driver(&driver, environment).unwrap()
    }

    fn loaded() -> Result<Loaded, ChildError> {
        Ok(Loaded { version: None, path: None })
    }

    fn missing(file: &str) -> Result<Loaded, ChildError> {
        Err(failed(&format!("{file}: cannot open shared object file: No such file or directory")))
    }

    #[test]
    fn a_working_installation_has_no_problems() {
        let worker = Build::Cuda { version: env!("CARGO_PKG_VERSION").into() };
        let workers = [Candidate { path: "/bin/lora-worker".into(), build: worker }];
        let mut libraries: Vec<_> = LIBRARIES.iter().map(|_| loaded()).collect();
        // cuDNN is not needed.
        libraries[6] = missing("libcudnn.so.9");
        assert_eq!(problems(&Ok(driver()), &libraries, &workers, &[], None, &HERE), []);
    }

    #[test]
    fn old_failing_and_hanging_drivers_are_reported() {
        let old = Driver { cuda: 12_040, version: Some("550.54.15".into()), ..driver() };
        let problem = driver_problem(Ok(old), &HERE);
        assert_eq!(problem.what, "the driver 550.54.15 is too old: it supports CUDA 12.4, workers need 13.0");
        assert!(problem.remedy.contains("580"), "{}", problem.remedy);
        let useless = Driver { gpus: Vec::new(), problem: Some("cuInit: error 803".into()), ..driver() };
        assert!(driver_problem(Ok(useless), &HERE).what.ends_with("cuInit: error 803"));
        let limit = std::time::Duration::from_secs(60);
        let stuck = driver_problem(Err(ChildError::TimedOut(limit)), &HERE);
        assert_eq!(stuck.what, "the driver hangs: no answer within 60 s");
    }

    #[test]
    fn the_fix_for_a_missing_driver_depends_on_the_environment() {
        let none = || Err(failed("libcuda.so.1: cannot open shared object file"));
        let environment =
            |container, device_files, on_the_bus| Environment { container, device_files, on_the_bus, ..HERE };
        for (environment, expected) in [
            (environment(true, false, true), "--gpus all"),
            (environment(true, true, true), "NVIDIA_DRIVER_CAPABILITIES"),
            (environment(false, false, true), "install NVIDIA's driver"),
            (environment(false, false, false), "no NVIDIA GPU was found"),
            (
                Environment { find_unsearched: |_| Some("/usr/lib/wsl/lib".into()), ..HERE },
                "LD_LIBRARY_PATH=/usr/lib/wsl/lib",
            ),
        ] {
            let problem = driver_problem(none(), &environment);
            assert!(problem.remedy.contains(expected), "{expected}: {}", problem.remedy);
        }
    }

    #[test]
    fn missing_libraries_get_an_install_command_and_misplaced_ones_a_path() {
        let mut libraries: Vec<_> = LIBRARIES.iter().map(|library| missing(library.file)).collect();
        libraries[3] = loaded();
        let [problem] = &check_libraries(&libraries, &HERE)[..] else { panic!("not one problem") };
        assert!(
            problem.what.contains("libcublasLt.so.13") && !problem.what.contains("libcudnn"),
            "{}",
            problem.what
        );
        let apt = "apt install cuda-cudart-13-0 libcublas-13-0 libnccl2\n";
        assert!(problem.remedy.contains(apt), "{}", problem.remedy);

        fn wheels(file: &str) -> Option<PathBuf> {
            (file != "libnccl.so.2").then(|| "/venv/nvidia/cu13/lib".into())
        }
        let environment = Environment { find_unsearched: wheels, ..HERE };
        let found = check_libraries(&libraries, &environment);
        let [nccl, others] = &found[..] else { panic!("{found:?}") };
        assert_eq!(nccl.what, "not found: NCCL (libnccl.so.2)");
        assert_eq!(
            others.remedy,
            "export LD_LIBRARY_PATH=/venv/nvidia/cu13/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
        );
    }

    /// An environment with PyTorch's wheels may lack cuRAND.
    #[test]
    fn a_missing_curand_is_named_with_the_packages_that_have_it() {
        let mut libraries: Vec<_> = LIBRARIES.iter().map(|_| loaded()).collect();
        libraries[3] = missing("libcurand.so.10");
        let [problem] = &check_libraries(&libraries, &HERE)[..] else { panic!("not one problem") };
        assert_eq!(problem.what, "not found: cuRAND (libcurand.so.10)");
        for package in ["apt install libcurand-13-0\n", "pip install 'nvidia-curand==10.4.*';"] {
            assert!(problem.remedy.contains(package), "{package}: {}", problem.remedy);
        }
    }

    #[test]
    fn a_crashing_library_is_reported() {
        let mut libraries: Vec<_> = LIBRARIES.iter().map(|_| loaded()).collect();
        libraries[5] = Err(ChildError::Crashed { signal: 11, said: String::new() });
        let [problem] = &check_libraries(&libraries, &HERE)[..] else { panic!("not one problem") };
        assert_eq!(problem.what, "NCCL: libnccl.so.2: crashes (signal 11)");
        assert!(problem.remedy.contains("libnccl2") && problem.remedy.contains("nvidia-nccl-cu13"));
    }

    #[test]
    fn a_failed_all_reduce_has_a_command_that_shows_the_log_of_nccl() {
        let worker = Build::Cuda { version: env!("CARGO_PKG_VERSION").into() };
        let workers = [Candidate { path: "/bin/lora-worker".into(), build: worker }];
        let libraries: Vec<_> = LIBRARIES.iter().map(|_| loaded()).collect();
        let failure = Err(failed("rank 1 failed: out of memory"));
        let found = problems(&Ok(driver()), &libraries, &workers, &[], Some(&failure), &HERE);
        let [problem] = &found[..] else { panic!("{found:?}") };
        assert_eq!(problem.what, "all-reduce among the GPUs' workers: rank 1 failed: out of memory");
        let command = "NCCL_DEBUG=INFO /bin/lora-worker probe --device cuda --all-reduce 1 ";
        assert!(problem.remedy.starts_with(command), "{}", problem.remedy);
    }

    #[test]
    fn the_worker_must_start_and_match_cuda_and_version() {
        let candidate = |build| vec![Candidate { path: "/bin/lora-worker".into(), build }];
        let what = |workers: &[Candidate]| {
            check_workers(workers).into_iter().map(|problem| problem.what).collect::<Vec<_>>()
        };
        assert_eq!(what(&candidate(Build::Cuda { version: env!("CARGO_PKG_VERSION").into() })), [""; 0]);
        let other = what(&candidate(Build::Cuda { version: "0.0.1".into() }));
        assert!(other[0].contains("has version 0.0.1"), "{other:?}");
        let cpu = what(&candidate(Build::Cpu));
        assert!(cpu[0].contains("/bin/lora-worker supports only CPUs"), "{cpu:?}");
        let broken = what(&candidate(Build::Unknown("does not start: libcublas.so.13: no".into())));
        assert_eq!(broken, ["/bin/lora-worker does not start: libcublas.so.13: no"]);
        assert_eq!(what(&[]), ["no lora-worker that was built for CUDA was found"]);
    }

    #[test]
    fn an_old_gpu_is_named() {
        let gpu = DriverGpu { name: "Tesla V100".into(), memory_bytes: 16 << 30, compute_capability: (7, 0) };
        assert!(check_gpu(1, &gpu).unwrap().what.starts_with("GPU 1, Tesla V100, is too old"));
        assert_eq!(check_gpu(0, &driver().gpus[0]), None);
    }
}
