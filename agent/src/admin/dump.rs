//! What the agent believes, as one document: the answer of `GET /config_dump`, and what the command line reads.
//!
//! Names are those of Kubernetes and Istio, in camelCase. Everything is sorted, so that two dumps of one state are the
//! same text. Keys and tokens are not in it, and cannot be: what this is made from does not have them.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::{IpAddr, SocketAddr},
};

use culvert_common::{Answer, Direction, Mode, PodState, Reason, VerdictKey};
use serde::{Deserialize, Serialize};

use crate::{
    datapath::{inspect, monotonic_ns},
    enroll,
    identity::{Facts, Status},
    model::{Cluster, MtlsMode, ObjectRef, Pod, PodUid, Service, SessionAffinity},
    pods::PodNetwork,
    policy::{CompiledService, RuleId, RuleKind, RuleRef, Snapshot, Workload},
};

use super::Handles;

/// The whole document.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Dump {
    /// Of the agent.
    pub version: String,
    /// Name of the node.
    pub node: String,
    /// RFC 3339, UTC.
    pub started_at: String,
    /// Policy generation in force ([D.5]).
    pub generation: u32,
    /// Mesh configuration in force.
    pub mesh: Mesh,
    /// What readiness waits for; empty when ready.
    pub missing: Vec<String>,
    /// By namespace, name and UID.
    pub workloads: Vec<WorkloadDump>,
    /// Pods that run on this node and that no object of the source describes: the gate holds them, unless it is open.
    pub unknown_pods: Vec<UnknownPod>,
    /// By namespace and name.
    pub services: Vec<ServiceDump>,
    /// By namespace and name.
    pub policies: Vec<PolicyDump>,
    /// By identity.
    pub certificates: Vec<CertificateDump>,
    /// What peers' certificates must chain to.
    pub roots: Vec<CertificateFacts>,
    /// What was accepted and does not do what it seems to.
    pub warnings: Vec<String>,
    /// What users wrote wrong, with its place.
    pub problems: Vec<String>,
    /// What is accepted and without effect in this version.
    pub notices: Vec<String>,
    /// The kernel's side; absent if it could not be read, and then `kernelError` says why.
    pub kernel: Option<Kernel>,
    /// Why the kernel's side could not be read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel_error: Option<String>,
    /// Every setting that has a value.
    pub settings: Vec<SettingDump>,
}

/// Mesh configuration (specification §1.1).
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Mesh {
    /// Home of mesh-wide policy.
    pub root_namespace: String,
    /// Of this mesh's identities.
    pub trust_domain: String,
    /// Whose certificates are ours too.
    pub trust_domain_aliases: Vec<String>,
    /// `ALLOW_ANY` or `REGISTRY_ONLY`.
    pub outbound_traffic_policy: String,
}

/// A pod of the cluster.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct WorkloadDump {
    /// `metadata.uid`.
    pub uid: String,
    /// Of the pod.
    pub namespace: String,
    /// Of the pod.
    pub name: String,
    /// Owning Deployment, Job and so on; the pod's own name without one.
    pub workload_name: String,
    /// Its own; none for hostNetwork and finished pods.
    pub addresses: Vec<IpAddr>,
    /// Where it runs.
    pub node: String,
    /// Always absent: this version knows no waypoints.
    pub waypoint: Option<String>,
    /// `HBONE` if it is reached by a tunnel, else `TCP`.
    pub protocol: String,
    /// SPIFFE ID.
    pub identity: String,
    /// Of the pod.
    pub labels: BTreeMap<String, String>,
    /// In the mesh or not, and why.
    pub enrolment: EnrolmentDump,
    /// What the agent has done about it; only for pods of this node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub local: Option<LocalPod>,
    /// Effective PeerAuthentication (specification §5.2).
    pub peer_authentication: PeerAuthenticationDump,
}

/// Row of the table in specification §2 that decided.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct EnrolmentDump {
    /// In or out.
    pub enrolled: bool,
    /// 1 to 16.
    pub row: u8,
    /// The row in words.
    pub reason: String,
    /// What was written and does not count.
    pub warnings: Vec<String>,
}

/// A pod of this node.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct LocalPod {
    /// One word.
    pub state: LocalState,
    /// Why it failed, or what is waited for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
    /// Directory of its control group, once a process lives in it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cgroup: Option<String>,
    /// Of its network namespace: its key in the kernel's maps.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub netns_cookie: Option<u64>,
}

/// Where a pod of this node stands.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum LocalState {
    /// Captured, served, and judged by the policy in force.
    Enrolled,
    /// To be in the mesh; refused until it is.
    Failed,
    /// To be in the mesh; none of its processes, or not its network namespace, has been seen yet.
    Waiting,
    /// Not in the mesh.
    Out,
}

impl LocalState {
    /// As the document spells it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Enrolled => "enrolled",
            Self::Failed => "failed",
            Self::Waiting => "waiting",
            Self::Out => "out",
        }
    }
}

/// Mode of each port, and what set it.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PeerAuthenticationDump {
    /// Of every port that is not listed.
    pub mode: String,
    /// `namespace/name` of the policy that set it; absent for the built-in PERMISSIVE.
    pub policy: Option<String>,
    /// Ports with another mode.
    pub ports: BTreeMap<u16, PortMode>,
}

/// Mode of one port.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PortMode {
    /// As PeerAuthentication spells it.
    pub mode: String,
    /// As in [`PeerAuthenticationDump::policy`].
    pub policy: Option<String>,
}

/// A pod that the source does not know.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct UnknownPod {
    /// From the name of its control group.
    pub uid: String,
    /// Directory of its control group.
    pub cgroup: String,
}

/// A Service.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ServiceDump {
    /// Of the Service.
    pub namespace: String,
    /// Of the Service.
    pub name: String,
    /// Its cluster IPs.
    pub addresses: Vec<IpAddr>,
    /// Always absent: this version knows no waypoints.
    pub waypoint: Option<String>,
    /// Endpoints that connections can go to.
    pub endpoints_eligible: usize,
    /// Endpoints that it has, whatever their state.
    pub endpoints_total: usize,
    /// `None` or `ClientIP`.
    pub session_affinity: String,
    /// `Cluster` or `Local`.
    pub internal_traffic_policy: String,
    /// By port.
    pub ports: BTreeMap<u16, Vec<EndpointDump>>,
}

/// One eligible endpoint.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct EndpointDump {
    /// The target port at each of its addresses.
    pub addresses: Vec<SocketAddr>,
    /// `namespace/name`; absent for a bare address.
    pub pod: Option<String>,
    /// Its node; empty where that is not known.
    pub node: String,
    /// `HBONE` or `TCP`.
    pub protocol: String,
}

/// A policy.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PolicyDump {
    /// `PeerAuthentication` or `AuthorizationPolicy`.
    pub kind: String,
    /// Of the object.
    pub namespace: String,
    /// Of the object.
    pub name: String,
    /// Its own mode, as written; `UNSET` inherits. Or its action, with `(dry-run)` where it is not enforced.
    pub action: String,
    /// `Global`, `Namespace` or `WorkloadSelector`.
    pub scope: String,
    /// Labels that it selects by.
    pub selector: BTreeMap<String, String>,
    /// Modes of ports, as written.
    pub ports: BTreeMap<u16, String>,
    /// `istio.io/rev`, if it is labelled with one.
    pub revision: Option<String>,
    /// File, document and line.
    pub place: Option<String>,
    /// The file now says something invalid, and this is the version from before ([C.6]).
    pub stale: bool,
    /// Number that the kernel's counters know it by; 0 if it has none.
    pub rule: u32,
    /// Of an AuthorizationPolicy: the numbers that they know its rules by, in the order of the rules.
    #[serde(default)]
    pub rules: Vec<u32>,
    /// Pods, as `namespace/name`, of which it decides about a port or all; of an AuthorizationPolicy, those it selects.
    pub decides: Vec<String>,
    /// What it does not do although it seems to.
    pub warnings: Vec<String>,
}

/// An identity of this node, and its certificate.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct CertificateDump {
    /// SPIFFE ID.
    pub identity: String,
    /// `Available`, `Waiting` or `Expired`.
    pub state: String,
    /// RFC 3339: when the next one is fetched, unless attempts are failing.
    pub renews_at: Option<String>,
    /// Attempts that failed since the last success.
    pub failures: u32,
    /// Why the last one failed.
    pub last_error: Option<String>,
    /// The certificate first; no roots, never a key.
    pub chain: Vec<CertificateFacts>,
}

/// What a certificate says.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct CertificateFacts {
    /// Distinguished name; empty in a workload's certificate.
    pub subject: String,
    /// Distinguished name of whoever signed it.
    pub issuer: String,
    /// URI SANs.
    pub uris: Vec<String>,
    /// Hexadecimal.
    pub serial: String,
    /// RFC 3339.
    pub not_before: String,
    /// RFC 3339.
    pub not_after: String,
    /// Whether it is valid now.
    pub valid: bool,
}

/// The kernel's side.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Kernel {
    /// Where the maps are pinned: `bpftool map dump pinned <this>/PODS`.
    pub pin_directory: String,
    /// Milliseconds since the last sign of life; absent while there has been none.
    pub heartbeat_age_ms: Option<u64>,
    /// Id of the kubelet's cgroup; 0 if none is known.
    pub kubelet_cgroup: u64,
    /// Every process of the node counts as the kubelet ([K.5]).
    pub probes_by_netns: bool,
    /// In the order of their declaration.
    pub maps: Vec<MapDump>,
    /// By netns cookie.
    pub pods: Vec<KernelPod>,
    /// Counted since each pod was enrolled.
    pub verdicts: Vec<VerdictDump>,
}

/// How full a map is.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct MapDump {
    /// As it is pinned.
    pub name: String,
    /// As `bpftool map show id` takes it.
    pub id: u32,
    /// Absent where they cannot be counted.
    pub entries: Option<usize>,
    /// Entries; bytes for the ring buffer; 0 where only memory is the limit.
    pub capacity: u32,
}

/// Entry of `PODS`, with what belongs to it.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct KernelPod {
    /// Key in the maps.
    pub netns_cookie: u64,
    /// `namespace/name`, if the agent has it enrolled.
    pub pod: Option<String>,
    /// `pending` or `ready`.
    pub state: String,
    /// Of every port that is not listed.
    pub mode: String,
    /// Policy generation.
    pub generation: u32,
    /// Number of the policy that set the mode; 0 for none.
    pub rule: u32,
    /// Number of its table of AuthorizationPolicies; 0 where none could make a difference to plaintext.
    #[serde(default)]
    pub table: u32,
    /// The agent gives the verdicts on plaintext, because the policy does not fit into the kernel.
    #[serde(default)]
    pub plaintext_by_agent: bool,
    /// Its entries in `POD_ADDRS`.
    pub addresses: Vec<IpAddr>,
    /// Ports with another mode, of this generation.
    pub ports: BTreeMap<u16, String>,
    /// Sockets in `LISTENERS`.
    pub listeners: usize,
    /// How many there must be: three for each worker.
    pub listeners_wanted: usize,
}

/// A counter of `VERDICTS`.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct VerdictDump {
    /// `namespace/name`, or the netns cookie if the agent does not have the pod enrolled.
    pub pod: String,
    /// `inbound` or `outbound`.
    pub direction: String,
    /// `pass`, `refuse` or `agent`.
    pub answer: String,
    /// One of the closed list of reasons.
    pub reason: String,
    /// `PeerAuthentication namespace/name` or `AuthorizationPolicy namespace/name#rule`; absent for none.
    pub rule: Option<String>,
    /// How often.
    pub count: u64,
}

/// A setting and where its value came from.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct SettingDump {
    /// Of the flag.
    pub name: String,
    /// As written.
    pub value: String,
    /// `--flag`, a variable of the environment, a file and its key, or `default`.
    pub origin: String,
}

impl Dump {
    /// The document of this moment. Takes as long as the cluster is large.
    pub fn of(handles: &Handles) -> Self {
        let snapshot = handles.snapshot.borrow().clone();
        let view = handles.views.borrow().clone();
        let node = handles.nodes.borrow().clone();
        let states = handles.enrolled.borrow().clone();
        let settings = handles.settings.borrow().clone();
        let rule = |id: RuleId| snapshot.rule(id).map(|rule| rule.object.to_string());
        let mut names: HashMap<u64, String> = HashMap::new();
        for (uid, state) in states.iter() {
            if let (enroll::State::Enrolled(cookie), Some(workload)) = (state, snapshot.workload(uid)) {
                names.insert(cookie.0, workload.object.to_string());
            }
        }
        let mut workloads: Vec<&Workload> = snapshot.workloads.values().map(|workload| &**workload).collect();
        workloads.sort_by(|a, b| (&a.object, &a.uid).cmp(&(&b.object, &b.uid)));
        let local = |workload: &Workload| {
            let here = node.pods.get(&workload.uid);
            (*workload.node == *handles.node_name || here.is_some())
                .then(|| local(workload, here.map(|pod| &**pod), states.get(&workload.uid)))
        };
        let mut kernel_error = None;
        let kernel = match inspect::read(&handles.pin_dir) {
            Ok(content) => Some(kernel(handles, &content, &snapshot, &names)),
            Err(error) => {
                kernel_error = Some(format!("{error:#}"));
                None
            }
        };
        Self {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            node: handles.node_name.clone(),
            started_at: rfc3339(handles.started_at),
            generation: snapshot.generation,
            mesh: Mesh {
                root_namespace: snapshot.mesh.root_namespace.to_string(),
                trust_domain: snapshot.mesh.trust_domain.to_string(),
                trust_domain_aliases: snapshot.mesh.trust_domain_aliases.iter().map(ToString::to_string).collect(),
                outbound_traffic_policy: match snapshot.mesh.outbound {
                    crate::model::OutboundPolicy::AllowAny => "ALLOW_ANY",
                    crate::model::OutboundPolicy::RegistryOnly => "REGISTRY_ONLY",
                }
                .to_owned(),
            },
            missing: handles.ready.missing(),
            workloads: workloads.iter().map(|of| workload(of, local(of), &rule)).collect(),
            unknown_pods: unknown_pods(&node, &snapshot),
            services: services(&snapshot, &view.cluster),
            policies: policies(&snapshot, &view, &workloads),
            certificates: handles.identities.status().into_iter().map(certificate).collect(),
            roots: handles.identities.roots().iter().map(|root| facts(root, unix_now())).collect(),
            warnings: snapshot.warnings.clone(),
            problems: view.problems.iter().map(ToString::to_string).collect(),
            notices: view.notices.clone(),
            kernel,
            kernel_error,
            settings: settings
                .iter()
                .map(|(name, given)| SettingDump {
                    name: (*name).to_owned(),
                    value: given.value.clone(),
                    origin: given.origin.clone(),
                })
                .collect(),
        }
    }
}

fn workload(of: &Workload, local: Option<LocalPod>, rule: &impl Fn(RuleId) -> Option<String>) -> WorkloadDump {
    let auth = &of.peer_auth;
    WorkloadDump {
        uid: of.uid.to_string(),
        namespace: of.object.namespace.to_string(),
        name: of.object.name.to_string(),
        workload_name: of.workload_name.to_string(),
        addresses: of.ips.clone(),
        node: of.node.to_string(),
        waypoint: None,
        protocol: protocol(of.enrollment.enrolled && !of.ips.is_empty()),
        identity: of.identity.to_string(),
        labels: (*of.labels).clone(),
        enrolment: EnrolmentDump {
            enrolled: of.enrollment.enrolled,
            row: of.enrollment.row,
            reason: of.enrollment.reason.to_string(),
            warnings: of.enrollment.warnings.clone(),
        },
        local,
        peer_authentication: PeerAuthenticationDump {
            mode: auth.mode.as_str().to_owned(),
            policy: rule(auth.rule),
            ports: auth
                .ports
                .iter()
                .map(|(port, (mode, id))| (*port, PortMode { mode: mode.as_str().to_owned(), policy: rule(*id) }))
                .collect(),
        },
    }
}

fn local(workload: &Workload, here: Option<&crate::pods::NodePod>, state: Option<&enroll::State>) -> LocalPod {
    let cgroup = here.map(|pod| pod.cgroup.path.display().to_string());
    let pod = |state, detail, netns_cookie| LocalPod { state, detail, cgroup, netns_cookie };
    let waiting = |why: &str| (LocalState::Waiting, Some(why.to_owned()), None);
    let (state, detail, cookie) = match (state, here.map(|pod| &pod.network)) {
        (Some(enroll::State::Enrolled(cookie)), _) => (LocalState::Enrolled, None, Some(cookie.0)),
        (Some(enroll::State::Failed(why)), _) => (LocalState::Failed, Some(why.clone()), None),
        (None, _) if !workload.enrollment.enrolled => (LocalState::Out, None, None),
        (None, None) => waiting("none of its processes runs on this node"),
        (None, Some(PodNetwork::Pending)) => waiting("its processes are still in the node's network namespace"),
        (None, Some(PodNetwork::Host)) => {
            waiting("its processes are in the node's network namespace, although it is not hostNetwork")
        }
        (None, Some(PodNetwork::Own(_))) if workload.ips.is_empty() => waiting("the source has no address of it"),
        (None, Some(PodNetwork::Own(_))) => waiting("it is about to be enrolled"),
    };
    pod(state, detail, cookie)
}

fn unknown_pods(node: &crate::pods::Node, snapshot: &Snapshot) -> Vec<UnknownPod> {
    let unknown = node.pods.values().filter(|pod| snapshot.workload(&pod.uid).is_none());
    unknown.map(|pod| UnknownPod { uid: pod.uid.to_string(), cgroup: pod.cgroup.path.display().to_string() }).collect()
}

fn services(snapshot: &Snapshot, cluster: &Cluster) -> Vec<ServiceDump> {
    let mut slices: HashMap<&ObjectRef, BTreeSet<String>> = HashMap::new();
    for slice in cluster.endpoint_slices.values() {
        let all = slices.entry(&slice.service).or_default();
        // One endpoint may be in a slice of each family: a pod counts once.
        all.extend(slice.endpoints.iter().map(|endpoint| match &endpoint.pod {
            Some((_, pod)) => pod.to_string(),
            None => format!("{:?}", endpoint.addresses),
        }));
    }
    let mut pods: HashMap<&str, Vec<&Pod>> = HashMap::new();
    for pod in cluster.pods.values().filter(|pod| !pod.finished) {
        pods.entry(&pod.object.namespace).or_default().push(pod);
    }
    let selected = |service: &Service| {
        let all = pods.get(&*service.object.namespace).into_iter().flatten();
        let matches = |pod: &&&Pod| service.selector.iter().all(|(key, value)| pod.labels.get(key) == Some(value));
        if service.selector.is_empty() { 0 } else { all.filter(matches).count() }
    };
    let total = |service: &CompiledService| match (slices.get(&service.object), cluster.services.get(&service.object)) {
        (Some(endpoints), _) => endpoints.len(),
        (None, Some(service)) => selected(service),
        (None, None) => 0,
    };
    snapshot.services.values().map(|service| self::service(service, total(service))).collect()
}

fn service(of: &CompiledService, total: usize) -> ServiceDump {
    let endpoint = |endpoint: &crate::policy::Endpoint| EndpointDump {
        addresses: endpoint.addresses.clone(),
        pod: endpoint.workload.as_ref().map(|workload| workload.object.to_string()),
        node: endpoint.node.to_string(),
        protocol: protocol(endpoint.tunnel),
    };
    let distinct: BTreeSet<String> = of
        .ports
        .values()
        .flatten()
        .map(|endpoint| match &endpoint.workload {
            Some(workload) => workload.uid.to_string(),
            None => endpoint.addresses.iter().map(|addr| addr.ip().to_string()).collect::<Vec<_>>().join(","),
        })
        .collect();
    ServiceDump {
        namespace: of.object.namespace.to_string(),
        name: of.object.name.to_string(),
        addresses: of.cluster_ips.clone(),
        waypoint: None,
        endpoints_eligible: distinct.len(),
        endpoints_total: total.max(distinct.len()),
        session_affinity: match of.session_affinity {
            SessionAffinity::None => "None",
            SessionAffinity::ClientIp(_) => "ClientIP",
        }
        .to_owned(),
        internal_traffic_policy: if of.internal_traffic_local { "Local" } else { "Cluster" }.to_owned(),
        ports: of.ports.iter().map(|(port, all)| (*port, all.iter().map(endpoint).collect())).collect(),
    }
}

fn policies(snapshot: &Snapshot, view: &crate::source::View, workloads: &[&Workload]) -> Vec<PolicyDump> {
    let mut decides: HashMap<u32, BTreeSet<String>> = HashMap::new();
    for workload in workloads.iter().filter(|workload| workload.enrollment.enrolled) {
        let auth = &workload.peer_auth;
        for rule in auth.ports.values().map(|(_, rule)| *rule).chain([auth.rule]).filter(|rule| rule.0 != 0) {
            decides.entry(rule.0).or_default().insert(workload.object.to_string());
        }
    }
    let of_peers = snapshot.rules.iter().zip(1..).filter(|(rule, _)| rule.kind == RuleKind::PeerAuthentication);
    let numbers: HashMap<&ObjectRef, u32> = of_peers.map(|(rule, number)| (&rule.object, number)).collect();
    let policy = |(object, policy): (&ObjectRef, &std::sync::Arc<crate::model::PeerAuthentication>)| {
        let rule = numbers.get(object).copied().unwrap_or(0);
        let place = view.policies.get(object);
        PolicyDump {
            kind: "PeerAuthentication".to_owned(),
            namespace: object.namespace.to_string(),
            name: object.name.to_string(),
            action: written(policy.mode).to_owned(),
            scope: scope(snapshot, object, &policy.selector),
            selector: policy.selector.clone(),
            ports: policy.port_modes.iter().map(|(port, mode)| (*port, written(*mode).to_owned())).collect(),
            revision: policy.revision.clone(),
            place: place.map(ToString::to_string),
            stale: place.is_some_and(|place| place.stale),
            rule,
            rules: Vec::new(),
            decides: decides.get(&rule).into_iter().flatten().cloned().collect(),
            warnings: warnings(snapshot, &format!("PeerAuthentication {object}")),
        }
    };
    let mut all: Vec<PolicyDump> = view.cluster.peer_authentications.iter().map(policy).collect();
    all.extend(authorization_policies(snapshot, view, workloads));
    all
}

fn authorization_policies(
    snapshot: &Snapshot,
    view: &crate::source::View,
    workloads: &[&Workload],
) -> impl Iterator<Item = PolicyDump> {
    let mut selects: HashMap<ObjectRef, BTreeSet<String>> = HashMap::new();
    for workload in workloads.iter().filter(|workload| workload.enrollment.enrolled) {
        for policy in workload.authorization.policies() {
            selects.entry(policy.object()).or_default().insert(workload.object.to_string());
        }
    }
    view.cluster.authorization_policies.iter().map(move |(object, policy)| {
        let place = view.authorization_policies.get(object);
        PolicyDump {
            kind: "AuthorizationPolicy".to_owned(),
            namespace: object.namespace.to_string(),
            name: object.name.to_string(),
            action: format!("{}{}", policy.action, if policy.dry_run { " (dry-run)" } else { "" }),
            scope: scope(snapshot, object, &policy.selector),
            selector: policy.selector.clone(),
            ports: BTreeMap::new(),
            revision: policy.revision.clone(),
            place: place.map(ToString::to_string),
            stale: place.is_some_and(|place| place.stale),
            rule: 0,
            rules: (0..policy.rules.len())
                .map(|rule| snapshot.number(&RuleRef { policy: object.clone(), rule }).0)
                .collect(),
            decides: selects.get(object).into_iter().flatten().cloned().collect(),
            warnings: warnings(snapshot, &format!("AuthorizationPolicy {object}")),
        }
    })
}

fn scope(snapshot: &Snapshot, object: &ObjectRef, selector: &BTreeMap<String, String>) -> String {
    match (selector.is_empty(), object.namespace == snapshot.mesh.root_namespace) {
        (false, _) => "WorkloadSelector",
        (true, true) => "Global",
        (true, false) => "Namespace",
    }
    .to_owned()
}

/// What the snapshot says of an object, by its kind and name.
fn warnings(snapshot: &Snapshot, subject: &str) -> Vec<String> {
    let concerns = |text: &&String| {
        // The name ends here: test/strict is not test/strict-too.
        text.strip_prefix(subject).is_some_and(|rest| rest.starts_with([' ', ':']))
    };
    snapshot.warnings.iter().filter(concerns).cloned().collect()
}

fn written(mode: MtlsMode) -> &'static str {
    match mode {
        MtlsMode::Unset => "UNSET",
        MtlsMode::Disable => "DISABLE",
        MtlsMode::Permissive => "PERMISSIVE",
        MtlsMode::Strict => "STRICT",
    }
}

fn certificate(status: Status) -> CertificateDump {
    let now = unix_now();
    CertificateDump {
        identity: status.identity.to_string(),
        state: match status.state {
            crate::identity::State::Waiting => "Waiting",
            crate::identity::State::Serving => "Available",
            crate::identity::State::Expired => "Expired",
        }
        .to_owned(),
        renews_at: status.renews_at.map(rfc3339),
        failures: status.failures,
        last_error: status.last_error.map(|error| error.to_string()),
        chain: status.chain.iter().map(|certificate| facts(certificate, now)).collect(),
    }
}

fn facts(of: &Facts, now: u64) -> CertificateFacts {
    CertificateFacts {
        subject: of.subject.clone(),
        issuer: of.issuer.clone(),
        uris: of.uris.clone(),
        serial: of.serial.clone(),
        not_before: rfc3339(of.not_before),
        not_after: rfc3339(of.not_after),
        valid: (of.not_before..=of.not_after).contains(&now),
    }
}

fn kernel(handles: &Handles, content: &inspect::Content, snapshot: &Snapshot, names: &HashMap<u64, String>) -> Kernel {
    let mut addresses: HashMap<u64, Vec<IpAddr>> = HashMap::new();
    for (addr, owner) in &content.addrs {
        addresses.entry(owner.netns_cookie).or_default().push(addr.ip());
    }
    let pods = content.pods.iter().map(|(cookie, pod)| KernelPod {
        netns_cookie: *cookie,
        pod: names.get(cookie).cloned(),
        state: match PodState::from_u8(pod.state) {
            PodState::Unknown => "unknown",
            PodState::Pending => "pending",
            PodState::Ready => "ready",
        }
        .to_owned(),
        mode: Mode::from_u8(pod.mode).as_str().to_owned(),
        generation: pod.generation,
        rule: pod.rule,
        table: pod.table,
        plaintext_by_agent: pod.plaintext_by_agent != 0,
        addresses: addresses.remove(cookie).unwrap_or_default(),
        ports: content
            .modes
            .range(culvert_common::ModeKey { netns_cookie: *cookie, generation: pod.generation, bucket: 0, _pad: 0 }..)
            .take_while(|(key, _)| key.netns_cookie == *cookie && key.generation == pod.generation)
            .flat_map(|(_, value)| value.ports.iter().filter(|named| named.port != 0))
            .map(|named| (named.port, Mode::from_u8(named.mode).as_str().to_owned()))
            .collect(),
        listeners: content.listeners.get(cookie).copied().unwrap_or(0),
        listeners_wanted: 3 * usize::try_from(pod.workers).unwrap_or(0),
    });
    let pods = pods.collect();
    let verdict = |(key, count): (&VerdictKey, &u64)| VerdictDump {
        pod: names.get(&key.netns_cookie).cloned().unwrap_or_else(|| key.netns_cookie.to_string()),
        direction: if key.direction == Direction::Outbound as u8 { "outbound" } else { "inbound" }.to_owned(),
        answer: match key.answer {
            answer if answer == Answer::Pass as u8 => "pass",
            answer if answer == Answer::Agent as u8 => "agent",
            _ => "refuse",
        }
        .to_owned(),
        reason: Reason::from_u8(key.reason).map_or("unknown", Reason::as_str).to_owned(),
        rule: snapshot.rule(RuleId(key.rule)).map(ToString::to_string),
        count: *count,
    };
    let mut verdicts: Vec<VerdictDump> = content.verdicts.iter().map(verdict).collect();
    verdicts.sort_by(|a, b| (&a.pod, &a.direction, &a.reason).cmp(&(&b.pod, &b.direction, &b.reason)));
    Kernel {
        pin_directory: handles.pin_dir.display().to_string(),
        heartbeat_age_ms: match content.heartbeat.at_ns {
            0 => None,
            at => Some(monotonic_ns().saturating_sub(at) / 1_000_000),
        },
        kubelet_cgroup: content.settings.kubelet_cgroup,
        probes_by_netns: content.settings.probes_by_netns != 0,
        maps: content
            .maps
            .iter()
            .map(|map| MapDump { name: map.name.to_owned(), id: map.id, entries: map.entries, capacity: map.capacity })
            .collect(),
        pods,
        verdicts,
    }
}

fn protocol(tunnel: bool) -> String {
    if tunnel { "HBONE" } else { "TCP" }.to_owned()
}

/// Seconds since the epoch.
pub(crate) fn unix_now() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// Seconds since the epoch as RFC 3339 writes them, UTC.
pub(crate) fn rfc3339(seconds: u64) -> String {
    let at = i64::try_from(seconds).ok().and_then(|seconds| time::OffsetDateTime::from_unix_timestamp(seconds).ok());
    at.and_then(|at| at.format(&time::format_description::well_known::Rfc3339).ok())
        .unwrap_or_else(|| seconds.to_string())
}

/// Where each part of the agent stands: the answer of `GET /readyz`, as Kubernetes' own verbose answers look.
pub fn readiness(missing: &[String], handles: Option<&Handles>) -> String {
    let mut text = String::new();
    let mut line = |good: bool, name: &str, detail: String| {
        text += &format!("[{}] {name}: {detail}\n", if good { '+' } else { '-' });
    };
    for name in missing {
        line(false, "waiting for", name.clone());
    }
    if let Some(handles) = handles {
        let (snapshot, view) = (handles.snapshot.borrow().clone(), handles.views.borrow().clone());
        let problems = view.problems.len();
        let (pods, services) = (snapshot.workloads.len(), snapshot.services.len());
        line(
            problems == 0,
            "manifests",
            format!("{pods} pods, {services} services, {problems} problems, generation {}", snapshot.generation),
        );
        for problem in view.problems.iter().take(SHOWN) {
            line(false, "manifests", problem.to_string());
        }
        let deaf: Vec<(&str, &String)> =
            view.watched.iter().filter_map(|(kind, watched)| Some((*kind, watched.error.as_ref()?))).collect();
        if !view.watched.is_empty() {
            let (heard, all) = (view.watched.len() - deaf.len(), view.watched.len());
            line(deaf.is_empty(), "api-server", format!("{heard} of {all} kinds heard"));
        }
        for (kind, error) in &deaf {
            line(false, "api-server", format!("{kind}: {error}; what is known stays in force"));
        }
        let states = handles.enrolled.borrow().clone();
        let failed: Vec<(&PodUid, &String)> = states
            .iter()
            .filter_map(|(uid, state)| match state {
                enroll::State::Failed(why) => Some((uid, why)),
                enroll::State::Enrolled(_) => None,
            })
            .collect();
        line(failed.is_empty(), "pods", format!("{} enrolled, {} failed", states.len() - failed.len(), failed.len()));
        for (uid, why) in failed.iter().take(SHOWN) {
            let name = snapshot.workload(uid).map_or_else(|| uid.to_string(), |workload| workload.object.to_string());
            line(false, "pods", format!("{name}: {why}"));
        }
        let status = handles.identities.status();
        let without: Vec<&Status> =
            status.iter().filter(|status| status.state != crate::identity::State::Serving).collect();
        let have = status.len() - without.len();
        line(without.is_empty(), "certificates", format!("{have} of {}", status.len()));
        for status in without.iter().take(SHOWN) {
            let state = if status.state == crate::identity::State::Expired { "expired" } else { "none yet" };
            let why = status.last_error.as_deref().unwrap_or("no attempt has failed");
            line(false, "certificates", format!("{}: {state}: {why}", status.identity));
        }
        match inspect::heartbeat(&handles.pin_dir) {
            Ok(0) => line(false, "kernel", "no sign of life: none yet, or the agent ends".to_owned()),
            Ok(at_ns) => {
                let age = monotonic_ns().saturating_sub(at_ns);
                let silent = age > culvert_common::SILENT_AFTER_NS;
                line(!silent, "kernel", format!("last sign of life {} ms ago", age / 1_000_000));
            }
            Err(error) => line(false, "kernel", format!("{error:#}")),
        }
    }
    text += if missing.is_empty() { "ready\n" } else { "not ready\n" };
    text
}

/// Single findings that readiness names of one kind; the whole list is in the dump.
const SHOWN: usize = 8;
