//! A small job that trains on the example's base.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use tempfile::TempDir;

use crate::{Finished, RunOutcome, loractl};

/// An epoch of 57 rows has 5 steps. The last step has 9 rows in 5 micro-batches, of which the last
/// one has 1 row. 12 steps are 2.4 epochs.
const TRAINING_ROWS: usize = 57;
const HELD_OUT_ROWS: usize = 10;
const JOB: &str = "\
name: small
model:
  base: base
adapter:
  r: 4
  lora_alpha: 8
  lora_dropout: 0.1
  target_modules: all-linear
data:
  train: train.jsonl
  eval: eval.jsonl
  max_length: 96
training:
  max_steps: 12
  global_batch_size: 12
  micro_batch_size: 2
  learning_rate: 5.0e-3
  eval_steps: 4
  save_steps: 4
";

/// A directory with a base, data, and a job of 12 steps. Dropping this removes the directory.
#[derive(Debug)]
pub struct Fixture {
    dir: TempDir,
}

impl Default for Fixture {
    fn default() -> Self {
        let example = Self::example();
        let fixture = Self { dir: tempfile::tempdir().unwrap() };
        fixture.copy_base("base");
        for (name, rows) in [("train.jsonl", TRAINING_ROWS), ("eval.jsonl", HELD_OUT_ROWS)] {
            let text = fs::read_to_string(example.join(name)).unwrap();
            let first: String = text.split_inclusive('\n').take(rows).collect();
            fixture.write(name, &first);
        }
        fixture.write("job.yaml", JOB);
        fixture
    }
}

impl Fixture {
    /// Creates a fixture whose job has 48 short steps instead of 12, which gives a test time to
    /// interrupt it. Four workers can share the job.
    pub fn with_short_steps() -> Self {
        let fixture = Self::default();
        for (old, new) in [
            ("max_steps: 12", "max_steps: 48"),
            ("global_batch_size: 12", "global_batch_size: 4"),
            ("micro_batch_size: 2", "micro_batch_size: 1"),
            ("eval_steps: 4", "eval_steps: 16"),
            ("save_steps: 4", "save_steps: 8"),
        ] {
            fixture.edit("job.yaml", old, new);
        }
        fixture
    }

    /// Creates a fixture whose job has `steps` steps.
    pub fn with_steps(steps: u64) -> Self {
        let fixture = Self::default();
        fixture.edit("job.yaml", "max_steps: 12", &format!("max_steps: {steps}"));
        fixture
    }

    /// Sets the number of workers of the job to `min` to `max`.
    pub fn ask_for_workers(&self, min: usize, max: usize) {
        self.append("job.yaml", &format!("workers: {{min: {min}, max: {max}}}"));
    }

    /// Returns the directory of the example that has the base and the data.
    pub fn example() -> PathBuf {
        lora_test_kit::example("")
    }

    /// Returns the path of `name` in the directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Returns the path of the job file.
    pub fn job(&self) -> PathBuf {
        self.path("job.yaml")
    }

    /// Copies the example's base to `name`.
    pub fn copy_base(&self, name: &str) {
        let base = self.path(name);
        fs::create_dir(&base).unwrap();
        for file in fs::read_dir(Self::example().join("base")).unwrap() {
            let file = file.unwrap();
            fs::copy(file.path(), base.join(file.file_name())).unwrap();
        }
    }

    /// Writes a file.
    pub fn write(&self, name: &str, text: &str) {
        fs::write(self.path(name), text).unwrap();
    }

    /// Replaces the only occurrence of `old` in file `name`.
    pub fn edit(&self, name: &str, old: &str, new: &str) {
        let text = fs::read_to_string(self.path(name)).unwrap();
        assert_eq!(text.matches(old).count(), 1, "{old:?} in {name}");
        self.write(name, &text.replace(old, new));
    }

    /// Appends `line` to file `name`.
    pub fn append(&self, name: &str, line: &str) {
        let text = fs::read_to_string(self.path(name)).unwrap();
        self.write(name, &format!("{text}{line}\n"));
    }

    /// Returns the command `loractl run` for the job with the output directory `out`.
    pub fn run(&self, out: &str, arguments: &[&str]) -> Command {
        let mut command = loractl();
        command.arg("run").arg(self.job()).arg("--out").arg(self.path(out)).args(arguments);
        command
    }

    /// Runs the job, which must succeed, and returns its outcome.
    pub fn finish(&self, out: &str, arguments: &[&str]) -> RunOutcome {
        Finished::run(&mut self.run(out, arguments)).expect_code(0);
        RunOutcome::read(&self.path(out))
    }
}
