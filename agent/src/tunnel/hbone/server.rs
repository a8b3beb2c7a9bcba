//! The server end of one HBONE connection.

use std::{
    future::{Future, poll_fn},
    io,
    pin::pin,
    rc::Rc,
    sync::Arc,
    task::Poll,
    time::Duration,
};

use bytes::Bytes;
use h2::{Reason, RecvStream, server::SendResponse};
use http::{HeaderValue, Method, Response, StatusCode};
use rustls::ServerConfig;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    task::JoinSet,
    time::{Instant, sleep_until, timeout, timeout_at},
};
use tokio_rustls::TlsAcceptor;
use tracing::{debug, error};

use super::{CONNECTION_WINDOW, Keepalive, MAX_FRAME, SEND_BUFFER, STREAM_WINDOW, halves, stream_error};
use crate::tunnel::{
    Authority, AuthorityError, Config, REASON_HEADER, Stream, StreamError,
    server::{Incoming, Peer, ServeError},
};

/// Streams that a client may have open (§14.3).
const MAX_STREAMS: u32 = 200;
/// Most header bytes of a request (§14.3).
const HEADER_LIST: u32 = 64 << 10;
/// Handlers alive on one connection. A client that resets what it opens leaves handlers behind that are still ending;
/// at this many we take no further requests, and h2 ends the connection if the client goes on.
const MAX_HANDLERS: usize = 2 * MAX_STREAMS as usize;
/// For the last frames, RST_STREAM and GOAWAY, to leave after the drain deadline.
const LAST_WORDS: Duration = Duration::from_millis(250);

type Http2 = h2::server::Connection<tokio_rustls::server::TlsStream<TcpStream>, Bytes>;

/// A CONNECT that waits for its answer.
pub(in crate::tunnel) struct Request {
    answer: SendResponse<Bytes>,
    body: RecvStream,
}

impl Request {
    pub(in crate::tunnel) async fn cut(&mut self) -> StreamError {
        match poll_fn(|cx| self.answer.poll_reset(cx)).await {
            Ok(reason) => StreamError::Reset(reason.into()),
            Err(error) => stream_error(error),
        }
    }

    pub(in crate::tunnel) fn accept(mut self, baggage: Option<&str>) -> Result<Stream, StreamError> {
        let send = self.answer.send_response(response(StatusCode::OK, "baggage", baggage), false);
        let (read, write) = halves(self.body, send.map_err(stream_error)?, None);
        Ok(Stream::hbone(read, write, None))
    }

    pub(in crate::tunnel) fn refuse(mut self, status: u16, reason: Option<&str>) -> Result<(), StreamError> {
        let status = StatusCode::from_u16(status).unwrap_or(StatusCode::SERVICE_UNAVAILABLE);
        self.answer.send_response(response(status, REASON_HEADER, reason), true).map_err(stream_error)?;
        Ok(())
    }
}

/// A header whose value cannot be sent is left out: the answer matters more than its telemetry.
fn response(status: StatusCode, name: &'static str, value: Option<&str>) -> Response<()> {
    let mut response = Response::new(());
    *response.status_mut() = status;
    if let Some(value) = value.and_then(|text| HeaderValue::from_str(text).ok()) {
        response.headers_mut().insert(name, value);
    }
    response
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
    let (peer, mut h2) = tokio::select! {
        established = timeout(config.handshake_timeout, establish(tcp, tls)) => {
            established.map_err(|_| ServeError::HandshakeTimeout)??
        }
        _ = &mut drain => return Ok(()),
    };
    let mut keepalive = Keepalive::new(h2.ping_pong(), config.ping_interval, config.ping_timeout);
    let mut handlers = JoinSet::new();
    let mut deadline = None;
    loop {
        let room = handlers.len() < MAX_HANDLERS;
        let next = poll_fn(|cx| {
            let next = if room { h2.poll_accept(cx) } else { h2.poll_closed(cx).map(|closed| closed.err().map(Err)) };
            match next {
                Poll::Ready(next) => Poll::Ready(Ok(next)),
                Poll::Pending => keepalive.poll_dead(cx).map(Err),
            }
        });
        tokio::select! {
            next = next => match next {
                Ok(Some(Ok((request, answer)))) => {
                    if let Some(incoming) = judge(&peer, request, answer) {
                        handlers.spawn_local(handler(incoming));
                    }
                }
                Ok(None) => break,
                Ok(Some(Err(error))) => {
                    finish(handlers).await;
                    return serve_error(&error);
                }
                Err(()) => return Err(ServeError::Lost("no answer to PING".into())),
            },
            Some(ended) = handlers.join_next(), if !handlers.is_empty() => {
                if let Err(error) = ended {
                    error!(%error, "the task of a tunnelled connection failed");
                }
            }
            until = &mut drain, if deadline.is_none() => {
                deadline = Some(until);
                h2.graceful_shutdown();
            }
            () = sleep_until(deadline.unwrap_or_else(Instant::now)), if deadline.is_some() => {
                // Dropping a stream resets it; the frames still have to leave.
                handlers.shutdown().await;
                h2.abrupt_shutdown(Reason::NO_ERROR);
                let _ = timeout_at(Instant::now() + LAST_WORDS, poll_fn(|cx| h2.poll_closed(cx))).await;
                return Ok(());
            }
        }
    }
    drop(h2);
    finish(handlers).await;
    Ok(())
}

/// With the connection gone every stream has failed, so that the handlers end by themselves.
async fn finish(mut handlers: JoinSet<()>) {
    while let Some(ended) = handlers.join_next().await {
        if let Err(error) = ended {
            error!(%error, "the task of a tunnelled connection failed");
        }
    }
}

async fn establish(tcp: TcpStream, tls: Arc<ServerConfig>) -> Result<(Rc<Peer>, Http2), ServeError> {
    let lost = |error: io::Error| ServeError::Lost(error.to_string().into());
    let (local, remote) = (tcp.local_addr().map_err(lost)?, tcp.peer_addr().map_err(lost)?);
    let tls = match TlsAcceptor::from(tls).accept(tcp).into_fallible().await {
        Ok(tls) => tls,
        Err((error, tcp)) => {
            let Some(reason) = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) else {
                return Err(ServeError::Lost(format!("during the TLS handshake: {error}").into()));
            };
            linger(tcp).await;
            return Err(ServeError::Tls(reason.to_string().into()));
        }
    };
    let session = tls.get_ref().1;
    if session.alpn_protocol() != Some(b"h2") {
        return Err(ServeError::Tls("the client did not offer h2 by ALPN".into()));
    }
    let certificates =
        session.peer_certificates().unwrap_or_default().iter().cloned().map(|c| c.into_owned()).collect();
    let peer = Rc::new(Peer { certificates, local, remote });
    let h2 = h2::server::Builder::new()
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(MAX_FRAME)
        .max_header_list_size(HEADER_LIST)
        .max_concurrent_streams(MAX_STREAMS)
        .max_send_buffer_size(SEND_BUFFER)
        .handshake(tls)
        .await
        .or_else(|error| serve_error(&error).and(Err(ServeError::Lost("closed before the preface".into()))))?;
    Ok((peer, h2))
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

fn serve_error(error: &h2::Error) -> Result<(), ServeError> {
    match error.get_io() {
        Some(io) if io.kind() == io::ErrorKind::InvalidData => Err(ServeError::Tls(io.to_string().into())),
        Some(io) => Err(ServeError::Lost(io.to_string().into())),
        None if error.is_go_away() && error.is_remote() && error.reason() == Some(Reason::NO_ERROR) => Ok(()),
        None => Err(ServeError::Protocol(error.to_string().into())),
    }
}

/// The purely syntactic part of §14.2; answers 400 itself.
fn judge(peer: &Rc<Peer>, request: http::Request<RecvStream>, answer: SendResponse<Bytes>) -> Option<Incoming> {
    let (head, body) = request.into_parts();
    let authority = head.uri.authority().map(|a| a.as_str()).unwrap_or_default();
    let request = Request { answer, body };
    let wrong = match authority.parse::<Authority>() {
        _ if head.method != Method::CONNECT => "only CONNECT is served here".to_owned(),
        Ok(authority) => return Some(Incoming::new(peer.clone(), authority, head.headers, request)),
        Err(
            error @ (AuthorityError::Missing
            | AuthorityError::NoPort
            | AuthorityError::BadPort
            | AuthorityError::BadHost),
        ) => error.to_string(),
    };
    debug!(peer = %peer.remote, reason = wrong, "CONNECT refused with 400");
    if let Err(error) = request.refuse(400, Some(&wrong)) {
        debug!(peer = %peer.remote, %error, "the client did not wait for the refusal");
    }
    None
}
