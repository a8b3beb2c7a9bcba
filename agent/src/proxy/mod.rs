//! The story of one connection: captured in a pod and carried out ([`outbound`]), or arrived for a pod and delivered
//! ([`inbound`]); [`copy`] moves its bytes.
//!
//! Everything of a connection happens on one worker's thread, from accept to end. Who is enrolled, what the policy is
//! and which certificates there are is decided elsewhere; here the answers are carried out, and told in the access log.

use std::{
    cell::RefCell,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::AsRawFd as _,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use culvert_common::LEG_SOURCE_PREFIX;
use socket2::{Domain, Protocol, Socket, TcpKeepalive, Type};
use tokio::{net::TcpStream, sync::watch, time::timeout};

use self::copy::ResetOnClose;
use crate::{
    datapath::{Leg, NetnsCookie, Sockets},
    drain,
    identity::Identities,
    limits::Load,
    model::PodUid,
    netns::NetnsHandle,
    policy::{Occupant, Snapshot, Workload},
    telemetry::{access::AccessLog, limit::Limiter, open::Shard, tally::Tally, trace::Tracer, traffic::Names},
    tunnel,
};

mod baggage;
pub mod copy;
pub mod inbound;
pub mod outbound;
mod report;

pub(crate) use report::Flag as Failure;

/// Within this time a connection inside the pod stands, unless the application's accept queue is full or there is none.
const LEG_AT_ONCE: Duration = Duration::from_millis(25);
/// How often the handshake of a leg is looked at while the application's accept queue is full.
const LEG_POLL: Duration = Duration::from_millis(1);
/// How long a connection waits for its pod to be in the source ([D.4]).
const WORKLOAD_PATIENCE: Duration = Duration::from_secs(5);

/// A pod of this node as workers serve it.
#[derive(Debug)]
pub struct ServedPod {
    /// Which pod.
    pub uid: PodUid,
    /// Its network namespace, kept open.
    pub netns: Arc<NetnsHandle>,
    /// Cookie of that namespace.
    pub cookie: NetnsCookie,
    /// Its addresses.
    pub ips: Vec<IpAddr>,
    /// What it has of the agent.
    pub load: Arc<Load>,
}

/// What all connections of one worker share.
pub struct Context {
    /// The policy in force.
    pub snapshot: watch::Receiver<Arc<Snapshot>>,
    /// The certificates.
    pub identities: Identities,
    /// Tunnels to other pods.
    pub pool: tunnel::Pool,
    /// Limits of tunnels.
    pub tunnel: tunnel::Config,
    /// Refuses tunnels from the address of a pod that has another identity than the peer proves ([I.11]).
    pub refuse_mismatch: bool,
    /// This worker's view of the kernel's maps.
    pub sockets: RefCell<Sockets>,
    /// Where this worker's open connections are entered.
    pub open: Shard,
    /// Where this worker's handshakes and tunnels are counted.
    pub tally: Arc<Tally>,
    /// Where spans go.
    pub tracer: Tracer,
    /// Bounds the lines that a pod can cause.
    pub limiter: RefCell<Limiter>,
    /// Where ends of connections are told.
    pub access: AccessLog,
    /// Names of this cluster.
    pub names: Names,
    /// Says when it is time to finish.
    pub drain: drain::Watch,
}

impl Context {
    /// The snapshot of this moment: one connection is judged by one.
    fn snapshot(&self) -> Arc<Snapshot> {
        self.snapshot.borrow().clone()
    }

    /// The pod as the snapshot of this moment has it, with that snapshot.
    fn own(&self, uid: &PodUid) -> Option<(Arc<Snapshot>, Arc<Workload>)> {
        own(&self.snapshot.borrow(), uid)
    }

    /// [`own`](Self::own), as soon as a snapshot has the pod ([D.4]); `None` if none does within [`WORKLOAD_PATIENCE`], or
    /// until the drain's deadline. How many wait is for the caller to bound: each has a place that counts against a limit.
    async fn own_soon(&self, uid: &PodUid) -> Option<(Arc<Snapshot>, Arc<Workload>)> {
        if let Some(own) = self.own(uid) {
            return Some(own);
        }
        // Boxed: hardly any connection waits, and each would have the room for it.
        Box::pin(async {
            tokio::select! {
                known = known(self.snapshot.clone(), uid) => known,
                () = self.cut() => None,
            }
        })
        .await
    }

    /// Gives up what can be had again if `socket`, which is for the pod, has got one of the last descriptors.
    fn make_room(&self, pod: &ServedPod, socket: &TcpStream) {
        if pod.load.is_scarce(socket.as_raw_fd()) {
            self.pool.shed();
        }
    }

    /// Resolves when open connections must be cut: the drain's deadline ([H.4]).
    async fn cut(&self) {
        let deadline = self.drain.clone().started().await;
        tokio::time::sleep_until(deadline).await;
    }

    /// A socket of the agent's own in the pod's namespace, connected to `target` from `source`.
    async fn dial(
        &self,
        pod: &ServedPod,
        source: IpAddr,
        target: SocketAddr,
        patience: Duration,
    ) -> io::Result<TcpStream> {
        let socket = socket_in(pod, target)?;
        self.sockets.borrow_mut().mark(&socket).map_err(io::Error::other)?;
        bind(&socket, source)?;
        connect(socket, target, patience).await
    }

    /// The agent's leg to the application at `target`, which sees `client` as its peer ([K.3]).
    async fn leg(
        &self,
        pod: &ServedPod,
        client: SocketAddr,
        target: SocketAddr,
        patience: Duration,
    ) -> anyhow::Result<ResetOnClose> {
        let deadline = Instant::now() + patience;
        let stream = match target {
            SocketAddr::V4(_) => self.leg_from(pod, client, leg_source(), target, patience).await,
            // Linux sends no reset from an address of the pod to `::1`, so that a port on which nobody listens would be
            // a time-out. What is not connected at once is asked for again from an address that is answered.
            SocketAddr::V6(_) => {
                match self.leg_from(pod, client, Ipv6Addr::LOCALHOST.into(), target, LEG_AT_ONCE.min(patience)).await {
                    Err(error) if timed_out(&error) => {
                        self.leg_from(pod, client, target.ip(), target, patience.saturating_sub(LEG_AT_ONCE)).await
                    }
                    other => other,
                }
            }
        };
        let stream = stream.with_context(|| format!("connect to the application at {target}"))?;
        let source = stream.get().local_addr().context("address of the leg")?;
        loop {
            let state = self.sockets.borrow_mut().leg(source, target);
            match state {
                Leg::Taken => return Ok(stream),
                Leg::Waiting if Instant::now() < deadline => tokio::time::sleep(LEG_POLL).await,
                Leg::Waiting => {
                    self.sockets.borrow_mut().forget_leg(source, target);
                    anyhow::bail!("the application at {target} does not accept: its backlog is full");
                }
                Leg::Lost => {
                    anyhow::bail!(
                        "the client's address could not be shown to the application: refused (FLOWS is full)"
                    );
                }
            }
        }
    }

    async fn leg_from(
        &self,
        pod: &ServedPod,
        client: SocketAddr,
        source: IpAddr,
        target: SocketAddr,
        patience: Duration,
    ) -> anyhow::Result<ResetOnClose> {
        let socket = socket_in(pod, target).context("make a socket in the pod")?;
        self.sockets.borrow_mut().mark_leg(&socket, client)?;
        bind(&socket, source).with_context(|| format!("bind to {source} in the pod"))?;
        Ok(ResetOnClose::new(connect(socket, target, patience).await?))
    }
}

fn own(snapshot: &Arc<Snapshot>, uid: &PodUid) -> Option<(Arc<Snapshot>, Arc<Workload>)> {
    let own = snapshot.workload(uid)?.clone();
    Some((snapshot.clone(), own))
}

/// The first snapshot within [`WORKLOAD_PATIENCE`] that has the pod.
async fn known(mut snapshots: watch::Receiver<Arc<Snapshot>>, uid: &PodUid) -> Option<(Arc<Snapshot>, Arc<Workload>)> {
    match timeout(WORKLOAD_PATIENCE, snapshots.wait_for(|snapshot| snapshot.workload(uid).is_some())).await {
        Ok(Ok(snapshot)) => own(&snapshot, uid),
        // The agent ends; or it was in vain.
        Ok(Err(_)) | Err(_) => None,
    }
}

fn timed_out(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::TimedOut)
}

/// Only when exactly one pod has the address, and, where an identity was proved, only if it is that pod's.
fn workload_at(snapshot: &Snapshot, ip: IpAddr) -> Option<&Arc<Workload>> {
    match snapshot.workload_by_ip(ip)? {
        Occupant::One(workload) => Some(workload),
        Occupant::Ambiguous => None,
    }
}

fn canonical(addr: SocketAddr) -> SocketAddr {
    SocketAddr::new(addr.ip().to_canonical(), addr.port())
}

fn socket_in(pod: &ServedPod, target: SocketAddr) -> io::Result<Socket> {
    // One system call, where `Socket::new` makes one for each flag.
    let kind = Type::STREAM.nonblocking().cloexec();
    let socket = pod.netns.run(|| Socket::new_raw(Domain::for_address(target), kind, Some(Protocol::TCP)))??;
    socket.set_tcp_nodelay(true)?;
    Ok(socket)
}

async fn connect(socket: Socket, target: SocketAddr, patience: Duration) -> io::Result<TcpStream> {
    match socket.connect(&target.into()) {
        // Inside one node the handshake is over before the call returns, although it says that it is in progress.
        Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) && socket.peer_addr().is_err() => {}
        Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => return Err(error),
        _ => return TcpStream::from_std(socket.into()),
    }
    let stream = TcpStream::from_std(socket.into())?;
    let connected = async {
        stream.writable().await?;
        match stream.take_error()? {
            Some(error) => Err(error),
            None => Ok(()),
        }
    };
    match timeout(patience, connected).await {
        Ok(result) => result.map(|()| stream),
        Err(_) => Err(io::Error::new(io::ErrorKind::TimedOut, format!("no answer within {patience:?}"))),
    }
}

/// Binds to an address and leaves the port to connect(2), which may take one that is in use towards another server, or
/// waits in TIME_WAIT; bind(2) would want one of the about 28 000 that nobody uses at all.
fn bind(socket: &Socket, source: IpAddr) -> io::Result<()> {
    let on: libc::c_int = 1;
    let length = size_of_val(&on) as libc::socklen_t;
    // SAFETY: `on` has `length` readable bytes. The option of IPPROTO_IP holds for IPv6 sockets too.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_IP,
            libc::IP_BIND_ADDRESS_NO_PORT,
            (&raw const on).cast(),
            length,
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    socket.bind(&SocketAddr::new(source, 0).into())
}

/// A loopback source for an IPv4 leg, spread over 127.6.0.0/16, so that ports never run out. (IPv6 has only `::1`, whose
/// ports in TIME_WAIT the kernel uses again after a second.)
fn leg_source() -> IpAddr {
    let [first, second] = LEG_SOURCE_PREFIX;
    let [third, fourth] = rand::random::<[u8; 2]>();
    // .0 and .255 of the range would do as well; humans read them as networks.
    Ipv4Addr::new(first, second, third, fourth.clamp(1, 254)).into()
}

/// Makes the close of a socket a reset, be it by us or, when the agent is killed, by the kernel.
fn reset_on_close(socket: &TcpStream) {
    // Fails only on a socket that has no connection, where there is nothing to reset.
    let _ = socket2::SockRef::from(socket).set_linger(Some(Duration::ZERO));
}

/// TCP keepalive of tunnels (specification §14.3).
fn keepalive(socket: &TcpStream) {
    let keepalive =
        TcpKeepalive::new().with_time(Duration::from_secs(180)).with_interval(Duration::from_secs(180)).with_retries(9);
    // A tunnel without it is found dead by its PINGs.
    let _ = socket2::SockRef::from(socket).set_tcp_keepalive(&keepalive);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        policy::{self, Options},
        source::review::Manifests,
    };

    const WEB: &str = "
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: default, uid: web}
spec: {nodeName: node-a, containers: [{name: c, image: i}]}
status: {phase: Running, podIP: 10.0.0.2}
";

    fn snapshot(manifests: &str) -> Arc<Snapshot> {
        let view = Manifests::of("manifests.yaml", manifests).view("istio-system");
        Arc::new(policy::compile(&view.cluster, &Options::default(), None))
    }

    fn web() -> PodUid {
        PodUid("web".into())
    }

    /// [D.4]: the wait ends with the snapshot that has the pod, and not with any other.
    #[tokio::test(start_paused = true)]
    async fn a_connection_waits_until_its_pod_is_in_the_source() {
        let ((source, snapshots), web) = (watch::channel(snapshot("")), web());
        let started = tokio::time::Instant::now();
        let publish = async {
            for _ in 0..3 {
                tokio::time::sleep(Duration::from_secs(1)).await;
                source.send_replace(snapshot(&WEB.replace("web", "other")));
            }
            tokio::time::sleep(Duration::from_secs(1)).await;
            source.send_replace(snapshot(WEB));
        };
        let (own, ()) = tokio::join!(known(snapshots, &web), publish);
        assert_eq!(own.expect("it came").1.uid, web);
        assert_eq!(started.elapsed().as_secs(), 4);
    }

    /// [D.4]: bounded; other changes of the source do not make it longer, and an agent that ends makes it shorter.
    #[tokio::test(start_paused = true)]
    async fn a_connection_of_a_pod_that_does_not_come_is_given_up_after_five_seconds() {
        let ((source, snapshots), web) = (watch::channel(snapshot("")), web());
        let started = tokio::time::Instant::now();
        let others = async {
            loop {
                tokio::time::sleep(Duration::from_millis(700)).await;
                source.send_replace(snapshot(""));
            }
        };
        tokio::select! {
            own = known(snapshots.clone(), &web) => assert!(own.is_none()),
            () = others => {}
        }
        let waited = started.elapsed();
        assert_eq!(waited.as_secs(), 5);
        drop(source);
        assert!(known(snapshots, &web).await.is_none());
        assert_eq!(started.elapsed(), waited, "at once");
    }
}
