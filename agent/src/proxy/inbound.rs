//! A connection to a pod of this node: by a tunnel, judged and delivered with the client's address; or plaintext whose
//! verdict needs the agent.

use std::{
    net::{IpAddr, SocketAddr},
    os::fd::AsRawFd as _,
    pin::{Pin, pin},
    rc::Rc,
    sync::Arc,
    time::Duration,
};

use culvert_common::{PORT_HBONE, Reason};
use tokio::{net::TcpStream, time::Instant};
use tracing::{debug, warn};

use super::{
    Context, ServedPod,
    baggage::baggage,
    canonical,
    copy::{self, CopyOutcome, ResetOnClose},
    keepalive,
    report::{Flag, Outcome, Story, note_dialled},
    reset_on_close, workload_at,
};
use crate::{
    identity::{self, Refusal, Unavailable},
    limits::{Host, Place},
    model::SpiffeId,
    policy::{self, Client, Connection, Snapshot, Verdict, Workload},
    telemetry::{
        access::Direction,
        open::Carried,
        tally::{Handshake, Side, Standing},
        trace::Trace,
    },
    tunnel::{self, headers, server},
};

/// Longer than any connection: a pod that has left waits for its tunnels as long as they last ([E.5]).
const NO_DEADLINE: Duration = Duration::from_secs(30 * 365 * 24 * 60 * 60);

/// Serves one connection to the tunnel port, with all its streams, to its end. Once `left` resolves, the pod has left the
/// mesh: clients are told to open no more streams here, and those that are open end by themselves.
pub async fn tunnel(
    context: Rc<Context>,
    pod: Arc<ServedPod>,
    socket: TcpStream,
    remote: SocketAddr,
    left: impl Future<Output = ()>,
) {
    // The client is gone already.
    let Ok(local) = socket.local_addr().map(canonical) else { return };
    let remote = canonical(remote);
    if local.port() != PORT_HBONE || !pod.ips.contains(&local.ip()) {
        debug!(uid = %pod.uid, %local, "a process dialled the tunnel listener itself: refused");
        note_dialled(&context, Direction::Inbound, &pod.uid, remote, local);
        return reset_on_close(&socket);
    }
    let story = || Story::of_tunnel(remote, local);
    context.make_room(&pod, &socket);
    // One for as long as the tunnel lasts, the other until something is asked for in it.
    let (_place, waiting) = match pod.load.tunnel(host_at(&context.snapshot(), remote.ip()), socket.as_raw_fd()) {
        Ok(admitted) => admitted,
        Err(limit) => {
            reset_on_close(&socket);
            let mut refused = story();
            refused.facts().dst_workload = context.snapshot().workload(&pod.uid).cloned();
            return refused.end(&context, &Outcome::limited(limit));
        }
    };
    // Whoever waits counts as a handshake, of which its address has only so many.
    let Some((_, workload)) = context.own_soon(&pod.uid).await else {
        reset_on_close(&socket);
        let outcome = Outcome::failed(Flag::UnknownWorkload, "the server's pod is not in the source");
        return story().end(&context, &outcome);
    };
    let tls = match context.identities.server_config(&workload.identity).await {
        Ok(tls) => tls,
        Err(error) => {
            reset_on_close(&socket);
            return story().end(&context, &Outcome::failed(Flag::IdentityError, error));
        }
    };
    keepalive(&socket);
    // Of the tunnel, not of each of its streams: reading a certificate costs more than all the rest of a request.
    let mut established: Option<(Rc<Result<SpiffeId, Refusal>>, Standing)> = None;
    let drain = {
        let mut drain = context.drain.clone();
        async move {
            tokio::select! {
                // At the end of the agent both are true.
                biased;
                deadline = drain.started() => deadline,
                // Each stream has its own eye on the drain.
                () = left => Instant::now() + NO_DEADLINE,
            }
        }
    };
    let mut waiting = Some(waiting);
    let served = server::serve(socket, tls, context.tunnel, drain, |incoming| {
        waiting = None;
        let (proved, _) = established.get_or_insert_with(|| {
            let proved = identity::peer_identity(&incoming.peer().certificates);
            tell_mismatch(&context, incoming.peer().remote, &proved);
            context.tally.handshake(Side::Server, Handshake::Done);
            (Rc::new(proved), context.tally.stands(Side::Server))
        });
        stream(context.clone(), pod.clone(), incoming, proved.clone())
    })
    .await;
    if established.is_none() {
        context.tally.handshake(Side::Server, handshake(served.as_ref().err()));
    }
    if let Err(error) = served {
        // What the streams carried has its own lines; this one is about a peer that got no further.
        let flag = match error {
            server::ServeError::HandshakeTimeout | server::ServeError::Tls(_) => Flag::TlsFailure,
            server::ServeError::Protocol(_) => Flag::H2HandshakeFailure,
            server::ServeError::Lost(_) => Flag::TunnelLost,
        };
        story().end(&context, &Outcome::failed(flag, error));
    }
}

/// How the handshake of a tunnel ended that carried nothing.
fn handshake(error: Option<&server::ServeError>) -> Handshake {
    match error {
        None => Handshake::Done,
        Some(server::ServeError::HandshakeTimeout) => Handshake::Timeout,
        Some(server::ServeError::Tls(_)) => Handshake::Tls,
        Some(server::ServeError::Protocol(_)) => Handshake::Http2,
        Some(server::ServeError::Lost(_)) => Handshake::Lost,
    }
}

const MISMATCH: &str = "identity-address-mismatch";

/// The pod at the address that a tunnel comes from, if it has another identity than the peer has proved ([I.11]).
fn mismatched<'a>(snapshot: &'a Snapshot, remote: SocketAddr, proved: &SpiffeId) -> Option<&'a Arc<Workload>> {
    workload_at(snapshot, remote.ip()).filter(|known| known.identity != *proved)
}

/// [I.11]: a tunnel from the address of a pod that has another service account.
fn tell_mismatch(context: &Context, remote: SocketAddr, proved: &Result<SpiffeId, Refusal>) {
    let (Ok(proved), snapshot) = (proved, context.snapshot()) else { return };
    let remote = canonical(remote);
    if let Some(known) = mismatched(&snapshot, remote, proved) {
        const REASON: &str = MISMATCH;
        context.tally.mismatch();
        if context.limiter.borrow_mut().admits(Some(known), REASON, std::time::Instant::now()) {
            warn!(reason = REASON, src = %remote, %proved, known = %known.identity,
                "a tunnel comes from the address of a pod with another identity");
        }
    }
}

/// One CONNECT. Only what copying needs is held for as long as the connection lasts.
pub(crate) fn stream(
    context: Rc<Context>,
    pod: Arc<ServedPod>,
    incoming: server::Incoming,
    proved: Rc<Result<SpiffeId, Refusal>>,
) -> impl Future<Output = ()> {
    let (local, remote) = (canonical(incoming.peer().local), canonical(incoming.peer().remote));
    let mut story = Story::new(Direction::Inbound, remote, local);
    // A block and not an `async fn`, which would keep its arguments twice.
    async move {
        let admitted = Box::pin(judge(&context, &pod, incoming, local, remote, &proved, &mut story)).await;
        drop(proved);
        let outcome = match admitted {
            Ok(Admitted { subject, word, generation, place: _place, leg, client: Tunnelled { stream, charge } }) => {
                let copied = pin!(copy::bidirectional(leg, stream, &story.counters));
                let told = |ended| Outcome::of_copy(ended, word, "the server", "the client");
                watched(&context, &pod, &subject, generation, copied, told).await.or_limited(&charge)
            }
            Err(outcome) => outcome,
        };
        story.end(&context, &outcome);
    }
}

/// A connection that policy allows, with a socket at the application.
struct Admitted<C> {
    subject: Subject,
    /// The verdict's reason.
    word: &'static str,
    /// The verdict's.
    generation: u32,
    place: Place,
    leg: ResetOnClose,
    client: C,
}

/// The client's end of a connection in a tunnel.
struct Tunnelled {
    stream: tunnel::Stream,
    charge: Arc<tunnel::Charge>,
}

async fn judge(
    context: &Rc<Context>,
    pod: &ServedPod,
    mut incoming: server::Incoming,
    local: SocketAddr,
    remote: SocketAddr,
    proved: &Result<SpiffeId, Refusal>,
    story: &mut Story,
) -> Result<Admitted<Tunnelled>, Outcome> {
    if let Some((id, parent)) = incoming.header("traceparent").and_then(headers::trace_and_span) {
        story.trace = Trace::join(id, parent);
    }
    let refuse = |incoming: server::Incoming, status: u16, outcome: Outcome| {
        let word = match &outcome {
            Outcome::Complete(word) => word,
            Outcome::Denied { reason, .. } => reason,
            Outcome::Failed { .. } => "failed",
        };
        // The client has gone, or gets its answer.
        let _ = incoming.refuse(status, Some(word));
        Err(outcome)
    };
    let proved = match proved {
        Ok(proved) => proved.clone(),
        Err(error) => return refuse(incoming, 401, Outcome::failed(Flag::IdentityError, error)),
    };
    let mut place = None;
    let own = match context.own(&pod.uid) {
        Some(own) => Some(own),
        None => {
            // Whoever waits has a place, of which there are only so many.
            place = match pod.load.inbound(host_at(&context.snapshot(), remote.ip())) {
                Ok(place) => Some(place),
                Err(limit) => return refuse(incoming, 503, Outcome::limited(limit)),
            };
            tokio::select! {
                own = context.own_soon(&pod.uid) => own,
                cut = incoming.cancelled() => return Err(gave_up(&cut)),
            }
        }
    };
    let Some((snapshot, own)) = own else {
        tell_source(story, &context.snapshot(), remote, proved);
        let outcome = Outcome::failed(Flag::UnknownWorkload, "the server's pod is not in the source");
        return refuse(incoming, 503, outcome);
    };
    if context.refuse_mismatch
        && let Some(known) = mismatched(&snapshot, remote, &proved)
    {
        let detail = format!("the address is of a pod with identity {}", known.identity);
        tell_source(story, &snapshot, remote, proved);
        return refuse(incoming, 401, Outcome::Denied { reason: MISMATCH, detail, by: None });
    }
    tell_source(story, &snapshot, remote, proved);
    let facts = story.facts();
    facts.dst_workload = Some(own.clone());
    facts.dst_identity = Some(own.identity.clone());
    let target = incoming.authority().socket_addr();
    facts.hbone_addr = target;
    facts.carried = Carried::Tunnel;
    // A hint of the client's, for telemetry ([H.2]); only a Service that there is, so that no peer invents names.
    let host = incoming.header("forwarded").and_then(headers::forwarded_host);
    facts.service = host.and_then(|host| context.names.service(host)).filter(|of| snapshot.services.contains_key(of));
    story.open(context);
    let Some(target) = target else {
        // Names are for waypoints; this pod is nobody's.
        let outcome = Outcome::failed(Flag::Refused, format_args!("unknown service {:?}", incoming.authority()));
        return refuse(incoming, 503, outcome);
    };
    if target.ip().to_canonical() != local.ip() {
        // [H.1]: the connection goes to the pod that TCP addressed, or nowhere.
        let outcome =
            Outcome::failed(Flag::Refused, format_args!("authority {target} is not this pod, {}", local.ip()));
        return refuse(incoming, 400, outcome);
    }
    let identity = story.facts().src_identity.clone();
    let subject = Subject { identity, source: remote.ip(), target: SocketAddr::new(local.ip(), target.port()) };
    let verdict = subject.judge(&snapshot, &own);
    story.judged(&verdict);
    if !verdict.allowed {
        let status = if verdict.reason == Reason::Loop { 503 } else { 401 };
        return refuse(incoming, status, Outcome::denied(&verdict));
    }
    // As on the other side: no new connection in an old tunnel once our certificate has expired ([I.7]).
    match context.identities.ready(&own.identity).await {
        Ok(()) => {}
        // The pod is leaving, and its client had not heard of it yet: this stream is served, and there will be no others.
        Err(Unavailable::NotWanted(_)) if !own.enrollment.enrolled => {}
        Err(error) => return refuse(incoming, 503, Outcome::failed(Flag::IdentityError, error)),
    }
    let place = match place.map_or_else(|| pod.load.inbound(host_at(&snapshot, remote.ip())), Ok) {
        Ok(place) => place,
        Err(limit) => return refuse(incoming, 503, Outcome::limited(limit)),
    };
    // [H.2], [H.5]: the address is the TCP source; the header gives the port at most.
    let forwarded = incoming.header("forwarded").and_then(headers::forwarded_client);
    let client = forwarded.filter(|client| client.ip() == remote.ip()).unwrap_or(remote);
    let leg = tokio::select! {
        leg = context.leg(pod, client, subject.target, snapshot.mesh.connect_timeout) => leg,
        cut = incoming.cancelled() => return Err(gave_up(&cut)),
    };
    let leg = match leg {
        Ok(leg) => leg,
        Err(error) => return refuse(incoming, 503, Outcome::failed(Flag::Connect, error)),
    };
    context.make_room(pod, leg.get());
    if let Err(limit) = place.may_have(leg.get().as_raw_fd()) {
        return refuse(incoming, 503, Outcome::limited(limit));
    }
    let mut stream = match incoming.accept(Some(&baggage(&own, &context.names.cluster))) {
        Ok(stream) => stream,
        Err(error) => return Err(gave_up(&error)),
    };
    let charge = Arc::new(place.charge());
    stream.charge(charge.clone());
    Ok(Admitted {
        subject,
        word: verdict.reason.as_str(),
        generation: verdict.generation,
        place,
        leg,
        client: Tunnelled { stream, charge },
    })
}

fn gave_up(cut: &tunnel::StreamError) -> Outcome {
    Outcome::failed(Flag::Reset, format_args!("the client gave up: {cut:?}"))
}

/// Whom a connection from there counts for.
fn host_at(snapshot: &Snapshot, ip: IpAddr) -> Host {
    Host::at(ip, workload_at(snapshot, ip).is_some())
}

fn tell_source(story: &mut Story, snapshot: &Snapshot, remote: SocketAddr, proved: SpiffeId) {
    // Names only where address and certificate agree: a line must not say what nobody proved.
    let facts = story.facts();
    facts.src_workload = workload_at(snapshot, remote.ip()).filter(|known| known.identity == proved).cloned();
    facts.src_identity = Some(proved);
}

/// What is judged of a connection to a pod: at its begin, and again whenever policy changes ([D.1]).
pub(super) struct Subject {
    /// What the client's certificate proved; none in plaintext.
    pub(super) identity: Option<SpiffeId>,
    /// The TCP source address.
    pub(super) source: IpAddr,
    /// Address and port of the pod.
    pub(super) target: SocketAddr,
}

impl Subject {
    pub(super) fn judge(&self, snapshot: &Snapshot, own: &Workload) -> Verdict {
        let connection = Connection {
            server: own.server(),
            client: self.identity.as_ref().map_or(Client::Plain, Client::Tunnel),
            source_ip: Some(self.source),
            destination_ip: Some(self.target.ip()),
            port: self.target.port(),
        };
        policy::decide(snapshot, &connection)
    }

    /// Whether the client's trust domain is the mesh's: all that a verdict asks for beside the server's pod.
    fn is_trusted(&self, snapshot: &Snapshot) -> bool {
        self.identity.as_ref().is_none_or(|identity| snapshot.mesh.trusts(&identity.trust_domain))
    }

    /// How the connection ends, if this snapshot does not allow it.
    fn forbidden(&self, snapshot: &Snapshot, pod: &ServedPod) -> Option<Outcome> {
        // A pod that has left the source ends by itself ([E.5]).
        let own = snapshot.workload(&pod.uid)?;
        let verdict = self.judge(snapshot, own);
        (!verdict.allowed).then(|| Outcome::denied(&verdict))
    }
}

/// Copies until the end, the drain deadline, or a policy that does not allow the connection any more ([D.1]). `judged` is
/// the generation that allowed it; `told` makes an outcome of the copy's end.
pub(super) async fn watched(
    context: &Context,
    pod: &ServedPod,
    subject: &Subject,
    judged: u32,
    mut copied: Pin<&mut impl Future<Output = CopyOutcome>>,
    told: impl FnOnce(CopyOutcome) -> Outcome,
) -> Outcome {
    let mut snapshots = context.snapshot.clone();
    // What has changed while the connection was made is looked at first.
    let now = snapshots.borrow_and_update().clone();
    if now.generation != judged
        && let Some(outcome) = subject.forbidden(&now, pod)
    {
        return outcome;
    }
    // Most changes are about others.
    let mut own = now.workload(&pod.uid).cloned();
    drop(now);
    let cut = context.cut();
    tokio::pin!(cut);
    loop {
        tokio::select! {
            ended = copied.as_mut() => return told(ended),
            () = &mut cut => return Outcome::failed(Flag::Drained, "still open at the drain deadline"),
            changed = snapshots.changed() => {
                if changed.is_err() {
                    return Outcome::failed(Flag::Drained, "the agent ends");
                }
                let snapshot = snapshots.borrow_and_update().clone();
                let next = snapshot.workload(&pod.uid);
                let same = own.as_ref().zip(next).is_some_and(|(own, next)| Arc::ptr_eq(own, next));
                if same && subject.is_trusted(&snapshot) {
                    continue;
                }
                own = next.cloned();
                if let Some(outcome) = subject.forbidden(&snapshot, pod) {
                    return outcome;
                }
            }
        }
    }
}

/// Serves plaintext whose verdict the kernel left to the agent.
pub async fn plaintext(
    context: Rc<Context>,
    pod: Arc<ServedPod>,
    own_port: u16,
    socket: TcpStream,
    remote: SocketAddr,
) {
    let socket = ResetOnClose::inherited(socket);
    // The client is gone already.
    let Ok(local) = socket.get().local_addr().map(canonical) else { return };
    let remote = canonical(remote);
    if local.port() == own_port || !pod.ips.contains(&local.ip()) {
        debug!(uid = %pod.uid, %local, "a process dialled the plaintext listener itself: refused");
        note_dialled(&context, Direction::Inbound, &pod.uid, remote, local);
        return;
    }
    // The agent judges it, here and at every change; whoever lists the pod's sockets leaves it alone.
    if let Err(error) = context.sockets.borrow_mut().mark(socket.get()) {
        debug!(uid = %pod.uid, error = format!("{error:#}"), "a connection could not be marked as the agent's");
    }
    let mut story = Story::new(Direction::Inbound, remote, local);
    let outcome = match Box::pin(judge_plaintext(&context, &pod, socket, local, remote, &mut story)).await {
        Ok(Admitted { subject, word, generation, place, leg, client }) => {
            let charge = place.charge();
            let copied = pin!(copy::bidirectional_plain(leg, client, &story.counters, &charge));
            let told = |ended| Outcome::of_copy(ended, word, "the server", "the client");
            watched(&context, &pod, &subject, generation, copied, told).await
        }
        Err(outcome) => outcome,
    };
    story.end(&context, &outcome);
}

async fn judge_plaintext(
    context: &Context,
    pod: &ServedPod,
    socket: ResetOnClose,
    local: SocketAddr,
    remote: SocketAddr,
    story: &mut Story,
) -> Result<Admitted<ResetOnClose>, Outcome> {
    let mut place = None;
    let own = match context.own(&pod.uid) {
        Some(own) => Some(own),
        None => {
            // Whoever waits has a place, of which there are only so many.
            place = Some(pod.load.inbound(host_at(&context.snapshot(), remote.ip())).map_err(Outcome::limited)?);
            context.own_soon(&pod.uid).await
        }
    };
    let Some((snapshot, own)) = own else {
        story.facts().src_workload = workload_at(&context.snapshot(), remote.ip()).cloned();
        return Err(Outcome::failed(Flag::UnknownWorkload, "the server's pod is not in the source"));
    };
    let facts = story.facts();
    facts.src_workload = workload_at(&snapshot, remote.ip()).cloned();
    facts.dst_workload = Some(own.clone());
    story.open(context);
    let subject = Subject { identity: None, source: remote.ip(), target: local };
    let verdict = subject.judge(&snapshot, &own);
    story.judged(&verdict);
    if !verdict.allowed {
        return Err(Outcome::denied(&verdict));
    }
    story.plaintext(context);
    let place = match place {
        Some(place) => place,
        None => pod.load.inbound(host_at(&snapshot, remote.ip())).map_err(Outcome::limited)?,
    };
    context.make_room(pod, socket.get());
    place.may_have(socket.get().as_raw_fd()).map_err(Outcome::limited)?;
    let leg = context.leg(pod, remote, local, snapshot.mesh.connect_timeout).await;
    Ok(Admitted {
        subject,
        word: verdict.reason.as_str(),
        generation: verdict.generation,
        place,
        leg: leg.map_err(|error| Outcome::failed(Flag::Connect, error))?,
        client: socket,
    })
}
