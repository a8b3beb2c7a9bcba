//! Istio's resources as Rust types, where this version enforces them.

use std::collections::BTreeMap;

use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Spec of a PeerAuthentication (`security.istio.io`; all served versions mean the same, specification §1.2).
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(group = "security.istio.io", version = "v1", kind = "PeerAuthentication", namespaced)]
#[serde(rename_all = "camelCase")]
pub struct PeerAuthenticationSpec {
    /// The pods it is about; absent or empty: all in scope ([C.4]).
    pub selector: Option<WorkloadSelector>,
    /// Mode of all ports.
    pub mtls: Option<MutualTls>,
    /// Modes by port of the workload.
    pub port_level_mtls: Option<BTreeMap<String, MutualTls>>,
}

/// Labels that a pod must have, all of them ([C.3]).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct WorkloadSelector {
    /// Label to value.
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

#[cfg(test)]
mod tests {
    use kube::CustomResourceExt;

    use super::*;

    /// What deployment manifests are made from.
    #[test]
    fn the_definition_can_be_made_from_the_types() {
        let crd = serde_json::to_value(PeerAuthentication::crd()).expect("JSON");
        assert_eq!(crd["metadata"]["name"], "peerauthentications.security.istio.io");
        let spec = &crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"];
        let modes = &spec["properties"]["mtls"]["properties"]["mode"]["enum"];
        assert_eq!(
            modes.as_array().map(|modes| modes.iter().filter(|mode| mode.is_string()).count()),
            Some(4),
            "{spec}"
        );
    }
}
