//! What happens to traffic when a part of the mesh is killed, stopped, restarted or missing: refused and told why, never
//! readable on the link, and whole again without touching a pod ([K.4], [T.1], [I.7]).

use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use culvert_tests::capture::Capture;
use culvert_tests::programs::{Failure, HttpResult, TrickleEvent, Trickled};
use culvert_tests::sandbox::{Family, MeshPlan, Node, Plan, PodPlan, Sandbox, agent_process, built};
use culvert_tests::{command, patience};
use nix::sys::signal::Signal;

/// In every payload: what must not be seen on the link.
const MARKER: &str = "readable-if-it-leaks";
const HTTP: u16 = 9080;
const EXCHANGE: u16 = 7000;
/// Silence after which the kernel refuses (`SILENT_AFTER_NS`).
const SILENT_AFTER: Duration = Duration::from_secs(10);
/// Time for the mesh to be whole again after what was missing is back.
const RECOVERY: Duration = Duration::from_secs(8);

fn plan(instance: &str) -> Plan {
    let server = |node, name: &str| {
        PodPlan::new(node, "default", name)
            .http(&[HTTP])
            .program(&["exchange-serve", &format!("--port={EXCHANGE}")])
            .probed(HTTP)
    };
    Plan::empty(instance)
        .pod(PodPlan::new(Node::A, "test", "client").http(&[HTTP]).probed(HTTP))
        .pod(PodPlan::new(Node::A, "test", "outsider").label("istio.io/dataplane-mode", "none"))
        .pod(server(Node::A, "near"))
        .pod(server(Node::B, "far"))
}

fn mesh_plan() -> Result<MeshPlan> {
    let mut mesh = MeshPlan::new(built("culvert")?);
    mesh.agent_arguments = vec!["--drain-deadline".to_owned(), "2s".to_owned()];
    Ok(mesh)
}

/// A sandbox with its mesh, a recorded link, and traffic on it: connections that are opened all the time, and one that is
/// kept.
struct Scene {
    sandbox: Sandbox,
    mesh: MeshPlan,
    link: Capture,
    server: SocketAddr,
}

impl Scene {
    fn new(instance: &str, mesh: MeshPlan) -> Result<Self> {
        let mut sandbox = Sandbox::build(plan(instance))?;
        sandbox.start_mesh(&mesh)?;
        let link = sandbox.capture()?;
        let far = sandbox.pod("default/far")?;
        let (server, exchange) = (far.at(Family::V4, HTTP), far.at(Family::V4, EXCHANGE).to_string());
        let dial = ["http-get", "--to", &server.to_string(), "--marker", MARKER, "--count", "1000000"];
        let pace = ["--interval-ms", "20", "--timeout-ms", "2000"];
        sandbox.start_in_pod("dial", "test/client", &[&dial[..], &pace[..]].concat())?;
        sandbox.start_in_pod("trickle", "test/client", &["trickle", "--to", &exchange, "--marker", MARKER])?;
        let mut scene = Self { sandbox, mesh, link, server };
        scene.expect_whole("at the start")?;
        Ok(scene)
    }

    /// What the dialler has got so far.
    fn dialled(&self) -> Result<Vec<HttpResult>> {
        lines(&self.sandbox, "dial")
    }

    /// What has happened to the kept connection so far.
    fn trickled(&self) -> Result<Vec<TrickleEvent>> {
        lines(&self.sandbox, "trickle")
    }

    /// New connections of both kinds succeed from now on, within the time of recovery.
    fn expect_whole(&mut self, when: &str) -> Result<()> {
        let (dials, trickles) = (self.dialled()?.len(), self.trickled()?.len());
        let whole = command::wait_for(&format!("{when}: connections work"), RECOVERY, || {
            let dialled = ends_well(&self.dialled()?[dials..], |got| got.status == Some(200));
            let trickled = ends_well(&self.trickled()?[trickles..], |event| event.what == Trickled::Echoed);
            Ok((dialled && trickled).then_some(()))
        });
        whole.with_context(|| format!("the last events: {:?}, {:?}", self.last_dial(), self.last_trickle()))
    }

    fn last_dial(&self) -> Option<HttpResult> {
        self.dialled().ok()?.pop()
    }

    fn last_trickle(&self) -> Option<TrickleEvent> {
        self.trickled().ok()?.pop()
    }

    fn call(&self, from: &str) -> Result<HttpResult> {
        self.sandbox.http(from, self.server, MARKER)
    }

    /// A new connection is refused, at once.
    fn expect_refused(&self, from: &str, when: &str) -> Result<()> {
        let got = self.call(from)?;
        ensure!(matches!(got.failure, Some(Failure::Refused | Failure::Reset)), "{when}: {from} got {got:?}");
        ensure!(got.millis < 1000, "{when}: {from} was refused after {} ms", got.millis);
        Ok(())
    }

    fn expect_nothing_readable(&self) -> Result<()> {
        ensure!(self.link.frames_with_port(HTTP)? == 0, "a frame of the server's own port crossed the link");
        self.expect_nothing_readable_of_the_mesh()
    }

    /// As [`Self::expect_nothing_readable`], where somebody outside the mesh has tried the server's own port.
    fn expect_nothing_readable_of_the_mesh(&self) -> Result<()> {
        ensure!(!self.link.contains(MARKER.as_bytes())?, "readable on the link");
        ensure!(self.link.frames_with_port(15008)? > 0, "no tunnel crossed the link");
        Ok(())
    }

    /// Every probe since `from` (milliseconds since 1970) was answered, and there was one of each pod.
    fn expect_probes(&self, node: Node, from: u64) -> Result<()> {
        let results: Vec<_> = self.sandbox.probes(node)?.into_iter().filter(|result| result.at_ms > from).collect();
        for pod in self.sandbox.pods().filter(|pod| pod.plan.node == node && pod.plan.probe.is_some()) {
            let key = pod.plan.key();
            ensure!(results.iter().any(|result| result.pod == key), "{key} was not probed");
        }
        match results.iter().find(|result| !result.ok) {
            Some(failed) => bail!("a probe failed: {failed:?}"),
            None => Ok(()),
        }
    }

    /// Waits until an agent's log has a line with these fields.
    fn expect_told(&self, node: Node, fields: &[(&str, &str)]) -> Result<()> {
        command::wait_for(&format!("the agent of {node} told {fields:?}"), Duration::from_secs(3), || {
            let (lines, _) = self.sandbox.agent_log(node, 0)?;
            let told = lines.iter().any(|line| {
                fields.iter().all(|(name, text)| line.field(name).is_some_and(|value| value.contains(text)))
            });
            Ok(told.then_some(()))
        })
    }
}

/// Whether the last three went well, so that one that was under way at the time does not count.
fn ends_well<T>(all: &[T], well: impl Fn(&T) -> bool) -> bool {
    all.len() >= 3 && all[all.len() - 3..].iter().all(well)
}

fn lines<T: serde::de::DeserializeOwned>(sandbox: &Sandbox, program: &str) -> Result<Vec<T>> {
    let text = fs::read_to_string(sandbox.log_path(program))?;
    let whole = &text[..text.rfind('\n').map_or(0, |at| at + 1)];
    whole.lines().map(|line| serde_json::from_str(line).with_context(|| format!("{program}: {line}"))).collect()
}

/// What a node's agent answers at a port of the loopback interface: status and body.
fn get(sandbox: &Sandbox, node: Node, port: u16, path: &str) -> Result<(u16, String)> {
    let request = format!("GET {path} HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\nconnection: close\r\n\r\n");
    sandbox.node_place(node).inside(move || {
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
        stream.set_read_timeout(Some(RECOVERY * patience()))?;
        stream.write_all(request.as_bytes())?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let (head, body) = answer.split_once("\r\n\r\n").with_context(|| format!("no answer: {answer:?}"))?;
        Ok((head.split(' ').nth(1).context("a status")?.parse()?, body.to_owned()))
    })
}

fn now_ms() -> Result<u64> {
    Ok(u64::try_from(std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_millis())?)
}

/// [K.4]: the kernel programs stay, and refuse.
#[test]
fn a_killed_agent_leaves_nothing_readable_and_its_successor_takes_over() -> Result<()> {
    let mut scene = Scene::new("t-killed", mesh_plan()?)?;
    // The client's side: nobody takes the redirected connection.
    let since = now_ms()?;
    scene.sandbox.signal_agent(Node::A, Signal::SIGKILL)?;
    for _ in 0..20 {
        scene.expect_refused("test/client", "without the client's agent")?;
    }
    let lost = command::wait_for("the kept connection is lost", Duration::from_secs(3), || {
        Ok(scene.trickled()?.into_iter().find(|event| event.what == Trickled::Lost))
    })?;
    ensure!(lost.failure == Some(Failure::Reset), "a killed agent's connection ended like a whole one: {lost:?}");
    thread::sleep(Duration::from_secs(1));
    scene.expect_probes(Node::A, since)?;
    scene.expect_nothing_readable()?;
    scene.sandbox.start_agent(&scene.mesh, Node::A)?;
    scene.sandbox.wait_ready(Node::A)?;
    scene.expect_whole("with the client's agent again")?;

    // The server's side: the client's agent waits for the tunnel's port, and then refuses ([T.1]).
    let since = now_ms()?;
    scene.sandbox.signal_agent(Node::B, Signal::SIGKILL)?;
    let got: HttpResult = scene.sandbox.call(
        "test/client",
        &["http-get", "--to", &scene.server.to_string(), "--marker", MARKER, "--timeout-ms", "8000"],
    )?;
    ensure!(matches!(got.failure, Some(Failure::Refused | Failure::Reset)), "without the server's agent: {got:?}");
    ensure!((4000..6500).contains(&got.millis), "refused after {} ms", got.millis);
    scene.expect_told(Node::A, &[("reason", "connect"), ("error", "refused"), ("dst.addr", ":15008")])?;
    scene.expect_probes(Node::B, since)?;
    scene.expect_nothing_readable()?;
    scene.sandbox.start_agent(&scene.mesh, Node::B)?;
    scene.sandbox.wait_ready(Node::B)?;
    scene.expect_whole("with the server's agent again")?;
    scene.expect_nothing_readable()
}

/// A listener's backlog would accept for an agent that is stopped: the missing sign of life refuses.
#[test]
fn stopped_agents_refuse_after_the_heartbeat_and_go_on_when_continued() -> Result<()> {
    let mut scene = Scene::new("t-stopped", mesh_plan()?)?;
    let since = now_ms()?;
    for node in Node::ALL {
        scene.sandbox.signal_agent(node, Signal::SIGSTOP)?;
    }
    let stopped = Instant::now();
    while stopped.elapsed() < SILENT_AFTER + Duration::from_millis(200) {
        // Until then a connection may hang in the backlog; it is never answered.
        let got: HttpResult = scene.sandbox.call(
            "test/client",
            &["http-get", "--to", &scene.server.to_string(), "--marker", MARKER, "--timeout-ms", "500"],
        )?;
        ensure!(got.status.is_none(), "a stopped agent answered: {got:?}");
    }
    scene.expect_refused("test/client", "outbound, with the agent stopped")?;
    scene.expect_refused("test/outsider", "inbound, with the agent stopped")?;
    for node in Node::ALL {
        scene.expect_probes(node, since)?;
    }
    for node in Node::ALL {
        scene.sandbox.signal_agent(node, Signal::SIGCONT)?;
    }
    scene.expect_whole("continued")?;
    for (node, direction) in [(Node::A, "outbound"), (Node::B, "inbound")] {
        scene.expect_told(node, &[("reason", "agent-silent"), ("direction", direction)])?;
    }
    // What the outsider sends is readable by right, and it was refused.
    scene.expect_nothing_readable_of_the_mesh()
}

/// [H.4], [K.4]: open connections go on until the deadline, new ones are refused, and at no instant is there nobody.
#[test]
fn a_restarted_agent_drains_and_lets_nothing_through() -> Result<()> {
    let mut scene = Scene::new("t-restart", mesh_plan()?)?;
    for node in Node::ALL {
        let (name, events) = (agent_process(node), scene.trickled()?.len());
        let asked = (Instant::now(), now_ms()?);
        scene.sandbox.signal_agent(node, Signal::SIGTERM)?;
        let end = command::wait_for("the agent ends", Duration::from_secs(6), || {
            Ok(scene.sandbox.expect_running(&name).err().map(|error| format!("{error:#}")))
        })?;
        ensure!(end.contains("exit status: 0"), "{end}");
        ensure!(asked.0.elapsed() < Duration::from_secs(4), "drained for {:?}", asked.0.elapsed());
        let after = &scene.trickled()?[events..];
        let lost =
            after.iter().find(|event| event.what == Trickled::Lost).context("the kept connection was not lost")?;
        ensure!(lost.failure == Some(Failure::Reset), "{node}: cut at the deadline like a whole one: {lost:?}");
        ensure!(
            (1800..3500).contains(&(lost.at_ms - asked.1)),
            "{node}: an open connection lived for {} ms of a deadline of 2 s",
            lost.at_ms - asked.1
        );
        scene.sandbox.start_agent(&scene.mesh, node)?;
        scene.sandbox.wait_ready(node)?;
        scene.expect_whole("restarted")?;
        scene.expect_nothing_readable()?;
    }
    Ok(())
}

/// [T.1]: a server whose agent is not there yet is waited for.
#[test]
fn a_server_whose_agent_comes_in_time_is_reached() -> Result<()> {
    let mut sandbox = Sandbox::build(plan("t-late"))?;
    let mesh = mesh_plan()?;
    sandbox.start_ca(&mesh)?;
    sandbox.start_agent(&mesh, Node::A)?;
    sandbox.wait_ready(Node::A)?;
    let link = sandbox.capture()?;
    let to = sandbox.pod("default/far")?.at(Family::V4, HTTP).to_string();
    let arguments = ["http-get", "--to", &to, "--marker", MARKER, "--count", "1", "--timeout-ms", "9000"];
    sandbox.start_in_pod("early", "test/client", &arguments)?;
    thread::sleep(Duration::from_secs(1));
    ensure!(lines::<HttpResult>(&sandbox, "early")?.is_empty(), "answered before there was anybody");
    sandbox.start_agent(&mesh, Node::B)?;
    let got = command::wait_for("the early connection ends", Duration::from_secs(9), || {
        Ok(lines::<HttpResult>(&sandbox, "early")?.pop())
    })?;
    ensure!(got.status == Some(200), "{got:?}");
    ensure!(!link.contains(MARKER.as_bytes())?, "readable on the link");
    Ok(())
}

/// [I.7], [T.2], [M.2]: no certificate, no connection, and log, readiness and metrics say what is missing.
#[test]
fn without_a_ca_connections_are_refused_until_it_is_there() -> Result<()> {
    let mut sandbox = Sandbox::build(plan("t-no-ca"))?;
    let mesh = mesh_plan()?;
    // For its root only.
    sandbox.start_ca(&mesh)?;
    sandbox.stop("ca")?;
    for node in Node::ALL {
        sandbox.start_agent(&mesh, node)?;
        sandbox.wait_ready(node)?;
    }
    let link = sandbox.capture()?;
    let to = sandbox.pod("default/far")?.at(Family::V4, HTTP);
    let call = |sandbox: &Sandbox| -> Result<HttpResult> {
        let to = to.to_string();
        sandbox.call("test/client", &["http-get", "--to", &to, "--marker", MARKER, "--timeout-ms", "8000"])
    };
    let got = call(&sandbox)?;
    ensure!(matches!(got.failure, Some(Failure::Refused | Failure::Reset)), "{got:?}");
    ensure!((4000..7000).contains(&got.millis), "refused after {} ms", got.millis);
    let line = command::wait_for("the refusal is told", Duration::from_secs(2), || {
        let (lines, _) = sandbox.agent_log(Node::A, 0)?;
        Ok(lines.into_iter().find(|line| line.field("reason").as_deref() == Some("identity-error")))
    })?;
    let error = line.field("error").unwrap_or_default();
    ensure!(error.contains("no certificate for spiffe://cluster.local/ns/test/sa/client yet"), "{error}");
    ensure!(error.contains("no connection to the CA at 172.30.0.1:15012"), "{error}");
    let (status, parts) = get(&sandbox, Node::A, 15000, "/readyz")?;
    ensure!(status == 200 && parts.contains("[-] certificates: 0 of 2\n"), "{status}: {parts}");
    let missing = "[-] certificates: spiffe://cluster.local/ns/test/sa/client: none yet: ";
    let line = parts.lines().find(|line| line.starts_with(missing)).with_context(|| parts.clone())?;
    ensure!(line.contains("no connection to the CA at 172.30.0.1:15012"), "{parts}");
    command::wait_for("the refusal is counted", Duration::from_secs(5), || {
        let (_, text) = get(&sandbox, Node::A, 15020, "/metrics")?;
        let counted = |line: &str| {
            line.starts_with("istio_tcp_connections_failed_total{")
                && line.contains("source_workload=\"client\"")
                && line.contains("response_flags=\"IDENTITY_ERROR\"")
                && line.ends_with(" 1")
        };
        Ok(text.lines().any(counted).then_some(()))
    })?;
    sandbox.start_ca(&mesh)?;
    let back = Instant::now();
    command::wait_for("connections work", RECOVERY, || Ok((call(&sandbox)?.status == Some(200)).then_some(())))?;
    println!("working {:?} after the CA was back", back.elapsed());
    ensure!(!link.contains(MARKER.as_bytes())?, "readable on the link");
    Ok(())
}

/// [I.7]: renewal closes nothing and fails nothing; with the CA away the old certificate serves until it expires, and then
/// nothing does.
#[test]
fn certificates_rotate_under_traffic_and_expire_without_a_ca() -> Result<()> {
    const TTL: Duration = Duration::from_secs(6);
    let mut mesh = mesh_plan()?;
    mesh.cert_ttl = Some("6s".to_owned());
    let mut scene = Scene::new("t-rotate", mesh)?;
    let (dials, trickles) = (scene.dialled()?.len(), scene.trickled()?.len());
    thread::sleep(2 * TTL);
    let failed = scene.dialled()?.into_iter().skip(dials).find(|got| got.status != Some(200));
    ensure!(failed.is_none(), "a connection failed while certificates rotated: {failed:?}");
    let lost = scene.trickled()?.into_iter().skip(trickles).find(|event| event.what != Trickled::Echoed);
    ensure!(lost.is_none(), "an open connection ended while certificates rotated: {lost:?}");
    let (log, _) = scene.sandbox.agent_log(Node::A, 0)?;
    let rotations = log
        .iter()
        .filter(|line| line.message() == "certificate ready")
        .filter(|line| line.field("identity").is_some_and(|id| id.ends_with("/sa/client")))
        .count();
    println!("{} connections over {} certificates", scene.dialled()?.len() - dials, rotations);
    ensure!(rotations >= 4, "{rotations} certificates in two lifetimes");

    scene.sandbox.stop("ca")?;
    let stopped = Instant::now();
    scene.expect_whole("on the old certificates")?;
    thread::sleep((TTL + Duration::from_millis(1500)).saturating_sub(stopped.elapsed()));
    let since = now_ms()?;
    let to = scene.server.to_string();
    let got: HttpResult =
        scene.sandbox.call("test/client", &["http-get", "--to", &to, "--marker", MARKER, "--timeout-ms", "8000"])?;
    ensure!(matches!(got.failure, Some(Failure::Refused | Failure::Reset)), "with expired certificates: {got:?}");
    scene.expect_told(Node::A, &[("reason", "identity-error"), ("error", "/sa/client has expired")])?;
    thread::sleep(Duration::from_secs(1));
    scene.expect_probes(Node::A, since)?;
    scene.expect_nothing_readable()?;
    scene.sandbox.start_ca(&scene.mesh)?;
    scene.expect_whole("with the CA again")?;
    scene.expect_nothing_readable()
}
