//! Rules of the Gateway API's Gateway and routes (specification §12.3), as its own validation has them.

use std::collections::BTreeSet;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use super::{
    Found, Strict,
    gateway::{
        GatewaySpec, GrpcFilter, GrpcRouteSpec, HttpFilter, HttpRouteSpec, L4Rule, ParentRef, PathMatchType,
        TcpRouteSpec, TlsRouteSpec,
    },
    is_dns_name,
};

fn missing(text: &str, path: String, found: &mut Found) {
    if text.is_empty() {
        found.wrong(path, "is missing; write it");
    }
}

fn hostnames(names: &[String], found: &mut Found) {
    for (index, name) in names.iter().enumerate() {
        let path = format!("spec.hostnames[{index}]");
        if name.parse::<std::net::IpAddr>().is_ok() || !is_dns_name(name, true) {
            found.wrong(path, format!("{name:?} is not a DNS name; write a name, or \"*.suffix\""));
        }
    }
}

fn parents(parents: &[ParentRef], found: &mut Found) {
    for (index, parent) in parents.iter().enumerate() {
        let path = format!("spec.parentRefs[{index}]");
        missing(&parent.name, format!("{path}.name"), found);
        if parent.kind.as_deref() == Some("Service") && parent.group.as_deref() != Some("") {
            let what = "must be \"\" for a Service; without it the group is gateway.networking.k8s.io, which has no \
                        Services";
            found.wrong(format!("{path}.group"), what);
        }
    }
}

/// What the references of a rule have in common, as (name, kind, group, has a port, weight).
struct Backend<'a> {
    name: &'a str,
    service: bool,
    port: bool,
    weight: Option<i32>,
}

macro_rules! backend {
    ($of:expr) => {
        Backend {
            name: &$of.name,
            service: $of.kind.as_deref().is_none_or(|kind| kind == "Service")
                && $of.group.as_deref().is_none_or(str::is_empty),
            port: $of.port.is_some(),
            weight: $of.weight,
        }
    };
}

fn backends<'a>(backends: impl Iterator<Item = Backend<'a>>, path: &str, found: &mut Found) {
    for (index, backend) in backends.enumerate() {
        let path = format!("{path}.backendRefs[{index}]");
        missing(backend.name, format!("{path}.name"), found);
        if backend.service && !backend.port {
            found.wrong(format!("{path}.port"), "is missing; a Service is called on a port");
        }
        if let Some(weight) = backend.weight.filter(|weight| !(0..=1_000_000).contains(weight)) {
            found.wrong(format!("{path}.weight"), format!("{weight} is no weight; write 0 to 1000000"));
        }
    }
}

impl Strict for HttpRouteSpec {
    fn check(&self, _: &ObjectMeta, found: &mut Found) {
        parents(&self.parent_refs, found);
        hostnames(&self.hostnames, found);
        for (index, rule) in self.rules.iter().enumerate() {
            let path = format!("spec.rules[{index}]");
            backends(rule.backend_refs.iter().map(|of| backend!(of)), &path, found);
            for (number, one) in rule.matches.iter().enumerate() {
                let path = format!("{path}.matches[{number}]");
                if let Some((kind, value)) = one.path.as_ref().map(|of| (of.r#type, of.value.as_deref())) {
                    let relative = value.is_some_and(|value| !value.starts_with('/'));
                    if relative && kind != Some(PathMatchType::RegularExpression) {
                        found.wrong(format!("{path}.path.value"), "must begin with \"/\"");
                    }
                }
                for (kind, headers) in [("headers", &one.headers), ("queryParams", &one.query_params)] {
                    for (index, header) in headers.iter().enumerate() {
                        missing(&header.name, format!("{path}.{kind}[{index}].name"), found);
                        missing(&header.value, format!("{path}.{kind}[{index}].value"), found);
                    }
                }
            }
            let of_rule = rule.filters.iter().enumerate().map(|(n, filter)| (format!("{path}.filters[{n}]"), filter));
            let of_backends = rule.backend_refs.iter().enumerate().flat_map(|(b, of)| {
                let path = &path;
                let place = move |n: usize| format!("{path}.backendRefs[{b}].filters[{n}]");
                of.filters.iter().enumerate().map(move |(n, filter)| (place(n), filter))
            });
            for (path, filter) in of_rule.chain(of_backends) {
                http_filter(filter, &path, found);
            }
            let redirects = rule.filters.iter().any(|filter| filter.request_redirect.is_some());
            if redirects && !rule.backend_refs.is_empty() {
                found.wrong(format!("{path}.backendRefs"), "cannot stand beside a RequestRedirect; remove one of them");
            }
        }
    }
}

fn one_of(kind: &str, known: &[(&str, &str, bool)], path: &str, found: &mut Found) {
    let Some((_, field, given)) = known.iter().find(|(name, _, _)| *name == kind) else {
        let names: Vec<&str> = known.iter().map(|(name, _, _)| *name).collect();
        let shown = if kind.is_empty() { "is missing".to_owned() } else { format!("{kind:?} is no filter") };
        found.wrong(format!("{path}.type"), format!("{shown}; write one of {}", names.join(", ")));
        return;
    };
    if !given {
        found.wrong(format!("{path}.{field}"), format!("is missing; type {kind} needs it"));
    }
    for (_, other, _) in known.iter().filter(|(_, other, given)| *given && other != field) {
        found.wrong(format!("{path}.{other}"), format!("does not go with type {kind}; remove it"));
    }
}

fn http_filter(filter: &HttpFilter, path: &str, found: &mut Found) {
    let known = [
        ("RequestHeaderModifier", "requestHeaderModifier", filter.request_header_modifier.is_some()),
        ("ResponseHeaderModifier", "responseHeaderModifier", filter.response_header_modifier.is_some()),
        ("RequestMirror", "requestMirror", filter.request_mirror.is_some()),
        ("RequestRedirect", "requestRedirect", filter.request_redirect.is_some()),
        ("URLRewrite", "urlRewrite", filter.url_rewrite.is_some()),
        ("CORS", "cors", filter.cors.is_some()),
        ("ExternalAuth", "externalAuth", filter.external_auth.is_some()),
        ("ExtensionRef", "extensionRef", filter.extension_ref.is_some()),
    ];
    one_of(&filter.r#type, &known, path, found);
}

fn grpc_filter(filter: &GrpcFilter, path: &str, found: &mut Found) {
    let known = [
        ("RequestHeaderModifier", "requestHeaderModifier", filter.request_header_modifier.is_some()),
        ("ResponseHeaderModifier", "responseHeaderModifier", filter.response_header_modifier.is_some()),
        ("RequestMirror", "requestMirror", filter.request_mirror.is_some()),
        ("ExtensionRef", "extensionRef", filter.extension_ref.is_some()),
    ];
    one_of(&filter.r#type, &known, path, found);
}

impl Strict for GrpcRouteSpec {
    fn check(&self, _: &ObjectMeta, found: &mut Found) {
        parents(&self.parent_refs, found);
        hostnames(&self.hostnames, found);
        for (index, rule) in self.rules.iter().enumerate() {
            let path = format!("spec.rules[{index}]");
            backends(rule.backend_refs.iter().map(|of| backend!(of)), &path, found);
            for (number, filter) in rule.filters.iter().enumerate() {
                grpc_filter(filter, &format!("{path}.filters[{number}]"), found);
            }
            for (number, one) in rule.matches.iter().enumerate() {
                let path = format!("{path}.matches[{number}]");
                if one.method.as_ref().is_some_and(|method| method.service.is_none() && method.method.is_none()) {
                    found.wrong(format!("{path}.method"), "needs service, method or both");
                }
                for (index, header) in one.headers.iter().enumerate() {
                    missing(&header.name, format!("{path}.headers[{index}].name"), found);
                    missing(&header.value, format!("{path}.headers[{index}].value"), found);
                }
            }
        }
    }
}

fn l4(rules: &[L4Rule], found: &mut Found) {
    if rules.is_empty() {
        found.wrong("spec.rules", "is missing; write one rule with backendRefs");
    }
    for (index, rule) in rules.iter().enumerate() {
        let path = format!("spec.rules[{index}]");
        if rule.backend_refs.is_empty() {
            found.wrong(format!("{path}.backendRefs"), "is missing; write at least one");
        }
        backends(rule.backend_refs.iter().map(|of| backend!(of)), &path, found);
    }
}

impl Strict for TlsRouteSpec {
    fn check(&self, _: &ObjectMeta, found: &mut Found) {
        parents(&self.parent_refs, found);
        hostnames(&self.hostnames, found);
        l4(&self.rules, found);
    }
}

impl Strict for TcpRouteSpec {
    fn check(&self, _: &ObjectMeta, found: &mut Found) {
        parents(&self.parent_refs, found);
        l4(&self.rules, found);
    }
}

impl Strict for GatewaySpec {
    fn check(&self, _: &ObjectMeta, found: &mut Found) {
        missing(&self.gateway_class_name, "spec.gatewayClassName".to_owned(), found);
        if self.listeners.is_empty() {
            found.wrong("spec.listeners", "is missing; write at least one");
        }
        let mut names = BTreeSet::new();
        for (index, listener) in self.listeners.iter().enumerate() {
            let path = format!("spec.listeners[{index}]");
            missing(&listener.name, format!("{path}.name"), found);
            if !listener.name.is_empty() && !names.insert(&listener.name) {
                found.wrong(format!("{path}.name"), format!("{:?} is there already; each name once", listener.name));
            }
            missing(&listener.protocol, format!("{path}.protocol"), found);
            if listener.port.is_none() {
                found.wrong(format!("{path}.port"), "is missing; write 1 to 65535");
            }
            if let Some(name) = listener.hostname.as_deref().filter(|name| !is_dns_name(name, true)) {
                found.wrong(format!("{path}.hostname"), format!("{name:?} is not a DNS name"));
            }
            let plain = matches!(&*listener.protocol, "HTTP" | "TCP" | "UDP");
            if plain && listener.tls.is_some() {
                found.wrong(format!("{path}.tls"), format!("does not go with protocol {}", listener.protocol));
            }
            if listener.protocol == "HTTPS" && listener.tls.is_none() {
                found.wrong(format!("{path}.tls"), "is missing; protocol HTTPS needs it");
            }
        }
    }
}
