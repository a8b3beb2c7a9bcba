//! Where the node's pods are: the cgroup2 file system, and how deep this process sees into it.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::Context as _;

use super::Finding;
use crate::pods::{Hierarchy, SEARCH_DEPTH, find_cgroup2_mount, find_roots};

const CHECK: &str = "cgroup";

/// Where the agent would attach its programs.
#[derive(Clone, Debug)]
pub(super) struct Places {
    /// The cgroup root.
    pub(super) root: PathBuf,
    /// The common parents of pods, below it.
    pub(super) pods: Vec<PathBuf>,
    /// The mount that they belong to.
    pub(super) mount: PathBuf,
}

/// `None` if there is nowhere to attach anything.
pub(super) fn look(chosen: Option<&Path>, in_pod: bool) -> (Finding, Option<Places>) {
    let remedy = match in_pod {
        true => "mount the node's by hostPath /sys/fs/cgroup with type: Directory, and no directory below it",
        false => "give --cgroup-root a directory of the node's cgroup2 file system",
    };
    match places(chosen) {
        Ok((places, level)) => {
            let text = fs::read_to_string("/proc/thread-self/cgroup").unwrap_or_default();
            (judge(&places, level, is_hybrid(&text), in_pod, remedy), Some(places))
        }
        Err(error) => (Finding::fail(CHECK, format!("{error:#}"), remedy), None),
    }
}

/// With the depth at which the root lies.
fn places(chosen: Option<&Path>) -> anyhow::Result<(Places, Option<u32>)> {
    let root = match chosen {
        Some(path) => path.to_owned(),
        None => find_cgroup2_mount()?,
    };
    let root = fs::canonicalize(&root).with_context(|| format!("cgroup root {}", root.display()))?;
    let hierarchy = Hierarchy::of(&root)?;
    let level = hierarchy.level(&root);
    let pods = find_roots(&root).with_context(|| format!("look for pods below {}", root.display()))?;
    Ok((Places { root, pods, mount: hierarchy.mount }, level))
}

fn judge(places: &Places, level: Option<u32>, hybrid: bool, in_pod: bool, remedy: &str) -> Finding {
    let root = places.root.display();
    let kind = if hybrid { "beside version 1" } else { "pure" };
    let depth = match level {
        Some(level) => format!("level {level}"),
        None => "at a level that a cgroup namespace hides".to_owned(),
    };
    match (places.pods.first(), in_pod) {
        (Some(first), _) => {
            let more = match places.pods.len() - 1 {
                0 => String::new(),
                more => format!(", and at {more} more places"),
            };
            let below = first.strip_prefix(&places.root).unwrap_or(first).display();
            Finding::ok(CHECK, format!("{root} ({kind}, {depth}); pods are in {below}{more}"))
        }
        // The kubelet makes their parent when it starts, which may be after the agent.
        (None, false) => Finding::ok(CHECK, format!("{root} ({kind}, {depth}); there are no pods yet")),
        // This is one of them.
        (None, true) => Finding::fail(
            CHECK,
            format!(
                "{root} ({kind}, {depth}) has no pods, up to {SEARCH_DEPTH} directories below it: it is this container's own \
                 view, or not where the kubelet puts pods"
            ),
            remedy,
        ),
    }
}

/// Whether processes are in cgroups of version 1 too, by the format of cgroups(7).
fn is_hybrid(text: &str) -> bool {
    text.lines().any(|line| !line.starts_with("0::"))
}

#[cfg(test)]
mod tests {
    use super::{super::Status, *};

    #[test]
    fn a_containers_private_view_is_told_from_a_node_without_pods() {
        let places = |pods: &[&str]| Places {
            root: "/sys/fs/cgroup".into(),
            pods: pods.iter().map(Into::into).collect(),
            mount: "/sys/fs/cgroup".into(),
        };
        let (none, some) = (places(&[]), places(&["/sys/fs/cgroup/kubepods.slice"]));
        assert_eq!(judge(&some, None, false, true, "mount").status, Status::Ok);
        assert_eq!(judge(&none, Some(0), false, false, "mount").status, Status::Ok, "the kubelet may come later");
        let private = judge(&none, None, false, true, "mount");
        assert_eq!((private.status, &*private.remedy), (Status::Fail, "mount"));
        assert!(is_hybrid("2:cpu:/\n0::/a\n") && !is_hybrid("0::/a\n") && !is_hybrid(""));
    }

    #[test]
    fn a_directory_that_is_no_cgroup_is_refused_with_the_remedy() {
        for (path, in_pod, word) in [("/tmp", false, "--cgroup-root"), ("/nothing", true, "hostPath")] {
            let (finding, places) = look(Some(Path::new(path)), in_pod);
            assert!(finding.status == Status::Fail && finding.found.contains(path), "{finding:?}");
            assert!(finding.remedy.contains(word) && places.is_none(), "{finding:?}");
        }
    }
}
