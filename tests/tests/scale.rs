//! A large cluster in a real API server: what an agent costs that knows ten thousand pods of other nodes, and hears of each change
//! ([D.1], [D.2]). `cargo xtask test --full` has fifty thousand.

use std::collections::BTreeMap;
use std::fs;
use std::net::Ipv4Addr;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use culvert::source::kubernetes;
use culvert_tests::apiserver::ApiServer;
use culvert_tests::programs::HttpResult;
use culvert_tests::sandbox::{Family, MeshPlan, Node, Plan, Sandbox, Source, built, own_name};
use culvert_tests::{command, full, patience, record};
use k8s_openapi::api::core::v1::Pod;
use kube::api::{DeleteParams, DynamicObject, Patch, PatchParams, PostParams};
use kube::core::{ApiResource, GroupVersionKind};
use kube::{Api, Client};
use serde_json::{Value, json};

/// Pods of a namespace.
const EACH: usize = 1_000;
/// Policies, besides them.
const POLICIES: usize = 1_000;
/// Changed at each step of the churn.
const CHANGED: usize = 300;
/// Requests at once.
const AT_ONCE: usize = 8;
/// Memory that an agent may have as a whole with all of them, and for each pod of another node. What the allocator keeps for
/// later is in it, a MiB more or less.
const MOST_KIB: u64 = 80 << 10;
const MOST_BYTES_EACH: u64 = 1280;
/// Until an agent has taken in what was written.
const LIMIT: Duration = Duration::from_secs(120);

fn namespace(nth: usize) -> String {
    format!("load-{}", nth / EACH)
}

fn name(nth: usize) -> String {
    // As a Deployment's: application, hash of the template, five characters.
    format!("orders-{:x}-{nth:05}", 0x5d4c_8f7b_u32)
}

/// As large as pods are: two containers with what a chart gives them.
fn pod(nth: usize) -> Value {
    let probe = json!({"httpGet": {"path": "/healthz", "port": "http"}, "periodSeconds": 10, "timeoutSeconds": 1});
    let container = |name: &str, port: u16| {
        json!({
            "name": name,
            "image": format!("registry.example.org/shop/{name}@sha256:{:064x}", 0x9f86_d081_u32),
            "ports": [{"name": if port == 8080 { "http" } else { "metrics" }, "containerPort": port}],
            "env": (0..8).map(|n| json!({"name": format!("SETTING_{n}"), "value": format!("the value of setting {n}")})).collect::<Vec<_>>(),
            "resources": {"requests": {"cpu": "100m", "memory": "128Mi"}, "limits": {"memory": "256Mi"}},
            "volumeMounts": [{"name": "config", "mountPath": "/etc/orders", "readOnly": true}],
            "readinessProbe": if port == 8080 { probe.clone() } else { Value::Null },
        })
    };
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "namespace": namespace(nth),
            "name": name(nth),
            "labels": {
                "app.kubernetes.io/name": "orders",
                "app.kubernetes.io/instance": format!("orders-{}", nth % 50),
                "app.kubernetes.io/version": "1.4.2",
                "pod-template-hash": "5d4c8f7b",
            },
            "annotations": {"checksum/config": format!("{:064x}", nth), "prometheus.io/scrape": "true"},
        },
        "spec": {
            "nodeName": "elsewhere",
            "automountServiceAccountToken": false,
            "containers": [container("orders", 8080), container("exporter", 9090)],
            "volumes": [{"name": "config", "configMap": {"name": "orders"}}],
        },
    })
}

/// What its kubelet says of it.
fn status(nth: usize) -> Value {
    let number = u32::try_from(nth).unwrap_or(u32::MAX);
    let address = Ipv4Addr::from_bits(Ipv4Addr::new(10, 128, 0, 0).to_bits() + number);
    let condition = |kind: &str| json!({"type": kind, "status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z"});
    let conditions =
        ["PodReadyToStartContainers", "Initialized", "Ready", "ContainersReady", "PodScheduled"].map(condition);
    json!({"status": {
        "phase": "Running",
        "podIP": address,
        "podIPs": [{"ip": address}],
        "startTime": "2026-01-01T00:00:00Z",
        "conditions": conditions,
    }})
}

fn policy(nth: usize, port: u16) -> Value {
    json!({
        "apiVersion": "security.istio.io/v1",
        "kind": "AuthorizationPolicy",
        "metadata": {"namespace": namespace(0), "name": format!("callers-{nth}")},
        "spec": {
            "selector": {"matchLabels": {"app.kubernetes.io/instance": format!("orders-{nth}")}},
            "action": "ALLOW",
            "rules": [{
                "from": [{"source": {"principals": [format!("cluster.local/ns/shop/sa/caller-{nth}")]}}],
                "to": [{"operation": {"ports": [port.to_string()]}}],
            }],
        },
    })
}

/// Whoever writes to the API server, many at once.
struct Writer<'a> {
    sandbox: &'a Sandbox,
    kubeconfig: &'a Path,
}

impl Writer<'_> {
    /// Does it for each number, some at once.
    fn each(
        &self,
        numbers: std::ops::Range<usize>,
        write: impl AsyncFn(&Client, usize) -> kube::Result<()> + Sync,
    ) -> Result<()> {
        let next = AtomicUsize::new(numbers.start);
        self.sandbox.node_place(Node::A).inside(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(async {
                let client = kubernetes::client(Some(self.kubeconfig)).await?;
                let one = async || -> Result<()> {
                    loop {
                        let nth = next.fetch_add(1, Ordering::Relaxed);
                        if nth >= numbers.end {
                            return Ok(());
                        }
                        write(&client, nth).await.with_context(|| format!("write number {nth}"))?;
                    }
                };
                let all: [_; AT_ONCE] = std::array::from_fn(|_| one());
                futures_util::future::try_join_all(all).await.map(drop)
            })
        })
    }

    fn create_pods(&self, numbers: std::ops::Range<usize>) -> Result<()> {
        self.each(numbers, async |client, nth| {
            let pods = Api::<Pod>::namespaced(client.clone(), &namespace(nth));
            let pod = serde_json::from_value(pod(nth)).map_err(kube::Error::SerdeError)?;
            pods.create(&PostParams::default(), &pod).await?;
            pods.patch_status(&name(nth), &PatchParams::default(), &Patch::Merge(status(nth))).await.map(drop)
        })
    }

    fn delete_pods(&self, numbers: std::ops::Range<usize>) -> Result<()> {
        self.each(numbers, async |client, nth| {
            let pods = Api::<Pod>::namespaced(client.clone(), &namespace(nth));
            pods.delete(&name(nth), &DeleteParams::default().grace_period(0)).await.map(drop)
        })
    }

    /// A label that nothing selects by: what a change costs that changes no verdict.
    fn label_pods(&self, numbers: std::ops::Range<usize>, value: &str) -> Result<()> {
        self.each(numbers, async |client, nth| {
            let pods = Api::<Pod>::namespaced(client.clone(), &namespace(nth));
            let patch = json!({"metadata": {"labels": {"round": value}}});
            pods.patch(&name(nth), &PatchParams::default(), &Patch::Merge(patch)).await.map(drop)
        })
    }

    fn write_policies(&self, numbers: std::ops::Range<usize>, port: u16) -> Result<()> {
        let kind = ApiResource::from_gvk_with_plural(
            &GroupVersionKind::gvk("security.istio.io", "v1", "AuthorizationPolicy"),
            "authorizationpolicies",
        );
        self.each(numbers, async |client, nth| {
            let policies = Api::<DynamicObject>::namespaced_with(client.clone(), &namespace(0), &kind);
            let params = PatchParams::apply("scale").force();
            policies.patch(&format!("callers-{nth}"), &params, &Patch::Apply(policy(nth, port))).await.map(drop)
        })
    }
}

/// The memory of a process when it does not change any more, in KiB.
fn settled(sandbox: &Sandbox, process: &str) -> Result<u64> {
    let mut last = (Instant::now(), sandbox.own_memory(process)?);
    command::wait_for(&format!("the memory of {process} is steady"), LIMIT * patience(), || {
        let now = sandbox.own_memory(process)?;
        if now.abs_diff(last.1) > last.1 / 100 {
            last = (Instant::now(), now);
        }
        Ok((last.0.elapsed() > Duration::from_secs(5)).then_some(now))
    })
}

/// What the agent of node b has received on each of its connections to the API server, in bytes, by its port.
fn received(sandbox: &Sandbox) -> Result<BTreeMap<String, u64>> {
    let text = sandbox.node_place(Node::B).inside(|| {
        command::finish(Command::new("ss").args(["-tinHO", "dst", &format!("{}:6443", Node::A.v4())]), None)
    })?;
    let mut all = BTreeMap::new();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let port = words.nth(3).context("its own end")?.to_owned();
        let bytes = words.find_map(|word| word.strip_prefix("bytes_received:")).unwrap_or("0").parse()?;
        all.insert(port, bytes);
    }
    ensure!(!all.is_empty(), "no connection to the API server: {text}");
    Ok(all)
}

/// Processor time that a process has had.
fn cpu(pid: u32) -> Result<Duration> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let fields: Vec<&str> = stat.rsplit_once(')').context("the name ends")?.1.split_whitespace().collect();
    let ticks: u64 = fields[11].parse::<u64>()? + fields[12].parse::<u64>()?;
    // USER_HZ, which is 100 for every program (time(7)).
    Ok(Duration::from_millis(ticks * 10))
}

/// Waits until both agents know so many pods of the load.
fn known(sandbox: &Sandbox, expected: usize) -> Result<()> {
    for node in Node::ALL {
        command::wait_for(&format!("the agent of {node} knows {expected} pods"), LIMIT * patience(), || {
            let text = sandbox.node_place(node).inside(|| {
                command::finish(Command::new(built("culvert")?).args(["workloads", "--output", "wide"]), None)
            })?;
            Ok((text.lines().filter(|line| line.starts_with("load-")).count() == expected).then_some(()))
        })?;
    }
    Ok(())
}

/// Other watchers of all pods, as many agents' are: each reads what it is sent, and keeps nothing.
fn watchers(server: &ApiServer, count: usize, during: impl FnOnce() -> Result<()>) -> Result<()> {
    let mut all = Vec::new();
    let now: Value = serde_json::from_str(&server.kubectl(&["get", "--raw", "/api/v1/pods?limit=1"])?)?;
    let now = now["metadata"]["resourceVersion"].as_str().context("the version of the list")?;
    for _ in 0..count {
        let mut kubectl = server.kubectl_command(&server.admin())?;
        // From now on, and not all that there is.
        kubectl.args(["get", "--raw", &format!("/api/v1/pods?watch=true&timeoutSeconds=600&resourceVersion={now}")]);
        kubectl.stdout(std::process::Stdio::null());
        all.push(kubectl.spawn().context("start a watcher")?);
    }
    thread::sleep(Duration::from_secs(10));
    let done = during();
    for mut watcher in all {
        // It may have ended already.
        let _ = watcher.kill();
        let _ = watcher.wait();
    }
    done
}

#[test]
fn ten_thousand_pods_of_other_nodes_and_their_churn_are_bounded() -> Result<()> {
    let pods = if full() { 50_000 } else { 10_000 };
    let mut sandbox = Sandbox::build(Plan::bookinfo(&own_name("scale")).source(Source::Api))?;
    sandbox.start_mesh(&MeshPlan::new(built("culvert")?))?;
    let sandbox = sandbox;
    let server = sandbox.manifests().api().context("the sandbox has an API server")?;
    let kubeconfig = server.admin();
    let writer = Writer { sandbox: &sandbox, kubeconfig: &kubeconfig };
    let before = settled(&sandbox, "agent-b")?;

    let begun = Instant::now();
    let mut places = String::new();
    for nth in (0..pods).step_by(EACH) {
        let namespace = namespace(nth);
        places.push_str(&format!(
            "---\napiVersion: v1\nkind: Namespace\nmetadata: {{name: {namespace}, labels: {{istio.io/dataplane-mode: ambient}}}}\n---\n\
             apiVersion: v1\nkind: ServiceAccount\nmetadata: {{name: default, namespace: {namespace}}}\n"
        ));
    }
    server.apply(&places)?;
    for some in (0..pods).step_by(EACH) {
        let stored = (some..(some + EACH).min(pods)).map(|nth| {
            let mut pod = pod(nth);
            pod["status"] = status(nth)["status"].take();
            let metadata = &mut pod["metadata"];
            metadata["uid"] = json!(format!("{nth:08x}-0000-4000-8000-000000000000"));
            metadata["creationTimestamp"] = json!("2026-01-01T00:00:00Z");
            (format!("/registry/pods/{}/{}", namespace(nth), name(nth)), pod)
        });
        server.store(&stored.collect::<Vec<_>>())?;
    }
    known(&sandbox, pods)?;
    let loaded = settled(&sandbox, "agent-b")?;
    let each = (loaded.saturating_sub(before) << 10) / pods as u64;
    record(&format!(
        "large cluster: {pods} pods of another node, written in {:.0} s: an agent has {:.1} MiB of its own ({:.1} without them), {each} bytes each",
        begun.elapsed().as_secs_f64(),
        loaded as f64 / 1024.0,
        before as f64 / 1024.0,
    ))?;

    writer.write_policies(0..POLICIES, 8080)?;

    // What a change costs: bytes for each agent, and the API server's time for it and everybody who watches.
    let begun = received(&sandbox)?;
    let (server_cpu, agent_cpu) = (cpu(server.pid()?)?, cpu(sandbox.pid("agent-b")?)?);
    writer.label_pods(0..CHANGED, "one")?;
    thread::sleep(Duration::from_secs(3));
    let (server_cpu, agent_cpu) = (cpu(server.pid()?)? - server_cpu, cpu(sandbox.pid("agent-b")?)? - agent_cpu);
    let now = received(&sandbox)?;
    let bytes: u64 = now.iter().map(|(port, bytes)| bytes - begun.get(port).unwrap_or(&0)).sum();
    record(&format!(
        "large cluster: a changed pod is {} bytes to each agent, {:.2} ms of an agent's CPU, {:.2} ms of the API server's with the write and two agents",
        bytes / CHANGED as u64,
        agent_cpu.as_secs_f64() * 1e3 / CHANGED as f64,
        server_cpu.as_secs_f64() * 1e3 / CHANGED as f64,
    ))?;
    ensure!(bytes >= (CHANGED * 1000) as u64, "{bytes} bytes of {CHANGED} changes: not all of them came");
    if full() {
        watchers(server, 50, || {
            let before = cpu(server.pid()?)?;
            writer.label_pods(0..CHANGED, "two")?;
            thread::sleep(Duration::from_secs(3));
            let more = cpu(server.pid()?)? - before;
            record(&format!(
                "large cluster: with 50 more watchers of pods, {:.2} ms of the API server's CPU for each change",
                more.as_secs_f64() * 1e3 / CHANGED as f64
            ))
        })?;
    }

    // Pods come and go, and policies change, while a policy of this node's own pods must take effect.
    let (deny, productpage) = ("deny.yaml", sandbox.pod("default/productpage")?.at(Family::V4, 9080));
    let call = || -> Result<HttpResult> { sandbox.http("test/nginx", productpage, "scale") };
    ensure!(call()?.status == Some(200), "{:?}", call()?);
    let mut slowest = Duration::ZERO;
    thread::scope(|scope| -> Result<()> {
        let churn = scope.spawn(|| -> Result<()> {
            for round in 0..if full() { 5 } else { 1 } {
                writer.delete_pods(0..CHANGED)?;
                writer.write_policies(0..POLICIES / 2, 9000 + round)?;
                writer.create_pods(0..CHANGED)?;
            }
            Ok(())
        });
        while !churn.is_finished() {
            sandbox.manifests().apply(
                deny,
                "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: none, namespace: default}\nspec: {}\n",
            )?;
            let written = Instant::now();
            command::wait_for("the policy is in force", LIMIT * patience(), || {
                Ok(call()?.status.is_none().then_some(()))
            })?;
            slowest = slowest.max(written.elapsed());
            sandbox.manifests().delete(deny)?;
            command::wait_for("the policy is gone", LIMIT * patience(), || {
                Ok((call()?.status == Some(200)).then_some(()))
            })?;
        }
        churn.join().map_err(|_| anyhow!("the churn panicked"))?
    })?;
    known(&sandbox, pods)?;
    let after = settled(&sandbox, "agent-b")?;
    record(&format!(
        "large cluster: after pods and policies came and went, {:.1} MiB; a policy written meanwhile was in force {:.1} s after that at most",
        after as f64 / 1024.0,
        slowest.as_secs_f64()
    ))?;
    ensure!(each <= MOST_BYTES_EACH, "{each} bytes for each pod of another node");
    ensure!(after <= MOST_KIB, "{after} KiB");
    ensure!(call()?.status == Some(200), "{:?}", call()?);
    Ok(())
}
