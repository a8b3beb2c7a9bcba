//! Two nodes on one machine: namespaces, cgroups and processes as a kubelet and its runtime would leave them.
//!
//! ```text
//!  pods ── cni0 ── node-a ═══ link0 ═══ node-b ── cni0 ── pods        each node, each pod: a network namespace
//!  <cgroup2>/culvert-<instance>/node-a/kubepods.slice/…  node-b/kubepods/…    each container: a control group
//!  /run/culvert-<instance>/   manifests/ (watched by agents and CA), logs/, tokens, state.json
//! ```
//!
//! | file | its one job |
//! |---|---|
//! | `plan` | what a sandbox consists of; names and addresses derived from it |
//! | `ledger` | what there is on the machine, and its removal |
//! | `place` | start a program in a control group and a network namespace |
//! | `cgroups`, `net` | a kubelet's layouts; links, addresses, kube-proxy's part |
//! | `manifests`, `tokens` | what an API server would serve and sign |
//! | `cluster` | a real one, to which the manifests are applied |
//! | `mesh` | the CA and the agents |
//! | `proof` | what every scenario ends with: no connection that nothing accounts for |
//! | `traces` | what bears a sandbox's name on the machine |
//!
//! Every name begins with `culvert-<instance>`, addresses live in namespaces only, so sandboxes do not disturb each other.
//! A dropped sandbox takes everything away; one whose owner was killed is taken away by the next start ([`sweep`]).

mod cgroups;
mod cluster;
pub(crate) mod ledger;
mod manifests;
mod mesh;
mod net;
mod place;
mod plan;
mod proof;
mod tokens;
mod traces;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;
use serde::de::DeserializeOwned;

pub use cgroups::mount as cgroup2_mount;
pub use cluster::webhook_at;
pub use ledger::{Swept, sweep};
pub use manifests::Manifests;
pub use mesh::{LogLine, MeshPlan, agent_process};
pub(crate) use net::namespace as make_namespace;
pub use net::{BRIDGE, LINK};
pub use place::Place;
pub use plan::{LinkPlan, Node, Plan, PodPlan, ServicePlan, Source, own_name};
pub(crate) use tokens::base64url;
pub use tokens::{AUDIENCE, Claims, ISSUER, Signer};
pub use traces::{expect_no_traces, traces};

use crate::capture::{self, Capture};
use crate::command;
use crate::interrupt;
use crate::programs::{HttpResult, Probe, ProbeResult};
use cluster::Cluster;
use ledger::{Ledger, Recorded};
use net::Translation;

/// A pod that runs.
#[derive(Debug, Clone)]
pub struct Pod {
    /// What it was built from.
    pub plan: PodPlan,
    /// Its UID.
    pub uid: String,
    /// Its IPv4 address.
    pub v4: Ipv4Addr,
    /// Its IPv6 address.
    pub v6: Ipv6Addr,
    /// Its further IPv4 addresses.
    pub more_v4: Vec<Ipv4Addr>,
    /// Its application container's control group, and its namespace.
    pub place: Place,
}

impl Pod {
    /// Its address of a family, and a port.
    pub fn at(&self, family: Family, port: u16) -> SocketAddr {
        match family {
            Family::V4 => (self.v4, port).into(),
            Family::V6 => (self.v6, port).into(),
        }
    }
}

/// How long links may take until neighbours are known.
const SETTLE_LIMIT: Duration = Duration::from_secs(10);
/// An answer without a retransmitted SYN, which takes a second.
const AT_ONCE: Duration = Duration::from_millis(300);

/// IPv4 or IPv6.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

/// A process of the sandbox.
#[derive(Debug)]
struct Process {
    child: Child,
    record: Recorded,
}

/// Two nodes with pods. Dropping it takes everything away.
#[derive(Debug)]
pub struct Sandbox {
    plan: Plan,
    ledger: Ledger,
    root: PathBuf,
    program: PathBuf,
    nodes: [Place; 2],
    pods: BTreeMap<String, Pod>,
    processes: BTreeMap<String, Process>,
    manifests: Manifests,
    signer: Signer,
    down: bool,
}

impl Sandbox {
    /// Builds what `plan` says: afterwards every pod's programs run and its kubelet probes it, without a mesh.
    ///
    /// # Errors
    /// Another owner has a sandbox of this name up; or a step failed, and what was built until then is gone again.
    pub fn build(plan: Plan) -> Result<Self> {
        plan.check()?;
        let root = root(&plan)?;
        let program = built("culvert-pod")?;
        // Also of other names: a test's sandbox is not built again under the name that its killed process gave it.
        sweep().context("remove what dead owners left")?;
        let ledger = Ledger::take(&plan.instance)?;
        let (manifests, signer) = match prepare(&ledger) {
            Ok(prepared) => prepared,
            Err(error) => {
                ledger.remove().context("take down the half-built sandbox")?;
                return Err(error);
            }
        };
        let nodes = Node::ALL.map(|node| Place {
            cgroup: root.join(node.name()).join("init.scope"),
            netns: format!("{}-{node}", plan.prefix()),
        });
        let mut sandbox = Self {
            plan,
            ledger,
            root,
            program,
            nodes,
            pods: BTreeMap::new(),
            processes: BTreeMap::new(),
            manifests,
            signer,
            down: false,
        };
        // An error drops `sandbox`, which removes what it has built.
        sandbox.raise()?;
        Ok(sandbox)
    }

    fn raise(&mut self) -> Result<()> {
        mesh::mount_bpffs()?;
        self.ledger.will_make_cgroup(&self.root)?;
        for place in self.nodes.clone() {
            self.make_place(&place)?;
        }
        net::nodes(&self.nodes, self.plan.link)?;
        for node in Node::ALL {
            let mut pause = self.nodes[index(node)].command(&self.program)?;
            pause.arg("pause");
            self.start(&format!("init-{}", node.letter()), pause)?;
        }
        self.start_cluster()?;
        let plans = self.plan.pods.clone();
        for (node, nth, plan) in Node::ALL.into_iter().flat_map(|node| {
            plans.iter().filter(move |p| p.node == node).enumerate().map(move |(nth, p)| (node, nth, p))
        }) {
            interrupt::check()?;
            self.raise_pod(node, plan::host(nth)?, plan)?;
        }
        self.translate_services()?;
        manifests::write(&self.manifests, &self.plan, &self.pods)?;
        for pod in self.pods.clone().into_values() {
            for program in &pod.plan.programs {
                self.wait_listening(&pod, program)?;
            }
        }
        self.settle_links()?;
        for node in Node::ALL {
            self.start_kubelet(node)?;
        }
        Ok(())
    }

    /// Starts the API server, where agents are to have one, and makes the pods' objects: their UIDs name control groups.
    fn start_cluster(&mut self) -> Result<()> {
        if self.plan.source == Source::Folder {
            return Ok(());
        }
        let place = self.service_place(Node::A, "kube-apiserver")?;
        let cluster = Cluster::start(&self.plan, place).context("the sandbox's API server")?;
        cluster.write_kubectl(&self.kubectl(), &self.nodes[index(Node::A)].netns)?;
        self.manifests.follow(cluster);
        manifests::announce(&self.manifests, &self.plan, &self.plan.pods)
    }

    /// Neighbour discovery on fresh links loses first SYNs to a second of duplicate address detection. A scenario that
    /// measures milliseconds begins after that.
    fn settle_links(&self) -> Result<()> {
        for (client, server) in self.pods().flat_map(|a| self.pods().map(move |b| (a, b))) {
            if client.plan.node == server.plan.node {
                continue;
            }
            // Nobody listens there: the answer is a reset, at once.
            let to = server.at(Family::V6, 1);
            command::wait_for(&format!("{to} answers {} at once", client.plan.key()), SETTLE_LIMIT, || {
                interrupt::check()?;
                let answered = client.place.inside(|| {
                    Ok(std::net::TcpStream::connect_timeout(&to, AT_ONCE)
                        .is_err_and(|error| error.kind() == std::io::ErrorKind::ConnectionRefused))
                })?;
                Ok(answered.then_some(()))
            })?;
        }
        Ok(())
    }

    fn raise_pod(&mut self, node: Node, host: u8, plan: &PodPlan) -> Result<()> {
        let pod = self.future_pod(node, host, plan);
        self.raise_network(&pod, host)?;
        for (nth, arguments) in plan.programs.iter().enumerate() {
            let mut command = pod.place.command(&self.program)?;
            command.args(arguments);
            self.start(&format!("{}/{nth}", plan.key()), command)?;
        }
        self.pods.insert(plan.key(), pod);
        Ok(())
    }

    /// What a pod will be.
    fn future_pod(&self, node: Node, host: u8, plan: &PodPlan) -> Pod {
        Pod {
            plan: plan.clone(),
            uid: self.pod_uid(&plan.namespace, &plan.name),
            v4: node.pod_v4(host),
            v6: node.pod_v6(host),
            more_v4: (0..plan.more_addresses).map(|nth| node.pod_v4(254 - nth)).collect(),
            place: self.place_of_container(plan, "app"),
        }
    }

    /// A pod's control groups, its pause process and its network: what there is before its containers.
    fn raise_network(&mut self, pod: &Pod, host: u8) -> Result<()> {
        let pause = self.place_of_container(&pod.plan, "POD");
        self.make_place(&pause)?;
        cgroups::make(&pod.place.cgroup)?;
        let mut command = pause.command(&self.program)?;
        command.arg("pause");
        self.start(&format!("{}/pause", pod.plan.key()), command)?;
        net::pod(pod.plan.node, &self.nodes[index(pod.plan.node)], &pod.place, host, &pod.more_v4)
    }

    fn place_of_container(&self, pod: &PodPlan, container: &str) -> Place {
        container_place(&self.plan, &self.root, pod, &self.pod_uid(&pod.namespace, &pod.name), container)
    }

    fn pod_uid(&self, namespace: &str, name: &str) -> String {
        self.uid(&manifests::pod_identity(namespace, name))
    }

    /// The UID of an object that the plan implies: the API server's choice where there is one.
    fn uid(&self, of: &str) -> String {
        let chosen = self.manifests.cluster().and_then(|cluster| cluster.uid(of));
        chosen.unwrap_or_else(|| self.plan.uid(of))
    }

    /// Adds a pod to the running sandbox, as a scheduler's decision would: its programs listen, its manifest and its
    /// Services' endpoints are written. The part of kube-proxy, for clients outside the mesh, stays as it was built.
    ///
    /// # Errors
    /// The plan cannot have such a pod, or a step failed.
    pub fn add_pod(&mut self, pod: PodPlan) -> Result<()> {
        let host = self.plan_pod(&pod)?;
        manifests::announce(&self.manifests, &self.plan, std::slice::from_ref(&pod))?;
        self.raise_pod(pod.node, host, &pod)?;
        let added = self.pod(&pod.key())?.clone();
        for program in &pod.programs {
            self.wait_listening(&added, program)?;
        }
        manifests::write_pod(&self.manifests, &self.plan, &self.pods, &added)
    }

    /// Puts a pod on its node as far as a kubelet does before it starts containers: the API server has its manifest, without
    /// addresses; its control groups, pause process and network are there. Of its plan's programs none is started:
    /// [`Self::start_in_pod`] is its containers, [`Self::announce_pod`] the rest.
    ///
    /// # Errors
    /// As [`Self::add_pod`].
    pub fn place_pod(&mut self, pod: PodPlan) -> Result<()> {
        let host = self.plan_pod(&pod)?;
        manifests::announce(&self.manifests, &self.plan, std::slice::from_ref(&pod))?;
        let placed = self.future_pod(pod.node, host, &pod);
        manifests::write_placed_pod(&self.manifests, &self.plan, &placed)?;
        self.raise_network(&placed, host)?;
        self.pods.insert(pod.key(), placed);
        Ok(())
    }

    /// The API server learns the addresses of a pod that was placed ([`Self::place_pod`]).
    ///
    /// # Errors
    /// There is no such pod, or its manifest could not be written.
    pub fn announce_pod(&self, key: &str) -> Result<()> {
        manifests::write_pod(&self.manifests, &self.plan, &self.pods, self.pod(key)?)
    }

    /// Takes a further pod into the plan; the number of its address.
    fn plan_pod(&mut self, pod: &PodPlan) -> Result<u8> {
        let nth = self.plan.pods.iter().filter(|p| p.node == pod.node).count();
        let plan = self.plan.clone().pod(pod.clone());
        plan.check()?;
        self.plan = plan;
        plan::host(nth)
    }

    /// Takes a pod away, as a kubelet does after a deletion: its processes are killed, its network and its control groups
    /// removed, and the API server forgets it. Its name stays taken in this sandbox.
    ///
    /// # Errors
    /// There is no such pod, or something of it could not be removed.
    pub fn delete_pod(&mut self, key: &str) -> Result<()> {
        let pod = self.pod(key)?.clone();
        let own = format!("{key}/");
        let names: Vec<String> = self.processes.keys().filter(|name| name.starts_with(&own)).cloned().collect();
        for name in names {
            self.stop(&name)?;
        }
        self.pods.remove(key);
        net::remove_namespace(&pod.place.netns)?;
        let node_root = self.node_cgroup(pod.plan.node);
        ledger::remove_cgroup(&cgroups::pod(&node_root, pod.plan.node, &pod.uid))?;
        manifests::delete_pod(&self.manifests, &self.plan, &self.pods, &pod)
    }

    /// Makes a namespace and a control group.
    fn make_place(&self, place: &Place) -> Result<()> {
        self.ledger.will_make_netns(&place.netns)?;
        net::namespace(&place.netns)?;
        cgroups::make(&place.cgroup)
    }

    fn translate_services(&self) -> Result<()> {
        let mut translations = Vec::new();
        for (index, service) in self.plan.services.iter().enumerate() {
            let cluster = (self.plan.cluster_v4(index)?, self.plan.cluster_v6(index)?);
            let pods = self.pods.values().filter(|p| p.plan.key() == service.key());
            let endpoints: Vec<_> = pods.map(|p| (p.v4, p.v6)).collect();
            translations.extend(service.ports.iter().map(|&(_, port, target)| Translation {
                cluster,
                port,
                target,
                endpoints: endpoints.clone(),
            }));
        }
        self.nodes.iter().try_for_each(|place| net::services(place, &translations, self.plan.link))
    }

    fn wait_listening(&mut self, pod: &Pod, program: &[String]) -> Result<()> {
        let ports: Vec<u16> = ports_of(program);
        command::wait_for(&format!("{} listens on {ports:?}", pod.plan.key()), Duration::from_secs(10), || {
            let open = pod.place.inside(|| {
                let limit = Duration::from_millis(200);
                Ok(ports
                    .iter()
                    .all(|&p| std::net::TcpStream::connect_timeout(&(Ipv4Addr::LOCALHOST, p).into(), limit).is_ok()))
            })?;
            Ok(open.then_some(()))
        })
    }

    fn start_kubelet(&mut self, node: Node) -> Result<()> {
        let place = self.kubelet_place(node)?;
        let probes: Vec<Probe> = self
            .pods
            .values()
            .filter(|p| p.plan.node == node)
            .filter_map(|p| Some(Probe { pod: p.plan.key(), to: (p.v4, p.plan.probe?).into() }))
            .collect();
        if probes.is_empty() {
            return Ok(());
        }
        let mut kubelet = place.command(&self.program)?;
        kubelet.arg("kubelet").arg("--out").arg(self.probes_path(node));
        for probe in probes {
            kubelet.args(["--probe", &probe.to_string()]);
        }
        self.start(&format!("kubelet-{}", node.letter()), kubelet)
    }

    /// A pod by `namespace/name`.
    ///
    /// # Errors
    /// There is none of that name.
    pub fn pod(&self, key: &str) -> Result<&Pod> {
        self.pods.get(key).with_context(|| format!("the sandbox has no pod {key}"))
    }

    /// All pods, by `namespace/name`.
    pub fn pods(&self) -> impl Iterator<Item = &Pod> {
        self.pods.values()
    }

    /// A Service's cluster IP.
    ///
    /// # Errors
    /// There is no such Service.
    pub fn cluster_ip(&self, key: &str, family: Family) -> Result<IpAddr> {
        let index = self.plan.services.iter().position(|s| s.key() == key);
        let index = index.with_context(|| format!("the sandbox has no service {key}"))?;
        Ok(match family {
            Family::V4 => self.plan.cluster_v4(index)?.into(),
            Family::V6 => self.plan.cluster_v6(index)?.into(),
        })
    }

    /// Runs a client of `culvert-pod` inside a pod, as a process of its application container, and reads its result.
    ///
    /// # Errors
    /// It could not be started, or printed no result.
    pub fn call<T: DeserializeOwned>(&self, pod: &str, arguments: &[&str]) -> Result<T> {
        self.call_at(&self.pod(pod)?.place, arguments)
    }

    /// Runs a client of `culvert-pod` on a node, outside every pod: an ordinary host process.
    ///
    /// # Errors
    /// It could not be started, or printed no result.
    pub fn call_on_node<T: DeserializeOwned>(&self, node: Node, arguments: &[&str]) -> Result<T> {
        self.call_at(self.node_place(node), arguments)
    }

    /// Runs a client of `culvert-pod` in any place and reads its result.
    ///
    /// # Errors
    /// It could not be started, or printed no result.
    pub fn call_at<T: DeserializeOwned>(&self, place: &Place, arguments: &[&str]) -> Result<T> {
        let mut client = place.command(&self.program)?;
        client.args(arguments);
        let shown = command::describe(&client);
        let out = command::finish(&mut client, None)?;
        serde_json::from_str(out.trim()).with_context(|| format!("the result of `{shown}`: {out}"))
    }

    /// One HTTP request from a pod.
    ///
    /// # Errors
    /// The client could not be run; a refused connection is a result.
    pub fn http(&self, from: &str, to: SocketAddr, marker: &str) -> Result<HttpResult> {
        let limit_ms = 3000 * crate::patience();
        let (to, limit_ms) = (to.to_string(), limit_ms.to_string());
        self.call(from, &["http-get", "--to", &to, "--marker", marker, "--timeout-ms", &limit_ms])
    }

    /// Starts a program of `culvert-pod` inside a pod under a name of its own; it runs until the sandbox ends or
    /// [`Self::stop`] names it. What it prints is in its log.
    ///
    /// # Errors
    /// It could not be started.
    pub fn start_in_pod(&mut self, name: &str, pod: &str, arguments: &[&str]) -> Result<()> {
        let mut command = self.pod(pod)?.place.command(&self.program)?;
        command.args(arguments);
        self.start(name, command)
    }

    /// Starts a process of the sandbox; what it prints goes to its log.
    ///
    /// # Errors
    /// It could not be started, or a process of that name runs.
    pub fn start(&mut self, name: &str, mut command: Command) -> Result<()> {
        if self.processes.get_mut(name).is_some_and(|p| p.check().is_ok()) {
            bail!("{name} runs already");
        }
        let path = self.log_path(name);
        let log = File::options().create(true).append(true).open(&path);
        let log = log.with_context(|| format!("open {}", path.display()))?;
        command.stdout(Stdio::from(log.try_clone()?)).stderr(Stdio::from(log));
        let shown = command::describe(&command);
        let child = command.spawn().with_context(|| format!("start `{shown}`"))?;
        let record = Recorded::of(child.id(), name).with_context(|| self.end_of_log(name))?;
        self.ledger.started(record.clone())?;
        self.processes.insert(name.to_owned(), Process { child, record });
        Ok(())
    }

    /// Ends a process and waits for its end.
    ///
    /// # Errors
    /// There is none of that name.
    pub fn stop(&mut self, name: &str) -> Result<()> {
        self.signal(name, Signal::SIGKILL)
    }

    /// Sends a signal to a process; the end after SIGKILL is waited for.
    ///
    /// # Errors
    /// There is no process of that name, or it has ended.
    pub fn signal(&mut self, name: &str, signal: Signal) -> Result<()> {
        let process = self.processes.get_mut(name).with_context(|| format!("the sandbox runs no {name}"))?;
        process.check()?;
        process.record.signal(signal);
        if signal == Signal::SIGKILL {
            let status = process.child.wait().with_context(|| format!("wait for {name}"))?;
            if status.signal() != Some(Signal::SIGKILL as i32) {
                bail!("{name} ended with {status} before it was killed");
            }
            self.processes.remove(name);
        }
        Ok(())
    }

    /// Fails, with the end of its log, if a process has ended.
    ///
    /// # Errors
    /// It has ended, or there is none of that name.
    pub fn expect_running(&mut self, name: &str) -> Result<()> {
        let process = self.processes.get_mut(name).with_context(|| format!("the sandbox runs no {name}"))?;
        let checked = process.check();
        checked.with_context(|| self.end_of_log(name))
    }

    /// Waits for a process to end by itself.
    ///
    /// # Errors
    /// It has not within `limit`, or there is none of that name.
    pub fn wait_end(&mut self, name: &str, limit: Duration) -> Result<ExitStatus> {
        let process = self.processes.get_mut(name).with_context(|| format!("the sandbox runs no {name}"))?;
        let ended = command::wait_for(&format!("{name} ends"), limit, || Ok(process.child.try_wait()?));
        ended.with_context(|| self.end_of_log(name))
    }

    /// Number of a process.
    ///
    /// # Errors
    /// There is none of that name.
    pub fn pid(&self, name: &str) -> Result<u32> {
        Ok(self.processes.get(name).with_context(|| format!("the sandbox runs no {name}"))?.child.id())
    }

    /// Starts recording the link between the nodes.
    ///
    /// # Errors
    /// The recording could not be started.
    pub fn capture(&self) -> Result<Capture> {
        Capture::start(self.node_place(Node::A), LINK, capture::DEFAULT_LIMIT)
    }

    /// Starts recording what a node routes to and from its pods: everything that leaves one of them, or comes to it.
    ///
    /// # Errors
    /// The recording could not be started.
    pub fn capture_pods(&self, node: Node) -> Result<Capture> {
        Capture::start(self.node_place(node), BRIDGE, capture::DEFAULT_LIMIT)
    }

    /// The results of a node's probes so far, oldest first.
    ///
    /// # Errors
    /// They could not be read.
    pub fn probes(&self, node: Node) -> Result<Vec<ProbeResult>> {
        let path = self.probes_path(node);
        let text = match fs::read_to_string(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other.with_context(|| format!("read {}", path.display()))?,
        };
        let whole = &text[..text.rfind('\n').map_or(0, |at| at + 1)];
        whole
            .lines()
            .map(|line| serde_json::from_str(line).with_context(|| format!("{}: {line}", path.display())))
            .collect()
    }

    /// The manifests: the watched folder, or what is applied to the API server.
    pub fn manifests(&self) -> &Manifests {
        &self.manifests
    }

    /// Script that is kubectl, as a superuser, for the API server of a sandbox that has one.
    pub fn kubectl(&self) -> PathBuf {
        self.dir().join("kubectl")
    }

    /// The key that signs service account tokens.
    pub fn signer(&self) -> &Signer {
        &self.signer
    }

    /// The sandbox's directory.
    pub fn dir(&self) -> &Path {
        self.ledger.dir()
    }

    /// The root of a node's control groups.
    pub fn node_cgroup(&self, node: Node) -> PathBuf {
        self.root.join(node.name())
    }

    /// The node itself: its network namespace, and a control group outside kubepods and the kubelet's.
    pub fn node_place(&self, node: Node) -> &Place {
        &self.nodes[index(node)]
    }

    /// The kubelet's place on a node.
    ///
    /// # Errors
    /// Its control group could not be made.
    pub fn kubelet_place(&self, node: Node) -> Result<Place> {
        self.place_on_node(node, cgroups::kubelet(&self.node_cgroup(node), node))
    }

    /// The place of a node's agent: its own pod's control group, the node's network.
    ///
    /// # Errors
    /// Its control group could not be made.
    pub fn agent_place(&self, node: Node) -> Result<Place> {
        let name = manifests::agent_name(node);
        let uid = self.pod_uid(manifests::SYSTEM, &name);
        let id = self.plan.container_id(&format!("{name}/agent"));
        self.place_on_node(node, cgroups::container(&self.node_cgroup(node), node, &uid, &id))
    }

    fn service_place(&self, node: Node, name: &str) -> Result<Place> {
        self.place_on_node(node, cgroups::service(&self.node_cgroup(node), name))
    }

    fn place_on_node(&self, node: Node, cgroup: PathBuf) -> Result<Place> {
        cgroups::make(&cgroup)?;
        Ok(Place { cgroup, netns: self.nodes[index(node)].netns.clone() })
    }

    /// File of what a process printed.
    pub fn log_path(&self, name: &str) -> PathBuf {
        self.dir().join("logs").join(format!("{}.log", name.replace('/', "-")))
    }

    fn probes_path(&self, node: Node) -> PathBuf {
        self.dir().join(format!("probes-{}.jsonl", node.letter()))
    }

    /// The last lines of a process's log, for an error.
    pub(crate) fn end_of_log(&self, name: &str) -> String {
        let text = fs::read_to_string(self.log_path(name)).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        let end = lines[lines.len().saturating_sub(12)..].join("\n    ");
        format!("{name}; the end of its log:\n    {end}")
    }

    /// Takes everything away and says if that failed, or if a connection was not the mesh's ([`Self::prove_capture`]);
    /// dropping does the same.
    ///
    /// # Errors
    /// Such a connection; or something could not be removed, and the next start tries again.
    pub fn take_down(mut self) -> Result<()> {
        let proved = self.prove_capture();
        self.remove()?;
        proved
    }

    fn remove(&mut self) -> Result<()> {
        self.down = true;
        // Before its control group is gone.
        self.manifests.end();
        let result = self.ledger.remove();
        for process in self.processes.values_mut() {
            // The process has ended by now; this only takes note of it.
            let _ = process.child.try_wait();
        }
        result
    }
}

impl Drop for Sandbox {
    /// # Panics
    /// The capture proof found something. A scenario that has failed already loses its own error by that, so what was
    /// found is in the message; one that panics keeps its own.
    fn drop(&mut self) {
        if self.down {
            return;
        }
        let asked = !thread::panicking() && interrupt::check().is_ok();
        let proved = if asked { self.prove_capture() } else { Ok(()) };
        if let Err(error) = self.remove() {
            eprintln!("sandbox {}: {error:#}; the next start tries again", self.plan.instance);
        }
        if let Err(error) = proved {
            panic!("sandbox {}: {error:#}", self.plan.instance);
        }
    }
}

/// Where a program of a pod runs, in a sandbox of this plan that any process has up: for a shell beside it.
///
/// # Errors
/// cgroup2 is not mounted, or the plan has no pod of that name.
pub fn place_of(plan: &Plan, pod: &str) -> Result<Place> {
    let known = plan.pods.iter().find(|p| p.key() == pod || p.name == pod);
    let names: Vec<String> = plan.pods.iter().map(PodPlan::key).collect();
    let pod = known.with_context(|| format!("no pod {pod}; there are {}", names.join(", ")))?;
    let written = manifests::written_uid(&manifests_dir(&ledger::dir(&plan.instance)), &pod.namespace, &pod.name);
    let uid = written.unwrap_or_else(|| plan.uid(&manifests::pod_identity(&pod.namespace, &pod.name)));
    Ok(container_place(plan, &root(plan)?, pod, &uid, "app"))
}

/// The root of all control groups of a sandbox.
fn root(plan: &Plan) -> Result<PathBuf> {
    Ok(cgroups::mount()?.join(plan.prefix()))
}

fn container_place(plan: &Plan, root: &Path, pod: &PodPlan, uid: &str, container: &str) -> Place {
    let id = plan.container_id(&format!("{}/{container}", pod.key()));
    Place {
        cgroup: cgroups::container(&root.join(pod.node.name()), pod.node, uid, &id),
        netns: format!("{}-{}", plan.prefix(), pod.name),
    }
}

fn prepare(ledger: &Ledger) -> Result<(Manifests, Signer)> {
    let logs = ledger.dir().join("logs");
    fs::create_dir_all(&logs).with_context(|| format!("create {}", logs.display()))?;
    Ok((Manifests::create(manifests_dir(ledger.dir()))?, Signer::create(ledger.dir())?))
}

fn manifests_dir(dir: &Path) -> PathBuf {
    dir.join("manifests")
}

fn index(node: Node) -> usize {
    match node {
        Node::A => 0,
        Node::B => 1,
    }
}

fn ports_of(program: &[String]) -> Vec<u16> {
    let is_server = program.first().is_some_and(|p| p.ends_with("-serve"));
    program.iter().filter(|_| is_server).filter_map(|a| a.strip_prefix("--port=")?.parse().ok()).collect()
}

/// An executable of this workspace, beside or one above the running one (tests run in `deps/`).
///
/// # Errors
/// It was not built.
pub fn built(name: &str) -> Result<PathBuf> {
    let me = std::env::current_exe().context("find this executable")?;
    me.ancestors()
        .skip(1)
        .take(2)
        .map(|dir| dir.join(name))
        .find(|path| path.is_file())
        .with_context(|| format!("{name} is not beside {}: build it with `cargo build --workspace`", me.display()))
}
