//! The kinds of objects that are known, with the versions that are served (specification §1.2).

use super::schema::nearest;

/// What is done with objects of a kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Kind {
    /// Enrolled, routed to, judged.
    Pod,
    /// Its labels decide enrolment.
    Namespace,
    /// Labels and addresses.
    Node,
    /// Routed to.
    Service,
    /// Endpoints of Services.
    EndpointSlice,
    /// Known, of no effect: an identity needs no object.
    ServiceAccount,
    /// Of effect where it is the mesh configuration (specification §1.1).
    ConfigMap,
    /// Enforced.
    PeerAuthentication,
    /// Enforced.
    AuthorizationPolicy,
    /// A kind of Istio or of the Gateway API that this version does not enforce, by its place in this module's table.
    NotEnforced(u8),
}

const ISTIO_SECURITY: (&str, &[&str]) = ("security.istio.io", &["v1", "v1beta1"]);
const ISTIO_NETWORKING: (&str, &[&str]) = ("networking.istio.io", &["v1", "v1beta1", "v1alpha3"]);
const GATEWAY: (&str, &[&str]) = ("gateway.networking.k8s.io", &["v1", "v1beta1"]);
const GATEWAY_OLD: (&str, &[&str]) = ("gateway.networking.k8s.io", &["v1", "v1alpha3", "v1alpha2"]);

type Entry = ((&'static str, &'static [&'static str]), &'static str);

const ENFORCED: [(Entry, Kind); 9] = [
    ((("", &["v1"]), "Pod"), Kind::Pod),
    ((("", &["v1"]), "Namespace"), Kind::Namespace),
    ((("", &["v1"]), "Node"), Kind::Node),
    ((("", &["v1"]), "Service"), Kind::Service),
    ((("discovery.k8s.io", &["v1"]), "EndpointSlice"), Kind::EndpointSlice),
    ((("", &["v1"]), "ServiceAccount"), Kind::ServiceAccount),
    ((("", &["v1"]), "ConfigMap"), Kind::ConfigMap),
    ((ISTIO_SECURITY, "PeerAuthentication"), Kind::PeerAuthentication),
    ((ISTIO_SECURITY, "AuthorizationPolicy"), Kind::AuthorizationPolicy),
];

/// Accepted, reported, and without effect.
const NOT_ENFORCED: [Entry; 13] = [
    (ISTIO_SECURITY, "RequestAuthentication"),
    (ISTIO_NETWORKING, "Sidecar"),
    (ISTIO_NETWORKING, "ServiceEntry"),
    (ISTIO_NETWORKING, "WorkloadEntry"),
    (ISTIO_NETWORKING, "DestinationRule"),
    (ISTIO_NETWORKING, "VirtualService"),
    (ISTIO_NETWORKING, "Gateway"),
    (ISTIO_NETWORKING, "WorkloadGroup"),
    (GATEWAY, "Gateway"),
    (GATEWAY, "HTTPRoute"),
    (GATEWAY, "GRPCRoute"),
    (GATEWAY_OLD, "TLSRoute"),
    (GATEWAY_OLD, "TCPRoute"),
];

/// One of Istio's own kinds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct IstioKind {
    /// API group.
    pub group: &'static str,
    /// Versions that are served, the one that is stored first; all mean the same (specification §1.2).
    pub versions: &'static [&'static str],
    /// As `kind` spells it.
    pub name: &'static str,
    /// This version enforces it.
    pub enforced: bool,
}

/// Istio's own kinds, in the order of specification §1.2; those of the Gateway API belong to whoever runs its gateways.
pub fn istio() -> impl Iterator<Item = IstioKind> {
    let enforced = ENFORCED.iter().map(|(entry, _)| (entry, true));
    let all = enforced.chain(NOT_ENFORCED.iter().map(|entry| (entry, false)));
    all.filter(|(((group, _), _), _)| group.ends_with(".istio.io"))
        .map(|(((group, versions), name), enforced)| IstioKind { group, versions, name, enforced })
}

/// Why an `apiVersion` and `kind` are not accepted.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct NotServed {
    /// The kind, where group and kind are known and only the version is not.
    pub(super) kind: Option<Kind>,
    /// `apiVersion` or `kind`: the field to mend.
    pub(super) field: &'static str,
    /// What is wrong, and the remedy.
    pub(super) what: String,
}

impl Kind {
    /// By `apiVersion` and `kind`.
    pub(super) fn find(api_version: &str, name: &str) -> Result<Self, NotServed> {
        let (group, version) = api_version.split_once('/').unwrap_or(("", api_version));
        let all = || {
            let rest = NOT_ENFORCED.iter().zip(0u8..).map(|(entry, index)| (entry, Kind::NotEnforced(index)));
            ENFORCED.iter().map(|(entry, kind)| (entry, *kind)).chain(rest)
        };
        if let Some((((_, versions), _), kind)) = all().find(|(((g, _), k), _)| *g == group && *k == name) {
            if versions.contains(&version) {
                return Ok(kind);
            }
            let served: Vec<_> = versions.iter().map(|version| api(group, version)).collect();
            let what = format!("{name} is not served as {api_version}; write {}", served.join(" or "));
            return Err(NotServed { kind: Some(kind), field: "apiVersion", what });
        }
        // The kind exists in another group, or the group has no such kind, or neither is known.
        if let Some((((group, versions), _), _)) = all().find(|((_, k), _)| *k == name) {
            let right = versions.first().map_or_else(String::new, |version| api(group, version));
            let what = format!("{api_version} has no kind {name}; did you mean {right}?");
            return Err(NotServed { kind: None, field: "apiVersion", what });
        }
        let what = match nearest(name, all().map(|((_, kind), _)| *kind)) {
            Some(near) => format!("unknown kind {name}; did you mean {near}?"),
            None => format!("kind {name} of {api_version} is not read from a folder of manifests; remove it"),
        };
        Err(NotServed { kind: None, field: "kind", what })
    }

    /// As `kind` spells it.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Pod => "Pod",
            Self::Namespace => "Namespace",
            Self::Node => "Node",
            Self::Service => "Service",
            Self::EndpointSlice => "EndpointSlice",
            Self::ServiceAccount => "ServiceAccount",
            Self::ConfigMap => "ConfigMap",
            Self::PeerAuthentication => "PeerAuthentication",
            Self::AuthorizationPolicy => "AuthorizationPolicy",
            Self::NotEnforced(index) => NOT_ENFORCED[usize::from(index)].1,
        }
    }

    /// Group and kind, of a kind that this version does not enforce.
    pub(super) fn not_enforced(self) -> Option<(&'static str, &'static str)> {
        let Self::NotEnforced(index) = self else { return None };
        let ((group, _), kind) = NOT_ENFORCED[usize::from(index)];
        Some((group, kind))
    }

    /// Whether objects of this kind live in a namespace.
    pub(super) fn is_namespaced(self) -> bool {
        !matches!(self, Self::Namespace | Self::Node)
    }
}

fn api(group: &str, version: &str) -> String {
    if group.is_empty() { version.to_owned() } else { format!("{group}/{version}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Specification §1.2.
    #[test]
    fn every_served_version_is_accepted_and_no_other() {
        for (api_version, kind, served) in [
            ("v1", "Pod", true),
            ("v2", "Pod", false),
            ("discovery.k8s.io/v1", "EndpointSlice", true),
            ("discovery.k8s.io/v1beta1", "EndpointSlice", false),
            ("security.istio.io/v1", "PeerAuthentication", true),
            ("security.istio.io/v1beta1", "PeerAuthentication", true),
            ("security.istio.io/v1alpha1", "PeerAuthentication", false),
            ("security.istio.io/v1alpha3", "AuthorizationPolicy", false),
            ("networking.istio.io/v1alpha3", "Sidecar", true),
            ("networking.istio.io/v1beta1", "Gateway", true),
            ("gateway.networking.k8s.io/v1", "Gateway", true),
            ("gateway.networking.k8s.io/v1alpha2", "TCPRoute", true),
            ("gateway.networking.k8s.io/v1alpha2", "HTTPRoute", false),
        ] {
            assert_eq!(Kind::find(api_version, kind).is_ok(), served, "{api_version} {kind}");
        }
    }

    #[test]
    fn the_nearest_known_name_is_given() {
        for (api_version, kind, field, words) in [
            ("security.istio.io/v1alpha1", "PeerAuthentication", "apiVersion", "write security.istio.io/v1 or"),
            ("securty.istio.io/v1", "PeerAuthentication", "apiVersion", "did you mean security.istio.io/v1?"),
            ("networking.istio.io/v1", "PeerAuthentication", "apiVersion", "did you mean security.istio.io/v1?"),
            ("security.istio.io/v1", "PeerAuthentiction", "kind", "did you mean PeerAuthentication?"),
            ("v1", "pod", "kind", "did you mean Pod?"),
            ("apps/v1", "Deployment", "kind", "not read from a folder"),
        ] {
            let error = Kind::find(api_version, kind).expect_err("not served");
            assert_eq!(error.field, field, "{error:?}");
            assert!(error.what.contains(words), "{error:?}");
        }
        assert_eq!(
            Kind::find("security.istio.io/v1alpha1", "PeerAuthentication").expect_err("not served").kind,
            Some(Kind::PeerAuthentication)
        );
    }
}
