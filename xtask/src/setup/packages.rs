//! The distribution's packages: what each is for, whether it is there, its installation by apt.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};
use culvert_tests::command;

use super::{For, has, show};
use crate::say;

/// A package, what of it is used, and what for.
pub(super) struct Package {
    pub(super) name: String,
    /// A command found on PATH, or a file.
    pub(super) sign: String,
    pub(super) why: &'static str,
}

impl Package {
    pub(super) fn new(name: impl Into<String>, sign: impl Into<String>, why: &'static str) -> Self {
        Self { name: name.into(), sign: sign.into(), why }
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
            Package::new("prometheus", "promtool", "checks what the agents expose; its server is not used"),
        ]);
    }
    wanted
}

/// Installs those that are not there.
///
/// # Errors
/// There is no apt, no root, or apt failed.
pub(super) fn install(packages: &[Package]) -> Result<()> {
    let missing: Vec<&Package> = packages.iter().filter(|p| !p.is_there()).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let list: Vec<String> = missing.iter().map(|p| format!("    {} ({})", p.name, p.why)).collect();
    if !has("apt-get") {
        bail!("these are missing, and there is no apt-get to install them; Debian's names:\n{}", list.join("\n"));
    }
    let step = say::step(&format!("install packages:\n{}", list.join("\n")));
    let names: Vec<&str> = missing.iter().map(|p| p.name.as_str()).collect();
    if !lists_are_there() {
        refresh()?;
    }
    if apt_install(&names).is_err() {
        say::warn("that failed; the package lists may be old, so they are fetched and it is tried again");
        refresh()?;
        apt_install(&names).context("install packages; as root, `apt-get install` of the same names shows more")?;
    }
    if let Some(absent) = missing.iter().find(|p| !p.is_there()) {
        bail!("the package {} is installed but {} is still not found", absent.name, absent.sign);
    }
    step.done();
    Ok(())
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

fn lists_are_there() -> bool {
    let Ok(entries) = std::fs::read_dir("/var/lib/apt/lists") else { return false };
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
