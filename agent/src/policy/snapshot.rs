//! The compiled snapshot: what every other module reads. How it comes about is in `compile`.

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    net::IpAddr,
    sync::Arc,
};

use culvert_common::{Answer, Verdict};

use crate::model::{Labels, MeshConfig, ObjectRef, PodUid, SpiffeId};

use super::{Authorization, CompiledService, DecidedBy, Enrollment, PeerAuth, RuleRef, authorization::Layers, decide};

/// Number of a PeerAuthentication, or of a rule of an AuthorizationPolicy, from 1 on; 0 is "no rule". Stable for an object
/// while the agent runs, so that the kernel's counters keep their meaning from one generation to the next.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RuleId(pub u32);

/// Kind of an object that makes rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RuleKind {
    /// `security.istio.io` PeerAuthentication.
    PeerAuthentication,
    /// `security.istio.io` AuthorizationPolicy: the rule with this place among its rules, from 0.
    AuthorizationPolicy(usize),
}

/// What is behind a [`RuleId`].
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RuleObject {
    /// Its kind.
    pub kind: RuleKind,
    /// Its namespace and name.
    pub object: ObjectRef,
}

impl fmt::Display for RuleObject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.kind {
            RuleKind::PeerAuthentication => write!(f, "PeerAuthentication {}", self.object),
            RuleKind::AuthorizationPolicy(rule) => write!(f, "AuthorizationPolicy {}#{rule}", self.object),
        }
    }
}

impl RuleObject {
    /// As verdicts name it.
    pub fn decided_by(&self) -> DecidedBy {
        match self.kind {
            RuleKind::PeerAuthentication => DecidedBy::PeerAuthentication(self.object.clone()),
            RuleKind::AuthorizationPolicy(rule) => {
                DecidedBy::AuthorizationPolicy(RuleRef { policy: self.object.clone(), rule })
            }
        }
    }
}

/// Rules by what they are of: the other way round than [`Snapshot::rules`].
#[derive(Clone, Debug, Default)]
pub(super) struct Numbers(pub(super) Arc<HashMap<RuleObject, RuleId>>);

/// They follow from the rules, and are no content of their own.
impl PartialEq for Numbers {
    fn eq(&self, _: &Self) -> bool {
        true
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
    pub(super) numbers: Numbers,
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

    /// The number of a rule of an AuthorizationPolicy; 0 for one that no generation has had.
    pub fn number(&self, rule: &RuleRef) -> RuleId {
        let kind = RuleKind::AuthorizationPolicy(rule.rule);
        self.numbers.0.get(&RuleObject { kind, object: rule.policy.clone() }).copied().unwrap_or_default()
    }

    /// The object that made a rule; `None` for 0 and for numbers of no generation so far.
    pub fn rule(&self, id: RuleId) -> Option<&RuleObject> {
        self.rules.get((id.0 as usize).checked_sub(1)?)
    }

    /// A verdict of the kernel in the words of [`decide::Verdict`]: `strict-requires-mtls by PeerAuthentication test/strict`.
    pub fn explain(&self, verdict: &Verdict) -> String {
        let decided_by = self.rule(RuleId(verdict.rule)).map(RuleObject::decided_by);
        if verdict.rule != 0 && decided_by.is_none() {
            let number = verdict.rule;
            return format!("{} by rule {number}, which this generation does not know", verdict.reason.as_str());
        }
        let allowed = verdict.answer == Answer::Pass;
        decide::Verdict { decided_by, ..decide::Verdict::new(allowed, verdict.reason, verdict.generation) }.to_string()
    }
}
