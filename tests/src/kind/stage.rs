//! The user's scenario on a cluster: its pods, the mesh installed from `deploy/`, and what [`crate::tour`] asks of both.

use std::cell::OnceCell;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{Read as _, Seek as _, SeekFrom};
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use super::{Cluster, NodeInfo};
use crate::capture::Capture;
use crate::command;
use crate::oci;
use crate::programs::HttpResult;
use crate::sandbox::{LogLine, Node, built};
use crate::tour::{self, Stage};

/// The image of the scenario's pods.
pub const POD_IMAGE: &str = "culvert.test/pod:1";
/// What marks the policies that the scenario has made.
const MARK: &str = "culvert.test/scenario=tour";
/// The kinds that the scenario makes policies of.
const POLICIES: &str = "peerauthentications.security.istio.io,authorizationpolicies.security.istio.io";
/// Where the mesh is installed.
pub const SYSTEM: &str = "istio-system";
/// How long an installation, and pods, may take until they are ready.
const READY_LIMIT: Duration = Duration::from_secs(120);

/// A pod of the scenario.
struct Actor {
    namespace: &'static str,
    name: &'static str,
    node: Node,
    labels: &'static str,
    /// Ports that it serves, and its Service has; none for a client.
    ports: &'static [u16],
}

const ACTORS: [Actor; 3] = [
    Actor { namespace: "default", name: "productpage", node: Node::B, labels: "", ports: &[9080, 9090] },
    Actor { namespace: "test", name: "nginx", node: Node::A, labels: "", ports: &[] },
    Actor {
        namespace: "test",
        name: "legacy-app",
        node: Node::A,
        labels: ", istio.io/dataplane-mode: none",
        ports: &[],
    },
];

/// How the mesh is installed.
#[derive(Debug, Clone)]
pub struct Install {
    /// The archive of the image of `culvert`.
    pub image: PathBuf,
    /// The folder that kustomize renders.
    pub overlay: PathBuf,
    /// What is created once for a cluster: the namespace, and the definitions of Istio's kinds.
    pub once: [PathBuf; 2],
    /// Lifetime of workload certificates; `None` is what agents ask for.
    pub cert_ttl: Option<String>,
}

impl Install {
    /// With certificates that are renewed while one waits.
    #[must_use]
    pub fn for_tests(mut self) -> Self {
        self.cert_ttl = Some(tour::CERT_TTL.to_owned());
        self
    }

    /// From this checkout.
    pub fn from_checkout(image: impl Into<PathBuf>) -> Self {
        let deploy = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy");
        Self {
            image: image.into(),
            overlay: deploy.join("overlays/kind"),
            once: [deploy.join("namespace.yaml"), deploy.join("crds")],
            cert_ttl: None,
        }
    }
}

/// A program that was started in a pod.
#[derive(Debug)]
struct Started {
    child: Child,
    output: PathBuf,
}

/// A cluster with the scenario's pods and the mesh.
#[derive(Debug)]
pub struct Scene {
    /// The cluster.
    pub cluster: Cluster,
    nodes: Vec<NodeInfo>,
    started: BTreeMap<String, Started>,
    /// Folders of the agents' logs.
    logs: [OnceCell<PathBuf>; 2],
    installed: OnceCell<Install>,
}

impl Scene {
    /// Puts the scenario's pods into a cluster and waits until they run.
    ///
    /// # Errors
    /// A pod does not become ready.
    pub fn set(cluster: Cluster) -> Result<Self> {
        let archive = cluster.dir().join("pod.tar");
        let image = oci::Image::new(POD_IMAGE).file(built("culvert-pod")?, "/usr/bin/culvert-pod", 0o755);
        image.env("PATH", "/usr/bin").entrypoint(["/usr/bin/culvert-pod"]).write(&archive)?;
        cluster.load(&archive)?;
        let nodes = cluster.nodes()?;
        let logs = [OnceCell::new(), OnceCell::new()];
        let scene = Self { cluster, nodes, started: BTreeMap::new(), logs, installed: OnceCell::new() };
        scene.cluster.kubectl_with(&["apply", "--filename", "-"], &scene.pods()?)?;
        for namespace in ["default", "test"] {
            scene.ready(namespace, &["pods", "--all"])?;
        }
        Ok(scene)
    }

    /// Installs the mesh as its documentation says, and waits until it is ready.
    ///
    /// # Errors
    /// A step failed, or something does not become ready; the error shows why.
    pub fn install(&self, install: &Install) -> Result<()> {
        self.cluster.load(&install.image)?;
        let [namespace, definitions] = install.once.each_ref().map(|path| path.display().to_string());
        self.cluster.kubectl(&["create", "--filename", &namespace, "--filename", &definitions])?;
        let _ = self.installed.set(install.clone());
        self.apply(install)
    }

    /// Installs the mesh again, after it was removed in part or as a whole.
    ///
    /// # Errors
    /// As [`Self::install`]; it never was installed.
    pub fn install_again(&self) -> Result<()> {
        self.apply(self.installed.get().context("the mesh was never installed")?)
    }

    /// Removes the mesh as its documentation says, all at once.
    ///
    /// # Errors
    /// kubectl failed; it never was installed.
    pub fn uninstall(&self) -> Result<()> {
        let install = self.installed.get().context("the mesh was never installed")?;
        self.cluster.kubectl(&["delete", "--kustomize", &install.overlay.display().to_string()]).map(drop)
    }

    /// Learns anew what is not asked again and again: the nodes, and where their agents write. To be done when a node or an agent
    /// may be another one than before.
    ///
    /// # Errors
    /// The API server or podman does not tell them.
    pub fn look_again(&mut self) -> Result<()> {
        self.nodes = self.cluster.nodes()?;
        self.logs = [OnceCell::new(), OnceCell::new()];
        Ok(())
    }

    fn apply(&self, install: &Install) -> Result<()> {
        let rendered = self.cluster.kubectl(&["kustomize", &install.overlay.display().to_string()])?;
        self.cluster.kubectl_with(&["apply", "--filename", "-"], &rendered)?;
        self.set_environment("daemonset/culvert", &[("CULVERT_LOG_FORMAT", "json")])?;
        if let Some(ttl) = &install.cert_ttl {
            let ttl = [("CULVERT_CERT_TTL", ttl.as_str()), ("CULVERT_MAX_CERT_TTL", ttl)];
            self.set_environment("deployment/culvert-control", &ttl)?;
        }
        self.rolled_out()
    }

    /// Waits until the mesh is rolled out.
    ///
    /// # Errors
    /// It does not become ready in time; the error shows what its pods say.
    pub fn rolled_out(&self) -> Result<()> {
        let limit = format!("--timeout={}s", (READY_LIMIT * crate::patience()).as_secs());
        for what in ["deployment/culvert-control", "daemonset/culvert"] {
            self.cluster
                .kubectl(&["rollout", "status", "--namespace", SYSTEM, what, &limit])
                .with_context(|| self.state())?;
        }
        Ok(())
    }

    /// Takes the cluster away.
    ///
    /// # Errors
    /// Something could not be removed.
    pub fn take_down(self) -> Result<()> {
        drop(self.started);
        self.cluster.take_down()
    }

    fn set_environment(&self, of: &str, variables: &[(&str, &str)]) -> Result<()> {
        let words: Vec<String> = variables.iter().map(|(name, value)| format!("{name}={value}")).collect();
        let mut arguments = vec!["set", "env", "--namespace", SYSTEM, of];
        arguments.extend(words.iter().map(String::as_str));
        self.cluster.kubectl(&arguments).map(drop)
    }

    /// Labels namespaces into the mesh.
    ///
    /// # Errors
    /// kubectl failed.
    pub fn enroll(&self) -> Result<()> {
        let label = ["label", "--overwrite", "namespace", "default", "test", "istio.io/dataplane-mode=ambient"];
        self.cluster.kubectl(&label)?;
        // Peers and this scenario know by the annotation that a pod takes tunnels ([E.4]).
        for (namespace, name) in [("default", "productpage"), ("test", "nginx")] {
            let annotation = r#"jsonpath={.metadata.annotations.ambient\.istio\.io/redirection}"#;
            command::wait_for(&format!("{namespace}/{name} is in the mesh"), READY_LIMIT, || {
                let get = ["get", "pod", "--namespace", namespace, name, "--output", annotation];
                Ok((self.cluster.kubectl(&get)? == "enabled").then_some(()))
            })
            .with_context(|| self.state())?;
        }
        Ok(())
    }

    /// What the mesh's pods say, for an error.
    pub fn state(&self) -> String {
        let pods = ["get", "pods", "--all-namespaces", "--output", "wide"];
        let mut text = self.cluster.kubectl(&pods).unwrap_or_else(|error| format!("{error:#}"));
        for app in ["culvert", "culvert-control"] {
            let logs = [
                "logs",
                "--namespace",
                SYSTEM,
                "--selector",
                &format!("app={app}"),
                "--tail=15",
                "--prefix",
                "--all-containers",
            ];
            let said = self.cluster.kubectl(&logs).unwrap_or_else(|error| format!("{error:#}"));
            let _ = write!(text, "\n{said}");
        }
        let events = ["get", "events", "--namespace", SYSTEM, "--field-selector=type=Warning"];
        text + "\n" + &self.cluster.kubectl(&events).unwrap_or_else(|error| format!("{error:#}"))
    }

    /// Which of the cluster's nodes has the part of one of the scenario's.
    pub fn node(&self, node: Node) -> Result<&NodeInfo> {
        let nth = match node {
            Node::A => 0,
            Node::B => 1,
        };
        self.nodes.get(nth).context("the scenario needs two nodes")
    }

    fn ready(&self, namespace: &str, what: &[&str]) -> Result<()> {
        let limit = format!("--timeout={}s", (READY_LIMIT * crate::patience()).as_secs());
        let wait = [&["wait", "--for=condition=Ready", "--namespace", namespace, &limit][..], what].concat();
        self.cluster.kubectl(&wait).with_context(|| self.state()).map(drop)
    }

    fn pods(&self) -> Result<String> {
        let mut text = String::from("---\napiVersion: v1\nkind: Namespace\nmetadata: {name: test}\n");
        for actor in ACTORS {
            let Actor { namespace, name, labels, .. } = actor;
            let node = &self.node(actor.node)?.name;
            let program = match actor.ports {
                [] => "[pause]".to_owned(),
                ports => {
                    let ports: Vec<String> = ports.iter().map(|port| format!("--port={port}")).collect();
                    format!("[http-serve, --name={name}, {}]", ports.join(", "))
                }
            };
            write!(
                text,
                "---\napiVersion: v1\nkind: ServiceAccount\nmetadata: {{namespace: {namespace}, name: {name}}}\n\
                 ---\napiVersion: v1\nkind: Pod\nmetadata:\n  namespace: {namespace}\n  name: {name}\n  labels: {{app: {name}{labels}}}\n\
                 spec:\n  serviceAccountName: {name}\n  automountServiceAccountToken: false\n  terminationGracePeriodSeconds: 1\n\
                 \x20 nodeSelector: {{kubernetes.io/hostname: {node}}}\n  tolerations: [{{operator: Exists}}]\n\
                 \x20 containers:\n  - name: app\n    image: {POD_IMAGE}\n    imagePullPolicy: Never\n    args: {program}\n"
            )?;
            if let Some(first) = actor.ports.first() {
                writeln!(text, "    readinessProbe: {{httpGet: {{path: /, port: {first}}}, periodSeconds: 1}}")?;
                let ports: Vec<String> = actor
                    .ports
                    .iter()
                    .map(|port| format!("{{name: http-{port}, port: {port}, targetPort: {port}}}"))
                    .collect();
                write!(
                    text,
                    "---\napiVersion: v1\nkind: Service\nmetadata: {{namespace: {namespace}, name: {name}}}\n\
                     spec: {{selector: {{app: {name}}}, ports: [{}]}}\n",
                    ports.join(", ")
                )?;
            }
        }
        Ok(text)
    }

    /// kubectl's words for running a program in a pod.
    pub fn exec<'a>(pod: &'a str, words: &[&'a str]) -> Result<Vec<&'a str>> {
        let (namespace, name) = pod.split_once('/').context("a pod is namespace/name")?;
        Ok([&["exec", "--namespace", namespace, name, "--", "culvert-pod"][..], words].concat())
    }

    /// Folder of the logs of a node's agent, on this machine: the node's own, read without asking the node.
    fn logs(&self, node: Node) -> Result<&PathBuf> {
        let cell = &self.logs[usize::from(node == Node::B)];
        if let Some(path) = cell.get() {
            return Ok(path);
        }
        let on = self.node(node)?;
        let selector = format!("spec.nodeName={}", on.name);
        let get = ["pods", "--namespace", SYSTEM, "--selector=app=culvert", "--field-selector", &selector];
        let pods = self.cluster.get(&get)?;
        // One that was followed may be there still: it drains.
        let stays = |pod: &&Value| pod["metadata"]["deletionTimestamp"].is_null();
        let pod = pods["items"].as_array().and_then(|all| all.iter().find(stays)).context("the agent's pod")?;
        let of =
            |field: &str| pod["metadata"][field].as_str().with_context(|| format!("the {field} of the agent's pod"));
        let path = format!("/proc/{}/root/var/log/pods/{SYSTEM}_{}_{}/agent", on.pid, of("name")?, of("uid")?);
        Ok(cell.get_or_init(|| PathBuf::from(path)))
    }

    /// The log of a node's agent: of its container's last start.
    fn log_file(&self, node: Node) -> Result<PathBuf> {
        let folder = self.logs(node)?;
        let entries = fs::read_dir(folder).with_context(|| format!("list {}", folder.display()))?;
        let start = |entry: fs::DirEntry| entry.file_name().to_str()?.strip_suffix(".log")?.parse::<u32>().ok();
        let last = entries.filter_map(Result::ok).filter_map(start).max();
        Ok(folder.join(format!("{}.log", last.with_context(|| format!("a log in {}", folder.display()))?)))
    }
}

impl Stage for Scene {
    fn put(&self, policies: &str) -> Result<()> {
        if policies.is_empty() {
            let delete = ["delete", POLICIES, "--all-namespaces", "--selector", MARK];
            return self.cluster.kubectl(&delete).map(drop);
        }
        let (key, value) = MARK.split_once('=').context("a label")?;
        let marked = policies.replace("metadata:\n", &format!("metadata:\n  labels: {{{key}: {value}}}\n"));
        let applied = self.cluster.kubectl_with(&["apply", "--output", "json", "--filename", "-"], &marked)?;
        let applied: Value = serde_json::from_str(&applied).context("what kubectl applied")?;
        let applied = match applied["items"].as_array() {
            Some(items) => items.clone(),
            None => vec![applied],
        };
        let name = |object: &Value| {
            [&object["kind"], &object["metadata"]["namespace"], &object["metadata"]["name"]].map(Value::to_string)
        };
        let there = self.cluster.get(&[POLICIES, "--all-namespaces", "--selector", MARK])?;
        let mut others = there["items"].as_array().context("a list of policies")?.clone();
        others.retain(|old| !applied.iter().any(|new| name(new) == name(old)));
        if others.is_empty() {
            return Ok(());
        }
        let others = json!({ "apiVersion": "v1", "kind": "List", "items": others }).to_string();
        self.cluster.kubectl_with(&["delete", "--wait=false", "--filename", "-"], &others).map(drop)
    }

    fn capture(&self) -> Result<Capture> {
        self.cluster.capture(&self.node(Node::B)?.name)
    }

    fn cluster_ip(&self, of: &str) -> Result<IpAddr> {
        let (namespace, name) = of.split_once('/').context("a Service is namespace/name")?;
        let service = self.cluster.get(&["service", "--namespace", namespace, name])?;
        service["spec"]["clusterIP"].as_str().context("a cluster IP")?.parse().context("a cluster IP")
    }

    fn pod_ip(&self, pod: &str) -> Result<IpAddr> {
        let (namespace, name) = pod.split_once('/').context("a pod is namespace/name")?;
        let pod = self.cluster.get(&["pod", "--namespace", namespace, name])?;
        pod["status"]["podIP"].as_str().context("a pod's address")?.parse().context("a pod's address")
    }

    fn call(&self, client: &str, to: SocketAddr, marker: &str) -> Result<HttpResult> {
        let (to, limit) = (to.to_string(), (3000 * crate::patience()).to_string());
        let words = ["http-get", "--to", &to, "--marker", marker, "--timeout-ms", &limit];
        let printed = self.cluster.kubectl(&Self::exec(client, &words)?)?;
        serde_json::from_str(printed.trim()).with_context(|| format!("what the client printed: {printed}"))
    }

    fn log(&self, node: Node, offset: u64) -> Result<(Vec<LogLine>, u64)> {
        let path = self.log_file(node)?;
        let mut file = File::open(&path).with_context(|| format!("open {}", path.display()))?;
        let end = file.metadata()?.len();
        let start = offset.min(end);
        file.seek(SeekFrom::Start(start))?;
        let mut bytes = Vec::new();
        file.take(end - start).read_to_end(&mut bytes)?;
        let text = String::from_utf8_lossy(&bytes);
        let whole = text.rfind('\n').map_or(0, |at| at + 1);
        // As a container runtime writes them: time, stream, whether it is the end of a line, and the line.
        let lines = text[..whole].lines().filter_map(|line| LogLine::parse(line.splitn(4, ' ').nth(3)?)).collect();
        Ok((lines, start + u64::try_from(whole)?))
    }

    fn begin(&mut self, name: &str, pod: &str, arguments: &[&str]) -> Result<()> {
        let output = self.cluster.dir().join(format!("{}.log", name.replace('/', "-")));
        let file = File::create(&output).with_context(|| format!("create {}", output.display()))?;
        let mut kubectl = self.cluster.kubectl_command(&Self::exec(pod, arguments)?);
        command::end_with_starter(kubectl.stdin(Stdio::null()).stdout(file).stderr(Stdio::null()));
        let child = kubectl.spawn().with_context(|| format!("start {name}"))?;
        self.started.insert(name.to_owned(), Started { child, output });
        Ok(())
    }

    fn printed(&self, name: &str) -> Result<String> {
        let started = self.started.get(name).with_context(|| format!("nothing of the name {name} was started"))?;
        fs::read_to_string(&started.output).with_context(|| format!("read {}", started.output.display()))
    }

    fn expect(&mut self, name: &str) -> Result<()> {
        let started = self.started.get_mut(name).with_context(|| format!("nothing of the name {name} was started"))?;
        match started.child.try_wait()? {
            Some(status) => bail!("{name} ended with {status}"),
            None => Ok(()),
        }
    }

    fn end(&mut self, name: &str) -> Result<()> {
        self.expect(name)?;
        let started = self.started.get_mut(name).with_context(|| format!("nothing of the name {name} was started"))?;
        command::end_group(&mut started.child, Duration::from_secs(2))
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        // One that has ended and was waited for is what is wanted.
        let _ = command::end_group(&mut self.child, Duration::ZERO);
    }
}
