//! podman, for the containers that are nodes: with a configuration, a store and a network namespace of its own, so that bridges,
//! translation and forwarding stay out of the machine's own network, and everything can be removed without asking whose it is.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::mount::{MntFlags, umount2};
use nix::sys::resource::{Resource, getrlimit};

use super::parts::Parts;
use crate::command;

/// The limit that podman gives itself, and may not give a container more than.
const PROCESSES: u64 = 32_768;
/// Where containers of an engine with a network of its own ask for names: an address of none (RFC 2544), whatever the machine's is.
pub(crate) const NAME_SERVER: &str = "198.18.0.53";
/// Below which control group podman puts containers, in every hierarchy.
const CGROUPS: &str = "libpod_parent";

/// A podman.
#[derive(Debug, Clone)]
pub(crate) struct Engine {
    dir: PathBuf,
    /// Name below `/run/netns`.
    netns: Option<String>,
}

impl Engine {
    /// One whose state lies in `dir`, which will be made; `images` is a store that is only read. With `netns`, everything runs in
    /// that network namespace.
    pub(crate) fn create(dir: &Path, netns: Option<&str>, images: Option<&Path>, parts: &Parts) -> Result<Self> {
        let engine = Self::existing(dir, netns);
        for folder in ["networks", "run"] {
            let folder = dir.join(folder);
            fs::create_dir_all(&folder).with_context(|| format!("create {}", folder.display()))?;
        }
        let (_, files) = getrlimit(Resource::RLIMIT_NOFILE).context("ask for the limit of open files")?;
        let at = |name: &str| dir.join(name).display().to_string();
        // Without CAP_SYS_RESOURCE nothing may have more than this process. crun refuses a hybrid cgroup tree. systemd as
        // the first process of a container does not obey the signal by which it is asked to end.
        let names = netns.map_or_else(String::new, |_| format!("dns_servers = [\"{NAME_SERVER}\"]\n"));
        let containers = format!(
            "[containers]\n\
             {names}\
             default_ulimits = [\"nofile={files}:{files}\", \"nproc={PROCESSES}:{PROCESSES}\"]\n\
             log_driver = \"k8s-file\"\n\
             [network]\n\
             network_backend = \"netavark\"\n\
             network_config_dir = \"{}\"\n\
             [engine]\n\
             cgroup_manager = \"cgroupfs\"\n\
             events_logger = \"file\"\n\
             runtime = \"runc\"\n\
             stop_timeout = 1\n\
             tmp_dir = \"{}\"\n\
             static_dir = \"{}\"\n\
             volume_path = \"{}\"\n\
             [engine.runtimes]\n\
             runc = [\"{}\"]\n",
            at("networks"),
            at("run/libpod"),
            at("libpod"),
            at("volumes"),
            parts.program("runc").display(),
        );
        let more = images.map_or_else(String::new, |store| {
            format!("[storage.options]\nadditionalimagestores = [\"{}\"]\n", store.display())
        });
        let storage = format!(
            "[storage]\ndriver = \"overlay\"\ngraphroot = \"{}\"\nrunroot = \"{}\"\n{more}",
            at("storage"),
            at("run/storage")
        );
        for (name, text) in [("containers.conf", containers), ("storage.conf", storage)] {
            fs::write(dir.join(name), text).with_context(|| format!("write {}", at(name)))?;
        }
        Ok(engine)
    }

    /// One that was made before, to be removed.
    pub(crate) fn existing(dir: &Path, netns: Option<&str>) -> Self {
        Self { dir: dir.to_owned(), netns: netns.map(str::to_owned) }
    }

    /// Where its images lie.
    pub(crate) fn store(dir: &Path) -> PathBuf {
        dir.join("storage")
    }

    /// A program that uses it: podman, kind, kubectl, or one that is only to be in its network.
    pub(crate) fn command(&self, program: impl AsRef<Path>) -> Command {
        let mut command = match &self.netns {
            None => Command::new(program.as_ref()),
            Some(netns) => {
                // Not `ip netns exec`, which mounts /sys anew.
                let mut command = Command::new("nsenter");
                command.arg(format!("--net=/run/netns/{netns}")).arg("--").arg(program.as_ref());
                command
            }
        };
        command
            .env("CONTAINERS_CONF", self.dir.join("containers.conf"))
            .env("CONTAINERS_STORAGE_CONF", self.dir.join("storage.conf"))
            .env("KIND_EXPERIMENTAL_PROVIDER", "podman")
            .env("PATH", path())
            .stdin(Stdio::null());
        command
    }

    /// What podman prints.
    pub(crate) fn podman(&self, arguments: &[&str]) -> Result<String> {
        command::finish(self.command("podman").args(arguments), None)
    }

    /// Removes all containers, and whatever they leave on the machine.
    pub(crate) fn remove_all(&self) -> Result<()> {
        if !self.dir.join("storage.conf").exists() || self.netns.as_deref().is_some_and(|name| !lives(name)) {
            return self.unmount();
        }
        let all = self.podman(&["ps", "--all", "--quiet", "--no-trunc"])?;
        let ids: Vec<&str> = all.split_whitespace().collect();
        if !ids.is_empty() {
            thread::scope(|scope| -> Result<()> {
                let removed = scope.spawn(|| self.podman(&["rm", "--force", "--all", "--volumes", "--time", "0"]));
                // A process that a node's own runtime has frozen cannot be killed, and the node would stay for good.
                while !removed.is_finished() {
                    ids.iter().for_each(|id| thaw(id));
                    thread::sleep(Duration::from_millis(50));
                }
                removed.join().unwrap_or_else(|_| bail!("a thread that removes nodes panicked")).map(drop)
            })?;
        }
        ids.iter().try_for_each(|id| remove_groups(id))?;
        self.unmount()
    }

    /// What podman has mounted below its folder, which can then be removed.
    fn unmount(&self) -> Result<()> {
        let mounts = fs::read_to_string("/proc/self/mounts").context("read /proc/self/mounts")?;
        let ours = mounts.lines().filter_map(|line| line.split(' ').nth(1)).map(Path::new);
        for mount in ours.filter(|mount| mount.starts_with(&self.dir)).collect::<Vec<_>>().into_iter().rev() {
            umount2(mount, MntFlags::MNT_DETACH).with_context(|| format!("unmount {}", mount.display()))?;
        }
        Ok(())
    }
}

/// Whether a network namespace of this name is there.
fn lives(name: &str) -> bool {
    Path::new("/run/netns").join(name).exists()
}

/// Where root's programs are, also for who has a shorter `PATH`.
fn path() -> OsString {
    let path = env::var_os("PATH").unwrap_or_default();
    let more = ["/usr/sbin", "/sbin"].map(PathBuf::from);
    env::join_paths(env::split_paths(&path).chain(more)).unwrap_or(path)
}

/// The control groups of a container, one in each hierarchy.
fn groups(id: &str) -> Vec<PathBuf> {
    let hierarchies = fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten().map(|entry| entry.path());
    let of = |root: PathBuf| ["", "conmon-"].map(|kind| root.join(CGROUPS).join(format!("libpod-{kind}{id}")));
    // The whole tree may be one hierarchy.
    hierarchies.chain([PathBuf::from("/sys/fs/cgroup")]).flat_map(of).filter(|dir| dir.is_dir()).collect()
}

/// Lets the frozen processes of a container go on (cgroup-v1/freezer-subsystem).
fn thaw(id: &str) {
    let mut dirs = groups(id);
    while let Some(dir) = dirs.pop() {
        let state = dir.join("freezer.state");
        if fs::read_to_string(&state).is_ok_and(|state| state.trim() == "FROZEN") {
            // One that has gone meanwhile is not frozen any more.
            let _ = fs::write(&state, "THAWED");
        }
        dirs.extend(below(&dir));
    }
}

/// Removes what a container leaves of control groups, once its processes have ended.
fn remove_groups(id: &str) -> Result<()> {
    command::wait_for_uninterrupted("the control groups of a node are empty", Duration::from_secs(10), || {
        thaw(id);
        let left = groups(id);
        left.iter().for_each(|dir| remove_empty(dir));
        Ok(left.iter().all(|dir| !dir.exists()).then_some(()))
    })
}

fn remove_empty(dir: &Path) {
    below(dir).iter().for_each(|dir| remove_empty(dir));
    // One in which a process still is stays, for the next attempt.
    let _ = fs::remove_dir(dir);
}

fn below(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())).map(|entry| entry.path()).collect()
}
