//! Reads and writes jobs in the database.

use std::path::Path;

use lora_proto::v1::{self, job_event};
use lora_spec::JobState;
use sqlx::sqlite::SqliteRow;
use sqlx::{QueryBuilder, Row, Sqlite, SqliteConnection};

use super::artifacts::{drop_checkpoints, drop_results, result_files};
use super::connections::Writer;
use super::log::append_events;
use super::objects::LookedUp;
use super::{JobRow, Retention, Store, StoreError, int, job_row, owner};

/// The result of a submit.
#[derive(Debug, PartialEq)]
pub(crate) enum InsertOutcome {
    /// The job was stored; the row has its sequence number.
    New(JobRow),
    /// The job that was stored earlier with the same idempotency key.
    Existing(JobRow),
    /// The inputs that are not in the store. The job was not stored.
    MissingObjects(Vec<v1::FileDigest>),
}

/// Selects the row of a job, and further columns for its message.
const WITH_PROGRESS: &str = "SELECT jobs.*, \
     (SELECT report FROM steps WHERE steps.job = sequence ORDER BY step DESC LIMIT 1) AS newest_step, \
     (SELECT MAX(step) FROM checkpoints WHERE checkpoints.job = sequence) AS checkpoint_step, \
     (SELECT events FROM logs WHERE logs.job = sequence) AS last_event \
     FROM jobs WHERE ";

impl Store {
    /// Stores a new job and its first events, unless a job with the same idempotency key exists or
    /// an input is missing.
    pub(crate) async fn insert_job(
        &self,
        job: &JobRow,
        events: Vec<job_event::Kind>,
    ) -> Result<InsertOutcome, StoreError> {
        let inputs = self.look_up(job.inputs.digests()).await?;
        let mut writers = self.writers().await;
        insert(&mut writers.lifecycle, job, &inputs, events, self.0.retention, &self.0.objects)
            .await
            .map_err(|error| self.database_error(error))
    }

    /// Stores the current row of a job, together with the events of the change.
    pub(crate) async fn save_job(
        &self,
        job: &JobRow,
        events: Vec<job_event::Kind>,
    ) -> Result<(), StoreError> {
        let mut writers = self.writers().await;
        save(&mut writers.lifecycle, job, events, self.0.retention)
            .await
            .map_err(|error| self.database_error(error))?;
        self.0.watchers.wake(&job.id);
        Ok(())
    }

    /// The job with this id.
    pub(crate) async fn load_job(&self, id: &str) -> Result<Option<JobRow>, StoreError> {
        let row =
            sqlx::query("SELECT * FROM jobs WHERE id = ?").bind(id).fetch_optional(self.readers()).await;
        row.and_then(|row| row.as_ref().map(job_row::from_row).transpose())
            .map_err(|error| self.database_error(error))
    }

    /// All jobs that are neither paused nor ended, in the order of submission.
    pub(crate) async fn load_active(&self) -> Result<Vec<JobRow>, StoreError> {
        let mut query = QueryBuilder::new("SELECT * FROM jobs WHERE ");
        push_states(&mut query, JobState::ALL.into_iter().filter(|state| !state.is_stopped()));
        let rows = query.push(" ORDER BY sequence").build().fetch_all(self.readers()).await;
        rows.and_then(|rows| rows.iter().map(job_row::from_row).collect())
            .map_err(|error| self.database_error(error))
    }

    /// The message about the job with this id.
    pub(crate) async fn job_message(&self, id: &str) -> Result<Option<v1::Job>, StoreError> {
        let mut query = QueryBuilder::new(WITH_PROGRESS);
        query.push("id = ").push_bind(id);
        Ok(self.messages(query).await.map_err(|error| self.database_error(error))?.pop().map(|(_, job)| job))
    }

    /// At most `limit` jobs with their sequence numbers, the newest first: those in one of `states`
    /// (in any state if this is empty) with a sequence number below `before`.
    pub(crate) async fn list_jobs(
        &self,
        states: &[JobState],
        before: Option<i64>,
        limit: u32,
    ) -> Result<Vec<(i64, v1::Job)>, StoreError> {
        let mut query = QueryBuilder::new(WITH_PROGRESS);
        query.push("sequence < ").push_bind(before.unwrap_or(i64::MAX));
        if !states.is_empty() {
            query.push(" AND ");
            push_states(&mut query, states.iter().copied());
        }
        query.push(" ORDER BY sequence DESC LIMIT ").push_bind(limit);
        self.messages(query).await.map_err(|error| self.database_error(error))
    }

    async fn messages(&self, mut query: QueryBuilder<Sqlite>) -> sqlx::Result<Vec<(i64, v1::Job)>> {
        let mut db = self.readers().begin().await?;
        let mut jobs = Vec::new();
        for row in query.build().fetch_all(&mut *db).await? {
            jobs.push(message(&mut db, &row).await?);
        }
        Ok(jobs)
    }
}

async fn insert(
    writer: &mut Writer,
    job: &JobRow,
    inputs: &[LookedUp],
    events: Vec<job_event::Kind>,
    retention: Retention,
    objects: &Path,
) -> sqlx::Result<InsertOutcome> {
    let mut db = writer.begin().await?;
    if !job.idempotency_key.is_empty() {
        let query = sqlx::query("SELECT * FROM jobs WHERE idempotency_key = ?").bind(&job.idempotency_key);
        if let Some(row) = query.fetch_optional(&mut *db).await? {
            return Ok(InsertOutcome::Existing(job_row::from_row(&row)?));
        }
    }
    // Only a writer removes objects, so the objects that exist now stay until this commit.
    let mut missing = Vec::new();
    for LookedUp { digest, has_file } in inputs {
        let query = sqlx::query("SELECT 1 FROM objects WHERE sha256 = ? AND size = ?");
        let found = query.bind(&digest.sha256).bind(int(digest.size)).fetch_optional(&mut *db).await?;
        if (found.is_none() || !has_file) && !missing.contains(digest) {
            missing.push(digest.clone());
        }
    }
    if !missing.is_empty() {
        return Ok(InsertOutcome::MissingObjects(missing));
    }
    let sequence = job_row::insert(&mut db, job).await?;
    sqlx::query("INSERT INTO logs (job) VALUES (?)").bind(sequence).execute(&mut *db).await?;
    name_inputs(&mut db, sequence, inputs.iter().map(|input| &input.digest)).await?;
    append_events(&mut db, sequence, events, retention.events).await?;
    owner::commit(db, objects).await?;
    Ok(InsertOutcome::New(JobRow { sequence, ..job.clone() }))
}

/// Keeps these files as inputs of the job.
async fn name_inputs(
    db: &mut SqliteConnection,
    sequence: i64,
    digests: impl Iterator<Item = &v1::FileDigest>,
) -> sqlx::Result<()> {
    for digest in digests {
        sqlx::query("INSERT INTO inputs (job, sha256) VALUES (?, ?) ON CONFLICT DO NOTHING")
            .bind(sequence)
            .bind(&digest.sha256)
            .execute(&mut *db)
            .await?;
    }
    Ok(())
}

async fn save(
    writer: &mut Writer,
    job: &JobRow,
    events: Vec<job_event::Kind>,
    retention: Retention,
) -> sqlx::Result<()> {
    let mut db = writer.begin().await?;
    let sequence = job_row::update(&mut db, job).await?;
    // The other inputs stay the same.
    name_inputs(&mut db, sequence, job.inputs.tokens.iter().filter_map(|file| file.digest.as_ref())).await?;
    append_events(&mut db, sequence, events, retention.events).await?;
    if job.state.is_stopped() && job.state != JobState::Succeeded {
        drop_results(&mut db, sequence).await?;
    }
    if job.state.is_terminal() {
        drop_checkpoints(&mut db, sequence).await?;
    }
    db.commit().await
}

fn push_states(query: &mut QueryBuilder<Sqlite>, states: impl Iterator<Item = JobState>) {
    query.push("state IN (");
    let mut list = query.separated(", ");
    for state in states {
        list.push_bind(state.name());
    }
    query.push(")");
}

async fn message(db: &mut SqliteConnection, row: &SqliteRow) -> sqlx::Result<(i64, v1::Job)> {
    let newest: Option<v1::StepReport> = job_row::optional_message(row, "newest_step")?;
    let job = job_row::from_row(row)?;
    let result = match job.state {
        JobState::Succeeded => result_files(db, job.sequence).await?,
        _ => Vec::new(),
    };
    let message = v1::Job {
        job_id: job.id,
        name: job.spec.name().to_owned(),
        state: job.state.name().to_owned(),
        generation: job.generation,
        // The row may be older than the newest step: steps are stored without a write of the row.
        completed_steps: job
            .completed_steps
            .max(newest.as_ref().and_then(|step| step.metrics).map_or(0, |m| m.step)),
        facts: job.facts,
        failure: job.failure,
        priority: job.priority,
        waiting_for: job.waiting_for,
        workers: job.members.into_iter().map(|member| member.worker).collect(),
        created: Some(job.created.into()),
        changed: Some(job.changed.into()),
        checkpoint_step: row.try_get("checkpoint_step")?,
        result,
        spec: Some(job.spec),
        inputs: Some(job.inputs),
        metrics: newest.and_then(|report| report.metrics),
        last_event: row.try_get("last_event")?,
        exported: job.exported,
    };
    Ok((job.sequence, message))
}
