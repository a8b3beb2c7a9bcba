//! What was typed, and what it means: one table of settings per command, which flags, environment, file and
//! documentation are all made from.
//!
//! A value comes from the flag, else the environment (`CULVERT_` and the flag's name in capitals), else the YAML file
//! that `--config` names, else the table. Nobody else reads the environment. All values that are wrong are reported
//! together, each with the place that it came from.

use std::{
    collections::{BTreeMap, BTreeSet},
    env, fmt, fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};

use anyhow::Context as _;

pub mod agent;
pub mod ca;
pub mod control;
pub mod preflight;

use crate::{model::ObjectRef, source::yaml};

/// One setting: the row of the table that everything else is made from.
#[derive(Clone, Copy, Debug)]
pub struct Setting {
    /// Name of the flag, and of the key in the file.
    pub name: &'static str,
    /// What stands for the value in the help.
    pub value: &'static str,
    /// Text of the default; `None` where the command needs a value or can do without.
    pub default: Option<&'static str>,
    /// What it is, its unit, and why one would change it.
    pub help: &'static str,
}

impl Setting {
    /// Name of the environment variable.
    pub fn env(&self) -> String {
        format!("CULVERT_{}", self.name.to_uppercase().replace('-', "_"))
    }
}

/// The setting that every command has.
pub const CONFIG: Setting = Setting {
    name: "config",
    value: "FILE",
    default: None,
    help: "YAML file with further settings, keyed by the names of these flags",
};

/// Where a value came from.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Place {
    Flag,
    Environment(String),
    File(PathBuf),
    Default,
}

/// A setting that has a value, for people to look at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Given {
    /// What was written, not yet understood.
    pub value: String,
    /// Where: `--name`, a variable of the environment, a file and its key; or `default`.
    pub origin: String,
}

/// The values of one run, not yet understood.
#[derive(Debug)]
pub struct Values {
    settings: &'static [Setting],
    values: BTreeMap<&'static str, (String, Place)>,
    problems: Vec<String>,
    file: Option<PathBuf>,
}

/// Every value that is wrong, one line each.
#[derive(Debug)]
pub struct Invalid(Vec<String>);

impl fmt::Display for Invalid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.join("\n"))
    }
}

impl std::error::Error for Invalid {}

impl Values {
    /// Collects the values of `settings`; `flag` gives what was typed.
    ///
    /// # Errors
    /// The file that `--config` names cannot be read, or is no YAML mapping.
    pub fn collect(settings: &'static [Setting], flag: impl Fn(&str) -> Option<String>) -> anyhow::Result<Self> {
        Self::collect_from(settings, flag, |name| env::var(name).ok())
    }

    fn collect_from(
        settings: &'static [Setting],
        flag: impl Fn(&str) -> Option<String>,
        environment: impl Fn(&str) -> Option<String>,
    ) -> anyhow::Result<Self> {
        let mut values = Self { settings, values: BTreeMap::new(), problems: Vec::new(), file: None };
        let typed = |setting: &Setting| {
            let name = setting.env();
            flag(setting.name)
                .map(|text| (text, Place::Flag))
                .or_else(|| environment(&name).map(|text| (text, Place::Environment(name))))
        };
        let mut file = match typed(&CONFIG) {
            Some((path, _)) => {
                values.file = Some(path.clone().into());
                values.read(Path::new(&path))?
            }
            None => BTreeMap::new(),
        };
        for setting in settings {
            let from_file = file.remove(setting.name);
            let value =
                typed(setting).or(from_file).or_else(|| setting.default.map(|text| (text.to_owned(), Place::Default)));
            if let Some(value) = value {
                values.values.insert(setting.name, value);
            }
        }
        for (key, (_, place)) in file {
            let near = nearest(&key, settings).map(|name| format!("; did you mean {name}?")).unwrap_or_default();
            values.problems.push(format!("{}: unknown setting {key}{near}", label(&place, &key)));
        }
        Ok(values)
    }

    fn read(&mut self, path: &Path) -> anyhow::Result<BTreeMap<String, (String, Place)>> {
        let text = fs::read_to_string(path).with_context(|| format!("read configuration {}", path.display()))?;
        let place = Place::File(path.to_owned());
        let mut read = BTreeMap::new();
        let entries = yaml::mapping(&text).with_context(|| format!("configuration {}", path.display()))?;
        for (key, value) in entries {
            match value {
                Some(text) => drop(read.insert(key, (text, place.clone()))),
                None => {
                    let label = label(&place, &key);
                    self.problems.push(format!("{label}: must be a text, a number or a list of texts"));
                }
            }
        }
        Ok(read)
    }

    /// Whether a value was given anywhere.
    pub fn has(&self, name: &str) -> bool {
        self.values.contains_key(name)
    }

    /// Parses a setting that may be absent.
    pub fn optional<T: FromStr<Err: fmt::Display>>(&mut self, name: &'static str) -> Option<T> {
        self.parse(name, T::from_str)
    }

    /// Parses a setting with a parser of its own.
    pub fn parse<T, E: fmt::Display>(
        &mut self,
        name: &'static str,
        parse: impl FnOnce(&str) -> Result<T, E>,
    ) -> Option<T> {
        debug_assert!(self.settings.iter().any(|setting| setting.name == name), "{name} is in the table");
        let (text, place) = self.values.get(name)?;
        match parse(text) {
            Ok(value) => Some(value),
            Err(error) => {
                self.problems.push(format!("{}: {text:?}: {error}", label(place, name)));
                None
            }
        }
    }

    /// As [`Values::parse`], but its absence is a problem too.
    pub fn required<T: FromStr<Err: fmt::Display>>(&mut self, name: &'static str) -> Option<T> {
        if !self.has(name) {
            self.problems.push(format!("--{name} is missing (or {} in the environment)", setting_env(name)));
        }
        self.optional(name)
    }

    /// A length of time: `500ms`, `5s`, `2m`, `24h`.
    pub fn duration(&mut self, name: &'static str) -> Option<Duration> {
        self.parse(name, parse_duration)
    }

    /// `HOST:PORT` to listen on that only processes of this network namespace can reach.
    pub fn loopback_address(&mut self, name: &'static str) -> Option<SocketAddr> {
        self.parse(name, |text| match text.parse::<SocketAddr>() {
            Ok(addr) if addr.ip().is_loopback() => Ok(addr),
            _ => Err(
                "must be an address of the loopback interface and a port, as in 127.0.0.1:15000: whoever reaches it \
                      can read everything and change the log level",
            ),
        })
    }

    /// `HOST:PORT` to listen on.
    pub fn listen_address(&mut self, name: &'static str) -> Option<SocketAddr> {
        self.parse(name, |text| {
            text.parse::<SocketAddr>().map_err(|_| "must be an address and a port, as in 0.0.0.0:15021")
        })
    }

    /// A comma-separated list; empty items are dropped.
    pub fn list(&mut self, name: &'static str) -> Vec<String> {
        let items = self.values.get(name).map(|(text, _)| text.split(',').map(str::trim));
        items.into_iter().flatten().filter(|item| !item.is_empty()).map(str::to_owned).collect()
    }

    /// A comma-separated list of service accounts, `<namespace>/<name>`.
    pub fn accounts(&mut self, name: &'static str) -> BTreeSet<ObjectRef> {
        let mut accounts = BTreeSet::new();
        for text in self.list(name) {
            match text.split_once('/') {
                Some((namespace, name)) if !namespace.is_empty() && !name.is_empty() && !name.contains('/') => {
                    accounts.insert(ObjectRef::new(namespace, name));
                }
                _ => self.problem(format!("--{name}: {text:?}: must be <namespace>/<service account>")),
            }
        }
        accounts
    }

    /// The file that `--config` names.
    pub fn file(&self) -> Option<&Path> {
        self.file.as_deref()
    }

    /// Notes a problem that concerns more than one value.
    pub fn problem(&mut self, text: impl Into<String>) {
        self.problems.push(text.into());
    }

    /// The configuration, if nothing was wrong. `config` is `None` only where a problem was noted.
    ///
    /// # Errors
    /// [`Invalid`], with every problem.
    pub fn finish<T>(self, config: Option<T>) -> Result<T, Invalid> {
        match config {
            Some(config) if self.problems.is_empty() => Ok(config),
            _ => Err(Invalid(self.problems)),
        }
    }

    /// Every setting that has a value.
    pub fn given(&self) -> BTreeMap<&'static str, Given> {
        let given = |(name, (value, place)): (&&'static str, &(String, Place))| {
            let origin = match place {
                Place::Default => "default".to_owned(),
                Place::Flag | Place::Environment(_) | Place::File(_) => label(place, name),
            };
            (*name, Given { value: value.clone(), origin })
        };
        self.values.iter().map(given).collect()
    }
}

/// What is in force, for the log at start: every setting with its value, and where it came from.
pub fn describe(settings: &BTreeMap<&'static str, Given>) -> String {
    let one = |(name, given): (&&'static str, &Given)| match given.origin.as_str() {
        "default" => format!("{name}={}", given.value),
        origin => format!("{name}={} ({origin})", given.value),
    };
    settings.iter().map(one).collect::<Vec<_>>().join(", ")
}

fn label(place: &Place, name: &str) -> String {
    match place {
        Place::Flag | Place::Default => format!("--{name}"),
        Place::Environment(variable) => variable.clone(),
        Place::File(path) => format!("{}: {name}", path.display()),
    }
}

fn setting_env(name: &'static str) -> String {
    Setting { name, value: "", default: None, help: "" }.env()
}

fn nearest(key: &str, settings: &[Setting]) -> Option<&'static str> {
    let distance = |setting: &Setting| strsim::damerau_levenshtein(setting.name, key);
    settings.iter().filter(|setting| distance(setting) <= 3).min_by_key(|setting| distance(setting)).map(|s| s.name)
}

/// Parses `500ms`, `5s`, `2m`, `24h`.
///
/// # Errors
/// One line that says what is expected.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let expected = || "must be a number with a unit, as in 100us, 500ms, 5s, 2m or 24h".to_owned();
    let digits = text.find(|c: char| !c.is_ascii_digit()).ok_or_else(expected)?;
    let number: u64 = text[..digits].parse().map_err(|_| expected())?;
    let micros = match &text[digits..] {
        "us" => 1,
        "ms" => 1000,
        "s" => 1_000_000,
        "m" => 60_000_000,
        "h" => 3_600_000_000,
        _ => return Err(expected()),
    };
    number.checked_mul(micros).map(Duration::from_micros).ok_or_else(expected)
}

/// Parses a number of bytes: `65536`, `64KiB`, `256MiB`, `1GiB`.
///
/// # Errors
/// One line that says what is expected.
pub fn parse_size(text: &str) -> Result<usize, String> {
    let expected = || "must be a number of bytes, as in 65536, 64KiB, 256MiB or 1GiB".to_owned();
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let number: usize = text[..digits].parse().map_err(|_| expected())?;
    let unit = match &text[digits..] {
        "" => 1,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        _ => return Err(expected()),
    };
    number.checked_mul(unit).ok_or_else(expected)
}

/// The command-line interface of one command, made from its table.
pub fn clap_command(name: &'static str, about: &'static str, settings: &'static [Setting]) -> clap::Command {
    let arg = |setting: &Setting| {
        let help = match setting.default {
            Some(default) => format!("{} [env: {}] [default: {default}]", setting.help, setting.env()),
            None => format!("{} [env: {}]", setting.help, setting.env()),
        };
        clap::Arg::new(setting.name).long(setting.name).value_name(setting.value).help(help)
    };
    clap::Command::new(name).about(about).arg(arg(&CONFIG)).args(settings.iter().map(arg))
}

/// The tables as a page of documentation.
pub fn markdown() -> String {
    let mut page = String::from(
        "# Configuration\n\nEvery setting is a flag, a variable in the environment, and a key of the YAML file that `--config` names; \
         the first of these\nthat is given counts. Values that are wrong are reported together, each with its place. This page is made \
         from the tables in\n`agent/src/config`.\n",
    );
    for (command, settings) in [("agent", agent::SETTINGS), ("ca", ca::SETTINGS), ("control", control::SETTINGS)] {
        page += &format!(
            "\n## culvert {command}\n\n| flag and key | environment | default | meaning |\n|---|---|---|---|\n"
        );
        for setting in std::iter::once(&CONFIG).chain(settings) {
            let default = setting.default.map_or_else(|| "–".to_owned(), |default| format!("`{default}`"));
            let Setting { name, value, help, .. } = setting;
            page += &format!("| `{name}` {value} | `{}` | {default} | {help} |\n", setting.env());
        }
    }
    page
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `CULVERT_WRITE_DOCS=1 cargo test -p culvert the_page_of_settings` writes it anew.
    #[test]
    fn the_page_of_settings_is_up_to_date() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/configuration.md");
        if env::var_os("CULVERT_WRITE_DOCS").is_some() {
            fs::write(&path, markdown()).expect("written");
        }
        let page = fs::read_to_string(&path).expect("docs/configuration.md is there");
        assert!(page == markdown(), "docs/configuration.md differs from the tables in agent/src/config");
    }

    const SETTINGS: &[Setting] = &[
        Setting { name: "drain-deadline", value: "TIME", default: Some("5s"), help: "" },
        Setting { name: "workers", value: "N", default: None, help: "" },
        Setting { name: "node-name", value: "NAME", default: None, help: "" },
    ];

    fn collect(flags: &[(&str, &str)], environment: &[(&str, &str)]) -> Values {
        let find = |from: &[(&str, &str)], name: &str| {
            from.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned())
        };
        Values::collect_from(SETTINGS, |name| find(flags, name), |name| find(environment, name)).expect("collected")
    }

    #[test]
    fn flag_beats_environment_beats_file_beats_default() {
        let dir = tempfile::tempdir().expect("a directory");
        let file = dir.path().join("culvert.yaml");
        fs::write(&file, "workers: 3\nnode-name: from-file\ndrain-deadline: 7s\n").expect("written");
        let file = file.to_str().expect("text");
        let mut values = collect(
            &[("config", file), ("node-name", "from-flag")],
            &[("CULVERT_NODE_NAME", "from-env"), ("CULVERT_WORKERS", "2")],
        );
        assert_eq!(values.required::<String>("node-name").as_deref(), Some("from-flag"));
        assert_eq!(values.optional::<u32>("workers"), Some(2));
        assert_eq!(values.duration("drain-deadline"), Some(Duration::from_secs(7)));
        assert_eq!(
            describe(&values.given()),
            format!(
                "drain-deadline=7s ({file}: drain-deadline), node-name=from-flag (--node-name), workers=2 (CULVERT_WORKERS)"
            )
        );
        assert!(values.finish(Some(())).is_ok());
        assert_eq!(collect(&[], &[]).duration("drain-deadline"), Some(Duration::from_secs(5)));
    }

    #[test]
    fn all_bad_values_are_reported_together_with_their_places() {
        let dir = tempfile::tempdir().expect("a directory");
        let file = dir.path().join("culvert.yaml");
        fs::write(&file, "worker: 3\ndrain-deadline: {a: b}\n").expect("written");
        let mut values = collect(
            &[("config", file.to_str().expect("text")), ("drain-deadline", "5 parsecs")],
            &[("CULVERT_WORKERS", "many")],
        );
        let _: Option<String> = values.required("node-name");
        let _: Option<u32> = values.optional("workers");
        let _ = values.duration("drain-deadline");
        let text = values.finish(None::<()>).expect_err("four problems").to_string();
        for part in [
            "unknown setting worker; did you mean workers?",
            "must be a text, a number or a list of texts",
            "--node-name is missing (or CULVERT_NODE_NAME in the environment)",
            "CULVERT_WORKERS: \"many\"",
            "--drain-deadline: \"5 parsecs\": must be a number with a unit",
        ] {
            assert!(text.contains(part), "{part} in:\n{text}");
        }
    }

    #[test]
    fn sizes_are_in_bytes_or_have_a_unit() {
        for (text, bytes) in [("0", 0), ("65536", 65536), ("64KiB", 65536), ("256MiB", 256 << 20), ("1GiB", 1 << 30)] {
            assert_eq!(parse_size(text), Ok(bytes));
        }
        for wrong in ["", "KiB", "-1", "1KB", "1.5GiB", "99999999999999999999", "99999999999GiB"] {
            assert!(parse_size(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn durations_need_a_unit() {
        for (text, millis) in [("1000us", 1), ("500ms", 500), ("5s", 5000), ("2m", 120_000), ("24h", 86_400_000)] {
            assert_eq!(parse_duration(text), Ok(Duration::from_millis(millis)));
        }
        for wrong in ["5", "", "s", "-1s", "1d", "99999999999999999999s", "18446744073709551615h"] {
            assert!(parse_duration(wrong).is_err(), "{wrong}");
        }
    }

    /// A file of settings: one answer, or lines that say what is wrong.
    #[test]
    fn fuzzed_configuration_is_refused_or_understood() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("config.yaml");
        let flag = |name: &str| (name == "config").then(|| path.display().to_string());
        crate::fuzz::run("configuration", |bytes| {
            fs::write(&path, bytes).expect("written");
            let collect = |settings| Values::collect_from(settings, flag, |_| None);
            let of_agent = collect(agent::SETTINGS).map(|values| agent::understand(values).map(drop));
            let of_ca = collect(ca::SETTINGS).map(|values| ca::understand(values).map(drop));
            let of_control = collect(control::SETTINGS).map(|values| control::understand(values).map(drop));
            for wrong in [of_agent, of_ca, of_control].into_iter().flatten().filter_map(Result::err) {
                assert!(!wrong.0.is_empty(), "a refusal says why");
            }
        });
    }
}
