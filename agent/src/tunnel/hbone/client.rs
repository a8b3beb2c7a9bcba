//! The client end of one HBONE connection: handshakes, CONNECT, and the driver that keeps it alive.

use std::{
    cell::{Cell, RefCell},
    future::{Future, poll_fn},
    net::SocketAddr,
    pin::Pin,
    rc::Rc,
    sync::Arc,
    task::Poll,
};

use bytes::Bytes;
use h2::{Reason, client::SendRequest};
use http::{HeaderValue, Method, Request, StatusCode, Version};
use rustls::{ClientConfig, pki_types::ServerName};
use tokio::{
    net::TcpStream,
    sync::{Notify, watch},
    time::timeout,
};
use tokio_rustls::TlsConnector;

use super::{CONNECTION_WINDOW, Keepalive, MAX_FRAME, SEND_BUFFER, STREAM_WINDOW, halves};
use crate::tunnel::{Config, Connect, OpenError, REASON_HEADER, Stream};

/// Most header bytes that an answer may have (§14.3).
const HEADER_LIST: u32 = 16 << 10;
/// Stands for "the peer's SETTINGS have not come"; one stream may be opened before.
const UNSETTLED: usize = 0x7fff_fffe;

/// One connection of a pool: a place to reserve [`Slot`]s.
pub(in crate::tunnel) struct Connection {
    /// `None` once no further streams may be opened; the connection then ends with its last stream.
    send: RefCell<Option<SendRequest<Bytes>>>,
    active: Cell<usize>,
    limit: Cell<usize>,
    settled: watch::Sender<bool>,
    /// A slot was given back, or the connection retired.
    changed: Notify,
    /// Why the connection ended.
    end: RefCell<Option<OpenError>>,
}

/// Room for one stream on a connection, given back when dropped.
pub(in crate::tunnel) struct Slot(Rc<Connection>);

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.active.set(self.0.active.get() - 1);
        self.0.changed.notify_one();
    }
}

/// Why an open stream attempt on one connection did not give a stream.
pub(in crate::tunnel) enum Failure {
    /// The peer did nothing with the request: another connection may be tried.
    NotProcessed(OpenError),
    /// Everything else.
    Final(OpenError),
}

impl Connection {
    /// TLS and HTTP/2 on `tcp`; gives the connection and the driver that must be awaited for it to make progress.
    pub(in crate::tunnel) async fn establish(
        tcp: TcpStream,
        tls: Arc<ClientConfig>,
        peer: SocketAddr,
        config: Config,
    ) -> Result<(Rc<Self>, impl Future<Output = ()> + use<>), OpenError> {
        // An address as the server name means that no SNI is sent (§14.1, RFC 6066 §3).
        let name = ServerName::IpAddress(peer.ip().to_canonical().into());
        let handshake = async {
            let tls = TlsConnector::from(tls).connect(name, tcp).await.map_err(OpenError::from_tls)?;
            if tls.get_ref().1.alpn_protocol() != Some(b"h2") {
                return Err(OpenError::Tls("the peer did not select h2 by ALPN".into()));
            }
            h2::client::Builder::new()
                .initial_window_size(STREAM_WINDOW)
                .initial_connection_window_size(CONNECTION_WINDOW)
                .max_frame_size(MAX_FRAME)
                .max_header_list_size(HEADER_LIST)
                .max_send_buffer_size(SEND_BUFFER)
                .initial_max_send_streams(UNSETTLED)
                .enable_push(false)
                .handshake::<_, Bytes>(tls)
                .await
                .map_err(|error| OpenError::from_h2(&error))
        };
        let (send, h2) =
            timeout(config.handshake_timeout, handshake).await.map_err(|_| OpenError::HandshakeTimeout)??;
        let connection = Rc::new(Self {
            send: RefCell::new(Some(send)),
            active: Cell::new(0),
            limit: Cell::new(1),
            settled: watch::Sender::new(false),
            changed: Notify::new(),
            end: RefCell::new(None),
        });
        let driver = connection.clone().drive(h2, config);
        Ok((connection, driver))
    }

    /// Runs the connection to its end.
    async fn drive(self: Rc<Self>, mut h2: Http2, config: Config) {
        let mut keepalive = Keepalive::new(h2.ping_pong(), config.ping_interval, config.ping_timeout);
        let end = {
            let mut run = std::pin::pin!(poll_fn(|cx| {
                let end = Pin::new(&mut h2).poll(cx);
                let limit = h2.max_concurrent_send_streams();
                if limit != UNSETTLED {
                    self.limit.set(limit.min(config.max_streams));
                    if !*self.settled.borrow() {
                        self.settled.send_replace(true);
                    }
                }
                if let Poll::Ready(end) = end {
                    return Poll::Ready(end.err().map(|error| OpenError::from_h2(&error)));
                }
                keepalive.poll_dead(cx).map(|()| Some(OpenError::Lost("no answer to PING".into())))
            }));
            loop {
                let unused = async {
                    if self.active.get() > 0 || self.retired() {
                        std::future::pending::<()>().await;
                    }
                    tokio::time::sleep(config.idle_timeout).await;
                };
                tokio::select! {
                    end = &mut run => break end,
                    // Retired without streams, h2 says GOAWAY and closes.
                    () = unused => self.retire(),
                    () = self.changed.notified() => {}
                }
            }
        };
        *self.end.borrow_mut() = Some(end.unwrap_or_else(|| OpenError::Lost("connection closed".into())));
        self.retire();
        // Whoever waits for SETTINGS that will not come shall look again.
        self.settled.send_replace(true);
    }

    /// No further streams; those that are open go on.
    pub(in crate::tunnel) fn retire(&self) {
        self.send.borrow_mut().take();
        self.changed.notify_one();
    }

    /// Whether no further streams can be opened.
    pub(in crate::tunnel) fn retired(&self) -> bool {
        self.send.borrow().is_none()
    }

    /// Room for one more stream, if there is any.
    pub(in crate::tunnel) fn reserve(self: &Rc<Self>) -> Option<Slot> {
        if self.retired() || self.active.get() >= self.limit.get() {
            return None;
        }
        self.active.set(self.active.get() + 1);
        self.changed.notify_one();
        Some(Slot(self.clone()))
    }

    /// While the peer has not said how many streams it takes: resolves when it has, or when the connection ended.
    pub(in crate::tunnel) fn settling(&self) -> Option<watch::Receiver<bool>> {
        (!*self.settled.borrow()).then(|| self.settled.subscribe())
    }
}

type Http2 = h2::client::Connection<tokio_rustls::client::TlsStream<TcpStream>, Bytes>;

impl Slot {
    /// The connection that has the room.
    pub(in crate::tunnel) fn connection(&self) -> &Rc<Connection> {
        &self.0
    }

    /// Sends the CONNECT and waits for the answer.
    pub(in crate::tunnel) async fn open(self, request: &Connect) -> Result<Stream, Failure> {
        let connection = self.0.clone();
        let gone = || connection.end.borrow().clone().unwrap_or_else(|| OpenError::Lost("connection closing".into()));
        let request = encode(request).map_err(Failure::Final)?;
        let send = connection.send.borrow().clone();
        let Some(send) = send else { return Err(Failure::NotProcessed(gone())) };
        let mut send = match send.ready().await {
            Ok(send) => send,
            Err(error) => {
                // GOAWAY, or gone: nothing can be opened here any more.
                connection.retire();
                let error = connection.end.borrow().clone().unwrap_or_else(|| OpenError::from_h2(&error));
                return Err(Failure::NotProcessed(error));
            }
        };
        let (answer, body) =
            send.send_request(request, false).map_err(|e| Failure::NotProcessed(OpenError::from_h2(&e)))?;
        drop(send);
        let answer = match answer.await {
            Ok(answer) => answer,
            Err(error) => {
                let goaway = error.is_go_away() && error.is_remote();
                if goaway {
                    connection.retire();
                }
                let refused = error.is_reset() && error.is_remote() && error.reason() == Some(Reason::REFUSED_STREAM);
                let not_processed = refused || (goaway && error.reason() == Some(Reason::NO_ERROR));
                let error = match connection.end.borrow().clone() {
                    // The connection knows better than the stream why it is gone.
                    Some(end) if !error.is_reset() => end,
                    _ => OpenError::from_h2(&error),
                };
                return Err(if not_processed { Failure::NotProcessed(error) } else { Failure::Final(error) });
            }
        };
        let text = |name: &str| answer.headers().get(name).and_then(|v| v.to_str().ok()).map(str::to_owned);
        if answer.status() != StatusCode::OK {
            let status = answer.status().as_u16();
            return Err(Failure::Final(OpenError::Refused { status, reason: text(REASON_HEADER) }));
        }
        let baggage = text("baggage");
        let (read, write) = halves(answer.into_body(), body, Some(self));
        Ok(Stream::hbone(read, write, baggage))
    }
}

/// §14.2: `:method`, `:authority`, and what telemetry adds, in this order.
fn encode(connect: &Connect) -> Result<Request<()>, OpenError> {
    let mut request = Request::builder()
        .method(Method::CONNECT)
        .version(Version::HTTP_2)
        .uri(connect.authority.to_string())
        .body(())
        .map_err(|_| OpenError::BadRequest("authority"))?;
    let headers =
        [("forwarded", &connect.forwarded), ("baggage", &connect.baggage), ("traceparent", &connect.traceparent)];
    for (name, value) in headers {
        if let Some(value) = value {
            let value = HeaderValue::from_str(value).map_err(|_| OpenError::BadRequest(name))?;
            request.headers_mut().insert(name, value);
        }
    }
    Ok(request)
}
