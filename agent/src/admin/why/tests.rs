//! The answers, on small clusters that are written as users write them.

use std::time::Duration;

use culvert_common::Reason;

use super::*;
use crate::{fuzz, source::review::Manifests, telemetry::history::Circumstances};

const MESH: &str = "
apiVersion: v1
kind: Namespace
metadata: {name: test, labels: {istio.io/dataplane-mode: ambient}}
---
apiVersion: v1
kind: Namespace
metadata: {name: default, labels: {istio.io/dataplane-mode: ambient}}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: default}
spec: {clusterIPs: [10.96.0.1], selector: {app: web}, ports: [{port: 80, targetPort: 8080}]}
";

/// One document: a pod whose service account has its name.
pub(in crate::admin) fn pod(object: &str, ip: &str, node: &str, labels: &str) -> String {
    let (namespace, name) = object.split_once('/').expect("namespace/name");
    format!(
        "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: {namespace}, uid: {namespace}-{name}, labels: \
         {{{labels}}}}}\nspec: {{serviceAccountName: {name}, nodeName: {node}, containers: [{{name: main, image: a}}]}}\n\
         status: {{phase: Running, podIP: {ip}, conditions: [{{type: Ready, status: \"True\"}}]}}\n"
    )
}

pub(in crate::admin) fn peer(object: &str, spec: &str) -> String {
    policy("PeerAuthentication", object, spec)
}

fn policy(kind: &str, object: &str, spec: &str) -> String {
    let (namespace, name) = object.split_once('/').expect("namespace/name");
    format!(
        "---\napiVersion: security.istio.io/v1\nkind: {kind}\nmetadata: {{name: {name}, namespace: {namespace}}}\nspec: {spec}\n"
    )
}

fn authz(object: &str, spec: &str) -> String {
    policy("AuthorizationPolicy", object, spec)
}

/// What an agent would hold.
pub(in crate::admin) struct World {
    pub(in crate::admin) view: View,
    pub(in crate::admin) snapshot: Snapshot,
    pub(in crate::admin) options: Options,
    pub(in crate::admin) states: BTreeMap<PodUid, enroll::State>,
}

impl World {
    /// Every manifest must be right.
    pub(in crate::admin) fn of(text: &str) -> Self {
        let view = Manifests::of("a.yaml", text).view("istio-system");
        assert_eq!(view.problems, [], "{text}");
        let options = Options::default();
        let snapshot = policy::compile(&view.cluster, &options, None);
        let enrolled = snapshot.workloads.values().filter(|pod| pod.enrollment.enrolled && &*pod.node == "here");
        let cookie = |at| enroll::State::Enrolled(crate::datapath::NetnsCookie(at));
        let states = enrolled.zip(1..).map(|(pod, at)| (pod.uid.clone(), cookie(at))).collect();
        Self { view, snapshot, options, states }
    }

    pub(in crate::admin) fn mesh(&self) -> Mesh<'_> {
        Mesh { snapshot: &self.snapshot, view: &self.view, options: &self.options, states: &self.states, node: "here" }
    }

    fn ask(&self, from: &str, to: &str) -> Result<Vec<Explanation>, String> {
        let (from, (to, port)) = (client(from)?, server(to)?);
        let mesh = self.mesh();
        let (client, server) = (mesh.find(&from, "default", false)?, mesh.find(&to, "default", true)?);
        explain(&mesh, &client, &server, port, &Refusals::default())
    }

    fn one(&self, from: &str, to: &str) -> Explanation {
        let mut all = self.ask(from, to).unwrap_or_else(|error| panic!("{from} → {to}: {error}"));
        assert_eq!(all.len(), 1, "{all:?}");
        all.remove(0)
    }

    fn refusals(&self, entries: Vec<(Refusal, Seen<Circumstances>)>) -> Vec<RefusalDump> {
        refusals(&self.mesh(), &Refusals { entries, ..Refusals::default() }, 0).refusals
    }
}

fn pods() -> String {
    [
        MESH.to_owned(),
        pod("test/nginx", "10.0.0.1", "here", "app: nginx"),
        pod("test/legacy-app", "10.0.0.2", "here", "istio.io/dataplane-mode: none"),
        pod("default/web", "10.0.0.3", "there", "app: web"),
    ]
    .concat()
}

fn with(policies: &str) -> World {
    World::of(&(pods() + policies))
}

/// Specification §8: each row without DestinationRule; the transport, and the verdict in both modes.
#[test]
fn each_row_of_the_decision_table_is_explained() {
    let (permissive, strict) =
        (with(""), with(&(peer("default/s", "{mtls: {mode: STRICT}}") + &peer("test/s", "{mtls: {mode: STRICT}}"))));
    let rows = [
        ("test/nginx", "default/web:8080", true, "tunnel", ["allow no-allow-policies"; 2]),
        ("test/nginx", "web.default.svc:80", true, "tunnel", ["allow no-allow-policies"; 2]),
        ("test/nginx", "test/legacy-app:8080", true, "plaintext", ["allow server-not-enrolled"; 2]),
        ("test/nginx", "192.0.2.1:443", true, "plaintext", ["allow server-not-enrolled"; 2]),
        (
            "test/legacy-app",
            "default/web:8080",
            false,
            "plaintext",
            ["allow no-allow-policies", "deny strict-requires-mtls"],
        ),
        (
            "test/legacy-app",
            "10.96.0.1:80",
            false,
            "plaintext",
            ["allow no-allow-policies", "deny strict-requires-mtls"],
        ),
        ("192.0.2.1", "10.0.0.1:8080", false, "plaintext", ["allow no-allow-policies", "deny strict-requires-mtls"]),
        ("192.0.2.1", "test/legacy-app:8080", false, "plaintext", ["allow server-not-enrolled"; 2]),
        ("test/nginx", "test/nginx:8080", false, "same-pod", ["allow same-pod"; 2]),
        // [K.2]
        ("test/nginx", "default/web:15008", true, "none", ["deny loop"; 2]),
        ("192.0.2.1", "default/web:15008", false, "plaintext", ["deny loop"; 2]),
        ("test/nginx", "10.96.0.1:81", true, "none", ["deny no-such-service-port"; 2]),
    ];
    for (from, to, captured, transport, verdicts) in rows {
        for (world, verdict) in [&permissive, &strict].into_iter().zip(verdicts) {
            let answer = world.one(from, to);
            assert_eq!(
                (answer.captured, answer.transport.as_str()),
                (captured, transport),
                "{from} → {to}: {answer:?}"
            );
            assert_eq!(format!("{} {}", answer.decision, answer.reason), verdict, "{from} → {to}: {answer:?}");
            assert_eq!(answer.decision == "deny", !answer.remedies.is_empty(), "{answer:?}");
        }
    }
    let answer = strict.one("test/legacy-app", "default/web:8080");
    let mode = answer.peer_authentication.expect("somebody enforces it");
    let rule = answer.policy.expect("a rule refused");
    assert_eq!((mode.mode.as_str(), rule.name.as_str()), ("STRICT", "s"));
    assert!(rule.place.is_some_and(|place| place.starts_with("a.yaml document")), "{:?}", mode.policy);
    assert_eq!(strict.one("test/nginx", "test/legacy-app:8080").peer_authentication, None, "[PA.11]");
}

/// What a remedy quotes for a manifest, between two of its words.
fn quoted<'a>(remedies: &'a [String], begin: &str, end: &str) -> &'a str {
    let found = remedies.iter().find_map(|line| {
        let (_, rest) = line.split_once(begin)?;
        if end.is_empty() { Some(rest) } else { Some(rest.split_once(end)?.0) }
    });
    found.unwrap_or_else(|| panic!("{begin:?} … {end:?} in {remedies:#?}"))
}

/// What is proposed is put into the manifests, and the connection is allowed then.
#[test]
fn what_would_allow_it_does() {
    let allowed = |world: &World, from: &str, to: &str| {
        let answer = world.one(from, to);
        assert_eq!(answer.decision, "allow", "{answer:#?}");
    };
    let pair = ("test/legacy-app", "default/web:8080");

    // STRICT: by the label, or by an exception, where nothing selects the pod and where something does ([PA.3]).
    let strict = peer("default/s", "{mtls: {mode: STRICT}}");
    let remedies = with(&strict).one(pair.0, pair.1).remedies;
    assert!(
        quoted(&remedies, "bring the client into the mesh: ", "")
            .starts_with("label pod test/legacy-app istio.io/dataplane-mode=ambient")
    );
    allowed(&World::of(&(pods() + &strict).replace("dataplane-mode: none", "dataplane-mode: ambient")), pair.0, pair.1);
    let spec = quoted(&remedies, "in namespace default with ", "");
    let except = peer("default/except", &format!("{{{}}}", spec.replacen(" and ", ", ", 1)));
    allowed(&with(&(strict.clone() + &except)), pair.0, pair.1);
    let of_web = |ports: &str| peer("default/of-web", &format!("{{selector: {{matchLabels: {{app: web}}}}{ports}}}"));
    let remedies = with(&(strict.clone() + &of_web(""))).one(pair.0, pair.1).remedies;
    let ports = quoted(&remedies, "reach the port: ", " in PeerAuthentication default/of-web");
    allowed(&with(&(strict.clone() + &of_web(&format!(", {ports}")))), pair.0, pair.1);

    // An ALLOW policy that does not know the client, with an identity and without.
    let allow =
        |rules: &str| authz("default/allow", &format!("{{selector: {{matchLabels: {{app: web}}}}, rules: [{rules}]}}"));
    let nobody = "{from: [{source: {principals: [cluster.local/ns/x/sa/y]}}]}";
    for from in ["test/nginx", "test/legacy-app", "192.0.2.7"] {
        let world = with(&allow(nobody));
        let refused = world.one(from, pair.1);
        assert_eq!(refused.reason, "no-allow-match");
        let rule = quoted(
            &refused.remedies[refused.remedies.len() - 1..],
            "add the rule ",
            " to AuthorizationPolicy default/allow",
        );
        allowed(&with(&allow(&format!("{nobody}, {rule}"))), from, pair.1);
        // And nobody else.
        assert_eq!(with(&allow(&format!("{nobody}, {rule}"))).one("192.0.2.8", pair.1).decision, "deny");
    }
    // Enrolled is not enough there: the principal is asked for as well.
    let both = with(&allow(nobody)).one("test/legacy-app", pair.1).remedies.remove(0);
    assert!(
        both.contains("label pod test/legacy-app") && both.contains("cluster.local/ns/test/sa/legacy-app"),
        "{both}"
    );

    // A DENY rule: excepted, with sources and without.
    let deny = |rule: &str| authz("default/deny", &format!("{{action: DENY, rules: [{rule}]}}"));
    let namespaced = deny("{from: [{source: {namespaces: [test]}}]}");
    let refused = with(&namespaced).one("test/nginx", pair.1);
    assert_eq!((refused.reason.as_str(), refused.policy.and_then(|policy| policy.rule)), ("explicit-deny", Some(0)));
    let except = quoted(&refused.remedies, "add ", " to each source");
    allowed(&with(&deny(&format!("{{from: [{{source: {{namespaces: [test], {except}}}}}]}}"))), "test/nginx", pair.1);
    let refused = with(&deny("{to: [{operation: {ports: [\"8080\"]}}]}")).one("192.0.2.7", pair.1);
    let from = quoted(&refused.remedies, "give it ", "");
    allowed(&with(&deny(&format!("{{{from}, to: [{{operation: {{ports: [\"8080\"]}}}}]}}"))), "192.0.2.7", pair.1);
    // "Require mTLS": what helps is an identity.
    let refused = with(&deny("{from: [{source: {notPrincipals: [\"*\"]}}]}")).one(pair.0, pair.1);
    assert!(refused.remedies[0].starts_with("bring the client into the mesh"), "{:?}", refused.remedies);
}

/// Each endpoint that a Service could choose is judged, and each once.
#[test]
fn every_endpoint_of_a_service_has_its_answer() {
    let more: String = (10..15)
        .map(|n| pod(&format!("default/web-{n}"), &format!("10.0.0.{n}"), "there", "app: web, v: \"2\""))
        .collect();
    let strict = peer("default/two", "{selector: {matchLabels: {v: \"2\"}}, mtls: {mode: STRICT}}");
    let world = with(&(more + &strict));
    for to in ["10.96.0.1:80", "web.default.svc.cluster.local:80", "svc/web:80"] {
        let answers = world.ask("test/legacy-app", to).expect("an answer");
        assert_eq!(answers.len(), 6, "{to}");
        let denied = answers.iter().filter(|answer| answer.decision == "deny").count();
        assert_eq!(denied, 5);
        assert!(answers.iter().all(|answer| answer.service.as_deref() == Some("default/web")));
    }
}

#[test]
fn whoever_is_named_is_found_or_said_to_be_unknown() {
    let world = with("");
    for from in ["test/nginx", "nginx.test", "10.0.0.1", "::ffff:10.0.0.1"] {
        assert_eq!(world.one(from, "web:8080").source.pod.as_deref(), Some("nginx"), "{from}");
    }
    for to in
        ["default/web:8080", "web:8080", "web.default:8080", "pod/web:8080", "[::ffff:10.0.0.3]:8080", "10.0.0.3:8080"]
    {
        assert_eq!(world.one("test/nginx", to).destination.pod.as_deref(), Some("web"), "{to}");
    }
    for (from, to, says) in [
        ("test/nobody", "web:80", "there is no pod or workload test/nobody"),
        ("test/nginx", "nobody:80", "there is no pod, workload or Service default/nobody"),
        ("test/nginx", "web", "write NAMESPACE/POD:PORT"),
        ("test/nginx", "web:0", "write NAMESPACE/POD:PORT"),
        ("test/nginx", "web:+80", "write NAMESPACE/POD:PORT"),
        ("test/nginx", "::1:80", "write NAMESPACE/POD:PORT"),
        ("", "web:80", "write NAMESPACE/POD"),
        ("a b", "web:80", "write NAMESPACE/POD"),
        ("a/b/c", "web:80", "write NAMESPACE/POD"),
    ] {
        let error = world.ask(from, to).expect_err(to);
        assert!(error.contains(says) && !error.contains('\n'), "{from} {to}: {error}");
    }
}

/// Arguments are from outside: never a panic, and nothing that is no name, address or port.
#[test]
fn fuzzed_arguments_are_answered_or_refused() {
    let world = with("");
    fuzz::run("why", |bytes| {
        let text = String::from_utf8_lossy(bytes);
        let (from, to) = text.split_once(' ').unwrap_or((&text, &text));
        for wrong in [client(from).err(), server(to).err()].into_iter().flatten() {
            assert!(wrong.starts_with('"') && !wrong.contains('\n'), "{wrong:?}");
        }
        if let Ok((_, port)) = server(to) {
            assert_ne!(port, 0);
        }
        // Whatever is understood has an answer, or one line.
        if let Err(line) = world.ask(from, to) {
            assert!(!line.contains('\n'), "{line:?}");
        }
    });
}

/// Whoever is refused reads what would help, whatever the reason.
#[test]
fn every_reason_that_refuses_has_a_remedy() {
    const ADMITS: [Reason; 10] = [
        Reason::Captured,
        Reason::TunnelPort,
        Reason::NoAllowPolicies,
        Reason::SamePod,
        Reason::Agent,
        Reason::Probe,
        Reason::NeedsAgent,
        Reason::AllowMatch,
        Reason::ServerNotEnrolled,
        Reason::UntrustedTrustDomain,
    ];
    let unknown = remedy::general("?");
    for reason in Reason::ALL.into_iter().filter(|reason| !ADMITS.contains(reason)) {
        assert_ne!(remedy::general(reason.as_str()), unknown, "{}", reason.as_str());
    }
    for word in [
        "untrusted-trust-domain",
        "no-such-service-port",
        "no-endpoint",
        "ambiguous-address",
        "not-in-registry",
        "connect",
        "network-policy",
        "tls-failure",
        "h2-handshake-failure",
        "identity-error",
        "refused-by-peer",
        "connection-limit",
        "memory-limit",
        "handshake-limit",
        "open-files-limit",
        "unknown-workload",
        "identity-address-mismatch",
        "agent-port",
    ] {
        assert_ne!(remedy::general(word), unknown, "{word}");
    }
}

/// A refusal of the past is told with who it was then, the rule that it was, and what policy says now.
#[test]
fn what_was_refused_is_told_with_what_holds_now() {
    let refusal = Refusal {
        direction: Direction::Inbound,
        source: Party { ip: Some([10, 0, 0, 2].into()), pod: Some(ObjectRef::new("test", "legacy-app")) },
        destination: Party { ip: Some([10, 0, 0, 1].into()), pod: Some(ObjectRef::new("test", "nginx")) },
        port: 8080,
        reason: "strict-requires-mtls",
        rule: Some(Rule { kind: "PeerAuthentication", object: ObjectRef::new("test", "strict"), rule: None }),
    };
    let earlier = Instant::now().checked_sub(Duration::from_secs(60)).unwrap_or_else(Instant::now);
    let mut seen = Seen::now(2, earlier, Circumstances::new("detail"));
    seen.add(Seen::now(1, Instant::now(), Circumstances::new("detail")));
    let told = |world: &World| world.refusals(vec![(refusal.clone(), seen.clone())]).remove(0);
    let strict = peer("test/strict", "{mtls: {mode: STRICT}}");
    let now = told(&with(&strict));
    assert_eq!((now.count, now.now.as_deref()), (3, Some("deny strict-requires-mtls")));
    assert!(now.last_at_ms >= now.first_at_ms && now.last_at_ms <= unix_ms());
    assert_eq!(now.policy.as_ref().map(|policy| policy.name.as_str()), Some("strict"));
    assert!(now.policy.and_then(|policy| policy.place).is_some());
    assert!(now.remedies[0].starts_with("bring the client into the mesh"), "{:?}", now.remedies);
    // The policy is gone.
    let then = told(&with(""));
    assert_eq!(then.now.as_deref(), Some("allow no-allow-policies"));
    assert_eq!(then.remedies, ["nothing: it would be allowed now"]);
    assert_eq!(then.policy.and_then(|policy| policy.place), None);
    // The client is gone.
    let gone = told(&World::of(&(MESH.to_owned() + &pod("test/nginx", "10.0.0.1", "here", "") + &strict)));
    assert_eq!((gone.now, gone.source.pod.as_deref()), (None, Some("legacy-app")));
}

/// A pod that should be in the mesh and could not be brought in is refused, and why is said.
#[test]
fn a_pod_that_could_not_be_enrolled_is_named() {
    let mut world = with("");
    let (uid, _) = world.states.pop_first().expect("nginx is here");
    world.states.insert(uid, enroll::State::Failed("no such namespace".to_owned()));
    for (from, to, by) in
        [("test/nginx", "default/web:8080", "client"), ("test/legacy-app", "test/nginx:8080", "server")]
    {
        let answer = world.one(from, to);
        assert_eq!((answer.reason.as_str(), answer.refused_by.as_deref()), ("enrolment-pending", Some(by)));
        assert!(answer.detail.contains("no such namespace"), "{answer:?}");
    }
}
