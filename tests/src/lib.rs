//! Two Kubernetes nodes built from network namespaces and cgroups, and what is needed to play scenarios on them.
//!
//! | room | its one job |
//! |---|---|
//! | [`apiserver`] | a real API server: etcd, kube-apiserver, kubectl; stop it, kill it, compact its history |
//! | [`sandbox`] | build the nodes, pods, cgroups, manifests, tokens; start the CA and the agents; take everything away |
//! | [`kind`] | a real cluster of several nodes, made by kind from parts |
//! | [`programs`] | the unmodified programs that run inside pods, and the typed results they print |
//! | [`capture`] | record the link between the nodes and search it for a payload |
//! | [`wire`] | count what crosses the link by port; cut it |
//! | [`apps`] | applications of others in pods: how each is started and asked |
//! | [`tour`] | the user's scenario: each policy, what must happen, what did happen |
//! | [`oci`] | write a container image as an archive, the same bytes each time |
//! | [`vm`] | boot another kernel under QEMU and run a script in it |
//! | [`libtest`] | what the output of Rust's test harness adds up to |
//! | [`load`] | a load generator and its server, for `cargo xtask bench` |
//! | [`interrupt`] | Ctrl-C as an ordinary error, so that everything built is also taken down |
//! | [`command`] | run a program of the system; say what it said when it fails |
//!
//! The scenarios themselves are in `tests/tests/`, one file per behaviour. They need root; a scenario that cannot run on
//! this machine fails and says why. The library has few dependencies because `xtask` is built from it first.

pub mod apiserver;
pub mod apps;
pub mod capture;
pub mod command;
pub mod interrupt;
pub mod kind;
pub mod libtest;
pub mod load;
pub mod oci;
pub mod programs;
pub mod sandbox;
pub mod tour;
pub mod vm;
pub mod wire;

use std::env;
use std::path::PathBuf;

use anyhow::{Context, Result};

/// What the project's chores keep between runs: tools built once, kernels. Shared by all checkouts; may be removed.
///
/// # Errors
/// Neither `XDG_CACHE_HOME` nor `HOME` is set.
pub fn cache() -> Result<PathBuf> {
    let base = match env::var_os("XDG_CACHE_HOME").filter(|v| !v.is_empty()) {
        Some(dir) => PathBuf::from(dir),
        None => PathBuf::from(env::var_os("HOME").context("HOME is not set")?).join(".cache"),
    };
    Ok(base.join("culvert"))
}

/// Names the file that [`record`] appends to.
pub const RESULTS_VARIABLE: &str = "CULVERT_TEST_RESULTS";

/// Whether tests shall use their full counts: `cargo xtask test --full`.
pub fn full() -> bool {
    env::var_os("CULVERT_TEST_FULL").is_some()
}

/// Names the number by which every limit of waiting is multiplied.
pub const PATIENCE_VARIABLE: &str = "CULVERT_TEST_PATIENCE";

/// How many times longer than usual a test may wait: 1, unless the machine is known to be slow, as a translated guest is.
pub fn patience() -> u32 {
    env::var(PATIENCE_VARIABLE).ok().and_then(|n| n.parse().ok()).unwrap_or(1)
}

/// Keeps a figure that a test measured, for the summary of `cargo xtask test` and, with `--full`, for docs/.
///
/// # Errors
/// The file of results could not be written.
pub fn record(what: &str) -> Result<()> {
    use std::io::Write;
    eprintln!("{what}");
    let Some(path) = env::var_os(RESULTS_VARIABLE) else { return Ok(()) };
    let mut file =
        std::fs::File::options().create(true).append(true).open(&path).context("open the file of results")?;
    // One write per line: tests run beside each other.
    file.write_all(format!("{what}\n").as_bytes()).context("write a result")
}
