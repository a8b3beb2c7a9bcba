//! What is measured. A measure gives named figures; rows of the table, in `report`, choose among them.

use std::collections::BTreeMap;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use culvert_tests::load::usage::Cpu;
use culvert_tests::load::{Latency, LoadResult};

use super::Peer;
use super::session::{Change, FAR, NEAR, Session, Tools, elsewhere, policies};

pub(super) type Figures = BTreeMap<&'static str, f64>;
/// Measures in a session.
pub(super) type Take = fn(&Session<'_>) -> Result<Figures>;

/// Workloads of the large configuration.
pub(super) const WORKLOADS: usize = 50_000;
/// Pods and policies of the cluster in which a policy is changed, and the namespaces that they are in.
pub(super) const CHANGED: (usize, usize, usize) = (10_000, 2_000, 100);
/// How often it is changed.
const CHANGES: usize = 200;
/// Nodes of a session.
const NODES: f64 = 2.0;
/// Stalled readers, and the connections that must finish beside them.
const STALLED: &str = "6";
pub(super) const BESIDE: u32 = 400;

/// One thing that is done, and measured.
pub(super) struct Measure {
    pub(super) name: &'static str,
    pub(super) scope: Scope,
}

/// Where it is done.
#[derive(Clone, Copy)]
pub(super) enum Scope {
    /// In a session that others use before and after.
    Shared(Take),
    /// The same, and it cannot be done twice in one.
    Once(Take),
    /// In sessions of its own; `None` where it means nothing for the peer.
    Own(fn(Peer, &Tools) -> Result<Option<Figures>>),
}

impl Measure {
    const fn shared_as(name: &'static str, take: Take) -> Self {
        Self { name, scope: Scope::Shared(take) }
    }

    /// What is to be done in a session that others use too, and whether it can be done again.
    pub(super) fn shared(&self) -> Option<(Take, bool)> {
        match self.scope {
            Scope::Shared(take) => Some((take, true)),
            Scope::Once(take) => Some((take, false)),
            Scope::Own(_) => None,
        }
    }
}

/// All of them, in the order in which they are done. First contacts come first: a later one would not be a first.
pub(super) const MEASURES: &[Measure] = &[
    Measure { name: "first-contact", scope: Scope::Once(first_contact) },
    Measure::shared_as("requests-1", |s| requests(s, FAR, 1, None, 1024, 3.0)),
    Measure::shared_as("requests-16", |s| requests(s, FAR, 16, None, 1024, 4.0)),
    Measure::shared_as("requests-64", |s| requests(s, FAR, 64, None, 16 << 10, 4.0)),
    Measure::shared_as("paced-1000", |s| requests(s, FAR, 16, Some(1000), 1024, 6.0)),
    Measure::shared_as("paced-4000", |s| requests(s, FAR, 16, Some(4000), 1024, 6.0)),
    Measure::shared_as("connects-1", |s| connects(s, FAR, 1, 1024, 2.0)),
    Measure::shared_as("connects-16", |s| connects(s, FAR, 16, 1024, 4.0)),
    Measure::shared_as("burst-512", |s| connects(s, FAR, 512, 1024, 4.0)),
    Measure::shared_as("answers-96k", |s| connects(s, FAR, 8, 96 << 10, 4.0)),
    Measure::shared_as("bulk-1", |s| bulk(s, FAR, 1, false)),
    Measure::shared_as("bulk-1-back", |s| bulk(s, FAR, 1, true)),
    Measure::shared_as("bulk-8", |s| bulk(s, FAR, 8, false)),
    Measure::shared_as("bulk-8-back", |s| bulk(s, FAR, 8, true)),
    Measure::shared_as("near-bulk-1", |s| bulk(s, NEAR, 1, false)),
    Measure::shared_as("near-requests-1", |s| requests(s, NEAR, 1, None, 1024, 2.0)),
    Measure::shared_as("near-requests-16", |s| requests(s, NEAR, 16, None, 1024, 3.0)),
    Measure::shared_as("near-connects-16", |s| connects(s, NEAR, 16, 1024, 3.0)),
    Measure::shared_as("beside-bulk", beside_bulk),
    Measure::shared_as("stalled", stalled),
    Measure { name: "memory", scope: Scope::Own(memory) },
    Measure { name: "workloads", scope: Scope::Own(workloads) },
    Measure { name: "changes", scope: Scope::Own(changes) },
];

fn spread(figures: &mut Figures, latency: &Latency) {
    figures.insert("p50_us", latency.p50);
    figures.insert("p99_us", latency.p99);
    figures.insert("p999_us", latency.p999);
}

fn cpu_per_1000(figures: &mut Figures, cpu: Option<Cpu>, done: u64) {
    let Some(cpu) = cpu else { return };
    // Seconds for `done` are as many milliseconds for a thousandth of it, so many millionths of a second per one.
    figures.insert("cpu_ms_per_1000", cpu.total() * 1e6 / done.max(1) as f64);
    user_percent(figures, cpu);
}

fn user_percent(figures: &mut Figures, cpu: Cpu) {
    if cpu.total() > 0.0 {
        figures.insert("user_percent", 100.0 * cpu.user / cpu.total());
    }
}

fn requests(
    session: &Session<'_>,
    server: &str,
    connections: u32,
    rate: Option<u32>,
    answer: u32,
    seconds: f64,
) -> Result<Figures> {
    let mut words = words("requests", session.at(server)?, seconds, answer);
    words.extend(["--connections".to_owned(), connections.to_string()]);
    if let Some(rate) = rate {
        words.extend(["--rate".to_owned(), rate.to_string()]);
    }
    let (got, cpu) = session.with_cpu(|| session.load(&words))?;
    let mut figures = Figures::from([("per_s", got.done as f64 / got.seconds), ("failed", got.failed as f64)]);
    spread(&mut figures, &got.latency);
    cpu_per_1000(&mut figures, cpu, got.done_in_all);
    Ok(figures)
}

fn connects(session: &Session<'_>, server: &str, at_once: u32, answer: u32, seconds: f64) -> Result<Figures> {
    let mut words = words("connects", session.at(server)?, seconds, answer);
    words.extend(["--at-once".to_owned(), at_once.to_string()]);
    let (got, cpu) = session.with_cpu(|| session.load(&words))?;
    Ok(of_connects(&got, cpu))
}

fn of_connects(got: &LoadResult, cpu: Option<Cpu>) -> Figures {
    let mut figures = Figures::from([
        ("per_s", got.done as f64 / got.seconds),
        ("done", got.done as f64),
        ("failed", got.failed as f64),
    ]);
    spread(&mut figures, &got.latency);
    cpu_per_1000(&mut figures, cpu, got.done);
    figures
}

fn words(verb: &str, to: String, seconds: f64, answer: u32) -> Vec<String> {
    let (seconds, answer) = (seconds.to_string(), answer.to_string());
    [verb, "--to", &to, "--seconds", &seconds, "--answer", &answer].map(str::to_owned).into()
}

fn bulk(session: &Session<'_>, server: &str, streams: u32, back: bool) -> Result<Figures> {
    let mut words = words("bulk", session.at(server)?, 4.0, 0);
    words.extend(["--streams".to_owned(), streams.to_string()]);
    words.extend(back.then(|| "--back".to_owned()));
    let (got, cpu) = session.with_cpu(|| session.load(&words))?;
    let gigabytes = got.bytes as f64 / 1e9;
    let mut figures = Figures::from([("gbit_s", gigabytes * 8.0 / got.seconds), ("failed", got.failed as f64)]);
    if let Some(cpu) = cpu {
        figures.insert("cpu_s_per_gb", cpu.total() / gigabytes);
        user_percent(&mut figures, cpu);
    }
    Ok(figures)
}

/// One request to each of many addresses that nobody has used, one at a time.
fn first_contact(session: &Session<'_>) -> Result<Figures> {
    // Certificates and caches of the pods themselves are warm.
    let mut warm = words("connects", session.at(FAR)?, 5.0, 1024);
    warm.extend(["--at-once", "1", "--count", "50"].map(str::to_owned));
    session.load(&warm)?;
    let addresses = session.first_contacts()?;
    let mut cold = words("connects", addresses.join(","), 30.0, 1024);
    cold.extend(["--at-once".to_owned(), "1".to_owned(), "--count".to_owned(), addresses.len().to_string()]);
    let (got, cpu) = session.with_cpu(|| session.load(&cold))?;
    Ok(of_connects(&got, cpu))
}

/// A request now and then beside a stream of 1 Gbit/s between the same two pods.
fn beside_bulk(session: &Session<'_>) -> Result<Figures> {
    // 128 KiB, 954 times a second.
    let mut stream = words("requests", session.at(FAR)?, 8.0, 128 << 10);
    stream.extend(["--connections", "1", "--rate", "954"].map(str::to_owned));
    let beside = session.spawn(&stream)?;
    thread::sleep(Duration::from_millis(500));
    let mut figures = requests(session, FAR, 4, Some(500), 1024, 5.0)?;
    let stream = beside.finish()?;
    figures.insert("beside_gbit_s", stream.done as f64 * f64::from(128 << 10) * 8.0 / stream.seconds / 1e9);
    Ok(figures)
}

/// Connections that must finish beside others, between the same two pods, whose readers have stopped.
fn stalled(session: &Session<'_>) -> Result<Figures> {
    let to = session.at(FAR)?;
    let mut beside = session.spawn(&["stall", "--to", &to, "--connections", STALLED])?;
    beside.first_line()?;
    let mut words = words("connects", to, 5.0, 1024);
    words.extend(["--at-once".to_owned(), "4".to_owned(), "--count".to_owned(), BESIDE.to_string()]);
    let (got, cpu) = session.with_cpu(|| session.load(&words))?;
    let mut figures = of_connects(&got, cpu);
    if let Some(kib) = session.memory_kib()? {
        figures.insert("memory_mib", kib / 1024.0);
    }
    Ok(figures)
}

/// Memory of each node's proxies: at rest, and for each connection that is open and quiet.
fn memory(peer: Peer, tools: &Tools) -> Result<Option<Figures>> {
    const FEW: u32 = 500;
    const MORE: u32 = 4000;
    if peer == Peer::Plain {
        return Ok(None);
    }
    let session = Session::up(peer, tools, None)?;
    let per_node = || -> Result<f64> { Ok(session.memory_kib()?.context("a peer without proxies")? / NODES) };
    let settle = || thread::sleep(Duration::from_secs(3));
    settle();
    let mut figures = Figures::from([("idle_mib", per_node()? / 1024.0)]);
    let hold = |count: u32| {
        let mut held = session.spawn(&["hold", "--to", &session.at(FAR)?, "--connections", &count.to_string()])?;
        let got = held.first_line()?;
        ensure!(got.failed == 0 && got.done == u64::from(count), "{} of {count} connections are open", got.done);
        settle();
        Ok((held, per_node()?))
    };
    // What the first ones bring with them is not any connection's own.
    let (_few, before) = hold(FEW)?;
    let (_more, after) = hold(MORE)?;
    figures.insert("per_connection_kib", (after - before) / f64::from(MORE));
    drop((_few, _more));
    session.down()?;
    Ok(Some(figures))
}

/// Memory and time that a large configuration costs; a sidecar of this kind has none.
fn workloads(peer: Peer, tools: &Tools) -> Result<Option<Figures>> {
    if peer != Peer::Culvert {
        return Ok(None);
    }
    let mut figures = Figures::new();
    let mut memory = Vec::new();
    for (count, ready) in [(0, "ready_s_without"), (WORKLOADS, "ready_s")] {
        let more = if count > 0 { Some(elsewhere(count, 1)?) } else { None };
        let session = Session::up(peer, tools, more.as_deref())?;
        thread::sleep(Duration::from_secs(5));
        memory.push(session.memory_kib()?.context("a peer without proxies")? / NODES);
        figures.insert(ready, session.ready.as_secs_f64());
        if count > 0 {
            figures.insert("memory_mib", memory[1] / 1024.0);
            figures.insert("per_workload_kib", (memory[1] - memory[0]) / count as f64);
        }
        session.down()?;
    }
    Ok(Some(figures))
}

/// From a manifest that is in place to a verdict of the kernel that follows it.
fn changes(peer: Peer, tools: &Tools) -> Result<Option<Figures>> {
    if peer != Peer::Culvert {
        return Ok(None);
    }
    let (pods, count, namespaces) = CHANGED;
    let more = elsewhere(pods, namespaces)? + &policies(count, namespaces)?;
    let session = Session::up(peer, tools, Some(&more))?;
    let mut figures = Figures::new();
    for (change, [p50, p99, cpu_ms]) in
        [(Change::Mode, ["p50_us", "p99_us", "cpu_ms"]), (Change::Deny, ["deny_p50_us", "deny_p99_us", "deny_cpu_ms"])]
    {
        let (took, cpu) = session.with_cpu(|| session.changes(change, CHANGES))?;
        let mut took: Vec<f64> = took.iter().map(|took| took.as_secs_f64() * 1e6).collect();
        took.sort_by(f64::total_cmp);
        let at = |share: f64| took.get(((took.len() - 1) as f64 * share).round() as usize).copied().unwrap_or_default();
        figures.extend([(p50, at(0.5)), (p99, at(0.99))]);
        if let Some(cpu) = cpu {
            figures.insert(cpu_ms, cpu.total() * 1e3 / CHANGES as f64 / NODES);
        }
    }
    session.down()?;
    Ok(Some(figures))
}
