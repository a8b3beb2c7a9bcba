//! UDP that is refused: the application is told by an errno, as it sends or connects (specification §3).
//!
//! The filter at the veth drops as much, and can tell nobody. It goes on seeing what does not come by here: sockets that were
//! connected before, raw and packet sockets, sockets made outside the node's cgroup.

use aya_ebpf::{bindings::BPF_ANY, helpers::bpf_get_retval, programs::SockAddrContext};
use culvert_common::{
    Addr, Answer, Direction, Reason, UdpKey, Verdict,
    frame::{PORT_DNS, protocol},
};

use crate::{
    connect::{asked, owns},
    context::{netns_cookie, word},
    maps::{UDP_PODS, UDP_REFUSALS},
    report::count,
};

const PASS: i32 = 1;
/// EPERM.
const REFUSE: i32 = 0;

/// One datagram that a socket sends to an address, or the connect of a socket that is no stream.
#[inline(always)]
pub(crate) fn judge(ctx: &SockAddrContext, v6: bool) -> i32 {
    let Some((dst, port)) = leaves(ctx, v6) else { return PASS };
    let cookie = netns_cookie(ctx);
    // SAFETY: only tested for presence; the helper takes no argument.
    let (refused, before) = unsafe { (UDP_PODS.get(cookie).is_some(), bpf_get_retval() < 0) };
    // What a program before this one has refused is counted there.
    if !refused || before || owns(cookie, dst) {
        return PASS;
    }
    count_refusal(&UdpKey { addr: dst, netns_cookie: cookie, port, _pad: [0; 6] });
    count(cookie, Direction::Outbound, &REFUSED);
    REFUSE
}

const REFUSED: Verdict = Verdict { answer: Answer::Refuse, reason: Reason::UdpRefused, rule: 0, generation: 0 };

/// Where UDP is to go that is not DNS and does not stay in the pod.
#[inline(always)]
pub(crate) fn leaves(ctx: &SockAddrContext, v6: bool) -> Option<(Addr, u16)> {
    let (_, dst, port) = asked(ctx, v6);
    // SAFETY: the verifier checks the access to the context.
    let number = unsafe { word(&raw const (*ctx.sock_addr).protocol) };
    let stays = port == PORT_DNS || dst.is_loopback() || dst.is_unspecified();
    (number == u32::from(protocol::UDP) && !stays).then_some((dst, port))
}

/// Counts a packet of UDP that was refused, by where it was to go.
#[inline(always)]
pub(crate) fn count_refusal(key: &UdpKey) {
    match UDP_REFUSALS.get_ptr_mut(key) {
        // SAFETY: the slot is eight aligned bytes of a map. Of two CPUs that count there at the same moment one is lost;
        // `VERDICTS` has each.
        Some(counter) => unsafe { *counter += 1 },
        None => {
            // What is lost in a race is in `VERDICTS`.
            let _ = UDP_REFUSALS.insert(key, 1u64, BPF_ANY.into());
        }
    }
}
