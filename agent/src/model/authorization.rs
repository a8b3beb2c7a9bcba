//! AuthorizationPolicy as the user wrote it (specification §6), and what single values of it mean.
//!
//! Values stay texts: a policy whose source has stored it although a value cannot be read is compiled with that value as
//! one that cannot be evaluated (specification §6.4), and never with the value left out.

use std::{
    borrow::Cow,
    fmt,
    net::{IpAddr, Ipv4Addr},
};

use super::{Age, Labels, ObjectRef};

/// An AuthorizationPolicy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AuthorizationPolicy {
    /// Where it stands in the age order, and its name.
    pub age: Age,
    /// `spec.selector.matchLabels`; absent and empty mean the same ([C.4]).
    pub selector: Labels,
    /// The selector was written, but empty: worth a warning ([C.4]).
    pub selector_written_empty: bool,
    /// Label `istio.io/rev` ([C.5]).
    pub revision: Option<String>,
    /// `spec.targetRef` or `spec.targetRefs` names something: for the HTTP proxy of that, and nobody else ([AP.2]).
    pub has_targets: bool,
    /// `spec.action`.
    pub action: Action,
    /// Annotation `istio.io/dry-run` is true ([AP.6]).
    pub dry_run: bool,
    /// `spec.rules`; absent and empty mean the same where a policy without rules is valid.
    pub rules: Vec<Rule>,
}

/// What a policy does with what it matches.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Action {
    /// Allows it, and makes everything else that nobody allows denied.
    #[default]
    Allow,
    /// Denies it.
    Deny,
    /// Reports it ([AP.5]).
    Audit,
    /// Asks an external authorizer, which needs an HTTP proxy ([AP.7]).
    Custom,
}

/// One rule: any of `from`, and any of `to`, and all of `when` ([AP.8]).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rule {
    /// Sources; `None` is any. An empty list, or a source without fields, is not valid.
    pub from: Option<Vec<Vec<Match>>>,
    /// Operations, likewise.
    pub to: Option<Vec<Vec<Match>>>,
    /// Conditions; the values and the notValues of one are a [`Match`] each.
    pub when: Vec<Match>,
    /// Paths of fields that could not be read at all, where the rest is kept because it may restrict ([C.8]).
    pub unreadable: Vec<String>,
}

/// One field with its values, of which one is to match, or none if it is negative.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Match {
    /// The field, or the key of a condition, as it was written.
    pub name: Cow<'static, str>,
    /// What is compared; `None` for what an L4 agent cannot see, or does not know (specification §6.4).
    pub attribute: Option<Attribute>,
    /// A `not…` form.
    pub negative: bool,
    /// What it is compared with, as written. Empty only where a condition has neither values nor notValues.
    pub values: Vec<String>,
}

/// What an L4 agent knows of a connection (specification §6.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Attribute {
    /// The peer's identity without `spiffe://`.
    Principal,
    /// The namespace of the peer's identity.
    Namespace,
    /// Namespace and service account of the peer's identity.
    ServiceAccount,
    /// The trust domain of the peer's identity.
    TrustDomain,
    /// The TCP source address that the server's side sees.
    SourceIp,
    /// The workload's port.
    DestinationPort,
    /// The workload's address.
    DestinationIp,
}

impl AuthorizationPolicy {
    /// Its namespace and name.
    pub fn object(&self) -> ObjectRef {
        ObjectRef { namespace: self.age.namespace.clone(), name: self.age.name.clone() }
    }
}

impl Action {
    /// As the resource spells it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Allow => "ALLOW",
            Self::Deny => "DENY",
            Self::Audit => "AUDIT",
            Self::Custom => "CUSTOM",
        }
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What the key of a condition says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConditionKey {
    /// Something that an L4 agent knows.
    Known(Attribute),
    /// A valid key that needs an HTTP proxy, or more of TLS than is seen here.
    NeedsProxy,
    /// No key at all.
    Unknown,
}

impl ConditionKey {
    /// Keys that an L4 agent evaluates, for remedies.
    pub const KNOWN: [(&'static str, Attribute); 7] = [
        ("source.ip", Attribute::SourceIp),
        ("source.namespace", Attribute::Namespace),
        ("source.principal", Attribute::Principal),
        ("source.serviceAccount", Attribute::ServiceAccount),
        ("source.trustDomain", Attribute::TrustDomain),
        ("destination.ip", Attribute::DestinationIp),
        ("destination.port", Attribute::DestinationPort),
    ];

    /// Reads a key.
    pub fn of(key: &str) -> Self {
        if let Some((_, attribute)) = Self::KNOWN.iter().find(|(known, _)| *known == key) {
            return Self::Known(*attribute);
        }
        let bracketed = |prefix: &str| {
            key.strip_prefix(prefix).is_some_and(|rest| rest.len() > 2 && rest.starts_with('[') && rest.ends_with(']'))
        };
        let plain = [
            "remote.ip",
            "connection.sni",
            "request.auth.principal",
            "request.auth.audiences",
            "request.auth.presenter",
        ];
        let experimental = key.strip_prefix("experimental.").is_some_and(|rest| !rest.is_empty());
        match plain.contains(&key) || bracketed("request.headers") || bracketed("request.auth.claims") || experimental {
            true => Self::NeedsProxy,
            false => Self::Unknown,
        }
    }
}

/// A port of a policy: decimal digits, 1 to 65535.
pub fn port(text: &str) -> Option<u16> {
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    text.parse::<u16>().ok().filter(|port| digits && *port != 0)
}

/// An address block of a policy: an address or a CIDR, whose host bits are ignored; IPv4 mapped into IPv6 is IPv4
/// ([AP.11]). The address returned has no host bits.
pub fn block(text: &str) -> Option<(IpAddr, u8)> {
    let (address, length) = match text.split_once('/') {
        None => {
            let address: IpAddr = text.parse().ok()?;
            (address, if address.is_ipv4() { 32 } else { 128 })
        }
        Some((address, length)) => {
            let digits = !length.is_empty() && length.bytes().all(|byte| byte.is_ascii_digit());
            (address.parse().ok()?, length.parse::<u8>().ok().filter(|_| digits)?)
        }
    };
    match address {
        IpAddr::V4(_) if length > 32 => None,
        IpAddr::V6(_) if length > 128 => None,
        IpAddr::V6(v6) if length >= 96 && v6.to_ipv4_mapped().is_some() => {
            let v4: Ipv4Addr = v6.to_ipv4_mapped()?;
            Some((truncated(v4.into(), length - 96), length - 96))
        }
        address => Some((truncated(address, length), length)),
    }
}

/// The address without the bits after the first `length`.
pub fn truncated(address: IpAddr, length: u8) -> IpAddr {
    match address {
        IpAddr::V4(v4) => {
            let mask = u32::MAX.checked_shl(32_u32.saturating_sub(length.into())).unwrap_or(0);
            IpAddr::V4((v4.to_bits() & mask).into())
        }
        IpAddr::V6(v6) => {
            let mask = u128::MAX.checked_shl(128_u32.saturating_sub(length.into())).unwrap_or(0);
            IpAddr::V6((v6.to_bits() & mask).into())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// §6.3: decimal strings.
    #[test]
    fn ports_are_decimal_numbers() {
        for (text, expected) in [
            ("80", Some(80)),
            ("65535", Some(65535)),
            ("080", Some(80)),
            ("0", None),
            ("65536", None),
            ("http", None),
            ("+80", None),
            ("-1", None),
            ("", None),
            (" 80", None),
            ("80-90", None),
        ] {
            assert_eq!(port(text), expected, "{text:?}");
        }
    }

    /// [AP.11]
    #[test]
    fn blocks_ignore_host_bits_and_map_families() {
        let ip = |text: &str| text.parse::<IpAddr>().expect("an address of a test");
        for (text, expected) in [
            ("10.1.2.3/8", Some((ip("10.0.0.0"), 8))),
            ("10.1.2.3", Some((ip("10.1.2.3"), 32))),
            ("0.0.0.0/0", Some((ip("0.0.0.0"), 0))),
            ("1.2.3.4/0", Some((ip("0.0.0.0"), 0))),
            ("2001:db8::1/32", Some((ip("2001:db8::"), 32))),
            ("::1", Some((ip("::1"), 128))),
            ("ff::/0", Some((ip("::"), 0))),
            ("::ffff:10.1.2.3", Some((ip("10.1.2.3"), 32))),
            ("::ffff:10.1.2.3/104", Some((ip("10.0.0.0"), 8))),
            // Shorter than the mapped prefix: a block of IPv6 addresses.
            ("::ffff:10.1.2.3/90", Some((ip("::ffc0:0:0"), 90))),
            ("10.0.0.0/33", None),
            ("::/129", None),
            ("10.0.0.0/", None),
            ("10.0.0.0/+8", None),
            ("10.0.0/8", None),
            ("localhost", None),
            ("", None),
        ] {
            assert_eq!(block(text), expected, "{text:?}");
        }
    }

    /// §6.4, §6.6
    #[test]
    fn keys_are_known_or_need_a_proxy_or_do_not_exist() {
        for (key, expected) in [
            ("source.ip", ConditionKey::Known(Attribute::SourceIp)),
            ("source.trustDomain", ConditionKey::Known(Attribute::TrustDomain)),
            ("request.headers[x-a]", ConditionKey::NeedsProxy),
            ("request.auth.claims[a][b]", ConditionKey::NeedsProxy),
            ("remote.ip", ConditionKey::NeedsProxy),
            ("experimental.envoy.filters.network.mysql_proxy[db.table]", ConditionKey::NeedsProxy),
            ("request.headers", ConditionKey::Unknown),
            ("request.headers[]", ConditionKey::Unknown),
            ("source.port", ConditionKey::Unknown),
            ("Source.ip", ConditionKey::Unknown),
            ("", ConditionKey::Unknown),
        ] {
            assert_eq!(ConditionKey::of(key), expected, "{key:?}");
        }
    }
}
