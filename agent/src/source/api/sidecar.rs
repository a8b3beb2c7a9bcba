//! Rules of a Sidecar (specification §9.6, §9.2, §9.5).

use std::{collections::BTreeSet, net::SocketAddr};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use super::{
    Found, Strict, is_dns_name,
    networking::{EgressListener, IngressListener, SidecarSpec},
};

impl Strict for SidecarSpec {
    fn check(&self, _: &ObjectMeta, found: &mut Found) {
        let policy = &self.outbound_traffic_policy;
        if self.egress.is_empty()
            && self.ingress.is_empty()
            && policy.is_none()
            && self.inbound_connection_pool.is_none()
        {
            let what = "has no egress, ingress, outboundTrafficPolicy nor inboundConnectionPool; say one of them, or \
                        remove the object";
            found.wrong("spec", what);
        }
        if let Some(selector) = &self.workload_selector {
            if selector.match_labels.is_some() {
                let what = "unknown field, so that the whole namespace is selected; a Sidecar's selector says labels \
                            instead [C.3]";
                found.warn("spec.workloadSelector.matchLabels", what);
            } else if selector.labels.is_empty() {
                let what = "is empty and selects every pod of the namespace; remove it to say so [C.4]";
                found.warn("spec.workloadSelector", what);
            }
        }
        egress(&self.egress, found);
        ingress(&self.ingress, found);
    }
}

fn egress(listeners: &[EgressListener], found: &mut Found) {
    let mut ports = BTreeSet::new();
    for (index, listener) in listeners.iter().enumerate() {
        let path = format!("spec.egress[{index}]");
        match listener.port.as_ref().map(|port| port.number) {
            Some(Some(number)) if !ports.insert(number) => {
                let what = format!("{} is there already; one listener for each port", number.0);
                found.wrong(format!("{path}.port.number"), what);
            }
            Some(Some(_)) => {}
            Some(None) => found.wrong(format!("{path}.port.number"), "is missing; write the service port"),
            None if index + 1 < listeners.len() => {
                let what = "has no port and is not the last one; the listener for all other ports comes last [SC.11]";
                found.wrong(&path, what);
            }
            None => {}
        }
        if listener.hosts.is_empty() {
            let what = "is empty: this listener imports nothing and denies everything, unknown destinations too; \
                        write \"./*\" or the hosts that are needed [SC.10]";
            found.warn(format!("{path}.hosts"), what);
        }
        for (number, entry) in listener.hosts.iter().enumerate() {
            host(entry, &format!("{path}.hosts[{number}]"), found);
        }
    }
}

/// [SC.8], [SC.9]
fn host(entry: &str, path: &str, found: &mut Found) {
    let name = |name: &str| name == "*" || is_dns_name(name, true);
    match entry.split('/').collect::<Vec<_>>()[..] {
        [host] if name(host) => {
            let what = format!("{host:?} has no namespace and is read as \"*/{host}\"; write that [SC.8]");
            found.warn(path, what);
        }
        [namespace, host] => {
            let of = namespace.strip_prefix('~').unwrap_or(namespace);
            let known = matches!(namespace, "*" | "." | "~") || is_dns_name(of, false) && !of.contains('.');
            if !known {
                let what = format!("{namespace:?} is not a namespace; write a name, \"*\", \".\" or \"~name\" [SC.9]");
                found.wrong(path, what);
            } else if !name(host) {
                found.wrong(path, format!("{host:?} is not a DNS name; write a name, \"*.suffix\" or \"*\" [SC.9]"));
            } else if host != "*" && !host.contains('.') {
                let service = if matches!(namespace, "*" | "." | "~") { "NAMESPACE" } else { of };
                let what = format!(
                    "{host:?} is not a full name and is read as \"{host}.{service}.svc.cluster.local\"; write that [SC.9]"
                );
                found.warn(path, what);
            }
        }
        _ => {
            let what = format!("{entry:?} is not a host; write NAMESPACE/NAME with one \"/\" [SC.9]");
            found.wrong(path, what);
        }
    }
}

fn ingress(listeners: &[IngressListener], found: &mut Found) {
    let mut ports = BTreeSet::new();
    for (index, listener) in listeners.iter().enumerate() {
        let path = format!("spec.ingress[{index}]");
        match listener.port.as_ref().and_then(|port| port.number) {
            Some(number) if !ports.insert(number) => {
                let what = format!("{} is there already; one listener for each port", number.0);
                found.wrong(format!("{path}.port.number"), what);
            }
            Some(_) => {}
            None => found.wrong(format!("{path}.port.number"), "is missing; write the port that the pod is called on"),
        }
        let Some(endpoint) = listener.default_endpoint.as_deref().filter(|text| !text.is_empty()) else { continue };
        let path = format!("{path}.defaultEndpoint");
        if let Some(file) = endpoint.strip_prefix("unix://") {
            if !file.starts_with(['/', '@']) {
                found.wrong(path, format!("{endpoint:?} is not a socket; write unix:///PATH"));
            }
        } else if let Some(port) = endpoint.strip_prefix(':') {
            if port.parse::<u16>().is_ok_and(|port| port != 0) {
                let what = "has no host, so that traffic goes where it was going and the port has no effect; write \
                            127.0.0.1:PORT or 0.0.0.0:PORT";
                found.warn(path, what);
            } else {
                found.wrong(path, format!("{port:?} is not a port; write 1 to 65535"));
            }
        } else {
            let own = |addr: SocketAddr| {
                let ip = addr.ip();
                addr.port() != 0
                    && (ip.is_unspecified()
                        || ip == std::net::Ipv4Addr::LOCALHOST
                        || ip == std::net::Ipv6Addr::LOCALHOST)
            };
            if !endpoint.parse().is_ok_and(own) {
                let what = format!(
                    "{endpoint:?} is not an endpoint of the pod; write 127.0.0.1:PORT, [::1]:PORT, 0.0.0.0:PORT, \
                     [::]:PORT or unix:///PATH"
                );
                found.wrong(path, what);
            }
        }
    }
}
