//! Bases that are named by path.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use lora_proto::v1;
use lora_test_kit::artifacts::FakeArtifacts;
use lora_test_kit::server::TestServer;

use super::super::remote::{RemoteBases, hub::Hub};
use super::super::{FetchError, InputFetcher};
use super::{LARGE_CACHE, inputs_with, refusal, temp};

struct RootsFixture {
    cache: InputFetcher,
    store: FakeArtifacts,
    server: TestServer,
}

impl RootsFixture {
    async fn with_roots(dir: &Path, roots: &[&Path]) -> Self {
        let roots = roots.iter().map(|root| root.to_path_buf()).collect();
        let cache = InputFetcher::with(
            &dir.join("cache"),
            LARGE_CACHE,
            roots,
            RemoteBases::new(Hub::new(None, None), Vec::new()),
        )
        .unwrap();
        let (store, server) = FakeArtifacts::serve().await;
        store.add(b"rows");
        Self { cache, store, server }
    }

    async fn base(&self, path: &str) -> Result<PathBuf, FetchError> {
        let inputs = inputs_with(v1::base::Source::Path(path.to_owned()), b"rows");
        Ok(self.cache.inputs(&inputs, self.server.channel()).await?.base)
    }

    async fn refused(&self, path: &str) -> String {
        let inputs = inputs_with(v1::base::Source::Path(path.to_owned()), b"rows");
        let error = refusal(self.cache.inputs(&inputs, self.server.channel()).await);
        assert!(!error.is_transient());
        assert!(self.store.offsets().is_empty(), "the path is refused before anything is fetched");
        error.to_string()
    }
}

#[tokio::test]
async fn base_paths_must_be_under_a_model_root() {
    let dir = temp();
    let dir = dir.path().canonicalize().unwrap();
    for name in ["models/tiny", "models-private/x", "elsewhere"] {
        fs::create_dir_all(dir.join(name)).unwrap();
    }
    fs::write(dir.join("models/file"), "").unwrap();
    symlink(dir.join("elsewhere"), dir.join("models/escape")).unwrap();
    symlink("tiny", dir.join("models/alias")).unwrap();
    symlink(dir.join("models"), dir.join("link")).unwrap();
    let path = |name: &str| dir.join(name).display().to_string();
    let models = dir.join("models");
    let roots = format!(
        "this worker's model_roots ({}); it must be a directory under one of them, or a URL",
        models.display()
    );

    let fixture = RootsFixture::with_roots(&dir, &[&models]).await;
    for name in ["models-private/x", "elsewhere", "models/escape", "models/../elsewhere", "models/tiny/../.."]
    {
        let expected = format!("model.base: {} is not under {roots}", path(name));
        assert_eq!(fixture.refused(&path(name)).await, expected);
    }
    let missing = path("models/missing");
    let expected = format!("model.base: {missing} is not a directory under {roots}");
    assert_eq!(fixture.refused(&missing).await, expected);
    let outside = path("elsewhere/missing");
    let expected = format!("model.base: {outside} is not a directory under {roots}");
    assert_eq!(fixture.refused(&outside).await, expected);
    assert_eq!(fixture.refused("models/tiny").await, "model.base: models/tiny is not an absolute path");
    let file = path("models/file");
    assert_eq!(fixture.refused(&file).await, format!("model.base: {file} is not a directory"));
    for name in ["models/tiny", "models/alias", "link/tiny", "elsewhere/../models/tiny"] {
        assert_eq!(fixture.base(&path(name)).await.unwrap(), models.join("tiny"));
    }
    assert_eq!(fixture.base(&path("models")).await.unwrap(), models);

    let linked = RootsFixture::with_roots(&dir, &[&dir.join("missing"), &dir.join("link")]).await;
    assert_eq!(linked.base(&path("models/tiny")).await.unwrap(), models.join("tiny"));
    let everything = RootsFixture::with_roots(&dir, &[Path::new("/")]).await;
    assert_eq!(everything.base(&path("models/escape")).await.unwrap(), dir.join("elsewhere"));
    let nothing = RootsFixture::with_roots(&dir, &[]).await;
    let refused = nothing.refused(&path("models/tiny")).await;
    assert!(refused.contains("model_roots (none are set)"), "{refused}");
}

#[test]
fn model_roots_must_be_absolute() {
    let dir = temp();
    let cache = InputFetcher::with(
        dir.path(),
        LARGE_CACHE,
        vec!["models".into()],
        RemoteBases::new(Hub::new(None, None), Vec::new()),
    );
    assert_eq!(cache.err().unwrap().to_string(), "model_roots: models is not an absolute path");
}
