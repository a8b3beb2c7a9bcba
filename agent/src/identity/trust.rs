//! Whom we believe: the trust bundle, our trust domains, and the two certificate checks of a tunnel ([I.8], [I.9]).
//!
//! Both checks read the bundle and the domains of the moment, so that an open listener follows a rotation of the roots.
//! What an authenticated peer may then do is policy's business.

use std::{
    error::Error,
    fmt,
    sync::{Arc, LazyLock, PoisonError, RwLock},
};

use anyhow::{Context, bail};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, OtherError, RootCertStore, SignatureScheme,
    client::{
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
        verify_server_cert_signed_by_trust_anchor,
    },
    crypto::{CryptoProvider, aws_lc_rs, verify_tls13_signature},
    pki_types::{CertificateDer, ServerName, UnixTime},
    server::{
        ParsedCertificate, WebPkiClientVerifier,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
};
use x509_parser::prelude::{FromDer, GeneralName, ParsedExtension, X509Certificate};

use super::Clock;
use crate::model::{SpiffeId, TrustDomain};

/// Why a peer's certificate was refused. For logs and metrics; the peer learns no more than a TLS alert.
///
/// `Debug` shows the words of `Display`: it is what rustls puts into the text of its own error.
#[derive(Clone, PartialEq, Eq)]
pub enum Refusal {
    /// The peer sent no certificate.
    NoCertificate,
    /// Not a certificate that can be read.
    Malformed,
    /// Its validity, or that of a certificate of its chain, has ended.
    Expired,
    /// Its validity has not begun.
    NotYetValid,
    /// No chain to a root of our trust bundle; self-signed certificates end here.
    UntrustedIssuer,
    /// A signature does not match: a forged certificate, or a peer without the key.
    BadSignature,
    /// Not for this use: clientAuth or serverAuth is missing, or it belongs to a CA.
    WrongPurpose,
    /// Refused by the chain checks for another reason.
    Unverifiable,
    /// No URI SAN with scheme `spiffe`.
    NoSpiffeId,
    /// Its first SPIFFE URI SAN is not an identity of the form [I.1].
    MalformedSpiffeId(String),
    /// An identity of a trust domain that is neither ours nor an alias ([I.8]).
    UntrustedTrustDomain(SpiffeId),
    /// The server has an identity, but not one that the caller expects ([I.9]).
    UnexpectedIdentity {
        /// The SPIFFE URI SANs of its certificate.
        found: Vec<String>,
        /// The identities that were expected.
        expected: Vec<SpiffeId>,
    },
    /// We hold no valid root yet, so nobody can be believed.
    NoTrustBundle,
}

impl Refusal {
    /// One word for metrics and access log.
    pub fn label(&self) -> &'static str {
        match self {
            Self::NoCertificate => "no-certificate",
            Self::Malformed => "malformed-certificate",
            Self::Expired => "certificate-expired",
            Self::NotYetValid => "certificate-not-yet-valid",
            Self::UntrustedIssuer => "untrusted-issuer",
            Self::BadSignature => "bad-signature",
            Self::WrongPurpose => "wrong-purpose",
            Self::Unverifiable => "unverifiable-certificate",
            Self::NoSpiffeId => "no-spiffe-id",
            Self::MalformedSpiffeId(_) => "malformed-spiffe-id",
            Self::UntrustedTrustDomain(_) => "untrusted-trust-domain",
            Self::UnexpectedIdentity { .. } => "unexpected-identity",
            Self::NoTrustBundle => "no-trust-bundle",
        }
    }

    /// Finds the refusal in an error of a handshake: a [`rustls::Error`], an [`std::io::Error`] around one, or an error
    /// that has one of them as a source. `None` if the handshake failed for another reason than the peer's certificate.
    pub fn of(error: &(dyn Error + 'static)) -> Option<Self> {
        let mut next = Some(error);
        while let Some(error) = next {
            if let Some(refusal) = error.downcast_ref::<Self>() {
                return Some(refusal.clone());
            }
            if let Some(tls) = error.downcast_ref::<rustls::Error>() {
                return Self::of_tls(tls);
            }
            // `source` of an io::Error skips the error that it wraps.
            next = match error.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref) {
                Some(inner) => Some(inner),
                None => error.source(),
            };
        }
        None
    }

    fn of_tls(error: &rustls::Error) -> Option<Self> {
        let certificate = match error {
            rustls::Error::NoCertificatesPresented => return Some(Self::NoCertificate),
            rustls::Error::InvalidCertificate(certificate) => certificate,
            _ => return None,
        };
        Some(match certificate {
            CertificateError::Other(OtherError(inner)) => {
                inner.downcast_ref::<Self>().cloned().unwrap_or(match inner.to_string().as_str() {
                    // webpki's answer to a CA that is used as a leaf has no variant of its own in rustls.
                    "CaUsedAsEndEntity" => Self::WrongPurpose,
                    _ => Self::Unverifiable,
                })
            }
            CertificateError::BadEncoding => Self::Malformed,
            CertificateError::Expired | CertificateError::ExpiredContext { .. } => Self::Expired,
            CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => Self::NotYetValid,
            CertificateError::UnknownIssuer => Self::UntrustedIssuer,
            CertificateError::BadSignature => Self::BadSignature,
            CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. } => Self::WrongPurpose,
            _ => Self::Unverifiable,
        })
    }
}

impl fmt::Debug for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoCertificate => f.write_str("the peer sent no certificate"),
            Self::Malformed => f.write_str("the peer's certificate cannot be read"),
            Self::Expired => f.write_str("the peer's certificate has expired"),
            Self::NotYetValid => f.write_str("the peer's certificate is not valid yet"),
            Self::UntrustedIssuer => f.write_str("the peer's certificate has no chain to a root of the trust bundle"),
            Self::BadSignature => f.write_str("a signature of the peer's certificate chain or handshake is wrong"),
            Self::WrongPurpose => f.write_str("the peer's certificate is not for this use"),
            Self::Unverifiable => f.write_str("the peer's certificate chain cannot be verified"),
            Self::NoSpiffeId => f.write_str("the peer's certificate has no SPIFFE identity"),
            Self::MalformedSpiffeId(found) => write!(f, "the peer's identity is malformed: {found:?}"),
            Self::UntrustedTrustDomain(found) => {
                write!(f, "the peer's identity {found} is of a trust domain that is neither ours nor an alias")
            }
            Self::UnexpectedIdentity { found, expected } => {
                write!(f, "the server's identity is {found:?}, expected ")?;
                for (i, id) in expected.iter().enumerate() {
                    write!(f, "{}{id}", if i == 0 { "" } else { " or " })?;
                }
                Ok(())
            }
            Self::NoTrustBundle => f.write_str("no valid root certificate is known yet"),
        }
    }
}

impl Error for Refusal {}

impl From<Refusal> for rustls::Error {
    fn from(refusal: Refusal) -> Self {
        Self::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(refusal))))
    }
}

/// The identity of a peer that was let in by our check: the first SPIFFE URI SAN of its leaf ([I.8]).
///
/// # Errors
/// The certificate is absent, unreadable, or has no identity of the form [I.1].
pub fn peer_identity(certs: &[CertificateDer<'_>]) -> Result<SpiffeId, Refusal> {
    Leaf::parse(certs.first().ok_or(Refusal::NoCertificate)?)?.identity()
}

/// What we read of a leaf certificate beyond what the chain check looks at.
pub(super) struct Leaf {
    /// URI SANs, in order.
    pub(super) uris: Vec<String>,
    /// Extended key usage names serverAuth.
    pub(super) server_auth: bool,
    /// Extended key usage names clientAuth.
    pub(super) client_auth: bool,
    /// Seconds since the epoch.
    pub(super) not_before: u64,
    /// Seconds since the epoch.
    pub(super) not_after: u64,
    /// Serial number in hexadecimal.
    pub(super) serial: String,
    /// Distinguished name as X.509 writes it; empty in a workload's certificate ([I.6]).
    pub(super) subject: String,
    /// Distinguished name of whoever signed it.
    pub(super) issuer: String,
}

impl Leaf {
    pub(super) fn parse(der: &CertificateDer<'_>) -> Result<Self, Refusal> {
        let (rest, cert) = X509Certificate::from_der(der).map_err(|_| Refusal::Malformed)?;
        if !rest.is_empty() {
            return Err(Refusal::Malformed);
        }
        let seconds = |time: x509_parser::time::ASN1Time| u64::try_from(time.timestamp()).unwrap_or(0);
        let mut leaf = Self {
            uris: Vec::new(),
            server_auth: false,
            client_auth: false,
            not_before: seconds(cert.validity().not_before),
            not_after: seconds(cert.validity().not_after),
            serial: format!("{:x}", cert.tbs_certificate.serial),
            subject: cert.subject().to_string(),
            issuer: cert.issuer().to_string(),
        };
        for extension in cert.extensions() {
            match extension.parsed_extension() {
                ParsedExtension::SubjectAlternativeName(names) => {
                    leaf.uris.extend(names.general_names.iter().filter_map(|name| match name {
                        GeneralName::URI(uri) => Some((*uri).to_owned()),
                        _ => None,
                    }));
                }
                ParsedExtension::ExtendedKeyUsage(usage) => {
                    leaf.server_auth |= usage.server_auth;
                    leaf.client_auth |= usage.client_auth;
                }
                _ => {}
            }
        }
        Ok(leaf)
    }

    fn spiffe_uris(&self) -> impl Iterator<Item = &String> {
        self.uris.iter().filter(|uri| uri.starts_with("spiffe://"))
    }

    /// The first SPIFFE URI SAN. One that is not of the form [I.1] is not skipped: who signed it meant something by it.
    fn identity(&self) -> Result<SpiffeId, Refusal> {
        let first = self.spiffe_uris().next().ok_or(Refusal::NoSpiffeId)?;
        first.parse().map_err(|_| Refusal::MalformedSpiffeId(first.clone()))
    }
}

/// The roots that certificates must chain to.
pub(super) struct Bundle {
    /// Every root with its validity, valid now or not.
    roots: Vec<Root>,
    /// Those that were valid when this value was made.
    store: Arc<RootCertStore>,
    /// The chain check for clients over `store`; `None` where `store` is empty.
    clients: Option<Arc<dyn ClientCertVerifier>>,
    /// When the set of valid roots changes next, in seconds since the epoch: webpki does not look at the validity of a
    /// trust anchor, so we do.
    changes_at: u64,
}

#[derive(Clone, PartialEq)]
struct Root {
    der: CertificateDer<'static>,
    not_before: u64,
    not_after: u64,
}

impl Bundle {
    fn of(roots: Vec<Root>, now: u64) -> anyhow::Result<Self> {
        let mut store = RootCertStore::empty();
        let mut changes_at = u64::MAX;
        for root in &roots {
            if now < root.not_before {
                changes_at = changes_at.min(root.not_before);
            } else if now <= root.not_after {
                changes_at = changes_at.min(root.not_after.saturating_add(1));
                store.add(root.der.clone()).context("a root certificate cannot be used")?;
            }
        }
        let store = Arc::new(store);
        let clients = if store.is_empty() {
            None
        } else {
            let verifier = WebPkiClientVerifier::builder_with_provider(store.clone(), provider());
            Some(verifier.build().context("a root certificate cannot be used")? as Arc<dyn ClientCertVerifier>)
        };
        Ok(Self { roots, store, clients, changes_at })
    }

    /// Reads a bundle; all certificates count as roots.
    pub(super) fn new(certificates: &[CertificateDer<'_>], now: u64) -> anyhow::Result<Self> {
        let mut roots = Vec::new();
        for der in certificates {
            let parsed = Leaf::parse(der).map_err(|_| anyhow::anyhow!("a root certificate cannot be read"))?;
            roots.push(Root {
                der: der.clone().into_owned(),
                not_before: parsed.not_before,
                not_after: parsed.not_after,
            });
        }
        let bundle = Self::of(roots, now)?;
        if bundle.store.is_empty() {
            bail!("none of the {} root certificates is valid now", bundle.roots.len());
        }
        Ok(bundle)
    }

    /// Every root, valid now or not.
    pub(super) fn roots(&self) -> impl Iterator<Item = &CertificateDer<'static>> {
        self.roots.iter().map(|root| &root.der)
    }

    /// How many roots it has, valid now or not.
    pub(super) fn len(&self) -> usize {
        self.roots.len()
    }

    fn check_server(&self, chain: &[CertificateDer<'_>], now: UnixTime) -> Result<Leaf, rustls::Error> {
        let (end_entity, intermediates) = chain.split_first().ok_or(Refusal::NoCertificate)?;
        if self.store.is_empty() {
            return Err(Refusal::NoTrustBundle.into());
        }
        let algorithms = PROVIDER.signature_verification_algorithms.all;
        let parsed = ParsedCertificate::try_from(end_entity)?;
        verify_server_cert_signed_by_trust_anchor(&parsed, &self.store, intermediates, now, algorithms)?;
        let leaf = Leaf::parse(end_entity)?;
        // webpki lets a certificate without extended key usages do everything; [I.9] asks for serverAuth.
        if leaf.server_auth { Ok(leaf) } else { Err(Refusal::WrongPurpose.into()) }
    }

    fn check_client(&self, chain: &[CertificateDer<'_>], now: UnixTime) -> Result<Leaf, rustls::Error> {
        let (end_entity, intermediates) = chain.split_first().ok_or(Refusal::NoCertificate)?;
        let clients = self.clients.as_ref().ok_or(Refusal::NoTrustBundle)?;
        let _: ClientCertVerified = clients.verify_client_cert(end_entity, intermediates, now)?;
        let leaf = Leaf::parse(end_entity)?;
        if leaf.client_auth { Ok(leaf) } else { Err(Refusal::WrongPurpose.into()) }
    }

    /// Checks a chain of our own for both uses, so that a useless certificate is refused by us and not by every peer.
    pub(super) fn check_own(&self, chain: &[CertificateDer<'_>], now: u64) -> anyhow::Result<Leaf> {
        let time = UnixTime::since_unix_epoch(std::time::Duration::from_secs(now));
        self.check_client(chain, time).context("as a client certificate")?;
        self.check_server(chain, time).context("as a server certificate")
    }
}

/// The bundle and the trust domains of the moment, shared by all checks.
pub(super) struct Trust {
    bundle: RwLock<Option<Arc<Bundle>>>,
    domains: RwLock<Arc<[TrustDomain]>>,
    clock: Clock,
}

impl Trust {
    pub(super) fn new(domains: Vec<TrustDomain>, clock: Clock) -> Self {
        Self { bundle: RwLock::new(None), domains: RwLock::new(domains.into()), clock }
    }

    /// Ours first, then the aliases.
    pub(super) fn set_domains(&self, domains: Vec<TrustDomain>) {
        *self.domains.write().unwrap_or_else(PoisonError::into_inner) = domains.into();
    }

    fn trusts(&self, domain: &TrustDomain) -> bool {
        self.domains.read().unwrap_or_else(PoisonError::into_inner).contains(domain)
    }

    /// Replaces all roots at once. True if they differ from the ones before.
    pub(super) fn set_bundle(&self, bundle: Bundle) -> bool {
        let mut current = self.bundle.write().unwrap_or_else(PoisonError::into_inner);
        let changed = current.as_ref().is_none_or(|old| old.roots != bundle.roots);
        if changed {
            *current = Some(Arc::new(bundle));
        }
        changed
    }

    /// The bundle of the moment.
    ///
    /// # Errors
    /// [`Refusal::NoTrustBundle`] while there is none.
    pub(super) fn bundle(&self) -> Result<Arc<Bundle>, Refusal> {
        let now = self.clock.unix_seconds();
        let current = self.bundle.read().unwrap_or_else(PoisonError::into_inner).clone();
        let current = current.ok_or(Refusal::NoTrustBundle)?;
        if now < current.changes_at {
            return Ok(current);
        }
        let renewed = Bundle::of(current.roots.clone(), now).map_err(|_| Refusal::NoTrustBundle)?;
        let renewed = Arc::new(renewed);
        let mut slot = self.bundle.write().unwrap_or_else(PoisonError::into_inner);
        if slot.as_ref().is_some_and(|slot| Arc::ptr_eq(slot, &current)) {
            *slot = Some(renewed.clone());
        }
        Ok(renewed)
    }
}

/// The cryptography of tunnels: the suites and groups of specification §14.1.
static PROVIDER: LazyLock<Arc<CryptoProvider>> = LazyLock::new(|| {
    Arc::new(CryptoProvider {
        cipher_suites: vec![
            aws_lc_rs::cipher_suite::TLS13_AES_256_GCM_SHA384,
            aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256,
        ],
        kx_groups: vec![aws_lc_rs::kx_group::X25519, aws_lc_rs::kx_group::SECP256R1, aws_lc_rs::kx_group::SECP384R1],
        ..aws_lc_rs::default_provider()
    })
});

/// The cryptography of tunnels and of the certificate API.
pub(crate) fn provider() -> Arc<CryptoProvider> {
    PROVIDER.clone()
}

fn check_signature(
    message: &[u8],
    cert: &CertificateDer<'_>,
    dss: &DigitallySignedStruct,
) -> Result<HandshakeSignatureValid, rustls::Error> {
    verify_tls13_signature(message, cert, dss, &PROVIDER.signature_verification_algorithms)
}

fn no_tls12() -> rustls::Error {
    rustls::Error::General("TLS 1.2 is off".to_owned())
}

/// The check of a tunnel's server against its clients ([I.8]).
pub(super) struct Clients(pub(super) Arc<Trust>);

impl fmt::Debug for Clients {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Clients")
    }
}

impl ClientCertVerifier for Clients {
    /// No hints: every client has exactly one certificate to show.
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        let chain: Vec<_> = std::iter::once(end_entity).chain(intermediates).cloned().collect();
        let identity = self.0.bundle()?.check_client(&chain, now)?.identity()?;
        // The identity that policy will see must be of our trust domains; a second SAN cannot lend it one.
        if !self.0.trusts(&identity.trust_domain) {
            return Err(Refusal::UntrustedTrustDomain(identity).into());
        }
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(no_tls12())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        check_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        PROVIDER.signature_verification_algorithms.supported_schemes()
    }
}

/// The check of a tunnel's client against the server ([I.9]).
pub(super) struct Server {
    pub(super) trust: Arc<Trust>,
    pub(super) expected: Vec<SpiffeId>,
    /// `expected` as URIs.
    uris: Vec<String>,
}

impl Server {
    pub(super) fn new(trust: Arc<Trust>, expected: &[SpiffeId]) -> Self {
        Self { trust, expected: expected.to_vec(), uris: expected.iter().map(ToString::to_string).collect() }
    }
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Server").field("expected", &self.uris).finish_non_exhaustive()
    }
}

impl ServerCertVerifier for Server {
    /// `server_name` is not looked at: identities are SPIFFE IDs, never DNS names.
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let chain: Vec<_> = std::iter::once(end_entity).chain(intermediates).cloned().collect();
        let leaf = self.trust.bundle()?.check_server(&chain, now)?;
        if leaf.uris.iter().any(|uri| self.uris.contains(uri)) {
            return Ok(ServerCertVerified::assertion());
        }
        let found: Vec<String> = leaf.spiffe_uris().cloned().collect();
        if found.is_empty() {
            return Err(Refusal::NoSpiffeId.into());
        }
        Err(Refusal::UnexpectedIdentity { found, expected: self.expected.clone() }.into())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(no_tls12())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        check_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        PROVIDER.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// [I.1], [I.8]: a peer's identity is the first SPIFFE name of its certificate, or there is none.
    #[test]
    fn fuzzed_certificates_have_one_identity_or_none() {
        crate::fuzz::run("certificate", |bytes| {
            let Ok(leaf) = Leaf::parse(&CertificateDer::from(bytes)) else { return };
            match leaf.identity() {
                Ok(identity) => {
                    let first = leaf.uris.iter().find(|uri| uri.starts_with("spiffe://")).expect("a SPIFFE name");
                    assert_eq!(identity.to_string(), first.replacen('@', ".", first.len()));
                }
                Err(refusal) => assert!(!refusal.to_string().is_empty()),
            }
        });
    }
}
