//! From a running CA to handshakes between two identities, over loopback TCP.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};

use rustls::{
    ClientConfig, ProtocolVersion, ServerConfig,
    pki_types::{CertificateDer, ServerName},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};
use tokio_rustls::{TlsAcceptor, TlsConnector, client, server};

use super::*;
use crate::ca::testkit::{Lab, Running, id, start_agent};

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
    let client = async {
        let tcp = TcpStream::connect(address).await?;
        let mut tls = TlsConnector::from(client).connect(ServerName::from(address.ip()), tcp).await?;
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
    fn resolve(&self, _: &[&[u8]], _: &[rustls::SignatureScheme]) -> Option<Arc<rustls::sign::CertifiedKey>> {
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
