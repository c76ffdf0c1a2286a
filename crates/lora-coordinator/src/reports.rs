//! What workers report, and what becomes of their jobs.

use lora_proto::v1::{self, job_command, job_event, job_report};
use lora_spec::JobState;
use tokio::time::Instant;

use crate::command::SessionId;
use crate::group::Phase;
use crate::job::Job;
use crate::output_dir::{OutputDir, RECEIPT};
use crate::service::{Service, find};

/// A message that no sound worker sends.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Breach(&'static str);

impl Service {
    /// Takes a worker's report. One about another generation than the job's is too late to matter.
    pub(crate) fn report(&mut self, session: SessionId, report: v1::JobReport) -> Result<(), Breach> {
        let v1::JobReport { job_id, generation, kind } = report;
        let kind = kind.ok_or(Breach("a report without content"))?;
        let Some(worker) = self.workers.get_mut(&session) else { return Ok(()) };
        if let job_report::Kind::Released(_) = kind
            && worker.holds == Some((job_id.clone(), generation))
        {
            worker.holds = None;
        }
        let name = worker.hello.name.clone();
        let Ok(job) = find(&mut self.jobs, &job_id) else { return Err(Breach("a report on an unknown job")) };
        let rank = job.group.as_ref().and_then(|group| group.rank_of(session));
        let (Some(rank), true) = (rank, generation == job.generation) else {
            tracing::debug!(job = job_id, worker = name, generation, "stale report ignored");
            return Ok(());
        };
        match kind {
            job_report::Kind::BaseReady(ready) => {
                job.record(job_event::Kind::BaseReady(v1::BaseReady { worker: name, ..ready }));
            }
            job_report::Kind::Prepared(prepared) => self.prepared(&job_id, rank, prepared)?,
            job_report::Kind::StepFinished(step) => self.step_finished(&job_id, rank, step)?,
            job_report::Kind::Notice(notice) => {
                let notice = v1::Notice { worker: name, rank: rank as u32, ..notice };
                job.record(job_event::Kind::Notice(notice));
            }
            job_report::Kind::Ended(ended) => self.ended(&job_id, rank, &ended)?,
            job_report::Kind::Failed(failed) => {
                let v1::WorkerFailed { completed_steps, cause, suspects } = failed;
                let completed = completed_steps.max(job.completed_steps);
                let verdict =
                    job.group.as_mut().and_then(|group| group.judge(rank, completed, cause, &suspects));
                if let Some(failure) = verdict {
                    self.fail(&job_id, failure);
                }
            }
            job_report::Kind::Released(_) => self.out(&job_id, rank),
        }
        Ok(())
    }

    /// Forgets a worker; a job that still needs it fails.
    pub(crate) fn lose(&mut self, session: SessionId, cause: &str) {
        let Some(worker) = self.workers.remove(&session) else { return };
        tracing::info!(worker = worker.hello.name, cause, "worker lost");
        let Some((job_id, generation)) = worker.holds else { return };
        let Ok(job) = find(&mut self.jobs, &job_id) else { return };
        let Some(rank) = job.group.as_ref().and_then(|group| group.rank_of(session)) else { return };
        let Some(group) = job.group.as_mut().filter(|_| generation == job.generation) else { return };
        let phase = group.members.get(rank).map(|member| member.phase);
        match phase {
            _ if group.dropped => self.out(&job_id, rank),
            // Its part is done; what is left is rank 0's.
            Some(Phase::Ended(_)) => {}
            _ => {
                let failure = v1::Failure {
                    worker: Some(worker.hello.name),
                    rank: Some(rank as u32),
                    completed_steps: job.completed_steps,
                    cause: format!("the worker was lost: {cause}"),
                };
                self.fail(&job_id, failure);
            }
        }
    }

    /// Ends jobs whose failure no better cause was found for by `now`.
    pub(crate) fn settle(&mut self, now: Instant) {
        let settled: Vec<_> = self
            .jobs
            .iter_mut()
            .filter_map(|job| Some((job.id.clone(), job.group.as_mut()?.settled(now)?)))
            .collect();
        for (job_id, failure) in settled {
            self.fail(&job_id, failure);
        }
    }

    fn prepared(&mut self, job_id: &str, rank: usize, report: v1::RunPrepared) -> Result<(), Breach> {
        let Ok(job) = find(&mut self.jobs, job_id) else { return Ok(()) };
        let facts = report.facts.ok_or(Breach("prepared without facts"))?;
        if rank == 0 {
            job.facts = Some(facts);
            job.completed_steps = report.completed_steps;
        }
        let all = job.group.as_mut().is_some_and(|group| group.advance(rank, Phase::Prepared));
        if !all || job.state() != JobState::Preparing {
            return Ok(());
        }
        if let Err(error) = open_output(job) {
            let (cause, completed_steps) = (error.to_string(), job.completed_steps);
            self.fail(job_id, v1::Failure { cause, completed_steps, ..Default::default() });
            return Ok(());
        }
        let (facts, completed_steps) = (job.facts, job.completed_steps);
        job.record(job_event::Kind::Prepared(v1::RunPrepared { facts, completed_steps }));
        if job.become_state(JobState::Running) {
            self.tell_group(job_id, job_command::Kind::Start(v1::Start {}));
        }
        Ok(())
    }

    fn step_finished(&mut self, job_id: &str, rank: usize, step: v1::StepFinished) -> Result<(), Breach> {
        let Ok(job) = find(&mut self.jobs, job_id) else { return Ok(()) };
        let metrics = step.metrics.ok_or(Breach("a step without metrics"))?;
        if rank != 0 {
            return Err(Breach("metrics from another rank than 0"));
        }
        job.completed_steps = metrics.step;
        let written = match (step.logged, &mut job.output) {
            (true, Some(output)) => output.append_metrics(&metrics),
            _ => Ok(()),
        };
        job.record(job_event::Kind::StepFinished(step));
        if let Err(error) = written {
            let (cause, completed_steps) = (error.to_string(), job.completed_steps);
            self.fail(job_id, v1::Failure { cause, completed_steps, ..Default::default() });
        }
        Ok(())
    }

    fn ended(&mut self, job_id: &str, rank: usize, ended: &v1::Ended) -> Result<(), Breach> {
        let Ok(job) = find(&mut self.jobs, job_id) else { return Ok(()) };
        let state = [JobState::Paused, JobState::Succeeded].into_iter().find(|s| s.name() == ended.state);
        let state = state.ok_or(Breach("a run ends paused or succeeded"))?;
        let Some(group) = &mut job.group else { return Ok(()) };
        let agreed = group.advance(rank, Phase::Ended(state));
        if rank == 0 {
            group.staged.retain(|name, _| ended.files.contains(name));
            if let Some(missing) = ended.files.iter().find(|name| !group.staged.contains_key(*name)) {
                tracing::warn!(job = job_id, file = missing, "result file was not uploaded");
                return Err(Breach("a result file was not uploaded"));
            }
        }
        if group.all_ended() {
            let concluded =
                if agreed { conclude(job, state) } else { Err("its workers ended differently".into()) };
            match concluded {
                Ok(()) => self.dissolve(job_id),
                Err(cause) => {
                    let completed_steps = job.completed_steps;
                    self.fail(job_id, v1::Failure { cause, completed_steps, ..Default::default() });
                }
            }
        }
        Ok(())
    }

    /// A member holds nothing of the job any more. When all are out of a job that was to pause, it has.
    fn out(&mut self, job_id: &str, rank: usize) {
        let Ok(job) = find(&mut self.jobs, job_id) else { return };
        let all = job.group.as_mut().is_some_and(|group| group.advance(rank, Phase::Out) && group.dropped);
        if all && job.become_state(JobState::Paused) {
            job.group = None;
            job.output = None;
        }
    }

    /// Ends a job with an error and takes it from its workers.
    pub(crate) fn fail(&mut self, job_id: &str, failure: v1::Failure) {
        let Ok(job) = find(&mut self.jobs, job_id) else { return };
        job.fail(failure);
        self.dissolve(job_id);
    }

    /// Takes a job from its workers.
    fn dissolve(&mut self, job_id: &str) {
        if let Ok(job) = find(&mut self.jobs, job_id) {
            job.group = None;
            job.output = None;
        }
        self.tell_group(job_id, job_command::Kind::Drop(v1::Drop {}));
    }
}

/// The directory of a new job is made only now that its data was read and found good.
fn open_output(job: &mut Job) -> Result<(), crate::OutputError> {
    let mut output = match job.output.take() {
        Some(output) => output,
        None => OutputDir::create(&job.output_path, &job.spec)?,
    };
    output.open_metrics(job.completed_steps)?;
    job.output = Some(output);
    Ok(())
}

/// What all workers ended in becomes the job's state; a result is moved to its place first.
fn conclude(job: &mut Job, state: JobState) -> Result<(), String> {
    if let (JobState::Succeeded, Some(output), Some(group)) = (state, &job.output, &job.group) {
        if !group.staged.contains_key(RECEIPT) {
            return Err(format!("rank 0 sent no {RECEIPT}"));
        }
        output.commit_result(&group.staged).map_err(|error| error.to_string())?;
        job.record(job_event::Kind::ResultSaved(v1::ResultSaved {
            output_dir: job.output_path.display().to_string(),
            files: group.staged.keys().cloned().collect(),
        }));
    }
    if job.become_state(state) { Ok(()) } else { Err(format!("its workers have {} unasked", state.name())) }
}
