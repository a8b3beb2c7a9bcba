//! Open connections that no worker carries: those that the kernel passed, and those that are older than enrolment.
//!
//! They are told in the access log when they end, judged again when policy changes ([D.1], [E.5]), and closed by
//! SOCK_DESTROY where they are no longer allowed. The kernel's refusals are told here too.
//!
//! Which of them are open is in their sockets, and read when somebody asks ([`Passed::refresh`]). The kernel reports the
//! end of what it passed; of those that are older than enrolment it knows nothing, so their pods are looked at again
//! from time to time ([`Passed::watch`]).

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fmt,
    net::{IpAddr, SocketAddr},
    os::fd::{AsFd, OwnedFd},
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::Context as _;
use culvert_common::{
    Addr, Answer, Direction, Event, EventKind, PORT_HBONE, Reason, SocketKind, SocketValue, Verdict, VerdictKey,
};
use tracing::{debug, info, warn};

use crate::{
    datapath::{Events, NetnsCookie, Older, monotonic_ns},
    model::ObjectRef,
    netns::{
        NetnsHandle,
        sock_diag::{Query, SockDiag, Socket, SocketId, States},
    },
    policy::{self, Client, Connection, Occupant, RuleId, Snapshot, Workload},
    proxy::ServedPod,
    telemetry::{
        access::{self, Access, AccessLog, End},
        history::{self, Circumstances, Party, Plaintext, Refusal, Rule},
        limit::Limiter,
        metrics,
        open::{Carried, Counters, Facts, Open, Proof, Shard},
        panics,
        traffic::{Flag, Names, UNKNOWN},
    },
};

mod account;
mod proof;

/// How long the reason of a close is kept for the end that the kernel reports.
const KEEP_REASON: Duration = Duration::from_secs(10);
/// How often pods with connections that are older than enrolment are looked at.
const WATCH: Duration = Duration::from_secs(2);
/// How long the kernel's report of an end is waited for once the socket is gone; it is lost when the buffer was full.
const REPORT_PATIENCE: Duration = Duration::from_secs(2);
/// `TCP_SYN_RECV` of net/tcp_states.h.
const SYN_RECV: u8 = 3;

/// The connections of this node's pods that the kernel passed.
pub struct Passed {
    events: Events,
    storage: OwnedFd,
    access: AccessLog,
    names: Names,
    closed_by_us: HashMap<(SocketAddr, SocketAddr), (Instant, Forbidden)>,
    open: Shard,
    tracked: Flows,
    watched: Instant,
    limiter: Limiter,
    older: Older,
    /// Sockets that nothing accounts for, and that were told.
    strays: BTreeSet<u64>,
    /// What was told of that the kernel has counted.
    account: account::Account,
}

/// Why a connection was closed.
struct Forbidden {
    reason: &'static str,
    /// In words, with the object that decided.
    detail: String,
    /// That object.
    policy: Option<Rule>,
}

/// The pod's namespace, the client and the server: between two pods of one node a connection is told by both.
type Flow = (NetnsCookie, SocketAddr, SocketAddr);

/// Open connections that have been seen. By pod, since each is looked at by itself.
#[derive(Default)]
struct Flows(HashMap<NetnsCookie, HashMap<(SocketAddr, SocketAddr), Tracked>>);

impl Flows {
    fn get(&self, (pod, src, dst): &Flow) -> Option<&Tracked> {
        self.0.get(pod)?.get(&(*src, *dst))
    }

    fn insert(&mut self, (pod, src, dst): Flow, tracked: Tracked) {
        self.0.entry(pod).or_default().insert((src, dst), tracked);
    }

    fn remove(&mut self, (pod, src, dst): &Flow) -> Option<Tracked> {
        let of_pod = self.0.get_mut(pod)?;
        let tracked = of_pod.remove(&(*src, *dst));
        if of_pod.is_empty() {
            self.0.remove(pod);
        }
        tracked
    }

    fn of_pod(&mut self, pod: NetnsCookie) -> impl Iterator<Item = &mut Tracked> {
        self.0.get_mut(&pod).into_iter().flat_map(HashMap::values_mut)
    }

    fn iter(&self) -> impl Iterator<Item = (Flow, &Tracked)> {
        self.0.iter().flat_map(|(pod, all)| all.iter().map(|((src, dst), tracked)| ((*pod, *src, *dst), tracked)))
    }

    fn retain(&mut self, mut keep: impl FnMut(NetnsCookie, &mut Tracked) -> bool) {
        self.0.retain(|pod, all| {
            all.retain(|_, tracked| keep(*pod, tracked));
            !all.is_empty()
        });
    }
}

/// A pod that is not in the mesh, or not yet.
#[derive(Clone, Debug, Default)]
pub struct Stranger {
    /// What it is, if the snapshot knows it.
    pub workload: Option<Arc<Workload>>,
    /// The addresses of its network namespace.
    pub ips: Vec<IpAddr>,
}

/// What is to be known of a pod whose open connections are judged.
#[derive(Clone, Copy, Debug, Default)]
pub struct Occasion {
    /// It has just been brought in.
    pub entered: bool,
    /// The agent gives verdicts on its plaintext: the kernel cannot judge a handshake again at its end.
    pub by_agent: bool,
}

/// An open connection that has been seen.
struct Tracked {
    /// Cookie of its socket, which no other ever has.
    socket: u64,
    facts: Arc<Facts>,
    counters: Arc<Counters>,
    open: Open,
    opened_ns: u64,
    reason: u8,
    /// Its socket is gone, and nobody has told of its end yet.
    gone: Option<Instant>,
}

impl Passed {
    /// `storage` is the map of socket storage; `older` knows what is older than the mesh; `open` is where open connections
    /// are entered; `limiter` bounds the lines that a pod can cause.
    pub fn new(
        events: Events,
        storage: OwnedFd,
        older: Older,
        access: AccessLog,
        open: Shard,
        names: Names,
        limiter: Limiter,
    ) -> Self {
        Self {
            events,
            storage,
            access,
            names,
            closed_by_us: HashMap::new(),
            open,
            tracked: Flows::default(),
            watched: Instant::now(),
            limiter,
            older,
            strays: BTreeSet::new(),
            account: account::Account::default(),
        }
    }

    /// Looks at every established socket of these pods and tells those that nothing accounts for, each once. Call it only
    /// for pods whose open connections have been judged since they were brought in.
    pub fn prove<'a>(&mut self, snapshot: &Snapshot, pods: impl Iterator<Item = &'a Arc<ServedPod>>) -> Proof {
        let mut look = proof::Look::new(self.storage.as_fd(), &self.older);
        for pod in pods {
            let Some(own) = snapshot.workload(&pod.uid) else { continue };
            look.at(pod, (&own.object.namespace, &own.object.name));
        }
        let (mut proof, refused) = look.finish();
        for proof::Refused { pod, sockets } in refused {
            if let Err(error) = self.end_refused(snapshot, pod, &sockets) {
                let name = snapshot.workload(&pod.uid).map_or_else(String::new, |own| own.object.to_string());
                proof.failures.push(format!("{name}: {error:#}"));
            }
        }
        let now: BTreeSet<u64> = proof.strays.iter().map(|stray| stray.socket).collect();
        for stray in proof.strays.iter().filter(|stray| !self.strays.contains(&stray.socket)) {
            let own = snapshot.workload_by_ip(stray.local.ip());
            let own = own.and_then(|own| if let Occupant::One(own) = own { Some(&**own) } else { None });
            if self.limiter.admits(own, "not-captured", Instant::now()) {
                warn!(
                    namespace = stray.namespace,
                    pod = stray.pod,
                    local = %stray.local,
                    remote = %stray.remote,
                    pid = stray.pid,
                    process = stray.process,
                    "an open connection of this pod is not the mesh's"
                );
            }
        }
        self.strays = now;
        proof
    }

    /// How many sockets the last proof found that nothing accounts for.
    pub fn strays(&self) -> usize {
        self.strays.len()
    }

    /// The ring buffer, which becomes readable when something must be done at once.
    pub fn wakes(&self) -> &impl AsFd {
        &self.events
    }

    /// Tells what the kernel has reported, and ends what a policy has overtaken. `pods` finds a pod of the mesh by its
    /// namespace, `stranger` any other. Gives the pods of which something could not be ended: their open connections are to be
    /// judged again.
    #[must_use = "what could not be ended is open"]
    pub fn tell<'a>(
        &mut self,
        snapshot: &Snapshot,
        pods: impl Fn(NetnsCookie) -> Option<&'a Arc<ServedPod>>,
        stranger: impl Fn(NetnsCookie) -> Option<Stranger>,
    ) -> BTreeSet<NetnsCookie> {
        let mut strangers = HashMap::new();
        let mut stranger =
            |cookie| strangers.entry(cookie).or_insert_with(|| stranger(cookie)).clone().unwrap_or_default();
        let now = Instant::now();
        self.limiter.tell(now);
        self.closed_by_us.retain(|_, (at, _)| now.duration_since(*at) < KEEP_REASON);
        let mut overtaken: BTreeMap<NetnsCookie, (&ServedPod, Vec<Event>)> = BTreeMap::new();
        while let Some(event) = self.events.next() {
            let pod = pods(NetnsCookie(event.netns_cookie));
            if event.kind == EventKind::Overtaken as u8
                && let Some(pod) = pod
            {
                overtaken.entry(pod.cookie).or_insert_with(|| (pod, Vec::new())).1.push(event);
            }
            // One thread does this for all pods, and gives the sign of life.
            panics::caught(|| self.reported(snapshot, event, pod, &mut stranger));
        }
        let mut again = BTreeSet::new();
        for (pod, events) in overtaken.into_values() {
            let mut done = false;
            panics::caught(|| match self.overtaken(snapshot, pod, &events) {
                Ok(()) => done = true,
                Err(error) => {
                    let own = snapshot.workload(&pod.uid).map(Arc::as_ref);
                    if self.limiter.admits(own, "not-closed", Instant::now()) {
                        warn!(
                            error = format!("{error:#}"),
                            "could not close a connection that policy forbids; trying on"
                        );
                    }
                }
            });
            if !done {
                again.insert(pod.cookie);
            }
        }
        again
    }

    /// Tells what the kernel has reported while no agent was there, as if it were now. It says which rules decided by the
    /// numbers that an earlier agent gave them, which nobody knows any more; and what it has counted is not in this agent's
    /// counters.
    pub fn tell_left_behind<'a>(
        &mut self,
        snapshot: &Snapshot,
        events: Vec<Event>,
        pods: impl Fn(NetnsCookie) -> Option<&'a Arc<ServedPod>>,
        stranger: impl Fn(NetnsCookie) -> Option<Stranger>,
    ) {
        let mut strangers = HashMap::new();
        let mut stranger =
            |cookie| strangers.entry(cookie).or_insert_with(|| stranger(cookie)).clone().unwrap_or_default();
        for event in events.into_iter().map(|event| Event { rule: 0, ..event }) {
            if event.kind == EventKind::Closed as u8 {
                self.ended(snapshot, &event);
            } else if event.kind == EventKind::Refused as u8 {
                self.refused(snapshot, event, pods(NetnsCookie(event.netns_cookie)), &mut stranger);
            }
            // What was overtaken is among the pod's open connections, which are judged as it is brought in.
        }
    }

    fn reported(
        &mut self,
        snapshot: &Snapshot,
        event: Event,
        pod: Option<&Arc<ServedPod>>,
        stranger: &mut impl FnMut(NetnsCookie) -> Stranger,
    ) {
        let flow = (NetnsCookie(event.netns_cookie), src(&event), dst(&event));
        if event.kind == EventKind::Closed as u8 {
            if self.tracked.get(&flow).is_none() {
                let facts = self.facts(snapshot, direction(&event), flow, Carried::Kernel);
                self.plaintext(&facts, flow.0, event.reason);
            }
            return self.ended(snapshot, &event);
        }
        self.account.told(&event);
        if event.kind == EventKind::Overtaken as u8 {
            if account::passed(event.reason) {
                // There was no room for a note on the socket: no record will tell of its end.
                self.account.seen(flow.0);
            }
            return;
        }
        self.refused(snapshot, event, pod, stranger);
    }

    /// Looks at the kernel's connections of these pods: which are open, and how many bytes they have carried. What has
    /// ended without a report is told.
    pub fn refresh<'a>(&mut self, snapshot: &Snapshot, pods: impl Iterator<Item = &'a Arc<ServedPod>>) {
        for pod in pods {
            if let Err(error) = self.look(snapshot, pod) {
                // What was known of the pod stays; a namespace that is just going away is no news.
                debug!(uid = %pod.uid, error = format!("{error:#}"), "the pod's sockets could not be listed");
            }
        }
        self.lost(snapshot);
    }

    /// Once in a while: looks at the pods that have connections which the kernel will not report.
    pub fn watch<'a>(&mut self, snapshot: &Snapshot, pods: impl Fn(NetnsCookie) -> Option<&'a Arc<ServedPod>>) {
        if self.watched.elapsed() < WATCH {
            return;
        }
        self.watched = Instant::now();
        // When a pod leaves, what is older than its enrolment is told, and the rest is told by the kernel at its end.
        self.tracked.retain(|netns, tracked| {
            let left = pods(netns).is_none();
            if left && tracked.unreported() {
                tracked.gone.get_or_insert_with(Instant::now);
            }
            !left || tracked.unreported()
        });
        let unreported = self.tracked.iter().filter(|(_, tracked)| tracked.unreported() || tracked.gone.is_some());
        let namespaces: BTreeSet<NetnsCookie> = unreported.map(|((netns, ..), _)| netns).collect();
        self.refresh(snapshot, namespaces.into_iter().filter_map(pods));
    }

    fn look(&mut self, snapshot: &Snapshot, pod: &ServedPod) -> anyhow::Result<()> {
        let mut diag = SockDiag::open(&pod.netns)?;
        let query = Query { states: States::OPEN, bytes: true, storage: Some(self.storage.as_fd()) };
        let list = diag.list(&query)?;
        let sockets: HashMap<u64, &Socket> = list.iter().map(|socket| (socket.id.cookie, socket)).collect();
        for tracked in self.tracked.of_pod(pod.cookie) {
            match sockets.get(&tracked.socket) {
                Some(socket) => tracked.count(socket),
                None => {
                    tracked.gone.get_or_insert_with(Instant::now);
                }
            }
        }
        let mut refused = Vec::new();
        for socket in &list {
            let Some(value) = value(socket).filter(|value| value.kind == SocketKind::Passed as u8) else { continue };
            if !account::passed(value.reason) {
                refused.push((socket.id, value));
            }
            let flow = (pod.cookie, socket.id.remote, socket.id.local);
            if self.tracked.get(&flow).is_some_and(|tracked| tracked.socket == socket.id.cookie) {
                continue;
            }
            let facts = self.facts(snapshot, access::Direction::Inbound, flow, Carried::Kernel);
            self.track(socket, flow, facts, Some(value));
        }
        self.end_refused(snapshot, pod, &refused)
    }

    /// Ends connections that were refused when they were established, as their sockets say, and that are open all the same:
    /// the kernel's word of it was lost, or ending them failed.
    fn end_refused(
        &mut self,
        snapshot: &Snapshot,
        pod: &ServedPod,
        sockets: &[(SocketId, SocketValue)],
    ) -> anyhow::Result<()> {
        if sockets.is_empty() {
            return Ok(());
        }
        let mut diag = SockDiag::open(&pod.netns)?;
        let own = snapshot.workload(&pod.uid).map(Arc::as_ref);
        let mut result = Ok(());
        for (id, value) in sockets {
            let reason = Reason::from_u8(value.reason).unwrap_or(Reason::KernelCapacity);
            let verdict = Verdict { answer: Answer::Refuse, reason, rule: value.rule, generation: value.generation };
            let (reason, detail) = (reason.as_str(), snapshot.explain(&verdict));
            let policy = snapshot.rule(RuleId(value.rule)).map(Into::into);
            result = result.and(self.close(own, &mut diag, id, Forbidden { reason, detail, policy }).map(drop));
        }
        result
    }

    fn track(&mut self, socket: &Socket, flow: Flow, facts: Facts, value: Option<SocketValue>) {
        match (value, facts.carried, facts.direction) {
            (Some(value), _, _) => self.plaintext(&facts, flow.0, value.reason),
            // Nobody has counted it.
            (None, Carried::PreEnrolment, access::Direction::Inbound) => {
                if let Some((plaintext, ip)) = Plaintext::of(&facts) {
                    self.open.note_plaintext(plaintext, ip);
                }
            }
            (None, _, _) => {}
        }
        let (facts, counters) = (Arc::new(facts), Arc::<Counters>::default());
        let opened_ns = value.map_or(0, |value| value.at_ns);
        let reason = value.map_or(Reason::NoAllowPolicies as u8, |value| value.reason);
        let open = self.open.open_since(unix_ms(opened_ns), facts.clone(), counters.clone());
        if value.is_some() {
            open.admitted(Reason::from_u8(reason).map_or("unknown", Reason::as_str));
        }
        let tracked = Tracked { socket: socket.id.cookie, facts, counters, open, opened_ns, reason, gone: None };
        tracked.count(socket);
        self.tracked.insert(flow, tracked);
    }

    /// Tells the ends that the kernel has not told: it never does of what is older than enrolment, and of others only if
    /// there was room.
    fn lost(&mut self, snapshot: &Snapshot) {
        let ended: Vec<Flow> = self
            .tracked
            .iter()
            .filter(|(_, tracked)| {
                tracked.gone.is_some_and(|gone| tracked.unreported() || gone.elapsed() >= REPORT_PATIENCE)
            })
            .map(|(flow, _)| flow)
            .collect();
        for flow in ended {
            let Some(tracked) = self.tracked.get(&flow) else { continue };
            let (received_bytes, sent_bytes) = tracked.counters.read(tracked.facts.direction);
            let event = Event {
                src: flow.1.ip().into(),
                dst: flow.2.ip().into(),
                netns_cookie: flow.0.0,
                at_ns: monotonic_ns(),
                opened_ns: tracked.opened_ns,
                received_bytes,
                sent_bytes,
                sport: flow.1.port(),
                dport: flow.2.port(),
                kind: EventKind::Closed as u8,
                direction: match tracked.facts.direction {
                    access::Direction::Outbound => Direction::Outbound,
                    access::Direction::Inbound => Direction::Inbound,
                } as u8,
                reason: tracked.reason,
                ..Event::default()
            };
            panics::caught(|| self.ended(snapshot, &event));
        }
    }

    fn facts(&self, snapshot: &Snapshot, direction: access::Direction, (_, src, dst): Flow, carried: Carried) -> Facts {
        let workload = |addr: SocketAddr| match snapshot.workload_by_ip(addr.ip()) {
            Some(Occupant::One(workload)) => Some(workload.clone()),
            Some(Occupant::Ambiguous) | None => None,
        };
        Facts { src_workload: workload(src), dst_workload: workload(dst), carried, ..Facts::new(direction, src, dst) }
    }

    /// Judges a pod's open plaintext connections by `snapshot` and closes those that are no longer allowed, and only
    /// those; also the ones that are older than enrolment, which are noted when a pod has been brought in.
    ///
    /// Call it after the kernel has the policy: a handshake that the kernel completes later is judged by the new one
    /// there, and one that it is completing has a socket that is listed here.
    ///
    /// # Errors
    /// The sockets could not be listed, or one could not be closed: to be called again.
    pub fn judge_again(
        &mut self,
        snapshot: &Snapshot,
        pod: &ServedPod,
        own: &Workload,
        occasion: Occasion,
    ) -> anyhow::Result<()> {
        let mut diag = SockDiag::open(&pod.netns).context("list the pod's sockets")?;
        let query = |states| Query { states, bytes: true, storage: Some(self.storage.as_fd()) };
        let open = diag.list(&query(States::OPEN.and(States::SYN_RECV))).context("list the pod's sockets")?;
        let listening = diag.list(&query(States::LISTEN)).context("list the pod's listeners")?;
        let served: BTreeSet<u16> = listening.iter().map(|socket| socket.id.local.port()).collect();
        if occasion.entered && !self.older.knows(pod.cookie) {
            let there = proof::older(&mut diag, &open)?;
            if let Err(error) = self.older.note(pod.cookie, there.into_iter()) {
                let error = format!("{error:#}");
                warn!(pod = %own.object, error, "not every connection that is older than enrolment is noted as such");
            }
        }
        let mut result = Ok(());
        for socket in &open {
            let (local, remote) = (socket.id.local, socket.id.remote);
            if occasion.entered
                && socket.state != SYN_RECV
                && socket.storage.is_none()
                && socket.cgroup.is_some()
                && self.older.has(pod.cookie, socket.id.cookie)
            {
                self.older(snapshot, pod, own, socket, &served);
            }
            // Without a note: older than enrolment, or caught in the handshake before the kernel could note it.
            let noted = match kind(socket) {
                Some(kind) if kind == SocketKind::Passed as u8 => true,
                None if (socket.cgroup.is_some() || occasion.by_agent && socket.state == SYN_RECV)
                    && arrived(pod, local, remote, &served) =>
                {
                    false
                }
                _ => continue,
            };
            let connection = Connection {
                server: own.server(),
                client: Client::Plain,
                source_ip: Some(remote.ip()),
                destination_ip: Some(local.ip()),
                port: local.port(),
            };
            let verdict = policy::decide(snapshot, &connection);
            if verdict.allowed {
                continue;
            }
            let why = Forbidden {
                reason: verdict.reason.as_str(),
                detail: verdict.to_string(),
                policy: verdict.decided_by.as_ref().map(Into::into),
            };
            match self.close(Some(own), &mut diag, &socket.id, why) {
                // The kernel reports the end of what it has noted; of others this is all that will be known.
                Ok(true) if !noted && socket.state != SYN_RECV => {
                    self.ended(snapshot, &last_seen(pod, socket, &verdict))
                }
                Ok(_) => {}
                Err(error) => result = result.and(Err(error)),
            }
        }
        result
    }

    /// Notes a connection that is older than the pod's enrolment.
    fn older(&mut self, snapshot: &Snapshot, pod: &ServedPod, own: &Workload, socket: &Socket, served: &BTreeSet<u16>) {
        let (local, remote) = (socket.id.local, socket.id.remote);
        let (direction, flow) = if arrived(pod, local, remote, served) {
            (access::Direction::Inbound, (pod.cookie, remote, local))
        } else if left(pod, local, remote, served) {
            (access::Direction::Outbound, (pod.cookie, local, remote))
        } else {
            return;
        };
        if self.tracked.get(&flow).is_none() {
            if self.limiter.admits(Some(own), "pre-enrolment", Instant::now()) {
                info!(pod = %own.object, src = %flow.1, dst = %flow.2, "pre-enrolment connection");
            }
            let facts = self.facts(snapshot, direction, flow, Carried::PreEnrolment);
            self.track(socket, flow, facts, None);
        }
    }

    /// False if it had ended by itself.
    fn close(
        &mut self,
        own: Option<&Workload>,
        diag: &mut SockDiag,
        id: &SocketId,
        why: Forbidden,
    ) -> anyhow::Result<bool> {
        let was_open =
            diag.destroy(id).with_context(|| format!("close {} → {}, which policy forbids", id.remote, id.local))?;
        if was_open {
            if self.limiter.admits(own, "closed-by-policy", Instant::now()) {
                info!(src = %id.remote, dst = %id.local, reason = why.reason, detail = why.detail,
                    "closed an open connection that policy no longer allows");
            }
            self.closed_by_us.insert((id.remote, id.local), (Instant::now(), why));
        }
        Ok(was_open)
    }

    fn overtaken(&mut self, snapshot: &Snapshot, pod: &ServedPod, events: &[Event]) -> anyhow::Result<()> {
        let mut diag = SockDiag::open(&pod.netns)?;
        // The kernel tells addresses; by now they may be nobody's, or another connection's that is to be ended too.
        let list = diag.list(&Query { states: States::CONNECTIONS, bytes: false, storage: None })?;
        let sockets: HashMap<_, _> =
            list.iter().map(|socket| ((socket.id.remote, socket.id.local), &socket.id)).collect();
        let mut result = Ok(());
        for event in events {
            let Some(id) = sockets.get(&(src(event), dst(event))) else { continue };
            let reason = Reason::from_u8(event.reason).unwrap_or(Reason::KernelCapacity);
            let verdict = Verdict { answer: Answer::Refuse, reason, rule: event.rule, generation: event.generation };
            let (reason, detail) = (reason.as_str(), snapshot.explain(&verdict));
            let why = Forbidden { reason, detail, policy: decided_by(snapshot, event) };
            let closed = self.close(snapshot.workload(&pod.uid).map(Arc::as_ref), &mut diag, id, why);
            result = result.and(closed.map(drop));
        }
        result
    }

    fn ended(&mut self, snapshot: &Snapshot, event: &Event) {
        let flow = (NetnsCookie(event.netns_cookie), src(event), dst(event));
        let (open, counters) = match self.tracked.remove(&flow) {
            Some(Tracked { open, counters, .. }) => (open, counters),
            None => {
                let facts = Arc::new(self.facts(snapshot, direction(event), flow, Carried::Kernel));
                let counters = Arc::<Counters>::default();
                (self.open.open_since(unix_ms(event.opened_ns), facts, counters.clone()), counters)
            }
        };
        let (sent, received) = by_side(event);
        counters.forward.fetch_max(sent, Ordering::Relaxed);
        counters.backward.fetch_max(received, Ordering::Relaxed);
        let ours = self.closed_by_us.remove(&(src(event), dst(event)));
        let (reason, detail, policy) = match &ours {
            Some((_, why)) => (why.reason, Some(&why.detail as &dyn fmt::Display), why.policy.clone()),
            None => (word(event), None, allowed_by(snapshot, event)),
        };
        if let Some((_, why)) = &ours {
            let facts = self.facts(snapshot, direction(event), flow, Carried::Kernel);
            let refusal = Refusal::of(&facts, reason, why.policy.clone());
            self.open.note_refusal(refusal, 1, Circumstances::new(&why.detail));
        }
        open.close(if ours.is_some() { Flag::Deny } else { Flag::None });
        self.line(snapshot, event, access::Event::Complete, reason, policy.as_ref(), detail);
    }

    /// A connection that the kernel refused was opened, and has failed.
    fn count_refused(&self, event: &Event, facts: Facts) {
        let flag = match Reason::from_u8(event.reason) {
            Some(
                Reason::StrictRequiresMtls
                | Reason::PolicyMissing
                | Reason::Loop
                | Reason::NoAllowMatch
                | Reason::ExplicitDeny,
            ) => Flag::Deny,
            // Not policy: the mesh could not take it.
            _ => Flag::Connect,
        };
        self.open.open(Arc::new(facts), Arc::default()).close(flag);
    }

    /// The pod is known by its namespace, also where its address is not.
    fn refused(
        &mut self,
        snapshot: &Snapshot,
        mut event: Event,
        pod: Option<&Arc<ServedPod>>,
        stranger: &mut impl FnMut(NetnsCookie) -> Stranger,
    ) {
        let nameless = direction(&event) == access::Direction::Outbound && event.src.is_unspecified();
        let of = match pod {
            Some(pod) => Stranger { workload: snapshot.workload(&pod.uid).cloned(), ips: pod.ips.clone() },
            None if nameless => stranger(NetnsCookie(event.netns_cookie)),
            None => Stranger::default(),
        };
        let own = of.workload;
        let same_family = |ip: &&IpAddr| Addr::from(**ip).is_v4() == event.dst.is_v4();
        if nameless && let Some(ip) = of.ips.iter().find(same_family) {
            event.src = (*ip).into();
        }
        let flow = (NetnsCookie(event.netns_cookie), src(&event), dst(&event));
        let mut facts = self.facts(snapshot, direction(&event), flow, Carried::Kernel);
        match facts.direction {
            access::Direction::Outbound if facts.src_workload.is_none() => facts.src_workload = own,
            access::Direction::Inbound if facts.dst_workload.is_none() => facts.dst_workload = own,
            access::Direction::Outbound | access::Direction::Inbound => {}
        }
        let event = &event;
        let detail = match Reason::from_u8(event.reason) {
            Some(reason) => snapshot.explain(&Verdict {
                answer: Answer::Refuse,
                reason,
                rule: event.rule,
                generation: event.generation,
            }),
            None => "refused".to_owned(),
        };
        let rule = decided_by(snapshot, event);
        self.open.note_refusal(Refusal::of(&facts, word(event), rule.clone()), 1, Circumstances::new(&detail));
        self.count_refused(event, facts);
        self.line(snapshot, event, access::Event::Failed, word(event), rule.as_ref(), Some(&detail));
    }

    /// A connection that the kernel passed is seen for the first time.
    fn plaintext(&mut self, facts: &Facts, pod: NetnsCookie, reason: u8) {
        if !account::passed(reason) {
            // It was refused when it was established, and is not let in: `closed_by_us` tells it.
            return;
        }
        self.account.seen(pod);
        if let Some((plaintext, ip)) = Plaintext::of(facts) {
            self.open.note_plaintext(plaintext, ip);
        }
    }

    /// Compares what the kernel has counted with what was told of. Refusals that nobody told of are noted as what they
    /// are: some connection of the pod's. `counted` was read before the last [`Passed::tell`].
    ///
    /// One of them may be a connection that policy has overtaken, and that is open: gives the pods whose open connections are
    /// to be judged again.
    #[must_use = "a connection that policy forbids may be open"]
    pub fn account<'a>(
        &mut self,
        snapshot: &Snapshot,
        counted: &[(VerdictKey, u64)],
        pods: impl Fn(NetnsCookie) -> Option<&'a Arc<ServedPod>>,
    ) -> BTreeSet<NetnsCookie> {
        let mut again = BTreeSet::new();
        self.account.forget(|pod| pods(pod).is_none());
        for (key, times) in self.account.untold(counted) {
            let own = pods(NetnsCookie(key.netns_cookie)).and_then(|pod| snapshot.workload(&pod.uid));
            let own =
                Party { ip: own.and_then(|own| own.ips.first().copied()), pod: own.map(|own| own.object.clone()) };
            let inbound = key.direction == Direction::Inbound as u8;
            if inbound {
                again.insert(NetnsCookie(key.netns_cookie));
            }
            let (source, destination) = if inbound { (Party::default(), own) } else { (own, Party::default()) };
            let refusal = Refusal {
                direction: if inbound { access::Direction::Inbound } else { access::Direction::Outbound },
                source,
                destination,
                port: 0,
                reason: Reason::from_u8(key.reason).map_or(UNKNOWN, Reason::as_str),
                rule: snapshot.rule(RuleId(key.rule)).map(Into::into),
            };
            let detail = Circumstances::new("counted by the kernel without a record of the other end");
            self.open.note_refusal(refusal, times, detail);
        }
        again
    }

    /// Connections in plaintext that the kernel has counted and that nobody has seen, by the server's workload.
    /// `counted` was read before the last [`Passed::tell`] and [`Passed::refresh`].
    pub fn unseen<'a>(
        &mut self,
        snapshot: &Snapshot,
        counted: &[(VerdictKey, u64)],
        pods: impl Fn(NetnsCookie) -> Option<&'a Arc<ServedPod>>,
    ) -> Vec<(ObjectRef, u64)> {
        let workload = |cookie| Some(history::workload(snapshot.workload(&pods(cookie)?.uid)?));
        self.account.unseen(counted, workload)
    }

    fn line(
        &mut self,
        snapshot: &Snapshot,
        event: &Event,
        kind: access::Event,
        reason: &'static str,
        policy: Option<&Rule>,
        error: Option<&dyn fmt::Display>,
    ) {
        let own = match direction(event) {
            access::Direction::Outbound => src(event),
            access::Direction::Inbound => dst(event),
        };
        let own = match snapshot.workload_by_ip(own.ip()) {
            Some(Occupant::One(workload)) => Some(&**workload),
            Some(Occupant::Ambiguous) | None => None,
        };
        if !self.limiter.admits(own, reason, Instant::now()) {
            return;
        }
        let aside = own.and_then(|own| aside(snapshot, own, event));
        let (dry_run, audit) = aside.map_or((None, None), |verdict| (verdict.dry_run, verdict.audit));
        let (sent, received) = by_side(event);
        self.access.record(&Access {
            event: kind,
            src: self.end(snapshot, src(event)),
            dst: self.end(snapshot, dst(event)),
            hbone_addr: None,
            service: None,
            direction: direction(event),
            bytes_sent: sent,
            bytes_recv: received,
            duration: Duration::from_nanos(match event.opened_ns {
                0 => 0,
                opened => event.at_ns.saturating_sub(opened),
            }),
            error,
            reason: Some(&reason),
            policy: policy.map(Rule::name).as_ref().map(|policy| policy as &dyn fmt::Display),
            dry_run: dry_run.as_ref().map(|dry| dry as &dyn fmt::Display),
            audit: audit.as_ref().map(|rule| rule as &dyn fmt::Display),
            trace_id: None,
        });
    }

    fn end<'a>(&'a self, snapshot: &'a Snapshot, addr: SocketAddr) -> End<'a> {
        let workload = match snapshot.workload_by_ip(addr.ip()) {
            Some(Occupant::One(workload)) => Some(workload),
            Some(Occupant::Ambiguous) | None => None,
        };
        End {
            addr: Some(addr),
            workload: workload.map(|workload| &workload.workload_name as &dyn fmt::Display),
            namespace: workload.map(|workload| &workload.object.namespace as &dyn fmt::Display),
            identity: None,
            cluster: workload.map(|_| &self.names.cluster as &dyn fmt::Display),
        }
    }
}

/// What the kernel would have reported of a connection's end, from its socket as it was listed before it was closed.
/// When it was opened is not known.
fn last_seen(pod: &ServedPod, socket: &Socket, verdict: &policy::Verdict) -> Event {
    let bytes = socket.bytes.unwrap_or_default();
    Event {
        src: socket.id.remote.ip().into(),
        dst: socket.id.local.ip().into(),
        netns_cookie: pod.cookie.0,
        received_bytes: bytes.received,
        sent_bytes: bytes.acked,
        generation: verdict.generation,
        sport: socket.id.remote.port(),
        dport: socket.id.local.port(),
        kind: EventKind::Closed as u8,
        direction: Direction::Inbound as u8,
        reason: verdict.reason as u8,
        ..Event::default()
    }
}

/// An inbound connection from outside the pod, to a port that somebody listens on: nothing of ours.
fn arrived(pod: &ServedPod, local: SocketAddr, remote: SocketAddr, served: &BTreeSet<u16>) -> bool {
    pod.ips.contains(&local.ip())
        && !pod.ips.contains(&remote.ip())
        && !remote.ip().is_loopback()
        && local.port() != PORT_HBONE
        && served.contains(&local.port())
}

/// A connection out of the pod, from a port that nobody listens on.
fn left(pod: &ServedPod, local: SocketAddr, remote: SocketAddr, served: &BTreeSet<u16>) -> bool {
    pod.ips.contains(&local.ip())
        && !pod.ips.contains(&remote.ip())
        && !remote.ip().is_loopback()
        && local.port() != PORT_HBONE
        && !served.contains(&local.port())
}

/// What the kernel has noted of a socket.
fn value(socket: &Socket) -> Option<SocketValue> {
    let bytes = socket.storage.as_ref()?.get(..size_of::<SocketValue>())?;
    // SAFETY: `bytes` is as long as a `SocketValue`, which any bytes make; it may be unaligned.
    Some(unsafe { bytes.as_ptr().cast::<SocketValue>().read_unaligned() })
}

fn kind(socket: &Socket) -> Option<u8> {
    value(socket).map(|value| value.kind)
}

/// Milliseconds since the epoch of a moment of the kernel's clock; `None` for 0.
fn unix_ms(at_ns: u64) -> Option<u64> {
    let ago = Duration::from_nanos(monotonic_ns().saturating_sub(at_ns));
    let at = SystemTime::now().checked_sub(ago)?.duration_since(UNIX_EPOCH).ok()?;
    (at_ns != 0).then(|| u64::try_from(at.as_millis()).unwrap_or(u64::MAX))
}

impl Tracked {
    /// The kernel will not report its end.
    fn unreported(&self) -> bool {
        self.facts.carried == Carried::PreEnrolment
    }

    /// Takes over what the kernel has counted; it counts each FIN as a byte, and the SYN of the side that connected.
    fn count(&self, socket: &Socket) {
        let Some(bytes) = socket.bytes else { return };
        let fins = value(socket).unwrap_or_default();
        let syn = u64::from(self.facts.direction == access::Direction::Outbound);
        let sent = bytes.acked.saturating_sub(syn + u64::from(fins.fin_acked));
        let received = bytes.received.saturating_sub(u64::from(fins.fin_received));
        self.counters.forward.fetch_max(sent, Ordering::Relaxed);
        self.counters.backward.fetch_max(received, Ordering::Relaxed);
    }
}

fn direction(event: &Event) -> access::Direction {
    match event.direction == Direction::Outbound as u8 {
        true => access::Direction::Outbound,
        false => access::Direction::Inbound,
    }
}

/// (sent, received) by the pod of this node; an event counts by client and server.
fn by_side(event: &Event) -> (u64, u64) {
    match direction(event) {
        access::Direction::Inbound => (event.sent_bytes, event.received_bytes),
        access::Direction::Outbound => (event.received_bytes, event.sent_bytes),
    }
}

/// The rule that decided in the kernel.
fn decided_by(snapshot: &Snapshot, event: &Event) -> Option<Rule> {
    snapshot.rule(RuleId(event.rule)).map(Into::into)
}

/// The rule that allowed what the kernel passed. Where no ALLOW policy selects the pod, the number is of who set the mode.
fn allowed_by(snapshot: &Snapshot, event: &Event) -> Option<Rule> {
    (event.reason == Reason::AllowMatch as u8).then(|| decided_by(snapshot, event)).flatten()
}

/// What policies that are not enforced say of a plaintext connection that the kernel has judged ([AP.5], [AP.6]): as they are
/// when it is told. Nothing where there are none, and of what never came to policy.
fn aside(snapshot: &Snapshot, own: &Workload, event: &Event) -> Option<policy::Verdict> {
    let judged = matches!(
        Reason::from_u8(event.reason)?,
        Reason::NoAllowPolicies | Reason::AllowMatch | Reason::NoAllowMatch | Reason::ExplicitDeny
    );
    let inbound = direction(event) == access::Direction::Inbound;
    (judged && inbound && own.authorization.judges()).then(|| {
        let connection = Connection {
            server: own.server(),
            client: Client::Plain,
            source_ip: Some(event.src.ip()),
            destination_ip: Some(event.dst.ip()),
            port: event.dport,
        };
        policy::decide(snapshot, &connection)
    })
}

fn word(event: &Event) -> &'static str {
    Reason::from_u8(event.reason).map_or("unknown", Reason::as_str)
}

fn src(event: &Event) -> SocketAddr {
    SocketAddr::new(event.src.ip(), event.sport)
}

fn dst(event: &Event) -> SocketAddr {
    SocketAddr::new(event.dst.ip(), event.dport)
}

/// The kernel's counters in words, one for each pod and reason, whichever rules decided. `pod` knows the workload of a
/// namespace.
pub fn verdicts<'a>(
    counters: &[(VerdictKey, u64)],
    pod: impl Fn(NetnsCookie) -> Option<&'a Arc<Workload>>,
) -> Vec<metrics::Verdicts> {
    // By name: two pods have one while one replaces the other.
    let mut sums: BTreeMap<(&str, &str, u8, u8, u8), u64> = BTreeMap::new();
    for (key, times) in counters {
        let (namespace, name) = match pod(NetnsCookie(key.netns_cookie)) {
            Some(workload) => (&*workload.object.namespace, &*workload.object.name),
            None => (UNKNOWN, UNKNOWN),
        };
        *sums.entry((namespace, name, key.direction, key.answer, key.reason)).or_default() += times;
    }
    let in_words =
        |((namespace, pod, direction, answer, reason), times): ((&str, &str, u8, u8, u8), u64)| metrics::Verdicts {
            namespace: namespace.to_owned(),
            pod: pod.to_owned(),
            direction: if direction == Direction::Outbound as u8 { "outbound" } else { "inbound" },
            answer: match answer {
                _ if answer == Answer::Pass as u8 => "pass",
                _ if answer == Answer::Refuse as u8 => "refuse",
                _ => "agent",
            },
            reason: Reason::from_u8(reason).map_or(UNKNOWN, Reason::as_str),
            times,
        };
    sums.into_iter().map(in_words).collect()
}

/// The namespace's cookie, as the maps' keys have it.
///
/// # Errors
/// The namespace could not be entered.
pub fn cookie(netns: &NetnsHandle) -> anyhow::Result<NetnsCookie> {
    Ok(NetnsCookie(netns.cookie().context("ask for the cookie of a network namespace")?))
}
