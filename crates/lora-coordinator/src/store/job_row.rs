//! The row of a job in the database.

use std::time::{Duration, SystemTime};

use lora_plan::MemoryRequirements;
use lora_proto::v1;
use lora_spec::JobState;
use prost::Message;
use serde::{Deserialize, Serialize};
use sqlx::sqlite::{SqliteArguments, SqliteRow};
use sqlx::{Row, Sqlite, SqliteConnection};

use super::int;

/// The persistent state of a job, except its log and its files.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct JobRow {
    pub(crate) id: String,
    /// The number of the submit, assigned by the store.
    pub(crate) sequence: i64,
    /// Empty if the caller gave none.
    pub(crate) idempotency_key: String,
    /// The SHA-256 of the request that was submitted with the key.
    pub(crate) request_sha256: Vec<u8>,
    pub(crate) spec: v1::JobSpec,
    pub(crate) inputs: v1::Inputs,
    pub(crate) priority: i32,
    pub(crate) state: JobState,
    /// Whether settings, base and data were validated.
    pub(crate) validated: bool,
    /// The memory that a worker needs; `None` if the coordinator could not plan the job.
    pub(crate) requirements: Option<MemoryRequirements>,
    /// The generation of the newest group; 0 before the first.
    pub(crate) generation: u64,
    /// The members of the group, by rank.
    pub(crate) members: Vec<MemberRow>,
    /// The secret that the members of the group share.
    pub(crate) token: String,
    pub(crate) completed_steps: u64,
    pub(crate) facts: Option<v1::RunFacts>,
    pub(crate) failure: Option<v1::Failure>,
    /// The adapter in the result of a succeeded job.
    pub(crate) exported: Option<v1::ExportedAdapter>,
    /// The hash of the base's files, in hexadecimal; empty until a worker has reported it.
    pub(crate) base_sha256: String,
    /// The reason why the job waits, as text for users; empty if it does not wait.
    pub(crate) waiting_for: String,
    /// The number of groups in a row that finished no step.
    pub(crate) fruitless: u32,
    pub(crate) created: SystemTime,
    /// The time of the last change of state.
    pub(crate) changed: SystemTime,
}

impl Default for JobRow {
    /// The row of a job that has just been submitted.
    fn default() -> Self {
        let now = SystemTime::now();
        Self {
            id: String::new(),
            sequence: 0,
            idempotency_key: String::new(),
            request_sha256: Vec::new(),
            spec: v1::JobSpec::default(),
            inputs: v1::Inputs::default(),
            priority: 0,
            state: JobState::Validating,
            validated: false,
            requirements: None,
            generation: 0,
            members: Vec::new(),
            token: String::new(),
            completed_steps: 0,
            facts: None,
            failure: None,
            exported: None,
            base_sha256: String::new(),
            waiting_for: String::new(),
            fruitless: 0,
            created: now,
            changed: now,
        }
    }
}

/// A member of a job's group.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct MemberRow {
    pub(crate) worker: String,
    pub(crate) instance_id: String,
    pub(crate) peer_address: String,
}

type Query = sqlx::query::Query<'static, Sqlite, SqliteArguments>;

/// Inserts a job. Returns its sequence number.
pub(super) async fn insert(db: &mut SqliteConnection, job: &JobRow) -> sqlx::Result<i64> {
    let query = sqlx::query(
        "INSERT INTO jobs (spec, priority, state, validated, generation, members, token, completed_steps, \
         facts, failure, base_sha256, waiting_for, fruitless, changed, needs, inputs, \
         exported, id, idempotency_key, request_sha256, created) \
         VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) RETURNING sequence",
    );
    let query = bind_changing(query, job)?
        .bind(&job.id)
        .bind(Some(&job.idempotency_key).filter(|key| !key.is_empty()))
        .bind(&job.request_sha256)
        .bind(nanos(job.created));
    query.fetch_one(db).await?.try_get("sequence")
}

/// Writes the columns of a job that can change. Returns its sequence number.
pub(super) async fn update(db: &mut SqliteConnection, job: &JobRow) -> sqlx::Result<i64> {
    let query = sqlx::query(
        "UPDATE jobs SET (spec, priority, state, validated, generation, members, token, completed_steps, \
         facts, failure, base_sha256, waiting_for, fruitless, changed, needs, inputs, \
         exported) = (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) WHERE id = ? RETURNING sequence",
    );
    bind_changing(query, job)?.bind(&job.id).fetch_one(db).await?.try_get("sequence")
}

fn bind_changing(query: Query, job: &JobRow) -> sqlx::Result<Query> {
    let members = serde_json::to_string(&job.members).map_err(|error| sqlx::Error::Encode(error.into()))?;
    let requirements = job.requirements.as_ref().map(serde_json::to_string).transpose();
    let requirements = requirements.map_err(|error| sqlx::Error::Encode(error.into()))?;
    Ok(query
        .bind(job.spec.encode_to_vec())
        .bind(job.priority)
        .bind(job.state.name())
        .bind(job.validated)
        .bind(int(job.generation))
        .bind(members)
        .bind(&job.token)
        .bind(int(job.completed_steps))
        .bind(job.facts.as_ref().map(Message::encode_to_vec))
        .bind(job.failure.as_ref().map(Message::encode_to_vec))
        .bind(&job.base_sha256)
        .bind(&job.waiting_for)
        .bind(job.fruitless)
        .bind(nanos(job.changed))
        .bind(requirements)
        .bind(job.inputs.encode_to_vec())
        .bind(job.exported.as_ref().map(Message::encode_to_vec)))
}

/// Decodes a job from a row with all columns of `jobs`.
pub(super) fn from_row(row: &SqliteRow) -> sqlx::Result<JobRow> {
    let state: String = row.try_get("state")?;
    let members: String = row.try_get("members")?;
    let requirements: Option<String> = row.try_get("needs")?;
    Ok(JobRow {
        id: row.try_get("id")?,
        sequence: row.try_get("sequence")?,
        idempotency_key: row.try_get::<Option<_>, _>("idempotency_key")?.unwrap_or_default(),
        request_sha256: row.try_get("request_sha256")?,
        spec: message(row, "spec")?,
        inputs: message(row, "inputs")?,
        priority: row.try_get("priority")?,
        state: JobState::from_name(&state)
            .ok_or_else(|| corrupt("state", format!("invalid state {state:?}")))?,
        validated: row.try_get("validated")?,
        // The requirements of another version may not be readable. Without them, the workers check
        // their memory.
        requirements: requirements.and_then(|requirements| serde_json::from_str(&requirements).ok()),
        generation: row.try_get("generation")?,
        members: serde_json::from_str(&members).map_err(|error| corrupt("members", error))?,
        token: row.try_get("token")?,
        completed_steps: row.try_get("completed_steps")?,
        facts: optional_message(row, "facts")?,
        failure: optional_message(row, "failure")?,
        exported: optional_message(row, "exported")?,
        base_sha256: row.try_get("base_sha256")?,
        waiting_for: row.try_get("waiting_for")?,
        fruitless: row.try_get("fruitless")?,
        created: time(row.try_get("created")?),
        changed: time(row.try_get("changed")?),
    })
}

/// Decodes the message in a column.
pub(super) fn message<M: Message + Default>(row: &SqliteRow, column: &str) -> sqlx::Result<M> {
    M::decode(row.try_get::<&[u8], _>(column)?).map_err(|error| corrupt(column, error))
}

/// Decodes the message in a column that may be NULL.
pub(super) fn optional_message<M: Message + Default>(
    row: &SqliteRow,
    column: &str,
) -> sqlx::Result<Option<M>> {
    let bytes: Option<&[u8]> = row.try_get(column)?;
    bytes.map(|bytes| M::decode(bytes).map_err(|error| corrupt(column, error))).transpose()
}

/// Converts a time to nanoseconds since 1970.
pub(super) fn nanos(time: SystemTime) -> i64 {
    time.duration_since(SystemTime::UNIX_EPOCH)
        .map_or(0, |age| i64::try_from(age.as_nanos()).unwrap_or(i64::MAX))
}

fn time(nanos: i64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_nanos(u64::try_from(nanos).unwrap_or(0))
}

fn corrupt(column: &str, source: impl Into<sqlx::error::BoxDynError>) -> sqlx::Error {
    sqlx::Error::ColumnDecode { index: column.to_owned(), source: source.into() }
}
