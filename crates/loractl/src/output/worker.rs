//! Workers, as text and as data for JSON and YAML.

use lora_proto::v1;
use lora_spec::DeviceKind;
use serde::Serialize;

use super::grid::{ColumnFit, Grid};
use super::{bytes, units::format_age};

/// A worker, with the field names of JSON and YAML.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct WorkerView {
    name: String,
    /// `idle`, `draining`, `lost`, or the phase of the worker's job.
    state: String,
    job_id: Option<String>,
    rank: Option<u32>,
    generation: u64,
    completed_steps: u64,
    numerics_id: String,
    peer_address: String,
    version: String,
    seconds_in_phase: f64,
    /// Seconds since the worker's last heartbeat.
    silent_seconds: f64,
    /// Bytes of memory that a job may use on the worker; `None` if unknown.
    memory: Option<u64>,
    /// Whether the worker computes on a GPU.
    gpu: bool,
}

impl From<v1::Worker> for WorkerView {
    fn from(worker: v1::Worker) -> Self {
        let device_memory = worker.device_memory();
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
            memory: _,
            gpu: _,
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
            memory: device_memory.known_bytes(),
            gpu: device_memory.kind == DeviceKind::Gpu,
        }
    }
}

/// Lists workers in rows. The least important columns are the last ones, because the end of a row
/// is cut if it is too wide.
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
        let has_job = worker.job_id.is_some();
        grid.row(vec![
            worker.name.clone(),
            worker.state.clone(),
            format_age(worker.silent_seconds),
            or_dash(worker.rank.map(|rank| rank.to_string())),
            or_dash(has_job.then(|| worker.completed_steps.to_string())),
            or_dash(worker.job_id.clone()),
            or_dash(worker.memory.map(bytes)),
            worker.numerics_id.clone(),
        ]);
    }
    grid
}
