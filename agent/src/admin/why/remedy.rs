//! What would allow a connection that was refused, in one line each: the label, the policy, the rule.
//!
//! Who asks "and if it came by a tunnel?" is answered by `policy::decide`, as everybody is.

use std::net::{IpAddr, SocketAddr};

use crate::{
    model::{Labels, ObjectRef, PeerAuthentication, SpiffeId, authorization::Action},
    policy::{self, Client, Connection, DATAPLANE_MODE, Verdict, Workload},
    telemetry::history::Rule,
};

use super::Mesh;

/// A refusal, as far as it is known.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Case<'a> {
    /// Its word.
    pub(super) reason: &'a str,
    /// What was said of it.
    pub(super) detail: &'a str,
    /// The rule that refused.
    pub(super) rule: Option<&'a Rule>,
    /// The client's pod.
    pub(super) client: Option<&'a Workload>,
    /// Its address.
    pub(super) client_ip: Option<IpAddr>,
    /// Its identity, where it came by a tunnel.
    pub(super) identity: Option<&'a SpiffeId>,
    /// The server's pod.
    pub(super) server: Option<&'a Workload>,
    /// Where the connection went.
    pub(super) target: Option<SocketAddr>,
    /// The Service that was asked for.
    pub(super) service: Option<&'a ObjectRef>,
}

/// What would allow it; each line by itself, the better way first.
pub(super) fn remedies(mesh: &Mesh<'_>, case: &Case<'_>) -> Vec<String> {
    let known = match (case.reason, case.server) {
        ("strict-requires-mtls", Some(server)) => strict(mesh, case, server),
        ("no-allow-match", Some(server)) => not_allowed(mesh, case, server),
        ("explicit-deny", server) => denied(mesh, case, server),
        ("untrusted-trust-domain", _) => case.identity.map_or_else(Vec::new, |identity| {
            let domain = identity.trust_domain.as_str();
            vec![format!("add {domain:?} to trustDomainAliases of the mesh configuration, if its identities are ours")]
        }),
        ("no-such-service-port", _) => service_ports(mesh, case),
        ("enrolment-pending", Some(server)) if !case.detail.is_empty() => {
            vec![format!("{}: {}", server.object, case.detail)]
        }
        (_, _) if limit(case.reason) && !case.detail.is_empty() => {
            vec![format!("close connections that are not needed, or raise it: {}", case.detail)]
        }
        ("refused-by-peer", Some(server)) if !server.node.is_empty() => {
            vec![format!("{}: ask the agent of {}, which refused, with culvert why there", case.detail, server.node)]
        }
        _ => Vec::new(),
    };
    match known.is_empty() {
        true => vec![general(case.reason).to_owned()],
        false => known,
    }
}

fn limit(reason: &str) -> bool {
    ["connection-limit", "memory-limit", "handshake-limit", "open-files-limit"].contains(&reason)
}

/// What helps against a reason, whatever the case.
pub(super) fn general(reason: &str) -> &'static str {
    match reason {
        "strict-requires-mtls" => {
            "bring the client into the mesh, or except the port in the server's PeerAuthentication"
        }
        "no-allow-match" => "add the client to an ALLOW policy that selects the server",
        "explicit-deny" => "narrow the DENY rule: no ALLOW policy goes before it",
        "untrusted-trust-domain" => "add the client's trust domain to trustDomainAliases of the mesh configuration",
        "policy-missing" => {
            "nothing, once the policy has arrived that is referred to; until then the agent's log names it"
        }
        "loop" => "connect to the application's port: 15001, 15006 and 15008 are the mesh's own",
        "pod-unknown" => {
            "wait until the agent knows the pod; its log names pods that it holds and says why (--gate=open lets them pass)"
        }
        "enrolment-pending" => "wait until the pod is in the mesh; culvert workloads -o wide says what keeps it out",
        "agent-silent" => "nothing, once the agent moves again; its log of that moment says why it did not",
        "no-listener" => "nothing, once an agent serves the pod; the agent's log of that moment says why none did",
        "unknown-address" => "let the pod's status.podIPs have the address: the manifests do not say whose it is",
        "kernel-capacity" => "give the kernel room: culvert_kernel_map_entries says which of its maps is full",
        "no-address-of-family" => "connect by the other family of addresses: the client's pod has none of this one",
        "not-captured" => {
            "connect by an ordinary TCP socket of a process in the pod: what raw and packet sockets send does not pass"
        }
        "foreign-source" => "send from an address of the pod",
        "hidden-header" => "send TCP without fragments, extension headers or tags, which hide what it is",
        "protocol" => "use TCP, UDP or ICMP: nothing else leaves a pod of the mesh",
        "udp-refused" => "label the pod culvert.io/udp=allow, or let --udp be allow",
        "no-such-service-port" => "connect to a port that the Service has",
        "no-endpoint" => "let a pod that the Service selects be ready: culvert services shows how many there are",
        "ambiguous-address" => "remove one of the two that claim the address; the agent's log names them",
        "not-in-registry" => {
            "make it a Service, or set outboundTrafficPolicy.mode of the mesh configuration to ALLOW_ANY"
        }
        "identity-error" => {
            "get the pod a certificate: culvert certificates -o wide says why it has none that is valid"
        }
        "identity-address-mismatch" => {
            "let the address's pod have the identity that was proved, or let --identity-mismatch be allow"
        }
        "tls-failure" => {
            "let both sides have certificates of the same roots (culvert certificates shows them), and the server the \
             identity of its pod"
        }
        "h2-handshake-failure" => "let what answers on port 15008 speak HBONE",
        "network-policy" => "let the NetworkPolicies of both pods admit port 15008",
        "connect" => "let something listen there: the application, or the server's agent on port 15008, did not accept",
        "refused-by-peer" => "ask the agent of the server's node, which refused, with culvert why there",
        "unknown-workload" => "let the manifests have the pod",
        "agent-port" => "connect to the application's port: this one is the agent's own",
        reason if limit(reason) => "close connections that are not needed, or raise the limit",
        _ => "docs/maps.md says what the reason means",
    }
}

/// How a pod comes into the mesh, by the row of the table that keeps it out (specification §2).
pub(in crate::admin) fn enrol(pod: &Workload) -> String {
    let (object, namespace) = (&pod.object, &pod.object.namespace);
    let label = format!("{DATAPLANE_MODE}=ambient");
    match pod.enrollment.row {
        1 => format!(
            "{object} uses the node's network (hostNetwork) and has no identity of its own: give it one of its own"
        ),
        2 => format!("{object} has finished: start it again"),
        3 => format!("{object} is excluded by configuration ({}): take it off there", pod.enrollment.reason),
        4 => format!("{object} has a sidecar: remove it, and label the pod {label}"),
        5 => format!("label pod {object} {label} in place of none"),
        8 => format!("label namespace {namespace}, or pod {object}, {label} in place of none"),
        _ => format!("label namespace {namespace}, or pod {object}, {label}"),
    }
}

/// The labels that are best taken to select a pod and those like it.
pub(in crate::admin) fn selector(labels: &Labels) -> Labels {
    let one = ["app.kubernetes.io/name", "app"].into_iter().find_map(|name| labels.get_key_value(name));
    match one {
        Some((name, value)) => [(name.clone(), value.clone())].into(),
        None => stable(labels),
    }
}

/// Labels without those that change with each version of a workload, and those that speak to the mesh.
pub(in crate::admin) fn stable(labels: &Labels) -> Labels {
    const PASSING: [&str; 6] = [
        "pod-template-hash",
        "controller-revision-hash",
        "pod-template-generation",
        "statefulset.kubernetes.io/pod-name",
        "batch.kubernetes.io/controller-uid",
        "controller-uid",
    ];
    let stays = |name: &str| !PASSING.contains(&name) && !name.contains("istio.io/") && name != "culvert.io/udp";
    labels.iter().filter(|(name, _)| stays(name)).map(|(name, value)| (name.clone(), value.clone())).collect()
}

fn braces(labels: &Labels) -> String {
    let pairs: Vec<String> = labels.iter().map(|(name, value)| format!("{name}: {value:?}")).collect();
    format!("{{{}}}", pairs.join(", "))
}

/// What policy would say of the client if it came by a tunnel.
fn by_tunnel(mesh: &Mesh<'_>, case: &Case<'_>, client: &Workload, server: &Workload) -> Verdict {
    let connection = Connection {
        server: server.server(),
        client: Client::Tunnel(&client.identity),
        source_ip: case.client_ip,
        destination_ip: case.target.map(|target| target.ip()),
        port: case.target.map_or(0, |target| target.port()),
    };
    policy::decide(mesh.snapshot, &connection)
}

/// Bringing the client into the mesh, and what then would still be missing.
fn into_the_mesh(mesh: &Mesh<'_>, case: &Case<'_>, server: &Workload) -> Option<String> {
    let client = case.client?;
    if client.enrollment.enrolled {
        return Some(format!(
            "connect again: {} is in the mesh, and this connection came past it or is older ({})",
            client.object, "culvert capture proof on its node finds what is not the mesh's"
        ));
    }
    let verdict = by_tunnel(mesh, case, client, server);
    let then = match verdict.allowed {
        true => String::new(),
        false => {
            let rule = verdict.decided_by.as_ref().map(Rule::from);
            let (identity, rule) = (Some(&client.identity), rule.as_ref());
            let case = Case { reason: verdict.reason.as_str(), rule, identity, ..*case };
            // It has an identity then: no further way round through here.
            format!("; then {}", remedies(mesh, &case).join(", or "))
        }
    };
    Some(format!("bring the client into the mesh: {}{then}", enrol(client)))
}

fn strict(mesh: &Mesh<'_>, case: &Case<'_>, server: &Workload) -> Vec<String> {
    let mut lines: Vec<String> = into_the_mesh(mesh, case, server).into_iter().collect();
    if lines.is_empty() {
        lines.push(
            "let it come from a pod of the mesh: no pod has the client's address, so that it has no identity".into(),
        );
    }
    if let Some(port) = case.target.map(|target| target.port()) {
        lines.push(format!("or let plaintext reach the port: {}", exception(mesh, server, port)));
    }
    lines
}

/// The PeerAuthentication with a selector that counts for a pod ([PA.3]).
pub(in crate::admin) fn selecting<'a>(mesh: &Mesh<'a>, server: &Workload) -> Option<&'a PeerAuthentication> {
    let all = mesh.view.cluster.peer_authentications.values();
    let of = all.filter(|policy| {
        let selects = policy.selector.iter().all(|(name, value)| server.labels.get(name) == Some(value));
        let ours = policy.revision.as_deref().is_none_or(|revision| revision == mesh.options.revision);
        policy.age.namespace == server.object.namespace && !policy.selector.is_empty() && selects && ours
    });
    of.min_by(|a, b| a.age.cmp(&b.age)).map(|policy| &**policy)
}

/// Where a port is excepted from STRICT ([PA.3], [PA.7]): in the policy with a selector that counts, or in a new one.
fn exception(mesh: &Mesh<'_>, server: &Workload, port: u16) -> String {
    let except = format!("portLevelMtls: {{\"{port}\": {{mode: PERMISSIVE}}}}");
    let namespace = &server.object.namespace;
    if *namespace == mesh.snapshot.mesh.root_namespace {
        return format!("not in {namespace}, where a PeerAuthentication with a selector selects nothing [PA.4]");
    }
    match selecting(mesh, server) {
        Some(policy) => format!("{except} in PeerAuthentication {}", policy.object()),
        None => format!(
            "a PeerAuthentication in namespace {namespace} with selector: {{matchLabels: {}}} and {except}",
            braces(&selector(&server.labels))
        ),
    }
}

/// The ALLOW policy that is best extended: the one that selects the fewest pods, and of those the oldest.
fn allowing(mesh: &Mesh<'_>, server: &Workload) -> Option<ObjectRef> {
    let root = &mesh.snapshot.mesh.root_namespace;
    let enforced = server.authorization.policies().filter(|policy| policy.action == Action::Allow && !policy.dry_run);
    let wide = |policy: &&std::sync::Arc<crate::model::AuthorizationPolicy>| {
        (policy.selector.is_empty(), policy.age.namespace == *root, policy.age.clone())
    };
    enforced.min_by_key(wide).map(|policy| policy.object())
}

/// As a list of one in a manifest.
fn quoted(text: &str) -> String {
    format!("[{text:?}]")
}

fn not_allowed(mesh: &Mesh<'_>, case: &Case<'_>, server: &Workload) -> Vec<String> {
    let policy = allowing(mesh, server);
    let of =
        policy.map_or_else(|| "an ALLOW policy that selects it".to_owned(), |of| format!("AuthorizationPolicy {of}"));
    let to = case.target.map_or_else(String::new, |target| {
        format!(", to: [{{operation: {{ports: {}}}}}]", quoted(&target.port().to_string()))
    });
    let rule = |source: String| format!("add the rule {{from: [{{source: {{{source}}}}}]{to}}} to {of}");
    if let Some(identity) = case.identity {
        return vec![rule(format!("principals: {}", quoted(&identity.principal())))];
    }
    let mut lines: Vec<String> = into_the_mesh(mesh, case, server).into_iter().collect();
    if let Some(ip) = case.client_ip {
        let or = if lines.is_empty() { "" } else { "or " };
        lines.push(format!("{or}{}", rule(format!("ipBlocks: {}", quoted(&ip.to_string())))));
    }
    lines
}

fn denied(mesh: &Mesh<'_>, case: &Case<'_>, server: Option<&Workload>) -> Vec<String> {
    let Some(rule @ Rule { rule: Some(number), object, .. }) = case.rule else { return Vec::new() };
    let written = mesh.view.cluster.authorization_policies.get(object).and_then(|policy| policy.rules.get(*number));
    let except = match (case.identity, case.client_ip) {
        (Some(identity), _) => format!("notPrincipals: {}", quoted(&identity.principal())),
        (None, Some(ip)) => format!("notIpBlocks: {}", quoted(&ip.to_string())),
        (None, None) => return Vec::new(),
    };
    let place = match written.map(|rule| rule.from.is_some()) {
        Some(false) => format!("give it from: [{{source: {{{except}}}}}]"),
        Some(true) | None => format!("add {except} to each source of its from"),
    };
    let mut lines = Vec::new();
    // Where plaintext as such is denied, an identity helps.
    if let (None, Some(server), Some(client)) = (case.identity, server, case.client)
        && (client.enrollment.enrolled || by_tunnel(mesh, case, client, server).allowed)
    {
        lines.extend(into_the_mesh(mesh, case, server));
    }
    let or = if lines.is_empty() { "" } else { "or " };
    lines.push(format!("{or}let {rule} not match the client: {place}"));
    lines
}

fn service_ports(mesh: &Mesh<'_>, case: &Case<'_>) -> Vec<String> {
    let by_vip = case.target.and_then(|target| match mesh.snapshot.by_vip.get(&target.ip().to_canonical())? {
        policy::Occupant::One(service) => Some(service),
        policy::Occupant::Ambiguous => None,
    });
    let Some(service) = case.service.and_then(|name| mesh.snapshot.services.get(name)).or(by_vip) else {
        return Vec::new();
    };
    let ports: Vec<String> = service.ports.keys().map(ToString::to_string).collect();
    vec![format!("connect to a port that Service {} has: {}", service.object, ports.join(", "))]
}
