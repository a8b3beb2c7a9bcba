//! Many connections at the same moment: each one's time to connect, and to its first answer.

use std::collections::BTreeMap;
use std::io::{self, BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;
use serde::{Deserialize, Serialize};

use super::flood;

/// Stack of a connection's thread, bytes.
const STACK: usize = 128 << 10;

/// What came of a burst.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BurstResult {
    /// Connections that were answered.
    pub ok: usize,
    /// How many failed, by the error's text.
    pub errors: BTreeMap<String, u64>,
    /// Time to connect.
    pub connect: Quantiles,
    /// Time from the start to the answer.
    pub answer: Quantiles,
}

/// Of all connections that were answered, milliseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Quantiles {
    /// Half of them were faster.
    pub p50: u64,
    /// 99 of 100 were faster.
    pub p99: u64,
    /// The slowest.
    pub max: u64,
}

impl Quantiles {
    fn of(mut millis: Vec<u64>) -> Self {
        millis.sort_unstable();
        let at = |share: usize| millis.get((millis.len() * share / 100).min(millis.len().saturating_sub(1)));
        let at = |share| at(share).copied().unwrap_or(0);
        Self { p50: at(50), p99: at(99), max: at(100) }
    }
}

pub(super) fn run(to: SocketAddr, count: usize, limit: Duration) -> Result<BurstResult> {
    flood::raise_open_files(count as u64 + 64)?;
    let start = Barrier::new(count);
    let ended = thread::scope(|scope| {
        let threads: Vec<_> = (0..count)
            .map(|_| {
                let one = || {
                    start.wait();
                    one(to, limit)
                };
                thread::Builder::new().stack_size(STACK).spawn_scoped(scope, one)
            })
            .collect::<io::Result<_>>()?;
        let join = |thread: thread::ScopedJoinHandle<'_, io::Result<(u64, u64)>>| {
            thread.join().map_err(|_| io::Error::other("a connection's thread panicked"))
        };
        threads.into_iter().map(join).collect::<io::Result<Vec<_>>>()
    })?;
    let mut errors = BTreeMap::new();
    let (mut connects, mut answers) = (Vec::new(), Vec::new());
    for end in ended {
        match end {
            Ok((connect, answer)) => {
                connects.push(connect);
                answers.push(answer);
            }
            Err(error) => *errors.entry(error.to_string()).or_insert(0) += 1,
        }
    }
    Ok(BurstResult { ok: answers.len(), errors, connect: Quantiles::of(connects), answer: Quantiles::of(answers) })
}

fn one(to: SocketAddr, limit: Duration) -> io::Result<(u64, u64)> {
    let start = Instant::now();
    let millis = || u64::try_from(start.elapsed().as_millis()).unwrap_or(u64::MAX);
    let stream = TcpStream::connect_timeout(&to, limit)?;
    let connect = millis();
    stream.set_read_timeout(Some(limit))?;
    (&stream).write_all(b"ECHO\nhello\n")?;
    let mut line = String::new();
    BufReader::new(&stream).read_line(&mut line)?;
    match line.as_str() {
        "hello\n" => Ok((connect, millis())),
        "" => Err(io::Error::new(io::ErrorKind::UnexpectedEof, "closed without an answer")),
        other => Err(io::Error::new(io::ErrorKind::InvalidData, format!("answered {other:?}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_of_the_sorted_values() {
        assert_eq!(Quantiles::of((0..200).rev().collect()), Quantiles { p50: 100, p99: 198, max: 199 });
        assert_eq!(Quantiles::of(Vec::new()), Quantiles::default());
    }
}
