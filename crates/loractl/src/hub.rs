//! Commits to a model repository of the Hugging Face Hub, or of a server with its endpoints.
//!
//! The requests are those of the Python package `huggingface_hub` 1.x: `repos/create`, `preupload`
//! (which files are large), the batch API of Git LFS with the transfer `basic`, and `commit`.

mod model_card;

use std::collections::BTreeMap;
use std::fmt::Display;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use lora_model::sha256;
use lora_proto::file_name::is_file_name;
use reqwest::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue};
use reqwest::{Client, Method, Response, StatusCode};
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
/// Number of bytes of a file by which the hub decides whether it is large.
const SAMPLE_BYTES: usize = 512;

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
    pub(crate) bytes: Vec<u8>,
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
    header: BTreeMap<String, String>,
}

#[derive(Deserialize)]
struct LfsError {
    message: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Committed {
    commit_url: String,
}

impl Hub {
    /// Creates a client with the token in `HF_TOKEN`, of the hub at `HF_ENDPOINT` or the public one.
    ///
    /// # Errors
    /// There is no token.
    pub(crate) fn from_environment() -> Result<Self> {
        let variable = |name| {
            let value = std::env::var(name).unwrap_or_default();
            Some(value.trim().trim_end_matches('/').to_owned()).filter(|value| !value.is_empty())
        };
        let token = variable("HF_TOKEN")
            .ok_or_else(|| anyhow!("HF_TOKEN: is not set; set it to a token with write access to the hub"))?;
        Self::new(variable("HF_ENDPOINT").unwrap_or_else(|| ENDPOINT.to_owned()), &token)
    }

    fn new(endpoint: String, token: &str) -> Result<Self> {
        // The HTTP client uses the process's provider. If one is installed already, it serves as
        // well.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let mut authorization = HeaderValue::from_str(&format!("Bearer {token}"))
            .map_err(|_| anyhow!("HF_TOKEN: has characters that no token has"))?;
        authorization.set_sensitive(true);
        let client = Client::builder()
            .user_agent(concat!("loractl/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(CONNECT_TIMEOUT)
            .build()
            .context("cannot create an HTTP client")?;
        Ok(Self { endpoint, authorization, client })
    }

    /// The page of a repository.
    pub(crate) fn page(&self, name: &RepositoryName) -> String {
        format!("{}/{}", self.endpoint, name.0)
    }

    /// Creates a model repository. Returns false if it exists, which does not change it.
    pub(crate) async fn create(&self, name: &RepositoryName, is_private: bool) -> Result<bool> {
        let (owner, model) = name.0.split_once('/').unwrap_or_default();
        let body = json!({ "type": "model", "organization": owner, "name": model, "private": is_private });
        let url = format!("{}/api/repos/create", self.endpoint);
        let answer = self.send(Method::POST, &url, JSON, body.to_string().into_bytes()).await?;
        if answer.status() == StatusCode::CONFLICT {
            return Ok(false);
        }
        self.accepted(answer, &url).await?;
        Ok(true)
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
        let url = format!("{}/api/models/{}/commit/{revision}", self.endpoint, name.0);
        let answer = self.send(Method::POST, &url, "application/x-ndjson", body.into_bytes()).await?;
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
        let url = format!("{}/api/models/{}/preupload/{revision}", self.endpoint, name.0);
        let answer = self.send(Method::POST, &url, JSON, body.to_string().into_bytes()).await?;
        let answer: Preupload = self.read(answer, &url).await?;
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
        let answer = self.send(Method::POST, &url, LFS_JSON, body.to_string().into_bytes()).await?;
        let batch: LfsBatch = self.read(answer, &url).await?;
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
                let answer =
                    self.send(Method::POST, &verify.href, LFS_JSON, body.to_string().into_bytes()).await?;
                self.accepted(answer, &verify.href).await?;
            }
        }
        Ok(())
    }

    /// Sends a large file to the storage, whose address is signed: the token is not for it.
    async fn put(&self, action: &LfsAction, file: &HubFile) -> Result<()> {
        let mut headers = HeaderMap::new();
        for (name, value) in &action.header {
            let name = HeaderName::try_from(name).context("the storage asks for an invalid header")?;
            headers.insert(name, value.parse().context("the storage asks for an invalid header")?);
        }
        let request = self.client.put(&action.href).headers(headers).body(file.bytes.clone());
        let answer = request.timeout(time_limit(file.bytes.len())).send().await;
        let answer = answer.map_err(|error| unreachable(&file.name, error))?;
        self.accepted(answer, &file.name).await.map(drop)
    }

    async fn send(&self, method: Method, url: &str, format: &'static str, body: Vec<u8>) -> Result<Response> {
        let request = self.client.request(method, url).timeout(time_limit(body.len()));
        let request = request
            .header(AUTHORIZATION, self.authorization.clone())
            .header(CONTENT_TYPE, format)
            .header(ACCEPT, if format == LFS_JSON { LFS_JSON } else { JSON });
        request.body(body).send().await.map_err(|error| unreachable(url, error))
    }

    async fn read<T: for<'de> Deserialize<'de>>(&self, answer: Response, url: &str) -> Result<T> {
        let body = self.accepted(answer, url).await?;
        serde_json::from_slice(&body).with_context(|| format!("{url}: the hub's answer is not understood"))
    }

    /// Returns the body of an answer that is a success. The text of an error is the hub's.
    async fn accepted(&self, answer: Response, of: impl Display) -> Result<Vec<u8>> {
        let status = answer.status();
        let body = answer.bytes().await.map_err(|error| unreachable(&of, error))?;
        if status.is_success() {
            return Ok(body.to_vec());
        }
        let json: Option<Value> = serde_json::from_slice(&body).ok();
        let message = json.as_ref().and_then(|json| json["error"].as_str()).unwrap_or_default();
        let remedy = match status {
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                "; HF_TOKEN must be a token with write access to the repository"
            }
            _ => "",
        };
        bail!(
            "{of}: the hub returned {status}{}{message}{remedy}",
            if message.is_empty() { "" } else { ": " }
        );
    }
}

fn time_limit(body: usize) -> Duration {
    REQUEST_TIMEOUT + Duration::from_secs(body as u64 / LOWEST_RATE)
}

/// An error without an answer. It does not show a signed address.
fn unreachable(of: impl Display, error: reqwest::Error) -> anyhow::Error {
    anyhow::Error::from(error.without_url()).context(of.to_string())
}
