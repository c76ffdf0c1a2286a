//! The coordinator as a whole: its settings, its servers, and its end.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use lora_proto::MAX_MESSAGE_BYTES;
use lora_proto::v1::artifacts_server::ArtifactsServer;
use lora_proto::v1::fine_tuning_server::FineTuningServer;
use lora_proto::v1::worker_control_server::WorkerControlServer;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_stream::wrappers::TcpListenerStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::transport::Server;

use crate::command::Command;
use crate::rpc::{Artifacts, Commands, FineTuning, WorkerControl};
use crate::service::Service;

/// Commands that may wait for the service; callers beyond it wait for room.
const WAITING_COMMANDS: usize = 256;
/// A silent connection is asked for a sign of life this often, and given up when none comes.
const KEEPALIVE: Duration = Duration::from_secs(10);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(20);
/// How long connections may take to end at shutdown.
const FAREWELL: Duration = Duration::from_secs(3);

/// Settings of a coordinator.
#[derive(Debug, Clone)]
pub struct Options {
    /// Where it serves gRPC; port 0 takes a free one.
    pub listen: SocketAddr,
    /// Events of a job that are kept for watchers.
    pub retained_events: usize,
}

impl Default for Options {
    /// A free port on loopback, and 65536 events a job.
    fn default() -> Self {
        Self { listen: (Ipv4Addr::LOCALHOST, 0).into(), retained_events: 1 << 16 }
    }
}

/// Why a coordinator cannot start, or ended.
#[derive(Debug, thiserror::Error)]
pub enum CoordinatorError {
    /// The address cannot be taken.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// Why not.
        source: std::io::Error,
    },
    /// The gRPC server broke.
    #[error("gRPC server: {0}")]
    Serve(#[from] tonic::transport::Error),
    /// A bug: the service's thread panicked.
    #[error("the coordinator's service broke: {0}")]
    Service(#[from] tokio::task::JoinError),
}

/// A coordinator that listens but does not serve yet.
#[derive(Debug)]
pub struct Coordinator {
    listener: TcpListener,
    handle: Handle,
    retained_events: usize,
}

/// Where a coordinator is reached, and how it is ended.
#[derive(Debug, Clone)]
pub struct Handle {
    address: SocketAddr,
    stop: CancellationToken,
}

impl Handle {
    /// The address it serves gRPC on.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Tells workers to end, then ends the coordinator.
    pub fn shutdown(&self) {
        self.stop.cancel();
    }
}

impl Coordinator {
    /// Takes the address.
    pub async fn bind(options: &Options) -> Result<Self, CoordinatorError> {
        let listen = |source| CoordinatorError::Listen { address: options.listen, source };
        let listener = TcpListener::bind(options.listen).await.map_err(listen)?;
        let address = listener.local_addr().map_err(listen)?;
        let handle = Handle { address, stop: CancellationToken::new() };
        Ok(Self { listener, handle, retained_events: options.retained_events })
    }

    /// A handle to it.
    pub fn handle(&self) -> Handle {
        self.handle.clone()
    }

    /// Serves until [`Handle::shutdown`]. If the service's thread breaks, everything ends with it.
    pub async fn serve(self) -> Result<(), CoordinatorError> {
        let stop = self.handle.stop;
        let (sender, receiver) = mpsc::channel(WAITING_COMMANDS);
        let service = Service::new(receiver, self.retained_events);
        let runtime = tokio::runtime::Handle::current();
        let service = tokio::task::spawn_blocking({
            let stop = stop.clone();
            move || {
                let _stop_all = stop.drop_guard();
                service.run(&runtime);
            }
        });
        let sessions = TaskTracker::new();
        let commands = Commands::new(sender.clone());
        let control = WorkerControl::new(commands.clone(), sessions.clone());
        let server = Server::builder()
            .http2_keepalive_interval(Some(KEEPALIVE))
            .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
            .add_service(
                FineTuningServer::new(FineTuning::new(commands.clone()))
                    .max_decoding_message_size(MAX_MESSAGE_BYTES),
            )
            .add_service(WorkerControlServer::new(control).max_decoding_message_size(MAX_MESSAGE_BYTES))
            .add_service(
                ArtifactsServer::new(Artifacts::new(commands)).max_decoding_message_size(MAX_MESSAGE_BYTES),
            )
            .serve_with_incoming_shutdown(
                TcpListenerStream::new(self.listener),
                stop.clone().cancelled_owned(),
            );
        let mut server = Box::pin(server);
        let served = tokio::select! {
            served = &mut server => served,
            () = stop.cancelled() => {
                // Fails only if the service has ended, which is what is wanted.
                let _ = sender.send(Command::Shutdown).await;
                // Whoever has not gone by then is cut off.
                timeout(FAREWELL, server).await.unwrap_or(Ok(()))
            }
        };
        stop.cancel();
        drop(sender);
        sessions.close();
        service.await?;
        sessions.wait().await;
        Ok(served?)
    }
}
