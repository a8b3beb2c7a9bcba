//! The few `bpf(2)` calls that aya does not offer: links of any kind, created, replaced, pinned and looked at alike.

use std::{
    ffi::CString,
    io,
    os::{
        fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
};

const BPF_OBJ_PIN: libc::c_long = 6;
const BPF_OBJ_GET: libc::c_long = 7;
const BPF_PROG_TEST_RUN: libc::c_long = 10;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_long = 15;
const BPF_LINK_CREATE: libc::c_long = 28;
const BPF_LINK_UPDATE: libc::c_long = 29;
const BPF_LINK_DETACH: libc::c_long = 34;

/// Where a program is attached: numbers of `enum bpf_attach_type` (include/uapi/linux/bpf.h).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum AttachType {
    SkbIngress = 0,
    SockOps = 3,
    Connect4 = 10,
    Connect6 = 11,
    UdpSendmsg4 = 14,
    UdpSendmsg6 = 15,
    Getpeername4 = 29,
    Getpeername6 = 30,
    SkLookup = 36,
    TcxIngress = 46,
}

/// `attr` of BPF_LINK_CREATE and, with other names, of BPF_LINK_UPDATE: four words.
#[repr(C)]
struct LinkAttr {
    first_fd: u32,
    second_fd: u32,
    third: u32,
    flags: u32,
}

#[repr(C, align(8))]
struct PathAttr {
    path: u64,
    fd: u32,
    flags: u32,
}

#[repr(C, align(8))]
struct InfoAttr {
    fd: u32,
    len: u32,
    info: u64,
}

/// `attr` of BPF_PROG_TEST_RUN.
#[repr(C, align(8))]
#[derive(Default)]
struct RunAttr {
    prog_fd: u32,
    retval: u32,
    data_size_in: u32,
    data_size_out: u32,
    data_in: u64,
    data_out: u64,
    repeat: u32,
    duration: u32,
    ctx_size_in: u32,
    ctx_size_out: u32,
    ctx_in: u64,
    ctx_out: u64,
    flags: u32,
    cpu: u32,
    batch_size: u32,
    _pad: u32,
}

/// What the kernel says of a link (`struct bpf_link_info`): its first bytes, which are the same for all kinds. Longer than
/// the kernel's, which wants the rest to be zero: so there must be no padding, whose bytes are anybody's.
#[repr(C, align(8))]
struct RawLinkInfo {
    kind: u32,
    id: u32,
    prog_id: u32,
    _pad: u32,
    /// cgroup: the cgroup's id. netns: inode in the lower half, attach type in the upper. tcx: the device's index likewise.
    target: u64,
    attach_type: u32,
    _rest: [u32; 33],
}

const _: () = assert!(size_of::<RawLinkInfo>() == 28 + 33 * 4);

/// A link's target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Target {
    /// Id of the cgroup; 0 if it is gone.
    Cgroup(u64),
    /// Inode of the network namespace; 0 if it is gone.
    Netns(u32),
    /// Index of the network device; 0 if it is gone.
    Device(u32),
    /// Some other kind of link.
    Other,
}

/// The system call; `attr` is that of the command, or begins as it does.
pub(super) fn bpf<T>(command: libc::c_long, attr: &mut T) -> io::Result<libc::c_long> {
    // SAFETY: `attr` is a live, fully initialised `repr(C)` value and its size is passed with it.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attr), size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn raw(fd: BorrowedFd<'_>) -> u32 {
    u32::try_from(fd.as_raw_fd()).expect("a borrowed descriptor is not negative")
}

/// What a command has returned that makes a descriptor.
pub(super) fn owned(fd: libc::c_long) -> OwnedFd {
    let fd = i32::try_from(fd).expect("the kernel returns descriptors that fit");
    // SAFETY: the kernel has just returned this descriptor to us.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

fn c_path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))
}

/// Attaches a program to a cgroup or a network namespace.
pub(super) fn link_create(prog: BorrowedFd<'_>, target: BorrowedFd<'_>, kind: AttachType) -> io::Result<OwnedFd> {
    create(prog, raw(target), kind, 0)
}

/// Attaches a program to a network device of the calling thread's namespace, before all that are there: one that passes or
/// redirects a frame ends the row. `InvalidInput` before Linux 6.6.
pub(super) fn link_create_at(prog: BorrowedFd<'_>, device: u32, kind: AttachType) -> io::Result<OwnedFd> {
    const BPF_F_BEFORE: u32 = 1 << 3;
    create(prog, device, kind, BPF_F_BEFORE)
}

fn create(prog: BorrowedFd<'_>, target: u32, kind: AttachType, flags: u32) -> io::Result<OwnedFd> {
    bpf(BPF_LINK_CREATE, &mut LinkAttr { first_fd: raw(prog), second_fd: target, third: kind as u32, flags }).map(owned)
}

/// Replaces the program of a link; at no instant is there none.
pub(super) fn link_update(link: BorrowedFd<'_>, prog: BorrowedFd<'_>) -> io::Result<()> {
    // In this command the third word is the flags.
    bpf(BPF_LINK_UPDATE, &mut LinkAttr { first_fd: raw(link), second_fd: raw(prog), third: 0, flags: 0 }).map(drop)
}

/// Takes a link off its target before the call returns; one that only loses its pin goes some time later.
pub(super) fn link_detach(link: BorrowedFd<'_>) -> io::Result<()> {
    bpf(BPF_LINK_DETACH, &mut raw(link)).map(drop)
}

/// Pins a link under a path of a bpffs.
pub(super) fn pin(fd: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = c_path(path)?;
    bpf(BPF_OBJ_PIN, &mut PathAttr { path: path.as_ptr() as u64, fd: raw(fd), flags: 0 }).map(drop)
}

/// Opens what is pinned under a path.
pub(super) fn open_pinned(path: &Path) -> io::Result<OwnedFd> {
    let path = c_path(path)?;
    bpf(BPF_OBJ_GET, &mut PathAttr { path: path.as_ptr() as u64, fd: 0, flags: 0 }).map(owned)
}

/// What a link is attached to, and the id of its program.
pub(super) fn link_info(link: BorrowedFd<'_>) -> io::Result<(Target, u32)> {
    const LINK_TYPE_CGROUP: u32 = 3;
    const LINK_TYPE_NETNS: u32 = 5;
    const LINK_TYPE_TCX: u32 = 11;
    let mut info = RawLinkInfo { kind: 0, id: 0, prog_id: 0, _pad: 0, target: 0, attach_type: 0, _rest: [0; 33] };
    self::info(link, &mut info)?;
    let target = match info.kind {
        LINK_TYPE_CGROUP => Target::Cgroup(info.target),
        LINK_TYPE_NETNS => Target::Netns((info.target & u64::from(u32::MAX)) as u32),
        LINK_TYPE_TCX => Target::Device((info.target & u64::from(u32::MAX)) as u32),
        _ => Target::Other,
    };
    Ok((target, info.prog_id))
}

/// What the kernel says of a program, map or link, as much of it as there is room for.
pub(super) fn info<T>(of: BorrowedFd<'_>, info: &mut T) -> io::Result<()> {
    let (len, at) = (size::<T>(), std::ptr::from_mut(info) as u64);
    bpf(BPF_OBJ_GET_INFO_BY_FD, &mut InfoAttr { fd: raw(of), len, info: at }).map(drop)
}

fn size<T>() -> u32 {
    u32::try_from(size_of::<T>()).expect("a small struct")
}

/// Runs a program of packets on one whose data is `packet`; `after` is what the program has made of it. Gives what it
/// returns. A value of a type that any bytes make: [`aya::Pod`].
pub(super) fn test_run_packet<T: aya::Pod>(prog: BorrowedFd<'_>, packet: &T, after: &mut T) -> io::Result<u32> {
    let mut attr = RunAttr {
        prog_fd: raw(prog),
        data_size_in: size::<T>(),
        data_size_out: size::<T>(),
        data_in: std::ptr::from_ref(packet) as u64,
        data_out: std::ptr::from_mut(after) as u64,
        repeat: 1,
        ..RunAttr::default()
    };
    bpf(BPF_PROG_TEST_RUN, &mut attr)?;
    Ok(attr.retval)
}

/// Runs a program on a context, which the kernel writes back. Gives what it returns.
pub(super) fn test_run_context<T>(prog: BorrowedFd<'_>, context: &mut T) -> io::Result<u32> {
    let context_at = std::ptr::from_mut(context) as u64;
    let mut attr = RunAttr {
        prog_fd: raw(prog),
        ctx_size_in: size::<T>(),
        ctx_size_out: size::<T>(),
        ctx_in: context_at,
        ctx_out: context_at,
        repeat: 1,
        ..RunAttr::default()
    };
    bpf(BPF_PROG_TEST_RUN, &mut attr)?;
    Ok(attr.retval)
}

/// Pins `link`, or a program, at `path` in place of whatever is there, without an instant in which nothing is.
pub(super) fn pin_over(link: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let fresh = path.with_file_name(format!(
        "{}_new",
        path.file_name().and_then(|name| name.to_str()).ok_or(io::ErrorKind::InvalidInput)?
    ));
    match std::fs::remove_file(&fresh) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    pin(link, &fresh)?;
    std::fs::rename(&fresh, path)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd as _;

    use super::*;
    use crate::netns::testing::{new_netns, program};

    /// `attr` of BPF_PROG_QUERY.
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

    /// Programs at a device, the first that is asked first.
    fn at(device: u32) -> Vec<u32> {
        const BPF_PROG_QUERY: libc::c_long = 16;
        let mut ids = [0u32; 8];
        let mut attr = QueryAttr {
            target: device,
            kind: AttachType::TcxIngress as u32,
            flags: 0,
            attach_flags: 0,
            ids: ids.as_mut_ptr() as u64,
            count: 8,
            _pad: 0,
            _rest: [0; 4],
        };
        bpf(BPF_PROG_QUERY, &mut attr).expect("listed");
        ids[..attr.count as usize].to_vec()
    }

    /// A program of somebody else's that passes every frame must not hide any from ours.
    #[test]
    fn a_program_at_a_device_is_asked_before_those_that_are_there() {
        const LOOPBACK: u32 = 1;
        let (passing, ours) = (program(0), program(2));
        let there = new_netns();
        let order = there.run(|| {
            let other = create(passing.as_fd(), LOOPBACK, AttachType::TcxIngress, 0).expect("attached");
            let own = link_create_at(ours.as_fd(), LOOPBACK, AttachType::TcxIngress).expect("attached");
            let id = |link: &OwnedFd| link_info(link.as_fd()).expect("known").1;
            assert_eq!(at(LOOPBACK), [id(&own), id(&other)]);
        });
        order.expect("enter");
    }
}
