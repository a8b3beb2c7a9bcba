//! The client of Istio's certificate API (specification §4): makes a key, asks, and hands back what came.
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

/// How long connecting to the CA may take.
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
pub(super) struct Failed {
    pub(super) error: anyhow::Error,
    /// The CA did not answer at all, so the other identities fail for the same reason.
    pub(super) unreachable: bool,
}

/// Port of Istio's CA, where the address names none.
const DEFAULT_PORT: u16 = 15012;

impl From<anyhow::Error> for Failed {
    fn from(error: anyhow::Error) -> Self {
        Self { error, unreachable: false }
    }
}

/// The client, and its connection while requests are under way.
pub(super) struct CaClient {
    config: CaConfig,
    /// The connection with the root PEM that it was verified by.
    channel: Mutex<Option<(Vec<u8>, Channel)>>,
}

impl CaClient {
    pub(super) fn new(config: CaConfig) -> Self {
        Self { config, channel: Mutex::new(None) }
    }

    /// Drops the connection; the next request makes another.
    pub(super) fn disconnect(&self) {
        *self.channel.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    async fn channel(&self) -> anyhow::Result<Channel> {
        let roots = read(&self.config.root_file, "root certificates of the CA").await?;
        let mut slot = self.channel.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((pem, channel)) = &*slot
            && *pem == roots
        {
            return Ok(channel.clone());
        }
        certificates(&roots)
            .with_context(|| format!("root certificates of the CA in {}", self.config.root_file.display()))?;
        let tls = ClientTlsConfig::new()
            .ca_certificate(PemCertificate::from_pem(&roots))
            .domain_name(self.config.server_name.clone());
        let channel = Endpoint::from_shared(format!("https://{}", self.config.address))
            .with_context(|| format!("address of the CA {:?}, expected host:port", self.config.address))?
            .tls_config(tls)
            .with_context(|| format!("set up TLS to the CA with server name {:?}", self.config.server_name))?
            .connect_timeout(CONNECT_TIMEOUT)
            .timeout(REQUEST_TIMEOUT)
            .connect_with_connector_lazy(service_fn(connect));
        *slot = Some((roots, channel.clone()));
        Ok(channel)
    }

    /// Asks for a certificate for `identity` with a fresh key.
    pub(super) async fn request(&self, identity: &SpiffeId) -> Result<Answer, Failed> {
        match tokio::time::timeout(REQUEST_TIMEOUT, self.request_unbounded(identity)).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(failed)) => {
                if failed.unreachable {
                    self.disconnect();
                }
                Err(failed)
            }
            Err(_) => {
                self.disconnect();
                let error = anyhow::anyhow!(
                    "the CA at {} did not answer within {} s",
                    self.config.address,
                    REQUEST_TIMEOUT.as_secs()
                );
                Err(Failed { error, unreachable: true })
            }
        }
    }

    async fn request_unbounded(&self, identity: &SpiffeId) -> Result<Answer, Failed> {
        let (key, csr) = signing_request(identity)?;
        let token = read(&self.config.token_file, "service account token").await?;
        let token = String::from_utf8(token).map_err(|_| anyhow::anyhow!("the service account token is not text"))?;
        let mut authorization: MetadataValue<_> = format!("Bearer {}", token.trim())
            .parse()
            .map_err(|_| anyhow::anyhow!("the service account token has characters that a header cannot carry"))?;
        authorization.set_sensitive(true);
        let mut request = tonic::Request::new(CertificateRequest {
            csr,
            validity_duration: i64::try_from(self.config.ttl.as_secs()).unwrap_or(i64::MAX),
            metadata: Some(wire::impersonate(&identity.to_string())),
        });
        request.metadata_mut().insert("authorization", authorization);
        let cluster = self.config.cluster_id.parse().map_err(|_| {
            anyhow::anyhow!("cluster id {:?} has characters that a header cannot carry", self.config.cluster_id)
        })?;
        request.metadata_mut().insert(wire::CLUSTER_ID, cluster);

        let mut grpc = Grpc::new(self.channel().await?).max_decoding_message_size(wire::MAX_MESSAGE_BYTES);
        let unreachable = |error: String| Failed {
            error: anyhow::anyhow!("no connection to the CA at {}: {error}", self.config.address),
            unreachable: true,
        };
        grpc.ready().await.map_err(|error| unreachable(causes(&error)))?;
        let codec = ProstCodec::<CertificateRequest, CertificateResponse>::default();
        let response = grpc.unary(request, PathAndQuery::from_static(wire::CREATE_CERTIFICATE), codec).await;
        match response {
            Ok(response) => Ok(answer(response.into_inner(), key)?),
            Err(status) if std::error::Error::source(&status).is_some() => Err(unreachable(causes(&status))),
            Err(status) => Err(Failed {
                unreachable: status.code() == tonic::Code::Unavailable,
                error: anyhow::anyhow!(
                    "the CA at {} answered {:?}: {}",
                    self.config.address,
                    status.code(),
                    status.message()
                ),
            }),
        }
    }
}

/// A connection to the host of the CA's address, by whichever of its addresses answers first.
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
