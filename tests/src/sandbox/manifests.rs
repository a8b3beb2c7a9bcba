//! The manifests of a sandbox: a folder that the CA watches, and the agents too, or instead of it an API server to which the same
//! is applied.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::Pod;
use super::cluster::Cluster;
use super::plan::{Node, Plan, PodPlan};
use crate::apiserver::ApiServer;

/// The agents' own pods run under this service account, which the CA trusts as a node's.
pub(super) const AGENT_ACCOUNT: &str = "culvert";
/// The one of `culvert control`, as in deploy/control.
pub(super) const CONTROL_ACCOUNT: &str = "culvert-control";
/// Namespace of the agents, the CA and mesh-wide policy.
pub(super) const SYSTEM: &str = "istio-system";

/// The manifests, by the names of files. Those of a folder appear in it whole, by renaming; where the sandbox has an API server, they
/// are applied to that first, and the file has the UIDs that it chose.
#[derive(Debug)]
pub struct Manifests {
    path: PathBuf,
    cluster: Option<Cluster>,
}

impl Manifests {
    pub(super) fn create(path: PathBuf) -> Result<Self> {
        fs::create_dir_all(&path).with_context(|| format!("create {}", path.display()))?;
        Ok(Self { path, cluster: None })
    }

    /// From now on what is applied is applied to this API server.
    pub(super) fn follow(&mut self, cluster: Cluster) {
        self.cluster = Some(cluster);
    }

    /// Ends the API server, if there is one.
    pub(super) fn end(&mut self) {
        self.cluster = None;
    }

    pub(super) fn cluster(&self) -> Option<&Cluster> {
        self.cluster.as_ref()
    }

    /// The API server that agents watch; `None` if they watch the folder.
    pub fn api(&self) -> Option<&ApiServer> {
        self.cluster.as_ref().map(Cluster::server)
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Writes or replaces a file of the folder. Where there is an API server, the objects that the text describes are applied to it,
    /// and those that the file described until now and does not any more are deleted.
    ///
    /// # Errors
    /// The file could not be written, or the API server refused an object.
    pub fn apply(&self, name: &str, text: &str) -> Result<()> {
        let applied = self.cluster.as_ref().map(|cluster| cluster.apply(name, text)).transpose();
        let applied = applied.with_context(|| format!("apply {name}"))?;
        // The new text is written beside the folder, so a reader of the folder never sees half a file.
        let fresh = self.path.with_extension(format!("new-{name}"));
        fs::write(&fresh, applied.as_deref().unwrap_or(text)).with_context(|| format!("write {}", fresh.display()))?;
        fs::rename(&fresh, self.path.join(name)).with_context(|| format!("rename {} into place", fresh.display()))
    }

    /// Removes a file of the folder, with its objects; one that is not there is no error.
    ///
    /// # Errors
    /// The file could not be removed, or an object could not be deleted.
    pub fn delete(&self, name: &str) -> Result<()> {
        if let Some(cluster) = &self.cluster {
            cluster.delete(name)?;
        }
        match fs::remove_file(self.path.join(name)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(error).with_context(|| format!("remove {name} from {}", self.path.display()))
            }
            _ => Ok(()),
        }
    }
}

/// Makes the objects of which UIDs are needed before anything is built on the machine, where an API server chooses them; elsewhere
/// there is nothing to do.
pub(super) fn announce(manifests: &Manifests, plan: &Plan, pods: &[PodPlan]) -> Result<()> {
    let Some(cluster) = manifests.cluster() else { return Ok(()) };
    let mut text = namespaces(plan)? + &nodes(plan)? + &service_accounts(plan)?;
    for pod in pods {
        write!(text, "---\n{}", pod_spec(plan, pod)?)?;
    }
    for node in Node::ALL {
        write!(text, "---\n{}", agent_pod(plan, node)?)?;
    }
    cluster.announce(&text).context("make the pods' objects")
}

/// The UID in the manifest of a pod that is in a folder, `None` if there is none.
pub(super) fn written_uid(folder: &Path, namespace: &str, name: &str) -> Option<String> {
    let text = fs::read_to_string(folder.join(pod_file(namespace, name))).ok()?;
    text.lines().find_map(|line| line.strip_prefix("  uid: ")).map(str::to_owned)
}

/// Everything that the plan implies: one file per kind, as `kubectl get -o yaml` would print it, shortened.
pub(super) fn write(manifests: &Manifests, plan: &Plan, pods: &BTreeMap<String, Pod>) -> Result<()> {
    manifests.apply("namespaces.yaml", &namespaces(plan)?)?;
    manifests.apply("nodes.yaml", &nodes(plan)?)?;
    manifests.apply("serviceaccounts.yaml", &service_accounts(plan)?)?;
    manifests.apply("services.yaml", &services(plan, pods)?)?;
    manifests.apply("mesh.yaml", MESH)?;
    for pod in pods.values() {
        manifests.apply(&pod_file(&pod.plan.namespace, &pod.plan.name), &pod_manifest(plan, pod)?)?;
    }
    for node in Node::ALL {
        manifests.apply(&pod_file(SYSTEM, &agent_name(node)), &agent_pod(plan, node)?)?;
    }
    Ok(())
}

/// What a new pod adds to the folder.
pub(super) fn write_pod(manifests: &Manifests, plan: &Plan, pods: &BTreeMap<String, Pod>, pod: &Pod) -> Result<()> {
    manifests.apply("serviceaccounts.yaml", &service_accounts(plan)?)?;
    manifests.apply(&pod_file(&pod.plan.namespace, &pod.plan.name), &pod_manifest(plan, pod)?)?;
    manifests.apply("services.yaml", &services(plan, pods)?)
}

/// The manifest of a pod whose kubelet has not told its addresses yet.
pub(super) fn write_placed_pod(manifests: &Manifests, plan: &Plan, pod: &Pod) -> Result<()> {
    manifests.apply("serviceaccounts.yaml", &service_accounts(plan)?)?;
    let text = format!("{}status:\n  phase: Pending\n", pod_spec(plan, &pod.plan)?);
    manifests.apply(&pod_file(&pod.plan.namespace, &pod.plan.name), &text)
}

/// What goes from the folder with a pod; `pods` are those that remain.
pub(super) fn delete_pod(manifests: &Manifests, plan: &Plan, pods: &BTreeMap<String, Pod>, pod: &Pod) -> Result<()> {
    manifests.apply("services.yaml", &services(plan, pods)?)?;
    manifests.delete(&pod_file(&pod.plan.namespace, &pod.plan.name))
}

/// The file of a pod's manifest.
pub(super) fn pod_file(namespace: &str, name: &str) -> String {
    format!("pod-{namespace}-{name}.yaml")
}

pub(super) fn agent_name(node: Node) -> String {
    format!("culvert-{}", node.letter())
}

/// Name under which [`Plan::uid`] knows a pod.
pub(super) fn pod_identity(namespace: &str, name: &str) -> String {
    format!("pod/{namespace}/{name}")
}

/// Name under which [`Plan::uid`] knows a service account.
pub(super) fn account_identity(namespace: &str, name: &str) -> String {
    format!("serviceaccount/{namespace}/{name}")
}

const MESH: &str = "\
apiVersion: v1
kind: ConfigMap
metadata:
  name: istio
  namespace: istio-system
data:
  mesh: |-
    rootNamespace: istio-system
    trustDomain: cluster.local
";

fn namespaces(plan: &Plan) -> Result<String> {
    let mut out = String::new();
    for (name, labels) in &plan.namespaces {
        write!(
            out,
            "---\napiVersion: v1\nkind: Namespace\nmetadata:\n  name: {name}\n  uid: {}\n  labels:\n    kubernetes.io/metadata.name: {name}\n",
            plan.uid(&format!("namespace/{name}"))
        )?;
        write_labels(&mut out, labels)?;
    }
    Ok(out)
}

fn nodes(plan: &Plan) -> Result<String> {
    let mut out = String::new();
    for node in Node::ALL {
        let (region, zone) = (Node::REGION, node.zone());
        write!(
            out,
            "---\napiVersion: v1\nkind: Node\nmetadata:\n  name: {node}\n  uid: {}\n  labels:\n    kubernetes.io/hostname: {node}\n    \
             topology.kubernetes.io/region: {region}\n    topology.kubernetes.io/zone: {zone}\n\
             spec:\n  podCIDR: {}/24\n  podCIDRs: [\"{}/24\", \"{}/64\"]\n\
             status:\n  addresses:\n  - {{type: InternalIP, address: {}}}\n  - {{type: InternalIP, address: \"{}\"}}\n  - {{type: Hostname, address: {node}}}\n",
            plan.uid(&format!("node/{node}")),
            node.pod_v4(0),
            node.pod_v4(0),
            node.pod_v6(0),
            node.v4(),
            node.v6(),
        )?;
    }
    Ok(out)
}

fn service_accounts(plan: &Plan) -> Result<String> {
    let mut out = String::new();
    let pods = plan.pods.iter().map(|p| (p.namespace.as_str(), p.name.as_str()));
    for (namespace, name) in pods.chain([(SYSTEM, AGENT_ACCOUNT)]) {
        write!(
            out,
            "---\napiVersion: v1\nkind: ServiceAccount\nmetadata:\n  name: {name}\n  namespace: {namespace}\n  uid: {}\n",
            plan.uid(&account_identity(namespace, name))
        )?;
    }
    Ok(out)
}

fn services(plan: &Plan, pods: &BTreeMap<String, Pod>) -> Result<String> {
    let mut out = String::new();
    for (index, service) in plan.services.iter().enumerate() {
        let (namespace, name) = (&service.namespace, &service.name);
        let (v4, v6) = (plan.cluster_v4(index)?, plan.cluster_v6(index)?);
        write!(
            out,
            "---\napiVersion: v1\nkind: Service\nmetadata:\n  name: {name}\n  namespace: {namespace}\n  uid: {}\nspec:\n  type: ClusterIP\n  \
             clusterIP: {v4}\n  clusterIPs: [\"{v4}\", \"{v6}\"]\n  ipFamilies: [IPv4, IPv6]\n  ipFamilyPolicy: RequireDualStack\n  selector:\n    app: {name}\n  ports:\n",
            plan.uid(&format!("service/{}", service.key()))
        )?;
        for (port_name, port, target) in &service.ports {
            writeln!(out, "  - {{name: {port_name}, protocol: TCP, port: {port}, targetPort: {target}}}")?;
        }
        let endpoints: Vec<&Pod> =
            pods.values().filter(|p| p.plan.namespace == *namespace && p.plan.name == *name).collect();
        for family in ["IPv4", "IPv6"] {
            write!(
                out,
                "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata:\n  name: {name}-{}\n  namespace: {namespace}\n  labels:\n    \
                 kubernetes.io/service-name: {name}\naddressType: {family}\nports:\n",
                family.to_lowercase()
            )?;
            for (port_name, _, target) in &service.ports {
                writeln!(out, "- {{name: {port_name}, protocol: TCP, port: {target}}}")?;
            }
            writeln!(out, "endpoints:{}", if endpoints.is_empty() { " []" } else { "" })?;
            for pod in &endpoints {
                let address = if family == "IPv4" { pod.v4.to_string() } else { pod.v6.to_string() };
                write!(
                    out,
                    "- addresses: [\"{address}\"]\n  nodeName: {}\n  conditions: {{ready: true, serving: true, terminating: false}}\n  \
                     targetRef: {{kind: Pod, namespace: {namespace}, name: {}, uid: {}}}\n",
                    pod.plan.node, pod.plan.name, pod.uid
                )?;
            }
        }
    }
    Ok(out)
}

/// A pod as the API server would show it once it is ready.
pub(super) fn pod_manifest(plan: &Plan, pod: &Pod) -> Result<String> {
    let mut out = pod_spec(plan, &pod.plan)?;
    write!(
        out,
        "status:\n  phase: Running\n  hostIP: {host4}\n  hostIPs: [{{ip: {host4}}}, {{ip: \"{host6}\"}}]\n  podIP: {v4}\n  podIPs: [{{ip: {v4}}}, {{ip: \"{v6}\"}}{more}]\n\
         \x20 conditions:\n  - {{type: Ready, status: \"True\"}}\n  - {{type: ContainersReady, status: \"True\"}}\n",
        host4 = pod.plan.node.v4(),
        host6 = pod.plan.node.v6(),
        v4 = pod.v4,
        v6 = pod.v6,
        more = pod.more_v4.iter().map(|address| format!(", {{ip: {address}}}")).collect::<String>(),
    )?;
    Ok(out)
}

/// Its manifest but for the status.
fn pod_spec(plan: &Plan, pod: &PodPlan) -> Result<String> {
    let (namespace, name) = (&pod.namespace, &pod.name);
    let mut out = String::new();
    write!(
        out,
        "apiVersion: v1\nkind: Pod\nmetadata:\n  name: {name}\n  namespace: {namespace}\n  uid: {}\n  labels:\n    app: {name}\n",
        plan.uid(&pod_identity(namespace, name))
    )?;
    write_labels(&mut out, &pod.labels)?;
    write!(
        out,
        "spec:\n  nodeName: {}\n  serviceAccountName: {name}\n  containers:\n  - name: app\n    image: culvert-pod\n",
        pod.node
    )?;
    Ok(out)
}

fn agent_pod(plan: &Plan, node: Node) -> Result<String> {
    let name = agent_name(node);
    let mut out = String::new();
    write!(
        out,
        "apiVersion: v1\nkind: Pod\nmetadata:\n  name: {name}\n  namespace: {SYSTEM}\n  uid: {}\n  labels:\n    app: culvert\n\
         spec:\n  nodeName: {node}\n  hostNetwork: true\n  serviceAccountName: {AGENT_ACCOUNT}\n  containers:\n  - name: agent\n    image: culvert\n\
         status:\n  phase: Running\n  hostIP: {v4}\n  hostIPs: [{{ip: {v4}}}, {{ip: \"{v6}\"}}]\n  podIP: {v4}\n  podIPs: [{{ip: {v4}}}, {{ip: \"{v6}\"}}]\n\
         \x20 conditions:\n  - {{type: Ready, status: \"True\"}}\n  - {{type: ContainersReady, status: \"True\"}}\n",
        plan.uid(&pod_identity(SYSTEM, &name)),
        v4 = node.v4(),
        v6 = node.v6(),
    )?;
    Ok(out)
}

fn write_labels(out: &mut String, labels: &BTreeMap<String, String>) -> Result<()> {
    for (key, value) in labels {
        writeln!(out, "    {key}: \"{value}\"")?;
    }
    Ok(())
}
