//! Control groups as a kubelet lays them out: systemd slices with containerd's scopes on node a, plain directories
//! (the cgroupfs driver) on node b. The node's directory stands for the root of that node's own tree.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::plan::Node;

/// Where cgroup2 is mounted: alone, or beside version 1.
///
/// # Errors
/// It is not mounted anywhere.
pub fn mount() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").context("read /proc/self/mounts")?;
    mounts
        .lines()
        .filter_map(|line| {
            let mut words = line.split(' ').skip(1);
            Some((words.next()?, words.next()?))
        })
        .find(|&(_, kind)| kind == "cgroup2")
        .map(|(path, _)| PathBuf::from(path))
        .context("cgroup2 is not mounted: mount it with `mount -t cgroup2 none /sys/fs/cgroup`")
}

/// The control groups of one pod's containers.
pub(super) fn container(node_root: &Path, node: Node, pod_uid: &str, container_id: &str) -> PathBuf {
    pod(node_root, node, pod_uid).join(match node {
        Node::A => format!("cri-containerd-{container_id}.scope"),
        Node::B => container_id.to_owned(),
    })
}

/// The control group of a pod.
pub(super) fn pod(node_root: &Path, node: Node, pod_uid: &str) -> PathBuf {
    match node {
        Node::A => node_root
            .join("kubepods.slice/kubepods-burstable.slice")
            .join(format!("kubepods-burstable-pod{}.slice", pod_uid.replace('-', "_"))),
        Node::B => node_root.join("kubepods/besteffort").join(format!("pod{pod_uid}")),
    }
}

/// The kubelet's control group.
pub(super) fn kubelet(node_root: &Path, node: Node) -> PathBuf {
    match node {
        Node::A => node_root.join("system.slice/kubelet.service"),
        Node::B => node_root.join("kubelet"),
    }
}

/// The control group of something else that runs on the node itself, as systemd would start it.
pub(super) fn service(node_root: &Path, name: &str) -> PathBuf {
    node_root.join("system.slice").join(format!("{name}.service"))
}

pub(super) fn make(path: &Path) -> Result<()> {
    fs::create_dir_all(path).with_context(|| format!("create the control group {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layouts_are_a_kubelets() {
        let uid = "0a1b2c3d-0001-4002-8003-0123456789ab";
        assert_eq!(
            container(Path::new("/c"), Node::A, uid, "ff"),
            Path::new(
                "/c/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod0a1b2c3d_0001_4002_8003_0123456789ab.slice/cri-containerd-ff.scope"
            )
        );
        assert_eq!(
            container(Path::new("/c"), Node::B, uid, "ff"),
            Path::new("/c/kubepods/besteffort/pod0a1b2c3d-0001-4002-8003-0123456789ab/ff")
        );
    }
}
