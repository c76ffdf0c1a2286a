//! Workers as people and programs see them.

use lora_proto::v1;
use serde::Serialize;

use super::grid::{ColumnFit, Grid};
use super::{bytes, units::format_age};

/// A worker.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct WorkerView {
    name: String,
    /// `idle`, `draining`, `lost`, or the phase of the job it holds.
    state: String,
    job_id: Option<String>,
    rank: Option<u32>,
    generation: u64,
    completed_steps: u64,
    numerics_id: String,
    peer_address: String,
    version: String,
    seconds_in_phase: f64,
    /// Since its last sign of life.
    silent_seconds: f64,
    /// Bytes that a job may take there.
    memory: Option<u64>,
    /// It computes on a GPU.
    gpu: bool,
}

impl From<v1::Worker> for WorkerView {
    fn from(worker: v1::Worker) -> Self {
        let v1::Worker {
            name,
            state,
            numerics_id,
            peer_address,
            version,
            job_id,
            generation,
            rank,
            completed_steps,
            seconds_in_phase,
            silent_seconds,
            memory,
            gpu,
        } = worker;
        Self {
            name,
            state,
            job_id,
            rank,
            generation,
            completed_steps,
            numerics_id,
            peer_address,
            version,
            seconds_in_phase,
            silent_seconds,
            memory: Some(memory).filter(|bytes| *bytes > 0),
            gpu,
        }
    }
}

/// Workers in rows; where ids are long, what matters less is cut off at the end.
pub(crate) fn worker_grid(workers: &[WorkerView]) -> Grid {
    let mut grid = Grid::new(&[
        ("NAME", ColumnFit::Cut),
        ("STATE", ColumnFit::Whole),
        ("SILENT", ColumnFit::Right),
        ("RANK", ColumnFit::Right),
        ("STEP", ColumnFit::Right),
        ("JOB", ColumnFit::Whole),
        ("MEMORY", ColumnFit::Right),
        ("KIND", ColumnFit::Cut),
    ]);
    let or_dash = |value: Option<String>| value.unwrap_or_else(|| "-".into());
    for worker in workers {
        let held = worker.job_id.is_some();
        grid.row(vec![
            worker.name.clone(),
            worker.state.clone(),
            format_age(worker.silent_seconds),
            or_dash(worker.rank.map(|rank| rank.to_string())),
            or_dash(held.then(|| worker.completed_steps.to_string())),
            or_dash(worker.job_id.clone()),
            or_dash(worker.memory.map(bytes)),
            worker.numerics_id.clone(),
        ]);
    }
    grid
}
