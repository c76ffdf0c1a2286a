//! A fake coordinator's store that can simulate faults.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use lora_daemon::incoming::incoming;
use lora_proto::v1::artifacts_server::{Artifacts, ArtifactsServer};
use lora_proto::v1::{self, download_request, download_response};
use lora_proto::{CHUNK_BYTES, DigestBuilder};
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Server};
use tonic::{Request, Response, Status, Streaming};

/// The files of the store, and the downloads so far.
#[derive(Clone)]
pub(super) struct FakeArtifacts(Arc<FakeState>);

struct FakeState {
    /// The content that is sent, by the SHA-256 that is requested.
    files: Mutex<HashMap<Vec<u8>, Vec<u8>>>,
    /// Offsets of the downloads so far.
    offsets: Mutex<Vec<u64>>,
    /// The next download breaks after this number of bytes.
    break_after: Mutex<Option<usize>>,
    /// Whether the trailer has the requested SHA-256, whatever content was sent.
    corrupts: Mutex<bool>,
    /// Every chunk of a download except the first takes a permit.
    chunks: Semaphore,
}

impl FakeArtifacts {
    pub(super) async fn serve() -> (Self, Channel) {
        let shared = FakeState {
            files: Mutex::default(),
            offsets: Mutex::default(),
            break_after: Mutex::default(),
            corrupts: Mutex::default(),
            chunks: Semaphore::new(Semaphore::MAX_PERMITS),
        };
        let store = Self(Arc::new(shared));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let server = Server::builder().add_service(ArtifactsServer::new(store.clone()));
        tokio::spawn(server.serve_with_incoming(incoming(listener)));
        (store, Channel::from_shared(format!("http://{address}")).unwrap().connect_lazy())
    }

    pub(super) fn add(&self, content: &[u8]) {
        self.add_as(content, content);
    }

    /// Sends `content` to clients that request the SHA-256 of `asked`.
    pub(super) fn add_as(&self, asked: &[u8], content: &[u8]) {
        self.0.files.lock().unwrap().insert(DigestBuilder::of_bytes(asked).sha256, content.to_vec());
    }

    pub(super) fn break_after(&self, bytes: usize) {
        *self.0.break_after.lock().unwrap() = Some(bytes);
    }

    pub(super) fn corrupt_downloads(&self) {
        *self.0.corrupts.lock().unwrap() = true;
    }

    /// Stops downloads after their first chunk.
    pub(super) fn stand_still(&self) {
        self.0.chunks.forget_permits(Semaphore::MAX_PERMITS);
    }

    pub(super) fn go_on(&self) {
        self.0.chunks.add_permits(1 << 20);
    }

    pub(super) fn offsets(&self) -> Vec<u64> {
        self.0.offsets.lock().unwrap().clone()
    }

    async fn send(self, sha256: Vec<u8>, content: Vec<u8>, offset: usize, to: mpsc::Sender<Answer>) {
        let answer = |kind| Ok(v1::DownloadResponse { kind: Some(kind) });
        let end = self.0.break_after.lock().unwrap().take();
        let shown = &content[offset..end.unwrap_or(content.len())];
        for (number, chunk) in shown.chunks(CHUNK_BYTES / 4).enumerate() {
            if number > 0 {
                self.0.chunks.acquire().await.unwrap().forget();
            }
            if to.send(answer(download_response::Kind::Chunk(chunk.to_vec()))).await.is_err() {
                return;
            }
        }
        let mut trailer = DigestBuilder::of_bytes(&content);
        if *self.0.corrupts.lock().unwrap() {
            trailer.sha256 = sha256;
        }
        let last = match end {
            Some(_) => Err(Status::unavailable("the connection broke")),
            None => answer(download_response::Kind::Trailer(trailer)),
        };
        // The client may have disconnected.
        let _ = to.send(last).await;
    }
}

type Answer = Result<v1::DownloadResponse, Status>;

#[tonic::async_trait]
impl Artifacts for FakeArtifacts {
    type DownloadStream = ReceiverStream<Answer>;

    async fn find_missing(
        &self,
        _: Request<v1::FindMissingRequest>,
    ) -> Result<Response<v1::FindMissingResponse>, Status> {
        Err(Status::unimplemented("this service only downloads"))
    }

    async fn upload(
        &self,
        _: Request<Streaming<v1::UploadRequest>>,
    ) -> Result<Response<v1::UploadResponse>, Status> {
        Err(Status::unimplemented("this service only downloads"))
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
        if offset > content.len() as u64 {
            return Err(Status::out_of_range("the offset is after the end of the file"));
        }
        self.0.offsets.lock().unwrap().push(offset);
        let (to, answers) = mpsc::channel(1);
        tokio::spawn(self.clone().send(sha256, content, offset as usize, to));
        Ok(Response::new(ReceiverStream::new(answers)))
    }
}
