//! Agents are updated, deleted and killed, nodes and their daemons restarted, and the mesh is removed: what pods notice of it, and
//! what never crosses the link readably.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use culvert_tests::command;
use culvert_tests::kind::NodeInfo;
use culvert_tests::kind::stage::{POD_IMAGE, SYSTEM, Scene};
use culvert_tests::programs::PacedResult;
use culvert_tests::sandbox::Node;
use culvert_tests::tour::Stage as _;
use serde_json::Value;

use crate::support::{self, Agent, Load, LoadPlan, SOON, agent, agent_with, agents};

const LIFE: &str = "life";
/// An exchange server, and a server of HTTP that the kubelet probes; STRICT.
const SERVER: &str = "life/server";
const PORT: u16 = 7000;
const HTTP: u16 = 8080;
/// What a client of the load sends first, each time.
const READABLE: &[u8] = b"ECHO\nhello\n";
/// How long a connection lives that is to see an agent follow another.
const LONG: Duration = Duration::from_secs(12);

/// A server that is STRICT, on the worker, with probes of which none may fail.
fn with_server(scene: &mut Scene, scenario: impl FnOnce(&mut Scene, SocketAddr) -> Result<()>) -> Result<()> {
    support::in_namespace(scene, LIFE, |scene| {
        let node = &scene.node(Node::B)?.name;
        let container = |name: &str, words: &str, port: u16, probes: &str| {
            format!(
                "  - name: {name}\n    image: {POD_IMAGE}\n    imagePullPolicy: Never\n    args: [{words}, --port={port}]\n{probes}"
            )
        };
        let probe =
            format!("{{httpGet: {{path: /, port: {HTTP}}}, periodSeconds: 1, timeoutSeconds: 5, failureThreshold: 1}}");
        let objects = format!(
            "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {{namespace: {LIFE}, name: strict}}\n\
             spec: {{mtls: {{mode: STRICT}}}}\n---\n\
             apiVersion: v1\nkind: Service\nmetadata: {{namespace: {LIFE}, name: server}}\nspec:\n  selector: {{app: server}}\n  \
             ports: [{{name: tcp-exchange, port: {PORT}}}, {{name: http, port: {HTTP}}}]\n---\n\
             apiVersion: v1\nkind: Pod\nmetadata: {{namespace: {LIFE}, name: server, labels: {{app: server}}}}\nspec:\n  \
             terminationGracePeriodSeconds: 1\n  nodeSelector: {{kubernetes.io/hostname: {node}}}\n  containers:\n{}{}",
            container("exchange", "exchange-serve", PORT, ""),
            container("http", "http-serve, --name=server", HTTP, &format!("    readinessProbe: {probe}\n")),
        );
        scene.cluster.kubectl_with(&["create", "--filename", "-"], &objects)?;
        support::enrolled(scene, LIFE, "server")?;
        command::wait_for("the server is ready", SOON, || Ok(is_ready(scene)?.then_some(())))?;
        let address = scene.cluster_ip(SERVER)?;
        let http = SocketAddr::new(address, HTTP);
        command::wait_for("plaintext is refused", SOON, || {
            Ok(scene.call("test/legacy-app", http, "").ok().filter(|got| got.failure.is_some()))
        })?;
        scenario(scene, SocketAddr::new(address, PORT))
    })
}

fn server(scene: &Scene) -> Result<Value> {
    scene.cluster.get(&["pod", "--namespace", LIFE, "server"])
}

fn ready_condition(pod: &Value) -> Option<&Value> {
    pod["status"]["conditions"].as_array()?.iter().find(|condition| condition["type"] == "Ready")
}

fn is_ready(scene: &Scene) -> Result<bool> {
    Ok(ready_condition(&server(scene)?).is_some_and(|condition| condition["status"] == "True"))
}

/// Since when the server is ready, and how often its containers were started again: a probe that failed would change one of them.
fn probes(scene: &Scene) -> Result<(Value, Vec<Value>)> {
    let pod = server(scene)?;
    let since = ready_condition(&pod).filter(|condition| condition["status"] == "True");
    let since = since.context("the server is not ready")?["lastTransitionTime"].clone();
    let containers = pod["status"]["containerStatuses"].as_array().context("the server's containers")?;
    Ok((since, containers.iter().map(|container| container["restartCount"].clone()).collect()))
}

/// New connections a second.
fn rate() -> u32 {
    if culvert_tests::full() { 500 } else { 100 }
}

/// Load of a pod of the mesh on the other node.
fn meshed(scene: &Scene, name: &'static str, to: SocketAddr, rate: u32, live: Duration) -> Result<Load> {
    Load::begin(scene, &LoadPlan { namespace: LIFE, name, node: Node::A, to, rate, live, meshed: true })
}

/// Load of a pod outside the mesh, there too.
fn plain(scene: &Scene, to: SocketAddr) -> Result<Load> {
    let (live, rate) = (Duration::ZERO, 20);
    Load::begin(scene, &LoadPlan { namespace: LIFE, name: "plain", node: Node::A, to, rate, live, meshed: false })
}

fn all_well(what: &str, load: &PacedResult, least: u64) -> Result<()> {
    ensure!(load.errors.is_empty() && load.ok >= least, "{what}: {load:?}");
    Ok(())
}

/// Every connection was refused, as STRICT does with plaintext.
fn all_refused(load: &PacedResult) -> Result<()> {
    let refused = |kind: &String| matches!(kind.as_str(), "refused" | "reset");
    ensure!(load.ok == 0 && !load.failures.is_empty() && load.failures.keys().all(refused), "plaintext: {load:?}");
    Ok(())
}

/// Connections of a few seconds, all of which succeed.
fn serves(scene: &Scene, to: SocketAddr) -> Result<()> {
    let load = meshed(scene, "after", to, 20, Duration::ZERO)?;
    std::thread::sleep(Duration::from_secs(2));
    all_well("afterwards", &load.end(scene)?, 20)
}

/// `kubectl rollout restart`: connections that begin meanwhile succeed, and those that are open end in order, since the agents that
/// are followed drain.
pub(crate) fn update(scene: &mut Scene) -> Result<()> {
    with_server(scene, |scene, to| {
        let (short, long) = (meshed(scene, "short", to, rate(), Duration::ZERO)?, meshed(scene, "long", to, 4, LONG)?);
        let before: BTreeSet<String> = agents(scene)?.into_iter().map(|agent| agent.uid).collect();
        scene.cluster.kubectl(&["rollout", "restart", "--namespace", SYSTEM, "daemonset/culvert"])?;
        scene.rolled_out()?;
        // What the last of them has open goes on for longer than the rollout looks.
        let drain: Vec<Agent> = agents(scene)?.into_iter().filter(|agent| before.contains(&agent.uid)).collect();
        ensure!(!drain.is_empty(), "no agent drains, so no connection outlived one");
        let (short, long) = (short.end(scene)?, long.end(scene)?);
        for node in [Node::A, Node::B] {
            agent_with(scene, node, "that followed", |agent| !before.contains(&agent.uid))?;
        }
        all_well("short connections", &short, 500)?;
        all_well("connections that outlive an agent", &long, 10)?;
        culvert_tests::record(&format!(
            "update of the DaemonSet: {} new connections at {}/s, and {} of {} s, none failed",
            short.ok,
            rate(),
            long.ok,
            LONG.as_secs()
        ))?;
        serves(scene, to)
    })
}

/// An agent is deleted on the server's node, and another one killed on the client's: until the next one serves there are refusals
/// and nothing readable, and then everything is as before.
pub(crate) fn gap(scene: &mut Scene) -> Result<()> {
    with_server(scene, |scene, to| {
        let server = scene.node(Node::B)?.name.clone();
        for node in [Node::B, Node::A] {
            let (short, plain) = (meshed(scene, "short", to, 100, Duration::ZERO)?, plain(scene, to)?);
            let capture = scene.cluster.capture(&server)?;
            let old = agent(scene, node)?;
            if node == Node::B {
                scene.cluster.kubectl(&["delete", "pod", "--namespace", SYSTEM, &old.name])?;
                agent_with(scene, node, "that was made anew", |agent| agent.uid != old.uid)?;
            } else {
                support::kill_container(scene, node, &old.container)?;
                agent_with(scene, node, "that was started again", |agent| agent.restarts > old.restarts)?;
            }
            let (short, plain) = (short.end(scene)?, plain.end(scene)?);
            ensure!(!capture.contains(READABLE)?, "the load was readable on the link while {node:?} had no agent");
            all_refused(&plain)?;
            let refused = |kind: &String| matches!(kind.as_str(), "refused" | "reset");
            ensure!(short.ok > 0 && short.failures.keys().all(refused), "{node:?}: {short:?}");
            // The one that is deleted gives its place to the next one, if that comes while it ends.
            ensure!(
                node == Node::B || !short.failures.is_empty(),
                "no connection began while no agent served: {short:?}"
            );
            serves(scene, to)?;
        }
        Ok(())
    })
}

/// `systemctl restart` of containerd and the kubelet: pods, their traffic and their probes go on. The kubelet's control group is
/// another one then, and it is still known by it.
pub(crate) fn daemons(scene: &mut Scene) -> Result<()> {
    with_server(scene, |scene, to| {
        let (short, plain) = (meshed(scene, "short", to, 100, Duration::ZERO)?, plain(scene, to)?);
        let (before, held) = (probes(scene)?, agents(scene)?);
        for daemon in ["containerd", "kubelet"] {
            for node in [Node::B, Node::A] {
                let node = scene.node(node)?.name.clone();
                scene.cluster.on_node(&node, &["systemctl", "restart", daemon], None)?;
            }
            // Several rounds of probes, each of which would count.
            std::thread::sleep(Duration::from_secs(5));
            command::wait_for("nodes are ready", SOON, || {
                let ready = scene.cluster.kubectl(&["wait", "--for=condition=Ready", "nodes", "--all", "--timeout=1s"]);
                Ok(ready.ok())
            })?;
            ensure!(probes(scene)? == before, "after a restart of {daemon} the server was probed in vain: {before:?}");
        }
        let (short, plain) = (short.end(scene)?, plain.end(scene)?);
        all_well("short connections", &short, 500)?;
        all_refused(&plain)?;
        let known = |agents: &[Agent]| -> BTreeMap<String, u64> {
            agents.iter().map(|agent| (agent.uid.clone(), agent.restarts)).collect()
        };
        ensure!(known(&agents(scene)?) == known(&held), "agents were started again: {:?}", agents(scene)?);
        serves(scene, to)
    })
}

/// The server's node is killed and started again, with the control groups of its former pods still there: its pods come back, the
/// mesh too, and from then on plaintext is refused.
pub(crate) fn node(scene: &mut Scene) -> Result<()> {
    with_server(scene, |scene, to| {
        let (name, old) = (scene.node(Node::B)?.name.clone(), agent(scene, Node::B)?);
        let restarts = |pod: &Value| pod["status"]["containerStatuses"][0]["restartCount"].as_u64().unwrap_or_default();
        let plain = plain(scene, to)?;
        scene.cluster.podman(&["kill", &name])?;
        scene.cluster.podman(&["start", &name])?;
        scene.cluster.connect_again()?;
        scene.look_again()?;
        command::wait_for("the node's pods were started again", SOON, || {
            Ok((restarts(&server(scene)?) > 0).then_some(()))
        })?;
        // After a start like this, kube-proxy 1.36.3 makes its map of Services anew and fills in only those that change later;
        // `nft monitor` shows it. A new one has all.
        let on = format!("--field-selector=spec.nodeName={name}");
        scene.cluster.kubectl(&["delete", "pod", "--namespace=kube-system", "--selector=k8s-app=kube-proxy", &on])?;
        agent_with(scene, Node::B, "of the node that was started again", |agent| {
            agent.uid != old.uid || agent.restarts > old.restarts
        })?;
        command::wait_for("the server is ready again", SOON, || Ok(is_ready(scene)?.then_some(())))?;
        scene.rolled_out()?;
        let http = SocketAddr::new(to.ip(), HTTP);
        command::wait_for("the server is reached by a tunnel again", SOON, || {
            Ok(scene.call("test/nginx", http, "").ok().filter(|got| got.status == Some(200)))
        })?;
        // After a boot nothing is pinned: the first agent brings the gate.
        let before = plain.end(scene)?;
        serves(scene, to)?;
        let plain = self::plain(scene, to)?;
        std::thread::sleep(Duration::from_secs(2));
        all_refused(&plain.end(scene)?)?;
        culvert_tests::record(&format!(
            "a node that was killed: {} connections in plaintext got through to a STRICT pod before its first agent, none after it",
            before.ok
        ))
    })
}

/// `kubectl delete daemonset`: pods go on in plaintext without a restart, nothing is left on any node, and installed again the mesh
/// has them again.
pub(crate) fn leave(scene: &mut Scene) -> Result<()> {
    left(scene, |scene| scene.cluster.kubectl(&["delete", "daemonset", "--namespace", SYSTEM, "culvert"]).map(drop))
}

/// The same with everything deleted at once: the agents' rights and `culvert control` go with them.
pub(crate) fn remove(scene: &mut Scene) -> Result<()> {
    left(scene, Scene::uninstall)
}

fn left(scene: &mut Scene, delete: fn(&Scene) -> Result<()>) -> Result<()> {
    with_server(scene, |scene, to| {
        let restarted = probes(scene)?.1;
        for node in [Node::A, Node::B] {
            let traces = traces(scene.node(node)?)?;
            ensure!(traces.len() >= 3, "no traces of the mesh are found while it is there: {traces:?}");
        }
        delete(scene)?;
        command::wait_for("the agents have ended", SOON, || Ok(agents(scene)?.is_empty().then_some(())))?;
        for node in [Node::A, Node::B] {
            let traces = traces(scene.node(node)?)?;
            ensure!(traces.is_empty(), "left on a node: {traces:?}");
        }
        let capture = scene.capture()?;
        let load = Load::begin(
            scene,
            &LoadPlan {
                namespace: LIFE,
                name: "left",
                node: Node::A,
                to,
                rate: 20,
                live: Duration::ZERO,
                meshed: false,
            },
        )?;
        let http = SocketAddr::new(to.ip(), HTTP);
        let got = scene.call("test/nginx", http, "out-of-the-mesh")?;
        ensure!(got.status == Some(200), "a pod that was in the mesh: {got:?}");
        std::thread::sleep(Duration::from_secs(1));
        all_well("without a mesh", &load.end(scene)?, 10)?;
        ensure!(
            capture.contains(READABLE)? && capture.contains(b"out-of-the-mesh")?,
            "nothing readable without a mesh"
        );
        scene.install_again()?;
        scene.look_again()?;
        serves(scene, to)?;
        let capture = scene.capture()?;
        let got = scene.call("test/nginx", http, "in-the-mesh-again")?;
        ensure!(got.status == Some(200), "a pod that is in the mesh again: {got:?}");
        ensure!(!capture.contains(b"in-the-mesh-again")?, "a pod that is in the mesh again was readable");
        let plain = plain(scene, to)?;
        std::thread::sleep(Duration::from_secs(1));
        all_refused(&plain.end(scene)?)?;
        ensure!(probes(scene)?.1 == restarted, "the server was started again");
        Ok(())
    })
}

/// What agents have put on a node: pins, programs at its control groups, its devices and its pods' network namespaces.
fn traces(node: &NodeInfo) -> Result<Vec<String>> {
    let root = PathBuf::from(format!("/proc/{}/root", node.pid));
    // Each bpffs has the kernel's own, by which it shows what is loaded.
    let pins = names(&root.join("sys/fs/bpf"))?.into_iter().filter(|name| !name.ends_with(".debug"));
    let mut traces: Vec<String> = pins.map(|name| format!("pin {name}")).collect();
    let groups = [root.join("sys/fs/cgroup/unified"), root.join("sys/fs/cgroup")];
    let groups = groups.iter().find(|dir| dir.join("cgroup.procs").exists()).context("the node's control groups")?;
    for group in bpftool(&["cgroup", "tree", &groups.display().to_string()])? {
        let programs = group["programs"].as_array().into_iter().flatten();
        // systemd has its own.
        let ours = programs.filter_map(|program| program["name"].as_str()).filter(|name| !name.starts_with("sd_"));
        traces.extend(ours.map(|name| format!("{name} at {}", group["cgroup"])));
    }
    let mut spaces = BTreeSet::from([fs::metadata(format!("/proc/{}/ns/net", node.pid))?.ino()]);
    for name in names(&root.join("run/netns"))? {
        spaces.insert(fs::metadata(root.join("run/netns").join(name))?.ino());
    }
    for link in bpftool(&["link", "list"])? {
        if link["netns_ino"].as_u64().is_some_and(|inode| spaces.contains(&inode)) {
            traces.push(format!("link {link}"));
        }
    }
    let at = format!("--net=/proc/{}/ns/net", node.pid);
    for (what, words) in [("tcx", ["bpftool", "net", "list"]), ("filter", ["tc", "qdisc", "show"])] {
        let said = command::run("nsenter", &[&[at.as_str()][..], &words].concat())?;
        let ours = said.lines().filter(|line| line.contains("tcx/") || line.contains("clsact"));
        traces.extend(ours.map(|line| format!("{what} {line}")));
    }
    Ok(traces)
}

fn names(dir: &Path) -> Result<Vec<String>> {
    let entries = fs::read_dir(dir).with_context(|| format!("list {}", dir.display()))?;
    Ok(entries.filter_map(Result::ok).map(|entry| entry.file_name().to_string_lossy().into_owned()).collect())
}

fn bpftool(words: &[&str]) -> Result<Vec<Value>> {
    let printed = command::run("bpftool", &[&["--json"], words].concat())?;
    let printed: Value = serde_json::from_str(&printed).with_context(|| format!("what bpftool printed: {printed}"))?;
    Ok(printed.as_array().context("a list")?.clone())
}
