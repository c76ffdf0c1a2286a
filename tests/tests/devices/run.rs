//! The command `loractl run --device`.

use std::fs;
use std::process::Command;

use lora_e2e::{Finished, Fixture, RunOutcome, lora_worker};

use crate::fakes::FakeCuda;

/// Adds a worker for GPUs that computes on the CPU and logs the requested device.
fn fake_gpu_worker(fakes: &FakeCuda) {
    let real = lora_worker();
    let program = real.get_program().to_str().unwrap();
    let log = fakes.path("devices").display().to_string();
    fakes.worker(&format!(
        r#"[ "$1 $2" = "--end-with-stdin --device" ] || exit 9
nccl="${{NCCL_HOSTID-}} ${{NCCL_NET-}} ${{NCCL_SOCKET_IFNAME-}}"
case "$*" in *" collective=tcp "*) echo "$3 tcp" ;; *) echo "$3 $nccl" ;; esac | sed 's/ *$//' >> {log}
[ "$NCCL_DEBUG_FILE" = "${{NCCL_LOG-/dev/stderr}}" ] || exit 9
shift 3
exec {program} --end-with-stdin --device cpu "$@" --set collective=auto"#
    ));
}

fn run(fakes: &FakeCuda, fixture: &Fixture, out: &str, arguments: &[&str]) -> Command {
    let mut command = fakes.loractl(&["run", fixture.job().to_str().unwrap(), "--out"]);
    command.arg(fixture.path(out)).args(arguments);
    command
}

fn devices(fakes: &FakeCuda) -> Vec<String> {
    let log = fs::read_to_string(fakes.path("devices")).unwrap_or_default();
    let mut devices: Vec<String> = log.lines().map(str::to_owned).collect();
    devices.sort();
    devices
}

#[test]
fn each_gpu_gets_a_worker_and_more_workers_share_them() {
    let (fakes, fixture) = (FakeCuda::driver(&[]), Fixture::default());
    fake_gpu_worker(&fakes);
    Finished::run(&mut run(&fakes, &fixture, "cpu", &["--device", "cpu"])).expect_code(0);
    assert_eq!(devices(&fakes), [""; 0]);
    let expected = RunOutcome::read(&fixture.path("cpu"));

    // `loractl run` ignores the daemons' settings in the environment.
    let mut cuda = run(&fakes, &fixture, "cuda", &["--device", "cuda", "-o", "json"]);
    let summary =
        Finished::run(cuda.env("LORA__GRPC__LISTEN", "x").env("LORA__THREADS", "x")).expect_code(0).json();
    assert_eq!((&summary["device"], &summary["workers"]), (&"cuda".into(), &2.into()));
    assert_eq!(devices(&fakes), ["cuda:0", "cuda:1"]);
    assert_eq!(RunOutcome::read(&fixture.path("cuda")), expected);

    fs::remove_file(fakes.path("devices")).unwrap();
    let arguments = ["--workers", "3", "--collective", "tcp"];
    Finished::run(&mut run(&fakes, &fixture, "three", &arguments)).expect_code(0);
    assert_eq!(devices(&fakes), ["cuda:0 tcp", "cuda:0 tcp", "cuda:1 tcp"], "auto uses the GPUs");
    assert_eq!(RunOutcome::read(&fixture.path("three")), expected);
}

#[test]
fn nccl_is_configured_for_workers_that_share_a_gpu() {
    let (fakes, fixture) = (FakeCuda::driver(&[]), Fixture::default());
    fake_gpu_worker(&fakes);
    fixture.edit("job.yaml", "max_steps: 12", "max_steps: 1");
    let run = |out: &str, arguments: &[&str], environment: &[(&str, &str)]| {
        let _ = fs::remove_file(fakes.path("devices"));
        let mut command = run(&fakes, &fixture, out, arguments);
        let variables = [
            "NCCL_HOSTID",
            "NCCL_NET",
            "NCCL_SOCKET_IFNAME",
            "NCCL_MULTI_RANK_GPU_ENABLE",
            "NCCL_DEBUG_FILE",
        ];
        for variable in variables {
            command.env_remove(variable);
        }
        Finished::run(command.envs(environment.iter().copied())).expect_code(0);
        devices(&fakes)
    };
    let three = ["--workers", "3", "--collective", "nccl"];
    let hosts = |network: &str| {
        [(0, 0), (0, 2), (1, 1)].map(|(gpu, worker)| format!("cuda:{gpu} shared-gpu-{worker} {network}"))
    };
    assert_eq!(run("nccl", &three, &[]), hosts("Socket lo"));
    for value in ["0", "1"] {
        assert_eq!(run(value, &three, &[("NCCL_MULTI_RANK_GPU_ENABLE", value)]), hosts("Socket lo"));
    }
    let chosen = [("NCCL_NET", "IB"), ("NCCL_SOCKET_IFNAME", "eth0"), ("NCCL_HOSTID", "node")];
    assert_eq!(run("chosen", &three, &chosen), hosts("IB eth0"));

    let untouched = ["cuda:0", "cuda:0", "cuda:1"];
    let log = [("NCCL_DEBUG_FILE", "nccl.%p"), ("NCCL_LOG", "nccl.%p")];
    assert_eq!(run("auto", &["--workers", "3"], &log), untouched);
    assert_eq!(run("two", &["--workers", "2", "--collective", "nccl"], &[]), ["cuda:0", "cuda:1"]);
}

#[test]
fn no_more_workers_are_started_than_the_job_has_micro_batches() {
    let (fakes, fixture) = (FakeCuda::driver(&[]), Fixture::default());
    fake_gpu_worker(&fakes);
    fixture.edit("job.yaml", "micro_batch_size: 2", "micro_batch_size: 12");
    fixture.edit("job.yaml", "max_steps: 12", "max_steps: 1");
    Finished::run(&mut run(&fakes, &fixture, "out", &["--device", "cuda"])).expect_code(0);
    assert_eq!(devices(&fakes), ["cuda:0"]);
}

#[test]
fn unusable_gpus_are_an_error_if_requested() {
    let fixture = Fixture::default();
    let refused = |fakes: &FakeCuda, arguments: &[&str]| {
        let refused = Finished::run(&mut run(fakes, &fixture, "out", arguments)).expect_code(1);
        assert!(!fixture.path("out").exists());
        refused.error().unwrap_or_default().to_owned()
    };
    let fakes = FakeCuda::driver(&["INIT=100"]);
    let cpu = lora_worker();
    let error = refused(&fakes, &["--device", "cuda", "--worker", cpu.get_program().to_str().unwrap()]);
    assert!(error.contains("was not built for CUDA") && error.contains("`loractl doctor`"), "{error}");
    fake_gpu_worker(&fakes);
    let error = refused(&fakes, &["--device", "cuda"]);
    assert!(error.contains("the driver: cuInit: CUDA_ERROR_NO_DEVICE"), "{error}");
    let error = refused(&fakes, &["--device", "cuda", "--worker", "/nowhere/lora-worker"]);
    assert!(error.contains("/nowhere/lora-worker cannot be started"), "{error}");

    // Without `--device` the command runs on the CPU and prints the reason.
    fixture.edit("job.yaml", "max_steps: 12", "max_steps: 1");
    let finished = Finished::run(&mut run(&fakes, &fixture, "out", &[])).expect_code(0);
    assert!(finished.stderr.contains("on the CPU: the driver: cuInit"), "{}", finished.stderr);
    assert_eq!(devices(&fakes), [""; 0]);
}
