//! Whether this node can have an agent: looked at before anything of it is loaded, and nothing stays behind.
//!
//! | room | what it looks at |
//! |---|---|
//! | `kernel` | its release, its architecture, what it offers |
//! | `process` | what this process may do, and which of the node's namespaces it is in |
//! | `cgroup` | where the node's pods are |
//! | `bpffs` | where programs and maps are to be pinned |
//! | `cni` | how pods get their network |
//! | `hooks` | whose programs are where the agent attaches its own |
//! | [`runtimes`] | which pods have a kernel of their own, by the API server's word |
//!
//! What can be tried is tried, rather than read off a configuration: a kernel is what it does. What can only be told of a
//! single pod (its devices and what filters them, rules of packet filters inside it) is not looked at here.

use std::path::PathBuf;

use anyhow::bail;
use serde::Serialize;
use tracing::{error, warn};

use process::Process;

mod bpffs;
mod cgroup;
mod cni;
mod hooks;
mod kernel;
mod process;
pub mod runtimes;

/// Where a kubelet's container runtime reads its networks from.
pub const CNI_CONFIGURATION: &str = "/etc/cni/net.d";

/// What the agent would run with.
#[derive(Clone, Debug)]
pub struct Config {
    /// `--pin-dir`
    pub pin_dir: PathBuf,
    /// `--cgroup-root`; the cgroup2 mount unless set.
    pub cgroup_root: Option<PathBuf>,
    /// `--veth-filter`: programs are attached to devices.
    pub veth_filter: bool,
    /// See [`CNI_CONFIGURATION`].
    pub cni_configuration: PathBuf,
    /// This runs in a pod of the cluster, so that the node is seen only where the pod's manifest says so.
    pub in_pod: bool,
}

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// As it should be, or of no consequence.
    Ok,
    /// The agent runs; something is worse than it could be, or not covered.
    Warn,
    /// The agent cannot do its work here.
    Fail,
}

/// The answer to one question about the node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What was looked at, in one word or two.
    pub check: &'static str,
    /// How bad it is.
    pub status: Status,
    /// What is there.
    pub found: String,
    /// What to do about it; empty where there is nothing to do.
    pub remedy: String,
}

impl Finding {
    fn ok(check: &'static str, found: impl Into<String>) -> Self {
        Self { check, status: Status::Ok, found: found.into(), remedy: String::new() }
    }

    fn warn(check: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { check, status: Status::Warn, found: found.into(), remedy: remedy.into() }
    }

    fn fail(check: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { check, status: Status::Fail, found: found.into(), remedy: remedy.into() }
    }
}

/// Looks at everything that the node itself can tell.
pub fn look(config: &Config) -> Vec<Finding> {
    let process = Process::this();
    let mut findings = kernel::look(&process, config.veth_filter);
    findings.extend(process::look(&process, config.in_pod));
    findings.push(bpffs::look(&config.pin_dir, &process, config.in_pod));
    let (finding, places) = cgroup::look(config.cgroup_root.as_deref(), config.in_pod);
    findings.push(finding);
    findings.extend(places.map(|places| hooks::look(&places, &config.pin_dir)));
    findings.push(cni::look(&config.cni_configuration));
    findings
}

/// Looks at the node before an agent starts on it: what is worse than it could be is logged, and what keeps the agent from
/// its work is logged and ends it.
///
/// # Errors
/// One line with everything that failed.
pub fn pass(config: &Config) -> anyhow::Result<()> {
    let findings = look(config);
    for Finding { check, status, found, remedy } in &findings {
        match status {
            Status::Ok => {}
            Status::Warn => warn!(check, found, remedy, "preflight"),
            Status::Fail => error!(check, found, remedy, "preflight"),
        }
    }
    match verdict(&findings) {
        None => Ok(()),
        Some(line) => bail!(line),
    }
}

/// One line about what failed, and what to do about each; `None` if nothing did.
pub fn verdict(findings: &[Finding]) -> Option<String> {
    let failed: Vec<String> = findings
        .iter()
        .filter(|finding| finding.status == Status::Fail)
        .map(|Finding { check, found, remedy, .. }| format!("{check}: {found}: {remedy}"))
        .collect();
    let checks = if failed.len() == 1 { "check" } else { "checks" };
    (!failed.is_empty()).then(|| {
        format!(
            "this node cannot have an agent, {} {checks} failed (culvert preflight): {}",
            failed.len(),
            failed.join("; ")
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_names_all_that_failed_and_nothing_else() {
        let mut findings = vec![Finding::ok("kernel", "6.18.44"), Finding::warn("jit", "off", "switch it on")];
        assert_eq!(verdict(&findings), None, "a warning keeps nobody from starting");
        findings.push(Finding::fail("bpffs", "none", "mount one"));
        let line = verdict(&findings).expect("one failed");
        assert_eq!(line, "this node cannot have an agent, 1 check failed (culvert preflight): bpffs: none: mount one");
        findings.push(Finding::fail("cgroup", "none", "mount another"));
        let line = verdict(&findings).expect("two failed");
        assert!(
            line.contains("2 checks failed") && line.ends_with("bpffs: none: mount one; cgroup: none: mount another"),
            "{line}"
        );
        assert!(!line.contains("jit") && !line.contains('\n'), "{line}");
    }
}
