//! The distribution's packages: what each is for, whether it is there, its installation by apt.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};
use culvert_tests::apps::postgres_programs;
use culvert_tests::command;

use super::{For, Wanted, has, show};
use crate::say;

/// A package, what of it is used, and what for.
pub(super) struct Package {
    pub(super) name: String,
    /// A command found on PATH, or a file.
    pub(super) sign: String,
    pub(super) why: &'static str,
    /// The service that it brings and that nobody here wants: only its programs are used.
    service: Option<&'static str>,
}

impl Package {
    pub(super) fn new(name: impl Into<String>, sign: impl Into<String>, why: &'static str) -> Self {
        Self { name: name.into(), sign: sign.into(), why, service: None }
    }

    /// A package whose service shall not run.
    fn without_service(self, service: &'static str) -> Self {
        Self { service: Some(service), ..self }
    }

    pub(super) fn is_there(&self) -> bool {
        if self.sign.starts_with('/') { Path::new(&self.sign).exists() } else { has(&self.sign) }
    }
}

/// What is wanted whatever the eBPF toolchain will be.
pub(super) fn wanted(purpose: For) -> Vec<Package> {
    let mut wanted = vec![
        Package::new("gcc", "cc", "links Rust programs"),
        Package::new("libc6-dev", "/usr/include/stdlib.h", "links Rust programs, builds the cryptographic library"),
        Package::new("ca-certificates", "/etc/ssl/certs/ca-certificates.crt", "downloads over HTTPS"),
    ];
    if purpose >= For::Run {
        wanted.extend([
            Package::new("iproute2", "ip", "links and addresses of the sandbox"),
            Package::new("nftables", "nft", "kube-proxy's part in the sandbox"),
            Package::new("openssl", "openssl", "signs the sandbox's service account tokens"),
            Package::new("bpftool", "bpftool", "shows the agents' maps"),
        ]);
    }
    if purpose >= For::Test {
        wanted.extend([
            Package::new("qemu-system-x86", "qemu-system-x86_64", "boots the oldest and newest supported kernels"),
            Package::new("busybox-static", "/bin/busybox", "the shell of those kernels' guests"),
            Package::new("xz-utils", "xz", "unpacks those kernels' modules"),
            Package::new("git", "git", "cargo-deny's advisory database"),
            Package::new("zsh", "zsh", "tests the completions that are made for it"),
            Package::new("fish", "fish", "tests the completions that are made for it"),
            Package::new("prometheus", "promtool", "checks what the agents expose; its server is not used")
                .without_service("prometheus"),
            Package::new("postgresql", postgres_sign(), "PostgreSQL through the mesh, with pgbench")
                .without_service("postgresql"),
            Package::new("redis-server", "redis-server", "Redis through the mesh, with redis-benchmark")
                .without_service("redis-server"),
            Package::new("nginx", "nginx", "downloads and WebSocket through the mesh").without_service("nginx"),
            Package::new("openssh-server", "sshd", "ssh through the mesh").without_service("ssh"),
            Package::new("openssh-client", "ssh", "ssh through the mesh"),
            Package::new("iperf3", "iperf3", "streams through the mesh").without_service("iperf3"),
            Package::new("curl", "curl", "downloads through the mesh"),
        ]);
    }
    wanted
}

/// What nodes are made with, and run in.
pub(super) fn of_kubernetes(wanted: Wanted) -> Vec<Package> {
    match wanted {
        Wanted::ApiServer => Vec::new(),
        Wanted::Nodes | Wanted::Tests => vec![
            Package::new("libseccomp-dev", "/usr/include/seccomp.h", "builds runc"),
            Package::new("pkg-config", "pkg-config", "builds runc"),
            Package::new("mmdebstrap", "mmdebstrap", "the base of a Kubernetes node"),
            Package::new("podman", "podman", "runs the nodes of a cluster of kind"),
            Package::new("netavark", "/usr/lib/podman/netavark", "the network of those nodes"),
            Package::new("aardvark-dns", "/usr/lib/podman/aardvark-dns", "their names"),
            Package::new("iptables", "iptables", "the ports of those nodes"),
        ],
    }
}

/// PostgreSQL's server programs are outside PATH, one folder per version.
fn postgres_sign() -> String {
    let folder = postgres_programs().unwrap_or_else(|_| "/usr/lib/postgresql/…/bin".into());
    folder.join("initdb").display().to_string()
}

/// Installs those that are not there.
///
/// # Errors
/// There is no apt, no root, or apt failed.
pub(super) fn install(packages: &[Package]) -> Result<()> {
    remove_left(Path::new(POLICY_FILE))?;
    let missing: Vec<&Package> = packages.iter().filter(|p| !p.is_there()).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let list: Vec<String> = missing.iter().map(|p| format!("    {} ({})", p.name, p.why)).collect();
    if !has("apt-get") {
        bail!("these are missing, and there is no apt-get to install them; Debian's names:\n{}", list.join("\n"));
    }
    let services: Vec<&str> = missing.iter().filter_map(|p| p.service).collect();
    let step = say::step(&format!("install packages:\n{}", list.join("\n")));
    let quiet = Quiet::services(&services)?;
    let names: Vec<&str> = missing.iter().map(|p| p.name.as_str()).collect();
    if !lists_are_there() {
        refresh()?;
    }
    if apt_install(&names).is_err() {
        say::warn("that failed; the package lists may be old, so they are fetched and it is tried again");
        refresh()?;
        apt_install(&names).context("install packages; as root, `apt-get install` of the same names shows more")?;
    }
    quiet.disable(&services)?;
    // A versioned folder is known only now.
    let after = wanted(For::Test);
    let is_there = |p: &Package| p.is_there() || after.iter().any(|q| q.name == p.name && q.is_there());
    if let Some(absent) = missing.iter().find(|p| !is_there(p)) {
        bail!("the package {} is installed but {} is still not found", absent.name, absent.sign);
    }
    step.done();
    Ok(())
}

/// Debian starts what it installs, and at every boot; the tests want programs, not services. For as long as this lives
/// no package starts anything (`policy-rc.d`, see invoke-rc.d(8)); a policy of somebody else's is kept.
struct Quiet {
    policy: Option<&'static Path>,
}

/// Where invoke-rc.d looks for what is forbidden.
const POLICY_FILE: &str = "/usr/sbin/policy-rc.d";
/// 101: forbidden by policy.
const POLICY: &str = "#!/bin/sh\n# cargo xtask installs programs for its tests, and no services.\nexit 101\n";

/// Removes the policy that a killed set-up left, since it would forbid every service for good; another's is kept.
fn remove_left(policy: &Path) -> Result<()> {
    if fs::read_to_string(policy).is_ok_and(|text| text == POLICY) {
        fs::remove_file(policy).with_context(|| {
            format!(
                "a set-up that was killed left {}, which forbids every service to start: remove it",
                policy.display()
            )
        })?;
        say::done(&format!("removed {}, which a set-up that was killed had left", policy.display()));
    }
    Ok(())
}

impl Quiet {
    fn services(services: &[&str]) -> Result<Self> {
        let path = Path::new(POLICY_FILE);
        if services.is_empty() || path.exists() {
            return Ok(Self { policy: None });
        }
        fs::write(path, POLICY).with_context(|| format!("write {}", path.display()))?;
        let quiet = Self { policy: Some(path) };
        fs::set_permissions(path, fs::Permissions::from_mode(0o755))
            .with_context(|| format!("make {} executable", path.display()))?;
        Ok(quiet)
    }

    /// Keeps the services from starting at the next boot.
    fn disable(self, services: &[&str]) -> Result<()> {
        for service in services {
            // Not every version of a package brings its service, and some bring it switched off: update-rc.d fails on these.
            if is_enabled(Path::new("/etc"), service)? {
                command::run("update-rc.d", &[*service, "disable"]).with_context(|| format!("disable {service}"))?;
            }
        }
        if !services.is_empty() {
            say::done(&format!(
                "these services are installed but neither started nor enabled: {}",
                services.join(", ")
            ));
        }
        Ok(())
    }
}

/// Whether a service is among what a runlevel of normal operation starts or stops (update-rc.d(8)).
fn is_enabled(etc: &Path, service: &str) -> Result<bool> {
    for level in ["2", "3", "4", "5", "S"] {
        let links = match fs::read_dir(etc.join(format!("rc{level}.d"))) {
            Ok(links) => links,
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            Err(error) => return Err(error).with_context(|| format!("list /etc/rc{level}.d")),
        };
        for link in links {
            let name = link.with_context(|| format!("list /etc/rc{level}.d"))?.file_name();
            // Such as S01nginx: whether it starts, its place in the order, the service.
            if name.to_str().and_then(|name| name.get(3..)) == Some(service) {
                return Ok(true);
            }
        }
    }
    Ok(false)
}

impl Drop for Quiet {
    fn drop(&mut self) {
        if let Some(path) = self.policy
            && let Err(error) = fs::remove_file(path)
        {
            say::warn(&format!("remove {} by hand, or no package can start a service: {error}", path.display()));
        }
    }
}

/// Whether apt could install a package; its lists are fetched if it knows none of this name.
pub(super) fn candidate(name: &str) -> Result<Option<String>> {
    if !has("apt-cache") {
        return Ok(None);
    }
    for attempt in 0..2 {
        let policy = command::run("apt-cache", &["policy", name])?;
        let version = policy.lines().find_map(|l| l.trim().strip_prefix("Candidate: ")).filter(|v| *v != "(none)");
        if let Some(version) = version {
            return Ok(Some(version.to_owned()));
        }
        if attempt == 0 && !lists_are_there() {
            refresh()?;
        }
    }
    Ok(None)
}

/// Fetches the package lists.
pub(super) fn refresh() -> Result<()> {
    let step = say::step("fetch the package lists (apt-get update)");
    show(apt().args(["-qq", "update"]))?;
    step.done();
    Ok(())
}

pub(super) fn lists_are_there() -> bool {
    let Ok(entries) = fs::read_dir("/var/lib/apt/lists") else { return false };
    entries.flatten().any(|e| e.file_name().to_string_lossy().contains("_Packages"))
}

fn apt_install(names: &[&str]) -> Result<()> {
    show(apt().args(["-qq", "-y", "-o", "Dpkg::Use-Pty=0", "--no-install-recommends", "install"]).args(names))
}

fn apt() -> Command {
    let mut apt = Command::new("apt-get");
    apt.env("DEBIAN_FRONTEND", "noninteractive");
    apt
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_service_is_enabled_where_a_runlevel_knows_it() {
        let dir = std::env::temp_dir().join(format!("culvert-runlevels-{}", std::process::id()));
        fs::create_dir_all(dir.join("rc2.d")).expect("a folder for the test");
        fs::write(dir.join("rc2.d/S01redis-server"), "").expect("a link");
        let enabled = |service| is_enabled(&dir, service).expect("it can be listed");
        let found = (enabled("redis-server"), enabled("redis"), enabled("iperf3"));
        fs::remove_dir_all(&dir).expect("the test's own folder");
        assert_eq!(found, (true, false, false));
    }

    #[test]
    fn the_policy_of_a_killed_setup_is_removed_and_another_is_kept() {
        let dir = std::env::temp_dir().join(format!("culvert-policy-{}", std::process::id()));
        fs::create_dir_all(&dir).expect("a folder for the test");
        let path = dir.join("policy-rc.d");
        remove_left(&path).expect("there is none");
        fs::write(&path, "#!/bin/sh\nexit 101\n").expect("another's policy");
        remove_left(&path).expect("it is not ours");
        assert!(path.exists());
        fs::write(&path, POLICY).expect("what a set-up writes");
        remove_left(&path).expect("it can be removed");
        assert!(!path.exists());
        fs::remove_dir_all(&dir).expect("the test's own folder");
    }
}
