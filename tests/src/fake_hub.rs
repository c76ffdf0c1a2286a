//! A stand-in for the Hugging Face Hub that takes commits to model repositories.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::Bytes;
use axum::http::{HeaderMap, Method, StatusCode, Uri};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tokio::net::TcpListener;
use tokio::runtime::Runtime;

/// What the hub has received.
#[derive(Debug, Clone, Default)]
pub struct HubState {
    /// Whether every repository is created as a public one.
    pub makes_public: bool,
    /// The repositories, and whether each is private.
    pub repositories: BTreeMap<String, bool>,
    /// The large files, by SHA-256.
    pub objects: BTreeMap<String, Vec<u8>>,
    /// Number of requests that fail before others are answered.
    pub fails: usize,
    /// Number of large files that were sent.
    pub uploads: usize,
    /// The lines of the commits: repository and revision, and the objects of the body.
    pub commits: Vec<(String, Vec<Value>)>,
}

/// A hub on a free port of the loopback interface, until it is dropped.
#[derive(Debug)]
pub struct FakeHub {
    /// `http://host:port`
    pub url: String,
    state: Arc<Mutex<HubState>>,
    _runtime: Runtime,
}

impl FakeHub {
    /// Starts a hub without repositories, to which only `token` may write. It takes files that are
    /// named `*.safetensors` as large files.
    pub fn start(token: &'static str) -> Self {
        let runtime = Runtime::new().unwrap();
        let state: Arc<Mutex<HubState>> = Arc::default();
        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let (shared, root) = (state.clone(), url.clone());
        let answer = move |method: Method, uri: Uri, headers: HeaderMap, body: Bytes| {
            let answered = answer(&mut shared.lock().unwrap(), &root, token, &method, &uri, &headers, &body);
            async move { answered }
        };
        runtime.spawn(async move { axum::serve(listener, Router::new().fallback(answer)).await });
        Self { url, state, _runtime: runtime }
    }

    /// Lets the next requests with the token fail.
    pub fn fail(&self, requests: usize) {
        self.state.lock().unwrap().fails = requests;
    }

    /// Lets the hub create public repositories only.
    pub fn make_public(&self) {
        self.state.lock().unwrap().makes_public = true;
    }

    /// What the hub has received so far.
    pub fn state(&self) -> HubState {
        self.state.lock().unwrap().clone()
    }
}

fn answer(
    state: &mut HubState,
    root: &str,
    token: &str,
    method: &Method,
    uri: &Uri,
    headers: &HeaderMap,
    body: &[u8],
) -> (StatusCode, String) {
    let refused = |status, text: &str| (status, json!({ "error": text }).to_string());
    let authorization = headers.get("authorization").and_then(|value| value.to_str().ok());
    let path = uri.path().trim_start_matches('/');
    if let Some(oid) = path.strip_prefix("storage/") {
        // The address is signed; storages refuse a request with a second kind of authorization.
        let is_right = authorization.is_none() && *method == Method::PUT && headers.contains_key("x-storage");
        if !is_right || hex::encode(Sha256::digest(body)) != oid {
            return refused(StatusCode::BAD_REQUEST, "bad upload");
        }
        state.uploads += 1;
        state.objects.insert(oid.to_owned(), body.to_vec());
        return (StatusCode::OK, String::new());
    }
    if authorization != Some(&format!("Bearer {token}")) {
        return refused(StatusCode::UNAUTHORIZED, "Invalid user token.");
    }
    if state.fails > 0 {
        state.fails -= 1;
        return refused(StatusCode::SERVICE_UNAVAILABLE, "busy");
    }
    let lines: Vec<Value> =
        std::str::from_utf8(body).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let json = lines.first().unwrap_or(&Value::Null);
    if path == "api/repos/create" {
        let text = |key: &str| json[key].as_str().unwrap().to_owned();
        assert_eq!(text("type"), "model");
        let name = format!("{}/{}", text("organization"), text("name"));
        if state.repositories.contains_key(&name) {
            return refused(StatusCode::CONFLICT, "You already created this model repo");
        }
        let is_private = text("visibility") == "private" && !state.makes_public;
        state.repositories.insert(name.clone(), is_private);
        return (StatusCode::OK, json!({ "url": format!("{root}/{name}") }).to_string());
    }
    if let Some(name) = path.strip_prefix("api/models/").filter(|name| state.repositories.contains_key(*name))
    {
        let private = state.repositories[name];
        return (StatusCode::OK, json!({ "id": name, "private": private }).to_string());
    }
    if path.contains("/preupload/") {
        let mode = |file: &Value| {
            let path = file["path"].as_str().unwrap();
            let mode = if path.ends_with(".safetensors") { "lfs" } else { "regular" };
            json!({ "path": path, "uploadMode": mode, "shouldIgnore": false })
        };
        let files: Vec<Value> = json["files"].as_array().unwrap().iter().map(mode).collect();
        return (StatusCode::OK, json!({ "files": files }).to_string());
    }
    if path.ends_with(".git/info/lfs/objects/batch") {
        let object = |object: &Value| {
            let oid = object["oid"].as_str().unwrap();
            let upload = json!({ "href": format!("{root}/storage/{oid}"), "header": { "x-storage": "1" } });
            let verify = json!({ "href": format!("{root}/verify") });
            match state.objects.contains_key(oid) {
                true => json!({ "oid": oid }),
                false => json!({ "oid": oid, "actions": { "upload": upload, "verify": verify } }),
            }
        };
        let objects: Vec<Value> = json["objects"].as_array().unwrap().iter().map(object).collect();
        return (StatusCode::OK, json!({ "transfer": "basic", "objects": objects }).to_string());
    }
    if path == "verify" {
        let is_known = state.objects.contains_key(json["oid"].as_str().unwrap());
        return (if is_known { StatusCode::OK } else { StatusCode::NOT_FOUND }, String::new());
    }
    if let Some(target) = path.strip_prefix("api/models/")
        && target.contains("/commit/")
    {
        state.commits.push((target.to_owned(), lines.clone()));
        let url = format!("{root}/commit/{}", state.commits.len());
        return (StatusCode::OK, json!({ "commitUrl": url, "success": true }).to_string());
    }
    refused(StatusCode::NOT_FOUND, "Repository not found")
}
