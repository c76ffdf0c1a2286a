//! A coordinator that the test controls.

use std::sync::Arc;
use std::time::Duration;

use lora_proto::v1::artifacts_server::ArtifactsServer;
use lora_proto::v1::coordinator_message::Kind as FromCoordinator;
use lora_proto::v1::worker_control_server::{WorkerControl, WorkerControlServer};
use lora_proto::v1::worker_message::Kind as FromWorker;
use lora_proto::v1::{self, Assignment, Goal, HeldJob, Hello, Phase, WorkerStatus};
use lora_test_kit::artifacts::{FakeArtifacts, StoredUpload};
use lora_test_kit::server::TestServer;
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Server;
use tonic::{Request, Response, Status, Streaming};

/// The longest wait of a test.
pub(crate) const WAIT_TIMEOUT: Duration = Duration::from_secs(120);

const HEARTBEAT_SECONDS: f64 = 0.05;

pub(crate) struct FakeCoordinator {
    pub(crate) server: TestServer,
    pub(crate) store: FakeArtifacts,
    control: Arc<FakeWorkerControl>,
    links: mpsc::Receiver<WorkerStream>,
}

/// The service to which workers connect.
struct FakeWorkerControl {
    /// The error that a worker gets instead of a welcome.
    refusal: watch::Sender<Option<Status>>,
    /// The newest hello that was refused.
    refused: watch::Sender<Option<Hello>>,
    links: mpsc::Sender<WorkerStream>,
}

impl FakeCoordinator {
    pub(crate) async fn start() -> Self {
        let (sender, links) = mpsc::channel(16);
        let control = FakeWorkerControl {
            refusal: watch::channel(None).0,
            refused: watch::channel(None).0,
            links: sender,
        };
        let (control, store) = (Arc::new(control), FakeArtifacts::default());
        let router = Server::builder()
            .add_service(WorkerControlServer::from_arc(Arc::clone(&control)))
            .add_service(ArtifactsServer::new(store.clone()));
        Self { server: TestServer::serve(router).await, store, control, links }
    }

    /// Returns the next worker that connects, without a welcome.
    pub(crate) async fn accept_unwelcomed(&mut self) -> WorkerStream {
        timeout(WAIT_TIMEOUT, self.links.recv()).await.expect("a worker connects").unwrap()
    }

    /// Returns the next worker that connects, after a welcome in term 1.
    pub(crate) async fn accept(&mut self) -> WorkerStream {
        let link = self.accept_unwelcomed().await;
        link.welcome(1).await;
        link
    }

    /// Refuses all workers that connect with `refusal`. `None` stops refusing them.
    pub(crate) fn refuse(&self, refusal: Option<Status>) {
        self.control.refusal.send_replace(refusal);
    }

    /// Waits for a refused hello for which `want` returns true.
    pub(crate) async fn refused(&self, want: impl Fn(&Hello) -> bool) -> Hello {
        let mut refused = self.control.refused.subscribe();
        let wanted = refused.wait_for(|hello| hello.as_ref().is_some_and(&want));
        timeout(WAIT_TIMEOUT, wanted).await.expect("such a hello comes").unwrap().clone().unwrap()
    }

    /// Waits for the first uploaded checkpoint and returns its step.
    pub(crate) async fn uploaded_checkpoint(&self) -> u64 {
        let upload = self.store.uploaded(StoredUpload::checkpoint_step);
        timeout(WAIT_TIMEOUT, upload).await.expect("a checkpoint comes")
    }

    /// The uploaded checkpoint of `step`.
    pub(crate) fn checkpoint(&self, step: u64) -> v1::Checkpoint {
        let uploads = self.store.uploads();
        let found = uploads.iter().find(|upload| upload.checkpoint_step() == Some(step));
        v1::Checkpoint { step, digest: Some(found.expect("it is stored").digest.clone()) }
    }

    /// The names of the result files that have been uploaded.
    pub(crate) fn result_files(&self) -> Vec<String> {
        self.store.uploads().iter().filter_map(StoredUpload::result_file).map(str::to_owned).collect()
    }
}

#[tonic::async_trait]
impl WorkerControl for FakeWorkerControl {
    type ConnectStream = ReceiverStream<Result<v1::CoordinatorMessage, Status>>;

    async fn connect(
        &self,
        request: Request<Streaming<v1::WorkerMessage>>,
    ) -> Result<Response<Self::ConnectStream>, Status> {
        let mut inbox = request.into_inner();
        let Some(FromWorker::Hello(hello)) = inbox.message().await?.and_then(|message| message.kind) else {
            panic!("the first message is not a hello");
        };
        let refusal = self.refusal.borrow().clone();
        if let Some(refusal) = refusal {
            self.refused.send_replace(Some(hello));
            return Err(refusal);
        }
        let (outbox, messages) = mpsc::channel(16);
        let _ =
            self.links.send(WorkerStream { hello, inbox, outbox, steps: Vec::new(), directives: 0 }).await;
        Ok(Response::new(ReceiverStream::new(messages)))
    }
}

/// A worker's stream. Dropping it closes the stream.
pub(crate) struct WorkerStream {
    pub(crate) hello: Hello,
    /// All steps that were received so far.
    pub(crate) steps: Vec<v1::Steps>,
    inbox: Streaming<v1::WorkerMessage>,
    outbox: mpsc::Sender<Result<v1::CoordinatorMessage, Status>>,
    directives: u64,
}

impl WorkerStream {
    pub(crate) async fn welcome(&self, term: u64) {
        let welcome = v1::Welcome {
            term,
            heartbeat_seconds: HEARTBEAT_SECONDS,
            forming_seconds: 120.0,
            step_seconds: 1800.0,
        };
        self.send(FromCoordinator::Welcome(welcome)).await;
    }

    pub(crate) async fn direct(&mut self, assignment: &Assignment, goal: Goal) {
        self.send_directive(Some(assignment.clone()), goal).await;
    }

    /// Tells the worker to release its job.
    pub(crate) async fn release(&mut self) {
        self.send_directive(None, Goal::Unspecified).await;
    }

    /// Acknowledges the steps up to `step` as stored.
    pub(crate) async fn acknowledge(&self, job_id: &str, step: u64) {
        let ack = v1::StepsAck { job_id: job_id.into(), step };
        self.send(FromCoordinator::StepsAck(ack)).await;
    }

    async fn send_directive(&mut self, assignment: Option<Assignment>, goal: Goal) {
        self.directives += 1;
        let directive = v1::Directive { assignment, goal: goal.into(), number: self.directives };
        self.send(FromCoordinator::Directive(Box::new(directive))).await;
    }

    async fn send(&self, kind: FromCoordinator) {
        self.outbox.send(Ok(v1::CoordinatorMessage { kind: Some(kind) })).await.unwrap();
    }

    /// Returns the next status, or `None` if the worker has closed the stream.
    pub(crate) async fn status(&mut self) -> Option<WorkerStatus> {
        loop {
            let message =
                timeout(WAIT_TIMEOUT, self.inbox.message()).await.expect("the worker sends a message");
            match message.ok().flatten()?.kind {
                Some(FromWorker::Status(status)) => return Some(status),
                Some(FromWorker::Steps(steps)) => self.steps.push(steps),
                other => panic!("neither a status nor steps: {other:?}"),
            }
        }
    }

    /// Waits for a status that answers the newest directive and for which `want` returns true.
    pub(crate) async fn until(&mut self, want: impl Fn(&WorkerStatus) -> bool) -> WorkerStatus {
        let mut last = None;
        let waiting = async {
            loop {
                let status = self.status().await.expect("the stream is open");
                if status.directive == self.directives && want(&status) {
                    return status;
                }
                last = Some(status);
            }
        };
        let found = timeout(WAIT_TIMEOUT, waiting).await.ok();
        found.unwrap_or_else(|| panic!("no such status; the last one: {last:?}"))
    }

    /// Waits until the worker reports the job in this phase.
    pub(crate) async fn phase(&mut self, phase: Phase) -> HeldJob {
        self.job(|job| job.phase() == phase).await
    }

    /// Waits until the worker reports a job for which `want` returns true.
    pub(crate) async fn job(&mut self, want: impl Fn(&HeldJob) -> bool) -> HeldJob {
        self.until(|status| status.job.as_ref().is_some_and(&want)).await.job.unwrap()
    }

    /// Waits until the worker reports no job.
    pub(crate) async fn free(&mut self) {
        self.until(|status| status.job.is_none()).await;
    }

    /// Waits until the worker closes the stream; returns its last status.
    pub(crate) async fn closed(&mut self) -> Option<WorkerStatus> {
        let mut last = None;
        while let Some(status) = self.status().await {
            last = Some(status);
        }
        last
    }

    /// The numbers of all steps that were received so far.
    pub(crate) fn step_numbers(&self) -> Vec<u64> {
        self.steps.iter().flat_map(|steps| &steps.steps).map(|row| row.metrics.unwrap().step).collect()
    }
}
