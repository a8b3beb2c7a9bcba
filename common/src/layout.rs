//! Keys and values of the maps, and the events of the ring buffer.

use crate::addr::Addr;

/// Value of `PODS`, by netns cookie: one enrolled pod. One write of it switches the pod's policy generation.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PodValue {
    /// The pod's IPv4 address, mapped; unspecified if it has none. Redirected IPv4 connections go to it.
    pub addr4: Addr,
    /// The pod's IPv6 address; unspecified if it has none.
    pub addr6: Addr,
    /// Policy generation: selects the entries of `MODES`.
    pub generation: u32,
    /// Index of the rule that set [`PodValue::mode`]; 0 for none.
    pub rule: u32,
    /// Number of the listeners of each kind in `LISTENERS`: the agent's workers.
    pub workers: u32,
    /// Which entries of `SOURCES`, `PORTS` and `AUTHORIZATION` have the verdicts on plaintext; 0 where no
    /// AuthorizationPolicy could make a difference to one.
    pub table: u32,
    /// [`crate::PodState`].
    pub state: u8,
    /// [`crate::Mode`] of every port that `MODES` does not name.
    pub mode: u8,
    /// 1 if the agent decides plaintext.
    pub plaintext_by_agent: u8,
    /// Zero.
    pub _pad: u8,
    /// Buckets of this generation in `MODES`, a power of two; 0 if every port has the pod's mode.
    pub mode_buckets: u16,
    /// Buckets of [`PodValue::table`] in `PORTS`, a power of two; 0 where there is no table.
    pub port_buckets: u16,
}
const _: () = assert!(size_of::<PodValue>() == 56);

/// Value of `POD_ADDRS`, by address: whose it is.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PodAddrValue {
    /// Cookie of the pod's network namespace: a key of `PODS`.
    pub netns_cookie: u64,
}
const _: () = assert!(size_of::<PodAddrValue>() == 8);

/// Ports that a bucket of `MODES` or `PORTS` has room for.
pub const BUCKET_PORTS: usize = 4;

/// Which of `buckets`, a power of two, names a port if any does.
///
/// What is said of single ports lies in buckets all of which are there, also those that name none, so that an entry that is
/// missing is noticed whatever port is asked for ([PA.13]).
#[inline(always)]
pub const fn bucket(port: u16, buckets: u16) -> u16 {
    // Spreads neighbours as well as multiples of powers of two (Knuth, multiplicative hashing).
    let spread = ((port as u32).wrapping_mul(0x9e37_79b1) >> 16) as u16;
    spread & buckets.wrapping_sub(1)
}

/// Key of `MODES`: a bucket of ports of a pod in one policy generation.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ModeKey {
    /// Cookie of the pod's network namespace.
    pub netns_cookie: u64,
    /// As in [`PodValue::generation`].
    pub generation: u32,
    /// By [`bucket`].
    pub bucket: u16,
    /// Zero.
    pub _pad: u16,
}
const _: () = assert!(size_of::<ModeKey>() == 16);

/// A port in [`ModeValue`], and its effective PeerAuthentication mode.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PortMode {
    /// Index of the rule that set it; 0 for none.
    pub rule: u32,
    /// The workload's port, host byte order; 0 where the bucket has room left, with the pod's own mode.
    pub port: u16,
    /// [`crate::Mode`].
    pub mode: u8,
    /// Zero.
    pub _pad: u8,
}
const _: () = assert!(size_of::<PortMode>() == 8);

/// Value of `MODES`: the ports of a bucket whose mode differs from the pod's.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ModeValue {
    /// Named ones first.
    pub ports: [PortMode; BUCKET_PORTS],
}
const _: () = assert!(size_of::<ModeValue>() == 32);

/// Data of the keys of `SOURCES`, a trie of prefixes: a block of client addresses in one table. The table's bits come first
/// and always count, so that each table is a tree of its own.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SourceKey {
    /// As in [`PodValue::table`].
    pub table: u32,
    /// As an [`Addr`], whose alignment would make padding here.
    pub addr: [u8; 16],
}
const _: () = assert!(size_of::<SourceKey>() == 20);

impl SourceKey {
    /// Bits of [`SourceKey::table`].
    pub const TABLE_BITS: u32 = 32;
    /// Bits of a key that is one address.
    pub const BITS: u32 = Self::TABLE_BITS + 128;
}

/// Value of `SOURCES`: which addresses of a table are treated alike.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ClassValue {
    /// Number of the class, from 0.
    pub class: u32,
}
const _: () = assert!(size_of::<ClassValue>() == 4);

/// Key of `PORTS`: a bucket of ports in one table.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PortKey {
    /// As in [`PodValue::table`].
    pub table: u32,
    /// By [`bucket`].
    pub bucket: u16,
    /// Zero.
    pub _pad: u16,
}
const _: () = assert!(size_of::<PortKey>() == 8);

/// A port in [`PortValue`]: which ports of a table are treated alike.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PortClass {
    /// Number of the class, from 0.
    pub class: u32,
    /// The workload's port, host byte order; 0 where the bucket has room left, with the class of others.
    pub port: u16,
    /// Zero.
    pub _pad: u16,
}
const _: () = assert!(size_of::<PortClass>() == 8);

/// Value of `PORTS`: the ports of a bucket that policies name.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PortValue {
    /// Class of every port that no bucket names.
    pub others: u32,
    /// Named ones first.
    pub ports: [PortClass; BUCKET_PORTS],
}
const _: () = assert!(size_of::<PortValue>() == 36);

/// Key of `AUTHORIZATION`: a verdict of one table.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct AuthorizationKey {
    /// As in [`PodValue::table`].
    pub table: u32,
    /// Class of the client's address, from `SOURCES`.
    pub source_class: u32,
    /// Class of the workload's port, from `PORTS`.
    pub port_class: u32,
}
const _: () = assert!(size_of::<AuthorizationKey>() == 12);

/// Value of `AUTHORIZATION`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AuthorizationValue {
    /// Index of the rule that decides; 0 for none.
    pub rule: u32,
    /// [`crate::Reason`]: one of those that [`crate::Authorization::of`] knows.
    pub reason: u8,
    /// Zero.
    pub _pad: [u8; 3],
}
const _: () = assert!(size_of::<AuthorizationValue>() == 8);

/// What the kernel is asked about a connection, and its answer: the data of a packet that is made for the program `judge`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Asked {
    /// The client's address.
    pub src: Addr,
    /// The address that it calls.
    pub dst: Addr,
    /// Client's port, host byte order.
    pub sport: u16,
    /// Port that it calls, host byte order.
    pub dport: u16,
    /// The rule that decided, 0 for none.
    pub rule: u32,
    /// Policy generation that decided.
    pub generation: u32,
    /// [`crate::Answer`].
    pub answer: u8,
    /// [`crate::Reason`].
    pub reason: u8,
    /// Zero.
    pub _pad: u16,
}
const _: () = assert!(size_of::<Asked>() == 48);

/// Key of `LISTENERS`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct ListenerKey {
    /// Cookie of the pod's network namespace.
    pub netns_cookie: u64,
    /// [`ListenerKind`].
    pub kind: u32,
    /// Which worker's: 0 to [`PodValue::workers`] − 1.
    pub worker: u32,
}
const _: () = assert!(size_of::<ListenerKey>() == 16);

/// The three listeners that the agent holds in a pod, per worker.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ListenerKind {
    /// Redirected connections of the pod.
    Outbound = 0,
    /// Tunnels to the pod (port 15008).
    Tunnel = 1,
    /// Plaintext to the pod whose verdict needs the agent.
    Plaintext = 2,
}

/// Key of `FLOWS`: a connection in its handshake, as the *receiving* side sees it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct FlowKey {
    /// Source address.
    pub src: Addr,
    /// Destination address.
    pub dst: Addr,
    /// Source port, host byte order.
    pub sport: u16,
    /// Destination port, host byte order.
    pub dport: u16,
    /// Zero.
    pub _pad: u32,
}
const _: () = assert!(size_of::<FlowKey>() == 40);

/// What a recorded flow is.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FlowKind {
    /// A pod's connection, rewritten to the pod itself: [`FlowValue::addr`] is the original destination.
    Redirected = 1,
    /// The agent's leg to an application: [`FlowValue::addr`] is the client that the application is to see.
    Leg = 2,
    /// A connection of the kubelet of this node.
    Probe = 3,
    /// A pod's connection to itself, at a port where redirected ones arrive: it is none of them.
    Local = 4,
}

/// Value of `FLOWS`: bridges the handshake between the two ends of a connection on one node.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FlowValue {
    /// By [`FlowKind`].
    pub addr: Addr,
    /// Netns cookie of the socket that connects.
    pub netns_cookie: u64,
    /// `bpf_ktime_get_ns` when recorded: nanoseconds since boot, suspend excluded.
    pub at_ns: u64,
    /// Port that goes with [`FlowValue::addr`], host byte order.
    pub port: u16,
    /// [`FlowKind`].
    pub kind: u8,
    /// 1 once the accepting side has taken it over; a leg that the agent finds at 0 was not delivered as promised.
    pub taken: u8,
    /// Zero.
    pub _pad: u32,
}
const _: () = assert!(size_of::<FlowValue>() == 40);

/// What a socket's storage says of it.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SocketKind {
    /// A pod's socket whose connect was rewritten: [`SocketValue::addr`] is what it asked for.
    Redirected = 1,
    /// The agent's listener accepted a redirected connection: [`SocketValue::addr`] is the original destination.
    Accepted = 2,
    /// The agent's own socket, no client to show.
    Agent = 3,
    /// The agent's leg to an application: [`SocketValue::addr`] is the client.
    Leg = 4,
    /// An application's socket that serves a leg: [`SocketValue::addr`] is the client.
    Served = 5,
    /// A kubelet's socket.
    Probe = 6,
    /// An application's socket whose plaintext connection the kernel passed.
    Passed = 7,
    /// An application's socket that serves a probe.
    Probed = 8,
    /// A pod's socket that connects to the pod itself, at a port where redirected connections arrive.
    Local = 9,
}

/// Value of `SOCKETS`, the storage of a socket: freed with it, so no tuple is ever mistaken for another.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SocketValue {
    /// By [`SocketKind`].
    pub addr: Addr,
    /// Netns cookie of the pod, or of the socket that connected.
    pub netns_cookie: u64,
    /// `bpf_ktime_get_ns` when noted.
    pub at_ns: u64,
    /// Rule of the verdict, for [`SocketKind::Passed`].
    pub rule: u32,
    /// Policy generation of the verdict, for [`SocketKind::Passed`].
    pub generation: u32,
    /// Port that goes with [`SocketValue::addr`], host byte order.
    pub port: u16,
    /// [`SocketKind`].
    pub kind: u8,
    /// [`crate::Reason`] of the verdict, for [`SocketKind::Passed`].
    pub reason: u8,
    /// 1 once the peer's FIN has arrived, which the kernel counts as a byte received.
    pub fin_received: u8,
    /// 1 once our FIN was acknowledged, which the kernel counts as a byte.
    pub fin_acked: u8,
    /// Zero.
    pub _pad: u16,
}
const _: () = assert!(size_of::<SocketValue>() == 48);

/// Value of `VETHS`, by the index of the device at the node's end of a pod's veth: whose frames come in there.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VethValue {
    /// Cookie of the pod's network namespace: a key of `PODS`.
    pub netns_cookie: u64,
    /// 1 if UDP other than DNS is refused.
    pub udp_refused: u8,
    /// Zero.
    pub _pad: [u8; 7],
}
const _: () = assert!(size_of::<VethValue>() == 16);

/// Key of `OLDER`: a socket that was open when its pod was brought in.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct OlderKey {
    /// Cookie of the pod's network namespace.
    pub netns_cookie: u64,
    /// Cookie of the socket; 0 says that the pod's are all noted.
    pub socket_cookie: u64,
}
const _: () = assert!(size_of::<OlderKey>() == 16);

/// Key of `UDP_REFUSALS`, counters of packets of UDP that were refused.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct UdpKey {
    /// Where they were to go.
    pub addr: Addr,
    /// Cookie of the pod's network namespace.
    pub netns_cookie: u64,
    /// Port that they were to go to, host byte order; 0 for parts of packets that were taken apart.
    pub port: u16,
    /// Zero.
    pub _pad: [u8; 6],
}
const _: () = assert!(size_of::<UdpKey>() == 32);

/// Key of `VERDICTS`, the counters.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct VerdictKey {
    /// The pod's network namespace.
    pub netns_cookie: u64,
    /// Rule that decided, 0 for none.
    pub rule: u32,
    /// [`crate::Direction`].
    pub direction: u8,
    /// [`crate::Answer`].
    pub answer: u8,
    /// [`crate::Reason`].
    pub reason: u8,
    /// Zero.
    pub _pad: u8,
}
const _: () = assert!(size_of::<VerdictKey>() == 16);

/// The one value of `HEARTBEAT`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HeartbeatValue {
    /// `CLOCK_MONOTONIC` of the agent's last sign of life, in nanoseconds; 0 while there has been none.
    pub at_ns: u64,
}

/// The one value of `SETTINGS`: facts about the node, written by the agent.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SettingsValue {
    /// Id of the kubelet's cgroup; 0 if there is none yet.
    pub kubelet_cgroup: u64,
    /// Cookie of the node's own network namespace.
    pub host_netns_cookie: u64,
    /// Depth of the kubelet's cgroup, as `bpf_get_current_ancestor_cgroup_id` counts: the root is 0. 0, where no kubelet is, if it
    /// is not known: then every level up to [`KUBELET_LEVELS`] is tried.
    pub kubelet_level: u32,
    /// 1: every socket of the node's own namespace counts as the kubelet's (the fall-back of [K.5]).
    pub probes_by_netns: u32,
}
const _: () = assert!(size_of::<SettingsValue>() == 24);

/// The deepest level at which a kubelet's cgroup is found whose depth is not known.
pub const KUBELET_LEVELS: i32 = 16;

/// Value of `GATE`, by the id of a pod's cgroup: what an agent knows of the pod.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GateValue {
    /// [`crate::gate::Class`].
    pub class: u8,
    /// Zero.
    pub _pad: [u8; 7],
}
const _: () = assert!(size_of::<GateValue>() == 8);

/// How many levels [`GateLevels`] has room for.
pub const GATE_LEVELS: usize = 16;

/// The one value of `GATE_LEVELS`: how deep the cgroups of pods lie.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GateLevels {
    /// As `bpf_get_current_ancestor_cgroup_id` counts; those that are tried first come first. 0, the root of the hierarchy,
    /// which is no pod's, ends them.
    pub levels: [u8; GATE_LEVELS],
}
const _: () = assert!(size_of::<GateLevels>() == GATE_LEVELS);

/// What an event tells.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum EventKind {
    /// A connection was refused in the kernel.
    Refused = 1,
    /// A connection that the kernel had passed has ended.
    Closed = 2,
    /// A connection was passed when it began and is refused now that it is established: policy changed in between, or
    /// the socket could not be accounted for. The agent must end it; this event wakes it.
    Overtaken = 3,
}

/// A record of the ring buffer `EVENTS`, sent without waking the agent.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Event {
    /// The client's address.
    pub src: Addr,
    /// The address that it asked for.
    pub dst: Addr,
    /// The enrolled pod's network namespace.
    pub netns_cookie: u64,
    /// `bpf_ktime_get_ns` of the record.
    pub at_ns: u64,
    /// When the connection was opened, for [`EventKind::Closed`].
    pub opened_ns: u64,
    /// Bytes client → server, for [`EventKind::Closed`].
    pub received_bytes: u64,
    /// Bytes server → client that were acknowledged, for [`EventKind::Closed`].
    pub sent_bytes: u64,
    /// Rule that decided, 0 for none.
    pub rule: u32,
    /// Policy generation that decided.
    pub generation: u32,
    /// Client's port, host byte order; 0 where it is not chosen yet.
    pub sport: u16,
    /// Server's port, host byte order.
    pub dport: u16,
    /// [`EventKind`].
    pub kind: u8,
    /// [`crate::Direction`].
    pub direction: u8,
    /// [`crate::Reason`].
    pub reason: u8,
    /// Zero.
    pub _pad: u8,
}
const _: () = assert!(size_of::<Event>() == 88);

#[cfg(feature = "user")]
mod pod {
    use super::*;

    macro_rules! plain {
        ($($name:ty),* $(,)?) => { $(
            // SAFETY: `repr(C)`, integers and byte arrays only, no implicit padding (sizes asserted above).
            unsafe impl aya::Pod for $name {}
        )* };
    }
    plain!(
        Addr,
        PodValue,
        PodAddrValue,
        ModeKey,
        ModeValue,
        SourceKey,
        ClassValue,
        PortKey,
        PortValue,
        AuthorizationKey,
        AuthorizationValue,
        Asked,
        ListenerKey,
        FlowKey,
        FlowValue,
        SocketValue,
        OlderKey,
        VethValue,
        UdpKey,
        VerdictKey,
        HeartbeatValue,
        SettingsValue,
        GateValue,
        GateLevels,
        Event,
    );
}
