//! Bases in object stores.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use futures_util::TryStreamExt;
use futures_util::future::BoxFuture;
use lora_proto::PartialFile;
use object_store::path::Path as Key;
use object_store::{GetOptions, GetRange, ObjectMeta, ObjectStore, ObjectStoreScheme};
use reqwest::Url;
use tokio::time::timeout;

use super::{finish, key, selection};
use crate::fetch::FetchError;
use crate::fetch::cache::CacheDir;
use crate::fetch::source::{FileSet, RemoteFile, Source};

/// How long a listing may take.
const LIST_TIMEOUT: Duration = Duration::from_secs(120);
/// The limit of the wait for a response or its next chunk.
const STALL_TIMEOUT: Duration = Duration::from_secs(60);
/// The largest number of objects in the directory of a base.
const MAX_OBJECTS: usize = 10_000;

/// Defaults that the environment may override. A whole request has practically no time limit,
/// because a file may be large.
const CLIENT_DEFAULTS: [(&str, &str); 3] =
    [("timeout", "7days"), ("connect_timeout", "20s"), ("read_timeout", "60s")];

/// A directory of an object store.
struct ObjectStorePrefix {
    store: Arc<dyn ObjectStore>,
    prefix: Key,
    url: String,
}

/// Returns the files of the base at a URL, whose store has `settings`.
pub(in crate::fetch) async fn file_set(
    parsed: &Url,
    settings: &[(String, String)],
    cache: &CacheDir,
) -> Result<FileSet, FetchError> {
    let url = parsed.as_str().trim_end_matches('/');
    if let Ok((ObjectStoreScheme::Http, _)) = ObjectStoreScheme::parse(parsed) {
        let message = "the files of an https:// server cannot be listed, except S3's and Azure's; upload the \
                       base, or use hf:// or s3://";
        return Err(FetchError::permanent(url, message));
    }
    let settings = settings.iter().map(|(name, value)| (name.as_str(), value.as_str()));
    let (store, prefix) = object_store::parse_url_opts(parsed, CLIENT_DEFAULTS.into_iter().chain(settings))
        .map_err(|error| FetchError::permanent(url, one_line(&error)))?;
    let prefix = ObjectStorePrefix { store: store.into(), prefix, url: url.to_owned() };
    let listing = timeout(LIST_TIMEOUT, prefix.list()).await.map_err(|_| {
        let message =
            format!("its files were not listed within {LIST_TIMEOUT:?}; are the worker's credentials set?");
        FetchError::transient(url, message)
    })??;
    let find = |name: &String| {
        let file = listing.iter().find(|file| file.name == *name).cloned();
        file.ok_or_else(|| FetchError::permanent(url, format!("has no {name}, which its index names")))
    };
    let needed = selection::needed(listing.iter().map(|file| file.name.as_str()));
    let needed = needed.map_err(|message| FetchError::permanent(url, message))?;
    let mut files: Vec<RemoteFile> = needed.iter().map(find).collect::<Result<_, _>>()?;
    let shards = selection::shards(&files, &prefix, cache, url).await?;
    files.extend(shards.iter().map(find).collect::<Result<Vec<_>, _>>()?);
    Ok(FileSet { source: Box::new(prefix), files })
}

impl Source for ObjectStorePrefix {
    fn download<'a>(&'a self, file: &'a RemoteFile, path: &'a Path) -> BoxFuture<'a, Result<(), FetchError>> {
        Box::pin(async move {
            let from = format!("{}/{}", self.url, file.name);
            let mut partial = PartialFile::open(path).await.map_err(FetchError::at(path))?;
            if partial.size() >= file.size {
                return finish(partial, path, file, &from).await;
            }
            let stalled = |_| {
                let message = format!("the transfer made no progress for {STALL_TIMEOUT:?}");
                FetchError::transient(&from, message)
            };
            let fail = |error: object_store::Error| fetch_error(&error, &from);
            let range = (partial.size() > 0).then_some(GetRange::Offset(partial.size()));
            let options = GetOptions { if_match: file.etag.clone(), range, ..GetOptions::default() };
            let answer = timeout(STALL_TIMEOUT, self.store.get_opts(&self.key(&file.name), options)).await;
            let mut pieces = answer.map_err(stalled)?.map_err(fail)?.into_stream();
            while partial.size() <= file.size
                && let Some(piece) =
                    timeout(STALL_TIMEOUT, pieces.try_next()).await.map_err(stalled)?.map_err(fail)?
            {
                partial.write(&piece).await.map_err(FetchError::at(path))?;
            }
            finish(partial, path, file, &from).await
        })
    }
}

impl ObjectStorePrefix {
    /// Lists all files, also those in subdirectories, in the order of their names.
    async fn list(&self) -> Result<Vec<RemoteFile>, FetchError> {
        let mut objects = self.store.list(Some(&self.prefix));
        let mut files = Vec::new();
        while let Some(object) = objects.try_next().await.map_err(|error| fetch_error(&error, &self.url))? {
            if files.len() == MAX_OBJECTS {
                let message =
                    format!("contains more than {MAX_OBJECTS} objects; give the directory of one model");
                return Err(FetchError::permanent(&self.url, message));
            }
            files.extend(self.remote_file(object));
        }
        if files.is_empty() {
            return Err(FetchError::permanent(&self.url, "contains no files"));
        }
        files.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(files)
    }

    fn remote_file(&self, object: ObjectMeta) -> Option<RemoteFile> {
        let parts: Vec<_> = object.location.prefix_match(&self.prefix)?.collect();
        let name = parts.iter().map(AsRef::as_ref).collect::<Vec<_>>().join("/");
        let ObjectMeta { location, last_modified, size, e_tag: etag, .. } = object;
        let state = etag.clone().unwrap_or_else(|| last_modified.to_rfc3339());
        let store = self.url.split('/').take(3).collect::<Vec<_>>().join("/");
        let key = key("object", &[&store, location.as_ref(), &size.to_string(), &state]);
        Some(RemoteFile { name, size, key, etag })
    }

    fn key(&self, name: &str) -> Key {
        name.split('/').fold(self.prefix.clone(), |path, part| path.join(part))
    }
}

fn fetch_error(error: &object_store::Error, from: &str) -> FetchError {
    use object_store::Error;
    // For a failed listing, only the text contains the status.
    let text = error.to_string();
    let after = |mark: &str| text.split_once(mark).map(|(_, rest)| rest);
    let status = after("status code: ").and_then(|rest| rest.get(..3)?.parse::<u16>().ok());
    let code = after("<Code>").and_then(|rest| rest.split_once('<')).map(|(code, _)| code);
    let code = code.filter(|code| code.chars().all(char::is_alphanumeric)).unwrap_or("no reason given");
    match (error, status) {
        (Error::NotFound { .. }, _) | (_, Some(404)) => FetchError::permanent(from, "does not exist"),
        (Error::PermissionDenied { .. } | Error::Unauthenticated { .. }, _) | (_, Some(401 | 403)) => {
            let remedy = "check the worker's AWS_*, GOOGLE_* or AZURE_* environment variables";
            FetchError::permanent(from, format!("the store refuses access ({code}): {remedy}"))
        }
        (Error::Precondition { .. }, _) => FetchError::transient(from, "changed while it was fetched"),
        (_, Some(status @ (408 | 429 | 500..))) => {
            FetchError::transient(from, format!("the store returned {status} ({code})"))
        }
        (_, Some(status)) => FetchError::permanent(from, format!("the store returned {status} ({code})")),
        (Error::Generic { .. }, None) => FetchError::transient(from, one_line(error)),
        (_, None) => FetchError::permanent(from, one_line(error)),
    }
}

/// An error in one line of limited length, without the parts that may contain secrets: the queries
/// of URLs and the bodies of responses.
fn one_line(error: &object_store::Error) -> String {
    let text = error.to_string();
    let head = text.split(['<', '{']).next().unwrap_or_default();
    let words = head.split_whitespace().map(|word| word.split_once('?').map_or(word, |(before, _)| before));
    let line = words.collect::<Vec<_>>().join(" ");
    line.chars().take(300).collect()
}
