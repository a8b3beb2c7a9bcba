//! What this process may do, and which of the node's namespaces it is in.

use std::{fs, io, os::unix::fs::MetadataExt as _};

use super::{Finding, Status};

/// `PROC_USER_INIT_INO`, linux/proc_ns.h.
const INITIAL_USER_NAMESPACE: u64 = 0xEFFF_FFFD;

const NET_ADMIN: u32 = 12;
const SYS_PTRACE: u32 = 19;
const SYS_ADMIN: u32 = 21;
const PERFMON: u32 = 38;
const BPF: u32 = 39;

/// Capabilities that the agent needs: number (linux/capability.h), name, what for. SYS_ADMIN implies the last two.
const NEEDED: [(u32, &str, &str); 5] = [
    (SYS_ADMIN, "SYS_ADMIN", "to enter pods' network namespaces"),
    (NET_ADMIN, "NET_ADMIN", "to attach programs to namespaces and devices, and to close connections"),
    (SYS_PTRACE, "SYS_PTRACE", "to find the network namespaces of pods' processes"),
    (BPF, "BPF", "to load programs and maps"),
    (PERFMON, "PERFMON", "to load programs with pointers"),
];

/// What the kernel says of this process.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Process {
    /// The effective set, a bit for each capability.
    capabilities: u64,
    /// 2: system calls are filtered.
    seccomp: u32,
    /// AppArmor's profile or SELinux's context; empty without either.
    confinement: String,
}

impl Process {
    pub(super) fn this() -> Self {
        let confinement = fs::read_to_string("/proc/thread-self/attr/current").unwrap_or_default();
        let status = fs::read_to_string("/proc/thread-self/status").unwrap_or_default();
        Self { confinement: confinement.trim_matches(['\0', '\n', ' ']).to_owned(), ..Self::parse(&status) }
    }

    /// One that may do everything but what a security module denies.
    #[cfg(test)]
    pub(super) fn confined(confinement: &str) -> Self {
        Self { capabilities: u64::MAX, seccomp: 0, confinement: confinement.to_owned() }
    }

    /// The format is that of proc_pid_status(5).
    fn parse(status: &str) -> Self {
        let field =
            |name: &str| status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).map(str::trim);
        Self {
            capabilities: field("CapEff").and_then(|set| u64::from_str_radix(set, 16).ok()).unwrap_or_default(),
            seccomp: field("Seccomp").and_then(|mode| mode.parse().ok()).unwrap_or_default(),
            confinement: String::new(),
        }
    }

    fn has(&self, capability: u32) -> bool {
        self.capabilities & 1 << capability != 0
    }

    /// Whether it has the capabilities to load and attach programs.
    pub(super) fn may_bpf(&self) -> bool {
        (self.has(BPF) || self.has(SYS_ADMIN)) && self.has(NET_ADMIN)
    }

    /// Whether it may change what is the network's.
    pub(super) fn may_network(&self) -> bool {
        self.has(NET_ADMIN)
    }

    /// Whether its system calls are filtered.
    pub(super) fn is_filtered(&self) -> bool {
        self.seccomp == 2
    }

    /// A profile of AppArmor that is enforced.
    pub(super) fn profile(&self) -> Option<&str> {
        self.confinement.strip_suffix(" (enforce)")
    }
}

pub(super) fn look(process: &Process, in_pod: bool) -> Vec<Finding> {
    let namespace = |path: &str| fs::metadata(path).map(|meta| meta.ino());
    let mut findings = vec![capabilities(process, namespace("/proc/thread-self/ns/user").ok())];
    if in_pod {
        let processes = processes(&Init::look());
        let sees_node = processes.status == Status::Ok;
        findings.push(processes);
        let both = (namespace("/proc/1/ns/net"), namespace("/proc/thread-self/ns/net"));
        findings.push(network(sees_node, both));
    }
    findings
}

/// `user_namespace` is the number of this process's, as far as it is known.
fn capabilities(process: &Process, user_namespace: Option<u64>) -> Finding {
    const CHECK: &str = "capabilities";
    if user_namespace.is_some_and(|number| number != INITIAL_USER_NAMESPACE) {
        let found = "this process is in a user namespace, where capabilities do not count for bpf(2)";
        return Finding::fail(CHECK, found, "set hostUsers: true in the pod's spec, and run no agent without root");
    }
    let implied = |capability| process.has(SYS_ADMIN) && matches!(capability, BPF | PERFMON);
    let missing: Vec<&(u32, &str, &str)> =
        NEEDED.iter().filter(|(number, ..)| !process.has(*number) && !implied(*number)).collect();
    let names = |of: &mut dyn Iterator<Item = &str>| of.collect::<Vec<_>>().join(", ");
    if missing.is_empty() {
        let by_admin = names(&mut NEEDED.iter().filter(|(number, ..)| !process.has(*number)).map(|(_, name, _)| *name));
        let has = names(&mut NEEDED.iter().filter(|(number, ..)| process.has(*number)).map(|(_, name, _)| *name));
        return Finding::ok(
            CHECK,
            match by_admin.is_empty() {
                true => has,
                false => format!("{has}, which implies {by_admin}"),
            },
        );
    }
    let found: Vec<String> = missing.iter().map(|(_, name, what)| format!("{name} ({what})")).collect();
    let add = names(&mut missing.iter().map(|(_, name, _)| *name));
    Finding::fail(
        CHECK,
        format!("without {}", found.join(", ")),
        format!("add [{add}] to securityContext.capabilities.add, or CAP_ to each for systemd's CapabilityBoundingSet"),
    )
}

/// The first process of the pid namespace, and this one.
#[derive(Debug)]
struct Init {
    /// This process is the first.
    is_this: bool,
    /// Name of the first.
    name: String,
    /// The cgroup (v2) of the first, and this one's, as this process sees them.
    cgroups: [String; 2],
}

impl Init {
    fn look() -> Self {
        let text = |path: &str| fs::read_to_string(path).unwrap_or_default();
        Self {
            is_this: std::process::id() == 1,
            name: text("/proc/1/comm").trim().to_owned(),
            cgroups: ["/proc/1/cgroup", "/proc/self/cgroup"].map(|path| own_cgroup(&text(path))),
        }
    }
}

/// The path of version 2 in the format of cgroups(7).
fn own_cgroup(text: &str) -> String {
    text.lines().find_map(|line| line.strip_prefix("0::")).unwrap_or_default().to_owned()
}

/// Whether the node's processes are visible: the first process is none of this pod's.
fn processes(init: &Init) -> Finding {
    const CHECK: &str = "processes";
    let [first, own] = &init.cgroups;
    let same_container = !own.is_empty() && first == own;
    match init.is_this || same_container || init.name == "pause" {
        false => Finding::ok(CHECK, format!("the node's are visible; the first is {}", init.name)),
        true => Finding::fail(
            CHECK,
            format!("the first process ({}) is this pod's own: the node's are not visible", init.name),
            "set hostPID: true in the pod's spec",
        ),
    }
}

/// The network namespaces of the first process and of this one.
fn network(sees_node: bool, (first, own): (io::Result<u64>, io::Result<u64>)) -> Finding {
    const CHECK: &str = "node network";
    const REMEDY: &str = "set hostNetwork: true in the pod's spec";
    match (sees_node, first, own) {
        (false, ..) => Finding::warn(CHECK, "cannot be told while the node's processes are not visible", REMEDY),
        (true, Ok(first), Ok(own)) if first == own => Finding::ok(CHECK, "this process is in the node's"),
        (true, Ok(_), Ok(_)) => Finding::fail(CHECK, "this process is in a network namespace of its own", REMEDY),
        (true, Err(error), _) | (true, _, Err(error)) => {
            Finding::warn(CHECK, format!("cannot be told: /proc/1/ns/net: {error}"), REMEDY)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(capabilities: &[u32]) -> Process {
        Process { capabilities: capabilities.iter().map(|number| 1 << number).sum(), ..Process::default() }
    }

    #[test]
    fn capabilities_and_filters_are_read_from_status() {
        let text =
            "Name:\tculvert\nCapPrm:\t0000000000000000\nCapEff:\t000000c000281000\nSeccomp:\t2\nSeccomp_filters:\t1\n";
        let process = Process::parse(text);
        assert!(process.may_bpf() && process.is_filtered() && !process.has(24));
        assert_eq!(capabilities(&process, None).status, Status::Ok, "{:x}", process.capabilities);
        assert_eq!(Process::parse("garbage"), Process::default());
        assert_eq!(
            Process { confinement: "cri-containerd.apparmor.d (enforce)".into(), ..process.clone() }.profile(),
            Some("cri-containerd.apparmor.d")
        );
        assert_eq!(Process { confinement: "unconfined".into(), ..process }.profile(), None);
    }

    #[test]
    fn each_missing_capability_is_named_with_its_use() {
        let all = [SYS_ADMIN, NET_ADMIN, SYS_PTRACE, BPF, PERFMON];
        assert_eq!(capabilities(&with(&all), Some(INITIAL_USER_NAMESPACE)).status, Status::Ok);
        for missing in all {
            let rest: Vec<u32> = all.into_iter().filter(|one| *one != missing).collect();
            let finding = capabilities(&with(&rest), None);
            let name = NEEDED.iter().find(|(number, ..)| *number == missing).expect("one of them").1;
            match missing {
                BPF | PERFMON => assert_eq!(finding.status, Status::Ok, "{name}: SYS_ADMIN implies it"),
                _ => assert_eq!(finding.status, Status::Fail, "{name}"),
            }
            assert!(format!("{} {}", finding.found, finding.remedy).contains(name), "{finding:?}");
        }
        let none = capabilities(&with(&[]), None);
        assert!(none.remedy.contains("add [SYS_ADMIN, NET_ADMIN, SYS_PTRACE, BPF, PERFMON]"), "{none:?}");
        assert!(capabilities(&with(&all), Some(4_026_532_000)).remedy.contains("hostUsers"));
    }

    #[test]
    fn a_pods_own_first_process_is_not_the_nodes() {
        let init = |is_this, name: &str, first: &str, own: &str| Init {
            is_this,
            name: name.to_owned(),
            cgroups: [first.to_owned(), own.to_owned()],
        };
        let own = "/kubepods/pod1/abc";
        for (case, status) in [
            (init(false, "systemd", "/init.scope", own), Status::Ok),
            (init(false, "systemd", "/../../../../init.scope", "/"), Status::Ok),
            (init(false, "init", "", ""), Status::Ok),
            (init(true, "culvert", own, own), Status::Fail),
            (init(false, "tini", own, own), Status::Fail),
            (init(false, "tini", "/", "/"), Status::Fail),
            (init(false, "pause", "/kubepods/pod1/def", own), Status::Fail),
        ] {
            assert_eq!(processes(&case).status, status, "{case:?}");
        }
        assert_eq!(own_cgroup("12:cpu:/x\n0::/kubepods/a\n"), "/kubepods/a");
    }

    #[test]
    fn the_nodes_network_is_known_by_the_first_process() {
        assert_eq!(network(true, (Ok(1), Ok(1))).status, Status::Ok);
        assert_eq!(network(true, (Ok(1), Ok(2))).status, Status::Fail);
        assert_eq!(network(false, (Ok(2), Ok(2))).status, Status::Warn);
        let denied = || Err(io::Error::from_raw_os_error(libc::EACCES));
        assert_eq!(network(true, (denied(), Ok(2))).status, Status::Warn);
    }
}
