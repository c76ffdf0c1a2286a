//! Bases in object stores, with a fake S3.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use lora_proto::{DigestBuilder, v1};
use lora_test_kit::artifacts::FakeArtifacts;

use super::super::remote::{RemoteBases, hub::Hub};
use super::super::{FetchError, FetchedFiles, InputFetcher};
use super::http::{FakeResponse, HttpServer, Request};
use super::{LARGE_CACHE, inputs_with, refusal, temp, tree};

const SECRET: &str = "VerySecretAccessKey";

type Objects = Arc<Mutex<BTreeMap<String, Vec<u8>>>>;

/// An S3 with the bucket `models`.
struct FakeS3 {
    server: HttpServer,
    objects: Objects,
    /// The next object breaks after this number of bytes. 0: it does not break.
    cut: Arc<AtomicUsize>,
}

impl FakeS3 {
    async fn serve(objects: &[(&str, &[u8])]) -> Self {
        let objects = objects.iter().map(|(name, content)| ((*name).to_owned(), content.to_vec())).collect();
        let objects: Objects = Arc::new(Mutex::new(objects));
        let cut = Arc::new(AtomicUsize::new(0));
        let (shown, cuts) = (objects.clone(), cut.clone());
        let server = HttpServer::serve(move |request| answer(request, &shown.lock().unwrap(), &cuts)).await;
        Self { server, objects, cut }
    }

    fn cache(&self, dir: &Path) -> InputFetcher {
        let settings = [
            ("AWS_ENDPOINT", self.server.url.as_str()),
            ("AWS_ALLOW_HTTP", "true"),
            ("AWS_ACCESS_KEY_ID", "somebody"),
            ("AWS_SECRET_ACCESS_KEY", SECRET),
            ("AWS_REGION", "here"),
        ];
        let settings =
            settings.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        InputFetcher::with(dir, LARGE_CACHE, Vec::new(), RemoteBases::new(Hub::new(None, None), settings))
            .unwrap()
    }

    /// The paths of the requested objects since the last call. A listing is `list`.
    fn requests(&self) -> Vec<String> {
        let requests = self.server.take_requests().into_iter();
        requests
            .map(|request| match request.target.split_once('?') {
                Some((_, query)) if query.contains("list-type=2") => "list".to_owned(),
                _ => request.target,
            })
            .collect()
    }
}

fn answer(request: &Request, objects: &BTreeMap<String, Vec<u8>>, cut: &AtomicUsize) -> FakeResponse {
    assert!(request.headers["authorization"].starts_with("AWS4-HMAC-SHA256 Credential=somebody/"));
    let etag = |content: &[u8]| format!("\"{}\"", &DigestBuilder::of_bytes(content).hex()[..32]);
    let (path, query) = request.target.split_once('?').unwrap_or((&request.target, ""));
    if path == "/broken" {
        return FakeResponse::new(
            400,
            format!("<Error><Code>AuthorizationHeaderMalformed</Code>{SECRET}</Error>"),
        );
    }
    if path == "/private" {
        return FakeResponse::new(
            403,
            format!("<Error><Code>AccessDenied</Code><Key>{SECRET}</Key></Error>"),
        );
    }
    if path == "/models" {
        let prefix = query.split('&').find_map(|pair| pair.strip_prefix("prefix=")).unwrap();
        let prefix = prefix.replace("%2F", "/");
        let entry = |(key, content): (&String, &Vec<u8>)| {
            format!(
                "<Contents><Key>{key}</Key><LastModified>2026-01-02T03:04:05.000Z</LastModified><ETag>{}</ETag>\
                 <Size>{}</Size></Contents>",
                etag(content).replace('"', "&quot;"),
                content.len()
            )
        };
        let entries: String = objects.iter().filter(|(key, _)| key.starts_with(&prefix)).map(entry).collect();
        let list = format!("<ListBucketResult><IsTruncated>false</IsTruncated>{entries}</ListBucketResult>");
        return FakeResponse::new(200, list);
    }
    let content = path.strip_prefix("/models/").and_then(|key| objects.get(key));
    let Some(content) = content else {
        return FakeResponse::new(404, "<Error><Code>NoSuchKey</Code></Error>");
    };
    if request.headers.get("if-match").is_some_and(|expected| *expected != etag(content)) {
        return FakeResponse::new(412, "");
    }
    let mut answer = FakeResponse::file(request, content);
    answer.cut = Some(cut.swap(0, Ordering::Relaxed)).filter(|bytes| *bytes > 0);
    answer.with("etag", etag(content)).with("last-modified", "Fri, 02 Jan 2026 03:04:05 GMT")
}

async fn fetch(cache: &InputFetcher, url: &str) -> Result<FetchedFiles, FetchError> {
    let (store, server) = FakeArtifacts::serve().await;
    store.add(b"rows");
    cache.inputs(&inputs_with(v1::base::Source::Url(url.to_owned()), b"rows"), server.channel()).await
}

const INDEX: &[u8] = br#"{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}"#;
const TINY: [(&str, &[u8]); 8] = [
    ("team/tiny/config.json", b"{}"),
    ("team/tiny/model-1.safetensors", b"one"),
    ("team/tiny/model-2.safetensors", b"two"),
    ("team/tiny/model.safetensors.index.json", INDEX),
    ("team/tiny/notes.md", b"no"),
    ("team/tiny/old/model.safetensors", b"no"),
    ("team/tiny/tokenizer.json", b"{\"tokens\": 1}"),
    ("team/tiny2/model.safetensors", b"no"),
];

#[tokio::test]
async fn only_changed_objects_are_fetched_again() {
    let (dir, fake) = (temp(), FakeS3::serve(&TINY).await);
    let cache = fake.cache(dir.path());
    let got = fetch(&cache, "s3://models/team/tiny/").await.unwrap();
    let mut names: Vec<_> =
        tree(&got.base).into_iter().map(|path| path.strip_prefix(&got.base).unwrap().to_owned()).collect();
    names.sort();
    let files = [
        "config.json",
        "model-1.safetensors",
        "model-2.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
    ];
    assert_eq!(names, files.map(Path::new));
    assert_eq!(fs::read(got.base.join("model-2.safetensors")).unwrap(), b"two");
    fake.requests();

    let again = fetch(&fake.cache(dir.path()), "s3://models/team/tiny").await.unwrap();
    assert_eq!((again.base, fake.requests()), (got.base.clone(), vec!["list".to_owned()]));

    fake.objects.lock().unwrap().insert("team/tiny/model-1.safetensors".to_owned(), b"1.0".to_vec());
    let changed = fetch(&cache, "s3://models/team/tiny").await.unwrap();
    assert_ne!(changed.base, got.base);
    assert_eq!(fs::read(changed.base.join("model-1.safetensors")).unwrap(), b"1.0");
    assert_eq!(fs::read(got.base.join("model-1.safetensors")).unwrap(), b"one");
    assert_eq!(fake.requests(), ["list", "/models/team/tiny/model-1.safetensors"]);
}

#[tokio::test]
async fn a_partial_file_is_resumed() {
    let weights: Vec<u8> = (0..100_000).map(|i| (i % 253) as u8).collect();
    let objects: [(&str, &[u8]); 2] = [("x/config.json", b"{}"), ("x/model.safetensors", &weights)];
    let (dir, fake) = (temp(), FakeS3::serve(&objects).await);
    let cache = fake.cache(dir.path());
    // The object store library itself resumes after a broken connection.
    fake.cut.store(1, Ordering::Relaxed);
    let got = fetch(&cache, "s3://models/x").await.unwrap();
    assert_eq!(fs::read(got.base.join("model.safetensors")).unwrap(), weights);
    // The bytes that an earlier process fetched are not fetched again.
    let object = fs::read_dir(dir.path().join("objects"))
        .unwrap()
        .map(|entry| entry.unwrap())
        .find(|entry| entry.metadata().unwrap().len() == 100_000)
        .unwrap();
    let key = object.file_name();
    drop(got);
    drop(
        InputFetcher::with(dir.path(), 0, Vec::new(), RemoteBases::new(Hub::new(None, None), Vec::new()))
            .unwrap(),
    );
    assert!(tree(dir.path()).is_empty());
    let part = dir.path().join("partial").join(key);
    fs::create_dir_all(&part).unwrap();
    fs::write(part.join("content"), &weights[..60_000]).unwrap();
    fake.server.take_requests();
    let got = fetch(&cache, "s3://models/x").await.unwrap();
    assert_eq!(fs::read(got.base.join("model.safetensors")).unwrap(), weights);
    let requests = fake.server.take_requests();
    assert!(requests.iter().any(|request| request.headers.get("range").is_some_and(|r| r == "bytes=60000-")));
}

#[tokio::test]
async fn errors_of_an_object_store_contain_no_secrets() {
    let (dir, fake) = (temp(), FakeS3::serve(&TINY).await);
    let cache = fake.cache(dir.path());
    for (url, expected) in [
        ("s3://models/nowhere", "contains no files"),
        ("s3://broken/x", "the store returned 400 (AuthorizationHeaderMalformed)"),
        ("s3://models/team/tiny/old", "has no config.json"),
        (
            "s3://private/x",
            "the store refuses access (AccessDenied): check the worker's AWS_*, GOOGLE_* or AZURE_* \
             environment variables",
        ),
    ] {
        let error = refusal(fetch(&cache, url).await);
        assert_eq!(error.to_string(), format!("model.base: {url}: {expected}"));
        assert!(!error.is_transient());
    }
    fake.objects.lock().unwrap().remove("team/tiny/model-2.safetensors");
    let error = refusal(fetch(&cache, "s3://models/team/tiny").await).to_string();
    assert_eq!(error, "model.base: s3://models/team/tiny: has no model-2.safetensors, which its index names");
}

#[tokio::test]
async fn unsupported_urls_are_rejected() {
    let (dir, fake) = (temp(), FakeS3::serve(&[]).await);
    let cache = fake.cache(dir.path());
    let supported = "supported: hf://org/name[@revision], s3://bucket/prefix, gs://bucket/prefix, \
                     az://container/prefix, or an absolute path under the worker's model_roots";
    let secret = "a URL with a user, a password or a query is not accepted; credentials come from the \
                  workers' environment";
    for (url, expected) in [
        ("ftp://host/x", format!("ftp:// is not supported; {supported}")),
        ("http://host/x", format!("http:// is not supported; {supported}")),
        ("memory:///x", format!("memory:// is not supported; {supported}")),
        ("s3:///x", "s3:///x has no bucket".to_owned()),
        ("file:///models/x", "file:///models/x is not accepted; use the path itself, /models/x".to_owned()),
        ("hf://tiny", "an hf:// URL must have the form hf://org/name[@revision]".to_owned()),
        ("hf://me:hunter2@acme/tiny", "an hf:// URL must have the form hf://org/name[@revision]".to_owned()),
        ("s3://me:hunter2@bucket/x", secret.to_owned()),
        ("s3://me@bucket/x", secret.to_owned()),
        ("https://bucket.s3.here.amazonaws.com/x?X-Amz-Signature=hunter2", secret.to_owned()),
        ("no url", format!("is not a URL: relative URL without a base; {supported}")),
        (
            "https://host/x",
            "https://host/x: the files of an https:// server cannot be listed, except S3's and Azure's; \
             upload the base, or use hf:// or s3://"
                .to_owned(),
        ),
    ] {
        let error = refusal(fetch(&cache, url).await);
        assert_eq!(error.to_string(), format!("model.base: {expected}"));
        assert!(!error.is_transient());
    }
    assert!(fake.requests().is_empty());
}
