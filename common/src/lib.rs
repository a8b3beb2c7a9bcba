//! Plain data that crosses the border between the kernel programs and the agent, and the one verdict function.
//!
//! `no_std`; integers and byte arrays only, since `bool`, `Option` and enums have bit patterns that are not values.
//! Padding is written out and must be zero (the kernel hashes it as part of a key); sizes are asserted when compiling.
//! Every address is 16 bytes in network byte order, IPv4 mapped into IPv6 (RFC 4291 §2.5.5.2); every port whose name
//! ends in `_be` is in network byte order, every other one in the host's.
#![cfg_attr(not(test), no_std)]

pub mod addr;
pub mod frame;
pub mod gate;
pub mod layout;
pub mod verdict;

pub use addr::Addr;
pub use layout::*;
pub use verdict::{Answer, Authorization, Direction, Inputs, Mode, Peer, PodState, Reason, Verdict, decide};

/// Port of the outbound capture in the reference data plane; a mesh connection *to* it is refused as a loop ([K.2]).
pub const PORT_OUTBOUND: u16 = 15001;
/// Port of the inbound plaintext capture in the reference data plane; refused like [`PORT_OUTBOUND`] ([K.2]).
pub const PORT_INBOUND: u16 = 15006;
/// Port of the HBONE tunnel: TCP connections to it reach the tunnel endpoint, tunnelled ones are a loop ([K.2]).
pub const PORT_HBONE: u16 = 15008;

/// First port of the range over which redirected connections of a pod are spread.
///
/// One (source, destination, port) triple has about 28 000 source ports; the destination is rewritten to the pod's own
/// address and one of [`REDIRECT_PORT_COUNT`] ports, all of which the pod's `sk_lookup` program recognises by the
/// recorded tuple, so a pod never runs out of them. What else listens on one of them is not disturbed; an application
/// that binds one without `SO_REUSEADDR` may find it in use, as it may find any port of a connection.
///
/// With the same port at both ends a connection would be one with itself. So the range lies where no source port is
/// chosen by the kernel, whatever the pod sets `net.ipv4.ip_local_port_range` to: below
/// `net.ipv4.ip_unprivileged_port_start` (1024). A port that an application has bound to is stepped over.
pub const REDIRECT_PORT_FIRST: u16 = 512;
/// Number of ports from [`REDIRECT_PORT_FIRST`] on: a power of two.
pub const REDIRECT_PORT_COUNT: u16 = 512;

/// The port, of the redirected ones, for a connection whose source port is `bound` (0: not chosen yet); `random` spreads.
#[inline(always)]
pub const fn redirect_port(random: u32, bound: u16) -> u16 {
    let random = random as u16;
    let port = REDIRECT_PORT_FIRST + (random & (REDIRECT_PORT_COUNT - 1));
    if port == bound { REDIRECT_PORT_FIRST + (random.wrapping_add(1) & (REDIRECT_PORT_COUNT - 1)) } else { port }
}

/// Whether connections to `port` of the pod itself may be redirected ones.
#[inline(always)]
pub const fn is_redirect_port(port: u16) -> bool {
    port.wrapping_sub(REDIRECT_PORT_FIRST) < REDIRECT_PORT_COUNT
}

/// First 16 bits of the source address of the agent's leg to an application (127.6.0.0/16).
///
/// A loopback source lets the kernel reuse TIME_WAIT ports (`tcp_tw_reuse=2`, the default); the application never sees
/// it, since `getpeername` and `accept` are answered with the client's address.
pub const LEG_SOURCE_PREFIX: [u8; 2] = [127, 6];

/// The silence after which connections of enrolled pods are refused, in nanoseconds: a listener's backlog would
/// otherwise accept for an agent that is stopped or hung.
pub const SILENT_AFTER_NS: u64 = 10_000_000_000;

/// Version of the pinned layout: part of the pin directory's name, raised when a map's key or value changes.
pub const LAYOUT_VERSION: u32 = 5;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_redirected_port_is_reserved_and_never_the_connections_own() {
        let range = REDIRECT_PORT_FIRST..REDIRECT_PORT_FIRST + REDIRECT_PORT_COUNT;
        assert!(range.end <= 1024 && REDIRECT_PORT_COUNT.is_power_of_two());
        for bound in range.clone().chain([0, 1, 1024, u16::MAX]) {
            for random in 0..=u32::from(u16::MAX) {
                let port = redirect_port(random, bound);
                assert!(port != bound && range.contains(&port), "{random} {bound}");
            }
        }
        for port in 0..=u16::MAX {
            assert_eq!(is_redirect_port(port), range.contains(&port), "{port}");
        }
    }
}
