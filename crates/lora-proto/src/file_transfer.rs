//! Uploads to and downloads from the coordinator's store, for clients.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;
use tonic::transport::Channel;

use crate::v1::artifacts_client::ArtifactsClient;
use crate::v1::{self, download_response, upload_request};
use crate::{CHUNK_BYTES, MAX_MESSAGE_BYTES, PartialFile};

/// Time without progress after which a transfer fails.
const STALL_TIMEOUT: Duration = Duration::from_secs(60);
/// Number of chunks of an upload that may wait to be sent.
const UPLOAD_QUEUE_CHUNKS: usize = 4;

/// An error of a transfer.
#[derive(Debug, thiserror::Error)]
pub enum TransferError {
    /// The coordinator refused the call, or could not be reached.
    #[error("{}", .0.message())]
    Refused(Box<Status>),
    /// The local file cannot be read or written.
    #[error("{path}: {source}", path = path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The reason.
        source: io::Error,
    },
    /// The transfer made no progress for a minute.
    #[error("the transfer made no progress for {STALL_TIMEOUT:?}")]
    Stalled,
    /// The received bytes do not match the digest that the coordinator sent.
    #[error("the received file is corrupt; try again")]
    Corrupt,
}

impl From<Status> for TransferError {
    fn from(status: Status) -> Self {
        Self::Refused(Box::new(status))
    }
}

impl TransferError {
    /// Returns whether the same transfer may succeed later, for example after a lost connection or
    /// while the coordinator is not running.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Refused(status) => matches!(
                status.code(),
                tonic::Code::Unavailable
                    | tonic::Code::Unknown
                    | tonic::Code::Cancelled
                    | tonic::Code::DeadlineExceeded
            ),
            Self::Stalled | Self::Corrupt => true,
            Self::Io { .. } => false,
        }
    }
}

/// Creates a client of the service `Artifacts` over `channel`.
pub fn artifacts(channel: Channel) -> ArtifactsClient<Channel> {
    ArtifactsClient::new(channel).max_decoding_message_size(MAX_MESSAGE_BYTES)
}

/// Uploads the bytes of `content`. Calls `sent` with the number of bytes so far.
///
/// # Errors
/// The coordinator refuses the upload, the connection is lost or stalls, or `content` cannot be
/// read; the last error names `path`.
pub async fn upload(
    channel: Channel,
    header: v1::UploadHeader,
    mut content: impl AsyncRead + Unpin,
    path: &Path,
    mut sent: impl FnMut(u64),
) -> Result<(), TransferError> {
    let (messages, stream) = mpsc::channel(UPLOAD_QUEUE_CHUNKS);
    let mut client = artifacts(channel);
    let call = client.upload(ReceiverStream::new(stream));
    let feed = async move {
        let message = |kind| v1::UploadRequest { kind: Some(kind) };
        let mut kind = upload_request::Kind::Header(header);
        let mut bytes = 0;
        loop {
            // If the call has ended, it accepts no more chunks, and its result has the reason.
            if timeout(STALL_TIMEOUT, messages.send(message(kind)))
                .await
                .map_err(|_| TransferError::Stalled)?
                .is_err()
            {
                return Ok::<_, TransferError>(());
            }
            let mut chunk = Vec::with_capacity(CHUNK_BYTES);
            let read = (&mut content).take(CHUNK_BYTES as u64).read_to_end(&mut chunk).await;
            let io = |source| TransferError::Io { path: path.to_owned(), source };
            if read.map_err(io)? == 0 {
                return Ok(());
            }
            bytes += chunk.len() as u64;
            sent(bytes);
            kind = upload_request::Kind::Chunk(chunk);
        }
    };
    let mut call = std::pin::pin!(call);
    tokio::select! {
        answer = &mut call => { answer?; }
        fed = feed => {
            fed?;
            timeout(STALL_TIMEOUT, call).await.map_err(|_| TransferError::Stalled)??;
        }
    }
    Ok(())
}

/// Downloads a file to `path`, and continues an earlier partial download. On success the file is
/// complete, and its digest is correct. Calls `received` with the number of bytes so far. Empties
/// the file if it is corrupt.
///
/// # Errors
/// The coordinator refuses the download, the connection is lost or stalls (the next call continues
/// the download), the file cannot be written, or it is corrupt.
pub async fn download(
    channel: Channel,
    source: v1::download_request::Source,
    path: &Path,
    mut received: impl FnMut(u64),
) -> Result<v1::FileDigest, TransferError> {
    let io = |source| TransferError::Io { path: path.to_owned(), source };
    let mut file = PartialFile::open(path).await.map_err(io)?;
    let request = v1::DownloadRequest { source: Some(source), offset: file.size() };
    let answer = timeout(STALL_TIMEOUT, artifacts(channel).download(request)).await;
    let mut messages = match answer.map_err(|_| TransferError::Stalled)? {
        Ok(answer) => answer.into_inner(),
        // The local file is longer than the file in the store, so it is another file.
        Err(status) if status.code() == tonic::Code::OutOfRange => {
            file.restart().await.map_err(io)?;
            return Err(TransferError::Corrupt);
        }
        Err(status) => return Err(status.into()),
    };
    loop {
        let message =
            timeout(STALL_TIMEOUT, messages.message()).await.map_err(|_| TransferError::Stalled)??;
        match message.and_then(|message| message.kind) {
            Some(download_response::Kind::Chunk(chunk)) => {
                file.write(&chunk).await.map_err(io)?;
                received(file.size());
            }
            Some(download_response::Kind::Trailer(whole)) => {
                if file.digest() != whole {
                    file.restart().await.map_err(io)?;
                    return Err(TransferError::Corrupt);
                }
                file.sync().await.map_err(io)?;
                return Ok(whole);
            }
            None => return Err(Status::unavailable("the download ended too early").into()),
        }
    }
}
