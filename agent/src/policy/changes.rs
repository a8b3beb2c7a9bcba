//! What has changed from one cluster to the next, so that compiling costs by the change and not by the cluster.
//!
//! A source keeps the objects that stay what they are ([`Cluster`] holds them by `Arc`), so a pointer tells.

use std::{collections::HashSet, iter, sync::Arc};

use crate::model::{Cluster, EndpointSlice, ObjectRef, Objects, Pod, PodUid, Service};

use super::{CompiledService, Occupant, Snapshot, Workload};

/// What was compiled last, with the same options.
#[derive(Clone, Copy, Debug)]
pub struct Before<'a> {
    /// What it was compiled from. An empty one shares nothing that has to be recognised by its source.
    pub cluster: &'a Cluster,
    /// What came of it.
    pub snapshot: &'a Snapshot,
}

/// The difference between a cluster and the one before.
pub(super) struct Changes<'a> {
    before: Option<Before<'a>>,
    /// The mesh configuration is the same; if not, nothing else is looked at.
    same_mesh: bool,
    pods: HashSet<&'a PodUid>,
    namespaces: HashSet<&'a str>,
    nodes: HashSet<&'a str>,
    peer_authentications: Namespaces<'a>,
    authorization_policies: Namespaces<'a>,
    services: HashSet<&'a ObjectRef>,
    /// Services that a changed slice belongs to, now or before.
    slices: HashSet<&'a ObjectRef>,
    /// Namespaces with a pod that is not what it was.
    workloads: HashSet<Arc<str>>,
    /// Some address is, or was, claimed by several.
    ambiguous: bool,
}

/// Namespaces whose policies have changed.
#[derive(Default)]
struct Namespaces<'a> {
    names: HashSet<&'a str>,
    /// The root namespace among them, whose policies concern all.
    all: bool,
}

impl Namespaces<'_> {
    fn has(&self, namespace: &str) -> bool {
        self.all || self.names.contains(namespace)
    }
}

/// Keys of entries that are in one of the two only, or are another object.
fn differing<'m, K: Ord, T>(old: &'m Objects<K, T>, new: &'m Objects<K, T>) -> impl Iterator<Item = &'m K> {
    let looked_at = if old.same(new) { 0 } else { usize::MAX };
    let (mut old, mut new) = (old.iter().take(looked_at).peekable(), new.iter().take(looked_at).peekable());
    iter::from_fn(move || {
        loop {
            let (from, to) = match (old.peek(), new.peek()) {
                (None, None) => return None,
                (Some(_), None) => return old.next().map(|(key, _)| key),
                (None, Some(_)) => return new.next().map(|(key, _)| key),
                (Some(from), Some(to)) => (*from, *to),
            };
            if from.0 < to.0 {
                old.next();
                return Some(from.0);
            }
            if from.0 > to.0 {
                new.next();
                return Some(to.0);
            }
            old.next();
            new.next();
            if !Arc::ptr_eq(from.1, to.1) {
                return Some(to.0);
            }
        }
    })
}

impl<'a> Changes<'a> {
    /// From what was compiled before to `cluster`.
    pub(super) fn of(cluster: &'a Cluster, before: Option<Before<'a>>) -> Self {
        let mut changes = Self {
            before,
            same_mesh: false,
            pods: HashSet::new(),
            namespaces: HashSet::new(),
            nodes: HashSet::new(),
            peer_authentications: Namespaces::default(),
            authorization_policies: Namespaces::default(),
            services: HashSet::new(),
            slices: HashSet::new(),
            workloads: HashSet::new(),
            ambiguous: false,
        };
        let Some(Before { cluster: old, snapshot }) = before else { return changes };
        changes.same_mesh = old.mesh == cluster.mesh;
        if !changes.same_mesh {
            return changes;
        }
        let root = &*cluster.mesh.root_namespace;
        let of_policies = |differing: &mut dyn Iterator<Item = &'a ObjectRef>| {
            let names: HashSet<&str> = differing.map(|object| &*object.namespace).collect();
            Namespaces { all: names.contains(root), names }
        };
        changes.peer_authentications =
            of_policies(&mut differing(&old.peer_authentications, &cluster.peer_authentications));
        changes.authorization_policies =
            of_policies(&mut differing(&old.authorization_policies, &cluster.authorization_policies));
        changes.pods = differing(&old.pods, &cluster.pods).collect();
        changes.namespaces = differing(&old.namespaces, &cluster.namespaces).map(|name| &**name).collect();
        changes.nodes = differing(&old.nodes, &cluster.nodes).map(|name| &**name).collect();
        changes.services = differing(&old.services, &cluster.services).collect();
        for name in differing(&old.endpoint_slices, &cluster.endpoint_slices) {
            let slices = [old.endpoint_slices.get(name), cluster.endpoint_slices.get(name)];
            changes.slices.extend(slices.into_iter().flatten().map(|slice| &slice.service));
        }
        for uid in &changes.pods {
            let pods = [old.pods.get(*uid), cluster.pods.get(*uid)];
            changes.workloads.extend(pods.into_iter().flatten().map(|pod| pod.object.namespace.clone()));
        }
        changes.ambiguous = snapshot.by_ip.values().any(|occupant| matches!(occupant, Occupant::Ambiguous));
        changes
    }

    /// The workload as it was, if the pod, its namespace and its node are what they were: all but its policy is as it was.
    pub(super) fn workload(&self, pod: &Pod) -> Option<&'a Arc<Workload>> {
        let same = self.same_mesh
            && !self.pods.contains(&pod.uid)
            && !self.namespaces.contains(&*pod.object.namespace)
            && !self.nodes.contains(&*pod.node);
        if same { self.before?.snapshot.workloads.get(&pod.uid) } else { None }
    }

    /// Whether the policies for pods of this namespace are what they were.
    pub(super) fn same_policy(&self, namespace: &str) -> bool {
        !self.peer_authentications.has(namespace) && !self.authorization_policies.has(namespace)
    }

    /// The workload is another one now.
    pub(super) fn changed(&mut self, workload: &Workload) {
        if !self.workloads.contains(&workload.object.namespace) {
            self.workloads.insert(workload.object.namespace.clone());
        }
    }

    /// Two pods claim one address.
    pub(super) fn ambiguous(&mut self) {
        self.ambiguous = true;
    }

    /// The Service as it was, if nothing that it is made from has changed. To be asked when all workloads are known.
    pub(super) fn service(&self, service: &Service, slices: &[&EndpointSlice]) -> Option<&'a Arc<CompiledService>> {
        let own = &service.object.namespace;
        // An endpoint that is only an address, or a pod of elsewhere, depends on more than this namespace.
        let here = |slice: &&EndpointSlice| {
            slice.endpoints.iter().all(|e| e.pod.as_ref().is_some_and(|(_, pod)| pod.namespace == *own))
        };
        let same = self.same_mesh
            && !self.ambiguous
            && !self.services.contains(&service.object)
            && !self.slices.contains(&service.object)
            && !self.workloads.contains(own)
            && slices.iter().all(here);
        if same { self.before?.snapshot.services.get(&service.object) } else { None }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{
        model::{
            Age, AuthorizationPolicy, EndpointSlice, MeshConfig, MtlsMode, Namespace, Node, PeerAuthentication,
            SliceEndpoint, TargetPort,
            authorization::{Action, Rule},
        },
        policy::{
            Options, compile,
            testing::{self, app},
        },
    };

    /// One thing that somebody does to a cluster; small numbers choose among few names, so that things meet.
    #[derive(Clone, Debug)]
    enum Step {
        Pod { name: u8, namespace: u8, labelled: u8, ip: u8, node: u8, ready: bool },
        NoPod(u8),
        Namespace { namespace: u8, enrolled: bool },
        Node { node: u8, zone: u8 },
        Mode { name: u8, namespace: u8, labelled: u8, mode: u8 },
        NoMode { name: u8, namespace: u8 },
        Authorization { name: u8, namespace: u8, labelled: u8, deny: bool },
        NoAuthorization { name: u8, namespace: u8 },
        Service { namespace: u8, labelled: u8, vip: u8 },
        Slice { namespace: u8, labelled: u8, pod: Option<u8>, ip: u8 },
        NoSlice { namespace: u8, labelled: u8 },
        Root(u8),
        Same,
    }

    fn step() -> impl Strategy<Value = Step> {
        let few = 0u8..3;
        prop_oneof![
            6 => (0u8..5, few.clone(), few.clone(), 1u8..6, few.clone(), any::<bool>()).prop_map(
                |(name, namespace, labelled, ip, node, ready)| Step::Pod { name, namespace, labelled, ip, node, ready }
            ),
            1 => (0u8..5).prop_map(Step::NoPod),
            1 => (few.clone(), any::<bool>()).prop_map(|(namespace, enrolled)| Step::Namespace { namespace, enrolled }),
            1 => (few.clone(), few.clone()).prop_map(|(node, zone)| Step::Node { node, zone }),
            2 => (few.clone(), few.clone(), few.clone(), few.clone())
                .prop_map(|(name, namespace, labelled, mode)| Step::Mode { name, namespace, labelled, mode }),
            1 => (few.clone(), few.clone()).prop_map(|(name, namespace)| Step::NoMode { name, namespace }),
            2 => (few.clone(), few.clone(), few.clone(), any::<bool>())
                .prop_map(|(name, namespace, labelled, deny)| Step::Authorization { name, namespace, labelled, deny }),
            1 => (few.clone(), few.clone()).prop_map(|(name, namespace)| Step::NoAuthorization { name, namespace }),
            2 => (few.clone(), few.clone(), 1u8..4)
                .prop_map(|(namespace, labelled, vip)| Step::Service { namespace, labelled, vip }),
            2 => (few.clone(), few.clone(), prop::option::of(0u8..5), 1u8..8)
                .prop_map(|(namespace, labelled, pod, ip)| Step::Slice { namespace, labelled, pod, ip }),
            1 => (few.clone(), few.clone()).prop_map(|(namespace, labelled)| Step::NoSlice { namespace, labelled }),
            1 => few.prop_map(Step::Root),
            1 => Just(Step::Same),
        ]
    }

    const NAMESPACES: [&str; 3] = ["istio-system", "default", "test"];
    const LABELS: [&str; 3] = ["", "web", "db"];

    fn labels(labelled: u8) -> crate::model::Labels {
        match LABELS[usize::from(labelled)] {
            "" => Default::default(),
            name => app(name),
        }
    }

    fn object(namespace: u8, name: impl std::fmt::Display) -> ObjectRef {
        ObjectRef::new(NAMESPACES[usize::from(namespace)], &name.to_string())
    }

    fn apply(cluster: &mut Cluster, step: &Step) {
        match *step {
            Step::Pod { name, namespace, labelled, ip, node, ready } => {
                let of = object(namespace, name);
                let pod = testing::pod(&of.namespace, &of.name, &format!("10.0.0.{ip}"));
                let uid = PodUid(name.to_string().into());
                let node = format!("node-{node}").as_str().into();
                let pod = Pod { uid: uid.clone(), labels: labels(labelled).into(), node, ready, ..pod };
                cluster.pods.insert(uid, pod.into());
            }
            Step::NoPod(name) => drop(cluster.pods.remove(&PodUid(name.to_string().into()))),
            Step::Namespace { namespace, enrolled } => {
                let mode = if enrolled { "ambient" } else { "none" };
                let labels = [("istio.io/dataplane-mode".to_owned(), mode.to_owned())].into();
                let name = NAMESPACES[usize::from(namespace)].into();
                cluster.namespaces.insert(name, Namespace { labels, ..Namespace::default() }.into());
            }
            Step::Node { node, zone } => {
                let labels = [("topology.kubernetes.io/zone".to_owned(), zone.to_string())].into();
                let name = format!("node-{node}").as_str().into();
                cluster.nodes.insert(name, Node { labels, ..Node::default() }.into());
            }
            Step::Mode { name, namespace, labelled, mode } => {
                let of = object(namespace, name);
                let mode = [MtlsMode::Strict, MtlsMode::Permissive, MtlsMode::Disable][usize::from(mode)];
                let policy = testing::policy(&of.namespace, &of.name, name.into(), mode);
                let policy = PeerAuthentication { selector: labels(labelled), ..policy };
                cluster.peer_authentications.insert(of, policy.into());
            }
            Step::NoMode { name, namespace } => drop(cluster.peer_authentications.remove(&object(namespace, name))),
            Step::Authorization { name, namespace, labelled, deny } => {
                let of = object(namespace, name);
                let policy = AuthorizationPolicy {
                    age: Age { created: name.into(), name: of.name.clone(), namespace: of.namespace.clone() },
                    selector: labels(labelled),
                    selector_written_empty: false,
                    revision: None,
                    has_targets: false,
                    action: if deny { Action::Deny } else { Action::Allow },
                    dry_run: false,
                    rules: vec![Rule::default()],
                };
                cluster.authorization_policies.insert(of, policy.into());
            }
            Step::NoAuthorization { name, namespace } => {
                cluster.authorization_policies.remove(&object(namespace, name));
            }
            Step::Service { namespace, labelled, vip } => {
                let of = object(namespace, LABELS[usize::from(labelled)]);
                let vip = format!("10.96.0.{vip}");
                let service = testing::service(&of.namespace, &of.name, &vip, 80, TargetPort::Number(8080));
                cluster.services.insert(of, service.into());
            }
            Step::Slice { namespace, labelled, pod, ip } => {
                let of = object(namespace, LABELS[usize::from(labelled)]);
                let address = format!("10.0.0.{ip}").parse().expect("an address");
                let pod = pod.map(|pod| (None, object((pod + namespace) % 3, pod)));
                let endpoint = SliceEndpoint { addresses: vec![address], ready: true, pod, node: None };
                let ports = [("".into(), 8080)].into();
                let slice = EndpointSlice { service: of.clone(), ports, endpoints: vec![endpoint] };
                cluster.endpoint_slices.insert(of, slice.into());
            }
            Step::NoSlice { namespace, labelled } => {
                cluster.endpoint_slices.remove(&object(namespace, LABELS[usize::from(labelled)]));
            }
            Step::Root(namespace) => {
                let root_namespace = NAMESPACES[usize::from(namespace)].into();
                cluster.mesh = MeshConfig { root_namespace, ..MeshConfig::default() };
            }
            // Another object that says the same, as a source that reads again gives it.
            Step::Same => cluster.pods.values_mut().for_each(|pod| *pod = Arc::new((**pod).clone())),
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(400))]

        /// [D.5]: what is taken over is what would have been made.
        #[test]
        fn taking_over_what_stays_gives_what_compiling_everything_gives(
            steps in prop::collection::vec(prop::collection::vec(step(), 1..4), 1..16),
        ) {
            let options = Options::default();
            let (nothing, mut old) = (Cluster::default(), Cluster::default());
            let mut snapshot = compile(&old, &options, None);
            for steps in steps {
                let mut cluster = old.clone();
                steps.iter().for_each(|step| apply(&mut cluster, step));
                let next = compile(&cluster, &options, Some(Before { cluster: &old, snapshot: &snapshot }));
                let whole = compile(&cluster, &options, Some(Before { cluster: &nothing, snapshot: &snapshot }));
                prop_assert_eq!(&next, &whole, "{:?}", steps);
                (old, snapshot) = (cluster, next);
            }
        }
    }

    #[test]
    fn what_stays_is_not_made_again() {
        let mut cluster = Cluster::default();
        for name in 0..4 {
            let step = Step::Pod { name, namespace: 1 + name % 2, labelled: 1, ip: 1 + name, node: 0, ready: true };
            apply(&mut cluster, &step);
        }
        apply(&mut cluster, &Step::Service { namespace: 1, labelled: 1, vip: 1 });
        apply(&mut cluster, &Step::Service { namespace: 2, labelled: 1, vip: 2 });
        let snapshot = compile(&cluster, &Options::default(), None);
        let old = cluster.clone();
        apply(&mut cluster, &Step::Mode { name: 0, namespace: 2, labelled: 0, mode: 0 });
        let changes = Changes::of(&cluster, Some(Before { cluster: &old, snapshot: &snapshot }));
        assert!(cluster.pods.values().all(|pod| changes.workload(pod).is_some()), "only policy has changed");
        assert!(changes.same_policy("default") && !changes.same_policy("test"));
        let next = compile(&cluster, &Options::default(), Some(Before { cluster: &old, snapshot: &snapshot }));
        let same = |namespace: u8| {
            let service = object(namespace, "web");
            Arc::ptr_eq(&next.services[&service], &snapshot.services[&service])
        };
        assert!(same(1) && !same(2), "a Service has the workloads as they are");
        apply(&mut cluster, &Step::Mode { name: 0, namespace: 0, labelled: 0, mode: 0 });
        let changes = Changes::of(&cluster, Some(Before { cluster: &old, snapshot: &snapshot }));
        assert!(!changes.same_policy("default"), "the root namespace's policies concern all");
    }
}
