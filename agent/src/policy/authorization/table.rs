//! What a pod's policies say of plaintext, as a table that the kernel can look up: classes of client addresses, classes of
//! ports, and for each pair of them a verdict.
//!
//! A client in plaintext has no identity, so a rule can tell two of them apart by address and port alone ([AP.10]). The table
//! is made by asking the same rules as every other verdict, once for each block of addresses and each port that they name:
//! there is no second way of matching. Writing it into the maps is for `datapath`.

use std::{
    collections::{BTreeSet, HashMap},
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use culvert_common::Reason;

use crate::model::authorization::{Attribute, truncated};

use super::{
    super::{RuleId, decide::conclude},
    Authorization, Kind, RuleRef,
    rule::{Facts, Values},
};

/// Address blocks that the rules of one pod may name.
pub const MAX_BLOCKS: usize = 4096;
/// Pairs of a block and a port that are looked at for one table: its making is bounded.
pub const MAX_CELLS: usize = 16384;
/// Verdicts in one table: pairs of classes.
pub const MAX_DECISIONS: usize = 4096;

/// Every address of a family.
const ALL: [(IpAddr, u8); 2] = [(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0), (IpAddr::V6(Ipv6Addr::UNSPECIFIED), 0)];

/// Verdicts about plaintext to a pod, by the client's address and the pod's port. Equal tables decide alike.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Table {
    /// Blocks of addresses and the class of the addresses of which a block is the smallest; sorted, and with one for each
    /// whole family.
    pub sources: Vec<((IpAddr, u8), u32)>,
    /// Ports with their classes, sorted; port 0, the first, is every port that is not named.
    pub ports: Vec<(u16, u32)>,
    /// By class of the address, then by class of the port.
    pub decisions: Vec<Vec<Decision>>,
}

/// A verdict that policies give about plaintext.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Decision {
    /// `no-allow-policies`, `allow-match`, `no-allow-match` or `explicit-deny`.
    pub reason: Reason,
    /// The rule that decides; 0 for none.
    pub rule: RuleId,
}

/// Policies that make no table: the agent gives the verdicts on plaintext.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TooLarge {
    /// So many blocks.
    Blocks(usize),
    /// So many pairs of blocks and ports.
    Cells {
        /// Blocks that are named.
        blocks: usize,
        /// Ports that are named.
        ports: usize,
    },
    /// So many verdicts that differ.
    Decisions(usize),
    /// The pod has several addresses of one family, and rules treat them differently.
    Addresses,
}

impl fmt::Display for TooLarge {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Blocks(blocks) => write!(
                f,
                "the rules that can match plaintext name {blocks} address blocks, and the kernel takes {MAX_BLOCKS}: name \
                 fewer and larger blocks"
            ),
            Self::Cells { blocks, ports } => write!(
                f,
                "the rules that can match plaintext name {blocks} address blocks and {ports} ports, and the kernel takes \
                 {MAX_CELLS} pairs of them: name fewer of either"
            ),
            Self::Decisions(decisions) => write!(
                f,
                "the rules that can match plaintext make {decisions} verdicts that differ by address or port, and the kernel \
                 takes {MAX_DECISIONS}: merge rules that say the same"
            ),
            Self::Addresses => f.write_str(
                "rules compare destination.ip, and the pod has several addresses of one family that they treat \
                 differently: name all of them, or none",
            ),
        }
    }
}

impl Table {
    /// The verdict about a client's address and a port.
    pub fn decide(&self, source: IpAddr, port: u16) -> Decision {
        let source = source.to_canonical();
        let holds =
            |(base, length): (IpAddr, u8)| base.is_ipv4() == source.is_ipv4() && truncated(source, length) == base;
        // Sorted, so that the last of those that have it is the smallest.
        let class = self.sources.iter().rfind(|(block, _)| holds(*block)).map_or(0, |(_, class)| *class);
        let named = self.ports.binary_search_by_key(&port, |(port, _)| *port).unwrap_or_default();
        self.decisions[class as usize][self.ports[named].1 as usize]
    }
}

impl Authorization {
    /// What these policies say of plaintext to a pod with these addresses; nothing where it is `no-allow-policies` for
    /// everybody. `number` knows the numbers of rules.
    ///
    /// # Errors
    /// More than a table may hold.
    pub fn plaintext(&self, ips: &[IpAddr], number: impl Fn(&RuleRef) -> RuleId) -> Result<Option<Table>, TooLarge> {
        let (mut blocks, mut ports) = (BTreeSet::from(ALL), BTreeSet::from([0]));
        for test in self.enforced().flat_map(|rule| rule.for_plaintext()) {
            match (&test.values, test.attribute) {
                (Values::Blocks { blocks: named, .. }, Attribute::SourceIp) => blocks.extend(named),
                (Values::Ports(named), _) => ports.extend(named),
                (Values::Blocks { .. } | Values::Texts { .. }, _) => {}
            }
        }
        if blocks.len() > MAX_BLOCKS + ALL.len() {
            return Err(TooLarge::Blocks(blocks.len() - ALL.len()));
        }
        if blocks.len() * ports.len() > MAX_CELLS {
            return Err(TooLarge::Cells { blocks: blocks.len() - ALL.len(), ports: ports.len() - 1 });
        }
        let mut rows: Classes<Vec<Decision>> = Classes::default();
        let mut classes = Vec::with_capacity(blocks.len());
        for block in &blocks {
            let row = ports.iter().map(|port| self.of_block(*block, *port, ips, &number)).collect::<Result<_, _>>()?;
            classes.push((*block, rows.of(row)));
        }
        // Ports that no class of addresses tells apart are one class.
        let mut columns: Classes<Vec<Decision>> = Classes::default();
        let mut named = Vec::with_capacity(ports.len());
        for (place, port) in ports.iter().enumerate() {
            named.push((*port, columns.of(rows.all.iter().map(|row| row[place]).collect())));
        }
        let others = named[0].1;
        named.retain(|(port, class)| *port == 0 || *class != others);
        let decisions: Vec<Vec<Decision>> =
            (0..rows.all.len()).map(|class| columns.all.iter().map(|column| column[class]).collect()).collect();
        if rows.all.len() * columns.all.len() > MAX_DECISIONS {
            return Err(TooLarge::Decisions(rows.all.len() * columns.all.len()));
        }
        let open = Decision { reason: Reason::NoAllowPolicies, rule: RuleId(0) };
        Ok(match decisions.as_slice() {
            [row] if row[..] == [open] => None,
            _ => Some(Table { sources: without_repetition(classes), ports: named, decisions }),
        })
    }

    /// The verdict about addresses of this block that are in no smaller one.
    fn of_block(
        &self,
        block: (IpAddr, u8),
        port: u16,
        ips: &[IpAddr],
        number: &impl Fn(&RuleRef) -> RuleId,
    ) -> Result<Decision, TooLarge> {
        let decide = |destination: Option<IpAddr>| {
            let facts = Facts::plaintext(block, destination, port);
            let (deny, allow) = (self.first(Kind::Deny, &facts), self.first(Kind::Allow, &facts));
            let (reason, rule) = conclude(deny.as_ref(), self.has(Kind::Allow), allow.as_ref());
            Decision { reason, rule: rule.map(|rule| number(&rule.name())).unwrap_or_default() }
        };
        if !self.asks_for_destination_ip() {
            return Ok(decide(None));
        }
        // Both ends of a connection are of one family.
        let own = ips.iter().map(|ip| ip.to_canonical()).filter(|ip| ip.is_ipv4() == block.0.is_ipv4());
        let mut decisions = own.map(|ip| decide(Some(ip)));
        let Some(first) = decisions.next() else { return Ok(decide(None)) };
        if decisions.all(|other| other == first) { Ok(first) } else { Err(TooLarge::Addresses) }
    }
}

/// Numbers things in the order in which they come, equal ones alike.
struct Classes<T> {
    numbers: HashMap<T, u32>,
    all: Vec<T>,
}

impl<T> Default for Classes<T> {
    fn default() -> Self {
        Self { numbers: HashMap::new(), all: Vec::new() }
    }
}

impl<T: Clone + Eq + std::hash::Hash> Classes<T> {
    fn of(&mut self, one: T) -> u32 {
        let next = u32::try_from(self.all.len()).expect("fewer than there are cells");
        *self.numbers.entry(one).or_insert_with_key(|one| {
            self.all.push(one.clone());
            next
        })
    }
}

/// Leaves out blocks whose addresses have the class of what is around them. `classes` is sorted: what is around a block comes
/// before it.
fn without_repetition(classes: Vec<((IpAddr, u8), u32)>) -> Vec<((IpAddr, u8), u32)> {
    let mut kept: Vec<((IpAddr, u8), u32)> = Vec::new();
    // Those that are around the one that is looked at, by their places.
    let mut around: Vec<usize> = Vec::new();
    for ((base, length), class) in classes {
        let holds = |place: &usize| {
            let (outer, bits) = kept[*place].0;
            outer.is_ipv4() == base.is_ipv4() && bits <= length && truncated(base, bits) == outer
        };
        while around.last().is_some_and(|place| !holds(place)) {
            around.pop();
        }
        if around.last().is_some_and(|place| kept[*place].1 == class) {
            continue;
        }
        around.push(kept.len());
        kept.push(((base, length), class));
    }
    kept
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::{
        model::{
            Age, AuthorizationPolicy, ObjectRef,
            authorization::{Action, Match, Rule},
        },
        policy::{Options, Snapshot, Workload, compile, testing},
    };

    fn ip(text: &str) -> IpAddr {
        text.parse().expect("an address of a test")
    }

    fn field(attribute: Attribute, values: impl IntoIterator<Item = String>) -> Match {
        Match { name: "x".into(), attribute: Some(attribute), negative: false, values: values.into_iter().collect() }
    }

    fn from(attribute: Attribute, values: impl IntoIterator<Item = String>) -> Rule {
        Rule { from: Some(vec![vec![field(attribute, values)]]), ..Rule::default() }
    }

    fn when(rule: Rule, attribute: Attribute, values: impl IntoIterator<Item = String>) -> Rule {
        Rule { when: vec![field(attribute, values)], ..rule }
    }

    /// A pod with two IPv4 addresses and one of IPv6, and these policies, the oldest first.
    fn compiled(policies: Vec<(Action, Vec<Rule>)>) -> (Snapshot, Arc<Workload>) {
        let mut cluster = testing::cluster();
        let mut pod = testing::pod("test", "nginx", "10.0.0.1");
        pod.ips = vec![ip("10.0.0.1"), ip("10.0.0.2"), ip("fd00::1")];
        testing::Put::put(&mut cluster, pod);
        for (number, (action, rules)) in policies.into_iter().enumerate() {
            let name: Arc<str> = format!("p{number}").into();
            let object = ObjectRef { namespace: "test".into(), name: name.clone() };
            let policy = AuthorizationPolicy {
                age: Age { created: i64::try_from(number).expect("few"), name, namespace: "test".into() },
                selector: Default::default(),
                selector_written_empty: false,
                revision: None,
                has_targets: false,
                action,
                dry_run: false,
                rules,
            };
            cluster.authorization_policies.insert(object, Arc::new(policy));
        }
        let snapshot = compile(&cluster, &Options::default(), None);
        let workload = snapshot.workloads.values().next().expect("the pod").clone();
        (snapshot, workload)
    }

    fn table(policies: Vec<(Action, Vec<Rule>)>, ips: &[&str]) -> Result<Option<Table>, TooLarge> {
        let (snapshot, workload) = compiled(policies);
        let ips: Vec<IpAddr> = ips.iter().map(|text| ip(text)).collect();
        workload.authorization.plaintext(&ips, |rule| snapshot.number(rule))
    }

    fn blocks(count: usize) -> impl Iterator<Item = String> {
        (0..count).map(|n| format!("10.{}.{}.{}", n >> 16, n >> 8 & 255, n & 255))
    }

    fn ports(count: usize) -> impl Iterator<Item = String> {
        (1..=count).map(|n| n.to_string())
    }

    /// Whoever needs an identity is nobody in plaintext ([AP.10]), and takes no room.
    #[test]
    fn rules_that_plaintext_cannot_match_make_no_entries() {
        let named = when(from(Attribute::Principal, ["*".into()]), Attribute::SourceIp, blocks(MAX_BLOCKS + 1));
        assert_eq!(table(vec![(Action::Deny, vec![named.clone()])], &["10.0.0.1"]), Ok(None));
        assert_eq!(table(vec![(Action::Audit, vec![Rule::default()])], &["10.0.0.1"]), Ok(None));
        let nobody = table(vec![(Action::Allow, vec![named])], &["10.0.0.1"]).expect("small").expect("a table");
        let decision = Decision { reason: Reason::NoAllowMatch, rule: RuleId(0) };
        assert_eq!(nobody.decisions, [[decision]]);
        assert_eq!((nobody.sources.len(), nobody.ports.len()), (2, 1));
    }

    /// Blocks within blocks that say the same are left out, and what is treated alike is one class.
    #[test]
    fn what_is_alike_is_one() {
        let within = ["10.0.0.0/8", "10.1.0.0/16", "10.1.2.0/24", "fd00::/16", "11.0.0.0/8"].map(str::to_owned);
        let rule = Rule {
            to: Some(vec![vec![field(Attribute::DestinationPort, ["80".into(), "81".into()])]]),
            ..from(Attribute::SourceIp, within)
        };
        let table = table(vec![(Action::Allow, vec![rule])], &[]).expect("small").expect("a table");
        let of = |text: &str, length| (ip(text), length);
        let (all4, all6) = (of("0.0.0.0", 0), of("::", 0));
        let expected = [(all4, 0), (of("10.0.0.0", 8), 1), (of("11.0.0.0", 8), 1), (all6, 0), (of("fd00::", 16), 1)];
        assert_eq!(table.sources, expected);
        assert_eq!(table.ports, [(0, 0), (80, 1), (81, 1)]);
        assert_eq!(table.decide(ip("::ffff:10.1.2.3"), 81).reason, Reason::AllowMatch);
        assert_eq!(table.decide(ip("10.1.2.3"), 82).reason, Reason::NoAllowMatch);
        assert_eq!(table.decide(ip("fd01::1"), 80).reason, Reason::NoAllowMatch);
    }

    /// The pod's own address is known, of the family that the client's is of.
    #[test]
    fn the_workloads_address_is_folded_in() {
        let own = vec![(Action::Allow, vec![when(Rule::default(), Attribute::DestinationIp, ["10.0.0.1".into()])])];
        let decide = |ips: &[&str], from: &str| {
            let table = table(own.clone(), ips).expect("small").expect("a table");
            table.decide(ip(from), 80).reason
        };
        assert_eq!(decide(&["10.0.0.1", "fd00::1"], "10.9.9.9"), Reason::AllowMatch);
        assert_eq!(decide(&["10.0.0.1", "fd00::1"], "fd00::9"), Reason::NoAllowMatch);
        assert_eq!(decide(&["10.0.0.2"], "10.9.9.9"), Reason::NoAllowMatch);
        assert_eq!(decide(&[], "10.9.9.9"), Reason::NoAllowMatch);
        assert_eq!(table(own, &["10.0.0.1", "10.0.0.2"]), Err(TooLarge::Addresses));
    }

    #[test]
    fn what_is_too_large_is_told_with_its_size() {
        let deny = |rules| vec![(Action::Deny, rules)];
        let at_most = table(deny(vec![from(Attribute::SourceIp, blocks(MAX_BLOCKS))]), &[]);
        assert!(at_most.is_ok_and(|table| table.is_some_and(|table| table.sources.len() == MAX_BLOCKS + 2)));
        let more = table(deny(vec![from(Attribute::SourceIp, blocks(MAX_BLOCKS + 1))]), &[]);
        assert_eq!(more, Err(TooLarge::Blocks(MAX_BLOCKS + 1)));
        let both = when(from(Attribute::SourceIp, blocks(1000)), Attribute::DestinationPort, ports(20));
        assert_eq!(table(deny(vec![both]), &[]), Err(TooLarge::Cells { blocks: 1000, ports: 20 }));
        // Each pair has a rule of its own.
        let pairs = ports(100).flat_map(|port| blocks(100).map(move |block| (port.clone(), block)));
        let rules: Vec<Rule> = pairs
            .map(|(port, block)| when(from(Attribute::SourceIp, [block]), Attribute::DestinationPort, [port]))
            .collect();
        assert_eq!(table(deny(rules), &[]), Err(TooLarge::Decisions(101 * 101)));
    }
}
