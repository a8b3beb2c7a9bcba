//! epoll, sockets that do not block, and what a process needs for many of them.

use std::io;
use std::mem;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::Duration;

use anyhow::{Context, Result};

/// Readiness to read, as epoll has it.
pub(super) const READ: u32 = libc::EPOLLIN as u32;
/// Readiness to write.
pub(super) const WRITE: u32 = libc::EPOLLOUT as u32;
/// The connection is broken, or ended on both sides.
pub(super) const END: u32 = (libc::EPOLLERR | libc::EPOLLHUP) as u32;

/// Events taken from the kernel at a time.
const EVENTS: usize = 512;

/// One epoll, with room for its events.
pub(super) struct Poll {
    epoll: OwnedFd,
    events: Vec<libc::epoll_event>,
}

impl Poll {
    pub(super) fn new() -> Result<Self> {
        // SAFETY: no pointers; a descriptor that it returns is new and nobody else's.
        let fd = unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error()).context("epoll_create1");
        }
        // SAFETY: see above.
        let epoll = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(Self { epoll, events: vec![libc::epoll_event { events: 0, u64: 0 }; EVENTS] })
    }

    /// Watches a descriptor, level-triggered; `key` comes back with its events.
    pub(super) fn add(&self, socket: &impl AsRawFd, interest: u32, key: usize) -> Result<()> {
        self.control(libc::EPOLL_CTL_ADD, socket, interest, key)
    }

    /// Changes what is watched for.
    pub(super) fn change(&self, socket: &impl AsRawFd, interest: u32, key: usize) -> Result<()> {
        self.control(libc::EPOLL_CTL_MOD, socket, interest, key)
    }

    fn control(&self, operation: i32, socket: &impl AsRawFd, interest: u32, key: usize) -> Result<()> {
        let mut event = libc::epoll_event { events: interest, u64: key as u64 };
        // SAFETY: `event` is one epoll_event.
        let done = unsafe { libc::epoll_ctl(self.epoll.as_raw_fd(), operation, socket.as_raw_fd(), &mut event) };
        if done < 0 { Err(io::Error::last_os_error()).context("epoll_ctl") } else { Ok(()) }
    }

    /// Waits for events, at most for `limit`; gives their number for [`Self::event`].
    pub(super) fn wait(&mut self, limit: Option<Duration>) -> usize {
        let limit = limit.map(|limit| libc::timespec {
            tv_sec: libc::time_t::try_from(limit.as_secs()).unwrap_or(libc::time_t::MAX),
            tv_nsec: libc::c_long::from(limit.subsec_nanos()),
        });
        let limit = limit.as_ref().map_or(std::ptr::null(), |limit| &raw const *limit);
        // epoll_pwait2(2), since a pause between paced requests is shorter than a millisecond.
        // SAFETY: `events` has room for EVENTS, `limit` is null or one timespec, no signal mask is given.
        let got = unsafe {
            libc::syscall(
                libc::SYS_epoll_pwait2,
                self.epoll.as_raw_fd(),
                self.events.as_mut_ptr(),
                EVENTS as libc::c_int,
                limit,
                std::ptr::null::<libc::sigset_t>(),
                0_usize,
            )
        };
        // EINTR is no event.
        usize::try_from(got).unwrap_or(0)
    }

    /// An event of the last [`Self::wait`]: its key, and what is ready.
    pub(super) fn event(&self, index: usize) -> (usize, u32) {
        let event = self.events[index];
        (event.u64 as usize, event.events)
    }
}

/// Begins a connection that does not block.
pub(super) fn connect(to: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::from(socket(to)?);
    stream.set_nodelay(true)?;
    let (address, length) = address(to);
    // SAFETY: `address` is a socket address of `length` bytes.
    let done = unsafe { libc::connect(stream.as_raw_fd(), (&raw const address).cast(), length) };
    if done < 0 {
        let error = io::Error::last_os_error();
        if error.raw_os_error() != Some(libc::EINPROGRESS) {
            return Err(error);
        }
    }
    Ok(stream)
}

/// Listens on a port of both families, beside other listeners of this process on the same port.
pub(super) fn listen(port: u16) -> Result<TcpListener> {
    let any = SocketAddr::from(([0_u16; 8], port));
    let listener = socket(any).context("make a socket")?;
    for (level, name, value) in [
        (libc::SOL_SOCKET, libc::SO_REUSEADDR, 1),
        (libc::SOL_SOCKET, libc::SO_REUSEPORT, 1),
        (libc::IPPROTO_IPV6, libc::IPV6_V6ONLY, 0),
    ] {
        option(&listener, level, name, value)?;
    }
    let (address, length) = address(any);
    // SAFETY: `address` is a socket address of `length` bytes.
    if unsafe { libc::bind(listener.as_raw_fd(), (&raw const address).cast(), length) } < 0 {
        return Err(io::Error::last_os_error()).with_context(|| format!("bind to port {port}"));
    }
    // SAFETY: no pointers.
    if unsafe { libc::listen(listener.as_raw_fd(), 65_535) } < 0 {
        return Err(io::Error::last_os_error()).with_context(|| format!("listen on port {port}"));
    }
    Ok(listener.into())
}

/// Sets an option whose value is an int.
pub(super) fn option(socket: &impl AsRawFd, level: i32, name: i32, value: i32) -> Result<()> {
    let length = size_of_val(&value) as libc::socklen_t;
    // SAFETY: `value` has `length` readable bytes.
    let done = unsafe { libc::setsockopt(socket.as_raw_fd(), level, name, (&raw const value).cast(), length) };
    if done < 0 { Err(io::Error::last_os_error()).context("setsockopt") } else { Ok(()) }
}

fn socket(to: SocketAddr) -> io::Result<OwnedFd> {
    let family = if to.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    // SAFETY: no pointers; a descriptor that it returns is new and nobody else's.
    unsafe {
        let fd = libc::socket(family, libc::SOCK_STREAM | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC, 0);
        if fd < 0 { Err(io::Error::last_os_error()) } else { Ok(OwnedFd::from_raw_fd(fd)) }
    }
}

fn address(to: SocketAddr) -> (libc::sockaddr_storage, libc::socklen_t) {
    // SAFETY: all-zero is a value of this plain structure.
    let mut storage: libc::sockaddr_storage = unsafe { mem::zeroed() };
    let length = match to {
        SocketAddr::V4(to) => {
            let address = libc::sockaddr_in {
                sin_family: libc::AF_INET as u16,
                sin_port: to.port().to_be(),
                sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes(to.ip().octets()) },
                sin_zero: [0; 8],
            };
            // SAFETY: a sockaddr_storage has room for every kind of address, and its alignment.
            unsafe { (&raw mut storage).cast::<libc::sockaddr_in>().write(address) };
            size_of::<libc::sockaddr_in>()
        }
        SocketAddr::V6(to) => {
            let address = libc::sockaddr_in6 {
                sin6_family: libc::AF_INET6 as u16,
                sin6_port: to.port().to_be(),
                sin6_flowinfo: 0,
                sin6_addr: libc::in6_addr { s6_addr: to.ip().octets() },
                sin6_scope_id: to.scope_id(),
            };
            // SAFETY: as above.
            unsafe { (&raw mut storage).cast::<libc::sockaddr_in6>().write(address) };
            size_of::<libc::sockaddr_in6>()
        }
    };
    (storage, length as libc::socklen_t)
}

/// As many open files as the kernel lets this process have, and timers without the usual slack of 50 µs, which would
/// show in paced latencies.
pub(super) fn prepare_process() -> Result<()> {
    allow_open_files()?;
    // SAFETY: this option takes one number.
    if unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1000) } < 0 {
        return Err(io::Error::last_os_error()).context("prctl(PR_SET_TIMERSLACK)");
    }
    Ok(())
}

/// Raises the limit of open files to the largest that is allowed, for this process and those it starts.
///
/// # Errors
/// The kernel refused.
pub fn allow_open_files() -> Result<()> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` is one rlimit.
    if unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) } < 0 {
        return Err(io::Error::last_os_error()).context("getrlimit");
    }
    limit.rlim_cur = limit.rlim_max;
    // SAFETY: as above.
    if unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &limit) } < 0 {
        return Err(io::Error::last_os_error()).context("setrlimit");
    }
    Ok(())
}
