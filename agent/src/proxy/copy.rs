//! Moves the bytes of one connection between two sockets, or between a socket and a tunnel stream.
//!
//! Knows nothing of policy; whoever wants to end a connection early drops the future, and both sides are then reset.
//! A direction that ended with EOF is passed on as EOF while the other goes on; whatever was cut off is passed on as
//! a reset, so that a truncated transfer never looks like a finished one.

use std::{
    cell::RefCell,
    collections::VecDeque,
    future::poll_fn,
    io::{self, IoSlice},
    net::Shutdown,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::Poll,
};

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use tokio::{io::Interest, net::TcpStream, task::coop::consume_budget};

pub use crate::telemetry::open::Counters;
use crate::tunnel::{self, StreamError};

/// Most bytes read from a socket at once.
const CHUNK: usize = 128 << 10;
/// Reads below this are copied out, so that a few bytes that wait for a slow socket do not hold a whole buffer.
const SMALL: usize = 4 << 10;
/// Most chunks handed to the kernel in one call.
const VECTORS: usize = 32;

/// One of the two sides that were passed in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The socket, or the first of two.
    Near,
    /// The tunnel stream, or the second of two sockets.
    Far,
}

/// How a connection ended.
#[derive(Debug)]
pub enum CopyOutcome {
    /// Both directions ended with EOF.
    Finished,
    /// One side was reset or lost; so was the other, by us.
    Cut {
        /// Which side failed.
        side: Side,
        /// How.
        cause: Cause,
    },
}

/// How one side of a connection failed.
#[derive(Debug)]
pub enum Cause {
    /// The peer of this side reset it.
    Reset,
    /// The tunnel connection that carried this side is gone; the text says how.
    TunnelLost(Arc<str>),
    /// Any other failure of a socket, such as a time-out.
    Socket(io::Error),
}

impl From<io::Error> for Cause {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionAborted => {
                Self::Reset
            }
            _ => Self::Socket(error),
        }
    }
}

impl From<StreamError> for Cause {
    fn from(error: StreamError) -> Self {
        match error {
            StreamError::Reset(_) => Self::Reset,
            StreamError::Lost(how) => Self::TunnelLost(how),
        }
    }
}

fn near(cause: impl Into<Cause>) -> CopyOutcome {
    CopyOutcome::Cut { side: Side::Near, cause: cause.into() }
}

fn far(cause: impl Into<Cause>) -> CopyOutcome {
    CopyOutcome::Cut { side: Side::Far, cause: cause.into() }
}

/// A socket whose close is a reset until both directions have ended, whoever closes it: the kernel does when the agent is
/// killed, and then too what was cut off must not look finished.
pub struct ResetOnClose(TcpStream);

impl ResetOnClose {
    /// Makes it so.
    pub fn new(socket: TcpStream) -> Self {
        super::reset_on_close(&socket);
        Self(socket)
    }

    /// Accepted from a listener of `crate::listen` whose sockets are so from the start.
    pub fn inherited(socket: TcpStream) -> Self {
        Self(socket)
    }

    /// The socket.
    pub fn get(&self) -> &TcpStream {
        &self.0
    }

    /// Both directions have ended: what is still on its way is delivered.
    fn finish(self) {
        // Fails only on a socket that has no connection any more.
        let _ = socket2::SockRef::from(&self.0).set_linger(None);
    }
}

/// Copies between `socket` and the tunnel until both directions have ended or one side was cut off.
pub async fn bidirectional(socket: ResetOnClose, stream: tunnel::Stream, counters: &Counters) -> CopyOutcome {
    let (mut read, mut write) = stream.split();
    let copied = {
        let both = async {
            tokio::try_join!(
                into_tunnel(&socket.0, &mut write, &counters.forward),
                out_of_tunnel(&mut read, &socket.0, &counters.backward),
            )
        };
        tokio::select! {
            copied = both => copied.map(drop),
            cause = socket_error(&socket.0) => Err(near(cause)),
        }
    };
    match copied {
        Ok(()) => {
            socket.finish();
            CopyOutcome::Finished
        }
        Err(outcome) => {
            write.reset(tunnel::code::CONNECT_ERROR);
            outcome
        }
    }
}

/// Copies between two sockets until both directions have ended or one side was cut off.
pub async fn bidirectional_plain(a: ResetOnClose, b: ResetOnClose, counters: &Counters) -> CopyOutcome {
    let copied = {
        let both = async {
            tokio::try_join!(
                between_sockets(&a.0, &b.0, &counters.forward, near, far),
                between_sockets(&b.0, &a.0, &counters.backward, far, near),
            )
        };
        tokio::select! {
            copied = both => copied.map(drop),
            cause = socket_error(&a.0) => Err(near(cause)),
            cause = socket_error(&b.0) => Err(far(cause)),
        }
    };
    match copied {
        Ok(()) => {
            a.finish();
            b.finish();
            CopyOutcome::Finished
        }
        Err(outcome) => outcome,
    }
}

async fn into_tunnel(socket: &TcpStream, to: &mut tunnel::WriteHalf, count: &AtomicU64) -> Result<(), CopyOutcome> {
    loop {
        tokio::select! {
            biased;
            ready = socket.readable() => ready.map_err(near)?,
            cut = poll_fn(|cx| to.poll_cut(cx)) => return not_wanted(cut),
        }
        // Window first, then bytes: what does not fit stays in the socket, where TCP holds the sender back.
        let room = match poll_fn(|cx| to.poll_ready(cx, CHUNK)).await {
            Ok(room) => room,
            Err(cut) => return not_wanted(cut),
        };
        let mut space = 0;
        let read = to.send_from(room, |slices| {
            space = slices.iter().map(|slice| slice.len()).sum();
            socket.try_read_vectored(slices)
        });
        match read.map_err(far)? {
            Ok(0) => return to.shutdown().map_err(far),
            Ok(n) => {
                count.fetch_add(n as u64, Ordering::Relaxed);
                if n < space {
                    mark_empty(socket);
                }
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(near(error)),
        }
        consume_budget().await;
    }
}

/// A peer that has sent all it has may say that it wants no more of ours (RFC 9113 §8.1): a socket would be closed
/// with unread bytes then, and so is ours, once the other direction has ended.
fn not_wanted(cut: StreamError) -> Result<(), CopyOutcome> {
    match cut {
        StreamError::Reset(tunnel::code::NO_ERROR) => Ok(()),
        cut => Err(far(cut)),
    }
}

async fn out_of_tunnel(from: &mut tunnel::ReadHalf, socket: &TcpStream, count: &AtomicU64) -> Result<(), CopyOutcome> {
    let mut chunks: VecDeque<Bytes> = VecDeque::new();
    loop {
        let mut ended = false;
        // Everything that is there, up to one call's worth; waits only if there is nothing.
        let gathered = poll_fn(|cx| {
            while chunks.len() < VECTORS {
                match from.poll_read(cx) {
                    Poll::Ready(Ok(Some(bytes))) => chunks.push_back(bytes),
                    Poll::Ready(Ok(None)) => {
                        ended = true;
                        break;
                    }
                    // What came before the cut is not delivered: the reset overtakes it, as it does in TCP.
                    Poll::Ready(Err(error)) => return Poll::Ready(Err(far(error))),
                    Poll::Pending if chunks.is_empty() => return Poll::Pending,
                    Poll::Pending => break,
                }
            }
            Poll::Ready(Ok(()))
        });
        gathered.await?;
        while !chunks.is_empty() {
            let mut slices = [IoSlice::new(&[]); VECTORS];
            for (slice, chunk) in slices.iter_mut().zip(&chunks) {
                *slice = IoSlice::new(chunk);
            }
            let used = chunks.len().min(VECTORS);
            match socket.try_write_vectored(&slices[..used]) {
                Ok(written) => {
                    count.fetch_add(written as u64, Ordering::Relaxed);
                    advance(&mut chunks, written);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    tokio::select! {
                        ready = socket.writable() => ready.map_err(near)?,
                        cut = poll_fn(|cx| from.poll_cut(cx)) => return Err(far(cut)),
                    }
                }
                Err(error) => return Err(near(error)),
            }
        }
        if ended {
            return shut_down(socket).map_err(near);
        }
        consume_budget().await;
    }
}

async fn between_sockets(
    from: &TcpStream,
    to: &TcpStream,
    count: &AtomicU64,
    read_failed: fn(io::Error) -> CopyOutcome,
    write_failed: fn(io::Error) -> CopyOutcome,
) -> Result<(), CopyOutcome> {
    loop {
        from.readable().await.map_err(read_failed)?;
        match read_chunk(from, CHUNK).map_err(read_failed)? {
            Read::Nothing => {}
            Read::Eof => return shut_down(to).map_err(write_failed),
            Read::Bytes(mut bytes) => {
                while !bytes.is_empty() {
                    match to.try_write(&bytes) {
                        Ok(written) => {
                            count.fetch_add(written as u64, Ordering::Relaxed);
                            bytes.advance(written);
                        }
                        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                            to.writable().await.map_err(write_failed)?;
                        }
                        Err(error) => return Err(write_failed(error)),
                    }
                }
            }
        }
        consume_budget().await;
    }
}

enum Read {
    Nothing,
    Eof,
    Bytes(Bytes),
}

thread_local! {
    /// Where this thread reads into. What is read is split off; the memory comes back when the last piece is sent, so
    /// that connections with nothing to read hold no buffer.
    static ARENA: RefCell<BytesMut> = RefCell::new(BytesMut::new());
}

/// One read of at most `most` bytes, which is not zero.
fn read_chunk(socket: &TcpStream, most: usize) -> io::Result<Read> {
    ARENA.with_borrow_mut(|arena| {
        let most = most.min(CHUNK);
        if arena.capacity() < most {
            arena.reserve(4 * CHUNK);
        }
        let read = match socket.try_read_buf(&mut (&mut *arena).limit(most)) {
            Ok(0) => return Ok(Read::Eof),
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Read::Nothing),
            Err(error) => return Err(error),
        };
        if read < most {
            mark_empty(socket);
        }
        Ok(Read::Bytes(if read < SMALL {
            let bytes = Bytes::copy_from_slice(arena);
            arena.clear();
            bytes
        } else {
            arena.split().freeze()
        }))
    })
}

/// The socket gave less than was asked for, so it is empty: says so to the reactor, instead of asking the kernel to hear
/// it. A FIN or a reset that came meanwhile is remembered separately.
fn mark_empty(socket: &TcpStream) {
    let _ = socket.try_io(Interest::READABLE, || io::Result::<()>::Err(io::ErrorKind::WouldBlock.into()));
}

fn advance(chunks: &mut VecDeque<Bytes>, mut written: usize) {
    while written > 0 {
        let Some(first) = chunks.front_mut() else { return };
        if first.len() > written {
            first.advance(written);
            return;
        }
        written -= first.len();
        chunks.pop_front();
    }
}

/// Sends FIN. A socket whose peer is already gone entirely has nobody to tell.
fn shut_down(socket: &TcpStream) -> io::Result<()> {
    match socket2::SockRef::from(socket).shutdown(Shutdown::Write) {
        Err(error) if error.kind() == io::ErrorKind::NotConnected => Ok(()),
        done => done,
    }
}

/// Resolves when the socket has failed, even while nobody reads or writes because the other side is stalled.
async fn socket_error(socket: &TcpStream) -> Cause {
    loop {
        if let Err(error) = socket.ready(Interest::ERROR).await {
            return error.into();
        }
        match socket.take_error() {
            Ok(Some(error)) | Err(error) => return error.into(),
            Ok(None) => {
                let _ = socket.try_io(Interest::ERROR, || io::Result::<()>::Err(io::ErrorKind::WouldBlock.into()));
            }
        }
    }
}
