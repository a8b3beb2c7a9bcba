//! The compiled snapshot: what every other module reads. How it comes about is in `compile`.

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    net::IpAddr,
    sync::Arc,
};

use culvert_common::Verdict;

use crate::model::{Labels, MeshConfig, ObjectRef, PodUid, SpiffeId};

use super::{Authorization, CompiledService, Enrollment, PeerAuth, authorization::Layers};

/// Index of the object that made a rule, 1-based; 0 is "no rule". Stable for an object while the agent runs, so that
/// the kernel's counters keep their meaning from one generation to the next.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RuleId(pub u32);

/// Kind of an object that makes rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RuleKind {
    /// `security.istio.io` PeerAuthentication.
    PeerAuthentication,
}

/// The object behind a [`RuleId`].
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RuleObject {
    /// Its kind.
    pub kind: RuleKind,
    /// Its namespace and name.
    pub object: ObjectRef,
}

impl fmt::Display for RuleObject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.kind {
            RuleKind::PeerAuthentication => "PeerAuthentication",
        };
        write!(f, "{kind} {}", self.object)
    }
}

/// One pod as the data path sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Workload {
    /// See [`PodUid`].
    pub uid: PodUid,
    /// Namespace and name of the pod.
    pub object: ObjectRef,
    /// Its identity ([I.2]).
    pub identity: SpiffeId,
    /// Its addresses; empty for hostNetwork pods, which are never identified by IP (§13), and for finished ones.
    pub ips: Vec<IpAddr>,
    /// Its node.
    pub node: Arc<str>,
    /// In the mesh or not.
    pub enrollment: Enrollment,
    /// Effective PeerAuthentication; kept for pods outside the mesh too, where nothing enforces it ([PA.11]).
    pub peer_auth: PeerAuth,
    /// The AuthorizationPolicies that select it; kept for pods outside the mesh too, likewise ([AP.4]).
    pub authorization: Authorization,
    /// For telemetry (§16).
    pub workload_name: Arc<str>,
    /// For telemetry and selectors; the pod's own.
    pub labels: Arc<Labels>,
    /// Region of its node, for telemetry; `None` where the node's labels do not say.
    pub region: Option<Arc<str>>,
    /// Zone of its node, likewise.
    pub zone: Option<Arc<str>>,
}

/// Whose an address is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Occupant<T> {
    /// Exactly one.
    One(Arc<T>),
    /// Claimed by several, so that nobody can be identified by it: connections to it are refused.
    Ambiguous,
}

/// Everything that verdicts and routes of one generation are made from. Never changed in place ([D.5]).
#[derive(Clone, Debug, PartialEq)]
pub struct Snapshot {
    /// Counts up from 1 with each change of content; 0 is never used.
    pub generation: u32,
    /// Mesh configuration.
    pub mesh: MeshConfig,
    /// Every pod that the source has.
    pub workloads: HashMap<PodUid, Arc<Workload>>,
    /// Pods by address: neither hostNetwork nor finished ones; terminating ones stay.
    pub by_ip: HashMap<IpAddr, Occupant<Workload>>,
    /// Every Service.
    pub services: BTreeMap<ObjectRef, Arc<CompiledService>>,
    /// Services by cluster IP.
    pub by_vip: HashMap<IpAddr, Occupant<CompiledService>>,
    /// Index by [`RuleId`] − 1. Only ever grows while the agent runs.
    pub rules: Vec<RuleObject>,
    /// What was accepted but does not do what it seems to, one line each, sorted.
    pub warnings: Vec<String>,
    /// For the next snapshot.
    pub(super) layers: Layers,
}

impl Snapshot {
    /// The pod with this UID.
    pub fn workload(&self, uid: &PodUid) -> Option<&Arc<Workload>> {
        self.workloads.get(uid)
    }

    /// Whose address this is; `None` for one that no pod of the source has.
    pub fn workload_by_ip(&self, ip: IpAddr) -> Option<&Occupant<Workload>> {
        self.by_ip.get(&ip.to_canonical())
    }

    /// The object that made a rule; `None` for 0 and for numbers of no generation so far.
    pub fn rule(&self, id: RuleId) -> Option<&RuleObject> {
        self.rules.get((id.0 as usize).checked_sub(1)?)
    }

    /// A verdict of the kernel in words: the reason, and the object that decided where one did, as in
    /// `strict-requires-mtls by PeerAuthentication test/strict`.
    pub fn explain(&self, verdict: &Verdict) -> String {
        let reason = verdict.reason.as_str();
        match (verdict.rule, self.rule(RuleId(verdict.rule))) {
            (0, _) => reason.to_owned(),
            (_, Some(object)) => format!("{reason} by {object}"),
            (number, None) => format!("{reason} by rule {number}, which this generation does not know"),
        }
    }
}
