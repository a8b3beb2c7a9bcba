//! One thread that carries connections: its own runtime, its own tunnels, its own listeners in every pod.
//!
//! Which pods there are is told to it; everything of a connection stays here from accept to end. Every task is owned:
//! an accept loop owns its connections, the worker owns the loops.

use std::{
    collections::HashMap,
    io,
    net::SocketAddr,
    rc::Rc,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use anyhow::Context as _;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{mpsc, watch},
    task::{JoinSet, LocalSet},
    time::{Instant, MissedTickBehavior, interval, timeout_at},
};
use tracing::{error, warn};

use crate::{
    busy_poll,
    datapath::{NetnsCookie, monotonic_ns},
    drain::{self, Cause, Order},
    listen::Listeners,
    proxy::{Context, ServedPod, inbound, outbound},
    telemetry::panics,
};

/// How often a worker shows that its thread is not stuck.
const TICK: Duration = Duration::from_millis(500);
/// After a failed accept (no descriptor is left): time for connections to end.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// After another agent has taken over, a listener without connections is closed when nothing has come for this long: a
/// handshake that was under way is done by then, also if one of its packets was lost (a SYN-ACK is sent again after a
/// second).
const QUIET: Duration = Duration::from_millis(1500);
/// More than a connection's own deadline, so that each can tell its end.
const CUT_SHORT: Duration = Duration::from_millis(250);

/// In the log.
const CONNECTION: &str = "connection";

/// What a worker is told.
#[derive(Debug)]
pub enum Command {
    /// Accept the pod's connections from these listeners.
    Serve(Arc<Pod>, Listeners),
    /// Accept no more; open connections go on ([E.5]).
    Leave(NetnsCookie),
}

/// A pod as it is handed to every worker.
pub type Pod = ServedPod;

/// A running worker.
#[derive(Debug)]
pub struct Worker {
    commands: mpsc::UnboundedSender<Command>,
    seen_ns: Arc<AtomicU64>,
    thread: thread::JoinHandle<()>,
}

impl Worker {
    /// Starts a worker's thread, which polls for at most `poll` before it sleeps. `context` is called on it.
    ///
    /// # Errors
    /// The thread or its runtime could not be made.
    pub fn start(
        number: u32,
        drain: drain::Watch,
        poll: Duration,
        context: impl FnOnce() -> anyhow::Result<Context> + Send + 'static,
    ) -> anyhow::Result<Self> {
        let (commands, orders) = mpsc::unbounded_channel();
        let seen_ns = Arc::new(AtomicU64::new(monotonic_ns()));
        let runtime = busy_poll::hook(&mut tokio::runtime::Builder::new_current_thread())
            .enable_all()
            .event_interval(31)
            .build()
            .context("build a worker's runtime")?;
        let seen = seen_ns.clone();
        let (report, started) = std::sync::mpsc::sync_channel(1);
        let thread = thread::Builder::new()
            .name(format!("culvert-worker-{number}"))
            .spawn(move || match context() {
                Ok(context) => {
                    // The starter waits for this.
                    let _ = report.send(Ok(()));
                    let _part = busy_poll::start(&runtime, poll);
                    LocalSet::new().block_on(&runtime, run(Rc::new(context), orders, drain, seen));
                }
                Err(error) => {
                    let _ = report.send(Err(error));
                }
            })
            .context("start a worker's thread")?;
        started.recv().context("a worker ended while it started")??;
        Ok(Self { commands, seen_ns, thread })
    }

    /// Tells the worker something; lost if it has ended.
    pub fn tell(&self, command: Command) {
        if self.commands.send(command).is_err() {
            error!("a worker has ended before its time");
        }
    }

    /// Whether its thread has ended, which it does not while it is needed.
    pub fn has_ended(&self) -> bool {
        self.thread.is_finished()
    }

    /// Time since the worker last showed that it is not stuck.
    pub fn silent_for(&self) -> Duration {
        Duration::from_nanos(monotonic_ns().saturating_sub(self.seen_ns.load(Ordering::Relaxed)))
    }

    /// Waits for the thread, which ends once its drain has. One that is stuck in spite of that is left to the end of the
    /// process, which is next.
    pub fn join(self, patience: Duration) {
        drop(self.commands);
        let until = std::time::Instant::now() + patience;
        while !self.thread.is_finished() && std::time::Instant::now() < until {
            thread::sleep(Duration::from_millis(1));
        }
        if !self.thread.is_finished() {
            error!("a worker does not end");
        } else if self.thread.join().is_err() {
            error!("a worker panicked");
        }
    }
}

async fn run(
    context: Rc<Context>,
    mut orders: mpsc::UnboundedReceiver<Command>,
    mut drain: drain::Watch,
    seen_ns: Arc<AtomicU64>,
) {
    let mut pods: HashMap<NetnsCookie, watch::Sender<bool>> = HashMap::new();
    let mut loops = JoinSet::new();
    let mut tick = interval(TICK);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let order = loop {
        tokio::select! {
            order = drain.order() => break order,
            _ = tick.tick() => {
                seen_ns.store(monotonic_ns(), Ordering::Relaxed);
                context.limiter.borrow_mut().tell(std::time::Instant::now());
            }
            Some(ended) = loops.join_next() => panics::ended("accept loop", ended),
            order = orders.recv() => match order {
                Some(Command::Serve(pod, listeners)) => {
                    let stop = watch::Sender::new(false);
                    if let Err(error) = serve(&context, &pod, listeners, &stop, &mut loops) {
                        error!(uid = %pod.uid, %error, "a pod's listeners could not be used");
                    }
                    pods.insert(pod.cookie, stop);
                }
                // Dropping the sender says it.
                Some(Command::Leave(cookie)) => drop(pods.remove(&cookie)),
                None => break Order { deadline: Instant::now(), cause: Cause::End },
            },
        }
    };
    let ended = async {
        while let Some(ended) = loops.join_next().await {
            panics::ended("accept loop", ended);
        }
    };
    if timeout_at(order.deadline + CUT_SHORT, ended).await.is_err() {
        loops.shutdown().await;
    }
    context.pool.drain(order.deadline).await;
}

fn serve(
    context: &Rc<Context>,
    pod: &Arc<Pod>,
    listeners: Listeners,
    stop: &watch::Sender<bool>,
    loops: &mut JoinSet<()>,
) -> io::Result<()> {
    let drain = &context.drain;
    let failed = |context: &Rc<Context>, pod: &Arc<Pod>| {
        let (context, pod) = (context.clone(), pod.clone());
        move |error: &io::Error| not_accepted(&context, &pod, error)
    };
    let Listeners { outbound, tunnel, plaintext } = listeners;
    // A loop of its own for each kind: a connection's task is as large as its kind needs, and not as the largest.
    {
        let (context, pod) = (context.clone(), pod.clone());
        let (listener, _) = listening(outbound)?;
        let failed = failed(&context, &pod);
        let one = move |socket, peer| outbound::serve(context.clone(), pod.clone(), socket, peer);
        loops.spawn_local(accept(listener, stop.subscribe(), drain.clone(), one, failed));
    }
    {
        let (context, pod, left) = (context.clone(), pod.clone(), stop.subscribe());
        let failed = failed(&context, &pod);
        let (listener, _) = listening(tunnel)?;
        let one = move |socket, peer| {
            let mut left = left.clone();
            let left = async move {
                // Only ever dropped, never sent to.
                let _ = left.changed().await;
            };
            inbound::tunnel(context.clone(), pod.clone(), socket, peer, left)
        };
        loops.spawn_local(accept(listener, stop.subscribe(), drain.clone(), one, failed));
    }
    let (context, pod) = (context.clone(), pod.clone());
    let (listener, own_port) = listening(plaintext)?;
    let failed = failed(&context, &pod);
    let one = move |socket, peer| inbound::plaintext(context.clone(), pod.clone(), own_port, socket, peer);
    loops.spawn_local(accept(listener, stop.subscribe(), drain.clone(), one, failed));
    Ok(())
}

/// A listener for this thread's runtime, and its port.
fn listening(listener: std::net::TcpListener) -> io::Result<(TcpListener, u16)> {
    let listener = TcpListener::from_std(listener)?;
    let port = listener.local_addr()?.port();
    Ok((listener, port))
}

/// Tells that a pod's connections cannot be accepted, which its own may be the cause of.
fn not_accepted(context: &Context, pod: &Pod, error: &io::Error) {
    let snapshot = context.snapshot.borrow();
    let own = snapshot.workload(&pod.uid).map(Arc::as_ref);
    if context.limiter.borrow_mut().admits(own, "accept-failed", std::time::Instant::now()) {
        warn!(pod = own.map(|own| own.object.to_string()), uid = %pod.uid, %error, "accept failed");
    }
}

/// Accepts until the pod leaves or the agent ends, and owns what it has accepted.
async fn accept<F>(
    listener: TcpListener,
    mut stop: watch::Receiver<bool>,
    mut drain: drain::Watch,
    one: impl Fn(TcpStream, SocketAddr) -> F,
    failed: impl Fn(&io::Error),
) where
    F: Future<Output = ()> + 'static,
{
    let mut connections = JoinSet::new();
    let order = loop {
        tokio::select! {
            // Only ever dropped, never sent to.
            _ = stop.changed() => break None,
            order = drain.order() => break Some(order),
            Some(ended) = connections.join_next() => panics::ended(CONNECTION, ended),
            accepted = listener.accept() => take(accepted, &mut connections, &one, &failed).await,
        }
    };
    // The successor's listeners are others: what was on its way to this one comes to nobody else.
    if let Some(Order { deadline, cause: Cause::HandedOver }) = order {
        let mut quiet_at = Instant::now() + QUIET;
        while Instant::now() < deadline && (Instant::now() < quiet_at || !connections.is_empty()) {
            let next = if connections.is_empty() { quiet_at.min(deadline) } else { deadline };
            tokio::select! {
                _ = stop.changed() => break,
                Some(ended) = connections.join_next() => panics::ended(CONNECTION, ended),
                accepted = listener.accept() => {
                    take(accepted, &mut connections, &one, &failed).await;
                    quiet_at = Instant::now() + QUIET;
                }
                () = tokio::time::sleep_until(next) => {}
            }
        }
    }
    // Their handshakes are done, so their clients believe that they are connected. The kernel is asked, and not tokio, which
    // may not have heard of them.
    if let Ok(listener) = listener.into_std() {
        while let Ok((socket, peer)) = listener.accept() {
            if socket.set_nonblocking(true).is_ok()
                && let Ok(socket) = TcpStream::from_std(socket)
            {
                connections.spawn_local(one(socket, peer));
            }
        }
    }
    while let Some(ended) = connections.join_next().await {
        panics::ended(CONNECTION, ended);
    }
}

async fn take<F>(
    accepted: io::Result<(TcpStream, SocketAddr)>,
    connections: &mut JoinSet<()>,
    one: &impl Fn(TcpStream, SocketAddr) -> F,
    failed: &impl Fn(&io::Error),
) where
    F: Future<Output = ()> + 'static,
{
    match accepted {
        Ok((socket, peer)) => drop(connections.spawn_local(one(socket, peer))),
        Err(error) => {
            failed(&error);
            tokio::time::sleep(ACCEPT_PAUSE).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    fn size_of_task<A, B, C, D, F: Future>(_: impl Fn(A, B, C, D) -> F) -> usize {
        size_of::<F>()
    }

    /// Most of what an idle connection costs the agent is the task that waits for it: one is made once for each, so that
    /// what is added to any state of it is paid ten thousand times.
    #[test]
    fn a_connections_task_is_small() {
        let (outbound, stream) = (size_of_task(outbound::serve), size_of_task(inbound::stream));
        eprintln!("outbound {outbound} bytes, a tunnel's stream {stream}");
        assert!(outbound <= 1792 && stream <= 1856, "{outbound} {stream}");
    }

    /// The first byte says what becomes of the connection: `p` panics, `e` echoes until the end.
    async fn one(mut socket: TcpStream, _peer: SocketAddr) {
        let mut byte = [0];
        while socket.read_exact(&mut byte).await.is_ok() {
            assert!(byte != *b"p", "asked to panic");
            socket.write_all(&byte).await.expect("the client reads");
        }
    }

    async fn echoed(client: &mut TcpStream) -> io::Result<u8> {
        client.write_all(b"e").await?;
        client.read_u8().await
    }

    /// An accept loop, as a worker runs it, and what `scenario` does to it.
    fn with_loop<F: Future<Output = ()>>(scenario: impl FnOnce(SocketAddr, drain::Signal) -> F) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        LocalSet::new().block_on(&runtime, async {
            let socket = tokio::net::TcpSocket::new_v4().expect("a socket");
            socket.bind("127.0.0.1:0".parse().expect("a literal")).expect("a free port");
            let listener = socket.listen(1024).expect("room for all who wait");
            let addr = listener.local_addr().expect("bound");
            let (signal, drain) = drain::channel();
            let stop = watch::Sender::new(false);
            let mut loops = JoinSet::new();
            let failed = |error: &io::Error| panic!("accept: {error}");
            loops.spawn_local(accept(listener, stop.subscribe(), drain, one, failed));
            tokio::time::timeout(Duration::from_secs(60), scenario(addr, signal)).await.expect("in time");
            while let Some(ended) = loops.join_next().await {
                ended.expect("the loop does not panic");
            }
            // The pod has stayed.
            drop(stop);
        });
    }

    #[test]
    fn a_panic_in_one_connection_is_counted_and_harms_no_other() {
        panics::install();
        let before = panics::count();
        with_loop(|addr, signal| async move {
            let mut other = TcpStream::connect(addr).await.expect("accepted");
            assert_eq!(echoed(&mut other).await.expect("echo"), b'e');
            for _ in 0..3 {
                let mut client = TcpStream::connect(addr).await.expect("accepted");
                client.write_all(b"p").await.expect("sent");
                assert!(client.read_u8().await.is_err(), "the connection that panicked has ended");
            }
            assert_eq!(echoed(&mut other).await.expect("an older connection goes on"), b'e');
            let mut new = TcpStream::connect(addr).await.expect("the loop goes on");
            assert_eq!(echoed(&mut new).await.expect("echo"), b'e');
            drop((other, new, signal));
        });
        // Other tests of this process may panic at the same time.
        assert!(panics::count() >= before + 3, "{} and {before}", panics::count());
    }

    /// [H.4]: whoever waits in the accept queue has been told by the kernel that it is connected.
    #[test]
    fn at_the_end_waiting_connections_are_taken_and_later_ones_refused() {
        with_loop(|addr, mut signal| async move {
            // Not one of them is accepted before the drain begins: the loop does not run until this task waits.
            let waiting: Vec<_> = (0..300).map(|_| std::net::TcpStream::connect(addr).expect("queued")).collect();
            let draining = signal.drain(Cause::End, Duration::from_secs(20));
            let clients = async {
                for client in waiting {
                    client.set_nonblocking(true).expect("nonblocking");
                    let mut client = TcpStream::from_std(client).expect("a socket");
                    assert_eq!(echoed(&mut client).await.expect("served"), b'e');
                }
                assert!(TcpStream::connect(addr).await.is_err(), "the listener is closed");
            };
            let (drained, ()) = tokio::join!(draining, clients);
            assert_eq!(drained, Ok(()));
        });
    }

    /// After another agent has taken over, what still arrives here is served, and the loop ends by itself.
    #[test]
    fn a_relieved_listener_serves_what_still_arrives_until_it_is_quiet() {
        with_loop(|addr, mut signal| async move {
            let started = Instant::now();
            let last = Cell::new(started);
            let draining = async { signal.drain(Cause::HandedOver, Duration::from_secs(60)).await };
            let clients = async {
                for _ in 0..3 {
                    tokio::time::sleep(QUIET / 3).await;
                    let mut client = TcpStream::connect(addr).await.expect("still accepted");
                    last.set(Instant::now());
                    assert_eq!(echoed(&mut client).await.expect("served"), b'e');
                }
            };
            let (drained, ()) = tokio::join!(draining, clients);
            assert_eq!(drained, Ok(()));
            assert!(last.get().elapsed() >= QUIET - Duration::from_millis(50), "closed before it was quiet");
        });
    }

    /// … but never beyond the deadline of the drain.
    #[test]
    fn a_relieved_listener_closes_at_the_deadline() {
        with_loop(|addr, mut signal| async move {
            let client = TcpStream::connect(addr).await.expect("accepted");
            let end = signal.drain(Cause::HandedOver, Duration::from_millis(300)).await;
            assert_eq!(end, Err(drain::Unfinished(1)), "a connection is held open");
            assert!(TcpStream::connect(addr).await.is_err(), "the listener is closed");
            drop(client);
        });
    }
}
