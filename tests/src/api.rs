//! A client of the coordinator's gRPC interface.

use std::path::Path;

use lora_proto::file_transfer;
use lora_proto::v1::fine_tuning_client::FineTuningClient;
use lora_proto::v1::{self, watch_job_response::Kind};
use lora_proto::{DigestBuilder, MAX_MESSAGE_BYTES};
use tokio::runtime::{self, Runtime};
use tokio::time::timeout;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

use crate::process::WAIT_TIMEOUT;

/// A gRPC client with a runtime.
#[derive(Debug)]
pub struct ApiClient {
    runtime: Runtime,
    channel: Channel,
}

impl ApiClient {
    /// Creates a client of the coordinator at `url`. The coordinator need not be running yet.
    pub fn new(url: &str) -> Self {
        let runtime = runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let endpoint = Endpoint::from_shared(url.to_owned()).unwrap();
        let channel = runtime.block_on(async { endpoint.connect_lazy() });
        Self { runtime, channel }
    }

    /// Returns a job; `None` while the coordinator is unreachable.
    pub fn job(&self, job_id: &str) -> Option<v1::Job> {
        let request = v1::GetJobRequest { job_id: job_id.to_owned() };
        present(self.call(async |mut jobs| Ok(jobs.get_job(request).await?.into_inner())))
    }

    /// Returns the workers; `None` while the coordinator is unreachable.
    pub fn workers(&self) -> Option<Vec<v1::Worker>> {
        let request = v1::ListWorkersRequest {};
        present(self.call(async |mut jobs| Ok(jobs.list_workers(request).await?.into_inner().workers)))
    }

    /// Watches a job and returns its events from number `from` on and its steps after `step`. The
    /// stream ends when the job is in a state that it does not leave by itself.
    pub fn watch(&self, job_id: &str, from: u64, step: u64) -> Vec<Kind> {
        let request = v1::WatchJobRequest {
            job_id: job_id.to_owned(),
            from_number: from,
            after_step: step,
            events_only: false,
        };
        let all = async |mut jobs: FineTuningClient<Channel>| {
            let mut stream = jobs.watch_job(request).await?.into_inner();
            let mut all = Vec::new();
            while let Some(message) = stream.message().await? {
                all.extend(message.kind);
            }
            Ok(all)
        };
        self.call(all).unwrap()
    }

    /// Like [`Self::watch`]: returns all events of a job.
    pub fn events(&self, job_id: &str) -> Vec<v1::JobEvent> {
        let event = |kind| match kind {
            Kind::Event(event) => Some(event),
            Kind::Step(_) => None,
        };
        self.watch(job_id, 1, 0).into_iter().filter_map(event).collect()
    }

    /// Uploads a file and returns its name and digest.
    pub fn upload(&self, path: &Path) -> v1::StoredFile {
        let digest = DigestBuilder::of_file(path).unwrap();
        let header = v1::UploadHeader { digest: Some(digest.clone()), artifact: None };
        let channel = self.channel.clone();
        self.runtime
            .block_on(async {
                let file = tokio::fs::File::open(path).await.unwrap();
                timeout(WAIT_TIMEOUT, file_transfer::upload(channel, header, file, path, |_| ()))
                    .await
                    .unwrap()
            })
            .unwrap();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        v1::StoredFile { name, digest: Some(digest) }
    }

    /// Submits a job.
    ///
    /// # Errors
    /// The coordinator refuses the job.
    pub fn submit(&self, request: v1::SubmitJobRequest) -> Result<v1::Job, Status> {
        self.call(async |mut jobs| Ok(jobs.submit_job(request).await?.into_inner()))
    }

    fn call<T>(
        &self,
        call: impl AsyncFnOnce(FineTuningClient<Channel>) -> Result<T, Status>,
    ) -> Result<T, Status> {
        let client = FineTuningClient::new(self.channel.clone()).max_decoding_message_size(MAX_MESSAGE_BYTES);
        self.runtime.block_on(async { timeout(WAIT_TIMEOUT, call(client)).await.unwrap() })
    }
}

/// Returns the answer; `None` if the coordinator was unreachable.
fn present<T>(answer: Result<T, Status>) -> Option<T> {
    let is_unreachable =
        |status: &Status| matches!(status.code(), Code::Unavailable | Code::Unknown | Code::Cancelled);
    match answer {
        Ok(answer) => Some(answer),
        Err(status) if is_unreachable(&status) => None,
        Err(status) => panic!("{status}"),
    }
}
