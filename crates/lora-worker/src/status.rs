//! The observed state of this worker, and its message to the coordinator.

use std::time::Instant;

use lora_collective::CancelToken;
use lora_proto::v1::{self, Fault, Phase};

use crate::directive::DesiredState;

/// The job that the engine has loaded or is loading.
#[derive(Debug, Clone)]
pub(crate) struct CurrentJob {
    pub(crate) job_id: String,
    pub(crate) generation: u64,
    pub(crate) phase: Phase,
    /// The start of the phase. While training, the end of the last step. The seconds in a status
    /// are computed when it is sent, so that they keep growing if the engine hangs.
    pub(crate) since: Instant,
    pub(crate) completed_steps: u64,
    pub(crate) base: Option<v1::BaseReady>,
    pub(crate) facts: Option<v1::RunFacts>,
    pub(crate) cause: String,
    /// What is at fault, with a cause of a failure.
    pub(crate) fault: Fault,
    pub(crate) suspects: Vec<u32>,
    pub(crate) unreachable: Vec<u32>,
    pub(crate) files: Vec<String>,
    pub(crate) exported: Option<v1::ExportedAdapter>,
    /// A message for users about the group. Empty if there is none.
    pub(crate) notice: String,
    /// The token of the current or last group.
    pub(crate) group: Option<CancelToken>,
}

impl CurrentJob {
    /// The job of `assignment`, of which nothing is loaded yet.
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
            fault: Fault::Unspecified,
            suspects: Vec::new(),
            unreachable: Vec::new(),
            files: Vec::new(),
            exported: None,
            notice: String::new(),
            group: None,
        }
    }

    /// Enters a phase and clears the results of the previous phase.
    pub(crate) fn enter(&mut self, phase: Phase) {
        (self.phase, self.since) = (phase, Instant::now());
        self.cause.clear();
        self.fault = Fault::Unspecified;
        self.suspects.clear();
        self.unreachable.clear();
        self.files.clear();
        self.exported = None;
    }

    /// Whether the engine continues without further directives.
    pub(crate) fn is_busy(&self) -> bool {
        matches!(self.phase, Phase::Forming | Phase::Training | Phase::Saving | Phase::Exporting)
    }

    /// The generation to report. While preparing, it is the newest desired one, because a job is
    /// prepared for any generation.
    fn generation(&self, desired: &DesiredState) -> u64 {
        let newest = desired.assignment.as_deref().filter(|_| self.phase == Phase::Preparing);
        newest
            .filter(|newest| newest.job_id == self.job_id)
            .map_or(self.generation, |newest| newest.generation)
    }
}

/// Creates the message with the current status.
pub(crate) fn status_message(
    current: Option<&CurrentJob>,
    desired: &DesiredState,
    draining: bool,
) -> v1::WorkerStatus {
    let job = current.map(|current| v1::HeldJob {
        job_id: current.job_id.clone(),
        generation: current.generation(desired),
        phase: current.phase.into(),
        seconds_in_phase: current.since.elapsed().as_secs_f64(),
        completed_steps: current.completed_steps,
        base: current.base.clone(),
        facts: current.facts,
        cause: current.cause.clone(),
        suspects: current.suspects.clone(),
        unreachable: current.unreachable.clone(),
        files: current.files.clone(),
        exported: current.exported,
        fault: current.fault.into(),
        notice: current.notice.clone(),
        waiting_for_peers: current.group.as_ref().is_some_and(CancelToken::is_waiting_for_peers),
    });
    let directive = if matches_desired(job.as_ref(), desired) { desired.number } else { 0 };
    v1::WorkerStatus { job, draining, directive }
}

/// Whether the reported job and generation are the desired ones.
fn matches_desired(current: Option<&v1::HeldJob>, desired: &DesiredState) -> bool {
    let current = current.map(|current| (&current.job_id, current.generation));
    current == desired.assignment.as_deref().map(|assignment| (&assignment.job_id, assignment.generation))
}

/// The part of a status whose change is sent at once. Other changes wait for the next heartbeat.
pub(crate) fn urgent_part(mut message: v1::WorkerStatus) -> v1::WorkerStatus {
    if let Some(job) = &mut message.job {
        job.seconds_in_phase = 0.0;
        job.waiting_for_peers = false;
        if job.phase() == Phase::Training {
            job.completed_steps = 0;
        }
    }
    message
}
