//! One certificate of our own with its key, checked before it is used; the TLS configurations made from it.
//!
//! Where it came from (the CA, a folder) makes no difference: both pass [`Certificate::check`].

use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, OnceLock, PoisonError, RwLock},
};

use anyhow::{Context, bail};
use rustls::{
    ClientConfig, ServerConfig,
    client::Resumption,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    server::NoServerSessionStorage,
    sign::{CertifiedKey, SingleCertAndKey},
};

use super::{
    Clock,
    trust::{Bundle, Clients, Leaf, Server, Trust, provider},
};
use crate::model::SpiffeId;

/// How many client configurations one certificate keeps. A set of expected identities beyond that starts the cache anew.
const MAX_CLIENT_CONFIGS: usize = 4096;

/// What a source answers: a chain and its key, and all roots.
pub(super) struct Answer {
    /// Leaf first, no roots.
    pub(super) chain: Vec<CertificateDer<'static>>,
    pub(super) key: PrivateKeyDer<'static>,
    pub(super) roots: Vec<CertificateDer<'static>>,
}

/// Certificate and key of one identity, and the configurations that use them.
pub(super) struct Certificate {
    certified: Arc<CertifiedKey>,
    /// Seconds since the epoch: first second at which it, or a certificate of its chain, is no longer valid.
    pub(super) expires_at: u64,
    /// Hexadecimal.
    pub(super) serial: String,
    server: OnceLock<Arc<ServerConfig>>,
    clients: RwLock<HashMap<Vec<SpiffeId>, Arc<ClientConfig>>>,
}

/// Never the key.
impl fmt::Debug for Certificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Certificate").field("serial", &self.serial).finish_non_exhaustive()
    }
}

impl Certificate {
    /// Takes an answer for `identity` if a peer would take it too ([I.5]): one URI SAN, which is the identity; both uses;
    /// valid now; a chain to the roots that came with it; and the key is the certificate's.
    pub(super) fn check(identity: &SpiffeId, answer: Answer, now: u64) -> anyhow::Result<(Self, Bundle)> {
        let Answer { chain, key, roots } = answer;
        let bundle = Bundle::new(&roots, now)?;
        let leaf = Leaf::parse(chain.first().context("the certificate chain is empty")?)
            .map_err(|_| anyhow::anyhow!("the certificate cannot be read"))?;
        if leaf.uris != [identity.to_string()] {
            bail!("the certificate is for {:?}, wanted {identity}", leaf.uris);
        }
        bundle.check_own(&chain, now).context("the certificate does not pass the check that peers will make")?;
        let mut expires_at = u64::MAX;
        for certificate in &chain {
            let not_after = Leaf::parse(certificate).map_or(0, |leaf| leaf.not_after);
            expires_at = expires_at.min(not_after.saturating_add(1));
        }
        let certified = CertifiedKey::from_der(chain, key, &provider()).context("use the certificate with its key")?;
        certified.keys_match().context("the private key is not the certificate's")?;
        Ok((
            Self {
                certified: Arc::new(certified),
                expires_at,
                serial: leaf.serial,
                server: OnceLock::new(),
                clients: RwLock::new(HashMap::new()),
            },
            bundle,
        ))
    }

    /// Leaf first, as sent to peers; no roots.
    pub(super) fn chain(&self) -> &[CertificateDer<'static>] {
        &self.certified.cert
    }

    /// The leaf, as sent to peers.
    pub(super) fn leaf(&self) -> Option<&CertificateDer<'static>> {
        self.certified.cert.first()
    }

    /// For the server end of a tunnel (specification §14.1).
    pub(super) fn server_config(&self, trust: &Arc<Trust>, clock: &Clock) -> anyhow::Result<Arc<ServerConfig>> {
        if let Some(config) = self.server.get() {
            return Ok(config.clone());
        }
        let mut config = ServerConfig::builder_with_details(provider(), Arc::new(clock.clone()))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .context("set up TLS 1.3")?
            .with_client_cert_verifier(Arc::new(Clients(trust.clone())))
            .with_cert_resolver(Arc::new(SingleCertAndKey::from(self.certified.clone())));
        config.alpn_protocols = vec![b"h2".to_vec()];
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        config.max_early_data_size = 0;
        Ok(self.server.get_or_init(|| Arc::new(config)).clone())
    }

    /// For the client end of a tunnel to a server that is one of `expected` (specification §14.1).
    pub(super) fn client_config(
        &self,
        expected: &[SpiffeId],
        trust: &Arc<Trust>,
        clock: &Clock,
    ) -> anyhow::Result<Arc<ClientConfig>> {
        if let Some(config) = self.clients.read().unwrap_or_else(PoisonError::into_inner).get(expected) {
            return Ok(config.clone());
        }
        if expected.is_empty() {
            bail!("no identity is expected of the server, so none can be accepted");
        }
        let mut config = ClientConfig::builder_with_details(provider(), Arc::new(clock.clone()))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .context("set up TLS 1.3")?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(Server::new(trust.clone(), expected)))
            .with_client_cert_resolver(Arc::new(SingleCertAndKey::from(self.certified.clone())));
        config.alpn_protocols = vec![b"h2".to_vec()];
        config.enable_sni = false;
        config.resumption = Resumption::disabled();
        config.enable_early_data = false;
        let mut clients = self.clients.write().unwrap_or_else(PoisonError::into_inner);
        if clients.len() >= MAX_CLIENT_CONFIGS {
            clients.clear();
        }
        Ok(clients.entry(expected.to_vec()).or_insert_with(|| Arc::new(config)).clone())
    }
}

/// All certificates of a PEM text.
pub(crate) fn certificates(pem: &[u8]) -> anyhow::Result<Vec<CertificateDer<'static>>> {
    let found: Vec<_> =
        CertificateDer::pem_slice_iter(pem).collect::<Result<_, _>>().context("not PEM certificates")?;
    if found.is_empty() {
        bail!("no PEM block CERTIFICATE");
    }
    Ok(found)
}
