//! The kernels at the ends of the supported range, booted under QEMU.

use anyhow::{Result, ensure};
use culvert_tests::vm::{Guest, Kernel};

/// What the kernel side stands on, asked of the kernel itself rather than read from its configuration.
const SCRIPT: &str = "\
uname -r
test -s /sys/kernel/btf/vmlinux || exit 2
mkdir /sys/fs/cgroup/pod && test -e /sys/fs/cgroup/pod/cgroup.kill || exit 3
mkdir /sys/fs/bpf/culvert || exit 4
/bin/ip link add veth0 type veth peer name veth1 && /bin/ip link add br0 type bridge || exit 5
culvert-pod --help | head -n 1
exit 7
";

fn boots(kernel: Kernel) -> Result<()> {
    let unpacked = kernel.unpacked()?;
    let program = culvert_tests::sandbox::built("culvert-pod")?;
    let guest = Guest::new(SCRIPT).module("veth").module("bridge").program(&program)?;
    let report = guest.program(&culvert_tests::command::find("ip")?)?.boot(&unpacked)?;
    ensure!(report.status == 7, "status {}:\n{}", report.status, report.output);
    let mut lines = report.output.lines();
    ensure!(lines.next() == Some(&unpacked.release), "{}", report.output);
    ensure!(unpacked.release.starts_with(kernel.series()), "{} is not {}", unpacked.release, kernel.series());
    ensure!(lines.next().is_some_and(|l| l.contains("sandbox's pods")), "{}", report.output);
    eprintln!("{}: {:.1} s", unpacked.release, report.took.as_secs_f64());
    Ok(())
}

#[test]
fn the_oldest_supported_kernel_runs_our_programs() -> Result<()> {
    boots(Kernel::Oldest)
}

#[test]
fn a_newer_kernel_runs_our_programs() -> Result<()> {
    boots(Kernel::Newest)
}
