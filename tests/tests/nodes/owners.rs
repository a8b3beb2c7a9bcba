//! Pods as their owners make them: Jobs, init containers, native sidecars, StatefulSets. Each is in the mesh from its first
//! instruction on, and is forgotten when it has ended.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use culvert_tests::command;
use culvert_tests::kind::stage::Scene;
use culvert_tests::programs::{Failure, HttpResult, ResolveResult};
use culvert_tests::sandbox::Node;
use culvert_tests::tour::Stage as _;
use serde_json::{Value, json};

use super::pods::{
    LEGACY, LIMIT, NGINX, apply, ask, call_until, container, culvert, enrolled, get, identity_of, marker, metadata,
    mode, pod, printed, service, spec, tunnelled, within,
};

const SERVER: &str = "owners/server";
const PORT: u16 = 8080;
/// Whom pods of the namespace are.
const IDENTITY: &str = "spiffe://cluster.local/ns/owners/sa/default";

/// Each pod of a Job calls a STRICT Service with its first instruction, and ends: it is answered, by tunnel, and when it has ended
/// nothing is left of it in the agent and in the kernel.
pub(crate) fn a_jobs_first_call_is_tunnelled_and_its_end_forgotten(scene: &mut Scene) -> Result<()> {
    within(scene, "owners", true, |scene| {
        let to = strict_server(scene)?;
        let before = entries(scene)?;
        let (capture, marker) = (scene.capture()?, marker("job"));
        let (_, offset) = scene.log(Node::B, u64::MAX)?;
        let mut pods = spec(&scene.node(Node::A)?.name, &[container("app", &call(&to, &marker))]);
        pods["restartPolicy"] = json!("Never");
        let spec = json!({ "completions": 4, "parallelism": 2, "backoffLimit": 0, "template": { "spec": pods } });
        let metadata = metadata("owners/first")?;
        apply(scene, &[json!({ "apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": spec })])?;
        let wait = ["wait", "--for=condition=Complete", "--namespace=owners", "--timeout=120s", "job/first"];
        scene.cluster.kubectl(&wait)?;
        for pod in ended(scene)? {
            let name = pod["metadata"]["name"].as_str().context("a pod's name")?;
            answered(scene, &format!("owners/{name}"), "app", offset)?;
        }
        ensure!(!capture.contains(marker.as_bytes())?, "a Job's first call was readable on the link");
        forgotten(scene, &before)
    })
}

/// The pods of the Job.
fn ended(scene: &Scene) -> Result<Vec<Value>> {
    let pods = scene.cluster.get(&["pods", "--namespace=owners", "--selector=job-name=first"])?;
    let pods = pods["items"].as_array().context("a list of pods")?.clone();
    ensure!(pods.len() == 4, "{} pods of a Job of four", pods.len());
    Ok(pods)
}

/// What ended is no pod of the node for its agent, and the kernel's maps have what they had.
fn forgotten(scene: &Scene, before: &BTreeMap<String, String>) -> Result<()> {
    let mut last = Value::Null;
    command::wait_for("the agent has forgotten the Job's pods", LIMIT, || {
        last = culvert(scene, Node::A, &["workloads", "--namespace=owners"])?;
        let workloads = last.as_array().context("a list of workloads")?;
        // The API server has its object still; the node has nothing of it.
        let is_known = |of: &Value| !of["local"]["cgroup"].is_null() || !of["local"]["netnsCookie"].is_null();
        Ok((!workloads.iter().any(is_known)).then_some(()))
    })
    .with_context(|| format!("it knows {last}"))?;
    let mut after = BTreeMap::new();
    command::wait_for("the kernel has no entries of the Job's pods", LIMIT, || {
        after = entries(scene)?;
        Ok((after == *before).then_some(()))
    })
    .with_context(|| format!("before: {before:?}; after: {after:?}"))
}

/// How many entries each map of the node's kernel has that is about pods.
fn entries(scene: &Scene) -> Result<BTreeMap<String, String>> {
    let samples = culvert(scene, Node::A, &["metrics", "culvert_kernel_map_entries"])?;
    let samples = samples.as_array().context("a list of samples")?;
    Ok(samples.iter().map(|of| (of["labels"].to_string(), of["value"].to_string())).collect())
}

/// An init container's first instruction is a call to a STRICT Service; a native sidecar calls all the time, and the application is
/// called: all of it by tunnel.
pub(crate) fn init_containers_and_native_sidecars_are_in_the_mesh(scene: &mut Scene) -> Result<()> {
    within(scene, "owners", true, |scene| {
        const POD: &str = "owners/staged";
        let to = strict_server(scene)?;
        let (capture, marker) = (scene.capture()?, marker("staged"));
        let (_, offset) = scene.log(Node::B, u64::MAX)?;
        let many = ["http-get", "--to", &to, "--marker", &marker, "--count=100000", "--interval-ms=100"];
        let mut sidecar = container("sidecar", &many);
        sidecar["restartPolicy"] = json!("Always");
        let app = container("app", &["http-serve", "--name=staged", &format!("--port={PORT}")]);
        let mut staged = spec(&scene.node(Node::A)?.name, &[app]);
        staged["initContainers"] = json!([container("first", &call(&to, &marker)), sidecar]);
        apply(scene, &[pod(POD, staged)?])?;
        enrolled(scene, POD)?;
        answered(scene, POD, "first", offset)?;
        let results = command::wait_for("the sidecar has called some times", LIMIT, || {
            Ok(Some(printed::<HttpResult>(scene, POD, "sidecar")?).filter(|results| results.len() > 5))
        })?;
        let failed: Vec<&HttpResult> = results.iter().filter(|result| result.status != Some(200)).collect();
        ensure!(failed.is_empty(), "{} calls of a sidecar of {} failed: {failed:?}", failed.len(), results.len());
        ensure!(!capture.contains(marker.as_bytes())?, "a call of the pod was readable on the link");
        tunnelled(scene, NGINX, POD, PORT, "spiffe://cluster.local/ns/test/sa/nginx")?;
        call_until(scene, LEGACY, SocketAddr::new(scene.pod_ip(POD)?, PORT), None).map(drop)
    })
}

/// The pods of a StatefulSet find each other by the names that its headless Service gives them, and call by tunnel, both ways; so
/// does one that took another's place and name.
pub(crate) fn pods_of_a_stateful_set_call_each_other_by_tunnel(scene: &mut Scene) -> Result<()> {
    within(scene, "owners", true, |scene| {
        const PODS: [&str; 2] = ["owners/web-0", "owners/web-1"];
        let mut pods = spec("", &[container("app", &["http-serve", "--name=web", &format!("--port={PORT}")])]);
        // One on each node.
        pods["nodeSelector"] = Value::Null;
        pods["topologySpreadConstraints"] = json!([{
            "maxSkew": 1,
            "topologyKey": "kubernetes.io/hostname",
            "whenUnsatisfiable": "DoNotSchedule",
            "labelSelector": { "matchLabels": { "app": "web" } },
        }]);
        let template = json!({ "metadata": { "labels": { "app": "web" } }, "spec": pods });
        let selector = json!({ "matchLabels": { "app": "web" } });
        let spec = json!({ "serviceName": "web", "replicas": 2, "selector": selector, "template": template });
        let set = json!({ "apiVersion": "apps/v1", "kind": "StatefulSet", "metadata": metadata("owners/web")?, "spec": spec });
        apply(scene, &[mode("owners", "STRICT"), service("owners/web", PORT, Some("None"))?, set])?;
        for pod in PODS {
            enrolled(scene, pod)?;
        }
        both_ways(scene, PODS)?;
        let uid = |pod: &str| -> Result<Value> { Ok(get(scene, pod)?["metadata"]["uid"].clone()) };
        let first = uid(PODS[0])?;
        scene.cluster.kubectl(&["delete", "pod", "--namespace=owners", "web-0"])?;
        command::wait_for("the pod is made again", LIMIT, || {
            Ok(uid(PODS[0]).is_ok_and(|second| second != first).then_some(()))
        })?;
        enrolled(scene, PODS[0])?;
        both_ways(scene, PODS)
    })
}

fn both_ways(scene: &Scene, [one, two]: [&str; 2]) -> Result<()> {
    let name_server = SocketAddr::new(scene.cluster_ip("kube-system/kube-dns")?, 53).to_string();
    for (client, server) in [(one, two), (two, one)] {
        let name = server.replace("owners/", "") + ".web.owners.svc.cluster.local";
        let expected = vec![scene.pod_ip(server)?];
        // CoreDNS keeps an answer for up to half a minute.
        command::wait_for(&format!("{client} finds {server} by its name"), LIMIT, || {
            let answer: ResolveResult = ask(scene, client, &["resolve", "--name", &name, "--server", &name_server])?;
            Ok((answer.addresses == expected).then_some(()))
        })?;
        let seen = tunnelled(scene, client, server, PORT, IDENTITY)?;
        ensure!(seen.peer.ip() == scene.pod_ip(client)?, "{server} saw {}, not {client}", seen.peer);
    }
    Ok(())
}

/// A server on node b that takes tunnels only, and the address of its Service.
fn strict_server(scene: &Scene) -> Result<String> {
    let node = &scene.node(Node::B)?.name;
    let program = ["http-serve", "--name=server", &format!("--port={PORT}")];
    let server = pod(SERVER, spec(node, &[container("app", &program)]))?;
    apply(scene, &[mode("owners", "STRICT"), server, service(SERVER, PORT, None)?])?;
    enrolled(scene, SERVER)?;
    let to = SocketAddr::new(scene.cluster_ip(SERVER)?, PORT);
    // From when on plaintext is refused, and kube-proxy and agents know the Service.
    call_until(scene, LEGACY, SocketAddr::new(scene.pod_ip(SERVER)?, PORT), None)?;
    call_until(scene, NGINX, to, Some(200))?;
    Ok(to.to_string())
}

/// A call as the first instruction, and again until it is answered: until the agent knows a pod's address it is refused.
fn call<'a>(to: &'a str, marker: &'a str) -> [&'a str; 8] {
    ["http-get", "--to", to, "--marker", marker, "--until-answered", "--count=600", "--interval-ms=100"]
}

/// A container's call was answered in the end, and refused before if at all, and the server's agent knew by whom it was made.
fn answered(scene: &Scene, pod: &str, container: &str, offset: u64) -> Result<()> {
    let results = printed::<HttpResult>(scene, pod, container)?;
    let (result, before) = results.split_last().with_context(|| format!("{pod} has printed nothing"))?;
    let is_refused = |result: &HttpResult| matches!(result.failure, Some(Failure::Refused | Failure::NotPermitted));
    ensure!(before.iter().all(is_refused), "before a call of {pod} was answered: {before:?}");
    eprintln!("  {pod}: answered after {} refused", before.len());
    let seen = result.seen.as_ref().with_context(|| format!("the first call of {pod}: {result:?}"))?;
    let own = result.local.context("the client's address")?.ip();
    ensure!(seen.peer.ip() == own, "the server saw {}, not {own}", seen.peer);
    let known = identity_of(scene, Node::B, offset, own)?;
    ensure!(known.as_deref() == Some(IDENTITY), "the server's agent took {pod} for {known:?}");
    Ok(())
}
