//! `metrics.jsonl`: one row of JSON a reported step.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::Path;

use lora_proto::v1::StepMetrics;
use serde_json::Value;

/// A metrics file that rows are appended to.
#[derive(Debug)]
pub(crate) struct MetricsFile(File);

impl MetricsFile {
    /// Opens the file at `path` and keeps of it the rows up to `completed_steps`. A torn last row is dropped.
    pub(crate) fn open(path: &Path, completed_steps: u64) -> io::Result<Self> {
        let text = match std::fs::read(path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(error) => return Err(error),
        };
        // Rows are in the order of their steps, so what is kept is a prefix.
        let kept = text
            .split_inclusive(|byte| *byte == b'\n')
            .take_while(|line| step_of(line).is_some_and(|step| step <= completed_steps))
            .map(<[u8]>::len)
            .sum::<usize>();
        let file = OpenOptions::new().create(true).append(true).open(path)?;
        file.set_len(kept as u64)?;
        Ok(Self(file))
    }

    /// Appends a row.
    pub(crate) fn append(&mut self, metrics: &StepMetrics) -> io::Result<()> {
        let mut row = serde_json::to_vec(metrics)?;
        row.push(b'\n');
        self.0.write_all(&row)
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
        MetricsFile::open(&path, 0).unwrap().append(&StepMetrics { eval_loss: Some(0.5), ..row(1) }).unwrap();
        assert_eq!(
            std::fs::read_to_string(path).unwrap(),
            "{\"step\":1,\"loss\":1.1,\"grad_norm\":0.0,\"learning_rate\":0.0,\"epoch\":0.0,\"num_tokens\":0,\"eval_loss\":0.5}\n"
        );
    }

    #[test]
    fn reopening_drops_rows_past_the_checkpoint_and_a_torn_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        let mut file = MetricsFile::open(&path, 0).unwrap();
        for step in 1..=4 {
            file.append(&row(step)).unwrap();
        }
        drop(file);
        let whole = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, &whole[..whole.len() - 5]).unwrap();
        let mut file = MetricsFile::open(&path, 9).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap().lines().count(), 3);
        file.append(&row(4)).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), whole);
        MetricsFile::open(&path, 2).unwrap().append(&row(3)).unwrap();
        let three: String = whole.split_inclusive('\n').take(3).collect();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), three);
    }
}
