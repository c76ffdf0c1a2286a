//! The events and steps of a job as they happen, each once, also after lost connections.

use std::time::Duration;

use anyhow::Result;
use backon::{BackoffBuilder, ExponentialBackoff};
use lora_proto::v1::{self, watch_job_response::Kind};
use lora_spec::JobState;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::task::AbortOnDropHandle;
use tonic::{Code, Status};
use tonic_types::StatusExt;

use crate::client::{CALL_TIMEOUT, CallError, Client, cause, delays, is_transient};

/// Maximum number of received items that the caller has not yet taken. When the channel is full,
/// the stream is not read.
const CHANNEL_CAPACITY: usize = 64;

/// An item of a watched job.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum WatchItem {
    Event(v1::JobEvent),
    Step(v1::StepReport),
    /// A message to the user about the watching itself.
    Note(String),
}

/// Where watching begins.
#[derive(Debug, Clone, Copy)]
pub(crate) struct WatchStart {
    /// Number of the first event, from 1.
    pub(crate) event: u64,
    /// Steps after this one are received; `None`: no steps.
    pub(crate) after_step: Option<u64>,
}

/// A watched job. A task reads the stream; the task ends when this value is dropped.
pub(crate) struct JobWatch {
    items: mpsc::Receiver<Result<WatchItem, CallError>>,
    _reader: AbortOnDropHandle<()>,
}

impl JobWatch {
    /// Watches `job`. If the coordinator is unreachable for `wait_timeout`, [`Self::next`] returns
    /// an error.
    pub(crate) fn start(client: &Client, job: &v1::Job, from: WatchStart, wait_timeout: Duration) -> Self {
        let (sender, items) = mpsc::channel(CHANNEL_CAPACITY);
        let reader = StreamReader {
            client: client.clone(),
            job_id: job.job_id.clone(),
            from,
            job_stopped: is_stopped(&job.state),
            wait_timeout,
            delays: endless_delays(),
            last_sign: Instant::now(),
            lost: false,
            items: sender,
        };
        // The task sends all results, errors included, through the channel.
        let reader = AbortOnDropHandle::new(tokio::spawn(reader.run()));
        Self { items, _reader: reader }
    }

    /// Returns the next item; `None` after the last item of a job that has stopped. Dropping the
    /// future loses no item.
    ///
    /// # Errors
    /// The coordinator was unreachable for too long, or refused the request.
    pub(crate) async fn next(&mut self) -> Result<Option<WatchItem>, CallError> {
        self.items.recv().await.transpose()
    }
}

struct StreamReader {
    client: Client,
    job_id: String,
    /// The first items that were not yet received.
    from: WatchStart,
    /// Whether the newest received state is one in which a job has stopped.
    job_stopped: bool,
    wait_timeout: Duration,
    delays: ExponentialBackoff,
    /// When the coordinator was last reached.
    last_sign: Instant,
    /// Whether the connection is lost and the user was informed.
    lost: bool,
    items: mpsc::Sender<Result<WatchItem, CallError>>,
}

/// The [`JobWatch`] was dropped.
struct ReceiverDropped;

impl StreamReader {
    async fn run(mut self) {
        if let Ok(Err(error)) = self.read_to_the_end().await {
            // This fails only if the receiver was dropped.
            let _ = self.items.send(Err(error)).await;
        }
    }

    async fn read_to_the_end(&mut self) -> Result<Result<(), CallError>, ReceiverDropped> {
        loop {
            let broken = match self.read().await? {
                Ok(()) if self.job_stopped => return Ok(Ok(())),
                Ok(()) => "it ended the stream".to_owned(),
                Err(status) if status.code() == Code::OutOfRange => match self.skip(&status) {
                    Some(note) => {
                        self.send_note(note).await?;
                        continue;
                    }
                    None => return Ok(Err(self.client.error(status))),
                },
                Err(status) if is_transient(&status) => cause(&status),
                Err(status) => return Ok(Err(self.client.error(status))),
            };
            let silent = self.last_sign.elapsed();
            if silent >= self.wait_timeout {
                return Ok(Err(self.client.error(Status::unavailable(broken))));
            }
            if !self.lost {
                self.lost = true;
                let wait_timeout = self.wait_timeout.as_secs();
                self.send_note(format!(
                    "lost the coordinator ({broken}); trying for {wait_timeout} s to reach it again"
                ))
                .await?;
            }
            let delay = self.delays.next().unwrap_or_default();
            sleep(delay.min(self.wait_timeout - silent)).await;
        }
    }

    /// Reads a stream to its end.
    async fn read(&mut self) -> Result<Result<(), Status>, ReceiverDropped> {
        let request = v1::WatchJobRequest {
            job_id: self.job_id.clone(),
            from_number: self.from.event,
            after_step: self.from.after_step.unwrap_or_default(),
            events_only: self.from.after_step.is_none(),
        };
        let mut jobs = self.client.jobs();
        let mut stream = match timeout(CALL_TIMEOUT, jobs.watch_job(request)).await {
            Ok(Ok(answer)) => answer.into_inner(),
            Ok(Err(status)) => return Ok(Err(status)),
            Err(_) => return Ok(Err(Status::unavailable(format!("no answer within {CALL_TIMEOUT:?}")))),
        };
        if self.lost {
            self.lost = false;
            self.send_note("reached the coordinator again".into()).await?;
        }
        let ended = loop {
            // There is no time limit here: keep-alives detect a dead connection.
            match stream.message().await {
                Ok(Some(v1::WatchJobResponse { kind })) => self.take(kind).await?,
                Ok(None) => break Ok(()),
                Err(status) => break Err(status),
            }
        };
        self.last_sign = Instant::now();
        Ok(ended)
    }

    async fn take(&mut self, kind: Option<Kind>) -> Result<(), ReceiverDropped> {
        self.delays = endless_delays();
        match kind {
            Some(Kind::Event(event)) if event.number >= self.from.event => {
                self.from.event = event.number + 1;
                if let Some(v1::job_event::Kind::StateChanged(change)) = &event.kind {
                    self.job_stopped = is_stopped(&change.state);
                }
                self.send(WatchItem::Event(event)).await
            }
            Some(Kind::Step(step)) => {
                let number = step.metrics.as_ref().map_or(0, |metrics| metrics.step);
                match &mut self.from.after_step {
                    Some(after) if number > *after => *after = number,
                    _ => return Ok(()),
                }
                self.send(WatchItem::Step(step)).await
            }
            // Already received, or of a kind that only a newer coordinator has.
            Some(Kind::Event(_)) | None => Ok(()),
        }
    }

    /// Continues from the first event or step that the coordinator still has. Returns a note about
    /// the skipped ones; `None` if nothing would be skipped.
    fn skip(&mut self, status: &Status) -> Option<String> {
        let info = status.get_details_error_info()?;
        let first: u64 = info.metadata.get("first")?.parse().ok()?;
        let (next, what) = match info.reason.as_str() {
            "EVENTS_FORGOTTEN" => (&mut self.from.event, "events"),
            "STEPS_FORGOTTEN" => (self.from.after_step.as_mut()?, "steps"),
            _ => return None,
        };
        // A step is requested by the number of the step before it.
        let (from, to) =
            if what == "steps" { (*next + 1, first.checked_sub(1)?) } else { ((*next).max(1), first) };
        if to <= *next {
            return None;
        }
        *next = to;
        Some(format!("{what} {from} to {} are no longer kept", first - 1))
    }

    async fn send_note(&self, note: String) -> Result<(), ReceiverDropped> {
        self.send(WatchItem::Note(note)).await
    }

    async fn send(&self, item: WatchItem) -> Result<(), ReceiverDropped> {
        self.items.send(Ok(item)).await.map_err(|_| ReceiverDropped)
    }
}

fn endless_delays() -> ExponentialBackoff {
    delays().without_max_times().build()
}

fn is_stopped(state: &str) -> bool {
    JobState::from_name(state).is_some_and(JobState::is_stopped)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake_coordinator::{FakeCoordinator, StreamEnd};

    const TEST_TIMEOUT: Duration = Duration::from_secs(20);
    const ALL: WatchStart = WatchStart { event: 1, after_step: Some(0) };

    fn event(number: u64, state: &str) -> Kind {
        let change = v1::StateChanged { state: state.into(), failure: None };
        let kind = Some(v1::job_event::Kind::StateChanged(change));
        Kind::Event(v1::JobEvent { number, time: None, kind })
    }

    fn step(step: u64) -> Kind {
        let metrics = v1::StepMetrics { step, ..v1::StepMetrics::default() };
        Kind::Step(v1::StepReport { metrics: Some(metrics), ..v1::StepReport::default() })
    }

    /// A job that goes from `queued` to `succeeded` in four events and three steps.
    fn log() -> Vec<Kind> {
        vec![
            event(1, "queued"),
            event(2, "running"),
            step(1),
            step(2),
            event(3, "pausing"),
            step(3),
            event(4, "succeeded"),
        ]
    }

    fn job() -> v1::Job {
        v1::Job { job_id: "j".into(), state: "queued".into(), ..v1::Job::default() }
    }

    /// Receives all items. Returns the numbers of the events, the numbers of the steps, and the
    /// notes.
    async fn all(watch: &mut JobWatch) -> Result<(Vec<u64>, Vec<u64>, Vec<String>), CallError> {
        let (mut events, mut steps, mut notes) = (Vec::new(), Vec::new(), Vec::new());
        while let Some(item) = timeout(TEST_TIMEOUT, watch.next()).await.unwrap()? {
            match item {
                WatchItem::Event(event) => events.push(event.number),
                WatchItem::Step(step) => steps.push(step.metrics.unwrap().step),
                WatchItem::Note(note) => notes.push(note),
            }
        }
        Ok((events, steps, notes))
    }

    #[tokio::test]
    async fn every_event_and_step_is_delivered_once_over_broken_streams() {
        let fake = FakeCoordinator::serve(vec![job()]).await;
        let broken = || StreamEnd::Fail(Status::unavailable("restarting"));
        fake.log(log());
        fake.streams(vec![
            (0, broken()),
            (2, broken()),
            (1, StreamEnd::End),
            (2, broken()),
            (0, StreamEnd::End),
        ]);
        let client = fake.client().await;
        let mut watch = JobWatch::start(&client, &job(), ALL, TEST_TIMEOUT);
        let (events, steps, notes) = all(&mut watch).await.unwrap();
        assert_eq!((events, steps), (vec![1, 2, 3, 4], vec![1, 2, 3]));
        let lost = notes.iter().filter(|note| note.starts_with("lost the coordinator")).count();
        let reached = notes.iter().filter(|note| note.starts_with("reached")).count();
        assert!(lost > 0 && lost == reached, "{notes:?}");
        let asked: Vec<(u64, u64)> =
            fake.watched().iter().map(|request| (request.from_number, request.after_step)).collect();
        assert_eq!(asked, [(1, 0), (1, 0), (3, 0), (3, 1), (4, 2), (4, 2)]);
    }

    #[tokio::test]
    async fn a_cut_connection_is_reopened() {
        let fake = FakeCoordinator::serve(vec![job()]).await;
        fake.log(log());
        fake.streams(vec![(3, StreamEnd::Hang)]);
        let (proxy, address) = fake.proxy().await;
        let client = Client::connect(&address).await.unwrap();
        let mut watch = JobWatch::start(&client, &job(), ALL, TEST_TIMEOUT);
        for _ in 0..3 {
            timeout(TEST_TIMEOUT, watch.next()).await.unwrap().unwrap().unwrap();
        }
        proxy.cut();
        let (events, steps, notes) = all(&mut watch).await.unwrap();
        assert_eq!((events, steps, notes.len()), (vec![3, 4], vec![2, 3], 2), "{notes:?}");
    }

    #[tokio::test]
    async fn deleted_events_are_skipped_with_a_note() {
        let fake = FakeCoordinator::serve(vec![job()]).await;
        fake.log(log());
        fake.forget(3, 2);
        let client = fake.client().await;
        let (events, steps, notes) =
            all(&mut JobWatch::start(&client, &job(), ALL, TEST_TIMEOUT)).await.unwrap();
        assert_eq!((events, steps), (vec![3, 4], vec![2, 3]));
        assert_eq!(notes, ["events 1 to 2 are no longer kept", "steps 1 to 1 are no longer kept"]);
    }

    #[tokio::test]
    async fn a_stopped_job_gives_its_history_and_ends() {
        let fake = FakeCoordinator::serve(vec![job()]).await;
        fake.log(log());
        let client = fake.client().await;
        let done = v1::Job { state: "succeeded".into(), ..job() };
        let from = WatchStart { event: 5, after_step: Some(3) };
        let item = all(&mut JobWatch::start(&client, &done, from, TEST_TIMEOUT)).await.unwrap();
        assert_eq!(item, (vec![], vec![], vec![]));
        let events_only = WatchStart { event: 2, after_step: None };
        let item = all(&mut JobWatch::start(&client, &done, events_only, TEST_TIMEOUT)).await.unwrap();
        assert_eq!(item, (vec![2, 3, 4], vec![], vec![]));
    }

    #[tokio::test]
    async fn an_unreachable_coordinator_times_out() {
        let fake = FakeCoordinator::serve(vec![job()]).await;
        fake.log(log());
        fake.streams(vec![(1, StreamEnd::Hang)]);
        let (proxy, address) = fake.proxy().await;
        let client = Client::connect(&address).await.unwrap();
        let mut watch = JobWatch::start(&client, &job(), ALL, Duration::from_millis(200));
        timeout(TEST_TIMEOUT, watch.next()).await.unwrap().unwrap().unwrap();
        drop(proxy);
        let error = all(&mut watch).await.unwrap_err();
        assert!(matches!(error, CallError::Unreachable { .. }), "{error}");
    }

    #[tokio::test]
    async fn a_refusal_ends_the_watch_immediately() {
        let fake = FakeCoordinator::serve(vec![job()]).await;
        let client = fake.client().await;
        fake.streams(vec![(0, StreamEnd::Fail(Status::not_found("the job does not exist")))]);
        let error = all(&mut JobWatch::start(&client, &job(), ALL, TEST_TIMEOUT)).await.unwrap_err();
        assert_eq!(error.to_string(), "the job does not exist");
    }
}
