//! The store of the fake coordinator.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex};

use lora_proto::DigestBuilder;
use lora_proto::v1::artifacts_server::Artifacts;
use lora_proto::v1::download_response::Kind as Download;
use lora_proto::v1::job_artifact::Name;
use lora_proto::v1::upload_request::Kind as Upload;
use lora_proto::v1::{self, FileDigest, JobArtifact, StoredFile, download_request};
use tokio::sync::watch;
use tokio::time::timeout;
use tonic::{Request, Response, Status, Streaming};

use crate::fake::WAIT_TIMEOUT;

/// Files of clients, and uploads of workers. A clone shares the store.
#[derive(Clone)]
pub(crate) struct FakeStore(Arc<FakeState>);

struct FakeState {
    files: Mutex<HashMap<Vec<u8>, Vec<u8>>>,
    uploads: watch::Sender<Vec<(JobArtifact, FileDigest)>>,
    /// The errors of the next uploads.
    refusals: Mutex<VecDeque<Status>>,
}

impl FakeStore {
    pub(crate) fn new() -> Self {
        let (files, refusals) = (Mutex::default(), Mutex::default());
        Self(Arc::new(FakeState { files, uploads: watch::channel(Vec::new()).0, refusals }))
    }

    /// Stores a file like a client.
    pub(crate) fn add(&self, name: &str, content: &[u8]) -> StoredFile {
        let digest = DigestBuilder::of_bytes(content);
        self.0.files.lock().unwrap().insert(digest.sha256.clone(), content.to_vec());
        StoredFile { name: name.into(), digest: Some(digest) }
    }

    /// Refuses the next uploads with these errors, in this order.
    pub(crate) fn refuse(&self, refusals: impl IntoIterator<Item = Status>) {
        self.0.refusals.lock().unwrap().extend(refusals);
    }

    /// The number of refusals that no upload has received yet.
    pub(crate) fn refusals_left(&self) -> usize {
        self.0.refusals.lock().unwrap().len()
    }

    /// Waits for the first uploaded checkpoint and returns its step.
    pub(crate) async fn uploaded_checkpoint(&self) -> u64 {
        let mut uploads = self.0.uploads.subscribe();
        let first = |uploads: &Vec<(JobArtifact, FileDigest)>| {
            uploads.iter().find_map(|(artifact, _)| checkpoint_step(artifact))
        };
        let coming = timeout(WAIT_TIMEOUT, uploads.wait_for(|uploads| first(uploads).is_some()));
        first(&coming.await.expect("a checkpoint comes").unwrap()).unwrap()
    }

    /// The names of the result files that have been uploaded.
    pub(crate) fn result_files(&self) -> Vec<String> {
        let uploads = self.0.uploads.borrow();
        let file = |(artifact, _): &(JobArtifact, FileDigest)| match &artifact.name {
            Some(Name::ResultFile(file)) => Some(file.clone()),
            _ => None,
        };
        uploads.iter().filter_map(file).collect()
    }

    /// The uploaded checkpoint of `step`.
    pub(crate) fn checkpoint(&self, step: u64) -> v1::Checkpoint {
        let uploads = self.0.uploads.borrow();
        let found = uploads.iter().find(|(artifact, _)| checkpoint_step(artifact) == Some(step));
        v1::Checkpoint { step, digest: Some(found.expect("it is stored").1.clone()) }
    }
}

fn checkpoint_step(artifact: &JobArtifact) -> Option<u64> {
    match artifact.name {
        Some(Name::CheckpointStep(step)) => Some(step),
        _ => None,
    }
}

#[tonic::async_trait]
impl Artifacts for FakeStore {
    type DownloadStream = tokio_stream::Iter<std::vec::IntoIter<Result<v1::DownloadResponse, Status>>>;

    async fn find_missing(
        &self,
        _: Request<v1::FindMissingRequest>,
    ) -> Result<Response<v1::FindMissingResponse>, Status> {
        Err(Status::unimplemented("workers do not call this"))
    }

    async fn upload(
        &self,
        request: Request<Streaming<v1::UploadRequest>>,
    ) -> Result<Response<v1::UploadResponse>, Status> {
        let mut messages = request.into_inner();
        let (mut header, mut content) = (None, Vec::new());
        while let Some(message) = messages.message().await? {
            match message.kind {
                Some(Upload::Header(first)) => header = Some(first),
                Some(Upload::Chunk(chunk)) => content.extend(chunk),
                None => return Err(Status::invalid_argument("an empty message")),
            }
        }
        if let Some(refusal) = self.0.refusals.lock().unwrap().pop_front() {
            return Err(refusal);
        }
        let header = header.ok_or_else(|| Status::invalid_argument("no header"))?;
        let digest = DigestBuilder::of_bytes(&content);
        if header.digest.as_ref() != Some(&digest) {
            return Err(Status::data_loss("the digest does not match the content"));
        }
        self.add("", &content);
        let artifact = header.artifact.ok_or_else(|| Status::invalid_argument("no name"))?;
        self.0.uploads.send_modify(|uploads| uploads.push((artifact, digest)));
        Ok(Response::new(v1::UploadResponse {}))
    }

    async fn download(
        &self,
        request: Request<v1::DownloadRequest>,
    ) -> Result<Response<Self::DownloadStream>, Status> {
        let v1::DownloadRequest { source, offset } = request.into_inner();
        let Some(download_request::Source::Sha256(sha256)) = source else {
            return Err(Status::invalid_argument("a download must be by hash"));
        };
        let content = self.0.files.lock().unwrap().get(&sha256).cloned();
        let content = content.ok_or_else(|| Status::not_found("no such file"))?;
        let chunks = content[offset as usize..].chunks(lora_proto::CHUNK_BYTES);
        let chunks = chunks.map(|chunk| Download::Chunk(chunk.to_vec()));
        let kinds = chunks.chain([Download::Trailer(DigestBuilder::of_bytes(&content))]);
        let answers: Vec<_> = kinds.map(|kind| Ok(v1::DownloadResponse { kind: Some(kind) })).collect();
        Ok(Response::new(tokio_stream::iter(answers)))
    }
}
