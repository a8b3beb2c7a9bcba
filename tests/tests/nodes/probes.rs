//! What a kubelet asks of pods that refuse plaintext, and what others of its node may.

use std::fs;
use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result, ensure};
use culvert_tests::command;
use culvert_tests::kind::NodeInfo;
use culvert_tests::kind::stage::Scene;
use culvert_tests::programs::{Failure, HttpResult, Probed};
use culvert_tests::sandbox::{Node, built};
use culvert_tests::tour::Stage as _;
use serde_json::{Value, json};

use super::pods::{
    LEGACY, LIMIT, NGINX, apply, call_until, container, enrolled, get, mode, pod, printed, spec, within,
};

const POD: &str = "probes/probed";
/// A container for each kind of probe, with its port.
const KINDS: [(&str, u16); 3] = [("http", 8081), ("tcp", 8082), ("grpc", 8083)];
/// Where the program of the node's other process lies.
const PROGRAM: &str = "/run/culvert-test-pod";

/// Probes of all three kinds go on as policy becomes STRICT, and come from the node; another process of the node is refused, and
/// is not once the policy lets it.
pub(crate) fn strict_pods_answer_their_kubelet_and_nobody_else_of_the_node(scene: &mut Scene) -> Result<()> {
    within(scene, "probes", true, |scene| {
        let node = scene.node(Node::B)?.clone();
        let containers = KINDS.map(|(kind, port)| probed(kind, port));
        apply(scene, &[pod(POD, spec(&node.name, &containers))?])?;
        enrolled(scene, POD)?;
        apply(scene, &[mode("probes", "STRICT")])?;
        let http = SocketAddr::new(scene.pod_ip(POD)?, KINDS[0].1);
        call_until(scene, LEGACY, http, None)?;
        probes_go_on(scene, &node)?;
        let binary = format!("/proc/{}/root{PROGRAM}", node.pid);
        fs::copy(built("culvert-pod")?, &binary).with_context(|| format!("copy a program to {}", node.name))?;
        let judged = others_are_judged(scene, &node, http);
        fs::remove_file(&binary).with_context(|| format!("remove {binary}"))?;
        judged
    })
}

fn probed(kind: &str, port: u16) -> Value {
    let asked = match kind {
        "http" => json!({ "httpGet": { "port": port } }),
        "tcp" => json!({ "tcpSocket": { "port": port } }),
        _ => json!({ "grpc": { "port": port } }),
    };
    let mut probe = asked;
    probe["periodSeconds"] = json!(1);
    probe["timeoutSeconds"] = json!(5);
    let mut container = container(kind, &["probed", "--kind", kind, "--port", &port.to_string()]);
    container["readinessProbe"] = probe.clone();
    container["livenessProbe"] = probe;
    container
}

/// Each container is asked some times more, by the node; none of them was restarted or is not ready.
fn probes_go_on(scene: &Scene, node: &NodeInfo) -> Result<()> {
    let addresses = scene.cluster.on_node(&node.name, &["ip", "-json", "address"], None)?;
    for (kind, _) in KINDS {
        let before = printed::<Probed>(scene, POD, kind)?.len();
        let clients = command::wait_for(&format!("{kind} probes of a STRICT pod go on"), LIMIT, || {
            let clients = printed::<Probed>(scene, POD, kind)?;
            Ok((clients.len() >= before + 6).then_some(clients))
        })?;
        for client in clients.iter().map(|client| client.peer.ip()) {
            ensure!(has(&addresses, client)?, "a {kind} probe came from {client}, not from an address of the node");
        }
    }
    let pod = get(scene, POD)?;
    for status in pod["status"]["containerStatuses"].as_array().context("the pod's containers")? {
        ensure!(status["ready"] == true && status["restartCount"] == 0, "a probe has failed: {status}");
    }
    Ok(())
}

/// Whether `ip address` has told this address.
fn has(told: &str, address: IpAddr) -> Result<bool> {
    let told: Value = serde_json::from_str(told).context("what ip says of the node's addresses")?;
    let devices = told.as_array().context("a list of devices")?;
    let mut addresses = devices.iter().filter_map(|device| device["addr_info"].as_array()).flatten();
    Ok(addresses.any(|of| of["local"] == address.to_string().as_str()))
}

/// A process of the node that is not its kubelet.
fn others_are_judged(scene: &Scene, node: &NodeInfo, http: SocketAddr) -> Result<()> {
    let call = |port| -> Result<HttpResult> {
        let to = SocketAddr::new(http.ip(), port).to_string();
        let text = scene.cluster.on_node(&node.name, &[PROGRAM, "http-get", "--to", &to], None)?;
        serde_json::from_str(&text).with_context(|| format!("what the program printed: {text}"))
    };
    for (kind, port) in KINDS {
        let result = call(port)?;
        ensure!(result.failure == Some(Failure::Refused), "the {kind} port of a STRICT pod, from its node: {result:?}");
    }
    call_until(scene, NGINX, http, Some(200))?;
    apply(scene, &[mode("probes", "PERMISSIVE")])?;
    command::wait_for("a process of the node is served by a PERMISSIVE pod", LIMIT, || {
        Ok((call(http.port())?.status == Some(200)).then_some(()))
    })
}
