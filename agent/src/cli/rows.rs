//! From what an agent answers to rows: the columns that a user of `istioctl ztunnel-config` knows, and some more.

use std::collections::{BTreeMap, BTreeSet};

use culvert_common::Reason;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{
    reasons,
    sheet::{self, Column, Row, Sheet},
};
use crate::{
    admin::{
        dump::{CertificateFacts, Dump, VerdictDump, WorkloadDump},
        printable,
        strict::{Readiness, StrictClient, StrictDump, StrictWorkload},
        why::{EndDump, Explanation, PolicyDump, RefusalDump, RefusalsDump},
    },
    telemetry::open::{Proof, Stray},
};

/// Which rows are wanted.
#[derive(Clone, Debug, Default)]
pub(super) struct Filter {
    /// Only of this namespace.
    pub(super) namespace: Option<String>,
    /// Only what concerns this pod: `NAME` or `NAMESPACE/NAME`.
    pub(super) pod: Option<String>,
}

impl Filter {
    fn namespace(&self, namespace: &str) -> bool {
        self.namespace.as_deref().is_none_or(|wanted| wanted == namespace)
    }

    fn pod(&self, namespace: &str, name: &str) -> bool {
        let Some(wanted) = self.pod.as_deref() else { return true };
        match wanted.split_once('/') {
            Some(parts) => parts == (namespace, name),
            None => wanted == name,
        }
    }

    /// A pod written `namespace/name`.
    fn object(&self, object: &str) -> bool {
        object.split_once('/').is_some_and(|(namespace, name)| self.pod(namespace, name))
    }

    fn any_pod<'a>(&self, mut objects: impl Iterator<Item = &'a str>) -> bool {
        self.pod.is_none() || objects.any(|object| self.object(object))
    }
}

fn json(value: &impl Serialize) -> Value {
    // These types have no maps whose keys are not texts or numbers.
    serde_json::to_value(value).unwrap_or_default()
}

fn joined<T: ToString>(items: impl IntoIterator<Item = T>) -> String {
    items.into_iter().map(|item| item.to_string()).collect::<Vec<_>>().join(",")
}

const WORKLOADS: &[Column] = &[
    Column::new("NAMESPACE"),
    Column::new("POD NAME"),
    Column::new("ADDRESS"),
    Column::new("NODE"),
    Column::new("WAYPOINT"),
    Column::new("PROTOCOL"),
    Column::wide("STATE"),
    Column::wide("MODE"),
    Column::wide("POLICY"),
    Column::wide("IDENTITY"),
    Column::wide("ROW"),
    Column::wide("WHY"),
];

/// `culvert workloads`
pub(super) fn workloads(dump: &Dump, filter: &Filter) -> Sheet {
    let wanted = |of: &&WorkloadDump| filter.namespace(&of.namespace) && filter.pod(&of.namespace, &of.name);
    let row = |of: &WorkloadDump| {
        let auth = &of.peer_authentication;
        let ports = auth.ports.iter().map(|(port, of)| format!("{port}={}", of.mode));
        let local = of.local.as_ref();
        // Nobody enforces it for pods outside the mesh ([PA.11]).
        let enforced = of.enrolment.enrolled;
        let mode = if enforced { joined([auth.mode.clone()].into_iter().chain(ports)) } else { String::new() };
        Row {
            key: of.uid.clone(),
            cells: vec![
                of.namespace.clone(),
                of.name.clone(),
                joined(&of.addresses),
                of.node.clone(),
                of.waypoint.clone().unwrap_or_else(|| "None".to_owned()),
                of.protocol.clone(),
                local.map(|local| local.state.as_str().to_owned()).unwrap_or_default(),
                mode,
                auth.policy.clone().filter(|_| enforced).unwrap_or_default(),
                of.identity.clone(),
                of.enrolment.row.to_string(),
                local.and_then(|local| local.detail.clone()).unwrap_or_else(|| of.enrolment.reason.clone()),
            ],
            object: json(of),
        }
    };
    Sheet { columns: WORKLOADS, rows: dump.workloads.iter().filter(wanted).map(row).collect() }
}

const STRAYS: &[Column] = &[
    Column::new("NAMESPACE"),
    Column::new("POD NAME"),
    Column::new("LOCAL"),
    Column::new("REMOTE"),
    Column::new("PID"),
    Column::new("PROCESS"),
];

/// `culvert capture proof`
pub(super) fn strays(proof: &Proof, filter: &Filter) -> Sheet {
    let wanted = |of: &&Stray| filter.namespace(&of.namespace) && filter.pod(&of.namespace, &of.pod);
    let row = |of: &Stray| Row {
        key: of.socket.to_string(),
        cells: vec![
            of.namespace.clone(),
            of.pod.clone(),
            of.local.to_string(),
            of.remote.to_string(),
            of.pid.to_string(),
            of.process.clone(),
        ],
        object: json(of),
    };
    Sheet { columns: STRAYS, rows: proof.strays.iter().filter(wanted).map(row).collect() }
}

const SERVICES: &[Column] = &[
    Column::new("NAMESPACE"),
    Column::new("SERVICE NAME"),
    Column::new("SERVICE VIP"),
    Column::new("WAYPOINT"),
    Column::new("ENDPOINTS"),
    Column::wide("PORTS"),
    Column::wide("AFFINITY"),
    Column::wide("INTERNAL TRAFFIC"),
    Column::wide("PODS"),
];

/// `culvert services`
pub(super) fn services(dump: &Dump, filter: &Filter) -> Sheet {
    let mut rows = Vec::new();
    for of in dump.services.iter().filter(|of| filter.namespace(&of.namespace)) {
        let pods: BTreeSet<&str> = of.ports.values().flatten().filter_map(|endpoint| endpoint.pod.as_deref()).collect();
        if !filter.any_pod(pods.iter().copied()) {
            continue;
        }
        rows.push(Row {
            key: format!("{}/{}", of.namespace, of.name),
            cells: vec![
                of.namespace.clone(),
                of.name.clone(),
                joined(&of.addresses),
                of.waypoint.clone().unwrap_or_else(|| "None".to_owned()),
                format!("{}/{}", of.endpoints_eligible, of.endpoints_total),
                joined(of.ports.keys()),
                of.session_affinity.clone(),
                of.internal_traffic_policy.clone(),
                joined(pods),
            ],
            object: json(of),
        });
    }
    Sheet { columns: SERVICES, rows }
}

const POLICIES: &[Column] = &[
    Column::new("NAMESPACE"),
    Column::new("POLICY NAME"),
    Column::new("ACTION"),
    Column::new("SCOPE"),
    Column::new("PODS"),
    Column::wide("KIND"),
    Column::wide("PORTS"),
    Column::wide("SELECTOR"),
    Column::wide("PLACE"),
    Column::wide("WARNINGS"),
];

/// `culvert policies`
pub(super) fn policies(dump: &Dump, filter: &Filter) -> Sheet {
    let mut rows = Vec::new();
    for of in dump.policies.iter().filter(|of| filter.namespace(&of.namespace)) {
        if !filter.any_pod(of.decides.iter().map(String::as_str)) {
            continue;
        }
        let stale = of.stale.then(|| "the file is invalid now; this is the version from before".to_owned());
        rows.push(Row {
            key: format!("{} {}/{}", of.kind, of.namespace, of.name),
            cells: vec![
                of.namespace.clone(),
                of.name.clone(),
                of.action.clone(),
                of.scope.clone(),
                of.decides.len().to_string(),
                of.kind.clone(),
                joined(of.ports.iter().map(|(port, mode)| format!("{port}={mode}"))),
                joined(of.selector.iter().map(|(key, value)| format!("{key}={value}"))),
                of.place.clone().unwrap_or_default(),
                stale.into_iter().chain(of.warnings.iter().cloned()).collect::<Vec<_>>().join("; "),
            ],
            object: json(of),
        });
    }
    Sheet { columns: POLICIES, rows }
}

const CERTIFICATES: &[Column] = &[
    Column::new("CERTIFICATE NAME"),
    Column::new("TYPE"),
    Column::new("STATUS"),
    Column::new("VALID CERT"),
    Column::new("SERIAL NUMBER"),
    Column::new("NOT AFTER"),
    Column::new("NOT BEFORE"),
    Column::wide("RENEWS AT"),
    Column::wide("ISSUER"),
    Column::wide("LAST ERROR"),
];

/// `culvert certificates`
pub(super) fn certificates(dump: &Dump, filter: &Filter) -> Sheet {
    let of_pod: BTreeSet<&str> =
        dump.workloads.iter().filter(|of| filter.pod(&of.namespace, &of.name)).map(|of| of.identity.as_str()).collect();
    let mut rows = Vec::new();
    for of in &dump.certificates {
        let namespace = of.identity.split('/').nth(4).unwrap_or_default();
        if !filter.namespace(namespace) || filter.pod.is_some() && !of_pod.contains(of.identity.as_str()) {
            continue;
        }
        let cells = |kind: &str, facts: Option<&CertificateFacts>| {
            let field = |field: fn(&CertificateFacts) -> String| facts.map_or_else(|| "NA".to_owned(), field);
            vec![
                of.identity.clone(),
                kind.to_owned(),
                of.state.clone(),
                facts.is_some_and(|facts| facts.valid).to_string(),
                field(|facts| facts.serial.clone()),
                field(|facts| facts.not_after.clone()),
                field(|facts| facts.not_before.clone()),
                of.renews_at.clone().unwrap_or_default(),
                facts.map(|facts| facts.issuer.clone()).unwrap_or_default(),
                of.last_error.clone().unwrap_or_default(),
            ]
        };
        let leaf = of.chain.first();
        rows.push(Row { key: of.identity.clone(), cells: cells("Leaf", leaf), object: json(of) });
        for (number, facts) in of.chain.iter().enumerate().skip(1) {
            // The object is shown with the leaf; the chain is in it.
            let key = format!("{} {number}", of.identity);
            rows.push(Row { key, cells: cells("Intermediate", Some(facts)), object: Value::Null });
        }
    }
    if filter.namespace.is_none() && filter.pod.is_none() {
        for root in &dump.roots {
            rows.push(Row {
                key: format!("root {} {}", root.serial, root.subject),
                cells: vec![
                    root.subject.clone(),
                    "Root".to_owned(),
                    "Available".to_owned(),
                    root.valid.to_string(),
                    root.serial.clone(),
                    root.not_after.clone(),
                    root.not_before.clone(),
                    String::new(),
                    root.issuer.clone(),
                    String::new(),
                ],
                object: json(root),
            });
        }
    }
    Sheet { columns: CERTIFICATES, rows }
}

/// An open connection, as the agent tells it.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct Connection {
    id: u64,
    direction: String,
    carried: String,
    opened_at_ms: Option<u64>,
    source: End,
    destination: End,
    hbone_addr: Option<String>,
    service: Option<String>,
    received_bytes: u64,
    sent_bytes: u64,
    policy: String,
}

#[derive(Clone, Debug, Deserialize)]
struct End {
    addr: String,
    pod: Option<String>,
    namespace: Option<String>,
    identity: Option<String>,
}

impl End {
    /// `pod.namespace`, or the address without its port.
    fn name(&self) -> String {
        match (&self.pod, &self.namespace) {
            (Some(pod), Some(namespace)) => format!("{pod}.{namespace}"),
            _ => self.addr.rsplit_once(':').map_or(self.addr.as_str(), |(host, _)| host).to_owned(),
        }
    }

    /// An address of this end with the pod's name in place of the IP, unless `raw`.
    fn named(&self, addr: &str, raw: bool) -> String {
        match addr.rsplit_once(':') {
            Some((_, port)) if !raw => format!("{}:{port}", self.name()),
            _ => addr.to_owned(),
        }
    }

    fn is_pod(&self, filter: &Filter) -> bool {
        let (namespace, pod) = (self.namespace.as_deref().unwrap_or_default(), self.pod.as_deref().unwrap_or_default());
        filter.namespace(namespace) && filter.pod(namespace, pod)
    }
}

const CONNECTIONS: &[Column] = &[
    Column::new("WORKLOAD"),
    Column::new("DIRECTION"),
    Column::new("LOCAL"),
    Column::new("REMOTE"),
    Column::new("REMOTE TARGET"),
    Column::new("PROTOCOL"),
    Column::new("SENT"),
    Column::new("RECEIVED"),
    Column::volatile("AGE"),
    Column::wide("SERVICE"),
    Column::wide("CARRIED"),
    Column::wide("REMOTE IDENTITY"),
    Column::wide("POLICY"),
    Column::wide("ID"),
];

/// `culvert connections`. Sent and received are bytes of the workload in the first column.
///
/// # Errors
/// A record is not one of this version.
pub(super) fn connections(
    records: &[Value],
    filter: &Filter,
    direction: Option<&str>,
    raw: bool,
    now_ms: u64,
) -> serde_json::Result<Sheet> {
    let mut rows = Vec::new();
    for record in records {
        let of = Connection::deserialize(record)?;
        let outbound = of.direction == "outbound";
        let (local, remote) = if outbound { (&of.source, &of.destination) } else { (&of.destination, &of.source) };
        if direction.is_some_and(|wanted| wanted != of.direction) || !local.is_pod(filter) {
            continue;
        }
        // What the application listens on, or what the client asked for.
        let target = of.hbone_addr.as_deref().unwrap_or(&of.destination.addr);
        let (local_addr, remote_target) = match outbound {
            true => (of.source.addr.as_str(), of.destination.named(target, raw)),
            false => (target, String::new()),
        };
        let (sent, received) =
            if outbound { (of.received_bytes, of.sent_bytes) } else { (of.sent_bytes, of.received_bytes) };
        let cells = vec![
            local.name(),
            if outbound { "Outbound" } else { "Inbound" }.to_owned(),
            local.named(local_addr, raw),
            remote.named(&remote.addr, raw),
            remote_target,
            if of.carried == "tunnel" { "HBONE" } else { "TCP" }.to_owned(),
            sent.to_string(),
            received.to_string(),
            of.opened_at_ms.map(|at| age(now_ms.saturating_sub(at))).unwrap_or_default(),
            of.service.clone().unwrap_or_default(),
            of.carried.clone(),
            remote.identity.clone().unwrap_or_default(),
            of.policy.clone(),
            of.id.to_string(),
        ];
        rows.push(Row { key: of.id.to_string(), cells, object: record.clone() });
    }
    rows.sort_by(|a, b| (&a.cells[..5], &a.key).cmp(&(&b.cells[..5], &b.key)));
    Ok(Sheet { columns: CONNECTIONS, rows })
}

/// `Kind namespace/name#rule`
fn policy(of: &PolicyDump) -> String {
    let rule = of.rule.map(|rule| format!("#{rule}")).unwrap_or_default();
    format!("{} {}/{}{rule}", of.kind, of.namespace, of.name)
}

/// The same, and where it is written.
fn policy_at(of: &PolicyDump) -> String {
    let place = of.place.as_deref().map(|place| format!(" ({place})")).unwrap_or_default();
    format!("{}{place}", policy(of))
}

impl EndDump {
    /// `pod.namespace`, or its address.
    fn name(&self) -> String {
        match (&self.pod, &self.namespace, self.addr) {
            (Some(pod), Some(namespace), _) => format!("{pod}.{namespace}"),
            (_, _, Some(addr)) => addr.to_string(),
            _ => "unknown".to_owned(),
        }
    }

    fn is_wanted(&self, filter: &Filter) -> bool {
        let (namespace, pod) = (self.namespace.as_deref().unwrap_or_default(), self.pod.as_deref().unwrap_or_default());
        filter.namespace(namespace) && filter.pod(namespace, pod)
    }

    /// For people: who, at which address, and how it stands with the mesh.
    fn described(&self, port: Option<u16>) -> String {
        let addr = self.addr.map(|addr| addr.to_string());
        let mut text = match (&self.namespace, &self.pod, addr) {
            (Some(namespace), Some(pod), Some(addr)) => format!("{namespace}/{pod} ({addr})"),
            (Some(namespace), Some(pod), None) => format!("{namespace}/{pod}"),
            (_, _, Some(addr)) => addr,
            _ => "unknown".to_owned(),
        };
        if let Some(port) = port {
            text += &format!(", port {port}");
        }
        let node = self.node.as_deref().map(|node| format!(" on {node}")).unwrap_or_default();
        match (self.enrolled, &self.enrolment) {
            (Some(true), Some(why)) => text += &format!("{node}, in the mesh: {why}"),
            (Some(false), Some(why)) => text += &format!("{node}, not in the mesh: {why}"),
            _ => text += ", the address of no pod",
        }
        text
    }
}

const REFUSALS: &[Column] = &[
    Column::volatile("LAST"),
    Column::new("COUNT"),
    Column::new("SOURCE"),
    Column::new("DESTINATION"),
    Column::new("REASON"),
    Column::new("POLICY"),
    Column::new("TO ALLOW IT"),
    Column::wide("NOW"),
    Column::wide("SEEN FROM"),
    Column::wide("SOURCE ADDRESS"),
    Column::wide("DESTINATION ADDRESS"),
    Column::wide("SERVICE"),
    Column::wide("IDENTITY"),
    Column::wide("PLACE"),
    Column::wide("DETAIL"),
];

/// `culvert why`
pub(super) fn refusals(dump: &RefusalsDump, filter: &Filter, now_ms: u64) -> Sheet {
    let wanted = |of: &&RefusalDump| of.source.is_wanted(filter) || of.destination.is_wanted(filter);
    let row = |of: &RefusalDump| {
        let addr = |end: &EndDump| end.addr.map(|addr| addr.to_string()).unwrap_or_default();
        let rule = of.policy.as_ref().map(policy).unwrap_or_default();
        let port = if of.port == 0 { String::new() } else { format!(":{}", of.port) };
        let source = of.source.identity.as_deref().unwrap_or_default();
        Row {
            key: format!(
                "{} {} {} {} {} {port} {} {rule}",
                of.direction,
                of.source.name(),
                addr(&of.source),
                of.destination.name(),
                addr(&of.destination),
                of.reason
            ),
            cells: vec![
                age(now_ms.saturating_sub(of.last_at_ms)),
                of.count.to_string(),
                of.source.name(),
                format!("{}{port}", of.destination.name()),
                of.reason.clone(),
                rule,
                of.remedies.join("; "),
                of.now.clone().unwrap_or_default(),
                if of.direction == "outbound" { "client" } else { "server" }.to_owned(),
                addr(&of.source),
                addr(&of.destination),
                of.service.clone().unwrap_or_default(),
                source.to_owned(),
                of.policy.as_ref().and_then(|policy| policy.place.clone()).unwrap_or_default(),
                of.detail.clone(),
            ],
            object: json(of),
        }
    };
    Sheet { columns: REFUSALS, rows: dump.refusals.iter().filter(wanted).map(row).collect() }
}

/// What had no room among the refusals, one line each.
pub(super) fn evicted(dump: &RefusalsDump, now_ms: u64) -> Vec<String> {
    let of = &dump.evicted;
    let mut lines = Vec::new();
    if of.entries > 0 {
        let connections: Vec<String> =
            of.connections.iter().map(|(reason, times)| format!("{times} {reason}")).collect();
        let last = of.last_at_ms.map(|at| age(now_ms.saturating_sub(at))).unwrap_or_default();
        lines.push(format!(
            "only the {} most recent are kept: {} others had to go, of these connections: {}; the latest {last} ago",
            dump.capacity,
            of.entries,
            connections.join(", ")
        ));
    }
    lines
}

const EXPLANATIONS: &[Column] = &[
    Column::new("SOURCE"),
    Column::new("DESTINATION"),
    Column::new("CAPTURED"),
    Column::new("TRANSPORT"),
    Column::new("MODE"),
    Column::new("VERDICT"),
    Column::new("REASON"),
    Column::new("POLICY"),
    Column::new("TO ALLOW IT"),
];

/// `culvert why CLIENT SERVER`, one row for each server.
pub(super) fn explanations(all: &[Explanation]) -> Sheet {
    let row = |of: &Explanation| Row {
        key: format!("{} {} {}", of.source.name(), of.destination.name(), of.port),
        cells: vec![
            of.source.name(),
            format!("{}:{}", of.destination.name(), of.port),
            of.captured.to_string(),
            of.transport.clone(),
            of.peer_authentication.as_ref().map(|mode| mode.mode.clone()).unwrap_or_default(),
            of.decision.clone(),
            of.reason.clone(),
            of.policy.as_ref().map(policy).unwrap_or_default(),
            of.remedies.join("; "),
        ],
        object: json(of),
    };
    Sheet { columns: EXPLANATIONS, rows: all.iter().map(row).collect() }
}

/// `culvert why CLIENT SERVER`, for people.
pub(super) fn explained(of: &Explanation, now_ms: u64) -> String {
    let mut lines: Vec<(&str, String)> =
        vec![("From", of.source.described(None)), ("To", of.destination.described(Some(of.port)))];
    lines.extend(of.service.clone().map(|service| ("Service", service)));
    let captured = if of.captured { "captured by the agent" } else { "not captured" };
    lines.push((
        "Way",
        match of.transport.as_str() {
            "tunnel" => format!("{captured}, by a tunnel"),
            "plaintext" => format!("{captured}, in plaintext"),
            "same-pod" => "inside the pod".to_owned(),
            _ => format!("{captured}, and not carried"),
        },
    ));
    lines.extend(of.peer_authentication.as_ref().map(|mode| {
        let by = mode.policy.as_ref().map_or_else(|| "by default".to_owned(), |of| format!("set by {}", policy_at(of)));
        ("Mode", format!("{}, {by}", mode.mode))
    }));
    let by = of.refused_by.as_ref().map(|side| match side.as_str() {
        "balancing" => ", by the node's own load balancing".to_owned(),
        side => format!(", by the {side}'s side"),
    });
    lines.push(("Verdict", format!("{}, {}{}", of.decision, of.reason, by.unwrap_or_default())));
    lines.extend(of.policy.as_ref().map(|policy| ("Rule", policy_at(policy))));
    lines.push(("In words", of.detail.clone()));
    lines.extend(of.dry_run.as_ref().map(|text| ("Dry run", text.clone())));
    lines.extend(of.audit.as_ref().map(|text| ("Audit", text.clone())));
    lines.extend(of.warnings.iter().map(|text| ("Warning", text.clone())));
    lines.extend(of.remedies.iter().map(|text| ("To allow it", text.clone())));
    if let Some(at) = of.refused_at_ms {
        let ago = age(now_ms.saturating_sub(at));
        lines.push(("Last hour", format!("refused {} times as seen from this node, the last {ago} ago", of.refused)));
    }
    lines.iter().map(|(name, text)| format!("{:13}{}\n", format!("{name}:"), printable(text))).collect()
}

const VERDICTS: &[Column] = &[
    Column::new("NAMESPACE"),
    Column::new("POD NAME"),
    Column::new("DIRECTION"),
    Column::new("VERDICT"),
    Column::new("REASON"),
    Column::new("POLICY"),
    Column::new("COUNT"),
    Column::wide("MEANS"),
];

/// `culvert verdicts`: a row for each counter. A pod that the agent has not enrolled has the cookie of its network namespace
/// in place of a name, and no namespace.
pub(super) fn verdicts(dump: &Dump, filter: &Filter) -> Sheet {
    let row = |of: &VerdictDump| {
        let (namespace, pod) = of.pod.split_once('/').unwrap_or(("", of.pod.as_str()));
        if !filter.namespace(namespace) || !filter.pod(namespace, pod) {
            return None;
        }
        let rule = of.rule.clone().unwrap_or_default();
        let known = Reason::ALL.into_iter().find(|reason| reason.as_str() == of.reason);
        Some(Row {
            key: format!("{} {} {} {} {rule}", of.pod, of.direction, of.answer, of.reason),
            cells: vec![
                namespace.to_owned(),
                pod.to_owned(),
                of.direction.clone(),
                of.answer.clone(),
                of.reason.clone(),
                rule,
                of.count.to_string(),
                known.map(|reason| reasons::of_verdict(reason).means.to_owned()).unwrap_or_default(),
            ],
            object: json(of),
        })
    };
    let mut rows: Vec<Row> = dump.kernel.iter().flat_map(|kernel| &kernel.verdicts).filter_map(row).collect();
    rows.sort_by(|a, b| a.cells[..6].cmp(&b.cells[..6]));
    Sheet { columns: VERDICTS, rows }
}

const STRICT: &[Column] = &[
    Column::new("NAMESPACE"),
    Column::new("WORKLOAD"),
    Column::new("MODE"),
    Column::new("STATE"),
    Column::volatile("TUNNELLED"),
    Column::volatile("PLAINTEXT"),
    Column::new("CLIENT"),
    Column::new("PORT"),
    Column::volatile("COUNT"),
    Column::volatile("LAST SEEN"),
    Column::new("IN THE MESH"),
    Column::new("WHY"),
    Column::wide("BLOCKS"),
    Column::wide("OPEN"),
    Column::wide("ADDRESS"),
    Column::wide("MANIFEST"),
    Column::wide("NOTES"),
];

/// `culvert report strict`: a row for each client, and one for each workload without any.
pub(super) fn strict(dump: &StrictDump, filter: &Filter, now_ms: u64) -> Sheet {
    let mut rows = Vec::new();
    for of in dump.workloads.iter().filter(|of| filter.namespace(&of.namespace)) {
        let clients: Vec<Option<&StrictClient>> = match of.clients.is_empty() {
            true => vec![None],
            false => of.clients.iter().map(Some).collect(),
        };
        for (nth, client) in clients.into_iter().enumerate() {
            rows.push(strict_row(of, nth, client, now_ms));
        }
    }
    Sheet { columns: STRICT, rows }
}

fn strict_row(of: &StrictWorkload, nth: usize, client: Option<&StrictClient>, now_ms: u64) -> Row {
    let field = |field: fn(&StrictClient) -> String| client.map(field).unwrap_or_default();
    let why = match (client, of.state) {
        (Some(client), _) => client.why.clone(),
        // What is to be known has no row of its own.
        (None, Readiness::Strict) => String::new(),
        (None, Readiness::Ready | Readiness::Blocked | Readiness::Unsure) => of.notes.join("; "),
    };
    Row {
        key: format!("{}/{} {nth}", of.namespace, of.workload),
        cells: vec![
            of.namespace.clone(),
            of.workload.clone(),
            of.mode.clone(),
            of.state.as_str().to_owned(),
            of.tunnelled.to_string(),
            of.plaintext.to_string(),
            field(|client| client.client.clone()),
            field(|client| client.port.to_string()),
            field(|client| (client.count + client.refused).to_string()),
            client.map(|client| age(now_ms.saturating_sub(client.last_at_ms))).unwrap_or_default(),
            field(|client| client.mesh.clone()),
            why,
            field(|client| client.blocks.to_string()),
            field(|client| client.open.to_string()),
            field(|client| client.addr.to_string()),
            of.manifest.clone().unwrap_or_default(),
            of.notes.join("; "),
        ],
        // The clients are in it.
        object: if nth == 0 { json(of) } else { Value::Null },
    }
}

/// The manifests that would make STRICT what is ready, as YAML.
pub(super) fn strict_manifests(dump: &StrictDump, filter: &Filter) -> String {
    let mut text = String::new();
    for of in dump.manifests.iter().filter(|of| filter.namespace(&of.namespace)) {
        text += "---\n";
        let about = std::iter::once(format!("of {}", of.workloads.join(", "))).chain(of.notes.iter().cloned());
        about.for_each(|line| text += &format!("# {}\n", printable(&line)));
        text += &sheet::yaml(&of.manifest);
    }
    text
}

/// As `kubectl` writes ages: the two largest units at most.
fn age(millis: u64) -> String {
    let seconds = millis / 1000;
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86400);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds}s"),
        (0, 0, 1..10) => format!("{minutes}m{}s", seconds % 60),
        (0, 0, _) => format!("{minutes}m"),
        (0, 1..10, _) => format!("{hours}h{}m", minutes % 60),
        (0, _, _) => format!("{hours}h"),
        (days, _, _) => format!("{days}d{}h", hours % 24),
    }
}

const METRICS: &[Column] = &[Column::new("METRIC"), Column::new("VALUE"), Column::new("LABELS")];

/// `culvert metrics`: samples in Prometheus' text format whose name contains one of `names`. In a table, labels that say
/// `unknown` are left out.
pub(super) fn metrics(text: &str, names: &[String], filter: &Filter, wide: bool) -> Sheet {
    let mut types: BTreeMap<&str, &str> = BTreeMap::new();
    let mut rows = Vec::new();
    for line in text.lines() {
        if let Some((name, kind)) = line.strip_prefix("# TYPE ").and_then(|rest| rest.split_once(' ')) {
            types.insert(name, kind);
        }
        let Some(Sample { name, labels, value }) = sample(line) else { continue };
        let of_namespace =
            |label: &(String, String)| label.0.ends_with("namespace") && Some(&label.1) == filter.namespace.as_ref();
        let wanted = names.is_empty() || names.iter().any(|part| name.contains(part.as_str()));
        if !wanted || filter.namespace.is_some() && !labels.iter().any(of_namespace) {
            continue;
        }
        let shown = labels.iter().filter(|(_, value)| wide || value != "unknown");
        let shown = shown.map(|(name, value)| format!("{name}={value:?}"));
        let family = ["_bucket", "_sum", "_count", "_total"].iter().find_map(|end| name.strip_suffix(end));
        let kind = types.get(name).or_else(|| types.get(family?)).copied().unwrap_or("untyped");
        let map: BTreeMap<&str, &str> = labels.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        let number = value.parse::<f64>().ok().filter(|number| number.is_finite());
        rows.push(Row {
            key: format!("{name} {labels:?}"),
            cells: vec![name.to_owned(), value.to_owned(), joined(shown)],
            object: serde_json::json!({
                "name": name, "type": kind, "labels": map,
                "value": number.map_or_else(|| Value::from(value), Value::from),
            }),
        });
    }
    rows.sort_by(|a, b| a.key.cmp(&b.key));
    Sheet { columns: METRICS, rows }
}

/// One line of Prometheus' text format.
struct Sample<'a> {
    name: &'a str,
    labels: Vec<(String, String)>,
    value: &'a str,
}

/// `None` for comments and for what is no sample.
fn sample(line: &str) -> Option<Sample<'_>> {
    if line.starts_with('#') {
        return None;
    }
    let end = line.find(['{', ' '])?;
    let (name, mut rest) = line.split_at(end);
    let mut labels = Vec::new();
    if let Some(inside) = rest.strip_prefix('{') {
        rest = inside;
        loop {
            rest = rest.trim_start_matches([',', ' ']);
            if let Some(after) = rest.strip_prefix('}') {
                rest = after;
                break;
            }
            let (label, quoted) = rest.split_once("=\"")?;
            let mut value = String::new();
            let mut chars = quoted.char_indices();
            let close = loop {
                match chars.next()? {
                    (at, '"') => break at,
                    (_, '\\') => match chars.next()?.1 {
                        'n' => value.push('\n'),
                        other => value.push(other),
                    },
                    (_, other) => value.push(other),
                }
            };
            labels.push((label.to_owned(), value));
            rest = quoted.get(close + 1..)?;
        }
    }
    let value = rest.split_whitespace().next()?;
    Some(Sample { name, labels, value })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{super::sheet::Format, *};

    #[test]
    fn samples_of_the_text_format_are_read() {
        let text = "# HELP a_total What.\n# TYPE a_total counter\na_total{x=\"1\",source_workload_namespace=\"test\"} 5\n\
                    a_total{x=\"q\\\"uo\\\\te\\n{,}\",y=\"unknown\"} 7 1700000000\nb 1.5e3\n# TYPE h histogram\nh_bucket{le=\"+Inf\"} 3\n\nno\n";
        let all = metrics(text, &[], &Filter::default(), false);
        assert_eq!(all.rows.len(), 4, "{all:?}");
        assert_eq!(all.rows[1].object["labels"]["x"], "q\"uo\\te\n{,}");
        assert_eq!(all.rows[1].object["value"], 7.0);
        assert!(!all.rows[1].cells[2].contains("unknown"));
        assert_eq!(all.rows[3].object["type"], "histogram");
        assert_eq!(metrics(text, &["a_".to_owned()], &Filter::default(), false).rows.len(), 2);
        let test = Filter { namespace: Some("test".to_owned()), pod: None };
        assert_eq!(metrics(text, &[], &test, false).rows.len(), 1);
    }

    fn record(direction: &str, id: u64) -> Value {
        json!({
            "id": id, "direction": direction, "reporter": "source", "carried": "tunnel", "opened_at_ms": 1000,
            "source": {"addr": "10.0.0.1:40000", "pod": "nginx", "workload": "nginx", "namespace": "test", "identity": null},
            "destination": {"addr": "10.0.1.1:15008", "pod": "web", "workload": "web", "namespace": "default", "identity": null},
            "hbone_addr": "10.0.1.1:9080", "service": "default/web", "received_bytes": 10, "sent_bytes": 20, "policy": "",
        })
    }

    #[test]
    fn connections_are_seen_from_the_pod_of_this_node() {
        let records = [record("outbound", 1), record("inbound", 2)];
        let sheet = |filter: &Filter, raw| connections(&records, filter, None, raw, 66_000).expect("records");
        let rows = sheet(&Filter::default(), false).rows;
        assert_eq!(
            rows[0].cells[..9],
            [
                "nginx.test",
                "Outbound",
                "nginx.test:40000",
                "web.default:15008",
                "web.default:9080",
                "HBONE",
                "10",
                "20",
                "1m5s"
            ]
        );
        assert_eq!(
            rows[1].cells[..9],
            ["web.default", "Inbound", "web.default:9080", "nginx.test:40000", "", "HBONE", "20", "10", "1m5s"]
        );
        let raw = sheet(&Filter { pod: Some("test/nginx".to_owned()), namespace: None }, true).rows;
        assert_eq!(raw.len(), 1);
        assert_eq!(raw[0].cells[2..5], ["10.0.0.1:40000", "10.0.1.1:15008", "10.0.1.1:9080"]);
        assert_eq!(
            connections(&records, &Filter::default(), Some("inbound"), false, 0).expect("records").rows.len(),
            1
        );
        assert!(sheet(&Filter::default(), false).show(Format::Wide).contains("default/web"));
    }

    #[test]
    fn ages_have_two_units_at_most() {
        for (seconds, text) in
            [(5, "5s"), (65, "1m5s"), (1200, "20m"), (3700, "1h1m"), (40_000, "11h"), (90_000, "1d1h")]
        {
            assert_eq!(age(seconds * 1000), text);
        }
    }
}
