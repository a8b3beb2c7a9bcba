//! What may leave a pod by its network device: the last look, at the node's end of the pod's veth.
//!
//! Capture happens where a socket connects, so whatever makes frames without that (packet and raw sockets, sockets made
//! outside the node's cgroup, protocols that nobody captures) is stopped here. Of TCP only what begins a connection is
//! looked at closely: all that ordinary connections cost is a look at the headers.

use crate::Reason;

/// IP protocol numbers (IANA) that pods of the mesh may speak.
pub mod protocol {
    /// ICMP.
    pub const ICMP: u8 = 1;
    /// IGMP: reports of multicast membership, which the kernel sends.
    pub const IGMP: u8 = 2;
    /// TCP.
    pub const TCP: u8 = 6;
    /// UDP.
    pub const UDP: u8 = 17;
    /// ICMP of IPv6: neighbour discovery among others.
    pub const ICMP6: u8 = 58;
}

/// The one port of UDP that is open also where UDP is refused: without names no pod works (specification §3 has DNS apart).
pub const PORT_DNS: u16 = 53;

/// What is known of a frame's source address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// One of the pod's.
    Own,
    /// Of the interface itself: fe80::/10, which no router forwards.
    LinkLocal,
    /// `::`, as neighbour discovery has it before there is an address.
    Unspecified,
    /// Anybody else's.
    Foreign,
}

/// What was read of a frame that carries IP.
#[derive(Clone, Copy, Debug)]
pub struct Packet {
    /// Whose address it comes from.
    pub source: Source,
    /// The protocol after the headers that may be looked through.
    pub protocol: u8,
    /// A part of a packet that was taken apart.
    pub fragment: bool,
    /// Headers were cut short, of a wrong version, or of a kind that could hide others.
    pub hidden: bool,
    /// TCP: it has SYN and not ACK.
    pub opens: bool,
    /// TCP that opens: the socket that sends it is the agent's.
    pub of_agent: bool,
    /// UDP: the destination port; 0 where it cannot be read.
    pub dport: u16,
    /// UDP of this pod is refused.
    pub udp_refused: bool,
}

/// Why a packet must not leave its pod; `None` if it may.
#[inline(always)]
pub const fn stops(packet: &Packet) -> Option<Reason> {
    if packet.hidden {
        return Some(Reason::HiddenHeader);
    }
    match packet.source {
        Source::Own | Source::LinkLocal => {}
        Source::Unspecified if packet.protocol == protocol::ICMP6 => {}
        Source::Unspecified | Source::Foreign => return Some(Reason::ForeignSource),
    }
    match packet.protocol {
        protocol::TCP if packet.fragment => Some(Reason::HiddenHeader),
        protocol::TCP if packet.opens && !packet.of_agent => Some(Reason::NotCaptured),
        protocol::UDP if packet.udp_refused && packet.dport != PORT_DNS => Some(Reason::UdpRefused),
        protocol::TCP | protocol::UDP | protocol::ICMP | protocol::IGMP | protocol::ICMP6 => None,
        _ => Some(Reason::Protocol),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Packet = Packet {
        source: Source::Own,
        protocol: protocol::TCP,
        fragment: false,
        hidden: false,
        opens: false,
        of_agent: false,
        dport: 0,
        udp_refused: false,
    };

    /// Only the agent begins connections that leave the pod; what goes on is not asked again.
    #[test]
    fn only_the_agents_own_syn_leaves_a_pod() {
        assert_eq!(stops(&PLAIN), None);
        assert_eq!(stops(&Packet { opens: true, ..PLAIN }), Some(Reason::NotCaptured));
        assert_eq!(stops(&Packet { opens: true, of_agent: true, ..PLAIN }), None);
        assert_eq!(stops(&Packet { fragment: true, ..PLAIN }), Some(Reason::HiddenHeader));
        assert_eq!(stops(&Packet { hidden: true, of_agent: true, opens: true, ..PLAIN }), Some(Reason::HiddenHeader));
    }

    #[test]
    fn a_source_is_the_pods_own() {
        for (source, protocol, stopped) in [
            (Source::Own, protocol::UDP, false),
            (Source::Foreign, protocol::UDP, true),
            (Source::Foreign, protocol::TCP, true),
            (Source::Foreign, protocol::ICMP6, true),
            (Source::Unspecified, protocol::ICMP6, false),
            (Source::Unspecified, protocol::UDP, true),
            (Source::LinkLocal, protocol::ICMP6, false),
        ] {
            let packet = Packet { source, protocol, ..PLAIN };
            assert_eq!(stops(&packet) == Some(Reason::ForeignSource), stopped, "{packet:?}");
        }
    }

    #[test]
    fn protocols_that_nobody_captures_do_not_leave() {
        // SCTP, UDP-Lite, DCCP, IP in IP, IPv6 in IP, GRE, ESP, AH.
        for number in [132, 136, 33, 4, 41, 47, 50, 51] {
            assert_eq!(stops(&Packet { protocol: number, ..PLAIN }), Some(Reason::Protocol), "{number}");
        }
        for number in [protocol::ICMP, protocol::IGMP, protocol::ICMP6, protocol::UDP] {
            assert_eq!(stops(&Packet { protocol: number, fragment: true, ..PLAIN }), None, "{number}");
        }
    }

    #[test]
    fn refused_udp_leaves_dns_open() {
        let udp = Packet { protocol: protocol::UDP, udp_refused: true, ..PLAIN };
        assert_eq!(stops(&Packet { dport: 53, ..udp }), None);
        assert_eq!(stops(&Packet { dport: 443, ..udp }), Some(Reason::UdpRefused));
        assert_eq!(stops(&Packet { dport: 0, fragment: true, ..udp }), Some(Reason::UdpRefused));
        assert_eq!(stops(&Packet { dport: 443, udp_refused: false, ..udp }), None);
    }
}
