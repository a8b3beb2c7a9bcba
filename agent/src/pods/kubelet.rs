//! Which cgroup is the kubelet's: connections from it are probes ([K.5]).
//!
//! What follows for a connection is decided in the kernel; when to look again is `tree`'s.

use std::{
    io,
    path::{Path, PathBuf},
};

use super::cgroup::{CgroupDir, Hierarchy, children, is_kubepods, is_populated};

/// Where kubelets live, below the cgroup root, most usual first. The first that has a process is taken, else the first
/// that exists.
pub const USUAL: [&str; 7] = [
    // As a systemd service, which is most distributions; then with a slice of its own, as kind has it; then in a slice
    // that is reserved for the container runtime and the kubelet.
    "system.slice/kubelet.service",
    "kubelet.slice/kubelet.service",
    "podruntime.slice/kubelet.service",
    "runtime.slice/kubelet.service",
    // Without systemd.
    "podruntime/kubelet",
    "runtime/kubelet",
    "kubelet",
];

/// Services that run the kubelet and others in one cgroup, below the cgroup root.
pub const SHARED: [&str; 8] = [
    "system.slice/k3s.service",
    "system.slice/k3s-agent.service",
    "system.slice/rke2-server.service",
    "system.slice/rke2-agent.service",
    "system.slice/k0scontroller.service",
    "system.slice/k0sworker.service",
    "system.slice/snap.microk8s.daemon-kubelite.service",
    "k3s",
];

/// What is known of the kubelet's cgroup.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kubelet {
    /// This is it. The kernel finds it also where [`CgroupDir::level`] is not known.
    Known(CgroupDir),
    /// There is none at present: the kubelet is being restarted, or lives somewhere else than expected. The reason says
    /// where it was looked for.
    Absent(String),
    /// It cannot be told apart from others, now or later: the fall-back of [K.5]. With the reason.
    Indistinct(String),
}

/// The directories that may be the kubelet's, in order.
///
/// An override is a path in the file system if it lies below the cgroup mount, else one below the cgroup root, as
/// `/proc/PID/cgroup` shows it.
pub(super) fn candidates(cgroup_root: &Path, mount: &Path, chosen: Option<&Path>) -> Vec<PathBuf> {
    match chosen {
        Some(path) if path.starts_with(mount) => vec![path.to_owned()],
        Some(path) => vec![cgroup_root.join(path.strip_prefix("/").unwrap_or(path))],
        None => USUAL.iter().map(|path| cgroup_root.join(path)).collect(),
    }
}

/// Services that make the kubelet indistinct, if no kubelet of its own is there.
pub(super) fn shared(cgroup_root: &Path, chosen: Option<&Path>) -> Vec<PathBuf> {
    if chosen.is_some() {
        return Vec::new();
    }
    SHARED.iter().map(|path| cgroup_root.join(path)).collect()
}

/// Looks for the kubelet's cgroup below `cgroup_root`: `chosen` if the operator chose one, else as [`USUAL`] and
/// [`SHARED`] list.
///
/// # Errors
/// The system could not tell, for want of descriptors or memory: what was found before is as good as ever.
pub fn find_kubelet(hierarchy: &Hierarchy, cgroup_root: &Path, chosen: Option<&Path>) -> io::Result<Kubelet> {
    let candidates = candidates(cgroup_root, &hierarchy.mount, chosen);
    let mut refused = None;
    let mut ordered: Vec<(&PathBuf, bool)> = Vec::new();
    for path in &candidates {
        ordered.extend(is_populated(path)?.map(|populated| (path, populated)));
    }
    // Those with a process first; a stable sort keeps the order otherwise.
    ordered.sort_by_key(|(_, populated)| !populated);
    for (path, _) in ordered {
        if let Some(pods) = pods_below(path)? {
            // To take it would exempt every pod from policy.
            refused = Some(format!(
                "{} is not only the kubelet's: it contains the pods in {}",
                path.display(),
                pods.display()
            ));
            continue;
        }
        let Some(dir) = hierarchy.dir(path) else { continue };
        return Ok(Kubelet::Known(dir));
    }
    for path in shared(cgroup_root, chosen) {
        if is_populated(&path)? == Some(true) {
            return Ok(Kubelet::Indistinct(format!(
                "{} runs the kubelet and other programs in one cgroup",
                path.display()
            )));
        }
    }
    if let Some(reason) = refused {
        return Ok(Kubelet::Indistinct(reason));
    }
    let looked: Vec<String> = candidates.iter().map(|path| path.display().to_string()).collect();
    Ok(Kubelet::Absent(format!("no kubelet's cgroup at {}: set kubelet-cgroup if it is elsewhere", looked.join(", "))))
}

/// The common parent of pods in a directory or below it, if there is one.
fn pods_below(dir: &Path) -> io::Result<Option<PathBuf>> {
    let mut pending = vec![(dir.to_owned(), 0)];
    while let Some((dir, depth)) = pending.pop() {
        for name in children(&dir)? {
            let below = dir.join(&name);
            if is_kubepods(&name) {
                return Ok(Some(below));
            }
            if depth < super::SEARCH_DEPTH {
                pending.push((below, depth + 1));
            }
        }
    }
    Ok(None)
}
