//! HBONE: HTTP/2 CONNECT inside mutual TLS (semantics §14), wire-compatible with existing ambient data planes.
//!
//! Drives one connection, as client or server. Pooling is left to [`super::pool`], the meaning of a CONNECT to the
//! caller. From the wire inwards: `driver` (the socket), `tls` (records), `frame` and `hpack` (HTTP/2's syntax),
//! `connection` (all streams), `stream` (one of them), `outbox` (what is sent), `head` (what headers mean), `handle` (what
//! others hold), then `client` and `server`.

pub(super) mod client;
mod connection;
mod driver;
mod frame;
mod handle;
mod head;
mod hpack;
mod outbox;
pub(super) mod server;
mod stream;
mod tls;

use std::{
    io::{self, IoSliceMut},
    rc::Rc,
    sync::Arc,
    task::{Context, Poll},
};

use bytes::Bytes;

use super::{Charge, StreamError};

/// What the peer sends on one stream.
#[derive(Debug)]
pub(super) struct ReadHalf {
    half: handle::ReadHalf,
    _slot: Option<Rc<client::Slot>>,
}

/// What we send on one stream.
#[derive(Debug)]
pub(super) struct WriteHalf {
    half: handle::WriteHalf,
    _slot: Option<Rc<client::Slot>>,
}

fn halves(opening: handle::Opening, slot: Option<client::Slot>) -> (ReadHalf, WriteHalf) {
    let slot = slot.map(Rc::new);
    let (read, write) = opening.into_halves();
    (ReadHalf { half: read, _slot: slot.clone() }, WriteHalf { half: write, _slot: slot })
}

impl ReadHalf {
    pub(super) fn charge(&mut self, charge: Arc<Charge>) {
        self.half.charge(charge);
    }

    pub(super) fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>, StreamError>> {
        self.half.poll_read(cx)
    }

    pub(super) fn passed_on(&mut self, n: usize) {
        self.half.passed_on(n);
    }

    pub(super) fn poll_cut(&mut self, cx: &mut Context<'_>) -> Poll<StreamError> {
        self.half.poll_cut(cx)
    }
}

impl WriteHalf {
    pub(super) fn poll_ready(&mut self, cx: &mut Context<'_>, want: usize) -> Poll<Result<usize, StreamError>> {
        self.half.poll_ready(cx, want)
    }

    pub(super) fn send_from(
        &mut self,
        most: usize,
        read: impl FnOnce(&mut [IoSliceMut<'_>]) -> io::Result<usize>,
    ) -> Result<io::Result<usize>, StreamError> {
        self.half.send_from(most, read)
    }

    pub(super) fn shutdown(&mut self) -> Result<(), StreamError> {
        self.half.shutdown()
    }

    pub(super) fn reset(&mut self, code: u32) {
        self.half.reset(code);
    }

    pub(super) fn poll_cut(&mut self, cx: &mut Context<'_>) -> Poll<StreamError> {
        self.half.poll_cut(cx)
    }
}
