//! New connections to an exchange server at a steady rate, whatever becomes of those before them: each sends a line and
//! gets it back, again and again for as long as it is to live, and then both ends close in order.

use std::collections::BTreeMap;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::Result;
use serde::{Deserialize, Serialize};

use super::Failure;

/// Stack of a connection's thread, bytes.
const STACK: usize = 128 << 10;
/// Connections under way at once; one more is a failure, since it says that nothing moves.
const MOST: usize = 4000;
/// Pause between two lines of a connection that lives longer than one.
const ROUND: Duration = Duration::from_millis(100);

/// How connections are made.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pace {
    pub(super) to: SocketAddr,
    /// New connections a second.
    pub(super) rate: u32,
    /// How long each goes on.
    pub(super) live: Duration,
    /// Limit of a connect or a read.
    pub(super) limit: Duration,
}

/// What came of all of them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PacedResult {
    /// Connections that got everything back and ended in order.
    pub ok: u64,
    /// How many failed, by the step and the error's text.
    pub errors: BTreeMap<String, u64>,
    /// How many failed, by kind.
    pub failures: BTreeMap<String, u64>,
    /// When the first one failed, milliseconds since 1970.
    pub first_error_ms: Option<u64>,
    /// When the last of those began that failed, milliseconds since 1970.
    pub last_failed_begin_ms: Option<u64>,
    /// For how long connections were begun, milliseconds.
    pub lasted_ms: u64,
    /// From the moment that a connection was due to its first answer, microseconds: half of them were faster.
    pub p50_us: u64,
    /// 99 of 100 were faster.
    pub p99_us: u64,
    /// The slowest.
    pub max_us: u64,
}

#[derive(Default)]
struct Tally {
    result: PacedResult,
    answers: Vec<u64>,
}

impl Tally {
    /// The end of a connection that began at `begin_ms`.
    fn count(&mut self, begin_ms: u64, ended: Result<u64, (&'static str, io::Error)>) {
        match ended {
            Ok(micros) => {
                self.result.ok += 1;
                self.answers.push(micros);
            }
            Err((step, error)) => {
                *self.result.errors.entry(format!("{step}: {error}")).or_insert(0) += 1;
                *self.result.failures.entry(Failure::of(&error).to_string()).or_insert(0) += 1;
                self.result.first_error_ms.get_or_insert_with(now_ms);
                self.result.last_failed_begin_ms = self.result.last_failed_begin_ms.max(Some(begin_ms));
            }
        }
    }
}

/// Goes on until the file `until` exists.
pub(super) fn run(pace: Pace, until: &Path) -> Result<PacedResult> {
    let tally = Mutex::new(Tally::default());
    let under_way = AtomicUsize::new(0);
    let (begun, every) = (Instant::now(), Duration::from_secs(1) / pace.rate.max(1));
    let (shared, moving) = (&tally, &under_way);
    let lasted = thread::scope(|scope| -> io::Result<Duration> {
        for number in 0u32.. {
            let due = begun + every * number;
            thread::sleep(due.saturating_duration_since(Instant::now()));
            if number.is_multiple_of(pace.rate.div_ceil(10)) && until.exists() {
                return Ok(begun.elapsed());
            }
            if moving.load(Ordering::Relaxed) >= MOST {
                let full = io::Error::new(io::ErrorKind::TimedOut, format!("{MOST} connections are under way"));
                locked(shared).count(now_ms(), Err(("start", full)));
                continue;
            }
            moving.fetch_add(1, Ordering::Relaxed);
            thread::Builder::new().stack_size(STACK).spawn_scoped(scope, move || {
                let begin_ms = now_ms();
                let ended = one(pace, due);
                moving.fetch_sub(1, Ordering::Relaxed);
                locked(shared).count(begin_ms, ended);
            })?;
        }
        Ok(begun.elapsed())
    })?;
    let Tally { mut result, mut answers } = tally.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    result.lasted_ms = u64::try_from(lasted.as_millis()).unwrap_or(u64::MAX);
    answers.sort_unstable();
    let at = |share: usize| answers.get((answers.len() * share / 100).min(answers.len().saturating_sub(1))).copied();
    (result.p50_us, result.p99_us, result.max_us) = (at(50).unwrap_or(0), at(99).unwrap_or(0), at(100).unwrap_or(0));
    Ok(result)
}

fn locked(tally: &Mutex<Tally>) -> std::sync::MutexGuard<'_, Tally> {
    tally.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

fn one(pace: Pace, due: Instant) -> Result<u64, (&'static str, io::Error)> {
    let step = |name: &'static str| move |error: io::Error| (name, error);
    let stream = TcpStream::connect_timeout(&pace.to, pace.limit).map_err(step("connect"))?;
    stream.set_read_timeout(Some(pace.limit)).map_err(step("limit"))?;
    stream.set_write_timeout(Some(pace.limit)).map_err(step("limit"))?;
    let (mut out, mut reader) = (&stream, BufReader::with_capacity(512, &stream));
    let begun = Instant::now();
    out.write_all(b"ECHO\n").map_err(step("first line"))?;
    let mut answered = None;
    loop {
        out.write_all(b"hello\n").map_err(step("line"))?;
        let mut line = String::new();
        reader.read_line(&mut line).map_err(step("answer"))?;
        if line != "hello\n" {
            let kind = if line.is_empty() { io::ErrorKind::UnexpectedEof } else { io::ErrorKind::InvalidData };
            return Err(("answer", io::Error::new(kind, format!("got {line:?}"))));
        }
        answered.get_or_insert_with(|| due.elapsed());
        if begun.elapsed() + ROUND > pace.live {
            break;
        }
        thread::sleep(ROUND);
    }
    stream.shutdown(Shutdown::Write).map_err(step("shutdown"))?;
    match reader.read(&mut [0]).map_err(step("end"))? {
        0 => Ok(answered.map_or(0, |took| u64::try_from(took.as_micros()).unwrap_or(u64::MAX))),
        _ => Err(("end", io::Error::new(io::ErrorKind::InvalidData, "bytes after the end"))),
    }
}

fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).ok().and_then(|d| u64::try_from(d.as_millis()).ok()).unwrap_or(0)
}
