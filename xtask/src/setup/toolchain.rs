//! The compiler and the linker of the eBPF crate.
//!
//! Building `core` for the BPF target needs a compiler that takes `-Z build-std`, the sources of that very version, and
//! a bpf-linker whose LLVM is not older than the compiler's. In order of preference: an installed nightly with
//! rust-src; Debian's pair rustc-web and rust-web-src, installed or installable; a nightly that rustup installs.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use culvert_tests::{command, interrupt};

use super::packages::{self, Package};
use super::tools::Tool;
use super::{For, has, path_with, show};
use crate::say;

const BPF_LINKER: &str = "0.13.0";
/// The versions of LLVM that this bpf-linker can be built with.
const LLVM_KNOWN: [u32; 3] = [21, 22, 23];

/// What compiles and links the eBPF crate.
#[derive(Debug)]
pub(crate) struct Toolchain {
    /// For `rustup run`: a toolchain's name, or `/usr` for the distribution's.
    pub(crate) name: String,
    /// Directory of bpf-linker.
    pub(crate) linker_dir: PathBuf,
    /// Whether it has clippy.
    pub(crate) has_clippy: bool,
}

/// A compiler with the sources of its `core`.
struct Compiler {
    name: String,
    rustc: PathBuf,
    llvm: u32,
}

/// Finds a toolchain, or installs one.
///
/// # Errors
/// None can be had; each that was looked at is named with the reason.
pub(super) fn find_or_install(purpose: For) -> Result<Toolchain> {
    let mut reasons = Vec::new();
    let mut usable = installed(&mut reasons).into_iter().filter(|c| {
        let known = LLVM_KNOWN.contains(&c.llvm);
        if !known {
            reasons.push(format!("{}: its LLVM {} is not one that bpf-linker {BPF_LINKER} knows", c.name, c.llvm));
        }
        known
    });
    let first = usable.next();
    drop(usable);
    let compiler = match first {
        Some(compiler) => compiler,
        None => install(&mut reasons)?,
    };
    if purpose >= For::Test && !has_clippy(&compiler) {
        install_clippy(&compiler)?;
    }
    let linker = linker(compiler.llvm)?;
    let linker_dir = linker.parent().context("bpf-linker has no folder")?.to_owned();
    Ok(Toolchain { has_clippy: has_clippy(&compiler), name: compiler.name, linker_dir })
}

/// Installs the clippy of this compiler where it can be had; the test that uses it fails without.
fn install_clippy(compiler: &Compiler) -> Result<()> {
    if compiler.name != "/usr" {
        let step = say::step("install clippy with rustup: lints the eBPF crate");
        let mut rustup = Command::new("rustup");
        rustup.args(["component", "add", "clippy", "--toolchain", &compiler.name]);
        if let Err(error) = show(&mut rustup) {
            interrupt::check()?;
            say::warn(&format!("the eBPF crate will not be linted: {error:#}"));
        }
        step.done();
    } else if packages::candidate("rust-web-clippy")?.is_some() {
        packages::install(&[Package::new("rust-web-clippy", "/usr/bin/clippy-driver", "lints the eBPF crate")])?;
    }
    Ok(())
}

fn has_clippy(compiler: &Compiler) -> bool {
    compiler.rustc.with_file_name("clippy-driver").is_file() && compiler.rustc.with_file_name("cargo-clippy").is_file()
}

/// Compilers that are here, with their sources, the preferred one first.
fn installed(reasons: &mut Vec<String>) -> Vec<Compiler> {
    let mut nightlies: Vec<(String, PathBuf)> = Vec::new();
    if let Ok(entries) = rustup_home().and_then(|home| Ok(std::fs::read_dir(home.join("toolchains"))?)) {
        for entry in entries.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.starts_with("nightly") {
                nightlies.push((name, entry.path()));
            }
        }
    }
    // `nightly-x86_64…` before dated ones; of these the newest.
    nightlies.sort_by_key(|(name, _)| (name.starts_with("nightly-2"), std::cmp::Reverse(name.clone())));
    let mut compilers = Vec::new();
    for (name, sysroot) in nightlies.into_iter().chain([("/usr".to_owned(), PathBuf::from("/usr"))]) {
        match look_at(&name, &sysroot) {
            Ok(compiler) => compilers.push(compiler),
            Err(error) => reasons.push(format!("{name}: {error:#}")),
        }
    }
    compilers
}

fn rustup_home() -> Result<PathBuf> {
    if let Some(home) = env::var_os("RUSTUP_HOME").filter(|h| !h.is_empty()) {
        return Ok(home.into());
    }
    Ok(PathBuf::from(env::var_os("HOME").context("HOME is not set")?).join(".rustup"))
}

fn look_at(name: &str, sysroot: &Path) -> Result<Compiler> {
    let rustc = sysroot.join("bin/rustc");
    if !rustc.is_file() {
        bail!("no rustc");
    }
    if !sysroot.join("lib/rustlib/src/rust/library/core/src/lib.rs").is_file() {
        bail!("no rust-src");
    }
    let mut version = Command::new(&rustc);
    let said = command::finish(version.arg("-vV").env_remove("RUSTC_BOOTSTRAP"), None)?;
    let llvm =
        said.lines().find_map(|l| l.strip_prefix("LLVM version: ")).and_then(major).context("no LLVM version")?;
    let release = said.lines().find_map(|l| l.strip_prefix("release: ")).context("no release")?;
    let wanted = env!("CARGO_PKG_RUST_VERSION");
    if pair(release) < pair(wanted) {
        bail!("it is {release}, the workspace wants {wanted}");
    }
    Ok(Compiler { name: name.to_owned(), rustc, llvm })
}

fn major(version: &str) -> Option<u32> {
    version.split('.').next()?.parse().ok()
}

/// Major and minor number of a version.
fn pair(version: &str) -> Option<(u32, u32)> {
    let mut numbers = version.split(|c: char| !c.is_ascii_digit()).map(str::parse::<u32>);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

fn install(reasons: &mut Vec<String>) -> Result<Compiler> {
    let wanted = env!("CARGO_PKG_RUST_VERSION");
    match packages::candidate("rustc-web")? {
        Some(version) if pair(&version) >= pair(wanted) => {
            packages::install(&[
                Package::new("rustc-web", "/usr/bin/rustc", "compiles the eBPF crate"),
                Package::new(
                    "rust-web-src",
                    "/usr/lib/rustlib/src/rust/library/core/src/lib.rs",
                    "`core` for the BPF target, of the same version (both together about 600 MB)",
                ),
            ])?;
            return look_at("/usr", Path::new("/usr"));
        }
        Some(version) => reasons.push(format!("Debian's rustc-web: it is {version}, the workspace wants {wanted}")),
        None => reasons.push("Debian's rustc-web: apt does not know it".to_owned()),
    }
    let step = say::step(&format!(
        "install a nightly with rustup: compiles the eBPF crate (not used: {})",
        reasons.join("; ")
    ));
    let mut rustup = Command::new("rustup");
    rustup.args([
        "toolchain",
        "install",
        "nightly",
        "--profile",
        "minimal",
        "--component",
        "rust-src",
        "--component",
        "clippy",
        "--no-self-update",
    ]);
    show(&mut rustup)?;
    step.done();
    let host = command::run("rustup", &["run", "nightly", "rustc", "-vV"])?;
    let host = host.lines().find_map(|l| l.strip_prefix("host: ")).context("the nightly's host")?.to_owned();
    let name = format!("nightly-{host}");
    let compiler = look_at(&name, &rustup_home()?.join("toolchains").join(&name))?;
    if !LLVM_KNOWN.contains(&compiler.llvm) {
        bail!("the nightly's LLVM {} is not one that bpf-linker {BPF_LINKER} knows ({LLVM_KNOWN:?})", compiler.llvm);
    }
    Ok(compiler)
}

/// bpf-linker for bitcode of this LLVM, built if it is not there.
fn linker(llvm: u32) -> Result<PathBuf> {
    let prefix = format!("/usr/lib/llvm-{llvm}");
    let feature = format!("llvm-{llvm}");
    let environment = [
        // llvm-sys names its variable for its own version: 221 for LLVM 22.1.
        ("LLVM_PREFIX", prefix.clone()),
        (llvm_sys_variable(llvm)?, prefix.clone()),
        ("PATH", path_with(&Path::new(&prefix).join("bin"))?.to_string_lossy().into_owned()),
    ];
    let tool = Tool {
        krate: "bpf-linker",
        version: BPF_LINKER,
        variant: &feature,
        why: "links eBPF programs (about 2 minutes on 2 cores)",
        arguments: &["--no-default-features", "--features", &feature],
        environment: &environment,
    };
    if tool.executable()?.is_file() {
        // Its LLVM library is the distribution's and may have been removed since.
        let mut version = Command::new(tool.executable()?);
        if command::finish(version.arg("--version"), None).is_ok() {
            return tool.executable();
        }
        say::warn("bpf-linker does not start any more, so it is built again");
        std::fs::remove_dir_all(tool.dir()?).context("remove the old bpf-linker")?;
    }
    let name = format!("llvm-{llvm}-dev");
    if !Path::new(&prefix).join("bin/llvm-config").exists() && has("apt-get") && packages::candidate(&name)?.is_none() {
        bail!(
            "bpf-linker needs LLVM {llvm} (the eBPF compiler's), and apt does not know {name}: add the repository of https://apt.llvm.org and run this again"
        );
    }
    packages::install(&[
        Package::new(&name, format!("{prefix}/bin/llvm-config"), "builds bpf-linker"),
        Package::new(format!("libpolly-{llvm}-dev"), format!("{prefix}/lib/libPolly.a"), "builds bpf-linker"),
        Package::new("g++", "g++", "builds bpf-linker"),
        Package::new("zlib1g-dev", "/usr/include/zlib.h", "builds bpf-linker"),
        Package::new("libzstd-dev", "/usr/include/zstd.h", "builds bpf-linker"),
    ])?;
    tool.install()
}

fn llvm_sys_variable(llvm: u32) -> Result<&'static str> {
    match llvm {
        21 => Ok("LLVM_SYS_211_PREFIX"),
        22 => Ok("LLVM_SYS_221_PREFIX"),
        23 => Ok("LLVM_SYS_231_PREFIX"),
        _ => bail!("bpf-linker {BPF_LINKER} does not know LLVM {llvm}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_compared_as_numbers() {
        assert!(pair("1.100.0-nightly") > pair("1.95"));
        assert!(pair("1.96.0+dfsg1-1~deb12u2") > pair("1.95"));
        assert!(pair("1.85.0+dfsg3-1~deb12u3") < pair("1.95"));
        assert_eq!(major("22.1.8"), Some(22));
    }
}
