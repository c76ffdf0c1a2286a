//! A job's numbered events, kept in memory up to a bound, and reading along as they happen.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use futures_util::Stream;
use futures_util::stream;
use lora_proto::v1::{JobEvent, job_event};
use tokio::sync::watch;
use tonic::Status;

/// Events that a reader takes from the log at a time.
const READ_EVENTS: usize = 256;

/// The log of one job. Readers hold no place in it: one that is slower than the log forgets is told so.
#[derive(Debug)]
pub(crate) struct JobLog {
    entries: Mutex<Entries>,
    changed: watch::Sender<()>,
}

#[derive(Debug)]
struct Entries {
    kept: VecDeque<JobEvent>,
    most: usize,
    next_number: u64,
    at_rest: bool,
    closed: bool,
}

/// What a reader finds at its number.
enum Read {
    Events(VecDeque<JobEvent>),
    NothingYet,
    End,
    Forgotten { first: u64 },
}

impl JobLog {
    /// An empty log that keeps the newest `most` events.
    pub(crate) fn new(most: usize) -> Self {
        let entries = Entries {
            kept: VecDeque::new(),
            most: most.max(1),
            next_number: 1,
            at_rest: false,
            closed: false,
        };
        Self { entries: Mutex::new(entries), changed: watch::Sender::new(()) }
    }

    /// Appends an event. `at_rest`: none will follow for now, so that readers may go once they have it.
    pub(crate) fn append(&self, kind: job_event::Kind, at_rest: bool) {
        let mut entries = self.lock();
        let event =
            JobEvent { number: entries.next_number, time: Some(SystemTime::now().into()), kind: Some(kind) };
        entries.next_number += 1;
        entries.at_rest = at_rest;
        if entries.kept.len() == entries.most {
            entries.kept.pop_front();
        }
        entries.kept.push_back(event);
        drop(entries);
        self.changed.send_replace(());
    }

    /// Lets all readers go once they have read what is there.
    pub(crate) fn close(&self) {
        self.lock().closed = true;
        self.changed.send_replace(());
    }

    /// The events from number `from` on (0 means 1), until the job is at rest or the log is closed.
    pub(crate) fn follow(self: Arc<Self>, from: u64) -> impl Stream<Item = Result<JobEvent, Status>> + Send {
        let reader =
            Reader { changed: self.changed.subscribe(), log: self, next: from.max(1), read: VecDeque::new() };
        stream::unfold(Some(reader), |reader| async {
            let mut reader = reader?;
            match reader.next().await {
                Ok(Some(event)) => Some((Ok(event), Some(reader))),
                Ok(None) => None,
                Err(status) => Some((Err(status), None)),
            }
        })
    }

    fn read(&self, from: u64) -> Read {
        let entries = self.lock();
        let first = entries.next_number - entries.kept.len() as u64;
        if from < first {
            return Read::Forgotten { first };
        }
        let events: VecDeque<_> =
            entries.kept.iter().skip((from - first) as usize).take(READ_EVENTS).cloned().collect();
        match (events.is_empty(), entries.at_rest || entries.closed) {
            (false, _) => Read::Events(events),
            (true, true) => Read::End,
            (true, false) => Read::NothingYet,
        }
    }

    /// Every change leaves the entries whole, so a panic elsewhere does not spoil them.
    fn lock(&self) -> MutexGuard<'_, Entries> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Reader {
    log: Arc<JobLog>,
    changed: watch::Receiver<()>,
    next: u64,
    read: VecDeque<JobEvent>,
}

impl Reader {
    async fn next(&mut self) -> Result<Option<JobEvent>, Status> {
        loop {
            if let Some(event) = self.read.pop_front() {
                self.next = event.number + 1;
                return Ok(Some(event));
            }
            self.changed.mark_unchanged();
            match self.log.read(self.next) {
                Read::Events(events) => self.read = events,
                Read::End => return Ok(None),
                Read::Forgotten { first } => {
                    let message = format!("event {} is no longer kept; the first one is {first}", self.next);
                    return Err(Status::out_of_range(message));
                }
                Read::NothingYet => {
                    if self.changed.changed().await.is_err() {
                        return Ok(None);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::StreamExt;
    use lora_proto::v1::Notice;

    use super::*;

    fn notice(text: &str) -> job_event::Kind {
        job_event::Kind::Notice(Notice { text: text.into(), ..Notice::default() })
    }

    async fn numbers(log: &Arc<JobLog>, from: u64) -> Vec<Result<u64, tonic::Code>> {
        let events = log.clone().follow(from);
        events.map(|event| event.map(|e| e.number).map_err(|s| s.code())).collect().await
    }

    #[tokio::test]
    async fn a_reader_gets_all_events_from_its_number_on() {
        let log = Arc::new(JobLog::new(10));
        log.append(notice("a"), false);
        log.append(notice("b"), false);
        log.append(notice("c"), true);
        assert_eq!(numbers(&log, 0).await, [Ok(1), Ok(2), Ok(3)]);
        assert_eq!(numbers(&log, 3).await, [Ok(3)]);
        assert_eq!(numbers(&log, 4).await, []);
    }

    #[tokio::test]
    async fn a_reader_waits_for_what_is_still_to_come() {
        let log = Arc::new(JobLog::new(10));
        let mut events = Box::pin(log.clone().follow(1));
        let (event, ()) = tokio::join!(events.next(), async { log.append(notice("a"), false) });
        assert_eq!(event.unwrap().unwrap().number, 1);
        let (end, ()) = tokio::join!(events.next(), async { log.close() });
        assert!(end.is_none());
    }

    #[tokio::test]
    async fn a_reader_that_was_too_slow_is_told_the_first_event_kept() {
        let log = Arc::new(JobLog::new(2));
        for text in ["a", "b", "c", "d"] {
            log.append(notice(text), false);
        }
        assert_eq!(numbers(&log, 1).await, [Err(tonic::Code::OutOfRange)]);
        let status = Box::pin(log.clone().follow(1)).next().await.unwrap().unwrap_err();
        assert!(status.message().contains("the first one is 3"), "{status}");
    }
}
