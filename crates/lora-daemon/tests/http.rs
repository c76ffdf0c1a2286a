//! Health and metrics over HTTP.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail the test")]

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use lora_daemon::http::{Health, HttpConfig, serve};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::registry::Registry;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

const TEST_TIMEOUT: Duration = Duration::from_secs(20);

struct Server {
    address: SocketAddr,
    stop: CancellationToken,
    serving: JoinHandle<std::io::Result<()>>,
}

impl Server {
    async fn start(registry: Registry, health: Health) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let stop = CancellationToken::new();
        let serving = tokio::spawn(serve(listener, registry, health, stop.clone()));
        Self { address, stop, serving }
    }

    /// Requests `path` and returns status line, headers and body.
    async fn get(&self, path: &str) -> (String, String, String) {
        let answer = async {
            let mut stream = TcpStream::connect(self.address).await.unwrap();
            let request = format!("GET {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n");
            stream.write_all(request.as_bytes()).await.unwrap();
            let mut text = String::new();
            stream.read_to_string(&mut text).await.unwrap();
            text
        };
        let text = timeout(TEST_TIMEOUT, answer).await.unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        let (status, headers) = head.split_once("\r\n").unwrap();
        (status.to_owned(), headers.to_owned(), body.to_owned())
    }

    async fn status_and_body(&self, path: &str) -> (String, String) {
        let (status, _, body) = self.get(path).await;
        (status, body)
    }
}

fn ok() -> (String, String) {
    ("HTTP/1.1 200 OK".into(), "ok\n".into())
}

fn unavailable(reason: &str) -> (String, String) {
    ("HTTP/1.1 503 Service Unavailable".into(), format!("{reason}\n"))
}

#[tokio::test]
async fn readyz_returns_the_last_state() {
    let health = Health::default();
    let server = Server::start(Registry::default(), health.clone()).await;
    assert_eq!(server.status_and_body("/readyz").await, unavailable("starting"));
    health.set_ready(true, "");
    assert_eq!(server.status_and_body("/readyz").await, ok());
    health.set_ready(false, "draining");
    assert_eq!(server.status_and_body("/readyz").await, unavailable("draining"));
    assert_eq!(server.status_and_body("/healthz").await, ok(), "readiness does not change health");
}

#[tokio::test]
async fn healthz_calls_the_check_each_time() {
    let works = Arc::new(AtomicBool::new(true));
    let flag = works.clone();
    let check = move || match flag.load(Ordering::Relaxed) {
        true => Ok(()),
        false => Err("the engine has ended".to_owned()),
    };
    let server = Server::start(Registry::default(), Health::new(check)).await;
    assert_eq!(server.status_and_body("/healthz").await, ok());
    works.store(false, Ordering::Relaxed);
    assert_eq!(server.status_and_body("/healthz").await, unavailable("the engine has ended"));
}

#[tokio::test]
async fn metrics_are_open_metrics_text() {
    let steps = Counter::<u64>::default();
    let mut registry = Registry::with_prefix("lora");
    registry.register("steps", "Finished steps", steps.clone());
    let server = Server::start(registry, Health::default()).await;
    steps.inc_by(3);
    let (status, headers, body) = server.get("/metrics").await;
    assert_eq!(status, "HTTP/1.1 200 OK");
    assert!(headers.contains("content-type: application/openmetrics-text; version=1.0.0; charset=utf-8"));
    assert_eq!(
        body,
        "# HELP lora_steps Finished steps.\n# TYPE lora_steps counter\nlora_steps_total 3\n# EOF\n"
    );
}

#[tokio::test]
async fn other_paths_are_not_found() {
    let server = Server::start(Registry::default(), Health::default()).await;
    assert_eq!(server.get("/").await.0, "HTTP/1.1 404 Not Found");
}

#[tokio::test]
async fn shutdown_does_not_wait_for_idle_connections() {
    let server = Server::start(Registry::default(), Health::default()).await;
    let mut silent = TcpStream::connect(server.address).await.unwrap();
    silent.write_all(b"GET /healthz HTTP/1.1\r\n").await.unwrap();
    assert_eq!(server.status_and_body("/healthz").await, ok());
    server.stop.cancel();
    timeout(TEST_TIMEOUT, server.serving).await.unwrap().unwrap().unwrap();
    assert!(TcpStream::connect(server.address).await.is_err(), "the port is free again");
}

#[test]
fn listen_is_an_address_or_empty() {
    let address = |listen: &str| HttpConfig { listen: listen.into() }.address();
    assert_eq!(address(""), Ok(None));
    assert_eq!(address("127.0.0.1:7401"), Ok(Some(SocketAddr::from((Ipv4Addr::LOCALHOST, 7401)))));
    assert_eq!(
        address("localhost:7401").unwrap_err().to_string(),
        "http.listen: is \"localhost:7401\"; it must be an IP address with a port, such as 0.0.0.0:7401, \
         or empty for none"
    );
}
