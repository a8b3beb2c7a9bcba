//! What is made from the program itself: completions for shells, man pages, the reference in `docs/`, and the
//! definitions of Istio's kinds in `deploy/crds/`.

use anyhow::Context as _;
use clap::{Command, Subcommand, ValueEnum};
use clap_complete::{generate, shells};

use serde_json::{Value, json};

use super::{command, print, sheet::yaml};
use crate::source::definitions;

/// A text about this program.
#[derive(Debug, Subcommand)]
pub enum Print {
    /// Prints completions for a shell: source <(culvert completions bash)
    Completions {
        /// Which shell
        shell: Shell,
    },
    /// Prints the man page of culvert, or of one of its commands: culvert man connections | man -l -
    Man {
        /// Which command; culvert itself if none is named
        command: Option<String>,
    },
    /// Prints the definitions of Istio's kinds, for a cluster that has none: culvert crds | kubectl create -f -
    Crds,
}

/// A shell that completions are made for.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Shell {
    /// bash 4.4 or newer
    Bash,
    /// zsh
    Zsh,
    /// fish
    Fish,
}

impl Print {
    /// Prints it on standard output.
    ///
    /// # Errors
    /// It could not be written, or there is no such command.
    pub fn run(self) -> anyhow::Result<()> {
        let text = match self {
            Self::Completions { shell } => completions(shell),
            Self::Man { command } => man(command.as_deref())?,
            Self::Crds => crds().into_iter().map(|(_, text)| text).collect::<Vec<_>>().join("---\n").into_bytes(),
        };
        print(&String::from_utf8_lossy(&text)).map(drop)
    }
}

fn completions(shell: Shell) -> Vec<u8> {
    let (mut text, mut command) = (Vec::new(), command());
    match shell {
        Shell::Bash => generate(shells::Bash, &mut command, "culvert", &mut text),
        Shell::Zsh => generate(shells::Zsh, &mut command, "culvert", &mut text),
        Shell::Fish => generate(shells::Fish, &mut command, "culvert", &mut text),
    }
    text
}

fn man(name: Option<&str>) -> anyhow::Result<Vec<u8>> {
    let all = built();
    let page = match name {
        None => all,
        Some(name) => {
            let one = all.find_subcommand(name).with_context(|| {
                let names: Vec<&str> = all.get_subcommands().map(Command::get_name).collect();
                format!("there is no command {name:?}; there are {}", names.join(", "))
            })?;
            one.clone()
        }
    };
    let mut text = Vec::new();
    clap_mangen::Man::new(page).render(&mut text).context("make the man page")?;
    Ok(text)
}

/// The name of each definition, and its manifest.
fn crds() -> Vec<(String, String)> {
    let mut all = Vec::new();
    for definition in definitions::definitions() {
        let name = definition.metadata.name.clone().unwrap_or_default();
        let mut value = serde_json::to_value(definition).expect("the API's own type is JSON");
        whole(&mut value);
        all.push((name, yaml(&value)));
    }
    all
}

/// Writes numbers that are whole as such: those of a schema are floating ones in the API's types.
fn whole(value: &mut Value) {
    match value {
        Value::Number(number) => {
            // The bounds of a schema are far below 2^53, up to which each whole number is one.
            if let Some(float) = number.as_f64().filter(|float| float.fract() == 0.0 && float.abs() < 9e15) {
                *value = json!(float as i64);
            }
        }
        Value::Array(items) => items.iter_mut().for_each(whole),
        Value::Object(fields) => fields.values_mut().for_each(whole),
        Value::Null | Value::Bool(_) | Value::String(_) => {}
    }
}

fn built() -> Command {
    let mut all = command().disable_help_subcommand(true);
    all.build();
    all
}

/// The reference: every command with every argument, as `docs/reference.md` has it. The settings of `culvert agent` and
/// `culvert ca` are in `docs/configuration.md`.
pub fn markdown() -> String {
    let mut page = String::from(
        "# Commands\n\nThis page is made from the commands themselves. Everything that asks a running agent exits with 0 \
         when it has shown the answer, and\nwith 1 and one line on standard error otherwise. [Manifests without an \
         agent](offline.md) has more about `validate` and `enrollment`.\n",
    );
    for command in built().get_subcommands_mut() {
        let name = command.get_name().to_owned();
        if command.has_subcommands() {
            for nested in command.get_subcommands_mut() {
                let name = format!("{name} {}", nested.get_name());
                section(&mut page, &name, nested);
            }
        } else {
            section(&mut page, &name, command);
        }
    }
    page
}

fn section(page: &mut String, name: &str, command: &mut Command) {
    let about = command.get_about().map(ToString::to_string).unwrap_or_default();
    *page += &format!("\n## culvert {name}\n\n{about}.\n");
    if matches!(name, "agent" | "ca" | "control") {
        *page += "Its settings are in [configuration](configuration.md).\n";
        return;
    }
    let usage = command.render_usage().to_string();
    *page += &format!("\n```text\n{}\n```\n", usage.trim_start_matches("Usage: ").trim());
    *page += "\n| argument | default | meaning |\n|---|---|---|\n";
    for argument in command.get_arguments().filter(|argument| !argument.is_hide_set()) {
        *page += &row(argument);
    }
}

fn row(argument: &clap::Arg) -> String {
    let values = argument.get_value_names().unwrap_or_default();
    let value = if argument.get_action().takes_values() { values.join(" ") } else { String::new() };
    let name = match (argument.get_short(), argument.get_long()) {
        (_, None) => format!("`{value}`"),
        (None, Some(long)) => format!("`--{long}` {value}"),
        (Some(short), Some(long)) => format!("`-{short}`, `--{long}` {value}"),
    };
    let default: Vec<String> =
        argument.get_default_values().iter().map(|value| value.to_string_lossy().into_owned()).collect();
    let takes = argument.get_action().takes_values();
    let default = if takes && !default.is_empty() { format!("`{}`", default.join(" ")) } else { "–".to_owned() };
    let mut meaning = argument.get_help().map(ToString::to_string).unwrap_or_default();
    let possible: Vec<String> =
        argument.get_possible_values().iter().map(|value| format!("`{}`", value.get_name())).collect();
    if takes && !possible.is_empty() {
        meaning += &format!(": {}", possible.join(", "));
    }
    if let Some(variable) = argument.get_env() {
        meaning += &format!(" (or `{}` in the environment)", variable.to_string_lossy());
    }
    format!("| {} | {default} | {} |\n", name.trim_end(), meaning.replace('|', "\\|"))
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, env, fs, path::Path};

    use super::*;

    /// `CULVERT_WRITE_DOCS=1 cargo test -p culvert the_reference` writes it anew.
    #[test]
    fn the_reference_is_up_to_date() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/reference.md");
        if env::var_os("CULVERT_WRITE_DOCS").is_some() {
            fs::write(&path, markdown()).expect("written");
        }
        let page = fs::read_to_string(&path).expect("docs/reference.md is there");
        assert!(
            page == markdown(),
            "docs/reference.md differs from the commands; `CULVERT_WRITE_DOCS=1 cargo test -p culvert the_reference` \
             writes it anew"
        );
    }

    /// `CULVERT_WRITE_DOCS=1 cargo test -p culvert the_definitions` writes them anew.
    #[test]
    fn the_definitions_in_deploy_are_up_to_date() {
        const HEAD: &str = "# Made from the Rust types; `culvert crds` prints the same.\n\
                            # Create it, never replace one that is there: docs/kubernetes.md.\n";
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/crds");
        let wanted: BTreeMap<String, String> =
            crds().into_iter().map(|(name, text)| (format!("{name}.yaml"), format!("{HEAD}{text}"))).collect();
        let there = || -> BTreeMap<String, String> {
            let entries = fs::read_dir(&folder).expect("deploy/crds is there");
            let names = entries.map(|entry| entry.expect("an entry").file_name().into_string().expect("UTF-8"));
            names.map(|name| (name.clone(), fs::read_to_string(folder.join(&name)).expect("text"))).collect()
        };
        if env::var_os("CULVERT_WRITE_DOCS").is_some() {
            fs::create_dir_all(&folder).expect("made");
            for name in there().keys().filter(|name| !wanted.contains_key(*name)) {
                fs::remove_file(folder.join(name)).expect("removed");
            }
            for (name, text) in &wanted {
                fs::write(folder.join(name), text).expect("written");
            }
        }
        let there = there();
        let names = |of: &BTreeMap<String, String>| of.keys().cloned().collect::<Vec<_>>();
        assert_eq!(names(&there), names(&wanted), "deploy/crds has other files than there are kinds");
        for (name, text) in &wanted {
            assert!(
                there[name] == *text,
                "deploy/crds/{name} differs from the types; `CULVERT_WRITE_DOCS=1 cargo test -p culvert the_definitions` \
                 writes it anew"
            );
        }
    }

    #[test]
    fn every_command_has_a_man_page_and_every_shell_its_completions() {
        for name in command().get_subcommands().map(Command::get_name) {
            let page = String::from_utf8(man(Some(name)).expect(name)).expect("UTF-8");
            assert!(page.contains(&format!("culvert\\-{name}")), "{name}: {page}");
        }
        assert!(man(None).is_ok());
        assert!(format!("{:#}", man(Some("nothing")).expect_err("no such command")).contains("workloads"));
        for shell in Shell::value_variants() {
            let text = String::from_utf8(completions(*shell)).expect("UTF-8");
            assert!(text.contains("certificates") && text.contains("admin-address"), "{shell:?}");
        }
    }
}
