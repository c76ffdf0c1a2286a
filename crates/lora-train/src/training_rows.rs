//! The training rows of a job, in the order of its steps.

use lora_data::{BatchPlan, Dataset, MicroBatchRows, collate};
use lora_model::sha256;
use lora_spec::{JobSpec, MicroBatch};

/// The training rows and their global order, which does not depend on the ranks.
pub(crate) struct TrainingRows {
    dataset: Dataset,
    plan: BatchPlan,
}

impl TrainingRows {
    /// Orders the rows of a job.
    pub(crate) fn new(job: &JobSpec, dataset: Dataset) -> Self {
        Self { plan: BatchPlan::for_job(job, &dataset), dataset }
    }

    /// Returns the SHA-256 of the dataset.
    pub(crate) fn sha256(&self) -> &str {
        &self.dataset.sha256
    }

    /// Returns the SHA-256 of each file if there are several.
    pub(crate) fn files_sha256(&self) -> Vec<String> {
        let files = &self.dataset.files;
        files.iter().filter(|_| files.len() > 1).map(|file| file.sha256.clone()).collect()
    }

    /// Returns the number of steps of one pass over the rows.
    pub(crate) fn steps_per_epoch(&self) -> u64 {
        self.plan.steps_per_epoch()
    }

    /// Returns the rows of each micro-batch of a step (from 0).
    pub(crate) fn step(&self, step: u64) -> Vec<MicroBatchRows> {
        self.plan.step(step)
    }

    /// Returns the micro-batch of `rows`.
    pub(crate) fn collate(&self, rows: &MicroBatchRows) -> MicroBatch {
        collate(&self.dataset, rows)
    }

    /// Returns the rows, in the order of the file.
    pub(crate) fn dataset(&self) -> &Dataset {
        &self.dataset
    }

    /// Returns the number of tokens in the first `steps` steps, without padding.
    pub(crate) fn tokens(&self, steps: u64) -> u64 {
        self.plan.tokens(steps)
    }

    /// Returns the number of tokens in a step (from 0), without padding.
    pub(crate) fn tokens_in(&self, step: u64) -> u64 {
        let of_row = |row: usize| self.dataset.rows.row(row).len() as u64;
        self.step(step).iter().flat_map(MicroBatchRows::samples).map(of_row).sum()
    }

    /// Returns the SHA-256 over the rows of the first `steps` steps, in order, as u64 (little
    /// endian).
    pub(crate) fn order_sha256(&self, steps: u64) -> String {
        let rows = (0..steps).flat_map(|step| self.step(step)).flat_map(|micro_batch| micro_batch.rows);
        sha256(&rows.flatten().flat_map(|row| (row as u64).to_le_bytes()).collect::<Vec<u8>>())
    }
}
