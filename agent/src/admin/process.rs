//! Which process of the node an answer comes from: the agent that serves answers on the node's ports, and whoever asks may
//! mean another one.

use std::{fmt, fs, os::unix::fs::MetadataExt as _, path::Path};

use anyhow::{Context as _, bail, ensure};

/// A process, told apart from every other that runs on the node, in whichever container, or did since it was started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Process {
    /// Inode of its namespace of process numbers.
    namespace: u64,
    /// Its number in there.
    pid: u32,
    /// When it started, in clock ticks since the node did.
    started: u64,
}

/// Header of an answer with the [`Process`] that gave it.
pub const HEADER: &str = "culvert-agent";

impl Process {
    /// A process by its number, as `proc_root` has it; `self` is the one that asks.
    ///
    /// # Errors
    /// There is none, or it may not be looked at.
    pub fn of(proc_root: &Path, pid: &str) -> anyhow::Result<Self> {
        let dir = proc_root.join(pid);
        let read = |name: &str| {
            let path = dir.join(name);
            fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))
        };
        let (stat, status) = (read("stat")?, read("status")?);
        let namespace = dir.join("ns/pid");
        let namespace = fs::metadata(&namespace).with_context(|| format!("look at {}", namespace.display()))?.ino();
        // The second field is the name in parentheses, and may hold anything; the state after it is number 3 (proc(5)).
        let started = stat.rsplit_once(')').and_then(|(_, rest)| rest.split_whitespace().nth(22 - 3)?.parse().ok());
        // As each namespace numbers it, the innermost last.
        let pid = status.lines().find_map(|line| line.strip_prefix("NSpid:")?.split_whitespace().last()?.parse().ok());
        let (Some(started), Some(pid)) = (started, pid) else { bail!("{} says nothing of a process", dir.display()) };
        Ok(Self { namespace, pid, started })
    }

    /// The one agent in the cgroup of whoever asks: in the same container, or the same unit of systemd.
    ///
    /// # Errors
    /// There is none, or more than one.
    pub fn beside(proc_root: &Path) -> anyhow::Result<(u32, Self)> {
        let cgroup = |dir: &Path| {
            let all = fs::read_to_string(dir.join("cgroup")).ok()?;
            all.lines().find_map(|line| line.strip_prefix("0::").map(str::to_owned))
        };
        let own = cgroup(&proc_root.join("self")).context("read the cgroup of this process")?;
        let all = fs::read_dir(proc_root).with_context(|| format!("list {}", proc_root.display()))?;
        let numbers = all.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
        let agents: Vec<u32> = numbers
            .filter(|pid| {
                let dir = proc_root.join(pid.to_string());
                is_agent(&fs::read(dir.join("cmdline")).unwrap_or_default()) && cgroup(&dir).as_ref() == Some(&own)
            })
            .collect();
        ensure!(
            agents.len() <= 1,
            "{} agents run in the cgroup {own} (processes {agents:?}): which one? --pid",
            agents.len()
        );
        let pid = agents
            .first()
            .with_context(|| format!("no agent runs in the cgroup {own} of this process; --pid names one"))?;
        Ok((*pid, Self::of(proc_root, &pid.to_string())?))
    }
}

/// Whether a command line is that of `culvert agent`.
fn is_agent(cmdline: &[u8]) -> bool {
    let mut words = cmdline.split(|byte| *byte == 0);
    let program = words.next().unwrap_or_default();
    let name = program.rsplit(|byte| *byte == b'/').next().unwrap_or_default();
    name.starts_with(b"culvert") && words.next() == Some(b"agent")
}

impl fmt::Display for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}-{}", self.namespace, self.pid, self.started)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_itself_and_no_other() {
        let proc_root = Path::new("/proc");
        let own = Process::of(proc_root, "self").expect("this process");
        assert_eq!(own, Process::of(proc_root, &std::process::id().to_string()).expect("the same"));
        let mut child = std::process::Command::new("sleep").arg("60").spawn().expect("a process");
        let other = Process::of(proc_root, &child.id().to_string());
        child.kill().and_then(|()| child.wait()).expect("it ends");
        assert_ne!(other.expect("it runs"), own);
        Process::of(proc_root, "0").expect_err("no such process");
    }

    #[test]
    fn the_agent_of_the_same_cgroup_is_found() {
        let root = tempfile::tempdir().expect("a folder");
        let process = |name: &str, cgroup: &str, cmdline: &str| {
            let dir = root.path().join(name);
            fs::create_dir_all(dir.join("ns")).expect("a folder");
            fs::write(dir.join("cgroup"), format!("1:name=systemd:/else\n0::{cgroup}\n")).expect("a file");
            fs::write(dir.join("cmdline"), cmdline.replace(' ', "\0")).expect("a file");
            fs::write(dir.join("stat"), format!("{name} (a) b) S {} 4711 0", "0 ".repeat(18).trim_end()))
                .expect("a file");
            fs::write(dir.join("status"), format!("Name:\tculvert\nNSpid:\t{name}\t1\n")).expect("a file");
            fs::write(dir.join("ns/pid"), "").expect("a file");
        };
        process("self", "/pod/a", "culvert ready");
        process("20", "/pod/b", "/usr/local/bin/culvert agent --config x");
        process("21", "/pod/a", "culvert ca");
        process("22", "/pod/a", "sh -c culvert agent");
        let none = Process::beside(root.path()).expect_err("no agent is beside us").to_string();
        assert!(none.contains("/pod/a") && none.contains("--pid"), "{none}");
        process("30", "/pod/a", "/usr/local/bin/culvert agent --config x");
        let (pid, found) = Process::beside(root.path()).expect("the agent");
        assert_eq!((pid, found.pid, found.started), (30, 1, 4711));
        process("31", "/pod/a", "culvert agent");
        let two = Process::beside(root.path()).expect_err("which of them?").to_string();
        assert!(two.contains("--pid"), "{two}");
    }
}
