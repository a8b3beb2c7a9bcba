//! What was refused in the last hour, and who came in plaintext: kept for whoever asks, whatever the log level is.
//!
//! A worker, and the thread that tells what the kernel did, note into their own [`Shard`](super::open::Shard), under a
//! lock that nobody else holds for longer than it takes to empty it; a connection that is refused nowhere, and comes by
//! a tunnel, notes nothing. `History` gathers all shards several times a second, or when one is full, and keeps the most
//! recent ones.
//!
//! # Memory
//!
//! At most [`ENTRIES`] of each of the two, of about 1 KiB each at most, and [`PENDING`] of each for each thread that
//! notes: 8 MiB, and 2 MiB for each worker, if all are in use; nothing to speak of while nothing is refused.

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use super::{
    access::Direction,
    open::{Carried, Facts},
    recent::{Pending, Recent, Seen},
};
use crate::{
    model::{ObjectRef, SpiffeId},
    policy::{DecidedBy, RuleObject, Workload},
};

/// Different refusals that are kept, and as many kinds of plaintext.
pub const ENTRIES: usize = 4096;
/// Different ones that a thread holds until they are gathered.
pub const PENDING: usize = 1024;
/// How long a refusal is kept after it was seen last.
pub const KEEP: Duration = Duration::from_secs(3600);
/// Servers of which the plaintext that had no room is counted one by one.
const SERVERS: usize = 1024;
/// Most bytes of a text that is kept.
const TEXT: usize = 240;

/// The rule that refused.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Rule {
    /// `PeerAuthentication` or `AuthorizationPolicy`.
    pub kind: &'static str,
    /// The object.
    pub object: ObjectRef,
    /// Place of the rule in an AuthorizationPolicy, from 0.
    pub rule: Option<usize>,
}

impl From<&DecidedBy> for Rule {
    fn from(by: &DecidedBy) -> Self {
        match by {
            DecidedBy::PeerAuthentication(object) => {
                Self { kind: "PeerAuthentication", object: object.clone(), rule: None }
            }
            DecidedBy::AuthorizationPolicy(rule) => {
                Self { kind: "AuthorizationPolicy", object: rule.policy.clone(), rule: Some(rule.rule) }
            }
        }
    }
}

impl From<&RuleObject> for Rule {
    /// By the number that the kernel has of it.
    fn from(of: &RuleObject) -> Self {
        Self::from(&of.decided_by())
    }
}

impl Rule {
    /// As the access log names it: `namespace/name`, with `#rule` where it has rules.
    pub fn name(&self) -> String {
        match self.rule {
            Some(rule) => format!("{}#{rule}", self.object),
            None => self.object.to_string(),
        }
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.kind, self.object)?;
        match self.rule {
            Some(rule) => write!(f, ", rule {rule}"),
            None => Ok(()),
        }
    }
}

/// One end of a connection, without the port that a client has by chance.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Party {
    /// Its address in canonical form; `None` where nobody knows it.
    pub ip: Option<IpAddr>,
    /// The pod that had it.
    pub pod: Option<ObjectRef>,
}

/// A refusal: those that are alike are one.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Refusal {
    /// Seen from the pod of this node.
    pub direction: Direction,
    /// Who.
    pub source: Party,
    /// Whom.
    pub destination: Party,
    /// The port that was asked for: behind a tunnel, the application's. 0 where nobody knows it.
    pub port: u16,
    /// Word of the reason, as the access log has it.
    pub reason: &'static str,
    /// The rule that refused, where one did.
    pub rule: Option<Rule>,
}

impl Refusal {
    /// Of a connection of which this is known.
    pub fn of(facts: &Facts, reason: &'static str, rule: Option<Rule>) -> Self {
        let party = |ip: IpAddr, workload: &Option<Arc<Workload>>| Party {
            ip: Some(ip.to_canonical()),
            pod: workload.as_ref().map(|workload| workload.object.clone()),
        };
        let target = facts.hbone_addr.unwrap_or(facts.dst);
        Self {
            direction: facts.direction,
            source: party(facts.src.ip(), &facts.src_workload),
            destination: party(target.ip(), &facts.dst_workload),
            port: target.port(),
            reason,
            rule,
        }
    }
}

/// What was known of a refusal the last time.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Circumstances {
    /// The client's identity, where it came by a tunnel.
    pub identity: Option<SpiffeId>,
    /// The Service that was addressed.
    pub service: Option<ObjectRef>,
    /// What happened, for humans.
    pub detail: Arc<str>,
}

impl Circumstances {
    /// With a text that is cut where it is too long.
    pub fn new(detail: &str) -> Self {
        let mut end = detail.len().min(TEXT);
        while !detail.is_char_boundary(end) {
            end -= 1;
        }
        Self { detail: detail[..end].into(), ..Self::default() }
    }
}

/// Whoever came in plaintext.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Caller {
    /// A pod of this workload: namespace and name of the workload.
    Workload(ObjectRef),
    /// An address that no pod has.
    Address(IpAddr),
}

impl fmt::Display for Caller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Workload(workload) => write!(f, "{workload}"),
            Self::Address(ip) => write!(f, "{ip}"),
        }
    }
}

/// A connection in plaintext that was let in: those that are alike are one.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Plaintext {
    /// Namespace and name of the server's workload.
    pub server: ObjectRef,
    /// Its port.
    pub port: u16,
    /// Who came.
    pub client: Caller,
    /// The client was in the mesh by then, and came in plaintext all the same.
    pub enrolled: bool,
    /// It was open before the server's pod was brought into the mesh.
    pub older: bool,
}

impl Plaintext {
    /// Of a connection to a pod of this node of which this is known, with the client's address; `None` where it is not
    /// known whose the address is that it came to.
    pub fn of(facts: &Facts) -> Option<(Self, IpAddr)> {
        let ip = facts.src.ip().to_canonical();
        let client = match &facts.src_workload {
            Some(client) => Caller::Workload(workload(client)),
            None => Caller::Address(ip),
        };
        let plaintext = Self {
            server: workload(facts.dst_workload.as_deref()?),
            port: facts.dst.port(),
            client,
            enrolled: facts.src_workload.as_ref().is_some_and(|client| client.enrollment.enrolled),
            older: facts.carried == Carried::PreEnrolment,
        };
        Some((plaintext, ip))
    }
}

/// Namespace and name of the workload that a pod is one of.
pub fn workload(pod: &Workload) -> ObjectRef {
    ObjectRef { namespace: pod.object.namespace.clone(), name: pod.workload_name.clone() }
}

/// What one thread has noted since it was gathered.
#[derive(Debug)]
pub(super) struct Noted {
    pub(super) refusals: Pending<Refusal, Circumstances>,
    pub(super) plaintext: Pending<Plaintext, IpAddr>,
}

impl Default for Noted {
    fn default() -> Self {
        Self { refusals: Pending::new(PENDING), plaintext: Pending::new(PENDING) }
    }
}

/// What there was no room for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Evicted {
    /// Different refusals.
    pub entries: u64,
    /// Connections that they were, by the word of their reason.
    pub reasons: BTreeMap<&'static str, u64>,
    /// When the latest of them was refused.
    pub last: Option<Instant>,
}

/// What is known of refusals at one moment.
#[derive(Clone, Debug, Default)]
pub struct Refusals {
    /// The most recent ones, the latest first.
    pub entries: Vec<(Refusal, Seen<Circumstances>)>,
    /// What had to go for them.
    pub evicted: Evicted,
}

/// What is known of plaintext at one moment.
#[derive(Clone, Debug, Default)]
pub struct PlaintextSeen {
    /// Who came, with the client's address of the last time; the latest first.
    pub entries: Vec<(Plaintext, Seen<IpAddr>)>,
    /// Connections by the server's workload of which nobody knows any more who came.
    pub others: HashMap<ObjectRef, u64>,
    /// The same, where the server is not known either.
    pub lost: u64,
}

/// What all threads have noted.
#[derive(Debug)]
pub(super) struct History {
    refusals: Recent<Refusal, Circumstances>,
    evicted: Evicted,
    plaintext: Recent<Plaintext, IpAddr>,
    others: HashMap<ObjectRef, u64>,
    plaintext_lost: u64,
}

impl Default for History {
    fn default() -> Self {
        Self {
            refusals: Recent::new(ENTRIES),
            evicted: Evicted::default(),
            plaintext: Recent::new(ENTRIES),
            others: HashMap::new(),
            plaintext_lost: 0,
        }
    }
}

impl History {
    /// Takes over what a thread has noted.
    pub(super) fn gather(&mut self, mut noted: Noted) {
        for (refusal, seen) in noted.refusals.take() {
            if let Some((gone, seen)) = self.refusals.add(refusal, seen) {
                self.evicted.entries += 1;
                *self.evicted.reasons.entry(gone.reason).or_default() += seen.times;
                self.evicted.last = self.evicted.last.max(Some(seen.last));
            }
        }
        for (plaintext, seen) in noted.plaintext.take() {
            let Some((gone, seen)) = self.plaintext.add(plaintext, seen) else { continue };
            let full = self.others.len() >= SERVERS;
            match self.others.get_mut(&gone.server) {
                Some(times) => *times += seen.times,
                None if full => self.plaintext_lost += seen.times,
                None => drop(self.others.insert(gone.server, seen.times)),
            }
        }
    }

    /// Drops refusals that are too old.
    pub(super) fn forget(&mut self, now: Instant) {
        self.refusals.forget(now, KEEP);
    }

    pub(super) fn refusals(&self) -> Refusals {
        Refusals {
            entries: self.refusals.iter().map(|(refusal, seen)| (refusal.clone(), seen.clone())).collect(),
            evicted: self.evicted.clone(),
        }
    }

    pub(super) fn plaintext(&self) -> PlaintextSeen {
        PlaintextSeen {
            entries: self.plaintext.iter().map(|(plaintext, seen)| (plaintext.clone(), seen.clone())).collect(),
            others: self.others.clone(),
            lost: self.plaintext_lost,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(last: u8, port: u16) -> Refusal {
        let party = |last: u8| Party { ip: Some([10, 0, 0, last].into()), pod: None };
        Refusal {
            direction: Direction::Inbound,
            source: party(last),
            destination: party(0),
            port,
            reason: "strict-requires-mtls",
            rule: None,
        }
    }

    fn note(history: &mut History, at: Instant, refusals: impl Iterator<Item = Refusal>) {
        let mut noted = Noted::default();
        for refusal in refusals {
            if noted.refusals.note(refusal, Seen::now(1, at, Circumstances::new("text"))) {
                history.gather(std::mem::take(&mut noted));
            }
        }
        history.gather(noted);
    }

    /// A port scan neither takes more memory than there is for it nor goes unsaid, and what came after it is there.
    #[test]
    fn a_flood_evicts_what_is_oldest_and_is_told() {
        let (mut history, start) = (History::default(), Instant::now());
        note(&mut history, start, [refusal(1, 80)].into_iter());
        let mut scanned = 0;
        for thousand in 0..8u16 {
            let at = start + Duration::from_secs(u64::from(thousand) + 1);
            note(&mut history, at, (0..1000).map(|port| refusal(2, thousand * 1000 + port)));
            scanned += 1000;
        }
        let late = start + Duration::from_secs(100);
        note(&mut history, late, [refusal(3, 80)].into_iter());
        let refusals = history.refusals();
        assert_eq!(refusals.entries.len(), ENTRIES);
        assert_eq!(refusals.entries[0].0, refusal(3, 80), "the latest first");
        assert!(refusals.entries.iter().all(|(known, _)| *known != refusal(1, 80)), "the oldest is gone");
        assert_eq!(refusals.evicted.entries, scanned + 2 - ENTRIES as u64);
        assert_eq!(refusals.evicted.reasons["strict-requires-mtls"], refusals.evicted.entries);
        assert!(refusals.evicted.last.is_some_and(|last| last < late));
        history.forget(late + KEEP);
        assert_eq!(history.refusals().entries.len(), 1);
        history.forget(late + KEEP + Duration::from_millis(1));
        assert!(history.refusals().entries.is_empty());
    }

    /// Who came in plaintext may be forgotten where there are too many; that somebody came is not, so that nobody takes
    /// the workload for one that can go to STRICT.
    #[test]
    fn plaintext_without_room_still_counts_for_its_server() {
        let (mut history, at) = (History::default(), Instant::now());
        let plaintext = |server: &str, client: u32| Plaintext {
            server: ObjectRef::new("test", server),
            port: 80,
            client: Caller::Address(IpAddr::from(client.to_be_bytes())),
            enrolled: false,
            older: false,
        };
        let mut gather = |from: u32, to: u32, server: &str, at| {
            let mut noted = Noted::default();
            for client in from..to {
                let full = noted.plaintext.note(plaintext(server, client), Seen::now(1, at, IpAddr::from([0; 4])));
                assert!(!full, "fewer than {PENDING}");
            }
            history.gather(noted);
        };
        gather(0, 1, "quiet", at);
        for thousand in 0..5 {
            gather(thousand * 1000, thousand * 1000 + 1000, "busy", at + Duration::from_secs(1));
        }
        let seen = history.plaintext();
        assert_eq!(seen.entries.len(), ENTRIES);
        assert_eq!(seen.others[&ObjectRef::new("test", "quiet")], 1);
        assert_eq!(seen.others.values().sum::<u64>() + ENTRIES as u64, 5001);
        history.forget(at + KEEP * 100);
        assert_eq!(history.plaintext().entries.len(), ENTRIES, "plaintext is kept as long as the agent runs");
    }

    /// The bound that the module's text promises.
    #[test]
    fn an_entry_takes_no_more_than_is_said() {
        // In the map and in the order; the names are those of the snapshot, shared, but for a peer's identity.
        let refusal = size_of::<Refusal>() + 2 * size_of::<usize>();
        let seen = size_of::<Seen<Circumstances>>() + size_of::<(Instant, u64)>() + 4 * size_of::<usize>();
        assert!(refusal + seen + TEXT <= 1024 - 256, "{refusal} + {seen} + {TEXT}");
        let long = Circumstances::new(&"ä".repeat(500));
        assert!(long.detail.len() <= TEXT && long.detail.chars().all(|c| c == 'ä'));
    }
}
