//! Commits to a model repository of the Hugging Face Hub, or of a server with its endpoints.
//!
//! The requests are those of the Python package `huggingface_hub`: `repos/create`, `preupload`
//! (which files are large), the batch API of Git LFS with the transfer `basic`, and `commit`.

mod model_card;

use std::collections::BTreeMap;
use std::fmt::Display;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use bytes::Bytes;
use lora_model::sha256;
use lora_proto::file_name::is_file_name;
use reqwest::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, RETRY_AFTER};
use reqwest::redirect::Policy;
use reqwest::{Client, Method, RequestBuilder, Response, StatusCode, Url};
use serde::Deserialize;
use serde_json::{Value, json};

pub(crate) use model_card::ModelCard;

const ENDPOINT: &str = "https://huggingface.co";
const JSON: &str = "application/json";
const LFS_JSON: &str = "application/vnd.git-lfs+json";
const CONNECT_TIMEOUT: Duration = Duration::from_secs(20);
/// Time limit of a request, besides the time for its body.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(60);
/// The lowest rate at which a body may be sent, in bytes a second.
const LOWEST_RATE: u64 = 100_000;
/// What helps if a request is not allowed.
const TOKEN_REMEDY: &str = "; HF_TOKEN must be a token with write access to the repository";
/// Number of bytes of a file by which the hub decides whether it is large.
const SAMPLE_BYTES: usize = 512;
/// The size limit of an answer.
const MAX_ANSWER_BYTES: usize = 1 << 20;
/// The largest number of characters of a message of the hub that is shown.
const MAX_MESSAGE_CHARS: usize = 500;
/// The number of characters that are shown of an answer that is not understood.
const MAX_BEGIN_CHARS: usize = 60;
/// The waits before a request is sent again that may be repeated.
const RETRIES: [Duration; 3] = [Duration::from_secs(1), Duration::from_secs(2), Duration::from_secs(4)];
/// The longest wait for which a server may ask.
const MAX_WAIT: Duration = Duration::from_secs(60);
/// The largest number of redirections.
const MAX_REDIRECTIONS: usize = 5;

/// `org/name`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RepositoryName(String);

impl RepositoryName {
    /// Parses `org/name`, also with the prefix `hf://`. An error says what is expected.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let name = text.strip_prefix("hf://").unwrap_or(text);
        match name.split_once('/') {
            Some((owner, model)) if is_file_name(owner) && is_file_name(model) && name.len() <= 129 => {
                Ok(Self(name.to_owned()))
            }
            _ => Err(format!("{text:?} is not a model repository, such as org/name")),
        }
    }

    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

/// A file of a commit.
#[derive(Debug)]
pub(crate) struct HubFile {
    pub(crate) name: String,
    pub(crate) bytes: Bytes,
}

/// A client of the hub with a token.
pub(crate) struct Hub {
    endpoint: String,
    authorization: HeaderValue,
    client: Client,
}

/// How the hub takes a file.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct PreuploadFile {
    path: String,
    upload_mode: String,
    #[serde(default)]
    should_ignore: bool,
}

#[derive(Deserialize)]
struct Preupload {
    files: Vec<PreuploadFile>,
}

/// The answer of the batch API of Git LFS.
#[derive(Deserialize)]
struct LfsBatch {
    objects: Vec<LfsObject>,
}

#[derive(Deserialize)]
struct LfsObject {
    oid: String,
    /// Missing if the hub has the object.
    #[serde(default)]
    actions: Option<LfsActions>,
    #[serde(default)]
    error: Option<LfsError>,
}

#[derive(Deserialize)]
struct LfsActions {
    upload: LfsAction,
    #[serde(default)]
    verify: Option<LfsAction>,
}

#[derive(Deserialize)]
struct LfsAction {
    href: String,
    #[serde(default)]
    header: Option<BTreeMap<String, String>>,
}

#[derive(Deserialize)]
struct LfsError {
    message: String,
}

/// The answer to the creation of a repository.
#[derive(Deserialize)]
struct Created {
    #[serde(rename = "url")]
    _url: String,
}

/// A repository as the hub describes it.
#[derive(Deserialize)]
pub(crate) struct Repository {
    #[serde(default)]
    private: Option<bool>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Committed {
    commit_url: String,
}

impl Hub {
    /// Creates a client with the token in `HF_TOKEN` or of `hf auth login`, of the hub at
    /// `HF_ENDPOINT` or the public one.
    ///
    /// # Errors
    /// There is no token, or a variable is invalid.
    pub(crate) fn from_environment() -> Result<Self> {
        let variable = |name| {
            let value = std::env::var(name).unwrap_or_default();
            Some(value.trim().trim_end_matches('/').to_owned()).filter(|value| !value.is_empty())
        };
        let token = variable("HF_TOKEN").or_else(stored_token).ok_or_else(|| {
            anyhow!(
                "HF_TOKEN: is not set; set it to a token with write access to the hub, or run hf auth login"
            )
        })?;
        if !token.chars().all(|c| c.is_ascii_graphic()) {
            bail!("HF_TOKEN: has characters that no token has");
        }
        let endpoint = variable("HF_ENDPOINT").unwrap_or_else(|| ENDPOINT.to_owned());
        let is_endpoint = |url: Url| {
            ["http", "https"].contains(&url.scheme())
                && (url.query(), url.fragment(), url.password()) == (None, None, None)
                && url.username().is_empty()
        };
        if !Url::parse(&endpoint).is_ok_and(is_endpoint) {
            bail!("HF_ENDPOINT: is not an address such as {ENDPOINT}");
        }
        Self::new(endpoint, &token)
    }

    fn new(endpoint: String, token: &str) -> Result<Self> {
        // The HTTP client uses the process's provider. If one is installed already, it serves as
        // well.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let mut authorization = HeaderValue::from_str(&format!("Bearer {token}"))?;
        authorization.set_sensitive(true);
        let client = Client::builder()
            .user_agent(concat!("loractl/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(CONNECT_TIMEOUT)
            .redirect(Policy::custom(|attempt| {
                // Other redirections turn a POST into a GET.
                let keeps_method = [StatusCode::TEMPORARY_REDIRECT, StatusCode::PERMANENT_REDIRECT]
                    .contains(&attempt.status());
                match keeps_method && attempt.previous().len() <= MAX_REDIRECTIONS {
                    true => attempt.follow(),
                    false => attempt.stop(),
                }
            }))
            .build()
            .context("cannot create an HTTP client")?;
        Ok(Self { endpoint, authorization, client })
    }

    /// The page of a repository.
    pub(crate) fn page(&self, name: &RepositoryName) -> String {
        format!("{}/{}", self.endpoint, name.0)
    }

    /// Creates a model repository. Returns false if it exists, which does not change it.
    ///
    /// # Errors
    /// It cannot be created, or was created as a public one although it must be private.
    pub(crate) async fn create(&self, name: &RepositoryName, is_private: bool) -> Result<bool> {
        let (owner, model) = name.0.split_once('/').unwrap_or_default();
        let visibility = if is_private { "private" } else { "public" };
        let body = json!({ "type": "model", "organization": owner, "name": model, "visibility": visibility });
        let url = format!("{}/api/repos/create", self.endpoint);
        let answer = self.repeat(self.request(Method::POST, &url, JSON, body.to_string().into())).await;
        let answer = answer.map_err(|error| unreachable(&url, error))?;
        let status = answer.status();
        let created = self.read::<Created>(answer, &url).await;
        let may_exist = [StatusCode::CONFLICT, StatusCode::UNAUTHORIZED, StatusCode::FORBIDDEN];
        match created {
            Ok(_) if is_private && self.find(name).await?.is_some_and(|it| it.private == Some(false)) => {
                bail!("{} was created as a public repository; nothing was uploaded", self.page(name))
            }
            Ok(_) => Ok(true),
            // A token that cannot create repositories may still write to this one.
            Err(error) if may_exist.contains(&status) => match self.find(name).await? {
                Some(_) => Ok(false),
                None => Err(error),
            },
            Err(error) => Err(error),
        }
    }

    /// Returns what the hub says of a repository; `None` if it does not exist or cannot be read.
    pub(crate) async fn find(&self, name: &RepositoryName) -> Result<Option<Repository>> {
        let url = format!("{}/api/models/{}", self.endpoint, name.0);
        let answer = self.repeat(self.request(Method::GET, &url, JSON, Bytes::new())).await;
        let answer = answer.map_err(|error| unreachable(&url, error))?;
        match answer.status().is_success() {
            true => self.read(answer, &url).await.map(Some),
            false => Ok(None),
        }
    }

    /// Commits `files` to `revision` in one commit. Returns the commit's page. After an error the
    /// revision is unchanged; large files that were sent are not sent again.
    pub(crate) async fn commit(
        &self,
        name: &RepositoryName,
        revision: &str,
        message: &str,
        files: &[HubFile],
    ) -> Result<String> {
        let large = self.large_files(name, revision, files).await?;
        self.upload_large(name, revision, &large).await?;
        let mut lines = vec![json!({ "key": "header", "value": { "summary": message, "description": "" } })];
        for file in files {
            lines.push(match large.iter().find(|(large, _)| large.name == file.name) {
                Some((file, oid)) => json!({ "key": "lfsFile", "value": {
                    "path": file.name, "algo": "sha256", "oid": oid, "size": file.bytes.len(),
                } }),
                None => json!({ "key": "file", "value": {
                    "path": file.name, "encoding": "base64", "content": BASE64_STANDARD.encode(&file.bytes),
                } }),
            });
        }
        let body: String = lines.iter().map(|line| format!("{line}\n")).collect();
        let url = format!("{}/api/models/{}/commit/{}", self.endpoint, name.0, encoded(revision));
        // A commit is not repeated: the first one may have arrived.
        let answer = self.request(Method::POST, &url, "application/x-ndjson", body.into()).send().await;
        let answer = answer.map_err(|error| unreachable(&url, error))?;
        let committed: Committed = self.read(answer, &url).await?;
        Ok(committed.commit_url)
    }

    /// The files that the hub takes as large files, with their SHA-256.
    async fn large_files<'a>(
        &self,
        name: &RepositoryName,
        revision: &str,
        files: &'a [HubFile],
    ) -> Result<Vec<(&'a HubFile, String)>> {
        let described = files.iter().map(|HubFile { name, bytes }| {
            let sample = BASE64_STANDARD.encode(&bytes[..bytes.len().min(SAMPLE_BYTES)]);
            json!({ "path": name, "sample": sample, "size": bytes.len() })
        });
        let body = json!({ "files": described.collect::<Vec<Value>>() });
        let url = format!("{}/api/models/{}/preupload/{}", self.endpoint, name.0, encoded(revision));
        let answer: Preupload = self.post(&url, JSON, &body).await?;
        let mut large = Vec::new();
        for file in files {
            let Some(mode) = answer.files.iter().find(|mode| mode.path == file.name) else {
                bail!("{url}: the hub did not say how it takes {}", file.name);
            };
            if mode.should_ignore {
                bail!("{}: the repository's .gitignore excludes this file", file.name);
            }
            match mode.upload_mode.as_str() {
                // The hub does not take empty files as large files.
                _ if file.bytes.is_empty() => {}
                "regular" => {}
                "lfs" => large.push((file, sha256(&file.bytes))),
                other => bail!("{url}: the hub takes {} only as {other:?}", file.name),
            }
        }
        Ok(large)
    }

    async fn upload_large(
        &self,
        name: &RepositoryName,
        revision: &str,
        files: &[(&HubFile, String)],
    ) -> Result<()> {
        if files.is_empty() {
            return Ok(());
        }
        let object = |(file, oid): &(&HubFile, String)| json!({ "oid": oid, "size": file.bytes.len() });
        let body = json!({
            "operation": "upload", "transfers": ["basic"], "hash_algo": "sha256",
            "ref": { "name": revision }, "objects": files.iter().map(object).collect::<Vec<Value>>(),
        });
        let url = format!("{}/{}.git/info/lfs/objects/batch", self.endpoint, name.0);
        let batch: LfsBatch = self.post(&url, LFS_JSON, &body).await?;
        for (file, oid) in files {
            let object = batch.objects.iter().find(|object| object.oid == *oid);
            let object = object.ok_or_else(|| anyhow!("{url}: the hub forgot {}", file.name))?;
            if let Some(error) = &object.error {
                bail!("{}: the hub does not take the file: {}", file.name, error.message);
            }
            let Some(LfsActions { upload, verify }) = &object.actions else { continue };
            self.put(upload, file).await?;
            if let Some(verify) = verify {
                let body = json!({ "oid": oid, "size": file.bytes.len() });
                let request = self.request(Method::POST, &verify.href, LFS_JSON, body.to_string().into());
                let of = format!("{}: the check of the hub", file.name);
                let answer = self.repeat(request).await.map_err(|error| unreachable(&of, error))?;
                accepted(answer, &of, "the hub", TOKEN_REMEDY).await?;
            }
        }
        Ok(())
    }

    /// Sends a large file to the storage, whose address is signed: the token is not for it.
    async fn put(&self, action: &LfsAction, file: &HubFile) -> Result<()> {
        let mut headers = HeaderMap::new();
        for (name, value) in action.header.iter().flatten() {
            let name = HeaderName::try_from(name).context("the storage asks for an invalid header")?;
            headers.insert(name, value.parse().context("the storage asks for an invalid header")?);
        }
        let request = self.client.put(&action.href).headers(headers).body(file.bytes.clone());
        let answer = self.repeat(request.timeout(time_limit(file.bytes.len()))).await;
        let answer = answer.map_err(|error| unreachable(&file.name, error))?;
        accepted(answer, &file.name, "the storage", "").await.map(drop)
    }

    fn request(&self, method: Method, url: &str, format: &'static str, body: Bytes) -> RequestBuilder {
        let request = self.client.request(method, url).timeout(time_limit(body.len()));
        request
            .header(AUTHORIZATION, self.authorization.clone())
            .header(CONTENT_TYPE, format)
            .header(ACCEPT, if format == LFS_JSON { LFS_JSON } else { JSON })
            .body(body)
    }

    /// Sends a request that may be repeated: again after an error of the connection or the server,
    /// after the time that the server asks for. Says so on stderr.
    async fn repeat(&self, request: RequestBuilder) -> reqwest::Result<Response> {
        for wait in RETRIES {
            let Some(copy) = request.try_clone() else { break };
            let (cause, wait) = match copy.send().await {
                Ok(answer) if !is_transient(answer.status()) => return Ok(answer),
                Ok(answer) => {
                    (answer.status().to_string(), retry_after(&answer).map_or(wait, |asked| wait.max(asked)))
                }
                Err(error) if !(error.is_connect() || error.is_request()) => return Err(error),
                Err(error) if error.is_timeout() => ("no answer in time".to_owned(), wait),
                Err(_) => ("no connection".to_owned(), wait),
            };
            if wait > MAX_WAIT {
                break;
            }
            eprintln!("{}: {cause}; again in {} s", self.endpoint, wait.as_secs());
            tokio::time::sleep(wait).await;
        }
        request.send().await
    }

    async fn post<T: for<'de> Deserialize<'de>>(
        &self,
        url: &str,
        format: &'static str,
        body: &Value,
    ) -> Result<T> {
        let request = self.request(Method::POST, url, format, body.to_string().into());
        let answer = self.repeat(request).await.map_err(|error| unreachable(url, error))?;
        self.read(answer, url).await
    }

    async fn read<T: for<'de> Deserialize<'de>>(&self, answer: Response, url: &str) -> Result<T> {
        let body = accepted(answer, url, "the hub", TOKEN_REMEDY).await?;
        serde_json::from_slice(&body).with_context(|| {
            let begin: String = String::from_utf8_lossy(&body).chars().take(MAX_BEGIN_CHARS).collect();
            format!("{url}: the hub's answer is not understood: {}", printable(&begin))
        })
    }
}

/// Returns the body of an answer that is a success. An error has the reason that `server` gives,
/// and `remedy` if the request was not allowed.
async fn accepted(mut answer: Response, of: impl Display, server: &str, remedy: &str) -> Result<Vec<u8>> {
    let status = answer.status();
    let header = answer.headers().get("x-error-message").and_then(|value| value.to_str().ok());
    let header = header.map(str::to_owned);
    let mut body = Vec::new();
    while let Some(chunk) = answer.chunk().await.map_err(|error| unreachable(&of, error))? {
        if body.len() + chunk.len() > MAX_ANSWER_BYTES {
            bail!("{of}: the answer of {server} has more than {MAX_ANSWER_BYTES} bytes");
        }
        body.extend_from_slice(&chunk);
    }
    if status.is_success() {
        return Ok(body);
    }
    let wait = match retry_after(&answer) {
        Some(wait) => format!("; it asks to try again after {} s", wait.as_secs()),
        None => String::new(),
    };
    let is_refused = [StatusCode::UNAUTHORIZED, StatusCode::FORBIDDEN].contains(&status);
    let remedy = if is_refused { remedy } else { "" };
    let reason = reason(&body).or(header).map(|text| format!(": {}", printable(&text))).unwrap_or_default();
    bail!("{of}: {server} returned {status}{reason}{remedy}{wait}");
}

/// The reason in the body of an error: JSON of the hub or of Git LFS, or XML of a storage.
fn reason(body: &[u8]) -> Option<String> {
    if let Ok(json) = serde_json::from_slice::<Value>(body) {
        let text = |value: &Value| value.as_str().map(str::to_owned);
        let error = &json["error"];
        return text(error)
            .or_else(|| text(error.get(0)?))
            .or_else(|| text(json["errors"].get(0)?.get("message")?))
            .or_else(|| text(&json["message"]));
    }
    let text = std::str::from_utf8(body).ok()?;
    let (_, code) = text.split_once("<Code>")?;
    code.split_once("</Code>").map(|(code, _)| code.to_owned())
}

/// A text from outside as one line of limited length.
fn printable(text: &str) -> String {
    let visible = text.chars().map(|c| if c.is_control() { ' ' } else { c });
    visible.take(MAX_MESSAGE_CHARS).collect::<String>().trim().to_owned()
}

/// The time after which the server wants the request again.
fn retry_after(answer: &Response) -> Option<Duration> {
    let seconds = answer.headers().get(RETRY_AFTER)?.to_str().ok()?.trim().parse().ok()?;
    Some(Duration::from_secs(seconds))
}

fn is_transient(status: StatusCode) -> bool {
    status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS
}

/// The token that `hf auth login` stored: in the file `HF_TOKEN_PATH`, or `token` in `HF_HOME`, or
/// in the user's cache.
fn stored_token() -> Option<String> {
    let path = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let cache = || path("XDG_CACHE_HOME").or_else(|| Some(std::env::home_dir()?.join(".cache")));
    let home = || path("HF_HOME").or_else(|| Some(cache()?.join("huggingface")));
    let file = path("HF_TOKEN_PATH").or_else(|| Some(home()?.join("token")))?;
    let token = std::fs::read_to_string(file).ok()?.trim().to_owned();
    Some(token).filter(|token| !token.is_empty())
}

/// The name of a branch as a part of a path.
fn encoded(revision: &str) -> String {
    revision.replace('/', "%2F")
}

fn time_limit(body: usize) -> Duration {
    REQUEST_TIMEOUT + Duration::from_secs(body as u64 / LOWEST_RATE)
}

/// An error without an answer. It does not show a signed address.
fn unreachable(of: impl Display, error: reqwest::Error) -> anyhow::Error {
    anyhow::Error::from(error.without_url()).context(of.to_string())
}
