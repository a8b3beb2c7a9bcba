//! Culvert's kernel programs: the list of what is attached, and where.
//!
//! | program | hook | attached to | does |
//! |---|---|---|---|
//! | `connect4`, `connect6` | `cgroup/connect4`, `6` | the node's cgroup | captures or refuses a pod's connection; notes the kubelet's |
//! | `send4`, `send6` | `cgroup/sendmsg4`, `6` | the node's cgroup | refuse a pod's UDP where that is wanted, as `connect4`, `6` do |
//! | `peername4`, `peername6` | `cgroup/getpeername4`, `6` | the node's cgroup | shows the application who it really talks to |
//! | `handshake` | `sock_ops` | the node's cgroup | carries what is known of a connection from one end to the other |
//! | `inbound` | `sk_lookup` | each enrolled pod's network namespace | passes, refuses or hands over what arrives |
//! | `leaving` | `tc` ingress | the node's end of each enrolled pod's veth | stops what leaves a pod without having been captured |
//! | `judge` | `tc` | nothing | answers what `inbound` would decide, for whoever runs it |
//! | `gate4`, `gate6` | `cgroup/connect4`, `6` | the pods' common cgroup | refuse pods that no agent knows yet |
//! | `gate_send4`, `gate_send6` | `cgroup/sendmsg4`, `6` | the pods' common cgroup | refuse their UDP, where the mesh refuses it |
//! | `gate_in` | `cgroup_skb/ingress` | the pods' common cgroup | drops what would connect to them |
//!
//! Only `leaving` and `gate_in` run per packet of an established connection; all that they do then is to look at the headers,
//! and at the socket's state. What a connection deserves is decided by
//! `culvert_common::decide`; the files here gather its inputs and carry out its answer.
#![no_std]
#![no_main]
#![expect(missing_docs, unreachable_pub, reason = "aya's macros make the entry points public functions of their own")]

mod connect;
mod context;
mod gate;
mod handshake;
mod inbound;
mod judge;
mod leaving;
mod maps;
mod peername;
mod report;
mod udp;

use aya_ebpf::{
    macros::{cgroup_skb, cgroup_sock_addr, classifier, sk_lookup, sock_ops},
    programs::{SkBuffContext, SkLookupContext, SockAddrContext, SockOpsContext, TcContext},
};

/// `cgroup/connect4`: 1 lets the connect go on, 0 refuses it with the errno that was set.
#[cgroup_sock_addr(connect4)]
pub fn connect4(ctx: SockAddrContext) -> i32 {
    connect::connect(&ctx, false)
}

/// `cgroup/connect6`, which sees IPv4-mapped destinations of IPv6 sockets too.
#[cgroup_sock_addr(connect6)]
pub fn connect6(ctx: SockAddrContext) -> i32 {
    connect::connect(&ctx, true)
}

/// `cgroup/sendmsg4`, of UDP to an address: 1 lets it go on, 0 refuses it.
#[cgroup_sock_addr(sendmsg4)]
pub fn send4(ctx: SockAddrContext) -> i32 {
    udp::judge(&ctx, false)
}

/// `cgroup/sendmsg6`; IPv4-mapped destinations come by `sendmsg4`.
#[cgroup_sock_addr(sendmsg6)]
pub fn send6(ctx: SockAddrContext) -> i32 {
    udp::judge(&ctx, true)
}

/// `cgroup/getpeername4`, which `accept` goes through too. Must return 1.
#[cgroup_sock_addr(getpeername4)]
pub fn peername4(ctx: SockAddrContext) -> i32 {
    peername::v4(&ctx);
    1
}

/// `cgroup/getpeername6`, which `accept` goes through too. Must return 1.
#[cgroup_sock_addr(getpeername6)]
pub fn peername6(ctx: SockAddrContext) -> i32 {
    peername::v6(&ctx);
    1
}

/// `sock_ops`: connect, accept and close of TCP sockets.
#[sock_ops]
pub fn handshake(ctx: SockOpsContext) -> u32 {
    handshake::run(&ctx);
    1
}

/// `sk_lookup`: which socket a new connection to the pod reaches.
#[sk_lookup]
pub fn inbound(ctx: SkLookupContext) -> u32 {
    inbound::run(&ctx)
}

/// `tc` ingress at the node's end of a pod's veth: -1 lets other programs decide, 2 drops.
#[classifier]
pub fn leaving(ctx: TcContext) -> i32 {
    leaving::run(&ctx)
}

/// Run, never attached: 0 if the packet's data was a question, and is the answer now.
#[classifier]
pub fn judge(ctx: TcContext) -> i32 {
    judge::run(&ctx)
}

/// `cgroup/connect4` for pods: 1 lets the connect go on to `connect4`, 0 refuses it.
#[cgroup_sock_addr(connect4)]
pub fn gate4(ctx: SockAddrContext) -> i32 {
    gate::connect(&ctx, false)
}

/// `cgroup/connect6` for pods.
#[cgroup_sock_addr(connect6)]
pub fn gate6(ctx: SockAddrContext) -> i32 {
    gate::connect(&ctx, true)
}

/// `cgroup/sendmsg4` for pods.
#[cgroup_sock_addr(sendmsg4)]
pub fn gate_send4(ctx: SockAddrContext) -> i32 {
    gate::send(&ctx, false)
}

/// `cgroup/sendmsg6` for pods.
#[cgroup_sock_addr(sendmsg6)]
pub fn gate_send6(ctx: SockAddrContext) -> i32 {
    gate::send(&ctx, true)
}

/// `cgroup_skb/ingress` for pods: 1 lets the packet reach its socket, 0 drops it.
#[cgroup_skb(ingress)]
pub fn gate_in(ctx: SkBuffContext) -> i32 {
    gate::arrive(&ctx)
}

/// Never reached: the verifier rejects a program that could panic.
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// Helpers such as `bpf_ktime_get_ns` are free; the licence keeps the GPL-only ones open to us.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
