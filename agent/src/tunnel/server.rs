//! The server side: a connection's CONNECT requests, each yielded as an [`Incoming`] for the caller to judge.

use std::{fmt, future::Future, net::SocketAddr, rc::Rc, sync::Arc};

use rustls::{ServerConfig, pki_types::CertificateDer};
use tokio::{net::TcpStream, time::Instant};

use super::{Authority, Config, Stream, StreamError, hbone};

/// The other end of the connection that a CONNECT came through.
#[derive(Debug)]
pub struct Peer {
    /// Verified chain, leaf first.
    pub certificates: Vec<CertificateDer<'static>>,
    /// Our address: which pod the client addressed ([H.1]).
    pub local: SocketAddr,
    /// The client's address, the only one to show to the application ([H.2]).
    pub remote: SocketAddr,
}

/// One CONNECT with a well-formed authority. Dropped unanswered, it is reset.
pub struct Incoming {
    peer: Rc<Peer>,
    authority: Authority,
    request: hbone::server::Request,
}

impl Incoming {
    pub(super) fn new(peer: Rc<Peer>, authority: Authority, request: hbone::server::Request) -> Self {
        Self { peer, authority, request }
    }

    /// Who asks.
    pub fn peer(&self) -> &Rc<Peer> {
        &self.peer
    }

    /// Where to; only the port counts, or the service if we are its waypoint ([H.1]).
    pub fn authority(&self) -> &Authority {
        &self.authority
    }

    /// A header's text: telemetry, never an input of policy ([H.2]).
    pub fn header(&self, name: &str) -> Option<&str> {
        self.request.header(name)
    }

    /// Resolves when the client has given up.
    pub async fn cancelled(&mut self) -> StreamError {
        self.request.cut().await
    }

    /// Answers 200, which says that the application's connection stands.
    ///
    /// # Errors
    /// [`StreamError`] if the client has gone.
    pub fn accept(self, baggage: Option<&str>) -> Result<Stream, StreamError> {
        self.request.accept(baggage)
    }

    /// Answers `status` (§14.2: 400, 401, 503) with an optional word on why ([`REASON_HEADER`](super::REASON_HEADER)).
    ///
    /// # Errors
    /// [`StreamError`] if the client has gone.
    pub fn refuse(self, status: u16, reason: Option<&str>) -> Result<(), StreamError> {
        self.request.refuse(status, reason)
    }
}

/// Why a connection ended otherwise than by the client's or our orderly close.
#[derive(Clone, Debug)]
pub enum ServeError {
    /// TLS or the HTTP/2 preface took longer than [`Config::handshake_timeout`].
    HandshakeTimeout,
    /// TLS failed; the text is our verifier's reason or the client's alert.
    Tls(Arc<str>),
    /// The client broke HTTP/2 or one of our limits.
    Protocol(Arc<str>),
    /// The connection was lost, or PING was not answered.
    Lost(Arc<str>),
}

impl fmt::Display for ServeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::HandshakeTimeout => f.write_str("TLS or HTTP/2 handshake timed out"),
            Self::Tls(reason) => write!(f, "TLS: {reason}"),
            Self::Protocol(reason) => write!(f, "HTTP/2: {reason}"),
            Self::Lost(reason) => write!(f, "connection lost: {reason}"),
        }
    }
}

impl std::error::Error for ServeError {}

/// Serves one accepted connection to its end.
///
/// Every well-formed CONNECT goes to `handler`, whose future runs as a task that this function owns and awaits. What
/// is malformed is answered with 400. When `drain` resolves, with a deadline, the client is told to open no more, the
/// streams finish until the deadline, and what is left is reset ([H.4]).
///
/// # Errors
/// [`ServeError`], for the log.
pub async fn serve<H, F>(
    tcp: TcpStream,
    tls: Arc<ServerConfig>,
    config: Config,
    drain: impl Future<Output = Instant>,
    handler: H,
) -> Result<(), ServeError>
where
    H: FnMut(Incoming) -> F,
    F: Future<Output = ()> + 'static,
{
    hbone::server::serve(tcp, tls, config, drain, handler).await
}
