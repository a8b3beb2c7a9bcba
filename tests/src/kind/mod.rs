//! A real Kubernetes cluster of several nodes on one machine, made by kind: kubelets, containerd, kube-proxy, CoreDNS.
//!
//! | file | its one job |
//! |---|---|
//! | [`parts`] | which programs a node consists of, and where they lie |
//! | [`image`] | the image of a node, from these parts |
//! | `engine` | podman, with its state and its network apart from the machine's |
//! | `network` | what kind's own network plugin does: each node's part of the pods' addresses, routes between nodes |
//! | `stage` | the user's scenario on such a cluster |
//!
//! A cluster belongs to whoever made it: dropping it takes it away, and one whose owner was killed is taken away by the next start, as
//! sandboxes are ([`crate::sandbox::sweep`]).

mod engine;
pub mod image;
mod network;
pub mod parts;
pub mod stage;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};

pub(crate) use engine::Engine;
use image::NodeImage;
use parts::Parts;

use crate::capture::{self, Capture};
use crate::command;
use crate::sandbox::Place;
use crate::sandbox::ledger::{Ledger, Recorded};
use crate::sandbox::{make_namespace, own_name};

/// How long a cluster may take until all of its nodes are ready.
const READY_LIMIT: Duration = Duration::from_secs(180);

/// Which cluster.
#[derive(Debug, Clone)]
pub struct ClusterPlan {
    /// Its name; two at once need two names.
    pub name: String,
    /// How many nodes besides the one that has the control plane.
    pub workers: usize,
    /// How kube-proxy does its work: `nftables` or `iptables`.
    pub proxy_mode: &'static str,
}

impl ClusterPlan {
    /// One worker, nftables.
    pub fn new(name: impl Into<String>) -> Self {
        Self { name: name.into(), workers: 1, proxy_mode: "nftables" }
    }

    /// For a test: a name that no other has.
    pub fn for_test(test: &str) -> Self {
        Self::new(own_name(test))
    }
}

/// A node of a cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeInfo {
    /// Its name, which is its container's too.
    pub name: String,
    /// Its address.
    pub ip: String,
    /// The part of the pods' addresses that is its own.
    pub pods: String,
    /// Its first process, in this machine's numbers.
    pub pid: u32,
}

/// A cluster that is up. Dropping it takes it away.
#[derive(Debug)]
pub struct Cluster {
    plan: ClusterPlan,
    parts: Parts,
    engine: Engine,
    netns: String,
    ledger: Ledger,
    down: bool,
}

impl Cluster {
    /// Makes one and waits until its nodes are ready.
    ///
    /// # Errors
    /// A cluster of this name is up; the image or the programs of a node are not built; or a step failed, and what was made until
    /// then is gone again.
    pub fn create(plan: ClusterPlan) -> Result<Self> {
        let parts = Parts::find()?;
        let image = NodeImage::find()?;
        crate::sandbox::sweep().context("remove what dead owners left")?;
        let instance = format!("kind-{}", plan.name);
        let ledger = Ledger::take(&instance)?;
        let netns = format!("culvert-{instance}");
        let home = home(&instance)?;
        ledger.will_make_netns(&netns)?;
        ledger.will_make_nodes(&home, &netns)?;
        let made =
            make_namespace(&netns).and_then(|()| Engine::create(&home, Some(&netns), Some(&image.store()), &parts));
        let engine = match made {
            Ok(engine) => engine,
            Err(error) => {
                ledger.remove().context("take down the half-made cluster")?;
                return Err(error);
            }
        };
        // An error drops it, which removes what was made.
        let cluster = Self { plan, parts, engine, netns, ledger, down: false };
        cluster.raise()?;
        Ok(cluster)
    }

    fn raise(&self) -> Result<()> {
        // podman mounts it into nodes; systemd there loads modules from it.
        fs::create_dir_all("/lib/modules").context("create /lib/modules")?;
        command::finish(self.program("ip").args(["link", "set", "lo", "up"]), None)?;
        self.name_server()?;
        let config = self.ledger.dir().join("kind.yaml");
        fs::write(&config, self.config()).with_context(|| format!("write {}", config.display()))?;
        // Without podman's own names: its server for them is one for the whole machine, in the network of whichever cluster was first.
        self.engine.podman(&["network", "create", "--disable-dns", "kind"])?;
        let mut create = self.kind(&["create", "cluster", "--image", &NodeImage::name(), "--retain"]);
        create.arg("--config").arg(&config);
        let made = AtomicBool::new(false);
        thread::scope(|scope| {
            // kind makes the nodes and, soon after, has one look for the other by its name.
            let named = scope.spawn(|| {
                let enough = || Ok((self.name_nodes()? || made.load(Ordering::Relaxed)).then_some(()));
                command::wait_for("every node has an address", READY_LIMIT, enough)
            });
            let created = command::finish(&mut create, None).context("make a cluster with kind");
            made.store(true, Ordering::Relaxed);
            let named = named.join().unwrap_or_else(|_| bail!("the thread that names nodes panicked"));
            created.and(named)
        })?;
        network::connect(self)
    }

    /// Gives the nodes that have an address a name for it. Whether these are all.
    fn name_nodes(&self) -> Result<bool> {
        let format = "{{.Name}} {{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}";
        let names = self.engine.podman(&["ps", "--format", "{{.Names}}"])?;
        let mut hosts = String::new();
        for name in names.split_whitespace() {
            // One that is only about to be made is asked again.
            let said = self.engine.podman(&["inspect", "--format", format, name]).unwrap_or_default();
            if let Some((name, address)) = said.trim().split_once(' ') {
                hosts += &format!("{address} {name}\n");
            }
        }
        let file = self.hosts();
        fs::write(&file, &hosts).with_context(|| format!("write {}", file.display()))?;
        Ok(hosts.lines().count() == self.plan.workers + 1)
    }

    /// Names of nodes, for the name server.
    fn hosts(&self) -> PathBuf {
        self.ledger.dir().join("hosts")
    }

    /// A name server that knows the nodes and nothing else, and says so: from this network the machine's cannot be reached, and
    /// without an answer each unknown name costs seconds.
    fn name_server(&self) -> Result<()> {
        let address = ["address", "add", &format!("{}/32", engine::NAME_SERVER), "dev", "lo"];
        command::finish(self.program("ip").args(address), None)?;
        let file = self.ledger.dir().join("Corefile");
        let hosts = self.hosts();
        fs::write(&hosts, "").with_context(|| format!("write {}", hosts.display()))?;
        let hosts = format!("hosts {} {{\n  ttl 1\n  reload 200ms\n }}", hosts.display());
        fs::write(&file, format!(".:53 {{\n bind {}\n {hosts}\n}}\n", engine::NAME_SERVER))
            .with_context(|| format!("write {}", file.display()))?;
        let mut coredns = self.program(self.parts.program("coredns"));
        coredns.arg("-conf").arg(&file).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        std::os::unix::process::CommandExt::process_group(&mut coredns, 0);
        let child = coredns.spawn().context("start the name server of the cluster's network")?;
        self.ledger.started(Recorded::of(child.id(), "coredns")?)
    }

    fn config(&self) -> String {
        let workers = "- role: worker\n".repeat(self.plan.workers);
        format!(
            "kind: Cluster\napiVersion: kind.x-k8s.io/v1alpha4\nname: {}\n\
             networking: {{disableDefaultCNI: true, kubeProxyMode: {}}}\n\
             kubeadmConfigPatches:\n- |\n  kind: KubeletConfiguration\n  apiVersion: kubelet.config.k8s.io/v1beta1\n  failCgroupV1: false\n\
             nodes:\n- role: control-plane\n{workers}",
            self.plan.name, self.plan.proxy_mode
        )
    }

    /// A program in the cluster's network: one of the parts by its name, or another.
    fn program(&self, program: impl AsRef<Path>) -> Command {
        let mut command = self.engine.command(program);
        command.env("KUBECONFIG", self.kubeconfig());
        command
    }

    fn kind(&self, arguments: &[&str]) -> Command {
        let mut kind = self.program(self.parts.program("kind"));
        kind.args(arguments).args(["--name", &self.plan.name]);
        kind
    }

    /// The file by which kubectl knows the cluster; works in its network only.
    pub fn kubeconfig(&self) -> PathBuf {
        self.ledger.dir().join("kubeconfig")
    }

    /// Its folder, for files that belong to it.
    pub fn dir(&self) -> &Path {
        self.ledger.dir()
    }

    /// kubectl, as the cluster's administrator.
    pub fn kubectl_command(&self, arguments: &[&str]) -> Command {
        let mut kubectl = self.program(self.parts.program("kubectl"));
        kubectl.args(arguments);
        kubectl
    }

    /// What kubectl prints.
    ///
    /// # Errors
    /// It failed; the error has what it said.
    pub fn kubectl(&self, arguments: &[&str]) -> Result<String> {
        command::finish(&mut self.kubectl_command(arguments), None)
    }

    /// As [`Self::kubectl`], with something to read.
    ///
    /// # Errors
    /// As there.
    pub fn kubectl_with(&self, arguments: &[&str], input: &str) -> Result<String> {
        command::finish(&mut self.kubectl_command(arguments), Some(input))
    }

    /// A shell command that is kubectl for this cluster, for a user of this machine.
    pub fn kubectl_words(&self) -> String {
        format!(
            "nsenter --net=/run/netns/{} {} --kubeconfig {}",
            self.netns,
            self.parts.program("kubectl").display(),
            self.kubeconfig().display()
        )
    }

    /// What an API server's answer of the kinds that kubectl knows says, as JSON.
    ///
    /// # Errors
    /// kubectl failed, or printed something else.
    pub fn get(&self, arguments: &[&str]) -> Result<serde_json::Value> {
        let text = self.kubectl(&[&["get", "--output", "json"], arguments].concat())?;
        serde_json::from_str(&text).with_context(|| format!("what kubectl printed: {text}"))
    }

    /// Loads the images of an archive into every node.
    ///
    /// # Errors
    /// kind failed.
    pub fn load(&self, archive: &Path) -> Result<()> {
        let mut load = self.kind(&["load", "image-archive"]);
        command::finish(load.arg(archive), None).with_context(|| format!("load {}", archive.display())).map(drop)
    }

    /// Its nodes, the control plane first.
    ///
    /// # Errors
    /// The API server or podman does not tell them.
    pub fn nodes(&self) -> Result<Vec<NodeInfo>> {
        let list = self.get(&["nodes"])?;
        let mut nodes = Vec::new();
        for node in list["items"].as_array().context("a list of nodes")? {
            let name = node["metadata"]["name"].as_str().context("a node's name")?.to_owned();
            let addresses = node["status"]["addresses"].as_array().context("a node's addresses")?;
            let internal = addresses.iter().find(|address| address["type"] == "InternalIP");
            let ip = internal.and_then(|address| address["address"].as_str()).context("a node's address")?.to_owned();
            let pods = node["spec"]["podCIDR"].as_str().context("the addresses of a node's pods")?.to_owned();
            let pid = self.engine.podman(&["inspect", "--format", "{{.State.Pid}}", &name])?;
            nodes.push(NodeInfo { name, ip, pods, pid: pid.trim().parse().context("a process number")? });
        }
        nodes.sort_by_key(|node| (!node.name.ends_with("control-plane"), node.name.clone()));
        Ok(nodes)
    }

    /// Runs a program on a node, and gives what it prints.
    ///
    /// # Errors
    /// It failed.
    pub fn on_node(&self, node: &str, words: &[&str], input: Option<&str>) -> Result<String> {
        let mut exec = self.engine.command("podman");
        exec.args(["exec", "--interactive", node]).args(words);
        command::finish(&mut exec, input)
    }

    /// podman, for what is done to a node as a whole: stop, start, kill.
    ///
    /// # Errors
    /// It failed.
    pub fn podman(&self, arguments: &[&str]) -> Result<String> {
        self.engine.podman(arguments)
    }

    /// Connects its nodes anew, after one was stopped and started, and waits until all are ready: it may have another address, and has
    /// no routes any more.
    ///
    /// # Errors
    /// A node does not tell its address, or does not become ready.
    pub fn connect_again(&self) -> Result<()> {
        command::wait_for("every node has told its address", READY_LIMIT, || {
            self.name_nodes()?;
            for node in self.nodes()? {
                let format = "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}";
                if self.engine.podman(&["inspect", "--format", format, &node.name])?.trim() != node.ip {
                    return Ok(None);
                }
            }
            Ok(Some(()))
        })?;
        network::connect(self)
    }

    /// Records everything that crosses between a node and the others: at its port of their bridge, since what a bridge passes on
    /// from port to port is not seen at the bridge itself.
    ///
    /// # Errors
    /// There is no such device, or it cannot be recorded.
    pub fn capture(&self, node: &str) -> Result<Capture> {
        let peer = self.on_node(node, &["cat", "/sys/class/net/eth0/iflink"], None)?;
        let peer: u64 = peer.trim().parse().context("the number of a network device")?;
        let links = command::finish(self.program("ip").args(["-json", "link", "show", "type", "veth"]), None)?;
        let links: serde_json::Value = serde_json::from_str(&links).context("what ip says of the nodes' links")?;
        let port = links.as_array().and_then(|all| all.iter().find(|link| link["ifindex"] == peer));
        let port = port.and_then(|link| link["ifname"].as_str()).with_context(|| format!("the port of {node}"))?;
        let place = Place { cgroup: PathBuf::from("/sys/fs/cgroup"), netns: self.netns.clone() };
        Capture::start(&place, port, capture::DEFAULT_LIMIT)
    }

    /// Takes it away.
    ///
    /// # Errors
    /// Something could not be removed.
    pub fn take_down(mut self) -> Result<()> {
        self.down = true;
        self.ledger.remove()
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if self.down {
            return;
        }
        if let Err(error) = self.ledger.remove() {
            eprintln!("the cluster {} could not be taken down: {error:#}", self.plan.name);
        }
    }
}

/// Where podman keeps what belongs to a cluster: gigabytes, which a file system in memory should not have. What lies there has no
/// owner, since the cluster's name has none: the machine was started anew.
fn home(instance: &str) -> Result<PathBuf> {
    let home = crate::cache().context("where a cluster's containers are kept")?.join("clusters").join(instance);
    if home.exists() {
        let removed = Engine::existing(&home, None).remove_all().and_then(|()| Ok(fs::remove_dir_all(&home)?));
        removed.with_context(|| format!("remove what an earlier cluster left in {}", home.display()))?;
    }
    Ok(home)
}
