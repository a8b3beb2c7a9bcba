//! Whose programs are at the cgroups where the agent attaches its own: they run beside it, or keep it away.
//!
//! Programs of several cgroups run from the leaf upwards. What is at the devices of single pods is not looked at here.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
};

use super::{Finding, Status, cgroup::Places};
use crate::datapath::probe::{self, Hook, Place, Sharing};

const CHECK: &str = "hooks";

/// What names of programs begin with that other meshes attach.
const MESHES: [(&str, &str); 6] = [
    ("istio", "Istio"),
    ("kmesh", "Kmesh"),
    // Kmesh's own names, cut to 15 bytes.
    ("cgroup_connect", "Kmesh"),
    ("sockops_prog", "Kmesh"),
    ("mb_", "Merbridge"),
    ("linkerd", "Linkerd"),
];
/// Cilium's socket load balancer: `cil_sock4_connect` and its like.
const CILIUM: &str = "cil_";
const CILIUM_REMEDY: &str =
    "see that Cilium has socketLB.hostNamespaceOnly=true, so that services of pods are translated in one place only";

/// What one hook of one cgroup means for the agent.
struct Said {
    status: Status,
    found: String,
    remedy: String,
}

pub(super) fn look(places: &Places, pin_dir: &Path) -> Finding {
    let own = probe::own(pin_dir);
    let targets = [(&places.root, Place::Root)].into_iter().chain(places.pods.iter().map(|pods| (pods, Place::Pods)));
    let mut said = Vec::new();
    for (target, place) in targets {
        let above = target.ancestors().take_while(|cgroup| cgroup.starts_with(&places.mount)).map(Path::to_owned);
        let found: Result<Vec<(PathBuf, Vec<Hook>)>, _> = above
            .map(|cgroup| Ok((cgroup.clone(), probe::hooks(&cgroup, place).map_err(|error| (cgroup, error))?)))
            .collect();
        match found {
            Ok(found) => said.extend(judge(&found, &own)),
            Err((cgroup, error)) => {
                let found = format!("programs at {} cannot be listed: {error}", cgroup.display());
                let remedy = "see that this process has CAP_NET_ADMIN, and that it is a cgroup2 file system";
                return Finding::fail(CHECK, found, remedy);
            }
        }
    }
    sum(said)
}

/// `all` are the cgroup that the agent attaches its programs to, and those above it, with what is there.
fn judge(all: &[(PathBuf, Vec<Hook>)], own: &BTreeSet<u32>) -> Vec<Said> {
    let Some((_, hooks)) = all.first() else { return Vec::new() };
    let hooks: Vec<&'static str> = hooks.iter().map(|hook| hook.name).collect();
    let mut said = Vec::new();
    for name in hooks {
        for (depth, (cgroup, hooks)) in all.iter().enumerate() {
            let Some(hook) = hooks.iter().find(|hook| hook.name == name && !hook.programs.is_empty()) else { continue };
            said.extend(hook.programs.iter().filter(|program| !own.contains(&program.id)).filter_map(|program| {
                let name = if program.name.is_empty() { "without a name" } else { &program.name };
                let found = format!("{name} ({}) at {} of {}", program.id, hook.name, cgroup.display());
                refusal(hook.sharing, depth, &found).or_else(|| beside(&program.name, hook.name, depth, found))
            }));
            // The kernel asks no further than the next cgroup above that has one.
            if depth > 0 && hook.sharing != Sharing::Multi {
                break;
            }
        }
    }
    said
}

/// What keeps the agent's program away, or is kept away by it.
fn refusal(sharing: Sharing, depth: usize, found: &str) -> Option<Said> {
    let remedy = || "have its owner attach it by a link, or with BPF_F_ALLOW_MULTI".to_owned();
    let failed = |why| Some(Said { status: Status::Fail, found: format!("{found} {why}"), remedy: remedy() });
    match (sharing, depth) {
        (Sharing::Multi, _) => None,
        (Sharing::Override | Sharing::Exclusive, 0) => failed("lets no other program beside it"),
        (Sharing::Exclusive, _) => failed("lets no program below it"),
        (Sharing::Override, _) => Some(Said {
            status: Status::Warn,
            found: format!("{found} no longer runs for pods once the agent's does"),
            remedy: remedy(),
        }),
    }
}

/// What it means that a program runs beside the agent's.
fn beside(program: &str, hook: &str, depth: usize, found: String) -> Option<Said> {
    if let Some((_, mesh)) = MESHES.iter().find(|(start, _)| program.starts_with(start)) {
        let remedy = format!("take {mesh} off this node: pods that both enroll are captured twice");
        return Some(Said { status: Status::Warn, found, remedy });
    }
    let redirects = hook.starts_with("connect") || hook.starts_with("sendmsg");
    if program.starts_with(CILIUM) {
        // One further up runs after the agent's, and finds nothing of a service any more.
        let status = if depth == 0 && redirects { Status::Warn } else { Status::Ok };
        let remedy = if status == Status::Warn { CILIUM_REMEDY } else { "" };
        return Some(Said { status, found, remedy: remedy.to_owned() });
    }
    redirects.then(|| Said {
        status: Status::Warn,
        found,
        remedy: "find its owner: it may send connections elsewhere before the agent sees them, or after".to_owned(),
    })
}

/// The worst of them, with everything that is as bad; a program at many hooks has the same remedy at each.
fn sum(said: Vec<Said>) -> Finding {
    let status = said.iter().map(|one| one.status).max().unwrap_or(Status::Ok);
    let mut found: Vec<String> = Vec::new();
    let mut remedies: Vec<String> = Vec::new();
    for one in said.into_iter().filter(|one| one.status == status) {
        if !found.contains(&one.found) {
            found.push(one.found);
        }
        if !one.remedy.is_empty() && !remedies.contains(&one.remedy) {
            remedies.push(one.remedy);
        }
    }
    if found.is_empty() {
        found.push("nobody else's programs are in the way".to_owned());
    }
    Finding { check: CHECK, status, found: found.join(", "), remedy: remedies.join("; ") }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::{datapath::probe::Program, pods::find_cgroup2_mount};

    fn hook(name: &'static str, sharing: Sharing, programs: &[(u32, &str)]) -> Hook {
        let programs = programs.iter().map(|(id, name)| Program { id: *id, name: (*name).to_owned() }).collect();
        Hook { name, sharing, programs }
    }

    /// A cgroup, and the one above it.
    fn two(below: Hook, above: Hook) -> Finding {
        sum(judge(&[("/c/pods".into(), vec![below]), ("/c".into(), vec![above])], &BTreeSet::from([7])))
    }

    #[test]
    fn programs_of_others_are_told_by_what_they_do_to_ours() {
        let none = || hook("connect4", Sharing::Multi, &[]);
        let cilium = || hook("connect4", Sharing::Multi, &[(1, "cil_sock4_conne")]);
        let ours = || hook("connect4", Sharing::Multi, &[(7, "connect4")]);
        for (below, above, status, word) in [
            (none(), none(), Status::Ok, "nobody"),
            (ours(), ours(), Status::Ok, "nobody"),
            (ours(), cilium(), Status::Ok, "cil_sock4_conne (1) at connect4 of /c"),
            (cilium(), none(), Status::Warn, "socketLB.hostNamespaceOnly"),
            (hook("connect4", Sharing::Multi, &[(2, "mb_sock4_connec")]), none(), Status::Warn, "Merbridge"),
            (none(), hook("connect4", Sharing::Multi, &[(2, "something")]), Status::Warn, "owner"),
            (hook("ingress", Sharing::Multi, &[(3, "sd_fw_ingress")]), none(), Status::Ok, "nobody"),
            (hook("connect4", Sharing::Override, &[(4, "")]), none(), Status::Fail, "without a name"),
            (none(), hook("connect4", Sharing::Exclusive, &[(4, "old")]), Status::Fail, "no program below"),
            (none(), hook("connect4", Sharing::Override, &[(4, "old")]), Status::Warn, "no longer runs"),
            // Where ours is, there is room.
            (hook("connect4", Sharing::Multi, &[(7, "connect4"), (8, "connect4")]), none(), Status::Warn, "(8)"),
        ] {
            let finding = two(below, above);
            assert_eq!(finding.status, status, "{finding:?}");
            assert!(format!("{} {}", finding.found, finding.remedy).contains(word), "{word}: {finding:?}");
        }
    }

    /// What tools attached before there were links lets nobody beside it, which only shows in the attempt otherwise.
    #[test]
    fn a_program_that_shares_with_nobody_is_found_at_the_cgroup_and_above_it() {
        let mount = find_cgroup2_mount().expect("cgroup2 is mounted");
        let root = mount.join(format!("culvert-preflight-{}", std::process::id()));
        let pods = root.join("kubepods");
        fs::create_dir_all(&pods).expect("as root");
        let places = |root: &Path| Places { root: root.to_owned(), pods: Vec::new(), mount: mount.clone() };
        let look = |root: &Path| look(&places(root), Path::new("/sys/fs/bpf/none"));
        let file = fs::File::open(&root).expect("just made");
        let attached = probe::attach_exclusively(&file).expect("attached");
        let (at, below) = (look(&root), look(&pods));
        drop(attached);
        let after = look(&root);
        fs::remove_dir(&pods).and_then(|()| fs::remove_dir(&root)).expect("removed");
        assert!(at.status == Status::Fail && at.found.contains("culvert_probe"), "{at:?}");
        assert!(below.status == Status::Fail && below.found.contains("no program below it"), "{below:?}");
        assert!(after.status != Status::Fail, "{after:?}");
    }
}
