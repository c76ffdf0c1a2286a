//! `lora-worker probe`, as `loractl doctor` runs it.

use std::process::Command;

use lora_e2e::{Finished, lora_worker, without_settings};

use crate::fakes::FakeCuda;

/// Writes to the stdout of every rank like NCCL: a part of a line before all messages, and the rest
/// at the end of the process.
const LOG: &str = r#"
#include <stdio.h>
#include <string.h>
#include <unistd.h>
__attribute__((constructor)) static void f(int argc, char **argv) {
    for (int i = 0; i < argc; i++)
        if (strcmp(argv[i], "--rank") == 0 && write(1, "NCCL INFO cut", 13) == 13) printf(" off here\n");
}"#;

fn all_reduce(arguments: &[&str]) -> Command {
    let mut command = lora_worker();
    without_settings(&mut command);
    command.args(["probe", "--all-reduce", "2"]).args(arguments);
    command
}

#[test]
fn logs_on_stdout_are_separated_from_the_measurement() {
    let fakes = FakeCuda::driver(&[]);
    fakes.replace("liblog.so", LOG);
    let mut command = all_reduce(&["--device", "cpu"]);
    let finished = Finished::run(command.env("LD_PRELOAD", fakes.path("liblog.so"))).expect_code(0);
    let reading = finished.json();
    assert_eq!((&reading["through"], &reading["world_size"]), (&"tcp".into(), &2.into()));
    for rank in ["rank 0: ", "rank 1: "] {
        for line in ["NCCL INFO cut", " off here"] {
            assert!(finished.stderr.contains(&format!("{rank}{line}")), "{rank}{line}:\n{}", finished.stderr);
        }
    }
}

#[test]
fn the_error_is_the_reason_why_a_rank_failed() {
    let finished =
        Finished::run(&mut all_reduce(&["--device", "cpu", "--collective", "nccl"])).expect_code(1);
    let error = finished.error().unwrap_or_default();
    assert!(
        error.contains(" failed: invalid argument: collective nccl: this build has no CUDA"),
        "{}",
        finished.stderr
    );
}
