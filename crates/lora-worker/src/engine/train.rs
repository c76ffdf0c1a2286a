//! From the forming of the group to the end of training.

use std::time::{Instant, SystemTime};

use lora_collective::backend_choice::{Collective, Preference};
use lora_collective::{CollectiveError, Group, GroupSpec};
use lora_proto::v1::{self, Goal, Phase};
use lora_spec::StepMetrics;
use lora_train::{StepOutcome, TrainError};

use super::{EngineThread, Interruption};
use crate::directive::{DesiredState, GroupLimits, WorkScope};
use crate::step_outbox::MAX_UNACKNOWLEDGED_STEPS;
use crate::uploads::CheckpointUploader;

impl EngineThread {
    /// Forms the group, trains, and uploads the result if this is rank 0.
    pub(super) fn train(&mut self, assignment: &v1::Assignment) -> Result<(), Interruption> {
        let (cancel, _watching) = self.cancel_with(WorkScope::group(assignment));
        self.update(|current| {
            current.enter(Phase::Forming);
            current.group = Some(cancel.clone());
        });
        let Some(job) = &mut self.job else { return Err(Interruption::Superseded) };
        let Some(limits) = *self.engine.limits.borrow() else { return Err(Interruption::Superseded) };
        let group = Group::form(&group_spec(assignment, limits), Some(&self.engine.listener), cancel)?;
        let preference =
            Preference { collective: self.engine.collective, nccl_failure: self.nccl_failure.clone() };
        if let Err(error) = job.run.join(group, preference) {
            if self.engine.collective == Collective::Auto && is_nccl_failure(&error) {
                tracing::warn!(%error, "NCCL failed, this process uses TCP from now on");
                self.nccl_failure = Some(error.to_string());
            }
            return Err(error.into());
        }
        let completed_steps = job.run.completed_steps();
        let is_first = assignment.rank == 0;
        let mut notices = Vec::new();
        if let Some(notice) = job.run.fallback().map(str::to_owned) {
            let (job, generation) = (&assignment.job_id, assignment.generation);
            tracing::warn!(job, generation, reason = notice, "NCCL is not used");
            notices.push(notice);
        }
        // Whoever has planned the job has sent the tokens, and has told the user.
        let is_planned = assignment.inputs.as_ref().is_some_and(|inputs| !inputs.tokens.is_empty());
        if is_first && assignment.generation == 1 && !is_planned {
            notices.extend(job.run.data_notes());
        }
        if is_first && !notices.is_empty() {
            self.update(|current| current.notice = notices.join("; "));
        }
        let mut past = Vec::new();
        if is_first {
            past = self.past_steps(assignment);
            self.checkpoints = Some(CheckpointUploader::start(&self.runtime, self.uploads(assignment)));
        }
        self.engine.steps.begin(&assignment.job_id, is_first, past);
        self.update(|current| {
            current.enter(Phase::Training);
            current.completed_steps = completed_steps;
        });
        match self.train_on(is_first)? {
            StepOutcome::Finished if is_first => self.finish(assignment),
            StepOutcome::Finished => {
                self.enter(Phase::Finished);
                Ok(())
            }
            StepOutcome::Continue | StepOutcome::Stopped => {
                self.enter(Phase::Stopped);
                Ok(())
            }
        }
    }

    /// Runs steps until the run ends, or until all ranks stop.
    fn train_on(&mut self, is_first: bool) -> Result<StepOutcome, Interruption> {
        let Some(job) = &mut self.job else { return Err(Interruption::Superseded) };
        let run = &mut job.run;
        while !run.is_finished() {
            let report = run.step(|| stop_requested(&self.engine.desired.borrow()))?;
            let metrics = &report.metrics;
            self.engine.counters.count_step(&report);
            self.engine.measure_memory();
            let problem = self.checkpoints.as_ref().and_then(CheckpointUploader::take_error);
            let notice: Vec<String> = report.notice.into_iter().chain(problem).collect();
            self.engine.steps.push(v1::StepReport {
                reduced_bytes: if is_first { report.reduced_bytes } else { 0 },
                notice: notice.join("; "),
                ..step_report(metrics)
            });
            if report.checkpoint_due
                && let Some(checkpoints) = &self.checkpoints
            {
                checkpoints.drop_pending();
                checkpoints.submit(metrics.step, run.checkpoint()?);
            }
            self.engine.status.send_modify(|current| {
                if let Some(current) = current {
                    (current.completed_steps, current.since) = (metrics.step, Instant::now());
                }
            });
            if report.outcome != StepOutcome::Continue {
                return Ok(report.outcome);
            }
        }
        Ok(StepOutcome::Finished)
    }

    /// Returns steps of the joined state that the coordinator may not have. The worker that
    /// computed them may be gone.
    fn past_steps(&self, assignment: &v1::Assignment) -> Vec<v1::StepReport> {
        let Some(job) = &self.job else { return Vec::new() };
        let stored = self.engine.steps.stored(&assignment.job_id);
        let after = stored.max(job.run.completed_steps().saturating_sub(MAX_UNACKNOWLEDGED_STEPS as u64));
        job.run.metrics_after(after).map(|metrics| step_report(&metrics)).collect()
    }
}

/// Whether NCCL failed, rather than a peer.
fn is_nccl_failure(error: &TrainError) -> bool {
    use CollectiveError::{Device, DeviceTimeout};
    matches!(error, TrainError::Group(Device { .. } | DeviceTimeout { .. }))
}

/// Whether training must stop at the next step boundary.
fn stop_requested(desired: &DesiredState) -> bool {
    matches!(desired.goal, Goal::Stop | Goal::Save)
}

fn group_spec(assignment: &v1::Assignment, limits: GroupLimits) -> GroupSpec {
    let v1::Assignment { job_id, generation, rank, peers, token, .. } = assignment;
    GroupSpec {
        job: job_id.clone(),
        generation: *generation,
        rank: *rank as usize,
        peers: peers.clone(),
        token: token.clone(),
        form_timeout: limits.form,
        timeout: limits.peer,
    }
}

fn step_report(metrics: &StepMetrics) -> v1::StepReport {
    v1::StepReport {
        metrics: Some(metrics.into()),
        logged: metrics.logged,
        reduced_bytes: 0,
        time: Some(SystemTime::now().into()),
        notice: String::new(),
    }
}
