//! Tools that cargo builds once into the cache, and kernels for the tests in QEMU.

use std::path::PathBuf;

use anyhow::{Context, Result};
use culvert_tests::interrupt;
use culvert_tests::vm::Kernel;

use super::{cache, cargo, has, packages, show};
use crate::say;

const CARGO_DENY: &str = "0.20.2";

/// A tool that `cargo install` builds.
pub(super) struct Tool<'a> {
    pub(super) krate: &'a str,
    pub(super) version: &'a str,
    /// What else the result depends on; part of its folder's name.
    pub(super) variant: &'a str,
    pub(super) why: &'a str,
    pub(super) arguments: &'a [&'a str],
    pub(super) environment: &'a [(&'a str, String)],
}

impl Tool<'_> {
    /// Its folder in the cache.
    pub(super) fn dir(&self) -> Result<PathBuf> {
        let variant = if self.variant.is_empty() { String::new() } else { format!("-{}", self.variant) };
        Ok(cache()?.join("tools").join(format!("{}-{}{variant}", self.krate, self.version)))
    }

    pub(super) fn executable(&self) -> Result<PathBuf> {
        Ok(self.dir()?.join("bin").join(self.krate))
    }

    /// Its executable, built if it is not there.
    pub(super) fn install(&self) -> Result<PathBuf> {
        let executable = self.executable()?;
        if executable.is_file() {
            return Ok(executable);
        }
        let step = say::step(&format!(
            "build {} {} with cargo, once, into {}: {}",
            self.krate,
            self.version,
            self.dir()?.display(),
            self.why
        ));
        let mut install = cargo();
        install
            .args(["install", "--locked", self.krate, "--version", self.version, "--root"])
            .arg(self.dir()?)
            .args(self.arguments)
            // The checkout's own cargo settings are not for this; and a tool that runs for seconds needs no long
            // optimisation.
            .current_dir("/")
            .env("CARGO_PROFILE_RELEASE_LTO", "off")
            .env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "1")
            .env("CARGO_PROFILE_RELEASE_DEBUG", "0")
            .env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "16")
            .env_remove("RUSTC_BOOTSTRAP");
        for (name, value) in self.environment {
            install.env(name, value);
        }
        show(&mut install).with_context(|| format!("build {}", self.krate))?;
        step.done();
        Ok(executable)
    }
}

pub(super) fn cargo_deny() -> Result<PathBuf> {
    Tool {
        krate: "cargo-deny",
        version: CARGO_DENY,
        variant: "",
        why: "checks licences, bans and sources of dependencies (about 3 minutes on 2 cores)",
        arguments: &[],
        environment: &[],
    }
    .install()
}

/// For each kernel that the tests boot, is not here, and cannot be had from apt either: why, and the remedy. Where apt has
/// no lists yet, they are fetched.
pub(super) fn kernels_out_of_reach() -> Vec<String> {
    let missing: Vec<Kernel> = match kernel_cache() {
        Ok(cache) => Kernel::ALL.into_iter().filter(|kernel| kernel.cached(&cache).is_none()).collect(),
        Err(error) => return vec![format!("{error:#}")],
    };
    if missing.is_empty() {
        return Vec::new();
    }
    if !has("apt-cache") {
        let names: Vec<&str> = missing.iter().map(|kernel| kernel.series()).collect();
        return vec![format!(
            "the tests boot Debian's kernels {}, and there is no apt to fetch them: run the tests on Debian, or copy \
             ~/.cache/culvert/kernels from a machine that has it",
            names.join(" and ")
        )];
    }
    if !packages::lists_are_there()
        && let Err(error) = packages::refresh()
    {
        return vec![format!("apt has no package lists, and they cannot be fetched: {error:#}")];
    }
    missing.iter().filter_map(|kernel| kernel.offered().err()).map(|error| format!("{error:#}")).collect()
}

/// Fetches the kernels that the tests boot.
pub(super) fn kernels() -> Result<()> {
    for kernel in Kernel::ALL {
        if kernel.cached(&kernel_cache()?).is_some() {
            continue;
        }
        let step = say::step(&format!(
            "fetch Debian's kernel {} ({}) for the tests in QEMU",
            kernel.series(),
            kernel.package()
        ));
        if let Err(error) = kernel.fetch(&kernel_cache()?) {
            interrupt::check()?;
            say::warn(&format!(
                "that failed; the package lists may be old, so they are fetched and it is tried again: {error:#}"
            ));
            packages::refresh()?;
            kernel.fetch(&kernel_cache()?)?;
        }
        step.done();
    }
    Ok(())
}

/// Where kernels are kept.
fn kernel_cache() -> Result<PathBuf> {
    Ok(cache()?.join("kernels"))
}
