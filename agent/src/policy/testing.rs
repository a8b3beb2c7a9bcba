//! Small clusters for the tests of this module.

use std::sync::Arc;

use crate::model::{
    Age, Cluster, Labels, MtlsMode, Namespace, ObjectRef, PeerAuthentication, Pod, PodUid, Service, ServicePort,
    SessionAffinity, TargetPort,
};

/// A ready pod without labels; its UID is `namespace/name`.
pub(crate) fn pod(namespace: &str, name: &str, ip: &str) -> Pod {
    Pod {
        uid: PodUid(format!("{namespace}/{name}").into()),
        object: ObjectRef::new(namespace, name),
        labels: Default::default(),
        annotations: Labels::new(),
        service_account: "default".into(),
        node: "node-1".into(),
        ips: vec![ip.parse().expect("an address of a test")],
        host_network: false,
        finished: false,
        ready: true,
        terminating: false,
        mirror_uid: None,
        has_proxy_container: false,
        named_ports: Default::default(),
        workload_name: name.into(),
    }
}

/// A policy without selector, in age order by `created`.
pub(super) fn policy(namespace: &str, name: &str, created: i64, mode: MtlsMode) -> PeerAuthentication {
    PeerAuthentication {
        age: Age { created, name: name.into(), namespace: namespace.into() },
        selector: Labels::new(),
        selector_written_empty: false,
        mode,
        port_modes: [].into(),
        revision: None,
    }
}

/// A Service with one unnamed port and the selector `app=<name>`.
pub(super) fn service(namespace: &str, name: &str, vip: &str, port: u16, target: TargetPort) -> Service {
    Service {
        object: ObjectRef::new(namespace, name),
        cluster_ips: vec![vip.parse().expect("an address of a test")],
        ports: vec![ServicePort { name: "".into(), port, target }],
        selector: app(name),
        publish_not_ready: false,
        session_affinity: SessionAffinity::None,
        internal_traffic_local: false,
    }
}

/// The label `app`.
pub(crate) fn app(name: &str) -> Labels {
    [("app".to_owned(), name.to_owned())].into()
}

/// Puts things into a cluster.
pub(super) trait Put<T> {
    fn put(&mut self, thing: T);
}

impl Put<Pod> for Cluster {
    fn put(&mut self, pod: Pod) {
        self.pods.insert(pod.uid.clone(), Arc::new(pod));
    }
}

impl Put<PeerAuthentication> for Cluster {
    fn put(&mut self, policy: PeerAuthentication) {
        self.peer_authentications.insert(policy.object(), Arc::new(policy));
    }
}

impl Put<Service> for Cluster {
    fn put(&mut self, service: Service) {
        self.services.insert(service.object.clone(), Arc::new(service));
    }
}

/// A cluster whose namespaces `default` and `test` are in the mesh.
pub(super) fn cluster() -> Cluster {
    let labels: Labels = [("istio.io/dataplane-mode".to_owned(), "ambient".to_owned())].into();
    let namespace = Arc::new(Namespace { labels, ..Namespace::default() });
    let mut cluster = Cluster::default();
    for name in ["default", "test", "istio-system"] {
        cluster.namespaces.insert(name.into(), namespace.clone());
    }
    cluster
}
