//! Nothing gets round the mesh: each row of docs/escapes.md, played from inside a pod as root with CAP_NET_RAW.
//!
//! Each is captured and judged, or refused and counted with a reason; none is passed ([K.4]).

use std::fs;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;
use culvert::datapath::inspect;
use culvert_common::{Answer, Direction, LAYOUT_VERSION, Reason};
use culvert_tests::programs::{AttackResult, Failure, Way};
use culvert_tests::sandbox::{Family, MeshPlan, Node, Place, Plan, PodPlan, Sandbox, built, own_name};
use culvert_tests::{command, patience};
use nix::sys::signal::Signal;

const HTTP: u16 = 9080;
const EXCHANGE: u16 = 7000;
/// For what the kernel counts a moment after a program has ended.
const SOON: Duration = Duration::from_secs(5);

/// `client` and `far` are in the mesh, `legacy` is not: a plaintext connection to it would be accepted.
fn mesh(name: &str, agent_arguments: &[&str]) -> Result<Sandbox> {
    mesh_with(name, agent_arguments, &[])
}

/// The same; the servers listen on `more` ports.
fn mesh_with(name: &str, agent_arguments: &[&str], more: &[u16]) -> Result<Sandbox> {
    let server = |name: &str| {
        let exchange = format!("--port={EXCHANGE}");
        let ports = [&[HTTP][..], more].concat();
        PodPlan::new(Node::B, "test", name).http(&ports).program(&["exchange-serve", &exchange])
    };
    let plan = Plan::empty(&own_name(name))
        .pod(PodPlan::new(Node::A, "test", "client"))
        .pod(PodPlan::new(Node::A, "test", "free").label("culvert.io/udp", "allow"))
        .pod(PodPlan::new(Node::A, "test", "late").label("istio.io/dataplane-mode", "none"))
        .pod(server("far"))
        .pod(server("legacy").label("istio.io/dataplane-mode", "none"));
    let mut sandbox = Sandbox::build(plan)?;
    sandbox.start_mesh(&mesh_plan(agent_arguments)?)?;
    Ok(sandbox)
}

fn mesh_plan(agent_arguments: &[&str]) -> Result<MeshPlan> {
    let mut mesh = MeshPlan::new(built("culvert")?);
    mesh.agent_arguments = agent_arguments.iter().map(|&argument| argument.to_owned()).collect();
    Ok(mesh)
}

/// How often node a's kernel programs gave this answer for this reason to what leaves pods.
fn counted(sandbox: &Sandbox, answer: Answer, reason: Reason) -> Result<u64> {
    verdicts(sandbox, Node::A, Direction::Outbound, answer, reason)
}

fn verdicts(sandbox: &Sandbox, node: Node, direction: Direction, answer: Answer, reason: Reason) -> Result<u64> {
    let maps = inspect::read(&sandbox.pin_dir(node).join(format!("v{LAYOUT_VERSION}")))?;
    let counters = maps
        .verdicts
        .iter()
        .filter(|(key, _)| (key.direction, key.answer, key.reason) == (direction as u8, answer as u8, reason as u8));
    Ok(counters.map(|(_, times)| times).sum())
}

/// An address of the client's network that no pod has.
fn foreign(family: Family) -> &'static str {
    match family {
        Family::V4 => "--from=10.244.1.77",
        Family::V6 => "--from=fd00:10:244:1::4d",
    }
}

/// One attack as a process of `place`.
fn attack(
    sandbox: &Sandbox,
    place: &Place,
    way: Way,
    to: SocketAddr,
    marker: &str,
    more: &[&str],
) -> Result<AttackResult> {
    let value = way.to_possible_value().context("every way has a name")?;
    let (to, limit) = (to.to_string(), (3000 * patience()).to_string());
    let arguments = ["attack", "--way", value.get_name(), "--to", &to, "--marker", marker, "--timeout-ms", &limit];
    sandbox.call_at(place, &[&arguments[..], more].concat())
}

/// Where a process is in the pod's network that no program of the node's cgroup sees: `nsenter` from a host's session.
fn elsewhere(sandbox: &Sandbox, pod: &Place) -> Result<Place> {
    let cgroup = sandbox.node_cgroup(Node::A).parent().context("the sandbox's cgroup")?.join("elsewhere");
    fs::create_dir(&cgroup).context("a cgroup outside the node's")?;
    Ok(Place { cgroup, netns: pod.netns.clone() })
}

/// Whatever kind of socket it is, whoever owns it, whatever it is bound to: TCP is captured, and arrives by the tunnel.
#[test]
fn every_way_to_connect_is_captured() -> Result<()> {
    let sandbox = mesh("escape-tcp", &[])?;
    let link = sandbox.capture()?;
    let (client, far) = (sandbox.pod("test/client")?.place.clone(), sandbox.pod("test/far")?.clone());
    let inner = Place { cgroup: client.cgroup.join("inner"), netns: client.netns.clone() };
    fs::create_dir(&inner.cgroup).context("a cgroup inside the container's")?;
    let rows: [(&Place, Way, &[Family], &[&str]); 13] = [
        (&client, Way::Plain, &[Family::V4, Family::V6], &[]),
        (&inner, Way::Plain, &[Family::V4], &[]),
        (&client, Way::Uid, &[Family::V4, Family::V6], &[]),
        (&client, Way::Mark, &[Family::V4, Family::V6], &[]),
        (&client, Way::FastOpen, &[Family::V4, Family::V6], &[]),
        (&client, Way::FastOpenConnect, &[Family::V4, Family::V6], &[]),
        (&client, Way::Mptcp, &[Family::V4, Family::V6], &[]),
        (&client, Way::Mapped, &[Family::V4], &[]),
        (&client, Way::IoUring, &[Family::V4, Family::V6], &[]),
        (&client, Way::Bound, &[Family::V4, Family::V6], &["--from-port=15001"]),
        (&client, Way::Bound, &[Family::V4, Family::V6], &["--from-port=15006"]),
        (&client, Way::Bound, &[Family::V4, Family::V6], &["--from-port=15008"]),
        (&client, Way::Bound, &[Family::V4, Family::V6], &["--from-port=700"]),
    ];
    for (place, way, families, more) in rows {
        for family in families {
            let what = format!("{way:?} {family:?} {more:?}");
            let before = counted(&sandbox, Answer::Agent, Reason::Captured)?;
            let got = attack(&sandbox, place, way, far.at(*family, HTTP), "captured-marker", more)?;
            println!("{what}: {got:?}");
            ensure!(got.outcome == "answered", "{what}: {got:?}");
            ensure!(counted(&sandbox, Answer::Agent, Reason::Captured)? > before, "{what} was not captured");
            ensure!(!link.contains(b"captured-marker")?, "{what}: readable on the link");
        }
    }
    ensure!(link.frames_with_port(15008)? > 0, "no tunnel crossed the link");
    let (content, text) = culvert(&sandbox, &["capture", "proof"])?;
    ensure!(content, "{text}");
    Ok(())
}

/// What does not connect is stopped where it comes into the node, and counted with its reason.
#[test]
fn what_does_not_connect_does_not_leave_the_pod() -> Result<()> {
    let sandbox = mesh("escape-raw", &[])?;
    let link = sandbox.capture()?;
    let (client, legacy) = (sandbox.pod("test/client")?.place.clone(), sandbox.pod("test/legacy")?.clone());
    let elsewhere = elsewhere(&sandbox, &client)?;
    let (foreign4, foreign6) = ([foreign(Family::V4)], [foreign(Family::V6)]);
    let rows: [(&Place, Way, Family, &[&str], Reason); 25] = [
        (&elsewhere, Way::Plain, Family::V4, &[], Reason::NotCaptured),
        (&elsewhere, Way::Plain, Family::V6, &[], Reason::NotCaptured),
        (&client, Way::RawSyn, Family::V4, &[], Reason::NotCaptured),
        (&client, Way::RawSyn, Family::V6, &[], Reason::NotCaptured),
        (&client, Way::PacketSyn, Family::V4, &[], Reason::NotCaptured),
        (&client, Way::PacketSyn, Family::V6, &[], Reason::NotCaptured),
        (&client, Way::BypassSyn, Family::V4, &[], Reason::NotCaptured),
        (&client, Way::BypassSyn, Family::V6, &[], Reason::NotCaptured),
        (&client, Way::FragmentSyn, Family::V4, &[], Reason::HiddenHeader),
        (&client, Way::FragmentSyn, Family::V6, &[], Reason::HiddenHeader),
        (&client, Way::OptionsSyn, Family::V6, &[], Reason::HiddenHeader),
        (&client, Way::TaggedSyn, Family::V4, &[], Reason::HiddenHeader),
        (&client, Way::TaggedSyn, Family::V6, &[], Reason::HiddenHeader),
        (&client, Way::ForeignSyn, Family::V4, &foreign4, Reason::ForeignSource),
        (&client, Way::ForeignSyn, Family::V6, &foreign6, Reason::ForeignSource),
        (&client, Way::ForeignUdp, Family::V4, &foreign4, Reason::ForeignSource),
        (&client, Way::ForeignUdp, Family::V6, &foreign6, Reason::ForeignSource),
        (&client, Way::UdpLite, Family::V4, &[], Reason::Protocol),
        (&client, Way::UdpLite, Family::V6, &[], Reason::Protocol),
        (&client, Way::RawUdpLite, Family::V4, &[], Reason::Protocol),
        (&client, Way::RawUdpLite, Family::V6, &[], Reason::Protocol),
        (&client, Way::RawSctp, Family::V4, &[], Reason::Protocol),
        (&client, Way::RawSctp, Family::V6, &[], Reason::Protocol),
        (&client, Way::Sctp, Family::V4, &[], Reason::Protocol),
        (&client, Way::IpInIp, Family::V4, &[], Reason::Protocol),
    ];
    for (nth, (place, way, family, more, reason)) in rows.into_iter().enumerate() {
        let (what, marker) = (format!("{way:?} {family:?}"), format!("escape-marker-{nth}-"));
        let before = counted(&sandbox, Answer::Refuse, reason)?;
        let got = attack(&sandbox, place, way, legacy.at(family, HTTP), &marker, more)?;
        println!("{what}: {got:?}");
        ensure!(got.outcome != "answered", "{what}: {got:?}");
        if way == Way::Sctp && got.error.as_ref().is_some_and(|error| error.contains("not supported")) {
            eprintln!(
                "NOT PLAYED: this kernel has no SCTP, so there are no sockets of it; the raw one's row stands for it"
            );
            continue;
        }
        command::wait_for(&format!("{what} is counted as {}", reason.as_str()), SOON * patience(), || {
            Ok((counted(&sandbox, Answer::Refuse, reason)? > before).then_some(()))
        })?;
        ensure!(!link.contains(marker.as_bytes())?, "{what}: readable on the link");
    }
    // A frame of a protocol of its own; nothing of it could cross a router.
    let before = counted(&sandbox, Answer::Refuse, Reason::Protocol)?;
    attack(&sandbox, &client, Way::OtherFrame, legacy.at(Family::V4, HTTP), "frame", &[])?;
    command::wait_for("a foreign frame is counted", SOON * patience(), || {
        Ok((counted(&sandbox, Answer::Refuse, Reason::Protocol)? > before).then_some(()))
    })?;
    Ok(())
}

/// What a program prints that asks node a's agent, and whether it was content.
fn culvert(sandbox: &Sandbox, arguments: &[&str]) -> Result<(bool, String)> {
    let output = sandbox.node_place(Node::A).command(built("culvert")?)?.args(arguments).output()?;
    let text = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
    Ok((output.status.success(), text))
}

/// The gauge of connections that the mesh has nothing to do with, of node a's agent.
fn strays(sandbox: &Sandbox) -> Result<String> {
    let text = sandbox.metrics(Node::A)?;
    let line = text.lines().find_map(|line| line.strip_prefix("culvert_unaccounted_connections "));
    Ok(line.with_context(|| format!("the gauge in {text}"))?.trim().to_owned())
}

/// That gauge shows this, at the latest when the agent has looked by itself.
fn gauged(sandbox: &Sandbox, wanted: &str) -> Result<()> {
    command::wait_for(
        &format!("{wanted} connections are unaccounted for"),
        Duration::from_secs(60) * patience(),
        || Ok((strays(sandbox)? == wanted).then_some(())),
    )
}

/// A socket that got past everything is found with its pod, process and peer, by whoever asks and on the agent's own schedule, and
/// by the next agent too; whatever the mesh carries, and what is older than the mesh, is accounted for.
#[test]
fn a_connection_that_the_mesh_has_not_made_is_found() -> Result<()> {
    let arguments = ["--veth-filter", "off"];
    let mut sandbox = mesh("escape-proof", &arguments)?;
    let (client, far) = (sandbox.pod("test/client")?.clone(), sandbox.pod("test/far")?.clone());
    let held = |port| ["hold".to_owned(), format!("--to={}", far.at(Family::V4, port))];
    // Captured, and held open.
    sandbox.start_in_pod("captured", "test/client", &held(EXCHANGE).each_ref().map(String::as_str))?;
    let prove = |sandbox: &Sandbox| culvert(sandbox, &["capture", "proof"]);
    command::wait_for("the captured connection is accounted for", SOON * patience(), || {
        let (content, text) = prove(&sandbox)?;
        ensure!(content, "{text}");
        Ok(text.contains("captured").then_some(()))
    })?;
    // Older than the mesh: the pod comes in while its connection is open.
    let to = sandbox.pod("test/legacy")?.at(Family::V4, EXCHANGE).to_string();
    sandbox.start_in_pod("older", "test/late", &["hold", "--to", &to])?;
    command::wait_for("the connection is established", SOON * patience(), || {
        let rows = fs::read_to_string(sandbox.log_path("older")).unwrap_or_default();
        let lines =
            command::run("ss", &["-N", &sandbox.pod("test/late")?.place.netns, "-tnH", "state", "established"])?;
        Ok((lines.contains(&to) || rows.contains("rounds")).then_some(()))
    })?;
    let file = "pod-test-late.yaml";
    let manifest = fs::read_to_string(sandbox.manifests().path().join(file))?;
    let inside: String =
        manifest.lines().filter(|line| !line.contains("dataplane-mode")).map(|line| format!("{line}\n")).collect();
    ensure!(inside != manifest, "{manifest}");
    sandbox.manifests().apply(file, &inside)?;
    command::wait_for("the older connection is accounted for", SOON * patience(), || {
        let (content, text) = prove(&sandbox)?;
        Ok((content && text.contains("pre-enrolment")).then_some(()))
    })?;
    // Past the mesh: from a cgroup that no program sees, without the filter.
    let elsewhere = elsewhere(&sandbox, &client.place)?;
    let legacy = sandbox.pod("test/legacy")?.at(Family::V4, EXCHANGE);
    let mut stray = elsewhere.command(built("culvert-pod")?)?;
    stray.args(["hold", "--to", &legacy.to_string()]);
    sandbox.start("stray", stray)?;
    // Nobody asks for a proof; the agent makes one every half a minute.
    gauged(&sandbox, "1")?;
    let pid = sandbox.pid("stray")?.to_string();
    let found = |sandbox: &Sandbox| -> Result<()> {
        let text = command::wait_for("the stray is found", SOON * patience(), || {
            let (content, text) = prove(sandbox)?;
            Ok((!content).then_some(text))
        })?;
        for part in ["client", &legacy.to_string(), &pid, "culvert-pod", "pre-enrolment"] {
            ensure!(text.contains(part), "{part:?} is not in:\n{text}");
        }
        gauged(sandbox, "1")
    };
    found(&sandbox)?;
    let (lines, _) = sandbox.agent_log(Node::A, 0)?;
    let told = lines.iter().filter(|line| line.field("remote").as_deref() == Some(&*legacy.to_string()));
    ensure!(told.count() == 1, "told once");
    // Another agent finds it just so, and what is older than the mesh is that still.
    sandbox.signal_agent(Node::A, Signal::SIGKILL)?;
    sandbox.start_agent(&mesh_plan(&arguments)?, Node::A)?;
    sandbox.wait_ready(Node::A)?;
    found(&sandbox)?;
    sandbox.stop("stray")?;
    command::wait_for("it is forgotten", SOON * patience(), || Ok(prove(&sandbox)?.0.then_some(())))?;
    gauged(&sandbox, "0")?;
    let (_, text) = prove(&sandbox)?;
    ensure!(text.contains("pre-enrolment"), "{text}");
    Ok(())
}

/// The same without the filter at the veth: so the rows above are stopped by it, and this is what switching it off costs.
#[test]
fn without_the_filter_packet_sockets_get_out() -> Result<()> {
    let sandbox = mesh("escape-off", &["--veth-filter", "off"])?;
    let link = sandbox.capture()?;
    let (client, legacy) = (sandbox.pod("test/client")?.place.clone(), sandbox.pod("test/legacy")?.clone());
    for (way, family) in [(Way::BypassSyn, Family::V6), (Way::RawSctp, Family::V4), (Way::ForeignUdp, Family::V4)] {
        let marker = format!("open-marker-{way:?}-");
        let to = legacy.at(family, HTTP);
        attack(&sandbox, &client, way, to, &marker, &["--from=10.244.1.77"])?;
        command::wait_for(&format!("{way:?} is readable on the link"), SOON * patience(), || {
            Ok(link.contains(marker.as_bytes())?.then_some(()))
        })?;
    }
    Ok(())
}

/// An address that is somebody else's does not make a connection.
#[test]
fn a_borrowed_address_connects_nowhere() -> Result<()> {
    let sandbox = mesh("escape-borrowed", &[])?;
    let link = sandbox.capture()?;
    let (client, legacy) = (sandbox.pod("test/client")?.place.clone(), sandbox.pod("test/legacy")?.clone());
    for family in [Family::V4, Family::V6] {
        let before = counted(&sandbox, Answer::Refuse, Reason::ForeignSource)?;
        let to = legacy.at(family, HTTP);
        let got = attack(&sandbox, &client, Way::Transparent, to, "borrowed-marker", &[foreign(family)])?;
        ensure!(got.failure == Some(Failure::Refused), "{family:?}: {got:?}");
        ensure!(counted(&sandbox, Answer::Refuse, Reason::ForeignSource)? > before, "{family:?}: not counted");
    }
    ensure!(!link.contains(b"borrowed-marker")?, "readable on the link");
    ensure!(link.frames_with_port(HTTP)? == 0, "something reached the server's port");
    Ok(())
}

/// Specification §3: UDP passes unless the mesh or the pod says otherwise; then the application gets an errno, it is counted
/// once, by destination, and only DNS is left. What was connected before is stopped where it comes into the node.
#[test]
fn udp_is_refused_where_the_mesh_or_the_pod_says_so() -> Result<()> {
    let sandbox = mesh("escape-udp", &["--udp", "refuse"])?;
    let link = sandbox.capture()?;
    let legacy = sandbox.pod("test/legacy")?.clone();
    let send = |pod: &str, way: Way, port: u16, marker: &str, family| {
        attack(&sandbox, &sandbox.pod(pod)?.place, way, legacy.at(family, port), marker, &[])
    };
    let sent = |pod: &str, port: u16, marker: &str, family| -> Result<()> {
        let got = send(pod, Way::Udp, port, marker, family)?;
        ensure!(got.outcome == "sent", "{got:?}");
        Ok(())
    };
    let arrives = |marker: &str| {
        command::wait_for(&format!("{marker} crosses the link"), SOON * patience(), || {
            Ok(link.contains(marker.as_bytes())?.then_some(()))
        })
    };
    let packets = |family| -> Result<u64> {
        let maps = inspect::read(&sandbox.pin_dir(Node::A).join(format!("v{LAYOUT_VERSION}")))?;
        let to = legacy.at(family, 8125);
        let counted = maps.udp_refusals.iter().find(|(key, _)| (key.addr.ip(), key.port) == (to.ip(), to.port()));
        Ok(counted.map_or(0, |(_, packets)| *packets))
    };
    for family in [Family::V4, Family::V6] {
        for way in [Way::Udp, Way::UdpConnected] {
            let got = send("test/client", way, 8125, "refused-datagram", family)?;
            ensure!(got.failure == Some(Failure::NotPermitted), "{way:?} {family:?}: {got:?}");
        }
        sent("test/client", 53, &format!("a-name-please-{family:?}"), family)?;
        sent("test/free", 8125, &format!("allowed-datagram-{family:?}"), family)?;
        // By the order on one device: what was sent before has been judged.
        arrives(&format!("a-name-please-{family:?}"))?;
        arrives(&format!("allowed-datagram-{family:?}"))?;
    }
    ensure!(!link.contains(b"refused-datagram")?, "readable on the link");
    ensure!(counted(&sandbox, Answer::Refuse, Reason::UdpRefused)? == 4, "each is counted once");
    ensure!((packets(Family::V4)?, packets(Family::V6)?) == (2, 2), "each is counted once by its destination");

    // The pod's label counts while it runs; a socket that was connected before is no exception.
    let free = sandbox.pod("test/free")?.clone();
    let connected = free.place.inside(|| {
        let socket = std::net::UdpSocket::bind("0.0.0.0:0")?;
        socket.connect(legacy.at(Family::V4, 8125))?;
        Ok(socket)
    })?;
    connected.send(b"an-early-datagram")?;
    arrives("an-early-datagram")?;
    let file = "pod-test-free.yaml";
    let text = fs::read_to_string(sandbox.manifests().path().join(file))?;
    ensure!(text.contains("culvert.io/udp: \"allow\""), "{text}");
    sandbox.manifests().apply(file, &text.replace("culvert.io/udp: \"allow\"", "culvert.io/udp: \"refuse\""))?;
    command::wait_for("the pod's UDP is refused", SOON * patience(), || {
        let got = send("test/free", Way::Udp, 8125, "a-late-datagram", Family::V4)?;
        Ok((got.failure == Some(Failure::NotPermitted)).then_some(()))
    })?;
    let before = counted(&sandbox, Answer::Refuse, Reason::UdpRefused)?;
    // What nobody listened for has come back as an error, which the next call gets.
    command::wait_for("it is sent", SOON * patience(), || {
        Ok(connected.send(b"a-connected-datagram").is_ok().then_some(()))
    })?;
    command::wait_for("it is stopped and counted", SOON * patience(), || {
        Ok((counted(&sandbox, Answer::Refuse, Reason::UdpRefused)? == before + 1).then_some(()))
    })?;
    ensure!(!link.contains(b"a-connected-datagram")?, "readable on the link");
    Ok(())
}

/// [K.2]: ports of the mesh itself lead nowhere, whoever asks, by plaintext and through the tunnel; also where an application
/// listens on them, which only its own pod reaches. What is refused for it is counted and told.
#[test]
fn ports_of_the_mesh_lead_nowhere() -> Result<()> {
    const LISTENED: [u16; 3] = [15001, 15006, 15008];
    let sandbox = mesh_with("escape-ports", &[], &LISTENED)?;
    let (client, far) = (sandbox.pod("test/client")?.place.clone(), sandbox.pod("test/far")?.clone());
    let legacy = sandbox.pod("test/legacy")?.place.clone();
    let loops = || verdicts(&sandbox, Node::B, Direction::Inbound, Answer::Refuse, Reason::Loop);
    for family in [Family::V4, Family::V6] {
        // 65000 and the next are where the agent's listeners stand.
        for port in [15001, 15006, 15008, 65000, 65001, 65002, 700] {
            let to = far.at(family, port);
            let try_from = |place: &Place| attack(&sandbox, place, Way::Plain, to, "to-a-port", &[]);
            let before = loops()?;
            for (who, place) in [("the mesh", &client), ("outside", &legacy)] {
                let got = try_from(place)?;
                ensure!(got.outcome == "failed", "{who} to {to}: {got:?}");
                // A listener for tunnels waits for a handshake as long as anybody's.
                let waits = port == 15008 || port > 65000;
                ensure!(waits || got.failure != Some(Failure::TimedOut), "{who} to {to}: {got:?}");
            }
            let expected = if LISTENED.contains(&port) { "answered" } else { "failed" };
            let got = try_from(&far.place)?;
            ensure!(got.outcome == expected, "the pod itself to {to}: {got:?}");
            if LISTENED.contains(&port) {
                command::wait_for(&format!("the client's agent tells of {to}"), SOON * patience(), || {
                    let (lines, _) = sandbox.agent_log(Node::A, 0)?;
                    let told = lines.iter().any(|line| {
                        line.field("reason").as_deref() == Some("loop")
                            && line.field("dst.addr") == Some(to.to_string())
                    });
                    Ok(told.then_some(()))
                })?;
            }
            // In plaintext, 15008 is a tunnel that does not come about.
            if port == 15001 || port == 15006 {
                ensure!(loops()? > before, "{to}: the refusal was not counted");
            }
        }
    }
    // Nobody is the worse for it.
    let got = sandbox.http("test/client", far.at(Family::V4, HTTP), "after")?;
    ensure!(got.status == Some(200), "{got:?}");
    Ok(())
}
