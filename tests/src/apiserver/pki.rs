//! Keys and certificates of a cluster made for a test, and the kubeconfigs that name them.

use std::fs;
use std::io::Write;
use std::net::IpAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    KeyPair, KeyUsagePurpose, SanType, date_time_ymd,
};

/// The cluster's certificate authority; its files lie in one directory.
pub(super) struct Authority {
    dir: PathBuf,
    issuer: CertifiedIssuer<'static, KeyPair>,
}

// What rcgen would print is the whole key.
impl std::fmt::Debug for Authority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Authority").field("dir", &self.dir).finish_non_exhaustive()
    }
}

/// A certificate and its key, as files.
struct Files {
    certificate: PathBuf,
    key: PathBuf,
}

impl Authority {
    /// A new authority, and with it the key that signs service account tokens.
    pub(super) fn create(dir: &Path) -> Result<Self> {
        fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
        let mut params = params("culvert-test-ca", None);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate()?).context("make the cluster's CA")?;
        let authority = Self { dir: dir.to_owned(), issuer };
        write_secret(&authority.certificate(), authority.issuer.pem().as_bytes())?;
        let accounts = KeyPair::generate().context("make a key for service account tokens")?;
        write_secret(&authority.accounts_key(), accounts.serialize_pem().as_bytes())?;
        write_secret(&authority.accounts_public_key(), accounts.public_key_pem().as_bytes())?;
        Ok(authority)
    }

    /// Where its files lie; a server's are named for the server.
    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    /// File of a user's kubeconfig, written or not.
    pub(super) fn kubeconfig_file(&self, user: &str) -> PathBuf {
        self.dir.join(format!("{}.kubeconfig", file_name(user)))
    }

    /// File of the authority's certificate.
    pub(super) fn certificate(&self) -> PathBuf {
        self.dir.join("ca.crt")
    }

    /// File of the key that signs service account tokens: ECDSA on P-256, so tokens are ES256.
    pub(super) fn accounts_key(&self) -> PathBuf {
        self.dir.join("accounts.key")
    }

    /// File of the public half of [`Self::accounts_key`].
    pub(super) fn accounts_public_key(&self) -> PathBuf {
        self.dir.join("accounts.pub")
    }

    /// Writes the API server's certificate and key, `kube-apiserver.crt` and `kube-apiserver.key`, for these addresses and names.
    pub(super) fn serving(&self, addresses: &[IpAddr], names: &[String]) -> Result<()> {
        let mut params = params("kube-apiserver", None);
        params.subject_alt_names = addresses.iter().copied().map(SanType::IpAddress).collect();
        for name in names {
            params.subject_alt_names.push(SanType::DnsName(name.as_str().try_into()?));
        }
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        self.sign("kube-apiserver", &params).map(drop)
    }

    /// A client's certificate: the API server takes its common name as the user and its organisation as the user's group.
    fn client(&self, user: &str, group: Option<&str>) -> Result<Files> {
        let mut params = params(user, group);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        self.sign(&file_name(user), &params)
    }

    /// Writes a kubeconfig for a user who is in at most one group of the caller's choice. Where there is one already it stays:
    /// a program that was just started may be reading it, and would find the key of one certificate beside another.
    pub(super) fn kubeconfig(&self, server: &str, user: &str, group: Option<&str>) -> Result<()> {
        if self.kubeconfig_file(user).is_file() {
            return Ok(());
        }
        let files = self.client(user, group)?;
        let config = serde_json::json!({
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{ "name": "test", "cluster": { "server": server, "certificate-authority": self.certificate() } }],
            "users": [{ "name": user, "user": { "client-certificate": files.certificate, "client-key": files.key } }],
            "contexts": [{ "name": "test", "context": { "cluster": "test", "user": user } }],
            "current-context": "test",
        });
        // JSON is YAML, and needs nobody to quote it.
        write_secret(&self.kubeconfig_file(user), serde_json::to_string_pretty(&config)?.as_bytes())
    }

    fn sign(&self, name: &str, params: &CertificateParams) -> Result<Files> {
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &self.issuer).with_context(|| format!("sign {name}"))?;
        let files =
            Files { certificate: self.dir.join(format!("{name}.crt")), key: self.dir.join(format!("{name}.key")) };
        write_secret(&files.certificate, certificate.pem().as_bytes())?;
        write_secret(&files.key, key.serialize_pem().as_bytes())?;
        Ok(files)
    }
}

fn params(user: &str, group: Option<&str>) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.not_before = date_time_ymd(2020, 1, 1);
    params.not_after = date_time_ymd(2045, 1, 1);
    params.distinguished_name = DistinguishedName::new();
    if let Some(group) = group {
        params.distinguished_name.push(DnType::OrganizationName, group);
    }
    params.distinguished_name.push(DnType::CommonName, user);
    params
}

/// Users' names have colons and slashes.
fn file_name(user: &str) -> String {
    user.replace(|c: char| !c.is_ascii_alphanumeric() && c != '.' && c != '-', "-")
}

/// Writes a file that only its owner reads.
pub(crate) fn write_secret(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut file = fs::OpenOptions::new()
        .create(true)
        .truncate(true)
        .write(true)
        .mode(0o600)
        .open(path)
        .with_context(|| format!("open {}", path.display()))?;
    file.write_all(bytes).with_context(|| format!("write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kubeconfig_names_files_that_are_there_and_the_authority_prints_no_key() {
        let dir = std::env::temp_dir().join(format!("culvert-pki-{}", std::process::id()));
        let authority = Authority::create(&dir).expect("an authority");
        authority.kubeconfig("https://127.0.0.1:1", "system:node:a", Some("system:nodes")).expect("a user");
        let path = authority.kubeconfig_file("system:node:a");
        assert_eq!(path, dir.join("system-node-a.kubeconfig"));
        let text = fs::read_to_string(&path).expect("it was written");
        let config: serde_json::Value = serde_json::from_str(&text).expect("JSON");
        let files = [
            &config["clusters"][0]["cluster"]["certificate-authority"],
            &config["users"][0]["user"]["client-certificate"],
            &config["users"][0]["user"]["client-key"],
        ];
        for file in files {
            let path = file.as_str().expect("a path");
            assert!(fs::read_to_string(path).expect("it is there").starts_with("-----BEGIN "), "{path}");
        }
        let certificate = config["users"][0]["user"]["client-certificate"].as_str().expect("a path");
        let before = fs::read_to_string(certificate).expect("it is there");
        authority.kubeconfig("https://127.0.0.1:1", "system:node:a", Some("system:nodes")).expect("the same user");
        assert_eq!(fs::read_to_string(certificate).expect("it is there"), before, "somebody may be reading it");
        let shown = format!("{authority:?}");
        assert!(shown.starts_with("Authority { dir: ") && !shown.contains("BEGIN") && shown.len() < 200, "{shown}");
        fs::remove_dir_all(&dir).expect("the test's own folder");
    }
}
