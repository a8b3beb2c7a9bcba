//! What unmodified programs do with their connections, through the mesh: every byte, every kind of end, every load.
//!
//! Counts that take minutes have a reduced default; `cargo xtask test --full` asks for the whole.

use std::fs;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use culvert_tests::capture::Capture;
use culvert_tests::programs::{BurstResult, CutResult, ExchangeResult, Failure, HttpResult, ShortResult, UdpResult};
use culvert_tests::sandbox::{Family, LogLine, MeshPlan, Node, Place, Plan, PodPlan, Sandbox, ServicePlan, built};
use culvert_tests::{command, full, patience};

const FAMILIES: [Family; 2] = [Family::V4, Family::V6];
const HTTP: u16 = 9080;
const EXCHANGE: u16 = 7000;
const SPEAK_FIRST: u16 = 7001;
const CUT: u16 = 7002;
/// Nobody listens there.
const CLOSED: u16 = 7003;

/// A client and a server on node a, and a server on node b, each with every program.
fn plan(instance: &str) -> Plan {
    let server = |node, name: &str| {
        PodPlan::new(node, "default", name)
            .http(&[HTTP])
            .program(&["exchange-serve", &format!("--port={EXCHANGE}")])
            .program(&["exchange-serve", &format!("--port={SPEAK_FIRST}"), "--speak-first"])
            .program(&["cut-serve", &format!("--port={CUT}")])
            .probed(HTTP)
    };
    let ports = [("http", HTTP), ("exchange", EXCHANGE), ("first", SPEAK_FIRST), ("cut", CUT), ("closed", CLOSED)];
    Plan::empty(instance)
        .pod(PodPlan::new(Node::A, "test", "client"))
        .pod(server(Node::A, "near"))
        .pod(server(Node::B, "far"))
        .service(ServicePlan::new("default", "near", &ports))
        .service(ServicePlan::new("default", "far", &ports))
}

fn mesh(instance: &str) -> Result<Sandbox> {
    let mut sandbox = Sandbox::build(plan(instance))?;
    sandbox.start_mesh(&MeshPlan::new(built("culvert")?))?;
    Ok(sandbox)
}

/// Every way to a port of both servers: across the link and on the node, by pod IP and by cluster IP, in both families.
fn ways(sandbox: &Sandbox, port: u16) -> Result<Vec<SocketAddr>> {
    let mut all = Vec::new();
    for server in ["default/far", "default/near"] {
        for family in FAMILIES {
            all.push(sandbox.pod(server)?.at(family, port));
            all.push(SocketAddr::new(sandbox.cluster_ip(server, family)?, port));
        }
    }
    Ok(all)
}

fn exchange(sandbox: &Sandbox, to: SocketAddr, verb: &str, bytes: u64) -> Result<ExchangeResult> {
    let (to, bytes) = (to.to_string(), bytes.to_string());
    sandbox.call("test/client", &["exchange", "--to", &to, "--verb", verb, "--bytes", &bytes])
}

/// The lines of ended connections in an agent's log.
fn ended(sandbox: &Sandbox, node: Node, direction: &str) -> Result<Vec<LogLine>> {
    let (lines, _) = sandbox.agent_log(node, 0)?;
    Ok(lines.into_iter().filter(|line| line.field("direction").as_deref() == Some(direction)).collect())
}

/// Writes a setting of a place's network namespace.
fn set(place: &Place, name: &str, value: &str) -> Result<()> {
    place.inside(|| fs::write(format!("/proc/sys/{name}"), value).with_context(|| format!("write {value} to {name}")))
}

/// Specification §14.2: END_STREAM is a half-close in its direction, and the other goes on.
#[test]
fn half_closes_arrive_in_both_directions_and_a_server_may_speak_first() -> Result<()> {
    let sandbox = mesh("t-half")?;
    let capture = sandbox.capture()?;
    for verb in ["echo", "up", "down", "drain"] {
        for to in ways(&sandbox, EXCHANGE)? {
            let got = exchange(&sandbox, to, verb, 3_000_001)?;
            ensure!(got.failure.is_none(), "{verb} to {to}: {got:?}");
        }
    }
    for to in ways(&sandbox, SPEAK_FIRST)? {
        let got = exchange(&sandbox, to, "speak-first", 0)?;
        ensure!(got.failure.is_none(), "speak-first to {to}: {got:?}");
    }
    ensure!(capture.frames_with_port(15008)? > 0, "no tunnel crossed the link");
    for port in [EXCHANGE, SPEAK_FIRST] {
        ensure!(capture.frames_with_port(port)? == 0, "port {port} was reached outside the tunnel");
    }
    // An orderly end is told as one, on both sides.
    for node in Node::ALL {
        for direction in ["inbound", "outbound"] {
            for line in ended(&sandbox, node, direction)? {
                ensure!(line.field("error").is_none(), "{node}: {line:?}");
            }
        }
    }
    Ok(())
}

#[test]
fn a_large_transfer_arrives_unchanged_in_both_directions() -> Result<()> {
    let sandbox = mesh("t-large")?;
    let bytes = if full() { 1 << 30 } else { 128 << 20 };
    for (verb, family) in [("up", Family::V4), ("down", Family::V6)] {
        let to = sandbox.pod("default/far")?.at(family, EXCHANGE);
        let got = exchange(&sandbox, to, verb, bytes)?;
        ensure!(got.failure.is_none() && got.bytes == bytes, "{verb} to {to}: {got:?}");
        println!("{verb} {} MiB in {} ms: {} MiB/s", bytes >> 20, got.millis, (bytes >> 20) * 1000 / got.millis.max(1));
    }
    Ok(())
}

/// A truncated transfer never looks like a whole one, and a whole one never like a truncated one.
#[test]
fn a_reset_arrives_as_a_reset_and_an_end_as_an_end() -> Result<()> {
    let sandbox = mesh("t-cut")?;
    for to in ways(&sandbox, CUT)? {
        for verb in [
            "server-resets",
            "server-resets-late",
            "client-resets",
            "client-resets-late",
            "client-leaves",
            "client-ends",
        ] {
            let got: CutResult = sandbox.call("test/client", &["cut", "--to", &to.to_string(), "--verb", verb])?;
            let wanted = if verb == "client-ends" { "end" } else { "reset" };
            ensure!(got.saw == wanted, "{verb} to {to}: {got:?}");
        }
    }
    Ok(())
}

/// The port space of one client and one port of one server must not run out: the redirected port is spread, and the
/// leg's source is one that TIME_WAIT does not hold.
#[test]
fn many_short_connections_to_one_port_have_no_error() -> Result<()> {
    let sandbox = mesh("t-short")?;
    if !full() {
        // A seventh of the usual ports, for a fraction of the connections.
        for pod in ["test/client", "default/far"] {
            set(&sandbox.pod(pod)?.place, "net/ipv4/ip_local_port_range", "40000 43999")?;
        }
    }
    let (count, parallel) = if full() { (200_000, 64) } else { (10_000, 16) };
    let families: &[Family] = if full() { &[Family::V4] } else { &FAMILIES };
    for family in families {
        let to = sandbox.pod("default/far")?.at(*family, EXCHANGE);
        let count = count / families.len();
        let arguments =
            ["short", "--to", &to.to_string(), "--count", &count.to_string(), "--parallel", parallel_text(parallel)];
        let got: ShortResult = sandbox.call("test/client", &arguments)?;
        println!(
            "{count} connections to {to} in {} ms: {} per second",
            got.millis,
            count as u64 * 1000 / got.millis.max(1)
        );
        ensure!(got.errors.is_empty() && got.ok == count as u64, "{to}: {got:?}");
    }
    Ok(())
}

fn parallel_text(parallel: u32) -> &'static str {
    if parallel == 64 { "64" } else { "16" }
}

/// Specification §14.3: four stalled streams of 4 MiB would use up a connection window of 16 MiB.
#[test]
fn connections_finish_beside_readers_that_never_read() -> Result<()> {
    let mut sandbox = mesh("t-stall")?;
    let to = sandbox.pod("default/far")?.at(Family::V4, EXCHANGE);
    sandbox.start_in_pod("stall", "test/client", &["stall", "--to", &to.to_string(), "--count", "6"])?;
    // The servers of the six are stuck: the log of the stalled says that they stand, and their bytes stop.
    command::wait_for("six readers stand", Duration::from_secs(10), || {
        Ok(fs::read_to_string(sandbox.log_path("stall"))?.contains("\"held\":6").then_some(()))
    })?;
    let place = sandbox.pod("default/far")?.place.clone();
    let mut before = u64::MAX;
    command::wait_for("the six servers are held back", Duration::from_secs(20), || {
        let sent = place.tcp_counter("TCPOrigDataSent")?;
        let same = sent == std::mem::replace(&mut before, sent);
        std::thread::sleep(Duration::from_millis(300));
        Ok(same.then_some(()))
    })?;
    let got: ShortResult =
        sandbox.call("test/client", &["short", "--to", &to.to_string(), "--count", "400", "--parallel", "100"])?;
    ensure!(got.errors.is_empty() && got.ok == 400, "{got:?}");
    for verb in ["up", "down"] {
        let got = exchange(&sandbox, to, verb, 16 << 20)?;
        ensure!(got.failure.is_none(), "{verb} beside the stalled: {got:?}");
    }
    sandbox.expect_running("stall")?;
    Ok(())
}

/// A listen queue of 128 turns thousands of connections at once into retransmitted SYNs of a second.
#[test]
fn a_burst_of_connections_overflows_no_queue_and_retransmits_no_syn() -> Result<()> {
    const COUNTERS: [&str; 3] = ["ListenOverflows", "ListenDrops", "TCPSynRetrans"];
    const SERVER: u16 = 7005;
    let count = if full() { 8000 } else { 4000 };
    let mut sandbox = Sandbox::build(plan("t-burst"))?;
    let client = sandbox.pod("test/client")?.place.clone();
    let server = sandbox.pod("default/far")?.place.clone();
    // The system's bound of every queue, the application's too: both are there before anybody listens.
    for place in [&client, &server] {
        set(place, "net/core/somaxconn", "16384")?;
    }
    sandbox.start_in_pod("burst-server", "default/far", &["exchange-serve", &format!("--port={SERVER}")])?;
    sandbox.start_mesh(&MeshPlan::new(built("culvert")?))?;
    let counted = || -> Result<Vec<(&str, &str, u64)>> {
        let mut all = Vec::new();
        for (whose, place) in [("client", &client), ("server", &server)] {
            for name in COUNTERS {
                all.push((whose, name, place.tcp_counter(name)?));
            }
        }
        Ok(all)
    };
    for family in FAMILIES {
        let to = sandbox.pod("default/far")?.at(family, SERVER).to_string();
        command::wait_for("the server answers", Duration::from_secs(10), || {
            let got: ShortResult = sandbox.call("test/client", &["short", "--to", &to, "--count", "1"])?;
            Ok((got.ok == 1).then_some(()))
        })?;
        let before = counted()?;
        let (number, limit) = (count.to_string(), (60_000 * patience()).to_string());
        let got: BurstResult =
            sandbox.call("test/client", &["burst", "--to", &to, "--count", &number, "--timeout-ms", &limit])?;
        println!("{to}: {got:?}");
        ensure!(got.errors.is_empty() && got.ok == count, "{got:?}");
        let after = counted()?;
        ensure!(after == before, "in the namespaces of client and server: {before:?}, then {after:?}");
    }
    Ok(())
}

/// Specification §3: UDP is not captured. A datagram arrives as it was sent, from the address it was sent from, and so does its
/// answer: to a pod of the mesh, from one, and between two; in one packet, and in fragments.
#[test]
fn udp_passes_untouched_by_default() -> Result<()> {
    const UDP: &str = "7004";
    let server = |node, name: &str| PodPlan::new(node, "default", name).program(&["udp-serve", "--port", UDP]);
    let outside = |pod: PodPlan| pod.label("istio.io/dataplane-mode", "none");
    let plan = Plan::empty("t-udp")
        .pod(PodPlan::new(Node::A, "test", "client"))
        .pod(outside(PodPlan::new(Node::A, "test", "outsider")))
        .pod(server(Node::B, "far"))
        .pod(outside(server(Node::B, "legacy")));
    let mut sandbox = Sandbox::build(plan)?;
    sandbox.start_mesh(&MeshPlan::new(built("culvert")?))?;
    for (from, to) in
        [("test/outsider", "default/far"), ("test/client", "default/legacy"), ("test/client", "default/far")]
    {
        for family in FAMILIES {
            let own = sandbox.pod(from)?.at(family, 0).ip();
            let to = sandbox.pod(to)?.at(family, UDP.parse()?);
            for bytes in ["1", "8192"] {
                for connected in [None, Some("--connected")] {
                    let mut call = vec!["udp", "--to", "", "--bytes", bytes];
                    let text = to.to_string();
                    call[2] = &text;
                    call.extend(connected);
                    let about = format!("{bytes} bytes from {from} to {to}, {connected:?}");
                    let mut last = None;
                    // The network may lose a datagram; what the mesh does to one, it does to all.
                    let got = command::wait_for(&about, Duration::from_secs(10), || {
                        let got: UdpResult = sandbox.call(from, &call)?;
                        let lost = got.failure == Some(Failure::TimedOut);
                        last = Some(got.clone());
                        Ok((!lost).then_some(got))
                    })
                    .with_context(|| format!("the last: {last:?}"))?;
                    ensure!(got.failure.is_none() && got.from == Some(to), "{about}: {got:?}");
                    let seen = got.seen.with_context(|| about.clone())?;
                    ensure!(seen.ip() == own, "{about}: the server saw {seen}");
                    ensure!(got.own.is_some_and(|own| own.port() == seen.port()), "{about}: {got:?}");
                }
            }
        }
    }
    Ok(())
}

/// Specification §14.2: the server's agent answers 503, and the client must not wait for a time-out.
#[test]
fn a_closed_port_is_refused_at_once() -> Result<()> {
    let sandbox = mesh("t-closed")?;
    for to in ways(&sandbox, CLOSED)? {
        let got = sandbox.http("test/client", to, "nobody")?;
        ensure!(matches!(got.failure, Some(Failure::Refused | Failure::Reset)), "{to}: {got:?}");
        ensure!(got.millis < 1000, "{to}: refused after {} ms", got.millis);
    }
    let lines = command::wait_for("both sides told the refusals", Duration::from_secs(3), || {
        let lines = ended(&sandbox, Node::B, "inbound")?;
        Ok((lines.len() == 4).then_some(lines))
    })?;
    for line in lines {
        ensure!(line.field("reason").as_deref() == Some("connect"), "{line:?}");
        ensure!(line.field("error").is_some_and(|e| e.contains("refused")), "{line:?}");
    }
    Ok(())
}

/// [K.5]: a probe that nobody answered must not leave a door open for the next process that gets its source port.
#[test]
fn an_unanswered_probe_exempts_nobody_else() -> Result<()> {
    let mut sandbox = mesh("t-probe-port")?;
    let strict = "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\n\
                  metadata: {name: strict, namespace: default}\nspec: {mtls: {mode: STRICT}}\n";
    sandbox.manifests().apply("strict.yaml", strict)?;
    for family in FAMILIES {
        let port = CLOSED + if family == Family::V4 { 0 } else { 1 };
        let to = sandbox.pod("default/far")?.at(family, port);
        let arguments = ["http-get", "--to", &to.to_string(), "--timeout-ms", "1000"];
        command::wait_for("host processes are refused", Duration::from_secs(3), || {
            let http = sandbox.pod("default/far")?.at(family, HTTP).to_string();
            let got: HttpResult = sandbox.call_on_node(Node::B, &["http-get", "--to", &http])?;
            Ok(got.failure.is_some().then_some(()))
        })?;
        // One source port for both.
        set(sandbox.node_place(Node::B), "net/ipv4/ip_local_port_range", "45555 45555")?;
        let got: HttpResult = sandbox.call_at(&sandbox.kubelet_place(Node::B)?, &arguments)?;
        ensure!(got.failure == Some(Failure::Refused), "a probe of a closed port: {got:?}");
        sandbox.start_in_pod(
            &format!("late-{port}"),
            "default/far",
            &["http-serve", "--name", "late", &format!("--port={port}")],
        )?;
        command::wait_for("the late server listens", Duration::from_secs(3), || {
            let place = sandbox.pod("default/far")?.place.clone();
            let open = place.inside(|| Ok(std::net::TcpStream::connect(("127.0.0.1", port)).is_ok()))?;
            Ok(open.then_some(()))
        })?;
        let got: HttpResult = sandbox.call_on_node(Node::B, &arguments)?;
        ensure!(got.failure == Some(Failure::Refused), "a host process with the probe's source port: {got:?}");
        let got: HttpResult = sandbox.call_at(&sandbox.kubelet_place(Node::B)?, &arguments)?;
        ensure!(got.status == Some(200), "the probe itself: {got:?}");
        set(sandbox.node_place(Node::B), "net/ipv4/ip_local_port_range", "32768 60999")?;
    }
    Ok(())
}

/// Specification §3 and §8, the last rows: by its own address untouched, by its Service with the policy's answer.
#[test]
fn a_pod_reaches_itself_by_its_address_and_by_its_service() -> Result<()> {
    let sandbox = mesh("t-self")?;
    for family in FAMILIES {
        let own = sandbox.pod("default/far")?.at(family, HTTP);
        let cluster = SocketAddr::new(sandbox.cluster_ip("default/far", family)?, HTTP);
        for to in [own, cluster] {
            let got = sandbox.http("default/far", to, "self")?;
            let seen = got.seen.with_context(|| format!("{to}: {:?} {:?}", got.failure, got.error))?;
            ensure!(seen.peer.ip() == own.ip(), "{to}: saw {}", seen.peer);
            ensure!(got.peer == Some(to), "{to}: the client sees {:?}", got.peer);
        }
    }
    Ok(())
}

/// [T.3]: beside each other on a node, two pods get the same tunnel, identities and decisions, and nothing readable
/// crosses the node's bridge.
#[test]
fn pods_of_one_node_are_tunnelled_with_identity() -> Result<()> {
    let sandbox = mesh("t-near")?;
    sandbox.manifests().apply(
        "strict.yaml",
        "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: strict, namespace: default}\n\
         spec: {mtls: {mode: STRICT}}\n",
    )?;
    let bridge = Capture::start(sandbox.node_place(Node::A), "cni0", 64 << 20)?;
    for family in FAMILIES {
        let near = sandbox.pod("default/near")?.at(family, HTTP);
        for to in [near, SocketAddr::new(sandbox.cluster_ip("default/near", family)?, HTTP)] {
            let got = sandbox.http("test/client", to, "secret-on-the-bridge")?;
            let seen = got.seen.with_context(|| format!("{to}: {:?} {:?}", got.failure, got.error))?;
            ensure!(seen.peer.ip() == sandbox.pod("test/client")?.at(family, 1).ip(), "{to}: saw {}", seen.peer);
        }
    }
    ensure!(!bridge.contains(b"secret-on-the-bridge")?, "readable on the bridge");
    ensure!(bridge.frames_with_port(15008)? > 0, "the recording of the bridge shows no tunnel");
    for direction in ["inbound", "outbound"] {
        let lines = command::wait_for("four connections were told", Duration::from_secs(3), || {
            let lines = ended(&sandbox, Node::A, direction)?;
            Ok((lines.len() == 4).then_some(lines))
        })?;
        for line in lines {
            let field = |name: &str| line.field(name).unwrap_or_default();
            ensure!(field("src.identity") == "spiffe://cluster.local/ns/test/sa/client", "{line:?}");
            ensure!(field("dst.identity") == "spiffe://cluster.local/ns/default/sa/near", "{line:?}");
            ensure!(field("dst.hbone_addr").ends_with(":9080"), "{line:?}");
        }
    }
    Ok(())
}

/// The first connection of a pair pays for the tunnel, but for no lost packet, in either family.
#[test]
fn the_first_connection_loses_no_packet() -> Result<()> {
    for family in FAMILIES {
        let sandbox = mesh(match family {
            Family::V4 => "t-first4",
            Family::V6 => "t-first6",
        })?;
        let to = sandbox.pod("default/far")?.at(family, HTTP);
        let got: HttpResult = sandbox.http("test/client", to, "first")?;
        ensure!(got.status == Some(200), "{got:?}");
        println!("first connection to {to}: {} ms", got.millis);
        ensure!(got.millis < 900, "the first connection to {to} took {} ms", got.millis);
        for pod in ["test/client", "default/far"] {
            let again = sandbox.pod(pod)?.place.tcp_counter("TCPSynRetrans")?;
            ensure!(again == 0, "{again} SYNs were sent again in the namespace of {pod}");
        }
    }
    Ok(())
}
