//! What scenarios on real nodes have in common.

use anyhow::{Result, ensure};
use culvert_tests::kind::stage::Scene;
use culvert_tests::tour::{self, Stage as _};

/// The rows that the sandbox shows, with real pods.
pub(crate) fn the_scenario(scene: &mut Scene) -> Result<()> {
    let rows = tour::play(scene, |_| {})?;
    scene.put("")?;
    let wrong: Vec<String> = rows.iter().filter(|row| !row.ok()).map(|row| format!("{row:?}")).collect();
    ensure!(rows.len() > 40 && wrong.is_empty(), "{} of {} rows:\n{}", wrong.len(), rows.len(), wrong.join("\n"));
    Ok(())
}
