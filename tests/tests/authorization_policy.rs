//! AuthorizationPolicy at work: real agents, real packets, manifests dropped into the watched folder.

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use culvert::policy::MAX_BLOCKS;
use culvert_tests::programs::{Failure, HeldRound, HttpResult};
use culvert_tests::sandbox::{Family, LogLine, MeshPlan, Node, Plan, Sandbox, agent_process, built, own_name};
use culvert_tests::{command, patience};
use nix::sys::signal::Signal;

const NGINX: &str = "test/nginx";
const LEGACY: &str = "test/legacy-app";
const RATINGS: &str = "default/ratings";
/// On node b; everybody else is on node a.
const SERVER: &str = "default/productpage";
/// Port of the server's exchange.
const EXCHANGE: u16 = 7000;
/// Silence after which the kernel refuses (`SILENT_AFTER_NS`).
const SILENT_AFTER: Duration = Duration::from_secs(10);
const POLICY_FILE: &str = "policy.yaml";

/// How long a change of policy may take to reach every open connection ([D.1]).
fn effect() -> Duration {
    Duration::from_secs(1) * patience()
}

/// How long a line of a log may take to appear.
fn log_limit() -> Duration {
    Duration::from_secs(5) * patience()
}

fn mesh(test: &str) -> Result<Sandbox> {
    let mut plan = Plan::bookinfo(&own_name(test));
    let server = plan.pods.iter_mut().find(|pod| pod.key() == SERVER).context("bookinfo has a productpage")?;
    *server = server.clone().program(&["exchange-serve", &format!("--port={EXCHANGE}")]);
    let mut sandbox = Sandbox::build(plan)?;
    sandbox.start_mesh(&MeshPlan::new(built("culvert")?))?;
    Ok(sandbox)
}

/// An AuthorizationPolicy of the server's namespace for the server alone; `meta` and `spec` in flow style.
fn authz(name: &str, meta: &str, spec: &str) -> String {
    format!(
        "---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: {name}, namespace: default{meta}}}\n\
         spec: {{selector: {{matchLabels: {{app: productpage}}}}, {spec}}}\n"
    )
}

/// Puts these policies, and no others, in force on both nodes, and waits until they are compiled.
fn put(sandbox: &Sandbox, policies: &[String]) -> Result<()> {
    static STEP: AtomicU32 = AtomicU32::new(0);
    // Of a namespace without pods: it changes no verdict, but makes every agent say that it has compiled this file.
    let barrier = format!(
        "---\napiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {{name: step-{}, namespace: barrier}}\n",
        STEP.fetch_add(1, Ordering::Relaxed)
    );
    let mut before = Vec::new();
    for node in Node::ALL {
        before.push((node, end_of_log(sandbox, node)?));
    }
    sandbox.manifests().apply(POLICY_FILE, &(policies.concat() + &barrier))?;
    for (node, offset) in before {
        line(sandbox, node, offset, "that it compiled the policy", |line| line.message() == "policy compiled")?;
    }
    Ok(())
}

fn end_of_log(sandbox: &Sandbox, node: Node) -> Result<u64> {
    Ok(fs::metadata(sandbox.log_path(&agent_process(node)))?.len())
}

fn line(sandbox: &Sandbox, node: Node, offset: u64, what: &str, is: impl Fn(&LogLine) -> bool) -> Result<LogLine> {
    command::wait_for(&format!("a line of {node}'s agent: {what}"), log_limit(), || {
        Ok(sandbox.agent_log(node, offset)?.0.into_iter().find(&is))
    })
}

/// About a connection from this address, told by the server's side.
fn is_inbound(line: &LogLine, from: IpAddr) -> bool {
    let addr = line.field("src.addr").and_then(|addr| addr.parse::<SocketAddr>().ok());
    let inbound = line.field("direction").as_deref() == Some("inbound");
    inbound && addr.is_some_and(|addr| addr.ip().to_canonical() == from) && line.message().starts_with("connection ")
}

/// What a client gets, and what the server's agent tells of it: the reason, and the policy that decided.
struct Want {
    served: bool,
    reason: &'static str,
    policy: Option<&'static str>,
}

const fn served(reason: &'static str, policy: &'static str) -> Want {
    Want { served: true, reason, policy: Some(policy) }
}

const fn refused(reason: &'static str) -> Want {
    Want { served: false, reason, policy: None }
}

const fn denied(policy: &'static str) -> Want {
    Want { served: false, reason: "explicit-deny", policy: Some(policy) }
}

/// Makes one call in each family and checks what the client got, what the server saw, and what the log says.
fn call(sandbox: &Sandbox, from: &str, port: u16, want: &Want) -> Result<LogLine> {
    let mut last = None;
    for family in [Family::V4, Family::V6] {
        let to = sandbox.pod(SERVER)?.at(family, port);
        let what = format!("{from} to {to}, {}", want.reason);
        let mut offset = 0;
        // From compiling to the kernel's maps it is one step of the agent's, which may take its time.
        let got = command::wait_for(&what, log_limit(), || {
            offset = end_of_log(sandbox, Node::B)?;
            let got = sandbox.http(from, to, "call")?;
            let refused = matches!(got.failure, Some(Failure::Refused | Failure::Reset));
            Ok(if want.served { got.status == Some(200) } else { refused }.then_some(got))
        })?;
        if let Some(seen) = &got.seen {
            let own = sandbox.pod(from)?.at(family, 0).ip();
            ensure!(seen.peer.ip().to_canonical() == own, "{what}: the server saw {} [K.3]", seen.peer);
        }
        // A client that was reset does not always know its own port, and a tunnel has another one.
        let own = sandbox.pod(from)?.at(family, 0).ip();
        let told = line(sandbox, Node::B, offset, &what, |line| {
            is_inbound(line, own)
                && line.field("reason").as_deref() == Some(want.reason)
                && line.field("policy").as_deref() == want.policy
        })?;
        last = Some(told);
    }
    last.context("both families were asked")
}

fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).ok().and_then(|d| u64::try_from(d.as_millis()).ok()).unwrap_or(0)
}

/// A connection that a program in a pod holds open, with a line there and back every 20 ms.
struct Held(String);

impl Held {
    fn open(sandbox: &mut Sandbox, name: &str, from: &str) -> Result<Self> {
        let to = sandbox.pod(SERVER)?.at(Family::V4, EXCHANGE);
        sandbox.start_in_pod(name, from, &["hold", "--to", &to.to_string()])?;
        let held = Self(name.to_owned());
        held.passes(sandbox).with_context(|| format!("{name}: {from} to {to}"))?;
        Ok(held)
    }

    fn last(&self, sandbox: &Sandbox) -> Result<Option<HeldRound>> {
        let text = fs::read_to_string(sandbox.log_path(&self.0))?;
        let whole = &text[..text.rfind('\n').map_or(0, |at| at + 1)];
        let last = whole.lines().next_back();
        last.map(|line| serde_json::from_str(line).with_context(|| format!("{}: {line}", self.0))).transpose()
    }

    /// Bytes still pass now: three more rounds.
    fn passes(&self, sandbox: &Sandbox) -> Result<()> {
        let before = self.last(sandbox)?.map_or(0, |round| round.rounds);
        command::wait_for(&format!("{} passes bytes", self.0), log_limit(), || {
            let Some(last) = self.last(sandbox)? else { return Ok(None) };
            ensure!(last.failure.is_none(), "{} ended: {last:?}", self.0);
            Ok((last.rounds >= before + 3).then_some(()))
        })
    }

    /// It is closed by a reset, within [`effect`] from the moment `written`.
    fn is_closed(&self, sandbox: &Sandbox, written: u64) -> Result<SocketAddr> {
        let end = command::wait_for(&format!("{} has ended", self.0), effect() * 2, || {
            Ok(self.last(sandbox)?.filter(|round| round.failure.is_some()))
        })?;
        let after = end.at_ms.saturating_sub(written);
        ensure!(u128::from(after) <= effect().as_millis(), "{}: closed {after} ms later", self.0);
        ensure!(end.failure == Some(Failure::Reset), "{}: {end:?}", self.0);
        end.local.context("it was connected")
    }
}

/// §6.2, §6.3, [AP.6], [AP.10]: who may, by principal, by namespace, by address; DENY over ALLOW; dry-run; what a wrong
/// object leaves in force. Every answer with its reason and rule in the access log.
#[test]
fn policies_decide_tunnels_and_plaintext_alike() -> Result<()> {
    let sandbox = mesh("authz-who")?;
    for from in [NGINX, RATINGS, LEGACY] {
        put(&sandbox, &[])?;
        call(&sandbox, from, 9080, &Want { served: true, reason: "no-allow-policies", policy: None })?;
    }

    let principal = "rules: [{from: [{source: {principals: [cluster.local/ns/test/sa/nginx]}}]}]";
    put(&sandbox, &[authz("allow", "", principal)])?;
    call(&sandbox, NGINX, 9080, &served("allow-match", "default/allow#0"))?;
    for from in [RATINGS, LEGACY] {
        let told = call(&sandbox, from, 9080, &refused("no-allow-match"))?;
        let error = told.field("error").unwrap_or_default();
        ensure!(error == "allow policies exist, but none allowed", "{told:?}");
    }

    put(&sandbox, &[authz("allow", "", "rules: [{from: [{source: {namespaces: [nowhere, default]}}]}]")])?;
    call(&sandbox, RATINGS, 9080, &served("allow-match", "default/allow#0"))?;
    call(&sandbox, NGINX, 9080, &refused("no-allow-match"))?;

    let deny =
        "action: DENY, rules: [{from: [{source: {namespaces: [test]}}], to: [{operation: {ports: [\"9090\"]}}]}]";
    put(&sandbox, &[authz("allow", "", "rules: [{}]"), authz("deny", "", deny)])?;
    call(&sandbox, NGINX, 9080, &served("allow-match", "default/allow#0"))?;
    let told = call(&sandbox, NGINX, 9090, &denied("default/deny#0"))?;
    let error = told.field("error").unwrap_or_default();
    ensure!(error.starts_with("explicitly denied by: default/deny"), "{told:?}");
    call(&sandbox, RATINGS, 9090, &served("allow-match", "default/allow#0"))?;
    call(&sandbox, LEGACY, 9090, &served("allow-match", "default/allow#0"))?;

    let legacy = sandbox.pod(LEGACY)?;
    let (v4, v6) = (legacy.at(Family::V4, 0).ip(), legacy.at(Family::V6, 0).ip());
    let blocks = format!("rules: [{{from: [{{source: {{ipBlocks: [\"{v4}\", \"{v6}/128\"]}}}}]}}]");
    put(&sandbox, &[authz("blocks", "", &blocks)])?;
    call(&sandbox, LEGACY, 9080, &served("allow-match", "default/blocks#0"))?;
    call(&sandbox, NGINX, 9080, &refused("no-allow-match"))?;

    let dry = ", annotations: {istio.io/dry-run: \"true\"}";
    put(&sandbox, &[authz("new", dry, "action: DENY, rules: [{from: [{source: {notPrincipals: [\"*\"]}}]}]")])?;
    let open = Want { served: true, reason: "no-allow-policies", policy: None };
    for (from, would) in [(NGINX, "allow no-allow-policies"), (LEGACY, "deny explicit-deny default/new#0")] {
        let told = call(&sandbox, from, 9080, &open)?;
        ensure!(told.field("dry_run").as_deref() == Some(would), "{told:?}");
    }

    // [C.6]: what is wrong now leaves in force what was right before.
    put(&sandbox, &[authz("allow", "", principal)])?;
    call(&sandbox, LEGACY, 9080, &refused("no-allow-match"))?;
    put(&sandbox, &[authz("allow", "", "rules: [{to: [{operation: {ports: [http]}}]}]")])?;
    call(&sandbox, NGINX, 9080, &served("allow-match", "default/allow#0"))?;
    call(&sandbox, LEGACY, 9080, &refused("no-allow-match"))?;
    Ok(())
}

/// §6, "verdicts in the kernel": what addresses and ports decide is decided while the agent is stopped: a reset for whom policy
/// denies, the application for whom it allows, and every line of the log once the agent goes on.
#[test]
fn plaintext_is_decided_while_the_agent_is_stopped() -> Result<()> {
    let mut sandbox = mesh("authz-stopped")?;
    let server = sandbox.pod(SERVER)?.clone();
    let v4 = sandbox.pod(LEGACY)?.at(Family::V4, 0).ip();
    let allow = format!("rules: [{{from: [{{source: {{ipBlocks: [\"{v4}\"]}}}}]}}]");
    let deny = "action: DENY, rules: [{to: [{operation: {ports: [\"9090\"]}}]}]";
    put(&sandbox, &[authz("allow", "", &allow), authz("deny", "", deny)])?;
    let cases = [
        (Family::V4, 9080, served("allow-match", "default/allow#0")),
        (Family::V6, 9080, refused("no-allow-match")),
        (Family::V4, 9090, denied("default/deny#0")),
    ];
    let ask = |sandbox: &Sandbox| {
        let all = cases.iter().map(|(family, port, _)| sandbox.http(LEGACY, server.at(*family, *port), "stopped"));
        all.collect::<Result<Vec<_>>>()
    };
    let right = |got: &[HttpResult]| {
        got.iter().zip(&cases).all(|(got, (.., want))| match want.served {
            true => got.status == Some(200),
            false => matches!(got.failure, Some(Failure::Refused | Failure::Reset)),
        })
    };
    command::wait_for("the policy to be in force", log_limit(), || Ok(right(&ask(&sandbox)?).then_some(())))?;
    for attempt in 1.. {
        let offset = end_of_log(&sandbox, Node::B)?;
        sandbox.signal_agent(Node::B, Signal::SIGSTOP)?;
        let stopped = Instant::now();
        let got = ask(&sandbox);
        let took = stopped.elapsed();
        let silent = end_of_log(&sandbox, Node::B)? == offset;
        sandbox.signal_agent(Node::B, Signal::SIGCONT)?;
        if took >= SILENT_AFTER && attempt < 3 {
            // The machine was too busy: by now the missing sign of life refuses everything.
            continue;
        }
        let got = got?;
        ensure!(right(&got), "with the agent stopped, after {took:?}: {got:?}");
        ensure!(silent, "the agent was not stopped");
        for (family, port, want) in &cases {
            let (from, to) = (sandbox.pod(LEGACY)?.at(*family, 0).ip(), server.at(*family, *port).to_string());
            line(&sandbox, Node::B, offset, &format!("{to}, {}", want.reason), |line| {
                is_inbound(line, from)
                    && line.field("dst.addr").is_some_and(|addr| addr.ends_with(&format!(":{port}")))
                    && line.field("reason").as_deref() == Some(want.reason)
                    && line.field("policy").as_deref() == want.policy
            })?;
        }
        break;
    }
    Ok(())
}

/// [D.1]: within a second a change closes what it forbids, however it is carried: in a tunnel, passed by the kernel, or in
/// plaintext by the agent; and only that.
#[test]
fn a_change_closes_open_connections_that_it_forbids_and_no_others() -> Result<()> {
    let mut sandbox = mesh("authz-change")?;
    let write = |sandbox: &Sandbox, policies: &[String]| -> Result<u64> {
        let written = now_ms();
        sandbox.manifests().apply(POLICY_FILE, &policies.concat())?;
        Ok(written)
    };
    let of = |from: &str| format!("{{from: [{{source: {{{from}}}}}]}}");
    let deny = |rule: &str| authz("deny", "", &format!("action: DENY, rules: [{rule}]"));

    let nginx = Held::open(&mut sandbox, "nginx", NGINX)?;
    let ratings = Held::open(&mut sandbox, "ratings", RATINGS)?;
    let passed = Held::open(&mut sandbox, "passed", LEGACY)?;

    // More addresses than the kernel takes: from here on the agent gives this pod's verdicts on plaintext, and carries it.
    let many: Vec<String> = (0..MAX_BLOCKS + 1).map(|n| format!("198.18.{}.{}", n / 256, n % 256)).collect();
    let many = of(&format!("ipBlocks: [{}]", many.join(", ")));
    let nginx_and_many = format!("{}, {many}", of("principals: [cluster.local/ns/test/sa/nginx]"));
    let offset = end_of_log(&sandbox, Node::B)?;
    let written = write(&sandbox, &[deny(&nginx_and_many)])?;
    nginx.is_closed(&sandbox, written)?;
    ratings.passes(&sandbox)?;
    passed.passes(&sandbox).context("the kernel passed it, and policy still does")?;
    call(&sandbox, NGINX, 9080, &denied("default/deny#0"))?;

    let told = line(&sandbox, Node::B, offset, "that they are too many", |line| {
        line.message().starts_with("AuthorizationPolicies of this pod do not fit into the kernel")
    })?;
    ensure!(told.field("pod").as_deref() == Some(SERVER) && told.field("why").is_some(), "{told:?}");
    let carried = Held::open(&mut sandbox, "carried", LEGACY)?;
    let offset = end_of_log(&sandbox, Node::B)?;
    let written = write(&sandbox, &[deny(&of("notPrincipals: [\"*\"]"))])?;
    for held in [&passed, &carried] {
        let from = held.is_closed(&sandbox, written)?;
        let told = line(&sandbox, Node::B, offset, &format!("the end of {}", held.0), |line| {
            is_inbound(line, from.ip().to_canonical())
                && line.field("src.addr").is_some_and(|addr| addr.ends_with(&format!(":{}", from.port())))
        })?;
        ensure!(told.field("reason").as_deref() == Some("explicit-deny"), "{told:?}");
        ensure!(told.field("policy").as_deref() == Some("default/deny#0"), "{told:?}");
    }
    ratings.passes(&sandbox)?;
    call(&sandbox, LEGACY, 9080, &denied("default/deny#0"))?;

    // Back again: new ones are served, and what was open all the while still is.
    put(&sandbox, &[])?;
    call(&sandbox, LEGACY, 9080, &Want { served: true, reason: "no-allow-policies", policy: None })?;
    call(&sandbox, NGINX, 9080, &Want { served: true, reason: "no-allow-policies", policy: None })?;
    ratings.passes(&sandbox)?;
    Ok(())
}
