//! Capture proof: every established TCP socket of an enrolled pod is part of the mesh or a named exemption; what is neither
//! is told.
//!
//! It rests on what the kernel holds and not on what the agent believes: the namespace's sockets, and what the kernel
//! programs have noted of each.

use std::{collections::BTreeSet, fs, path::Path};

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

/// Looks at one pod. What nothing accounts for is looked for a second time: a socket that was just ending is no stray. Gives
/// those that were refused when they were established, and are to be ended.
///
/// # Errors
/// The sockets could not be listed.
pub(super) fn look(
    proof: &mut Proof,
    pod: &ServedPod,
    names: (&str, &str),
    query: &Query<'_>,
    older: &Older,
) -> anyhow::Result<Vec<(SocketId, SocketValue)>> {
    let query = Query { states: STATES, bytes: false, ..*query };
    let mut diag = SockDiag::open(&pod.netns)?;
    let mut own = None;
    let (mut suspects, mut refused) = (Vec::new(), Vec::new());
    for socket in diag.list(&query)? {
        if let Some(value) = value(&socket).filter(|value| value.kind == SocketKind::Passed as u8)
            && !passed(value.reason)
        {
            refused.push((socket.id, value));
            continue;
        }
        let account = account(pod, &socket)
            .or_else(|| older.has(pod.cookie, socket.id.cookie).then_some("pre-enrolment"))
            // The agent's own, by descriptor: what it accepted and nobody noted.
            .or_else(|| own.get_or_insert_with(own_sockets).contains(&socket.inode).then_some("agent"));
        match account {
            Some(word) => *proof.accounted.entry(word.to_owned()).or_default() += 1,
            None => suspects.push(socket),
        }
    }
    if !suspects.is_empty() {
        let still: BTreeSet<u64> = diag
            .list(&query)?
            .iter()
            .filter(|socket| account(pod, socket).is_none() && socket.inode != 0)
            .map(|socket| socket.id.cookie)
            .collect();
        suspects.retain(|socket| still.contains(&socket.id.cookie));
    }
    for socket in suspects {
        let (pid, process) = process(socket.inode).unwrap_or_default();
        proof.strays.push(Stray {
            namespace: names.0.to_owned(),
            pod: names.1.to_owned(),
            local: socket.id.local,
            remote: socket.id.remote,
            pid,
            process,
            socket: socket.id.cookie,
        });
    }
    proof.pods += 1;
    Ok(refused)
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

/// A process that has a socket open: its number and name.
fn process(inode: u32) -> Option<(u32, String)> {
    if inode == 0 {
        return None;
    }
    let all = fs::read_dir("/proc").ok()?.filter_map(Result::ok);
    for entry in all {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        if sockets_of(&entry.path().join("fd")).any(|own| own == inode) {
            let name = fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
            return Some((pid, name.trim_end().to_owned()));
        }
    }
    None
}
