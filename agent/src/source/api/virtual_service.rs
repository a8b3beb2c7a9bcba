//! Rules of a VirtualService and of Istio's Gateway (specification §12.1, §12.2).

use std::collections::BTreeSet;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use super::{
    Found, Strict, export_to, is_address, is_dns_name, is_network,
    networking::{
        Destination, Fault, GatewaySpec, HttpRoute, Percent, Server, ServerTlsMode, TlsRoute, VirtualServiceSpec,
        WeightedDestination,
    },
    service_entry::protocol,
};

impl Strict for VirtualServiceSpec {
    fn check(&self, _: &ObjectMeta, found: &mut Found) {
        let delegated = self.hosts.is_empty();
        if delegated && (self.http.is_empty() || !self.gateways.is_empty()) {
            found.wrong("spec.hosts", "is missing; write at least one host (only a delegate of another one has none)");
        }
        for (index, host) in self.hosts.iter().enumerate() {
            if host != "*" && !is_dns_name(host, true) && !is_network(host) {
                let what = format!("{host:?} is not a DNS name; write a name, or \"*.suffix\"");
                found.wrong(format!("spec.hosts[{index}]"), what);
            }
        }
        // [VS.1]: absent means the mesh.
        let in_mesh = self.gateways.is_empty() || self.gateways.iter().any(|gateway| gateway == "mesh");
        if in_mesh && let Some(index) = self.hosts.iter().position(|host| host == "*") {
            let what = "\"*\" cannot be a host in the mesh; write names, or name gateways without mesh";
            found.wrong(format!("spec.hosts[{index}]"), what);
        }
        if self.http.is_empty() && self.tls.is_empty() && self.tcp.is_empty() {
            found.wrong("spec", "has no http, tls nor tcp routes; write one, or remove the object");
        }
        export_to(&self.export_to, found);
        for (index, route) in self.http.iter().enumerate() {
            http(route, &format!("spec.http[{index}]"), found);
        }
        for (index, route) in self.tls.iter().enumerate() {
            self.tls(route, &format!("spec.tls[{index}]"), found);
        }
        for (index, route) in self.tcp.iter().enumerate() {
            let path = format!("spec.tcp[{index}]");
            for (number, one) in route.r#match.iter().enumerate() {
                subnets(&one.destination_subnets, &format!("{path}.match[{number}].destinationSubnets"), found);
            }
            routes(&route.route, &path, found);
        }
    }
}

impl VirtualServiceSpec {
    fn tls(&self, route: &TlsRoute, path: &str, found: &mut Found) {
        if route.r#match.is_empty() {
            found.wrong(format!("{path}.match"), "is missing; a TLS route says which sniHosts it is for");
        }
        for (index, one) in route.r#match.iter().enumerate() {
            let path = format!("{path}.match[{index}]");
            if one.sni_hosts.is_empty() {
                found.wrong(format!("{path}.sniHosts"), "is missing; write at least one of spec.hosts");
            }
            for (number, sni) in one.sni_hosts.iter().enumerate() {
                if !self.hosts.iter().any(|host| covers(host, sni)) {
                    let what = format!("{sni:?} is not among spec.hosts; add it there, or write one of them");
                    found.wrong(format!("{path}.sniHosts[{number}]"), what);
                }
            }
            subnets(&one.destination_subnets, &format!("{path}.destinationSubnets"), found);
        }
        routes(&route.route, path, found);
    }
}

/// Whether a host, possibly a wildcard, is or includes `name`.
fn covers(host: &str, name: &str) -> bool {
    host == name
        || host == "*"
        || host.strip_prefix('*').is_some_and(|suffix| name.ends_with(suffix) && name.len() > suffix.len())
}

fn subnets(subnets: &[String], path: &str, found: &mut Found) {
    for (index, subnet) in subnets.iter().enumerate().filter(|(_, subnet)| !is_network(subnet)) {
        found.wrong(format!("{path}[{index}]"), format!("{subnet:?} is neither an IP address nor a CIDR"));
    }
}

fn destination(destination: Option<&Destination>, path: &str, found: &mut Found) {
    match destination.map(|destination| destination.host.as_str()) {
        None => found.wrong(path, "is missing; write where to, as in {host: NAME}"),
        Some("") => found.wrong(format!("{path}.host"), "is missing; write the service's name"),
        Some(host) if is_address(host) || is_dns_name(host, false) => {}
        Some(host) => found.wrong(format!("{path}.host"), format!("{host:?} is not the name of a service")),
    }
}

fn weights(weights: impl Iterator<Item = Option<i32>>, path: &str, found: &mut Found) {
    let (mut sum, mut count) = (0i64, 0);
    for (index, weight) in weights.enumerate() {
        let weight = weight.unwrap_or_default();
        if weight < 0 {
            found.wrong(format!("{path}[{index}].weight"), format!("{weight} is below zero; write 0 or more"));
        }
        sum += i64::from(weight.max(0));
        count += 1;
    }
    if count > 1 && sum == 0 {
        let what = "none of its destinations has a weight above 0, so that nothing gets any traffic; write weights";
        found.wrong(path, what);
    }
}

fn routes(routes: &[WeightedDestination], path: &str, found: &mut Found) {
    let path = format!("{path}.route");
    if routes.is_empty() {
        found.wrong(&path, "is missing; write at least one destination");
    }
    for (index, route) in routes.iter().enumerate() {
        destination(route.destination.as_ref(), &format!("{path}[{index}].destination"), found);
    }
    weights(routes.iter().map(|route| route.weight), &path, found);
}

fn http(route: &HttpRoute, path: &str, found: &mut Found) {
    let at = |field: &str| format!("{path}.{field}");
    let answers = [
        ("route", !route.route.is_empty()),
        ("redirect", route.redirect.is_some()),
        ("directResponse", route.direct_response.is_some()),
        ("delegate", route.delegate.is_some()),
    ];
    let given: Vec<&str> = answers.iter().filter(|(_, given)| *given).map(|(name, _)| *name).collect();
    match given[..] {
        [] => found.wrong(path, "says nothing to do; write route, redirect, directResponse or delegate"),
        [_] => {}
        [first, second, ..] => found.wrong(at(second), format!("cannot stand beside {first}; remove one of them")),
    }
    for (index, one) in route.route.iter().enumerate() {
        destination(one.destination.as_ref(), &format!("{path}.route[{index}].destination"), found);
    }
    weights(route.route.iter().map(|one| one.weight), &at("route"), found);
    for (index, one) in route.r#match.iter().enumerate() {
        if one.ignore_uri_case && one.uri.as_ref().is_some_and(|uri| uri.regex.is_some()) {
            let what = "has no effect on a regex; write (?i) in it";
            found.warn(format!("{path}.match[{index}].ignoreUriCase"), what);
        }
    }
    if let Some(retries) = route.retries.as_ref().and_then(|retries| retries.attempts).filter(|n| *n < 0) {
        found.wrong(at("retries.attempts"), format!("{retries} is below zero; write 0 for none"));
    }
    if let Some(fault) = &route.fault {
        http_fault(fault, &at("fault"), found);
    }
    if let Some(mirror) = &route.mirror {
        destination(Some(mirror), &at("mirror"), found);
        if !route.mirrors.is_empty() {
            found.wrong(at("mirror"), "cannot stand beside mirrors; remove one of them");
        }
    }
    for (index, mirror) in route.mirrors.iter().enumerate() {
        destination(mirror.destination.as_ref(), &format!("{path}.mirrors[{index}].destination"), found);
        percent(mirror.percentage.as_ref(), &format!("{path}.mirrors[{index}].percentage"), found);
    }
    percent(route.mirror_percentage.as_ref(), &at("mirrorPercentage"), found);
    if let Some(code) = route.redirect.as_ref().and_then(|redirect| redirect.redirect_code)
        && ![301, 302, 303, 307, 308].contains(&code)
    {
        found.wrong(at("redirect.redirectCode"), format!("{code} is no redirect; write 301, 302, 303, 307 or 308"));
    }
    if let Some(response) = &route.direct_response {
        match response.status {
            Some(200..=599) => {}
            Some(status) => {
                found.wrong(at("directResponse.status"), format!("{status} is no status; write 200 to 599"));
            }
            None => found.wrong(at("directResponse.status"), "is missing; write 200 to 599"),
        }
    }
}

fn http_fault(fault: &Fault, path: &str, found: &mut Found) {
    let mut without = Vec::new();
    if let Some(delay) = &fault.delay {
        percent(delay.percentage.as_ref(), &format!("{path}.delay.percentage"), found);
        if delay.percentage.is_none() && delay.percent.is_none() {
            without.push("delay");
        }
    }
    if let Some(abort) = &fault.abort {
        percent(abort.percentage.as_ref(), &format!("{path}.abort.percentage"), found);
        if let Some(status) = abort.http_status.filter(|status| !(200..=599).contains(status)) {
            found.wrong(format!("{path}.abort.httpStatus"), format!("{status} is no status; write 200 to 599"));
        }
        if abort.percentage.is_none() {
            without.push("abort");
        }
    }
    for kind in without {
        let what = "has no percentage, which means 0: no request is affected; write percentage: {value: 100} (§1.4)";
        found.warn(format!("{path}.{kind}"), what);
    }
}

fn percent(percent: Option<&Percent>, path: &str, found: &mut Found) {
    if let Some(value) = percent.and_then(|percent| percent.value).filter(|value| !(0.0..=100.0).contains(value)) {
        found.wrong(format!("{path}.value"), format!("{value} is not a percentage; write 0 to 100"));
    }
}

impl Strict for GatewaySpec {
    fn check(&self, _: &ObjectMeta, found: &mut Found) {
        if self.servers.is_empty() {
            found.wrong("spec.servers", "is missing; write at least one server");
        }
        let mut names = BTreeSet::new();
        for (index, one) in self.servers.iter().enumerate() {
            let path = format!("spec.servers[{index}]");
            server(one, &path, found);
            let name = one.port.as_ref().map(|port| &*port.name).filter(|name| !name.is_empty());
            if let Some(name) = name.filter(|name| !names.insert(*name)) {
                found.wrong(format!("{path}.port.name"), format!("{name:?} is there already; each name once"));
            }
        }
    }
}

fn server(server: &Server, path: &str, found: &mut Found) {
    let at = |field: &str| format!("{path}.{field}");
    match &server.port {
        None => found.wrong(at("port"), "is missing; write {number, name, protocol}"),
        Some(port) => {
            if port.number.is_none() {
                found.wrong(at("port.number"), "is missing; write 1 to 65535");
            }
            if port.name.is_empty() {
                found.wrong(at("port.name"), "is missing; write a name");
            }
            match port.protocol.as_deref() {
                None | Some("") => found.wrong(at("port.protocol"), "is missing; write HTTP, HTTPS, TLS or TCP"),
                Some(text) => {
                    protocol(port, at("port.protocol"), found);
                    if ["HTTPS", "TLS"].iter().any(|tls| text.eq_ignore_ascii_case(tls)) && server.tls.is_none() {
                        found.wrong(at("tls"), format!("is missing; protocol {text} needs it"));
                    }
                }
            }
        }
    }
    if server.hosts.is_empty() {
        found.wrong(at("hosts"), "is missing; write at least one host, \"*\" for all");
    }
    for (index, host) in server.hosts.iter().enumerate() {
        let (namespace, name) = host.split_once('/').unwrap_or(("*", host));
        let of = matches!(namespace, "*" | ".") || is_dns_name(namespace, false) && !namespace.contains('.');
        if !of || name != "*" && !is_dns_name(name, true) {
            let what = format!("{host:?} is not a host; write a name, \"*.suffix\", \"*\", or NAMESPACE/ before it");
            found.wrong(format!("{path}.hosts[{index}]"), what);
        }
    }
    let Some(tls) = &server.tls else { return };
    let given = |text: &Option<String>| text.as_deref().is_some_and(|text| !text.is_empty());
    let by_name = given(&tls.credential_name) || !tls.credential_names.is_empty();
    let by_file = given(&tls.server_certificate) && given(&tls.private_key) || !tls.tls_certificates.is_empty();
    match tls.mode {
        ServerTlsMode::Simple | ServerTlsMode::Mutual | ServerTlsMode::OptionalMutual if !by_name && !by_file => {
            let what = "needs a certificate; write credentialName, or serverCertificate and privateKey";
            found.wrong(at("tls"), what);
        }
        ServerTlsMode::Mutual | ServerTlsMode::OptionalMutual if !by_name && !given(&tls.ca_certificates) => {
            found.wrong(at("tls.caCertificates"), "is missing; it says whose client certificates are taken");
        }
        ServerTlsMode::Passthrough
        | ServerTlsMode::AutoPassthrough
        | ServerTlsMode::IstioMutual
        | ServerTlsMode::Simple
        | ServerTlsMode::Mutual
        | ServerTlsMode::OptionalMutual => {}
    }
}
