//! One connection held open to an exchange server: a line there and back, again and again, each told with its time, so
//! that a scenario sees up to which moment bytes passed and how the connection ended.

use std::io::{self, BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Result;
use serde::{Deserialize, Serialize};

use super::{Failure, plain, print};

/// One round, or the end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeldRound {
    /// Rounds so far in which the right line came back.
    pub rounds: u64,
    /// Milliseconds since 1970.
    pub at_ms: u64,
    /// The client's own address, once it is connected.
    pub local: Option<SocketAddr>,
    /// How the connection ended, in the last line.
    pub failure: Option<Failure>,
    /// The error's own text.
    pub error: Option<String>,
}

pub(super) fn run(to: SocketAddr, interval: Duration, limit: Duration) -> Result<()> {
    let mut round = HeldRound { rounds: 0, at_ms: 0, local: None, failure: None, error: None };
    let error = match hold(to, interval, limit, &mut round) {
        Ok(never) => match never {},
        Err(error) => error,
    };
    round.at_ms = now_ms();
    round.failure = Some(error.downcast_ref::<io::Error>().map_or(Failure::Other, Failure::of));
    round.error = Some(format!("{error:#}"));
    print(&round)
}

fn hold(
    to: SocketAddr,
    interval: Duration,
    limit: Duration,
    round: &mut HeldRound,
) -> Result<std::convert::Infallible> {
    let stream = TcpStream::connect_timeout(&to, limit)?;
    stream.set_read_timeout(Some(limit))?;
    stream.set_write_timeout(Some(limit))?;
    stream.set_nodelay(true)?;
    round.local = Some(plain(stream.local_addr()?));
    let (mut out, mut reader, mut line) = (&stream, BufReader::new(&stream), String::new());
    out.write_all(b"ECHO\n")?;
    loop {
        let sent = format!("round {}\n", round.rounds);
        out.write_all(sent.as_bytes())?;
        line.clear();
        reader.read_line(&mut line)?;
        if line.is_empty() {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the server's end came").into());
        }
        if line != sent {
            return Err(io::Error::new(io::ErrorKind::InvalidData, format!("sent {sent:?}, got {line:?}")).into());
        }
        round.rounds += 1;
        round.at_ms = now_ms();
        print(round)?;
        thread::sleep(interval);
    }
}

fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).ok().and_then(|d| u64::try_from(d.as_millis()).ok()).unwrap_or(0)
}
