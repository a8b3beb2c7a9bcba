//! Every row of specification §6.1 to §6.4, and the traps of §19 and §20 that are about AuthorizationPolicy.

use super::*;

const DENIED: &str = "no-allow-match";

/// What nginx answers to the web pod's tunnel with one policy in its namespace.
fn one(spec: &str) -> String {
    nginx(&compiled(&[authz("test", "p", "", spec)]), WEB)
}

fn source(field: &str) -> String {
    format!("{{rules: [{{from: [{{source: {{{field}}}}}]}}]}}")
}

fn when(key: &str, rest: &str) -> String {
    format!("{{rules: [{{when: [{{key: \"{key}\", {rest}}}]}}]}}")
}

/// [AP.1]: the pod's namespace and the root namespace, with and without selectors.
#[test]
fn policies_of_the_pods_namespace_and_of_the_root_namespace_count() {
    let of = |namespace: &str, selector: &str| {
        let snapshot = valid(&[authz(namespace, "p", "", &format!("{{{selector}}}"))]);
        [nginx(&snapshot, WEB), said(&judge(&snapshot, WEB, "default.web", 80))]
    };
    let (open, closed) = ("no-allow-policies", DENIED);
    assert_eq!(of("test", ""), [closed, open]);
    assert_eq!(of("default", ""), [open, closed]);
    assert_eq!(of("istio-system", ""), [closed, closed]);
    assert_eq!(of("test", "selector: {matchLabels: {app: nginx}}"), [closed, open]);
    assert_eq!(of("test", "selector: {matchLabels: {app: web}}"), [open, open]);
    assert_eq!(of("test", "selector: {matchLabels: {app: nginx, tier: x}}"), [open, open]);
    assert_eq!(of("istio-system", "selector: {matchLabels: {app: web}}"), [open, closed]);
}

/// [C.4], §20: an empty selector is namespace-wide, and reported.
#[test]
fn an_empty_selector_selects_the_namespace() {
    for selector in ["{}", "{matchLabels: {}}"] {
        let snapshot = valid(&[authz("test", "p", "", &format!("{{selector: {selector}}}"))]);
        assert_eq!(nginx(&snapshot, WEB), DENIED);
        assert!(snapshot.warnings.iter().any(|line| line.contains("test/p") && line.contains("[C.4]")));
    }
}

/// [C.5]
#[test]
fn a_policy_of_another_revision_does_not_apply() {
    for (revision, expected) in [("canary", "no-allow-policies"), ("default", DENIED)] {
        let labels = format!(", labels: {{istio.io/rev: {revision}}}");
        assert_eq!(nginx(&valid(&[authz("test", "p", &labels, "{}")]), WEB), expected);
    }
}

/// [AP.2]
#[test]
fn target_refs_are_for_others_and_reported() {
    for refs in [
        "targetRefs: [{kind: Service, group: \"\", name: nginx}]",
        "targetRef: {kind: Gateway, group: gateway.networking.k8s.io, name: g}",
    ] {
        let snapshot = valid(&[authz("test", "p", "", &format!("{{{refs}, action: DENY, rules: [{{}}]}}"))]);
        assert_eq!(nginx(&snapshot, WEB), "no-allow-policies");
        assert!(snapshot.warnings.iter().any(|line| line.contains("[AP.2]")), "{:?}", snapshot.warnings);
    }
}

/// [AP.3], §6.2, [C.2]: pools over all scopes; deny first; the oldest that matches is named.
#[test]
fn deny_goes_before_allow_and_scopes_do_not_matter() {
    let at = |second: u32| format!(", creationTimestamp: 2024-01-01T00:00:{second:02}Z");
    let web = "rules: [{from: [{source: {namespaces: [other]}}]}, {from: [{source: {namespaces: [default]}}]}]";
    let allow = authz("test", "allow", &at(5), &format!("{{selector: {{matchLabels: {{app: nginx}}}}, {web}}}"));
    let older = authz("istio-system", "older", &at(3), &format!("{{{web}}}"));
    let deny = authz("istio-system", "deny", &at(9), &format!("{{action: DENY, {web}}}"));
    let younger = authz("test", "aa", &at(9), &format!("{{action: DENY, {web}}}"));
    for (policies, expected) in [
        (vec![allow.clone()], "allow-match test/allow#1"),
        (vec![allow.clone(), older.clone()], "allow-match istio-system/older#1"),
        (vec![allow.clone(), deny.clone()], "explicit-deny istio-system/deny#1"),
        (vec![allow.clone(), older, deny.clone(), younger], "explicit-deny test/aa#1"),
        (vec![deny], "explicit-deny istio-system/deny#1"),
    ] {
        assert_eq!(nginx(&valid(&policies), WEB), expected, "{policies:?}");
    }
    // Somebody else: another pool allows, or nobody does.
    let stranger = From(Some("cluster.local/elsewhere/x"), "10.0.0.2");
    let all = authz("istio-system", "all", "", "{rules: [{}]}");
    assert_eq!(nginx(&valid(std::slice::from_ref(&allow)), stranger), DENIED);
    assert_eq!(nginx(&valid(&[allow, all]), stranger), "allow-match istio-system/all#0");
}

/// [AP.4]
#[test]
fn only_enrolled_servers_are_protected() {
    let snapshot = valid(&[authz("outside", "p", "", "{}"), authz("istio-system", "q", "", "{}")]);
    let verdict = judge(&snapshot, PLAIN, "outside.legacy", 80);
    assert_eq!((verdict.allowed, said(&verdict).as_str()), (true, "server-not-enrolled"));
}

/// [AP.5]
#[test]
fn audit_decides_nothing_and_is_told() {
    let snapshot = valid(&[authz("test", "a", "", "{action: AUDIT, rules: [{}]}")]);
    let verdict = judge(&snapshot, PLAIN, "test.nginx", 80);
    assert_eq!(said(&verdict), "no-allow-policies");
    assert_eq!(verdict.audit.expect("it matches").to_string(), "test/a#0");
}

/// [AP.6]
#[test]
fn dry_run_is_evaluated_and_not_enforced() {
    for text in ["1", "t", "T", "true", "True", "TRUE"] {
        let meta = format!(", annotations: {{istio.io/dry-run: \"{text}\"}}");
        let snapshot = valid(&[authz("test", "new", &meta, "{}")]);
        let verdict = judge(&snapshot, WEB, "test.nginx", 80);
        assert_eq!(said(&verdict), "no-allow-policies", "{text}");
        assert_eq!(verdict.dry_run.expect("it is in dry-run").to_string(), "deny no-allow-match", "{text}");
    }
    for text in ["0", "f", "F", "false", "False", "FALSE"] {
        let meta = format!(", annotations: {{istio.io/dry-run: \"{text}\"}}");
        let verdict = judge(&valid(&[authz("test", "new", &meta, "{}")]), WEB, "test.nginx", 80);
        assert_eq!((said(&verdict).as_str(), verdict.dry_run), (DENIED, None), "{text}");
    }
    // With enforced ones beside: what it would be with all of them.
    let dry = ", annotations: {istio.io/dry-run: 'true'}";
    let policies = [
        authz("test", "allow", "", "{rules: [{}]}"),
        authz("test", "deny", dry, "{action: DENY, rules: [{from: [{source: {namespaces: [default]}}]}]}"),
    ];
    let snapshot = valid(&policies);
    let verdict = judge(&snapshot, WEB, "test.nginx", 80);
    assert_eq!(said(&verdict), "allow-match test/allow#0");
    assert_eq!(verdict.dry_run.expect("it is in dry-run").to_string(), "deny explicit-deny test/deny#0");
    let verdict = judge(&snapshot, PLAIN, "test.nginx", 80);
    assert_eq!(verdict.dry_run.expect("it is in dry-run").to_string(), "allow allow-match test/allow#0");
}

/// [AP.6], §6.6: anything else is enforced, and reported.
#[test]
fn a_dry_run_that_is_no_boolean_is_enforced() {
    let policy = authz("test", "p", ", annotations: {istio.io/dry-run: 'yes'}", "{action: DENY, rules: [{}]}");
    let view = view(std::slice::from_ref(&policy));
    assert!(view.problems.iter().any(|problem| problem.to_string().contains("[AP.6]")), "{:?}", view.problems);
    assert_eq!(nginx(&compiled(&[policy]), WEB), "explicit-deny test/p#0");
}

/// [AP.7]
#[test]
fn custom_is_reported_and_not_enforced() {
    let snapshot = valid(&[authz("test", "c", "", "{action: CUSTOM, provider: {name: opa}, rules: [{}]}")]);
    let verdict = judge(&snapshot, WEB, "test.nginx", 80);
    assert_eq!(said(&verdict), "no-allow-policies");
    assert!(verdict.warnings.iter().any(|line| line.contains("test/c") && line.contains("[AP.7]")));
    assert!(snapshot.warnings.iter().any(|line| line.contains("Unsupported") && line.contains("[AP.7]")));
}

/// §6.2, the second table.
#[test]
fn without_rules_nothing_matches_and_an_empty_rule_matches_all() {
    assert_eq!(one("{}"), DENIED);
    assert_eq!(one("{rules: []}"), DENIED);
    assert_eq!(one("{rules: [{}]}"), "allow-match test/p#0");
    assert_eq!(one("{action: DENY, rules: []}"), "no-allow-policies");
    assert_eq!(one("{action: DENY, rules: [{}]}"), "explicit-deny test/p#0");
}

/// [AP.8]: from, to and when are ANDed; items and values are ORed; fields of an item are ANDed.
#[test]
fn parts_of_a_rule_are_combined_as_they_say() {
    let (yes, no) = ("source: {namespaces: [default]}", "source: {namespaces: [other]}");
    for (rules, matches) in [
        (format!("{{from: [{{{yes}}}]}}"), true),
        (format!("{{from: [{{{no}}}]}}"), false),
        (format!("{{from: [{{{no}}}, {{{yes}}}]}}"), true),
        (format!("{{from: [{{{yes}}}], to: [{{operation: {{ports: [\"81\"]}}}}]}}"), false),
        (format!("{{from: [{{{yes}}}], to: [{{operation: {{ports: [\"81\", \"80\"]}}}}]}}"), true),
        ("{to: [{operation: {ports: [\"81\"]}}, {operation: {ports: [\"80\"]}}]}".to_owned(), true),
        ("{from: [{source: {namespaces: [default], ipBlocks: [10.9.0.0/16]}}]}".to_owned(), false),
        ("{from: [{source: {namespaces: [default], ipBlocks: [10.0.0.0/16]}}]}".to_owned(), true),
        ("{from: [{source: {namespaces: [d*], notNamespaces: [default]}}]}".to_owned(), false),
        ("{from: [{source: {notNamespaces: [other, default]}}]}".to_owned(), false),
        ("{from: [{source: {notNamespaces: [other]}}]}".to_owned(), true),
        ("{to: [{operation: {notPorts: [\"80\"]}}]}".to_owned(), false),
        ("{when: [{key: source.namespace, values: [d*], notValues: [default]}]}".to_owned(), false),
        ("{when: [{key: source.namespace, values: [d*], notValues: [other]}]}".to_owned(), true),
        ("{when: [{key: source.namespace, values: [d*]}, {key: source.ip, values: [10.9.0.1]}]}".to_owned(), false),
    ] {
        let expected = if matches { "allow-match test/p#0" } else { DENIED };
        assert_eq!(one(&format!("{{rules: [{rules}]}}")), expected, "{rules}");
        let expected = if matches { "explicit-deny test/p#0" } else { "no-allow-policies" };
        assert_eq!(one(&format!("{{action: DENY, rules: [{rules}]}}")), expected, "DENY {rules}");
    }
    // Any rule, and the first that matches is named.
    assert_eq!(one(&format!("{{rules: [{{from: [{{{no}}}]}}, {{from: [{{{yes}}}]}}, {{}}]}}")), "allow-match test/p#1");
}

/// [AP.9], for every attribute that takes wildcards.
#[test]
fn wildcards_are_at_one_end() {
    for (value, matches) in [
        ("default", true),
        ("Default", false),
        ("*", true),
        ("def*", true),
        ("*ault", true),
        ("*default", true),
        ("default*", true),
        ("*efaul*", false),
        ("de*ult", false),
        ("*x", false),
        ("x*", false),
    ] {
        let expected = if matches { "allow-match test/p#0" } else { DENIED };
        assert_eq!(one(&source(&format!("namespaces: [\"{value}\"]"))), expected, "{value}");
        assert_eq!(one(&when("source.namespace", &format!("values: [\"{value}\"]"))), expected, "{value}");
        let expected = if matches { DENIED } else { "allow-match test/p#0" };
        assert_eq!(one(&source(&format!("notNamespaces: [\"{value}\"]"))), expected, "not {value}");
        assert_eq!(one(&when("source.namespace", &format!("notValues: [\"{value}\"]"))), expected, "not {value}");
    }
    for value in ["cluster.local/ns/default/sa/web", "cluster.local/ns/default/*", "*/sa/web", "*"] {
        assert_eq!(one(&source(&format!("principals: [\"{value}\"]"))), "allow-match test/p#0", "{value}");
        assert_eq!(
            one(&when("source.principal", &format!("values: [\"{value}\"]"))),
            "allow-match test/p#0",
            "{value}"
        );
    }
}

/// §6.3, the table: every attribute in both spellings.
#[test]
fn every_attribute_is_compared_with_what_it_is_about() {
    for (field, key, value, other) in [
        ("principals", "source.principal", "cluster.local/ns/default/sa/web", "cluster.local/ns/default/sa/nginx"),
        ("namespaces", "source.namespace", "default", "test"),
        ("serviceAccounts", "source.serviceAccount", "default/web", "default/nginx"),
        ("trustDomains", "source.trustDomain", "cluster.local", "example.org"),
        ("ipBlocks", "source.ip", "10.0.0.2", "10.0.0.3"),
    ] {
        let not = format!("not{}{}", field[..1].to_uppercase(), &field[1..]);
        for (value, matches) in [(value, true), (other, false)] {
            let answer = |matches: bool| if matches { "allow-match test/p#0" } else { DENIED };
            assert_eq!(one(&source(&format!("{field}: [\"{value}\"]"))), answer(matches), "{field} {value}");
            assert_eq!(one(&source(&format!("{not}: [\"{value}\"]"))), answer(!matches), "{not} {value}");
            assert_eq!(one(&when(key, &format!("values: [\"{value}\"]"))), answer(matches), "{key} {value}");
            assert_eq!(one(&when(key, &format!("notValues: [\"{value}\"]"))), answer(!matches), "not {key} {value}");
        }
    }
    for (key, value, matches) in [
        ("destination.port", "80", true),
        ("destination.port", "8080", false),
        ("destination.ip", "10.0.0.1", true),
        ("destination.ip", "10.0.0.0/31", true),
        ("destination.ip", "10.0.0.2", false),
    ] {
        let expected = if matches { "allow-match test/p#0" } else { DENIED };
        assert_eq!(one(&when(key, &format!("values: [\"{value}\"]"))), expected, "{key} {value}");
    }
}

/// §6.3, §19: a principal is written without its scheme.
#[test]
fn a_principal_with_a_scheme_never_matches_and_is_reported() {
    let spec = source("principals: [\"spiffe://cluster.local/ns/default/sa/web\"]");
    let snapshot = valid(&[authz("test", "p", "", &spec)]);
    assert_eq!(nginx(&snapshot, WEB), DENIED);
    assert!(snapshot.warnings.iter().any(|line| line.contains("without spiffe://")), "{:?}", snapshot.warnings);
    let not = source("notPrincipals: [\"spiffe://cluster.local/ns/default/sa/web\"]");
    assert_eq!(nginx(&valid(&[authz("test", "p", "", &not)]), WEB), "allow-match test/p#0");
}

/// §6.3: a bare service account is in the policy's namespace, not the pod's; any trust domain.
#[test]
fn a_bare_service_account_is_of_the_policys_namespace() {
    let policy = |namespace: &str| authz(namespace, "p", "", &source("serviceAccounts: [web]"));
    let here = From(Some("cluster.local/test/web"), "10.0.0.2");
    let root = From(Some("cluster.local/istio-system/web"), "10.0.0.2");
    let (own, wide) = (valid(&[policy("test")]), valid(&[policy("istio-system")]));
    assert_eq!(nginx(&own, here), "allow-match test/p#0");
    assert_eq!([nginx(&own, root), nginx(&own, WEB), nginx(&wide, here)], [DENIED, DENIED, DENIED]);
    assert_eq!(nginx(&wide, root), "allow-match istio-system/p#0");
    let aliased = valid(&[policy("test"), mesh("trustDomainAliases: [old]")]);
    assert_eq!(nginx(&aliased, From(Some("old/test/web"), "10.0.0.2")), "allow-match test/p#0");
}

/// [AP.10]
#[test]
fn without_identity_positive_lists_fail_and_negative_ones_succeed() {
    for field in ["principals", "namespaces", "trustDomains"] {
        let not = format!("not{}{}", field[..1].to_uppercase(), &field[1..]);
        let with = |field: &str| valid(&[authz("test", "p", "", &source(&format!("{field}: [\"*\"]")))]);
        assert_eq!(nginx(&with(field), PLAIN), DENIED, "{field}");
        assert_eq!(nginx(&with(&not), PLAIN), "allow-match test/p#0", "{not}");
        assert_eq!(nginx(&with(&not), WEB), DENIED, "{not}");
    }
    let accounts = valid(&[authz("test", "p", "", &source("notServiceAccounts: [default/web]"))]);
    assert_eq!(nginx(&accounts, PLAIN), "allow-match test/p#0");
    let admits = valid(&[authz("test", "p", "", &source("notNamespaces: [x]"))]);
    assert_eq!(nginx(&admits, PLAIN), "allow-match test/p#0");
    let requires = "{action: DENY, rules: [{from: [{source: {notPrincipals: [\"*\"]}}]}]}";
    let requires = valid(&[authz("test", "mtls", "", requires)]);
    assert_eq!(nginx(&requires, PLAIN), "explicit-deny test/mtls#0");
    assert_eq!(nginx(&requires, WEB), "no-allow-policies");
}

/// [AP.11]
#[test]
fn blocks_ignore_host_bits_and_families_never_mix() {
    for (block, address, matches) in [
        ("10.1.2.3/8", "10.200.0.1", true),
        ("10.1.2.3", "10.1.2.3", true),
        ("10.1.2.3", "10.1.2.4", false),
        ("10.1.2.3", "::ffff:10.1.2.3", true),
        ("::ffff:10.1.2.0/120", "10.1.2.3", true),
        ("0.0.0.0/0", "::ffff:1.2.3.4", true),
        ("0.0.0.0/0", "fd00::1", false),
        ("::/0", "10.1.2.3", false),
        ("::/0", "fd00::1", true),
        ("fd00::/64", "fd00::1:2:3:4", true),
        ("fd00::/64", "fd00:0:0:1::1", false),
    ] {
        let expected = if matches { "allow-match test/p#0" } else { DENIED };
        let spec = source(&format!("ipBlocks: [\"{block}\"]"));
        assert_eq!(nginx(&valid(&[authz("test", "p", "", &spec)]), From(None, address)), expected, "{block} {address}");
    }
}

/// [AP.12]
#[test]
fn trust_domains_of_the_mesh_are_one_set() {
    let config = "trustDomain: td-main\ntrustDomainAliases: [td-old]".replace('\n', "\n\n    ");
    let with = |field: &str, value: &str, from: &str| {
        let spec = source(&format!("{field}: [\"{value}\"]"));
        let snapshot = valid(&[authz("test", "p", "", &spec), mesh(&config)]);
        nginx(&snapshot, From(Some(from), "10.0.0.2")) == "allow-match test/p#0"
    };
    for (field, value, from, matches) in [
        ("principals", "cluster.local/ns/default/sa/web", "td-main/default/web", true),
        ("principals", "cluster.local/ns/default/sa/web", "td-old/default/web", true),
        ("principals", "td-old/ns/default/sa/web", "td-main/default/web", true),
        ("principals", "td-main/ns/default/sa/web", "td-old/default/web", true),
        ("principals", "td-*/ns/default/sa/web", "td-main/default/web", true),
        // As it stands for the domains that it matches, and for the others too, since those are replaced.
        ("principals", "*-old/ns/default/sa/web", "td-old/default/web", true),
        ("principals", "*-old/ns/default/sa/web", "td-main/default/web", true),
        ("principals", "other/ns/default/sa/web", "td-main/default/web", false),
        ("principals", "cluster.local/ns/default/*", "td-main/default/web", false),
        ("principals", "cluster.local/ns/default/sa/*", "td-main/default/web", true),
        ("principals", "*/ns/default/sa/web", "td-old/default/web", true),
        ("trustDomains", "td-old", "td-main/default/web", true),
        ("trustDomains", "td-main", "td-old/default/web", true),
        ("trustDomains", "*-old", "td-main/default/web", false),
        ("trustDomains", "cluster.local", "td-main/default/web", false),
    ] {
        assert_eq!(with(field, value, from), matches, "{field} {value} {from}");
        let not = format!("not{}{}", field[..1].to_uppercase(), &field[1..]);
        assert_eq!(with(&not, value, from), !matches, "{not} {value} {from}");
    }
}

/// [I.8]: an identity of a trust domain that is not ours is nobody's.
#[test]
fn an_untrusted_trust_domain_is_refused_before_policy() {
    let snapshot = valid(&[authz("test", "p", "", "{rules: [{}]}")]);
    let verdict = judge(&snapshot, From(Some("example.org/default/web"), "10.0.0.2"), "test.nginx", 80);
    assert_eq!((verdict.allowed, said(&verdict).as_str()), (false, "untrusted-trust-domain"));
}

/// [PA.12]: both must pass.
#[test]
fn peer_authentication_comes_first_and_exempts_from_nothing() {
    let strict = "---\napiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: s, namespace: test}\n\
                  spec: {selector: {matchLabels: {app: nginx}}, mtls: {mode: STRICT}, portLevelMtls: {8080: {mode: PERMISSIVE}}}\n";
    let snapshot = valid(&[strict.to_owned(), authz("test", "p", "", &source("namespaces: [default]"))]);
    assert_eq!(nginx(&snapshot, PLAIN), "strict-requires-mtls test/s");
    assert_eq!(said(&judge(&snapshot, PLAIN, "test.nginx", 8080)), DENIED);
    assert_eq!(nginx(&snapshot, WEB), "allow-match test/p#0");
}

/// What an L4 agent cannot evaluate (specification §6.4), in each place that it can stand.
const UNSEEN: [&str; 10] = [
    "to: [{operation: {methods: [POST]}}]",
    "to: [{operation: {paths: [/a]}}]",
    "to: [{operation: {notPaths: [/a]}}]",
    "to: [{operation: {hosts: [a.example]}}]",
    "from: [{source: {requestPrincipals: [\"*\"]}}]",
    "from: [{source: {notRequestPrincipals: [\"*\"]}}]",
    "from: [{source: {remoteIpBlocks: [10.0.0.0/8]}}]",
    "when: [{key: \"request.headers[x]\", values: [v]}]",
    "when: [{key: connection.sni, notValues: [v]}]",
    "when: [{key: experimental.envoy.filters.a, values: [v]}]",
];

/// [AP.13]: the whole rule, even where another alternative could be evaluated.
#[test]
fn an_allow_rule_with_http_attributes_never_matches_and_is_reported() {
    for part in UNSEEN {
        let snapshot = valid(&[authz("test", "p", "", &format!("{{rules: [{{{part}}}]}}"))]);
        let verdict = judge(&snapshot, WEB, "test.nginx", 80);
        assert_eq!(said(&verdict), DENIED, "{part}");
        assert!(verdict.warnings.iter().any(|line| line.contains("[AP.13]")), "{part}: {:?}", verdict.warnings);
        let reported = |line: &&String| line.contains("more restrictive than requested") && line.contains("[AP.13]");
        assert_eq!(snapshot.warnings.iter().filter(reported).count(), 1, "{:?}", snapshot.warnings);
    }
    let alternative = "{rules: [{to: [{operation: {ports: [\"80\"]}}, {operation: {methods: [GET]}}]}]}";
    assert_eq!(one(alternative), DENIED);
    // Another rule of the same policy is another rule.
    assert_eq!(one("{rules: [{to: [{operation: {methods: [GET]}}]}, {}]}"), "allow-match test/p#1");
}

/// [AP.14]: the attribute counts as matched, and what else there is still limits the rule.
#[test]
fn a_deny_rule_with_http_attributes_denies_more_and_is_reported() {
    for part in UNSEEN {
        let snapshot = valid(&[authz("test", "p", "", &format!("{{action: DENY, rules: [{{{part}}}]}}"))]);
        let verdict = judge(&snapshot, PLAIN, "test.nginx", 80);
        assert_eq!(said(&verdict), "explicit-deny test/p#0", "{part}");
        assert!(verdict.warnings.iter().any(|line| line.contains("[AP.14]")), "{part}: {:?}", verdict.warnings);
        assert!(snapshot.warnings.iter().any(|line| line.contains("more restrictive") && line.contains("[AP.14]")));
    }
    let limited = "{action: DENY, rules: [{to: [{operation: {methods: [POST], ports: [\"81\"]}}], \
                   from: [{source: {namespaces: [default]}}]}]}";
    let snapshot = valid(&[authz("test", "p", "", limited)]);
    assert_eq!(nginx(&snapshot, WEB), "no-allow-policies");
    assert_eq!(said(&judge(&snapshot, WEB, "test.nginx", 81)), "explicit-deny test/p#0");
    assert_eq!(said(&judge(&snapshot, PLAIN, "test.nginx", 81)), "no-allow-policies");
}

/// §6.4, §20: what cannot be read is not removed from its rule.
#[test]
fn unreadable_values_err_on_the_side_of_denial() {
    for part in [
        "to: [{operation: {ports: [http]}}]",
        "to: [{operation: {ports: [http, \"443\"]}}]",
        "to: [{operation: {notPorts: [http, \"80\"]}}]",
        "from: [{source: {ipBlocks: [10.0.0.0/33]}}]",
        "from: [{source: {notIpBlocks: [nowhere, 10.0.0.0/8]}}]",
        "from: [{source: {principals: [\"\"]}}]",
        "from: [{source: {serviceAccounts: [\"we*\"]}}]",
        "from: [{source: {}}]",
        "from: []",
        "to: []",
        "when: [{key: source.port, values: [\"1\"]}]",
        "when: [{key: source.ip}]",
        "from: [{source: {principles: [x]}}]",
        "to: [{operation: {ports: [443]}}]",
        "to: [{operation: {ports: [\"443\"], portz: [x]}}, {operation: {methods: [x]}}]",
    ] {
        assert_eq!(one(&format!("{{rules: [{{{part}}}]}}")), DENIED, "ALLOW {part}");
        assert_eq!(one(&format!("{{action: DENY, rules: [{{{part}}}]}}")), "explicit-deny test/p#0", "DENY {part}");
    }
    // Together with principals it says nothing that is defined; the principals still limit.
    let both = "from: [{source: {serviceAccounts: [default/web], namespaces: [other]}}]";
    assert_eq!(one(&format!("{{action: DENY, rules: [{{{both}}}]}}")), "no-allow-policies");
    let both = "from: [{source: {serviceAccounts: [other/x], namespaces: [default]}}]";
    assert_eq!(one(&format!("{{action: DENY, rules: [{{{both}}}]}}")), "explicit-deny test/p#0");
    assert_eq!(one(&format!("{{rules: [{{{both}}}]}}")), DENIED);
}

/// The pod itself and the kubelet's probes are no policy's business ([K.1], specification §3).
#[test]
fn probes_and_the_pod_itself_pass() {
    let snapshot = valid(&[authz("test", "p", "", "{action: DENY, rules: [{}]}")]);
    let server = snapshot.workload(&PodUid("test.nginx".into())).expect("there").server();
    for (client, reason) in [(Client::Probe, "probe"), (Client::SamePod, "same-pod")] {
        let connection = Connection { server, client, source_ip: None, destination_ip: None, port: 80 };
        let verdict = policy::decide(&snapshot, &connection);
        assert_eq!((verdict.allowed, verdict.reason.as_str()), (true, reason));
    }
}
