//! An HTTP/1.1 server that tells what it saw, and a client that tells what it got.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::{Failure, plain, print};

/// What the server saw of a request: the body of its answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seen {
    /// The server's name.
    pub server: String,
    /// The client's address as accept() told it.
    pub peer: SocketAddr,
    /// The address that the client reached.
    pub local: SocketAddr,
    /// Path of the request.
    pub path: String,
    /// The marker of the request.
    pub marker: String,
}

/// What the client got.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HttpResult {
    /// HTTP status, if an answer came.
    pub status: Option<u16>,
    /// What the server saw, if the answer was one of [`Seen`]'s.
    pub seen: Option<Seen>,
    /// How it failed, if it did.
    pub failure: Option<Failure>,
    /// The error's own text.
    pub error: Option<String>,
    /// The client's own address.
    pub local: Option<SocketAddr>,
    /// What getpeername() told the client.
    pub peer: Option<SocketAddr>,
    /// Duration, milliseconds.
    pub millis: u64,
}

impl HttpResult {
    /// The result in one or two words: the status, or how it failed.
    pub fn brief(&self) -> String {
        match (self.status, self.failure) {
            (Some(status), None) => status.to_string(),
            (_, Some(failure)) => failure.to_string(),
            (None, None) => "nothing".to_owned(),
        }
    }
}

/// Listens on `ports` of all addresses of both families and answers until the process ends.
pub(super) fn serve(name: &str, ports: &[u16]) -> Result<()> {
    listen_all(ports, |stream| {
        // The client learns of a failure by the connection's end; the server has nobody to tell.
        let _ = answer(name, stream);
    })
}

/// Accepts on every port, a thread per connection, until the process ends.
pub(super) fn listen_all(ports: &[u16], serve: impl Fn(TcpStream) + Sync) -> Result<()> {
    let listeners = ports
        .iter()
        .map(|&port| deep(port).with_context(|| format!("listen on port {port}")))
        .collect::<Result<Vec<_>>>()?;
    let serve = &serve;
    thread::scope(|scope| {
        for listener in listeners {
            scope.spawn(move || {
                for stream in listener.incoming() {
                    match stream {
                        Ok(stream) => {
                            scope.spawn(move || serve(stream));
                        }
                        // Out of descriptors for a moment, or a connection that ended before it was accepted.
                        Err(_) => thread::sleep(Duration::from_millis(5)),
                    }
                }
            });
        }
    });
    Ok(())
}

/// Listens with the longest queue that the system allows, as servers do that expect many clients; the standard library
/// asks for 128, and a burst would be a test of that number.
fn deep(port: u16) -> io::Result<TcpListener> {
    use std::os::fd::AsRawFd;
    let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, port))?;
    // SAFETY: listen(2) takes no pointers; on a socket that listens already it changes the length of the queue.
    match unsafe { libc::listen(listener.as_raw_fd(), i32::MAX) } {
        0 => Ok(listener),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Answers one request with what was seen of it.
pub(super) fn answer(name: &str, stream: TcpStream) -> io::Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(30)))?;
    let (peer, local) = (plain(stream.peer_addr()?), plain(stream.local_addr()?));
    let mut reader = BufReader::new(&stream);
    let (mut path, mut marker) = (String::new(), String::new());
    let mut line = String::new();
    for nth in 0.. {
        line.clear();
        if reader.read_line(&mut line)? == 0 {
            return Ok(());
        }
        let text = line.trim_end();
        if nth == 0 {
            path = text.split(' ').nth(1).unwrap_or("").to_owned();
        } else if text.is_empty() {
            break;
        } else if let Some((key, value)) = text.split_once(':')
            && key.eq_ignore_ascii_case("x-marker")
        {
            marker = value.trim().to_owned();
        }
    }
    let body = serde_json::to_string(&Seen { server: name.to_owned(), peer, local, path, marker })?;
    write!(
        &stream,
        "HTTP/1.1 200 OK\r\nServer: {name}\r\nContent-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    )?;
    (&stream).flush()
}

/// How often a client asks.
pub(super) struct Times {
    pub(super) count: u32,
    /// Pause between two requests.
    pub(super) interval: Duration,
    /// No more after the first answer.
    pub(super) until_answered: bool,
}

pub(super) fn get_many(to: SocketAddr, path: &str, marker: &str, limit: Duration, times: &Times) -> Result<()> {
    for nth in 0..times.count {
        if nth > 0 {
            thread::sleep(times.interval);
        }
        let result = get(to, path, marker, limit);
        print(&result)?;
        if times.until_answered && result.status.is_some() {
            break;
        }
    }
    Ok(())
}

/// One request on a connection of its own.
pub(super) fn get(to: SocketAddr, path: &str, marker: &str, limit: Duration) -> HttpResult {
    let start = Instant::now();
    let mut result =
        HttpResult { status: None, seen: None, failure: None, error: None, local: None, peer: None, millis: 0 };
    if let Err(error) = exchange(to, path, marker, limit, &mut result) {
        result.failure = Some(Failure::of(&error));
        result.error = Some(error.to_string());
    }
    result.millis = u64::try_from(start.elapsed().as_millis()).unwrap_or(u64::MAX);
    result
}

fn exchange(to: SocketAddr, path: &str, marker: &str, limit: Duration, result: &mut HttpResult) -> io::Result<()> {
    let mut stream = TcpStream::connect_timeout(&to, limit)?;
    stream.set_read_timeout(Some(limit))?;
    stream.set_write_timeout(Some(limit))?;
    result.local = Some(plain(stream.local_addr()?));
    result.peer = Some(plain(stream.peer_addr()?));
    let host = if to.is_ipv6() { format!("[{}]:{}", to.ip(), to.port()) } else { to.to_string() };
    stream.write_all(
        format!("GET {path} HTTP/1.1\r\nHost: {host}\r\nX-Marker: {marker}\r\nConnection: close\r\n\r\n").as_bytes(),
    )?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    let text = String::from_utf8_lossy(&answer);
    let (head, body) = text
        .split_once("\r\n\r\n")
        .ok_or_else(|| io::Error::new(io::ErrorKind::UnexpectedEof, "the connection ended before an answer"))?;
    result.status = head.split(' ').nth(1).and_then(|s| s.parse().ok());
    result.seen = serde_json::from_str(body).ok();
    if result.status.is_none() {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "the answer has no HTTP status"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_client_tells_what_the_server_saw() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let to = listener.local_addr().expect("its address");
        let server = thread::spawn(move || answer("s", listener.accept().expect("a client").0));
        let got = get(to, "/x", "m1", Duration::from_secs(2));
        server.join().expect("the server ran").expect("the server answered");
        let seen = got.seen.clone().expect("a body");
        assert_eq!((got.status, seen.path.as_str(), seen.marker.as_str()), (Some(200), "/x", "m1"));
        assert_eq!((Some(seen.peer), Some(seen.local)), (got.local, got.peer));
        assert_eq!(got.brief(), "200");
    }

    #[test]
    fn a_refusal_and_an_early_end_are_told_apart() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let to = listener.local_addr().expect("its address");
        let server = thread::spawn(move || {
            let (mut stream, _) = listener.accept().expect("a client");
            let _ = stream.read(&mut [0; 1024]);
        });
        assert_eq!(get(to, "/", "", Duration::from_secs(2)).failure, Some(Failure::ClosedEarly));
        server.join().expect("the server ran");
        assert_eq!(get(to, "/", "", Duration::from_secs(2)).failure, Some(Failure::Refused));
    }
}
