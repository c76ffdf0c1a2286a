//! Models of the Hugging Face Hub, over its endpoints for revisions and for files.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use futures_util::{StreamExt, TryStreamExt, stream};
use lora_proto::PartialFile;
use lora_proto::file_name::is_file_name;
use reqwest::header::{ACCEPT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE, ETAG, HeaderMap, RANGE};
use reqwest::redirect::Policy;
use reqwest::{Client, Method, RequestBuilder, Response, StatusCode};
use serde::Deserialize;
use tracing::info;

use super::{finish, key, selection};
use crate::fetch::FetchError;
use crate::fetch::cache::CacheDir;
use crate::fetch::source::{FileSet, RemoteFile, Source};

const ENDPOINT: &str = "https://huggingface.co";
const CONNECT_TIMEOUT: Duration = Duration::from_secs(20);
/// The limit of the wait for a response or its next chunk.
const STALL_TIMEOUT: Duration = Duration::from_secs(60);
/// The size limit of the description of a revision.
const MAX_REVISION_BYTES: u64 = 64 << 20;
/// The number of concurrent requests for the sizes of files.
const MAX_CONCURRENT_REQUESTS: usize = 8;

/// The hub, or a mirror of it.
pub(in crate::fetch) struct Hub {
    endpoint: String,
    token: Option<String>,
}

/// `org/name[@revision]`.
#[derive(Debug, PartialEq, Eq)]
pub(in crate::fetch) struct Repository {
    /// `org/name`.
    name: String,
    revision: String,
}

/// A repository at a commit.
struct Snapshot {
    hub: Arc<Hub>,
    client: Client,
    /// `org/name`.
    name: String,
    commit: String,
}

impl Repository {
    /// Parses the text after `hf://`.
    pub(in crate::fetch) fn parse(text: &str) -> Option<Self> {
        let (name, revision) = text.split_once('@').unwrap_or((text, "main"));
        let (owner, model) = name.split_once('/')?;
        let legal = is_file_name(owner)
            && is_file_name(model)
            && owner.len() + model.len() <= 128
            && revision.len() <= 255
            && revision.split('/').all(is_file_name);
        legal.then(|| Self { name: name.to_owned(), revision: revision.to_owned() })
    }
}

impl Hub {
    /// The hub at `endpoint` (by default the public one), accessed with `token`.
    pub(in crate::fetch) fn new(endpoint: Option<String>, token: Option<String>) -> Self {
        let given = |text: Option<String>| Some(text?.trim().trim_end_matches('/').to_owned());
        let endpoint = given(endpoint).filter(|text| !text.is_empty());
        let token = given(token).filter(|text| !text.is_empty());
        Self { endpoint: endpoint.unwrap_or_else(|| ENDPOINT.to_owned()), token }
    }

    /// Returns the files of the base in `repository`. For a commit that was fetched before, no
    /// network is needed.
    pub(in crate::fetch) async fn file_set(
        self: &Arc<Self>,
        repository: &Repository,
        cache: &CacheDir,
    ) -> Result<FileSet, FetchError> {
        let Repository { name, revision } = repository;
        let snapshot = |commit: &str| {
            let (hub, name, commit) = (self.clone(), name.clone(), commit.to_owned());
            Ok(Snapshot { client: hub.client(Policy::default(), &name)?, hub, name, commit })
        };
        let file_set = |snapshot, files| Ok(FileSet { source: Box::new(snapshot), files });
        if is_commit(revision)
            && let Some(files) = cache.record(&record(name, revision))
        {
            return file_set(snapshot(revision)?, files);
        }
        let (commit, names) = self.resolve(repository).await?;
        info!(base = name, revision, commit, "resolved a revision on the hub");
        let snapshot = snapshot(&commit)?;
        let id = record(name, &commit);
        if let Some(files) = cache.record(&id) {
            return file_set(snapshot, files);
        }
        let url = snapshot.url();
        let needed = selection::needed(names.iter().map(String::as_str));
        let needed = needed.map_err(|message| FetchError::permanent(&url, message))?;
        let mut files = snapshot.describe(needed).await?;
        let shards = selection::shards(&files, &snapshot, cache, &url).await?;
        files.extend(snapshot.describe(shards).await?);
        cache.keep_record(&id, &files)?;
        file_set(snapshot, files)
    }

    /// Returns the commit of a revision, and the names of its files.
    async fn resolve(&self, repository: &Repository) -> Result<(String, Vec<String>), FetchError> {
        #[derive(Deserialize)]
        struct Revision {
            sha: String,
            siblings: Vec<Sibling>,
        }
        #[derive(Deserialize)]
        struct Sibling {
            rfilename: String,
        }
        let Repository { name, revision } = repository;
        let from = format!("hf://{name}@{revision}");
        let client = self.client(Policy::default(), name)?;
        let url = format!("{}/api/models/{name}/revision/{}", self.endpoint, revision.replace('/', "%2F"));
        let answer = self.send(client.request(Method::GET, url), &from).await?;
        let text = read(answer, MAX_REVISION_BYTES, &from).await?;
        let answer: Revision = serde_json::from_slice(&text).map_err(|error| {
            FetchError::permanent(&from, format!("cannot read the hub's response: {error}"))
        })?;
        if !is_commit(&answer.sha) {
            return Err(FetchError::permanent(&from, "the hub's response has no commit"));
        }
        Ok((answer.sha, answer.siblings.into_iter().map(|sibling| sibling.rfilename).collect()))
    }

    fn client(&self, redirects: Policy, from: &str) -> Result<Client, FetchError> {
        Client::builder()
            .user_agent(concat!("loractl/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(CONNECT_TIMEOUT)
            .read_timeout(STALL_TIMEOUT)
            .https_only(self.endpoint.starts_with("https://"))
            .redirect(redirects)
            .build()
            .map_err(|error| FetchError::permanent(from, causes(&error)))
    }

    /// Sends a request. A returned response is a success or a redirection.
    async fn send(&self, request: RequestBuilder, from: &str) -> Result<Response, FetchError> {
        let request = request.header(ACCEPT_ENCODING, "identity");
        let request = match &self.token {
            Some(token) => request.bearer_auth(token),
            None => request,
        };
        let answer = request.send().await.map_err(|error| http_error(error, from))?;
        let status = answer.status();
        if status.is_success() || status.is_redirection() {
            return Ok(answer);
        }
        let token = if self.token.is_some() { "its HF_TOKEN" } else { "no HF_TOKEN" };
        Err(match status {
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => FetchError::permanent(
                from,
                format!(
                    "the hub returned {status}: the model does not exist, or is private or gated; this \
                     worker has {token}"
                ),
            ),
            StatusCode::NOT_FOUND => {
                FetchError::permanent(from, "the hub has no such model, revision or file")
            }
            StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_MANY_REQUESTS => {
                FetchError::transient(from, format!("the hub returned {status}"))
            }
            status if status.is_server_error() => {
                FetchError::transient(from, format!("the hub returned {status}"))
            }
            status => FetchError::permanent(from, format!("the hub returned {status}")),
        })
    }
}

impl Source for Snapshot {
    fn download<'a>(&'a self, file: &'a RemoteFile, path: &'a Path) -> BoxFuture<'a, Result<(), FetchError>> {
        Box::pin(async move {
            let from = format!("{}/{}", self.url(), file.name);
            let mut partial = PartialFile::open(path).await.map_err(FetchError::at(path))?;
            if partial.size() >= file.size {
                return finish(partial, path, file, &from).await;
            }
            let request = self.client.request(Method::GET, self.file_url(&file.name));
            let range = format!("bytes={}-", partial.size());
            let mut answer = self.hub.send(request.header(RANGE, range), &from).await?;
            let start = match answer.status() {
                StatusCode::PARTIAL_CONTENT => range_start(answer.headers()),
                _ => Some(0),
            };
            if start != Some(partial.size()) {
                partial.restart().await.map_err(FetchError::at(path))?;
                if start != Some(0) {
                    return Err(FetchError::transient(
                        &from,
                        "the hub returned another range than requested",
                    ));
                }
            }
            while partial.size() <= file.size
                && let Some(piece) = answer.chunk().await.map_err(|error| http_error(error, &from))?
            {
                partial.write(&piece).await.map_err(FetchError::at(path))?;
            }
            finish(partial, path, file, &from).await
        })
    }
}

impl Snapshot {
    /// Requests the sizes and identities of the files `names`.
    async fn describe(&self, names: BTreeSet<String>) -> Result<Vec<RemoteFile>, FetchError> {
        // The hub describes a file in the redirection to the host that serves it, so redirections
        // to other hosts are not followed.
        let policy = Policy::custom(|attempt| {
            let same_host =
                attempt.previous().first().is_some_and(|first| first.origin() == attempt.url().origin());
            match same_host && attempt.previous().len() < 10 {
                true => attempt.follow(),
                false => attempt.stop(),
            }
        });
        let client = &self.hub.client(policy, &self.name)?;
        stream::iter(names)
            .map(|name| self.describe_file(client, name))
            .buffered(MAX_CONCURRENT_REQUESTS)
            .try_collect()
            .await
    }

    async fn describe_file(&self, client: &Client, name: String) -> Result<RemoteFile, FetchError> {
        let from = format!("{}/{name}", self.url());
        let answer = self.hub.send(client.request(Method::HEAD, self.file_url(&name)), &from).await?;
        let header = |name: &str| answer.headers().get(name)?.to_str().ok();
        let redirected = answer.status().is_redirection();
        let size =
            header("x-linked-size").or_else(|| header(CONTENT_LENGTH.as_str()).filter(|_| !redirected));
        let Some(size) = size.and_then(|size| size.parse().ok()) else {
            return Err(FetchError::permanent(&from, "the hub's response has no file size"));
        };
        let etag = header("x-linked-etag").or_else(|| header(ETAG.as_str()).filter(|_| !redirected));
        // The etag of a large file is its SHA-256. Other files are identified by repository, commit
        // and name.
        let sha256 = etag.map(|etag| etag.trim_matches('"').to_lowercase());
        let sha256 =
            sha256.filter(|etag| etag.len() == 64 && etag.bytes().all(|byte| byte.is_ascii_hexdigit()));
        let key =
            sha256.unwrap_or_else(|| key("hub", &[&self.hub.endpoint, &self.name, &self.commit, &name]));
        Ok(RemoteFile { name, size, key, etag: None })
    }

    /// The URL for messages.
    fn url(&self) -> String {
        format!("hf://{}@{}", self.name, self.commit)
    }

    fn file_url(&self, name: &str) -> String {
        format!("{}/{}/resolve/{}/{name}", self.hub.endpoint, self.name, self.commit)
    }
}

fn record(name: &str, commit: &str) -> String {
    format!("{}@{commit}", name.replace('/', "--"))
}

fn is_commit(text: &str) -> bool {
    text.len() == 40 && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

/// The offset of the first byte of a partial response.
fn range_start(headers: &HeaderMap) -> Option<u64> {
    headers.get(CONTENT_RANGE)?.to_str().ok()?.strip_prefix("bytes ")?.split_once('-')?.0.parse().ok()
}

async fn read(mut answer: Response, limit: u64, from: &str) -> Result<Vec<u8>, FetchError> {
    let mut bytes = Vec::new();
    while let Some(piece) = answer.chunk().await.map_err(|error| http_error(error, from))? {
        bytes.extend_from_slice(&piece);
        if bytes.len() as u64 > limit {
            return Err(FetchError::permanent(from, format!("is longer than {limit} bytes")));
        }
    }
    Ok(bytes)
}

fn http_error(error: reqwest::Error, from: &str) -> FetchError {
    FetchError::transient(from, causes(&error.without_url()))
}

/// The text of an error and its causes. An error of a request must be passed without its URL, which
/// may contain a signature.
fn causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}
