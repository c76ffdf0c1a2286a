//! The gRPC service `Artifacts`: uploads to and downloads from the store.

use std::io::SeekFrom;
use std::path::PathBuf;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::{self, BoxStream};
use lora_proto::CHUNK_BYTES;
use lora_proto::file_name::{MAX_RESULT_NAME_BYTES, is_file_name};
use lora_proto::v1::{self, download_request, download_response, job_artifact, upload_request};
use lora_spec::FieldError;
use tokio::fs::File;
use tokio::io::{AsyncReadExt, AsyncSeekExt};
use tokio::time::timeout;
use tonic::{Request, Response, Status, Streaming};

use crate::admission::inputs::check_digest;
use crate::refusal::Refusal;
use crate::store::{ArtifactRefusal, StagedFile, Store, StoreError};

/// The longest time between two messages of an upload.
const STALL_TIMEOUT: Duration = Duration::from_secs(60);
const MAX_QUERY: usize = 4096;

#[derive(Debug)]
pub(crate) struct Artifacts {
    store: Store,
    /// The largest input, in bytes.
    limit: u64,
}

impl Artifacts {
    pub(crate) fn new(store: Store, limit: u64) -> Self {
        Self { store, limit }
    }

    async fn receive(
        &self,
        messages: &mut Streaming<v1::UploadRequest>,
        announced: &v1::FileDigest,
    ) -> Result<StagedFile, Status> {
        let mut staged = self.store.stage().await.map_err(Refusal::from)?;
        let mut size = 0;
        while let Some(kind) = next(messages).await? {
            let upload_request::Kind::Chunk(chunk) = kind else {
                return Err(Refusal::from(FieldError::new("header", "is sent twice".into())).into());
            };
            size += chunk.len() as u64;
            if size > announced.size {
                let given = format!("at least {size} bytes");
                return Err(Refusal::Corrupt { announced: described(announced), given }.into());
            }
            staged.write(&chunk).await.map_err(Refusal::from)?;
        }
        let staged = staged.finish().await.map_err(Refusal::from)?;
        if staged.digest != *announced {
            let (announced, given) = (described(announced), described(&staged.digest));
            return Err(Refusal::Corrupt { announced, given }.into());
        }
        Ok(staged)
    }
}

#[tonic::async_trait]
impl v1::artifacts_server::Artifacts for Artifacts {
    async fn find_missing(
        &self,
        request: Request<v1::FindMissingRequest>,
    ) -> Result<Response<v1::FindMissingResponse>, Status> {
        let files = request.into_inner().files;
        if files.len() > MAX_QUERY {
            let message = format!("has {} entries; it must have at most {MAX_QUERY}", files.len());
            return Err(Refusal::from(FieldError::new("files", message)).into());
        }
        for (index, file) in files.iter().enumerate() {
            check_digest(&format!("files[{index}]"), Some(file)).map_err(Refusal::from)?;
        }
        let missing = self.store.find_missing(files).await.map_err(Refusal::from)?;
        Ok(Response::new(v1::FindMissingResponse { missing }))
    }

    async fn upload(
        &self,
        request: Request<Streaming<v1::UploadRequest>>,
    ) -> Result<Response<v1::UploadResponse>, Status> {
        let mut messages = request.into_inner();
        let Some(upload_request::Kind::Header(header)) = next(&mut messages).await? else {
            return Err(Refusal::from(FieldError::new(
                "header",
                "is missing; the first message of an upload must have it".into(),
            ))
            .into());
        };
        let v1::UploadHeader { digest, artifact } = header;
        let digest = check_digest("header.digest", digest.as_ref()).map_err(Refusal::from)?;
        let Some(artifact) = artifact else {
            if digest.size > self.limit {
                return Err(Refusal::TooLarge { size: digest.size, limit: self.limit }.into());
            }
            let staged = self.receive(&mut messages, digest).await?;
            self.store.commit_input(staged).await.map_err(Refusal::from)?;
            return Ok(Response::new(v1::UploadResponse {}));
        };
        // The size of an artifact follows from its job, so it is accepted only from the members of
        // the job's group, before it is received and, as the group may change, after that.
        check_artifact(&artifact).map_err(Refusal::from)?;
        let refused = |refusal| artifact_refusal(refusal, &artifact);
        self.store.check_artifact(&artifact).await.map_err(Refusal::from)?.map_err(refused)?;
        let staged = self.receive(&mut messages, digest).await?;
        self.store.commit_artifact(&artifact, staged).await.map_err(Refusal::from)?.map_err(refused)?;
        Ok(Response::new(v1::UploadResponse {}))
    }

    type DownloadStream = BoxStream<'static, Result<v1::DownloadResponse, Status>>;

    async fn download(
        &self,
        request: Request<v1::DownloadRequest>,
    ) -> Result<Response<Self::DownloadStream>, Status> {
        let v1::DownloadRequest { source, offset } = request.into_inner();
        let digest = match source {
            Some(download_request::Source::Sha256(sha256)) => {
                let asked = v1::FileDigest { size: 0, sha256 };
                check_digest("sha256", Some(&asked)).map_err(Refusal::from)?;
                let found = self.store.object_digest(&asked.sha256).await.map_err(Refusal::from)?;
                found.ok_or_else(|| Refusal::NoFile(format!("file with SHA-256 {}", asked.hex())))?
            }
            Some(download_request::Source::Result(v1::ResultFile { job_id, name })) => {
                let found = self.store.result_file(&job_id, &name).await.map_err(Refusal::from)?;
                found.ok_or_else(|| Refusal::NoFile(format!("{name:?} in a result of job {job_id:?}")))?
            }
            None => return Err(Refusal::from(FieldError::new("source", "is missing".into())).into()),
        };
        if offset > digest.size {
            return Err(Refusal::PastEnd { offset, size: digest.size }.into());
        }
        let path = self.store.object_path(&digest.sha256).unwrap_or_default();
        let io = |source| Refusal::from(StoreError::Io { path: path.clone(), source });
        let mut file = File::open(&path).await.map_err(io)?;
        file.seek(SeekFrom::Start(offset)).await.map_err(io)?;
        Ok(Response::new(read_out(file, path, digest)))
    }
}

/// Streams the chunks of a file, then its digest.
fn read_out(
    file: File,
    path: PathBuf,
    digest: v1::FileDigest,
) -> BoxStream<'static, Result<v1::DownloadResponse, Status>> {
    let message = |kind| Ok(v1::DownloadResponse { kind: Some(kind) });
    stream::unfold(Some((file, digest)), move |state| {
        let path = path.clone();
        async move {
            let (file, digest) = state?;
            let mut chunk = Vec::with_capacity(CHUNK_BYTES);
            let mut piece = file.take(CHUNK_BYTES as u64);
            match piece.read_to_end(&mut chunk).await {
                Err(source) => Some((Err(Refusal::from(StoreError::Io { path, source }).into()), None)),
                Ok(0) => Some((message(download_response::Kind::Trailer(digest)), None)),
                Ok(_) => {
                    Some((message(download_response::Kind::Chunk(chunk)), Some((piece.into_inner(), digest))))
                }
            }
        }
    })
    .boxed()
}

async fn next(messages: &mut Streaming<v1::UploadRequest>) -> Result<Option<upload_request::Kind>, Status> {
    let message = timeout(STALL_TIMEOUT, messages.message())
        .await
        .map_err(|_| Status::deadline_exceeded(format!("the upload sent nothing for {STALL_TIMEOUT:?}")))??;
    match message {
        None => Ok(None),
        Some(v1::UploadRequest { kind: Some(kind) }) => Ok(Some(kind)),
        Some(_) => Err(Refusal::from(FieldError::new("kind", "is missing".into())).into()),
    }
}

fn check_artifact(artifact: &v1::JobArtifact) -> Result<(), FieldError> {
    match &artifact.name {
        None => Err(FieldError::new("header.artifact.name", "is missing".into())),
        Some(job_artifact::Name::CheckpointStep(_)) => Ok(()),
        Some(job_artifact::Name::ResultFile(file))
            if file.len() <= MAX_RESULT_NAME_BYTES && is_file_name(file) =>
        {
            Ok(())
        }
        Some(job_artifact::Name::ResultFile(file)) => {
            let message = format!(
                "{file:?} is not a file name: 1 to {MAX_RESULT_NAME_BYTES} letters, digits, '-', '_' or '.', \
                 not starting with a dot"
            );
            Err(FieldError::new("header.artifact.result_file", message))
        }
    }
}

fn artifact_refusal(refusal: ArtifactRefusal, artifact: &v1::JobArtifact) -> Refusal {
    let job = artifact.job_id.clone();
    match refusal {
        ArtifactRefusal::UnknownJob => Refusal::UnknownJob(job),
        ArtifactRefusal::StaleGeneration { current } => {
            Refusal::StaleGeneration { job, given: artifact.generation, current }
        }
        ArtifactRefusal::NotActive { state } => Refusal::TakesNoFiles { job, state },
    }
}

fn described(digest: &v1::FileDigest) -> String {
    format!("{} bytes with SHA-256 {}", digest.size, digest.hex())
}
