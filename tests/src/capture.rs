//! A recording of the link between the nodes, searched for a payload: the proof that nothing readable crossed it, and,
//! where plaintext was right, that the same search finds it.
//!
//! Frames are taken by an `AF_PACKET` socket in node a's namespace, which sees both directions. The recording is
//! bounded; a frame that the kernel dropped or that had to make room turns every "not found" into an error, since a
//! search of half a recording proves nothing.

use std::collections::{BTreeMap, VecDeque};
use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use std::{fs, io, mem, thread};

use anyhow::{Context, Result, bail};

use crate::sandbox::Place;

/// Bytes of frames kept unless told otherwise.
pub const DEFAULT_LIMIT: usize = 64 << 20;
/// Larger than any frame, also one that offloading has put together.
const FRAME_MAX: usize = 256 << 10;

/// A running recording; it ends when dropped.
#[derive(Debug)]
pub struct Capture {
    shared: Arc<Shared>,
    socket: Arc<OwnedFd>,
    reader: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    stop: AtomicBool,
    tape: Mutex<Tape>,
}

#[derive(Debug, Default)]
struct Tape {
    frames: VecDeque<Frame>,
    bytes: usize,
    limit: usize,
    /// Frames that are missing: dropped by the kernel, or removed to make room.
    missing: u64,
    failure: Option<String>,
}

#[derive(Debug, Clone)]
struct Frame {
    at: Duration,
    bytes: Vec<u8>,
}

impl Capture {
    /// Starts recording `device` in the network namespace of `place`, keeping at most `limit` bytes.
    ///
    /// # Errors
    /// The socket could not be made: this needs `CAP_NET_RAW`.
    pub fn start(place: &Place, device: &str, limit: usize) -> Result<Self> {
        let socket =
            Arc::new(place.inside(|| open(device)).with_context(|| format!("record {device} in {}", place.netns))?);
        let shared = Arc::new(Shared::default());
        shared.tape().limit = limit;
        let reader = {
            let (shared, socket) = (Arc::clone(&shared), Arc::clone(&socket));
            thread::Builder::new().name("capture".to_owned()).spawn(move || record(&shared, &socket))?
        };
        Ok(Self { shared, socket, reader: Some(reader) })
    }

    /// Forgets what was recorded so far.
    ///
    /// # Errors
    /// The kernel would not tell its losses.
    pub fn clear(&self) -> Result<()> {
        self.settle()?;
        let mut tape = self.shared.tape();
        *tape = Tape { limit: tape.limit, ..Tape::default() };
        Ok(())
    }

    /// Whether `payload` crossed the link readably: in one frame, or spread over segments of one TCP stream.
    ///
    /// # Errors
    /// Not found, but frames are missing; or the recording itself failed.
    pub fn contains(&self, payload: &[u8]) -> Result<bool> {
        if payload.is_empty() {
            bail!("a search for nothing finds everything");
        }
        self.settle()?;
        let tape = self.shared.tape();
        if tape.frames.iter().any(|f| find(&f.bytes, payload)) || streams(&tape.frames).iter().any(|s| find(s, payload))
        {
            return Ok(true);
        }
        if let Some(failure) = &tape.failure {
            bail!("the recording of the link failed: {failure}");
        }
        if tape.missing > 0 {
            bail!("{} frames of the recording are missing, so nothing can be said about the link", tape.missing);
        }
        Ok(false)
    }

    /// Number of frames recorded with this TCP port as source or destination: that something crossed at all.
    ///
    /// # Errors
    /// The kernel would not tell its losses.
    pub fn frames_with_port(&self, port: u16) -> Result<usize> {
        self.settle()?;
        let tape = self.shared.tape();
        Ok(tape
            .frames
            .iter()
            .filter_map(|f| segment(&f.bytes))
            .filter(|s| s.flow.1 == port || s.flow.3 == port)
            .count())
    }

    /// Writes the recording as a pcap file, for Wireshark or tcpdump.
    ///
    /// # Errors
    /// The file could not be written.
    pub fn write_pcap(&self, path: &Path) -> Result<()> {
        self.settle()?;
        let tape = self.shared.tape();
        let write = || -> io::Result<()> {
            let mut out = io::BufWriter::new(fs::File::create(path)?);
            // Magic, version 2.4, zone, accuracy, longest frame, Ethernet: the classic libpcap header.
            for word in [0xa1b2_c3d4_u32, 4 << 16 | 2, 0, 0, FRAME_MAX as u32, 1] {
                out.write_all(&word.to_le_bytes())?;
            }
            for frame in &tape.frames {
                let length = frame.bytes.len() as u32;
                for word in [frame.at.as_secs() as u32, frame.at.subsec_micros(), length, length] {
                    out.write_all(&word.to_le_bytes())?;
                }
                out.write_all(&frame.bytes)?;
            }
            out.flush()
        };
        write().with_context(|| format!("write {}", path.display()))
    }

    /// Waits until what has crossed the link is on the tape, and asks the kernel for its losses.
    fn settle(&self) -> Result<()> {
        // Frames are in the socket's buffer when the sender's call returns; the reader needs a moment to take them out.
        let mut unread: libc::c_int = 1;
        for _ in 0..500 {
            // SAFETY: FIONREAD writes one int, and `unread` is one.
            let result = unsafe { libc::ioctl(self.socket.as_raw_fd(), libc::FIONREAD, &mut unread) };
            if result < 0 {
                return Err(io::Error::last_os_error()).context("FIONREAD on the recording's socket");
            }
            if unread == 0 {
                break;
            }
            thread::sleep(Duration::from_millis(2));
        }
        if unread != 0 {
            bail!("the link is so busy that its recording does not keep up");
        }
        // The last frame may be between the socket and the tape.
        thread::sleep(Duration::from_millis(5));
        let missing = losses(&self.socket).context("PACKET_STATISTICS of the recording's socket")?;
        self.shared.tape().missing += missing;
        Ok(())
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        if let Some(reader) = self.reader.take() {
            // A panic of the reader was already printed, and there is nobody to pass it to.
            let _ = reader.join();
        }
    }
}

impl Shared {
    fn tape(&self) -> MutexGuard<'_, Tape> {
        self.tape.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn open(device: &str) -> Result<OwnedFd> {
    let protocol = (libc::ETH_P_ALL as u16).to_be();
    // Protocol 0: nothing arrives before the socket is bound to its device.
    // SAFETY: socket(2) takes no pointers.
    let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error()).context("socket(AF_PACKET)");
    }
    // SAFETY: the descriptor is new and nobody else's.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    option(&socket, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, &(32_i32 << 20)).context("SO_RCVBUFFORCE")?;
    let timeout = libc::timeval { tv_sec: 0, tv_usec: 50_000 };
    option(&socket, libc::SOL_SOCKET, libc::SO_RCVTIMEO, &timeout).context("SO_RCVTIMEO")?;
    let index = nix::net::if_::if_nametoindex(device).with_context(|| format!("find the device {device}"))?;
    // SAFETY: all-zero is a value of this plain structure.
    let mut address: libc::sockaddr_ll = unsafe { mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = protocol;
    address.sll_ifindex = i32::try_from(index)?;
    let length = size_of_val(&address) as libc::socklen_t;
    // SAFETY: `address` is a sockaddr_ll of `length` bytes.
    if unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) } < 0 {
        return Err(io::Error::last_os_error()).with_context(|| format!("bind to {device}"));
    }
    Ok(socket)
}

fn option<T>(socket: &OwnedFd, level: i32, name: i32, value: &T) -> io::Result<()> {
    let length = size_of::<T>() as libc::socklen_t;
    // SAFETY: `value` points to `length` readable bytes.
    match unsafe { libc::setsockopt(socket.as_raw_fd(), level, name, (&raw const *value).cast(), length) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Frames that the kernel dropped since the last time it was asked.
fn losses(socket: &OwnedFd) -> io::Result<u64> {
    // struct tpacket_stats: packets, drops.
    let mut statistics = [0_u32; 2];
    let mut length = size_of_val(&statistics) as libc::socklen_t;
    // SAFETY: `statistics` has `length` writable bytes.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_PACKET,
            libc::PACKET_STATISTICS,
            statistics.as_mut_ptr().cast(),
            &mut length,
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(statistics[1].into()) }
}

fn record(shared: &Shared, socket: &OwnedFd) {
    let mut buffer = vec![0; FRAME_MAX];
    while !shared.stop.load(Ordering::SeqCst) {
        // SAFETY: `buffer` has as many writable bytes as told. MSG_TRUNC makes the result the frame's true length.
        let got = unsafe { libc::recv(socket.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), libc::MSG_TRUNC) };
        let Ok(length) = usize::try_from(got) else {
            let error = io::Error::last_os_error();
            if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) {
                continue;
            }
            // ENETDOWN: the device was taken away with its sandbox.
            shared.tape().failure = Some(error.to_string());
            return;
        };
        let at = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let mut tape = shared.tape();
        if length > buffer.len() {
            tape.missing += 1;
            continue;
        }
        tape.push(Frame { at, bytes: buffer[..length].to_vec() });
    }
}

impl Tape {
    fn push(&mut self, frame: Frame) {
        self.bytes += frame.bytes.len();
        self.frames.push_back(frame);
        while self.bytes > self.limit
            && let Some(oldest) = self.frames.pop_front()
        {
            self.bytes -= oldest.bytes.len();
            self.missing += 1;
        }
    }
}

type Flow = (IpAddr, u16, IpAddr, u16);

struct Segment<'a> {
    flow: Flow,
    sequence: u32,
    payload: &'a [u8],
}

/// The TCP segment that an Ethernet frame carries, over IPv4 or IPv6 without extension headers.
fn segment(frame: &[u8]) -> Option<Segment<'_>> {
    let (kind, packet) = (frame.get(12..14)?, frame.get(14..)?);
    let (from, to, rest): (IpAddr, IpAddr, &[u8]) = match kind {
        [0x08, 0x00] => {
            let header = usize::from(packet.first()? & 15) * 4;
            let total = usize::from(u16::from_be_bytes(packet.get(2..4)?.try_into().ok()?));
            if packet.get(9)? != &6 {
                return None;
            }
            let address = |at| Some(Ipv4Addr::from(<[u8; 4]>::try_from(packet.get(at..at + 4)?).ok()?));
            // A frame that offloading put together may say 0; then the frame's own length counts.
            let end = if total == 0 { packet.len() } else { total.min(packet.len()) };
            (address(12)?.into(), address(16)?.into(), packet.get(header..end)?)
        }
        [0x86, 0xdd] => {
            if packet.get(6)? != &6 {
                return None;
            }
            let length = usize::from(u16::from_be_bytes(packet.get(4..6)?.try_into().ok()?));
            let end = if length == 0 { packet.len() } else { (40 + length).min(packet.len()) };
            let address = |at| Some(Ipv6Addr::from(<[u8; 16]>::try_from(packet.get(at..at + 16)?).ok()?));
            (address(8)?.into(), address(24)?.into(), packet.get(40..end)?)
        }
        _ => return None,
    };
    let port = |at| Some(u16::from_be_bytes(rest.get(at..at + 2)?.try_into().ok()?));
    let sequence = u32::from_be_bytes(rest.get(4..8)?.try_into().ok()?);
    let header = usize::from(rest.get(12)? >> 4) * 4;
    Some(Segment { flow: (from, port(0)?, to, port(2)?), sequence, payload: rest.get(header..)? })
}

/// The bytes of every direction of every TCP connection, in order; a gap starts a new run of bytes.
fn streams(frames: &VecDeque<Frame>) -> Vec<Vec<u8>> {
    let mut flows: BTreeMap<Flow, Vec<Segment<'_>>> = BTreeMap::new();
    for segment in frames.iter().filter_map(|f| segment(&f.bytes)).filter(|s| !s.payload.is_empty()) {
        flows.entry(segment.flow).or_default().push(segment);
    }
    let mut runs = Vec::new();
    for mut segments in flows.into_values() {
        // Sequence numbers wrap: they are ordered by their distance from the first one seen, give or take 2 GiB.
        let base = segments[0].sequence;
        segments.sort_by_key(|s| s.sequence.wrapping_sub(base) as i32);
        let mut run: Vec<u8> = Vec::new();
        let mut next = base;
        for segment in segments {
            let ahead = segment.sequence.wrapping_sub(next) as i32;
            if ahead > 0 && !run.is_empty() {
                runs.push(mem::take(&mut run));
            }
            // What was seen already, sent again, is skipped.
            let seen = if ahead < 0 && !run.is_empty() { ahead.unsigned_abs() as usize } else { 0 };
            if let Some(fresh) = segment.payload.get(seen..) {
                run.extend_from_slice(fresh);
                next = segment.sequence.wrapping_add(segment.payload.len() as u32);
            }
        }
        runs.push(run);
    }
    runs
}

fn find(haystack: &[u8], needle: &[u8]) -> bool {
    // memmem(3) searches a full tape in milliseconds, also in a build without optimisation.
    // SAFETY: both pointers are to as many readable bytes as told.
    let at = unsafe { libc::memmem(haystack.as_ptr().cast(), haystack.len(), needle.as_ptr().cast(), needle.len()) };
    !at.is_null()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A frame of 10.0.0.1:1 to 10.0.0.2:2.
    fn frame(sequence: u32, payload: &[u8]) -> Frame {
        let mut bytes = vec![0; 12];
        bytes.extend([0x08, 0x00, 0x45, 0]);
        bytes.extend(u16::try_from(40 + payload.len()).expect("short").to_be_bytes());
        bytes.extend([0, 0, 0, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2, 0, 1, 0, 2]);
        bytes.extend(sequence.to_be_bytes());
        bytes.extend([0, 0, 0, 0, 0x50, 0x10, 0, 0, 0, 0, 0, 0]);
        bytes.extend(payload);
        // Ethernet's padding of short frames is not payload.
        bytes.resize(bytes.len().max(60), 0);
        Frame { at: Duration::ZERO, bytes }
    }

    fn joined(frames: &[Frame]) -> Vec<Vec<u8>> {
        streams(&frames.iter().cloned().collect())
    }

    #[test]
    fn a_payload_over_two_segments_is_put_together() {
        assert_eq!(joined(&[frame(7, b"sec"), frame(10, b"ret")]), [b"secret"]);
        assert_eq!(joined(&[frame(10, b"ret"), frame(7, b"sec")]), [b"secret"], "out of order");
        assert_eq!(joined(&[frame(7, b"sec"), frame(7, b"secr"), frame(11, b"et")]), [b"secret"], "sent again");
        assert_eq!(joined(&[frame(u32::MAX - 1, b"sec"), frame(1, b"ret")]), [b"secret"], "over the wrap");
    }

    #[test]
    fn a_gap_joins_nothing() {
        assert_eq!(joined(&[frame(7, b"sec"), frame(11, b"ret")]), [b"sec", b"ret"]);
    }

    #[test]
    fn a_full_tape_says_what_it_lost() {
        let mut tape = Tape { limit: 130, ..Tape::default() };
        for sequence in 0..3 {
            tape.push(frame(sequence, b"x"));
        }
        assert_eq!((tape.frames.len(), tape.missing), (2, 1));
    }
}
