//! The user's scenario, as `cargo xtask run` shows it: [PA.1]–[PA.3], [PA.6]–[PA.9], §5.3, §6.2,
//! [AP.6], [AP.8], [T.1], [I.7], [D.1].

use anyhow::{Result, ensure};
use culvert_tests::sandbox::{MeshPlan, Sandbox, Source, built, own_name};
use culvert_tests::tour;

#[test]
fn every_row_of_the_tour_is_as_expected() -> Result<()> {
    play("tour", Source::Folder)
}

/// §1: the same objects in a real API server, written there with kubectl, are the same mesh.
#[test]
fn every_row_of_the_tour_is_as_expected_from_an_api_server() -> Result<()> {
    play("tour-api", Source::Api)
}

fn play(name: &str, source: Source) -> Result<()> {
    let mut sandbox = Sandbox::build(tour::plan(&own_name(name)).source(source))?;
    let mut mesh = MeshPlan::new(built("culvert")?);
    mesh.cert_ttl = Some(tour::CERT_TTL.to_owned());
    sandbox.start_mesh(&mesh)?;
    let rows = tour::play(&mut sandbox, |_| {})?;
    let wrong: Vec<_> = rows.iter().filter(|row| !row.ok()).collect();
    ensure!(wrong.is_empty(), "{wrong:#?}");
    ensure!(rows.len() >= 46, "only {} rows", rows.len());
    Ok(())
}
