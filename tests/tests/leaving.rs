//! A node that is left: by `culvert node clean`, and by an agent whose DaemonSet is deleted. Pods work without the mesh then, and
//! nothing of it is on the node; a killed agent, one that is replaced, and one that cannot know leave what refuses in place.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Output;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use culvert_tests::apiserver::ApiServer;
use culvert_tests::capture::Capture;
use culvert_tests::programs::{Failure, TrickleEvent, Trickled};
use culvert_tests::sandbox::{
    Family, LogLine, MeshPlan, Node, Place, Plan, PodPlan, Sandbox, Source, agent_process, built, own_name,
};
use culvert_tests::{command, patience};
use nix::sys::signal::Signal;
use serde_json::Value;

const HTTP: u16 = 9080;
const EXCHANGE: u16 = 7000;
const CLIENT: &str = "test/client";
const FAR: &str = "default/far";
const NEAR: &str = "default/near";
/// Outside the mesh.
const OUTSIDER: &str = "test/outsider";
const FAMILIES: [Family; 2] = [Family::V4, Family::V6];
/// In every payload: readable on the link without the mesh, and never with it.
const MARKER: &str = "readable-without-the-mesh";
const SOON: Duration = Duration::from_secs(20);
/// Until an agent has heard of something: after an error it may ask again only after half a minute.
const LIMIT: Duration = Duration::from_secs(60);
const DRAIN: Duration = Duration::from_secs(6);
/// Until an agent that was told to end has asked what it must know, drained, and ended.
const END: Duration = Duration::from_secs(30);
const DAEMONSET: &str = "istio-system/culvert";

fn plan(name: &str) -> Plan {
    let exchange = format!("--port={EXCHANGE}");
    let server = |node, name: &str| {
        PodPlan::new(node, "default", name).http(&[HTTP]).program(&["exchange-serve", &exchange]).probed(HTTP)
    };
    Plan::empty(&own_name(name))
        .pod(PodPlan::new(Node::A, "test", "client"))
        .pod(server(Node::A, "near"))
        .pod(server(Node::B, "far"))
        .pod(PodPlan::new(Node::B, "test", "outsider").label("istio.io/dataplane-mode", "none").http(&[HTTP]))
}

/// What can be seen of a node that an agent might change, as the system's own tools show it.
fn seen(sandbox: &Sandbox, node: Node) -> Result<BTreeMap<String, String>> {
    let mut seen = BTreeMap::new();
    let places: Vec<(String, Place)> = sandbox
        .pods()
        .filter(|pod| pod.plan.node == node)
        .map(|pod| (pod.plan.key(), pod.place.clone()))
        .chain([(node.to_string(), sandbox.node_place(node).clone())])
        .collect();
    for (name, place) in &places {
        for tool in [
            "tc qdisc show",
            "bpftool -j net show",
            "nft list ruleset",
            "ip -oneline link show",
            "ip -oneline address show",
            "ip route show table all",
            "ip -6 route show table all",
            "ip rule show",
        ] {
            let (program, arguments) = tool.split_once(' ').context("a program and its arguments")?;
            let mut asked = place.command(command::find(program)?)?;
            let shown = command::finish(asked.args(arguments.split(' ')), None)?;
            seen.insert(format!("{name}: {tool}"), shown);
        }
        let settings = place.inside(settings_here)?;
        seen.extend(settings.into_iter().map(|(path, value)| (format!("{name}: {}", path.display()), value)));
    }
    let cgroup = sandbox.node_cgroup(node).display().to_string();
    let attached = command::run("bpftool", &["-j", "cgroup", "tree", &cgroup])?;
    seen.insert("programs at cgroups".to_owned(), attached);
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    let ours = |line: &&str| line.contains("/sys/fs/bpf") || line.contains(&sandbox.dir().display().to_string());
    seen.insert("mounts".to_owned(), mounts.lines().filter(ours).collect::<Vec<_>>().join("\n"));
    seen.insert("pins".to_owned(), sandbox.pin_dir(node).exists().to_string());
    Ok(seen)
}

/// Every setting of the calling thread's network.
fn settings_here() -> Result<BTreeMap<PathBuf, String>> {
    let (mut all, mut folders) = (BTreeMap::new(), vec![PathBuf::from("/proc/sys/net")]);
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).with_context(|| format!("list {}", folder.display()))? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                folders.push(entry.path());
            } else {
                // Some cannot be read before they are set, and that is to stay so.
                let value = fs::read(entry.path());
                let text = value.map_or_else(|error| error.to_string(), |all| String::from_utf8_lossy(&all).into());
                all.insert(entry.path(), text);
            }
        }
    }
    // Not a setting: it counts.
    all.remove(Path::new("/proc/sys/net/netfilter/nf_conntrack_count"));
    Ok(all)
}

fn expect_as_before(sandbox: &Sandbox, node: Node, before: &BTreeMap<String, String>, objects: &Objects) -> Result<()> {
    let now = seen(sandbox, node)?;
    let all: BTreeSet<&String> = before.keys().chain(now.keys()).collect();
    let differ: Vec<String> = all
        .into_iter()
        .filter(|key| before.get(*key) != now.get(*key))
        .map(|key| format!("{key}: {:?}, now {:?}", before.get(key), now.get(key)))
        .collect();
    ensure!(differ.is_empty(), "{node} is not as before: {differ:#?}");
    objects.expect_gone()
}

/// Numbers of what agents have loaded and attached: nobody gets them again before the next boot.
#[derive(Debug, Default)]
struct Objects {
    programs: BTreeSet<u64>,
    maps: BTreeSet<u64>,
    links: BTreeSet<u64>,
}

impl Objects {
    /// Adds what an agent holds open, and what is pinned.
    fn note(&mut self, sandbox: &Sandbox, node: Node) -> Result<()> {
        let agent = sandbox.pid(&agent_process(node))?;
        for entry in fs::read_dir(format!("/proc/{agent}/fdinfo"))? {
            // A descriptor that was closed meanwhile.
            let Ok(info) = fs::read_to_string(entry?.path()) else { continue };
            for line in info.lines() {
                let Some((name, number)) = line.split_once(':') else { continue };
                let of = match name {
                    "prog_id" => &mut self.programs,
                    "map_id" => &mut self.maps,
                    "link_id" => &mut self.links,
                    _ => continue,
                };
                of.insert(number.trim().parse()?);
            }
        }
        let links = sandbox.pin_dir(node).join("links");
        for entry in fs::read_dir(&links)? {
            let path = entry?.path().display().to_string();
            let link: Value =
                serde_json::from_str(&command::run("bpftool", &["-j", "link", "show", "pinned", &path])?)?;
            self.links.insert(link["id"].as_u64().with_context(|| format!("the number of {path}: {link}"))?);
            self.programs.insert(link["prog_id"].as_u64().with_context(|| format!("the program of {path}"))?);
        }
        ensure!(
            self.programs.len() >= 10 && self.maps.len() >= 20 && self.links.len() >= 9,
            "too few to show anything: {self:?}"
        );
        Ok(())
    }

    /// Some go when the kernel's readers have.
    fn expect_gone(&self) -> Result<()> {
        let of = |kind: &str, known: &BTreeSet<u64>| -> Result<Vec<u64>> {
            let there: Value = serde_json::from_str(&command::run("bpftool", &["-j", kind, "show"])?)?;
            let ids = there.as_array().into_iter().flatten().filter_map(|one| one["id"].as_u64());
            Ok(ids.filter(|id| known.contains(id)).collect())
        };
        let mut left = String::new();
        let gone = command::wait_for("nothing of the agents is loaded or attached", SOON * patience(), || {
            let (programs, maps) = (of("prog", &self.programs)?, of("map", &self.maps)?);
            let links = of("link", &self.links)?;
            left = format!("programs {programs:?}, maps {maps:?}, links {links:?}");
            Ok((programs.is_empty() && maps.is_empty() && links.is_empty()).then_some(()))
        });
        gone.with_context(|| left)
    }
}

struct Scene {
    sandbox: Sandbox,
    mesh: MeshPlan,
    link: Capture,
}

impl Scene {
    fn call(&self, from: &str, to: &str, family: Family) -> Result<Option<Failure>> {
        let got = self.sandbox.http(from, self.sandbox.pod(to)?.at(family, HTTP), MARKER)?;
        ensure!(got.failure.is_some() || got.status == Some(200), "{from} to {to}: {got:?}");
        Ok(got.failure)
    }

    fn expect_answer(&self, from: &str, to: &str, when: &str) -> Result<()> {
        for family in FAMILIES {
            let mut last = None;
            command::wait_for(&format!("{when}: {to} answers {from} by {family:?}"), SOON * patience(), || {
                last = self.call(from, to, family)?;
                Ok(last.is_none().then_some(()))
            })
            .with_context(|| format!("the last answer: {last:?}"))?;
        }
        Ok(())
    }

    /// Pods of the mesh reach each other by tunnels.
    fn expect_mesh(&self, when: &str) -> Result<()> {
        self.expect_answer(CLIENT, FAR, when)?;
        self.expect_answer(CLIENT, NEAR, when)?;
        self.link.clear()?;
        self.expect_answer(CLIENT, FAR, when)?;
        ensure!(!self.link.contains(MARKER.as_bytes())?, "{when}: readable on the link");
        ensure!(self.link.frames_with_port(15008)? > 0, "{when}: no tunnel crossed the link");
        Ok(())
    }

    /// Everybody reaches everybody, and what is sent is readable.
    fn expect_no_mesh(&self, when: &str) -> Result<()> {
        self.link.clear()?;
        for (from, to) in [(CLIENT, FAR), (CLIENT, NEAR), (FAR, NEAR), (OUTSIDER, NEAR), (NEAR, OUTSIDER)] {
            self.expect_answer(from, to, when)?;
        }
        ensure!(self.link.contains(MARKER.as_bytes())?, "{when}: not readable on the link");
        ensure!(self.link.frames_with_port(15008)? == 0, "{when}: a tunnel crossed the link");
        Ok(())
    }

    /// The pods of node a are refused in both directions.
    fn expect_refused(&self, when: &str) -> Result<()> {
        for family in FAMILIES {
            for to in [FAR, NEAR, OUTSIDER] {
                let failure = self.call(CLIENT, to, family)?;
                ensure!(failure == Some(Failure::Refused), "{when}: {CLIENT} to {to} by {family:?}: {failure:?}");
            }
        }
        ensure!(self.sandbox.pin_dir(Node::A).join("links/connect4").exists(), "{when}: what refuses is gone");
        Ok(())
    }

    fn start(&mut self, nodes: &[Node]) -> Result<()> {
        for node in nodes {
            self.sandbox.start_agent(&self.mesh, *node)?;
        }
        for node in nodes {
            self.sandbox.wait_ready(*node)?;
        }
        Ok(())
    }

    fn clean(&self, node: Node, more: &[&str]) -> Result<Output> {
        let mut clean = self.sandbox.node_place(node).command(built("culvert")?)?;
        clean.args(["node", "clean", "--pin-dir"]).arg(self.sandbox.pin_dir(node)).args(more);
        clean.output().context("culvert node clean")
    }

    fn expect_clean(&self, node: Node, more: &[&str]) -> Result<String> {
        let output = self.clean(node, more)?;
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        println!("# culvert node clean {}\n{out}{err}", more.join(" "));
        ensure!(output.status.success() && err.is_empty(), "{}: {out}{err}", output.status);
        Ok(out.into_owned())
    }

    fn end_in_order(&mut self, node: Node) -> Result<Vec<LogLine>> {
        let from = self.sandbox.agent_log(node, 0)?.1;
        self.sandbox.signal_agent(node, Signal::SIGTERM)?;
        self.ended(node, from)
    }

    /// Waits until an agent has ended with success; gives what it has said since.
    fn ended(&mut self, node: Node, from: u64) -> Result<Vec<LogLine>> {
        let status = self.sandbox.wait_end(&agent_process(node), END * patience())?;
        let (lines, _) = self.sandbox.agent_log(node, from)?;
        ensure!(status.success(), "{node}: {status}: {lines:?}");
        Ok(lines)
    }

    /// Waits for a line that begins so, after the first `from` bytes of the log.
    fn told(&self, node: Node, from: u64, message: &str) -> Result<LogLine> {
        command::wait_for(&format!("the agent of {node} tells {message:?}"), LIMIT * patience(), || {
            let (lines, _) = self.sandbox.agent_log(node, from)?;
            Ok(lines.into_iter().find(|line| line.message().starts_with(message)))
        })
    }

    fn api(&self) -> Result<&ApiServer> {
        self.sandbox.manifests().api().context("the sandbox has an API server")
    }
}

/// `culvert node clean`, on nodes whose agents were killed: what refused is gone, with everything else. Not while an agent serves.
#[test]
fn a_node_is_cleaned_without_an_agent_and_without_a_cluster() -> Result<()> {
    let mesh = MeshPlan::new(built("culvert")?);
    let mut sandbox = Sandbox::build(plan("leave-clean"))?;
    sandbox.start_ca(&mesh)?;
    let link = sandbox.capture()?;
    let mut scene = Scene { sandbox, mesh, link };
    scene.expect_no_mesh("before")?;
    let before = [seen(&scene.sandbox, Node::A)?, seen(&scene.sandbox, Node::B)?];
    scene.start(&Node::ALL)?;
    scene.expect_mesh("with agents")?;
    let mut objects = Objects::default();
    for node in Node::ALL {
        objects.note(&scene.sandbox, node)?;
    }
    ensure!(seen(&scene.sandbox, Node::A)? != before[0], "nothing of an agent is seen, or this test shows nothing");

    // Not while an agent serves: it is named, and goes on.
    let refused = scene.clean(Node::A, &[])?;
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    println!("{said}");
    let pid = scene.sandbox.pid(&agent_process(Node::A))?;
    ensure!(refused.status.code() == Some(1) && refused.stdout.is_empty(), "{refused:?}");
    ensure!(
        said.contains(&format!("an agent serves this node (process {pid})")) && said.lines().count() == 1,
        "{said}"
    );
    ensure!(said.contains("nothing was removed") && said.contains("--force"), "{said}");
    scene.expect_mesh("after a refusal")?;

    // Killed: refused, until the node is cleaned.
    for node in Node::ALL {
        scene.sandbox.signal_agent(node, Signal::SIGKILL)?;
    }
    scene.expect_refused("without an agent")?;
    for (node, before) in Node::ALL.into_iter().zip(&before) {
        let said = scene.expect_clean(node, &[])?;
        for what in
            ["took connect4 off cgroup ", "took inbound_", "took leaving_", "took gate_in_", " maps of layout v"]
        {
            ensure!(said.contains(what), "{what:?} in {said}");
        }
        expect_as_before(&scene.sandbox, node, before, &Objects::default())?;
    }
    objects.expect_gone()?;
    scene.expect_no_mesh("after the clean")?;
    ensure!(scene.expect_clean(Node::A, &[])?.contains("nothing to remove"));

    // By force an agent that serves drains and ends, as if another one had taken over.
    scene.start(&Node::ALL)?;
    scene.expect_mesh("with agents again")?;
    for node in Node::ALL {
        let from = scene.sandbox.agent_log(node, 0)?.1;
        let said = scene.expect_clean(node, &["--force"])?;
        ensure!(said.starts_with("an agent serves this node (process "), "{said}");
        let lines = scene.ended(node, from)?;
        ensure!(lines.iter().any(|line| line.message().starts_with("another agent has taken over")), "{lines:?}");
    }
    for (node, before) in Node::ALL.into_iter().zip(&before) {
        expect_as_before(&scene.sandbox, node, before, &Objects::default())?;
    }
    scene.expect_no_mesh("after the clean by force")
}

fn daemonset() -> String {
    let (namespace, name) = DAEMONSET.split_once('/').unwrap_or_default();
    format!(
        "apiVersion: apps/v1\nkind: DaemonSet\nmetadata: {{namespace: {namespace}, name: {name}}}\nspec:\n  \
         selector: {{matchLabels: {{app: culvert}}}}\n  template:\n    metadata: {{labels: {{app: culvert}}}}\n    \
         spec: {{containers: [{{name: agent, image: culvert}}]}}\n"
    )
}

fn deleted(api: &ApiServer, cascade: &str) -> Result<()> {
    let cascade = format!("--cascade={cascade}");
    api.kubectl(&["delete", "daemonset", "culvert", "-n", "istio-system", &cascade, "--wait=false"]).map(drop)
}

/// An agent that is told to end leaves what refuses, unless it knows that its DaemonSet is deleted: then it takes its pods out of
/// the mesh, lets what is open go on until the deadline, and nothing is left.
#[test]
fn a_node_is_left_only_with_its_daemonset() -> Result<()> {
    let mut mesh = MeshPlan::new(built("culvert")?);
    let drain = format!("{}s", DRAIN.as_secs());
    mesh.agent_arguments = ["--daemonset", DAEMONSET, "--drain-deadline", &drain].map(str::to_owned).to_vec();
    let mut sandbox = Sandbox::build(plan("leave-daemonset").source(Source::Api))?;
    sandbox.start_ca(&mesh)?;
    let link = sandbox.capture()?;
    let mut scene = Scene { sandbox, mesh, link };
    scene.api()?.apply(&daemonset())?;
    let before = [seen(&scene.sandbox, Node::A)?, seen(&scene.sandbox, Node::B)?];
    scene.start(&Node::ALL)?;
    scene.expect_mesh("with agents")?;
    scene.told(Node::A, 0, "this agent is of this DaemonSet")?;

    // It is there.
    let lines = scene.end_in_order(Node::A)?;
    ensure!(lines.iter().any(|line| line.message().starts_with("the DaemonSet is there")), "{lines:?}");
    scene.expect_refused("its DaemonSet is there")?;
    scene.start(&[Node::A])?;

    // It was made anew.
    deleted(scene.api()?, "background")?;
    scene.told(Node::A, 0, "the DaemonSet is deleted")?;
    scene.api()?.apply(&daemonset())?;
    scene.told(Node::A, 0, "the DaemonSet was made anew")?;
    let lines = scene.end_in_order(Node::A)?;
    ensure!(lines.iter().any(|line| line.message().starts_with("the DaemonSet is there")), "{lines:?}");
    scene.expect_refused("its DaemonSet was made anew")?;
    scene.start(&[Node::A])?;

    // Nobody can be asked.
    scene.api()?.kill()?;
    let lines = scene.end_in_order(Node::A)?;
    let error = lines.iter().find(|line| line.message().starts_with("whether the DaemonSet is deleted is not known"));
    let error = error.with_context(|| format!("{lines:?}"))?;
    let remedy = format!("culvert node clean --pin-dir {}", scene.sandbox.pin_dir(Node::A).display());
    ensure!(error.field("level").as_deref() == Some("ERROR") && error.message().contains(&remedy), "{error:?}");
    scene.expect_refused("the API server is away")?;
    scene.api()?.start_again()?;
    scene.start(&[Node::A])?;
    scene.expect_mesh("with all agents")?;

    // It is deleted, and with it, as by `helm uninstall`, the right to ask for it. What is open goes on.
    let mut objects = Objects::default();
    for node in Node::ALL {
        objects.note(&scene.sandbox, node)?;
    }
    let annotations = |scene: &Scene| -> Result<String> {
        let path = r"jsonpath={.items[*].metadata.annotations.ambient\.istio\.io/redirection}";
        scene.api()?.kubectl(&["get", "pods", "--all-namespaces", "--output", path])
    };
    command::wait_for("pods are annotated", SOON * patience(), || {
        Ok((annotations(&scene)? == "enabled enabled enabled").then_some(()))
    })?;
    let to: SocketAddr = scene.sandbox.pod(FAR)?.at(Family::V4, EXCHANGE);
    let arguments = ["trickle", "--to", &to.to_string(), "--marker", "kept", "--timeout-ms", "5000"];
    scene.sandbox.start_in_pod("kept", CLIENT, &arguments)?;
    let events = |scene: &Scene| -> Result<Vec<TrickleEvent>> {
        let text = fs::read_to_string(scene.sandbox.log_path("kept"))?;
        let whole = &text[..text.rfind('\n').map_or(0, |at| at + 1)];
        whole.lines().map(|line| Ok(serde_json::from_str(line)?)).collect()
    };
    command::wait_for("a connection is open", SOON * patience(), || Ok((events(&scene)?.len() > 3).then_some(())))?;
    let from = [scene.sandbox.agent_log(Node::A, 0)?.1, scene.sandbox.agent_log(Node::B, 0)?.1];
    deleted(scene.api()?, "foreground")?;
    for (node, from) in Node::ALL.into_iter().zip(from) {
        scene.told(node, from, "the DaemonSet is deleted")?;
    }
    scene.expect_mesh("deleted, and not told to end")?;
    scene.api()?.kubectl(&["delete", "rolebinding", "culvert-agent", "-n", "istio-system"])?;
    let from = [scene.sandbox.agent_log(Node::A, 0)?.1, scene.sandbox.agent_log(Node::B, 0)?.1];
    for node in Node::ALL {
        scene.sandbox.signal_agent(node, Signal::SIGTERM)?;
    }
    for (node, from) in Node::ALL.into_iter().zip(from) {
        scene.told(node, from, "leaving the node")?;
    }
    // At once, and not when the drain is over.
    command::wait_for("new connections pass by the mesh", DRAIN / 2, || {
        Ok(scene.call(CLIENT, FAR, Family::V4)?.is_none().then_some(()))
    })?;
    let lost = events(&scene)?.into_iter().find(|event| event.what != Trickled::Echoed);
    ensure!(lost.is_none(), "what was open goes on until the deadline: {lost:?}");
    scene.link.clear()?;
    scene.expect_answer(CLIENT, FAR, "while it drains")?;
    scene.expect_answer(OUTSIDER, NEAR, "while it drains")?;
    ensure!(scene.link.contains(MARKER.as_bytes())?, "while it drains: not readable on the link");
    for (node, from) in Node::ALL.into_iter().zip(from) {
        let lines = scene.ended(node, from)?;
        ensure!(lines.iter().any(|line| line.message().starts_with("nothing of the mesh is left")), "{lines:?}");
        ensure!(!lines.iter().any(|line| line.field("level").as_deref() == Some("ERROR")), "{lines:?}");
    }
    let seen_at_end = events(&scene)?.len();
    command::wait_for("it was opened again", SOON * patience(), || {
        Ok((events(&scene)?.len() > seen_at_end + 3).then_some(()))
    })?;
    let failed: Vec<TrickleEvent> =
        events(&scene)?.into_iter().filter(|event| event.what != Trickled::Echoed).collect();
    ensure!(failed.len() == 1 && failed[0].what == Trickled::Lost, "cut once, at the deadline: {failed:?}");
    for (node, before) in Node::ALL.into_iter().zip(&before) {
        expect_as_before(&scene.sandbox, node, before, &Objects::default())?;
    }
    objects.expect_gone()?;
    scene.expect_no_mesh("after they have left")?;
    ensure!(annotations(&scene)?.is_empty(), "{}", annotations(&scene)?);
    Ok(())
}
