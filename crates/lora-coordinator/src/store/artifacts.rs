//! The artifacts of jobs, which workers upload: checkpoints and results.

use std::collections::BTreeSet;

use lora_proto::v1::{self, job_artifact, job_event};
use lora_spec::{JobSpec, JobState, file_names};
use sqlx::sqlite::SqliteRow;
use sqlx::{Row, SqliteConnection};

use super::log::append_events;
use super::unreferenced::delete_unreferenced;
use super::{JobRow, StagedFile, Store, StoreError, int, job_row, owner};

/// The number of steps that one query reads.
const STEPS_PER_READ: i64 = 1000;
/// A time before all others.
const BEFORE_ALL_TIMES: i64 = i64::MIN;

/// Why a worker's file is not accepted.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum ArtifactRefusal {
    /// The job does not exist.
    UnknownJob,
    /// The file comes from a group that is not the job's current one.
    StaleGeneration {
        /// The current generation of the job.
        current: u64,
    },
    /// Workers may not write artifacts of a job in this state.
    NotActive {
        /// The state of the job.
        state: JobState,
    },
}

/// The name of a file of a result that was not uploaded in the job's generation.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct MissingFile(pub(crate) String);

impl Store {
    /// The newest checkpoint of a job.
    pub(crate) async fn newest_checkpoint(&self, job_id: &str) -> Result<Option<v1::Checkpoint>, StoreError> {
        let row = sqlx::query(
            "SELECT step, sha256, size FROM checkpoints JOIN objects USING (sha256) \
             WHERE job = (SELECT sequence FROM jobs WHERE id = ?) ORDER BY step DESC LIMIT 1",
        )
        .bind(job_id)
        .fetch_optional(self.readers())
        .await;
        let checkpoint = |row: SqliteRow| {
            Ok(v1::Checkpoint { step: row.try_get("step")?, digest: Some(digest_in(&row)?) })
        };
        row.and_then(|row| row.map(checkpoint).transpose()).map_err(|error| self.database_error(error))
    }

    /// Whether `artifact` would be accepted now.
    pub(crate) async fn check_artifact(
        &self,
        artifact: &v1::JobArtifact,
    ) -> Result<Result<(), ArtifactRefusal>, StoreError> {
        let job = self.load_job(&artifact.job_id).await?;
        Ok(job.ok_or(ArtifactRefusal::UnknownJob).and_then(|job| accept(&job, artifact)))
    }

    /// Commits the staged file as `artifact`, if it comes from the job's current group and the
    /// state of the job allows artifacts. Only the newest `training.save_total_limit` checkpoints
    /// are kept.
    pub(crate) async fn commit_artifact(
        &self,
        artifact: &v1::JobArtifact,
        staged: StagedFile,
    ) -> Result<Result<(), ArtifactRefusal>, StoreError> {
        let (store, artifact) = (self.clone(), artifact.clone());
        self.run_to_completion(async move { store.take_artifact(&artifact, staged).await }).await
    }

    async fn take_artifact(
        &self,
        artifact: &v1::JobArtifact,
        staged: StagedFile,
    ) -> Result<Result<(), ArtifactRefusal>, StoreError> {
        let failed = |error| self.database_error(error);
        let mut writers = self.writers().await;
        let mut db = writers.lifecycle.begin().await.map_err(failed)?;
        let row =
            sqlx::query("SELECT * FROM jobs WHERE id = ?").bind(&artifact.job_id).fetch_optional(&mut *db);
        let Some(row) = row.await.map_err(failed)? else { return Ok(Err(ArtifactRefusal::UnknownJob)) };
        let job = job_row::from_row(&row).map_err(failed)?;
        if let Err(refusal) = accept(&job, artifact) {
            return Ok(Err(refusal));
        }
        let digest = self.move_into_place(&mut db, staged).await?;
        match &artifact.name {
            Some(job_artifact::Name::CheckpointStep(step)) => {
                add_checkpoint(&mut db, &job, *step, &digest, self.0.retention.events)
                    .await
                    .map_err(failed)?;
            }
            Some(job_artifact::Name::ResultFile(name)) => {
                add_result(&mut db, &job, name, &digest).await.map_err(failed)?;
            }
            None => return Err(StoreError::Invalid("an artifact without a name".into())),
        }
        let unreferenced_objects = delete_unreferenced(&mut db, BEFORE_ALL_TIMES).await.map_err(failed)?;
        owner::commit(db, &self.0.objects).await.map_err(failed)?;
        self.0.watchers.wake(&artifact.job_id);
        self.remove(unreferenced_objects).await;
        Ok(Ok(()))
    }

    /// Stores a job that has succeeded, with its events and its result: exactly `files`, as
    /// uploaded in the job's generation, and the files that the coordinator writes. If a file is
    /// missing, stores nothing.
    pub(crate) async fn commit_result(
        &self,
        job: &JobRow,
        files: &[String],
        events: Vec<job_event::Kind>,
    ) -> Result<Result<Vec<v1::StoredFile>, MissingFile>, StoreError> {
        let (store, job) = (self.clone(), job.clone());
        let files = files
            .iter()
            .filter(|name| ![file_names::METRICS, file_names::JOB].contains(&name.as_str()))
            .cloned()
            .collect();
        self.run_to_completion(async move { store.take_result(&job, files, events).await }).await
    }

    async fn take_result(
        &self,
        job: &JobRow,
        files: BTreeSet<String>,
        mut events: Vec<job_event::Kind>,
    ) -> Result<Result<Vec<v1::StoredFile>, MissingFile>, StoreError> {
        let failed = |error| self.database_error(error);
        let own = [
            (file_names::METRICS, self.stage_metrics(job).await?),
            (file_names::JOB, self.stage_job_file(job).await?),
        ];
        let mut writers = self.writers().await;
        let mut db = writers.lifecycle.begin().await.map_err(failed)?;
        let sequence = job_row::update(&mut db, job).await.map_err(failed)?;
        drop_results_except(&mut db, sequence, job.generation, &files).await.map_err(failed)?;
        let found = result_files(&mut db, sequence).await.map_err(failed)?;
        if let Some(name) = files.into_iter().find(|name| !found.iter().any(|file| file.name == *name)) {
            return Ok(Err(MissingFile(name)));
        }
        for (name, staged) in own {
            let digest = self.move_into_place(&mut db, staged).await?;
            add_result(&mut db, job, name, &digest).await.map_err(failed)?;
        }
        drop_checkpoints(&mut db, sequence).await.map_err(failed)?;
        let files = result_files(&mut db, sequence).await.map_err(failed)?;
        let saved = v1::ResultSaved { files: files.clone(), exported: job.exported };
        events.insert(0, job_event::Kind::ResultSaved(saved));
        append_events(&mut db, sequence, events, self.0.retention.events).await.map_err(failed)?;
        let unreferenced_objects = delete_unreferenced(&mut db, BEFORE_ALL_TIMES).await.map_err(failed)?;
        owner::commit(db, &self.0.objects).await.map_err(failed)?;
        self.0.watchers.wake(&job.id);
        self.remove(unreferenced_objects).await;
        Ok(Ok(files))
    }

    /// A file of a succeeded job's result.
    pub(crate) async fn result_file(
        &self,
        job_id: &str,
        name: &str,
    ) -> Result<Option<v1::FileDigest>, StoreError> {
        let row = sqlx::query(
            "SELECT sha256, size FROM results JOIN objects USING (sha256) \
             WHERE job = (SELECT sequence FROM jobs WHERE id = ? AND state = 'succeeded') AND name = ?",
        )
        .bind(job_id)
        .bind(name)
        .fetch_optional(self.readers())
        .await;
        row.and_then(|row| row.as_ref().map(digest_in).transpose())
            .map_err(|error| self.database_error(error))
    }

    /// Stages the metrics: one line of JSON for each logged step.
    async fn stage_metrics(&self, job: &JobRow) -> Result<StagedFile, StoreError> {
        let mut staged = self.stage().await?;
        let mut last = 0;
        loop {
            let rows = sqlx::query(
                "SELECT step, report FROM steps WHERE job = ? AND step > ? ORDER BY step LIMIT ?",
            )
            .bind(job.sequence)
            .bind(last)
            .bind(STEPS_PER_READ)
            .fetch_all(self.readers())
            .await
            .map_err(|error| self.database_error(error))?;
            let mut text = Vec::new();
            for row in &rows {
                let report: v1::StepReport =
                    job_row::message(row, "report").map_err(|error| self.database_error(error))?;
                last = row.try_get("step").map_err(|error| self.database_error(error))?;
                if let Some(metrics) = report.metrics.filter(|_| report.logged) {
                    serde_json::to_writer(&mut text, &metrics)
                        .map_err(|error| cannot_write(file_names::METRICS, error))?;
                    text.push(b'\n');
                }
            }
            staged.write(&text).await?;
            if rows.is_empty() {
                return staged.finish().await;
            }
        }
    }

    /// Stages the job file, with all settings of the job.
    async fn stage_job_file(&self, job: &JobRow) -> Result<StagedFile, StoreError> {
        let spec =
            JobSpec::try_from(job.spec.clone()).map_err(|error| cannot_write(file_names::JOB, error))?;
        let text = serde_saphyr::to_string(&spec).map_err(|error| cannot_write(file_names::JOB, error))?;
        let mut staged = self.stage().await?;
        staged.write(text.as_bytes()).await?;
        staged.finish().await
    }
}

/// Whether `job` accepts `artifact` in its current generation and state.
fn accept(job: &JobRow, artifact: &v1::JobArtifact) -> Result<(), ArtifactRefusal> {
    if job.generation != artifact.generation {
        return Err(ArtifactRefusal::StaleGeneration { current: job.generation });
    }
    if !job.state.is_active() || job.state == JobState::Cancelling {
        return Err(ArtifactRefusal::NotActive { state: job.state });
    }
    Ok(())
}

/// The files of a result, by name.
pub(super) async fn result_files(db: &mut SqliteConnection, job: i64) -> sqlx::Result<Vec<v1::StoredFile>> {
    let rows = sqlx::query(
        "SELECT name, sha256, size FROM results JOIN objects USING (sha256) WHERE job = ? ORDER BY name",
    )
    .bind(job)
    .fetch_all(db)
    .await?;
    let file =
        |row: &SqliteRow| Ok(v1::StoredFile { name: row.try_get("name")?, digest: Some(digest_in(row)?) });
    rows.iter().map(file).collect()
}

/// Removes the checkpoints of a job that cannot be resumed.
pub(super) async fn drop_checkpoints(db: &mut SqliteConnection, job: i64) -> sqlx::Result<()> {
    sqlx::query("DELETE FROM checkpoints WHERE job = ?").bind(job).execute(db).await.map(drop)
}

/// Removes the files that were uploaded for a job's result.
pub(super) async fn drop_results(db: &mut SqliteConnection, job: i64) -> sqlx::Result<()> {
    sqlx::query("DELETE FROM results WHERE job = ?").bind(job).execute(db).await.map(drop)
}

async fn drop_results_except(
    db: &mut SqliteConnection,
    job: i64,
    generation: u64,
    files: &BTreeSet<String>,
) -> sqlx::Result<()> {
    let files = serde_json::to_string(files).map_err(|error| sqlx::Error::Encode(error.into()))?;
    let query = sqlx::query(
        "DELETE FROM results WHERE job = ? \
         AND (generation <> ? OR name NOT IN (SELECT value FROM json_each(?)))",
    );
    query.bind(job).bind(int(generation)).bind(files).execute(db).await.map(drop)
}

async fn add_checkpoint(
    db: &mut SqliteConnection,
    job: &JobRow,
    step: u64,
    digest: &v1::FileDigest,
    kept_events: u64,
) -> sqlx::Result<()> {
    let added = sqlx::query(
        "INSERT INTO checkpoints (job, step, generation, sha256) VALUES (?, ?, ?, ?) \
         ON CONFLICT (job, step) DO UPDATE SET generation = excluded.generation, sha256 = excluded.sha256 \
         WHERE (generation, sha256) <> (excluded.generation, excluded.sha256)",
    )
    .bind(job.sequence)
    .bind(int(step))
    .bind(int(job.generation))
    .bind(&digest.sha256)
    .execute(&mut *db)
    .await?;
    // A worker that did not receive the answer uploads the same checkpoint again.
    if added.rows_affected() == 0 {
        return Ok(());
    }
    sqlx::query(
        "DELETE FROM checkpoints WHERE job = ?1 AND step NOT IN \
         (SELECT step FROM checkpoints WHERE job = ?1 ORDER BY step DESC LIMIT ?2)",
    )
    .bind(job.sequence)
    .bind(int(checkpoints_kept(&job.spec)))
    .execute(&mut *db)
    .await?;
    let saved = v1::CheckpointSaved { step, digest: Some(digest.clone()) };
    append_events(db, job.sequence, vec![job_event::Kind::CheckpointSaved(saved)], kept_events).await
}

fn checkpoints_kept(job: &v1::JobSpec) -> u64 {
    let asked = job.training.as_ref().and_then(|training| training.save_total_limit);
    asked.unwrap_or(lora_spec::TrainingSpec::default().save_total_limit as u64).max(1)
}

async fn add_result(
    db: &mut SqliteConnection,
    job: &JobRow,
    name: &str,
    digest: &v1::FileDigest,
) -> sqlx::Result<()> {
    sqlx::query(
        "INSERT INTO results (job, name, generation, sha256) VALUES (?, ?, ?, ?) \
         ON CONFLICT (job, name) DO UPDATE SET generation = excluded.generation, sha256 = excluded.sha256",
    )
    .bind(job.sequence)
    .bind(name)
    .bind(int(job.generation))
    .bind(&digest.sha256)
    .execute(db)
    .await
    .map(drop)
}

fn digest_in(row: &SqliteRow) -> sqlx::Result<v1::FileDigest> {
    Ok(v1::FileDigest { size: row.try_get("size")?, sha256: row.try_get("sha256")? })
}

fn cannot_write(file: &str, error: impl std::fmt::Display) -> StoreError {
    StoreError::Invalid(format!("cannot write {file}: {error}"))
}
