//! `culvert ca`: the server side of Istio's certificate API (specification §4), with its own root.
//!
//! Who may ask for which identity is in `caller`, what may be asked for in `csr`, and the signing in `authority`.
//! Here is the server around them: TLS, limits, and one log line per answer, as long as they are not too many. What pods
//! there are is told by the source that the caller of [`run`] watches; until its first snapshot nobody is known and
//! everybody is refused ([D.2]).

mod authority;
mod caller;
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
    caller::{Caller, Denial, Tokens},
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
        if config.cert_ttl.as_secs() == 0 || config.max_cert_ttl < config.cert_ttl {
            bail!(
                "lifetime of certificates {:?} must be at least a second and at most the longest lifetime {:?}",
                config.cert_ttl,
                config.max_cert_ttl
            );
        }
        if config.server_names.is_empty() {
            bail!("no server name: agents could not verify the CA's server certificate");
        }
        let tokens = Tokens::new(token_key, config.token_audience, config.token_issuer, config.trusted_node_accounts)?;
        let authority = Arc::new(Authority::open(&config.ca_dir, clock.unix_seconds())?);
        if let Some(path) = &config.root_cert_out {
            authority::publish(path, authority.roots_pem())?;
        }
        let certificate = ServerCertificate::new(authority.clone(), config.server_names, clock.clone())?;
        let mut tls = ServerConfig::builder_with_details(provider(), Arc::new(clock.clone()))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .context("set up TLS 1.3")?
            .with_no_client_auth()
            .with_cert_resolver(Arc::new(certificate));
        tls.alpn_protocols = vec![b"h2".to_vec()];
        let listener =
            TcpListener::bind(config.listen).await.with_context(|| format!("listen on {}", config.listen))?;
        Ok(Self {
            listener,
            acceptor: TlsAcceptor::from(Arc::new(tls)),
            service: CertificateService(Arc::new(Inner {
                authority,
                tokens,
                cluster,
                cert_ttl: config.cert_ttl,
                max_cert_ttl: config.max_cert_ttl,
                clock,
                restraint: Restraint::new(),
            })),
        })
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
            .serve_with_incoming_shutdown(
                self.service,
                incoming(self.listener, self.acceptor, restraint.clone()),
                async {
                    shutdown.await;
                    stopping.send_replace(true);
                },
            );
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

/// The server's own certificate, made anew by the first handshake after half of its life.
struct ServerCertificate {
    authority: Arc<Authority>,
    names: Vec<String>,
    clock: Clock,
    /// With the second since the epoch from which it is replaced.
    current: Mutex<(Arc<CertifiedKey>, u64)>,
}

impl ServerCertificate {
    fn new(authority: Arc<Authority>, names: Vec<String>, clock: Clock) -> anyhow::Result<Self> {
        let current = Mutex::new(Self::make(&authority, &names, clock.unix_seconds())?);
        Ok(Self { authority, names, clock, current })
    }

    fn make(authority: &Authority, names: &[String], now: u64) -> anyhow::Result<(Arc<CertifiedKey>, u64)> {
        let (key, expires_at) = authority.server(names, SERVER_TTL, now)?;
        Ok((Arc::new(key), now + (expires_at - now) / 2))
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
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        if now >= current.1 {
            match Self::make(&self.authority, &self.names, now) {
                Ok(renewed) => *current = renewed,
                Err(error) => error!(error = format!("{error:#}"), "cannot renew the CA's server certificate"),
            }
        }
        Some(current.0.clone())
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
struct Restraint(Arc<Mutex<Limiter>>);

impl Restraint {
    fn new() -> Self {
        Self(Arc::new(Mutex::new(Limit::fixed(LINES_PER_SECOND).limiter())))
    }

    /// Whether a line of this kind may be written now.
    fn admits(&self, kind: &'static str) -> bool {
        self.limiter().admits(None, kind, Instant::now())
    }

    /// Tells from time to time how many lines were held back.
    async fn tell_on(&self) -> Infallible {
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
    authority: Arc<Authority>,
    tokens: Tokens,
    cluster: watch::Receiver<Arc<Cluster>>,
    cert_ttl: Duration,
    max_cert_ttl: Duration,
    clock: Clock,
    restraint: Restraint,
}

impl Inner {
    fn create(&self, request: &Request<CertificateRequest>) -> Result<CertificateResponse, Status> {
        let peer = request.remote_addr();
        let body = request.get_ref();
        let wanted = body.impersonated_identity();
        let shown = wanted.map(|wanted| wanted.chars().take(256).collect::<String>());
        // One snapshot for all questions.
        let cluster = self.cluster.borrow().clone();
        let refused = |denial: Denial, caller: Option<&Caller>| {
            // A node's agent has lines of its own, which those who have no token cannot use up.
            if self.restraint.admits(if caller.is_some() { "refused-agent" } else { "refused-caller" }) {
                warn!(peer = ?peer, caller = caller.map(|c| format!("{}/{}", c.pod.namespace, c.pod.name)),
                    node = caller.map(|c| &*c.node), wanted = shown.as_deref(), reason = %denial, "certificate refused");
            }
            Status::unauthenticated(denial.category())
        };
        let token = bearer(request).ok_or(Denial::NoToken);
        let caller =
            token.and_then(|token| self.tokens.caller(token, &cluster)).map_err(|denial| refused(denial, None))?;
        let identity = caller::authorize(&caller, wanted, &cluster).map_err(|denial| refused(denial, Some(&caller)))?;
        let spki = csr::public_key(&body.csr, &identity).map_err(|bad| {
            if self.restraint.admits("refused-request") {
                warn!(peer = ?peer, %identity, node = %caller.node, reason = %bad, "certificate refused");
            }
            Status::invalid_argument(bad.to_string())
        })?;
        let ttl = match u64::try_from(body.validity_duration) {
            Ok(seconds) if seconds > 0 => Duration::from_secs(seconds).min(self.max_cert_ttl),
            _ => self.cert_ttl,
        };
        let now = self.clock.unix_seconds();
        let signed = self.authority.sign(&identity, &spki, ttl, now).map_err(|error| {
            error!(%identity, error = format!("{error:#}"), "cannot sign a certificate");
            Status::internal("the CA cannot sign")
        })?;
        info!(%identity, node = %caller.node, caller = format!("{}/{}", caller.pod.namespace, caller.pod.name),
            serial = %signed.serial, valid_for_s = signed.expires_at - now, "certificate issued");
        Ok(CertificateResponse { cert_chain: signed.cert_chain })
    }
}

/// The token of `authorization: Bearer <token>`; the scheme in any case (RFC 9110 §11.1).
fn bearer<T>(request: &Request<T>) -> Option<&str> {
    let value = request.metadata().get("authorization")?.to_str().ok()?;
    let (scheme, token) = value.split_once(' ')?;
    let token = token.trim();
    (scheme.eq_ignore_ascii_case("bearer") && !token.is_empty()).then_some(token)
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
    type Future = std::future::Ready<Result<Response<CertificateResponse>, Status>>;

    fn call(&mut self, request: Request<CertificateRequest>) -> Self::Future {
        std::future::ready(self.0.create(&request).map(Response::new))
    }
}
