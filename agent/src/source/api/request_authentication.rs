//! Rules of a RequestAuthentication (specification §7).

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use super::{
    Found, Strict,
    security::{JwtRule, RequestAuthenticationSpec},
};

impl Strict for RequestAuthenticationSpec {
    fn check(&self, _: &ObjectMeta, found: &mut Found) {
        if let Some(selector) = &self.selector {
            if self.target_ref.is_some() || !self.target_refs.is_empty() {
                found.wrong("spec.selector", "cannot stand beside targetRefs; remove one of them");
            }
            if selector.match_labels.as_ref().is_none_or(|labels| labels.is_empty()) {
                found.warn("spec.selector", "is empty and selects every pod in scope; remove it to say so [C.4]");
            }
        }
        if self.target_ref.is_some() && !self.target_refs.is_empty() {
            found.wrong("spec.targetRef", "cannot stand beside targetRefs; remove one of them");
        }
        for (index, rule) in self.jwt_rules.iter().enumerate() {
            jwt(rule, &format!("spec.jwtRules[{index}]"), found);
        }
    }
}

fn jwt(rule: &JwtRule, path: &str, found: &mut Found) {
    if rule.issuer.is_empty() {
        found.wrong(format!("{path}.issuer"), "is missing; write the issuer that tokens must name");
    }
    for (index, audience) in rule.audiences.iter().enumerate().filter(|(_, audience)| audience.is_empty()) {
        found.wrong(format!("{path}.audiences[{index}]"), format!("{audience:?} is not an audience; write one"));
    }
    for (field, uri) in [("jwksUri", &rule.jwks_uri), ("jwks_uri", &rule.jwks_uri_old)] {
        if let Some(uri) = uri.as_deref().filter(|uri| !uri.starts_with("http://") && !uri.starts_with("https://")) {
            found.wrong(format!("{path}.{field}"), format!("{uri:?} is not a URL; write https://…"));
        }
    }
    if let Some(jwks) = rule.jwks.as_deref()
        && !serde_json::from_str::<serde_json::Value>(jwks).is_ok_and(|jwks| jwks.get("keys").is_some())
    {
        found.wrong(format!("{path}.jwks"), "is not a JSON Web Key Set; write {\"keys\": […]}");
    }
    for (index, header) in rule.from_headers.iter().enumerate().filter(|(_, header)| header.name.is_empty()) {
        let (_, path) = (header, format!("{path}.fromHeaders[{index}].name"));
        found.wrong(path, "is missing; write the header's name");
    }
    for (field, names) in [("fromParams", &rule.from_params), ("fromCookies", &rule.from_cookies)] {
        for (index, _) in names.iter().enumerate().filter(|(_, name)| name.is_empty()) {
            found.wrong(format!("{path}.{field}[{index}]"), "is empty; write a name or remove it");
        }
    }
    for (index, output) in rule.output_claim_to_headers.iter().enumerate() {
        let path = format!("{path}.outputClaimToHeaders[{index}]");
        if output.header.is_empty() || output.claim.is_empty() {
            found.wrong(path, "needs header and claim; write both");
        }
    }
}
