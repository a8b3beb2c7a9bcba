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
use culvert_common::ListenerKind;
use futures_util::FutureExt as _;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{mpsc, watch},
    task::{JoinSet, LocalSet},
    time::{Instant, MissedTickBehavior, interval, timeout_at},
};
use tracing::{error, warn};

use crate::{
    datapath::{NetnsCookie, monotonic_ns},
    drain,
    listen::Listeners,
    proxy::{Context, ServedPod, inbound, outbound},
};

/// How often a worker shows that its thread is not stuck.
const TICK: Duration = Duration::from_millis(500);
/// After a failed accept (no descriptor is left): time for connections to end.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

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
    /// Starts a worker's thread. `context` is called on it.
    ///
    /// # Errors
    /// The thread or its runtime could not be made.
    pub fn start(
        number: u32,
        drain: drain::Watch,
        context: impl FnOnce() -> anyhow::Result<Context> + Send + 'static,
    ) -> anyhow::Result<Self> {
        let (commands, orders) = mpsc::unbounded_channel();
        let seen_ns = Arc::new(AtomicU64::new(monotonic_ns()));
        let runtime = tokio::runtime::Builder::new_current_thread()
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

    /// Time since the worker last showed that it is not stuck.
    pub fn silent_for(&self) -> Duration {
        Duration::from_nanos(monotonic_ns().saturating_sub(self.seen_ns.load(Ordering::Relaxed)))
    }

    /// Waits for the thread, which ends once its drain has.
    pub fn join(self) {
        drop(self.commands);
        if self.thread.join().is_err() {
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
    let deadline = loop {
        tokio::select! {
            deadline = drain.started() => break deadline,
            _ = tick.tick() => seen_ns.store(monotonic_ns(), Ordering::Relaxed),
            Some(ended) = loops.join_next() => told(ended),
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
                None => break Instant::now(),
            },
        }
    };
    drop(pods);
    let ended = async {
        while let Some(ended) = loops.join_next().await {
            told(ended);
        }
    };
    // A little more than the connections' own deadline, so that each can tell its end.
    if timeout_at(deadline + Duration::from_millis(250), ended).await.is_err() {
        loops.shutdown().await;
    }
    context.pool.drain(deadline).await;
}

fn serve(
    context: &Rc<Context>,
    pod: &Arc<Pod>,
    listeners: Listeners,
    stop: &watch::Sender<bool>,
    loops: &mut JoinSet<()>,
) -> io::Result<()> {
    let Listeners { outbound, tunnel, plaintext } = listeners;
    for (kind, listener) in
        [(ListenerKind::Outbound, outbound), (ListenerKind::Tunnel, tunnel), (ListenerKind::Plaintext, plaintext)]
    {
        let listener = TcpListener::from_std(listener)?;
        loops.spawn_local(accept(context.clone(), pod.clone(), kind, listener, stop.subscribe()));
    }
    Ok(())
}

async fn accept(
    context: Rc<Context>,
    pod: Arc<Pod>,
    kind: ListenerKind,
    listener: TcpListener,
    mut stop: watch::Receiver<bool>,
) {
    let own_port = listener.local_addr().map_or(0, |addr| addr.port());
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            // Only ever dropped, never sent to.
            _ = stop.changed() => break,
            Some(ended) = connections.join_next() => told(ended),
            accepted = listener.accept() => match accepted {
                Ok((socket, peer)) => {
                    connections.spawn_local(one(context.clone(), pod.clone(), kind, own_port, socket, peer, stop.clone()));
                }
                Err(error) => {
                    warn!(uid = %pod.uid, %error, "accept failed");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            },
        }
    }
    // Their handshakes are done, so their clients believe that they are connected.
    while let Some(Ok((socket, peer))) = listener.accept().now_or_never() {
        connections.spawn_local(one(context.clone(), pod.clone(), kind, own_port, socket, peer, stop.clone()));
    }
    drop(listener);
    while let Some(ended) = connections.join_next().await {
        told(ended);
    }
}

async fn one(
    context: Rc<Context>,
    pod: Arc<Pod>,
    kind: ListenerKind,
    own_port: u16,
    socket: TcpStream,
    peer: SocketAddr,
    mut stop: watch::Receiver<bool>,
) {
    let left = async move {
        // Only ever dropped, never sent to.
        let _ = stop.changed().await;
    };
    match kind {
        ListenerKind::Outbound => outbound::serve(context, pod, socket, peer).await,
        ListenerKind::Tunnel => inbound::tunnel(context, pod, socket, peer, left).await,
        ListenerKind::Plaintext => inbound::plaintext(context, pod, own_port, socket, peer).await,
    }
}

/// A panic in one connection ends that connection.
fn told(ended: Result<(), tokio::task::JoinError>) {
    if let Err(error) = ended
        && error.is_panic()
    {
        error!(%error, "a connection's task panicked; the others go on");
    }
}
