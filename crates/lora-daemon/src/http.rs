//! Health and metrics over HTTP: `/healthz`, `/readyz`, `/metrics`.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use lora_spec::FieldError;
use prometheus_client::encoding::text::encode;
use prometheus_client::registry::Registry;
use serde::{Deserialize, Serialize};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// The time limit for open requests after a shutdown request.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(1);
const OPEN_METRICS_CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Settings of the HTTP server for health and metrics.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HttpConfig {
    /// Address and port, such as `0.0.0.0:7401`; empty: no HTTP server.
    pub listen: String,
}

impl HttpConfig {
    /// Returns the address to listen on, or `None` if the setting is empty.
    ///
    /// # Errors
    /// The setting is not an address with a port.
    pub fn address(&self) -> Result<Option<SocketAddr>, FieldError> {
        if self.listen.is_empty() {
            return Ok(None);
        }
        self.listen.parse().map(Some).map_err(|_| {
            let message = format!(
                "is {:?}; it must be an IP address with a port, such as 0.0.0.0:7401, or empty for none",
                self.listen
            );
            FieldError::new("http.listen", message)
        })
    }
}

/// The state that `/healthz` and `/readyz` report. Initially the daemon is healthy but not ready.
/// Clones share the state.
#[derive(Clone)]
pub struct Health(Arc<Inner>);

struct Inner {
    check_health: Box<dyn Fn() -> Result<(), String> + Send + Sync>,
    ready: watch::Sender<Result<(), String>>,
}

impl Health {
    /// Creates a state in which each request to `/healthz` calls `check_health`, which must not
    /// block. Its error describes what does not work.
    pub fn new(check_health: impl Fn() -> Result<(), String> + Send + Sync + 'static) -> Self {
        let (ready, _) = watch::channel(Err("starting".to_owned()));
        Self(Arc::new(Inner { check_health: Box::new(check_health), ready }))
    }

    /// Sets whether `/readyz` reports that the daemon is ready for work, and the reason if not.
    pub fn set_ready(&self, ready: bool, reason: &str) {
        let state = if ready { Ok(()) } else { Err(reason.to_owned()) };
        self.0.ready.send_modify(|current| *current = state);
    }
}

impl Default for Health {
    /// Returns the state of a daemon that is healthy as long as it responds.
    fn default() -> Self {
        Self::new(|| Ok(()))
    }
}

impl fmt::Debug for Health {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Health").field("ready", &*self.0.ready.borrow()).finish_non_exhaustive()
    }
}

/// Serves health and metrics until `stop` is cancelled. Open requests then have
/// one second to finish.
///
/// # Errors
/// The server fails.
pub async fn serve(
    listener: TcpListener,
    registry: Registry,
    health: Health,
    stop: CancellationToken,
) -> io::Result<()> {
    let router = Router::new()
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .with_state(health)
        .route("/metrics", get(metrics))
        .with_state(Arc::new(registry));
    let timed_out = async {
        stop.cancelled().await;
        tokio::time::sleep(SHUTDOWN_TIMEOUT).await;
    };
    let graceful = axum::serve(listener, router).with_graceful_shutdown(stop.clone().cancelled_owned());
    tokio::select! {
        served = graceful => served,
        () = timed_out => Ok(()),
    }
}

async fn healthz(State(health): State<Health>) -> Response {
    response((health.0.check_health)())
}

async fn readyz(State(health): State<Health>) -> Response {
    response(health.0.ready.borrow().clone())
}

async fn metrics(State(registry): State<Arc<Registry>>) -> Response {
    let mut text = String::new();
    match encode(&mut text, &registry) {
        Ok(()) => ([(CONTENT_TYPE, OPEN_METRICS_CONTENT_TYPE)], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")).into_response(),
    }
}

fn response(state: Result<(), String>) -> Response {
    match state {
        Ok(()) => (StatusCode::OK, "ok\n".to_owned()).into_response(),
        Err(reason) => (StatusCode::SERVICE_UNAVAILABLE, format!("{reason}\n")).into_response(),
    }
}
