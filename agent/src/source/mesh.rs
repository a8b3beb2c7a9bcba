//! The mesh configuration: key `mesh` of ConfigMap `istio` (specification §1.1).

use std::time::Duration;

use crate::model::{MeshConfig, OutboundPolicy, TrustDomain};

use super::{
    convert::Wrong,
    schema::nearest,
    yaml::{self, Node, Value, join},
};

/// Fields of Istio's MeshConfig that this version does not read.
const NOT_READ: [&str; 41] = [
    "accessLogEncoding",
    "accessLogFile",
    "accessLogFormat",
    "ca",
    "caCertificates",
    "certificates",
    "configSources",
    "defaultConfig",
    "defaultDestinationRuleExportTo",
    "defaultHttpRetryPolicy",
    "defaultProviders",
    "defaultServiceExportTo",
    "defaultVirtualServiceExportTo",
    "disableEnvoyListenerLog",
    "discoverySelectors",
    "dnsRefreshRate",
    "enableAutoMtls",
    "enableEnvoyAccessLogService",
    "enablePrometheusMerge",
    "enableTracing",
    "extensionProviders",
    "h2UpgradePolicy",
    "inboundClusterStatName",
    "inboundTrafficPolicy",
    "ingressClass",
    "ingressControllerMode",
    "ingressSelector",
    "ingressService",
    "localityLbSetting",
    "meshMTLS",
    "outboundClusterStatName",
    "pathNormalization",
    "proxyHttpPort",
    "proxyInboundListenPort",
    "proxyListenPort",
    "serviceSettings",
    "statNameTruncation",
    "tcpKeepalive",
    "thriftConfig",
    "tlsDefaults",
    "verifyCertificateAtClient",
];

const READ: [&str; 5] =
    ["connectTimeout", "outboundTrafficPolicy", "rootNamespace", "trustDomain", "trustDomainAliases"];

/// Reads the text of the key. The second part is what has no effect, by name.
pub(super) fn parse(text: &str) -> Result<(MeshConfig, Vec<String>), Vec<Wrong>> {
    let at = |path: &str| if path.is_empty() { "data.mesh".to_owned() } else { format!("data.mesh: {path}") };
    let wrong = |path: &str, what: String| Wrong::new(at(path), what);
    let mut documents = yaml::documents(text)
        .map_err(|fault| vec![wrong(&fault.path, format!("{} (line {} of the text)", fault.what, fault.line))])?;
    if documents.len() > 1 {
        return Err(vec![wrong("", "must be one YAML document".to_owned())]);
    }
    let mut mesh = MeshConfig::default();
    let Some(document) = documents.pop() else { return Ok((mesh, Vec::new())) };
    let mut faults: Vec<Wrong> = document.faults.into_iter().map(|fault| wrong(&fault.path, fault.what)).collect();
    let mut unread = Vec::new();
    let entries = match document.root.value {
        Value::Null => Vec::new(),
        Value::Map(entries) => entries,
        Value::Bool(_) | Value::Number(_) | Value::String(_) | Value::List(_) => {
            return Err(vec![wrong("", format!("must be a mapping, not {}", document.root.kind()))]);
        }
    };
    for (key, node) in entries.iter().filter(|(_, node)| node.value != Value::Null) {
        let name = key.name.as_str();
        let result = match name {
            "rootNamespace" => text_of(node).map(|text| mesh.root_namespace = text.into()),
            "trustDomain" => trust_domain(node).map(|domain| mesh.trust_domain = domain),
            "trustDomainAliases" => aliases(node).map(|aliases| mesh.trust_domain_aliases = aliases),
            "connectTimeout" => text_of(node).and_then(time_out).map(|timeout| mesh.connect_timeout = timeout),
            "outboundTrafficPolicy" => outbound(node).map(|policy| mesh.outbound = policy),
            _ if NOT_READ.contains(&name) => {
                unread.push(name.to_owned());
                Ok(())
            }
            _ => Err(match nearest(name, READ.into_iter().chain(NOT_READ)) {
                Some(near) => format!("unknown field; did you mean {near}?"),
                None => "unknown field; remove it".to_owned(),
            }),
        };
        if let Err(what) = result {
            faults.push(wrong(&join("", name), what));
        }
    }
    if faults.is_empty() { Ok((mesh, unread)) } else { Err(faults) }
}

fn text_of(node: &Node) -> Result<&str, String> {
    node.as_str().filter(|text| !text.is_empty()).ok_or_else(|| format!("must be a string, not {}", node.kind()))
}

fn trust_domain(node: &Node) -> Result<TrustDomain, String> {
    TrustDomain::new(text_of(node)?)
}

fn aliases(node: &Node) -> Result<Vec<TrustDomain>, String> {
    match &node.value {
        Value::List(items) => items.iter().map(trust_domain).collect(),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) | Value::Map(_) => {
            Err(format!("must be a list, not {}", node.kind()))
        }
    }
}

fn outbound(node: &Node) -> Result<OutboundPolicy, String> {
    let Value::Map(entries) = &node.value else { return Err(format!("must be a mapping, not {}", node.kind())) };
    if let Some((key, _)) = entries.iter().find(|(key, _)| key.name != "mode") {
        return Err(format!("has no field {}; known here: mode", key.name));
    }
    match node.get("mode").map(text_of).transpose()? {
        // Istio's enumeration begins with REGISTRY_ONLY, so that is what an empty policy says.
        None | Some("REGISTRY_ONLY") => Ok(OutboundPolicy::RegistryOnly),
        Some("ALLOW_ANY") => Ok(OutboundPolicy::AllowAny),
        Some(other) => Err(format!("mode {other:?} is unknown; write ALLOW_ANY or REGISTRY_ONLY")),
    }
}

fn time_out(text: &str) -> Result<Duration, String> {
    duration(text)
        .filter(|duration| !duration.is_zero())
        .ok_or_else(|| format!("{text:?} is not a duration above zero; write one like 10s"))
}

/// A duration as protobuf's JSON and Go write it: `10s`, `1m30s`, `500ms`.
pub(super) fn duration(text: &str) -> Option<Duration> {
    let (mut rest, mut seconds) = (text, 0.0);
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let number: f64 = rest[..digits].parse().ok()?;
        rest = &rest[digits..];
        let end = rest.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(rest.len());
        seconds += number
            * match &rest[..end] {
                "us" | "µs" => 0.000_001,
                "ms" => 0.001,
                "s" => 1.0,
                "m" => 60.0,
                "h" => 3600.0,
                _ => return None,
            };
        rest = &rest[end..];
    }
    Duration::try_from_secs_f64(seconds).ok().filter(|_| !text.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Specification §1.1.
    #[test]
    fn fields_and_defaults_are_read() {
        assert_eq!(parse(""), Ok((MeshConfig::default(), vec![])));
        let text = "rootNamespace: mesh\ntrustDomain: a@b\ntrustDomainAliases: [old.example]\nconnectTimeout: 1m0.5s\n\
                    outboundTrafficPolicy: {mode: REGISTRY_ONLY}\nenablePrometheusMerge: true\n";
        let (mesh, unread) = parse(text).expect("valid");
        assert_eq!((&*mesh.root_namespace, mesh.trust_domain.as_str()), ("mesh", "a.b"));
        assert_eq!(mesh.trust_domain_aliases[0].as_str(), "old.example");
        assert_eq!(mesh.connect_timeout, Duration::from_millis(60500));
        assert_eq!((mesh.outbound, unread), (OutboundPolicy::RegistryOnly, vec!["enablePrometheusMerge".to_owned()]));
    }

    #[test]
    fn wrong_fields_are_named() {
        for (text, path, words) in [
            ("trustdomain: x\n", "data.mesh: trustdomain", "did you mean trustDomain?"),
            ("trustDomain: a/b\n", "data.mesh: trustDomain", "must not contain"),
            ("rootNamespace: 5\n", "data.mesh: rootNamespace", "must be a string, not a number"),
            ("connectTimeout: soon\n", "data.mesh: connectTimeout", "write one like 10s"),
            ("connectTimeout: 0s\n", "data.mesh: connectTimeout", "above zero"),
            ("outboundTrafficPolicy: {mode: ALLOW}\n", "data.mesh: outboundTrafficPolicy", "ALLOW_ANY"),
            ("trustDomain: a\ntrustDomain: b\n", "data.mesh: trustDomain", "given twice"),
            ("a: [\n", "data.mesh", "not YAML"),
            ("- a\n", "data.mesh", "must be a mapping"),
        ] {
            let wrong = parse(text).expect_err(text);
            assert_eq!(wrong.len(), 1, "{wrong:?}");
            assert!(wrong[0].path.starts_with(path) && wrong[0].what.contains(words), "{text}: {wrong:?}");
        }
    }
}
