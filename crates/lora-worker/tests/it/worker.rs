//! A worker as a task of the test.

use lora_worker::{Config, WorkerError};
use tempfile::TempDir;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::fake::{FakeCoordinator, WAIT_TIMEOUT, WorkerStream};
use crate::job::base;

pub(crate) struct TestWorker {
    pub(crate) stop: CancellationToken,
    immediate: CancellationToken,
    running: JoinHandle<Result<(), WorkerError>>,
    _cache: TempDir,
}

impl TestWorker {
    pub(crate) fn start(fake: &FakeCoordinator, name: &str) -> Self {
        Self::start_with(fake, name, |_| {})
    }

    pub(crate) fn start_with(fake: &FakeCoordinator, name: &str, change: impl FnOnce(&mut Config)) -> Self {
        let cache = tempfile::tempdir().unwrap();
        let mut config = Config {
            name: name.into(),
            coordinator: fake.server.url(),
            cache_dir: cache.path().into(),
            threads: 1,
            model_roots: vec![base()],
            ..Config::default()
        };
        config.peer.listen = "127.0.0.1:0".into();
        config.http.listen = "127.0.0.1:0".into();
        change(&mut config);
        config.check().unwrap();
        let (stop, immediate) = (CancellationToken::new(), CancellationToken::new());
        let running = tokio::spawn(lora_worker::run(config, stop.clone(), immediate.clone()));
        Self { stop, immediate, running, _cache: cache }
    }

    /// Waits until it ends by itself.
    pub(crate) async fn ended(self) {
        timeout(WAIT_TIMEOUT, self.running).await.expect("the worker ends").unwrap().unwrap();
    }

    /// Ends the worker without draining. `link` is its stream.
    pub(crate) async fn kill(self, mut link: WorkerStream) {
        self.immediate.cancel();
        link.closed().await;
        drop(link);
        self.ended().await;
    }
}
