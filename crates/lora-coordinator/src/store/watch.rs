//! Watches: streams of a job's log, first page by page from the database, then as the log grows.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures_util::Stream;
use futures_util::stream::try_unfold;
use lora_proto::v1::{self, watch_job_response};
use lora_spec::JobState;
use prost::Message;
use sqlx::sqlite::SqliteRow;
use sqlx::{Row, SqliteConnection};
use tokio::sync::watch;

use super::{Store, StoreError, int, job_row};

/// The largest number of events, and of steps, in a page.
const PAGE_ROWS: i64 = 128;

/// Why a watch ends early.
#[derive(Debug, thiserror::Error)]
pub(crate) enum WatchError {
    #[error("the job does not exist")]
    UnknownJob,
    #[error("event {asked} is no longer kept; the first one is {first}")]
    ForgottenEvents { asked: u64, first: u64 },
    #[error("step {asked} is no longer kept; the first one is {first}")]
    ForgottenSteps { asked: u64, first: u64 },
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl Store {
    /// Streams the job's events from `from_number` on (0 means 1) and its steps after `after_step`,
    /// in the order in which they were stored, then new ones as they come. The stream ends when the
    /// job is paused or has ended and everything was sent, or when the store is closed. A slow
    /// reader keeps one page in memory, and blocks nothing.
    pub(crate) fn watch(
        &self,
        job_id: String,
        from_number: u64,
        after_step: u64,
        events_only: bool,
    ) -> impl Stream<Item = Result<v1::WatchJobResponse, WatchError>> + Send + 'static {
        let reader = WatchReader {
            changes: self.0.watchers.subscribe(&job_id),
            store: self.clone(),
            job_id,
            number: from_number.max(1),
            after_step,
            events_only,
            page: VecDeque::new(),
            next: ReadStep::Read,
        };
        try_unfold(reader, |mut reader| async move { Ok(reader.next().await?.map(|item| (item, reader))) })
    }
}

/// A watch in progress.
struct WatchReader {
    store: Store,
    job_id: String,
    changes: Changes,
    /// The number of the next event.
    number: u64,
    after_step: u64,
    events_only: bool,
    page: VecDeque<v1::WatchJobResponse>,
    next: ReadStep,
}

/// The next action of a reader after its page was sent.
enum ReadStep {
    Read,
    /// Waits until the job changes.
    Wait,
    End,
}

impl WatchReader {
    async fn next(&mut self) -> Result<Option<v1::WatchJobResponse>, WatchError> {
        loop {
            if let Some(item) = self.page.pop_front() {
                return Ok(Some(item));
            }
            let closed = &self.store.0.closed;
            match self.next {
                ReadStep::End => return Ok(None),
                _ if closed.is_cancelled() => return Ok(None),
                ReadStep::Wait => {
                    tokio::select! {
                        () = self.changes.wait() => self.next = ReadStep::Read,
                        () = closed.cancelled() => return Ok(None),
                    }
                }
                ReadStep::Read => self.read().await?,
            }
        }
    }

    /// Reads the next page.
    async fn read(&mut self) -> Result<(), WatchError> {
        // A change during the read below counts as unseen, even if the read already includes it.
        self.changes.seen();
        let log = self.snapshot().await.map_err(|error| self.store.database_error(error))?;
        let log = log.ok_or(WatchError::UnknownJob)?;
        if self.number < log.first_event {
            return Err(WatchError::ForgottenEvents { asked: self.number, first: log.first_event });
        }
        if !self.events_only && self.after_step < log.forgotten_steps {
            let (asked, first) = (self.after_step.saturating_add(1), log.forgotten_steps + 1);
            return Err(WatchError::ForgottenSteps { asked, first });
        }
        self.next = if log.is_full() {
            ReadStep::Read
        } else if log.is_stopped {
            ReadStep::End
        } else {
            ReadStep::Wait
        };
        self.page = log.merged();
        for item in &self.page {
            match &item.kind {
                Some(watch_job_response::Kind::Event(event)) => self.number = event.number.saturating_add(1),
                Some(watch_job_response::Kind::Step(step)) => {
                    self.after_step = step.metrics.as_ref().map_or(self.after_step, |metrics| metrics.step);
                }
                None => {}
            }
        }
        Ok(())
    }

    /// Reads the log from the reader's position, in one transaction.
    async fn snapshot(&self) -> sqlx::Result<Option<Log>> {
        let mut db = self.store.readers().begin().await?;
        let job = sqlx::query(
            "SELECT sequence, state, forgotten_steps, \
             COALESCE((SELECT MIN(number) FROM events WHERE events.job = sequence), 1) AS first_event \
             FROM jobs JOIN logs ON logs.job = sequence WHERE id = ?",
        )
        .bind(&self.job_id)
        .fetch_optional(&mut *db)
        .await?;
        let Some(job) = job else { return Ok(None) };
        let (sequence, state): (i64, String) = (job.try_get("sequence")?, job.try_get("state")?);
        let events =
            "SELECT position, event FROM events WHERE job = ? AND number >= ? ORDER BY number LIMIT ?";
        let steps = "SELECT position, report FROM steps WHERE job = ? AND step > ? ORDER BY step LIMIT ?";
        Ok(Some(Log {
            is_stopped: JobState::from_name(&state).is_some_and(JobState::is_stopped),
            first_event: job.try_get("first_event")?,
            forgotten_steps: job.try_get("forgotten_steps")?,
            events: rows(&mut db, events, sequence, self.number, "event").await?,
            steps: match self.events_only {
                true => VecDeque::new(),
                false => rows(&mut db, steps, sequence, self.after_step, "report").await?,
            },
        }))
    }
}

/// A section of a job's log, from the reader's position.
struct Log {
    is_stopped: bool,
    first_event: u64,
    /// Steps up to this one are no longer kept.
    forgotten_steps: u64,
    events: VecDeque<(i64, v1::JobEvent)>,
    steps: VecDeque<(i64, v1::StepReport)>,
}

impl Log {
    /// Whether the log may have more rows than this section.
    fn is_full(&self) -> bool {
        self.events.len() as i64 == PAGE_ROWS || self.steps.len() as i64 == PAGE_ROWS
    }

    /// The events and steps in the order in which they were stored, as far as this order is known.
    fn merged(mut self) -> VecDeque<v1::WatchJobResponse> {
        use watch_job_response::Kind;
        // After the end of a full page of events there may be events that are earlier than the next
        // step, and the other way round.
        let (more_events, more_steps) =
            (self.events.len() as i64 == PAGE_ROWS, self.steps.len() as i64 == PAGE_ROWS);
        let mut merged = VecDeque::with_capacity(self.events.len() + self.steps.len());
        loop {
            let event_first = match (self.events.front(), self.steps.front()) {
                (Some((event, _)), Some((step, _))) => event < step,
                (Some(_), None) if !more_steps => true,
                (None, Some(_)) if !more_events => false,
                _ => return merged,
            };
            let kind = match event_first {
                true => self.events.pop_front().map(|(_, event)| Kind::Event(event)),
                false => self.steps.pop_front().map(|(_, step)| Kind::Step(step)),
            };
            merged.push_back(v1::WatchJobResponse { kind });
        }
    }
}

async fn rows<M: Message + Default>(
    db: &mut SqliteConnection,
    query: &'static str,
    job: i64,
    from: u64,
    column: &str,
) -> sqlx::Result<VecDeque<(i64, M)>> {
    let rows = sqlx::query(query).bind(job).bind(int(from)).bind(PAGE_ROWS).fetch_all(db).await?;
    let decoded = |row: &SqliteRow| Ok((row.try_get("position")?, job_row::message(row, column)?));
    rows.iter().map(decoded).collect()
}

/// The watches of each job, by job id.
#[derive(Debug, Clone, Default)]
pub(super) struct Watchers(Arc<Mutex<HashMap<String, watch::Sender<()>>>>);

impl Watchers {
    /// Wakes the watches of a job that has changed.
    pub(super) fn wake(&self, job_id: &str) {
        if let Some(sender) = self.lock().get(job_id) {
            sender.send_replace(());
        }
    }

    fn subscribe(&self, job_id: &str) -> Changes {
        let receiver = self.lock().entry(job_id.to_owned()).or_default().subscribe();
        Changes { receiver, job_id: job_id.to_owned(), watchers: self.clone() }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, watch::Sender<()>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A subscription to the changes of one job.
struct Changes {
    receiver: watch::Receiver<()>,
    job_id: String,
    watchers: Watchers,
}

impl Changes {
    /// Marks all changes until now as seen.
    fn seen(&mut self) {
        self.receiver.mark_unchanged();
    }

    /// Waits for an unseen change.
    async fn wait(&mut self) {
        // The sender exists as long as there is a subscription, so this does not fail.
        let _ = self.receiver.changed().await;
    }
}

impl Drop for Changes {
    fn drop(&mut self) {
        let mut watchers = self.watchers.lock();
        // The last subscription to a job removes the job's entry.
        if watchers.get(&self.job_id).is_some_and(|sender| sender.receiver_count() == 1) {
            watchers.remove(&self.job_id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn watchers_are_kept_while_a_watch_exists() {
        let watchers = Watchers::default();
        let (first, second) = (watchers.subscribe("a"), watchers.subscribe("a"));
        drop(first);
        assert_eq!(watchers.lock().len(), 1);
        watchers.wake("b");
        assert!(!second.receiver.has_changed().unwrap());
        watchers.wake("a");
        assert!(second.receiver.has_changed().unwrap());
        drop(second);
        assert!(watchers.lock().is_empty());
        watchers.wake("a");
        assert!(watchers.lock().is_empty());
    }
}
