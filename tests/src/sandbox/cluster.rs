//! The API server of a sandbox, and what is applied to it: the same objects that a folder of manifests holds.
//!
//! It runs on node a, where both nodes' agents reach it by the node's address. A file of the folder becomes the objects that it
//! describes: they are applied with kubectl, server-side; those that an earlier text of the file described and this one does not are
//! deleted, after the new ones are there. What a kubelet would write, the status, is applied to that subresource. The API server
//! gives every object a UID of its own choice, whatever its manifest says; here is where it is known.

use std::collections::BTreeMap;
use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::built;
use super::manifests::{AGENT_ACCOUNT, SYSTEM};
use super::mesh::webhook_address;
use super::place::Place;
use super::plan::{Node, Plan};
use super::tokens::AUDIENCE;
use crate::apiserver::{ApiPlan, ApiServer};
use crate::{command, patience};

/// Where kubeadm puts it.
const PORT: u16 = 6443;
/// The plan's cluster IPs, both families. Of IPv6 the API server takes no more than 20 bits.
const SERVICES: &str = "10.96.0.0/24,fd00:10:96::/112";
/// How long the API server may take until it serves a new kind.
const SERVED_LIMIT: Duration = Duration::from_secs(30);
/// In whose name objects are applied.
const MANAGER: &str = "--field-manager=culvert-sandbox";
/// What the agents and `culvert control` may do at the API server, as they are deployed.
const RIGHTS: [&str; 2] = [
    concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/agent/rbac.yaml"),
    concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/control/rbac.yaml"),
];
/// The webhook of `culvert control`, as it is deployed.
const WEBHOOK: &str = include_str!("../../../deploy/control/webhook.yaml");
/// Where `culvert control` publishes the roots (specification §4).
const ROOTS: &str = "istio-ca-root-cert";

/// An API server with the sandbox's objects.
#[derive(Debug)]
pub(super) struct Cluster {
    server: ApiServer,
    known: Mutex<Known>,
}

#[derive(Debug, Default)]
struct Known {
    /// What each file of the folder has put there.
    files: BTreeMap<String, Vec<Object>>,
    /// The UIDs that the API server chose, by the names that [`Plan::uid`] knows.
    uids: BTreeMap<String, String>,
}

/// What names an object.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Object {
    api_version: String,
    kind: String,
    namespace: Option<String>,
    name: String,
}

impl Object {
    fn of(value: &Value) -> Result<Self> {
        let text = |value: &Value| value.as_str().map(str::to_owned);
        let metadata = &value["metadata"];
        Ok(Self {
            api_version: text(&value["apiVersion"]).with_context(|| format!("apiVersion of {value}"))?,
            kind: text(&value["kind"]).with_context(|| format!("kind of {value}"))?,
            namespace: text(&metadata["namespace"]),
            name: text(&metadata["name"]).with_context(|| format!("name of {value}"))?,
        })
    }

    /// The group, the kind and the name stay when a manifest says another version of the same.
    fn is(&self, other: &Self) -> bool {
        let group = |version: &str| version.split_once('/').map_or(String::new(), |(group, _)| group.to_owned());
        group(&self.api_version) == group(&other.api_version)
            && (&self.kind, &self.namespace, &self.name) == (&other.kind, &other.namespace, &other.name)
    }

    /// As [`Plan::uid`] is asked for it.
    fn identity(&self) -> String {
        let kind = self.kind.to_lowercase();
        match &self.namespace {
            Some(namespace) => format!("{kind}/{namespace}/{}", self.name),
            None => format!("{kind}/{}", self.name),
        }
    }

    fn manifest(&self) -> Value {
        let mut metadata = json!({ "name": self.name });
        if let Some(namespace) = &self.namespace {
            metadata["namespace"] = json!(namespace);
        }
        json!({ "apiVersion": self.api_version, "kind": self.kind, "metadata": metadata })
    }
}

impl Cluster {
    /// Starts it at `place`, in the network of node a, with the kinds of policy and the rights of the agents.
    pub(super) fn start(plan: &Plan, place: Place) -> Result<Self> {
        let server = ApiServer::start_as(ApiPlan {
            instance: format!("{}-api", plan.instance),
            place: Some(place),
            bind: Ipv4Addr::UNSPECIFIED.into(),
            advertise: Node::A.v4().into(),
            port: Some(PORT),
            services: SERVICES.to_owned(),
            // Its objects are complete: what controllers would add is in the manifests.
            controllers: false,
            ..ApiPlan::default()
        })?;
        let cluster = Self { server, known: Mutex::default() };
        cluster.install()?;
        Ok(cluster)
    }

    /// Installs what an installation of Culvert brings: the definitions of the kinds of policy, and the rights of its agents.
    fn install(&self) -> Result<()> {
        let definitions = command::finish(Command::new(built("culvert")?).arg("crds"), None)?;
        self.server.kubectl_with(&["create", "--filename", "-"], &definitions)?;
        self.server.kubectl(&["create", "namespace", SYSTEM])?;
        for rights in RIGHTS {
            self.server.kubectl(&["apply", "--filename", rights])?;
        }
        self.server.kubectl_with(&["apply", "--filename", "-"], &webhook_at(webhook_address())?)?;
        let limit = format!("--timeout={}s", SERVED_LIMIT.as_secs() * u64::from(patience()));
        self.server.kubectl(&["wait", "--for=condition=Established", "crd", "--all", &limit])?;
        command::wait_for("policies are served", SERVED_LIMIT, || {
            let kinds = "peerauthentications.security.istio.io,authorizationpolicies.security.istio.io";
            Ok(self.server.kubectl(&["get", kinds, "--all-namespaces"]).is_ok().then_some(()))
        })
    }

    pub(super) fn server(&self) -> &ApiServer {
        &self.server
    }

    /// Kubeconfig of a service account of the system namespace.
    pub(super) fn kubeconfig(&self, account: &str) -> Result<PathBuf> {
        self.server.kubeconfig(&format!("system:serviceaccount:{SYSTEM}:{account}"), None)
    }

    /// A token as a kubelet has it made for an agent's pod.
    pub(super) fn token(&self, pod: &str) -> Result<String> {
        self.server.token(SYSTEM, AGENT_ACCOUNT, AUDIENCE, Some(pod))
    }

    /// The roots that are published in the agents' namespace, if they are.
    pub(super) fn roots(&self) -> Result<Option<String>> {
        let path = r"jsonpath={.data.root-cert\.pem}";
        let get = ["get", "configmap", ROOTS, "--namespace", SYSTEM, "--ignore-not-found", "--output", path];
        Ok(Some(self.server.kubectl(&get)?).filter(|roots| !roots.is_empty()))
    }

    /// The UID that the API server gave to what [`Plan::uid`] knows by this name.
    pub(super) fn uid(&self, of: &str) -> Option<String> {
        self.known().uids.get(of).cloned()
    }

    /// Makes the objects that a text describes what the file of this name stands for, and gives the text with the UIDs that they
    /// have.
    pub(super) fn apply(&self, file: &str, text: &str) -> Result<String> {
        let (text, objects) = self.put(text, |wanted| {
            // Of what is refused half-way the first half is there.
            let mut known = self.known();
            let stands = known.files.entry(file.to_owned()).or_default();
            let more = wanted.iter().filter(|new| !stands.iter().any(|old| old.is(new)));
            let more: Vec<Object> = more.cloned().collect();
            stands.extend(more);
        })?;
        let before = self.known().files.insert(file.to_owned(), objects.clone()).unwrap_or_default();
        self.delete_all(before.iter().filter(|old| !objects.iter().any(|new| new.is(old))))?;
        Ok(text)
    }

    /// Deletes what the file of this name stood for.
    pub(super) fn delete(&self, file: &str) -> Result<()> {
        let before = self.known().files.remove(file).unwrap_or_default();
        self.delete_all(before.iter())
    }

    /// Makes the objects that a text describes, whatever file they will belong to.
    pub(super) fn announce(&self, text: &str) -> Result<()> {
        self.put(text, |_| {}).map(drop)
    }

    /// Applies the objects of a text, each with its status, and gives the text with the UIDs that they have; `tell` learns their
    /// names before the first is applied.
    fn put(&self, text: &str, tell: impl FnOnce(&[Object])) -> Result<(String, Vec<Object>)> {
        let mut wanted = self.parse(text)?;
        tell(&wanted.iter().map(Object::of).collect::<Result<Vec<_>>>()?);
        if wanted.is_empty() {
            return Ok((text.to_owned(), Vec::new()));
        }
        let mut given = Vec::new();
        let mut states = Vec::new();
        for object in &mut wanted {
            let name = Object::of(object)?;
            let status = object.as_object_mut().and_then(|fields| fields.remove("status"));
            if let Some(status) = status.filter(|status| status.as_object().is_some_and(|fields| !fields.is_empty())) {
                let mut state = name.manifest();
                state["status"] = status;
                states.push(state);
            }
            if let Some(metadata) = object["metadata"].as_object_mut() {
                // It would be a condition: that this very object is there.
                if let Some(Value::String(uid)) = metadata.remove("uid") {
                    given.push((name.clone(), uid));
                }
                // kubectl prints it of what does not exist yet.
                metadata.remove("creationTimestamp");
            }
        }
        let apply = ["apply", "--server-side", "--force-conflicts", MANAGER, "--filename", "-", "--output", "json"];
        let made = values(&self.server.kubectl_with(&apply, &list(&wanted))?)?;
        // A node's addresses are a list with types as keys, and of two families both are internal: no apply takes that.
        let (nodes, others): (Vec<_>, Vec<_>) = states.into_iter().partition(|state| state["kind"] == "Node");
        for node in nodes {
            let name = Object::of(&node)?.name;
            let patch = json!({ "status": node["status"] }).to_string();
            self.server.kubectl(&[
                "patch",
                "node",
                &name,
                "--subresource=status",
                "--type=merge",
                "--patch",
                &patch,
            ])?;
        }
        if !others.is_empty() {
            let apply =
                ["apply", "--server-side", "--force-conflicts", MANAGER, "--subresource=status", "--filename", "-"];
            self.server.kubectl_with(&apply, &list(&others))?;
        }
        ensure!(made.len() == wanted.len(), "of {} objects kubectl applied {}", wanted.len(), made.len());
        let mut text = text.to_owned();
        let mut objects = Vec::new();
        for value in &made {
            let object = Object::of(value)?;
            let uid = value["metadata"]["uid"].as_str().with_context(|| format!("the UID of {object:?}"))?;
            if let Some((_, given)) = given.iter().find(|(name, _)| name.is(&object)) {
                text = text.replace(given, uid);
            }
            self.known().uids.insert(object.identity(), uid.to_owned());
            objects.push(object);
        }
        Ok((text, objects))
    }

    /// The objects of a text, as kubectl reads it.
    fn parse(&self, text: &str) -> Result<Vec<Value>> {
        // It calls a text without objects an error.
        if !text.lines().any(|line| line.contains("kind") && !line.trim_start().starts_with('#')) {
            return Ok(Vec::new());
        }
        let read = ["create", "--dry-run=client", "--validate=ignore", "--filename", "-", "--output", "json"];
        values(&self.server.kubectl_with(&read, text)?)
    }

    fn delete_all<'a>(&self, objects: impl Iterator<Item = &'a Object>) -> Result<()> {
        let objects: Vec<&Object> = objects.collect();
        if objects.is_empty() {
            return Ok(());
        }
        let manifests: Vec<Value> = objects.iter().map(|object| object.manifest()).collect();
        // No kubelet confirms the end of a pod, so nobody waits for it.
        let delete = ["delete", "--ignore-not-found", "--wait=false", "--grace-period=0", "--force", "--filename", "-"];
        self.server.kubectl_with(&delete, &list(&manifests))?;
        let mut known = self.known();
        for object in objects {
            known.uids.remove(&object.identity());
        }
        Ok(())
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes a script that is kubectl for a user of this machine, as a superuser of the sandbox's cluster.
    pub(super) fn write_kubectl(&self, path: &Path, netns: &str) -> Result<()> {
        let text = format!(
            "#!/bin/sh\n# kubectl for the API server of this sandbox, which is in the network of its node a.\n\
             exec nsenter --net='/run/netns/{netns}' '{}' --kubeconfig '{}' \"$@\"\n",
            self.server.assets().program("kubectl").display(),
            self.server.admin().display(),
        );
        fs::write(path, text).with_context(|| format!("write {}", path.display()))?;
        let mode = fs::Permissions::from_mode(0o755);
        fs::set_permissions(path, mode).with_context(|| format!("make {} executable", path.display()))
    }
}

/// The configuration of deploy/ for a webhook that answers at an address: in no sandbox a Service leads API servers anywhere.
///
/// # Errors
/// The configuration names no Service.
pub fn webhook_at(address: SocketAddr) -> Result<String> {
    let (before, service) =
        WEBHOOK.split_once("    service:\n").context("deploy/control/webhook.yaml names the Service")?;
    let after = service.find("\n  rules:").context("deploy/control/webhook.yaml has rules")?;
    Ok(format!("{before}    url: https://{address}/validate{}", &service[after..]))
}

/// The documents that kubectl printed; of a list, its items.
fn values(printed: &str) -> Result<Vec<Value>> {
    let mut all = Vec::new();
    for value in serde_json::Deserializer::from_str(printed).into_iter::<Value>() {
        let mut value = value.with_context(|| format!("what kubectl printed: {printed}"))?;
        match value.get_mut("items").map(Value::take) {
            Some(Value::Array(items)) if value["kind"] == "List" => all.extend(items),
            _ => all.push(value),
        }
    }
    Ok(all)
}

fn list(items: &[Value]) -> String {
    json!({ "apiVersion": "v1", "kind": "List", "items": items }).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_object_has_the_name_by_which_the_plan_knows_it() {
        let value =
            json!({ "apiVersion": "v1", "kind": "ServiceAccount", "metadata": { "name": "n", "namespace": "s" } });
        let object = Object::of(&value).expect("it has a name");
        assert_eq!(object.identity(), super::super::manifests::account_identity("s", "n"));
        assert_eq!(object.manifest(), value);
        let node = json!({ "apiVersion": "v1", "kind": "Node", "metadata": { "name": "a" } });
        assert_eq!(Object::of(&node).expect("it has a name").identity(), "node/a");
        assert!(Object::of(&json!({ "kind": "Node" })).is_err());
    }

    #[test]
    fn another_version_is_the_same_object_and_another_group_is_not() {
        let object = |version: &str| Object {
            api_version: version.to_owned(),
            kind: "PeerAuthentication".to_owned(),
            namespace: Some("s".to_owned()),
            name: "n".to_owned(),
        };
        assert!(object("security.istio.io/v1").is(&object("security.istio.io/v1beta1")));
        assert!(!object("security.istio.io/v1").is(&object("example.org/v1")));
    }

    #[test]
    fn what_kubectl_prints_of_one_and_of_many_is_read_alike() {
        let one = "{\"kind\": \"A\"}";
        let many = format!("{{\"kind\": \"List\", \"items\": [{one}, {{\"kind\": \"B\"}}]}}\n{one}");
        let kinds = |printed: &str| -> Vec<String> {
            let read = values(printed).expect("JSON");
            read.iter().map(|value| value["kind"].as_str().unwrap_or_default().to_owned()).collect()
        };
        assert_eq!(kinds(one), ["A"]);
        assert_eq!(kinds(&many), ["A", "B", "A"]);
        assert_eq!(kinds(""), [""; 0]);
        assert!(values("error").is_err());
    }
}
