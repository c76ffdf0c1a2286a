//! A fake store, the service `Artifacts`, with faults that the test defines.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard};

use lora_proto::v1::artifacts_server::{Artifacts, ArtifactsServer};
use lora_proto::v1::download_response::Kind as Download;
use lora_proto::v1::job_artifact::Name;
use lora_proto::v1::upload_request::Kind as Upload;
use lora_proto::v1::{self, FileDigest, JobArtifact, download_request};
use lora_proto::{CHUNK_BYTES, DigestBuilder};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Server;
use tonic::{Request, Response, Status, Streaming};

use crate::server::TestServer;

/// The number of bytes in a message of a download.
pub const DOWNLOAD_CHUNK_BYTES: usize = CHUNK_BYTES / 4;

/// A store in memory. A clone shares its files.
#[derive(Debug, Clone)]
pub struct FakeArtifacts(Arc<Shared>);

/// A file that was uploaded.
#[derive(Debug, Clone)]
pub struct StoredUpload {
    /// The name of a worker's upload; clients send none.
    pub artifact: Option<JobArtifact>,
    /// The digest of `content`.
    pub digest: FileDigest,
    /// The bytes of the file.
    pub content: Vec<u8>,
}

impl StoredUpload {
    /// The step of a checkpoint.
    pub fn checkpoint_step(&self) -> Option<u64> {
        match self.artifact.as_ref()?.name {
            Some(Name::CheckpointStep(step)) => Some(step),
            _ => None,
        }
    }

    /// The name of a file of a job's result.
    pub fn result_file(&self) -> Option<&str> {
        match self.artifact.as_ref()?.name.as_ref() {
            Some(Name::ResultFile(file)) => Some(file),
            _ => None,
        }
    }
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    uploads: watch::Sender<Vec<StoredUpload>>,
    /// Every message of a download except the first takes a permit.
    messages: Semaphore,
}

#[derive(Debug, Default)]
struct State {
    /// The content that is sent, by the SHA-256 that is requested.
    files: HashMap<Vec<u8>, Vec<u8>>,
    /// The files of a job's result, by name.
    results: HashMap<String, Vec<u8>>,
    /// The offsets of the downloads so far.
    offsets: Vec<u64>,
    /// For each of the next downloads: the number of bytes after which it breaks.
    breaks: VecDeque<usize>,
    /// Whether the trailer of a download has the requested SHA-256, whatever content was sent.
    corrupt: bool,
    /// The errors of the next uploads, which are not stored.
    refusals: VecDeque<Status>,
    /// The errors of the next uploads, which are stored all the same.
    lost_answers: VecDeque<Status>,
}

impl Default for FakeArtifacts {
    fn default() -> Self {
        Self(Arc::new(Shared {
            state: Mutex::default(),
            uploads: watch::channel(Vec::new()).0,
            messages: Semaphore::new(Semaphore::MAX_PERMITS),
        }))
    }
}

impl FakeArtifacts {
    /// Returns an empty store and a server of it.
    pub async fn serve() -> (Self, TestServer) {
        let store = Self::default();
        let router = Server::builder().add_service(ArtifactsServer::new(store.clone()));
        (store, TestServer::serve(router).await)
    }

    /// Stores `content`.
    pub fn add(&self, content: &[u8]) -> FileDigest {
        self.add_as(content, content)
    }

    /// Sends `content` to clients that request the SHA-256 of `requested`.
    pub fn add_as(&self, requested: &[u8], content: &[u8]) -> FileDigest {
        let digest = DigestBuilder::of_bytes(requested);
        self.state().files.insert(digest.sha256.clone(), content.to_vec());
        digest
    }

    /// Stores a file of a job's result.
    pub fn add_result(&self, name: &str, content: &[u8]) -> FileDigest {
        self.state().results.insert(name.to_owned(), content.to_vec());
        self.add(content)
    }

    /// Breaks the next downloads after these numbers of bytes.
    pub fn break_downloads_after(&self, bytes: &[usize]) {
        self.state().breaks = bytes.to_vec().into();
    }

    /// Makes each download claim that its content is what was requested.
    pub fn corrupt_downloads(&self) {
        self.state().corrupt = true;
    }

    /// Stops downloads after their first message.
    pub fn stop_downloads(&self) {
        self.0.messages.forget_permits(Semaphore::MAX_PERMITS);
    }

    /// Lets stopped downloads continue.
    pub fn continue_downloads(&self) {
        self.0.messages.add_permits(1 << 20);
    }

    /// The offsets at which downloads began, in order.
    pub fn offsets(&self) -> Vec<u64> {
        self.state().offsets.clone()
    }

    /// Refuses the next uploads with these errors, in this order.
    pub fn refuse_uploads(&self, refusals: impl IntoIterator<Item = Status>) {
        self.state().refusals.extend(refusals);
    }

    /// The number of refusals that no upload has received yet.
    pub fn refusals_left(&self) -> usize {
        self.state().refusals.len()
    }

    /// Stores the next uploads, but answers them with these errors.
    pub fn lose_answers(&self, answers: impl IntoIterator<Item = Status>) {
        self.state().lost_answers.extend(answers);
    }

    /// All uploads that were stored, in order.
    pub fn uploads(&self) -> Vec<StoredUpload> {
        self.0.uploads.borrow().clone()
    }

    /// Waits for an upload for which `want` returns a value. The caller sets the time limit.
    pub async fn uploaded<T>(&self, want: impl Fn(&StoredUpload) -> Option<T>) -> T {
        let mut uploads = self.0.uploads.subscribe();
        loop {
            if let Some(found) = uploads.borrow_and_update().iter().find_map(&want) {
                return found;
            }
            uploads.changed().await.unwrap();
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap()
    }

    /// Sends `content` from `offset`, up to the `broken` byte after it if there is one.
    async fn send(self, request: Content, to: mpsc::Sender<Answer>) {
        let Content { requested, content, offset, broken } = request;
        let answer = |kind| Ok(v1::DownloadResponse { kind: Some(kind) });
        let rest = &content[offset..];
        let sent = &rest[..broken.unwrap_or(rest.len()).min(rest.len())];
        for (number, chunk) in sent.chunks(DOWNLOAD_CHUNK_BYTES).enumerate() {
            if number > 0 {
                self.0.messages.acquire().await.unwrap().forget();
            }
            if to.send(answer(Download::Chunk(chunk.to_vec()))).await.is_err() {
                return;
            }
        }
        let mut trailer = DigestBuilder::of_bytes(&content);
        if self.state().corrupt {
            trailer.sha256 = requested;
        }
        let last = match broken {
            Some(_) => Err(Status::unavailable("the connection broke")),
            None => answer(Download::Trailer(trailer)),
        };
        // The client may have disconnected.
        let _ = to.send(last).await;
    }
}

type Answer = Result<v1::DownloadResponse, Status>;

/// What one download sends.
struct Content {
    /// The SHA-256 that was requested, or empty.
    requested: Vec<u8>,
    content: Vec<u8>,
    offset: usize,
    /// The number of bytes after which the download breaks.
    broken: Option<usize>,
}

#[tonic::async_trait]
impl Artifacts for FakeArtifacts {
    type DownloadStream = ReceiverStream<Answer>;

    async fn find_missing(
        &self,
        request: Request<v1::FindMissingRequest>,
    ) -> Result<Response<v1::FindMissingResponse>, Status> {
        let files = request.into_inner().files;
        let state = self.state();
        let missing = files.into_iter().filter(|file| !state.files.contains_key(&file.sha256)).collect();
        Ok(Response::new(v1::FindMissingResponse { missing }))
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
        if let Some(refusal) = self.state().refusals.pop_front() {
            return Err(refusal);
        }
        let header = header.ok_or_else(|| Status::invalid_argument("no header"))?;
        let digest = DigestBuilder::of_bytes(&content);
        if header.digest.as_ref() != Some(&digest) {
            return Err(Status::data_loss("the digest does not match the content"));
        }
        self.add(&content);
        let upload = StoredUpload { artifact: header.artifact, digest, content };
        self.0.uploads.send_modify(|uploads| uploads.push(upload));
        self.state().lost_answers.pop_front().map_or(Ok(Response::new(v1::UploadResponse {})), Err)
    }

    async fn download(
        &self,
        request: Request<v1::DownloadRequest>,
    ) -> Result<Response<Self::DownloadStream>, Status> {
        let v1::DownloadRequest { source, offset } = request.into_inner();
        let request = {
            let mut state = self.state();
            let (requested, content) = match source {
                Some(download_request::Source::Sha256(sha256)) => {
                    let content = state.files.get(&sha256).cloned();
                    (sha256, content)
                }
                Some(download_request::Source::Result(file)) => {
                    (Vec::new(), state.results.get(&file.name).cloned())
                }
                _ => return Err(Status::invalid_argument("a download must be by hash or of a result")),
            };
            let content = content.ok_or_else(|| Status::not_found("no such file"))?;
            if offset > content.len() as u64 {
                return Err(Status::out_of_range("the offset is after the end of the file"));
            }
            state.offsets.push(offset);
            Content { requested, content, offset: offset as usize, broken: state.breaks.pop_front() }
        };
        let (to, answers) = mpsc::channel(1);
        tokio::spawn(self.clone().send(request, to));
        Ok(Response::new(ReceiverStream::new(answers)))
    }
}
