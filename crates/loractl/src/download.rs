//! Download of a job's result into a directory.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use backon::BackoffBuilder;
use indicatif::ProgressBar;
use lora_proto::DigestBuilder;
use lora_proto::file_name::{MAX_RESULT_NAME_BYTES, is_file_name};
use lora_proto::file_transfer::{TransferError, download};
use lora_proto::v1::{self, download_request};
use lora_spec::file_names::RECEIPT;
use tokio::time::sleep;

use crate::client::{Client, MAX_RETRIES, delays};
use crate::output::bytes;
use crate::submit::bytes_bar;

/// Downloads the result of `job` into `dir`. Result files that already exist there with the same
/// contents are skipped. An interrupted download continues where it stopped.
///
/// # Errors
/// A file of the same name with other contents exists and is not named in `replaceable`, or the
/// download failed.
pub(crate) async fn download_result(
    client: &Client,
    job: &v1::Job,
    dir: &Path,
    replaceable: &[&str],
) -> Result<()> {
    let files = pending_downloads(job, dir, replaceable)?;
    fs::create_dir_all(dir).with_context(|| dir.display().to_string())?;
    let bar = bytes_bar(files.iter().map(|file| file.digest.size).sum());
    if bar.is_hidden() && !files.is_empty() {
        let size = bar.length().unwrap_or_default();
        let (missing, all) = (files.len(), job.result.len());
        let rest = if missing < all { "; the rest is already there" } else { "" };
        eprintln!("downloading {missing} of {all} result files ({}) to {}{rest}", bytes(size), dir.display());
    }
    for file in &files {
        bar.set_message(file.name.clone());
        if file.name == RECEIPT {
            sync(dir)?;
        }
        let before = bar.position();
        fetch(client, job, file, &bar, before).await?;
        bar.set_position(before + file.digest.size);
    }
    sync(dir)?;
    bar.finish_and_clear();
    Ok(())
}

/// A result file that the directory does not have yet.
struct PendingDownload {
    name: String,
    digest: v1::FileDigest,
    path: PathBuf,
}

/// Checks all files before any is written. Returns those to download, with the receipt last.
fn pending_downloads(job: &v1::Job, dir: &Path, replaceable: &[&str]) -> Result<Vec<PendingDownload>> {
    if dir.symlink_metadata().is_ok() && !dir.is_dir() {
        bail!("{} already exists and is not a directory; choose another one", dir.display());
    }
    let mut pending = Vec::new();
    for file in &job.result {
        let name = &file.name;
        if name.len() > MAX_RESULT_NAME_BYTES || !is_file_name(name) {
            bail!("the coordinator has a result file named {name:?}, which is not a file name");
        }
        let digest = file.digest.clone().with_context(|| format!("the coordinator has no hash of {name}"))?;
        let path = dir.join(name);
        if path.symlink_metadata().is_ok() {
            let found = DigestBuilder::of_file(&path).with_context(|| path.display().to_string())?;
            if found == digest {
                continue;
            }
            if !replaceable.contains(&name.as_str()) {
                bail!("{} already exists with other contents; choose another directory", path.display());
            }
        }
        pending.push(PendingDownload { name: name.clone(), digest, path });
    }
    pending.sort_by_key(|file| file.name == RECEIPT);
    Ok(pending)
}

/// Downloads into `<name>.part`, which is renamed once it is complete and has the right hash.
async fn fetch(
    client: &Client,
    job: &v1::Job,
    file: &PendingDownload,
    bar: &ProgressBar,
    before: u64,
) -> Result<()> {
    let part = file.path.with_file_name(format!("{}.part", file.name));
    let source = v1::ResultFile { job_id: job.job_id.clone(), name: file.name.clone() };
    let retry_delays = || delays().with_max_times(MAX_RETRIES).build();
    let mut left = retry_delays();
    let mut was_corrupt = false;
    let found = loop {
        let mut progress = false;
        let source = download_request::Source::Result(source.clone());
        let attempt = download(client.channel(), source, &part, |received| {
            progress = true;
            bar.set_position(before + received);
        });
        match attempt.await {
            Ok(found) => break found,
            // An earlier attempt may have left a part of another file. The next attempt starts from
            // the beginning, so it cannot be corrupt for this reason.
            Err(TransferError::Corrupt) if !was_corrupt => was_corrupt = true,
            Err(error) if error.is_transient() && !matches!(error, TransferError::Corrupt) => {
                if progress {
                    left = retry_delays();
                }
                match left.next() {
                    Some(delay) => sleep(delay).await,
                    None => return Err(client.transfer_error(error, &file.name)),
                }
            }
            Err(error) => return Err(client.transfer_error(error, &file.name)),
        }
    };
    if found != file.digest {
        // A later attempt would continue this file, and fail in the same way.
        fs::remove_file(&part).with_context(|| part.display().to_string())?;
        bail!("{}: the coordinator sent a file whose hash is not that of the job's result", file.name);
    }
    fs::rename(&part, &file.path).with_context(|| file.path.display().to_string())
}

/// Flushes the directory to disk, which makes earlier renames in it durable.
fn sync(dir: &Path) -> Result<()> {
    File::open(dir).and_then(|dir| dir.sync_all()).with_context(|| dir.display().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::CallError;
    use crate::fake_coordinator::FakeCoordinator;

    /// A coordinator with a result of two files, of which the receipt is the first.
    async fn result() -> (FakeCoordinator, v1::Job, Vec<u8>) {
        let fake = FakeCoordinator::serve(Vec::new()).await;
        let weights: Vec<u8> = (0..10_500_u32).map(|i| (i * 7 % 251) as u8).collect();
        let file = |name: &str, digest| v1::StoredFile { name: name.into(), digest: Some(digest) };
        let result = vec![
            file(RECEIPT, fake.store.add_result(RECEIPT, b"{}")),
            file("weights.bin", fake.store.add_result("weights.bin", &weights)),
        ];
        let job = v1::Job { job_id: "j".into(), state: "succeeded".into(), result, ..v1::Job::default() };
        (fake, job, weights)
    }

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(dir)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[tokio::test]
    async fn an_interrupted_download_resumes() {
        let (fake, job, weights) = result().await;
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path().join("new/out");
        fake.store.break_downloads_after(&[3000, 0, 4000]);
        download_result(&fake.client().await, &job, &dir, &[]).await.unwrap();
        assert_eq!(fake.store.offsets(), [0, 3000, 3000, 7000, 0]);
        assert_eq!(fs::read(dir.join("weights.bin")).unwrap(), weights);
        assert_eq!(names(&dir), [RECEIPT, "weights.bin"]);
        download_result(&fake.client().await, &job, &dir, &[]).await.unwrap();
        assert_eq!(fake.store.offsets().len(), 5, "all files exist");
    }

    #[tokio::test]
    async fn another_process_resumes_an_earlier_download() {
        let (fake, job, weights) = result().await;
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("weights.bin.part"), &weights[..5000]).unwrap();
        download_result(&fake.client().await, &job, dir.path(), &[]).await.unwrap();
        assert_eq!(fake.store.offsets(), [5000, 0]);
        assert_eq!(fs::read(dir.path().join("weights.bin")).unwrap(), weights);
    }

    #[tokio::test]
    async fn a_corrupt_partial_file_is_fetched_again() {
        for left in [vec![9; 5000], vec![9; 50_000]] {
            let (fake, job, weights) = result().await;
            let dir = tempfile::tempdir().unwrap();
            fs::write(dir.path().join("weights.bin.part"), left).unwrap();
            download_result(&fake.client().await, &job, dir.path(), &[]).await.unwrap();
            assert_eq!(fs::read(dir.path().join("weights.bin")).unwrap(), weights);
        }
    }

    #[tokio::test]
    async fn an_incomplete_download_has_no_receipt() {
        let (fake, job, _) = result().await;
        let dir = tempfile::tempdir().unwrap();
        fake.store.break_downloads_after(&[0; 100]);
        let error = download_result(&fake.client().await, &job, dir.path(), &[]).await.unwrap_err();
        assert!(matches!(error.downcast_ref(), Some(CallError::Unreachable { .. })), "{error:#}");
        assert_eq!(names(dir.path()), ["weights.bin.part"]);
    }

    #[tokio::test]
    async fn other_files_are_not_overwritten() {
        let (fake, job, weights) = result().await;
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("weights.bin"), "theirs").unwrap();
        let client = fake.client().await;
        let error = download_result(&client, &job, dir.path(), &[]).await.unwrap_err().to_string();
        assert!(error.contains("weights.bin already exists with other contents"), "{error}");
        assert_eq!((names(dir.path()), fake.store.offsets().len()), (vec!["weights.bin".to_owned()], 0));
        download_result(&client, &job, dir.path(), &["weights.bin"]).await.unwrap();
        assert_eq!(fs::read(dir.path().join("weights.bin")).unwrap(), weights);
        let file = dir.path().join("weights.bin");
        let error = download_result(&client, &job, &file, &[]).await.unwrap_err().to_string();
        assert!(error.contains("is not a directory"), "{error}");
    }

    #[tokio::test]
    async fn a_file_with_another_hash_than_the_job_announces_is_not_kept() {
        let (fake, mut job, _) = result().await;
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path().join("out");
        let digest = job.result[1].digest.as_mut().unwrap();
        digest.sha256 = DigestBuilder::of_bytes(b"another file").sha256;
        let error = download_result(&fake.client().await, &job, &dir, &[]).await.unwrap_err().to_string();
        assert!(error.contains("weights.bin: the coordinator sent a file whose hash"), "{error}");
        assert_eq!(names(&dir), [""; 0]);
    }

    #[tokio::test]
    async fn path_traversal_is_rejected() {
        let (fake, mut job, _) = result().await;
        let dir = tempfile::tempdir().unwrap();
        for name in ["../x", "/x", "", ".x", "a b"] {
            job.result[0].name = name.into();
            let error = download_result(&fake.client().await, &job, dir.path(), &[]).await.unwrap_err();
            assert!(error.to_string().contains("not a file name"), "{name}: {error}");
        }
    }
}
