//! What a new pod does first: a client that calls before it does anything else, and again until it is answered; and a server
//! that listens before it does anything else, and tells of everything that it hears.

use std::io::{self, BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Result;
use serde::{Deserialize, Serialize};

use super::{Failure, http, plain, print};

/// One call of the client.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Word {
    /// When it was made, milliseconds since 1970.
    pub at_ms: u64,
    /// How long it took, milliseconds.
    pub millis: u64,
    /// How it failed; an answer if it did not.
    pub failure: Option<Failure>,
    /// The error's own text.
    pub error: Option<String>,
}

/// Something that came to the server. A connection is told when it is accepted, and again with each line on it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Heard {
    /// Whom accept() told.
    pub peer: Option<SocketAddr>,
    /// The line; none of a connection that was only accepted.
    pub line: Option<String>,
}

/// Calls until it was answered; then it ends, or with `stay` does nothing any more.
pub(super) fn speak(to: SocketAddr, marker: &str, interval: Duration, limit: Duration, stay: bool) -> Result<()> {
    loop {
        let begun = SystemTime::now();
        let said = say(to, marker, limit);
        let error = said.err();
        print(&Word {
            at_ms: millis(begun.duration_since(UNIX_EPOCH).unwrap_or_default()),
            millis: millis(begun.elapsed().unwrap_or_default()),
            failure: error.as_ref().map(Failure::of),
            error: error.as_ref().map(ToString::to_string),
        })?;
        if error.is_none() {
            break;
        }
        thread::sleep(interval);
    }
    if stay {
        loop {
            thread::park();
        }
    }
    Ok(())
}

/// Says one line and reads it back.
pub(super) fn say(to: SocketAddr, marker: &str, limit: Duration) -> io::Result<()> {
    exchange(&TcpStream::connect_timeout(&to, limit)?, marker, limit)
}

/// The same on a connection that is open.
pub(super) fn exchange(stream: &TcpStream, marker: &str, limit: Duration) -> io::Result<()> {
    stream.set_read_timeout(Some(limit))?;
    let mut out = stream;
    out.write_all(format!("{marker}\n").as_bytes())?;
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line)?;
    match line.trim_end() {
        "" => Err(io::Error::new(io::ErrorKind::UnexpectedEof, "closed without an answer")),
        back if back == marker => Ok(()),
        back => Err(io::Error::new(io::ErrorKind::InvalidData, format!("{back:?} came back"))),
    }
}

/// Listens, tells what comes, and sends it back.
pub(super) fn hear(port: u16) -> Result<()> {
    http::listen_all(&[port], |stream| {
        // The client learns of a failure by the connection's end; a scenario by a line that is missing.
        let _ = listen_to(&stream);
    })
}

fn listen_to(stream: &TcpStream) -> Result<()> {
    let peer = stream.peer_addr().ok().map(plain);
    print(&Heard { peer, line: None })?;
    let mut reader = BufReader::new(stream);
    let mut bytes = Vec::new();
    // Whatever comes is told, text or not, with an end of line or without.
    while reader.read_until(b'\n', &mut bytes)? > 0 {
        print(&Heard { peer, line: Some(String::from_utf8_lossy(&bytes).trim_end().to_owned()) })?;
        let mut out = stream;
        out.write_all(&bytes)?;
        bytes.clear();
    }
    Ok(())
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
