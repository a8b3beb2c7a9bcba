//! A sandbox whose objects are in a real API server: what is applied to its manifests is there, with the server's own UIDs, and
//! what is built on the machine is named for these. The mesh on it is `tour`'s.

use std::fs;

use anyhow::{Context, Result, ensure};
use culvert_tests::command;
use culvert_tests::sandbox::{Node, Plan, PodPlan, Sandbox, Source, expect_no_traces, own_name, place_of};
use serde_json::Value;

const POLICY: &str = "policy.yaml";

fn strict(name: &str) -> String {
    format!(
        "---\napiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {{name: {name}, namespace: test}}\n\
         spec: {{mtls: {{mode: STRICT}}}}\n"
    )
}

/// One for all, since it takes seconds to build: what is applied, changed, dropped from a file, deleted, and taken down.
#[test]
fn manifests_are_applied_to_an_api_server_as_to_a_folder() -> Result<()> {
    let instance = own_name("cluster");
    let plan = Plan::bookinfo(&instance).source(Source::Api);
    let mut sandbox = Sandbox::build(plan.clone())?;
    let kubectl = sandbox.kubectl().display().to_string();
    // As a user types it.
    let get =
        |arguments: &str| -> Result<String> { command::run("sh", &["-c", &format!("{kubectl} get {arguments}")]) };
    let field = |what: &str, path: &str| get(&format!("{what} -o 'jsonpath={path}'"));

    // The pods run, with the addresses that they have and the UIDs that their control groups are named for.
    for key in ["test/nginx", "default/productpage"] {
        let pod = sandbox.pod(key)?;
        let (namespace, name) = key.split_once('/').context("a namespace")?;
        let shown =
            field(&format!("pod -n {namespace} {name}"), "{.metadata.uid} {.status.phase} {.status.podIPs[*].ip}")?;
        ensure!(shown == format!("{} Running {} {}", pod.uid, pod.v4, pod.v6), "{key}: {shown}");
        let cgroup = pod.place.cgroup.display().to_string();
        ensure!(cgroup.contains(&pod.uid) || cgroup.contains(&pod.uid.replace('-', "_")), "{key}: {cgroup}");
        ensure!(pod.place.cgroup.is_dir(), "{cgroup} is there");
        // Another process knows the plan alone: `cargo xtask shell`.
        ensure!(place_of(&plan, key)?.cgroup == pod.place.cgroup, "{key}: a shell would run elsewhere");
        let file = fs::read_to_string(sandbox.manifests().path().join(format!("pod-{namespace}-{name}.yaml")))?;
        ensure!(file.contains(&format!("uid: {}\n", pod.uid)), "{file}");
    }
    let service = field("service -n default productpage", "{.spec.clusterIPs[*]}")?;
    ensure!(service == "10.96.0.10 fd00:10:96::a", "{service}");
    let slices: Value =
        serde_json::from_str(&get("endpointslices -n default -l kubernetes.io/service-name=productpage -o json")?)?;
    let target = &slices["items"][0]["endpoints"][0]["targetRef"]["uid"];
    ensure!(*target == *sandbox.pod("default/productpage")?.uid, "{target}");
    let node = field("node node-b", "{.status.addresses[0].address} {.spec.podCIDR}")?;
    ensure!(node == "172.30.0.2 10.244.2.0/24", "{node}");
    let agent = field("pod -n istio-system culvert-a", "{.spec.nodeName} {.spec.hostNetwork} {.status.podIP}")?;
    ensure!(agent == "node-a true 172.30.0.1", "{agent}");

    // A file is the objects that it describes, no more and no fewer.
    let policies = || field("peerauthentications -A", "{.items[*].metadata.name}");
    sandbox.manifests().apply(POLICY, &(strict("one") + &strict("two")))?;
    ensure!(policies()? == "one two", "{}", policies()?);
    sandbox.manifests().apply(POLICY, &(strict("two").replace("STRICT", "PERMISSIVE") + &strict("three")))?;
    ensure!(policies()? == "three two", "{}", policies()?);
    ensure!(field("peerauthentication -n test two", "{.spec.mtls.mode}")? == "PERMISSIVE", "it was changed");
    sandbox.manifests().delete(POLICY)?;
    sandbox.manifests().delete(POLICY)?;
    ensure!(policies()?.is_empty(), "{}", policies()?);
    // What the server refuses is an error in its words, and changes nothing.
    let wrong = strict("one").replace("STRICT", "[STRICT]");
    let refused = sandbox.manifests().apply(POLICY, &wrong).err().context("a mode is a word")?;
    ensure!(format!("{refused:#}").contains("spec.mtls.mode"), "{refused:#}");
    ensure!(policies()?.is_empty() && !sandbox.manifests().path().join(POLICY).exists(), "nothing was written");

    // A manifest that was read from the folder, changed, and applied again.
    let file = "pod-test-nginx.yaml";
    let text = fs::read_to_string(sandbox.manifests().path().join(file))?;
    sandbox.manifests().apply(file, &text.replace("    app: nginx\n", "    app: nginx\n    version: v2\n"))?;
    let label = || field("pod -n test nginx", "{.metadata.labels.version}|{.metadata.uid}");
    ensure!(label()? == format!("v2|{}", sandbox.pod("test/nginx")?.uid), "{}", label()?);
    sandbox.manifests().apply(file, &text)?;
    ensure!(label()?.starts_with('|'), "a label that is not written any more is gone: {}", label()?);

    // A pod comes, and goes.
    sandbox.add_pod(PodPlan::new(Node::B, "test", "late").http(&[8080]))?;
    let late = sandbox.pod("test/late")?.clone();
    ensure!(field("pod -n test late", "{.metadata.uid} {.status.podIP}")? == format!("{} {}", late.uid, late.v4));
    ensure!(late.place.cgroup.display().to_string().contains(&late.uid), "{}", late.place.cgroup.display());
    sandbox.delete_pod("test/late")?;
    ensure!(get("pods -n test -o name")? == "pod/legacy-app\npod/nginx\n", "{}", get("pods -n test -o name")?);

    sandbox.take_down()?;
    expect_no_traces(&instance)
}
