//! One job: its state, its log and its files.

use std::path::PathBuf;
use std::sync::Arc;

use lora_proto::v1::{self, job_event};
use lora_spec::{JobSpec, JobState};

use crate::group::Group;
use crate::job_log::JobLog;
use crate::output_dir::OutputDir;

/// A job that was accepted.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) id: String,
    pub(crate) spec: JobSpec,
    pub(crate) log: Arc<JobLog>,
    pub(crate) output_path: PathBuf,
    /// Held from when the job trains (or from when it was accepted, if it resumes) until it rests.
    pub(crate) output: Option<OutputDir>,
    /// The checkpoint it goes on from.
    pub(crate) checkpoint_step: Option<u64>,
    /// Raised at every assignment.
    pub(crate) generation: u64,
    /// The workers that have it now.
    pub(crate) group: Option<Group>,
    pub(crate) completed_steps: u64,
    pub(crate) facts: Option<v1::RunFacts>,
    state: JobState,
    failure: Option<v1::Failure>,
}

impl Job {
    /// A job that is being validated.
    pub(crate) fn new(id: String, spec: JobSpec, output_path: PathBuf, retained_events: usize) -> Self {
        let job = Self {
            id,
            spec,
            log: Arc::new(JobLog::new(retained_events)),
            output_path,
            output: None,
            checkpoint_step: None,
            generation: 0,
            group: None,
            completed_steps: 0,
            facts: None,
            state: JobState::Validating,
            failure: None,
        };
        job.record_state();
        job
    }

    pub(crate) fn state(&self) -> JobState {
        self.state
    }

    /// Moves on to `next` if the table of transitions has it; says whether it did.
    #[must_use]
    pub(crate) fn become_state(&mut self, next: JobState) -> bool {
        if !self.state.may_become(next) {
            return false;
        }
        self.state = next;
        self.record_state();
        tracing::info!(job = self.id, state = next.name(), generation = self.generation, "job changed state");
        true
    }

    /// Ends the job with an error, unless it is over already.
    pub(crate) fn fail(&mut self, failure: v1::Failure) {
        let earlier = self.failure.replace(failure);
        if !self.become_state(JobState::Failed) {
            self.failure = earlier;
        }
    }

    /// Appends an event to the job's log.
    pub(crate) fn record(&self, kind: job_event::Kind) {
        self.log.append(kind, false);
    }

    /// Where the job stands.
    pub(crate) fn message(&self) -> v1::Job {
        v1::Job {
            job_id: self.id.clone(),
            name: self.spec.name.clone(),
            state: self.state.name().to_owned(),
            generation: self.generation,
            completed_steps: self.completed_steps,
            facts: self.facts,
            failure: self.failure.clone(),
        }
    }

    fn record_state(&self) {
        let at_rest = self.state.is_final() || self.state == JobState::Paused;
        let change = v1::StateChanged { state: self.state.name().to_owned(), failure: self.failure.clone() };
        self.log.append(job_event::Kind::StateChanged(change), at_rest);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job() -> Job {
        Job::new("dates-1".into(), JobSpec::default(), PathBuf::new(), 10)
    }

    #[test]
    fn a_state_that_the_table_does_not_allow_is_not_taken() {
        let mut job = job();
        assert!(!job.become_state(JobState::Running));
        assert_eq!(job.state(), JobState::Validating);
        assert!(job.become_state(JobState::Queued));
    }

    #[test]
    fn the_first_failure_stays() {
        let mut job = job();
        let failure = |cause: &str| v1::Failure { cause: cause.into(), ..v1::Failure::default() };
        job.fail(failure("first"));
        job.fail(failure("second"));
        assert_eq!(job.message().failure, Some(failure("first")));
        assert_eq!(job.message().state, "failed");
    }
}
