//! What a sandbox puts on the machine, written down before it is done, and its complete removal.
//!
//! `/run/culvert-<instance>/` belongs to one sandbox: `lock` is held (flock) for as long as its owner lives, `state.json`
//! lists what there is to remove. An owner that died leaves the lock free; whoever takes it next removes what the list
//! names and starts afresh. Removal works from the list alone and may itself be interrupted and repeated.

use std::fs::{self, File, OpenOptions};
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use super::net;
use crate::command;
use crate::kind::Engine;

/// Where the directories of all sandboxes are.
const RUN: &str = "/run";
/// Start of every name that a sandbox gives.
const PREFIX: &str = "culvert-";

/// A process of a sandbox. Numbers are reused, so the start time tells whether it is still the same process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Recorded {
    pub(crate) pid: i32,
    /// Field 22 of `/proc/<pid>/stat`: clock ticks since boot.
    pub(crate) started: u64,
    pub(crate) what: String,
}

impl Recorded {
    pub(crate) fn of(pid: u32, what: &str) -> Result<Self> {
        let pid = i32::try_from(pid).context("a process number beyond the kernel's range")?;
        let started = started(pid).with_context(|| format!("{what} ended at once"))?;
        Ok(Self { pid, started, what: what.to_owned() })
    }

    /// Whether the process still runs; one that ended and was not yet waited for does not.
    pub(crate) fn lives(&self) -> bool {
        started(self.pid) == Some(self.started)
    }

    /// Whether it has been stopped (SIGSTOP) and not continued.
    pub(crate) fn is_stopped(&self) -> bool {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.pid)).unwrap_or_default();
        stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('T'))
    }

    pub(crate) fn signal(&self, signal: Signal) {
        if self.lives() {
            // It may end between the look and the signal; then there is nothing left to do.
            let _ = kill(Pid::from_raw(self.pid), signal);
        }
    }
}

/// Start time of a process that runs, `None` for one that does not or is a zombie.
fn started(pid: i32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may hold spaces and parentheses; the fields after it may not.
    let mut fields = stat.rsplit_once(") ")?.1.split(' ');
    let state = fields.next()?;
    if state == "Z" || state == "X" { None } else { fields.nth(18)?.parse().ok() }
}

/// A list that another version of this library wrote is read as far as it is understood.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
struct Entries {
    owner: Option<Recorded>,
    processes: Vec<Recorded>,
    /// Names below `/run/netns`.
    netns: Vec<String>,
    /// Directories of the cgroup tree, with all that is below them.
    cgroups: Vec<PathBuf>,
    /// Directories of a BPF file system, with all that is below them.
    pins: Vec<PathBuf>,
    /// Other directories, with all that is below them.
    directories: Vec<PathBuf>,
    /// Folders of engines whose containers are nodes, each with the network namespace that it works in.
    nodes: Vec<(PathBuf, String)>,
}

/// The list of one sandbox, and the right to it.
#[derive(Debug)]
pub(crate) struct Ledger {
    dir: PathBuf,
    entries: Mutex<Entries>,
    _lock: Flock<File>,
}

impl Ledger {
    /// Takes the sandbox's directory, removing what a dead owner left.
    pub(crate) fn take(instance: &str) -> Result<Self> {
        let dir = dir(instance);
        let lock = match lock(&dir)? {
            Taken::Free(lock) => lock,
            Taken::Held(owner) => bail!(
                "sandbox {instance} is already up, owned by process {owner}: press Ctrl-C there, or use it (its folder is {})",
                dir.display()
            ),
        };
        let ledger = Self { entries: Mutex::new(read(&dir)?), dir, _lock: lock };
        ledger.empty()?;
        let owner = Recorded::of(std::process::id(), "owner")?;
        ledger.note(|e| e.owner = Some(owner))?;
        Ok(ledger)
    }

    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    pub(crate) fn will_make_netns(&self, name: &str) -> Result<()> {
        self.note(|e| e.netns.push(name.to_owned()))
    }

    pub(crate) fn will_make_cgroup(&self, path: &Path) -> Result<()> {
        self.note(|e| e.cgroups.push(path.to_owned()))
    }

    pub(crate) fn will_pin(&self, path: &Path) -> Result<()> {
        self.note(|e| e.pins.push(path.to_owned()))
    }

    pub(crate) fn will_make_directory(&self, path: &Path) -> Result<()> {
        self.note(|e| e.directories.push(path.to_owned()))
    }

    pub(crate) fn will_make_nodes(&self, engine: &Path, netns: &str) -> Result<()> {
        self.note(|e| e.nodes.push((engine.to_owned(), netns.to_owned())))
    }

    /// A process is noted after it started; until then its cgroup, already noted, covers it.
    pub(crate) fn started(&self, process: Recorded) -> Result<()> {
        self.note(|e| e.processes.push(process))
    }

    /// Removes everything, and the directory itself.
    pub(crate) fn remove(&self) -> Result<()> {
        self.empty()?;
        for entry in fs::read_dir(&self.dir).with_context(|| format!("list {}", self.dir.display()))? {
            let path = entry?.path();
            if !path.ends_with("lock") {
                remove_tree(&path)?;
            }
        }
        fs::remove_file(self.dir.join("lock")).context("remove the sandbox's lock")?;
        fs::remove_dir(&self.dir).with_context(|| format!("remove {}", self.dir.display()))
    }

    /// Removes what the list names; the list is shortened only when that is done.
    fn empty(&self) -> Result<()> {
        let mut entries = self.entries();
        for (engine, netns) in entries.nodes.drain(..) {
            Engine::existing(&engine, Some(&netns)).remove_all()?;
            remove_tree(&engine)?;
        }
        end_processes(&entries.processes);
        for cgroup in &entries.cgroups {
            remove_cgroup(cgroup)?;
        }
        entries.cgroups.clear();
        entries.processes.clear();
        for pin in entries.pins.drain(..) {
            remove_tree(&pin)?;
        }
        for directory in entries.directories.drain(..) {
            remove_tree(&directory)?;
        }
        for name in entries.netns.drain(..) {
            net::remove_namespace(&name)?;
        }
        self.save(&entries)
    }

    fn note(&self, change: impl FnOnce(&mut Entries)) -> Result<()> {
        let mut entries = self.entries();
        change(&mut entries);
        self.save(&entries)
    }

    fn save(&self, entries: &Entries) -> Result<()> {
        let path = self.dir.join("state.json");
        let fresh = self.dir.join("state.json.new");
        fs::write(&fresh, serde_json::to_vec_pretty(entries)?).with_context(|| format!("write {}", fresh.display()))?;
        fs::rename(&fresh, &path).with_context(|| format!("rename {}", fresh.display()))
    }

    fn entries(&self) -> MutexGuard<'_, Entries> {
        // The list is saved whole after each change, so it is right also when a thread panicked beside it.
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The directory of a sandbox.
pub(super) fn dir(instance: &str) -> PathBuf {
    Path::new(RUN).join(format!("{PREFIX}{instance}"))
}

/// What [`sweep`] found.
#[derive(Debug, Default)]
pub struct Swept {
    /// Sandboxes without an owner, removed.
    pub removed: Vec<String>,
    /// Sandboxes that are up, each with its owner's process number.
    pub up: Vec<(String, u32)>,
}

/// Removes what dead owners left, of every sandbox on the machine.
///
/// # Errors
/// Something could not be removed.
pub fn sweep() -> Result<Swept> {
    let mut swept = Swept::default();
    for entry in fs::read_dir(RUN).context("list /run")? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        let dir = Path::new(RUN).join(&name);
        let Some(instance) = name.strip_prefix(PREFIX).filter(|_| dir.join("state.json").exists()) else { continue };
        match lock(&dir)? {
            Taken::Held(owner) => swept.up.push((instance.to_owned(), owner)),
            Taken::Free(lock) => {
                Ledger { entries: Mutex::new(read(&dir)?), dir, _lock: lock }.remove()?;
                swept.removed.push(instance.to_owned());
            }
        }
    }
    Ok(swept)
}

enum Taken {
    Free(Flock<File>),
    Held(u32),
}

fn lock(dir: &Path) -> Result<Taken> {
    let path = dir.join("lock");
    let begun = Instant::now();
    loop {
        fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
        let file = match OpenOptions::new().create(true).truncate(false).write(true).open(&path) {
            Ok(file) => file,
            // The last owner removed the directory between our two steps.
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            Err(error) => return Err(error).with_context(|| format!("open {}", path.display())),
        };
        let inode = file.metadata()?.ino();
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) if fs::metadata(&path).is_ok_and(|m| m.ino() == inode) => return Ok(Taken::Free(lock)),
            // The last owner removed the file after we opened it: what we hold is nobody's lock.
            Ok(_) => {}
            Err((_, nix::errno::Errno::EWOULDBLOCK)) => {
                let owner = read(dir)?.owner;
                // A child that a killed owner had just forked holds the lock until it executes its program; and an owner
                // that has just begun has not yet written its name.
                if !owner.as_ref().is_some_and(Recorded::lives) && begun.elapsed() < Duration::from_secs(2) {
                    std::thread::sleep(Duration::from_millis(10));
                    continue;
                }
                return Ok(Taken::Held(owner.map_or(0, |o| o.pid.unsigned_abs())));
            }
            Err((_, error)) => return Err(error).with_context(|| format!("lock {}", path.display())),
        }
    }
}

fn read(dir: &Path) -> Result<Entries> {
    let path = dir.join("state.json");
    match fs::read(&path) {
        Ok(bytes) => serde_json::from_slice(&bytes)
            .with_context(|| format!("read {}; remove it by hand if it was damaged", path.display())),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(Entries::default()),
        Err(error) => Err(error).with_context(|| format!("read {}", path.display())),
    }
}

/// Asks every process to end, waits a moment, then ends it.
fn end_processes(processes: &[Recorded]) {
    for process in processes {
        process.signal(Signal::SIGTERM);
        // A stopped process sees the signal only once it goes on.
        process.signal(Signal::SIGCONT);
    }
    for _ in 0..100 {
        if !processes.iter().any(Recorded::lives) {
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    for process in processes {
        process.signal(Signal::SIGKILL);
    }
}

pub(super) fn remove_cgroup(root: &Path) -> Result<()> {
    if !root.exists() {
        return Ok(());
    }
    // Everything below is the sandbox's own: children of its processes that no list knows are ended with the rest.
    fs::write(root.join("cgroup.kill"), "1").with_context(|| format!("end all processes of {}", root.display()))?;
    command::wait_for_uninterrupted(&format!("{} is empty", root.display()), Duration::from_secs(10), || {
        Ok(remove_empty(root).is_ok().then_some(()))
    })
}

fn remove_empty(dir: &Path) -> std::io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_empty(&entry.path())?;
        }
    }
    fs::remove_dir(dir)
}

fn remove_tree(path: &Path) -> Result<()> {
    let result = match fs::symlink_metadata(path) {
        Ok(meta) if meta.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    };
    result.with_context(|| format!("remove {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_known_by_its_start_time_too() {
        let me = Recorded::of(std::process::id(), "this test").expect("it runs");
        assert!(me.lives());
        assert!(!Recorded { started: me.started + 1, ..me }.lives());
    }

    #[test]
    fn an_ended_process_does_not_live() {
        let mut child = std::process::Command::new("true").spawn().expect("start true");
        let pid = child.id();
        let record = Recorded { pid: i32::try_from(pid).expect("a process number"), started: 0, what: String::new() };
        child.wait().expect("it ends");
        assert!(!record.lives());
    }
}
