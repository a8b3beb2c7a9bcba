//! What was typed: one command of the binary, and its values.

use anyhow::Context as _;
use clap::Command;

use crate::config::{self, Values, agent, ca};

/// A command that was understood.
#[derive(Debug)]
pub enum Cli {
    /// `culvert agent`, and how its configuration is read again.
    Agent(Box<agent::Config>, agent::Again),
    /// `culvert ca`
    Ca(Box<ca::Config>),
}

/// The whole interface, for parsing and for documentation.
pub fn command() -> Command {
    Command::new("culvert")
        .about("A sidecarless service mesh for Linux nodes")
        .version(env!("CARGO_PKG_VERSION"))
        .after_help("Every flag can be given in the environment or in the YAML file that --config names; flags win.")
        .subcommand_required(true)
        .arg_required_else_help(true)
        .subcommand(config::clap_command(
            "agent",
            "The node's agent: captures, judges and carries the connections of the node's pods",
            agent::SETTINGS,
        ))
        .subcommand(config::clap_command(
            "ca",
            "A certificate authority that speaks Istio's API, fed from a folder of manifests",
            ca::SETTINGS,
        ))
}

/// Parses the command line; help and mistakes in flags end the process as is usual.
///
/// # Errors
/// Values that are wrong, all of them, one line each.
pub fn parse() -> anyhow::Result<Cli> {
    let matches = command().get_matches();
    let (name, matches) = matches.subcommand().context("a command")?;
    let of = matches.clone();
    let flag = move |name: &str| of.get_one::<String>(name).cloned();
    match name {
        "agent" => {
            let read = move || Ok(agent::understand(Values::collect(agent::SETTINGS, &flag)?)?);
            let config: agent::Config = read()?;
            let again = agent::Again::new(&config, read);
            Ok(Cli::Agent(Box::new(config), again))
        }
        _ => Ok(Cli::Ca(Box::new(ca::understand(Values::collect(ca::SETTINGS, flag)?)?))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_interface_is_consistent() {
        command().debug_assert();
    }

    #[test]
    fn help_names_every_setting_with_its_environment() {
        for (name, settings) in [("agent", agent::SETTINGS), ("ca", ca::SETTINGS)] {
            let mut command = command();
            let help = command.find_subcommand_mut(name).expect("the command").render_long_help().to_string();
            for setting in settings {
                assert!(help.contains(&format!("--{} <{}>", setting.name, setting.value)), "{}", setting.name);
                assert!(help.contains(&setting.env()), "{}", setting.env());
            }
        }
    }
}
