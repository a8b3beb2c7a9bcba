//! Manifests that are refused when they are written, and what is said of them.

use super::support::Shape;

/// Kind and spec, the path of the field in the answer where it is said so, and words of the answer.
pub(crate) const CASES: [(&str, &str, &str); 44] = [
    // §19: values of `mode`, [C.9].
    (
        "PeerAuthentication {mtls: {mode: DISABLED}}",
        "spec.mtls.mode",
        "Unsupported value: \"DISABLED\": supported values: \"UNSET\"",
    ),
    ("PeerAuthentication {mtls: {mode: strict}}", "spec.mtls.mode", "Unsupported value"),
    ("PeerAuthentication {mtls: {mode: MUTUAL}}", "spec.mtls.mode", "Unsupported value"),
    // §19, [PA.14].
    ("PeerAuthentication {portLevelMtls: {80: {mode: STRICT}}}", "spec", "portLevelMtls needs a selector"),
    (
        "PeerAuthentication {selector: {}, portLevelMtls: {80: {mode: STRICT}}}",
        "",
        "add selector.matchLabels, or remove it",
    ),
    (
        "PeerAuthentication {selector: {matchLabels: {a: b}}, portLevelMtls: {http: {mode: STRICT}}}",
        "",
        "write a number from 1 to 65535",
    ),
    (
        "PeerAuthentication {selector: {matchLabels: {a: b}}, portLevelMtls: {0: {mode: STRICT}}}",
        "spec.portLevelMtls",
        "Invalid value",
    ),
    (
        "PeerAuthentication {selector: {matchLabels: {a: b}}, portLevelMtls: {65536: {mode: STRICT}}}",
        "",
        "write a number from 1 to 65535",
    ),
    ("PeerAuthentication {selector: {matchLabels: {a: b}}, portLevelMtls: {}}", "spec.portLevelMtls", "Invalid value"),
    // §19: nested in `mtls`; kubectl asks the server to be strict.
    (
        "PeerAuthentication {mtls: {portLevelMtls: {80: {mode: STRICT}}}}",
        "",
        "unknown field \"spec.mtls.portLevelMtls\"",
    ),
    ("PeerAuthentication {selector: {labels: {a: b}}}", "", "unknown field \"spec.selector.labels\""),
    (
        "PeerAuthentication {selector: {matchLabels: {a: '*'}}}",
        "spec.selector.matchLabels[a]",
        "write their values without \"*\"",
    ),
    (
        "PeerAuthentication {selector: {matchLabels: {'*': a}}}",
        "spec.selector.matchLabels",
        "write their names without \"*\"",
    ),
    ("PeerAuthentication {selector: {matchLabels: {a: 5}}}", "spec.selector.matchLabels.a", "\"integer\""),
    ("AuthorizationPolicy {action: Deny}", "spec.action", "Unsupported value: \"Deny\""),
    (
        "AuthorizationPolicy {selector: {matchLabels: {a: b}}, targetRefs: [{kind: Service, name: s}]}",
        "",
        "has more than one of selector, targetRef and targetRefs; keep one [AP.2]",
    ),
    ("AuthorizationPolicy {targetRefs: [{kind: Service}]}", "spec.targetRefs[0].name", "Required value"),
    ("AuthorizationPolicy {rules: [{when: [{values: [a]}]}]}", "spec.rules[0].when[0].key", "Required value"),
    (
        "AuthorizationPolicy {rules: [{from: [{source: {serviceAccounts: [a], namespaces: [b]}}]}]}",
        "spec.rules[0].from[0].source",
        "serviceAccounts cannot stand beside principals or namespaces",
    ),
    (
        "AuthorizationPolicy {rules: [{to: [{operation: {ports: [80]}}]}]}",
        "spec.rules[0].to[0].operation.ports[0]",
        "\"integer\"",
    ),
    (
        "AuthorizationPolicy {rules: [{from: [{source: {principal: [a]}}]}]}",
        "",
        "unknown field \"spec.rules[0].from[0].source.principal\"",
    ),
    (
        "RequestAuthentication {jwtRules: [{issuer: a, jwks: '{}', jwksUri: 'https://a'}]}",
        "spec.jwtRules[0]",
        "has more than one of jwks, jwksUri, jwks_uri; keep one",
    ),
    (
        "RequestAuthentication {jwtRules: [{issuer: a, jwksUri: a/jwks}]}",
        "spec.jwtRules[0].jwksUri",
        "is not a URL; write https://…",
    ),
    ("RequestAuthentication {jwtRules: [{issuer: ''}]}", "spec.jwtRules[0].issuer", "Invalid value"),
    (
        "Sidecar {outboundTrafficPolicy: {mode: ALLOW}}",
        "spec.outboundTrafficPolicy.mode",
        "Unsupported value: \"ALLOW\"",
    ),
    ("Sidecar {ingress: [{defaultEndpoint: '127.0.0.1:80'}]}", "spec.ingress[0].port", "Required value"),
    (
        "Sidecar {inboundConnectionPool: {tcp: {connectTimeout: soon}}}",
        "",
        "is not a duration of 1ms or more; write one like 10s or 1m30s",
    ),
    ("ServiceEntry {ports: []}", "spec.hosts", "Required value"),
    ("ServiceEntry {hosts: []}", "spec.hosts", "0"),
    ("ServiceEntry {hosts: ['*']}", "", "\"*\" alone is not a host; write a name, or \"*.suffix\""),
    ("ServiceEntry {hosts: [a.example], ports: [{number: 0, name: a}]}", "spec.ports[0].number", "0"),
    (
        "ServiceEntry {hosts: [a.example], ports: [{number: 1, name: a}, {number: 1, name: b}]}",
        "",
        "a port is there twice; each number once",
    ),
    (
        "ServiceEntry {hosts: [a.example], ports: [{number: 1, name: a}, {number: 2, name: a}]}",
        "spec.ports[1]",
        "Duplicate value",
    ),
    (
        "ServiceEntry {hosts: [a.example], resolution: DNS, addresses: [192.0.2.0/24]}",
        "",
        "a CIDR goes with resolution NONE or STATIC only; write addresses",
    ),
    (
        "ServiceEntry {hosts: [a.example], endpoints: [{address: 192.0.2.1}]}",
        "",
        "endpoints have no place in resolution NONE, which goes where the client was going",
    ),
    (
        "ServiceEntry {hosts: [a.example], resolution: STATIC, endpoints: [{address: 192.0.2.1}], workloadSelector: {labels: {a: b}}}",
        "",
        "endpoints cannot stand beside workloadSelector; remove one of them",
    ),
    (
        "ServiceEntry {hosts: [a.example], resolution: STATIC, endpoints: [{labels: {a: b}}]}",
        "spec.endpoints[0]",
        "address is missing; write an address",
    ),
    ("WorkloadEntry {labels: {a: b}}", "spec", "address is missing; write an address"),
    ("WorkloadEntry {address: 'unix://a'}", "spec.address", "is not a socket; write unix:///PATH"),
    ("DestinationRule {trafficPolicy: {}}", "spec.host", "Required value"),
    (
        "DestinationRule {host: a, trafficPolicy: {tls: {mode: TLS}}}",
        "spec.trafficPolicy.tls.mode",
        "Unsupported value: \"TLS\"",
    ),
    (
        "DestinationRule {host: a, trafficPolicy: {loadBalancer: {simple: RANDOM, consistentHash: {useSourceIp: true}}}}",
        "",
        "has more than one of simple, consistentHash; keep one",
    ),
    // Where a rule would cost too much, the words are the API server's.
    (
        "DestinationRule {host: a, subsets: [{name: a, trafficPolicy: {loadBalancer: {simple: RANDOM, consistentHash: {useSourceIp: true}}}}]}",
        "",
        "\"spec.subsets[0].trafficPolicy.loadBalancer\" must not validate the schema",
    ),
    (
        "VirtualService {hosts: [a], http: [{match: [{uri: {exact: /a, prefix: /}}], route: [{destination: {host: a}}]}]}",
        "",
        "\"spec.http[0].match[0].uri\" must not validate the schema",
    ),
];

/// The manifest of the case at this place.
pub(crate) fn shape(at: usize, case: &str) -> Shape {
    let (kind, spec) = case.split_once(' ').unwrap_or((case, "{}"));
    let group = match kind {
        "PeerAuthentication" | "AuthorizationPolicy" | "RequestAuthentication" => "security.istio.io",
        _ => "networking.istio.io",
    };
    let name = format!("refused-{at}");
    let text = format!("apiVersion: {group}/v1\nkind: {kind}\nmetadata: {{name: {name}}}\nspec: {spec}\n");
    Shape { name, text }
}

/// All of them.
pub(crate) fn all() -> Vec<Shape> {
    CASES.iter().enumerate().map(|(at, (case, ..))| shape(at, case)).collect()
}
