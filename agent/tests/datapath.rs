//! The kernel programs in the real kernel: real sockets in real network namespaces, judged by real maps.
//!
//! Needs root, cgroup2, `ip`, `nft` and `bpftool`. Everything is made under names with this process's id and removed at the end.
#![expect(clippy::expect_used, reason = "a test says what it expected")]
#![expect(clippy::disallowed_methods, reason = "a test awaits what it has started, or ends with it")]

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, ErrorKind, Read, Write},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::{AsFd, AsRawFd},
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use aya::maps::{HashMap as BpfHashMap, LpmTrie, Map, MapData, SockHash};
use culvert::{
    connections::{Occasion, Passed},
    datapath::{Config, Datapath, Leg, NetnsCookie, Plaintext, PodPolicy, Predecessor, Turn, inspect},
    limits::{Limits, Numbers},
    model::PodUid,
    netns::NetnsHandle,
    pods::{CgroupDir, CgroupId, Hierarchy},
    policy::{self, Decision, Options, RuleId, Snapshot, Table},
    proxy::ServedPod,
    source::review::Manifests,
    telemetry::{access, limit::Limit, open::Registry, traffic::Names},
};
use culvert_common::{
    Addr, Answer, Asked, Authorization, AuthorizationKey, AuthorizationValue, ClassValue, Direction, Event, EventKind,
    FlowKey, FlowKind, FlowValue, GateValue, Inputs, LAYOUT_VERSION, ListenerKey, ListenerKind, Mode, ModeKey,
    ModeValue, PORT_HBONE, Peer, PodAddrValue, PodState, PodValue, PortKey, PortValue, REDIRECT_PORT_COUNT,
    REDIRECT_PORT_FIRST, Reason, SettingsValue, SourceKey, VethValue, bucket, decide, gate::Class,
};
use nix::sched::{CloneFlags, setns};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

const POD4: &str = "10.99.0.2";
const POD6: &str = "fd99::2";
const PEER4: &str = "10.99.0.1";
const PEER6: &str = "fd99::1";

/// One at a time: the cgroup of a process belongs to all of its threads.
static ONE: Mutex<()> = Mutex::new(());
static COUNT: AtomicU32 = AtomicU32::new(0);

fn run(command: &str) {
    let mut words = command.split_whitespace();
    let output = Command::new(words.next().expect("a command")).args(words).output().expect("start the command");
    assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
}

fn cgroup_mount() -> PathBuf {
    let mounts = fs::read_to_string("/proc/self/mounts").expect("read mounts");
    let line = mounts.lines().find(|line| line.split(' ').nth(2) == Some("cgroup2")).expect("cgroup2 is mounted");
    line.split(' ').nth(1).expect("a mount point").into()
}

/// A node with one pod, joined to a peer's namespace by a veth pair; both dual stack.
struct Node {
    name: String,
    cgroup: PathBuf,
    bpffs: PathBuf,
    pod: File,
    peer: File,
    cookie: NetnsCookie,
    _one: MutexGuard<'static, ()>,
}

impl Node {
    fn new() -> Self {
        let one = ONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let name = format!("cvt{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let (pod, peer) = (format!("{name}-pod"), format!("{name}-peer"));
        for namespace in [&pod, &peer] {
            run(&format!("ip netns add {namespace}"));
            run(&format!("ip -n {namespace} link set lo up"));
        }
        run(&format!("ip link add eth0 netns {pod} type veth peer name eth0 netns {peer}"));
        for (namespace, v4, v6) in [(&pod, POD4, POD6), (&peer, PEER4, PEER6)] {
            run(&format!("ip -n {namespace} addr add {v4}/24 dev eth0"));
            run(&format!("ip -n {namespace} addr add {v6}/64 dev eth0 nodad"));
            run(&format!("ip -n {namespace} link set eth0 up"));
        }
        let cgroup = cgroup_mount().join(&name);
        for child in ["agent", "kubelet"] {
            fs::create_dir_all(cgroup.join(child)).expect("make a cgroup");
        }
        join(&cgroup.join("agent"));
        let bpffs = PathBuf::from(format!("/run/{name}-bpf"));
        fs::create_dir_all(&bpffs).expect("make a mount point");
        run(&format!("mount -t bpf bpf {}", bpffs.display()));
        let pod = File::open(format!("/run/netns/{pod}")).expect("open the pod's namespace");
        let peer = File::open(format!("/run/netns/{peer}")).expect("open the peer's namespace");
        let cookie = within(&pod, || netns_cookie(&Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket")));
        Self { name, cgroup, bpffs, pod, peer, cookie, _one: one }
    }

    fn load(&self) -> Datapath {
        let mut datapath = self.load_next();
        assert!(datapath.take_over().expect("attached").is_empty());
        datapath
    }

    /// Loaded, and nothing attached.
    fn load_next(&self) -> Datapath {
        load_at(Config { pin_dir: self.bpffs.join("culvert"), cgroup_root: self.cgroup.clone(), workers: 1 })
    }

    /// A node whose pod is enrolled, ready and alive, with an outbound listener.
    fn enrolled(&self, mode: Mode) -> (Datapath, TcpListener) {
        let (mut datapath, listener) = self.enrolled_next(mode);
        assert!(datapath.take_over().expect("attached").is_empty());
        (datapath, listener)
    }

    /// The same in the maps of an agent that does not serve yet.
    fn enrolled_next(&self, mode: Mode) -> (Datapath, TcpListener) {
        let mut datapath = self.load_next();
        let listener = self.enrol(&mut datapath, mode);
        (datapath, listener)
    }

    fn enrol(&self, datapath: &mut Datapath, mode: Mode) -> TcpListener {
        self.prepare(datapath);
        let listener = self.listener();
        datapath.listener(self.cookie, ListenerKind::Outbound, 0, listener.as_fd()).expect("the listener is taken");
        datapath.ready(self.cookie, &policy(1, mode)).expect("the policy is taken");
        datapath.beat().expect("beat");
        listener
    }

    fn prepare(&self, datapath: &mut Datapath) {
        let ips: Vec<IpAddr> = [POD4, POD6].iter().map(|ip| ip.parse().expect("a literal")).collect();
        datapath.prepare(self.cookie, self.pod.as_fd(), &ips).expect("the pod is prepared");
    }

    /// As the agent makes them: dual stack. (Bound to `::1` the kernel would make it IPv6-only.)
    fn listener(&self) -> TcpListener {
        within(&self.pod, || {
            let socket = Socket::new(Domain::IPV6, Type::STREAM, Some(Protocol::TCP)).expect("a socket");
            socket.set_only_v6(false).expect("dual stack");
            socket.set_reuse_address(true).expect("an option");
            socket.bind(&SockAddr::from("[::]:0".parse::<SocketAddr>().expect("a literal"))).expect("bind");
            socket.listen(128).expect("listen");
            socket.into()
        })
    }

    fn serve(&self, addr: &str) -> TcpListener {
        within(&self.pod, || TcpListener::bind(addr).expect("the application listens"))
    }

    fn dial_from_pod(&self, addr: &str) -> io::Result<TcpStream> {
        within(&self.pod, || connect(addr))
    }

    fn dial_from_peer(&self, addr: &str) -> io::Result<TcpStream> {
        within(&self.peer, || connect(addr))
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        join(&cgroup_mount());
        let _ = Command::new("umount").arg(&self.bpffs).status();
        let _ = fs::remove_dir(&self.bpffs);
        for namespace in ["pod", "peer"] {
            let _ = Command::new("ip").args(["netns", "del", &format!("{}-{namespace}", self.name)]).status();
        }
        remove_cgroups(&self.cgroup);
    }
}

/// A cgroup and those below it; no process is in them.
fn remove_cgroups(cgroup: &Path) {
    for entry in fs::read_dir(cgroup).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_cgroups(&entry.path());
        }
    }
    let _ = fs::remove_dir(cgroup);
}

fn load_at(config: Config) -> Datapath {
    let turn = Turn::try_take(&config.pin_dir).expect("a bpffs").expect("nobody else prepares");
    Datapath::load(config, turn).expect("the object loads")
}

fn join(cgroup: &Path) {
    fs::write(cgroup.join("cgroup.procs"), std::process::id().to_string()).expect("join a cgroup");
}

fn within<T: Send>(namespace: &File, work: impl FnOnce() -> T + Send) -> T {
    thread::scope(|scope| {
        scope
            .spawn(|| {
                setns(namespace, CloneFlags::CLONE_NEWNET).expect("enter the namespace");
                work()
            })
            .join()
            .expect("the work is done")
    })
}

fn netns_cookie(socket: &impl AsRawFd) -> NetnsCookie {
    let (mut cookie, mut len) = (0u64, 8 as libc::socklen_t);
    // SAFETY: SO_NETNS_COOKIE writes eight bytes.
    let result =
        unsafe { libc::getsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, 71, (&raw mut cookie).cast(), &raw mut len) };
    assert_eq!(result, 0);
    NetnsCookie(cookie)
}

fn connect(addr: &str) -> io::Result<TcpStream> {
    TcpStream::connect_timeout(&addr.parse().expect("a literal"), Duration::from_secs(3))
}

fn refused<T>(result: io::Result<T>) -> bool {
    matches!(result, Err(error) if error.kind() == ErrorKind::ConnectionRefused)
}

fn policy(generation: u32, mode: Mode) -> PodPolicy {
    let plaintext = Plaintext::Passed;
    PodPolicy { generation, mode, rule: 0, ports: BTreeMap::new(), plaintext, udp_refused: false }
}

fn counted(datapath: &Datapath, cookie: NetnsCookie, direction: Direction, answer: Answer, reason: Reason) -> u64 {
    let matches = |key: &culvert_common::VerdictKey| {
        (key.netns_cookie, key.direction, key.answer, key.reason)
            == (cookie.0, direction as u8, answer as u8, reason as u8)
    };
    datapath.verdicts().iter().filter(|(key, _)| matches(key)).map(|(_, count)| count).sum()
}

#[test]
fn outbound_is_captured_with_its_original_destination_in_both_families() {
    let node = Node::new();
    let (datapath, listener) = node.enrolled(Mode::Permissive);
    let sockets = datapath.sockets().expect("the worker's maps");
    for target in ["10.200.0.9:8080", "[fd00::9]:8081", "[::ffff:10.200.0.9]:8082"] {
        let client = node.dial_from_pod(target).expect("captured, so it connects although nobody is there");
        let (accepted, _) = listener.accept().expect("the agent's listener gets it");
        let want: SocketAddr = target.parse().expect("a literal");
        let original = sockets.original_destination(&accepted).expect("recorded");
        assert_eq!((original.ip(), original.port()), (want.ip().to_canonical(), want.port()), "{target}");
        let shown = client.peer_addr().expect("getpeername");
        assert_eq!((shown.ip().to_canonical(), shown.port()), (want.ip().to_canonical(), want.port()), "{target}");
        let own = client.local_addr().expect("getsockname").ip().to_canonical();
        let expected = if want.ip().to_canonical().is_ipv4() { POD4 } else { POD6 };
        assert_eq!(own.to_string(), expected, "the pod keeps its own address");
    }
    assert_eq!(counted(&datapath, node.cookie, Direction::Outbound, Answer::Agent, Reason::Captured), 3);
}

/// What crosses nothing but the pod's loopback device must not be paced.
#[test]
fn connections_between_application_and_agent_have_reno_and_others_the_nodes_default() {
    let node = Node::new();
    let (datapath, listener) = node.enrolled(Mode::Permissive);
    let control = |socket: &TcpStream| {
        let name = socket2::SockRef::from(socket).tcp_congestion().expect("an option");
        String::from_utf8_lossy(&name).trim_end_matches('\0').to_owned()
    };
    let own = fs::read_to_string("/proc/sys/net/ipv4/tcp_congestion_control").expect("the node's default");
    let captured = node.dial_from_pod("10.200.0.9:8080").expect("captured");
    let (accepted, _) = listener.accept().expect("the agent's listener gets it");
    assert_eq!([control(&captured), control(&accepted)], ["reno", "reno"]);
    let application = node.serve("10.99.0.2:9080");
    let client = node.dial_from_peer("10.99.0.2:9080").expect("plaintext is allowed");
    let (served, _) = application.accept().expect("passed by the kernel");
    assert_eq!([control(&client), control(&served)], [own.trim(), own.trim()]);
    drop(datapath);
}

/// A connection that is rewritten to its own address and port is one with itself: it opens, and the application reads
/// what it has written. Neither source ports from anywhere in the range that a pod may choose for itself, nor reserved
/// ones that an application binds to, may meet the redirected ports.
#[test]
fn a_captured_connection_never_reaches_itself() {
    let node = Node::new();
    let (mut datapath, listener) = node.enrolled(Mode::Permissive);
    listener.set_nonblocking(true).expect("a flag");
    let arrives = |client: Socket| {
        client.connect(&SockAddr::from("10.200.0.9:8080".parse::<SocketAddr>().expect("a literal")))?;
        let until = Instant::now() + Duration::from_secs(3);
        while let Err(error) = listener.accept() {
            assert_eq!(error.kind(), ErrorKind::WouldBlock);
            assert!(Instant::now() < until, "from {:?}: nobody accepts", client.local_addr());
        }
        // Its port is free again at once.
        client.set_linger(Some(Duration::ZERO))
    };
    let client = || Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP)).expect("a socket");
    for range in ["61000 65095", "1024 5119"] {
        for _ in 0..20 {
            datapath.beat().expect("beat");
            within(&node.pod, || {
                fs::write("/proc/sys/net/ipv4/ip_local_port_range", range).expect("a range of the pod's own");
                for _ in 0..1000 {
                    arrives(client()).expect("captured");
                }
            });
        }
    }
    for _ in 0..10 {
        datapath.beat().expect("beat");
        within(&node.pod, || {
            for port in 512..1024 {
                let client = client();
                client.set_reuse_address(true).expect("an option");
                let source: SocketAddr = format!("{POD4}:{port}").parse().expect("an address");
                client.bind(&source.into()).expect("a reserved port");
                arrives(client).expect("captured");
            }
        });
    }
}

/// The redirected ports are no ports that an application could not have: the agent's end of a captured connection is at
/// one of them, and a server that starts meanwhile listens there.
#[test]
fn an_application_listens_on_a_port_that_a_captured_connection_has() {
    let node = Node::new();
    let (_datapath, listener) = node.enrolled(Mode::Permissive);
    let _client = node.dial_from_pod("10.200.0.9:8080").expect("captured");
    let (accepted, _) = listener.accept().expect("the agent's listener gets it");
    let port = accepted.local_addr().expect("bound").port();
    assert!((REDIRECT_PORT_FIRST..REDIRECT_PORT_FIRST + REDIRECT_PORT_COUNT).contains(&port), "{port}");
    // std's listeners say SO_REUSEADDR, as servers do.
    let application = node.serve(&format!("0.0.0.0:{port}"));
    let _local = node.dial_from_pod(&format!("{POD4}:{port}")).expect("connected");
    application.accept().expect("the application gets its own");
}

/// What leaves the pod by its veth has been captured, or is the agent's own: across a change of agents, with none, and with
/// one that does not know the pod. A pod that is out is untouched.
#[test]
fn only_the_agents_sockets_begin_connections_that_leave_the_pod() {
    let node = Node::new();
    let _server = within(&node.peer, || TcpListener::bind("[::]:9080").expect("a server outside"));
    let name = std::ffi::CString::new("eth0").expect("no NUL");
    // SAFETY: the name ends with NUL.
    let veth = within(&node.peer, || unsafe { libc::if_nametoindex(name.as_ptr()) });
    assert!(veth > 0);
    let dial = |to: &str, prepare: &mut dyn FnMut(&Socket)| {
        let to: SocketAddr = to.parse().expect("a literal");
        let client = within(&node.pod, || Socket::new(Domain::for_address(to), Type::STREAM, None).expect("a socket"));
        prepare(&client);
        client.connect_timeout(&to.into(), Duration::from_millis(700))
    };
    let targets = [format!("{PEER4}:9080"), format!("[{PEER6}]:9080")];
    // As a process that no program of the node's cgroup sees.
    let stray = || {
        join(&cgroup_mount());
        let results = targets.each_ref().map(|to| dial(to, &mut |_| {}).is_ok());
        join(&node.cgroup.join("agent"));
        results
    };
    let own = |datapath: &Datapath| {
        let mut sockets = datapath.sockets().expect("the worker's maps");
        targets.each_ref().map(|to| dial(to, &mut |client| sockets.mark(client).expect("marked")).is_ok())
    };
    let refusals =
        |datapath: &Datapath| counted(datapath, node.cookie, Direction::Outbound, Answer::Refuse, Reason::NotCaptured);

    let (mut first, _listener) = node.enrolled(Mode::Permissive);
    // A fresh link takes a second or two for its neighbours.
    let until = Instant::now() + Duration::from_secs(20);
    while stray() != [true, true] {
        assert!(Instant::now() < until, "nothing is looked at yet, or this test shows nothing");
    }
    within(&node.peer, || first.guard(node.cookie, &[veth], false)).expect("attached");
    assert_eq!((stray(), own(&first)), ([false, false], [true, true]));
    assert!(refusals(&first) >= 2);

    let (mut second, _other) = node.enrolled_next(Mode::Permissive);
    within(&node.peer, || {
        second.guard(node.cookie, &[veth], false).expect("written");
        assert!(second.take_over().expect("attached").is_empty());
    });
    assert_eq!((stray(), own(&second)), ([false, false], [true, true]));
    assert!(refusals(&second) >= 2, "its own maps are asked now");
    drop((first, second));
    assert_eq!(stray(), [false, false], "without an agent");

    let mut third = node.load_next();
    within(&node.peer, || assert!(third.take_over().expect("attached").is_empty()));
    assert_eq!(stray(), [false, false], "the next agent does not know the pod");
    within(&node.peer, || third.remove(node.cookie)).expect("removed");
    assert_eq!(stray(), [true, true], "out of the mesh");
}

/// The pods' common cgroup with one pod in it, whose container calls and is called; the peer's namespace is the node's own.
struct Gated<'a> {
    node: &'a Node,
    root: CgroupDir,
    pod: CgroupId,
    container: PathBuf,
}

impl<'a> Gated<'a> {
    /// `path`: of the pod, below the common cgroup.
    fn new(node: &'a Node, path: &str) -> Self {
        let root = node.cgroup.join("kubepods");
        let (pod, container) = (root.join(path), root.join(path).join("container"));
        fs::create_dir_all(&container).expect("make a cgroup");
        let root = Hierarchy::of(&root).expect("on cgroup2").dir(&root).expect("there");
        Self { node, root, pod: CgroupId::of_path(&pod).expect("there"), container }
    }

    /// An agent that has been told of the node, and not of the pod.
    fn load(&self) -> Datapath {
        let mut datapath = self.node.load_next();
        let own =
            within(&self.node.peer, || netns_cookie(&Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket")));
        let settings = SettingsValue { host_netns_cookie: own.0, ..SettingsValue::default() };
        datapath.settings(settings).expect("written");
        let addresses = [PEER4, PEER6].iter().map(|ip| ip.parse().expect("a literal")).collect();
        datapath.node_addresses(&addresses).expect("written");
        datapath.beat().expect("beat");
        datapath
    }

    /// As a process of the container.
    fn inside<T>(&self, work: impl FnOnce() -> T) -> T {
        join(&self.container);
        let value = work();
        join(&self.node.cgroup.join("agent"));
        value
    }

    /// Whether connections get out, in both families; a refusal is EPERM and nothing else.
    fn gets_out(&self) -> [bool; 2] {
        [format!("{PEER4}:9080"), format!("[{PEER6}]:9080")].map(|to| {
            match self.inside(|| self.node.dial_from_pod(&to)) {
                Ok(_) => true,
                Err(error) => {
                    assert_eq!(error.raw_os_error(), Some(libc::EPERM), "{to}: {error}");
                    false
                }
            }
        })
    }

    /// Whether connections get in, in both families; one that does not hears nothing.
    fn gets_in(&self) -> [bool; 2] {
        [format!("{POD4}:9080"), format!("[{POD6}]:9080")].map(|to| {
            let to: SocketAddr = to.parse().expect("a literal");
            match within(&self.node.peer, || TcpStream::connect_timeout(&to, Duration::from_millis(400))) {
                Ok(_) => true,
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::TimedOut, "{to}: {error}");
                    false
                }
            }
        })
    }
}

/// [K.4]: closed in both directions and families until somebody says what the pod is, with no agent too; the node, what is
/// inside the pod, what is established and the agent itself are not disturbed.
#[test]
fn a_pod_that_no_agent_has_classified_is_held() {
    let node = Node::new();
    let held = |datapath: &Datapath, direction| {
        counted(datapath, NetnsCookie(0), direction, Answer::Refuse, Reason::PodUnknown)
    };
    // Below a class, and beside the classes.
    for path in ["burstable/pod1", "pod2"] {
        let gated = Gated::new(&node, path);
        let server = gated.inside(|| node.serve("[::]:9080"));
        // As a static pod has it: in the pods' cgroup, and in the node's namespace.
        let of_node =
            gated.inside(|| within(&node.peer, || TcpListener::bind("[::]:9080").expect("a server of the node")));
        let until = Instant::now() + Duration::from_secs(20);
        let open = || {
            [format!("{PEER4}:9080"), format!("[{PEER6}]:9080")].iter().all(|to| node.dial_from_pod(to).is_ok())
                && [format!("{POD4}:9080"), format!("[{POD6}]:9080")].iter().all(|to| node.dial_from_peer(to).is_ok())
        };
        while !open() {
            assert!(Instant::now() < until, "nothing is attached yet, or this test shows nothing");
        }
        assert_eq!((gated.gets_out(), gated.gets_in()), ([true; 2], [true; 2]));
        let mut before = node.dial_from_peer(&format!("{POD4}:9080")).expect("open");
        let mut served = loop {
            let (served, from) = server.accept().expect("accepted");
            if from.port() == before.local_addr().expect("bound").port() {
                break served;
            }
        };

        let mut datapath = gated.load();
        datapath.gate(Some(std::slice::from_ref(&gated.root))).expect("written");
        assert_eq!((gated.gets_out(), gated.gets_in()), ([true; 2], [true; 2]), "nothing before it serves");
        assert!(datapath.take_over().expect("attached").is_empty());
        assert_eq!((gated.gets_out(), gated.gets_in()), ([false; 2], [false; 2]));
        assert_eq!(held(&datapath, Direction::Outbound), 2, "each once");
        assert!(held(&datapath, Direction::Inbound) >= 2, "each SYN");
        // What goes on, what stays inside, and what is the node's.
        before.write_all(b"on").expect("established");
        served.read_exact(&mut [0; 2]).expect("established");
        for to in ["127.0.0.1:9080", "[::1]:9080", "[::ffff:127.0.0.1]:9080"] {
            gated.inside(|| node.dial_from_pod(to)).expect(to);
        }
        for to in [format!("{PEER4}:9080"), format!("[{PEER6}]:9080")] {
            gated.inside(|| node.dial_from_peer(&to)).expect("a socket of the node's own namespace");
        }
        let sockets = &mut datapath.sockets().expect("the worker's maps");
        let own =
            gated.inside(|| within(&node.pod, || Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket")));
        sockets.mark(&own).expect("marked");
        let to: SocketAddr = format!("{PEER4}:9080").parse().expect("a literal");
        gated.inside(|| own.connect(&to.into())).expect("the agent's own socket");
        assert_eq!(held(&datapath, Direction::Outbound), 2, "none of these");

        datapath.classify(&BTreeMap::from([(gated.pod, Class::Out)])).expect("written");
        assert_eq!((gated.gets_out(), gated.gets_in()), ([true; 2], [true; 2]), "out of the mesh");
        drop(datapath);
        assert_eq!((gated.gets_out(), gated.gets_in()), ([true; 2], [true; 2]), "known, without an agent");
        let later = Gated::new(&node, "besteffort/pod3");
        assert_eq!(later.gets_out(), [false; 2], "unknown, without an agent");
        drop(server);
        let other = later.inside(|| node.serve("[::]:9080"));
        assert_eq!(later.gets_in(), [false; 2], "unknown, without an agent");

        // The next agent, which has not found the common cgroup: what its predecessor held is held by it.
        let mut next = gated.load();
        assert!(next.take_over().expect("attached").is_empty());
        assert_eq!((later.gets_out(), later.gets_in()), ([false; 2], [false; 2]));
        assert!(held(&next, Direction::Outbound) == 2 && held(&next, Direction::Inbound) >= 2, "by its own programs");
        // --gate=open
        next.gate(None).expect("detached");
        assert_eq!((later.gets_out(), later.gets_in()), ([true; 2], [true; 2]), "open");
        next.gate(Some(std::slice::from_ref(&gated.root))).expect("attached while it serves");
        assert_eq!((later.gets_out(), later.gets_in()), ([false; 2], [false; 2]), "closed again");
        fs::remove_file(node.bpffs.join("culvert/links").join(format!("gate4_{}", gated.root.id.0))).expect("unpinned");
        let until = Instant::now() + Duration::from_secs(20);
        while later.gets_out() != [false; 2]
            || !node.bpffs.join(format!("culvert/links/gate4_{}", gated.root.id.0)).exists()
        {
            next.maintain();
            assert!(Instant::now() < until, "a link that somebody removed is put back");
            thread::sleep(Duration::from_millis(20));
        }
        next.gate(None).expect("detached");
        drop((next, other, of_node));
        remove_cgroups(&node.cgroup.join("kubepods"));
    }
}

/// [K.4]: a pod of the mesh passes the gate only where the other programs know it: a namespace that it was given after the
/// agent had gone is held.
#[test]
fn a_pod_of_the_mesh_passes_the_gate_where_it_is_captured() {
    let node = Node::new();
    let gated = Gated::new(&node, "burstable/pod1");
    let _server = gated.inside(|| node.serve("[::]:9080"));
    let mut datapath = gated.load();
    datapath.gate(Some(std::slice::from_ref(&gated.root))).expect("written");
    datapath.classify(&BTreeMap::from([(gated.pod, Class::In)])).expect("written");
    assert!(datapath.take_over().expect("attached").is_empty());
    let until = Instant::now() + Duration::from_secs(20);
    while node.dial_from_pod(&format!("{PEER4}:1")).is_err_and(|error| error.kind() == ErrorKind::TimedOut) {
        assert!(Instant::now() < until, "a fresh link");
    }
    assert_eq!((gated.gets_out(), gated.gets_in()), ([false; 2], [false; 2]), "in no other map");
    let listener = node.enrol(&mut datapath, Mode::Permissive);
    let _client = gated.inside(|| node.dial_from_pod("10.200.0.9:80")).expect("captured");
    listener.accept().expect("the agent's listener gets it");
    assert_eq!(gated.gets_in(), [true; 2], "judged, and passed");
    // Refused by the next program: said once.
    datapath.suspend(node.cookie).expect("written");
    assert!(refused(gated.inside(|| node.dial_from_pod("10.200.0.9:80"))));
    datapath.classify(&BTreeMap::new()).expect("written");
    let error = gated.inside(|| node.dial_from_pod("10.200.0.9:80")).expect_err("held");
    assert_eq!(error.raw_os_error(), Some(libc::EPERM));
    let pending = counted(&datapath, node.cookie, Direction::Outbound, Answer::Refuse, Reason::EnrolmentPending);
    assert_eq!(pending, 1, "what the gate has refused is not judged again");
}

/// Specification §3: refused UDP is an errno of the call, counted once and by destination; DNS and what stays in the pod goes on.
/// A pod that the gate holds is treated so where the whole mesh is.
#[test]
fn refused_udp_is_an_errno() {
    let node = Node::new();
    let gated = Gated::new(&node, "burstable/pod1");
    let (mut datapath, _listener) = node.enrolled(Mode::Permissive);
    datapath.guard(node.cookie, &[], true).expect("written");
    let udp = |to: &str, connected: bool| {
        let to: SocketAddr = to.parse().expect("a literal");
        within(&node.pod, || {
            let socket = UdpSocket::bind(if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" })?;
            if connected {
                socket.connect(to)?;
                return socket.send(b"datagram");
            }
            socket.send_to(b"datagram", to)
        })
    };
    let passes = |to: &str, connected: bool| match udp(to, connected) {
        Ok(_) => true,
        Err(error) => {
            assert_eq!(error.raw_os_error(), Some(libc::EPERM), "{to}: {error}");
            false
        }
    };
    let own4 = format!("{POD4}:8125");
    let open = ["10.99.0.1:53", "[fd99::1]:53", "127.0.0.1:8125", "[::1]:8125", &own4];
    // A target each, so that each is counted apart.
    for connected in [false, true] {
        for to in open {
            assert!(passes(to, connected), "{to}");
        }
        for to in ["10.99.0.1:8125", "[fd99::1]:8125", "[::ffff:10.99.0.1]:8126"] {
            assert!(!passes(to, connected), "{to}");
        }
    }
    let refusals =
        |datapath: &Datapath| counted(datapath, node.cookie, Direction::Outbound, Answer::Refuse, Reason::UdpRefused);
    assert_eq!(refusals(&datapath), 6);
    let maps = inspect::read(datapath.pin_dir()).expect("read");
    for (addr, port) in [("10.99.0.1", 8125), ("fd99::1", 8125), ("10.99.0.1", 8126)] {
        let key = (Addr::from(addr.parse::<IpAddr>().expect("a literal")), port);
        let counted = maps.udp_refusals.iter().find(|(known, _)| (known.addr, known.port) == key);
        assert_eq!(counted.map(|(_, packets)| *packets), Some(2), "{key:?}");
    }
    datapath.ready(node.cookie, &policy(2, Mode::Permissive)).expect("generation 2");
    assert!(passes("10.99.0.1:8125", false) && passes("10.99.0.1:8125", true), "allowed again");
    datapath.ready(node.cookie, &PodPolicy { udp_refused: true, ..policy(3, Mode::Permissive) }).expect("generation 3");
    assert!(!passes("10.99.0.1:8125", false));
    // The next agent does not know the pod: refused like everything else.
    let mut next = gated.load();
    assert!(next.take_over().expect("attached").is_empty());
    assert!(!passes("10.99.0.1:8125", false) && !passes("10.99.0.1:8125", true));
    next.remove(node.cookie).expect("removed");
    assert!(passes("10.99.0.1:8125", false) && passes("10.99.0.1:8125", true), "out of the mesh");

    // At the gate: as the mesh says.
    next.gate(Some(std::slice::from_ref(&gated.root))).expect("attached");
    for connected in [false, true] {
        assert!(gated.inside(|| passes("10.99.0.1:8125", connected)), "UDP is allowed");
    }
    next.refuse_udp(NetnsCookie(0), true).expect("written");
    for connected in [false, true] {
        assert!(!gated.inside(|| passes("10.99.0.1:8125", connected)) && passes("10.99.0.1:8125", connected), "held");
        for to in open.iter().filter(|to| **to != own4) {
            assert!(gated.inside(|| passes(to, connected)), "{to}");
        }
    }
    next.classify(&BTreeMap::from([(gated.pod, Class::Out)])).expect("written");
    assert!(gated.inside(|| passes("10.99.0.1:8125", false) && passes("10.99.0.1:8125", true)), "known");
}

/// [K.4]: enrolled but not ready, no listener, silent; each with its own reason, and recovery without touching the pod.
#[test]
fn every_gap_of_the_agent_refuses_with_its_reason() {
    let node = Node::new();
    let application = node.serve("0.0.0.0:9080");
    let mut datapath = node.load();
    datapath.beat().expect("beat");
    node.prepare(&mut datapath);
    let count =
        |datapath: &Datapath, direction, reason| counted(datapath, node.cookie, direction, Answer::Refuse, reason);

    assert!(refused(node.dial_from_pod("10.200.0.9:80")), "pending");
    assert!(refused(node.dial_from_peer("10.99.0.2:9080")), "pending");
    assert_eq!(count(&datapath, Direction::Outbound, Reason::EnrolmentPending), 1);
    assert_eq!(count(&datapath, Direction::Inbound, Reason::EnrolmentPending), 1);

    datapath.ready(node.cookie, &policy(1, Mode::Permissive)).expect("ready");
    assert!(refused(node.dial_from_pod("10.200.0.9:80")), "no listener");
    assert_eq!(count(&datapath, Direction::Outbound, Reason::NoListener), 1);
    assert!(refused(node.dial_from_peer("10.99.0.2:15008")), "no listener");
    assert_eq!(count(&datapath, Direction::Inbound, Reason::NoListener), 1);
    node.dial_from_peer("10.99.0.2:9080").expect("plaintext needs no listener where it is allowed");

    let listener = node.listener();
    datapath.listener(node.cookie, ListenerKind::Outbound, 0, listener.as_fd()).expect("listener");
    node.dial_from_pod("10.200.0.9:80").expect("captured");

    datapath.silence().expect("silence");
    assert!(refused(node.dial_from_pod("10.200.0.9:80")), "silent");
    assert!(refused(node.dial_from_peer("10.99.0.2:9080")), "silent");
    assert_eq!(count(&datapath, Direction::Outbound, Reason::AgentSilent), 1);
    assert_eq!(count(&datapath, Direction::Inbound, Reason::AgentSilent), 1);

    datapath.beat().expect("beat");
    node.dial_from_pod("10.200.0.9:80").expect("back");
    node.dial_from_peer("10.99.0.2:9080").expect("back");
    drop(application);
}

/// The programs and maps stay when the agent is gone, and refuse; the kernel forgets a listener that is closed.
#[test]
fn a_dead_agent_leaves_the_pod_closed() {
    let node = Node::new();
    let application = node.serve("0.0.0.0:9080");
    let (datapath, listener) = node.enrolled(Mode::Strict);
    drop(listener);
    drop(datapath);
    assert!(refused(node.dial_from_pod("10.200.0.9:80")));
    assert!(refused(node.dial_from_peer("10.99.0.2:9080")));
    drop(application);
}

/// [PA.6], §5.3 and [K.2] in the kernel: the mode of the port decides; a port exception is an exception for that port.
#[test]
fn effective_mode_of_the_port_decides_inbound_plaintext() {
    let node = Node::new();
    let _applications = ["0.0.0.0:9080", "0.0.0.0:9443", "0.0.0.0:9444"].map(|addr| node.serve(addr));
    let _six = node.serve("[fd99::2]:9080");
    let (mut datapath, _listener) = node.enrolled(Mode::Strict);
    let reaches = |port: u16| !refused(node.dial_from_peer(&format!("10.99.0.2:{port}")));
    assert!(!reaches(9080));
    assert!(refused(node.dial_from_peer("[fd99::2]:9080")));
    let strict = |datapath: &Datapath| {
        counted(datapath, node.cookie, Direction::Inbound, Answer::Refuse, Reason::StrictRequiresMtls)
    };
    assert_eq!(strict(&datapath), 2);

    let ports = BTreeMap::from([(9443, (Mode::Permissive, 5)), (9444, (Mode::Disable, 5))]);
    datapath.ready(node.cookie, &PodPolicy { ports, ..policy(2, Mode::Strict) }).expect("generation 2");
    assert!(!reaches(9080) && reaches(9443) && reaches(9444));

    let ports = BTreeMap::from([(9443, (Mode::Strict, 6))]);
    datapath.ready(node.cookie, &PodPolicy { ports, ..policy(3, Mode::Permissive) }).expect("generation 3");
    assert!(reaches(9080) && !reaches(9443) && reaches(9444));
    assert!(!reaches(15001) && !reaches(15006), "[K.2]");
    assert_eq!(counted(&datapath, node.cookie, Direction::Inbound, Answer::Refuse, Reason::Loop), 2);

    // After the grace the old generations' ports are gone from the map, and nothing has changed.
    thread::sleep(Duration::from_millis(1100));
    datapath.maintain();
    assert!(reaches(9080) && !reaches(9443) && reaches(9444));
}

/// Allowed plaintext reaches the application itself, and its end is reported with bytes; no process was in between.
#[test]
fn plaintext_that_the_kernel_passes_is_accounted_for() {
    let node = Node::new();
    let application = node.serve("0.0.0.0:9080");
    let (mut datapath, _listener) = node.enrolled(Mode::Permissive);
    datapath.ready(node.cookie, &PodPolicy { rule: 9, ..policy(4, Mode::Permissive) }).expect("generation 4");
    let mut events = datapath.events().expect("the events");
    let mut client = node.dial_from_peer("10.99.0.2:9080").expect("passed");
    let from = client.local_addr().expect("the client's address");
    let (mut server, peer) = application.accept().expect("the application accepts");
    assert_eq!(peer, from, "[K.3]: the application sees the client itself");
    client.write_all(b"four").expect("write");
    let mut buffer = [0; 4];
    server.read_exact(&mut buffer).expect("read");
    server.write_all(b"seven..").expect("write");
    drop(server);
    let mut rest = Vec::new();
    client.read_to_end(&mut rest).expect("read");
    drop(client);
    let deadline = Instant::now() + Duration::from_secs(3);
    let event = loop {
        if let Some(event) = events.next() {
            break event;
        }
        assert!(Instant::now() < deadline, "the end was not reported");
        thread::sleep(Duration::from_millis(10));
    };
    assert_eq!(event.kind, EventKind::Closed as u8);
    assert_eq!((event.src.ip(), event.sport), (from.ip(), from.port()));
    assert_eq!((event.dst.to_string().as_str(), event.dport), (POD4, 9080));
    assert_eq!((event.received_bytes, event.rule, event.generation), (4, 9, 4));
    assert_eq!(event.sent_bytes, 7);
    assert_eq!(counted(&datapath, node.cookie, Direction::Inbound, Answer::Pass, Reason::NoAllowPolicies), 1);
}

/// [K.3]: the agent's leg comes from loopback, the application sees the client, in both families.
#[test]
fn the_application_sees_the_client_behind_the_agents_leg() {
    let node = Node::new();
    let (datapath, _listener) = node.enrolled(Mode::Strict);
    let mut sockets = datapath.sockets().expect("the worker's maps");
    for (bind, target, source, client) in [
        ("0.0.0.0:9080", "10.99.0.2:9080", "127.6.1.1:0", "10.88.0.7:40123"),
        ("[::]:9081", "[fd99::2]:9081", "[::1]:0", "[fd88::7]:40124"),
        ("[::]:9082", "10.99.0.2:9082", "127.6.1.2:0", "10.88.0.8:40125"),
    ] {
        let application = node.serve(bind);
        let target: SocketAddr = target.parse().expect("a literal");
        let client: SocketAddr = client.parse().expect("a literal");
        let leg = within(&node.pod, || Socket::new(Domain::for_address(target), Type::STREAM, None).expect("a socket"));
        sockets.mark_leg(&leg, client).expect("marked");
        leg.bind(&source.parse::<SocketAddr>().expect("a literal").into()).expect("bind");
        leg.connect(&target.into()).expect("the leg connects in STRICT mode");
        let (server, shown) = application.accept().expect("accept");
        assert_eq!((shown.ip().to_canonical(), shown.port()), (client.ip(), client.port()), "accept");
        let shown = server.peer_addr().expect("getpeername");
        assert_eq!((shown.ip().to_canonical(), shown.port()), (client.ip(), client.port()), "getpeername");
        let source = leg.local_addr().expect("source").as_socket().expect("an address");
        assert_eq!(sockets.leg(source, target), Leg::Taken);
        assert_eq!(sockets.leg(source, target), Leg::Lost, "only once");
    }
}

/// [K.1], [K.5]: a socket of the kubelet's cgroup passes STRICT; another process of the node does not.
#[test]
fn only_the_kubelets_own_connections_are_probes() {
    let node = Node::new();
    let application = node.serve("0.0.0.0:9080");
    let (mut datapath, _listener) = node.enrolled(Mode::Strict);
    let kubelet = node.cgroup.join("kubelet");
    let id = std::os::unix::fs::MetadataExt::ino(&fs::metadata(&kubelet).expect("stat"));
    // 0: its depth is not known.
    for (nth, kubelet_level) in [(1, 2), (2, 0)] {
        datapath
            .settings(SettingsValue { kubelet_cgroup: id, kubelet_level, ..SettingsValue::default() })
            .expect("settings");
        assert!(refused(node.dial_from_peer("10.99.0.2:9080")), "not the kubelet");
        join(&kubelet);
        let probe = node.dial_from_peer("10.99.0.2:9080");
        join(&node.cgroup.join("agent"));
        let probe = probe.expect("a probe is delivered");
        let (_, shown) = application.accept().expect("accept");
        assert_eq!(shown, probe.local_addr().expect("the probe's address"), "without SNAT");
        assert_eq!(counted(&datapath, node.cookie, Direction::Inbound, Answer::Pass, Reason::Probe), nth);
        assert!(refused(node.dial_from_peer("10.99.0.2:9080")), "not the kubelet any more");
    }
}

/// [K.5], the fall-back: where the kubelet has no cgroup of its own, whatever the node's own namespace sends to pods is a probe;
/// nothing else is.
#[test]
fn the_nodes_own_connections_are_probes_where_the_kubelet_cannot_be_told_apart() {
    let node = Node::new();
    let application = node.serve("[::]:9080");
    let (mut datapath, _listener) = node.enrolled(Mode::Strict);
    let own = within(&node.peer, || netns_cookie(&Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket")));
    let mut tell = |host_netns_cookie, probes_by_netns| {
        let settings = SettingsValue { host_netns_cookie, probes_by_netns, ..SettingsValue::default() };
        datapath.settings(settings).expect("settings");
    };
    let targets = ["10.99.0.2:9080", "[fd99::2]:9080"];
    tell(own.0, 0);
    assert!(targets.iter().all(|to| refused(node.dial_from_peer(to))), "not where it is switched off");
    tell(own.0 + 1, 1);
    assert!(targets.iter().all(|to| refused(node.dial_from_peer(to))), "not from another namespace");
    tell(own.0, 1);
    for to in targets {
        let probe = node.dial_from_peer(to).expect("a probe is delivered");
        let (_, shown) = application.accept().expect("accept");
        assert_eq!(shown.port(), probe.local_addr().expect("the probe's address").port());
    }
    assert_eq!(counted(&datapath, node.cookie, Direction::Inbound, Answer::Pass, Reason::Probe), 2);
}

/// [K.5]: a probe on its way while its pod becomes enrolled is a probe still.
#[test]
fn a_probe_that_was_under_way_at_enrolment_is_delivered() {
    let node = Node::new();
    let application = node.serve("0.0.0.0:9080");
    let mut datapath = node.load();
    let kubelet = node.cgroup.join("kubelet");
    let id = std::os::unix::fs::MetadataExt::ino(&fs::metadata(&kubelet).expect("stat"));
    datapath
        .settings(SettingsValue { kubelet_cgroup: id, kubelet_level: 2, ..SettingsValue::default() })
        .expect("settings");
    // The first SYN is lost where the pod's end is down; the next one comes a second later.
    run(&format!("ip -n {}-pod link set eth0 down", node.name));
    join(&kubelet);
    let probe = within(&node.peer, || {
        let probe = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP)).expect("a socket");
        probe.set_nonblocking(true).expect("a flag");
        let begun = probe.connect(&SockAddr::from("10.99.0.2:9080".parse::<SocketAddr>().expect("a literal")));
        assert_eq!(begun.expect_err("not answered yet").raw_os_error(), Some(libc::EINPROGRESS));
        probe
    });
    join(&node.cgroup.join("agent"));
    node.enrol(&mut datapath, Mode::Strict);
    run(&format!("ip -n {}-pod link set eth0 up", node.name));
    let until = Instant::now() + Duration::from_secs(20);
    while probe.peer_addr().is_err() {
        assert!(probe.take_error().expect("an option").is_none(), "refused");
        assert!(Instant::now() < until, "never delivered");
        thread::sleep(Duration::from_millis(10));
    }
    let (_, shown) = application.accept().expect("accept");
    assert_eq!(shown.port(), probe.local_addr().expect("bound").as_socket().expect("IP").port());
    assert_eq!(counted(&datapath, node.cookie, Direction::Inbound, Answer::Pass, Reason::Probe), 1);
}

/// Specification §3: the pod itself, by loopback and by its own address, is never captured.
#[test]
fn the_pod_talks_to_itself_undisturbed() {
    let node = Node::new();
    let application = node.serve("[::]:9080");
    let (datapath, _listener) = node.enrolled(Mode::Strict);
    for target in ["127.0.0.1:9080", "[::1]:9080", "10.99.0.2:9080", "[fd99::2]:9080"] {
        let client = node.dial_from_pod(target).expect("not captured");
        let (_, shown) = application.accept().expect("accept");
        assert_eq!(shown.port(), client.local_addr().expect("own address").port(), "{target}");
    }
    datapath.verdicts().iter().for_each(|(key, _)| assert_ne!(key.answer, Answer::Refuse as u8));
}

/// A second address that no map knows is refused, not passed; so is a pod that has left the maps.
#[test]
fn an_unknown_address_of_the_namespace_is_refused() {
    let node = Node::new();
    let _application = node.serve("0.0.0.0:9080");
    let (datapath, _listener) = node.enrolled(Mode::Permissive);
    run(&format!("ip -n {}-pod addr add 10.99.0.3/24 dev eth0", node.name));
    assert!(refused(node.dial_from_peer("10.99.0.3:9080")));
    assert_eq!(counted(&datapath, NetnsCookie(0), Direction::Inbound, Answer::Refuse, Reason::UnknownAddress), 1);
}

/// Enrolment ends without a trace: the pod is as it was.
#[test]
fn a_removed_pod_is_untouched_again() {
    let node = Node::new();
    let application = node.serve("0.0.0.0:9080");
    let (mut datapath, _listener) = node.enrolled(Mode::Strict);
    assert!(refused(node.dial_from_peer("10.99.0.2:9080")));
    datapath.remove(node.cookie).expect("removed");
    datapath.remove(node.cookie).expect("again, without harm");
    node.dial_from_peer("10.99.0.2:9080").expect("plain again");
    let (_, shown) = application.accept().expect("accept");
    assert_eq!(shown.ip().to_string(), PEER4);
    let outside = within(&node.peer, || TcpListener::bind("0.0.0.0:7000").expect("bind"));
    let direct = node.dial_from_pod("10.99.0.1:7000").expect("plain again");
    let (_, shown) = outside.accept().expect("accept");
    assert_eq!(shown, direct.local_addr().expect("own address"));
    assert!(datapath.enrolled().is_empty() && datapath.verdicts().is_empty());
}

/// An agent that starts replaces the programs of the one before without an instant in which a connection gets by.
#[test]
fn replacing_the_programs_lets_nothing_through() {
    let node = Node::new();
    let (datapath, listener) = node.enrolled(Mode::Strict);
    let outside = within(&node.peer, || TcpListener::bind("0.0.0.0:7000").expect("bind"));
    outside.set_nonblocking(true).expect("nonblocking");
    drop(datapath);
    let stop = Arc::new(AtomicBool::new(false));
    let attempts = Arc::new(AtomicUsize::new(0));
    let dialler = {
        let (stop, attempts) = (Arc::clone(&stop), Arc::clone(&attempts));
        let pod = node.pod.try_clone().expect("a handle");
        thread::spawn(move || {
            setns(&pod, CloneFlags::CLONE_NEWNET).expect("enter the namespace");
            while !stop.load(Ordering::Relaxed) {
                let _ = connect("10.99.0.1:7000");
                attempts.fetch_add(1, Ordering::Relaxed);
            }
        })
    };
    let mut generation = 0;
    let mut serving: Option<(Datapath, TcpListener)> = None;
    for _ in 0..10 {
        let (mut next, listener) = node.enrolled_next(Mode::Strict);
        assert!(next.first_generation() > generation, "numbers of an earlier agent are not used again");
        generation = next.first_generation();
        next.take_over().expect("attached");
        // The one before ends after its successor serves.
        drop(serving.replace((next, listener)));
        serving.as_mut().expect("just put there").0.maintain();
    }
    // The listener's backlog fills up; what matters is that the outside never saw a connection.
    drop(listener);
    stop.store(true, Ordering::Relaxed);
    dialler.join().expect("the dialler ends");
    assert!(attempts.load(Ordering::Relaxed) > 10);
    assert!(matches!(outside.accept(), Err(error) if error.kind() == ErrorKind::WouldBlock));
}

/// Two agents on one machine do not disturb each other, and one pin directory has one agent.
#[test]
fn two_agents_on_one_machine_keep_apart() {
    let node = Node::new();
    let (mut datapath, _listener) = node.enrolled(Mode::Strict);
    let config =
        |dir: &str, cgroup: &Path| Config { pin_dir: node.bpffs.join(dir), cgroup_root: cgroup.to_owned(), workers: 1 };
    let other_cgroup = cgroup_mount().join(format!("{}-other", node.name));
    fs::create_dir_all(&other_cgroup).expect("make a cgroup");
    let mut other = load_at(config("other", &other_cgroup));
    other.take_over().expect("a second agent attaches");
    other.silence().expect("its heartbeat is its own");
    // Where loading the programs takes seconds, the first has not given a sign of life for as long.
    datapath.beat().expect("beat");
    node.dial_from_pod("10.200.0.9:80").expect("captured by the first");
    assert!(other.enrolled().is_empty());
    drop(other);
    fs::remove_dir(&other_cgroup).expect("remove the cgroup");
    drop(datapath);
}

/// Listens for the pod's redirected connections, and answers each with a byte of its own, until dropped.
struct Answering {
    stop: Arc<AtomicBool>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Answering {
    fn new(listener: TcpListener, byte: u8) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        listener.set_nonblocking(true).expect("nonblocking");
        let stopped = Arc::clone(&stop);
        let thread = thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                match listener.accept() {
                    // Whoever went away again has nothing to be told.
                    Ok((mut stream, _)) => drop(stream.write_all(&[byte])),
                    Err(_) => thread::sleep(Duration::from_millis(1)),
                }
            }
        });
        Self { stop, thread: Some(thread) }
    }
}

impl Drop for Answering {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().map(thread::JoinHandle::join).expect("once").expect("no panic");
    }
}

impl Node {
    /// Which agent's listener a connection of the pod reaches.
    fn answered_by(&self) -> io::Result<u8> {
        let mut stream = self.dial_from_pod("10.200.0.9:80")?;
        let mut byte = [0];
        stream.read_exact(&mut byte)?;
        Ok(byte[0])
    }
}

/// An agent that prepares itself disturbs nobody, takes over at once, and the one before notices and writes to nobody.
#[test]
fn one_agent_follows_another() {
    let node = Node::new();
    let (mut old, listener) = node.enrolled(Mode::Strict);
    let _first = Answering::new(listener, 1);
    assert!(old.serves() && !old.has_successor());
    assert_eq!(node.answered_by().expect("captured"), 1);

    let (mut next, listener) = node.enrolled_next(Mode::Strict);
    let _second = Answering::new(listener, 2);
    // Here and below: where loading takes seconds, the agent that serves gives its sign of life meanwhile.
    old.beat().expect("beat");
    assert!(!next.serves() && old.serves() && old.has_successor());
    assert_eq!(next.predecessor().expect("known"), Predecessor::Serving);
    let turn = Turn::try_take(&node.bpffs.join("culvert")).expect("a bpffs");
    assert!(turn.is_none(), "one agent at a time prepares itself");
    assert_eq!(node.answered_by().expect("captured"), 1);

    next.take_over().expect("attached");
    assert_eq!(node.answered_by().expect("captured"), 2);
    assert!(next.serves() && !old.serves());
    // It lets go when it notices, which gives the turn to whoever comes next.
    next.maintain();
    assert!(!old.has_successor());
    // What a late one writes, nobody reads.
    old.silence().expect("its own map");
    old.remove(node.cookie).expect("its own maps");
    old.maintain();
    assert_eq!(node.answered_by().expect("captured"), 2);
    drop(old);

    // An agent that gives up before it serves leaves everything as it was.
    let (third, _listener) = node.enrolled_next(Mode::Strict);
    drop(third);
    next.beat().expect("beat");
    assert_eq!(node.answered_by().expect("captured"), 2);
    assert!(next.serves());
}

/// An agent that ends in the middle of its take-over leaves links behind, which the serving one takes back; one that hangs
/// there is not waited for.
#[test]
fn a_half_done_takeover_is_taken_back() {
    let node = Node::new();
    for hangs in [false, true] {
        let (mut old, listener) = node.enrolled(Mode::Strict);
        let _first = Answering::new(listener, 1);
        assert_eq!(node.answered_by().expect("captured"), 1);
        // Its listener is gone with it, so whatever its programs get is refused.
        let (mut next, _) = node.enrolled_next(Mode::Strict);
        let blocked = node.bpffs.join("culvert/owner_new");
        fs::create_dir(&blocked).expect("the last step of the take-over will fail");
        next.take_over().expect_err("it cannot say that it serves");
        fs::remove_dir(&blocked).expect("empty");
        assert!(refused(node.answered_by()), "the links are the dead one's");
        assert!(old.serves());
        let hanging = hangs.then_some(next);
        let since = Instant::now();
        loop {
            old.maintain();
            old.beat().expect("beat");
            if node.answered_by().is_ok_and(|by| by == 1) {
                break;
            }
            assert!(since.elapsed() < Duration::from_secs(30), "the links were not taken back");
            thread::sleep(Duration::from_millis(20));
        }
        assert!(!hangs || since.elapsed() > Duration::from_secs(2), "one at work is given its time");
        drop(hanging);
    }
}

/// What a pod had is not open only because the next agent does not know the pod (yet).
#[test]
fn a_pod_that_the_next_agent_does_not_know_is_refused() {
    let node = Node::new();
    let (old, _listener) = node.enrolled(Mode::Permissive);
    let _application = node.serve("0.0.0.0:9080");
    node.dial_from_peer("10.99.0.2:9080").expect("permissive");
    let mut next = node.load_next();
    next.take_over().expect("attached");
    assert!(refused(node.dial_from_pod("10.200.0.9:80")));
    assert!(refused(node.dial_from_peer("10.99.0.2:9080")));
    assert_eq!(next.enrolled(), [node.cookie]);
    next.remove(node.cookie).expect("it is out of the mesh");
    node.dial_from_peer("10.99.0.2:9080").expect("open");
    drop(old);
}

/// Maps of another layout are not read, its links are taken off, and at no time is there a gap.
#[test]
fn an_agent_of_another_layout_is_replaced() {
    let node = Node::new();
    let (mut old, listener) = node.enrolled(Mode::Strict);
    let _first = Answering::new(listener, 1);
    let pins = node.bpffs.join("culvert");
    let now = pins.join(format!("v{LAYOUT_VERSION}"));
    // As one of another version would have them; the first version had its links with its maps.
    let other = pins.join("v1");
    fs::rename(&now, &other).expect("renamed");
    fs::create_dir(other.join("links")).expect("made");
    fs::rename(pins.join("links/connect4"), other.join("links/connect4")).expect("moved");
    let (mut next, listener) = node.enrolled_next(Mode::Strict);
    let _second = Answering::new(listener, 2);
    assert_eq!(next.predecessor().expect("known"), Predecessor::Serving, "by its lock");
    old.beat().expect("beat");
    assert_eq!(node.answered_by().expect("captured"), 1);
    next.take_over().expect("attached");
    assert!(!other.exists(), "what the other one had pinned is gone");
    assert!(now.join("PODS").exists());
    assert_eq!(node.answered_by().expect("captured"), 2);
    drop(old);
    assert_eq!(node.answered_by().expect("captured"), 2);
}

/// The tunnel port reaches the tunnel listener whatever the mode; a plaintext verdict can be the agent's.
#[test]
fn what_needs_the_agent_reaches_its_listeners() {
    let node = Node::new();
    let _application = node.serve("0.0.0.0:9080");
    let (mut datapath, _listener) = node.enrolled(Mode::Strict);
    let (tunnel, plaintext): (TcpListener, TcpListener) = (node.listener(), node.listener());
    datapath.listener(node.cookie, ListenerKind::Tunnel, 0, tunnel.as_fd()).expect("listener");
    datapath.listener(node.cookie, ListenerKind::Plaintext, 0, plaintext.as_fd()).expect("listener");
    let client = node.dial_from_peer(&format!("10.99.0.2:{PORT_HBONE}")).expect("the tunnel's endpoint");
    let (accepted, from) = tunnel.accept().expect("accept");
    assert_eq!(from.port(), client.local_addr().expect("own address").port());
    assert_eq!(accepted.local_addr().expect("local").ip().to_canonical().to_string(), POD4);
    datapath
        .ready(node.cookie, &PodPolicy { plaintext: Plaintext::ByAgent, ..policy(2, Mode::Permissive) })
        .expect("generation 2");
    node.dial_from_peer("10.99.0.2:9080").expect("the agent's plaintext listener");
    let (accepted, _) = plaintext.accept().expect("accept");
    assert_eq!(accepted.local_addr().expect("local").port(), 9080);
}

/// Fills a pinned map with entries that mean nothing, until the kernel takes no more.
fn fill<K: aya::Pod, V: aya::Pod + Default>(datapath: &Datapath, name: &str, key: impl Fn(u64) -> K) -> u64 {
    let map = MapData::from_pin(datapath.pin_dir().join(name)).expect("the map is pinned");
    let mut map = BpfHashMap::<_, K, V>::try_from(Map::HashMap(map)).expect("a hash map");
    let mut filled = 0;
    while map.insert(key(filled), V::default(), 0).is_ok() {
        filled += 1;
    }
    filled
}

/// [K.4]: a map that is full refuses the pod in both directions, and says which map it is.
#[test]
fn a_full_map_of_addresses_refuses_the_pod() {
    let node = Node::new();
    let _application = node.serve("0.0.0.0:9080");
    let mut datapath = node.load();
    datapath.beat().expect("beat");
    let junk = |n: u64| Addr::from_be32x4([1, 2, (n >> 32) as u32, n as u32]);
    assert_eq!(fill::<Addr, PodAddrValue>(&datapath, "POD_ADDRS", junk), 65536);
    let ips: Vec<IpAddr> = vec![POD4.parse().expect("a literal")];
    let error = datapath.prepare(node.cookie, node.pod.as_fd(), &ips).expect_err("no room");
    assert!(format!("{error:#}").contains("POD_ADDRS for 10.99.0.2"), "{error:#}");
    assert!(refused(node.dial_from_pod("10.200.0.9:80")));
    assert!(refused(node.dial_from_peer("10.99.0.2:9080")));
}

/// A policy that does not fit moves the pod's plaintext verdicts to the agent; nothing passes by the mode alone.
#[test]
fn a_full_map_of_modes_makes_the_agent_decide() {
    let node = Node::new();
    let application = node.serve("0.0.0.0:9080");
    application.set_nonblocking(true).expect("nonblocking");
    let (mut datapath, _listener) = node.enrolled(Mode::Permissive);
    let plaintext = node.listener();
    datapath.listener(node.cookie, ListenerKind::Plaintext, 0, plaintext.as_fd()).expect("listener");
    let junk = |n: u64| ModeKey { netns_cookie: u64::MAX - n, ..ModeKey::default() };
    fill::<ModeKey, ModeValue>(&datapath, "MODES", junk);
    let ports = BTreeMap::from([(9080, (Mode::Strict, 3)), (9081, (Mode::Strict, 3))]);
    datapath.ready(node.cookie, &PodPolicy { ports, ..policy(2, Mode::Permissive) }).expect("in force, by the agent");
    node.dial_from_peer("10.99.0.2:9080").expect("reaches the agent");
    plaintext.accept().expect("the agent decides");
    assert!(matches!(application.accept(), Err(error) if error.kind() == ErrorKind::WouldBlock));
}

/// Policies as a table: of the peer's IPv4 address, and of all others, the decisions about port 9080, 9081 and others.
fn table(of_peer: [(Reason, u32); 3], of_others: [(Reason, u32); 3]) -> Plaintext {
    let decisions = |[http, second, other]: [(Reason, u32); 3]| {
        [other, http, second].map(|(reason, rule)| Decision { reason, rule: RuleId(rule) }).to_vec()
    };
    let block = |text: &str, length| (text.parse().expect("a literal"), length);
    Plaintext::ByTable(Arc::new(Table {
        sources: vec![(block("0.0.0.0", 0), 0), (block(PEER4, 32), 1), (block("::", 0), 0)],
        ports: vec![(0, 0), (9080, 1), (9081, 2)],
        decisions: vec![decisions(of_others), decisions(of_peer)],
    }))
}

const NO_MATCH: (Reason, u32) = (Reason::NoAllowMatch, 0);

fn allowed_by(rule: u32) -> (Reason, u32) {
    (Reason::AllowMatch, rule)
}

fn denied_by(rule: u32) -> (Reason, u32) {
    (Reason::ExplicitDeny, rule)
}

/// How often a verdict about what arrives was counted for a rule.
fn by_rule(datapath: &Datapath, node: &Node, answer: Answer, (reason, rule): (Reason, u32)) -> u64 {
    let verdicts = datapath.verdicts();
    let matches = |key: &culvert_common::VerdictKey| {
        (key.netns_cookie, key.direction, key.answer, key.reason, key.rule)
            == (node.cookie.0, Direction::Inbound as u8, answer as u8, reason as u8, rule)
    };
    verdicts.iter().filter(|(key, _)| matches(key)).map(|(_, count)| count).sum()
}

/// What the kernel would say of a connection from the peer.
fn verdict(datapath: &mut Datapath, src: &str, dst: &str, dport: u16) -> (u8, u8, u32) {
    let addr = |text: &str| Addr::from(text.parse::<IpAddr>().expect("a literal"));
    let mut asked = [Asked { src: addr(src), dst: addr(dst), sport: 40000, dport, ..Asked::default() }];
    datapath.judge(&mut asked).expect("asked");
    (asked[0].answer, asked[0].reason, asked[0].rule)
}

/// §6.2, [PA.12]: whom the policies allow reaches the application itself, and whom they do not gets a reset; each counted by
/// its rule, and told when it ends. A mode that refuses is not opened by a policy that allows.
#[test]
fn policies_decide_plaintext_in_the_kernel() {
    let node = Node::new();
    let applications = [node.serve("[::]:9080"), node.serve("[::]:9081")];
    let (mut datapath, _listener) = node.enrolled(Mode::Permissive);
    let mut events = datapath.events().expect("the ring buffer");
    let of_peer = [allowed_by(5), denied_by(6), NO_MATCH];
    let plaintext = table(of_peer, [NO_MATCH, denied_by(6), NO_MATCH]);
    let with = |generation, mode| PodPolicy { plaintext: plaintext.clone(), ..policy(generation, mode) };
    datapath.ready(node.cookie, &with(2, Mode::Permissive)).expect("in force");
    let client = node.dial_from_peer("10.99.0.2:9080").expect("the peer is allowed");
    let (served, from) = applications[0].accept().expect("by the application itself");
    assert_eq!(from.port(), client.local_addr().expect("own address").port(), "and nobody is between them");
    assert!(refused(node.dial_from_peer("10.99.0.2:9081")), "the peer is denied the second port");
    assert!(refused(node.dial_from_peer("10.99.0.2:9082")));
    assert!(refused(node.dial_from_peer("[fd99::2]:9080")), "nobody else is allowed");
    assert!(refused(node.dial_from_peer("[fd99::2]:9081")));
    assert_eq!(by_rule(&datapath, &node, Answer::Pass, allowed_by(5)), 1);
    assert_eq!(by_rule(&datapath, &node, Answer::Refuse, denied_by(6)), 2);
    assert_eq!(by_rule(&datapath, &node, Answer::Refuse, NO_MATCH), 2);
    drop((client, served));
    let until = Instant::now() + Duration::from_secs(10);
    let mut told = Vec::new();
    while told.len() < 5 {
        assert!(Instant::now() < until, "{told:?}");
        told.extend(events.by_ref().map(|event: Event| (event.kind, event.reason, event.rule, event.generation)));
    }
    let end = (EventKind::Closed as u8, Reason::AllowMatch as u8, 5, 2);
    assert!(told.contains(&end), "{told:?}");
    assert!(told.contains(&(EventKind::Refused as u8, Reason::ExplicitDeny as u8, 6, 2)), "{told:?}");

    datapath.ready(node.cookie, &with(3, Mode::Strict)).expect("in force");
    assert!(refused(node.dial_from_peer("10.99.0.2:9080")));
    assert_eq!(counted(&datapath, node.cookie, Direction::Inbound, Answer::Refuse, Reason::StrictRequiresMtls), 1);
}

/// [PA.13]: an entry that is not there denies, whichever it is.
#[test]
fn a_table_that_misses_an_entry_denies() {
    let node = Node::new();
    let _application = node.serve("[::]:9080");
    let (mut datapath, _listener) = node.enrolled(Mode::Permissive);
    let open = |name: &str| MapData::from_pin(datapath.pin_dir().join(name)).expect("the map is pinned");
    let mut sources = LpmTrie::<_, SourceKey, ClassValue>::try_from(Map::LpmTrie(open("SOURCES"))).expect("a trie");
    let mut ports = BpfHashMap::<_, PortKey, PortValue>::try_from(Map::HashMap(open("PORTS"))).expect("a map");
    let mut verdicts =
        BpfHashMap::<_, AuthorizationKey, AuthorizationValue>::try_from(Map::HashMap(open("AUTHORIZATION")))
            .expect("a map");
    for (generation, missing) in [(2, "no"), (3, "source"), (4, "port"), (5, "verdict"), (6, "sense")] {
        // Another one each time: a table that is there is used again.
        let all = [allowed_by(generation); 3];
        let plaintext = table(all, all);
        datapath
            .ready(node.cookie, &PodPolicy { plaintext, ..policy(generation, Mode::Permissive) })
            .expect("in force");
        datapath.beat().expect("beat");
        assert_eq!(verdict(&mut datapath, PEER4, POD4, 7).0, Answer::Pass as u8);
        let table = inspect::read(datapath.pin_dir()).expect("read").pods[&node.cookie.0].table;
        let keys: Vec<_> = sources.keys().filter_map(Result::ok).filter(|key| { key.data() }.table == table).collect();
        assert_eq!(keys.len(), 3);
        let verdict_key = AuthorizationKey { table, source_class: 1, port_class: 1 };
        match missing {
            "source" => keys.iter().for_each(|key| sources.remove(key).expect("removed")),
            "port" => ports.remove(&PortKey { table, bucket: 0, _pad: 0 }).expect("removed"),
            "verdict" => verdicts.remove(&verdict_key).expect("removed"),
            "sense" => {
                let value = AuthorizationValue { rule: 1, reason: Reason::Captured as u8, _pad: [0; 3] };
                verdicts.insert(verdict_key, value, 0).expect("written");
            }
            _ => {
                node.dial_from_peer("10.99.0.2:9080").expect("nothing is missing");
                continue;
            }
        }
        assert!(refused(node.dial_from_peer("10.99.0.2:9080")), "without a {missing}");
        let expected = (Answer::Refuse as u8, Reason::PolicyMissing as u8, 0);
        assert_eq!(verdict(&mut datapath, PEER4, POD4, 9080), expected, "without a {missing}");
    }
}

/// [PA.13]: nor is a port open, by the mode of the pod or by the class of other ports, where the entry is not there that would
/// name it; what is said of other ports stays.
#[test]
fn a_port_whose_bucket_is_missing_is_refused() {
    let node = Node::new();
    let (mut datapath, _listener) = node.enrolled(Mode::Permissive);
    let open = |name: &str| MapData::from_pin(datapath.pin_dir().join(name)).expect("the map is pinned");
    let mut modes = BpfHashMap::<_, ModeKey, ModeValue>::try_from(Map::HashMap(open("MODES"))).expect("a map");
    let mut ports = BpfHashMap::<_, PortKey, PortValue>::try_from(Map::HashMap(open("PORTS"))).expect("a map");
    let (pass, refuse) = (Answer::Pass as u8, Answer::Refuse as u8);
    let missing = (refuse, Reason::PolicyMissing as u8, 0);
    // More than one bucket has room for.
    let named: Vec<u16> = (9000..9020).collect();
    let strict = named.iter().map(|port| (*port, (Mode::Strict, 5))).collect();
    datapath.ready(node.cookie, &PodPolicy { ports: strict, ..policy(2, Mode::Permissive) }).expect("generation 2");
    let buckets = inspect::read(datapath.pin_dir()).expect("read").pods[&node.cookie.0].mode_buckets;
    assert!(buckets > 1);
    let asked = |datapath: &mut Datapath, port| {
        datapath.beat().expect("beat");
        verdict(datapath, PEER4, POD4, port)
    };
    for port in named.iter().copied() {
        assert_eq!(asked(&mut datapath, port), (refuse, Reason::StrictRequiresMtls as u8, 5), "{port}");
    }
    let gone = bucket(9007, buckets);
    let (same, other): (Vec<u16>, Vec<u16>) = (1..=u16::MAX)
        .filter(|port| !matches!(*port, PORT_HBONE | 15001 | 15006))
        .partition(|port| bucket(*port, buckets) == gone);
    let of = |all: &[u16], named: bool| *all.iter().find(|port| (9000..9020).contains(*port) == named).expect("one");
    assert_eq!(asked(&mut datapath, of(&same, false)).0, pass);
    modes.remove(&ModeKey { netns_cookie: node.cookie.0, generation: 2, bucket: gone, _pad: 0 }).expect("it was there");
    assert_eq!(asked(&mut datapath, 9007), missing);
    assert_eq!(asked(&mut datapath, of(&same, false)), missing, "nobody knows that it is not named");
    assert_eq!(asked(&mut datapath, of(&other, true)), (refuse, Reason::StrictRequiresMtls as u8, 5));
    assert_eq!(asked(&mut datapath, of(&other, false)).0, pass);

    // The same of a table whose policies deny those ports and allow others.
    let block = |text: &str| ((text.parse().expect("a literal"), 0), 0);
    let classes = [(0, 0)].into_iter().chain(named.iter().map(|port| (*port, 1))).collect();
    let decisions =
        [allowed_by(7), denied_by(8)].map(|(reason, rule)| Decision { reason, rule: RuleId(rule) }).to_vec();
    let table = Table { sources: vec![block("0.0.0.0"), block("::")], ports: classes, decisions: vec![decisions] };
    let plaintext = Plaintext::ByTable(Arc::new(table));
    datapath.ready(node.cookie, &PodPolicy { plaintext, ..policy(3, Mode::Permissive) }).expect("generation 3");
    let pod = inspect::read(datapath.pin_dir()).expect("read").pods[&node.cookie.0];
    let gone = bucket(9007, pod.port_buckets);
    assert_eq!(asked(&mut datapath, 9007), (refuse, Reason::ExplicitDeny as u8, 8));
    ports.remove(&PortKey { table: pod.table, bucket: gone, _pad: 0 }).expect("it was there");
    assert_eq!(asked(&mut datapath, 9007), missing);
    let elsewhere = named.iter().find(|port| bucket(**port, pod.port_buckets) != gone).expect("another bucket");
    assert_eq!(asked(&mut datapath, *elsewhere), (refuse, Reason::ExplicitDeny as u8, 8));
}

/// A table that does not fit makes the agent decide; when others need less, it is the kernel's again.
#[test]
fn a_full_map_of_tables_makes_the_agent_decide_until_there_is_room() {
    let node = Node::new();
    let application = node.serve("0.0.0.0:9080");
    application.set_nonblocking(true).expect("nonblocking");
    let (mut datapath, _listener) = node.enrolled(Mode::Permissive);
    let plaintext = node.listener();
    datapath.listener(node.cookie, ListenerKind::Plaintext, 0, plaintext.as_fd()).expect("listener");
    let with = |rule, generation| {
        let plaintext = table([allowed_by(rule); 3], [NO_MATCH; 3]);
        PodPolicy { plaintext, ..policy(generation, Mode::Permissive) }
    };
    datapath.ready(node.cookie, &with(1, 2)).expect("in force");
    let junk = |n: u64| PortKey { table: u32::MAX - n as u32, bucket: 1, _pad: 0 };
    assert_eq!(fill::<PortKey, PortValue>(&datapath, "PORTS", junk), 65536 - 1);
    datapath.ready(node.cookie, &with(2, 3)).expect("in force, by the agent");
    assert_eq!(datapath.judged_by_agent(), 1);
    let _client = node.dial_from_peer("10.99.0.2:9080").expect("reaches the agent");
    plaintext.accept().expect("the agent decides");
    assert!(matches!(application.accept(), Err(error) if error.kind() == ErrorKind::WouldBlock));
    // The table before goes after a while, and leaves room for just this one.
    let until = Instant::now() + Duration::from_secs(30);
    while datapath.judged_by_agent() > 0 {
        assert!(Instant::now() < until, "nobody tried again");
        datapath.beat().expect("beat");
        datapath.maintain();
        thread::sleep(Duration::from_millis(20));
    }
    let _client = node.dial_from_peer("10.99.0.2:9080").expect("reaches the application");
    assert_eq!(by_rule(&datapath, &node, Answer::Pass, allowed_by(2)), 1);
}

/// What no pod refers to is removed, and pods that have the same policies share one table.
#[test]
fn tables_are_shared_and_go_with_their_last_pod() {
    let node = Node::new();
    let mut datapath = node.load_next();
    datapath.beat().expect("beat");
    let other = NetnsCookie(u64::MAX);
    let ips: Vec<IpAddr> = vec!["10.99.0.77".parse().expect("a literal")];
    datapath.prepare(node.cookie, node.pod.as_fd(), &[POD4.parse().expect("a literal")]).expect("prepared");
    datapath.prepare(other, node.pod.as_fd(), &ips).expect("prepared");
    let entries = |datapath: &Datapath| {
        let fill = datapath.fill().expect("counted");
        let of = |name| fill.iter().find(|map| map.name == name).expect("there").entries;
        (of("SOURCES"), of("PORTS"), of("AUTHORIZATION"))
    };
    let with =
        |rule| PodPolicy { plaintext: table([allowed_by(rule); 3], [NO_MATCH; 3]), ..policy(2, Mode::Permissive) };
    for cookie in [node.cookie, other] {
        datapath.ready(cookie, &with(1)).expect("in force");
        assert_eq!(entries(&datapath), (3, 1, 6));
    }
    datapath.ready(other, &with(2)).expect("in force");
    assert_eq!(entries(&datapath), (6, 2, 12));
    datapath.remove(other).expect("removed");
    let until = Instant::now() + Duration::from_secs(30);
    while entries(&datapath) != (3, 1, 6) {
        assert!(Instant::now() < until, "{:?}", entries(&datapath));
        datapath.maintain();
        thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(verdict(&mut datapath, PEER4, POD4, 9080), (Answer::Pass as u8, Reason::AllowMatch as u8, 1));
}

/// Ends the threads of a scope, also where the test fails.
struct StopAtEnd<'a>(&'a AtomicBool);

impl Drop for StopAtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// [D.5]: while policies flip, every verdict is the old policy's or the new one's: reason, rule and generation belong together.
#[test]
fn no_verdict_is_a_mixture_while_policies_flip() {
    const FLIPS: u32 = 600;
    let node = Node::new();
    let applications = [node.serve("0.0.0.0:9080"), node.serve("0.0.0.0:9081")];
    let (mut datapath, _listener) = node.enrolled(Mode::Permissive);
    let mut events = datapath.events().expect("the ring buffer");
    // Even ones allow port 9080 and deny 9081, odd ones the other way round; every one has rules of its own.
    let rules = |generation: u32| {
        let rule = 4 * (generation % 1000) + 1;
        match generation % 2 {
            0 => [allowed_by(rule), denied_by(rule + 1), NO_MATCH],
            _ => [denied_by(rule), allowed_by(rule + 1), NO_MATCH],
        }
    };
    let with = |generation| PodPolicy {
        plaintext: table(rules(generation), [NO_MATCH; 3]),
        ..policy(generation, Mode::Permissive)
    };
    datapath.ready(node.cookie, &with(2)).expect("in force");
    let stop = AtomicBool::new(false);
    let (opened, turned_away) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let mut told = [0usize; 2];
    thread::scope(|scope| {
        let _stop = StopAtEnd(&stop);
        for application in &applications {
            scope.spawn(|| {
                application.set_nonblocking(true).expect("nonblocking");
                while !stop.load(Ordering::Relaxed) {
                    if application.accept().is_err() {
                        thread::sleep(Duration::from_micros(200));
                    }
                }
            });
        }
        scope.spawn(|| {
            setns(&node.peer, CloneFlags::CLONE_NEWNET).expect("enter the namespace");
            while !stop.load(Ordering::Relaxed) {
                for port in [9080, 9081] {
                    match connect(&format!("{POD4}:{port}")) {
                        Ok(_) => opened.fetch_add(1, Ordering::Relaxed),
                        Err(error) => {
                            assert!(matches!(error.kind(), ErrorKind::ConnectionRefused | ErrorKind::ConnectionReset));
                            turned_away.fetch_add(1, Ordering::Relaxed)
                        }
                    };
                }
            }
        });
        let mut look = |events: &mut culvert::datapath::Events| {
            for event in events.by_ref() {
                let rules = rules(event.generation);
                let expected = rules[usize::from(event.dport - 9080)];
                let got = (Reason::from_u8(event.reason).expect("a reason"), event.rule);
                assert_eq!(got, expected, "generation {}, port {}, kind {}", event.generation, event.dport, event.kind);
                let passed = event.kind == EventKind::Closed as u8;
                // The kernel tells the end of one that was overtaken too, as it was when it was noted.
                told[usize::from(passed)] += 1;
            }
        };
        for generation in 3..3 + FLIPS {
            datapath.ready(node.cookie, &with(generation)).expect("in force");
            datapath.beat().expect("beat");
            datapath.maintain();
            look(&mut events);
            thread::sleep(Duration::from_millis(1));
        }
        let until = Instant::now() + Duration::from_secs(30);
        while opened.load(Ordering::Relaxed) < 100 || turned_away.load(Ordering::Relaxed) < 100 {
            assert!(Instant::now() < until, "no load");
            datapath.beat().expect("beat");
            thread::sleep(Duration::from_millis(10));
        }
        look(&mut events);
    });
    assert_eq!(datapath.judged_by_agent(), 0);
    assert!(told.iter().all(|times| *times > 50), "{told:?}");
    for (key, times) in datapath.verdicts().iter().filter(|(key, _)| key.direction == Direction::Inbound as u8) {
        let reason = Reason::from_u8(key.reason).expect("a reason");
        let (pass, refuse) = (Answer::Pass as u8, Answer::Refuse as u8);
        let known = matches!((reason, key.answer), (Reason::AllowMatch, answer) if answer == pass)
            || matches!((reason, key.answer), (Reason::ExplicitDeny, answer) if answer == refuse);
        assert!(known, "{times} times {reason:?}, answer {}", key.answer);
    }
}

/// §3, [K.4]: what becomes of 1000 connects of a pod is what the verdict function says, whatever the pod's state, the agent's,
/// and where they go.
#[test]
fn connects_are_answered_as_the_verdict_function_says() {
    let node = Node::new();
    let application = node.serve("[::]:9080");
    let outside = within(&node.peer, || TcpListener::bind("[::]:9080").expect("a server outside"));
    let (mut datapath, agent) = node.enrolled(Mode::Permissive);
    let mut sockets = datapath.sockets().expect("the worker's maps");
    for listener in [&application, &outside, &agent] {
        listener.set_nonblocking(true).expect("nonblocking");
    }
    let arrived = |listener: &TcpListener| {
        let until = Instant::now() + Duration::from_secs(5);
        loop {
            match listener.accept() {
                Ok((socket, _)) => return socket,
                Err(error) => assert!(error.kind() == ErrorKind::WouldBlock && Instant::now() < until, "{error}"),
            }
        }
    };
    let own = ["127.0.0.1", "127.9.9.9", "[::1]", POD4, "[fd99::2]", "[::ffff:10.99.0.2]"];
    let others = [PEER4, "[fd99::1]", "[::ffff:10.99.0.1]", "10.200.0.9", "[fd00::9]", "198.51.100.7"];
    let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
    let mut below = |limit: usize| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) as usize % limit
    };
    let mut reached = BTreeMap::<&str, usize>::new();
    for number in 0..1000u32 {
        let (state, alive) = ([PodState::Ready, PodState::Ready, PodState::Pending][below(3)], below(4) != 0);
        match state {
            PodState::Ready => datapath.ready(node.cookie, &policy(number + 2, Mode::Permissive)).expect("in force"),
            PodState::Pending | PodState::Unknown => datapath.suspend(node.cookie).expect("suspended"),
        }
        if alive { datapath.beat() } else { datapath.silence() }.expect("written");
        let (peer, to) = match below(3) {
            0 => (Peer::SamePod, own[below(own.len())]),
            1 => (Peer::Agent, others[below(2)]),
            _ => (Peer::Plain, others[below(others.len())]),
        };
        let port = if peer == Peer::Plain && below(4) == 0 { 15008 } else { 9080 };
        let target: SocketAddr = format!("{to}:{port}").parse().expect("an address");
        let expected = decide(&Inputs {
            direction: Direction::Outbound,
            peer,
            state,
            agent_alive: alive,
            port,
            mode: Mode::Permissive,
            authorization: Authorization::None,
            rule: 0,
            generation: number + 2,
        });
        let client = within(&node.pod, || {
            let socket = Socket::new(Domain::for_address(target), Type::STREAM, Some(Protocol::TCP)).expect("a socket");
            if peer == Peer::Agent {
                sockets.mark(&socket).expect("marked");
            }
            socket.connect_timeout(&target.into(), Duration::from_secs(5)).map(|()| socket)
        });
        let about = format!("{peer:?} to {target}, {state:?}, alive {alive}: {:?}", client.as_ref().err());
        match expected.answer {
            Answer::Refuse => assert!(refused(client), "{about}"),
            Answer::Pass => {
                let _client = client.unwrap_or_else(|_| panic!("{about}"));
                drop(arrived(if peer == Peer::Agent { &outside } else { &application }));
            }
            Answer::Agent => {
                let _client = client.unwrap_or_else(|_| panic!("{about}"));
                let original = sockets.original_destination(&arrived(&agent)).expect("recorded");
                assert_eq!((original.ip(), original.port()), (target.ip().to_canonical(), port), "{about}");
            }
        }
        *reached.entry(expected.reason.as_str()).or_default() += 1;
    }
    for reason in ["captured", "same-pod", "agent", "enrolment-pending", "agent-silent"] {
        assert!(reached.get(reason).copied().unwrap_or(0) >= 30, "{reason}: {reached:?}");
    }
}

/// What `bpftool map dump` shows has names.
#[test]
fn maps_carry_their_types() {
    let node = Node::new();
    let (datapath, _listener) = node.enrolled(Mode::Strict);
    let dump = |map: &str| {
        let path = datapath.pin_dir().join(map);
        let output = Command::new("bpftool").args(["map", "dump", "pinned"]).arg(path).output().expect("run bpftool");
        String::from_utf8(output.stdout).expect("text")
    };
    let pods = dump("PODS");
    for name in ["addr4", "generation", "state", "mode", "plaintext_by_agent"] {
        assert!(pods.contains(&format!("\"{name}\"")), "{name} in {pods}");
    }
    assert!(dump("POD_ADDRS").contains("\"netns_cookie\""));
}

/// A rule of nftables in a namespace, until it is dropped.
struct Filter<'a>(&'a File);

impl<'a> Filter<'a> {
    /// Drops what `packets` matches.
    fn new(namespace: &'a File, hook: &str, packets: &str) -> Self {
        within(namespace, || {
            run("nft add table inet quiet");
            run(&format!("nft add chain inet quiet some {{ type filter hook {hook} priority 0 ; }}"));
            run(&format!("nft add rule inet quiet some {packets} drop"));
        });
        Self(namespace)
    }
}

impl Drop for Filter<'_> {
    fn drop(&mut self) {
        within(self.0, || {
            let _ = Command::new("nft").args(["delete", "table", "inet", "quiet"]).status();
        });
    }
}

/// A client that is connected, and whose server waits for the end of the handshake as long as the filter is there, or until the
/// client's first byte.
fn half_open(node: &Node) -> (TcpStream, Filter<'_>) {
    let filter = Filter::new(&node.peer, "output", "tcp dport 9080 tcp flags & (syn|ack|psh|fin|rst) == ack");
    let client = node.dial_from_peer("10.99.0.2:9080").expect("the client's part of the handshake");
    client.set_read_timeout(Some(Duration::from_secs(20))).expect("an option");
    (client, filter)
}

/// The far end says that there is no such connection.
fn was_reset(mut client: &TcpStream) -> bool {
    matches!(client.read(&mut [0]), Err(error) if error.kind() == ErrorKind::ConnectionReset)
}

/// Whether nothing comes, not even the end.
fn is_open(mut client: &TcpStream) -> bool {
    client.set_nonblocking(true).expect("a flag");
    let open = matches!(client.read(&mut [0]), Err(error) if error.kind() == ErrorKind::WouldBlock);
    client.set_nonblocking(false).expect("a flag");
    open
}

/// Who is told of wake-ups, one by one, as an event loop is.
struct Wakes(std::os::fd::OwnedFd);

impl Wakes {
    fn new(events: &impl AsFd) -> Self {
        use std::os::fd::FromRawFd;
        // SAFETY: the descriptor is new, and nobody else's.
        let epoll = unsafe { std::os::fd::OwnedFd::from_raw_fd(libc::epoll_create1(libc::EPOLL_CLOEXEC)) };
        let mut event = libc::epoll_event { events: (libc::EPOLLIN | libc::EPOLLET) as u32, u64: 0 };
        let of = events.as_fd().as_raw_fd();
        // SAFETY: both descriptors are open, and the event is live.
        let added = unsafe { libc::epoll_ctl(epoll.as_raw_fd(), libc::EPOLL_CTL_ADD, of, &raw mut event) };
        assert_eq!(added, 0);
        Self(epoll)
    }

    fn within(&self, limit: Duration) -> bool {
        let mut event = libc::epoll_event { events: 0, u64: 0 };
        // SAFETY: there is room for one event.
        let woken = unsafe { libc::epoll_wait(self.0.as_raw_fd(), &raw mut event, 1, limit.as_millis() as i32) };
        woken == 1
    }
}

/// [D.1]: a handshake that began under PERMISSIVE and ends under STRICT is told as overtaken: at once, whatever waits there to be
/// told without a wake-up.
#[test]
fn a_handshake_that_policy_overtakes_is_told_at_once() {
    let node = Node::new();
    let _application = node.serve("0.0.0.0:9080");
    let (mut datapath, _listener) = node.enrolled(Mode::Permissive);
    let mut events = datapath.events().expect("the events");
    let (mut client, _filter) = half_open(&node);
    datapath.ready(node.cookie, &PodPolicy { rule: 3, ..policy(2, Mode::Strict) }).expect("generation 2");
    assert!(refused(node.dial_from_peer("10.99.0.2:9080")), "told without a wake-up");
    let wakes = Wakes::new(&events);
    assert!(wakes.within(Duration::ZERO), "there is something to read");
    assert!(!wakes.within(Duration::from_millis(50)), "and nobody says so again");
    client.write_all(b"x").expect("the end of the handshake");
    assert!(wakes.within(Duration::from_secs(20)), "it wakes whoever is to end it");
    let told: Vec<Event> = events.by_ref().filter(|event| event.kind == EventKind::Overtaken as u8).collect();
    let [told] = &told[..] else { panic!("{told:?}") };
    assert_eq!(
        (told.src.ip(), told.sport),
        (PEER4.parse().expect("a literal"), client.local_addr().expect("own").port())
    );
    assert_eq!((told.dst.ip(), told.dport), (POD4.parse().expect("a literal"), 9080));
    assert_eq!((told.reason, told.rule, told.generation), (Reason::StrictRequiresMtls as u8, 3, 2));
    assert_eq!(told.netns_cookie, node.cookie.0);
    let strict = counted(&datapath, node.cookie, Direction::Inbound, Answer::Refuse, Reason::StrictRequiresMtls);
    assert_eq!(strict, 2);
}

/// The part of an agent that sees to connections which nobody carries, and what it knows of the pod.
struct Seer {
    passed: Passed,
    snapshot: Snapshot,
    pod: Arc<ServedPod>,
    _writer: culvert::telemetry::lines::Writer,
}

impl Seer {
    /// `policies`: manifests.
    fn new(node: &Node, datapath: &Datapath, policies: &str) -> Self {
        let text = format!(
            "apiVersion: v1\nkind: Namespace\nmetadata: {{name: test, labels: {{istio.io/dataplane-mode: ambient}}}}\n---\n\
             apiVersion: v1\nkind: Pod\nmetadata: {{name: web, namespace: test, uid: web, labels: {{app: web}}}}\nspec: {{nodeName: node-1, \
             serviceAccountName: web, containers: [{{name: c, image: i}}]}}\nstatus: {{podIP: {POD4}, podIPs: [{{ip: {POD4}}}, \
             {{ip: \"{POD6}\"}}], phase: Running}}\n{policies}"
        );
        let view = Manifests::of("manifests.yaml", text).view("istio-system");
        assert_eq!(view.problems, []);
        let numbers = Numbers {
            connections_per_pod: 100,
            memory_per_pod: 1 << 20,
            handshakes_per_peer: 100,
            open_files_reserve: 1,
        };
        let netns = PathBuf::from(format!("/run/netns/{}-pod", node.name));
        let pod = ServedPod {
            uid: PodUid("web".into()),
            netns: NetnsHandle::open_by_path(&netns).expect("the pod's namespace").into(),
            cookie: node.cookie,
            ips: [POD4, POD6].map(|ip| ip.parse().expect("a literal")).into(),
            load: Limits::new(numbers, 1000).load(),
        };
        let (log, writer) = access::start_on(access::Config::default(), io::sink()).expect("an access log");
        let registry = Registry::new(Names::default(), 100);
        let passed = Passed::new(
            datapath.events().expect("the events"),
            datapath.storage_fd().expect("the storage of sockets"),
            datapath.older().expect("what is older"),
            log,
            registry.shard(),
            Names::default(),
            Limit::new(0, 1).limiter(),
        );
        let snapshot = policy::compile(&view.cluster, &Options::default(), None);
        Self { passed, snapshot, pod: pod.into(), _writer: writer }
    }

    fn judge_again(&mut self, by_agent: bool) {
        let own = self.snapshot.workload(&self.pod.uid).expect("the pod").clone();
        let occasion = Occasion { entered: false, by_agent };
        self.passed.judge_again(&self.snapshot, &self.pod, &own, occasion).expect("judged");
    }
}

const STRICT: &str = "---\napiVersion: security.istio.io/v1\nkind: PeerAuthentication\n\
    metadata: {name: strict, namespace: test}\nspec: {mtls: {mode: STRICT}}\n";

/// [D.1]: a connection that policy has overtaken does not live on because the kernel's word of it was lost: its socket says what
/// was decided, whoever looks next, and it is missed among the refusals that were counted.
#[test]
fn a_connection_that_policy_has_overtaken_ends_although_its_event_is_lost() {
    let node = Node::new();
    let application = node.serve("0.0.0.0:9080");
    let (mut datapath, _listener) = node.enrolled(Mode::Permissive);
    let (mut strict, mut permissive) = (Seer::new(&node, &datapath, STRICT), Seer::new(&node, &datapath, ""));
    // The pod's own refusals fill the buffer.
    datapath.suspend(node.cookie).expect("suspended");
    within(&node.pod, || {
        for _ in 0..6000 {
            assert!(refused(connect("10.200.0.9:80")), "pending");
        }
    });
    let mut overtaken = |generation| {
        datapath.ready(node.cookie, &policy(generation, Mode::Permissive)).expect("in force");
        datapath.beat().expect("beat");
        let (mut client, _filter) = half_open(&node);
        datapath.ready(node.cookie, &policy(generation + 1, Mode::Strict)).expect("in force");
        client.write_all(b"x").expect("the end of the handshake");
        let (served, _) = application.accept().expect("established");
        (client, served, datapath.verdicts())
    };
    // The policy has changed back meanwhile: what was refused stays refused.
    let (client, _served, _) = overtaken(2);
    let proof = permissive.passed.prove(&permissive.snapshot, [&permissive.pod].into_iter());
    assert!(proof.failures.is_empty() && proof.strays.is_empty(), "{proof:?}");
    assert!(!proof.accounted.contains_key("passed"), "{proof:?}");
    assert!(was_reset(&client), "by the proof");

    let (client, _served, _) = overtaken(4);
    permissive.passed.refresh(&permissive.snapshot, [&permissive.pod].into_iter());
    assert!(was_reset(&client), "by whoever asks for the open connections");

    let (client, _served, counted) = overtaken(6);
    let pods = |cookie| (cookie == node.cookie).then_some(&strict.pod);
    let again = strict.passed.tell(&strict.snapshot, pods, |_| None);
    assert!(again.is_empty() && is_open(&client), "its event is lost, or this test shows nothing");
    // The first time its record may be on its way.
    let first = strict.passed.account(&strict.snapshot, &counted, pods);
    let second = strict.passed.account(&strict.snapshot, &counted, pods);
    assert!(first.is_empty() && second == [node.cookie].into(), "{first:?} {second:?}");
    strict.judge_again(false);
    assert!(was_reset(&client), "as counted and not told");
}

/// [D.1]: where a policy becomes more than the kernel holds, what was on its way in its handshake is judged by the agent.
#[test]
fn a_handshake_is_judged_where_the_agent_takes_the_verdicts_over() {
    let node = Node::new();
    let application = node.serve("0.0.0.0:9080");
    let (mut datapath, _listener) = node.enrolled(Mode::Permissive);
    let port = "---\napiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: port, namespace: test}\n\
        spec: {selector: {matchLabels: {app: web}}, mtls: {mode: PERMISSIVE}, portLevelMtls: {\"9080\": {mode: STRICT}}}\n";
    let mut seer = Seer::new(&node, &datapath, port);
    let (mut client, _filter) = half_open(&node);
    let junk = |n: u64| ModeKey { netns_cookie: u64::MAX - n, ..ModeKey::default() };
    fill::<ModeKey, ModeValue>(&datapath, "MODES", junk);
    assert!(!datapath.is_judged_by_agent(node.cookie));
    datapath.beat().expect("beat");
    let ports = BTreeMap::from([(9080, (Mode::Strict, 3))]);
    datapath.ready(node.cookie, &PodPolicy { ports, ..policy(2, Mode::Permissive) }).expect("in force, by the agent");
    seer.judge_again(datapath.is_judged_by_agent(node.cookie));
    // Nobody knows the connection any more.
    client.write_all(b"x").expect("sent");
    assert!(was_reset(&client), "it reached the application");
    application.set_nonblocking(true).expect("a flag");
    assert!(matches!(application.accept(), Err(error) if error.kind() == ErrorKind::WouldBlock));
}

/// A connection whose record was pushed out in its handshake is refused. The pod may serve the port that it was redirected to, and
/// what listens there is not the server that it asked for; the pod's own connections to that port arrive.
#[test]
fn a_captured_connection_whose_record_is_gone_is_refused() {
    let node = Node::new();
    let (datapath, _listener) = node.enrolled(Mode::Permissive);
    let applications: Vec<TcpListener> = within(&node.pod, || {
        let ports = REDIRECT_PORT_FIRST..REDIRECT_PORT_FIRST + REDIRECT_PORT_COUNT;
        ports.map(|port| TcpListener::bind((POD4, port)).expect("the application listens")).collect()
    });
    let client = within(&node.pod, || Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket"));
    let filter = Filter::new(&node.pod, "input", "tcp flags & (syn|ack) == syn");
    client.set_nonblocking(true).expect("a flag");
    let begun = client.connect(&SockAddr::from("10.200.0.9:8080".parse::<SocketAddr>().expect("a literal")));
    assert_eq!(begun.expect_err("not answered yet").raw_os_error(), Some(libc::EINPROGRESS));
    let flows = MapData::from_pin(datapath.pin_dir().join("FLOWS")).expect("the map is pinned");
    let mut flows = BpfHashMap::<_, FlowKey, FlowValue>::try_from(Map::LruHashMap(flows)).expect("a map");
    let redirected = |(_, flow): &(FlowKey, FlowValue)| flow.kind == FlowKind::Redirected as u8;
    let (key, _) = flows.iter().filter_map(Result::ok).find(redirected).expect("recorded");
    let mut junk = FlowKey { src: Addr::from_be32x4([1, 2, 3, 4]), ..FlowKey::default() };
    while flows.get(&key, 0).is_ok() {
        assert!(junk._pad < 4_000_000, "it is not pushed out");
        for _ in 0..4096 {
            junk._pad += 1;
            flows.insert(junk, FlowValue::default(), 0).expect("there is always room");
        }
    }
    drop(filter);
    // The next SYN comes a second after the first.
    let until = Instant::now() + Duration::from_secs(30);
    let error = loop {
        if let Some(error) = client.take_error().expect("an option") {
            break error;
        }
        assert!(client.peer_addr().is_err(), "connected to {}, which nobody asked for", key.dport);
        assert!(Instant::now() < until, "never answered");
        thread::sleep(Duration::from_millis(10));
    };
    assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
    assert!(counted(&datapath, node.cookie, Direction::Outbound, Answer::Refuse, Reason::KernelCapacity) >= 1);
    let port = REDIRECT_PORT_FIRST + 100;
    for bound in ["127.0.0.1:0", "10.99.0.2:0", "0.0.0.0:0"] {
        let own = within(&node.pod, || Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket"));
        own.bind(&bound.parse::<SocketAddr>().expect("a literal").into()).expect("bound");
        let to: SocketAddr = format!("{POD4}:{port}").parse().expect("an address");
        own.connect_timeout(&to.into(), Duration::from_secs(20)).expect("the pod's own");
        let (_, from) = applications[100].accept().expect("the application gets its own");
        assert_eq!(from.port(), own.local_addr().expect("bound").as_socket().expect("IP").port());
    }
    let left: Vec<_> = flows.iter().filter_map(Result::ok).filter(|(_, flow)| flow.kind != 0).collect();
    assert!(left.is_empty(), "{left:?}");
}

/// Whoever is refused because a map is full: the pod, in both directions.
fn closed(node: &Node) -> bool {
    refused(node.dial_from_pod("10.200.0.9:80")) && refused(node.dial_from_peer("10.99.0.2:9080"))
}

/// [K.4]: where the map of pods is full, a pod is not captured, and the gate holds it; and so it does where its own map is full.
#[test]
fn a_full_map_of_pods_leaves_the_pod_at_the_gate() {
    let node = Node::new();
    let gated = Gated::new(&node, "burstable/pod1");
    let _server = gated.inside(|| node.serve("[::]:9080"));
    let mut datapath = gated.load();
    datapath.gate(Some(std::slice::from_ref(&gated.root))).expect("written");
    assert!(datapath.take_over().expect("attached").is_empty());
    let until = Instant::now() + Duration::from_secs(20);
    while node.dial_from_pod(&format!("{PEER4}:1")).is_err_and(|error| error.kind() == ErrorKind::TimedOut) {
        assert!(Instant::now() < until, "a fresh link");
    }
    assert_eq!(fill::<u64, PodValue>(&datapath, "PODS", |n| u64::MAX - n), 16384);
    let ips: Vec<IpAddr> = vec![POD4.parse().expect("a literal")];
    let error = datapath.prepare(node.cookie, node.pod.as_fd(), &ips).expect_err("no room");
    assert!(format!("{error:#}").contains("PODS (the map holds 16384 pods)"), "{error:#}");
    assert_eq!((gated.gets_out(), gated.gets_in()), ([false; 2], [false; 2]));
    assert_eq!(fill::<u64, GateValue>(&datapath, "GATE", |n| u64::MAX - n), 32768);
    let error = datapath.classify_one(gated.pod, Class::Out).expect_err("no room");
    assert!(format!("{error:#}").contains("GATE (the map holds 32768 pods)"), "{error:#}");
    assert_eq!((gated.gets_out(), gated.gets_in()), ([false; 2], [false; 2]));
}

/// [K.4]: where there is no room for its listeners, a pod's connections and tunnels to it are refused.
#[test]
fn a_full_map_of_listeners_refuses_what_needs_them() {
    let node = Node::new();
    let mut datapath = node.load();
    datapath.beat().expect("beat");
    node.prepare(&mut datapath);
    let listener = node.listener();
    let map = MapData::from_pin(datapath.pin_dir().join("LISTENERS")).expect("the map is pinned");
    let mut map = SockHash::<_, ListenerKey>::try_from(Map::SockHash(map)).expect("a map of sockets");
    let mut filled = 0u64;
    while map
        .insert(ListenerKey { netns_cookie: u64::MAX - filled, kind: 0, worker: 0 }, listener.as_raw_fd(), 0)
        .is_ok()
    {
        filled += 1;
    }
    assert_eq!(filled, 65536);
    let error = datapath.listener(node.cookie, ListenerKind::Outbound, 0, listener.as_fd()).expect_err("no room");
    assert!(format!("{error:#}").contains("LISTENERS"), "{error:#}");
    assert!(refused(node.dial_from_pod("10.200.0.9:80")), "pending");
    datapath.ready(node.cookie, &policy(1, Mode::Permissive)).expect("ready");
    datapath.beat().expect("beat");
    assert!(refused(node.dial_from_pod("10.200.0.9:80")), "no listener");
    assert!(refused(node.dial_from_peer("10.99.0.2:15008")), "no listener");
    assert_eq!(counted(&datapath, node.cookie, Direction::Outbound, Answer::Refuse, Reason::NoListener), 1);
}

/// [K.4], specification §3: where there is no room to say where a pod's frames come into the node, or that its UDP is refused, the
/// pod stays closed.
#[test]
fn full_maps_of_devices_and_of_refused_udp_leave_the_pod_closed() {
    let node = Node::new();
    let _application = node.serve("0.0.0.0:9080");
    let mut datapath = node.load();
    datapath.beat().expect("beat");
    node.prepare(&mut datapath);
    assert_eq!(fill::<u32, VethValue>(&datapath, "VETHS", |n| u32::MAX - n as u32), 32768);
    let error = within(&node.peer, || datapath.guard(node.cookie, &[1], false)).expect_err("no room");
    assert!(format!("{error:#}").contains("VETHS (the map holds 32768 devices)"), "{error:#}");
    assert!(closed(&node));
    datapath.beat().expect("beat");
    fill::<u64, u32>(&datapath, "UDP_PODS", |n| u64::MAX - n);
    let refused = PodPolicy { udp_refused: true, ..policy(1, Mode::Permissive) };
    let error = datapath.ready(node.cookie, &refused).expect_err("no room");
    assert!(format!("{error:#}").contains("UDP_PODS (the map holds 16384 pods)"), "{error:#}");
    assert!(closed(&node));
    let pending = counted(&datapath, node.cookie, Direction::Outbound, Answer::Refuse, Reason::EnrolmentPending);
    assert_eq!(pending, 2);
}

/// How often the program of a pinned link has run.
fn runs(node: &Node, link: &str) -> u64 {
    let ask = |what: &[&str]| -> serde_json::Value {
        let output = Command::new("bpftool").arg("-j").args(what).output().expect("run bpftool");
        serde_json::from_slice(&output.stdout).expect("JSON")
    };
    let path = node.bpffs.join("culvert/links").join(link);
    let link = ask(&["link", "show", "pinned", path.to_str().expect("text")]);
    let id = link["prog_id"].to_string();
    ask(&["prog", "show", "id", &id])["run_cnt"].as_u64().unwrap_or(0)
}

/// Capture, verdict and what shows peers cost nothing per packet: they run when a connection begins and ends.
#[test]
fn no_program_runs_for_the_bytes_of_a_connection() {
    const BYTES: usize = 16 << 20;
    const STATISTICS: &str = "/proc/sys/kernel/bpf_stats_enabled";
    struct Restore(String);
    impl Drop for Restore {
        fn drop(&mut self) {
            let _ = fs::write(STATISTICS, &self.0);
        }
    }
    let node = Node::new();
    let application = node.serve("0.0.0.0:9080");
    let (_datapath, listener) = node.enrolled(Mode::Permissive);
    let _restore = Restore(fs::read_to_string(STATISTICS).expect("statistics"));
    fs::write(STATISTICS, "1").expect("statistics");
    let inbound = format!("inbound_{}", node.cookie.0);
    let links = ["connect4", "handshake", "peername4", &inbound];
    let before = links.map(|link| runs(&node, link));
    let passed = node.dial_from_peer("10.99.0.2:9080").expect("passed");
    let (served, _) = application.accept().expect("accept");
    let captured = node.dial_from_pod("10.200.0.9:80").expect("captured");
    let (carried, _) = listener.accept().expect("accept");
    served.peer_addr().expect("the peer");
    let opened = links.map(|link| runs(&node, link));
    for ((link, before), opened) in links.iter().zip(before).zip(opened) {
        assert!(opened > before, "{link} does not count, or this test shows nothing");
    }
    for (from, to) in [(&passed, &served), (&served, &passed), (&captured, &carried), (&carried, &captured)] {
        thread::scope(|scope| {
            scope.spawn(|| {
                let (mut from, block) = (from, vec![7; 64 << 10]);
                (0..BYTES / block.len()).for_each(|_| from.write_all(&block).expect("written"));
            });
            let (mut to, mut block, mut left) = (to, vec![0; 64 << 10], BYTES);
            while left > 0 {
                let read = to.read(&mut block).expect("read");
                assert!(read > 0);
                left -= read;
            }
        });
    }
    for ((link, opened), now) in links.iter().zip(opened).zip(links.map(|link| runs(&node, link))) {
        assert!(now - opened < 10, "{link} ran {} times for 32 MiB each", now - opened);
    }
}
