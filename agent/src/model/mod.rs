//! Plain values: what the cluster is and what its users wrote. No I/O, no clock, no kernel.
//!
//! A source (`crate::source`) reads manifests or the API server and publishes a whole [`Cluster`]; `crate::policy`
//! compiles it. Nothing after the source can tell which source it was.

use std::{collections::BTreeMap, fmt, net::IpAddr, sync::Arc};

pub mod authorization;
pub mod identity;
mod objects;

pub use authorization::AuthorizationPolicy;
pub use identity::{SpiffeId, TrustDomain};
pub use objects::Objects;

/// UID of a pod (`metadata.uid`; for a static pod, its `kubernetes.io/config.hash`). Names are for humans.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PodUid(pub Arc<str>);

impl fmt::Display for PodUid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// `namespace/name` of an object.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectRef {
    /// `metadata.namespace`.
    pub namespace: Arc<str>,
    /// `metadata.name`.
    pub name: Arc<str>,
}

/// Label or annotation map.
pub type Labels = BTreeMap<String, String>;

/// Everything that the mesh needs to know of a cluster at one moment. Published whole, never changed in place.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cluster {
    /// Mesh configuration, specification §1.1.
    pub mesh: MeshConfig,
    /// By name. A namespace that is not listed has no labels.
    pub namespaces: Objects<Arc<str>, Namespace>,
    /// By name.
    pub nodes: Objects<Arc<str>, Node>,
    /// By UID.
    pub pods: Objects<PodUid, Pod>,
    /// By reference.
    pub services: Objects<ObjectRef, Service>,
    /// By reference.
    pub endpoint_slices: Objects<ObjectRef, EndpointSlice>,
    /// By reference.
    pub peer_authentications: Objects<ObjectRef, PeerAuthentication>,
    /// By reference.
    pub authorization_policies: Objects<ObjectRef, AuthorizationPolicy>,
}

/// ConfigMap `istio`, key `mesh` (specification §1.1).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MeshConfig {
    /// Home of mesh-wide policy.
    pub root_namespace: Arc<str>,
    /// Trust domain of this mesh's identities.
    pub trust_domain: TrustDomain,
    /// Further trust domains whose certificates are ours too ([I.8]).
    pub trust_domain_aliases: Vec<TrustDomain>,
    /// Upstream connect time-out.
    pub connect_timeout: std::time::Duration,
    /// `outboundTrafficPolicy.mode`: what becomes of destinations that are in no registry.
    pub outbound: OutboundPolicy,
}

impl MeshConfig {
    /// Whether identities of this trust domain are ours: it is the mesh's, or an alias ([I.8]).
    pub fn trusts(&self, domain: &TrustDomain) -> bool {
        self.trust_domain == *domain || self.trust_domain_aliases.contains(domain)
    }
}

/// What becomes of a destination that is in no registry (specification §9.4, last row).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OutboundPolicy {
    /// Passed through.
    #[default]
    AllowAny,
    /// Refused.
    RegistryOnly,
}

impl Default for MeshConfig {
    fn default() -> Self {
        Self {
            root_namespace: "istio-system".into(),
            trust_domain: TrustDomain::default(),
            trust_domain_aliases: Vec::new(),
            connect_timeout: std::time::Duration::from_secs(10),
            outbound: OutboundPolicy::default(),
        }
    }
}

/// A namespace: its labels decide enrolment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Namespace {
    /// `metadata.labels`.
    pub labels: Labels,
    /// `metadata.annotations`.
    pub annotations: Labels,
}

/// A node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Node {
    /// `metadata.labels`: region and zone.
    pub labels: Labels,
    /// `status.addresses` that are addresses.
    pub addresses: Vec<IpAddr>,
}

/// A pod, cut down to what the mesh needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pod {
    /// See [`PodUid`].
    pub uid: PodUid,
    /// `metadata.uid` of a static pod's object; `None` for other pods, whose UID that is.
    pub mirror_uid: Option<Arc<str>>,
    /// `metadata.namespace` and `metadata.name`.
    pub object: ObjectRef,
    /// `metadata.labels`; pods of one workload mostly share them.
    pub labels: Arc<Labels>,
    /// The annotations that mean something to us: `sidecar.istio.io/*`, `ambient.istio.io/*`, `istio.io/*`,
    /// `kubernetes.io/config.hash`.
    pub annotations: Labels,
    /// `spec.serviceAccountName`, `default` where empty ([I.2]).
    pub service_account: Arc<str>,
    /// `spec.nodeName`; empty while not scheduled.
    pub node: Arc<str>,
    /// `status.podIPs`, or `status.podIP` where that is all there is.
    pub ips: Vec<IpAddr>,
    /// `spec.hostNetwork`.
    pub host_network: bool,
    /// `status.phase` is Succeeded or Failed.
    pub finished: bool,
    /// Condition `Ready` is `True`.
    pub ready: bool,
    /// `metadata.deletionTimestamp` is set.
    pub terminating: bool,
    /// A container or init container is named `istio-proxy` (specification §2 row 4).
    pub has_proxy_container: bool,
    /// Container port name → number, TCP only; containers and native sidecars. Shared as the labels are.
    pub named_ports: Arc<BTreeMap<String, u16>>,
    /// Name of the owning workload, as telemetry shows it (specification §16).
    pub workload_name: Arc<str>,
}

/// How a Service chooses among its endpoints for one client.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SessionAffinity {
    /// No affinity.
    #[default]
    None,
    /// `ClientIP`, with `sessionAffinityConfig.clientIP.timeoutSeconds` (10800 where absent).
    ClientIp(std::time::Duration),
}

/// A Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// `metadata.namespace` and `metadata.name`.
    pub object: ObjectRef,
    /// `spec.clusterIPs` that are addresses: none for headless and ExternalName.
    pub cluster_ips: Vec<IpAddr>,
    /// `spec.ports` with protocol TCP.
    pub ports: Vec<ServicePort>,
    /// `spec.selector`; empty = none, endpoints come from EndpointSlices alone.
    pub selector: Labels,
    /// `spec.publishNotReadyAddresses`.
    pub publish_not_ready: bool,
    /// `spec.sessionAffinity`.
    pub session_affinity: SessionAffinity,
    /// `spec.internalTrafficPolicy` is `Local`.
    pub internal_traffic_local: bool,
}

/// One port of a Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePort {
    /// `name`; empty where there is one port without a name.
    pub name: Arc<str>,
    /// `port`.
    pub port: u16,
    /// `targetPort`; where absent, the same number as `port`.
    pub target: TargetPort,
}

/// Where a Service port leads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TargetPort {
    /// A number.
    Number(u16),
    /// The name of a container port, resolved pod by pod.
    Name(Arc<str>),
}

/// An EndpointSlice (discovery.k8s.io/v1).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointSlice {
    /// The Service: label `kubernetes.io/service-name`, in the slice's namespace.
    pub service: ObjectRef,
    /// Port name → number, TCP only.
    pub ports: BTreeMap<Arc<str>, u16>,
    /// Its endpoints.
    pub endpoints: Vec<SliceEndpoint>,
}

/// One endpoint of a slice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SliceEndpoint {
    /// The addresses that are addresses.
    pub addresses: Vec<IpAddr>,
    /// `conditions.ready`, true where absent.
    pub ready: bool,
    /// `targetRef` of kind Pod: its UID if given, and its reference.
    pub pod: Option<(Option<PodUid>, ObjectRef)>,
    /// `nodeName`.
    pub node: Option<Arc<str>>,
}

impl ObjectRef {
    /// From its two parts.
    pub fn new(namespace: &str, name: &str) -> Self {
        Self { namespace: namespace.into(), name: name.into() }
    }
}

impl fmt::Display for ObjectRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

impl PeerAuthentication {
    /// Its namespace and name.
    pub fn object(&self) -> ObjectRef {
        ObjectRef { namespace: self.age.namespace.clone(), name: self.age.name.clone() }
    }
}

/// Age order of [C.2]: creation (seconds since the epoch; absent = oldest), name, namespace.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Age {
    /// `metadata.creationTimestamp`, seconds since the epoch; `i64::MIN` where absent ([C.11]).
    pub created: i64,
    /// `metadata.name`.
    pub name: Arc<str>,
    /// `metadata.namespace`.
    pub namespace: Arc<str>,
}

/// Mode as a PeerAuthentication writes it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MtlsMode {
    /// Inherit.
    #[default]
    Unset,
    /// Plaintext allowed, explicitly.
    Disable,
    /// Both.
    Permissive,
    /// Tunnels only.
    Strict,
}

/// A PeerAuthentication as the user wrote it (specification §5).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerAuthentication {
    /// Where it stands in the age order, and its name.
    pub age: Age,
    /// `spec.selector.matchLabels`; absent and empty mean the same ([C.4]).
    pub selector: Labels,
    /// The selector was written, but empty: worth a warning ([C.4]).
    pub selector_written_empty: bool,
    /// `spec.mtls.mode`.
    pub mode: MtlsMode,
    /// `spec.portLevelMtls`, by workload port.
    pub port_modes: BTreeMap<u16, MtlsMode>,
    /// Label `istio.io/rev` ([C.5]).
    pub revision: Option<String>,
}
