//! A byte stream through a tunnel, whatever kind of tunnel carries it.

use std::{
    fmt,
    future::poll_fn,
    io::{self, IoSliceMut},
    sync::Arc,
    task::{Context, Poll},
};

use bytes::Bytes;

use super::{Charge, hbone};

/// Why a stream ended without END_STREAM: the bytes so far may be a truncated message, so that the socket on the
/// other side must be reset, never closed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StreamError {
    /// RST_STREAM with this code (RFC 9113 §7), by the peer or by ourselves.
    Reset(u32),
    /// The connection that carried the stream is gone; the text says how.
    Lost(Arc<str>),
}

impl fmt::Display for StreamError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Reset(code) => write!(f, "tunnel stream reset with code {code:#x}"),
            Self::Lost(how) => write!(f, "tunnel connection lost: {how}"),
        }
    }
}

impl std::error::Error for StreamError {}

/// RST_STREAM codes that a proxy has use for (RFC 9113 §7).
pub mod code {
    /// Not an error: the rest is not wanted.
    pub const NO_ERROR: u32 = 0x0;
    /// We failed.
    pub const INTERNAL_ERROR: u32 = 0x2;
    /// Refused before anything was done with it; safe to try again.
    pub const REFUSED_STREAM: u32 = 0x7;
    /// No longer wanted.
    pub const CANCEL: u32 = 0x8;
    /// The TCP connection behind a CONNECT failed or was reset (RFC 9113 §8.5).
    pub const CONNECT_ERROR: u32 = 0xa;
}

/// Both directions of one tunnelled connection.
///
/// Dropped before both directions have ended, it is reset: an unfinished stream never looks finished.
#[derive(Debug)]
pub struct Stream {
    read: ReadHalf,
    write: WriteHalf,
    baggage: Option<String>,
}

impl Stream {
    pub(super) fn hbone(read: hbone::ReadHalf, write: hbone::WriteHalf, baggage: Option<String>) -> Self {
        Self { read: ReadHalf(Read::Hbone(read)), write: WriteHalf(Write::Hbone(write)), baggage }
    }

    /// The `baggage` header of the answer to our CONNECT: telemetry only ([H.2]). `None` on the server side.
    pub fn baggage(&self) -> Option<&str> {
        self.baggage.as_deref()
    }

    /// Counts what this stream holds from now on, and lets it be cut off where its owner holds too much.
    pub fn charge(&mut self, charge: Arc<Charge>) {
        match &mut self.read.0 {
            Read::Hbone(half) => half.charge(charge),
        }
    }

    /// The two directions, to be used side by side.
    pub fn split(self) -> (ReadHalf, WriteHalf) {
        (self.read, self.write)
    }

    /// [`ReadHalf::read`]
    ///
    /// # Errors
    /// [`StreamError`] if the stream was cut off.
    pub async fn read(&mut self) -> Result<Option<Bytes>, StreamError> {
        self.read.read().await
    }

    /// [`WriteHalf::write`]
    ///
    /// # Errors
    /// [`StreamError`] if the stream was cut off.
    pub async fn write(&mut self, data: &[u8]) -> Result<(), StreamError> {
        self.write.write(data).await
    }

    /// [`WriteHalf::shutdown`]
    ///
    /// # Errors
    /// [`StreamError`] if the stream was cut off.
    pub fn shutdown(&mut self) -> Result<(), StreamError> {
        self.write.shutdown()
    }

    /// [`WriteHalf::reset`]
    pub fn reset(&mut self, code: u32) {
        self.write.reset(code);
    }
}

/// What the peer sends.
#[derive(Debug)]
pub struct ReadHalf(Read);

/// What we send. Dropped before [`shutdown`](Self::shutdown), it resets the stream.
#[derive(Debug)]
pub struct WriteHalf(Write);

#[derive(Debug)]
enum Read {
    Hbone(hbone::ReadHalf),
}

#[derive(Debug)]
enum Write {
    Hbone(hbone::WriteHalf),
}

impl ReadHalf {
    /// The next bytes, never empty; `None` once and for all after END_STREAM.
    ///
    /// # Errors
    /// [`StreamError`] if the stream was cut off; what came before has been delivered.
    pub async fn read(&mut self) -> Result<Option<Bytes>, StreamError> {
        let bytes = poll_fn(|cx| self.poll_read(cx)).await?;
        self.passed_on(bytes.as_ref().map_or(0, Bytes::len));
        Ok(bytes)
    }

    /// See [`read`](Self::read). What is given counts as held for the stream's owner until it was
    /// [passed on](Self::passed_on).
    pub fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>, StreamError>> {
        match &mut self.0 {
            Read::Hbone(half) => half.poll_read(cx),
        }
    }

    /// `n` bytes of what [`poll_read`](Self::poll_read) gave are held no more: the peer gets window for as many.
    pub fn passed_on(&mut self, n: usize) {
        match &mut self.0 {
            Read::Hbone(half) => half.passed_on(n),
        }
    }

    /// Resolves when this direction was cut off, for those who wait for something else than its next bytes.
    pub fn poll_cut(&mut self, cx: &mut Context<'_>) -> Poll<StreamError> {
        match &mut self.0 {
            Read::Hbone(half) => half.poll_cut(cx),
        }
    }
}

impl WriteHalf {
    /// Sends all of `data`, waiting for the peer's window and the connection's buffer.
    ///
    /// # Errors
    /// [`StreamError`] if the stream was cut off.
    pub async fn write(&mut self, data: &[u8]) -> Result<(), StreamError> {
        let mut rest = data;
        while !rest.is_empty() {
            let room = poll_fn(|cx| self.poll_ready(cx, rest.len())).await?;
            // Reading from a slice does not fail.
            let _ = self.send_from(room, |slices| io::Read::read_vectored(&mut rest, slices))?;
        }
        Ok(())
    }

    /// How many bytes [`send_from`](Self::send_from) takes now: at least one, at most `want`, which is not zero.
    pub fn poll_ready(&mut self, cx: &mut Context<'_>, want: usize) -> Poll<Result<usize, StreamError>> {
        match &mut self.0 {
            Write::Hbone(half) => half.poll_ready(cx, want),
        }
    }

    /// Lets `read` put up to `most` bytes, which is no more than [`poll_ready`](Self::poll_ready) just gave, where they
    /// are sent from, and sends them; gives what `read` gave. Nothing is copied on the way.
    ///
    /// # Errors
    /// [`StreamError`] if the stream was cut off; the inner error is that of `read`.
    pub fn send_from(
        &mut self,
        most: usize,
        read: impl FnOnce(&mut [IoSliceMut<'_>]) -> io::Result<usize>,
    ) -> Result<io::Result<usize>, StreamError> {
        match &mut self.0 {
            Write::Hbone(half) => half.send_from(most, read),
        }
    }

    /// Ends this direction with END_STREAM; the other goes on. Again is harmless.
    ///
    /// # Errors
    /// [`StreamError`] if the stream was cut off.
    pub fn shutdown(&mut self) -> Result<(), StreamError> {
        match &mut self.0 {
            Write::Hbone(half) => half.shutdown(),
        }
    }

    /// Cuts off both directions with RST_STREAM ([`code`]); nothing happens if both have ended.
    pub fn reset(&mut self, code: u32) {
        match &mut self.0 {
            Write::Hbone(half) => half.reset(code),
        }
    }

    /// Resolves when the peer has cut the stream off, or the connection was lost, with the reason.
    pub fn poll_cut(&mut self, cx: &mut Context<'_>) -> Poll<StreamError> {
        match &mut self.0 {
            Write::Hbone(half) => half.poll_cut(cx),
        }
    }
}
