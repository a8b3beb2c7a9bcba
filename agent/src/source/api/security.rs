//! Shapes of `security.istio.io` that this version does not enforce.

use super::{super::crd::WorkloadSelector, Duration, message};

message!(
    #[schemars(extend("x-kubernetes-validations" = [{
        "rule": "(has(self.selector) ? 1 : 0) + (has(self.targetRef) ? 1 : 0) \
                 + (has(self.targetRefs) && size(self.targetRefs) > 0 ? 1 : 0) <= 1",
        "message": "has more than one of selector, targetRef and targetRefs; keep one [AP.2]",
    }]))]
    RequestAuthenticationSpec {
        selector: Option<WorkloadSelector>,
        target_ref: Option<TargetRef>,
        #[schemars(extend("maxItems" = 16))]
        target_refs: Vec<TargetRef>,
        #[schemars(extend("maxItems" = 4096))]
        jwt_rules: Vec<JwtRule>,
    }
);

message!(
    #[schemars(extend("x-required" = ["kind", "name"]))]
    TargetRef {
        group: String,
        kind: String,
        name: String,
        namespace: Option<String>,
    }
);

message!(
    #[schemars(extend("x-at-most-one" = [["jwks", "jwksUri", "jwks_uri"]]))]
    JwtRule {
        #[schemars(extend("minLength" = 1))]
        issuer: String,
        #[schemars(extend("x-each" = {"minLength": 1}))]
        audiences: Vec<String>,
        #[schemars(extend("maxLength" = 2048, "x-kubernetes-validations" = [{
            "rule": "isURL(self) && url(self).getScheme() in ['http', 'https']",
            "message": "is not a URL; write https://…",
        }]))]
        jwks_uri: Option<String>,
        /// Istio's own schema has both spellings.
        #[serde(rename = "jwks_uri")]
        #[schemars(extend("maxLength" = 2048, "x-kubernetes-validations" = [{
            "rule": "isURL(self) && url(self).getScheme() in ['http', 'https']",
            "message": "is not a URL; write https://…",
        }]))]
        jwks_uri_old: Option<String>,
        jwks: Option<String>,
        from_headers: Vec<JwtHeader>,
        #[schemars(extend("x-each" = {"minLength": 1}))]
        from_params: Vec<String>,
        #[schemars(extend("x-each" = {"minLength": 1}))]
        from_cookies: Vec<String>,
        output_payload_to_header: Option<String>,
        forward_original_token: bool,
        output_claim_to_headers: Vec<ClaimToHeader>,
        timeout: Option<Duration>,
        #[schemars(extend("maxItems" = 64))]
        space_delimited_claims: Vec<String>,
    }
);

message!(
    #[schemars(extend("x-required" = ["name"]))]
    JwtHeader {
        #[schemars(extend("minLength" = 1))]
        name: String,
        prefix: Option<String>,
    }
);

message!(
    #[schemars(extend("x-required" = ["claim", "header"]))]
    ClaimToHeader {
        #[schemars(extend("minLength" = 1))]
        header: String,
        #[schemars(extend("minLength" = 1))]
        claim: String,
    }
);
