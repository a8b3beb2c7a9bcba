//! What a process has used, from `/proc`.

use std::fs;

use anyhow::{Context, Result};

/// CPU time, seconds.
#[derive(Debug, Clone, Copy, Default)]
pub struct Cpu {
    /// In the program itself.
    pub user: f64,
    /// In the kernel on its behalf, and in whatever interrupted it.
    pub system: f64,
}

impl Cpu {
    /// The sum.
    pub fn total(self) -> f64 {
        self.user + self.system
    }
}

impl std::ops::Add for Cpu {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self { user: self.user + other.user, system: self.system + other.system }
    }
}

impl std::ops::Sub for Cpu {
    type Output = Self;

    fn sub(self, other: Self) -> Self {
        Self { user: self.user - other.user, system: self.system - other.system }
    }
}

/// CPU time that a process with all its threads has used so far.
///
/// # Errors
/// There is no such process.
pub fn cpu(pid: u32) -> Result<Cpu> {
    let path = format!("/proc/{pid}/stat");
    let stat = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    // The name in parentheses may hold spaces; fields 14 and 15 of proc_pid_stat(5) follow it.
    let fields: Vec<&str> = stat.rsplit_once(") ").context("a process's state")?.1.split(' ').collect();
    let ticks = |at: usize| -> Result<f64> { Ok(fields.get(at).context("a process's times")?.parse::<u64>()? as f64) };
    let rate = ticks_per_second()?;
    Ok(Cpu { user: ticks(11)? / rate, system: ticks(12)? / rate })
}

/// Memory that a process has resident, KiB.
///
/// # Errors
/// There is no such process.
pub fn memory_kib(pid: u32) -> Result<f64> {
    let path = format!("/proc/{pid}/smaps_rollup");
    let rollup = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    let resident = rollup.lines().find_map(|line| line.strip_prefix("Rss:")).context("Rss")?;
    Ok(resident.trim().trim_end_matches(" kB").parse::<u64>()? as f64)
}

/// Time that the machine's processors have been busy, and all of their time, since boot; in ticks.
///
/// # Errors
/// The kernel would not tell.
pub fn machine() -> Result<(u64, u64)> {
    let stat = fs::read_to_string("/proc/stat").context("read /proc/stat")?;
    let first = stat.lines().next().context("an empty /proc/stat")?;
    let times: Vec<u64> = first.split_whitespace().skip(1).take(8).map(str::parse).collect::<Result<_, _>>()?;
    let total: u64 = times.iter().sum();
    // Idle, and waiting for a disk.
    let idle = times.get(3).unwrap_or(&0) + times.get(4).unwrap_or(&0);
    Ok((total - idle, total))
}

/// Time that the machine's host has given to others while this machine wanted it (steal time), since boot, summed over the
/// processors; in ticks, as [`machine`].
///
/// # Errors
/// The kernel would not tell.
pub fn stolen() -> Result<u64> {
    let stat = fs::read_to_string("/proc/stat").context("read /proc/stat")?;
    // Field 8 of "cpu" in proc_stat(5); the name is the first.
    let field = stat.lines().next().and_then(|first| first.split_whitespace().nth(8)).context("steal time")?;
    Ok(field.parse()?)
}

fn ticks_per_second() -> Result<f64> {
    // SAFETY: no pointers.
    let ticks = unsafe { libc::sysconf(libc::_SC_CLK_TCK) };
    anyhow::ensure!(ticks > 0, "the kernel does not tell its clock's ticks");
    Ok(ticks as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_that_works_has_used_time_and_memory() {
        let begun = std::time::Instant::now();
        while begun.elapsed() < std::time::Duration::from_millis(60) {
            std::hint::black_box(1);
        }
        let me = std::process::id();
        let used = cpu(me).expect("this process");
        assert!(used.total() > 0.0 && used.total() < 1000.0, "{used:?}");
        assert!(memory_kib(me).expect("this process") > 1000.0);
        let (busy, total) = machine().expect("the machine");
        assert!(busy > 0 && busy < total);
    }
}
