//! Builds the kernel programs for their own target and leaves the object in `OUT_DIR`.
//!
//! The eBPF target needs a compiler that takes `-Z build-std` and the sources of `core` of the very same version:
//! an installed nightly with rust-src, or a distribution's pair under `/usr`. `cargo xtask setup` finds or installs one and
//! says so in `CULVERT_EBPF_TOOLCHAIN`; without that variable the pair under `/usr` is taken if it is there, else
//! `nightly`.

use std::{env, path::Path};

use anyhow::Context as _;
use aya_build::{Package, Toolchain, build_ebpf};

fn main() -> anyhow::Result<()> {
    println!("cargo:rerun-if-env-changed=CULVERT_EBPF_TOOLCHAIN");
    println!("cargo:rerun-if-changed=../common/src");
    let toolchain = env::var("CULVERT_EBPF_TOOLCHAIN").ok().unwrap_or_else(|| {
        let core = "/usr/lib/rustlib/src/rust/library/core";
        if Path::new("/usr/bin/rustc").exists() && Path::new(core).exists() { "/usr" } else { "nightly" }.to_owned()
    });
    if toolchain == "/usr" {
        // SAFETY: a build script's main thread, before any other thread is started.
        unsafe { env::set_var("RUSTC_BOOTSTRAP", "1") };
    }
    let root = env::var("CARGO_MANIFEST_DIR").context("CARGO_MANIFEST_DIR")?;
    let root = Path::new(&root).parent().context("the agent crate has no parent directory")?.join("ebpf");
    let root_dir = root.to_str().context("the path of this checkout is not UTF-8")?;
    build_ebpf([Package { name: "culvert-ebpf", root_dir, ..Package::default() }], Toolchain::Custom(&toolchain))
        .context("build the eBPF object (is bpf-linker on PATH? `cargo xtask setup` installs what is missing)")
}
