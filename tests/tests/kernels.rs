//! The kernels at the ends of the supported range, booted under QEMU, with the same tests as on this machine's kernel:
//! the kernel programs by themselves, then the mesh at work between two nodes.
//!
//! What was measured stands in docs/kernels.md.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use culvert_tests::libtest::{Count, complaints};
use culvert_tests::sandbox::built;
use culvert_tests::vm::{Guest, Kernel, Report};
use culvert_tests::{command, record};

/// The tests that a guest runs: (name in the guest, package, test target).
const SUITES: [(&str, &str, &str); 2] = [("datapath", "culvert", "datapath"), ("mesh", "culvert-tests", "mesh")];

/// Mark of the lines that part the suites' outputs.
const MARK: &str = "culvert-suite:";

/// What the kernel side stands on, asked of the kernel itself rather than read from its configuration; then the suites.
/// One test at a time, its name printed before it runs: if the guest hangs, the last name is the culprit's.
const SCRIPT: &str = "\
uname -r
lacks() { echo \"this kernel lacks $1\"; exit 2; }
test -s /sys/kernel/btf/vmlinux || lacks 'BTF'
mkdir /sys/fs/cgroup/a /sys/fs/bpf/a || lacks 'cgroup2 or the BPF file system'
test -e /sys/fs/cgroup/a/cgroup.kill || lacks 'cgroup.kill'
for suite in datapath mesh; do
  echo culvert-suite: begin $suite
  begun=$(cut -d. -f1 /proc/uptime)
  $suite --test-threads 1 2>&1
  status=$?
  echo; echo culvert-suite: end $suite $status $(($(cut -d. -f1 /proc/uptime) - begun))
done
dmesg | grep -E 'kernel BUG|Oops|WARNING: CPU|general protection' && exit 3
exit 0
";

/// The tools that the programs and tests call.
const TOOLS: [&str; 5] = ["ip", "nft", "tc", "openssl", "bpftool"];

/// What the sandbox's links, translation and the agent's look at sockets need; those that a kernel has built in are no error.
const MODULES: [&str; 15] = [
    "veth",
    "bridge",
    "nf_tables",
    "nft_chain_nat",
    "nft_nat",
    "nft_masq",
    "nft_numgen",
    "nft_reject",
    "nft_reject_inet",
    "nft_hash",
    "sch_netem",
    "sch_ingress",
    "cls_bpf",
    "inet_diag",
    "tcp_diag",
];

fn supports(kernel: Kernel) -> Result<()> {
    let unpacked = kernel.unpacked()?;
    let mut guest = Guest::new(SCRIPT).limit(Duration::from_secs(900));
    let mut listed = Vec::new();
    for (name, package, target) in SUITES {
        let program = test_program(package, target)?;
        listed.push((name, number_of_tests(&program)?));
        guest = guest.program(name, &program)?;
    }
    for name in ["culvert", "culvert-pod"] {
        guest = guest.program(name, &built(name)?)?;
    }
    for tool in TOOLS {
        guest = guest.tool(tool)?;
    }
    guest = MODULES.into_iter().fold(guest, Guest::module);
    let report = guest.boot(&unpacked)?;
    let log = keep(&unpacked.release, &report)?;
    ensure!(
        report.output.starts_with(&unpacked.release),
        "another kernel than {}:\n{}",
        unpacked.release,
        report.output
    );
    ensure!(unpacked.release.starts_with(kernel.series()), "{} is not {}", unpacked.release, kernel.series());
    let mut said = format!("Linux {}", unpacked.release);
    let mut failures = Vec::new();
    for (name, expected) in listed {
        let output = suite(&report.output, name);
        let count = Count::of(output);
        said += &format!(", {name} {} passed {} failed", count.passed, count.failed);
        if (count.passed, count.failed) != (expected, 0) {
            let names = count.failures.join(", ");
            failures.push(format!(
                "{name}: {expected} tests, {} passed; failed: {names}\n{}",
                count.passed,
                excerpt(complaints(output))
            ));
        }
    }
    record(&format!(
        "{said}; {}, {:.1} s to boot, {:.1} s in all",
        report.accelerator.name(),
        report.booted.as_secs_f64(),
        report.took.as_secs_f64()
    ))?;
    if report.status != 0 {
        failures.push(format!("the end of the console:\n{}", excerpt(&report.output)));
    }
    if !failures.is_empty() {
        bail!("{said}; status {}; the whole console is in {}\n{}", report.status, log.display(), failures.join("\n"));
    }
    Ok(())
}

/// Builds a test target, if it is not built yet, and says where it is. Cargo is asked: beside this test there may be an older
/// one.
fn test_program(package: &str, target: &str) -> Result<PathBuf> {
    let mut cargo = Command::new(std::env::var_os("CARGO").context("run this test by cargo")?);
    cargo.args(["test", "--no-run", "--message-format", "json", "--package", package, "--test", target]);
    let messages =
        command::finish(&mut cargo, None).with_context(|| format!("build the test {target} of {package}"))?;
    let mut programs =
        messages.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok()).filter_map(|m| {
            let kinds = m.get("target")?.get("kind")?.as_array()?;
            let right = kinds.iter().any(|k| k == "test") && m["target"]["name"] == target;
            right.then(|| m.get("executable")?.as_str().map(PathBuf::from)).flatten()
        });
    programs.next_back().with_context(|| format!("cargo built no test {target} of {package}"))
}

fn number_of_tests(program: &Path) -> Result<u32> {
    let list = command::finish(Command::new(program).args(["--list", "--format", "terse"]), None)?;
    Ok(u32::try_from(list.lines().filter(|l| l.ends_with(": test")).count())?)
}

/// What a suite printed; without an end if the guest lost it.
fn suite<'a>(output: &'a str, name: &str) -> &'a str {
    let Some((_, rest)) = output.split_once(&format!("{MARK} begin {name}\n")) else { return "" };
    rest.split(&format!("{MARK} end {name}")).next().unwrap_or(rest)
}

/// The head, which has the first error, and the tail, which has the verifier's last word; the whole is kept elsewhere.
fn excerpt(text: &str) -> String {
    const HEAD: usize = 40;
    const TAIL: usize = 60;
    let lines: Vec<&str> = text.lines().collect();
    if lines.len() <= HEAD + TAIL {
        return text.to_owned();
    }
    let left_out = lines.len() - HEAD - TAIL;
    format!("{}\n[{left_out} lines left out]\n{}", lines[..HEAD].join("\n"), lines[lines.len() - TAIL..].join("\n"))
}

fn keep(release: &str, report: &Report) -> Result<PathBuf> {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("kernel-{release}.log"));
    std::fs::write(&path, &report.output).with_context(|| format!("write {}", path.display()))?;
    Ok(path)
}

#[test]
fn the_oldest_supported_kernel_passes_the_kernel_tests_and_a_mesh_connection() -> Result<()> {
    supports(Kernel::Oldest)
}

#[test]
fn a_newer_kernel_passes_the_kernel_tests_and_a_mesh_connection() -> Result<()> {
    supports(Kernel::Newest)
}
