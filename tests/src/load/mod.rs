//! A load generator and its server, for measuring what lies between them.
//!
//! `culvert-load` is their executable. Each thread has one epoll and no allocation while it measures: where cores are few,
//! the tool must not be what is measured.
//!
//! A request is 16 bytes, then its body; the server answers with as many bytes as it asks for. Both numbers are little
//! endian: the length of the body and that of the answer, each `u64`. If the client ends its side within a body, the
//! server says how much of it came, as a `u64`, and closes; so bytes are counted where they arrive.

mod client;
mod poll;
mod serve;
pub mod usage;

pub use poll::allow_open_files;

use std::io::{self, Write};
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::{Args, Parser};
use serde::{Deserialize, Serialize};

/// What the server's bytes and the bodies of requests consist of; readable, so that a recording of the wire can be
/// searched for it.
pub const PATTERN: &[u8] = b"readable-bytes-of-a-load ";

/// Load on TCP connections, and a server for it.
#[derive(Parser, Debug)]
#[command(name = "culvert-load", about = "Load on TCP connections, and a server for it")]
pub enum Load {
    /// Serve until ended.
    Serve {
        /// Port, IPv4 and IPv6.
        #[arg(long)]
        port: u16,
        /// Threads, each with a listener of its own.
        #[arg(long, default_value_t = 1)]
        threads: usize,
    },
    /// Requests on kept connections: one after the other on each, or at a steady rate on all.
    Requests {
        /// What all clients have.
        #[command(flatten)]
        common: Common,
        /// Connections.
        #[arg(long)]
        connections: usize,
        /// Requests per second, all connections together; without it, as fast as answers come. The latency of a paced
        /// request counts from when it was due, so that a stall is seen by every request that it delayed.
        #[arg(long)]
        rate: Option<f64>,
        /// Before the measurement begins, seconds.
        #[arg(long, default_value_t = 1.0)]
        warm: f64,
    },
    /// Connect, make one request, close.
    Connects {
        /// What all clients have.
        #[command(flatten)]
        common: Common,
        /// How many at a time.
        #[arg(long)]
        at_once: usize,
        /// No more than this many.
        #[arg(long, default_value_t = 1_000_000)]
        count: usize,
    },
    /// Bytes as fast as they go.
    Bulk {
        /// What all clients have.
        #[command(flatten)]
        common: Common,
        /// Connections.
        #[arg(long)]
        streams: usize,
        /// From the server to the client.
        #[arg(long)]
        back: bool,
    },
    /// Open connections, prove each by a request, and hold them until standard input ends.
    Hold {
        /// What all clients have.
        #[command(flatten)]
        common: Common,
        /// Connections.
        #[arg(long)]
        connections: usize,
    },
    /// Ask for bytes on connections and never read them, until standard input ends.
    Stall {
        /// What all clients have.
        #[command(flatten)]
        common: Common,
        /// Connections.
        #[arg(long)]
        connections: usize,
    },
}

/// What all clients have.
#[derive(Args, Debug, Clone)]
pub struct Common {
    /// Address and port; several are used in turn.
    #[arg(long = "to", required = true, value_delimiter = ',')]
    pub to: Vec<SocketAddr>,
    /// Duration of the measurement, seconds.
    #[arg(long, default_value_t = 4.0)]
    pub seconds: f64,
    /// Body of a request, bytes.
    #[arg(long, default_value_t = 112)]
    pub body: u64,
    /// Answer to a request, bytes.
    #[arg(long, default_value_t = 1024)]
    pub answer: u64,
    /// Threads; connections are divided among them.
    #[arg(long, default_value_t = 1)]
    pub threads: usize,
}

/// What a client measured.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct LoadResult {
    /// Duration of the measurement, seconds.
    pub seconds: f64,
    /// Requests answered in that time, or connections that are open.
    pub done: u64,
    /// Requests answered, with those of the warm-up.
    pub done_in_all: u64,
    /// Connections that failed.
    pub failed: u64,
    /// Text of the last failure.
    pub error: Option<String>,
    /// Bytes that arrived; only of `bulk`.
    pub bytes: u64,
    /// From when a request was due, or a connection begun, to its whole answer.
    pub latency: Latency,
    /// From the begin of a connection until it was open.
    pub connect: Latency,
}

/// A distribution of times, microseconds.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Latency {
    /// How many.
    pub count: u64,
    /// Mean.
    pub mean: f64,
    /// Median.
    pub p50: f64,
    /// 99 of 100 took no longer.
    pub p99: f64,
    /// 999 of 1000 took no longer.
    pub p999: f64,
    /// The longest.
    pub max: f64,
}

impl Latency {
    /// The distribution of `times`, nanoseconds.
    fn of(mut times: Vec<u64>) -> Self {
        if times.is_empty() {
            return Self::default();
        }
        times.sort_unstable();
        let micros = |nanos: u64| nanos as f64 / 1000.0;
        let quantile = |share: f64| {
            let rank = (times.len() as f64 * share).ceil() as usize;
            micros(times[rank.clamp(1, times.len()) - 1])
        };
        Self {
            count: times.len() as u64,
            mean: times.iter().sum::<u64>() as f64 / times.len() as f64 / 1000.0,
            p50: quantile(0.5),
            p99: quantile(0.99),
            p999: quantile(0.999),
            max: quantile(1.0),
        }
    }
}

impl Load {
    /// Runs it; a client prints one line of JSON.
    ///
    /// # Errors
    /// A server could not listen, or not one connection came up.
    pub fn run(self) -> Result<()> {
        poll::prepare_process()?;
        match self {
            Self::Serve { port, threads } => serve::run(port, threads),
            Self::Requests { common, connections, rate, warm } => {
                print(&client::requests(&common, connections, rate, seconds(warm))?)
            }
            Self::Connects { common, at_once, count } => print(&client::connects(&common, at_once, count)?),
            Self::Bulk { common, streams, back } => print(&client::bulk(&common, streams, back)?),
            Self::Hold { common, connections } => {
                let (held, result) = client::open(&common, connections)?;
                print(&result)?;
                until_input_ends()?;
                drop(held);
                Ok(())
            }
            Self::Stall { common, connections } => {
                let held = client::stall(&common, connections)?;
                print(&LoadResult { done: held.len() as u64, ..LoadResult::default() })?;
                until_input_ends()
            }
        }
    }
}

fn seconds(seconds: f64) -> Duration {
    Duration::from_secs_f64(seconds)
}

fn until_input_ends() -> Result<()> {
    io::copy(&mut io::stdin().lock(), &mut io::sink()).context("wait for the end of the input")?;
    Ok(())
}

fn print(result: &LoadResult) -> Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{}", serde_json::to_string(result)?)?;
    out.flush()?;
    Ok(())
}

/// The first 16 bytes of a request.
fn header(body: u64, answer: u64) -> [u8; 16] {
    let mut header = [0; 16];
    header[..8].copy_from_slice(&body.to_le_bytes());
    header[8..].copy_from_slice(&answer.to_le_bytes());
    header
}

/// `length` bytes of the pattern.
fn pattern(length: usize) -> Vec<u8> {
    PATTERN.iter().copied().cycle().take(length).collect()
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::thread;

    use super::*;

    /// A server for as long as the test's process lives, as for a pod's.
    fn server() -> SocketAddr {
        let port = TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("a free port").port();
        thread::spawn(move || serve::run(port, 1));
        let to = SocketAddr::from(([127, 0, 0, 1], port));
        while std::net::TcpStream::connect(to).is_err() {
            thread::sleep(Duration::from_millis(1));
        }
        to
    }

    fn common(to: SocketAddr) -> Common {
        Common { to: vec![to], seconds: 0.2, body: 100, answer: 3000, threads: 2 }
    }

    #[test]
    fn every_load_counts_what_arrives() {
        let common = common(server());
        for rate in [None, Some(1000.0)] {
            let got = client::requests(&common, 3, rate, seconds(0.05)).expect("it runs");
            assert_eq!((got.failed, got.error), (0, None));
            assert!(got.done > 20 && got.latency.count == got.done && got.done_in_all > got.done, "{}", got.done);
            if rate.is_some() {
                assert!((100..300).contains(&got.done), "{} of 200 at 1000 per second", got.done);
            }
        }
        let got = client::connects(&common, 4, 50).expect("it runs");
        assert_eq!((got.done, got.failed, got.latency.count, got.connect.count), (50, 0, 50, 50));
        for back in [false, true] {
            let got = client::bulk(&common, 2, back).expect("it runs");
            assert!(got.bytes > 1 << 20 && got.failed == 0 && got.seconds >= 0.2, "{back}: {got:?}");
        }
        let (held, got) = client::open(&common, 20).expect("it runs");
        assert_eq!((held.len(), got.done), (20, 20));
    }

    #[test]
    fn a_refused_connection_is_counted_as_failed() {
        let port = TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("a free port").port();
        let got = client::connects(&common(([127, 0, 0, 1], port).into()), 1, 5).expect("it runs");
        assert_eq!((got.done, got.failed), (0, 5));
        assert!(got.error.is_some_and(|error| error.contains("refused")));
    }

    #[test]
    fn quantiles_are_of_the_sorted_times() {
        let got = Latency::of((1..=1000).rev().map(|n| n * 1000).collect());
        assert_eq!((got.p50, got.p99, got.p999, got.max, got.mean), (500.0, 990.0, 999.0, 1000.0, 500.5));
    }
}
