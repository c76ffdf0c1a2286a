//! Files to and from the coordinator.

use std::time::Duration;

use lora_proto::v1::artifacts_client::ArtifactsClient;
use lora_proto::v1::{self, artifact_name, download_response, upload_request};
use lora_proto::{CHUNK_BYTES, DigestBuilder, MAX_MESSAGE_BYTES};
use tokio::time::timeout;
use tonic::transport::Channel;

/// The most time one file may take.
const TRANSFER: Duration = Duration::from_secs(600);

/// A transfer that failed: which file, and why.
#[derive(Debug, thiserror::Error)]
#[error("{file}: {cause}")]
pub(crate) struct TransferError {
    file: String,
    cause: String,
}

/// Uploads a file of the assignment's job.
pub(crate) async fn upload(
    channel: Channel,
    assignment: &v1::Assignment,
    name: artifact_name::Name,
    bytes: Vec<u8>,
) -> Result<(), TransferError> {
    let file = format!("upload of {}", described(&name));
    let header = v1::UploadHeader {
        job_id: assignment.job_id.clone(),
        generation: assignment.generation,
        name: Some(v1::ArtifactName { name: Some(name) }),
        digest: Some(DigestBuilder::of(&bytes)),
    };
    let chunks = (0..bytes.len()).step_by(CHUNK_BYTES).map(move |start| {
        let end = bytes.len().min(start + CHUNK_BYTES);
        upload_request::Kind::Chunk(bytes[start..end].to_vec())
    });
    let messages = std::iter::once(upload_request::Kind::Header(header)).chain(chunks);
    let messages = messages.map(|kind| v1::UploadRequest { kind: Some(kind) });
    let mut client = ArtifactsClient::new(channel);
    let sent = timeout(TRANSFER, client.upload(tokio_stream::iter(messages))).await;
    match sent {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(status)) => Err(TransferError { file, cause: status.message().to_owned() }),
        Err(_) => Err(TransferError { file, cause: format!("took longer than {TRANSFER:?}") }),
    }
}

/// Downloads the checkpoint after `step` steps.
pub(crate) async fn download_checkpoint(
    channel: Channel,
    job_id: &str,
    step: u64,
) -> Result<Vec<u8>, TransferError> {
    let name = artifact_name::Name::CheckpointStep(step);
    let file = format!("download of {}", described(&name));
    let request =
        v1::DownloadRequest { job_id: job_id.to_owned(), name: Some(v1::ArtifactName { name: Some(name) }) };
    let client = ArtifactsClient::new(channel).max_decoding_message_size(MAX_MESSAGE_BYTES);
    match timeout(TRANSFER, receive(client, request)).await {
        Ok(Ok(bytes)) => Ok(bytes),
        Ok(Err(cause)) => Err(TransferError { file, cause }),
        Err(_) => Err(TransferError { file, cause: format!("took longer than {TRANSFER:?}") }),
    }
}

async fn receive(
    mut client: ArtifactsClient<Channel>,
    request: v1::DownloadRequest,
) -> Result<Vec<u8>, String> {
    let told = |status: tonic::Status| status.message().to_owned();
    let mut messages = client.download(request).await.map_err(told)?.into_inner();
    let mut bytes = Vec::new();
    while let Some(message) = messages.message().await.map_err(told)? {
        match message.kind {
            Some(download_response::Kind::Chunk(chunk)) => bytes.extend_from_slice(&chunk),
            Some(download_response::Kind::Trailer(digest)) if digest == DigestBuilder::of(&bytes) => {
                return Ok(bytes);
            }
            Some(download_response::Kind::Trailer(_)) | None => break,
        }
    }
    Err("it arrived damaged".into())
}

fn described(name: &artifact_name::Name) -> String {
    match name {
        artifact_name::Name::CheckpointStep(step) => format!("the checkpoint of step {step}"),
        artifact_name::Name::ResultFile(file) => file.clone(),
    }
}
