//! All jobs that are neither paused nor ended, and the only code that changes a job or writes its
//! row. A paused or ended job is here while a request for it is processed.
//!
//! An action is stored before it takes effect in memory ([`Action::is_stored`] names the
//! exceptions). If the store fails, nothing changes. Uploads write a job's checkpoints and the
//! files of its result themselves (`store/artifacts.rs`), if they are of the job's generation.

use std::collections::{BTreeMap, BTreeSet};

use lora_proto::v1;
use lora_spec::JobState;

use super::action::Action;
use super::group::GroupPhase;
use super::job::{Change, GroupMaterial, InvalidTransition, Job, state_changed};
use crate::refusal::Refusal;
use crate::store::{InsertOutcome, JobRow, Recorded, Store, StoreError};

/// The jobs, by id.
pub(crate) struct Jobs {
    store: Store,
    by_id: BTreeMap<String, Job>,
    /// Workers whose desired state may have changed.
    affected_workers: BTreeSet<String>,
}

/// Why an action was not applied.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ApplyError {
    #[error("the store failed: {0}")]
    Store(#[from] StoreError),
    #[error(transparent)]
    Transition(#[from] InvalidTransition),
}

impl From<ApplyError> for Refusal {
    fn from(error: ApplyError) -> Self {
        match error {
            ApplyError::Store(error) => Self::Store(error),
            ApplyError::Transition(error) => Self::InvalidTransition(error.to_string()),
        }
    }
}

impl Jobs {
    pub(crate) fn new(store: Store) -> Self {
        Self { store, by_id: BTreeMap::new(), affected_workers: BTreeSet::new() }
    }

    pub(crate) fn get(&self, id: &str) -> Option<&Job> {
        self.by_id.get(id)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Job> {
        self.by_id.values()
    }

    /// The job that this worker is a member of.
    pub(crate) fn of_worker(&self, worker: &str) -> Option<&Job> {
        self.by_id.values().find(|job| job.has_member(worker))
    }

    /// Marks a worker that reported, connected or disconnected: its desired state may have changed.
    pub(crate) fn affect(&mut self, worker: String) {
        self.affected_workers.insert(worker);
    }

    /// Marks the members of a job that is reconciled: the desired state of each one depends on what
    /// the others report, also if no action follows.
    pub(crate) fn affect_members(&mut self, id: &str) {
        let members = self.by_id.get(id).into_iter().flat_map(|job| &job.row.members);
        self.affected_workers.extend(members.map(|member| member.worker.clone()));
    }

    /// Returns the workers whose desired state may have changed since the last call.
    pub(crate) fn take_affected_workers(&mut self) -> BTreeSet<String> {
        std::mem::take(&mut self.affected_workers)
    }

    /// Stores a new job.
    pub(crate) async fn insert(&mut self, row: &JobRow) -> Result<InsertOutcome, StoreError> {
        self.store.insert_job(row, vec![state_changed(row)]).await
    }

    /// Starts to process a job. Returns it, or `None` if this build cannot read its settings.
    pub(crate) async fn load(&mut self, row: JobRow) -> Result<Option<&Job>, StoreError> {
        let id = row.id.clone();
        let checkpoint = self.store.newest_checkpoint(&id).await?;
        let recorded = self.store.recorded(&id, row.generation).await?;
        match Job::new(row, checkpoint, &recorded) {
            Ok(job) => {
                self.by_id.insert(id.clone(), job);
                Ok(self.by_id.get(&id))
            }
            Err(error) => {
                tracing::error!(job = id, %error, "cannot read the job's settings, the job is skipped");
                Ok(None)
            }
        }
    }

    /// Processes a job that is paused or has ended until the next action is applied to it. Returns
    /// its state.
    pub(crate) async fn load_stopped(&mut self, id: &str) -> Result<JobState, Refusal> {
        if let Some(job) = self.by_id.get(id) {
            return Ok(job.state());
        }
        let row = self.store.load_job(id).await?.ok_or_else(|| Refusal::UnknownJob(id.to_owned()))?;
        let state = row.state;
        self.by_id.insert(id.to_owned(), Job::new(row, None, &Recorded::default())?);
        Ok(state)
    }

    /// Stops to process a job if it is paused or has ended.
    pub(crate) fn release_if_stopped(&mut self, id: &str) {
        if self.by_id.get(id).is_some_and(|job| job.state().is_stopped()) {
            self.by_id.remove(id);
        }
    }

    /// Stores the action and changes the job. An action for a job that is not processed has no
    /// effect.
    ///
    /// # Errors
    /// The store failed, or the job's state does not allow the action. The job did not change.
    pub(crate) async fn apply(&mut self, id: &str, action: Action) -> Result<(), ApplyError> {
        let Some(job) = self.by_id.get(id) else { return Ok(()) };
        log_broken_group(job, &action);
        let group = match action {
            Action::Form(_) => GroupMaterial {
                checkpoint: self.store.newest_checkpoint(id).await?,
                token: format!("{:032x}{:032x}", rand::random::<u128>(), rand::random::<u128>()),
            },
            _ => GroupMaterial::default(),
        };
        let Change { job: next, events } = job.changed(action.clone(), group)?;
        match &action {
            Action::Succeed { worker, rank, files, steps, exported: _ } => {
                match self.store.commit_result(&next.row, files, events).await? {
                    Ok(files) => tracing::info!(job = id, files = files.len(), steps, "job succeeded"),
                    Err(missing) => {
                        let failure = v1::Failure {
                            worker: Some(worker.clone()),
                            rank: Some(*rank as u32),
                            completed_steps: *steps,
                            cause: format!("the file {} is missing in the result", missing.0),
                        };
                        return Box::pin(self.apply(id, Action::Fail(failure))).await;
                    }
                }
            }
            // The row follows with the next change: the log has the steps.
            Action::AddSteps(steps) => self.store.add_steps(id, steps).await?,
            action if !action.is_stored() => {}
            _ => self.store.save_job(&next.row, events).await?,
        }
        if next.state() != job.state() {
            log_state(&next);
        }
        let members = job.row.members.iter().chain(&next.row.members);
        self.affected_workers.extend(members.map(|member| member.worker.clone()));
        self.by_id.insert(id.to_owned(), next);
        self.release_if_stopped(id);
        Ok(())
    }
}

fn log_broken_group(job: &Job, action: &Action) {
    if let Action::Enter(GroupPhase::Regrouping(regroup)) = action
        && regroup.is_failure
    {
        tracing::warn!(
            job = job.row.id,
            generation = job.row.generation,
            cause = regroup.reason,
            "group broke"
        );
    }
}

fn log_state(job: &Job) {
    let (id, state, generation) = (&job.row.id, job.state().name(), job.row.generation);
    match &job.row.failure {
        Some(failure) => tracing::warn!(job = id, generation, cause = failure.cause, "job failed"),
        None => tracing::info!(job = id, state, generation, "job changed state"),
    }
}
