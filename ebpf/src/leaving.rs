//! `tc` ingress at the node's end of a pod's veth: what leaves a pod without having been captured is stopped.
//!
//! A filter at the pod's own device would be passed by a packet socket with PACKET_QDISC_BYPASS; this one is not. The
//! socket that sent a frame stays with it until the node's stack takes it over, also across a veth.

use aya_ebpf::{
    bindings::{TC_ACT_SHOT, TC_ACT_UNSPEC},
    helpers::bpf_sk_fullsock,
    programs::TcContext,
};
use culvert_common::{
    Addr, Answer, Direction, FlowKey, Reason, SocketKind, UdpKey, Verdict,
    frame::{Packet, Source, protocol, stops},
};

use crate::{
    context::{storage, word},
    maps::{POD_ADDRS, VETHS},
    report::{count, refused},
    udp::count_refusal,
};

/// EtherTypes (IANA).
const ETH_IPV4: u16 = 0x0800;
const ETH_ARP: u16 = 0x0806;
const ETH_IPV6: u16 = 0x86dd;
/// Bytes before the network header: veths are Ethernet, and tags are taken off before.
const ETH_BYTES: usize = 14;
/// IPv6 headers that are looked through (RFC 8200).
const HOP_BY_HOP: u8 = 0;
const FRAGMENT: u8 = 44;

/// One frame that a pod sends.
#[inline(always)]
pub(crate) fn run(ctx: &TcContext) -> i32 {
    let raw = ctx.skb.skb;
    // SAFETY: the verifier checks each access to the context.
    let (ifindex, tagged, ethertype) = unsafe {
        (
            word(&raw const (*raw).ifindex),
            word(&raw const (*raw).vlan_present) != 0,
            u16::from_be(word(&raw const (*raw).protocol) as u16),
        )
    };
    // SAFETY: the value is copied before any other map operation.
    let Some(veth) = (unsafe { VETHS.get(ifindex).copied() }) else {
        return stop(0, Reason::UnknownAddress);
    };
    let cookie = veth.netns_cookie;
    if tagged {
        return stop(cookie, Reason::HiddenHeader);
    }
    let read = match ethertype {
        ETH_ARP => return TC_ACT_UNSPEC,
        ETH_IPV4 => ipv4(ctx),
        ETH_IPV6 => ipv6(ctx),
        _ => return stop(cookie, Reason::Protocol),
    };
    let Some((head, at)) = read else { return stop(cookie, Reason::HiddenHeader) };
    let mut packet = Packet {
        source: source(head.src, cookie),
        protocol: head.protocol,
        fragment: head.fragment,
        hidden: false,
        opens: false,
        of_agent: false,
        dport: 0,
        udp_refused: veth.udp_refused != 0,
    };
    let mut sport = 0;
    if head.protocol == protocol::TCP && !head.fragment {
        match ctx.load::<[u8; 14]>(at) {
            Ok(tcp) => {
                sport = u16::from_be_bytes([tcp[0], tcp[1]]);
                packet.dport = u16::from_be_bytes([tcp[2], tcp[3]]);
                // SYN without ACK.
                packet.opens = tcp[13] & 0x12 == 0x02;
            }
            Err(_) => packet.hidden = true,
        }
        packet.of_agent = packet.opens && of_agent(ctx);
    } else if head.protocol == protocol::UDP && packet.udp_refused && !head.later {
        match ctx.load::<[u8; 4]>(at) {
            Ok(udp) => packet.dport = u16::from_be_bytes([udp[2], udp[3]]),
            Err(_) => packet.hidden = true,
        }
    }
    let Some(reason) = stops(&packet) else { return TC_ACT_UNSPEC };
    match reason {
        Reason::NotCaptured => {
            let flow = FlowKey { src: head.src, dst: head.dst, sport, dport: packet.dport, _pad: 0 };
            refused(cookie, Direction::Outbound, &verdict(reason), &flow);
            TC_ACT_SHOT
        }
        Reason::UdpRefused => {
            count_refusal(&UdpKey { addr: head.dst, netns_cookie: cookie, port: packet.dport, _pad: [0; 6] });
            stop(cookie, reason)
        }
        _ => stop(cookie, reason),
    }
}

/// What the network header says.
struct Head {
    src: Addr,
    dst: Addr,
    protocol: u8,
    fragment: bool,
    /// A fragment that does not begin the packet.
    later: bool,
}

/// The header, and where what it carries begins.
#[inline(always)]
fn ipv4(ctx: &TcContext) -> Option<(Head, usize)> {
    let ip: [u8; 20] = ctx.load(ETH_BYTES).ok()?;
    let length = usize::from(ip[0] & 0x0f) * 4;
    if ip[0] >> 4 != 4 || length < 20 {
        return None;
    }
    let fragment = u16::from_be_bytes([ip[6], ip[7]]);
    let head = Head {
        src: Addr::from_v4([ip[12], ip[13], ip[14], ip[15]]),
        dst: Addr::from_v4([ip[16], ip[17], ip[18], ip[19]]),
        protocol: ip[9],
        fragment: fragment & 0x3fff != 0,
        later: fragment & 0x1fff != 0,
    };
    Some((head, ETH_BYTES + length))
}

#[inline(always)]
fn ipv6(ctx: &TcContext) -> Option<(Head, usize)> {
    let first: [u8; 8] = ctx.load(ETH_BYTES).ok()?;
    if first[0] >> 4 != 6 {
        return None;
    }
    let src = ctx.load(ETH_BYTES + 8).ok().map(Addr::from_be32x4)?;
    let dst = ctx.load(ETH_BYTES + 24).ok().map(Addr::from_be32x4)?;
    let at = ETH_BYTES + 40;
    let next = first[6];
    if next == FRAGMENT {
        let header: [u8; 8] = ctx.load(at).ok()?;
        let inner = header[0];
        // Parts of anything else could hide TCP.
        if inner != protocol::UDP && inner != protocol::ICMP6 {
            return None;
        }
        let later = u16::from_be_bytes([header[2], header[3]]) & 0xfff8 != 0;
        return Some((Head { src, dst, protocol: inner, fragment: true, later }, at + 8));
    }
    if next == HOP_BY_HOP {
        // Multicast listener reports; nothing else has use for it.
        let header: [u8; 2] = ctx.load(at).ok()?;
        if header[0] != protocol::ICMP6 {
            return None;
        }
        return Some((Head { src, dst, protocol: protocol::ICMP6, fragment: false, later: false }, at));
    }
    // Routing, destination options, authentication, mobility, HIP, shim6.
    if matches!(next, 43 | 51 | 60 | 135 | 139 | 140) {
        return None;
    }
    Some((Head { src, dst, protocol: next, fragment: false, later: false }, at))
}

#[inline(always)]
fn source(src: Addr, cookie: u64) -> Source {
    // SAFETY: the cookie is compared at once.
    if unsafe { POD_ADDRS.get(src) }.is_some_and(|owner| owner.netns_cookie == cookie) {
        return Source::Own;
    }
    let word = src.to_be32x4()[0];
    if word & u32::from_be(0xffc0_0000) == u32::from_be(0xfe80_0000) {
        return Source::LinkLocal;
    }
    if !src.is_v4() && src.is_unspecified() { Source::Unspecified } else { Source::Foreign }
}

/// Whether the agent's socket sent it.
#[inline(always)]
fn of_agent(ctx: &TcContext) -> bool {
    // SAFETY: the verifier checks the access, and wants the pointer to be tested before it is used.
    let sk = unsafe { (*ctx.skb.skb).__bindgen_anon_2.sk };
    if sk.is_null() {
        return false;
    }
    // SAFETY: the socket is there as long as the frame that holds it.
    let sk = unsafe { bpf_sk_fullsock(sk) };
    if sk.is_null() {
        return false;
    }
    storage(sk).is_some_and(|value| value.kind == SocketKind::Agent as u8)
}

#[inline(always)]
fn verdict(reason: Reason) -> Verdict {
    Verdict { answer: Answer::Refuse, reason, rule: 0, generation: 0 }
}

/// Counted, and not told one by one: it may be as many as a device carries.
#[inline(always)]
fn stop(cookie: u64, reason: Reason) -> i32 {
    count(cookie, Direction::Outbound, &verdict(reason));
    TC_ACT_SHOT
}
