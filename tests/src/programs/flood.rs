//! As many connections to an exchange server as there is room for, all held open: what a greedy pod does.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use super::print;

/// Threads that open connections.
const THREADS: usize = 8;
/// Pause after a connection that was refused.
const PAUSE: Duration = Duration::from_millis(2);

/// What came of it: told once all were tried, and again at the end.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FloodResult {
    /// Connections that were answered, and are held; silent ones: that the kernel has connected.
    pub held: u64,
    /// Connections that were refused or reset.
    pub refused: u64,
    /// Of those held, how many were whole at the end.
    pub alive: Option<u64>,
}

/// `silent`: nothing is said on the connections.
pub(super) fn run(to: SocketAddr, count: u64, silent: bool, until: &Path, limit: Duration) -> Result<()> {
    let files = count.checked_add(100).context("too many")?;
    raise_open_files(files)?;
    let (tried, refused, held) = (AtomicU64::new(0), AtomicU64::new(0), Mutex::new(Vec::new()));
    thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                while tried.fetch_add(1, Ordering::Relaxed) < count {
                    match open(to, silent, limit) {
                        Ok(stream) => held.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(stream),
                        Err(_) => {
                            refused.fetch_add(1, Ordering::Relaxed);
                            thread::sleep(PAUSE);
                        }
                    }
                }
            });
        }
    });
    let held = held.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    let mut result = FloodResult { held: held.len() as u64, refused: refused.into_inner(), alive: None };
    print(&result)?;
    while !until.exists() {
        thread::sleep(Duration::from_millis(50));
    }
    result.alive = Some(held.iter().filter(|stream| is_whole(stream, silent)).count() as u64);
    print(&result)
}

fn open(to: SocketAddr, silent: bool, limit: Duration) -> io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&to, limit)?;
    stream.set_read_timeout(Some(limit))?;
    if !silent {
        (&stream).write_all(b"ECHO\n")?;
        echo(&stream)?;
    }
    Ok(stream)
}

fn echo(stream: &TcpStream) -> io::Result<()> {
    (&*stream).write_all(b"hello\n")?;
    let mut line = String::new();
    BufReader::with_capacity(64, stream).read_line(&mut line)?;
    if line == "hello\n" { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
}

fn is_whole(mut stream: &TcpStream, silent: bool) -> bool {
    if !silent {
        return echo(stream).is_ok();
    }
    let asked = stream.set_nonblocking(true).and_then(|()| stream.read(&mut [0]));
    matches!(asked, Err(error) if error.kind() == io::ErrorKind::WouldBlock)
}

/// Lets this process have `wanted` files open.
pub(super) fn raise_open_files(wanted: u64) -> Result<()> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` is a live value of the type that the call fills.
    let got = unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) };
    ensure!(got == 0, "getrlimit: {}", io::Error::last_os_error());
    ensure!(limit.rlim_max >= wanted, "this process may open {} files only, not {wanted}", limit.rlim_max);
    limit.rlim_cur = limit.rlim_cur.max(wanted);
    // SAFETY: `limit` is a live value of the type that the call reads.
    let set = unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) };
    ensure!(set == 0, "setrlimit: {}", io::Error::last_os_error());
    Ok(())
}
