//! The cgroup2 file system: where it is mounted, how deep a directory lies, what a kubelet's names mean, who lives in
//! a directory.
//!
//! Only reads; watching is `tree`'s.

use std::{
    ffi::OsString,
    fs, io,
    os::unix::{ffi::OsStringExt, fs::MetadataExt},
    path::{Path, PathBuf},
};

use anyhow::{Context, bail};

use super::SEARCH_DEPTH;
use crate::model::PodUid;

/// Id of a cgroup, as `bpf_get_current_cgroup_id` and `bpf_get_current_ancestor_cgroup_id` return it. 64 bit, not used
/// again until reboot.
///
/// It is the inode of the directory: kernfs makes inode numbers of its node ids where `ino_t` has 64 bits, which is
/// every machine that this agent is built for. (`name_to_handle_at` gives the same number.)
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CgroupId(pub u64);

impl CgroupId {
    /// Of the directory at a path.
    ///
    /// # Errors
    /// `NotFound` if it is gone.
    pub fn of_path(path: &Path) -> io::Result<Self> {
        Ok(Self(fs::metadata(path)?.ino()))
    }
}

/// One directory of the cgroup2 tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CgroupDir {
    /// In the file system of the agent.
    pub path: PathBuf,
    /// See [`CgroupId`].
    pub id: CgroupId,
    /// Depth as `bpf_get_current_ancestor_cgroup_id` counts it: the root of the whole hierarchy is 0. `None` if a cgroup
    /// namespace hides how deep our view of the hierarchy begins.
    pub level: Option<u32>,
}

/// The mount that a directory belongs to, and how deep it begins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hierarchy {
    /// Where it is mounted.
    pub mount: PathBuf,
    /// Level of the directory that is mounted there.
    base: Option<u32>,
}

impl Hierarchy {
    /// Of a directory whose path is canonical.
    ///
    /// # Errors
    /// It is not on a cgroup2 file system.
    pub fn of(path: &Path) -> anyhow::Result<Self> {
        let mut mounts = cgroup2_mounts()?;
        mounts.retain(|mount| path.starts_with(&mount.point));
        // The innermost; of two at one place the later one, which hides the other.
        let Some(mount) = mounts.into_iter().max_by_key(|mount| mount.point.components().count()) else {
            bail!("{} is not on a cgroup2 file system: give the cgroup root a directory of one", path.display());
        };
        // Of all cgroups only the root of the hierarchy has no cgroup.events. The root field of mountinfo counts from
        // the root of our cgroup namespace, which is the hierarchy's only in the initial one.
        let base = if !mount.point.join("cgroup.events").exists() {
            Some(0)
        } else if in_initial_cgroup_namespace() {
            Some(depth(&mount.root))
        } else {
            None
        };
        Ok(Self { mount: mount.point, base })
    }

    /// See [`CgroupDir::level`].
    pub fn level(&self, path: &Path) -> Option<u32> {
        let below = path.strip_prefix(&self.mount).ok()?;
        Some(self.base? + depth(below))
    }

    /// Looks at a directory; `None` if it is gone.
    pub fn dir(&self, path: &Path) -> Option<CgroupDir> {
        Some(CgroupDir { id: CgroupId::of_path(path).ok()?, level: self.level(path), path: path.to_owned() })
    }
}

/// Where cgroup2 is mounted: `/sys/fs/cgroup`, or `/sys/fs/cgroup/unified` beside version 1 (hybrid).
///
/// # Errors
/// It is not mounted; the line says how to mount it.
pub fn find_cgroup2_mount() -> anyhow::Result<PathBuf> {
    let mounts = cgroup2_mounts()?;
    // The whole hierarchy before a bind mount of a part, the usual places before others.
    mounts
        .into_iter()
        .min_by_key(|mount| {
            (mount.root != Path::new("/"), !mount.point.starts_with("/sys/fs/cgroup"), depth(&mount.point))
        })
        .map(|mount| mount.point)
        .context("no cgroup2 file system is mounted: mount -t cgroup2 none /sys/fs/cgroup")
}

#[derive(Debug, PartialEq, Eq)]
struct Mount {
    root: PathBuf,
    point: PathBuf,
}

fn cgroup2_mounts() -> anyhow::Result<Vec<Mount>> {
    let text = fs::read("/proc/thread-self/mountinfo").context("read /proc/thread-self/mountinfo")?;
    Ok(parse_mountinfo(&text))
}

/// Mounts of type cgroup2 in the format of proc_pid_mountinfo(5).
fn parse_mountinfo(text: &[u8]) -> Vec<Mount> {
    text.split(|byte| *byte == b'\n')
        .filter_map(|line| {
            let mut fields = line.split(|byte| *byte == b' ');
            let (root, point) = (fields.nth(3)?, fields.next()?);
            // Optional fields end with a lone dash; the type follows.
            fields.find(|field| *field == b"-")?;
            (fields.next()? == b"cgroup2").then(|| Mount { root: unescape(root), point: unescape(point) })
        })
        .collect()
}

/// Undoes mountinfo's octal escapes of space, tab, newline and backslash.
fn unescape(field: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let [first, tail @ ..] = rest {
        match rest {
            [b'\\', a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', tail @ ..] => {
                bytes.push((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'));
                rest = tail;
            }
            _ => {
                bytes.push(*first);
                rest = tail;
            }
        }
    }
    OsString::from_vec(bytes).into()
}

fn depth(path: &Path) -> u32 {
    path.components().filter(|part| matches!(part, std::path::Component::Normal(_))).count() as u32
}

fn in_initial_cgroup_namespace() -> bool {
    /// `PROC_CGROUP_INIT_INO`, linux/proc_ns.h.
    const INITIAL: u64 = 0xEFFF_FFFB;
    fs::metadata("/proc/thread-self/ns/cgroup").is_ok_and(|meta| meta.ino() == INITIAL)
}

/// Whether a directory's name is that of the common parent of all pods: `kubepods`, `kubepods.slice`, and below a cgroup
/// root of the kubelet's own (as kind has it) `kubelet-kubepods.slice`.
pub(super) fn is_kubepods(name: &str) -> bool {
    name == "kubepods" || name.strip_suffix(".slice").is_some_and(is_kubepods_slice)
}

/// The common parents of pods that there are now, up to [`SEARCH_DEPTH`] directories below a cgroup.
///
/// # Errors
/// One that says nothing about what was asked: no descriptor or no memory is left.
pub fn find_roots(cgroup: &Path) -> io::Result<Vec<PathBuf>> {
    let mut roots = Vec::new();
    let mut pending = vec![(cgroup.to_owned(), 0)];
    while let Some((dir, depth)) = pending.pop() {
        for name in children(&dir)? {
            let below = dir.join(&name);
            match is_kubepods(&name) {
                true => roots.push(below),
                false if depth + 1 < SEARCH_DEPTH => pending.push((below, depth + 1)),
                false => {}
            }
        }
    }
    roots.sort();
    Ok(roots)
}

/// Whether a directory's name is that of a quality-of-service class: `burstable`, `kubepods-burstable.slice`.
pub(super) fn is_qos(name: &str) -> bool {
    matches!(name, "burstable" | "besteffort")
        || name
            .strip_suffix(".slice")
            .and_then(|rest| rest.strip_suffix("-burstable").or_else(|| rest.strip_suffix("-besteffort")))
            .is_some_and(is_kubepods_slice)
}

/// The UID in the name of a pod's directory: `pod<uid>`, or `kubepods[-burstable|-besteffort]-pod<uid>.slice` where the
/// systemd driver wrote `_` for `-`. A static pod's UID is a hash without dashes.
pub(super) fn pod_uid(name: &str) -> Option<PodUid> {
    let uid = match name.strip_suffix(".slice") {
        None => name.strip_prefix("pod")?.to_owned(),
        Some(rest) => {
            let (parent, uid) = rest.rsplit_once("-pod")?;
            let parent =
                parent.strip_suffix("-burstable").or_else(|| parent.strip_suffix("-besteffort")).unwrap_or(parent);
            if !is_kubepods_slice(parent) {
                return None;
            }
            uid.replace('_', "-")
        }
    };
    let valid =
        !uid.is_empty() && uid.len() <= 64 && uid.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
    valid.then(|| PodUid(uid.into()))
}

fn is_kubepods_slice(name: &str) -> bool {
    name == "kubepods" || name.ends_with("-kubepods")
}

/// Whether a directory in a pod's holds CRI-O's monitor of a container, which lives in the node's network namespace and
/// is no container.
pub(super) fn is_monitor(name: &str) -> bool {
    name.starts_with("crio-conmon-")
}

/// What was asked, or `None` for an error that means that it is gone, or never was what it is taken for.
///
/// # Errors
/// One that says nothing about what was asked: no descriptor or no memory is left, or the system call was cut short. To
/// take it for "gone" would take pods out of the mesh.
pub(super) fn there<T>(asked: io::Result<T>) -> io::Result<Option<T>> {
    let scarce = [libc::EMFILE, libc::ENFILE, libc::ENOMEM, libc::ENOBUFS, libc::EINTR, libc::EIO];
    match asked {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.raw_os_error().is_some_and(|code| scarce.contains(&code)) => Err(error),
        Err(_) => Ok(None),
    }
}

/// Whether any process lives in a directory or below it; `None` if the directory is gone.
///
/// # Errors
/// As [`there`]; likewise below.
pub(super) fn is_populated(dir: &Path) -> io::Result<Option<bool>> {
    let events = there(fs::read_to_string(dir.join("cgroup.events")))?;
    Ok(events.map(|events| events.lines().any(|line| line == "populated 1")))
}

/// Names of the directories in a directory; none if it is gone.
pub(super) fn children(dir: &Path) -> io::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in there(fs::read_dir(dir))?.into_iter().flatten() {
        let Some(entry) = there(entry)? else { continue };
        // A name that is not UTF-8 is not a kubelet's.
        if entry.file_type().is_ok_and(|kind| kind.is_dir())
            && let Ok(name) = entry.file_name().into_string()
        {
            names.push(name);
        }
    }
    Ok(names)
}

/// A process, and the directory that listed it.
pub(super) struct Member {
    pub(super) pid: u32,
    pub(super) dir: PathBuf,
}

/// The processes in a pod's directory and below, without monitors.
pub(super) fn members(pod: &Path) -> io::Result<Vec<Member>> {
    /// Deeper nesting is a container's own affair; its processes are counted on, not needed.
    const DEPTH: u32 = 16;
    let mut members = Vec::new();
    let mut pending = vec![(pod.to_owned(), 0)];
    while let Some((dir, depth)) = pending.pop() {
        members.extend(pids(&dir)?.into_iter().map(|pid| Member { pid, dir: dir.clone() }));
        if depth < DEPTH {
            let below = children(&dir)?.into_iter().filter(|name| depth > 0 || !is_monitor(name));
            pending.extend(below.map(|name| (dir.join(name), depth + 1)));
        }
    }
    Ok(members)
}

/// The processes of one directory. None if it is gone, or threaded: then the directory above lists them. A process of
/// another pid namespace reads as 0.
pub(super) fn pids(dir: &Path) -> io::Result<Vec<u32>> {
    let text = there(fs::read_to_string(dir.join("cgroup.procs")))?.unwrap_or_default();
    Ok(text.lines().filter_map(|line| line.parse().ok()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_both_drivers_give_the_uid() {
        let uuid = "0a1b2c3d-0011-2233-4455-66778899aabb";
        for (name, uid) in [
            ("pod0a1b2c3d-0011-2233-4455-66778899aabb", Some(uuid)),
            ("kubepods-burstable-pod0a1b2c3d_0011_2233_4455_66778899aabb.slice", Some(uuid)),
            ("kubepods-besteffort-pod0a1b2c3d_0011_2233_4455_66778899aabb.slice", Some(uuid)),
            ("kubepods-pod0a1b2c3d_0011_2233_4455_66778899aabb.slice", Some(uuid)),
            ("kubelet-kubepods-burstable-pod0a1b2c3d_0011_2233_4455_66778899aabb.slice", Some(uuid)),
            ("a-b-kubepods-pod0a1b2c3d_0011_2233_4455_66778899aabb.slice", Some(uuid)),
            // Static pods.
            ("pod9f86d081884c7d659a2feaa0c55ad015", Some("9f86d081884c7d659a2feaa0c55ad015")),
            ("kubepods-burstable-pod9f86d081884c7d659a2feaa0c55ad015.slice", Some("9f86d081884c7d659a2feaa0c55ad015")),
            ("burstable", None),
            ("kubepods-burstable.slice", None),
            ("pod", None),
            ("podruntime.slice", None),
            ("pod.mount", None),
            ("user-pod1.slice", None),
            ("kubepods-pod.slice", None),
            ("podä", None),
        ] {
            assert_eq!(pod_uid(name).as_ref().map(|uid| &*uid.0), uid, "{name}");
        }
    }

    #[test]
    fn parents_of_pods_are_known_by_name() {
        for name in ["kubepods", "kubepods.slice", "kubelet-kubepods.slice", "a-b-kubepods.slice"] {
            assert!(is_kubepods(name), "{name}");
        }
        for name in ["kubepods-burstable.slice", "kubepod", "mykubepods.slice", "kubelet.slice", "kubelet-kubepods"] {
            assert!(!is_kubepods(name), "{name}");
        }
        for name in ["burstable", "besteffort", "kubepods-burstable.slice", "kubelet-kubepods-besteffort.slice"] {
            assert!(is_qos(name), "{name}");
        }
        for name in ["guaranteed", "kubepods.slice", "system-burstable.slice", "burstable.slice"] {
            assert!(!is_qos(name), "{name}");
        }
        assert!(is_monitor("crio-conmon-0123.scope") && !is_monitor("crio-0123.scope"));
    }

    #[test]
    fn mounts_are_read_from_pure_and_hybrid_systems() {
        let pure = b"30 24 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw\n\
            31 24 0:27 / /sys rw - sysfs sysfs rw\n";
        assert_eq!(parse_mountinfo(pure), [Mount { root: "/".into(), point: "/sys/fs/cgroup".into() }]);
        let hybrid = b"31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n\
            41 31 0:38 /a\\040b /sys/fs/cgroup/uni\\134fied rw shared:1 master:2 - cgroup2 cgroup2 rw";
        assert_eq!(parse_mountinfo(hybrid), [Mount { root: "/a b".into(), point: "/sys/fs/cgroup/uni\\fied".into() }]);
        assert_eq!(parse_mountinfo(b"garbage\n\n1 2 3\n"), []);
    }

    #[test]
    fn this_machine_has_a_mount_whose_root_is_level_0() {
        let mount = find_cgroup2_mount().expect("cgroup2 is mounted");
        let hierarchy = Hierarchy::of(&mount).expect("it is one");
        assert_eq!(hierarchy.mount, mount);
        if !mount.join("cgroup.events").exists() {
            assert_eq!(hierarchy.level(&mount), Some(0));
            assert_eq!(hierarchy.level(&mount.join("a/b/c")), Some(3));
        }
        assert_eq!(hierarchy.level(Path::new("/etc")), None);
        let error = Hierarchy::of(Path::new("/etc")).expect_err("no cgroup file system").to_string();
        assert!(error.contains("/etc") && error.contains("cgroup2"), "{error}");
    }
}
