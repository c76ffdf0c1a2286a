//! A coordinator in this process, and the calls of a client.

use std::path::Path;

use lora_coordinator::{Config, Coordinator, CoordinatorError, Handle};
use lora_proto::DigestBuilder;
use lora_proto::file_transfer;
use lora_proto::v1::fine_tuning_client::FineTuningClient;
use lora_proto::v1::{self, base, download_request, job_artifact, job_event, watch_job_response};
use lora_spec::JobSpec;
use tempfile::TempDir;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tonic::Status;
use tonic::transport::{Channel, Endpoint};

use super::WAIT_TIMEOUT;

pub(crate) struct Cluster {
    pub(crate) channel: Channel,
    pub(crate) config: Config,
    handle: Handle,
    serving: JoinHandle<Result<(), CoordinatorError>>,
    state: TempDir,
}

/// Settings with short waits.
pub(crate) fn fast_config() -> Config {
    let mut config = Config::default();
    config.workers.heartbeat_seconds = 0.1;
    config.workers.lease_seconds = 2.0;
    config.recovery.settle_seconds = 0.3;
    config
}

impl Cluster {
    pub(crate) async fn start() -> Self {
        Self::start_with(fast_config()).await
    }

    pub(crate) async fn start_with(config: Config) -> Self {
        Self::start_in(tempfile::tempdir().unwrap(), config).await
    }

    /// Starts a coordinator on the state directory of another one.
    pub(crate) async fn start_in(state: TempDir, mut config: Config) -> Self {
        config.state_dir = state.path().to_owned();
        config.grpc.listen = "127.0.0.1:0".into();
        config.http.listen = String::new();
        let coordinator = Coordinator::bind(&config).await.unwrap();
        let handle = coordinator.handle();
        let serving = tokio::spawn(coordinator.serve());
        let uri = format!("http://{}", handle.address());
        let channel = Endpoint::from_shared(uri).unwrap().connect().await.unwrap();
        Self { channel, config, handle, serving, state }
    }

    /// Ends the coordinator and starts another one on the same store.
    pub(crate) async fn restart(self) -> Self {
        let config = self.config.clone();
        let state = self.end().await;
        Self::start_in(state, config).await
    }

    pub(crate) async fn stop(self) {
        self.end().await;
    }

    /// Ends the coordinator, and returns its state directory.
    pub(crate) async fn end(self) -> TempDir {
        let Self { handle, channel, serving, state, .. } = self;
        handle.shutdown();
        drop(channel);
        timeout(WAIT_TIMEOUT, serving).await.expect("the coordinator ends").unwrap().unwrap();
        state
    }

    pub(crate) fn jobs(&self) -> FineTuningClient<Channel> {
        FineTuningClient::new(self.channel.clone())
    }

    /// Uploads a file to the store.
    pub(crate) async fn store(&self, name: &str, content: &[u8]) -> v1::StoredFile {
        let digest = DigestBuilder::of_bytes(content);
        let header = v1::UploadHeader { digest: Some(digest.clone()), artifact: None };
        file_transfer::upload(self.channel.clone(), header, content, Path::new(name), |_| {}).await.unwrap();
        v1::StoredFile { name: name.to_owned(), digest: Some(digest) }
    }

    /// Inputs that the coordinator cannot validate, because only workers can reach the base.
    pub(crate) async fn inputs(&self) -> v1::Inputs {
        v1::Inputs {
            base: Some(v1::Base { source: Some(base::Source::Path("/base".into())) }),
            train: vec![self.store("train.jsonl", b"{}\n").await],
            ..v1::Inputs::default()
        }
    }

    /// Inputs that the coordinator can plan with: the base of the example, and four rows.
    pub(crate) async fn whole_inputs(&self) -> v1::Inputs {
        let example = lora_test_kit::example("base");
        let mut files = Vec::new();
        for entry in std::fs::read_dir(example).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap();
            files.push(self.store(name, &std::fs::read(&path).unwrap()).await);
        }
        let row = r#"{"prompt": "one", "completion": "1"}"#;
        v1::Inputs {
            base: Some(v1::Base { source: Some(base::Source::Files(v1::FileSet { files })) }),
            train: vec![self.store("train.jsonl", format!("{row}\n").repeat(4).as_bytes()).await],
            ..v1::Inputs::default()
        }
    }

    pub(crate) async fn submit(&self, job: &JobSpec) -> String {
        self.submit_with(job, self.inputs().await, 0).await
    }

    pub(crate) async fn submit_with_priority(&self, job: &JobSpec, priority: i32) -> String {
        self.submit_with(job, self.inputs().await, priority).await
    }

    pub(crate) async fn submit_with(&self, job: &JobSpec, inputs: v1::Inputs, priority: i32) -> String {
        let request = v1::SubmitJobRequest {
            job: Some(v1::JobSpec::try_from(job).unwrap()),
            inputs: Some(inputs),
            priority,
            ..v1::SubmitJobRequest::default()
        };
        self.jobs().submit_job(request).await.unwrap().into_inner().job_id
    }

    pub(crate) async fn job(&self, job_id: &str) -> v1::Job {
        self.jobs().get_job(v1::GetJobRequest { job_id: job_id.into() }).await.unwrap().into_inner()
    }

    pub(crate) async fn cancel(&self, job_id: &str) -> Result<v1::Job, Status> {
        let request = v1::CancelJobRequest { job_id: job_id.into() };
        Ok(self.jobs().cancel_job(request).await?.into_inner())
    }

    pub(crate) async fn pause(&self, job_id: &str) -> Result<v1::Job, Status> {
        let request = v1::PauseJobRequest { job_id: job_id.into() };
        Ok(self.jobs().pause_job(request).await?.into_inner())
    }

    pub(crate) async fn resume(&self, job_id: &str, workers: Option<u64>) -> Result<v1::Job, Status> {
        let workers = workers.map(|n| v1::WorkersSpec { min: Some(n), max: Some(n) });
        let request = v1::ResumeJobRequest { job_id: job_id.into(), workers };
        Ok(self.jobs().resume_job(request).await?.into_inner())
    }

    /// Waits until the job is in this state, and returns it.
    pub(crate) async fn until(&self, job_id: &str, state: &str) -> v1::Job {
        self.until_that(job_id, |job| job.state == state).await
    }

    /// Waits until the job fulfils `condition`, and returns it.
    pub(crate) async fn until_that(&self, job_id: &str, condition: impl Fn(&v1::Job) -> bool) -> v1::Job {
        let deadline = tokio::time::Instant::now() + WAIT_TIMEOUT;
        loop {
            let job = self.job(job_id).await;
            if condition(&job) {
                return job;
            }
            assert!(tokio::time::Instant::now() < deadline, "the job is still {job:?}");
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    }

    /// Waits until the coordinator has noticed that these workers are gone.
    pub(crate) async fn until_lost(&self, names: &[&str]) {
        let deadline = tokio::time::Instant::now() + WAIT_TIMEOUT;
        loop {
            let request = v1::ListWorkersRequest {};
            let workers = self.jobs().list_workers(request).await.unwrap().into_inner().workers;
            if !workers.iter().any(|worker| names.contains(&worker.name.as_str()) && worker.state != "lost") {
                return;
            }
            assert!(tokio::time::Instant::now() < deadline, "the workers are still {workers:?}");
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    }

    /// Waits for an event of a job.
    pub(crate) async fn until_event(&self, job_id: &str, wanted: impl Fn(&job_event::Kind) -> bool) {
        let request = v1::WatchJobRequest { job_id: job_id.into(), events_only: true, ..Default::default() };
        let mut stream = self.jobs().watch_job(request).await.unwrap().into_inner();
        while let Some(item) = timeout(WAIT_TIMEOUT, stream.message()).await.expect("the event").unwrap() {
            let Some(watch_job_response::Kind::Event(event)) = item.kind else { panic!("{item:?}") };
            if event.kind.is_some_and(|kind| wanted(&kind)) {
                return;
            }
        }
        panic!("job {job_id} ended without the event");
    }

    /// All events of a job, until it is paused or has ended.
    pub(crate) async fn events(&self, job_id: &str) -> Vec<job_event::Kind> {
        let request = v1::WatchJobRequest { job_id: job_id.into(), events_only: true, ..Default::default() };
        let mut stream = self.jobs().watch_job(request).await.unwrap().into_inner();
        let mut all = Vec::new();
        while let Some(item) = timeout(WAIT_TIMEOUT, stream.message()).await.expect("the job ends").unwrap() {
            let Some(watch_job_response::Kind::Event(event)) = item.kind else { panic!("{item:?}") };
            assert_eq!(event.number, all.len() as u64 + 1);
            all.push(event.kind.unwrap());
        }
        all
    }

    /// The states of a job in order, until it was paused or had ended.
    pub(crate) async fn states(&self, job_id: &str) -> Vec<String> {
        let state = |event| match event {
            job_event::Kind::StateChanged(change) => Some(change.state),
            _ => None,
        };
        self.events(job_id).await.into_iter().filter_map(state).collect()
    }

    pub(crate) async fn upload(
        &self,
        assignment: &v1::Assignment,
        name: job_artifact::Name,
        content: &[u8],
    ) -> Result<(), file_transfer::TransferError> {
        let artifact = v1::JobArtifact {
            job_id: assignment.job_id.clone(),
            generation: assignment.generation,
            name: Some(name),
        };
        let header =
            v1::UploadHeader { digest: Some(DigestBuilder::of_bytes(content)), artifact: Some(artifact) };
        file_transfer::upload(self.channel.clone(), header, content, Path::new("artifact"), |_| {}).await
    }

    pub(crate) async fn checkpoint(&self, assignment: &v1::Assignment, step: u64, content: &[u8]) {
        self.upload(assignment, job_artifact::Name::CheckpointStep(step), content).await.unwrap();
    }

    pub(crate) async fn result(&self, assignment: &v1::Assignment, file: &str, content: &[u8]) {
        self.upload(assignment, job_artifact::Name::ResultFile(file.into()), content).await.unwrap();
    }

    /// Downloads a file of a job's result.
    pub(crate) async fn download(&self, job_id: &str, name: &str) -> Vec<u8> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let source = v1::ResultFile { job_id: job_id.into(), name: name.into() };
        let source = download_request::Source::Result(source);
        file_transfer::download(self.channel.clone(), source, &path, |_| {}).await.unwrap();
        std::fs::read(path).unwrap()
    }
}

/// A valid job for `min` to `max` workers, with paths that do not exist.
pub(crate) fn job(min: usize, max: usize) -> JobSpec {
    let mut job = JobSpec { name: "dates".into(), ..JobSpec::default() };
    job.model.base = "/base".into();
    job.data.train = "/train.jsonl".into();
    job.training.save_total_limit = 2;
    job.workers.min = min;
    job.workers.max = max;
    job
}
