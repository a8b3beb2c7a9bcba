//! Where programs and maps are to be pinned: on a bpffs of the node's, and writable for this process. Tried with a directory
//! and a map, which are removed.

use std::{
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use nix::sys::{stat, statfs};

use super::{Finding, process::Process};
use crate::datapath::probe;

const CHECK: &str = "bpffs";

pub(super) fn look(pin_dir: &Path, process: &Process, in_pod: bool) -> Finding {
    let mount = match in_pod {
        true => "mount the node's by hostPath /sys/fs/bpf with type: Directory, and give --pin-dir a directory of it",
        false => "mount -t bpf bpf /sys/fs/bpf, and give --pin-dir a directory of it",
    };
    let Some(dir) = existing(pin_dir) else {
        return Finding::fail(CHECK, format!("{} is not an absolute path", pin_dir.display()), mount);
    };
    match statfs::statfs(&dir) {
        Ok(of) if of.filesystem_type() == statfs::BPF_FS_MAGIC => {}
        Ok(_) => return Finding::fail(CHECK, format!("{} is not on a bpffs", pin_dir.display()), mount),
        Err(error) => return Finding::fail(CHECK, format!("look at {}: {error}", dir.display()), mount),
    }
    let node = in_pod.then(|| fs::read_to_string("/proc/1/mountinfo").ok()).flatten();
    if let Some(mounts) = node
        && let Ok(here) = fs::metadata(&dir)
        && !is_mounted(&mounts, here.dev())
    {
        let found = format!("{} is on a bpffs of this container's own: what is pinned goes with it", dir.display());
        return Finding::fail(CHECK, found, mount);
    }
    match pin(&dir) {
        Ok(()) => Finding::ok(CHECK, format!("{} can be written", dir.display())),
        Err((what, error)) => {
            Finding::fail(CHECK, format!("{what} in {}: {error}", dir.display()), remedy(&error, process, in_pod))
        }
    }
}

/// The directory, or the nearest one above it that there is.
fn existing(pin_dir: &Path) -> Option<PathBuf> {
    pin_dir.ancestors().find(|dir| dir.is_absolute() && dir.is_dir()).map(Path::to_owned)
}

/// Whether a file system of type bpf with this device is among mounts, in the format of proc_pid_mountinfo(5).
fn is_mounted(mounts: &str, device: u64) -> bool {
    let number = format!("{}:{}", stat::major(device), stat::minor(device));
    mounts.lines().any(|line| {
        let mut fields = line.split(' ');
        fields.nth(2) == Some(&number) && fields.skip_while(|field| *field != "-").nth(1) == Some("bpf")
    })
}

fn pin(dir: &Path) -> Result<(), (&'static str, io::Error)> {
    let dir = dir.join(format!("culvert_preflight_{}", std::process::id()));
    let pinned = dir.join("map");
    fs::create_dir(&dir).map_err(|error| ("make a directory", error))?;
    let made = probe::pin(&pinned).map_err(|error| ("pin a map", error));
    let removed = probe::clean(&dir, &pinned).map_err(|error| ("remove what was tried", error));
    made.and(removed)
}

fn remedy(error: &io::Error, process: &Process, in_pod: bool) -> String {
    match error.raw_os_error() {
        Some(libc::EROFS) if in_pod => "mount it without readOnly".to_owned(),
        Some(libc::EROFS) => "mount it for writing: mount -o remount,rw /sys/fs/bpf".to_owned(),
        Some(libc::EACCES | libc::EPERM) if !process.may_bpf() => "see capabilities".to_owned(),
        Some(libc::EACCES | libc::EPERM) => match process.profile() {
            Some(profile) => format!(
                "AppArmor's profile {profile} denies it: set securityContext.appArmorProfile to {{type: Unconfined}}, or to one \
                 that allows writes below /sys/fs/bpf"
            ),
            None => {
                "run as root (runAsUser: 0), and see that no security module denies it: AppArmor (appArmorProfile: \
                     {type: Unconfined}) or SELinux (seLinuxOptions: {type: spc_t})"
                    .to_owned()
            }
        },
        Some(libc::EEXIST) => {
            "another preflight of this number is at it, or was killed: remove the directory".to_owned()
        }
        _ => "see that this process may write there".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::{super::Status, *};

    #[test]
    fn what_is_pinned_in_a_container_must_be_the_nodes() {
        let mounts =
            "42 23 0:39 / /sys/fs/bpf rw,relatime shared:9 - bpf bpf rw\n43 23 0:40 / /run rw - tmpfs tmpfs rw\n";
        assert!(is_mounted(mounts, stat::makedev(0, 39)));
        assert!(!is_mounted(mounts, stat::makedev(0, 40)), "no bpffs");
        assert!(!is_mounted(mounts, stat::makedev(0, 41)), "not there");
        assert!(!is_mounted("garbage\n\n", stat::makedev(0, 39)));
    }

    #[test]
    fn a_denial_names_who_denies() {
        let denied = io::Error::from_raw_os_error(libc::EACCES);
        let none = Process::default();
        assert_eq!(remedy(&denied, &none, true), "see capabilities");
        let root = Process::confined("cri-containerd.apparmor.d (enforce)");
        let by_profile = remedy(&denied, &root, true);
        assert!(
            by_profile.contains("cri-containerd.apparmor.d") && by_profile.contains("appArmorProfile"),
            "{by_profile}"
        );
        assert!(remedy(&denied, &Process::confined("unconfined"), true).contains("spc_t"));
        assert!(remedy(&io::Error::from_raw_os_error(libc::EROFS), &root, true).contains("readOnly"));
    }

    #[test]
    fn another_file_system_is_refused_and_nothing_stays_on_a_bpffs() {
        let root = Process::this();
        let finding = look(Path::new("/tmp/culvert/x"), &root, false);
        assert!(finding.status == Status::Fail && finding.remedy.contains("mount -t bpf"), "{finding:?}");
        let all = || fs::read_dir("/sys/fs/bpf").expect("a bpffs").map(|entry| entry.expect("one").file_name());
        let ours = || all().filter(|name| name.to_string_lossy().starts_with("culvert_preflight_")).count();
        let before = ours();
        let finding = look(Path::new("/sys/fs/bpf/nothing/there"), &root, false);
        assert_eq!((finding.status, ours()), (Status::Ok, before), "{finding:?}");
    }
}
