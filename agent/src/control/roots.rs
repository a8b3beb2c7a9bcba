//! The CA's key and certificates in the cluster (specification §4): Secret `cacerts`, which an operator plugs in, else
//! `istio-ca-secret`, which is made where there is none.
//!
//! Both have Istio's layout, so that an installation of Istio's goes on with the root that it has. All replicas read them, and again
//! every few seconds: what an operator changes is in force without a restart. A set that cannot be used changes nothing.

use std::{collections::BTreeMap, convert::Infallible, sync::Arc, time::Duration};

use anyhow::{Context as _, anyhow, bail};
use k8s_openapi::{ByteString, api::core::v1::Secret, apimachinery::pkg::apis::meta::v1::ObjectMeta};
use kube::{Api, Client, api::PostParams};
use tokio::sync::watch;
use tracing::{error, info, warn};

use crate::{
    ca::authority::{Authority, CA_CERT, CA_KEY, CERT_CHAIN, Place, ROOT_CERT, Set},
    identity::Clock,
    source::kubernetes::describe,
};

/// The Secret of an operator.
const PLUGGED_IN: &str = "cacerts";
/// The Secret of a root that was made.
const MADE: &str = "istio-ca-secret";
/// What a Secret of type `kubernetes.io/tls` calls the same, as cert-manager writes it.
const TLS: [&str; 3] = ["tls.crt", "tls.key", "ca.crt"];
/// How often they are looked at.
const LOOK: Duration = Duration::from_secs(5);
/// For one look.
const ANSWER: Duration = Duration::from_secs(10);

/// The Secrets.
pub(super) struct Roots {
    api: Api<Secret>,
    namespace: String,
    clock: Clock,
}

/// A set, and the name of the Secret that it is from.
#[derive(Clone, PartialEq, Eq)]
struct Found {
    secret: &'static str,
    set: Set,
}

impl Roots {
    /// In the system namespace.
    pub(super) fn new(client: Client, namespace: &str, clock: Clock) -> Self {
        Self { api: Api::namespaced(client, namespace), namespace: namespace.to_owned(), clock }
    }

    /// The authority, made if there is none; and the rest of its life, which keeps the receiver up to date for as long as it is
    /// polled. Waits until there is one: a server that is down, and a Secret that cannot be used, are told and tried again.
    pub(super) async fn open(self) -> (watch::Receiver<Arc<Authority>>, impl Future<Output = Infallible> + use<>) {
        let mut told = None;
        let (found, authority) = loop {
            let opened = async {
                let found = self.find_or_make().await?;
                let authority = self.understand(&found)?;
                anyhow::Ok((found, authority))
            };
            match within(opened).await {
                Ok(opened) => break opened,
                Err(problem) => {
                    let problem = format!("{problem:#}");
                    if told.as_ref() != Some(&problem) {
                        error!(error = problem, "there is no key to sign with: trying again");
                        told = Some(problem);
                    }
                    tokio::time::sleep(LOOK).await;
                }
            }
        };
        info!(secret = self.name(found.secret), "the CA's key and certificates are read");
        let (sender, receiver) = watch::channel(Arc::new(authority));
        (receiver, async move { self.keep(found, sender).await })
    }

    async fn keep(self, mut found: Found, sender: watch::Sender<Arc<Authority>>) -> Infallible {
        let mut told = None;
        loop {
            tokio::time::sleep(LOOK).await;
            let looked = async {
                let now = self.find().await?;
                let now = now.with_context(|| {
                    format!(
                        "{} is gone; put it back: the key that was read from it stays in use",
                        self.name(found.secret)
                    )
                })?;
                let authority = if now == found { None } else { Some(self.understand(&now)?) };
                anyhow::Ok(authority.map(|authority| (now, authority)))
            };
            match within(looked).await {
                Ok(None) => told = None,
                Ok(Some((now, authority))) => {
                    told = None;
                    if !authority.trusts(&sender.borrow(), self.clock.unix_seconds()) {
                        warn!(
                            secret = self.name(now.secret),
                            "the new roots do not have the root of the certificates that were issued until \
                            now: peers that have the new roots refuse these; keep the old root in {ROOT_CERT} until all are renewed"
                        );
                    }
                    info!(
                        secret = self.name(now.secret),
                        "the CA's key and certificates were changed: the new ones are in use"
                    );
                    sender.send_replace(Arc::new(authority));
                    found = now;
                }
                Err(problem) => {
                    let problem = format!("{problem:#}");
                    if told.as_ref() != Some(&problem) {
                        error!(
                            error = problem,
                            "the CA's key and certificates cannot be read again: those from before stay in use"
                        );
                        told = Some(problem);
                    }
                }
            }
        }
    }

    async fn find_or_make(&self) -> anyhow::Result<Found> {
        if let Some(found) = self.find().await? {
            return Ok(found);
        }
        let set = Set::make(self.clock.unix_seconds())?;
        let data = [
            (CA_CERT, &set.ca_cert),
            (CA_KEY, &set.ca_key),
            (ROOT_CERT, set.root_cert.as_ref().unwrap_or(&set.ca_cert)),
            (CERT_CHAIN, set.cert_chain.as_ref().unwrap_or(&set.ca_cert)),
        ];
        let data = data.map(|(name, text)| (name.to_owned(), ByteString(text.clone().into_bytes())));
        let secret = Secret {
            metadata: ObjectMeta { name: Some(MADE.to_owned()), ..ObjectMeta::default() },
            type_: Some("istio.io/ca-root".to_owned()),
            data: Some(data.into()),
            ..Secret::default()
        };
        match self.api.create(&PostParams::default(), &secret).await {
            Ok(_) => info!(secret = self.name(MADE), "made a new self-signed root"),
            // Another replica was faster: its root is the mesh's.
            Err(kube::Error::Api(status)) if status.code == 409 => {}
            Err(error) => bail!("make {}: {}", self.name(MADE), describe(&error)),
        }
        self.find().await?.with_context(|| format!("{} was made and is gone", self.name(MADE)))
    }

    async fn find(&self) -> anyhow::Result<Option<Found>> {
        for name in [PLUGGED_IN, MADE] {
            let secret = self.api.get_opt(name).await;
            let secret = secret.map_err(|error| anyhow!("read {}: {}", self.name(name), describe(&error)))?;
            if let Some(secret) = secret {
                let set = set(secret).with_context(|| self.name(name))?;
                return Ok(Some(Found { secret: name, set }));
            }
        }
        Ok(None)
    }

    fn understand(&self, found: &Found) -> anyhow::Result<Authority> {
        let whole = self.name(found.secret);
        let part = |name: &str| format!("{name} of {whole}");
        Authority::new(&found.set, &Place { whole: whole.clone(), part: &part }, self.clock.unix_seconds())
    }

    fn name(&self, secret: &str) -> String {
        format!("Secret {}/{secret}", self.namespace)
    }
}

async fn within<T>(look: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    match tokio::time::timeout(ANSWER, look).await {
        Ok(result) => result,
        Err(_) => Err(anyhow!("the API server did not answer within {} s", ANSWER.as_secs())),
    }
}

/// The set that a Secret has, in one of the two layouts.
fn set(secret: Secret) -> anyhow::Result<Set> {
    let mut data: BTreeMap<String, ByteString> = secret.data.unwrap_or_default();
    // Istio writes parts that it has not as empty ones.
    let mut text = |name: &str| -> anyhow::Result<Option<String>> {
        let bytes = data.remove(name).map(|bytes| bytes.0).filter(|bytes| !bytes.is_empty());
        bytes.map(|bytes| String::from_utf8(bytes).map_err(|_| anyhow!("{name} is not text"))).transpose()
    };
    let [tls_cert, tls_key, tls_root] = TLS;
    if let Some(ca_cert) = text(CA_CERT)? {
        let ca_key = text(CA_KEY)?.with_context(|| format!("has {CA_CERT} and no {CA_KEY}; add it"))?;
        return Ok(Set { ca_cert, ca_key, root_cert: text(ROOT_CERT)?, cert_chain: text(CERT_CHAIN)? });
    }
    if let Some(chain) = text(tls_cert)? {
        let ca_key = text(tls_key)?.with_context(|| format!("has {tls_cert} and no {tls_key}; add it"))?;
        // What signs is the first of the chain.
        const END: &str = "-----END CERTIFICATE-----";
        let ca_cert = chain.find(END).map_or(chain.as_str(), |at| &chain[..at + END.len()]).to_owned();
        return Ok(Set { ca_cert, ca_key, root_cert: text(tls_root)?, cert_chain: Some(chain) });
    }
    bail!("has neither {CA_CERT} and {CA_KEY} nor {tls_cert} and {tls_key}; add them")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secret(parts: &[(&str, &str)]) -> Secret {
        let data = parts.iter().map(|(name, text)| ((*name).to_owned(), ByteString(text.as_bytes().to_vec())));
        Secret { data: Some(data.collect()), ..Secret::default() }
    }

    #[test]
    fn both_layouts_are_the_same_set() {
        let made = Set::make(Clock::default().unix_seconds()).expect("made");
        let (cert, key) = (made.ca_cert.as_str(), made.ca_key.as_str());
        let istio = set(secret(&[(CA_CERT, cert), (CA_KEY, key), (ROOT_CERT, cert), (CERT_CHAIN, "")])).expect("a set");
        assert_eq!(istio, Set { cert_chain: None, ..made.clone() });
        let chain = format!("{cert}{cert}");
        let tls = set(secret(&[("tls.crt", &chain), ("tls.key", key), ("ca.crt", cert)])).expect("a set");
        assert_eq!((tls.ca_cert.trim(), tls.cert_chain.as_deref()), (cert.trim(), Some(chain.as_str())));
        let place = Place { whole: "Secret s/cacerts".to_owned(), part: &|name| name.to_owned() };
        Authority::new(&istio, &place, Clock::default().unix_seconds()).expect("it can sign");
    }

    #[test]
    fn a_secret_that_lacks_something_is_refused_with_the_remedy() {
        for (parts, words) in [
            (&[][..], "has neither ca-cert.pem and ca-key.pem nor tls.crt and tls.key; add them"),
            (&[(CA_CERT, "x")], "has ca-cert.pem and no ca-key.pem; add it"),
            (&[("tls.crt", "x")], "has tls.crt and no tls.key; add it"),
        ] {
            assert_eq!(set(secret(parts)).expect_err("refused").to_string(), words);
        }
    }
}
