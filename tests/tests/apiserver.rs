//! The API server of the tests itself: what a later scenario shows is worth only as much as this ground. That it can be stopped,
//! killed and made to forget is what [D.2] and [C.11] are tested by.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use culvert_tests::apiserver::{ApiPlan, ApiServer, assets, shared};
use culvert_tests::command;
use culvert_tests::sandbox::{expect_no_traces, own_name, sweep};
use nix::sys::signal::Signal;
use serde_json::Value;

/// Tells the process that is to be killed how to name its API server.
const CRASH_INSTANCE: &str = "CULVERT_CRASH_TEST_API";
/// What the API server learns from etcd it serves at once; a grant of RBAC takes 30 ms.
const SOON: Duration = Duration::from_secs(10);

/// A pod that a scheduler has placed; the API server takes its status from whoever is its kubelet.
fn pod(namespace: &str, name: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: {namespace}, labels: {{app: {name}}}}}\n\
         spec: {{nodeName: n1, containers: [{{name: c, image: x}}]}}\n"
    )
}

/// `kubectl` and what of an object it prints.
fn get(server: &ApiServer, namespace: &str, what: &str, path: &str) -> Result<String> {
    server.kubectl(&["get", what, "--namespace", namespace, "--output", &format!("jsonpath={path}")])
}

/// The events of a watch of a resource of the namespace `life` that begins at a version of it, for a second.
fn watch(server: &ApiServer, resource: &str, from: &str) -> Result<Vec<Value>> {
    let path = format!("/api/v1/namespaces/life/{resource}?watch=1&resourceVersion={from}&timeoutSeconds=1");
    let said = server.kubectl(&["get", "--raw", &path])?;
    serde_json::Deserializer::from_str(&said).into_iter().collect::<Result<_, _>>().with_context(|| said.clone())
}

/// Fails unless the only event says that the version is too old (410).
fn expect_gone(events: &[Value]) -> Result<()> {
    let [event] = events else { bail!("not one event: {events:?}") };
    ensure!(event["type"] == "ERROR" && event["object"]["code"] == 410, "{event}");
    Ok(())
}

#[test]
fn what_is_applied_is_there_and_a_placed_pod_runs_once_its_status_says_so() -> Result<()> {
    let server = shared()?;
    server.namespace("harness-apply")?;
    server.apply(&pod("harness-apply", "web"))?;
    let uid = get(&server, "harness-apply", "pod/web", "{.metadata.uid}")?;
    ensure!(uid.len() == 36, "the server chose the UID {uid:?}");
    let status = r#"{"status":{"phase":"Running","podIP":"10.61.1.7","podIPs":[{"ip":"10.61.1.7"}]}}"#;
    let patch = ["patch", "pod/web", "--namespace", "harness-apply", "--subresource", "status", "--patch", status];
    server.kubectl(&patch)?;
    let shown = get(&server, "harness-apply", "pod/web", "{.status.phase} {.status.podIP}")?;
    ensure!(shown == "Running 10.61.1.7", "{shown}");

    let version: Value = serde_json::from_str(&server.kubectl(&["get", "--raw", "/version"])?)?;
    // A set of the environment has a version of its own.
    if std::env::var_os(assets::VARIABLE).is_none() {
        ensure!(version["gitVersion"] == format!("v{}", assets::KUBERNETES), "{version}");
    }
    // A controller made the account that the pod runs under, and the certificate that it would trust the server by.
    let account = get(&server, "harness-apply", "pod/web", "{.spec.serviceAccountName}")?;
    ensure!(account == "default", "{account}");
    let root = command::wait_for("the root certificate is published", SOON, || {
        Ok(get(&server, "harness-apply", "configmap/kube-root-ca.crt", r"{.data.ca\.crt}").ok())
    })?;
    ensure!(root == fs::read_to_string(server.root_certificate())?, "another root certificate: {root}");

    server.kubectl(&["delete", "pod/web", "--namespace", "harness-apply", "--grace-period=0", "--force"])?;
    let gone = server.kubectl(&["get", "pod/web", "--namespace", "harness-apply"]);
    ensure!(gone.is_err_and(|error| format!("{error:#}").contains("NotFound")), "it was deleted");
    Ok(())
}

/// What the API server refuses is an error with its own words.
#[test]
fn rbac_denies_whoever_has_no_role_and_allows_what_a_role_says() -> Result<()> {
    let server = shared()?;
    server.namespace("harness-rbac")?;
    let reader = server.kubeconfig("harness:reader", Some("harness-readers"))?;
    let read = |what: &str| server.kubectl_as(&reader, &["get", what, "--namespace", "harness-rbac"], None);
    let denied = format!("{:#}", read("pods").err().context("nobody allowed it")?);
    for words in ["Forbidden", "\"harness:reader\"", "cannot list resource \"pods\""] {
        ensure!(denied.contains(words), "{words} is not in: {denied}");
    }
    server.apply(
        "apiVersion: rbac.authorization.k8s.io/v1\nkind: Role\nmetadata: {name: reader, namespace: harness-rbac}\n\
         rules: [{apiGroups: [''], resources: [pods], verbs: [get, list]}]\n---\n\
         apiVersion: rbac.authorization.k8s.io/v1\nkind: RoleBinding\nmetadata: {name: reader, namespace: harness-rbac}\n\
         roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: reader}\n\
         subjects: [{apiGroup: rbac.authorization.k8s.io, kind: Group, name: harness-readers}]\n",
    )?;
    command::wait_for("the role is at work", SOON, || Ok(read("pods").is_ok().then_some(())))?;
    let denied = read("secrets").err().context("only pods were allowed")?;
    ensure!(format!("{denied:#}").contains("cannot list resource \"secrets\""), "{denied:#}");

    // A token that is bound to a pod says so to whoever reviews it for its audience.
    server.apply(&pod("harness-rbac", "agent"))?;
    let token = server.token("harness-rbac", "default", "istio-ca", Some("agent"))?;
    let review = |audience: &str| -> Result<Value> {
        let review = serde_json::json!({
            "apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview",
            "spec": { "token": token, "audiences": [audience] },
        });
        let said = server.kubectl_with(&["create", "--filename", "-", "--output", "json"], &review.to_string())?;
        Ok(serde_json::from_str(&said)?)
    };
    let good = review("istio-ca")?;
    let pods = &good["status"]["user"]["extra"]["authentication.kubernetes.io/pod-name"];
    ensure!(good["status"]["authenticated"] == true && pods[0] == "agent", "{}", good["status"]);
    let other = review("other")?;
    ensure!(other["status"]["authenticated"] != true, "{}", other["status"]);
    Ok(())
}

#[test]
fn a_crd_with_a_rule_in_cel_is_served_and_the_rule_is_kept() -> Result<()> {
    let server = shared()?;
    server.namespace("harness-crd")?;
    server.apply(
        "apiVersion: apiextensions.k8s.io/v1\nkind: CustomResourceDefinition\nmetadata: {name: ranges.harness.culvert.test}\n\
         spec:\n  group: harness.culvert.test\n  scope: Namespaced\n  names: {plural: ranges, singular: range, kind: Range}\n  versions:\n  \
         - name: v1\n    served: true\n    storage: true\n    schema:\n      openAPIV3Schema:\n        type: object\n        properties:\n          \
         spec:\n            type: object\n            properties: {min: {type: integer}, max: {type: integer}}\n            \
         x-kubernetes-validations: [{rule: 'self.min <= self.max', message: 'min is above max'}]\n",
    )?;
    let range = |name: &str, min: u8| {
        format!(
            "apiVersion: harness.culvert.test/v1\nkind: Range\nmetadata: {{name: {name}, namespace: harness-crd}}\nspec: {{min: {min}, max: 2}}\n"
        )
    };
    command::wait_for("the new kind is served", SOON, || Ok(server.apply(&range("good", 1)).is_ok().then_some(())))?;
    let refused = server.apply(&range("bad", 3)).err().context("3 is above 2")?;
    ensure!(format!("{refused:#}").contains("min is above max"), "{refused:#}");
    Ok(())
}

/// The life of one server: an end in order and a crash keep what there is, and each way to forget history ends in 410.
#[test]
fn a_restart_keeps_objects_and_history_is_forgotten_by_a_kill_and_by_compaction() -> Result<()> {
    let mut plan = ApiPlan { controllers: false, ..ApiPlan::default() };
    plan.flags = vec!["--watch-cache-sizes=pods#0".to_owned()];
    let instance = plan.instance.clone();
    let server = ApiServer::start_as(plan)?;
    server.namespace("life")?;
    server.apply(&pod("life", "web"))?;
    let (uid, from) = {
        let shown = get(&server, "life", "pod/web", "{.metadata.uid} {.metadata.resourceVersion}")?;
        let (uid, version) = shown.split_once(' ').context("two words")?;
        (uid.to_owned(), version.to_owned())
    };
    // As long as nothing is forgotten, a watch goes on from there.
    server.kubectl(&["label", "pod/web", "--namespace", "life", "step=one"])?;
    let events = watch(&server, "pods", &from)?;
    ensure!(events.len() == 1 && events[0]["type"] == "MODIFIED", "{events:?}");

    // What was the last change when history is forgotten is not forgotten yet.
    server.kubectl(&["label", "pod/web", "--namespace", "life", "step=two", "--overwrite"])?;
    let revision = server.compact()?;
    ensure!(revision > from.parse()?, "compacted at {revision}, before {from}");
    expect_gone(&watch(&server, "pods", &from)?).context("after a compaction")?;

    // A server that is frozen answers nothing, and goes on.
    server.signal(Signal::SIGSTOP)?;
    let asked = server.kubectl(&["get", "namespaces", "--request-timeout=1s"]);
    server.signal(Signal::SIGCONT)?;
    ensure!(asked.is_err(), "a frozen server answered");

    server.stop()?;
    ensure!(server.pid().is_err() && server.kubectl(&["get", "namespaces"]).is_err(), "it is stopped");
    let stopped = server.stop().err().context("it is stopped already")?;
    ensure!(stopped.to_string().contains("does not run"), "{stopped:#}");
    server.start_again()?;
    ensure!(get(&server, "life", "pod/web", "{.metadata.uid}")? == uid, "the pod is another one");

    // Of service accounts the server keeps a history, from its own start on.
    const ACCOUNTS: &str = "/api/v1/namespaces/life/serviceaccounts";
    let listed: Value = serde_json::from_str(&server.kubectl(&["get", "--raw", ACCOUNTS])?)?;
    let from = listed["metadata"]["resourceVersion"].as_str().context("the version of a list")?;
    server.kubectl(&["label", "serviceaccount/default", "--namespace", "life", "step=two"])?;
    let events = watch(&server, "serviceaccounts", from)?;
    ensure!(events.len() == 1 && events[0]["type"] == "MODIFIED", "{events:?}");
    server.kill()?;
    ensure!(server.pid().is_err(), "it is killed");
    server.start_again()?;
    expect_gone(&watch(&server, "serviceaccounts", from)?).context("after a kill")?;
    ensure!(get(&server, "life", "pod/web", "{.metadata.uid}")? == uid, "the pod is another one after a kill");
    drop(server);
    expect_no_traces(&instance)
}

/// Agents of a sandbox outlive their owner; an API server of 300 MB does not.
#[test]
fn a_killed_owner_takes_its_processes_along_and_the_next_start_removes_the_rest() -> Result<()> {
    const SELF: &str = "a_killed_owner_takes_its_processes_along_and_the_next_start_removes_the_rest";
    if let Ok(instance) = std::env::var(CRASH_INSTANCE) {
        return be_killed(instance);
    }
    let instance = own_name("api-crash");
    let mut owner = Command::new(std::env::current_exe()?);
    owner.env(CRASH_INSTANCE, &instance).args(["--exact", SELF, "--nocapture"]);
    let mut owner = owner.stdout(Stdio::null()).stderr(Stdio::null()).spawn().context("start the owner")?;
    let dir = Path::new("/run").join(format!("culvert-{instance}"));
    let up = command::wait_for("the owner's API server is up", Duration::from_secs(90), || {
        ensure!(owner.try_wait()?.is_none(), "the owner ended");
        Ok(dir.join("up").exists().then_some(()))
    });
    let processes = of_instance(&instance);
    owner.kill()?;
    owner.wait()?;
    up?;
    let processes = processes?;
    ensure!(processes.len() == 3, "etcd, the server and the controllers: {processes:?}");
    command::wait_for("its processes ended with it", SOON, || Ok(of_instance(&instance)?.is_empty().then_some(())))?;
    sweep()?;
    expect_no_traces(&instance)
}

/// The process that the test kills: it has an API server up, and waits.
fn be_killed(instance: String) -> Result<()> {
    // The thread that asks for it ends before the process does; what was started must not.
    let asked = std::thread::spawn(move || ApiServer::start_as(ApiPlan { instance, ..ApiPlan::default() }));
    let server = asked.join().ok().context("a panic")??;
    fs::write(server.dir().join("up"), "")?;
    std::thread::sleep(Duration::from_secs(120));
    bail!("nobody killed it")
}

/// The processes that were told a directory of an API server.
fn of_instance(instance: &str) -> Result<Vec<String>> {
    let told = format!("/culvert-{instance}/");
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")? {
        // A process that ends meanwhile is none; one that has ended and was not waited for has no arguments.
        let arguments = fs::read(entry?.path().join("cmdline")).unwrap_or_default();
        let arguments = String::from_utf8_lossy(&arguments).replace('\0', " ");
        if arguments.contains(&told) && !arguments.contains("kubectl ") {
            found.push(arguments);
        }
    }
    Ok(found)
}
