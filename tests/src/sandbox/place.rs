//! Where a process of the sandbox runs: a control group and a network namespace, entered before the program starts.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;

use anyhow::{Context, Result, anyhow};
use nix::sched::{CloneFlags, setns};

/// A control group and a network namespace.
#[derive(Debug, Clone)]
pub struct Place {
    /// Directory of the control group.
    pub cgroup: PathBuf,
    /// Name below `/run/netns`, for `ip netns exec`.
    pub netns: String,
}

impl Place {
    /// A command that runs here, with nothing to read, in a process group of its own: the terminal's Ctrl-C reaches only
    /// the sandbox's owner, who then takes everything down in order.
    ///
    /// # Errors
    /// The control group or the namespace is not there.
    pub fn command(&self, program: impl AsRef<Path>) -> Result<Command> {
        let mut command = self.interactive(program)?;
        command.stdin(Stdio::null()).process_group(0);
        Ok(command)
    }

    /// A command that runs here and keeps the terminal: a shell.
    ///
    /// # Errors
    /// The control group or the namespace is not there.
    pub fn interactive(&self, program: impl AsRef<Path>) -> Result<Command> {
        let procs = self.cgroup.join("cgroup.procs");
        let procs = OpenOptions::new().write(true).open(&procs).with_context(|| format!("open {}", procs.display()))?;
        let netns = self.open_netns()?;
        let mut command = Command::new(program.as_ref());
        // SAFETY: between fork and exec only write(2) and setns(2) on descriptors opened before, no allocation, no lock.
        unsafe {
            command.pre_exec(move || {
                // "0" is the writing process itself, so no number has to be formatted here.
                nix::unistd::write(&procs, b"0").map_err(io::Error::from)?;
                setns(&netns, CloneFlags::CLONE_NEWNET).map_err(io::Error::from)
            });
        }
        Ok(command)
    }

    /// Runs `work` on a thread of its own inside the network namespace, for sockets that this process itself needs.
    ///
    /// # Errors
    /// The namespace could not be entered, or `work` failed.
    pub fn inside<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        let netns = self.open_netns()?;
        thread::scope(|scope| {
            scope
                .spawn(|| {
                    setns(&netns, CloneFlags::CLONE_NEWNET).with_context(|| format!("enter {}", self.netns))?;
                    work()
                })
                .join()
                .map_err(|_| anyhow!("a thread inside {} panicked", self.netns))?
        })
    }

    /// A counter of the kernel's TCP in the network namespace, such as `TCPSynRetrans`.
    ///
    /// # Errors
    /// The kernel has none of that name.
    pub fn tcp_counter(&self, name: &str) -> Result<u64> {
        let text = self.inside(|| Ok(fs::read_to_string("/proc/thread-self/net/netstat")?))?;
        let mut lines = text.lines().filter(|line| line.starts_with("TcpExt:"));
        let (names, values) = (lines.next().context("TcpExt's names")?, lines.next().context("TcpExt's values")?);
        let at =
            names.split(' ').position(|n| n == name).with_context(|| format!("the kernel does not count {name}"))?;
        values.split(' ').nth(at).context("as many values as names")?.parse().context("a number")
    }

    fn open_netns(&self) -> Result<File> {
        let path = Path::new("/run/netns").join(&self.netns);
        File::open(&path).with_context(|| format!("open {}", path.display()))
    }
}
