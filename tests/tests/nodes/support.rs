//! What scenarios on real nodes have in common.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use culvert_tests::command;
use culvert_tests::kind::stage::{POD_IMAGE, SYSTEM, Scene};
use culvert_tests::programs::PacedResult;
use culvert_tests::sandbox::Node;
use culvert_tests::tour::{self, Stage as _};
use serde_json::Value;

/// How long a pod or an agent may take to be as a scenario wants it.
pub(crate) const SOON: Duration = Duration::from_secs(120);
/// Directory of a node by whose files programs in pods are told when to begin and to end.
const SIGNALS: &str = "/run/culvert-test";

/// The rows that the sandbox shows, with real pods.
pub(crate) fn the_scenario(scene: &mut Scene) -> Result<()> {
    let rows = tour::play(scene, |_| {})?;
    scene.put("")?;
    let wrong: Vec<String> = rows.iter().filter(|row| !row.ok()).map(|row| format!("{row:?}")).collect();
    ensure!(rows.len() > 40 && wrong.is_empty(), "{} of {} rows:\n{}", wrong.len(), rows.len(), wrong.join("\n"));
    Ok(())
}

/// Plays something with a namespace of its own, which is in the mesh, and removes it, also after a failure.
pub(crate) fn in_namespace(
    scene: &mut Scene,
    namespace: &str,
    scenario: impl FnOnce(&mut Scene) -> Result<()>,
) -> Result<()> {
    scene.cluster.kubectl(&["create", "namespace", namespace])?;
    scene.cluster.kubectl(&["label", "namespace", namespace, "istio.io/dataplane-mode=ambient"])?;
    // Pods cannot be made before it is there.
    let played = command::wait_for("the namespace has its service account", SOON, || {
        Ok(scene.cluster.kubectl(&["get", "serviceaccount", "--namespace", namespace, "default"]).ok())
    })
    .and_then(|_| scenario(scene));
    let removed = scene.cluster.kubectl(&["delete", "namespace", namespace]).map(drop);
    played.and(removed)
}

/// Waits until the API server says that a pod is in the mesh, and able to take tunnels ([E.4]).
pub(crate) fn enrolled(scene: &Scene, namespace: &str, name: &str) -> Result<()> {
    command::wait_for(&format!("{namespace}/{name} is in the mesh"), SOON, || {
        let pod = scene.cluster.get(&["pod", "--namespace", namespace, name])?;
        Ok((pod["metadata"]["annotations"]["ambient.istio.io/redirection"] == "enabled").then_some(()))
    })
}

/// An agent, as its pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Agent {
    /// Name of the pod.
    pub(crate) name: String,
    pub(crate) uid: String,
    /// Name of the node.
    pub(crate) node: String,
    /// Number of the container.
    pub(crate) container: String,
    /// How often the container was started again.
    pub(crate) restarts: u64,
    pub(crate) ready: bool,
    /// It was told to end.
    pub(crate) ends: bool,
}

/// All agents that there are, also those that drain.
pub(crate) fn agents(scene: &Scene) -> Result<Vec<Agent>> {
    let pods = scene.cluster.get(&["pods", "--namespace", SYSTEM, "--selector=app=culvert"])?;
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let agent = |pod: &Value| {
        let container = &pod["status"]["containerStatuses"][0];
        Agent {
            name: text(&pod["metadata"]["name"]),
            uid: text(&pod["metadata"]["uid"]),
            node: text(&pod["spec"]["nodeName"]),
            container: text(&container["containerID"]).trim_start_matches("containerd://").to_owned(),
            restarts: container["restartCount"].as_u64().unwrap_or_default(),
            ready: container["ready"] == true,
            ends: !pod["metadata"]["deletionTimestamp"].is_null(),
        }
    };
    Ok(pods["items"].as_array().context("a list of pods")?.iter().map(agent).collect())
}

/// The only agent of a node.
pub(crate) fn agent(scene: &Scene, node: Node) -> Result<Agent> {
    let name = &scene.node(node)?.name;
    let mut on = agents(scene)?;
    on.retain(|agent| agent.node == *name);
    ensure!(on.len() == 1, "one agent on {name}: {on:?}");
    on.pop().context("an agent")
}

/// Waits until a node has one agent, which is ready, and of which this holds.
pub(crate) fn agent_with(scene: &Scene, node: Node, what: &str, is: impl Fn(&Agent) -> bool) -> Result<Agent> {
    // While two are there, or none, it is not so yet.
    let found = || Ok(agent(scene, node).ok().filter(|agent| agent.ready && !agent.ends && is(agent)));
    command::wait_for(&format!("an agent {what} serves"), SOON, found).with_context(|| format!("{:?}", agents(scene)))
}

/// Kills the first process of a container (SIGKILL).
pub(crate) fn kill_container(scene: &Scene, node: Node, container: &str) -> Result<()> {
    let node = &scene.node(node)?.name;
    let tasks = scene.cluster.on_node(node, &["ctr", "--namespace", "k8s.io", "task", "list"], None)?;
    let of = |line: &str| line.strip_prefix(container)?.split_whitespace().next().map(str::to_owned);
    let pid = tasks.lines().find_map(of).with_context(|| format!("no process of {container} in:\n{tasks}"))?;
    scene.cluster.on_node(node, &["sh", "-c", &format!("kill -9 {pid}")], None).map(drop)
}

/// New connections at a steady rate.
pub(crate) struct LoadPlan {
    pub(crate) namespace: &'static str,
    /// Name of the pod.
    pub(crate) name: &'static str,
    pub(crate) node: Node,
    /// An exchange server.
    pub(crate) to: SocketAddr,
    /// Connections a second.
    pub(crate) rate: u32,
    /// How long each goes on.
    pub(crate) live: Duration,
    /// Whether the pod is in the mesh.
    pub(crate) meshed: bool,
}

/// Such connections, made by a pod whose program needs nobody to go on: no kubelet, no runtime, no API server.
pub(crate) struct Load {
    namespace: &'static str,
    name: &'static str,
    node: String,
}

impl Load {
    /// Begins once the pod is in the mesh, if it is to be.
    pub(crate) fn begin(scene: &Scene, plan: &LoadPlan) -> Result<Self> {
        let LoadPlan { namespace, name, node, to, rate, live, meshed } = *plan;
        let node = scene.node(node)?.name.clone();
        let label = if meshed { "app: load" } else { "istio.io/dataplane-mode: none" };
        let container = |container: &str, rate: u32, live: u128, until: &str| {
            format!(
                "  - name: {container}\n    image: {POD_IMAGE}\n    imagePullPolicy: Never\n    args: [paced, --to={to}, --rate={rate}, \
                 --live-ms={live}, --until=/signals/{name}-{until}]\n    volumeMounts: [{{name: signals, mountPath: /signals}}]\n"
            )
        };
        // The first container's connections may be held while the pod comes into the mesh.
        let pod = format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{namespace: {namespace}, name: {name}, labels: {{{label}}}}}\nspec:\n  \
             restartPolicy: Never\n  automountServiceAccountToken: false\n  terminationGracePeriodSeconds: 1\n  \
             nodeSelector: {{kubernetes.io/hostname: {node}}}\n  tolerations: [{{operator: Exists}}]\n  \
             volumes: [{{name: signals, hostPath: {{path: {SIGNALS}, type: DirectoryOrCreate}}}}]\n  \
             initContainers:\n{}  containers:\n{}",
            container("before", 5, 0, "begin"),
            container("load", rate, live.as_millis(), "end")
        );
        let load = Self { namespace, name, node };
        load.on_node(scene, &format!("rm -f {SIGNALS}/{name}-begin {SIGNALS}/{name}-end"))?;
        scene.cluster.kubectl_with(&["create", "--filename", "-"], &pod)?;
        if meshed {
            enrolled(scene, namespace, name)?;
        }
        load.signal(scene, "begin")?;
        load.phase(scene, &["Running"])?;
        Ok(load)
    }

    /// Begins no more, and tells what came of all.
    pub(crate) fn end(self, scene: &Scene) -> Result<PacedResult> {
        self.signal(scene, "end")?;
        self.phase(scene, &["Succeeded", "Failed"])?;
        let Self { namespace, name, .. } = self;
        let printed = scene.cluster.kubectl(&["logs", "--namespace", namespace, name, "--container=load"])?;
        scene.cluster.kubectl(&["delete", "pod", "--namespace", namespace, name, "--wait=false"])?;
        let result = serde_json::from_str(printed.trim()).with_context(|| format!("what {name} printed: {printed}"))?;
        eprintln!("    {name}: {result:?}");
        Ok(result)
    }

    fn phase(&self, scene: &Scene, wanted: &[&str]) -> Result<()> {
        let get = ["get", "pod", "--namespace", self.namespace, self.name, "--output", "jsonpath={.status.phase}"];
        command::wait_for(&format!("pod {} is {}", self.name, wanted.join(" or ")), SOON, || {
            Ok(wanted.contains(&scene.cluster.kubectl(&get)?.as_str()).then_some(()))
        })
    }

    fn signal(&self, scene: &Scene, which: &str) -> Result<()> {
        self.on_node(scene, &format!("mkdir -p {SIGNALS} && : > {SIGNALS}/{}-{which}", self.name))
    }

    fn on_node(&self, scene: &Scene, script: &str) -> Result<()> {
        scene.cluster.on_node(&self.node, &["sh", "-c", script], None).map(drop)
    }
}
