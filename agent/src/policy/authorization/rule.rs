//! One compiled rule: parsed values, trust domains expanded, and whether it matches a connection ([AP.8] to [AP.12]).

use std::{
    collections::{BTreeSet, HashSet},
    net::IpAddr,
};

use crate::model::{
    MeshConfig, SpiffeId,
    authorization::{self, Attribute, Match, block, port, truncated},
};

/// What is known of a connection, as rules compare it.
#[derive(Debug)]
pub(in crate::policy) struct Facts<'a> {
    /// Nothing without a verified certificate ([AP.10]).
    pub(super) peer: Option<PeerFacts<'a>>,
    /// In canonical form.
    pub(super) source_ip: Option<IpAddr>,
    /// How many bits of it are known: all of an address; less where it stands for a block's addresses that are in no smaller
    /// block that a rule names.
    pub(super) source_bits: u8,
    /// In canonical form.
    pub(super) destination_ip: Option<IpAddr>,
    pub(super) port: u16,
}

#[derive(Debug)]
pub(super) struct PeerFacts<'a> {
    pub(super) principal: String,
    pub(super) namespace: &'a str,
    pub(super) account: String,
    pub(super) trust_domain: &'a str,
}

impl<'a> Facts<'a> {
    pub(in crate::policy) fn new(
        identity: Option<&'a SpiffeId>,
        source_ip: Option<IpAddr>,
        destination_ip: Option<IpAddr>,
        port: u16,
    ) -> Self {
        let peer = identity.map(|id| PeerFacts {
            principal: id.principal(),
            namespace: &id.namespace,
            account: format!("{}/{}", id.namespace, id.service_account),
            trust_domain: id.trust_domain.as_str(),
        });
        let canonical = |ip: IpAddr| ip.to_canonical();
        let (source_ip, destination_ip) = (source_ip.map(canonical), destination_ip.map(canonical));
        Self { peer, source_ip, source_bits: u8::MAX, destination_ip, port }
    }

    /// Of a client in plaintext whose address is in this block, and in no smaller one that a rule names.
    pub(super) fn plaintext((base, length): (IpAddr, u8), destination_ip: Option<IpAddr>, port: u16) -> Self {
        Self { source_bits: length, ..Self::new(None, Some(base), destination_ip, port) }
    }

    pub(super) fn text(&self, attribute: Attribute) -> Option<&str> {
        let peer = self.peer.as_ref()?;
        match attribute {
            Attribute::Principal => Some(&peer.principal),
            Attribute::Namespace => Some(peer.namespace),
            Attribute::ServiceAccount => Some(&peer.account),
            Attribute::TrustDomain => Some(peer.trust_domain),
            Attribute::SourceIp | Attribute::DestinationPort | Attribute::DestinationIp => None,
        }
    }

    /// The address, and how many of its bits are known.
    pub(super) fn address(&self, attribute: Attribute) -> Option<(IpAddr, u8)> {
        match attribute {
            Attribute::SourceIp => Some((self.source_ip?, self.source_bits)),
            Attribute::DestinationIp => Some((self.destination_ip?, u8::MAX)),
            Attribute::Principal
            | Attribute::Namespace
            | Attribute::ServiceAccount
            | Attribute::TrustDomain
            | Attribute::DestinationPort => None,
        }
    }
}

/// The mesh's trust domain and its aliases: one set, whichever is written ([AP.12]).
#[derive(Debug, Default, PartialEq, Eq)]
pub(in crate::policy) struct Trust {
    domains: Vec<String>,
}

impl Trust {
    pub(super) fn of(mesh: &MeshConfig) -> Self {
        let all = std::iter::once(&mesh.trust_domain).chain(&mesh.trust_domain_aliases);
        let mut domains: Vec<String> = Vec::new();
        for domain in all {
            if !domains.iter().any(|known| known == domain.as_str()) {
                domains.push(domain.as_str().to_owned());
            }
        }
        Self { domains }
    }

    fn principals(&self, value: &str) -> Vec<String> {
        let keep = || vec![value.to_owned()];
        let (Some((first, rest)), 5) = (value.split_once('/'), value.split('/').count()) else { return keep() };
        if first == "*" {
            return keep();
        }
        let ours = first == "cluster.local" || self.domains.iter().any(|domain| Pattern::of(first).matches(domain));
        if !ours {
            return keep();
        }
        let mut values = Vec::new();
        for domain in &self.domains {
            // What begins with a wildcard stays for the domains that it matches already.
            let stays = first.strip_prefix('*').is_some_and(|suffix| domain.ends_with(suffix));
            let value = if stays { value.to_owned() } else { format!("{domain}/{rest}") };
            if !values.contains(&value) {
                values.push(value);
            }
        }
        values
    }

    fn trust_domains(&self, value: &str) -> Vec<String> {
        match self.domains.iter().any(|domain| domain == value) {
            true => self.domains.clone(),
            false => vec![value.to_owned()],
        }
    }
}

/// A value with its wildcard ([AP.9]); a leading one is looked at first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Pattern<'a> {
    Present,
    Suffix(&'a str),
    Prefix(&'a str),
    Exact(&'a str),
}

impl<'a> Pattern<'a> {
    pub(super) fn of(value: &'a str) -> Self {
        match (value.strip_prefix('*'), value.strip_suffix('*')) {
            (Some(""), _) => Self::Present,
            (Some(suffix), _) => Self::Suffix(suffix),
            (None, Some(prefix)) => Self::Prefix(prefix),
            (None, None) => Self::Exact(value),
        }
    }

    fn matches(&self, text: &str) -> bool {
        match self {
            Self::Present => !text.is_empty(),
            Self::Suffix(suffix) => text.ends_with(suffix),
            Self::Prefix(prefix) => text.starts_with(prefix),
            Self::Exact(exact) => text == *exact,
        }
    }
}

/// The values of one field, fit to be asked quickly.
#[derive(Debug)]
pub(super) enum Values {
    Texts {
        present: bool,
        exact: HashSet<Box<str>>,
        prefixes: Vec<Box<str>>,
        suffixes: Vec<Box<str>>,
    },
    Blocks {
        blocks: HashSet<(IpAddr, u8)>,
        /// Lengths that there are, by family: IPv4 first.
        lengths: [BTreeSet<u8>; 2],
    },
    Ports(BTreeSet<u16>),
}

/// One field of a rule.
#[derive(Debug)]
pub(super) struct Test {
    pub(super) attribute: Attribute,
    pub(super) negative: bool,
    pub(super) values: Values,
}

/// A rule of which every part can be evaluated; what could not be is in [`Rule::assumed`].
#[derive(Debug, Default)]
pub(super) struct Rule {
    /// Place of its policy in the layer.
    pub(super) policy: usize,
    /// Its place in the policy.
    pub(super) number: usize,
    /// Any of them, each with all its tests; `None` is any source at all.
    pub(super) from: Option<Vec<Vec<Test>>>,
    /// Likewise.
    pub(super) to: Option<Vec<Vec<Test>>>,
    /// All of them.
    pub(super) when: Vec<Test>,
    /// Names of what counts as matched because it cannot be seen ([AP.14]).
    pub(super) assumed: Vec<String>,
}

impl Rule {
    /// The rule, and the names of what cannot be evaluated in it (specification §6.4). Where there are such, the rule is
    /// only good for an action that takes them as matched.
    pub(super) fn compile(
        policy: usize,
        number: usize,
        written: &authorization::Rule,
        namespace: &str,
        trust: &Trust,
    ) -> (Self, Vec<String>) {
        let mut unseen: Vec<String> = written.unreadable.clone();
        let mut items = |list: &Option<Vec<Vec<Match>>>, name: &str| {
            let list = list.as_ref()?;
            if list.iter().any(Vec::is_empty) || list.is_empty() {
                unseen.push(format!("an empty {name}"));
            }
            if list.is_empty() {
                return None;
            }
            let tests = |item: &Vec<Match>| {
                // A service account says namespace and name; together with either it says nothing that is defined.
                let other = |one: &Match| matches!(one.attribute, Some(Attribute::Principal | Attribute::Namespace));
                let combined = item.iter().any(other);
                let mut all = Vec::new();
                for one in item {
                    let refused = combined && one.attribute == Some(Attribute::ServiceAccount);
                    match Test::of(one, namespace, trust).filter(|_| !refused) {
                        Some(test) => all.push(test),
                        None => unseen.push(one.name.to_string()),
                    }
                }
                all
            };
            Some(list.iter().map(tests).collect())
        };
        let from = items(&written.from, "from");
        let to = items(&written.to, "to");
        let mut when = Vec::new();
        for one in &written.when {
            match Test::of(one, namespace, trust) {
                Some(test) => when.push(test),
                None => unseen.push(one.name.to_string()),
            }
        }
        let mut named = HashSet::new();
        unseen.retain(|name| named.insert(name.clone()));
        (Self { policy, number, from, to, when, assumed: Vec::new() }, unseen)
    }

    /// Whether its answer depends on this attribute.
    pub(super) fn asks_for(&self, attribute: Attribute) -> bool {
        let items = [&self.from, &self.to].into_iter().flatten().flatten();
        items.flatten().chain(&self.when).any(|test| test.attribute == attribute)
    }

    /// The tests that a client without identity can pass, of a rule that such a client can match; else nothing ([AP.10]).
    pub(super) fn for_plaintext(&self) -> Vec<&Test> {
        let passable = |tests: &&Vec<Test>| !tests.iter().any(|test| test.needs_identity());
        let mut all: Vec<&Test> = self.when.iter().collect();
        for items in [&self.from, &self.to].into_iter().flatten() {
            let mut items = items.iter().filter(passable).peekable();
            if items.peek().is_none() {
                return Vec::new();
            }
            all.extend(items.flatten());
        }
        if passable(&&self.when) { all } else { Vec::new() }
    }

    /// [AP.8]
    pub(super) fn matches(&self, facts: &Facts<'_>) -> bool {
        let any = |list: &Option<Vec<Vec<Test>>>| match list {
            None => true,
            Some(items) => items.iter().any(|tests| tests.iter().all(|test| test.matches(facts))),
        };
        any(&self.from) && any(&self.to) && self.when.iter().all(|test| test.matches(facts))
    }
}

impl Test {
    /// `None` if the field, or one of its values, cannot be evaluated.
    fn of(written: &Match, namespace: &str, trust: &Trust) -> Option<Self> {
        let attribute = written.attribute?;
        if written.values.is_empty() || written.values.iter().any(String::is_empty) {
            return None;
        }
        let values = match attribute {
            Attribute::Principal => Values::texts(written.values.iter().flat_map(|value| trust.principals(value))),
            Attribute::TrustDomain => Values::texts(written.values.iter().flat_map(|value| trust.trust_domains(value))),
            Attribute::Namespace => Values::texts(written.values.iter().cloned()),
            Attribute::ServiceAccount => {
                let accounts = written.values.iter().map(|value| account(value, namespace));
                Values::exact(accounts.collect::<Option<_>>()?)
            }
            Attribute::SourceIp | Attribute::DestinationIp => {
                Values::blocks(written.values.iter().map(|value| block(value)).collect::<Option<_>>()?)
            }
            Attribute::DestinationPort => {
                Values::Ports(written.values.iter().map(|value| port(value)).collect::<Option<_>>()?)
            }
        };
        Some(Self { attribute, negative: written.negative, values })
    }

    /// Whether nobody without an identity can pass it.
    fn needs_identity(&self) -> bool {
        let of_peer = match self.attribute {
            Attribute::Principal | Attribute::Namespace | Attribute::ServiceAccount | Attribute::TrustDomain => true,
            Attribute::SourceIp | Attribute::DestinationPort | Attribute::DestinationIp => false,
        };
        of_peer && !self.negative
    }

    /// What is not known matches no value, and so every negative form ([AP.10]).
    fn matches(&self, facts: &Facts<'_>) -> bool {
        self.values.contain(self.attribute, facts) != self.negative
    }
}

impl Values {
    fn texts(values: impl Iterator<Item = String>) -> Self {
        let (mut present, mut exact) = (false, HashSet::new());
        let (mut prefixes, mut suffixes) = (Vec::new(), Vec::new());
        for value in values {
            match Pattern::of(&value) {
                Pattern::Present => present = true,
                Pattern::Suffix(suffix) => suffixes.push(suffix.into()),
                Pattern::Prefix(prefix) => prefixes.push(prefix.into()),
                Pattern::Exact(value) => drop(exact.insert(value.into())),
            }
        }
        Self::Texts { present, exact, prefixes, suffixes }
    }

    fn exact(exact: HashSet<Box<str>>) -> Self {
        Self::Texts { present: false, exact, prefixes: Vec::new(), suffixes: Vec::new() }
    }

    fn blocks(blocks: HashSet<(IpAddr, u8)>) -> Self {
        let mut lengths = [BTreeSet::new(), BTreeSet::new()];
        for (address, length) in &blocks {
            lengths[usize::from(address.is_ipv6())].insert(*length);
        }
        Self::Blocks { blocks, lengths }
    }

    fn contain(&self, attribute: Attribute, facts: &Facts<'_>) -> bool {
        match self {
            Self::Texts { present, exact, prefixes, suffixes } => {
                let Some(text) = facts.text(attribute) else { return false };
                exact.contains(text)
                    || (*present && !text.is_empty())
                    || prefixes.iter().any(|prefix| text.starts_with(&**prefix))
                    || suffixes.iter().any(|suffix| text.ends_with(&**suffix))
            }
            Self::Blocks { blocks, lengths } => {
                let Some((address, bits)) = facts.address(attribute) else { return false };
                let lengths = lengths[usize::from(address.is_ipv6())].range(..=bits);
                lengths.into_iter().any(|length| blocks.contains(&(truncated(address, *length), *length)))
            }
            Self::Ports(ports) => ports.contains(&facts.port),
        }
    }
}

/// `namespace/name`; a bare name is in the policy's own namespace. No wildcards.
fn account(value: &str, namespace: &str) -> Option<Box<str>> {
    if value.contains('*') {
        return None;
    }
    match value.split_once('/') {
        None => Some(format!("{namespace}/{value}").into()),
        Some((namespace, name)) if namespace.is_empty() || name.is_empty() || name.contains('/') => None,
        Some(_) => Some(value.into()),
    }
}

/// Principals that are written as SPIFFE IDs, which no principal is (specification §6.3).
pub(super) fn spiffe_principals(rule: &authorization::Rule) -> impl Iterator<Item = &String> {
    let items = rule.from.iter().flatten().flatten().chain(&rule.when);
    let principals = items.filter(|one| one.attribute == Some(Attribute::Principal));
    principals.flat_map(|one| &one.values).filter(|value| value.starts_with("spiffe://"))
}
