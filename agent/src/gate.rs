//! Which pods the gate in the kernel lets through, and which it holds, and why ([K.4]).
//!
//! A pod is let through as soon as it is known to be outside the mesh, which takes its manifest and nothing else, or once it
//! is in. The kernel's part is `datapath`'s; bringing pods in is `enroll`'s.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use culvert_common::gate::Class;
use tracing::{error, info, warn};

use crate::{
    datapath::Datapath,
    model::PodUid,
    pods::{self, CgroupId, PodNetwork},
    policy::Snapshot,
};

/// A pod that is held for longer is told: what is shorter is the time that it takes to bring one in, or to see that it is in
/// the node's own network ([`pods::HOST_AFTER`]).
const TELL_AFTER: Duration = Duration::from_secs(4);
/// How often it is told.
const TELL_AGAIN: Duration = Duration::from_secs(10);
/// How many pods are named each time.
const NAMED: usize = 16;

/// What the gate is told, and what follows from it.
#[derive(Debug, Default)]
pub struct Gate {
    /// The agent's own cgroup, once it was looked for: it enters before its first socket in a pod.
    own: Option<BTreeSet<CgroupId>>,
    held: BTreeMap<PodUid, Held>,
    told: Option<Instant>,
    failure: Option<String>,
}

#[derive(Debug)]
struct Held {
    name: String,
    why: String,
    since: Instant,
}

impl Gate {
    /// Before pods are brought in and out: lets those through that are outside the mesh, so that one which leaves it is not
    /// held in between.
    pub fn let_out(&mut self, datapath: &mut Datapath, snapshot: &Snapshot, node: &pods::Node) {
        let own = self.own.get_or_insert_with(|| node.own_dirs().into_iter().collect());
        let out = |uid: &PodUid| snapshot.workload(uid).is_some_and(|workload| !workload.enrollment.enrolled);
        let mut result = Ok(());
        for (id, uid) in &node.dirs {
            if own.contains(id) || out(uid) {
                result = result.and(datapath.classify_one(*id, Class::Out));
            }
        }
        self.tell_failure(result);
    }

    /// Afterwards: lets those through that are in (`enrolled`), and holds all others. `failures` says why some are not in.
    pub fn settle(
        &mut self,
        datapath: &mut Datapath,
        snapshot: &Snapshot,
        node: &pods::Node,
        enrolled: impl Fn(&PodUid) -> bool,
        failures: &BTreeMap<PodUid, String>,
    ) {
        let mut classes = BTreeMap::new();
        let mut why = BTreeMap::new();
        for (id, uid) in &node.dirs {
            if self.own.as_ref().is_some_and(|own| own.contains(id)) {
                classes.insert(*id, Class::Out);
                continue;
            }
            if enrolled(uid) {
                classes.insert(*id, Class::In);
                continue;
            }
            let workload = snapshot.workload(uid);
            let reason = match workload {
                Some(workload) if !workload.enrollment.enrolled => {
                    classes.insert(*id, Class::Out);
                    continue;
                }
                // One that has only vanished from the source stays what it was, for the next agent too.
                None if datapath.class(*id) == Class::Out => {
                    classes.insert(*id, Class::Out);
                    continue;
                }
                None => "no manifest describes it",
                Some(workload) if workload.ips.is_empty() => "its manifest has no address yet",
                Some(_) => failures.get(uid).map_or("it is not enrolled yet", String::as_str),
            };
            let name = workload.map_or_else(|| uid.to_string(), |workload| workload.object.to_string());
            // A directory without a process holds nobody, and what is in the node's own network passes.
            if node.pods.get(uid).is_some_and(|pod| pod.cgroup.id == *id && pod.network != PodNetwork::Host) {
                why.insert(uid.clone(), (name, reason.to_owned()));
            }
        }
        let result = datapath.classify(&classes);
        self.tell_failure(result);
        let now = Instant::now();
        let mut before = std::mem::take(&mut self.held);
        self.held = why
            .into_iter()
            .map(|(uid, (name, why))| {
                let since = before.remove(&uid).map_or(now, |held| held.since);
                (uid, Held { name, why, since })
            })
            .collect();
    }

    /// How many pods with processes of their own are held.
    pub fn held(&self) -> usize {
        self.held.len()
    }

    /// Says which pods are held, and why, every ten seconds while there are any.
    pub fn tell(&mut self) {
        let long: Vec<&Held> = self.held.values().filter(|held| held.since.elapsed() >= TELL_AFTER).collect();
        if long.is_empty() {
            if self.told.take().is_some() {
                info!("no pod is held at the gate any more");
            }
            return;
        }
        if self.told.is_some_and(|at| at.elapsed() < TELL_AGAIN) {
            return;
        }
        let mut named: Vec<String> =
            long.iter().take(NAMED).map(|held| format!("{}: {}", held.name, held.why)).collect();
        if long.len() > NAMED {
            named.push(format!("and {} more", long.len() - NAMED));
        }
        warn!(
            held = long.len(),
            pods = named.join("; "),
            "pods are held at the gate: they can neither connect nor be connected to until they are known (--gate=open lets \
             them pass)"
        );
        self.told = Some(Instant::now());
    }

    fn tell_failure(&mut self, result: anyhow::Result<()>) {
        let failure = result.err().map(|error| format!("{error:#}"));
        if let Some(error) = &failure
            && self.failure.as_ref() != Some(error)
        {
            error!(error, "the gate could not be told of every pod: those stay held");
        }
        self.failure = failure;
    }
}
