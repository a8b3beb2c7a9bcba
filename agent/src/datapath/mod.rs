//! Loads the kernel programs, attaches them, and makes the maps equal to what is wanted; the only place that imports aya.
//!
//! Everything is pinned under `<pin dir>/v<layout version>`: maps by name, links under `links/`. An agent that starts
//! finds what an earlier one left, replaces each link's program in place and takes the maps over, so that there is no
//! instant without programs. What the maps mean is said in `culvert_common`; who is enrolled is decided elsewhere.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io,
    net::{IpAddr, SocketAddr},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::fs::MetadataExt,
    },
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context as _, anyhow, bail};
use aya::{
    Ebpf, EbpfLoader,
    maps::{Array, HashMap as BpfHashMap, Map, MapData, MapError, PerCpuHashMap, RingBuf, SkStorage, SockHash},
    programs::{CgroupSockAddr, SkLookup, SockOps},
};
use aya_log::EbpfLogger;
use culvert_common::{
    Addr, Event, FlowKey, FlowValue, HeartbeatValue, LAYOUT_VERSION, ListenerKey, ListenerKind, Mode, ModeKey,
    ModeValue, PodAddrValue, PodState, PodValue, SettingsValue, SocketKind, SocketValue, VerdictKey,
};
use tracing::warn;

pub mod measure;
mod sys;

use sys::{AttachType, Target};

static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/culvert"));

/// The maps, by the names that they have in the object, in the pin directory and in `bpftool`.
const MAPS: [&str; 10] =
    ["PODS", "POD_ADDRS", "MODES", "LISTENERS", "FLOWS", "SOCKETS", "VERDICTS", "HEARTBEAT", "SETTINGS", "EVENTS"];

/// The programs that are attached to the node's cgroup; the name of the program is the name of its pinned link.
const CGROUP_PROGRAMS: [(&str, AttachType); 5] = [
    // The handshake first: a connection that is captured without it would find nothing recorded, and be refused.
    ("handshake", AttachType::SockOps),
    ("peername4", AttachType::Getpeername4),
    ("peername6", AttachType::Getpeername6),
    ("connect4", AttachType::Connect4),
    ("connect6", AttachType::Connect6),
];

/// How long entries of a replaced generation stay: verdicts that began with it must still find them.
const GENERATION_GRACE: Duration = Duration::from_secs(1);

/// Where the kernel side lives.
#[derive(Clone, Debug)]
pub struct Config {
    /// Directory on a bpffs; one per agent of a machine.
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
    /// Plaintext verdicts are given by the agent.
    pub plaintext_by_agent: bool,
}

/// The loaded programs and the maps' writing side. One per agent; not shared.
pub struct Datapath {
    config: Config,
    dir: PathBuf,
    /// Kept loaded: the pinned links hold the programs, this holds the handle for pods to come.
    ebpf: Ebpf,
    logger: Option<EbpfLogger<&'static dyn log::Log>>,
    pods: BpfHashMap<MapData, u64, PodValue>,
    addrs: BpfHashMap<MapData, Addr, PodAddrValue>,
    modes: BpfHashMap<MapData, ModeKey, ModeValue>,
    listeners: SockHash<MapData, ListenerKey>,
    verdicts: PerCpuHashMap<MapData, VerdictKey, u64>,
    heartbeat: Array<MapData, HeartbeatValue>,
    settings: Array<MapData, SettingsValue>,
    retired: Vec<(Instant, ModeKey)>,
    /// Held while this agent owns the pin directory.
    _lock: File,
}

impl Datapath {
    /// Loads the object and attaches it to the node's cgroup, replacing what an earlier agent left.
    ///
    /// # Errors
    /// One line that says which step failed, with the verifier's log where a program was refused. Another live agent on
    /// the same pin directory is an error too.
    pub fn load(config: Config) -> anyhow::Result<Self> {
        let dir = config.pin_dir.join(format!("v{LAYOUT_VERSION}"));
        let links = dir.join("links");
        fs::create_dir_all(&links).with_context(|| {
            format!("create {} (is a bpffs mounted there? `mount -t bpf bpf /sys/fs/bpf`)", links.display())
        })?;
        let lock = lock(&dir)?;
        let mut loader = EbpfLoader::new();
        for map in MAPS {
            loader.map_pin_path(map, dir.join(map));
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
        for (name, kind) in CGROUP_PROGRAMS {
            attach(&links.join(name), program_fd(&ebpf, name)?, cgroup.as_fd(), kind, |target| {
                target == Target::Cgroup(cgroup_id)
            })
            .with_context(|| format!("attach {name} to {}", config.cgroup_root.display()))?;
        }
        let mut datapath = Self {
            pods: typed(&mut ebpf, "PODS")?,
            addrs: typed(&mut ebpf, "POD_ADDRS")?,
            modes: typed(&mut ebpf, "MODES")?,
            listeners: typed(&mut ebpf, "LISTENERS")?,
            verdicts: typed(&mut ebpf, "VERDICTS")?,
            heartbeat: typed(&mut ebpf, "HEARTBEAT")?,
            settings: typed(&mut ebpf, "SETTINGS")?,
            ebpf,
            logger,
            dir,
            config,
            retired: Vec::new(),
            _lock: lock,
        };
        datapath.renew_pod_links()?;
        Ok(datapath)
    }

    /// Directory of the pinned maps, for messages and tools.
    pub fn pin_dir(&self) -> &Path {
        &self.dir
    }

    /// Highest policy generation that any pod's entry carries: a new agent continues from there, so that entries of the
    /// past are never taken for its own.
    pub fn last_generation(&self) -> u32 {
        self.pods.iter().filter_map(Result::ok).map(|(_, pod)| pod.generation).max().unwrap_or(0)
    }

    /// Network namespaces that have an entry: what an earlier agent enrolled.
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
        let inode = netns_inode(netns)?;
        let path = self.pod_link(cookie);
        attach(&path, program_fd(&self.ebpf, "inbound")?, netns, AttachType::SkLookup, |target| {
            target == Target::Netns(inode)
        })
        .with_context(|| format!("attach the inbound program to network namespace {inode}"))?;
        self.write_addrs(cookie, ips)
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
    /// The ports of the new generation are written first; one write of the pod's entry switches to them; those of the
    /// old one are removed after a grace ([`Datapath::maintain`]). Ports that do not fit make the agent decide about the
    /// pod's plaintext.
    ///
    /// # Errors
    /// The entry could not be written; the pod keeps what was in force.
    pub fn ready(&mut self, cookie: NetnsCookie, policy: &PodPolicy) -> anyhow::Result<()> {
        let before =
            self.pod(cookie)?.ok_or_else(|| anyhow!("pod of namespace cookie {} was not prepared", cookie.0))?;
        let old: Vec<ModeKey> = self.mode_keys(cookie, |key| key.generation != policy.generation);
        let same_generation = before.state == PodState::Ready as u8 && before.generation == policy.generation;
        let value = match self.write_ports(cookie, policy) {
            Ok(()) => PodValue {
                generation: policy.generation,
                rule: policy.rule,
                state: PodState::Ready as u8,
                mode: policy.mode as u8,
                has_port_modes: u8::from(!policy.ports.is_empty()),
                plaintext_by_agent: u8::from(policy.plaintext_by_agent),
                ..before
            },
            Err(error) => {
                warn!(
                    cookie = cookie.0,
                    ports = policy.ports.len(),
                    error = format!("{error:#}"),
                    "a pod's policy does not fit into the kernel: the agent gives its verdicts on plaintext"
                );
                self.remove_ports(cookie, policy.generation);
                PodValue {
                    generation: policy.generation,
                    rule: policy.rule,
                    state: PodState::Ready as u8,
                    // Whatever the mode, the agent sees the connection, and refuses by the whole policy.
                    mode: Mode::Permissive as u8,
                    has_port_modes: 0,
                    plaintext_by_agent: 1,
                    ..before
                }
            }
        };
        if !same_generation || value != before {
            self.write_pod(cookie, &value)?;
        }
        let now = Instant::now();
        self.retired.extend(old.into_iter().map(|key| (now, key)));
        Ok(())
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

    /// Takes a pod out: first its program, so that nothing is judged by half an entry, then its entries.
    ///
    /// # Errors
    /// The first thing that could not be removed; the rest is tried all the same.
    pub fn remove(&mut self, cookie: NetnsCookie) -> anyhow::Result<()> {
        let path = self.pod_link(cookie);
        let detached = sys::open_pinned(&path).and_then(|link| sys::link_detach(link.as_fd()));
        let mut result = ignore_absent(detached).context("detach the inbound program");
        result = result.and(ignore_absent(fs::remove_file(&path)).context("unpin the inbound program"));
        let addrs: Vec<Addr> = self.addrs_of(cookie);
        result = result.and(ignore_missing(self.pods.remove(&cookie.0)).context("remove from PODS"));
        for addr in addrs {
            result = result.and(ignore_missing(self.addrs.remove(&addr)).context("remove from POD_ADDRS"));
        }
        for key in self.mode_keys(cookie, |_| true) {
            result = result.and(ignore_missing(self.modes.remove(&key)).context("remove from MODES"));
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

    /// Once a second: removes what a replaced generation left, and hands the kernel programs' log lines on.
    pub fn maintain(&mut self) {
        if let Some(logger) = &mut self.logger {
            logger.flush();
        }
        let now = Instant::now();
        let (due, kept) = self.retired.drain(..).partition(|(at, _)| now.duration_since(*at) >= GENERATION_GRACE);
        self.retired = kept;
        let due: Vec<(Instant, ModeKey)> = due;
        for (_, key) in due {
            let current = self.pod(NetnsCookie(key.netns_cookie)).ok().flatten();
            if current.is_none_or(|pod| pod.generation != key.generation) {
                // Already gone is as good.
                let _ = self.modes.remove(&key);
            }
        }
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
        let map = MapData::from_pin(self.dir.join("EVENTS")).context("open EVENTS")?;
        Ok(Events { ring: RingBuf::try_from(Map::RingBuf(map)).context("open EVENTS")? })
    }

    /// The map of socket storage, for `sock_diag` to show its values.
    ///
    /// # Errors
    /// The pinned map could not be opened.
    pub fn storage_fd(&self) -> anyhow::Result<OwnedFd> {
        sys::open_pinned(&self.dir.join("SOCKETS")).context("open SOCKETS")
    }

    /// A worker's own view of the maps that it needs for each connection.
    ///
    /// # Errors
    /// A pinned map could not be opened.
    pub fn sockets(&self) -> anyhow::Result<Sockets> {
        Sockets::open(&self.dir)
    }

    fn write_ports(&mut self, cookie: NetnsCookie, policy: &PodPolicy) -> anyhow::Result<()> {
        for (&port, &(mode, rule)) in &policy.ports {
            let key = ModeKey { netns_cookie: cookie.0, generation: policy.generation, port, _pad: 0 };
            self.modes
                .insert(key, ModeValue { rule, mode: mode as u8, _pad: [0; 3] }, 0)
                .with_context(|| format!("write MODES for port {port} (the map holds 65536 ports)"))?;
        }
        Ok(())
    }

    fn remove_ports(&mut self, cookie: NetnsCookie, generation: u32) {
        for key in self.mode_keys(cookie, |key| key.generation == generation) {
            // What is left is never looked up: the pod's entry says so.
            let _ = self.modes.remove(&key);
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
        let keys = self.modes.keys().filter_map(Result::ok);
        keys.filter(|key| key.netns_cookie == cookie.0 && keep(key)).collect()
    }

    fn pod_link(&self, cookie: NetnsCookie) -> PathBuf {
        self.dir.join("links").join(format!("inbound_{}", cookie.0))
    }

    /// Gives the pods that an earlier agent enrolled this agent's program, and drops links of namespaces that are gone.
    fn renew_pod_links(&mut self) -> anyhow::Result<()> {
        let links = self.dir.join("links");
        let prog = program_fd(&self.ebpf, "inbound")?;
        for entry in fs::read_dir(&links).with_context(|| format!("list {}", links.display()))? {
            let path = entry.context("list pinned links")?.path();
            if !path.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.starts_with("inbound_")) {
                continue;
            }
            let link = sys::open_pinned(&path).with_context(|| format!("open {}", path.display()))?;
            match sys::link_target(link.as_fd()) {
                Ok(Target::Netns(inode)) if inode != 0 => {
                    sys::link_update(link.as_fd(), prog)
                        .with_context(|| format!("replace the program of {}", path.display()))?;
                }
                _ => ignore_absent(fs::remove_file(&path)).with_context(|| format!("unpin {}", path.display()))?,
            }
        }
        Ok(())
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

fn lock(dir: &Path) -> anyhow::Result<File> {
    // bpffs knows no ordinary files: the lock is on the directory itself.
    let file = File::open(dir).with_context(|| format!("open {}", dir.display()))?;
    // SAFETY: plain system call on a descriptor that we own.
    let result = unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) };
    if result != 0 {
        let error = io::Error::last_os_error();
        if error.kind() == io::ErrorKind::WouldBlock {
            bail!("another agent uses {}: stop it, or choose another --pin-dir", dir.display());
        }
        return Err(error).with_context(|| format!("lock {}", dir.display()));
    }
    Ok(file)
}

fn load_programs(ebpf: &mut Ebpf) -> anyhow::Result<()> {
    for name in ["connect4", "connect6", "peername4", "peername6"] {
        let program: &mut CgroupSockAddr = program(ebpf, name)?;
        program.load().with_context(|| format!("the kernel refused program {name}"))?;
    }
    let handshake: &mut SockOps = program(ebpf, "handshake")?;
    handshake.load().context("the kernel refused program handshake")?;
    let inbound: &mut SkLookup = program(ebpf, "inbound")?;
    inbound.load().context("the kernel refused program inbound")
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
            if right(sys::link_target(link.as_fd()).context("look at the pinned link")?) {
                return sys::link_update(link.as_fd(), prog).context("replace the program of the pinned link");
            }
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error).context("open the pinned link"),
    }
    let link = sys::link_create(prog, target, kind).context("create a link")?;
    sys::pin_over(&link, path).context("pin the link")
}

fn netns_inode(netns: BorrowedFd<'_>) -> anyhow::Result<u32> {
    let file = File::from(netns.try_clone_to_owned().context("duplicate a namespace handle")?);
    let inode = file.metadata().context("stat of a network namespace")?.ino();
    u32::try_from(inode).context("inode of a network namespace")
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
