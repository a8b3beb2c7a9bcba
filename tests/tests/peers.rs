//! Peers that do not behave: the wire of HBONE, spoken by this test from inside a pod's network, with certificates that it
//! signs itself with the CA's key (specification §4, §14).

use std::fmt::Debug;
use std::fs;
use std::future::Future;
use std::io::Read as _;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use bytes::Bytes;
use culvert::identity::{self, CaConfig, Identities};
use culvert::model::{SpiffeId, TrustDomain};
use culvert_tests::programs::{Failure, HttpResult, PacedResult, Seen, ShortResult};
use culvert_tests::sandbox::{Claims, Family, MeshPlan, Node, Place, Plan, PodPlan, Sandbox, built};
use culvert_tests::{command, patience};
use h2::client::SendRequest;
use http::{Method, Request};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rcgen::{CertificateParams, CertifiedIssuer, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, SanType};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, ServerConfig, SignatureScheme};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::{TlsAcceptor, TlsConnector};

const HTTP: u16 = 9080;
const EXCHANGE: u16 = 7000;
const HBONE: u16 = 15008;
const CLIENT: &str = "spiffe://cluster.local/ns/test/sa/client";
const OUTSIDER: &str = "spiffe://cluster.local/ns/test/sa/outsider";
/// How long the agent waits for a peer's handshake.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);
/// For anything that must end by itself.
const LIMIT: Duration = Duration::from_secs(10);

/// `outsider` is where this test speaks from and `impostor` where it listens: pods whose connections nobody captures.
fn mesh(instance: &str) -> Result<Sandbox> {
    mesh_with(instance, &[])
}

fn mesh_with(instance: &str, agent_arguments: &[&str]) -> Result<Sandbox> {
    let out = |node, name: &str| PodPlan::new(node, "test", name).label("istio.io/dataplane-mode", "none");
    let plan = Plan::empty(instance)
        .pod(PodPlan::new(Node::A, "test", "client"))
        .pod(out(Node::A, "outsider"))
        .pod(out(Node::B, "impostor"))
        .pod(
            PodPlan::new(Node::B, "default", "far")
                .label("istio.io/dataplane-mode", "ambient")
                .http(&[HTTP])
                .program(&["exchange-serve", &format!("--port={EXCHANGE}")]),
        );
    let mut sandbox = Sandbox::build(plan)?;
    let mut mesh = MeshPlan::new(built("culvert")?);
    mesh.agent_arguments = agent_arguments.iter().map(|&argument| argument.to_owned()).collect();
    sandbox.start_mesh(&mesh)?;
    Ok(sandbox)
}

/// A certificate chain and its key.
type Leaf = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

/// A leaf for `uri`, signed with the CA's own key.
fn signed(sandbox: &Sandbox, uri: &str, change: impl FnOnce(&mut CertificateParams)) -> Result<Leaf> {
    let key = KeyPair::generate()?;
    let mut params = leaf(uri)?;
    change(&mut params);
    let certificate = params.signed_by(&key, &issuer(sandbox)?)?;
    Ok((vec![certificate.der().clone()], PrivateKeyDer::Pkcs8(key.serialize_der().into())))
}

/// The CA of the sandbox; it must have run.
fn issuer(sandbox: &Sandbox) -> Result<Issuer<'static, KeyPair>> {
    let read = |name: &str| fs::read_to_string(sandbox.dir().join("ca").join(name)).with_context(|| name.to_owned());
    Ok(Issuer::from_ca_cert_pem(&read("ca-cert.pem")?, KeyPair::from_pem(&read("ca-key.pem")?)?)?)
}

/// Puts a new certificate and its key where agents with `--cert-dir` look for them, each file whole by renaming.
fn put_leaf(sandbox: &Sandbox, dir: &Path, namespace: &str, account: &str) -> Result<()> {
    let folder = dir.join(namespace).join(account);
    fs::create_dir_all(&folder)?;
    let key = KeyPair::generate()?;
    let uri = format!("spiffe://cluster.local/ns/{namespace}/sa/{account}");
    let certificate = leaf(&uri)?.signed_by(&key, &issuer(sandbox)?)?;
    for (name, text) in [("key.pem", key.serialize_pem()), ("cert-chain.pem", certificate.pem())] {
        let fresh = dir.with_extension(name);
        fs::write(&fresh, text)?;
        fs::set_permissions(&fresh, fs::Permissions::from_mode(0o600))?;
        fs::rename(&fresh, folder.join(name))?;
    }
    Ok(())
}

fn self_signed(uri: &str) -> Result<Leaf> {
    let mut ca = CertificateParams::default();
    ca.is_ca = IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let ca = CertifiedIssuer::self_signed(ca, KeyPair::generate()?)?;
    let key = KeyPair::generate()?;
    let certificate = leaf(uri)?.signed_by(&key, &ca)?;
    Ok((vec![certificate.der().clone()], PrivateKeyDer::Pkcs8(key.serialize_der().into())))
}

fn leaf(uri: &str) -> Result<CertificateParams> {
    let mut params = CertificateParams::default();
    params.subject_alt_names = vec![SanType::URI(uri.try_into()?)];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    Ok(params)
}

/// Runs `work` inside a place's network, for at most [`LIMIT`].
fn inside<T: Send, F: Future<Output = Result<T>>>(place: &Place, work: impl FnOnce() -> F + Send) -> Result<T> {
    inside_for(place, LIMIT, work)
}

fn inside_for<T: Send, F: Future<Output = Result<T>>>(
    place: &Place,
    limit: Duration,
    work: impl FnOnce() -> F + Send,
) -> Result<T> {
    place.inside(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async { tokio::time::timeout(limit, work()).await.context("the peer hangs")? })
    })
}

/// Believes every server: these tests are about what the server believes.
#[derive(Debug)]
struct Credulous;

impl ServerCertVerifier for Credulous {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("TLS 1.2".into()))
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ECDSA_NISTP256_SHA256, SignatureScheme::RSA_PSS_SHA256]
    }
}

fn provider() -> Arc<rustls::crypto::CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}

async fn tls(to: SocketAddr, leaf: Option<Leaf>) -> Result<tokio_rustls::client::TlsStream<TcpStream>> {
    let builder = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Credulous));
    let mut config = match leaf {
        Some((chain, key)) => builder.with_client_auth_cert(chain, key)?,
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    let tcp = TcpStream::connect(to).await.with_context(|| format!("connect to {to}"))?;
    Ok(TlsConnector::from(Arc::new(config)).connect(ServerName::IpAddress(to.ip().into()), tcp).await?)
}

/// An HTTP/2 connection; its driver ends with it.
async fn http2(to: SocketAddr, leaf: Option<Leaf>) -> Result<SendRequest<Bytes>> {
    let (send, connection) = h2::client::handshake(tls(to, leaf).await?).await?;
    // Owned by the runtime, which ends with the test's closure.
    tokio::spawn(connection);
    Ok(send.ready().await?)
}

fn connect(authority: &str) -> Result<Request<()>> {
    Ok(Request::builder().method(Method::CONNECT).version(http::Version::HTTP_2).uri(authority).body(())?)
}

async fn status(send: &SendRequest<Bytes>, request: Request<()>) -> Result<u16> {
    let (answer, _body) = send.clone().ready().await?.send_request(request, false)?;
    Ok(answer.await?.status().as_u16())
}

/// One request of HTTP/1.1 through a CONNECT; what the server saw.
async fn seen(send: &SendRequest<Bytes>, request: Request<()>) -> Result<Seen> {
    let (answer, mut body) = send.clone().ready().await?.send_request(request, false)?;
    let answer = answer.await?;
    ensure!(answer.status() == 200, "CONNECT was answered with {}", answer.status());
    body.send_data(Bytes::from_static(b"GET / HTTP/1.1\r\nHost: far\r\nConnection: close\r\n\r\n"), true)?;
    let (mut text, mut stream) = (Vec::new(), answer.into_body());
    while let Some(data) = stream.data().await {
        text.extend_from_slice(&data?);
    }
    let text = String::from_utf8(text)?;
    let (_, json) = text.split_once("\r\n\r\n").with_context(|| format!("no HTTP answer: {text}"))?;
    serde_json::from_str(json).with_context(|| format!("the server's answer: {json}"))
}

/// Waits until the agent of node b has told a line with these fields since the last call; shows what there was instead.
fn expect_told(sandbox: &Sandbox, node: Node, from: &mut u64, fields: &[(&str, &str)]) -> Result<()> {
    let mut shown = Vec::new();
    let told = command::wait_for(&format!("the agent of {node} told {fields:?}"), Duration::from_secs(3), || {
        let (lines, next) = sandbox.agent_log(node, *from)?;
        let told = lines
            .iter()
            .any(|line| fields.iter().all(|(name, text)| line.field(name).is_some_and(|value| value.contains(text))));
        if told {
            *from = next;
        }
        shown = lines;
        Ok(told.then_some(()))
    });
    told.with_context(|| format!("it told {shown:?}"))
}

fn expect_error<T: Debug>(got: Result<T>, what: &str) -> Result<()> {
    match got {
        Ok(got) => bail!("{what} got {got:?}"),
        Err(error) if format!("{error:#}").contains("the peer hangs") => Err(error.context(what.to_owned())),
        Err(_) => Ok(()),
    }
}

/// [I.8]: a certificate is required, from our roots, of our trust domain, valid now; [I.11]: of the pod at the address, or
/// it is told.
#[test]
fn a_client_needs_a_certificate_of_this_mesh() -> Result<()> {
    let sandbox = mesh("t-client-cert")?;
    let (place, far) = (&sandbox.pod("test/outsider")?.place, sandbox.pod("default/far")?);
    let (to, target) = (far.at(Family::V4, HBONE), far.at(Family::V4, HTTP).to_string());
    let (_, mut log) = sandbox.agent_log(Node::B, 0)?;
    let past = |params: &mut CertificateParams| {
        params.not_before = rcgen::date_time_ymd(2020, 1, 1);
        params.not_after = rcgen::date_time_ymd(2021, 1, 1);
    };
    let cases = [
        ("no certificate", None, "TLS"),
        ("a foreign root", Some(self_signed(OUTSIDER)?), "TLS"),
        ("an expired certificate", Some(signed(&sandbox, OUTSIDER, past)?), "expired"),
        (
            "another trust domain",
            Some(signed(&sandbox, "spiffe://elsewhere/ns/test/sa/outsider", |_| {})?),
            "trust domain",
        ),
        ("no identity", Some(signed(&sandbox, "https://cluster.local/", |_| {})?), "TLS"),
    ];
    for (what, leaf, said) in cases {
        let got = inside(place, || async { seen(&http2(to, leaf).await?, connect(&target)?).await });
        expect_error(got, what)?;
        expect_told(&sandbox, Node::B, &mut log, &[("reason", "tls-failure"), ("error", said)])
            .with_context(|| what.to_owned())?;
    }
    // The same peer with its own certificate is served, so the cases above failed for what they say.
    let leaf = signed(&sandbox, OUTSIDER, |_| {})?;
    let got = inside(place, || async { seen(&http2(to, Some(leaf)).await?, connect(&target)?).await })?;
    ensure!(got.peer.ip() == sandbox.pod("test/outsider")?.at(Family::V4, 0).ip(), "{got:?}");
    expect_told(&sandbox, Node::B, &mut log, &[("src.identity", OUTSIDER), ("reason", "no-allow-policies")])?;
    // A certificate of another pod's account: valid, served by what it proves, and told.
    let leaf = signed(&sandbox, CLIENT, |_| {})?;
    inside(place, || async { seen(&http2(to, Some(leaf)).await?, connect(&target)?).await })?;
    let mismatch = [("reason", "identity-address-mismatch"), ("proved", CLIENT), ("known", OUTSIDER)];
    expect_told(&sandbox, Node::B, &mut log, &mismatch)
}

/// [I.11]: where the operator says so, whoever proves another identity than the pod's at the address is refused.
#[test]
fn a_certificate_of_another_pod_is_refused_where_the_operator_says_so() -> Result<()> {
    let sandbox = mesh_with("t-mismatch", &["--identity-mismatch", "refuse"])?;
    let (place, far) = (&sandbox.pod("test/outsider")?.place, sandbox.pod("default/far")?);
    let (to, target) = (far.at(Family::V4, HBONE), far.at(Family::V4, HTTP).to_string());
    let (_, mut log) = sandbox.agent_log(Node::B, 0)?;
    for (account, expected) in [(OUTSIDER, 200), (CLIENT, 401)] {
        let leaf = signed(&sandbox, account, |_| {})?;
        let got = inside(place, || async { status(&http2(to, Some(leaf)).await?, connect(&target)?).await })?;
        ensure!(got == expected, "{account}: {got}");
    }
    expect_told(
        &sandbox,
        Node::B,
        &mut log,
        &[("reason", "identity-address-mismatch"), ("src.identity", CLIENT), ("error", OUTSIDER)],
    )
}

/// Connections that a node's agent has counted as failed with a flag.
fn failed(sandbox: &Sandbox, node: Node, flag: &str) -> Result<f64> {
    let text = sandbox.metrics(node)?;
    let label = format!("response_flags=\"{flag}\"");
    let of = |line: &&str| line.starts_with("istio_tcp_connections_failed_total{") && line.contains(&label);
    let counts = text.lines().filter(of).map(|line| line.rsplit(' ').next().unwrap_or_default().parse::<f64>());
    counts.sum::<Result<f64, _>>().with_context(|| text.clone())
}

/// [I.9], [I.10], [M.2]: the server must prove the identity of the pod that was chosen; there is no plaintext instead.
#[test]
fn a_server_must_prove_the_identity_of_its_pod() -> Result<()> {
    let sandbox = mesh("t-server-cert")?;
    // By the manifests a pod of the mesh; by its UID none that the agent of its node has found.
    let file = "pod-test-impostor.yaml";
    let text = fs::read_to_string(sandbox.manifests().path().join(file))?;
    let uid = &sandbox.pod("test/impostor")?.uid;
    let text = text.replace(uid.as_str(), "00000000-0000-4000-8000-000000000001");
    let text = text.replace("istio.io/dataplane-mode: \"none\"", "istio.io/dataplane-mode: \"ambient\"");
    sandbox.manifests().apply(file, &text)?;
    let (_, mut log) = sandbox.agent_log(Node::A, 0)?;
    expect_told(&sandbox, Node::A, &mut 0, &[("message", "policy compiled")])?;
    let impostor = sandbox.pod("test/impostor")?;
    let link = sandbox.capture()?;
    let own = "spiffe://cluster.local/ns/test/sa/impostor";
    let cases = [
        ("another account's certificate", signed(&sandbox, CLIENT, |_| {})?, None, ("tls-failure", "TLS_FAILURE")),
        ("a foreign root", self_signed(own)?, None, ("tls-failure", "TLS_FAILURE")),
        ("its own certificate", signed(&sandbox, own, |_| {})?, Some(&b""[..]), ("tunnel-lost", "CONNECT")),
        // The length of a frame that nobody may send.
        (
            "its own certificate, and no HTTP/2",
            signed(&sandbox, own, |_| {})?,
            Some(&b"HTTP/1.1 400 Bad Request\r\n\r\n"[..]),
            ("h2-handshake-failure", "H2_HANDSHAKE_FAILURE"),
        ),
    ];
    for (what, (chain, key), answers, (reason, flag)) in cases {
        let accepted = answers.is_some();
        let mut config = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_no_client_auth()
            .with_single_cert(chain, key)?;
        config.alpn_protocols = vec![b"h2".to_vec()];
        let (ready, listening) = mpsc::sync_channel(1);
        let to = impostor.at(Family::V4, HTTP);
        let (shaken, got) = std::thread::scope(|scope| -> Result<_> {
            let server = scope.spawn(|| {
                inside(&impostor.place, || async {
                    let listener = TcpListener::bind(impostor.at(Family::V4, HBONE)).await?;
                    ready.send(())?;
                    let (tcp, _) = listener.accept().await?;
                    let mut tls = match TlsAcceptor::from(Arc::new(config)).accept(tcp).await {
                        Ok(tls) => tls,
                        Err(_) => return Ok(false),
                    };
                    // The client speaks HTTP/2 only to a server that it believes.
                    let mut preface = [0; 24];
                    let believed = tls.read_exact(&mut preface).await.is_ok();
                    if let Some(answer @ [_, ..]) = answers {
                        tls.write_all(answer).await?;
                        tls.flush().await?;
                        // However the client ends it: it is for the client to end.
                        let _ = tls.read_to_end(&mut Vec::new()).await;
                    }
                    Ok(believed)
                })
            });
            listening.recv()?;
            let got = sandbox.http("test/client", to, "for-the-impostor")?;
            Ok((server.join().map_err(|_| anyhow!("the server panicked"))??, got))
        })?;
        ensure!(shaken == accepted, "{what}: believed: {shaken}");
        ensure!(got.status.is_none() && got.failure != Some(Failure::TimedOut), "{what}: {got:?}");
        expect_told(&sandbox, Node::A, &mut log, &[("reason", reason), ("direction", "outbound")])
            .with_context(|| what.to_owned())?;
        command::wait_for(&format!("{what} is counted as {flag}"), LIMIT, || {
            Ok((failed(&sandbox, Node::A, flag)? >= 1.0).then_some(()))
        })?;
    }
    ensure!(!link.contains(b"for-the-impostor")?, "readable on the link");
    Ok(())
}

/// The table of specification §14.2, and [H.1], [H.2], [H.5], [K.2].
#[test]
fn a_connect_is_answered_by_the_book() -> Result<()> {
    let sandbox = mesh("t-connect")?;
    let (outsider, far) = (sandbox.pod("test/outsider")?, sandbox.pod("default/far")?);
    let leaf = || signed(&sandbox, OUTSIDER, |_| {});
    for family in [Family::V4, Family::V6] {
        let (to, leaf) = (far.at(family, HBONE), leaf()?);
        let (own, target) = (outsider.at(family, 0).ip(), far.at(family, HTTP));
        let elsewhere = sandbox.pod("test/client")?.at(family, HTTP);
        let other_family = far.at(if family == Family::V4 { Family::V6 } else { Family::V4 }, HTTP);
        inside(&outsider.place, || async {
            let send = http2(to, Some(leaf)).await?;
            let cases = [
                (connect(&elsewhere.to_string())?, 400, "an address that is another pod's"),
                (connect(&other_family.to_string())?, 400, "the pod's other address"),
                (connect("127.0.0.1:9080")?, 400, "loopback"),
                (connect("far.default.svc.cluster.local:9080")?, 503, "a name"),
                (connect(&far.at(family, 15001).to_string())?, 503, "15001"),
                (connect(&far.at(family, 15006).to_string())?, 503, "15006"),
                (connect(&far.at(family, 15008).to_string())?, 503, "15008"),
                (connect(&far.at(family, 9).to_string())?, 503, "a closed port"),
                (Request::get(format!("https://{target}/")).body(())?, 400, "GET"),
                (Request::post(format!("https://{target}/")).body(())?, 400, "POST"),
            ];
            for (request, wanted, what) in cases {
                let got = status(&send, request).await.with_context(|| what.to_owned())?;
                ensure!(got == wanted, "{what}: {got}, expected {wanted}");
            }
            let with = |forwarded: String| -> Result<Request<()>> {
                let mut request = connect(&target.to_string())?;
                request.headers_mut().insert("forwarded", forwarded.parse()?);
                Ok(request)
            };
            // A lie about the address: all of it is worth nothing.
            let got = seen(&send, with(format!("for=\"{}\"", SocketAddr::new(elsewhere.ip(), 4321)))?).await?;
            ensure!(got.peer.ip() == own && got.peer.port() != 4321, "[H.2]: the application saw {}", got.peer);
            let got = seen(&send, with(format!("for=\"{}\"", SocketAddr::new(own, 4321)))?).await?;
            ensure!(got.peer == SocketAddr::new(own, 4321), "[H.5]: the application saw {}", got.peer);
            let got = seen(&send, with("for=nonsense".to_owned())?).await?;
            ensure!(got.peer.ip() == own, "the application saw {}", got.peer);
            Ok(())
        })
        .with_context(|| format!("{family:?}"))?;
    }
    Ok(())
}

/// What is no tunnel ends at once, and what abuses one harms nobody else.
#[test]
fn garbage_and_abuse_leave_others_unharmed() -> Result<()> {
    let mut sandbox = mesh("t-abuse")?;
    let (outsider, far) = (sandbox.pod("test/outsider")?.place.clone(), sandbox.pod("default/far")?.clone());
    let (to, target) = (far.at(Family::V4, HBONE), far.at(Family::V4, HTTP).to_string());
    let (_, mut log) = sandbox.agent_log(Node::B, 0)?;
    let closed_within = |limit: Duration, bytes: &'static [u8]| {
        inside_for(&outsider, limit, || async {
            let mut tcp = TcpStream::connect(to).await?;
            tcp.write_all(bytes).await?;
            let start = Instant::now();
            // However it ends: there is an end.
            let _ = tcp.read_to_end(&mut Vec::new()).await;
            Ok(start.elapsed())
        })
    };
    for garbage in [&b"GET / HTTP/1.1\r\nHost: far\r\n\r\n"[..], &[0xff; 70_000]] {
        let took = closed_within(LIMIT * patience(), garbage)?;
        ensure!(took < Duration::from_secs(2) * patience(), "garbage was listened to for {took:?}");
        expect_told(&sandbox, Node::B, &mut log, &[("reason", "tls-failure")])?;
    }
    // Starts of records whose rest never comes, of a possible length and of an impossible one: the handshake's deadline ends
    // them at the latest, while everything else goes on.
    let began = Instant::now();
    let unfinished = inside(&outsider, || async {
        let mut begun = Vec::new();
        for start in [b"\x16\x03\x01\x02\x00\x01\x00", b"\x16\x03\x01\xff\xff\x01\x00"] {
            let mut tcp = TcpStream::connect(to).await?;
            tcp.write_all(start).await?;
            begun.push(tcp.into_std()?);
        }
        Ok(begun)
    })?;
    // Behind a good handshake: no HTTP/2.
    let leaf = signed(&sandbox, OUTSIDER, |_| {})?;
    inside(&outsider, || async {
        let mut tls = tls(to, Some(leaf)).await?;
        tls.write_all(b"GET / HTTP/1.1\r\nHost: far\r\n\r\n").await?;
        let _ = tls.read_to_end(&mut Vec::new()).await;
        Ok(())
    })?;
    expect_told(&sandbox, Node::B, &mut log, &[("reason", "h2-handshake-failure")])?;

    // Requests that are given up at once, as fast as they go, beside ordinary ones (CVE-2023-44487).
    let leaf = signed(&sandbox, OUTSIDER, |_| {})?;
    let (sent, got) = std::thread::scope(|scope| -> Result<_> {
        let abuse = scope.spawn(|| {
            inside_for(&outsider, 6 * LIMIT * patience(), || async {
                let (chain, key) = leaf;
                let mut sent = 0;
                for _ in 0..50 {
                    let send = http2(to, Some((chain.clone(), key.clone_key()))).await?;
                    // Until the server has had enough of this connection.
                    while let Ok(mut ready) = send.clone().ready().await {
                        let Ok((_answer, mut body)) = ready.send_request(connect(&target)?, false) else { break };
                        body.send_reset(h2::Reason::CANCEL);
                        sent += 1;
                        if sent % 50 == 0 {
                            // Let the connection's own task send them.
                            tokio::task::yield_now().await;
                        }
                    }
                }
                Ok(sent)
            })
        });
        let to = far.at(Family::V4, EXCHANGE).to_string();
        let got: ShortResult = sandbox.call("test/client", &["short", "--to", &to, "--count", "300"])?;
        Ok((abuse.join().map_err(|_| anyhow!("the peer panicked"))??, got))
    })?;
    println!("{sent} requests given up, beside {} connections in {} ms", got.ok, got.millis);
    ensure!(got.errors.is_empty() && got.ok == 300, "beside the abuse: {got:?}");
    sandbox.expect_running("agent-b")?;
    let got: HttpResult = sandbox.http("test/client", far.at(Family::V4, HTTP), "after")?;
    ensure!(got.status == Some(200), "{got:?}");
    for mut tcp in unfinished {
        tcp.set_nonblocking(false)?;
        tcp.set_read_timeout(Some(HANDSHAKE_LIMIT * (1 + patience())))?;
        match tcp.read_to_end(&mut Vec::new()) {
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                bail!("an unfinished handshake lasts for {:?}", began.elapsed())
            }
            // An end or a reset, perhaps after an alert.
            _ => println!("an unfinished handshake was ended within {:?}", began.elapsed()),
        }
    }
    expect_told(&sandbox, Node::B, &mut log, &[("reason", "tls-failure"), ("error", "timed out")])
}

/// One frame of HTTP/2 (RFC 9113 §4.1).
fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap_or(0).to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// What became of a connection that was misused.
#[derive(Debug, PartialEq, Eq)]
enum Misused {
    /// The server ended it.
    Ended,
    /// The server reads no more of it.
    HeldBack,
    /// Everything was taken.
    Taken,
}

/// Sends a preface and SETTINGS, `first`, and then `again` as often as it takes until the server has had enough.
async fn misuse(to: SocketAddr, leaf: Leaf, first: &[u8], again: &[u8]) -> Result<Misused> {
    const MOST: usize = 32 << 20;
    let mut tls = tls(to, Some(leaf)).await?;
    tls.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await?;
    tls.write_all(&frame(4, 0, 0, &[])).await?;
    let mut sent = 0;
    let mut next = first;
    while sent < MOST {
        match tokio::time::timeout(Duration::from_secs(5) * patience(), tls.write_all(next)).await {
            Ok(Ok(())) => sent += next.len(),
            Ok(Err(_)) => return Ok(Misused::Ended),
            Err(_) => return Ok(Misused::HeldBack),
        }
        if again.is_empty() {
            break;
        }
        next = again;
    }
    // What arrives while the server says why it ends is read and thrown away. However it ends: there is an end.
    let end = tokio::time::timeout(Duration::from_secs(5) * patience(), tls.read_to_end(&mut Vec::new())).await;
    Ok(if end.is_ok() { Misused::Ended } else { Misused::Taken })
}

/// The most of what `measure` says while `what` runs, looked at every five milliseconds, and what comes of that.
fn most_while<T>(measure: impl Fn() -> Result<u64> + Sync, what: impl FnOnce() -> Result<T>) -> Result<(u64, T)> {
    std::thread::scope(|scope| {
        // Dropped at the end, also by a panic.
        let (over, until_over) = mpsc::channel::<()>();
        let measure = &measure;
        let watch = scope.spawn(move || {
            let mut most = measure()?;
            while until_over.recv_timeout(Duration::from_millis(5)) == Err(RecvTimeoutError::Timeout) {
                most = most.max(measure()?);
            }
            Ok::<_, anyhow::Error>(most)
        });
        let done = what();
        drop(over);
        let most = watch.join().map_err(|_| anyhow!("the watch panicked"))?;
        Ok((most?, done?))
    })
}

/// Headers without end, headers that grow when they are unpacked, windows that overflow, answers that nobody reads, a preface
/// that never comes: each ends, or is read no further, in bounded memory, and harms nobody else (CVE-2024-27316 and its kin).
#[test]
fn misused_http2_is_bounded() -> Result<()> {
    /// What the agent may take for each of them, and keep of all.
    const MOST_KIB: u64 = 6 << 10;
    let sandbox = mesh("t-http2")?;
    let (outsider, far) = (sandbox.pod("test/outsider")?.place.clone(), sandbox.pod("default/far")?.clone());
    let to = far.at(Family::V4, HBONE);
    let memory = || sandbox.own_memory("agent-b");
    let neighbour = |count: &str| -> Result<ShortResult> {
        let to = far.at(Family::V4, EXCHANGE).to_string();
        sandbox.call("test/client", &["short", "--to", &to, "--count", count, "--timeout-ms", "60000"])
    };
    // The agent has served once, so what that takes is in the first figure.
    let warm = neighbour("50")?;
    ensure!(warm.ok == 50, "{warm:?}");
    let at_first = memory()?;
    let headers = |flags: u8, block: &[u8]| frame(1, flags, 1, block);
    // A field of 4000 bytes goes into the table of the peer, and is then named again and again, a byte each.
    let value = [&[0x40, 1, b'x', 0x7f, 0xa1, 0x1e][..], &[b'v'; 4000]].concat();
    let unpacked = [value, vec![0xbe; 60_000]].concat();
    let bombs: Vec<u8> = (0..100).flat_map(|nth| frame(1, 4, 1 + 2 * nth, &unpacked[..16_000])).collect();
    let overflow = [headers(4, &[]), frame(8, 0, 0, &0x7fff_ffff_u32.to_be_bytes())].concat();
    let ended: &[Misused] = &[Misused::Ended];
    let either: &[Misused] = &[Misused::Ended, Misused::HeldBack];
    type Case<'a> = (&'a str, Vec<u8>, Vec<u8>, &'a [Misused]);
    let cases: [Case<'_>; 9] = [
        ("CONTINUATION without end", headers(0, &[]), frame(9, 0, 1, &[0; 100]), ended),
        ("empty CONTINUATION without end", headers(0, &[]), frame(9, 0, 1, &[]), ended),
        ("headers that grow", bombs, Vec::new(), &[Misused::Ended, Misused::Taken]),
        ("more headers than there may be", headers(0, &[0; 16_000]), frame(9, 0, 1, &[0; 16_000]), ended),
        ("a window that overflows", overflow.clone(), frame(8, 0, 0, &0x7fff_ffff_u32.to_be_bytes()), ended),
        ("a window that does not grow", frame(8, 0, 0, &[0; 4]), Vec::new(), ended),
        ("SETTINGS whose answers nobody reads", Vec::new(), frame(4, 0, 0, &[]).repeat(100), either),
        ("PINGs whose answers nobody reads", Vec::new(), frame(6, 0, 0, &[7; 8]).repeat(100), either),
        ("empty DATA without end", headers(4, &[]), frame(0, 0, 1, &[]).repeat(100), either),
    ];
    for (what, first, again, expected) in cases {
        let leaf = signed(&sandbox, OUTSIDER, |_| {})?;
        let begin = memory()?;
        let (peak, (got, beside)) = most_while(memory, || {
            std::thread::scope(|scope| {
                let misused = scope.spawn(|| {
                    inside_for(&outsider, 6 * LIMIT * patience(), || async { misuse(to, leaf, &first, &again).await })
                });
                let beside = neighbour("50")?;
                let misused = misused.join().map_err(|_| anyhow!("the peer panicked"))??;
                // The agent hears that the peer has gone, and reads what it left behind.
                std::thread::sleep(Duration::from_millis(300) * patience());
                Ok((misused, beside))
            })
        })
        .with_context(|| what.to_owned())?;
        println!("{what}: {got:?}; {begin} KiB before, {peak} KiB at most; beside it {} ms", beside.millis);
        ensure!(expected.contains(&got), "{what}: {got:?}");
        ensure!(beside.errors.is_empty() && beside.ok == 50, "beside {what}: {beside:?}");
        ensure!(peak < begin + MOST_KIB, "{what}: {begin} KiB before, {peak} KiB at most");
    }
    // Prefaces that come a byte at a time, or not at all: many of them, while others go on.
    let leaf = signed(&sandbox, OUTSIDER, |_| {})?;
    let prefaces = || async {
        let (chain, key) = leaf;
        let mut waiting = Vec::new();
        for _ in 0..50 {
            waiting.push(tls(to, Some((chain.clone(), key.clone_key()))).await?);
        }
        let start = Instant::now();
        for (nth, mut tls) in waiting.into_iter().enumerate() {
            if nth % 2 == 0 {
                // It may have ended already.
                let _ = tls.write_all(b"P").await;
            }
            let _ = tls.read_to_end(&mut Vec::new()).await;
        }
        Ok(start.elapsed())
    };
    let before = memory()?;
    let (peak, (slow, got)) = most_while(memory, || {
        std::thread::scope(|scope| {
            let slow = scope.spawn(|| inside_for(&outsider, Duration::from_secs(90) * patience(), prefaces));
            let got = neighbour("200")?;
            Ok((slow.join().map_err(|_| anyhow!("the peer panicked"))??, got))
        })
    })?;
    ensure!(got.errors.is_empty() && got.ok == 200, "beside slow prefaces: {got:?}");
    let after = memory()?;
    println!(
        "{at_first} KiB at first, {before} before, {peak} at most, {after} KiB after; prefaces were waited for {slow:?}"
    );
    ensure!(peak < before + MOST_KIB, "{before} KiB before, {peak} KiB at most");
    ensure!(after < at_first + MOST_KIB, "{at_first} KiB at first, {after} KiB after");
    Ok(())
}

/// [E.5]: a pod that leaves the mesh tells its tunnels to take no more; what is open in them goes on, also when the last pod
/// of its identity has gone and its certificate with it.
#[test]
fn a_pod_that_leaves_ends_its_tunnels_after_their_last_stream() -> Result<()> {
    let sandbox = mesh("t-leaving")?;
    let far = sandbox.pod("default/far")?.clone();
    let (to, target) = (far.at(Family::V4, HBONE), far.at(Family::V4, HTTP).to_string());
    let leaf = signed(&sandbox, OUTSIDER, |_| {})?;
    let seen = inside(&sandbox.pod("test/outsider")?.place.clone(), || async {
        let send = http2(to, Some(leaf)).await?;
        let (answer, mut body) = send.clone().ready().await?.send_request(connect(&target)?, false)?;
        let answer = answer.await?;
        ensure!(answer.status() == 200, "CONNECT was answered with {}", answer.status());
        let manifest = fs::read_to_string(sandbox.manifests().path().join("pod-default-far.yaml"))?;
        let (inside, outside) = ("istio.io/dataplane-mode: \"ambient\"", "istio.io/dataplane-mode: \"none\"");
        ensure!(manifest.contains(inside), "{manifest}");
        sandbox.manifests().apply("pod-default-far.yaml", &manifest.replace(inside, outside))?;
        // Until GOAWAY: each is still served, and at once, or it was not begun.
        while let Ok(mut ready) = send.clone().ready().await {
            let Ok((answer, mut body)) = ready.send_request(connect(&target)?, false) else { break };
            let start = Instant::now();
            match answer.await {
                Ok(answer) => ensure!(answer.status() == 200, "while the pod leaves: {}", answer.status()),
                Err(error) => ensure!(error.is_go_away(), "while the pod leaves: {error}"),
            }
            body.send_reset(h2::Reason::CANCEL);
            ensure!(start.elapsed() < Duration::from_secs(2), "a CONNECT waited {:?}", start.elapsed());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        body.send_data(Bytes::from_static(b"GET / HTTP/1.1\r\nHost: far\r\nConnection: close\r\n\r\n"), true)?;
        let (mut text, mut stream) = (Vec::new(), answer.into_body());
        while let Some(data) = stream.data().await {
            text.extend_from_slice(&data?);
        }
        Ok(String::from_utf8(text)?)
    })?;
    ensure!(seen.starts_with("HTTP/1.1 200"), "the open stream: {seen:?}");
    Ok(())
}

/// A line there and back on a connection to an exchange server, inside a CONNECT.
async fn echo(body: &mut h2::SendStream<Bytes>, stream: &mut h2::RecvStream, text: &str) -> Result<()> {
    body.send_data(Bytes::from(text.to_owned()), false)?;
    let mut got = Vec::new();
    while got.len() < text.len() {
        got.extend_from_slice(&stream.data().await.context("the stream has ended")??);
    }
    ensure!(got == text.as_bytes(), "sent {text:?}, got {:?}", String::from_utf8_lossy(&got));
    Ok(())
}

/// [H.4]: an agent that is told to end says GOAWAY in its tunnels; what is open in them goes on, and when the last of it has
/// ended so does the agent.
#[test]
fn an_agent_that_ends_says_goaway_and_finishes_what_is_open() -> Result<()> {
    let mut sandbox = mesh_with("t-goaway", &["--drain-deadline", "60s"])?;
    let far = sandbox.pod("default/far")?.clone();
    let (to, target) = (far.at(Family::V4, HBONE), far.at(Family::V4, EXCHANGE).to_string());
    let leaf = signed(&sandbox, OUTSIDER, |_| {})?;
    let agent = Pid::from_raw(i32::try_from(sandbox.pid("agent-b")?)?);
    let place = sandbox.pod("test/outsider")?.place.clone();
    inside_for(&place, LIMIT * patience(), || async {
        let send = http2(to, Some(leaf)).await?;
        let (answer, mut body) = send.clone().ready().await?.send_request(connect(&target)?, false)?;
        let answer = answer.await?;
        ensure!(answer.status() == 200, "CONNECT was answered with {}", answer.status());
        let mut stream = answer.into_body();
        body.send_data(Bytes::from_static(b"ECHO\n"), false)?;
        echo(&mut body, &mut stream, "before the signal\n").await?;
        kill(agent, Signal::SIGTERM)?;
        // Until GOAWAY: what is asked meanwhile is answered, however. That the connection is not just lost, the open stream
        // shows.
        loop {
            let Ok(mut ready) = send.clone().ready().await else { break };
            let Ok((answer, mut body)) = ready.send_request(connect(&target)?, false) else { break };
            match answer.await {
                Ok(_) => body.send_reset(h2::Reason::CANCEL),
                Err(error) => ensure!(error.is_go_away(), "a CONNECT after the signal: {error}"),
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        for round in 0..20 {
            echo(&mut body, &mut stream, &format!("round {round} after GOAWAY\n")).await?;
        }
        body.send_data(Bytes::new(), true)?;
        while let Some(data) = stream.data().await {
            ensure!(data?.is_empty(), "bytes after the end");
        }
        Ok(())
    })?;
    let status = sandbox.wait_end("agent-b", LIMIT * patience())?;
    ensure!(status.success(), "{status}");
    Ok(())
}

/// [I.5], [I.7], [T.2]: certificates from a folder carry connections, are replaced under way, and one that is not there is
/// told and waited for; until it comes nothing is sent.
#[test]
fn certificates_from_a_folder_serve_rotate_and_are_missed() -> Result<()> {
    const MARKER: &str = "readable-if-it-leaks";
    let plan = Plan::empty("t-cert-dir").pod(PodPlan::new(Node::A, "test", "client")).pod(
        PodPlan::new(Node::B, "default", "far")
            .http(&[HTTP])
            .program(&["exchange-serve", &format!("--port={EXCHANGE}")]),
    );
    let mut sandbox = Sandbox::build(plan)?;
    let mut mesh = MeshPlan::new(built("culvert")?);
    // For its root and its key only; no agent knows of it.
    sandbox.start_ca(&mesh)?;
    sandbox.stop("ca")?;
    let dir = sandbox.dir().join("certificates");
    fs::create_dir(&dir)?;
    fs::copy(sandbox.root_certificate(), dir.join("root-cert.pem"))?;
    put_leaf(&sandbox, &dir, "test", "client")?;
    put_leaf(&sandbox, &dir, "default", "far")?;
    mesh.cert_dir = Some(dir.clone());
    for node in Node::ALL {
        sandbox.start_agent(&mesh, node)?;
    }
    for node in Node::ALL {
        sandbox.wait_ready(node)?;
    }
    let link = sandbox.capture()?;
    let far = sandbox.pod("default/far")?.clone();
    let call = |sandbox: &Sandbox| -> Result<HttpResult> {
        let to = far.at(Family::V4, HTTP).to_string();
        // A connection waits for its certificate for 5 s.
        let limit = (8000 * patience()).to_string();
        sandbox.call("test/client", &["http-get", "--to", &to, "--marker", MARKER, "--timeout-ms", &limit])
    };
    let got = call(&sandbox)?;
    ensure!(got.status == Some(200), "{got:?}");
    ensure!(link.frames_with_port(HBONE)? > 0, "no tunnel crossed the link");

    // Both ends' are replaced while connections come and go.
    let (to, until) = (far.at(Family::V4, EXCHANGE).to_string(), sandbox.dir().join("load-end"));
    let ends = until.to_str().context("a path that is text")?;
    let pace = ["paced", "--to", &to, "--rate", "50", "--timeout-ms", "20000", "--until", ends];
    sandbox.start_in_pod("load", "test/client", &pace)?;
    for _ in 0..2 {
        for (node, namespace, account) in [(Node::A, "test", "client"), (Node::B, "default", "far")] {
            let (_, mut log) = sandbox.agent_log(node, 0)?;
            put_leaf(&sandbox, &dir, namespace, account)?;
            expect_told(&sandbox, node, &mut log, &[("message", "certificate ready")])?;
        }
    }
    fs::write(&until, "")?;
    sandbox.wait_end("load", LIMIT * 3 * patience())?;
    let text = fs::read_to_string(sandbox.log_path("load"))?;
    let load: PacedResult = serde_json::from_str(text.trim()).with_context(|| text.clone())?;
    ensure!(load.errors.is_empty() && load.ok > 20, "while certificates were replaced: {load:?}");

    // One identity has nothing any more: what it has serves until it expires, and a new agent has none.
    let (_, mut log) = sandbox.agent_log(Node::A, 0)?;
    fs::remove_dir_all(dir.join("test/client"))?;
    expect_told(
        &sandbox,
        Node::A,
        &mut log,
        &[("message", "cannot get a certificate"), ("identity", CLIENT), ("error", "test/client/cert-chain.pem")],
    )?;
    let got = call(&sandbox)?;
    ensure!(got.status == Some(200), "with a certificate that is valid: {got:?}");
    sandbox.signal_agent(Node::A, Signal::SIGKILL)?;
    sandbox.start_agent(&mesh, Node::A)?;
    sandbox.wait_ready(Node::A)?;
    let got = call(&sandbox)?;
    ensure!(matches!(got.failure, Some(Failure::Refused | Failure::Reset)), "without a certificate: {got:?}");
    let missing = [("reason", "identity-error"), ("error", "test/client/cert-chain.pem")];
    expect_told(&sandbox, Node::A, &mut log, &missing)?;
    put_leaf(&sandbox, &dir, "test", "client")?;
    let got = call(&sandbox)?;
    ensure!(got.status == Some(200), "with a certificate again: {got:?}");
    ensure!(!link.contains(MARKER.as_bytes())?, "readable on the link");
    ensure!(link.frames_with_port(HTTP)? == 0, "a frame of the server's own port crossed the link");
    Ok(())
}

/// [I.4], [I.12]: what a token says is checked, and what it does not say is not given.
#[test]
fn the_ca_refuses_tokens_that_prove_nothing() -> Result<()> {
    let sandbox = mesh("t-token")?;
    let good = sandbox.agent_claims(Node::A);
    let with = |change: fn(&mut Claims)| {
        let mut claims = good.clone();
        change(&mut claims);
        claims
    };
    let cases = [
        ("its own", good.clone(), CLIENT, true),
        ("another node's", sandbox.agent_claims(Node::B), CLIENT, false),
        ("its own, for a pod of the other node", good.clone(), "spiffe://cluster.local/ns/default/sa/far", false),
        ("its own, for nobody's account", good.clone(), "spiffe://cluster.local/ns/test/sa/nobody", false),
        ("an expired", with(|claims| claims.lifetime_s = -600), CLIENT, false),
        ("another audience's", with(|claims| claims.audience = "api".to_owned()), CLIENT, false),
        ("another issuer's", with(|claims| claims.issuer = "https://elsewhere".to_owned()), CLIENT, false),
        (
            "a former pod's",
            with(|claims| claims.pod.1 = "00000000-0000-4000-8000-000000000001".to_owned()),
            CLIENT,
            false,
        ),
        ("an application's", with(|claims| claims.account.0 = "client".to_owned()), CLIENT, false),
    ];
    for (what, claims, wanted, given) in cases {
        let token = sandbox.dir().join("token-of-this-case");
        fs::write(&token, sandbox.signer().sign(&claims)?)?;
        let config = identity::Config {
            source: identity::Source::Ca(CaConfig {
                address: format!("{}:15012", Node::A.v4()),
                root_file: sandbox.root_certificate(),
                server_name: "istiod.istio-system.svc".into(),
                token_file: token,
                cluster_id: "Kubernetes".into(),
                ttl: Duration::from_secs(3600),
            }),
            trust_domain: TrustDomain::default(),
            trust_domain_aliases: Vec::new(),
        };
        let status = inside(sandbox.node_place(Node::A), || async {
            let (identities, renewal) = Identities::new(config)?;
            let wanted: SpiffeId = wanted.parse().map_err(|error| anyhow!("{wanted}: {error}"))?;
            identities.want(&[wanted].into());
            let settled = async {
                loop {
                    let status = identities.status().pop().context("one identity is wanted")?;
                    if status.last_error.is_some() || status.state == identity::State::Serving {
                        return Ok(status);
                    }
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            };
            tokio::select! {
                status = settled => status,
                () = renewal.run(std::future::pending()) => Err(anyhow!("the renewal has ended")),
            }
        })?;
        ensure!((status.state == identity::State::Serving) == given, "with {what} token: {status:?}");
        if !given {
            let error = status.last_error.as_deref().unwrap_or_default();
            ensure!(error.contains("Unauthenticated"), "with {what} token: {error}");
        }
    }
    Ok(())
}
