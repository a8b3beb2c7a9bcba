//! Loads the kernel programs, attaches them, and makes the maps equal to what is wanted; the only place that imports aya.
//!
//! Everything is pinned: links under `<pin dir>/links`, maps by name under `<pin dir>/v<layout version>`. An agent that
//! starts fills maps of its own, and then replaces the program of each link in place ([`Datapath::take_over`]), so that
//! there is no instant without programs, and none in which two agents write what one of them reads; who follows whom is
//! told in `owner`, how all of it is taken away again in `clean`. What the maps mean is said in `culvert_common`; who is enrolled is decided elsewhere.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io,
    net::{IpAddr, SocketAddr},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::fs::MetadataExt,
    },
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, anyhow};
use aya::{
    Ebpf, EbpfLoader,
    maps::{Array, HashMap as BpfHashMap, Map, MapData, MapError, PerCpuHashMap, RingBuf, SkStorage, SockHash},
    programs::{CgroupSkb, CgroupSockAddr, SchedClassifier, SkLookup, SockOps},
};
use aya_log::EbpfLogger;
use culvert_common::{
    Addr, BUCKET_PORTS, Event, FlowKey, FlowValue, HeartbeatValue, LAYOUT_VERSION, ListenerKey, ListenerKind, Mode,
    ModeKey, ModeValue, PodAddrValue, PodState, PodValue, PortMode, SILENT_AFTER_NS, SettingsValue, SocketKind,
    SocketValue, VerdictKey, VethValue, bucket,
};
use tracing::warn;

pub mod bpffs;
mod clean;
mod gate;
pub mod inspect;
mod judge;
pub mod measure;
mod older;
mod owner;
pub mod probe;
mod sys;
mod tables;
mod veth;

use crate::policy::{Snapshot, Table, TooLarge, Workload};
pub use clean::clean;
pub use judge::Arrival;
pub use older::Older;
pub use owner::Turn;
use owner::{Ownership, Part};
use sys::{AttachType, Target};
use tables::Tables;

static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/culvert"));

/// The maps, by the names that they have in the object, in the pin directory and in `bpftool`.
const MAPS: [&str; 20] = [
    "PODS",
    "POD_ADDRS",
    "MODES",
    "SOURCES",
    "PORTS",
    "AUTHORIZATION",
    "LISTENERS",
    "FLOWS",
    "SOCKETS",
    "OLDER",
    "VETHS",
    "UDP_PODS",
    "UDP_REFUSALS",
    "VERDICTS",
    "HEARTBEAT",
    "SETTINGS",
    "GATE",
    "GATE_LEVELS",
    "NODE_ADDRS",
    "EVENTS",
];

/// The maps that belong to connections and not to an agent: whoever serves, they are the same. All others are made anew by
/// each agent.
const SHARED: [&str; 3] = ["FLOWS", "SOCKETS", "OLDER"];

/// Directory of the maps of an agent that does not serve yet.
const NEXT: &str = "next";
/// Start of the name of a pod's link; its namespace's cookie follows.
const POD_LINK: &str = "inbound_";

/// The programs that are attached to the node's cgroup; the name of the program is the name of its pinned link.
const CGROUP_PROGRAMS: [(&str, AttachType); 7] = [
    // The handshake first: a connection that is captured without it would find nothing recorded, and be refused.
    ("handshake", AttachType::SockOps),
    ("peername4", AttachType::Getpeername4),
    ("peername6", AttachType::Getpeername6),
    ("connect4", AttachType::Connect4),
    ("connect6", AttachType::Connect6),
    ("send4", AttachType::UdpSendmsg4),
    ("send6", AttachType::UdpSendmsg6),
];

/// How long entries of a replaced generation stay: verdicts that began with it must still find them.
const GENERATION_GRACE: Duration = Duration::from_secs(1);

/// How often it is looked whether the links still have this agent's programs.
const LOOK_AT_LINKS: Duration = Duration::from_secs(1);
/// A take-over is done in milliseconds; one that is half done after this time is not going to be finished. Also how long a
/// new agent waits for the lock of one that hangs.
const HALF_DONE: Duration = Duration::from_secs(3);

/// Where the kernel side lives.
#[derive(Clone, Debug)]
pub struct Config {
    /// Directory on a bpffs, which names what agents replace each other in; one per node.
    pub pin_dir: PathBuf,
    /// The cgroup (v2) below which are the node's pods, its kubelet and the agent.
    pub cgroup_root: PathBuf,
    /// Number of the agent's workers: listeners of each kind in each pod.
    pub workers: u32,
}

/// Cookie of a network namespace (`SO_NETNS_COOKIE`): unique until reboot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NetnsCookie(pub u64);

/// A pod's policy as the maps hold it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodPolicy {
    /// Generation of the snapshot that it comes from.
    pub generation: u32,
    /// Mode of ports that are not listed.
    pub mode: Mode,
    /// Rule that set it, 0 for none.
    pub rule: u32,
    /// Ports with another mode, and the rule that set it.
    pub ports: BTreeMap<u16, (Mode, u32)>,
    /// What AuthorizationPolicies say of plaintext that the mode admits.
    pub plaintext: Plaintext,
    /// UDP that leaves the pod is refused, but for DNS.
    pub udp_refused: bool,
}

/// Who gives the verdicts on plaintext that the mode admits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Plaintext {
    /// The mode alone: it passes.
    Passed,
    /// The kernel, by this table.
    ByTable(Arc<Table>),
    /// The agent, connection by connection: the policies are more than the kernel holds.
    ByAgent,
}

impl PodPolicy {
    /// What a snapshot says of a pod of this node.
    pub fn of(snapshot: &Snapshot, workload: &Workload, plaintext: Plaintext, udp_refused: bool) -> Self {
        let auth = &workload.peer_auth;
        Self {
            generation: snapshot.generation,
            mode: auth.mode,
            rule: auth.rule.0,
            ports: auth.ports.iter().map(|(port, (mode, rule))| (*port, (*mode, rule.0))).collect(),
            plaintext,
            udp_refused,
        }
    }
}

impl Plaintext {
    /// What a pod's AuthorizationPolicies make of it.
    ///
    /// # Errors
    /// They make no table: [`Plaintext::ByAgent`] is left.
    pub fn of(snapshot: &Snapshot, workload: &Workload) -> Result<Self, TooLarge> {
        let table = workload.authorization.plaintext(&workload.ips, |rule| snapshot.number(rule))?;
        Ok(table.map_or(Self::Passed, |table| Self::ByTable(Arc::new(table))))
    }
}

/// The agent before this one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Predecessor {
    /// Nobody serves.
    Gone,
    /// It lives, and the kernel refuses for want of its sign of life: it hangs, or ends.
    Silent,
    /// It serves.
    Serving,
}

/// The loaded programs and the maps' writing side. One per agent; not shared.
pub struct Datapath {
    config: Config,
    dir: PathBuf,
    owner: Ownership,
    cgroup: File,
    cgroup_id: u64,
    /// Namespaces of the pods that are to have the inbound program.
    pod_netns: BTreeMap<NetnsCookie, OwnedFd>,
    /// The node's ends of the pods' veths, by index, that are to have the program for what leaves.
    pod_veths: BTreeMap<NetnsCookie, Vec<u32>>,
    taken_over: Option<Instant>,
    looked_at_links: Instant,
    half_done: Option<Instant>,
    /// What the kernel told an agent that was not there any more.
    left_behind: Vec<Event>,
    /// Kept loaded: the pinned links hold the programs, this holds the handle for pods to come.
    ebpf: Ebpf,
    logger: Option<EbpfLogger<&'static dyn log::Log>>,
    pods: BpfHashMap<MapData, u64, PodValue>,
    addrs: BpfHashMap<MapData, Addr, PodAddrValue>,
    modes: BpfHashMap<MapData, ModeKey, ModeValue>,
    listeners: SockHash<MapData, ListenerKey>,
    veths: BpfHashMap<MapData, u32, VethValue>,
    udp_pods: BpfHashMap<MapData, u64, u32>,
    verdicts: PerCpuHashMap<MapData, VerdictKey, u64>,
    heartbeat: Array<MapData, HeartbeatValue>,
    settings: Array<MapData, SettingsValue>,
    tables: Tables,
    gate: gate::Gate,
    older: Older,
    /// What of `MODES` is each pod's: the kernel lists a map only whole.
    mode_keys: BTreeMap<NetnsCookie, BTreeSet<ModeKey>>,
    retired: Vec<(Instant, ModeKey)>,
    /// What did not fit into the kernel: tried again when there is room.
    without_room: BTreeMap<NetnsCookie, PodPolicy>,
}

impl Datapath {
    /// Loads the object, with maps of its own; nothing is attached until [`Datapath::take_over`].
    ///
    /// # Errors
    /// One line that says which step failed, with the verifier's log where a program was refused.
    pub fn load(config: Config, turn: Turn) -> anyhow::Result<Self> {
        let dir = config.pin_dir.join(format!("v{LAYOUT_VERSION}"));
        let next = dir.join(NEXT);
        fs::create_dir_all(&next).with_context(|| format!("create {}", next.display()))?;
        let mut loader = EbpfLoader::new();
        for map in MAPS {
            if SHARED.contains(&map) {
                loader.map_pin_path(map, dir.join(map));
            } else {
                let path = next.join(map);
                // Of an agent that ended before it served: whoever has the turn may remove it.
                ignore_absent(fs::remove_file(&path)).with_context(|| format!("unpin {}", path.display()))?;
                loader.map_pin_path(map, path);
            }
        }
        let mut ebpf = loader.load(OBJECT).with_context(|| {
            format!(
                "load the kernel programs with maps under {} (needs root, or CAP_BPF, CAP_NET_ADMIN and CAP_SYS_ADMIN)",
                dir.display()
            )
        })?;
        let logger = EbpfLogger::init(&mut ebpf).ok();
        let cgroup =
            File::open(&config.cgroup_root).with_context(|| format!("open cgroup {}", config.cgroup_root.display()))?;
        let cgroup_id = cgroup.metadata().context("stat of the cgroup")?.ino();
        load_programs(&mut ebpf)?;
        Ok(Self {
            pods: typed(&mut ebpf, "PODS")?,
            addrs: typed(&mut ebpf, "POD_ADDRS")?,
            modes: typed(&mut ebpf, "MODES")?,
            tables: Tables::new(
                typed(&mut ebpf, "SOURCES")?,
                typed(&mut ebpf, "PORTS")?,
                typed(&mut ebpf, "AUTHORIZATION")?,
            )?,
            listeners: typed(&mut ebpf, "LISTENERS")?,
            veths: typed(&mut ebpf, "VETHS")?,
            udp_pods: typed(&mut ebpf, "UDP_PODS")?,
            verdicts: typed(&mut ebpf, "VERDICTS")?,
            heartbeat: typed(&mut ebpf, "HEARTBEAT")?,
            settings: typed(&mut ebpf, "SETTINGS")?,
            gate: gate::Gate::new(&mut ebpf, &dir.join("GATE"))?,
            older: Older::open(&dir.join("OLDER"))?,
            mode_keys: BTreeMap::new(),
            ebpf,
            logger,
            dir,
            owner: Ownership::new(turn),
            cgroup,
            cgroup_id,
            pod_netns: BTreeMap::new(),
            pod_veths: BTreeMap::new(),
            taken_over: None,
            looked_at_links: Instant::now(),
            half_done: None,
            config,
            left_behind: Vec::new(),
            retired: Vec::new(),
            without_room: BTreeMap::new(),
        })
    }

    /// Who has served until now.
    ///
    /// # Errors
    /// The pin directory cannot be opened.
    pub fn predecessor(&self) -> anyhow::Result<Predecessor> {
        if !self.owner.somebody_serves()? {
            return Ok(Predecessor::Gone);
        }
        // One of another layout says nothing that we could read: it is taken at its lock.
        let beat = MapData::from_pin(self.dir.join("HEARTBEAT"))
            .ok()
            .and_then(|map| Array::<_, HeartbeatValue>::try_from(Map::Array(map)).ok()?.get(&0, 0).ok());
        Ok(match beat {
            Some(HeartbeatValue { at_ns: 0 }) => Predecessor::Silent,
            Some(beat) if monotonic_ns().saturating_sub(beat.at_ns) >= SILENT_AFTER_NS => Predecessor::Silent,
            _ => Predecessor::Serving,
        })
    }

    /// Whether there are programs and maps of an earlier agent.
    pub fn has_remains(&self) -> bool {
        self.dir.join("HEARTBEAT").exists()
    }

    /// Puts this agent's programs into every link, over those of an earlier agent, and says that it serves.
    ///
    /// A pod that the earlier agent had and this one does not know is refused from now on; whether it is forgotten is for
    /// the caller to say ([`Datapath::enrolled`]). Gives the pods that could not be given the inbound program: they are
    /// suspended, and to be prepared again.
    ///
    /// # Errors
    /// A program could not be attached to the cgroup. An earlier agent that lives takes its links back.
    pub fn take_over(&mut self) -> anyhow::Result<Vec<(NetnsCookie, anyhow::Error)>> {
        self.beat()?;
        let untold = self.untold_events();
        self.adopt_pod_links()?;
        self.adopt_veths()?;
        let mut failed = Vec::new();
        for cookie in self.pod_netns.keys().copied().collect::<Vec<_>>() {
            if let Err(error) = self.attach_pod(cookie).and_then(|()| self.attach_veths(cookie)) {
                self.suspend(cookie)?;
                failed.push((cookie, error));
            }
        }
        for (name, kind) in CGROUP_PROGRAMS {
            self.attach_to_cgroup(name, kind)?;
        }
        self.attach_gate()?;
        self.gate.serves();
        // No program writes there any more.
        self.left_behind = untold.into_iter().flatten().collect();
        for map in MAPS.iter().filter(|map| !SHARED.contains(map)) {
            let (from, to) = (self.dir.join(NEXT).join(map), self.dir.join(map));
            fs::rename(&from, &to).with_context(|| format!("move {} to {}", from.display(), to.display()))?;
        }
        self.owner.declare()?;
        self.taken_over = Some(Instant::now());
        self.owner.settle(false);
        self.remove_other_layouts();
        let enrolled: BTreeSet<NetnsCookie> = self.enrolled().into_iter().collect();
        if let Err(error) = self.older.keep(|pod| enrolled.contains(&pod)) {
            warn!(error = format!("{error:#}"), "sockets of pods that are gone are still noted");
        }
        Ok(failed)
    }

    /// What the kernel told while no agent was there to hear it: filled by [`Datapath::take_over`], given once. The numbers of
    /// rules in it are an earlier agent's.
    pub fn left_behind(&mut self) -> Vec<Event> {
        std::mem::take(&mut self.left_behind)
    }

    /// The events of the agent before this one, if that has ended. One that lives hears them itself.
    fn untold_events(&self) -> Option<Events> {
        let gone = matches!(self.owner.somebody_serves(), Ok(false));
        let map = gone.then(|| MapData::from_pin(self.dir.join("EVENTS")).ok()).flatten()?;
        Some(Events { ring: RingBuf::try_from(Map::RingBuf(map)).ok()? })
    }

    /// Whether this agent's programs are the attached ones; false for ever once another agent has said that it serves.
    pub fn serves(&mut self) -> bool {
        self.owner.confirm()
    }

    /// Whether another agent prepares itself to serve.
    pub fn has_successor(&self) -> bool {
        self.owner.somebody_prepares()
    }

    /// Directory of the pinned maps, for messages and tools.
    pub fn pin_dir(&self) -> &Path {
        &self.dir
    }

    /// Where this agent's policy generations begin: the numbers of earlier agents, which sockets still carry, must not be
    /// taken for its own.
    pub fn first_generation(&self) -> u32 {
        (self.owner.epoch() & 0xffff) << 16 | 1
    }

    /// Network namespaces that have an entry: pods of this agent, and, once it serves, those that an earlier one had.
    pub fn enrolled(&self) -> Vec<NetnsCookie> {
        self.pods.keys().filter_map(Result::ok).map(NetnsCookie).collect()
    }

    /// Puts a pod's inbound program and addresses in place and refuses its traffic until [`Datapath::ready`].
    ///
    /// Order: first the entry, then the program, then the addresses, so that wherever this fails the pod stays refused in
    /// both directions: an entry that is not ready refuses what leaves, an address that is not known what arrives.
    /// Safe to repeat: an entry that is there keeps its state and policy.
    ///
    /// # Errors
    /// A full map or a failed attachment.
    pub fn prepare(&mut self, cookie: NetnsCookie, netns: BorrowedFd<'_>, ips: &[IpAddr]) -> anyhow::Result<()> {
        let mut value = self.pod(cookie)?.unwrap_or(PodValue {
            state: PodState::Pending as u8,
            mode: Mode::Missing as u8,
            ..PodValue::default()
        });
        value.addr4 = first(ips, IpAddr::is_ipv4);
        value.addr6 = first(ips, IpAddr::is_ipv6);
        value.workers = self.config.workers;
        self.write_pod(cookie, &value)?;
        self.pod_netns.insert(cookie, netns.try_clone_to_owned().context("duplicate a namespace handle")?);
        if self.owner.part() == Part::Serving {
            self.attach_pod(cookie)?;
        }
        self.write_addrs(cookie, ips)
    }

    /// Whether a prepared pod has its inbound program, or is to get it when this agent takes over.
    pub fn has_inbound(&self, cookie: NetnsCookie) -> bool {
        self.owner.part() == Part::Preparing || sys::open_pinned(&self.pod_link(cookie)).is_ok()
    }

    fn attach_pod(&self, cookie: NetnsCookie) -> anyhow::Result<()> {
        let Some(netns) = self.pod_netns.get(&cookie) else { return Ok(()) };
        let inode = netns_inode(netns.as_fd())?;
        let path = self.pod_link(cookie);
        attach(&path, program_fd(&self.ebpf, "inbound")?, netns.as_fd(), AttachType::SkLookup, |target| {
            target == Target::Netns(inode)
        })
        .with_context(|| format!("attach the inbound program to network namespace {inode}"))
    }

    fn attach_to_cgroup(&self, name: &str, kind: AttachType) -> anyhow::Result<()> {
        let path = owner::links(&self.config.pin_dir).join(name);
        attach(&path, program_fd(&self.ebpf, name)?, self.cgroup.as_fd(), kind, |target| {
            target == Target::Cgroup(self.cgroup_id)
        })
        .with_context(|| format!("attach {name} to {}", self.config.cgroup_root.display()))
    }

    /// Puts one of the agent's listeners in the pod into its place, over what was there.
    ///
    /// # Errors
    /// A full map, or a socket that does not listen.
    pub fn listener(
        &mut self,
        cookie: NetnsCookie,
        kind: ListenerKind,
        worker: u32,
        socket: BorrowedFd<'_>,
    ) -> anyhow::Result<()> {
        let key = ListenerKey { netns_cookie: cookie.0, kind: kind as u32, worker };
        self.listeners.insert(key, socket.as_raw_fd(), 0).with_context(|| format!("write LISTENERS[{key:?}]"))
    }

    /// Puts a policy in force and opens the pod: the last step of enrolment, and every later change.
    ///
    /// The ports of the new generation and the table are written first; one write of the pod's entry switches to them; those
    /// of the old one are removed after a grace ([`Datapath::maintain`]). What does not fit makes the agent decide about the
    /// pod's plaintext, until there is room.
    ///
    /// # Errors
    /// The entry could not be written; the pod keeps what was in force.
    pub fn ready(&mut self, cookie: NetnsCookie, policy: &PodPolicy) -> anyhow::Result<()> {
        let before =
            self.pod(cookie)?.ok_or_else(|| anyhow!("pod of namespace cookie {} was not prepared", cookie.0))?;
        self.refuse_udp(cookie, policy.udp_refused)?;
        let old: Vec<ModeKey> = self.mode_keys(cookie, |key| key.generation != policy.generation);
        let same_generation = before.state == PodState::Ready as u8 && before.generation == policy.generation;
        let table = match &policy.plaintext {
            Plaintext::Passed | Plaintext::ByAgent => Ok(tables::Put::default()),
            Plaintext::ByTable(table) => self.tables.put(table),
        };
        let modes = buckets(&policy.ports.keys().copied().collect::<Vec<_>>());
        let value = PodValue {
            generation: policy.generation,
            rule: policy.rule,
            state: PodState::Ready as u8,
            mode: policy.mode as u8,
            mode_buckets: modes.as_ref().map_or(0, |buckets| if policy.ports.is_empty() { 0 } else { *buckets }),
            table: table.as_ref().map_or(0, |table| table.number),
            port_buckets: table.as_ref().map_or(0, |table| table.port_buckets),
            plaintext_by_agent: u8::from(policy.plaintext == Plaintext::ByAgent || table.is_err()),
            ..before
        };
        let written = modes.and_then(|_| self.write_ports(cookie, policy, value.mode_buckets));
        let (value, too_much) = match written {
            Ok(()) => (value, table.err()),
            Err(error) => {
                self.remove_ports(cookie, policy.generation);
                // Whatever the mode, the agent sees the connection, and refuses by the whole policy.
                let mode = Mode::Permissive as u8;
                let none = PodValue { mode_buckets: 0, table: 0, port_buckets: 0, ..value };
                (PodValue { mode, plaintext_by_agent: 1, ..none }, Some(error))
            }
        };
        if !same_generation || value != before {
            self.write_pod(cookie, &value)?;
        }
        self.tables.switch(cookie, value.table);
        self.settle(cookie, policy, too_much);
        let now = Instant::now();
        self.retired.extend(old.into_iter().map(|key| (now, key)));
        Ok(())
    }

    /// Notes whether a policy fits, and tells when that changes.
    fn settle(&mut self, cookie: NetnsCookie, policy: &PodPolicy, too_much: Option<anyhow::Error>) {
        match too_much {
            Some(error) => {
                if self.without_room.insert(cookie, policy.clone()).is_none() {
                    warn!(
                        cookie = cookie.0,
                        error = format!("{error:#}"),
                        "a pod's policy does not fit into the kernel: the agent gives its verdicts on plaintext until \
                         others need less"
                    );
                }
            }
            None => {
                if self.without_room.remove(&cookie).is_some() {
                    tracing::info!(cookie = cookie.0, "a pod's policy fits into the kernel again");
                }
            }
        }
    }

    /// Says whether UDP of a pod is refused, but for DNS; of pods that the gate holds, by cookie 0.
    ///
    /// # Errors
    /// A full map.
    pub fn refuse_udp(&mut self, cookie: NetnsCookie, refused: bool) -> anyhow::Result<()> {
        if refused {
            self.udp_pods.insert(cookie.0, 1, 0).context("write UDP_PODS (the map holds 16384 pods)")?;
        } else {
            ignore_missing(self.udp_pods.remove(&cookie.0)).context("remove from UDP_PODS")?;
        }
        self.write_veths(cookie, refused)
    }

    /// Refuses a pod's traffic from now on, without forgetting it.
    ///
    /// # Errors
    /// The map could not be written.
    pub fn suspend(&mut self, cookie: NetnsCookie) -> anyhow::Result<()> {
        let Some(mut value) = self.pod(cookie)? else { return Ok(()) };
        value.state = PodState::Pending as u8;
        self.write_pod(cookie, &value)
    }

    /// Takes a pod out: first its programs, so that nothing is judged by half an entry, then its entries.
    ///
    /// # Errors
    /// A program could not be taken off, and the pod is captured as before; or the first entry that could not be removed, and
    /// the rest was tried all the same. To be called again.
    pub fn remove(&mut self, cookie: NetnsCookie) -> anyhow::Result<()> {
        self.pod_netns.remove(&cookie);
        let mut result = Ok(());
        if self.owner.part() == Part::Serving {
            let path = self.pod_link(cookie);
            let detached = sys::open_pinned(&path).and_then(|link| sys::link_detach(link.as_fd()));
            ignore_absent(detached).context("detach the inbound program")?;
            result = ignore_absent(fs::remove_file(&path)).context("unpin the inbound program");
        }
        self.remove_veths(cookie)?;
        let addrs: Vec<Addr> = self.addrs_of(cookie);
        result = result.and(ignore_missing(self.pods.remove(&cookie.0)).context("remove from PODS"));
        self.tables.switch(cookie, 0);
        self.without_room.remove(&cookie);
        result = result.and(ignore_missing(self.udp_pods.remove(&cookie.0)).context("remove from UDP_PODS"));
        for addr in addrs {
            result = result.and(ignore_missing(self.addrs.remove(&addr)).context("remove from POD_ADDRS"));
        }
        for key in self.mode_keys(cookie, |_| true) {
            result = result.and(self.remove_mode(&key).context("remove from MODES"));
        }
        if self.owner.part() == Part::Serving {
            result = result.and(self.older.keep(|pod| pod != cookie));
        }
        let counters: Vec<VerdictKey> =
            self.verdicts.keys().filter_map(Result::ok).filter(|key| key.netns_cookie == cookie.0).collect();
        for key in counters {
            result = result.and(ignore_missing(self.verdicts.remove(&key)).context("remove from VERDICTS"));
        }
        result
    }

    /// Tells the kernel that the agent lives.
    ///
    /// # Errors
    /// The map could not be written; after ten seconds without a beat the kernel refuses.
    pub fn beat(&mut self) -> anyhow::Result<()> {
        self.heartbeat.set(0, HeartbeatValue { at_ns: monotonic_ns() }, 0).context("write HEARTBEAT")
    }

    /// Withdraws the sign of life: from now on the kernel refuses what needs the agent.
    ///
    /// # Errors
    /// The map could not be written.
    pub fn silence(&mut self) -> anyhow::Result<()> {
        self.heartbeat.set(0, HeartbeatValue { at_ns: 0 }, 0).context("write HEARTBEAT")
    }

    /// Facts about the node.
    ///
    /// # Errors
    /// The map could not be written.
    pub fn settings(&mut self, settings: SettingsValue) -> anyhow::Result<()> {
        self.settings.set(0, settings, 0).context("write SETTINGS")
    }

    /// Several times a second: removes what a replaced generation left, hands the kernel programs' log lines on, and sees
    /// to it that the links have this agent's programs as long as it is the one that serves.
    pub fn maintain(&mut self) {
        if let Some(at) = self.taken_over
            && self.owner.confirm()
        {
            self.owner.settle(at.elapsed() >= HALF_DONE);
            if self.looked_at_links.elapsed() >= LOOK_AT_LINKS {
                self.looked_at_links = Instant::now();
                self.keep_links();
            }
        }
        if let Some(logger) = &mut self.logger {
            logger.flush();
        }
        let now = Instant::now();
        let (due, kept) = self.retired.drain(..).partition(|(at, _)| now.duration_since(*at) >= GENERATION_GRACE);
        self.retired = kept;
        let due: Vec<(Instant, ModeKey)> = due;
        let room = self.tables.retire(GENERATION_GRACE) || !due.is_empty();
        for (_, key) in due {
            let current = self.pod(NetnsCookie(key.netns_cookie)).ok().flatten();
            if current.is_none_or(|pod| pod.generation != key.generation) {
                // What is left is never looked up, and tried again when the pod leaves.
                let _ = self.remove_mode(&key);
            }
        }
        if room {
            for (cookie, policy) in self.without_room.clone() {
                if let Err(error) = self.ready(cookie, &policy) {
                    warn!(cookie = cookie.0, error = format!("{error:#}"), "a pod's policy could not be written");
                }
            }
        }
    }

    /// Whether the agent gives the verdicts on a pod's plaintext; false if that cannot be read.
    pub fn is_judged_by_agent(&self, cookie: NetnsCookie) -> bool {
        matches!(self.pod(cookie), Ok(Some(pod)) if pod.plaintext_by_agent != 0)
    }

    /// Pods whose verdicts on plaintext the agent gives.
    pub fn judged_by_agent(&self) -> usize {
        self.pods.iter().filter_map(Result::ok).filter(|(_, pod)| pod.plaintext_by_agent != 0).count()
    }

    /// Verdicts since the pod was enrolled, summed over the CPUs.
    pub fn verdicts(&self) -> Vec<(VerdictKey, u64)> {
        self.verdicts.iter().filter_map(Result::ok).map(|(key, counts)| (key, counts.iter().sum())).collect()
    }

    /// Reader of the kernel's events; there must be only one.
    ///
    /// # Errors
    /// The pinned map could not be opened.
    pub fn events(&self) -> anyhow::Result<Events> {
        let map = MapData::from_pin(self.map("EVENTS")).context("open EVENTS")?;
        Ok(Events { ring: RingBuf::try_from(Map::RingBuf(map)).context("open EVENTS")? })
    }

    /// The map of socket storage, for `sock_diag` to show its values.
    ///
    /// # Errors
    /// The pinned map could not be opened.
    pub fn storage_fd(&self) -> anyhow::Result<OwnedFd> {
        sys::open_pinned(&self.map("SOCKETS")).context("open SOCKETS")
    }

    /// The sockets that are older than the mesh: a view of its own.
    ///
    /// # Errors
    /// The pinned map could not be opened.
    pub fn older(&self) -> anyhow::Result<Older> {
        Older::open(&self.map("OLDER"))
    }

    /// A worker's own view of the maps that it needs for each connection.
    ///
    /// # Errors
    /// A pinned map could not be opened.
    pub fn sockets(&self) -> anyhow::Result<Sockets> {
        Sockets::open(&self.dir)
    }

    fn write_ports(&mut self, cookie: NetnsCookie, policy: &PodPolicy, buckets: u16) -> anyhow::Result<()> {
        let free = PortMode { rule: policy.rule, port: 0, mode: policy.mode as u8, _pad: 0 };
        let named =
            policy.ports.iter().map(|(&port, &(mode, rule))| PortMode { rule, port, mode: mode as u8, _pad: 0 });
        for (number, ports) in (0..).zip(in_buckets(named, |named| named.port, buckets, free)) {
            let key = ModeKey { netns_cookie: cookie.0, generation: policy.generation, bucket: number, _pad: 0 };
            self.modes.insert(key, ModeValue { ports }, 0).with_context(|| {
                format!("write MODES for {} ports (the map holds 65536 entries)", policy.ports.len())
            })?;
            self.mode_keys.entry(cookie).or_default().insert(key);
        }
        Ok(())
    }

    fn remove_mode(&mut self, key: &ModeKey) -> Result<(), MapError> {
        ignore_missing(self.modes.remove(key))?;
        let cookie = NetnsCookie(key.netns_cookie);
        if let Some(keys) = self.mode_keys.get_mut(&cookie) {
            keys.remove(key);
            if keys.is_empty() {
                self.mode_keys.remove(&cookie);
            }
        }
        Ok(())
    }

    fn remove_ports(&mut self, cookie: NetnsCookie, generation: u32) {
        for key in self.mode_keys(cookie, |key| key.generation == generation) {
            // What is left is never looked up: the pod's entry says so.
            let _ = self.remove_mode(&key);
        }
    }

    fn pod(&self, cookie: NetnsCookie) -> anyhow::Result<Option<PodValue>> {
        match self.pods.get(&cookie.0, 0) {
            Ok(value) => Ok(Some(value)),
            Err(MapError::KeyNotFound) => Ok(None),
            Err(error) => Err(error).context("read PODS"),
        }
    }

    fn write_pod(&mut self, cookie: NetnsCookie, value: &PodValue) -> anyhow::Result<()> {
        self.pods.insert(cookie.0, value, 0).context("write PODS (the map holds 16384 pods)")
    }

    fn addrs_of(&self, cookie: NetnsCookie) -> Vec<Addr> {
        let entries = self.addrs.iter().filter_map(Result::ok);
        entries.filter(|(_, owner)| owner.netns_cookie == cookie.0).map(|(addr, _)| addr).collect()
    }

    fn write_addrs(&mut self, cookie: NetnsCookie, ips: &[IpAddr]) -> anyhow::Result<()> {
        let wanted: Vec<Addr> = ips.iter().map(|ip| Addr::from(*ip)).collect();
        for addr in &wanted {
            self.addrs
                .insert(addr, PodAddrValue { netns_cookie: cookie.0 }, 0)
                .with_context(|| format!("write POD_ADDRS for {addr} (the map holds 65536 addresses)"))?;
        }
        for addr in self.addrs_of(cookie).iter().filter(|addr| !wanted.contains(addr)) {
            ignore_missing(self.addrs.remove(addr)).context("remove from POD_ADDRS")?;
        }
        Ok(())
    }

    fn mode_keys(&self, cookie: NetnsCookie, keep: impl Fn(&ModeKey) -> bool) -> Vec<ModeKey> {
        self.mode_keys.get(&cookie).into_iter().flatten().filter(|key| keep(key)).copied().collect()
    }

    /// Where one of this agent's maps is pinned.
    fn map(&self, name: &str) -> PathBuf {
        match self.owner.part() {
            Part::Preparing if !SHARED.contains(&name) => self.dir.join(NEXT).join(name),
            _ => self.dir.join(name),
        }
    }

    fn pod_link(&self, cookie: NetnsCookie) -> PathBuf {
        owner::links(&self.config.pin_dir).join(format!("{POD_LINK}{}", cookie.0))
    }

    /// Gives the pods that an earlier agent enrolled this agent's program, and an entry that refuses where this agent has
    /// none; drops links of namespaces that are gone.
    fn adopt_pod_links(&mut self) -> anyhow::Result<()> {
        let links = owner::links(&self.config.pin_dir);
        for entry in fs::read_dir(&links).with_context(|| format!("list {}", links.display()))? {
            let path = entry.context("list pinned links")?.path();
            let cookie = path.file_name().and_then(|name| name.to_str()?.strip_prefix(POD_LINK)?.parse().ok());
            let Some(cookie) = cookie.map(NetnsCookie) else { continue };
            let link = sys::open_pinned(&path).with_context(|| format!("open {}", path.display()))?;
            match sys::link_info(link.as_fd()) {
                Ok((Target::Netns(inode), _)) if inode != 0 => {
                    if self.pod(cookie)?.is_none() {
                        let (state, mode) = (PodState::Pending as u8, Mode::Missing as u8);
                        self.write_pod(cookie, &PodValue { state, mode, ..PodValue::default() })?;
                        self.refuse_udp(cookie, true)?;
                    }
                    sys::link_update(link.as_fd(), program_fd(&self.ebpf, "inbound")?)
                        .with_context(|| format!("replace the program of {}", path.display()))?;
                }
                _ => ignore_absent(fs::remove_file(&path)).with_context(|| format!("unpin {}", path.display()))?,
            }
        }
        Ok(())
    }

    /// Takes links back that an agent has changed which then did not say that it serves.
    fn keep_links(&mut self) {
        let alone = self.owner.alone();
        let foreign = self.foreign_links();
        if foreign == 0 {
            self.half_done = None;
            return;
        }
        let since = self.half_done.get_or_insert_with(Instant::now);
        if alone.is_none() && since.elapsed() < HALF_DONE {
            return;
        }
        self.half_done = None;
        let attached = CGROUP_PROGRAMS.iter().try_for_each(|(name, kind)| self.attach_to_cgroup(name, *kind));
        let attached = self
            .pod_netns
            .keys()
            .fold(attached, |result, cookie| result.and(self.attach_pod(*cookie)).and(self.attach_veths(*cookie)))
            .and(self.attach_gate());
        match attached {
            Ok(()) => warn!(links = foreign, "took links back that another agent had changed, or somebody removed"),
            Err(error) => {
                warn!(error = format!("{error:#}"), "links have other programs than this agent's; trying again");
            }
        }
    }

    /// How many links have not this agent's program, or are not there.
    fn foreign_links(&self) -> usize {
        let links = owner::links(&self.config.pin_dir);
        let ours = |path: &Path, name: &str| {
            let id = self.ebpf.program(name).and_then(|program| program.info().ok()).map(|info| info.id());
            let link = sys::open_pinned(path).and_then(|link| sys::link_info(link.as_fd()));
            link.is_ok_and(|(_, program)| Some(program) == id)
        };
        CGROUP_PROGRAMS.iter().filter(|(name, _)| !ours(&links.join(name), name)).count()
            + self.pod_netns.keys().filter(|cookie| !ours(&self.pod_link(**cookie), "inbound")).count()
            + self.foreign_veths()
            + self.foreign_gates()
    }

    /// Removes what agents of other layouts have pinned: their maps, and links of their own if they had them elsewhere.
    fn remove_other_layouts(&self) {
        let result = (|| {
            for entry in fs::read_dir(&self.config.pin_dir)? {
                let path = entry?.path();
                let version = path.file_name().and_then(|name| name.to_str()?.strip_prefix('v')?.parse::<u32>().ok());
                if version.is_none_or(|version| version == LAYOUT_VERSION) {
                    continue;
                }
                remove_pins(&path)?;
                tracing::info!(path = %path.display(), "removed what an agent of another version had pinned");
            }
            io::Result::Ok(())
        })();
        if let Err(error) = result {
            warn!(%error, dir = %self.config.pin_dir.display(), "what an agent of another version had pinned is still there");
        }
    }
}

impl Drop for Datapath {
    fn drop(&mut self) {
        if self.owner.part() == Part::Preparing {
            for map in MAPS {
                // What is left is removed by the next agent.
                let _ = fs::remove_file(self.dir.join(NEXT).join(map));
            }
        }
    }
}

/// The kernel's events, read in batches: they come without a wake-up.
pub struct Events {
    ring: RingBuf<MapData>,
}

impl Iterator for Events {
    type Item = Event;

    /// Next event, if there is one now.
    fn next(&mut self) -> Option<Event> {
        loop {
            let item = self.ring.next()?;
            if item.len() >= size_of::<Event>() {
                // SAFETY: the record is at least as long as an `Event`, which any bytes make; it may be unaligned.
                return Some(unsafe { item.as_ptr().cast::<Event>().read_unaligned() });
            }
        }
    }
}

impl AsFd for Events {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the ring owns this descriptor and lives as long as the borrow.
        unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) }
    }
}

/// How far the agent's leg to an application has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Leg {
    /// The application's end does not exist yet.
    Waiting,
    /// The application's end exists and shows the client.
    Taken,
    /// The record is gone: the application would see the agent's own address, so the leg must not be used.
    Lost,
}

/// One worker's view of the per-connection maps.
pub struct Sockets {
    sockets: SkStorage<MapData, SocketValue>,
    flows: BpfHashMap<MapData, FlowKey, FlowValue>,
}

impl Sockets {
    fn open(dir: &Path) -> anyhow::Result<Self> {
        let open = |name: &str| MapData::from_pin(dir.join(name)).with_context(|| format!("open {name}"));
        Ok(Self {
            sockets: SkStorage::try_from(Map::SkStorage(open("SOCKETS")?)).context("open SOCKETS")?,
            flows: BpfHashMap::try_from(Map::LruHashMap(open("FLOWS")?)).context("open FLOWS")?,
        })
    }

    /// Marks a socket as the agent's own, before it connects: `connect4/6` lets it go.
    ///
    /// # Errors
    /// The kernel had no memory; the socket must not be used, it would be captured.
    pub fn mark(&mut self, socket: &impl AsRawFd) -> anyhow::Result<()> {
        let value = SocketValue { kind: SocketKind::Agent as u8, ..SocketValue::default() };
        self.sockets.insert(socket, value, 0).context("mark a socket as the agent's")
    }

    /// Marks a socket as the agent's leg to an application, which is to see `client` as its peer.
    ///
    /// # Errors
    /// As for [`Sockets::mark`].
    pub fn mark_leg(&mut self, socket: &impl AsRawFd, client: SocketAddr) -> anyhow::Result<()> {
        let value = SocketValue {
            addr: client.ip().into(),
            port: client.port(),
            kind: SocketKind::Leg as u8,
            ..SocketValue::default()
        };
        self.sockets.insert(socket, value, 0).context("mark a socket as the agent's leg")
    }

    /// How far a connected leg has come; removes the record once the application's end has taken it over.
    ///
    /// [`Leg::Waiting`] is what a full accept queue looks like: the kernel has told this end that it is connected, and
    /// the other end does not exist yet.
    pub fn leg(&mut self, source: SocketAddr, target: SocketAddr) -> Leg {
        let key = flow_key(source, target);
        match self.flows.get(&key, 0) {
            Ok(flow) if flow.taken == 0 => Leg::Waiting,
            Ok(_) => {
                // An entry that was pushed out meanwhile is as good as removed.
                let _ = self.flows.remove(&key);
                Leg::Taken
            }
            Err(_) => Leg::Lost,
        }
    }

    /// Forgets the record of a leg that did not connect.
    pub fn forget_leg(&mut self, source: SocketAddr, target: SocketAddr) {
        if self.leg(source, target) == Leg::Waiting {
            // As above.
            let _ = self.flows.remove(&flow_key(source, target));
        }
    }

    /// Where a connection that one of the outbound listeners accepted meant to go; `None` if it was not redirected,
    /// which is a process that dialled the listener itself.
    pub fn original_destination(&self, socket: &impl AsRawFd) -> Option<SocketAddr> {
        let value = self.sockets.get(socket, 0).ok()?;
        (value.kind == SocketKind::Accepted as u8).then(|| SocketAddr::new(value.addr.ip(), value.port))
    }
}

/// Removes a directory of pins; links are taken off what they are attached to first.
fn remove_pins(dir: &Path) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let path = entry.path();
        if entry.file_type()?.is_dir() {
            remove_pins(&path)?;
            continue;
        }
        if let Ok(pinned) = sys::open_pinned(&path) {
            // Fails for what is no link.
            let _ = sys::link_detach(pinned.as_fd());
        }
        ignore_absent(fs::remove_file(&path))?;
    }
    fs::remove_dir(dir)
}

fn load_programs(ebpf: &mut Ebpf) -> anyhow::Result<()> {
    for name in [
        "connect4",
        "connect6",
        "peername4",
        "peername6",
        "send4",
        "send6",
        "gate4",
        "gate6",
        "gate_send4",
        "gate_send6",
    ] {
        let program: &mut CgroupSockAddr = program(ebpf, name)?;
        program.load().with_context(|| format!("the kernel refused program {name}"))?;
    }
    let gate_in: &mut CgroupSkb = program(ebpf, "gate_in")?;
    gate_in.load().context("the kernel refused program gate_in")?;
    let handshake: &mut SockOps = program(ebpf, "handshake")?;
    handshake.load().context("the kernel refused program handshake")?;
    let inbound: &mut SkLookup = program(ebpf, "inbound")?;
    inbound.load().context("the kernel refused program inbound")?;
    let leaving: &mut SchedClassifier = program(ebpf, "leaving")?;
    leaving.load().context("the kernel refused program leaving")
}

fn program<'a, P>(ebpf: &'a mut Ebpf, name: &str) -> anyhow::Result<&'a mut P>
where
    &'a mut P: TryFrom<&'a mut aya::programs::Program, Error = aya::programs::ProgramError>,
{
    let program = ebpf.program_mut(name).ok_or_else(|| anyhow!("the object has no program {name}"))?;
    program.try_into().with_context(|| format!("program {name} is of another kind"))
}

fn program_fd<'a>(ebpf: &'a Ebpf, name: &str) -> anyhow::Result<BorrowedFd<'a>> {
    let program = ebpf.program(name).ok_or_else(|| anyhow!("the object has no program {name}"))?;
    Ok(program.fd().with_context(|| format!("program {name} is not loaded"))?.as_fd())
}

fn typed<T: TryFrom<Map, Error = MapError>>(ebpf: &mut Ebpf, name: &str) -> anyhow::Result<T> {
    let map = ebpf.take_map(name).ok_or_else(|| anyhow!("the object has no map {name}"))?;
    T::try_from(map).with_context(|| {
        format!("map {name} has another layout than this version expects: remove the pin directory and start again")
    })
}

/// Attaches a program by a pinned link, or replaces the program of the link that is pinned there, if it is attached
/// where it should be.
fn attach(
    path: &Path,
    prog: BorrowedFd<'_>,
    target: BorrowedFd<'_>,
    kind: AttachType,
    right: impl Fn(Target) -> bool,
) -> anyhow::Result<()> {
    match sys::open_pinned(path) {
        Ok(link) => {
            if right(sys::link_info(link.as_fd()).context("look at the pinned link")?.0) {
                return sys::link_update(link.as_fd(), prog).context("replace the program of the pinned link");
            }
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error).context("open the pinned link"),
    }
    let link = sys::link_create(prog, target, kind).context("create a link")?;
    sys::pin_over(link.as_fd(), path).context("pin the link")
}

fn netns_inode(netns: BorrowedFd<'_>) -> anyhow::Result<u32> {
    let file = File::from(netns.try_clone_to_owned().context("duplicate a namespace handle")?);
    let inode = file.metadata().context("stat of a network namespace")?.ino();
    u32::try_from(inode).context("inode of a network namespace")
}

/// How many buckets it takes so that each has room for those of these ports that fall into it: a power of two.
///
/// # Errors
/// Too many of them fall into one.
fn buckets(ports: &[u16]) -> anyhow::Result<u16> {
    let fits = |buckets: u16| {
        let mut used = vec![0; buckets.into()];
        ports.iter().all(|port| {
            let place: &mut usize = &mut used[usize::from(bucket(*port, buckets))];
            *place += 1;
            *place <= BUCKET_PORTS
        })
    };
    (0..u16::BITS)
        .map(|power| 1 << power)
        .find(|buckets| fits(*buckets))
        .ok_or_else(|| anyhow!("{} ports fall into too few buckets", ports.len()))
}

/// What is said of ports, in all of these buckets; where there is room left is `free`.
fn in_buckets<T: Copy>(
    named: impl Iterator<Item = T>,
    port: impl Fn(&T) -> u16,
    buckets: u16,
    free: T,
) -> Vec<[T; BUCKET_PORTS]> {
    let mut all = vec![([free; BUCKET_PORTS], 0); buckets.into()];
    for one in named {
        let (places, used) = &mut all[usize::from(bucket(port(&one), buckets))];
        places[*used] = one;
        *used += 1;
    }
    all.into_iter().map(|(places, _)| places).collect()
}

fn flow_key(source: SocketAddr, target: SocketAddr) -> FlowKey {
    FlowKey { src: source.ip().into(), dst: target.ip().into(), sport: source.port(), dport: target.port(), _pad: 0 }
}

fn first(ips: &[IpAddr], of: impl Fn(&IpAddr) -> bool) -> Addr {
    ips.iter().find(|ip| of(ip)).map_or(Addr::UNSPECIFIED, |ip| Addr::from(*ip))
}

fn ignore_missing(result: Result<(), MapError>) -> Result<(), MapError> {
    match result {
        Err(MapError::KeyNotFound) => Ok(()),
        Err(MapError::SyscallError(error)) if error.io_error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
        other => other,
    }
}

fn ignore_absent(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// `CLOCK_MONOTONIC` in nanoseconds: the clock of `bpf_ktime_get_ns`.
pub fn monotonic_ns() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `now` is a live timespec; this clock always exists.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    u64::try_from(now.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// [PA.13]: whatever ports are named, each is in the bucket where it is looked for, and every bucket is there.
    #[test]
    fn every_port_is_in_its_bucket() {
        let few: Vec<u16> = vec![80, 8080];
        let sets =
            [few, (1..=1000).collect(), (1..=64).map(|n| n * 1000).collect(), (0..4096).map(|n| n * 16 + 1).collect()];
        for ports in sets {
            let count = buckets(&ports).expect("they fit");
            assert!(count.is_power_of_two() && usize::from(count) <= 2 * ports.len(), "{count} for {}", ports.len());
            let all = in_buckets(ports.iter().copied(), |port| *port, count, 0);
            assert_eq!(all.len(), usize::from(count));
            assert_eq!(all.iter().flatten().filter(|port| **port != 0).count(), ports.len());
            for port in ports {
                assert!(all[usize::from(bucket(port, count))].contains(&port), "{port}");
            }
        }
        assert_eq!(buckets(&[]).expect("they fit"), 1);
        assert_eq!(buckets(&[80, 443, 8080, 9090]).expect("they fit"), 1);
        assert!(buckets(&[80; BUCKET_PORTS + 1]).is_err());
    }

    /// What docs/authorization.md says of 250 pods whose policies all differ; the map has room for 65,536.
    #[test]
    fn the_ports_of_a_node_fit_into_their_buckets() {
        const PODS: u32 = 250;
        let all = |ports: &dyn Fn(u32) -> Vec<u16>| -> u32 {
            (0..PODS).map(|pod| u32::from(buckets(&ports(pod)).expect("they fit"))).sum()
        };
        let in_a_row = all(&|pod| (0..250).map(|n| (1000 + 200 * pod + n) as u16).collect());
        assert!(in_a_row <= 65_536, "{in_a_row}");
        // A linear congruential generator (Knuth), of which the upper half is taken.
        let scattered = all(&|pod| {
            let mut state = u64::from(pod) << 32 | 1;
            let mut ports = BTreeSet::new();
            while ports.len() < 120 {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                ports.insert(((state >> 48) as u16).max(1));
            }
            ports.into_iter().collect()
        });
        assert!((30_000..=65_536).contains(&scattered), "{scattered}");
    }
}
