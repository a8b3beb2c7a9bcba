//! Rules of a ServiceEntry, a WorkloadEntry and a WorkloadGroup (specification §10.1, §10.2).

use std::collections::BTreeSet;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use super::{
    Found, Strict, export_to, is_address, is_dns_name, is_network,
    networking::{Resolution, ServiceEntrySpec, ServicePort, WorkloadEntrySpec, WorkloadGroupSpec},
};

/// Label that turns automatic addresses off (specification §10.2).
const AUTO_ALLOCATE: &str = "networking.istio.io/enable-autoallocate-ip";

/// Application protocols, as `protocol` spells them in any case (specification §12.1).
const PROTOCOLS: [&str; 12] =
    ["HTTP", "HTTP2", "GRPC", "GRPC-WEB", "HTTPS", "TLS", "TCP", "UDP", "MONGO", "MYSQL", "REDIS", "HTTP_PROXY"];

/// How connections of a port are told apart beyond their address.
fn names_its_host(port: &ServicePort) -> bool {
    let protocol = port.protocol.as_deref().unwrap_or_default().to_ascii_uppercase();
    matches!(&*protocol, "HTTP" | "HTTP2" | "HTTP_PROXY" | "GRPC" | "GRPC-WEB" | "HTTPS" | "TLS")
}

/// Whether a port is passed through as the application's own TLS ([SE.5]).
pub(super) fn is_tls(port: &ServicePort) -> bool {
    port.protocol.as_deref().is_some_and(|text| ["HTTPS", "TLS"].iter().any(|tls| text.eq_ignore_ascii_case(tls)))
}

impl Strict for ServiceEntrySpec {
    fn check(&self, meta: &ObjectMeta, found: &mut Found) {
        hosts(self, found);
        ports(&self.ports, found);
        addresses(self, found);
        endpoints(self, found);
        export_to(&self.export_to, found);
        let opaque = self.ports.iter().any(|port| !names_its_host(port));
        if self.hosts.len() > 1 && opaque && self.resolution != Resolution::None {
            let what = "has several hosts that cannot be told apart on a port that is neither HTTP nor TLS; make one \
                        ServiceEntry for each host [SE.2]";
            found.wrong("spec.hosts", what);
        }
        let off = |value: &String| value == "false";
        let auto_off = meta.labels.as_ref().and_then(|labels| labels.get(AUTO_ALLOCATE)).is_some_and(off);
        if self.addresses.is_empty() && opaque && (auto_off || self.resolution == Resolution::None) {
            let why = if auto_off { format!("label {AUTO_ALLOCATE}=false") } else { "resolution NONE".to_owned() };
            let what = format!(
                "has no addresses, and none are allocated ({why}): every destination on its TCP ports belongs to it; \
                 write spec.addresses [SE.4]"
            );
            found.warn("spec", what);
        }
    }
}

fn hosts(spec: &ServiceEntrySpec, found: &mut Found) {
    if spec.hosts.is_empty() {
        found.wrong("spec.hosts", "is missing; write at least one host");
    }
    for (index, host) in spec.hosts.iter().enumerate() {
        let path = format!("spec.hosts[{index}]");
        if host == "*" {
            found.wrong(path, "\"*\" alone is not a host; write a name, or \"*.suffix\"");
        } else if !is_dns_name(host, true) {
            found.wrong(path, format!("{host:?} is not a DNS name; write a name, or \"*.suffix\""));
        } else if spec.resolution == Resolution::DynamicDns && !host.starts_with("*.") {
            found.wrong(path, format!("{host:?} has no wildcard, which DYNAMIC_DNS is for; write resolution: DNS"));
        }
    }
}

fn ports(ports: &[ServicePort], found: &mut Found) {
    let (mut names, mut numbers) = (BTreeSet::new(), BTreeSet::new());
    for (index, port) in ports.iter().enumerate() {
        let path = |field: &str| format!("spec.ports[{index}].{field}");
        match port.number {
            None => found.wrong(path("number"), "is missing; write 1 to 65535"),
            Some(number) if !numbers.insert(number) => {
                found.wrong(path("number"), format!("{} is there already; each number once", number.0));
            }
            Some(_) => {}
        }
        if port.name.is_empty() {
            found.wrong(path("name"), "is missing; every port has a name of its own");
        } else if !names.insert(&*port.name) {
            found.wrong(path("name"), format!("{:?} is there already; each name once", port.name));
        }
        protocol(port, path("protocol"), found);
    }
}

/// Of a port of a ServiceEntry or a Gateway.
pub(super) fn protocol(port: &ServicePort, path: String, found: &mut Found) {
    if let Some(text) = port.protocol.as_deref().filter(|text| !text.is_empty())
        && !PROTOCOLS.iter().any(|known| text.eq_ignore_ascii_case(known))
    {
        found.wrong(path, format!("{text:?} is not a protocol; write one of {}", PROTOCOLS.join(", ")));
    }
}

fn addresses(spec: &ServiceEntrySpec, found: &mut Found) {
    for (index, address) in spec.addresses.iter().enumerate() {
        let path = format!("spec.addresses[{index}]");
        if !is_network(address) {
            found.wrong(path, format!("{address:?} is neither an IP address nor a CIDR"));
        } else if address.contains('/') && !matches!(spec.resolution, Resolution::None | Resolution::Static) {
            let what =
                format!("{address:?} is a CIDR, which goes with resolution NONE or STATIC only; write an address");
            found.wrong(path, what);
        }
    }
}

fn endpoints(spec: &ServiceEntrySpec, found: &mut Found) {
    let path = "spec.endpoints";
    if spec.workload_selector.is_some() && !spec.endpoints.is_empty() {
        found.wrong(path, "cannot stand beside workloadSelector; remove one of them");
    }
    if spec.workload_selector.as_ref().is_some_and(|selector| selector.labels.is_empty()) {
        let what = "is empty and selects every pod and WorkloadEntry of the namespace; write labels [C.4]";
        found.warn("spec.workloadSelector", what);
    }
    match spec.resolution {
        Resolution::None if !spec.endpoints.is_empty() => {
            found.wrong(path, "has no place in resolution NONE, which goes where the client was going; write STATIC");
        }
        Resolution::DnsRoundRobin if spec.endpoints.len() > 1 => {
            found.wrong(path, "has more than one endpoint, and DNS_ROUND_ROBIN is for one name; write resolution: DNS");
        }
        Resolution::DynamicDns => {
            for (index, _) in spec.ports.iter().enumerate().filter(|(_, port)| !names_its_host(port)) {
                let what = "goes with HTTP, HTTP2, GRPC and TLS only where resolution is DYNAMIC_DNS";
                found.wrong(format!("spec.ports[{index}].protocol"), what);
            }
        }
        Resolution::None | Resolution::Static | Resolution::Dns | Resolution::DnsRoundRobin => {}
    }
    let names: BTreeSet<&str> = spec.ports.iter().map(|port| &*port.name).collect();
    for (index, endpoint) in spec.endpoints.iter().enumerate() {
        let path = format!("{path}[{index}]");
        let address = endpoint.address.as_deref().unwrap_or_default();
        let right = match spec.resolution {
            Resolution::Static => is_address(address) || is_socket(address),
            _ => is_address(address) || is_socket(address) || is_dns_name(address, false),
        };
        if address.is_empty() && endpoint.network.as_deref().is_none_or(str::is_empty) {
            found.wrong(format!("{path}.address"), "is missing; write an address");
        } else if !address.is_empty() && !right {
            let remedy = match spec.resolution {
                Resolution::Static => "resolution STATIC takes IP addresses; write one, or resolution: DNS",
                _ => "write an IP address or a DNS name",
            };
            found.wrong(format!("{path}.address"), format!("{address:?}: {remedy}"));
        }
        for name in endpoint.ports.keys().filter(|name| !names.contains(&***name)) {
            let what = "is no port of this ServiceEntry; write the name of one of spec.ports [SE.1]";
            found.wrong(super::super::yaml::join(&format!("{path}.ports"), name), what);
        }
    }
}

fn is_socket(address: &str) -> bool {
    address.strip_prefix("unix://").is_some_and(|path| path.starts_with(['/', '@']))
}

/// What holds wherever an endpoint is written by itself.
fn workload(entry: &WorkloadEntrySpec, path: &str, needs_address: bool, found: &mut Found) {
    let address = entry.address.as_deref().unwrap_or_default();
    if address.is_empty() {
        if needs_address && entry.network.as_deref().is_none_or(str::is_empty) {
            found.wrong(format!("{path}.address"), "is missing; write an address");
        }
    } else if !is_address(address) && !is_socket(address) && !is_dns_name(address, false) {
        found.wrong(format!("{path}.address"), format!("{address:?} is neither an IP address nor a DNS name"));
    } else if is_socket(address) && !entry.ports.is_empty() {
        found.wrong(format!("{path}.ports"), "a socket (unix://) has no ports; remove them");
    }
}

impl Strict for WorkloadEntrySpec {
    fn check(&self, _: &ObjectMeta, found: &mut Found) {
        workload(self, "spec", true, found);
    }
}

impl Strict for WorkloadGroupSpec {
    fn check(&self, _: &ObjectMeta, found: &mut Found) {
        match &self.template {
            None => found.wrong("spec.template", "is missing; write what its WorkloadEntries have in common"),
            Some(template) => workload(template, "spec.template", false, found),
        }
    }
}
