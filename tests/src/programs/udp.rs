//! Datagrams: a server that sends each back with the address that it came from, and a client that checks what it gets.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::time::Duration;

use anyhow::Result;
use serde::{Deserialize, Serialize};

use super::{Failure, plain};

/// More than any datagram has.
const LARGEST: usize = 64 << 10;

/// What came of a datagram.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UdpResult {
    /// The address that the server saw.
    pub seen: Option<SocketAddr>,
    /// The address that the answer came from.
    pub from: Option<SocketAddr>,
    /// The client's own.
    pub own: Option<SocketAddr>,
    /// How it failed, if it did; `Corrupt` where other bytes came back.
    pub failure: Option<Failure>,
    /// The error's own text.
    pub error: Option<String>,
}

/// One socket for both families.
pub(super) fn serve(port: u16) -> Result<()> {
    let socket = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, port))?;
    let mut buffer = vec![0; LARGEST];
    loop {
        let (length, from) = socket.recv_from(&mut buffer)?;
        let answer = [format!("{}\n", plain(from)).as_bytes(), &buffer[..length]].concat();
        // Whoever asked may have gone.
        let _ = socket.send_to(&answer, from);
    }
}

/// `connected`: by a socket that knows its peer, as resolvers have; else by one that names it with each datagram.
pub(super) fn call(to: SocketAddr, bytes: usize, connected: bool, limit: Duration) -> UdpResult {
    let mut result = UdpResult { seen: None, from: None, own: None, failure: None, error: None };
    if let Err(error) = attempt(to, bytes, connected, limit, &mut result) {
        result.failure = Some(Failure::of(&error));
        result.error = Some(error.to_string());
    }
    result
}

fn attempt(to: SocketAddr, bytes: usize, connected: bool, limit: Duration, result: &mut UdpResult) -> io::Result<()> {
    let any: IpAddr = if to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0))?;
    socket.set_read_timeout(Some(limit))?;
    let sent: Vec<u8> = (0..bytes).map(|at| (at ^ (at >> 8)) as u8).collect();
    if connected {
        socket.connect(to)?;
        socket.send(&sent)?;
    } else {
        socket.send_to(&sent, to)?;
    }
    result.own = Some(socket.local_addr()?);
    let mut buffer = vec![0; LARGEST];
    let (length, from) = socket.recv_from(&mut buffer)?;
    result.from = Some(plain(from));
    let corrupt = || io::Error::new(io::ErrorKind::InvalidData, format!("{length} bytes came back for {bytes}"));
    let end = buffer[..length].iter().position(|byte| *byte == b'\n').ok_or_else(corrupt)?;
    result.seen = std::str::from_utf8(&buffer[..end]).ok().and_then(|text| text.parse().ok());
    if buffer[end + 1..length] == sent { Ok(()) } else { Err(corrupt()) }
}
