//! A fake installation of CUDA, as far as loractl reads it.

use std::path::{Path, PathBuf};
use std::process::Command;

use lora_e2e::{loractl, without_settings};
use tempfile::TempDir;

/// The version of loractl and of a matching worker.
pub(crate) const VERSION: &str = env!("CARGO_PKG_VERSION");

const DRIVER: &str = r#"
#include <stdio.h>
#include <stddef.h>
#ifndef CUDA
#define CUDA 13000
#endif
#ifndef INIT
#define INIT 0
#endif
int cuInit(unsigned flags) { return INIT; }
int cuDriverGetVersion(int *version) { *version = CUDA; return 0; }
int cuDeviceGetCount(int *count) { *count = 2; return 0; }
int cuDeviceGet(int *device, int number) { *device = number; return 0; }
int cuDeviceGetName(char *name, int size, int device) {
    snprintf(name, size, "Fake GPU %d", device);
    return 0;
}
int cuDeviceTotalMem_v2(size_t *bytes, int device) { *bytes = (size_t)80 << 30; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    *value = attribute == 75 ? 9 : 0;
    return 0;
}
int cuDeviceCanAccessPeer(int *can, int device, int other) { *can = device < other; return 0; }
int cuGetErrorName(int error, const char **name) { *name = "CUDA_ERROR_NO_DEVICE"; return 0; }
int cuGetErrorString(int error, const char **text) { *text = "no CUDA-capable device is detected"; return 0; }
"#;

/// The file names of libraries, with the code of the functions that return their versions.
const LIBRARIES: [(&str, &str); 7] = [
    ("libcudart.so.13", "int cudaRuntimeGetVersion(int *version) { *version = 13000; return 0; }"),
    (
        "libcublas.so.13",
        "int cublasGetProperty(int part, int *value) { *value = part == 0 ? 13 : part; return 0; }",
    ),
    (
        "libcublasLt.so.13",
        "int cublasLtGetProperty(int part, int *value) { *value = part == 0 ? 13 : part; return 0; }",
    ),
    (
        "libcurand.so.10",
        "int curandGetProperty(int part, int *value) { *value = part == 0 ? 10 : 4; return 0; }",
    ),
    ("libnvrtc.so.13", "int nvrtcVersion(int *major, int *minor) { *major = 13; *minor = 0; return 0; }"),
    ("libnccl.so.2", "int ncclGetVersion(int *version) { *version = 22809; return 0; }"),
    ("libcudnn.so.9", "unsigned long cudnnGetVersion(void) { return 91900; }"),
];

/// A directory with libraries and a worker.
pub(crate) struct FakeCuda {
    dir: TempDir,
}

impl FakeCuda {
    /// A driver with two GPUs and every library, without a worker.
    pub(crate) fn all() -> Self {
        let fakes = Self::driver(&[]);
        for (file, code) in LIBRARIES {
            fakes.library(file, code, &[]);
        }
        fakes
    }

    /// A driver that is compiled with these definitions, and nothing else.
    pub(crate) fn driver(definitions: &[&str]) -> Self {
        let fakes = Self { dir: tempfile::tempdir().unwrap() };
        fakes.library("libcuda.so.1", DRIVER, definitions);
        fakes
    }

    /// Replaces the code of a library.
    pub(crate) fn replace(&self, file: &str, code: &str) {
        self.library(file, code, &[]);
    }

    /// Removes a library.
    pub(crate) fn remove(&self, file: &str) {
        std::fs::remove_file(self.path(file)).unwrap();
    }

    /// Adds a worker that was built for CUDA. `script` runs if the worker is not asked for its
    /// version.
    pub(crate) fn worker(&self, script: &str) {
        let version = format!("[ \"$1\" = --version ] && echo lora-worker {VERSION} cuda && exit");
        self.script("lora-worker", &format!("{version}\n{script}"));
    }

    /// Writes a shell script. Another process writes it: otherwise a process that this one forks at
    /// the same time would inherit the file open for writing, and the script could not be run.
    pub(crate) fn script(&self, name: &str, text: &str) {
        let write = r#"printf '#!/bin/sh\n%s\n' "$1" > "$2" && chmod +x "$2""#;
        let mut command = Command::new("sh");
        assert!(command.args(["-c", write, "sh", text]).arg(self.path(name)).status().unwrap().success());
    }

    /// A path in the directory.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A command that runs `loractl` with these libraries before the machine's, and with the
    /// programs of this directory on `PATH`.
    pub(crate) fn loractl(&self, arguments: &[&str]) -> Command {
        let mut command = loractl();
        without_settings(&mut command);
        for variable in ["CUDA_HOME", "CUDA_PATH", "CUDA_VISIBLE_DEVICES", "CONDA_PREFIX", "VIRTUAL_ENV"] {
            command.env_remove(variable);
        }
        let path = std::env::var("PATH").unwrap();
        command.env("PATH", format!("{}:{path}", self.dir.path().display()));
        command.env("HOME", self.dir.path()).env("LD_LIBRARY_PATH", self.dir.path()).args(arguments);
        command
    }

    fn library(&self, file: &str, code: &str, definitions: &[&str]) {
        compile(&self.path(file), code, definitions);
    }
}

fn compile(library: &Path, code: &str, definitions: &[&str]) {
    let source = library.with_extension("c");
    std::fs::write(&source, code).unwrap();
    let mut cc = Command::new("cc");
    cc.args(["-shared", "-fPIC", "-o"]).arg(library).arg(&source);
    cc.args(definitions.iter().map(|definition| format!("-D{definition}")));
    assert!(cc.status().unwrap().success(), "{}", library.display());
}
