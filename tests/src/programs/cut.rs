//! Connections that are cut off, and what the other side sees of it: a truncated transfer must never look like a whole
//! one, so every case tells an orderly end from a reset.
//!
//! | first line | then |
//! |---|---|
//! | `SEND n` | the server sends `n` bytes and resets |
//! | `SEND-AFTER-END n` | the client ends its direction; the server then sends `n` bytes and resets |
//! | `NOTE id` | the server reads to the end and notes how it came |
//! | `NOTE-AFTER-END id` | the same, after the server has ended its own direction |
//! | `TELL id` | the server tells what it noted |

use std::collections::HashMap;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::Result;
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use super::{Failure, http};

/// Bytes that are under way when a connection is cut: enough to fill several frames of a tunnel.
const BYTES: usize = 200_000;
/// Time for what was sent to arrive before the reset overtakes it.
const PAUSE: Duration = Duration::from_millis(100);

/// Who cuts the connection, and when.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum CutVerb {
    /// The server resets while it sends.
    ServerResets,
    /// The server resets while it sends, after the client's half-close.
    ServerResetsLate,
    /// The client resets while it sends.
    ClientResets,
    /// The client resets while it sends, after the server's half-close.
    ClientResetsLate,
    /// The client's process goes away with bytes of the server unread, which is a reset too.
    ClientLeaves,
    /// Nobody cuts: the client closes in order, for comparison.
    ClientEnds,
}

/// What the side saw that did not cut.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CutResult {
    /// `end` for an orderly end, `reset` for a reset; anything else in words.
    pub saw: String,
    /// How the connection failed before it came to that.
    pub failure: Option<Failure>,
    /// The error's own text.
    pub error: Option<String>,
}

pub(super) fn serve(ports: &[u16]) -> Result<()> {
    let noted = Mutex::new(HashMap::new());
    http::listen_all(ports, |stream| {
        // The client learns of a failure by the connection's end; the server has nobody to tell.
        let _ = converse(stream, &noted);
    })
}

fn converse(stream: TcpStream, noted: &Mutex<HashMap<String, String>>) -> io::Result<()> {
    let mut reader = BufReader::new(&stream);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let poisoned = || io::Error::other("another connection panicked");
    let words: Vec<&str> = line.split_whitespace().collect();
    match words.as_slice() {
        [verb @ ("SEND" | "SEND-AFTER-END"), count] => {
            let count = count.parse().map_err(|e| io::Error::new(io::ErrorKind::InvalidInput, e))?;
            if *verb == "SEND-AFTER-END" && reader.read(&mut [0])? != 0 {
                return Err(io::ErrorKind::InvalidData.into());
            }
            (&stream).write_all(&vec![b's'; count])?;
            thread::sleep(PAUSE);
            reset(&stream)
        }
        [verb @ ("NOTE" | "NOTE-AFTER-END"), id] => {
            if *verb == "NOTE-AFTER-END" {
                stream.shutdown(Shutdown::Write)?;
            } else {
                // What a client that leaves does not read.
                (&stream).write_all(b"unread")?;
            }
            let saw = end_of(&mut reader);
            noted.lock().map_err(|_| poisoned())?.insert((*id).to_owned(), saw);
            Ok(())
        }
        ["TELL", id] => {
            let saw = noted.lock().map_err(|_| poisoned())?.get(*id).cloned();
            (&stream).write_all(format!("{}\n", saw.as_deref().unwrap_or("nothing yet")).as_bytes())
        }
        _ => Err(io::ErrorKind::InvalidInput.into()),
    }
}

pub(super) fn call(to: SocketAddr, verb: CutVerb, limit: Duration) -> CutResult {
    match attempt(to, verb, limit) {
        Ok(saw) => CutResult { saw, failure: None, error: None },
        Err(error) => {
            CutResult { saw: String::new(), failure: Some(Failure::of(&error)), error: Some(error.to_string()) }
        }
    }
}

fn attempt(to: SocketAddr, verb: CutVerb, limit: Duration) -> io::Result<String> {
    let stream = dial(to, limit)?;
    let mut out = &stream;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos());
    let id = format!("{}-{now}", std::process::id());
    match verb {
        CutVerb::ServerResets => {
            out.write_all(format!("SEND {BYTES}\n").as_bytes())?;
            return Ok(end_of(&mut out));
        }
        CutVerb::ServerResetsLate => {
            out.write_all(format!("SEND-AFTER-END {BYTES}\n").as_bytes())?;
            stream.shutdown(Shutdown::Write)?;
            return Ok(end_of(&mut out));
        }
        CutVerb::ClientResets | CutVerb::ClientLeaves | CutVerb::ClientEnds => {
            out.write_all(format!("NOTE {id}\n").as_bytes())?;
            let mut greeting = [0; 6];
            if verb == CutVerb::ClientLeaves {
                // It has arrived, and stays where it is.
                stream.peek(&mut greeting)?;
            } else {
                out.read_exact(&mut greeting)?;
            }
        }
        CutVerb::ClientResetsLate => {
            out.write_all(format!("NOTE-AFTER-END {id}\n").as_bytes())?;
            if out.read(&mut [0])? != 0 {
                return Err(io::ErrorKind::InvalidData.into());
            }
        }
    }
    out.write_all(&vec![b'c'; BYTES])?;
    thread::sleep(PAUSE);
    match verb {
        CutVerb::ClientResets | CutVerb::ClientResetsLate => reset(&stream)?,
        CutVerb::ClientEnds => stream.shutdown(Shutdown::Write)?,
        CutVerb::ClientLeaves | CutVerb::ServerResets | CutVerb::ServerResetsLate => {}
    }
    drop(stream);
    told(to, &id, limit)
}

/// What the server noted, waited for.
fn told(to: SocketAddr, id: &str, limit: Duration) -> io::Result<String> {
    let deadline = Instant::now() + limit;
    loop {
        let asked = dial(to, limit)?;
        (&asked).write_all(format!("TELL {id}\n").as_bytes())?;
        let mut line = String::new();
        BufReader::new(&asked).read_line(&mut line)?;
        if line != "nothing yet\n" || Instant::now() > deadline {
            return Ok(line.trim_end().to_owned());
        }
        thread::sleep(Duration::from_millis(20));
    }
}

fn dial(to: SocketAddr, limit: Duration) -> io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&to, limit)?;
    stream.set_read_timeout(Some(limit))?;
    stream.set_write_timeout(Some(limit))?;
    Ok(stream)
}

/// Reads to the end and tells what kind of end it was.
fn end_of(reader: &mut impl Read) -> String {
    let mut buffer = [0; 16 * 1024];
    loop {
        match reader.read(&mut buffer) {
            Ok(0) => return "end".to_owned(),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return "reset".to_owned(),
            Err(error) => return error.to_string(),
        }
    }
}

/// Makes the close of the stream, which follows at once, a reset.
fn reset(stream: &TcpStream) -> io::Result<()> {
    use std::os::fd::AsRawFd;
    let linger = libc::linger { l_onoff: 1, l_linger: 0 };
    let length = size_of_val(&linger) as libc::socklen_t;
    // SAFETY: `linger` has `length` readable bytes.
    let result = unsafe {
        libc::setsockopt(stream.as_raw_fd(), libc::SOL_SOCKET, libc::SO_LINGER, (&raw const linger).cast(), length)
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    /// Without anything between the two, so that a scenario's result is the mesh's.
    #[test]
    fn a_cut_is_seen_as_a_reset_and_an_end_as_an_end() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let to = listener.local_addr().expect("its address");
        thread::spawn(move || {
            let noted = Mutex::new(HashMap::new());
            thread::scope(|scope| {
                for stream in listener.incoming() {
                    scope.spawn(|| converse(stream.expect("a client"), &noted));
                }
            });
        });
        for verb in CutVerb::value_variants() {
            let got = call(to, *verb, Duration::from_secs(5));
            let wanted = if *verb == CutVerb::ClientEnds { "end" } else { "reset" };
            assert_eq!(got.saw, wanted, "{verb:?}: {got:?}");
        }
    }
}
