//! A coordinator on a free port, and workers that speak its API without an engine.

use std::path::Path;
use std::time::Duration;

use lora_coordinator::{Coordinator, CoordinatorError, Handle, Options};
use lora_proto::DigestBuilder;
use lora_proto::v1::artifacts_client::ArtifactsClient;
use lora_proto::v1::fine_tuning_client::FineTuningClient;
use lora_proto::v1::worker_control_client::WorkerControlClient;
use lora_proto::v1::{
    self, artifact_name, coordinator_message, job_event, job_report, upload_request, worker_message,
};
use lora_spec::JobSpec;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Status, Streaming};

const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) struct Cluster {
    pub(crate) handle: Handle,
    pub(crate) channel: Channel,
    serving: JoinHandle<Result<(), CoordinatorError>>,
}

impl Cluster {
    pub(crate) async fn start() -> Self {
        let coordinator = Coordinator::bind(&Options::default()).await.unwrap();
        let handle = coordinator.handle();
        let serving = tokio::spawn(coordinator.serve());
        let uri = format!("http://{}", handle.address());
        let channel = Channel::from_shared(uri).unwrap().connect().await.unwrap();
        Self { handle, channel, serving }
    }

    pub(crate) fn jobs(&self) -> FineTuningClient<Channel> {
        FineTuningClient::new(self.channel.clone())
    }

    pub(crate) async fn submit(
        &self,
        job: &JobSpec,
        output_dir: &Path,
        resume: bool,
    ) -> Result<String, Status> {
        let request = v1::SubmitJobRequest {
            job: Some(v1::JobSpec::try_from(job).unwrap()),
            output_dir: output_dir.to_str().unwrap().to_owned(),
            resume,
        };
        Ok(self.jobs().submit_job(request).await?.into_inner().job_id)
    }

    pub(crate) async fn pause(&self, job_id: &str) -> Result<v1::Job, Status> {
        let request = v1::PauseJobRequest { job_id: job_id.to_owned() };
        Ok(self.jobs().pause_job(request).await?.into_inner())
    }

    /// All events until the job rests.
    pub(crate) async fn events(&self, job_id: &str) -> Vec<job_event::Kind> {
        let request = v1::WatchJobRequest { job_id: job_id.to_owned(), from_number: 1 };
        let mut events = self.jobs().watch_job(request).await.unwrap().into_inner();
        let mut all = Vec::new();
        while let Some(event) = timeout(PATIENCE, events.message()).await.expect("the job rests").unwrap() {
            assert_eq!(event.number, all.len() as u64 + 1);
            all.push(event.kind.unwrap());
        }
        all
    }

    /// The states a job went through until it rested, and its failure.
    pub(crate) async fn outcome(&self, job_id: &str) -> (Vec<String>, Option<v1::Failure>) {
        let mut failure = None;
        let mut states = Vec::new();
        for event in self.events(job_id).await {
            if let job_event::Kind::StateChanged(change) = event {
                states.push(change.state);
                failure = change.failure;
            }
        }
        (states, failure)
    }

    pub(crate) async fn upload(
        &self,
        assignment: &v1::Assignment,
        name: artifact_name::Name,
        bytes: &[u8],
        digest: v1::FileDigest,
    ) -> Result<(), Status> {
        let header = v1::UploadHeader {
            job_id: assignment.job_id.clone(),
            generation: assignment.generation,
            name: Some(v1::ArtifactName { name: Some(name) }),
            digest: Some(digest),
        };
        let mut messages = vec![upload_request::Kind::Header(header)];
        messages.extend(bytes.chunks(3).map(|chunk| upload_request::Kind::Chunk(chunk.to_vec())));
        let messages = messages.into_iter().map(|kind| v1::UploadRequest { kind: Some(kind) });
        let stream = tokio_stream::iter(messages.collect::<Vec<_>>());
        ArtifactsClient::new(self.channel.clone()).upload(stream).await.map(drop)
    }

    pub(crate) async fn upload_checkpoint(&self, assignment: &v1::Assignment, step: u64, bytes: &[u8]) {
        let name = artifact_name::Name::CheckpointStep(step);
        self.upload(assignment, name, bytes, DigestBuilder::of(bytes)).await.unwrap();
    }

    pub(crate) async fn upload_result(&self, assignment: &v1::Assignment, file: &str, bytes: &[u8]) {
        let name = artifact_name::Name::ResultFile(file.to_owned());
        self.upload(assignment, name, bytes, DigestBuilder::of(bytes)).await.unwrap();
    }

    pub(crate) async fn stop(self) {
        self.handle.shutdown();
        drop(self.channel);
        timeout(PATIENCE, self.serving).await.expect("it ends").unwrap().unwrap();
    }
}

/// A worker without an engine.
pub(crate) struct FakeWorker {
    outbox: mpsc::Sender<v1::WorkerMessage>,
    inbox: Streaming<v1::CoordinatorMessage>,
}

impl FakeWorker {
    pub(crate) async fn connect(cluster: &Cluster, name: &str) -> Self {
        Self::connect_as(cluster, name, "fake").await.unwrap()
    }

    pub(crate) async fn connect_as(cluster: &Cluster, name: &str, numerics: &str) -> Result<Self, Status> {
        let (outbox, messages) = mpsc::channel(16);
        let hello =
            v1::Hello { name: name.into(), numerics_id: numerics.into(), peer_address: format!("{name}:1") };
        let hello = worker_message::Kind::Hello(hello);
        outbox.send(v1::WorkerMessage { kind: Some(hello) }).await.unwrap();
        let mut client = WorkerControlClient::new(cluster.channel.clone());
        let inbox = client.connect(ReceiverStream::new(messages)).await?.into_inner();
        Ok(Self { outbox, inbox })
    }

    pub(crate) async fn next(&mut self) -> coordinator_message::Kind {
        let message = timeout(PATIENCE, self.inbox.message()).await.expect("a message comes").unwrap();
        message.expect("the stream goes on").kind.unwrap()
    }

    pub(crate) async fn assignment(&mut self) -> v1::Assignment {
        match self.next().await {
            coordinator_message::Kind::Assignment(assignment) => *assignment,
            other => panic!("no assignment but {other:?}"),
        }
    }

    pub(crate) async fn command(&mut self) -> v1::job_command::Kind {
        match self.next().await {
            coordinator_message::Kind::Command(command) => command.kind.unwrap(),
            other => panic!("no command but {other:?}"),
        }
    }

    pub(crate) async fn report(&self, assignment: &v1::Assignment, kind: job_report::Kind) {
        let report = v1::JobReport {
            job_id: assignment.job_id.clone(),
            generation: assignment.generation,
            kind: Some(kind),
        };
        let kind = Some(worker_message::Kind::Report(report));
        self.outbox.send(v1::WorkerMessage { kind }).await.unwrap();
    }

    pub(crate) async fn prepared(&self, assignment: &v1::Assignment, completed_steps: u64) {
        let facts = Some(v1::RunFacts { total_steps: 4, ..v1::RunFacts::default() });
        let prepared = v1::RunPrepared { facts, completed_steps };
        self.report(assignment, job_report::Kind::Prepared(prepared)).await;
    }

    pub(crate) async fn step(&self, assignment: &v1::Assignment, step: u64) {
        let metrics = Some(v1::StepMetrics { step, loss: 1.0, ..v1::StepMetrics::default() });
        let step = v1::StepFinished { metrics, logged: true, reduced_bytes: 8 };
        self.report(assignment, job_report::Kind::StepFinished(step)).await;
    }

    pub(crate) async fn ended(&self, assignment: &v1::Assignment, state: &str, files: &[&str]) {
        let files = files.iter().map(|&f| f.to_owned()).collect();
        self.report(assignment, job_report::Kind::Ended(v1::Ended { state: state.into(), files })).await;
    }

    pub(crate) async fn failed(&self, assignment: &v1::Assignment, cause: &str, suspects: &[u32]) {
        let failed =
            v1::WorkerFailed { completed_steps: 0, cause: cause.into(), suspects: suspects.to_vec() };
        self.report(assignment, job_report::Kind::Failed(failed)).await;
    }

    /// Waits for the job to be taken back, and gives it.
    pub(crate) async fn release(&mut self, assignment: &v1::Assignment) {
        let command = self.command().await;
        assert!(matches!(command, v1::job_command::Kind::Drop(_)), "{command:?}");
        self.report(assignment, job_report::Kind::Released(v1::Released {})).await;
    }
}

/// A job of `workers` workers that checks out; its paths lead nowhere.
pub(crate) fn job(workers: usize) -> JobSpec {
    let mut job = JobSpec { name: "dates".into(), ..JobSpec::default() };
    job.model.base = "/base".into();
    job.data.train = "/train.jsonl".into();
    job.training.save_total_limit = 2;
    job.workers.min = workers;
    job.workers.max = workers;
    job
}
