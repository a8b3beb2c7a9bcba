//! The client side: connections kept by [`PoolKey`], one dial at a time for each ([H.3]).

use std::{
    cell::{Cell, RefCell},
    collections::{BTreeSet, HashMap},
    fmt,
    future::Future,
    io,
    net::{IpAddr, SocketAddr},
    rc::{Rc, Weak},
    sync::Arc,
    time::Duration,
};

use rustls::ClientConfig;
use tokio::{
    net::TcpStream,
    sync::watch,
    task::JoinSet,
    time::{Instant, timeout, timeout_at},
};
use tracing::debug;

use super::{
    Authority, Stream,
    hbone::client::{Connection, Failure, Slot},
};
use crate::{
    model::SpiffeId,
    telemetry::{
        panics,
        tally::{Handshake, Side, Tally},
    },
};

/// Limits of a [`Pool`] and of [`server::serve`](super::server::serve); the defaults are those of §14.3.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// For the TCP connection to stand.
    pub connect_timeout: Duration,
    /// For TLS and the HTTP/2 preface after that.
    pub handshake_timeout: Duration,
    /// Streams that we open on one connection, if the peer takes as many.
    pub max_streams: usize,
    /// Time to the first PING, and from an answer to the next.
    pub ping_interval: Duration,
    /// Without an answer for this long a connection is dead.
    pub ping_timeout: Duration,
    /// A pooled connection without streams is dropped after this.
    pub idle_timeout: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            connect_timeout: Duration::from_secs(10),
            handshake_timeout: Duration::from_secs(10),
            max_streams: 100,
            ping_interval: Duration::from_secs(10),
            ping_timeout: Duration::from_secs(20),
            idle_timeout: Duration::from_secs(5 * 60),
        }
    }
}

/// Connections that one request waits for before it gives up: room for 6400 requests that begin at once.
const MAX_ROUNDS: u32 = 64;

/// What must be equal for two connections of applications to share a tunnel ([H.3]).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct PoolKey {
    /// Whose certificate we show.
    pub source: SpiffeId,
    /// Address of the source pod: a connection is never shared across pods.
    pub source_ip: IpAddr,
    /// Where the tunnel ends, usually `<pod IP>:15008`.
    pub destination: SocketAddr,
    /// Who may answer; what the client configuration verifies.
    pub expected: BTreeSet<SpiffeId>,
}

/// The content of one CONNECT request (§14.2); see [`headers`](super::headers) for the texts.
#[derive(Clone, Debug)]
pub struct Connect {
    /// `:authority`
    pub authority: Authority,
    /// `forwarded`
    pub forwarded: Option<String>,
    /// `baggage`
    pub baggage: Option<String>,
    /// `traceparent`
    pub traceparent: Option<String>,
}

/// Why there is no stream. None of them may become plaintext ([T.2]).
#[derive(Clone, Debug)]
pub enum OpenError {
    /// No TCP connection within [`Config::connect_timeout`]: to 15008 this suggests a NetworkPolicy that does not
    /// allow the tunnel's port (flag `NETWORK_POLICY`).
    ConnectTimeout,
    /// No TCP connection (flag `CONNECT`).
    Connect(Arc<anyhow::Error>),
    /// TLS or HTTP/2 did not come to an end within [`Config::handshake_timeout`].
    HandshakeTimeout,
    /// TLS failed, by our verifier or by the peer's; the text is its reason (flag `TLS_FAILURE`).
    Tls(Arc<str>),
    /// The peer does not speak HTTP/2 as it should (flag `H2_HANDSHAKE_FAILURE`).
    Protocol(Arc<str>),
    /// The connection ended before its TLS handshake did: the peer knows nothing of the request yet.
    Aborted(Arc<str>),
    /// The connection ended before an answer came.
    Lost(Arc<str>),
    /// The peer cut the request off with this RST_STREAM code.
    Reset(u32),
    /// The peer answered, and not with 200.
    Refused {
        /// HTTP status: 400, 401 or 503 (§14.2).
        status: u16,
        /// Text of [`REASON_HEADER`](super::REASON_HEADER).
        reason: Option<String>,
    },
    /// This part of the [`Connect`] is not a header value.
    BadRequest(&'static str),
    /// The pool is shutting down.
    Closed,
}

impl fmt::Display for OpenError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ConnectTimeout => {
                f.write_str("connect timed out; does a NetworkPolicy allow the tunnel's port (15008)?")
            }
            Self::Connect(error) => write!(f, "connect: {error:#}"),
            Self::HandshakeTimeout => f.write_str("TLS or HTTP/2 handshake timed out"),
            Self::Tls(reason) => write!(f, "TLS: {reason}"),
            Self::Protocol(reason) => write!(f, "HTTP/2: {reason}"),
            Self::Aborted(reason) => write!(f, "tunnel connection lost during the TLS handshake: {reason}"),
            Self::Lost(reason) => write!(f, "tunnel connection lost: {reason}"),
            Self::Reset(code) => write!(f, "CONNECT reset by the peer with code {code:#x}"),
            Self::Refused { status, reason: Some(reason) } => write!(f, "CONNECT refused with {status}: {reason}"),
            Self::Refused { status, reason: None } => write!(f, "CONNECT refused with {status}"),
            Self::BadRequest(part) => write!(f, "CONNECT cannot be sent: {part} is not a header value"),
            Self::Closed => f.write_str("shutting down"),
        }
    }
}

impl std::error::Error for OpenError {}

/// Connections to servers of tunnels, for the use of one thread.
///
/// Owns their tasks; [`drain`](Self::drain) awaits them, dropping the pool aborts them.
pub struct Pool {
    inner: Rc<Inner>,
}

struct Inner {
    config: Config,
    entries: RefCell<HashMap<PoolKey, Entry>>,
    tasks: RefCell<JoinSet<()>>,
    closed: Cell<bool>,
    tally: Arc<Tally>,
}

#[derive(Default)]
struct Entry {
    connections: Vec<Rc<Connection>>,
    dial: Option<DialResult>,
}

/// `None` while the dial is under way.
type DialResult = watch::Receiver<Option<Result<(), OpenError>>>;

impl Pool {
    /// An empty pool. Its methods need a `LocalSet` (or local runtime) around them.
    pub fn new(config: Config) -> Self {
        Self::counted(config, Arc::default())
    }

    /// An empty pool that counts its handshakes and connections in `tally`.
    pub fn counted(config: Config, tally: Arc<Tally>) -> Self {
        let (entries, tasks) = (RefCell::default(), RefCell::default());
        Self { inner: Rc::new(Inner { config, entries, tasks, closed: Cell::new(false), tally }) }
    }

    /// Opens a stream through a connection of `key`, dialling if none has room.
    ///
    /// `dial` gives a connected socket and the client configuration that verifies `key.expected`. It runs in a task of
    /// the pool, so that a caller who goes away does not take it from those who wait for the same connection. It is
    /// called at most twice: a request that the peer refused before processing is tried once more elsewhere.
    ///
    /// # Errors
    /// [`OpenError`]; [`Refused`](OpenError::Refused) if the peer answered, and the others if no answer came.
    pub async fn open<F>(&self, key: &PoolKey, request: &Connect, dial: impl Fn() -> F) -> Result<Stream, OpenError>
    where
        F: Future<Output = anyhow::Result<(TcpStream, Arc<ClientConfig>)>> + 'static,
    {
        let mut refused: Option<Rc<Connection>> = None;
        loop {
            let slot = self.inner.reserve(key, refused.as_ref(), &dial).await?;
            let connection = slot.connection().clone();
            match slot.open(request).await {
                Ok(stream) => return Ok(stream),
                Err(Failure::NotProcessed(error)) if refused.is_none() => {
                    debug!(peer = %key.destination, %error, "CONNECT not processed, trying another connection");
                    refused = Some(connection);
                }
                Err(Failure::NotProcessed(error) | Failure::Final(error)) => return Err(error),
            }
        }
    }

    /// How many connections stand, for telemetry and tests.
    pub fn connections(&self) -> usize {
        self.inner.entries.borrow().values().flat_map(|e| &e.connections).filter(|c| !c.retired()).count()
    }

    /// Opens nothing further, lets open streams finish until `deadline`, then cuts them off ([H.4]).
    pub async fn drain(&self, deadline: Instant) {
        self.inner.closed.set(true);
        for entry in self.inner.entries.take().into_values() {
            entry.connections.iter().for_each(|connection| connection.retire());
        }
        let mut tasks = self.inner.tasks.take();
        let ended = async { while tasks.join_next().await.is_some() {} };
        if timeout_at(deadline, ended).await.is_err() {
            tasks.shutdown().await;
        }
    }
}

impl Inner {
    async fn reserve<F>(
        self: &Rc<Self>,
        key: &PoolKey,
        not: Option<&Rc<Connection>>,
        dial: &impl Fn() -> F,
    ) -> Result<Slot, OpenError>
    where
        F: Future<Output = anyhow::Result<(TcpStream, Arc<ClientConfig>)>> + 'static,
    {
        // Others may take the room that a new connection brings, but not for ever: a peer that takes no streams at all
        // must not be dialled without end.
        for _ in 0..MAX_ROUNDS {
            let (settling, dialling) = {
                if self.closed.get() {
                    return Err(OpenError::Closed);
                }
                let mut entries = self.entries.borrow_mut();
                let entry = match entries.get_mut(key) {
                    Some(entry) => entry,
                    None => entries.entry(key.clone()).or_default(),
                };
                let usable = || entry.connections.iter().filter(|c| not.is_none_or(|not| !Rc::ptr_eq(c, not)));
                if let Some(slot) = usable().find_map(Connection::reserve) {
                    return Ok(slot);
                }
                let settling = usable().filter(|c| !c.retired()).find_map(|c| c.settling());
                // Its task has panicked: nobody else will ever say that the dial has ended.
                entry.dial.take_if(|dial| dial.has_changed().is_err());
                let dialling = if settling.is_none() {
                    Some(entry.dial.get_or_insert_with(|| self.dial(key, dial())).clone())
                } else {
                    None
                };
                (settling, dialling)
            };
            if let Some(mut settled) = settling {
                // An error means that the connection is gone, which is also an answer.
                let _ = settled.wait_for(|settled| *settled).await;
            }
            if let Some(mut dialled) = dialling {
                match dialled.wait_for(Option::is_some).await.as_deref() {
                    Ok(Some(Err(error))) => return Err(error.clone()),
                    Ok(_) => {}
                    // The task was aborted with the pool, or it has panicked.
                    Err(_) if self.closed.get() => return Err(OpenError::Closed),
                    Err(_) => return Err(OpenError::Lost("the task that dialled has failed".into())),
                }
            }
        }
        Err(OpenError::Lost("no connection had room for a stream".into()))
    }

    /// Starts the task that dials, then drives the connection to its end.
    fn dial<F>(self: &Rc<Self>, key: &PoolKey, dial: F) -> DialResult
    where
        F: Future<Output = anyhow::Result<(TcpStream, Arc<ClientConfig>)>> + 'static,
    {
        let (done, result) = watch::channel(None);
        let task = Self::run(Rc::downgrade(self), self.config, self.tally.clone(), key.clone(), dial, done);
        let mut tasks = self.tasks.borrow_mut();
        while let Some(ended) = tasks.try_join_next() {
            panics::ended("tunnel", ended);
        }
        tasks.spawn_local(task);
        result
    }

    async fn run<F>(
        pool: Weak<Self>,
        config: Config,
        tally: Arc<Tally>,
        key: PoolKey,
        dial: F,
        done: watch::Sender<Option<Result<(), OpenError>>>,
    ) where
        F: Future<Output = anyhow::Result<(TcpStream, Arc<ClientConfig>)>>,
    {
        let established = async {
            let (tcp, tls) = timeout(config.connect_timeout, dial)
                .await
                .map_err(|_| OpenError::ConnectTimeout)?
                .map_err(connect_error)?;
            Connection::establish(tcp, tls, key.destination, config).await
        };
        let established = established.await;
        if let Some(result) = handshake(established.as_ref().err()) {
            tally.handshake(Side::Client, result);
        }
        let with_entry = |change: &dyn Fn(&mut Entry)| {
            let Some(pool) = pool.upgrade() else { return };
            let mut entries = pool.entries.borrow_mut();
            if let Some(entry) = entries.get_mut(&key) {
                change(entry);
                if entry.connections.is_empty() && entry.dial.is_none() {
                    entries.remove(&key);
                }
            }
        };
        match established {
            Err(error) => {
                with_entry(&|entry| entry.dial = None);
                done.send_replace(Some(Err(error)));
            }
            Ok((connection, driver)) => {
                if pool.upgrade().is_none_or(|pool| pool.closed.get()) {
                    connection.retire();
                }
                with_entry(&|entry| {
                    entry.dial = None;
                    entry.connections.push(connection.clone());
                });
                done.send_replace(Some(Ok(())));
                drop(done);
                let standing = tally.stands(Side::Client);
                driver.await;
                drop(standing);
                with_entry(&|entry| entry.connections.retain(|c| !Rc::ptr_eq(c, &connection)));
            }
        }
    }
}

/// How the handshake ended; `None` if it did not begin.
fn handshake(error: Option<&OpenError>) -> Option<Handshake> {
    match error {
        None => Some(Handshake::Done),
        Some(OpenError::HandshakeTimeout) => Some(Handshake::Timeout),
        Some(OpenError::Tls(_)) => Some(Handshake::Tls),
        Some(OpenError::Protocol(_)) => Some(Handshake::Http2),
        Some(OpenError::Aborted(_) | OpenError::Lost(_)) => Some(Handshake::Lost),
        Some(
            OpenError::ConnectTimeout
            | OpenError::Connect(_)
            | OpenError::Reset(_)
            | OpenError::Refused { .. }
            | OpenError::BadRequest(_)
            | OpenError::Closed,
        ) => None,
    }
}

/// The kernel's own connect timeout means the same as ours.
fn connect_error(error: anyhow::Error) -> OpenError {
    let timed_out =
        error.chain().any(|e| e.downcast_ref::<io::Error>().is_some_and(|e| e.kind() == io::ErrorKind::TimedOut));
    if timed_out { OpenError::ConnectTimeout } else { OpenError::Connect(Arc::new(error)) }
}
