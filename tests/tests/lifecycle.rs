//! One agent follows another: nothing fails that the node's pods begin, and what is open goes on until the drain deadline
//! ([H.4], [K.4]). What happens when one of the two is killed, hangs, or cannot.

use std::fs;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use culvert_tests::capture::Capture;
use culvert_tests::programs::{Failure, HttpResult, PacedResult};
use culvert_tests::sandbox::{Family, LogLine, MeshPlan, Node, Plan, PodPlan, Sandbox, built};
use culvert_tests::{command, full, patience, record};
use nix::sys::signal::Signal;

const MARKER: &str = "readable-if-it-leaks";
const HTTP: u16 = 9080;
const EXCHANGE: u16 = 7000;
const DEADLINE: Duration = Duration::from_secs(4);
/// The deadline where connections must not reach it, also on a machine that is busy with other things.
const LONG_DEADLINE: Duration = Duration::from_secs(15);
/// What lives so long is shorter than the deadline.
const SHORTER: Duration = Duration::from_millis(1500);

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
    loads: Vec<String>,
}

impl Scene {
    fn new(instance: &str, deadline: Duration) -> Result<Self> {
        let mut sandbox = Sandbox::build(plan(instance))?;
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
        self.sandbox.http("test/client", self.sandbox.pod(server)?.at(Family::V4, HTTP), MARKER)
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

    fn until(&self) -> PathBuf {
        self.sandbox.dir().join("loads-end")
    }

    /// Connections from the client, `rate` a second, each living so long.
    fn load(&mut self, name: &str, server: &str, rate: u32, live: Duration) -> Result<()> {
        let to = self.sandbox.pod(server)?.at(Family::V4, EXCHANGE).to_string();
        let (rate, live, until) = (rate.to_string(), live.as_millis().to_string(), self.until());
        let until = until.to_str().context("a path that is text")?;
        let arguments =
            ["paced", "--to", &to, "--rate", &rate, "--live-ms", &live, "--timeout-ms", "20000", "--until", until];
        self.sandbox.start_in_pod(name, "test/client", &arguments)?;
        self.loads.push(name.to_owned());
        Ok(())
    }

    /// Ends the loads, and gives what came of each.
    fn loaded(&mut self) -> Result<Vec<(String, PacedResult)>> {
        fs::write(self.until(), "")?;
        let mut results = Vec::new();
        for name in std::mem::take(&mut self.loads) {
            self.sandbox.wait_end(&name, Duration::from_secs(30) * patience())?;
            let text = fs::read_to_string(self.sandbox.log_path(&name))?;
            let result = serde_json::from_str(text.trim()).with_context(|| format!("{name}: {text}"))?;
            results.push((name, result));
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

/// [H.4], [K.4]: agents follow each other on both nodes under load; every new connection succeeds, and none that is shorter
/// than the drain deadline is reset.
#[test]
fn takeovers_under_load_fail_nothing() -> Result<()> {
    let (rounds, rate) = if full() { (10, 500) } else { (4, 100) };
    let mut scene = Scene::new("t-takeover", LONG_DEADLINE)?;
    scene.load("load-far", "default/far", rate * 4 / 5, Duration::ZERO)?;
    scene.load("load-near", "default/near", rate / 5, Duration::ZERO)?;
    scene.load("load-longer", "default/far", 10, SHORTER)?;
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
    let results = scene.loaded()?;
    let mut all = 0;
    for (name, result) in &results {
        println!("{name}: {result:?}");
        all += result.ok;
    }
    for (name, result) in &results {
        ensure!(result.errors.is_empty(), "{name}: {result:?}");
        ensure!(result.ok > 20, "{name} did nothing: {result:?}");
    }
    record(&format!(
        "{rounds} take-overs in {took:.1?} at {rate} new connections/s: {all} connections, none failed; p99 of the first \
         answer {} ms",
        results[0].1.p99_us / 1000
    ))?;
    scene.expect_nothing_readable()
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
    for (name, result) in scene.loaded()? {
        println!("{name}: {result:?}");
        ensure!(result.ok > 20, "{name} did nothing: {result:?}");
        ensure!(result.errors.is_empty(), "{name}: {result:?}");
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
    let [(_, shorter)] = &scene.loaded()?[..] else { anyhow::bail!("one load") };
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
    for (name, result) in scene.loaded()? {
        println!("{name}: {result:?}");
        ensure!(result.errors.is_empty() && result.ok > 20, "{name}: {result:?}");
    }
    scene.expect_nothing_readable()
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
