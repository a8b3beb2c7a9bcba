//! `cargo xtask run` as a user runs it: the status of `--once`, the three things that a run which stays up suggests, and what
//! Ctrl-C leaves. The rows themselves are `tour`'s.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use culvert_tests::programs::HttpResult;
use culvert_tests::sandbox::{built, expect_no_traces, own_name};
use culvert_tests::{command, patience};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// A second run takes seconds to start: all that it needs is built.
const START_LIMIT: Duration = Duration::from_secs(20);
/// The first build of what is needed, where these tests are run without `cargo xtask test`.
const BUILD_LIMIT: Duration = Duration::from_secs(900);
/// The scenario waits for renewed certificates once.
const SCENARIO_LIMIT: Duration = Duration::from_secs(150);
/// Removal of a sandbox.
const END_LIMIT: Duration = Duration::from_secs(30);
/// "within a second" is the specification's; the shell that asks takes its time too.
const EFFECT_LIMIT: Duration = Duration::from_secs(10);

/// The first lines are of standard error, the table of standard output; a user sees both.
type Said = Arc<Mutex<Vec<(Duration, String)>>>;

/// A run, interrupted when dropped.
struct Run {
    child: Child,
    said: Said,
    readers: Vec<JoinHandle<()>>,
}

impl Run {
    fn start(name: &str, more: &[&str]) -> Result<Self> {
        let mut run = Command::new(built("xtask")?);
        run.args(["run", "--name", name]).args(more);
        run.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let begun = Instant::now();
        let mut child = run.spawn().context("start `cargo xtask run`")?;
        let said = Said::default();
        let readers = [
            child.stdout.take().map(|out| read(out, begun, Arc::clone(&said))),
            child.stderr.take().map(|err| read(err, begun, Arc::clone(&said))),
        ];
        Ok(Self { child, said, readers: readers.into_iter().flatten().collect() })
    }

    fn lines(&self) -> Vec<(Duration, String)> {
        self.said.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn text(&self) -> String {
        self.lines().into_iter().map(|(_, line)| line + "\n").collect()
    }

    /// The first line with these words, and when it came.
    fn line(&mut self, words: &str, limit: Duration) -> Result<(Duration, String)> {
        let found = command::wait_for(&format!("`cargo xtask run` says {words:?}"), limit, || {
            let ended = self.child.try_wait()?;
            let found = self.lines().into_iter().find(|(_, line)| line.contains(words));
            // What it said last may not be read yet.
            ensure!(found.is_some() || ended.is_none() || !self.readers_ended(), "it ended with {ended:?}");
            Ok(found)
        });
        found.with_context(|| format!("it said:\n{}", self.text()))
    }

    fn readers_ended(&self) -> bool {
        self.readers.iter().all(JoinHandle::is_finished)
    }

    /// Waits until nodes are built, which is to be soon.
    fn started(&mut self) -> Result<()> {
        let (at, _) = self.line("build two nodes", BUILD_LIMIT)?;
        // Without it another compiler may be chosen, for which nothing is built yet.
        if std::env::var_os("CULVERT_EBPF_TOOLCHAIN").is_some() {
            ensure!(at < START_LIMIT * patience(), "it took {at:?} until nodes were built:\n{}", self.text());
        }
        Ok(())
    }

    fn end(&mut self, limit: Duration) -> Result<ExitStatus> {
        let ended = command::wait_for("`cargo xtask run` ends", limit, || {
            Ok(if self.readers_ended() { self.child.try_wait()? } else { None })
        });
        ended.with_context(|| format!("it said:\n{}", self.text()))
    }

    /// As Ctrl-C does.
    fn interrupt(&self) -> Result<()> {
        let pid = Pid::from_raw(i32::try_from(self.child.id())?);
        kill(pid, Signal::SIGINT).context("interrupt `cargo xtask run`")
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            // It may end by itself at this moment; what it leaves otherwise, the next sandbox removes.
            let _ = self.interrupt();
            if self.end(END_LIMIT).is_err() {
                let _ = self.child.kill();
                let _ = self.child.wait();
            }
        }
        for reader in self.readers.drain(..) {
            // One that panicked has nothing more to tell.
            let _ = reader.join();
        }
    }
}

fn read(from: impl Read + Send + 'static, begun: Instant, into: Said) -> JoinHandle<()> {
    thread::spawn(move || {
        for line in BufReader::new(from).lines().map_while(Result::ok) {
            into.lock().unwrap_or_else(PoisonError::into_inner).push((begun.elapsed(), line));
        }
    })
}

#[test]
fn one_run_has_all_rows_as_expected_and_leaves_nothing() -> Result<()> {
    let name = own_name("once");
    let mut run = Run::start(&name, &["--once"])?;
    run.started()?;
    let status = run.end(SCENARIO_LIMIT)?;
    let text = run.text();
    ensure!(status.success(), "{status}:\n{text}");
    let good = text.lines().filter(|line| line.contains(" ✓")).count();
    ensure!(good >= 46 && text.contains(&format!("scenario: {good} as expected, 0 not")), "{good} rows:\n{text}");
    expect_no_traces(&name)
}

/// §5.3, [PA.1]: what is suggested is done as it is written there, by the programs that it names.
#[test]
fn a_run_stays_up_and_what_it_suggests_works_until_ctrl_c() -> Result<()> {
    let name = own_name("stays");
    let mut run = Run::start(&name, &[])?;
    run.started()?;
    run.line("The sandbox stays up until Ctrl-C; default is STRICT now", SCENARIO_LIMIT)?;
    let (_, shell) = run.line("cargo xtask shell", END_LIMIT)?;
    let (_, edit) = run.line("$EDITOR", END_LIMIT)?;
    let (_, dump) = run.line("bpftool map dump", END_LIMIT)?;

    let call = |pod: &str| call(&shell, pod);
    let got = call("nginx")?;
    ensure!(got.status == Some(200), "nginx under STRICT: {} {:?}", got.brief(), got.error);
    let got = call("legacy-app")?;
    ensure!(["refused", "reset"].contains(&&*got.brief()), "legacy-app under STRICT: {} {:?}", got.brief(), got.error);
    let policy = suggested(&edit).strip_prefix("$EDITOR ").context("a file to edit")?.trim();
    ensure!(fs::read_to_string(policy)?.contains("mode: STRICT"), "{policy} is STRICT");
    command::run("sed", &["-i", "s/STRICT/PERMISSIVE/", policy])?;
    command::wait_for("legacy-app is answered under PERMISSIVE", EFFECT_LIMIT, || {
        Ok((call("legacy-app")?.status == Some(200)).then_some(()))
    })?;
    let shown = command::run("sh", &["-c", suggested(&dump)])?;
    for field in ["generation", "mode_buckets"] {
        ensure!(shown.contains(field), "{}: no {field} in {shown}", suggested(&dump));
    }

    run.interrupt()?;
    let status = run.end(END_LIMIT)?;
    ensure!(status.success(), "after Ctrl-C: {status}, signal {:?}:\n{}", status.signal(), run.text());
    expect_no_traces(&name)
}

/// The command of a suggestion: what stands before its explanation.
fn suggested(line: &str) -> &str {
    line.trim().split("   ").next().unwrap_or_default()
}

/// A request from a pod, as the suggestion has it: a shell in the pod, and what to type there.
fn call(line: &str, pod: &str) -> Result<HttpResult> {
    let shell = suggested(line).strip_prefix("cargo xtask ").context("a command of xtask")?;
    let typed = line.split_once("there: ").and_then(|(_, rest)| rest.split_once(" (")).context("what to type")?.0;
    let mut words: Vec<&str> = shell.split_whitespace().collect();
    ensure!(words.pop() == Some("nginx"), "{shell} is a shell in nginx");
    words.push(pod);
    words.extend(typed.split_whitespace());
    let mut xtask = Command::new(built("xtask")?);
    let out = xtask.args(&words).stdin(Stdio::null()).output().context("start `cargo xtask shell`")?;
    let text = String::from_utf8_lossy(&out.stdout);
    let said = String::from_utf8_lossy(&out.stderr);
    serde_json::from_str(text.trim()).with_context(|| format!("`xtask {}` printed {text}{said}", words.join(" ")))
}
