//! A pod's own connection: captured, routed, and carried through a tunnel or, out of the mesh, as it is.

use std::{io, net::SocketAddr, os::fd::AsRawFd as _, rc::Rc, sync::Arc, time::Duration};

use culvert_common::PORT_HBONE;
use tokio::{net::TcpStream, time::Instant};
use tracing::debug;

use super::{
    Context, ServedPod,
    baggage::baggage,
    canonical,
    copy::{self, ResetOnClose},
    inbound::{Subject, watched},
    keepalive,
    report::{Flag, Outcome, Story, note_dialled},
};
use crate::{
    identity::Unavailable,
    model::ObjectRef,
    policy::{Choice, Route, Snapshot, Workload},
    telemetry::{access::Direction, open::Carried, trace::Trace},
    tunnel::{Authority, Charge, Connect, Host, OpenError, PoolKey, Stream, headers},
};

/// How long a connection waits for a server whose tunnel is not there yet ([T.1]).
const TUNNEL_PATIENCE: Duration = Duration::from_secs(5);
/// The first pause between two attempts; doubled each time, up to [`TUNNEL_PAUSE_MAX`].
const TUNNEL_PAUSE: Duration = Duration::from_millis(25);
const TUNNEL_PAUSE_MAX: Duration = Duration::from_millis(800);

/// Carries one connection, accepted from `client`, to its end, and tells it.
pub async fn serve(context: Rc<Context>, pod: Arc<ServedPod>, socket: TcpStream, client: SocketAddr) {
    // Until an answer has come to its end, no end of ours may look like one.
    let socket = ResetOnClose::inherited(socket);
    let Some(dst) = context.sockets.borrow().original_destination(socket.get()) else {
        debug!(uid = %pod.uid, "a process dialled the outbound listener itself: refused");
        if let Ok(local) = socket.get().local_addr() {
            note_dialled(&context, Direction::Outbound, &pod.uid, client, local);
        }
        return;
    };
    let client = canonical(client);
    let mut story = Story::new(Direction::Outbound, client, dst);
    context.make_room(&pod, socket.get());
    let outcome = match pod.load.outbound(socket.get().as_raw_fd()) {
        Ok(_place) => match Box::pin(reach(&context, &pod, client, dst, &mut story)).await {
            Ok(far) => carry(&context, &pod, socket, far, &story).await,
            Err(outcome) => outcome,
        },
        Err(limit) => {
            story.facts().src_workload = context.snapshot().workload(&pod.uid).cloned();
            story.open(&context);
            Outcome::limited(limit)
        }
    };
    story.end(&context, &outcome);
}

/// The far end of a connection, once there is one. Only this is held for as long as the connection lasts: not the snapshot
/// that led to it.
enum Far {
    /// A tunnel's stream, and what is charged for it.
    Tunnel(Stream, Arc<Charge>),
    /// A server outside the mesh.
    Plaintext(ResetOnClose),
    /// The pod itself, which is judged as its server.
    Itself(Box<Itself>),
}

struct Itself {
    server: ResetOnClose,
    subject: Subject,
    /// Of the verdict.
    generation: u32,
}

async fn carry(context: &Context, pod: &ServedPod, client: ResetOnClose, far: Far, story: &Story) -> Outcome {
    let told = |ended| Outcome::of_copy(ended, "plaintext", "the client", "the server");
    match far {
        Far::Tunnel(stream, charge) => tokio::select! {
            ended = copy::bidirectional(client, stream, &story.counters) => {
                Outcome::of_copy(ended, "tunnelled", "the client", "the server").or_limited(&charge)
            }
            () = context.cut() => drained(),
        },
        Far::Plaintext(server) => {
            let charge = pod.load.charge();
            tokio::select! {
                ended = copy::bidirectional_plain(client, server, &story.counters, &charge) => told(ended),
                () = context.cut() => drained(),
            }
        }
        Far::Itself(itself) => {
            let Itself { server, subject, generation } = *itself;
            let charge = pod.load.charge();
            let mut copied = Box::pin(copy::bidirectional_plain(client, server, &story.counters, &charge));
            Box::pin(watched(context, pod, &subject, generation, copied.as_mut(), told)).await
        }
    }
}

async fn reach(
    context: &Rc<Context>,
    pod: &Arc<ServedPod>,
    client: SocketAddr,
    dst: SocketAddr,
    story: &mut Story,
) -> Result<Far, Outcome> {
    let choice = Choice { random: rand::random(), client: client.ip() };
    let mut until = None;
    loop {
        // Whoever waits has a place, of which its pod has only so many.
        let Some((snapshot, own)) = context.own_soon(&pod.uid).await else {
            return Err(Outcome::failed(Flag::UnknownWorkload, "the client's pod is not in the source"));
        };
        let until = *until.get_or_insert_with(|| Instant::now() + TUNNEL_PATIENCE);
        story.facts().src_workload = Some(own.clone());
        match snapshot.route(&own, dst, choice) {
            Route::Refuse(refusal) => {
                story.open(context);
                return Err(Outcome::failed(Flag::NoRoute(refusal), format_args!("{dst}: {}", refusal.as_str())));
            }
            Route::Plaintext { target, workload, service } => {
                story.heads_for(target, workload, service);
                story.open(context);
                return match context.dial(pod, client.ip(), target, snapshot.mesh.connect_timeout).await {
                    Ok(server) => Ok(Far::Plaintext(ResetOnClose::new(server))),
                    Err(error) => Err(Outcome::failed(Flag::Connect, format_args!("connect to {target}: {error}"))),
                };
            }
            Route::Tunnel { workload, target, service } if workload.uid == own.uid => {
                story.heads_for(target, Some(workload), service);
                story.open(context);
                return to_itself(context, pod, &snapshot, &own, client, target, story).await;
            }
            Route::Tunnel { workload, target, service } => {
                story.heads_for(SocketAddr::new(target.ip(), PORT_HBONE), Some(workload.clone()), service.clone());
                let facts = story.facts();
                facts.hbone_addr = Some(target);
                facts.src_identity = Some(own.identity.clone());
                facts.dst_identity = Some(workload.identity.clone());
                facts.carried = Carried::Tunnel;
                story.open(context);
                let opened = open(
                    context,
                    pod,
                    &own,
                    &workload,
                    client,
                    target,
                    service.as_ref(),
                    &snapshot,
                    until,
                    story.trace,
                )
                .await;
                match opened {
                    Opened::Stream(mut stream) => {
                        let charge = Arc::new(pod.load.charge());
                        stream.charge(charge.clone());
                        return Ok(Far::Tunnel(stream, charge));
                    }
                    Opened::Outdated => {}
                    // Never plaintext instead ([I.10], [T.2]).
                    Opened::Failed(error) => return Err(Outcome::of_open(&error)),
                }
            }
        }
    }
}

/// What came of opening a tunnel.
enum Opened {
    /// It is open.
    Stream(Stream),
    /// Nobody is there, and there is a younger snapshot, by which the server may be elsewhere or out of the mesh.
    Outdated,
    /// It is not, and will not be.
    Failed(OpenError),
}

/// The pod calls itself by its Service: a short cut with the same answer that the tunnel would get.
async fn to_itself(
    context: &Context,
    pod: &ServedPod,
    snapshot: &Snapshot,
    own: &Workload,
    client: SocketAddr,
    target: SocketAddr,
    story: &mut Story,
) -> Result<Far, Outcome> {
    let subject = Subject { identity: Some(own.identity.clone()), source: client.ip(), target };
    let verdict = subject.judge(snapshot, own);
    story.judged(&verdict);
    if !verdict.allowed {
        return Err(Outcome::denied(&verdict));
    }
    match context.leg(pod, client, target, snapshot.mesh.connect_timeout).await {
        Ok(server) => Ok(Far::Itself(Box::new(Itself { server, subject, generation: verdict.generation }))),
        Err(error) => Err(Outcome::failed(Flag::Connect, error)),
    }
}

fn drained() -> Outcome {
    Outcome::failed(Flag::Drained, "still open at the drain deadline")
}

#[expect(clippy::too_many_arguments, reason = "one call; the story of the connection in its own words")]
async fn open(
    context: &Rc<Context>,
    pod: &Arc<ServedPod>,
    own: &Workload,
    server: &Workload,
    client: SocketAddr,
    target: SocketAddr,
    service: Option<&ObjectRef>,
    snapshot: &Snapshot,
    until: Instant,
    trace: Trace,
) -> Opened {
    let key = PoolKey {
        source: own.identity.clone(),
        source_ip: client.ip(),
        destination: SocketAddr::new(target.ip(), PORT_HBONE),
        expected: [server.identity.clone()].into(),
    };
    let request = Connect {
        authority: Authority { host: Host::Ip(target.ip()), port: target.port() },
        forwarded: Some(headers::forwarded(client, service.map(|service| context.names.hostname(service)).as_deref())),
        baggage: Some(baggage(own, &context.names.cluster)),
        traceparent: Some(headers::traceparent(trace.id, trace.span)),
    };
    let patience = snapshot.mesh.connect_timeout;
    let dial = || {
        let (context, pod, key) = (context.clone(), pod.clone(), key.clone());
        async move {
            let expected: Vec<_> = key.expected.iter().cloned().collect();
            let tls = context.identities.client_config(&key.source, &expected).await?;
            let socket = context.dial(&pod, key.source_ip, key.destination, patience).await?;
            keepalive(&socket);
            Ok((socket, tls))
        }
    };
    // A tunnel that stands outlives its certificate; new connections do not ([I.7]).
    match context.identities.ready(&own.identity).await {
        Ok(()) => {}
        // The last pod of the identity is just leaving the mesh.
        Err(Unavailable::NotWanted(_)) if context.snapshot().generation != snapshot.generation => {
            return Opened::Outdated;
        }
        Err(error) => return Opened::Failed(OpenError::Connect(Arc::new(error.into()))),
    }
    let mut pause = TUNNEL_PAUSE;
    loop {
        match context.pool.open(Some(pod.load.account()), &key, &request, dial).await {
            // The pod is just being enrolled or leaving, or its agent is just being replaced.
            Err(error) if nobody_there(&error) && Instant::now() + pause < until => {
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(TUNNEL_PAUSE_MAX);
                if context.snapshot().generation != snapshot.generation {
                    return Opened::Outdated;
                }
            }
            Ok(stream) => return Opened::Stream(stream),
            Err(error) => return Opened::Failed(error),
        }
    }
}

/// Nobody answered, so that nothing can have been done with the request.
fn nobody_there(error: &OpenError) -> bool {
    match error {
        OpenError::Connect(error) => error.downcast_ref::<io::Error>().is_some_and(|error| {
            matches!(error.kind(), io::ErrorKind::ConnectionRefused | io::ErrorKind::ConnectionReset)
        }),
        OpenError::Aborted(_) => true,
        OpenError::ConnectTimeout
        | OpenError::HandshakeTimeout
        | OpenError::Tls(_)
        | OpenError::Protocol(_)
        | OpenError::Lost(_)
        | OpenError::Reset(_)
        | OpenError::Refused { .. }
        | OpenError::BadRequest(_)
        | OpenError::Closed => false,
    }
}
