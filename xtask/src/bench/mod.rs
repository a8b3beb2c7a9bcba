//! `bench`: what a proxy between pods costs. Plain TCP, Culvert, and Envoy as a sidecar pair, on the same pods and wires,
//! in turn, in one run.
//!
//! | file | its one job |
//! |---|---|
//! | `session` | one peer up: sandbox, proxies, servers; run a load, read what the proxies used |
//! | `envoy` | Envoy's binary and its configuration |
//! | `measures` | what is measured, and how |
//! | `report` | medians, spread, ratios: the table, the JSON |
//! | `plot` | the ratios as a picture |
//!
//! Everything a session makes belongs to its sandbox, so Ctrl-C and a failed measure leave nothing behind.

mod envoy;
mod measures;
mod plot;
mod report;
mod session;

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use culvert_tests::load::{allow_open_files, usage};
use culvert_tests::{command, interrupt};

use crate::{build, say, setup};
use measures::{Figures, MEASURES, Measure, Scope};
use report::{Machine, Report};
use session::{Session, Tools};

/// Arguments of `bench`.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Rounds; each has every peer once, and begins with another one
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..))]
    rounds: u16,
    /// Only measures whose name contains this; `--filter help` lists them
    #[arg(long)]
    filter: Option<String>,
    /// What is measured; ratios are to plain
    #[arg(long, value_delimiter = ',', default_value = "plain,culvert,envoy")]
    peers: Vec<Peer>,
    /// Folder for bench.json, bench.svg and bench.md; without it a whole run is kept in docs/, any other in target/bench
    #[arg(long)]
    out: Option<PathBuf>,
    /// Folder with another build's `culvert` and `culvert-load`, measured instead of this checkout's
    #[arg(long)]
    binaries: Option<PathBuf>,
    /// Before each measure wait, at most this many seconds, until the machine has nothing else to do
    #[arg(long, default_value_t = 10)]
    quiet: u64,
    /// End with status 1 if a row is not at its goal, as a whole run does
    #[arg(long)]
    check: bool,
}

/// How often a measure is taken at most.
const TAKES: u32 = 3;
/// Of a measure: what the host took of the processors, %.
const STOLEN: &str = "stolen_percent";
/// More of it than this is a disturbance.
const DISTURBED: f64 = 2.0;

/// What lies between the pods.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub(crate) enum Peer {
    /// Nothing.
    Plain,
    /// An agent per node.
    Culvert,
    /// A sidecar per pod.
    Envoy,
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Plain => "plain",
            Self::Culvert => "culvert",
            Self::Envoy => "envoy",
        })
    }
}

/// The figures of one measure of one peer in one round.
pub(crate) struct Sample {
    peer: Peer,
    round: u16,
    measure: &'static str,
    figures: BTreeMap<&'static str, f64>,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let filter = arguments.filter.as_deref();
    let chosen: Vec<&Measure> = MEASURES.iter().filter(|m| filter.is_none_or(|f| m.name.contains(f))).collect();
    if chosen.is_empty() {
        let names: Vec<&str> = MEASURES.iter().map(|m| m.name).collect();
        bail!("the measures are {}", names.join(", "));
    }
    let mut peers = arguments.peers.clone();
    peers.dedup();
    let tools = tools(&peers, arguments.binaries.as_deref())?;
    allow_open_files()?;
    let begun = Instant::now();
    let mut samples = Vec::new();
    for round in 0..arguments.rounds {
        // No peer is always the first.
        let first = usize::from(round) % peers.len();
        for &peer in peers[first..].iter().chain(&peers[..first]) {
            let step = say::step(&format!("round {} of {}: {peer}", round + 1, arguments.rounds));
            let quiet = Duration::from_secs(arguments.quiet);
            for (measure, figures) in measure(peer, &tools, &chosen, quiet)? {
                samples.push(Sample { peer, round, measure, figures });
            }
            step.done();
        }
    }
    let machine = machine(&tools, arguments.binaries.as_deref(), &peers, begun.elapsed())?;
    let measures = chosen.iter().map(|measure| measure.name).collect();
    let report = Report::of(&samples, measures, &peers, arguments.rounds, machine);
    println!("\n{}", report.table());
    let below = report.below_goal();
    for row in &below {
        say::warn(&format!("not at its goal: {row}"));
    }
    let whole = filter.is_none() && Peer::ALL.iter().all(|peer| peers.contains(peer));
    keep(&report, arguments.out.as_deref(), whole)?;
    end(&below, whole || arguments.check)
}

/// What a run ends with that has shown and kept its figures.
fn end(below: &[String], counts: bool) -> Result<()> {
    if counts && !below.is_empty() {
        bail!("{} of the rows are not at their goals: {}", below.len(), below.join("; "));
    }
    Ok(())
}

impl Peer {
    const ALL: [Self; 3] = [Self::Plain, Self::Culvert, Self::Envoy];
}

/// The programs, built with optimisation unless they are given, or fetched.
fn tools(peers: &[Peer], binaries: Option<&Path>) -> Result<Tools> {
    let ready = setup::run(setup::For::Run)?;
    build::run(&ready)?;
    if binaries.is_none() {
        let step =
            say::step("build culvert and the load generator with optimisation (a first build takes many minutes)");
        // One by one: together, what one asks of a dependency the other would get too, and culvert is measured as it is
        // built for use.
        for (package, binary) in [("culvert", "culvert"), ("culvert-tests", "culvert-load")] {
            ready.cargo(&["build", "--release", "--package", package, "--bin", binary])?;
        }
        step.done();
    }
    let envoy = if peers.contains(&Peer::Envoy) { Some(envoy::fetch()?) } else { None };
    let built = |name: &str| -> Result<PathBuf> {
        let path = binaries.map_or_else(|| target().join("release"), Path::to_owned).join(name);
        ensure!(path.is_file(), "there is no {}", path.display());
        Ok(path)
    };
    Ok(Tools { culvert: built("culvert")?, load: built("culvert-load")?, envoy })
}

fn target() -> PathBuf {
    // Cargo's own word for another place is obeyed by the build above.
    let all = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| setup::root().join("target"), PathBuf::from);
    // .cargo/config.toml names the host as the target, which so has a folder of its own.
    all.join(format!("{}-unknown-linux-gnu", std::env::consts::ARCH))
}

/// Every chosen measure of one peer: those that share a session, then each that has one of its own.
fn measure(
    peer: Peer,
    tools: &Tools,
    chosen: &[&Measure],
    quiet: Duration,
) -> Result<Vec<(&'static str, BTreeMap<&'static str, f64>)>> {
    let mut all = Vec::new();
    let shared: Vec<_> = chosen.iter().filter_map(|m| Some((m.name, m.shared()?))).collect();
    if !shared.is_empty() {
        let session = Session::up(peer, tools, None)?;
        for (name, (take, again)) in shared {
            let figures = undisturbed(if again { TAKES } else { 1 }, || {
                wait_quiet(quiet)?;
                take(&session).with_context(|| format!("{peer}: {name}"))
            })?;
            if let Some(stolen) = figures.get(STOLEN).filter(|&&stolen| stolen > DISTURBED) {
                say::warn(&format!(
                    "{peer}: {name}: the machine's host kept {stolen:.0} % of the processors to itself"
                ));
            }
            if let Some(failed) = figures.get("failed").filter(|&&failed| failed > 0.0) {
                say::warn(&format!("{peer}: {name}: {failed} connections failed"));
            }
            all.push((name, figures));
        }
        session.down()?;
    }
    for measure in chosen {
        let Scope::Own(take) = measure.scope else { continue };
        interrupt::check()?;
        if let Some(figures) = take(peer, tools).with_context(|| format!("{peer}: {}", measure.name))? {
            all.push((measure.name, figures));
        }
    }
    Ok(all)
}

/// What `take` gives with what the host of a virtual machine took of the processors meanwhile. Is it more than noise, it is
/// taken again, and the least disturbed one counts.
fn undisturbed(takes: u32, take: impl Fn() -> Result<Figures>) -> Result<Figures> {
    let mut best: Option<(f64, Figures)> = None;
    for _ in 0..takes {
        let (stolen, (_, total)) = (usage::stolen()?, usage::machine()?);
        let mut figures = take()?;
        let (stolen, total) = (usage::stolen()? - stolen, usage::machine()?.1 - total);
        let percent = 100.0 * stolen as f64 / total.max(1) as f64;
        figures.insert(STOLEN, percent);
        if best.as_ref().is_none_or(|(least, _)| percent < *least) {
            best = Some((percent, figures));
        }
        if percent <= DISTURBED {
            break;
        }
    }
    Ok(best.context("a measure that is not taken at all")?.1)
}

/// Waits, no longer than `limit`, until nine tenths of the machine are idle.
fn wait_quiet(limit: Duration) -> Result<()> {
    let begun = Instant::now();
    loop {
        interrupt::check()?;
        let (busy, total) = usage::machine()?;
        thread::sleep(Duration::from_millis(200));
        let (busy_then, total_then) = usage::machine()?;
        if (busy_then - busy) * 10 <= total_then - total || begun.elapsed() >= limit {
            return Ok(());
        }
    }
}

fn machine(tools: &Tools, binaries: Option<&Path>, peers: &[Peer], took: Duration) -> Result<Machine> {
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").context("the kernel's version")?;
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").context("read /proc/cpuinfo")?;
    let processor = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": ")).map(|(_, m)| m);
    let culvert = command::finish(Command::new(&tools.culvert).arg("--version"), None)?;
    let versions = peers
        .iter()
        .map(|&peer| {
            let version = match peer {
                Peer::Plain => format!("Linux {}", kernel.trim()),
                Peer::Culvert => format!("{} ({})", culvert.trim(), built_from(binaries)),
                Peer::Envoy => envoy::shown_version(),
            };
            (peer, version)
        })
        .collect();
    Ok(Machine {
        date: command::run("date", &["-u", "+%Y-%m-%d %H:%M"])?.trim().to_owned(),
        kernel: kernel.trim().to_owned(),
        cores: thread::available_parallelism()?.get(),
        processor: processor.unwrap_or("unknown processor").to_owned(),
        minutes: took.as_secs_f64() / 60.0,
        versions,
    })
}

/// What the measured binary was built from.
fn built_from(binaries: Option<&Path>) -> String {
    if let Some(dir) = binaries {
        return format!("of {}", dir.display());
    }
    let root = setup::root().display().to_string();
    let commit = command::run("git", &["-C", &root, "describe", "--always", "--dirty"]);
    // A checkout without git still has a version.
    commit.map_or_else(|_| "no commit".to_owned(), |commit| commit.trim().to_owned())
}

const BEGIN: &str = "<!-- bench: begin; written by `cargo xtask bench` -->";
const END: &str = "<!-- bench: end -->";

/// Writes what came of it; a whole run's table goes into docs/performance.md.
fn keep(report: &Report, out: Option<&Path>, whole: bool) -> Result<()> {
    let docs = setup::root().join("docs");
    let dir = match out {
        Some(dir) => dir.to_owned(),
        None if whole => docs.clone(),
        None => target().join("bench"),
    };
    fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
    let write = |name: &str, text: &str| -> Result<()> {
        let path = dir.join(name);
        fs::write(&path, text).with_context(|| format!("write {}", path.display()))?;
        say::done(&format!("wrote {}", path.display()));
        Ok(())
    };
    write("bench.json", &format!("{}\n", serde_json::to_string_pretty(&report.json())?))?;
    write("bench.svg", &plot::svg(report))?;
    if fs::canonicalize(&dir)? != fs::canonicalize(&docs)? {
        return write("bench.md", &report.markdown());
    }
    let page = fs::read_to_string(docs.join("performance.md")).context("read docs/performance.md")?;
    write("performance.md", &put_into(&page, &report.markdown()).context("docs/performance.md")?)
}

/// The page with another text between its marks.
fn put_into(page: &str, text: &str) -> Result<String> {
    let (before, rest) = page.split_once(BEGIN).with_context(|| format!("there is no line {BEGIN}"))?;
    let (_, after) = rest.split_once(END).with_context(|| format!("there is no line {END}"))?;
    Ok(format!("{before}{BEGIN}\n\n{}\n\n{END}{after}", text.trim_end()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_whole_run_below_a_goal_fails_and_a_look_at_some_of_it_does_not() {
        let below = ["a row: 1, and 2 is wanted".to_owned()];
        assert!(end(&below, false).is_ok() && end(&[], true).is_ok());
        let error = end(&below, true).expect_err("it is below").to_string();
        assert!(error.contains("1 of the rows") && error.contains(&below[0]), "{error}");
    }

    #[test]
    fn the_page_has_the_place_for_the_table() {
        let page =
            fs::read_to_string(setup::root().join("docs/performance.md")).expect("the page is part of the checkout");
        let once = put_into(&page, "a table\n").expect("the marks are there");
        assert!(once.contains(&format!("{BEGIN}\n\na table\n\n{END}\n")), "{once}");
        // Every run replaces the last one's.
        assert_eq!(put_into(&once, "a table\n").expect("the marks are there"), once);
        assert!(put_into("no marks", "a table").is_err());
    }
}
