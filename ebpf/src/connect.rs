//! `connect4/6`: a pod's connection is rewritten to the pod itself, where the agent's listener waits, or refused; a
//! kubelet's is noted.

use aya_ebpf::{
    bindings::bpf_sock,
    helpers::{bpf_get_current_ancestor_cgroup_id, bpf_get_prandom_u32, bpf_get_retval, bpf_set_retval},
    programs::SockAddrContext,
};
use culvert_common::{
    Addr, Answer, Direction, FlowKey, KUBELET_LEVELS, Peer, PodValue, Reason, SettingsValue, SocketKind, SocketValue,
    Verdict, decide, is_redirect_port, redirect_port,
};

use crate::{
    context::{SOCK_STREAM, forget, inputs, netns_cookie, note, now_ns, pod, storage, word, words},
    maps::{POD_ADDRS, SETTINGS},
    report::{count, refused},
    udp,
};

const ALLOW: i32 = 1;
const REFUSE: i32 = 0;
const ECONNREFUSED: i32 = 111;

/// One `connect` of any socket under the node's cgroup.
#[inline(always)]
pub(crate) fn connect(ctx: &SockAddrContext, v6: bool) -> i32 {
    let (kind, dst, port) = asked(ctx, v6);
    // UDP and everything else that is no stream is not captured (specification §3).
    if kind != SOCK_STREAM {
        return udp::judge(ctx, v6);
    }
    // SAFETY: the helper takes no argument.
    if unsafe { bpf_get_retval() } < 0 {
        // A program before this one refuses it, and has said why: the gate, or somebody else's. It stays refused.
        return ALLOW;
    }
    let cookie = netns_cookie(ctx);
    match pod(cookie) {
        Some(pod) => of_pod(ctx, &pod, cookie, v6, dst, port),
        None => of_node(ctx, cookie, dst),
    }
}

/// The kind of a socket, and where it is to connect or to send.
#[inline(always)]
pub(crate) fn asked(ctx: &SockAddrContext, v6: bool) -> (u32, Addr, u16) {
    let raw = ctx.sock_addr;
    // SAFETY: the verifier checks each access to the context.
    unsafe {
        (
            word(&raw const (*raw).type_),
            if v6 {
                Addr::from_be32x4(words(&raw const (*raw).user_ip6))
            } else {
                Addr::from_be32(word(&raw const (*raw).user_ip4))
            },
            u16::from_be(word(&raw const (*raw).user_port) as u16),
        )
    }
}

/// A process outside every enrolled pod: noted if it is the kubelet ([K.5]), whoever it calls. A pod may become enrolled
/// while the kubelet's SYN is on its way.
#[inline(always)]
fn of_node(ctx: &SockAddrContext, cookie: u64, dst: Addr) -> i32 {
    let Some(settings) = SETTINGS.get(0) else { return ALLOW };
    let kubelet = if settings.probes_by_netns != 0 {
        // Everything of the host counts here: only what calls a pod of this node is worth a note.
        cookie == settings.host_netns_cookie
            // SAFETY: only tested for presence.
            && unsafe { POD_ADDRS.get(dst) }.is_some()
    } else {
        settings.kubelet_cgroup != 0 && is_kubelet(settings)
    };
    if kubelet {
        let mut value = SocketValue {
            netns_cookie: cookie,
            at_ns: now_ns(),
            kind: SocketKind::Probe as u8,
            ..SocketValue::default()
        };
        // SAFETY: the context's socket is never null in this hook.
        let sk = unsafe { (*ctx.sock_addr).__bindgen_anon_1.sk };
        // Without the note the probe is judged as plaintext: that refuses, it never opens.
        note(sk, &mut value);
    }
    ALLOW
}

/// Whether the calling process is in the kubelet's cgroup. An id says which cgroup it is wherever it is found, so every level is
/// tried where its depth is not known.
#[inline(always)]
fn is_kubelet(settings: &SettingsValue) -> bool {
    // SAFETY: the helper takes a number, and answers 0 for a level that does not exist.
    let is_at = |level| unsafe { bpf_get_current_ancestor_cgroup_id(level) } == settings.kubelet_cgroup;
    if settings.kubelet_level != 0 {
        return is_at(settings.kubelet_level as i32);
    }
    for level in 1..=KUBELET_LEVELS {
        if is_at(level) {
            return true;
        }
    }
    false
}

#[inline(always)]
fn of_pod(ctx: &SockAddrContext, pod: &PodValue, cookie: u64, v6: bool, dst: Addr, port: u16) -> i32 {
    // SAFETY: the context's socket is never null in this hook.
    let sk = unsafe { (*ctx.sock_addr).__bindgen_anon_1.sk };
    let known = match storage(sk) {
        Some(value) => value.kind,
        None => 0,
    };
    let peer = if known == SocketKind::Agent as u8 || known == SocketKind::Leg as u8 {
        Peer::Agent
    } else if dst.is_loopback() || dst.is_unspecified() || owns(cookie, dst) {
        Peer::SamePod
    } else {
        Peer::Plain
    };
    let mut verdict = decide(&inputs(pod, cookie, Direction::Outbound, peer, port));
    if matches!(verdict.answer, Answer::Pass) {
        if matches!(peer, Peer::SamePod) && is_redirect_port(port) && !dst.is_loopback() {
            // It arrives where redirected connections do. Without the note it is refused there.
            let kind = SocketKind::Local as u8;
            note(sk, &mut SocketValue { netns_cookie: cookie, at_ns: now_ns(), kind, ..SocketValue::default() });
        } else if known == SocketKind::Redirected as u8 {
            // A socket that is used again must not show where it went before.
            forget(sk);
        }
        return ALLOW;
    }
    if matches!(verdict.answer, Answer::Agent) {
        // A connection from somebody else's address (IP_TRANSPARENT) could not be recognised where it arrives.
        let borrowed = borrows(sk, cookie, v6);
        let redirected = if borrowed { Err(Reason::ForeignSource) } else { redirect(ctx, pod, cookie, v6, dst, port) };
        match redirected {
            Ok(()) => {
                count(cookie, Direction::Outbound, &verdict);
                return ALLOW;
            }
            Err(reason) => verdict = Verdict { answer: Answer::Refuse, reason, ..verdict },
        }
    }
    let flow = FlowKey { src: if dst.is_v4() { pod.addr4 } else { pod.addr6 }, dst, sport: 0, dport: port, _pad: 0 };
    refused(cookie, Direction::Outbound, &verdict, &flow);
    // SAFETY: sets the errno of this very call.
    unsafe { bpf_set_retval(-ECONNREFUSED) };
    REFUSE
}

#[inline(always)]
pub(crate) fn owns(cookie: u64, addr: Addr) -> bool {
    // SAFETY: the value is compared at once.
    unsafe { POD_ADDRS.get(addr) }.is_some_and(|owner| owner.netns_cookie == cookie)
}

/// Whether a socket is bound to an address that is not the pod's.
#[inline(always)]
fn borrows(sk: *mut bpf_sock, cookie: u64, v6: bool) -> bool {
    // SAFETY: the verifier checks each access to the socket.
    let bound = unsafe {
        if v6 {
            Addr::from_be32x4(words(&raw const (*sk).src_ip6))
        } else {
            Addr::from_be32(word(&raw const (*sk).src_ip4))
        }
    };
    !bound.is_unspecified() && !bound.is_loopback() && !owns(cookie, bound)
}

/// Notes the original destination and rewrites the connection to the pod's own address.
#[inline(always)]
fn redirect(ctx: &SockAddrContext, pod: &PodValue, cookie: u64, v6: bool, dst: Addr, port: u16) -> Result<(), Reason> {
    let to = if dst.is_v4() { pod.addr4 } else { pod.addr6 };
    if to.is_unspecified() {
        return Err(Reason::NoAddressOfFamily);
    }
    // SAFETY: the context's socket is never null in this hook.
    let sk = unsafe { (*ctx.sock_addr).__bindgen_anon_1.sk };
    let mut value = SocketValue {
        addr: dst,
        netns_cookie: cookie,
        at_ns: now_ns(),
        port,
        kind: SocketKind::Redirected as u8,
        ..SocketValue::default()
    };
    if !note(sk, &mut value) {
        return Err(Reason::KernelCapacity);
    }
    // SAFETY: the helper takes no argument; the verifier checks the access to the socket.
    let (random, bound) = unsafe { (bpf_get_prandom_u32(), word(&raw const (*sk).src_port) as u16) };
    let redirected = redirect_port(random, bound);
    let raw = ctx.sock_addr;
    // SAFETY: the verifier checks each write to the context; volatile keeps them word by word.
    unsafe {
        if v6 {
            let [a, b, c, d] = to.to_be32x4();
            let at = (&raw mut (*raw).user_ip6).cast::<u32>();
            at.write_volatile(a);
            at.add(1).write_volatile(b);
            at.add(2).write_volatile(c);
            at.add(3).write_volatile(d);
        } else {
            (&raw mut (*raw).user_ip4).write_volatile(to.to_be32x4()[3]);
        }
        (&raw mut (*raw).user_port).write_volatile(redirected.to_be().into());
    }
    Ok(())
}
