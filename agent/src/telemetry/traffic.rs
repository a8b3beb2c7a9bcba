//! Istio's TCP metrics (specification §16): which labels a connection has, and their totals.
//!
//! A worker counts into its own [`Shard`](super::open::Shard), which holds differences only; `Totals` gathers them when
//! somebody scrapes. A label set that a worker meets for the first time is looked up here, under a lock that all share;
//! from then on the worker knows it. The number of label sets is bounded: what comes after is counted under one label set
//! whose values are `unknown`, and is itself counted.

use std::{
    collections::HashMap,
    fmt,
    hash::{Hash, Hasher},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use super::{
    access::Direction,
    open::{Carried, Facts},
};
use crate::{
    model::{ObjectRef, SpiffeId},
    policy::Workload,
};

/// The value of whatever is not known ([M.1]).
pub const UNKNOWN: &str = "unknown";

/// Names of the labels, in the order of their values in [`Labels`]; `response_flags` is added to each counter ([M.2]).
pub const LABELS: [&str; SHOWN] = [
    "reporter",
    "source_workload",
    "source_workload_namespace",
    "source_principal",
    "source_app",
    "source_version",
    "source_canonical_service",
    "source_canonical_revision",
    "source_cluster",
    "source_region",
    "source_zone",
    "destination_workload",
    "destination_workload_namespace",
    "destination_principal",
    "destination_app",
    "destination_version",
    "destination_canonical_service",
    "destination_canonical_revision",
    "destination_cluster",
    "destination_region",
    "destination_zone",
    "destination_service",
    "destination_service_name",
    "destination_service_namespace",
    "request_protocol",
    "connection_security_policy",
];

const SHOWN: usize = 26;
/// Where `request_protocol` is among them.
const PROTOCOL: usize = 24;
/// Where the two workloads' names are among them; their namespaces follow.
const WORKLOADS: [usize; 2] = [1, 11];

/// A label set without `response_flags`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Labels {
    values: Box<[Box<str>]>,
}

/// How a connection ended ([M.2]).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Flag {
    /// By itself, or cut without being a failure of the mesh.
    #[default]
    None,
    /// Policy.
    Deny,
    /// The server could not be reached.
    Connect,
    /// TLS failed.
    TlsFailure,
    /// HTTP/2 failed.
    H2HandshakeFailure,
    /// The tunnel's port did not answer in time.
    NetworkPolicy,
    /// No certificate of our own, or one that is not understood.
    IdentityError,
    /// The peer's certificate was revoked.
    CertRevoked,
}

impl Flag {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::None,
        Self::Deny,
        Self::Connect,
        Self::TlsFailure,
        Self::H2HandshakeFailure,
        Self::NetworkPolicy,
        Self::IdentityError,
        Self::CertRevoked,
    ];

    /// As the label `response_flags` has it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::None => "-",
            Self::Deny => "DENY",
            Self::Connect => "CONNECT",
            Self::TlsFailure => "TLS_FAILURE",
            Self::H2HandshakeFailure => "H2_HANDSHAKE_FAILURE",
            Self::NetworkPolicy => "NETWORK_POLICY",
            Self::IdentityError => "IDENTITY_ERROR",
            Self::CertRevoked => "CERT_REVOKED",
        }
    }
}

impl fmt::Display for Flag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What all label sets of an agent share.
#[derive(Clone, Debug)]
pub struct Names {
    /// Name of this cluster.
    pub cluster: Arc<str>,
    /// Domain of the names of Services.
    pub cluster_domain: Arc<str>,
}

impl Default for Names {
    fn default() -> Self {
        Self { cluster: "Kubernetes".into(), cluster_domain: "cluster.local".into() }
    }
}

impl Names {
    /// Name of a Service as clients spell it in full.
    pub fn hostname(&self, service: &ObjectRef) -> String {
        format!("{}.{}.svc.{}", service.name, service.namespace, self.cluster_domain)
    }

    /// The Service that a full name means; `None` for names of anything else.
    pub fn service(&self, hostname: &str) -> Option<ObjectRef> {
        let rest = hostname.strip_suffix(&*self.cluster_domain)?.strip_suffix(".svc.")?;
        let (name, namespace) = rest.split_once('.')?;
        (!name.is_empty() && !namespace.is_empty() && !namespace.contains('.')).then(|| ObjectRef::new(namespace, name))
    }
}

/// Canonical service and revision of a workload (§16).
pub fn canonical(workload: &Workload) -> (&str, &str) {
    let label = |names: &[&str]| names.iter().find_map(|name| workload.labels.get(*name)).map(String::as_str);
    let service = label(&["service.istio.io/canonical-name", "app.kubernetes.io/name", "app"]);
    let revision = label(&["service.istio.io/canonical-revision", "app.kubernetes.io/version", "version"]);
    (service.unwrap_or(&workload.workload_name), revision.unwrap_or("latest"))
}

impl Labels {
    /// The label set of a connection.
    pub fn of(facts: &Facts, names: &Names) -> Self {
        let mut values: Vec<Box<str>> = Vec::with_capacity(SHOWN);
        values.push(reporter(facts.direction).into());
        end(&mut values, facts.src_workload.as_deref(), facts.src_identity.as_ref(), names);
        end(&mut values, facts.dst_workload.as_deref(), facts.dst_identity.as_ref(), names);
        match &facts.service {
            Some(service) => {
                values.push(names.hostname(service).into());
                values.push((&*service.name).into());
                values.push((&*service.namespace).into());
            }
            None => values.extend(["unknown"; 3].map(Box::from)),
        }
        values.push("tcp".into());
        values.push(if facts.carried == Carried::Tunnel { "mutual_tls" } else { UNKNOWN }.into());
        Self { values: values.into() }
    }

    /// Where everything goes that has no room of its own.
    fn overflow(reporter: &str) -> Self {
        let mut values: Vec<Box<str>> = vec![UNKNOWN.into(); SHOWN];
        values[0] = reporter.into();
        values[PROTOCOL] = "tcp".into();
        Self { values: values.into() }
    }

    /// Names and values, without `response_flags`.
    pub fn iter(&self) -> impl Iterator<Item = (&'static str, &str)> {
        LABELS.into_iter().zip(self.values.iter().map(|value| &**value))
    }

    /// Namespace and name of the two workloads, where they are known.
    fn workloads(&self) -> impl Iterator<Item = (&str, &str)> {
        WORKLOADS.into_iter().map(|at| (&*self.values[at + 1], &*self.values[at])).filter(|(_, name)| *name != UNKNOWN)
    }
}

fn reporter(direction: Direction) -> &'static str {
    match direction {
        Direction::Outbound => "source",
        Direction::Inbound => "destination",
    }
}

fn end(values: &mut Vec<Box<str>>, workload: Option<&Workload>, identity: Option<&SpiffeId>, names: &Names) {
    let known = |text: &str| Box::from(if text.is_empty() { UNKNOWN } else { text });
    let principal = identity.map_or_else(|| UNKNOWN.into(), |identity| identity.to_string().into());
    let Some(workload) = workload else {
        values.extend([UNKNOWN, UNKNOWN].map(Box::from));
        values.push(principal);
        values.extend([UNKNOWN; 7].map(Box::from));
        return;
    };
    let label = |name: &str| known(workload.labels.get(name).map_or("", String::as_str));
    let place = |place: &Option<Arc<str>>| known(place.as_deref().unwrap_or_default());
    let (service, revision) = canonical(workload);
    values.push(known(&workload.workload_name));
    values.push(known(&workload.object.namespace));
    values.push(principal);
    values.extend([label("app"), label("version"), known(service), known(revision)]);
    values.extend([known(&names.cluster), place(&workload.region), place(&workload.zone)]);
}

/// The facts of a connection, equal to all that have the same labels: workloads are compared by place, since a snapshot
/// shares with the one before it what has not changed.
#[derive(Clone, Debug)]
pub(super) struct Kind(pub(super) Arc<Facts>);

impl Kind {
    fn parts(&self) -> impl Eq + Hash + '_ {
        let place = |workload: &Option<Arc<Workload>>| workload.as_ref().map(|workload| Arc::as_ptr(workload).addr());
        let facts = &self.0;
        (
            (facts.direction == Direction::Outbound, facts.carried == Carried::Tunnel),
            (place(&facts.src_workload), place(&facts.dst_workload)),
            (&facts.src_identity, &facts.dst_identity, &facts.service),
        )
    }
}

impl PartialEq for Kind {
    fn eq(&self, other: &Self) -> bool {
        self.parts() == other.parts()
    }
}

impl Eq for Kind {}

impl Hash for Kind {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.parts().hash(state);
    }
}

/// What was counted under one label set, in all or since the last gathering.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count {
    /// Connections opened.
    pub opened: u64,
    /// Connections that ended, by [`Flag::ALL`].
    pub closed: [u64; Flag::ALL.len()],
    /// Bytes client → server.
    pub received: u64,
    /// Bytes server → client.
    pub sent: u64,
}

impl Count {
    fn add(&mut self, other: &Self) {
        self.opened += other.opened;
        self.received += other.received;
        self.sent += other.sent;
        for (mine, theirs) in self.closed.iter_mut().zip(other.closed) {
            *mine += theirs;
        }
    }
}

/// A label set that is not counted under any more is dropped after this, if a workload of it is gone, or if the room is
/// needed.
const IDLE: Duration = Duration::from_secs(10 * 60);

/// All label sets of the agent with their totals.
#[derive(Debug)]
pub(super) struct Totals {
    names: Names,
    /// Most label sets.
    most: usize,
    sets: Mutex<HashMap<Arc<Labels>, Total>>,
    overflow: [Arc<Labels>; 2],
    overflowed: AtomicU64,
}

#[derive(Debug)]
struct Total {
    count: Count,
    used: Instant,
}

impl Totals {
    pub(super) fn new(names: Names, most: usize) -> Self {
        Self {
            names,
            most,
            sets: Mutex::default(),
            overflow: ["source", "destination"].map(|reporter| Arc::new(Labels::overflow(reporter))),
            overflowed: AtomicU64::new(0),
        }
    }

    /// The label set under which a connection is counted.
    pub(super) fn labels(&self, facts: &Facts) -> Arc<Labels> {
        let labels = Labels::of(facts, &self.names);
        let mut sets = self.sets.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((known, _)) = sets.get_key_value(&labels) {
            return known.clone();
        }
        if sets.len() >= self.most {
            self.overflowed.fetch_add(1, Ordering::Relaxed);
            return self.overflow[usize::from(facts.direction == Direction::Inbound)].clone();
        }
        let labels = Arc::new(labels);
        sets.insert(labels.clone(), Total { count: Count::default(), used: Instant::now() });
        labels
    }

    pub(super) fn add(&self, differences: Vec<(Arc<Labels>, Count)>, now: Instant) {
        let mut sets = self.sets.lock().unwrap_or_else(PoisonError::into_inner);
        for (labels, count) in differences {
            let total = sets.entry(labels).or_insert_with(|| Total { count: Count::default(), used: now });
            total.count.add(&count);
            total.used = now;
        }
    }

    /// Drops label sets that nobody counts under any more. `exists` knows whether a workload is there, by namespace and
    /// name.
    pub(super) fn forget(&self, now: Instant, exists: impl Fn(&str, &str) -> bool) {
        let mut sets = self.sets.lock().unwrap_or_else(PoisonError::into_inner);
        let full = sets.len() >= self.most;
        sets.retain(|labels, total| {
            // New holders are only made under this lock, from the one that is held here.
            let held = Arc::strong_count(labels) > 1;
            let idle = now.saturating_duration_since(total.used) >= IDLE;
            held || !idle || !(full || labels.workloads().any(|(namespace, name)| !exists(namespace, name)))
        });
    }

    /// Everything, sorted by labels.
    pub(super) fn read(&self) -> Vec<(Arc<Labels>, Count)> {
        let sets = self.sets.lock().unwrap_or_else(PoisonError::into_inner);
        let mut all: Vec<_> = sets.iter().map(|(labels, total)| (labels.clone(), total.count)).collect();
        drop(sets);
        all.sort_unstable_by(|a, b| a.0.cmp(&b.0));
        all
    }

    /// How many times a connection's label set found no room.
    pub(super) fn overflowed(&self) -> u64 {
        self.overflowed.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts(service: &str) -> Facts {
        let addr = std::net::SocketAddr::from(([10, 0, 0, 1], 80));
        Facts { service: Some(ObjectRef::new("default", service)), ..Facts::new(Direction::Outbound, addr, addr) }
    }

    #[test]
    fn names_of_services_are_read_back() {
        let names = Names { cluster_domain: "example.org".into(), ..Names::default() };
        let service = ObjectRef::new("shop", "cart");
        assert_eq!(names.hostname(&service), "cart.shop.svc.example.org");
        assert_eq!(names.service("cart.shop.svc.example.org"), Some(service));
        for other in ["", "cart", "cart.shop.svc.cluster.local", ".shop.svc.example.org", "a.cart.shop.svc.example.org"]
        {
            assert_eq!(names.service(other), None, "{other}");
        }
    }

    #[test]
    fn idle_label_sets_go_when_room_is_needed_and_held_ones_stay() {
        let totals = Totals::new(Names::default(), 2);
        let held = totals.labels(&facts("a"));
        drop(totals.labels(&facts("b")));
        let later = Instant::now() + IDLE;
        totals.forget(Instant::now(), |_, _| false);
        assert_eq!(totals.read().len(), 2, "not idle yet");
        totals.forget(later, |_, _| true);
        assert_eq!(totals.read().len(), 1, "full: the idle one went");
        drop(held);
        totals.forget(later, |_, _| true);
        assert_eq!(totals.read().len(), 1, "there is room, and no workload of it is gone");
        assert_eq!(totals.overflowed(), 0);
    }
}
