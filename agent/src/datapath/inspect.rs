//! A look at the maps of a running agent, through their pins: nothing here changes anything, and the agent's own handles
//! are not needed.

use std::{collections::BTreeMap, path::Path};

use anyhow::Context as _;
use aya::maps::{Array, HashMap as BpfHashMap, LpmTrie, Map, MapData, MapInfo, MapType, PerCpuHashMap, SockHash};
use culvert_common::{
    Addr, AuthorizationKey, AuthorizationValue, ClassValue, FlowKey, FlowValue, GateValue, HeartbeatValue, ListenerKey,
    ModeKey, ModeValue, OlderKey, PodAddrValue, PodValue, PortKey, PortValue, SettingsValue, SourceKey, UdpKey,
    VerdictKey, VethValue,
};

use super::MAPS;

/// What the maps hold at one moment.
#[derive(Clone, Debug, Default)]
pub struct Content {
    /// Every map, in the order of their declaration.
    pub maps: Vec<Fill>,
    /// `PODS`, by netns cookie.
    pub pods: BTreeMap<u64, PodValue>,
    /// `POD_ADDRS`.
    pub addrs: BTreeMap<Addr, PodAddrValue>,
    /// `MODES`.
    pub modes: BTreeMap<ModeKey, ModeValue>,
    /// Entries of `SOURCES`.
    pub sources: usize,
    /// `PORTS`: classes.
    pub ports: BTreeMap<PortKey, PortValue>,
    /// `AUTHORIZATION`.
    pub authorization: BTreeMap<AuthorizationKey, AuthorizationValue>,
    /// Sockets in `LISTENERS` by netns cookie.
    pub listeners: BTreeMap<u64, usize>,
    /// `VETHS`, by index of the device.
    pub veths: BTreeMap<u32, VethValue>,
    /// `UDP_PODS`, by netns cookie.
    pub udp_pods: BTreeMap<u64, u32>,
    /// `UDP_REFUSALS`: packets.
    pub udp_refusals: BTreeMap<UdpKey, u64>,
    /// `VERDICTS`, summed over the CPUs.
    pub verdicts: BTreeMap<VerdictKey, u64>,
    /// `GATE`, by the id of the pod's cgroup.
    pub gate: BTreeMap<u64, GateValue>,
    /// `NODE_ADDRS`.
    pub node_addrs: BTreeMap<Addr, u32>,
    /// `HEARTBEAT`.
    pub heartbeat: HeartbeatValue,
    /// `SETTINGS`.
    pub settings: SettingsValue,
}

/// How full a map is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fill {
    /// As it is pinned.
    pub name: &'static str,
    /// Number that `bpftool` knows it by.
    pub id: u32,
    /// Entries in it; `None` where they cannot be counted: socket storage and the ring buffer.
    pub entries: Option<usize>,
    /// Entries that fit; bytes for the ring buffer; 0 where only memory is the limit.
    pub capacity: u32,
}

/// Reads the maps that are pinned in `dir`.
///
/// # Errors
/// A map is not there, or has another layout.
pub fn read(dir: &Path) -> anyhow::Result<Content> {
    let mut content = Content {
        pods: hash::<u64, PodValue>(dir, "PODS")?,
        addrs: hash(dir, "POD_ADDRS")?,
        modes: hash(dir, "MODES")?,
        ports: hash(dir, "PORTS")?,
        authorization: hash(dir, "AUTHORIZATION")?,
        veths: hash(dir, "VETHS")?,
        udp_pods: hash(dir, "UDP_PODS")?,
        gate: hash(dir, "GATE")?,
        node_addrs: hash(dir, "NODE_ADDRS")?,
        ..Content::default()
    };
    let sources: LpmTrie<MapData, SourceKey, ClassValue> = Map::LpmTrie(open(dir, "SOURCES")?).try_into()?;
    content.sources = sources.keys().filter_map(Result::ok).count();
    let listeners: SockHash<MapData, ListenerKey> = Map::SockHash(open(dir, "LISTENERS")?).try_into()?;
    for key in listeners.keys().filter_map(Result::ok) {
        *content.listeners.entry(key.netns_cookie).or_default() += 1;
    }
    let flows: BpfHashMap<MapData, FlowKey, FlowValue> = Map::LruHashMap(open(dir, "FLOWS")?).try_into()?;
    let flows = flows.keys().filter_map(Result::ok).count();
    let older = hash::<OlderKey, u32>(dir, "OLDER")?.len();
    let udp: BpfHashMap<MapData, UdpKey, u64> = Map::LruHashMap(open(dir, "UDP_REFUSALS")?).try_into()?;
    content.udp_refusals = udp.iter().filter_map(Result::ok).collect();
    let verdicts: PerCpuHashMap<MapData, VerdictKey, u64> = Map::PerCpuHashMap(open(dir, "VERDICTS")?).try_into()?;
    content.verdicts = verdicts.iter().filter_map(Result::ok).map(|(key, of)| (key, of.iter().sum())).collect();
    content.heartbeat.at_ns = heartbeat(dir)?;
    let settings: Array<MapData, SettingsValue> = Map::Array(open(dir, "SETTINGS")?).try_into()?;
    content.settings = settings.get(&0, 0).context("read SETTINGS")?;
    for name in MAPS {
        let info = MapInfo::from_pin(dir.join(name)).with_context(|| format!("look at {name}"))?;
        let entries = match name {
            "PODS" => Some(content.pods.len()),
            "POD_ADDRS" => Some(content.addrs.len()),
            "MODES" => Some(content.modes.len()),
            "SOURCES" => Some(content.sources),
            "PORTS" => Some(content.ports.len()),
            "AUTHORIZATION" => Some(content.authorization.len()),
            "LISTENERS" => Some(content.listeners.values().sum()),
            "FLOWS" => Some(flows),
            "OLDER" => Some(older),
            "VETHS" => Some(content.veths.len()),
            "UDP_PODS" => Some(content.udp_pods.len()),
            "UDP_REFUSALS" => Some(content.udp_refusals.len()),
            "VERDICTS" => Some(content.verdicts.len()),
            "GATE" => Some(content.gate.len()),
            "NODE_ADDRS" => Some(content.node_addrs.len()),
            "HEARTBEAT" | "SETTINGS" | "GATE_LEVELS" => Some(1),
            _ => None,
        };
        let capacity = match info.map_type() {
            Ok(MapType::SkStorage) => 0,
            _ => info.max_entries(),
        };
        content.maps.push(Fill { name, id: info.id(), entries, capacity });
    }
    Ok(content)
}

/// `CLOCK_MONOTONIC` of the agent's last sign of life, in nanoseconds; 0 while there has been none.
///
/// # Errors
/// As for [`read`].
pub fn heartbeat(dir: &Path) -> anyhow::Result<u64> {
    let heartbeat: Array<MapData, HeartbeatValue> = Map::Array(open(dir, "HEARTBEAT")?).try_into()?;
    Ok(heartbeat.get(&0, 0).context("read HEARTBEAT")?.at_ns)
}

fn hash<K: aya::Pod + Ord, V: aya::Pod>(dir: &Path, name: &str) -> anyhow::Result<BTreeMap<K, V>> {
    let map: BpfHashMap<MapData, K, V> =
        Map::HashMap(open(dir, name)?).try_into().with_context(|| format!("map {name} has another layout"))?;
    Ok(map.iter().filter_map(Result::ok).collect())
}

fn open(dir: &Path, name: &str) -> anyhow::Result<MapData> {
    MapData::from_pin(dir.join(name)).with_context(|| format!("open {}", dir.join(name).display()))
}
