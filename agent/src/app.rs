//! Wiring: what exists, in which order it starts, and how it ends. Nothing clever.
//!
//! One thread controls: it owns the kernel side, compiles what the source says, enrols pods, and gives the sign of
//! life, but only while every worker gives its own. The workers carry connections (`worker`); a thread of its own
//! watches the cgroup tree (`pods`), another writes the access log (`telemetry`).

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    os::fd::AsFd as _,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, anyhow};
use culvert_common::SettingsValue;
use tokio::{
    io::{Interest, unix::AsyncFd},
    signal::unix::{SignalKind, signal},
    sync::{mpsc, watch},
    time::{MissedTickBehavior, interval},
};
use tracing::{error, info, warn};

use crate::{
    ca,
    config::{
        self,
        agent::{Certificates, Config},
    },
    connections::{self, Passed},
    datapath::{self, Datapath},
    drain,
    enroll::Enrollments,
    identity::{self, Identities},
    model::{ObjectRef, PodUid, TrustDomain},
    netns::NetnsHandle,
    pods::{self, Kubelet},
    policy::{self, Snapshot},
    proxy::Context,
    source::{self, View},
    telemetry::{self, access, exposition, metrics, open, readiness, tally, traffic::Names},
    tunnel,
    worker::Worker,
};

/// Period of the sign of life, and of whatever is looked at again.
const TICK: Duration = Duration::from_millis(250);
/// A worker that is silent for longer is stuck, and the sign of life is withheld.
const WORKER_SILENCE: Duration = Duration::from_secs(5);
/// How often the metrics of workloads that are gone are dropped.
const FORGET: Duration = Duration::from_secs(60);
/// Lifetime that certificates are asked for.
const CERTIFICATE_TTL: Duration = Duration::from_secs(24 * 3600);
/// How long the writer of the access log may take for its last lines.
const LOG_PATIENCE: Duration = Duration::from_secs(2);

/// Runs `culvert agent` until SIGTERM or SIGINT, and drains.
///
/// # Errors
/// What kept it from starting, or ended it: one line.
pub fn agent(config: Config) -> anyhow::Result<()> {
    telemetry::init(config.log_format, &config.log_level)?;
    info!(version = env!("CARGO_PKG_VERSION"), ?config, "culvert agent starts");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("build the runtime")?;
    runtime.block_on(run_agent(config))
}

/// Runs `culvert ca` until SIGTERM or SIGINT.
///
/// # Errors
/// What kept it from starting, or ended it: one line.
pub fn ca(config: config::ca::Config) -> anyhow::Result<()> {
    telemetry::init(config.log_format, &config.log_level)?;
    info!(version = env!("CARGO_PKG_VERSION"), listen = %config.ca.listen, "culvert ca starts");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("build the runtime")?;
    runtime.block_on(async {
        let (views, reading) = source::file::watch(source::file::Config {
            path: config.manifests,
            system_namespace: config.system_namespace,
        })?;
        let (sender, clusters) = watch::channel(views.borrow().cluster.clone());
        let forwarding = async {
            let mut views = views;
            while views.changed().await.is_ok() {
                let cluster = views.borrow_and_update().cluster.clone();
                sender.send_replace(cluster);
            }
            anyhow::Ok(())
        };
        tokio::select! {
            result = ca::run(config.ca, clusters, stopped()?) => result,
            result = reading => result.and_then(|()| Err(anyhow!("the source of manifests has ended"))),
            result = forwarding => result,
        }
    })
}

/// Resolves at SIGTERM or SIGINT.
fn stopped() -> anyhow::Result<impl Future<Output = ()>> {
    let mut term = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
    let mut int = signal(SignalKind::interrupt()).context("listen for SIGINT")?;
    Ok(async move {
        tokio::select! {
            _ = term.recv() => {}
            _ = int.recv() => {}
        }
    })
}

async fn run_agent(config: Config) -> anyhow::Result<()> {
    let stop = stopped()?;
    let ready = readiness::Ready::default();
    let first_pass = ready.hold("first pass over the pods of the node");
    let answering = readiness::bind(config.readiness_address).await?;

    let (views, reading) = source::file::watch(source::file::Config {
        path: config.manifests.clone(),
        system_namespace: config.system_namespace.clone(),
    })?;
    let options = options(&config);
    let cgroup_root = match &config.cgroup_root {
        Some(path) => path.clone(),
        None => pods::find_cgroup2_mount()?,
    };
    let host = Arc::new(NetnsHandle::current().context("open the node's network namespace")?);
    let datapath = Datapath::load(datapath::Config {
        pin_dir: config.pin_dir.clone(),
        cgroup_root: cgroup_root.clone(),
        workers: config.workers,
    })?;
    let (nodes, watcher) = pods::watch(pods::Config {
        cgroup_root,
        proc_root: PathBuf::from("/proc"),
        host_netns: host.clone(),
        kubelet_cgroup: config.kubelet_cgroup.clone(),
    })?;
    let (identities, renewal) = Identities::new(identity_config(&config, &views.borrow()))?;
    let (log, writer) = access::start(access::Config { format: config.log_format, ..access::Config::default() })
        .context("start the access log")?;
    let names =
        Names { cluster: config.cluster_id.as_str().into(), cluster_domain: config.cluster_domain.as_str().into() };

    let mut first = policy::compile(&views.borrow().cluster, &options, None);
    // Numbers of an earlier agent must not be taken for ours.
    first.generation = datapath.last_generation().wrapping_add(1).max(1);
    let (snapshots, snapshot) = watch::channel(Arc::new(first));
    let registry = open::Registry::new(names.clone(), config.metrics_label_sets);
    let tallies = tally::Tallies::default();
    let (ask, questions) = mpsc::channel(8);
    let _connections = open::Connections::new(registry.clone(), ask.clone());
    let sources = metrics::Sources { registry: registry.clone(), tallies: tallies.clone(), access: log.clone() };
    let mut exposition = exposition::Server::start(config.metrics_address, sources, ask)?;
    let (mut draining, drain) = drain::channel();
    let workers = (0..config.workers)
        .map(|number| {
            let sockets = datapath.sockets()?;
            let (snapshot, identities, log) = (snapshot.clone(), identities.clone(), log.clone());
            let (names, drained, open) = (names.clone(), drain.clone(), registry.shard());
            let tally = tallies.tally();
            Worker::start(number, drain.clone(), move || {
                let limits = tunnel::Config::default();
                Ok(Context {
                    snapshot,
                    identities,
                    pool: tunnel::Pool::counted(limits, tally.clone()),
                    tunnel: limits,
                    sockets: sockets.into(),
                    open,
                    tally,
                    access: log,
                    names,
                    drain: drained,
                })
            })
        })
        .collect::<anyhow::Result<Vec<_>>>()?;
    drop(drain);
    let passed = Passed::new(datapath.events()?, datapath.storage_fd()?, log.clone(), registry.shard(), names);
    let mut control = Control {
        options,
        datapath,
        workers,
        enrollments: Enrollments::default(),
        passed,
        registry,
        questions,
        forgotten: Instant::now(),
        compiles: (0, Duration::ZERO),
        identities,
        host,
        kubelet: None,
        snapshots,
        unjudged: BTreeMap::new(),
        retry: false,
        stuck: false,
    };

    let (ended, until_end) = watch::channel(());
    let until = |mut end: watch::Receiver<()>| async move {
        // Closed at the end; never sent to.
        let _ = end.changed().await;
    };
    let serving = readiness::serve(answering, ready, until(until_end.clone()));
    let renewing = renewal.run(until(until_end));
    let result = tokio::select! {
        () = stop => Ok(()),
        result = control.run(views, nodes, first_pass) => result,
        result = reading => result.and_then(|()| Err(anyhow!("the source of manifests has ended"))),
        result = serving => result.context("readiness").and_then(|()| Err(anyhow!("readiness has ended"))),
        error = exposition.failed() => Err(error),
        () = renewing => Err(anyhow!("the renewal of certificates has ended")),
    };
    drop(ended);
    info!(deadline = ?config.drain_deadline, "draining");
    // Without a successor nobody serves the pods: refuse now, not in ten seconds.
    if let Err(error) = control.datapath.silence() {
        error!(error = format!("{error:#}"), "the kernel could not be told that the agent ends");
    }
    if let Err(unfinished) = draining.drain(config.drain_deadline + Duration::from_secs(1)).await {
        warn!(workers = unfinished.0, "not everything ended by the deadline");
    }
    control.workers.drain(..).for_each(Worker::join);
    control.tell();
    watcher.stop()?;
    drop(control);
    exposition.stop();
    drop(log);
    let dropped = writer.finish(LOG_PATIENCE).context("finish the access log")?;
    if dropped > 0 {
        warn!(dropped, "lines of the access log were lost: its reader was too slow");
    }
    result
}

/// The thread that controls, and what only it touches.
struct Control {
    options: policy::Options,
    datapath: Datapath,
    workers: Vec<Worker>,
    enrollments: Enrollments,
    passed: Passed,
    registry: open::Registry,
    /// What operators and metrics want to know.
    questions: mpsc::Receiver<metrics::Question>,
    /// When metrics of workloads that are gone were last dropped.
    forgotten: Instant,
    /// How often policy was compiled, and how long it took the last time.
    compiles: (u64, Duration),
    identities: Identities,
    host: Arc<NetnsHandle>,
    kubelet: Option<Kubelet>,
    snapshots: watch::Sender<Arc<Snapshot>>,
    /// Pods whose open connections have not been judged by the policy in force yet.
    unjudged: BTreeMap<PodUid, Unjudged>,
    /// Something failed and is to be tried again.
    retry: bool,
    /// A worker does not move, and it was said.
    stuck: bool,
}

#[derive(Clone, Copy, Debug, Default)]
struct Unjudged {
    /// The pod has just been brought in.
    entered: bool,
    /// That it failed has been said.
    told: bool,
}

impl Control {
    async fn run(
        &mut self,
        mut views: watch::Receiver<Arc<View>>,
        mut nodes: watch::Receiver<Arc<pods::Node>>,
        first_pass: readiness::Hold,
    ) -> anyhow::Result<()> {
        let wakes = self.passed.wakes().as_fd().try_clone_to_owned().context("duplicate the events' descriptor")?;
        // SAFETY: an OwnedFd is open, and the same descriptor, until the AsyncFd that owns it is dropped.
        let wakes = unsafe { AsyncFd::register_with_interest(wakes, Interest::READABLE) }
            .context("poll the kernel's events")?;
        let mut tick = interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut first_pass = Some(first_pass);
        let mut work = true;
        loop {
            if std::mem::take(&mut work) {
                let view = views.borrow_and_update().clone();
                let node = nodes.borrow_and_update().clone();
                self.compile(&view, &node);
                self.settle(&node)?;
                if first_pass.take().is_some() {
                    let snapshot = self.snapshots.borrow().clone();
                    self.enrollments.adopt(&mut self.datapath, &snapshot, &node);
                    self.datapath.beat()?;
                    info!(generation = snapshot.generation, pods = node.pods.len(), "ready");
                }
            }
            tokio::select! {
                changed = views.changed() => {
                    changed.context("the source of manifests has ended")?;
                    work = true;
                }
                changed = nodes.changed() => {
                    changed.context("watching the pods of this node has ended")?;
                    work = true;
                }
                woken = wakes.readable() => {
                    woken.context("poll the kernel's events")?.clear_ready();
                    self.tell();
                }
                Some(question) = self.questions.recv() => self.answer(question),
                _ = tick.tick() => {
                    self.beat()?;
                    self.datapath.maintain();
                    self.tell();
                    self.forget();
                    work = std::mem::take(&mut self.retry);
                }
            }
        }
    }

    /// From what the source says to a snapshot; the workers see it at once.
    fn compile(&mut self, view: &View, node: &pods::Node) {
        let before = self.snapshots.borrow().clone();
        let begun = Instant::now();
        let next = policy::compile(&view.cluster, &self.options, Some(&before));
        self.compiles = (self.compiles.0 + 1, begun.elapsed());
        for warning in next.warnings.iter().filter(|warning| !before.warnings.contains(warning)) {
            warn!("{warning}");
        }
        if next.generation != before.generation {
            info!(generation = next.generation, "policy compiled");
            let mesh = &next.mesh;
            self.identities.set_trust_domains(mesh.trust_domain.clone(), mesh.trust_domain_aliases.clone());
            // Whoever reads the new snapshot finds the identities that it speaks of, and who still has the old one finds
            // those; `settle` forgets what is not needed any more.
            let mut identities = Enrollments::identities(&before, node);
            identities.extend(Enrollments::identities(&next, node));
            self.identities.want(&identities);
            self.snapshots.send_replace(Arc::new(next));
        }
    }

    /// Makes the node equal to the snapshot.
    fn settle(&mut self, node: &pods::Node) -> anyhow::Result<()> {
        let snapshot = self.snapshots.borrow().clone();
        self.tell_kubelet(&node.kubelet)?;
        self.identities.want(&Enrollments::identities(&snapshot, node));
        let changes = self.enrollments.reconcile(&mut self.datapath, &self.workers, &snapshot, node);
        self.retry |= changes.failed > 0;
        for uid in changes.changed {
            self.unjudged.entry(uid).or_default();
        }
        self.unjudged.extend(changes.entered.into_iter().map(|uid| (uid, Unjudged { entered: true, told: false })));
        self.judge_again(&snapshot);
        Ok(())
    }

    /// Judges open connections where policy has changed; what fails stays to be done ([D.1]).
    fn judge_again(&mut self, snapshot: &Snapshot) {
        for (uid, mut todo) in std::mem::take(&mut self.unjudged) {
            let (Some(pod), Some(own)) = (self.enrollments.pod(&uid), snapshot.workload(&uid)) else { continue };
            if let Err(error) = self.passed.judge_again(snapshot, pod, own, todo.entered) {
                if !std::mem::replace(&mut todo.told, true) {
                    let error = format!("{error:#}");
                    warn!(pod = %own.object, error, "open connections could not be judged again; trying on");
                }
                self.retry = true;
                self.unjudged.insert(uid, todo);
            }
        }
    }

    fn tell_kubelet(&mut self, kubelet: &Kubelet) -> anyhow::Result<()> {
        if self.kubelet.as_ref() == Some(kubelet) {
            return Ok(());
        }
        let mut settings = SettingsValue {
            host_netns_cookie: self.host.cookie().context("cookie of the node's network namespace")?,
            ..SettingsValue::default()
        };
        match kubelet {
            Kubelet::Known(dir) => {
                settings.kubelet_cgroup = dir.id.0;
                settings.kubelet_level = dir.level.unwrap_or_default();
                info!(path = %dir.path.display(), "kubelet's cgroup");
            }
            Kubelet::Absent(why) => warn!(why, "no kubelet's cgroup: probes are judged as plaintext until it is there"),
            Kubelet::Indistinct(why) => {
                settings.probes_by_netns = 1;
                warn!(
                    why,
                    "the kubelet cannot be told apart: every process of the node's own network namespace may \
                    reach pods as a probe ([K.5]); give --kubelet-cgroup if it has a cgroup of its own"
                );
            }
        }
        self.datapath.settings(settings)?;
        self.kubelet = Some(kubelet.clone());
        Ok(())
    }

    fn beat(&mut self) -> anyhow::Result<()> {
        match self.workers.iter().map(Worker::silent_for).max() {
            Some(silence) if silence > WORKER_SILENCE => {
                if !std::mem::replace(&mut self.stuck, true) {
                    error!(?silence, "a worker is stuck: the sign of life is withheld, connections will be refused");
                }
                Ok(())
            }
            _ => {
                if std::mem::take(&mut self.stuck) {
                    warn!("every worker moves again");
                }
                self.datapath.beat()
            }
        }
    }

    fn answer(&mut self, question: metrics::Question) {
        self.tell();
        let snapshot = self.snapshots.borrow().clone();
        self.passed.refresh(&snapshot, self.enrollments.pods());
        // Who asked may have gone.
        match question {
            metrics::Question::Connections(done) => drop(done.send(())),
            metrics::Question::Node(reply) => drop(reply.send(Box::new(self.facts(&snapshot)))),
        }
    }

    fn facts(&self, snapshot: &Snapshot) -> metrics::Node {
        let fill = self.datapath.fill().unwrap_or_else(|error| {
            warn!(error = format!("{error:#}"), "the kernel's maps could not be counted for metrics");
            Vec::new()
        });
        let maps = fill.into_iter();
        metrics::Node {
            generation: snapshot.generation,
            compiles: self.compiles.0,
            compile_time: self.compiles.1,
            enrolled: self.enrollments.pods().count(),
            failed: self.enrollments.failures(),
            certificates: self
                .identities
                .status()
                .into_iter()
                .map(|status| (status.identity.to_string(), status.expires_at))
                .collect(),
            certificate_requests: self.identities.requests(),
            verdicts: connections::verdicts(&self.datapath.verdicts(), |cookie| {
                snapshot.workload(&self.enrollments.by_cookie(cookie)?.uid)
            }),
            maps: maps
                .map(|map| metrics::MapFill { name: map.name, entries: map.entries, capacity: map.capacity })
                .collect(),
            programs: self.datapath.programs(),
            silence: self.workers.iter().map(Worker::silent_for).collect(),
        }
    }

    /// Drops the metrics of workloads that are gone.
    fn forget(&mut self) {
        if self.forgotten.elapsed() < FORGET {
            return;
        }
        self.forgotten = Instant::now();
        let snapshot = self.snapshots.borrow().clone();
        let there: HashSet<(&str, &str)> =
            snapshot.workloads.values().map(|known| (&*known.object.namespace, &*known.workload_name)).collect();
        self.registry.maintain(|namespace, name| there.contains(&(namespace, name)));
    }

    fn tell(&mut self) {
        let snapshot = self.snapshots.borrow().clone();
        let enrollments = &self.enrollments;
        self.passed.tell(&snapshot, |cookie| enrollments.by_cookie(cookie));
        self.passed.watch(&snapshot, |cookie| enrollments.by_cookie(cookie));
    }
}

fn options(config: &Config) -> policy::Options {
    policy::Options {
        revision: config.revision.clone(),
        exclude_namespaces: config.exclude_namespaces.clone(),
        own_accounts: BTreeSet::from([ObjectRef::new(config.system_namespace.as_str(), "culvert")]),
    }
}

fn identity_config(config: &Config, view: &View) -> identity::Config {
    let mesh = &view.cluster.mesh;
    let (trust_domain, trust_domain_aliases): (TrustDomain, Vec<TrustDomain>) =
        (mesh.trust_domain.clone(), mesh.trust_domain_aliases.clone());
    identity::Config {
        source: match &config.certificates {
            Certificates::Ca { address, root, server_name, token } => identity::Source::Ca(identity::CaConfig {
                address: address.clone(),
                root_file: root.clone(),
                server_name: server_name.clone(),
                token_file: token.clone(),
                cluster_id: config.cluster_id.clone(),
                ttl: CERTIFICATE_TTL,
            }),
            Certificates::Files(dir) => identity::Source::Files(dir.clone()),
        },
        trust_domain,
        trust_domain_aliases,
    }
}
