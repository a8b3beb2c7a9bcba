//! Enters a network namespace and comes back; [`sock_diag`] lists, reads and destroys the sockets in it, [`route`] finds its
//! devices, [`addresses`] its addresses.
//!
//! Which namespace is whose, and what is done inside, is the caller's business.
//!
//! Linux ties a namespace to a *thread*, and a socket to the namespace that its creator was in. So [`NetnsHandle::run`]
//! is short and synchronous: make the socket, bind it, leave. Everything after that works from any thread.

use std::{
    cell::{Cell, OnceCell},
    fs::File,
    io,
    marker::PhantomData,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, RawFd},
        unix::fs::MetadataExt,
    },
    path::Path,
    sync::OnceLock,
};

use nix::sched::{CloneFlags, setns};

pub mod addresses;
pub mod route;
pub mod sock_diag;

/// What tells two namespaces apart while at least one handle to each is open.
///
/// A number may be used again once the namespace is gone; [`NetnsHandle::cookie`] never is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NetnsId {
    /// Device of the namespace file system (nsfs).
    pub dev: u64,
    /// Inode: the number that `ip netns`, `lsns` and `bpftool link` print.
    pub inode: u64,
}

impl NetnsId {
    /// Of the namespace that a path leads to, without opening it: `/proc/PID/ns/net`, or a bind mount of one.
    ///
    /// # Errors
    /// The system call's; for a process, `NotFound` once it is dead.
    pub fn of_path(path: &Path) -> io::Result<Self> {
        let meta = std::fs::metadata(path)?;
        Ok(Self { dev: meta.dev(), inode: meta.ino() })
    }
}

/// An open network namespace: it exists for as long as this does, whether or not a process is left in it.
#[derive(Debug)]
pub struct NetnsHandle {
    file: File,
    id: NetnsId,
    cookie: OnceLock<u64>,
}

impl NetnsHandle {
    /// Opens the namespace of a process, through the `/proc` of the agent.
    ///
    /// # Errors
    /// `NotFound` if there is no such process (any more).
    pub fn open_by_pid(pid: u32) -> io::Result<Self> {
        Self::open_by_path(Path::new(&format!("/proc/{pid}/ns/net")))
    }

    /// Opens the namespace at a path: `/proc/PID/ns/net`, `/run/netns/NAME`.
    ///
    /// # Errors
    /// The system call's; `InvalidInput` if the file is no network namespace.
    pub fn open_by_path(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        if namespace_type(&file) != Some(libc::CLONE_NEWNET) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("{} is not a network namespace", path.display()),
            ));
        }
        let meta = file.metadata()?;
        Ok(Self { id: NetnsId { dev: meta.dev(), inode: meta.ino() }, file, cookie: OnceLock::new() })
    }

    /// Opens the namespace that the calling thread is in.
    ///
    /// # Errors
    /// The system call's: `/proc` is not mounted, or no file descriptor is left.
    pub fn current() -> io::Result<Self> {
        Self::open_by_path(Path::new("/proc/thread-self/ns/net"))
    }

    /// What to compare.
    pub fn id(&self) -> NetnsId {
        self.id
    }

    /// The kernel's cookie of the namespace: 64 bit, not used again until reboot, and what `bpf_get_netns_cookie`
    /// returns. Asked once and remembered.
    ///
    /// # Errors
    /// As [`NetnsHandle::run`]; `ENOPROTOOPT` on kernels before 5.14.
    pub fn cookie(&self) -> io::Result<u64> {
        if let Some(cookie) = self.cookie.get() {
            return Ok(*cookie);
        }
        let cookie = self.run(cookie_here)??;
        Ok(*self.cookie.get_or_init(|| cookie))
    }

    /// Calls `f` with the calling thread in this namespace, and returns to where the thread was, also if `f` panics.
    ///
    /// Nothing of `f` may start a thread, which would stay in the namespace for good. A thread that uses this must not
    /// change its namespace by other means, because the way back is opened once per thread. Calls may nest.
    ///
    /// # Errors
    /// Entering failed and `f` was not called: `PermissionDenied` without CAP_SYS_ADMIN.
    ///
    /// # Aborts
    /// If the way back fails: a worker left in a pod's namespace would send other pods' bytes there.
    pub fn run<T>(&self, f: impl FnOnce() -> T) -> io::Result<T> {
        let inside = Inside::enter(self)?;
        let value = f();
        drop(inside);
        Ok(value)
    }
}

impl AsFd for NetnsHandle {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl PartialEq for NetnsHandle {
    fn eq(&self, other: &Self) -> bool {
        self.id == other.id
    }
}

impl Eq for NetnsHandle {}

thread_local! {
    /// The namespace of this thread outside [`NetnsHandle::run`], opened at the first use.
    static HOME: OnceCell<File> = const { OnceCell::new() };
    /// The descriptor of the namespace that the innermost `run` of this thread entered; its handle is borrowed for as
    /// long as that `run` lasts.
    static ENTERED: Cell<Option<RawFd>> = const { Cell::new(None) };
}

/// A stay in a namespace; dropping it leaves. Not `Send`: the stay is the thread's.
struct Inside<'a> {
    outer: Option<RawFd>,
    _handle: PhantomData<(&'a NetnsHandle, *const ())>,
}

impl<'a> Inside<'a> {
    fn enter(handle: &'a NetnsHandle) -> io::Result<Self> {
        HOME.with(|home| {
            if home.get().is_none() {
                let file = File::open("/proc/thread-self/ns/net")?;
                home.get_or_init(|| file);
            }
            io::Result::Ok(())
        })?;
        setns(&handle.file, CloneFlags::CLONE_NEWNET)?;
        Ok(Self { outer: ENTERED.replace(Some(handle.file.as_raw_fd())), _handle: PhantomData })
    }
}

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        ENTERED.set(self.outer);
        let left = match self.outer {
            // SAFETY: the outer `run` is still on this thread's stack and borrows the handle that owns the descriptor.
            Some(outer) => setns(unsafe { BorrowedFd::borrow_raw(outer) }, CloneFlags::CLONE_NEWNET),
            None => HOME.with(|home| match home.get() {
                Some(home) => setns(home, CloneFlags::CLONE_NEWNET),
                None => Err(nix::errno::Errno::EBADF),
            }),
        };
        if let Err(errno) = left {
            eprintln!("culvert: setns back to the thread's own network namespace: {errno}; aborting");
            std::process::abort();
        }
    }
}

/// `ioctl(NS_GET_NSTYPE)`: the `CLONE_NEW*` flag of a namespace file, `None` for any other file.
fn namespace_type(file: &File) -> Option<i32> {
    /// `_IO(0xb7, 3)`, linux/nsfs.h.
    const NS_GET_NSTYPE: libc::Ioctl = 0xb703;
    // SAFETY: this request takes no argument and touches no memory of ours; the descriptor is open.
    let kind = unsafe { libc::ioctl(file.as_raw_fd(), NS_GET_NSTYPE) };
    (kind >= 0).then_some(kind)
}

/// Cookie of the namespace that the thread is in.
fn cookie_here() -> io::Result<u64> {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
    let socket = socket(AddressFamily::Unix, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    let mut cookie = 0u64;
    let mut len = size_of::<u64>() as libc::socklen_t;
    // SAFETY: the pointers are to a u64 and to its length, both alive during the call; the descriptor is open.
    let rc = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut len,
        )
    };
    if rc == 0 { Ok(cookie) } else { Err(io::Error::last_os_error()) }
}

/// Namespaces for tests of this crate.
#[cfg(test)]
#[expect(clippy::disallowed_methods, reason = "a test awaits what it has started, or ends with it")]
pub(crate) mod testing {
    use std::os::fd::{FromRawFd as _, OwnedFd};

    use super::*;

    /// Makes a network namespace with nothing in it but `lo`, brought up if asked for.
    pub(crate) fn new_netns() -> NetnsHandle {
        assert!(nix::unistd::geteuid().is_root(), "this test makes network namespaces: run it as root");
        let handle = std::thread::spawn(|| {
            nix::sched::unshare(CloneFlags::CLONE_NEWNET).expect("unshare(CLONE_NEWNET) as root");
            NetnsHandle::current().expect("/proc is mounted")
        })
        .join()
        .expect("the thread above does not panic");
        handle.run(lo_up).expect("enter").expect("bring lo up");
        handle
    }

    /// A loaded program for a device's frames that does nothing but say what becomes of them: `TC_ACT_*` of
    /// linux/pkt_cls.h.
    pub(crate) fn program(verdict: i32) -> OwnedFd {
        const BPF_PROG_LOAD: libc::c_long = 5;
        const BPF_PROG_TYPE_SCHED_CLS: u32 = 3;
        #[repr(C, align(8))]
        struct Load {
            kind: u32,
            instructions: u32,
            code: u64,
            license: u64,
            _rest: [u64; 3],
        }
        // r0 = verdict; exit
        let code = [0xb7 | u64::from(verdict.cast_unsigned()) << 32, 0x95];
        let mut attr = Load {
            kind: BPF_PROG_TYPE_SCHED_CLS,
            instructions: 2,
            code: code.as_ptr() as u64,
            license: c"GPL".as_ptr() as u64,
            _rest: [0; 3],
        };
        // SAFETY: `attr` is a fully initialised `repr(C)` value, passed with its size; what it points at lives on.
        let fd = unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_LOAD, &raw mut attr, size_of::<Load>()) };
        assert!(fd >= 0, "load a program: {}", io::Error::last_os_error());
        // SAFETY: the kernel has just returned this descriptor.
        unsafe { OwnedFd::from_raw_fd(i32::try_from(fd).expect("a descriptor")) }
    }

    fn lo_up() -> io::Result<()> {
        let socket = std::net::UdpSocket::bind("0.0.0.0:0")?;
        // SAFETY: an all-zero ifreq is a value; the name is shorter than the field and the rest stays NUL.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        request.ifr_name[0] = b'l' as _;
        request.ifr_name[1] = b'o' as _;
        request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as _;
        // SAFETY: SIOCSIFFLAGS reads one ifreq, which lives until the call returns.
        let rc = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) };
        if rc == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::{testing::new_netns, *};

    fn here() -> NetnsId {
        NetnsId::of_path(Path::new("/proc/thread-self/ns/net")).expect("/proc is mounted")
    }

    #[test]
    fn a_thread_enters_and_comes_back() {
        let (home, other) = (here(), new_netns());
        assert_ne!(home, other.id());
        let (inside, listener) =
            other.run(|| (here(), TcpListener::bind("127.0.0.1:0").expect("lo is up"))).expect("enter");
        assert_eq!(inside, other.id());
        assert_eq!(here(), home);
        // The socket stayed: it is reached from there, not from here.
        let addr = listener.local_addr().expect("bound");
        assert!(TcpStream::connect(addr).is_err());
        other.run(|| TcpStream::connect(addr)).expect("enter").expect("the listener is in this namespace");
    }

    #[test]
    fn a_panic_inside_comes_back_too() {
        let (home, other) = (here(), new_netns());
        let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            other.run(|| panic!("a bug inside")).expect("entered");
        }));
        assert!(caught.is_err());
        assert_eq!(here(), home);
    }

    #[test]
    fn stays_nest() {
        let (home, outer, inner) = (here(), new_netns(), new_netns());
        outer
            .run(|| {
                assert_eq!(inner.run(here).expect("enter"), inner.id());
                assert_eq!(here(), outer.id());
                assert_eq!(inner.run(here).expect("enter"), inner.id());
                assert_eq!(here(), outer.id());
            })
            .expect("enter");
        assert_eq!(here(), home);
    }

    #[test]
    fn cookies_tell_namespaces_apart() {
        let (a, b) = (new_netns(), new_netns());
        let (of_a, of_b) = (a.cookie().expect("kernel 5.14"), b.cookie().expect("kernel 5.14"));
        assert_ne!(of_a, of_b);
        assert_eq!(a.run(cookie_here).expect("enter").expect("kernel 5.14"), of_a);
        assert_eq!(a.cookie().expect("remembered"), of_a);
    }

    #[test]
    fn a_file_that_is_no_network_namespace_is_refused() {
        for path in ["/proc/self/ns/mnt", "/proc/self/stat", "/dev/null"] {
            let error = NetnsHandle::open_by_path(Path::new(path)).expect_err(path);
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{path}: {error}");
        }
        let own = NetnsHandle::open_by_pid(std::process::id()).expect("we live");
        assert_eq!(own, NetnsHandle::current().expect("/proc is mounted"));
    }

    /// A stay is paid for on every connection that the agent opens in a pod, so it has to stay in the microseconds.
    #[test]
    fn a_stay_is_cheap() {
        let other = new_netns();
        other.run(|| ()).expect("enter");
        let best = (0..5)
            .map(|_| {
                let start = std::time::Instant::now();
                for _ in 0..1000 {
                    other.run(|| ()).expect("enter");
                }
                start.elapsed() / 1000
            })
            .min()
            .expect("five rounds");
        eprintln!("a stay in a network namespace: {best:?}");
        assert!(best < std::time::Duration::from_micros(200), "{best:?} per stay");
    }
}
