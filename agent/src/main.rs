//! The `culvert` command: parses, and calls the library.

use std::{process::ExitCode, time::Duration};

use culvert::{app, cli, telemetry};
use tikv_jemallocator::Jemalloc;

/// Gives back what a burst of connections or a large configuration has used, where glibc's allocator keeps it: after
/// 50 000 workloads were read, three times of what they need.
#[global_allocator]
static ALLOCATOR: Jemalloc = Jemalloc;

/// What is unused for a second goes back to the kernel, also while nothing is allocated (jemalloc(3), TUNING).
// SAFETY: the name is the one under which jemalloc looks for a NUL-terminated string of options.
#[unsafe(export_name = "_rjem_malloc_conf")]
pub static ALLOCATOR_OPTIONS: &[u8; 60] = b"background_thread:true,dirty_decay_ms:1000,muzzy_decay_ms:0\0";

/// How long the reader of standard error may take to make room for why a command ends.
const LAST_PATIENCE: Duration = Duration::from_secs(1);

fn main() -> ExitCode {
    let result = cli::parse().and_then(|cli| match cli {
        cli::Cli::Agent(config, again) => app::agent(*config, again).map(|()| ExitCode::SUCCESS),
        cli::Cli::Ca(config) => app::ca(*config).map(|()| ExitCode::SUCCESS),
        cli::Cli::Control(config) => app::control(*config).map(|()| ExitCode::SUCCESS),
        cli::Cli::Preflight(preflight) => preflight.run(),
        cli::Cli::Look(look) => look.run().map(|()| ExitCode::SUCCESS),
        cli::Cli::Judge(judge) => judge.run(),
        cli::Cli::Offline(offline) => offline.run(),
        cli::Cli::InCluster(in_cluster) => in_cluster.run().map(|()| ExitCode::SUCCESS),
        cli::Cli::OnNode(on_node) => on_node.run().map(|()| ExitCode::SUCCESS),
        cli::Cli::Print(print) => print.run().map(|()| ExitCode::SUCCESS),
    });
    match result {
        Ok(code) => code,
        Err(error) => {
            // One line with the whole chain; of several wrong values, one line each.
            telemetry::last_word(&format!("culvert: {error:#}"), LAST_PATIENCE);
            ExitCode::FAILURE
        }
    }
}
