//! The tables of AuthorizationPolicies in the kernel: `SOURCES`, `PORTS` and `AUTHORIZATION`.
//!
//! A table is written whole under a number of its own before any pod refers to it, never changed, and removed a while after
//! the last pod has ceased to. Pods with equal tables share one.

use std::{
    collections::{BTreeMap, HashMap},
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use aya::maps::{HashMap as BpfHashMap, IterableMap as _, LpmTrie, MapData, lpm_trie::Key};
use culvert_common::{
    Addr, AuthorizationKey, AuthorizationValue, ClassValue, PortClass, PortKey, PortValue, SourceKey,
};

use super::{NetnsCookie, buckets, in_buckets, measure::Fill};
use crate::policy::Table;

pub(super) struct Tables {
    sources: LpmTrie<MapData, SourceKey, ClassValue>,
    ports: BpfHashMap<MapData, PortKey, PortValue>,
    verdicts: BpfHashMap<MapData, AuthorizationKey, AuthorizationValue>,
    /// Entries that fit into each.
    capacity: Size,
    used: Size,
    by_content: HashMap<Arc<Table>, u32>,
    written: BTreeMap<u32, Written>,
    of_pod: BTreeMap<NetnsCookie, u32>,
    last: u32,
}

/// A table that is in the maps; the default is none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Put {
    /// As in `PodValue`.
    pub(super) number: u32,
    /// As in `PodValue`.
    pub(super) port_buckets: u16,
}

struct Written {
    table: Arc<Table>,
    port_buckets: u16,
    pods: usize,
    /// Since when no pod has referred to it.
    unused: Option<Instant>,
}

/// Entries of a table in each map.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Size {
    sources: usize,
    ports: usize,
    verdicts: usize,
}

impl Size {
    fn of(table: &Table, port_buckets: u16) -> Self {
        let verdicts = table.decisions.iter().map(Vec::len).sum();
        Self { sources: table.sources.len(), ports: port_buckets.into(), verdicts }
    }
}

impl Tables {
    /// With maps in which there is nothing yet.
    pub(super) fn new(
        sources: LpmTrie<MapData, SourceKey, ClassValue>,
        ports: BpfHashMap<MapData, PortKey, PortValue>,
        verdicts: BpfHashMap<MapData, AuthorizationKey, AuthorizationValue>,
    ) -> anyhow::Result<Self> {
        let entries = |map: &MapData| anyhow::Ok(map.info().context("look at a map")?.max_entries() as usize);
        let capacity =
            Size { sources: entries(sources.map())?, ports: entries(ports.map())?, verdicts: entries(verdicts.map())? };
        Ok(Self {
            sources,
            ports,
            verdicts,
            capacity,
            used: Size::default(),
            by_content: HashMap::new(),
            written: BTreeMap::new(),
            of_pod: BTreeMap::new(),
            last: 0,
        })
    }

    /// A table that is in the maps from now on; without a pod that refers to it, for a while only.
    ///
    /// # Errors
    /// It does not fit; nothing of it is in the maps.
    pub(super) fn put(&mut self, table: &Arc<Table>) -> anyhow::Result<Put> {
        if let Some(&number) = self.by_content.get(table) {
            let written = self.written.get_mut(&number).context("a table that is known was not written")?;
            if written.pods == 0 {
                written.unused = Some(Instant::now());
            }
            return Ok(Put { number, port_buckets: written.port_buckets });
        }
        let port_buckets = buckets(&named_ports(table).map(|(port, _)| port).collect::<Vec<_>>())?;
        let size = Size::of(table, port_buckets);
        for (map, of, need, used, capacity) in [
            ("SOURCES", "address blocks", size.sources, self.used.sources, self.capacity.sources),
            ("PORTS", "buckets of ports", size.ports, self.used.ports, self.capacity.ports),
            ("AUTHORIZATION", "verdicts", size.verdicts, self.used.verdicts, self.capacity.verdicts),
        ] {
            ensure!(
                used + need <= capacity,
                "{map} holds {capacity} {of}: {used} are there, and {need} more are needed"
            );
        }
        let number = self.free_number();
        if let Err(error) = self.write(number, table, port_buckets) {
            self.erase(number, table, port_buckets);
            return Err(error);
        }
        self.last = number;
        self.account(size, usize::saturating_add);
        self.by_content.insert(table.clone(), number);
        let written = Written { table: table.clone(), port_buckets, pods: 0, unused: Some(Instant::now()) };
        self.written.insert(number, written);
        Ok(Put { number, port_buckets })
    }

    /// The pod refers to this table from now on, and to no other; 0 for none.
    pub(super) fn switch(&mut self, cookie: NetnsCookie, number: u32) {
        let before = if number == 0 { self.of_pod.remove(&cookie) } else { self.of_pod.insert(cookie, number) };
        if let Some(written) = self.written.get_mut(&number) {
            written.pods += 1;
            written.unused = None;
        }
        if let Some(written) = before.and_then(|number| self.written.get_mut(&number)) {
            written.pods -= 1;
            if written.pods == 0 {
                written.unused = Some(Instant::now());
            }
        }
    }

    /// Removes what no pod has referred to for `grace`; whether there was any.
    pub(super) fn retire(&mut self, grace: Duration) -> bool {
        let due = |written: &Written| written.unused.is_some_and(|since| since.elapsed() >= grace);
        let numbers: Vec<u32> =
            self.written.iter().filter(|(_, written)| due(written)).map(|(number, _)| *number).collect();
        for number in &numbers {
            let Some(written) = self.written.remove(number) else { continue };
            self.by_content.remove(&written.table);
            self.erase(*number, &written.table, written.port_buckets);
            self.account(Size::of(&written.table, written.port_buckets), usize::saturating_sub);
        }
        !numbers.is_empty()
    }

    /// How full the three maps are.
    pub(super) fn fill(&self) -> [Fill; 3] {
        let fill = |name, entries, capacity: usize| Fill {
            name,
            entries,
            capacity: u32::try_from(capacity).unwrap_or(u32::MAX),
        };
        [
            fill("SOURCES", self.used.sources, self.capacity.sources),
            fill("PORTS", self.used.ports, self.capacity.ports),
            fill("AUTHORIZATION", self.used.verdicts, self.capacity.verdicts),
        ]
    }

    fn account(&mut self, size: Size, change: fn(usize, usize) -> usize) {
        let used = &mut self.used;
        *used = Size {
            sources: change(used.sources, size.sources),
            ports: change(used.ports, size.ports),
            verdicts: change(used.verdicts, size.verdicts),
        };
    }

    /// Numbers come again after 2^32 tables; 0 is none.
    fn free_number(&self) -> u32 {
        let mut number = self.last;
        loop {
            number = number.wrapping_add(1);
            if number != 0 && !self.written.contains_key(&number) {
                return number;
            }
        }
    }

    fn write(&mut self, number: u32, table: &Table, port_buckets: u16) -> anyhow::Result<()> {
        for (block, class) in &table.sources {
            let key = source_key(number, *block);
            self.sources.insert(&key, ClassValue { class: *class }, 0).context("write SOURCES")?;
        }
        // Port 0 is every port that is not named, and sorted before the others.
        let others = match table.ports.first() {
            Some((0, class)) => *class,
            _ => bail!("a table without a class for ports that are not named"),
        };
        let free = PortClass { class: others, ..PortClass::default() };
        let named = named_ports(table).map(|(port, class)| PortClass { class, port, _pad: 0 });
        for (bucket, ports) in (0..).zip(in_buckets(named, |named| named.port, port_buckets, free)) {
            let key = PortKey { table: number, bucket, _pad: 0 };
            self.ports.insert(key, PortValue { others, ports }, 0).context("write PORTS")?;
        }
        for (key, decision) in decisions(number, table) {
            let value = AuthorizationValue { rule: decision.rule.0, reason: decision.reason as u8, _pad: [0; 3] };
            self.verdicts.insert(key, value, 0).context("write AUTHORIZATION")?;
        }
        Ok(())
    }

    /// Nobody refers to it, so what could not be removed is never looked up; most often it is not there.
    fn erase(&mut self, number: u32, table: &Table, port_buckets: u16) {
        for (block, _) in &table.sources {
            let _ = self.sources.remove(&source_key(number, *block));
        }
        for bucket in 0..port_buckets {
            let _ = self.ports.remove(&PortKey { table: number, bucket, _pad: 0 });
        }
        for (key, _) in decisions(number, table) {
            let _ = self.verdicts.remove(&key);
        }
    }
}

fn source_key(table: u32, (base, length): (IpAddr, u8)) -> Key<SourceKey> {
    // IPv4 lies mapped in IPv6. A block of IPv6 addresses that is larger than what is mapped has none of them: the block of
    // all IPv4 addresses, which every table has, is the smaller one.
    let mapped = if base.is_ipv4() { 96 } else { 0 };
    let data = SourceKey { table, addr: Addr::from(base).bytes };
    Key::new(SourceKey::TABLE_BITS + mapped + u32::from(length), data)
}

/// Ports that policies name, with their classes.
fn named_ports(table: &Table) -> impl Iterator<Item = (u16, u32)> {
    table.ports.iter().copied().filter(|(port, _)| *port != 0)
}

fn decisions(number: u32, table: &Table) -> impl Iterator<Item = (AuthorizationKey, crate::policy::Decision)> {
    table.decisions.iter().zip(0..).flat_map(move |(row, source_class)| {
        row.iter().zip(0..).map(move |(decision, port_class)| {
            (AuthorizationKey { table: number, source_class, port_class }, *decision)
        })
    })
}
