//! Why a connection was refused, and what can go to STRICT: asked of running agents, after real connections; at their default
//! log level, and at another.

use std::fs;
use std::process::{Output, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use culvert_tests::command;
use culvert_tests::programs::Failure;
use culvert_tests::sandbox::{Family, LogLine, MeshPlan, Node, Plan, PodPlan, Sandbox, built, own_name};
use nix::sys::signal::Signal;
use serde_json::Value;

const NGINX: &str = "test/nginx";
const LEGACY: &str = "test/legacy-app";
/// On node a, with an AuthorizationPolicy.
const RATINGS: &str = "default/ratings";
/// On node b, without any policy.
const DETAILS: &str = "default/details";

const POLICIES: &str = "\
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: strict, namespace: test}
spec: {mtls: {mode: STRICT}}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: not-nginx, namespace: default}
spec:
  selector: {matchLabels: {app: ratings}}
  action: DENY
  rules:
  - to: [{operation: {ports: [\"1\"]}}]
  - from: [{source: {principals: [cluster.local/ns/test/sa/nginx]}}]
";

fn limit() -> Duration {
    Duration::from_secs(10)
}

fn mesh(test: &str, agent_arguments: &[&str]) -> Result<Sandbox> {
    let mut sandbox = Sandbox::build(Plan::bookinfo(&own_name(test)))?;
    sandbox.manifests().apply("policies.yaml", POLICIES)?;
    let mut mesh = MeshPlan::new(built("culvert")?);
    mesh.agent_arguments = agent_arguments.iter().map(|&argument| argument.to_owned()).collect();
    sandbox.start_mesh(&mesh)?;
    Ok(sandbox)
}

fn run(sandbox: &Sandbox, node: Node, arguments: &[&str]) -> Result<Output> {
    let mut command = sandbox.node_place(node).command(built("culvert")?)?;
    command.args(arguments).stdin(Stdio::null());
    command.output().with_context(|| format!("culvert {arguments:?}"))
}

/// What it printed; it must have succeeded.
fn shown(sandbox: &Sandbox, node: Node, arguments: &[&str]) -> Result<String> {
    let output = run(sandbox, node, arguments)?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "culvert {arguments:?}: {}: {said}", output.status);
    Ok(String::from_utf8(output.stdout)?)
}

fn json_of(sandbox: &Sandbox, node: Node, arguments: &[&str]) -> Result<Vec<Value>> {
    let text = shown(sandbox, node, &[arguments, &["-o", "json"]].concat())?;
    serde_json::from_str(&text).with_context(|| format!("{arguments:?}: {text}"))
}

fn is_pod(end: &Value, pod: &str) -> bool {
    end["namespace"]
        .as_str()
        .zip(end["pod"].as_str())
        .is_some_and(|(namespace, name)| format!("{namespace}/{name}") == pod)
}

fn remedies(of: &Value) -> String {
    let all = of["remedies"].as_array().into_iter().flatten();
    all.filter_map(Value::as_str).collect::<Vec<_>>().join("\n")
}

/// A connection that must be refused.
fn refused(sandbox: &Sandbox, from: &str, to: &str, port: u16) -> Result<()> {
    let to = sandbox.pod(to)?.at(Family::V4, port);
    command::wait_for(&format!("{from} to {to} is refused"), limit(), || {
        let got = sandbox.http(from, to, "call")?;
        Ok(matches!(got.failure, Some(Failure::Refused | Failure::Reset)).then_some(()))
    })
}

fn served(sandbox: &Sandbox, from: &str, to: &str, port: u16) -> Result<()> {
    let to = sandbox.pod(to)?.at(Family::V4, port);
    command::wait_for(&format!("{from} to {to} is served"), limit(), || {
        Ok((sandbox.http(from, to, "call")?.status == Some(200)).then_some(()))
    })
}

/// The refusals of this reason between two pods, once there is one.
fn refusal(sandbox: &Sandbox, from: &str, to: &str, reason: &str) -> Result<Value> {
    command::wait_for(&format!("culvert why tells of {from} to {to}: {reason}"), limit(), || {
        let all = json_of(sandbox, Node::A, &["why"])?;
        let is = |of: &&Value| of["reason"] == reason && is_pod(&of["source"], from) && is_pod(&of["destination"], to);
        Ok(all.iter().find(is).cloned())
    })
}

/// §3, §5.3, §6.2: a refusal by the kernel and one by the agent are told with who, whom, when, which rule of which object,
/// and what would allow it; and so is what would happen now, by the same function.
#[test]
fn a_refusal_is_told_with_its_rule_and_its_remedy() -> Result<()> {
    let sandbox = mesh("why", &[])?;
    for _ in 0..3 {
        refused(&sandbox, LEGACY, NGINX, 8080)?;
    }
    refused(&sandbox, NGINX, RATINGS, 9080)?;

    // In the kernel: no process of ours has seen the connection.
    let strict = refusal(&sandbox, LEGACY, NGINX, "strict-requires-mtls")?;
    let policy = &strict["policy"];
    ensure!(policy["kind"] == "PeerAuthentication" && policy["name"] == "strict" && policy["namespace"] == "test");
    ensure!(policy["place"] == "policies.yaml document 1 (line 1)", "{strict}");
    ensure!(strict["port"] == 8080 && strict["direction"] == "inbound", "{strict}");
    let count = strict["count"].as_u64().context("a count")?;
    let (first, last) = (strict["firstAtMs"].as_u64().context("first")?, strict["lastAtMs"].as_u64().context("last")?);
    ensure!(count >= 3 && first > 0 && first <= last, "{strict}");
    let remedy = remedies(&strict);
    ensure!(remedy.contains("label pod test/legacy-app istio.io/dataplane-mode=ambient"), "{remedy}");
    ensure!(remedy.contains("portLevelMtls: {\"8080\": {mode: PERMISSIVE}}"), "{remedy}");

    // By the agent, in a tunnel: the second rule of the policy, and the client's identity.
    let denied = refusal(&sandbox, NGINX, RATINGS, "explicit-deny")?;
    let policy = &denied["policy"];
    ensure!(
        policy["kind"] == "AuthorizationPolicy" && policy["name"] == "not-nginx" && policy["rule"] == 1,
        "{denied}"
    );
    ensure!(denied["source"]["identity"] == "spiffe://cluster.local/ns/test/sa/nginx", "{denied}");
    ensure!(denied["port"] == 9080 && denied["now"] == "deny explicit-deny", "{denied}");
    ensure!(remedies(&denied).contains("notPrincipals: [\"cluster.local/ns/test/sa/nginx\"]"), "{denied}");
    // The client's side of the same connection: what the server's side said, and what would help there.
    let told = refusal(&sandbox, NGINX, RATINGS, "refused-by-peer")?;
    ensure!(told["direction"] == "outbound" && told["now"] == "deny explicit-deny", "{told}");
    ensure!(remedies(&told).contains("notPrincipals"), "{told}");

    // For people; and only what is asked for.
    let table = shown(&sandbox, Node::A, &["why", "--pod", NGINX])?;
    let header = table.lines().next().unwrap_or_default().split("   ").map(str::trim).filter(|name| !name.is_empty());
    ensure!(
        header.collect::<Vec<_>>() == ["LAST", "COUNT", "SOURCE", "DESTINATION", "REASON", "POLICY", "TO ALLOW IT"],
        "{table}"
    );
    for part in [
        "legacy-app.test",
        "nginx.test:8080",
        "PeerAuthentication test/strict",
        "AuthorizationPolicy default/not-nginx#1",
    ] {
        ensure!(table.contains(part), "{part} in {table}");
    }
    ensure!(shown(&sandbox, Node::A, &["why", "-n", "test", "-o", "wide"])?.contains("policies.yaml document 1"));
    let none = run(&sandbox, Node::A, &["why", "--pod", DETAILS])?;
    ensure!(none.status.success() && none.stdout.is_empty(), "{none:?}");
    ensure!(String::from_utf8_lossy(&none.stderr).contains("nothing of that kind was refused"), "{none:?}");

    // A pair, now.
    let text = shown(&sandbox, Node::A, &["why", LEGACY, "test/nginx:8080"])?;
    for part in [
        "not in the mesh: pod label istio.io/dataplane-mode=none (row 5)",
        "not captured, in plaintext",
        "STRICT, set by PeerAuthentication test/strict (policies.yaml document 1 (line 1))",
        "deny, strict-requires-mtls, by the server's side",
        "label pod test/legacy-app istio.io/dataplane-mode=ambient",
        "Last hour:   refused ",
    ] {
        ensure!(text.contains(part), "{part:?} in {text}");
    }
    let one = |to: &str| -> Result<Value> {
        let mut answers = json_of(&sandbox, Node::A, &["why", NGINX, to])?;
        ensure!(answers.len() == 1, "{answers:?}");
        Ok(answers.remove(0))
    };
    let address = sandbox.pod(RATINGS)?.at(Family::V4, 9080).to_string();
    for to in ["ratings.default.svc:9080", "default/ratings:9080", &address] {
        let answer = one(to)?;
        ensure!(answer["captured"] == true && answer["transport"] == "tunnel", "{answer}");
        ensure!(answer["reason"] == "explicit-deny" && answer["policy"]["rule"] == 1, "{answer}");
        ensure!(answer["refused"].as_u64() >= Some(1), "{answer}");
    }
    ensure!(one("details:9080")?["decision"] == "allow");
    let wrong = run(&sandbox, Node::A, &["why", NGINX, "nobody:80"])?;
    let said = String::from_utf8(wrong.stderr)?;
    ensure!(!wrong.status.success() && said.lines().count() == 1 && said.contains("nobody"), "{said}");

    // What was refused stays told when the policy is gone, and that it would be allowed now.
    sandbox.manifests().delete("policies.yaml")?;
    served(&sandbox, LEGACY, NGINX, 8080)?;
    let strict = refusal(&sandbox, LEGACY, NGINX, "strict-requires-mtls")?;
    ensure!(strict["now"] == "allow no-allow-policies" && strict["count"].as_u64() >= Some(count), "{strict}");
    ensure!(remedies(&strict).starts_with("nothing"), "{strict}");
    Ok(())
}

/// [K.4]: what is refused because no agent is there is told by the next one: who, whom, and that nobody was there.
#[test]
fn what_was_refused_while_no_agent_ran_is_told_by_the_next_one() -> Result<()> {
    let (client, server) = ("test/client", "test/server");
    let plan = Plan::empty(&own_name("why-gone"))
        .pod(PodPlan::new(Node::A, "test", "client"))
        .pod(PodPlan::new(Node::B, "test", "server").http(&[9080]));
    let mut sandbox = Sandbox::build(plan)?;
    let mesh = MeshPlan::new(built("culvert")?);
    sandbox.start_mesh(&mesh)?;
    served(&sandbox, client, server, 9080)?;
    sandbox.signal_agent(Node::A, Signal::SIGKILL)?;
    refused(&sandbox, client, server, 9080)?;
    sandbox.start_agent(&mesh, Node::A)?;
    sandbox.wait_ready(Node::A)?;
    let told = refusal(&sandbox, client, server, "no-listener")?;
    ensure!(told["direction"] == "outbound" && told["port"] == 9080, "{told}");
    ensure!(told["count"].as_u64() >= Some(1) && told["policy"].is_null(), "{told}");
    served(&sandbox, client, server, 9080)
}

/// §3: whatever the log level, which says nothing of the access log either.
#[test]
fn a_refusal_is_told_whatever_the_log_level() -> Result<()> {
    let sandbox = mesh("why-quiet", &["--log-level", "error"])?;
    refused(&sandbox, LEGACY, NGINX, 8080)?;
    refused(&sandbox, NGINX, RATINGS, 9080)?;
    // By the kernel, by the server's agent, and what the client's agent was told.
    for (from, to, reason, policy) in [
        (LEGACY, NGINX, "strict-requires-mtls", "strict"),
        (NGINX, RATINGS, "explicit-deny", "not-nginx"),
        (NGINX, RATINGS, "refused-by-peer", ""),
    ] {
        let told = refusal(&sandbox, from, to, reason)?;
        ensure!(told["policy"]["name"].as_str().unwrap_or_default() == policy, "{told}");
        ensure!(!remedies(&told).is_empty() && told["count"].as_u64() >= Some(1), "{told}");
    }
    let (lines, _) = sandbox.agent_log(Node::A, 0)?;
    let level_counts = |line: &&LogLine| line.field("scope").as_deref() != Some("access");
    let other = lines.iter().filter(level_counts).find(|line| line.field("level").as_deref() != Some("ERROR"));
    ensure!(other.is_none(), "{other:?}");
    Ok(())
}

/// The row of a workload in the report of node b.
fn readiness(sandbox: &Sandbox, workload: &str) -> Result<Value> {
    let all = json_of(sandbox, Node::B, &["report", "strict", "-n", "default"])?;
    let (_, name) = workload.split_once('/').context("namespace/name")?;
    all.iter().find(|of| of["workload"] == name).cloned().with_context(|| format!("{workload} in {all:?}"))
}

/// [PA.11], [K.1], §16: who came in plaintext stands in the way, probes do not; once the client is in the mesh the workload
/// is ready, with manifests that are accepted, and do what they say.
#[test]
fn the_way_to_strict_is_shown_by_what_was_seen() -> Result<()> {
    let sandbox = mesh("strict", &[])?;
    served(&sandbox, NGINX, DETAILS, 9080)?;
    served(&sandbox, LEGACY, DETAILS, 9080)?;
    let blocked = command::wait_for("details is reported as blocked", limit(), || {
        let details = readiness(&sandbox, DETAILS)?;
        Ok((details["state"] == "blocked" && details["tunnelled"].as_u64() >= Some(1)).then_some(details))
    })?;
    let client = &blocked["clients"][0];
    ensure!(client["client"] == LEGACY && client["port"] == 9080 && client["mesh"] == "out", "{blocked}");
    ensure!(client["blocks"] == true && client["count"].as_u64() >= Some(1), "{blocked}");
    ensure!(client["why"].as_str().is_some_and(|why| why.contains("istio.io/dataplane-mode=none")), "{blocked}");
    ensure!(blocked["manifest"].is_null() && blocked["mode"] == "PERMISSIVE", "{blocked}");
    // Only its kubelet has come to it.
    let quiet = readiness(&sandbox, "default/productpage")?;
    ensure!(
        quiet["state"] == "ready" && quiet["plaintext"] == 0 && quiet["clients"] == serde_json::json!([]),
        "{quiet}"
    );
    let output = run(&sandbox, Node::B, &["report", "strict"])?;
    let (table, notes) = (String::from_utf8(output.stdout)?, String::from_utf8(output.stderr)?);
    ensure!(
        table.contains("blocked") && table.contains(LEGACY) && table.contains("kind: PeerAuthentication"),
        "{table}"
    );
    ensure!(notes.contains("seen since ") && notes.contains("this node only"), "{notes}");
    // STRICT already, and who was refused.
    refused(&sandbox, LEGACY, NGINX, 8080)?;
    let nginx = command::wait_for("nginx is reported with its refused client", limit(), || {
        let all = json_of(&sandbox, Node::A, &["report", "strict", "-n", "test"])?;
        // Beside it may stand the node: a probe that began before the agent's programs were all there is plaintext.
        let of_legacy = |client: &Value| client["client"] == LEGACY && client["refused"].as_u64() >= Some(1);
        Ok(all.into_iter().find(|of| {
            of["state"] == "strict" && of["clients"].as_array().is_some_and(|clients| clients.iter().any(of_legacy))
        }))
    })?;
    ensure!(nginx["workload"] == "nginx", "{nginx}");

    // The client comes into the mesh, as the namespace's label says.
    let file = "pod-test-legacy-app.yaml";
    let pod = fs::read_to_string(sandbox.manifests().path().join(file))?;
    let unlabelled: String =
        pod.lines().filter(|line| !line.contains("dataplane-mode")).map(|line| format!("{line}\n")).collect();
    ensure!(unlabelled != pod, "{pod}");
    sandbox.manifests().apply(file, &unlabelled)?;
    command::wait_for("details is ready", limit() * 2, || {
        let details = readiness(&sandbox, DETAILS)?;
        Ok((details["state"] == "ready" && details["clients"][0]["mesh"] == "in").then_some(()))
    })?;
    let manifests = shown(&sandbox, Node::B, &["report", "strict", "--manifests"])?;
    ensure!(manifests.contains("name: details") && manifests.contains("name: productpage"), "{manifests}");
    let mut validate = std::process::Command::new(built("culvert")?);
    let judged = command::finish(validate.args(["validate", "-f", "-", "-o", "json"]), Some(&manifests))?;
    for line in judged.lines() {
        let verdict: Value = serde_json::from_str(line)?;
        ensure!(verdict["verdict"] == "accept", "{line} of {manifests}");
    }
    ensure!(judged.lines().count() == 2, "{judged}");

    sandbox.manifests().apply("strict.yaml", &manifests)?;
    command::wait_for("details is STRICT", limit(), || {
        Ok((readiness(&sandbox, DETAILS)?["state"] == "strict").then_some(()))
    })?;
    served(&sandbox, LEGACY, DETAILS, 9080)?;
    Ok(())
}
