//! The gate's programs at the pods' common cgroups, and its maps: what is known of which pod, and what the node's own
//! addresses are.
//!
//! The links stay pinned when the agent ends, and go on holding pods that it has not classified.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io,
    net::IpAddr,
    os::{fd::AsFd as _, unix::fs::MetadataExt as _},
    path::{Path, PathBuf},
};

use anyhow::Context as _;
use aya::{
    Ebpf,
    maps::{Array, HashMap as BpfHashMap, IterableMap as _, Map, MapData},
};
use culvert_common::{Addr, GATE_LEVELS, GateLevels, GateValue, gate::Class};

use super::{
    Datapath, attach, ignore_absent, ignore_missing, owner,
    owner::Part,
    program_fd,
    sys::{self, AttachType, Target},
    typed,
};
use crate::pods::{CgroupDir, CgroupId};

/// The name of a program is the beginning of its link's; `_` and the id of the cgroup follow. Who is connected to is looked
/// at first: an agent that ends in between leaves a pod that is not reached, rather than one that nobody calls.
pub(super) const PROGRAMS: [(&str, AttachType); 5] = [
    ("gate_in", AttachType::SkbIngress),
    ("gate4", AttachType::Connect4),
    ("gate6", AttachType::Connect6),
    ("gate_send4", AttachType::UdpSendmsg4),
    ("gate_send6", AttachType::UdpSendmsg6),
];

/// The maps' writing side, and what they hold.
pub(super) struct Gate {
    gate: BpfHashMap<MapData, u64, GateValue>,
    levels: Array<MapData, GateLevels>,
    node_addrs: BpfHashMap<MapData, Addr, u32>,
    /// Of the agent before this one, until this one serves.
    before: Option<BpfHashMap<MapData, u64, GateValue>>,
    /// Where the gate is to be; `None` if it is to be open.
    roots: Option<Vec<CgroupDir>>,
    classes: BTreeMap<CgroupId, Class>,
    addresses: BTreeSet<IpAddr>,
}

/// A pinned link of the gate's.
struct Pin {
    path: PathBuf,
    program: &'static str,
    cgroup: u64,
}

impl Gate {
    /// `before`: where the map of the agent before this one is pinned, if there was one.
    pub(super) fn new(ebpf: &mut Ebpf, before: &Path) -> anyhow::Result<Self> {
        let mut all: Array<MapData, GateLevels> = typed(ebpf, "GATE_LEVELS")?;
        all.set(0, levels(&[]), 0).context("write GATE_LEVELS")?;
        Ok(Self {
            gate: typed(ebpf, "GATE")?,
            levels: all,
            node_addrs: typed(ebpf, "NODE_ADDRS")?,
            // One that is not there, or of another layout, has nothing to say.
            before: MapData::from_pin(before).ok().and_then(|map| Map::HashMap(map).try_into().ok()),
            roots: Some(Vec::new()),
            classes: BTreeMap::new(),
            addresses: BTreeSet::new(),
        })
    }

    pub(super) fn classes(&self) -> usize {
        self.classes.len()
    }

    /// From now on only what this agent knows counts.
    pub(super) fn serves(&mut self) {
        self.before = None;
    }

    pub(super) fn map(&self) -> &MapData {
        self.gate.map()
    }
}

impl Datapath {
    /// Says where the gate is to be: at the common parents of pods; `None` opens it, and takes it away where an earlier
    /// agent had it. What is not classified by then is held from the moment that this agent serves.
    ///
    /// # Errors
    /// A failed attachment; to be tried again.
    pub fn gate(&mut self, roots: Option<&[CgroupDir]>) -> anyhow::Result<()> {
        let roots = roots.map(<[CgroupDir]>::to_vec);
        if self.gate.roots == roots {
            return Ok(());
        }
        if let Some(roots) = &roots {
            self.gate.levels.set(0, levels(roots), 0).context("write GATE_LEVELS")?;
        }
        let before = std::mem::replace(&mut self.gate.roots, roots);
        if self.owner.part() == Part::Serving
            && let Err(error) = self.attach_gate()
        {
            self.gate.roots = before;
            return Err(error);
        }
        Ok(())
    }

    /// Makes what the gate knows of pods equal to `classes`; pods that are not in it are held.
    ///
    /// # Errors
    /// The first entry that could not be written; the others are, and that pod stays held.
    pub fn classify(&mut self, classes: &BTreeMap<CgroupId, Class>) -> anyhow::Result<()> {
        let gone: Vec<CgroupId> = self.gate.classes.keys().filter(|id| !classes.contains_key(id)).copied().collect();
        let mut result = Ok(());
        for id in gone {
            match ignore_missing(self.gate.gate.remove(&id.0)).context("remove from GATE") {
                Ok(()) => drop(self.gate.classes.remove(&id)),
                Err(error) => result = result.and(Err(error)),
            }
        }
        for (id, class) in classes {
            result = result.and(self.classify_one(*id, *class));
        }
        result
    }

    /// Says what one pod is, and leaves the others as they are.
    ///
    /// # Errors
    /// The entry could not be written: the pod stays what it was.
    pub fn classify_one(&mut self, id: CgroupId, class: Class) -> anyhow::Result<()> {
        if self.gate.classes.get(&id) != Some(&class) {
            let value = GateValue { class: class as u8, _pad: [0; 7] };
            self.gate.gate.insert(id.0, value, 0).context("write GATE (the map holds 32768 pods)")?;
            self.gate.classes.insert(id, class);
        }
        Ok(())
    }

    /// What the gate knows of a pod; until this agent serves, what the one before it knew will do.
    pub fn class(&self, id: CgroupId) -> Class {
        let before = || Some(Class::from_u8(self.gate.before.as_ref()?.get(&id.0, 0).ok()?.class));
        self.gate.classes.get(&id).copied().or_else(before).unwrap_or(Class::Unknown)
    }

    /// Says what the node's own addresses are: whoever listens there is no pod with a network of its own.
    ///
    /// # Errors
    /// The first entry that could not be written or removed; the others are.
    pub fn node_addresses(&mut self, addresses: &BTreeSet<IpAddr>) -> anyhow::Result<()> {
        let mut result = Ok(());
        for gone in self.gate.addresses.clone().difference(addresses) {
            match ignore_missing(self.gate.node_addrs.remove(&Addr::from(*gone))).context("remove from NODE_ADDRS") {
                Ok(()) => drop(self.gate.addresses.remove(gone)),
                Err(error) => result = result.and(Err(error)),
            }
        }
        for new in addresses.difference(&self.gate.addresses.clone()) {
            match self.gate.node_addrs.insert(Addr::from(*new), 1, 0) {
                Ok(()) => drop(self.gate.addresses.insert(*new)),
                Err(error) => {
                    result = result.and(Err(error).context("write NODE_ADDRS (the map holds 16384 addresses)"));
                }
            }
        }
        result
    }

    /// Gives the gate this agent's programs, wherever it is to be or an earlier agent had it; takes it away if it is open.
    pub(super) fn attach_gate(&self) -> anyhow::Result<()> {
        let links = owner::links(&self.config.pin_dir);
        let Some(roots) = &self.gate.roots else {
            return self.gate_pins()?.iter().try_for_each(detach);
        };
        for root in roots {
            let Some(cgroup) = open(root)? else { continue };
            for (program, kind) in PROGRAMS {
                let path = links.join(format!("{program}_{}", root.id.0));
                attach(&path, program_fd(&self.ebpf, program)?, cgroup.as_fd(), kind, |target| {
                    target == Target::Cgroup(root.id.0)
                })
                .with_context(|| format!("attach {program} to {}", root.path.display()))?;
            }
        }
        for pin in self.gate_pins()?.iter().filter(|pin| !roots.iter().any(|root| root.id.0 == pin.cgroup)) {
            let link = sys::open_pinned(&pin.path).with_context(|| format!("open {}", pin.path.display()))?;
            match sys::link_info(link.as_fd()).with_context(|| format!("look at {}", pin.path.display()))?.0 {
                // Not found by this agent, and there: what is below it is held.
                Target::Cgroup(id) if id != 0 => {
                    sys::link_update(link.as_fd(), program_fd(&self.ebpf, pin.program)?)
                        .with_context(|| format!("replace the program of {}", pin.path.display()))?
                }
                _ => ignore_absent(fs::remove_file(&pin.path))
                    .with_context(|| format!("unpin {}", pin.path.display()))?,
            }
        }
        Ok(())
    }

    /// How many of the gate's links have not this agent's program, or are not there, or are where there is to be none.
    pub(super) fn foreign_gates(&self) -> usize {
        let links = owner::links(&self.config.pin_dir);
        let Some(roots) = &self.gate.roots else { return self.gate_pins().map_or(0, |pins| pins.len()) };
        let ours = |program: &str, root: &CgroupDir| {
            let id = self.ebpf.program(program).and_then(|program| program.info().ok()).map(|info| info.id());
            let link = sys::open_pinned(&links.join(format!("{program}_{}", root.id.0)));
            link.and_then(|link| sys::link_info(link.as_fd())).is_ok_and(|(_, program)| Some(program) == id)
        };
        let wanted = roots.iter().flat_map(|root| PROGRAMS.map(|(program, _)| (program, root)));
        wanted.filter(|(program, root)| !ours(program, root) && matches!(open(root), Ok(Some(_)))).count()
    }

    fn gate_pins(&self) -> anyhow::Result<Vec<Pin>> {
        let links = owner::links(&self.config.pin_dir);
        let mut pins = Vec::new();
        for entry in fs::read_dir(&links).with_context(|| format!("list {}", links.display()))? {
            let path = entry.context("list pinned links")?.path();
            let of = |program: &'static str| {
                let cgroup = path.file_name()?.to_str()?.strip_prefix(program)?.strip_prefix('_')?.parse().ok()?;
                Some(Pin { path: path.clone(), program, cgroup })
            };
            pins.extend(PROGRAMS.iter().find_map(|(program, _)| of(program)));
        }
        Ok(pins)
    }
}

/// Opens a cgroup; `None` if it is gone.
fn open(root: &CgroupDir) -> anyhow::Result<Option<File>> {
    let opened = File::open(&root.path).and_then(|file| Ok((file.metadata()?.ino(), file)));
    match opened {
        Ok((id, file)) => Ok((id == root.id.0).then_some(file)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("open cgroup {}", root.path.display())),
    }
}

/// Where pods lie: below a root, or below one of its classes, which most are. Where a cgroup namespace hides how deep that
/// is, or no root was found, every level is tried: an id says which cgroup it is wherever it is found.
fn levels(roots: &[CgroupDir]) -> GateLevels {
    let anywhere = CgroupDir { path: PathBuf::new(), id: CgroupId(0), level: None };
    let roots = if roots.is_empty() { std::slice::from_ref(&anywhere) } else { roots };
    let of = |root: &CgroupDir| match root.level {
        Some(level) => vec![level + 2, level + 1],
        None => (1..=GATE_LEVELS as u32).collect(),
    };
    let mut value = GateLevels::default();
    let mut used = 0;
    for level in roots.iter().flat_map(of) {
        // No kernel has cgroups 255 deep by default, and no kubelet makes them.
        let level = u8::try_from(level).unwrap_or(u8::MAX);
        if used < GATE_LEVELS && !value.levels[..used].contains(&level) {
            value.levels[used] = level;
            used += 1;
        }
    }
    value
}

fn detach(pin: &Pin) -> anyhow::Result<()> {
    let detached = sys::open_pinned(&pin.path).and_then(|link| sys::link_detach(link.as_fd()));
    match detached {
        // The cgroup has gone, and the link with it.
        Err(error) if error.raw_os_error() == Some(libc::ENOLINK) => Ok(()),
        other => ignore_absent(other).with_context(|| format!("detach {}", pin.program)),
    }
    .and(ignore_absent(fs::remove_file(&pin.path)).with_context(|| format!("unpin {}", pin.program)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn root(level: Option<u32>) -> CgroupDir {
        CgroupDir { path: "/c".into(), id: CgroupId(1), level }
    }

    #[test]
    fn pods_are_looked_for_where_a_kubelet_puts_them() {
        let of = |roots: &[CgroupDir]| levels(roots).levels.to_vec();
        assert_eq!(of(&[root(Some(1))])[..3], [3, 2, 0]);
        assert_eq!(of(&[root(Some(1)), root(Some(2))])[..4], [3, 2, 4, 0]);
        for unknown in [&[][..], &[root(None)]] {
            assert_eq!(of(unknown), (1..=16).collect::<Vec<u8>>());
        }
        assert_eq!(of(&[root(Some(2)), root(None)]).iter().filter(|level| **level == 4).count(), 1);
    }
}
