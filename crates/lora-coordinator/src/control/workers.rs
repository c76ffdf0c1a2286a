//! The workers: their connections, their observed states, and the directives that were sent to
//! them.

use std::collections::BTreeMap;
use std::time::Duration;

use lora_proto::v1::{self, Goal, Phase, coordinator_message};
use lora_spec::{DeviceMemory, FieldError};
use tokio::time::Instant;

use tokio::sync::mpsc;
use tonic::Status;

use crate::refusal::Refusal;

/// The capacity of the queue of messages to one worker; if the queue overflows, the worker's
/// connection is closed.
pub(crate) const OUTBOX_CAPACITY: usize = 64;

/// The queue of messages to one worker.
pub(crate) type Outbox = mpsc::Sender<Result<v1::CoordinatorMessage, Status>>;

/// The number of one connection of a worker.
pub(crate) type SessionId = u64;

/// One worker process, from its first hello until it is lost.
#[derive(Debug)]
pub(crate) struct Worker {
    pub(crate) hello: v1::Hello,
    pub(crate) status: v1::WorkerStatus,
    /// The connection; `None` while the worker is disconnected.
    connection: Option<(SessionId, Outbox)>,
    last_seen: Instant,
    /// The last directive that was sent on this connection; directives are numbered from 1.
    sent: Option<v1::Directive>,
}

/// All workers, by name.
#[derive(Debug)]
pub(crate) struct Workers {
    by_name: BTreeMap<String, Worker>,
    next_session: SessionId,
    lease: Duration,
}

impl Worker {
    pub(crate) fn is_connected(&self) -> bool {
        self.connection.is_some()
    }

    /// The job that the worker reports.
    pub(crate) fn held(&self) -> Option<&v1::HeldJob> {
        self.status.job.as_ref()
    }

    /// Whether the worker's status takes its last directive into account.
    pub(crate) fn is_up_to_date(&self) -> bool {
        self.sent.as_ref().is_none_or(|sent| self.status.directive >= sent.number)
    }

    /// Whether the worker has no job in memory, and cannot get one from an earlier directive.
    pub(crate) fn is_empty(&self) -> bool {
        self.is_connected() && self.held().is_none() && self.is_up_to_date()
    }

    /// Whether the worker can be given a job now.
    pub(crate) fn is_free(&self) -> bool {
        self.is_empty() && !self.status.draining
    }

    /// Whether the worker is connected and not draining, so that it can be given a job now or
    /// later.
    pub(crate) fn is_available(&self) -> bool {
        self.is_connected() && !self.status.draining
    }

    /// The memory that a job may use on this worker. A worker that does not know its memory counts
    /// as large enough for every job.
    pub(crate) fn memory(&self) -> DeviceMemory {
        self.hello.device_memory()
    }

    /// Seconds that the worker has been in its phase: the reported number, plus the time since the
    /// report.
    pub(crate) fn seconds_in_phase(&self) -> f64 {
        let since = self.last_seen.elapsed().as_secs_f64();
        self.held().map_or(0.0, |held| held.seconds_in_phase + since)
    }

    fn message(&self) -> v1::Worker {
        let held = self.held();
        let state = match held {
            // For users a disconnected worker is lost. Its job counts it as lost after a lease.
            _ if !self.is_connected() => "lost".to_owned(),
            _ if self.status.draining => "draining".to_owned(),
            Some(held) => held.phase().name(),
            None => "idle".to_owned(),
        };
        v1::Worker {
            name: self.hello.name.clone(),
            state,
            numerics_id: self.hello.numerics_id.clone(),
            peer_address: self.hello.peer_address.clone(),
            version: self.hello.version.clone(),
            job_id: held.map(|held| held.job_id.clone()),
            generation: held.map_or(0, |held| held.generation),
            rank: None,
            completed_steps: held.map_or(0, |held| held.completed_steps),
            seconds_in_phase: self.seconds_in_phase(),
            silent_seconds: self.last_seen.elapsed().as_secs_f64(),
            memory: self.hello.memory,
            gpu: self.hello.gpu,
        }
    }
}

impl Workers {
    pub(crate) fn new(lease: Duration) -> Self {
        Self { by_name: BTreeMap::new(), next_session: 1, lease }
    }

    pub(crate) fn get(&self, name: &str) -> Option<&Worker> {
        self.by_name.get(name)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (&String, &Worker)> {
        self.by_name.iter()
    }

    pub(crate) fn messages(&self) -> Vec<v1::Worker> {
        self.by_name.values().map(Worker::message).collect()
    }

    /// Adds a worker that was a member when the coordinator ended. The worker is lost if it does
    /// not reconnect within one lease.
    pub(crate) fn expect_reconnect(&mut self, name: &str, instance_id: &str, peer_address: &str) {
        let hello = v1::Hello {
            name: name.to_owned(),
            instance_id: instance_id.to_owned(),
            peer_address: peer_address.to_owned(),
            ..v1::Hello::default()
        };
        let worker = Worker {
            hello,
            status: v1::WorkerStatus::default(),
            connection: None,
            last_seen: Instant::now(),
            sent: None,
        };
        self.by_name.entry(name.to_owned()).or_insert(worker);
    }

    /// Registers a connection of a worker. A process that reconnects replaces its own entry.
    /// Another process with the same name is refused while the first one is connected.
    pub(crate) fn admit(&mut self, hello: v1::Hello, outbox: Outbox) -> Result<SessionId, Refusal> {
        for (field, value) in [
            ("hello.name", &hello.name),
            ("hello.instance_id", &hello.instance_id),
            ("hello.numerics_id", &hello.numerics_id),
            ("hello.peer_address", &hello.peer_address),
        ] {
            if value.is_empty() || value.len() > 256 {
                let message = format!("has {} bytes; it must have 1 to 256", value.len());
                return Err(FieldError::new(field, message).into());
            }
        }
        if let Some(known) = self.by_name.get(&hello.name)
            && known.is_connected()
            && known.hello.instance_id != hello.instance_id
        {
            return Err(Refusal::NameTaken(hello.name));
        }
        let session = self.next_session;
        self.next_session += 1;
        tracing::info!(worker = hello.name, numerics = hello.numerics_id, session, "worker connected");
        let worker = Worker {
            status: hello.status.clone().unwrap_or_default(),
            connection: Some((session, outbox)),
            last_seen: Instant::now(),
            sent: None,
            hello,
        };
        self.by_name.insert(worker.hello.name.clone(), worker);
        Ok(session)
    }

    /// Records a message of a worker, with its status if the message has one. Returns the worker's
    /// name, or `None` if the connection has been replaced.
    pub(crate) fn record_message(
        &mut self,
        session: SessionId,
        status: Option<v1::WorkerStatus>,
    ) -> Option<String> {
        let worker = self.by_session(session)?;
        worker.last_seen = Instant::now();
        if let Some(status) = status {
            worker.status = status;
        }
        Some(worker.hello.name.clone())
    }

    /// Records the end of a connection. Returns the worker's name, or `None` if the connection has
    /// been replaced.
    pub(crate) fn disconnected(&mut self, session: SessionId, cause: &str) -> Option<String> {
        let worker = self.by_session(session)?;
        worker.connection = None;
        let name = worker.hello.name.clone();
        if worker.held().is_some() {
            tracing::warn!(worker = name, cause, "worker disconnected");
            return Some(name);
        }
        tracing::info!(worker = name, cause, "worker disconnected");
        if worker.status.draining {
            // A drained worker does not come back.
            self.by_name.remove(&name);
        }
        Some(name)
    }

    /// Extends all leases by `time`, in which the coordinator itself was suspended: this time does
    /// not count as a worker's silence.
    pub(crate) fn extend_leases(&mut self, time: Duration) {
        let now = Instant::now();
        for worker in self.by_name.values_mut() {
            worker.last_seen = now.min(worker.last_seen + time);
        }
    }

    /// Removes the workers whose lease has expired.
    pub(crate) fn expire(&mut self, now: Instant) {
        let lease = self.lease;
        let silent = |worker: &Worker| now.saturating_duration_since(worker.last_seen) >= lease;
        let lost: Vec<String> =
            self.by_name.iter().filter(|(_, worker)| silent(worker)).map(|(name, _)| name.clone()).collect();
        for name in &lost {
            tracing::warn!(worker = name, lease = ?lease, "worker lost");
            self.by_name.remove(name);
        }
    }

    /// Whether a worker needs no directive with this desired state: the last one on this connection
    /// was the same, or the worker is not connected.
    pub(crate) fn is_directed(&self, name: &str, assignment: Option<&v1::Assignment>, goal: Goal) -> bool {
        let connected = self.by_name.get(name).filter(|worker| worker.connection.is_some());
        let Some(worker) = connected else { return true };
        match &worker.sent {
            None => assignment.is_none() && worker.held().is_none(),
            Some(sent) => sent.assignment.as_ref() == assignment && sent.goal() == goal,
        }
    }

    /// Sends a worker its desired state, if it needs a directive.
    pub(crate) fn send_directive(&mut self, name: &str, assignment: Option<&v1::Assignment>, goal: Goal) {
        if self.is_directed(name, assignment, goal) {
            return;
        }
        let Some(worker) = self.by_name.get_mut(name) else { return };
        let number = worker.sent.as_ref().map_or(1, |sent| sent.number + 1);
        let directive = v1::Directive { assignment: assignment.cloned(), goal: goal as i32, number };
        worker.sent = Some(directive.clone());
        worker.send(coordinator_message::Kind::Directive(Box::new(directive)));
    }

    /// Sends a worker the acknowledgement of stored steps.
    pub(crate) fn acknowledge(&mut self, name: &str, ack: v1::StepsAck) {
        if let Some(worker) = self.by_name.get_mut(name) {
            worker.send(coordinator_message::Kind::StepsAck(ack));
        }
    }

    fn by_session(&mut self, session: SessionId) -> Option<&mut Worker> {
        self.by_name
            .values_mut()
            .find(|worker| worker.connection.as_ref().is_some_and(|(known, _)| *known == session))
    }
}

impl Worker {
    /// Sends a message. If the queue is full, the connection is closed: the next connection starts
    /// with the worker's whole desired state.
    fn send(&mut self, kind: coordinator_message::Kind) {
        let Some((_, outbox)) = &self.connection else { return };
        if outbox.try_send(Ok(v1::CoordinatorMessage { kind: Some(kind) })).is_err() {
            tracing::warn!(worker = self.hello.name, "worker receives no messages, its connection is closed");
            self.connection = None;
        }
    }
}

/// Whether a worker in this phase has a state of the run in memory.
pub(crate) fn has_state(phase: Phase) -> bool {
    !matches!(phase, Phase::Unspecified | Phase::Preparing | Phase::Failed)
}
