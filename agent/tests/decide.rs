//! `culvert decide` and `culvert diff`: the executable itself, on manifests and connections as people have them.
#![expect(clippy::disallowed_methods, reason = "a test awaits what it has started, or ends with it")]

use std::{
    fs,
    io::Write as _,
    path::Path,
    process::{Command, Output, Stdio},
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use tempfile::TempDir;

const PODS: &str = "\
apiVersion: v1
kind: Namespace
metadata: {name: default, labels: {istio.io/dataplane-mode: ambient}}
---
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: default, uid: web, labels: {app: web}}
spec: {nodeName: node-1, serviceAccountName: web, containers: [{name: c, image: i}]}
status: {podIP: 10.0.0.2, podIPs: [{ip: 10.0.0.2}], phase: Running}
";

/// By principal for everybody of the namespace, and one port denied.
const POLICIES: &str = "\
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: allow, namespace: default}
spec: {rules: [{from: [{source: {principals: [cluster.local/ns/test/sa/nginx]}}]}, {from: [{source: {ipBlocks: [10.9.0.0/16]}}]}]}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: deny, namespace: default}
spec: {selector: {matchLabels: {app: web}}, action: DENY, rules: [{to: [{operation: {ports: ['81']}}]}]}
";

fn folder(files: &[(&str, &str)]) -> TempDir {
    let dir = tempfile::tempdir().expect("a folder");
    for (name, text) in files {
        fs::write(dir.path().join(name), text).expect("a file");
    }
    dir
}

fn culvert(arguments: &[&str], input: &str) -> Output {
    let mut child = Command::new(env!("CARGO_BIN_EXE_culvert"))
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the executable starts");
    let mut stdin = child.stdin.take().expect("piped");
    let input = input.to_owned();
    // Its answers may fill the pipe before it has read everything.
    let writing = std::thread::spawn(move || stdin.write_all(input.as_bytes()));
    let output = child.wait_with_output().expect("it ends");
    // It may have ended before it read anything.
    let _ = writing.join().expect("no panic");
    output
}

fn decide(path: &Path, lines: &[&str]) -> (Vec<Value>, Option<i32>) {
    let path = path.to_str().expect("UTF-8");
    let output = culvert(&["decide", "-f", path, "--connections", "-", "-o", "json"], &(lines.join("\n") + "\n"));
    let text = String::from_utf8(output.stdout).expect("UTF-8");
    (text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect(), output.status.code())
}

const NGINX: &str = r#"{"source":{"namespace":"test","serviceAccount":"nginx","ip":"10.1.0.1"},"dest":{"namespace":"default","labels":{"app":"web"},"ip":"10.0.0.2","port":80},"tls":true}"#;

fn edited(edit: impl FnOnce(&mut Value)) -> String {
    let mut connection: Value = serde_json::from_str(NGINX).expect("JSON");
    edit(&mut connection);
    connection.to_string()
}

#[test]
fn every_line_has_its_answer_in_order() {
    let dir = folder(&[("policies.yaml", POLICIES)]);
    let line = |edit: fn(&mut Value)| edited(edit);
    let lines = [
        NGINX.to_owned(),
        line(|c| c["dest"]["port"] = json!(81)),
        line(|c| c["tls"] = json!(false)),
        line(|c| {
            c["tls"] = json!(false);
            c["source"]["ip"] = json!("10.9.1.1");
        }),
        line(|c| c["dest"]["labels"] = json!({"app": "other"})),
        line(|c| c["dest"]["enrolled"] = json!(false)),
        line(|c| c["dest"]["port"] = json!(15006)),
        line(|c| c["probe"] = json!(true)),
        line(|c| c["samePod"] = json!(true)),
        line(|c| c["source"]["trustDomain"] = json!("example.org")),
        line(|c| c["dest"]["namespace"] = json!("elsewhere")),
    ];
    let (answers, status) = decide(dir.path(), &lines.iter().map(String::as_str).collect::<Vec<_>>());
    let shown: Vec<String> = answers
        .iter()
        .map(|answer| {
            let by = answer.get("policy").map_or_else(String::new, |by| format!(" {}#{}", by, answer["rule"]));
            format!("{} {}{by}", answer["decision"], answer["reason"]).replace('"', "")
        })
        .collect();
    assert_eq!(
        shown,
        [
            "allow allow-match default/allow#0",
            "deny explicit-deny default/deny#0",
            "deny no-allow-match",
            "allow allow-match default/allow#1",
            "allow allow-match default/allow#0",
            "allow server-not-enrolled",
            "deny loop",
            "allow probe",
            "allow same-pod",
            "deny untrusted-trust-domain",
            "allow no-allow-policies",
        ]
    );
    assert_eq!(status, Some(0));
    assert!(answers.iter().all(|answer| answer["warnings"].is_array()));
}

#[test]
fn a_bad_line_gives_an_error_in_its_place_and_status_1() {
    let dir = folder(&[("policies.yaml", POLICIES)]);
    let typo = NGINX.replace("\"tls\"", "\"tsl\"");
    let nameless = edited(|c| drop(c["source"].as_object_mut().expect("a map").remove("namespace")));
    let port = edited(|c| c["dest"]["port"] = json!(0));
    let (answers, status) = decide(dir.path(), &["{", NGINX, &typo, &nameless, &port, "", "[]", NGINX]);
    let errors: Vec<Option<&str>> = answers.iter().map(|answer| answer.get("error").and_then(Value::as_str)).collect();
    let words = [Some("column"), None, Some("tsl"), Some("source.namespace"), Some("dest.port"), Some("column"), None];
    assert_eq!(errors.len(), words.len(), "{answers:?}");
    for (error, word) in errors.iter().zip(words) {
        assert_eq!(error.is_some(), word.is_some(), "{answers:?}");
        assert!(error.unwrap_or_default().contains(word.unwrap_or_default()), "{error:?}");
    }
    assert_eq!((answers[4]["line"].as_u64(), answers[5]["line"].as_u64()), (Some(5), Some(7)));
    assert_eq!(status, Some(1));
}

/// [AP.6], [AP.14]: what a verdict is not, and what it is more than.
#[test]
fn warnings_say_what_policies_seem_to_say() {
    let policies = "\
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: post, namespace: default}
spec: {action: DENY, rules: [{to: [{operation: {methods: [POST], ports: ['81']}}]}]}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: new, namespace: default, annotations: {istio.io/dry-run: 'true'}}
spec: {}
";
    let dir = folder(&[("policies.yaml", policies)]);
    let port = edited(|c| c["dest"]["port"] = json!(81));
    let (answers, _) = decide(dir.path(), &[NGINX, &port]);
    assert_eq!(answers[0]["decision"], "allow");
    assert!(answers[0]["warnings"].to_string().contains("deny no-allow-match [AP.6]"), "{answers:?}");
    assert_eq!(answers[1]["policy"], "default/post");
    assert!(answers[1]["warnings"].to_string().contains("methods cannot be evaluated at L4 [AP.14]"), "{answers:?}");
}

/// The server of a line of the access log is the pod of the manifests; so it is where only its address is given.
#[test]
fn recorded_connections_are_judged_by_the_pods_of_the_manifests() {
    let dir = folder(&[("policies.yaml", POLICIES), ("pods.yaml", PODS)]);
    let tunnelled = r#"{"time":"2026-01-01T00:00:00Z","level":"info","scope":"access","message":"connection complete","src.addr":"10.1.0.1:40000","src.identity":"spiffe://cluster.local/ns/test/sa/nginx","dst.addr":"10.0.0.2:15008","dst.hbone_addr":"10.0.0.2:80","dst.workload":"web","dst.namespace":"default","direction":"inbound","bytes_sent":1,"bytes_recv":2,"duration":"3ms","reason":"allow-match"}"#;
    let plain = tunnelled
        .replace(r#""src.identity":"spiffe://cluster.local/ns/test/sa/nginx","#, "")
        .replace(r#""dst.hbone_addr":"10.0.0.2:80","#, "")
        .replace(":15008", ":81");
    let moved = tunnelled.replace("10.0.0.2", "10.0.0.7");
    let stranger = moved.replace("\"web\"", "\"gone\"");
    let by_ip = r#"{"source":{"ip":"10.9.0.1"},"dest":{"ip":"10.0.0.2","port":81}}"#;
    let (answers, status) = decide(dir.path(), &[tunnelled, &plain, &moved, &stranger, by_ip]);
    let reasons: Vec<&str> = answers.iter().map(|answer| answer["reason"].as_str().unwrap_or("error")).collect();
    assert_eq!(reasons, ["allow-match", "explicit-deny", "allow-match", "error", "explicit-deny"], "{answers:?}");
    assert_eq!(status, Some(1));
}

/// What an agent has logged between two restarts, as it lies in the file: its own words, and connections of both sides. The
/// addresses are those of [`PODS`], of a pod outside the mesh, and of nobody.
const LOG: &str = include_str!("decide/log.jsonl");

const OUTSIDE: &str = "\
apiVersion: v1
kind: Pod
metadata: {name: legacy, namespace: outside, uid: legacy}
spec: {nodeName: node-2, containers: [{name: c, image: i}]}
status: {podIP: 10.0.0.9, podIPs: [{ip: 10.0.0.9}], phase: Running}
";

/// §8: all of it is judged, and where no pod is at the other end nothing protects it.
#[test]
fn a_whole_log_of_an_agent_is_judged_without_an_error() {
    let dir = folder(&[("policies.yaml", POLICIES), ("pods.yaml", PODS), ("outside.yaml", OUTSIDE)]);
    let (answers, status) = decide(dir.path(), &LOG.lines().collect::<Vec<_>>());
    let reasons: Vec<&str> = answers.iter().map(|answer| answer["reason"].as_str().unwrap_or("error")).collect();
    let said = [
        "allow-match",
        "server-not-enrolled",
        "server-not-enrolled",
        "server-not-enrolled",
        "explicit-deny",
        "no-allow-match",
        "probe",
    ];
    assert_eq!(reasons, said, "{answers:?}");
    assert_eq!(status, Some(0));

    // Who told it makes the difference: a server that is nobody's cannot have told anything.
    let inbound = LOG.lines().find(|line| line.contains("203.0.113.5")).expect("one").replace("outbound", "inbound");
    let workload = LOG
        .lines()
        .find(|line| line.contains("203.0.113.5"))
        .expect("one")
        .replace(r#""direction""#, r#""dst.workload":"gone","dst.namespace":"default","direction""#);
    let words = r#"{"level":"INFO","message":"neither a connection nor a line of a log"}"#;
    let (answers, status) = decide(dir.path(), &[&inbound, &workload, words]);
    assert!(answers.iter().all(|answer| answer["error"].is_string()) && answers.len() == 3, "{answers:?}");
    assert_eq!(status, Some(1));
}

/// A pod moves into the place of a server that was nobody's, and has a policy.
#[test]
fn diff_takes_a_whole_log_as_well() {
    let moved = PODS.replace("10.0.0.2", "203.0.113.5");
    let [old, new] = [PODS, &moved]
        .map(|pods| folder(&[("policies.yaml", POLICIES), ("pods.yaml", pods), ("outside.yaml", OUTSIDE)]));
    let paths = [&old, &new].map(|dir| dir.path().to_str().expect("UTF-8").to_owned());
    let output = culvert(&["diff", &paths[0], &paths[1], "--connections", "-", "-o", "json"], LOG);
    let text = String::from_utf8(output.stdout).expect("UTF-8");
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    assert_eq!(lines.len(), 1, "{text}");
    assert_eq!(lines[0]["connection"]["dst.addr"], "203.0.113.5:443");
    assert_eq!(
        (&lines[0]["old"]["reason"], &lines[0]["new"]["reason"]),
        (&json!("server-not-enrolled"), &json!("no-allow-match"))
    );
    assert_eq!(output.status.code(), Some(0), "{text}");
}

/// As many as a busy day has: each has its answer, and it is a matter of seconds.
#[test]
fn many_connections_are_judged_in_seconds() {
    // Of a program that was not optimized, on a machine that does other things as well.
    let (count, bound) = match std::env::var_os("CULVERT_TEST_FULL") {
        Some(_) => (1_000_000, Duration::from_secs(600)),
        None => (100_000, Duration::from_secs(120)),
    };
    let dir = folder(&[("policies.yaml", POLICIES), ("pods.yaml", PODS)]);
    let lines: String = (0..count)
        .map(|number| {
            let (third, fourth) = (number / 256 % 256, number % 256);
            NGINX.replace("10.1.0.1", &format!("10.9.{third}.{fourth}")).replace("true", ["true", "false"][number % 2])
                + "\n"
        })
        .collect();
    let started = Instant::now();
    let path = dir.path().to_str().expect("UTF-8");
    let output = culvert(&["decide", "-f", path, "--connections", "-", "-o", "json"], &lines);
    let took = started.elapsed();
    println!("{count} connections in {} ms", took.as_millis());
    assert_eq!(output.status.code(), Some(0));
    let answers = output.stdout.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
    let allowed = answers.filter(|line| line.starts_with(br#"{"decision":"allow","reason":"allow-match""#)).count();
    assert_eq!(allowed, count);
    assert!(took < bound, "{count} connections took {took:?}");
}

#[test]
fn one_connection_can_be_given_in_flags() {
    let dir = folder(&[("policies.yaml", POLICIES)]);
    let path = dir.path().to_str().expect("UTF-8");
    let client = ["--source-namespace", "test", "--source-service-account", "nginx", "--tls"];
    let server = ["--dest-namespace", "default", "--dest-labels", "app=web,tier=x", "--dest-port", "81"];
    let output = culvert(&[&["decide", "-f", path][..], &client, &server].concat(), "");
    let text = String::from_utf8(output.stdout).expect("UTF-8");
    assert!(text.contains("explicit-deny") && text.contains("default/deny#0"), "{text}");
    assert_eq!(output.status.code(), Some(0));
    let output = culvert(&["decide", "-f", path], "");
    assert_eq!(output.status.code(), Some(2), "neither connections nor one");
    let output = culvert(&["decide", "-f", "/nowhere", "--dest-port", "1"], "");
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).starts_with("culvert: read /nowhere"));
}

#[test]
fn diff_names_the_connections_whose_verdict_changes() {
    let old = folder(&[("policies.yaml", POLICIES)]);
    let new = folder(&[("policies.yaml", &POLICIES.replace("sa/nginx", "sa/other"))]);
    let port = edited(|c| c["dest"]["port"] = json!(81));
    let paths = [&old, &new].map(|dir| dir.path().to_str().expect("UTF-8").to_owned());
    let arguments = ["diff", &paths[0], &paths[1], "--connections", "-", "-o", "json"];
    let output = culvert(&arguments, &format!("{port}\n{NGINX}\n"));
    let text = String::from_utf8(output.stdout).expect("UTF-8");
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    assert_eq!(lines.len(), 1, "{text}");
    assert_eq!(lines[0]["line"], 2);
    assert_eq!((&lines[0]["old"]["decision"], &lines[0]["old"]["policy"]), (&json!("allow"), &json!("default/allow")));
    assert_eq!((&lines[0]["new"]["decision"], &lines[0]["new"]["reason"]), (&json!("deny"), &json!("no-allow-match")));
    assert_eq!(lines[0]["connection"]["dest"]["port"], 80);
    assert_eq!(output.status.code(), Some(0));
    let table = culvert(&arguments[..5], &format!("{NGINX}\nnonsense\n"));
    let text = String::from_utf8(table.stdout).expect("UTF-8");
    assert!(text.contains("allow allow-match") && text.contains("deny no-allow-match"), "{text}");
    assert_eq!(table.status.code(), Some(1), "one line was no connection");
}
