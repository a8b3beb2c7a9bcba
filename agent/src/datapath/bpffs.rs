//! The BPF file system that the pins are in: mounted where nobody has, and taken away again.
//!
//! Every distribution's init mounts one at `/sys/fs/bpf`; that of a container which stands for a node, as kind's do, has none.
//! One that this program has mounted is told from others by its source, which the kernel shows in the list of mounts.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail, ensure};
use nix::{
    errno::Errno,
    mount::{MntFlags, MsFlags, mount, umount2},
    sys::statfs::{BPF_FS_MAGIC, statfs},
};

/// The source of what [`prepare`] mounts.
const SOURCE: &str = "culvert";
/// What the kernel itself puts into each that is mounted (CONFIG_BPF_PRELOAD).
const PRELOADED: [&str; 2] = ["maps.debug", "progs.debug"];
/// As systemd mounts it: for nobody but root.
const OPTIONS: &str = "mode=0700";

/// What [`prepare`] found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Prepared {
    /// There is one that holds the pin directory, or is to.
    There(PathBuf),
    /// There was none, and one is mounted at this directory now.
    Mounted(PathBuf),
}

/// What [`unmount`] found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Unmounted {
    /// What [`prepare`] had mounted is gone.
    Done(PathBuf),
    /// [`prepare`] has mounted nothing there: whatever is there is somebody else's.
    Foreign(PathBuf),
    /// Something is pinned there still, by this name.
    InUse(PathBuf, String),
}

/// Mounts a bpffs at the parent of a pin directory, unless one is there.
///
/// # Errors
/// There is no such directory, or the kernel refused: no CAP_SYS_ADMIN.
pub fn prepare(pin_dir: &Path) -> anyhow::Result<Prepared> {
    let there = pin_dir.ancestors().find(|dir| dir.exists()).unwrap_or(Path::new("/"));
    if holds(there)? {
        return Ok(Prepared::There(there.to_owned()));
    }
    let root = root(pin_dir)?;
    ensure!(
        root.is_dir(),
        "{} is no directory: mount sysfs at /sys, or choose another --pin-dir, whose parent is there",
        root.display()
    );
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some(SOURCE), root, Some("bpf"), flags, Some(OPTIONS)).with_context(|| {
        format!("mount a bpffs at {} (needs CAP_SYS_ADMIN; in a pod, a privileged one)", root.display())
    })?;
    Ok(Prepared::Mounted(root.to_owned()))
}

/// Takes away what [`prepare`] has mounted, if nothing is pinned in it.
///
/// # Errors
/// The kernel refused, or only this process's view of it could be taken away.
pub fn unmount(pin_dir: &Path) -> anyhow::Result<Unmounted> {
    let root = root(pin_dir)?;
    if !is_ours("self", root)? {
        return Ok(Unmounted::Foreign(root.to_owned()));
    }
    for entry in fs::read_dir(root).with_context(|| format!("list {}", root.display()))? {
        let name =
            entry.with_context(|| format!("list {}", root.display()))?.file_name().to_string_lossy().into_owned();
        if !PRELOADED.contains(&&*name) {
            return Ok(Unmounted::InUse(root.to_owned(), name));
        }
    }
    umount2(root, MntFlags::UMOUNT_NOFOLLOW).with_context(|| format!("unmount {}", root.display()))?;
    // A process that may not look there has nothing to compare with.
    if is_ours("1", root).unwrap_or(false) {
        bail!(
            "{0} is unmounted for this process alone and not on the node: give the pod the hostPath of the directory above \
             {0} with mountPropagation Bidirectional",
            root.display()
        );
    }
    Ok(Unmounted::Done(root.to_owned()))
}

/// Whether a directory is in a bpffs.
///
/// # Errors
/// It is not there, or cannot be looked at.
pub fn holds(dir: &Path) -> anyhow::Result<bool> {
    loop {
        match statfs(dir) {
            Ok(of) => return Ok(of.filesystem_type() == BPF_FS_MAGIC),
            Err(Errno::EINTR) => {}
            Err(error) => return Err(error).with_context(|| format!("look at the file system of {}", dir.display())),
        }
    }
}

fn root(pin_dir: &Path) -> anyhow::Result<&Path> {
    let parent = pin_dir.parent().filter(|parent| pin_dir.is_absolute() && *parent != Path::new("/"));
    parent.with_context(|| format!("--pin-dir {}: must be absolute, and not below / itself", pin_dir.display()))
}

/// Whether the last mount at a directory, as a process sees it, is one of [`prepare`]'s.
fn is_ours(process: &str, dir: &Path) -> anyhow::Result<bool> {
    let path = format!("/proc/{process}/mountinfo");
    let mounts = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    Ok(is_ours_in(&mounts, dir))
}

/// The same, in the format of proc_pid_mountinfo(5).
fn is_ours_in(mounts: &str, dir: &Path) -> bool {
    let at = |line: &str| -> Option<bool> {
        let (place, kind) = line.split_once(" - ")?;
        let is_there = Path::new(place.split(' ').nth(4)?) == dir;
        is_there.then(|| kind.split(' ').take(2).eq(["bpf", SOURCE]))
    };
    mounts.lines().filter_map(at).next_back().unwrap_or(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_mounted_here_is_known_by_its_source() {
        const OURS: &str = "40 25 0:33 / /sys/fs/bpf rw,nosuid shared:9 - bpf culvert rw,mode=700\n";
        const THEIRS: &str = "41 40 0:34 / /sys/fs/bpf rw - bpf bpf rw,mode=700\n";
        let dir = Path::new("/sys/fs/bpf");
        assert!(is_ours_in(OURS, dir));
        assert!(!is_ours_in(THEIRS, dir));
        assert!(!is_ours_in(&format!("{OURS}{THEIRS}"), dir), "theirs is over it");
        assert!(!is_ours_in(OURS, Path::new("/sys/fs")));
        assert!(!is_ours_in("40 25 0:33 / /sys/fs/bpf rw - tmpfs culvert rw\n", dir));
    }

    #[test]
    fn one_is_mounted_where_none_is_and_only_that_is_taken_away() {
        let dir = tempfile::tempdir().expect("a folder");
        let (root, pins) = (dir.path().join("bpf"), dir.path().join("bpf/culvert"));
        assert!(format!("{:#}", prepare(&pins).expect_err("no place")).contains("--pin-dir"));
        assert!(prepare(Path::new("culvert")).is_err(), "not absolute");
        fs::create_dir(&root).expect("made");
        assert_eq!(unmount(&pins).expect("looked at"), Unmounted::Foreign(root.clone()));
        assert_eq!(prepare(&pins).expect("mounted"), Prepared::Mounted(root.clone()));
        assert!(holds(&root).expect("there"));
        assert_eq!(prepare(&pins).expect("nothing to do"), Prepared::There(root.clone()));
        fs::create_dir(&pins).expect("made");
        assert_eq!(prepare(&pins).expect("nothing to do"), Prepared::There(pins.clone()));
        assert_eq!(unmount(&pins).expect("looked at"), Unmounted::InUse(root.clone(), "culvert".to_owned()));
        fs::remove_dir(&pins).expect("removed");
        assert_eq!(unmount(&pins).expect("unmounted"), Unmounted::Done(root.clone()));
        assert!(!holds(&root).expect("there"));
        mount(Some("bpf"), &root, Some("bpf"), MsFlags::empty(), None::<&str>).expect("somebody else's");
        let foreign = unmount(&pins);
        umount2(&root, MntFlags::empty()).expect("unmounted");
        assert_eq!(foreign.expect("looked at"), Unmounted::Foreign(root));
    }
}
