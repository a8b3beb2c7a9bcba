//! Running pods that come in and go out by a label (§2, [E.5]), without a restart.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use culvert_tests::command;
use culvert_tests::programs::{Failure, HttpResult};
use culvert_tests::sandbox::{Family, Node, Plan, Sandbox};
use nix::sys::signal::Signal;

use super::support::{
    EFFECT, Held, LEGACY, LOG_LIMIT, NGINX, Want, call, cluster, edit, edit_pod, end_of_log, has, is_from, line,
    marker, mesh, plan, policy, put, refused, server, strict,
};

const LATE: &str = "default/late";
const OUT: (&str, &str) = ("istio.io/dataplane-mode: \"none\"", "istio.io/dataplane-mode: \"ambient\"");

/// With a server that is out of the mesh at first.
fn with_late(instance: &str) -> Plan {
    plan(instance).pod(server(Node::B, "default", "late").label("istio.io/dataplane-mode", "none"))
}

fn enrol(sandbox: &Sandbox, pod: &str) -> Result<()> {
    edit_pod(sandbox, pod, &[OUT])?;
    settled(sandbox, pod, true)
}

fn leave(sandbox: &Sandbox, pod: &str) -> Result<()> {
    edit_pod(sandbox, pod, &[(OUT.1, OUT.0)])?;
    settled(sandbox, pod, false)
}

/// Waits until both agents see the pod in, or out: by what its clients get.
fn settled(sandbox: &Sandbox, pod: &str, inside: bool) -> Result<()> {
    let to = sandbox.pod(pod)?.at(Family::V4, 9080);
    let capture = sandbox.capture()?;
    command::wait_for(&format!("{pod} is {}", if inside { "in" } else { "out" }), LOG_LIMIT, || {
        let marker = marker("settle");
        let got = sandbox.http(NGINX, to, &marker)?;
        let readable = capture.contains(marker.as_bytes())?;
        Ok((got.status == Some(200) && readable != inside).then_some(()))
    })
}

/// [E.5], [D.1]: on a running pod, both directions. What policy forbids is closed, the rest stays and is listed; what
/// stayed is judged again when policy changes; tunnels that are open when the pod leaves end by themselves.
#[test]
fn a_running_pod_comes_in_and_goes_out_and_only_forbidden_connections_are_closed() -> Result<()> {
    let mut sandbox = mesh(with_late("t-enrol"))?;
    let pod = sandbox.pod(LATE)?.clone();
    put(
        &sandbox,
        &[policy(
            "default",
            "late",
            "{selector: {matchLabels: {app: late}}, mtls: {mode: PERMISSIVE}, portLevelMtls: {7001: {mode: STRICT}}}",
        )],
    )?;
    for family in [Family::V4, Family::V6] {
        let name = |of: &str| format!("{of}-{family:?}");
        let allowed = Held::open(&mut sandbox, &name("allowed"), LEGACY, pod.at(family, 7000))?;
        let forbidden = Held::open(&mut sandbox, &name("forbidden"), LEGACY, pod.at(family, 7001))?;
        // A mesh client's plaintext to a pod that is still outside.
        let of_mesh = Held::open(&mut sandbox, &name("of-mesh"), NGINX, pod.at(family, 7000))?;
        let offset = end_of_log(&sandbox, Node::B)?;
        enrol(&sandbox, LATE)?;
        let end = forbidden.ended(&sandbox, EFFECT)?;
        ensure!(end.failure == Some(Failure::Reset), "{end:?}");
        allowed.passes(&sandbox)?;
        of_mesh.passes(&sandbox)?;
        let from = allowed.last(&sandbox)?.and_then(|round| round.local).context("it is connected")?;
        line(&sandbox, Node::B, offset, "the open connection, listed", |l| {
            l.message() == "pre-enrolment connection" && has(l, "src", &from.to_string())
        })?;
        // From now on: tunnels, and policy for plaintext.
        let capture = sandbox.capture()?;
        for (from, port, want) in
            [(NGINX, 9080, Want::Tunnel), (NGINX, 9080, Want::Tunnel), (LEGACY, 9080, Want::Plain)]
        {
            let marker = marker("enrolled");
            call(&sandbox, from, pod.at(family, port), &marker, want)?;
            ensure!(capture.contains(marker.as_bytes())? == (want == Want::Plain), "{from}: readable or not");
        }
        call(&sandbox, LEGACY, pod.at(family, 7001), "", Want::Refused)?;
        let tunnelled = Held::open(&mut sandbox, &name("tunnelled"), NGINX, pod.at(family, 7001))?;

        leave(&sandbox, LATE)?;
        tunnelled.passes(&sandbox).context("an open tunnel ends by itself")?;
        allowed.passes(&sandbox)?;
        for (from, port) in [(NGINX, 9080), (LEGACY, 9080)] {
            let marker = marker("left");
            call(&sandbox, from, pod.at(family, port), &marker, Want::Plain)?;
            ensure!(capture.contains(marker.as_bytes())?, "{from}: plain again");
        }
        let plain = Held::open(&mut sandbox, &name("plain"), LEGACY, pod.at(family, 7001))?;
        plain.passes(&sandbox).context("policy is for pods of the mesh [PA.11]")?;
        sandbox.stop(&name("plain"))?;
        sandbox.stop(&name("tunnelled"))?;
        sandbox.stop(&name("allowed"))?;
        sandbox.stop(&name("of-mesh"))?;
    }
    Ok(())
}

/// [D.1], [E.5]: a connection that is older than enrolment is open inbound plaintext like any other afterwards.
#[test]
fn a_connection_older_than_enrolment_is_closed_by_a_later_policy() -> Result<()> {
    let mut sandbox = mesh(with_late("t-older"))?;
    let pod = sandbox.pod(LATE)?.clone();
    let old = Held::open(&mut sandbox, "old", LEGACY, pod.at(Family::V4, 7000))?;
    let excepted = Held::open(&mut sandbox, "excepted", LEGACY, pod.at(Family::V4, 7001))?;
    // Its own outbound connection, from before: nobody's business but the server's.
    let elsewhere = sandbox.pod("default/productpage")?.at(Family::V4, 7000);
    let own = Held::open(&mut sandbox, "own", LATE, elsewhere)?;
    enrol(&sandbox, LATE)?;
    for held in [&old, &excepted, &own] {
        held.passes(&sandbox)?;
    }
    let offset = end_of_log(&sandbox, Node::B)?;
    put(
        &sandbox,
        &[policy(
            "default",
            "late",
            "{selector: {matchLabels: {app: late}}, mtls: {mode: STRICT}, portLevelMtls: {7001: {mode: PERMISSIVE}}}",
        )],
    )?;
    let end = old.ended(&sandbox, EFFECT)?;
    let from = end.local.context("it was connected")?;
    excepted.passes(&sandbox)?;
    own.passes(&sandbox)?;
    // §16: with its bytes and the policy's name, like a connection that the kernel had passed.
    let told = line(&sandbox, Node::B, offset, "its end", |l| {
        is_from(l, from) && l.message() == "connection complete" && has(l, "reason", "strict-requires-mtls")
    })?;
    ensure!(told.field("error").unwrap_or_default().contains("PeerAuthentication default/late"), "{told:?}");
    for field in ["bytes_recv", "bytes_sent"] {
        let bytes = told.field(field).and_then(|n| n.parse::<u64>().ok()).with_context(|| format!("{told:?}"))?;
        ensure!(bytes >= (end.rounds - 1) * "round 0\n".len() as u64, "{field}: {told:?} after {end:?}");
    }
    Ok(())
}

/// §2, on running pods: the rows that a cluster meets most. What a row says is seen from outside: a mesh client's bytes
/// are readable on the link or not, and STRICT refuses plaintext to those that are in, and only to them.
#[test]
fn rows_of_the_enrolment_table_hold_for_running_pods() -> Result<()> {
    let mut sandbox = mesh(plan("t-rows2").pod(server(Node::B, "default", "late")))?;
    put(&sandbox, &[strict("default")])?;
    let pod = sandbox.pod(LATE)?.clone();
    let app = "    app: late\n";
    let original = std::fs::read_to_string(sandbox.manifests().path().join("pod-default-late.yaml"))?;
    let ambient = ("    istio.io/dataplane-mode: \"ambient\"\n", "");
    for (row, namespace, edits, inside) in [
        ("7: namespace ambient", None, vec![], true),
        ("5: pod label none", None, vec![(app, "    app: late\n    istio.io/dataplane-mode: none\n")], false),
        (
            "4: a sidecar's annotation",
            None,
            vec![(app, "    app: late\n  annotations:\n    sidecar.istio.io/status: '{\"version\":\"x\"}'\n")],
            false,
        ),
        (
            "4: a sidecar's container",
            None,
            vec![("  - name: app\n", "  - name: istio-proxy\n    image: proxy\n  - name: app\n")],
            false,
        ),
        ("7 before 9 [E.2]", None, vec![(app, "    app: late\n    sidecar.istio.io/inject: \"false\"\n")], true),
        (
            "[E.4]: a status annotation is no intent",
            Some(ambient),
            vec![(app, "    app: late\n  annotations:\n    ambient.istio.io/redirection: enabled\n")],
            false,
        ),
        (
            "6: pod label ambient in a plain namespace",
            Some(ambient),
            vec![(app, "    app: late\n    istio.io/dataplane-mode: ambient\n")],
            true,
        ),
        ("16: neither", Some(ambient), vec![], false),
    ] {
        sandbox.manifests().apply("pod-default-late.yaml", &original)?;
        let namespaces = std::fs::read_to_string(sandbox.manifests().path().join("namespaces.yaml"))?;
        if let Some(change) = namespace {
            // Only of namespace default, which comes first.
            let changed = namespaces.replacen(change.0, change.1, 1);
            sandbox.manifests().apply("namespaces.yaml", &changed)?;
        }
        edit(&sandbox, "pod-default-late.yaml", &edits)?;
        settled(&sandbox, LATE, inside).with_context(|| row.to_owned())?;
        let plain = if inside { Want::Refused } else { Want::Plain };
        call(&sandbox, LEGACY, pod.at(Family::V4, 9080), &marker(row), plain).with_context(|| row.to_owned())?;
        sandbox.manifests().apply("namespaces.yaml", &namespaces)?;
    }
    // [E.1]: a value that means nothing is ignored, and said so.
    let offset = end_of_log(&sandbox, Node::B)?;
    sandbox.manifests().apply("pod-default-late.yaml", &original)?;
    edit(&sandbox, "pod-default-late.yaml", &[(app, "    app: late\n    istio.io/dataplane-mode: \"on\"\n")])?;
    settled(&sandbox, LATE, true)?;
    line(&sandbox, Node::B, offset, "the odd label", |l| {
        l.message().contains("istio.io/dataplane-mode") && l.message().contains("default/late")
    })?;
    sandbox.expect_running("agent-b")?;
    Ok(())
}

/// [T.1]: the client's node holds the snapshot by which the server is in, or out; a server that is just coming in is
/// waited for, and one that has just left is reached where the next snapshot says, without a tunnel that will never be.
/// A stopped agent stands for the one that hears of the change last.
#[test]
fn a_client_whose_node_hears_later_or_sooner_than_the_servers_waits_and_is_served() -> Result<()> {
    // Nobody has called this one before: no tunnel to it is open.
    let early = server(Node::B, "default", "early").label("istio.io/dataplane-mode", "ambient");
    let mut sandbox = mesh(with_late("t-lag").pod(early))?;
    for (pod, edit, late, inside) in [(LATE, OUT, Node::B, true), ("default/early", (OUT.1, OUT.0), Node::A, false)] {
        let to = sandbox.pod(pod)?.at(Family::V4, 9080).to_string();
        sandbox.signal_agent(late, Signal::SIGSTOP)?;
        edit_pod(&sandbox, pod, &[edit])?;
        thread::sleep(Duration::from_millis(500));
        let capture = sandbox.capture()?;
        let marker = marker("lag");
        sandbox.start_in_pod(
            &marker,
            NGINX,
            &["http-get", "--to", &to, "--marker", &marker, "--timeout-ms", "8000"],
        )?;
        thread::sleep(Duration::from_millis(500));
        sandbox.signal_agent(late, Signal::SIGCONT)?;
        let got: HttpResult = command::wait_for("the client's result", Duration::from_secs(9), || {
            let text = std::fs::read_to_string(sandbox.log_path(&marker))?;
            text.ends_with('\n').then(|| serde_json::from_str(&text).context(text.clone())).transpose()
        })?;
        ensure!(got.status == Some(200), "{pod}: {} after {} ms: {:?}", got.brief(), got.millis, got.error);
        ensure!(got.millis < 2500, "{pod}: served only after {} ms", got.millis);
        ensure!(capture.contains(marker.as_bytes())? != inside, "{pod}: in the mesh: {inside}; readable, or not");
    }
    Ok(())
}

/// [K.4]: a pod in the mesh whose addresses become others than its namespace has stays refused until they are right again,
/// and does not fall out of the mesh meanwhile.
#[test]
fn a_pod_whose_addresses_are_wrong_stays_refused_until_they_are_right() -> Result<()> {
    let sandbox = mesh(with_late("t-address"))?;
    enrol(&sandbox, LATE)?;
    put(&sandbox, &[strict("default")])?;
    let pod = sandbox.pod(LATE)?.clone();
    let (right, wrong) = (pod.at(Family::V4, 9080), "10.255.255.254");
    call(&sandbox, LEGACY, right, &marker("before"), Want::Refused)?;
    let (_, from) = sandbox.agent_log(Node::B, 0)?;
    let ip = right.ip().to_string();
    edit_pod(&sandbox, LATE, &[(&ip, wrong), (&pod.at(Family::V6, 0).ip().to_string(), "fd00:255::254")])?;
    command::wait_for("the agent says so", LOG_LIMIT, || {
        let (lines, _) = sandbox.agent_log(Node::B, from)?;
        let says = |text: String| text.contains("has none of its addresses");
        Ok(lines.iter().any(|line| line.field("error").is_some_and(says)).then_some(()))
    })?;
    call(&sandbox, LEGACY, right, &marker("inbound"), Want::Refused)?;
    // In plaintext it would be served.
    call(&sandbox, LATE, sandbox.pod(NGINX)?.at(Family::V4, 8080), &marker("outbound"), Want::Refused)?;
    edit_pod(&sandbox, LATE, &[(wrong, &ip), ("fd00:255::254", &pod.at(Family::V6, 0).ip().to_string())])?;
    settled(&sandbox, LATE, true)?;
    call(&sandbox, LEGACY, right, &marker("after"), Want::Refused)?;
    Ok(())
}

/// [E.5], [T.1], [K.4]: a client of the mesh that calls without pause while a pod comes and goes. While the pod comes in,
/// its node refuses for a moment; when it leaves, a client that has not heard of it yet waits, and then goes where the
/// pod now is. Nobody hangs, and nobody waits for a tunnel that will never be.
#[test]
fn clients_follow_a_pod_that_comes_and_goes_without_a_pause() -> Result<()> {
    let sandbox = mesh(with_late("t-churn"))?;
    let to = sandbox.pod(LATE)?.at(Family::V4, 9080);
    let done = AtomicBool::new(false);
    let results = thread::scope(|scope| {
        let load = || {
            let mut results = Vec::new();
            while !done.load(Ordering::Relaxed) {
                results.push(sandbox.http(NGINX, to, "load"));
            }
            results
        };
        let clients = [scope.spawn(load), scope.spawn(load)];
        let changes = (0..5).try_for_each(|_| {
            enrol(&sandbox, LATE)?;
            thread::sleep(Duration::from_millis(200));
            leave(&sandbox, LATE)?;
            thread::sleep(Duration::from_millis(200));
            anyhow::Ok(())
        });
        done.store(true, Ordering::Relaxed);
        changes?;
        let results = clients.into_iter().flat_map(|client| client.join().expect("it does not panic"));
        results.collect::<Result<Vec<_>>>()
    })?;
    let failed: Vec<_> = results.iter().filter(|got| got.status != Some(200)).collect();
    for got in &failed {
        ensure!(refused(got.failure) && got.millis < 500, "{} after {} ms: {:?}", got.brief(), got.millis, got.error);
    }
    let slowest = results.iter().map(|got| got.millis).max().unwrap_or_default();
    eprintln!("{} calls, {} refused, slowest {slowest}", results.len(), failed.len());
    ensure!(results.len() > 100, "only {} calls", results.len());
    ensure!(slowest < 1000, "a call took {slowest} ms");

    // As a client, too: what the pod opens after it came in is tunnelled.
    enrol(&sandbox, LATE)?;
    let capture = sandbox.capture()?;
    let marker = marker("client");
    call(&sandbox, LATE, cluster(&sandbox, NGINX, Family::V4, 8080)?, &marker, Want::Tunnel)?;
    ensure!(!capture.contains(marker.as_bytes())?, "readable on the link");
    line(&sandbox, Node::A, 0, "the client's identity", |l| {
        has(l, "src.identity", "spiffe://cluster.local/ns/default/sa/late") && has(l, "direction", "inbound")
    })?;
    Ok(())
}
