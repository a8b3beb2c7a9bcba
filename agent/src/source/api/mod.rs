//! The resources of Istio and of the Gateway API as their users write them, each with what its schema cannot say.
//!
//! The shapes (`networking`, `security`, `gateway`) are strict: a field that is not there is unknown ([C.10]). A kind that
//! this version enforces has its types in `crd` and its rules in `convert`; the others are checked here, so that
//! `culvert validate` speaks about all of specification §1.2 and a later version can take the same types.
//!
//! `definitions` makes the CustomResourceDefinitions of Istio's kinds from the same shapes. What they say beyond the types is
//! in the shapes' `extend`, and is never more than what Istio's own definitions say: what those accept, ours accept.
//!
//! | word | who reads it | meaning |
//! |---|---|---|
//! | `x-at-most-one` | both | groups of fields, of each of which one may be there |
//! | `x-required` | `definitions` | fields that the API server misses; where decoding does, a rule here says so with its remedy |
//! | `x-lax` | `definitions` | the API server takes any number or text here, as with Istio's definitions; decoding does not |
//! | `x-each` | `definitions` | what holds for each item of a list, or value of a map |
//! | `minItems`, `x-kubernetes-validations` (CEL) and the like | `definitions` | as the API server understands them |

use std::sync::LazyLock;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use schemars::{JsonSchema, Schema as JsonShape, SchemaGenerator, json_schema};
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::{Map, Value as Json};

use super::{
    convert::Wrong,
    crd::{Anything, Document},
    schema::Schema,
};

mod destination_rule;
pub(super) mod gateway;
pub(super) mod networking;
mod request_authentication;
mod routes;
pub(super) mod security;
mod service_entry;
mod sidecar;
mod virtual_service;

pub(super) use destination_rule::{FullHost, full_host};

/// Declares the shape of a message: every field may be absent, and what must be there is said by its rules.
macro_rules! message {
    ($(#[$attribute:meta])* $name:ident { $($(#[$of_field:meta])* $field:ident: $type:ty),* $(,)? }) => {
        #[derive(Clone, Debug, Default, PartialEq, serde::Deserialize, schemars::JsonSchema)]
        #[serde(rename_all = "camelCase", default)]
        $(#[$attribute])*
        pub(in crate::source) struct $name {
            $($(#[$of_field])* pub(in crate::source) $field: $type,)*
        }
    };
}

/// Declares an enumeration by its words; the first is what an absent field means.
macro_rules! words {
    ($(#[$attribute:meta])* $name:ident { $first:ident = $first_word:literal $(, $variant:ident = $word:literal)* $(,)? }) => {
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Deserialize, schemars::JsonSchema)]
        #[schemars(inline)]
        $(#[$attribute])*
        pub(in crate::source) enum $name {
            #[default]
            #[serde(rename = $first_word)]
            $first,
            $(#[serde(rename = $word)] $variant,)*
        }
    };
}

pub(super) use {message, words};

/// A duration as the API writes it, `10s` or `1m30s`; its form is checked with the schema.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub(super) struct Duration(pub(super) String);

impl JsonSchema for Duration {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Duration".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> JsonShape {
        json_schema!({"type": "string", "format": "duration"})
    }
}

/// A TCP or UDP port, 1 to 65535.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
pub(super) struct Port(pub(super) u16);

impl JsonSchema for Port {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Port".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> JsonShape {
        json_schema!({"type": "integer", "minimum": 1, "maximum": 65535})
    }
}

/// What the rules of a kind find in one object.
#[derive(Debug, Default)]
pub(super) struct Found {
    /// What makes it invalid.
    pub(super) wrong: Vec<Wrong>,
    /// What is accepted, but does not do what it seems to.
    pub(super) warnings: Vec<Wrong>,
}

impl Found {
    fn wrong(&mut self, path: impl Into<String>, what: impl Into<String>) {
        self.wrong.push(Wrong::new(path, what));
    }

    fn warn(&mut self, path: impl Into<String>, what: impl Into<String>) {
        self.warnings.push(Wrong::new(path, what));
    }
}

/// The spec of a kind that this version does not enforce.
trait Strict: DeserializeOwned + JsonSchema {
    /// The rules between its fields.
    fn check(&self, meta: &ObjectMeta, found: &mut Found);
}

/// A spec that rules between several objects look at.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Spec {
    DestinationRule(Box<networking::DestinationRuleSpec>),
    ServiceEntry(Box<networking::ServiceEntrySpec>),
}

/// The object as it was written; `spec` may be absent.
#[derive(Deserialize)]
struct Written<S> {
    metadata: ObjectMeta,
    spec: S,
}

/// Schema of a kind that is not enforced, by group and kind.
pub(super) fn schema(group: &str, kind: &str) -> &'static Schema {
    macro_rules! of {
        ($type:ty) => {{
            static SCHEMA: LazyLock<Schema> =
                LazyLock::new(|| Schema::of::<Document<$type>>().with_free_field("status"));
            &SCHEMA
        }};
    }
    match (group, kind) {
        ("security.istio.io", "RequestAuthentication") => of!(security::RequestAuthenticationSpec),
        ("networking.istio.io", "Sidecar") => of!(networking::SidecarSpec),
        ("networking.istio.io", "ServiceEntry") => of!(networking::ServiceEntrySpec),
        ("networking.istio.io", "WorkloadEntry") => of!(networking::WorkloadEntrySpec),
        ("networking.istio.io", "WorkloadGroup") => of!(networking::WorkloadGroupSpec),
        ("networking.istio.io", "DestinationRule") => of!(networking::DestinationRuleSpec),
        ("networking.istio.io", "VirtualService") => of!(networking::VirtualServiceSpec),
        ("networking.istio.io", "Gateway") => of!(networking::GatewaySpec),
        ("gateway.networking.k8s.io", "Gateway") => of!(gateway::GatewaySpec),
        ("gateway.networking.k8s.io", "HTTPRoute") => of!(gateway::HttpRouteSpec),
        ("gateway.networking.k8s.io", "GRPCRoute") => of!(gateway::GrpcRouteSpec),
        ("gateway.networking.k8s.io", "TLSRoute") => of!(gateway::TlsRouteSpec),
        ("gateway.networking.k8s.io", "TCPRoute") => of!(gateway::TcpRouteSpec),
        _ => of!(Anything),
    }
}

/// Applies the rules of a kind that is not enforced; `json` has passed its schema.
pub(super) fn check(group: &str, kind: &str, json: Json) -> (Found, Option<Spec>) {
    fn checked<S: Strict>(mut json: Json, keep: impl FnOnce(S) -> Option<Spec>) -> (Found, Option<Spec>) {
        let mut found = Found::default();
        if let Some(object) = json.as_object_mut() {
            object.entry("spec").or_insert_with(|| Json::Object(Map::new()));
        }
        match serde_json::from_value::<Written<S>>(json) {
            Ok(written) => {
                written.spec.check(&written.metadata, &mut found);
                let spec = keep(written.spec);
                (found, spec)
            }
            // The schema has checked names and types; what is left is text with a form of its own, such as a time.
            Err(error) => {
                found.wrong("", format!("cannot be read: {error}"));
                (found, None)
            }
        }
    }
    match (group, kind) {
        ("security.istio.io", "RequestAuthentication") => {
            checked::<security::RequestAuthenticationSpec>(json, |_| None)
        }
        ("networking.istio.io", "Sidecar") => checked::<networking::SidecarSpec>(json, |_| None),
        ("networking.istio.io", "ServiceEntry") => {
            checked::<networking::ServiceEntrySpec>(json, |spec| Some(Spec::ServiceEntry(Box::new(spec))))
        }
        ("networking.istio.io", "WorkloadEntry") => checked::<networking::WorkloadEntrySpec>(json, |_| None),
        ("networking.istio.io", "WorkloadGroup") => checked::<networking::WorkloadGroupSpec>(json, |_| None),
        ("networking.istio.io", "DestinationRule") => {
            checked::<networking::DestinationRuleSpec>(json, |spec| Some(Spec::DestinationRule(Box::new(spec))))
        }
        ("networking.istio.io", "VirtualService") => checked::<networking::VirtualServiceSpec>(json, |_| None),
        ("networking.istio.io", "Gateway") => checked::<networking::GatewaySpec>(json, |_| None),
        ("gateway.networking.k8s.io", "Gateway") => checked::<gateway::GatewaySpec>(json, |_| None),
        ("gateway.networking.k8s.io", "HTTPRoute") => checked::<gateway::HttpRouteSpec>(json, |_| None),
        ("gateway.networking.k8s.io", "GRPCRoute") => checked::<gateway::GrpcRouteSpec>(json, |_| None),
        ("gateway.networking.k8s.io", "TLSRoute") => checked::<gateway::TlsRouteSpec>(json, |_| None),
        ("gateway.networking.k8s.io", "TCPRoute") => checked::<gateway::TcpRouteSpec>(json, |_| None),
        _ => (Found::default(), None),
    }
}

/// Whether a text is a DNS name, in the letters that the API takes; a leading `*.` where `wildcard` says so.
fn is_dns_name(text: &str, wildcard: bool) -> bool {
    let text = if wildcard { text.strip_prefix("*.").unwrap_or(text) } else { text };
    let label = |label: &str| {
        let inner = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        (1..=63).contains(&label.len()) && label.chars().all(inner) && !label.starts_with('-') && !label.ends_with('-')
    };
    text.len() <= 253 && text.strip_suffix('.').unwrap_or(text).split('.').all(label)
}

fn is_address(text: &str) -> bool {
    text.parse::<std::net::IpAddr>().is_ok()
}

/// An address or a CIDR.
fn is_network(text: &str) -> bool {
    is_address(text) || text.parse::<ipnet::IpNet>().is_ok()
}

/// `exportTo` (specification §9.2 [SC.7], §11.4).
fn export_to(export_to: &[String], found: &mut Found) {
    for (index, value) in export_to.iter().enumerate() {
        let path = format!("spec.exportTo[{index}]");
        match value.as_str() {
            "*" | "~" if export_to.len() > 1 => {
                found.wrong(path, format!("{value:?} excludes other values; write it alone, or remove it"));
            }
            "*" | "." | "~" => {}
            name if is_dns_name(name, false) && !name.contains('.') => {}
            other => found.wrong(path, format!("{other:?} is not a namespace; write a name, \".\" or \"*\"")),
        }
    }
}

#[cfg(test)]
mod tests;
