//! The exchange protocol: the client's first line says what happens on the connection, so one server serves every
//! test of the transport (half-close, bulk with every byte checked, a server that speaks first, readers that never read).
//!
//! | first line | then |
//! |---|---|
//! | `ECHO` | the server sends back what it gets, until the client's end, then ends |
//! | `UP n` | the client sends `n` patterned bytes and ends its direction; the server checks and answers one line |
//! | `DOWN n` | the client ends its direction first; the server sends `n` patterned bytes and ends |
//! | `DRAIN id n` | the server ends its direction first; the client sends `n` patterned bytes and ends |
//! | `RESULT id` | the server tells what came of `DRAIN id` |
//! | `POUR` | the server sends for as long as the client reads |

use std::collections::HashMap;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::Result;
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use super::{Failure, flood, http, print};

/// What a speak-first server says before the client has said anything.
const GREETING: &str = "220 culvert sandbox ready\n";
/// Bytes moved by one call to the kernel.
const CHUNK: usize = 64 * 1024;

/// What to do on the connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Verb {
    /// One line there and back, then the client's end, then the server's.
    Echo,
    /// Client to server, half-closed by the client, every byte checked.
    Up,
    /// Server to client after the client's half-close, every byte checked.
    Down,
    /// Client to server after the server's half-close, every byte checked.
    Drain,
    /// Expect the server's greeting before sending anything, then echo.
    SpeakFirst,
}

/// What came of an exchange.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExchangeResult {
    /// Bytes that arrived and were the right ones.
    pub bytes: u64,
    /// How it failed, if it did.
    pub failure: Option<Failure>,
    /// The error's own text.
    pub error: Option<String>,
    /// Duration, milliseconds.
    pub millis: u64,
}

pub(super) fn serve(ports: &[u16], speak_first: bool) -> Result<()> {
    // Where fewer are allowed, whoever makes that many connections sees it.
    let _ = flood::raise_open_files(16 << 10);
    let drained = Mutex::new(HashMap::new());
    http::listen_all(ports, |stream| {
        // The client learns of a failure by the connection's end; the server has nobody to tell.
        let _ = converse(stream, speak_first, &drained);
    })
}

fn converse(stream: TcpStream, speak_first: bool, drained: &Mutex<HashMap<String, String>>) -> io::Result<()> {
    let mut out = &stream;
    if speak_first {
        out.write_all(GREETING.as_bytes())?;
    }
    let mut reader = BufReader::with_capacity(CHUNK, &stream);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let words: Vec<&str> = line.split_whitespace().collect();
    let number = |text: &str| text.parse::<u64>().map_err(|e| io::Error::new(io::ErrorKind::InvalidInput, e));
    match words.as_slice() {
        ["ECHO"] => {
            let mut buffer = vec![0; CHUNK];
            loop {
                let got = reader.read(&mut buffer)?;
                if got == 0 {
                    return stream.shutdown(Shutdown::Write);
                }
                out.write_all(&buffer[..got])?;
            }
        }
        ["UP", count] => {
            let said = verdict(check_pattern(&mut reader, number(count)?));
            out.write_all(format!("{said}\n").as_bytes())
        }
        ["DOWN", count] => {
            let count = number(count)?;
            if reader.read(&mut [0])? != 0 {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "bytes where the client's end was due"));
            }
            send_pattern(&mut out, count)?;
            stream.shutdown(Shutdown::Write)
        }
        ["DRAIN", id, count] => {
            stream.shutdown(Shutdown::Write)?;
            let said = verdict(check_pattern(&mut reader, number(count)?));
            drained.lock().map_err(|_| io::Error::other("another connection panicked"))?.insert((*id).to_owned(), said);
            Ok(())
        }
        ["RESULT", id] => {
            let said = drained.lock().map_err(|_| io::Error::other("another connection panicked"))?.get(*id).cloned();
            out.write_all(format!("{}\n", said.as_deref().unwrap_or("nothing")).as_bytes())
        }
        ["POUR"] => loop {
            out.write_all(&[0x2e; CHUNK])?;
        },
        _ => Err(io::Error::new(io::ErrorKind::InvalidInput, "unknown first line")),
    }
}

fn verdict(checked: io::Result<u64>) -> String {
    match checked {
        Ok(bytes) => format!("OK {bytes}"),
        Err(error) => format!("BAD {error}"),
    }
}

pub(super) fn call(to: SocketAddr, verb: Verb, bytes: u64, limit: Duration) -> ExchangeResult {
    let start = Instant::now();
    let done = attempt(to, verb, bytes, limit);
    ExchangeResult {
        bytes: *done.as_ref().unwrap_or(&0),
        failure: done.as_ref().err().map(Failure::of),
        error: done.err().map(|e| e.to_string()),
        millis: u64::try_from(start.elapsed().as_millis()).unwrap_or(u64::MAX),
    }
}

fn dial(to: SocketAddr, limit: Duration) -> io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&to, limit)?;
    stream.set_read_timeout(Some(limit))?;
    stream.set_write_timeout(Some(limit))?;
    Ok(stream)
}

fn attempt(to: SocketAddr, verb: Verb, bytes: u64, limit: Duration) -> io::Result<u64> {
    let stream = dial(to, limit)?;
    let mut out = &stream;
    let mut reader = BufReader::with_capacity(CHUNK, &stream);
    let mut line = String::new();
    match verb {
        Verb::SpeakFirst | Verb::Echo => {
            if verb == Verb::SpeakFirst {
                reader.read_line(&mut line)?;
                expect(&line, GREETING)?;
            }
            out.write_all(b"ECHO\nhello\n")?;
            line.clear();
            reader.read_line(&mut line)?;
            expect(&line, "hello\n")?;
            stream.shutdown(Shutdown::Write)?;
            expect_end(&mut reader)?;
            Ok(6)
        }
        Verb::Up => {
            out.write_all(format!("UP {bytes}\n").as_bytes())?;
            send_pattern(&mut out, bytes)?;
            stream.shutdown(Shutdown::Write)?;
            reader.read_line(&mut line)?;
            expect(&line, &format!("OK {bytes}\n"))?;
            expect_end(&mut reader)?;
            Ok(bytes)
        }
        Verb::Down => {
            out.write_all(format!("DOWN {bytes}\n").as_bytes())?;
            stream.shutdown(Shutdown::Write)?;
            check_pattern(&mut reader, bytes)
        }
        Verb::Drain => {
            let id = unique();
            out.write_all(format!("DRAIN {id} {bytes}\n").as_bytes())?;
            expect_end(&mut reader)?;
            send_pattern(&mut out, bytes)?;
            stream.shutdown(Shutdown::Write)?;
            let deadline = Instant::now() + limit;
            loop {
                let asked = dial(to, limit)?;
                (&asked).write_all(format!("RESULT {id}\n").as_bytes())?;
                line.clear();
                BufReader::new(&asked).read_line(&mut line)?;
                if line != "nothing\n" || Instant::now() > deadline {
                    break;
                }
                thread::sleep(Duration::from_millis(10));
            }
            expect(&line, &format!("OK {bytes}\n"))?;
            Ok(bytes)
        }
    }
}

pub(super) fn stall(to: SocketAddr, count: u32) -> Result<()> {
    let one = || -> io::Result<TcpStream> {
        let stream = dial(to, Duration::from_secs(10))?;
        (&stream).write_all(b"POUR\n")?;
        Ok(stream)
    };
    let tried: Vec<_> = (0..count).map(|_| one()).collect();
    let held: Vec<_> = tried.into_iter().flatten().collect();
    print(&serde_json::json!({ "held": held.len(), "refused": count as usize - held.len() }))?;
    loop {
        thread::park();
    }
}

fn unique() -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos());
    format!("{}-{now}", std::process::id())
}

fn expect(got: &str, wanted: &str) -> io::Result<()> {
    if got == wanted {
        return Ok(());
    }
    let kind = if got.is_empty() { io::ErrorKind::UnexpectedEof } else { io::ErrorKind::InvalidData };
    Err(io::Error::new(kind, format!("expected {wanted:?}, got {got:?}")))
}

fn expect_end(reader: &mut impl Read) -> io::Result<()> {
    match reader.read(&mut [0])? {
        0 => Ok(()),
        _ => Err(io::Error::new(io::ErrorKind::InvalidData, "bytes after the expected end")),
    }
}

/// Byte `index` of the pattern: every aligned eight bytes are a mix of their position, so a lost, doubled or swapped
/// block is seen, which a running checksum of repeating bytes would not show.
fn fill(buffer: &mut [u8], start: u64) {
    debug_assert!(start.is_multiple_of(8));
    for (word, chunk) in (start / 8..).zip(buffer.chunks_mut(8)) {
        let mut mixed = word.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        chunk.copy_from_slice(&(mixed ^ (mixed >> 31)).to_le_bytes()[..chunk.len()]);
    }
}

fn send_pattern(out: &mut impl Write, count: u64) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK];
    let mut sent = 0;
    while sent < count {
        let now = usize::try_from(count - sent).unwrap_or(CHUNK).min(CHUNK);
        fill(&mut buffer[..now], sent);
        out.write_all(&buffer[..now])?;
        sent += now as u64;
    }
    Ok(())
}

fn check_pattern(reader: &mut impl Read, count: u64) -> io::Result<u64> {
    let (mut got, mut wanted) = (vec![0; CHUNK], vec![0; CHUNK]);
    let mut seen = 0_u64;
    while seen < count {
        let now = usize::try_from(count - seen).unwrap_or(CHUNK).min(CHUNK);
        reader.read_exact(&mut got[..now])?;
        fill(&mut wanted[..now], seen);
        if let Some(at) = (0..now).find(|&i| got[i] != wanted[i]) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, format!("byte {} differs", seen + at as u64)));
        }
        seen += now as u64;
    }
    expect_end(reader)?;
    Ok(seen)
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    fn server(speak_first: bool, connections: usize) -> (SocketAddr, thread::JoinHandle<()>) {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let to = listener.local_addr().expect("its address");
        let run = thread::spawn(move || {
            let drained = Mutex::new(HashMap::new());
            for stream in listener.incoming().take(connections) {
                let _ = converse(stream.expect("a client"), speak_first, &drained);
            }
        });
        (to, run)
    }

    #[test]
    fn every_verb_moves_its_bytes() {
        for (verb, connections) in [(Verb::Echo, 1), (Verb::Up, 1), (Verb::Down, 1), (Verb::Drain, 2)] {
            let (to, run) = server(false, connections);
            let got = call(to, verb, 300_001, Duration::from_secs(5));
            run.join().expect("the server ran");
            assert_eq!((got.failure, got.error), (None, None), "{verb:?}");
        }
        let (to, run) = server(true, 1);
        assert_eq!(call(to, Verb::SpeakFirst, 0, Duration::from_secs(5)).failure, None);
        run.join().expect("the server ran");
    }

    #[test]
    fn a_changed_a_missing_and_a_surplus_byte_are_seen() {
        let mut bytes = Vec::new();
        send_pattern(&mut bytes, 100_000).expect("a vector takes it");
        assert_eq!(check_pattern(&mut bytes.as_slice(), 100_000).expect("unchanged"), 100_000);
        let kind = |bytes: &[u8]| check_pattern(&mut &bytes[..], 100_000).expect_err("must be noticed").kind();
        assert_eq!(kind(&bytes[..99_999]), io::ErrorKind::UnexpectedEof);
        assert_eq!(kind(&[bytes.as_slice(), b"x"].concat()), io::ErrorKind::InvalidData);
        bytes[70_001] ^= 1;
        assert_eq!(kind(&bytes), io::ErrorKind::InvalidData);
    }
}
