//! What this worker holds, and how it is told.

use std::time::Instant;

use lora_collective::CancelToken;
use lora_proto::v1::{self, Phase};

use crate::wanted::Wanted;

/// The job that the engine holds.
#[derive(Debug, Clone)]
pub(crate) struct Held {
    pub(crate) job_id: String,
    pub(crate) generation: u64,
    pub(crate) phase: Phase,
    /// Start of the phase; while training, end of the last step. The seconds that are told are counted by whoever tells
    /// them, so that an engine that hangs is seen.
    pub(crate) since: Instant,
    pub(crate) completed_steps: u64,
    pub(crate) base: Option<v1::BaseReady>,
    pub(crate) facts: Option<v1::RunFacts>,
    pub(crate) cause: String,
    pub(crate) suspects: Vec<u32>,
    pub(crate) unreachable: Vec<u32>,
    pub(crate) files: Vec<String>,
    /// Message for people about the group; empty: none.
    pub(crate) notice: String,
    /// The token of the group it is in, or was in last.
    pub(crate) group: Option<CancelToken>,
}

impl Held {
    /// The job of `assignment`, of which nothing is there yet.
    pub(crate) fn new(assignment: &v1::Assignment) -> Self {
        Self {
            job_id: assignment.job_id.clone(),
            generation: assignment.generation,
            phase: Phase::Preparing,
            since: Instant::now(),
            completed_steps: 0,
            base: None,
            facts: None,
            cause: String::new(),
            suspects: Vec::new(),
            unreachable: Vec::new(),
            files: Vec::new(),
            notice: String::new(),
            group: None,
        }
    }

    /// Begins a phase: what another one left is forgotten.
    pub(crate) fn enter(&mut self, phase: Phase) {
        (self.phase, self.since) = (phase, Instant::now());
        self.cause.clear();
        self.suspects.clear();
        self.unreachable.clear();
        self.files.clear();
    }

    /// Whether the engine goes on by itself.
    pub(crate) fn is_busy(&self) -> bool {
        matches!(self.phase, Phase::Forming | Phase::Training | Phase::Saving | Phase::Exporting)
    }

    /// Preparing is for the job, whichever generation is wanted.
    fn generation(&self, wanted: &Wanted) -> u64 {
        let newest = wanted.assignment.as_deref().filter(|_| self.phase == Phase::Preparing);
        newest
            .filter(|newest| newest.job_id == self.job_id)
            .map_or(self.generation, |newest| newest.generation)
    }
}

/// The status as it is now.
pub(crate) fn message(held: Option<&Held>, wanted: &Wanted, draining: bool) -> v1::WorkerStatus {
    let job = held.map(|held| v1::HeldJob {
        job_id: held.job_id.clone(),
        generation: held.generation(wanted),
        phase: held.phase.into(),
        seconds_in_phase: held.since.elapsed().as_secs_f64(),
        completed_steps: held.completed_steps,
        base: held.base.clone(),
        facts: held.facts,
        cause: held.cause.clone(),
        suspects: held.suspects.clone(),
        unreachable: held.unreachable.clone(),
        files: held.files.clone(),
        notice: held.notice.clone(),
        waiting_for_peers: held.group.as_ref().is_some_and(CancelToken::is_waiting_for_peers),
    });
    let directive = if is_in_line(job.as_ref(), wanted) { wanted.number } else { 0 };
    v1::WorkerStatus { job, draining, directive }
}

/// Whether what is held is of the job and generation that are wanted.
fn is_in_line(held: Option<&v1::HeldJob>, wanted: &Wanted) -> bool {
    let held = held.map(|held| (&held.job_id, held.generation));
    held == wanted.assignment.as_deref().map(|assignment| (&assignment.job_id, assignment.generation))
}

/// The part of a status whose change is told at once; the rest can wait for the next heartbeat.
pub(crate) fn gist(mut message: v1::WorkerStatus) -> v1::WorkerStatus {
    if let Some(job) = &mut message.job {
        job.seconds_in_phase = 0.0;
        job.waiting_for_peers = false;
        if job.phase() == Phase::Training {
            job.completed_steps = 0;
        }
    }
    message
}
