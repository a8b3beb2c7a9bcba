//! HBONE: HTTP/2 CONNECT inside mutual TLS (semantics §14), wire-compatible with existing ambient data planes.
//!
//! Drives one connection, as client or server, on top of the `h2` crate; pooling is left to [`super::pool`], and the
//! meaning of a CONNECT to the caller.

pub(super) mod client;
pub(super) mod server;

use std::{
    fmt,
    future::Future as _,
    rc::Rc,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use h2::{Ping, PingPong, Reason, RecvStream, SendStream};
use tokio::time::{Instant, Sleep};

use super::StreamError;

/// Receive window of one stream, in bytes (§14.3). What one reader that stalls can make us hold.
const STREAM_WINDOW: u32 = 4 << 20;
/// Receive window of the connection, in bytes: the largest that RFC 9113 §6.9.1 allows.
///
/// 200 streams times [`STREAM_WINDOW`] is less, so that it never binds: readers who never read hold their own windows
/// and stall nobody else. The reference value of 16 MiB is used up by four of them.
const CONNECTION_WINDOW: u32 = (1 << 31) - 1;
/// Largest frame that we accept, in bytes (§14.3).
const MAX_FRAME: u32 = 1 << 20;
/// Bytes of one stream that may wait for the socket on our side.
const SEND_BUFFER: usize = 256 << 10;

/// What the peer sends on one stream. h2 resets an unfinished stream when its last handle is dropped.
pub(super) struct ReadHalf {
    recv: RecvStream,
    ended: bool,
    _slot: Option<Rc<client::Slot>>,
}

/// What we send on one stream.
pub(super) struct WriteHalf {
    send: SendStream<Bytes>,
    ended: bool,
    _slot: Option<Rc<client::Slot>>,
}

fn halves(recv: RecvStream, send: SendStream<Bytes>, slot: Option<client::Slot>) -> (ReadHalf, WriteHalf) {
    let slot = slot.map(Rc::new);
    (ReadHalf { recv, ended: false, _slot: slot.clone() }, WriteHalf { send, ended: false, _slot: slot })
}

impl ReadHalf {
    pub(super) fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>, StreamError>> {
        while !self.ended {
            match ready!(self.recv.poll_data(cx)) {
                Some(Ok(data)) => {
                    if !data.is_empty() {
                        self.recv.flow_control().release_capacity(data.len()).map_err(stream_error)?;
                        return Poll::Ready(Ok(Some(data)));
                    }
                }
                Some(Err(error)) => return Poll::Ready(Err(stream_error(error))),
                None => self.ended = true,
            }
        }
        Poll::Ready(Ok(None))
    }
}

impl WriteHalf {
    pub(super) fn poll_ready(&mut self, cx: &mut Context<'_>, want: usize) -> Poll<Result<usize, StreamError>> {
        self.send.reserve_capacity(want);
        loop {
            let room = self.send.capacity();
            if room > 0 {
                return Poll::Ready(Ok(room.min(want)));
            }
            match ready!(self.send.poll_capacity(cx)) {
                Some(Ok(_)) => {}
                Some(Err(error)) => return Poll::Ready(Err(stream_error(error))),
                None => return Poll::Ready(Err(self.cut(cx))),
            }
        }
    }

    pub(super) fn send(&mut self, data: Bytes) -> Result<(), StreamError> {
        let sent = self.send.send_data(data, false).map_err(stream_error);
        // What was reserved and not used would be missing from the connection's window.
        self.send.reserve_capacity(0);
        sent
    }

    pub(super) fn shutdown(&mut self) -> Result<(), StreamError> {
        if !self.ended {
            self.send.send_data(Bytes::new(), true).map_err(stream_error)?;
            self.ended = true;
        }
        Ok(())
    }

    pub(super) fn reset(&mut self, code: u32) {
        self.ended = true;
        self.send.send_reset(Reason::from(code));
    }

    pub(super) fn poll_cut(&mut self, cx: &mut Context<'_>) -> Poll<StreamError> {
        Poll::Ready(match ready!(self.send.poll_reset(cx)) {
            Ok(reason) => StreamError::Reset(reason.into()),
            Err(error) => stream_error(error),
        })
    }

    fn cut(&mut self, cx: &mut Context<'_>) -> StreamError {
        match self.poll_cut(cx) {
            Poll::Ready(error) => error,
            Poll::Pending => StreamError::Lost("stream closed".into()),
        }
    }
}

impl Drop for WriteHalf {
    fn drop(&mut self) {
        if !self.ended {
            self.send.send_reset(Reason::CANCEL);
        }
    }
}

impl fmt::Debug for ReadHalf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReadHalf").field("stream", &self.recv.stream_id()).field("ended", &self.ended).finish()
    }
}

impl fmt::Debug for WriteHalf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WriteHalf").field("stream", &self.send.stream_id()).field("ended", &self.ended).finish()
    }
}

fn stream_error(error: h2::Error) -> StreamError {
    match error.reason() {
        Some(reason) if error.is_reset() => StreamError::Reset(reason.into()),
        _ => StreamError::Lost(error.to_string().into()),
    }
}

/// PING every `interval`; the connection is dead if one is not answered within `timeout` (§14.3).
struct Keepalive {
    pings: Option<PingPong>,
    waiting: bool,
    interval: Duration,
    timeout: Duration,
    timer: std::pin::Pin<Box<Sleep>>,
    due: Instant,
}

impl Keepalive {
    fn new(pings: Option<PingPong>, interval: Duration, timeout: Duration) -> Self {
        let timer = Box::pin(tokio::time::sleep(interval));
        let due = timer.deadline();
        Self { pings, waiting: false, interval, timeout, timer, due }
    }

    /// Resolves when the peer is dead. Must be polled together with the connection.
    fn poll_dead(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            if self.waiting
                && let Some(pings) = &mut self.pings
                && let Poll::Ready(answer) = pings.poll_pong(cx)
            {
                if answer.is_err() {
                    // The connection itself reports why it is gone.
                    return Poll::Pending;
                }
                self.waiting = false;
                self.due += self.interval;
                self.due = self.due.max(Instant::now());
                self.timer.as_mut().reset(self.due);
            }
            ready!(self.timer.as_mut().poll(cx));
            if self.waiting {
                return Poll::Ready(());
            }
            let Some(pings) = &mut self.pings else { return Poll::Pending };
            if pings.send_ping(Ping::opaque()).is_err() {
                return Poll::Pending;
            }
            self.waiting = true;
            self.due = Instant::now();
            self.timer.as_mut().reset(self.due + self.timeout);
        }
    }
}
