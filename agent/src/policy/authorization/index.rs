//! Finds the rules that could match a connection, without looking at the others.
//!
//! Every rule is entered under the values of one of its positive fields, of which one value must match if the rule is
//! to: that of which the fewest connections have one. A rule without such a field is looked at each time.

use std::{
    collections::{BTreeMap, HashMap},
    net::IpAddr,
};

use crate::model::authorization::{Attribute, truncated};

use super::rule::{Facts, Rule, Test, Values};

/// Places of rules, ascending.
type Places = Vec<u32>;

/// The rules of one pool by what they ask for.
#[derive(Debug, Default)]
pub(super) struct Index {
    texts: HashMap<Attribute, Texts>,
    addresses: HashMap<Attribute, Addresses>,
    ports: HashMap<u16, Places>,
    always: Places,
}

/// Rules by texts, and by the beginnings and ends of texts.
#[derive(Debug, Default)]
struct Texts {
    exact: HashMap<Box<str>, Places>,
    /// By length.
    prefixes: BTreeMap<usize, HashMap<Box<str>, Places>>,
    suffixes: BTreeMap<usize, HashMap<Box<str>, Places>>,
    present: Places,
}

/// Rules by address blocks: by length, IPv4 first.
#[derive(Debug, Default)]
struct Addresses([BTreeMap<u8, HashMap<IpAddr, Places>>; 2]);

impl Index {
    pub(super) fn of(rules: &[Rule]) -> Self {
        let mut index = Self::default();
        for (rule, place) in rules.iter().zip(0..) {
            match anchors(rule) {
                Some(tests) => tests.into_iter().for_each(|test| index.enter(test, place)),
                None => index.always.push(place),
            }
        }
        index
    }

    fn enter(&mut self, test: &Test, place: u32) {
        match &test.values {
            Values::Texts { present, exact, prefixes, suffixes } => {
                let texts = self.texts.entry(test.attribute).or_default();
                for text in exact {
                    push(texts.exact.entry(text.clone()).or_default(), place);
                }
                for (by_length, parts) in [(&mut texts.prefixes, prefixes), (&mut texts.suffixes, suffixes)] {
                    for part in parts {
                        let same_length = by_length.entry(part.len()).or_default();
                        push(same_length.entry(part.clone()).or_default(), place);
                    }
                }
                if *present {
                    push(&mut texts.present, place);
                }
            }
            Values::Blocks { blocks, .. } => {
                let Addresses(families) = self.addresses.entry(test.attribute).or_default();
                for (address, length) in blocks {
                    let same_length = families[usize::from(address.is_ipv6())].entry(*length).or_default();
                    push(same_length.entry(*address).or_default(), place);
                }
            }
            Values::Ports(ports) => {
                for port in ports {
                    push(self.ports.entry(*port).or_default(), place);
                }
            }
        }
    }

    /// The first of `rules` that matches.
    pub(super) fn first<'a>(&self, rules: &'a [Rule], facts: &Facts<'_>) -> Option<&'a Rule> {
        let mut best = u32::MAX;
        self.could_match(facts, |places| {
            let earlier = places.iter().take_while(|place| **place < best);
            if let Some(place) = earlier.copied().find(|place| rules[*place as usize].matches(facts)) {
                best = place;
            }
        });
        rules.get(best as usize)
    }

    /// Calls `look` with lists of rules, of which one has each rule that matches.
    fn could_match(&self, facts: &Facts<'_>, mut look: impl FnMut(&Places)) {
        look(&self.always);
        for (attribute, texts) in &self.texts {
            if let Some(text) = facts.text(*attribute) {
                texts.each(text, &mut look);
            }
        }
        for (attribute, Addresses(families)) in &self.addresses {
            let Some((address, bits)) = facts.address(*attribute) else { continue };
            for (length, blocks) in families[usize::from(address.is_ipv6())].range(..=bits) {
                blocks.get(&truncated(address, *length)).into_iter().for_each(&mut look);
            }
        }
        self.ports.get(&facts.port).into_iter().for_each(look);
    }
}

impl Texts {
    fn each(&self, text: &str, look: &mut impl FnMut(&Places)) {
        self.exact.get(text).into_iter().for_each(&mut *look);
        if !text.is_empty() {
            look(&self.present);
        }
        for (length, parts) in &self.prefixes {
            // Where the text is cut within a character, nothing that is text begins so.
            let part = text.get(..*length).and_then(|part| parts.get(part));
            part.into_iter().for_each(&mut *look);
        }
        for (length, parts) in &self.suffixes {
            let start = text.len().checked_sub(*length);
            let part = start.and_then(|start| text.get(start..)).and_then(|part| parts.get(part));
            part.into_iter().for_each(&mut *look);
        }
    }
}

/// The same rule may come twice in a row.
fn push(places: &mut Places, place: u32) {
    if places.last() != Some(&place) {
        places.push(place);
    }
}

/// Tests of which one must match if the rule is to match; of the ways that there are, the most selective.
fn anchors(rule: &Rule) -> Option<Vec<&Test>> {
    let mut ways: Vec<Vec<&Test>> = Vec::new();
    for items in [&rule.from, &rule.to].into_iter().flatten() {
        // One of each item.
        ways.extend(items.iter().map(|tests| best(tests)).collect::<Option<Vec<_>>>());
    }
    ways.extend(best(&rule.when).map(|test| vec![test]));
    ways.into_iter().min_by_key(|tests| tests.iter().map(|test| commonness(test)).max())
}

fn best(tests: &[Test]) -> Option<&Test> {
    tests.iter().filter(|test| !test.negative).min_by_key(|test| commonness(test))
}

/// How many connections have such a value, roughly: a rank.
fn commonness(test: &Test) -> u32 {
    if let Values::Texts { present: true, .. } = test.values {
        return 9;
    }
    match test.attribute {
        Attribute::Principal | Attribute::ServiceAccount => 0,
        Attribute::SourceIp => 1,
        Attribute::Namespace => 2,
        Attribute::DestinationPort => 3,
        Attribute::TrustDomain => 4,
        // It is the workload's own, so it is of all its connections or of none.
        Attribute::DestinationIp => 5,
    }
}

#[cfg(test)]
mod tests {
    use super::{super::rule::Trust, *};
    use crate::model::{
        MeshConfig, SpiffeId,
        authorization::{self, Match},
    };

    fn field(name: &'static str, attribute: Attribute, value: String) -> Match {
        Match { name: name.into(), attribute: Some(attribute), negative: false, values: vec![value] }
    }

    /// Whatever the field that rules tell their connections apart by: of 10 000 rules, those are looked at that have the
    /// connection's value, and not one more.
    #[test]
    fn rules_that_cannot_match_are_not_looked_at() {
        const RULES: usize = 10_000;
        let of = |number: usize, way: usize| {
            let own = |prefix: &str| format!("{prefix}{number}");
            let one = match way {
                0 => field("principals", Attribute::Principal, own("cluster.local/ns/test/sa/a")),
                1 => field("principals", Attribute::Principal, format!("*/ns/test/sa/a{number}")),
                2 => field("principals", Attribute::Principal, format!("cluster.local/ns/test{number}/*")),
                3 => field("namespaces", Attribute::Namespace, own("test")),
                4 => field("serviceAccounts", Attribute::ServiceAccount, own("test/a")),
                _ => {
                    let (high, low) = (number / 256, number % 256);
                    field("ipBlocks", Attribute::SourceIp, format!("10.{high}.{low}.0/24"))
                }
            };
            let port = field("ports", Attribute::DestinationPort, "80".to_owned());
            authorization::Rule { from: Some(vec![vec![one]]), to: Some(vec![vec![port]]), ..Default::default() }
        };
        let trust = Trust::of(&MeshConfig::default());
        let client: SpiffeId = "spiffe://cluster.local/ns/test77/sa/a77".parse().expect("valid");
        let here: SpiffeId = "spiffe://cluster.local/ns/test/sa/a77".parse().expect("valid");
        let facts = |id| Facts::new(Some(id), "10.0.77.1".parse().ok(), None, 80);
        for way in 0..6 {
            let compile = |number| Rule::compile(0, number, &of(number, way), "test", &trust).0;
            let rules: Vec<Rule> = (0..RULES).map(compile).collect();
            let index = Index::of(&rules);
            // Ways 2 and 3 tell clients apart by their namespace.
            let facts = facts(if matches!(way, 2 | 3) { &client } else { &here });
            let mut looked_at = 0;
            index.could_match(&facts, |places| looked_at += places.len());
            assert_eq!(looked_at, 1, "way {way}");
            assert_eq!(index.first(&rules, &facts).map(|rule| rule.number), Some(77), "way {way}");
        }
    }
}
