//! The coordinator's gRPC interface, as any client has it.

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

/// A client.
#[derive(Debug)]
pub struct Api {
    runtime: Runtime,
    channel: Channel,
}

impl Api {
    /// Of the coordinator at `url`, which need not be there yet.
    pub fn new(url: &str) -> Self {
        let runtime = runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let endpoint = Endpoint::from_shared(url.to_owned()).unwrap();
        let channel = runtime.block_on(async { endpoint.connect_lazy() });
        Self { runtime, channel }
    }

    /// A job; none while the coordinator is away.
    pub fn job(&self, job_id: &str) -> Option<v1::Job> {
        let request = v1::GetJobRequest { job_id: job_id.to_owned() };
        present(self.call(async |mut jobs| Ok(jobs.get_job(request).await?.into_inner())))
    }

    /// The workers; none while the coordinator is away.
    pub fn workers(&self) -> Option<Vec<v1::Worker>> {
        let request = v1::ListWorkersRequest {};
        present(self.call(async |mut jobs| Ok(jobs.list_workers(request).await?.into_inner().workers)))
    }

    /// What a job's watcher gets from event `from` and from after `step` on, until the job rests.
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

    /// The events of a job, until it rests.
    pub fn events(&self, job_id: &str) -> Vec<v1::JobEvent> {
        let event = |kind| match kind {
            Kind::Event(event) => Some(event),
            Kind::Step(_) => None,
        };
        self.watch(job_id, 1, 0).into_iter().filter_map(event).collect()
    }

    /// Uploads a file as it is and names it.
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
    /// The coordinator's refusal.
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

/// The answer, if there was somebody to give one.
fn present<T>(answer: Result<T, Status>) -> Option<T> {
    let broken =
        |status: &Status| matches!(status.code(), Code::Unavailable | Code::Unknown | Code::Cancelled);
    match answer {
        Ok(answer) => Some(answer),
        Err(status) if broken(&status) => None,
        Err(status) => panic!("{status}"),
    }
}
