//! A worker with its engine, and a coordinator, in one process.

#![expect(clippy::unwrap_used, clippy::expect_used, reason = "helpers of tests")]

use std::path::{Path, PathBuf};
use std::time::Duration;

use lora_coordinator::{Coordinator, CoordinatorError};
use lora_proto::v1::fine_tuning_client::FineTuningClient;
use lora_proto::v1::{self, job_event};
use lora_spec::JobSpec;
use lora_worker::{Options, WorkerError};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tonic::transport::{Channel, Endpoint};

const PATIENCE: Duration = Duration::from_secs(120);

struct Pair {
    client: FineTuningClient<Channel>,
    coordinator: lora_coordinator::Handle,
    serving: JoinHandle<Result<(), CoordinatorError>>,
    worker: JoinHandle<Result<(), WorkerError>>,
}

impl Pair {
    async fn start() -> Self {
        let coordinator = Coordinator::bind(&lora_coordinator::Options::default()).await.unwrap();
        let handle = coordinator.handle();
        let serving = tokio::spawn(coordinator.serve());
        let address = format!("http://{}", handle.address());
        let options = Options::local(address.clone(), "worker".into(), 1);
        let worker = tokio::spawn(lora_worker::run(options, CancellationToken::new()));
        let channel = Endpoint::from_shared(address).unwrap().connect().await.unwrap();
        Self { client: FineTuningClient::new(channel), coordinator: handle, serving, worker }
    }

    /// The events of a job, which is brought to its end.
    async fn run(&mut self, job: &JobSpec, output_dir: &Path) -> Vec<job_event::Kind> {
        let request = v1::SubmitJobRequest {
            job: Some(v1::JobSpec::try_from(job).unwrap()),
            output_dir: output_dir.to_str().unwrap().to_owned(),
            resume: false,
        };
        let job_id = self.client.submit_job(request).await.unwrap().into_inner().job_id;
        let request = v1::WatchJobRequest { job_id, from_number: 1 };
        let mut events = self.client.watch_job(request).await.unwrap().into_inner();
        let mut all = Vec::new();
        while let Some(event) = timeout(PATIENCE, events.message()).await.expect("the job ends").unwrap() {
            all.push(event.kind.unwrap());
        }
        all
    }

    async fn stop(self) {
        self.coordinator.shutdown();
        timeout(PATIENCE, self.worker).await.expect("the worker ends").unwrap().unwrap();
        drop(self.client);
        timeout(PATIENCE, self.serving).await.expect("the coordinator ends").unwrap().unwrap();
    }
}

/// Two steps on the example's base.
fn job(data: &Path) -> JobSpec {
    let base: PathBuf = [env!("CARGO_MANIFEST_DIR"), "../../examples/dates/base"].iter().collect();
    let mut job = JobSpec { name: "tiny".into(), ..JobSpec::default() };
    job.model.base = base;
    job.data.train = data.to_owned();
    job.adapter.r = 2;
    job.training.global_batch_size = 2;
    job.training.micro_batch_size = 1;
    job.training.max_steps = Some(2);
    job
}

fn rows(dir: &Path, text: &str) -> PathBuf {
    let path = dir.join("rows.jsonl");
    std::fs::write(&path, text).unwrap();
    path
}

fn failure(events: &[job_event::Kind]) -> Option<&v1::Failure> {
    events.iter().find_map(|event| match event {
        job_event::Kind::StateChanged(change) => change.failure.as_ref(),
        _ => None,
    })
}

const TWO_ROWS: &str =
    "{\"prompt\": \"one\", \"completion\": \"1\"}\n{\"prompt\": \"two\", \"completion\": \"2\"}\n";

#[tokio::test(flavor = "multi_thread")]
async fn a_broken_row_fails_the_job_and_the_worker_lives() {
    let temp = tempfile::tempdir().unwrap();
    let mut pair = Pair::start().await;
    let out = temp.path().join("out");
    let broken = rows(temp.path(), "{\"prompt\": \"one\", \"completion\": \"1\"}\n{\"prompt\"\n");
    let events = pair.run(&job(&broken), &out).await;
    let failure = failure(&events).unwrap();
    assert_eq!((failure.worker.as_deref(), failure.rank), (Some("worker"), Some(0)));
    assert!(failure.cause.contains("rows.jsonl:2"), "{failure:?}");
    assert!(!out.exists());
    let events = pair.run(&job(&rows(temp.path(), TWO_ROWS)), &out).await;
    assert!(events.iter().any(|event| matches!(event, job_event::Kind::ResultSaved(_))), "{events:?}");
    pair.stop().await;
}
