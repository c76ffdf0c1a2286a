//! `metrics.jsonl`, with one row of JSON for each logged step.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::Path;

use lora_proto::v1::StepMetrics;
use serde_json::Value;

/// A metrics file to which rows are appended.
#[derive(Debug)]
pub(crate) struct MetricsFile {
    file: File,
    last_step: u64,
}

impl MetricsFile {
    /// Opens the file at `path`. An incomplete row and the rows after it are removed.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let text = match std::fs::read(path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(error) => return Err(error),
        };
        let (mut kept, mut last_step) = (0, 0);
        for row in text.split_inclusive(|byte| *byte == b'\n') {
            // Rows are in the order of their steps, so the valid rows are a prefix of the file.
            let Some(step) = step_of(row).filter(|step| *step > last_step) else { break };
            (kept, last_step) = (kept + row.len(), step);
        }
        let file = OpenOptions::new().create(true).append(true).open(path)?;
        file.set_len(kept as u64)?;
        Ok(Self { file, last_step })
    }

    /// The step of the last row; 0 if there is none.
    pub(crate) fn last_step(&self) -> u64 {
        self.last_step
    }

    /// Appends a row.
    pub(crate) fn append(&mut self, metrics: &StepMetrics) -> io::Result<()> {
        let mut row = serde_json::to_vec(metrics)?;
        row.push(b'\n');
        self.file.write_all(&row)?;
        self.last_step = metrics.step;
        Ok(())
    }
}

fn step_of(line: &[u8]) -> Option<u64> {
    let row: Value = serde_json::from_slice(line.strip_suffix(b"\n")?).ok()?;
    row.get("step")?.as_u64()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(step: u64) -> StepMetrics {
        StepMetrics { step, loss: 0.1 + step as f64, ..StepMetrics::default() }
    }

    #[test]
    fn rows_have_the_documented_keys_in_order() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        MetricsFile::open(&path).unwrap().append(&StepMetrics { eval_loss: Some(0.5), ..row(1) }).unwrap();
        assert_eq!(
            std::fs::read_to_string(path).unwrap(),
            "{\"step\":1,\"loss\":1.1,\"grad_norm\":0.0,\"learning_rate\":0.0,\"epoch\":0.0,\
             \"num_tokens\":0,\"eval_loss\":0.5}\n"
        );
    }

    #[test]
    fn reopening_removes_an_incomplete_row() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        let mut file = MetricsFile::open(&path).unwrap();
        for step in [1, 2, 5] {
            file.append(&row(step)).unwrap();
        }
        assert_eq!(file.last_step(), 5);
        drop(file);
        let whole = std::fs::read_to_string(&path).unwrap();
        assert_eq!(MetricsFile::open(&path).unwrap().last_step(), 5);
        std::fs::write(&path, &whole[..whole.len() - 5]).unwrap();
        let mut file = MetricsFile::open(&path).unwrap();
        assert_eq!((file.last_step(), std::fs::read_to_string(&path).unwrap().lines().count()), (2, 2));
        file.append(&row(5)).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), whole);
    }
}
