//! Which agent of a node serves, and how another one takes its place.
//!
//! ```text
//! <pin dir>/                flock: held by the agent that serves, as long as it lives or until it is relieved
//! <pin dir>/owner           symbolic link to the serving agent's token: "<epoch>-<pid>-<start>"
//! <pin dir>/links/          flock: held by an agent that prepares itself, until it serves
//! <pin dir>/links/<name>    the attached programs; a link has one program, whose maps are those of one agent
//! <pin dir>/v<N>/<MAP>      the maps of the serving agent, for people and tools
//! <pin dir>/v<N>/next/<MAP> those of the one that prepares itself
//! ```
//!
//! Two agents share no map but `FLOWS`, `SOCKETS` and `OLDER`, which belong to connections. So an agent fills its maps without
//! being noticed, takes over by giving every link its programs, and then says so in `owner`; whatever one that is
//! stopped or late writes, it writes into maps that nobody asks. While links are of both, both serve. An agent that ends
//! in the middle leaves links behind that the serving one takes back ([`Datapath::maintain`](super::Datapath::maintain)).

use std::{
    fmt,
    fs::{self, File},
    io,
    os::{
        fd::AsRawFd,
        unix::fs::{MetadataExt as _, symlink},
    },
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use anyhow::Context as _;

use super::{ignore_absent, monotonic_ns};

/// Names in the pin directory: who serves, and who is about to say so.
pub(super) const OWNER: &str = "owner";
pub(super) const FRESH: &str = "owner_new";

/// A lock that ends with its holder.
#[derive(Debug)]
struct Lock {
    _file: File,
}

impl Lock {
    /// `None` if somebody else has it. bpffs knows no ordinary files: locks are on directories.
    fn try_take(dir: &Path) -> anyhow::Result<Option<Self>> {
        let file = File::open(dir).with_context(|| format!("open {}", dir.display()))?;
        // SAFETY: plain system call on a descriptor that we own.
        if unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } == 0 {
            let opened = file.metadata().with_context(|| format!("stat of {}", dir.display()))?.ino();
            // Whoever had it may have removed the directory: what is locked then is nobody's.
            let there = fs::metadata(dir).is_ok_and(|now| now.ino() == opened);
            return Ok(there.then_some(Self { _file: file }));
        }
        match io::Error::last_os_error() {
            error if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            error => Err(error).with_context(|| format!("lock {}", dir.display())),
        }
    }
}

/// The right to prepare: one agent at a time may load its programs to serve next.
#[derive(Debug)]
pub struct Turn {
    root: PathBuf,
    lock: Lock,
}

impl Turn {
    /// Takes the turn on a pin directory, which is made if it is not there; `None` while another agent has it.
    ///
    /// # Errors
    /// No bpffs is mounted there, or its directories cannot be made.
    pub fn try_take(pin_dir: &Path) -> anyhow::Result<Option<Self>> {
        let links = links(pin_dir);
        fs::create_dir_all(&links).with_context(|| {
            format!("create {} (is a bpffs mounted there? `mount -t bpf bpf /sys/fs/bpf`)", links.display())
        })?;
        Ok(Lock::try_take(&links)?.map(|lock| Self { root: pin_dir.to_owned(), lock }))
    }
}

pub(super) fn links(root: &Path) -> PathBuf {
    root.join("links")
}

/// While it lives nobody serves the node, and nobody prepares to.
#[derive(Debug)]
pub(super) struct Vacant {
    _serving: Lock,
    _turn: Option<Lock>,
}

/// Who keeps a node from being vacant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Occupant {
    /// It serves; otherwise it prepares itself to.
    serves: bool,
    /// Its number, where it can be seen from here.
    pid: Option<u32>,
}

impl fmt::Display for Occupant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let does = if self.serves { "serves this node" } else { "prepares itself to serve this node" };
        match self.pid {
            Some(pid) => write!(f, "an agent {does} (process {pid})"),
            None => write!(f, "an agent {does} (in a PID namespace that cannot be seen from here)"),
        }
    }
}

impl Vacant {
    /// Takes what says that a node has no agent.
    ///
    /// # Errors
    /// The pin directory cannot be opened. An agent that lives is no error.
    pub(super) fn try_take(root: &Path) -> anyhow::Result<Result<Self, Occupant>> {
        let links = links(root);
        let Some(serving) = Lock::try_take(root)? else {
            return Ok(Err(Occupant { serves: true, pid: holder(root) }));
        };
        let turn = if links.exists() { Lock::try_take(&links)? } else { None };
        if turn.is_none() && links.exists() {
            return Ok(Err(Occupant { serves: false, pid: holder(&links) }));
        }
        Ok(Ok(Self { _serving: serving, _turn: turn }))
    }

    /// Tells the agent that serves that another one does, so that it drains and ends, and waits for that. One that hangs is
    /// not waited for longer than `patience`; once it goes on it finds that it is relieved.
    ///
    /// # Errors
    /// The owner could not be written.
    pub(super) fn force(root: &Path, patience: Duration) -> anyhow::Result<Option<Self>> {
        write_owner(root, &format!("{}-{}-{}", next_epoch(root), std::process::id(), monotonic_ns()))?;
        let begun = Instant::now();
        loop {
            match Self::try_take(root)? {
                Ok(vacant) => return Ok(Some(vacant)),
                Err(_) if begun.elapsed() >= patience => return Ok(None),
                Err(_) => thread::sleep(Duration::from_millis(50)),
            }
        }
    }
}

/// The process that holds the lock on a directory.
fn holder(dir: &Path) -> Option<u32> {
    let of = fs::metadata(dir).ok()?;
    holder_in(&fs::read_to_string("/proc/locks").ok()?, of.dev(), of.ino())
}

/// The same, in the format of proc_locks(5).
fn holder_in(locks: &str, dev: u64, inode: u64) -> Option<u32> {
    let id = format!("{:02x}:{:02x}:{inode}", libc::major(dev), libc::minor(dev));
    let line = locks.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    let mut held = line.filter(|words| words.get(1) == Some(&"FLOCK") && words.get(5) == Some(&&*id));
    held.find_map(|words| words.get(4)?.parse().ok()).filter(|pid| *pid != 0)
}

/// One agent's part in who serves.
#[derive(Debug)]
pub(super) struct Ownership {
    root: PathBuf,
    token: String,
    epoch: u32,
    /// Held until this agent serves.
    turn: Option<Lock>,
    serving: Option<Lock>,
    part: Part,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    /// Loaded, and nothing of it attached.
    Preparing,
    /// Attached.
    Serving,
    /// Another agent is attached.
    Relieved,
}

impl Ownership {
    pub(super) fn new(turn: Turn) -> Self {
        let epoch = next_epoch(&turn.root);
        let token = format!("{epoch}-{}-{}", std::process::id(), monotonic_ns());
        Self { root: turn.root, token, epoch, turn: Some(turn.lock), serving: None, part: Part::Preparing }
    }

    /// Counts the agents that served here.
    pub(super) fn epoch(&self) -> u32 {
        self.epoch
    }

    pub(super) fn part(&self) -> Part {
        self.part
    }

    /// Whether an agent lives that has been told to serve; it may hang.
    pub(super) fn somebody_serves(&self) -> anyhow::Result<bool> {
        Ok(Lock::try_take(&self.root)?.is_none())
    }

    /// Whether another agent prepares itself to serve.
    pub(super) fn somebody_prepares(&self) -> bool {
        self.turn.is_none() && matches!(Lock::try_take(&links(&self.root)), Ok(None))
    }

    /// Says that this agent serves: the attached programs are its own.
    pub(super) fn declare(&mut self) -> anyhow::Result<()> {
        write_owner(&self.root, &self.token)?;
        self.part = Part::Serving;
        Ok(())
    }

    /// Whether this agent still is the one that serves; if not, it is [`Part::Relieved`] from now on.
    pub(super) fn confirm(&mut self) -> bool {
        if self.part == Part::Serving {
            match fs::read_link(owner(&self.root)) {
                Ok(token) if token.as_os_str() == self.token.as_str() => {}
                // Somebody has removed it: nobody else claims to serve. Where all is gone the node has been cleaned.
                Err(error) if error.kind() == io::ErrorKind::NotFound && self.root.exists() => {}
                _ => {
                    self.part = Part::Relieved;
                    self.serving = None;
                }
            }
        }
        self.part == Part::Serving
    }

    /// Takes the lock of the one that serves once the predecessor has let go, and gives up the turn then. One that hangs
    /// does not let go: `give_up` ends the turn all the same.
    pub(super) fn settle(&mut self, give_up: bool) {
        if self.serving.is_none() {
            // Tried again; it says nothing about the programs.
            self.serving = Lock::try_take(&self.root).unwrap_or_default();
        }
        if self.serving.is_some() || give_up {
            self.turn = None;
        }
    }

    /// Whether nobody else serves, or prepares to, from now on and as long as this lives.
    pub(super) fn is_last(&mut self) -> bool {
        if self.part == Part::Relieved || self.part == Part::Serving && !self.confirm() {
            return false;
        }
        if self.turn.is_none() {
            self.turn = Lock::try_take(&links(&self.root)).unwrap_or_default();
        }
        if self.serving.is_none() {
            self.serving = Lock::try_take(&self.root).unwrap_or_default();
        }
        self.turn.is_some() && self.serving.is_some()
    }

    /// Nobody else may prepare while the guard lives; `None` if somebody does.
    pub(super) fn alone(&self) -> Option<impl Sized> {
        Lock::try_take(&links(&self.root)).ok().flatten()
    }
}

fn owner(root: &Path) -> PathBuf {
    root.join(OWNER)
}

fn next_epoch(root: &Path) -> u32 {
    let before = fs::read_link(owner(root)).ok();
    let before = before.as_deref().and_then(Path::to_str).and_then(|token| token.split('-').next()?.parse().ok());
    before.map_or(1, |epoch: u32| epoch.wrapping_add(1).max(1))
}

fn write_owner(root: &Path, token: &str) -> anyhow::Result<()> {
    let fresh = root.join(FRESH);
    ignore_absent(fs::remove_file(&fresh)).context("remove what a dead agent left")?;
    symlink(token, &fresh).context("write the owner")?;
    fs::rename(&fresh, owner(root)).context("write the owner")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_holds_a_lock_is_found() {
        let locks = "1: POSIX  ADVISORY  WRITE 1 00:1f:77 0 EOF\n\
                     2: FLOCK  ADVISORY  WRITE 812 00:1f:77 0 EOF\n\
                     2: -> FLOCK  ADVISORY  WRITE 813 00:1f:77 0 EOF\n\
                     3: FLOCK  ADVISORY  WRITE 0 00:1f:78 0 EOF\n";
        assert_eq!(holder_in(locks, libc::makedev(0, 0x1f), 77), Some(812));
        assert_eq!(holder_in(locks, libc::makedev(0, 0x1f), 78), None, "of another PID namespace");
        assert_eq!(holder_in(locks, libc::makedev(8, 0x1f), 77), None);
    }

    #[test]
    fn a_lock_on_what_was_removed_is_nobodys() {
        let dir = tempfile::tempdir().expect("a folder");
        let root = dir.path().join("pins");
        fs::create_dir_all(links(&root)).expect("made");
        let vacant = Vacant::try_take(&root).expect("opened").expect("nobody is there");
        let occupant = Vacant::try_take(&root).expect("opened").expect_err("the first one");
        assert_eq!(occupant, Occupant { serves: true, pid: Some(std::process::id()) });
        drop(vacant);
        let turn = Turn::try_take(&root).expect("opened").expect("free");
        let occupant = Vacant::try_take(&root).expect("opened").expect_err("it prepares itself");
        assert_eq!(occupant, Occupant { serves: false, pid: Some(std::process::id()) });
        let mut owner = Ownership::new(turn);
        assert!(owner.is_last());
        owner.declare().expect("written");
        assert!(owner.confirm() && owner.is_last());
        fs::remove_dir_all(&root).expect("removed");
        assert!(!owner.is_last(), "the node has been cleaned");
        assert_eq!(owner.part(), Part::Relieved);
    }
}
