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
    fs::{self, File},
    io,
    os::{fd::AsRawFd, unix::fs::symlink},
    path::{Path, PathBuf},
};

use anyhow::Context as _;

use super::{ignore_absent, monotonic_ns};

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
            return Ok(Some(Self { _file: file }));
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
        let before = fs::read_link(owner(&turn.root)).ok();
        let before = before.as_deref().and_then(Path::to_str).and_then(|token| token.split('-').next()?.parse().ok());
        let epoch = before.map_or(1, |epoch: u32| epoch.wrapping_add(1).max(1));
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
        let fresh = self.root.join("owner_new");
        ignore_absent(fs::remove_file(&fresh)).context("remove what a dead agent left")?;
        symlink(&self.token, &fresh).context("write the owner")?;
        fs::rename(&fresh, owner(&self.root)).context("write the owner")?;
        self.part = Part::Serving;
        Ok(())
    }

    /// Whether this agent still is the one that serves; if not, it is [`Part::Relieved`] from now on.
    pub(super) fn confirm(&mut self) -> bool {
        if self.part == Part::Serving {
            match fs::read_link(owner(&self.root)) {
                Ok(token) if token.as_os_str() == self.token.as_str() => {}
                // Somebody has removed it: nobody else claims to serve.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
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

    /// Nobody else may prepare while the guard lives; `None` if somebody does.
    pub(super) fn alone(&self) -> Option<impl Sized> {
        Lock::try_take(&links(&self.root)).ok().flatten()
    }
}

fn owner(root: &Path) -> PathBuf {
    root.join("owner")
}
