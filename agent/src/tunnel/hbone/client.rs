//! The client end of one HBONE connection: handshakes, CONNECT, and the driver that keeps it alive.

use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    fmt,
    future::{Future, poll_fn},
    net::SocketAddr,
    rc::{Rc, Weak},
    sync::Arc,
};

use rustls::{ClientConfig, pki_types::ServerName};
use tokio::{
    net::TcpStream,
    sync::{Notify, watch},
    time::timeout,
};

use super::{
    connection::{Core, End, Shared},
    driver::Driver,
    frame::error,
    halves,
    handle::Opening,
    head::Head,
    hpack,
    tls::{Session, TlsError},
};
use crate::tunnel::{Config, Connect, OpenError, REASON_HEADER, Stream, StreamError};

/// The connections of one source in a pool that have no streams.
pub(in crate::tunnel) struct Idle {
    most: usize,
    /// By the order in which they lost their last stream, or were made.
    waiting: RefCell<BTreeMap<u64, Weak<Connection>>>,
    next: Cell<u64>,
}

impl Idle {
    /// None yet, of which up to `most` are kept.
    pub(in crate::tunnel) fn new(most: usize) -> Self {
        Self { most, waiting: RefCell::default(), next: Cell::new(0) }
    }

    fn enter(&self, connection: &Rc<Connection>) {
        let number = self.next.replace(self.next.get() + 1);
        connection.idle_at.set(Some(number));
        self.waiting.borrow_mut().insert(number, Rc::downgrade(connection));
    }

    /// Retires those that have been idle for longest until there are `most`.
    pub(in crate::tunnel) fn keep(&self, most: usize) {
        while self.waiting.borrow().len() > most {
            let Some((_, oldest)) = self.waiting.borrow_mut().pop_first() else { return };
            if let Some(oldest) = oldest.upgrade() {
                oldest.retire();
            }
        }
    }

    fn leave(&self, connection: &Connection) {
        if let Some(number) = connection.idle_at.take() {
            self.waiting.borrow_mut().remove(&number);
        }
    }
}

/// One connection of a pool: a place to reserve [`Slot`]s.
pub(in crate::tunnel) struct Connection {
    core: Shared,
    /// Set once no further streams may be opened; the connection then ends with its last stream.
    retired: Cell<bool>,
    active: Cell<usize>,
    limit: Cell<usize>,
    settled: watch::Sender<bool>,
    idle: Rc<Idle>,
    /// Its place there.
    idle_at: Cell<Option<u64>>,
    /// A slot was given back, or the connection retired.
    changed: Notify,
}

/// Room for one stream on a connection, given back when dropped.
pub(in crate::tunnel) struct Slot(Rc<Connection>);

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.active.set(self.0.active.get() - 1);
        if self.0.active.get() == 0 && !self.0.retired() {
            self.0.idle.enter(&self.0);
            self.0.idle.keep(self.0.idle.most);
        }
        self.0.changed.notify_one();
    }
}

impl fmt::Debug for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Slot")
    }
}

/// The end of a connection's task, also by a panic: no further streams.
struct Ended<'a>(&'a Connection);

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        self.0.retire();
        // Whoever waits for SETTINGS that will not come shall look again.
        self.0.settled.send_replace(true);
    }
}

/// Why an attempt to open a stream on one connection did not give a stream.
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
        idle: Rc<Idle>,
        config: Config,
    ) -> Result<(Rc<Self>, impl Future<Output = ()> + use<>), OpenError> {
        let name = ServerName::IpAddress(peer.ip().to_canonical().into());
        let handshake = Session::connect(&tcp, &tls, name);
        let session = timeout(config.handshake_timeout, handshake)
            .await
            .map_err(|_| OpenError::HandshakeTimeout)?
            .map_err(|error| match error {
                TlsError::Tls(why) => OpenError::Tls(why),
                TlsError::Io(error) => OpenError::Aborted(error.to_string().into()),
            })?;
        let core = Core::new(session, true).map_err(|end| open_error(&end))?;
        let connection = Rc::new(Self {
            core: core.clone(),
            retired: Cell::new(false),
            active: Cell::new(0),
            limit: Cell::new(1),
            settled: watch::Sender::new(false),
            idle,
            idle_at: Cell::new(None),
            changed: Notify::new(),
        });
        connection.idle.enter(&connection);
        let driver = Driver::new(tcp, core, &config);
        Ok((connection.clone(), connection.drive(driver, config)))
    }

    /// Runs the connection to its end.
    async fn drive(self: Rc<Self>, mut driver: Driver, config: Config) {
        let _ended = Ended(&self);
        {
            let mut run = std::pin::pin!(poll_fn(|cx| {
                let end = driver.poll(cx);
                let core = self.core.borrow();
                if let Some(limit) = core.max_streams() {
                    self.limit.set(config.max_streams.min(limit as usize));
                    if !*self.settled.borrow() {
                        self.settled.send_replace(true);
                    }
                }
                let closing = core.closing();
                drop(core);
                if closing && !self.retired() {
                    self.retire();
                }
                end
            }));
            loop {
                if self.retired() && self.active.get() == 0 {
                    self.core.borrow_mut().close(error::NO_ERROR, End::Closed);
                }
                let unused = async {
                    if self.active.get() > 0 || self.retired() {
                        std::future::pending::<()>().await;
                    }
                    tokio::time::sleep(config.idle_timeout).await;
                };
                tokio::select! {
                    () = &mut run => break,
                    () = unused => self.retire(),
                    () = self.changed.notified() => {}
                }
            }
        }
    }

    /// No further streams; those that are open go on.
    pub(in crate::tunnel) fn retire(&self) {
        self.retired.set(true);
        self.idle.leave(self);
        self.changed.notify_one();
    }

    /// Whether no further streams can be opened.
    pub(in crate::tunnel) fn retired(&self) -> bool {
        self.retired.get()
    }

    /// Room for one more stream, if there is any.
    pub(in crate::tunnel) fn reserve(self: &Rc<Self>) -> Option<Slot> {
        if self.retired() || self.core.borrow().closing() || self.active.get() >= self.limit.get() {
            return None;
        }
        self.active.set(self.active.get() + 1);
        self.idle.leave(self);
        self.changed.notify_one();
        Some(Slot(self.clone()))
    }

    /// While the peer has not said how many streams it takes: resolves when it has, or when the connection ended.
    pub(in crate::tunnel) fn settling(&self) -> Option<watch::Receiver<bool>> {
        (!*self.settled.borrow()).then(|| self.settled.subscribe())
    }
}

impl Slot {
    /// The connection that has the room.
    pub(in crate::tunnel) fn connection(&self) -> &Rc<Connection> {
        &self.0
    }

    /// Sends the CONNECT and waits for the answer.
    pub(in crate::tunnel) async fn open(self, request: &Connect) -> Result<Stream, Failure> {
        let core = self.0.core.clone();
        let block = encode(request).map_err(Failure::Final)?;
        let Some(mut opening) = Opening::request(&core, &block) else {
            let why = core.borrow().end().map(open_error);
            return Err(Failure::NotProcessed(
                why.unwrap_or_else(|| OpenError::Lost("the peer is shutting down".into())),
            ));
        };
        let head = match poll_fn(|cx| opening.poll_answer(cx)).await {
            Ok(head) => head,
            Err((cut, not_processed)) => {
                let error = match (cut, core.borrow().end()) {
                    (StreamError::Reset(code), _) => OpenError::Reset(code),
                    (StreamError::Lost(_), Some(end)) => open_error(end),
                    (StreamError::Lost(why), None) => OpenError::Lost(why),
                };
                return Err(if not_processed { Failure::NotProcessed(error) } else { Failure::Final(error) });
            }
        };
        let Head { status: Some(200), .. } = head else {
            let status = head.status.unwrap_or_default();
            let reason = head.field(REASON_HEADER).map(str::to_owned);
            return Err(Failure::Final(OpenError::Refused { status, reason }));
        };
        let baggage = head.field("baggage").map(str::to_owned);
        let (read, write) = halves(opening, Some(self));
        Ok(Stream::hbone(read, write, baggage))
    }
}

fn open_error(end: &End) -> OpenError {
    match end {
        End::Closed => OpenError::Lost("the peer closed the connection".into()),
        End::Tls(why) => OpenError::Tls(why.clone()),
        End::Protocol(why) => OpenError::Protocol(why.clone()),
        End::Lost(why) => OpenError::Lost(why.clone()),
    }
}

/// §14.2: `:method`, `:authority`, and what telemetry adds, in this order.
fn encode(connect: &Connect) -> Result<Vec<u8>, OpenError> {
    let mut block = Vec::new();
    hpack::encode(&mut block, b":method", b"CONNECT");
    hpack::encode(&mut block, b":authority", connect.authority.to_string().as_bytes());
    let headers =
        [("forwarded", &connect.forwarded), ("baggage", &connect.baggage), ("traceparent", &connect.traceparent)];
    for (name, value) in headers {
        if let Some(value) = value {
            if !is_header_value(value) {
                return Err(OpenError::BadRequest(name));
            }
            hpack::encode(&mut block, name.as_bytes(), value.as_bytes());
        }
    }
    Ok(block)
}

/// RFC 9110 §5.5: no control bytes but the tab, no space around.
pub(super) fn is_header_value(text: &str) -> bool {
    text.bytes().all(|b| b == b'\t' || (b >= 0x20 && b != 0x7f)) && text.trim() == text
}
