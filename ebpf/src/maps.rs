//! Every map: its key, its value, who writes it, who reads it, and why that capacity.

use aya_ebpf::{
    bindings::BPF_F_NO_PREALLOC,
    btf_maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuHashMap, RingBuf, SkStorage, SockHash},
    macros::btf_map,
};
use culvert_common::{
    AuthorizationKey, AuthorizationValue, ClassValue, Event, FlowKey, FlowValue, GateLevels, GateValue, HeartbeatValue,
    ListenerKey, ModeKey, ModeValue, OlderKey, PodAddrValue, PodValue, PortKey, PortValue, SettingsValue, SocketValue,
    SourceKey, UdpKey, VerdictKey, VethValue, addr::Addr,
};

/// Allocates entries as they come: the kernel's memory follows what is used, and adding one can fail.
const ON_DEMAND: usize = BPF_F_NO_PREALLOC as usize;

/// Enrolled pods by netns cookie. The agent writes; every program reads. Many times the pods that a kubelet can run, and
/// allocated beforehand: a pod without an entry would not be captured, so this map must never be full.
#[btf_map]
pub(crate) static PODS: HashMap<u64, PodValue, 16384> = HashMap::new();

/// Addresses of enrolled pods. The agent writes; `inbound` and `connect` read. An address that does not fit is refused.
#[btf_map]
pub(crate) static POD_ADDRS: HashMap<Addr, PodAddrValue, 65536, ON_DEMAND> = HashMap::new();

/// Ports whose PeerAuthentication mode differs from their pod's, in buckets all of which are there, in two generations at most
/// while one replaces the other. The agent writes; `inbound` and `handshake` read. If a pod's do not fit, the agent gives its
/// verdicts.
#[btf_map]
pub(crate) static MODES: HashMap<ModeKey, ModeValue, 65536, ON_DEMAND> = HashMap::new();

/// Client addresses of tables of AuthorizationPolicies: the class of the longest block that has an address. The agent writes;
/// `inbound` and `handshake` read. 1000 blocks for each of 250 pods whose policies all differ, or 64 of the largest tables
/// that the agent makes; pods with the same policies share one. If a pod's does not fit, the agent gives its verdicts.
#[btf_map]
pub(crate) static SOURCES: LpmTrie<SourceKey, ClassValue, 262144, ON_DEMAND> = LpmTrie::new();

/// Ports of those tables, in buckets all of which are there, likewise: for each of 250 pods 250 ports in a row, or 120 that lie
/// scattered, which take more buckets.
#[btf_map]
pub(crate) static PORTS: HashMap<PortKey, PortValue, 65536, ON_DEMAND> = HashMap::new();

/// Verdicts of those tables, by the classes of address and port, likewise: 250 for each of 250 pods, or 16 of the largest.
#[btf_map]
pub(crate) static AUTHORIZATION: HashMap<AuthorizationKey, AuthorizationValue, 65536, ON_DEMAND> = HashMap::new();

/// The agent's listening sockets. The agent writes, the kernel removes a socket that is closed; `inbound` reads. Three
/// kinds for each worker of each pod.
#[btf_map]
pub(crate) static LISTENERS: SockHash<ListenerKey, 65536> = SockHash::new();

/// Connections in their handshake. `handshake` writes and removes, `inbound` reads, the agent reads back its own legs.
/// Entries live for microseconds; the bound is on bursts, and one that is pushed out ends in a refusal.
#[btf_map]
pub(crate) static FLOWS: LruHashMap<FlowKey, FlowValue, 65536> = LruHashMap::new();

/// What is known of a socket, freed with it. The agent and `connect`, `handshake` write; all programs read.
#[btf_map]
pub(crate) static SOCKETS: SkStorage<SocketValue> = SkStorage::new();

/// Sockets that were open when their pod was brought in, which nobody captured; the value is 1. Agents write and read, each
/// after the one before it: which sockets are older than the mesh is not to be found out later. One that does not fit is told
/// as a connection that the mesh has not made.
#[btf_map]
pub(crate) static OLDER: HashMap<OlderKey, u32, 65536, ON_DEMAND> = HashMap::new();

/// The node's ends of enrolled pods' veths, by index of the device. The agent writes; `leaving` reads. As many as pods, and
/// some with several; a device whose entry is missing lets nothing through.
#[btf_map]
pub(crate) static VETHS: HashMap<u32, VethValue, 32768, ON_DEMAND> = HashMap::new();

/// Pods whose UDP is refused, by netns cookie, and 0 for those that the gate holds; the value is 1. The agent writes; `connect`,
/// `udp` and `gate` read. One that does not fit is not enrolled.
#[btf_map]
pub(crate) static UDP_PODS: HashMap<u64, u32, 16385, ON_DEMAND> = HashMap::new();

/// Packets of UDP that were refused, by pod and destination. `leaving` and `udp` write; the agent and `bpftool` read. When it is full
/// the destination that was asked for least recently is forgotten; `VERDICTS` still has the sum.
#[btf_map]
pub(crate) static UDP_REFUSALS: LruHashMap<UdpKey, u64, 8192> = LruHashMap::new();

/// Verdicts counted per pod, rule and reason. All programs write; the agent and `bpftool` read.
#[btf_map]
pub(crate) static VERDICTS: PerCpuHashMap<VerdictKey, u64, 16384> = PerCpuHashMap::new();

/// The agent's sign of life.
#[btf_map]
pub(crate) static HEARTBEAT: Array<HeartbeatValue, 1> = Array::new();

/// Facts about the node. The agent writes.
#[btf_map]
pub(crate) static SETTINGS: Array<SettingsValue, 1> = Array::new();

/// What the agent knows of pods, by the id of their cgroups, which is not used again. The agent writes; `gate4`, `gate6` and
/// `gate_in` read. Twice the pods of `PODS`, since pods outside the mesh are here too; one that does not fit stays refused.
#[btf_map]
pub(crate) static GATE: HashMap<u64, GateValue, 32768, ON_DEMAND> = HashMap::new();

/// How deep the cgroups of pods lie. The agent writes.
#[btf_map]
pub(crate) static GATE_LEVELS: Array<GateLevels, 1> = Array::new();

/// The node's own addresses; the value is 1. The agent writes; `gate_in` reads. Some for each device of the node.
#[btf_map]
pub(crate) static NODE_ADDRS: HashMap<Addr, u32, 16384, ON_DEMAND> = HashMap::new();

/// Refusals and ends of connections that no process of the agent saw; bytes. When it is full the event is lost and the
/// counter in `VERDICTS` still stands.
#[btf_map]
pub(crate) static EVENTS: RingBuf<Event, 524_288> = RingBuf::new();
