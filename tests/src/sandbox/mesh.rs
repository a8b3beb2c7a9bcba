//! The mesh on a sandbox: the CA on node a and one agent per node, the real binary with the flags a cluster would give it. Where the
//! sandbox has an API server, the CA is `culvert control`, and the agents' tokens are the API server's.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;
use serde_json::Value;

use super::manifests::{self, AGENT_ACCOUNT, CONTROL_ACCOUNT, SYSTEM};
use super::place::Place;
use super::plan::Node;
use super::tokens::{AUDIENCE, Claims, ISSUER};
use super::{Process, Sandbox};
use crate::apiserver::write_secret;
use crate::programs::HttpResult;
use crate::{command, patience};

/// Port of the CA.
const CA_PORT: u16 = 15012;
/// Port of an agent's readiness.
const READINESS_PORT: u16 = 15021;
/// Port of the readiness of `culvert control`: on a node of its own it would be an agent's.
const CONTROL_READINESS_PORT: u16 = 15022;
/// Port of the webhook of `culvert control`.
const WEBHOOK_PORT: u16 = 15017;
/// Port of an agent's metrics.
const METRICS_PORT: u16 = 15020;
/// How long it may take to answer there.
const METRICS_LIMIT: Duration = Duration::from_secs(10);
/// What a kubelet asks there, and how long it waits.
const READY_REQUEST: [&str; 4] = ["--path", "/healthz/ready", "--timeout-ms", "500"];
/// How long the CA or an agent may take until it is ready.
const READY_LIMIT: Duration = Duration::from_secs(30);

/// How to start the mesh.
#[derive(Debug, Clone)]
pub struct MeshPlan {
    /// The `culvert` executable.
    pub binary: PathBuf,
    /// Lifetime of workload certificates, as `culvert ca --max-cert-ttl` reads it; `None` is what agents ask for.
    pub cert_ttl: Option<String>,
    /// Whether agents log text, which is their default; [`Sandbox::agent_log`] reads JSON only.
    pub text_log: bool,
    /// Where agents have certificates from instead of the CA.
    pub cert_dir: Option<PathBuf>,
    /// Further arguments of every agent.
    pub agent_arguments: Vec<String>,
    /// Further arguments of the CA.
    pub ca_arguments: Vec<String>,
}

impl MeshPlan {
    /// The executable's defaults.
    pub fn new(binary: impl Into<PathBuf>) -> Self {
        Self {
            binary: binary.into(),
            cert_ttl: None,
            text_log: false,
            cert_dir: None,
            agent_arguments: Vec::new(),
            ca_arguments: Vec::new(),
        }
    }
}

/// One line of an agent's access log.
#[derive(Debug, Clone)]
pub struct LogLine(Value);

impl LogLine {
    /// A line of JSON, as an agent writes it; `None` for one that is none.
    pub fn parse(line: &str) -> Option<Self> {
        line.starts_with('{').then(|| serde_json::from_str(line).ok().map(Self)).flatten()
    }

    /// A field of the line; tracing's JSON puts fields under `fields`, a flat one has them on top.
    pub fn field(&self, name: &str) -> Option<String> {
        let value = self.0.get("fields").and_then(|f| f.get(name)).or_else(|| self.0.get(name))?;
        Some(value.as_str().map_or_else(|| value.to_string(), str::to_owned))
    }

    /// The message of the line.
    pub fn message(&self) -> String {
        self.field("message").unwrap_or_default()
    }
}

impl Sandbox {
    /// Starts the CA and both agents, and waits until all are ready.
    ///
    /// # Errors
    /// One of them ended or was not ready in time; the error shows the end of its log.
    pub fn start_mesh(&mut self, mesh: &MeshPlan) -> Result<()> {
        self.start_ca(mesh)?;
        for node in Node::ALL {
            self.start_agent(mesh, node)?;
        }
        for node in Node::ALL {
            self.wait_ready(node)?;
        }
        Ok(())
    }

    /// Starts the CA on node a and waits until it accepts connections.
    ///
    /// # Errors
    /// It ended or was not ready in time.
    pub fn start_ca(&mut self, mesh: &MeshPlan) -> Result<()> {
        let place = self.service_place(Node::A, "culvert-ca")?;
        if self.manifests().cluster().is_some() {
            return self.start_control(mesh, &place);
        }
        let dir = self.dir().join("ca");
        fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
        let mut ca = place.command(&mesh.binary)?;
        ca.arg("ca")
            .args(["--listen", &ca_address().to_string()])
            .arg("--manifests")
            .arg(self.manifests().path())
            .arg("--ca-dir")
            .arg(&dir)
            .arg("--token-key")
            .arg(self.signer().public_key())
            .args(["--token-audience", AUDIENCE, "--token-issuer", ISSUER])
            .args(["--trusted-node-accounts", &format!("{SYSTEM}/{AGENT_ACCOUNT}")])
            .arg("--root-cert-out")
            .arg(self.root_certificate());
        if let Some(ttl) = &mesh.cert_ttl {
            // Agents ask for a day, so what they get is the CA's maximum.
            ca.args(["--cert-ttl", ttl, "--max-cert-ttl", ttl]);
        }
        ca.args(&mesh.ca_arguments);
        self.start("ca", ca)?;
        command::wait_for("the CA accepts connections", READY_LIMIT, || {
            self.expect_running("ca")?;
            let open =
                place.inside(|| Ok(TcpStream::connect_timeout(&ca_address(), Duration::from_millis(200)).is_ok()))?;
            Ok((open && self.root_certificate().exists()).then_some(()))
        })
        .with_context(|| self.end_of_log("ca"))
    }

    /// Starts `culvert control` on node a, waits until it is ready, and gives the roots that it publishes to the agents, as a kubelet
    /// does with a volume.
    fn start_control(&mut self, mesh: &MeshPlan, place: &Place) -> Result<()> {
        let cluster = self.manifests().cluster().context("the sandbox has an API server")?;
        let mut control = place.command(&mesh.binary)?;
        let readiness = SocketAddr::new(Node::A.v4().into(), CONTROL_READINESS_PORT);
        control
            .arg("control")
            .arg("--kubeconfig")
            .arg(cluster.kubeconfig(CONTROL_ACCOUNT)?)
            .args(["--pod-name", CONTROL_ACCOUNT, "--pod-ip", &Node::A.v4().to_string()])
            .args(["--listen", &ca_address().to_string(), "--readiness-address", &readiness.to_string()])
            .args(["--webhook-listen", &webhook_address().to_string()])
            .args(["--server-names", &format!("istiod.istio-system.svc,{}", Node::A.v4())]);
        if let Some(ttl) = &mesh.cert_ttl {
            control.args(["--cert-ttl", ttl, "--max-cert-ttl", ttl]);
        }
        control.args(&mesh.ca_arguments);
        self.start("ca", control)?;
        let published = command::wait_for("the CA is ready and publishes its roots", READY_LIMIT, || {
            self.expect_running("ca")?;
            let to = readiness.to_string();
            let got: HttpResult =
                self.call_on_node(Node::A, &[&["http-get", "--to", &to][..], &READY_REQUEST].concat())?;
            let roots = match (got.status, self.manifests().cluster()) {
                (Some(200), Some(cluster)) => cluster.roots()?,
                _ => None,
            };
            Ok(roots)
        });
        let roots = published.with_context(|| self.end_of_log("ca"))?;
        let path = self.root_certificate();
        fs::write(&path, roots).with_context(|| format!("write {}", path.display()))
    }

    /// Starts the agent of a node, as its own pod's process; [`Self::wait_ready`] waits for it.
    ///
    /// # Errors
    /// It could not be started.
    pub fn start_agent(&mut self, mesh: &MeshPlan, node: Node) -> Result<()> {
        self.start_agent_as(mesh, node, &agent_process(node))
    }

    /// Starts an agent of a node as a process of another name, so that it can be beside one that runs already.
    ///
    /// # Errors
    /// It could not be started.
    pub fn start_agent_as(&mut self, mesh: &MeshPlan, node: Node, name: &str) -> Result<()> {
        let place = self.agent_place(node)?;
        let token = self.dir().join(format!("token-{}", node.letter()));
        match self.manifests().cluster() {
            Some(cluster) => write_secret(&token, cluster.token(&manifests::agent_name(node))?.as_bytes())?,
            None => self.signer().sign_to(&self.agent_claims(node), &token)?,
        }
        let pins = self.pin_dir(node);
        self.ledger.will_pin(&pins)?;
        let mut agent = place.command(&mesh.binary)?;
        agent
            .arg("agent")
            .args(["--node-name", node.name()])
            .arg("--cgroup-root")
            .arg(self.node_cgroup(node))
            .arg("--kubelet-cgroup")
            .arg(self.kubelet_place(node)?.cgroup)
            .arg("--pin-dir")
            .arg(&pins)
            .args(["--log-format", if mesh.text_log { "text" } else { "json" }]);
        match self.manifests().cluster() {
            Some(cluster) => agent
                .arg("--kubeconfig")
                .arg(cluster.kubeconfig(AGENT_ACCOUNT)?)
                .args(["--control-address", &ca_address().to_string()]),
            None => agent.arg("--manifests").arg(self.manifests().path()),
        };
        match &mesh.cert_dir {
            Some(dir) => agent.arg("--cert-dir").arg(dir),
            None => agent
                .args(["--ca-address", &ca_address().to_string()])
                .arg("--ca-root")
                .arg(self.root_certificate())
                .arg("--ca-token")
                .arg(&token),
        };
        agent.args(&mesh.agent_arguments);
        self.start(name, agent)
    }

    /// Waits until the agent of a node says that it is ready.
    ///
    /// # Errors
    /// It ended or was not ready in time; the error shows the end of its log.
    pub fn wait_ready(&mut self, node: Node) -> Result<()> {
        let name = agent_process(node);
        let to = SocketAddr::new(node.v4().into(), READINESS_PORT);
        command::wait_for(&format!("the agent of {node} is ready"), READY_LIMIT, || {
            self.expect_running(&name)?;
            let got: HttpResult =
                self.call_on_node(node, &[&["http-get", "--to", &to.to_string()][..], &READY_REQUEST].concat())?;
            Ok((got.status == Some(200)).then_some(()))
        })
        .with_context(|| self.end_of_log(&name))
    }

    /// The metrics of a node's agent, as whoever collects them reads them.
    ///
    /// # Errors
    /// It does not answer.
    pub fn metrics(&self, node: Node) -> Result<String> {
        let text = self.node_place(node).inside(|| {
            let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, METRICS_PORT))?;
            stream.set_read_timeout(Some(METRICS_LIMIT * patience()))?;
            write!(stream, "GET /metrics HTTP/1.1\r\nhost: node\r\n\r\n")?;
            let mut text = String::new();
            stream.read_to_string(&mut text)?;
            Ok(text)
        });
        text.with_context(|| format!("the metrics of {node}"))
    }

    /// The memory that is a process's own, in KiB: resident or swapped, and no page of a file, which the kernel takes and
    /// gives back as it likes (proc(5), `RssAnon` and `VmSwap`).
    ///
    /// # Errors
    /// No such process runs.
    pub fn own_memory(&self, name: &str) -> Result<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid(name)?))?;
        let of = |field: &str| -> Result<u64> {
            let value = status.lines().find_map(|line| line.strip_prefix(field)).with_context(|| field.to_owned())?;
            Ok(value.trim().trim_end_matches(" kB").parse()?)
        };
        Ok(of("RssAnon:")? + of("VmSwap:")?)
    }

    /// Sends a signal to the agent of a node; SIGKILL is waited for.
    ///
    /// # Errors
    /// It does not run.
    pub fn signal_agent(&mut self, node: Node, signal: Signal) -> Result<()> {
        self.signal(&agent_process(node), signal)
    }

    /// What the token of a node's agent says; change it to make one that must be refused.
    pub fn agent_claims(&self, node: Node) -> Claims {
        let name = manifests::agent_name(node);
        let uid = |of: &str| self.uid(of);
        Claims {
            issuer: ISSUER.to_owned(),
            audience: AUDIENCE.to_owned(),
            namespace: SYSTEM.to_owned(),
            account: (AGENT_ACCOUNT.to_owned(), uid(&manifests::account_identity(SYSTEM, AGENT_ACCOUNT))),
            pod: (name.clone(), uid(&manifests::pod_identity(SYSTEM, &name))),
            node: (node.name().to_owned(), uid(&format!("node/{node}"))),
            lifetime_s: 24 * 3600,
        }
    }

    /// The lines that an agent has logged since `offset` (bytes; past the end: none), and the offset after the last.
    ///
    /// # Errors
    /// The log could not be read, or a line of it is not JSON.
    pub fn agent_log(&self, node: Node, offset: u64) -> Result<(Vec<LogLine>, u64)> {
        self.log_of(&agent_process(node), offset)
    }

    /// As [`Self::agent_log`], of an agent that was started under a name of its own.
    ///
    /// # Errors
    /// As there.
    pub fn log_of(&self, process: &str, offset: u64) -> Result<(Vec<LogLine>, u64)> {
        let path = self.log_path(process);
        let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
        // The last line may be only half written: it is for the next time.
        let end = text.rfind('\n').map_or(0, |at| at + 1);
        let start = usize::try_from(offset)?.min(end);
        let whole = &text[start..end];
        let mut lines = Vec::new();
        for line in whole.lines().filter(|l| l.starts_with('{')) {
            let value = serde_json::from_str(line).with_context(|| format!("{}: {line}", path.display()))?;
            lines.push(LogLine(value));
        }
        Ok((lines, u64::try_from(end)?))
    }

    /// File of the CA's root certificate, PEM.
    pub fn root_certificate(&self) -> PathBuf {
        self.dir().join("root-cert.pem")
    }

    /// The directory in which a node's agent pins its maps and links.
    pub fn pin_dir(&self, node: Node) -> PathBuf {
        Path::new(BPFFS).join(format!("{}-{node}", self.plan.prefix()))
    }
}

/// Where the BPF file system belongs.
const BPFFS: &str = "/sys/fs/bpf";

/// Mounts the BPF file system where every distribution's init does, if nobody has. It stays: other programs may by now
/// have pinned things in it.
pub(super) fn mount_bpffs() -> Result<()> {
    let mounts = fs::read_to_string("/proc/self/mounts").context("read /proc/self/mounts")?;
    if mounts.lines().any(|l| l.split(' ').nth(1) == Some(BPFFS) && l.split(' ').nth(2) == Some("bpf")) {
        return Ok(());
    }
    nix::mount::mount(Some("bpf"), BPFFS, Some("bpf"), nix::mount::MsFlags::empty(), None::<&str>)
        .context("mount the BPF file system on /sys/fs/bpf")
}

/// Name of an agent's process in the sandbox.
pub fn agent_process(node: Node) -> String {
    format!("agent-{}", node.letter())
}

/// Where `culvert control` says what is wrong with a policy before it is stored.
pub(super) fn webhook_address() -> SocketAddr {
    SocketAddr::new(Node::A.v4().into(), WEBHOOK_PORT)
}

fn ca_address() -> SocketAddr {
    SocketAddr::new(Node::A.v4().into(), CA_PORT)
}

impl Process {
    /// Fails if the process has ended.
    pub(super) fn check(&mut self) -> Result<()> {
        match self.child.try_wait().context("ask for a process's end")? {
            Some(status) => bail!("{} ended with {status}", self.record.what),
            None => Ok(()),
        }
    }
}
