//! No gap lets plaintext through: each row of docs/life-cycle.md's table of gaps, with the link and both nodes' pod networks
//! recorded and searched for what was sent ([K.4], [D.3], [D.4], [C.6], [C.11]).
//!
//! Two kinds of bytes are looked for. What a pod of the mesh sends must never be readable outside its own namespace. What a
//! client outside the mesh sends to a port that is STRICT must not even get so far that it sends it, since it is refused
//! before; where only the agent can say so, it must not be answered. Each recording is also searched for bytes that are
//! readable by right, so a search that finds nothing says something.

use std::fmt::Write as _;
use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::symlink;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use culvert_tests::capture::Capture;
use culvert_tests::programs::{ExchangeResult, Failure, HeldRound, HttpResult};
use culvert_tests::sandbox::{Family, LogLine, MeshPlan, Node, Plan, PodPlan, Sandbox, agent_process, built, own_name};
use culvert_tests::{command, full};
use nix::sys::signal::Signal;
use serde::de::DeserializeOwned;

/// STRICT all the time.
const HTTP: u16 = 9080;
/// STRICT or not, as the scenario goes.
const OTHER: u16 = 9090;
const EXCHANGE: u16 = 7000;
/// What pods of the mesh send.
const MESH: &str = "sent-by-a-pod-of-the-mesh";
/// What the client outside the mesh sends to where it may not.
const FORBIDDEN: &str = "sent-to-a-strict-port";
/// Silence after which the kernel refuses (`SILENT_AFTER_NS`).
const SILENT_AFTER: Duration = Duration::from_secs(10);
/// Time for the mesh to be whole again, and for a policy to be in force.
const SOON: Duration = Duration::from_secs(30);
const POLICY_FILE: &str = "policy.yaml";
const FAMILIES: [Family; 2] = [Family::V4, Family::V6];

/// `client` and the servers are in the mesh, and so are pods to come; `outsider` and `legacy` are not. `far` and `near` are
/// STRICT; `denied` is not, and an AuthorizationPolicy denies everybody who comes without a certificate.
struct Scene {
    sandbox: Sandbox,
    mesh: MeshPlan,
    /// The link, and what is routed to and from the pods of each node.
    recordings: [(&'static str, Capture); 3],
    /// Clients that call all the time, over IPv4 and IPv6, and whether they may.
    callers: Vec<(String, bool)>,
}

impl Scene {
    fn new(name: &str) -> Result<Self> {
        let server = |node, name: &str| {
            let exchange = format!("--port={EXCHANGE}");
            PodPlan::new(node, "default", name)
                .http(&[HTTP, OTHER])
                .program(&["exchange-serve", &exchange])
                .probed(HTTP)
        };
        let outside = |pod: PodPlan| pod.label("istio.io/dataplane-mode", "none");
        let plan = Plan::empty(&own_name(name))
            .pod(PodPlan::new(Node::A, "test", "client"))
            .pod(outside(PodPlan::new(Node::A, "test", "outsider")))
            .pod(server(Node::A, "near"))
            .pod(server(Node::B, "far"))
            .pod(server(Node::B, "denied"))
            .pod(outside(server(Node::B, "legacy")));
        let mut sandbox = Sandbox::build(plan)?;
        sandbox.manifests().apply(POLICY_FILE, &strict(&[]))?;
        let mesh = MeshPlan::new(built("culvert")?);
        sandbox.start_mesh(&mesh)?;
        let recordings = [
            ("the link", sandbox.capture()?),
            ("node-a's pods", sandbox.capture_pods(Node::A)?),
            ("node-b's pods", sandbox.capture_pods(Node::B)?),
        ];
        let mut scene = Self { sandbox, mesh, recordings, callers: Vec::new() };
        for server in ["default/near", "default/far", "default/denied"] {
            scene.call_on("test/client", server, MESH, true)?;
            scene.call_on("test/outsider", server, FORBIDDEN, false)?;
        }
        scene.expect_whole("at the start")?;
        Ok(scene)
    }

    fn at(&self, server: &str, port: u16) -> Result<SocketAddr> {
        Ok(self.sandbox.pod(server)?.at(Family::V4, port))
    }

    /// Has a pod call a server from now on, again and again.
    fn call_on(&mut self, from: &str, server: &str, marker: &str, may: bool) -> Result<()> {
        for family in FAMILIES {
            let (name, to) = (caller(from, server, family), self.sandbox.pod(server)?.at(family, HTTP).to_string());
            let call = ["http-get", "--to", &to, "--marker", marker, "--count", "1000000"];
            let pace = ["--interval-ms", "150", "--timeout-ms", "2000"];
            self.sandbox.start_in_pod(&name, from, &[&call[..], &pace[..]].concat())?;
            self.callers.push((name, may));
        }
        Ok(())
    }

    /// Ends that.
    fn stop_calling(&mut self, from: &str, server: &str) -> Result<()> {
        for family in FAMILIES {
            let name = caller(from, server, family);
            self.callers.retain(|(other, _)| *other != name);
            self.sandbox.stop(&name)?;
        }
        Ok(())
    }

    fn call(&self, from: &str, server: &str, port: u16, marker: &str) -> Result<HttpResult> {
        self.sandbox.http(from, self.at(server, port)?, marker)
    }

    /// Everybody who may call is answered from now on, and who may not never was.
    fn expect_whole(&self, when: &str) -> Result<()> {
        for (name, _) in self.callers.iter().filter(|(_, may)| *may) {
            let before = lines::<HttpResult>(&self.sandbox, name)?.len();
            let mut last = None;
            let whole = command::wait_for(&format!("{when}: {name} is answered"), SOON, || {
                let results: Vec<HttpResult> = lines(&self.sandbox, name)?;
                let served = results[before..].iter().rev().take_while(|got| got.status == Some(200)).count();
                last = results.into_iter().next_back();
                Ok((served >= 3).then_some(()))
            });
            whole.with_context(|| format!("the last result: {last:?}"))?;
        }
        self.expect_closed(when)
    }

    /// Who may not call was not answered at any time, and nothing of that, and of the mesh, can be read.
    fn expect_closed(&self, when: &str) -> Result<()> {
        for (name, _) in self.callers.iter().filter(|(_, may)| !*may) {
            let results = command::wait_for(&format!("{when}: {name} has tried"), SOON, || {
                let results: Vec<HttpResult> = lines(&self.sandbox, name)?;
                Ok((!results.is_empty()).then_some(results))
            })?;
            let other = results.iter().find(|got| !matches!(got.failure, Some(Failure::Refused)));
            ensure!(other.is_none(), "{when}: {name} was not refused: {other:?}");
        }
        for marker in [MESH, FORBIDDEN] {
            self.expect_unreadable(marker, when)?;
        }
        Ok(())
    }

    fn expect_unreadable(&self, marker: &str, when: &str) -> Result<()> {
        for (place, recording) in &self.recordings {
            ensure!(!recording.contains(marker.as_bytes())?, "{when}: {marker:?} is readable on {place}");
        }
        Ok(())
    }

    /// The control: the same search finds what is readable by right.
    fn expect_readable(&self, marker: &str, when: &str) -> Result<()> {
        for (place, recording) in &self.recordings {
            command::wait_for(&format!("{when}: {marker:?} is found on {place}"), SOON, || {
                Ok(recording.contains(marker.as_bytes())?.then_some(()))
            })?;
        }
        Ok(())
    }

    /// A client outside the mesh is refused, at once.
    fn expect_refused(&self, from: &str, server: &str, port: u16, marker: &str, when: &str) -> Result<()> {
        let got = self.call(from, server, port, marker)?;
        ensure!(matches!(got.failure, Some(Failure::Refused | Failure::Reset)), "{when}: {from} got {got:?}");
        Ok(())
    }

    fn wait_answered(&self, from: &str, server: &str, port: u16, marker: &str, when: &str) -> Result<()> {
        let mut last = None;
        command::wait_for(&format!("{when}: {from} is answered by {server}:{port}"), SOON, || {
            let got = self.call(from, server, port, marker)?;
            let served = got.status == Some(200);
            last = Some(got);
            Ok(served.then_some(()))
        })
        .with_context(|| format!("the last result: {last:?}"))
    }

    fn wait_refused(&self, from: &str, server: &str, port: u16, marker: &str, when: &str) -> Result<()> {
        command::wait_for(&format!("{when}: {from} is refused by {server}:{port}"), SOON, || {
            let got = self.call(from, server, port, marker)?;
            Ok(matches!(got.failure, Some(Failure::Refused | Failure::Reset)).then_some(()))
        })
    }

    /// Waits until an agent has logged a line with these words in these fields, from `offset` on.
    fn wait_told(&self, node: Node, offset: u64, fields: &[(&str, &str)]) -> Result<LogLine> {
        command::wait_for(&format!("the agent of {node} tells {fields:?}"), SOON, || {
            let (lines, _) = self.sandbox.agent_log(node, offset)?;
            let told = |line: &LogLine| {
                fields.iter().all(|(name, text)| line.field(name).is_some_and(|value| value.contains(text)))
            };
            Ok(lines.into_iter().find(told))
        })
    }

    fn log_end(&self, node: Node) -> Result<u64> {
        Ok(self.sandbox.agent_log(node, 0)?.1)
    }

    fn start_agent(&mut self, node: Node) -> Result<()> {
        let mesh = self.mesh.clone();
        self.sandbox.start_agent(&mesh, node)
    }
}

fn caller(from: &str, server: &str, family: Family) -> String {
    format!("{from}-{server}-{family:?}").replace('/', "-")
}

fn lines<T: DeserializeOwned>(sandbox: &Sandbox, program: &str) -> Result<Vec<T>> {
    let text = fs::read_to_string(sandbox.log_path(program))?;
    let whole = &text[..text.rfind('\n').map_or(0, |at| at + 1)];
    whole.lines().map(|line| serde_json::from_str(line).with_context(|| format!("{program}: {line}"))).collect()
}

/// Everything of the servers' namespace is STRICT or denies, but for these ports of `far`; so that half of an update would
/// show, there are many more of them that nobody listens on.
fn strict(open: &[u16]) -> String {
    let mut text = "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\n\
         metadata: {name: denied, namespace: default}\n\
         spec: {selector: {matchLabels: {app: denied}}, mtls: {mode: PERMISSIVE}}\n---\n\
         apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\n\
         metadata: {name: denied, namespace: default}\n\
         spec:\n  selector: {matchLabels: {app: denied}}\n  action: DENY\n  \
         rules: [{from: [{source: {notPrincipals: [\"*\"]}}]}]\n---\n\
         apiVersion: security.istio.io/v1\nkind: PeerAuthentication\n\
         metadata: {name: all, namespace: default}\nspec: {mtls: {mode: STRICT}}\n---\n\
         apiVersion: security.istio.io/v1\nkind: PeerAuthentication\n\
         metadata: {name: far, namespace: default}\n\
         spec:\n  selector: {matchLabels: {app: far}}\n  mtls: {mode: STRICT}\n  portLevelMtls:\n"
        .to_owned();
    for port in open.iter().copied().chain(20_000..20_500) {
        // Writing to a String does not fail.
        let _ = writeln!(text, "    {port}: {{mode: PERMISSIVE}}");
    }
    text
}

/// Agents that hang, are killed, start, and are killed in the middle of anything: what is STRICT stays STRICT, and what a
/// pod of the mesh sends stays unreadable ([K.4], [D.5]).
#[test]
fn no_gap_in_an_agents_life_lets_plaintext_through() -> Result<()> {
    let mut scene = Scene::new("gap-life")?;

    // Hung.
    for node in Node::ALL {
        scene.sandbox.signal_agent(node, Signal::SIGSTOP)?;
    }
    let stopped = Instant::now();
    while stopped.elapsed() < SILENT_AFTER + Duration::from_millis(300) {
        let got = scene.call("test/client", "default/far", HTTP, MESH)?;
        ensure!(got.status.is_none(), "a stopped agent answered: {got:?}");
        thread::sleep(Duration::from_millis(100));
    }
    for from in ["test/client", "test/outsider"] {
        scene.expect_refused(from, "default/far", OTHER, FORBIDDEN, "hung")?;
    }
    scene.expect_closed("hung")?;

    // Killed, and nobody there.
    for node in Node::ALL {
        scene.sandbox.signal_agent(node, Signal::SIGKILL)?;
    }
    for from in ["test/client", "test/outsider"] {
        scene.expect_refused(from, "default/far", OTHER, FORBIDDEN, "killed")?;
    }
    scene.expect_closed("killed")?;

    // Starting: they call all the time, from before the agents are executed until they are ready.
    for node in Node::ALL {
        scene.start_agent(node)?;
    }
    for node in Node::ALL {
        scene.sandbox.wait_ready(node)?;
    }
    scene.expect_whole("started")?;

    // Half an update: killed at some moment of one, or while it starts with the new policy.
    let pauses = [0, 30, 55, 65, 80, 120].map(Duration::from_millis);
    let rounds = if full() { 10 * pauses.len() } else { pauses.len() };
    for round in 0..rounds {
        half_an_update(&mut scene, round, pauses[round % pauses.len()])?;
    }
    scene.expect_whole("after all updates")
}

/// A port is opened, and closed again by an update in which the agent is killed. What its successor says to be in force, is.
fn half_an_update(scene: &mut Scene, round: usize, pause: Duration) -> Result<()> {
    let (open, closed) = (format!("while-open-{round}-"), format!("while-closed-{round}-"));
    let when = format!("round {round}");
    scene.sandbox.manifests().apply(POLICY_FILE, &strict(&[OTHER, EXCHANGE]))?;
    scene.wait_answered("test/outsider", "default/far", OTHER, &open, &when)?;
    scene.expect_readable(&open, &when)?;
    let (held, to) = (format!("held-{round}"), scene.at("default/far", EXCHANGE)?.to_string());
    scene.sandbox.start_in_pod(&held, "test/outsider", &["hold", "--to", &to])?;
    let rounds = |scene: &Scene| lines::<HeldRound>(&scene.sandbox, &held);
    command::wait_for(&format!("{when}: a connection is held"), SOON, || {
        let last = rounds(scene)?.pop();
        ensure!(last.as_ref().is_none_or(|round| round.failure.is_none()), "{when}: {last:?}");
        Ok(last.filter(|round| round.rounds >= 3))
    })?;

    scene.sandbox.manifests().apply(POLICY_FILE, &strict(&[]))?;
    thread::sleep(pause);
    scene.sandbox.signal_agent(Node::B, Signal::SIGKILL)?;
    if round % 2 == 1 {
        // Its successor is killed as well, the later the rounds the further it comes.
        scene.start_agent(Node::B)?;
        thread::sleep(Duration::from_millis(150 * round as u64));
        scene.sandbox.signal_agent(Node::B, Signal::SIGKILL)?;
    }
    scene.start_agent(Node::B)?;
    scene.sandbox.wait_ready(Node::B)?;
    for _ in 0..10 {
        scene.expect_refused("test/outsider", "default/far", OTHER, &closed, &when)?;
    }
    scene.expect_unreadable(&closed, &when)?;
    command::wait_for(&format!("{when}: the connection of before is closed"), SOON, || {
        Ok(rounds(scene)?.pop().filter(|round| round.failure.is_some()))
    })?;
    scene.expect_closed(&when)
}

/// A pod that is younger than its node's agent, and connects before anybody has told its address; and a source that goes away
/// as a whole or in part: what was valid stays in force ([D.3], [D.4], [C.6], [C.11], [E.5]).
#[test]
fn what_the_source_does_not_say_opens_nothing() -> Result<()> {
    let mut scene = Scene::new("gap-source")?;

    // The API server has the pods, and their containers run, before it knows their addresses.
    let offset = scene.log_end(Node::A)?;
    for name in ["newcomer", "late"] {
        let namespace = if name == "late" { "default" } else { "test" };
        scene.sandbox.place_pod(PodPlan::new(Node::A, namespace, name))?;
        let about = format!("{namespace}/{name}");
        scene.wait_told(Node::A, offset, &[("message", "refused until its addresses are known"), ("pod", &about)])?;
    }
    scene.sandbox.start_in_pod("late-http", "default/late", &["http-serve", "--name", "late", "--port=9080"])?;
    let inside = scene.sandbox.pod("default/late")?.place.clone();
    command::wait_for("the late server listens", SOON, || {
        // Not asked by a connection: it is not for this scenario to say whether the pod reaches itself meanwhile.
        let sockets = inside.inside(|| Ok(fs::read_to_string("/proc/thread-self/net/tcp6")?))?;
        let listens = |line: &str| {
            let mut words = line.split_whitespace().skip(1);
            words.next().is_some_and(|local| local.ends_with(&format!(":{HTTP:04X}"))) && words.nth(1) == Some("0A")
        };
        Ok(sockets.lines().any(listens).then_some(()))
    })?;
    for server in ["default/far", "default/near", "default/legacy"] {
        // `legacy` is outside the mesh, and still it is not for a pod whose policy nobody knows to call it.
        scene.expect_refused("test/newcomer", server, HTTP, MESH, "without an address")?;
        scene.expect_refused("default/late", server, HTTP, MESH, "without an address")?;
    }
    for from in ["test/client", "test/outsider", "test/newcomer"] {
        scene.expect_refused(from, "default/late", HTTP, FORBIDDEN, "without an address")?;
    }
    // With `enrolment-pending`; with `unknown-address` where the agent has looked before the pod's network was made.
    let late = scene.at("default/late", HTTP)?.to_string();
    scene.wait_told(
        Node::A,
        offset,
        &[("message", "connection failed"), ("direction", "inbound"), ("dst.addr", &late)],
    )?;
    scene.call_on("test/newcomer", "default/far", MESH, true)?;
    scene.call_on("test/client", "default/late", MESH, true)?;
    scene.call_on("test/outsider", "default/late", FORBIDDEN, false)?;
    scene.expect_closed("without an address")?;
    for pod in ["test/newcomer", "default/late"] {
        scene.sandbox.announce_pod(pod)?;
    }
    scene.expect_whole("with its address")?;
    scene.wait_answered("test/newcomer", "default/legacy", HTTP, "newcomer-to-legacy", "with its address")?;
    scene.expect_readable("newcomer-to-legacy", "out of the mesh")?;

    // The folder is gone; an empty one is in its place; a file cannot be read.
    let (folder, away) = (scene.sandbox.manifests().path().to_owned(), scene.sandbox.dir().join("manifests-away"));
    let offset = scene.log_end(Node::B)?;
    fs::rename(&folder, &away)?;
    scene.wait_told(Node::B, offset, &[("message", "create it again")])?;
    scene.expect_whole("without a folder")?;
    fs::create_dir(&folder)?;
    scene.wait_told(Node::B, offset, &[("message", "without a manifest in it")])?;
    scene.expect_whole("with an empty folder")?;
    fs::remove_dir(&folder)?;
    fs::rename(&away, &folder)?;
    let offset = scene.log_end(Node::B)?;
    let (circle, link) = (scene.sandbox.dir().join("circle"), scene.sandbox.dir().join("link"));
    symlink("circle", &circle)?;
    symlink("../circle", &link)?;
    fs::rename(&link, folder.join(POLICY_FILE))?;
    scene.wait_told(Node::B, offset, &[("message", "what this file gave before stays in force")])?;
    scene.expect_whole("with a file that cannot be read")?;
    scene.sandbox.manifests().apply(POLICY_FILE, &strict(&[]))?;

    // A pod that runs has no manifest any more: it is what it was, and nobody calls it without one.
    let file = "pod-default-far.yaml";
    let manifest = fs::read_to_string(folder.join(file))?;
    scene.sandbox.manifests().delete(file)?;
    scene.wait_refused("test/client", "default/far", HTTP, MESH, "without a manifest")?;
    for _ in 0..5 {
        scene.expect_refused("test/outsider", "default/far", HTTP, FORBIDDEN, "without a manifest")?;
        scene.expect_refused("test/client", "default/far", HTTP, MESH, "without a manifest")?;
    }
    scene.expect_closed("without a manifest")?;
    scene.sandbox.manifests().apply(file, &manifest)?;
    scene.expect_whole("with its manifest again")?;

    // The control: the folder is followed, and the same recordings show what may be read.
    scene.sandbox.manifests().apply(POLICY_FILE, &strict(&[OTHER]))?;
    scene.wait_answered("test/outsider", "default/far", OTHER, "outsider-to-far", "opened")?;
    scene.expect_readable("outsider-to-far", "opened")?;
    scene.expect_closed("at the end")
}

/// A manifest that is broken while an agent starts may be the one that forbids: until it can be read, nobody is served
/// ([D.2]); a file that breaks later takes nothing away ([C.11]).
#[test]
fn manifests_that_cannot_be_read_at_the_start_open_nothing() -> Result<()> {
    const BROKEN: &str = "kind: [";
    let mut scene = Scene::new("gap-unread")?;
    let folder = scene.sandbox.manifests().path().to_owned();
    for file in [POLICY_FILE, "namespaces.yaml"] {
        let right = fs::read_to_string(folder.join(file))?;
        let offset = scene.log_end(Node::B)?;
        scene.sandbox.manifests().apply(file, BROKEN)?;
        scene.wait_told(Node::B, offset, &[("message", "what this file gave before stays in force")])?;
        scene.expect_whole(&format!("{file} has broken"))?;

        let offset = scene.log_end(Node::B)?;
        scene.sandbox.signal_agent(Node::B, Signal::SIGKILL)?;
        scene.start_agent(Node::B)?;
        scene.wait_told(Node::B, offset, &[("message", "what it says is not known"), ("unread", file)])?;
        let started = Instant::now();
        let when = format!("started without {file}");
        while started.elapsed() < Duration::from_secs(5) {
            scene.expect_refused("test/outsider", "default/far", HTTP, FORBIDDEN, &when)?;
            scene.expect_refused("default/far", "default/near", HTTP, MESH, &when)?;
            // Its own agent goes on trying for a while.
            let got = scene.call("test/client", "default/far", HTTP, MESH)?;
            ensure!(got.status.is_none(), "{when}: {got:?}");
            thread::sleep(Duration::from_millis(100));
        }
        scene.expect_closed(&when)?;
        let ready = SocketAddr::new(Node::B.v4().into(), 15021).to_string();
        let asked = ["http-get", "--to", &ready, "--path", "/healthz/ready", "--timeout-ms", "2000"];
        let got: HttpResult = scene.sandbox.call_on_node(Node::B, &asked)?;
        ensure!(got.status == Some(503), "{when}: {got:?}");

        scene.sandbox.manifests().apply(file, &right)?;
        scene.sandbox.wait_ready(Node::B)?;
        scene.expect_whole(&format!("{file} is mended"))?;
    }
    Ok(())
}

/// A process that may open nothing more; what it has open stays. Dropping this gives it back what it had.
struct Starved {
    pid: i32,
    before: libc::rlimit,
}

impl Starved {
    /// Fewer than any agent has.
    const MOST: libc::rlim_t = 8;

    fn new(pid: u32) -> Result<Self> {
        let pid = i32::try_from(pid)?;
        let mut before = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        let now = |before: &libc::rlimit| libc::rlimit { rlim_cur: Self::MOST, ..*before };
        // SAFETY: the old limit is written to a live value; none is set.
        if unsafe { libc::prlimit(pid, libc::RLIMIT_NOFILE, std::ptr::null(), &raw mut before) } != 0 {
            bail!("prlimit: {}", std::io::Error::last_os_error());
        }
        set_limit(pid, &now(&before))?;
        Ok(Self { pid, before })
    }
}

impl Drop for Starved {
    fn drop(&mut self) {
        // The process may have ended.
        let _ = set_limit(self.pid, &self.before);
    }
}

fn set_limit(pid: i32, limit: &libc::rlimit) -> Result<()> {
    // SAFETY: the new limit is read from a live value, and the old one is not asked for.
    match unsafe { libc::prlimit(pid, libc::RLIMIT_NOFILE, limit, std::ptr::null_mut()) } {
        0 => Ok(()),
        _ => bail!("prlimit: {}", std::io::Error::last_os_error()),
    }
}

/// Agents that have no descriptor left, and a policy that does not fit into the kernel's map: what is in force stays so, what is
/// new comes into force as soon as it can, and both are told.
#[test]
fn what_an_agent_cannot_hold_opens_nothing() -> Result<()> {
    let mut scene = Scene::new("gap-capacity")?;
    scene.sandbox.manifests().apply(POLICY_FILE, &strict(&[OTHER]))?;
    scene.wait_answered("test/outsider", "default/far", OTHER, "before-the-limit", "opened")?;
    scene.expect_readable("before-the-limit", "opened")?;

    // Out of descriptors: nothing can be accepted, connected or read.
    let offset = scene.log_end(Node::B)?;
    let starve = |node| Starved::new(scene.sandbox.pid(&agent_process(node))?);
    let starved = [starve(Node::A)?, starve(Node::B)?];
    for _ in 0..2 {
        let got = scene.call("test/client", "default/far", HTTP, MESH)?;
        ensure!(got.status.is_none(), "without a descriptor: {got:?}");
        scene.expect_refused("test/outsider", "default/far", HTTP, FORBIDDEN, "without a descriptor")?;
    }
    scene.wait_told(Node::A, 0, &[("message", "accept failed"), ("error", "Too many open files")])?;
    scene.sandbox.manifests().apply(POLICY_FILE, &strict(&[]))?;
    let told = scene.wait_told(Node::B, offset, &[("message", "Too many open files"), ("message", "stay")])?;
    ensure!(told.message().contains("in force"), "{told:?}");
    scene.expect_closed("without a descriptor")?;
    drop(starved);
    // Nobody has touched the file since.
    scene.wait_refused("test/outsider", "default/far", OTHER, "until-it-is-read", "with descriptors again")?;
    scene.expect_refused("test/outsider", "default/far", OTHER, "after-it-was-read", "with descriptors again")?;
    scene.expect_unreadable("after-it-was-read", "with descriptors again")?;
    scene.expect_whole("with descriptors again")?;

    // Too large: more blocks than the agent puts into one table. What it has to judge is connected by then, so what a client
    // outside the mesh sends can be read, but no answer. The mode is the kernel's as before.
    scene.stop_calling("test/outsider", "default/far")?;
    let outsider = scene.sandbox.pod("test/outsider")?.v4;
    let large = |blocks: u32, denied: &str| {
        let mut text = strict(&[OTHER, EXCHANGE]);
        text.push_str(
            "---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: far, namespace: default}\n\
             spec:\n  selector: {matchLabels: {app: far}}\n  action: DENY\n  rules:\n",
        );
        let elsewhere = u32::from(Ipv4Addr::new(100, 64, 0, 0));
        let all = (0..blocks).map(|n| Ipv4Addr::from(elsewhere + 2 * n).to_string()).chain([denied.to_owned()]);
        let all: Vec<String> = all.map(|block| format!("\"{block}\"")).collect();
        // Writing to a String does not fail.
        let _ = writeln!(
            text,
            "  - to: [{{operation: {{ports: [\"{OTHER}\"]}}}}]\n    from: [{{source: {{ipBlocks: [{}]}}}}]",
            all.join(", ")
        );
        text
    };
    let answer = |marker: &str| format!("\"marker\":\"{marker}\"");
    scene.sandbox.manifests().apply(POLICY_FILE, &large(1000, "100.127.0.1"))?;
    scene.wait_answered("test/outsider", "default/far", OTHER, "large-and-open", "by a large policy")?;
    scene.expect_readable(&answer("large-and-open"), "by a large policy")?;
    scene.expect_refused("test/outsider", "default/far", HTTP, "by-the-kernel", "by a large policy")?;
    let offset = scene.log_end(Node::B)?;
    scene.sandbox.manifests().apply(POLICY_FILE, &large(5000, &outsider.to_string()))?;
    let when = "by a policy that is too large";
    scene.wait_told(Node::B, offset, &[("message", "do not fit into the kernel")])?;
    scene.wait_refused("test/outsider", "default/far", OTHER, "until-it-is-closed", when)?;
    for _ in 0..5 {
        scene.expect_refused("test/outsider", "default/far", OTHER, "by-the-agent", when)?;
        scene.expect_refused("test/outsider", "default/far", HTTP, "by-the-kernel", when)?;
    }
    scene.expect_unreadable(&answer("by-the-agent"), when)?;
    scene.expect_unreadable("by-the-kernel", when)?;
    scene.wait_told(Node::B, offset, &[("reason", "explicit-deny"), ("direction", "inbound")])?;
    let echo =
        ["exchange", "--to", &scene.at("default/far", EXCHANGE)?.to_string(), "--verb", "echo"].map(str::to_owned);
    let got: ExchangeResult = scene.sandbox.call("test/outsider", &echo.each_ref().map(String::as_str))?;
    ensure!(got.failure.is_none(), "what the policy allows is carried by the agent: {got:?}");
    scene.expect_whole(when)?;

    // It fits again: the kernel decides, before anything is sent.
    scene.sandbox.manifests().apply(POLICY_FILE, &strict(&[]))?;
    command::wait_for("the kernel decides again", SOON, || {
        let got = scene.call("test/outsider", "default/far", OTHER, "by-whom")?;
        Ok((got.failure == Some(Failure::Refused)).then_some(()))
    })?;
    scene.expect_refused("test/outsider", "default/far", OTHER, "by-the-kernel-again", "at the end")?;
    scene.expect_unreadable("by-the-kernel-again", "at the end")?;
    scene.expect_whole("at the end")
}
