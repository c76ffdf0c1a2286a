//! The log of a job: numbered events, and steps.

use std::collections::BTreeSet;
use std::time::SystemTime;

use futures_util::TryStreamExt;
use lora_proto::v1::{self, job_event};
use prost::Message;
use sqlx::{Row, SqliteConnection};

use super::connections::Writer;
use super::job_row::message;
use super::{Store, StoreError, int};

impl Store {
    /// Stores finished steps. Steps that are stored already are not changed. After a loss of power,
    /// new steps may be missing until something else has been written.
    pub(crate) async fn add_steps(&self, job_id: &str, steps: &[v1::StepReport]) -> Result<(), StoreError> {
        let mut writers = self.writers().await;
        let kept = self.0.retention.steps;
        insert_steps(&mut writers.relaxed, job_id, steps, kept)
            .await
            .map_err(|error| self.database_error(error))?;
        self.0.watchers.wake(job_id);
        Ok(())
    }

    /// The highest stored step; 0 if there is none.
    pub(crate) async fn last_step(&self, job_id: &str) -> Result<u64, StoreError> {
        sqlx::query_scalar(
            "SELECT COALESCE(MAX(step), 0) FROM steps WHERE job = (SELECT sequence FROM jobs WHERE id = ?)",
        )
        .bind(job_id)
        .fetch_one(self.readers())
        .await
        .map_err(|error| self.database_error(error))
    }

    /// What the job's log has of the workers' reports.
    pub(crate) async fn recorded(&self, job_id: &str, generation: u64) -> Result<Recorded, StoreError> {
        let query = sqlx::query(
            "SELECT event FROM events WHERE job = (SELECT sequence FROM jobs WHERE id = ?) ORDER BY number",
        );
        let mut events = query.bind(job_id).fetch(self.readers());
        let (mut recorded, mut current) = (Recorded::default(), 0);
        while let Some(row) = events.try_next().await.map_err(|error| self.database_error(error))? {
            let event: v1::JobEvent = message(&row, "event").map_err(|error| self.database_error(error))?;
            match event.kind {
                Some(job_event::Kind::BaseReady(base)) => drop(recorded.bases.insert(base.worker)),
                Some(job_event::Kind::Assigned(assigned)) => current = assigned.generation,
                // A notice without a worker is about the end of the group before.
                Some(job_event::Kind::Notice(notice)) if current == generation => {
                    recorded.has_notice |= !notice.worker.is_empty();
                }
                _ => {}
            }
        }
        Ok(recorded)
    }
}

/// What a job's log has of the workers' reports, so that it is not recorded again after a restart.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Recorded {
    /// The workers that reported their base.
    pub(crate) bases: BTreeSet<String>,
    /// Whether the group of the generation gave a notice.
    pub(crate) has_notice: bool,
}

/// Appends events to the log of the job with this sequence number, and removes the oldest events,
/// so that `kept` remain.
pub(super) async fn append_events(
    db: &mut SqliteConnection,
    job: i64,
    events: Vec<job_event::Kind>,
    kept: u64,
) -> sqlx::Result<()> {
    let count = int(events.len() as u64);
    let end = sqlx::query(
        "UPDATE logs SET events = events + ?1, position = position + ?1 WHERE job = ?2 \
         RETURNING events, position",
    )
    .bind(count)
    .bind(job)
    .fetch_one(&mut *db)
    .await?;
    let (last, position): (i64, i64) = (end.try_get("events")?, end.try_get("position")?);
    let time = Some(SystemTime::now().into());
    for (kind, back) in events.into_iter().zip((0..count).rev()) {
        let number = last - back;
        let event = v1::JobEvent { number: number.unsigned_abs(), time, kind: Some(kind) };
        sqlx::query("INSERT INTO events (job, number, position, event) VALUES (?, ?, ?, ?)")
            .bind(job)
            .bind(number)
            .bind(position - back)
            .bind(event.encode_to_vec())
            .execute(&mut *db)
            .await?;
    }
    sqlx::query("DELETE FROM events WHERE job = ? AND number <= ?")
        .bind(job)
        .bind(last.saturating_sub(int(kept.max(1))))
        .execute(db)
        .await?;
    Ok(())
}

async fn insert_steps(
    writer: &mut Writer,
    job_id: &str,
    steps: &[v1::StepReport],
    kept: u64,
) -> sqlx::Result<()> {
    let mut db = writer.begin().await?;
    let count = int(steps.len() as u64);
    let end = sqlx::query(
        "UPDATE logs SET position = position + ? WHERE job = (SELECT sequence FROM jobs WHERE id = ?) \
         RETURNING job, position",
    )
    .bind(count)
    .bind(job_id)
    .fetch_one(&mut *db)
    .await?;
    let (job, position): (i64, i64) = (end.try_get("job")?, end.try_get("position")?);
    for (report, back) in steps.iter().zip((0..count).rev()) {
        let Some(metrics) = &report.metrics else { continue };
        sqlx::query(
            "INSERT INTO steps (job, step, position, report) VALUES (?, ?, ?, ?) ON CONFLICT DO NOTHING",
        )
        .bind(job)
        .bind(int(metrics.step))
        .bind(position - back)
        .bind(report.encode_to_vec())
        .execute(&mut *db)
        .await?;
    }
    let horizon: i64 = sqlx::query_scalar("SELECT COALESCE(MAX(step), 0) - ? FROM steps WHERE job = ?")
        .bind(int(kept.max(1)))
        .bind(job)
        .fetch_one(&mut *db)
        .await?;
    let pruned = sqlx::query("DELETE FROM steps WHERE job = ? AND step <= ?")
        .bind(job)
        .bind(horizon)
        .execute(&mut *db)
        .await?;
    if pruned.rows_affected() > 0 {
        sqlx::query("UPDATE logs SET forgotten_steps = MAX(forgotten_steps, ?) WHERE job = ?")
            .bind(horizon)
            .bind(job)
            .execute(&mut *db)
            .await?;
    }
    db.commit().await
}
