//! Specification §6.6: what is invalid, where, and that everything else is not.

use super::*;

/// Each with the path that the problem names.
const INVALID: [(&str, &str); 30] = [
    ("{rules: [{from: []}]}", "spec.rules[0].from"),
    ("{rules: [{to: []}]}", "spec.rules[0].to"),
    ("{rules: [{from: [{}]}]}", "spec.rules[0].from[0].source"),
    ("{rules: [{from: [{source: {}}]}]}", "spec.rules[0].from[0].source"),
    ("{rules: [{from: [{source: {namespaces: []}}]}]}", "spec.rules[0].from[0].source"),
    ("{rules: [{}, {to: [{operation: {}}]}]}", "spec.rules[1].to[0].operation"),
    ("{rules: [{from: [{source: {principals: [\"\"]}}]}]}", "spec.rules[0].from[0].source.principals[0]"),
    ("{rules: [{to: [{operation: {paths: [/, \"\"]}}]}]}", "spec.rules[0].to[0].operation.paths[1]"),
    ("{rules: [{when: [{key: source.ip}]}]}", "spec.rules[0].when[0]"),
    ("{rules: [{when: [{key: source.ip, values: []}]}]}", "spec.rules[0].when[0]"),
    ("{rules: [{when: [{key: source.port, values: [a]}]}]}", "spec.rules[0].when[0].key"),
    ("{rules: [{when: [{key: request.headers, values: [a]}]}]}", "spec.rules[0].when[0].key"),
    ("{rules: [{when: [{key: source.ip, values: [a]}]}]}", "spec.rules[0].when[0].values[0]"),
    ("{rules: [{when: [{key: remote.ip, notValues: [a]}]}]}", "spec.rules[0].when[0].notValues[0]"),
    ("{rules: [{when: [{key: destination.port, values: [http]}]}]}", "spec.rules[0].when[0].values[0]"),
    ("{rules: [{to: [{operation: {ports: [\"80\", http]}}]}]}", "spec.rules[0].to[0].operation.ports[1]"),
    ("{rules: [{to: [{operation: {notPorts: [\"0\"]}}]}]}", "spec.rules[0].to[0].operation.notPorts[0]"),
    ("{rules: [{to: [{operation: {ports: [80]}}]}]}", "spec.rules[0].to[0].operation.ports[0]"),
    ("{rules: [{from: [{source: {ipBlocks: [10.0.0.0/33]}}]}]}", "spec.rules[0].from[0].source.ipBlocks[0]"),
    ("{rules: [{from: [{source: {notRemoteIpBlocks: [x]}}]}]}", "spec.rules[0].from[0].source.notRemoteIpBlocks[0]"),
    ("{rules: [{from: [{source: {serviceAccounts: [\"a/*\"]}}]}]}", "spec.rules[0].from[0].source.serviceAccounts[0]"),
    ("{rules: [{from: [{source: {serviceAccounts: [a], principals: [b]}}]}]}", "spec.rules[0].from[0].source"),
    ("{rules: [{from: [{source: {notServiceAccounts: [a], namespaces: [b]}}]}]}", "spec.rules[0].from[0].source"),
    ("{action: DENY}", "spec.rules"),
    ("{action: CUSTOM, provider: {name: x}}", "spec.rules"),
    ("{action: CUSTOM, rules: [{}]}", "spec.provider.name"),
    ("{provider: {name: x}}", "spec.provider"),
    ("{selector: {matchLabels: {a: b}}, targetRefs: [{kind: Service, name: s}]}", "spec"),
    ("{targetRef: {kind: Service, name: s}, targetRefs: [{kind: Service, name: s}]}", "spec"),
    ("{rules: [{from: [{source: {principles: [x]}}]}]}", "spec.rules[0].from[0].source.principles"),
];

#[test]
fn what_is_invalid_is_named_with_its_place() {
    for (spec, path) in INVALID {
        let view = view(&[authz("test", "p", "", spec)]);
        let lines: Vec<String> = view.problems.iter().map(ToString::to_string).collect();
        assert_eq!(lines.len(), 1, "{spec}: {lines:?}");
        assert!(lines[0].contains(&format!("AuthorizationPolicy test/p: {path}: ")), "{spec}: {lines:?}");
        assert!(view.problems[0].line.is_some(), "{spec}");
    }
    for (meta, spec) in [
        (", annotations: {istio.io/dry-run: maybe}", "{}"),
        (", annotations: {istio.io/dry-run: 'true'}", "{action: AUDIT}"),
        (", annotations: {istio.io/dry-run: 'true'}", "{action: CUSTOM, provider: {name: x}, rules: [{}]}"),
    ] {
        let view = view(&[authz("test", "p", meta, spec)]);
        let lines: Vec<String> = view.problems.iter().map(ToString::to_string).collect();
        assert_eq!(lines.len(), 1, "{spec}: {lines:?}");
        assert!(lines[0].contains("metadata.annotations") && lines[0].contains("istio.io/dry-run"), "{lines:?}");
    }
}

/// [C.6], [C.9]: an unknown action, or a field outside the rules, leaves nothing to enforce.
#[test]
fn what_cannot_be_understood_at_all_is_not_in_force() {
    for spec in ["{action: BLOCK}", "{action: deny, rules: [{}]}", "{selectr: {matchLabels: {a: b}}}"] {
        let policies = [authz("test", "p", "", spec)];
        assert_eq!(view(&policies).problems.len(), 1, "{spec}");
        assert_eq!(nginx(&compiled(&policies), WEB), "no-allow-policies", "{spec}");
    }
}

/// [C.8]: a rule that is no rule is one of which nothing can be evaluated, and a policy that names targets as well as pods is
/// about the pods: neither takes away what restricts.
#[test]
fn what_is_wrong_beside_a_rule_takes_no_rule_away() {
    let targets = "selector: {matchLabels: {app: nginx}}, targetRefs: [{kind: Service, group: \"\", name: s}]";
    for (spec, verdict) in [
        ("{rules: [x]}".to_owned(), "no-allow-match"),
        ("{action: DENY, rules: [x]}".to_owned(), "explicit-deny test/p#0"),
        ("{action: DENY, rules: [{from: [{source: {namespaces: [nobody]}}]}, x]}".to_owned(), "explicit-deny test/p#1"),
        (format!("{{{targets}, rules: [{{}}]}}"), "no-allow-match"),
        (format!("{{{targets}, action: DENY, rules: [{{}}]}}"), "explicit-deny test/p#0"),
    ] {
        let policies = [authz("test", "p", "", &spec)];
        assert_eq!(view(&policies).problems.len(), 1, "{spec}");
        assert_eq!(nginx(&compiled(&policies), WEB), verdict, "{spec}");
    }
}

/// §1.4, §6.2, and everything that §6.3 and §6.4 accept.
#[test]
fn what_is_valid_is_accepted() {
    for spec in [
        "{}",
        "{rules: []}",
        "{rules: [{}]}",
        "{action: ALLOW, rules: [{}]}",
        "{action: DENY, rules: []}",
        "{action: AUDIT}",
        "{action: CUSTOM, provider: {name: x}, rules: [{}]}",
        "{selector: {matchLabels: {app: nginx}}}",
        "{targetRefs: [{kind: Service, group: \"\", name: s}]}",
        "{rules: [{from: [{source: {principals: [\"*\"], notNamespaces: [x], ipBlocks: [10.1.1.1, \"::/0\"]}}]}]}",
        "{rules: [{from: [{source: {serviceAccounts: [a, b/c], trustDomains: [d], notIpBlocks: [10.0.0.0/8]}}]}]}",
        "{rules: [{to: [{operation: {hosts: [a], methods: [GET], paths: [/x*], ports: [\"080\"]}}]}]}",
        "{rules: [{when: [{key: \"request.auth.claims[iss]\", values: [x]}, {key: connection.sni, notValues: [v]}]}]}",
    ] {
        valid(&[authz("test", "p", "", spec)]);
    }
}
