//! From the API's types to the model's, with what the schema cannot say: ranges, enumerations, and rules between fields.
//!
//! Both sources use these. Every error is one field and its remedy.

use std::{collections::BTreeMap, net::IpAddr, sync::Arc, time::Duration};

use k8s_openapi::{
    api::{core::v1 as core, discovery::v1 as discovery},
    apimachinery::pkg::{apis::meta::v1::ObjectMeta, util::intstr::IntOrString},
};

use crate::model::{
    Age, EndpointSlice, Labels, MtlsMode, Namespace, Node, ObjectRef, PeerAuthentication, Pod, PodUid, Service,
    ServicePort, SessionAffinity, SliceEndpoint, TargetPort,
};

use super::crd;

/// Annotation of a static pod: the UID that its cgroup is named by.
const CONFIG_HASH: &str = "kubernetes.io/config.hash";
/// Annotation of the object that the kubelet shows for a static pod; the API server lets nobody else set it.
const CONFIG_MIRROR: &str = "kubernetes.io/config.mirror";

/// A field that is wrong: its path, and what is wrong with the remedy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Wrong {
    pub(super) path: String,
    pub(super) what: String,
}

impl Wrong {
    pub(super) fn new(path: impl Into<String>, what: impl Into<String>) -> Self {
        Self { path: path.into(), what: what.into() }
    }
}

/// Namespace and name; no namespace = `default` ([C.11]).
pub(super) fn object_ref(meta: &ObjectMeta) -> ObjectRef {
    let namespace = meta.namespace.as_deref().filter(|namespace| !namespace.is_empty()).unwrap_or("default");
    ObjectRef::new(namespace, meta.name.as_deref().unwrap_or_default())
}

pub(super) fn namespace(namespace: &core::Namespace) -> Namespace {
    let meta = &namespace.metadata;
    Namespace {
        labels: meta.labels.clone().unwrap_or_default(),
        annotations: meta.annotations.clone().unwrap_or_default(),
    }
}

pub(super) fn node(node: &core::Node) -> Node {
    let addresses = node.status.as_ref().and_then(|status| status.addresses.as_ref());
    let addresses = addresses.into_iter().flatten().filter_map(|address| ip(&address.address)).collect();
    Node { labels: node.metadata.labels.clone().unwrap_or_default(), addresses }
}

pub(super) fn pod(pod: &core::Pod) -> Result<Pod, Vec<Wrong>> {
    let mut wrong = Vec::new();
    let meta = &pod.metadata;
    let object = object_ref(meta);
    let annotations = meta.annotations.clone().unwrap_or_default();
    let spec = pod.spec.as_ref();
    let status = pod.status.as_ref();
    let non_empty = |text: &Option<String>| text.clone().filter(|text| !text.is_empty());

    let mut texts: Vec<String> = Vec::new();
    texts.extend(status.and_then(|s| s.pod_ips.as_ref()).into_iter().flatten().map(|ip| ip.ip.clone()));
    if texts.is_empty() {
        texts.extend(status.and_then(|s| non_empty(&s.pod_ip)));
    }
    let mut ips: Vec<IpAddr> = Vec::new();
    for text in &texts {
        match ip(text) {
            Some(ip) if ips.contains(&ip) => {}
            Some(ip) => ips.push(ip),
            None => wrong.push(Wrong::new("status.podIPs", format!("{text:?} is not an IP address"))),
        }
    }
    let containers = spec.map(|spec| spec.containers.as_slice()).unwrap_or_default();
    let init = spec.and_then(|spec| spec.init_containers.as_deref()).unwrap_or_default();
    let sidecars = init.iter().filter(|container| container.restart_policy.as_deref() == Some("Always"));
    let mut named_ports = BTreeMap::new();
    for port in containers.iter().chain(sidecars).flat_map(|container| container.ports.as_deref().unwrap_or_default()) {
        let number = port_number(port.container_port);
        match (&port.name, number) {
            (_, None) => wrong.push(Wrong::new(
                "spec.containers[].ports[].containerPort",
                format!("{} is not a port; write 1 to 65535", port.container_port),
            )),
            (Some(name), Some(number)) if is_tcp(port.protocol.as_deref()) => {
                // The first container that names it, as kubelet and endpoint controller have it.
                named_ports.entry(name.clone()).or_insert(number);
            }
            (_, Some(_)) => {}
        }
    }
    ips.shrink_to_fit();
    let phase = status.and_then(|status| status.phase.as_deref()).unwrap_or_default();
    let conditions = status.and_then(|status| status.conditions.as_deref()).unwrap_or_default();
    let workload_name = workload_name(meta);
    let uid = pod_uid(meta, &object, &annotations);
    let result = Pod {
        mirror_uid: meta.uid.as_deref().filter(|shown| !shown.is_empty() && **shown != *uid.0).map(Into::into),
        uid,
        labels: Arc::new(meta.labels.clone().unwrap_or_default()),
        annotations: annotations
            .into_iter()
            .filter(|(key, _)| {
                let domain = key.split('/').next().unwrap_or_default();
                key == CONFIG_HASH || domain == "istio.io" || domain.ends_with(".istio.io")
            })
            .collect(),
        service_account: spec.and_then(|s| non_empty(&s.service_account_name)).map_or("default".into(), Into::into),
        node: spec.and_then(|spec| spec.node_name.as_deref()).unwrap_or_default().into(),
        ips,
        host_network: spec.and_then(|spec| spec.host_network).unwrap_or_default(),
        finished: matches!(phase, "Succeeded" | "Failed"),
        ready: conditions.iter().any(|condition| condition.type_ == "Ready" && condition.status == "True"),
        terminating: meta.deletion_timestamp.is_some(),
        has_proxy_container: containers.iter().chain(init).any(|container| container.name == "istio-proxy"),
        named_ports: Arc::new(named_ports),
        workload_name: workload_name.unwrap_or_else(|| object.name.clone()),
        object,
    };
    if wrong.is_empty() { Ok(result) } else { Err(wrong) }
}

/// The UID that the node's cgroups know the pod by.
///
/// A manifest without any is a pod of another cluster's node or of a test; it gets one that no kubelet gives out. The
/// annotation of static pods counts only where nobody but a kubelet, or whoever writes the folder, can have set it:
/// else a pod could claim to be another one.
fn pod_uid(meta: &ObjectMeta, object: &ObjectRef, annotations: &Labels) -> PodUid {
    let uid = meta.uid.as_deref().filter(|uid| !uid.is_empty());
    let hash = annotations.get(CONFIG_HASH).filter(|_| uid.is_none() || annotations.contains_key(CONFIG_MIRROR));
    match (hash, uid) {
        (Some(hash), _) => PodUid(hash.as_str().into()),
        (None, Some(uid)) => PodUid(uid.into()),
        (None, None) => PodUid(object.to_string().into()),
    }
}

/// Name of the owning Deployment, Job, … (specification §16); `None` for a pod that nobody owns.
fn workload_name(meta: &ObjectMeta) -> Option<Arc<str>> {
    let label = |name: &str| meta.labels.as_ref().and_then(|labels| labels.get(name));
    if let Some(name) = label("service.istio.io/workload-name") {
        return Some(name.as_str().into());
    }
    let owners = meta.owner_references.as_deref().unwrap_or_default();
    let owner = owners.iter().find(|owner| owner.controller == Some(true)).or(owners.first())?;
    let name = match (owner.kind.as_str(), label("pod-template-hash")) {
        ("Node", _) => return None,
        ("ReplicaSet", Some(hash)) => owner.name.strip_suffix(&format!("-{hash}")).unwrap_or(&owner.name),
        _ => &owner.name,
    };
    Some(name.into())
}

pub(super) fn service(service: &core::Service) -> Result<Service, Vec<Wrong>> {
    let mut wrong = Vec::new();
    let no_spec = core::ServiceSpec::default();
    let spec = service.spec.as_ref().unwrap_or(&no_spec);
    let mut texts = spec.cluster_ips.clone().unwrap_or_default();
    if texts.is_empty() {
        texts.extend(spec.cluster_ip.clone());
    }
    let external_name = spec.type_.as_deref() == Some("ExternalName");
    let mut cluster_ips = Vec::new();
    for text in texts.iter().filter(|text| !external_name && !text.is_empty() && *text != "None") {
        match ip(text) {
            Some(ip) => cluster_ips.push(ip),
            None => wrong.push(Wrong::new("spec.clusterIPs", format!("{text:?} is not an IP address"))),
        }
    }
    let mut ports = Vec::new();
    for (index, port) in spec.ports.iter().flatten().enumerate().filter(|(_, port)| is_tcp(port.protocol.as_deref())) {
        let path = |field: &str| format!("spec.ports[{index}].{field}");
        let Some(number) = port_number(port.port) else {
            wrong.push(Wrong::new(path("port"), format!("{} is not a port; write 1 to 65535", port.port)));
            continue;
        };
        let target = match &port.target_port {
            None | Some(IntOrString::Int(0)) => Some(TargetPort::Number(number)),
            Some(IntOrString::Int(target)) => port_number(*target).map(TargetPort::Number),
            Some(IntOrString::String(name)) if name.chars().any(|c| c.is_ascii_alphabetic()) => {
                Some(TargetPort::Name(name.as_str().into()))
            }
            Some(IntOrString::String(_)) => None,
        };
        let Some(target) = target else {
            let what = "is neither a port (1 to 65535, without quotes) nor the name of one";
            wrong.push(Wrong::new(path("targetPort"), what));
            continue;
        };
        if ports.iter().any(|other: &ServicePort| other.port == number) {
            wrong.push(Wrong::new(path("port"), format!("{number} is there already; each TCP port once")));
            continue;
        }
        ports.push(ServicePort { name: port.name.as_deref().unwrap_or_default().into(), port: number, target });
    }
    let session_affinity = match spec.session_affinity.as_deref() {
        None | Some("" | "None") => SessionAffinity::None,
        Some("ClientIP") => {
            let config = spec.session_affinity_config.as_ref().and_then(|config| config.client_ip.as_ref());
            let seconds = config.and_then(|client_ip| client_ip.timeout_seconds).unwrap_or(10800);
            match u64::try_from(seconds) {
                Ok(seconds) if (1..=86400).contains(&seconds) => {
                    SessionAffinity::ClientIp(Duration::from_secs(seconds))
                }
                Ok(_) | Err(_) => {
                    let path = "spec.sessionAffinityConfig.clientIP.timeoutSeconds";
                    wrong.push(Wrong::new(path, format!("{seconds} is out of range; write 1 to 86400")));
                    SessionAffinity::None
                }
            }
        }
        Some(other) => {
            wrong.push(Wrong::new("spec.sessionAffinity", format!("{other:?} is unknown; write None or ClientIP")));
            SessionAffinity::None
        }
    };
    let internal_traffic_local = match spec.internal_traffic_policy.as_deref() {
        None | Some("" | "Cluster") => false,
        Some("Local") => true,
        Some(other) => {
            let what = format!("{other:?} is unknown; write Cluster or Local");
            wrong.push(Wrong::new("spec.internalTrafficPolicy", what));
            false
        }
    };
    let result = Service {
        object: object_ref(&service.metadata),
        cluster_ips,
        ports,
        selector: if external_name { Labels::new() } else { spec.selector.clone().unwrap_or_default() },
        publish_not_ready: spec.publish_not_ready_addresses.unwrap_or_default(),
        session_affinity,
        internal_traffic_local,
    };
    if wrong.is_empty() { Ok(result) } else { Err(wrong) }
}

/// `Ok(None)` for a slice that belongs to no Service.
pub(super) fn endpoint_slice(slice: &discovery::EndpointSlice) -> Result<Option<EndpointSlice>, Vec<Wrong>> {
    let mut wrong = Vec::new();
    let namespace = object_ref(&slice.metadata).namespace;
    let labels = slice.metadata.labels.as_ref();
    let Some(service) = labels.and_then(|labels| labels.get("kubernetes.io/service-name")) else { return Ok(None) };
    let mut ports = BTreeMap::new();
    for (index, port) in slice.ports.iter().flatten().enumerate().filter(|(_, p)| is_tcp(p.protocol.as_deref())) {
        let Some(number) = port.port else { continue };
        match port_number(number) {
            Some(number) => {
                ports.insert(port.name.as_deref().unwrap_or_default().into(), number);
            }
            None => wrong
                .push(Wrong::new(format!("ports[{index}].port"), format!("{number} is not a port; write 1 to 65535"))),
        }
    }
    let named = slice.address_type == "FQDN";
    if !named && slice.address_type != "IPv4" && slice.address_type != "IPv6" {
        let what = format!("{:?} is unknown; write IPv4, IPv6 or FQDN", slice.address_type);
        wrong.push(Wrong::new("addressType", what));
    }
    let mut endpoints = Vec::new();
    for (index, endpoint) in slice.endpoints.iter().flatten().enumerate().filter(|_| !named) {
        let mut addresses = Vec::new();
        for text in &endpoint.addresses {
            match ip(text) {
                Some(ip) => addresses.push(ip),
                None => wrong.push(Wrong::new(
                    format!("endpoints[{index}].addresses"),
                    format!("{text:?} is not an IP address"),
                )),
            }
        }
        let reference = endpoint.target_ref.as_ref().filter(|reference| reference.kind.as_deref() == Some("Pod"));
        let pod = reference.map(|reference| {
            let uid = reference.uid.as_deref().filter(|uid| !uid.is_empty()).map(|uid| PodUid(uid.into()));
            let of = reference.namespace.as_deref().filter(|text| !text.is_empty()).unwrap_or(&namespace);
            (uid, ObjectRef::new(of, reference.name.as_deref().unwrap_or_default()))
        });
        let ready = endpoint.conditions.as_ref().and_then(|conditions| conditions.ready).unwrap_or(true);
        endpoints.push(SliceEndpoint { addresses, ready, pod, node: endpoint.node_name.as_deref().map(Into::into) });
    }
    if !wrong.is_empty() {
        return Err(wrong);
    }
    Ok(Some(EndpointSlice { service: ObjectRef { namespace, name: service.as_str().into() }, ports, endpoints }))
}

/// A PeerAuthentication that is not valid (specification §5.5).
pub(super) struct Rejected {
    pub(super) wrong: Vec<Wrong>,
    /// What of it can be applied without opening anything, where there was no valid one before ([C.7], [C.8]).
    pub(super) restricting: Option<Arc<PeerAuthentication>>,
}

pub(super) fn peer_authentication(object: &crd::PeerAuthentication) -> Result<PeerAuthentication, Rejected> {
    let meta = &object.metadata;
    let labels = object.spec.selector.as_ref().map(|selector| selector.match_labels.clone().unwrap_or_default());
    let reference = object_ref(meta);
    let mut policy = PeerAuthentication {
        age: Age {
            created: meta.creation_timestamp.as_ref().map_or(i64::MIN, |time| time.0.as_second()),
            name: reference.name,
            namespace: reference.namespace,
        },
        selector_written_empty: labels.as_ref().is_some_and(Labels::is_empty),
        selector: labels.unwrap_or_default(),
        mode: object.spec.mtls.into(),
        port_modes: BTreeMap::new(),
        revision: meta.labels.as_ref().and_then(|labels| labels.get("istio.io/rev")).cloned(),
    };
    let Some(ports) = &object.spec.port_level_mtls else { return Ok(policy) };
    if policy.selector.is_empty() {
        let what = "needs a selector with at least one label; add spec.selector.matchLabels, or remove it [PA.14]";
        return Err(Rejected {
            wrong: vec![Wrong::new("spec.portLevelMtls", what)],
            restricting: Some(Arc::new(policy)),
        });
    }
    if ports.is_empty() {
        let what = "is empty; name a port or remove it";
        return Err(Rejected {
            wrong: vec![Wrong::new("spec.portLevelMtls", what)],
            restricting: Some(Arc::new(policy)),
        });
    }
    let mut wrong = Vec::new();
    for (text, mtls) in ports {
        match text.parse::<u16>() {
            Ok(port) if port != 0 && !text.starts_with(['+', '0']) => {
                policy.port_modes.insert(port, Some(*mtls).into());
            }
            Ok(_) | Err(_) => wrong.push(Wrong::new(
                super::yaml::join("spec.portLevelMtls", text),
                "is not a port; write a number from 1 to 65535",
            )),
        }
    }
    if wrong.is_empty() {
        return Ok(policy);
    }
    Err(Rejected { wrong, restricting: restricting(policy).map(Arc::new) })
}

/// The part that can only restrict: STRICT stays, whatever else the object says is dropped. `None` if nothing stays.
pub(super) fn restricting(mut policy: PeerAuthentication) -> Option<PeerAuthentication> {
    policy.port_modes.retain(|_, mode| *mode == MtlsMode::Strict);
    if policy.mode != MtlsMode::Strict {
        policy.mode = MtlsMode::Unset;
    }
    (policy.mode == MtlsMode::Strict || !policy.port_modes.is_empty()).then_some(policy)
}

fn ip(text: &str) -> Option<IpAddr> {
    text.parse::<IpAddr>().ok().map(|ip| ip.to_canonical())
}

fn is_tcp(protocol: Option<&str>) -> bool {
    matches!(protocol, None | Some("" | "TCP"))
}

fn port_number(number: i32) -> Option<u16> {
    u16::try_from(number).ok().filter(|port| *port != 0)
}
