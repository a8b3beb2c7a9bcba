//! The server end of one HBONE connection.

use std::{
    cell::Cell,
    future::{Future, poll_fn},
    pin::pin,
    rc::Rc,
    sync::Arc,
    task::Poll,
    time::Duration,
};

use rustls::ServerConfig;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    task::JoinSet,
    time::{Instant, sleep_until, timeout, timeout_at},
};
use tracing::debug;

use super::{
    client::is_header_value,
    connection::{Core, End, Shared},
    driver::Driver,
    frame, halves,
    handle::Opening,
    head::Head,
    hpack,
    tls::{Session, TlsError},
};
use crate::{
    telemetry::panics,
    tunnel::{
        Authority, AuthorityError, Config, REASON_HEADER, Stream, StreamError,
        server::{Incoming, Peer, ServeError},
    },
};

/// For the last frames, RST_STREAM and GOAWAY, to leave after the drain deadline; and for a client to read our alert.
const LAST_WORDS: Duration = Duration::from_millis(250);

/// A CONNECT that waits for its answer.
pub(in crate::tunnel) struct Request {
    opening: Opening,
    head: Head,
}

impl Request {
    pub(in crate::tunnel) fn header(&self, name: &str) -> Option<&str> {
        self.head.field(name)
    }

    pub(in crate::tunnel) async fn cut(&mut self) -> StreamError {
        poll_fn(|cx| self.opening.poll_cut(cx)).await
    }

    pub(in crate::tunnel) fn accept(mut self, baggage: Option<&str>) -> Result<Stream, StreamError> {
        let mut block = Vec::new();
        hpack::encode_ok(&mut block);
        encode_text(&mut block, "baggage", baggage);
        self.opening.answer(&block, false)?;
        let (read, write) = halves(self.opening, None);
        Ok(Stream::hbone(read, write, None))
    }

    pub(in crate::tunnel) fn refuse(mut self, status: u16, reason: Option<&str>) -> Result<(), StreamError> {
        let mut block = Vec::new();
        hpack::encode(&mut block, b":status", status.to_string().as_bytes());
        encode_text(&mut block, REASON_HEADER, reason);
        self.opening.answer(&block, true)
    }
}

/// A header whose value cannot be sent is left out: the answer matters more than its telemetry.
fn encode_text(block: &mut Vec<u8>, name: &str, value: Option<&str>) {
    if let Some(value) = value.filter(|text| is_header_value(text)) {
        hpack::encode(block, name.as_bytes(), value.as_bytes());
    }
}

pub(in crate::tunnel) async fn serve<H, F>(
    tcp: TcpStream,
    tls: Arc<ServerConfig>,
    config: Config,
    drain: impl Future<Output = Instant>,
    mut handler: H,
) -> Result<(), ServeError>
where
    H: FnMut(Incoming) -> F,
    F: Future<Output = ()> + 'static,
{
    let mut drain = pin!(drain);
    let begun = Instant::now();
    // Also while draining: the client gets its GOAWAY, and knows that it must go elsewhere.
    let (peer, core, mut driver) = timeout(config.handshake_timeout, establish(tcp, &tls, &config))
        .await
        .map_err(|_| ServeError::HandshakeTimeout)??;
    // What is left of the time is for the HTTP/2 preface and SETTINGS.
    let preface = Cell::new(Some(begun + config.handshake_timeout));
    let mut handlers = JoinSet::new();
    let mut deadline = None;
    loop {
        let next = poll_fn(|cx| {
            // Those who wait come before reading brings more of them.
            if let Some(arrival) = core.borrow_mut().arrival() {
                return Poll::Ready(Some(arrival));
            }
            let end = driver.poll(cx);
            let mut core = core.borrow_mut();
            if core.max_streams().is_some() {
                preface.set(None);
            }
            match core.arrival() {
                Some(arrival) => Poll::Ready(Some(arrival)),
                None if core.drained() => {
                    core.close(frame::error::NO_ERROR, End::Closed);
                    cx.waker().wake_by_ref();
                    Poll::Pending
                }
                None => end.map(|()| None),
            }
        });
        tokio::select! {
            next = next => match next {
                Some((id, head)) => {
                    let opening = Opening::arrived(&core, id);
                    if let Some(incoming) = judge(&peer, Request { opening, head }) {
                        handlers.spawn_local(handler(incoming));
                    }
                }
                None => break,
            },
            Some(ended) = handlers.join_next(), if !handlers.is_empty() => {
                panics::ended("tunnelled connection", ended);
            }
            until = &mut drain, if deadline.is_none() => {
                deadline = Some(until);
                core.borrow_mut().drain();
            }
            () = sleep_until(deadline.unwrap_or(begun)), if deadline.is_some() => {
                // Dropping a stream resets it; the frames still have to leave.
                handlers.shutdown().await;
                core.borrow_mut().close(frame::error::NO_ERROR, End::Closed);
                let _ = timeout_at(Instant::now() + LAST_WORDS, poll_fn(|cx| driver.poll(cx))).await;
                return Ok(());
            }
            () = sleep_until(preface.get().unwrap_or(begun)), if preface.get().is_some() => {
                if preface.get().is_some() {
                    return Err(ServeError::HandshakeTimeout);
                }
            }
        }
    }
    // With the connection gone every stream has failed, so that the handlers end by themselves.
    drop(driver);
    while let Some(ended) = handlers.join_next().await {
        panics::ended("tunnelled connection", ended);
    }
    let end = core.borrow().end().cloned();
    match end {
        None | Some(End::Closed) => Ok(()),
        Some(End::Tls(why)) => Err(ServeError::Tls(why)),
        Some(End::Protocol(why)) => Err(ServeError::Protocol(why)),
        Some(End::Lost(why)) => Err(ServeError::Lost(why)),
    }
}

async fn establish(
    tcp: TcpStream,
    tls: &ServerConfig,
    config: &Config,
) -> Result<(Rc<Peer>, Shared, Driver), ServeError> {
    let lost = |error: std::io::Error| ServeError::Lost(format!("during the TLS handshake: {error}").into());
    let (local, remote) = (tcp.local_addr().map_err(lost)?, tcp.peer_addr().map_err(lost)?);
    let mut session = match Session::accept(&tcp, tls).await {
        Ok(session) => session,
        Err(TlsError::Io(error)) => return Err(lost(error)),
        Err(TlsError::Tls(why)) => {
            linger(tcp).await;
            return Err(ServeError::Tls(why));
        }
    };
    let peer = Rc::new(Peer { certificates: std::mem::take(&mut session.certificates), local, remote });
    let core = Core::new(session, false).map_err(|end| ServeError::Protocol(end.to_string().into()))?;
    let driver = Driver::new(tcp, core.clone(), config);
    Ok((peer, core, driver))
}

/// Closes after the client has read our alert: closing with its next bytes unread would reset the connection, and the
/// client would never learn what was wrong with its certificate.
async fn linger(mut tcp: TcpStream) {
    let unread = async {
        tcp.shutdown().await?;
        tokio::io::copy(&mut (&mut tcp).take(64 << 10), &mut tokio::io::sink()).await
    };
    // Nothing depends on how this ends.
    let _ = timeout(LAST_WORDS, unread).await;
}

/// The purely syntactic part of §14.2; answers 400 itself.
fn judge(peer: &Rc<Peer>, request: Request) -> Option<Incoming> {
    let head = &request.head;
    let authority = head.authority.as_deref().map(std::str::from_utf8).unwrap_or(Ok(""));
    let parsed = authority.map_err(|_| AuthorityError::BadHost).and_then(str::parse::<Authority>);
    let wrong = match (head.malformed, head.method.as_deref(), parsed) {
        (_, method, _) if method != Some(b"CONNECT") => "only CONNECT is served here".to_owned(),
        (Some(malformed), ..) => malformed.to_owned(),
        (None, _, Err(error)) => error.to_string(),
        (None, _, Ok(authority)) => return Some(Incoming::new(peer.clone(), authority, request)),
    };
    debug!(peer = %peer.remote, reason = wrong, "CONNECT refused with 400");
    if let Err(error) = request.refuse(400, Some(&wrong)) {
        debug!(peer = %peer.remote, %error, "the client did not wait for the refusal");
    }
    None
}
