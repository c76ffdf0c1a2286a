//! A gRPC server on a free port of the loopback interface.

use std::net::{Ipv4Addr, SocketAddr};

use lora_daemon::incoming::incoming;
use tokio::net::TcpListener;
use tokio_util::task::AbortOnDropHandle;
use tonic::transport::Channel;
use tonic::transport::server::Router;

/// A server that ends when it is dropped.
#[derive(Debug)]
pub struct TestServer {
    /// Where the server listens.
    pub address: SocketAddr,
    _serving: AbortOnDropHandle<()>,
}

impl TestServer {
    /// Serves the services of `router`. An error of the server fails the task, not the test: the
    /// clients of the test then get no answer.
    pub async fn serve(router: Router) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let serving = async move { router.serve_with_incoming(incoming(listener)).await.unwrap() };
        Self { address, _serving: AbortOnDropHandle::new(tokio::spawn(serving)) }
    }

    /// `http://host:port`
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Returns a channel that connects at its first call.
    pub fn channel(&self) -> Channel {
        Channel::from_shared(self.url()).unwrap().connect_lazy()
    }
}
