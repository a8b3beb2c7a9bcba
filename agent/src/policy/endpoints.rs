//! Services with their endpoints worked out (specification §13). Choosing one for a connection is in `route`.
//!
//! Where the source has EndpointSlices of a Service, they say which endpoints it has; where it has none (a folder of
//! manifests usually has none), the Service's selector says it. In both cases the pod's own state counts as well: an
//! endpoint whose pod is not ready, or is being deleted, is not eligible, however old the slice is. A slice's endpoint
//! that refers to a pod which the source does not have is left out: nothing says whether it needs a tunnel.

use std::{
    cell::OnceCell,
    collections::{BTreeMap, BTreeSet, HashMap},
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use crate::model::{
    Cluster, EndpointSlice, Labels, ObjectRef, Pod, Service, ServicePort, SessionAffinity, SliceEndpoint, TargetPort,
};

use super::{Occupant, Snapshot, Workload, selecting::matches};

/// A Service, ready to be called.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CompiledService {
    /// Namespace and name.
    pub object: ObjectRef,
    /// Its cluster IPs.
    pub cluster_ips: Vec<IpAddr>,
    /// Eligible endpoints by Service port; a port that exists and has none is an empty list.
    pub ports: BTreeMap<u16, Vec<Endpoint>>,
    /// `spec.sessionAffinity`.
    pub session_affinity: SessionAffinity,
    /// `spec.internalTrafficPolicy` is `Local`.
    pub internal_traffic_local: bool,
}

/// One eligible endpoint of a Service port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// Where it listens: the target port at each of its addresses; never empty.
    pub addresses: Vec<SocketAddr>,
    /// The pod; `None` for a bare address.
    pub workload: Option<Arc<Workload>>,
    /// Its node; empty where that is not known.
    pub node: Arc<str>,
    /// It has an address of its own and is in the mesh: reached by a tunnel.
    pub tunnel: bool,
}

/// Look-ups that the endpoints of all Services share.
pub(super) struct Lookup<'a> {
    cluster: &'a Cluster,
    pods: OnceCell<Pods<'a>>,
    slices: HashMap<&'a ObjectRef, Vec<&'a EndpointSlice>>,
    services_by_namespace: HashMap<&'a str, Vec<&'a Service>>,
}

/// The pods of the cluster by what Services name them by.
struct Pods<'a> {
    by_name: HashMap<&'a ObjectRef, &'a Arc<Pod>>,
    /// By namespace, and key and value of each label.
    by_label: HashMap<(&'a str, &'a str, &'a str), Vec<&'a Arc<Pod>>>,
}

impl<'a> Pods<'a> {
    fn of(cluster: &'a Cluster) -> Self {
        let mut pods = Self { by_name: HashMap::new(), by_label: HashMap::new() };
        for pod in cluster.pods.values() {
            pods.by_name.insert(&pod.object, pod);
            for (key, value) in &*pod.labels {
                pods.by_label.entry((&pod.object.namespace, key, value)).or_default().push(pod);
            }
        }
        pods
    }

    /// Those that a Service's selector, which is not empty, selects.
    fn selected<'s>(&'s self, namespace: &'s str, selector: &'s Labels) -> impl Iterator<Item = &'a Arc<Pod>> {
        let lists = selector.iter().map(|(key, value)| self.by_label.get(&(namespace, &**key, &**value)));
        let fewest = lists.map(|list| list.map(Vec::as_slice).unwrap_or_default()).min_by_key(|list| list.len());
        fewest.unwrap_or_default().iter().copied().filter(|pod| matches(selector, &pod.labels))
    }
}

impl<'a> Lookup<'a> {
    pub(super) fn of(cluster: &'a Cluster) -> Self {
        let mut lookup =
            Self { cluster, pods: OnceCell::new(), slices: HashMap::new(), services_by_namespace: HashMap::new() };
        for slice in cluster.endpoint_slices.values() {
            lookup.slices.entry(&slice.service).or_default().push(slice);
        }
        for service in cluster.services.values() {
            lookup.services_by_namespace.entry(&service.object.namespace).or_default().push(service);
        }
        lookup
    }

    pub(super) fn services_of(&self, namespace: &str) -> impl Iterator<Item = &'a Service> {
        self.services_by_namespace.get(namespace).into_iter().flatten().copied()
    }

    fn pods(&self) -> &Pods<'a> {
        self.pods.get_or_init(|| Pods::of(self.cluster))
    }

    /// The slices of a Service.
    pub(super) fn slices(&self, service: &ObjectRef) -> &[&'a EndpointSlice] {
        self.slices.get(service).map(Vec::as_slice).unwrap_or_default()
    }

    /// `snapshot` has its workloads and addresses already.
    pub(super) fn compile(&self, service: &Service, snapshot: &Snapshot) -> CompiledService {
        let ports =
            service.ports.iter().map(|port| (port.port, self.endpoints(service, port, snapshot).collect())).collect();
        CompiledService {
            object: service.object.clone(),
            cluster_ips: service.cluster_ips.clone(),
            ports,
            session_affinity: service.session_affinity,
            internal_traffic_local: service.internal_traffic_local,
        }
    }

    fn endpoints(
        &self,
        service: &Service,
        port: &ServicePort,
        snapshot: &Snapshot,
    ) -> impl Iterator<Item = Endpoint> + use<> {
        let mut pods = BTreeMap::new();
        let mut bare = BTreeSet::new();
        if let Some(slices) = self.slices.get(&service.object) {
            for slice in slices {
                // A port without a number means "all ports" and is not an endpoint of any (discovery/v1).
                let Some(target) = slice.ports.get(&port.name) else { continue };
                for endpoint in slice.endpoints.iter().filter(|e| e.ready || service.publish_not_ready) {
                    self.slice_endpoint(endpoint, *target, service, snapshot, &mut pods, &mut bare);
                }
            }
        } else if !service.selector.is_empty() {
            for pod in self.pods().selected(&service.object.namespace, &service.selector) {
                // A pod that lacks the name is not an endpoint.
                let target = match &port.target {
                    TargetPort::Number(number) => Some(*number),
                    TargetPort::Name(name) => pod.named_ports.get(&**name).copied(),
                };
                if let Some(endpoint) = target.and_then(|target| pod_endpoint(pod, target, service, snapshot)) {
                    pods.insert(pod.uid.clone(), endpoint);
                }
            }
        }
        let bare = bare.into_iter().map(|(address, node)| Endpoint {
            addresses: vec![address],
            workload: None,
            node,
            tunnel: false,
        });
        pods.into_values().chain(bare)
    }

    fn slice_endpoint(
        &self,
        endpoint: &SliceEndpoint,
        target: u16,
        service: &Service,
        snapshot: &Snapshot,
        pods: &mut BTreeMap<crate::model::PodUid, Endpoint>,
        bare: &mut BTreeSet<(SocketAddr, Arc<str>)>,
    ) {
        if let Some((uid, name)) = &endpoint.pod {
            let pod = self.pods().by_name.get(name).filter(|pod| uid.as_ref().is_none_or(|uid| *uid == pod.uid));
            if let Some((pod, found)) = pod.and_then(|p| Some((p, pod_endpoint(p, target, service, snapshot)?))) {
                pods.insert(pod.uid.clone(), found);
            }
            return;
        }
        for address in &endpoint.addresses {
            match snapshot.workload_by_ip(*address) {
                // Somebody wrote the address of a pod: that is a call of this pod, tunnel included.
                Some(Occupant::One(workload)) => {
                    let found = self.cluster.pods.get(&workload.uid);
                    if let Some((pod, found)) =
                        found.and_then(|p| Some((p, pod_endpoint(p, target, service, snapshot)?)))
                    {
                        pods.insert(pod.uid.clone(), found);
                    }
                }
                Some(Occupant::Ambiguous) => {}
                None => {
                    let node = endpoint.node.clone().unwrap_or_default();
                    bare.insert((SocketAddr::new(*address, target), node));
                }
            }
        }
    }
}

/// `None` if the pod is not eligible, or has no address that is its alone.
fn pod_endpoint(pod: &Pod, target: u16, service: &Service, snapshot: &Snapshot) -> Option<Endpoint> {
    let eligible = !pod.finished && (service.publish_not_ready || (pod.ready && !pod.terminating));
    let workload = snapshot.workload(&pod.uid)?;
    let own = |ip: &&IpAddr| pod.host_network || matches!(snapshot.workload_by_ip(**ip), Some(Occupant::One(_)));
    let addresses: Vec<_> = pod.ips.iter().filter(own).map(|ip| SocketAddr::new(*ip, target)).collect();
    if !eligible || addresses.is_empty() {
        return None;
    }
    Some(Endpoint {
        addresses,
        workload: Some(workload.clone()),
        node: pod.node.clone(),
        tunnel: workload.enrollment.enrolled && !pod.host_network,
    })
}
