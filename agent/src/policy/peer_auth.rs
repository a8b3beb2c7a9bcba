//! Effective PeerAuthentication of a pod (specification §5): which policies count, and what they add up to.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use culvert_common::Mode;

use crate::model::{Cluster, Labels, MtlsMode, ObjectRef, PeerAuthentication, Pod, Service, TargetPort};

use super::{
    Options, RuleId,
    selecting::{Selecting, matches},
};

/// Effective PeerAuthentication of one pod (specification §5.2), a single unit ([PA.13]).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerAuth {
    /// Mode of every port that is not in [`PeerAuth::ports`].
    pub mode: Mode,
    /// The object that set it; 0 for the built-in PERMISSIVE.
    pub rule: RuleId,
    /// Ports whose mode differs from [`PeerAuth::mode`].
    pub ports: BTreeMap<u16, (Mode, RuleId)>,
}

impl PeerAuth {
    /// Mode of a workload port, and the object that set it.
    pub fn of_port(&self, port: u16) -> (Mode, RuleId) {
        self.ports.get(&port).copied().unwrap_or((self.mode, self.rule))
    }
}

/// The policies of a cluster, by scope; within a scope the oldest first ([C.2]).
pub(super) struct Policies<'a> {
    mesh: Option<&'a PeerAuthentication>,
    namespaces: HashMap<&'a str, Scope<'a>>,
}

#[derive(Default)]
struct Scope<'a> {
    wide: Option<&'a PeerAuthentication>,
    selecting: Option<Selecting<PeerAuthentication>>,
}

impl<'a> Policies<'a> {
    /// Sorts the policies of this revision ([C.5]) into scopes, and warns of those that have no effect.
    pub(super) fn of(cluster: &'a Cluster, options: &Options, warnings: &mut Vec<String>) -> Self {
        let mut all: Vec<&Arc<PeerAuthentication>> = cluster
            .peer_authentications
            .values()
            .filter(|policy| policy.revision.as_ref().is_none_or(|revision| *revision == options.revision))
            .collect();
        all.sort_by(|a, b| a.age.cmp(&b.age));
        let root = &*cluster.mesh.root_namespace;
        let mut policies = Self { mesh: None, namespaces: HashMap::new() };
        let mut selecting: HashMap<&str, Vec<_>> = HashMap::new();
        for policy in all {
            let name = policy.object();
            if policy.selector_written_empty {
                warnings.push(format!(
                    "PeerAuthentication {name}: an empty selector selects every pod in scope; remove it to say so [C.4]"
                ));
            }
            let namespace = &*policy.age.namespace;
            if namespace == root {
                if !policy.selector.is_empty() {
                    warnings.push(format!(
                        "PeerAuthentication {name} has no effect: a selector in the root namespace {root} selects \
                         nothing; move it to the namespace of its pods, or remove the selector [PA.4]"
                    ));
                } else {
                    keep_oldest(&mut policies.mesh, policy, "mesh-wide", "PA.1", warnings);
                }
                continue;
            }
            if policy.selector.is_empty() {
                let scope = policies.namespaces.entry(namespace).or_default();
                keep_oldest(&mut scope.wide, policy, "namespace-wide", "PA.2", warnings);
            } else {
                selecting.entry(namespace).or_default().push(policy.clone());
            }
        }
        for (namespace, selecting) in selecting {
            policies.namespaces.entry(namespace).or_default().selecting = Some(Selecting::new(selecting));
        }
        policies
    }

    /// [PA.3]; the winner is chosen by age before inheritance ([PA.5]).
    fn workload(&self, namespace: &str, labels: &Labels) -> Option<&PeerAuthentication> {
        self.namespaces.get(namespace)?.selecting.as_ref()?.oldest(labels).map(|policy| &**policy)
    }

    /// Specification §5.2, for every port of a pod at once.
    pub(super) fn effective(&self, namespace: &str, labels: &Labels, rule: impl Fn(&ObjectRef) -> RuleId) -> PeerAuth {
        let workload = self.workload(namespace, labels);
        let namespace = self.namespaces.get(namespace).and_then(|scope| scope.wide);
        let mut result = PeerAuth { mode: Mode::Permissive, rule: RuleId::default(), ports: BTreeMap::new() };
        for policy in [self.mesh, namespace, workload].into_iter().flatten() {
            if let Some(mode) = said(policy.mode) {
                (result.mode, result.rule) = (mode, rule(&policy.object()));
            }
        }
        if let Some(policy) = workload {
            // UNSET equals the mode after inheritance ([PA.7]), so it needs no entry, and neither does an equal mode.
            let ports = policy.port_modes.iter().filter_map(|(port, mode)| Some((*port, said(*mode)?)));
            let set_by = rule(&policy.object());
            result.ports = ports.filter(|(_, mode)| *mode != result.mode).map(|(p, m)| (p, (m, set_by))).collect();
        }
        result
    }

    /// Ports that look like Service ports: nothing of the pod is known to listen there, and a Service of the pod has
    /// that number and leads elsewhere (specification §19).
    pub(super) fn hint_service_ports<'s>(
        &self,
        pod: &Pod,
        services: impl Iterator<Item = &'s Service>,
        warnings: &mut Vec<String>,
    ) {
        let Some(policy) =
            self.workload(&pod.object.namespace, &pod.labels).filter(|policy| !policy.port_modes.is_empty())
        else {
            return;
        };
        let target = |port: &crate::model::ServicePort| match &port.target {
            TargetPort::Number(number) => Some(*number),
            TargetPort::Name(name) => pod.named_ports.get(&**name).copied(),
        };
        let ports: Vec<_> = services
            .filter(|service| !service.selector.is_empty() && matches(&service.selector, &pod.labels))
            .flat_map(|service| service.ports.iter().map(move |port| (service, port)))
            .collect();
        for number in policy.port_modes.keys() {
            let known = pod.named_ports.values().any(|port| port == number)
                || ports.iter().any(|(_, port)| target(port) == Some(*number));
            let taken_for = ports.iter().find(|(_, port)| port.port == *number);
            if let (false, Some((service, port))) = (known, taken_for) {
                let remedy = target(port).map_or_else(String::new, |t| format!("; the pod's port is {t}"));
                warnings.push(format!(
                    "PeerAuthentication {}: portLevelMtls {number} is a port of Service {}, not of the pods it selects\
                     {remedy} [PA.6]",
                    policy.object(),
                    service.object,
                ));
            }
        }
    }
}

fn keep_oldest<'a>(
    slot: &mut Option<&'a PeerAuthentication>,
    policy: &'a PeerAuthentication,
    scope: &str,
    rule: &str,
    warnings: &mut Vec<String>,
) {
    match slot {
        None => *slot = Some(policy),
        Some(oldest) => warnings.push(format!(
            "PeerAuthentication {} has no effect: {} is the oldest {scope} one, and only that counts; remove one of \
             them [{rule}]",
            policy.object(),
            oldest.object(),
        )),
    }
}

fn said(mode: MtlsMode) -> Option<Mode> {
    match mode {
        MtlsMode::Unset => None,
        MtlsMode::Disable => Some(Mode::Disable),
        MtlsMode::Permissive => Some(Mode::Permissive),
        MtlsMode::Strict => Some(Mode::Strict),
    }
}

#[cfg(test)]
mod tests {
    use culvert_common::Reason;
    use proptest::prelude::*;

    use super::{
        super::{
            Client, Connection, Snapshot, Verdict, compile, decide,
            testing::{Put, app, cluster, pod, policy, service},
        },
        *,
    };
    use crate::model::{MtlsMode::*, PodUid};

    fn compiled(policies: impl IntoIterator<Item = PeerAuthentication>) -> Snapshot {
        let mut cluster = cluster();
        for (namespace, name, ip) in
            [("test", "nginx", "10.0.0.1"), ("default", "web", "10.0.0.2"), ("istio-system", "gateway", "10.0.0.3")]
        {
            cluster.put(Pod { labels: app(name).into(), ..pod(namespace, name, ip) });
        }
        policies.into_iter().for_each(|policy| cluster.put(policy));
        compile(&cluster, &Options::default(), None)
    }

    /// A connection to a pod of the test by a client of the mesh, or another.
    fn judge(snapshot: &Snapshot, pod: &str, client: Client<'_>, port: u16) -> Verdict {
        let server = snapshot.workload(&PodUid(pod.into())).expect("a pod of the test").server();
        decide(snapshot, &Connection { server, client, source_ip: None, destination_ip: None, port })
    }

    fn identity() -> crate::model::SpiffeId {
        "spiffe://cluster.local/ns/default/sa/web".parse().expect("valid")
    }

    fn of(snapshot: &Snapshot, pod: &str, port: u16) -> Mode {
        snapshot.workload(&PodUid(pod.into())).expect("a pod of the test").peer_auth.of_port(port).0
    }

    fn nginx(policies: impl IntoIterator<Item = PeerAuthentication>, port: u16) -> Mode {
        of(&compiled(policies), "test/nginx", port)
    }

    /// Selects nginx.
    fn workload(name: &str, created: i64, mode: MtlsMode, ports: &[(u16, MtlsMode)]) -> PeerAuthentication {
        PeerAuthentication {
            selector: app("nginx"),
            port_modes: ports.iter().copied().collect(),
            ..policy("test", name, created, mode)
        }
    }

    /// [PA.1], [PA.2], [PA.3], §5.2: each scope replaces the one above it, UNSET inherits.
    #[test]
    fn the_narrowest_scope_that_says_something_decides() {
        let mesh = policy("istio-system", "default", 1, Strict);
        let wide = policy("test", "wide", 1, Disable);
        for (policies, expected) in [
            (vec![], Mode::Permissive),
            (vec![mesh.clone()], Mode::Strict),
            (vec![mesh.clone(), wide.clone()], Mode::Disable),
            (vec![mesh.clone(), wide.clone(), workload("w", 1, Permissive, &[])], Mode::Permissive),
            (vec![mesh.clone(), wide.clone(), workload("w", 1, Unset, &[])], Mode::Disable),
            (vec![mesh.clone(), policy("test", "wide", 1, Unset)], Mode::Strict),
            (vec![policy("istio-system", "default", 1, Unset)], Mode::Permissive),
            (vec![policy("default", "elsewhere", 1, Strict)], Mode::Permissive),
        ] {
            assert_eq!(nginx(policies.clone(), 80), expected, "{policies:?}");
        }
    }

    /// [PA.1], [PA.2], [PA.3], [PA.5], [C.2]: one per scope, the oldest, before inheritance.
    #[test]
    fn the_oldest_hides_younger_ones_even_when_it_says_unset() {
        assert_eq!(nginx([policy("test", "b", 1, Unset), policy("test", "a", 2, Strict)], 80), Mode::Permissive);
        assert_eq!(nginx([policy("test", "b", 2, Strict), policy("test", "a", 2, Disable)], 80), Mode::Disable);
        assert_eq!(nginx([workload("b", 1, Unset, &[]), workload("a", 2, Strict, &[])], 80), Mode::Permissive);
        let mesh = [policy("istio-system", "b", 1, Permissive), policy("istio-system", "a", 2, Strict)];
        assert_eq!(nginx(mesh, 80), Mode::Permissive);
        // Absent creation is oldest ([C.11]).
        assert_eq!(nginx([policy("test", "z", i64::MIN, Disable), policy("test", "a", 0, Strict)], 80), Mode::Disable);
        // More matching labels count for nothing.
        let mut two_labels = workload("a", 2, Strict, &[]);
        two_labels.selector.insert("tier".into(), "front".into());
        let mut cluster = cluster();
        let mut labels = app("nginx");
        labels.insert("tier".into(), "front".into());
        cluster.put(Pod { labels: labels.into(), ..pod("test", "nginx", "10.0.0.1") });
        cluster.put(two_labels);
        cluster.put(workload("b", 1, Disable, &[]));
        assert_eq!(of(&compile(&cluster, &Options::default(), None), "test/nginx", 80), Mode::Disable);
    }

    /// [PA.2], §19: the second namespace-wide one is reported.
    #[test]
    fn a_second_policy_of_a_scope_is_reported() {
        for namespace in ["test", "istio-system"] {
            let snapshot = compiled([policy(namespace, "old", 1, Strict), policy(namespace, "new", 2, Permissive)]);
            let expected = format!("PeerAuthentication {namespace}/new has no effect: {namespace}/old is the oldest");
            assert!(snapshot.warnings.iter().any(|w| w.starts_with(&expected)), "{:?}", snapshot.warnings);
        }
        let both = compiled([workload("a", 1, Strict, &[]), policy("test", "b", 1, Strict)]);
        assert_eq!(both.warnings, Vec::<String>::new());
    }

    /// [PA.4]
    #[test]
    fn a_selector_in_the_root_namespace_selects_nothing() {
        let mut inert = policy("istio-system", "inert", 1, Strict);
        inert.selector = app("gateway");
        let mut second = policy("istio-system", "second", 1, Strict);
        second.selector = app("nginx");
        let snapshot = compiled([inert, second]);
        assert_eq!(of(&snapshot, "istio-system/gateway", 80), Mode::Permissive);
        assert_eq!(of(&snapshot, "test/nginx", 80), Mode::Permissive);
        assert_eq!(snapshot.warnings.iter().filter(|w| w.contains("[PA.4]")).count(), 2, "{:?}", snapshot.warnings);
    }

    /// [C.4], §20: an empty selector is none, in the mesh's scope too, and is reported.
    #[test]
    fn an_empty_selector_is_the_whole_scope() {
        for namespace in ["test", "istio-system"] {
            let written = PeerAuthentication { selector_written_empty: true, ..policy(namespace, "all", 1, Strict) };
            let snapshot = compiled([written]);
            assert_eq!(of(&snapshot, "test/nginx", 80), Mode::Strict, "{namespace}");
            assert!(snapshot.warnings.iter().any(|w| w.contains("[C.4]")), "{:?}", snapshot.warnings);
        }
    }

    /// [C.5]
    #[test]
    fn a_policy_of_another_revision_does_not_apply() {
        for (revision, expected) in
            [(None, Mode::Strict), (Some("default"), Mode::Strict), (Some("canary"), Mode::Permissive)]
        {
            let revision = revision.map(str::to_owned);
            let strict = PeerAuthentication { revision, ..policy("test", "strict", 1, Strict) };
            assert_eq!(nginx([strict], 80), expected);
        }
    }

    /// [PA.6], [PA.7], [PA.8]
    #[test]
    fn ports_of_the_winning_workload_policy_override_its_mode() {
        let policies = [
            workload("w", 1, Strict, &[(8080, Permissive), (8081, Disable), (8082, Unset), (8083, Strict)]),
            workload("younger", 2, Strict, &[(9090, Disable)]),
        ];
        let snapshot = compiled(policies);
        for (port, expected) in [
            (80, Mode::Strict),
            (8080, Mode::Permissive),
            (8081, Mode::Disable),
            (8082, Mode::Strict),
            (8083, Mode::Strict),
            (9090, Mode::Strict),
        ] {
            assert_eq!(of(&snapshot, "test/nginx", port), expected, "{port}");
        }
        let peer_auth = &snapshot.workload(&PodUid("test/nginx".into())).expect("there").peer_auth;
        assert_eq!(peer_auth.ports.keys().collect::<Vec<_>>(), [&8080, &8081], "only ports that differ");
    }

    /// [PA.14]: ports without a selector are ignored, also where a source lets them through.
    #[test]
    fn ports_need_a_selector() {
        let wide = PeerAuthentication { port_modes: [(8080, Disable)].into(), ..policy("test", "wide", 1, Strict) };
        assert_eq!(nginx([wide], 8080), Mode::Strict);
    }

    /// §20, the first two traps, and [PA.9].
    #[test]
    fn traps_of_other_data_planes_are_avoided() {
        let mesh = policy("istio-system", "default", 1, Strict);
        let open = compiled([mesh.clone(), workload("w", 1, Unset, &[(8080, Disable)])]);
        assert_eq!((of(&open, "test/nginx", 8080), of(&open, "test/nginx", 80)), (Mode::Disable, Mode::Strict));
        let wide = policy("test", "wide", 1, Unset);
        let one = compiled([mesh, wide, workload("w", 1, Unset, &[(8080, Permissive)])]);
        assert_eq!((of(&one, "test/nginx", 8080), of(&one, "test/nginx", 80)), (Mode::Permissive, Mode::Strict));
    }

    /// §5.3 and §5.4 through the one verdict function, with the object that decided.
    #[test]
    fn verdicts_name_the_object_that_decided() {
        let snapshot = compiled([
            policy("istio-system", "default", 1, Strict),
            workload("exception", 1, Unset, &[(8080, Permissive)]),
        ]);
        let identity = identity();
        for (client, port, allowed, words) in [
            (Client::Plain, 80, false, "strict-requires-mtls by PeerAuthentication istio-system/default"),
            (Client::Plain, 8080, true, "no-allow-policies"),
            (Client::Tunnel(&identity), 80, true, "no-allow-policies"),
            (Client::Probe, 80, true, "probe"),
            (Client::SamePod, 80, true, "same-pod"),
            (Client::Plain, 15006, false, "loop"),
            (Client::Plain, 15008, false, "loop"),
            (Client::Tunnel(&identity), 15008, false, "loop"),
        ] {
            let verdict = judge(&snapshot, "test/nginx", client, port);
            assert_eq!((verdict.allowed, verdict.to_string().as_str()), (allowed, words), "{client:?} {port}");
            assert_eq!(verdict.generation, snapshot.generation);
        }
    }

    /// [PA.11]
    #[test]
    fn a_pod_outside_the_mesh_has_no_policy() {
        let mut cluster = cluster();
        let label = |value: &str| Arc::new([("istio.io/dataplane-mode".to_owned(), value.to_owned())].into());
        cluster.put(Pod { labels: label("none"), ..pod("test", "legacy", "10.0.0.1") });
        cluster.put(policy("test", "strict", 1, Strict));
        let snapshot = compile(&cluster, &Options::default(), None);
        let legacy = snapshot.workload(&PodUid("test/legacy".into())).expect("there");
        let verdict = judge(&snapshot, "test/legacy", Client::Plain, 80);
        assert_eq!((verdict.allowed, verdict.reason), (true, Reason::ServerNotEnrolled));
        assert_eq!(legacy.peer_auth.mode, Mode::Strict, "kept, for the day it is enrolled");
    }

    /// §19: keyed by the Service's port.
    #[test]
    fn a_service_port_in_a_policy_gets_a_hint() {
        for (key, hinted) in [(80, true), (8080, false), (9999, false)] {
            let mut cluster = cluster();
            for name in ["a", "b"] {
                cluster.put(Pod { labels: app("nginx").into(), ..pod("test", name, "10.0.0.1") });
            }
            cluster.put(service("test", "nginx", "10.96.0.1", 80, TargetPort::Number(8080)));
            cluster.put(workload("w", 1, Strict, &[(key, Permissive)]));
            let snapshot = compile(&cluster, &Options::default(), None);
            let hints = snapshot.warnings.iter().filter(|w| w.contains("[PA.6]")).count();
            assert_eq!(hints, usize::from(hinted), "{:?}", snapshot.warnings);
        }
    }

    fn any_mode() -> impl Strategy<Value = MtlsMode> {
        prop_oneof![Just(Unset), Just(Disable), Just(Permissive), Just(Strict)]
    }

    fn any_policy() -> impl Strategy<Value = PeerAuthentication> {
        (
            prop_oneof![Just("istio-system"), Just("test"), Just("default")],
            "[a-c]",
            0i64..3,
            any_mode(),
            prop_oneof![
                3 => Just(Labels::new()),
                2 => Just(app("nginx")),
                1 => Just(app("web")),
                1 => Just([("tier".to_owned(), "x".to_owned())].into()),
            ],
            proptest::collection::btree_map(8080u16..8083, any_mode(), 0..3),
            prop_oneof![4 => Just(None), 1 => Just(Some("default".to_owned())), 1 => Just(Some("old".to_owned()))],
        )
            .prop_map(|(namespace, name, created, mode, selector, port_modes, revision)| PeerAuthentication {
                selector,
                port_modes,
                revision,
                ..policy(namespace, &name, created, mode)
            })
    }

    /// Specification §5.1 and §5.2 as they are written, for one pod and one port, with no index and no sharing.
    fn by_the_book(policies: &[PeerAuthentication], pod: &Pod, port: u16) -> Mode {
        let ours = || policies.iter().filter(|p| p.revision.as_deref().unwrap_or("default") == "default");
        let namespace = &pod.object.namespace;
        let oldest = |it: Vec<&PeerAuthentication>| {
            it.into_iter().min_by_key(|p| (p.age.created, p.age.name.clone(), p.age.namespace.clone())).cloned()
        };
        let mesh = oldest(ours().filter(|p| &*p.age.namespace == "istio-system" && p.selector.is_empty()).collect());
        let wide = ours().filter(|p| &*p.age.namespace != "istio-system");
        let wide = oldest(wide.filter(|p| p.age.namespace == *namespace && p.selector.is_empty()).collect());
        let own = ours().filter(|p| &*p.age.namespace != "istio-system" && p.age.namespace == *namespace);
        let own = own.filter(|p| !p.selector.is_empty());
        let own = oldest(own.filter(|p| p.selector.iter().all(|(k, v)| pod.labels.get(k) == Some(v))).collect());
        let mut mode = Permissive;
        for p in [&mesh, &wide, &own].into_iter().flatten() {
            if p.mode != Unset {
                mode = p.mode;
            }
        }
        if let Some(port_mode) = own.and_then(|p| p.port_modes.get(&port).copied())
            && port_mode != Unset
        {
            mode = port_mode;
        }
        match mode {
            Disable => Mode::Disable,
            Strict => Mode::Strict,
            Permissive | Unset => Mode::Permissive,
        }
    }

    proptest! {
        /// §5.2 against an evaluator that does it the slow way.
        #[test]
        fn compiled_modes_equal_the_specification(policies in proptest::collection::vec(any_policy(), 0..9)) {
            let snapshot = compiled(policies.clone());
            // As a cluster keeps them: one per reference, the last one wins.
            let mut kept = Vec::<PeerAuthentication>::new();
            for policy in policies {
                kept.retain(|other| other.object() != policy.object());
                kept.push(policy);
            }
            for (namespace, name) in [("test", "nginx"), ("default", "web"), ("istio-system", "gateway")] {
                let subject = Pod { labels: app(name).into(), ..pod(namespace, name, "10.0.0.1") };
                for port in [80, 8080, 8081, 8082] {
                    prop_assert_eq!(of(&snapshot, &subject.uid.0, port), by_the_book(&kept, &subject, port));
                }
            }
        }

        /// §5.4: what is denied, in the words of that table.
        #[test]
        fn plaintext_is_denied_exactly_where_the_port_is_strict(policies in proptest::collection::vec(any_policy(), 0..6)) {
            let snapshot = compiled(policies);
            let server = snapshot.workload(&PodUid("test/nginx".into())).expect("there");
            for port in [80, 8080, 8081, 8082] {
                let strict = server.peer_auth.of_port(port).0 == Mode::Strict;
                let refused = !judge(&snapshot, "test/nginx", Client::Plain, port).allowed;
                prop_assert_eq!(refused, strict);
                prop_assert!(judge(&snapshot, "test/nginx", Client::Tunnel(&identity()), port).allowed);
            }
        }
    }
}
