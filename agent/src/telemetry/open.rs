//! Every open connection of the node's pods: tunnelled, carried in plaintext by the agent, or passed by the kernel.
//!
//! Who carries a connection enters it here and takes it out at its end. Each worker enters into a [`Shard`] of its own,
//! whose lock only a listing ever contends for, and a listing holds it for [`CHUNK`] connections at a time. What the
//! kernel passed nobody carries: `crate::connections` looks for it when somebody asks ([`Connections::list`]).

use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{SystemTime, UNIX_EPOCH},
};

use anyhow::Context as _;
use serde::Serialize;
use tokio::sync::{mpsc, oneshot};

use super::access::Direction;
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

/// All shards. Clones are the same.
#[derive(Clone, Debug, Default)]
pub struct Registry {
    shards: Arc<Mutex<Vec<Arc<Shared>>>>,
}

/// Where one thread enters its connections. Cheap to clone; all clones are the same.
#[derive(Clone, Debug)]
pub struct Shard {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    number: u64,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    slots: Vec<Option<Slot>>,
    free: Vec<u32>,
    opened: u64,
}

#[derive(Clone, Debug)]
struct Slot {
    id: u64,
    opened_at_ms: Option<u64>,
    facts: Arc<Facts>,
    counters: Arc<Counters>,
    policy: &'static str,
}

/// A connection's place in the registry, until dropped.
#[derive(Debug)]
pub struct Open {
    shared: Arc<Shared>,
    slot: u32,
}

impl Registry {
    /// A shard for a thread that is about to carry connections.
    pub fn shard(&self) -> Shard {
        let mut shards = lock(&self.shards);
        let shared = Arc::new(Shared { number: shards.len() as u64, state: Mutex::default() });
        shards.push(shared.clone());
        Shard { shared }
    }

    /// Every connection that is entered, oldest first by shard. One that is opened or closed meanwhile may or may not be
    /// there; one that stays open throughout is, once.
    pub fn list(&self) -> Vec<Record> {
        let mut records = Vec::new();
        self.visit(|slot| records.push(record(&slot)));
        records.sort_unstable_by_key(|record| (record.opened_at_ms, record.id));
        records
    }

    /// How many are entered, by direction: (outbound, inbound).
    pub fn count(&self) -> (usize, usize) {
        let (mut outbound, mut inbound) = (0, 0);
        self.visit(|slot| match slot.facts.direction {
            Direction::Outbound => outbound += 1,
            Direction::Inbound => inbound += 1,
        });
        (outbound, inbound)
    }

    fn visit(&self, mut see: impl FnMut(Slot)) {
        let shards = lock(&self.shards).clone();
        let mut copied = Vec::with_capacity(CHUNK);
        for shard in shards {
            let mut from = 0;
            loop {
                {
                    let state = lock(&shard.state);
                    let Some(rest) = state.slots.get(from..).filter(|rest| !rest.is_empty()) else { break };
                    copied.extend(rest.iter().take(CHUNK).flatten().cloned());
                }
                from += CHUNK;
                // Outside the lock, and dropped there too: what this clone holds may be the last of its kind.
                copied.drain(..).for_each(&mut see);
            }
        }
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
        let mut state = lock(&self.shared.state);
        state.opened += 1;
        let slot = Slot {
            // 256 shards are more than the 64 workers there can be.
            id: state.opened << 8 | self.shared.number,
            opened_at_ms,
            facts,
            counters,
            policy: "",
        };
        let place = match state.free.pop() {
            Some(place) => {
                state.slots[place as usize] = Some(slot);
                place
            }
            None => {
                state.slots.push(Some(slot));
                (state.slots.len() - 1) as u32
            }
        };
        Open { shared: self.shared.clone(), slot: place }
    }
}

impl Open {
    /// Notes the word of the verdict that admitted it.
    pub fn admitted(&self, policy: &'static str) {
        if let Some(Some(slot)) = lock(&self.shared.state).slots.get_mut(self.slot as usize) {
            slot.policy = policy;
        }
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        let taken = {
            let mut state = lock(&self.shared.state);
            state.free.push(self.slot);
            state.slots.get_mut(self.slot as usize).and_then(Option::take)
        };
        // Outside the lock.
        drop(taken);
    }
}

/// Every open connection, for whoever asks: what is entered in the registry, after what the kernel passed was looked at
/// again. Cheap to clone; works from every task.
#[derive(Clone, Debug)]
pub struct Connections {
    registry: Registry,
    refresh: mpsc::Sender<Refresh>,
}

/// A request to look at the kernel's connections again; answered when that is done.
pub type Refresh = oneshot::Sender<()>;

impl Connections {
    /// The handle, and the requests that the thread that controls answers.
    pub fn new(registry: Registry) -> (Self, mpsc::Receiver<Refresh>) {
        let (refresh, requests) = mpsc::channel(8);
        (Self { registry, refresh }, requests)
    }

    /// Lists them.
    ///
    /// # Errors
    /// The agent is ending.
    pub async fn list(&self) -> anyhow::Result<Vec<Record>> {
        self.refresh().await?;
        Ok(self.registry.list())
    }

    /// Has the kernel's connections looked at again.
    ///
    /// # Errors
    /// The agent is ending.
    pub async fn refresh(&self) -> anyhow::Result<()> {
        let (done, looked) = oneshot::channel();
        self.refresh.send(done).await.ok().context("the agent is ending")?;
        looked.await.context("the agent is ending")
    }
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
        assert_eq!(registry.count(), (1, 1));
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

    #[tokio::test]
    async fn who_asks_waits_for_the_kernels_part() {
        let registry = Registry::default();
        let (connections, mut requests) = Connections::new(registry.clone());
        let control = async {
            let done: Refresh = requests.recv().await.expect("somebody asks");
            let open = registry.shard().open(facts(Direction::Inbound, 9), Arc::default());
            done.send(()).expect("who asks waits");
            open
        };
        let (list, _open) = tokio::join!(connections.list(), control);
        assert_eq!(list.expect("answered").len(), 1);
        drop(requests);
        assert!(connections.list().await.is_err());
    }
}
