//! Shapes of `security.istio.io` that this version does not enforce.

use super::{super::crd::WorkloadSelector, Duration, message};

message!(RequestAuthenticationSpec {
    selector: Option<WorkloadSelector>,
    target_ref: Option<TargetRef>,
    target_refs: Vec<TargetRef>,
    jwt_rules: Vec<JwtRule>,
});

message!(TargetRef {
    group: String,
    kind: String,
    name: String,
    namespace: Option<String>,
});

message!(
    #[schemars(extend("x-at-most-one" = [["jwks", "jwksUri", "jwks_uri"]]))]
    JwtRule {
        issuer: String,
        audiences: Vec<String>,
        jwks_uri: Option<String>,
        /// Istio's own schema has both spellings.
        #[serde(rename = "jwks_uri")]
        jwks_uri_old: Option<String>,
        jwks: Option<String>,
        from_headers: Vec<JwtHeader>,
        from_params: Vec<String>,
        from_cookies: Vec<String>,
        output_payload_to_header: Option<String>,
        forward_original_token: bool,
        output_claim_to_headers: Vec<ClaimToHeader>,
        timeout: Option<Duration>,
        space_delimited_claims: Vec<String>,
    }
);

message!(JwtHeader {
    name: String,
    prefix: Option<String>,
});

message!(ClaimToHeader { header: String, claim: String });
