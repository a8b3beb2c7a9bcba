//! `tests/bench/culvert`, by which the node-proxy benchmark drives the agent: nothing of that harness is here, so what the driver
//! asks of the agent is tried by itself.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use culvert_tests::command;
use culvert_tests::sandbox::{MeshPlan, Node, Plan, PodPlan, Sandbox, agent_process, built, own_name};

fn driver() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("bench/culvert")
}

/// The text between two others.
fn between<'a>(text: &'a str, before: &str, after: &str) -> Result<&'a str> {
    let found = text.split_once(before).and_then(|(_, rest)| rest.split_once(after));
    Ok(found.with_context(|| format!("the driver has nothing between {before:?} and {after:?}"))?.0)
}

#[test]
fn the_driver_is_a_script_whose_flags_the_agent_has() -> Result<()> {
    command::run("bash", &["-n".as_ref(), driver().as_os_str()])?;
    let text = fs::read_to_string(driver())?;
    let culvert = built("culvert")?;
    let help = command::run(&culvert.to_string_lossy(), &["agent", "--help"])?;
    let known: Vec<&str> = help.split_whitespace().filter(|word| word.starts_with("--")).collect();
    let words = between(&text, "\"$CULVERT_BIN\" agent", ") >")?.split_whitespace();
    let flags: Vec<&str> = words.filter(|word| word.starts_with("--")).collect();
    ensure!(flags.len() >= 6, "found only {flags:?}");
    for flag in flags {
        ensure!(known.contains(&flag), "culvert agent has no {flag}");
    }
    Ok(())
}

/// The log is text there, at the level that the driver sets.
#[test]
fn the_line_that_the_driver_waits_for_is_logged() -> Result<()> {
    let text = fs::read_to_string(driver())?;
    let level = between(&text, "--log-level \"${CULVERT_LOG:-", "}\"")?;
    let pattern = between(&text, "grep -q \"pod enrolled", "\"")?;
    let pattern = format!("pod enrolled{}", pattern.replace("$p", "client"));
    let mut sandbox =
        Sandbox::build(Plan::empty(&own_name("driver")).pod(PodPlan::new(Node::A, "default", "client").http(&[8080])))?;
    let mut mesh = MeshPlan::new(built("culvert")?);
    mesh.text_log = true;
    mesh.agent_arguments = ["--log-level", level].map(str::to_owned).into();
    sandbox.start_mesh(&mesh)?;
    let log = sandbox.log_path(&agent_process(Node::A));
    let grep = |pattern: &str| command::run("grep", &["-q".as_ref(), pattern.as_ref(), log.as_os_str()]).is_ok();
    command::wait_for(&format!("{pattern} is in {}", log.display()), Duration::from_secs(10), || {
        Ok(grep(&pattern).then_some(()))
    })?;
    ensure!(!grep(&pattern.replace("client", "another")), "the line is about any pod");
    Ok(())
}
