//! Accepted connections.

use std::pin::pin;

use lora_daemon::incoming::incoming;
use tokio::net::{TcpListener, TcpStream};
use tokio_stream::StreamExt;

#[tokio::test]
async fn every_accepted_connection_has_tcp_nodelay() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let mut accepted = pin!(incoming(listener));
    for _ in 0..3 {
        let client = TcpStream::connect(address).await.unwrap();
        let stream = accepted.next().await.unwrap().unwrap();
        assert_eq!(stream.peer_addr().unwrap(), client.local_addr().unwrap());
        assert!(stream.nodelay().unwrap());
        // The option must not be a default of the system, or this test would prove nothing.
        assert!(!client.nodelay().unwrap());
    }
}
