//! Keeps up with the cgroup tree by inotify: which directories are pods, and which namespace their processes are in.
//!
//! Every directory is watched first and listed after, so what appears in between is seen twice rather than never; and
//! everything here can be done twice. cgroup2 does not tell a watch of a directory that it was removed (before Linux 7),
//! so removals are learnt from the directory above, and watches are taken away by hand.
//!
//! What the system cannot tell for want of descriptors or memory stays as it was known, and is asked again soon: a pod that
//! cannot be looked at has not gone.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs, io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::Context;
use inotify::{EventMask, Inotify, WatchDescriptor, WatchMask};

use super::{
    Config, HOST_AFTER, Node, NodePod, PodNetwork, SEARCH_DEPTH,
    cgroup::{
        CgroupDir, CgroupId, Hierarchy, children, is_kubepods, is_populated, is_qos, members, pids, pod_uid, there,
    },
    kubelet::{self, Kubelet, find_kubelet},
};
use crate::{
    model::PodUid,
    netns::{NetnsHandle, NetnsId},
};

/// First wait before a pod is looked at again; each further one is twice as long.
const FIRST_WAIT: Duration = Duration::from_millis(2);
/// Looks after an event: the last one is half a minute after it.
const LOOKS: u32 = 14;
/// Wait before what could not be read is read again.
const AGAIN: Duration = Duration::from_secs(1);

/// The tree as far as it is known.
pub(super) struct Tree {
    config: Config,
    hierarchy: Hierarchy,
    inotify: Inotify,
    /// Every directory that is watched.
    dirs: BTreeMap<PathBuf, Dir>,
    watches: HashMap<WatchDescriptor, Watched>,
    pods: BTreeMap<PathBuf, Pod>,
    /// Paths whose coming and going matters wherever they are: the cgroup root and what may be the kubelet's.
    targets: Vec<PathBuf>,
    kubelet: Kubelet,
    dirty_pods: BTreeSet<PathBuf>,
    kubelet_dirty: bool,
    /// Directories that the system could not read.
    unread: BTreeSet<PathBuf>,
    /// When they are tried again, and the kubelet's if that is dirty.
    again: Option<Instant>,
    warned_of_pids: bool,
}

/// A watched directory.
struct Dir {
    id: CgroupId,
    role: Role,
    /// Of the directory, and of its `cgroup.events` where that matters.
    watches: Vec<WatchDescriptor>,
}

/// What a directory is to us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    /// On the way to a target, nothing else.
    Way,
    /// May contain `kubepods`; so deep below the cgroup root.
    Search(u32),
    /// `kubepods`.
    Root,
    /// A class below it.
    Qos,
    /// A pod's.
    Pod,
    /// A container's, or whatever else lies in a pod's.
    Inside,
}

/// What an event is about.
#[derive(Clone)]
enum Watched {
    Entries(PathBuf),
    Population(PathBuf),
}

/// A pod with a process in it.
struct Pod {
    uid: PodUid,
    cgroup: CgroupDir,
    network: PodNetwork,
    /// Since when the processes are in no namespace of their own, if we are to look again.
    unsettled: Option<Unsettled>,
}

struct Unsettled {
    since: Instant,
    looks: u32,
    next: Instant,
}

/// What a pod's processes say.
enum Found {
    /// One is still in the namespace that we know.
    Known,
    Own(NetnsHandle),
    /// There are processes, all in the node's own.
    Host,
    /// Nobody could be asked.
    Nobody,
}

impl Tree {
    /// Reads the whole tree.
    pub(super) fn new(mut config: Config) -> anyhow::Result<Self> {
        config.cgroup_root = fs::canonicalize(&config.cgroup_root)
            .with_context(|| format!("cgroup root {}", config.cgroup_root.display()))?;
        let hierarchy = Hierarchy::of(&config.cgroup_root)?;
        let chosen = config.kubelet_cgroup.as_deref();
        let targets = [config.cgroup_root.clone()]
            .into_iter()
            .chain(kubelet::candidates(&config.cgroup_root, &hierarchy.mount, chosen))
            .chain(kubelet::shared(&config.cgroup_root, chosen))
            .collect();
        let inotify = Inotify::init()
            .context("inotify_init1: if there are too many, raise the sysctl fs.inotify.max_user_instances")?;
        let mut tree = Self {
            config,
            hierarchy,
            inotify,
            dirs: BTreeMap::new(),
            watches: HashMap::new(),
            pods: BTreeMap::new(),
            targets,
            kubelet: Kubelet::Absent("not looked for yet".into()),
            dirty_pods: BTreeSet::new(),
            kubelet_dirty: true,
            unread: BTreeSet::new(),
            again: None,
            warned_of_pids: false,
        };
        tree.rescan()?;
        tree.settle(Instant::now());
        Ok(tree)
    }

    /// Becomes readable when [`Tree::read_events`] has something to read.
    pub(super) fn event_fd(&self) -> anyhow::Result<OwnedFd> {
        self.inotify.as_fd().try_clone_to_owned().context("duplicate the inotify descriptor")
    }

    /// Takes in every event there is, without waiting for more.
    pub(super) fn read_events(&mut self) -> anyhow::Result<()> {
        let mut buffer = vec![0; 64 << 10];
        loop {
            let events: Vec<_> = match self.inotify.read_events(&mut buffer) {
                Ok(events) => events.map(|event| (event.wd, event.mask, event.name.map(ToOwned::to_owned))).collect(),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error).context("read inotify events"),
            };
            for (wd, mask, name) in events {
                if mask.contains(EventMask::Q_OVERFLOW) {
                    tracing::warn!("more cgroup events than the kernel's queue holds: reading the whole tree again");
                    self.rescan()?;
                    continue;
                }
                // Events of watches that were taken away are still in the queue.
                let Some(watched) = self.watches.get(&wd).cloned() else { continue };
                match (watched, name) {
                    (_, _) if mask.contains(EventMask::UNMOUNT) => {
                        anyhow::bail!("{} was unmounted", self.hierarchy.mount.display());
                    }
                    (Watched::Population(dir), _) if mask.contains(EventMask::MODIFY) => self.populated(&dir),
                    (Watched::Entries(dir), Some(name)) if mask.contains(EventMask::ISDIR) => {
                        let path = dir.join(&name);
                        if mask.contains(EventMask::CREATE) {
                            self.created(&path)?;
                        } else if mask.contains(EventMask::DELETE) {
                            self.deleted(&path);
                        }
                    }
                    _ => {}
                }
            }
        }
        self.settle(Instant::now());
        Ok(())
    }

    /// When [`Tree::look_again`] has something to do.
    pub(super) fn look_again_at(&self) -> Option<Instant> {
        self.pods.values().filter_map(|pod| Some(pod.unsettled.as_ref()?.next)).chain(self.again).min()
    }

    /// Looks again at pods whose namespace is not settled, and at what could not be read.
    ///
    /// # Errors
    /// A directory could not be watched.
    pub(super) fn look_again(&mut self, now: Instant) -> anyhow::Result<()> {
        if self.again.is_some_and(|again| again <= now) {
            self.again = None;
            for path in std::mem::take(&mut self.unread) {
                let Some(role) = self.dirs.get(&path).map(|dir| dir.role) else { continue };
                self.enter_children(&path, role)?;
                if role == Role::Pod {
                    self.dirty_pods.insert(path);
                }
            }
            if self.unread.is_empty() {
                self.pods.retain(|path, _| self.dirs.contains_key(path));
            }
            self.settle(now);
        }
        let due = |pod: &Pod| pod.unsettled.as_ref().is_some_and(|unsettled| unsettled.next <= now);
        let due: Vec<PathBuf> = self.pods.iter().filter(|(_, pod)| due(pod)).map(|(path, _)| path.clone()).collect();
        for path in due {
            self.look_at_pod(&path, now);
        }
        Ok(())
    }

    /// Notes that a directory could not be read, and says so if nothing else waits for that.
    fn could_not(&mut self, read: &Path, error: &io::Error) {
        if self.again.is_none() && self.unread.is_empty() {
            tracing::warn!(path = %read.display(), %error, "cgroups cannot be read: what was known stays; trying again");
        }
        self.unread.insert(read.to_owned());
        self.again.get_or_insert_with(|| Instant::now() + AGAIN);
    }

    /// What is to be published.
    pub(super) fn node(&self) -> Node {
        let mut pods: BTreeMap<PodUid, Arc<NodePod>> = BTreeMap::new();
        for pod in self.pods.values() {
            let new =
                Arc::new(NodePod { uid: pod.uid.clone(), cgroup: pod.cgroup.clone(), network: pod.network.clone() });
            // Two directories of one UID, both with processes: the one with a network of its own is the pod, and of two
            // such the younger (ids only grow), since the kubelet moved it.
            let rank = |pod: &NodePod| (matches!(pod.network, PodNetwork::Own(_)), pod.cgroup.id);
            match pods.get(&pod.uid) {
                Some(other) if rank(other) >= rank(&new) => {}
                _ => drop(pods.insert(pod.uid.clone(), new)),
            }
        }
        let roots = self.dirs.iter().filter(|(_, dir)| dir.role == Role::Root);
        let roots =
            roots.map(|(path, dir)| CgroupDir { path: path.clone(), id: dir.id, level: self.hierarchy.level(path) });
        let dirs = self.dirs.iter().filter(|(_, dir)| dir.role == Role::Pod);
        let dirs = dirs.filter_map(|(path, dir)| Some((dir.id, pod_uid(path.file_name()?.to_str()?)?)));
        Node { pods, dirs: dirs.collect(), roots: roots.collect(), kubelet: self.kubelet.clone() }
    }

    /// Forgets all directories and reads the tree as if for the first time; known namespaces are kept.
    fn rescan(&mut self) -> anyhow::Result<()> {
        for wd in std::mem::take(&mut self.watches).into_keys() {
            // Fails for those that the kernel took away itself.
            let _ = self.inotify.watches().remove(wd);
        }
        self.dirs.clear();
        self.enter(&self.config.cgroup_root.clone(), Role::Search(0))?;
        self.enter_ways()?;
        if self.unread.is_empty() {
            self.pods.retain(|path, _| self.dirs.contains_key(path));
        }
        self.dirty_pods =
            self.dirs.iter().filter(|(_, dir)| dir.role == Role::Pod).map(|(path, _)| path.clone()).collect();
        self.kubelet_dirty = true;
        Ok(())
    }

    /// Watches the directories above each target, as far as they exist, up to the mount.
    fn enter_ways(&mut self) -> anyhow::Result<()> {
        for target in self.targets.clone() {
            let mut ways: Vec<&Path> =
                target.ancestors().take_while(|way| way.starts_with(&self.hierarchy.mount)).collect();
            ways.reverse();
            for way in ways {
                if !self.dirs.contains_key(way) {
                    self.enter(way, Role::Way)?;
                }
            }
        }
        Ok(())
    }

    /// Watches a directory and whatever below it matters. One that is gone meanwhile is no error.
    fn enter(&mut self, path: &Path, role: Role) -> anyhow::Result<()> {
        let mut watches = Vec::new();
        let entries = WatchMask::CREATE | WatchMask::DELETE | WatchMask::ONLYDIR | WatchMask::DONT_FOLLOW;
        let Some(wd) = self.add_watch(path, entries)? else { return Ok(()) };
        // Looked at after the watch was set: a change of either from here on is an event.
        let Ok(id) = CgroupId::of_path(path) else { return Ok(()) };
        if let Some(known) = self.dirs.get(path) {
            if known.id == id {
                return Ok(());
            }
            self.forget(path);
        }
        self.watches.insert(wd.clone(), Watched::Entries(path.to_owned()));
        watches.push(wd);
        if matches!(role, Role::Pod | Role::Inside) || self.targets.iter().any(|target| target == path) {
            // Absent in the root of the hierarchy.
            if let Some(wd) = self.add_watch(&path.join("cgroup.events"), WatchMask::MODIFY)? {
                self.watches.insert(wd.clone(), Watched::Population(path.to_owned()));
                watches.push(wd);
            }
        }
        self.dirs.insert(path.to_owned(), Dir { id, role, watches });
        self.enter_children(path, role)?;
        if role == Role::Pod {
            self.dirty_pods.insert(path.to_owned());
        }
        if role == Role::Root {
            // A directory that contains pods cannot be the kubelet's.
            self.kubelet_dirty = true;
        }
        Ok(())
    }

    fn enter_children(&mut self, path: &Path, role: Role) -> anyhow::Result<()> {
        match children(path) {
            Ok(names) => names.iter().try_for_each(|name| self.enter_child(path, role, name)),
            Err(error) => {
                self.could_not(path, &error);
                Ok(())
            }
        }
    }

    fn enter_child(&mut self, parent: &Path, role: Role, name: &str) -> anyhow::Result<()> {
        let path = parent.join(name);
        let role = match role {
            Role::Way if path == self.config.cgroup_root => Role::Search(0),
            Role::Way => return Ok(()),
            Role::Search(_) if is_kubepods(name) => Role::Root,
            Role::Search(depth) if depth + 1 < SEARCH_DEPTH => Role::Search(depth + 1),
            Role::Search(_) => return Ok(()),
            Role::Root | Role::Qos if pod_uid(name).is_some() => Role::Pod,
            Role::Root if is_qos(name) => Role::Qos,
            Role::Root | Role::Qos => return Ok(()),
            Role::Pod => Role::Inside,
            Role::Inside => return Ok(()),
        };
        self.enter(&path, role)
    }

    /// `None` if there is no such file.
    fn add_watch(&mut self, path: &Path, mask: WatchMask) -> anyhow::Result<Option<WatchDescriptor>> {
        match self.inotify.watches().add(path, mask) {
            Ok(wd) => Ok(Some(wd)),
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENODEV | libc::ENOTDIR)) => Ok(None),
            Err(error) if error.raw_os_error() == Some(libc::ENOSPC) => Err(error)
                .with_context(|| format!("watch {}: raise the sysctl fs.inotify.max_user_watches", path.display())),
            Err(error) => Err(error).with_context(|| format!("watch {}", path.display())),
        }
    }

    fn created(&mut self, path: &Path) -> anyhow::Result<()> {
        let (Some(parent), Some(name)) = (path.parent(), path.file_name().and_then(|name| name.to_str())) else {
            return Ok(());
        };
        let Some(role) = self.dirs.get(parent).map(|dir| dir.role) else { return Ok(()) };
        self.enter_child(parent, role, name)?;
        if role == Role::Pod {
            self.dirty_pods.insert(parent.to_owned());
        }
        if self.targets.iter().any(|target| target.starts_with(path)) {
            self.enter_ways()?;
            self.kubelet_dirty = true;
        }
        Ok(())
    }

    fn deleted(&mut self, path: &Path) {
        // An event of an older directory of this name, when a younger one has been entered already.
        if self.dirs.get(path).is_some_and(|dir| CgroupId::of_path(path).is_ok_and(|id| id == dir.id)) {
            return;
        }
        self.forget(path);
        if let Some(parent) = path.parent()
            && self.dirs.get(parent).is_some_and(|dir| dir.role == Role::Pod)
        {
            self.dirty_pods.insert(parent.to_owned());
        }
        // Pods below a candidate are a reason against it, so that they went may matter too.
        let mut candidates = self.targets.iter().filter(|target| **target != self.config.cgroup_root);
        if candidates.any(|candidate| candidate.starts_with(path) || path.starts_with(candidate)) {
            self.kubelet_dirty = true;
        }
    }

    /// Drops a directory and everything below it.
    fn forget(&mut self, path: &Path) {
        let below: Vec<PathBuf> = self
            .dirs
            .range(path.to_owned()..)
            .map(|(below, _)| below)
            .take_while(|below| below.starts_with(path))
            .cloned()
            .collect();
        for path in below {
            let Some(dir) = self.dirs.remove(&path) else { continue };
            for wd in dir.watches {
                self.watches.remove(&wd);
                // Fails where the kernel took it away itself.
                let _ = self.inotify.watches().remove(wd);
            }
            self.pods.remove(&path);
        }
    }

    /// The first process came to a directory, or the last one left.
    fn populated(&mut self, path: &Path) {
        match self.dirs.get(path).map(|dir| dir.role) {
            Some(Role::Pod) => drop(self.dirty_pods.insert(path.to_owned())),
            Some(Role::Inside) => {
                if let Some(pod) = path.parent() {
                    self.dirty_pods.insert(pod.to_owned());
                }
            }
            Some(Role::Way | Role::Search(_) | Role::Root | Role::Qos) => self.kubelet_dirty = true,
            None => {}
        }
    }

    /// Looks at everything that events have touched.
    fn settle(&mut self, now: Instant) {
        for path in std::mem::take(&mut self.dirty_pods) {
            if let Some(unsettled) = self.pods.get_mut(&path).and_then(|pod| pod.unsettled.as_mut()) {
                unsettled.looks = 0;
            }
            self.look_at_pod(&path, now);
        }
        if std::mem::take(&mut self.kubelet_dirty) {
            let chosen = self.config.kubelet_cgroup.as_deref();
            let found = match find_kubelet(&self.hierarchy, &self.config.cgroup_root, chosen) {
                Ok(found) => found,
                Err(error) => {
                    self.kubelet_dirty = true;
                    return self.could_not(&self.config.cgroup_root.clone(), &error);
                }
            };
            if found != self.kubelet {
                match &found {
                    Kubelet::Known(dir) => {
                        tracing::info!(path = %dir.path.display(), id = dir.id.0, "found the kubelet's cgroup");
                    }
                    Kubelet::Absent(reason) | Kubelet::Indistinct(reason) => tracing::warn!("{reason}"),
                }
                self.kubelet = found;
            }
        }
    }

    fn look_at_pod(&mut self, path: &Path, now: Instant) {
        let uid = path.file_name().and_then(|name| name.to_str()).and_then(pod_uid);
        let populated = match is_populated(path) {
            Ok(populated) => populated,
            Err(error) => return self.could_not(path, &error),
        };
        let (Some(uid), Some(id), Some(true)) = (uid, self.dirs.get(path).map(|dir| dir.id), populated) else {
            self.pods.remove(path);
            return;
        };
        let cgroup = CgroupDir { path: path.to_owned(), id, level: self.hierarchy.level(path) };
        let mut pod = match self.pods.remove(path) {
            Some(pod) if pod.cgroup.id == id => pod,
            _ => Pod { uid, cgroup, network: PodNetwork::Pending, unsettled: None },
        };
        let known = match &pod.network {
            PodNetwork::Own(handle) => Some(handle.id()),
            PodNetwork::Pending | PodNetwork::Host => None,
        };
        let found = match self.find_netns(path, known) {
            Ok(found) => found,
            Err(error) => {
                self.pods.insert(path.to_owned(), pod);
                return self.could_not(path, &error);
            }
        };
        match found {
            Found::Known => pod.unsettled = pod.unsettled.and_then(|unsettled| Unsettled::next(Some(unsettled), now)),
            Found::Own(handle) => {
                tracing::debug!(uid = %pod.uid.0, inode = handle.id().inode, "pod has a network namespace");
                pod.network = PodNetwork::Own(Arc::new(handle));
                // On its way to the pod a process may pass through a namespace that is neither's.
                pod.unsettled = Unsettled::next(None, now);
            }
            Found::Host => {
                let since = pod.unsettled.as_ref().map_or(now, |unsettled| unsettled.since);
                pod.network = match pod.network {
                    PodNetwork::Pending if now.duration_since(since) >= HOST_AFTER => PodNetwork::Host,
                    // Those who were in the old namespace are gone.
                    PodNetwork::Pending | PodNetwork::Own(_) => PodNetwork::Pending,
                    PodNetwork::Host => PodNetwork::Host,
                };
                pod.unsettled = Unsettled::next(pod.unsettled, now);
            }
            // They are about to be gone, which is an event; or another comes, which need not be one.
            Found::Nobody => pod.unsettled = Unsettled::next(pod.unsettled, now),
        }
        self.pods.insert(path.to_owned(), pod);
    }

    /// Asks the processes of a pod.
    ///
    /// # Errors
    /// As [`there`].
    fn find_netns(&mut self, pod: &Path, known: Option<NetnsId>) -> io::Result<Found> {
        /// Whom we asked may die while we ask.
        const ATTEMPTS: u32 = 3;
        let host = self.config.host_netns.id();
        let mut answer = Found::Nobody;
        for _ in 0..ATTEMPTS {
            let mut oldest = None;
            for member in members(pod)? {
                if member.pid == 0 && !self.warned_of_pids {
                    self.warned_of_pids = true;
                    tracing::error!(
                        "processes of pods are in a pid namespace that is hidden from the agent: it needs hostPID"
                    );
                }
                let process = self.config.proc_root.join(member.pid.to_string());
                let Ok(netns) = NetnsId::of_path(&process.join("ns/net")) else { continue };
                if Some(netns) == known {
                    return Ok(Found::Known);
                }
                if netns == host {
                    answer = Found::Host;
                    continue;
                }
                let Some(started) = started(&process)? else { continue };
                let age = (started, member.pid);
                if oldest.as_ref().is_none_or(|(oldest, _, _)| age < *oldest) {
                    oldest = Some((age, process, member.dir));
                }
            }
            let Some(((at, pid), process, dir)) = oldest else { return Ok(answer) };
            // Only now is it opened. The pid may have become another process's meanwhile: then it started later, or
            // the directory does not list it.
            let Some(handle) = there(NetnsHandle::open_by_path(&process.join("ns/net")))? else { continue };
            if handle.id() == host || started(&process)? != Some(at) || !pids(&dir)?.contains(&pid) {
                continue;
            }
            let cookie = handle.cookie();
            if let Err(error) = &cookie {
                tracing::error!(%error, pod = %pod.display(), "ask a pod's network namespace for its cookie");
            }
            return Ok(there(cookie)?.map_or(Found::Nobody, |_| Found::Own(handle)));
        }
        Ok(answer)
    }
}

impl Unsettled {
    /// The next look, unless there have been enough.
    fn next(before: Option<Self>, now: Instant) -> Option<Self> {
        let (since, looks) = before.map_or((now, 0), |before| (before.since, before.looks));
        (looks < LOOKS).then(|| Self { since, looks: looks + 1, next: now + FIRST_WAIT * 2u32.pow(looks) })
    }
}

/// When a process started: field 22 of proc_pid_stat(5), clock ticks since boot.
fn started(process: &Path) -> io::Result<Option<u64>> {
    let stat = there(fs::read_to_string(process.join("stat")))?.unwrap_or_default();
    // The command's name is in brackets and may contain anything.
    let after = stat.rsplit_once(')').map(|(_, after)| after);
    Ok(after.and_then(|after| after.split_ascii_whitespace().nth(19)?.parse().ok()))
}
