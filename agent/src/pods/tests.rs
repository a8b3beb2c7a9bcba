//! Real cgroups with real processes in real network namespaces.

use std::{
    fs,
    io::Write,
    os::unix::process::CommandExt,
    process::{Child, Command},
    sync::atomic::{AtomicU32, Ordering},
};

use nix::sched::{CloneFlags, setns};

use super::{tree::Tree, *};
use crate::netns::testing::new_netns;

/// A cgroup root of a test's own, which goes with all its processes when dropped.
struct TestNode {
    root: PathBuf,
    children: Vec<Child>,
}

/// Which network namespace a process is to be in.
#[derive(Clone, Copy)]
enum Net<'a> {
    Host,
    Own(&'a NetnsHandle),
    /// Joined some time after the process joined the cgroup, as a container runtime does it.
    Late(&'a NetnsHandle, Duration),
}

impl TestNode {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        assert!(nix::unistd::geteuid().is_root(), "this test makes cgroups and network namespaces: run it as root");
        let mount = find_cgroup2_mount().expect("cgroup2 is mounted");
        let root = mount.join(format!("culvert-test-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed)));
        fs::create_dir(&root).expect("a fresh name on a writable cgroup2 file system");
        Self { root, children: Vec::new() }
    }

    fn mkdir(&self, path: &str) -> PathBuf {
        let path = self.root.join(path);
        fs::create_dir_all(&path).expect("cgroup2 is writable");
        path
    }

    /// Starts a process in a directory, which is made if necessary; returns when it runs in its namespace.
    fn spawn(&mut self, path: &str, net: Net<'_>) -> u32 {
        let dir = self.mkdir(path);
        let procs = fs::OpenOptions::new().write(true).open(dir.join("cgroup.procs")).expect("a cgroup");
        let (netns, delay) = match net {
            Net::Host => (None, Duration::ZERO),
            Net::Own(netns) => (Some(netns), Duration::ZERO),
            Net::Late(netns, delay) => (Some(netns), delay),
        };
        let netns = netns.map(|netns| std::os::fd::AsFd::as_fd(netns).try_clone_to_owned().expect("a descriptor"));
        let late = matches!(net, Net::Late(..));
        let mut command = Command::new("sleep");
        command.arg("1000");
        let join = move || (&procs).write_all(b"0");
        let enter = move || match &netns {
            Some(netns) => setns(netns, CloneFlags::CLONE_NEWNET).map_err(std::io::Error::from),
            None => Ok(()),
        };
        // SAFETY: between fork and exec only system calls are made: write, nanosleep and setns.
        unsafe {
            command.pre_exec(move || {
                if late {
                    join()?;
                    thread::sleep(delay);
                    enter()
                } else {
                    enter()?;
                    join()
                }
            });
        }
        let child = command.spawn().expect("sleep exists");
        let pid = child.id();
        self.children.push(child);
        pid
    }

    fn kill(&mut self, pid: u32) {
        let index = self.children.iter().position(|child| child.id() == pid).expect("a process of this node");
        let mut child = self.children.swap_remove(index);
        child.kill().expect("ours");
        child.wait().expect("ours");
    }

    fn rmdir(&self, path: &str) {
        remove(&self.root.join(path));
    }

    fn config(&self) -> Config {
        Config {
            cgroup_root: self.root.clone(),
            proc_root: "/proc".into(),
            host_netns: Arc::new(NetnsHandle::current().expect("/proc is mounted")),
            kubelet_cgroup: None,
        }
    }

    fn watch(&self) -> (Eyes, Watcher) {
        let (receiver, watcher) = watch(self.config()).expect("the tree is readable");
        (Eyes { receiver }, watcher)
    }
}

impl Drop for TestNode {
    fn drop(&mut self) {
        for child in &mut self.children {
            let _ = child.kill();
            let _ = child.wait();
        }
        remove(&self.root);
    }
}

/// Removes a directory and all below it; a dead process may keep one busy for a moment.
fn remove(dir: &std::path::Path) {
    for name in cgroup::children(dir).unwrap_or_default() {
        remove(&dir.join(name));
    }
    for _ in 0..1000 {
        match fs::remove_dir(dir) {
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => thread::sleep(Duration::from_millis(2)),
            _ => return,
        }
    }
}

/// Sees what is published.
struct Eyes {
    receiver: watch::Receiver<Arc<Node>>,
}

impl Eyes {
    fn until(&mut self, what: &str, reached: impl Fn(&Node) -> bool) -> Arc<Node> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime");
        let result = runtime.block_on(async {
            tokio::time::timeout(Duration::from_secs(20), self.receiver.wait_for(|node| reached(node)))
                .await
                .map(|node| node.map(|node| node.clone()))
        });
        match result {
            Ok(Ok(node)) => node,
            Ok(Err(_)) => panic!("the watcher died while waiting until {what}"),
            Err(_) => panic!("not in time: {what}; last seen: {:#?}", self.receiver.borrow()),
        }
    }

    fn now(&self) -> Arc<Node> {
        self.receiver.borrow().clone()
    }
}

fn uid(text: &str) -> PodUid {
    PodUid(text.into())
}

fn own(node: &Node, pod: &str) -> Option<Arc<NetnsHandle>> {
    match &node.pods.get(&uid(pod))?.network {
        PodNetwork::Own(netns) => Some(netns.clone()),
        PodNetwork::Pending | PodNetwork::Host => None,
    }
}

const A: &str = "0a1b2c3d-0011-2233-4455-66778899aabb";
const B: &str = "1a1b2c3d-0011-2233-4455-66778899aabb";
const C: &str = "2a1b2c3d-0011-2233-4455-66778899aabb";
const STATIC: &str = "9f86d081884c7d659a2feaa0c55ad015";

#[test]
fn pods_of_the_cgroupfs_driver_are_found_at_the_start() {
    let mut node = TestNode::new();
    let netns = [new_netns(), new_netns(), new_netns(), new_netns()];
    for (dir, netns) in [
        (format!("kubepods/pod{A}/0123"), &netns[0]),
        (format!("kubepods/burstable/pod{B}/crio-0123"), &netns[1]),
        (format!("kubepods/besteffort/pod{C}/0123"), &netns[2]),
        (format!("kubepods/burstable/pod{STATIC}/0123"), &netns[3]),
    ] {
        node.spawn(&dir, Net::Own(netns));
    }
    node.mkdir("kubepods/besteffort/poddead0000-0011-2233-4455-66778899aabb/0123");
    node.spawn("kubepods/elsewhere/0123", Net::Own(&netns[0]));
    node.spawn("user.slice/podcafe0000-0011-2233-4455-66778899aabb", Net::Own(&netns[0]));
    let (eyes, watcher) = node.watch();
    let seen = eyes.now();
    assert_eq!(seen.pods.keys().cloned().collect::<Vec<_>>(), [A, B, C, STATIC].map(uid));
    for (pod, netns) in [A, B, C, STATIC].into_iter().zip(&netns) {
        let found = own(&seen, pod).expect("its process is in a namespace of its own");
        assert_eq!((found.id(), found.cookie().ok()), (netns.id(), netns.cookie().ok()), "{pod}");
    }
    assert_eq!(seen.roots.len(), 1);
    assert_eq!(seen.roots[0].path, node.root.join("kubepods"));
    watcher.stop().expect("nothing failed");
}

#[test]
fn a_pod_has_the_id_and_level_that_the_kernel_gives_it() {
    let mut node = TestNode::new();
    node.spawn(&format!("kubepods/burstable/pod{A}/0123"), Net::Host);
    let (eyes, _watcher) = node.watch();
    let cgroup = eyes.now().pods[&uid(A)].cgroup.clone();

    // struct file_handle with room for one u64; the kernel's name for a cgroup is its id.
    #[repr(C)]
    struct Handle {
        bytes: u32,
        kind: i32,
        id: u64,
    }
    let mut handle = Handle { bytes: 8, kind: 0, id: 0 };
    let mut mount_id = 0i32;
    let path = std::ffi::CString::new(cgroup.path.to_str().expect("ASCII")).expect("no NUL");
    // SAFETY: the path ends with NUL; the handle has as much room as it says.
    let rc = unsafe {
        libc::syscall(libc::SYS_name_to_handle_at, libc::AT_FDCWD, path.as_ptr(), &raw mut handle, &raw mut mount_id, 0)
    };
    assert_eq!(rc, 0, "{}", std::io::Error::last_os_error());
    assert_eq!(CgroupId(handle.id), cgroup.id);

    // The root of the hierarchy is 0, the test's directory 1.
    let mount = find_cgroup2_mount().expect("mounted");
    if !mount.join("cgroup.events").exists() {
        assert_eq!(cgroup.level, Some(4));
        assert_eq!(eyes.now().roots[0].level, Some(2));
    }
}

#[test]
fn pods_of_the_systemd_driver_come_and_go() {
    let mut node = TestNode::new();
    let (mut eyes, _watcher) = node.watch();
    assert!(eyes.now().pods.is_empty());
    let guaranteed = |uid: &str| format!("kubepods.slice/kubepods-pod{}.slice", uid.replace('-', "_"));
    let burstable = |uid: &str| {
        format!("kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{}.slice", uid.replace('-', "_"))
    };
    let (of_a, of_b, of_static) = (new_netns(), new_netns(), new_netns());
    let containerd = node.spawn(&format!("{}/cri-containerd-0123.scope", guaranteed(A)), Net::Own(&of_a));
    // CRI-O's monitor comes before the container, and lives in the node's own namespace.
    node.spawn(&format!("{}/crio-conmon-0123.scope", burstable(B)), Net::Host);
    eyes.until("a pod with nothing but its monitor waits", |node| {
        node.pods.get(&uid(B)).is_some_and(|pod| pod.network == PodNetwork::Pending)
    });
    node.spawn(&format!("{}/crio-0123.scope", burstable(B)), Net::Own(&of_b));
    node.spawn(&format!("{}/docker-0123.scope", burstable(STATIC)), Net::Own(&of_static));
    let seen = eyes.until("all three are there", |node| [A, B, STATIC].iter().all(|pod| own(node, pod).is_some()));
    assert_eq!(own(&seen, A).map(|netns| netns.id()), Some(of_a.id()));
    assert_eq!(own(&seen, B).map(|netns| netns.id()), Some(of_b.id()));
    assert_eq!(own(&seen, STATIC).map(|netns| netns.id()), Some(of_static.id()));

    // The directory stays behind, empty: that is no pod.
    node.kill(containerd);
    eyes.until("the dead one is gone", |node| !node.pods.contains_key(&uid(A)));
    assert!(node.root.join(guaranteed(A)).exists());
    assert_eq!(eyes.now().pods.len(), 2);
    // And a process in it again is a pod again.
    let again = new_netns();
    node.spawn(&format!("{}/cri-containerd-0123.scope", guaranteed(A)), Net::Own(&again));
    eyes.until("it is back", |node| own(node, A).is_some_and(|netns| netns.id() == again.id()));
}

/// As kind nests it, made in one go while we watch: no directory may slip through between two levels.
#[test]
fn a_whole_tree_made_at_once_is_not_missed() {
    let mut node = TestNode::new();
    let (mut eyes, watcher) = node.watch();
    let netns = new_netns();
    for (top, dir) in [
        (
            "kubelet.slice",
            format!(
                "kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-besteffort.slice/kubelet-kubepods-besteffort-pod{}.slice/cri-containerd-0123.scope",
                A.replace('-', "_")
            ),
        ),
        ("kubelet", format!("kubelet/kubepods/burstable/pod{A}/0123")),
        ("a", format!("a/b/c/d/kubepods/pod{A}/0123/deeper/and/deeper")),
    ] {
        for _ in 0..15 {
            let pid = node.spawn(&dir, Net::Own(&netns));
            let seen = eyes.until("the pod is there", |node| own(node, A).is_some());
            assert_eq!(own(&seen, A).map(|found| found.id()), Some(netns.id()));
            node.kill(pid);
            node.rmdir(top);
            eyes.until("nothing is left", |node| node.pods.is_empty() && node.roots.is_empty());
        }
    }
    watcher.stop().expect("nothing failed");
}

#[test]
fn a_pod_in_a_pod_is_not_ours() {
    let mut node = TestNode::new();
    let (outer, inner) = (new_netns(), new_netns());
    node.spawn(&format!("kubepods/pod{A}/0123"), Net::Own(&outer));
    node.spawn(&format!("kubepods/pod{A}/0123/kubepods/pod{B}/0123"), Net::Own(&inner));
    let (eyes, _watcher) = node.watch();
    assert_eq!(eyes.now().pods.keys().cloned().collect::<Vec<_>>(), [uid(A)]);
    assert_eq!(own(&eyes.now(), A).map(|found| found.id()), Some(outer.id()));
}

/// The runtime's process is in the pod's cgroup before it is in the pod's namespace, and no event tells of the change.
#[test]
fn a_process_on_its_way_into_the_pod_is_not_host_network() {
    let mut node = TestNode::new();
    let (eyes, watcher) = node.watch();
    let mut receiver = eyes.receiver;
    let observer = thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
        let mut seen = Vec::new();
        while runtime.block_on(receiver.changed()).is_ok() {
            seen.extend(receiver.borrow_and_update().pods.get(&uid(A)).map(|pod| pod.network.clone()));
        }
        seen
    });
    let netns = new_netns();
    node.spawn(&format!("kubepods/pod{A}/0123"), Net::Late(&netns, Duration::from_millis(400)));
    thread::sleep(Duration::from_millis(1000));
    watcher.stop().expect("nothing failed");
    let seen = observer.join().expect("no panic");
    assert_eq!(seen.first(), Some(&PodNetwork::Pending), "{seen:?}");
    assert!(matches!(&seen[1..], [PodNetwork::Own(found)] if found.id() == netns.id()), "{seen:?}");
}

/// As where the node itself is a network namespace: whoever starts a pod's process comes from a third one.
#[test]
fn a_namespace_that_a_process_only_passes_through_is_not_the_pods() {
    let mut node = TestNode::new();
    let netns = new_netns();
    let config = Config { host_netns: Arc::new(new_netns()), ..node.config() };
    let mut tree = Tree::new(config).expect("readable");
    node.spawn(&format!("kubepods/pod{A}/0123"), Net::Late(&netns, Duration::from_millis(300)));
    tree.read_events().expect("readable");
    let deadline = Instant::now() + Duration::from_secs(5);
    while own(&tree.node(), A).is_none_or(|found| found.id() != netns.id()) {
        assert!(Instant::now() < deadline, "the pod stayed where its process had passed through");
        thread::sleep(Duration::from_millis(20));
        tree.read_events().expect("readable");
        tree.look_again(Instant::now()).expect("readable");
    }
}

#[test]
fn a_pod_that_stays_in_the_nodes_namespace_is_host_network() {
    let mut node = TestNode::new();
    let (mut eyes, _watcher) = node.watch();
    node.spawn(&format!("kubepods/pod{A}/0123"), Net::Host);
    let start = Instant::now();
    eyes.until("it is believed", |node| node.pods.get(&uid(A)).is_some_and(|pod| pod.network == PodNetwork::Host));
    assert!(start.elapsed() >= HOST_AFTER - Duration::from_millis(100), "{:?}", start.elapsed());
}

#[test]
fn a_namespace_that_a_process_makes_for_itself_does_not_move_the_pod() {
    let mut node = TestNode::new();
    let (sandbox, private) = (new_netns(), new_netns());
    let pause = node.spawn(&format!("kubepods/pod{A}/pause"), Net::Own(&sandbox));
    // Ages are told in hundredths of a second.
    thread::sleep(Duration::from_millis(50));
    node.spawn(&format!("kubepods/pod{A}/app"), Net::Own(&private));
    node.spawn(&format!("kubepods/pod{A}/app2"), Net::Own(&private));
    node.spawn(&format!("kubepods/pod{A}/setup"), Net::Host);
    // Whoever comes late to it sees the same as one who was there.
    let (mut eyes, _watcher) = node.watch();
    let first = own(&eyes.now(), A).expect("known");
    assert_eq!(first.id(), sandbox.id());
    node.spawn(&format!("kubepods/pod{A}/app3"), Net::Own(&private));
    // Another pod, to know that the events before have been looked at.
    node.spawn(&format!("kubepods/pod{B}/pause"), Net::Own(&new_netns()));
    let seen = eyes.until("the other pod is there", |node| own(node, B).is_some());
    assert_eq!(own(&seen, A).map(|found| found.id()), Some(sandbox.id()));

    // Its eldest is gone, but the namespace is kept while anybody is in it.
    let youngest = node.spawn(&format!("kubepods/pod{A}/app4"), Net::Own(&sandbox));
    node.kill(pause);
    node.spawn(&format!("kubepods/pod{C}/pause"), Net::Own(&new_netns()));
    let seen = eyes.until("a third pod is there", |node| own(node, C).is_some());
    assert_eq!(own(&seen, A).map(|found| found.id()), Some(sandbox.id()));

    // The sandbox is made anew: the old namespace has no process left.
    node.kill(youngest);
    let anew = eyes.until("it is reported anew", |node| own(node, A).is_some_and(|found| found.id() != sandbox.id()));
    assert_eq!(own(&anew, A).map(|found| found.id()), Some(private.id()));
    // The handle of before still works for whoever holds it.
    assert_eq!(first.cookie().ok(), sandbox.cookie().ok());
}

#[test]
fn settled_pods_are_not_looked_at_again_without_an_event() {
    let mut node = TestNode::new();
    node.spawn(&format!("kubepods/pod{A}/0123"), Net::Own(&new_netns()));
    let mut tree = Tree::new(node.config()).expect("readable");
    assert!(own(&tree.node(), A).is_some());
    // Its process might be on its way: so often, and then no more.
    let mut looks = 0;
    while let Some(at) = tree.look_again_at() {
        tree.look_again(at).expect("readable");
        looks += 1;
        assert!(looks <= 20, "looked at without an end");
    }
    assert!(own(&tree.node(), A).is_some());
    // And those that are not settled only so often.
    node.spawn(&format!("kubepods/pod{B}/0123"), Net::Host);
    node.spawn(&format!("kubepods/pod{C}/crio-conmon-0123.scope"), Net::Host);
    tree.read_events().expect("readable");
    let mut looks = 0;
    while let Some(at) = tree.look_again_at() {
        tree.look_again(at).expect("readable");
        looks += 1;
        assert!(looks < 100, "for ever");
    }
    assert_eq!(tree.node().pods[&uid(B)].network, PodNetwork::Host);
    // A monitor is no process of the pod, and says nothing about its network.
    assert_eq!(tree.node().pods[&uid(C)].network, PodNetwork::Pending);
}

#[test]
fn events_that_the_kernel_dropped_are_made_up_for() {
    let mut node = TestNode::new();
    let (of_a, of_b) = (new_netns(), new_netns());
    let a = node.spawn(&format!("kubepods/pod{A}/0123"), Net::Own(&of_a));
    let c = node.spawn(&format!("kubepods/pod{C}/0123"), Net::Own(&of_a));
    let mut tree = Tree::new(node.config()).expect("readable");
    let kept = own(&tree.node(), A).expect("known");
    // Nobody reads while more happens than the queue holds.
    let limit: u32 = fs::read_to_string("/proc/sys/fs/inotify/max_queued_events")
        .expect("/proc is mounted")
        .trim()
        .parse()
        .expect("a number");
    let scratch = node.root.join("scratch");
    for _ in 0..limit / 2 + 10 {
        fs::create_dir(&scratch).expect("cgroup2 is writable");
        fs::remove_dir(&scratch).expect("it is empty");
    }
    node.spawn(&format!("kubepods/burstable/pod{B}/0123"), Net::Own(&of_b));
    node.kill(c);
    tree.read_events().expect("an overflow is no failure");
    let seen = tree.node();
    assert_eq!(own(&seen, B).map(|found| found.id()), Some(of_b.id()));
    assert!(!seen.pods.contains_key(&uid(C)));
    assert!(Arc::ptr_eq(&own(&seen, A).expect("still there"), &kept), "the handle is the same");
    // And events are followed again; the kernel sends this one a few milliseconds late.
    node.kill(a);
    let patience = Instant::now() + Duration::from_secs(10);
    while tree.node().pods.contains_key(&uid(A)) {
        assert!(Instant::now() < patience, "the pod is gone, and no event said so");
        thread::sleep(Duration::from_millis(1));
        tree.read_events().expect("readable");
    }
}

fn known(node: &Node) -> Option<&CgroupDir> {
    match &node.kubelet {
        Kubelet::Known(dir) => Some(dir),
        Kubelet::Absent(_) | Kubelet::Indistinct(_) => None,
    }
}

/// [K.5]
#[test]
fn a_restarted_kubelet_is_found_under_its_new_id() {
    let mut node = TestNode::new();
    let (mut eyes, _watcher) = node.watch();
    match &eyes.now().kubelet {
        Kubelet::Absent(reason) => assert!(reason.contains("system.slice/kubelet.service"), "{reason}"),
        other => panic!("{other:?}"),
    }
    let mut ids = Vec::new();
    for _ in 0..3 {
        let pid = node.spawn("system.slice/kubelet.service", Net::Host);
        let seen = eyes.until("the kubelet is known", |node| known(node).is_some());
        let dir = known(&seen).expect("just seen").clone();
        assert_eq!(dir.id, CgroupId::of_path(&dir.path).expect("it is there"));
        if !find_cgroup2_mount().expect("mounted").join("cgroup.events").exists() {
            assert_eq!(dir.level, Some(3));
        }
        assert!(!ids.contains(&dir.id), "an id is not used twice");
        ids.push(dir.id);
        node.kill(pid);
        node.rmdir("system.slice/kubelet.service");
        eyes.until("it is gone", |node| matches!(node.kubelet, Kubelet::Absent(_)));
    }
}

/// [K.5]
#[test]
fn a_kubelet_that_cannot_be_told_apart_is_never_guessed() {
    let mut node = TestNode::new();
    let (mut eyes, _watcher) = node.watch();
    // k3s: one process is kubelet and others.
    let k3s = node.spawn("system.slice/k3s.service", Net::Host);
    let seen = eyes.until("k3s is recognised", |node| matches!(node.kubelet, Kubelet::Indistinct(_)));
    assert!(matches!(&seen.kubelet, Kubelet::Indistinct(reason) if reason.contains("k3s.service")), "{seen:?}");
    node.kill(k3s);
    node.rmdir("system.slice/k3s.service");
    eyes.until("k3s is gone", |node| matches!(node.kubelet, Kubelet::Absent(_)));

    // The kubelet's cgroup root has the name of a candidate: to take it would exempt all pods.
    let netns = new_netns();
    node.spawn("kubelet", Net::Host);
    eyes.until("it could be the kubelet's", |node| known(node).is_some());
    node.spawn(&format!("kubelet/kubepods/pod{A}/0123"), Net::Own(&netns));
    let seen = eyes.until("it is not any more", |node| own(node, A).is_some() && known(node).is_none());
    assert!(matches!(&seen.kubelet, Kubelet::Indistinct(reason) if reason.contains("contains the pods")), "{seen:?}");
    // The real one, elsewhere, is taken nonetheless.
    node.spawn("kubelet.slice/kubelet.service", Net::Host);
    let seen = eyes.until("the real one is found", |node| known(node).is_some());
    assert!(known(&seen).expect("just seen").path.ends_with("kubelet.slice/kubelet.service"));
}

/// [K.5]: the operator may say which, as a path of the file system or as `/proc/PID/cgroup` shows it; also one that is
/// deeper than anything else we look at.
#[test]
fn a_chosen_kubelet_cgroup_is_followed_wherever_it_is() {
    let mut node = TestNode::new();
    node.spawn("system.slice/kubelet.service", Net::Host);
    for chosen in [node.root.join("1/2/3/4/5/6/7/kubelet"), "/1/2/3/4/5/6/7/kubelet".into()] {
        let (receiver, _watcher) =
            watch(Config { kubelet_cgroup: Some(chosen), ..node.config() }).expect("the tree is readable");
        let mut eyes = Eyes { receiver };
        assert!(matches!(eyes.now().kubelet, Kubelet::Absent(_)), "{:?}", eyes.now().kubelet);
        let pid = node.spawn("1/2/3/4/5/6/7/kubelet", Net::Host);
        let seen = eyes.until("it is known", |node| known(node).is_some());
        assert_eq!(known(&seen).expect("just seen").path, node.root.join("1/2/3/4/5/6/7/kubelet"));
        node.kill(pid);
        node.rmdir("1");
        eyes.until("it is gone", |node| known(node).is_none());
    }
}

#[test]
fn a_cgroup_root_that_is_none_is_named() {
    for wrong in ["/etc", "/no/such/directory"] {
        let config = Config { cgroup_root: wrong.into(), ..TestNode::new().config() };
        let error = format!("{:#}", watch(config).expect_err(wrong));
        assert!(error.contains(wrong) && !error.contains('\n'), "{error}");
    }
}

/// How many watches a tree holds in the kernel.
fn watches(tree: &Tree) -> usize {
    use std::os::fd::AsRawFd;
    let fd = tree.event_fd().expect("a descriptor");
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_raw_fd())).expect("/proc is mounted");
    info.lines().filter(|line| line.starts_with("inotify ")).count()
}

/// The kernel does not take a watch away when a cgroup is removed.
#[test]
fn watches_of_removed_directories_are_given_back() {
    let mut node = TestNode::new();
    let mut tree = Tree::new(node.config()).expect("readable");
    let before = watches(&tree);
    let netns = new_netns();
    for _ in 0..5 {
        let pid = node.spawn(&format!("kubepods/burstable/pod{A}/0123"), Net::Own(&netns));
        node.mkdir(&format!("kubepods/burstable/pod{B}/0123"));
        tree.read_events().expect("readable");
        assert_eq!(
            watches(&tree),
            before + 10,
            "two each for pods and containers, one each for kubepods and its class"
        );
        node.kill(pid);
        node.rmdir("kubepods");
        tree.read_events().expect("readable");
        assert_eq!(watches(&tree), before);
    }
}

/// A part of the hierarchy, mounted somewhere else, is as deep as it is.
#[test]
fn levels_count_from_the_root_of_the_hierarchy_also_through_a_bind_mount() {
    use nix::{
        mount::{MsFlags, mount},
        sched::unshare,
    };
    let node = TestNode::new();
    let Some(expected) = Hierarchy::of(&node.root).expect("cgroup2").level(&node.root) else {
        panic!("this test needs the node's cgroup namespace");
    };
    let deep = node.mkdir("a/b/c");
    let place = tempfile::tempdir().expect("a writable /tmp");
    thread::scope(|scope| {
        scope.spawn(|| {
            let none = None::<&str>;
            unshare(CloneFlags::CLONE_NEWNS).expect("root");
            mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).expect("a mount namespace of our own");
            mount(Some(&deep), place.path(), none, MsFlags::MS_BIND, none).expect("bind");
            let hierarchy = Hierarchy::of(place.path()).expect("cgroup2");
            assert_eq!(hierarchy.mount, place.path());
            assert_eq!(hierarchy.level(place.path()), Some(expected + 3));
            assert_eq!(hierarchy.level(&place.path().join("x")), Some(expected + 4));
        });
    });
}

/// [K.5]: a private cgroup namespace, as the nodes of kind are in, hides levels; the kubelet and pods are known by their ids.
#[test]
fn a_private_cgroup_namespace_is_recognised() {
    use nix::{
        mount::{MsFlags, mount},
        sched::unshare,
    };
    const INSIDE: &str = "CULVERT_TEST_PRIVATE_CGROUP_NAMESPACE";
    const NAME: &str = "pods::tests::a_private_cgroup_namespace_is_recognised";
    if let Some(root) = std::env::var_os(INSIDE) {
        let config = Config {
            cgroup_root: root.into(),
            proc_root: "/proc".into(),
            host_netns: Arc::new(NetnsHandle::current().expect("/proc is mounted")),
            kubelet_cgroup: None,
        };
        let node = Tree::new(config).expect("readable").node();
        match &node.kubelet {
            Kubelet::Known(dir) => assert_eq!(dir.level, None),
            other => panic!("{other:?}"),
        }
        assert_eq!(node.pods[&uid(A)].cgroup.level, None);
        assert!(own(&node, A).is_some());
        return;
    }

    let mut node = TestNode::new();
    node.mkdir("private/system.slice/kubelet.service");
    node.spawn(&format!("private/kubepods/pod{A}/0123"), Net::Own(&new_netns()));
    let place = tempfile::tempdir().expect("a writable /tmp");
    let at = place.path().to_owned();
    let procs =
        fs::OpenOptions::new().write(true).open(node.mkdir("private/agent").join("cgroup.procs")).expect("a cgroup");
    let above = fs::OpenOptions::new().write(true).open(node.root.join("private/cgroup.procs")).expect("a cgroup");
    let mut command = Command::new(std::env::current_exe().expect("this test"));
    command.args([NAME, "--exact", "--nocapture"]).env(INSIDE, &at);
    // SAFETY: between fork and exec only system calls are made: write, unshare and mount, on paths made before.
    unsafe {
        command.pre_exec(move || {
            let none = None::<&str>;
            // The root of a cgroup namespace is where its maker is.
            (&above).write_all(b"0")?;
            unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWCGROUP)?;
            (&procs).write_all(b"0")?;
            mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
            mount(Some("none"), &at, Some("cgroup2"), MsFlags::empty(), none)?;
            Ok(())
        });
    }
    let output = command.output().expect("this test runs again");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    assert!(text.contains("1 passed"), "{text}");
}

#[test]
fn no_directory_made_while_we_look_is_missed() {
    const PODS: usize = 300;
    let node = TestNode::new();
    let mut tree = Tree::new(node.config()).expect("readable");
    let before = watches(&tree);
    for round in 0..3 {
        thread::scope(|scope| {
            let maker = scope.spawn(|| {
                for pod in 0..PODS {
                    for container in 0..3 {
                        node.mkdir(&format!("kubepods/burstable/pod{pod}/{container}"));
                    }
                }
            });
            while !maker.is_finished() {
                tree.read_events().expect("readable");
            }
        });
        tree.read_events().expect("readable");
        assert_eq!(watches(&tree), before + 2 + PODS * 8, "round {round}");
        node.rmdir("kubepods");
        tree.read_events().expect("readable");
        assert_eq!(watches(&tree), before, "round {round}");
    }
}
