//! Connections to many addresses, each again and again, whether anybody is there or not: a client that finds a server the
//! moment it listens.

use std::collections::BTreeMap;
use std::io;
use std::net::{SocketAddr, TcpStream};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;
use serde::{Deserialize, Serialize};

use super::{Failure, newcomer, print};

/// Stack of an address's thread, bytes.
const STACK: usize = 128 << 10;
/// How often it is told what came of it.
const TELL_EVERY: Duration = Duration::from_millis(500);

/// What came of it so far.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HammerResult {
    /// Connections that were tried.
    pub tried: u64,
    /// How those failed that were not connected, by [`Failure`]'s word.
    pub failed: BTreeMap<String, u64>,
    /// Who let a connection in, and how often. What was said there is not known to have been read.
    pub connected: BTreeMap<SocketAddr, u64>,
    /// Who has sent back what was said, and how often.
    pub answered: BTreeMap<SocketAddr, u64>,
}

/// How it is done.
#[derive(Debug, Clone)]
pub(super) struct Blows {
    /// What is said on a connection.
    pub marker: String,
    /// How often each address is tried; `None` for as long as the process lives.
    pub rounds: Option<u32>,
    /// Pause between two tries of an address.
    pub interval: Duration,
    /// Limit of a connect, and of a read.
    pub limit: Duration,
}

/// Prints a [`HammerResult`] every half second, and one at the end.
pub(super) fn run(to: &[SocketAddr], blows: &Blows) -> Result<()> {
    let result = Mutex::new(HammerResult::default());
    thread::scope(|scope| {
        let threads = to
            .iter()
            .map(|to| {
                let one = || one(*to, blows, &result);
                thread::Builder::new().stack_size(STACK).spawn_scoped(scope, one)
            })
            .collect::<io::Result<Vec<_>>>()?;
        let mut told = Instant::now();
        while threads.iter().any(|thread| !thread.is_finished()) {
            if told.elapsed() >= TELL_EVERY {
                tell(&result)?;
                told = Instant::now();
            }
            thread::sleep(Duration::from_millis(10));
        }
        tell(&result)
    })
}

fn tell(result: &Mutex<HammerResult>) -> Result<()> {
    let so_far = result.lock().unwrap_or_else(PoisonError::into_inner).clone();
    print(&so_far)
}

fn one(to: SocketAddr, blows: &Blows, result: &Mutex<HammerResult>) {
    let note = |change: &dyn Fn(&mut HammerResult)| change(&mut result.lock().unwrap_or_else(PoisonError::into_inner));
    let mut tried = 0;
    while blows.rounds.is_none_or(|rounds| tried < rounds) {
        tried += 1;
        note(&|result| result.tried += 1);
        match TcpStream::connect_timeout(&to, blows.limit) {
            Err(error) => {
                let word = Failure::of(&error).to_string();
                note(&|result| *result.failed.entry(word.clone()).or_default() += 1);
            }
            Ok(stream) => {
                note(&|result| *result.connected.entry(to).or_default() += 1);
                if newcomer::exchange(&stream, &blows.marker, blows.limit).is_ok() {
                    note(&|result| *result.answered.entry(to).or_default() += 1);
                }
            }
        }
        thread::sleep(blows.interval);
    }
}
