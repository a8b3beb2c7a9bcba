//! What deploy/ gives a cluster: kustomize and Helm render the same objects, an API server takes them and loses them again, and
//! whatever an agent may do there and on its node says which module needs it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use culvert_tests::apiserver::{self, ApiPlan, ApiServer, assets};
use culvert_tests::{command, patience};
use serde_json::{Value, json};

/// The namespace that a release must have.
const NAMESPACE: &str = "istio-system";
/// Until controllers have made what a namespace has.
const PREPARED: Duration = Duration::from_secs(30);
/// Renderings that are to be the same: by kustomize from a folder, by Helm with a file of values.
const SAME: [(&str, &str); 3] =
    [("base", "values.yaml"), ("overlays/kind", "values-kind.yaml"), ("overlays/restricted", "values-restricted.yaml")];

fn deploy(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy").join(path)
}

fn read(path: &str) -> Result<String> {
    let path = deploy(path);
    fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))
}

fn kustomize(server: &ApiServer, folder: &str) -> Result<String> {
    server.kubectl(&["kustomize", &deploy(folder).display().to_string()])
}

/// A Helm that keeps nothing and knows no cluster but one that it is given.
fn helm(arguments: &[&str]) -> Result<String> {
    let program = assets::helm()?;
    ensure!(program.is_file(), "{} is not built: `cargo xtask setup` does it", program.display());
    let home = tempfile::tempdir()?;
    let mut helm = Command::new(program);
    for name in ["HELM_CACHE_HOME", "HELM_CONFIG_HOME", "HELM_DATA_HOME"] {
        helm.env(name, home.path());
    }
    helm.env_remove("KUBECONFIG").args(arguments);
    command::finish(&mut helm, None)
}

/// Renders the chart for the mesh's namespace, without what only Helm knows: hooks.
fn template(arguments: &[&str]) -> Result<String> {
    template_with_hooks(&[&["--no-hooks"], arguments].concat())
}

fn template_with_hooks(arguments: &[&str]) -> Result<String> {
    let chart = deploy("helm/culvert").display().to_string();
    helm(&[&["template", "culvert", &chart, "--namespace", NAMESPACE], arguments].concat())
}

/// Objects by kind, namespace and name.
type Objects = BTreeMap<String, Value>;

/// The objects of a stream of YAML documents, as they are written.
fn objects(server: &ApiServer, manifests: &str) -> Result<Objects> {
    let text =
        server.kubectl_with(&["create", "--dry-run=client", "--output", "json", "--filename", "-"], manifests)?;
    let documents = serde_json::Deserializer::from_str(&text).into_iter().collect::<Result<Vec<Value>, _>>();
    let mut objects = Objects::new();
    for object in documents.with_context(|| text.clone())? {
        let name = |path| object.pointer(path).and_then(Value::as_str).unwrap_or("-").to_owned();
        let key = [name("/kind"), name("/metadata/namespace"), name("/metadata/name")].join("/");
        ensure!(objects.insert(key.clone(), object).is_none(), "{key} is there twice");
    }
    Ok(objects)
}

/// Fails with the first place at which two values differ.
fn same(place: &str, one: &Value, other: &Value) -> Result<()> {
    match (one, other) {
        (Value::Object(ours), Value::Object(theirs)) => {
            for key in ours.keys().chain(theirs.keys()) {
                same(&format!("{place}.{key}"), &one[key], &other[key])?;
            }
        }
        (Value::Array(ours), Value::Array(theirs)) if ours.len() == theirs.len() => {
            for (index, (ours, theirs)) in ours.iter().zip(theirs).enumerate() {
                same(&format!("{place}[{index}]"), ours, theirs)?;
            }
        }
        _ => ensure!(one == other, "{place}: kustomize has {one}, and Helm {other}"),
    }
    Ok(())
}

#[test]
fn kustomize_and_helm_give_the_same_objects() -> Result<()> {
    let server = apiserver::shared()?;
    for (folder, values) in SAME {
        let values = deploy("helm/culvert").join(values).display().to_string();
        let ours = objects(&server, &kustomize(&server, folder)?)?;
        let theirs = objects(&server, &template(&["--values", &values])?)?;
        ensure!(ours.len() > 10, "{folder}: {:?}", ours.keys());
        let names = |of: &Objects| of.keys().cloned().collect::<BTreeSet<_>>();
        ensure!(names(&ours) == names(&theirs), "{folder}: {:?}, and {values}: {:?}", names(&ours), names(&theirs));
        for (name, object) in &ours {
            same(&format!("{folder}: {name}"), object, &theirs[name])?;
        }
        // What is removed with a release, or with what was applied, is not what others rely on.
        let kept = ours.keys().find(|name| name.starts_with("Namespace/") || name.starts_with("CustomResource"));
        ensure!(kept.is_none(), "{folder} has {kept:?}");
    }
    // Other values are seen.
    let other = objects(&server, &template(&["--set", "image.repository=registry.example/mesh,image.tag=v2"])?)?;
    let ours = objects(&server, &kustomize(&server, "base")?)?;
    let agent = "DaemonSet/istio-system/culvert";
    let error = same(agent, &ours[agent], &other[agent]).err().context("another image is a difference")?;
    ensure!(format!("{error:#}").contains("registry.example/mesh:v2"), "{error:#}");
    Ok(())
}

/// Each value does what values.yaml says of it.
#[test]
fn values_reach_the_objects() -> Result<()> {
    let server = apiserver::shared()?;
    let values = [
        "image.pullPolicy=Always",
        "image.pullSecrets[0].name=registry",
        "ca.address=istiod.istio-system.svc:15012",
        "ca.serverName=ca.example",
        "agent.prepareNode=false",
        "agent.drainSeconds=20",
        "agent.readinessAddress=127.0.0.1:15021",
        "agent.logLevel=debug",
        "agent.extraArgs[0]=--gate=open",
        "agent.nodeSelector.pool=mesh",
        "agent.resources.limits.memory=1Gi",
        "agent.priorityClassName=mine",
        "agent.appArmorProfile.type=Localhost",
        "agent.appArmorProfile.localhostProfile=culvert",
        "agent.seLinuxType=",
        "control.enabled=false",
        "resourceQuota.enabled=true",
    ];
    let all = objects(&server, &template(&["--set-string", "agent.seLinuxType=", "--set", &values.join(",")])?)?;
    ensure!(!all.keys().any(|name| name.contains("culvert-control") || name.contains("Webhook")), "{:?}", all.keys());
    ensure!(all.contains_key("ResourceQuota/istio-system/culvert-critical-pods"), "{:?}", all.keys());
    let pod = &all["DaemonSet/istio-system/culvert"]["spec"]["template"]["spec"];
    let agent = &pod["containers"][0];
    let wanted = json!([
        "agent",
        "--ca-address=istiod.istio-system.svc:15012",
        "--ca-server-name=ca.example",
        "--ca-root=/var/run/secrets/istio/root-cert.pem",
        "--ca-token=/var/run/secrets/tokens/istio-token",
        "--drain-deadline=20s",
        "--readiness-address=127.0.0.1:15021",
        "--log-level=debug",
        "--gate=open"
    ]);
    for (found, wanted) in [
        (&agent["args"], wanted),
        (&agent["imagePullPolicy"], json!("Always")),
        (&agent["resources"]["limits"]["memory"], json!("1Gi")),
        (&agent["securityContext"]["appArmorProfile"], json!({ "type": "Localhost", "localhostProfile": "culvert" })),
        (&agent["securityContext"]["seLinuxOptions"], Value::Null),
        (&pod["initContainers"], Value::Null),
        (&pod["imagePullSecrets"], json!([{ "name": "registry" }])),
        (&pod["nodeSelector"], json!({ "pool": "mesh" })),
        (&pod["priorityClassName"], json!("mine")),
        (&pod["terminationGracePeriodSeconds"], json!(30)),
    ] {
        ensure!(*found == wanted, "{found} is not {wanted}");
    }
    let more = ["--set", "control.replicas=3,control.extraArgs[0]=--log-level=debug,webhook.enabled=false"];
    let more = objects(&server, &template(&more)?)?;
    let control = &more["Deployment/istio-system/culvert-control"]["spec"];
    ensure!(control["replicas"] == 3, "{control}");
    ensure!(
        control["template"]["spec"]["containers"][0]["args"] == json!(["control", "--log-level=debug"]),
        "{control}"
    );
    ensure!(!more.keys().any(|name| name.contains("Webhook")), "{:?}", more.keys());
    Ok(())
}

#[test]
fn wrong_values_are_refused_with_their_place() -> Result<()> {
    for (values, place) in [
        ("agent.drainSecond=20", "'drainSecond' not allowed"),
        ("agent.drainSeconds=soon", "at '/agent/drainSeconds': got string, want integer"),
        ("agent.drainSeconds=0", "at '/agent/drainSeconds'"),
        ("agent.extraArgs[0]=gate", "at '/agent/extraArgs/0'"),
        ("agent.appArmorProfile.type=unconfined", "at '/agent/appArmorProfile/type'"),
        ("image.pullPolicy=Sometimes", "at '/image/pullPolicy'"),
        ("image.repository=", "at '/image/repository'"),
        ("ca.address=istiod", "at '/ca/address'"),
        ("control.replicas=0", "at '/control/replicas'"),
        ("webhooks.enabled=true", "'webhooks' not allowed"),
        ("control.enabled=false", "which control.enabled=false leaves out: set it"),
        ("agent.appArmorProfile.type=Localhost", "set agent.appArmorProfile.localhostProfile"),
    ] {
        let error = template(&["--set", values]).err().with_context(|| format!("{values} was taken"))?;
        ensure!(format!("{error:#}").contains(place), "{values}: {error:#}");
    }
    let chart = deploy("helm/culvert").display().to_string();
    let error = helm(&["template", "culvert", &chart, "--namespace", "mesh"]).err().context("another namespace")?;
    ensure!(format!("{error:#}").contains("install with --namespace istio-system"), "{error:#}");
    Ok(())
}

#[test]
fn helm_finds_no_fault_with_the_chart() -> Result<()> {
    let chart = deploy("helm/culvert").display().to_string();
    for (_, values) in SAME {
        let values = deploy("helm/culvert").join(values).display().to_string();
        helm(&["lint", "--strict", "--namespace", NAMESPACE, "--values", &values, &chart])?;
    }
    Ok(())
}

/// Everything of a server that is not its own business: what was installed is here.
fn inventory(server: &ApiServer) -> Result<BTreeSet<String>> {
    let kinds = "daemonsets,deployments,services,serviceaccounts,configmaps,secrets,roles,rolebindings,clusterroles,clusterrolebindings,\
                 poddisruptionbudgets,validatingwebhookconfigurations,networkpolicies,resourcequotas,namespaces,\
                 customresourcedefinitions";
    let format = "jsonpath={range .items[*]}{.kind}/{.metadata.namespace}/{.metadata.name}{\"\\n\"}{end}";
    Ok(server.kubectl(&["get", kinds, "--all-namespaces", "-o", format])?.lines().map(str::to_owned).collect())
}

/// A server takes each rendering as it is, without a field that it does not know; its pods, too. What is removed again leaves what was there
/// before: the namespace, the definitions, and what they hold.
#[test]
fn an_api_server_takes_all_of_it_and_loses_it_again() -> Result<()> {
    let server = ApiServer::start_as(ApiPlan::default())?;
    let create = |path: &str| server.kubectl(&["create", "--filename", &deploy(path).display().to_string()]);
    create("namespace.yaml")?;
    create("crds")?;
    // What the controllers make in a new namespace is not of what is installed.
    command::wait_for("controllers prepared the namespace", PREPARED * patience(), || {
        let made = ["get", "serviceaccount/default", "configmap/kube-root-ca.crt", "-n", NAMESPACE];
        Ok(server.kubectl(&made).is_ok().then_some(()))
    })?;
    let before = inventory(&server)?;
    for (folder, _) in SAME {
        let manifests = kustomize(&server, folder)?;
        let apply = ["apply", "--validate=strict", "--filename", "-"];
        server.kubectl_with(&[&apply[..], &["--dry-run=server"]].concat(), &manifests)?;
        server.kubectl_with(&apply, &manifests)?;
        pods_are_admitted(&server, &objects(&server, &manifests)?)?;
        server.kubectl_with(&["delete", "--wait", "--filename", "-"], &manifests)?;
        let after = inventory(&server)?;
        ensure!(before == after, "{folder} left {:?}", before.symmetric_difference(&after).collect::<Vec<_>>());
    }
    let (admin, chart) = (server.admin().display().to_string(), deploy("helm/culvert").display().to_string());
    let release = ["culvert", "--namespace", NAMESPACE, "--kubeconfig", &admin];
    helm(&[&["install"], &release[..1], &[&chart], &release[1..]].concat())?;
    let installed = inventory(&server)?;
    ensure!(installed.contains("DaemonSet/istio-system/culvert"), "{installed:?}");
    helm(&[&["upgrade"], &release[..1], &[&chart], &release[1..], &["--set", "agent.logLevel=debug"]].concat())?;
    let arguments = "jsonpath={.spec.template.spec.containers[0].args}";
    let arguments = server.kubectl(&["get", "daemonset", "culvert", "-n", NAMESPACE, "-o", arguments])?;
    ensure!(arguments.contains("--log-level=debug"), "{arguments}");
    // The hook is a Job, and nobody runs it here; on real nodes a scenario of tests/nodes does.
    let hook = template_with_hooks(&["--show-only", "templates/leave.yaml"])?;
    server.kubectl_with(&["create", "--dry-run=server", "--validate=strict", "--filename", "-"], &hook)?;
    helm(&[&["uninstall", "--no-hooks"], &release[..]].concat())?;
    let after = inventory(&server)?;
    ensure!(before == after, "Helm left {:?}", before.symmetric_difference(&after).collect::<Vec<_>>());
    Ok(())
}

/// A pod of each workload passes what admits pods, which a DaemonSet or Deployment that is stored says nothing about.
fn pods_are_admitted(server: &ApiServer, objects: &Objects) -> Result<()> {
    for name in ["DaemonSet/istio-system/culvert", "Deployment/istio-system/culvert-control"] {
        let mut pod = objects[name]["spec"]["template"].clone();
        pod["apiVersion"] = "v1".into();
        pod["kind"] = "Pod".into();
        pod["metadata"]["name"] = "one".into();
        pod["metadata"]["namespace"] = NAMESPACE.into();
        let create = ["create", "--validate=strict", "--dry-run=server", "--filename", "-"];
        server.kubectl_with(&create, &pod.to_string()).with_context(|| name.to_owned())?;
    }
    Ok(())
}

/// A place in a file that needs a reason, and the comment that stands before it.
struct Granted {
    place: String,
    item: String,
    comment: Option<String>,
}

/// The items of every list `key` of a file, each with the first line of the comment right before it.
fn granted(file: &str, key: &str) -> Result<Vec<Granted>> {
    let text = read(file)?;
    let lines: Vec<&str> = text.lines().collect();
    let indent = |line: &str| line.len() - line.trim_start().len();
    let mut found = Vec::new();
    for (start, opening) in lines.iter().enumerate().filter(|(_, line)| line.trim() == format!("{key}:")) {
        let depth = indent(opening);
        let inside =
            |line: &&str| indent(line) > depth || matches!(line.trim_start().as_bytes().first(), Some(b'-' | b'#'));
        let below = lines[start + 1..].iter().take_while(|line| indent(line) >= depth && inside(line));
        for (number, line) in below.enumerate().map(|(offset, line)| (start + 1 + offset, line)) {
            let item = line.trim_start();
            if indent(line) != depth || !item.starts_with("- ") {
                continue;
            }
            let comment = lines[..number].iter().rev().take_while(|line| line.trim_start().starts_with("# ")).last();
            found.push(Granted {
                place: format!("deploy/{file}:{}", number + 1),
                item: item.to_owned(),
                comment: comment.map(|line| line.trim_start()[2..].to_owned()),
            });
        }
    }
    Ok(found)
}

/// Whether a comment begins with modules of the agent: `netns, source::kubernetes: why`.
fn names_modules(comment: &str) -> bool {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../agent/src");
    let is_module = |name: &str| {
        let path = source.join(name.replace("::", "/"));
        !name.is_empty() && (path.is_dir() || path.with_extension("rs").is_file())
    };
    comment.split_once(": ").is_some_and(|(names, why)| !why.is_empty() && names.split(", ").all(is_module))
}

/// How many items all lists of this name have, wherever they are.
fn count(of: &Value, key: &str) -> usize {
    match of {
        Value::Object(fields) => fields
            .iter()
            .map(|(name, value)| match value.as_array() {
                Some(items) if name == key => items.len(),
                _ => count(value, key),
            })
            .sum(),
        Value::Array(items) => items.iter().map(|item| count(item, key)).sum(),
        _ => 0,
    }
}

#[test]
fn every_right_capability_and_mount_names_the_module_that_needs_it() -> Result<()> {
    let server = apiserver::shared()?;
    for (file, key) in [
        ("agent/rbac.yaml", "rules"),
        ("control/rbac.yaml", "rules"),
        ("agent/daemonset.yaml", "add"),
        ("agent/daemonset.yaml", "volumeMounts"),
    ] {
        let found = granted(file, key)?;
        let written: usize = objects(&server, &read(file)?)?.values().map(|object| count(object, key)).sum();
        ensure!(found.len() == written && written > 0, "deploy/{file}: {} of {written} {key} were seen", found.len());
        for Granted { place, item, comment } in found {
            ensure!(
                comment.as_deref().is_some_and(names_modules),
                "{place}: {item}: say in a comment before it which module of agent/src needs it, and why: {comment:?}"
            );
        }
    }
    ensure!(names_modules("netns, source::kubernetes: why") && names_modules("datapath: why"), "modules are known");
    for bad in ["netns", "netns: ", "nowhere: why", "netns, nowhere: why", "The kernel: why", ": why"] {
        ensure!(!names_modules(bad), "{bad}");
    }
    Ok(())
}

/// What an agent may on its node: no more than is written down, and nothing twice.
#[test]
fn no_container_that_goes_on_is_privileged() -> Result<()> {
    let server = apiserver::shared()?;
    for (folder, _) in SAME {
        let all = objects(&server, &kustomize(&server, folder)?)?;
        let pod = &all["DaemonSet/istio-system/culvert"]["spec"]["template"]["spec"];
        let security = &pod["containers"][0]["securityContext"];
        // SYS_ADMIN implies the other two that the kernel knows for programs (capabilities(7)).
        ensure!(
            security["capabilities"] == json!({ "drop": ["ALL"], "add": ["NET_ADMIN", "SYS_ADMIN", "SYS_PTRACE"] }),
            "{folder}: {security}"
        );
        ensure!(
            security["privileged"].is_null() && security["allowPrivilegeEscalation"] == false,
            "{folder}: {security}"
        );
        ensure!(pod["containers"].as_array().is_some_and(|all| all.len() == 1), "{folder}: {pod}");
        ensure!(count(pod, "ports") == 0, "{folder}: a port of a hostNetwork pod is one of the node");
        let ends_after = pod["terminationGracePeriodSeconds"].as_u64();
        let drains = pod["containers"][0]["args"].as_array().into_iter().flatten().filter_map(Value::as_str);
        let mut drains = drains.filter_map(|argument| argument.strip_prefix("--drain-deadline=")?.strip_suffix('s'));
        let drains: Option<u64> = drains.next_back().and_then(|seconds| seconds.parse().ok());
        ensure!(ends_after > drains && drains.is_some(), "{folder}: {ends_after:?} s, and drains for {drains:?} s");
        let init = &pod["initContainers"];
        let wanted = if folder == "overlays/restricted" { Value::Null } else { json!(true) };
        ensure!(init[0]["securityContext"]["privileged"] == wanted, "{folder}: {init}");
    }
    Ok(())
}

/// The page on installation has every value that the chart takes, and values.yaml has all of them with their defaults.
#[test]
fn every_value_is_documented() -> Result<()> {
    let schema: Value = serde_json::from_str(&read("helm/culvert/values.schema.json")?)?;
    let page = read("../docs/install.md")?;
    let values = read("helm/culvert/values.yaml")?;
    let groups = schema["properties"].as_object().context("the schema has properties")?;
    let switch = &schema["definitions"]["switch"];
    for (group, properties) in groups.iter().filter(|(name, _)| *name != "global") {
        let properties = if properties["$ref"].is_null() { properties } else { switch };
        let names = properties["properties"].as_object().with_context(|| format!("{group} has properties"))?;
        let (_, part) = values.split_once(&format!("\n{group}:\n")).with_context(|| format!("values.yaml: {group}"))?;
        let part = part.split("\n\n").next().unwrap_or_default();
        for name in names.keys() {
            ensure!(page.contains(&format!("| `{group}.{name}` |")), "docs/install.md has no row for {group}.{name}");
            let lines: Vec<&str> = part.lines().collect();
            let at = lines.iter().position(|line| line.starts_with(&format!("  {name}:")));
            let at = at.with_context(|| format!("values.yaml: {group}.{name}"))?;
            let is_explained = at.checked_sub(1).is_some_and(|before| lines[before].starts_with("  # "));
            ensure!(is_explained, "values.yaml: {group}.{name} has no comment");
        }
    }
    Ok(())
}
