//! `setup`: what this machine must be, what it must have, and the installation of what it lacks.
//!
//! First everything that cannot be installed is checked (`machine`) and all findings are reported together, before
//! anything is changed. Then packages (`packages`), the eBPF compiler and linker (`toolchain`) and cargo's own tools
//! (`tools`) are looked for, and what is missing is installed, each with the reason. A machine that has all of it is
//! recognised in a fraction of a second, without the package manager.

mod machine;
mod packages;
mod toolchain;
mod tools;

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use culvert_tests::{cache, command, interrupt};

pub(crate) use toolchain::Toolchain;

/// What the machine is wanted for; each includes the one before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum For {
    /// Building only.
    Build,
    /// The sandbox.
    Run,
    /// The tests: other kernels, and the checks of dependencies.
    Test,
}

/// A machine that has what is needed.
pub(crate) struct Ready {
    /// Compiles the eBPF crate.
    pub(crate) toolchain: Toolchain,
    /// cargo-deny's executable; only after [`For::Test`].
    pub(crate) deny: Option<PathBuf>,
}

/// Checks the machine and installs what is missing.
///
/// # Errors
/// The machine cannot be used for this, with every finding and its remedy; or an installation failed.
pub(crate) fn run(purpose: For) -> Result<Ready> {
    machine::check(purpose)?;
    packages::install(&packages::wanted(purpose))?;
    let toolchain = toolchain::find_or_install(purpose)?;
    let deny = if purpose >= For::Test { Some(tools::cargo_deny()?) } else { None };
    if purpose >= For::Test {
        tools::kernels()?;
    }
    interrupt::check()?;
    Ok(Ready { toolchain, deny })
}

impl Ready {
    /// A cargo command in this workspace that also builds the eBPF crate.
    pub(crate) fn cargo_command(&self, arguments: &[&str]) -> Result<Command> {
        let mut cargo = cargo();
        cargo.args(arguments).current_dir(root());
        cargo.env("CULVERT_EBPF_TOOLCHAIN", &self.toolchain.name);
        cargo.env("PATH", path_with(&self.toolchain.linker_dir)?);
        Ok(cargo)
    }

    /// Runs cargo, showing what it prints.
    pub(crate) fn cargo(&self, arguments: &[&str]) -> Result<()> {
        show(&mut self.cargo_command(arguments)?)
    }
}

/// The checkout.
pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask is a folder of the checkout")
}

/// The cargo that runs this xtask. What it told its child about this package is not for others.
fn cargo() -> Command {
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    for (name, _) in env::vars_os() {
        let text = name.to_string_lossy();
        if text.starts_with("CARGO_PKG_") || text.starts_with("CARGO_MANIFEST_") {
            cargo.env_remove(&name);
        }
    }
    cargo
}

/// `PATH` with one more directory in front.
pub(crate) fn path_with(dir: &Path) -> Result<OsString> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::join_paths([dir.to_owned()].into_iter().chain(env::split_paths(&path))).context("PATH")
}

/// Runs a command whose output the user sees.
pub(crate) fn show(shown: &mut Command) -> Result<()> {
    let text = command::describe(shown);
    let status = shown.status().with_context(|| format!("start `{text}`"))?;
    interrupt::check()?;
    if !status.success() {
        bail!("`{text}` ended with {status}; what it printed is above");
    }
    Ok(())
}

/// Whether an executable of this name is found, also where only root's PATH looks.
fn has(program: &str) -> bool {
    find(program).is_some()
}

fn find(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let more = ["/usr/sbin", "/sbin", "/usr/local/sbin"].map(PathBuf::from);
    env::split_paths(&path).chain(more).map(|dir| dir.join(program)).find(|p| p.is_file())
}
