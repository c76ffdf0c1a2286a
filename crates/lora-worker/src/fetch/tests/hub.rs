//! Bases of the hub, with a fake hub and a fake host that serves large files.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use lora_proto::{DigestBuilder, v1};
use lora_test_kit::artifacts::FakeArtifacts;
use serde_json::json;

use super::super::remote::{
    RemoteBases,
    hub::{Hub, Repository},
};
use super::super::{FetchError, FetchedFiles, InputFetcher};
use super::http::{FakeResponse, HttpServer, Request};
use super::{LARGE_CACHE, inputs_with, refusal, temp};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const LATER: &str = "89abcdef0123456789abcdef0123456789abcdef";
const TOKEN: &str = "hf_very_secret";

type Files = BTreeMap<String, Vec<u8>>;
type FileList<'a> = &'a [(&'a str, &'a [u8])];

/// A hub with the repository `acme/tiny`, whose weights another host serves.
struct FakeHub {
    hub: HttpServer,
    large: HttpServer,
    /// The next large file breaks after this number of bytes. 0: it does not break.
    cut: Arc<AtomicUsize>,
    /// The commit of the revision `main`.
    main: Arc<Mutex<&'static str>>,
}

impl FakeHub {
    async fn serve(files: FileList<'_>) -> Self {
        let files: Files =
            files.iter().map(|(name, content)| ((*name).to_owned(), content.to_vec())).collect();
        let cut = Arc::new(AtomicUsize::new(0));
        let main = Arc::new(Mutex::new(COMMIT));
        let large = {
            let (files, cut) = (files.clone(), cut.clone());
            HttpServer::serve(move |request| {
                let (name, _signature) = request.target.trim_start_matches('/').split_once('?').unwrap();
                let mut answer = FakeResponse::file(request, &files[name]);
                answer.cut = Some(cut.swap(0, Ordering::Relaxed)).filter(|bytes| *bytes > 0);
                answer
            })
            .await
        };
        let (host, revision) = (large.url.clone(), main.clone());
        let hub = HttpServer::serve(move |request| answer(request, &files, &host, *revision.lock().unwrap()));
        Self { hub: hub.await, large, cut, main }
    }

    fn cache(&self, dir: &Path) -> InputFetcher {
        let hub = Hub::new(Some(format!("{}/", self.hub.url)), Some(format!("{TOKEN}\n")));
        InputFetcher::with(dir, LARGE_CACHE, Vec::new(), RemoteBases::new(hub, Vec::new())).unwrap()
    }

    /// The requests to the hub and to the other host since the last call.
    fn requests(&self) -> (Vec<String>, Vec<String>) {
        let lines = |requests: Vec<Request>| {
            requests.into_iter().map(|request| format!("{} {}", request.method, request.target)).collect()
        };
        (lines(self.hub.take_requests()), lines(self.large.take_requests()))
    }
}

fn answer(request: &Request, files: &Files, large: &str, main: &str) -> FakeResponse {
    let Request { method, target, headers } = request;
    if headers.get("authorization").map(String::as_str) != Some(&format!("Bearer {TOKEN}")) {
        return FakeResponse::new(401, format!("who is {TOKEN}?"));
    }
    let target = target.trim_start_matches("/moved");
    if let Some(revision) = target.strip_prefix("/api/models/acme/tiny/revision/") {
        let sha = match revision {
            "main" | "refs%2Fpr%2F1" => main,
            COMMIT => COMMIT,
            _ => return FakeResponse::new(404, ""),
        };
        let siblings: Vec<_> = files.keys().map(|name| json!({"rfilename": name})).collect();
        return FakeResponse::new(200, json!({"sha": sha, "siblings": siblings}).to_string());
    }
    let file = [COMMIT, LATER]
        .iter()
        .find_map(|commit| target.strip_prefix(&format!("/acme/tiny/resolve/{commit}/")))
        .and_then(|name| Some((name, files.get(name)?)));
    match file {
        None => FakeResponse::new(404, ""),
        Some((name, content)) if name.ends_with(".safetensors") => FakeResponse::new(302, "elsewhere")
            .with("location", format!("{large}/{name}?signature=secret"))
            .with("x-linked-size", content.len().to_string())
            .with("x-linked-etag", format!("\"{}\"", DigestBuilder::of_bytes(content).hex())),
        // The hub answers in this way for a repository that was renamed.
        Some(_) if !request.target.starts_with("/moved") => {
            FakeResponse::new(307, "").with("location", format!("/moved{target}"))
        }
        Some((_, content)) => {
            assert!(method == "HEAD" || headers["accept-encoding"] == "identity");
            FakeResponse::file(request, content).with("etag", "\"0123456789012345678901234567890123456789\"")
        }
    }
}

const TINY: [(&str, &[u8]); 8] = [
    (".gitattributes", b"no"),
    ("README.md", b"no"),
    ("additional_chat_templates/tools.jinja", b"{{ tools }}"),
    ("config.json", b"{}"),
    ("consolidated.safetensors", b"the same weights once more"),
    ("model.safetensors", b"weights, many of them"),
    ("pytorch_model.bin", b"no"),
    ("tokenizer.json", b"{\"tokens\": 1}"),
];

async fn fetch(cache: &InputFetcher, url: &str) -> Result<FetchedFiles, FetchError> {
    let (store, server) = FakeArtifacts::serve().await;
    store.add(b"rows");
    cache.inputs(&inputs_with(v1::base::Source::Url(url.to_owned()), b"rows"), server.channel()).await
}

fn names(dir: &Path) -> Vec<String> {
    let name = |path: &Path| path.strip_prefix(dir).unwrap().display().to_string();
    let mut names: Vec<String> = super::tree(dir).iter().map(|path| name(path)).collect();
    names.sort();
    names
}

#[tokio::test]
async fn a_repository_is_fetched_by_its_commit() {
    let (dir, fake) = (temp(), FakeHub::serve(&TINY).await);
    let cache = fake.cache(dir.path());
    let got = fetch(&cache, "hf://acme/tiny").await.unwrap();
    let files =
        ["additional_chat_templates/tools.jinja", "config.json", "model.safetensors", "tokenizer.json"];
    assert_eq!(names(&got.base), files);
    assert_eq!(fs::read(got.base.join("model.safetensors")).unwrap(), b"weights, many of them");
    assert_eq!(fs::read(got.base.join(files[0])).unwrap(), b"{{ tools }}");
    let large = fake.large.take_requests();
    assert_eq!(large.len(), 1);
    assert!(!large[0].headers.contains_key("authorization"), "only the hub gets the token");
    fake.requests();

    // Nothing has changed: a revision needs one request, a commit none.
    let again = fetch(&cache, "hf://acme/tiny@refs/pr/1").await.unwrap();
    assert_eq!(again.base, got.base);
    assert_eq!(
        fake.requests(),
        (vec!["GET /api/models/acme/tiny/revision/refs%2Fpr%2F1".to_owned()], vec![])
    );
    let url = format!("hf://acme/tiny@{COMMIT}");
    drop(fake);
    let offline = fetch(&cache, &url).await.unwrap();
    assert_eq!(offline.base, got.base);
    let error = refusal(fetch(&cache, "hf://acme/tiny").await);
    assert!(error.is_transient() && error.to_string().contains("hf://acme/tiny@main"), "{error}");
}

#[tokio::test]
async fn a_new_commit_reuses_unchanged_weights() {
    let (dir, fake) = (temp(), FakeHub::serve(&TINY).await);
    let cache = fake.cache(dir.path());
    let first = fetch(&cache, "hf://acme/tiny").await.unwrap();
    *fake.main.lock().unwrap() = LATER;
    fake.requests();
    let second = fetch(&cache, "hf://acme/tiny").await.unwrap();
    assert_ne!(first.base, second.base);
    assert_eq!(fs::read(second.base.join("model.safetensors")).unwrap(), b"weights, many of them");
    assert_eq!(fake.requests().1, [] as [&str; 0]);
}

#[tokio::test]
async fn an_interrupted_download_resumes_and_corruption_is_detected() {
    let (dir, fake) = (temp(), FakeHub::serve(&TINY).await);
    let cache = fake.cache(dir.path());
    fake.cut.store(8, Ordering::Relaxed);
    let error = refusal(fetch(&cache, "hf://acme/tiny").await);
    assert!(error.is_transient(), "{error}");
    let text = error.to_string();
    assert!(text.starts_with(&format!("model.base: hf://acme/tiny@{COMMIT}/model.safetensors: ")), "{text}");
    assert!(!text.contains("secret"), "{text}");
    let part = dir.path().join("partial").join(DigestBuilder::of_bytes(TINY[5].1).hex()).join("content");
    assert_eq!(fs::read(&part).unwrap(), b"weights,");
    fake.large.take_requests();
    let got = fetch(&cache, "hf://acme/tiny").await.unwrap();
    assert_eq!(fs::read(got.base.join("model.safetensors")).unwrap(), TINY[5].1);
    assert_eq!(fake.large.take_requests()[0].headers["range"], "bytes=8-");

    let dir = temp();
    let cache = fake.cache(dir.path());
    let part = dir.path().join("partial").join(DigestBuilder::of_bytes(TINY[5].1).hex());
    fs::create_dir_all(&part).unwrap();
    fs::write(part.join("content"), "heights,").unwrap();
    let error = refusal(fetch(&cache, "hf://acme/tiny").await);
    assert!(error.is_transient(), "{error}");
    assert!(error.to_string().ends_with("the received file is corrupt; try again"), "{error}");
    let got = fetch(&cache, "hf://acme/tiny").await.unwrap();
    assert_eq!(fs::read(got.base.join("model.safetensors")).unwrap(), TINY[5].1);
}

#[tokio::test]
async fn the_index_selects_the_shards() {
    let index = br#"{"weight_map":
        {"a": "part-1.safetensors", "b": "part-2.safetensors", "c": "part-1.safetensors"}}"#;
    let files: [(&str, &[u8]); 5] = [
        ("config.json", b"{}"),
        ("model.safetensors.index.json", index),
        ("other.safetensors", b"no"),
        ("part-1.safetensors", b"one"),
        ("part-2.safetensors", b"two"),
    ];
    let (dir, fake) = (temp(), FakeHub::serve(&files).await);
    let got = fetch(&fake.cache(dir.path()), "hf://acme/tiny").await.unwrap();
    let expected =
        ["config.json", "model.safetensors.index.json", "part-1.safetensors", "part-2.safetensors"];
    assert_eq!(names(&got.base), expected);
    assert_eq!(fs::read(got.base.join("part-2.safetensors")).unwrap(), b"two");
}

#[tokio::test]
async fn an_unsupported_repository_is_rejected_before_the_weights_are_fetched() {
    let evil = br#"{"weight_map": {"a": "../../evil"}}"#;
    let cases: [(FileList, &str); 4] = [
        (&[("model.safetensors", b"x")], "has no config.json"),
        (
            &[("config.json", b"{}"), ("tiny.gguf", b"x")],
            "has neither model.safetensors nor model.safetensors.index.json; weights in other formats are \
             not read",
        ),
        (
            &[("config.json", b"{}"), ("model.safetensors.index.json", evil)],
            "model.safetensors.index.json names \"../../evil\", which is not a file in the same directory",
        ),
        (
            &[("config.json", b"{}"), ("model.safetensors.index.json", b"[")],
            "model.safetensors.index.json cannot be read: EOF while parsing a list at line 1 column 1",
        ),
    ];
    for (files, expected) in cases {
        let (dir, fake) = (temp(), FakeHub::serve(files).await);
        let error = refusal(fetch(&fake.cache(dir.path()), "hf://acme/tiny").await);
        assert_eq!(error.to_string(), format!("model.base: hf://acme/tiny@{COMMIT}: {expected}"));
        assert!(!error.is_transient());
        assert_eq!(fake.requests().1, [] as [&str; 0]);
    }
}

#[tokio::test]
async fn errors_of_the_hub_do_not_contain_the_token() {
    let (dir, fake) = (temp(), FakeHub::serve(&TINY).await);
    let missing = refusal(fetch(&fake.cache(dir.path()), "hf://acme/tiny@nowhere").await);
    assert_eq!(
        missing.to_string(),
        "model.base: hf://acme/tiny@nowhere: the hub has no such model, revision or file"
    );
    for token in [None, Some("hf_of_somebody_else".to_owned())] {
        let has = if token.is_some() { "its HF_TOKEN" } else { "no HF_TOKEN" };
        let hub = Hub::new(Some(fake.hub.url.clone()), token);
        let cache =
            InputFetcher::with(dir.path(), LARGE_CACHE, Vec::new(), RemoteBases::new(hub, Vec::new()))
                .unwrap();
        let error = refusal(fetch(&cache, "hf://acme/tiny").await);
        assert!(!error.is_transient());
        let expected = "model.base: hf://acme/tiny@main: the hub returned 401 Unauthorized: the model does \
                        not exist, or is private or gated; this worker has ";
        assert_eq!(error.to_string(), format!("{expected}{has}"));
    }
    let broken = HttpServer::serve(|_| FakeResponse::new(503, "")).await;
    let hub = Hub::new(Some(broken.url.clone()), None);
    let cache =
        InputFetcher::with(dir.path(), LARGE_CACHE, Vec::new(), RemoteBases::new(hub, Vec::new())).unwrap();
    assert!(refusal(fetch(&cache, "hf://acme/tiny").await).is_transient());
}

#[test]
fn repository_names_are_parsed() {
    for text in ["acme/tiny", "acme/tiny@main", "a-b.c/d_e@refs/pr/1", "acme/tiny@v1.0"] {
        assert!(Repository::parse(text).is_some(), "{text}");
    }
    let long = format!("acme/{}", "x".repeat(200));
    for text in [
        "",
        "tiny",
        "/tiny",
        "acme/",
        "acme/tiny/",
        "acme/tiny/sub",
        "acme/tiny@",
        "acme/..",
        "../tiny",
        "acme/tiny@..",
        "acme/tiny@a/../b",
        "acme/tiny@a//b",
        "acme/ti ny",
        "acme/tiny?x",
        "acme/tiny@a?b",
        "a%2fb/c",
        &long,
    ] {
        assert!(Repository::parse(text).is_none(), "{text}");
    }
}
