//! A small job over the example's base.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

use crate::{Finished, RunOutcome, loractl};

/// 57 rows: an epoch has 5 steps, the last of 9 rows in 5 micro-batches, the last of those of 1 row. 12 steps: 2.4 epochs.
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

/// A directory with a base, data, and a job of 12 steps over them. Removed when this is dropped.
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
    /// With a job of 48 short steps in place of the 12, so that much can happen on its way; four workers can share it.
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

    /// With a job of this many steps.
    pub fn with_steps(steps: u64) -> Self {
        let fixture = Self::default();
        fixture.edit("job.yaml", "max_steps: 12", &format!("max_steps: {steps}"));
        fixture
    }

    /// Has the job ask for `min` to `max` workers.
    pub fn ask_for_workers(&self, min: usize, max: usize) {
        self.append("job.yaml", &format!("workers: {{min: {min}, max: {max}}}"));
    }

    /// The directory of the example that the base and the data are from.
    pub fn example() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/dates")
    }

    /// A path in its directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The job file.
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

    /// Replaces the one place where file `name` has `old`.
    pub fn edit(&self, name: &str, old: &str, new: &str) {
        let text = fs::read_to_string(self.path(name)).unwrap();
        assert_eq!(text.matches(old).count(), 1, "{old:?} in {name}");
        self.write(name, &text.replace(old, new));
    }

    /// Adds `line` at the end of file `name`.
    pub fn append(&self, name: &str, line: &str) {
        let text = fs::read_to_string(self.path(name)).unwrap();
        self.write(name, &format!("{text}{line}\n"));
    }

    /// `loractl run` of the job into directory `out`.
    pub fn run(&self, out: &str, arguments: &[&str]) -> Command {
        let mut command = loractl();
        command.arg("run").arg(self.job()).arg("--out").arg(self.path(out)).args(arguments);
        command
    }

    /// Runs the job to its end, which must be a good one.
    pub fn finish(&self, out: &str, arguments: &[&str]) -> RunOutcome {
        Finished::run(&mut self.run(out, arguments)).expect_code(0);
        RunOutcome::read(&self.path(out))
    }
}
