//! Accepted TCP connections, for gRPC servers.

use std::io;

use tokio::net::{TcpListener, TcpStream};
use tokio_stream::{Stream, StreamExt};

/// Returns the connections that `listener` accepts, each with `TCP_NODELAY`.
///
/// Without the option, the kernel delays the end of a response until the client has acknowledged
/// its beginning, and clients delay acknowledgements by 40 ms. tonic ignores its own `tcp_nodelay`
/// setting when it serves a stream of connections.
#[expect(clippy::disallowed_types, reason = "the option is set on each connection below")]
pub fn incoming(listener: TcpListener) -> impl Stream<Item = io::Result<TcpStream>> + Send {
    tokio_stream::wrappers::TcpListenerStream::new(listener).map(|accepted| {
        let stream = accepted?;
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "could not set TCP_NODELAY");
        }
        Ok(stream)
    })
}
