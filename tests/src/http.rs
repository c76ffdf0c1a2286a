//! A minimal HTTP client for the health and metrics endpoints of a daemon.

use std::io::{Read, Write};
use std::net::TcpStream;

use crate::process::WAIT_TIMEOUT;

/// A response.
#[derive(Debug, PartialEq, Eq)]
pub struct HttpResponse {
    /// The status, such as 200.
    pub status: u16,
    /// The body as text.
    pub body: String,
}

/// Sends a GET request for `path` to `address`, which is `host:port`.
pub fn get(address: &str, path: &str) -> HttpResponse {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(WAIT_TIMEOUT)).unwrap();
    write!(stream, "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    let status = head.split_whitespace().nth(1).unwrap().parse().unwrap();
    HttpResponse { status, body: body.to_owned() }
}
