//! Pods of scenarios: made, asked, and taken away.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use culvert_tests::command;
use culvert_tests::kind::stage::{POD_IMAGE, SYSTEM, Scene};
use culvert_tests::programs::{Failure, HttpResult, Seen};
use culvert_tests::sandbox::Node;
use culvert_tests::tour::Stage as _;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

/// How long a pod, or a change, may take until it is there.
pub(crate) const LIMIT: Duration = Duration::from_secs(90);
/// The client in the mesh.
pub(crate) const NGINX: &str = "test/nginx";
/// The client outside.
pub(crate) const LEGACY: &str = "test/legacy-app";
/// The server in the mesh.
pub(crate) const SERVER: &str = "default/productpage";

/// Plays in a namespace of the scenario's own, in the mesh or not, which is gone afterwards whatever came of it.
pub(crate) fn within(
    scene: &mut Scene,
    namespace: &str,
    mesh: bool,
    play: impl FnOnce(&mut Scene) -> Result<()>,
) -> Result<()> {
    let mode = if mesh { "ambient" } else { "none" };
    let labels = json!({ "istio.io/dataplane-mode": mode });
    let object =
        json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": namespace, "labels": labels } });
    apply(scene, &[object])?;
    let result = command::wait_for("the namespace has its service account", LIMIT, || {
        let get = ["get", "serviceaccount", "--namespace", namespace, "default", "--ignore-not-found"];
        Ok((!scene.cluster.kubectl(&get)?.is_empty()).then_some(()))
    });
    let result = result.and_then(|()| play(scene)).with_context(|| said(scene, namespace));
    let deleted = scene.cluster.kubectl(&["delete", "namespace", namespace]);
    result.and(deleted.map(drop))
}

/// What is known of a namespace's pods, for an error.
fn said(scene: &Scene, namespace: &str) -> String {
    let questions = [&["get", "pods", "--output", "wide"][..], &["get", "events"]];
    let answers = questions.map(|words| {
        let said = scene.cluster.kubectl(&[words, &["--namespace", namespace]].concat());
        said.unwrap_or_else(|error| format!("{error:#}"))
    });
    answers.join("\n")
}

/// Applies objects.
pub(crate) fn apply(scene: &Scene, objects: &[Value]) -> Result<()> {
    let list = json!({ "apiVersion": "v1", "kind": "List", "items": objects }).to_string();
    scene.cluster.kubectl_with(&["apply", "--filename", "-"], &list).map(drop)
}

/// A container with a program of `culvert-pod`.
pub(crate) fn container(name: &str, program: &[&str]) -> Value {
    json!({ "name": name, "image": POD_IMAGE, "imagePullPolicy": "Never", "args": program })
}

/// What a pod consists of, with these containers, on a node.
pub(crate) fn spec(node: &str, containers: &[Value]) -> Value {
    json!({
        "nodeSelector": { "kubernetes.io/hostname": node },
        "tolerations": [{ "operator": "Exists" }],
        "automountServiceAccountToken": false,
        "terminationGracePeriodSeconds": 1,
        "containers": containers,
    })
}

/// A pod `namespace/name`, with the label `app` of its name.
pub(crate) fn pod(pod: &str, spec: Value) -> Result<Value> {
    let metadata = metadata(pod)?;
    Ok(json!({ "apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec }))
}

/// A Service `namespace/name` of the pods that have the label `app` of its name, on one port.
pub(crate) fn service(service: &str, port: u16, cluster_ip: Option<&str>) -> Result<Value> {
    let metadata = metadata(service)?;
    let selector = &metadata["labels"];
    let spec = json!({ "selector": selector, "ports": [{ "port": port }], "clusterIP": cluster_ip });
    Ok(json!({ "apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": spec }))
}

/// Metadata of an object `namespace/name`, with the label `app` of its name.
pub(crate) fn metadata(of: &str) -> Result<Value> {
    let (namespace, name) = of.split_once('/').context("namespace/name")?;
    Ok(json!({ "namespace": namespace, "name": name, "labels": { "app": name } }))
}

/// What a namespace's pods take: `STRICT` or `PERMISSIVE`.
pub(crate) fn mode(namespace: &str, mode: &str) -> Value {
    json!({
        "apiVersion": "security.istio.io/v1",
        "kind": "PeerAuthentication",
        "metadata": { "namespace": namespace, "name": "namespace" },
        "spec": { "mtls": { "mode": mode } },
    })
}

/// A pod as the API server has it.
pub(crate) fn get(scene: &Scene, pod: &str) -> Result<Value> {
    let (namespace, name) = pod.split_once('/').context("a pod is namespace/name")?;
    scene.cluster.get(&["pod", "--namespace", namespace, name])
}

/// Waits until a pod is ready.
pub(crate) fn ready(scene: &Scene, pod: &str) -> Result<()> {
    command::wait_for(&format!("{pod} is ready"), LIMIT, || {
        let Ok(pod) = get(scene, pod) else { return Ok(None) };
        let conditions = pod["status"]["conditions"].as_array().cloned().unwrap_or_default();
        Ok(conditions.iter().any(|one| one["type"] == "Ready" && one["status"] == "True").then_some(()))
    })
}

/// Waits until a pod is in the mesh and ready.
pub(crate) fn enrolled(scene: &Scene, pod: &str) -> Result<()> {
    ready(scene, pod)?;
    command::wait_for(&format!("{pod} is in the mesh"), LIMIT, || Ok(is_enrolled(scene, pod)?.then_some(())))
}

/// Whether a pod's agent says that it is in the mesh.
pub(crate) fn is_enrolled(scene: &Scene, pod: &str) -> Result<bool> {
    Ok(get(scene, pod)?["metadata"]["annotations"]["ambient.istio.io/redirection"] == "enabled")
}

/// What a container of a pod has printed: values of JSON, one a line.
pub(crate) fn printed<T: DeserializeOwned>(scene: &Scene, pod: &str, container: &str) -> Result<Vec<T>> {
    let (namespace, name) = pod.split_once('/').context("a pod is namespace/name")?;
    let text = scene.cluster.kubectl(&["logs", "--namespace", namespace, name, "--container", container])?;
    let whole = &text[..text.rfind('\n').map_or(0, |at| at + 1)];
    let lines: Result<_, _> = whole.lines().map(serde_json::from_str).collect();
    lines.with_context(|| format!("what {pod} printed: {text}"))
}

/// What a program in a pod prints.
pub(crate) fn ask<T: DeserializeOwned>(scene: &Scene, pod: &str, program: &[&str]) -> Result<T> {
    let text = scene.cluster.kubectl(&Scene::exec(pod, program)?)?;
    serde_json::from_str(&text).with_context(|| format!("what the program printed: {text}"))
}

/// A text that nothing else sends.
pub(crate) fn marker(what: &str) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    format!("culvert-secret-{what}-{:x}", now.as_nanos())
}

/// Calls until the answer is this status, or, for `None`, a refusal; the last result is given.
pub(crate) fn call_until(scene: &Scene, client: &str, to: SocketAddr, status: Option<u16>) -> Result<HttpResult> {
    let what = status.map_or("refused".to_owned(), |status| format!("answered by {status}"));
    let mut last = None;
    let called = command::wait_for(&format!("a call of {client} to {to} is {what}"), LIMIT, || {
        let result = scene.call(client, to, "until")?;
        let is_refused = matches!(result.failure, Some(Failure::Refused | Failure::Reset));
        let is_so = status.map_or(is_refused, |status| result.status == Some(status));
        let result = last.insert(result).clone();
        Ok(is_so.then_some(result))
    });
    called.with_context(|| format!("the last was {last:?}"))
}

/// A call that must be answered and must not be readable between the nodes; what the server saw.
pub(crate) fn tunnelled(scene: &Scene, client: &str, server: &str, port: u16, identity: &str) -> Result<Seen> {
    let (from, to) = (scene.pod_ip(client)?, SocketAddr::new(scene.pod_ip(server)?, port));
    let node = node_of(scene, server)?;
    let (capture, marker, (_, before)) = (scene.capture()?, marker("tunnelled"), scene.log(node, u64::MAX)?);
    let result = scene.call(client, to, &marker)?;
    let seen = result.seen.clone().with_context(|| format!("{client} called {server}: {result:?}"))?;
    ensure!(!capture.contains(marker.as_bytes())?, "what {client} said to {server} was readable on the link");
    let known = identity_of(scene, node, before, from)?;
    ensure!(known.as_deref() == Some(identity), "{server}'s agent took {client} for {known:?}");
    Ok(seen)
}

/// Which identity a node's agent tells of the first connection to its pods from an address after `offset` of its log.
pub(crate) fn identity_of(scene: &Scene, node: Node, offset: u64, from: IpAddr) -> Result<Option<String>> {
    command::wait_for(&format!("the agent tells of a connection from {from}"), LIMIT, || {
        let (lines, _) = scene.log(node, offset)?;
        let line = lines.iter().find(|line| {
            let source = line.field("src.addr").and_then(|address| address.parse::<SocketAddr>().ok());
            line.field("direction").is_some_and(|direction| direction == "inbound")
                && source.is_some_and(|source| source.ip().to_canonical() == from)
        });
        Ok(line.map(|line| line.field("src.identity")))
    })
}

/// Which of the scenario's nodes a pod is on.
pub(crate) fn node_of(scene: &Scene, pod: &str) -> Result<Node> {
    let name = get(scene, pod)?["spec"]["nodeName"].as_str().context("a pod without a node")?.to_owned();
    let is_on = |node: &Node| scene.node(*node).is_ok_and(|info| info.name == name);
    Node::ALL.into_iter().find(is_on).with_context(|| format!("{name} is none of the scenario's nodes"))
}

/// What `culvert` prints as JSON in the agent of a node.
pub(crate) fn culvert(scene: &Scene, node: Node, words: &[&str]) -> Result<Value> {
    let selector = format!("spec.nodeName={}", scene.node(node)?.name);
    let of = ["--namespace", SYSTEM, "--selector=app=culvert", "--field-selector", &selector, "--output=name"];
    let pod = scene.cluster.kubectl(&[&["get", "pods"][..], &of].concat())?;
    let exec = ["exec", "--namespace", SYSTEM, pod.trim(), "--container=agent", "--", "/usr/local/bin/culvert"];
    let text = scene.cluster.kubectl(&[&exec[..], words, &["--output=json"]].concat())?;
    serde_json::from_str(&text).with_context(|| format!("what culvert printed: {text}"))
}
