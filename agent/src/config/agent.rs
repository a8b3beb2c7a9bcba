//! The settings of `culvert agent`.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, fs,
    net::SocketAddr,
    os::unix::fs::MetadataExt as _,
    path::PathBuf,
    time::Duration,
};

use super::{Given, Invalid, Setting, Values, parse_duration, parse_size};
use crate::{
    dns,
    limits::Numbers,
    model::ObjectRef,
    preflight,
    telemetry::{self, Format, trace},
};

pub(super) const KUBECONFIG: Setting = Setting {
    name: "kubeconfig",
    value: "FILE",
    default: None,
    help: "Kubeconfig whose current context names the API server to watch; without it and --manifests: the service account \
           of the pod that the agent runs in",
};
pub(super) const CGROUP_ROOT: Setting = Setting {
    name: "cgroup-root",
    value: "DIR",
    default: None,
    help: "cgroup (v2) that holds the node's pods, kubelet and this agent; the cgroup2 mount unless set",
};
pub(super) const PIN_DIR: Setting = Setting {
    name: "pin-dir",
    value: "DIR",
    default: Some("/sys/fs/bpf/culvert"),
    help: "Directory on a bpffs for maps and links; one per agent of a machine",
};

/// The table.
pub const SETTINGS: &[Setting] = &[
    Setting { name: "node-name", value: "NAME", default: None, help: "Name of this node, as in Pod spec.nodeName" },
    Setting {
        name: "manifests",
        value: "DIR",
        default: None,
        help: "Folder of manifests to watch instead of an API server: pods, services, namespaces and policies of the cluster",
    },
    KUBECONFIG,
    CGROUP_ROOT,
    Setting {
        name: "kubelet-cgroup",
        value: "DIR",
        default: None,
        help: "The kubelet's cgroup, absolute or below the cgroup root; looked for in the usual places unless set",
    },
    PIN_DIR,
    Setting {
        name: "workers",
        value: "N",
        default: None,
        help: "Threads that carry connections, 1 to 64; the number of CPUs, at most 8, unless set",
    },
    Setting {
        name: "busy-poll",
        value: "TIME",
        default: Some("100us"),
        help: "How long at most a worker looks for more work before it sleeps, if its last sleeps were no longer; one worker at a \
               time does, with time that nobody else wants. 0us: never",
    },
    Setting {
        name: "revision",
        value: "NAME",
        default: Some("default"),
        help: "Revision: objects labelled istio.io/rev with another one do not concern this agent",
    },
    Setting {
        name: "exclude-namespaces",
        value: "NAMES",
        default: Some("kube-system"),
        help: "Namespaces whose pods are never enrolled, separated by commas",
    },
    Setting {
        name: "system-namespace",
        value: "NAME",
        default: Some("istio-system"),
        help: "Namespace of ConfigMap istio and of the mesh's own pods",
    },
    Setting { name: "ca-address", value: "HOST:PORT", default: None, help: "CA that issues the certificates" },
    Setting {
        name: "ca-root",
        value: "FILE",
        default: None,
        help: "PEM certificates that the CA's own certificate must chain to (root-cert.pem of istio-ca-root-cert); when they change, \
               all certificates are renewed",
    },
    Setting {
        name: "ca-server-name",
        value: "NAME",
        default: Some("istiod.istio-system.svc"),
        help: "Name that the CA's certificate must carry",
    },
    Setting {
        name: "ca-token",
        value: "FILE",
        default: None,
        help: "Bound service account token with audience istio-ca; read again for every request",
    },
    Setting {
        name: "cluster-id",
        value: "NAME",
        default: Some("Kubernetes"),
        help: "Cluster that this node belongs to, as the CA and telemetry know it",
    },
    Setting {
        name: "cluster-domain",
        value: "NAME",
        default: Some("cluster.local"),
        help: "DNS domain of the cluster: a Service is NAME.NAMESPACE.svc.<this>",
    },
    Setting {
        name: "control-address",
        value: "HOST:PORT",
        default: None,
        help: "culvert control, which is told which policies are in force on this node; its certificate and the agent's token are \
               as with the CA. Not told to anybody unless set",
    },
    Setting {
        name: "daemonset",
        value: "NAMESPACE/NAME",
        default: None,
        help: "DaemonSet that this agent is of: once that is deleted, an agent that is told to end takes the node's pods out of the \
               mesh and leaves nothing behind. What it leaves goes on to refuse unless set, and while the DaemonSet is there",
    },
    Setting {
        name: "cert-dir",
        value: "DIR",
        default: None,
        help: "Certificates from files instead of a CA: DIR/root-cert.pem and \
               DIR/<namespace>/<service account>/{cert-chain,key}.pem",
    },
    Setting {
        name: "readiness-address",
        value: "ADDRESS",
        default: Some("0.0.0.0:15021"),
        help: "Where GET /healthz/ready answers",
    },
    Setting {
        name: "metrics-address",
        value: "ADDRESS",
        default: Some("0.0.0.0:15020"),
        help: "Where GET /metrics and GET /stats/prometheus answer",
    },
    Setting {
        name: "metrics-label-sets",
        value: "N",
        default: Some("2000"),
        help: "Most label sets of the istio_tcp_* metrics; connections beyond are counted with unknown labels",
    },
    Setting {
        name: "admin-address",
        value: "ADDRESS",
        default: Some("127.0.0.1:15000"),
        help: "Where the agent shows what it believes and takes another log level; loopback only",
    },
    Setting { name: "log-format", value: "FORMAT", default: Some("text"), help: "text or json" },
    Setting {
        name: "log-level",
        value: "FILTER",
        default: Some("info"),
        help: "error, warn, info, debug or trace, or per module as in info,culvert::tunnel=debug",
    },
    Setting {
        name: "log-limit",
        value: "N",
        default: Some("1000"),
        help: "Most lines per second for each pod and reason, in the access log and of warnings that a pod can cause; \
               more are counted, and told in one line as suppressed=N; 0 for no limit",
    },
    Setting {
        name: "identity-mismatch",
        value: "allow|refuse",
        default: Some("allow"),
        help: "A tunnel from the address of a pod that has another identity than the peer proves: judged by what is proved, or \
               refused; it is counted and told in both cases",
    },
    Setting {
        name: "udp",
        value: "allow|refuse",
        default: Some("allow"),
        help: "UDP other than DNS that leaves pods of the mesh, where a pod does not say otherwise by its label culvert.io/udp",
    },
    Setting {
        name: "veth-filter",
        value: "on|off",
        default: Some("on"),
        help: "Whether what pods of the mesh send is looked at where it comes into the node, so that packet and raw sockets \
               cannot pass by the mesh; off saves a look at the headers of each packet",
    },
    Setting {
        name: "gate",
        value: "closed|open",
        default: Some("closed"),
        help: "Whether pods that no agent knows yet are held: they neither connect nor are connected to, also while no agent \
               runs; open lets them pass by the mesh until an agent has enrolled them",
    },
    Setting {
        name: "otlp-endpoint",
        value: "URL",
        default: None,
        help: "Collector that gets a span of every connection by OTLP over gRPC, as in http://otel-collector.monitoring:4317",
    },
    Setting {
        name: "drain-deadline",
        value: "TIME",
        default: Some("5s"),
        help: "How long open connections may go on after SIGTERM, or after another agent has taken over, before they are reset",
    },
    Setting {
        name: "max-connections-per-pod",
        value: "N",
        default: Some("16384"),
        help: "Connections that a pod may have open; also those to a pod, counted for each client: an address, or in IPv6 a /64, \
               unless a pod of the mesh is known by the address",
    },
    Setting {
        name: "max-memory-per-pod",
        value: "SIZE",
        default: Some("256MiB"),
        help: "Memory for a pod: 8 KiB for each connection, 16 KiB for each tunnel, and what arrived and the other side does not \
               read; above it new connections are refused, and those in tunnels that hold more than 64 KiB are reset when \
               they get more; one client of a pod gets no more of it than it leaves to others",
    },
    Setting {
        name: "max-handshakes-per-peer",
        value: "N",
        default: Some("256"),
        help: "Tunnels from one client in which nothing has been asked for yet; to one pod five times as many, of all clients, the \
               last fifth for pods that have none",
    },
    Setting {
        name: "max-open-files",
        value: "N",
        default: None,
        help: "Descriptors that the agent may have, at least 64; the hard limit unless set",
    },
    Setting {
        name: "open-files-reserve",
        value: "N",
        default: Some("256"),
        help: "The last descriptors, at most a quarter of all, which only pods with less than their share of connections get",
    },
];

/// Set in the pods of a cluster, by the kubelet.
pub(super) const IN_CLUSTER: &str = "KUBERNETES_SERVICE_HOST";
/// A longer one saves nothing: waking a thread takes a hundredth of it.
const MAX_BUSY_POLL: Duration = Duration::from_millis(10);

/// The agent's configuration.
#[derive(Clone, Debug)]
pub struct Config {
    /// `--node-name`
    pub node_name: String,
    /// Where the cluster's objects come from.
    pub source: Source,
    /// `--cgroup-root`
    pub cgroup_root: Option<PathBuf>,
    /// `--kubelet-cgroup`
    pub kubelet_cgroup: Option<PathBuf>,
    /// `--pin-dir`
    pub pin_dir: PathBuf,
    /// The agent runs in a pod of a cluster.
    pub in_pod: bool,
    /// `--workers`, 1 to 64.
    pub workers: u32,
    /// `--busy-poll`, at most 10 ms.
    pub busy_poll: Duration,
    /// `--revision`
    pub revision: String,
    /// `--exclude-namespaces`
    pub exclude_namespaces: BTreeSet<String>,
    /// `--system-namespace`
    pub system_namespace: String,
    /// Where certificates come from.
    pub certificates: Certificates,
    /// `--control-address`, as `HOST:PORT`; only where the objects come from an API server and certificates from a CA.
    pub control_address: Option<String>,
    /// `--daemonset`; only where the objects come from an API server.
    pub daemonset: Option<ObjectRef>,
    /// `--cluster-id`
    pub cluster_id: String,
    /// `--cluster-domain`
    pub cluster_domain: String,
    /// `--metrics-address`
    pub metrics_address: SocketAddr,
    /// `--metrics-label-sets`
    pub metrics_label_sets: usize,
    /// `--readiness-address`
    pub readiness_address: SocketAddr,
    /// `--admin-address`, of the loopback interface.
    pub admin_address: SocketAddr,
    /// `--log-format`
    pub log_format: Format,
    /// `--log-level`
    pub log_level: String,
    /// `--log-limit`; 0 for none.
    pub log_limit: u32,
    /// `--identity-mismatch`: whether it is refused.
    pub refuse_mismatch: bool,
    /// `--udp`: whether it is refused.
    pub udp_refused: bool,
    /// `--veth-filter`
    pub veth_filter: bool,
    /// `--gate`: whether it is open.
    pub gate_open: bool,
    /// `--otlp-endpoint`
    pub otlp_endpoint: Option<String>,
    /// `--drain-deadline`
    pub drain_deadline: Duration,
    /// `--max-connections-per-pod` and the others of their kind.
    pub limits: Numbers,
    /// `--max-open-files`
    pub max_open_files: Option<usize>,
    /// The file that `--config` names.
    pub file: Option<PathBuf>,
    /// Every setting that has a value, as it was written, and where.
    pub given: BTreeMap<&'static str, Given>,
}

/// Settings that take effect while the agent runs; all others need a new start.
pub const LIVE: &[&str] = &[
    "drain-deadline",
    "log-level",
    "max-connections-per-pod",
    "max-handshakes-per-peer",
    "max-memory-per-pod",
    "open-files-reserve",
];

impl Config {
    /// What of it says where the agent is, and what it needs of the node.
    pub fn preflight(&self) -> preflight::Config {
        preflight::Config {
            pin_dir: self.pin_dir.clone(),
            cgroup_root: self.cgroup_root.clone(),
            veth_filter: self.veth_filter,
            cni_configuration: preflight::CNI_CONFIGURATION.into(),
            in_pod: self.in_pod,
        }
    }

    /// Names of the settings that are other ones in `next`.
    pub fn differences(&self, next: &Self) -> Vec<&'static str> {
        let differs = |name: &&'static str| {
            self.given.get(name).map(|given| &given.value) != next.given.get(name).map(|given| &given.value)
        };
        SETTINGS.iter().map(|setting| setting.name).filter(differs).collect()
    }
}

/// Reads the configuration again as it was read at the start: the same flags and environment, and the file as it is now.
pub struct Again {
    read: Box<dyn Fn() -> anyhow::Result<Config> + Send>,
    file: Option<PathBuf>,
    seen: Option<Stamp>,
}

/// What is different after a file was written, replaced, or reached by another link.
type Stamp = (u64, i64, i64, u64);

impl fmt::Debug for Again {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Again").field("file", &self.file).finish_non_exhaustive()
    }
}

impl Again {
    /// `read` gives the configuration of this moment.
    pub fn new(config: &Config, read: impl Fn() -> anyhow::Result<Config> + Send + 'static) -> Self {
        let mut again = Self { read: Box::new(read), file: config.file.clone(), seen: None };
        again.seen = again.stamp();
        again
    }

    /// Whether the file has changed since this was asked before. One that is gone for the moment has not.
    pub fn file_changed(&mut self) -> bool {
        let Some(now) = self.stamp() else { return false };
        self.seen.replace(now) != Some(now)
    }

    /// The configuration of this moment.
    ///
    /// # Errors
    /// As at the start: every value that is wrong.
    pub fn read(&self) -> anyhow::Result<Config> {
        (self.read)()
    }

    fn stamp(&self) -> Option<Stamp> {
        let metadata = fs::metadata(self.file.as_ref()?).ok()?;
        Some((metadata.ino(), metadata.mtime(), metadata.mtime_nsec(), metadata.size()))
    }
}

/// A folder, or an API server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// `--manifests`
    Folder(PathBuf),
    /// `--kubeconfig`, or the service account of the pod.
    Kubernetes(Option<PathBuf>),
}

/// A CA, or files.
#[derive(Clone, Debug)]
pub enum Certificates {
    /// `--ca-address` and what belongs to it.
    Ca {
        /// `HOST:PORT`.
        address: String,
        /// `--ca-root`
        root: PathBuf,
        /// `--ca-server-name`
        server_name: String,
        /// `--ca-token`
        token: PathBuf,
    },
    /// `--cert-dir`
    Files(PathBuf),
}

/// From values to meaning.
///
/// # Errors
/// [`Invalid`], with every value that is wrong.
pub fn understand(mut values: Values) -> Result<Config, Invalid> {
    let certificates = certificates(&mut values);
    let node_name = values.required::<String>("node-name");
    let in_pod = std::env::var_os(IN_CLUSTER).is_some();
    let source = source(&mut values, in_pod);
    let control_address = control_address(&mut values);
    let daemonset = daemonset(&mut values);
    let log_format = values.optional::<Format>("log-format");
    let log_level = values.parse("log-level", |text| telemetry::parse_filter(text).map(|_| text.to_owned()));
    let workers = if values.has("workers") {
        values.parse("workers", |text| match text.parse() {
            Ok(workers @ 1..=64) => Ok(workers),
            _ => Err("must be a number from 1 to 64"),
        })
    } else {
        Some(std::thread::available_parallelism().map_or(1, |n| u32::try_from(n.get()).unwrap_or(1).min(8)))
    };
    let busy_poll = values.parse("busy-poll", |text| match parse_duration(text) {
        Ok(time) if time <= MAX_BUSY_POLL => Ok(time),
        Ok(_) => Err(format!("must not be longer than {} ms", MAX_BUSY_POLL.as_millis())),
        Err(error) => Err(error),
    });
    // Each is understood before any is missed, so that everything wrong is said at once.
    let (cgroup_root, kubelet_cgroup) = (values.optional("cgroup-root"), values.optional("kubelet-cgroup"));
    let (pin_dir, revision) = (values.optional("pin-dir"), values.optional("revision"));
    let exclude_namespaces = values.list("exclude-namespaces").into_iter().collect();
    let (system_namespace, cluster_id) = (values.optional("system-namespace"), values.optional("cluster-id"));
    let cluster_domain = values.parse("cluster-domain", domain);
    let metrics_address = values.listen_address("metrics-address");
    let metrics_label_sets = values.parse("metrics-label-sets", |text| match text.parse() {
        Ok(sets @ 1..=100_000) => Ok(sets),
        _ => Err("must be a number from 1 to 100000"),
    });
    let readiness_address = values.listen_address("readiness-address");
    let admin_address = values.loopback_address("admin-address");
    let log_limit = values.optional("log-limit");
    let refuse_mismatch = values.parse("identity-mismatch", |text| one_of(text, ["allow", "refuse"]));
    let udp_refused = values.parse("udp", |text| one_of(text, ["allow", "refuse"]));
    let veth_filter = veth_filter(&mut values);
    let gate_open = values.parse("gate", |text| one_of(text, ["closed", "open"]));
    let otlp_endpoint = values.parse("otlp-endpoint", trace::endpoint);
    let drain_deadline = values.duration("drain-deadline");
    let max_open_files = values.parse("max-open-files", |text| number(text, 64));
    let limits = limits(&mut values);
    let (file, given) = (values.file().map(Into::into), values.given());
    let config = (|| {
        Some(Config {
            node_name: node_name?,
            source: source?,
            cgroup_root,
            kubelet_cgroup,
            pin_dir: pin_dir?,
            in_pod,
            workers: workers?,
            busy_poll: busy_poll?,
            revision: revision?,
            exclude_namespaces,
            system_namespace: system_namespace?,
            certificates: certificates?,
            control_address,
            daemonset,
            cluster_id: cluster_id?,
            cluster_domain: cluster_domain?,
            metrics_address: metrics_address?,
            metrics_label_sets: metrics_label_sets?,
            readiness_address: readiness_address?,
            admin_address: admin_address?,
            log_format: log_format?,
            log_level: log_level?,
            log_limit: log_limit?,
            refuse_mismatch: refuse_mismatch?,
            udp_refused: udp_refused?,
            veth_filter: veth_filter?,
            gate_open: gate_open?,
            otlp_endpoint,
            drain_deadline: drain_deadline?,
            limits: limits?,
            max_open_files,
            file,
            given,
        })
    })();
    values.finish(config)
}

/// A DNS domain without dots around it.
fn domain(text: &str) -> Result<String, &'static str> {
    let label = |label: &str| {
        !label.is_empty()
            && label.len() <= 63
            && label.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
    };
    match text.split('.').all(label) && text.len() <= 200 {
        true => Ok(text.to_owned()),
        false => Err("must be a DNS domain in lower case, as in cluster.local"),
    }
}

fn limits(values: &mut Values) -> Option<Numbers> {
    let connections_per_pod = values.parse("max-connections-per-pod", |text| number(text, 1));
    let memory_per_pod = values.parse("max-memory-per-pod", parse_size);
    let handshakes_per_peer = values.parse("max-handshakes-per-peer", |text| number(text, 1));
    let open_files_reserve = values.parse("open-files-reserve", |text| number(text, 0));
    Some(Numbers {
        connections_per_pod: connections_per_pod?,
        memory_per_pod: memory_per_pod?,
        handshakes_per_peer: handshakes_per_peer?,
        open_files_reserve: open_files_reserve?,
    })
}

pub(super) fn veth_filter(values: &mut Values) -> Option<bool> {
    values.parse("veth-filter", |text| one_of(text, ["off", "on"]))
}

/// Whether it is the second of two words.
fn one_of(text: &str, words: [&str; 2]) -> Result<bool, String> {
    match words.iter().position(|word| *word == text) {
        Some(which) => Ok(which == 1),
        None => Err(format!("must be {} or {}", words[0], words[1])),
    }
}

fn number(text: &str, least: usize) -> Result<usize, String> {
    match text.parse() {
        Ok(number) if number >= least => Ok(number),
        _ => Err(format!("must be a number, at least {least}")),
    }
}

fn source(values: &mut Values, in_cluster: bool) -> Option<Source> {
    match (values.has("manifests"), values.has("kubeconfig")) {
        (true, true) => {
            values.problem("--manifests and --kubeconfig exclude each other: keep one");
            None
        }
        (true, false) => values.optional("manifests").map(Source::Folder),
        (false, true) => values.optional("kubeconfig").map(|file| Source::Kubernetes(Some(file))),
        (false, false) if in_cluster => Some(Source::Kubernetes(None)),
        (false, false) => {
            values.problem(format!(
                "the cluster's objects have no source: give --kubeconfig or --manifests, or run in a pod of the cluster \
                 ({IN_CLUSTER} is not set)"
            ));
            None
        }
    }
}

fn certificates(values: &mut Values) -> Option<Certificates> {
    match (values.has("ca-address"), values.has("cert-dir")) {
        (true, true) => {
            values.problem("--ca-address and --cert-dir exclude each other: keep one");
            None
        }
        (false, false) => {
            values.problem("certificates have no source: give --ca-address, --ca-root and --ca-token, or --cert-dir");
            None
        }
        (false, true) => values.optional("cert-dir").map(Certificates::Files),
        (true, false) => {
            let (root, token) = (values.required("ca-root"), values.required("ca-token"));
            let address = values.parse("ca-address", |text| dns::host_port(text).map(|_| text.to_owned()));
            Some(Certificates::Ca {
                address: address?,
                root: root?,
                server_name: values.optional("ca-server-name")?,
                token: token?,
            })
        }
    }
}

fn control_address(values: &mut Values) -> Option<String> {
    if !values.has("control-address") {
        return None;
    }
    if values.has("manifests") {
        values.problem("--control-address: there is nobody to tell of a folder's policies; remove it, or --manifests");
    }
    if values.has("cert-dir") {
        values.problem(
            "--control-address: culvert control knows agents by what --ca-root and --ca-token name; give --ca-address \
             instead of --cert-dir, or remove it",
        );
    }
    values.parse("control-address", |text| dns::host_port(text).map(|_| text.to_owned()))
}

fn daemonset(values: &mut Values) -> Option<ObjectRef> {
    if !values.has("daemonset") {
        return None;
    }
    if values.has("manifests") {
        values.problem("--daemonset: only an API server says whether it is deleted; remove it, or --manifests");
    }
    values.parse("daemonset", object_name)
}

/// `NAMESPACE/NAME` of an object.
///
/// # Errors
/// It is none.
pub fn object_name(text: &str) -> Result<ObjectRef, &'static str> {
    let name = |text: &str| {
        let inner = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || matches!(byte, b'-' | b'.');
        !text.is_empty() && text.len() <= 253 && text.bytes().all(inner)
    };
    match text.split_once('/') {
        Some((namespace, own)) if name(namespace) && name(own) => Ok(ObjectRef::new(namespace, own)),
        _ => Err("must be NAMESPACE/NAME, as in istio-system/culvert"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_daemonset_is_named_by_namespace_and_name() {
        let of = |given: &'static str, manifests: bool| {
            let flag = |name: &str| match name {
                "daemonset" => Some(given.to_owned()),
                "manifests" if manifests => Some("/given".to_owned()),
                _ => None,
            };
            let mut values = Values::collect(SETTINGS, flag).expect("collected");
            let daemonset = daemonset(&mut values);
            values.finish(Some(daemonset)).map_err(|error| error.to_string())
        };
        assert_eq!(of("istio-system/culvert", false), Ok(Some(ObjectRef::new("istio-system", "culvert"))));
        for wrong in ["culvert", "/culvert", "istio-system/", "a/b/c", "Istio/culvert"] {
            let error = of(wrong, false).expect_err(wrong);
            assert!(error.contains("--daemonset") && error.contains("istio-system/culvert"), "{error}");
        }
        let folder = of("istio-system/culvert", true).expect_err("nobody to ask");
        assert!(folder.contains("--manifests"), "{folder}");
    }

    #[test]
    fn reports_are_of_what_an_api_server_holds() {
        let of = |given: &[&'static str]| {
            let flag = |name: &str| given.contains(&name).then(|| "here:1".to_owned());
            let mut values = Values::collect(SETTINGS, flag).expect("collected");
            let address = control_address(&mut values);
            values.finish(Some(address)).map_err(|error| error.to_string())
        };
        assert_eq!(of(&[]), Ok(None));
        assert_eq!(of(&["control-address", "kubeconfig", "ca-address"]), Ok(Some("here:1".to_owned())));
        let folder = of(&["control-address", "manifests"]).expect_err("nobody asks");
        assert!(folder.contains("--manifests"), "{folder}");
        let files = of(&["control-address", "cert-dir"]).expect_err("no token");
        assert!(files.contains("--ca-token"), "{files}");
    }

    #[test]
    fn the_objects_have_one_source() {
        let of = |given: &'static str, in_cluster| {
            let flag = |name: &str| given.split(' ').any(|one| one == name).then(|| "/given".to_owned());
            let mut values = Values::collect(SETTINGS, flag).expect("collected");
            let source = source(&mut values, in_cluster);
            values.finish(source).map_err(|error| error.to_string())
        };
        let path = || PathBuf::from("/given");
        for in_cluster in [true, false] {
            assert_eq!(of("manifests", in_cluster), Ok(Source::Folder(path())));
            assert_eq!(of("kubeconfig", in_cluster), Ok(Source::Kubernetes(Some(path()))));
            let both = of("manifests kubeconfig", in_cluster).expect_err("one too many");
            assert!(both.contains("exclude each other"), "{both}");
        }
        assert_eq!(of("", true), Ok(Source::Kubernetes(None)));
        let none = of("", false).expect_err("none");
        assert!(none.contains("--kubeconfig or --manifests"), "{none}");
    }

    #[test]
    fn every_wrong_value_of_the_agent_is_told_at_once() {
        let typed = [
            ("workers", "many"),
            ("drain-deadline", "5"),
            ("readiness-address", "here"),
            ("cluster-domain", ".local"),
            ("metrics-address", "15020"),
            ("metrics-label-sets", "0"),
            ("admin-address", "0.0.0.0:15000"),
            ("log-limit", "-1"),
            ("identity-mismatch", "no"),
            ("udp", "maybe"),
            ("veth-filter", "yes"),
            ("otlp-endpoint", "collector:4317"),
            ("log-format", "xml"),
            ("log-level", "=="),
            ("ca-address", "nowhere"),
            ("control-address", "nowhere"),
        ];
        let flag = |name: &str| typed.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned());
        let values = Values::collect(SETTINGS, flag).expect("collected");
        let text = understand(values).expect_err("all of them").to_string();
        for name in typed.iter().map(|(name, _)| *name).chain(["node-name", "manifests", "ca-root", "ca-token"]) {
            assert!(text.contains(&format!("--{name}")), "{name} in:\n{text}");
        }
    }
}
