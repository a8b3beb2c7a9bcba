//! The CA's key and certificates, and signing with them ([I.6]).
//!
//! A set of them has Istio's layout, in a folder here and in a Secret elsewhere: `ca-cert.pem` (what signs), `ca-key.pem`,
//! `root-cert.pem` (all roots that agents shall trust) and `cert-chain.pem` (from `ca-cert.pem` towards the root). Whether somebody
//! may have a certificate is decided in [`super::caller`].

use std::{
    fmt,
    fs::{self, File, OpenOptions},
    io::{ErrorKind, Write},
    net::IpAddr,
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::Path,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, bail};
use nix::fcntl::{Flock, FlockArg};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, SanType, SerialNumber, SubjectPublicKeyInfo,
};
use rustls::{
    RootCertStore,
    client::{WebPkiServerVerifier, danger::ServerCertVerifier},
    pki_types::{CertificateDer, PrivatePkcs8KeyDer, ServerName, UnixTime, pem::PemObject},
    sign::CertifiedKey,
};
use time::OffsetDateTime;
use tracing::{info, warn};
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::{
    identity::{certificates, provider},
    model::SpiffeId,
};

pub(crate) const CA_CERT: &str = "ca-cert.pem";
pub(crate) const CA_KEY: &str = "ca-key.pem";
pub(crate) const ROOT_CERT: &str = "root-cert.pem";
pub(crate) const CERT_CHAIN: &str = "cert-chain.pem";
/// In the order in which a new set is put in place: what has `ca-cert.pem` has all.
const FILES: [&str; 4] = [CA_KEY, CERT_CHAIN, ROOT_CERT, CA_CERT];
/// Prefix of a file of a new set that is not in place yet.
const STAGED: &str = ".new.";

/// Lifetime of a root that we make.
const ROOT_TTL: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
/// How far NotBefore lies back, for clocks that are behind ours ([I.6]).
const BACKDATE: Duration = Duration::from_secs(120);
/// From this much of lifetime left, starting is accompanied by a warning.
const SHORT_LIFE: Duration = Duration::from_secs(30 * 24 * 3600);

/// What a CA consists of, as text: PEM.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Set {
    /// What signs.
    pub(crate) ca_cert: String,
    /// Its private key.
    pub(crate) ca_key: String,
    /// All roots; `None` where what signs is its own root.
    pub(crate) root_cert: Option<String>,
    /// From what signs towards the root; `None` where there is nothing between.
    pub(crate) cert_chain: Option<String>,
}

/// Never the key.
impl fmt::Debug for Set {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Set").finish_non_exhaustive()
    }
}

impl Set {
    /// Makes a self-signed root with a name of its own.
    ///
    /// # Errors
    /// The clock is at a time that certificates cannot have.
    pub(crate) fn make(now: u64) -> anyhow::Result<Self> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).context("make the CA's key")?;
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::OrganizationName, "culvert");
        // Its own name for each root: chains are found by name, and two roots may be trusted at once.
        params.distinguished_name.push(DnType::CommonName, format!("culvert root {:016x}", rand::random::<u64>()));
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.serial_number = Some(SerialNumber::from_slice(&random_serial()));
        params.not_before = date(now.saturating_sub(BACKDATE.as_secs()))?;
        params.not_after = date(now.saturating_add(ROOT_TTL.as_secs()))?;
        let ca_cert = params.self_signed(&key).context("sign the root")?.pem();
        let (root_cert, cert_chain) = (Some(ca_cert.clone()), Some(ca_cert.clone()));
        Ok(Self { ca_cert, ca_key: key.serialize_pem(), root_cert, cert_chain })
    }
}

/// Where a set is, for people.
pub(crate) struct Place<'a> {
    /// Of the whole: `the CA folder /etc/ca`.
    pub(crate) whole: String,
    /// Of one of its parts, by the part's name in the layout.
    pub(crate) part: &'a dyn Fn(&str) -> String,
}

/// The CA's own certificates with the key.
pub(crate) struct Authority {
    issuer: Issuer<'static, KeyPair>,
    /// From the certificate that signs towards the root, without roots; PEM and DER of the same.
    chain: Vec<(String, CertificateDer<'static>)>,
    /// All roots.
    roots_pem: String,
    /// First second since the epoch at which what signs, or what it chains to, is no longer valid.
    expires_at: u64,
}

/// Never the key.
impl fmt::Debug for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Authority").field("expires_at", &self.expires_at).finish_non_exhaustive()
    }
}

/// A leaf that was signed.
pub(crate) struct Signed {
    /// Leaf, intermediates one by one, then all roots in one element: the answer of the API.
    pub(crate) cert_chain: Vec<String>,
    /// Hexadecimal.
    pub(crate) serial: String,
    /// Seconds since the epoch.
    pub(crate) expires_at: u64,
}

impl Authority {
    /// Reads the set in `dir`, or makes one if `dir` has none. Two starts at once end with the same set, and a start
    /// that was killed half-way is finished by the next.
    ///
    /// # Errors
    /// An incomplete set, a key that is not the certificate's, a chain that does not lead to a root, or something expired:
    /// one line that names the file and what to do.
    pub(super) fn open(dir: &Path, now: u64) -> anyhow::Result<Self> {
        fs::create_dir_all(dir).with_context(|| format!("create the CA folder {}", dir.display()))?;
        let handle = File::open(dir).with_context(|| format!("open the CA folder {}", dir.display()))?;
        // Held until the set is complete; the kernel drops it with the process.
        let lock = Flock::lock(handle, FlockArg::LockExclusive)
            .map_err(|(_, error)| error)
            .with_context(|| format!("lock the CA folder {}", dir.display()))?;
        finish_staged(dir)?;
        if !FILES.iter().any(|name| dir.join(name).exists()) {
            create(dir, now)?;
        }
        drop(lock);
        Self::load(dir, now)
    }

    fn load(dir: &Path, now: u64) -> anyhow::Result<Self> {
        let path = |name: &str| dir.join(name);
        for name in [CA_CERT, CA_KEY] {
            if !path(name).exists() {
                bail!(
                    "the CA folder {} has no {name} although it has others of {FILES:?}; add it, or empty the folder to \
                     have a new root made",
                    dir.display()
                );
            }
        }
        let text = |name: &str| -> anyhow::Result<Option<String>> {
            match fs::read_to_string(path(name)) {
                Ok(text) => Ok(Some(text)),
                Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
                Err(error) => Err(error).with_context(|| format!("read {}", path(name).display())),
            }
        };
        let mode = fs::metadata(path(CA_KEY)).context("look at the CA key")?.permissions().mode() & 0o777;
        if mode & 0o077 != 0 {
            warn!(file = %path(CA_KEY).display(), mode = format!("{mode:o}"),
                "the CA's private key is open to others than its owner; chmod 600 it");
        }
        let set = Set {
            ca_cert: text(CA_CERT)?.unwrap_or_default(),
            ca_key: text(CA_KEY)?.unwrap_or_default(),
            root_cert: text(ROOT_CERT)?,
            cert_chain: text(CERT_CHAIN)?,
        };
        let part = |name: &str| path(name).display().to_string();
        Self::new(&set, &Place { whole: format!("the CA folder {}", dir.display()), part: &part }, now)
    }

    /// Understands a set.
    ///
    /// # Errors
    /// A key that is not the certificate's, a chain that does not lead to a root, or something expired: one line that names the part
    /// and what to do.
    pub(crate) fn new(set: &Set, place: &Place<'_>, now: u64) -> anyhow::Result<Self> {
        let part = place.part;
        let key =
            KeyPair::from_pem(&set.ca_key).with_context(|| format!("no usable private key in {}", part(CA_KEY)))?;
        let ca = only(&set.ca_cert).with_context(|| format!("in {}", part(CA_CERT)))?;
        let (_, parsed) = X509Certificate::from_der(&ca.1)
            .map_err(|error| anyhow::anyhow!("{} cannot be read: {error}", part(CA_CERT)))?;
        if parsed.public_key().raw != key_info(&key) {
            bail!("{} is not the key of {}", part(CA_KEY), part(CA_CERT));
        }
        if !parsed.is_ca() {
            bail!("{} is not the certificate of a CA (basicConstraints)", part(CA_CERT));
        }
        let self_signed = parsed.subject() == parsed.issuer();

        let roots_pem = match &set.root_cert {
            Some(text) => text.clone(),
            None if self_signed => set.ca_cert.clone(),
            None => bail!("{} has no {ROOT_CERT}, and {CA_CERT} is not self-signed; add the root", place.whole),
        };
        let roots = blocks(&roots_pem).with_context(|| format!("in {}", part(ROOT_CERT)))?;
        let mut chain = match &set.cert_chain {
            Some(text) => blocks(text).with_context(|| format!("in {}", part(CERT_CHAIN)))?,
            None => vec![ca.clone()],
        };
        if chain.first().map(|(_, der)| der) != Some(&ca.1) {
            bail!("{} does not begin with the certificate of {}", part(CERT_CHAIN), part(CA_CERT));
        }
        let mut expires_at = u64::MAX;
        for (name, (_, der)) in chain.iter().map(|c| (CERT_CHAIN, c)).chain(roots.iter().map(|c| (ROOT_CERT, c))) {
            let (from, until) = validity(der).with_context(|| format!("in {}", part(name)))?;
            if now > until {
                // A root beside others may have run out; what signs must not.
                if name == ROOT_CERT && roots.len() > 1 {
                    warn!(file = part(name), "one of the roots has expired");
                    continue;
                }
                bail!("a certificate in {} has expired; replace the set in {}", part(name), place.whole);
            }
            if now < from {
                bail!("a certificate in {} is not valid yet; check this machine's clock", part(name));
            }
            if name == CERT_CHAIN || roots.len() == 1 {
                expires_at = expires_at.min(until.saturating_add(1));
            }
        }
        if expires_at.saturating_sub(now) < SHORT_LIFE.as_secs() {
            warn!(expires_in_s = expires_at - now, of = place.whole, "the CA's certificates expire soon");
        }
        chain.retain(|(_, der)| !roots.iter().any(|(_, root)| root == der));
        let issuer = Issuer::from_ca_cert_der(&ca.1, key).with_context(|| format!("{} cannot sign", part(CA_CERT)))?;
        let authority = Self { issuer, chain, roots_pem, expires_at };
        authority.check(&roots, now).with_context(|| {
            format!("{} with {CERT_CHAIN} does not lead to a root in {}", part(CA_CERT), part(ROOT_CERT))
        })?;
        Ok(authority)
    }

    /// Signs a certificate and verifies it as an agent would.
    fn check(&self, roots: &[(String, CertificateDer<'static>)], now: u64) -> anyhow::Result<()> {
        let (server, _) = self.server(&["localhost".to_owned()], Duration::from_secs(60), now)?;
        let mut store = RootCertStore::empty();
        for (_, root) in roots {
            store.add(root.clone())?;
        }
        let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(store), provider()).build()?;
        let (leaf, intermediates) = server.cert.split_first().context("no certificate was made")?;
        let name = ServerName::try_from("localhost").context("localhost is a name")?;
        let time = UnixTime::since_unix_epoch(Duration::from_secs(now));
        verifier.verify_server_cert(leaf, intermediates, &name, &[], time)?;
        Ok(())
    }

    /// Whether what `older` issues is believed by whoever has these roots.
    pub(crate) fn trusts(&self, older: &Self, now: u64) -> bool {
        blocks(&self.roots_pem).is_ok_and(|roots| older.check(&roots, now).is_ok())
    }

    /// All roots, as PEM.
    pub(crate) fn roots_pem(&self) -> &str {
        &self.roots_pem
    }

    /// A certificate for `identity` over the public key `spki` (DER), for `ttl` or until the CA's own end ([I.6]).
    pub(crate) fn sign(&self, identity: &SpiffeId, spki: &[u8], ttl: Duration, now: u64) -> anyhow::Result<Signed> {
        let public_key = SubjectPublicKeyInfo::from_der(spki).context("public key")?;
        let uri = identity.to_string().try_into().with_context(|| format!("identity {identity} in a SAN"))?;
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![SanType::URI(uri)];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let (serial, expires_at) = self.leaf(&mut params, ttl, now)?;
        let leaf = params.signed_by(&public_key, &self.issuer).context("sign")?;
        let mut cert_chain = vec![leaf.pem()];
        cert_chain.extend(self.chain.iter().map(|(pem, _)| pem.clone()));
        cert_chain.push(self.roots_pem.clone());
        Ok(Signed { cert_chain, serial, expires_at })
    }

    /// A certificate with a fresh key for our own server, and the second at which it expires.
    pub(crate) fn server(&self, names: &[String], ttl: Duration, now: u64) -> anyhow::Result<(CertifiedKey, u64)> {
        let mut params = CertificateParams::default();
        for name in names {
            params.subject_alt_names.push(match name.parse::<IpAddr>() {
                Ok(address) => SanType::IpAddress(address),
                Err(_) => SanType::DnsName(
                    name.as_str().try_into().with_context(|| format!("server name {name:?} is not a DNS name"))?,
                ),
            });
        }
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let (_, expires_at) = self.leaf(&mut params, ttl, now)?;
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).context("make a server key")?;
        let leaf = params.signed_by(&key, &self.issuer).context("sign the server certificate")?;
        let mut chain = vec![leaf.der().clone()];
        chain.extend(self.chain.iter().map(|(_, der)| der.clone()));
        let key = PrivatePkcs8KeyDer::from(key.serialize_der()).into();
        Ok((CertifiedKey::from_der(chain, key, &provider()).context("use the server certificate")?, expires_at))
    }

    /// What all leaves have in common.
    fn leaf(&self, params: &mut CertificateParams, ttl: Duration, now: u64) -> anyhow::Result<(String, u64)> {
        if now >= self.expires_at {
            bail!("the CA's own certificate has expired; nothing can be signed");
        }
        let expires_at = now.saturating_add(ttl.as_secs().max(1)).min(self.expires_at);
        params.distinguished_name = DistinguishedName::new();
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
        params.use_authority_key_identifier_extension = true;
        params.not_before = date(now.saturating_sub(BACKDATE.as_secs()))?;
        // NotAfter is the last valid second.
        params.not_after = date(expires_at - 1)?;
        let serial = random_serial();
        let text = serial.iter().fold(String::new(), |text, byte| format!("{text}{byte:02x}"));
        params.serial_number = Some(SerialNumber::from_slice(&serial));
        Ok((text.trim_start_matches('0').to_owned(), expires_at))
    }
}

/// 127 random bits: positive, and within the 20 bytes of RFC 5280 §4.1.2.2.
fn random_serial() -> [u8; 16] {
    let mut serial: [u8; 16] = rand::random();
    serial[0] &= 0x7f;
    serial[0] |= 0x01;
    serial
}

fn date(unix: u64) -> anyhow::Result<OffsetDateTime> {
    OffsetDateTime::from_unix_timestamp(i64::try_from(unix)?).context("a date that certificates cannot have")
}

fn key_info(key: &KeyPair) -> Vec<u8> {
    use rcgen::PublicKeyData;
    key.subject_public_key_info()
}

/// First and last valid second since the epoch.
fn validity(der: &CertificateDer<'_>) -> anyhow::Result<(u64, u64)> {
    let (_, cert) =
        X509Certificate::from_der(der).map_err(|error| anyhow::anyhow!("a certificate cannot be read: {error}"))?;
    let seconds = |time: x509_parser::time::ASN1Time| u64::try_from(time.timestamp()).unwrap_or(0);
    Ok((seconds(cert.validity().not_before), seconds(cert.validity().not_after)))
}

/// The certificates of a PEM text, each with its own text.
fn blocks(text: &str) -> anyhow::Result<Vec<(String, CertificateDer<'static>)>> {
    const END: &str = "-----END CERTIFICATE-----";
    certificates(text.as_bytes())?;
    let mut found = Vec::new();
    let mut rest = text;
    while let Some(start) = rest.find("-----BEGIN CERTIFICATE-----") {
        let end = start + rest[start..].find(END).context("a PEM block has no end")? + END.len();
        let pem = format!("{}\n", &rest[start..end]);
        let der = CertificateDer::from_pem_slice(pem.as_bytes()).context("not a PEM certificate")?;
        found.push((pem, der));
        rest = &rest[end..];
    }
    Ok(found)
}

fn only(text: &str) -> anyhow::Result<(String, CertificateDer<'static>)> {
    let mut blocks = blocks(text)?;
    match (blocks.pop(), blocks.is_empty()) {
        (Some(block), true) => Ok(block),
        _ => bail!("more than one certificate; the others belong into {CERT_CHAIN}"),
    }
}

/// Makes a self-signed root and puts its set into `dir`. The caller holds the lock.
fn create(dir: &Path, now: u64) -> anyhow::Result<()> {
    let set = Set::make(now)?;
    for name in FILES {
        // All certificates of a root that signs itself are the same one.
        let (text, mode) = if name == CA_KEY { (&set.ca_key, 0o600) } else { (&set.ca_cert, 0o644) };
        write(&dir.join(format!("{STAGED}{name}")), text.as_bytes(), mode)?;
    }
    sync(dir)?;
    finish_staged(dir)?;
    info!(folder = %dir.display(), "made a new self-signed root");
    Ok(())
}

/// Puts a staged set in place if it is complete, else removes it: `ca-cert.pem` is staged last and moved last.
fn finish_staged(dir: &Path) -> anyhow::Result<()> {
    let complete = dir.join(format!("{STAGED}{CA_CERT}")).exists();
    for name in FILES {
        let staged = dir.join(format!("{STAGED}{name}"));
        let result = if complete { fs::rename(&staged, dir.join(name)) } else { fs::remove_file(&staged) };
        match result {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(error).with_context(|| format!("put {} in place", staged.display())),
        }
    }
    sync(dir)
}

/// Writes a file that did not exist, down to the disk.
fn write(path: &Path, content: &[u8], mode: u32) -> anyhow::Result<()> {
    let write = || -> std::io::Result<()> {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(path)?;
        file.write_all(content)?;
        file.sync_all()
    };
    write().with_context(|| format!("write {}", path.display()))
}

fn sync(dir: &Path) -> anyhow::Result<()> {
    File::open(dir).and_then(|dir| dir.sync_all()).with_context(|| format!("sync {}", dir.display()))
}

/// Replaces `path` by `content` in one step, so that a reader sees the old text or the new.
pub(super) fn publish(path: &Path, content: &str) -> anyhow::Result<()> {
    let dir = match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    };
    let name = path.file_name().with_context(|| format!("{} does not name a file", path.display()))?;
    let staged = dir.join(format!("{STAGED}{}.{:016x}", name.to_string_lossy(), rand::random::<u64>()));
    write(&staged, content.as_bytes(), 0o644)?;
    fs::rename(&staged, path).with_context(|| format!("publish the root to {}", path.display())).inspect_err(|_| {
        // Best effort: the error that is reported is the one that counts.
        let _ = fs::remove_file(&staged);
    })?;
    sync(dir)
}
