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
    Account, Authority, Charge, IDLE_TUNNELS, Stream, TUNNEL_BYTES,
    hbone::client::{Connection, Failure, Idle, Slot},
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
    /// Pooled connections without streams that are kept for one source address; then the one goes that has had none for
    /// longest.
    pub max_idle: usize,
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
            max_idle: IDLE_TUNNELS,
        }
    }
}

/// Idle connections that a source keeps where descriptors are scarce.
const KEPT_WHEN_SCARCE: usize = 4;

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
    /// By source address.
    idle: RefCell<HashMap<IpAddr, Weak<Idle>>>,
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
        let (entries, idle, tasks) = (RefCell::default(), RefCell::default(), RefCell::default());
        Self { inner: Rc::new(Inner { config, entries, idle, tasks, closed: Cell::new(false), tally }) }
    }

    /// Opens a stream through a connection of `key`, dialling if none has room.
    ///
    /// `dial` gives a connected socket and the client configuration that verifies `key.expected`. It runs in a task of
    /// the pool, so that a caller who goes away does not take it from those who wait for the same connection. It is
    /// called at most twice: a request that the peer refused before processing is tried once more elsewhere. What a
    /// connection costs that is dialled counts for `owner`, if there is one, for as long as it stands.
    ///
    /// # Errors
    /// [`OpenError`]; [`Refused`](OpenError::Refused) if the peer answered, and the others if no answer came.
    pub async fn open<F>(
        &self,
        owner: Option<&Arc<Account>>,
        key: &PoolKey,
        request: &Connect,
        dial: impl Fn() -> F,
    ) -> Result<Stream, OpenError>
    where
        F: Future<Output = anyhow::Result<(TcpStream, Arc<ClientConfig>)>> + 'static,
    {
        let mut refused: Option<Rc<Connection>> = None;
        loop {
            let slot = self.inner.reserve(owner, key, refused.as_ref(), &dial).await?;
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

    /// Closes idle connections but for a few of each source: descriptors are scarce, and a connection can be dialled again.
    pub fn shed(&self) {
        let sources: Vec<_> = self.inner.idle.borrow().values().filter_map(Weak::upgrade).collect();
        for idle in sources {
            idle.keep(KEPT_WHEN_SCARCE);
        }
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
        owner: Option<&Arc<Account>>,
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
                    Some(entry.dial.get_or_insert_with(|| self.dial(owner, key, dial())).clone())
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
    fn dial<F>(self: &Rc<Self>, owner: Option<&Arc<Account>>, key: &PoolKey, dial: F) -> DialResult
    where
        F: Future<Output = anyhow::Result<(TcpStream, Arc<ClientConfig>)>> + 'static,
    {
        let (done, result) = watch::channel(None);
        let (cost, idle) = (owner.map(|owner| Charge::of(owner.clone(), TUNNEL_BYTES)), self.idle_of(key.source_ip));
        let (pool, tally) = (Rc::downgrade(self), self.tally.clone());
        let task = Self::run(pool, self.config, tally, key.clone(), (idle, cost), dial, done);
        let mut tasks = self.tasks.borrow_mut();
        while let Some(ended) = tasks.try_join_next() {
            panics::ended("tunnel", ended);
        }
        tasks.spawn_local(task);
        result
    }

    /// The idle connections of a source.
    fn idle_of(&self, source: IpAddr) -> Rc<Idle> {
        let mut all = self.idle.borrow_mut();
        if let Some(idle) = all.get(&source).and_then(Weak::upgrade) {
            return idle;
        }
        all.retain(|_, idle| idle.strong_count() > 0);
        let idle = Rc::new(Idle::new(self.config.max_idle));
        all.insert(source, Rc::downgrade(&idle));
        idle
    }

    async fn run<F>(
        pool: Weak<Self>,
        config: Config,
        tally: Arc<Tally>,
        key: PoolKey,
        (idle, _cost): (Rc<Idle>, Option<Charge>),
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
            Connection::establish(tcp, tls, key.destination, idle, config).await
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

#[cfg(test)]
mod tests {
    use super::{super::testing::*, *};

    fn account() -> Arc<Account> {
        Arc::new(Account::new(Arc::new(usize::MAX.into())))
    }

    /// A pod that talks to everybody once does not leave a tunnel to everybody behind.
    #[test]
    fn the_connection_that_has_been_idle_for_longest_goes_first() {
        local(async {
            let tls = tls();
            let mut servers = Vec::new();
            for _ in 0..5 {
                servers.push(Server::start(&tls, Config::default(), echo).await);
            }
            let pool = Pool::new(Config { max_idle: 2, ..Config::default() });
            let account = account();
            let to = async |at: usize| {
                let addr = servers[at].addr;
                let opened = pool.open(Some(&account), &key(addr), &connect(), || dial(addr, tls.client.clone())).await;
                opened.expect("open")
            };
            let used = to(0).await;
            for at in [1, 2] {
                drop(to(at).await);
            }
            // Now it is 2 that was used longer ago.
            drop(to(1).await);
            assert_eq!((pool.connections(), account.used()), (3, 3 * TUNNEL_BYTES));
            let last = to(3).await;
            assert_eq!(pool.connections(), 4, "what is in use is not idle");
            drop(last);
            assert_eq!(pool.connections(), 3);
            until(|| servers[2].ends.borrow().len() == 1 && account.used() == 3 * TUNNEL_BYTES).await;
            // Another source has its own.
            let other = PoolKey { source_ip: [127, 0, 0, 2].into(), ..key(servers[4].addr) };
            for key in [&other, &PoolKey { destination: servers[3].addr, ..other.clone() }] {
                drop(
                    pool.open(None, key, &connect(), || dial(key.destination, tls.client.clone())).await.expect("open"),
                );
            }
            assert_eq!(pool.connections(), 5);
            for (at, accepted) in [(0, 1), (1, 1), (3, 2), (2, 2)] {
                drop(to(at).await);
                assert_eq!(servers[at].accepted.get(), accepted, "server {at}");
            }
            drop(used);
            assert_eq!(pool.connections(), 4);
            pool.drain(Instant::now()).await;
            assert_eq!(account.used(), 0);
        });
    }

    #[test]
    fn idle_connections_are_given_up_when_descriptors_are_scarce() {
        local(async {
            let tls = tls();
            let pool = Pool::new(Config::default());
            let mut servers = Vec::new();
            for _ in 0..KEPT_WHEN_SCARCE + 3 {
                let server = Server::start(&tls, Config::default(), echo).await;
                drop(open(&pool, server.addr, &tls.client).await.expect("open"));
                servers.push(server);
            }
            let used = open(&pool, servers[0].addr, &tls.client).await.expect("open");
            pool.shed();
            assert_eq!(pool.connections(), KEPT_WHEN_SCARCE + 1);
            until(|| servers.iter().map(|server| server.ends.borrow().len()).sum::<usize>() == 2).await;
            assert!(servers[0].ends.borrow().is_empty(), "what is in use is not touched");
            drop(used);
        });
    }
}
