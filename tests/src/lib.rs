//! Two Kubernetes nodes built from network namespaces and cgroups, and what is needed to play scenarios on them.
//!
//! | room | its one job |
//! |---|---|
//! | [`sandbox`] | build the nodes, pods, cgroups, manifests, tokens; start the CA and the agents; take everything away |
//! | [`programs`] | the unmodified programs that run inside pods, and the typed results they print |
//! | [`capture`] | record the link between the nodes and search it for a payload |
//! | [`vm`] | boot another kernel under QEMU and run a script in it |
//! | [`interrupt`] | Ctrl-C as an ordinary error, so that everything built is also taken down |
//! | [`command`] | run a program of the system; say what it said when it fails |
//!
//! The scenarios themselves are in `tests/tests/`, one file per behaviour. They need root; a scenario that cannot run on
//! this machine fails and says why. The library has few dependencies because `xtask` is built from it first.

pub mod capture;
pub mod command;
pub mod interrupt;
pub mod programs;
pub mod sandbox;
pub mod vm;

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
