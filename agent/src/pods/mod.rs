//! The pods of this node as the cgroup tree shows them, joined with their network namespaces; and the kubelet's cgroup.
//!
//! Which of them are in the mesh, and what follows, is `enroll`'s business: here a pod is a UID, a cgroup and a
//! namespace. Nothing is polled: [`watch()`] listens to the tree (inotify) on a thread of its own and publishes whole
//! values.
//!
//! # What a pod is
//!
//! A directory of a kubelet's naming (both drivers, wherever `kubepods` lies up to [`SEARCH_DEPTH`] directories below the
//! cgroup root) in which a process lives. Directories that a kubelet left behind empty are none, and neither is a pod
//! *inside* a pod, as a nested cluster has it.
//!
//! # Which network namespace is a pod's
//!
//! That of its oldest process that is not in the node's own: the sandbox (pause) comes first, and what a container does
//! with namespaces of its own comes after. Once known, a pod keeps its namespace while any of its processes is in it. When
//! none is left there and others are elsewhere, the sandbox was made anew, and so is the pod's entry.
//!
//! A container runtime puts a process into the pod's cgroup *before* that process enters the pod's namespace, and the
//! kernel tells nobody when it does. So "all processes are in the node's namespace" is looked at again, a bounded number
//! of times, before it is believed ([`PodNetwork::Pending`] until then).

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use anyhow::Context;
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::{oneshot, watch},
};

use crate::{model::PodUid, netns::NetnsHandle};

mod cgroup;
mod kubelet;
#[cfg(test)]
#[expect(clippy::disallowed_methods, reason = "a test awaits what it has started, or ends with it")]
mod tests;
mod tree;

pub use cgroup::{CgroupDir, CgroupId, Hierarchy, find_cgroup2_mount, find_roots};
pub use kubelet::{Kubelet, SHARED, USUAL, find_kubelet};

/// How many directories below the cgroup root `kubepods` is looked for.
pub const SEARCH_DEPTH: u32 = 5;

/// For how long a pod whose processes are all in the node's namespace is [`PodNetwork::Pending`].
pub const HOST_AFTER: Duration = Duration::from_secs(2);

/// Where to look.
#[derive(Clone, Debug)]
pub struct Config {
    /// A directory of the cgroup2 file system; see [`find_cgroup2_mount`].
    pub cgroup_root: PathBuf,
    /// The node's `/proc`, of the pid namespace in which the node's processes are visible.
    pub proc_root: PathBuf,
    /// The node's own network namespace.
    pub host_netns: Arc<NetnsHandle>,
    /// The kubelet's cgroup, if the operator said which; see [`find_kubelet`].
    pub kubelet_cgroup: Option<PathBuf>,
}

/// The node at one moment; published whole.
#[derive(Clone, Debug, PartialEq)]
pub struct Node {
    /// Its pods.
    pub pods: BTreeMap<PodUid, Arc<NodePod>>,
    /// Every directory of a pod: also those in which no process lives yet. The kubelet makes it before anything of the pod
    /// runs.
    pub dirs: BTreeMap<CgroupId, PodUid>,
    /// The common parents of pods, usually one: where programs that speak for all pods are attached.
    pub roots: Vec<CgroupDir>,
    /// The kubelet's cgroup. A restart of the kubelet makes a new one, with a new id.
    pub kubelet: Kubelet,
}

/// A pod in which at least one process lives.
#[derive(Clone, Debug, PartialEq)]
pub struct NodePod {
    /// From the name of the directory; for a static pod, its `kubernetes.io/config.hash`.
    pub uid: PodUid,
    /// The pod's directory, above those of its containers.
    pub cgroup: CgroupDir,
    /// Its network.
    pub network: PodNetwork,
}

/// Where the processes of a pod have their sockets.
#[derive(Clone, Debug, PartialEq)]
pub enum PodNetwork {
    /// Not known yet: no process could be asked, or all are (still) in the node's own namespace.
    Pending,
    /// The node's own: the pod is `hostNetwork`. May become [`PodNetwork::Own`] if a container runtime is very slow.
    Host,
    /// A namespace of its own, kept open; its cookie has been read.
    Own(Arc<NetnsHandle>),
}

impl Node {
    /// The directories of the pod that this process lives in: one, or none for an agent that is no pod. Asks every pod's.
    pub fn own_dirs(&self) -> Vec<CgroupId> {
        // Seen from the pid namespace that this process is in, whichever that is.
        let own = std::process::id();
        let lives_in = |pod: &&Arc<NodePod>| {
            cgroup::members(&pod.cgroup.path).is_ok_and(|all| all.iter().any(|member| member.pid == own))
        };
        self.pods.values().filter(lives_in).map(|pod| pod.cgroup.id).collect()
    }
}

/// The thread that watches. Dropping it stops and joins the thread.
#[derive(Debug)]
pub struct Watcher {
    stop: Option<oneshot::Sender<()>>,
    thread: Option<thread::JoinHandle<anyhow::Result<()>>>,
}

impl Watcher {
    /// Stops watching.
    ///
    /// # Errors
    /// What ended the thread before.
    pub fn stop(mut self) -> anyhow::Result<()> {
        self.join()
    }

    fn join(&mut self) -> anyhow::Result<()> {
        drop(self.stop.take());
        match self.thread.take().map(thread::JoinHandle::join) {
            None => Ok(()),
            Some(Ok(result)) => result,
            Some(Err(_)) => anyhow::bail!("the thread that watches the pods panicked"),
        }
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        if let Err(error) = self.join() {
            tracing::error!(error = format!("{error:#}"), "watching the pods of this node had failed");
        }
    }
}

/// Reads the tree once and goes on watching it. The first value is there when this returns.
///
/// The channel closes when watching ends; if nobody stopped it, that is a failure, which [`Watcher::stop`] returns.
///
/// # Errors
/// The tree cannot be read or watched; one line with the remedy.
pub fn watch(config: Config) -> anyhow::Result<(watch::Receiver<Arc<Node>>, Watcher)> {
    let (stop, mut stopped) = oneshot::channel::<()>();
    let (first_sender, first) = std::sync::mpsc::sync_channel(1);
    let body = move || -> anyhow::Result<()> {
        let started = (|| {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .context("build the runtime of the thread that watches the pods")?;
            let tree = tree::Tree::new(config)?;
            let (sender, receiver) = watch::channel(Arc::new(tree.node()));
            anyhow::Ok((runtime, tree, sender, receiver))
        })();
        let (runtime, mut tree, sender) = match started {
            Ok((runtime, tree, sender, receiver)) => {
                // `watch` is waiting for exactly this message.
                let _ = first_sender.send(Ok(receiver));
                (runtime, tree, sender)
            }
            Err(error) => {
                let _ = first_sender.send(Err(error));
                return Ok(());
            }
        };
        runtime.block_on(async {
            // SAFETY: an OwnedFd is open, and the same descriptor, until the AsyncFd that owns it is dropped.
            let readable = unsafe { AsyncFd::register_with_interest(tree.event_fd()?, Interest::READABLE) }
                .context("register inotify")?;
            loop {
                let again = async {
                    match tree.look_again_at() {
                        Some(at) => tokio::time::sleep_until(at.into()).await,
                        None => std::future::pending().await,
                    }
                };
                tokio::select! {
                    _ = &mut stopped => return Ok(()),
                    guard = readable.readable() => {
                        let mut guard = guard.context("wait for inotify")?;
                        tree.read_events()?;
                        guard.clear_ready();
                    }
                    () = again => tree.look_again(Instant::now())?,
                }
                let node = tree.node();
                sender.send_if_modified(|published| {
                    let changed = **published != node;
                    if changed {
                        *published = Arc::new(node);
                    }
                    changed
                });
            }
        })
    };
    let thread =
        thread::Builder::new().name("pods".into()).spawn(body).context("start the thread that watches the pods")?;
    let mut watcher = Watcher { stop: Some(stop), thread: Some(thread) };
    match first.recv() {
        Ok(Ok(receiver)) => Ok((receiver, watcher)),
        Ok(Err(error)) => Err(error),
        Err(_) => {
            Err(watcher.join().err().unwrap_or_else(|| anyhow::anyhow!("the thread that watches the pods ended")))
        }
    }
}
