//! A second evaluator, slow and plain, written from the specification's sentences over the manifests themselves: it
//! shares no line with the compiled one. Both are asked about random policies, pods and connections.

use std::net::{IpAddr, Ipv6Addr};

use serde_json::{Map, Value, json};

use super::*;

/// Triples of (policies, pod, connection) that are compared.
pub(super) fn triples() -> usize {
    if std::env::var_os("CULVERT_TEST_FULL").is_some() { 1_000_000 } else { 100_000 }
}

/// Connections that each set of policies is asked about.
const PER_SET: usize = 80;

/// The mesh of one set.
pub(super) struct Mesh {
    pub(super) trust_domain: &'static str,
    pub(super) aliases: Vec<&'static str>,
}

pub(super) struct Server {
    pub(super) uid: &'static str,
    namespace: &'static str,
    labels: &'static [(&'static str, &'static str)],
    /// IPv4, and IPv6.
    pub(super) ips: [&'static str; 2],
}

pub(super) const SERVERS: [Server; 4] = [
    Server { uid: "test.nginx", namespace: "test", labels: &[("app", "nginx")], ips: ["10.0.0.1", "fd00::1:1"] },
    Server {
        uid: "default.web",
        namespace: "default",
        labels: &[("app", "web"), ("tier", "x")],
        ips: ["10.0.0.2", "fd00::1:2"],
    },
    Server {
        uid: "istio-system.gateway",
        namespace: "istio-system",
        labels: &[("app", "gateway")],
        ips: ["10.0.0.3", "fd00::1:3"],
    },
    Server { uid: "outside.legacy", namespace: "outside", labels: &[("app", "nginx")], ips: ["10.0.0.4", "fd00::1:4"] },
];

pub(super) struct Ask {
    pub(super) server: &'static Server,
    /// Trust domain, namespace, service account.
    pub(super) client: Option<[&'static str; 3]>,
    pub(super) source: String,
    pub(super) port: u16,
}

impl Ask {
    /// Both ends of a connection are of one family.
    fn destination(&self) -> &'static str {
        let source: IpAddr = self.source.parse().expect("the generator makes addresses");
        self.server.ips[usize::from(source.to_canonical().is_ipv6())]
    }
}

/// One policy: metadata and spec, as in the manifest.
pub(super) struct Policy {
    namespace: &'static str,
    name: String,
    second: u32,
    revision: Option<&'static str>,
    dry_run: Option<&'static str>,
    spec: Value,
}

/// A PeerAuthentication, of its namespace or of one app in it; a scope has one at most.
pub(super) struct PeerAuth {
    namespace: &'static str,
    app: Option<&'static str>,
    mode: &'static str,
    ports: Vec<(u16, &'static str)>,
}

// ---- The evaluator.

/// Whether it may go on, why, and which rule decided.
pub(super) fn by_the_book(
    policies: &[Policy],
    peer_auths: &[PeerAuth],
    mesh: &Mesh,
    ask: &Ask,
) -> (bool, String, Option<String>) {
    // [AP.4]: policies protect enrolled servers only.
    if ask.server.namespace == "outside" {
        return (true, "server-not-enrolled".into(), None);
    }
    // [I.8]: our trust domain or an alias.
    if let Some([domain, ..]) = ask.client
        && domain != mesh.trust_domain
        && !mesh.aliases.contains(&domain)
    {
        return (false, "untrusted-trust-domain".into(), None);
    }
    // [K.2]
    if [15001, 15006, 15008].contains(&ask.port) {
        return (false, "loop".into(), None);
    }
    // §5.3
    if ask.client.is_none() && mode(peer_auths, ask) == "STRICT" {
        return (false, "strict-requires-mtls".into(), None);
    }
    let mut candidates: Vec<&Policy> = policies
        .iter()
        // [C.5]
        .filter(|policy| policy.revision.is_none_or(|revision| revision == "default"))
        // [AP.1]: the pod's namespace and the root namespace …
        .filter(|policy| policy.namespace == ask.server.namespace || policy.namespace == "istio-system")
        // … without targetRefs …
        .filter(|policy| policy.spec.get("targetRefs").is_none())
        // … whose selector matches the pod.
        .filter(|policy| {
            let selector = policy.spec.pointer("/selector/matchLabels").and_then(Value::as_object);
            selector.is_none_or(|all| {
                all.iter().all(|(key, value)| ask.server.labels.iter().any(|(k, v)| k == key && value == v))
            })
        })
        .collect();
    // [C.2]
    candidates.sort_by_key(|policy| (policy.second, policy.name.clone(), policy.namespace));
    let action = |policy: &Policy| policy.spec.get("action").and_then(Value::as_str).unwrap_or("ALLOW").to_owned();
    // [AP.6]: not enforced in dry-run.
    let enforced = |policy: &Policy| !policy.dry_run.is_some_and(|text| ["1", "t", "true"].contains(&text));
    let of = |wanted: &str| -> Vec<&Policy> {
        candidates.iter().copied().filter(|policy| action(policy) == wanted && enforced(policy)).collect()
    };
    let first = |all: &[&Policy], deny: bool| {
        for policy in all {
            let rules = policy.spec.get("rules").and_then(Value::as_array).cloned().unwrap_or_default();
            for (number, rule) in rules.iter().enumerate() {
                if rule_matches(rule, deny, policy.namespace, mesh, ask) {
                    return Some(format!("{}/{}#{number}", policy.namespace, policy.name));
                }
            }
        }
        None
    };
    // §6.2: 2, 3, 4, 5.
    if let Some(rule) = first(&of("DENY"), true) {
        return (false, "explicit-deny".into(), Some(rule));
    }
    let allow = of("ALLOW");
    if allow.is_empty() {
        return (true, "no-allow-policies".into(), None);
    }
    match first(&allow, false) {
        Some(rule) => (true, "allow-match".into(), Some(rule)),
        None => (false, "no-allow-match".into(), None),
    }
}

/// §5.1, §5.2
fn mode(all: &[PeerAuth], ask: &Ask) -> &'static str {
    let Server { namespace, labels, .. } = ask.server;
    let wide = |of: &str| all.iter().find(|one| one.app.is_none() && one.namespace == of);
    // [PA.3]: of the pod's own namespace; [PA.4]: and in the root namespace none with a selector counts.
    let selects =
        |one: &&PeerAuth| one.namespace == *namespace && one.app.is_some_and(|app| labels.contains(&("app", app)));
    let own = all.iter().filter(|one| one.namespace != "istio-system").find(selects);
    let mut mode = "PERMISSIVE";
    for one in [wide("istio-system"), wide(namespace), own].into_iter().flatten() {
        if one.mode != "UNSET" {
            mode = one.mode;
        }
    }
    // [PA.6], [PA.7]
    match own.and_then(|own| own.ports.iter().find(|(port, _)| *port == ask.port)) {
        Some((_, of_port)) if *of_port != "UNSET" => of_port,
        Some(_) | None => mode,
    }
}

/// [AP.8]; `deny`: what cannot be evaluated counts as matched ([AP.14]), and else the whole rule never matches ([AP.13]).
fn rule_matches(rule: &Value, deny: bool, namespace: &str, mesh: &Mesh, ask: &Ask) -> bool {
    let mut unknown = false;
    let mut item = |item: &Value| {
        let Some(fields) = item.as_object().filter(|fields| !fields.is_empty()) else {
            unknown = true;
            return true;
        };
        let mut all = true;
        for (name, values) in fields {
            match field(name, values, fields, namespace, mesh, ask) {
                Some(matched) => all &= matched,
                None => unknown = true,
            }
        }
        all
    };
    let mut any = |name: &str, inner: &str| match rule.get(name).and_then(Value::as_array) {
        None => true,
        Some(items) if items.is_empty() => item(&Value::Null),
        Some(items) => {
            // Every item is looked at, so that each one's unknown attributes are seen.
            let matched: Vec<bool> = items.iter().map(|one| item(one.get(inner).unwrap_or(&Value::Null))).collect();
            matched.contains(&true)
        }
    };
    let (from, to) = (any("from", "source"), any("to", "operation"));
    let mut when = true;
    for condition in rule.get("when").and_then(Value::as_array).into_iter().flatten() {
        let key = condition["key"].as_str().unwrap_or_default();
        let name = match key {
            "source.principal" => "principals",
            "source.namespace" => "namespaces",
            "source.serviceAccount" => "serviceAccounts",
            "source.trustDomain" => "trustDomains",
            "source.ip" => "ipBlocks",
            "destination.port" => "ports",
            "destination.ip" => "destinationIps",
            _ => "",
        };
        let (values, not) = (condition.get("values"), condition.get("notValues"));
        if values.is_none() && not.is_none() {
            unknown = true;
        }
        for (values, negative) in [(values, false), (not, true)] {
            let Some(values) = values else { continue };
            match list(name, values, namespace, mesh, ask) {
                Some(matched) => when &= matched != negative,
                None => unknown = true,
            }
        }
    }
    (deny || !unknown) && from && to && when
}

/// One field of a source or operation; `None` if it cannot be evaluated.
fn field(
    name: &str,
    values: &Value,
    beside: &Map<String, Value>,
    namespace: &str,
    mesh: &Mesh,
    ask: &Ask,
) -> Option<bool> {
    let (positive, negative) = match name.strip_prefix("not") {
        Some(rest) => (rest[..1].to_lowercase() + &rest[1..], true),
        None => (name.to_owned(), false),
    };
    // §6.6: not together with principals or namespaces.
    let others = ["principals", "notPrincipals", "namespaces", "notNamespaces"];
    if positive == "serviceAccounts" && others.iter().any(|other| beside.contains_key(*other)) {
        return None;
    }
    list(&positive, values, namespace, mesh, ask).map(|matched| matched != negative)
}

/// Whether any value of the list matches; `None` if the attribute, or a value, cannot be evaluated.
fn list(name: &str, values: &Value, namespace: &str, mesh: &Mesh, ask: &Ask) -> Option<bool> {
    let mut any = false;
    for value in values.as_array().expect("the generator makes lists") {
        any |= one(name, value.as_str().expect("of texts"), namespace, mesh, ask)?;
    }
    Some(any)
}

fn one(name: &str, value: &str, namespace: &str, mesh: &Mesh, ask: &Ask) -> Option<bool> {
    if value.is_empty() {
        return None;
    }
    // [AP.10]: identity attributes exist only for authenticated peers.
    let of_peer = |matches: &dyn Fn([&str; 3]) -> bool| Some(ask.client.is_some_and(matches));
    match name {
        "principals" => of_peer(&|[domain, ns, account]| principal(value, domain, ns, account, mesh)),
        "namespaces" => of_peer(&|[_, ns, _]| text(value, ns)),
        "trustDomains" => of_peer(&|[domain, ..]| {
            // [AP.12]: equal to one of the set, it is the whole set.
            let set: Vec<&str> = mesh.aliases.iter().copied().chain([mesh.trust_domain]).collect();
            if set.contains(&value) { set.contains(&domain) } else { text(value, domain) }
        }),
        "serviceAccounts" if value.contains('*') || value.split('/').count() > 2 => None,
        "serviceAccounts" => of_peer(&|[_, ns, account]| match value.split_once('/') {
            Some((wanted, name)) => wanted == ns && name == account,
            None => namespace == ns && value == account,
        }),
        "ipBlocks" => in_block(&ask.source, value),
        "destinationIps" => in_block(ask.destination(), value),
        "ports" => match value.parse::<u32>() {
            Ok(port) if (1..=65535).contains(&port) => Some(port == u32::from(ask.port)),
            _ => None,
        },
        _ => None,
    }
}

/// [AP.9]
fn text(value: &str, actual: &str) -> bool {
    if value == "*" {
        return !actual.is_empty();
    }
    if let Some(suffix) = value.strip_prefix('*') {
        return actual.ends_with(suffix);
    }
    if let Some(prefix) = value.strip_suffix('*') {
        return actual.starts_with(prefix);
    }
    actual == value
}

/// [AP.12]
fn principal(value: &str, domain: &str, namespace: &str, account: &str, mesh: &Mesh) -> bool {
    let actual = format!("{domain}/ns/{namespace}/sa/{account}");
    let segments: Vec<&str> = value.split('/').collect();
    let set: Vec<&str> = std::iter::once(mesh.trust_domain).chain(mesh.aliases.iter().copied()).collect();
    let ours = segments.len() == 5
        && segments[0] != "*"
        && (segments[0] == "cluster.local" || set.iter().any(|domain| text(segments[0], domain)));
    if !ours {
        return text(value, &actual);
    }
    set.iter().any(|domain| {
        let stays = segments[0].starts_with('*') && text(segments[0], domain);
        let mut replaced = segments.clone();
        if !stays {
            replaced[0] = domain;
        }
        text(&replaced.join("/"), &actual)
    })
}

/// [AP.11], bit by bit.
fn in_block(actual: &str, block: &str) -> Option<bool> {
    // Family, and its bits.
    let bits = |ip: IpAddr, unmap: bool| -> (u8, Vec<bool>) {
        let octets = match ip {
            IpAddr::V4(v4) => (4, v4.octets().to_vec()),
            IpAddr::V6(v6) if unmap && is_mapped(v6) => (4, v6.octets()[12..].to_vec()),
            IpAddr::V6(v6) => (6, v6.octets().to_vec()),
        };
        (octets.0, octets.1.iter().flat_map(|octet| (0..8).rev().map(move |bit| octet >> bit & 1 == 1)).collect())
    };
    let (address, length) = match block.split_once('/') {
        Some((address, length)) => (address.parse::<IpAddr>().ok()?, Some(length.parse::<usize>().ok()?)),
        None => (block.parse::<IpAddr>().ok()?, None),
    };
    let mut length = length.unwrap_or(if address.is_ipv4() { 32 } else { 128 });
    // A block that is longer than the mapped prefix is one of IPv4 addresses.
    let (family, wanted) = bits(address, length >= 96);
    if address.is_ipv6() && family == 4 {
        length -= 96;
    }
    if length > wanted.len() {
        return None;
    }
    let (own, has) = bits(actual.parse().expect("the generator makes addresses"), true);
    Some(own == family && has[..length] == wanted[..length])
}

fn is_mapped(ip: Ipv6Addr) -> bool {
    ip.segments()[..6] == [0, 0, 0, 0, 0, 0xffff]
}

// ---- The generator.

/// Numbers that are the same in every run: xorshift64*.
pub(super) struct Dice(pub(super) u64);

impl Dice {
    pub(super) fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % limit
    }

    pub(super) fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    pub(super) fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }
}

pub(super) const DOMAINS: [&str; 3] = ["cluster.local", "td-main", "td-old"];
const PRINCIPALS: [&str; 17] = [
    "cluster.local/ns/default/sa/web",
    "cluster.local/ns/test/sa/nginx",
    "td-main/ns/default/sa/web",
    "td-old/ns/test/sa/nginx",
    "other/ns/default/sa/web",
    "td-*/ns/default/sa/web",
    "*-old/ns/default/sa/web",
    "*.local/ns/test/sa/nginx",
    "cluster.local/ns/default/sa/*",
    "cluster.local/ns/test/*",
    "td-main/ns/*",
    "*/ns/test/sa/nginx",
    "*/sa/web",
    "*",
    "spiffe://cluster.local/ns/default/sa/web",
    "*default*",
    "cluster.local/ns/*/sa/web",
];
const NAMESPACES: [&str; 8] = ["default", "test", "istio-system", "de*", "*st", "*", "*efaul*", "Default"];
const ACCOUNTS: [&str; 6] = ["web", "nginx", "default/web", "test/nginx", "istio-system/gateway", "test/web"];
const TRUST: [&str; 6] = ["cluster.local", "td-main", "td-old", "td-*", "*", "other"];
pub(super) const BLOCKS: [&str; 12] = [
    "10.0.0.0/24",
    "10.0.0.2",
    "10.0.0.3/31",
    "10.0.0.0/8",
    "192.168.0.0/16",
    "0.0.0.0/0",
    "::/0",
    "fd00::/16",
    "fd00::5",
    "::ffff:10.0.0.0/104",
    "::ffff:10.0.0.2",
    "::ffff:0:0/95",
];
const PORTS: [&str; 5] = ["80", "8080", "443", "080", "65535"];
const BAD: [&str; 4] = ["", "http", "10.0.0.0/40", "a/*"];

fn values(dice: &mut Dice, pool: &[&str], take_bad: bool) -> Value {
    let mut values: Vec<&str> = (0..1 + dice.below(3)).map(|_| dice.pick(pool)).collect();
    if dice.one_in(60) && take_bad {
        values.push(dice.pick(&BAD));
    }
    json!(values)
}

/// A field or key with values of its kind.
fn pool(name: &str) -> &'static [&'static str] {
    match name {
        "principals" => &PRINCIPALS,
        "namespaces" => &NAMESPACES,
        "serviceAccounts" => &ACCOUNTS,
        "trustDomains" => &TRUST,
        "ipBlocks" | "remoteIpBlocks" => &BLOCKS,
        "ports" => &PORTS,
        _ => &["a", "b*"],
    }
}

fn part(dice: &mut Dice, names: &[&str]) -> Value {
    let mut fields = Map::new();
    for _ in 0..1 + dice.below(2) {
        let name = dice.pick(names);
        let written =
            if dice.one_in(3) { format!("not{}{}", name[..1].to_uppercase(), &name[1..]) } else { name.to_owned() };
        fields.insert(written, values(dice, pool(name), name != "requestPrincipals"));
    }
    if dice.one_in(80) {
        fields.clear();
    }
    Value::Object(fields)
}

fn rule(dice: &mut Dice) -> Value {
    const SOURCES: [&str; 12] = [
        "principals",
        "principals",
        "principals",
        "namespaces",
        "namespaces",
        "namespaces",
        "serviceAccounts",
        "serviceAccounts",
        "trustDomains",
        "ipBlocks",
        "ipBlocks",
        "requestPrincipals",
    ];
    const OPERATIONS: [&str; 8] = ["ports", "ports", "ports", "ports", "ports", "ports", "methods", "paths"];
    const KEYS: [(&str, &str); 9] = [
        ("source.principal", "principals"),
        ("source.namespace", "namespaces"),
        ("source.serviceAccount", "serviceAccounts"),
        ("source.trustDomain", "trustDomains"),
        ("source.ip", "ipBlocks"),
        ("destination.port", "ports"),
        ("destination.ip", "ipBlocks"),
        ("request.headers[x]", "methods"),
        ("source.port", "ports"),
    ];
    let mut rule = Map::new();
    if !dice.one_in(4) {
        let items = if dice.one_in(100) { 0 } else { 1 + dice.below(2) };
        let items: Vec<Value> = (0..items).map(|_| json!({"source": part(dice, &SOURCES)})).collect();
        rule.insert("from".into(), json!(items));
    }
    if dice.one_in(3) {
        let items = if dice.one_in(60) { 0 } else { 1 + dice.below(2) };
        let items: Vec<Value> = (0..items).map(|_| json!({"operation": part(dice, &OPERATIONS)})).collect();
        rule.insert("to".into(), json!(items));
    }
    if dice.one_in(4) {
        let conditions: Vec<Value> = (0..1 + dice.below(2))
            .map(|_| {
                let (key, kind) = if dice.one_in(12) { dice.pick(&KEYS[7..]) } else { dice.pick(&KEYS[..7]) };
                let mut condition = Map::new();
                condition.insert("key".into(), json!(key));
                if !dice.one_in(3) {
                    condition.insert("values".into(), values(dice, pool(kind), true));
                }
                if dice.one_in(3) {
                    condition.insert("notValues".into(), values(dice, pool(kind), true));
                }
                Value::Object(condition)
            })
            .collect();
        rule.insert("when".into(), json!(conditions));
    }
    Value::Object(rule)
}

pub(super) fn policy(dice: &mut Dice, number: usize) -> Policy {
    let mut spec = Map::new();
    let action = dice.pick(&["ALLOW", "ALLOW", "ALLOW", "", "", "DENY", "DENY", "DENY", "AUDIT"]);
    if !action.is_empty() {
        spec.insert("action".into(), json!(action));
    }
    match dice.below(12) {
        0..4 => drop(spec.insert("selector".into(), json!({"matchLabels": {"app": dice.pick(&["nginx", "web"])}}))),
        4 => {
            drop(spec.insert("selector".into(), json!({"matchLabels": {"app": "web", "tier": dice.pick(&["x", "y"])}})))
        }
        5 => drop(spec.insert("selector".into(), json!({"matchLabels": {}}))),
        6 if dice.one_in(3) => {
            drop(spec.insert("targetRefs".into(), json!([{"kind": "Service", "group": "", "name": "s"}])));
        }
        _ => {}
    }
    let rules = dice.below(4);
    if rules > 0 || (action != "DENY" && dice.one_in(2)) {
        spec.insert("rules".into(), json!((0..rules).map(|_| rule(dice)).collect::<Vec<_>>()));
    } else if action == "DENY" {
        spec.insert("rules".into(), json!([]));
    }
    let dry_run = match dice.below(12) {
        0 if action != "AUDIT" => Some(dice.pick(&["true", "1", "t"])),
        1 if action != "AUDIT" => Some(dice.pick(&["false", "maybe"])),
        _ => None,
    };
    Policy {
        namespace: dice.pick(&["test", "test", "default", "default", "istio-system", "outside"]),
        name: format!("{}{number}", dice.pick(&["a", "b", "c"])),
        second: dice.below(3) as u32,
        revision: if dice.one_in(12) { Some(dice.pick(&["default", "canary"])) } else { None },
        dry_run,
        spec: Value::Object(spec),
    }
}

/// In every scope one, or none.
pub(super) fn peer_auths(dice: &mut Dice) -> Vec<PeerAuth> {
    const MODES: [&str; 5] = ["STRICT", "STRICT", "PERMISSIVE", "DISABLE", "UNSET"];
    let mut all = Vec::new();
    for namespace in ["test", "default", "istio-system"] {
        if dice.one_in(8) {
            all.push(PeerAuth { namespace, app: None, mode: dice.pick(&MODES), ports: Vec::new() });
        }
    }
    for (namespace, app) in [("test", "nginx"), ("default", "web"), ("default", "nginx"), ("istio-system", "gateway")] {
        if dice.one_in(4) {
            let mut ports: Vec<(u16, &str)> = Vec::new();
            for port in [80, 443, 8080, 65535] {
                if dice.one_in(3) {
                    ports.push((port, dice.pick(&MODES)));
                }
            }
            all.push(PeerAuth { namespace, app: Some(app), mode: dice.pick(&MODES), ports });
        }
    }
    all
}

pub(super) fn peer_auth_manifest(of: &PeerAuth) -> String {
    let mut spec = json!({"mtls": {"mode": of.mode}});
    if let Some(app) = of.app {
        spec["selector"] = json!({"matchLabels": {"app": app}});
    }
    if !of.ports.is_empty() {
        let ports = of.ports.iter().map(|(port, mode)| (port.to_string(), json!({"mode": mode})));
        spec["portLevelMtls"] = Value::Object(ports.collect());
    }
    let object = json!({
        "apiVersion": "security.istio.io/v1",
        "kind": "PeerAuthentication",
        "metadata": {"name": of.app.unwrap_or("all"), "namespace": of.namespace},
        "spec": spec,
    });
    format!("---\n{object}\n")
}

pub(super) fn ask(dice: &mut Dice) -> Ask {
    let identity = |dice: &mut Dice| {
        let domain = if dice.one_in(25) { "other" } else { dice.pick(&DOMAINS) };
        let [namespace, account] =
            dice.pick(&[["default", "web"], ["test", "nginx"], ["test", "web"], ["istio-system", "gateway"]]);
        [domain, namespace, account]
    };
    Ask {
        server: &SERVERS[if dice.one_in(20) { 3 } else { dice.below(3) }],
        client: if dice.one_in(4) { None } else { Some(identity(dice)) },
        source: dice
            .pick(&["10.0.0.2", "10.0.0.3", "10.9.9.9", "192.168.1.1", "fd00::5", "::ffff:10.0.0.2", "2001:db8::1"])
            .to_owned(),
        port: dice.pick(&[80, 80, 80, 8080, 443, 15006]),
    }
}

pub(super) fn manifest(policy: &Policy) -> String {
    let mut metadata = json!({
        "name": policy.name,
        "namespace": policy.namespace,
        "creationTimestamp": format!("2024-01-01T00:00:{:02}Z", policy.second),
    });
    if let Some(revision) = policy.revision {
        metadata["labels"] = json!({"istio.io/rev": revision});
    }
    if let Some(text) = policy.dry_run {
        metadata["annotations"] = json!({"istio.io/dry-run": text});
    }
    let object = json!({
        "apiVersion": "security.istio.io/v1",
        "kind": "AuthorizationPolicy",
        "metadata": metadata,
        "spec": policy.spec,
    });
    format!("---\n{object}\n")
}

/// The compiled evaluator equals the one above, on verdict, reason and the rule that is named, whatever the policies.
/// Every reason is reached often, or the comparison would say nothing.
#[test]
fn the_compiled_evaluator_equals_the_specification() {
    let mut dice = Dice(0x5eed_0f5e_ed0f_5eed);
    let mut reached = std::collections::BTreeMap::<String, usize>::new();
    for set in 0..triples() / PER_SET {
        let policies: Vec<Policy> = (0..dice.below(7)).map(|number| policy(&mut dice, number)).collect();
        let main = dice.pick(&DOMAINS[..2]);
        let aliases: Vec<&str> = DOMAINS.into_iter().filter(|domain| *domain != main && dice.one_in(2)).collect();
        let of_mesh = Mesh { trust_domain: main, aliases };
        let peer_auths = peer_auths(&mut dice);
        let mut manifests: Vec<String> = policies.iter().map(manifest).collect();
        manifests.push(mesh(&json!({"trustDomain": main, "trustDomainAliases": of_mesh.aliases}).to_string()));
        manifests.extend(peer_auths.iter().map(peer_auth_manifest));
        let view = view(&manifests);
        let snapshot = policy::compile(&view.cluster, &Options::default(), None);
        let mut servers = policy::Servers::of(&view.cluster, &Options::default(), &snapshot);
        for _ in 0..PER_SET {
            let ask = ask(&mut dice);
            let client = ask.client.map(|parts| parts.join("/"));
            let verdict = judge(&snapshot, From(client.as_deref(), &ask.source), ask.server.uid, ask.port);
            let rule = match &verdict.decided_by {
                Some(DecidedBy::AuthorizationPolicy(rule)) => Some(rule.to_string()),
                Some(DecidedBy::PeerAuthentication(_)) | None => None,
            };
            let got = (verdict.allowed, verdict.reason.as_str().to_owned(), rule);
            let want = by_the_book(&policies, &peer_auths, &of_mesh, &ask);
            assert_eq!(
                got,
                want,
                "set {set}: {:?} from {} to {}:{}, mesh {main} {:?}\n{}",
                ask.client,
                ask.source,
                ask.server.uid,
                ask.port,
                of_mesh.aliases,
                manifests.concat()
            );
            *reached.entry(got.1).or_default() += 1;
            // What protects recorded servers is what protects pods.
            let labels = ask.server.labels.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
            let protection = servers.protection(ask.server.namespace, &labels);
            let workload = snapshot.workload(&PodUid(ask.server.uid.into())).expect("there");
            assert_eq!(protection.authorization, workload.authorization);
            assert_eq!(protection.peer_auth, workload.peer_auth);
        }
    }
    let total: usize = reached.values().sum();
    assert!(total >= triples() - PER_SET, "{total}");
    for reason in [
        "allow-match",
        "no-allow-match",
        "explicit-deny",
        "no-allow-policies",
        "strict-requires-mtls",
        "server-not-enrolled",
        "untrusted-trust-domain",
        "loop",
    ] {
        let times = reached.get(reason).copied().unwrap_or(0);
        assert!(times > triples() / 200, "{reason} only {times} times: {reached:?}");
    }
}
