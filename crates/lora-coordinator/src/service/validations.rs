//! The validations of submitted jobs. They read whole datasets, so they run beside the service.

use std::collections::BTreeMap;
use std::sync::Arc;

use lora_spec::JobSpec;
use tokio::sync::Semaphore;
use tokio::task::{AbortHandle, JoinSet};

use crate::admission::validate::{self, ValidationOutcome};
use crate::control::job::Job;
use crate::store::Store;

/// The number of validations at the same time.
const MAX_CONCURRENT: usize = 2;

/// The validations that run, and the outcomes that the service has not applied yet.
pub(super) struct Validations {
    store: Store,
    by_job: BTreeMap<String, Validation>,
    tasks: JoinSet<(u64, ValidationOutcome)>,
    permits: Arc<Semaphore>,
    last_number: u64,
}

/// The validation of a job with these settings.
struct Validation {
    number: u64,
    spec: JobSpec,
    task: AbortHandle,
    /// `None` while the validation runs.
    outcome: Option<ValidationOutcome>,
}

impl Drop for Validation {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Validations {
    pub(super) fn new(store: Store) -> Self {
        Self {
            store,
            by_job: BTreeMap::new(),
            tasks: JoinSet::new(),
            permits: Arc::new(Semaphore::new(MAX_CONCURRENT)),
            last_number: 0,
        }
    }

    /// The outcome for `job` with its current settings. If they were not validated yet, starts to
    /// validate them. `None` while the validation runs.
    pub(super) fn outcome(&mut self, job: &Job) -> Option<&ValidationOutcome> {
        let id = &job.row.id;
        if self.by_job.get(id).is_none_or(|validation| validation.spec != job.spec) {
            let started = self.start(job);
            self.by_job.insert(id.clone(), started);
        }
        self.by_job.get(id)?.outcome.as_ref()
    }

    /// Forgets the job's validation. If it has begun to read the data, its outcome is ignored.
    pub(super) fn forget(&mut self, job_id: &str) {
        self.by_job.remove(job_id);
    }

    /// Waits for the end of a validation. Returns its job, or `None` if no validation runs.
    pub(super) async fn finished(&mut self) -> Option<String> {
        loop {
            // A task fails only if it was aborted: its validation is forgotten.
            let Ok((number, outcome)) = self.tasks.join_next().await? else { continue };
            let finished = self.by_job.iter_mut().find(|(_, validation)| validation.number == number);
            if let Some((id, validation)) = finished {
                validation.outcome = Some(outcome);
                return Some(id.clone());
            }
        }
    }

    fn start(&mut self, job: &Job) -> Validation {
        self.last_number += 1;
        let (number, spec, permits) = (self.last_number, job.spec.clone(), Arc::clone(&self.permits));
        let (store, job, inputs) = (self.store.clone(), job.spec.clone(), job.row.inputs.clone());
        let task = self.tasks.spawn(async move {
            let outcome = match permits.acquire_owned().await {
                Ok(permit) => validate::check(store, job, inputs, permit).await,
                Err(error) => ValidationOutcome::Problem(error.to_string()),
            };
            (number, outcome)
        });
        Validation { number, spec, task, outcome: None }
    }
}

#[cfg(test)]
mod tests {
    use lora_proto::v1;

    use super::*;
    use crate::store::{ForeignObjects, JobRow, Recorded, Retention};

    fn job(max: usize) -> Job {
        let mut spec = JobSpec { name: "job".into(), ..JobSpec::default() };
        spec.workers.max = max;
        let spec = v1::JobSpec::try_from(&spec).unwrap();
        let row = JobRow { id: "one".into(), spec, ..JobRow::default() };
        Job::new(row, None, &Recorded::default()).unwrap()
    }

    #[tokio::test]
    async fn only_the_outcome_for_the_current_settings_counts() {
        let dir = tempfile::tempdir().unwrap();
        let retention = Retention { events: 10, steps: 10 };
        let store = Store::open(dir.path(), retention, ForeignObjects::Refuse).await.unwrap();
        let mut validations = Validations::new(store);
        assert!(validations.outcome(&job(1)).is_none());
        // The job is paused, and resumed with other settings, before its validation has ended.
        assert!(validations.outcome(&job(2)).is_none());
        assert_eq!(validations.finished().await.as_deref(), Some("one"));
        assert_eq!(validations.finished().await, None);
        assert!(validations.outcome(&job(2)).is_some());
        // An outcome for other settings is not used for these.
        assert!(validations.outcome(&job(1)).is_none());
        validations.forget("one");
        assert_eq!(validations.finished().await, None);
    }
}
