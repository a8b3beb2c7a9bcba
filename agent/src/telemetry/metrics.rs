//! What a scrape gets: the catalogue of all metrics, and from what the agent knows to their samples (specification §16).
//!
//! Values come from the registry of connections, from the workers' tallies and, for what only the thread that controls
//! knows, from its answer to a question ([`Question`]). Serving the text is for `exposition`.

use std::{borrow::Cow, fmt, fs, sync::Arc, time::Duration};

use culvert_common::LAYOUT_VERSION;
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric, LabelSetEncoder, MetricEncoder},
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge},
    registry::Registry as Encoder,
};
use tokio::sync::oneshot;

use super::{
    access::{AccessLog, Direction},
    limit::Limit,
    lines::Lines,
    open::{Carried, Proof, Registry, Traffic},
    panics,
    tally::{Handshake, Side, Sums, Tallies},
    trace,
    traffic::{self, Flag, Labels},
};
use crate::model::ObjectRef;

/// What kind of metric; only these two are used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Only ever grows; its samples' names end in `_total`.
    Counter,
    /// Goes up and down.
    Gauge,
}

/// A row of the catalogue.
#[derive(Clone, Copy, Debug)]
pub struct Metric {
    /// Name, for a counter without `_total`.
    pub name: &'static str,
    /// Its kind.
    pub kind: Kind,
    /// What it counts, with the unit.
    pub help: &'static str,
    /// Names of its labels.
    pub labels: &'static [&'static str],
}

impl Metric {
    /// The name that samples have.
    pub fn sample_name(&self) -> String {
        match self.kind {
            Kind::Counter => format!("{}_total", self.name),
            Kind::Gauge => self.name.to_owned(),
        }
    }
}

const fn counter(name: &'static str, help: &'static str, labels: &'static [&'static str]) -> Metric {
    Metric { name, kind: Kind::Counter, help, labels }
}

const fn gauge(name: &'static str, help: &'static str, labels: &'static [&'static str]) -> Metric {
    Metric { name, kind: Kind::Gauge, help, labels }
}

const TRAFFIC: &[&str] = &{
    let mut names = [""; traffic::LABELS.len() + 1];
    let mut at = 0;
    while at < traffic::LABELS.len() {
        names[at] = traffic::LABELS[at];
        at += 1;
    }
    names[at] = "response_flags";
    names
};

/// Every metric of the agent, in the order of the exposition.
pub const METRICS: &[Metric] = &[
    counter("istio_tcp_connections_opened", "Connections admitted for processing, before the verdict", TRAFFIC),
    counter("istio_tcp_connections_closed", "Connections that ended, for any reason", TRAFFIC),
    counter("istio_tcp_connections_failed", "Connections that ended with a failure flag", TRAFFIC),
    counter("istio_tcp_received_bytes", "Bytes from client to server, those of open connections too", TRAFFIC),
    counter("istio_tcp_sent_bytes", "Bytes from server to client, those of open connections too", TRAFFIC),
    gauge("istio_tcp_sockets_open", "Open connections", &["reporter"]),
    gauge("istio_build", "Always 1; the labels say which version runs", &["component", "tag"]),
    gauge("culvert_open_connections", "Open connections by how they are carried", &["reporter", "carried"]),
    gauge("culvert_tunnel_connections", "Tunnel connections that stand; those of clients are the pool", &["side"]),
    gauge("culvert_tunnel_streams", "Connections of applications inside tunnels", &["side"]),
    counter("culvert_tls_handshakes", "Handshakes of tunnels that ended, by how", &["side", "result"]),
    counter("culvert_refusals", "Connections that the agent itself refused", &["reporter", "reason"]),
    counter(
        "culvert_kernel_verdicts",
        "Verdicts of the kernel programs since the pod was enrolled",
        &["namespace", "pod", "direction", "answer", "reason"],
    ),
    counter("culvert_identity_address_mismatches", "Tunnels from the address of a pod with another identity", &[]),
    gauge(
        "culvert_certificate_expiry_timestamp_seconds",
        "When the certificate is no longer valid, seconds since the epoch; 0 while there is none",
        &["identity"],
    ),
    counter("culvert_certificate_requests", "Certificates asked of the CA, or read from the folder", &["result"]),
    gauge(
        "culvert_api_watch_up",
        "1 while the API server tells what changes of a kind; 0: what is known of it stays in force",
        &["kind"],
    ),
    counter("culvert_api_watch_errors", "Answers of the API server that were errors, or did not come", &["kind"]),
    gauge("culvert_snapshot_generation", "Generation of the policy in force", &[]),
    counter("culvert_snapshot_compiles", "Times that policy was compiled", &[]),
    gauge("culvert_snapshot_compile_seconds", "How long the last compilation took", &[]),
    gauge("culvert_enrolled_pods", "Pods of this node that are in the mesh", &[]),
    gauge(
        "culvert_enrolment_failures",
        "Pods of this node that could not be brought into the mesh, and are refused",
        &[],
    ),
    gauge(
        "culvert_pods_judged_by_agent",
        "Pods whose verdicts on plaintext the agent gives, since their policy does not fit into the kernel",
        &[],
    ),
    gauge(
        "culvert_gated_pods",
        "Pods of this node that the gate holds, because it is not known yet whether they are in the mesh",
        &[],
    ),
    gauge(
        "culvert_unaccounted_connections",
        "Established TCP sockets of enrolled pods that are neither the mesh's nor exempt, by the last capture proof",
        &[],
    ),
    gauge("culvert_kernel_map_entries", "Entries in a map of the kernel programs", &["map"]),
    gauge("culvert_kernel_map_capacity", "Entries that fit into it", &["map"]),
    gauge(
        "culvert_kernel_program_instructions",
        "Instructions that the verifier looked at to admit a program",
        &["program"],
    ),
    gauge("culvert_kernel_info", "Always 1; which kernel, and which layout of the maps", &["release", "layout"]),
    gauge("culvert_worker_silence_seconds", "Time since a worker last moved", &["worker"]),
    gauge(
        "culvert_control_answers",
        "1 if the thread that controls answered this scrape in time; 0 leaves its metrics out",
        &[],
    ),
    counter(
        "culvert_panics",
        "Panics in the agent; each ended the task that it was in: one connection, or a tunnel with those in it",
        &[],
    ),
    counter(
        "culvert_access_log_lines_dropped",
        "Lines of the access log that were lost: their reader was too slow",
        &[],
    ),
    counter("culvert_log_lines_dropped", "Lines of the log that were lost: their reader was too slow", &[]),
    counter(
        "culvert_log_lines_suppressed",
        "Lines that a pod caused beyond --log-limit, and that were not written",
        &[],
    ),
    counter("culvert_spans_exported", "Spans of connections that the collector has taken", &[]),
    counter("culvert_spans_dropped", "Spans that were lost: the collector was slow, or not there", &[]),
    gauge("culvert_metrics_label_sets", "Label sets of the istio_tcp metrics", &[]),
    counter("culvert_metrics_label_set_overflows", "Times that a label set found no room and unknown was counted", &[]),
    counter("process_cpu_seconds", "User and system time", &[]),
    gauge("process_resident_memory_bytes", "Resident memory", &[]),
    gauge("process_virtual_memory_bytes", "Virtual memory", &[]),
    gauge("process_open_fds", "Open file descriptors", &[]),
    gauge("process_max_fds", "Most file descriptors that may be open", &[]),
    gauge("process_start_time_seconds", "When the process started, seconds since the epoch", &[]),
];

/// The catalogue as a table for docs/metrics.md.
pub fn markdown() -> String {
    let mut table = String::from("| metric | type | labels | meaning |\n|---|---|---|---|\n");
    for metric in METRICS {
        let labels = match metric.labels {
            [] => "–".to_owned(),
            labels if labels.len() == TRAFFIC.len() => "those of a connection, below".to_owned(),
            labels => labels.iter().map(|label| format!("`{label}`")).collect::<Vec<_>>().join(", "),
        };
        let kind = match metric.kind {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
        };
        table += &format!("| `{}` | {kind} | {labels} | {} |\n", metric.sample_name(), metric.help);
    }
    table
}

/// What only the thread that controls knows.
#[derive(Clone, Debug, Default)]
pub struct Node {
    /// Policy generation in force.
    pub generation: u32,
    /// Compilations so far.
    pub compiles: u64,
    /// Duration of the last one.
    pub compile_time: Duration,
    /// Pods that are in.
    pub enrolled: usize,
    /// Pods that could not be brought in.
    pub failed: usize,
    /// Pods whose plaintext the agent judges.
    pub judged_by_agent: usize,
    /// Pods that the gate holds.
    pub held: usize,
    /// Established sockets that the last capture proof could not account for.
    pub strays: usize,
    /// Identities, and the second since the epoch at which each one's certificate ends.
    pub certificates: Vec<(String, Option<u64>)>,
    /// Certificates had, and attempts that failed.
    pub certificate_requests: (u64, u64),
    /// How each kind of objects stands with the API server; empty where a folder is the source.
    pub watches: Vec<Watch>,
    /// What the kernel has counted.
    pub verdicts: Vec<Verdicts>,
    /// The maps.
    pub maps: Vec<MapFill>,
    /// Programs, and instructions that the verifier looked at.
    pub programs: Vec<(String, u32)>,
    /// How long each worker has been silent.
    pub silence: Vec<Duration>,
}

/// A kind of objects of the API server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Watch {
    /// Its name, as in a manifest.
    pub kind: &'static str,
    /// What changes is told.
    pub up: bool,
    /// Answers that were errors, or did not come.
    pub errors: u64,
}

/// A counter of the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdicts {
    /// Of the pod; `unknown` where no pod is.
    pub namespace: String,
    /// Its name.
    pub pod: String,
    /// `inbound` or `outbound`.
    pub direction: &'static str,
    /// `pass`, `refuse` or `agent`.
    pub answer: &'static str,
    /// Word of the reason.
    pub reason: &'static str,
    /// How often.
    pub times: u64,
}

/// How full a map is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MapFill {
    /// As it is pinned.
    pub name: &'static str,
    /// Entries in it.
    pub entries: usize,
    /// Entries that fit.
    pub capacity: u32,
}

/// What the thread that controls is asked.
#[derive(Debug)]
pub enum Question {
    /// To look at the kernel's connections again.
    Connections(oneshot::Sender<()>),
    /// The same, and what it knows.
    Node(oneshot::Sender<Box<Node>>),
    /// For a capture proof.
    Proof(oneshot::Sender<Box<Proof>>),
    /// To note what the kernel has refused.
    Refusals(oneshot::Sender<()>),
    /// To look at the kernel's connections again, and how many in plaintext it has counted for a pod that nobody saw.
    Plaintext(oneshot::Sender<Vec<(ObjectRef, u64)>>),
}

/// Where the values come from. Clones are the same.
#[derive(Clone, Debug)]
pub struct Sources {
    /// Connections.
    pub registry: Registry,
    /// The workers' counters.
    pub tallies: Tallies,
    /// The access log.
    pub access: AccessLog,
    /// The log.
    pub log: Lines,
    /// Lines that a pod can cause.
    pub limit: Limit,
    /// Spans.
    pub spans: Arc<trace::Counts>,
}

/// Labels of one sample.
#[derive(Debug)]
enum Set {
    Plain(Vec<(&'static str, Cow<'static, str>)>),
    Traffic(Arc<Labels>, Flag),
}

impl EncodeLabelSet for Set {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> fmt::Result {
        use prometheus_client::encoding::EncodeLabel;
        match self {
            Self::Plain(pairs) => {
                for (name, value) in pairs {
                    (*name, &**value).encode(encoder.encode_label())?;
                }
            }
            Self::Traffic(labels, flag) => {
                for pair in labels.iter() {
                    pair.encode(encoder.encode_label())?;
                }
                ("response_flags", flag.as_str()).encode(encoder.encode_label())?;
            }
        }
        Ok(())
    }
}

/// All samples of one scrape.
#[derive(Debug, Default)]
pub struct Samples {
    /// By the index in [`METRICS`].
    families: Vec<Vec<(Set, f64)>>,
}

impl Samples {
    fn add(&mut self, name: &str, set: Set, value: f64) {
        let index = METRICS.iter().position(|metric| metric.name == name);
        debug_assert!(index.is_some(), "{name} is in the catalogue");
        let Some(index) = index else { return };
        self.families.resize_with(METRICS.len(), Vec::new);
        self.families[index].push((set, value));
    }

    fn plain(&mut self, name: &str, labels: Vec<(&'static str, Cow<'static, str>)>, value: f64) {
        self.add(name, Set::Plain(labels), value);
    }

    fn one(&mut self, name: &str, value: f64) {
        self.plain(name, Vec::new(), value);
    }

    /// The text of the exposition (OpenMetrics 1.0).
    ///
    /// # Errors
    /// There was no memory.
    pub fn encode(self) -> Result<String, fmt::Error> {
        let mut encoder = Encoder::default();
        encoder.register_collector(Box::new(self));
        let mut text = String::with_capacity(64 << 10);
        prometheus_client::encoding::text::encode(&mut text, &encoder)?;
        Ok(text)
    }
}

impl Collector for Samples {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        for (metric, samples) in METRICS.iter().zip(&self.families) {
            if samples.is_empty() {
                continue;
            }
            let kind = match metric.kind {
                Kind::Counter => MetricType::Counter,
                Kind::Gauge => MetricType::Gauge,
            };
            let mut family = encoder.encode_descriptor(metric.name, metric.help, None, kind)?;
            if let [(Set::Plain(labels), value)] = &samples[..]
                && labels.is_empty()
            {
                encode(metric.kind, *value, family)?;
                continue;
            }
            for (set, value) in samples {
                encode(metric.kind, *value, family.encode_family(set)?)?;
            }
        }
        Ok(())
    }
}

fn encode(kind: Kind, value: f64, sample: MetricEncoder<'_>) -> fmt::Result {
    let whole = value.fract() == 0.0 && value.abs() < 9e15;
    match kind {
        Kind::Counter if whole => ConstCounter::new(value as u64).encode(sample),
        Kind::Counter => ConstCounter::new(value).encode(sample),
        Kind::Gauge if whole => ConstGauge::new(value as i64).encode(sample),
        Kind::Gauge => ConstGauge::new(value).encode(sample),
    }
}

/// Collects everything. `node` is `None` if the thread that controls did not answer.
pub fn collect(sources: &Sources, node: Option<&Node>) -> Samples {
    let mut samples = Samples::default();
    let traffic = sources.registry.traffic();
    connections(&mut samples, &traffic);
    samples.plain("istio_build", vec![("component", "culvert".into()), ("tag", env!("CARGO_PKG_VERSION").into())], 1.0);
    tunnels(&mut samples, &traffic, &sources.tallies.sums());
    for ((direction, reason), times) in &traffic.refusals {
        let labels = vec![("reporter", reporter(*direction).into()), ("reason", (*reason).into())];
        samples.plain("culvert_refusals", labels, *times as f64);
    }
    samples.one("culvert_control_answers", if node.is_some() { 1.0 } else { 0.0 });
    if let Some(node) = node {
        of_node(&mut samples, node);
    }
    samples.plain(
        "culvert_kernel_info",
        vec![("release", kernel_release().into()), ("layout", LAYOUT_VERSION.to_string().into())],
        1.0,
    );
    samples.one("culvert_panics", panics::count() as f64);
    samples.one("culvert_access_log_lines_dropped", sources.access.dropped() as f64);
    samples.one("culvert_log_lines_dropped", sources.log.dropped() as f64);
    samples.one("culvert_log_lines_suppressed", sources.limit.suppressed() as f64);
    samples.one("culvert_spans_exported", sources.spans.exported() as f64);
    samples.one("culvert_spans_dropped", sources.spans.dropped() as f64);
    samples.one("culvert_metrics_label_sets", traffic.sets.len() as f64);
    samples.one("culvert_metrics_label_set_overflows", traffic.overflowed as f64);
    process(&mut samples);
    samples
}

fn connections(samples: &mut Samples, traffic: &Traffic) {
    for (labels, count) in &traffic.sets {
        let set = |flag| Set::Traffic(labels.clone(), flag);
        samples.add("istio_tcp_connections_opened", set(Flag::None), count.opened as f64);
        for (flag, times) in Flag::ALL.into_iter().zip(count.closed).filter(|(_, times)| *times > 0) {
            samples.add("istio_tcp_connections_closed", set(flag), times as f64);
            if flag != Flag::None {
                samples.add("istio_tcp_connections_failed", set(flag), times as f64);
            }
        }
        samples.add("istio_tcp_received_bytes", set(Flag::None), count.received as f64);
        samples.add("istio_tcp_sent_bytes", set(Flag::None), count.sent as f64);
    }
    for direction in [Direction::Outbound, Direction::Inbound] {
        let of_side = traffic.open.iter().filter(|((of, _), _)| *of == direction);
        let open: u64 = of_side.clone().map(|(_, open)| open).sum();
        samples.plain("istio_tcp_sockets_open", vec![("reporter", reporter(direction).into())], open as f64);
        for carried in [Carried::Tunnel, Carried::Agent, Carried::Kernel, Carried::PreEnrolment] {
            let open: u64 = of_side.clone().filter(|((_, by), _)| *by == carried).map(|(_, open)| open).sum();
            let labels = vec![("reporter", reporter(direction).into()), ("carried", carried.as_str().into())];
            samples.plain("culvert_open_connections", labels, open as f64);
        }
    }
}

fn tunnels(samples: &mut Samples, traffic: &Traffic, sums: &Sums) {
    for (side, direction) in [(Side::Client, Direction::Outbound), (Side::Server, Direction::Inbound)] {
        let side_label = || ("side", Cow::from(side.as_str()));
        samples.plain("culvert_tunnel_connections", vec![side_label()], sums.tunnels[side as usize] as f64);
        let streams = traffic.open.iter().find(|(of, _)| *of == (direction, Carried::Tunnel)).map_or(0, |(_, n)| *n);
        samples.plain("culvert_tunnel_streams", vec![side_label()], streams as f64);
        for result in Handshake::ALL {
            let labels = vec![side_label(), ("result", result.as_str().into())];
            let times = sums.handshakes[side as usize][result as usize];
            samples.plain("culvert_tls_handshakes", labels, times as f64);
        }
    }
    samples.one("culvert_identity_address_mismatches", sums.mismatches as f64);
}

fn of_node(samples: &mut Samples, node: &Node) {
    for verdicts in &node.verdicts {
        let labels = vec![
            ("namespace", verdicts.namespace.clone().into()),
            ("pod", verdicts.pod.clone().into()),
            ("direction", verdicts.direction.into()),
            ("answer", verdicts.answer.into()),
            ("reason", verdicts.reason.into()),
        ];
        samples.plain("culvert_kernel_verdicts", labels, verdicts.times as f64);
    }
    for (identity, expires_at) in &node.certificates {
        let labels = vec![("identity", identity.clone().into())];
        samples.plain("culvert_certificate_expiry_timestamp_seconds", labels, expires_at.unwrap_or(0) as f64);
    }
    for (result, times) in [("ok", node.certificate_requests.0), ("failed", node.certificate_requests.1)] {
        samples.plain("culvert_certificate_requests", vec![("result", result.into())], times as f64);
    }
    for watch in &node.watches {
        let labels = || vec![("kind", Cow::from(watch.kind))];
        samples.plain("culvert_api_watch_up", labels(), f64::from(u8::from(watch.up)));
        samples.plain("culvert_api_watch_errors", labels(), watch.errors as f64);
    }
    samples.one("culvert_snapshot_generation", f64::from(node.generation));
    samples.one("culvert_snapshot_compiles", node.compiles as f64);
    samples.one("culvert_snapshot_compile_seconds", node.compile_time.as_secs_f64());
    samples.one("culvert_enrolled_pods", node.enrolled as f64);
    samples.one("culvert_enrolment_failures", node.failed as f64);
    samples.one("culvert_pods_judged_by_agent", node.judged_by_agent as f64);
    samples.one("culvert_gated_pods", node.held as f64);
    samples.one("culvert_unaccounted_connections", node.strays as f64);
    for map in &node.maps {
        let labels = || vec![("map", Cow::from(map.name))];
        samples.plain("culvert_kernel_map_entries", labels(), map.entries as f64);
        samples.plain("culvert_kernel_map_capacity", labels(), f64::from(map.capacity));
    }
    for (program, instructions) in &node.programs {
        let labels = vec![("program", program.clone().into())];
        samples.plain("culvert_kernel_program_instructions", labels, f64::from(*instructions));
    }
    for (worker, silence) in node.silence.iter().enumerate() {
        let labels = vec![("worker", worker.to_string().into())];
        samples.plain("culvert_worker_silence_seconds", labels, silence.as_secs_f64());
    }
}

/// What Prometheus' own client libraries tell of a process. What /proc does not say is left out.
fn process(samples: &mut Samples) {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a valid place for the answer; this clock always exists.
    unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &raw mut time) };
    samples.one("process_cpu_seconds", time.tv_sec as f64 + time.tv_nsec as f64 / 1e9);
    let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // The second field is the name in parentheses, and may hold anything; the state after it is number 3 (proc(5)).
    let fields: Vec<f64> = stat
        .rsplit_once(')')
        .map(|(_, rest)| rest.split_whitespace().map(|field| field.parse().unwrap_or(0.0)).collect())
        .unwrap_or_default();
    let field = |number: usize| fields.get(number - 3).copied();
    // SAFETY: sysconf(3) only reads; both names exist on Linux.
    let (page, ticks) = unsafe { (libc::sysconf(libc::_SC_PAGESIZE), libc::sysconf(libc::_SC_CLK_TCK)) };
    if let (Some(virtual_bytes), Some(resident_pages)) = (field(23), field(24)) {
        samples.one("process_virtual_memory_bytes", virtual_bytes);
        samples.one("process_resident_memory_bytes", resident_pages * page as f64);
    }
    let booted = fs::read_to_string("/proc/stat").unwrap_or_default();
    let booted = booted.lines().find_map(|line| line.strip_prefix("btime ")?.parse::<f64>().ok());
    if let (Some(booted), Some(started)) = (booted, field(22)) {
        samples.one("process_start_time_seconds", booted + started / ticks as f64);
    }
    if let Ok(open) = fs::read_dir("/proc/self/fd") {
        // One of them is this very directory.
        samples.one("process_open_fds", open.count().saturating_sub(1) as f64);
    }
    let limits = fs::read_to_string("/proc/self/limits").unwrap_or_default();
    let most =
        limits.lines().find_map(|line| line.strip_prefix("Max open files")?.split_whitespace().next()?.parse().ok());
    if let Some(most) = most {
        samples.one("process_max_fds", most);
    }
}

fn kernel_release() -> String {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    match release.trim() {
        "" => traffic::UNKNOWN.to_owned(),
        release => release.to_owned(),
    }
}

fn reporter(direction: Direction) -> &'static str {
    match direction {
        Direction::Outbound => "source",
        Direction::Inbound => "destination",
    }
}

#[cfg(test)]
mod tests {
    use std::{env, path::Path};

    use super::*;
    use crate::telemetry::{access, lines, open::Facts};

    /// `CULVERT_WRITE_DOCS=1 cargo test -p culvert the_table_of_metrics` writes it anew.
    #[test]
    fn the_table_of_metrics_is_up_to_date() {
        const BEGIN: &str = "<!-- made from the catalogue in agent/src/telemetry/metrics.rs -->\n";
        const END: &str = "<!-- end -->\n";
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/metrics.md");
        let page = fs::read_to_string(&path).expect("docs/metrics.md is there");
        let (before, rest) = page.split_once(BEGIN).expect("the beginning of the table is marked");
        let (table, after) = rest.split_once(END).expect("so is its end");
        if env::var_os("CULVERT_WRITE_DOCS").is_some() {
            fs::write(&path, [before, BEGIN, &markdown(), END, after].concat()).expect("written");
        } else {
            assert!(table == markdown(), "docs/metrics.md differs from the catalogue");
        }
        for label in TRAFFIC {
            assert!(page.contains(&format!("| `{label}` |")), "docs/metrics.md does not explain the label {label}");
        }
    }

    fn sources() -> (Sources, [lines::Writer; 2]) {
        let (access, of_access) = access::start_on(access::Config::default(), std::io::sink()).expect("a thread");
        let config = lines::Config { name: "log", queue: 1, gather: Duration::ZERO };
        let (log, of_log) = lines::start(config, std::io::sink()).expect("a thread");
        let (registry, tallies) = (Registry::default(), Tallies::default());
        let sources = Sources { registry, tallies, access, log, limit: Limit::new(0, 1), spans: Arc::default() };
        (sources, [of_access, of_log])
    }

    /// Names come from manifests; [M.1] what is missing is `unknown`.
    #[test]
    fn values_are_escaped_and_what_is_missing_is_unknown() {
        let (sources, _writers) = sources();
        let addr = |last: u8| std::net::SocketAddr::from(([10, 0, 0, last], 80));
        let mut facts = Facts::new(Direction::Outbound, addr(1), addr(2));
        facts.service = Some(ObjectRef::new("a\"b\\c\nd", "x"));
        drop(sources.registry.shard().open(Arc::new(facts), Arc::default()));
        let text = collect(&sources, None).encode().expect("memory");
        let line = text.lines().find(|line| line.starts_with("istio_tcp_connections_opened_total{")).expect("counted");
        assert!(line.contains(r#"destination_service_namespace="a\"b\\c\nd""#), "{line}");
        assert!(line.contains(r#"source_workload="unknown",source_workload_namespace="unknown""#), "{line}");
        assert!(line.contains(r#"response_flags="-"} 1"#), "{line}");
        assert!(text.contains("culvert_control_answers 0\n") && !text.contains("culvert_snapshot_generation"));
        assert!(text.ends_with("# EOF\n"));
    }

    #[test]
    fn every_sample_has_the_labels_of_the_catalogue() {
        let (sources, _writers) = sources();
        let node = Node {
            certificates: vec![("spiffe://a/ns/b/sa/c".into(), None)],
            watches: vec![Watch { kind: "Pod", up: true, errors: 1 }],
            verdicts: vec![Verdicts {
                namespace: "n".into(),
                pod: "p".into(),
                direction: "inbound",
                answer: "pass",
                reason: "probe",
                times: 3,
            }],
            maps: vec![MapFill { name: "PODS", entries: 1, capacity: 2 }],
            programs: vec![("inbound".into(), 5)],
            silence: vec![Duration::from_millis(1500)],
            ..Node::default()
        };
        sources.registry.shard().refused((Direction::Inbound, "loop"));
        let addr = std::net::SocketAddr::from(([10, 0, 0, 1], 80));
        let open = sources.registry.shard().open(Arc::new(Facts::new(Direction::Inbound, addr, addr)), Arc::default());
        open.close(Flag::Deny);
        let samples = collect(&sources, Some(&node));
        for (metric, samples) in METRICS.iter().zip(&samples.families) {
            assert!(!samples.is_empty(), "{} has no sample", metric.name);
            for (set, _) in samples {
                let names: Vec<&str> = match set {
                    Set::Plain(pairs) => pairs.iter().map(|(name, _)| *name).collect(),
                    Set::Traffic(labels, _) => labels.iter().map(|(name, _)| name).chain(["response_flags"]).collect(),
                };
                assert_eq!(names, metric.labels, "{}", metric.name);
            }
        }
        let text = samples.encode().expect("memory");
        assert!(text.contains("culvert_worker_silence_seconds{worker=\"0\"} 1.5\n"), "{text}");
    }
}
