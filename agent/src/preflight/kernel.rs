//! The kernel: its release, its architecture, and what it offers, told by trying.

use std::{
    env::consts::ARCH,
    fs::{self, File},
    io::{self, Read as _},
    path::Path,
};

use super::{Finding, process::Process};
use crate::{
    datapath::probe,
    netns::{NetnsHandle, sock_diag},
};

/// The oldest kernel that the tests run on.
const FLOOR: (u32, u32) = (6, 1);
/// The kernel's types.
const BTF: &str = "/sys/kernel/btf/vmlinux";

pub(super) fn look(process: &Process, veth_filter: bool) -> Vec<Finding> {
    let text = |path: &str| fs::read_to_string(path).map(|text| text.trim().to_owned()).unwrap_or_default();
    let mut findings = vec![
        release(&text("/proc/sys/kernel/osrelease")),
        architecture(ARCH, &text("/proc/sys/kernel/arch")),
        types(),
        lockdown(&text("/sys/kernel/security/lockdown")),
        jit(&text("/proc/sys/net/core/bpf_jit_enable")),
        programs(process),
        sockets(process),
    ];
    findings.extend(veth_filter.then(|| devices(process)));
    findings
}

fn release(text: &str) -> Finding {
    const CHECK: &str = "kernel";
    let mut numbers = text.split(|c: char| !c.is_ascii_digit()).map(str::parse::<u32>);
    let (Some(Ok(major)), Some(Ok(minor))) = (numbers.next(), numbers.next()) else {
        return Finding::warn(CHECK, format!("release {text:?}"), "Linux 6.1 or newer is needed: see that it is one");
    };
    match (major, minor) >= FLOOR {
        true => Finding::ok(CHECK, text),
        false => Finding::fail(CHECK, text, "use Linux 6.1 or newer"),
    }
}

/// `built_for` is this program's, `machine` the kernel's (empty before Linux 6.1).
fn architecture(built_for: &str, machine: &str) -> Finding {
    const CHECK: &str = "architecture";
    if !machine.is_empty() && machine != built_for {
        let found = format!("the kernel is {machine}, this program {built_for}");
        return Finding::fail(CHECK, found, format!("use the program that is built for {machine}"));
    }
    match built_for {
        "x86_64" => Finding::ok(CHECK, built_for),
        "aarch64" => {
            let remedy = "try it on a node of its own first: the tests run on x86_64 only";
            Finding::warn(CHECK, built_for, remedy)
        }
        _ => Finding::fail(CHECK, built_for, "use nodes with x86_64 or aarch64"),
    }
}

fn types() -> Finding {
    const CHECK: &str = "btf";
    match header(Path::new(BTF)) {
        Ok(bytes) => match btf_bytes(&bytes) {
            Some(size) => Finding::ok(CHECK, format!("{} KiB at {BTF}", size / 1024)),
            None => Finding::fail(CHECK, format!("{BTF} is not BTF"), "use a kernel with CONFIG_DEBUG_INFO_BTF=y"),
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => Finding::fail(
            CHECK,
            format!("there is no {BTF}"),
            "use a kernel with CONFIG_DEBUG_INFO_BTF=y, and mount sysfs at /sys",
        ),
        Err(error) => Finding::fail(CHECK, format!("read {BTF}: {error}"), "let this process read it"),
    }
}

fn header(path: &Path) -> io::Result<[u8; 24]> {
    let mut bytes = [0; 24];
    File::open(path)?.read_exact(&mut bytes)?;
    Ok(bytes)
}

/// Bytes that a header of BTF (linux/btf.h) announces, in this machine's order.
fn btf_bytes(header: &[u8; 24]) -> Option<u64> {
    let word = |at: usize| {
        let mut four = [0; 4];
        four.copy_from_slice(&header[at..at + 4]);
        u64::from(u32::from_ne_bytes(four))
    };
    let magic = u16::from_ne_bytes([header[0], header[1]]);
    // The strings come last: length of the header, offset and length of the strings.
    (magic == 0xeb9f && header[2] == 1).then(|| word(4) + word(16) + word(20))
}

/// `text` is that of the security module's file: all modes, the one in force in brackets; empty where there is none.
fn lockdown(text: &str) -> Finding {
    const CHECK: &str = "lockdown";
    match text.split(['[', ']']).nth(1).unwrap_or("none") {
        "none" => Finding::ok(CHECK, "none"),
        // It denies programs to write to memory of processes, which ours do not.
        "integrity" => Finding::ok(CHECK, "integrity, which denies nothing that the agent's programs do"),
        mode => Finding::warn(CHECK, mode, "not tested: boot with lockdown=integrity if the programs are refused"),
    }
}

fn jit(text: &str) -> Finding {
    const CHECK: &str = "jit";
    match text {
        "0" => Finding::warn(
            CHECK,
            "off: programs are interpreted, for each packet and connection",
            "sysctl -w net.core.bpf_jit_enable=1",
        ),
        "" => Finding::ok(CHECK, "cannot be told in this network namespace"),
        _ => Finding::ok(CHECK, "on"),
    }
}

fn programs(process: &Process) -> Finding {
    const CHECK: &str = "bpf";
    let refused = probe::refused();
    let Some((_, first)) = refused.first() else {
        return Finding::ok(CHECK, "programs and maps of all kinds that the agent has are taken");
    };
    let remedy = remedy(process, first.raw_os_error());
    let refused: Vec<String> = refused.iter().map(|(name, error)| format!("{name}: {error}")).collect();
    Finding::fail(CHECK, format!("the kernel refuses {}", refused.join(", ")), remedy)
}

fn devices(process: &Process) -> Finding {
    const CHECK: &str = "devices";
    match probe::devices_take_links() {
        Ok(true) => Finding::ok(CHECK, "programs are linked to devices (tcx)"),
        Ok(false) => Finding::ok(CHECK, "programs are classic filters at devices (clsact), as before Linux 6.6"),
        Err(error) => {
            let os = error.downcast_ref::<io::Error>().and_then(io::Error::raw_os_error);
            let remedy = match os {
                Some(libc::EPERM) => remedy(process, os),
                _ => "use a kernel with CONFIG_NET_CLS_BPF and CONFIG_NET_SCH_INGRESS, or run with --veth-filter off"
                    .into(),
            };
            Finding::fail(CHECK, format!("no program can be attached to a device: {error:#}"), remedy)
        }
    }
}

/// Why `bpf(2)` fails, by its answer and by what this process may do.
fn remedy(process: &Process, code: Option<i32>) -> String {
    match code {
        Some(libc::EPERM | libc::EACCES) if !process.may_bpf() => "see capabilities".to_owned(),
        Some(libc::EPERM | libc::EACCES | libc::ENOSYS) if process.is_filtered() => {
            "this process has a seccomp filter that denies bpf(2): set securityContext.seccompProfile to Unconfined, or to a \
             profile that allows it"
                .to_owned()
        }
        Some(libc::EPERM | libc::EACCES) => {
            "a security module denies bpf(2), or this is a user namespace: allow it to this process".to_owned()
        }
        _ => "use a kernel with CONFIG_BPF_SYSCALL, CONFIG_CGROUP_BPF and CONFIG_NET_CLS_BPF".to_owned(),
    }
}

fn sockets(process: &Process) -> Finding {
    const CHECK: &str = "sockets";
    let proved = NetnsHandle::current().map_err(anyhow::Error::from).and_then(|own| sock_diag::prove_destroy(&own));
    match proved {
        Ok(()) => Finding::ok(CHECK, "connections that policy no longer allows can be closed (SOCK_DESTROY)"),
        Err(error) => {
            let remedy = match process.may_network() {
                true => "use a kernel with CONFIG_INET_DIAG_DESTROY, and let module tcp_diag be loaded",
                false => "see capabilities",
            };
            Finding::fail(
                CHECK,
                format!("connections that policy no longer allows cannot be closed: {error:#}"),
                remedy,
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{super::Status, *};

    #[test]
    fn releases_of_distributions_are_read() {
        for (text, status) in [
            ("6.18.44-fc-v669", Status::Ok),
            ("6.1.0-56-cloud-amd64", Status::Ok),
            ("6.12.117+deb12-cloud-amd64", Status::Ok),
            ("10.0", Status::Ok),
            ("7.0-rc1", Status::Ok),
            ("6.0.19", Status::Fail),
            ("5.15.0-1084-azure", Status::Fail),
            ("4.18.0-553.el8_10.x86_64", Status::Fail),
            ("", Status::Warn),
        ] {
            assert_eq!(release(text).status, status, "{text}");
        }
    }

    #[test]
    fn a_program_of_another_architecture_is_refused_in_one_line() {
        assert_eq!(architecture("x86_64", "x86_64").status, Status::Ok);
        assert_eq!(architecture("x86_64", "").status, Status::Ok);
        assert_eq!(architecture("aarch64", "aarch64").status, Status::Warn);
        assert_eq!(architecture("riscv64", "riscv64").status, Status::Fail);
        let other = architecture("x86_64", "aarch64");
        assert_eq!((other.status, &*other.remedy), (Status::Fail, "use the program that is built for aarch64"));
    }

    #[test]
    fn the_mode_in_brackets_is_the_one_in_force() {
        for (text, status) in [
            ("", Status::Ok),
            ("[none] integrity confidentiality", Status::Ok),
            ("none [integrity] confidentiality", Status::Ok),
            ("none integrity [confidentiality]", Status::Warn),
        ] {
            assert_eq!(lockdown(text).status, status, "{text}");
        }
        assert_eq!(lockdown("none [integrity] confidentiality").found.split(',').next(), Some("integrity"));
        assert_eq!(
            [jit("0").status, jit("1").status, jit("2").status, jit("").status].map(|s| s == Status::Ok),
            [false, true, true, true]
        );
    }

    #[test]
    fn btf_is_known_by_its_header() {
        let mut header = [0; 24];
        header[..2].copy_from_slice(&0xeb9fu16.to_ne_bytes());
        header[2] = 1;
        for (at, value) in [(4, 24u32), (8, 0), (12, 1000), (16, 1000), (20, 500)] {
            header[at..at + 4].copy_from_slice(&value.to_ne_bytes());
        }
        assert_eq!(btf_bytes(&header), Some(1524));
        header[0] ^= 1;
        assert_eq!(btf_bytes(&header), None);
        assert_eq!(types().status, Status::Ok, "this kernel has it");
    }
}
