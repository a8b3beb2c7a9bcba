//! What cannot be installed: the kernel, its file systems, the rights to use them.

use std::fs;
use std::path::Path;
use std::process;

use anyhow::{Result, bail};
use culvert_tests::command;
use culvert_tests::sandbox::cgroup2_mount;

use super::{For, has, tools};

/// The oldest kernel that is supported and tested.
const KERNEL_FLOOR: (u32, u32) = (6, 1);

/// What root may lack in a container, its bit, and what for. The rights of CAP_BPF are among those of CAP_SYS_ADMIN.
const CAPABILITIES: [(&str, u32, &str); 3] = [
    ("CAP_NET_ADMIN", 12, "links, addresses and routes"),
    ("CAP_NET_RAW", 13, "recordings of the link"),
    ("CAP_SYS_ADMIN", 21, "namespaces, mounts and eBPF"),
];

/// What is so on this machine, as far as it was looked at.
#[derive(Debug, Clone)]
struct Facts {
    rustup: bool,
    /// As `uname -r` has it.
    release: String,
    root: bool,
    /// The effective set, a bit for each.
    capabilities: u64,
    /// What came of making a control group.
    cgroup2: Result<(), String>,
    /// What came of making namespaces.
    namespaces: Result<(), String>,
    btf: bool,
    /// Whether the kernel knows the file system.
    bpffs: bool,
    /// What came of mounting it.
    bpffs_mount: Result<(), String>,
    /// Whether a socket can be ended from outside; `None` where the kernel's configuration is not to be read.
    destroys_sockets: Option<bool>,
    /// Why a kernel for the tests cannot be had, for each of which that is so.
    kernels: Vec<String>,
}

/// Reports everything that stands in the way, each with its remedy, before anything is installed.
///
/// # Errors
/// At least one finding.
pub(super) fn check(purpose: For) -> Result<()> {
    let mut facts = Facts::gather(purpose);
    // This may fetch apt's lists, which is in vain on a machine that cannot be used anyway.
    if purpose >= For::Test && findings(purpose, &facts).is_empty() {
        facts.kernels = tools::kernels_out_of_reach();
    }
    match findings(purpose, &facts).as_slice() {
        [] => Ok(()),
        found => bail!("this machine cannot be used as it is; nothing was installed:\n  - {}", found.join("\n  - ")),
    }
}

/// What stands in the way, each with its remedy.
fn findings(purpose: For, facts: &Facts) -> Vec<String> {
    let mut findings = Vec::new();
    if !facts.rustup {
        findings.push(
            "rustup is not on PATH, and the eBPF crate has a toolchain of its own: install it from https://rustup.rs"
                .to_owned(),
        );
    }
    if purpose == For::Build {
        return findings;
    }
    findings.extend(kernel(&facts.release));
    if facts.root {
        let missing = CAPABILITIES.iter().filter(|(_, bit, _)| facts.capabilities & (1 << bit) == 0);
        let missing: Vec<String> = missing.map(|(name, _, why)| format!("{name} ({why})")).collect();
        if !missing.is_empty() {
            findings.push(format!(
                "root has not all of its rights here, as in a container: {} missing; start the container with --privileged, \
                 or use the machine itself",
                missing.join(", ")
            ));
        }
    } else {
        findings.push(
            "the sandbox needs root, for namespaces, cgroups and eBPF: run it as root, e.g. from `sudo -E bash`"
                .to_owned(),
        );
    }
    findings.extend([&facts.cgroup2, &facts.namespaces].into_iter().filter_map(|fact| fact.clone().err()));
    if !facts.btf {
        findings.push(
            "the kernel has no BTF (/sys/kernel/btf/vmlinux): use one built with CONFIG_DEBUG_INFO_BTF=y, as every \
             distribution's is"
                .to_owned(),
        );
    }
    if !facts.bpffs {
        findings.push("the kernel has no BPF file system: use one built with CONFIG_BPF_SYSCALL=y".to_owned());
    } else if let Err(error) = &facts.bpffs_mount {
        findings.push(error.clone());
    }
    if facts.destroys_sockets == Some(false) {
        findings.push(
            "the kernel cannot end a socket from outside, so a policy could not end what is open: use one built with \
             CONFIG_INET_DIAG_DESTROY=y"
                .to_owned(),
        );
    }
    findings.extend(facts.kernels.iter().cloned());
    findings
}

impl Facts {
    /// Looks, and leaves everything as it was.
    fn gather(purpose: For) -> Self {
        let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
        let mut facts = Self {
            rustup: has("rustup"),
            release: fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim().to_owned(),
            root: effective_user(&status) == Some("0"),
            capabilities: effective_capabilities(&status),
            cgroup2: Ok(()),
            namespaces: Ok(()),
            btf: Path::new("/sys/kernel/btf/vmlinux").exists(),
            bpffs: knows_bpffs(&fs::read_to_string("/proc/filesystems").unwrap_or_default()),
            bpffs_mount: Ok(()),
            destroys_sockets: None,
            kernels: Vec::new(),
        };
        if purpose == For::Build {
            return facts;
        }
        facts.destroys_sockets =
            kernel_config(&facts.release).and_then(|config| option(&config, "CONFIG_INET_DIAG_DESTROY"));
        // Whoever has not the rights is told that, and not what fails without them.
        if facts.root && CAPABILITIES.iter().all(|(_, bit, _)| facts.capabilities & (1 << bit) != 0) {
            facts.cgroup2 = cgroup2();
            facts.namespaces = namespaces();
            facts.bpffs_mount = bpffs_mount(&fs::read_to_string("/proc/self/mounts").unwrap_or_default());
        }
        facts
    }
}

/// Of the lines of `/proc/self/status`, the effective user.
fn effective_user(status: &str) -> Option<&str> {
    status.lines().find_map(|l| l.strip_prefix("Uid:"))?.split_whitespace().nth(1)
}

/// Of the lines of `/proc/self/status`, the effective capabilities; none if they are not told.
fn effective_capabilities(status: &str) -> u64 {
    let told = status.lines().find_map(|l| l.strip_prefix("CapEff:"));
    told.and_then(|set| u64::from_str_radix(set.trim(), 16).ok()).unwrap_or_default()
}

fn knows_bpffs(filesystems: &str) -> bool {
    filesystems.lines().any(|line| line.trim_start_matches("nodev").trim() == "bpf")
}

/// Makes a control group and removes it.
fn cgroup2() -> Result<(), String> {
    let mount = cgroup2_mount().map_err(|error| format!("{error:#}"))?;
    let probe = mount.join(format!("culvert-setup-{}", process::id()));
    fs::create_dir(&probe).map_err(|error| {
        format!(
            "no control group can be made in {} ({error}): mount it writable; in a container, start that with --privileged",
            mount.display()
        )
    })?;
    let kills = probe.join("cgroup.kill").exists();
    fs::remove_dir(&probe).map_err(|error| format!("remove {} by hand: {error}", probe.display()))?;
    if kills { Ok(()) } else { Err("control groups have no cgroup.kill: Linux 5.14 and newer have it".to_owned()) }
}

/// Makes the namespaces that pods and nodes are, for a program that does nothing.
fn namespaces() -> Result<(), String> {
    if !has("unshare") {
        return Ok(());
    }
    command::run("unshare", &["--mount", "--net", "true"])
        .map(drop)
        .map_err(|error| format!("no namespaces can be made ({error:#}): in a container, start that with --privileged"))
}

/// Mounts the BPF file system where nobody else sees it, if it is not mounted.
fn bpffs_mount(mounts: &str) -> Result<(), String> {
    if mounts.lines().any(|line| line.split(' ').nth(1) == Some("/sys/fs/bpf")) || !has("unshare") {
        return Ok(());
    }
    let mount = ["--mount", "mount", "-t", "bpf", "bpf", "/sys/fs/bpf"];
    command::run("unshare", &mount).map(drop).map_err(|error| {
        format!(
            "the BPF file system cannot be mounted ({error:#}): `mount -t bpf bpf /sys/fs/bpf` where that is allowed; for a \
             container, on its host, and give it to the container with --volume /sys/fs/bpf:/sys/fs/bpf"
        )
    })
}

/// What this kernel was built with, where that can be read.
fn kernel_config(release: &str) -> Option<String> {
    fs::read_to_string(format!("/boot/config-{release}"))
        .or_else(|_| command::run("gzip", &["-dc", "/proc/config.gz"]).map_err(|_| ()))
        .ok()
}

/// Whether an option that is yes or no is yes; `None` if the text is not about it at all.
fn option(config: &str, name: &str) -> Option<bool> {
    config.lines().find_map(|line| {
        if line.strip_prefix(name).is_some_and(|rest| rest.starts_with('=')) {
            return Some(line.ends_with("=y"));
        }
        (line.strip_prefix("# ")?.strip_prefix(name)? == " is not set").then_some(false)
    })
}

fn kernel(release: &str) -> Option<String> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse::<u32>);
    let (major, minor) = KERNEL_FLOOR;
    match (numbers.next(), numbers.next()) {
        (Some(Ok(a)), Some(Ok(b))) if (a, b) >= KERNEL_FLOOR => None,
        (Some(Ok(a)), Some(Ok(b))) => Some(format!(
            "the kernel is {a}.{b}, Culvert needs {major}.{minor} or newer: install your distribution's newer kernel and reboot"
        )),
        _ => Some(format!(
            "the kernel's version {release:?} cannot be read; Culvert needs Linux {major}.{minor} or newer"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_below_the_floor_are_named() {
        for good in ["6.1.0-56-cloud-amd64", "6.12.117", "6.18.44-fc", "7.0.0"] {
            assert_eq!(kernel(good), None, "{good}");
        }
        for bad in ["5.15.0-91-generic", "6.0.19", "4.19", "", "six"] {
            assert!(kernel(bad).is_some(), "{bad}");
        }
    }

    /// A machine that can be used.
    fn good() -> Facts {
        Facts {
            rustup: true,
            release: "6.12.117".to_owned(),
            root: true,
            capabilities: 0x1ff_ffff_ffff,
            cgroup2: Ok(()),
            namespaces: Ok(()),
            btf: true,
            bpffs: true,
            bpffs_mount: Ok(()),
            destroys_sockets: Some(true),
            kernels: Vec::new(),
        }
    }

    /// One thing that is not as it should be.
    type Spoil = fn(&mut Facts);

    #[test]
    fn what_stands_in_the_way_is_named_with_its_remedy() {
        let cases: [(Spoil, For, &[&str]); 12] = [
            (|f| f.rustup = false, For::Build, &["https://rustup.rs"]),
            (|f| f.release = "5.15.0".to_owned(), For::Run, &["5.15", "6.1 or newer"]),
            (|f| f.root = false, For::Run, &["sudo -E bash"]),
            // What a container without --privileged has.
            (|f| f.capabilities = 0xa804_25fb, For::Run, &["CAP_NET_ADMIN", "CAP_SYS_ADMIN", "--privileged"]),
            (|f| f.capabilities &= !(1 << 13), For::Run, &["CAP_NET_RAW", "--privileged"]),
            (|f| f.cgroup2 = Err("no group".to_owned()), For::Run, &["no group"]),
            (|f| f.namespaces = Err("no namespace".to_owned()), For::Run, &["no namespace"]),
            (|f| f.btf = false, For::Run, &["CONFIG_DEBUG_INFO_BTF=y"]),
            (|f| f.bpffs = false, For::Run, &["CONFIG_BPF_SYSCALL=y"]),
            (|f| f.bpffs_mount = Err("no mount".to_owned()), For::Run, &["no mount"]),
            (|f| f.destroys_sockets = Some(false), For::Run, &["CONFIG_INET_DIAG_DESTROY=y"]),
            (|f| f.kernels = vec!["no 6.1".to_owned()], For::Test, &["no 6.1"]),
        ];
        for (spoil, purpose, words) in cases {
            let mut facts = good();
            spoil(&mut facts);
            let found = findings(purpose, &facts);
            let [finding] = &found[..] else { panic!("not one finding: {found:?} for {facts:?}") };
            for word in words {
                assert!(finding.contains(word), "{word} is not in: {finding}");
            }
        }
        for purpose in [For::Build, For::Run, For::Test] {
            assert_eq!(findings(purpose, &good()), [""; 0]);
        }
        // Building needs nothing of the kernel, and of what cannot be told nothing is said.
        let bare =
            Facts { root: false, capabilities: 0, btf: false, bpffs: false, release: "4.19".to_owned(), ..good() };
        assert_eq!(findings(For::Build, &bare), [""; 0]);
        assert_eq!(findings(For::Test, &Facts { destroys_sockets: None, ..good() }), [""; 0]);
        // All of it at once, so that nobody has to come back.
        assert_eq!(findings(For::Run, &bare).len(), 4);
    }

    #[test]
    fn facts_are_read_from_what_the_kernel_says() {
        let status = "Name:\tx\nUid:\t1000\t0\t0\t0\nCapEff:\t00000000a80425fb\n";
        assert_eq!(effective_user(status), Some("0"));
        assert_eq!(effective_capabilities(status), 0xa804_25fb);
        assert_eq!(effective_capabilities("Name:\tx\n"), 0);
        assert!(knows_bpffs("nodev\tsysfs\nnodev\tbpf\n\text4\n") && !knows_bpffs("nodev\tbpfilter\n"));
        let config = "CONFIG_INET_DIAG=y\n# CONFIG_INET_DIAG_DESTROY is not set\nCONFIG_X=m\n";
        assert_eq!(option(config, "CONFIG_INET_DIAG_DESTROY"), Some(false));
        assert_eq!(option(config, "CONFIG_INET_DIAG"), Some(true));
        assert_eq!(option(config, "CONFIG_INET"), None);
        // Mounted already: nothing is tried.
        assert_eq!(bpffs_mount("none /sys/fs/bpf bpf rw 0 0\n"), Ok(()));
    }
}
