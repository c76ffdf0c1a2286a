//! Just enough HTTP to ask a daemon how it is.

use std::io::{Read, Write};
use std::net::TcpStream;

use crate::process::WAIT_TIMEOUT;

/// What was answered.
#[derive(Debug, PartialEq, Eq)]
pub struct HttpResponse {
    /// The status, such as 200.
    pub status: u16,
    /// The text.
    pub body: String,
}

/// Gets `path` from `host:port`.
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
