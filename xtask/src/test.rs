//! `test`, also called `ci`: every check and every test; the last line is the total.
//!
//! | stage | what it shows |
//! |---|---|
//! | formatting, lints, documentation | the code reads as agreed and warns of nothing |
//! | dependencies | licences, bans and sources; advisories where their database can be reached |
//! | unit | libraries and programs by themselves, with property tests |
//! | kernel | the eBPF object and what uses it, in this machine's kernel |
//! | scenarios | the sandbox with real packets, real nodes in a cluster of kind, and the ends of the supported kernels under QEMU |
//! | istiod | agents with a real istiod as their CA: with `--full` only, since building it takes minutes |
//! | image | the image is the same from two clones: with `--full` only, since two optimised builds take long |
//! | benchmarks | those of criterion run, once each, and unoptimised: what they measure is for `cargo bench` |
//!
//! Where the tests' Kubernetes is not built yet, that runs beside the stages that only compile. No test begins before it is there:
//! many have limits of time.
//!
//! A stage that fails does not stop the others. One that cannot run here has failed; only advisories may say loudly that
//! they could not run, and what is for `--full` alone that it did not.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use culvert_tests::libtest::Count;
use culvert_tests::{RESULTS_VARIABLE, interrupt, sandbox};

use crate::setup::{self, Building, Ready, root};
use crate::{build, image, kind_image, say};

/// Arguments of `test`.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Full counts where the default is reduced for speed; keeps the results in docs/full-test.md
    #[arg(long)]
    full: bool,
    /// Only tests whose name contains this; checks of the code are left out
    filter: Option<String>,
}

/// The stages that are tests, and what cargo is told to run.
const TESTS: [(&str, &[&str]); 3] = [
    ("unit tests", &["--lib", "--bins"]),
    ("kernel tests", &["--package", "culvert", "--package", "culvert-common", "--test", "*"]),
    ("scenarios", &["--package", "culvert-tests", "--test", "*"]),
];

/// Tells tests that full counts are wanted.
const FULL_VARIABLE: &str = "CULVERT_TEST_FULL";

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let begun = Instant::now();
    let mut ready = setup::run(setup::For::Test)?;
    let kubernetes = ready.kubernetes.take();
    let swept = sandbox::sweep()?;
    if !swept.removed.is_empty() {
        say::warn(&format!("removed what was left of sandboxes: {}", swept.removed.join(", ")));
    }
    build::run(&ready)?;
    let mut stages =
        Stages { ready: &ready, full: arguments.full, results: root().join("target/test-results"), all: Vec::new() };
    // Results of an earlier run are not this one's.
    let _ = fs::remove_file(&stages.results);
    if arguments.filter.is_none() {
        stages.checks()?;
    }
    stages.compile()?;
    stages.kubernetes(kubernetes)?;
    stages.tests(arguments.filter.as_deref())?;
    stages.istiod()?;
    if arguments.filter.is_none() {
        stages.benchmarks()?;
        stages.image()?;
    }
    stages.finish(begun.elapsed(), arguments.filter.is_none())
}

struct Stages<'a> {
    ready: &'a Ready,
    full: bool,
    results: std::path::PathBuf,
    all: Vec<Stage>,
}

/// What came of a stage.
struct Stage {
    name: String,
    passed: u32,
    failed: u32,
    /// Names of failed tests.
    failures: Vec<String>,
    /// Loudly not run, with the reason.
    not_run: Option<String>,
    took: Duration,
}

impl Stages<'_> {
    fn checks(&mut self) -> Result<()> {
        let cargo = |arguments: &[&str]| self.ready.cargo_command(arguments);
        let fmt = cargo(&["fmt", "--all", "--", "--check"])?;
        let clippy = cargo(&["clippy", "--all-targets", "--", "-D", "warnings"])?;
        let mut doc = cargo(&["doc", "--no-deps"])?;
        doc.env("RUSTDOCFLAGS", "-D warnings");
        self.check("formatting", fmt)?;
        self.check("lints", clippy)?;
        self.ebpf_lints()?;
        self.check("documentation", doc)?;
        self.check("licences, bans and sources of dependencies", self.deny(&["licenses", "bans", "sources"])?)?;
        self.advisories()
    }

    /// The eBPF crate is linted with its own compiler, for its own target.
    fn ebpf_lints(&mut self) -> Result<()> {
        const NAME: &str = "lints of the eBPF crate";
        let toolchain = &self.ready.toolchain;
        if !toolchain.has_clippy {
            self.failed(
                NAME,
                &format!(
                    "the toolchain {} has no clippy: `rustup component add clippy` for a nightly, the package rust-web-clippy for Debian's",
                    toolchain.name
                ),
            );
            return Ok(());
        }
        // As aya-build compiles it. A target directory of its own: the compiler is another one.
        let mut clippy = Command::new("rustup");
        clippy
            .args(["run", &toolchain.name, "cargo", "clippy", "--package", "culvert-ebpf", "--bins", "--release"])
            .args(["--target", "bpfel-unknown-none", "-Z", "build-std=core", "--target-dir", "target/ebpf-lints"])
            .args(["--", "-D", "warnings"])
            .current_dir(root())
            .env("PATH", setup::path_with(&toolchain.linker_dir)?)
            .env("RUSTC_BOOTSTRAP", "1")
            .env(
                "CARGO_ENCODED_RUSTFLAGS",
                format!("--cfg=bpf_target_arch=\"{}\"\x1f-Cdebuginfo=2\x1f-Clink-arg=--btf", std::env::consts::ARCH),
            );
        for name in ["CARGO", "RUSTC", "RUSTUP_TOOLCHAIN", "CARGO_MANIFEST_DIR"] {
            clippy.env_remove(name);
        }
        self.check(NAME, clippy)
    }

    fn deny(&self, checks: &[&str]) -> Result<Command> {
        let deny = self.ready.deny.as_deref().context("cargo-deny is not set up")?;
        let mut command = Command::new(deny);
        command.args(["--workspace", "check"]).args(checks).current_dir(root());
        Ok(command)
    }

    /// The only stage that may not run: without its database, fetched from elsewhere, nothing can be said.
    fn advisories(&mut self) -> Result<()> {
        const NAME: &str = "advisories of dependencies";
        let step = say::step(NAME);
        let begun = Instant::now();
        let output = self.deny(&["advisories"])?.stdin(Stdio::null()).output().context("start cargo-deny")?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
        eprint!("{said}");
        if !output.status.success() && said.contains("failed to fetch advisory database") {
            self.not_run(NAME, "the advisory database cannot be reached from here".to_owned());
            return Ok(());
        }
        self.add(NAME, output.status.success(), begun.elapsed());
        step.done();
        interrupt::check()
    }

    /// Compiles the tests, while Kubernetes is built. What does not compile fails the stage that it belongs to.
    fn compile(&self) -> Result<()> {
        let step = say::step("compile the tests");
        for (_, which) in TESTS {
            let mut cargo = self.ready.cargo_command(&["test", "--no-run", "--quiet"])?;
            let compiled = setup::run_cargo(cargo.args(which), |_| {})?;
            interrupt::check()?;
            if !compiled.success() {
                return Ok(());
            }
        }
        step.done();
        Ok(())
    }

    /// Waits for the Kubernetes of the tests; without it, scenarios fail one by one and say so.
    fn kubernetes(&mut self, building: Option<Building>) -> Result<()> {
        if let Err(error) = building.map_or(Ok(()), Building::finish).and_then(|()| kind_image::build()) {
            interrupt::check()?;
            self.failed("Kubernetes of the tests", &format!("{error:#}"));
        }
        interrupt::check()
    }

    fn tests(&mut self, filter: Option<&str>) -> Result<()> {
        for (name, which) in TESTS {
            let mut cargo = self.ready.cargo_command(&["test", "--no-fail-fast"])?;
            cargo.args(which).arg("--").args(filter);
            cargo.env("RUST_BACKTRACE", "0").env(RESULTS_VARIABLE, &self.results);
            if self.full {
                cargo.env(FULL_VARIABLE, "1");
            }
            self.harness(name, cargo)?;
        }
        Ok(())
    }

    /// The one test that is ignored elsewhere.
    fn istiod(&mut self) -> Result<()> {
        const NAME: &str = "agents with a real istiod";
        if !self.full {
            self.not_run(NAME, "only `cargo xtask test --full` builds istiod, which takes minutes".to_owned());
            return Ok(());
        }
        if let Err(error) = setup::build_istiod() {
            interrupt::check()?;
            self.failed(NAME, &format!("{error:#}"));
            return Ok(());
        }
        let mut cargo = self.ready.cargo_command(&["test", "--package", "culvert-tests", "--test", "istiod"])?;
        cargo.args(["--", "--ignored"]).env("RUST_BACKTRACE", "0").env(RESULTS_VARIABLE, &self.results);
        self.harness(NAME, cargo)
    }

    /// Each once, without measuring: that they still run. Those of `cargo bench`, with optimisation, take minutes to build.
    fn benchmarks(&mut self) -> Result<()> {
        let cargo = self.ready.cargo_command(&["test", "--bench", "policy", "--", "--test"])?;
        self.check("benchmarks", cargo)
    }

    /// Optimised builds in this checkout and in a copy at another path.
    fn image(&mut self) -> Result<()> {
        const NAME: &str = "image from two clones";
        if !self.full {
            self.not_run(NAME, "only `cargo xtask test --full` builds it twice, which takes long".to_owned());
            return Ok(());
        }
        let step = say::step(NAME);
        let begun = Instant::now();
        if let Err(error) = image::from_two_clones(self.ready) {
            interrupt::check()?;
            self.failed(NAME, &format!("{error:#}"));
            return Ok(());
        }
        self.add(NAME, true, begun.elapsed());
        step.done();
        Ok(())
    }

    /// A command whose success is one passed check.
    fn check(&mut self, name: &str, mut command: Command) -> Result<()> {
        let step = say::step(name);
        let begun = Instant::now();
        let status = setup::run_cargo(&mut command, |_| {})?;
        self.add(name, status.success(), begun.elapsed());
        step.done();
        interrupt::check()
    }

    /// A run of Rust's test harnesses, whose tests are counted one by one.
    fn harness(&mut self, name: &str, mut command: Command) -> Result<()> {
        let step = say::step(name);
        let begun = Instant::now();
        let mut count = Count::default();
        let status = setup::run_cargo(&mut command, |line| count.read(line))?;
        // It did not compile, or a harness died: nothing that was counted shows it.
        if !status.success() && count.failed == 0 {
            count.failed = 1;
            count.failures.push(format!("{name}: cargo test ended with {status}"));
        }
        self.all.push(Stage {
            name: name.to_owned(),
            passed: count.passed,
            failed: count.failed,
            failures: count.failures,
            not_run: None,
            took: begun.elapsed(),
        });
        step.done();
        interrupt::check()
    }

    fn add(&mut self, name: &str, ok: bool, took: Duration) {
        let failures = if ok { Vec::new() } else { vec![name.to_owned()] };
        let (passed, failed) = (u32::from(ok), u32::from(!ok));
        self.all.push(Stage { name: name.to_owned(), passed, failed, failures, not_run: None, took });
    }

    /// What cannot run here and must.
    fn failed(&mut self, name: &str, why: &str) {
        say::warn(&format!("{name}: {why}"));
        self.all.push(Stage {
            name: name.to_owned(),
            passed: 0,
            failed: 1,
            failures: vec![format!("{name}: {why}")],
            not_run: None,
            took: Duration::ZERO,
        });
    }

    fn not_run(&mut self, name: &str, why: String) {
        say::warn(&format!("NOT RUN: {name}: {why}"));
        self.all.push(Stage {
            name: name.to_owned(),
            passed: 0,
            failed: 0,
            failures: Vec::new(),
            not_run: Some(why),
            took: Duration::ZERO,
        });
    }

    fn finish(&self, took: Duration, complete: bool) -> Result<()> {
        let mut summary = String::new();
        for stage in &self.all {
            match &stage.not_run {
                Some(why) => writeln!(summary, "  {:<46} NOT RUN: {why}", stage.name)?,
                None => writeln!(
                    summary,
                    "  {:<46} {:>5} passed {:>3} failed {:>6.0} s",
                    stage.name,
                    stage.passed,
                    stage.failed,
                    stage.took.as_secs_f64()
                )?,
            }
        }
        let passed: u32 = self.all.iter().map(|s| s.passed).sum();
        let failed: u32 = self.all.iter().map(|s| s.failed).sum();
        println!("\n{summary}");
        for failure in self.all.iter().flat_map(|s| &s.failures) {
            println!("  failed: {failure}");
        }
        let measured = fs::read_to_string(&self.results).unwrap_or_default();
        if !measured.is_empty() {
            println!("{measured}");
        }
        if self.full && complete && failed == 0 {
            self.keep(&root().join("docs/full-test.md"), &summary, &measured, took)?;
        }
        if passed + failed == 0 {
            bail!("no test ran: nothing has the name that was asked for");
        }
        println!("  {:.0} minutes\n", took.as_secs_f64() / 60.0);
        println!("test: {passed} passed, {failed} failed");
        if failed > 0 {
            bail!("{failed} failed");
        }
        Ok(())
    }

    /// The last complete run with full counts, for docs/.
    fn keep(&self, path: &Path, summary: &str, measured: &str, took: Duration) -> Result<()> {
        let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        let cores = std::thread::available_parallelism().map_or(0, usize::from);
        let text = format!(
            "# The last complete run of `cargo xtask test --full`\n\n\
             Written by that command. Linux {}, {cores} cores, {:.0} minutes.\n\n```text\n{summary}\n{measured}```\n",
            kernel.trim(),
            took.as_secs_f64() / 60.0
        );
        fs::create_dir_all(path.parent().context("docs")?)?;
        fs::write(path, text).with_context(|| format!("write {}", path.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::setup::Toolchain;

    #[test]
    fn a_stage_that_cannot_run_is_a_failure() {
        let toolchain = Toolchain { name: "none".to_owned(), linker_dir: "/nowhere".into(), has_clippy: false };
        let ready = Ready { toolchain, deny: None, kubernetes: None };
        let results = std::env::temp_dir().join("culvert-no-results");
        let mut stages = Stages { ready: &ready, full: false, results, all: Vec::new() };
        stages.add("formatting", true, Duration::ZERO);
        // Advisories alone may be missing.
        stages.not_run("advisories of dependencies", "no database".to_owned());
        stages.finish(Duration::ZERO, false).expect("all is well");
        stages.ebpf_lints().expect("that clippy is missing is told by the total");
        let total = stages.finish(Duration::ZERO, false).expect_err("clippy is missing");
        assert_eq!(total.to_string(), "1 failed");
        let failure = stages.all.iter().flat_map(|s| &s.failures).next().expect("it is named");
        assert!(failure.contains("no clippy"), "{failure}");
    }
}
