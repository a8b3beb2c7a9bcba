//! For tests: a real CA on loopback, the cluster it believes in, and tokens as a Kubernetes API server would mint them.

use std::{
    fs,
    net::SocketAddr,
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use jsonwebtoken::{Algorithm, EncodingKey, Header, encode};
use rcgen::{KeyPair, PKCS_ECDSA_P256_SHA256};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::{
    sync::{oneshot, watch},
    task::JoinHandle,
};
use tonic::{
    Status,
    codegen::http::uri::PathAndQuery,
    transport::{Certificate, ClientTlsConfig, Endpoint},
};
use tonic_prost::ProstCodec;

use super::{Config, DEFAULT_TOKEN_ISSUER, Server};
use crate::{
    identity::{
        self, CaConfig, Clock, Identities, Source,
        wire::{self, CertificateRequest, CertificateResponse},
    },
    model::{Cluster, ObjectRef, Pod, PodUid, SpiffeId, TrustDomain},
};

pub(crate) const SERVER_NAME: &str = "istiod.istio-system.svc";

pub(crate) fn id(account: &str) -> SpiffeId {
    let (namespace, account) = account.split_once('/').expect("namespace/account");
    format!("spiffe://cluster.local/ns/{namespace}/sa/{account}").parse().expect("valid")
}

pub(crate) fn object(text: &str) -> ObjectRef {
    let (namespace, name) = text.split_once('/').expect("namespace/name");
    ObjectRef { namespace: namespace.into(), name: name.into() }
}

pub(crate) fn pod(name: &str, account: &str, node: &str) -> Pod {
    Pod {
        uid: PodUid(format!("uid-of-{name}").into()),
        object: object(name),
        labels: Default::default(),
        annotations: Default::default(),
        service_account: account.into(),
        node: node.into(),
        ips: Vec::new(),
        host_network: false,
        finished: false,
        ready: true,
        terminating: false,
        mirror_uid: None,
        has_proxy_container: false,
        named_ports: Default::default(),
        workload_name: "".into(),
    }
}

pub(crate) fn cluster(pods: Vec<Pod>) -> Cluster {
    Cluster { pods: pods.into_iter().map(|pod| (pod.uid.clone(), Arc::new(pod))).collect(), ..Default::default() }
}

/// Two nodes with their agents; `default/web` and `test/client` on `node-a`, `test/far` on `node-b`.
fn two_nodes() -> Cluster {
    let agent = |node: &str| Pod { host_network: true, ..pod(&format!("istio-system/agent-{node}"), "culvert", node) };
    cluster(vec![
        agent("node-a"),
        agent("node-b"),
        pod("default/web", "web", "node-a"),
        pod("test/client", "client", "node-a"),
        pod("test/far", "far", "node-b"),
    ])
}

/// The claims of a projected service account token, as an API server writes them, for the agent of `node`.
pub(crate) fn claims(node: &str) -> Value {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs();
    json!({
        "aud": ["istio-ca"],
        "exp": now + 3600,
        "iat": now,
        "nbf": now,
        "iss": DEFAULT_TOKEN_ISSUER,
        "sub": "system:serviceaccount:istio-system:culvert",
        "kubernetes.io": {
            "namespace": "istio-system",
            "serviceaccount": { "name": "culvert", "uid": "uid-of-account" },
            "pod": { "name": format!("agent-{node}"), "uid": format!("uid-of-istio-system/agent-{node}") },
            "node": { "name": node, "uid": "uid-of-node" },
        },
    })
}

/// Signs `claims` with a PEM private key.
pub(crate) fn mint(claims: &Value, algorithm: Algorithm, key: &KeyPair) -> String {
    let pem = key.serialize_pem();
    let key = match algorithm {
        Algorithm::RS256 => EncodingKey::from_rsa_pem(pem.as_bytes()),
        _ => EncodingKey::from_ec_pem(pem.as_bytes()),
    };
    encode(&Header::new(algorithm), claims, &key.expect("a private key")).expect("claims")
}

/// A folder with a token key, and a cluster that tests may change.
pub(crate) struct Lab {
    pub(crate) dir: TempDir,
    pub(crate) token_key: KeyPair,
    pub(crate) cluster: watch::Sender<Arc<Cluster>>,
}

impl Lab {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().expect("a folder");
        let token_key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).expect("a key");
        fs::write(dir.path().join("token-key.pem"), token_key.public_key_pem()).expect("write");
        let lab = Self { dir, token_key, cluster: watch::channel(Arc::new(two_nodes())).0 };
        lab.write_token(&claims("node-a"));
        lab
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn write_token(&self, claims: &Value) {
        fs::write(self.path("token"), mint(claims, Algorithm::ES256, &self.token_key)).expect("write");
    }

    pub(crate) fn root(&self) -> String {
        fs::read_to_string(self.path("root.pem")).expect("published by the CA")
    }

    pub(crate) fn config(&self) -> Config {
        Config {
            listen: ([127, 0, 0, 1], 0).into(),
            ca_dir: self.path("ca"),
            token_key: Some(self.path("token-key.pem")),
            token_audience: "istio-ca".into(),
            token_issuer: DEFAULT_TOKEN_ISSUER.into(),
            trusted_node_accounts: [object("istio-system/culvert")].into(),
            server_names: vec![SERVER_NAME.into(), "127.0.0.1".into()],
            root_cert_out: Some(self.path("root.pem")),
            cert_ttl: Duration::from_secs(24 * 3600),
            max_cert_ttl: Duration::from_secs(90 * 24 * 3600),
        }
    }

    pub(crate) async fn start_ca(&self, config: Config) -> Running {
        self.start_ca_at(config, Clock::default()).await
    }

    pub(crate) async fn start_ca_at(&self, config: Config, clock: Clock) -> Running {
        let server = Server::bind_with_clock(config, self.cluster.subscribe(), clock).await.expect("start");
        let address = server.local_addr().expect("bound");
        let (stop, stopped) = oneshot::channel::<()>();
        let task = tokio::spawn(async move {
            server.serve(async { drop(stopped.await) }).await.expect("serve");
        });
        Running { address, stop, task }
    }

    pub(crate) fn agent_config(&self, ca: SocketAddr) -> identity::Config {
        identity::Config {
            source: Source::Ca(CaConfig {
                address: ca.to_string(),
                root_file: self.path("root.pem"),
                server_name: SERVER_NAME.into(),
                token_file: self.path("token"),
                cluster_id: "Kubernetes".into(),
                ttl: Duration::from_secs(24 * 3600),
            }),
            trust_domain: TrustDomain::default(),
            trust_domain_aliases: Vec::new(),
        }
    }
}

/// A task that is stopped and awaited by [`Running::stop`].
pub(crate) struct Running {
    /// Where a CA listens; unspecified for an agent.
    pub(crate) address: SocketAddr,
    stop: oneshot::Sender<()>,
    task: JoinHandle<()>,
}

impl Running {
    pub(crate) async fn stop(self) {
        drop(self.stop);
        self.task.await.expect("ended without a panic");
    }
}

/// An agent's identities with their task.
pub(crate) fn start_agent(config: identity::Config, clock: Clock, want: &[SpiffeId]) -> (Identities, Running) {
    let (identities, renewal) = Identities::with_clock(config, clock).expect("start");
    identities.want(&want.iter().cloned().collect());
    let (stop, stopped) = oneshot::channel::<()>();
    let task = tokio::spawn(renewal.run(async { drop(stopped.await) }));
    (identities, Running { address: ([0, 0, 0, 0], 0).into(), stop, task })
}

/// One request as a client would send it, whatever is in it.
pub(crate) async fn call(
    ca: SocketAddr,
    root: &str,
    token: Option<&str>,
    request: CertificateRequest,
) -> Result<CertificateResponse, Status> {
    let tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(root)).domain_name(SERVER_NAME);
    let channel = Endpoint::from_shared(format!("https://{ca}"))
        .expect("an address")
        .tls_config(tls)
        .expect("TLS")
        .connect()
        .await
        .expect("connect");
    let mut grpc = tonic::client::Grpc::new(channel);
    grpc.ready().await.expect("ready");
    let mut request = tonic::Request::new(request);
    if let Some(token) = token {
        request.metadata_mut().insert("authorization", format!("Bearer {token}").parse().expect("header"));
    }
    let codec = ProstCodec::<CertificateRequest, CertificateResponse>::default();
    grpc.unary(request, PathAndQuery::from_static(wire::CREATE_CERTIFICATE), codec).await.map(|r| r.into_inner())
}
