//! Wiring: what exists, in which order it starts, and how it ends. Nothing clever.
//!
//! One thread controls: it owns the kernel side, compiles what the source says, enrols pods, and gives the sign of
//! life, but only while every worker gives its own. The workers carry connections (`worker`); a thread of its own
//! watches the cgroup tree (`pods`), another writes the access log (`telemetry`).
//!
//! # The life of an agent
//!
//! It waits for its turn, loads, and enrols every pod into maps that nobody asks yet. Once that is whole, or nobody serves
//! whom it could disturb, it takes over; from then on it is ready. It ends by SIGTERM, or because a successor has taken
//! over; both ways open connections go on until the drain deadline, and policy goes on to hold for them. What it leaves refuses
//! until the next one serves, unless there will be none ([`leave`]): then nothing is left.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    convert::Infallible,
    os::fd::AsFd as _,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, anyhow};
use culvert_common::SettingsValue;
use futures_util::{FutureExt as _, StreamExt as _, future::LocalBoxFuture, stream::FuturesUnordered};
use tokio::{
    io::{Interest, unix::AsyncFd},
    signal::unix::{SignalKind, signal},
    sync::{mpsc, watch},
    time::{MissedTickBehavior, interval},
};
use tracing::{debug, error, info, warn};

use crate::{
    admin, announce, ca,
    config::{
        self,
        agent::{self, Again, Certificates, Config},
    },
    connections::{self, Passed, Stranger},
    control,
    datapath::{self, Datapath, NetnsCookie, Predecessor, Turn},
    drain::{self, Cause},
    enroll::{self, Enrollments},
    identity::{self, Identities},
    leave::{self, DaemonSet},
    limits::{self, Limits},
    listen::NodePort,
    model::{Cluster, ObjectRef, PodUid, TrustDomain},
    netns::{NetnsHandle, addresses},
    pods::{self, Kubelet, PodNetwork},
    policy::{self, Snapshot},
    preflight::{self, runtimes},
    proxy::Context,
    report, resident,
    source::{self, View},
    telemetry::{
        self, LogLevel, access, exposition, limit::Limit, lines::Lines, metrics, open, panics, readiness, tally, trace,
        traffic::Names,
    },
    tunnel,
    worker::Worker,
};

/// Period of the sign of life, and of whatever is looked at again.
const TICK: Duration = Duration::from_millis(250);
/// From taking over until the start's text is given back: certificates are there, first connections too.
const FIRST_GIVE_BACK: Duration = Duration::from_secs(2);
/// How often after that. What runs all the time comes back within microseconds, from the page cache.
const GIVE_BACK: Duration = Duration::from_mins(10);
/// A worker that is silent for longer is stuck, and the sign of life is withheld.
const WORKER_SILENCE: Duration = Duration::from_secs(5);
/// How often the metrics of workloads that are gone are dropped.
const FORGET: Duration = Duration::from_secs(60);
/// Lifetime that certificates are asked for.
const CERTIFICATE_TTL: Duration = Duration::from_secs(24 * 3600);
/// How long the writer of the access log may take for its last lines, and the workers' threads for their end.
const LAST_PATIENCE: Duration = Duration::from_millis(100);
/// How long the writer of the log may take for its last lines, which say how the process ended.
const LAST_LINES: Duration = Duration::from_secs(1);
/// A new agent that has certificates, but not for all identities, waits so long for the others before it takes over: a CA
/// that answers for some and refuses others may do so for ever.
const CERTIFICATE_PATIENCE: Duration = Duration::from_secs(30);
/// How often an agent says what it waits for.
const SAY_AGAIN: Duration = Duration::from_secs(10);
/// How often the pods' sockets are looked at for connections that the mesh has nothing to do with.
const PROVE: Duration = Duration::from_secs(30);
/// How often the kernel's counters are compared with what was told of them.
const ACCOUNT: Duration = Duration::from_secs(10);
/// How often the configuration's file is looked at.
const LOOK_AT_FILE: Duration = Duration::from_secs(1);

/// Runs `culvert agent` until SIGTERM or SIGINT, and drains.
///
/// # Errors
/// What kept it from starting, or ended it: one line.
pub fn agent(config: Config, again: Again) -> anyhow::Result<()> {
    let log = telemetry::init(config.log_format, &config.log_level)?;
    panics::install();
    let settings = config::describe(&config.given);
    info!(version = env!("CARGO_PKG_VERSION"), settings, "culvert agent starts");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("build the runtime")?;
    let ended = runtime.block_on(run_agent(Settings::new(config, again, log.level()), log.lines()));
    drop(runtime);
    log.finish(LAST_LINES);
    ended
}

/// Runs `culvert ca` until SIGTERM or SIGINT.
///
/// # Errors
/// What kept it from starting, or ended it: one line.
pub fn ca(config: config::ca::Config) -> anyhow::Result<()> {
    let log = telemetry::init(config.log_format, &config.log_level)?;
    panics::install();
    info!(version = env!("CARGO_PKG_VERSION"), listen = %config.ca.listen, "culvert ca starts");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("build the runtime")?;
    let ended = runtime.block_on(async {
        let (views, reading) = source::file::watch(source::file::Config {
            path: config.manifests,
            system_namespace: config.system_namespace,
        })?;
        let (clusters, following) = source::clusters(views);
        let ended = || Err(anyhow!("the source of manifests has ended"));
        tokio::select! {
            result = ca::run(config.ca, clusters, stopped()?) => result,
            result = reading => result.and_then(|()| ended()),
            () = following => ended(),
        }
    });
    drop(runtime);
    log.finish(LAST_LINES);
    ended
}

/// Runs `culvert control` until SIGTERM or SIGINT.
///
/// # Errors
/// What kept it from starting, or ended it: one line.
pub fn control(config: config::control::Config) -> anyhow::Result<()> {
    let log = telemetry::init(config.log_format, &config.log_level)?;
    panics::install();
    info!(version = env!("CARGO_PKG_VERSION"), settings = config::describe(&config.given), "culvert control starts");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("build the runtime")?;
    let ended = runtime.block_on(async { control::run(config.control, stopped()?).await });
    drop(runtime);
    log.finish(LAST_LINES);
    ended
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

/// Where the cluster's objects come from.
struct Source {
    views: watch::Receiver<Arc<View>>,
    /// Keeps them up to date.
    reading: LocalBoxFuture<'static, anyhow::Result<()>>,
    /// To write to whoever they come from; a folder is not written to.
    client: Option<kube::Client>,
}

async fn source(config: &Config) -> anyhow::Result<Source> {
    let system_namespace = config.system_namespace.clone();
    Ok(match &config.source {
        agent::Source::Folder(path) => {
            let (views, reading) = source::file::watch(source::file::Config { path: path.clone(), system_namespace })?;
            Source { views, reading: reading.boxed_local(), client: None }
        }
        agent::Source::Kubernetes(kubeconfig) => {
            let client = source::kubernetes::client(kubeconfig.as_deref()).await?;
            let (views, reading) =
                source::kubernetes::watch(kubeconfig.as_deref(), &system_namespace, source::kubernetes::Kinds::All)
                    .await?;
            Source { views, reading: reading.boxed_local(), client: Some(client) }
        }
    })
}

/// The DaemonSet that this agent is of, and what follows it.
struct Belonging {
    daemonset: Arc<DaemonSet>,
    following: LocalBoxFuture<'static, anyhow::Error>,
}

async fn belonging(config: &Config, client: Option<&kube::Client>) -> anyhow::Result<Option<Belonging>> {
    let (Some(of), Some(client), agent::Source::Kubernetes(kubeconfig)) = (&config.daemonset, client, &config.source)
    else {
        return Ok(None);
    };
    let watcher = source::kubernetes::watcher(kubeconfig.as_deref()).await?;
    let daemonset = Arc::new(DaemonSet::new(client.clone(), of.clone()));
    let followed = daemonset.clone();
    let following = async move { match followed.follow(watcher).await {} };
    Ok(Some(Belonging { daemonset, following: following.boxed_local() }))
}

/// Waits until no other agent prepares itself to serve.
async fn turn(config: &Config) -> anyhow::Result<Turn> {
    let mut said: Option<Instant> = None;
    loop {
        if let Some(turn) = Turn::try_take(&config.pin_dir)? {
            return Ok(turn);
        }
        if said.is_none_or(|at| at.elapsed() >= SAY_AGAIN) {
            said = Some(Instant::now());
            info!(pin_dir = %config.pin_dir.display(), "another agent prepares itself to serve: waiting until it does");
        }
        tokio::time::sleep(TICK).await;
    }
}

async fn run_agent(settings: Settings, lines: Lines) -> anyhow::Result<()> {
    let config = settings.config.clone();
    preflight::pass(&config.preflight())?;
    let mut stop = std::pin::pin!(stopped()?);
    let ready = readiness::Ready::default();
    let first_pass = ready.hold("first pass over the pods of the node");
    let ports = admin::Ports {
        admin: NodePort::bind(config.admin_address, "operators (--admin-address)")?,
        readiness: NodePort::bind(config.readiness_address, "readiness (--readiness-address)")?,
    };
    let metrics_port = NodePort::bind(config.metrics_address, "metrics (--metrics-address)")?;
    let turn = tokio::select! {
        turn = turn(&config) => turn?,
        () = &mut stop => return Ok(()),
    };

    let Source { views, reading, client } = tokio::select! {
        source = source(&config) => source?,
        () = &mut stop => return Ok(()),
    };
    let (daemonset, following) = match belonging(&config, client.as_ref()).await? {
        Some(Belonging { daemonset, following }) => (Some(daemonset), Some(following)),
        None => (None, None),
    };
    let options = options(&config);
    let cgroup_root = match &config.cgroup_root {
        Some(path) => path.clone(),
        None => pods::find_cgroup2_mount()?,
    };
    let host = Arc::new(NetnsHandle::current().context("open the node's network namespace")?);
    let mut datapath = Datapath::load(
        datapath::Config { pin_dir: config.pin_dir.clone(), cgroup_root: cgroup_root.clone(), workers: config.workers },
        turn,
    )?;
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
    let files = limits::raise_open_files(config.max_open_files).context("raise the limit of open files")?;
    info!(open_files = files, "limit of open files");
    let limits = Limits::new(config.limits, files);

    let compiled = views.borrow().cluster.clone();
    let mut first = policy::compile(&compiled, &options, None);
    first.generation = datapath.first_generation();
    let (snapshots, snapshot) = watch::channel(Arc::new(first));
    let registry = open::Registry::new(names.clone(), config.metrics_label_sets);
    let tallies = tally::Tallies::default();
    let (ask, questions) = mpsc::channel(8);
    let connections = open::Connections::new(registry.clone(), ask.clone());
    let limit = Limit::new(config.log_limit, config.workers);
    let (tracer, exporter) = match &config.otlp_endpoint {
        Some(endpoint) => {
            let (endpoint, node_name) = (endpoint.clone(), config.node_name.clone());
            let (tracer, exporter) =
                trace::Exporter::start(trace::Config { endpoint, node_name, names: names.clone() })?;
            (tracer, Some(exporter))
        }
        None => (trace::Tracer::default(), None),
    };
    let sources = metrics::Sources {
        registry: registry.clone(),
        tallies: tallies.clone(),
        access: log.clone(),
        log: lines,
        limit: limit.clone(),
        spans: tracer.counts(),
    };
    let until = |mut end: watch::Receiver<()>| async move {
        // Closed at the end; never sent to.
        let _ = end.changed().await;
    };
    let (answering, answers) = watch::channel(false);
    let (relieved, until_relieved) = watch::channel(());
    let mut exposition = exposition::Server::start(
        move || metrics_port.listen(),
        answers.clone(),
        until(until_relieved.clone()),
        sources,
        ask,
    )?;
    let mut admin = admin::Server::start(ports, answers, until(until_relieved), ready.clone(), settings.level.clone())?;
    if datapath.predecessor()? != Predecessor::Serving {
        // Nobody else answers: what is missing can be asked for from now on.
        answering.send_replace(true);
    }
    let (states, enrolled) = watch::channel(Arc::default());
    let looking = client.clone().map(|client| runtimes::tell(client).map(|never| match never {}).boxed_local());
    let announcing = client.clone().map(|client| {
        let (name, ready) = (config.node_name.clone(), ready.clone());
        announce::run(client, name, ready, views.clone(), enrolled.clone()).map(|never| match never {}).boxed_local()
    });
    let (in_force, told) = watch::channel(Arc::default());
    let reporting =
        report_config(&config).map(|to| report::run(to, ready.clone(), told).map(|never| match never {}).boxed_local());
    admin.publish(admin::Handles {
        node_name: config.node_name.clone(),
        started_at: admin::dump::unix_now(),
        snapshot: snapshot.clone(),
        views: views.clone(),
        nodes: nodes.clone(),
        enrolled,
        connections,
        identities: identities.clone(),
        ready: ready.clone(),
        options: options.clone(),
        pin_dir: datapath.pin_dir().to_owned(),
        settings: settings.shown.subscribe(),
    });
    let (mut draining, drain) = drain::channel();
    let workers = (0..config.workers)
        .map(|number| {
            let sockets = datapath.sockets()?;
            let (snapshot, identities, log) = (snapshot.clone(), identities.clone(), log.clone());
            let (names, drained, open) = (names.clone(), drain.clone(), registry.shard());
            let (tally, tracer, limiter) = (tallies.tally(), tracer.clone(), limit.limiter());
            let (workers, refuse_mismatch) = (config.workers as usize, config.refuse_mismatch);
            Worker::start(number, drain.clone(), config.busy_poll, move || {
                let tunnels = tunnel::Config::default();
                // Each worker has a pool.
                let tunnels = tunnel::Config { max_idle: tunnels.max_idle.div_ceil(workers), ..tunnels };
                Ok(Context {
                    snapshot,
                    identities,
                    pool: tunnel::Pool::counted(tunnels, tally.clone()),
                    tunnel: tunnels,
                    refuse_mismatch,
                    sockets: sockets.into(),
                    open,
                    tally,
                    tracer,
                    limiter: limiter.into(),
                    access: log,
                    names,
                    drain: drained,
                })
            })
        })
        .collect::<anyhow::Result<Vec<_>>>()?;
    drop(drain);
    let passed = Passed::new(
        datapath.events()?,
        datapath.storage_fd()?,
        datapath.older()?,
        log.clone(),
        registry.shard(),
        names,
        limit.limiter(),
    );
    datapath.refuse_udp(NetnsCookie(0), config.udp_refused)?;
    let guard = enroll::Guard {
        node: host.clone(),
        veths: config.veth_filter,
        udp_refused: config.udp_refused,
        gate_open: config.gate_open,
    };
    // Before they are listed for the first time, so that none is missed.
    let addresses = addresses::Changes::here().context("follow the node's addresses")?;
    let views_at_end = views.clone();
    let mut control = Control {
        settings,
        hangup: signal(SignalKind::hangup()).context("listen for SIGHUP")?,
        views,
        nodes,
        options,
        datapath,
        workers,
        enrollments: Enrollments::new(limits.clone(), guard),
        limits,
        states,
        in_force,
        passed,
        registry,
        questions,
        forgotten: Instant::now(),
        proved: Instant::now(),
        accounted: Instant::now(),
        compiles: (0, Duration::ZERO),
        give_back_at: None,
        compiled,
        identities,
        host,
        addresses,
        has_addresses: false,
        kubelet: None,
        snapshots,
        unjudged: BTreeMap::new(),
        retry: false,
        failed: 0,
        stuck: false,
        stage: Stage::Preparing { since: Instant::now(), said: None },
        ready: ready.clone(),
        first_pass: Some(first_pass),
        knows_all: false,
        unread: None,
        answering,
        looked_at_file: Instant::now(),
    };

    let (ended, until_end) = watch::channel(());
    let renewing = renewal.run(until(until_end));
    let (failed, admin_failed) = (exposition.failed(), admin.failed());
    let source_ended = || anyhow!("the source of the cluster's objects has ended");
    let mut others: Others<'_> = [
        async { reading.await.err().unwrap_or_else(source_ended) }.boxed_local(),
        failed.boxed_local(),
        admin_failed.boxed_local(),
        renewing.map(|()| anyhow!("the renewal of certificates has ended")).boxed_local(),
    ]
    .into_iter()
    .chain(looking)
    .chain(announcing)
    .chain(reporting)
    .chain(following)
    .collect();
    let mut end = tokio::select! {
        () = &mut stop => Ok(Cause::End),
        result = control.run() => result.map(|()| Cause::HandedOver),
        Some(error) = others.next() => Err(error),
    };
    let mut deadline = control.settings.config.drain_deadline;
    let mut leaves = false;
    if let (Ok(Cause::End), Some(daemonset)) = (&end, &daemonset) {
        (end, leaves) = tokio::select! {
            verdict = daemonset.verdict() => (Ok(Cause::End), tell_verdict(verdict, &config)),
            result = control.run() => (result.map(|()| Cause::HandedOver), false),
            Some(error) = others.next() => (Err(error), false),
        };
    }
    if let Ok(Cause::End) = end
        && control.datapath.has_successor()
    {
        let (begun, patience) = (Instant::now(), deadline / 2);
        info!(?patience, "another agent prepares itself to serve: going on until it has taken over");
        end = tokio::select! {
            () = tokio::time::sleep(patience) => Ok(Cause::End),
            result = control.run() => result.map(|()| Cause::HandedOver),
            Some(error) = others.next() => Err(error),
        };
        deadline = deadline.saturating_sub(begun.elapsed());
    }
    leaves &= matches!(end, Ok(Cause::End)) && !control.datapath.has_successor();
    let cause = *end.as_ref().unwrap_or(&Cause::End);
    let _draining = ready.hold("the agent is draining: it ends");
    let mut told = announce::States::default();
    match cause {
        Cause::HandedOver => {
            info!(?deadline, "another agent has taken over: draining");
            drop(relieved);
        }
        Cause::End if leaves => {
            info!(?deadline, "leaving the node: its pods are out of the mesh, and open connections drain");
            told = control.leave();
        }
        Cause::End => {
            info!(?deadline, "draining");
            // Without a successor nobody serves the pods: refuse now, not in ten seconds.
            if let Err(error) = control.datapath.silence() {
                error!(error = format!("{error:#}"), "the kernel could not be told that the agent ends");
            }
        }
    }
    let withdrawn = async {
        if let Some(client) = client.filter(|_| leaves)
            && let Err(error) = announce::withdraw(&client, &config.node_name, &views_at_end, &told).await
        {
            warn!(error = format!("{error:#}"), "the API server could not be told that the pods are out of the mesh");
        }
    };
    let drained = async { tokio::join!(draining.drain(cause, deadline), withdrawn).0 };
    let drained = meanwhile(drained, control.follow(), &mut others).await;
    if let Err(unfinished) = drained {
        warn!(workers = unfinished.0, "not everything ended by the deadline");
    }
    drop(ended);
    control.workers.drain(..).for_each(|worker| worker.join(LAST_PATIENCE));
    control.tell();
    watcher.stop()?;
    if leaves {
        control.clean();
    }
    drop(control);
    exposition.stop();
    admin.stop();
    drop(tracer);
    if let Some(exporter) = exporter {
        exporter.stop();
    }
    drop(log);
    match writer.finish(LAST_PATIENCE) {
        Ok(0) => {}
        Ok(dropped) => warn!(dropped, "lines of the access log were lost: its reader was too slow"),
        // Its last lines are lost, and the end is as it was to be.
        Err(error) => warn!(%error, "finish the access log"),
    }
    info!("the agent ends");
    end.map(drop)
}

/// What runs beside the thread's own work, each until it fails; whatever becomes of one, the others go on.
type Others<'a> = FuturesUnordered<LocalBoxFuture<'a, anyhow::Error>>;

/// Waits for the end of the drain. Policy is followed as long as that takes, also where one of the others fails: manifests
/// that can still be read are read, certificates that can still be had are renewed.
async fn meanwhile<T>(
    drained: impl Future<Output = T>,
    followed: impl Future<Output = Infallible>,
    others: &mut Others<'_>,
) -> T {
    let told = async {
        while let Some(error) = others.next().await {
            warn!(error = format!("{error:#}"), "while draining");
        }
        std::future::pending::<Infallible>().await
    };
    tokio::select! {
        drained = drained => drained,
        never = followed => match never {},
        never = told => match never {},
    }
}

/// The configuration, and what it takes to change it while the agent runs.
struct Settings {
    config: Config,
    again: Again,
    level: LogLevel,
    /// For operators.
    shown: watch::Sender<Arc<BTreeMap<&'static str, config::Given>>>,
}

impl Settings {
    fn new(config: Config, again: Again, level: LogLevel) -> Self {
        let shown = watch::Sender::new(Arc::new(config.given.clone()));
        Self { config, again, level, shown }
    }

    /// Reads the configuration again. What can change, changes; a configuration that is wrong changes nothing.
    fn reload(&mut self, limits: &Limits) {
        let next = match self.again.read() {
            Ok(next) => next,
            Err(error) => {
                // Several wrong values are several lines elsewhere.
                let error = format!("{error:#}").replace('\n', "; ");
                return error!(error, "the new configuration is wrong and changes nothing");
            }
        };
        let (live, fixed): (Vec<_>, Vec<_>) =
            self.config.differences(&next).into_iter().partition(|name| agent::LIVE.contains(name));
        if live.contains(&"log-level")
            && let Err(error) = self.level.set(&next.log_level)
        {
            return error!(error = format!("{error:#}"), "the new configuration changes nothing");
        }
        if !fixed.is_empty() {
            warn!(settings = fixed.join(", "), "settings that are other ones now need a new start of the agent");
        }
        if !live.is_empty() {
            let values: Vec<String> = live
                .iter()
                .map(|name| format!("{name}={}", next.given.get(name).map_or("(default)", |given| &given.value)))
                .collect();
            info!(settings = values.join(", "), "settings changed");
        }
        for name in live {
            match next.given.get(name) {
                Some(given) => drop(self.config.given.insert(name, given.clone())),
                None => drop(self.config.given.remove(name)),
            }
        }
        self.shown.send_replace(Arc::new(self.config.given.clone()));
        self.config.log_level = next.log_level;
        self.config.drain_deadline = next.drain_deadline;
        self.config.limits = next.limits;
        limits.set(next.limits);
    }
}

/// How far an agent has come.
#[derive(Clone, Copy, Debug)]
enum Stage {
    /// It fills its maps.
    Preparing {
        since: Instant,
        /// When it last said what it waits for.
        said: Option<Instant>,
    },
    /// It serves the node's pods.
    Serving,
}

/// The thread that controls, and what only it touches.
struct Control {
    settings: Settings,
    hangup: tokio::signal::unix::Signal,
    views: watch::Receiver<Arc<View>>,
    nodes: watch::Receiver<Arc<pods::Node>>,
    options: policy::Options,
    datapath: Datapath,
    workers: Vec<Worker>,
    enrollments: Enrollments,
    limits: Arc<Limits>,
    /// Where each pod stands, for operators.
    states: watch::Sender<Arc<BTreeMap<PodUid, enroll::State>>>,
    /// What holds for every pod of the node and every connection, for whoever counts that.
    in_force: watch::Sender<Arc<report::InForce>>,
    passed: Passed,
    registry: open::Registry,
    /// What operators and metrics want to know.
    questions: mpsc::Receiver<metrics::Question>,
    /// When metrics of workloads that are gone were last dropped.
    forgotten: Instant,
    /// When it was last proved that the pods' connections are the mesh's.
    proved: Instant,
    /// When the kernel's counters were last compared with what was told of them.
    accounted: Instant,
    /// How often policy was compiled, and how long it took the last time.
    compiles: (u64, Duration),
    /// When text that has run is given back; `None` until it serves.
    give_back_at: Option<Instant>,
    /// What the snapshot in force comes from.
    compiled: Arc<Cluster>,
    identities: Identities,
    host: Arc<NetnsHandle>,
    addresses: addresses::Changes,
    /// The kernel has the node's addresses, as far as is known.
    has_addresses: bool,
    kubelet: Option<Kubelet>,
    snapshots: watch::Sender<Arc<Snapshot>>,
    /// Pods whose open connections have not been judged by the policy in force yet.
    unjudged: BTreeMap<PodUid, Unjudged>,
    /// Something failed and is to be tried again.
    retry: bool,
    /// Pods that could not be brought in by the last pass.
    failed: usize,
    /// A worker does not move, and it was said.
    stuck: bool,
    stage: Stage,
    ready: readiness::Ready,
    /// Until this agent serves.
    first_pass: Option<readiness::Hold>,
    /// Everything that there is to read was read once.
    knows_all: bool,
    /// What could not be read, until then.
    unread: Option<(String, readiness::Hold)>,
    /// Says that the node's ports are this agent's to answer on.
    answering: watch::Sender<bool>,
    looked_at_file: Instant,
}

#[derive(Clone, Copy, Debug, Default)]
struct Unjudged {
    /// The pod has just been brought in.
    entered: bool,
    /// That it failed has been said.
    told: bool,
    /// It has been judged once: what was on its way through the kernel at that moment is there by now.
    again: bool,
}

impl Control {
    /// Prepares, takes over, and serves until another agent has taken over. May be called again where it was dropped.
    async fn run(&mut self) -> anyhow::Result<()> {
        let wakes = self.passed.wakes().as_fd().try_clone_to_owned().context("duplicate the events' descriptor")?;
        // SAFETY: an OwnedFd is open, and the same descriptor, until the AsyncFd that owns it is dropped.
        let wakes = unsafe { AsyncFd::register_with_interest(wakes, Interest::READABLE) }
            .context("poll the kernel's events")?;
        let mut tick = interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut work = true;
        loop {
            if self.is_relieved() {
                return Ok(());
            }
            if std::mem::take(&mut work) {
                let view = self.views.borrow_and_update().clone();
                let node = self.nodes.borrow_and_update().clone();
                self.guard(&node)?;
                self.remark(&view);
                if self.knows_all(&view) {
                    self.compile(&view, &node);
                    self.settle(&node);
                    if let Stage::Serving = self.stage {
                        if self.first_pass.is_some() {
                            self.begin();
                        }
                        self.report(&view);
                    }
                }
            }
            tokio::select! {
                changed = self.views.changed() => {
                    changed.context("the source of the cluster's objects has ended")?;
                    work = true;
                }
                changed = self.nodes.changed() => {
                    changed.context("watching the pods of this node has ended")?;
                    work = true;
                }
                woken = wakes.readable() => {
                    woken.context("poll the kernel's events")?.clear_ready();
                    self.tell();
                }
                _ = self.hangup.recv() => {
                    info!("SIGHUP: reading configuration and certificates again");
                    self.settings.reload(&self.limits);
                    self.identities.reload();
                }
                Some(question) = self.questions.recv() => self.answer(question),
                _ = tick.tick() => {
                    anyhow::ensure!(!self.workers.iter().any(Worker::has_ended), "a worker's thread has ended");
                    self.look_at_file();
                    self.beat()?;
                    if self.may_take_over()? {
                        self.take_over()?;
                    }
                    self.tell_addresses();
                    self.datapath.maintain();
                    self.enrollments.refuse_waiting(&mut self.datapath);
                    self.account();
                    if let Stage::Serving = self.stage && !self.settings.config.gate_open {
                        self.enrollments.tell_held();
                    }
                    self.forget();
                    self.give_back();
                    if let Stage::Serving = self.stage
                        && self.proved.elapsed() >= PROVE
                    {
                        self.prove();
                    }
                    work = std::mem::take(&mut self.retry);
                }
            }
        }
    }

    /// While connections drain, policy goes on to hold for them ([D.1]); nothing of the kernel's is changed any more.
    async fn follow(&mut self) -> Infallible {
        let mut tick = interval(TICK);
        loop {
            tokio::select! {
                Ok(()) = self.views.changed() => {
                    let (view, node) = (self.views.borrow_and_update().clone(), self.nodes.borrow().clone());
                    self.compile(&view, &node);
                }
                Some(question) = self.questions.recv() => self.answer(question),
                _ = tick.tick() => self.account(),
            }
        }
    }

    /// Takes every pod of the node out of the mesh: what is new passes by it, what is open goes on. Gives where they stood.
    fn leave(&mut self) -> announce::States {
        let stood = self.states.send_replace(Arc::default());
        // One that does not serve yet has written nothing that is asked.
        if let Stage::Serving = self.stage {
            self.enrollments.leave_all(&mut self.datapath, &self.workers);
        }
        if let Err(error) = self.datapath.gate(None) {
            error!(error = format!("{error:#}"), "the gate for pods that are not known yet could not be opened");
        }
        stood
    }

    /// Leaves the node as it was before its first agent.
    fn clean(&mut self) {
        match self.datapath.clean(|line| debug!("{line}")) {
            Ok(()) => info!("nothing of the mesh is left on this node"),
            Err(error) => {
                let pin_dir = self.settings.config.pin_dir.display();
                error!(
                    error = format!("{error:#}"),
                    "not everything could be removed: run `culvert node clean --pin-dir {pin_dir}` on this node"
                );
            }
        }
    }

    fn is_relieved(&mut self) -> bool {
        match self.stage {
            Stage::Preparing { .. } => false,
            Stage::Serving => !self.datapath.serves(),
        }
    }

    fn look_at_file(&mut self) {
        if self.looked_at_file.elapsed() >= LOOK_AT_FILE {
            self.looked_at_file = Instant::now();
            if self.settings.again.file_changed() {
                info!("the configuration's file has changed: reading it again");
                self.settings.reload(&self.limits);
            }
        }
    }

    /// Whether it is time to take over: nobody serves, or this agent can do it as well as the one that does.
    fn may_take_over(&mut self) -> anyhow::Result<bool> {
        let Stage::Preparing { since, said } = &mut self.stage else { return Ok(false) };
        match self.datapath.predecessor()? {
            // Whoever serves knows more.
            Predecessor::Serving if !self.knows_all => return Ok(false),
            Predecessor::Serving => {}
            Predecessor::Gone | Predecessor::Silent => {
                self.answering.send_replace(true);
                // What an earlier agent has left refuses its pods for want of a sign of life, and lets the others alone; where
                // there is nothing, every pod is held.
                return Ok(self.knows_all || !self.datapath.has_remains());
            }
        }
        let status = self.identities.status();
        let missing: Vec<String> = status
            .iter()
            .filter(|one| one.state != identity::State::Serving)
            .map(|one| match &one.last_error {
                Some(error) => format!("{}: {error}", one.identity),
                None => one.identity.to_string(),
            })
            .collect();
        // Without a single one the CA is not there, and the agent that serves has what it had.
        let patience_ends = missing.len() < status.len() && since.elapsed() >= CERTIFICATE_PATIENCE;
        if self.failed == 0 && (missing.is_empty() || patience_ends) {
            return Ok(true);
        }
        if said.map_or(since.elapsed() >= SAY_AGAIN / 2, |at| at.elapsed() >= SAY_AGAIN) {
            *said = Some(Instant::now());
            warn!(
                certificates = missing.join(", "),
                pods = self.failed,
                "not taking over yet: certificates are missing, or pods could not be enrolled"
            );
        }
        Ok(false)
    }

    fn take_over(&mut self) -> anyhow::Result<()> {
        let failed = self.datapath.take_over().context("take over")?;
        self.stage = Stage::Serving;
        for (cookie, error) in failed {
            self.retry = true;
            self.enrollments.not_attached(cookie, &error, &self.workers);
        }
        self.answering.send_replace(true);
        if self.knows_all {
            self.begin();
            // The next pass says what is in force.
            self.retry = true;
        }
        Ok(())
    }

    /// Says what is in force, which is what `view` says if the kernel has taken all of it and open connections were judged by
    /// it; the workers have had it since it was compiled.
    fn report(&self, view: &View) {
        if self.failed == 0 && !self.unjudged.values().any(|left| left.told) {
            report::InForce::publish(&self.in_force, view);
        }
    }

    /// Settles what an earlier agent left: from now on this one serves every pod that it knows.
    fn begin(&mut self) {
        let (snapshot, node) = (self.snapshots.borrow().clone(), self.nodes.borrow().clone());
        self.enrollments.adopt(&mut self.datapath, &snapshot, &node);
        let left_behind = self.datapath.left_behind();
        let enrollments = &self.enrollments;
        let stranger = |cookie| stranger(&node, &snapshot, cookie);
        self.passed.tell_left_behind(&snapshot, left_behind, |cookie| enrollments.by_cookie(cookie), stranger);
        self.judge_again(&snapshot);
        self.first_pass = None;
        info!(generation = snapshot.generation, pods = node.pods.len(), "ready");
        self.give_back_at = Some(Instant::now() + FIRST_GIVE_BACK);
    }

    /// Whether all that there is to read has been read once. Until then nothing that the source says can be relied on: the
    /// policy that it does not show may be the one that forbids ([D.2]). What becomes unreadable later stays in force.
    fn knows_all(&mut self, view: &View) -> bool {
        if self.knows_all || view.unread.is_empty() {
            self.knows_all = true;
            self.unread = None;
        } else {
            let unread = view.unread.join(", ");
            let name = format!("source: what {unread} says is not known; no pod is served until it can be read");
            if self.unread.as_ref().is_none_or(|(said, _)| *said != name) {
                error!(
                    unread,
                    "not everything can be read, and what it says is not known: no pod is served until it is"
                );
                self.unread = Some((name.clone(), self.ready.hold(name)));
            }
        }
        self.knows_all
    }

    /// Tells operators which kinds of objects the API server does not tell anything new of. What is known stays in force, so
    /// the agent is as ready as it was ([D.3]).
    fn remark(&mut self, view: &View) {
        let deaf = view.watched.iter().filter_map(|(kind, watched)| Some((kind, watched.error.as_ref()?)));
        let remarks: Vec<String> = deaf
            .map(|(kind, error)| format!("source: {kind} as last heard, since the API server cannot be heard: {error}"))
            .collect();
        self.ready.remark(remarks);
    }

    fn give_back(&mut self) {
        if self.give_back_at.is_none_or(|at| Instant::now() < at) {
            return;
        }
        self.give_back_at = Some(Instant::now() + GIVE_BACK);
        match resident::give_back_text() {
            Ok(kib) => debug!(kib, "text of the program that does not run is not resident any more"),
            // It holds more than it needs, and is right.
            Err(error) => debug!(error = format!("{error:#}"), "the program's text stays resident"),
        }
    }

    /// From what the source says to a snapshot; the workers see it at once.
    fn compile(&mut self, view: &View, node: &pods::Node) {
        if self.compiles.0 > 0 && Arc::ptr_eq(&self.compiled, &view.cluster) {
            // Another pod of the node, or news of the source itself.
            return;
        }
        let before = self.snapshots.borrow().clone();
        let begun = Instant::now();
        let last = policy::Before { cluster: &self.compiled, snapshot: &before };
        let next = policy::compile(&view.cluster, &self.options, Some(last));
        self.compiled = view.cluster.clone();
        self.compiles = (self.compiles.0 + 1, begun.elapsed());
        for warning in next.warnings.iter().filter(|warning| before.warnings.binary_search(warning).is_err()) {
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

    /// Tells the kernel what it needs to know of the node, whatever the source says: whose probes are let in, and where the
    /// pods begin that are held until they are known.
    fn guard(&mut self, node: &pods::Node) -> anyhow::Result<()> {
        self.tell_kubelet(&node.kubelet)?;
        self.tell_addresses();
        let roots = (!self.settings.config.gate_open).then_some(&*node.roots);
        if let Err(error) = self.datapath.gate(roots) {
            error!(
                error = format!("{error:#}"),
                "the gate for pods that are not known yet is not as it should be: trying again"
            );
            self.retry = true;
        }
        Ok(())
    }

    /// Makes the node equal to the snapshot.
    fn settle(&mut self, node: &pods::Node) {
        let snapshot = self.snapshots.borrow().clone();
        self.identities.want(&Enrollments::identities(&snapshot, node));
        let changes = self.enrollments.reconcile(&mut self.datapath, &self.workers, &snapshot, node);
        self.failed = changes.failed;
        self.retry |= changes.failed > 0 || changes.leaving > 0;
        self.states.send_replace(Arc::new(self.enrollments.states()));
        for uid in changes.changed {
            self.unjudged.entry(uid).or_default().again = false;
        }
        self.unjudged
            .extend(changes.entered.into_iter().map(|uid| (uid, Unjudged { entered: true, ..Unjudged::default() })));
        if let Stage::Serving = self.stage {
            self.judge_again(&snapshot);
        }
    }

    /// Judges open connections where policy has changed; what fails stays to be done ([D.1]).
    fn judge_again(&mut self, snapshot: &Snapshot) {
        for (uid, mut left) in std::mem::take(&mut self.unjudged) {
            let (Some(pod), Some(own)) = (self.enrollments.pod(&uid), snapshot.workload(&uid)) else { continue };
            let by_agent = own.authorization.judges() || self.datapath.is_judged_by_agent(pod.cookie);
            let occasion = connections::Occasion { entered: left.entered, by_agent };
            if let Err(error) = self.passed.judge_again(snapshot, pod, own, occasion) {
                if !std::mem::replace(&mut left.told, true) {
                    let error = format!("{error:#}");
                    warn!(pod = %own.object, error, "open connections could not be judged again; trying on");
                }
                self.retry = true;
                self.unjudged.insert(uid, left);
            } else if by_agent && !left.again {
                self.retry = true;
                self.unjudged.insert(uid, Unjudged { again: true, ..Unjudged::default() });
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
                // Which says that it is not known.
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

    /// Tells the kernel of the node's addresses, if they have changed.
    fn tell_addresses(&mut self) {
        if !self.addresses.any() && self.has_addresses {
            return;
        }
        let told = addresses::here().context("list the node's addresses");
        match told.and_then(|all| self.datapath.node_addresses(&all)) {
            Ok(()) => self.has_addresses = true,
            Err(error) => {
                self.has_addresses = false;
                let error = format!("{error:#}");
                warn!(
                    error,
                    "the node's addresses are not all known: static pods that no agent knows may not be reached there"
                );
            }
        }
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
        let counted = match question {
            // Before what was counted is told.
            metrics::Question::Plaintext(_) => self.datapath.verdicts(),
            _ => Vec::new(),
        };
        self.tell();
        let question = match question {
            // Who asked may have gone.
            metrics::Question::Proof(reply) => return drop(reply.send(Box::new(self.prove()))),
            metrics::Question::Refusals(done) => {
                let _ = done.send(());
                return;
            }
            other => other,
        };
        let snapshot = self.snapshots.borrow().clone();
        self.passed.refresh(&snapshot, self.enrollments.pods());
        // Who asked may have gone.
        match question {
            metrics::Question::Connections(done) => drop(done.send(())),
            metrics::Question::Node(reply) => drop(reply.send(Box::new(self.facts(&snapshot)))),
            metrics::Question::Plaintext(reply) => {
                let enrollments = &self.enrollments;
                let unseen = self.passed.unseen(&snapshot, &counted, |cookie| enrollments.by_cookie(cookie));
                drop(reply.send(unseen));
            }
            metrics::Question::Proof(_) | metrics::Question::Refusals(_) => {}
        }
    }

    /// Tells what the kernel has reported, and from time to time what it has counted without a report.
    fn account(&mut self) {
        if self.accounted.elapsed() < ACCOUNT {
            self.tell();
        } else {
            self.accounted = Instant::now();
            let counted = self.datapath.verdicts();
            self.tell();
            let (snapshot, enrollments) = (self.snapshots.borrow().clone(), &self.enrollments);
            let again = self.passed.account(&snapshot, &counted, |cookie| enrollments.by_cookie(cookie));
            self.judge_later(&again);
        }
        self.registry.gather();
    }

    /// Looks at the sockets of all pods whose open connections have been judged since they were brought in.
    fn prove(&mut self) -> open::Proof {
        self.proved = Instant::now();
        let snapshot = self.snapshots.borrow().clone();
        let unjudged = &self.unjudged;
        self.passed.prove(&snapshot, self.enrollments.pods().filter(|pod| !unjudged.contains_key(&pod.uid)))
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
            judged_by_agent: self.datapath.judged_by_agent(),
            held: if self.settings.config.gate_open { 0 } else { self.enrollments.held() },
            strays: self.passed.strays(),
            certificates: self
                .identities
                .status()
                .into_iter()
                .map(|status| (status.identity.to_string(), status.expires_at))
                .collect(),
            certificate_requests: self.identities.requests(),
            watches: {
                let view = self.views.borrow();
                let watched = view.watched.iter();
                let watch = |(kind, watched): (&&'static str, &source::Watched)| metrics::Watch {
                    kind,
                    up: watched.listed && watched.error.is_none(),
                    errors: watched.errors,
                };
                watched.map(watch).collect()
            },
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
        let (snapshot, node) = (self.snapshots.borrow().clone(), self.nodes.borrow().clone());
        let enrollments = &self.enrollments;
        let stranger = |cookie| stranger(&node, &snapshot, cookie);
        let again = self.passed.tell(&snapshot, |cookie| enrollments.by_cookie(cookie), stranger);
        self.passed.watch(&snapshot, |cookie| enrollments.by_cookie(cookie));
        self.judge_later(&again);
    }

    /// Connections of these pods are open that policy forbids, as far as anybody knows.
    fn judge_later(&mut self, pods: &BTreeSet<NetnsCookie>) {
        for pod in pods.iter().filter_map(|cookie| self.enrollments.by_cookie(*cookie)) {
            self.unjudged.entry(pod.uid.clone()).or_default().again = false;
            self.retry = true;
        }
    }
}

/// The pod of the node that has this network namespace and is not in the mesh.
fn stranger(node: &pods::Node, snapshot: &Snapshot, cookie: NetnsCookie) -> Option<Stranger> {
    node.pods.values().find_map(|pod| match &pod.network {
        PodNetwork::Own(netns) if netns.cookie().is_ok_and(|own| own == cookie.0) => {
            // Gone meanwhile: it had some.
            let ips = enroll::own_addresses(netns).unwrap_or_default();
            Some(Stranger { workload: snapshot.workload(&pod.uid).cloned(), ips })
        }
        PodNetwork::Own(_) | PodNetwork::Host | PodNetwork::Pending => None,
    })
}

/// Says what follows from the DaemonSet for an agent that ends. Gives whether it leaves its node for good.
fn tell_verdict(verdict: leave::Verdict, config: &Config) -> bool {
    match verdict {
        leave::Verdict::Leaves => true,
        leave::Verdict::Stays => {
            info!("the DaemonSet is there: pods of the mesh are refused until its next agent serves");
            false
        }
        leave::Verdict::Unknown(error) => {
            error!(
                error,
                "whether the DaemonSet is deleted is not known: pods of the mesh are refused until an agent serves; if none will, \
                 run `culvert node clean --pin-dir {}` on this node",
                config.pin_dir.display()
            );
            false
        }
    }
}

fn options(config: &Config) -> policy::Options {
    policy::Options {
        revision: config.revision.clone(),
        exclude_namespaces: config.exclude_namespaces.clone(),
        own_accounts: BTreeSet::from([ObjectRef::new(config.system_namespace.as_str(), "culvert")]),
    }
}

fn report_config(config: &Config) -> Option<report::Config> {
    let Certificates::Ca { root, server_name, token, .. } = &config.certificates else { return None };
    Some(report::Config {
        address: config.control_address.clone()?,
        root_file: root.clone(),
        server_name: server_name.clone(),
        token_file: token.clone(),
    })
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

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    /// [D.1] holds until the drain has ended, whatever fails meanwhile: policy is followed, and what has not failed goes on.
    #[tokio::test]
    async fn what_fails_while_draining_ends_nothing_else() {
        let (followed, read) = (Cell::new(0), Cell::new(0));
        let (enough, mut until_enough) = watch::channel(());
        let drained = async {
            until_enough.changed().await.expect("its sender lives as long as the test");
            "drained"
        };
        let follow = async {
            loop {
                tokio::task::yield_now().await;
                followed.set(followed.get() + 1);
                if followed.get() >= 100 && read.get() >= 100 {
                    enough.send_replace(());
                }
            }
        };
        let mut others: Others<'_> = [
            async {
                tokio::task::yield_now().await;
                anyhow!("the first to fail")
            }
            .boxed_local(),
            async {
                loop {
                    tokio::task::yield_now().await;
                    read.set(read.get() + 1);
                }
            }
            .boxed_local(),
            std::future::ready(anyhow!("it had failed before")).boxed_local(),
        ]
        .into_iter()
        .collect();
        assert_eq!(others.next().await.map(|error| error.to_string()).as_deref(), Some("it had failed before"));
        let ended = meanwhile(drained, follow, &mut others);
        assert_eq!(tokio::time::timeout(Duration::from_secs(60), ended).await, Ok("drained"));
        assert_eq!(others.len(), 1, "only what has failed is gone");
    }
}
