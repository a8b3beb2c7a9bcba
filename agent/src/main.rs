//! The `culvert` command: parses, and calls the library.

use std::process::ExitCode;

use culvert::{app, cli};

fn main() -> ExitCode {
    let result = cli::parse().and_then(|cli| match cli {
        cli::Cli::Agent(config, again) => app::agent(*config, again),
        cli::Cli::Ca(config) => app::ca(*config),
        cli::Cli::Look(look) => look.run(),
        cli::Cli::Print(print) => print.run(),
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // One line with the whole chain; of several wrong values, one line each.
            eprintln!("culvert: {error:#}");
            ExitCode::FAILURE
        }
    }
}
