//! Every way known to us of getting something out of a pod without calling `connect` on an ordinary socket.
//!
//! What is sent carries a marker, so that whoever records the link can tell whether it got through readably.

use std::ffi::c_void;
use std::fs;
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::Duration;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use super::Failure;

/// A way.
#[derive(ValueEnum, Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Way {
    /// An ordinary socket: what all others are compared with.
    Plain,
    /// As a user that nobody knows.
    Uid,
    /// SO_MARK, which CAP_NET_RAW allows.
    Mark,
    /// IP_TRANSPARENT, bound to an address of somebody else's.
    Transparent,
    /// Bound to `--from-port`.
    Bound,
    /// sendto with MSG_FASTOPEN.
    FastOpen,
    /// TCP_FASTOPEN_CONNECT.
    FastOpenConnect,
    /// MPTCP.
    Mptcp,
    /// An IPv6 socket and an IPv4-mapped address.
    Mapped,
    /// IORING_OP_CONNECT.
    IoUring,
    /// A UDP-Lite socket.
    UdpLite,
    /// An SCTP socket.
    Sctp,
    /// A UDP socket.
    Udp,
    /// A UDP socket that is connected first.
    UdpConnected,
    /// A raw IP socket that sends a SYN.
    RawSyn,
    /// A packet socket that sends a SYN.
    PacketSyn,
    /// The same, past the pod's queues and filters (PACKET_QDISC_BYPASS).
    BypassSyn,
    /// A SYN in a fragment.
    FragmentSyn,
    /// A SYN behind IPv6 destination options.
    OptionsSyn,
    /// A SYN in a tagged frame (IEEE 802.1Q).
    TaggedSyn,
    /// A SYN from another address.
    ForeignSyn,
    /// UDP from another address.
    ForeignUdp,
    /// The SCTP of a raw IP socket.
    RawSctp,
    /// The UDP-Lite of a raw IP socket.
    RawUdpLite,
    /// IP in IP.
    IpInIp,
    /// A frame that is neither IP nor ARP.
    OtherFrame,
}

/// What came of it, as far as the sender can tell.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AttackResult {
    /// `answered` by a server, `sent`, or `failed`.
    pub outcome: String,
    /// Of a connection that failed.
    pub failure: Option<Failure>,
    /// What the system said.
    pub error: Option<String>,
}

/// What an attack is made of.
#[derive(Debug, Clone)]
pub(super) struct Attack {
    pub(super) way: Way,
    pub(super) to: SocketAddr,
    pub(super) marker: String,
    pub(super) from: Option<IpAddr>,
    pub(super) from_port: u16,
    pub(super) limit: Duration,
}

/// The pod's device.
const DEVICE: &str = "eth0";
const ETH_P_IP: u16 = 0x0800;
const ETH_P_IPV6: u16 = 0x86dd;
const ETH_P_8021Q: u16 = 0x8100;
/// For local experiments (IEEE 802).
const ETH_P_LOCAL: u16 = 0x88b5;
const PACKET_QDISC_BYPASS: i32 = 20;
const IPPROTO_UDPLITE: i32 = 136;
const IPPROTO_SCTP: i32 = 132;
const IPPROTO_MPTCP: i32 = 262;
const IP_TRANSPARENT: i32 = 19;
const IPV6_TRANSPARENT: i32 = 75;
const TCP_FASTOPEN_CONNECT: i32 = 30;

pub(super) fn run(attack: &Attack) -> AttackResult {
    match go(attack) {
        Ok(outcome) => AttackResult { outcome: outcome.to_owned(), failure: None, error: None },
        Err(error) => AttackResult {
            outcome: "failed".to_owned(),
            failure: Some(Failure::of(&error)),
            error: Some(error.to_string()),
        },
    }
}

fn go(attack: &Attack) -> io::Result<&'static str> {
    let to = attack.to;
    let family = if to.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    let stream = || Socket::new(family, libc::SOCK_STREAM, 0);
    match attack.way {
        Way::Plain => talk(attack, stream()?.connected(to, attack.limit)?),
        Way::Uid => {
            // SAFETY: changes this process's user only; it has one thread.
            check(unsafe { libc::setresuid(12345, 12345, 12345) }.into())?;
            talk(attack, stream()?.connected(to, attack.limit)?)
        }
        Way::Mark => {
            let socket = stream()?;
            socket.set(libc::SOL_SOCKET, libc::SO_MARK, 0x1337)?;
            talk(attack, socket.connected(to, attack.limit)?)
        }
        Way::Transparent => {
            let socket = stream()?;
            match to {
                SocketAddr::V4(_) => socket.set(libc::SOL_IP, IP_TRANSPARENT, 1)?,
                SocketAddr::V6(_) => socket.set(libc::SOL_IPV6, IPV6_TRANSPARENT, 1)?,
            }
            socket.bind(SocketAddr::new(attack.from.unwrap_or(Ipv4Addr::UNSPECIFIED.into()), 0))?;
            talk(attack, socket.connected(to, attack.limit)?)
        }
        Way::Bound => {
            let socket = stream()?;
            socket.set(libc::SOL_SOCKET, libc::SO_REUSEADDR, 1)?;
            let any = if to.is_ipv4() { "0.0.0.0" } else { "::" }.parse().map_err(io::Error::other)?;
            socket.bind(SocketAddr::new(any, attack.from_port))?;
            talk(attack, socket.connected(to, attack.limit)?)
        }
        Way::Mptcp => talk(attack, Socket::new(family, libc::SOCK_STREAM, IPPROTO_MPTCP)?.connected(to, attack.limit)?),
        Way::Sctp => talk(attack, Socket::new(family, libc::SOCK_STREAM, IPPROTO_SCTP)?.connected(to, attack.limit)?),
        Way::Mapped => {
            let IpAddr::V4(v4) = to.ip() else { return Err(io::ErrorKind::InvalidInput.into()) };
            let socket = Socket::new(libc::AF_INET6, libc::SOCK_STREAM, 0)?;
            talk(attack, socket.connected((v4.to_ipv6_mapped(), to.port()).into(), attack.limit)?)
        }
        Way::FastOpen => {
            let socket = stream()?.with_limit(attack.limit)?;
            socket.send_to(request(attack).as_bytes(), libc::MSG_FASTOPEN, to)?;
            answer(socket.into_stream())
        }
        Way::FastOpenConnect => {
            let socket = stream()?;
            socket.set(libc::IPPROTO_TCP, TCP_FASTOPEN_CONNECT, 1)?;
            talk(attack, socket.connected(to, attack.limit)?)
        }
        Way::IoUring => {
            let socket = stream()?.with_limit(attack.limit)?;
            uring::connect(&socket.fd, &raw_address(to))?;
            talk(attack, socket.into_stream())
        }
        Way::UdpLite => {
            let socket = Socket::new(family, libc::SOCK_DGRAM, IPPROTO_UDPLITE)?;
            socket.send_to(attack.marker.as_bytes(), 0, to)?;
            Ok("sent")
        }
        Way::UdpConnected => {
            let socket = UdpSocket::bind(if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" })?;
            socket.connect(to)?;
            socket.send(attack.marker.as_bytes())?;
            Ok("sent")
        }
        Way::Udp => {
            let socket = UdpSocket::bind(if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" })?;
            socket.send_to(attack.marker.as_bytes(), to)?;
            Ok("sent")
        }
        Way::RawSyn
        | Way::PacketSyn
        | Way::BypassSyn
        | Way::FragmentSyn
        | Way::OptionsSyn
        | Way::TaggedSyn
        | Way::ForeignSyn
        | Way::ForeignUdp
        | Way::RawSctp
        | Way::RawUdpLite
        | Way::IpInIp
        | Way::OtherFrame => forge(attack),
    }
}

fn request(attack: &Attack) -> String {
    format!("GET / HTTP/1.1\r\nHost: server\r\nX-Marker: {}\r\nConnection: close\r\n\r\n", attack.marker)
}

fn talk(attack: &Attack, mut stream: TcpStream) -> io::Result<&'static str> {
    stream.write_all(request(attack).as_bytes())?;
    answer(stream)
}

fn answer(mut stream: TcpStream) -> io::Result<&'static str> {
    let mut text = Vec::new();
    stream.read_to_end(&mut text)?;
    if text.starts_with(b"HTTP/1.1 200") { Ok("answered") } else { Err(io::ErrorKind::UnexpectedEof.into()) }
}

/// Frames and packets that no connection makes.
fn forge(attack: &Attack) -> io::Result<&'static str> {
    let own = own_address(attack.to)?;
    let source = match attack.way {
        Way::ForeignSyn | Way::ForeignUdp => attack.from.ok_or(io::ErrorKind::InvalidInput)?,
        _ => own,
    };
    let payload = attack.marker.as_bytes();
    let (protocol, body) = match attack.way {
        Way::ForeignUdp => (17, udp(40001, attack.to.port(), payload)),
        Way::RawUdpLite => (136, udp(40001, attack.to.port(), payload)),
        // What matters is the number in the header; a port pair, a tag, and text.
        Way::RawSctp => (132, [&[0x9c, 0x41, 0x1b, 0x58, 0, 0, 0, 0, 0, 0, 0, 0][..], payload].concat()),
        Way::IpInIp => {
            let inner = syn(source, attack.to, payload);
            (4, ipv4(source, attack.to.ip(), 6, 0, &inner)?)
        }
        _ => (6, syn(source, attack.to, payload)),
    };
    let fragment = if attack.way == Way::FragmentSyn { 0x2000 } else { 0 };
    let mut ethertype = if attack.to.is_ipv4() { ETH_P_IP } else { ETH_P_IPV6 };
    let mut packet = match attack.to.ip() {
        IpAddr::V4(_) => ipv4(source, attack.to.ip(), protocol, fragment, &body)?,
        IpAddr::V6(_) if attack.way == Way::OptionsSyn => {
            // Destination options of eight bytes: PadN.
            let options = [&[6u8, 0, 1, 4, 0, 0, 0, 0][..], &body].concat();
            ipv6(source, attack.to.ip(), 60, &options)?
        }
        IpAddr::V6(_) if attack.way == Way::FragmentSyn => {
            // The first of several (RFC 8200 §4.5).
            let fragment = [&[6u8, 0, 0, 1, 0, 0, 0, 7][..], &body].concat();
            ipv6(source, attack.to.ip(), 44, &fragment)?
        }
        IpAddr::V6(_) => ipv6(source, attack.to.ip(), protocol, &body)?,
    };
    if matches!(attack.way, Way::RawSyn | Way::RawSctp | Way::RawUdpLite | Way::IpInIp) {
        let family = if attack.to.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
        // What is sent by it begins with the header of its family.
        let socket = Socket::new(family, libc::SOCK_RAW, libc::IPPROTO_RAW)?;
        socket.send_to(&packet, 0, SocketAddr::new(attack.to.ip(), 0))?;
        return Ok("sent");
    }
    let gateway = gateway(attack.limit)?;
    let full = matches!(attack.way, Way::TaggedSyn | Way::OtherFrame);
    let kind = if full { libc::SOCK_RAW } else { libc::SOCK_DGRAM };
    let socket = Socket::new(libc::AF_PACKET, kind, i32::from(ETH_P_IP.to_be()))?;
    if attack.way == Way::BypassSyn {
        socket.set(libc::SOL_PACKET, PACKET_QDISC_BYPASS, 1)?;
    }
    if full {
        let (kind, tag) = match attack.way {
            Way::TaggedSyn => (ETH_P_8021Q, [&7u16.to_be_bytes()[..], &ethertype.to_be_bytes()].concat()),
            _ => (ETH_P_LOCAL, Vec::new()),
        };
        packet = [&gateway[..], &hardware_address()?, &kind.to_be_bytes(), &tag, &packet].concat();
        ethertype = kind;
    }
    socket.send_frame(&packet, ethertype, gateway)?;
    Ok("sent")
}

/// The address that the pod reaches `to` from.
fn own_address(to: SocketAddr) -> io::Result<IpAddr> {
    let socket = UdpSocket::bind(if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" })?;
    // No packet leaves by this.
    socket.connect(to)?;
    Ok(socket.local_addr()?.ip())
}

/// The hardware address of the pod's router, which is asked for by an ordinary packet.
fn gateway(limit: Duration) -> io::Result<[u8; 6]> {
    let routes = fs::read_to_string("/proc/thread-self/net/route")?;
    let hex = routes.lines().find_map(|line| {
        let mut words = line.split_whitespace();
        (words.next() == Some(DEVICE) && words.next() == Some("00000000")).then(|| words.next()).flatten()
    });
    let address = hex.and_then(|hex| u32::from_str_radix(hex, 16).ok()).ok_or(io::ErrorKind::NotFound)?;
    let address = Ipv4Addr::from(address.to_ne_bytes());
    let start = std::time::Instant::now();
    loop {
        // DNS is open in every pod; nobody listens.
        UdpSocket::bind("0.0.0.0:0")?.send_to(b"?", SocketAddrV4::new(address, 53))?;
        let table = fs::read_to_string("/proc/thread-self/net/arp")?;
        let found = table.lines().find_map(|line| {
            let words: Vec<&str> = line.split_whitespace().collect();
            let here = words.first()?.parse() == Ok(address) && words.get(2) == Some(&"0x2");
            here.then(|| hardware(words.get(3)?)).flatten()
        });
        match found {
            Some(found) => return Ok(found),
            None if start.elapsed() > limit => return Err(io::ErrorKind::HostUnreachable.into()),
            None => std::thread::sleep(Duration::from_millis(10)),
        }
    }
}

fn hardware(text: &str) -> Option<[u8; 6]> {
    let bytes: Vec<u8> = text.trim().split(':').filter_map(|b| u8::from_str_radix(b, 16).ok()).collect();
    bytes.try_into().ok()
}

fn hardware_address() -> io::Result<[u8; 6]> {
    // Of the device itself: the kernel asks for no true one.
    Ok([0x02, 0, 0, 0, 0, 0x01])
}

fn syn(from: IpAddr, to: SocketAddr, payload: &[u8]) -> Vec<u8> {
    let mut tcp = Vec::from(40002u16.to_be_bytes());
    tcp.extend(to.port().to_be_bytes());
    tcp.extend([0, 0, 0, 1, 0, 0, 0, 0, 5 << 4, 0x02, 0xff, 0xff, 0, 0, 0, 0]);
    tcp.extend(payload);
    // A fragment that is not the last is a multiple of eight.
    tcp.resize(tcp.len().next_multiple_of(8), 0);
    let mut pseudo = Vec::new();
    match (from, to.ip()) {
        (IpAddr::V4(a), IpAddr::V4(b)) => pseudo.extend([a.octets(), b.octets()].concat()),
        (a, b) => {
            for ip in [a, b] {
                if let IpAddr::V6(ip) = ip {
                    pseudo.extend(ip.octets());
                }
            }
        }
    }
    pseudo.extend([0, 6]);
    pseudo.extend(u16::try_from(tcp.len()).unwrap_or(0).to_be_bytes());
    pseudo.extend(&tcp);
    tcp[16..18].copy_from_slice(&sum(&pseudo).to_be_bytes());
    tcp
}

fn udp(from: u16, to: u16, payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(payload.len() + 8).unwrap_or(0);
    // No checksum, which IPv4 allows.
    [&from.to_be_bytes()[..], &to.to_be_bytes(), &length.to_be_bytes(), &[0, 0], payload].concat()
}

fn ipv4(from: IpAddr, to: IpAddr, protocol: u8, fragment: u16, body: &[u8]) -> io::Result<Vec<u8>> {
    let (IpAddr::V4(from), IpAddr::V4(to)) = (from, to) else { return Err(io::ErrorKind::InvalidInput.into()) };
    let mut ip = vec![0x45, 0];
    ip.extend(u16::try_from(body.len() + 20).unwrap_or(0).to_be_bytes());
    ip.extend(7u16.to_be_bytes());
    ip.extend(fragment.to_be_bytes());
    ip.extend([64, protocol, 0, 0]);
    ip.extend(from.octets());
    ip.extend(to.octets());
    let checksum = sum(&ip);
    ip[10..12].copy_from_slice(&checksum.to_be_bytes());
    ip.extend(body);
    Ok(ip)
}

fn ipv6(from: IpAddr, to: IpAddr, next: u8, body: &[u8]) -> io::Result<Vec<u8>> {
    let (IpAddr::V6(from), IpAddr::V6(to)) = (from, to) else { return Err(io::ErrorKind::InvalidInput.into()) };
    let mut ip = vec![0x60, 0, 0, 0];
    ip.extend(u16::try_from(body.len()).unwrap_or(0).to_be_bytes());
    ip.extend([next, 64]);
    ip.extend(from.octets());
    ip.extend(to.octets());
    ip.extend(body);
    Ok(ip)
}

/// The Internet checksum (RFC 1071).
fn sum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or(0)));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// A socket address as the kernel has it.
struct RawAddress {
    storage: libc::sockaddr_storage,
    length: libc::socklen_t,
}

fn raw_address(addr: SocketAddr) -> RawAddress {
    // SAFETY: all bytes zero is a value of this type.
    let mut storage: libc::sockaddr_storage = unsafe { std::mem::zeroed() };
    let at = (&raw mut storage).cast::<u8>();
    let length = match addr {
        SocketAddr::V4(v4) => {
            let raw = libc::sockaddr_in {
                sin_family: libc::AF_INET as u16,
                sin_port: v4.port().to_be(),
                sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes(v4.ip().octets()) },
                sin_zero: [0; 8],
            };
            // SAFETY: the storage is larger than every address and aligned for all.
            unsafe { at.cast::<libc::sockaddr_in>().write(raw) };
            size_of::<libc::sockaddr_in>()
        }
        SocketAddr::V6(v6) => {
            let raw = libc::sockaddr_in6 {
                sin6_family: libc::AF_INET6 as u16,
                sin6_port: v6.port().to_be(),
                sin6_flowinfo: 0,
                sin6_addr: libc::in6_addr { s6_addr: v6.ip().octets() },
                sin6_scope_id: 0,
            };
            // SAFETY: as above.
            unsafe { at.cast::<libc::sockaddr_in6>().write(raw) };
            size_of::<libc::sockaddr_in6>()
        }
    };
    RawAddress { storage, length: length as libc::socklen_t }
}

fn check(result: i64) -> io::Result<i64> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// A socket of any kind.
struct Socket {
    fd: OwnedFd,
}

impl Socket {
    fn new(family: i32, kind: i32, protocol: i32) -> io::Result<Self> {
        // SAFETY: plain system call.
        let fd = check(unsafe { libc::socket(family, kind | libc::SOCK_CLOEXEC, protocol) }.into())?;
        // SAFETY: the kernel has just returned this descriptor to us.
        Ok(Self { fd: unsafe { OwnedFd::from_raw_fd(fd as i32) } })
    }

    fn set(&self, level: i32, name: i32, value: i32) -> io::Result<()> {
        let length = size_of::<i32>() as libc::socklen_t;
        // SAFETY: the option is an int, alive during the call.
        let set =
            unsafe { libc::setsockopt(self.fd.as_raw_fd(), level, name, (&raw const value).cast::<c_void>(), length) };
        check(set.into()).map(drop)
    }

    fn with_limit(self, limit: Duration) -> io::Result<Self> {
        let time = libc::timeval { tv_sec: limit.as_secs() as i64, tv_usec: i64::from(limit.subsec_micros()) };
        let length = size_of::<libc::timeval>() as libc::socklen_t;
        for name in [libc::SO_RCVTIMEO, libc::SO_SNDTIMEO] {
            let value = (&raw const time).cast::<c_void>();
            // SAFETY: the option is a timeval, alive during the call.
            check(unsafe { libc::setsockopt(self.fd.as_raw_fd(), libc::SOL_SOCKET, name, value, length) }.into())?;
        }
        Ok(self)
    }

    fn bind(&self, addr: SocketAddr) -> io::Result<()> {
        let raw = raw_address(addr);
        // SAFETY: the address is alive during the call.
        let bound = unsafe { libc::bind(self.fd.as_raw_fd(), (&raw const raw.storage).cast(), raw.length) };
        check(bound.into()).map(drop)
    }

    fn connected(self, to: SocketAddr, limit: Duration) -> io::Result<TcpStream> {
        let socket = self.with_limit(limit)?;
        let raw = raw_address(to);
        // SAFETY: the address is alive during the call.
        let done = unsafe { libc::connect(socket.fd.as_raw_fd(), (&raw const raw.storage).cast(), raw.length) };
        match check(done.into()) {
            // A connect that does not end within the limit says this.
            Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => Err(io::ErrorKind::TimedOut.into()),
            other => other.map(|_| socket.into_stream()),
        }
    }

    fn into_stream(self) -> TcpStream {
        self.fd.into()
    }

    fn send_to(&self, bytes: &[u8], flags: i32, to: SocketAddr) -> io::Result<()> {
        let raw = raw_address(to);
        let at = (&raw const raw.storage).cast();
        // SAFETY: bytes and address are alive during the call.
        let sent =
            unsafe { libc::sendto(self.fd.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), flags, at, raw.length) };
        check(sent as i64).map(drop)
    }

    fn send_frame(&self, bytes: &[u8], ethertype: u16, to: [u8; 6]) -> io::Result<()> {
        let name = std::ffi::CString::new(DEVICE).map_err(io::Error::other)?;
        // SAFETY: the name ends with NUL.
        let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
        let [a, b, c, d, e, f] = to;
        let raw = libc::sockaddr_ll {
            sll_family: libc::AF_PACKET as u16,
            sll_protocol: ethertype.to_be(),
            sll_ifindex: index as i32,
            sll_hatype: 0,
            sll_pkttype: 0,
            sll_halen: 6,
            sll_addr: [a, b, c, d, e, f, 0, 0],
        };
        let (at, length) = ((&raw const raw).cast(), size_of::<libc::sockaddr_ll>() as libc::socklen_t);
        // SAFETY: bytes and address are alive during the call.
        let sent = unsafe { libc::sendto(self.fd.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), 0, at, length) };
        check(sent as i64).map(drop)
    }
}

/// One request of io_uring, with as little of it as that takes (linux/io_uring.h).
mod uring {
    use super::*;

    const OP_CONNECT: u8 = 16;
    const OFF_SQ_RING: i64 = 0;
    const OFF_CQ_RING: i64 = 0x800_0000;
    const OFF_SQES: i64 = 0x1000_0000;
    const ENTER_GETEVENTS: u32 = 1;

    #[repr(C)]
    #[derive(Default)]
    struct SqOffsets {
        head: u32,
        tail: u32,
        ring_mask: u32,
        ring_entries: u32,
        flags: u32,
        dropped: u32,
        array: u32,
        _rest: [u32; 3],
    }

    #[repr(C)]
    #[derive(Default)]
    struct CqOffsets {
        head: u32,
        tail: u32,
        ring_mask: u32,
        ring_entries: u32,
        overflow: u32,
        cqes: u32,
        _rest: [u32; 4],
    }

    #[repr(C)]
    #[derive(Default)]
    struct Parameters {
        sq_entries: u32,
        cq_entries: u32,
        _more: [u32; 8],
        sq: SqOffsets,
        cq: CqOffsets,
    }

    #[repr(C)]
    #[derive(Default)]
    struct Sqe {
        opcode: u8,
        flags: u8,
        ioprio: u16,
        fd: i32,
        offset: u64,
        address: u64,
        length: u32,
        _op_flags: u32,
        user_data: u64,
        _rest: [u64; 3],
    }

    const _: () = assert!(size_of::<Sqe>() == 64 && size_of::<Parameters>() == 120);

    pub(super) fn connect(socket: &OwnedFd, to: &RawAddress) -> io::Result<()> {
        let mut parameters = Parameters::default();
        // SAFETY: the parameters are alive during the call, and of the size that the kernel expects.
        let ring = check(unsafe { libc::syscall(libc::SYS_io_uring_setup, 1, &raw mut parameters) })?;
        // SAFETY: the kernel has just returned this descriptor to us.
        let ring = unsafe { OwnedFd::from_raw_fd(ring as i32) };
        let submissions = map(&ring, OFF_SQ_RING)?;
        let completions = map(&ring, OFF_CQ_RING)?;
        let entries = map(&ring, OFF_SQES)?;
        let sqe = Sqe {
            opcode: OP_CONNECT,
            fd: socket.as_raw_fd(),
            offset: to.length.into(),
            address: &raw const to.storage as u64,
            ..Sqe::default()
        };
        // SAFETY: the three areas are mapped for as long as this process lives, the offsets are the kernel's own, and nobody
        // else uses this ring.
        let result = unsafe {
            entries.cast::<Sqe>().write(sqe);
            submissions.add(parameters.sq.array as usize).cast::<u32>().write(0);
            submissions.add(parameters.sq.tail as usize).cast::<u32>().write_volatile(1);
            let null = std::ptr::null::<c_void>();
            check(libc::syscall(libc::SYS_io_uring_enter, ring.as_raw_fd(), 1, 1, ENTER_GETEVENTS, null, 0))?;
            // A completion is user data, the result, and flags.
            completions.add(parameters.cq.cqes as usize + 8).cast::<i32>().read_volatile()
        };
        if result < 0 { Err(io::Error::from_raw_os_error(-result)) } else { Ok(()) }
    }

    /// A page of the ring, which is more than one entry takes.
    fn map(ring: &OwnedFd, offset: i64) -> io::Result<*mut u8> {
        let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_POPULATE);
        // SAFETY: a new mapping at an address of the kernel's choice.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), 4096, protection, flags, ring.as_raw_fd(), offset) };
        if at == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(at.cast()) }
    }
}
