//! `getpeername4/6` (and `accept`): the application sees the server that it asked for, and the client that called it.

use aya_ebpf::programs::SockAddrContext;
use culvert_common::{SocketKind, SocketValue};

use crate::context::storage;

#[inline(always)]
fn shown(ctx: &SockAddrContext) -> Option<&SocketValue> {
    // SAFETY: the context's socket is never null in this hook.
    let value = storage(unsafe { (*ctx.sock_addr).__bindgen_anon_1.sk })?;
    let shows = value.kind == SocketKind::Redirected as u8 || value.kind == SocketKind::Served as u8;
    shows.then_some(value)
}

/// An IPv4 socket.
#[inline(always)]
pub(crate) fn v4(ctx: &SockAddrContext) {
    let Some(value) = shown(ctx) else { return };
    if !value.addr.is_v4() {
        return;
    }
    let (addr, port) = (value.addr.to_be32x4()[3], value.port.to_be());
    // SAFETY: the verifier checks each write to the context.
    unsafe {
        (&raw mut (*ctx.sock_addr).user_ip4).write_volatile(addr);
        (&raw mut (*ctx.sock_addr).user_port).write_volatile(port.into());
    }
}

/// An IPv6 socket; an IPv4 peer is shown mapped, as the kernel does.
#[inline(always)]
pub(crate) fn v6(ctx: &SockAddrContext) {
    let Some(value) = shown(ctx) else { return };
    let ([a, b, c, d], port) = (value.addr.to_be32x4(), value.port.to_be());
    // SAFETY: the verifier checks each write to the context.
    unsafe {
        let at = (&raw mut (*ctx.sock_addr).user_ip6).cast::<u32>();
        at.write_volatile(a);
        at.add(1).write_volatile(b);
        at.add(2).write_volatile(c);
        at.add(3).write_volatile(d);
        (&raw mut (*ctx.sock_addr).user_port).write_volatile(port.into());
    }
}
