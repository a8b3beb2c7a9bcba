//! The gate, at the common cgroup of all pods: a pod that no agent has classified yet neither connects nor is connected to.
//!
//! A pod is known by the id of its cgroup, above those of its containers. Whatever has to do with the node's own network, or
//! stays inside a pod, passes: the gate must not lock the node out of itself.

use aya_ebpf::{
    bindings::BPF_TCP_LISTEN,
    helpers::{bpf_get_current_ancestor_cgroup_id, bpf_sk_ancestor_cgroup_id, bpf_sk_fullsock},
    programs::{SkBuffContext, SockAddrContext},
};
use culvert_common::{
    Addr, Answer, Direction, EventKind, FlowKey, Reason, SocketKind, Verdict,
    gate::{Class, admits},
};

use crate::{
    connect::asked,
    context::{SOCK_STREAM, netns_cookie, storage, word},
    maps::{GATE, GATE_LEVELS, NODE_ADDRS, POD_ADDRS, PODS, SETTINGS, UDP_PODS},
    report::{About, Ended, count, refused, send as send_event},
    udp,
};

const PASS: i32 = 1;
/// Of a connect: EPERM.
const REFUSE: i32 = 0;

/// One `connect` of a socket that was made in a pod's cgroup.
#[inline(always)]
pub(crate) fn connect(ctx: &SockAddrContext, v6: bool) -> i32 {
    let (kind, dst, port) = asked(ctx, v6);
    if kind != SOCK_STREAM {
        return send(ctx, v6);
    }
    if dst.is_loopback() || dst.is_unspecified() || passes(ctx) {
        return PASS;
    }
    // Counted together, since nobody removes the counters of a pod that stays unknown; told with whose network it is.
    count(0, Direction::Outbound, &UNKNOWN);
    let flow = FlowKey { src: Addr::UNSPECIFIED, dst, sport: 0, dport: port, _pad: 0 };
    let about = About {
        netns_cookie: netns_cookie(ctx),
        direction: Direction::Outbound,
        kind: EventKind::Refused,
        verdict: &UNKNOWN,
        flow: &flow,
    };
    send_event(&about, &Ended::default(), false);
    REFUSE
}

/// UDP of such a socket: held where the mesh refuses UDP, since the pod may be one of those.
#[inline(always)]
pub(crate) fn send(ctx: &SockAddrContext, v6: bool) -> i32 {
    // SAFETY: only tested for presence.
    if unsafe { UDP_PODS.get(0) }.is_none() || udp::leaves(ctx, v6).is_none() || passes(ctx) {
        return PASS;
    }
    // Not told one by one: it may be as many as a pod can send.
    count(0, Direction::Outbound, &UNKNOWN);
    REFUSE
}

/// Whether what a process sends, or whom it calls, is for others to judge.
#[inline(always)]
fn passes(ctx: &SockAddrContext) -> bool {
    let cookie = netns_cookie(ctx);
    // SAFETY: the helper takes a number, and answers 0 for a level that does not exist.
    let Some(class) = class(|level| unsafe { bpf_get_current_ancestor_cgroup_id(level) }) else {
        // No process of a pod: the kernel goes on with what one has begun, as with further paths of MPTCP.
        return true;
    };
    // SAFETY: only tested for presence.
    if admits(class, unsafe { PODS.get(cookie) }.is_some()) {
        return true;
    }
    // Static and hostNetwork pods, and what a container runtime does for a pod before it enters its namespace.
    if SETTINGS.get(0).is_some_and(|settings| settings.host_netns_cookie == cookie) {
        return true;
    }
    // SAFETY: the context's socket is never null in these hooks.
    let known = storage(unsafe { (*ctx.sock_addr).__bindgen_anon_1.sk }).map_or(0, |value| value.kind);
    known == SocketKind::Agent as u8 || known == SocketKind::Leg as u8
}

/// One packet for a socket that was made in a pod's cgroup.
#[inline(always)]
pub(crate) fn arrive(ctx: &SkBuffContext) -> i32 {
    // SAFETY: the verifier checks the access, and wants the pointer to be tested before it is used.
    let sk = unsafe { (*ctx.skb.skb).__bindgen_anon_2.sk };
    if sk.is_null() {
        return PASS;
    }
    // SAFETY: the verifier checks the access; what is established goes on.
    if unsafe { word(&raw const (*sk).state) } != BPF_TCP_LISTEN {
        return PASS;
    }
    // SAFETY: the socket is there as long as the packet that is for it.
    let sk = unsafe { bpf_sk_fullsock(sk) };
    if sk.is_null() {
        return PASS;
    }
    let Some(flow) = flow(ctx) else { return REFUSE };
    // SAFETY: only tested for presence.
    let (of_pod, of_node) = unsafe { (POD_ADDRS.get(flow.dst).is_some(), NODE_ADDRS.get(flow.dst).is_some()) };
    if flow.dst.is_loopback() || of_node {
        return PASS;
    }
    // SAFETY: the helper takes a full socket, and answers 0 for a level that does not exist.
    let class = class(|level| unsafe { bpf_sk_ancestor_cgroup_id(sk.cast(), level) }).unwrap_or(Class::Unknown);
    if admits(class, of_pod) {
        return PASS;
    }
    refused(0, Direction::Inbound, &UNKNOWN, &flow);
    REFUSE
}

const UNKNOWN: Verdict = Verdict { answer: Answer::Refuse, reason: Reason::PodUnknown, rule: 0, generation: 0 };

/// What is known of the pod among the ancestors; `None` if there is no ancestor where pods are.
#[inline(always)]
fn class(ancestor: impl Fn(i32) -> u64) -> Option<Class> {
    let Some(known) = GATE_LEVELS.get(0) else { return Some(Class::Unknown) };
    if known.levels[0] == 0 {
        // Nobody has said where pods are.
        return Some(Class::Unknown);
    }
    let mut found = None;
    // By number: the verifier follows that, and not two pointers.
    for nth in 0..culvert_common::GATE_LEVELS {
        let level = known.levels[nth];
        if level == 0 {
            break;
        }
        let id = ancestor(level.into());
        if id == 0 {
            continue;
        }
        // SAFETY: one byte is copied before any other map operation.
        if let Some(class) = unsafe { GATE.get(id) }.map(|value| Class::from_u8(value.class)) {
            return Some(class);
        }
        found = Some(Class::Unknown);
    }
    found
}

/// Whom the packet is from, and to. The packet begins with the network header here.
#[inline(always)]
fn flow(ctx: &SkBuffContext) -> Option<FlowKey> {
    let first: u8 = ctx.load(0).ok()?;
    let (src, dst, at) = if first >> 4 == 4 {
        let ip: [u8; 8] = ctx.load(12).ok()?;
        let (src, dst) = ([ip[0], ip[1], ip[2], ip[3]], [ip[4], ip[5], ip[6], ip[7]]);
        (Addr::from_v4(src), Addr::from_v4(dst), usize::from(first & 0x0f) * 4)
    } else {
        (Addr::from_be32x4(ctx.load(8).ok()?), Addr::from_be32x4(ctx.load(24).ok()?), 40)
    };
    // Only for the report: behind headers of IPv6's extensions these are others' bytes.
    let ports: [u8; 4] = ctx.load(at).unwrap_or_default();
    let (sport, dport) = (u16::from_be_bytes([ports[0], ports[1]]), u16::from_be_bytes([ports[2], ports[3]]));
    Some(FlowKey { src, dst, sport, dport, _pad: 0 })
}
