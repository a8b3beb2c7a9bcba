//! Brings pods in and out, in the right order, and again without harm.
//!
//! In: refuse (`prepare`), listen, hand the listeners to the workers, put the policy in force and open (`ready`). A
//! step that fails leaves the pod refused, never half open, and is tried again. Out: first the kernel's entries, then
//! the listeners; open tunnels end by themselves ([E.5]).

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    os::fd::AsFd as _,
    sync::Arc,
};

use anyhow::Context as _;
use culvert_common::ListenerKind;
use tracing::{error, info, warn};

use crate::{
    connections,
    datapath::{Datapath, NetnsCookie, Plaintext, PodPolicy},
    gate::Gate,
    limits::Limits,
    listen,
    model::{PodUid, SpiffeId},
    netns::{NetnsHandle, addresses, route},
    pods::{self, PodNetwork},
    policy::{Authorization, Snapshot, Workload},
    proxy::ServedPod,
    worker::{Command, Worker},
};

/// What is looked at where a pod's frames come into the node.
#[derive(Clone, Debug)]
pub struct Guard {
    /// The node's own network namespace: the agent's.
    pub node: Arc<NetnsHandle>,
    /// Whether anything is.
    pub veths: bool,
    /// Whether UDP is refused where a pod says nothing by its label [`UDP_LABEL`].
    pub udp_refused: bool,
    /// Pods that are not in are not held.
    pub gate_open: bool,
}

/// Policies that a warning names.
const NAMED: usize = 8;

/// The label by which a pod says whether its UDP is refused: `allow` or `refuse`.
pub const UDP_LABEL: &str = "culvert.io/udp";

/// The pods of this node that are in the mesh.
pub struct Enrollments {
    limits: Arc<Limits>,
    guard: Guard,
    enrolled: BTreeMap<PodUid, Enrolled>,
    by_cookie: BTreeMap<NetnsCookie, Arc<ServedPod>>,
    failures: BTreeMap<PodUid, String>,
    /// Pods that are not in but have an entry in the kernel, which refuses them.
    refused: BTreeMap<PodUid, NetnsCookie>,
    /// Pods that are to be in and whose addresses nobody has told yet.
    waiting: BTreeMap<PodUid, Waiting>,
    /// Pods that have left and could not be forgotten completely.
    leaving: BTreeSet<NetnsCookie>,
    gate: Gate,
}

/// Where a pod of this node stands, for people to look at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// In the mesh.
    Enrolled(NetnsCookie),
    /// To be in the mesh, and why it is not. It is refused until it is, unless the text says otherwise.
    Failed(String),
}

struct Enrolled {
    pod: Arc<ServedPod>,
    policy: PodPolicy,
    /// What [`PodPolicy::plaintext`] is made of, and more; when it changes, open connections are to be judged again.
    authorization: Authorization,
}

struct Waiting {
    workload: Arc<Workload>,
    netns: Arc<NetnsHandle>,
    /// The entry that refuses it, and the addresses that its namespace had then.
    refused: Option<(NetnsCookie, Vec<IpAddr>)>,
    /// That it could not be refused has been said.
    told: bool,
}

/// What one pass changed.
#[derive(Debug, Default)]
pub struct Changes {
    /// Brought in by this pass.
    pub entered: Vec<PodUid>,
    /// In before, and with another policy now.
    pub changed: Vec<PodUid>,
    /// Could not be brought in or changed: to be tried again.
    pub failed: usize,
    /// Could not be forgotten: to be tried again.
    pub leaving: usize,
}

impl Enrollments {
    /// None yet. Each gets its part of `limits`.
    pub fn new(limits: Arc<Limits>, guard: Guard) -> Self {
        Self {
            limits,
            guard,
            enrolled: BTreeMap::new(),
            by_cookie: BTreeMap::new(),
            failures: BTreeMap::new(),
            refused: BTreeMap::new(),
            waiting: BTreeMap::new(),
            leaving: BTreeSet::new(),
            gate: Gate::default(),
        }
    }

    /// Makes the kernel and the workers equal to what the snapshot says of the pods that are on the node.
    pub fn reconcile(
        &mut self,
        datapath: &mut Datapath,
        workers: &[Worker],
        snapshot: &Snapshot,
        node: &pods::Node,
    ) -> Changes {
        let mut changes = Changes::default();
        self.gate.let_out(datapath, snapshot, node);
        let (wanted, nameless) = wanted(snapshot, node);
        let back = |cookie: &NetnsCookie| {
            self.by_cookie.contains_key(cookie) || self.refused.values().any(|own| own == cookie)
        };
        self.leaving.retain(|cookie| !back(cookie) && datapath.remove(*cookie).is_err());
        let leaving: Vec<PodUid> =
            self.enrolled.keys().filter(|uid| self.leaves(uid, &wanted, snapshot, node)).cloned().collect();
        for uid in leaving {
            let comes_back = wanted.get(&uid).or_else(|| nameless.get(&uid)).is_some_and(|(_, netns)| {
                self.enrolled.get(&uid).is_some_and(|known| known.pod.netns.id() == netns.id())
            });
            self.leave(&uid, datapath, workers, comes_back);
        }
        let mut tables = TablesOfPods::default();
        for (uid, (workload, netns)) in &wanted {
            let same = self.enrolled.get(uid).filter(|known| known.authorization == workload.authorization);
            let plaintext = match same {
                Some(known) => known.policy.plaintext.clone(),
                None => tables.of(snapshot, workload),
            };
            let policy = PodPolicy::of(snapshot, workload, plaintext, udp_refused(workload, &self.guard));
            let known = self.enrolled.get_mut(uid);
            if let Some(known) = known
                && same_policy(&known.policy, &policy)
            {
                if known.authorization != workload.authorization {
                    known.authorization = workload.authorization.clone();
                    changes.changed.push(uid.clone());
                }
                continue;
            }
            let known = self.enrolled.get(uid);
            let result = match known.map(|known| known.pod.cookie) {
                Some(cookie) => datapath.ready(cookie, &policy).map(|()| {
                    changes.changed.push(uid.clone());
                    None
                }),
                None => enter(datapath, workers, (&self.limits, &self.guard), workload, netns, &policy).map(Some),
            };
            match result {
                Ok(entered) => {
                    self.failures.remove(uid);
                    self.refused.remove(uid);
                    if let Some(pod) = entered {
                        info!(pod = %workload.object, %uid, row = workload.enrollment.row, "pod enrolled");
                        self.by_cookie.insert(pod.cookie, pod.clone());
                        let authorization = workload.authorization.clone();
                        self.enrolled.insert(uid.clone(), Enrolled { pod, policy, authorization });
                        changes.entered.push(uid.clone());
                    } else if let Some(known) = self.enrolled.get_mut(uid) {
                        known.policy = policy;
                        known.authorization = workload.authorization.clone();
                    }
                }
                Err(error) => {
                    changes.failed += 1;
                    if let Ok(cookie) = connections::cookie(netns)
                        && datapath.enrolled().contains(&cookie)
                        && known.is_none()
                    {
                        self.refused.insert(uid.clone(), cookie);
                    }
                    let text = match known.is_some() || self.refused.contains_key(uid) || !self.guard.gate_open {
                        true => format!("{error:#}"),
                        false => format!("{error:#}; nothing of it is captured, and nothing refused"),
                    };
                    if self.failures.get(uid) != Some(&text) {
                        error!(pod = %workload.object, %uid, error = text, "pod could not be enrolled");
                        self.failures.insert(uid.clone(), text);
                    }
                }
            }
        }
        self.failures.retain(|uid, _| wanted.contains_key(uid));
        self.refused.retain(|uid, cookie| {
            let stays = match wanted.get(uid).or_else(|| nameless.get(uid)) {
                Some((_, netns)) => connections::cookie(netns).is_ok_and(|own| own == *cookie),
                // Still there, and nobody says that it is out.
                None => node.pods.contains_key(uid) && snapshot.workload(uid).is_none(),
            };
            if !stays && let Err(error) = datapath.remove(*cookie) {
                warn!(%uid, error = format!("{error:#}"), "a pod that was refused could not be forgotten completely");
                self.leaving.insert(*cookie);
            }
            stays
        });
        changes.leaving = self.leaving.len();
        self.wait_for_addresses(datapath, nameless);
        self.limits.share_among(self.enrolled.len());
        // Those that have their entries and are refused by them, with a reset, are not for the gate.
        let refused = self.refused.iter().filter(|(_, cookie)| datapath.has_inbound(**cookie));
        let refused: BTreeSet<PodUid> = refused.map(|(uid, _)| uid.clone()).collect();
        let enrolled = |uid: &PodUid| self.enrolled.contains_key(uid) || refused.contains(uid);
        self.gate.settle(datapath, snapshot, node, enrolled, &self.failures);
        changes
    }

    /// Which pods are to be in although the source does not tell their addresses yet.
    fn wait_for_addresses(&mut self, datapath: &mut Datapath, nameless: Pods) {
        self.waiting.retain(|uid, waits| nameless.get(uid).is_some_and(|(_, netns)| netns.id() == waits.netns.id()));
        for (uid, (workload, netns)) in nameless {
            let new = || Waiting { workload, netns, refused: None, told: false };
            self.waiting.entry(uid).or_insert_with(new);
        }
        self.refuse_waiting(datapath);
    }

    /// Refuses the pods whose addresses nobody has told yet: a container may run, and connect, before its kubelet tells
    /// them. Those that the namespace has are taken for the pod's meanwhile, so that it reaches itself and its probes reach
    /// it; whoever makes the pod's network may be at it, so this is to be called again and again.
    pub fn refuse_waiting(&mut self, datapath: &mut Datapath) {
        for (uid, waits) in &mut self.waiting {
            let refused = (|| {
                let cookie = connections::cookie(&waits.netns)?;
                let other = self.by_cookie.get(&cookie);
                anyhow::ensure!(other.is_none(), "its network namespace is that of another pod of the mesh");
                let ips = own_addresses(&waits.netns)?;
                if waits.refused.as_ref().is_none_or(|(_, known)| !same_addresses(known, &ips)) {
                    datapath.prepare(cookie, waits.netns.as_fd(), &ips)?;
                    datapath.suspend(cookie)?;
                }
                anyhow::Ok((cookie, ips))
            })();
            match refused {
                Ok((cookie, ips)) => {
                    if waits.refused.replace((cookie, ips)).is_none() {
                        info!(pod = %waits.workload.object, %uid, "pod is refused until its addresses are known");
                        self.refused.insert(uid.clone(), cookie);
                    }
                }
                Err(error) if !std::mem::replace(&mut waits.told, true) => {
                    let (pod, error) = (&waits.workload.object, format!("{error:#}"));
                    error!(%pod, %uid, error, "pod could not be refused until its addresses are known");
                }
                Err(_) => {}
            }
        }
    }

    /// Takes every pod out for good, also those that only an earlier agent knew: what they begin from now on passes by the mesh,
    /// what is open goes on.
    pub fn leave_all(&mut self, datapath: &mut Datapath, workers: &[Worker]) {
        for uid in self.enrolled.keys().cloned().collect::<Vec<_>>() {
            self.leave(&uid, datapath, workers, false);
        }
        for cookie in datapath.enrolled() {
            if let Err(error) = datapath.remove(cookie) {
                warn!(cookie = cookie.0, error = format!("{error:#}"), "a pod could not be forgotten completely");
            }
        }
        self.failures.clear();
        self.refused.clear();
        self.waiting.clear();
    }

    /// Decides about entries that an earlier agent left: pods that are gone or out of the mesh are forgotten, pods that
    /// nobody knows stay refused.
    pub fn adopt(&self, datapath: &mut Datapath, snapshot: &Snapshot, node: &pods::Node) {
        for cookie in datapath.enrolled() {
            if self.by_cookie.contains_key(&cookie) || self.refused.values().any(|own| *own == cookie) {
                continue;
            }
            let on_node = node.pods.values().find(
                |pod| matches!(&pod.network, PodNetwork::Own(netns) if netns.cookie().is_ok_and(|own| own == cookie.0)),
            );
            let unknown = on_node.is_some_and(|pod| snapshot.workload(&pod.uid).is_none());
            let result = if unknown { datapath.suspend(cookie) } else { datapath.remove(cookie) };
            if let Err(error) = result {
                warn!(cookie = cookie.0, error = format!("{error:#}"), "an earlier agent's entry could not be settled");
            }
        }
    }

    /// A pod that was brought in could not be given the inbound program: it is refused, and to be brought in again.
    pub fn not_attached(&mut self, cookie: NetnsCookie, error: &anyhow::Error, workers: &[Worker]) {
        let Some(pod) = self.by_cookie.remove(&cookie) else { return };
        let (uid, error) = (&pod.uid, format!("{error:#}"));
        error!(%uid, error, "pod could not be enrolled");
        self.failures.insert(uid.clone(), error);
        self.refused.insert(uid.clone(), cookie);
        self.enrolled.remove(uid);
        for worker in workers {
            worker.tell(Command::Leave(cookie));
        }
    }

    /// How many pods are held at the gate: it is not known yet whether they are to be in.
    pub fn held(&self) -> usize {
        self.gate.held()
    }

    /// Several times a second: says which pods are held, if it is time to.
    pub fn tell_held(&mut self) {
        self.gate.tell();
    }

    /// The pod of a network namespace.
    pub fn by_cookie(&self, cookie: NetnsCookie) -> Option<&Arc<ServedPod>> {
        self.by_cookie.get(&cookie)
    }

    /// How many pods could not be brought in, or changed.
    pub fn failures(&self) -> usize {
        self.failures.len()
    }

    /// All pods that are in.
    pub fn pods(&self) -> impl Iterator<Item = &Arc<ServedPod>> {
        self.by_cookie.values()
    }

    /// A pod that is in.
    pub fn pod(&self, uid: &PodUid) -> Option<&Arc<ServedPod>> {
        self.enrolled.get(uid).map(|enrolled| &enrolled.pod)
    }

    /// Where each pod stands that is in, or could not be brought in.
    pub fn states(&self) -> BTreeMap<PodUid, State> {
        let enrolled = self.enrolled.iter().map(|(uid, known)| (uid.clone(), State::Enrolled(known.pod.cookie)));
        // The second wins: a pod that is in and whose change failed.
        let failed = self.failures.iter().map(|(uid, why)| (uid.clone(), State::Failed(why.clone())));
        let waiting = self.waiting.keys().map(|uid| {
            let why = "its manifest tells no address yet (status.podIPs); refused until it does";
            (uid.clone(), State::Failed(why.to_owned()))
        });
        enrolled.chain(waiting).chain(failed).collect()
    }

    /// The identities of the pods that are in, or are to be.
    pub fn identities(snapshot: &Snapshot, node: &pods::Node) -> BTreeSet<SpiffeId> {
        let (wanted, nameless) = wanted(snapshot, node);
        wanted.into_values().chain(nameless.into_values()).map(|(workload, _)| workload.identity.clone()).collect()
    }

    /// A pod leaves when it is gone from the node, has another namespace or other addresses, or the source says that it
    /// is out. One that has only vanished from the source keeps what it had until its processes are gone.
    fn leaves(&self, uid: &PodUid, wanted: &Pods, snapshot: &Snapshot, node: &pods::Node) -> bool {
        let Some(enrolled) = self.enrolled.get(uid) else { return false };
        match wanted.get(uid) {
            Some((workload, netns)) => {
                enrolled.pod.netns.id() != netns.id() || !same_addresses(&enrolled.pod.ips, &workload.ips)
            }
            None => match node.pods.get(uid) {
                Some(pod) => snapshot.workload(uid).is_some() || !matches!(pod.network, PodNetwork::Own(_)),
                None => true,
            },
        }
    }

    /// `comes_back`: with other addresses. Until it is in again, it is refused and not open.
    fn leave(&mut self, uid: &PodUid, datapath: &mut Datapath, workers: &[Worker], comes_back: bool) {
        let Some(enrolled) = self.enrolled.remove(uid) else { return };
        let cookie = enrolled.pod.cookie;
        self.by_cookie.remove(&cookie);
        let done = if comes_back {
            self.refused.insert(uid.clone(), cookie);
            datapath.suspend(cookie)
        } else {
            datapath.remove(cookie)
        };
        if let Err(error) = done {
            warn!(%uid, error = format!("{error:#}"), "a pod that left could not be forgotten completely");
            if !comes_back {
                self.leaving.insert(cookie);
            }
        }
        for worker in workers {
            worker.tell(Command::Leave(cookie));
        }
        info!(%uid, "pod left");
    }
}

/// Pods of the node with a namespace of their own.
type Pods = BTreeMap<PodUid, (Arc<Workload>, Arc<NetnsHandle>)>;

/// Pods that are on the node, have a namespace of their own, and are in the mesh by the snapshot: those whose addresses it
/// knows, and the others.
fn wanted(snapshot: &Snapshot, node: &pods::Node) -> (Pods, Pods) {
    let of = |pod: &Arc<pods::NodePod>| {
        let PodNetwork::Own(netns) = &pod.network else { return None };
        let workload = snapshot.workload(&pod.uid).filter(|workload| workload.enrollment.enrolled)?;
        Some((pod.uid.clone(), (workload.clone(), netns.clone())))
    };
    node.pods.values().filter_map(of).partition(|(_, (workload, _))| !workload.ips.is_empty())
}

fn enter(
    datapath: &mut Datapath,
    workers: &[Worker],
    (limits, guard): (&Arc<Limits>, &Guard),
    workload: &Workload,
    netns: &Arc<NetnsHandle>,
    policy: &PodPolicy,
) -> anyhow::Result<Arc<ServedPod>> {
    let cookie = connections::cookie(netns)?;
    has_an_address(netns, &workload.ips)?;
    datapath.prepare(cookie, netns.as_fd(), &workload.ips)?;
    let ends = if guard.veths { route::ends(netns, &guard.node)? } else { route::Ends::default() };
    if !ends.others.is_empty() {
        warn!(
            pod = %workload.object,
            devices = ends.others.join(", "),
            "network devices of this pod are no veths that end on the node: what packet and raw sockets send there is not seen"
        );
    }
    datapath.guard(cookie, &ends.veths, policy.udp_refused)?;
    let count = u32::try_from(workers.len()).context("number of workers")?;
    let listeners = listen::open(netns, count)?;
    let pod = Arc::new(ServedPod {
        uid: workload.uid.clone(),
        netns: netns.clone(),
        cookie,
        ips: workload.ips.clone(),
        load: limits.load(),
    });
    for ((number, worker), listeners) in (0..count).zip(workers).zip(listeners) {
        for kind in [ListenerKind::Outbound, ListenerKind::Tunnel, ListenerKind::Plaintext] {
            datapath.listener(cookie, kind, number, listeners.of(kind))?;
        }
        worker.tell(Command::Serve(pod.clone(), listeners));
    }
    datapath.ready(cookie, policy)?;
    Ok(pod)
}

/// The namespace that the pod's processes are in must be the pod's: what is attached to a wrong one would catch
/// somebody else's connections.
fn has_an_address(netns: &NetnsHandle, ips: &[IpAddr]) -> anyhow::Result<()> {
    let there = own_addresses(netns)?;
    anyhow::ensure!(
        ips.iter().any(|ip| there.contains(ip)),
        "the network namespace of the pod's processes has none of its addresses {ips:?} (it has {there:?})"
    );
    Ok(())
}

/// The addresses of a namespace's devices, but for those of loopback and of the link alone, which every one has.
pub(crate) fn own_addresses(netns: &NetnsHandle) -> anyhow::Result<Vec<IpAddr>> {
    let own = |ip: &IpAddr| match ip {
        IpAddr::V4(v4) => !v4.is_loopback() && !v4.is_link_local(),
        IpAddr::V6(v6) => !v6.is_loopback() && !v6.is_unicast_link_local(),
    };
    let all = netns
        .run(addresses::here)
        .context("enter the pod's network namespace")?
        .context("list the addresses of the pod's network namespace")?;
    Ok(all.into_iter().filter(own).collect())
}

/// What policies say of plaintext, made once for all pods of one pass that have the same.
#[derive(Default)]
struct TablesOfPods(Vec<(Authorization, Vec<IpAddr>, Plaintext)>);

impl TablesOfPods {
    fn of(&mut self, snapshot: &Snapshot, workload: &Workload) -> Plaintext {
        let authorization = &workload.authorization;
        let ips = if authorization.asks_for_destination_ip() { workload.ips.as_slice() } else { &[] };
        if let Some((.., known)) = self.0.iter().find(|(of, own, _)| of == authorization && own == ips) {
            return known.clone();
        }
        let plaintext = match Plaintext::of(snapshot, workload) {
            Ok(plaintext) => plaintext,
            Err(why) => {
                let policies: Vec<String> =
                    authorization.policies().take(NAMED).map(|policy| policy.object().to_string()).collect();
                warn!(
                    pod = %workload.object,
                    policies = policies.join(", "),
                    %why,
                    "AuthorizationPolicies of this pod do not fit into the kernel: the agent gives its verdicts on plaintext"
                );
                Plaintext::ByAgent
            }
        };
        self.0.push((authorization.clone(), ips.to_vec(), plaintext.clone()));
        plaintext
    }
}

fn udp_refused(workload: &Workload, guard: &Guard) -> bool {
    match workload.labels.get(UDP_LABEL).map(String::as_str) {
        None => guard.udp_refused,
        Some("allow") => false,
        // What cannot be understood must not open anything.
        Some(_) => true,
    }
}

/// Equal but for the generation: a change elsewhere in the cluster costs this pod nothing.
fn same_policy(a: &PodPolicy, b: &PodPolicy) -> bool {
    (a.mode, a.rule, &a.ports, &a.plaintext, a.udp_refused) == (b.mode, b.rule, &b.ports, &b.plaintext, b.udp_refused)
}

fn same_addresses(a: &[IpAddr], b: &[IpAddr]) -> bool {
    a.iter().collect::<BTreeSet<_>>() == b.iter().collect()
}
