//! What the programs share: reading contexts field by field, looking up a pod, and the storage of a socket.

use core::{ffi::c_void, ptr};

use aya_ebpf::{
    EbpfContext,
    bindings::{BPF_SK_STORAGE_GET_F_CREATE, bpf_sock},
    helpers::{bpf_get_netns_cookie, bpf_ktime_get_ns, bpf_sk_storage_delete, bpf_sk_storage_get},
};
use culvert_common::{Direction, Inputs, Mode, ModeKey, Peer, PodState, PodValue, SILENT_AFTER_NS, SocketValue};

use crate::maps::{HEARTBEAT, MODES, PODS, SOCKETS};

/// `AF_INET6` of <linux/socket.h>.
pub(crate) const AF_INET6: u32 = 10;
/// `SOCK_STREAM`.
pub(crate) const SOCK_STREAM: u32 = 1;
/// `IPPROTO_TCP`.
pub(crate) const IPPROTO_TCP: u32 = 6;

/// Reads four words of a context one by one: the compiler must not merge them, since the verifier wants constant
/// offsets from an unmodified context pointer.
#[inline(always)]
pub(crate) fn words(from: *const [u32; 4]) -> [u32; 4] {
    let from = from.cast::<u32>();
    // SAFETY: `from` points at four words of a context, which the verifier checks.
    unsafe {
        [
            ptr::read_volatile(from),
            ptr::read_volatile(from.add(1)),
            ptr::read_volatile(from.add(2)),
            ptr::read_volatile(from.add(3)),
        ]
    }
}

/// Reads one word of a context.
#[inline(always)]
pub(crate) fn word(from: *const u32) -> u32 {
    // SAFETY: `from` points at a word of a context, which the verifier checks.
    unsafe { ptr::read_volatile(from) }
}

/// Nanoseconds of `CLOCK_MONOTONIC`.
#[inline(always)]
pub(crate) fn now_ns() -> u64 {
    // SAFETY: the helper takes no argument.
    unsafe { bpf_ktime_get_ns() }
}

/// Cookie of the network namespace of the context's socket.
#[inline(always)]
pub(crate) fn netns_cookie(ctx: &impl EbpfContext) -> u64 {
    // SAFETY: both kinds of context that call this are accepted by the helper.
    unsafe { bpf_get_netns_cookie(ctx.as_ptr()) }
}

/// The pod of a network namespace, copied: the entry may be replaced at any time, and one verdict must see one value.
#[inline(always)]
pub(crate) fn pod(netns_cookie: u64) -> Option<PodValue> {
    // SAFETY: the value is copied before any other map operation; the agent replaces entries, it never edits them.
    unsafe { PODS.get(netns_cookie).copied() }
}

/// Whether the agent has given a sign of life recently enough.
#[inline(always)]
pub(crate) fn agent_alive() -> bool {
    match HEARTBEAT.get(0) {
        Some(beat) => beat.at_ns != 0 && now_ns().saturating_sub(beat.at_ns) < SILENT_AFTER_NS,
        None => false,
    }
}

/// Inputs of the verdict about a connection to `port` of `pod`, or from it.
#[inline(always)]
pub(crate) fn inputs(pod: &PodValue, netns_cookie: u64, direction: Direction, peer: Peer, port: u16) -> Inputs {
    let mut inputs = Inputs {
        direction,
        peer,
        state: PodState::from_u8(pod.state),
        agent_alive: agent_alive(),
        port,
        mode: Mode::from_u8(pod.mode),
        plaintext_by_agent: pod.plaintext_by_agent != 0,
        rule: pod.rule,
        generation: pod.generation,
    };
    if pod.has_port_modes != 0 && matches!(direction, Direction::Inbound) {
        let key = ModeKey { netns_cookie, generation: pod.generation, port, _pad: 0 };
        // SAFETY: both fields are copied before any other map operation.
        if let Some(port_mode) = unsafe { MODES.get(key) } {
            inputs.mode = Mode::from_u8(port_mode.mode);
            inputs.rule = port_mode.rule;
        }
    }
    inputs
}

#[inline(always)]
fn sockets() -> *mut c_void {
    (&raw const SOCKETS).cast_mut().cast()
}

/// What is known of a socket. `sk` must have been checked for null.
#[inline(always)]
pub(crate) fn storage<'a>(sk: *mut bpf_sock) -> Option<&'a mut SocketValue> {
    // SAFETY: the helper returns null or a value that lives as long as the socket, which outlives the program's run.
    unsafe { bpf_sk_storage_get(sockets(), sk.cast(), ptr::null_mut(), 0).cast::<SocketValue>().as_mut() }
}

/// Notes what is known of a socket; false if the kernel had no memory for it.
#[inline(always)]
pub(crate) fn note(sk: *mut bpf_sock, value: &mut SocketValue) -> bool {
    // SAFETY: as in `storage`; the initial value is copied by the helper.
    let place = unsafe {
        bpf_sk_storage_get(sockets(), sk.cast(), ptr::from_mut(value).cast(), BPF_SK_STORAGE_GET_F_CREATE.into())
            .cast::<SocketValue>()
            .as_mut()
    };
    match place {
        Some(place) => {
            *place = *value;
            true
        }
        None => false,
    }
}

/// Forgets what is known of a socket.
#[inline(always)]
pub(crate) fn forget(sk: *mut bpf_sock) {
    // SAFETY: deleting storage that is not there is an error that changes nothing.
    unsafe { bpf_sk_storage_delete(sockets(), sk.cast()) };
}
