//! The folder of manifests that the agents and the CA of a sandbox watch: what an API server would serve.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::Pod;
use super::plan::{Node, Plan};

/// The agents' own pods run under this service account, which the CA trusts as a node's.
pub(super) const AGENT_ACCOUNT: &str = "culvert";
/// Namespace of the agents, the CA and mesh-wide policy.
pub(super) const SYSTEM: &str = "istio-system";

/// The watched folder. Files appear in it whole, by renaming.
#[derive(Debug, Clone)]
pub struct Folder {
    path: PathBuf,
}

impl Folder {
    pub(super) fn create(path: PathBuf) -> Result<Self> {
        fs::create_dir_all(&path).with_context(|| format!("create {}", path.display()))?;
        Ok(Self { path })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Writes or replaces a file of the folder.
    ///
    /// # Errors
    /// The file could not be written.
    pub fn apply(&self, name: &str, text: &str) -> Result<()> {
        // The new text is written beside the folder, so a reader of the folder never sees half a file.
        let fresh = self.path.with_extension(format!("new-{name}"));
        fs::write(&fresh, text).with_context(|| format!("write {}", fresh.display()))?;
        fs::rename(&fresh, self.path.join(name)).with_context(|| format!("rename {} into place", fresh.display()))
    }

    /// Removes a file of the folder; one that is not there is no error.
    ///
    /// # Errors
    /// The file could not be removed.
    pub fn delete(&self, name: &str) -> Result<()> {
        match fs::remove_file(self.path.join(name)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(error).with_context(|| format!("remove {name} from {}", self.path.display()))
            }
            _ => Ok(()),
        }
    }
}

/// Everything that the plan implies: one file per kind, as `kubectl get -o yaml` would print it, shortened.
pub(super) fn write(folder: &Folder, plan: &Plan, pods: &BTreeMap<String, Pod>) -> Result<()> {
    folder.apply("namespaces.yaml", &namespaces(plan)?)?;
    folder.apply("nodes.yaml", &nodes(plan)?)?;
    folder.apply("serviceaccounts.yaml", &service_accounts(plan)?)?;
    folder.apply("services.yaml", &services(plan, pods)?)?;
    folder.apply("mesh.yaml", MESH)?;
    for pod in pods.values() {
        folder.apply(&pod_file(&pod.plan.namespace, &pod.plan.name), &pod_manifest(plan, pod)?)?;
    }
    for node in Node::ALL {
        folder.apply(&pod_file(SYSTEM, &agent_name(node)), &agent_pod(plan, node)?)?;
    }
    Ok(())
}

/// What a new pod adds to the folder.
pub(super) fn write_pod(folder: &Folder, plan: &Plan, pods: &BTreeMap<String, Pod>, pod: &Pod) -> Result<()> {
    folder.apply("serviceaccounts.yaml", &service_accounts(plan)?)?;
    folder.apply(&pod_file(&pod.plan.namespace, &pod.plan.name), &pod_manifest(plan, pod)?)?;
    folder.apply("services.yaml", &services(plan, pods)?)
}

/// The manifest of a pod whose kubelet has not told its addresses yet.
pub(super) fn write_placed_pod(folder: &Folder, plan: &Plan, pod: &Pod) -> Result<()> {
    folder.apply("serviceaccounts.yaml", &service_accounts(plan)?)?;
    let text = format!("{}status:\n  phase: Pending\n", pod_spec(plan, pod)?);
    folder.apply(&pod_file(&pod.plan.namespace, &pod.plan.name), &text)
}

/// What goes from the folder with a pod; `pods` are those that remain.
pub(super) fn delete_pod(folder: &Folder, plan: &Plan, pods: &BTreeMap<String, Pod>, pod: &Pod) -> Result<()> {
    folder.apply("services.yaml", &services(plan, pods)?)?;
    folder.delete(&pod_file(&pod.plan.namespace, &pod.plan.name))
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
    let mut out = pod_spec(plan, pod)?;
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
fn pod_spec(plan: &Plan, pod: &Pod) -> Result<String> {
    let (namespace, name) = (&pod.plan.namespace, &pod.plan.name);
    let mut out = String::new();
    write!(
        out,
        "apiVersion: v1\nkind: Pod\nmetadata:\n  name: {name}\n  namespace: {namespace}\n  uid: {}\n  labels:\n    app: {name}\n",
        plan.uid(&pod_identity(namespace, name))
    )?;
    write_labels(&mut out, &pod.plan.labels)?;
    write!(
        out,
        "spec:\n  nodeName: {}\n  serviceAccountName: {name}\n  containers:\n  - name: app\n    image: culvert-pod\n",
        pod.plan.node
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
