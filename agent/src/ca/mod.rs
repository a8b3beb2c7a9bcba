//! The server side of Istio's certificate API (specification §4): `culvert ca` with a root in a folder, and part of `culvert control`.
//!
//! Who may ask for which identity is in `caller`, what may be asked for in `csr`, and the signing in `authority`.
//! Here is the server around them: TLS, limits, and one log line per answer, as long as they are not too many. What pods
//! there are is told by the source that the caller of [`run`] watches; until its first snapshot nobody is known and
//! everybody is refused ([D.2]).

pub(crate) mod authority;
pub(crate) mod caller;
mod csr;
#[cfg(test)]
#[expect(clippy::disallowed_methods, reason = "a test awaits what it has started, or ends with it")]
pub(crate) mod testkit;
#[cfg(test)]
mod tests;

use std::{
    collections::BTreeSet,
    convert::Infallible,
    fmt,
    net::SocketAddr,
    path::PathBuf,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context as TaskContext, Poll, ready},
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use futures_util::{FutureExt, Stream, StreamExt, stream::FuturesUnordered};
use rustls::{
    ServerConfig,
    server::{ClientHello, ResolvesServerCert},
    sign::CertifiedKey,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore, watch},
    time::timeout,
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tonic::{
    Request, Response, Status,
    codegen::{BoxFuture, Service, http},
    server::{Grpc, UnaryService},
    transport::server::{Connected, TcpConnectInfo},
};
use tonic_prost::ProstCodec;
use tracing::{debug, error, info, warn};

use self::{
    authority::Authority,
    caller::{Caller, Callers, Denial, Tokens},
};
use crate::{
    identity::{
        Clock, provider,
        wire::{self, CertificateRequest, CertificateResponse},
    },
    model::{Cluster, ObjectRef},
    telemetry::limit::{Limit, Limiter},
};

/// Issuer of service account tokens where the API server is not told another (`--service-account-issuer`).
pub const DEFAULT_TOKEN_ISSUER: &str = "https://kubernetes.default.svc.cluster.local";

/// Connections at once. One more waits in the listen queue.
const MAX_CONNECTIONS: usize = 1024;
/// Requests at once on one connection.
const MAX_STREAMS: u32 = 32;
/// Largest header list, in bytes: a token has about 1,200, the largest that we look at 16 KiB.
const MAX_HEADER_BYTES: u32 = 32 * 1024;
/// How long a TLS handshake may take.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a request may take.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// A connection is asked to close after this time, so that none is held for ever.
const MAX_CONNECTION_AGE: Duration = Duration::from_secs(600);
/// How long open requests may take when the server ends.
const DRAIN: Duration = Duration::from_secs(5);
/// Pause after a failed accept, which is almost always a lack of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Lifetime of the server's own certificate; a new one is made at half of it.
const SERVER_TTL: Duration = Duration::from_secs(24 * 3600);

/// What [`run`] needs to know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Where to listen; Istio's port is 15012.
    pub listen: SocketAddr,
    /// Folder with `ca-cert.pem`, `ca-key.pem`, `root-cert.pem`, `cert-chain.pem`; where it has none of them, a root is made.
    pub ca_dir: PathBuf,
    /// PEM file with the public keys that sign service account tokens: RSA (RS256) or P-256 (ES256), one or several.
    /// Required: there is no unauthenticated mode ([I.12]).
    pub token_key: Option<PathBuf>,
    /// Audience that a token must have; default `istio-ca`.
    pub token_audience: String,
    /// Issuer that a token must have; default [`DEFAULT_TOKEN_ISSUER`].
    pub token_issuer: String,
    /// Service accounts of node agents, which may ask for the identities of their node's pods; default
    /// `istio-system/culvert`.
    pub trusted_node_accounts: BTreeSet<ObjectRef>,
    /// DNS names and IP addresses of the server certificate; default `istiod.istio-system.svc`.
    pub server_names: Vec<String>,
    /// File that the roots are published to, for agents to read.
    pub root_cert_out: Option<PathBuf>,
    /// Lifetime of a certificate where the request asks for none; default 24 h.
    pub cert_ttl: Duration,
    /// Longest lifetime; a request for more gets this. Default 2160 h.
    pub max_cert_ttl: Duration,
}

/// Serves the certificate API until `shutdown` ends, then lets open requests finish.
///
/// # Errors
/// The configuration or the CA folder cannot be used, or the address is taken: one line that says what to change.
pub async fn run(
    config: Config,
    cluster: watch::Receiver<Arc<Cluster>>,
    shutdown: impl Future<Output = ()>,
) -> anyhow::Result<()> {
    Server::bind(config, cluster).await?.serve(shutdown).await
}

/// What certificates are issued on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Terms {
    /// Lifetime where the request asks for none.
    pub(crate) cert_ttl: Duration,
    /// Longest lifetime; a request for more gets this.
    pub(crate) max_cert_ttl: Duration,
}

impl Terms {
    /// # Errors
    /// Lifetimes that make no certificate.
    pub(crate) fn check(self) -> anyhow::Result<Self> {
        if self.cert_ttl.as_secs() == 0 || self.max_cert_ttl < self.cert_ttl {
            bail!(
                "lifetime of certificates {:?} must be at least a second and at most the longest lifetime {:?}",
                self.cert_ttl,
                self.max_cert_ttl
            );
        }
        Ok(self)
    }
}

/// A CA that listens but does not answer yet.
pub struct Server {
    listener: TcpListener,
    acceptor: TlsAcceptor,
    service: CertificateService,
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Server").field("listener", &self.listener).finish_non_exhaustive()
    }
}

impl Server {
    /// Opens or makes the CA's key, publishes the root and binds the address.
    ///
    /// # Errors
    /// As for [`run`].
    pub async fn bind(config: Config, cluster: watch::Receiver<Arc<Cluster>>) -> anyhow::Result<Self> {
        Self::bind_with_clock(config, cluster, Clock::default()).await
    }

    /// [`Server::bind`] with another clock for certificates; tokens are judged by the system's.
    ///
    /// # Errors
    /// As for [`run`].
    pub async fn bind_with_clock(
        config: Config,
        cluster: watch::Receiver<Arc<Cluster>>,
        clock: Clock,
    ) -> anyhow::Result<Self> {
        let Some(token_key) = &config.token_key else {
            bail!(
                "no token key: the CA must know the public key that signs service account tokens (--token-key FILE); \
                 there is no unauthenticated mode"
            );
        };
        let terms = Terms { cert_ttl: config.cert_ttl, max_cert_ttl: config.max_cert_ttl }.check()?;
        let tokens = Tokens::new(token_key, config.token_audience, config.token_issuer)?;
        let callers = Callers::new(Box::new(tokens), config.trusted_node_accounts, cluster)?;
        let authority = Arc::new(Authority::open(&config.ca_dir, clock.unix_seconds())?);
        if let Some(path) = &config.root_cert_out {
            authority::publish(path, authority.roots_pem())?;
        }
        // The same one for as long as it serves.
        let authority = watch::channel(authority).1;
        let certificate = ServerCertificate::new(authority.clone(), config.server_names, clock.clone())?;
        let listener = bind(config.listen).await?;
        Self::new(listener, certificate, authority, Arc::new(callers), terms, clock)
    }

    /// A server that signs with the authority of the moment.
    ///
    /// # Errors
    /// TLS cannot be set up.
    pub(crate) fn new(
        listener: TcpListener,
        certificate: ServerCertificate,
        authority: watch::Receiver<Arc<Authority>>,
        callers: Arc<Callers>,
        terms: Terms,
        clock: Clock,
    ) -> anyhow::Result<Self> {
        let tls = server_tls(Arc::new(certificate), &clock, b"h2")?;
        let restraint = Restraint::new();
        let inner = Inner { authority, callers, terms, clock, restraint };
        Ok(Self { listener, acceptor: TlsAcceptor::from(Arc::new(tls)), service: CertificateService(Arc::new(inner)) })
    }

    /// Where it listens.
    ///
    /// # Errors
    /// The kernel does not say.
    pub fn local_addr(&self) -> anyhow::Result<SocketAddr> {
        self.listener.local_addr().context("address of the CA's listener")
    }

    /// Answers until `shutdown` ends, then lets open requests finish, 5 s at most.
    ///
    /// # Errors
    /// None is expected: what goes wrong with one connection ends that connection.
    pub async fn serve(self, shutdown: impl Future<Output = ()>) -> anyhow::Result<()> {
        let service = self.service.clone();
        self.serve_as(service, shutdown).await
    }

    /// [`Server::serve`], with another API beside its own: the requests whose path `other` has.
    ///
    /// # Errors
    /// As there.
    pub(crate) async fn serve_beside<S>(
        self,
        path: &'static str,
        other: S,
        shutdown: impl Future<Output = ()>,
    ) -> anyhow::Result<()>
    where
        S: GrpcService,
    {
        let own = self.service.clone();
        self.serve_as(Beside { own, path, other }, shutdown).await
    }

    async fn serve_as(self, service: impl GrpcService, shutdown: impl Future<Output = ()>) -> anyhow::Result<()> {
        info!(address = %self.local_addr()?, "certificate API is ready");
        let (stopping, mut stopped) = watch::channel(false);
        let restraint = self.service.0.restraint.clone();
        let served = tonic::transport::Server::builder()
            .max_concurrent_streams(MAX_STREAMS)
            .http2_max_header_list_size(MAX_HEADER_BYTES)
            .http2_keepalive_interval(Some(Duration::from_secs(30)))
            .http2_keepalive_timeout(Some(Duration::from_secs(20)))
            .max_connection_age(MAX_CONNECTION_AGE)
            .timeout(REQUEST_TIMEOUT)
            .serve_with_incoming_shutdown(service, incoming(self.listener, self.acceptor, restraint.clone()), async {
                shutdown.await;
                stopping.send_replace(true);
            });
        let overdue = async {
            // An error means that the server has ended by itself.
            if stopped.wait_for(|stopped| *stopped).await.is_ok() {
                tokio::time::sleep(DRAIN).await;
            }
        };
        tokio::select! {
            result = served => result.context("serve the certificate API"),
            never = restraint.tell_on() => match never {},
            () = overdue => {
                warn!(after_s = DRAIN.as_secs(), "ended with requests still open");
                Ok(())
            }
        }
    }
}

/// A socket that listens.
///
/// # Errors
/// The address is taken, or not this machine's.
pub(crate) async fn bind(address: SocketAddr) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address).await.with_context(|| format!("listen on {address}"))
}

/// TLS 1.3 as a server, for clients that have no certificate.
///
/// # Errors
/// None that a configuration could cause.
pub(crate) fn server_tls(
    certificate: Arc<ServerCertificate>,
    clock: &Clock,
    protocol: &[u8],
) -> anyhow::Result<ServerConfig> {
    let mut tls = ServerConfig::builder_with_details(provider(), Arc::new(clock.clone()))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .context("set up TLS 1.3")?
        .with_no_client_auth()
        .with_cert_resolver(certificate);
    tls.alpn_protocols = vec![protocol.to_vec()];
    Ok(tls)
}

/// A server's own certificate, made anew by the first handshake after half of its life, or after another authority came.
pub(crate) struct ServerCertificate {
    authority: watch::Receiver<Arc<Authority>>,
    names: Vec<String>,
    clock: Clock,
    current: Mutex<Made>,
}

struct Made {
    key: Arc<CertifiedKey>,
    by: Arc<Authority>,
    /// Second since the epoch from which it is replaced.
    until: u64,
}

impl ServerCertificate {
    /// For a server that its clients know by any of `names`, DNS names and addresses.
    ///
    /// # Errors
    /// No name, one that is neither, or the authority cannot sign.
    pub(crate) fn new(
        authority: watch::Receiver<Arc<Authority>>,
        names: Vec<String>,
        clock: Clock,
    ) -> anyhow::Result<Self> {
        if names.is_empty() {
            bail!("no server name: agents could not verify the CA's server certificate");
        }
        let by = authority.borrow().clone();
        let current = Mutex::new(Self::make(by, &names, clock.unix_seconds())?);
        Ok(Self { authority, names, clock, current })
    }

    fn make(by: Arc<Authority>, names: &[String], now: u64) -> anyhow::Result<Made> {
        let (key, expires_at) = by.server(names, SERVER_TTL, now)?;
        Ok(Made { key: Arc::new(key), by, until: now + (expires_at - now) / 2 })
    }
}

impl fmt::Debug for ServerCertificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServerCertificate").field("names", &self.names).finish_non_exhaustive()
    }
}

impl ResolvesServerCert for ServerCertificate {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let now = self.clock.unix_seconds();
        let authority = self.authority.borrow().clone();
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        if now >= current.until || !Arc::ptr_eq(&current.by, &authority) {
            match Self::make(authority, &self.names, now) {
                Ok(renewed) => *current = renewed,
                Err(error) => error!(error = format!("{error:#}"), "cannot renew the CA's server certificate"),
            }
        }
        Some(current.key.clone())
    }
}

/// Accepts connections and does their handshakes side by side; yields those that are ready for HTTP/2.
fn incoming(
    listener: TcpListener,
    acceptor: TlsAcceptor,
    restraint: Restraint,
) -> impl Stream<Item = std::io::Result<Connection>> {
    let state = (listener, acceptor, restraint, Arc::new(Semaphore::new(MAX_CONNECTIONS)), FuturesUnordered::new());
    futures_util::stream::unfold(state, async |(listener, acceptor, restraint, room, mut handshakes)| {
        loop {
            let accepted = async {
                // The semaphore is never closed.
                let permit = room.clone().acquire_owned().await.ok();
                (listener.accept().await, permit)
            };
            tokio::select! {
                Some(connection) = handshakes.next(), if !handshakes.is_empty() => {
                    if let Some(connection) = connection {
                        return Some((Ok(connection), (listener, acceptor, restraint, room, handshakes)));
                    }
                }
                (accepted, permit) = accepted => match accepted {
                    Ok((tcp, peer)) => {
                        handshakes.push(handshake(acceptor.clone(), tcp, peer, permit, restraint.clone()).boxed());
                    }
                    Err(error) => {
                        if restraint.admits("accept-failed") {
                            warn!(%error, "cannot accept a connection");
                        }
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                    }
                },
            }
        }
    })
}

async fn handshake(
    acceptor: TlsAcceptor,
    tcp: TcpStream,
    peer: SocketAddr,
    permit: Option<OwnedSemaphorePermit>,
    restraint: Restraint,
) -> Option<Connection> {
    if let Err(error) = tcp.set_nodelay(true) {
        debug!(%peer, %error, "TCP_NODELAY");
    }
    match timeout(HANDSHAKE_TIMEOUT, acceptor.accept(tcp)).await {
        Ok(Ok(tls)) => Some(Connection { tls, _permit: permit }),
        Ok(Err(error)) => {
            if restraint.admits("handshake-failed") {
                info!(%peer, %error, "TLS handshake failed");
            }
            None
        }
        Err(_) => {
            if restraint.admits("handshake-timeout") {
                info!(%peer, "TLS handshake took too long");
            }
            None
        }
    }
}

/// An accepted connection, counted until it is dropped.
struct Connection {
    tls: TlsStream<TcpStream>,
    _permit: Option<OwnedSemaphorePermit>,
}

impl Connected for Connection {
    type ConnectInfo = TcpConnectInfo;

    fn connect_info(&self) -> TcpConnectInfo {
        self.tls.get_ref().0.connect_info()
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut TaskContext<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.tls).poll_read(cx, buf)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut TaskContext<'_>, buf: &[u8]) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.tls).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut TaskContext<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.tls).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut TaskContext<'_>) -> Poll<std::io::Result<()>> {
        ready!(Pin::new(&mut self.tls).poll_shutdown(cx))?;
        Poll::Ready(Ok(()))
    }
}

/// Lines per second about what anybody who reaches the port can cause, for each kind.
const LINES_PER_SECOND: u32 = 20;
/// How often is told what was held back.
const TELL: Duration = Duration::from_secs(1);

/// The log's share for those who are not known yet. Clones are the same.
#[derive(Clone, Debug)]
pub(crate) struct Restraint(Arc<Mutex<Limiter>>);

impl Restraint {
    pub(crate) fn new() -> Self {
        Self(Arc::new(Mutex::new(Limit::fixed(LINES_PER_SECOND).limiter())))
    }

    /// Whether a line of this kind may be written now.
    pub(crate) fn admits(&self, kind: &'static str) -> bool {
        self.limiter().admits(None, kind, Instant::now())
    }

    /// Tells from time to time how many lines were held back.
    pub(crate) async fn tell_on(&self) -> Infallible {
        loop {
            tokio::time::sleep(TELL).await;
            self.limiter().tell(Instant::now());
        }
    }

    fn limiter(&self) -> MutexGuard<'_, Limiter> {
        // Whatever has panicked there, a limiter has no broken state.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What answers a request.
struct Inner {
    authority: watch::Receiver<Arc<Authority>>,
    callers: Arc<Callers>,
    terms: Terms,
    clock: Clock,
    restraint: Restraint,
}

impl Inner {
    async fn create(&self, request: &Request<CertificateRequest>) -> Result<CertificateResponse, Status> {
        let peer = request.remote_addr();
        let body = request.get_ref();
        let wanted = body.impersonated_identity();
        let shown = wanted.map(|wanted| wanted.chars().take(256).collect::<String>());
        let refused = |denial: Denial, caller: Option<&Caller>| {
            // A node's agent has lines of its own, which those who have no token cannot use up.
            if self.restraint.admits(if caller.is_some() { "refused-agent" } else { "refused-caller" }) {
                warn!(peer = ?peer, caller = caller.map(|c| format!("{}/{}", c.pod.namespace, c.pod.name)),
                    node = caller.map(|c| &*c.node), wanted = shown.as_deref(), reason = %denial, "certificate refused");
            }
            denial.status()
        };
        let token = bearer(request.metadata().as_ref()).ok_or_else(|| refused(Denial::NoToken, None))?;
        let (caller, cluster) = self.callers.caller(token).await.map_err(|denial| refused(denial, None))?;
        let identity = caller::authorize(&caller, wanted, &cluster).map_err(|denial| refused(denial, Some(&caller)))?;
        let spki = csr::public_key(&body.csr, &identity).map_err(|bad| {
            if self.restraint.admits("refused-request") {
                warn!(peer = ?peer, %identity, node = %caller.node, reason = %bad, "certificate refused");
            }
            Status::invalid_argument(bad.to_string())
        })?;
        let ttl = match u64::try_from(body.validity_duration) {
            Ok(seconds) if seconds > 0 => Duration::from_secs(seconds).min(self.terms.max_cert_ttl),
            _ => self.terms.cert_ttl,
        };
        let now = self.clock.unix_seconds();
        let authority = self.authority.borrow().clone();
        let signed = authority.sign(&identity, &spki, ttl, now).map_err(|error| {
            error!(%identity, error = format!("{error:#}"), "cannot sign a certificate");
            Status::internal("the CA cannot sign")
        })?;
        info!(%identity, node = %caller.node, caller = format!("{}/{}", caller.pod.namespace, caller.pod.name),
            serial = %signed.serial, valid_for_s = signed.expires_at - now, "certificate issued");
        Ok(CertificateResponse { cert_chain: signed.cert_chain })
    }
}

/// The token of `authorization: Bearer <token>`; the scheme in any case (RFC 9110 §11.1).
pub(crate) fn bearer(headers: &http::HeaderMap) -> Option<&str> {
    let value = headers.get("authorization")?.to_str().ok()?;
    let (scheme, token) = value.split_once(' ')?;
    let token = token.trim();
    (scheme.eq_ignore_ascii_case("bearer") && !token.is_empty()).then_some(token)
}

/// What serves requests of gRPC.
pub(crate) trait GrpcService:
    Service<
        http::Request<tonic::body::Body>,
        Response = http::Response<tonic::body::Body>,
        Error = Infallible,
        Future = BoxFuture<http::Response<tonic::body::Body>, Infallible>,
    > + Clone
    + Send
    + Sync
    + 'static
{
}

impl<S> GrpcService for S where
    S: Service<
            http::Request<tonic::body::Body>,
            Response = http::Response<tonic::body::Body>,
            Error = Infallible,
            Future = BoxFuture<http::Response<tonic::body::Body>, Infallible>,
        > + Clone
        + Send
        + Sync
        + 'static
{
}

/// Two services, of which one has a path of its own.
#[derive(Clone)]
struct Beside<S> {
    own: CertificateService,
    path: &'static str,
    other: S,
}

impl<S: GrpcService> Service<http::Request<tonic::body::Body>> for Beside<S> {
    type Response = http::Response<tonic::body::Body>;
    type Error = Infallible;
    type Future = BoxFuture<Self::Response, Self::Error>;

    fn poll_ready(&mut self, context: &mut TaskContext<'_>) -> Poll<Result<(), Infallible>> {
        ready!(self.own.poll_ready(context))?;
        self.other.poll_ready(context)
    }

    fn call(&mut self, request: http::Request<tonic::body::Body>) -> Self::Future {
        match request.uri().path() == self.path {
            true => self.other.call(request),
            false => self.own.call(request),
        }
    }
}

/// `istio.v1.auth.IstioCertificateService`.
#[derive(Clone)]
struct CertificateService(Arc<Inner>);

impl Service<http::Request<tonic::body::Body>> for CertificateService {
    type Response = http::Response<tonic::body::Body>;
    type Error = Infallible;
    type Future = BoxFuture<Self::Response, Self::Error>;

    fn poll_ready(&mut self, _: &mut TaskContext<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<tonic::body::Body>) -> Self::Future {
        let method = CreateCertificate(self.0.clone());
        Box::pin(async move {
            if request.uri().path() != wire::CREATE_CERTIFICATE {
                return Ok(Status::unimplemented("no such method").into_http());
            }
            let codec = ProstCodec::<CertificateResponse, CertificateRequest>::default();
            let mut grpc = Grpc::new(codec).max_decoding_message_size(wire::MAX_MESSAGE_BYTES);
            Ok(grpc.unary(method, request).await)
        })
    }
}

/// The one method of the service.
struct CreateCertificate(Arc<Inner>);

impl UnaryService<CertificateRequest> for CreateCertificate {
    type Response = CertificateResponse;
    type Future = BoxFuture<Response<CertificateResponse>, Status>;

    fn call(&mut self, request: Request<CertificateRequest>) -> Self::Future {
        let inner = self.0.clone();
        Box::pin(async move { inner.create(&request).await.map(Response::new) })
    }
}
