//! Capture proof: every established TCP socket of an enrolled pod is part of the mesh or a named exemption; what is neither
//! is told.
//!
//! It rests on what the kernel holds and not on what the agent believes: the namespace's sockets, and what the kernel
//! programs have noted of each.

use std::{
    collections::{BTreeSet, HashMap},
    fs,
    os::fd::BorrowedFd,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use culvert_common::{PORT_HBONE, SocketKind, SocketValue};

use crate::{
    datapath::Older,
    netns::sock_diag::{Query, SockDiag, Socket, SocketId, States},
    proxy::ServedPod,
    telemetry::open::{Proof, Stray},
};

use super::{account::passed, kind, value};

/// ESTABLISHED and CLOSE_WAIT: bytes of an application may still pass.
const STATES: States = States(1 << 1 | 1 << 8);

/// The cookies of the sockets of a pod that has just been brought in, of which nobody knows anything. `open` are its sockets, but
/// for those that are only just connecting, which are looked for here.
///
/// # Errors
/// The sockets could not be listed.
pub(super) fn older(diag: &mut SockDiag, open: &[Socket]) -> anyhow::Result<Vec<u64>> {
    /// `TCP_SYN_SENT`.
    const SYN_SENT: States = States(1 << 2);
    let connecting = diag
        .list(&Query { states: SYN_SENT, bytes: false, storage: None })
        .context("list the pod's sockets that are connecting")?;
    let unknown = open.iter().filter(|socket| socket.storage.is_none()).chain(&connecting);
    Ok(unknown.map(|socket| socket.id.cookie).collect())
}

/// How long the processes are looked for that have strays open. The thread that looks gives the sign of life too, and neither
/// the number of strays nor of descriptors is ours to say.
const NAMING: Duration = Duration::from_millis(250);

/// A look at one pod after another.
pub(super) struct Look<'a, 'p> {
    query: Query<'a>,
    older: &'a Older,
    proof: Proof,
    suspects: Vec<Suspects<'p>>,
    refused: Vec<Refused<'p>>,
}

/// Sockets of a pod that were refused when they were established, and are to be ended.
pub(super) struct Refused<'a> {
    pub(super) pod: &'a ServedPod,
    pub(super) sockets: Vec<(SocketId, SocketValue)>,
}

/// Sockets of a pod that nothing accounts for by itself.
struct Suspects<'a> {
    pod: &'a ServedPod,
    names: (&'a str, &'a str),
    sockets: Vec<Socket>,
}

impl<'a, 'p> Look<'a, 'p> {
    /// `storage` is the map of what the kernel programs have noted of each socket.
    pub(super) fn new(storage: BorrowedFd<'a>, older: &'a Older) -> Self {
        let query = Query { states: STATES, bytes: false, storage: Some(storage) };
        Self { query, older, proof: Proof::default(), suspects: Vec::new(), refused: Vec::new() }
    }

    /// Looks at one pod. `names` are its namespace and name.
    pub(super) fn at(&mut self, pod: &'p ServedPod, names: (&'p str, &'p str)) {
        let listed = SockDiag::open(&pod.netns).and_then(|mut diag| diag.list(&self.query));
        let Some(listed) = self.done(listed, names) else { return };
        let (mut sockets, mut refused) = (Vec::new(), Vec::new());
        for socket in listed {
            if let Some(value) = value(&socket).filter(|value| value.kind == SocketKind::Passed as u8)
                && !passed(value.reason)
            {
                refused.push((socket.id, value));
                continue;
            }
            let older = || self.older.has(pod.cookie, socket.id.cookie).then_some("pre-enrolment");
            match account(pod, &socket).or_else(older) {
                Some(word) => count(&mut self.proof, word),
                None => sockets.push(socket),
            }
        }
        if !sockets.is_empty() {
            self.suspects.push(Suspects { pod, names, sockets });
        }
        if !refused.is_empty() {
            self.refused.push(Refused { pod, sockets: refused });
        }
        self.proof.pods += 1;
    }

    /// What nothing accounts for is looked for a second time: a socket that was just ending is no stray. Whose the others
    /// are is found by one walk over all processes.
    pub(super) fn finish(mut self) -> (Proof, Vec<Refused<'p>>) {
        let mut strays = Vec::new();
        let suspects = std::mem::take(&mut self.suspects);
        // The agent's own, by descriptor: what it accepted and nobody noted.
        let own = if suspects.is_empty() { BTreeSet::new() } else { own_sockets() };
        for Suspects { pod, names, mut sockets } in suspects {
            sockets.retain(|socket| {
                let own = own.contains(&socket.inode);
                if own {
                    count(&mut self.proof, "agent");
                }
                !own
            });
            if sockets.is_empty() {
                continue;
            }
            let listed = SockDiag::open(&pod.netns).and_then(|mut diag| diag.list(&self.query));
            let Some(listed) = self.done(listed, names) else { continue };
            let still: BTreeSet<u64> = listed
                .iter()
                .filter(|socket| account(pod, socket).is_none() && socket.inode != 0)
                .map(|socket| socket.id.cookie)
                .collect();
            strays.extend(sockets.into_iter().filter(|socket| still.contains(&socket.id.cookie)).map(|it| (names, it)));
        }
        let inodes = strays.iter().map(|(_, socket)| socket.inode).filter(|inode| *inode != 0).collect();
        let mut processes = processes(Path::new("/proc"), inodes, Instant::now() + NAMING);
        self.proof.strays.extend(strays.into_iter().map(|((namespace, pod), socket)| {
            let (pid, process) = processes.remove(&socket.inode).unwrap_or_default();
            Stray {
                namespace: namespace.to_owned(),
                pod: pod.to_owned(),
                local: socket.id.local,
                remote: socket.id.remote,
                pid,
                process,
                socket: socket.id.cookie,
            }
        }));
        (self.proof, self.refused)
    }

    fn done<T>(&mut self, result: anyhow::Result<T>, (namespace, name): (&str, &str)) -> Option<T> {
        result.map_err(|error| self.proof.failures.push(format!("{namespace}/{name}: {error:#}"))).ok()
    }
}

fn count(proof: &mut Proof, word: &str) {
    *proof.accounted.entry(word.to_owned()).or_default() += 1;
}

/// The word for what accounts for a socket by itself.
fn account(pod: &ServedPod, socket: &Socket) -> Option<&'static str> {
    let (local, remote) = (socket.id.local.ip(), socket.id.remote.ip());
    let inside = |ip: std::net::IpAddr| ip.is_loopback() || pod.ips.contains(&ip);
    match kind(socket) {
        Some(kind) if kind == SocketKind::Redirected as u8 || kind == SocketKind::Accepted as u8 => Some("captured"),
        Some(kind) if kind == SocketKind::Agent as u8 => Some("agent"),
        Some(kind) if kind == SocketKind::Leg as u8 => Some("leg"),
        Some(kind) if kind == SocketKind::Served as u8 => Some("served"),
        Some(kind) if kind == SocketKind::Passed as u8 => Some("passed"),
        Some(kind) if kind == SocketKind::Probed as u8 || kind == SocketKind::Probe as u8 => Some("probe"),
        Some(_) | None if (inside(local) && inside(remote)) || local == remote => Some("same-pod"),
        // `sk_lookup` gives this port to the agent, whoever listens there.
        Some(_) | None if socket.id.local.port() == PORT_HBONE && pod.ips.contains(&local) => Some("tunnel"),
        Some(_) | None => None,
    }
}

/// Inodes of the sockets that this process has open.
fn own_sockets() -> BTreeSet<u32> {
    sockets_of(Path::new("/proc/self/fd")).collect()
}

fn sockets_of(fds: &Path) -> impl Iterator<Item = u32> {
    let entries = fs::read_dir(fds).into_iter().flatten().filter_map(Result::ok);
    entries.filter_map(|entry| {
        let link = fs::read_link(entry.path()).ok()?;
        link.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()
    })
}

/// A process that has each of these sockets open, by the socket's inode: its number and name. Those that were not found
/// before `until` are left out.
fn processes(proc_root: &Path, mut wanted: BTreeSet<u32>, until: Instant) -> HashMap<u32, (u32, String)> {
    let mut found = HashMap::new();
    let all = fs::read_dir(proc_root).into_iter().flatten().filter_map(Result::ok);
    for entry in all {
        if wanted.is_empty() || Instant::now() >= until {
            break;
        }
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        let mut name = None;
        for inode in sockets_of(&entry.path().join("fd")).take_while(|_| Instant::now() < until) {
            if wanted.remove(&inode) {
                let comm = || fs::read_to_string(entry.path().join("comm")).unwrap_or_default().trim_end().to_owned();
                found.insert(inode, (pid, name.get_or_insert_with(comm).clone()));
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    /// Strays by the thousand cost one walk, and no more time than there is.
    #[test]
    fn the_processes_of_many_sockets_are_found_by_one_walk_within_its_time() {
        let root = tempfile::tempdir().expect("a folder");
        for pid in [7u32, 8] {
            let of = root.path().join(pid.to_string());
            fs::create_dir_all(of.join("fd")).expect("a folder");
            fs::write(of.join("comm"), format!("process {pid}\n")).expect("a file");
            for fd in 0..500 {
                symlink(format!("socket:[{}]", pid * 1000 + fd), of.join("fd").join(fd.to_string())).expect("a link");
            }
            symlink("/dev/null", of.join("fd/1000")).expect("a link");
        }
        fs::create_dir_all(root.path().join("self/fd")).expect("a folder");
        symlink("socket:[9000]", root.path().join("self/fd/1")).expect("a link");
        let wanted: BTreeSet<u32> = (7000..7500).chain(8100..8200).chain([9000]).collect();
        let found = processes(root.path(), wanted.clone(), Instant::now() + Duration::from_secs(60));
        assert_eq!(found.len(), 600, "all but the one that no process has");
        assert_eq!(found[&7499], (7, "process 7".to_owned()));
        assert_eq!(found[&8100], (8, "process 8".to_owned()));
        assert!(processes(root.path(), wanted, Instant::now()).is_empty(), "there was no time");
    }
}
