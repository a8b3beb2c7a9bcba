//! What the scenarios share: a mesh, policies put in force, and the places to look at afterwards.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsRawFd as _;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use std::{fs, thread};

use anyhow::{Context, Result, bail, ensure};
use culvert_common::{LAYOUT_VERSION, Reason};
use culvert_tests::command;
use culvert_tests::programs::{Failure, HeldRound, HttpResult};
use culvert_tests::sandbox::{Family, LogLine, MeshPlan, Node, Plan, PodPlan, Sandbox, agent_process, built};
use serde_json::Value;

pub(crate) const NGINX: &str = "test/nginx";
pub(crate) const LEGACY: &str = "test/legacy-app";
pub(crate) const SERVER: &str = "default/productpage";
/// Port of the exchange server that [`plan`] gives to the server.
pub(crate) const EXCHANGE: u16 = 7000;
/// How long a change of policy may take to reach every open connection ([D.1]).
pub(crate) const EFFECT: Duration = Duration::from_secs(1);
/// How long the line of a finished connection may take to appear.
pub(crate) const LOG_LIMIT: Duration = Duration::from_secs(3);
/// A refusal that took longer was a time-out.
pub(crate) const AT_ONCE_MS: u64 = 250;

const POLICY_FILE: &str = "policy.yaml";

/// The user's scenario, with an exchange server beside the server's HTTP.
pub(crate) fn plan(instance: &str) -> Plan {
    let mut plan = Plan::bookinfo(instance);
    let server = plan.pods.iter_mut().find(|pod| pod.key() == SERVER).expect("bookinfo has a productpage");
    *server = server.clone().program(&["exchange-serve", &format!("--port={EXCHANGE}"), "--port=7001"]);
    plan
}

/// A pod that serves HTTP and the exchange protocol.
pub(crate) fn server(node: Node, namespace: &str, name: &str) -> PodPlan {
    PodPlan::new(node, namespace, name).http(&[9080]).program(&["exchange-serve", "--port=7000", "--port=7001"])
}

pub(crate) fn mesh(plan: Plan) -> Result<Sandbox> {
    let mut sandbox = Sandbox::build(plan)?;
    sandbox.start_mesh(&MeshPlan::new(built("culvert")?))?;
    Ok(sandbox)
}

/// A PeerAuthentication; `spec` in flow style.
pub(crate) fn policy(namespace: &str, name: &str, spec: &str) -> String {
    format!(
        "---\napiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {{name: {name}, namespace: {namespace}}}\nspec: {spec}\n"
    )
}

/// Of namespace default, for the server alone.
pub(crate) fn for_server(rest: &str) -> String {
    policy("default", "productpage", &format!("{{selector: {{matchLabels: {{app: productpage}}}}, {rest}}}"))
}

pub(crate) fn strict(namespace: &str) -> String {
    policy(namespace, "wide", "{mtls: {mode: STRICT}}")
}

/// Puts these policies, and no others, in force on both nodes, and waits until they are.
pub(crate) fn put(sandbox: &Sandbox, policies: &[String]) -> Result<()> {
    static STEP: AtomicU32 = AtomicU32::new(0);
    // A policy of a namespace without pods changes no verdict, but makes every agent say that it has compiled this file.
    let barrier = policy("barrier", &format!("step-{}", STEP.fetch_add(1, Ordering::Relaxed)), "{}");
    let before = offsets(sandbox)?;
    sandbox.manifests().apply(POLICY_FILE, &(policies.concat() + &barrier))?;
    for (node, offset) in Node::ALL.into_iter().zip(before) {
        command::wait_for(&format!("the agent of {node} compiled the policy"), LOG_LIMIT, || {
            let (lines, _) = sandbox.agent_log(node, offset)?;
            Ok(lines.iter().any(|line| line.message() == "policy compiled").then_some(()))
        })?;
    }
    // From the line to the maps it is one step of the same thread.
    thread::sleep(Duration::from_millis(100));
    Ok(())
}

/// Writes policies and returns at once.
pub(crate) fn write(sandbox: &Sandbox, policies: &[String]) -> Result<()> {
    sandbox.manifests().apply(POLICY_FILE, &policies.concat())
}

/// Ends of both agents' logs.
pub(crate) fn offsets(sandbox: &Sandbox) -> Result<[u64; 2]> {
    let end = |node| anyhow::Ok(fs::metadata(sandbox.log_path(&agent_process(node)))?.len());
    Ok([end(Node::A)?, end(Node::B)?])
}

pub(crate) fn end_of_log(sandbox: &Sandbox, node: Node) -> Result<u64> {
    let [a, b] = offsets(sandbox)?;
    Ok(if node == Node::A { a } else { b })
}

/// The first line after `offset` that is as wanted.
pub(crate) fn line(
    sandbox: &Sandbox,
    node: Node,
    offset: u64,
    what: &str,
    is: impl Fn(&LogLine) -> bool,
) -> Result<LogLine> {
    command::wait_for(&format!("a line of {node}'s agent: {what}"), LOG_LIMIT, || {
        Ok(sandbox.agent_log(node, offset)?.0.into_iter().find(&is))
    })
}

/// Whether a field of a line is this text.
pub(crate) fn has(line: &LogLine, field: &str, text: &str) -> bool {
    line.field(field).as_deref() == Some(text)
}

/// The one way in which the two ends of a connection are written in the access log.
pub(crate) fn is_from(line: &LogLine, from: SocketAddr) -> bool {
    let addr = line.field("src.addr").and_then(|addr| addr.parse::<SocketAddr>().ok());
    addr.is_some_and(|addr| addr.ip().to_canonical() == from.ip().to_canonical() && addr.port() == from.port())
}

pub(crate) fn cluster(sandbox: &Sandbox, service: &str, family: Family, port: u16) -> Result<SocketAddr> {
    Ok(SocketAddr::new(sandbox.cluster_ip(service, family)?, port))
}

/// What a client must get.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Want {
    /// Through a tunnel: served, seen with its own address, unreadable on the link.
    Tunnel,
    /// As it is: served, seen with its own address; readable, if it crosses the link.
    Plain,
    /// A reset, at once.
    Refused,
}

pub(crate) fn marker(of: &str) -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let plain: String = of.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect();
    format!("marker-{}-{}-{plain}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}

/// Makes one call and checks what the client got.
pub(crate) fn call(sandbox: &Sandbox, from: &str, to: SocketAddr, marker: &str, want: Want) -> Result<HttpResult> {
    let got = sandbox.http(from, to, marker)?;
    check(&got, want).with_context(|| format!("{from} to {to}: {} {:?}", got.brief(), got.error))?;
    if let Some(seen) = &got.seen {
        let source = sandbox.pod(from)?.at(Family::V4, 0).ip();
        let own = [source, sandbox.pod(from)?.at(Family::V6, 0).ip()];
        ensure!(own.contains(&seen.peer.ip()), "{from} to {to}: the server saw {} [K.3]", seen.peer);
    }
    Ok(got)
}

pub(crate) fn check(got: &HttpResult, want: Want) -> Result<()> {
    match want {
        Want::Tunnel | Want::Plain => ensure!(got.status == Some(200), "must be served"),
        Want::Refused => {
            ensure!(refused(got.failure), "must be refused with a reset");
            ensure!(got.millis < AT_ONCE_MS, "was refused only after {} ms", got.millis);
        }
    }
    Ok(())
}

pub(crate) fn refused(failure: Option<Failure>) -> bool {
    matches!(failure, Some(Failure::Refused | Failure::Reset))
}

/// How often a pod's verdicts had this reason, by the kernel's counters.
pub(crate) fn counted(sandbox: &Sandbox, pod: &str, reason: Reason) -> Result<u64> {
    let plan = sandbox.pod(pod)?;
    let cookie = netns_cookie(sandbox, pod)?;
    let map = sandbox.pin_dir(plan.plan.node).join(format!("v{LAYOUT_VERSION}/VERDICTS"));
    let out =
        command::run("bpftool", &["-j".as_ref(), "map".as_ref(), "dump".as_ref(), "pinned".as_ref(), map.as_os_str()])?;
    let dump: Value = serde_json::from_str(&out).context("bpftool's output")?;
    let mut sum = 0;
    for entry in dump.as_array().context("a list of entries")? {
        let shown = &entry["formatted"];
        let key = &shown["key"];
        let (Some(of), Some(why)) = (key["netns_cookie"].as_u64(), key["reason"].as_u64()) else {
            bail!("a verdict without BTF names: {entry}");
        };
        if of == cookie && why == reason as u64 {
            let values = shown["values"].as_array().with_context(|| format!("values of each CPU in {entry}"))?;
            sum += values.iter().filter_map(|value| value["value"].as_u64()).sum::<u64>();
        }
    }
    Ok(sum)
}

fn netns_cookie(sandbox: &Sandbox, pod: &str) -> Result<u64> {
    sandbox.pod(pod)?.place.inside(|| {
        let socket = std::net::UdpSocket::bind("127.0.0.1:0")?;
        let (mut cookie, mut len) = (0_u64, 8);
        // SAFETY: the buffer is a live u64 and `len` its size.
        let result = unsafe {
            libc::getsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                SO_NETNS_COOKIE,
                (&raw mut cookie).cast(),
                &raw mut len,
            )
        };
        ensure!(result == 0, "getsockopt SO_NETNS_COOKIE: {}", std::io::Error::last_os_error());
        Ok(cookie)
    })
}

/// `SO_NETNS_COOKIE` of <asm-generic/socket.h>.
const SO_NETNS_COOKIE: i32 = 71;

/// A connection that a program in a pod holds open, with a line there and back every 20 ms.
pub(crate) struct Held {
    name: String,
}

impl Held {
    /// Opens it and waits for the first round.
    pub(crate) fn open(sandbox: &mut Sandbox, name: &str, from: &str, to: SocketAddr) -> Result<Self> {
        sandbox.start_in_pod(name, from, &["hold", "--to", &to.to_string()])?;
        let held = Self { name: name.to_owned() };
        held.passes(sandbox).with_context(|| format!("{name}: {from} to {to}"))?;
        Ok(held)
    }

    pub(crate) fn last(&self, sandbox: &Sandbox) -> Result<Option<HeldRound>> {
        let text = fs::read_to_string(sandbox.log_path(&self.name))?;
        let whole = &text[..text.rfind('\n').map_or(0, |at| at + 1)];
        let last = whole.lines().next_back();
        last.map(|line| serde_json::from_str(line).with_context(|| format!("{}: {line}", self.name))).transpose()
    }

    /// Bytes still pass now: three more rounds.
    pub(crate) fn passes(&self, sandbox: &Sandbox) -> Result<()> {
        let before = self.last(sandbox)?.map_or(0, |round| round.rounds);
        command::wait_for(&format!("{} passes bytes", self.name), Duration::from_secs(3), || {
            let Some(last) = self.last(sandbox)? else { return Ok(None) };
            ensure!(last.failure.is_none(), "{} ended: {last:?}", self.name);
            Ok((last.rounds >= before + 3).then_some(()))
        })
    }

    /// The end of it, which must come within `limit`.
    pub(crate) fn ended(&self, sandbox: &Sandbox, limit: Duration) -> Result<HeldRound> {
        command::wait_for(&format!("{} has ended", self.name), limit, || {
            Ok(self.last(sandbox)?.filter(|round| round.failure.is_some()))
        })
    }
}

pub(crate) fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).ok().and_then(|d| u64::try_from(d.as_millis()).ok()).unwrap_or(0)
}

/// Rewrites the manifest of a pod: each pair is a text that must be there, and what takes its place.
pub(crate) fn edit_pod(sandbox: &Sandbox, pod: &str, edits: &[(&str, &str)]) -> Result<()> {
    edit(sandbox, &format!("pod-{}.yaml", pod.replace('/', "-")), edits)
}

pub(crate) fn edit(sandbox: &Sandbox, file: &str, edits: &[(&str, &str)]) -> Result<()> {
    let path = sandbox.manifests().path().join(file);
    let mut text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
    for (old, new) in edits {
        ensure!(text.contains(old), "{file} does not contain {old:?}");
        text = text.replace(old, new);
    }
    sandbox.manifests().apply(file, &text)
}

/// A Service with one cluster IP; `rest` of its spec in flow style.
pub(crate) fn service(name: &str, ip: IpAddr, rest: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: default}}\nspec: {{type: ClusterIP, clusterIP: \"{ip}\", clusterIPs: [\"{ip}\"], {rest}}}\n"
    )
}
