//! `build`: the eBPF object and the binaries.

use anyhow::Result;

use crate::say;
use crate::setup::Ready;

/// Builds `culvert`, and with it the eBPF object, and the programs of the sandbox's pods.
pub(crate) fn run(ready: &Ready) -> Result<()> {
    let step = say::step("build culvert and its eBPF object (a first build takes minutes, later ones seconds)");
    ready.cargo(&[
        "build",
        "--package",
        "culvert",
        "--package",
        "culvert-tests",
        "--package",
        "culvert-apps",
        "--bins",
    ])?;
    step.done();
    Ok(())
}
