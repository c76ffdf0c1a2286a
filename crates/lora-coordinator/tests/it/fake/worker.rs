//! A worker that does not train.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use lora_proto::v1::worker_control_client::WorkerControlClient;
use lora_proto::v1::{self, Fault, Goal, Phase, coordinator_message, worker_message};
use lora_spec::JobSpec;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use super::{Cluster, WAIT_TIMEOUT};

/// A worker that reports the status that the test sets, at once and with every heartbeat. Its
/// connection is closed on drop.
pub(crate) struct FakeWorker {
    pub(crate) welcome: v1::Welcome,
    outbox: mpsc::Sender<v1::WorkerMessage>,
    inbox: Streaming<v1::CoordinatorMessage>,
    status: Arc<Mutex<v1::WorkerStatus>>,
    heartbeats: JoinHandle<()>,
    /// The newest directive that was received.
    pub(crate) directive: v1::Directive,
    pub(crate) acked: u64,
}

impl Drop for FakeWorker {
    fn drop(&mut self) {
        self.heartbeats.abort();
    }
}

impl FakeWorker {
    pub(crate) async fn connect(cluster: &Cluster, name: &str) -> Self {
        Self::connect_as(cluster, name, "1", "fake", v1::WorkerStatus::default()).await.unwrap()
    }

    pub(crate) async fn connect_as(
        cluster: &Cluster,
        name: &str,
        instance: &str,
        numerics: &str,
        status: v1::WorkerStatus,
    ) -> Result<Self, Status> {
        let hello = v1::Hello {
            name: name.into(),
            instance_id: instance.into(),
            numerics_id: numerics.into(),
            peer_address: format!("{name}:1"),
            version: "0".into(),
            status: Some(status),
            ..v1::Hello::default()
        };
        Self::greet(cluster, hello).await
    }

    /// Connects a CPU worker that advertises this much memory, in bytes.
    pub(crate) async fn connect_with_memory(cluster: &Cluster, name: &str, memory: u64) -> Self {
        let hello = v1::Hello {
            name: name.into(),
            instance_id: "1".into(),
            numerics_id: "fake".into(),
            peer_address: format!("{name}:1"),
            memory,
            ..v1::Hello::default()
        };
        Self::greet(cluster, hello).await.unwrap()
    }

    async fn greet(cluster: &Cluster, mut hello: v1::Hello) -> Result<Self, Status> {
        let (outbox, messages) = mpsc::channel(64);
        let status = v1::WorkerStatus { directive: 0, ..hello.status.take().unwrap_or_default() };
        hello.status = Some(status.clone());
        let hello = worker_message::Kind::Hello(hello);
        outbox.send(v1::WorkerMessage { kind: Some(hello) }).await.unwrap();
        let mut client = WorkerControlClient::new(cluster.channel.clone());
        let mut inbox = client.connect(ReceiverStream::new(messages)).await?.into_inner();
        let first = timeout(WAIT_TIMEOUT, inbox.message()).await.expect("a welcome arrives")?;
        let Some(coordinator_message::Kind::Welcome(welcome)) = first.and_then(|m| m.kind) else {
            panic!("the first message is not a welcome")
        };
        let status = Arc::new(Mutex::new(status));
        let heartbeats = tokio::spawn({
            let (outbox, status) = (outbox.clone(), Arc::clone(&status));
            async move {
                loop {
                    let kind = worker_message::Kind::Status(status.lock().unwrap().clone());
                    if outbox.send(v1::WorkerMessage { kind: Some(kind) }).await.is_err() {
                        return;
                    }
                    tokio::time::sleep(Duration::from_secs_f64(welcome.heartbeat_seconds)).await;
                }
            }
        });
        let directive = v1::Directive::default();
        Ok(Self { welcome, outbox, inbox, status, heartbeats, directive, acked: 0 })
    }

    /// Closes the connection without a message, and returns the last status.
    pub(crate) fn disconnect(self) -> v1::WorkerStatus {
        self.status.lock().unwrap().clone()
    }

    /// Waits for the next directive, and returns it. The next status will acknowledge the
    /// directive.
    pub(crate) async fn next(&mut self) -> v1::Directive {
        loop {
            let message =
                timeout(WAIT_TIMEOUT, self.inbox.message()).await.expect("a message arrives").unwrap();
            match message.expect("the stream is open").kind.unwrap() {
                coordinator_message::Kind::Directive(directive) => {
                    self.directive = *directive;
                    return self.directive.clone();
                }
                coordinator_message::Kind::StepsAck(ack) => self.acked = self.acked.max(ack.step),
                coordinator_message::Kind::Welcome(_) => panic!("a second welcome"),
            }
        }
    }

    /// Waits for a directive with this goal, and returns its assignment.
    pub(crate) async fn goal(&mut self, goal: Goal) -> v1::Assignment {
        loop {
            let directive = self.next().await;
            if directive.goal() == goal
                && let Some(assignment) = directive.assignment
            {
                return assignment;
            }
        }
    }

    /// Waits for a directive without an assignment, and reports that the worker has no job.
    pub(crate) async fn release(&mut self) {
        while self.next().await.assignment.is_some() {}
        self.say(None).await;
    }

    /// Waits until steps up to `step` are acknowledged.
    pub(crate) async fn until_acked(&mut self, step: u64) {
        while self.acked < step {
            let message =
                timeout(WAIT_TIMEOUT, self.inbox.message()).await.expect("a message arrives").unwrap();
            match message.expect("the stream is open").kind.unwrap() {
                coordinator_message::Kind::StepsAck(ack) => self.acked = self.acked.max(ack.step),
                coordinator_message::Kind::Directive(directive) => self.directive = *directive,
                coordinator_message::Kind::Welcome(_) => panic!("a second welcome"),
            }
        }
    }

    /// Reports `job` as the worker's job.
    pub(crate) async fn say(&self, job: Option<v1::HeldJob>) {
        let status = {
            let mut status = self.status.lock().unwrap();
            status.job = job;
            status.directive = self.directive.number;
            status.clone()
        };
        let kind = Some(worker_message::Kind::Status(status));
        self.outbox.send(v1::WorkerMessage { kind }).await.unwrap();
    }

    /// Reports this phase of the assigned job, after `steps`.
    pub(crate) async fn phase(&self, assignment: &v1::Assignment, phase: Phase, steps: u64) {
        self.say(Some(held(assignment, phase, steps))).await;
    }

    pub(crate) async fn broken(
        &self,
        assignment: &v1::Assignment,
        steps: u64,
        cause: &str,
        unreachable: &[u32],
    ) {
        let job = held(assignment, Phase::Broken, steps);
        self.say(Some(v1::HeldJob { cause: cause.into(), unreachable: unreachable.to_vec(), ..job })).await;
    }

    pub(crate) async fn failed(&self, assignment: &v1::Assignment, cause: &str) {
        self.say(Some(v1::HeldJob { cause: cause.into(), ..held(assignment, Phase::Failed, 0) })).await;
    }

    /// Fails with a fault of its own.
    pub(crate) async fn failed_by(&self, assignment: &v1::Assignment, fault: Fault, cause: &str) {
        let (fault, cause) = (fault.into(), cause.into());
        self.say(Some(v1::HeldJob { fault, cause, ..held(assignment, Phase::Failed, 0) })).await;
    }

    pub(crate) async fn finished(&self, assignment: &v1::Assignment, steps: u64, files: &[&str]) {
        let files = files.iter().map(|file| (*file).to_owned()).collect();
        self.say(Some(v1::HeldJob { files, ..held(assignment, Phase::Finished, steps) })).await;
    }

    pub(crate) async fn drain(&self) {
        self.status.lock().unwrap().draining = true;
        let job = self.status.lock().unwrap().job.clone();
        self.say(job).await;
    }

    /// Sends finished steps.
    pub(crate) async fn steps(&self, assignment: &v1::Assignment, steps: std::ops::RangeInclusive<u64>) {
        let report = |step| v1::StepReport {
            metrics: Some(v1::StepMetrics {
                step,
                loss: 1.0 / step as f64,
                num_tokens: 8 * step,
                ..Default::default()
            }),
            logged: true,
            reduced_bytes: 8,
            time: Some(std::time::SystemTime::now().into()),
            notice: String::new(),
        };
        let steps = v1::Steps { job_id: assignment.job_id.clone(), steps: steps.map(report).collect() };
        let kind = Some(worker_message::Kind::Steps(steps));
        self.outbox.send(v1::WorkerMessage { kind }).await.unwrap();
    }

    /// Waits for an assignment, reports it as prepared after `steps`, and returns it.
    pub(crate) async fn prepare(&mut self, steps: u64) -> v1::Assignment {
        let assignment = self.goal(Goal::Prepare).await;
        self.phase(&assignment, Phase::Prepared, steps).await;
        assignment
    }
}

pub(crate) fn held(assignment: &v1::Assignment, phase: Phase, steps: u64) -> v1::HeldJob {
    let base = v1::BaseReady { sha256: "ba5e".into(), seconds: 1.0, ..v1::BaseReady::default() };
    v1::HeldJob {
        job_id: assignment.job_id.clone(),
        generation: assignment.generation,
        phase: phase as i32,
        completed_steps: steps,
        base: Some(base),
        facts: Some(v1::RunFacts { total_steps: 9, ..v1::RunFacts::default() }),
        ..v1::HeldJob::default()
    }
}

/// Brings the workers of a job to the phase `Training`. Returns their assignments, by rank.
pub(crate) async fn train(workers: &mut [&mut FakeWorker], steps: u64) -> Vec<v1::Assignment> {
    let mut assignments = Vec::new();
    for worker in workers.iter_mut() {
        assignments.push(worker.prepare(steps).await);
    }
    for (worker, assignment) in workers.iter_mut().zip(&assignments) {
        assert_eq!(worker.goal(Goal::Train).await, *assignment);
        worker.phase(assignment, Phase::Training, steps).await;
    }
    assignments
}

/// A job that trains on two workers.
pub(crate) struct TwoWorkerJob {
    pub(crate) job_id: String,
    pub(crate) w0: FakeWorker,
    pub(crate) w1: FakeWorker,
    /// The assignments, by rank.
    pub(crate) a: Vec<v1::Assignment>,
}

impl TwoWorkerJob {
    /// Starts the job after both workers have connected, so that it gets both.
    pub(crate) async fn training(cluster: &Cluster, job: &JobSpec) -> Self {
        let job_id = cluster.submit(job).await;
        cluster.pause(&job_id).await.unwrap();
        let mut w0 = FakeWorker::connect(cluster, "w0").await;
        let mut w1 = FakeWorker::connect(cluster, "w1").await;
        cluster.resume(&job_id, None).await.unwrap();
        let a = train(&mut [&mut w0, &mut w1], 0).await;
        Self { job_id, w0, w1, a }
    }
}
