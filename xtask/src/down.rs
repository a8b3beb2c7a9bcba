//! `down`: remove what sandboxes left whose owner was killed.

use anyhow::Result;
use culvert_tests::sandbox::sweep;

use crate::say;

pub(crate) fn run() -> Result<()> {
    let swept = sweep()?;
    for instance in &swept.removed {
        say::done(&format!("removed sandbox {instance}"));
    }
    for (instance, owner) in &swept.up {
        say::warn(&format!(
            "sandbox {instance} is up: press Ctrl-C where it runs, or end its owner with `kill {owner}`"
        ));
    }
    if swept.removed.is_empty() && swept.up.is_empty() {
        say::done("nothing was left behind");
    }
    Ok(())
}
