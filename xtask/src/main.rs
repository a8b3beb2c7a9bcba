//! Culvert's own chores. This file is the table of contents; each command is a file.

mod bench;
mod build;
mod down;
mod image;
mod kind_image;
mod run;
mod say;
mod setup;
mod test;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};
use culvert_tests::interrupt;

/// Culvert's own chores: set up a machine, build, show, test.
#[derive(Parser)]
#[command(name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Check this machine and install what building, the sandbox and the tests need; the others do it as needed
    Setup,
    /// Build the eBPF object and the binary `culvert`
    Build,
    /// Build the container image of `culvert` as an archive, the same bytes from every clone
    Image(image::Arguments),
    /// Show the mesh at work: two nodes, one scenario, expected against observed
    Run(run::Arguments),
    /// Open a shell in a pod of the sandbox that `run` keeps up
    Shell(run::ShellArguments),
    /// Run every check and test; the last line is the total
    #[command(visible_alias = "ci")]
    Test(test::Arguments),
    /// Measure plain TCP, Culvert and Envoy as a sidecar beside each other; a table, JSON and a plot in docs/
    Bench(bench::Arguments),
    /// Make the image of a Kubernetes node from parts, for `run --cluster kind` and the tests, where no registry has one
    KindImage,
    /// Remove what sandboxes and clusters left whose owner was killed
    Down,
}

fn main() -> ExitCode {
    match dispatch(Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("✗ {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn dispatch(arguments: Arguments) -> Result<()> {
    interrupt::catch()?;
    match arguments.command {
        Command::Setup => setup::all().map(|()| say::done("this machine has all it needs")),
        Command::Build => build::run(&setup::run(setup::For::Build)?),
        Command::Image(arguments) => image::run(&arguments),
        Command::Run(arguments) => run::run(&arguments),
        Command::Shell(arguments) => run::shell(&arguments),
        Command::Test(arguments) => test::run(&arguments),
        Command::Bench(arguments) => bench::run(&arguments),
        Command::KindImage => kind_image::run(),
        Command::Down => down::run(),
    }
}
