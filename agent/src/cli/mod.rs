//! What was typed: one command of the binary, and its values.
//!
//! | room | its one job |
//! |---|---|
//! | [`mod@decide`] | the commands that judge connections by files of manifests |
//! | [`look`] | the commands that look at a running agent, or change its log level |
//! | [`node`] | the commands that prepare a node, and clean it |
//! | [`mod@leave`] | the command by which a cluster leaves the mesh |
//! | [`offline`] | the commands that judge files of manifests |
//! | [`mod@preflight`] | whether the node can have an agent |
//! | `manifests` | which manifests those two groups are about |
//! | `client` | one request to an agent |
//! | `sheet` | rows as a table, JSON or YAML, once or again and again |
//! | [`mod@reference`] | completions, man pages, the reference and the definitions of Istio's kinds, made from the program itself |

use anyhow::Context as _;
use clap::{Command, FromArgMatches as _, Subcommand as _};

use crate::config::{self, Values, agent, ca, control};

mod client;
pub mod decide;
pub mod leave;
pub mod look;
mod manifests;
pub mod node;
pub mod offline;
pub mod preflight;
pub mod reasons;
pub mod reference;
mod rows;
mod sheet;

/// A command that was understood.
#[derive(Debug)]
pub enum Cli {
    /// `culvert agent`, and how its configuration is read again.
    Agent(Box<agent::Config>, agent::Again),
    /// `culvert ca`
    Ca(Box<ca::Config>),
    /// `culvert control`
    Control(Box<control::Config>),
    /// `culvert preflight`
    Preflight(preflight::Preflight),
    /// `culvert workloads` and the others that ask a running agent.
    Look(look::Look),
    /// `culvert decide` and `culvert diff`.
    Judge(decide::Judge),
    /// `culvert validate` and the others that judge files.
    Offline(offline::Offline),
    /// `culvert leave`
    InCluster(leave::InCluster),
    /// `culvert node prepare` and `culvert node clean`.
    OnNode(node::OnNode),
    /// `culvert completions`, `culvert man` and `culvert crds`.
    Print(reference::Print),
}

/// The whole interface, for parsing and for documentation.
pub fn command() -> Command {
    let command = Command::new("culvert")
        .version(env!("CARGO_PKG_VERSION"))
        .after_help(
            "Every flag of agent, ca and control can be given in the environment or in the YAML file that --config names; flags \
             win. preflight looks at this node. validate, enrollment, decide and diff read files and need nothing else. The other commands ask the \
             agent that runs on this node.",
        )
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
        .subcommand(config::clap_command(
            "control",
            "The cluster's part, of which there are replicas: the CA, its roots in every namespace, what is wrong with a policy \
             before it is stored, and its status afterwards",
            control::SETTINGS,
        ))
        .subcommand(preflight::command());
    let command = look::Look::augment_subcommands(command);
    let command = offline::Offline::augment_subcommands(decide::Judge::augment_subcommands(command));
    let command = leave::InCluster::augment_subcommands(node::OnNode::augment_subcommands(command));
    reference::Print::augment_subcommands(command)
        // Last, since the groups of commands bring descriptions of their own.
        .about("A sidecarless service mesh for Linux nodes")
}

/// Parses the command line; help and mistakes in flags end the process as is usual.
///
/// # Errors
/// Values that are wrong, all of them, one line each.
pub fn parse() -> anyhow::Result<Cli> {
    let all = command().get_matches();
    let (name, matches) = all.subcommand().context("a command")?;
    let of = matches.clone();
    let flag = move |name: &str| of.get_one::<String>(name).cloned();
    match name {
        "agent" => {
            let read = move || Ok(agent::understand(Values::collect(agent::SETTINGS, &flag)?)?);
            let config: agent::Config = read()?;
            let again = agent::Again::new(&config, read);
            Ok(Cli::Agent(Box::new(config), again))
        }
        "ca" => Ok(Cli::Ca(Box::new(ca::understand(Values::collect(ca::SETTINGS, flag)?)?))),
        "control" => Ok(Cli::Control(Box::new(control::understand(Values::collect(control::SETTINGS, flag)?)?))),
        "preflight" => Ok(Cli::Preflight(preflight::Preflight::read(matches)?)),
        name if reference::Print::has_subcommand(name) => Ok(Cli::Print(reference::Print::from_arg_matches(&all)?)),
        name if decide::Judge::has_subcommand(name) => Ok(Cli::Judge(decide::Judge::from_arg_matches(&all)?)),
        name if offline::Offline::has_subcommand(name) => Ok(Cli::Offline(offline::Offline::from_arg_matches(&all)?)),
        name if leave::InCluster::has_subcommand(name) => Ok(Cli::InCluster(leave::InCluster::from_arg_matches(&all)?)),
        name if node::OnNode::has_subcommand(name) => Ok(Cli::OnNode(node::OnNode::from_arg_matches(&all)?)),
        _ => Ok(Cli::Look(look::Look::from_arg_matches(&all)?)),
    }
}

/// Writes all of `text` to standard output. False if whoever reads it has gone, which is no error: there is nothing more
/// to do.
///
/// # Errors
/// Anything else that kept it from being written.
fn print(text: &str) -> anyhow::Result<bool> {
    use std::io::Write as _;
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(error).context("write to standard output"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_interface_is_consistent() {
        command().debug_assert();
        let about = command().get_about().map(ToString::to_string).expect("a description");
        assert!(about.contains("service mesh"), "{about}");
    }

    #[test]
    fn help_names_every_setting_with_its_environment() {
        for (name, settings) in [("agent", agent::SETTINGS), ("ca", ca::SETTINGS), ("control", control::SETTINGS)] {
            let mut command = command();
            let help = command.find_subcommand_mut(name).expect("the command").render_long_help().to_string();
            for setting in settings {
                assert!(help.contains(&format!("--{} <{}>", setting.name, setting.value)), "{}", setting.name);
                assert!(help.contains(&setting.env()), "{}", setting.env());
            }
        }
    }
}
