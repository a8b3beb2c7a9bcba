//! Keys, certificates, trust bundle and rotation for the identities of this node's pods; from a peer's certificate to its
//! SPIFFE ID (specification §4).
//!
//! It leaves to others: who may connect (`crate::policy`), what runs inside the TLS that is configured here
//! (`crate::tunnel`), and handing out certificates (`crate::ca`).
//!
//! [`Identities`] is the handle that connections use: a configuration is one look-up in a table as long as the
//! certificate lives. [`Renewal`] is the one task behind it. Keys exist in memory only: nothing here writes a file or shows a
//! key in a log.

mod certificate;
mod client;
mod clock;
mod files;
mod renewal;
#[cfg(test)]
mod tests;
mod trust;
pub(crate) mod wire;

use std::{
    collections::BTreeSet,
    error::Error,
    fmt,
    path::PathBuf,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use rustls::{ClientConfig, ServerConfig};

use self::{
    certificate::Certificate,
    client::CaClient,
    files::Watch,
    renewal::{Entry, Origin, Table},
    trust::Trust,
};
pub(crate) use self::{
    certificate::certificates,
    client::{Dialer, Failed, Server},
    trust::provider,
};
pub use self::{
    client::CaConfig,
    clock::Clock,
    renewal::Renewal,
    trust::{Refusal, peer_identity},
};
use crate::model::{SpiffeId, TrustDomain};

/// Longest time that a connection waits for its certificate ([D.4]).
pub const WAIT: Duration = Duration::from_secs(5);

/// Where certificates come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A server of Istio's certificate API.
    Ca(CaConfig),
    /// A folder: `<dir>/root-cert.pem` and `<dir>/<namespace>/<service account>/{cert-chain.pem,key.pem}`.
    Files(PathBuf),
}

/// What [`Identities::new`] needs to know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// See [`Source`].
    pub source: Source,
    /// Our trust domain at the start; the mesh configuration may change it ([`Identities::set_trust_domains`]).
    pub trust_domain: TrustDomain,
    /// Trust domains whose certificates are ours too ([I.8]).
    pub trust_domain_aliases: Vec<TrustDomain>,
}

/// Why there is no configuration for an identity.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Unavailable {
    /// No pod of this node has the identity.
    NotWanted(SpiffeId),
    /// No certificate within [`WAIT`].
    Waiting {
        /// The identity.
        identity: SpiffeId,
        /// Why the last attempt failed, if one has.
        last_error: Option<Arc<str>>,
    },
    /// The certificate has expired and there is no other.
    Expired {
        /// The identity.
        identity: SpiffeId,
        /// Why the last attempt to renew failed, if one has.
        last_error: Option<Arc<str>>,
    },
}

impl fmt::Display for Unavailable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let because = |f: &mut fmt::Formatter<'_>, error: &Option<Arc<str>>| match error {
            Some(error) => write!(f, ": {error}"),
            None => Ok(()),
        };
        match self {
            Self::NotWanted(identity) => write!(f, "no pod of this node has the identity {identity}"),
            Self::Waiting { identity, last_error } => {
                write!(f, "no certificate for {identity} yet")?;
                because(f, last_error)
            }
            Self::Expired { identity, last_error } => {
                write!(f, "the certificate for {identity} has expired")?;
                because(f, last_error)
            }
        }
    }
}

impl Error for Unavailable {}

/// Where an identity stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// No certificate yet.
    Waiting,
    /// A valid certificate.
    Serving,
    /// The certificate has expired; connections are refused.
    Expired,
}

/// One identity, for people to look at. Never the key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// The identity.
    pub identity: SpiffeId,
    /// Where it stands.
    pub state: State,
    /// First second, since the epoch, at which the certificate is no longer valid.
    pub expires_at: Option<u64>,
    /// Second since the epoch at which the next one is fetched, unless attempts are failing.
    pub renews_at: Option<u64>,
    /// Serial number of the certificate, hexadecimal.
    pub serial: Option<String>,
    /// Attempts that failed since the last success.
    pub failures: u32,
    /// Why the last one failed.
    pub last_error: Option<Arc<str>>,
    /// What is sent to peers: the certificate first, then what leads to a root.
    pub chain: Vec<Facts>,
}

/// What a certificate says, for people to look at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Facts {
    /// Distinguished name; empty in a workload's certificate ([I.6]).
    pub subject: String,
    /// Distinguished name of whoever signed it.
    pub issuer: String,
    /// URI SANs.
    pub uris: Vec<String>,
    /// Hexadecimal.
    pub serial: String,
    /// First second of its validity, since the epoch.
    pub not_before: u64,
    /// Last second of its validity, since the epoch.
    pub not_after: u64,
}

impl Facts {
    fn of(der: &rustls::pki_types::CertificateDer<'_>) -> Option<Self> {
        let leaf = trust::Leaf::parse(der).ok()?;
        let (not_before, not_after) = (leaf.not_before, leaf.not_after);
        Some(Self {
            subject: leaf.subject,
            issuer: leaf.issuer,
            uris: leaf.uris,
            serial: leaf.serial,
            not_before,
            not_after,
        })
    }
}

/// The identities of this node's pods. Cheap to clone; all clones are the same.
#[derive(Clone)]
pub struct Identities {
    table: Arc<Table>,
    trust: Arc<Trust>,
    clock: Clock,
    from_files: bool,
}

impl fmt::Debug for Identities {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identities").finish_non_exhaustive()
    }
}

impl Identities {
    /// The handle, and the task that must be run for it to become anything.
    ///
    /// # Errors
    /// The certificate folder does not exist or cannot be watched. A CA that is not there is not an error: it is asked
    /// until it answers.
    pub fn new(config: Config) -> anyhow::Result<(Self, Renewal)> {
        Self::with_clock(config, Clock::default())
    }

    /// [`Identities::new`] with another clock.
    ///
    /// # Errors
    /// As there.
    pub fn with_clock(config: Config, clock: Clock) -> anyhow::Result<(Self, Renewal)> {
        let from_files = matches!(config.source, Source::Files(_));
        let (origin, watch) = match config.source {
            Source::Ca(ca) => (Origin::Ca(Box::new(CaClient::new(ca))), None),
            Source::Files(dir) => {
                let watch = Watch::new(&dir)?;
                (Origin::Files(dir), Some(watch))
            }
        };
        let table = Arc::new(Table::new());
        let trust = Arc::new(Trust::new(domains(config.trust_domain, config.trust_domain_aliases), clock.clone()));
        let renewal = Renewal { origin, table: table.clone(), trust: trust.clone(), clock: clock.clone(), watch };
        Ok((Self { table, trust, clock, from_files }, renewal))
    }

    /// The identities that have pods on this node: new ones are fetched, the others forgotten.
    pub fn want(&self, set: &BTreeSet<SpiffeId>) {
        self.table.want(set);
    }

    /// Reads certificate files again, and asks the CA now for what it has not given. (Its root and our token are read
    /// for every request anyway.)
    pub fn reload(&self) {
        self.table.reload(self.from_files);
    }

    /// Takes effect with the next handshake, on open listeners too.
    pub fn set_trust_domains(&self, own: TrustDomain, aliases: Vec<TrustDomain>) {
        self.trust.set_domains(domains(own, aliases));
    }

    /// TLS for a connection from `own` to a server that is one of `expected` ([I.9]); waits up to [`WAIT`] for the
    /// certificate of an identity that is wanted.
    ///
    /// Use any IP address as server name: it is neither sent nor checked. Do not keep the configuration beyond the
    /// connection: the next call may give a newer certificate.
    ///
    /// # Errors
    /// [`Unavailable`] where there is no valid certificate; `expected` is empty.
    pub async fn client_config(&self, own: &SpiffeId, expected: &[SpiffeId]) -> anyhow::Result<Arc<ClientConfig>> {
        self.certificate(own).await?.client_config(expected, &self.trust, &self.clock)
    }

    /// TLS for a connection to a pod with the identity `own`; a client certificate is required ([I.8]). Waits up to
    /// [`WAIT`]. As with [`Identities::client_config`], ask for each connection.
    ///
    /// # Errors
    /// [`Unavailable`] where there is no valid certificate.
    pub async fn server_config(&self, own: &SpiffeId) -> anyhow::Result<Arc<ServerConfig>> {
        self.certificate(own).await?.server_config(&self.trust, &self.clock)
    }

    /// Waits up to [`WAIT`] until there is a valid certificate: for a new connection in a tunnel that stands already, whose
    /// handshake was with one that may have expired since.
    ///
    /// # Errors
    /// [`Unavailable`] where there is none.
    pub async fn ready(&self, own: &SpiffeId) -> Result<(), Unavailable> {
        self.certificate(own).await.map(drop)
    }

    /// Every wanted identity, in order.
    pub fn status(&self) -> Vec<Status> {
        let now = self.clock.unix_seconds();
        let mut all: Vec<_> = self.table.read().iter().map(|(identity, entry)| status(identity, entry, now)).collect();
        all.sort_by(|a, b| a.identity.cmp(&b.identity));
        all
    }

    /// Certificates that were had so far, and attempts that failed.
    pub fn requests(&self) -> (u64, u64) {
        (self.table.fetched.load(Ordering::Relaxed), self.table.failed.load(Ordering::Relaxed))
    }

    /// The roots that peers' certificates must chain to; empty while none is known.
    pub fn roots(&self) -> Vec<Facts> {
        self.trust.bundle().map_or_else(|_| Vec::new(), |bundle| bundle.roots().filter_map(Facts::of).collect())
    }

    fn usable(&self, identity: &SpiffeId) -> Result<Arc<Certificate>, Unavailable> {
        let entries = self.table.read();
        let entry = entries.get(identity).ok_or_else(|| Unavailable::NotWanted(identity.clone()))?;
        if let Some(certificate) = &entry.certificate
            && self.clock.unix_seconds() < certificate.expires_at
        {
            return Ok(certificate.clone());
        }
        let (identity, last_error) = (identity.clone(), entry.last_error.clone());
        Err(match entry.certificate {
            Some(_) => Unavailable::Expired { identity, last_error },
            None => Unavailable::Waiting { identity, last_error },
        })
    }

    async fn certificate(&self, identity: &SpiffeId) -> Result<Arc<Certificate>, Unavailable> {
        match self.usable(identity) {
            // The last pod of the identity has just left; nothing is under way that could be waited for.
            outcome @ (Ok(_) | Err(Unavailable::NotWanted(_))) => return outcome,
            Err(Unavailable::Waiting { .. } | Unavailable::Expired { .. }) => {}
        }
        let mut changes = self.table.changes.subscribe();
        let mut waiting = self.table.wait_for(identity);
        let arrival = async {
            loop {
                if let Ok(certificate) = self.usable(identity) {
                    return certificate;
                }
                waiting.again();
                if changes.changed().await.is_err() {
                    // The table holds the sender and we hold the table.
                    std::future::pending::<()>().await;
                }
            }
        };
        match tokio::time::timeout(WAIT, arrival).await {
            Ok(certificate) => Ok(certificate),
            Err(_) => self.usable(identity),
        }
    }
}

fn domains(own: TrustDomain, aliases: Vec<TrustDomain>) -> Vec<TrustDomain> {
    std::iter::once(own).chain(aliases).collect()
}

fn status(identity: &SpiffeId, entry: &Entry, now: u64) -> Status {
    let certificate = entry.certificate.as_ref();
    Status {
        identity: identity.clone(),
        state: match certificate {
            None => State::Waiting,
            Some(certificate) if now < certificate.expires_at => State::Serving,
            Some(_) => State::Expired,
        },
        expires_at: certificate.map(|certificate| certificate.expires_at),
        renews_at: entry.renews_at(),
        serial: certificate.map(|certificate| certificate.serial.clone()),
        failures: entry.failures,
        last_error: entry.last_error.clone(),
        chain: certificate.map_or_else(Vec::new, |own| own.chain().iter().filter_map(Facts::of).collect()),
    }
}
