//! From a running CA to handshakes between two identities, over loopback TCP.

use std::{
    fs, io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};

use rcgen::{
    BasicConstraints, Certificate, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, SanType,
};
use rustls::{
    ClientConfig, ProtocolVersion, ServerConfig,
    pki_types::{CertificateDer, PrivatePkcs8KeyDer, ServerName},
    sign::{CertifiedKey, SingleCertAndKey},
};
use time::OffsetDateTime;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};
use tokio_rustls::{TlsAcceptor, TlsConnector, client, server};

use super::*;
use crate::{
    ca::testkit::{Lab, Running, claims, id, start_agent},
    model::Cluster,
};

/// A clock that tests set forward.
#[derive(Clone, Default)]
struct Ahead(Arc<AtomicU64>);

impl Ahead {
    fn clock(&self) -> Clock {
        let ahead = self.0.clone();
        Clock::new(move || SystemTime::now() + Duration::from_secs(ahead.load(Ordering::Relaxed)))
    }

    fn set(&self, by: Duration) {
        self.0.store(by.as_secs(), Ordering::Relaxed);
    }
}

type Ends = (io::Result<client::TlsStream<TcpStream>>, io::Result<server::TlsStream<TcpStream>>);

/// A handshake with one byte each way, since a client of TLS 1.3 learns of its refusal only when it reads.
async fn connect(client: Arc<ClientConfig>, server: Arc<ServerConfig>) -> Ends {
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("bind");
    let address = listener.local_addr().expect("bound");
    // A name, so that SNI could be sent; it is in no certificate, so that checking it would fail.
    let name = ServerName::try_from("in.no.certificate").expect("a name");
    let client = async {
        let tcp = TcpStream::connect(address).await?;
        let mut tls = TlsConnector::from(client).connect(name, tcp).await?;
        tls.write_all(b"c").await?;
        tls.read_u8().await?;
        Ok(tls)
    };
    let server = async {
        let (tcp, _) = listener.accept().await?;
        let mut tls = TlsAcceptor::from(server).accept(tcp).await?;
        tls.read_u8().await?;
        tls.write_all(b"s").await?;
        tls.flush().await?;
        Ok(tls)
    };
    tokio::time::timeout(Duration::from_secs(10), async { tokio::join!(client, server) }).await.expect("in time")
}

fn refusal<T>(result: io::Result<T>) -> Refusal {
    let error = result.err().expect("refused");
    Refusal::of(&error).unwrap_or_else(|| panic!("no refusal in {error:?}"))
}

fn identity_of(certs: Option<&[CertificateDer<'_>]>) -> SpiffeId {
    peer_identity(certs.expect("a certificate")).expect("an identity")
}

async fn echo(client: &mut client::TlsStream<TcpStream>, server: &mut server::TlsStream<TcpStream>) {
    client.write_all(b"x").await.expect("write");
    client.flush().await.expect("flush");
    assert_eq!(server.read_u8().await.expect("read"), b'x');
}

struct Setup {
    lab: Lab,
    ca: Running,
    identities: Identities,
    agent: Running,
    ahead: Ahead,
}

impl Setup {
    async fn new() -> Self {
        Self::with(|_| {}, |_| {}).await
    }

    async fn with(ca: impl FnOnce(&mut crate::ca::Config), agent: impl FnOnce(&mut Config)) -> Self {
        let lab = Lab::new();
        let mut config = lab.config();
        ca(&mut config);
        let ca = lab.start_ca(config).await;
        let mut config = lab.agent_config(ca.address);
        agent(&mut config);
        let ahead = Ahead::default();
        let (identities, agent) = start_agent(config, ahead.clock(), &[id("default/web"), id("test/client")]);
        Self { lab, ca, identities, agent, ahead }
    }

    async fn client(&self, expected: &str) -> Arc<ClientConfig> {
        self.identities.client_config(&id("test/client"), &[id(expected)]).await.expect("a certificate")
    }

    async fn server(&self) -> Arc<ServerConfig> {
        self.identities.server_config(&id("default/web")).await.expect("a certificate")
    }

    async fn stop(self) {
        self.agent.stop().await;
        self.ca.stop().await;
    }
}

/// [I.8], [I.9], specification §14.1
#[tokio::test]
async fn two_identities_meet_in_tls_13_and_know_each_other() {
    let setup = Setup::new().await;
    let (client, server) = connect(setup.client("default/web").await, setup.server().await).await;
    let (client, server) = (client.expect("client end"), server.expect("server end"));
    let (client, server) = (client.get_ref().1, server.get_ref().1);
    assert_eq!(identity_of(client.peer_certificates()), id("default/web"));
    assert_eq!(identity_of(server.peer_certificates()), id("test/client"));
    assert_eq!(client.protocol_version(), Some(ProtocolVersion::TLSv1_3));
    assert_eq!((client.alpn_protocol(), server.alpn_protocol()), (Some(&b"h2"[..]), Some(&b"h2"[..])));
    assert_eq!(server.server_name(), None, "no SNI");
    assert_eq!(client.tls13_tickets_received(), 0, "no resumption");
    setup.stop().await;
}

/// One look-up per connection: the same configuration until the certificate changes.
#[tokio::test]
async fn configurations_are_made_once_per_certificate() {
    let setup = Setup::new().await;
    assert!(Arc::ptr_eq(&setup.server().await, &setup.server().await));
    let (first, other) = (setup.client("default/web").await, setup.client("default/other").await);
    assert!(Arc::ptr_eq(&first, &setup.client("default/web").await));
    assert!(!Arc::ptr_eq(&first, &other));
    let none = setup.identities.client_config(&id("test/client"), &[]).await;
    assert!(none.is_err(), "expecting nobody accepts nobody");
    setup.stop().await;
}

/// [I.9], [I.10]
#[tokio::test]
async fn server_with_another_identity_is_refused_by_the_client() {
    let setup = Setup::new().await;
    let (client, server) = connect(setup.client("default/other").await, setup.server().await).await;
    let expected =
        Refusal::UnexpectedIdentity { found: vec![id("default/web").to_string()], expected: vec![id("default/other")] };
    assert_eq!(refusal(client), expected);
    assert!(server.is_err());
    setup.stop().await;
}

/// [I.8]
#[tokio::test]
async fn client_without_certificate_is_refused() {
    let setup = Setup::new().await;
    let mut bare = ClientConfig::clone(&*setup.client("default/web").await);
    bare.client_auth_cert_resolver = Arc::new(NoCertificate);
    let (client, server) = connect(Arc::new(bare), setup.server().await).await;
    assert_eq!(refusal(server), Refusal::NoCertificate);
    assert!(client.is_err());
    setup.stop().await;
}

#[derive(Debug)]
struct NoCertificate;

impl rustls::client::ResolvesClientCert for NoCertificate {
    fn resolve(&self, _: &[&[u8]], _: &[rustls::SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        None
    }

    fn has_certs(&self) -> bool {
        false
    }
}

/// [I.7]
#[tokio::test]
async fn agent_comes_up_when_the_ca_does() {
    let lab = Lab::new();
    // The root must be there to be read; the CA itself is down.
    let ca = lab.start_ca(lab.config()).await;
    let address = ca.address;
    ca.stop().await;
    let (identities, agent) = start_agent(lab.agent_config(address), Clock::default(), &[id("default/web")]);
    tokio::time::timeout(Duration::from_secs(5), async {
        while identities.status()[0].failures == 0 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await
    .expect("fails soon");
    let status = identities.status().remove(0);
    assert_eq!((status.state, status.serial), (State::Waiting, None));
    assert!(status.last_error.expect("an error").contains("no connection to the CA at 127.0.0.1"));
    let ca = lab.start_ca(crate::ca::Config { listen: address, ..lab.config() }).await;
    identities.server_config(&id("default/web")).await.expect("the first pauses are short");
    assert_eq!(identities.status()[0].state, State::Serving);
    agent.stop().await;
    ca.stop().await;
}

/// Neither token nor certificate goes to a server that the configured root does not vouch for, or that has another name.
#[tokio::test]
async fn impostor_of_the_ca_is_refused() {
    let (lab, other) = (Lab::new(), Lab::new());
    let (ca, other_ca) = (lab.start_ca(lab.config()).await, other.start_ca(other.config()).await);
    let mut misnamed = lab.agent_config(ca.address);
    let Source::Ca(config) = &mut misnamed.source else { panic!("a CA") };
    config.server_name = "another.istio-system.svc".into();
    for config in [lab.agent_config(other_ca.address), misnamed] {
        let (identities, agent) = start_agent(config, Clock::default(), &[id("default/web")]);
        until("fails", || identities.status()[0].failures > 0).await;
        let error = identities.status()[0].last_error.clone().expect("an error");
        assert!(error.contains("invalid peer certificate"), "{error}");
        agent.stop().await;
    }
    ca.stop().await;
    other_ca.stop().await;
}

/// Projected tokens are replaced while the agent runs.
#[tokio::test]
async fn token_is_read_for_each_request() {
    let lab = Lab::new();
    let ca = lab.start_ca(lab.config()).await;
    let mut old = claims("node-a");
    old["exp"] = 1_000_000_000.into();
    lab.write_token(&old);
    let (identities, agent) = start_agent(lab.agent_config(ca.address), Clock::default(), &[id("default/web")]);
    until("refused", || identities.status()[0].failures > 0).await;
    let error = identities.status()[0].last_error.clone().expect("an error");
    assert!(error.contains("Unauthenticated: the token is not accepted"), "{error}");
    lab.write_token(&claims("node-a"));
    identities.server_config(&id("default/web")).await.expect("the new token is good");
    agent.stop().await;
    ca.stop().await;
}

/// A CA of its own for certificates that ours would not make.
pub(super) struct Forge {
    issuer: Issuer<'static, KeyPair>,
    pub(super) pem: String,
}

impl Forge {
    pub(super) fn new() -> Self {
        Self::with(|_| {})
    }

    fn with(edit: impl FnOnce(&mut CertificateParams)) -> Self {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::default();
        edit(&mut params);
        params.distinguished_name.push(DnType::CommonName, format!("forge {:x}", rand::random::<u64>()));
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let pem = params.self_signed(&key).expect("signed").pem();
        Self { issuer: Issuer::new(params, key), pem }
    }

    fn lasting(ttl: Duration) -> Self {
        Self::with(|params| params.not_after = OffsetDateTime::now_utc() + ttl)
    }

    /// With the key of a running CA.
    pub(super) fn of(lab: &Lab) -> Self {
        let read = |name: &str| fs::read_to_string(lab.path("ca").join(name)).expect("made by the CA");
        let pem = read("ca-cert.pem");
        let key = KeyPair::from_pem(&read("ca-key.pem")).expect("a key");
        Self { issuer: Issuer::from_ca_cert_pem(&pem, key).expect("a CA"), pem }
    }

    /// A good leaf for an identity and a key.
    pub(super) fn leaf_of(&self, identity: &str, key: &KeyPair) -> Certificate {
        let params = leaf_params(|params| params.subject_alt_names = vec![uri(identity)]);
        params.signed_by(key, &self.issuer).expect("signed")
    }

    pub(super) fn leaf(&self, edit: impl FnOnce(&mut CertificateParams)) -> (Certificate, KeyPair) {
        let key = KeyPair::generate().expect("a key");
        let params = leaf_params(edit);
        (params.signed_by(&key, &self.issuer).expect("signed"), key)
    }
}

/// A good leaf for `test/client`, then what the test wants of it.
fn leaf_params(edit: impl FnOnce(&mut CertificateParams)) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.subject_alt_names = vec![uri("spiffe://cluster.local/ns/test/sa/client")];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
    params.not_before = OffsetDateTime::now_utc() - Duration::from_secs(60);
    params.not_after = OffsetDateTime::now_utc() + Duration::from_secs(3600);
    edit(&mut params);
    params
}

fn uri(text: &str) -> SanType {
    SanType::URI(text.try_into().expect("ASCII"))
}

fn certified(leaf: &Certificate, key: &KeyPair) -> Arc<SingleCertAndKey> {
    let key = PrivatePkcs8KeyDer::from(key.serialize_der()).into();
    let certified = CertifiedKey::from_der(vec![leaf.der().clone()], key, &provider()).expect("a pair");
    Arc::new(SingleCertAndKey::from(certified))
}

/// [I.8], [I.9]: what each end says to certificates that it must not take.
#[tokio::test]
async fn forged_certificates_are_refused_with_their_reason() {
    let setup = Setup::new().await;
    let (ours, foreign) = (Forge::of(&setup.lab), Forge::new());
    let foreign_id = |uri: &str| Refusal::UntrustedTrustDomain(uri.parse().expect("valid"));
    let self_signed = {
        let key = KeyPair::generate().expect("a key");
        (leaf_params(|_| {}).self_signed(&key).expect("signed"), key)
    };
    let evil = "spiffe://evil.example/ns/test/sa/client";
    // Certificate and what the server, then the client (which expects test/client), says to it; None = taken.
    let cases = [
        ("good", ours.leaf(|_| {}), None, None),
        ("self-signed", self_signed, Some(Refusal::UntrustedIssuer), Some(Refusal::UntrustedIssuer)),
        ("other root", foreign.leaf(|_| {}), Some(Refusal::UntrustedIssuer), Some(Refusal::UntrustedIssuer)),
        (
            "expired",
            ours.leaf(|p| p.not_after = OffsetDateTime::now_utc() - Duration::from_secs(5)),
            Some(Refusal::Expired),
            Some(Refusal::Expired),
        ),
        (
            "of tomorrow",
            ours.leaf(|p| p.not_before = OffsetDateTime::now_utc() + Duration::from_secs(600)),
            Some(Refusal::NotYetValid),
            Some(Refusal::NotYetValid),
        ),
        (
            "DNS name only",
            ours.leaf(|p| p.subject_alt_names = vec![SanType::DnsName("client.test.svc".try_into().expect("ASCII"))]),
            Some(Refusal::NoSpiffeId),
            Some(Refusal::NoSpiffeId),
        ),
        (
            "another form of SPIFFE ID first",
            ours.leaf(|p| p.subject_alt_names.insert(0, uri("spiffe://cluster.local/vm/7"))),
            Some(Refusal::MalformedSpiffeId("spiffe://cluster.local/vm/7".into())),
            None,
        ),
        (
            "other trust domain",
            ours.leaf(|p| p.subject_alt_names = vec![uri(evil)]),
            Some(foreign_id(evil)),
            Some(Refusal::UnexpectedIdentity { found: vec![evil.into()], expected: vec![id("test/client")] }),
        ),
        (
            "other trust domain first",
            ours.leaf(|p| p.subject_alt_names.insert(0, uri(evil))),
            Some(foreign_id(evil)),
            // [I.9]: at least one SAN equals.
            None,
        ),
        (
            "serverAuth only",
            ours.leaf(|p| p.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth]),
            Some(Refusal::WrongPurpose),
            None,
        ),
        (
            "clientAuth only",
            ours.leaf(|p| p.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth]),
            None,
            Some(Refusal::WrongPurpose),
        ),
        (
            "no extended key usage",
            ours.leaf(|p| p.extended_key_usages.clear()),
            Some(Refusal::WrongPurpose),
            Some(Refusal::WrongPurpose),
        ),
        (
            "a CA's",
            ours.leaf(|p| p.is_ca = IsCa::Ca(BasicConstraints::Unconstrained)),
            Some(Refusal::WrongPurpose),
            Some(Refusal::WrongPurpose),
        ),
    ];
    let (own_client, own_server) = (setup.client("default/web").await, setup.server().await);
    for (name, (leaf, key), by_server, by_client) in cases {
        let mut client = ClientConfig::clone(&*own_client);
        client.client_auth_cert_resolver = certified(&leaf, &key);
        let (_, server_end) = connect(Arc::new(client), own_server.clone()).await;
        match by_server {
            None => drop(server_end.unwrap_or_else(|error| panic!("{name}: {error}"))),
            Some(expected) => assert_eq!(refusal(server_end), expected, "{name}, seen by the server"),
        }
        let mut server = ServerConfig::clone(&*own_server);
        server.cert_resolver = certified(&leaf, &key);
        let (client_end, _) = connect(setup.client("test/client").await, Arc::new(server)).await;
        match by_client {
            None => drop(client_end.unwrap_or_else(|error| panic!("{name}: {error}"))),
            Some(expected) => assert_eq!(refusal(client_end), expected, "{name}, seen by the client"),
        }
    }
    setup.stop().await;
}

/// [I.8]: an alias counts from the moment it is configured, on a listener that is already open.
#[tokio::test]
async fn trust_domain_alias_is_accepted_once_configured() {
    let setup = Setup::new().await;
    let server = setup.server().await;
    let old: SpiffeId = "spiffe://old.example/ns/test/sa/client".parse().expect("valid");
    // The same CA, now of a mesh with another trust domain.
    let mut cluster = Cluster::clone(&setup.lab.cluster.borrow());
    cluster.mesh.trust_domain = old.trust_domain.clone();
    setup.lab.cluster.send_replace(Arc::new(cluster));
    let (other, other_agent) =
        start_agent(setup.lab.agent_config(setup.ca.address), Clock::default(), std::slice::from_ref(&old));
    let client = other.client_config(&old, &[id("default/web")]).await.expect("a certificate");

    let (client_end, server_end) = connect(client.clone(), server.clone()).await;
    assert_eq!(refusal(server_end), Refusal::UntrustedTrustDomain(old.clone()));
    assert!(client_end.is_err());
    setup.identities.set_trust_domains(TrustDomain::default(), vec![old.trust_domain.clone()]);
    let (client_end, server_end) = connect(client.clone(), server.clone()).await;
    client_end.expect("accepted");
    assert_eq!(identity_of(server_end.expect("accepted").get_ref().1.peer_certificates()), old);
    setup.identities.set_trust_domains(TrustDomain::default(), Vec::new());
    assert!(connect(client, server).await.1.is_err(), "and no longer");
    other_agent.stop().await;
    setup.stop().await;
}

/// [I.8]
#[tokio::test]
async fn peer_whose_certificate_has_expired_is_refused() {
    let setup = Setup::with(|ca| ca.max_cert_ttl = Duration::from_secs(24 * 3600), |_| {}).await;
    let client = setup.client("default/web").await;
    // A server whose own certificate is younger.
    let ours = Forge::of(&setup.lab);
    let (leaf, key) = ours.leaf(|p| {
        p.subject_alt_names = vec![uri("spiffe://cluster.local/ns/default/sa/web")];
        p.not_after = OffsetDateTime::now_utc() + Duration::from_secs(48 * 3600);
    });
    let mut server = ServerConfig::clone(&*setup.server().await);
    server.cert_resolver = certified(&leaf, &key);
    let server = Arc::new(server);
    connect(client.clone(), server.clone()).await.1.expect("still valid");
    setup.ahead.set(Duration::from_secs(25 * 3600));
    assert_eq!(refusal(connect(client, server).await.1), Refusal::Expired);
    setup.stop().await;
}

/// [I.7]: the old certificate is served until it expires; then there is a clear error, after a bounded wait ([D.4]).
#[tokio::test]
async fn old_certificate_outlives_the_ca_until_it_expires() {
    let Setup { lab: _lab, ca, identities, agent, ahead } = Setup::new().await;
    let web = id("default/web");
    identities.server_config(&web).await.expect("a certificate");
    let serial = identities.status()[0].serial.clone();
    ca.stop().await;
    ahead.set(Duration::from_secs(13 * 3600));
    identities.want(&[web.clone()].into());
    tokio::time::timeout(Duration::from_secs(5), async {
        while identities.status()[0].failures == 0 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await
    .expect("half of the life is over, so it tries");
    let status = identities.status().remove(0);
    assert_eq!((status.state, &status.serial), (State::Serving, &serial));
    identities.server_config(&web).await.expect("still valid");

    ahead.set(Duration::from_secs(24 * 3600 + 1));
    tokio::time::pause();
    let start = tokio::time::Instant::now();
    let error = identities.server_config(&web).await.expect_err("expired");
    assert!(start.elapsed() >= WAIT && start.elapsed() < WAIT + Duration::from_secs(1), "{:?}", start.elapsed());
    assert!(
        matches!(error.downcast_ref(), Some(Unavailable::Expired { identity, last_error: Some(_) }) if *identity == web)
    );
    assert!(error.to_string().contains("has expired: no connection to the CA"), "{error}");
    assert_eq!(identities.status()[0].state, State::Expired);
    agent.stop().await;
}

/// [I.3]: certificates of identities without pods are dropped, and connections of theirs are refused.
#[tokio::test]
async fn identity_is_forgotten_when_no_pod_needs_it() {
    let setup = Setup::new().await;
    setup.server().await;
    setup.identities.want(&[id("test/client")].into());
    assert_eq!(setup.identities.status().len(), 1);
    tokio::time::pause();
    let start = tokio::time::Instant::now();
    let error = setup.identities.server_config(&id("default/web")).await.expect_err("no pod");
    assert_eq!(error.downcast_ref(), Some(&Unavailable::NotWanted(id("default/web"))));
    assert_eq!(start.elapsed(), Duration::ZERO, "nobody waits for what will not come");
    tokio::time::resume();
    setup.identities.want(&[id("default/web")].into());
    setup.identities.server_config(&id("default/web")).await.expect("waits for what is wanted");
    setup.stop().await;
}

/// [I.7]: renewal at half life, and open connections do not notice.
#[tokio::test]
async fn rotation_keeps_open_connections() {
    let ttl = Duration::from_secs(4);
    let setup = Setup::with(
        |ca| {
            ca.cert_ttl = ttl;
            ca.max_cert_ttl = ttl;
        },
        |_| {},
    )
    .await;
    let old_config = setup.server().await;
    let (client, server) = connect(setup.client("default/web").await, old_config.clone()).await;
    let (mut client, mut server) = (client.expect("client end"), server.expect("server end"));
    let serial = |setup: &Setup| setup.identities.status()[0].serial.clone().expect("a certificate");
    let (first, start) = (serial(&setup), std::time::Instant::now());
    while serial(&setup) == first {
        assert!(start.elapsed() < ttl, "renewed before it expires");
        tokio::time::sleep(Duration::from_millis(20)).await;
        echo(&mut client, &mut server).await;
    }
    assert!(start.elapsed() >= Duration::from_millis(900), "and not at once");
    assert!(!Arc::ptr_eq(&old_config, &setup.server().await), "new connections use the new one");
    tokio::time::sleep((ttl + Duration::from_secs(1)).saturating_sub(start.elapsed())).await;
    echo(&mut client, &mut server).await;
    connect(setup.client("default/web").await, setup.server().await).await.1.expect("and so do others");
    setup.stop().await;
}

/// [I.5], and everything else that an answer must be.
#[test]
fn answers_that_no_peer_would_accept_are_refused() {
    let (forge, other) = (Forge::new(), Forge::new());
    let now = Clock::default().unix_seconds();
    let key_der = |key: &KeyPair| PrivatePkcs8KeyDer::from(key.serialize_der()).into();
    let root = |forge: &Forge| certificates(forge.pem.as_bytes()).expect("PEM");
    let check = |(leaf, key): (Certificate, KeyPair), roots: Vec<CertificateDer<'static>>| {
        let answer = certificate::Answer { chain: vec![leaf.der().clone()], key: key_der(&key), roots };
        super::Certificate::check(&id("test/client"), answer, now).map(|_| ()).map_err(|error| format!("{error:#}"))
    };
    assert_eq!(check(forge.leaf(|_| {}), root(&forge)), Ok(()));
    let swapped = (forge.leaf(|_| {}).0, KeyPair::generate().expect("a key"));
    let cases = [
        (
            forge.leaf(|p| p.subject_alt_names = vec![uri("spiffe://cluster.local/ns/test/sa/other")]),
            root(&forge),
            "wanted",
        ),
        (forge.leaf(|p| p.subject_alt_names.push(uri("spiffe://cluster.local/ns/a/sa/b"))), root(&forge), "wanted"),
        (forge.leaf(|p| p.subject_alt_names.clear()), root(&forge), "wanted"),
        (forge.leaf(|_| {}), root(&other), "no chain to a root|UnknownIssuer"),
        (forge.leaf(|p| p.not_after = p.not_before), root(&forge), "expired"),
        (forge.leaf(|p| p.extended_key_usages.truncate(1)), root(&forge), "server certificate"),
        (swapped, root(&forge), "key"),
        (forge.leaf(|_| {}), Vec::new(), "none of the 0 root certificates"),
    ];
    for (pair, roots, words) in cases {
        let error = check(pair, roots).expect_err(words);
        assert!(words.split('|').any(|word| error.contains(word)), "{error:?} does not say {words:?}");
    }
}

/// Roots as several PEM blocks in the last element: peers of all of them are believed.
#[tokio::test]
async fn second_root_in_the_bundle_is_trusted_too() {
    let lab = Lab::new();
    lab.start_ca(lab.config()).await.stop().await;
    let second = Forge::lasting(Duration::from_secs(3000));
    let both = format!("{}{}", lab.root(), second.pem);
    fs::write(lab.path("ca").join("root-cert.pem"), &both).expect("write");
    let ca = lab.start_ca(lab.config()).await;
    assert_eq!(lab.root(), both, "both are published");
    let ahead = Ahead::default();
    let (identities, agent) = start_agent(lab.agent_config(ca.address), ahead.clock(), &[id("default/web")]);
    let server = identities.server_config(&id("default/web")).await.expect("a certificate");
    let own = identities.client_config(&id("default/web"), &[id("default/web")]).await.expect("a certificate");
    for (forge, trusted) in [(&Forge::of(&lab), true), (&second, true), (&Forge::new(), false)] {
        let (leaf, key) = forge.leaf(|_| {});
        let mut client = ClientConfig::clone(&*own);
        client.client_auth_cert_resolver = certified(&leaf, &key);
        assert_eq!(connect(Arc::new(client), server.clone()).await.1.is_ok(), trusted);
    }
    // Its leaf is valid for longer than the root itself.
    let (leaf, key) = second.leaf(|_| {});
    let mut client = ClientConfig::clone(&*own);
    client.client_auth_cert_resolver = certified(&leaf, &key);
    ahead.set(Duration::from_secs(3100));
    assert_eq!(refusal(connect(Arc::new(client), server.clone()).await.1), Refusal::UntrustedIssuer);
    connect(own, server).await.1.expect("the other root lives on");
    agent.stop().await;
    ca.stop().await;
}

/// A folder with the layout of [`files`].
struct Folder {
    dir: tempfile::TempDir,
    forge: Forge,
}

impl Folder {
    fn new() -> Self {
        let (dir, forge) = (tempfile::tempdir().expect("a folder"), Forge::new());
        fs::write(dir.path().join("root-cert.pem"), &forge.pem).expect("write");
        Self { dir, forge }
    }

    fn put(&self, leaf: &str, key: &str) {
        let folder = self.dir.path().join("test/client");
        fs::create_dir_all(&folder).expect("create");
        fs::write(folder.join("cert-chain.pem"), leaf).expect("write");
        let staged = folder.join("staged");
        fs::write(&staged, key).expect("write");
        fs::rename(&staged, folder.join("key.pem")).expect("rename");
    }
}

async fn until(what: &str, mut reached: impl FnMut() -> bool) {
    let start = std::time::Instant::now();
    while !reached() {
        assert!(start.elapsed() < Duration::from_secs(5), "{what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// The folder is as good as a CA: found when it appears, followed when it changes, and checked.
#[tokio::test]
async fn certificates_from_a_folder_follow_its_changes() {
    let folder = Folder::new();
    let client = id("test/client");
    let config = Config {
        source: Source::Files(folder.dir.path().to_owned()),
        trust_domain: TrustDomain::default(),
        trust_domain_aliases: Vec::new(),
    };
    let (identities, agent) = start_agent(config, Clock::default(), std::slice::from_ref(&client));
    let status = || identities.status().remove(0);
    until("says what is missing", || status().last_error.is_some_and(|e| e.contains("test/client/cert-chain.pem")))
        .await;

    let (leaf, key) = folder.forge.leaf(|_| {});
    folder.put(&leaf.pem(), &key.serialize_pem());
    let server = identities.server_config(&client).await.expect("appeared");
    let (first, own) = (status().serial, identities.client_config(&client, std::slice::from_ref(&client)).await);
    connect(own.expect("appeared"), server).await.1.expect("usable");

    let (leaf, key) = folder.forge.leaf(|_| {});
    folder.put(&leaf.pem(), &key.serialize_pem());
    until("follows a change", || status().serial != first).await;
    let second = status().serial;

    let (leaf, _) = folder.forge.leaf(|_| {});
    folder.put(&leaf.pem(), &key.serialize_pem());
    until("refuses another key", || status().last_error.is_some_and(|e| e.contains("key"))).await;
    let (leaf, key) = folder.forge.leaf(|p| p.subject_alt_names = vec![uri("spiffe://cluster.local/ns/a/sa/b")]);
    folder.put(&leaf.pem(), &key.serialize_pem());
    until("refuses another identity", || status().last_error.is_some_and(|e| e.contains("wanted"))).await;
    folder.put("nothing", "nothing");
    until("refuses what is none", || status().last_error.is_some_and(|e| e.contains("no PEM block"))).await;
    assert_eq!((status().serial, status().state), (second, State::Serving), "and keeps the one before");
    identities.server_config(&client).await.expect("still served");
    agent.stop().await;
}
