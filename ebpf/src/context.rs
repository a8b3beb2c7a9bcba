//! What the programs share: reading contexts field by field, looking up a pod, and the storage of a socket.

use core::{ffi::c_void, ptr};

use aya_ebpf::{
    EbpfContext,
    bindings::{BPF_SK_STORAGE_GET_F_CREATE, bpf_sock},
    helpers::{bpf_get_netns_cookie, bpf_ktime_get_ns, bpf_sk_storage_delete, bpf_sk_storage_get},
    maps::lpm_trie::Key,
};
use culvert_common::{
    Addr, Authorization, AuthorizationKey, Direction, FlowKey, Inputs, Mode, ModeKey, Peer, PodState, PodValue,
    PortKey, SILENT_AFTER_NS, SocketValue, SourceKey, Verdict, bucket, decide,
};

use crate::maps::{AUTHORIZATION, HEARTBEAT, MODES, PODS, PORTS, SOCKETS, SOURCES};

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

/// The verdict about what arrives at `pod` without a tunnel.
#[inline(always)]
pub(crate) fn arriving(pod: &PodValue, netns_cookie: u64, peer: Peer, flow: &FlowKey) -> Verdict {
    let mut inputs = inputs(pod, netns_cookie, Direction::Inbound, peer, flow.dport);
    inputs.authorization = if pod.plaintext_by_agent != 0 {
        Authorization::Agent
    } else if pod.table == 0 {
        Authorization::None
    } else {
        match look_up(pod.table, &flow.src, flow.dport, pod.port_buckets) {
            ABSENT => Authorization::Missing,
            found => Authorization::of(found as u8, (found >> 32) as u32),
        }
    };
    decide(&inputs)
}

/// What [`look_up`] answers where an entry is not there: no reason has this number.
const ABSENT: u64 = u64::MAX;

/// What a table says of a client's address and a port: the reason in the lowest byte, the rule in the upper half. A function
/// of its own in the kernel too, whose stack is free again when it returns; it can give back one register.
#[inline(never)]
fn look_up(table: u32, src: &Addr, port: u16, buckets: u16) -> u64 {
    /// A key of `SOURCES` in words, so that it is made and read word by word.
    #[repr(C, align(8))]
    struct Words([u32; 6]);
    const _: () = assert!(size_of::<Words>() == size_of::<Key<SourceKey>>());

    let [a, b, c, d] = src.to_be32x4();
    let words = Words([SourceKey::BITS, table, a, b, c, d]);
    // SAFETY: as long as a key, which is packed and of which any bytes make one.
    let key = unsafe { &*(&raw const words).cast::<Key<SourceKey>>() };
    let Some(source) = SOURCES.get(key) else { return ABSENT };
    let source_class = source.class;
    // SAFETY: the number is copied before any other map operation; the agent never edits entries that are referred to.
    let Some(ports) = (unsafe { PORTS.get(PortKey { table, bucket: bucket(port, buckets), _pad: 0 }) }) else {
        return ABSENT;
    };
    let port_class = ports.ports.iter().find(|named| named.port == port).map_or(ports.others, |named| named.class);
    // SAFETY: as above.
    match unsafe { AUTHORIZATION.get(AuthorizationKey { table, source_class, port_class }) } {
        Some(value) => u64::from(value.rule) << 32 | u64::from(value.reason),
        None => ABSENT,
    }
}

/// Inputs of the verdict about a connection to `port` of `pod`, or from it; what policies say of plaintext is not among them
/// yet, which would refuse it.
#[inline(always)]
pub(crate) fn inputs(pod: &PodValue, netns_cookie: u64, direction: Direction, peer: Peer, port: u16) -> Inputs {
    let mut inputs = Inputs {
        direction,
        peer,
        state: PodState::from_u8(pod.state),
        agent_alive: agent_alive(),
        port,
        mode: Mode::from_u8(pod.mode),
        authorization: Authorization::Missing,
        rule: pod.rule,
        generation: pod.generation,
    };
    if pod.mode_buckets != 0 && matches!(direction, Direction::Inbound) {
        let bucket = bucket(port, pod.mode_buckets);
        // SAFETY: what is of use is copied before any other map operation.
        match unsafe { MODES.get(ModeKey { netns_cookie, generation: pod.generation, bucket, _pad: 0 }) } {
            Some(modes) => {
                if let Some(named) = modes.ports.iter().find(|named| named.port == port) {
                    inputs.mode = Mode::from_u8(named.mode);
                    inputs.rule = named.rule;
                }
            }
            // What it says of this port, or that it says nothing, is not known.
            None => {
                inputs.mode = Mode::Missing;
                inputs.rule = 0;
            }
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
