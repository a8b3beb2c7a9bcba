//! What the rest of the tunnel holds of a stream: a request that waits for its answer, then its two directions.

use std::{
    fmt,
    io::{self, IoSliceMut},
    sync::Arc,
    task::{Context, Poll},
};

use bytes::Bytes;

use super::{connection::Shared, head::Head};
use crate::tunnel::{Charge, StreamError};

/// A stream before it has two halves: a request that waits for its answer, on either side.
pub(super) struct Opening {
    core: Shared,
    id: u32,
    taken: bool,
}

impl Opening {
    /// Sends a request (client). The caller has checked that the peer takes one more.
    pub(super) fn request(core: &Shared, block: &[u8]) -> Option<Self> {
        let id = core.borrow_mut().open(block)?;
        Some(Self { core: core.clone(), id, taken: false })
    }

    /// Takes what [`Core::arrival`] gave (server).
    pub(super) fn arrived(core: &Shared, id: u32) -> Self {
        Self { core: core.clone(), id, taken: false }
    }

    /// The answer; or why there is none, and whether the peer did nothing with the request.
    pub(super) fn poll_answer(&mut self, cx: &Context<'_>) -> Poll<Result<Head, (StreamError, bool)>> {
        self.core.borrow_mut().poll_answer(self.id, cx)
    }

    /// Resolves when the peer has given up.
    pub(super) fn poll_cut(&mut self, cx: &Context<'_>) -> Poll<StreamError> {
        self.core.borrow_mut().poll_cut(self.id, cx, false)
    }

    /// Sends the answer (server).
    pub(super) fn answer(&mut self, block: &[u8], end: bool) -> Result<(), StreamError> {
        self.core.borrow_mut().answer(self.id, block, end)
    }

    /// The stream itself.
    pub(super) fn into_halves(mut self) -> (ReadHalf, WriteHalf) {
        self.taken = true;
        let (core, id) = (self.core.clone(), self.id);
        core.borrow_mut().split(id);
        (ReadHalf { core: core.clone(), id }, WriteHalf { core, id })
    }
}

impl Drop for Opening {
    fn drop(&mut self) {
        if !self.taken {
            self.core.borrow_mut().release(self.id);
        }
    }
}

/// What the peer sends on one stream.
pub(in crate::tunnel) struct ReadHalf {
    core: Shared,
    id: u32,
}

/// What we send on one stream.
pub(in crate::tunnel) struct WriteHalf {
    core: Shared,
    id: u32,
}

impl ReadHalf {
    pub(in crate::tunnel) fn charge(&mut self, charge: Arc<Charge>) {
        self.core.borrow_mut().charge(self.id, charge);
    }

    pub(in crate::tunnel) fn poll_read(&mut self, cx: &Context<'_>) -> Poll<Result<Option<Bytes>, StreamError>> {
        self.core.borrow_mut().poll_read(self.id, cx)
    }

    pub(in crate::tunnel) fn passed_on(&mut self, n: usize) {
        self.core.borrow_mut().passed_on(self.id, n);
    }

    pub(in crate::tunnel) fn poll_cut(&mut self, cx: &Context<'_>) -> Poll<StreamError> {
        self.core.borrow_mut().poll_cut(self.id, cx, true)
    }
}

impl WriteHalf {
    pub(in crate::tunnel) fn poll_ready(&mut self, cx: &Context<'_>, want: usize) -> Poll<Result<usize, StreamError>> {
        self.core.borrow_mut().poll_ready(self.id, cx, want)
    }

    pub(in crate::tunnel) fn send_from(
        &mut self,
        most: usize,
        read: impl FnOnce(&mut [IoSliceMut<'_>]) -> io::Result<usize>,
    ) -> Result<io::Result<usize>, StreamError> {
        self.core.borrow_mut().send(self.id, most, read)
    }

    pub(in crate::tunnel) fn shutdown(&mut self) -> Result<(), StreamError> {
        self.core.borrow_mut().shutdown(self.id)
    }

    pub(in crate::tunnel) fn reset(&mut self, code: u32) {
        self.core.borrow_mut().reset(self.id, code);
    }

    pub(in crate::tunnel) fn poll_cut(&mut self, cx: &Context<'_>) -> Poll<StreamError> {
        self.core.borrow_mut().poll_cut(self.id, cx, false)
    }
}

impl Drop for ReadHalf {
    fn drop(&mut self) {
        self.core.borrow_mut().drop_reader(self.id);
    }
}

impl Drop for WriteHalf {
    fn drop(&mut self) {
        self.core.borrow_mut().drop_writer(self.id);
    }
}

impl fmt::Debug for ReadHalf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReadHalf").field("stream", &self.id).finish_non_exhaustive()
    }
}

impl fmt::Debug for WriteHalf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WriteHalf").field("stream", &self.id).finish_non_exhaustive()
    }
}
