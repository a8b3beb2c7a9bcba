//! Servers that a kubelet probes, and that tell who came: HTTP, TCP, and gRPC's health service.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};

use anyhow::Result;
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use super::{http, plain, print};

/// What a probe asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ProbeKind {
    /// `httpGet`
    Http,
    /// `tcpSocket`
    Tcp,
    /// `grpc`: `grpc.health.v1.Health/Check`.
    Grpc,
}

/// A client that was served.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Probed {
    /// What it asked.
    pub kind: ProbeKind,
    /// Its address as accept() told it.
    pub peer: SocketAddr,
}

/// Answers until the process ends, and prints a line of JSON for each client.
pub(super) fn serve(kind: ProbeKind, port: u16) -> Result<()> {
    http::listen_all(&[port], |stream| {
        // The client learns of a failure by the connection's end; the server has nobody to tell.
        let _ = answer(kind, stream);
    })
}

fn answer(kind: ProbeKind, stream: TcpStream) -> Result<()> {
    let peer = plain(stream.peer_addr()?);
    match kind {
        ProbeKind::Http => http::answer("probed", stream)?,
        ProbeKind::Tcp => drop(stream),
        ProbeKind::Grpc => serving(&stream)?,
    }
    print(&Probed { kind, peer })
}

/// Types of HTTP/2's frames (RFC 9113 §6).
mod frame {
    pub(super) const DATA: u8 = 0;
    pub(super) const HEADERS: u8 = 1;
    pub(super) const SETTINGS: u8 = 4;
    pub(super) const PING: u8 = 6;
}
/// `END_STREAM`; in SETTINGS and PING: `ACK`.
const LAST: u8 = 1;
const END_HEADERS: u8 = 4;

/// Answers every request of a connection with SERVING, until the client ends it: just so much of HTTP/2 as that takes.
fn serving(mut stream: &TcpStream) -> io::Result<()> {
    // The client's preface (RFC 9113 §3.4).
    stream.read_exact(&mut [0; 24])?;
    write_frame(stream, frame::SETTINGS, 0, 0, &[])?;
    let mut is_answered = false;
    loop {
        let mut head = [0; 9];
        match stream.read_exact(&mut head) {
            Err(_) if is_answered => return Ok(()),
            read => read?,
        }
        let [a, b, c, kind, flags, id @ ..] = head;
        let mut payload = vec![0; usize::try_from(u32::from_be_bytes([0, a, b, c])).unwrap_or(usize::MAX)];
        stream.read_exact(&mut payload)?;
        match kind {
            frame::SETTINGS | frame::PING if flags & LAST == 0 => {
                let same = if kind == frame::PING { payload.as_slice() } else { &[] };
                write_frame(stream, kind, LAST, 0, same)?;
            }
            frame::HEADERS | frame::DATA if flags & LAST != 0 => {
                respond(stream, u32::from_be_bytes(id))?;
                is_answered = true;
            }
            _ => {}
        }
    }
}

fn respond(stream: &TcpStream, id: u32) -> io::Result<()> {
    // RFC 7541: `:status: 200` by its index, and `content-type` by that of its name.
    let headers = [&[0x88, 0x0f, 0x10, 16][..], b"application/grpc"].concat();
    // One message, not compressed, of two bytes: field 1, `status`, is SERVING.
    let message = [0, 0, 0, 0, 2, 0x08, 1];
    let trailers = [&[0, 11][..], b"grpc-status", &[1], b"0"].concat();
    write_frame(stream, frame::HEADERS, END_HEADERS, id, &headers)?;
    write_frame(stream, frame::DATA, 0, id, &message)?;
    write_frame(stream, frame::HEADERS, END_HEADERS | LAST, id, &trailers)
}

fn write_frame(mut stream: &TcpStream, kind: u8, flags: u8, id: u32, payload: &[u8]) -> io::Result<()> {
    let [_, length @ ..] = u32::try_from(payload.len()).map_err(io::Error::other)?.to_be_bytes();
    stream.write_all(&[&length[..], &[kind, flags], &id.to_be_bytes(), payload].concat())
}
