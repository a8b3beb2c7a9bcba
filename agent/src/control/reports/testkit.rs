//! For tests: a replica of `culvert control` on loopback that takes reports, and nothing else.

use std::{fs, net::SocketAddr};

use rcgen::{CertificateParams, KeyPair};
use tempfile::TempDir;
use tokio::{net::TcpListener, sync::oneshot, task::JoinHandle};
use tonic::transport::{Identity, Server, ServerTlsConfig, server::TcpIncoming};

use super::*;

pub(crate) const SERVER_NAME: &str = "istiod.istio-system.svc";

/// Believes `token-of-NAME`.
struct Names;

impl Identify for Names {
    fn identify<'a>(&'a self, token: &'a str) -> future::BoxFuture<'a, Result<Caller, Status>> {
        let caller = match token.strip_prefix("token-of-") {
            Some(name) => Ok(Caller { pod: agent(name), node: "node".into() }),
            None => Err(Status::unauthenticated("the token is not accepted")),
        };
        Box::pin(std::future::ready(caller))
    }
}

pub(crate) fn agent(name: &str) -> ObjectRef {
    ObjectRef::new("istio-system", name)
}

pub(crate) fn agents(names: &[&str]) -> Arc<BTreeSet<ObjectRef>> {
    Arc::new(names.iter().map(|name| agent(name)).collect())
}

/// A folder with the root and the key of all replicas.
pub(crate) struct Lab {
    pub(crate) dir: TempDir,
    identity: Identity,
}

impl Lab {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().expect("a folder");
        let key = KeyPair::generate().expect("a key");
        let params = CertificateParams::new(vec![SERVER_NAME.to_owned()]).expect("a name");
        let certificate = params.self_signed(&key).expect("a certificate");
        fs::write(dir.path().join("root.pem"), certificate.pem()).expect("write");
        Self { dir, identity: Identity::from_pem(certificate.pem(), key.serialize_pem()) }
    }

    /// A replica with TLS, on `address`, that wants to hear from agents every second.
    pub(crate) async fn replica(&self, address: SocketAddr, leadership: Leadership, names: &[&str]) -> Replica {
        self.replica_every(Duration::from_secs(1), address, leadership, names).await
    }

    pub(crate) async fn replica_every(
        &self,
        interval: Duration,
        address: SocketAddr,
        leadership: Leadership,
        names: &[&str],
    ) -> Replica {
        let tls = ServerTlsConfig::new().identity(self.identity.clone());
        let server = Server::builder().tls_config(tls).expect("TLS");
        Replica::start(server, address, interval, leadership, names).await
    }
}

/// Serves until it is dropped or stopped.
pub(crate) struct Replica {
    pub(crate) address: SocketAddr,
    pub(crate) leadership: watch::Sender<Leadership>,
    pub(crate) ledger: watch::Receiver<Arc<Ledger>>,
    pub(crate) agents: watch::Sender<Arc<BTreeSet<ObjectRef>>>,
    stop: oneshot::Sender<()>,
    task: JoinHandle<()>,
}

impl Replica {
    pub(crate) async fn start(
        server: Server,
        address: SocketAddr,
        interval: Duration,
        leadership: Leadership,
        names: &[&str],
    ) -> Self {
        let (leadership, leads) = watch::channel(leadership);
        let (agents, expected) = watch::channel(agents(names));
        let (service, ledger, keeper) = reports_every(interval, Arc::new(Names), leads, expected);
        let listener = TcpListener::bind(address).await.expect("a free port");
        let address = listener.local_addr().expect("bound");
        let (stop, stopped) = oneshot::channel::<()>();
        let task = tokio::spawn(async move {
            let incoming = TcpIncoming::from(listener);
            let served = server.serve_with_incoming_shutdown(service, incoming, async { drop(stopped.await) });
            tokio::select! {
                served = served => served.expect("serve"),
                never = keeper.run() => match never {},
            }
        });
        Self { address, leadership, ledger, agents, stop, task }
    }

    /// A replica without TLS.
    pub(crate) async fn plain(leadership: Leadership, names: &[&str]) -> Self {
        Self::start(Server::builder(), ([127, 0, 0, 1], 0).into(), INTERVAL, leadership, names).await
    }

    /// Waits until the ledger is as it should be.
    pub(crate) async fn until(&mut self, right: impl Fn(&Ledger) -> bool) {
        let waited = self.ledger.wait_for(|ledger| right(ledger));
        let waited = tokio::time::timeout(Duration::from_secs(20), waited).await;
        waited.expect("in time").expect("the keeper runs");
    }

    /// Ends it, with its connections.
    pub(crate) async fn stop(self) {
        drop(self.stop);
        self.task.await.expect("ended without a panic");
    }
}
