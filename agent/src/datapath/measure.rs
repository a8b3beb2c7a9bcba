//! How full the maps are, what the programs have decided, and what the verifier said of them: for metrics.

use anyhow::Context as _;
use aya::maps::{HashMap as BpfHashMap, IterableMap as _, Map, MapData};
use culvert_common::{FlowKey, FlowValue};

use super::Datapath;

/// How full a map is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fill {
    /// As it is pinned.
    pub name: &'static str,
    /// Entries in it.
    pub entries: usize,
    /// Entries that fit.
    pub capacity: u32,
}

impl Datapath {
    /// The maps that can be full. Counting is a system call for each entry.
    ///
    /// # Errors
    /// A map could not be looked at.
    pub fn fill(&self) -> anyhow::Result<Vec<Fill>> {
        let flows = MapData::from_pin(self.dir.join("FLOWS")).context("open FLOWS")?;
        let flows: BpfHashMap<MapData, FlowKey, FlowValue> = Map::LruHashMap(flows).try_into().context("open FLOWS")?;
        let fill = |name, entries, map: &MapData| {
            let capacity = map.info().with_context(|| format!("look at {name}"))?.max_entries();
            anyhow::Ok(Fill { name, entries, capacity })
        };
        let [sources, ports, authorization] = self.tables.fill();
        Ok(vec![
            fill("PODS", self.pods.keys().count(), self.pods.map())?,
            fill("POD_ADDRS", self.addrs.keys().count(), self.addrs.map())?,
            fill("MODES", self.modes.keys().count(), self.modes.map())?,
            sources,
            ports,
            authorization,
            fill("LISTENERS", self.listeners.keys().count(), self.listeners.map())?,
            fill("FLOWS", flows.keys().count(), flows.map())?,
            fill("OLDER", self.older.entries(), self.older.map())?,
            fill("VETHS", self.veths.keys().count(), self.veths.map())?,
            fill("GATE", self.gate.classes(), self.gate.map())?,
            fill("VERDICTS", self.verdicts.keys().count(), self.verdicts.map())?,
        ])
    }

    /// Each program that is loaded, and how many instructions the verifier looked at before it admitted it; 0 where the kernel does not
    /// say (before Linux 5.16).
    pub fn programs(&self) -> Vec<(String, u32)> {
        // The kernel knows nothing of one that is not loaded.
        let loaded = |(name, program): (&str, &aya::programs::Program)| {
            let instructions = program.info().ok()?.verified_instruction_count().unwrap_or(0);
            Some((name.to_owned(), instructions))
        };
        let mut programs: Vec<_> = self.ebpf.programs().filter_map(loaded).collect();
        programs.sort_unstable();
        programs
    }
}
