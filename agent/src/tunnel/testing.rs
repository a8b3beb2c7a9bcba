//! What the tests of tunnels stand on: a CA, TLS configurations, a runtime and a server on loopback.

use std::{
    cell::{Cell, RefCell},
    future::Future,
    net::SocketAddr,
    rc::Rc,
    sync::Arc,
    time::Duration,
};

use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, SanType};
use rustls::{
    ClientConfig, RootCertStore, ServerConfig,
    pki_types::{CertificateDer, PrivateKeyDer},
    server::WebPkiClientVerifier,
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::watch,
    task::{JoinSet, LocalSet},
    time::{Instant, sleep},
};

use super::{
    Account, Charge, Config, Connect, OpenError, Pool, PoolKey, Stream,
    server::{Incoming, ServeError, serve},
};

pub(crate) const CLIENT: &str = "spiffe://cluster.local/ns/test/sa/nginx";
pub(crate) const SERVER: &str = "spiffe://cluster.local/ns/default/sa/productpage";

/// Runs a test on one thread with room for local tasks, for at most a minute.
pub(crate) fn local(test: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
    let test = async { tokio::time::timeout(Duration::from_secs(60), test).await };
    runtime.block_on(LocalSet::new().run_until(test)).expect("the test hangs");
}

/// Mutual TLS as §14.1 wants it, from one throw-away CA.
#[derive(Clone)]
pub(crate) struct Tls {
    pub(crate) client: Arc<ClientConfig>,
    pub(crate) server: Arc<ServerConfig>,
    pub(crate) roots: Arc<RootCertStore>,
}

pub(crate) fn tls() -> Tls {
    let ca_key = KeyPair::generate().expect("key");
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    // Two CAs of the same name would make a foreign certificate a bad signature, not an unknown issuer.
    params.distinguished_name.push(rcgen::DnType::CommonName, format!("test {:016x}", rand::random::<u64>()));
    let ca = params.self_signed(&ca_key).expect("CA");
    let issuer = Issuer::new(params, ca_key);
    let mut roots = RootCertStore::empty();
    roots.add(ca.der().clone()).expect("root");
    let roots = Arc::new(roots);
    let (chain, key) = leaf(&issuer, CLIENT);
    let mut client = ClientConfig::builder_with_protocol_versions(&[&rustls::version::TLS13])
        .with_root_certificates(roots.clone())
        .with_client_auth_cert(chain, key)
        .expect("client");
    client.alpn_protocols = vec![b"h2".to_vec()];
    client.resumption = rustls::client::Resumption::disabled();
    let (chain, key) = leaf(&issuer, SERVER);
    let verifier = WebPkiClientVerifier::builder(roots.clone()).build().expect("verifier");
    let mut server = ServerConfig::builder_with_protocol_versions(&[&rustls::version::TLS13])
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain, key)
        .expect("server");
    server.alpn_protocols = vec![b"h2".to_vec()];
    server.send_tls13_tickets = 0;
    Tls { client: Arc::new(client), server: Arc::new(server), roots }
}

fn leaf(issuer: &Issuer<'_, KeyPair>, uri: &str) -> (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>) {
    let key = KeyPair::generate().expect("key");
    let mut params = CertificateParams::default();
    params.subject_alt_names =
        vec![SanType::URI(uri.try_into().expect("URI")), SanType::IpAddress(std::net::Ipv4Addr::LOCALHOST.into())];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    let certificate = params.signed_by(&key, issuer).expect("leaf");
    (vec![certificate.der().clone()], PrivateKeyDer::try_from(key.serialize_der()).expect("key"))
}

pub(crate) fn key(destination: SocketAddr) -> PoolKey {
    PoolKey {
        source: CLIENT.parse().expect("identity"),
        source_ip: [127, 0, 0, 1].into(),
        destination,
        expected: [SERVER.parse().expect("identity")].into(),
    }
}

pub(crate) fn connect() -> Connect {
    Connect {
        authority: "10.0.0.1:9080".parse().expect("authority"),
        forwarded: None,
        baggage: None,
        traceparent: None,
    }
}

/// Opens a stream, dialling `addr` if needed.
pub(crate) async fn open(pool: &Pool, addr: SocketAddr, client: &Arc<ClientConfig>) -> Result<Stream, OpenError> {
    pool.open(None, &key(addr), &connect(), || dial(addr, client.clone())).await
}

pub(crate) async fn dial(
    addr: SocketAddr,
    client: Arc<ClientConfig>,
) -> anyhow::Result<(TcpStream, Arc<ClientConfig>)> {
    Ok((TcpStream::connect(addr).await?, client))
}

/// A server of tunnels on loopback; one thread with the test.
pub(crate) struct Server {
    pub(crate) addr: SocketAddr,
    pub(crate) accepted: Rc<Cell<usize>>,
    pub(crate) ends: Rc<RefCell<Vec<Result<(), ServeError>>>>,
    drain: watch::Sender<Option<Instant>>,
    _tasks: JoinSet<()>,
}

impl Server {
    pub(crate) async fn start<F>(tls: &Tls, config: Config, handler: impl Fn(Incoming) -> F + Clone + 'static) -> Self
    where
        F: Future<Output = ()> + 'static,
    {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
        let addr = listener.local_addr().expect("address");
        let (accepted, ends) = (Rc::new(Cell::new(0)), Rc::new(RefCell::new(Vec::new())));
        let (drain, drained) = watch::channel(None::<Instant>);
        let (count, results, server) = (accepted.clone(), ends.clone(), tls.server.clone());
        let mut tasks = JoinSet::new();
        tasks.spawn_local(async move {
            let mut connections = JoinSet::new();
            loop {
                let (tcp, _) = listener.accept().await.expect("accept");
                count.set(count.get() + 1);
                let mut drained = drained.clone();
                let drain = async move { drained.wait_for(Option::is_some).await.expect("sender").expect("some") };
                let (server, handler, results) = (server.clone(), handler.clone(), results.clone());
                connections.spawn_local(async move {
                    let end = serve(tcp, server, config, drain, handler).await;
                    results.borrow_mut().push(end);
                });
            }
        });
        Self { addr, accepted, ends, drain, _tasks: tasks }
    }

    /// Starts the orderly end of every connection, present and future.
    pub(crate) fn drain(&self, deadline: Instant) {
        self.drain.send_replace(Some(deadline));
    }

    /// Lets the next connections live after [`drain`](Self::drain).
    pub(crate) fn undrain(&self) {
        self.drain.send_replace(None);
    }
}

/// Waits until `condition` holds.
pub(crate) async fn until(mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < Duration::from_secs(40), "it never comes true");
        sleep(Duration::from_millis(5)).await;
    }
}

/// A connection's part of an account that is never full.
pub(crate) fn charge() -> Charge {
    Charge::new(Arc::new(Account::new(Arc::new(usize::MAX.into()))))
}

/// Accepts every stream and sends back what comes.
pub(crate) async fn echo(incoming: Incoming) {
    let Ok(mut stream) = incoming.accept(None) else { return };
    while let Ok(Some(bytes)) = stream.read().await {
        if stream.write(&bytes).await.is_err() {
            return;
        }
    }
    let _ = stream.shutdown();
}
