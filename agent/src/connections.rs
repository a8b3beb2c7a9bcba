//! Open connections that no worker carries: those that the kernel passed, and those that are older than enrolment.
//!
//! They are told in the access log when they end, judged again when policy changes ([D.1], [E.5]), and closed by
//! SOCK_DESTROY where they are no longer allowed. The kernel's refusals are told here too.

use std::{
    collections::{BTreeSet, HashMap},
    fmt,
    net::SocketAddr,
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use culvert_common::{Answer, Direction, Event, EventKind, PORT_HBONE, Peer, Reason, SocketKind, SocketValue, Verdict};
use tracing::{info, warn};

use crate::{
    datapath::{Events, NetnsCookie},
    netns::{
        NetnsHandle,
        sock_diag::{Query, SockDiag, Socket, SocketId, States},
    },
    policy::{Occupant, Snapshot, Workload},
    proxy::ServedPod,
    telemetry::access::{self, Access, AccessLog, End},
};

/// Refusals told one by one in each interval; more are counted, and one line says how many. A pod can cause them at
/// the speed of its connects.
const TOLD_PER_INTERVAL: u32 = 100;
const INTERVAL: Duration = Duration::from_secs(1);
/// How long the reason of a close is kept for the end that the kernel reports.
const KEEP_REASON: Duration = Duration::from_secs(10);

/// The connections of this node's pods that the kernel passed.
pub struct Passed {
    events: Events,
    storage: OwnedFd,
    access: AccessLog,
    cluster: Arc<str>,
    closed_by_us: HashMap<(SocketAddr, SocketAddr), (Instant, Verdict, String)>,
    interval: Instant,
    told: u32,
    untold: u32,
}

impl Passed {
    /// `storage` is the map of socket storage.
    pub fn new(events: Events, storage: OwnedFd, access: AccessLog, cluster: Arc<str>) -> Self {
        Self {
            events,
            storage,
            access,
            cluster,
            closed_by_us: HashMap::new(),
            interval: Instant::now(),
            told: 0,
            untold: 0,
        }
    }

    /// The ring buffer, which becomes readable when something must be done at once.
    pub fn wakes(&self) -> &impl AsFd {
        &self.events
    }

    /// Tells what the kernel has reported, and ends what a policy has overtaken. `pods` finds a pod by its namespace.
    pub fn tell<'a>(&mut self, snapshot: &Snapshot, pods: impl Fn(NetnsCookie) -> Option<&'a Arc<ServedPod>>) {
        let now = Instant::now();
        if now.duration_since(self.interval) >= INTERVAL {
            if self.untold > 0 {
                warn!(refusals = self.untold, "further refusals of this second were counted, not told");
            }
            (self.interval, self.told, self.untold) = (now, 0, 0);
            self.closed_by_us.retain(|_, (at, _, _)| now.duration_since(*at) < KEEP_REASON);
        }
        while let Some(event) = self.events.next() {
            let pod = pods(NetnsCookie(event.netns_cookie));
            if event.kind == EventKind::Closed as u8 {
                self.ended(snapshot, &event);
            } else if event.kind == EventKind::Overtaken as u8 {
                if let Some(pod) = pod {
                    self.overtaken(snapshot, pod, &event);
                }
            } else if self.told < TOLD_PER_INTERVAL {
                self.told += 1;
                self.refused(snapshot, &event);
            } else {
                self.untold += 1;
            }
        }
    }

    /// Judges a pod's open plaintext connections by `snapshot` and closes those that are no longer allowed, and only
    /// those; also the ones that are older than enrolment, which `enrolled_now` lists.
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
        enrolled_now: bool,
    ) -> anyhow::Result<()> {
        let mut diag = SockDiag::open(&pod.netns).context("list the pod's sockets")?;
        let query = |states| Query { states, bytes: false, storage: Some(self.storage.as_fd()) };
        let open = diag.list(&query(States::OPEN.and(States::SYN_RECV))).context("list the pod's sockets")?;
        let listening = diag.list(&query(States::LISTEN)).context("list the pod's listeners")?;
        let served: BTreeSet<u16> = listening.iter().map(|socket| socket.id.local.port()).collect();
        let mut result = Ok(());
        for socket in &open {
            let (local, remote) = (socket.id.local, socket.id.remote);
            match kind(socket) {
                Some(kind) if kind == SocketKind::Passed as u8 => {}
                // Older than enrolment, or caught before the kernel could note it.
                None if socket.cgroup.is_some() && arrived(pod, local, remote, &served) => {
                    if enrolled_now {
                        info!(pod = %own.object, src = %remote, dst = %local, "pre-enrolment connection");
                    }
                }
                _ => continue,
            }
            let verdict = snapshot.decide(own, Peer::Plain, local.port());
            if verdict.answer == Answer::Refuse {
                result = result.and(self.close(&mut diag, &socket.id, verdict, snapshot.explain(&verdict)));
            }
        }
        result
    }

    fn close(&mut self, diag: &mut SockDiag, id: &SocketId, verdict: Verdict, detail: String) -> anyhow::Result<()> {
        // False: it ended by itself.
        if diag.destroy(id).with_context(|| format!("close {} → {}, which policy forbids", id.remote, id.local))? {
            info!(src = %id.remote, dst = %id.local, reason = verdict.reason.as_str(), detail,
                "closed an open connection that policy no longer allows");
            self.closed_by_us.insert((id.remote, id.local), (Instant::now(), verdict, detail));
        }
        Ok(())
    }

    fn overtaken(&mut self, snapshot: &Snapshot, pod: &ServedPod, event: &Event) {
        let result = SockDiag::open(&pod.netns).and_then(|mut diag| {
            let id = SocketId { local: dst(event), remote: src(event), ifindex: 0, cookie: 0 };
            let reason = Reason::from_u8(event.reason).unwrap_or(Reason::KernelCapacity);
            let verdict = Verdict { answer: Answer::Refuse, reason, rule: event.rule, generation: event.generation };
            self.close(&mut diag, &id, verdict, snapshot.explain(&verdict))
        });
        if let Err(error) = result {
            warn!(error = format!("{error:#}"), "could not close a connection that policy forbids");
        }
    }

    fn ended(&mut self, snapshot: &Snapshot, event: &Event) {
        let ours = self.closed_by_us.remove(&(src(event), dst(event)));
        let (reason, detail) = match &ours {
            Some((_, verdict, detail)) => (verdict.reason.as_str(), Some(detail as &dyn fmt::Display)),
            None => (word(event), None),
        };
        self.line(snapshot, event, access::Event::Complete, reason, detail);
    }

    fn refused(&mut self, snapshot: &Snapshot, event: &Event) {
        let detail = match Reason::from_u8(event.reason) {
            Some(reason) => snapshot.explain(&Verdict {
                answer: Answer::Refuse,
                reason,
                rule: event.rule,
                generation: event.generation,
            }),
            None => "refused".to_owned(),
        };
        self.line(snapshot, event, access::Event::Failed, word(event), Some(&detail));
    }

    fn line(
        &self,
        snapshot: &Snapshot,
        event: &Event,
        kind: access::Event,
        reason: &'static str,
        error: Option<&dyn fmt::Display>,
    ) {
        let direction = match event.direction == Direction::Outbound as u8 {
            true => access::Direction::Outbound,
            false => access::Direction::Inbound,
        };
        self.access.record(&Access {
            event: kind,
            src: self.end(snapshot, src(event)),
            dst: self.end(snapshot, dst(event)),
            hbone_addr: None,
            service: None,
            direction,
            bytes_sent: event.sent_bytes,
            bytes_recv: event.received_bytes,
            duration: Duration::from_nanos(match event.opened_ns {
                0 => 0,
                opened => event.at_ns.saturating_sub(opened),
            }),
            error,
            reason: Some(&reason),
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
            cluster: workload.map(|_| &self.cluster as &dyn fmt::Display),
        }
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

fn kind(socket: &Socket) -> Option<u8> {
    let bytes = socket.storage.as_ref()?;
    let value: [u8; size_of::<SocketValue>()] = bytes.get(..size_of::<SocketValue>())?.try_into().ok()?;
    Some(value[std::mem::offset_of!(SocketValue, kind)])
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

/// The namespace's cookie, as the maps' keys have it.
///
/// # Errors
/// The namespace could not be entered.
pub fn cookie(netns: &NetnsHandle) -> anyhow::Result<NetnsCookie> {
    Ok(NetnsCookie(netns.cookie().context("ask for the cookie of a network namespace")?))
}
