//! What cannot be installed: the kernel, its file systems, the rights to use them.

use std::fs;
use std::path::Path;

use anyhow::{Result, bail};
use culvert_tests::sandbox::cgroup2_mount;

use super::{For, has};

/// The oldest kernel that is supported and tested.
const KERNEL_FLOOR: (u32, u32) = (6, 1);

/// Reports everything that stands in the way, each with its remedy, before anything is changed.
///
/// # Errors
/// At least one finding.
pub(super) fn check(purpose: For) -> Result<()> {
    let mut findings = Vec::new();
    if !has("rustup") {
        findings.push(
            "rustup is not on PATH, and the eBPF crate has a toolchain of its own: install it from https://rustup.rs"
                .to_owned(),
        );
    }
    if purpose >= For::Run {
        let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        findings.extend(kernel(release.trim()));
        if !nix_is_root() {
            findings.push(
                "the sandbox needs root, for namespaces, cgroups and eBPF: run it as root, e.g. from `sudo -E bash`"
                    .to_owned(),
            );
        }
        if let Err(error) = cgroup2_mount() {
            findings.push(format!("{error:#}"));
        }
        if !Path::new("/sys/kernel/btf/vmlinux").exists() {
            findings.push(
                "the kernel has no BTF (/sys/kernel/btf/vmlinux): use one built with CONFIG_DEBUG_INFO_BTF=y, as every \
                 distribution's is"
                    .to_owned(),
            );
        }
        if !fs::read_to_string("/proc/filesystems")
            .unwrap_or_default()
            .lines()
            .any(|l| l.trim_start_matches("nodev").trim() == "bpf")
        {
            findings.push("the kernel has no BPF file system: use one built with CONFIG_BPF_SYSCALL=y".to_owned());
        }
    }
    match findings.as_slice() {
        [] => Ok(()),
        _ => bail!("this machine cannot be used as it is; nothing was changed:\n  - {}", findings.join("\n  - ")),
    }
}

fn nix_is_root() -> bool {
    fs::read_to_string("/proc/self/status")
        .unwrap_or_default()
        .lines()
        .find_map(|l| l.strip_prefix("Uid:"))
        .and_then(|l| l.split_whitespace().nth(1))
        == Some("0")
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
}
