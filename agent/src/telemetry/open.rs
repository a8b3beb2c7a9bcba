//! Every open connection of the node's pods: tunnelled, carried in plaintext by the agent, or passed by the kernel.
//!
//! Who carries a connection enters it here and takes it out at its end. Each worker enters into a [`Shard`] of its own,
//! whose lock only a listing ever contends for, and a listing holds it for `CHUNK` connections at a time. What the
//! kernel passed nobody carries: `crate::connections` looks for it when somebody asks ([`Connections::list`]). The same
//! lock guards the shard's part of the traffic metrics, so that a connection costs a worker two locks in all.

use std::{
    collections::{BTreeMap, HashMap},
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::Context as _;
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot};

use super::{
    access::Direction,
    history::{Circumstances, History, Noted, Plaintext, PlaintextSeen, Refusals},
    metrics::Question,
    recent::Seen,
    traffic::{Count, Flag, Kind, Labels, Names, Totals},
};
use crate::{
    model::{ObjectRef, SpiffeId},
    policy::Workload,
};

/// Connections that a listing copies before it lets the worker in again: some microseconds.
const CHUNK: usize = 256;

/// Bytes moved so far; readable from other threads while the copy runs.
#[derive(Debug, Default)]
pub struct Counters {
    /// From the first side to the second: from the socket into the tunnel; what this side sent towards its remote peer.
    pub forward: AtomicU64,
    /// From the second side to the first.
    pub backward: AtomicU64,
}

impl Counters {
    /// (client → server, server → client), seen from a side.
    pub(crate) fn read(&self, direction: Direction) -> (u64, u64) {
        let (forward, backward) = (self.forward.load(Ordering::Relaxed), self.backward.load(Ordering::Relaxed));
        match direction {
            Direction::Outbound => (forward, backward),
            Direction::Inbound => (backward, forward),
        }
    }
}

/// How a connection is carried.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Carried {
    /// In a tunnel, by the agent.
    Tunnel,
    /// In plaintext, by the agent.
    Agent,
    /// In plaintext, from application to application: the kernel passed it.
    Kernel,
    /// In plaintext, from application to application: it is older than the pod's enrolment.
    PreEnrolment,
}

impl Carried {
    /// The word for people and metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Tunnel => "tunnel",
            Self::Agent => "agent",
            Self::Kernel => "kernel",
            Self::PreEnrolment => "pre-enrolment",
        }
    }
}

/// What is known of a connection. Shared by whoever carries it and the registry.
#[derive(Clone, Debug)]
pub struct Facts {
    /// Seen from the pod of this node.
    pub direction: Direction,
    /// The client's address.
    pub src: SocketAddr,
    /// The client's pod, where its address, and its certificate if there is one, say whose it is.
    pub src_workload: Option<Arc<Workload>>,
    /// The client's identity, by its certificate.
    pub src_identity: Option<SpiffeId>,
    /// The socket's peer: for a tunnel, with the tunnel's port.
    pub dst: SocketAddr,
    /// The server's pod.
    pub dst_workload: Option<Arc<Workload>>,
    /// The server's identity, by its certificate.
    pub dst_identity: Option<SpiffeId>,
    /// The target inside the tunnel.
    pub hbone_addr: Option<SocketAddr>,
    /// The Service that was addressed.
    pub service: Option<ObjectRef>,
    /// Who carries it, and how.
    pub carried: Carried,
}

impl Facts {
    /// Of a connection of which only its two ends are known.
    pub fn new(direction: Direction, src: SocketAddr, dst: SocketAddr) -> Self {
        Self {
            direction,
            src,
            src_workload: None,
            src_identity: None,
            dst,
            dst_workload: None,
            dst_identity: None,
            hbone_addr: None,
            service: None,
            carried: Carried::Agent,
        }
    }
}

/// One open connection, as it is shown.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Record {
    /// Unlike any other's while the agent runs.
    pub id: u64,
    /// `inbound` or `outbound`, seen from the pod of this node.
    pub direction: &'static str,
    /// `source` or `destination`: the side that tells this, as in metrics ([M.3]).
    pub reporter: &'static str,
    /// How it is carried.
    pub carried: Carried,
    /// Milliseconds since the epoch; absent where the connection is older than what we know.
    pub opened_at_ms: Option<u64>,
    /// The client.
    pub source: Peer,
    /// The server. Its address is the socket's peer: for a tunnel, with the tunnel's port.
    pub destination: Peer,
    /// The target inside the tunnel.
    pub hbone_addr: Option<SocketAddr>,
    /// `namespace/name` of the Service that was addressed.
    pub service: Option<String>,
    /// Bytes client → server so far.
    pub received_bytes: u64,
    /// Bytes server → client so far.
    pub sent_bytes: u64,
    /// Word of the verdict that admitted it; empty until there is one, and where the other side gives it.
    pub policy: &'static str,
}

/// One end of an open connection.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Peer {
    /// Address and port.
    pub addr: SocketAddr,
    /// Name of the pod.
    pub pod: Option<String>,
    /// Name of the workload.
    pub workload: Option<String>,
    /// Namespace of both.
    pub namespace: Option<String>,
    /// SPIFFE ID; only with mTLS.
    pub identity: Option<String>,
}

/// All shards, and what was counted in them. Clones are the same.
#[derive(Clone, Debug)]
pub struct Registry {
    shards: Arc<Mutex<Vec<Arc<Shared>>>>,
    totals: Arc<Totals>,
    refusals: Arc<Mutex<HashMap<Refusal, u64>>>,
    history: Arc<Mutex<History>>,
}

/// A refusal by the agent: seen from which side, and the word of its reason.
pub type Refusal = (Direction, &'static str);

/// Most label sets of the traffic metrics, unless it is set.
pub const LABEL_SETS: usize = 2000;

impl Default for Registry {
    fn default() -> Self {
        Self::new(Names::default(), LABEL_SETS)
    }
}

/// What the registry knows at one moment.
#[derive(Clone, Debug, Default)]
pub struct Traffic {
    /// Every label set with its totals, sorted.
    pub sets: Vec<(Arc<Labels>, Count)>,
    /// How often a connection's label set found no room.
    pub overflowed: u64,
    /// Open connections, by direction and by how they are carried.
    pub open: Vec<((Direction, Carried), u64)>,
    /// Refusals by the agent.
    pub refusals: Vec<(Refusal, u64)>,
}

/// Where one thread enters its connections. Cheap to clone; all clones are the same.
#[derive(Clone, Debug)]
pub struct Shard {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    number: u64,
    totals: Arc<Totals>,
    state: Mutex<State>,
    /// Refusals and plaintext; whoever carries other connections never takes this lock. Nobody holds it and another.
    noted: Mutex<Noted>,
    /// Where that goes when there is no room for more.
    history: Arc<Mutex<History>>,
}

#[derive(Debug, Default)]
struct State {
    slots: Vec<Option<Slot>>,
    free: Vec<u32>,
    entered: u64,
    kinds: HashMap<Kind, u32>,
    series: Vec<Option<Series>>,
    free_series: Vec<u32>,
    refusals: HashMap<Refusal, u64>,
}

#[derive(Clone, Debug)]
struct Slot {
    id: u64,
    opened_at_ms: Option<u64>,
    facts: Arc<Facts>,
    counters: Arc<Counters>,
    policy: &'static str,
    series: u32,
    /// The bytes that are in the series already.
    counted: (u64, u64),
}

/// What was counted under a label set since the last gathering.
#[derive(Debug)]
struct Series {
    kind: Kind,
    labels: Arc<Labels>,
    count: Count,
    open: u32,
    /// Gatherings that found nothing new.
    idle: u32,
}

/// What a gathering takes out of a shard.
struct Taken {
    differences: Vec<(Arc<Labels>, Count)>,
    refusals: HashMap<Refusal, u64>,
    /// Series that are forgotten, to be dropped outside the lock.
    dropped: Vec<Series>,
}

/// Gatherings without anything new after which a worker forgets a label set, and has to look it up again.
const FORGET: u32 = 8;

/// A connection's place in the registry, until dropped.
#[derive(Debug)]
pub struct Open {
    shared: Arc<Shared>,
    slot: u32,
    flag: Flag,
}

impl Registry {
    /// An empty one, for at most `label_sets` label sets.
    pub fn new(names: Names, label_sets: usize) -> Self {
        Self {
            shards: Arc::default(),
            totals: Arc::new(Totals::new(names, label_sets)),
            refusals: Arc::default(),
            history: Arc::default(),
        }
    }

    /// A shard for a thread that is about to carry connections.
    pub fn shard(&self) -> Shard {
        let mut shards = lock(&self.shards);
        let shared = Arc::new(Shared {
            number: shards.len() as u64,
            totals: self.totals.clone(),
            state: Mutex::default(),
            noted: Mutex::default(),
            history: self.history.clone(),
        });
        shards.push(shared.clone());
        Shard { shared }
    }

    /// Every connection that is entered, oldest first. One that is opened or closed meanwhile may or may not be there; one
    /// that stays open throughout is, once.
    pub fn list(&self) -> Vec<Record> {
        let mut records = Vec::new();
        let mut copied = Vec::with_capacity(CHUNK);
        for shard in lock(&self.shards).clone() {
            shard.chunks(|slots, _| {
                copied.extend(slots.iter().flatten().cloned());
            });
            // Outside the lock, and dropped there too: what a copy holds may be the last of its kind.
            records.extend(copied.drain(..).map(|slot| record(&slot)));
        }
        records.sort_unstable_by_key(|record| (record.opened_at_ms, record.id));
        records
    }

    /// Gathers what the shards have counted, live bytes too, and tells it all.
    pub fn traffic(&self) -> Traffic {
        let mut open: HashMap<(Direction, Carried), u64> = HashMap::new();
        let mut refusals = lock(&self.refusals);
        for shard in lock(&self.shards).clone() {
            shard.chunks(|slots, series| {
                for slot in slots.iter_mut().flatten() {
                    *open.entry((slot.facts.direction, slot.facts.carried)).or_default() += 1;
                    if let Some(Some(series)) = series.get_mut(slot.series as usize) {
                        slot.count(&mut series.count);
                    }
                }
            });
            let taken = lock(&shard.state).take();
            drop(taken.dropped);
            self.totals.add(taken.differences, Instant::now());
            for (refusal, times) in taken.refusals {
                *refusals.entry(refusal).or_default() += times;
            }
        }
        let mut traffic = Traffic {
            sets: self.totals.read(),
            overflowed: self.totals.overflowed(),
            open: open.into_iter().collect(),
            refusals: refusals.iter().map(|(refusal, times)| (*refusal, *times)).collect(),
        };
        traffic.open.sort_unstable();
        traffic.refusals.sort_unstable();
        traffic
    }

    /// Several times a second: takes over what the shards have noted of refusals and plaintext, so that they have room
    /// again, and drops what is too old.
    pub fn gather(&self) {
        for shard in lock(&self.shards).clone() {
            let noted = std::mem::take(&mut *lock(&shard.noted));
            lock(&self.history).gather(noted);
        }
        lock(&self.history).forget(Instant::now());
    }

    /// What was refused in the last hour.
    pub fn refused(&self) -> Refusals {
        self.gather();
        lock(&self.history).refusals()
    }

    /// Who came in plaintext since the agent has started.
    pub fn plaintext(&self) -> PlaintextSeen {
        self.gather();
        lock(&self.history).plaintext()
    }

    /// Every minute or so: gathers, and drops the label sets of workloads that are gone. `exists` knows a workload by
    /// namespace and name.
    pub fn maintain(&self, exists: impl Fn(&str, &str) -> bool) {
        drop(self.traffic());
        self.totals.forget(Instant::now(), exists);
    }
}

impl Shared {
    /// Shows every place, some at a time, with the series that go with them.
    fn chunks(&self, mut see: impl FnMut(&mut [Option<Slot>], &mut [Option<Series>])) {
        let mut from = 0;
        loop {
            let mut state = lock(&self.state);
            let State { slots, series, .. } = &mut *state;
            let Some(rest) = slots.get_mut(from..).filter(|rest| !rest.is_empty()) else { return };
            let length = rest.len().min(CHUNK);
            see(&mut rest[..length], series);
            from += CHUNK;
        }
    }
}

impl Slot {
    /// Puts the bytes that have come since into `count`.
    fn count(&mut self, count: &mut Count) {
        let (received, sent) = self.counters.read(self.facts.direction);
        count.received += received.saturating_sub(self.counted.0);
        count.sent += sent.saturating_sub(self.counted.1);
        self.counted = (received, sent);
    }
}

impl State {
    fn enter(&mut self, slot: Slot) -> u32 {
        if let Some(Some(series)) = self.series.get_mut(slot.series as usize) {
            series.count.opened += 1;
            series.open += 1;
        }
        match self.free.pop() {
            Some(place) => {
                self.slots[place as usize] = Some(slot);
                place
            }
            None => {
                self.slots.push(Some(slot));
                (self.slots.len() - 1) as u32
            }
        }
    }

    fn leave(&mut self, place: u32, flag: Flag) -> Option<Slot> {
        let mut slot = self.slots.get_mut(place as usize)?.take()?;
        self.free.push(place);
        if let Some(Some(series)) = self.series.get_mut(slot.series as usize) {
            slot.count(&mut series.count);
            series.count.closed[flag as usize] += 1;
            series.open -= 1;
        }
        Some(slot)
    }

    fn new_series(&mut self, kind: Kind, labels: Arc<Labels>) -> u32 {
        let series = Series { kind: kind.clone(), labels, count: Count::default(), open: 0, idle: 0 };
        let place = match self.free_series.pop() {
            Some(place) => {
                self.series[place as usize] = Some(series);
                place
            }
            None => {
                self.series.push(Some(series));
                (self.series.len() - 1) as u32
            }
        };
        self.kinds.insert(kind, place);
        place
    }

    /// What was counted since the last time.
    fn take(&mut self) -> Taken {
        let (mut differences, mut dropped) = (Vec::new(), Vec::new());
        for (place, entry) in self.series.iter_mut().enumerate() {
            let Some(series) = entry else { continue };
            let count = std::mem::take(&mut series.count);
            if count != Count::default() {
                series.idle = 0;
                differences.push((series.labels.clone(), count));
            } else if series.open == 0 {
                series.idle += 1;
                if series.idle >= FORGET {
                    self.kinds.remove(&series.kind);
                    dropped.extend(entry.take());
                    self.free_series.push(place as u32);
                }
            }
        }
        Taken { differences, refusals: std::mem::take(&mut self.refusals), dropped }
    }
}

impl Shard {
    /// Enters a connection that is opened now.
    pub fn open(&self, facts: Arc<Facts>, counters: Arc<Counters>) -> Open {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        self.open_since(Some(u64::try_from(now.as_millis()).unwrap_or(u64::MAX)), facts, counters)
    }

    /// Enters a connection that was opened at a time that somebody else knows, or nobody.
    pub fn open_since(&self, opened_at_ms: Option<u64>, facts: Arc<Facts>, counters: Arc<Counters>) -> Open {
        let kind = Kind(facts.clone());
        let mut state = lock(&self.shared.state);
        let series = match state.kinds.get(&kind) {
            Some(series) => *series,
            None => {
                drop(state);
                let labels = self.shared.totals.labels(&facts);
                state = lock(&self.shared.state);
                // Meanwhile another thread may have entered it.
                match state.kinds.get(&kind) {
                    Some(series) => *series,
                    None => state.new_series(kind, labels),
                }
            }
        };
        state.entered += 1;
        // 256 shards are more than the 64 workers there can be.
        let id = state.entered << 8 | self.shared.number;
        let slot = state.enter(Slot { id, opened_at_ms, facts, counters, policy: "", series, counted: (0, 0) });
        drop(state);
        Open { shared: self.shared.clone(), slot, flag: Flag::None }
    }

    /// Counts a refusal by the agent.
    pub fn refused(&self, refusal: Refusal) {
        *lock(&self.shared.state).refusals.entry(refusal).or_default() += 1;
    }

    /// Notes that connections were refused just now: for `culvert why`, whoever refused them.
    pub fn note_refusal(&self, refusal: super::history::Refusal, times: u64, circumstances: Circumstances) {
        let seen = Seen::now(times, Instant::now(), circumstances);
        self.note(|noted| noted.refusals.note(refusal, seen));
    }

    /// Notes that a connection was let in that came in plaintext from `ip`: for `culvert report strict`.
    pub fn note_plaintext(&self, plaintext: Plaintext, ip: std::net::IpAddr) {
        self.note(|noted| noted.plaintext.note(plaintext, Seen::now(1, Instant::now(), ip)));
    }

    /// `note` says whether there is room for more.
    fn note(&self, note: impl FnOnce(&mut Noted) -> bool) {
        let full = {
            let mut noted = lock(&self.shared.noted);
            note(&mut noted).then(|| std::mem::take(&mut *noted))
        };
        if let Some(noted) = full {
            lock(&self.shared.history).gather(noted);
        }
    }
}

impl Open {
    /// Notes the word of the verdict that admitted it.
    pub fn admitted(&self, policy: &'static str) {
        if let Some(Some(slot)) = lock(&self.shared.state).slots.get_mut(self.slot as usize) {
            slot.policy = policy;
        }
    }

    /// Takes it out, with how it ended; dropping it is an end without a flag.
    pub fn close(mut self, flag: Flag) {
        self.flag = flag;
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        let taken = lock(&self.shared.state).leave(self.slot, self.flag);
        // Outside the lock.
        drop(taken);
    }
}

/// Every open connection, for whoever asks: what is entered in the registry, after what the kernel passed was looked at
/// again. Cheap to clone; works from every task.
#[derive(Clone, Debug)]
pub struct Connections {
    registry: Registry,
    control: mpsc::Sender<Question>,
}

impl Connections {
    /// `control` is asked to look at the kernel's connections.
    pub fn new(registry: Registry, control: mpsc::Sender<Question>) -> Self {
        Self { registry, control }
    }

    /// Lists them.
    ///
    /// # Errors
    /// The agent is ending.
    pub async fn list(&self) -> anyhow::Result<Vec<Record>> {
        let (done, looked) = oneshot::channel();
        self.control.send(Question::Connections(done)).await.ok().context("the agent is ending")?;
        looked.await.context("the agent is ending")?;
        Ok(self.registry.list())
    }

    /// What was refused in the last hour, by the agent and by the kernel.
    ///
    /// # Errors
    /// The agent is ending.
    pub async fn refused(&self) -> anyhow::Result<Refusals> {
        let (done, told) = oneshot::channel();
        self.control.send(Question::Refusals(done)).await.ok().context("the agent is ending")?;
        told.await.context("the agent is ending")?;
        Ok(self.registry.refused())
    }

    /// Who came in plaintext since the agent has started, what is open now, and how many connections were opened.
    ///
    /// # Errors
    /// The agent is ending.
    pub async fn strictness(&self) -> anyhow::Result<Strictness> {
        let mut looked = 0;
        let unseen = loop {
            let (reply, unseen) = oneshot::channel();
            self.control.send(Question::Plaintext(reply)).await.ok().context("the agent is ending")?;
            let unseen = unseen.await.context("the agent is ending")?;
            looked += 1;
            // A connection that is just beginning or ending is counted before it is told.
            if unseen.is_empty() || looked == LOOKS {
                break unseen;
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        };
        Ok(Strictness {
            plaintext: self.registry.plaintext(),
            unseen,
            refusals: self.registry.refused(),
            open: self.registry.list(),
            traffic: self.registry.traffic(),
        })
    }

    /// Has every established socket of the node's pods looked at.
    ///
    /// # Errors
    /// The agent is ending.
    pub async fn prove(&self) -> anyhow::Result<Proof> {
        let (reply, proof) = oneshot::channel();
        self.control.send(Question::Proof(reply)).await.ok().context("the agent is ending")?;
        Ok(*proof.await.context("the agent is ending")?)
    }
}

/// How often it is looked again for connections that were counted and not told yet, and the pause before.
const LOOKS: usize = 4;
const LOOK_AGAIN: std::time::Duration = std::time::Duration::from_millis(250);

/// What `culvert report strict` is made from.
#[derive(Clone, Debug, Default)]
pub struct Strictness {
    /// Who came in plaintext.
    pub plaintext: PlaintextSeen,
    /// Connections in plaintext that the kernel has counted for a pod, and of which nobody knows who made them.
    pub unseen: Vec<(ObjectRef, u64)>,
    /// Who was refused.
    pub refusals: Refusals,
    /// What is open.
    pub open: Vec<Record>,
    /// What was opened.
    pub traffic: Traffic,
}

/// What came of a capture proof: a look at every established TCP socket of the node's pods.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Proof {
    /// Pods whose sockets were looked at.
    pub pods: usize,
    /// Established sockets by what accounts for them: `captured`, `agent`, `leg`, `served`, `passed`, `probe`, `tunnel`,
    /// `same-pod`, `pre-enrolment`.
    pub accounted: BTreeMap<String, usize>,
    /// Those that nothing accounts for.
    pub strays: Vec<Stray>,
    /// Pods that could not be looked at, and why.
    pub failures: Vec<String>,
}

/// An established connection that the mesh has nothing to do with, and should have.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stray {
    /// Namespace of the pod.
    pub namespace: String,
    /// Its name.
    pub pod: String,
    /// The socket's own address.
    pub local: SocketAddr,
    /// Its peer.
    pub remote: SocketAddr,
    /// Number of a process that has it open; 0 if none was found.
    pub pid: u32,
    /// Name of that process.
    pub process: String,
    /// The socket's cookie, which no other ever has.
    pub socket: u64,
}

fn record(slot: &Slot) -> Record {
    let facts = &slot.facts;
    let (direction, reporter) = match facts.direction {
        Direction::Outbound => ("outbound", "source"),
        Direction::Inbound => ("inbound", "destination"),
    };
    let (received_bytes, sent_bytes) = slot.counters.read(facts.direction);
    Record {
        id: slot.id,
        direction,
        reporter,
        carried: facts.carried,
        opened_at_ms: slot.opened_at_ms,
        source: peer(facts.src, facts.src_workload.as_deref(), facts.src_identity.as_ref()),
        destination: peer(facts.dst, facts.dst_workload.as_deref(), facts.dst_identity.as_ref()),
        hbone_addr: facts.hbone_addr,
        service: facts.service.as_ref().map(ObjectRef::to_string),
        received_bytes,
        sent_bytes,
        policy: slot.policy,
    }
}

fn peer(addr: SocketAddr, workload: Option<&Workload>, identity: Option<&SpiffeId>) -> Peer {
    Peer {
        addr,
        pod: workload.map(|workload| workload.object.name.to_string()),
        workload: workload.map(|workload| workload.workload_name.to_string()),
        namespace: workload.map(|workload| workload.object.namespace.to_string()),
        identity: identity.map(SpiffeId::to_string),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing panics while it holds one of these locks.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts(direction: Direction, port: u16) -> Arc<Facts> {
        let addr = |last| SocketAddr::new([10, 0, 0, last].into(), port);
        Arc::new(Facts::new(direction, addr(1), addr(2)))
    }

    #[test]
    fn a_connection_is_listed_with_its_live_bytes_until_it_ends() {
        let registry = Registry::default();
        let (one, two) = (registry.shard(), registry.shard());
        let counters = Arc::new(Counters::default());
        let outbound = one.open(facts(Direction::Outbound, 1), counters.clone());
        let inbound = two.open(facts(Direction::Inbound, 2), counters.clone());
        counters.forward.store(5, Ordering::Relaxed);
        counters.backward.store(7, Ordering::Relaxed);
        inbound.admitted("no-allow-policies");
        let list = registry.list();
        let of = |direction| list.iter().find(|record| record.direction == direction).expect("listed");
        assert_eq!((of("outbound").received_bytes, of("outbound").sent_bytes), (5, 7));
        assert_eq!((of("inbound").received_bytes, of("inbound").sent_bytes), (7, 5));
        assert_eq!((of("outbound").reporter, of("inbound").reporter), ("source", "destination"));
        assert_eq!(of("inbound").policy, "no-allow-policies");
        assert_ne!(of("inbound").id, of("outbound").id);
        drop(outbound);
        assert_eq!(registry.list().len(), 1);
        // Its place is taken again, its number is not.
        let id = registry.list()[0].id;
        drop(inbound);
        let _again = two.open(facts(Direction::Inbound, 3), counters);
        assert_ne!(registry.list()[0].id, id);
        assert_eq!(lock(&two.shared.state).slots.len(), 1);
    }

    /// One that stays open is listed once, however many come and go beside it.
    #[test]
    fn a_listing_sees_what_stays_while_others_come_and_go() {
        let registry = Registry::default();
        let shard = registry.shard();
        let mut stay = Vec::new();
        let mut go = Vec::new();
        for port in 0..2000 {
            let open = shard.open(facts(Direction::Inbound, port), Arc::default());
            if port % 2 == 0 { stay.push(open) } else { go.push(open) }
        }
        let done = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                go.clear();
                while !done.load(Ordering::Relaxed) {
                    drop(shard.open(facts(Direction::Inbound, 1), Arc::default()));
                }
            });
            for _ in 0..50 {
                let list = registry.list();
                let even: Vec<u16> =
                    list.iter().map(|record| record.source.addr.port()).filter(|port| port % 2 == 0).collect();
                assert_eq!(even.len(), stay.len());
                let distinct: std::collections::BTreeSet<_> = even.iter().collect();
                assert_eq!(distinct.len(), stay.len(), "one twice");
            }
            done.store(true, Ordering::Relaxed);
        });
        drop(stay);
        assert_eq!(registry.list(), []);
    }

    fn total(registry: &Registry) -> Count {
        let traffic = registry.traffic();
        assert_eq!(traffic.sets.len(), 1, "{traffic:?}");
        traffic.sets[0].1
    }

    /// §16: live bytes; counters never go back, whatever ends between two looks.
    #[test]
    fn bytes_are_counted_while_a_connection_lasts_and_once_in_all() {
        let registry = Registry::default();
        let shards = [registry.shard(), registry.shard()];
        let counters: [Arc<Counters>; 2] = Default::default();
        let [one, two] = [0, 1].map(|n| shards[n].open(facts(Direction::Outbound, 1), counters[n].clone()));
        counters[0].forward.store(10, Ordering::Relaxed);
        counters[1].backward.store(3, Ordering::Relaxed);
        let count = total(&registry);
        assert_eq!((count.opened, count.received, count.sent, count.closed), (2, 10, 3, [0; 8]));
        counters[0].forward.store(25, Ordering::Relaxed);
        one.close(Flag::Connect);
        drop(two);
        let count = total(&registry);
        assert_eq!((count.opened, count.received, count.sent), (2, 25, 3));
        assert_eq!((count.closed[Flag::None as usize], count.closed[Flag::Connect as usize]), (1, 1));
        assert_eq!(total(&registry), count, "nothing is counted twice");
    }

    /// However many different refusals come in a moment: the latest are there, and every other one was told to be gone.
    #[test]
    fn a_flood_of_refusals_is_counted_to_the_last() {
        const EACH: u32 = 6000;
        let registry = Registry::default();
        std::thread::scope(|scope| {
            for thread in 0..2u8 {
                let shard = registry.shard();
                scope.spawn(move || {
                    for number in 0..EACH {
                        let [_, _, high, low] = number.to_be_bytes();
                        let mut facts = Facts::clone(&facts(Direction::Inbound, 1));
                        facts.dst = SocketAddr::new([10, thread, high, low].into(), 80);
                        let refusal = super::super::history::Refusal::of(&facts, "loop", None);
                        shard.note_refusal(refusal, 1, Circumstances::new("text"));
                    }
                });
            }
        });
        let refused = registry.refused();
        let kept: u64 = refused.entries.iter().map(|(_, seen)| seen.times).sum();
        assert_eq!(refused.entries.len(), super::super::history::ENTRIES);
        assert_eq!(kept + refused.evicted.reasons["loop"], u64::from(2 * EACH));
        let last = |thread| SocketAddr::new([10, thread, 0x17, 0x6f].into(), 80).ip();
        for thread in 0..2 {
            let there = refused.entries.iter().any(|(of, _)| of.destination.ip == Some(last(thread)));
            assert!(there, "the last one of thread {thread}");
        }
    }

    /// The label sets are bounded; what has no room is counted as unknown, by side.
    #[test]
    fn label_sets_beyond_the_bound_are_counted_together() {
        let registry = Registry::new(Names::default(), 1);
        let shard = registry.shard();
        for port in 0..100 {
            let mut facts = Facts::clone(&facts(Direction::Inbound, port));
            facts.service = Some(ObjectRef::new("default", &format!("s{port}")));
            drop(shard.open(Arc::new(facts), Arc::default()));
        }
        let traffic = registry.traffic();
        let opened: Vec<u64> = traffic.sets.iter().map(|(_, count)| count.opened).collect();
        assert_eq!(opened.iter().sum::<u64>(), 100);
        assert_eq!(opened.len(), 2, "{traffic:?}");
        assert_eq!(traffic.overflowed, 99);
        // Workers forget what they do not use, and its room is used again.
        for _ in 0..=FORGET {
            drop(registry.traffic());
        }
        assert!(lock(&shard.shared.state).kinds.is_empty());
    }

    /// What a connection costs its worker here: entered, admitted, taken out. A microsecond when optimised; the bound
    /// is for builds that are not, on machines that do much else.
    #[test]
    fn a_connection_costs_its_worker_little() {
        const CONNECTIONS: u32 = 20_000;
        let shard = Registry::default().shard();
        let facts = facts(Direction::Outbound, 1);
        let begun = Instant::now();
        for _ in 0..CONNECTIONS {
            let open = shard.open(Arc::new(Facts::clone(&facts)), Arc::default());
            open.admitted("no-allow-policies");
            open.close(Flag::None);
        }
        let each = begun.elapsed() / CONNECTIONS;
        eprintln!("{each:?} for each connection");
        assert!(each < std::time::Duration::from_micros(200), "{each:?}");
    }

    #[tokio::test]
    async fn who_asks_waits_for_the_kernels_part() {
        let registry = Registry::default();
        let (control, mut questions) = mpsc::channel(1);
        let connections = Connections::new(registry.clone(), control);
        let control = async {
            let Some(Question::Connections(done)) = questions.recv().await else { panic!("somebody asks") };
            let open = registry.shard().open(facts(Direction::Inbound, 9), Arc::default());
            done.send(()).expect("who asks waits");
            open
        };
        let (list, _open) = tokio::join!(connections.list(), control);
        assert_eq!(list.expect("answered").len(), 1);
        drop(questions);
        assert!(connections.list().await.is_err());
    }
}
