//! From an AuthorizationPolicy of the API to the model's, with the rules of specification §6.6.

use std::{borrow::Cow, sync::Arc};

use crate::model::{
    Age, AuthorizationPolicy, Labels,
    authorization::{Action, Attribute, ConditionKey, Match, Rule, block, port},
};

use super::{
    convert::{Wrong, object_ref},
    crd,
};

/// Annotation of a policy that is evaluated and told, but not enforced ([AP.6]).
const DRY_RUN: &str = "istio.io/dry-run";

/// An AuthorizationPolicy that is not valid.
pub(super) struct Rejected {
    pub(super) wrong: Vec<Wrong>,
    /// What to apply where there was no valid one before: the same policy, in which what is wrong cannot be evaluated
    /// (specification §6.4).
    pub(super) restricting: Arc<AuthorizationPolicy>,
}

pub(super) fn authorization_policy(object: &crd::AuthorizationPolicy) -> Result<AuthorizationPolicy, Rejected> {
    let (meta, spec) = (&object.metadata, &object.spec);
    let mut wrong = Vec::new();
    let labels = spec.selector.as_ref().map(|selector| selector.match_labels.clone().unwrap_or_default());
    let reference = object_ref(meta);
    let action = Action::from(spec.action);
    let dry_run = dry_run(meta.annotations.as_ref().and_then(|all| all.get(DRY_RUN)), action, &mut wrong);
    let several = spec.target_refs.as_ref().is_some_and(|targets| !targets.is_empty());
    let ways = [spec.selector.is_some(), spec.target_ref.is_some(), several];
    if ways.iter().filter(|way| **way).count() > 1 {
        wrong.push(Wrong::new("spec", "has more than one of selector, targetRef and targetRefs; keep one [AP.2]"));
    }
    let named = spec.provider.as_ref().and_then(|provider| provider.name.as_ref()).is_some_and(|name| !name.is_empty());
    match action {
        Action::Custom if !named => {
            wrong.push(Wrong::new("spec.provider.name", "is missing; a CUSTOM policy names its authorizer"));
        }
        Action::Allow | Action::Deny | Action::Audit if spec.provider.is_some() => {
            wrong.push(Wrong::new("spec.provider", "is for action CUSTOM alone; remove it"));
        }
        Action::Allow | Action::Deny | Action::Audit | Action::Custom => {}
    }
    if spec.rules.is_none() && matches!(action, Action::Deny | Action::Custom) {
        let what = format!("is missing; a {action} policy without rules matches nothing (rules: [{{}}] matches all)");
        wrong.push(Wrong::new("spec.rules", what));
    }
    let rules = spec.rules.iter().flatten().enumerate().map(|(index, of)| rule(index, of, &mut wrong)).collect();
    let policy = AuthorizationPolicy {
        age: Age {
            created: meta.creation_timestamp.as_ref().map_or(i64::MIN, |time| time.0.as_second()),
            name: reference.name,
            namespace: reference.namespace,
        },
        selector_written_empty: labels.as_ref().is_some_and(Labels::is_empty),
        selector: labels.unwrap_or_default(),
        revision: meta.labels.as_ref().and_then(|labels| labels.get("istio.io/rev")).cloned(),
        has_targets: spec.target_ref.is_some() || several,
        action,
        dry_run,
        rules,
    };
    if wrong.is_empty() { Ok(policy) } else { Err(Rejected { wrong, restricting: Arc::new(restricting(policy)) }) }
}

/// A policy that selects pods and names targets too is held to be about the pods: it may restrict them, but what it would
/// allow is not to be relied on.
fn restricting(mut policy: AuthorizationPolicy) -> AuthorizationPolicy {
    if policy.has_targets && !policy.selector.is_empty() {
        policy.has_targets = false;
        policy.rules.iter_mut().for_each(|rule| rule.unreadable.push("targetRefs".to_owned()));
    }
    policy
}

/// [AP.6]: what is not plainly true is enforced.
fn dry_run(text: Option<&String>, action: Action, wrong: &mut Vec<Wrong>) -> bool {
    let Some(text) = text else { return false };
    let path = super::yaml::join("metadata.annotations", DRY_RUN);
    if matches!(action, Action::Audit | Action::Custom) {
        wrong.push(Wrong::new(path, format!("has no meaning with action {action}; remove it [AP.6]")));
        return false;
    }
    match text.as_str() {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => true,
        "0" | "f" | "F" | "false" | "FALSE" | "False" => false,
        other => {
            let what = format!("{other:?} is neither true nor false, so the policy is enforced; write true or false");
            wrong.push(Wrong::new(path, what + " [AP.6]"));
            false
        }
    }
}

fn rule(index: usize, of: &crd::AuthorizationRule, wrong: &mut Vec<Wrong>) -> Rule {
    let path = format!("spec.rules[{index}]");
    let mut empty = |list: bool, at: &str| {
        if list {
            wrong.push(Wrong::new(format!("{path}.{at}"), "is empty and matches nothing; add an item or remove it"));
        }
    };
    empty(of.from.as_ref().is_some_and(Vec::is_empty), "from");
    empty(of.to.as_ref().is_some_and(Vec::is_empty), "to");
    let from = of.from.as_ref().map(|items| {
        let each = items.iter().enumerate();
        each.map(|(at, item)| source(&format!("{path}.from[{at}].source"), item.source.as_ref(), wrong)).collect()
    });
    let to = of.to.as_ref().map(|items| {
        let each = items.iter().enumerate();
        each.map(|(at, item)| operation(&format!("{path}.to[{at}].operation"), item.operation.as_ref(), wrong))
            .collect()
    });
    let conditions = of.when.iter().flatten().enumerate();
    let when = conditions.flat_map(|(at, one)| condition(&format!("{path}.when[{at}]"), one, wrong)).collect();
    Rule { from, to, when, unreadable: Vec::new() }
}

/// Name of a field, what it is about, and whether it is a `not…` form.
type Field<'a> = (&'static str, Option<Attribute>, bool, &'a Option<Vec<String>>);

fn source(path: &str, of: Option<&crd::RuleSource>, wrong: &mut Vec<Wrong>) -> Vec<Match> {
    let none = crd::RuleSource::default();
    let of = of.unwrap_or(&none);
    let matches = fields(
        path,
        [
            ("principals", Some(Attribute::Principal), false, &of.principals),
            ("notPrincipals", Some(Attribute::Principal), true, &of.not_principals),
            ("requestPrincipals", None, false, &of.request_principals),
            ("notRequestPrincipals", None, true, &of.not_request_principals),
            ("namespaces", Some(Attribute::Namespace), false, &of.namespaces),
            ("notNamespaces", Some(Attribute::Namespace), true, &of.not_namespaces),
            ("serviceAccounts", Some(Attribute::ServiceAccount), false, &of.service_accounts),
            ("notServiceAccounts", Some(Attribute::ServiceAccount), true, &of.not_service_accounts),
            ("trustDomains", Some(Attribute::TrustDomain), false, &of.trust_domains),
            ("notTrustDomains", Some(Attribute::TrustDomain), true, &of.not_trust_domains),
            ("ipBlocks", Some(Attribute::SourceIp), false, &of.ip_blocks),
            ("notIpBlocks", Some(Attribute::SourceIp), true, &of.not_ip_blocks),
            ("remoteIpBlocks", None, false, &of.remote_ip_blocks),
            ("notRemoteIpBlocks", None, true, &of.not_remote_ip_blocks),
        ],
        wrong,
    );
    let has = |attribute| matches.iter().any(|one| one.attribute == Some(attribute));
    if has(Attribute::ServiceAccount) && (has(Attribute::Principal) || has(Attribute::Namespace)) {
        let what = "has service accounts together with principals or namespaces; a service account says both already, \
                    so keep one";
        wrong.push(Wrong::new(path, what));
    }
    matches
}

fn operation(path: &str, of: Option<&crd::RuleOperation>, wrong: &mut Vec<Wrong>) -> Vec<Match> {
    let none = crd::RuleOperation::default();
    let of = of.unwrap_or(&none);
    fields(
        path,
        [
            ("hosts", None, false, &of.hosts),
            ("notHosts", None, true, &of.not_hosts),
            ("ports", Some(Attribute::DestinationPort), false, &of.ports),
            ("notPorts", Some(Attribute::DestinationPort), true, &of.not_ports),
            ("methods", None, false, &of.methods),
            ("notMethods", None, true, &of.not_methods),
            ("paths", None, false, &of.paths),
            ("notPaths", None, true, &of.not_paths),
        ],
        wrong,
    )
}

/// An empty list says nothing, as an absent one.
fn fields<const N: usize>(path: &str, all: [Field<'_>; N], wrong: &mut Vec<Wrong>) -> Vec<Match> {
    let mut matches = Vec::new();
    for (name, attribute, negative, values) in all {
        let Some(values) = values.as_ref().filter(|values| !values.is_empty()) else { continue };
        let addresses = attribute.is_none() && name.to_lowercase().ends_with("ipblocks");
        for (at, value) in values.iter().enumerate() {
            let what = if addresses { address(value) } else { check(attribute, value) };
            wrong.extend(what.map(|what| Wrong::new(format!("{path}.{name}[{at}]"), what)));
        }
        matches.push(Match { name: Cow::Borrowed(name), attribute, negative, values: values.clone() });
    }
    if matches.is_empty() {
        wrong.push(Wrong::new(path, "is empty; name what it is about, or remove the item"));
    }
    matches
}

fn condition(path: &str, of: &crd::RuleCondition, wrong: &mut Vec<Wrong>) -> Vec<Match> {
    let key = ConditionKey::of(&of.key);
    let attribute = match key {
        ConditionKey::Known(attribute) => Some(attribute),
        ConditionKey::NeedsProxy => None,
        ConditionKey::Unknown => {
            let keys: Vec<&str> = ConditionKey::KNOWN.iter().map(|(key, _)| *key).collect();
            let what = match super::schema::nearest(&of.key, keys.iter().copied()) {
                Some(near) => format!("{:?} is not a key; did you mean {near}?", of.key),
                None => format!("{:?} is not a key; known here: {}", of.key, keys.join(", ")),
            };
            wrong.push(Wrong::new(format!("{path}.key"), what));
            None
        }
    };
    let mut matches = Vec::new();
    for (name, negative, values) in [("values", false, &of.values), ("notValues", true, &of.not_values)] {
        let Some(values) = values.as_ref().filter(|values| !values.is_empty()) else { continue };
        for (at, value) in values.iter().enumerate() {
            let what = if of.key == "remote.ip" { address(value) } else { check(attribute, value) };
            wrong.extend(what.map(|what| Wrong::new(format!("{path}.{name}[{at}]"), what)));
        }
        matches.push(Match { name: of.key.clone().into(), attribute, negative, values: values.clone() });
    }
    if matches.is_empty() {
        wrong.push(Wrong::new(path, "has neither values nor notValues; add one of them"));
        matches.push(Match { name: of.key.clone().into(), attribute: None, negative: false, values: Vec::new() });
    }
    matches
}

/// What is wrong with a value.
fn check(attribute: Option<Attribute>, value: &str) -> Option<String> {
    if value.is_empty() {
        return Some("is empty; write a value or remove it".to_owned());
    }
    match attribute {
        None | Some(Attribute::Principal | Attribute::Namespace | Attribute::TrustDomain) => None,
        Some(Attribute::ServiceAccount) => account(value),
        Some(Attribute::DestinationPort) => port(value)
            .is_none()
            .then(|| format!("{value:?} is not a port; write a number from 1 to 65535 (a name does not do)")),
        Some(Attribute::SourceIp | Attribute::DestinationIp) => address(value),
    }
}

fn address(value: &str) -> Option<String> {
    block(value).is_none().then(|| format!("{value:?} is neither an IP address nor a CIDR such as 10.0.0.0/8"))
}

fn account(value: &str) -> Option<String> {
    if value.contains('*') {
        return Some(format!("{value:?} has a wildcard, which service accounts do not have; use principals for that"));
    }
    let parts: Vec<&str> = value.split('/').collect();
    (parts.len() > 2 || parts.contains(&""))
        .then(|| format!("{value:?} is not a service account; write namespace/name, or a name of this namespace"))
}
