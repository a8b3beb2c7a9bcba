//! The certificate API byte by byte: each end of ours against a peer that shares no line with it.
//!
//! What the bytes must be is written here a second time, from `security/v1alpha1/ca.proto` of Istio's public API and from
//! specification §4: both ends of ours have their messages from one place, so that they would agree on a wrong one.

use std::sync::Arc;

use bytes::Bytes;
use http::{HeaderMap, Request, Response, StatusCode, Version};
use prost::Message as _;
use rcgen::SanType;
use rustls::{
    ClientConfig, RootCertStore, ServerConfig,
    pki_types::{PrivatePkcs8KeyDer, ServerName},
};
use tokio::{
    net::{TcpListener, TcpStream},
    task::JoinSet,
};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::*;
use crate::{
    ca::testkit::{Lab, SERVER_NAME, call, id, start_agent},
    identity::{Clock, certificates, client::signing_request, tests::Forge, trust::Leaf},
};

const WEB: &str = "spiffe://cluster.local/ns/default/sa/web";
const PATH: &str = "/istio.v1.auth.IstioCertificateService/CreateCertificate";

// Numbers of fields with their wire types: 0 is a number, 2 has a length.
const CSR: u8 = 1 << 3 | 2;
const VALIDITY_DURATION: u8 = 3 << 3;
const METADATA: u8 = 4 << 3 | 2;
const CERT_CHAIN: u8 = 1 << 3 | 2;

fn varint(mut number: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    while number >= 0x80 {
        bytes.push(number as u8 | 0x80);
        number >>= 7;
    }
    bytes.push(number as u8);
    bytes
}

/// A field that has a length.
fn field(tag: u8, content: &[u8]) -> Vec<u8> {
    [&[tag][..], &varint(content.len()), content].concat()
}

/// `google.protobuf.Struct` with one text: `fields` (1) has entries of `key` (1) and `value` (2), and a text is 3.
fn one_text(key: &str, text: &str) -> Vec<u8> {
    let value = field(3 << 3 | 2, text.as_bytes());
    field(1 << 3 | 2, &[field(1 << 3 | 2, key.as_bytes()), field(2 << 3 | 2, &value)].concat())
}

/// Every field of a message: its tag, and its content; that of a number is its bytes.
fn fields(mut message: &[u8]) -> Vec<(u8, Vec<u8>)> {
    let mut all = Vec::new();
    while let [tag, rest @ ..] = message {
        let end = rest.iter().position(|byte| byte & 0x80 == 0).expect("a number ends") + 1;
        let (number, rest) = rest.split_at(end);
        if tag & 7 == 0 {
            all.push((*tag, number.to_vec()));
            message = rest;
        } else {
            assert_eq!(tag & 7, 2, "tag {tag:#x}");
            let length = number.iter().rev().fold(0, |length, byte| length << 7 | usize::from(byte & 0x7f));
            all.push((*tag, rest[..length].to_vec()));
            message = &rest[length..];
        }
    }
    all
}

/// A message as gRPC sends it: not compressed, its length, itself.
fn framed(message: &[u8]) -> Bytes {
    let length = u32::try_from(message.len()).expect("small");
    [&[0][..], &length.to_be_bytes(), message].concat().into()
}

fn unframed(bytes: &[u8]) -> &[u8] {
    let (head, message) = bytes.split_at(5);
    assert_eq!(head, &framed(message)[..5]);
    message
}

async fn whole(body: &mut h2::RecvStream) -> (Vec<u8>, HeaderMap) {
    let mut bytes = Vec::new();
    while let Some(chunk) = body.data().await {
        let chunk = chunk.expect("a body");
        body.flow_control().release_capacity(chunk.len()).expect("room");
        bytes.extend(chunk);
    }
    (bytes, body.trailers().await.expect("trailers").unwrap_or_default())
}

/// §4, table *Requesting*.
#[test]
fn messages_have_the_bytes_of_istios() {
    let request = CertificateRequest {
        csr: "PEM".to_owned(),
        validity_duration: 86_400,
        metadata: Some(impersonate("spiffe://a/ns/b/sa/c")),
    };
    let bytes =
        b"\x0a\x03PEM\x18\x80\xa3\x05\x22\x30\x0a\x2e\x0a\x14ImpersonatedIdentity\x12\x16\x1a\x14spiffe://a/ns/b/sa/c";
    assert_eq!(request.encode_to_vec(), bytes);
    assert_eq!(CertificateRequest::decode(&bytes[..]), Ok(request));
    let response = CertificateResponse { cert_chain: vec!["LEAF".to_owned(), "ROOT".to_owned()] };
    let bytes = b"\x0a\x04LEAF\x0a\x04ROOT";
    assert_eq!(response.encode_to_vec(), bytes);
    assert_eq!(CertificateResponse::decode(&bytes[..]), Ok(response));
    // `subject_id` (2) of older versions, and what later ones may add, is passed over.
    let newer = [&b"\x12\x01x\x0a\x03PEM"[..], b"\x7a\x01y"].concat();
    assert_eq!(CertificateRequest::decode(&*newer).expect("understood").csr, "PEM");
}

/// §4: what a client of Istio's sends, our CA answers as Istio's does.
#[tokio::test]
async fn the_ca_answers_a_client_that_has_only_istios_proto() {
    let lab = Lab::new();
    let ca = lab.start_ca(lab.config()).await;
    let mut roots = RootCertStore::empty();
    for root in certificates(lab.root().as_bytes()).expect("PEM") {
        roots.add(root).expect("a root");
    }
    let mut config = ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let tcp = TcpStream::connect(ca.address).await.expect("connect");
    let name = ServerName::try_from(SERVER_NAME).expect("a name");
    let tls = TlsConnector::from(Arc::new(config)).connect(name, tcp).await.expect("TLS");
    let (send, connection) = h2::client::handshake(tls).await.expect("HTTP/2");
    let mut driver = JoinSet::new();
    driver.spawn(connection);
    let mut send = send.ready().await.expect("ready");

    let token = std::fs::read_to_string(lab.path("token")).expect("a token");
    let (_, csr) = signing_request(&id("default/web")).expect("a request");
    let hour = [&[VALIDITY_DURATION][..], &varint(3600)].concat();
    let message = [field(CSR, csr.as_bytes()), hour, field(METADATA, &one_text("ImpersonatedIdentity", WEB))].concat();
    let request = Request::post(format!("https://{SERVER_NAME}:15012{PATH}"))
        .version(Version::HTTP_2)
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .header("authorization", format!("Bearer {token}"))
        .header("clusterid", "Kubernetes")
        .body(())
        .expect("a request");
    let (response, mut body) = send.send_request(request, false).expect("sent");
    body.send_data(framed(&message), true).expect("sent");
    let mut response = response.await.expect("an answer");
    assert_eq!(response.status(), StatusCode::OK);
    assert_eq!(response.headers()["content-type"], "application/grpc");
    let (bytes, trailers) = whole(response.body_mut()).await;
    assert_eq!(trailers["grpc-status"], "0");

    let chain = fields(unframed(&bytes));
    assert!(chain.len() >= 2 && chain.iter().all(|(tag, _)| *tag == CERT_CHAIN), "{chain:?}");
    let leaf = certificates(&chain[0].1).expect("PEM");
    let leaf = Leaf::parse(&leaf[0]).expect("a certificate");
    assert_eq!(leaf.uris, [WEB]);
    let lifetime = leaf.not_after - leaf.not_before;
    assert!((3600..3600 + 180).contains(&lifetime), "asked for an hour, got {lifetime} s");
    assert_eq!(chain[chain.len() - 1].1, lab.root().as_bytes(), "the last element has the roots");
    ca.stop().await;
}

/// §4: what we send is what Istio's CA reads, and its answer is taken.
#[tokio::test]
async fn the_agent_asks_a_ca_that_has_only_istios_proto() {
    let lab = Lab::new();
    let ca = lab.start_ca(lab.config()).await;
    let named = SanType::DnsName(SERVER_NAME.try_into().expect("a name"));
    let (certificate, key) = Forge::of(&lab).leaf(|params| params.subject_alt_names = vec![named]);
    let mut config = ServerConfig::builder()
        .with_no_client_auth()
        .with_single_cert(vec![certificate.der().clone()], PrivatePkcs8KeyDer::from(key.serialize_der()).into())
        .expect("a certificate");
    config.alpn_protocols = vec![b"h2".to_vec()];
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("bind");
    let address = listener.local_addr().expect("bound");
    let (identities, agent) = start_agent(lab.agent_config(address), Clock::default(), &[id("default/web")]);

    let (tcp, _) = listener.accept().await.expect("the agent asks");
    let tls = TlsAcceptor::from(Arc::new(config)).accept(tcp).await.expect("TLS");
    let mut h2 = h2::server::handshake(tls).await.expect("HTTP/2");
    let (mut request, mut answer) = h2.accept().await.expect("one").expect("a request");
    let mut driver = JoinSet::new();
    driver.spawn(async move { while let Some(Ok(_)) = h2.accept().await {} });

    let token = std::fs::read_to_string(lab.path("token")).expect("a token");
    assert_eq!((request.method().as_str(), request.uri().path()), ("POST", PATH));
    let headers = request.headers();
    assert_eq!(headers["content-type"], "application/grpc");
    assert_eq!(headers["te"], "trailers");
    assert_eq!(headers["authorization"], format!("Bearer {token}"));
    assert_eq!(headers["clusterid"], "Kubernetes");
    let (bytes, _) = whole(request.body_mut()).await;
    let message = fields(unframed(&bytes));
    let [(CSR, csr), (VALIDITY_DURATION, day), (METADATA, metadata)] = &message[..] else { panic!("{message:?}") };
    assert!(csr.starts_with(b"-----BEGIN CERTIFICATE REQUEST-----"));
    assert_eq!(*day, varint(86_400));
    assert_eq!(*metadata, one_text("ImpersonatedIdentity", WEB));

    // Ours signs it; the answer's bytes are made here.
    let csr = String::from_utf8(csr.clone()).expect("text");
    let request = CertificateRequest { csr, validity_duration: 86_400, metadata: Some(impersonate(WEB)) };
    let signed = call(ca.address, &lab.root(), Some(&token), request).await.expect("signed").cert_chain;
    let chain: Vec<u8> = signed.iter().flat_map(|element| field(CERT_CHAIN, element.as_bytes())).collect();
    let head = Response::builder().header("content-type", "application/grpc").body(()).expect("a head");
    let mut body = answer.send_response(head, false).expect("sent");
    body.send_data(framed(&chain), false).expect("sent");
    body.send_trailers([("grpc-status".parse().expect("a name"), "0".parse().expect("a value"))].into_iter().collect())
        .expect("sent");
    identities.server_config(&id("default/web")).await.expect("the answer is taken");
    agent.stop().await;
    ca.stop().await;
}
