//! The command `loractl doctor`.

use lora_e2e::{Finished, lora_worker};
use serde_json::{Value, json};

use crate::fakes::{FakeCuda, VERSION};

/// The answers of a worker's `probe`.
const ANSWERS: &str = r#"case "$*" in
"probe --device cuda --all-reduce 2 --timeout 120")
    echo '{"through": "nccl", "world_size": 2, "bytes": 67108864, "seconds": 0.001}' ;;
"probe --device cuda:"[01])
    echo '{"device": "cuda Fake GPU", "product_side": 4096, "product_tflops": 700.5, "memory_gb_s": 4000,
           "gpu": {"name": "Fake GPU", "compute_capability": [9, 0], "free_bytes": 1073741824,
                   "total_bytes": 85899345920}}' | tr -d '\n' ;;
*) echo "error: not asked: $*" >&2; exit 1 ;;
esac"#;

/// The JSON report of `loractl doctor`, with the exit code.
fn doctor(fakes: &FakeCuda, arguments: &[&str]) -> (Option<i32>, Value) {
    let mut all = vec!["doctor", "-o", "json"];
    all.extend(arguments);
    let finished = Finished::run(&mut fakes.loractl(&all));
    (finished.code, finished.json())
}

/// The problems and their remedies, as one text.
fn problems(report: &Value) -> String {
    let problems = report["cuda"]["problems"].as_array().unwrap().iter();
    let lines = problems.map(|problem| {
        format!("{}: {}", problem["what"].as_str().unwrap(), problem["remedy"].as_str().unwrap())
    });
    lines.collect::<Vec<_>>().join("\n")
}

#[test]
fn doctor_reports_versions_and_paths() {
    let fakes = FakeCuda::all();
    fakes.worker(ANSWERS);
    let (code, report) = doctor(&fakes, &["--device", "cuda"]);
    assert_eq!((code, problems(&report).as_str()), (Some(0), ""));
    let cuda = &report["cuda"];
    assert_eq!(cuda["works"], true);
    assert_eq!(cuda["driver"]["cuda"], "13.0");
    assert_eq!(cuda["driver"]["path"], json!(fakes.path("libcuda.so.1")));
    assert_eq!(cuda["peers"], json!([[0, 1]]));
    let gpu = &cuda["gpus"][1];
    assert_eq!(
        (&gpu["name"], &gpu["memory_bytes"], &gpu["compute_capability"]),
        (&json!("Fake GPU 1"), &json!(80_u64 << 30), &json!("9.0"))
    );
    assert_eq!(gpu["reading"]["product_tflops"], 700.5);
    assert_eq!(cuda["all_reduce"]["through"], "nccl");
    let libraries = cuda["libraries"].as_array().unwrap();
    let versions: Vec<&Value> = libraries.iter().map(|library| &library["version"]).collect();
    assert_eq!(versions, ["13.0", "13.1.2", "13.1.2", "10.4.4", "13.0", "2.28.9", "9.19.0"]);
    for library in libraries {
        assert_eq!(library["path"], json!(fakes.path(library["file"].as_str().unwrap())));
    }
    let worker = cuda["workers"].as_array().unwrap().iter().find(|worker| worker["build"] == "cuda").unwrap();
    assert_eq!(worker["path"], json!(fakes.path("lora-worker").canonicalize().unwrap()));
    assert!(report["cpu"]["reading"]["product_tflops"].as_f64().unwrap() > 0.0);

    let table = Finished::run(&mut fakes.loractl(&["doctor"])).expect_code(0).stdout;
    for (name, value) in [
        ("GPU 1", "Fake GPU 1, 80.00 GiB, compute capability 9.0"),
        ("peer-to-peer", "0>1"),
        ("NCCL", "2.28.9, "),
        ("all-reduce", "64.00 MiB, 2 workers over nccl: 67.1 GB/s sent by each"),
        ("CUDA", "works"),
    ] {
        let is =
            |line: &str| line.strip_prefix(name).is_some_and(|rest| rest.trim_start().starts_with(value));
        assert!(table.lines().any(is), "{name} {value}:\n{table}");
    }
    assert!(
        table.contains("700.5 TFLOP/s in bf16 products of side 4096, 4000 GB/s of memory, 1.00 GiB free"),
        "{table}"
    );
}

#[test]
fn doctor_survives_hanging_and_crashing_libraries() {
    let fakes = FakeCuda::all();
    let when_loaded = |what: &str| {
        format!(
            "#include <signal.h>\n#include <unistd.h>\n\
             __attribute__((constructor)) static void f(void) {{ {what} }}"
        )
    };
    fakes.replace("libnccl.so.2", &when_loaded("for (;;) pause();"));
    fakes.replace("libcurand.so.10", &when_loaded("signal(SIGSEGV, SIG_DFL); raise(SIGSEGV);"));
    fakes.replace("libcublas.so.13", &when_loaded("write(1, \"a greeting\\n\", 11);"));
    let (code, report) = doctor(&fakes, &["--timeout", "10"]);
    assert_eq!(code, Some(0), "a working CPU is enough unless a GPU is requested");
    let problems = problems(&report);
    assert!(problems.contains("NCCL: libnccl.so.2: hangs: no answer within 10 s"), "{problems}");
    assert!(problems.contains("cuRAND: libcurand.so.10: crashes (signal 11)"), "{problems}");
    assert!(!problems.contains("cuBLAS"), "{problems}");
    assert!(problems.contains("apt install libnccl2"), "{problems}");
    let libraries = report["cuda"]["libraries"].as_array().unwrap();
    let found: Vec<&Value> =
        libraries.iter().filter(|one| !one["version"].is_null()).map(|one| &one["name"]).collect();
    assert_eq!(found, ["CUDA runtime", "cuBLASLt", "NVRTC", "cuDNN"]);
}

#[test]
fn an_old_driver_or_a_missing_gpu_is_reported() {
    for (definitions, expected) in [
        (&["CUDA=12040"][..], "is too old: it supports CUDA 12.4, workers need 13.0"),
        (
            &["INIT=100"],
            "the driver cannot be used: cuInit: CUDA_ERROR_NO_DEVICE (100): no CUDA-capable device is \
             detected",
        ),
    ] {
        let fakes = FakeCuda::driver(definitions);
        let (code, report) = doctor(&fakes, &["--device", "cuda"]);
        assert_eq!((code, &report["cuda"]["works"]), (Some(1), &json!(false)));
        let problems = problems(&report);
        assert!(problems.contains(expected), "{expected}:\n{problems}");
    }
}

#[test]
fn a_failing_worker_does_not_hide_other_results() {
    let fakes = FakeCuda::all();
    fakes.worker("echo 'error: device cuda:0: out of memory' >&2; exit 1");
    let (code, report) = doctor(&fakes, &["--device", "cuda"]);
    assert_eq!((code, &report["cuda"]["gpus"][0]["name"]), (Some(1), &json!("Fake GPU 0")));
    let found = problems(&report);
    assert!(found.contains("GPU 1: the worker's probe: device cuda:0: out of memory"), "{found}");
    assert!(found.contains("all-reduce among the GPUs' workers: device cuda:0: out of memory"), "{found}");

    // A worker that cannot be loaded is not probed.
    let missing = "error while loading shared libraries: libcublas.so.13: cannot open shared object file";
    fakes.script("lora-worker", &format!("echo \"$0: {missing}\" >&2; exit 127"));
    let worker = fakes.path("lora-worker");
    let (_, report) = doctor(&fakes, &["--worker", worker.to_str().unwrap()]);
    let found = problems(&report);
    assert!(found.contains("lora-worker does not start: libcublas.so.13: cannot open"), "{found}");
    fakes.script("lora-worker", "echo lora-worker 0.0.1 cuda");
    let (_, report) = doctor(&fakes, &["--worker", worker.to_str().unwrap()]);
    let found = problems(&report);
    assert!(found.contains(&format!("has version 0.0.1, loractl has {VERSION}")), "{found}");
}

#[test]
fn an_all_reduce_that_hangs_names_the_rank() {
    let fakes = FakeCuda::all();
    let worker = lora_worker();
    let program = worker.get_program().to_str().unwrap();
    let hangs = format!("LD_PRELOAD={}", fakes.path("libhangs.so").display());
    fakes.replace(
        "libhangs.so",
        r#"
#include <string.h>
#include <unistd.h>
__attribute__((constructor)) static void f(int argc, char **argv) {
    for (int i = 1; i < argc; i++)
        if (strcmp(argv[i - 1], "--rank") == 0 && strcmp(argv[i], "1") == 0) for (;;) pause();
}"#,
    );
    fakes.worker(&format!(
        r#"[ "$4" = --all-reduce ] && {hangs} exec {program} probe --device cpu --all-reduce 2 "$6" "$7"
{ANSWERS}"#
    ));
    let (_, report) = doctor(&fakes, &["--timeout", "5"]);
    let found = problems(&report);
    assert!(found.contains("all-reduce among the GPUs' workers: no answer within 5 s from rank "), "{found}");
}

#[test]
fn libraries_in_python_wheels_are_found() {
    let fakes = FakeCuda::all();
    let lib = fakes.path("venv/lib/python3.12/site-packages/nvidia/cu13/lib");
    std::fs::create_dir_all(&lib).unwrap();
    std::fs::copy(fakes.path("libnccl.so.2"), lib.join("libnccl.so.2")).unwrap();
    fakes.remove("libnccl.so.2");
    let mut command = fakes.loractl(&["doctor", "-o", "json"]);
    let report = Finished::run(command.env("VIRTUAL_ENV", fakes.path("venv"))).expect_code(0).json();
    let nccl =
        report["cuda"]["libraries"].as_array().unwrap().iter().find(|one| one["name"] == "NCCL").unwrap();
    if nccl["loads"] == true {
        eprintln!("skipped: this machine has NCCL where the loader looks, {}", nccl["path"]);
        return;
    }
    let problems = problems(&report);
    assert!(problems.contains("outside of the loader's search path: NCCL (libnccl.so.2)"), "{problems}");
    assert!(problems.contains(&format!("export LD_LIBRARY_PATH={}$", lib.display())), "{problems}");
}

#[test]
fn device_cpu_reports_the_cpu_only() {
    let fakes = FakeCuda::driver(&["INIT=100"]);
    let (code, report) = doctor(&fakes, &["--device", "cpu"]);
    assert_eq!((code, &report["cuda"]), (Some(0), &Value::Null));
    assert!(report["cpu"]["reading"]["device"].as_str().unwrap().starts_with("cpu "), "{report}");
}
