//! What the agents tell of the connections of their pods: metrics (specification §16), with Istio's names and labels.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use culvert_tests::command;
use culvert_tests::sandbox::{
    Family, MeshPlan, Node, Place, Plan, PodPlan, Sandbox, ServicePlan, Source, built, own_name,
};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
    trace_service_server::{TraceService, TraceServiceServer},
};
use opentelemetry_proto::tonic::trace::v1::Span;

const CLIENT: &str = "test/client";
const OUTSIDER: &str = "test/outsider";
const SERVER: &str = "default/server";
/// How long the end of a connection may take to be counted; a socket that the kernel does not report is looked at every two
/// seconds.
const LIMIT: Duration = Duration::from_secs(10);

/// A client and an outsider on node a, a server on node b.
fn plan(test: &str) -> Plan {
    Plan::empty(&own_name(test))
        .pod(PodPlan::new(Node::A, "test", "client").label("version", "v7"))
        .pod(PodPlan::new(Node::A, "test", "outsider").label("istio.io/dataplane-mode", "none"))
        .pod(
            PodPlan::new(Node::B, "default", "server")
                .label("app.kubernetes.io/version", "v2")
                .program(&["exchange-serve", "--port=7000"]),
        )
        .service(ServicePlan::new("default", "server", &[("exchange", 7000)]))
}

fn mesh(test: &str, agent_arguments: &[&str]) -> Result<Sandbox> {
    mesh_of(plan(test), agent_arguments)
}

fn mesh_of(plan: Plan, agent_arguments: &[&str]) -> Result<Sandbox> {
    let mut sandbox = Sandbox::build(plan)?;
    let mut mesh = MeshPlan::new(built("culvert")?);
    mesh.agent_arguments = agent_arguments.iter().map(|&text| text.to_owned()).collect();
    sandbox.start_mesh(&mesh)?;
    Ok(sandbox)
}

fn exchange(sandbox: &Sandbox, from: &str, to: SocketAddr, verb: &str, bytes: u64) -> Result<serde_json::Value> {
    let (to, bytes) = (to.to_string(), bytes.to_string());
    sandbox.call(from, &["exchange", "--to", &to, "--verb", verb, "--bytes", &bytes])
}

/// The answer's head and body.
fn get(sandbox: &Sandbox, node: Node, path: &str, accept: &str) -> Result<(String, String)> {
    let answer = sandbox.node_place(node).inside(|| {
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, 15020))?;
        stream.set_read_timeout(Some(Duration::from_secs(20)))?;
        write!(stream, "GET {path} HTTP/1.1\r\nhost: node\r\naccept: {accept}\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    })?;
    let (head, body) = answer.split_once("\r\n\r\n").with_context(|| format!("no answer: {answer:?}"))?;
    Ok((head.to_owned(), body.to_owned()))
}

type Labels = BTreeMap<String, String>;

/// One scrape: the samples of each metric.
#[derive(Debug, Default)]
struct Scrape(BTreeMap<String, Vec<(Labels, f64)>>);

impl Scrape {
    fn of(sandbox: &Sandbox, node: Node) -> Result<Self> {
        let (head, body) = get(sandbox, node, "/metrics", "*/*")?;
        ensure!(head.starts_with("HTTP/1.1 200 "), "{head}");
        ensure!(head.contains("text/plain; version=0.0.4"), "{head}");
        Self::parse(&body)
    }

    /// Strict where it matters to us; `promtool` is the judge of the rest.
    fn parse(text: &str) -> Result<Self> {
        let mut scrape = Self::default();
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            let (name, labels, value) = sample(line).with_context(|| format!("a sample: {line:?}"))?;
            let samples = scrape.0.entry(name).or_default();
            ensure!(samples.iter().all(|(other, _)| *other != labels), "a sample twice: {line}");
            samples.push((labels, value));
        }
        Ok(scrape)
    }

    /// The samples that have these labels among theirs.
    fn samples(&self, name: &str, with: &[(&str, &str)]) -> Vec<&(Labels, f64)> {
        let has = |labels: &Labels| with.iter().all(|(name, value)| labels.get(*name).is_some_and(|is| is == value));
        self.0.get(name).into_iter().flatten().filter(|(labels, _)| has(labels)).collect()
    }

    fn sum(&self, name: &str, with: &[(&str, &str)]) -> f64 {
        self.samples(name, with).iter().map(|(_, value)| value).sum()
    }
}

fn sample(line: &str) -> Option<(String, Labels, f64)> {
    let (series, value) = line.rsplit_once(' ')?;
    let (name, mut rest) = series.split_once('{').unwrap_or((series, "}"));
    let mut labels = Labels::new();
    while rest != "}" {
        let (label, after) = rest.split_once("=\"")?;
        let mut text = String::new();
        let mut characters = after.char_indices();
        let end = loop {
            match characters.next()? {
                (at, '"') => break at,
                (_, '\\') => text.push(match characters.next()?.1 {
                    'n' => '\n',
                    other => other,
                }),
                (_, other) => text.push(other),
            }
        };
        labels.insert(label.trim_start_matches(',').to_owned(), text);
        rest = &after[end + 1..];
    }
    Some((name.to_owned(), labels, value.parse().ok()?))
}

/// Scrapes until what is asked for is there.
fn wait_for(sandbox: &Sandbox, node: Node, what: &str, mut is: impl FnMut(&Scrape) -> bool) -> Result<Scrape> {
    let mut last = Scrape::default();
    let found = command::wait_for(what, LIMIT, || {
        last = Scrape::of(sandbox, node)?;
        Ok(is(&last).then_some(()))
    });
    match found {
        Ok(()) => Ok(last),
        Err(error) => {
            let traffic: Vec<_> = last.0.iter().filter(|(name, _)| name.starts_with("istio_tcp")).collect();
            Err(error.context(format!("{traffic:#?}")))
        }
    }
}

const OPENED: &str = "istio_tcp_connections_opened_total";
const CLOSED: &str = "istio_tcp_connections_closed_total";
const FAILED: &str = "istio_tcp_connections_failed_total";
const RECEIVED: &str = "istio_tcp_received_bytes_total";
const SENT: &str = "istio_tcp_sent_bytes_total";

/// Every label of a connection of the client to the server; [M.1]: what is missing is `unknown`.
fn expected(reporter: &str, flags: &str) -> Labels {
    let client = "spiffe://cluster.local/ns/test/sa/client";
    let server = "spiffe://cluster.local/ns/default/sa/server";
    [
        ("reporter", reporter),
        ("source_workload", "client"),
        ("source_workload_namespace", "test"),
        ("source_principal", client),
        ("source_app", "client"),
        ("source_version", "v7"),
        ("source_canonical_service", "client"),
        ("source_canonical_revision", "v7"),
        ("source_cluster", "Kubernetes"),
        ("source_region", Node::REGION),
        ("source_zone", Node::A.zone()),
        ("destination_workload", "server"),
        ("destination_workload_namespace", "default"),
        ("destination_principal", server),
        ("destination_app", "server"),
        ("destination_version", "unknown"),
        ("destination_canonical_service", "server"),
        ("destination_canonical_revision", "v2"),
        ("destination_cluster", "Kubernetes"),
        ("destination_region", Node::REGION),
        ("destination_zone", Node::B.zone()),
        ("destination_service", "server.default.svc.cluster.local"),
        ("destination_service_name", "server"),
        ("destination_service_namespace", "default"),
        ("request_protocol", "tcp"),
        ("response_flags", flags),
        ("connection_security_policy", "mutual_tls"),
    ]
    .map(|(name, value)| (name.to_owned(), value.to_owned()))
    .into()
}

/// §16, [M.3]: both sides report a tunnelled connection, with all labels; bytes while it lasts.
#[test]
fn both_sides_report_a_tunnelled_connection_while_it_lasts_and_after() -> Result<()> {
    let mut sandbox = mesh("t-flows", &[])?;
    let to = SocketAddr::new(sandbox.cluster_ip(SERVER, Family::V4)?, 7000);
    sandbox.start_in_pod("held", CLIENT, &["hold", "--to", &to.to_string()])?;
    for (node, reporter) in [(Node::A, "source"), (Node::B, "destination")] {
        let of = [("reporter", reporter), ("source_workload", "client")];
        // Bytes grow while the connection is open.
        let mut before = None;
        let scrape = wait_for(&sandbox, node, &format!("live bytes at the {reporter}"), |scrape| {
            let bytes = (scrape.sum(RECEIVED, &of), scrape.sum(SENT, &of));
            let first = *before.get_or_insert(bytes);
            bytes.0 > first.0 && bytes.1 > first.1
        })?;
        for name in [OPENED, RECEIVED, SENT] {
            let samples = scrape.samples(name, &of);
            ensure!(samples.len() == 1, "{name}: {samples:?}");
            ensure!(samples[0].0 == expected(reporter, "-"), "{name}: {:#?}", samples[0].0);
        }
        ensure!(scrape.sum(OPENED, &of) == 1.0 && scrape.sum(CLOSED, &of) == 0.0, "{scrape:?}");
        ensure!(scrape.sum("istio_tcp_sockets_open", &[("reporter", reporter)]) == 1.0);
        let carried = [("reporter", reporter), ("carried", "tunnel")];
        ensure!(scrape.sum("culvert_open_connections", &carried) == 1.0);
        let side = [("side", if node == Node::A { "client" } else { "server" })];
        ensure!(scrape.sum("culvert_tunnel_connections", &side) >= 1.0);
        ensure!(scrape.sum("culvert_tunnel_streams", &side) == 1.0);
        ensure!(scrape.sum("culvert_tls_handshakes_total", &[side[0], ("result", "ok")]) >= 1.0);
    }
    sandbox.stop("held")?;
    let moved = exchange(&sandbox, CLIENT, to, "up", 1_000_000)?;
    ensure!(moved["failure"].is_null(), "{moved}");
    for (node, reporter) in [(Node::A, "source"), (Node::B, "destination")] {
        let of = [("reporter", reporter), ("source_workload", "client")];
        let scrape = wait_for(&sandbox, node, "both ends", |scrape| scrape.sum(CLOSED, &of) == 2.0)?;
        ensure!(scrape.sum(OPENED, &of) == 2.0 && scrape.sum(FAILED, &of) == 0.0, "{scrape:?}");
        ensure!(scrape.samples(CLOSED, &of)[0].0 == expected(reporter, "-"));
        ensure!(scrape.sum(RECEIVED, &of) >= 1_000_000.0);
        ensure!(scrape.sum("istio_tcp_sockets_open", &[("reporter", reporter)]) == 0.0);
    }
    Ok(())
}

/// [M.3]: a plaintext inbound connection, which the kernel passes, has the destination's report only; [M.1] no principal.
#[test]
fn plaintext_that_the_kernel_passes_is_reported_by_the_destination() -> Result<()> {
    let mut sandbox = mesh("t-plain", &[])?;
    let to = sandbox.pod(SERVER)?.at(Family::V4, 7000);
    sandbox.start_in_pod("held", OUTSIDER, &["hold", "--to", &to.to_string()])?;
    let of = [("reporter", "destination"), ("source_workload", "outsider")];
    let mut before = None;
    let scrape = wait_for(&sandbox, Node::B, "live bytes of a connection of the kernel's", |scrape| {
        let bytes = (scrape.sum(RECEIVED, &of), scrape.sum(SENT, &of));
        let first = *before.get_or_insert(bytes);
        bytes.0 > first.0 && bytes.1 > first.1
    })?;
    let (labels, opened) = scrape.samples(OPENED, &of)[0];
    ensure!(*opened == 1.0, "{scrape:?}");
    for (label, value) in [
        ("connection_security_policy", "unknown"),
        ("source_principal", "unknown"),
        ("destination_principal", "unknown"),
        ("destination_workload", "server"),
        ("response_flags", "-"),
    ] {
        ensure!(labels[label] == value, "{label}: {labels:?}");
    }
    ensure!(scrape.sum("culvert_open_connections", &[("carried", "kernel")]) == 1.0);
    sandbox.stop("held")?;
    let moved = exchange(&sandbox, OUTSIDER, to, "up", 300_000)?;
    ensure!(moved["failure"].is_null(), "{moved}");
    let scrape = wait_for(&sandbox, Node::B, "both ends", |scrape| scrape.sum(CLOSED, &of) == 2.0)?;
    ensure!(scrape.sum(OPENED, &of) == 2.0 && scrape.sum(FAILED, &of) == 0.0, "{scrape:?}");
    ensure!(scrape.sum(RECEIVED, &of) >= 300_000.0 && scrape.sum(RECEIVED, &of) < 400_000.0, "{scrape:?}");
    ensure!(scrape.sum("culvert_open_connections", &[("carried", "kernel")]) == 0.0);
    let passed = [("pod", "server"), ("answer", "pass"), ("reason", "no-allow-policies")];
    ensure!(scrape.sum("culvert_kernel_verdicts_total", &passed) == 2.0, "{scrape:?}");
    // The client's node has nothing to report: nobody there is in the mesh.
    ensure!(Scrape::of(&sandbox, Node::A)?.sum(OPENED, &[]) == 0.0);
    Ok(())
}

/// A connection that is older than enrolment, which the kernel will not report, is counted and told when it ends.
#[test]
fn a_connection_older_than_enrolment_is_counted_and_its_end_is_told() -> Result<()> {
    let mut sandbox = Sandbox::build(plan("t-older"))?;
    let to = sandbox.pod(SERVER)?.at(Family::V4, 7000);
    sandbox.start_in_pod("held", OUTSIDER, &["hold", "--to", &to.to_string()])?;
    let log = sandbox.log_path("held");
    command::wait_for("the connection stands", LIMIT, || {
        Ok(fs::read_to_string(&log)?.contains("\"rounds\":3,").then_some(()))
    })?;
    sandbox.start_mesh(&MeshPlan::new(built("culvert")?))?;
    let older = [("reporter", "destination"), ("carried", "pre-enrolment")];
    let scrape = wait_for(&sandbox, Node::B, "the older connection", |scrape| {
        scrape.sum("culvert_open_connections", &older) == 1.0
    })?;
    ensure!(scrape.sum(RECEIVED, &[("source_workload", "outsider")]) > 0.0, "{scrape:?}");
    sandbox.stop("held")?;
    let line = command::wait_for("its line", LIMIT, || {
        let (lines, _) = sandbox.agent_log(Node::B, 0)?;
        Ok(lines.into_iter().find(|line| {
            line.message() == "connection complete" && line.field("src.workload").as_deref() == Some("outsider")
        }))
    })?;
    ensure!(line.field("dst.addr") == Some(to.to_string()), "{line:?}");
    ensure!(line.field("bytes_recv").is_some_and(|bytes| bytes != "0"), "{line:?}");
    wait_for(&sandbox, Node::B, "its end", |scrape| {
        scrape.sum(CLOSED, &[("source_workload", "outsider")]) == 1.0
            && scrape.sum("culvert_open_connections", &older) == 0.0
    })?;
    Ok(())
}

/// [M.2]: what policy refuses has DENY, what cannot be reached has CONNECT, on both sides where both know of it; a tunnel's
/// port that does not answer has NETWORK_POLICY.
#[test]
fn refused_and_failed_connections_carry_their_flags() -> Result<()> {
    let mut sandbox = Sandbox::build(plan("t-flags"))?;
    sandbox.manifests().apply("mesh.yaml", HASTY_MESH)?;
    sandbox.start_mesh(&MeshPlan::new(built("culvert")?))?;
    sandbox.manifests().apply(
        "policy.yaml",
        "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: strict, namespace: default}\n\
         spec: {mtls: {mode: STRICT}}\n",
    )?;
    let to = sandbox.pod(SERVER)?.at(Family::V4, 7000);
    let denied = [("source_workload", "outsider"), ("response_flags", "DENY")];
    let scrape = wait_for(&sandbox, Node::B, "the refusal of plaintext", |scrape| {
        // Until the policy is in force it is served.
        let _ = exchange(&sandbox, OUTSIDER, to, "echo", 1);
        scrape.sum(FAILED, &denied) >= 1.0
    })?;
    ensure!(scrape.sum(FAILED, &denied) == scrape.sum(CLOSED, &denied), "{scrape:?}");
    ensure!(scrape.sum(OPENED, &denied) == 0.0, "opened always carries -");
    ensure!(scrape.sum(OPENED, &[denied[0]]) == scrape.sum(CLOSED, &[denied[0]]), "{scrape:?}");
    let refused = [("pod", "server"), ("answer", "refuse"), ("reason", "strict-requires-mtls")];
    ensure!(scrape.sum("culvert_kernel_verdicts_total", &refused) >= 1.0, "{scrape:?}");

    // What a NetworkPolicy does that forgets the tunnel's port; there is no tunnel yet that would stand.
    let node = sandbox.node_place(Node::B);
    nft(node, "table inet no-tunnels {\nchain c {\ntype filter hook forward priority -1\ntcp dport 15008 drop\n}\n}")?;
    let failed = exchange(&sandbox, CLIENT, to, "echo", 1)?;
    ensure!(!failed["failure"].is_null(), "{failed}");
    let dropped = [("reporter", "source"), ("source_workload", "client"), ("response_flags", "NETWORK_POLICY")];
    let scrape = wait_for(&sandbox, Node::A, "a tunnel's port that does not answer", |scrape| {
        scrape.sum(FAILED, &dropped) == 1.0
    })?;
    ensure!(scrape.sum(CLOSED, &dropped) == 1.0 && scrape.sum(OPENED, &dropped) == 0.0, "{scrape:?}");
    nft(node, "delete table inet no-tunnels")?;
    let line = command::wait_for("its line", LIMIT, || {
        let (lines, _) = sandbox.agent_log(Node::A, 0)?;
        Ok(lines.into_iter().find(|line| line.field("reason").as_deref() == Some("network-policy")))
    })?;
    ensure!(line.field("error").is_some_and(|error| error.contains("NetworkPolicy")), "{line:?}");

    // Nobody listens on this port: the server's side cannot connect, and the client's is told so.
    let nobody = sandbox.pod(SERVER)?.at(Family::V4, 7999);
    let failed = exchange(&sandbox, CLIENT, nobody, "echo", 1)?;
    ensure!(!failed["failure"].is_null(), "{failed}");
    // The client's side has opened the one before too.
    for (node, reporter, opened) in [(Node::A, "source", 2.0), (Node::B, "destination", 1.0)] {
        let of = [("reporter", reporter), ("source_workload", "client"), ("response_flags", "CONNECT")];
        let scrape = wait_for(&sandbox, node, "the failed connection", |scrape| scrape.sum(FAILED, &of) == 1.0)?;
        ensure!(scrape.sum(CLOSED, &of) == 1.0 && scrape.sum(OPENED, &[of[0], of[1]]) == opened, "{scrape:?}");
    }
    // To a reserved port through the mesh: the client's side refuses by itself ([K.2]).
    let reserved = sandbox.pod(SERVER)?.at(Family::V4, 15006);
    let looped = exchange(&sandbox, CLIENT, reserved, "echo", 1)?;
    ensure!(!looped["failure"].is_null(), "{looped}");
    let of = [("reporter", "source"), ("reason", "loop")];
    wait_for(&sandbox, Node::A, "the refusal of a loop", |scrape| {
        scrape.sum("culvert_refusals_total", &of) == 1.0
            && scrape.sum(FAILED, &[("reporter", "source"), ("response_flags", "DENY")]) == 1.0
    })?;
    Ok(())
}

/// The mesh's configuration with a short time-out of connects.
const HASTY_MESH: &str = "\
apiVersion: v1
kind: ConfigMap
metadata: {name: istio, namespace: istio-system}
data:
  mesh: |-
    rootNamespace: istio-system
    trustDomain: cluster.local
    connectTimeout: 2s
";

fn nft(place: &Place, rules: &str) -> Result<()> {
    let mut nft = place.command("nft")?;
    command::finish(nft.args(["-f", "-"]), Some(&format!("{rules}\n"))).map(drop)
}

/// However many kinds of connections there are, the label sets are bounded; the rest is counted together.
#[test]
fn label_sets_are_bounded_and_the_rest_is_counted_together() -> Result<()> {
    let sandbox = mesh("t-cap", &["--metrics-label-sets", "1"])?;
    let server = sandbox.pod(SERVER)?.at(Family::V4, 7000);
    let service = SocketAddr::new(sandbox.cluster_ip(SERVER, Family::V4)?, 7000);
    for to in [server, service, service] {
        let moved = exchange(&sandbox, CLIENT, to, "up", 1000)?;
        ensure!(moved["failure"].is_null(), "{moved}");
    }
    let scrape = wait_for(&sandbox, Node::A, "three ends", |scrape| scrape.sum(CLOSED, &[]) == 3.0)?;
    ensure!(scrape.sum(OPENED, &[("source_workload", "client")]) == 1.0, "{scrape:?}");
    let rest = [("reporter", "source"), ("source_workload", "unknown"), ("destination_service", "unknown")];
    ensure!(scrape.sum(OPENED, &rest) == 2.0, "{scrape:?}");
    ensure!(scrape.sum("culvert_metrics_label_set_overflows_total", &[]) >= 1.0, "{scrape:?}");
    Ok(())
}

/// What is exposed is what docs/metrics.md says, and Prometheus' own tool finds nothing to say about it.
#[test]
fn the_exposition_is_as_documented_and_as_prometheus_wants_it() -> Result<()> {
    // Some are of the API server.
    let sandbox = mesh_of(plan("t-text").source(Source::Api), &[])?;
    let to = SocketAddr::new(sandbox.cluster_ip(SERVER, Family::V4)?, 7000);
    exchange(&sandbox, CLIENT, to, "echo", 1)?;
    // A refusal and a failure, so that every metric has a sample.
    exchange(&sandbox, CLIENT, sandbox.pod(SERVER)?.at(Family::V4, 15006), "echo", 1)?;
    let scrape = wait_for(&sandbox, Node::A, "both ends", |scrape| scrape.sum(CLOSED, &[]) == 2.0)?;
    let exposed: BTreeSet<&str> = scrape.0.keys().map(String::as_str).collect();
    let page = page()?;
    let documented = documented(&page);
    ensure!(
        exposed == documented,
        "exposed, not documented: {:?}; documented, not exposed: {:?}",
        exposed.difference(&documented).collect::<Vec<_>>(),
        documented.difference(&exposed).collect::<Vec<_>>()
    );

    for (name, least) in [
        ("culvert_certificate_expiry_timestamp_seconds", 1.7e9),
        ("culvert_enrolled_pods", 1.0),
        ("culvert_control_answers", 1.0),
        ("culvert_snapshot_generation", 1.0),
        ("process_resident_memory_bytes", 1e6),
        ("process_open_fds", 10.0),
        ("process_start_time_seconds", 1.7e9),
        ("istio_build", 1.0),
    ] {
        ensure!(scrape.sum(name, &[]) >= least, "{name} is {}", scrape.sum(name, &[]));
    }
    ensure!(scrape.sum("culvert_kernel_program_instructions", &[("program", "inbound")]) > 100.0);
    ensure!(scrape.sum("culvert_kernel_map_capacity", &[("map", "PODS")]) == 16384.0);
    ensure!(scrape.sum("culvert_kernel_map_entries", &[("map", "PODS")]) == 1.0);
    ensure!(scrape.sum("culvert_api_watch_up", &[("kind", "Pod")]) == 1.0);
    ensure!(scrape.sum("culvert_api_watch_up", &[("kind", "PeerAuthentication")]) == 1.0);

    let (head, text) = get(&sandbox, Node::A, "/stats/prometheus", "*/*")?;
    ensure!(head.contains("text/plain; version=0.0.4"), "{head}");
    promtool(&text)?;
    let (head, text) =
        get(&sandbox, Node::A, "/metrics", "application/openmetrics-text;version=1.0.0,text/plain;q=0.5")?;
    ensure!(head.contains("application/openmetrics-text; version=1.0.0"), "{head}");
    ensure!(text.ends_with("# EOF\n"), "{text}");
    let (head, _) = get(&sandbox, Node::A, "/", "*/*")?;
    ensure!(head.starts_with("HTTP/1.1 404 "), "{head}");
    Ok(())
}

/// `promtool check metrics`: an error where it does not parse, or lints.
fn promtool(text: &str) -> Result<()> {
    check(&["check", "metrics"], Some(text))
}

/// `promtool check rules`, likewise; not every version reads them from its standard input.
fn check_rules(text: &str) -> Result<()> {
    let file = tempfile::Builder::new().suffix(".yaml").tempfile()?;
    fs::write(file.path(), text)?;
    check(&["check", "rules", file.path().to_str().context("a path that is text")?], None)
}

fn check(arguments: &[&str], input: Option<&str>) -> Result<()> {
    let program = command::find("promtool").context("`cargo xtask setup` installs it")?;
    let mut promtool = Command::new(program);
    match command::finish(promtool.args(arguments), input) {
        Ok(_) => Ok(()),
        Err(error) => bail!("{error:#}"),
    }
}

/// The text of docs/metrics.md.
fn page() -> Result<String> {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/metrics.md");
    fs::read_to_string(&page).with_context(|| format!("read {}", page.display()))
}

/// Whether it is one of the agent's.
fn is_metric(name: &str) -> bool {
    ["istio_", "culvert_", "process_"].iter().any(|prefix| name.starts_with(prefix))
}

/// The metrics that the page describes.
fn documented(page: &str) -> BTreeSet<&str> {
    let rows = page.lines().filter_map(|line| line.strip_prefix("| `")?.split_once('`'));
    rows.map(|(name, _)| name).filter(|name| is_metric(name)).collect()
}

/// The page's alerts and queries are understood by Prometheus, and ask for metrics that there are.
#[test]
fn the_documented_alerts_and_queries_are_prometheus_own_and_ask_for_what_there_is() -> Result<()> {
    let page = page()?;
    let block = |kind: &str| {
        let (_, rest) = page.split_once(&format!("```{kind}\n")).with_context(|| format!("a block of {kind}"))?;
        rest.split_once("```").map(|(text, _)| text).with_context(|| format!("the end of the block of {kind}"))
    };
    let (alerts, queries) = (block("yaml")?, block("promql")?);
    check_rules(alerts)?;
    let mut rules = "groups:\n- name: queries\n  rules:\n".to_owned();
    let asked = queries.split("# ").skip(1).filter_map(|query| query.split_once('\n'));
    for (nth, (_, query)) in asked.enumerate() {
        let lines: Vec<String> = query.lines().map(|line| format!("      {line}\n")).collect();
        rules += &format!("  - record: query:{nth}\n    expr: |-\n{}", lines.concat());
    }
    ensure!(rules.contains("query:3"), "{rules}");
    check_rules(&rules)?;

    let documented = documented(&page);
    let expressions = alerts.lines().filter_map(|line| line.trim_start().strip_prefix("expr: ")).chain(queries.lines());
    let mut used = BTreeSet::new();
    for expression in expressions.filter(|line| !line.starts_with('#')) {
        used.extend(words_of(expression).filter(|word| is_metric(word)));
    }
    ensure!(used.len() > 10, "{used:?}");
    let unknown: Vec<_> = used.difference(&documented).collect();
    ensure!(unknown.is_empty(), "no such metrics: {unknown:?}");
    Ok(())
}

fn words_of(text: &str) -> impl Iterator<Item = &str> {
    text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_')
}

/// However fast a pod connects, the log grows at a bounded speed, says how much it leaves out, and metrics count all.
#[test]
fn lines_that_a_pod_causes_are_limited_and_the_rest_is_told() -> Result<()> {
    let sandbox = mesh("t-limit", &["--log-limit", "10"])?;
    let to = sandbox.pod(SERVER)?.at(Family::V4, 7000).to_string();
    let short: serde_json::Value =
        sandbox.call(CLIENT, &["short", "--to", &to, "--count", "500", "--parallel", "4"])?;
    let scrape = wait_for(&sandbox, Node::A, "all ends", |scrape| scrape.sum(CLOSED, &[]) == 500.0)
        .with_context(|| format!("{short}"))?;
    let suppressed = scrape.sum("culvert_log_lines_suppressed_total", &[]);
    ensure!(suppressed > 0.0, "{short}: nothing was held back");
    let told = command::wait_for("what was held back is told", LIMIT, || {
        let (lines, _) = sandbox.agent_log(Node::A, 0)?;
        let number = |field: Option<String>| field.and_then(|text| text.parse::<u64>().ok()).unwrap_or(0);
        let told: u64 = lines.iter().map(|line| number(line.field("suppressed"))).sum();
        let written = lines.iter().filter(|line| line.message().starts_with("connection ")).count();
        // The last of them are told within a second.
        Ok((told as usize + written >= 500).then_some((told, written)))
    })?;
    ensure!(told.0 > 0 && told.0 as usize + told.1 == 500, "{told:?}: told and written are all there are");
    let (lines, _) = sandbox.agent_log(Node::A, 0)?;
    let held = lines.iter().find(|line| line.field("suppressed").is_some()).context("it was just there")?;
    ensure!(held.field("pod").as_deref() == Some(CLIENT), "{held:?}");
    ensure!(held.field("reason").as_deref() == Some("tunnelled"), "{held:?}");
    Ok(())
}

/// A receiver of spans: what an OpenTelemetry collector is to the agents.
#[derive(Clone, Default)]
struct Collector(Arc<Mutex<Vec<Span>>>);

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: tonic::Request<ExportTraceServiceRequest>,
    ) -> Result<tonic::Response<ExportTraceServiceResponse>, tonic::Status> {
        let of_resources = request.into_inner().resource_spans.into_iter();
        let spans = of_resources.flat_map(|of| of.scope_spans).flat_map(|scope| scope.spans);
        self.0.lock().map_err(|_| tonic::Status::internal("a test panicked"))?.extend(spans);
        Ok(tonic::Response::new(ExportTraceServiceResponse::default()))
    }
}

/// §14.2: the server's side joins the client's trace; both sides' spans, and both sides' lines, have the same id.
#[test]
fn both_sides_of_a_connection_are_spans_of_one_trace() -> Result<()> {
    let collector = Collector::default();
    let mut sandbox = Sandbox::build(plan("t-trace"))?;
    let listener = sandbox.node_place(Node::A).inside(|| Ok(std::net::TcpListener::bind("0.0.0.0:4317")?))?;
    listener.set_nonblocking(true)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let service = TraceServiceServer::new(collector.clone());
    let _entered = runtime.enter();
    let incoming = tonic::transport::server::TcpIncoming::from(tokio::net::TcpListener::from_std(listener)?);
    let server = runtime.spawn(tonic::transport::Server::builder().serve_with_incoming(service, incoming));
    let mut mesh = MeshPlan::new(built("culvert")?);
    mesh.agent_arguments = vec!["--otlp-endpoint".to_owned(), format!("http://{}:4317", Node::A.v4())];
    sandbox.start_mesh(&mesh)?;
    let to = SocketAddr::new(sandbox.cluster_ip(SERVER, Family::V4)?, 7000);
    let moved = exchange(&sandbox, CLIENT, to, "up", 1000)?;
    ensure!(moved["failure"].is_null(), "{moved}");
    let spans = command::wait_for("both sides' spans", LIMIT, || {
        let spans = collector.0.lock().map_err(|_| anyhow::anyhow!("a test panicked"))?;
        Ok((spans.len() >= 2).then(|| spans.clone()))
    })?;
    ensure!(spans.len() == 2, "{spans:#?}");
    let of = |name: &str| spans.iter().find(|span| span.name == name).with_context(|| format!("{name}: {spans:#?}"));
    let (client, server_side) = (of("tcp outbound")?, of("tcp inbound")?);
    ensure!(client.trace_id == server_side.trace_id && client.trace_id.len() == 16, "{spans:#?}");
    ensure!(server_side.parent_span_id == client.span_id && client.parent_span_id.is_empty(), "{spans:#?}");
    let id: String = client.trace_id.iter().map(|byte| format!("{byte:02x}")).collect();
    for node in Node::ALL {
        command::wait_for(&format!("a line of {node}'s agent with the trace"), LIMIT, || {
            let (lines, _) = sandbox.agent_log(node, 0)?;
            Ok(lines.iter().any(|line| line.field("trace_id").as_ref() == Some(&id)).then_some(()))
        })?;
        wait_for(&sandbox, node, "the span is counted", |scrape| {
            scrape.sum("culvert_spans_exported_total", &[]) == 1.0
                && scrape.sum("culvert_spans_dropped_total", &[]) == 0.0
        })?;
    }
    server.abort();
    Ok(())
}
