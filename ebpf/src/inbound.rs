//! `sk_lookup` in an enrolled pod: what arrives reaches the application, the agent's listener, or nobody (a reset).
//!
//! The helpers for cookies are not allowed here, so everything is keyed by the local address.

use aya_ebpf::{
    bindings::sk_action::{SK_DROP, SK_PASS},
    programs::SkLookupContext,
};
use culvert_common::{
    Addr, Answer, Authorization, Direction, FlowKey, FlowKind, Inputs, ListenerKey, ListenerKind, Mode, Peer, PodState,
    PodValue, Reason, Verdict, decide, is_redirect_port,
};

use crate::{
    context::{AF_INET6, IPPROTO_TCP, arriving, pod, word, words},
    maps::{FLOWS, LISTENERS, POD_ADDRS},
    report::refused,
};

/// One new connection.
#[inline(always)]
pub(crate) fn run(ctx: &SkLookupContext) -> u32 {
    let raw = ctx.lookup;
    // SAFETY: the verifier checks each access to the context. Both families are read before either is chosen: the
    // verifier wants an unmodified context pointer.
    let (family, protocol, flow4, flow6, sport, dport) = unsafe {
        (
            word(&raw const (*raw).family),
            word(&raw const (*raw).protocol),
            (word(&raw const (*raw).remote_ip4), word(&raw const (*raw).local_ip4)),
            (words(&raw const (*raw).remote_ip6), words(&raw const (*raw).local_ip6)),
            u16::from_be((&raw const (*raw).remote_port).read_volatile()),
            word(&raw const (*raw).local_port) as u16,
        )
    };
    if protocol != IPPROTO_TCP {
        return SK_PASS;
    }
    let (src, dst) = if family == AF_INET6 {
        (Addr::from_be32x4(flow6.0), Addr::from_be32x4(flow6.1))
    } else {
        (Addr::from_be32(flow4.0), Addr::from_be32(flow4.1))
    };
    if dst.is_loopback() {
        return SK_PASS;
    }
    judge(ctx, &FlowKey { src, dst, sport, dport, _pad: 0 })
}

#[inline(always)]
fn judge(ctx: &SkLookupContext, flow: &FlowKey) -> u32 {
    let Some(cookie) = owner(flow.dst) else { return unknown(flow) };
    let Some(pod) = pod(cookie) else { return unknown(flow) };
    // SAFETY: the value is copied before any other map operation.
    let known = unsafe { FLOWS.get(flow).copied() };
    let recorded = known.as_ref().map_or(0, |value| value.kind);
    if flow.src.is_loopback() || owner(flow.src) == Some(cookie) {
        if let Some(known) = known.filter(|known| known.kind == FlowKind::Redirected as u8) {
            // A refusal is told by where the pod meant to go.
            let meant = FlowKey { dst: known.addr, dport: known.port, ..*flow };
            return assign(ctx, &pod, cookie, ListenerKind::Outbound, (flow, &meant), Direction::Outbound);
        }
        if recorded == 0 && is_redirect_port(flow.dport) {
            // Its record was pushed out, or it was made where no program of ours saw it. It may be a redirected one, and what
            // the pod serves there is not the server that it asked for.
            let reason = Reason::KernelCapacity;
            let verdict = Verdict { answer: Answer::Refuse, reason, rule: 0, generation: pod.generation };
            refused(cookie, Direction::Outbound, &verdict, flow);
            return SK_DROP;
        }
        return SK_PASS;
    }
    let peer = if recorded == FlowKind::Probe as u8 { Peer::Probe } else { Peer::Plain };
    let verdict = arriving(&pod, cookie, peer, flow);
    match verdict.answer {
        // Counted when it is established, so that a retransmitted SYN counts once.
        Answer::Pass => SK_PASS,
        Answer::Refuse => {
            refused(cookie, Direction::Inbound, &verdict, flow);
            SK_DROP
        }
        Answer::Agent => {
            let kind = if matches!(verdict.reason, Reason::TunnelPort) {
                ListenerKind::Tunnel
            } else {
                ListenerKind::Plaintext
            };
            assign(ctx, &pod, cookie, kind, (flow, flow), Direction::Inbound)
        }
    }
}

#[inline(always)]
pub(crate) fn owner(addr: Addr) -> Option<u64> {
    // SAFETY: the cookie is copied at once.
    unsafe { POD_ADDRS.get(addr) }.map(|owner| owner.netns_cookie)
}

/// An address of the namespace that no map knows: a second interface, or a pod that has just left.
#[inline(always)]
fn unknown(flow: &FlowKey) -> u32 {
    let verdict = decide(&Inputs {
        direction: Direction::Inbound,
        peer: Peer::Plain,
        state: PodState::Unknown,
        agent_alive: true,
        port: flow.dport,
        mode: Mode::Missing,
        authorization: Authorization::Missing,
        rule: 0,
        generation: 0,
    });
    refused(0, Direction::Inbound, &verdict, flow);
    SK_DROP
}

/// Hands the connection to a worker's listener; a missing one refuses. `flow`: as it arrives, and as it is told.
#[inline(always)]
fn assign(
    ctx: &SkLookupContext,
    pod: &PodValue,
    cookie: u64,
    kind: ListenerKind,
    (flow, told): (&FlowKey, &FlowKey),
    direction: Direction,
) -> u32 {
    // Linux prefers source ports of one parity, so the lowest bit says nothing.
    let spread = u32::from((flow.sport >> 1) ^ flow.dport);
    let worker = if pod.workers == 0 { 0 } else { spread % pod.workers };
    let key = ListenerKey { netns_cookie: cookie, kind: kind as u32, worker };
    if LISTENERS.redirect_sk_lookup(ctx, key, 0).is_ok() {
        return SK_PASS;
    }
    let verdict = Verdict { answer: Answer::Refuse, reason: Reason::NoListener, rule: 0, generation: pod.generation };
    refused(cookie, direction, &verdict, told);
    SK_DROP
}
