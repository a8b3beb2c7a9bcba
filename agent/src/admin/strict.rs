//! Which workloads of this node can go to STRICT now, which clients stand in the way, and the manifests that would do it:
//! the answer of `GET /strict`, and what the command line reads.
//!
//! It goes by what was seen (`telemetry::history`), so it says since when, and that it knows the pods of this node only.
//! What the manifests would do is not reckoned here: they are compiled as any others ([`policy::compile`]), and only those
//! are shown that make STRICT what they should, and change nothing else.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use culvert_common::Mode;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::{
    enroll,
    model::{Age, Labels, MtlsMode, ObjectRef, PeerAuthentication},
    policy::{self, Snapshot, Workload},
    telemetry::{
        history::{self, Caller, Circumstances, Refusal},
        open::{Carried, Strictness},
        recent::Seen,
    },
};

use super::{
    dump::rfc3339,
    why::{
        Mesh,
        remedy::{selecting, selector, stable},
        unix_ms, wall,
    },
};

/// The answer of `GET /strict`.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct StrictDump {
    /// Name of the node.
    pub node: String,
    /// Since when the agent has been looking; RFC 3339.
    pub since: String,
    /// By namespace and name; only what is in the mesh and has a pod on this node.
    pub workloads: Vec<StrictWorkload>,
    /// What would make STRICT what is ready.
    pub manifests: Vec<StrictManifest>,
    /// What was not seen, one line each.
    pub notes: Vec<String>,
}

/// Whether a workload can go to STRICT.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum Readiness {
    /// It is there on every port.
    Strict,
    /// No client that was seen would be refused.
    Ready,
    /// Clients come in plaintext.
    Blocked,
    /// There was plaintext, and nobody knows any more whose.
    Unsure,
}

impl Readiness {
    /// As the document spells it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Strict => "strict",
            Self::Ready => "ready",
            Self::Blocked => "blocked",
            Self::Unsure => "unsure",
        }
    }

    /// STRICT would refuse nobody who is served now.
    fn is_good(self) -> bool {
        match self {
            Self::Strict | Self::Ready => true,
            Self::Blocked | Self::Unsure => false,
        }
    }
}

/// One workload.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct StrictWorkload {
    /// Of its pods.
    pub namespace: String,
    /// Name of the workload.
    pub workload: String,
    /// Its effective modes, as in `PERMISSIVE` or `STRICT,9090=PERMISSIVE`.
    pub mode: String,
    /// Whether it can go to STRICT.
    pub state: Readiness,
    /// Pods of it on this node.
    pub pods: usize,
    /// Other nodes on which it has pods, which this agent knows nothing of.
    pub other_nodes: Vec<String>,
    /// Connections by tunnels since the agent started.
    pub tunnelled: u64,
    /// Connections in plaintext that were let in since; probes do not count.
    pub plaintext: u64,
    /// Who came in plaintext; those that stand in the way first.
    pub clients: Vec<StrictClient>,
    /// What else is to be known, one line each.
    pub notes: Vec<String>,
    /// `namespace/name` of the manifest that would do it.
    pub manifest: Option<String>,
}

/// Who came in plaintext.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct StrictClient {
    /// `namespace/workload`, or an address that no pod has.
    pub client: String,
    /// The address of the last time.
    pub addr: IpAddr,
    /// The server's port.
    pub port: u16,
    /// `in`, `out`, `partly`, `gone`, or `unknown` where no pod has the address.
    pub mesh: String,
    /// Why it came in plaintext.
    pub why: String,
    /// STRICT would refuse it.
    pub blocks: bool,
    /// Connections that were let in.
    pub count: u64,
    /// Connections that STRICT has refused in the last hour.
    pub refused: u64,
    /// Connections that are open now.
    pub open: u64,
    /// Milliseconds since the epoch.
    pub first_at_ms: u64,
    /// Milliseconds since the epoch.
    pub last_at_ms: u64,
}

/// A PeerAuthentication.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct StrictManifest {
    /// Of the object.
    pub namespace: String,
    /// Of the object.
    pub name: String,
    /// `namespace/workload` of what it makes STRICT on this node.
    pub workloads: Vec<String>,
    /// An object of this name is in force: this one takes its place.
    pub replaces: bool,
    /// What to know before, one line each.
    pub notes: Vec<String>,
    /// The object.
    pub manifest: Value,
}

/// The pods of one workload on this node.
struct Group<'a> {
    pods: Vec<&'a Arc<Workload>>,
    state: Readiness,
}

/// The report. `within` leaves out clients that were not seen for longer.
pub(super) fn report(mesh: &Mesh<'_>, seen: &Strictness, started_at: u64, within: Option<Duration>) -> StrictDump {
    let clock = (Instant::now(), unix_ms());
    let mut by_workload: HashMap<ObjectRef, Vec<&Arc<Workload>>> = HashMap::new();
    for pod in mesh.snapshot.workloads.values().filter(|pod| !pod.ips.is_empty()) {
        by_workload.entry(history::workload(pod)).or_default().push(pod);
    }
    let here = |pod: &&Arc<Workload>| matches!(mesh.states.get(&pod.uid), Some(enroll::State::Enrolled(_)));
    let by_pod: HashMap<&ObjectRef, &ObjectRef> =
        by_workload.iter().flat_map(|(name, pods)| pods.iter().map(move |pod| (&pod.object, name))).collect();
    let mut refused: HashMap<&ObjectRef, Vec<&Refused>> = HashMap::new();
    for one in seen.refusals.entries.iter().filter(|(of, _)| of.reason == "strict-requires-mtls") {
        if let Some(server) = one.0.destination.pod.as_ref().and_then(|pod| by_pod.get(pod)) {
            refused.entry(server).or_default().push(one);
        }
    }
    let mut open = open(seen);
    let tunnelled = tunnelled(seen);
    let (mut groups, mut workloads) = (BTreeMap::new(), Vec::new());
    for (name, all) in &by_workload {
        let pods: Vec<&Arc<Workload>> =
            all.iter().copied().filter(|pod| pod.enrollment.enrolled).filter(here).collect();
        if pods.is_empty() {
            continue;
        }
        let (mut clients, plaintext) = clients(mesh, seen, name, &by_workload, &mut open, (clock, within));
        for (of, seen) in refused.get(name).into_iter().flatten() {
            if within.is_none_or(|within| clock.0.saturating_duration_since(seen.last) <= within) {
                clients.extend(refused_client(mesh, of, seen, &by_workload, &by_pod, clock));
            }
        }
        clients.sort_by(|a, b| (!a.blocks, a.port, &a.client).cmp(&(!b.blocks, b.port, &b.client)));
        let unknown = seen.plaintext.others.get(name).copied().unwrap_or(0)
            + seen.unseen.iter().filter(|(server, _)| server == name).map(|(_, times)| times).sum::<u64>();
        let state = if pods.iter().all(|pod| is_strict(pod)) {
            Readiness::Strict
        } else if clients.iter().any(|client| client.blocks) {
            Readiness::Blocked
        } else if unknown + seen.plaintext.lost > 0 {
            Readiness::Unsure
        } else {
            Readiness::Ready
        };
        let nodes = all.iter().filter(|pod| pod.enrollment.enrolled && *pod.node != *mesh.node);
        let other_nodes: BTreeSet<String> = nodes.map(|pod| pod.node.to_string()).collect();
        let tunnelled = tunnelled.get(name).copied().unwrap_or(0);
        let mut notes = Vec::new();
        if unknown > 0 {
            notes.push(format!("{unknown} connections in plaintext of which nobody knows any more who made them"));
        }
        if state == Readiness::Ready && tunnelled == 0 && plaintext == 0 {
            notes.push(
                "no connection has come to it since then: nothing speaks against STRICT, and nothing for it".into(),
            );
        }
        let gone: BTreeSet<&str> = clients
            .iter()
            .filter(|of| of.mesh == "gone" && of.count > 0)
            .map(|of| of.client.as_str())
            .take(NAMED)
            .collect();
        if !gone.is_empty() {
            let gone: Vec<&str> = gone.into_iter().collect();
            notes.push(format!("{} came in plaintext and are gone: STRICT refuses others like them", gone.join(", ")));
        }
        if !other_nodes.is_empty() {
            let nodes: Vec<&str> = other_nodes.iter().map(String::as_str).collect();
            notes.push(format!(
                "it has pods on {} too, which this agent does not see: ask there as well",
                nodes.join(", ")
            ));
        }
        workloads.push(StrictWorkload {
            namespace: name.namespace.to_string(),
            workload: name.name.to_string(),
            mode: modes(&pods),
            state,
            pods: pods.len(),
            other_nodes: other_nodes.into_iter().collect(),
            tunnelled,
            plaintext: plaintext + unknown,
            clients,
            notes,
            manifest: None,
        });
        groups.insert(name.clone(), Group { pods, state });
    }
    workloads.sort_by(|a, b| (&a.namespace, &a.workload).cmp(&(&b.namespace, &b.workload)));
    let (manifests, problems) = manifests(mesh, &groups);
    for workload in &mut workloads {
        let name = format!("{}/{}", workload.namespace, workload.workload);
        let of = manifests.iter().find(|manifest| manifest.workloads.contains(&name));
        workload.manifest = of.map(|of| format!("{}/{}", of.namespace, of.name));
        workload.notes.extend(problems.iter().filter(|(of, _)| *of == name).map(|(_, problem)| problem.clone()));
    }
    let mut notes = vec![format!(
        "seen since {} by the agent of {}, of the pods on this node only; what has not come since then was not seen",
        rfc3339(started_at),
        mesh.node
    )];
    let out =
        mesh.snapshot.workloads.values().filter(|pod| *pod.node == *mesh.node && !pod.enrollment.enrolled).count();
    if out > 0 {
        notes.push(format!("pods of this node that are not in the mesh, and that nothing protects in any mode: {out}"));
    }
    if seen.plaintext.lost > 0 {
        notes.push(format!(
            "{} connections in plaintext came faster than they could be noted: nobody knows to whom",
            seen.plaintext.lost
        ));
    }
    StrictDump { node: mesh.node.to_owned(), since: rfc3339(started_at), workloads, manifests, notes }
}

fn is_strict(pod: &Workload) -> bool {
    let auth = &pod.peer_auth;
    auth.mode == Mode::Strict && auth.ports.values().all(|(mode, _)| *mode == Mode::Strict)
}

fn modes(pods: &[&Arc<Workload>]) -> String {
    let of = |pod: &&Arc<Workload>| {
        let auth = &pod.peer_auth;
        let ports = auth.ports.iter().map(|(port, (mode, _))| format!("{port}={}", mode.as_str()));
        [auth.mode.as_str().to_owned()].into_iter().chain(ports).collect::<Vec<_>>().join(",")
    };
    let all: BTreeSet<String> = pods.iter().map(of).collect();
    all.into_iter().collect::<Vec<_>>().join(" or ")
}

type Key = (ObjectRef, u16, Caller);
type Refused = (Refusal, Seen<Circumstances>);
/// Clients that a note names.
const NAMED: usize = 4;

/// Plaintext that is open now, with an address that it comes from.
fn open(seen: &Strictness) -> BTreeMap<Key, (u64, IpAddr)> {
    let mut open = BTreeMap::new();
    for record in &seen.open {
        let name = |peer: &crate::telemetry::open::Peer| match (&peer.namespace, &peer.workload) {
            (Some(namespace), Some(workload)) => Some(ObjectRef::new(namespace, workload)),
            _ => None,
        };
        let (Some(server), true) = (name(&record.destination), record.direction == "inbound") else { continue };
        match record.carried {
            Carried::Tunnel => {}
            Carried::Agent | Carried::Kernel | Carried::PreEnrolment => {
                let ip = record.source.addr.ip().to_canonical();
                let client = name(&record.source).map_or(Caller::Address(ip), Caller::Workload);
                open.entry((server, record.destination.addr.port(), client)).or_insert((0, ip)).0 += 1;
            }
        }
    }
    open
}

/// Connections by tunnels, by the server's workload.
fn tunnelled(seen: &Strictness) -> HashMap<ObjectRef, u64> {
    let mut tunnelled: HashMap<ObjectRef, u64> = HashMap::new();
    for (labels, count) in &seen.traffic.sets {
        let of: HashMap<&str, &str> = labels.iter().collect();
        let of = |name: &str| of.get(name).copied().unwrap_or_default();
        if of("reporter") == "destination" && of("connection_security_policy") == "mutual_tls" {
            let server = ObjectRef::new(of("destination_workload_namespace"), of("destination_workload"));
            *tunnelled.entry(server).or_default() += count.opened;
        }
    }
    tunnelled
}

/// Who came to a workload in plaintext, and how many connections that were.
fn clients(
    mesh: &Mesh<'_>,
    seen: &Strictness,
    server: &ObjectRef,
    workloads: &HashMap<ObjectRef, Vec<&Arc<Workload>>>,
    open: &mut BTreeMap<Key, (u64, IpAddr)>,
    (clock, within): ((Instant, u64), Option<Duration>),
) -> (Vec<StrictClient>, u64) {
    let recent = |last: Instant| within.is_none_or(|within| clock.0.saturating_duration_since(last) <= within);
    let (mut clients, mut plaintext) = (Vec::new(), 0);
    for (of, seen) in seen.plaintext.entries.iter().filter(|(of, _)| of.server == *server) {
        plaintext += seen.times;
        let key = (of.server.clone(), of.port, of.client.clone());
        // Told with the latest of those that are alike.
        let now = open.remove(&key).map_or(0, |(times, _)| times);
        if now == 0 && !recent(seen.last) {
            continue;
        }
        let Standing { mesh, why, blocks } = standing(mesh, &of.client, workloads, Some((of.enrolled, of.older)), now);
        clients.push(StrictClient {
            client: of.client.to_string(),
            addr: seen.about,
            port: of.port,
            mesh: mesh.to_owned(),
            why,
            blocks,
            count: seen.times,
            refused: 0,
            open: now,
            first_at_ms: wall(seen.first, clock),
            last_at_ms: wall(seen.last, clock),
        });
    }
    // Open, and no longer among the most recent that are kept.
    let rest: Vec<Key> = open.keys().filter(|(of, _, _)| of == server).cloned().collect();
    for key in rest {
        let Some((now, ip)) = open.remove(&key) else { continue };
        let (_, port, client) = key;
        let Standing { mesh, why, blocks } = standing(mesh, &client, workloads, None, now);
        clients.push(StrictClient {
            client: client.to_string(),
            addr: ip,
            port,
            mesh: mesh.to_owned(),
            why,
            blocks,
            count: now,
            refused: 0,
            open: now,
            first_at_ms: clock.1,
            last_at_ms: clock.1,
        });
    }
    (clients, plaintext)
}

/// Who was refused by STRICT already.
fn refused_client(
    mesh: &Mesh<'_>,
    of: &Refusal,
    seen: &Seen<Circumstances>,
    workloads: &HashMap<ObjectRef, Vec<&Arc<Workload>>>,
    by_pod: &HashMap<&ObjectRef, &ObjectRef>,
    clock: (Instant, u64),
) -> Option<StrictClient> {
    let ip = of.source.ip?;
    let client = match &of.source.pod {
        Some(pod) => Caller::Workload(by_pod.get(pod).map_or_else(|| pod.clone(), |name| (*name).clone())),
        None => Caller::Address(ip),
    };
    let Standing { mesh, why, .. } = standing(mesh, &client, workloads, None, 0);
    Some(StrictClient {
        client: client.to_string(),
        addr: ip,
        port: of.port,
        mesh: mesh.to_owned(),
        why: format!("refused by STRICT: {why}"),
        // It is refused already.
        blocks: false,
        count: 0,
        refused: seen.times,
        open: 0,
        first_at_ms: wall(seen.first, clock),
        last_at_ms: wall(seen.last, clock),
    })
}

/// What is to be said of a client.
struct Standing {
    mesh: &'static str,
    why: String,
    blocks: bool,
}

/// `came` says whether the client was in the mesh when it came, and whether its connection was older than the server's
/// enrolment, where that is known; `open` how many connections are open.
fn standing(
    mesh: &Mesh<'_>,
    client: &Caller,
    workloads: &HashMap<ObjectRef, Vec<&Arc<Workload>>>,
    came: Option<(bool, bool)>,
    open: u64,
) -> Standing {
    let name = match client {
        Caller::Workload(name) => name,
        Caller::Address(ip) => {
            let node = mesh.view.cluster.nodes.iter().find(|(_, node)| node.addresses.contains(ip));
            let why = match node {
                Some((node, _)) => {
                    format!(
                        "the address is {node}'s: a hostNetwork pod, or a process of the node, which has no identity"
                    )
                }
                None => "no pod has the address: it has no identity".to_owned(),
            };
            return Standing { mesh: "unknown", why, blocks: true };
        }
    };
    let pods = workloads.get(name).map_or(&[][..], Vec::as_slice);
    let out = pods.iter().find(|pod| !pod.enrollment.enrolled);
    let inside = pods.iter().any(|pod| pod.enrollment.enrolled);
    let state = match (pods.is_empty(), out, inside) {
        (true, _, _) => "gone",
        (false, None, _) => "in",
        (false, Some(_), false) => "out",
        (false, Some(_), true) => "partly",
    };
    let (why, blocks) = match (out, state, came) {
        (Some(out), _, _) => (format!("not in the mesh: {}", out.enrollment.reason), true),
        (None, "gone", _) => ("there is no such workload any more".to_owned(), false),
        (None, _, Some((_, true))) => ("its connection is older than the server's enrolment".to_owned(), false),
        (None, _, Some((true, false))) => {
            ("in the mesh, and came past it: culvert capture proof on its node".to_owned(), true)
        }
        (None, _, Some((false, false)) | None) => ("it came before it was in the mesh".to_owned(), false),
    };
    match (open, blocks) {
        (1.., false) => {
            Standing { mesh: state, why: format!("{why}; {open} connections are still open"), blocks: true }
        }
        _ => Standing { mesh: state, why, blocks },
    }
}

// ---- Manifests.

/// What would make STRICT what is ready; and by `namespace/workload`, why there is none.
fn manifests(mesh: &Mesh<'_>, groups: &BTreeMap<ObjectRef, Group<'_>>) -> (Vec<StrictManifest>, Vec<(String, String)>) {
    let (mut manifests, mut problems) = (Vec::new(), Vec::new());
    let namespaces: BTreeSet<&Arc<str>> =
        groups.iter().filter(|(_, group)| group.state == Readiness::Ready).map(|(name, _)| &name.namespace).collect();
    for namespace in namespaces {
        let of = Namespace::of(mesh, namespace, groups);
        let ready: Vec<&ObjectRef> =
            of.groups.iter().filter(|(_, group)| group.state == Readiness::Ready).map(|(n, _)| *n).collect();
        if *namespace == mesh.snapshot.mesh.root_namespace {
            let why =
                "PeerAuthentications of the root namespace are for the whole mesh: none is proposed [PA.1], [PA.4]";
            problems.extend(ready.iter().map(|name| (name.to_string(), why.to_owned())));
            continue;
        }
        if let Some(manifest) = of.whole(mesh, &ready) {
            manifests.push(manifest);
            continue;
        }
        for name in ready {
            if manifests.iter().any(|known: &StrictManifest| known.workloads.contains(&name.to_string())) {
                continue;
            }
            match of.one(mesh, name) {
                Ok(manifest) => manifests.push(manifest),
                Err(why) => problems.push((name.to_string(), why)),
            }
        }
    }
    if let Err(why) = prove(mesh, groups, &manifests) {
        for manifest in std::mem::take(&mut manifests) {
            problems.extend(manifest.workloads.into_iter().map(|name| (name, why.clone())));
        }
    }
    (manifests, problems)
}

/// The pods of the mesh in one namespace, on all nodes.
struct Namespace<'a> {
    name: &'a Arc<str>,
    pods: Vec<&'a Arc<Workload>>,
    groups: Vec<(&'a ObjectRef, &'a Group<'a>)>,
}

impl<'a> Namespace<'a> {
    fn of(mesh: &Mesh<'a>, name: &'a Arc<str>, groups: &'a BTreeMap<ObjectRef, Group<'a>>) -> Self {
        let pods = mesh.snapshot.workloads.values();
        Self {
            name,
            pods: pods
                .filter(|pod| pod.object.namespace == *name && pod.enrollment.enrolled && !pod.ips.is_empty())
                .collect(),
            groups: groups.iter().filter(|(of, _)| of.namespace == *name).collect(),
        }
    }

    /// Whether STRICT may be put on a pod: its workload has been seen here, and nothing speaks against it.
    fn is_good(&self, pod: &Workload) -> bool {
        let name = history::workload(pod);
        self.groups.iter().any(|(of, group)| **of == name && group.state.is_good())
    }

    /// For the whole namespace: where every pod of it is here, and none has a PeerAuthentication of its own.
    fn whole(&self, mesh: &Mesh<'_>, ready: &[&ObjectRef]) -> Option<StrictManifest> {
        let fits =
            |pod: &&Arc<Workload>| *pod.node == *mesh.node && self.is_good(pod) && selecting(mesh, pod).is_none();
        if !self.pods.iter().all(fits) {
            return None;
        }
        let all = mesh.view.cluster.peer_authentications.values();
        let wide = all.filter(|policy| {
            let ours = policy.revision.as_deref().is_none_or(|revision| revision == mesh.options.revision);
            policy.age.namespace == *self.name && policy.selector.is_empty() && ours
        });
        let before = wide.min_by(|a, b| a.age.cmp(&b.age)).map(|policy| &**policy);
        let name = before.map_or_else(|| self.fresh(mesh, "default"), |policy| policy.age.name.to_string());
        let workloads = ready.iter().map(ToString::to_string).collect();
        Some(manifest(self.name, &name, &Labels::new(), before, workloads, Vec::new()))
    }

    /// For one workload.
    fn one(&self, mesh: &Mesh<'_>, name: &ObjectRef) -> Result<StrictManifest, String> {
        let own: Vec<&&Arc<Workload>> = self.pods.iter().filter(|pod| history::workload(pod) == *name).collect();
        let policies: BTreeSet<Option<ObjectRef>> =
            own.iter().map(|pod| selecting(mesh, pod).map(PeerAuthentication::object)).collect();
        if policies.len() > 1 {
            return Err("its pods have different PeerAuthentications: give them one first".to_owned());
        }
        let elsewhere: BTreeSet<&str> =
            own.iter().filter(|pod| *pod.node != *mesh.node).map(|pod| &*pod.node).collect();
        let mut notes = Vec::new();
        if !elsewhere.is_empty() {
            let nodes: Vec<&str> = elsewhere.into_iter().collect();
            notes.push(format!("first ask on {} too, where other pods of {name} are", nodes.join(", ")));
        }
        if let Some(policy) = own.first().and_then(|pod| selecting(mesh, pod)) {
            let object = policy.object();
            let decided: Vec<&&Arc<Workload>> =
                self.pods.iter().filter(|pod| selecting(mesh, pod).is_some_and(|of| of.object() == object)).collect();
            if let Some(other) = decided.iter().find(|pod| !self.is_good(pod)) {
                let other = history::workload(other);
                return Err(format!("PeerAuthentication {object} is that of {other} too, of which STRICT is not sure"));
            }
            let workloads = self.ready_among(&decided);
            return Ok(manifest(self.name, &object.name, &policy.selector, Some(policy), workloads, notes));
        }
        let common =
            own.iter().skip(1).fold(own.first().map(|pod| stable(&pod.labels)).unwrap_or_default(), |all, pod| {
                all.into_iter().filter(|(name, value)| pod.labels.get(name) == Some(value)).collect()
            });
        let selects = |selector: &Labels, pod: &Workload| {
            selector.iter().all(|(name, value)| pod.labels.get(name) == Some(value))
        };
        for selector in [selector(&common), common.clone()] {
            let selected: Vec<&&Arc<Workload>> = self.pods.iter().filter(|pod| selects(&selector, pod)).collect();
            let fits = selected.iter().all(|pod| self.is_good(pod) && selecting(mesh, pod).is_none());
            if !selector.is_empty() && fits {
                let workloads = self.ready_among(&selected);
                let called = self.fresh(mesh, &name.name);
                return Ok(manifest(self.name, &called, &selector, None, workloads, notes));
            }
        }
        Err("no labels of its pods tell them from others: give them one, as in app=NAME".to_owned())
    }

    /// Ready workloads that have no other pods than these.
    fn ready_among(&self, pods: &[&&Arc<Workload>]) -> Vec<String> {
        let all_among = |name: &ObjectRef| {
            let mut own = self.pods.iter().filter(|pod| history::workload(pod) == *name);
            own.all(|pod| pods.iter().any(|among| among.uid == pod.uid))
        };
        let ready = self.groups.iter().filter(|(name, group)| group.state == Readiness::Ready && all_among(name));
        ready.map(|(name, _)| name.to_string()).collect()
    }

    /// A name that no PeerAuthentication of the namespace has.
    fn fresh(&self, mesh: &Mesh<'_>, wanted: &str) -> String {
        let taken = |name: &str| mesh.view.cluster.peer_authentications.contains_key(&ObjectRef::new(self.name, name));
        let others = (1..)
            .map(|number| if number == 1 { format!("{wanted}-strict") } else { format!("{wanted}-strict-{number}") });
        std::iter::once(wanted.to_owned()).chain(others).find(|name| !taken(name)).unwrap_or_default()
    }
}

fn manifest(
    namespace: &str,
    name: &str,
    selector: &Labels,
    before: Option<&PeerAuthentication>,
    workloads: Vec<String>,
    mut notes: Vec<String>,
) -> StrictManifest {
    let mut metadata = json!({"name": name, "namespace": namespace});
    let mut spec = json!({"mtls": {"mode": "STRICT"}});
    if !selector.is_empty() {
        spec["selector"] = json!({"matchLabels": selector});
    }
    if let Some(before) = before {
        if let Some(revision) = &before.revision {
            metadata["labels"] = json!({"istio.io/rev": revision});
        }
        notes.push(format!("takes the place of PeerAuthentication {}", before.object()));
    }
    StrictManifest {
        namespace: namespace.to_owned(),
        name: name.to_owned(),
        workloads,
        replaces: before.is_some(),
        notes,
        manifest: json!({
            "apiVersion": "security.istio.io/v1", "kind": "PeerAuthentication", "metadata": metadata, "spec": spec,
        }),
    }
}

/// That the manifests do what they should, and nothing else: compiled as the agent would compile them.
fn prove(mesh: &Mesh<'_>, groups: &BTreeMap<ObjectRef, Group<'_>>, manifests: &[StrictManifest]) -> Result<(), String> {
    if manifests.is_empty() {
        return Ok(());
    }
    let mut cluster = (*mesh.view.cluster).clone();
    for of in manifests {
        let object = ObjectRef::new(&of.namespace, &of.name);
        let matched: Labels = of.manifest["spec"]["selector"]["matchLabels"]
            .as_object()
            .into_iter()
            .flatten()
            .filter_map(|(name, value)| Some((name.clone(), value.as_str()?.to_owned())))
            .collect();
        let before = cluster.peer_authentications.get(&object);
        let policy = PeerAuthentication {
            // A new one is the youngest.
            age: before.map_or_else(
                || Age { created: i64::MAX, name: object.name.clone(), namespace: object.namespace.clone() },
                |before| before.age.clone(),
            ),
            selector: matched,
            selector_written_empty: false,
            mode: MtlsMode::Strict,
            port_modes: BTreeMap::new(),
            revision: before.and_then(|before| before.revision.clone()),
        };
        cluster.peer_authentications.insert(object, Arc::new(policy));
    }
    let next: Snapshot = policy::compile(&cluster, mesh.options, None);
    let modes = |pod: &Workload| {
        let ports: BTreeMap<u16, Mode> = pod.peer_auth.ports.iter().map(|(port, (mode, _))| (*port, *mode)).collect();
        (pod.peer_auth.mode, ports)
    };
    for (uid, pod) in &mesh.snapshot.workloads {
        let Some(then) = next.workload(uid) else { continue };
        let name = history::workload(pod);
        let state = groups.get(&name).map(|group| group.state);
        let promised = manifests.iter().any(|of| of.workloads.contains(&name.to_string()));
        let wrong = match state {
            Some(Readiness::Ready) if promised && groups[&name].pods.iter().any(|own| own.uid == *uid) => {
                !is_strict(then)
            }
            Some(state) if state.is_good() => false,
            _ => pod.enrollment.enrolled && modes(then) != modes(pod),
        };
        if wrong {
            return Err(format!("the manifests would not do what they should to {}: none is shown", pod.object));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
