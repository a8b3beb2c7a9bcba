//! The user's scenario: Nginx and Legacy-app call Productpage, by its Service's cluster IP and by its pod IP, while the
//! policy changes. Each row says what must happen and what did.
//!
//! Three observations make a row, each from a different place: what the client got, whom the server's agent saw (its
//! access log), and whether the request's marker crossed the link between the nodes readably (the capture).

use std::fmt;
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::capture::Capture;
use crate::command;
use crate::interrupt;
use crate::programs::{Failure, HttpResult};
use crate::sandbox::{Family, LogLine, Node, Plan, Sandbox};

/// The server.
const SERVER: &str = "default/productpage";
/// Its node: the one whose agent tells whom it saw.
const SERVER_NODE: Node = Node::B;
/// The port behind the Service.
const PORT: u16 = 9080;
/// Its second port, to show that an exception is for one port only.
const OTHER_PORT: u16 = 9090;
/// The enrolled client.
const NGINX: &str = "test/nginx";
/// The client that its label keeps out of the mesh.
const LEGACY: &str = "test/legacy-app";
/// File of the policy in the watched folder.
pub const POLICY_FILE: &str = "policy.yaml";
/// Lifetime of certificates in a sandbox that plays the tour: renewal, at half of it, comes while one waits.
pub const CERT_TTL: &str = "30s";

/// How long a change of policy may take until a row shows it; the specification says a second.
const EFFECT_LIMIT: Duration = Duration::from_secs(5);
/// How long the line of a finished connection may take to appear in the access log.
const LOG_LIMIT: Duration = Duration::from_secs(3);

/// What the client got, in classes that do not depend on how a refusal reaches it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// An HTTP status.
    Status(u16),
    /// No connection, or one that was reset: what STRICT does to plaintext.
    Refused,
    /// The kernel let the client not even try (EPERM): what the gate does to a pod that no agent knows yet.
    Held,
    /// Anything else.
    Otherwise(String),
}

impl Answer {
    fn of(result: &HttpResult) -> Self {
        match (result.status, result.failure) {
            (Some(status), None) => Self::Status(status),
            (_, Some(Failure::Refused | Failure::Reset)) => Self::Refused,
            (_, Some(Failure::NotPermitted)) => Self::Held,
            _ => Self::Otherwise(result.brief()),
        }
    }
}

impl fmt::Display for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Status(status) => write!(f, "{status}"),
            Self::Refused => f.write_str("refused"),
            Self::Held => f.write_str("held"),
            Self::Otherwise(what) => f.write_str(what),
        }
    }
}

/// Whom the server's agent saw.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Peer {
    /// A proven SPIFFE ID.
    Identity(String),
    /// A connection without an identity: plaintext.
    Nobody,
    /// No connection.
    NoConnection,
    /// The access log has no line for a connection that was answered.
    Unlogged,
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Identity(id) => f.write_str(id),
            Self::Nobody => f.write_str("no identity"),
            Self::NoConnection => f.write_str("-"),
            Self::Unlogged => f.write_str("not in the log"),
        }
    }
}

/// One outcome of a call, expected or observed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// What the client got.
    pub answer: Answer,
    /// Whom the server side saw.
    pub peer: Peer,
    /// Whether the request was readable on the link.
    pub readable: bool,
}

/// One line of the table.
#[derive(Debug, Clone)]
pub struct Row {
    /// The step it belongs to.
    pub step: &'static str,
    /// Who calls whom.
    pub call: String,
    /// What must happen.
    pub expected: Outcome,
    /// What did.
    pub observed: Outcome,
    /// More about what did, where one line helps.
    pub note: String,
}

impl Row {
    /// Whether what happened is what must.
    pub fn ok(&self) -> bool {
        self.expected == self.observed
    }
}

struct Step {
    title: &'static str,
    policy: &'static [Policy],
    /// What happens to Nginx, which has an identity.
    nginx: Treated,
    /// What happens to Legacy-app, which comes in plaintext.
    legacy: Treated,
    /// What the second port does to Legacy-app, where the step shows it.
    other_port: Option<Treated>,
}

#[derive(Clone, Copy)]
enum Treated {
    Served,
    Refused,
}

/// An object of `security.istio.io`: its kind, namespace, name, whether it is only tried ([AP.6]), and its `spec`.
struct Policy {
    kind: &'static str,
    namespace: &'static str,
    name: &'static str,
    dry_run: bool,
    spec: &'static str,
}

const fn mtls(namespace: &'static str, name: &'static str, spec: &'static str) -> Policy {
    Policy { kind: "PeerAuthentication", namespace, name, dry_run: false, spec }
}

const fn authorization(name: &'static str, spec: &'static str) -> Policy {
    Policy { kind: "AuthorizationPolicy", namespace: "default", name, dry_run: false, spec }
}

const WORKLOAD: &str = "  selector: {matchLabels: {app: productpage}}\n";

/// Where this holds, plaintext is refused before any AuthorizationPolicy is asked.
const STRICT: Policy = mtls("default", "namespace", "  mtls: {mode: STRICT}\n");
const ALLOW_TEST: Policy = authorization("from-test", "SELECTOR  rules: [{from: [{source: {namespaces: [test]}}]}]\n");
const ALLOW_NGINX: Policy = authorization(
    "from-nginx",
    "SELECTOR  rules: [{from: [{source: {principals: [cluster.local/ns/test/sa/nginx]}}], to: [{operation: {ports: ['9080']}}]}]\n",
);
const DENY_NGINX: Policy = authorization(
    "not-nginx",
    "SELECTOR  action: DENY\n  rules: [{from: [{source: {principals: [cluster.local/ns/test/sa/nginx]}}]}]\n",
);

const STEPS: &[Step] = &[
    Step { title: "no policy", policy: &[], nginx: Treated::Served, legacy: Treated::Served, other_port: None },
    Step {
        title: "namespace STRICT",
        policy: &[STRICT],
        nginx: Treated::Served,
        legacy: Treated::Refused,
        other_port: None,
    },
    Step {
        title: "workload PERMISSIVE",
        policy: &[STRICT, mtls("default", "productpage", "SELECTOR  mtls: {mode: PERMISSIVE}\n")],
        nginx: Treated::Served,
        legacy: Treated::Served,
        other_port: Some(Treated::Served),
    },
    Step {
        title: "port 9080 PERMISSIVE",
        policy: &[STRICT, mtls("default", "productpage", "SELECTOR  portLevelMtls: {9080: {mode: PERMISSIVE}}\n")],
        nginx: Treated::Served,
        legacy: Treated::Served,
        other_port: Some(Treated::Refused),
    },
    Step {
        title: "mesh-wide STRICT",
        policy: &[mtls("istio-system", "mesh", "  mtls: {mode: STRICT}\n")],
        nginx: Treated::Served,
        legacy: Treated::Refused,
        other_port: None,
    },
    Step {
        title: "namespace DISABLE",
        policy: &[
            mtls("istio-system", "mesh", "  mtls: {mode: STRICT}\n"),
            mtls("default", "namespace", "  mtls: {mode: DISABLE}\n"),
        ],
        nginx: Treated::Served,
        legacy: Treated::Served,
        other_port: None,
    },
    Step {
        title: "ALLOW a principal",
        policy: &[STRICT, ALLOW_NGINX],
        nginx: Treated::Served,
        legacy: Treated::Refused,
        other_port: None,
    },
    Step {
        title: "ALLOW another namespace",
        policy: &[
            STRICT,
            authorization("from-default", "SELECTOR  rules: [{from: [{source: {namespaces: [default]}}]}]\n"),
        ],
        nginx: Treated::Refused,
        legacy: Treated::Refused,
        other_port: None,
    },
    Step {
        title: "DENY over ALLOW",
        policy: &[STRICT, ALLOW_TEST, DENY_NGINX],
        nginx: Treated::Refused,
        legacy: Treated::Refused,
        other_port: None,
    },
    Step {
        title: "DENY as a dry run",
        policy: &[STRICT, ALLOW_TEST, Policy { dry_run: true, ..DENY_NGINX }],
        nginx: Treated::Served,
        legacy: Treated::Refused,
        other_port: None,
    },
];

/// Where the scenario is played: two nodes with its pods, and a mesh that is up. Pods are named `namespace/name`.
pub trait Stage {
    /// Makes these the policies that the scenario has, and there are no others of it; their text may have several objects, or none.
    ///
    /// # Errors
    /// They could not be put into force.
    fn put(&self, policies: &str) -> Result<()>;

    /// Records everything that crosses between the nodes.
    ///
    /// # Errors
    /// It cannot be recorded.
    fn capture(&self) -> Result<Capture>;

    /// The cluster IP of the Service that has a pod's name.
    ///
    /// # Errors
    /// There is none.
    fn cluster_ip(&self, of: &str) -> Result<IpAddr>;

    /// A pod's address.
    ///
    /// # Errors
    /// There is no such pod.
    fn pod_ip(&self, pod: &str) -> Result<IpAddr>;

    /// One request of a pod, with a marker in it.
    ///
    /// # Errors
    /// It could not be made; that it was refused is a result.
    fn call(&self, client: &str, to: SocketAddr, marker: &str) -> Result<HttpResult>;

    /// The lines of a node's agent since `offset` (bytes; past the end: none), and the offset after the last.
    ///
    /// # Errors
    /// The log could not be read.
    fn log(&self, node: Node, offset: u64) -> Result<(Vec<LogLine>, u64)>;

    /// Starts a program of [`crate::programs`] in a pod, under a name.
    ///
    /// # Errors
    /// It could not be started.
    fn begin(&mut self, name: &str, pod: &str, arguments: &[&str]) -> Result<()>;

    /// What a started program has printed so far.
    ///
    /// # Errors
    /// It could not be read.
    fn printed(&self, name: &str) -> Result<String>;

    /// Fails if a started program has ended.
    ///
    /// # Errors
    /// It has.
    fn expect(&mut self, name: &str) -> Result<()>;

    /// Ends a started program.
    ///
    /// # Errors
    /// It had ended.
    fn end(&mut self, name: &str) -> Result<()>;
}

impl Stage for Sandbox {
    fn put(&self, policies: &str) -> Result<()> {
        match policies.is_empty() {
            true => self.manifests().delete(POLICY_FILE),
            false => self.manifests().apply(POLICY_FILE, policies),
        }
    }

    fn capture(&self) -> Result<Capture> {
        Sandbox::capture(self)
    }

    fn cluster_ip(&self, of: &str) -> Result<IpAddr> {
        Sandbox::cluster_ip(self, of, Family::V4)
    }

    fn pod_ip(&self, pod: &str) -> Result<IpAddr> {
        Ok(self.pod(pod)?.v4.into())
    }

    fn call(&self, client: &str, to: SocketAddr, marker: &str) -> Result<HttpResult> {
        self.http(client, to, marker)
    }

    fn log(&self, node: Node, offset: u64) -> Result<(Vec<LogLine>, u64)> {
        self.agent_log(node, offset)
    }

    fn begin(&mut self, name: &str, pod: &str, arguments: &[&str]) -> Result<()> {
        self.start_in_pod(name, pod, arguments)
    }

    fn printed(&self, name: &str) -> Result<String> {
        let path = self.log_path(name);
        fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))
    }

    fn expect(&mut self, name: &str) -> Result<()> {
        self.expect_running(name)
    }

    fn end(&mut self, name: &str) -> Result<()> {
        self.stop(name).map(drop)
    }
}

/// Plays the scenario on a stage whose mesh is up; `tell` gets each row as soon as it is known.
///
/// # Errors
/// A row could not be observed at all. A row that is not as expected is no error.
pub fn play<S: Stage>(stage: &mut S, mut tell: impl FnMut(&Row)) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for step in STEPS {
        apply(stage, step.policy)?;
        // The recording starts afresh, so that a row is proven by its own step's traffic.
        let capture = stage.capture()?;
        for (who, client) in [("Nginx", NGINX), ("Legacy-app", LEGACY)] {
            let treated = |plaintext| if client == NGINX { step.nginx } else { plaintext };
            for (way, to) in ways(stage, PORT)? {
                let call = format!("{who} → {way}");
                let expected = expected(client, treated(step.legacy))?;
                let row = observe(stage, &capture, step.title, call, client, to, expected)?;
                tell(&row);
                rows.push(row);
            }
            if let Some(other) = step.other_port {
                let to = SocketAddr::new(stage.pod_ip(SERVER)?, OTHER_PORT);
                let call = format!("{who} → pod IP:{OTHER_PORT}");
                let row = observe(stage, &capture, step.title, call, client, to, expected(client, treated(other))?)?;
                tell(&row);
                rows.push(row);
            }
        }
    }
    for last in [change::<S>, rotate::<S>] {
        let row = last(stage)?;
        tell(&row);
        rows.push(row);
    }
    Ok(rows)
}

/// The sandbox that the scenario is played on.
pub fn plan(instance: &str) -> Plan {
    Plan::bookinfo(instance)
}

/// The policy that the stage is left with, for the user to edit.
///
/// # Errors
/// The file could not be written.
pub fn leave_policy_to_edit(stage: &impl Stage) -> Result<()> {
    apply(stage, STEPS[1].policy)
}

fn apply(stage: &impl Stage, policies: &[Policy]) -> Result<()> {
    if policies.is_empty() {
        return stage.put("");
    }
    let text: String = policies
        .iter()
        .map(|Policy { kind, namespace, name, dry_run, spec }| {
            let annotations = if *dry_run { "  annotations: {istio.io/dry-run: 'true'}\n" } else { "" };
            format!(
                "---\napiVersion: security.istio.io/v1\nkind: {kind}\nmetadata:\n  name: {name}\n  namespace: {namespace}\n{annotations}spec:\n{}",
                spec.replace("SELECTOR", WORKLOAD)
            )
        })
        .collect();
    stage.put(&text)
}

fn ways(stage: &impl Stage, port: u16) -> Result<[(&'static str, SocketAddr); 2]> {
    Ok([
        ("cluster IP", SocketAddr::new(stage.cluster_ip(SERVER)?, port)),
        ("pod IP", SocketAddr::new(stage.pod_ip(SERVER)?, port)),
    ])
}

fn expected(client: &str, treated: Treated) -> Result<Outcome> {
    Ok(match (client, treated) {
        (_, Treated::Refused) => Outcome { answer: Answer::Refused, peer: Peer::NoConnection, readable: false },
        (LEGACY, Treated::Served) => Outcome { answer: Answer::Status(200), peer: Peer::Nobody, readable: true },
        (client, Treated::Served) => {
            Outcome { answer: Answer::Status(200), peer: Peer::Identity(identity(client)?), readable: false }
        }
    })
}

/// The pods run under service accounts of their own names.
fn identity(pod: &str) -> Result<String> {
    let (namespace, name) = pod.split_once('/').context("a pod without a namespace")?;
    Ok(format!("spiffe://cluster.local/ns/{namespace}/sa/{name}"))
}

/// Makes the call until it ends as expected or the time for a change to take effect has passed.
fn observe(
    stage: &impl Stage,
    capture: &Capture,
    step: &'static str,
    call: String,
    client: &str,
    to: SocketAddr,
    expected: Outcome,
) -> Result<Row> {
    let begun = Instant::now();
    for attempt in 0.. {
        interrupt::check()?;
        let marker = format!("culvert-secret-{}-{attempt}-{}", step.replace(' ', "-"), unique());
        let (_, before) = stage.log(SERVER_NODE, u64::MAX)?;
        let got = stage.call(client, to, &marker)?;
        let readable = capture.contains(marker.as_bytes())?;
        let answer = Answer::of(&got);
        // An answer that is not the expected one decides the attempt; its log line would only cost time.
        let peer = match (&answer, answer == expected.answer) {
            (Answer::Status(_), true) => seen_by_server(stage, client, before)?,
            (Answer::Status(_), false) | (Answer::Refused | Answer::Held | Answer::Otherwise(_), _) => {
                Peer::NoConnection
            }
        };
        let observed = Outcome { answer, peer, readable };
        // What must never be readable is not tried again until it is not.
        let leaked = readable && client != LEGACY;
        if observed == expected || leaked || begun.elapsed() > EFFECT_LIMIT {
            // Where all is as expected, the table says it all.
            let note = if observed == expected { String::new() } else { got.error.unwrap_or_default() };
            return Ok(Row { step, call, expected, observed, note });
        }
        thread::sleep(Duration::from_millis(100));
    }
    unreachable!("the loop ends by returning")
}

/// Whom the server's agent saw in the first connection from `client` that its access log shows after `offset`.
fn seen_by_server(stage: &impl Stage, client: &str, offset: u64) -> Result<Peer> {
    let source = stage.pod_ip(client)?;
    let begun = Instant::now();
    loop {
        for line in stage.log(SERVER_NODE, offset)?.0 {
            let from = line.field("src.addr").and_then(|a| a.parse::<SocketAddr>().ok());
            let inbound = line.field("direction").is_some_and(|d| d == "inbound");
            if inbound && from.is_some_and(|a| a.ip().to_canonical() == source) {
                return Ok(line.field("src.identity").map_or(Peer::Nobody, Peer::Identity));
            }
        }
        if begun.elapsed() > LOG_LIMIT {
            return Ok(Peer::Unlogged);
        }
        thread::sleep(Duration::from_millis(20));
    }
}

/// Requests without a pause while policy changes three times: to another that says the same, to a DENY, and back. There is
/// one moment for each change: before it all are answered by the old policy, after it by the new one.
fn change<S: Stage>(stage: &mut S) -> Result<Row> {
    const STEP: &str = "change under traffic";
    apply(stage, &[STRICT, ALLOW_TEST])?;
    let traffic = Traffic::start(stage, "change")?;
    // Each phase lasts until its policy is at work, and some requests longer.
    for (policy, answer) in [
        (&[STRICT, ALLOW_TEST][..], Answer::Status(200)),
        (&[STRICT, ALLOW_NGINX], Answer::Status(200)),
        (&[STRICT, ALLOW_NGINX, DENY_NGINX], Answer::Refused),
        (&[STRICT, ALLOW_TEST], Answer::Status(200)),
    ] {
        apply(stage, policy)?;
        let what = format!("requests are answered by {answer}");
        command::wait_for(&what, EFFECT_LIMIT, || {
            Ok(traffic.results(stage)?.last().is_some_and(|last| Answer::of(last) == answer).then_some(()))
        })?;
        thread::sleep(Duration::from_millis(500));
    }
    let (results, readable) = traffic.end(stage)?;
    let mut phases: Vec<Answer> = results.iter().map(Answer::of).collect();
    phases.dedup();
    let shown: Vec<String> = phases.iter().map(Answer::to_string).collect();
    let refused = results.iter().filter(|result| Answer::of(result) == Answer::Refused).count();
    let outcome = |answer: &str, readable| Outcome {
        answer: Answer::Otherwise(answer.to_owned()),
        peer: Peer::NoConnection,
        readable,
    };
    Ok(Row {
        step: STEP,
        call: "Nginx → cluster IP".to_owned(),
        expected: outcome("200, refused, 200", false),
        observed: outcome(&shown.join(", "), readable),
        note: format!("{} requests, {refused} refused, in one piece", results.len()),
    })
}

/// Nginx calls the Service again and again, with a marker that must not be readable on the link.
struct Traffic {
    name: String,
    capture: Capture,
    marker: String,
}

impl Traffic {
    fn start(stage: &mut impl Stage, what: &str) -> Result<Self> {
        let capture = stage.capture()?;
        let marker = format!("culvert-secret-{what}-{}", unique());
        let to = SocketAddr::new(stage.cluster_ip(SERVER)?, PORT).to_string();
        let name = format!("{what}-traffic");
        let calls = ["http-get", "--to", &to, "--marker", &marker, "--count", "100000", "--interval-ms", "20"];
        stage.begin(&name, NGINX, &calls)?;
        Ok(Self { name, capture, marker })
    }

    /// The results so far.
    fn results(&self, stage: &impl Stage) -> Result<Vec<HttpResult>> {
        let text = stage.printed(&self.name)?;
        let whole = &text[..text.rfind('\n').map_or(0, |at| at + 1)];
        whole.lines().map(serde_json::from_str).collect::<Result<_, _>>().context("read a result of the traffic")
    }

    /// All results, and whether one was readable on the link.
    fn end(self, stage: &mut impl Stage) -> Result<(Vec<HttpResult>, bool)> {
        stage.end(&self.name)?;
        let results = self.results(stage)?;
        if results.is_empty() {
            bail!("the traffic made no request");
        }
        Ok((results, self.capture.contains(self.marker.as_bytes())?))
    }
}

/// Requests without a pause while both ends get new certificates; not one may fail, or be readable.
fn rotate<S: Stage>(stage: &mut S) -> Result<Row> {
    const STEP: &str = "certificate rotation";
    let offsets = [stage.log(Node::A, u64::MAX)?.1, stage.log(Node::B, u64::MAX)?.1];
    let traffic = Traffic::start(stage, "rotation")?;
    let ends = [(Node::A, identity(NGINX)?), (Node::B, identity(SERVER)?)];
    let waited = command::wait_for("both ends have renewed their certificates", Duration::from_secs(60), || {
        stage.expect(&traffic.name)?;
        for ((node, identity), offset) in ends.iter().zip(offsets) {
            let renewed = stage.log(*node, offset)?.0.iter().any(|line| {
                line.message() == "certificate ready" && line.field("identity").as_deref() == Some(identity)
            });
            if !renewed {
                return Ok(None);
            }
        }
        Ok(Some(()))
    });
    // Some requests after the renewal belong to the observation.
    thread::sleep(Duration::from_millis(500));
    let (results, readable) = traffic.end(stage)?;
    waited?;
    let failed = results.iter().find(|r| Answer::of(r) != Answer::Status(200));
    let expected = expected(NGINX, Treated::Served)?;
    let answer = failed.map_or(Answer::Status(200), Answer::of);
    let peer = everybody_seen(stage, offsets[1], &expected.peer)?;
    let observed = Outcome { answer, peer, readable };
    let note = match failed {
        Some(result) => format!("of {} requests one failed: {}", results.len(), result.error.as_deref().unwrap_or("")),
        None => format!("{} requests, none failed", results.len()),
    };
    Ok(Row { step: STEP, call: "Nginx → cluster IP".to_owned(), expected, observed, note })
}

/// The expected peer if every connection from Nginx since `offset` was its own, else the first that was not.
fn everybody_seen(stage: &impl Stage, offset: u64, expected: &Peer) -> Result<Peer> {
    let source = stage.pod_ip(NGINX)?;
    let mut seen = Peer::Unlogged;
    for line in stage.log(SERVER_NODE, offset)?.0 {
        let from = line.field("src.addr").and_then(|a| a.parse::<SocketAddr>().ok());
        if line.field("direction").is_none_or(|d| d != "inbound")
            || from.is_none_or(|a| a.ip().to_canonical() != source)
        {
            continue;
        }
        seen = line.field("src.identity").map_or(Peer::Nobody, Peer::Identity);
        if seen != *expected {
            break;
        }
    }
    Ok(seen)
}

/// A text that no earlier run has sent.
fn unique() -> String {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    format!("{:x}", now.as_nanos())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_is_as_expected_only_if_all_three_observations_are() {
        let expected = expected(NGINX, Treated::Served).expect("a pod's name");
        let row = |observed: Outcome| Row {
            step: "",
            call: String::new(),
            expected: expected.clone(),
            observed,
            note: String::new(),
        };
        assert!(row(expected.clone()).ok());
        assert!(!row(Outcome { readable: true, ..expected.clone() }).ok());
        assert!(!row(Outcome { peer: Peer::Nobody, ..expected.clone() }).ok());
        assert!(!row(Outcome { answer: Answer::Refused, ..expected.clone() }).ok());
    }

    /// A gate that holds a pod is no policy that refuses it: rows of STRICT must not pass by it.
    #[test]
    fn a_client_that_is_held_at_the_gate_is_not_refused_by_policy() {
        let failed = |failure| HttpResult {
            status: None,
            seen: None,
            failure: Some(failure),
            error: None,
            local: None,
            peer: None,
            millis: 0,
        };
        assert_eq!(Answer::of(&failed(Failure::Refused)), Answer::Refused);
        assert_eq!(Answer::of(&failed(Failure::Reset)), Answer::Refused);
        assert_eq!(Answer::of(&failed(Failure::NotPermitted)), Answer::Held);
        assert!(matches!(Answer::of(&failed(Failure::TimedOut)), Answer::Otherwise(_)));
    }
}
