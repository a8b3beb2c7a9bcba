//! The clients.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, bail};

use super::poll::{END, Poll, READ, WRITE, connect, option};
use super::{Common, Latency, LoadResult, header, pattern};

const BUFFER: usize = 256 << 10;
/// Connections that are being opened at a time, where only their being open matters.
const OPENING: usize = 64;
/// How long after its time a load waits for what is under way.
const GRACE: Duration = Duration::from_secs(10);
/// How long opening the connections of a load may take.
const OPEN_LIMIT: Duration = Duration::from_secs(120);

/// What one thread measured.
#[derive(Default)]
struct Part {
    result: LoadResult,
    latency: Vec<u64>,
    connect: Vec<u64>,
}

/// One connection of a client.
struct Conn {
    /// `None` once it is closed.
    stream: Option<TcpStream>,
    /// Bytes of the request that are sent.
    sent: usize,
    /// Bytes of the answer that have come.
    got: u64,
    /// Whether a request is under way.
    busy: bool,
    /// When that request was due, or the connection begun.
    since: Instant,
    /// When requests were due that wait for the one under way.
    waiting: VecDeque<Instant>,
}

impl Conn {
    fn begin(to: SocketAddr) -> io::Result<Self> {
        let since = Instant::now();
        let stream = Some(connect(to)?);
        Ok(Self { stream, sent: 0, got: 0, busy: true, since, waiting: VecDeque::new() })
    }

    /// Sends as much of the request as the socket takes.
    fn push(&mut self, request: &[u8]) -> io::Result<()> {
        let Some(stream) = &mut self.stream else { return Ok(()) };
        while self.sent < request.len() {
            match stream.write(&request[self.sent..]) {
                Ok(sent) => self.sent += sent,
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn ask(&mut self, request: &[u8], since: Instant) -> io::Result<()> {
        (self.busy, self.since, self.sent, self.got) = (true, since, 0, 0);
        self.push(request)
    }

    /// Takes what has come; true if the answer is whole.
    fn pull(&mut self, buffer: &mut [u8], answer: u64) -> io::Result<bool> {
        let Some(stream) = &mut self.stream else { return Ok(false) };
        match stream.read(buffer) {
            Ok(0) => Err(ErrorKind::UnexpectedEof.into()),
            Ok(got) => {
                self.got += got as u64;
                Ok(self.got >= answer)
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// The error of a connection that could not be opened.
    fn opened(&self) -> io::Result<()> {
        match self.stream.as_ref().map(TcpStream::take_error) {
            Some(Ok(Some(error)) | Err(error)) => Err(error),
            _ => Ok(()),
        }
    }
}

impl Part {
    fn fail(&mut self, conn: &mut Conn, error: &io::Error) {
        conn.stream = None;
        conn.busy = false;
        self.result.failed += 1;
        self.result.error = Some(error.to_string());
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

fn request(common: &Common) -> Vec<u8> {
    let body = pattern(usize::try_from(common.body).unwrap_or(0));
    [&header(common.body, common.answer)[..], &body].concat()
}

/// Divides the work among threads, and adds up what they measured.
fn divided(common: &Common, units: usize, work: impl Fn(usize, usize) -> Result<Part> + Sync) -> Result<LoadResult> {
    let threads = common.threads.clamp(1, units.max(1));
    let parts: Vec<Part> = thread::scope(|scope| {
        let work = &work;
        let all: Vec<_> = (0..threads)
            .map(|nth| {
                let share = units / threads + usize::from(nth < units % threads);
                scope.spawn(move || work(nth, share))
            })
            .collect();
        all.into_iter()
            .map(|one| one.join().map_err(|_| anyhow!("a thread of the client panicked"))?)
            .collect::<Result<_>>()
    })?;
    let (mut sum, mut latency, mut connect) = (LoadResult::default(), Vec::new(), Vec::new());
    for mut part in parts {
        sum.seconds = sum.seconds.max(part.result.seconds);
        sum.done += part.result.done;
        sum.done_in_all += part.result.done_in_all;
        sum.failed += part.result.failed;
        sum.error = part.result.error.or(sum.error);
        sum.bytes += part.result.bytes;
        latency.append(&mut part.latency);
        connect.append(&mut part.connect);
    }
    sum.latency = Latency::of(latency);
    sum.connect = Latency::of(connect);
    Ok(sum)
}

/// Opens connections, each proved by one request.
fn open_part(common: &Common, count: usize, poll: &mut Poll) -> Result<(Vec<Conn>, Part)> {
    let (request, begun) = (request(common), Instant::now());
    let (mut conns, mut part, mut ended) = (Vec::<Conn>::with_capacity(count), Part::default(), 0);
    let mut buffer = vec![0; BUFFER];
    while ended < count {
        while conns.len() < count && conns.len() - ended < OPENING {
            let key = conns.len();
            let conn = Conn::begin(common.to[key % common.to.len()])?;
            poll.add(conn.stream.as_ref().expect("just begun"), READ | WRITE, key)?;
            conns.push(conn);
        }
        if begun.elapsed() > OPEN_LIMIT {
            bail!("{ended} of {count} connections were opened in {OPEN_LIMIT:?}");
        }
        for index in 0..poll.wait(Some(Duration::from_millis(200))) {
            let (key, ready) = poll.event(index);
            let conn = &mut conns[key];
            if !conn.busy {
                continue;
            }
            let connects = &mut part.connect;
            let mut errand = Errand { request: &request, answer: common.answer, buffer: &mut buffer, connects };
            match errand.step(conn, poll, key, ready) {
                Ok(false) => {}
                Ok(true) => {
                    part.latency.push(nanos(conn.since.elapsed()));
                    part.result.done += 1;
                    conn.busy = false;
                    ended += 1;
                }
                Err(error) => {
                    part.fail(conn, &error);
                    ended += 1;
                }
            }
        }
    }
    part.result.seconds = begun.elapsed().as_secs_f64();
    Ok((conns, part))
}

/// What fresh connections are for: one request, and its answer.
struct Errand<'a> {
    request: &'a [u8],
    answer: u64,
    buffer: &'a mut [u8],
    connects: &'a mut Vec<u64>,
}

impl Errand<'_> {
    /// A connection's next step; true if its answer is whole.
    fn step(&mut self, conn: &mut Conn, poll: &Poll, key: usize, ready: u32) -> io::Result<bool> {
        if ready & (WRITE | END) != 0 && conn.sent < self.request.len() {
            conn.opened()?;
            if conn.sent == 0 {
                self.connects.push(nanos(conn.since.elapsed()));
            }
            conn.push(self.request)?;
            if conn.sent == self.request.len()
                && let Some(stream) = &conn.stream
            {
                poll.change(stream, READ, key).map_err(io::Error::other)?;
            }
        }
        if ready & (READ | END) != 0 { conn.pull(self.buffer, self.answer) } else { Ok(false) }
    }
}

pub(super) fn open(common: &Common, count: usize) -> Result<(Vec<TcpStream>, LoadResult)> {
    let mut poll = Poll::new()?;
    let (conns, part) = open_part(common, count, &mut poll)?;
    let result = LoadResult { latency: Latency::of(part.latency), connect: Latency::of(part.connect), ..part.result };
    Ok((conns.into_iter().filter_map(|conn| conn.stream).collect(), result))
}

pub(super) fn requests(common: &Common, connections: usize, rate: Option<f64>, warm: Duration) -> Result<LoadResult> {
    let total = connections.max(1) as f64;
    divided(common, connections, |nth, share| {
        let gap = rate.map(|rate| Duration::from_secs_f64(total / share as f64 / rate));
        // Threads take turns instead of sending at the same moment.
        let first = gap.unwrap_or_default().mul_f64(nth as f64 / common.threads.max(1) as f64);
        requests_part(common, share, gap, first, warm)
    })
}

fn requests_part(
    common: &Common,
    connections: usize,
    gap: Option<Duration>,
    first: Duration,
    warm: Duration,
) -> Result<Part> {
    let mut poll = Poll::new()?;
    let (mut conns, opened) = open_part(common, connections, &mut poll)?;
    let mut part = Part::default();
    part.result.failed = opened.result.failed;
    part.result.error = opened.result.error;
    if conns.iter().all(|conn| conn.stream.is_none()) {
        bail!("no connection came up: {}", part.result.error.unwrap_or_default());
    }
    part.latency.reserve(1 << 20);
    let (request, mut buffer) = (request(common), vec![0; BUFFER]);
    let begun = Instant::now();
    let (measured, end) = (begun + warm, begun + warm + Duration::from_secs_f64(common.seconds));
    let (mut due, mut next) = (begun + first, 0);
    if gap.is_none() {
        for conn in &mut conns {
            if let Err(error) = conn.ask(&request, Instant::now()) {
                part.fail(conn, &error);
            }
        }
    }
    loop {
        let now = Instant::now();
        if now >= end {
            break;
        }
        let mut limit = Duration::from_millis(50);
        if let Some(gap) = gap {
            while due <= now {
                let conn = &mut conns[next];
                next = (next + 1) % connections;
                if conn.stream.is_some() {
                    if conn.busy {
                        conn.waiting.push_back(due);
                    } else if let Err(error) = conn.ask(&request, due) {
                        part.fail(conn, &error);
                    }
                }
                due += gap;
            }
            limit = due.saturating_duration_since(Instant::now()).max(Duration::from_nanos(1));
        }
        for index in 0..poll.wait(Some(limit)) {
            let conn = &mut conns[poll.event(index).0];
            if conn.stream.is_none() {
                continue;
            }
            let answered = conn.pull(&mut buffer, common.answer).and_then(|whole| {
                // The rest of a request that the socket did not take at once; small ones are taken.
                conn.push(&request)?;
                Ok(whole && conn.busy)
            });
            let next = match answered {
                Ok(false) => Ok(()),
                Ok(true) => {
                    let now = Instant::now();
                    part.result.done_in_all += 1;
                    if now >= measured {
                        part.result.done += 1;
                        part.latency.push(nanos(now.saturating_duration_since(conn.since)));
                    }
                    match (gap, conn.waiting.pop_front()) {
                        (None, _) => conn.ask(&request, now),
                        (Some(_), Some(due)) => conn.ask(&request, due),
                        (Some(_), None) => {
                            conn.busy = false;
                            Ok(())
                        }
                    }
                }
                Err(error) => Err(error),
            };
            if let Err(error) = next {
                part.fail(conn, &error);
            }
        }
    }
    part.result.seconds = common.seconds;
    Ok(part)
}

pub(super) fn connects(common: &Common, at_once: usize, count: usize) -> Result<LoadResult> {
    let threads = common.threads.clamp(1, at_once.max(1));
    divided(common, at_once, |nth, share| {
        connects_part(common, share, count / threads + usize::from(nth < count % threads))
    })
}

fn connects_part(common: &Common, at_once: usize, count: usize) -> Result<Part> {
    let mut poll = Poll::new()?;
    let (request, mut buffer) = (request(common), vec![0; BUFFER]);
    let mut part = Part::default();
    let mut conns: Vec<Option<Conn>> = (0..at_once).map(|_| None).collect();
    let mut free: Vec<usize> = (0..at_once).rev().collect();
    let begun = Instant::now();
    let end = begun + Duration::from_secs_f64(common.seconds);
    let mut started = 0;
    loop {
        let now = Instant::now();
        while now < end && started < count {
            let Some(key) = free.pop() else { break };
            let to = common.to[started % common.to.len()];
            started += 1;
            match Conn::begin(to) {
                Ok(conn) => {
                    poll.add(conn.stream.as_ref().expect("just begun"), READ | WRITE, key)?;
                    conns[key] = Some(conn);
                }
                Err(error) => {
                    part.result.failed += 1;
                    part.result.error = Some(error.to_string());
                    free.push(key);
                }
            }
        }
        if free.len() == at_once {
            break;
        }
        if now > end + GRACE {
            part.result.failed += (at_once - free.len()) as u64;
            part.result.error = Some(format!("no answer {GRACE:?} after the end"));
            break;
        }
        for index in 0..poll.wait(Some(Duration::from_millis(100))) {
            let (key, ready) = poll.event(index);
            let Some(conn) = &mut conns[key] else { continue };
            let connects = &mut part.connect;
            let mut errand = Errand { request: &request, answer: common.answer, buffer: &mut buffer, connects };
            match errand.step(conn, &poll, key, ready) {
                Ok(false) => continue,
                Ok(true) => {
                    part.result.done += 1;
                    part.latency.push(nanos(conn.since.elapsed()));
                }
                Err(error) => part.fail(conn, &error),
            }
            conns[key] = None;
            free.push(key);
        }
    }
    part.result.done_in_all = part.result.done;
    part.result.seconds = begun.elapsed().as_secs_f64();
    Ok(part)
}

pub(super) fn bulk(common: &Common, streams: usize, back: bool) -> Result<LoadResult> {
    divided(common, streams, |_, share| if back { bulk_back(common, share) } else { bulk_there(common, share) })
}

/// Connections that stand, without a request.
fn standing(common: &Common, count: usize) -> Result<Vec<TcpStream>> {
    (0..count)
        .map(|nth| {
            let stream = TcpStream::connect_timeout(&common.to[nth % common.to.len()], GRACE)?;
            stream.set_nodelay(true)?;
            Ok(stream)
        })
        .collect()
}

/// The answers that never end, read for as long as it is asked.
fn bulk_back(common: &Common, streams: usize) -> Result<Part> {
    let (mut poll, mut part, mut buffer) = (Poll::new()?, Part::default(), vec![0; BUFFER]);
    let mut streams = standing(common, streams)?;
    let begun = Instant::now();
    for (key, stream) in streams.iter_mut().enumerate() {
        stream.write_all(&header(0, u64::MAX))?;
        stream.set_nonblocking(true)?;
        poll.add(stream, READ, key)?;
    }
    let end = begun + Duration::from_secs_f64(common.seconds);
    while Instant::now() < end {
        for index in 0..poll.wait(Some(Duration::from_millis(50))) {
            let (key, _) = poll.event(index);
            match streams[key].read(&mut buffer) {
                Ok(0) => bail!("the server ended a stream"),
                Ok(got) => part.result.bytes += got as u64,
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
    part.result.seconds = begun.elapsed().as_secs_f64();
    Ok(part)
}

/// A body that never ends; the server says how much of it came, and when that is said all of it has.
fn bulk_there(common: &Common, streams: usize) -> Result<Part> {
    let (mut poll, mut part, bytes) = (Poll::new()?, Part::default(), pattern(BUFFER));
    let mut streams = standing(common, streams)?;
    let begun = Instant::now();
    for (key, stream) in streams.iter_mut().enumerate() {
        stream.write_all(&header(u64::MAX, 0))?;
        stream.set_nonblocking(true)?;
        poll.add(stream, WRITE, key)?;
    }
    let end = begun + Duration::from_secs_f64(common.seconds);
    while Instant::now() < end {
        for index in 0..poll.wait(Some(Duration::from_millis(50))) {
            let (key, _) = poll.event(index);
            match streams[key].write(&bytes) {
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
    for stream in &streams {
        stream.shutdown(Shutdown::Write)?;
    }
    for stream in &mut streams {
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(Some(GRACE))?;
        let mut came = [0; 8];
        stream.read_exact(&mut came)?;
        part.result.bytes += u64::from_le_bytes(came);
    }
    part.result.seconds = begun.elapsed().as_secs_f64();
    Ok(part)
}

pub(super) fn stall(common: &Common, count: usize) -> Result<Vec<TcpStream>> {
    let streams = standing(common, count)?;
    for stream in &streams {
        // Small, so that what is held up is held up on the way.
        option(stream, libc::SOL_SOCKET, libc::SO_RCVBUF, 64 << 10)?;
        (&mut &*stream).write_all(&header(0, u64::MAX))?;
    }
    // Until everything on the way is full.
    thread::sleep(Duration::from_millis(1500));
    Ok(streams)
}
