//! The connection to a coordinator, and the errors of its calls.

use std::error::Error;
use std::future::Future;
use std::io;
use std::time::Duration;

use anyhow::{Context, Result};
use backon::ExponentialBuilder;
use lora_proto::MAX_MESSAGE_BYTES;
use lora_proto::file_transfer::TransferError;
use lora_proto::v1;
use lora_proto::v1::artifacts_client::ArtifactsClient;
use lora_proto::v1::fine_tuning_client::FineTuningClient;
use lora_spec::{FieldError, JobFile};
use tokio::time::timeout;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Response, Status};
use tonic_types::StatusExt;

/// Time limit for opening a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Time limit for an answer.
pub(crate) const CALL_TIMEOUT: Duration = Duration::from_secs(30);
/// Interval of keep-alive pings on a connection; without an answer within the timeout, the
/// connection is closed.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(20);
/// Maximum number of retries of a call or transfer that may be repeated.
pub(crate) const MAX_RETRIES: usize = 8;

/// The reason why a call failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CallError {
    /// There is no coordinator at this address, or it cannot be reached.
    #[error(
        "no coordinator at {address}: {cause}; start one (lora-coordinator), or give its address with \
         --coordinator"
    )]
    Unreachable { address: String, cause: String },
    /// The coordinator refused the call.
    #[error("{}", refusal(.0))]
    Refused(Box<Status>),
}

/// The client of a coordinator.
#[derive(Debug, Clone)]
pub(crate) struct Client {
    address: String,
    channel: Channel,
}

impl Client {
    /// Connects to the coordinator at `address`, which has the form `http://host:port`.
    pub(crate) async fn connect(address: &str) -> Result<Self> {
        let endpoint = Endpoint::from_shared(address.to_owned())
            .with_context(|| format!("{address} is not an address"))?
            .connect_timeout(CONNECT_TIMEOUT)
            .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
            .keep_alive_timeout(KEEPALIVE_TIMEOUT);
        let channel = endpoint.connect().await;
        let channel = channel.map_err(|error| unreachable(address, innermost(&error)))?;
        Ok(Self { address: address.to_owned(), channel })
    }

    /// The service for jobs.
    pub(crate) fn jobs(&self) -> FineTuningClient<Channel> {
        FineTuningClient::new(self.channel.clone()).max_decoding_message_size(MAX_MESSAGE_BYTES)
    }

    /// The service for files.
    pub(crate) fn artifacts(&self) -> ArtifactsClient<Channel> {
        lora_proto::file_transfer::artifacts(self.channel.clone())
    }

    /// The connection. It reconnects by itself after it was lost.
    pub(crate) fn channel(&self) -> Channel {
        self.channel.clone()
    }

    /// Waits for the answer of a call, at most [`CALL_TIMEOUT`].
    pub(crate) async fn call<T>(
        &self,
        call: impl Future<Output = Result<Response<T>, Status>>,
    ) -> Result<T, CallError> {
        match timeout(CALL_TIMEOUT, call).await {
            Ok(Ok(answer)) => Ok(answer.into_inner()),
            Ok(Err(status)) => Err(self.error(status)),
            Err(_) => Err(unreachable(&self.address, format!("no answer within {CALL_TIMEOUT:?}"))),
        }
    }

    /// Returns the job with this id.
    pub(crate) async fn job(&self, job_id: &str) -> Result<v1::Job, CallError> {
        let request = v1::GetJobRequest { job_id: job_id.to_owned() };
        self.call(self.jobs().get_job(request)).await
    }

    /// Returns the error for `status`.
    pub(crate) fn error(&self, status: Status) -> CallError {
        if is_transient(&status) {
            unreachable(&self.address, cause(&status))
        } else {
            CallError::Refused(Box::new(status))
        }
    }

    /// Returns the error for a failed transfer of the file `name`.
    pub(crate) fn transfer_error(&self, error: TransferError, name: &str) -> anyhow::Error {
        match error {
            TransferError::Refused(status) => {
                anyhow::Error::from(self.error(*status)).context(name.to_owned())
            }
            TransferError::Stalled => {
                let stalled = unreachable(&self.address, error.to_string());
                anyhow::Error::from(stalled).context(name.to_owned())
            }
            TransferError::Io { .. } => error.into(),
            TransferError::Corrupt => anyhow::Error::from(error).context(name.to_owned()),
        }
    }
}

/// Returns the delays before retries.
pub(crate) fn delays() -> ExponentialBuilder {
    // Short delays keep the tests fast.
    let first = if cfg!(test) { 1 } else { 100 };
    ExponentialBuilder::new()
        .with_min_delay(Duration::from_millis(first))
        .with_max_delay(Duration::from_secs(5))
        .with_jitter()
}

/// Whether the same call may succeed later, because the connection broke or the coordinator is
/// unreachable.
pub(crate) fn is_transient(status: &Status) -> bool {
    match status.code() {
        Code::Unavailable | Code::Cancelled | Code::DeadlineExceeded => true,
        // A status with a source was made by this client, for a connection that broke during the
        // call.
        Code::Unknown | Code::Internal => status.source().is_some(),
        _ => false,
    }
}

/// Returns the cause of a failed connection as text.
pub(crate) fn cause(status: &Status) -> String {
    match status.source() {
        Some(source) => innermost(source),
        None => status.message().to_owned(),
    }
}

/// Converts a refusal of the job of `file`. If the refusal is about a setting, the error has file
/// and line.
pub(crate) fn located(error: CallError, file: &JobFile) -> anyhow::Error {
    let CallError::Refused(status) = &error else { return error.into() };
    let Some(request) = status.get_details_bad_request() else { return error.into() };
    let known = lora_spec::known_keys();
    let texts: Vec<String> = request
        .field_violations
        .iter()
        .map(|violation| {
            let field = FieldError::new(&violation.field, violation.description.clone());
            if known.iter().any(|(key, _)| *key == violation.field) {
                file.locate(field).to_string()
            } else {
                field.to_string()
            }
        })
        .collect();
    if texts.is_empty() { error.into() } else { anyhow::anyhow!(texts.join("; ")) }
}

/// Formats a refusal: the fields that it names, or else its message.
fn refusal(status: &Status) -> String {
    let violations =
        status.get_details_bad_request().map(|request| request.field_violations).unwrap_or_default();
    let fields: Vec<String> = violations
        .iter()
        // A field is added only if the message does not already have its description.
        .filter(|violation| !status.message().contains(&violation.description))
        .map(|violation| format!("{}: {}", violation.field, violation.description))
        .collect();
    if fields.is_empty() { status.message().to_owned() } else { fields.join("; ") }
}

fn unreachable(address: &str, cause: String) -> CallError {
    CallError::Unreachable { address: address.to_owned(), cause }
}

/// Formats the innermost error of a chain.
fn innermost(error: &(dyn Error + 'static)) -> String {
    let mut error = error;
    while let Some(source) = error.source() {
        error = source;
    }
    match error.downcast_ref::<io::Error>().map(io::Error::kind) {
        Some(io::ErrorKind::ConnectionRefused) => "connection refused".into(),
        Some(io::ErrorKind::TimedOut) => "no answer".into(),
        Some(io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset) => "the connection broke".into(),
        _ => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::path::Path;

    use tonic_types::ErrorDetails;

    use super::*;

    fn refused(field: &str, description: &str) -> CallError {
        let mut details = ErrorDetails::new();
        details.set_error_info("INVALID_FIELD", "lora.v1", HashMap::new());
        details.add_bad_request_violation(field, description);
        let status =
            Status::with_error_details(Code::InvalidArgument, format!("{field}: {description}"), details);
        CallError::Refused(Box::new(status))
    }

    #[test]
    fn a_refused_setting_has_the_line_of_the_job_file() {
        let text =
            "name: a\nmodel: {base: b}\ndata:\n  train: t.jsonl\ntraining:\n  seed: 1\n  eval_steps: 9\n";
        let file = JobFile::parse(text, Path::new("/jobs/job.yaml")).unwrap();
        let error = located(refused("training.eval_steps", "is 9"), &file).to_string();
        assert_eq!(error, "/jobs/job.yaml:7: training.eval_steps: is 9");
        let error = located(refused("inputs.train.name", "is not a file name"), &file).to_string();
        assert_eq!(error, "inputs.train.name: is not a file name");
        let plain = CallError::Refused(Box::new(Status::not_found("job \"x\" does not exist")));
        assert_eq!(located(plain, &file).to_string(), "job \"x\" does not exist");
    }

    #[test]
    fn a_refusal_without_a_message_still_names_the_field() {
        let mut details = ErrorDetails::new();
        details.add_bad_request_violation("priority", "is 101; at most 100 is possible");
        let status = Status::with_error_details(Code::InvalidArgument, "bad request", details);
        let error = CallError::Refused(Box::new(status)).to_string();
        assert_eq!(error, "priority: is 101; at most 100 is possible");
        assert_eq!(refused("priority", "is 101").to_string(), "priority: is 101");
    }

    #[tokio::test]
    async fn an_unreachable_coordinator_is_named_with_a_fix() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        drop(listener);
        let error = Client::connect(&address).await.unwrap_err();
        assert!(matches!(error.downcast_ref(), Some(CallError::Unreachable { .. })));
        assert_eq!(
            error.to_string(),
            format!(
                "no coordinator at {address}: connection refused; start one (lora-coordinator), or give \
                 its address with --coordinator"
            )
        );
    }

    #[test]
    fn only_connection_errors_are_transient() {
        for (status, transient) in [
            (Status::unavailable("shutting down"), true),
            (Status::from_error(Box::new(io::Error::from(io::ErrorKind::BrokenPipe))), true),
            (Status::internal("the store failed"), false),
            (Status::not_found("no job"), false),
            (Status::out_of_range("event 1"), false),
        ] {
            assert_eq!(is_transient(&status), transient, "{status:?}");
        }
    }
}
