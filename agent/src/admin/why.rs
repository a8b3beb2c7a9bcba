//! Why a connection was refused, or would be: the answers of `GET /refusals` and `GET /why`, and what the command line
//! reads.
//!
//! What is refused lately is in `telemetry::history`; what would happen now is answered by the agent's own snapshot,
//! by [`Snapshot::route`] and [`policy::decide`] and by nothing else. Here both are put into words, with what would allow
//! the connection (`remedy`).

use std::{
    collections::{BTreeMap, HashMap},
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::{Instant, SystemTime, UNIX_EPOCH},
};

use serde::{Deserialize, Serialize};

use crate::{
    enroll,
    model::{ObjectRef, PodUid, SpiffeId, TrustDomain},
    policy::{
        self, Authorization, Choice, Client, CompiledService, Connection, Enrollment, Occupant, Options, PeerAuth,
        Route, RouteRefusal, RuleId, Snapshot, Verdict, Workload,
    },
    source::View,
    telemetry::{
        access::Direction,
        history::{self, Party, Refusal, Refusals, Rule},
        recent::Seen,
    },
};

use super::dump::rfc3339;

pub(super) mod remedy;

use remedy::Case;

/// Endpoints of a Service that are looked at one by one.
const ENDPOINTS: usize = 64;
/// Longest name, as DNS has it (RFC 1035 §2.3.4).
const NAME: usize = 253;

/// What the agent goes by at one moment.
#[derive(Clone, Copy)]
pub(super) struct Mesh<'a> {
    pub(super) snapshot: &'a Snapshot,
    pub(super) view: &'a View,
    pub(super) options: &'a Options,
    /// Where the pods of this node stand.
    pub(super) states: &'a BTreeMap<PodUid, enroll::State>,
    /// Name of this node.
    pub(super) node: &'a str,
}

/// A rule, and where it is written.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PolicyDump {
    /// `PeerAuthentication` or `AuthorizationPolicy`.
    pub kind: String,
    /// Of the object.
    pub namespace: String,
    /// Of the object.
    pub name: String,
    /// Place of the rule in an AuthorizationPolicy, from 0.
    pub rule: Option<usize>,
    /// File, document and line, as long as it is in force.
    pub place: Option<String>,
}

/// One end of a connection.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct EndDump {
    /// Its address.
    pub addr: Option<IpAddr>,
    /// Namespace of the pod.
    pub namespace: Option<String>,
    /// Name of the pod.
    pub pod: Option<String>,
    /// SPIFFE ID: of the pod, or, of what was refused, as it was proved.
    pub identity: Option<String>,
    /// In the mesh or not, where there is such a pod.
    pub enrolled: Option<bool>,
    /// Why.
    pub enrolment: Option<String>,
    /// Its node.
    pub node: Option<String>,
}

/// Refusals that are alike.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct RefusalDump {
    /// `inbound` or `outbound`, seen from the pod of this node.
    pub direction: String,
    /// Who.
    pub source: EndDump,
    /// Whom.
    pub destination: EndDump,
    /// The port that was asked for; 0 where nobody knows it.
    pub port: u16,
    /// `namespace/name` of the Service that was asked for.
    pub service: Option<String>,
    /// One of the closed list of reasons.
    pub reason: String,
    /// The rule that refused.
    pub policy: Option<PolicyDump>,
    /// How often.
    pub count: u64,
    /// Milliseconds since the epoch.
    pub first_at_ms: u64,
    /// Milliseconds since the epoch.
    pub last_at_ms: u64,
    /// What happened, for people.
    pub detail: String,
    /// What would happen now, as in `allow no-allow-policies`; absent where policy does not say.
    pub now: Option<String>,
    /// What would allow it.
    pub remedies: Vec<String>,
}

/// What had no room.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct EvictedDump {
    /// Different refusals that had to go for more recent ones since the agent started.
    pub entries: u64,
    /// Connections that they were, by reason.
    pub connections: BTreeMap<String, u64>,
    /// When the latest of them was refused.
    pub last_at_ms: Option<u64>,
}

/// The answer of `GET /refusals`.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct RefusalsDump {
    /// Name of the node.
    pub node: String,
    /// Since when the agent has been looking; RFC 3339.
    pub since: String,
    /// How long a refusal is kept after its last time, in seconds.
    pub kept_seconds: u64,
    /// How many different ones are kept.
    pub capacity: usize,
    /// What had no room.
    pub evicted: EvictedDump,
    /// The latest first.
    pub refusals: Vec<RefusalDump>,
}

/// Mode of the server's port, and who set it.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ModeDump {
    /// As PeerAuthentication spells it.
    pub mode: String,
    /// Absent for the built-in PERMISSIVE.
    pub policy: Option<PolicyDump>,
}

/// What would happen to a connection now.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Explanation {
    /// The client.
    pub source: EndDump,
    /// The server: the one that it would come to.
    pub destination: EndDump,
    /// Its port.
    pub port: u16,
    /// `namespace/name` of the Service that is asked for.
    pub service: Option<String>,
    /// The agent takes the connection where it leaves the client's pod.
    pub captured: bool,
    /// `tunnel`, `plaintext`, or `none` where the client's side refuses.
    pub transport: String,
    /// `allow` or `deny`.
    pub decision: String,
    /// One of the closed list of reasons.
    pub reason: String,
    /// The verdict in words.
    pub detail: String,
    /// Whose side refuses: `client`, `server`, or `balancing`, the node's own choice of a Service's endpoint.
    pub refused_by: Option<String>,
    /// The rule that decided.
    pub policy: Option<PolicyDump>,
    /// PeerAuthentication of the server's port, where somebody enforces it.
    pub peer_authentication: Option<ModeDump>,
    /// What the verdict would be if policies in dry-run were enforced.
    pub dry_run: Option<String>,
    /// The AUDIT rule that matches.
    pub audit: Option<String>,
    /// What does not do what it seems to.
    pub warnings: Vec<String>,
    /// What would allow it.
    pub remedies: Vec<String>,
    /// Connections between the two to this port that this node's agent has seen refused in the last hour.
    pub refused: u64,
    /// When the last of them was; milliseconds since the epoch.
    pub refused_at_ms: Option<u64>,
    /// Policy generation that it is judged by.
    pub generation: u32,
}

// ---- What was typed.

/// Who is meant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Host {
    /// An address.
    Address(IpAddr),
    /// `NAMESPACE/NAME`.
    Object(ObjectRef),
    /// `NAME.NAMESPACE.svc`, with the cluster's domain or without.
    Service(ObjectRef),
    /// A bare name.
    Name(String),
}

/// A client: `NAMESPACE/POD`, `POD`, `POD.NAMESPACE`, or an address.
///
/// # Errors
/// One line that says what was expected.
pub(crate) fn client(text: &str) -> Result<Host, String> {
    let host = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(text);
    self::host(host).ok_or_else(|| {
        format!("{text:?} is no client: write NAMESPACE/POD, or an address, as in test/nginx or 10.244.1.10")
    })
}

/// A server with its port: as [`client`], or a Service as `NAME.NAMESPACE.svc`; an IPv6 address in brackets.
///
/// # Errors
/// One line that says what was expected.
pub(crate) fn server(text: &str) -> Result<(Host, u16), String> {
    let wrong = || {
        format!(
            "{text:?} is no server: write NAMESPACE/POD:PORT, SERVICE.NAMESPACE.svc:PORT, ADDRESS:PORT or [ADDRESS]:PORT, \
             as in default/web:9080"
        )
    };
    let (host, port) = text.rsplit_once(':').ok_or_else(wrong)?;
    // Only digits: a sign would be taken too.
    let port = Some(port).filter(|port| port.bytes().all(|byte| byte.is_ascii_digit()));
    let port: u16 = port.and_then(|port| port.parse().ok()).filter(|port| *port != 0).ok_or_else(wrong)?;
    let bracketed = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
    let host = match bracketed {
        Some(inside) => inside.parse().ok().filter(IpAddr::is_ipv6).map(Host::Address),
        None if host.contains(':') => None,
        None => self::host(host),
    };
    Ok((host.ok_or_else(wrong)?, port))
}

fn host(text: &str) -> Option<Host> {
    if let Ok(ip) = text.parse::<IpAddr>() {
        return Some(Host::Address(ip.to_canonical()));
    }
    let name = |text: &str| {
        let letters = text.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_'));
        !text.is_empty() && text.len() <= NAME && letters
    };
    if let Some((namespace, rest)) = text.split_once('/') {
        return (name(namespace) && name(rest)).then(|| Host::Object(ObjectRef::new(namespace, rest)));
    }
    let mut parts = text.splitn(4, '.');
    if let (Some(service), Some(namespace), Some("svc")) = (parts.next(), parts.next(), parts.next())
        && name(text)
        && !service.is_empty()
        && !namespace.is_empty()
    {
        return Some(Host::Service(ObjectRef::new(namespace, service)));
    }
    name(text).then(|| Host::Name(text.to_owned()))
}

/// Who that is.
pub(super) enum Found {
    /// A pod.
    Pod(Arc<Workload>),
    /// A Service.
    Service(Arc<CompiledService>),
    /// An address.
    Address(IpAddr),
}

impl Mesh<'_> {
    /// Who is meant by what was typed; a bare name is first looked for in `namespace`. Services where `services`.
    ///
    /// # Errors
    /// There is nobody of that name.
    pub(super) fn find(&self, host: &Host, namespace: &str, services: bool) -> Result<Found, String> {
        let object = |object: &ObjectRef| {
            let pod = self.pod(object).or_else(|| self.pod_of_workload(object)).map(Found::Pod);
            pod.or_else(|| self.service(object).filter(|_| services).map(Found::Service))
        };
        let (found, shown) = match host {
            Host::Address(ip) => (Some(Found::Address(*ip)), ip.to_string()),
            Host::Object(name) => {
                let typed = || match &*name.namespace {
                    "pod" | "pods" | "po" => self.pod(&ObjectRef::new(namespace, &name.name)).map(Found::Pod),
                    "svc" | "service" | "services" if services => {
                        self.service(&ObjectRef::new(namespace, &name.name)).map(Found::Service)
                    }
                    "deploy" | "deployment" | "statefulset" | "daemonset" | "job" => {
                        self.pod_of_workload(&ObjectRef::new(namespace, &name.name)).map(Found::Pod)
                    }
                    _ => None,
                };
                (object(name).or_else(typed), name.to_string())
            }
            Host::Service(name) => {
                (self.service(name).filter(|_| services).map(Found::Service), format!("Service {name}"))
            }
            Host::Name(name) => {
                let dotted = || {
                    let (name, namespace) = name.rsplit_once('.')?;
                    object(&ObjectRef::new(namespace, name))
                };
                let here = ObjectRef::new(namespace, name);
                (object(&here).or_else(dotted), here.to_string())
            }
        };
        let what = if services { "pod, workload or Service" } else { "pod or workload" };
        found
            .ok_or_else(|| format!("there is no {what} {shown}: culvert workloads lists the pods that the agent knows"))
    }

    fn pod(&self, object: &ObjectRef) -> Option<Arc<Workload>> {
        // Two pods have one name while one replaces the other.
        let all = self.snapshot.workloads.values().filter(|pod| pod.object == *object);
        all.max_by_key(|pod| (!pod.ips.is_empty(), pod.uid.clone())).cloned()
    }

    /// One of them: the first by name that has an address.
    fn pod_of_workload(&self, object: &ObjectRef) -> Option<Arc<Workload>> {
        let of = |pod: &&Arc<Workload>| pod.object.namespace == object.namespace && pod.workload_name == object.name;
        let all = self.snapshot.workloads.values().filter(of);
        all.min_by_key(|pod| (pod.ips.is_empty(), pod.object.clone(), pod.uid.clone())).cloned()
    }

    fn service(&self, object: &ObjectRef) -> Option<Arc<CompiledService>> {
        self.snapshot.services.get(object).cloned()
    }

    fn owner(&self, ip: IpAddr) -> Option<&Arc<Workload>> {
        match self.snapshot.workload_by_ip(ip)? {
            Occupant::One(pod) => Some(pod),
            Occupant::Ambiguous => None,
        }
    }

    /// What keeps a pod of this node out of the mesh that should be in it: it is refused.
    fn failed(&self, pod: &Workload) -> Option<&str> {
        match self.states.get(&pod.uid)? {
            enroll::State::Failed(why) if pod.enrollment.enrolled => Some(why),
            enroll::State::Failed(_) | enroll::State::Enrolled(_) => None,
        }
    }

    fn policy(&self, rule: &Rule) -> PolicyDump {
        let places = match rule.kind {
            "AuthorizationPolicy" => &self.view.authorization_policies,
            _ => &self.view.policies,
        };
        PolicyDump {
            kind: rule.kind.to_owned(),
            namespace: rule.object.namespace.to_string(),
            name: rule.object.name.to_string(),
            rule: rule.rule,
            place: places.get(&rule.object).map(ToString::to_string),
        }
    }

    fn end(&self, ip: Option<IpAddr>, pod: Option<&Workload>) -> EndDump {
        EndDump {
            addr: ip,
            namespace: pod.map(|pod| pod.object.namespace.to_string()),
            pod: pod.map(|pod| pod.object.name.to_string()),
            identity: pod.filter(|pod| pod.enrollment.enrolled).map(|pod| pod.identity.to_string()),
            enrolled: pod.map(|pod| pod.enrollment.enrolled),
            enrolment: pod.map(|pod| format!("{} (row {})", pod.enrollment.reason, pod.enrollment.row)),
            node: pod.map(|pod| pod.node.to_string()).filter(|node| !node.is_empty()),
        }
    }
}

// ---- What would happen now.

/// A client, as far as it is known.
#[derive(Clone, Copy)]
struct Caller<'a> {
    pod: Option<&'a Arc<Workload>>,
    /// The address that was named.
    ip: Option<IpAddr>,
}

impl Caller<'_> {
    /// Its address towards a server of this family.
    fn ip_towards(&self, server: IpAddr) -> Option<IpAddr> {
        let own = self.pod.into_iter().flat_map(|pod| pod.ips.iter().copied());
        self.ip.into_iter().chain(own).find(|ip| ip.is_ipv4() == server.is_ipv4())
    }
}

/// How a connection goes, and what becomes of it.
struct Course {
    transport: &'static str,
    target: SocketAddr,
    server: Option<Arc<Workload>>,
    service: Option<ObjectRef>,
    allowed: bool,
    reason: &'static str,
    detail: String,
    refused_by: Option<&'static str>,
    verdict: Option<Verdict>,
}

/// What would happen to connections from the client to the server's port: one answer for each server that a Service could
/// choose, and one in all otherwise.
///
/// # Errors
/// The question has no answer: one line says why.
pub(super) fn explain(
    mesh: &Mesh<'_>,
    client: &Found,
    server: &Found,
    port: u16,
    refused: &Refusals,
) -> Result<Vec<Explanation>, String> {
    let caller = match client {
        Found::Pod(pod) => Caller { pod: Some(pod), ip: None },
        Found::Address(ip) => Caller { pod: mesh.owner(*ip), ip: Some(*ip) },
        Found::Service(service) => return Err(format!("Service {} makes no connections: name a pod", service.object)),
    };
    let (addresses, what) = match server {
        Found::Pod(pod) => (pod.ips.clone(), format!("pod {} has no address of its own", pod.object)),
        Found::Service(service) => {
            (service.cluster_ips.clone(), format!("Service {} has no cluster IP", service.object))
        }
        Found::Address(ip) => (vec![*ip], String::new()),
    };
    let reachable = addresses.iter().copied().find(|ip| caller.ip_towards(*ip).is_some());
    let Some(ip) = reachable.or(addresses.first().copied()) else {
        return Err(format!("{what}: name the address that the client connects to"));
    };
    let dst = SocketAddr::new(ip.to_canonical(), port);
    let service = match mesh.snapshot.by_vip.get(&dst.ip()) {
        Some(Occupant::One(service)) => Some(service),
        Some(Occupant::Ambiguous) | None => None,
    };
    let endpoints = service.and_then(|service| service.ports.get(&port)).map_or(1, Vec::len).clamp(1, ENDPOINTS);
    let mut all: Vec<Explanation> = Vec::new();
    for nth in 0..endpoints {
        // Each endpoint's share of what `route` takes for chance.
        let random = ((nth as u128) << 64).div_ceil(endpoints as u128);
        let one = one(mesh, caller, dst, u64::try_from(random).unwrap_or(u64::MAX), refused);
        if !all.iter().any(|known| (known.destination.addr, known.port) == (one.destination.addr, one.port)) {
            all.push(one);
        }
    }
    Ok(all)
}

fn one(mesh: &Mesh<'_>, caller: Caller<'_>, dst: SocketAddr, random: u64, refused: &Refusals) -> Explanation {
    let Course { transport, target, server, service, allowed, reason, detail, refused_by, verdict } =
        course(mesh, caller, dst, random);
    let source_ip = caller.ip_towards(target.ip());
    let pod = caller.pod.map(|pod| &**pod);
    let rule = verdict.as_ref().and_then(|verdict| verdict.decided_by.as_ref()).map(Rule::from);
    let mut remedies = Vec::new();
    if !allowed {
        remedies = remedy::remedies(
            mesh,
            &Case {
                reason,
                detail: &detail,
                rule: rule.as_ref(),
                client: pod,
                client_ip: source_ip,
                identity: pod.filter(|_| transport == "tunnel").map(|pod| &pod.identity),
                server: server.as_deref(),
                target: Some(target),
                service: service.as_ref(),
            },
        );
    }
    let mode = server.as_ref().filter(|server| server.enrollment.enrolled).map(|server| {
        let (mode, rule) = server.peer_auth.of_port(target.port());
        let policy = mesh.snapshot.rule(rule).map(|rule| mesh.policy(&rule.into()));
        ModeDump { mode: mode.as_str().to_owned(), policy }
    });
    let (times, last) = between(refused, pod, source_ip, server.as_deref(), target);
    let now = (Instant::now(), unix_ms());
    Explanation {
        source: mesh.end(source_ip.or(caller.ip), pod),
        destination: mesh.end(Some(target.ip()), server.as_deref()),
        port: target.port(),
        service: service.map(|service| service.to_string()),
        captured: pod.is_some_and(|pod| pod.enrollment.enrolled) && transport != "same-pod",
        transport: transport.to_owned(),
        decision: if allowed { "allow" } else { "deny" }.to_owned(),
        reason: reason.to_owned(),
        detail,
        refused_by: refused_by.map(str::to_owned),
        policy: rule.as_ref().map(|rule| mesh.policy(rule)),
        peer_authentication: mode,
        dry_run: verdict.as_ref().and_then(|verdict| verdict.dry_run.as_ref()).map(ToString::to_string),
        audit: verdict.as_ref().and_then(|verdict| verdict.audit.as_ref()).map(ToString::to_string),
        warnings: verdict.iter().flat_map(|verdict| &verdict.warnings).map(ToString::to_string).collect(),
        remedies,
        refused: times,
        refused_at_ms: last.map(|at| wall(at, now)),
        generation: mesh.snapshot.generation,
    }
}

/// The way of one connection, and its end.
fn course(mesh: &Mesh<'_>, caller: Caller<'_>, dst: SocketAddr, random: u64) -> Course {
    let snapshot = mesh.snapshot;
    let captured = caller.pod.is_some_and(|pod| pod.enrollment.enrolled);
    let refused = |reason: &'static str, detail: String, by| Course {
        transport: "none",
        target: dst,
        server: mesh.owner(dst.ip()).cloned(),
        service: None,
        allowed: false,
        reason,
        detail,
        refused_by: Some(by),
        verdict: None,
    };
    if let Some(own) = caller.pod.filter(|own| own.ips.contains(&dst.ip())) {
        return judged(snapshot, "same-pod", Client::SamePod, None, dst, own.clone(), None);
    }
    if captured {
        if let Some(why) = caller.pod.and_then(|own| mesh.failed(own)) {
            return refused("enrolment-pending", why.to_owned(), "client");
        }
        if caller.ip_towards(dst.ip()).is_none() {
            let detail = format!("the client's pod has no address of the family of {}", dst.ip());
            return refused("no-address-of-family", detail, "client");
        }
    }
    let stranger = stranger();
    let own: &Workload = caller.pod.map_or(&stranger, |pod| pod);
    let towards = caller.ip_towards(dst.ip());
    let choice = Choice { random, client: towards.unwrap_or(IpAddr::from([0; 4])) };
    let (target, server, service) = match snapshot.route(own, dst, choice) {
        Route::Tunnel { workload, target, service } => {
            if let Some(why) = mesh.failed(&workload) {
                let pending = refused("enrolment-pending", why.to_owned(), "server");
                return Course { target, server: Some(workload), service, ..pending };
            }
            let source = caller.ip_towards(target.ip());
            return judged(snapshot, "tunnel", Client::Tunnel(&own.identity), source, target, workload, service);
        }
        Route::Plaintext { target, workload, service } => (target, workload, service),
        // What the client's side refuses it refuses only to pods of the mesh.
        Route::Refuse(RouteRefusal::Loop | RouteRefusal::NotInRegistry) if !captured => {
            (dst, mesh.owner(dst.ip()).cloned(), None)
        }
        Route::Refuse(refusal) => {
            let by = if captured { "client" } else { "balancing" };
            return refused(refusal.as_str(), format!("{dst}: {}", refusal.as_str()), by);
        }
    };
    match server {
        Some(server) => {
            if let Some(why) = mesh.failed(&server) {
                let pending = refused("enrolment-pending", why.to_owned(), "server");
                return Course { target, server: Some(server), service, ..pending };
            }
            let source = caller.ip_towards(target.ip());
            judged(snapshot, "plaintext", Client::Plain, source, target, server, service)
        }
        None => Course {
            transport: "plaintext",
            target,
            server: None,
            service,
            allowed: true,
            reason: "server-not-enrolled",
            detail: "no pod has the server's address: nothing of the mesh protects it".to_owned(),
            refused_by: None,
            verdict: None,
        },
    }
}

fn judged(
    snapshot: &Snapshot,
    transport: &'static str,
    client: Client<'_>,
    source_ip: Option<IpAddr>,
    target: SocketAddr,
    server: Arc<Workload>,
    service: Option<ObjectRef>,
) -> Course {
    let connection = Connection {
        server: server.server(),
        client,
        source_ip,
        destination_ip: Some(target.ip()),
        port: target.port(),
    };
    let verdict = policy::decide(snapshot, &connection);
    Course {
        transport,
        target,
        server: Some(server),
        service,
        allowed: verdict.allowed,
        reason: verdict.reason.as_str(),
        detail: verdict.to_string(),
        refused_by: (!verdict.allowed).then_some("server"),
        verdict: Some(verdict),
    }
}

/// Whoever has no pod: outside the mesh, as far as the mesh can tell.
fn stranger() -> Workload {
    let nobody: Arc<str> = "".into();
    Workload {
        uid: PodUid(nobody.clone()),
        object: ObjectRef::new("", ""),
        identity: SpiffeId {
            trust_domain: TrustDomain::default(),
            namespace: nobody.clone(),
            service_account: nobody.clone(),
        },
        ips: Vec::new(),
        node: nobody.clone(),
        enrollment: Enrollment { enrolled: false, row: 16, reason: Default::default(), warnings: Default::default() },
        peer_auth: PeerAuth { mode: culvert_common::Mode::Permissive, rule: RuleId(0), ports: BTreeMap::new() },
        authorization: Authorization::default(),
        workload_name: nobody,
        labels: Arc::default(),
        region: None,
        zone: None,
    }
}

// ---- What was refused.

/// The refusals of the last hour, with what would allow each of them now.
pub(super) fn refusals(mesh: &Mesh<'_>, refused: &Refusals, started_at: u64) -> RefusalsDump {
    let now = (Instant::now(), unix_ms());
    let mut pods: HashMap<&ObjectRef, &Arc<Workload>> = HashMap::with_capacity(mesh.snapshot.workloads.len());
    for pod in mesh.snapshot.workloads.values() {
        // Two pods have one name while one replaces the other.
        let known = pods.entry(&pod.object).or_insert(pod);
        if (known.ips.is_empty(), &known.uid) > (pod.ips.is_empty(), &pod.uid) {
            *known = pod;
        }
    }
    let evicted = &refused.evicted;
    RefusalsDump {
        node: mesh.node.to_owned(),
        since: rfc3339(started_at),
        kept_seconds: history::KEEP.as_secs(),
        capacity: history::ENTRIES,
        evicted: EvictedDump {
            entries: evicted.entries,
            connections: evicted.reasons.iter().map(|(reason, times)| ((*reason).to_owned(), *times)).collect(),
            last_at_ms: evicted.last.map(|last| wall(last, now)),
        },
        refusals: refused.entries.iter().map(|(refusal, seen)| refusal_of(mesh, &pods, refusal, seen, now)).collect(),
    }
}

fn refusal_of(
    mesh: &Mesh<'_>,
    pods: &HashMap<&ObjectRef, &Arc<Workload>>,
    of: &Refusal,
    seen: &Seen<history::Circumstances>,
    now: (Instant, u64),
) -> RefusalDump {
    let pod = |party: &Party| party.pod.as_ref().and_then(|name| pods.get(name)).map(|pod| Arc::clone(pod));
    let (client, server) = (pod(&of.source), pod(&of.destination));
    let end = |party: &Party, pod: Option<&Workload>| EndDump {
        // As they were, whatever has become of them.
        namespace: party.pod.as_ref().map(|name| name.namespace.to_string()),
        pod: party.pod.as_ref().map(|name| name.name.to_string()),
        identity: None,
        ..mesh.end(party.ip, pod)
    };
    let mut source = end(&of.source, client.as_deref());
    source.identity = seen.about.identity.as_ref().map(ToString::to_string);
    let target = of.destination.ip.filter(|_| of.port != 0).map(|ip| SocketAddr::new(ip, of.port));
    let case = Case {
        reason: of.reason,
        detail: &seen.about.detail,
        rule: of.rule.as_ref(),
        client: client.as_deref(),
        client_ip: of.source.ip,
        identity: seen.about.identity.as_ref(),
        server: server.as_deref(),
        target,
        service: seen.about.service.as_ref(),
    };
    let (verdict, remedies) = match today(mesh, of, client.as_ref(), &seen.about, target) {
        Some(course) if course.allowed => {
            (Some(format!("allow {}", course.reason)), vec!["nothing: it would be allowed now".to_owned()])
        }
        Some(course) => {
            let rule = course.verdict.as_ref().and_then(|verdict| verdict.decided_by.as_ref()).map(Rule::from);
            let identity = client.as_ref().filter(|_| course.transport == "tunnel").map(|client| &client.identity);
            let case = Case {
                reason: course.reason,
                detail: &course.detail,
                rule: rule.as_ref(),
                identity,
                server: course.server.as_deref(),
                target: Some(course.target),
                ..case
            };
            (Some(format!("deny {}", course.reason)), remedy::remedies(mesh, &case))
        }
        None => (None, remedy::remedies(mesh, &case)),
    };
    RefusalDump {
        direction: match of.direction {
            Direction::Inbound => "inbound",
            Direction::Outbound => "outbound",
        }
        .to_owned(),
        source,
        destination: end(&of.destination, server.as_deref()),
        port: of.port,
        service: seen.about.service.as_ref().map(ToString::to_string),
        reason: of.reason.to_owned(),
        policy: of.rule.as_ref().map(|rule| mesh.policy(rule)),
        count: seen.times,
        first_at_ms: wall(seen.first, now),
        last_at_ms: wall(seen.last, now),
        detail: seen.about.detail.to_string(),
        now: verdict,
        remedies,
    }
}

/// What would become of the same connection now, where it was policy or the registry that refused it, and where both ends
/// are still who they were.
fn today(
    mesh: &Mesh<'_>,
    of: &Refusal,
    client: Option<&Arc<Workload>>,
    about: &history::Circumstances,
    target: Option<SocketAddr>,
) -> Option<Course> {
    const BY_POLICY: [&str; 10] = [
        "strict-requires-mtls",
        "policy-missing",
        "no-allow-match",
        "explicit-deny",
        "untrusted-trust-domain",
        "loop",
        "no-such-service-port",
        "no-endpoint",
        "ambiguous-address",
        "not-in-registry",
    ];
    let gone = of.source.pod.is_some() && client.is_none();
    // A certificate that is not the one of the address's pod is not asked for again.
    let foreign = about.identity.as_ref().is_some_and(|proved| client.is_none_or(|client| client.identity != *proved));
    // The policy of the server's side, which is this agent's as well (§14.2).
    let by_peer = of.reason == "refused-by-peer" && about.detail.contains("401");
    if !(BY_POLICY.contains(&of.reason) || by_peer) || gone || foreign {
        return None;
    }
    let ip = of.source.ip;
    let caller = Caller { pod: client.or_else(|| mesh.owner(ip?)), ip };
    Some(course(mesh, caller, target?, 0))
}

/// How often, and when last, connections between the two were refused.
fn between(
    refused: &Refusals,
    client: Option<&Workload>,
    client_ip: Option<IpAddr>,
    server: Option<&Workload>,
    target: SocketAddr,
) -> (u64, Option<Instant>) {
    let is = |party: &Party, pod: Option<&Workload>, ip: Option<IpAddr>| match (&party.pod, pod) {
        (Some(name), Some(pod)) => *name == pod.object,
        (None, _) | (_, None) => party.ip.is_some() && party.ip == ip,
    };
    let of = refused.entries.iter().filter(|(refusal, _)| {
        let to = is(&refusal.destination, server, Some(target.ip()));
        to && refusal.port == target.port() && is(&refusal.source, client, client_ip)
    });
    // Two pods of one node: both sides tell of one refusal; the server's knows more.
    let (mut inbound, mut outbound, mut last) = (0, 0, None);
    for (refusal, seen) in of {
        match refusal.direction {
            Direction::Inbound => inbound += seen.times,
            Direction::Outbound => outbound += seen.times,
        }
        last = last.max(Some(seen.last));
    }
    (inbound.max(outbound), last)
}

/// Milliseconds since the epoch.
pub(super) fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// A moment as milliseconds since the epoch; `now` is one moment by both clocks.
pub(super) fn wall(at: Instant, now: (Instant, u64)) -> u64 {
    let ago = u64::try_from(now.0.saturating_duration_since(at).as_millis()).unwrap_or(u64::MAX);
    now.1.saturating_sub(ago)
}

#[cfg(test)]
pub(super) mod tests;
