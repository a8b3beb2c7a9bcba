//! The AuthorizationPolicies that protect a pod (specification §6): which they are, and the first rule that matches.
//!
//! What the policies of a scope add up to is compiled once, into a [`Layer`], and shared by all pods that it protects. In
//! a layer a rule is found by what it asks for (`index`), so that a decision costs by the rules that could match and not
//! by those that there are.

use std::{
    collections::{HashMap, HashSet},
    fmt,
    sync::Arc,
};

use crate::model::{
    AuthorizationPolicy, Cluster, Labels, MeshConfig, ObjectRef,
    authorization::{Action, Attribute},
};

use self::{
    index::Index,
    rule::{Facts, Rule, Trust},
};
use super::{Options, selecting::Selecting};

mod index;
pub(super) mod rule;
mod table;

pub use table::{Decision, MAX_BLOCKS, MAX_CELLS, MAX_DECISIONS, Table, TooLarge};

/// What protects one pod: the layers of its scopes. Cheap to clone.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Authorization {
    layers: Vec<Arc<Layer>>,
}

/// Policies of one scope, compiled: two are equal where they are made from the same.
#[derive(Debug)]
pub(super) struct Layer {
    /// The policies that it is made from, the oldest first ([C.2]).
    policies: Vec<Arc<AuthorizationPolicy>>,
    trust: Arc<Trust>,
    deny: Pool,
    allow: Pool,
    dry_deny: Pool,
    dry_allow: Pool,
    audit: Pool,
    /// CUSTOM policies, by their place among the policies ([AP.7]).
    custom: Vec<usize>,
    /// What the rules compare.
    asked: HashSet<Attribute>,
}

/// The rules of all policies of one kind.
#[derive(Debug, Default)]
struct Pool {
    /// How many policies there are; one without rules is one too.
    policies: usize,
    /// In the order of [C.2], and within a policy as written.
    rules: Vec<Rule>,
    index: Index,
    /// Rules that never match, since they ask for what cannot be seen here ([AP.13]): in words.
    never: Vec<Arc<str>>,
}

/// A rule that matched.
#[derive(Clone, Debug)]
pub(super) struct Matched<'a> {
    policy: &'a AuthorizationPolicy,
    rule: &'a Rule,
}

/// A rule of a policy, as it is named in logs and answers.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RuleRef {
    /// The policy.
    pub policy: ObjectRef,
    /// Its place among the policy's rules, from 0.
    pub rule: usize,
}

impl fmt::Display for RuleRef {
    /// `namespace/name#rule`
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}#{}", self.policy, self.rule)
    }
}

/// Which pool of rules is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Deny,
    Allow,
    DryDeny,
    DryAllow,
    Audit,
}

impl Matched<'_> {
    pub(super) fn name(&self) -> RuleRef {
        RuleRef { policy: self.policy.object(), rule: self.rule.number }
    }

    pub(super) fn is_older_than(&self, other: &Matched<'_>) -> bool {
        self.policy.age < other.policy.age
    }

    /// What of the rule was taken as matched because it cannot be seen here ([AP.14]).
    pub(super) fn assumed(&self) -> &[String] {
        &self.rule.assumed
    }
}

impl Layer {
    fn new(policies: Vec<Arc<AuthorizationPolicy>>, trust: Arc<Trust>) -> Self {
        let mut layer = Self {
            policies,
            trust,
            deny: Pool::default(),
            allow: Pool::default(),
            dry_deny: Pool::default(),
            dry_allow: Pool::default(),
            audit: Pool::default(),
            custom: Vec::new(),
            asked: HashSet::new(),
        };
        for place in 0..layer.policies.len() {
            let policy = layer.policies[place].clone();
            let pool = match (policy.action, policy.dry_run) {
                (Action::Deny, false) => &mut layer.deny,
                (Action::Deny, true) => &mut layer.dry_deny,
                (Action::Allow, false) => &mut layer.allow,
                (Action::Allow, true) => &mut layer.dry_allow,
                (Action::Audit, _) => &mut layer.audit,
                (Action::Custom, _) => {
                    layer.custom.push(place);
                    continue;
                }
            };
            pool.policies += 1;
            for (number, written) in policy.rules.iter().enumerate() {
                let (compiled, unseen) = Rule::compile(place, number, written, &policy.age.namespace, &layer.trust);
                if !unseen.is_empty() && policy.action == Action::Allow {
                    let name = RuleRef { policy: policy.object(), rule: number };
                    let unseen = unseen.join(", ");
                    pool.never.push(format!("{name} never matches here: {unseen} cannot be evaluated [AP.13]").into());
                    continue;
                }
                pool.rules.push(Rule { assumed: unseen, ..compiled });
            }
        }
        for pool in [&mut layer.deny, &mut layer.allow, &mut layer.dry_deny, &mut layer.dry_allow, &mut layer.audit] {
            pool.index = Index::of(&pool.rules);
            for attribute in [Attribute::SourceIp, Attribute::DestinationIp] {
                if pool.rules.iter().any(|rule| rule.asks_for(attribute)) {
                    layer.asked.insert(attribute);
                }
            }
        }
        layer
    }

    fn pool(&self, kind: Kind) -> &Pool {
        match kind {
            Kind::Deny => &self.deny,
            Kind::Allow => &self.allow,
            Kind::DryDeny => &self.dry_deny,
            Kind::DryAllow => &self.dry_allow,
            Kind::Audit => &self.audit,
        }
    }
}

/// The rest follows from these.
impl PartialEq for Layer {
    fn eq(&self, other: &Self) -> bool {
        self.trust == other.trust && self.policies == other.policies
    }
}

impl Eq for Layer {}

impl Authorization {
    /// The oldest policy of the kind that matches, with its first rule that does ([C.2]).
    pub(super) fn first(&self, kind: Kind, facts: &Facts<'_>) -> Option<Matched<'_>> {
        let mut first: Option<Matched<'_>> = None;
        for layer in &self.layers {
            let pool = layer.pool(kind);
            let Some(rule) = pool.index.first(&pool.rules, facts) else { continue };
            let policy = &layer.policies[rule.policy];
            if first.as_ref().is_none_or(|known| policy.age < known.policy.age) {
                first = Some(Matched { policy, rule });
            }
        }
        first
    }

    /// Whether there is a policy of the kind.
    pub(super) fn has(&self, kind: Kind) -> bool {
        self.layers.iter().any(|layer| layer.pool(kind).policies > 0)
    }

    /// Rules of the kind that never match since they ask for what cannot be seen here ([AP.13]), in words.
    pub(super) fn never(&self, kind: Kind) -> impl Iterator<Item = &Arc<str>> {
        self.layers.iter().flat_map(move |layer| &layer.pool(kind).never)
    }

    /// CUSTOM policies, which nobody asks here ([AP.7]).
    pub(super) fn custom(&self) -> impl Iterator<Item = ObjectRef> {
        self.layers.iter().flat_map(|layer| layer.custom.iter().map(|place| layer.policies[*place].object()))
    }

    /// Rules that are enforced.
    fn enforced(&self) -> impl Iterator<Item = &Rule> {
        self.layers.iter().flat_map(|layer| [&layer.deny, &layer.allow]).flat_map(|pool| &pool.rules)
    }

    /// Whether a verdict, or what is told of it, may depend on more than the mode: not so where no policy selects the
    /// pod, or CUSTOM ones alone.
    pub fn judges(&self) -> bool {
        [Kind::Deny, Kind::Allow, Kind::DryDeny, Kind::DryAllow, Kind::Audit].into_iter().any(|kind| self.has(kind))
    }

    /// Whether a rule compares the client's address.
    pub fn asks_for_source_ip(&self) -> bool {
        self.layers.iter().any(|layer| layer.asked.contains(&Attribute::SourceIp))
    }

    /// Whether a rule compares the workload's address.
    pub fn asks_for_destination_ip(&self) -> bool {
        self.layers.iter().any(|layer| layer.asked.contains(&Attribute::DestinationIp))
    }

    /// Every policy that selects the pod.
    pub fn policies(&self) -> impl Iterator<Item = &Arc<AuthorizationPolicy>> {
        self.layers.iter().flat_map(|layer| &layer.policies)
    }
}

/// Where a layer comes from: the whole mesh, a namespace, or the policies with these places in [C.2] order.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Scope {
    Mesh,
    Namespace(Arc<str>),
}

/// The policies of a cluster, by what they select.
pub(super) struct Authorizations {
    trust: Arc<Trust>,
    root: Arc<str>,
    wide: HashMap<Scope, Arc<Layer>>,
    selecting: HashMap<Scope, Selecting<AuthorizationPolicy>>,
    /// Layers of policies that select by labels, by those policies.
    selected: HashMap<Vec<*const AuthorizationPolicy>, Arc<Layer>>,
    hints: HashMap<ObjectRef, (Arc<AuthorizationPolicy>, Vec<String>)>,
    before: Layers,
}

/// Layers of a snapshot, so that the next one need not compile what stays.
#[derive(Clone, Debug, Default)]
pub(super) struct Layers {
    trust: Arc<Trust>,
    wide: HashMap<Scope, Arc<Layer>>,
    selected: HashMap<Vec<ObjectRef>, Arc<Layer>>,
    /// Of each policy, what is to be said of it.
    hints: HashMap<ObjectRef, (Arc<AuthorizationPolicy>, Vec<String>)>,
}

/// Layers follow from the cluster and are no content of their own.
impl PartialEq for Layers {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Authorizations {
    /// Sorts the policies of this revision ([C.5]) by what they select, and warns of what they do not do.
    pub(super) fn of(cluster: &Cluster, options: &Options, mut before: Layers, warnings: &mut Vec<String>) -> Self {
        let mut all: Vec<&Arc<AuthorizationPolicy>> = cluster
            .authorization_policies
            .values()
            .filter(|policy| policy.revision.as_ref().is_none_or(|revision| *revision == options.revision))
            .collect();
        all.sort_by(|a, b| a.age.cmp(&b.age));
        let trust = Trust::of(&cluster.mesh);
        let trust = if trust == *before.trust { before.trust.clone() } else { Arc::new(trust) };
        let mut known = std::mem::take(&mut before.hints);
        known.retain(|_, _| Arc::ptr_eq(&trust, &before.trust));
        let mut said = HashMap::with_capacity(all.len());
        let root = &cluster.mesh.root_namespace;
        let (mut wide, mut selecting): (HashMap<Scope, Vec<_>>, HashMap<Scope, Vec<_>>) = Default::default();
        for policy in all {
            let name = policy.object();
            let hints = match known.remove(&name) {
                Some((same, hints)) if Arc::ptr_eq(&same, policy) => hints,
                Some(_) | None => hints(policy, &cluster.mesh),
            };
            warnings.extend(hints.iter().map(|hint| format!("AuthorizationPolicy {name}{hint}")));
            said.insert(name, (policy.clone(), hints));
            if policy.has_targets {
                continue;
            }
            let namespace = &policy.age.namespace;
            let scope = if namespace == root { Scope::Mesh } else { Scope::Namespace(namespace.clone()) };
            let scopes = if policy.selector.is_empty() { &mut wide } else { &mut selecting };
            scopes.entry(scope).or_default().push(policy.clone());
        }
        let mut this = Self {
            trust,
            root: root.clone(),
            wide: HashMap::new(),
            selecting: selecting.into_iter().map(|(scope, policies)| (scope, Selecting::new(policies))).collect(),
            selected: HashMap::new(),
            hints: said,
            before,
        };
        for (scope, policies) in wide {
            let layer = match this.before.wide.get(&scope) {
                Some(layer) if layer.policies == policies && layer.trust == this.trust => layer.clone(),
                Some(_) | None => Arc::new(Layer::new(policies, this.trust.clone())),
            };
            this.wide.insert(scope, layer);
        }
        this
    }

    /// What protects a pod of this namespace with these labels ([AP.1], [AP.3]).
    pub(super) fn effective(&mut self, namespace: &Arc<str>, labels: &Labels) -> Authorization {
        let own = (*namespace != self.root).then(|| Scope::Namespace(namespace.clone()));
        let mut layers = Vec::new();
        let mut selected: Vec<Arc<AuthorizationPolicy>> = Vec::new();
        for scope in [Some(Scope::Mesh), own].into_iter().flatten() {
            layers.extend(self.wide.get(&scope).cloned());
            selected.extend(self.selecting.get(&scope).iter().flat_map(|all| all.of(labels)).cloned());
        }
        if !selected.is_empty() {
            selected.sort_by(|a, b| a.age.cmp(&b.age));
            layers.push(self.selected(selected));
        }
        Authorization { layers }
    }

    fn selected(&mut self, policies: Vec<Arc<AuthorizationPolicy>>) -> Arc<Layer> {
        let key: Vec<*const AuthorizationPolicy> = policies.iter().map(Arc::as_ptr).collect();
        if let Some(layer) = self.selected.get(&key) {
            return layer.clone();
        }
        let names: Vec<ObjectRef> = policies.iter().map(|policy| policy.object()).collect();
        let layer = match self.before.selected.get(&names) {
            Some(layer) if layer.policies == policies && layer.trust == self.trust => layer.clone(),
            Some(_) | None => Arc::new(Layer::new(policies, self.trust.clone())),
        };
        self.selected.insert(key, layer.clone());
        layer
    }

    /// What the next snapshot can use.
    pub(super) fn into_layers(self) -> Layers {
        let named = |layer: &Arc<Layer>| layer.policies.iter().map(|policy| policy.object()).collect();
        let asked: HashMap<_, _> = self.selected.values().map(|layer| (named(layer), layer.clone())).collect();
        // Of pods that nobody has asked about because nothing has changed for them.
        let mut selected = self.before.selected;
        selected.retain(|_, layer| {
            let current = |policy: &Arc<AuthorizationPolicy>| {
                self.hints.get(&policy.object()).is_some_and(|(known, _)| Arc::ptr_eq(known, policy))
            };
            Arc::ptr_eq(&layer.trust, &self.trust) && layer.policies.iter().all(current)
        });
        selected.extend(asked);
        Layers { trust: self.trust, wide: self.wide, selected, hints: self.hints }
    }
}

/// What a policy does not do although it seems to, or does more than it seems to: what follows its name in a report.
/// Nothing where it does what it says.
pub fn hints(policy: &AuthorizationPolicy, mesh: &MeshConfig) -> Vec<String> {
    let mut hints = Vec::new();
    if policy.has_targets {
        hints.push(
            " has no effect: it is for the HTTP proxy of its targetRefs, and there is none; use a selector [AP.2]"
                .to_owned(),
        );
        return hints;
    }
    if policy.selector_written_empty {
        hints.push(": an empty selector selects every pod in scope; remove it to say so [C.4]".to_owned());
    }
    if policy.action == Action::Custom {
        hints.push(
            " is not enforced: CUSTOM asks an external authorizer, which needs an HTTP proxy (Unsupported) [AP.7]"
                .to_owned(),
        );
        return hints;
    }
    let trust = Trust::of(mesh);
    for (number, written) in policy.rules.iter().enumerate() {
        let (_, unseen) = Rule::compile(0, number, written, &policy.age.namespace, &trust);
        if !unseen.is_empty() {
            let unseen = unseen.join(", ");
            hints.push(match policy.action {
                Action::Allow | Action::Custom => format!(
                    " is more restrictive than requested: rule {number} never matches, since {unseen} cannot be \
                     evaluated at L4 [AP.13]"
                ),
                Action::Deny => format!(
                    " is more restrictive than requested: rule {number} denies whatever {unseen} would be, since that \
                     cannot be evaluated at L4 [AP.14]"
                ),
                Action::Audit => format!(
                    " reports more than requested: rule {number} matches whatever {unseen} would be, since that cannot \
                     be evaluated at L4 [AP.14]"
                ),
            });
        }
        for value in rule::spiffe_principals(written) {
            hints.push(format!(
                ": rule {number}: the principal {value:?} never matches; write it without spiffe:// (specification §6.3)"
            ));
        }
    }
    hints
}
