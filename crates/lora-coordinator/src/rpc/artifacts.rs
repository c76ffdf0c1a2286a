//! `Artifacts`: files into and out of a job's output directory.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::{self, BoxStream};
use lora_proto::v1::{self, artifact_name, download_response, upload_request};
use lora_proto::{CHUNK_BYTES, DigestBuilder};
use lora_spec::FieldError;
use tokio::fs::{File, OpenOptions};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;
use tonic::{Request, Response, Status, Streaming};

use super::Commands;
use crate::command::{ArtifactName, Command, Upload};
use crate::refusal::Refusal;

/// How long an upload may stand still.
const STALLED: Duration = Duration::from_secs(60);

#[derive(Debug)]
pub(crate) struct Artifacts(Commands);

impl Artifacts {
    pub(crate) fn new(commands: Commands) -> Self {
        Self(commands)
    }
}

#[tonic::async_trait]
impl v1::artifacts_server::Artifacts for Artifacts {
    async fn upload(
        &self,
        request: Request<Streaming<v1::UploadRequest>>,
    ) -> Result<Response<v1::UploadResponse>, Status> {
        let mut messages = request.into_inner();
        let Some(upload_request::Kind::Header(header)) = next(&mut messages).await? else {
            return Err(Status::invalid_argument("an upload starts with its header"));
        };
        let v1::UploadHeader { job_id, generation, name, digest } = header;
        let announced = digest.ok_or_else(|| FieldError::new("header.digest", "is missing".into()));
        let announced = announced.map_err(Refusal::from)?;
        let upload = Upload { job_id, generation, name: artifact_name(name)? };
        let path = self.0.ask(|reply| Command::StageUpload { upload: upload.clone(), reply }).await?;
        let staged = Staged::receive(path, &mut messages, &announced).await?;
        let path = staged.path.clone();
        self.0.ask(|reply| Command::CommitUpload { upload, path, reply }).await?;
        staged.keep();
        Ok(Response::new(v1::UploadResponse {}))
    }

    type DownloadStream = BoxStream<'static, Result<v1::DownloadResponse, Status>>;

    async fn download(
        &self,
        request: Request<v1::DownloadRequest>,
    ) -> Result<Response<Self::DownloadStream>, Status> {
        let v1::DownloadRequest { job_id, name } = request.into_inner();
        let name = artifact_name(name)?;
        let path = self.0.ask(|reply| Command::Locate { job_id, name, reply }).await?;
        let file = match File::open(&path).await {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(Status::not_found(format!("there is no {}", path.display())));
            }
            Err(error) => return Err(failed(&path, &error)),
        };
        Ok(Response::new(read_out(file, path)))
    }
}

/// An upload on disk, removed unless it is kept.
struct Staged {
    path: PathBuf,
    kept: bool,
}

impl Staged {
    async fn receive(
        path: PathBuf,
        messages: &mut Streaming<v1::UploadRequest>,
        announced: &v1::FileDigest,
    ) -> Result<Self, Status> {
        let io = |error: io::Error| failed(&path, &error);
        let mut file = OpenOptions::new().write(true).create_new(true).open(&path).await.map_err(io)?;
        let staged = Self { path: path.clone(), kept: false };
        let mut digest = DigestBuilder::default();
        while let Some(kind) = next(messages).await? {
            let upload_request::Kind::Chunk(chunk) = kind else {
                return Err(Status::invalid_argument("an upload has one header"));
            };
            digest.update(&chunk);
            if digest.size() > announced.size {
                let given = format!("at least {} bytes", digest.size());
                return Err(Refusal::Damaged { announced: described(announced), given }.into());
            }
            file.write_all(&chunk).await.map_err(io)?;
        }
        let given = digest.finish();
        if given != *announced {
            let (announced, given) = (described(announced), described(&given));
            return Err(Refusal::Damaged { announced, given }.into());
        }
        file.sync_all().await.map_err(io)?;
        Ok(staged)
    }

    fn keep(mut self) {
        self.kept = true;
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        if !self.kept {
            // What cannot be removed now is when the directory is opened again.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// The chunks of a file, then its digest.
fn read_out(file: File, path: PathBuf) -> BoxStream<'static, Result<v1::DownloadResponse, Status>> {
    let message = |kind| Ok(v1::DownloadResponse { kind: Some(kind) });
    let start = Some((file, DigestBuilder::default()));
    stream::unfold(start, move |state| {
        let path = path.clone();
        async move {
            let (file, mut digest) = state?;
            let mut chunk = Vec::with_capacity(CHUNK_BYTES);
            let mut piece = file.take(CHUNK_BYTES as u64);
            match piece.read_to_end(&mut chunk).await {
                Err(error) => Some((Err(failed(&path, &error)), None)),
                Ok(0) => Some((message(download_response::Kind::Trailer(digest.finish())), None)),
                Ok(_) => {
                    digest.update(&chunk);
                    let next = Some((piece.into_inner(), digest));
                    Some((message(download_response::Kind::Chunk(chunk)), next))
                }
            }
        }
    })
    .boxed()
}

async fn next(messages: &mut Streaming<v1::UploadRequest>) -> Result<Option<upload_request::Kind>, Status> {
    let message = timeout(STALLED, messages.message())
        .await
        .map_err(|_| Status::deadline_exceeded(format!("the upload stood still for {STALLED:?}")))??;
    match message {
        None => Ok(None),
        Some(v1::UploadRequest { kind: Some(kind) }) => Ok(Some(kind)),
        Some(_) => Err(Status::invalid_argument("a message without content")),
    }
}

fn artifact_name(name: Option<v1::ArtifactName>) -> Result<ArtifactName, Refusal> {
    match name.and_then(|name| name.name) {
        Some(artifact_name::Name::CheckpointStep(step)) => Ok(ArtifactName::Checkpoint { step }),
        Some(artifact_name::Name::ResultFile(file)) => {
            let legal = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
            if file.is_empty() || file.len() > 128 || file.starts_with('.') || !file.chars().all(legal) {
                let message = format!(
                    "{file:?} is no file name: 1 to 128 letters, digits, '-', '_' or '.', not starting with a dot"
                );
                return Err(FieldError::new("name.result_file", message).into());
            }
            Ok(ArtifactName::Result { file })
        }
        None => Err(FieldError::new("name", "is missing".into()).into()),
    }
}

fn described(digest: &v1::FileDigest) -> String {
    let hash: String = digest.sha256.iter().take(32).map(|byte| format!("{byte:02x}")).collect();
    format!("{} bytes with SHA-256 {hash}", digest.size)
}

fn failed(path: &Path, error: &io::Error) -> Status {
    Status::internal(format!("{}: {error}", path.display()))
}
