//! Who is asking, and may they have it: bound service account tokens, and the pods of the cluster ([I.4], [I.12]).
//!
//! Whether a token is genuine, for our audience and valid now, somebody vouches for: configured keys ([`Tokens`]), or an API server
//! (`control`). What it says then has to agree with the cluster as we see it. Nothing is signed here.

use std::{collections::BTreeSet, fmt, path::Path, sync::Arc};

use anyhow::{Context, bail};
use futures_util::future::BoxFuture;
use jsonwebtoken::{Algorithm, DecodingKey, Validation, decode, decode_header, errors::ErrorKind};
use serde::Deserialize;
use tokio::sync::watch;
use tonic::Status;
use x509_parser::{
    pem::Pem,
    prelude::{FromDer, SubjectPublicKeyInfo},
    public_key::PublicKey,
};

use crate::model::{Cluster, ObjectRef, Pod, PodUid, SpiffeId};

/// How far the clock of the token's issuer may be from ours, in seconds.
const LEEWAY_SECONDS: u64 = 10;
/// Largest token looked at, in bytes. Bound tokens have about 1,200.
const MAX_TOKEN_BYTES: usize = 16 * 1024;

/// Why a request was refused: for our log. The client is told [`Denial::category`] alone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Denial {
    NoToken,
    /// Nobody could say whether the token is genuine; the same question later may have an answer.
    Unavailable(String),
    /// The API server does not accept the token, in its words.
    Rejected(String),
    /// Not a JWT, or its claims are not those of a service account token.
    MalformedToken(String),
    /// Neither RS256 nor ES256; `none` is one of these.
    Algorithm(String),
    /// No configured key has signed it.
    UnknownKey,
    Expired,
    NotYetValid,
    Audience,
    Issuer,
    /// Signed and in time, but not bound to a pod and a node.
    NotBound,
    /// Not one of the trusted node accounts.
    NotTrusted(ObjectRef),
    /// The pod of the token is not in the cluster with this UID, name and account.
    NoSuchPod(ObjectRef),
    /// The pod of the token has ended or is going to.
    PodNotRunning(ObjectRef),
    /// The token says one node, the cluster another.
    WrongNode {
        claimed: String,
        actual: Arc<str>,
    },
    /// No identity was asked for, or what was is not one.
    MalformedIdentity(String),
    /// An identity of another trust domain.
    ForeignTrustDomain(SpiffeId),
    /// No running pod of the caller's node has the identity.
    NotOnNode(SpiffeId),
}

impl Denial {
    /// What the client gets to know: whether to come again, and of which kind the reason is.
    pub(crate) fn status(&self) -> Status {
        match self {
            Self::Unavailable(_) => Status::unavailable(self.category()),
            _ => Status::unauthenticated(self.category()),
        }
    }

    /// All that the client gets to know.
    pub(super) fn category(&self) -> &'static str {
        match self {
            Self::Unavailable(_) => "tokens cannot be verified at the moment",
            Self::NoToken
            | Self::Rejected(_)
            | Self::MalformedToken(_)
            | Self::Algorithm(_)
            | Self::UnknownKey
            | Self::Expired
            | Self::NotYetValid
            | Self::Audience
            | Self::Issuer
            | Self::NotBound => "the token is not accepted",
            Self::NotTrusted(_) | Self::NoSuchPod(_) | Self::PodNotRunning(_) | Self::WrongNode { .. } => {
                "the caller is not accepted"
            }
            Self::MalformedIdentity(_) | Self::ForeignTrustDomain(_) | Self::NotOnNode(_) => {
                "the identity is not the caller's to ask for"
            }
        }
    }
}

impl fmt::Display for Denial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = |object: &ObjectRef| format!("{:?}", format!("{}/{}", object.namespace, object.name));
        match self {
            Self::NoToken => f.write_str("no bearer token"),
            Self::Unavailable(why) => write!(f, "the token could not be verified: {why}"),
            Self::Rejected(why) => write!(f, "the API server does not accept the token: {why}"),
            Self::MalformedToken(why) => write!(f, "not a service account token: {why}"),
            Self::Algorithm(found) => write!(f, "signature algorithm {found:?}, expected RS256 or ES256"),
            Self::UnknownKey => f.write_str("no configured key has signed the token"),
            Self::Expired => f.write_str("the token has expired"),
            Self::NotYetValid => f.write_str("the token is not valid yet"),
            Self::Audience => f.write_str("the token is for another audience"),
            Self::Issuer => f.write_str("the token is from another issuer"),
            Self::NotBound => f.write_str("the token is not bound to a pod and a node"),
            Self::NotTrusted(account) => write!(f, "service account {} is not a trusted node account", name(account)),
            Self::NoSuchPod(pod) => {
                write!(f, "the cluster has no pod {} with the UID and the service account of the token", name(pod))
            }
            Self::PodNotRunning(pod) => write!(f, "pod {} has finished or is terminating", name(pod)),
            Self::WrongNode { claimed, actual } => {
                write!(f, "the token says node {claimed:?}, the pod is on {actual:?}")
            }
            Self::MalformedIdentity(found) => write!(f, "{found:?} is not an identity"),
            Self::ForeignTrustDomain(identity) => write!(f, "{identity} is not of our trust domain"),
            Self::NotOnNode(identity) => write!(f, "no running pod of the caller's node has {identity}"),
        }
    }
}

/// What the token says, as far as it matters.
#[derive(Deserialize)]
struct Claims {
    sub: Option<String>,
    #[serde(rename = "kubernetes.io")]
    kubernetes: Option<KubernetesClaims>,
}

#[derive(Deserialize)]
struct KubernetesClaims {
    namespace: String,
    serviceaccount: Named,
    pod: Option<Named>,
    node: Option<Named>,
}

#[derive(Deserialize)]
struct Named {
    name: String,
    #[serde(default)]
    uid: String,
}

/// Whom a genuine token was issued to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Bound {
    /// The service account.
    pub(crate) account: ObjectRef,
    /// Name and UID of the pod.
    pub(crate) pod: (String, PodUid),
    /// Name of the node.
    pub(crate) node: String,
}

/// Somebody who can tell a genuine token.
pub(crate) trait Vouch: Send + Sync {
    /// Whom the token was issued to, if it is genuine, for our audience and valid now.
    fn vouch<'a>(&'a self, token: &'a str) -> BoxFuture<'a, Result<Bound, Denial>>;
}

/// A node agent that may ask.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Caller {
    /// Its pod.
    pub(crate) pod: ObjectRef,
    /// Where it runs.
    pub(crate) node: Arc<str>,
}

/// Who may ask.
pub(crate) struct Callers {
    vouch: Box<dyn Vouch>,
    trusted: BTreeSet<ObjectRef>,
    cluster: watch::Receiver<Arc<Cluster>>,
}

impl Callers {
    /// `trusted` are the service accounts of node agents.
    ///
    /// # Errors
    /// There is none: nobody could ask.
    pub(crate) fn new(
        vouch: Box<dyn Vouch>,
        trusted: BTreeSet<ObjectRef>,
        cluster: watch::Receiver<Arc<Cluster>>,
    ) -> anyhow::Result<Self> {
        if trusted.is_empty() {
            bail!("no trusted node account: nobody could ask for a certificate");
        }
        Ok(Self { vouch, trusted, cluster })
    }

    /// Finds out who sends `token`, and the cluster by which that holds.
    pub(crate) async fn caller(&self, token: &str) -> Result<(Caller, Arc<Cluster>), Denial> {
        if token.len() > MAX_TOKEN_BYTES {
            return Err(Denial::MalformedToken(format!("{} bytes", token.len())));
        }
        let bound = self.vouch.vouch(token).await?;
        // One snapshot for all questions, and as new as the answer.
        let cluster = self.cluster.borrow().clone();
        Ok((bound.caller(&self.trusted, &cluster)?, cluster))
    }
}

impl Bound {
    /// The agent that this is, by the cluster of the moment.
    pub(super) fn caller(self, trusted: &BTreeSet<ObjectRef>, cluster: &Cluster) -> Result<Caller, Denial> {
        let (name, uid) = self.pod;
        if uid.0.is_empty() || name.is_empty() || self.node.is_empty() {
            return Err(Denial::NotBound);
        }
        if !trusted.contains(&self.account) {
            return Err(Denial::NotTrusted(self.account));
        }
        let object = ObjectRef { namespace: self.account.namespace.clone(), name: name.as_str().into() };
        let live = cluster
            .pods
            .get(&uid)
            .filter(|live| live.object == object && live.service_account == self.account.name)
            .ok_or_else(|| Denial::NoSuchPod(object.clone()))?;
        if live.finished || live.terminating {
            return Err(Denial::PodNotRunning(object));
        }
        if *live.node != *self.node {
            return Err(Denial::WrongNode { claimed: self.node, actual: live.node.clone() });
        }
        Ok(Caller { pod: object, node: live.node.clone() })
    }
}

/// Vouches by configured keys.
pub(super) struct Tokens {
    keys: Vec<(Algorithm, DecodingKey)>,
    audience: String,
    issuer: String,
}

impl Vouch for Tokens {
    fn vouch<'a>(&'a self, token: &'a str) -> BoxFuture<'a, Result<Bound, Denial>> {
        Box::pin(std::future::ready(self.bound(token)))
    }
}

impl Tokens {
    /// Reads the public keys of `key_file`.
    ///
    /// # Errors
    /// The file has no key, or one that is neither RSA of 2048 bits and more nor P-256.
    pub(super) fn new(key_file: &Path, audience: String, issuer: String) -> anyhow::Result<Self> {
        let pem = std::fs::read(key_file).with_context(|| format!("read the token key {}", key_file.display()))?;
        let keys = public_keys(&pem).with_context(|| format!("token key {}", key_file.display()))?;
        for (value, name) in [(&audience, "audience"), (&issuer, "issuer")] {
            if value.is_empty() {
                bail!("the {name} of tokens must not be empty");
            }
        }
        Ok(Self { keys, audience, issuer })
    }

    /// Whom `token` was issued to, if one of the keys has signed it.
    pub(super) fn bound(&self, token: &str) -> Result<Bound, Denial> {
        let claims = self.claims(token)?;
        let kubernetes = claims.kubernetes.ok_or(Denial::NotBound)?;
        let (Some(pod), Some(node)) = (kubernetes.pod, kubernetes.node) else { return Err(Denial::NotBound) };
        let account = ObjectRef {
            namespace: kubernetes.namespace.as_str().into(),
            name: kubernetes.serviceaccount.name.as_str().into(),
        };
        let subject = format!("system:serviceaccount:{}:{}", account.namespace, account.name);
        if claims.sub.is_some_and(|sub| sub != subject) {
            return Err(Denial::MalformedToken("sub and kubernetes.io disagree".to_owned()));
        }
        Ok(Bound { account, pod: (pod.name, PodUid(pod.uid.as_str().into())), node: node.name })
    }

    fn claims(&self, token: &str) -> Result<Claims, Denial> {
        let algorithm = match decode_header(token) {
            Ok(header) => header.alg,
            Err(error) => {
                return Err(match error.kind() {
                    ErrorKind::InvalidAlgorithmName | ErrorKind::Json(_) => Denial::Algorithm("unknown".to_owned()),
                    _ => Denial::MalformedToken(error.to_string()),
                });
            }
        };
        if !matches!(algorithm, Algorithm::RS256 | Algorithm::ES256) {
            return Err(Denial::Algorithm(format!("{algorithm:?}")));
        }
        let mut validation = Validation::new(algorithm);
        validation.leeway = LEEWAY_SECONDS;
        validation.validate_nbf = true;
        validation.set_required_spec_claims(&["exp", "aud", "iss"]);
        validation.set_audience(&[&self.audience]);
        validation.set_issuer(&[&self.issuer]);
        // A key is used with its own algorithm alone, whatever the token says.
        for (_, key) in self.keys.iter().filter(|(of_key, _)| *of_key == algorithm) {
            match decode::<Claims>(token, key, &validation) {
                Ok(data) => return Ok(data.claims),
                Err(error) => match error.kind() {
                    ErrorKind::InvalidSignature => {}
                    ErrorKind::ExpiredSignature => return Err(Denial::Expired),
                    ErrorKind::ImmatureSignature => return Err(Denial::NotYetValid),
                    ErrorKind::InvalidAudience => return Err(Denial::Audience),
                    ErrorKind::InvalidIssuer => return Err(Denial::Issuer),
                    _ => return Err(Denial::MalformedToken(error.to_string())),
                },
            }
        }
        Err(Denial::UnknownKey)
    }
}

/// The identity asked for, if `caller` may have it: of our trust domain, and that of a pod that runs on its node.
///
/// A pod counts until it has finished: while it terminates it still talks. A pod in the host's network does not, since
/// it is never enrolled; so an agent cannot ask for its own identity, and needs none.
pub(super) fn authorize(caller: &Caller, wanted: Option<&str>, cluster: &Cluster) -> Result<SpiffeId, Denial> {
    let wanted = wanted.unwrap_or_default();
    let identity: SpiffeId =
        wanted.parse().map_err(|_| Denial::MalformedIdentity(wanted.chars().take(256).collect()))?;
    // Written otherwise than we would write it (`@` in the trust domain): the CSR could not be compared.
    if identity.to_string() != wanted {
        return Err(Denial::MalformedIdentity(wanted.chars().take(256).collect()));
    }
    if identity.trust_domain != cluster.mesh.trust_domain {
        return Err(Denial::ForeignTrustDomain(identity));
    }
    let has_it = |pod: &Pod| {
        pod.node == caller.node
            && pod.object.namespace == identity.namespace
            && pod.service_account == identity.service_account
            && !pod.finished
            && !pod.host_network
    };
    if cluster.pods.values().any(|pod| has_it(pod)) { Ok(identity) } else { Err(Denial::NotOnNode(identity)) }
}

/// Every public key of a PEM text, with the algorithm that it verifies.
fn public_keys(pem: &[u8]) -> anyhow::Result<Vec<(Algorithm, DecodingKey)>> {
    let mut keys = Vec::new();
    for block in Pem::iter_from_buffer(pem) {
        let block = block.context("not PEM")?;
        let spki = match block.label.as_str() {
            "PUBLIC KEY" => block.contents.clone(),
            "CERTIFICATE" => {
                let certificate = block.parse_x509().context("a certificate cannot be read")?;
                certificate.public_key().raw.to_vec()
            }
            label if label.contains("PRIVATE KEY") => {
                bail!("has a private key; give the public key (openssl pkey -pubout)")
            }
            label => bail!("has a PEM block {label:?}, expected PUBLIC KEY (openssl pkey -pubout)"),
        };
        let (_, info) = SubjectPublicKeyInfo::from_der(&spki).context("a public key cannot be read")?;
        let bits = &info.subject_public_key.data;
        keys.push(match info.parsed().context("a public key cannot be read")? {
            PublicKey::RSA(key) if key.key_size() >= 2048 => (Algorithm::RS256, DecodingKey::from_rsa_der(bits)),
            PublicKey::RSA(key) => bail!("an RSA key of {} bits, expected 2048 or more", key.key_size()),
            // The uncompressed point of P-256 has 65 bytes.
            PublicKey::EC(_) if bits.len() == 65 => (Algorithm::ES256, DecodingKey::from_ec_der(bits)),
            _ => bail!("a key that is neither RSA nor P-256"),
        });
    }
    if keys.is_empty() {
        bail!("has no PEM block PUBLIC KEY");
    }
    Ok(keys)
}
