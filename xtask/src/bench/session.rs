//! One peer, up: the sandbox, what lies between its pods, servers to ask, and what all of it uses.

use std::fmt::Write as _;
use std::fs;
use std::io::{BufRead, BufReader, ErrorKind, Read};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use culvert_tests::load::usage::{self, Cpu};
use culvert_tests::load::{LoadResult, PATTERN};
use culvert_tests::sandbox::{Family, MeshPlan, Node, Place, Plan, PodPlan, Sandbox, agent_process};
use culvert_tests::{command, interrupt};

use super::{Peer, envoy};

const CLIENT: &str = "test/client";
/// A server on the other node.
pub(super) const FAR: &str = "default/server";
/// A server on the client's own node.
pub(super) const NEAR: &str = "default/local";
/// A pod of the client's node that is not in the mesh.
const OUTSIDE: &str = "test/outside";
/// Port of both servers.
const PORT: u16 = 7000;
/// Addresses of the far server that are used for nothing but first contacts.
const FIRST_CONTACTS: u8 = 128;
/// Longer than any load.
const LOAD_LIMIT: Duration = Duration::from_secs(150);

/// A policy of the far server that is changed there and back.
#[derive(Clone, Copy)]
pub(super) enum Change {
    /// A PeerAuthentication, STRICT and PERMISSIVE.
    Mode,
    /// A DENY AuthorizationPolicy of the client's address, and of nobody's.
    Deny,
}

impl Change {
    /// The manifest that refuses the client of this address, or the one that does not.
    fn manifest(self, refuse: bool, client: Ipv4Addr) -> String {
        let (kind, spec) = match self {
            Self::Mode => {
                ("PeerAuthentication", format!("mtls: {{mode: {}}}", if refuse { "STRICT" } else { "PERMISSIVE" }))
            }
            Self::Deny => {
                // Nobody has an address that is only for documentation.
                let block = if refuse { client } else { Ipv4Addr::new(192, 0, 2, 1) };
                let rules = format!("rules: [{{from: [{{source: {{ipBlocks: [{block}/32]}}}}]}}]");
                ("AuthorizationPolicy", format!("action: DENY, {rules}"))
            }
        };
        format!(
            "apiVersion: security.istio.io/v1\nkind: {kind}\nmetadata: {{namespace: default, name: changed}}\n\
             spec: {{selector: {{matchLabels: {{app: server}}}}, {spec}}}\n"
        )
    }
}

/// The programs.
pub(super) struct Tools {
    pub(super) culvert: PathBuf,
    pub(super) load: PathBuf,
    /// Only if Envoy is a peer.
    pub(super) envoy: Option<PathBuf>,
}

pub(super) struct Session<'a> {
    sandbox: Sandbox,
    tools: &'a Tools,
    /// Process numbers of the proxies.
    proxies: Vec<u32>,
    /// From the agents' start until both were ready.
    pub(super) ready: Duration,
}

impl<'a> Session<'a> {
    /// Builds two nodes and puts the peer between their pods. `more` is a manifest that the agents have besides.
    pub(super) fn up(peer: Peer, tools: &'a Tools, more: Option<&str>) -> Result<Self> {
        let plan = Plan::empty("bench")
            .pod(PodPlan::new(Node::A, "test", "client"))
            .pod(PodPlan::new(Node::A, "test", "outside").label("istio.io/dataplane-mode", "none"))
            .pod(PodPlan::new(Node::A, "default", "local"))
            .pod(PodPlan::new(Node::B, "default", "server").more_addresses(FIRST_CONTACTS));
        let mut sandbox = Sandbox::build(plan)?;
        let places: Vec<Place> = Node::ALL
            .iter()
            .map(|&node| sandbox.node_place(node).clone())
            .chain(sandbox.pods().map(|pod| pod.place.clone()))
            .collect();
        places.iter().try_for_each(tune)?;
        if let Some(more) = more {
            sandbox.manifests().apply("more.yaml", more)?;
        }
        let mut ready = Duration::ZERO;
        let names: Vec<String> = match peer {
            Peer::Plain => Vec::new(),
            Peer::Culvert => {
                let mesh = MeshPlan::new(&tools.culvert);
                sandbox.start_ca(&mesh)?;
                let begun = Instant::now();
                for node in Node::ALL {
                    sandbox.start_agent(&mesh, node)?;
                }
                for node in Node::ALL {
                    sandbox.wait_ready(node)?;
                }
                ready = begun.elapsed();
                Node::ALL.map(agent_process).into()
            }
            Peer::Envoy => {
                let binary = tools.envoy.as_ref().context("Envoy was not fetched")?;
                envoy::start(&mut sandbox, binary)?;
                sandbox.pods().map(envoy::process).collect()
            }
        };
        let proxies = names.iter().map(|name| sandbox.pid(name)).collect::<Result<_>>()?;
        let mut session = Self { sandbox, tools, proxies, ready };
        for pod in [FAR, NEAR] {
            session.serve(pod)?;
        }
        session.prove(peer)?;
        Ok(session)
    }

    fn serve(&mut self, pod: &str) -> Result<()> {
        let place = self.sandbox.pod(pod)?.place.clone();
        let mut server = place.command(&self.tools.load)?;
        server.args(["serve", "--port", &PORT.to_string()]);
        let name = format!("serve-{}", pod.replace('/', "-"));
        self.sandbox.start(&name, server)?;
        command::wait_for(&format!("{name} listens"), Duration::from_secs(10), || {
            self.sandbox.expect_running(&name)?;
            let to = (Ipv4Addr::LOCALHOST, PORT).into();
            let open = place.inside(|| Ok(TcpStream::connect_timeout(&to, Duration::from_millis(200)).is_ok()))?;
            Ok(open.then_some(()))
        })
    }

    /// A peer that is not in between, or does not encrypt, would give beautiful figures.
    fn prove(&self, peer: Peer) -> Result<()> {
        let link = self.sandbox.capture()?;
        let got =
            self.load(&["connects", "--to", &self.at(FAR)?, "--at-once", "1", "--count", "3", "--body", "500"])?;
        ensure!(got.done == 3 && got.failed == 0, "{peer}: the pods do not reach each other: {:?}", got.error);
        let readable = link.contains(PATTERN)?;
        ensure!(readable == (peer == Peer::Plain), "{peer}: bytes on the link are readable: {readable}");
        Ok(())
    }

    pub(super) fn down(self) -> Result<()> {
        self.sandbox.take_down()
    }

    /// Has the far server refuse a pod outside the mesh and serve it in turn: how long after the manifest was in place the
    /// kernel answered that pod accordingly.
    pub(super) fn changes(&self, change: Change, count: usize) -> Result<Vec<Duration>> {
        const LIMIT: Duration = Duration::from_secs(20);
        let to: SocketAddr = self.at(FAR)?.parse().context("the server's address")?;
        let folder = self.sandbox.manifests();
        let outside = self.sandbox.pod(OUTSIDE)?;
        let client = outside.v4;
        outside.place.inside(|| {
            let mut took = Vec::with_capacity(count);
            for refuse in (0..count).map(|nth| nth % 2 == 0) {
                interrupt::check()?;
                thread::sleep(Duration::from_millis(50));
                let policy = change.manifest(refuse, client);
                folder.apply("changed.yaml", &policy)?;
                let begun = Instant::now();
                loop {
                    let refused = match TcpStream::connect_timeout(&to, Duration::from_secs(1)) {
                        Ok(_) => false,
                        // At once, or when it has just begun. Any other failure says nothing about policy.
                        Err(error)
                            if matches!(error.kind(), ErrorKind::ConnectionRefused | ErrorKind::ConnectionReset) =>
                        {
                            true
                        }
                        Err(error) => return Err(error).context("connect from outside the mesh"),
                    };
                    if refused == refuse {
                        break;
                    }
                    ensure!(begun.elapsed() < LIMIT, "it is not in force after {LIMIT:?}: {policy}");
                    // Not shorter: each connection keeps a port for a minute.
                    thread::sleep(Duration::from_millis(1));
                }
                took.push(begun.elapsed());
            }
            Ok(took)
        })
    }

    /// A server's address and port.
    pub(super) fn at(&self, pod: &str) -> Result<String> {
        Ok(self.sandbox.pod(pod)?.at(Family::V4, PORT).to_string())
    }

    /// Addresses and ports that nobody has used yet, separated by commas.
    pub(super) fn first_contacts(&self) -> Result<Vec<String>> {
        let addresses = &self.sandbox.pod(FAR)?.more_v4;
        Ok(addresses.iter().map(|&address| SocketAddr::from((address, PORT)).to_string()).collect())
    }

    /// Runs a load in the client's pod to its end.
    pub(super) fn load<S: AsRef<str>>(&self, arguments: &[S]) -> Result<LoadResult> {
        self.spawn(arguments)?.finish()
    }

    /// Starts a load in the client's pod.
    pub(super) fn spawn<S: AsRef<str>>(&self, arguments: &[S]) -> Result<Running> {
        let mut client = self.sandbox.pod(CLIENT)?.place.command(&self.tools.load)?;
        client.args(arguments.iter().map(AsRef::as_ref));
        client.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let shown = command::describe(&client);
        let child = client.spawn().with_context(|| format!("start `{shown}`"))?;
        Ok(Running { child, shown })
    }

    /// What `work` measures, and the CPU time of the proxies meanwhile, if there are any.
    pub(super) fn with_cpu<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<(T, Option<Cpu>)> {
        let before = self.cpu()?;
        let result = work()?;
        let used = self.cpu()? - before;
        Ok((result, (!self.proxies.is_empty()).then_some(used)))
    }

    fn cpu(&self) -> Result<Cpu> {
        self.proxies.iter().try_fold(Cpu::default(), |sum, &pid| Ok(sum + usage::cpu(pid)?))
    }

    /// Resident memory of all proxies together, KiB, if there are any.
    pub(super) fn memory_kib(&self) -> Result<Option<f64>> {
        self.proxies.iter().try_fold(None, |sum, &pid| Ok(Some(sum.unwrap_or(0.0) + usage::memory_kib(pid)?)))
    }
}

/// A load that runs; dropping it ends it.
pub(super) struct Running {
    child: Child,
    shown: String,
}

impl Running {
    /// Waits for its end and reads its result.
    pub(super) fn finish(mut self) -> Result<LoadResult> {
        let begun = Instant::now();
        // Its one line fits into the pipe, so nothing has to be read meanwhile.
        let status = loop {
            interrupt::check()?;
            match self.child.try_wait()? {
                Some(status) => break status,
                None if begun.elapsed() > LOAD_LIMIT => bail!("`{}` has not ended after {LOAD_LIMIT:?}", self.shown),
                None => thread::sleep(Duration::from_millis(5)),
            }
        };
        let (mut out, mut said) = (String::new(), String::new());
        if let (Some(stdout), Some(stderr)) = (&mut self.child.stdout, &mut self.child.stderr) {
            stdout.read_to_string(&mut out)?;
            stderr.read_to_string(&mut said)?;
        }
        ensure!(status.success(), "`{}` ended with {status}: {}", self.shown, said.trim());
        serde_json::from_str(out.trim()).with_context(|| format!("the result of `{}`: {out}", self.shown))
    }

    /// The first line of one that goes on until it is dropped.
    pub(super) fn first_line(&mut self) -> Result<LoadResult> {
        let stdout = self.child.stdout.as_mut().context("its output")?;
        let mut line = String::new();
        BufReader::new(stdout).read_line(&mut line)?;
        if line.is_empty() {
            let mut said = String::new();
            self.child.stderr.as_mut().context("its errors")?.read_to_string(&mut said)?;
            bail!("`{}` ended: {}", self.shown, said.trim());
        }
        serde_json::from_str(line.trim()).with_context(|| format!("the result of `{}`: {line}", self.shown))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Room for tens of thousands of connections from one address within seconds, the same for every peer.
fn tune(place: &Place) -> Result<()> {
    place.inside(|| {
        for (name, value) in [
            ("net/ipv4/ip_local_port_range", "2048 65000"),
            ("net/ipv4/ip_local_reserved_ports", "7000,15000-15100"),
            ("net/ipv4/tcp_tw_reuse", "1"),
            ("net/ipv4/tcp_max_tw_buckets", "2000"),
            ("net/ipv4/tcp_max_syn_backlog", "65535"),
            ("net/core/somaxconn", "65535"),
            ("net/netfilter/nf_conntrack_tcp_timeout_time_wait", "5"),
            ("net/netfilter/nf_conntrack_tcp_timeout_close", "2"),
        ] {
            let path = Path::new("/proc/sys").join(name);
            // Connection tracking is a module that may not be loaded.
            if path.exists() {
                fs::write(&path, value).with_context(|| format!("write {value} to {}", path.display()))?;
            }
        }
        Ok(())
    })
}

fn namespace(nth: usize) -> String {
    if nth == 0 { "default".to_owned() } else { format!("elsewhere-{nth}") }
}

/// Policies for those pods, as many of each kind; all of them allow what nobody does.
pub(super) fn policies(count: usize, namespaces: usize) -> Result<String> {
    let mut out = String::new();
    for nth in 0..count / 2 {
        let namespace = namespace(nth % namespaces);
        let of = |kind: &str| {
            format!(
                "---\napiVersion: security.istio.io/v1\nkind: {kind}\nmetadata: {{namespace: {namespace}, name: \
                 elsewhere-{nth}}}\nspec:\n  selector: {{matchLabels: {{app: elsewhere-{}}}}}\n",
                nth % 1000
            )
        };
        writeln!(out, "{}  mtls: {{mode: STRICT}}", of("PeerAuthentication"))?;
        writeln!(
            out,
            "{}  rules: [{{from: [{{source: {{principals: [cluster.local/ns/{namespace}/sa/elsewhere-{}]}}}}]}}]",
            of("AuthorizationPolicy"),
            nth % 100
        )?;
    }
    Ok(out)
}

/// Pods of nodes that are not here, an address each; a hundred service accounts.
pub(super) fn elsewhere(count: usize, namespaces: usize) -> Result<String> {
    let mut out = String::new();
    for nth in 0..count {
        let namespace = namespace(nth % namespaces);
        let (high, low) = (nth / 250, 1 + nth % 250);
        write!(
            out,
            "---\napiVersion: v1\nkind: Pod\nmetadata: {{namespace: {namespace}, name: elsewhere-{nth}, \
             uid: 00000000-0000-4000-8000-{nth:012x}, labels: {{app: elsewhere-{}}}}}\n\
             spec: {{nodeName: elsewhere-{}, serviceAccountName: elsewhere-{}, containers: [{{name: app, image: none}}]}}\n\
             status: {{phase: Running, conditions: [{{type: Ready, status: \"True\"}}], podIPs: [{{ip: 10.{}.{}.{low}}}]}}\n",
            nth % 1000,
            nth / 100,
            nth % 100,
            128 + high / 250,
            high % 250,
        )?;
    }
    Ok(out)
}
