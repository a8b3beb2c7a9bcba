//! One agent follows another: nothing fails that the node's pods begin, and what is open goes on until the drain deadline
//! ([H.4], [K.4]). What happens when one of the two is killed, hangs, or cannot.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use culvert::policy::MAX_BLOCKS;
use culvert_tests::capture::Capture;
use culvert_tests::programs::{Failure, HttpResult, PacedResult};
use culvert_tests::sandbox::{Family, LogLine, MeshPlan, Node, Plan, PodPlan, Sandbox, built};
use culvert_tests::{command, full, patience, record};
use nix::sys::signal::Signal;

const MARKER: &str = "readable-if-it-leaks";
const HTTP: u16 = 9080;
const EXCHANGE: u16 = 7000;
/// Port of an agent's readiness.
const READINESS: u16 = 15021;
const DEADLINE: Duration = Duration::from_secs(4);
/// The deadline where connections must not reach it, also on a machine that is busy with other things.
const LONG_DEADLINE: Duration = Duration::from_secs(15);
/// What lives so long is shorter than the deadline.
const SHORTER: Duration = Duration::from_millis(1500);
/// An answer that takes this and four times as long as any beside it, on a machine that stalls for all, hung somewhere.
const HANGS: Duration = Duration::from_secs(2);
const CLIENT: &str = "test/client";
const OUTSIDER: &str = "test/outsider";
/// What the messages of an agent begin with that gives a pod's verdicts itself.
const NO_ROOM: &str = "AuthorizationPolicies of this pod do not fit into the kernel";

fn plan(instance: &str) -> Plan {
    let server = |node, name: &str| {
        PodPlan::new(node, "default", name)
            .http(&[HTTP])
            .program(&["exchange-serve", &format!("--port={EXCHANGE}")])
            .probed(HTTP)
    };
    Plan::empty(instance)
        .pod(PodPlan::new(Node::A, "test", "client"))
        .pod(server(Node::A, "near"))
        .pod(server(Node::B, "far"))
}

/// With what else connections can be: plaintext from outside the mesh to a server whose policy the kernel has, and to one
/// (`judged`) whose policy is too large for it; and from the mesh to a server outside it. All of that stays on one node, so
/// that nothing readable crosses the link.
fn plan_of_every_kind(instance: &str) -> Plan {
    let exchange = format!("--port={EXCHANGE}");
    let server = |name: &str| PodPlan::new(Node::A, "default", name).program(&["exchange-serve", &exchange]);
    let outside = |pod: PodPlan| pod.label("istio.io/dataplane-mode", "none");
    plan(instance)
        .pod(outside(PodPlan::new(Node::A, "test", "outsider")))
        .pod(server("judged"))
        .pod(outside(server("legacy")))
}

/// Denies nobody who is here, by more addresses than the kernel takes.
fn too_large() -> String {
    let blocks: Vec<String> = (0..=MAX_BLOCKS).map(|n| format!("198.18.{}.{}", n / 256, n % 256)).collect();
    format!(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: many, namespace: default}}\n\
         spec:\n  selector: {{matchLabels: {{app: judged}}}}\n  action: DENY\n  \
         rules: [{{from: [{{source: {{ipBlocks: [{}]}}}}]}}]\n",
        blocks.join(", ")
    )
}

fn mesh_plan(deadline: Duration) -> Result<MeshPlan> {
    let mut mesh = MeshPlan::new(built("culvert")?);
    mesh.agent_arguments = vec!["--drain-deadline".to_owned(), format!("{}s", deadline.as_secs())];
    Ok(mesh)
}

/// A sandbox with its mesh, and the agents that follow each other on each node.
struct Scene {
    sandbox: Sandbox,
    mesh: MeshPlan,
    link: Capture,
    /// Names of the agents that serve, by node.
    serving: [String; 2],
    started: u32,
    /// Names and rates of the loads that run.
    loads: Vec<(String, u32)>,
}

/// What came of a load.
#[derive(Debug)]
struct Load {
    name: String,
    /// Connections a second that it was to make.
    rate: u32,
    result: PacedResult,
}

impl Load {
    /// It made as many connections as it was to make, and each came to its end.
    fn expect_flawless(&self) -> Result<()> {
        println!("{self:?}");
        let Self { name, rate, result } = self;
        ensure!(result.errors.is_empty(), "{name}: {result:?}");
        let due = u64::from(*rate) * result.lasted_ms / 1000;
        ensure!(result.ok > 20 && result.ok * 10 >= due * 9, "{name}: {due} connections were due: {result:?}");
        Ok(())
    }
}

impl Scene {
    fn new(instance: &str, deadline: Duration) -> Result<Self> {
        Self::with(plan(instance), &[], deadline)
    }

    fn with(plan: Plan, manifests: &[(&str, &str)], deadline: Duration) -> Result<Self> {
        let mut sandbox = Sandbox::build(plan)?;
        for (file, text) in manifests {
            sandbox.manifests().apply(file, text)?;
        }
        let mesh = mesh_plan(deadline)?;
        sandbox.start_mesh(&mesh)?;
        let link = sandbox.capture()?;
        let serving = Node::ALL.map(culvert_tests::sandbox::agent_process);
        let scene = Self { sandbox, mesh, link, serving, started: 0, loads: Vec::new() };
        for server in ["default/near", "default/far"] {
            scene.expect_whole(server)?;
        }
        Ok(scene)
    }

    fn serving(&mut self, node: Node) -> &mut String {
        &mut self.serving[match node {
            Node::A => 0,
            Node::B => 1,
        }]
    }

    fn call(&self, server: &str) -> Result<HttpResult> {
        self.sandbox.http(CLIENT, self.sandbox.pod(server)?.at(Family::V4, HTTP), MARKER)
    }

    fn expect_whole(&self, server: &str) -> Result<()> {
        let got = self.call(server)?;
        let logs = || -> Vec<String> {
            let end = |agent: &String| fs::read_to_string(self.sandbox.log_path(agent)).unwrap_or_default();
            self.serving.iter().map(end).collect()
        };
        ensure!(got.status == Some(200), "{server}: {got:?}\n{}", logs().join("\n"));
        Ok(())
    }

    /// Starts a further agent of a node and gives the name of its process.
    fn start(&mut self, node: Node) -> Result<String> {
        self.started += 1;
        let name = format!("agent-{}-{}", node.letter(), self.started);
        self.sandbox.start_agent_as(&self.mesh, node, &name)?;
        Ok(name)
    }

    /// Waits until a line of an agent's log has this message.
    fn wait_told(&mut self, agent: &str, message: &str) -> Result<LogLine> {
        let limit = Duration::from_secs(40) * patience();
        let found = command::wait_for(&format!("{agent} tells {message:?}"), limit, || {
            self.sandbox.expect_running(agent).or_else(|error| match self.told(agent, message)? {
                Some(_) => Ok(()),
                None => Err(error),
            })?;
            self.told(agent, message)
        });
        found.with_context(|| fs::read_to_string(self.sandbox.log_path(agent)).unwrap_or_default())
    }

    fn told(&self, agent: &str, message: &str) -> Result<Option<LogLine>> {
        let (lines, _) = self.sandbox.log_of(agent, 0)?;
        Ok(lines.into_iter().find(|line| line.message().starts_with(message)))
    }

    /// A new agent takes over; the one before notices. Its end is not waited for.
    fn take_over(&mut self, node: Node) -> Result<String> {
        let next = self.start(node)?;
        self.wait_told(&next, "ready")?;
        let old = std::mem::replace(self.serving(node), next);
        self.wait_told(&old, "another agent has taken over")?;
        Ok(old)
    }

    /// What `culvert ready` says of an agent of node a: yes, or no and why. An agent that has just taken over shares the
    /// node's ports with the one before for a moment, and may have to be asked again.
    fn expect_ready(&self, agent: &str, why_not: Option<&str>) -> Result<()> {
        let pid = self.sandbox.pid(agent)?.to_string();
        let mut last = String::new();
        command::wait_for(&format!("culvert ready of {agent}"), Duration::from_secs(10) * patience(), || {
            let mut ready = self.sandbox.agent_place(Node::A)?.command(built("culvert")?)?;
            let got = ready.args(["ready", "--pid", &pid]).output().context("culvert ready")?;
            last = format!("{}{}", String::from_utf8_lossy(&got.stdout), String::from_utf8_lossy(&got.stderr));
            Ok(match why_not {
                None => got.status.success() && last == "ready\n",
                Some(why) => got.status.code() == Some(1) && last.contains(why),
            }
            .then_some(()))
        })
        .with_context(|| last.clone())
    }

    fn expect_orderly_end(&mut self, agent: &str, limit: Duration) -> Result<()> {
        let status = self.sandbox.wait_end(agent, limit)?;
        ensure!(status.success(), "{agent} ended with {status}");
        Ok(())
    }

    /// The answer that a node's kubelet gets of the agent.
    fn readiness(&self, node: Node) -> Result<String> {
        self.sandbox.node_place(node).inside(|| {
            let mut stream = TcpStream::connect_timeout(&(node.v4(), READINESS).into(), DEADLINE)?;
            stream.set_read_timeout(Some(DEADLINE))?;
            stream.write_all(b"GET /healthz/ready HTTP/1.1\r\nhost: node\r\n\r\n")?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer)?;
            Ok(answer)
        })
    }

    fn until(&self) -> PathBuf {
        self.sandbox.dir().join("loads-end")
    }

    /// Connections from the client, `rate` a second, each living so long.
    fn load(&mut self, name: &str, server: &str, rate: u32, live: Duration) -> Result<()> {
        self.load_from(CLIENT, name, server, rate, live)
    }

    /// As [`Self::load`], from any pod.
    fn load_from(&mut self, from: &str, name: &str, server: &str, rate: u32, live: Duration) -> Result<()> {
        self.loads.push((name.to_owned(), rate));
        let to = self.sandbox.pod(server)?.at(Family::V4, EXCHANGE).to_string();
        let (rate, live, until) = (rate.to_string(), live.as_millis().to_string(), self.until());
        let until = until.to_str().context("a path that is text")?;
        let arguments =
            ["paced", "--to", &to, "--rate", &rate, "--live-ms", &live, "--timeout-ms", "20000", "--until", until];
        self.sandbox.start_in_pod(name, from, &arguments)
    }

    /// Ends the loads, and gives what came of each.
    fn loaded(&mut self) -> Result<Vec<Load>> {
        fs::write(self.until(), "")?;
        let mut results = Vec::new();
        for (name, rate) in std::mem::take(&mut self.loads) {
            self.sandbox.wait_end(&name, Duration::from_secs(30) * patience())?;
            let text = fs::read_to_string(self.sandbox.log_path(&name))?;
            let result = serde_json::from_str(text.trim()).with_context(|| format!("{name}: {text}"))?;
            results.push(Load { name, rate, result });
        }
        fs::remove_file(self.until())?;
        Ok(results)
    }

    fn expect_nothing_readable(&self) -> Result<()> {
        ensure!(!self.link.contains(MARKER.as_bytes())?, "readable on the link");
        ensure!(!self.link.contains(b"ECHO\nhello")?, "readable on the link");
        ensure!(self.link.frames_with_port(HTTP)? == 0, "a frame of the server's own port crossed the link");
        ensure!(self.link.frames_with_port(EXCHANGE)? == 0, "a frame of the server's own port crossed the link");
        ensure!(self.link.frames_with_port(15008)? > 0, "no tunnel crossed the link");
        Ok(())
    }
}

/// [H.4], [K.4]: agents follow each other on both nodes under load of every kind; every new connection succeeds, none waits
/// for a SYN to be sent again, and none that is shorter than the drain deadline is reset.
#[test]
fn takeovers_under_load_fail_nothing() -> Result<()> {
    const BESIDE: &str = "load-beside";
    let (rounds, rate) = if full() { (10, 500) } else { (4, 100) };
    let plan = plan_of_every_kind("t-takeover");
    let mut scene = Scene::with(plan, &[("too-large.yaml", &too_large())], LONG_DEADLINE)?;
    let agent = scene.serving(Node::A).clone();
    scene.wait_told(&agent, NO_ROOM)?;
    let again =
        |scene: &Scene| -> Result<u64> { scene.sandbox.pods().map(|pod| pod.place.tcp_counter("TCPSynRetrans")).sum() };
    let before = again(&scene)?;
    scene.load("load-far", "default/far", rate * 4 / 5, Duration::ZERO)?;
    scene.load("load-near", "default/near", rate / 5, Duration::ZERO)?;
    scene.load("load-longer", "default/far", 10, SHORTER)?;
    scene.load("load-out-of-the-mesh", "default/legacy", 20, Duration::ZERO)?;
    scene.load_from(OUTSIDER, "load-passed", "default/near", 20, Duration::ZERO)?;
    scene.load_from(OUTSIDER, "load-judged", "default/judged", 20, Duration::ZERO)?;
    // No agent has to do with this one: what it waits for is the machine.
    scene.load_from(OUTSIDER, BESIDE, "default/legacy", 20, Duration::ZERO)?;
    thread::sleep(Duration::from_secs(1));
    let began = Instant::now();
    let mut old = Vec::new();
    for round in 0..rounds {
        let node = if round % 2 == 0 { Node::A } else { Node::B };
        old.push(scene.take_over(node)?);
    }
    let took = began.elapsed();
    for agent in old {
        scene.expect_orderly_end(&agent, (LONG_DEADLINE + Duration::from_secs(3)) * patience())?;
    }
    let loads = scene.loaded()?;
    let again = again(&scene)? - before;
    let max = |load: &Load| Duration::from_micros(load.result.max_us);
    let beside = loads.iter().find(|load| load.name == BESIDE).map(max).context("it was started")?;
    for load in &loads {
        load.expect_flawless()?;
        // At the full rate connections wait for each other.
        ensure!(full() || max(load) < HANGS + 4 * beside, "beside {beside:?} without the mesh: {load:?}");
    }
    ensure!(again == 0, "{again} SYNs were sent again");
    let all: u64 = loads.iter().map(|load| load.result.ok).sum();
    record(&format!(
        "{rounds} take-overs in {took:.1?} at {rate} new connections/s: {all} connections, none failed; p99 of the first \
         answer {} ms",
        loads[0].result.p99_us / 1000
    ))?;
    scene.expect_nothing_readable()
}

/// [K.4]: while a killed agent has no successor, connections fail; none does that begins once the next one is ready.
#[test]
fn after_a_kill_nothing_fails_that_begins_when_the_next_agent_is_ready() -> Result<()> {
    let mut scene = Scene::new("t-after-kill", LONG_DEADLINE)?;
    for node in Node::ALL {
        scene.load(&format!("load-far-{node}"), "default/far", 50, Duration::ZERO)?;
        scene.load(&format!("load-near-{node}"), "default/near", 50, Duration::ZERO)?;
        thread::sleep(Duration::from_millis(300));
        let killed = scene.serving(node).clone();
        scene.sandbox.signal(&killed, Signal::SIGKILL)?;
        let next = scene.start(node)?;
        scene.wait_told(&next, "ready")?;
        let ready = now_ms()?;
        *scene.serving(node) = next;
        // Each is tried once.
        for _ in 0..20 {
            scene.expect_whole("default/far")?;
            scene.expect_whole("default/near")?;
        }
        for Load { name, result, .. } in scene.loaded()? {
            println!("{node} was killed, and had a successor at {ready}: {name}: {result:?}");
            // The other node's agent waits for a tunnel of the server's; nobody waits in the place of the client's.
            ensure!(node == Node::B || result.first_error_ms.is_some(), "{name} has not noticed: {result:?}");
            ensure!(
                result.last_failed_begin_ms.is_none_or(|begin| begin < ready),
                "{name}: a connection failed that began after {ready}: {result:?}"
            );
            ensure!(result.ok > 20, "{name} did nothing: {result:?}");
        }
    }
    scene.expect_nothing_readable()
}

fn now_ms() -> Result<u64> {
    Ok(u64::try_from(SystemTime::now().duration_since(UNIX_EPOCH)?.as_millis())?)
}

/// [K.4]: an agent that hangs is not waited for; when it goes on it sees that it is not the one any more, and ends.
#[test]
fn an_agent_that_hangs_is_replaced() -> Result<()> {
    let mut scene = Scene::new("t-hangs", DEADLINE)?;
    let old = scene.serving(Node::A).clone();
    scene.sandbox.signal(&old, Signal::SIGSTOP)?;
    let next = scene.start(Node::A)?;
    scene.wait_told(&next, "ready")?;
    *scene.serving(Node::A) = next;
    for server in ["default/near", "default/far"] {
        scene.expect_whole(server)?;
    }
    scene.sandbox.signal(&old, Signal::SIGCONT)?;
    scene.wait_told(&old, "another agent has taken over")?;
    scene.expect_orderly_end(&old, (DEADLINE + Duration::from_secs(3)) * patience())?;
    for server in ["default/near", "default/far"] {
        scene.expect_whole(server)?;
    }
    scene.expect_nothing_readable()
}

/// The agent that serves goes on whatever becomes of the one that is to follow it.
#[test]
fn a_successor_that_cannot_leaves_the_old_one_serving() -> Result<()> {
    let mut scene = Scene::new("t-cannot", LONG_DEADLINE)?;
    scene.load("load", "default/far", 20, Duration::ZERO)?;

    // It cannot even start: one line that says why.
    let good = scene.mesh.agent_arguments.clone();
    scene.mesh.agent_arguments.extend(["--log-level".to_owned(), "loud".to_owned()]);
    let next = scene.start(Node::A)?;
    let status = scene.sandbox.wait_end(&next, Duration::from_secs(20) * patience())?;
    ensure!(!status.success(), "{next} ended with {status}");
    let said = fs::read_to_string(scene.sandbox.log_path(&next))?;
    ensure!(said.contains("--log-level: \"loud\""), "{said}");
    scene.mesh.agent_arguments = good;

    // It is killed at any time before it serves.
    for pause in [5, 40, 150, 400] {
        let next = scene.start(Node::A)?;
        thread::sleep(Duration::from_millis(pause));
        if scene.told(&next, "ready")?.is_some() {
            // A fast machine: it serves, and is no successor any more.
            *scene.serving(Node::A) = next;
        } else {
            scene.sandbox.signal(&next, Signal::SIGKILL)?;
        }
    }

    // It has no certificates, and waits for them: without them it would refuse what the old one carries.
    scene.sandbox.stop("ca")?;
    let next = scene.start(Node::A)?;
    let told = scene.wait_told(&next, "not taking over yet")?;
    let missing = told.field("certificates").unwrap_or_default();
    ensure!(missing.contains("ns/test/sa/client"), "{missing}");
    // Whoever asks the node's ports is answered by the old one: a probe of the new one must not take that for its own.
    let old = scene.serving(Node::A).clone();
    scene.expect_ready(&old, None)?;
    scene.expect_ready(&next, Some("which does not serve"))?;
    // One more waits for its turn.
    let third = scene.start(Node::A)?;
    scene.wait_told(&third, "another agent prepares itself")?;
    scene.expect_whole("default/far")?;
    let mesh = scene.mesh.clone();
    scene.sandbox.start_ca(&mesh)?;
    scene.wait_told(&next, "ready")?;
    scene.wait_told(&third, "ready")?;
    scene.wait_told(&next, "another agent has taken over")?;
    scene.expect_ready(&third, None)?;
    scene.expect_ready(&next, Some("not ready"))?;
    scene.expect_orderly_end(&next, (LONG_DEADLINE + Duration::from_secs(3)) * patience())?;
    scene.expect_whole("default/far")?;
    for load in scene.loaded()? {
        load.expect_flawless()?;
    }
    scene.expect_nothing_readable()
}

/// [H.4]: what is open at SIGTERM goes on until the deadline, then is reset, and the process ends within a second of that; with
/// a successor at hand nothing is refused in between.
#[test]
fn sigterm_drains_within_the_deadline() -> Result<()> {
    let mut scene = Scene::new("t-sigterm", DEADLINE)?;
    // Both sides at once: the client's agent and the server's.
    scene.load("shorter", "default/far", 20, SHORTER)?;
    thread::sleep(SHORTER);
    fs::write(scene.until(), "")?;
    // Those that it has begun are open, and it begins no further ones (it looks ten times a second).
    thread::sleep(Duration::from_millis(300));
    let to = scene.sandbox.pod("default/far")?.at(Family::V4, EXCHANGE).to_string();
    scene.sandbox.start_in_pod("longer", "test/client", &["hold", "--to", &to])?;
    thread::sleep(Duration::from_millis(300));
    let asked = Instant::now();
    for node in Node::ALL {
        let agent = scene.serving(node).clone();
        scene.sandbox.signal(&agent, Signal::SIGTERM)?;
    }
    for node in Node::ALL {
        command::wait_for(&format!("{node} says that it is draining"), DEADLINE / 2, || {
            let answer = scene.readiness(node)?;
            Ok((answer.starts_with("HTTP/1.1 503 ") && answer.contains("is draining")).then_some(()))
        })?;
    }
    for node in Node::ALL {
        let agent = scene.serving(node).clone();
        scene.expect_orderly_end(&agent, (DEADLINE + Duration::from_secs(3)) * patience())?;
        let took = asked.elapsed();
        println!("{agent} ended {took:.2?} after SIGTERM");
        ensure!(
            took > DEADLINE - Duration::from_millis(200),
            "{agent}: an open connection was not waited for: {took:?}"
        );
        // A second by the book; the machine may be busy.
        ensure!(took < DEADLINE + Duration::from_secs(1) * (1 + patience()), "{agent} took {took:?}");
    }
    let [Load { result: shorter, .. }] = &scene.loaded()?[..] else { anyhow::bail!("one load") };
    ensure!(shorter.errors.is_empty() && shorter.ok > 10, "{shorter:?}");
    let held = fs::read_to_string(scene.sandbox.log_path("longer"))?;
    ensure!(held.trim_end().ends_with('}') && held.contains("\"failure\":\"reset\""), "{held}");

    // Refused, or waiting: never past the agent.
    let got = scene.call("default/far")?;
    ensure!(matches!(got.failure, Some(Failure::Refused | Failure::Reset)), "without any agent: {got:?}");
    for node in Node::ALL {
        let next = scene.start(node)?;
        scene.wait_told(&next, "ready")?;
        *scene.serving(node) = next;
    }
    scene.expect_whole("default/far")?;

    scene.load("load", "default/far", 20, Duration::ZERO)?;
    for node in Node::ALL {
        let next = scene.start(node)?;
        scene.wait_told(&next, "culvert agent starts")?;
        // Its turn comes within milliseconds; the signal must not come before.
        thread::sleep(Duration::from_millis(500));
        let old = scene.serving(node).clone();
        scene.sandbox.signal(&old, Signal::SIGTERM)?;
        scene.wait_told(&next, "ready")?;
        scene.expect_orderly_end(&old, (DEADLINE + Duration::from_secs(3)) * patience())?;
        *scene.serving(node) = next;
    }
    for load in scene.loaded()? {
        load.expect_flawless()?;
    }
    scene.expect_nothing_readable()
}

/// [I.7]: SIGHUP asks the CA at once for what it has not given, whatever the pause after a failure.
#[test]
fn sighup_waits_for_no_pause() -> Result<()> {
    /// Longer than it takes to start the CA, and to get a certificate of it.
    const LONG_PAUSE_MS: u64 = 6000;
    // One identity: no other's attempt finds the CA there again.
    let mut sandbox = Sandbox::build(Plan::empty("t-hangup").pod(PodPlan::new(Node::A, "test", "client")))?;
    let mesh = MeshPlan::new(built("culvert")?);
    // For its root only.
    sandbox.start_ca(&mesh)?;
    sandbox.stop("ca")?;
    sandbox.start_agent(&mesh, Node::A)?;
    sandbox.wait_ready(Node::A)?;
    // Each pause is twice the one before.
    let least = LONG_PAUSE_MS * u64::from(patience());
    command::wait_for("a long pause begins", Duration::from_millis(LONG_PAUSE_MS * 6), || {
        let (lines, _) = sandbox.agent_log(Node::A, 0)?;
        let pause = |line: &LogLine| line.field("retry_in_ms").and_then(|text| text.parse::<u64>().ok());
        Ok(lines.iter().rev().find_map(pause).filter(|pause| *pause >= least).map(drop))
    })?;
    sandbox.start_ca(&mesh)?;
    sandbox.signal_agent(Node::A, Signal::SIGHUP)?;
    command::wait_for("the certificate comes with SIGHUP", Duration::from_secs(2), || {
        let (lines, _) = sandbox.agent_log(Node::A, 0)?;
        Ok(lines.iter().any(|line| line.message() == "certificate ready").then_some(()))
    })
}

/// A file that changes takes effect where that can be, and is told where not; a wrong one changes nothing.
#[test]
fn the_configuration_is_read_again() -> Result<()> {
    let mut sandbox = Sandbox::build(plan("t-reload"))?;
    let file = sandbox.dir().join("agent.yaml");
    let write = |text: &str| -> Result<()> {
        // As a ConfigMap is replaced: whole.
        let fresh = file.with_extension("new");
        fs::write(&fresh, text)?;
        Ok(fs::rename(&fresh, &file)?)
    };
    write("drain-deadline: 60s\n")?;
    let mut mesh = MeshPlan::new(built("culvert")?);
    mesh.agent_arguments = vec!["--config".to_owned(), file.to_str().context("text")?.to_owned()];
    sandbox.start_mesh(&mesh)?;
    let told = |sandbox: &Sandbox, message: &str, field: &str, part: &str| -> Result<()> {
        command::wait_for(&format!("the agent tells {message:?} with {part:?}"), Duration::from_secs(10), || {
            let (lines, _) = sandbox.agent_log(Node::A, 0)?;
            let has = |line: &LogLine| {
                line.message().contains(message) && line.field(field).is_some_and(|text| text.contains(part))
            };
            Ok(lines.iter().any(has).then_some(()))
        })
    };
    write("drain-deadline: soon\nlog-level: debug\n")?;
    told(&sandbox, "the new configuration is wrong and changes nothing", "error", "drain-deadline: \"soon\"")?;
    write("drain-deadline: 1s\nworkers: 7\n")?;
    told(&sandbox, "need a new start", "settings", "workers")?;
    told(&sandbox, "settings changed", "settings", "drain-deadline=1s")?;
    let (lines, _) = sandbox.agent_log(Node::A, 0)?;
    ensure!(!lines.iter().any(|line| line.field("settings").is_some_and(|text| text.contains("log-level=debug"))));
    write("drain-deadline: 1s\nworkers: 7\nlog-level: debug\n")?;
    told(&sandbox, "settings changed", "settings", "log-level=debug")?;
    sandbox.signal_agent(Node::A, Signal::SIGHUP)?;
    command::wait_for("SIGHUP is told", Duration::from_secs(5), || {
        let (lines, _) = sandbox.agent_log(Node::A, 0)?;
        Ok(lines.iter().any(|line| line.message().starts_with("SIGHUP")).then_some(()))
    })?;
    let got = sandbox.http("test/client", sandbox.pod("default/far")?.at(Family::V4, HTTP), MARKER)?;
    ensure!(got.status == Some(200), "{got:?}");

    // The deadline is the new one.
    let to = sandbox.pod("default/far")?.at(Family::V4, EXCHANGE).to_string();
    sandbox.start_in_pod("held", "test/client", &["hold", "--to", &to])?;
    command::wait_for("a connection is held", Duration::from_secs(10), || {
        Ok(fs::read_to_string(sandbox.log_path("held"))?.contains("\"rounds\":1").then_some(()))
    })?;
    sandbox.signal_agent(Node::A, Signal::SIGTERM)?;
    let agent = culvert_tests::sandbox::agent_process(Node::A);
    let status = sandbox.wait_end(&agent, Duration::from_secs(20))?;
    ensure!(status.success(), "{status}");
    Ok(())
}
