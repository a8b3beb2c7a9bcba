//! Istio's resources as Rust types, where this version enforces them.
//!
//! Manifests are decoded into them, and `definitions` makes the CustomResourceDefinitions from them; what only the latter
//! are to say stands in their `extend` (`api` has the words of it).

use std::collections::BTreeMap;

use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Spec of a PeerAuthentication (`security.istio.io`; all served versions mean the same, specification §1.2).
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(group = "security.istio.io", version = "v1", kind = "PeerAuthentication", namespaced)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = [{
    "rule": "!has(self.portLevelMtls) || has(self.selector) && has(self.selector.matchLabels) \
             && size(self.selector.matchLabels) > 0",
    "message": "portLevelMtls needs a selector with at least one label; add selector.matchLabels, or remove it [PA.14]",
}]))]
pub struct PeerAuthenticationSpec {
    /// The pods it is about; absent or empty: all in scope ([C.4]).
    pub selector: Option<WorkloadSelector>,
    /// Mode of all ports.
    pub mtls: Option<MutualTls>,
    /// Modes by port of the workload.
    #[schemars(extend("minProperties" = 1, "x-kubernetes-validations" = [{
        "rule": "self.all(port, int(port) > 0 && int(port) <= 65535)",
        "message": "each key is a port of the workload; write a number from 1 to 65535",
    }]))]
    pub port_level_mtls: Option<BTreeMap<String, MutualTls>>,
}

/// Labels that a pod must have, all of them ([C.3]).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct WorkloadSelector {
    /// Label to value.
    #[schemars(extend(
        "maxProperties" = 4096,
        "x-kubernetes-validations" = [{
            "rule": "self.all(label, label != '' && !label.contains('*'))",
            "message": "labels are compared as they are written; write their names without \"*\" [C.3]",
        }],
        "x-each" = {
            "maxLength": 63,
            "x-kubernetes-validations": [{
                "rule": "!self.contains('*')",
                "message": "labels are compared as they are written; write their values without \"*\" [C.3]",
            }],
        },
    ))]
    pub match_labels: Option<BTreeMap<String, String>>,
}

/// A mode; `{}` is UNSET (specification §1.4).
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct MutualTls {
    /// The mode.
    pub mode: Option<MutualTlsMode>,
}

/// Modes, spelled as Istio spells them; values are case-sensitive ([C.9]).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "UPPERCASE")]
#[schemars(inline)]
pub enum MutualTlsMode {
    /// Inherit.
    Unset,
    /// Plaintext allowed, explicitly.
    Disable,
    /// Both.
    Permissive,
    /// Tunnels only.
    Strict,
}

/// Spec of an AuthorizationPolicy (`security.istio.io`; all served versions mean the same, specification §1.2).
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(group = "security.istio.io", version = "v1", kind = "AuthorizationPolicy", namespaced)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = [{
    "rule": "(has(self.selector) ? 1 : 0) + (has(self.targetRef) ? 1 : 0) \
             + (has(self.targetRefs) && size(self.targetRefs) > 0 ? 1 : 0) <= 1",
    "message": "has more than one of selector, targetRef and targetRefs; keep one [AP.2]",
}]))]
pub struct AuthorizationPolicySpec {
    /// The pods it is about; absent or empty: all in scope ([C.4]).
    pub selector: Option<WorkloadSelector>,
    /// What it is attached to instead of pods ([AP.2]); the older form, for one.
    pub target_ref: Option<PolicyTargetReference>,
    /// What it is attached to instead of pods ([AP.2]).
    #[schemars(extend("maxItems" = 16))]
    pub target_refs: Option<Vec<PolicyTargetReference>>,
    /// What to do with what matches; ALLOW where absent.
    pub action: Option<AuthorizationAction>,
    /// The authorizer of a CUSTOM policy.
    pub provider: Option<ExtensionProvider>,
    /// One of them must match.
    #[schemars(extend("maxItems" = 512))]
    pub rules: Option<Vec<AuthorizationRule>>,
}

/// What a policy for HTTP proxies is attached to.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PolicyTargetReference {
    /// API group of the target; empty for core.
    pub group: Option<String>,
    /// Kind of the target.
    pub kind: String,
    /// Name of the target.
    pub name: String,
    /// Namespace of the target; the policy's own.
    pub namespace: Option<String>,
}

/// Actions, spelled as Istio spells them ([C.9]).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "UPPERCASE")]
#[schemars(inline)]
pub enum AuthorizationAction {
    /// Allow what matches.
    Allow,
    /// Deny what matches.
    Deny,
    /// Report what matches.
    Audit,
    /// Ask an external authorizer.
    Custom,
}

/// An external authorizer.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ExtensionProvider {
    /// Its name in the mesh configuration.
    pub name: Option<String>,
}

/// One rule of an AuthorizationPolicy ([AP.8]).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AuthorizationRule {
    /// One of them must match; absent: any.
    #[schemars(extend("maxItems" = 512))]
    pub from: Option<Vec<RuleFrom>>,
    /// One of them must match; absent: any.
    pub to: Option<Vec<RuleTo>>,
    /// All of them must match.
    pub when: Option<Vec<RuleCondition>>,
}

/// An item of `from`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RuleFrom {
    /// The source.
    pub source: Option<RuleSource>,
}

/// An item of `to`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RuleTo {
    /// The operation.
    pub operation: Option<RuleOperation>,
}

/// Who connects; all fields must match, and one value of each (specification §6.3).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = [{
    "rule": "!has(self.serviceAccounts) && !has(self.notServiceAccounts) || !has(self.principals) \
             && !has(self.notPrincipals) && !has(self.namespaces) && !has(self.notNamespaces)",
    "message": "serviceAccounts cannot stand beside principals or namespaces; keep one of them (§6.6)",
}]))]
pub struct RuleSource {
    /// Identities, without `spiffe://`.
    pub principals: Option<Vec<String>>,
    /// Not these identities.
    pub not_principals: Option<Vec<String>>,
    /// Identities of requests; needs an HTTP proxy.
    pub request_principals: Option<Vec<String>>,
    /// Not these identities of requests; needs an HTTP proxy.
    pub not_request_principals: Option<Vec<String>>,
    /// Namespaces of the identity.
    pub namespaces: Option<Vec<String>>,
    /// Not these namespaces.
    pub not_namespaces: Option<Vec<String>>,
    /// `namespace/name` of service accounts, or names in the policy's own namespace.
    #[schemars(extend("maxItems" = 16))]
    pub service_accounts: Option<Vec<String>>,
    /// Not these service accounts.
    #[schemars(extend("maxItems" = 16))]
    pub not_service_accounts: Option<Vec<String>>,
    /// Trust domains of the identity.
    pub trust_domains: Option<Vec<String>>,
    /// Not these trust domains.
    pub not_trust_domains: Option<Vec<String>>,
    /// Addresses or CIDRs.
    pub ip_blocks: Option<Vec<String>>,
    /// Not these addresses.
    pub not_ip_blocks: Option<Vec<String>>,
    /// Addresses that a proxy has forwarded; needs an HTTP proxy.
    pub remote_ip_blocks: Option<Vec<String>>,
    /// Not these addresses that a proxy has forwarded; needs an HTTP proxy.
    pub not_remote_ip_blocks: Option<Vec<String>>,
}

/// What is asked for; all fields must match, and one value of each (specification §6.3).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RuleOperation {
    /// Names of HTTP hosts; needs an HTTP proxy.
    pub hosts: Option<Vec<String>>,
    /// Not these HTTP hosts; needs an HTTP proxy.
    pub not_hosts: Option<Vec<String>>,
    /// The workload's ports, as decimal strings.
    pub ports: Option<Vec<String>>,
    /// Not these ports.
    pub not_ports: Option<Vec<String>>,
    /// HTTP methods; needs an HTTP proxy.
    pub methods: Option<Vec<String>>,
    /// Not these HTTP methods; needs an HTTP proxy.
    pub not_methods: Option<Vec<String>>,
    /// HTTP paths; needs an HTTP proxy.
    pub paths: Option<Vec<String>>,
    /// Not these HTTP paths; needs an HTTP proxy.
    pub not_paths: Option<Vec<String>>,
}

/// A further condition.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RuleCondition {
    /// What is compared.
    pub key: String,
    /// With one of these.
    pub values: Option<Vec<String>>,
    /// With none of these.
    pub not_values: Option<Vec<String>>,
}

impl From<Option<AuthorizationAction>> for crate::model::authorization::Action {
    fn from(action: Option<AuthorizationAction>) -> Self {
        match action {
            None | Some(AuthorizationAction::Allow) => Self::Allow,
            Some(AuthorizationAction::Deny) => Self::Deny,
            Some(AuthorizationAction::Audit) => Self::Audit,
            Some(AuthorizationAction::Custom) => Self::Custom,
        }
    }
}

impl From<Option<MutualTls>> for crate::model::MtlsMode {
    fn from(mtls: Option<MutualTls>) -> Self {
        match mtls.and_then(|mtls| mtls.mode) {
            None | Some(MutualTlsMode::Unset) => Self::Unset,
            Some(MutualTlsMode::Disable) => Self::Disable,
            Some(MutualTlsMode::Permissive) => Self::Permissive,
            Some(MutualTlsMode::Strict) => Self::Strict,
        }
    }
}

/// Shape of a whole document, for checking it: the derived type's own schema leaves out what kube keeps.
#[derive(JsonSchema)]
#[serde(rename_all = "camelCase")]
#[expect(dead_code, reason = "only its schema is used")]
pub(super) struct Document<Spec> {
    api_version: String,
    kind: String,
    metadata: k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta,
    spec: Option<Spec>,
}

/// A mapping of any content.
#[derive(JsonSchema)]
#[schemars(transparent)]
pub(super) struct Anything(
    #[expect(dead_code, reason = "only its schema is used")] BTreeMap<String, serde_json::Value>,
);
