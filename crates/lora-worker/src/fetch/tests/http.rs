//! A small HTTP server.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

/// A request without a body.
#[derive(Debug, Clone)]
pub(super) struct Request {
    pub(super) method: String,
    /// Path and query.
    pub(super) target: String,
    /// Values by name, with names in lower case.
    pub(super) headers: HashMap<String, String>,
}

#[derive(Default)]
pub(super) struct FakeResponse {
    pub(super) status: u16,
    pub(super) headers: Vec<(&'static str, String)>,
    pub(super) body: Vec<u8>,
    /// The connection ends after this number of bytes of the body.
    pub(super) cut: Option<usize>,
}

/// Serves on a free port of the loopback interface until it is dropped.
pub(super) struct HttpServer {
    /// `http://host:port`
    pub(super) url: String,
    requests: Arc<Mutex<Vec<Request>>>,
    task: JoinHandle<()>,
}

impl HttpServer {
    pub(super) async fn serve(handler: impl Fn(&Request) -> FakeResponse + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let requests: Arc<Mutex<Vec<Request>>> = Arc::default();
        let (seen, handler) = (requests.clone(), Arc::new(handler));
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (seen, handler) = (seen.clone(), handler.clone());
                tokio::spawn(async move {
                    let mut stream = BufReader::new(stream);
                    if let Ok(request) = read(&mut stream).await {
                        seen.lock().unwrap().push(request.clone());
                        // The client may have disconnected.
                        let _ = write(&mut stream, &request, handler(&request)).await;
                    }
                });
            }
        });
        Self { url, requests, task }
    }

    /// Returns the requests since the last call.
    pub(super) fn take_requests(&self) -> Vec<Request> {
        std::mem::take(&mut *self.requests.lock().unwrap())
    }
}

impl Drop for HttpServer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl FakeResponse {
    pub(super) fn new(status: u16, body: impl Into<Vec<u8>>) -> Self {
        Self { status, body: body.into(), ..Self::default() }
    }

    /// A response with a file, or with the range of it that `request` asks for.
    pub(super) fn file(request: &Request, content: &[u8]) -> Self {
        let range = request.headers.get("range").and_then(|range| range.strip_prefix("bytes="));
        let Some((first, _)) = range.and_then(|range| range.split_once('-')) else {
            return Self::new(200, content);
        };
        let first: usize = first.parse().unwrap();
        let size = content.len();
        let mut answer = Self::new(206, &content[first..]);
        answer.headers.push(("content-range", format!("bytes {first}-{}/{size}", size - 1)));
        answer
    }

    pub(super) fn with(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }
}

async fn read(stream: &mut BufReader<TcpStream>) -> io::Result<Request> {
    let mut line = String::new();
    stream.read_line(&mut line).await?;
    let mut words = line.split_whitespace().map(str::to_owned);
    let (Some(method), Some(target)) = (words.next(), words.next()) else {
        return Err(io::ErrorKind::UnexpectedEof.into());
    };
    let mut headers = HashMap::new();
    loop {
        let mut line = String::new();
        stream.read_line(&mut line).await?;
        let Some((name, value)) = line.trim().split_once(": ") else { break };
        headers.insert(name.to_lowercase(), value.to_owned());
    }
    Ok(Request { method, target, headers })
}

async fn write(stream: &mut BufReader<TcpStream>, request: &Request, answer: FakeResponse) -> io::Result<()> {
    let mut head = format!("HTTP/1.1 {} Status\r\nconnection: close\r\n", answer.status);
    for (name, value) in &answer.headers {
        head += &format!("{name}: {value}\r\n");
    }
    head += &format!("content-length: {}\r\n\r\n", answer.body.len());
    stream.write_all(head.as_bytes()).await?;
    if request.method != "HEAD" {
        let end = answer.cut.unwrap_or(answer.body.len());
        stream.write_all(&answer.body[..end]).await?;
    }
    stream.shutdown().await
}
