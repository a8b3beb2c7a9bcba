//! How a connection ended, in the words of the access log and of the metrics, and the line that tells it.

use std::{
    fmt,
    net::SocketAddr,
    sync::{Arc, atomic::Ordering},
    time::{Instant, SystemTime},
};

use super::{
    Context,
    copy::{Cause, CopyOutcome, Counters, Side},
};
use crate::{
    limits::Limit,
    model::{ObjectRef, PodUid, SpiffeId},
    policy::{DecidedBy, RouteRefusal, Verdict, Workload},
    telemetry::{
        access::{Access, Direction, End, Event},
        history::{Circumstances, Party, Plaintext, Refusal},
        open::{Carried, Facts, Open},
        trace::{Span, Trace},
        traffic,
    },
    tunnel::{Charge, OpenError},
};

/// How a connection ended; the closed list of words that follow `reason=`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// Both directions ended as they should.
    Complete(&'static str),
    /// Policy refused it, or ended it when policy changed.
    Denied {
        /// Word of the verdict.
        reason: &'static str,
        /// The verdict in words, with the object that decided.
        detail: String,
        /// The object, where a single one did.
        by: Option<DecidedBy>,
    },
    /// Something else ended it.
    Failed {
        /// What kind of failure.
        flag: Flag,
        /// What happened, for humans.
        detail: String,
    },
}

/// Kinds of failure ([M.2], in the spelling of logs).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Flag {
    /// The server could not be reached.
    Connect,
    /// The server's pod could not be reached at the tunnel's port in time: a NetworkPolicy, perhaps.
    NetworkPolicy,
    /// TLS failed.
    TlsFailure,
    /// HTTP/2 failed.
    H2HandshakeFailure,
    /// No certificate of our own.
    IdentityError,
    /// The other side of the tunnel refused.
    Refused,
    /// The other side of the tunnel refused, by its policy.
    Denied,
    /// One side reset the connection.
    Reset,
    /// The tunnel was lost.
    TunnelLost,
    /// The pod, or the peer, has as much of the agent as it may.
    Limit(Limit),
    /// The connection outlived the drain deadline.
    Drained,
    /// The client asks for what there is not, or must not be reached.
    NoRoute(RouteRefusal),
    /// The pod is not in the snapshot (any more).
    UnknownWorkload,
}

impl Flag {
    /// The word of the access log.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Connect => "connect",
            Self::NetworkPolicy => "network-policy",
            Self::TlsFailure => "tls-failure",
            Self::H2HandshakeFailure => "h2-handshake-failure",
            Self::IdentityError => "identity-error",
            Self::Refused | Self::Denied => "refused-by-peer",
            Self::Reset => "reset",
            Self::TunnelLost => "tunnel-lost",
            Self::Limit(limit) => limit.as_str(),
            Self::Drained => "drained",
            Self::NoRoute(refusal) => refusal.as_str(),
            Self::UnknownWorkload => "unknown-workload",
        }
    }
}

impl Flag {
    /// As metrics have it ([M.2]).
    fn response_flag(self) -> traffic::Flag {
        match self {
            Self::Connect | Self::Refused | Self::TunnelLost | Self::UnknownWorkload => traffic::Flag::Connect,
            Self::NetworkPolicy => traffic::Flag::NetworkPolicy,
            Self::TlsFailure => traffic::Flag::TlsFailure,
            Self::H2HandshakeFailure => traffic::Flag::H2HandshakeFailure,
            Self::IdentityError => traffic::Flag::IdentityError,
            Self::Denied | Self::Limit(_) => traffic::Flag::Deny,
            Self::NoRoute(refusal) => match refusal {
                RouteRefusal::NotInRegistry | RouteRefusal::Loop => traffic::Flag::Deny,
                RouteRefusal::NoSuchServicePort | RouteRefusal::NoEndpoint | RouteRefusal::AmbiguousAddress => {
                    traffic::Flag::Connect
                }
            },
            // What the applications do to each other, and our own end, is no failure of the mesh.
            Self::Reset | Self::Drained => traffic::Flag::None,
        }
    }
}

impl fmt::Display for Flag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl Outcome {
    pub(super) fn failed(flag: Flag, detail: impl fmt::Display) -> Self {
        Self::Failed { flag, detail: format!("{detail:#}") }
    }

    /// Of a verdict that does not allow it.
    pub(super) fn denied(verdict: &Verdict) -> Self {
        Self::Denied { reason: verdict.reason.as_str(), detail: verdict.to_string(), by: verdict.decided_by.clone() }
    }

    /// Of a copy that ran to its end. `near` and `far` name the two sides for humans; `word` is the reason of a
    /// connection that ended well.
    pub(super) fn of_copy(outcome: CopyOutcome, word: &'static str, near: &str, far: &str) -> Self {
        let (side, cause) = match outcome {
            CopyOutcome::Finished => return Self::Complete(word),
            CopyOutcome::Cut { side, cause } => (side, cause),
        };
        let who = match side {
            Side::Near => near,
            Side::Far => far,
        };
        match cause {
            Cause::Reset => Self::failed(Flag::Reset, format_args!("reset by {who}")),
            Cause::TunnelLost(how) => Self::failed(Flag::TunnelLost, format_args!("tunnel lost: {how}")),
            Cause::Socket(error) => Self::failed(Flag::Reset, format_args!("socket of {who}: {error}")),
        }
    }

    /// As metrics have it ([M.2]).
    fn response_flag(&self) -> traffic::Flag {
        match self {
            Self::Complete(_) => traffic::Flag::None,
            Self::Denied { .. } => traffic::Flag::Deny,
            Self::Failed { flag, .. } => flag.response_flag(),
        }
    }

    /// The word, if policy, routing or a limit refused it here.
    fn refusal(&self) -> Option<&'static str> {
        match self {
            Self::Complete(_) => None,
            Self::Denied { reason, .. } => Some(reason),
            Self::Failed {
                flag: flag @ (Flag::NoRoute(_) | Flag::UnknownWorkload | Flag::IdentityError | Flag::Limit(_)),
                ..
            } => Some(flag.as_str()),
            Self::Failed { .. } => None,
        }
    }

    /// The word, if the connection was not let through: what its client takes for a refusal, whoever refused. Not what
    /// ends a connection that was carried.
    fn kept_out(&self) -> Option<&'static str> {
        match self {
            Self::Complete(_) => None,
            Self::Denied { reason, .. } => Some(reason),
            Self::Failed { flag, .. } => match flag {
                Flag::Connect
                | Flag::NetworkPolicy
                | Flag::TlsFailure
                | Flag::H2HandshakeFailure
                | Flag::IdentityError
                | Flag::Refused
                | Flag::Denied
                | Flag::Limit(_)
                | Flag::NoRoute(_)
                | Flag::UnknownWorkload => Some(flag.as_str()),
                Flag::Reset | Flag::TunnelLost | Flag::Drained => None,
            },
        }
    }

    /// A limit that was reached.
    pub(super) fn limited(limit: Limit) -> Self {
        Self::failed(Flag::Limit(limit), limit)
    }

    /// As [`Outcome::of_copy`], where the copy's end may be that the pod held too much.
    pub(super) fn or_limited(self, charge: &Charge) -> Self {
        if charge.was_cut() { Self::limited(Limit::Memory) } else { self }
    }

    /// Of a tunnel that could not be opened.
    pub(super) fn of_open(error: &OpenError) -> Self {
        let flag = match error {
            OpenError::ConnectTimeout => Flag::NetworkPolicy,
            OpenError::Connect(cause) if cause.is::<crate::identity::Unavailable>() => Flag::IdentityError,
            OpenError::Connect(_) | OpenError::Closed => Flag::Connect,
            OpenError::HandshakeTimeout | OpenError::Tls(_) => Flag::TlsFailure,
            OpenError::Protocol(_) | OpenError::BadRequest(_) => Flag::H2HandshakeFailure,
            OpenError::Aborted(_) | OpenError::Lost(_) => Flag::TunnelLost,
            OpenError::Reset(_) => Flag::Reset,
            OpenError::Refused { status: 401, .. } => Flag::Denied,
            OpenError::Refused { .. } => Flag::Refused,
        };
        Self::failed(flag, error)
    }
}

/// What policy said, as the access log names it.
#[derive(Default)]
struct Policy {
    decided_by: Option<String>,
    dry_run: Option<String>,
    audit: Option<String>,
}

/// A connection while it lasts; told once, at its end.
pub(super) struct Story {
    started: Instant,
    pub(super) counters: Arc<Counters>,
    facts: Arc<Facts>,
    open: Option<Open>,
    pub(super) trace: Trace,
    policy: Policy,
    /// It is an application's connection, and not the tunnel that carries such connections.
    counts: bool,
}

impl Story {
    pub(super) fn new(direction: Direction, src: SocketAddr, dst: SocketAddr) -> Self {
        Self {
            started: Instant::now(),
            counters: Arc::default(),
            facts: Arc::new(Facts::new(direction, src, dst)),
            open: None,
            trace: Trace::begin(),
            policy: Policy::default(),
            counts: true,
        }
    }

    /// Of a tunnel that arrives for a pod: told if it fails, and not counted among the pod's connections.
    pub(super) fn of_tunnel(src: SocketAddr, dst: SocketAddr) -> Self {
        Self { counts: false, ..Self::new(Direction::Inbound, src, dst) }
    }

    /// What is known, to be completed. What others see of it is replaced by the next [`Story::open`].
    pub(super) fn facts(&mut self) -> &mut Facts {
        Arc::make_mut(&mut self.facts)
    }

    /// Notes where an outbound connection goes, over what was noted before.
    pub(super) fn heads_for(&mut self, dst: SocketAddr, workload: Option<Arc<Workload>>, service: Option<ObjectRef>) {
        let facts = self.facts();
        (facts.dst, facts.dst_workload, facts.service) = (dst, workload, service);
        (facts.src_identity, facts.dst_identity, facts.hbone_addr) = (None, None, None);
        facts.carried = Carried::Agent;
    }

    /// The connection is about to be judged, or carried, with the facts that are known now ([M.2]: before the verdict).
    pub(super) fn open(&mut self, context: &Context) {
        // An attempt to reach a server that was given up for another one has failed.
        if let Some(before) = self.open.take() {
            before.close(traffic::Flag::Connect);
        }
        self.open = Some(context.open.open(self.facts.clone(), self.counters.clone()));
    }

    /// Policy has judged it.
    pub(super) fn judged(&mut self, verdict: &Verdict) {
        self.policy = Policy {
            decided_by: verdict.decided_by.as_ref().map(ToString::to_string),
            dry_run: verdict.dry_run.as_ref().map(ToString::to_string),
            audit: verdict.audit.as_ref().map(ToString::to_string),
        };
        if let Some(open) = self.open.as_ref().filter(|_| verdict.allowed) {
            open.admitted(verdict.reason.as_str());
        }
    }

    /// The connection came in plaintext, and is let in.
    pub(super) fn plaintext(&self, context: &Context) {
        if let Some((plaintext, ip)) = Plaintext::of(&self.facts) {
            context.open.note_plaintext(plaintext, ip);
        }
    }

    /// Counts the end and writes the line. The nearer side's bytes go `forward`: what this agent sent towards its remote
    /// peer.
    pub(super) fn end(mut self, context: &Context, outcome: &Outcome) {
        if self.counts && self.open.is_none() {
            self.open(context);
        }
        let flag = outcome.response_flag();
        if let Some(open) = self.open.take() {
            open.close(flag);
        }
        let facts = &*self.facts;
        if let Some(reason) = outcome.refusal() {
            context.open.refused((facts.direction, reason));
        }
        if let Some(reason) = outcome.kept_out() {
            note(context, facts, reason, outcome);
        }
        let (reason, error): (&'static str, Option<&dyn fmt::Display>) = match outcome {
            Outcome::Complete(word) => (word, None),
            Outcome::Denied { reason, detail, .. } => (reason, Some(detail)),
            Outcome::Failed { flag, detail } => (flag.as_str(), Some(detail)),
        };
        if self.counts {
            context.tracer.end(|| {
                let ended = SystemTime::now();
                Span {
                    trace: self.trace,
                    facts: self.facts.clone(),
                    begun: ended.checked_sub(self.started.elapsed()).unwrap_or(ended),
                    ended,
                    bytes: self.counters.read(facts.direction),
                    flag,
                    reason,
                    error: error.map(ToString::to_string),
                }
            });
        }
        let own = match facts.direction {
            Direction::Outbound => facts.src_workload.as_deref(),
            Direction::Inbound => facts.dst_workload.as_deref(),
        };
        if !context.limiter.borrow_mut().admits(own, reason, Instant::now()) {
            return;
        }
        let event = match outcome {
            Outcome::Failed { flag: Flag::UnknownWorkload, .. } => Event::Failed,
            _ => Event::Complete,
        };
        let service = facts.service.as_ref().map(|service| context.names.hostname(service));
        let decided_by = match outcome {
            // By the policy of its end, which need not be that of its begin.
            Outcome::Denied { by, .. } => by.as_ref().map(ToString::to_string),
            Outcome::Complete(_) | Outcome::Failed { .. } => self.policy.decided_by,
        };
        context.access.record(&Access {
            event,
            src: end(facts.src, facts.src_workload.as_deref(), facts.src_identity.as_ref(), &context.names.cluster),
            dst: end(facts.dst, facts.dst_workload.as_deref(), facts.dst_identity.as_ref(), &context.names.cluster),
            hbone_addr: facts.hbone_addr.as_ref().map(|addr| addr as &dyn fmt::Display),
            service: service.as_ref().map(|name| name as &dyn fmt::Display),
            direction: facts.direction,
            bytes_sent: self.counters.forward.load(Ordering::Relaxed),
            bytes_recv: self.counters.backward.load(Ordering::Relaxed),
            duration: self.started.elapsed(),
            error,
            reason: Some(&reason),
            policy: shown(decided_by.as_ref()),
            dry_run: shown(self.policy.dry_run.as_ref()),
            audit: shown(self.policy.audit.as_ref()),
            trace_id: self.counts.then_some(&format_args!("{:032x}", self.trace.id) as &dyn fmt::Display),
        });
    }
}

/// Keeps a refusal for whoever asks later.
fn note(context: &Context, facts: &Facts, reason: &'static str, outcome: &Outcome) {
    let (detail, rule) = match outcome {
        Outcome::Complete(_) => return,
        Outcome::Denied { detail, by, .. } => (detail, by.as_ref().map(Into::into)),
        Outcome::Failed { detail, .. } => (detail, None),
    };
    let circumstances = Circumstances {
        identity: facts.src_identity.clone(),
        service: facts.service.clone(),
        ..Circumstances::new(detail)
    };
    context.open.note_refusal(Refusal::of(facts, reason, rule), 1, circumstances);
}

/// Keeps a refusal of a connection that has no story: a process of a pod that dialled a listener of the agent's itself.
pub(super) fn note_dialled(
    context: &Context,
    direction: Direction,
    pod: &PodUid,
    remote: SocketAddr,
    local: SocketAddr,
) {
    let own = context.snapshot().workload(pod).map(|own| own.object.clone());
    let refusal = Refusal {
        direction,
        source: Party { ip: Some(remote.ip().to_canonical()), pod: None },
        destination: Party { ip: Some(local.ip().to_canonical()), pod: own },
        port: local.port(),
        reason: "agent-port",
        rule: None,
    };
    let detail = Circumstances::new("a listener of the agent was dialled that is not for applications");
    context.open.note_refusal(refusal, 1, detail);
}

fn shown(text: Option<&String>) -> Option<&dyn fmt::Display> {
    text.map(|text| text as &dyn fmt::Display)
}

fn end<'a>(
    addr: SocketAddr,
    workload: Option<&'a Workload>,
    identity: Option<&'a SpiffeId>,
    cluster: &'a Arc<str>,
) -> End<'a> {
    End {
        addr: Some(addr),
        workload: workload.map(|workload| &workload.workload_name as &dyn fmt::Display),
        namespace: workload.map(|workload| &workload.object.namespace as &dyn fmt::Display),
        identity: identity.map(|identity| identity as &dyn fmt::Display),
        cluster: workload.map(|_| cluster as &dyn fmt::Display),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// [M.2]: every kind of failure, with the word that the log has for it and the flag of the metrics.
    #[test]
    fn every_failure_has_its_word_and_its_flag() {
        use traffic::Flag as Metric;
        let rows = [
            (Flag::Connect, "connect", Metric::Connect),
            (Flag::NetworkPolicy, "network-policy", Metric::NetworkPolicy),
            (Flag::TlsFailure, "tls-failure", Metric::TlsFailure),
            (Flag::H2HandshakeFailure, "h2-handshake-failure", Metric::H2HandshakeFailure),
            (Flag::IdentityError, "identity-error", Metric::IdentityError),
            (Flag::Refused, "refused-by-peer", Metric::Connect),
            (Flag::Denied, "refused-by-peer", Metric::Deny),
            (Flag::Reset, "reset", Metric::None),
            (Flag::TunnelLost, "tunnel-lost", Metric::Connect),
            (Flag::Limit(Limit::Connections), "connection-limit", Metric::Deny),
            (Flag::Limit(Limit::Memory), "memory-limit", Metric::Deny),
            (Flag::Limit(Limit::Handshakes), "handshake-limit", Metric::Deny),
            (Flag::Limit(Limit::OpenFiles), "open-files-limit", Metric::Deny),
            (Flag::Drained, "drained", Metric::None),
            (Flag::NoRoute(RouteRefusal::NoSuchServicePort), "no-such-service-port", Metric::Connect),
            (Flag::NoRoute(RouteRefusal::NoEndpoint), "no-endpoint", Metric::Connect),
            (Flag::NoRoute(RouteRefusal::Loop), "loop", Metric::Deny),
            (Flag::NoRoute(RouteRefusal::AmbiguousAddress), "ambiguous-address", Metric::Connect),
            (Flag::NoRoute(RouteRefusal::NotInRegistry), "not-in-registry", Metric::Deny),
            (Flag::UnknownWorkload, "unknown-workload", Metric::Connect),
        ];
        for (flag, word, metric) in rows {
            assert_eq!((flag.as_str(), flag.response_flag()), (word, metric), "{flag:?}");
            assert_eq!(Outcome::failed(flag, "").response_flag(), metric, "{flag:?}");
        }
        assert_eq!(Outcome::Complete("tunnelled").response_flag(), Metric::None);
        let denied = Outcome::Denied { reason: "explicit-deny", detail: String::new(), by: None };
        assert_eq!(denied.response_flag(), Metric::Deny);
        // What no row has, nothing produces: there is no revocation of certificates to look at.
        let made: Vec<_> = rows.iter().map(|(.., metric)| *metric).collect();
        let missing: Vec<_> = Metric::ALL.into_iter().filter(|flag| !made.contains(flag)).collect();
        assert_eq!(missing, [Metric::CertRevoked]);
    }

    /// [M.2]: what keeps a tunnel from opening.
    #[test]
    fn a_tunnel_that_does_not_open_has_the_flag_of_its_reason() {
        let unavailable =
            crate::identity::Unavailable::NotWanted("spiffe://cluster.local/ns/a/sa/b".parse().expect("valid"));
        let text = || "why".into();
        for (error, flag) in [
            (OpenError::ConnectTimeout, Flag::NetworkPolicy),
            (OpenError::Connect(Arc::new(unavailable.into())), Flag::IdentityError),
            (OpenError::Connect(Arc::new(anyhow::anyhow!("refused"))), Flag::Connect),
            (OpenError::Closed, Flag::Connect),
            (OpenError::HandshakeTimeout, Flag::TlsFailure),
            (OpenError::Tls(text()), Flag::TlsFailure),
            (OpenError::Protocol(text()), Flag::H2HandshakeFailure),
            (OpenError::BadRequest("baggage"), Flag::H2HandshakeFailure),
            (OpenError::Aborted(text()), Flag::TunnelLost),
            (OpenError::Lost(text()), Flag::TunnelLost),
            (OpenError::Reset(8), Flag::Reset),
            (OpenError::Refused { status: 401, reason: None }, Flag::Denied),
            (OpenError::Refused { status: 503, reason: None }, Flag::Refused),
        ] {
            assert_eq!(Outcome::of_open(&error), Outcome::failed(flag, &error), "{error}");
        }
    }
}
