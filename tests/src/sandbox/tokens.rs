//! Bound service account tokens as a kubelet projects them, signed by a key of the sandbox's own API server stand-in.
//!
//! The key is made and used by `openssl`, so the harness needs no cryptography of its own.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};

use crate::apiserver::write_secret;
use crate::command;

/// `iss` of the tokens.
pub const ISSUER: &str = "https://kubernetes.default.svc.cluster.local";
/// `aud` of the tokens, Istio's.
pub const AUDIENCE: &str = "istio-ca";

/// The key that signs tokens.
#[derive(Debug, Clone)]
pub struct Signer {
    private: PathBuf,
    public: PathBuf,
}

/// What a token says. Fields may be changed to make a token that must be refused.
#[derive(Debug, Clone)]
pub struct Claims {
    /// `iss`.
    pub issuer: String,
    /// `aud`.
    pub audience: String,
    /// Namespace of the service account and of the pod.
    pub namespace: String,
    /// Service account: name, UID.
    pub account: (String, String),
    /// Pod: name, UID.
    pub pod: (String, String),
    /// Node: name, UID.
    pub node: (String, String),
    /// Lifetime from now, seconds; a negative one makes an expired token.
    pub lifetime_s: i64,
}

impl Signer {
    /// Makes a new RSA key in `dir`.
    pub(super) fn create(dir: &Path) -> Result<Self> {
        let (private, public) = (dir.join("token-key.pem"), dir.join("token-key.pub"));
        let openssl = |args: &[&str]| command::run("openssl", args).context("make a key for tokens");
        openssl(&[
            "genpkey",
            "-quiet",
            "-algorithm",
            "RSA",
            "-pkeyopt",
            "rsa_keygen_bits:2048",
            "-out",
            text(&private)?,
        ])
        .or_else(|_| {
            // OpenSSL before 3.0.8 knows no -quiet and reports progress instead.
            openssl(&["genpkey", "-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048", "-out", text(&private)?])
        })?;
        openssl(&["pkey", "-in", text(&private)?, "-pubout", "-out", text(&public)?])?;
        Ok(Self { private, public })
    }

    /// File of the public key, PEM.
    pub fn public_key(&self) -> &Path {
        &self.public
    }

    /// A signed token (JWS compact form, RS256).
    ///
    /// # Errors
    /// `openssl` failed.
    pub fn sign(&self, claims: &Claims) -> Result<String> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).context("the clock is before 1970")?.as_secs();
        let now = i64::try_from(now)?;
        let issued = now.min(now + claims.lifetime_s - 3600);
        let body = serde_json::json!({
            "iss": claims.issuer,
            "aud": [claims.audience],
            "exp": now + claims.lifetime_s,
            "iat": issued,
            "nbf": issued,
            "sub": format!("system:serviceaccount:{}:{}", claims.namespace, claims.account.0),
            "kubernetes.io": {
                "namespace": claims.namespace,
                "node": { "name": claims.node.0, "uid": claims.node.1 },
                "pod": { "name": claims.pod.0, "uid": claims.pod.1 },
                "serviceaccount": { "name": claims.account.0, "uid": claims.account.1 },
            },
        });
        let head = serde_json::json!({ "alg": "RS256", "typ": "JWT", "kid": "culvert-sandbox" });
        let signed = format!("{}.{}", base64url(head.to_string().as_bytes()), base64url(body.to_string().as_bytes()));
        let mut openssl = Command::new("openssl");
        openssl.args(["dgst", "-sha256", "-sign", text(&self.private)?]);
        let mut child = openssl.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        child.stdin.take().context("openssl's input")?.write_all(signed.as_bytes())?;
        let output = child.wait_with_output()?;
        command::success("openssl dgst -sha256 -sign", &output)?;
        Ok(format!("{signed}.{}", base64url(&output.stdout)))
    }

    /// Writes a token to a file that only root reads.
    pub(super) fn sign_to(&self, claims: &Claims, path: &Path) -> Result<()> {
        write_secret(path, self.sign(claims)?.as_bytes())
    }
}

fn text(path: &Path) -> Result<&str> {
    path.to_str().context("a path that is not UTF-8")
}

/// RFC 4648 §5, without padding.
pub(crate) fn base64url(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let mut out = String::new();
    for chunk in bytes.chunks(3) {
        let word = chunk.iter().fold(0_u32, |word, &b| word << 8 | u32::from(b)) << (8 * (3 - chunk.len()));
        for digit in 0..=chunk.len() {
            out.push(char::from(DIGITS[(word >> (18 - 6 * digit) & 63) as usize]));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64url_is_rfc_4648() {
        let pairs = [("", ""), ("f", "Zg"), ("fo", "Zm8"), ("foo", "Zm9v"), ("foob", "Zm9vYg"), ("fooba", "Zm9vYmE")];
        for (plain, coded) in pairs {
            assert_eq!(base64url(plain.as_bytes()), coded);
        }
        assert_eq!(base64url(&[0xfb, 0xff]), "-_8");
    }
}
