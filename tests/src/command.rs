//! Running a program of the system: its output when it succeeds, its own words when it fails.

use std::env;
use std::ffi::OsStr;
use std::io::{self, Write};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{Signal, killpg};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::{Pid, getpid, getppid};

use crate::interrupt;

/// Runs `program` with `args` to its end and returns what it printed.
///
/// # Errors
/// The program could not be started or ended unsuccessfully; the error carries its standard error.
pub fn run<S: AsRef<OsStr>>(program: &str, args: &[S]) -> Result<String> {
    let mut command = Command::new(program);
    command.args(args);
    finish(&mut command, None)
}

/// Runs `command` to its end, feeding it `input`, and returns what it printed.
///
/// # Errors
/// As for [`run`].
pub fn finish(command: &mut Command, input: Option<&str>) -> Result<String> {
    let shown = describe(command);
    command.stdin(if input.is_some() { Stdio::piped() } else { Stdio::null() });
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().with_context(|| format!("start `{shown}`"))?;
    if let (Some(text), Some(mut pipe)) = (input, child.stdin.take()) {
        // A program that fails early closes its input; its exit status then tells more than our write error.
        let _ = pipe.write_all(text.as_bytes());
    }
    let output = child.wait_with_output().with_context(|| format!("wait for `{shown}`"))?;
    success(&shown, &output)?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Turns an unsuccessful end into an error that carries the program's standard error.
///
/// # Errors
/// The status is not success.
pub fn success(shown: &str, output: &Output) -> Result<()> {
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let said = said.trim();
    bail!("`{shown}` ended with {}{}{said}", output.status, if said.is_empty() { "" } else { ": " })
}

/// The executable of this name, also where only root's `PATH` looks.
///
/// # Errors
/// There is none.
pub fn find(program: &str) -> Result<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let more = ["/usr/sbin", "/sbin", "/usr/local/sbin"].map(PathBuf::from);
    let mut candidates = env::split_paths(&path).chain(more).map(|dir| dir.join(program));
    candidates.find(|p| p.is_file()).with_context(|| format!("{program} is not on PATH"))
}

/// From now on the command starts a process that the kernel kills (SIGKILL) when the thread that starts it ends, in a process
/// group of its own: the terminal's Ctrl-C is for its starter, who ends it in order. What that process starts is not killed.
pub fn end_with_starter(command: &mut Command) {
    let starter = getpid();
    command.process_group(0);
    // SAFETY: between fork and exec only prctl(2) and getppid(2), no allocation, no lock.
    unsafe {
        command.pre_exec(move || {
            set_pdeathsig(Signal::SIGKILL).map_err(io::Error::from)?;
            // Who died before the kernel was asked is not noticed any more.
            if getppid() == starter { Ok(()) } else { Err(Errno::ESRCH.into()) }
        });
    }
}

/// Ends a process that leads a process group, and the group, and waits for it: SIGTERM first, SIGKILL after `grace`.
///
/// # Errors
/// It has been waited for already.
pub fn end_group(child: &mut Child, grace: Duration) -> Result<()> {
    let group = Pid::from_raw(i32::try_from(child.id()).context("a process number beyond the kernel's range")?);
    let begun = Instant::now();
    // A group of which nobody is left is what is wanted.
    let _ = killpg(group, Signal::SIGTERM);
    // Until it has been waited for its number is nobody else's, and so is the group's.
    let look = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
    while waitid(Id::Pid(group), look)? == WaitStatus::StillAlive && begun.elapsed() < grace {
        thread::sleep(Duration::from_millis(20));
    }
    let _ = killpg(group, Signal::SIGKILL);
    child.wait().context("wait for the end of a process")?;
    Ok(())
}

/// The command as one would type it, for messages.
pub fn describe(command: &Command) -> String {
    let mut words = vec![command.get_program().to_string_lossy().into_owned()];
    words.extend(command.get_args().map(|a| a.to_string_lossy().into_owned()));
    words.join(" ")
}

/// Asks `ready` every 20 ms until it has an answer, for as long as `limit` times [`crate::patience`].
///
/// # Errors
/// `ready` failed, `limit` passed (the message names `what`), or the user interrupted.
pub fn wait_for<T>(what: &str, limit: Duration, mut ready: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    wait_for_uninterrupted(what, limit, || {
        interrupt::check()?;
        ready()
    })
}

/// As [`wait_for`], also while the user's interrupt is being obeyed: for removal.
pub(crate) fn wait_for_uninterrupted<T>(
    what: &str,
    limit: Duration,
    mut ready: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let limit = limit * crate::patience();
    let start = Instant::now();
    loop {
        if let Some(value) = ready()? {
            return Ok(value);
        }
        if start.elapsed() > limit {
            bail!("{what}: still not so after {:.1} s", limit.as_secs_f64());
        }
        thread::sleep(Duration::from_millis(20));
    }
}
