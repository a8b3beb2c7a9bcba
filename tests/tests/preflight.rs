//! `culvert preflight` on this machine, with what the agent needs and without: each lack is named with its remedy, by the
//! command and by an agent that does not start for it, and nothing is left behind.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use culvert_tests::patience;
use culvert_tests::sandbox::{built, own_name};
use serde_json::Value;

/// What no look at the node takes, in a development build and beside other tests.
const LIMIT: Duration = Duration::from_secs(2);
/// Where the preflight pins what it removes.
const BPFFS: &str = "/sys/fs/bpf";

/// A directory of the cgroup2 tree as a kubelet's node has it, and a place for pins; both end with it.
struct Node {
    cgroup: PathBuf,
    pins: PathBuf,
}

impl Node {
    fn new(test: &str) -> Result<Self> {
        let mount = culvert::pods::find_cgroup2_mount()?;
        let name = format!("culvert-{}", own_name(test));
        let node = Self { cgroup: mount.join(&name), pins: Path::new(BPFFS).join(name) };
        fs::create_dir_all(node.cgroup.join("kubepods")).context("make a cgroup: run this as root")?;
        fs::create_dir(&node.pins).context("make a directory on the bpffs")?;
        Ok(node)
    }

    /// `culvert preflight` there; `before` is what it is started by.
    fn preflight(&self, before: &[&str], arguments: &[&str]) -> Result<Output> {
        let binary = built("culvert")?;
        let mut words: Vec<&str> = before.to_vec();
        let (binary, cgroup, pins) = (text(&binary)?, text(&self.cgroup)?, text(&self.pins)?);
        words.extend([binary, "preflight"]);
        // What is typed later replaces nothing: each flag is given once.
        for (flag, value) in [("--cgroup-root", cgroup), ("--pin-dir", pins)] {
            if !arguments.contains(&flag) {
                words.extend([flag, value]);
            }
        }
        let (program, rest) = words.split_first().context("a program")?;
        Command::new(program).args(rest).args(arguments).output().with_context(|| format!("start {program}"))
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // A test that has failed says more than what is left of it.
        let _ = fs::remove_dir(self.cgroup.join("kubepods"));
        let _ = fs::remove_dir(&self.cgroup);
        let _ = fs::remove_dir(&self.pins);
    }
}

fn text(path: &Path) -> Result<&str> {
    path.to_str().context("a path of UTF-8")
}

/// What was found of one check.
fn finding(output: &Output, check: &str) -> Result<(String, String)> {
    let all: Vec<Value> = serde_json::from_slice(&output.stdout)
        .with_context(|| format!("no JSON: {}", String::from_utf8_lossy(&output.stderr)))?;
    let one = all.iter().find(|one| one["check"] == check).with_context(|| format!("no {check} in {all:?}"))?;
    let word = |name: &str| one[name].as_str().unwrap_or_default().to_owned();
    Ok((word("status"), format!("{}: {}", word("found"), word("remedy"))))
}

#[test]
fn a_node_with_everything_passes_and_nothing_is_left_on_it() -> Result<()> {
    let node = Node::new("preflight-whole")?;
    let begun = Instant::now();
    let output = node.preflight(&[], &[])?;
    let took = begun.elapsed();
    let table = String::from_utf8_lossy(&output.stdout);
    println!("{table}took {took:?}");
    ensure!(output.status.success(), "it failed: {table}");
    ensure!(table.starts_with("CHECK") && table.contains("kubepods"), "{table}");
    ensure!(took < patience() * LIMIT, "it took {took:?}");
    let left: Vec<_> = fs::read_dir(&node.pins)?.collect();
    ensure!(left.is_empty(), "left behind: {left:?}");
    Ok(())
}

#[test]
fn a_capability_that_is_missing_is_named_with_what_it_is_for() -> Result<()> {
    let node = Node::new("preflight-capability")?;
    for (dropped, word) in [("net_admin", "NET_ADMIN"), ("sys_ptrace", "SYS_PTRACE")] {
        let set = format!("-{dropped}");
        let output = node.preflight(&["setpriv", "--bounding-set", &set, "--inh-caps", &set], &["-o", "json"])?;
        ensure!(output.status.code() == Some(1), "{dropped}: {}", output.status);
        let (status, said) = finding(&output, "capabilities")?;
        ensure!(status == "fail" && said.contains(&format!("add [{word}]")), "{status}: {said}");
    }
    // SYS_ADMIN implies both.
    let set = "-bpf,-perfmon";
    let output = node.preflight(&["setpriv", "--bounding-set", set, "--inh-caps", set], &["-o", "json"])?;
    ensure!(output.status.success(), "without BPF and PERFMON: {}", String::from_utf8_lossy(&output.stdout));
    Ok(())
}

#[test]
fn a_place_that_is_no_bpffs_and_one_that_is_no_cgroup_are_named() -> Result<()> {
    let node = Node::new("preflight-places")?;
    let folder = tempfile::tempdir()?;
    let output = node.preflight(&[], &["-o", "json", "--pin-dir", text(folder.path())?])?;
    ensure!(output.status.code() == Some(1), "{}", output.status);
    let (status, said) = finding(&output, "bpffs")?;
    ensure!(status == "fail" && said.contains(text(folder.path())?) && said.contains("mount -t bpf"), "{said}");
    ensure!(finding(&output, "cgroup")?.0 == "ok", "only that");
    let output = node.preflight(&[], &["-o", "json", "--cgroup-root", "/tmp"])?;
    ensure!(output.status.code() == Some(1), "{}", output.status);
    let (status, said) = finding(&output, "cgroup")?;
    ensure!(status == "fail" && said.contains("/tmp") && said.contains("--cgroup-root"), "{said}");
    Ok(())
}

/// In a pod the node is seen only as far as its manifest says: this process's own view would be taken for the node's.
#[test]
fn a_pod_that_does_not_see_the_node_is_told_what_to_set() -> Result<()> {
    let node = Node::new("preflight-pod")?;
    let in_pod = ["env", "KUBERNETES_SERVICE_HOST=192.0.2.1", "CULVERT_MANIFESTS=/nothing"];
    let alone = ["unshare", "--net", "--pid", "--fork", "--mount-proc"];
    let output = node.preflight(&[&in_pod[..], &alone].concat(), &["-o", "json"])?;
    ensure!(output.status.code() == Some(1), "{}", output.status);
    let (status, said) = finding(&output, "processes")?;
    ensure!(status == "fail" && said.contains("hostPID: true"), "{status}: {said}");
    ensure!(finding(&output, "node network")?.0 == "warn", "it cannot be told");
    // A tree without any pod is not the node's.
    fs::remove_dir(node.cgroup.join("kubepods"))?;
    let output = node.preflight(&in_pod, &["-o", "json"])?;
    let (status, said) = finding(&output, "cgroup")?;
    ensure!(status == "fail" && said.contains("hostPath"), "{status}: {said}");
    Ok(())
}

#[test]
fn an_agent_does_not_start_and_one_line_says_everything_that_failed() -> Result<()> {
    let node = Node::new("preflight-agent")?;
    let folder = tempfile::tempdir()?;
    let mut agent = Command::new("setpriv");
    agent.args(["--bounding-set", "-sys_ptrace", "--inh-caps", "-sys_ptrace"]).arg(built("culvert")?).arg("agent");
    agent.args(["--node-name", "node-a", "--manifests"]).arg(folder.path()).arg("--cert-dir").arg(folder.path());
    agent.arg("--cgroup-root").arg(&node.cgroup).arg("--pin-dir").arg(folder.path().join("pins"));
    let output = agent.stdin(Stdio::null()).output().context("start the agent")?;
    ensure!(output.status.code() == Some(1), "{}", output.status);
    let said = String::from_utf8_lossy(&output.stderr);
    let last = said.lines().last().unwrap_or_default();
    ensure!(last.starts_with("culvert: this node cannot have an agent, 2 checks failed"), "{said}");
    ensure!(last.contains("SYS_PTRACE") && last.contains("is not on a bpffs"), "{last}");
    let all = format!("{said}{}", String::from_utf8_lossy(&output.stdout));
    let errors = all.lines().filter(|line| line.contains("ERROR") && line.contains("preflight")).count();
    ensure!(errors == 2, "{errors} lines in:\n{all}");
    Ok(())
}
