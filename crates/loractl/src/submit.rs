//! Submission of a job: first the files that it reads are uploaded, then the job is sent.

use std::collections::HashSet;

use anyhow::Result;
use backon::Retryable;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use lora_proto::file_transfer::{TransferError, upload};
use lora_proto::v1;
use lora_spec::{JobFile, JobSpec};
use tokio::fs::File;
use tonic::Code;

use crate::client::{CallError, Client, MAX_RETRIES, delays, located};
use crate::job_upload::{JobUpload, LocalFile};
use crate::output::bytes;

/// Maximum number of files in one query for missing files; the limit of the protocol.
const MAX_FILES_PER_QUERY: usize = 4096;

/// Options of a submission that are not part of the job.
#[derive(Debug, Clone)]
pub(crate) struct SubmitOptions {
    /// A repeated submission with the same key returns the same job.
    pub(crate) idempotency_key: String,
    pub(crate) priority: i32,
}

/// Uploads the files of `inputs` that the store does not have, and submits the job of `file`.
pub(crate) async fn submit(
    client: &Client,
    file: &JobFile,
    inputs: &JobUpload,
    options: &SubmitOptions,
) -> Result<v1::Job> {
    upload_missing(client, inputs.files()).await?;
    let request = v1::SubmitJobRequest {
        idempotency_key: options.idempotency_key.clone(),
        job: Some(message(file, &file.job)?),
        inputs: Some(inputs.message()),
        priority: options.priority,
    };
    // The idempotency key makes a second submission of the same job harmless.
    let call = || async { client.call(client.jobs().submit_job(request.clone())).await };
    let submitted = call
        .retry(delays().with_max_times(MAX_RETRIES))
        .when(|error| matches!(error, CallError::Unreachable { .. }));
    submitted.await.map_err(|error| located(error, file))
}

/// Returns the settings as a message of the protocol.
fn message(file: &JobFile, job: &JobSpec) -> Result<v1::JobSpec> {
    Ok(v1::JobSpec::try_from(job).map_err(|error| file.locate(error))?)
}

/// Returns a progress bar of bytes on stderr, which is hidden if stderr is not a terminal.
pub(crate) fn bytes_bar(total: u64) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr());
    let template = "{bar:30} {bytes}/{total_bytes}  {bytes_per_sec}  {eta} left  {wide_msg}";
    bar.set_style(ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar
}

/// Returns a bar on stderr with the file that is being hashed and the number of hashed bytes. The
/// bar is hidden if stderr is not a terminal.
pub(crate) fn hashing_bar() -> ProgressBar {
    let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
    let style = ProgressStyle::with_template("{spinner} {wide_msg} {bytes}");
    bar.with_style(style.unwrap_or_else(|_| ProgressStyle::default_spinner()))
}

async fn upload_missing(client: &Client, files: &[LocalFile]) -> Result<()> {
    let missing = missing(client, files).await?;
    if missing.is_empty() {
        return Ok(());
    }
    let total = missing.iter().map(|file| size(file)).sum();
    let bar = bytes_bar(total);
    if bar.is_hidden() {
        eprintln!("uploading {} of {} files ({})", missing.len(), files.len(), bytes(total));
    }
    for file in missing {
        bar.set_message(file.stored.name.clone());
        let before = bar.position();
        let attempt = || upload_file(client, file, &bar, before);
        let uploaded =
            attempt.retry(delays().with_max_times(MAX_RETRIES)).when(TransferError::is_transient).await;
        uploaded.map_err(|error| failed(client, file, error))?;
        bar.set_position(before + size(file));
    }
    bar.finish_and_clear();
    Ok(())
}

/// Returns the files that the store does not have; files with equal contents only once.
async fn missing<'a>(client: &Client, files: &'a [LocalFile]) -> Result<Vec<&'a LocalFile>> {
    let mut missing = HashSet::new();
    for files in files.chunks(MAX_FILES_PER_QUERY) {
        let files = files.iter().filter_map(|file| file.stored.digest.clone()).collect();
        let answer = client.call(client.artifacts().find_missing(v1::FindMissingRequest { files })).await?;
        missing.extend(answer.missing.into_iter().map(|digest| digest.sha256));
    }
    let mut is_missing =
        |file: &&LocalFile| file.stored.digest.as_ref().is_some_and(|digest| missing.remove(&digest.sha256));
    Ok(files.iter().filter(|file| is_missing(file)).collect())
}

async fn upload_file(
    client: &Client,
    file: &LocalFile,
    bar: &ProgressBar,
    before: u64,
) -> Result<(), TransferError> {
    let io = |source| TransferError::Io { path: file.path.clone(), source };
    let content = File::open(&file.path).await.map_err(io)?;
    let header = v1::UploadHeader { digest: file.stored.digest.clone(), artifact: None };
    upload(client.channel(), header, content, &file.path, |sent| bar.set_position(before + sent)).await
}

fn failed(client: &Client, file: &LocalFile, error: TransferError) -> anyhow::Error {
    let path = file.path.display().to_string();
    match &error {
        TransferError::Refused(status) if status.code() == Code::DataLoss => {
            anyhow::anyhow!("{path} changed while it was uploaded; submit the job again")
        }
        _ => client.transfer_error(error, &path),
    }
}

fn size(file: &LocalFile) -> u64 {
    file.stored.digest.as_ref().map_or(0, |digest| digest.size)
}

/// Returns a random idempotency key, which is different for every submission.
pub(crate) fn random_key() -> String {
    format!("{:032x}", rand::random::<u128>())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use tempfile::TempDir;
    use tonic::Status;

    use super::*;
    use crate::fake_coordinator::FakeCoordinator;
    use crate::job_upload::BaseLocation;

    fn job() -> (TempDir, JobFile, JobUpload) {
        let dir = tempfile::tempdir().unwrap();
        let text = "name: a\nmodel: {base: /base}\ndata: {train: train.jsonl, eval: eval.jsonl}\n";
        std::fs::write(dir.path().join("train.jsonl"), "t".repeat(3 << 20)).unwrap();
        std::fs::write(dir.path().join("eval.jsonl"), "e").unwrap();
        let file = JobFile::parse(text, &dir.path().join("job.yaml")).unwrap();
        let inputs =
            JobUpload::collect(&file, BaseLocation::Path("/base".into()), [], &ProgressBar::hidden())
                .unwrap();
        (dir, file, inputs)
    }

    fn options() -> SubmitOptions {
        SubmitOptions { idempotency_key: "key".into(), priority: 3 }
    }

    #[tokio::test]
    async fn only_missing_files_are_uploaded() {
        let (_dir, file, inputs) = job();
        let fake = FakeCoordinator::serve(Vec::new()).await;
        let client = fake.client().await;
        fake.store.add(b"e");
        let submitted = submit(&client, &file, &inputs, &options()).await.unwrap();
        assert_eq!((submitted.name.as_str(), submitted.state.as_str()), ("a", "validating"));
        let uploads = fake.store.uploads();
        assert!(uploads.len() == 1 && uploads[0].content.len() == 3 << 20);
        let request = &fake.submitted()[0];
        assert_eq!((request.priority, request.inputs.as_ref()), (3, Some(&inputs.message())));
        submit(&client, &file, &inputs, &options()).await.unwrap();
        assert_eq!(fake.store.uploads().len(), 1, "the store has all files");
    }

    #[tokio::test]
    async fn the_same_contents_are_uploaded_once() {
        let (dir, file, _) = job();
        std::fs::copy(dir.path().join("train.jsonl"), dir.path().join("eval.jsonl")).unwrap();
        let inputs =
            JobUpload::collect(&file, BaseLocation::Path("/base".into()), [], &ProgressBar::hidden())
                .unwrap();
        let fake = FakeCoordinator::serve(Vec::new()).await;
        submit(&fake.client().await, &file, &inputs, &options()).await.unwrap();
        assert_eq!(fake.store.uploads().len(), 1);
    }

    #[tokio::test]
    async fn a_lost_submit_response_is_retried_with_the_same_key() {
        let (_dir, file, inputs) = job();
        let fake = FakeCoordinator::serve(Vec::new()).await;
        // Only the answer to the first upload is lost; its second attempt and the other upload
        // succeed.
        fake.store.lose_answers([Status::unavailable("gone")]);
        let client = fake.client().await;
        upload_missing(&client, inputs.files()).await.unwrap();
        assert_eq!(fake.store.uploads().len(), 3, "one of the files twice");
        fake.lose_answers(vec![Status::unavailable("gone"), Status::unavailable("gone")]);
        let job = submit(&client, &file, &inputs, &options()).await.unwrap();
        let keys: Vec<String> = fake.submitted().into_iter().map(|request| request.idempotency_key).collect();
        assert_eq!((keys, job.job_id.as_str()), (vec!["key".to_owned(); 3], "job-key"));
    }

    #[tokio::test]
    async fn a_file_changed_during_upload_is_named() {
        let (dir, file, inputs) = job();
        std::fs::write(dir.path().join("train.jsonl"), "other").unwrap();
        let fake = FakeCoordinator::serve(Vec::new()).await;
        let error = submit(&fake.client().await, &file, &inputs, &options()).await.unwrap_err().to_string();
        assert!(error.contains("train.jsonl changed while it was uploaded"), "{error}");
        assert!(fake.submitted().is_empty());
    }

    #[test]
    fn random_keys_differ() {
        assert_ne!(random_key(), random_key());
        assert_eq!(random_key().len(), 32);
    }

    #[test]
    fn a_non_utf8_path_error_names_its_line() {
        use std::os::unix::ffi::OsStrExt;
        let (_dir, mut file, _) = job();
        file.job.data.train = Path::new(std::ffi::OsStr::from_bytes(b"/\xff.jsonl")).into();
        let error = message(&file, &file.job).unwrap_err().to_string();
        assert!(error.contains("job.yaml:3: data.train:"), "{error}");
    }
}
