//! The TCP sockets of one network namespace, asked of the kernel by netlink (sock_diag(7)): list, bytes, BPF storage,
//! destroy.
//!
//! What is worth listing or destroying is decided elsewhere. Layouts: linux/sock_diag.h and linux/inet_diag.h.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener},
    os::fd::{AsRawFd, BorrowedFd, OwnedFd},
    time::Duration,
};

use anyhow::{Context, bail, ensure};
use nix::{
    errno::Errno,
    sys::{
        socket::{
            AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, setsockopt, socket,
            sockopt::ReceiveTimeout,
        },
        time::{TimeVal, TimeValLike},
    },
};

use super::NetnsHandle;

/// A set of TCP states; bit `n` is state `n` of `enum tcp_state` (net/tcp_states.h).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct States(pub u32);

impl States {
    /// Data may pass in at least one direction, or the peer is unaware that it may not: all but LISTEN, the handshake,
    /// TIME_WAIT and CLOSE.
    pub const OPEN: Self = Self(1 << 1 | 1 << 4 | 1 << 5 | 1 << 8 | 1 << 9 | 1 << 11);
    /// SYN_RECV: the server's end of a handshake, with or without a socket of its own yet.
    pub const SYN_RECV: Self = Self(1 << 3);
    /// ESTABLISHED.
    pub const ESTABLISHED: Self = Self(1 << 1);
    /// Everything but LISTEN.
    pub const CONNECTIONS: Self = Self(Self::ALL.0 & !Self::LISTEN.0);
    /// LISTEN.
    pub const LISTEN: Self = Self(1 << 10);
    /// Every state.
    pub const ALL: Self = Self(0xfff);

    /// These and those.
    #[must_use]
    pub const fn and(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// Which socket: the addresses as the kernel's tables know it, and the cookie that no other socket ever has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SocketId {
    /// Address and port of this end. IPv4 mapped into IPv6 is shown as IPv4.
    pub local: SocketAddr,
    /// Address and port of the other end; unspecified for a listener.
    pub remote: SocketAddr,
    /// The interface that the socket is bound to; 0 for none.
    pub ifindex: u32,
    /// Socket cookie (`SO_COOKIE`, `bpf_get_socket_cookie`); never 0 of a socket that was listed.
    pub cookie: u64,
}

/// What to list.
#[derive(Clone, Copy, Debug)]
pub struct Query<'a> {
    /// Sockets in these states.
    pub states: States,
    /// Whether to fill [`Socket::bytes`].
    pub bytes: bool,
    /// A map of type `SK_STORAGE` whose values [`Socket::storage`] is to show. Needs CAP_BPF.
    pub storage: Option<BorrowedFd<'a>>,
}

/// What has passed through a socket. As the kernel counts: a SYN that this end sent, and a FIN in either direction,
/// count one byte each.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Bytes {
    /// Sent by this end and acknowledged by the other.
    pub acked: u64,
    /// Received in order by this end, read or not.
    pub received: u64,
}

/// One socket, as listed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Socket {
    /// Which.
    pub id: SocketId,
    /// `enum tcp_state`: 1 ESTABLISHED … 10 LISTEN.
    pub state: u8,
    /// Of the owner.
    pub uid: u32,
    /// Of the socket's file, as `/proc/PID/fd` shows it; 0 once the application has closed it.
    pub inode: u32,
    /// Id of the cgroup that the socket was made in; `None` in the handshake and in TIME_WAIT.
    pub cgroup: Option<u64>,
    /// If asked for, and the state has any.
    pub bytes: Option<Bytes>,
    /// If asked for, and the socket has a value in that map: the value.
    pub storage: Option<Vec<u8>>,
}

/// A netlink socket in one namespace; it works from every thread.
#[derive(Debug)]
pub struct SockDiag {
    socket: OwnedFd,
    seq: u32,
    buffer: Vec<u8>,
}

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLM_F_REQUEST: u16 = 0x1;
const NLM_F_ACK: u16 = 0x4;
const NLM_F_DUMP_INTR: u16 = 0x10;
const NLM_F_DUMP: u16 = 0x300;
const NLA_F_NESTED: u16 = 1 << 15;
const NLA_TYPE_MASK: u16 = 0x3fff;
const INET_DIAG_REQ_SK_BPF_STORAGES: u16 = 2;
const SK_DIAG_BPF_STORAGE_REQ_MAP_FD: u16 = 1;
const INET_DIAG_INFO: u16 = 2;
const INET_DIAG_SK_BPF_STORAGES: u16 = 20;
const INET_DIAG_CGROUP_ID: u16 = 21;
const SK_DIAG_BPF_STORAGE: u16 = 1;
const SK_DIAG_BPF_STORAGE_MAP_VALUE: u16 = 3;
/// Offsets of `tcpi_bytes_acked` and `tcpi_bytes_received` in `struct tcp_info`: part of the user interface.
const TCPI_BYTES_ACKED: usize = 120;
const TCPI_BYTES_RECEIVED: usize = 128;
const NLMSG_HEADER_BYTES: usize = 16;
const INET_DIAG_MSG_BYTES: usize = 72;
/// How often a list that changed under the kernel's hands, or that did not fit, is asked for again.
const ATTEMPTS: u32 = 5;

/// How one request for a list ended.
enum Dump {
    Complete,
    /// The kernel says that the list is not consistent.
    Interrupted,
    /// A message was cut off: this many bytes would have been needed.
    Truncated(usize),
}

impl SockDiag {
    /// Opens a netlink socket in a namespace.
    ///
    /// # Errors
    /// The namespace could not be entered, or the kernel has no sock_diag.
    pub fn open(netns: &NetnsHandle) -> anyhow::Result<Self> {
        let socket = netns
            .run(|| {
                socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkSockDiag)
            })
            .context("enter the network namespace for sock_diag")?
            .context("open a netlink socket for sock_diag (NETLINK_SOCK_DIAG)")?;
        // The kernel answers in the same system call; the time-out only keeps a kernel bug from hanging us.
        setsockopt(&socket, ReceiveTimeout, &TimeVal::seconds(Duration::from_secs(5).as_secs() as i64))
            .context("set the time-out of a netlink socket")?;
        Ok(Self { socket, seq: 0, buffer: vec![0; 64 << 10] })
    }

    /// Lists the TCP sockets of the namespace, both families.
    ///
    /// A socket that is opened or closed meanwhile may or may not be there; one that stays open throughout is, once.
    ///
    /// # Errors
    /// The kernel refused (no CAP_NET_ADMIN or CAP_BPF, no tcp_diag module, not a storage map), or the list kept
    /// changing in five attempts. No part of a list is ever returned for the whole.
    pub fn list(&mut self, query: &Query<'_>) -> anyhow::Result<Vec<Socket>> {
        let mut sockets = Vec::new();
        for family in [libc::AF_INET, libc::AF_INET6] {
            self.list_family(family as u8, query, &mut sockets)?;
        }
        Ok(sockets)
    }

    fn list_family(&mut self, family: u8, query: &Query<'_>, sockets: &mut Vec<Socket>) -> anyhow::Result<()> {
        let before = sockets.len();
        for _ in 0..ATTEMPTS {
            sockets.truncate(before);
            match self.dump(family, query, sockets)? {
                Dump::Complete => return Ok(()),
                Dump::Interrupted => {}
                Dump::Truncated(needed) => {
                    ensure!(needed <= 16 << 20, "a sock_diag message of {needed} bytes: refused");
                    self.buffer.resize(needed.next_power_of_two().max(self.buffer.len() * 2), 0);
                }
            }
        }
        bail!("list TCP sockets by sock_diag: the list was not consistent in {ATTEMPTS} attempts")
    }

    fn dump(&mut self, family: u8, query: &Query<'_>, sockets: &mut Vec<Socket>) -> anyhow::Result<Dump> {
        let extensions = if query.bytes { 1 << (INET_DIAG_INFO - 1) } else { 0 };
        let mut request = self.request(SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST | NLM_F_DUMP);
        request.extend([family, libc::IPPROTO_TCP as u8, extensions, 0]);
        request.extend(query.states.0.to_ne_bytes());
        request.extend([0; 48]);
        if let Some(map) = query.storage {
            // Nested: one attribute of a header and a u32.
            request.extend(12u16.to_ne_bytes());
            request.extend((INET_DIAG_REQ_SK_BPF_STORAGES | NLA_F_NESTED).to_ne_bytes());
            request.extend(8u16.to_ne_bytes());
            request.extend(SK_DIAG_BPF_STORAGE_REQ_MAP_FD.to_ne_bytes());
            request.extend(map.as_raw_fd().to_ne_bytes());
        }
        self.send(request)?;

        let mut outcome = Dump::Complete;
        loop {
            let received = match recv(self.socket.as_raw_fd(), &mut self.buffer, MsgFlags::MSG_TRUNC) {
                Ok(received) => received,
                Err(Errno::EINTR) => continue,
                // Messages were lost: the same as one that was cut off, and the end of the list still comes.
                Err(Errno::ENOBUFS) => {
                    outcome = Dump::Truncated(self.buffer.len());
                    continue;
                }
                Err(errno) => return Err(errno).context("receive a list of sockets (sock_diag)"),
            };
            if received > self.buffer.len() {
                outcome = Dump::Truncated(received);
            }
            // The part of a message that was cut off is refused by `messages`; the attempt is repeated anyway.
            for message in messages(&self.buffer[..received.min(self.buffer.len())]) {
                if message.seq != self.seq {
                    continue;
                }
                if message.flags & NLM_F_DUMP_INTR != 0 && matches!(outcome, Dump::Complete) {
                    outcome = Dump::Interrupted;
                }
                match message.kind {
                    SOCK_DIAG_BY_FAMILY => sockets.push(parse_socket(message.payload)?),
                    // DONE carries the kernel's error, if the list broke off.
                    NLMSG_DONE | NLMSG_ERROR => {
                        return match error_of(message.payload) {
                            None => Ok(outcome),
                            Some(Errno::ENOENT) => {
                                bail!("the kernel has no sock_diag for TCP: load its module tcp_diag")
                            }
                            Some(errno) => Err(errno).context("list TCP sockets (sock_diag)"),
                        };
                    }
                    _ => {}
                }
            }
        }
    }

    /// Closes a socket as if its owner had aborted it: the owner gets ECONNABORTED, the peer a reset.
    ///
    /// Returns whether there was such a socket; that it closed by itself in the meantime is no error.
    ///
    /// # Errors
    /// There is no cookie, or the kernel refused: no CAP_NET_ADMIN in the namespace, or built without
    /// CONFIG_INET_DIAG_DESTROY.
    pub fn destroy(&mut self, id: &SocketId) -> anyhow::Result<bool> {
        // Where the connection is gone, the kernel finds the listener by its addresses (inet_lookup), and would end that.
        anyhow::ensure!(id.cookie != 0, "destroy socket {} → {}: which one is not known", id.local, id.remote);
        let mut request = self.request(SOCK_DESTROY, NLM_F_REQUEST | NLM_F_ACK);
        let v4 = id.local.ip().to_canonical().is_ipv4() && id.remote.ip().to_canonical().is_ipv4();
        request.extend([if v4 { libc::AF_INET } else { libc::AF_INET6 } as u8, libc::IPPROTO_TCP as u8, 0, 0]);
        request.extend(States::ALL.0.to_ne_bytes());
        push_id(&mut request, id, v4);
        self.send(request)?;
        loop {
            let received = match recv(self.socket.as_raw_fd(), &mut self.buffer, MsgFlags::empty()) {
                Ok(received) => received,
                Err(Errno::EINTR) => continue,
                Err(errno) => return Err(errno).context("receive the answer to SOCK_DESTROY"),
            };
            for message in messages(&self.buffer[..received]) {
                if message.seq != self.seq || message.kind != NLMSG_ERROR {
                    continue;
                }
                return match error_of(message.payload) {
                    None => Ok(true),
                    // ESTALE: the addresses belong to a younger socket now.
                    Some(Errno::ENOENT | Errno::ESTALE) => Ok(false),
                    Some(Errno::EOPNOTSUPP) => {
                        bail!("the kernel cannot destroy sockets: it was built without CONFIG_INET_DIAG_DESTROY")
                    }
                    Some(errno) => Err(errno).with_context(|| format!("destroy socket {} → {}", id.local, id.remote)),
                };
            }
        }
    }

    /// A netlink header, to be completed by [`SockDiag::send`].
    fn request(&mut self, kind: u16, flags: u16) -> Vec<u8> {
        self.seq = self.seq.wrapping_add(1);
        let mut request = Vec::with_capacity(96);
        request.extend(0u32.to_ne_bytes());
        request.extend(kind.to_ne_bytes());
        request.extend(flags.to_ne_bytes());
        request.extend(self.seq.to_ne_bytes());
        request.extend(0u32.to_ne_bytes());
        request
    }

    fn send(&self, mut request: Vec<u8>) -> anyhow::Result<()> {
        let len = request.len() as u32;
        request[..4].copy_from_slice(&len.to_ne_bytes());
        loop {
            match send(self.socket.as_raw_fd(), &request, MsgFlags::empty()) {
                Ok(_) => return Ok(()),
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno).context("send a sock_diag request"),
            }
        }
    }
}

/// Destroys a socket of its own in a namespace, which shows that others can be: open connections that policy no longer
/// allows are closed so ([D.1]).
///
/// # Errors
/// The kernel cannot, or does not let us.
pub fn prove_destroy(netns: &NetnsHandle) -> anyhow::Result<()> {
    let own = netns.run(|| TcpListener::bind((Ipv4Addr::LOCALHOST, 0))).context("enter the network namespace")?;
    let own = own.and_then(|own| Ok((own.local_addr()?, own))).context("listen on 127.0.0.1")?;
    let mut diag = SockDiag::open(netns)?;
    let listening = diag.list(&Query { states: States::LISTEN, bytes: false, storage: None })?;
    let id = listening.iter().map(|socket| &socket.id).find(|id| id.local == own.0);
    ensure!(diag.destroy(id.context("sock_diag does not list a socket of our own")?)?, "it was not found again");
    Ok(())
}

/// One netlink message.
pub(super) struct Message<'a> {
    pub(super) kind: u16,
    flags: u16,
    pub(super) seq: u32,
    pub(super) payload: &'a [u8],
}

/// The messages of one datagram; ends at the first that is cut off.
pub(super) fn messages(mut rest: &[u8]) -> impl Iterator<Item = Message<'_>> {
    std::iter::from_fn(move || {
        let len = u32_at(rest, 0)? as usize;
        let payload = rest.get(NLMSG_HEADER_BYTES..len)?;
        let message = Message { kind: u16_at(rest, 4)?, flags: u16_at(rest, 6)?, seq: u32_at(rest, 8)?, payload };
        rest = rest.get(len.next_multiple_of(4)..).unwrap_or_default();
        Some(message)
    })
}

/// The attributes of a message or of a nested attribute: type without its flag bits, and value.
pub(super) fn attributes(mut rest: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let len = u16_at(rest, 0)? as usize;
        let value = rest.get(4..len)?;
        let kind = u16_at(rest, 2)? & NLA_TYPE_MASK;
        rest = rest.get(len.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

/// The error number that NLMSG_ERROR and NLMSG_DONE begin with; `None` for success.
pub(super) fn error_of(payload: &[u8]) -> Option<Errno> {
    match u32_at(payload, 0).map(u32::cast_signed) {
        None | Some(0) => None,
        Some(code) => Some(Errno::from_raw(code.wrapping_neg())),
    }
}

fn parse_socket(message: &[u8]) -> anyhow::Result<Socket> {
    ensure!(message.len() >= INET_DIAG_MSG_BYTES, "a sock_diag answer of {} bytes is too short", message.len());
    let v4 = i32::from(message[0]) == libc::AF_INET;
    let word = |at: usize| u32_at(message, at).context("length was checked");
    let mut socket = Socket {
        id: SocketId {
            local: SocketAddr::new(ip_at(message, 8, v4), u16::from_be_bytes([message[4], message[5]])),
            remote: SocketAddr::new(ip_at(message, 24, v4), u16::from_be_bytes([message[6], message[7]])),
            ifindex: word(40)?,
            cookie: u64::from(word(44)?) | u64::from(word(48)?) << 32,
        },
        state: message[1],
        uid: word(64)?,
        inode: word(68)?,
        cgroup: None,
        bytes: None,
        storage: None,
    };
    for (kind, value) in attributes(&message[INET_DIAG_MSG_BYTES..]) {
        match kind {
            INET_DIAG_CGROUP_ID => socket.cgroup = u64_at(value, 0),
            INET_DIAG_INFO => {
                socket.bytes = u64_at(value, TCPI_BYTES_ACKED)
                    .zip(u64_at(value, TCPI_BYTES_RECEIVED))
                    .map(|(acked, received)| Bytes { acked, received });
            }
            INET_DIAG_SK_BPF_STORAGES => {
                // One map was asked for, so there is one storage at most.
                socket.storage = attributes(value)
                    .filter(|(kind, _)| *kind == SK_DIAG_BPF_STORAGE)
                    .flat_map(|(_, storage)| attributes(storage))
                    .find(|(kind, _)| *kind == SK_DIAG_BPF_STORAGE_MAP_VALUE)
                    .map(|(_, value)| value.to_vec());
            }
            _ => {}
        }
    }
    Ok(socket)
}

/// `struct inet_diag_sockid`.
fn push_id(request: &mut Vec<u8>, id: &SocketId, v4: bool) {
    request.extend(id.local.port().to_be_bytes());
    request.extend(id.remote.port().to_be_bytes());
    for ip in [id.local.ip(), id.remote.ip()] {
        match ip.to_canonical() {
            IpAddr::V4(ip) if v4 => {
                request.extend(ip.octets());
                request.extend([0; 12]);
            }
            IpAddr::V4(ip) => request.extend(ip.to_ipv6_mapped().octets()),
            IpAddr::V6(ip) => request.extend(ip.octets()),
        }
    }
    request.extend(id.ifindex.to_ne_bytes());
    // All ones is INET_DIAG_NOCOOKIE.
    request.extend((id.cookie as u32).to_ne_bytes());
    request.extend(((id.cookie >> 32) as u32).to_ne_bytes());
}

fn ip_at(bytes: &[u8], at: usize, v4: bool) -> IpAddr {
    let mut octets = [0; 16];
    octets.copy_from_slice(&bytes[at..at + 16]);
    if v4 {
        let [a, b, c, d, ..] = octets;
        Ipv4Addr::new(a, b, c, d).into()
    } else {
        IpAddr::from(Ipv6Addr::from(octets)).to_canonical()
    }
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..at + 2)?.try_into().ok().map(u16::from_ne_bytes)
}

pub(super) fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at + 4)?.try_into().ok().map(u32::from_ne_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..at + 8)?.try_into().ok().map(u64::from_ne_bytes)
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read, Write},
        net::TcpStream,
        os::fd::{AsFd, FromRawFd},
    };

    use super::*;
    use crate::netns::testing::new_netns;

    const ALL: Query<'static> = Query { states: States::ALL, bytes: true, storage: None };

    /// A listener, and both ends of a connection to it, in a namespace.
    fn connection(netns: &NetnsHandle, addr: &str) -> (TcpListener, TcpStream, TcpStream) {
        netns
            .run(|| {
                let listener = TcpListener::bind(addr).expect("lo is up");
                let client = TcpStream::connect(listener.local_addr().expect("bound")).expect("it listens");
                let (server, _) = listener.accept().expect("it connected");
                (listener, client, server)
            })
            .expect("enter")
    }

    fn cookie(socket: &impl AsRawFd) -> u64 {
        let mut cookie = 0u64;
        let mut len = 8;
        // SAFETY: pointers to a u64 and its length, alive during the call.
        let rc = unsafe {
            libc::getsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_COOKIE,
                (&raw mut cookie).cast(),
                &raw mut len,
            )
        };
        assert_eq!(rc, 0);
        cookie
    }

    fn of<'a>(list: &'a [Socket], stream: &TcpStream) -> &'a Socket {
        let cookie = cookie(stream);
        list.iter().find(|socket| socket.id.cookie == cookie).expect("the socket is listed")
    }

    /// [D.1] needs every open connection of a pod, in both families, and of no other pod.
    #[test]
    fn the_sockets_of_one_namespace_are_listed_with_bytes() {
        let (netns, other) = (new_netns(), new_netns());
        let _elsewhere = connection(&other, "127.0.0.1:0");
        let mut diag = SockDiag::open(&netns).expect("open");
        assert_eq!(diag.list(&ALL).expect("list"), []);
        for addr in ["127.0.0.1:0", "[::1]:0"] {
            let (_listener, mut client, mut server) = connection(&netns, addr);
            client.write_all(&[7; 1000]).expect("open");
            server.read_exact(&mut [0; 1000]).expect("open");
            server.write_all(&[7; 50]).expect("open");
            client.read_exact(&mut [0; 50]).expect("open");
            let list = diag.list(&ALL).expect("list");
            let (of_client, of_server) = (of(&list, &client), of(&list, &server));
            assert_eq!(of_client.id.local, client.local_addr().expect("open"));
            assert_eq!(of_client.id.remote, client.peer_addr().expect("open"));
            assert_eq!((of_client.state, of_server.state), (1, 1));
            assert_eq!(of_client.uid, 0);
            assert_ne!(of_client.inode, 0);
            // The SYN counts for the client; acknowledgements may be under way still.
            let bytes = of_server.bytes.expect("asked for");
            assert_eq!(bytes.received, 1000);
            assert_eq!(of_client.bytes.expect("asked for").received, 50);
            assert!(of_client.bytes.expect("asked for").acked <= 1001);
            assert!(of_client.cgroup.is_some_and(|id| id != 0));
            assert_eq!(diag.list(&Query { states: States::LISTEN, ..ALL }).expect("list").len(), 1);
            let open = diag.list(&Query { states: States::OPEN, bytes: false, storage: None }).expect("list");
            assert!(open.iter().all(|socket| socket.bytes.is_none() && socket.storage.is_none()));
            assert_eq!(open.len(), 2);
        }
    }

    #[test]
    fn a_mapped_address_is_shown_as_ipv4_and_can_be_destroyed() {
        let netns = new_netns();
        let listener = netns.run(|| TcpListener::bind("[::]:0").expect("lo is up")).expect("enter");
        let port = listener.local_addr().expect("bound").port();
        let client = netns.run(|| TcpStream::connect(("127.0.0.1", port)).expect("dual stack")).expect("enter");
        let (server, _) = listener.accept().expect("it connected");
        let mut diag = SockDiag::open(&netns).expect("open");
        let list = diag.list(&ALL).expect("list");
        assert_eq!(of(&list, &server).id.local, format!("127.0.0.1:{port}").parse().expect("an address"));
        assert!(diag.destroy(&of(&list, &server).id).expect("destroy"));
        assert_eq!((&client).read(&mut [0]).expect_err("reset").raw_os_error(), Some(libc::ECONNRESET));
    }

    /// [D.1] closes what is no longer allowed, and only that.
    #[test]
    fn destroying_aborts_one_connection_and_leaves_the_others() {
        let netns = new_netns();
        let mut diag = SockDiag::open(&netns).expect("open");
        for addr in ["127.0.0.1:0", "[::1]:0"] {
            let (listener, mut client, mut server) = connection(&netns, addr);
            let mut other = netns
                .run(|| TcpStream::connect(listener.local_addr().expect("bound")).expect("it listens"))
                .expect("enter");
            let (mut other_server, _) = listener.accept().expect("it connected");
            let id = of(&diag.list(&ALL).expect("list"), &server).id;

            let younger = SocketId { cookie: id.cookie + 1, ..id };
            assert!(!diag.destroy(&younger).expect("another cookie is another socket"));
            assert!(diag.destroy(&id).expect("destroy"));
            assert!(!diag.destroy(&id).expect("it is gone, which is no error"));
            // The kernel would take the listener for it.
            assert!(diag.destroy(&SocketId { cookie: 0, ..id }).is_err());

            assert_eq!(server.read(&mut [0]).expect_err("aborted").raw_os_error(), Some(libc::ECONNABORTED));
            assert_eq!(client.read(&mut [0]).expect_err("reset").raw_os_error(), Some(libc::ECONNRESET));
            other.write_all(b"x").expect("untouched");
            other_server.read_exact(&mut [0]).expect("untouched");
        }
    }

    /// Takes a capability from this thread.
    fn drop_capability(number: usize) {
        /// `struct __user_cap_header_struct` of linux/capability.h, version 3.
        #[repr(C)]
        struct Header {
            version: u32,
            pid: i32,
        }
        let mut header = Header { version: 0x2008_0522, pid: 0 };
        // Two of `struct __user_cap_data_struct`: effective, permitted, inheritable.
        let mut sets = [[0u32; 3]; 2];
        // SAFETY: both are as long as version 3 says, and alive during the call.
        let got = unsafe { libc::syscall(libc::SYS_capget, &raw mut header, sets.as_mut_ptr()) };
        sets[number / 32][0] &= !(1 << (number % 32));
        // SAFETY: as above; without the C library's wrapper it concerns this thread alone.
        let set = unsafe { libc::syscall(libc::SYS_capset, &raw mut header, sets.as_ptr()) };
        assert_eq!((got, set), (0, 0));
    }

    /// [D.1] needs it, so an agent asks before it takes a node.
    #[test]
    fn whether_sockets_can_be_destroyed_is_found_out_without_harm() {
        let netns = new_netns();
        let (_listener, mut client, mut server) = connection(&netns, "127.0.0.1:0");
        prove_destroy(&netns).expect("this kernel can");
        client.write_all(b"x").expect("untouched");
        server.read_exact(&mut [0]).expect("untouched");
        let mut diag = SockDiag::open(&netns).expect("open");
        assert_eq!(diag.list(&Query { states: States::LISTEN, ..ALL }).expect("list").len(), 1, "its own has gone");
        // As a kernel without CONFIG_INET_DIAG_DESTROY, a sandbox may forbid it: that is told at once.
        let error = std::thread::scope(|scope| {
            let without = scope.spawn(|| {
                // CAP_NET_ADMIN
                drop_capability(12);
                prove_destroy(&netns)
            });
            without.join().expect("no panic")
        });
        let error = format!("{:#}", error.expect_err("without CAP_NET_ADMIN"));
        assert!(error.contains("destroy socket") && error.contains("EPERM"), "{error}");
    }

    /// More sockets than one message holds, opened and closed while the list is made.
    #[test]
    fn a_long_list_is_whole_while_others_come_and_go() {
        let netns = new_netns();
        let stay: Vec<_> = (0..400).map(|_| connection(&netns, "127.0.0.1:0")).collect();
        let mut diag = SockDiag::open(&netns).expect("open");
        // So small that messages are cut off: the list is asked for again with more room.
        diag.buffer.truncate(1024);
        diag.buffer.shrink_to_fit();
        let done = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(std::sync::atomic::Ordering::Relaxed) {
                    drop(connection(&netns, "127.0.0.1:0"));
                }
            });
            for _ in 0..20 {
                let list = diag.list(&Query { states: States::ESTABLISHED, ..ALL }).expect("list");
                let cookies: std::collections::HashSet<u64> = list.iter().map(|socket| socket.id.cookie).collect();
                assert_eq!(cookies.len(), list.len(), "one socket twice");
                for (_, client, server) in &stay {
                    assert!(cookies.contains(&cookie(client)) && cookies.contains(&cookie(server)), "one is missing");
                }
            }
            done.store(true, std::sync::atomic::Ordering::Relaxed);
        });
        assert!(diag.buffer.len() > 1024);
    }

    /// A map of type SK_STORAGE: 4-byte key, 8-byte value.
    fn storage_map() -> OwnedFd {
        // BTF with `int` (4 bytes, type 1) and `long` (8 bytes, type 2); linux/btf.h.
        let mut types = Vec::new();
        for (name, bytes) in [(1u32, 4u32), (5, 8)] {
            for word in [name, 1 << 24, bytes, bytes * 8] {
                types.extend(word.to_ne_bytes());
            }
        }
        let strings = b"\0int\0long\0";
        let mut btf = Vec::new();
        btf.extend(0xeb9fu16.to_ne_bytes());
        btf.extend([1, 0]);
        for word in [24, 0, types.len() as u32, types.len() as u32, strings.len() as u32] {
            btf.extend(word.to_ne_bytes());
        }
        btf.extend(types);
        btf.extend(strings);

        const BPF_BTF_LOAD: i64 = 18;
        let mut attr = [0u64; 16];
        attr[0] = btf.as_ptr() as u64;
        attr[2] = btf.len() as u64;
        let btf_fd = bpf(BPF_BTF_LOAD, &attr).expect("BPF_BTF_LOAD as root");

        const BPF_MAP_CREATE: i64 = 0;
        const BPF_MAP_TYPE_SK_STORAGE: u32 = 24;
        const BPF_F_NO_PREALLOC: u32 = 1;
        // map_type, key_size, value_size, max_entries, map_flags, … btf_fd, btf_key_type_id, btf_value_type_id.
        let mut words = [0u32; 32];
        words[..5].copy_from_slice(&[BPF_MAP_TYPE_SK_STORAGE, 4, 8, 0, BPF_F_NO_PREALLOC]);
        words[12..15].copy_from_slice(&[btf_fd.as_raw_fd() as u32, 1, 2]);
        let mut attr = [0u64; 16];
        for (to, from) in attr.iter_mut().zip(words.chunks_exact(2)) {
            *to = u64::from_ne_bytes([from[0].to_ne_bytes(), from[1].to_ne_bytes()].concat().try_into().expect("8"));
        }
        bpf(BPF_MAP_CREATE, &attr).expect("BPF_MAP_CREATE as root")
    }

    fn store(map: &OwnedFd, socket: &impl AsRawFd, value: u64) {
        const BPF_MAP_UPDATE_ELEM: i64 = 2;
        let key = socket.as_raw_fd();
        let mut attr = [0u64; 16];
        attr[0] = map.as_raw_fd() as u64;
        attr[1] = &raw const key as u64;
        attr[2] = &raw const value as u64;
        // An update returns 0, which is not a descriptor of ours to close.
        std::mem::forget(bpf(BPF_MAP_UPDATE_ELEM, &attr).expect("BPF_MAP_UPDATE_ELEM"));
    }

    fn bpf(command: i64, attr: &[u64; 16]) -> std::io::Result<OwnedFd> {
        // SAFETY: the attribute is as long as we say, and whatever it points to outlives the call.
        let rc = unsafe { libc::syscall(libc::SYS_bpf, command, attr.as_ptr(), size_of_val(attr)) };
        if rc < 0 {
            return Err(std::io::Error::last_os_error());
        }
        // SAFETY: the commands of this test return a new descriptor, or 0 that is never dropped.
        Ok(unsafe { OwnedFd::from_raw_fd(rc as i32) })
    }

    /// The verdict that the kernel noted in a socket's storage is read back with the list.
    #[test]
    fn storage_is_shown_for_the_sockets_that_have_it() {
        let netns = new_netns();
        let (_listener, client, server) = connection(&netns, "127.0.0.1:0");
        let (map, other_map) = (storage_map(), storage_map());
        store(&map, &server, 0x1122_3344_5566_7788);
        store(&other_map, &client, 42);
        let mut diag = SockDiag::open(&netns).expect("open");
        let list = diag.list(&Query { storage: Some(map.as_fd()), ..ALL }).expect("list");
        assert_eq!(of(&list, &server).storage.as_deref(), Some(&0x1122_3344_5566_7788u64.to_ne_bytes()[..]));
        assert_eq!(of(&list, &client).storage, None);
        assert!(of(&list, &server).bytes.is_some());
        let list = diag.list(&Query { storage: Some(other_map.as_fd()), ..ALL }).expect("list");
        assert_eq!(of(&list, &client).storage.as_deref(), Some(&42u64.to_ne_bytes()[..]));
        assert_eq!(of(&list, &server).storage, None);

        // What is no storage map is an error, not a list without values; and the socket works afterwards.
        let file = std::fs::File::open("/dev/null").expect("it exists");
        assert!(diag.list(&Query { storage: Some(file.as_fd()), ..ALL }).is_err());
        assert_eq!(diag.list(&ALL).expect("list").len(), 3);
    }

    proptest::proptest! {
        /// Whatever a message claims of its lengths, parsing ends and reads nothing outside.
        #[test]
        fn any_bytes_are_parsed_without_panic(bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..300)) {
            for message in messages(&bytes) {
                let _ = parse_socket(message.payload);
                let _ = error_of(message.payload);
            }
            let _ = parse_socket(&bytes);
            let _ = attributes(&bytes).count();
        }
    }
}
