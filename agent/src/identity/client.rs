//! The client of Istio's certificate API (specification §4): makes a key, asks, and hands back what came. How it reaches
//! its server, and shows who we are, is in [`Dialer`], which asks other servers of the mesh as well.
//!
//! When to ask, and whether to believe the answer, is decided by its callers.

use std::{
    io,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    time::Duration,
};

use anyhow::{Context, bail};
use hyper_util::rt::TokioIo;
use rcgen::{CertificateParams, DistinguishedName, KeyPair, PKCS_ECDSA_P256_SHA256, SanType};
use rustls::pki_types::PrivatePkcs8KeyDer;
use tokio::net::TcpStream;
use tonic::{
    Request, Status,
    client::Grpc,
    codegen::http::uri::PathAndQuery,
    metadata::MetadataValue,
    transport::{Certificate as PemCertificate, Channel, ClientTlsConfig, Endpoint},
};
use tonic_prost::ProstCodec;
use tower::service_fn;

use super::{
    certificate::{Answer, certificates},
    wire::{self, CertificateRequest, CertificateResponse},
};
use crate::{dns, model::SpiffeId};

/// How long connecting to a server may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long one request may take, connecting included.
pub(super) const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

/// Where the CA is and how we show who we are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CaConfig {
    /// `host:port`, IPv6 in brackets. Istio's is `istiod.istio-system.svc:15012`.
    pub address: String,
    /// PEM file with the roots that the CA's own server certificate chains to; Istio publishes it in ConfigMap
    /// `istio-ca-root-cert`, key `root-cert.pem`. Read anew for each connection.
    pub root_file: PathBuf,
    /// DNS name that the CA's server certificate must have; default `istiod.istio-system.svc`.
    pub server_name: String,
    /// File with the projected service account token, audience `istio-ca`. Read anew for each request.
    pub token_file: PathBuf,
    /// Sent as `clusterid`; default `Kubernetes`.
    pub cluster_id: String,
    /// Lifetime that we ask for; the CA may give less. Default 24 h.
    pub ttl: Duration,
}

/// Why no answer came.
pub(crate) struct Failed {
    pub(crate) error: anyhow::Error,
    /// The server did not answer at all, so whatever else is asked of it fails for the same reason.
    pub(crate) unreachable: bool,
    /// What it answered, if it did, and that was a refusal.
    pub(crate) status: Option<Box<Status>>,
}

/// Port of Istio's CA, where the address names none.
const DEFAULT_PORT: u16 = 15012;

impl From<anyhow::Error> for Failed {
    fn from(error: anyhow::Error) -> Self {
        Self { error, unreachable: false, status: None }
    }
}

/// A server of the mesh's own: how it proves who it is, and how we do.
pub(crate) struct Server {
    /// What errors call it: `the CA`.
    pub(crate) name: &'static str,
    /// `host:port`, IPv6 in brackets.
    pub(crate) address: String,
    /// PEM file with the roots that its certificate chains to. Read anew for each request.
    pub(crate) root_file: PathBuf,
    /// DNS name that its certificate must have.
    pub(crate) server_name: String,
    /// File with the service account token that it knows us by. Read anew for each request.
    pub(crate) token_file: PathBuf,
}

/// Asks a [`Server`], and keeps the connection until it is told otherwise or the roots change.
pub(crate) struct Dialer {
    server: Server,
    /// The connection with the root PEM that it was verified by.
    channel: Mutex<Option<(Vec<u8>, Channel)>>,
}

impl Dialer {
    pub(crate) fn new(server: Server) -> Self {
        Self { server, channel: Mutex::new(None) }
    }

    /// Drops the connection; the next request makes another.
    pub(crate) fn disconnect(&self) {
        *self.channel.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// What the file has by which it is trusted.
    pub(super) async fn roots(&self) -> anyhow::Result<Vec<u8>> {
        read(&self.server.root_file, &format!("root certificates of {}", self.server.name)).await
    }

    async fn channel(&self) -> anyhow::Result<Channel> {
        let Server { name, address, root_file, server_name, .. } = &self.server;
        let roots = self.roots().await?;
        let mut slot = self.channel.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((pem, channel)) = &*slot
            && *pem == roots
        {
            return Ok(channel.clone());
        }
        certificates(&roots).with_context(|| format!("root certificates of {name} in {}", root_file.display()))?;
        let tls =
            ClientTlsConfig::new().ca_certificate(PemCertificate::from_pem(&roots)).domain_name(server_name.clone());
        let channel = Endpoint::from_shared(format!("https://{address}"))
            .with_context(|| format!("address of {name} {address:?}, expected host:port"))?
            .tls_config(tls)
            .with_context(|| format!("set up TLS to {name} with server name {server_name:?}"))?
            .connect_timeout(CONNECT_TIMEOUT)
            .timeout(REQUEST_TIMEOUT)
            .connect_with_connector_lazy(service_fn(connect));
        *slot = Some((roots, channel.clone()));
        Ok(channel)
    }

    /// Calls the method at `path`, with the token as it is now. No message of more than `max_message_bytes` is accepted.
    pub(crate) async fn ask<Q, A>(
        &self,
        path: &'static str,
        max_message_bytes: usize,
        request: Request<Q>,
    ) -> Result<A, Failed>
    where
        Q: prost::Message + 'static,
        A: prost::Message + Default + 'static,
    {
        let asked = self.ask_unbounded(path, max_message_bytes, request);
        let failed = match tokio::time::timeout(REQUEST_TIMEOUT, asked).await {
            Ok(Ok(answer)) => return Ok(answer),
            Ok(Err(failed)) => failed,
            Err(_) => {
                let (Server { name, address, .. }, seconds) = (&self.server, REQUEST_TIMEOUT.as_secs());
                let error = anyhow::anyhow!("{name} at {address} did not answer within {seconds} s");
                Failed { error, unreachable: true, status: None }
            }
        };
        if failed.unreachable {
            self.disconnect();
        }
        Err(failed)
    }

    async fn ask_unbounded<Q, A>(
        &self,
        path: &'static str,
        max_message_bytes: usize,
        mut request: Request<Q>,
    ) -> Result<A, Failed>
    where
        Q: prost::Message + 'static,
        A: prost::Message + Default + 'static,
    {
        let Server { name, address, token_file, .. } = &self.server;
        let token = read(token_file, "service account token").await?;
        let token = String::from_utf8(token).map_err(|_| anyhow::anyhow!("the service account token is not text"))?;
        let mut authorization: MetadataValue<_> = format!("Bearer {}", token.trim())
            .parse()
            .map_err(|_| anyhow::anyhow!("the service account token has characters that a header cannot carry"))?;
        authorization.set_sensitive(true);
        request.metadata_mut().insert("authorization", authorization);

        let mut grpc = Grpc::new(self.channel().await?).max_decoding_message_size(max_message_bytes);
        let unreachable = |error: String| Failed {
            error: anyhow::anyhow!("no connection to {name} at {address}: {error}"),
            unreachable: true,
            status: None,
        };
        grpc.ready().await.map_err(|error| unreachable(causes(&error)))?;
        let answer = grpc.unary(request, PathAndQuery::from_static(path), ProstCodec::<Q, A>::default()).await;
        match answer {
            Ok(answer) => Ok(answer.into_inner()),
            Err(status) if std::error::Error::source(&status).is_some() => Err(unreachable(causes(&status))),
            Err(status) => Err(Failed {
                unreachable: status.code() == tonic::Code::Unavailable,
                error: anyhow::anyhow!("{name} at {address} answered {:?}: {}", status.code(), status.message()),
                status: Some(Box::new(status)),
            }),
        }
    }
}

/// The client of the CA.
pub(super) struct CaClient {
    dialer: Dialer,
    cluster_id: String,
    ttl: Duration,
}

impl CaClient {
    /// The roots by which the CA is trusted, as their file has them.
    pub(super) async fn roots(&self) -> anyhow::Result<Vec<u8>> {
        self.dialer.roots().await
    }

    pub(super) fn new(config: CaConfig) -> Self {
        let CaConfig { address, root_file, server_name, token_file, cluster_id, ttl } = config;
        let server = Server { name: "the CA", address, root_file, server_name, token_file };
        Self { dialer: Dialer::new(server), cluster_id, ttl }
    }

    /// Drops the connection; the next request makes another.
    pub(super) fn disconnect(&self) {
        self.dialer.disconnect();
    }

    /// Asks for a certificate for `identity` with a fresh key.
    pub(super) async fn request(&self, identity: &SpiffeId) -> Result<Answer, Failed> {
        let (key, csr) = signing_request(identity)?;
        let mut request = Request::new(CertificateRequest {
            csr,
            validity_duration: i64::try_from(self.ttl.as_secs()).unwrap_or(i64::MAX),
            metadata: Some(wire::impersonate(&identity.to_string())),
        });
        let cluster = self.cluster_id.parse().map_err(|_| {
            anyhow::anyhow!("cluster id {:?} has characters that a header cannot carry", self.cluster_id)
        })?;
        request.metadata_mut().insert(wire::CLUSTER_ID, cluster);
        let response = self.dialer.ask(wire::CREATE_CERTIFICATE, wire::MAX_MESSAGE_BYTES, request).await?;
        Ok(answer(response, key)?)
    }
}

/// A connection to the host of a server's address, by whichever of its addresses answers first.
async fn connect(uri: http::Uri) -> io::Result<TokioIo<TcpStream>> {
    let host = uri.host().unwrap_or_default().trim_matches(['[', ']']);
    let addresses = dns::addresses(host, uri.port_u16().unwrap_or(DEFAULT_PORT)).await.map_err(io::Error::other)?;
    TcpStream::connect(addresses.as_slice()).await.map(TokioIo::new)
}

async fn read(path: &Path, what: &str) -> anyhow::Result<Vec<u8>> {
    tokio::fs::read(path).await.with_context(|| format!("read the {what} from {}", path.display()))
}

/// An error with its causes, since the outermost of a transport says little; one that only repeats a later one is left out.
fn causes(error: &(dyn std::error::Error + 'static)) -> String {
    let mut texts: Vec<String> = Vec::new();
    let mut next = Some(error);
    while let Some(error) = next {
        let text = error.to_string();
        texts.retain(|earlier| !earlier.contains(&text));
        texts.push(text);
        next = error.source();
    }
    texts.join(": ")
}

/// A fresh P-256 key and the PEM PKCS#10 for it: one URI SAN, no subject.
pub(super) fn signing_request(identity: &SpiffeId) -> anyhow::Result<(KeyPair, String)> {
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).context("make a key")?;
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    let uri = identity.to_string().try_into().with_context(|| format!("identity {identity} cannot stand in a SAN"))?;
    params.subject_alt_names = vec![SanType::URI(uri)];
    let csr = params.serialize_request(&key).and_then(|csr| csr.pem()).context("make a signing request")?;
    Ok((key, csr))
}

/// Takes the response apart: leaf and intermediates, then all roots in the last element.
fn answer(response: CertificateResponse, key: KeyPair) -> anyhow::Result<Answer> {
    let Some((roots, chain)) = response.cert_chain.split_last() else { bail!("the CA's answer is empty") };
    if chain.is_empty() {
        bail!("the CA's answer has one element, expected a certificate and the roots");
    }
    let roots = certificates(roots.as_bytes()).context("roots in the CA's answer")?;
    let mut ders = Vec::new();
    for element in chain {
        ders.extend(certificates(element.as_bytes()).context("certificate chain in the CA's answer")?);
    }
    Ok(Answer { chain: ders, key: PrivatePkcs8KeyDer::from(key.serialize_der()).into(), roots })
}

#[cfg(test)]
mod tests {
    use prost::Message as _;

    use super::*;
    use crate::identity::{Certificate, Clock, tests::Forge, trust::Leaf};

    const WANTED: &str = "spiffe://cluster.local/ns/default/sa/web";

    /// [I.5]: whatever bytes the CA answers, they are refused with one line, or a certificate for the identity that was asked
    /// for. In seeds, `@leaf@`, `@other@` and `@root@` stand for certificates that this run has made.
    #[test]
    fn fuzzed_ca_answers_are_refused_or_right() {
        let wanted: SpiffeId = WANTED.parse().expect("an identity");
        let forge = Forge::new();
        let (key, _) = signing_request(&wanted).expect("a key");
        let leaf = forge.leaf_of(WANTED, &key);
        let other = forge.leaf_of("spiffe://cluster.local/ns/default/sa/other", &key);
        let made = [("@leaf@", leaf.pem()), ("@other@", other.pem()), ("@root@", forge.pem.clone())];
        let now = Clock::default().unix_seconds();
        let taken = std::cell::Cell::new(0);
        crate::fuzz::run("ca-answer", |bytes| {
            let Ok(mut response) = CertificateResponse::decode(bytes) else { return };
            for element in &mut response.cert_chain {
                for (name, pem) in &made {
                    *element = element.replace(name, pem);
                }
            }
            let key = KeyPair::try_from(key.serialize_der()).expect("our own key");
            let checked = answer(response, key).and_then(|answer| {
                assert!(!answer.chain.is_empty() && !answer.roots.is_empty());
                Certificate::check(&wanted, answer, now)
            });
            match checked {
                Ok((certificate, _)) => {
                    let own = Leaf::parse(certificate.leaf().expect("a leaf")).expect("read before");
                    assert_eq!(own.uris, [WANTED]);
                    taken.set(taken.get() + 1);
                }
                Err(error) => assert!(!format!("{error:#}").is_empty()),
            }
        });
        assert!(taken.get() > 0, "a seed is right");
    }
}
