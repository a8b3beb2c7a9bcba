//! One connection that is used a little all the time, and opened again whenever it is lost: traffic for a scenario in
//! which something else happens meanwhile.

use std::io::{self, BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Result;
use serde::{Deserialize, Serialize};

use super::{Failure, print};

/// Something that happened to the connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrickleEvent {
    /// When, milliseconds since 1970.
    pub at_ms: u64,
    /// What.
    pub what: Trickled,
    /// How it failed, if it did.
    pub failure: Option<Failure>,
    /// The error's own text.
    pub error: Option<String>,
}

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Trickled {
    /// A line went there and came back.
    Echoed,
    /// The connection could not be opened.
    NotOpened,
    /// The connection was open and is no longer.
    Lost,
}

pub(super) fn run(to: SocketAddr, marker: &str, interval: Duration, limit: Duration) -> Result<()> {
    loop {
        let (what, error) = match dial(to, limit) {
            Err(error) => (Trickled::NotOpened, error),
            Ok(stream) => loop {
                match echo(&stream, marker) {
                    Ok(()) => tell(Trickled::Echoed, None)?,
                    Err(error) => break (Trickled::Lost, error),
                }
                thread::sleep(interval);
            },
        };
        tell(what, Some(&error))?;
        thread::sleep(interval);
    }
}

fn dial(to: SocketAddr, limit: Duration) -> io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&to, limit)?;
    stream.set_read_timeout(Some(limit))?;
    (&stream).write_all(b"ECHO\n")?;
    Ok(stream)
}

fn echo(stream: &TcpStream, marker: &str) -> io::Result<()> {
    let mut out = stream;
    out.write_all(format!("{marker}\n").as_bytes())?;
    let mut line = String::new();
    // One line is under way at a time, so that the reader leaves nothing behind.
    BufReader::new(stream).read_line(&mut line)?;
    match line.trim_end() {
        "" => Err(io::Error::new(io::ErrorKind::UnexpectedEof, "ended")),
        back if back == marker => Ok(()),
        back => Err(io::Error::new(io::ErrorKind::InvalidData, format!("{back:?} came back"))),
    }
}

fn tell(what: Trickled, error: Option<&io::Error>) -> Result<()> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    print(&TrickleEvent {
        at_ms: u64::try_from(now.as_millis())?,
        what,
        failure: error.map(Failure::of),
        error: error.map(ToString::to_string),
    })
}
