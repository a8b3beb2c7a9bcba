//! `setup`: what this machine must be, what it must have, and the installation of what it lacks.
//!
//! First everything that cannot be installed is checked (`machine`) and all findings are reported together, before
//! anything is installed. Then packages (`packages`), the eBPF compiler and linker (`toolchain`), cargo's own tools
//! (`tools`) and the tests' Kubernetes (`kubernetes`) are looked for, and what is missing is installed, each with the reason. A
//! machine that has all of it is recognised in a fraction of a second, without the package manager.

mod kubernetes;
mod machine;
mod packages;
mod toolchain;
mod tools;

use std::env;
use std::ffi::OsString;
use std::io::{BufRead, BufReader, IsTerminal, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::thread;

use anyhow::{Context, Result, bail};
use culvert_tests::{cache, command, interrupt};

pub(crate) use kubernetes::{Building, Wanted, build_istiod};
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
    /// The Kubernetes of the tests, which may still be building; only after [`For::Test`].
    pub(crate) kubernetes: Option<Building>,
}

/// Checks the machine and installs what is missing.
///
/// # Errors
/// The machine cannot be used for this, with every finding and its remedy; or an installation failed.
pub(crate) fn run(purpose: For) -> Result<Ready> {
    machine::check(purpose)?;
    packages::install(&packages::wanted(purpose))?;
    // What takes longest, and only processor time: beside everything that follows.
    let kubernetes = if purpose >= For::Test { Some(kubernetes(Wanted::Tests)?) } else { None };
    let toolchain = toolchain::find_or_install(purpose)?;
    let deny = if purpose >= For::Test { Some(tools::cargo_deny()?) } else { None };
    if purpose >= For::Test {
        tools::kernels()?;
    }
    interrupt::check()?;
    Ok(Ready { toolchain, deny, kubernetes })
}

/// As [`run`] for the tests, and waits for all of it.
///
/// # Errors
/// As there; or the Kubernetes of the tests could not be built.
pub(crate) fn all() -> Result<()> {
    let ready = run(For::Test)?;
    ready.kubernetes.map_or(Ok(()), Building::finish)?;
    crate::kind_image::build()
}

/// Programs of Kubernetes; what is not there is built, beside the caller.
///
/// # Errors
/// The set that the environment names is not complete, or no Go can be had.
pub(crate) fn kubernetes(wanted: Wanted) -> Result<Building> {
    packages::install(&packages::of_kubernetes(wanted))?;
    kubernetes::begin(wanted).context("the Kubernetes of the tests")
}

/// Python's package manager.
pub(crate) fn python_with_pip(why: &'static str) -> Result<()> {
    let there = Command::new("python3").args(["-m", "pip", "--version"]).output().is_ok_and(|o| o.status.success());
    if there {
        return Ok(());
    }
    let sign = "/usr/lib/python3/dist-packages/pip/__init__.py";
    packages::install(&[packages::Package::new("python3-pip", sign, why)])
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
        let mut cargo = self.cargo_command(arguments)?;
        let status = run_cargo(&mut cargo, |_| {})?;
        interrupt::check()?;
        if !status.success() {
            bail!("`{}` ended with {status}; what it printed is above", command::describe(&cargo));
        }
        Ok(())
    }
}

/// Runs a cargo command, showing what it prints and passing the lines of its standard output to `read`.
///
/// The eBPF crate is built by a build script, so cargo repeats every line of that build as a warning, each time; those
/// that only tell of progress are left out.
pub(crate) fn run_cargo(cargo: &mut Command, mut read: impl FnMut(&str)) -> Result<ExitStatus> {
    let text = command::describe(cargo);
    if std::io::stderr().is_terminal() {
        cargo.env("CARGO_TERM_COLOR", "always");
    }
    cargo.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = cargo.spawn().with_context(|| format!("start `{text}`"))?;
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    thread::scope(|scope| {
        scope.spawn(|| {
            lines(stderr, |line| {
                if !is_progress_of_ebpf(line) {
                    eprintln!("{line}");
                }
            });
        });
        lines(stdout, |line| {
            println!("{line}");
            read(line);
        });
    });
    child.wait().with_context(|| format!("wait for `{text}`"))
}

fn lines(from: Option<impl Read>, mut each: impl FnMut(&str)) {
    let Some(from) = from else { return };
    // A read error is the end of the output; the command's status tells how it ended.
    for line in BufReader::new(from).split(b'\n').map_while(Result::ok) {
        each(&String::from_utf8_lossy(&line));
    }
}

fn is_progress_of_ebpf(line: &str) -> bool {
    const PROGRESS: [&str; 7] =
        [" Compiling ", " Finished ", " Downloading ", " Downloaded ", " Updating ", " Locking ", " info: "];
    line.contains("warning") && line.contains("culvert@") && PROGRESS.iter().any(|p| line.contains(p))
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

/// Whether an executable of this name is there.
fn has(program: &str) -> bool {
    command::find(program).is_ok()
}
