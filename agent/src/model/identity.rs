//! SPIFFE identities as Istio writes them ([I.1]).

use std::{fmt, str::FromStr, sync::Arc};

/// A trust domain; `@` is written as `.` ([I.1]).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TrustDomain(Arc<str>);

impl TrustDomain {
    /// Takes any non-empty text without `/`.
    ///
    /// # Errors
    /// One line that says what is wrong with the text.
    pub fn new(text: &str) -> Result<Self, String> {
        if text.is_empty() || text.contains('/') {
            return Err(format!("trust domain {text:?} must be non-empty and must not contain '/'"));
        }
        Ok(Self(text.replace('@', ".").into()))
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Default for TrustDomain {
    fn default() -> Self {
        Self("cluster.local".into())
    }
}

impl fmt::Display for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// `spiffe://<trust domain>/ns/<namespace>/sa/<service account>` ([I.1]).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SpiffeId {
    /// First segment.
    pub trust_domain: TrustDomain,
    /// Segment after `ns`.
    pub namespace: Arc<str>,
    /// Segment after `sa`.
    pub service_account: Arc<str>,
}

impl SpiffeId {
    /// The string that policies call the principal: without `spiffe://`.
    pub fn principal(&self) -> String {
        format!("{}/ns/{}/sa/{}", self.trust_domain, self.namespace, self.service_account)
    }
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "spiffe://{}/ns/{}/sa/{}", self.trust_domain, self.namespace, self.service_account)
    }
}

impl FromStr for SpiffeId {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is not spiffe://<trust domain>/ns/<namespace>/sa/<service account>");
        let rest = text.strip_prefix("spiffe://").ok_or_else(wrong)?;
        let segments: Vec<&str> = rest.split('/').collect();
        let [domain, "ns", namespace, "sa", account] = segments[..] else { return Err(wrong()) };
        if namespace.is_empty() || account.is_empty() {
            return Err(wrong());
        }
        Ok(Self {
            trust_domain: TrustDomain::new(domain).map_err(|_| wrong())?,
            namespace: namespace.into(),
            service_account: account.into(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// [I.1]
    #[test]
    fn exactly_five_segments_make_an_identity() {
        let id: SpiffeId = "spiffe://cluster.local/ns/default/sa/productpage".parse().expect("valid");
        assert_eq!(id.to_string(), "spiffe://cluster.local/ns/default/sa/productpage");
        assert_eq!(id.principal(), "cluster.local/ns/default/sa/productpage");
        assert_eq!("spiffe://a@b/ns/n/sa/s".parse::<SpiffeId>().expect("valid").to_string(), "spiffe://a.b/ns/n/sa/s");
        for wrong in [
            "cluster.local/ns/default/sa/x",
            "SPIFFE://cluster.local/ns/default/sa/x",
            "spiffe://cluster.local/NS/default/sa/x",
            "spiffe://cluster.local/ns/default/sa/x/y",
            "spiffe://cluster.local/ns/default/sa/",
            "spiffe://cluster.local/ns//sa/x",
            "spiffe:///ns/default/sa/x",
            "spiffe://cluster.local/ns/default",
        ] {
            assert!(wrong.parse::<SpiffeId>().is_err(), "{wrong}");
        }
    }
}
