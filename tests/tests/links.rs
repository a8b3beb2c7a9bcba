//! Traffic through the mesh while pods come, change and go, and over links that are cut, narrow or lossy ([T.3], [E.1];
//! specification §14.3: PING every 10 s, dead after 20 s without an answer).

use std::fs;
use std::net::SocketAddr;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use culvert_tests::programs::{ExchangeResult, Failure, HttpResult, ShortResult, TrickleEvent, Trickled};
use culvert_tests::sandbox::{Family, LinkPlan, MeshPlan, Node, Plan, Pod, PodPlan, Sandbox, ServicePlan, built};
use culvert_tests::wire::{Cut, TUNNEL, Wire, losses};
use culvert_tests::{command, full, record};
use serde::de::DeserializeOwned;

const HTTP: u16 = 9080;
const EXCHANGE: u16 = 7000;
const FAMILIES: [Family; 2] = [Family::V4, Family::V6];

fn server(name: &str) -> PodPlan {
    PodPlan::new(Node::B, "default", name)
        .http(&[HTTP])
        .program(&["exchange-serve", &format!("--port={EXCHANGE}")])
        .probed(HTTP)
}

fn mesh(instance: &str, link: LinkPlan) -> Result<(Sandbox, Wire)> {
    let mut plan = Plan::empty(&culvert_tests::sandbox::own_name(instance))
        .pod(PodPlan::new(Node::A, "test", "client"))
        .pod(server("far"))
        .service(ServicePlan::new("default", "late", &[("http", HTTP)]));
    plan.link = link;
    let mut sandbox = Sandbox::build(plan)?;
    sandbox.start_mesh(&MeshPlan::new(built("culvert")?))?;
    let wire = Wire::count(&sandbox, &[HTTP, EXCHANGE])?;
    Ok((sandbox, wire))
}

fn lines<T: DeserializeOwned>(sandbox: &Sandbox, program: &str) -> Result<Vec<T>> {
    let text = fs::read_to_string(sandbox.log_path(program))?;
    let whole = &text[..text.rfind('\n').map_or(0, |at| at + 1)];
    whole.lines().map(|line| serde_json::from_str(line).with_context(|| format!("{program}: {line}"))).collect()
}

/// Connections that are opened all the time; each is a line of the log `name`.
fn dial(sandbox: &mut Sandbox, name: &str, to: SocketAddr, timeout_ms: u64) -> Result<()> {
    let (to, limit) = (to.to_string(), timeout_ms.to_string());
    let words = ["http-get", "--to", &to, "--count", "1000000", "--interval-ms", "10", "--timeout-ms", &limit];
    sandbox.start_in_pod(name, "test/client", &words)
}

/// One connection that is used all the time, and opened again when it is lost.
fn trickle(sandbox: &mut Sandbox, name: &str, to: SocketAddr, timeout_ms: u64) -> Result<()> {
    let (to, limit) = (to.to_string(), timeout_ms.to_string());
    let words = ["trickle", "--to", &to, "--marker", "kept", "--timeout-ms", &limit];
    sandbox.start_in_pod(name, "test/client", &words)
}

fn wait_answered(sandbox: &Sandbox, to: SocketAddr, limit: Duration) -> Result<HttpResult> {
    let mut last = None;
    command::wait_for(&format!("{to} answers the client"), limit, || {
        let got = sandbox.http("test/client", to, "new")?;
        let good = got.status == Some(200);
        last = Some(got.clone());
        Ok(good.then_some(got))
    })
    .with_context(|| format!("the last answer: {last:?}"))
}

fn wait_events(sandbox: &Sandbox, name: &str, more: usize) -> Result<()> {
    let before = lines::<TrickleEvent>(sandbox, name)?.len();
    command::wait_for(&format!("{name} goes on"), Duration::from_secs(10), || {
        Ok((lines::<TrickleEvent>(sandbox, name)?.len() >= before + more).then_some(()))
    })
}

/// What the agents have told of a pod, for whoever reads how a scenario failed.
fn told(sandbox: &Sandbox, pod: &Pod) -> Result<String> {
    let names = [pod.v4.to_string(), pod.v6.to_string(), pod.uid.clone(), pod.plan.key()];
    let mut all = Vec::new();
    for node in Node::ALL {
        let lines = sandbox.agent_log(node, 0)?.0.into_iter().map(|line| format!("{node:?}: {line:?}"));
        all.extend(lines.filter(|line| names.iter().any(|name| line.contains(name.as_str()))));
    }
    Ok(all.join("\n"))
}

/// [E.1]: what happens to one pod is no other pod's business; a new pod works soon, a deleted one fails soon.
#[test]
fn pods_are_added_relabelled_and_deleted_under_load() -> Result<()> {
    let (mut sandbox, wire) = mesh("churn", LinkPlan::default())?;
    let far = sandbox.pod("default/far")?.clone();
    dial(&mut sandbox, "dial", far.at(Family::V4, HTTP), 5000)?;
    dial(&mut sandbox, "dial6", far.at(Family::V6, HTTP), 5000)?;
    trickle(&mut sandbox, "kept", far.at(Family::V4, EXCHANGE), 5000)?;
    wait_events(&sandbox, "kept", 3)?;

    for round in 0..if full() { 20 } else { 2 } {
        // The Service's endpoints are pods of its name; one of each round's own is reached by its address.
        let name = if round == 0 { "late".to_owned() } else { format!("late-{round}") };
        let key = format!("default/{name}");
        let begun = Instant::now();
        sandbox.add_pod(server(&name))?;
        let late = sandbox.pod(&key)?.clone();
        for family in FAMILIES {
            wait_answered(&sandbox, late.at(family, HTTP), Duration::from_secs(10))?;
        }
        if round == 0 {
            let service = SocketAddr::new(sandbox.cluster_ip("default/late", Family::V4)?, HTTP);
            wait_answered(&sandbox, service, Duration::from_secs(10))?;
        }
        record(&format!("a pod added under load was reached in {} ms", begun.elapsed().as_millis()))?;
        // Before both agents have heard of it, it is reached as a pod outside the mesh; what is open then is not theirs.
        let direct = |wire: &Wire| -> Result<u64> { Ok(wire.read()?.get(&HTTP).copied().unwrap_or(0)) };
        let by_tunnel = |sandbox: &Sandbox| {
            command::wait_for(&format!("{key} is reached by a tunnel"), Duration::from_secs(10), || {
                let before = direct(&wire)?;
                let got = sandbox.http("test/client", late.at(Family::V4, HTTP), "in")?;
                Ok((got.status == Some(200) && direct(&wire)? == before).then_some(()))
            })
        };
        by_tunnel(&sandbox)?;

        // A label that says nothing to the mesh disturbs no connection of the pod itself.
        let held = format!("held-{name}");
        trickle(&mut sandbox, &held, late.at(Family::V4, EXCHANGE), 5000)?;
        wait_events(&sandbox, &held, 3)?;
        let file = format!("pod-default-{name}.yaml");
        let manifest = fs::read_to_string(sandbox.manifests().path().join(&file))?;
        let app = format!("    app: {name}\n");
        ensure!(manifest.contains(&app), "{manifest}");
        let relabelled = |label: &str| manifest.replacen(&app, &format!("{app}    {label}\n"), 1);
        sandbox.manifests().apply(&file, &relabelled("version: v2"))?;
        wait_events(&sandbox, &held, 20)?;
        let events: Vec<TrickleEvent> = lines(&sandbox, &held)?;
        let lost = events.iter().find(|event| event.what != Trickled::Echoed);
        ensure!(lost.is_none(), "relabelled: {lost:?}\n{}", told(&sandbox, &late)?);

        // Out of the mesh and back, by the label that the mesh reads.
        sandbox.manifests().apply(&file, &relabelled("istio.io/dataplane-mode: none"))?;
        command::wait_for(&format!("{key} is reached without a tunnel"), Duration::from_secs(10), || {
            let before = direct(&wire)?;
            let got = sandbox.http("test/client", late.at(Family::V4, HTTP), "out")?;
            Ok((got.status == Some(200) && direct(&wire)? > before).then_some(()))
        })?;
        sandbox.manifests().apply(&file, &manifest)?;
        by_tunnel(&sandbox)?;

        // Deleted: whoever holds a connection to it is told so, soon.
        wait_events(&sandbox, &held, 3)?;
        let events = lines::<TrickleEvent>(&sandbox, &held)?.len();
        let begun = Instant::now();
        sandbox.delete_pod(&key)?;
        let lost = command::wait_for("the connection to the deleted pod is lost", Duration::from_secs(10), || {
            let after: Vec<TrickleEvent> = lines(&sandbox, &held)?;
            Ok(after.into_iter().skip(events).find(|event| event.what == Trickled::Lost))
        })?;
        record(&format!("a deleted pod's connection was lost after {} ms: {lost:?}", begun.elapsed().as_millis()))?;
        let got = sandbox.http("test/client", late.at(Family::V4, HTTP), "gone")?;
        ensure!(got.status.is_none(), "a deleted pod answered: {got:?}");
        sandbox.stop(&held)?;
    }

    wait_events(&sandbox, "kept", 3)?;
    for name in ["dial", "dial6"] {
        let all: Vec<HttpResult> = lines(&sandbox, name)?;
        let failed: Vec<_> = all.iter().filter(|got| got.status != Some(200)).collect();
        ensure!(failed.is_empty(), "{} of {} connections to another pod failed: {failed:?}", failed.len(), all.len());
        ensure!(all.len() > 20, "only {} connections were made meanwhile", all.len());
    }
    let events: Vec<TrickleEvent> = lines(&sandbox, "kept")?;
    ensure!(events.iter().all(|event| event.what == Trickled::Echoed), "another pod's kept connection was disturbed");
    for node in Node::ALL {
        sandbox.expect_running(&culvert_tests::sandbox::agent_process(node))?;
    }
    Ok(())
}

/// §14.3: a silence of 20 s is survived; one that lasts ends the connection by its PINGs, and is told. With the link back
/// new connections work within seconds, whatever the old ones do.
#[test]
fn a_link_that_is_down_for_20_s_comes_back() -> Result<()> {
    const DOWN: Duration = Duration::from_secs(20);
    /// The next PING, its time-out, and time to tell.
    const DEAD: Duration = Duration::from_secs(30 + 5);
    let (mut sandbox, wire) = mesh("cut", LinkPlan::default())?;
    let far = sandbox.pod("default/far")?.clone();
    let mut kept = Vec::new();
    for family in FAMILIES {
        let name = format!("kept-{family:?}");
        // It waits longer than anything that happens here.
        trickle(&mut sandbox, &name, far.at(family, EXCHANGE), 120_000)?;
        wait_events(&sandbox, &name, 5)?;
        kept.push(name);
    }
    let cut = Cut::at(&sandbox, Node::B)?;
    let begun = Instant::now();
    let before: Vec<usize> =
        kept.iter().map(|name| Ok(lines::<TrickleEvent>(&sandbox, name)?.len())).collect::<Result<_>>()?;
    // A connection of this time is refused or waits; it is never answered and never goes another way.
    let during = sandbox.http("test/client", far.at(Family::V4, HTTP), "during")?;
    ensure!(during.status.is_none(), "answered over a link that is down: {during:?}");
    thread::sleep(DOWN.saturating_sub(begun.elapsed()));
    cut.mend()?;
    let back = Instant::now();
    for family in FAMILIES {
        wait_answered(&sandbox, far.at(family, HTTP), Duration::from_secs(10))?;
    }
    record(&format!(
        "the link was back after {DOWN:?}; new connections worked {} ms later",
        back.elapsed().as_millis()
    ))?;
    for (name, before) in kept.iter().zip(before) {
        // Whole, or told as lost; the client goes on in both cases.
        let first = command::wait_for(&format!("{name} goes on or is lost"), DEAD, || {
            Ok(lines::<TrickleEvent>(&sandbox, name)?.into_iter().nth(before))
        })?;
        ensure!(
            first.what == Trickled::Echoed || first.failure == Some(Failure::Reset),
            "{name} ended as if it were whole: {first:?}"
        );
        record(&format!("{name}: {:?} {} ms after the link was back", first.what, back.elapsed().as_millis()))?;
        command::wait_for(&format!("{name} passes bytes"), Duration::from_secs(10), || {
            let events: Vec<TrickleEvent> = lines(&sandbox, name)?;
            Ok(events.last().is_some_and(|event| event.what == Trickled::Echoed).then_some(()))
        })?;
    }

    // A longer silence: dead by its PINGs, while the link is still down.
    for name in &kept {
        wait_events(&sandbox, name, 5)?;
    }
    let before: Vec<usize> =
        kept.iter().map(|name| Ok(lines::<TrickleEvent>(&sandbox, name)?.len())).collect::<Result<_>>()?;
    let cut = Cut::at(&sandbox, Node::B)?;
    let begun = Instant::now();
    for (name, before) in kept.iter().zip(before) {
        let lost = command::wait_for(&format!("{name} is lost"), DEAD, || {
            let after: Vec<TrickleEvent> = lines(&sandbox, name)?;
            Ok(after.into_iter().skip(before).find(|event| event.what == Trickled::Lost))
        })?;
        ensure!(lost.failure == Some(Failure::Reset), "{name} ended as if it were whole: {lost:?}");
        record(&format!("{name} was lost {:.1} s after the link", begun.elapsed().as_secs_f64()))?;
    }
    cut.mend()?;
    for family in FAMILIES {
        wait_answered(&sandbox, far.at(family, HTTP), Duration::from_secs(10))?;
    }
    wire.expect_tunnelled()
}

/// Bytes there and back, and short connections, all without an error, in both families.
fn transfer(sandbox: &Sandbox, bytes: u64, connections: u64) -> Result<()> {
    for family in FAMILIES {
        let to = sandbox.pod("default/far")?.at(family, EXCHANGE).to_string();
        for verb in ["up", "down"] {
            let bytes = bytes.to_string();
            let words = ["exchange", "--to", &to, "--verb", verb, "--bytes", &bytes, "--timeout-ms", "30000"];
            let got: ExchangeResult = sandbox.call("test/client", &words)?;
            ensure!(got.failure.is_none(), "{verb} {family:?}: {got:?}");
            record(&format!("{verb} {bytes} bytes, {family:?}: {} ms", got.millis))?;
        }
        let count = connections.to_string();
        let words = ["short", "--to", &to, "--count", &count, "--parallel", "8", "--timeout-ms", "30000"];
        let got: ShortResult = sandbox.call("test/client", &words)?;
        ensure!(got.errors.is_empty() && got.ok == connections, "{family:?}: {got:?}");
        record(&format!("{connections} connections, {family:?}: {} ms", got.millis))?;
    }
    Ok(())
}

/// The tunnel's segments are sized for the link; the pods know nothing of it.
#[test]
fn a_link_with_an_mtu_of_1280_carries_everything() -> Result<()> {
    let (sandbox, wire) = mesh("mtu", LinkPlan { mtu: 1280, ..LinkPlan::default() })?;
    let bytes = if full() { 1 << 30 } else { 16 << 20 };
    transfer(&sandbox, bytes, 200)?;
    wire.expect_tunnelled()
}

/// The loss is nftables', not netem's, which not every kernel has; it is counted, so it is known to have happened.
#[test]
fn a_link_that_loses_2_percent_carries_everything() -> Result<()> {
    let (sandbox, wire) = mesh("loss", LinkPlan { loss_percent: 2, ..LinkPlan::default() })?;
    let bytes = if full() { 64 << 20 } else { 4 << 20 };
    transfer(&sandbox, bytes, if full() { 5000 } else { 200 })?;
    let (lost, arrived) = losses(&sandbox)?;
    let percent = lost as f64 * 100.0 / arrived as f64;
    record(&format!("the link lost {lost} of {arrived} packets, {percent:.2} %, by nftables' random drop"))?;
    ensure!(arrived > 5000 && (1.0..3.0).contains(&percent), "lost {lost} of {arrived}");
    ensure!(wire.read()?.get(&TUNNEL).is_some_and(|&n| n > 0), "nothing was tunnelled");
    wire.expect_tunnelled()
}
