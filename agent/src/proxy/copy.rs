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
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll, ready},
};

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use tokio::{io::Interest, net::TcpStream};

pub use crate::telemetry::open::Counters;
use crate::{
    busy_poll,
    tunnel::{self, StreamError},
};

/// Most bytes read from a socket at once.
const CHUNK: usize = 128 << 10;
/// Reads up to this are copied out, so that a few bytes that wait for a slow socket do not hold a whole buffer; and most
/// that is read from one socket for another once half of the memory is used that there is for the pod.
const SMALL: usize = 4 << 10;
/// Most chunks handed to the kernel in one call.
const VECTORS: usize = 32;
/// Room for more chunks than this is not kept while there are none.
const IDLE_CHUNKS: usize = 4;

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
///
/// One future for both directions, polled by hand: of an idle connection this is most of what the agent holds.
pub async fn bidirectional(socket: ResetOnClose, stream: tunnel::Stream, counters: &Counters) -> CopyOutcome {
    let (mut read, mut write) = stream.split();
    let copied = {
        let (mut into, mut out_of) = (IntoTunnel { done: false }, OutOfTunnel::default());
        let mut failed = pin!(socket_error(&socket.0));
        poll_fn(|cx| {
            busy_poll::worked();
            let into = into.poll(cx, &socket.0, &mut write, &counters.forward);
            let both = join(into, || out_of.poll(cx, &mut read, &socket.0, &counters.backward));
            if both.is_pending()
                && let Poll::Ready(cause) = failed.as_mut().poll(cx)
            {
                return Poll::Ready(Err(near(cause)));
            }
            both
        })
        .await
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

/// Copies between two sockets until both directions have ended or one side was cut off. What lies between them counts in
/// `charge`; nothing is cut for it, since TCP can hold the sender back.
pub async fn bidirectional_plain(
    a: ResetOnClose,
    b: ResetOnClose,
    counters: &Counters,
    charge: &tunnel::Charge,
) -> CopyOutcome {
    let copied = {
        let (mut forward, mut backward) = (BetweenSockets::default(), BetweenSockets::default());
        let (mut a_failed, mut b_failed) = (pin!(socket_error(&a.0)), pin!(socket_error(&b.0)));
        poll_fn(|cx| {
            busy_poll::worked();
            let most = if charge.may_grow() { CHUNK } else { SMALL };
            let one = forward.poll(cx, (&a.0, near), (&b.0, far), most, &counters.forward);
            let both = join(one, || backward.poll(cx, (&b.0, far), (&a.0, near), most, &counters.backward));
            charge.hold(forward.bytes.len() + backward.bytes.len());
            if both.is_pending() {
                if let Poll::Ready(cause) = a_failed.as_mut().poll(cx) {
                    return Poll::Ready(Err(near(cause)));
                }
                if let Poll::Ready(cause) = b_failed.as_mut().poll(cx) {
                    return Poll::Ready(Err(far(cause)));
                }
            }
            both
        })
        .await
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

/// One direction, as far as it got: at its end, or cut off, or waiting.
type Progress = Poll<Result<(), CopyOutcome>>;

/// Both directions: the first that is cut off ends them, else the last.
fn join(one: Progress, other: impl FnOnce() -> Progress) -> Progress {
    match one {
        Poll::Ready(Err(cut)) => Poll::Ready(Err(cut)),
        Poll::Ready(Ok(())) => other(),
        Poll::Pending => match other() {
            Poll::Ready(Err(cut)) => Poll::Ready(Err(cut)),
            Poll::Ready(Ok(())) | Poll::Pending => Poll::Pending,
        },
    }
}

/// From a socket into the tunnel.
struct IntoTunnel {
    done: bool,
}

impl IntoTunnel {
    fn poll(
        &mut self,
        cx: &mut Context<'_>,
        socket: &TcpStream,
        to: &mut tunnel::WriteHalf,
        count: &AtomicU64,
    ) -> Progress {
        while !self.done {
            match socket.poll_read_ready(cx) {
                Poll::Ready(ready) => ready.map_err(near)?,
                Poll::Pending => {
                    let cut = ready!(to.poll_cut(cx));
                    return self.not_wanted(cut);
                }
            }
            // Window first, then bytes: what does not fit stays in the socket, where TCP holds the sender back.
            let room = match ready!(to.poll_ready(cx, CHUNK)) {
                Ok(room) => room,
                Err(cut) => return self.not_wanted(cut),
            };
            let mut space = 0;
            let read = to.send_from(room, |slices| {
                space = slices.iter().map(|slice| slice.len()).sum();
                socket.try_read_vectored(slices)
            });
            match read.map_err(far)? {
                Ok(0) => {
                    to.shutdown().map_err(far)?;
                    self.done = true;
                }
                Ok(n) => {
                    count.fetch_add(n as u64, Ordering::Relaxed);
                    if n < space {
                        mark_empty(socket);
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(near(error))),
            }
        }
        Poll::Ready(Ok(()))
    }

    /// A peer that has sent all it has may say that it wants no more of ours (RFC 9113 §8.1): a socket would be closed
    /// with unread bytes then, and so is ours, once the other direction has ended.
    fn not_wanted(&mut self, cut: StreamError) -> Progress {
        match cut {
            StreamError::Reset(tunnel::code::NO_ERROR) => {
                self.done = true;
                Poll::Ready(Ok(()))
            }
            cut => Poll::Ready(Err(far(cut))),
        }
    }
}

/// From the tunnel into a socket.
#[derive(Default)]
struct OutOfTunnel {
    /// Taken from the tunnel, not yet by the socket.
    chunks: VecDeque<Bytes>,
    /// The tunnel has no more.
    ended: bool,
    done: bool,
}

impl OutOfTunnel {
    fn poll(
        &mut self,
        cx: &mut Context<'_>,
        from: &mut tunnel::ReadHalf,
        socket: &TcpStream,
        count: &AtomicU64,
    ) -> Progress {
        while !self.done {
            // Everything that is there, up to one call's worth; waits only if there is nothing.
            while self.chunks.len() < VECTORS && !self.ended {
                match from.poll_read(cx) {
                    Poll::Ready(Ok(Some(bytes))) => self.chunks.push_back(bytes),
                    Poll::Ready(Ok(None)) => self.ended = true,
                    // What came before the cut is not delivered: the reset overtakes it, as it does in TCP.
                    Poll::Ready(Err(error)) => return Poll::Ready(Err(far(error))),
                    Poll::Pending if self.chunks.is_empty() => {
                        if self.chunks.capacity() > IDLE_CHUNKS {
                            self.chunks = VecDeque::new();
                        }
                        return Poll::Pending;
                    }
                    Poll::Pending => break,
                }
            }
            while !self.chunks.is_empty() {
                // Counts against what a task may do before others have their turn.
                match socket.poll_write_ready(cx) {
                    Poll::Ready(ready) => ready.map_err(near)?,
                    Poll::Pending => return from.poll_cut(cx).map(|cut| Err(far(cut))),
                }
                match write(socket, &self.chunks) {
                    Ok(written) => {
                        count.fetch_add(written as u64, Ordering::Relaxed);
                        advance(&mut self.chunks, written);
                        from.passed_on(written);
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    Err(error) => return Poll::Ready(Err(near(error))),
                }
            }
            if self.ended {
                shut_down(socket).map_err(near)?;
                self.done = true;
            }
        }
        Poll::Ready(Ok(()))
    }
}

fn write(socket: &TcpStream, chunks: &VecDeque<Bytes>) -> io::Result<usize> {
    if let [only] = chunks.as_slices().0
        && chunks.len() == 1
    {
        return socket.try_write(only);
    }
    let mut slices = [IoSlice::new(&[]); VECTORS];
    for (slice, chunk) in slices.iter_mut().zip(chunks) {
        *slice = IoSlice::new(chunk);
    }
    socket.try_write_vectored(&slices[..chunks.len().min(VECTORS)])
}

/// From one socket into another.
#[derive(Default)]
struct BetweenSockets {
    /// Taken from the one, not yet by the other.
    bytes: Bytes,
    /// They are alone in their memory.
    alone: bool,
    done: bool,
}

/// A socket, and whose failure its failure is.
type Named<'a> = (&'a TcpStream, fn(io::Error) -> CopyOutcome);

impl BetweenSockets {
    fn poll(
        &mut self,
        cx: &mut Context<'_>,
        (from, read_failed): Named<'_>,
        (to, write_failed): Named<'_>,
        most: usize,
        count: &AtomicU64,
    ) -> Progress {
        while !self.done {
            if self.bytes.is_empty() {
                ready!(from.poll_read_ready(cx)).map_err(read_failed)?;
                match read_chunk(from, most).map_err(read_failed)? {
                    Read::Nothing => {}
                    Read::Eof => {
                        shut_down(to).map_err(write_failed)?;
                        self.done = true;
                    }
                    Read::Bytes(bytes) => (self.bytes, self.alone) = (bytes, false),
                }
            } else {
                match to.poll_write_ready(cx) {
                    Poll::Ready(ready) => ready.map_err(write_failed)?,
                    Poll::Pending => {
                        self.settle();
                        return Poll::Pending;
                    }
                }
                match to.try_write(&self.bytes) {
                    Ok(written) => {
                        count.fetch_add(written as u64, Ordering::Relaxed);
                        if written < self.bytes.len() {
                            self.bytes.advance(written);
                        } else {
                            // An empty rest would hold the whole buffer.
                            self.bytes = Bytes::new();
                        }
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    Err(error) => return Poll::Ready(Err(write_failed(error))),
                }
            }
        }
        Poll::Ready(Ok(()))
    }

    /// What has to wait holds no more memory than twice its bytes.
    fn settle(&mut self) {
        if !self.alone && self.bytes.len() < CHUNK / 2 {
            self.bytes = Bytes::copy_from_slice(&self.bytes);
            self.alone = true;
        }
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
            arena.reserve(CHUNK);
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
        Ok(Read::Bytes(if read <= SMALL {
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
