//! From a cluster to a snapshot.
//!
//! What did not change since the previous snapshot is shared with it, so that readers can tell by pointer.

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet, HashMap, HashSet, hash_map::Entry},
    hash::Hash,
    sync::Arc,
};

use crate::model::{Cluster, Labels, Node, ObjectRef, Pod, SpiffeId};

use super::{
    Authorization, Occupant, Options, PeerAuth, RuleId, RuleKind, RuleObject, Server, Snapshot, Workload,
    authorization::Authorizations,
    changes::{Before, Changes},
    endpoints::Lookup,
    enrollment,
    peer_auth::Policies,
    snapshot::Numbers,
};

/// Options of enrolled pods that are known, but not read by this version ([E.6]).
const UNREAD_OPTIONS: [&str; 3] =
    ["ambient.istio.io/bypass-inbound-capture", "ambient.istio.io/dns-capture", "istio.io/reroute-virtual-interfaces"];

/// Compiles `cluster` as it is now.
///
/// `before` gives rules their numbers and the generation its successor; where the content is the same, the generation
/// is too. What is made from objects that are still the same ones is taken over from it.
pub fn compile(cluster: &Cluster, options: &Options, before: Option<Before<'_>>) -> Snapshot {
    let mut changes = Changes::of(cluster, before);
    let previous = before.map(|before| before.snapshot);
    let mut warnings = Vec::new();
    let policies = Policies::of(cluster, options, &mut warnings);
    let layers = previous.map(|previous| previous.layers.clone()).unwrap_or_default();
    let mut authorizations = Authorizations::of(cluster, options, layers, &mut warnings);
    let (rules, numbers) = number_rules(cluster, previous);
    let lookup = Lookup::of(cluster);
    let mut snapshot = Snapshot {
        generation: 0,
        mesh: cluster.mesh.clone(),
        workloads: HashMap::with_capacity(cluster.pods.len()),
        by_ip: HashMap::with_capacity(cluster.pods.len()),
        services: BTreeMap::new(),
        by_vip: HashMap::new(),
        rules,
        warnings: Vec::new(),
        layers: Default::default(),
        numbers: numbers.clone(),
    };
    let place = |node: &Node, label: &str| node.labels.get(label).map(|at| Arc::<str>::from(at.as_str()));
    let places: HashMap<&Arc<str>, _> = cluster
        .nodes
        .iter()
        .map(|(name, node)| {
            let (region, zone) = ("topology.kubernetes.io/region", "topology.kubernetes.io/zone");
            (name, (place(node, region), place(node, zone)))
        })
        .collect();
    // Few texts for many pods.
    let mut reasons: HashSet<Arc<str>> = HashSet::new();
    for pod in cluster.pods.values() {
        let namespace = &pod.object.namespace;
        let known = changes.workload(pod);
        let enrollment = known.map_or_else(
            || {
                let mut enrollment = enrollment(pod, cluster.namespaces.get(namespace).map(|n| &**n), options);
                match reasons.get(&enrollment.reason) {
                    Some(same) => enrollment.reason = same.clone(),
                    None => drop(reasons.insert(enrollment.reason.clone())),
                }
                Cow::Owned(enrollment)
            },
            |known| Cow::Borrowed(&known.enrollment),
        );
        warnings.extend(enrollment.warnings.iter().map(|warning| format!("Pod {}: {warning}", pod.object)));
        if enrollment.enrolled {
            let unread = UNREAD_OPTIONS.into_iter().filter(|name| pod.annotations.contains_key(*name));
            warnings.extend(unread.map(|name| {
                format!(
                    "Pod {}: annotation {name} has no effect in this version; the pod is captured as a whole",
                    pod.object
                )
            }));
            policies.hint_service_ports(pod, lookup.services_of(&pod.object.namespace), &mut warnings);
        }
        let make = |authorizations: &mut Authorizations| Workload {
            uid: pod.uid.clone(),
            object: pod.object.clone(),
            identity: SpiffeId {
                trust_domain: cluster.mesh.trust_domain.clone(),
                namespace: pod.object.namespace.clone(),
                service_account: pod.service_account.clone(),
            },
            ips: addresses(pod),
            node: pod.node.clone(),
            peer_auth: policies.effective(namespace, &pod.labels, |object| numbers.peer_authentication(object)),
            authorization: authorizations.effective(namespace, &pod.labels),
            enrollment: enrollment.clone().into_owned(),
            workload_name: pod.workload_name.clone(),
            labels: pod.labels.clone(),
            region: places.get(&pod.node).and_then(|(region, _)| region.clone()),
            zone: places.get(&pod.node).and_then(|(_, zone)| zone.clone()),
        };
        let workload = match known.filter(|_| changes.same_policy(namespace)) {
            Some(known) => known.clone(),
            None => {
                let old = previous.and_then(|previous| previous.workloads.get(&pod.uid));
                let workload = shared(make(&mut authorizations), old);
                if old.is_none_or(|old| !Arc::ptr_eq(old, &workload)) {
                    changes.changed(&workload);
                }
                workload
            }
        };
        for ip in &workload.ips {
            if let Some(other) = occupy(&mut snapshot.by_ip, *ip, &workload, |a, b| a.uid == b.uid) {
                changes.ambiguous();
                warnings.push(format!(
                    "Pods {} and {} both have the address {ip}: connections to it are refused until one of them is gone",
                    other.object, workload.object
                ));
            }
        }
        snapshot.workloads.insert(pod.uid.clone(), workload);
    }
    for service in cluster.services.values() {
        let compiled = match changes.service(service, lookup.slices(&service.object)) {
            Some(same) => same.clone(),
            None => {
                let compiled = lookup.compile(service, &snapshot);
                shared(compiled, previous.and_then(|p| p.services.get(&service.object)))
            }
        };
        for vip in &compiled.cluster_ips {
            if let Some(other) = occupy(&mut snapshot.by_vip, *vip, &compiled, |a, b| a.object == b.object) {
                warnings.push(format!(
                    "Services {} and {} both have the cluster IP {vip}: connections to it are refused until one of \
                     them is gone",
                    other.object, compiled.object
                ));
            }
        }
        snapshot.services.insert(service.object.clone(), compiled);
    }
    snapshot.layers = authorizations.into_layers();
    // Sorted, and each once: many pods give the same hint.
    snapshot.warnings = warnings.into_iter().collect::<BTreeSet<_>>().into_iter().collect();
    snapshot.generation = previous.map_or(1, |previous| {
        snapshot.generation = previous.generation;
        match snapshot == *previous {
            true => previous.generation,
            false => previous.generation.checked_add(1).unwrap_or(1),
        }
    });
    snapshot
}

/// What protects servers that are in no snapshot: those of recorded connections, by namespace and labels.
pub struct Servers<'a> {
    policies: Policies<'a>,
    authorizations: Authorizations,
    numbers: Numbers,
    known: HashMap<Arc<str>, HashMap<Labels, Arc<Protection>>>,
}

/// What protects one server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Protection {
    /// Its effective PeerAuthentication.
    pub peer_auth: PeerAuth,
    /// Its AuthorizationPolicies.
    pub authorization: Authorization,
}

impl Protection {
    /// As a connection needs it.
    pub fn server(&self, enrolled: bool) -> Server<'_> {
        Server { enrolled, peer_auth: &self.peer_auth, authorization: &self.authorization }
    }
}

impl<'a> Servers<'a> {
    /// By the policies of `cluster`, which `snapshot` was compiled from.
    pub fn of(cluster: &'a Cluster, options: &Options, snapshot: &Snapshot) -> Self {
        // The snapshot has them already.
        let mut warnings = Vec::new();
        Self {
            policies: Policies::of(cluster, options, &mut warnings),
            authorizations: Authorizations::of(cluster, options, snapshot.layers.clone(), &mut warnings),
            numbers: snapshot.numbers.clone(),
            known: HashMap::new(),
        }
    }

    /// What protects a server of this namespace with these labels.
    pub fn protection(&mut self, namespace: &str, labels: &Labels) -> Arc<Protection> {
        if let Some(known) = self.known.get(namespace).and_then(|known| known.get(labels)) {
            return known.clone();
        }
        let name: Arc<str> = namespace.into();
        let numbers = &self.numbers;
        let peer_auth = self.policies.effective(namespace, labels, |object| numbers.peer_authentication(object));
        let authorization = self.authorizations.effective(&name, labels);
        let protection = Arc::new(Protection { peer_auth, authorization });
        self.known.entry(name).or_default().insert(labels.clone(), protection.clone());
        protection
    }
}

/// The addresses that identify the pod: none where it shares the node's, none once it has finished.
fn addresses(pod: &Pod) -> Vec<std::net::IpAddr> {
    if pod.host_network || pod.finished { Vec::new() } else { pod.ips.clone() }
}

impl Numbers {
    fn peer_authentication(&self, object: &ObjectRef) -> RuleId {
        let rule = RuleObject { kind: RuleKind::PeerAuthentication, object: object.clone() };
        self.0.get(&rule).copied().unwrap_or_default()
    }
}

/// Numbers stay with their objects; new objects get the next free ones, the oldest object first.
fn number_rules(cluster: &Cluster, previous: Option<&Snapshot>) -> (Vec<RuleObject>, Numbers) {
    let (mut rules, mut numbers) =
        previous.map(|previous| (previous.rules.clone(), previous.numbers.clone())).unwrap_or_default();
    let mut enter = |rule: RuleObject| {
        if !numbers.0.contains_key(&rule) {
            let next = RuleId(u32::try_from(rules.len() + 1).expect("fewer than 2^32 rules"));
            // Copies the map of the snapshot before this one, once.
            Arc::make_mut(&mut numbers.0).insert(rule.clone(), next);
            rules.push(rule);
        }
    };
    let mut policies: Vec<_> = cluster.peer_authentications.values().collect();
    policies.sort_by(|a, b| a.age.cmp(&b.age));
    for policy in policies {
        enter(RuleObject { kind: RuleKind::PeerAuthentication, object: policy.object() });
    }
    let mut policies: Vec<_> = cluster.authorization_policies.values().collect();
    policies.sort_by(|a, b| a.age.cmp(&b.age));
    for policy in policies {
        for rule in 0..policy.rules.len() {
            enter(RuleObject { kind: RuleKind::AuthorizationPolicy(rule), object: policy.object() });
        }
    }
    (rules, numbers)
}

fn shared<T: Eq>(new: T, old: Option<&Arc<T>>) -> Arc<T> {
    match old {
        Some(old) if **old == new => old.clone(),
        Some(_) | None => Arc::new(new),
    }
}

/// Enters `who` at `key`; if somebody else was there alone, the entry becomes ambiguous and that other one is returned.
fn occupy<K: Eq + Hash, T>(
    map: &mut HashMap<K, Occupant<T>>,
    key: K,
    who: &Arc<T>,
    same: impl Fn(&T, &T) -> bool,
) -> Option<Arc<T>> {
    match map.entry(key) {
        Entry::Vacant(vacant) => {
            vacant.insert(Occupant::One(who.clone()));
            None
        }
        Entry::Occupied(mut occupied) => match occupied.get() {
            Occupant::One(other) if same(other, who) => None,
            Occupant::Ambiguous => None,
            Occupant::One(other) => {
                let other = other.clone();
                occupied.insert(Occupant::Ambiguous);
                Some(other)
            }
        },
    }
}

#[cfg(test)]
mod tests {
    use std::{net::IpAddr, sync::LazyLock};

    use super::{
        super::{
            Enrollment,
            testing::{Put, app, cluster, pod, policy, service},
        },
        *,
    };
    use crate::model::{MtlsMode, PodUid, TargetPort};

    fn ip(text: &str) -> IpAddr {
        text.parse().expect("an address of a test")
    }

    /// Nothing is recognised by its source.
    fn after(snapshot: &Snapshot) -> Before<'_> {
        static NONE: LazyLock<Cluster> = LazyLock::new(Cluster::default);
        Before { cluster: &NONE, snapshot }
    }

    fn uid(text: &str) -> PodUid {
        PodUid(text.into())
    }

    /// [D.5]: the same content has the same generation, and every change has its own.
    #[test]
    fn generations_count_changes() {
        let mut cluster = cluster();
        cluster.put(pod("test", "nginx", "10.0.0.1"));
        let options = Options::default();
        let first = compile(&cluster, &options, None);
        assert_eq!(first.generation, 1);
        let same = compile(&cluster, &options, Some(after(&first)));
        assert_eq!(same, first);
        cluster.put(policy("test", "strict", 1, MtlsMode::Strict));
        let second = compile(&cluster, &options, Some(after(&same)));
        assert_eq!(second.generation, 2);
        assert_ne!(second.workload(&uid("test/nginx")), first.workload(&uid("test/nginx")));
        let last = Snapshot { generation: u32::MAX, ..first };
        assert_eq!(compile(&cluster, &options, Some(after(&last))).generation, 1, "0 means none");
    }

    #[test]
    fn what_did_not_change_is_shared() {
        let mut cluster = cluster();
        cluster.put(Pod { labels: app("web").into(), ..pod("default", "web", "10.0.0.2") });
        cluster.put(pod("test", "nginx", "10.0.0.1"));
        cluster.put(service("default", "web", "10.96.0.1", 80, TargetPort::Number(8080)));
        let first = compile(&cluster, &Options::default(), None);
        cluster.put(policy("test", "strict", 1, MtlsMode::Strict));
        let second = compile(&cluster, &Options::default(), Some(after(&first)));
        assert!(Arc::ptr_eq(&first.workloads[&uid("default/web")], &second.workloads[&uid("default/web")]));
        assert!(!Arc::ptr_eq(&first.workloads[&uid("test/nginx")], &second.workloads[&uid("test/nginx")]));
        let web = ObjectRef::new("default", "web");
        assert!(Arc::ptr_eq(&first.services[&web], &second.services[&web]));
    }

    #[test]
    fn rule_numbers_stay_with_their_objects() {
        let mut cluster = cluster();
        cluster.put(pod("test", "nginx", "10.0.0.1"));
        cluster.put(policy("test", "b", 5, MtlsMode::Strict));
        let first = compile(&cluster, &Options::default(), None);
        cluster.put(policy("test", "a", 1, MtlsMode::Disable));
        let second = compile(&cluster, &Options::default(), Some(after(&first)));
        cluster.peer_authentications.remove(&ObjectRef::new("test", "b"));
        let third = compile(&cluster, &Options::default(), Some(after(&second)));
        let rule = |s: &Snapshot| s.workload(&uid("test/nginx")).map(|w| w.peer_auth.rule);
        assert_eq!((rule(&first), rule(&second), rule(&third)), (Some(RuleId(1)), Some(RuleId(2)), Some(RuleId(2))));
        assert_eq!(third.rule(RuleId(1)).map(ToString::to_string).as_deref(), Some("PeerAuthentication test/b"));
        assert_eq!(third.rule(RuleId(0)), None);
        assert_eq!(third.rule(RuleId(3)), None);
    }

    /// Rules of AuthorizationPolicies have numbers too, which they keep when others come, change or go.
    #[test]
    fn rules_of_authorization_policies_have_numbers_of_their_own() {
        use crate::{model::AuthorizationPolicy, policy::RuleRef};

        let mut cluster = cluster();
        cluster.put(policy("test", "p", 1, MtlsMode::Strict));
        let authz = |name: &str, created, rules: usize| AuthorizationPolicy {
            age: crate::model::Age { created, name: name.into(), namespace: "test".into() },
            selector: Labels::new(),
            selector_written_empty: false,
            revision: None,
            has_targets: false,
            action: Default::default(),
            dry_run: false,
            rules: vec![Default::default(); rules],
        };
        let put = |cluster: &mut Cluster, policy: AuthorizationPolicy| {
            cluster.authorization_policies.insert(policy.object(), Arc::new(policy));
        };
        // The same name as the PeerAuthentication's.
        put(&mut cluster, authz("p", 5, 2));
        let first = compile(&cluster, &Options::default(), None);
        put(&mut cluster, authz("a", 1, 1));
        put(&mut cluster, authz("p", 5, 3));
        let second = compile(&cluster, &Options::default(), Some(after(&first)));
        let number = |snapshot: &Snapshot, name: &str, rule| {
            snapshot.number(&RuleRef { policy: ObjectRef::new("test", name), rule }).0
        };
        assert_eq!([0, 1, 2].map(|rule| number(&first, "p", rule)), [2, 3, 0]);
        assert_eq!([0, 1, 2].map(|rule| number(&second, "p", rule)), [2, 3, 5]);
        assert_eq!(number(&second, "a", 0), 4);
        let name = |number| second.rule(RuleId(number)).map(ToString::to_string).unwrap_or_default();
        assert_eq!(name(3), "AuthorizationPolicy test/p#1");
        assert_eq!(name(1), "PeerAuthentication test/p");
        let words = |reason, rule| {
            let (answer, generation) = (culvert_common::Answer::Refuse, 2);
            second.explain(&culvert_common::Verdict { answer, reason, rule, generation })
        };
        assert_eq!(words(culvert_common::Reason::ExplicitDeny, 3), "explicitly denied by: test/p, rule 1");
        assert_eq!(words(culvert_common::Reason::NoAllowMatch, 0), "allow policies exist, but none allowed");
    }

    /// §13: never by the node's address; finished pods have given theirs back, terminating ones have not.
    #[test]
    fn only_pods_with_an_address_of_their_own_are_known_by_it() {
        let mut cluster = cluster();
        cluster.put(Pod { host_network: true, ..pod("test", "host", "192.168.0.1") });
        cluster.put(Pod { finished: true, ..pod("test", "job", "10.0.0.1") });
        cluster.put(Pod { terminating: true, ready: false, ..pod("test", "going", "10.0.0.2") });
        let snapshot = compile(&cluster, &Options::default(), None);
        assert_eq!(snapshot.workloads.len(), 3);
        assert_eq!(snapshot.by_ip.keys().collect::<Vec<_>>(), [&ip("10.0.0.2")]);
        assert_eq!(snapshot.workload_by_ip(ip("::ffff:10.0.0.2")), snapshot.workload_by_ip(ip("10.0.0.2")));
        let Enrollment { row, .. } = snapshot.workloads[&uid("test/host")].enrollment;
        assert_eq!(row, 1);
    }

    #[test]
    fn an_address_of_two_pods_identifies_neither() {
        let mut cluster = cluster();
        for name in ["a", "b", "c"] {
            cluster.put(pod("test", name, "10.0.0.1"));
        }
        let snapshot = compile(&cluster, &Options::default(), None);
        assert_eq!(snapshot.workload_by_ip(ip("10.0.0.1")), Some(&Occupant::Ambiguous));
        assert!(snapshot.warnings[0].starts_with("Pods test/a and test/b both have the address 10.0.0.1"));
        // The new pod of an address that a finished one had is alone.
        cluster.pods.clear();
        cluster.put(pod("test", "a", "10.0.0.1"));
        cluster.put(Pod { finished: true, ..pod("test", "b", "10.0.0.1") });
        let snapshot = compile(&cluster, &Options::default(), Some(after(&snapshot)));
        assert!(matches!(snapshot.workload_by_ip(ip("10.0.0.1")), Some(Occupant::One(w)) if w.uid == uid("test/a")));
    }

    /// [I.1], [I.2]
    #[test]
    fn identity_comes_from_namespace_and_service_account() {
        let mut cluster = cluster();
        cluster.mesh.trust_domain = crate::model::TrustDomain::new("example.org").expect("valid");
        cluster.put(Pod { service_account: "web".into(), ..pod("test", "nginx", "10.0.0.1") });
        let snapshot = compile(&cluster, &Options::default(), None);
        let identity = &snapshot.workloads[&uid("test/nginx")].identity;
        assert_eq!(identity.to_string(), "spiffe://example.org/ns/test/sa/web");
    }

    /// [E.6]: what an option asks for does not happen, so it is reported; nothing is opened by it.
    #[test]
    fn options_that_are_not_read_are_reported() {
        let mut cluster = cluster();
        let annotations = [("ambient.istio.io/bypass-inbound-capture".to_owned(), "true".to_owned())].into();
        cluster.put(Pod { annotations, ..pod("test", "nginx", "10.0.0.1") });
        let snapshot = compile(&cluster, &Options::default(), None);
        assert!(snapshot.workloads[&uid("test/nginx")].enrollment.enrolled);
        assert!(snapshot.warnings[0].contains("bypass-inbound-capture has no effect"), "{:?}", snapshot.warnings);
    }

    /// [E.1]: with the pod's name.
    #[test]
    fn odd_labels_are_reported() {
        let mut cluster = cluster();
        let labels = Arc::new([("istio.io/dataplane-mode".to_owned(), "off".to_owned())].into());
        cluster.put(Pod { labels, ..pod("test", "nginx", "10.0.0.1") });
        let snapshot = compile(&cluster, &Options::default(), None);
        assert!(snapshot.warnings[0].starts_with("Pod test/nginx: label istio.io/dataplane-mode=\"off\" of the pod"));
    }
}
