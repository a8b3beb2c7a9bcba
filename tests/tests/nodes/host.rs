//! Pods that nobody may lock out: those of the node's own network, and those that a kubelet has from a file.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use culvert_tests::command;
use culvert_tests::kind::NodeInfo;
use culvert_tests::kind::stage::{SYSTEM, Scene};
use culvert_tests::programs::{Failure, HttpResult};
use culvert_tests::sandbox::Node;
use culvert_tests::tour::Stage as _;
use serde_json::json;

use super::pods::{
    LEGACY, LIMIT, NGINX, SERVER, apply, call_until, container, culvert, enrolled, get, is_enrolled, marker, mode, pod,
    ready, spec, tunnelled, within,
};

const HOST: &str = "host/server";
const HOST_PORT: u16 = 18080;
const STATIC_PORT: u16 = 9085;

/// A pod of the node's own network in a namespace of the mesh serves and calls in plaintext, by the node's address, and is refused
/// where plaintext is.
pub(crate) fn pods_of_the_nodes_network_are_left_alone(scene: &mut Scene) -> Result<()> {
    within(scene, "host", true, |scene| {
        let node = scene.node(Node::B)?.clone();
        let serve = ["http-serve", "--name=host", &format!("--port={HOST_PORT}")];
        let mut of_host = spec(&node.name, &[container("app", &serve)]);
        of_host["hostNetwork"] = json!(true);
        apply(scene, &[pod(HOST, of_host)?])?;
        ready(scene, HOST)?;
        let (capture, marker) = (scene.capture()?, marker("host"));
        let to = SocketAddr::new(node.ip.parse().context("a node's address")?, HOST_PORT);
        let result = scene.call(NGINX, to, &marker)?;
        let seen = result.seen.clone().with_context(|| format!("a pod of the mesh called {HOST}: {result:?}"))?;
        ensure!(seen.peer.ip() == scene.pod_ip(NGINX)?, "{HOST} saw {}", seen.peer);
        ensure!(capture.contains(marker.as_bytes())?, "a call to {HOST} was not in plaintext");
        let server = SocketAddr::new(scene.pod_ip(SERVER)?, 9080);
        call_until(scene, HOST, server, Some(200))?;
        let judged = apply(scene, &[mode("default", "STRICT")])
            .and_then(|()| call_until(scene, HOST, server, None))
            .and_then(|_| call_until(scene, NGINX, server, Some(200)));
        scene.cluster.kubectl(&["delete", "peerauthentication", "--namespace=default", "namespace"])?;
        judged?;
        ensure!(!is_enrolled(scene, HOST)?, "{HOST} is said to be in the mesh");
        let known = culvert(scene, Node::B, &["workloads", "--pod", HOST])?;
        ensure!(
            known[0]["enrolment"]["enrolled"] == false && known[0]["enrolment"]["row"] == 1,
            "the agent says of {HOST}: {known}"
        );
        Ok(())
    })
}

/// A static pod with a network of its own is a pod as any other: in the mesh if its namespace is.
pub(crate) fn a_static_pod_is_in_the_mesh_as_others_are(scene: &mut Scene) -> Result<()> {
    let node = scene.node(Node::B)?.clone();
    let file = manifests(&node).join("culvert-test-static.yaml");
    let serve = ["http-serve", "--name=static", &format!("--port={STATIC_PORT}")];
    let mut of_static = spec(&node.name, &[container("app", &serve)]);
    // What a kubelet has from a file knows nothing of the API server.
    of_static.as_object_mut().context("an object")?.remove("automountServiceAccountToken");
    let manifest = pod("default/static", of_static)?.to_string();
    fs::write(&file, manifest).with_context(|| format!("write {}", file.display()))?;
    let name = format!("default/static-{}", node.name);
    let judged = apply(scene, &[mode("default", "STRICT")]).and_then(|()| static_pod(scene, &name));
    fs::remove_file(&file).with_context(|| format!("remove {}", file.display()))?;
    scene.cluster.kubectl(&["delete", "peerauthentication", "--namespace=default", "namespace"])?;
    command::wait_for("the static pod is gone", LIMIT, || Ok(get(scene, &name).is_err().then_some(())))?;
    judged
}

fn static_pod(scene: &Scene, name: &str) -> Result<()> {
    enrolled(scene, name)?;
    let to = SocketAddr::new(scene.pod_ip(name)?, STATIC_PORT);
    call_until(scene, LEGACY, to, None)?;
    let seen = tunnelled(scene, NGINX, name, STATIC_PORT, "spiffe://cluster.local/ns/test/sa/nginx")?;
    ensure!(seen.peer.ip() == scene.pod_ip(NGINX)?, "the static pod saw {}", seen.peer);
    // The server's node is its own: nothing crosses a link, but its agent tells by whom it was called.
    tunnelled(scene, name, SERVER, 9080, "spiffe://cluster.local/ns/default/sa/default").map(drop)
}

/// A part of the control plane is replaced while the node's agent is stopped: ordinary pods are held, that one is not.
pub(crate) fn a_control_plane_pod_is_replaced_while_the_agent_is_stopped(scene: &mut Scene) -> Result<()> {
    let node = scene.node(Node::A)?.clone();
    let file = manifests(&node).join("kube-scheduler.yaml");
    let original = fs::read_to_string(&file).with_context(|| format!("read {}", file.display()))?;
    let name = format!("kube-system/kube-scheduler-{}", node.name);
    within(scene, "held", false, |scene| {
        let container = agent_container(scene, &node)?;
        let signal = |signal| {
            let kill = ["ctr", "--namespace=k8s.io", "tasks", "kill", "--signal", signal, &container];
            scene.cluster.on_node(&node.name, &kill, None)
        };
        signal("SIGSTOP")?;
        let replaced = ordinary_pods_are_held(scene, &node).and_then(|()| replace(scene, &file, &original, &name));
        let works = replaced.and_then(|()| schedules(scene));
        signal("SIGCONT")?;
        fs::write(&file, &original).with_context(|| format!("write {}", file.display()))?;
        works?;
        call_until(scene, "held/client", SocketAddr::new(scene.pod_ip(SERVER)?, 9080), Some(200))?;
        command::wait_for("the scheduler is as it was", LIMIT, || {
            let pod = get(scene, &name).ok();
            Ok(pod.filter(|pod| pod["metadata"]["annotations"]["culvert.test/again"].is_null()).map(drop))
        })?;
        ready(scene, &name)
    })
}

/// The node's folder of static pods, on this machine.
fn manifests(node: &NodeInfo) -> PathBuf {
    Path::new("/proc").join(node.pid.to_string()).join("root/etc/kubernetes/manifests")
}

/// The container of a node's agent, as containerd names it.
fn agent_container(scene: &Scene, node: &NodeInfo) -> Result<String> {
    let selector = format!("spec.nodeName={}", node.name);
    let of = ["pods", "--namespace", SYSTEM, "--selector=app=culvert", "--field-selector", &selector];
    let pods = scene.cluster.get(&of)?;
    let id =
        pods["items"][0]["status"]["containerStatuses"][0]["containerID"].as_str().context("the agent's container")?;
    Ok(id.trim_start_matches("containerd://").to_owned())
}

fn ordinary_pods_are_held(scene: &Scene, node: &NodeInfo) -> Result<()> {
    apply(scene, &[pod("held/client", spec(&node.name, &[container("app", &["pause"])]))?])?;
    ready(scene, "held/client")?;
    let to = SocketAddr::new(scene.pod_ip(SERVER)?, 9080);
    let result: HttpResult = scene.call("held/client", to, "held")?;
    match result.failure {
        Some(Failure::NotPermitted) => Ok(()),
        _ => bail!("a pod that no agent knows was not held: {result:?}"),
    }
}

/// Another version of a static pod, by an annotation, and waits until that one runs.
fn replace(scene: &Scene, file: &Path, original: &str, name: &str) -> Result<()> {
    let place = "metadata:\n";
    ensure!(
        original.starts_with("apiVersion: v1\nkind: Pod\nmetadata:\n"),
        "another manifest than kubeadm's: {original}"
    );
    let changed = match original.split_once("  annotations:\n") {
        Some((before, after)) => format!("{before}  annotations:\n    culvert.test/again: \"1\"\n{after}"),
        None => original.replacen(place, &format!("{place}  annotations:\n    culvert.test/again: \"1\"\n"), 1),
    };
    fs::write(file, changed).with_context(|| format!("write {}", file.display()))?;
    command::wait_for("the scheduler is replaced", LIMIT, || {
        let pod = get(scene, name).ok();
        Ok(pod.filter(|pod| pod["metadata"]["annotations"]["culvert.test/again"] == "1").map(drop))
    })?;
    ready(scene, name)
}

/// A pod that names no node is given one.
fn schedules(scene: &Scene) -> Result<()> {
    let worker = &scene.node(Node::B)?.name;
    apply(scene, &[pod("held/scheduled", spec(worker, &[container("app", &["pause"])]))?])?;
    ready(scene, "held/scheduled")
}
