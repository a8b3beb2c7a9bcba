//! Asks the kernel what it lets an agent do, by doing it in the small: programs of each kind that do nothing, maps, a pin;
//! and lists which programs are at a cgroup.
//!
//! Nothing is attached to anything of the node's, and nothing is left.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io,
    os::fd::{AsFd as _, AsRawFd as _, OwnedFd},
    path::Path,
    thread,
};

use anyhow::{Context as _, anyhow};
use nix::sched::{CloneFlags, unshare};

use super::{
    CGROUP_PROGRAMS, gate, ignore_absent, owner,
    sys::{self, AttachType},
};
use crate::netns::route::Route;

const BPF_MAP_CREATE: libc::c_long = 0;
const BPF_PROG_LOAD: libc::c_long = 5;
const BPF_PROG_GET_FD_BY_ID: libc::c_long = 13;
const BPF_PROG_QUERY: libc::c_long = 16;

/// The loopback device has this number in every network namespace.
const LOOPBACK: u32 = 1;
/// Programs that can be at one hook of one cgroup (`BPF_CGROUP_MAX_PROGS`).
const MOST: usize = 64;

/// Kinds of programs: `enum bpf_prog_type`, where the program is to be attached, and what it is for.
const PROGRAMS: [(u32, AttachType, &str); 7] = [
    (18, AttachType::Connect4, "cgroup/connect4 (captures connections)"),
    (18, AttachType::Connect6, "cgroup/connect6 (captures connections)"),
    (18, AttachType::Getpeername4, "cgroup/getpeername4 (shows the real peer)"),
    (18, AttachType::UdpSendmsg4, "cgroup/sendmsg4 (judges UDP)"),
    (8, AttachType::SkbIngress, "cgroup_skb/ingress (the gate)"),
    (13, AttachType::SockOps, "sock_ops (the handshake)"),
    (30, AttachType::SkLookup, "sk_lookup (what comes to a pod)"),
];
/// `BPF_PROG_TYPE_SCHED_CLS`
const CLASSIFIER: u32 = 3;

/// Kinds of maps: `enum bpf_map_type`, bytes of key and value, entries, flags, name.
const MAPS: [(u32, u32, u32, u32, u32, &str); 7] = [
    (2, 4, 8, 1, 0, "ARRAY"),
    (1, 8, 8, 8, 0, "HASH"),
    (5, 8, 8, 8, 0, "PERCPU_HASH"),
    (9, 8, 8, 64, 0, "LRU_HASH"),
    // BPF_F_NO_PREALLOC, without which there is none.
    (11, 8, 8, 8, 1, "LPM_TRIE"),
    (18, 8, 8, 8, 0, "SOCKHASH"),
    // At least a page of whatever size the machine has.
    (27, 0, 0, 1 << 16, 0, "RINGBUF"),
];

#[repr(C)]
struct MapAttr {
    kind: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    flags: u32,
}

#[repr(C, align(8))]
struct LoadAttr {
    kind: u32,
    instructions: u32,
    code: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
    device: u32,
    attach_type: u32,
}

/// `attr` of BPF_PROG_QUERY; as long as the kernel's, which writes into its end.
#[repr(C, align(8))]
struct QueryAttr {
    target: u32,
    kind: u32,
    flags: u32,
    attach_flags: u32,
    ids: u64,
    count: u32,
    _pad: u32,
    _rest: [u64; 4],
}

/// The first bytes of `struct bpf_prog_info`, up to the name.
#[repr(C, align(8))]
struct ProgramInfo {
    kind: u32,
    id: u32,
    tag: [u8; 8],
    lengths: [u32; 2],
    code: [u64; 2],
    loaded_at: u64,
    uid: u32,
    maps: u32,
    map_ids: u64,
    name: [u8; 16],
}

const _: () = assert!(size_of::<ProgramInfo>() == 80 && size_of::<LoadAttr>() == 72);

/// How programs that are at one hook of a cgroup stand to others (`BPF_F_ALLOW_*`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sharing {
    /// Beside others, and below them: as ours.
    Multi,
    /// Alone; a program of a cgroup below it runs in its place.
    Override,
    /// Alone, and none may be at a cgroup below it.
    Exclusive,
}

/// A hook of a cgroup, and what is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hook {
    /// As bpftool names it: `connect4`.
    pub name: &'static str,
    /// How those stand to others that are there.
    pub sharing: Sharing,
    /// The programs, the first that runs first.
    pub programs: Vec<Program>,
}

/// A program of anybody's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Program {
    /// Number that `bpftool` knows it by.
    pub id: u32,
    /// At most 15 bytes; empty if it has none, or we may not know.
    pub name: String,
}

/// Where the agent attaches itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// The cgroup root.
    Root,
    /// The common parent of pods.
    Pods,
}

/// Kinds of programs and maps that the kernel refuses, each with its answer.
pub fn refused() -> Vec<(&'static str, io::Error)> {
    let maps = MAPS.iter().map(|map| (map.5, map_of(map)));
    let programs = PROGRAMS.iter().map(|(kind, hook, name)| (*name, load(*kind, *hook as u32)));
    maps.chain(programs).filter_map(|(name, made)| Some((name, made.err()?))).collect()
}

/// Whether the program for what leaves a pod can be attached to a device: `true` by a link (Linux 6.6), `false` by a
/// classic filter.
///
/// # Errors
/// Neither is possible.
pub fn devices_take_links() -> anyhow::Result<bool> {
    match query(LOOPBACK, AttachType::TcxIngress) {
        Ok(_) => return Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
        Err(error) => return Err(error).context("ask for the programs of a device"),
    }
    // At a device of a namespace that ends with the thread.
    let tried = thread::Builder::new().name("culvert-probe".to_owned()).spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET).context("make a network namespace")?;
        let program = load(CLASSIFIER, 0).context("load a classifier")?;
        Route::here()?.set_ingress(LOOPBACK, program.as_fd())
    });
    let tried = tried.context("start a thread")?.join().map_err(|_| anyhow!("the thread that tried it panicked"))?;
    tried.map(|_| false)
}

/// Pins a map at a path of a bpffs, and removes it.
///
/// # Errors
/// The system call's.
pub fn pin(path: &Path) -> io::Result<()> {
    let map = map_of(&MAPS[0])?;
    sys::pin(map.as_fd(), path)?;
    fs::remove_file(path)
}

/// What is at the hooks of a cgroup that the agent has programs for at such a place.
///
/// # Errors
/// It is no directory of a cgroup2 file system, or programs may not be listed (CAP_NET_ADMIN).
pub fn hooks(cgroup: &Path, place: Place) -> io::Result<Vec<Hook>> {
    let cgroup = File::open(cgroup)?;
    let target = u32::try_from(cgroup.as_raw_fd()).expect("an open descriptor is not negative");
    let wanted: &[(&str, AttachType)] = match place {
        Place::Root => &CGROUP_PROGRAMS,
        Place::Pods => &gate::PROGRAMS,
    };
    wanted.iter().map(|(_, kind)| hook(target, *kind)).collect()
}

/// Numbers of the programs that agents with this pin directory have attached.
pub fn own(pin_dir: &Path) -> BTreeSet<u32> {
    let pins = fs::read_dir(owner::links(pin_dir)).into_iter().flatten().filter_map(Result::ok);
    let program = |pin: fs::DirEntry| {
        let link = sys::open_pinned(&pin.path()).ok()?;
        Some(sys::link_info(link.as_fd()).ok()?.1)
    };
    pins.filter_map(program).collect()
}

/// Removes what a try may have left that was cut short.
///
/// # Errors
/// The system call's; what is not there is removed.
pub fn clean(dir: &Path, pin: &Path) -> io::Result<()> {
    ignore_absent(fs::remove_file(pin))?;
    ignore_absent(fs::remove_dir(dir))
}

fn hook(target: u32, kind: AttachType) -> io::Result<Hook> {
    /// `BPF_F_ALLOW_OVERRIDE` and `BPF_F_ALLOW_MULTI`.
    const OVERRIDE: u32 = 1;
    const MULTI: u32 = 2;
    let (ids, flags) = query(target, kind)?;
    let sharing = match flags {
        flags if flags & MULTI != 0 => Sharing::Multi,
        flags if flags & OVERRIDE != 0 => Sharing::Override,
        _ => Sharing::Exclusive,
    };
    // Without CAP_SYS_ADMIN, or if it has just gone, a program has no name for us.
    let program = |id| Program { id, name: name(id).unwrap_or_default() };
    Ok(Hook { name: hook_name(kind), sharing, programs: ids.into_iter().map(program).collect() })
}

fn hook_name(kind: AttachType) -> &'static str {
    match kind {
        AttachType::SkbIngress => "ingress",
        AttachType::SockOps => "sock_ops",
        AttachType::Connect4 => "connect4",
        AttachType::Connect6 => "connect6",
        AttachType::UdpSendmsg4 => "sendmsg4",
        AttachType::UdpSendmsg6 => "sendmsg6",
        AttachType::Getpeername4 => "getpeername4",
        AttachType::Getpeername6 => "getpeername6",
        AttachType::SkLookup => "sk_lookup",
        AttachType::TcxIngress => "tcx_ingress",
    }
}

/// Programs at a cgroup, by its descriptor, or at a device, by its index; and their flags.
fn query(target: u32, kind: AttachType) -> io::Result<(Vec<u32>, u32)> {
    let mut ids = [0u32; MOST];
    let mut attr = QueryAttr {
        target,
        kind: kind as u32,
        flags: 0,
        attach_flags: 0,
        ids: ids.as_mut_ptr() as u64,
        count: MOST as u32,
        _pad: 0,
        _rest: [0; 4],
    };
    sys::bpf(BPF_PROG_QUERY, &mut attr)?;
    Ok((ids.into_iter().take(attr.count as usize).collect(), attr.attach_flags))
}

fn name(id: u32) -> io::Result<String> {
    // The number, the next one, and flags.
    let program = sys::bpf(BPF_PROG_GET_FD_BY_ID, &mut [id, 0, 0]).map(sys::owned)?;
    let mut info = ProgramInfo {
        kind: 0,
        id: 0,
        tag: [0; 8],
        lengths: [0; 2],
        code: [0; 2],
        loaded_at: 0,
        uid: 0,
        maps: 0,
        map_ids: 0,
        name: [0; 16],
    };
    sys::info(program.as_fd(), &mut info)?;
    let len = info.name.iter().position(|byte| *byte == 0).unwrap_or(info.name.len());
    Ok(String::from_utf8_lossy(&info.name[..len]).into_owned())
}

fn map_of(
    (kind, key_size, value_size, max_entries, flags, _): &(u32, u32, u32, u32, u32, &str),
) -> io::Result<OwnedFd> {
    let (kind, key_size, value_size) = (*kind, *key_size, *value_size);
    let mut attr = MapAttr { kind, key_size, value_size, max_entries: *max_entries, flags: *flags };
    sys::bpf(BPF_MAP_CREATE, &mut attr).map(sys::owned)
}

/// Loads a program that lets everything pass.
fn load(kind: u32, attach_type: u32) -> io::Result<OwnedFd> {
    // r0 = 1; exit
    let code = [0xb7 | 1u64 << 32, 0x95];
    let mut attr = LoadAttr {
        kind,
        instructions: 2,
        code: code.as_ptr() as u64,
        license: c"GPL".as_ptr() as u64,
        log_level: 0,
        log_size: 0,
        log: 0,
        kernel_version: 0,
        flags: 0,
        name: *b"culvert_probe\0\0\0",
        device: 0,
        attach_type,
    };
    sys::bpf(BPF_PROG_LOAD, &mut attr).map(sys::owned)
}

/// Attaches a program that lets everything pass to a cgroup for as long as the result lives, in the way that tools did
/// before there were links.
#[cfg(test)]
pub(crate) fn attach_exclusively(cgroup: &File) -> io::Result<impl Sized + use<>> {
    const BPF_PROG_ATTACH: libc::c_long = 8;
    const BPF_PROG_DETACH: libc::c_long = 9;
    struct Attached(File, OwnedFd);
    impl Attached {
        fn attr(&self) -> [u32; 4] {
            let raw = |fd: i32| u32::try_from(fd).expect("an open descriptor is not negative");
            [raw(self.0.as_raw_fd()), raw(self.1.as_raw_fd()), AttachType::Connect4 as u32, 0]
        }
    }
    impl Drop for Attached {
        fn drop(&mut self) {
            sys::bpf(BPF_PROG_DETACH, &mut self.attr()).expect("taken off");
        }
    }
    let attached = Attached(cgroup.try_clone()?, load(18, AttachType::Connect4 as u32)?);
    sys::bpf(BPF_PROG_ATTACH, &mut attached.attr())?;
    Ok(attached)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_kernel_takes_every_kind_and_a_kind_that_is_not_there_is_told() {
        let refused = refused();
        assert!(refused.is_empty(), "{refused:?}");
        // More than any kernel has.
        assert_eq!(load(1 << 20, 0).expect_err("no such kind").raw_os_error(), Some(libc::EINVAL));
        devices_take_links().expect("one of both");
    }
}
