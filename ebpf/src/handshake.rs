//! `sock_ops`: takes what is known at the connecting socket to the accepting one, judges again what the kernel passed,
//! and reports it when it ends.

use aya_ebpf::{
    bindings::{
        BPF_ANY, BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB, BPF_SOCK_OPS_STATE_CB, BPF_SOCK_OPS_STATE_CB_FLAG,
        BPF_SOCK_OPS_TCP_CONNECT_CB, BPF_TCP_CLOSE, BPF_TCP_CLOSE_WAIT, BPF_TCP_CLOSING, BPF_TCP_FIN_WAIT2,
        BPF_TCP_LAST_ACK, bpf_sock,
    },
    helpers::bpf_setsockopt,
    programs::SockOpsContext,
};
use aya_log_ebpf::warn;
use culvert_common::{
    Addr, Answer, Direction, EventKind, FlowKey, FlowKind, FlowValue, PORT_HBONE, Peer, Reason, SocketKind,
    SocketValue, Verdict,
};

use crate::{
    context::{AF_INET6, IPPROTO_TCP, arriving, netns_cookie, note, now_ns, pod, storage, word, words},
    maps::{FLOWS, POD_ADDRS},
    report::{About, Ended, count, send},
};

/// One callback.
#[inline(always)]
pub(crate) fn run(ctx: &SockOpsContext) {
    match ctx.op() {
        BPF_SOCK_OPS_TCP_CONNECT_CB => connecting(ctx),
        BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB => accepted(ctx),
        BPF_SOCK_OPS_STATE_CB => changed(ctx),
        _ => {}
    }
}

/// (local, remote) addresses and ports.
#[inline(always)]
fn ends(ctx: &SockOpsContext) -> ((Addr, u16), (Addr, u16)) {
    let raw = ctx.ops;
    // SAFETY: the verifier checks each access to the context; both families are read before either is chosen.
    let (family, v4, v6, lport, rport) = unsafe {
        (
            word(&raw const (*raw).family),
            (word(&raw const (*raw).local_ip4), word(&raw const (*raw).remote_ip4)),
            (words(&raw const (*raw).local_ip6), words(&raw const (*raw).remote_ip6)),
            word(&raw const (*raw).local_port) as u16,
            // The kernel's field is the port in network byte order in the upper half of a word.
            u32::from_be(word(&raw const (*raw).remote_port)) as u16,
        )
    };
    if family == AF_INET6 {
        ((Addr::from_be32x4(v6.0), lport), (Addr::from_be32x4(v6.1), rport))
    } else {
        ((Addr::from_be32(v4.0), lport), (Addr::from_be32(v4.1), rport))
    }
}

#[inline(always)]
fn socket(ctx: &SockOpsContext) -> Option<*mut bpf_sock> {
    // SAFETY: the verifier checks the access; the pointer is null where there is no full socket.
    let sk = unsafe { (*ctx.ops).__bindgen_anon_2.sk };
    (!sk.is_null()).then_some(sk)
}

/// Sets the congestion control of a socket between an application and the agent: one that every kernel has, and that does
/// not pace. Nothing can be congested inside a pod, and a node's default may be made for long ways: BBR would send each
/// burst by a timer.
#[inline(always)]
fn inside_the_pod(ctx: &SockOpsContext) {
    const TCP_CONGESTION: i32 = 13;
    let mut reno = *b"reno\0";
    // Slower if it fails, and otherwise right.
    // SAFETY: the option is `reno.len()` readable bytes.
    let _ = unsafe {
        bpf_setsockopt(ctx.ops.cast(), IPPROTO_TCP as i32, TCP_CONGESTION, reno.as_mut_ptr().cast(), reno.len() as i32)
    };
}

/// Before the SYN leaves: the source port is known, so what the socket carries can be found by the other end.
#[inline(always)]
fn connecting(ctx: &SockOpsContext) {
    let Some(sk) = socket(ctx) else { return };
    let Some(value) = storage(sk) else { return };
    let kind = if value.kind == SocketKind::Redirected as u8 {
        FlowKind::Redirected
    } else if value.kind == SocketKind::Leg as u8 {
        FlowKind::Leg
    } else if value.kind == SocketKind::Probe as u8 {
        FlowKind::Probe
    } else if value.kind == SocketKind::Local as u8 {
        FlowKind::Local
    } else {
        return;
    };
    if matches!(kind, FlowKind::Redirected | FlowKind::Leg) {
        inside_the_pod(ctx);
    }
    let ((src, sport), (dst, dport)) = ends(ctx);
    let flow = FlowValue {
        addr: value.addr,
        netns_cookie: value.netns_cookie,
        at_ns: now_ns(),
        port: value.port,
        kind: kind as u8,
        taken: 0,
        _pad: 0,
    };
    if FLOWS.insert(FlowKey { src, dst, sport, dport, _pad: 0 }, flow, BPF_ANY.into()).is_err() {
        // The other end finds nothing, and refuses.
        warn!(ctx, "no room in FLOWS: connection from port {} will be refused", sport);
    }
    // A record that nobody takes over must not outlive its socket: the next one with the same port is somebody else's.
    let _ = ctx.set_cb_flags(BPF_SOCK_OPS_STATE_CB_FLAG as i32);
}

/// A handshake was completed towards a listener.
#[inline(always)]
fn accepted(ctx: &SockOpsContext) {
    let Some(sk) = socket(ctx) else { return };
    let ((dst, dport), (src, sport)) = ends(ctx);
    let key = FlowKey { src, dst, sport, dport, _pad: 0 };
    match FLOWS.get_ptr_mut(key) {
        Some(flow) => {
            // SAFETY: nobody else takes the flow of this very connection over; the copy is made before removal.
            let known = unsafe { *flow };
            if known.kind == FlowKind::Local as u8 {
                // The pod's own, as any other of its connections to itself.
                let _ = FLOWS.remove(key);
                return;
            }
            let kind = if known.kind == FlowKind::Redirected as u8 {
                SocketKind::Accepted
            } else if known.kind == FlowKind::Leg as u8 {
                SocketKind::Served
            } else {
                SocketKind::Probed
            };
            let mut value = SocketValue {
                addr: known.addr,
                netns_cookie: known.netns_cookie,
                at_ns: now_ns(),
                port: known.port,
                kind: kind as u8,
                reason: Reason::Probe as u8,
                ..SocketValue::default()
            };
            let noted = note(sk, &mut value);
            if known.kind != FlowKind::Probe as u8 {
                inside_the_pod(ctx);
            }
            if known.kind == FlowKind::Leg as u8 {
                if noted {
                    // SAFETY: as above. The agent looks for this mark and removes the entry.
                    unsafe { (*flow).taken = 1 };
                }
            } else {
                let _ = FLOWS.remove(key);
                if known.kind == FlowKind::Probe as u8 {
                    probed(ctx, &key);
                }
            }
        }
        None => passed(ctx, sk, &key),
    }
}

/// A probe was delivered.
#[inline(always)]
fn probed(ctx: &SockOpsContext, flow: &FlowKey) {
    let cookie = netns_cookie(ctx);
    if let Some(pod) = pod(cookie) {
        count(cookie, Direction::Inbound, &arriving(&pod, cookie, Peer::Probe, flow));
    }
}

/// No flow was recorded. In an enrolled pod that is the pod talking to itself, a tunnel, or plaintext that `inbound`
/// passed: the verdict is made again, noted, and the end of the connection will be reported.
#[inline(always)]
fn passed(ctx: &SockOpsContext, sk: *mut bpf_sock, flow: &FlowKey) {
    let cookie = netns_cookie(ctx);
    let Some(pod) = pod(cookie) else { return };
    if flow.dport == PORT_HBONE || flow.src.is_loopback() || flow.dst.is_loopback() {
        return;
    }
    // SAFETY: the cookie is compared at once.
    if unsafe { POD_ADDRS.get(flow.src) }.is_some_and(|owner| owner.netns_cookie == cookie) {
        return;
    }
    let verdict = arriving(&pod, cookie, Peer::Plain, flow);
    if matches!(verdict.answer, Answer::Agent) {
        return;
    }
    count(cookie, Direction::Inbound, &verdict);
    let mut value = SocketValue {
        addr: flow.src,
        netns_cookie: cookie,
        at_ns: now_ns(),
        rule: verdict.rule,
        generation: verdict.generation,
        port: flow.sport,
        kind: SocketKind::Passed as u8,
        reason: verdict.reason as u8,
        ..SocketValue::default()
    };
    let noted = note(sk, &mut value);
    let _ = ctx.set_cb_flags(BPF_SOCK_OPS_STATE_CB_FLAG as i32);
    if !noted || matches!(verdict.answer, Answer::Refuse) {
        // The policy changed between SYN and ACK, or the socket cannot be accounted for: the agent must end it.
        let direction = Direction::Inbound;
        let about = About { netns_cookie: cookie, direction, kind: EventKind::Overtaken, verdict: &verdict, flow };
        send(&about, &Ended::default(), true);
    }
}

/// A socket that asked for it changes its state.
#[inline(always)]
fn changed(ctx: &SockOpsContext) {
    let Some(sk) = socket(ctx) else { return };
    let Some(value) = storage(sk) else { return };
    if value.kind != SocketKind::Passed as u8 {
        let connects = value.kind == SocketKind::Redirected as u8
            || value.kind == SocketKind::Leg as u8
            || value.kind == SocketKind::Probe as u8
            || value.kind == SocketKind::Local as u8;
        if connects && ctx.arg(1) == BPF_TCP_CLOSE {
            let ((src, sport), (dst, dport)) = ends(ctx);
            // Most often it is gone already.
            let _ = FLOWS.remove(FlowKey { src, dst, sport, dport, _pad: 0 });
        }
        return;
    }
    // The kernel's byte counts include each FIN, so the transitions that prove one are noted.
    let (old, new) = (ctx.arg(0), ctx.arg(1));
    let closed = new == BPF_TCP_CLOSE;
    if new == BPF_TCP_CLOSE_WAIT || new == BPF_TCP_CLOSING || (old == BPF_TCP_FIN_WAIT2 && closed) {
        value.fin_received = 1;
    }
    if new == BPF_TCP_FIN_WAIT2 || ((old == BPF_TCP_LAST_ACK || old == BPF_TCP_CLOSING) && closed) {
        value.fin_acked = 1;
    }
    if closed {
        ended(ctx, value);
    }
}

#[inline(always)]
fn ended(ctx: &SockOpsContext, value: &SocketValue) {
    let ((dst, dport), (src, sport)) = ends(ctx);
    let verdict = Verdict {
        answer: Answer::Pass,
        reason: Reason::from_u8(value.reason).unwrap_or(Reason::NoAllowPolicies),
        rule: value.rule,
        generation: value.generation,
    };
    let flow = FlowKey { src, dst, sport, dport, _pad: 0 };
    // SAFETY: the verifier checks each access to the context.
    let (received, acked) = unsafe {
        ((&raw const (*ctx.ops).bytes_received).read_volatile(), (&raw const (*ctx.ops).bytes_acked).read_volatile())
    };
    let about = About {
        netns_cookie: value.netns_cookie,
        direction: Direction::Inbound,
        kind: EventKind::Closed,
        verdict: &verdict,
        flow: &flow,
    };
    let ended = Ended {
        opened_ns: value.at_ns,
        received_bytes: received.saturating_sub(value.fin_received.into()),
        sent_bytes: acked.saturating_sub(value.fin_acked.into()),
    };
    send(&about, &ended, false);
}
