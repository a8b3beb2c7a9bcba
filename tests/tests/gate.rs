//! Pods that no agent knows yet, because none was there when they came: held at the gate in both directions, while the node
//! itself and the pods that were known go on ([K.4]; specification §2, §3).

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use culvert::datapath::inspect;
use culvert_common::{Answer, Direction, LAYOUT_VERSION, Reason};
use culvert_tests::programs::{Failure, HttpResult};
use culvert_tests::sandbox::{Family, MeshPlan, Node, Place, Plan, PodPlan, Sandbox, agent_process, built, own_name};
use culvert_tests::{command, patience};
use nix::sys::signal::Signal;
use serde_json::Value;

/// In every payload of pods that are held: what must not be seen on the link.
const MARKER: &str = "readable-if-it-leaks";
const HTTP: u16 = 9080;
/// A port of known servers that only pods which are held call.
const HELD: u16 = 9191;
/// A port that a process of the node itself serves.
const OF_NODE: u16 = 9292;
const FAMILIES: [Family; 2] = [Family::V4, Family::V6];
const SOON: Duration = Duration::from_secs(10);

/// `known-…` are outside the mesh, `client` is in it.
fn plan(name: &str) -> Plan {
    let outside = |node, name: &str| {
        PodPlan::new(node, "test", name).label("istio.io/dataplane-mode", "none").http(&[HTTP, HELD])
    };
    Plan::empty(&own_name(name))
        .pod(PodPlan::new(Node::A, "test", "client"))
        .pod(outside(Node::A, "known-a"))
        .pod(outside(Node::B, "known-b"))
}

/// Both agents are killed, and then pods come: one that is to be in the mesh, and one that is not.
fn without_agents(sandbox: &mut Sandbox) -> Result<()> {
    for node in Node::ALL {
        sandbox.signal_agent(node, Signal::SIGKILL)?;
    }
    sandbox.add_pod(PodPlan::new(Node::A, "test", "late-a").http(&[HTTP]))?;
    sandbox.add_pod(PodPlan::new(Node::B, "test", "late-b").label("istio.io/dataplane-mode", "none").http(&[HTTP]))
}

fn get(sandbox: &Sandbox, from: &Place, to: SocketAddr, limit: Duration) -> Result<HttpResult> {
    let (to, limit) = (to.to_string(), limit.as_millis().to_string());
    sandbox.call_at(from, &["http-get", "--to", &to, "--marker", MARKER, "--timeout-ms", &limit])
}

/// Answered within some seconds: neighbours of a fresh link may not be known yet.
fn answers(sandbox: &Sandbox, from: &Place, to: SocketAddr) -> Result<()> {
    let mut last = None;
    command::wait_for(&format!("{to} answers {}", from.netns), SOON * patience(), || {
        let got = get(sandbox, from, to, SOON)?;
        let good = got.status == Some(200);
        last = Some(got);
        Ok(good.then_some(()))
    })
    .with_context(|| {
        let held = Node::ALL.map(|node| [Direction::Outbound, Direction::Inbound].map(|way| held(sandbox, node, way)));
        format!("the last answer: {last:?}; held so far: {held:?}")
    })
}

/// How often a node's kernel programs have refused a pod that they do not know.
fn held(sandbox: &Sandbox, node: Node, direction: Direction) -> Result<u64> {
    let maps = inspect::read(&sandbox.pin_dir(node).join(format!("v{LAYOUT_VERSION}")))?;
    let counters = maps.verdicts.iter().filter(|(key, _)| {
        (key.direction, key.answer, key.reason) == (direction as u8, Answer::Refuse as u8, Reason::PodUnknown as u8)
    });
    Ok(counters.map(|(_, times)| times).sum())
}

/// A gauge of a node's agent.
fn gauge(sandbox: &Sandbox, node: Node, name: &str) -> Result<f64> {
    let text = sandbox.metrics(node)?;
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    Ok(line.with_context(|| format!("{name} in {text}"))?.trim().parse()?)
}

/// A process in the cgroup of a pod that nobody knows and in the node's network, as a static pod's that is hostNetwork.
fn static_pod(sandbox: &mut Sandbox, node: Node) -> Result<Place> {
    let late = sandbox.pod(match node {
        Node::A => "test/late-a",
        Node::B => "test/late-b",
    })?;
    let class = late.place.cgroup.parent().and_then(|pod| pod.parent()).context("the class of the pod")?;
    let cgroup = class.join("pod9f86d081884c7d659a2feaa0c55ad015").join("container");
    fs::create_dir_all(&cgroup)?;
    let place = Place { cgroup, netns: sandbox.node_place(node).netns.clone() };
    let mut serve = place.command(built("culvert-pod")?)?;
    serve.args(["http-serve", "--name", "static", &format!("--port={OF_NODE}")]);
    sandbox.start(&format!("static-{node}"), serve)?;
    Ok(place)
}

#[test]
fn a_pod_that_came_without_an_agent_is_held_until_one_is_back() -> Result<()> {
    let mut sandbox = Sandbox::build(plan("gate-held"))?;
    let mesh = MeshPlan::new(built("culvert")?);
    sandbox.start_mesh(&mesh)?;
    let link = sandbox.capture()?;
    let place = |sandbox: &Sandbox, pod: &str| Ok::<_, anyhow::Error>(sandbox.pod(pod)?.place.clone());
    for family in FAMILIES {
        answers(&sandbox, &place(&sandbox, "test/known-a")?, sandbox.pod("test/known-b")?.at(family, HTTP))?;
    }
    without_agents(&mut sandbox)?;
    // One more, which no manifest describes.
    sandbox.add_pod(PodPlan::new(Node::A, "test", "late-c").http(&[HTTP]))?;
    let file = "pod-test-late-c.yaml";
    let manifest = fs::read_to_string(sandbox.manifests().path().join(file))?;
    sandbox.manifests().delete(file)?;
    // And a pod that was known, which the next agent finds no manifest of: it stays what it was.
    sandbox.manifests().delete("pod-test-known-b.yaml")?;
    link.clear()?;

    // Held: out at once and with an errno of its own, in without an answer; whoever asks.
    let short = Duration::from_millis(500) * patience();
    for (late, node, other) in [("test/late-a", Node::A, "test/known-b"), ("test/late-b", Node::B, "test/known-a")] {
        let (late, known) = (sandbox.pod(late)?.clone(), sandbox.pod(other)?.clone());
        for family in FAMILIES {
            let what = format!("{} by {family:?}", late.plan.key());
            let counted = [Direction::Outbound, Direction::Inbound];
            let before = counted.map(|direction| held(&sandbox, node, direction));
            let got = get(&sandbox, &late.place, known.at(family, HELD), SOON)?;
            ensure!(got.failure == Some(Failure::NotPermitted), "from {what}: {got:?}");
            for from in [&known.place, sandbox.node_place(node)] {
                let got = get(&sandbox, from, late.at(family, HTTP), short)?;
                ensure!(got.failure == Some(Failure::TimedOut), "to {what} from {}: {got:?}", from.netns);
            }
            let loopback = match family {
                Family::V4 => SocketAddr::from(([127, 0, 0, 1], HTTP)),
                Family::V6 => "[::1]:9080".parse()?,
            };
            let got = get(&sandbox, &late.place, loopback, SOON)?;
            ensure!(got.status == Some(200), "inside {what}: {got:?}");
            for (direction, before) in counted.into_iter().zip(before) {
                let (before, now) = (before?, held(&sandbox, node, direction)?);
                ensure!(now > before, "{what}, {direction:?}: {before}, then {now}");
            }
        }
    }
    ensure!(link.frames_with_port(HELD)? == 0, "a frame of a held pod crossed the link");

    // Whoever was known outside the mesh, and what is the node's own, is not disturbed; the mesh's own are refused as ever.
    let static_pod = static_pod(&mut sandbox, Node::A)?;
    for family in FAMILIES {
        let known = sandbox.pod("test/known-b")?.at(family, HTTP);
        answers(&sandbox, &place(&sandbox, "test/known-a")?, known)?;
        answers(&sandbox, sandbox.node_place(Node::A), known)?;
        answers(&sandbox, &static_pod, known)?;
        let of_node = match family {
            Family::V4 => SocketAddr::from((Node::A.v4(), OF_NODE)),
            Family::V6 => SocketAddr::from((Node::A.v6(), OF_NODE)),
        };
        answers(&sandbox, &place(&sandbox, "test/known-b")?, of_node)?;
        answers(&sandbox, sandbox.node_place(Node::B), of_node)?;
        let got = get(&sandbox, &place(&sandbox, "test/client")?, known, SOON)?;
        ensure!(got.failure == Some(Failure::Refused), "the mesh's own: {got:?}");
    }

    // The agents are back: what they can place is served, what nobody describes is held, and it is said which and why.
    for node in Node::ALL {
        sandbox.start_agent(&mesh, node)?;
    }
    for node in Node::ALL {
        sandbox.wait_ready(node)?;
    }
    for family in FAMILIES {
        let (late_a, late_b) = (sandbox.pod("test/late-a")?.clone(), sandbox.pod("test/late-b")?.clone());
        answers(&sandbox, &late_a.place, sandbox.pod("test/known-b")?.at(family, HTTP))?;
        answers(&sandbox, &late_b.place, sandbox.pod("test/known-a")?.at(family, HTTP))?;
        answers(&sandbox, &place(&sandbox, "test/client")?, late_a.at(family, HTTP))?;
        answers(&sandbox, &place(&sandbox, "test/known-a")?, late_b.at(family, HTTP))?;
        answers(&sandbox, &place(&sandbox, "test/known-b")?, late_b.at(family, HTTP))?;
    }
    let late_c = sandbox.pod("test/late-c")?.clone();
    let got = get(&sandbox, &late_c.place, sandbox.pod("test/known-b")?.at(Family::V4, HELD), SOON)?;
    ensure!(got.failure == Some(Failure::NotPermitted), "{got:?}");
    // Who was held is told: of a pod that the agent came to know, and of one that it does not.
    let told = |from: &str, ip: IpAddr| {
        command::wait_for(&format!("culvert why tells of {from}"), SOON * patience(), || {
            let mut why = sandbox.node_place(Node::A).command(built("culvert")?)?;
            let all: Value = serde_json::from_str(&command::finish(why.args(["why", "-o", "json"]), None)?)?;
            let known_b = sandbox.pod("test/known-b")?.at(Family::V4, HELD).ip().to_string();
            let is = |of: &&Value| {
                of["reason"] == "pod-unknown"
                    && of["direction"] == "outbound"
                    && of["source"]["addr"] == ip.to_string()
                    && of["destination"]["addr"] == known_b
                    && of["port"] == HELD
            };
            Ok(all.as_array().and_then(|all| all.iter().find(is).cloned()))
        })
    };
    let of_late_a = told("test/late-a", sandbox.pod("test/late-a")?.at(Family::V4, HTTP).ip())?;
    ensure!(of_late_a["source"]["pod"] == "late-a" && of_late_a["source"]["namespace"] == "test", "{of_late_a}");
    let of_late_c = told("a pod that nobody describes", late_c.at(Family::V4, HTTP).ip())?;
    ensure!(of_late_c["source"]["pod"].is_null(), "{of_late_c}");
    // What the static pod is shows only after a moment.
    let gauges = |sandbox: &Sandbox, wanted: [f64; 2]| {
        command::wait_for(&format!("the gauges are {wanted:?}"), SOON * patience(), || {
            let [a, b] = Node::ALL.map(|node| gauge(sandbox, node, "culvert_gated_pods"));
            Ok(([a?, b?] == wanted).then_some(()))
        })
    };
    gauges(&sandbox, [1.0, 0.0])?;
    let told = |message: &str| {
        command::wait_for(message, SOON * patience(), || {
            let (lines, _) = sandbox.agent_log(Node::A, 0)?;
            Ok(lines.into_iter().find(|line| line.message().starts_with(message)))
        })
    };
    let pods = told("pods are held at the gate")?.field("pods").unwrap_or_default();
    ensure!(pods == format!("{}: no manifest describes it", late_c.uid), "{pods}");
    sandbox.manifests().apply(file, &manifest)?;
    answers(&sandbox, &late_c.place, sandbox.pod("test/known-b")?.at(Family::V4, HTTP))?;
    told("no pod is held at the gate any more")?;
    gauges(&sandbox, [0.0, 0.0])?;
    sandbox.expect_running(&agent_process(Node::A))
}

/// The same with the switch that prefers availability: what is not known passes by the mesh. So it is the gate that held it
/// above.
#[test]
fn an_open_gate_lets_pods_pass_by_the_mesh() -> Result<()> {
    let mut sandbox = Sandbox::build(plan("gate-open"))?;
    let mut mesh = MeshPlan::new(built("culvert")?);
    // An agent that is closed first: the next one opens what it has closed.
    sandbox.start_mesh(&mesh)?;
    for node in Node::ALL {
        sandbox.signal_agent(node, Signal::SIGKILL)?;
    }
    mesh.agent_arguments = vec!["--gate".to_owned(), "open".to_owned()];
    for node in Node::ALL {
        sandbox.start_agent(&mesh, node)?;
    }
    for node in Node::ALL {
        sandbox.wait_ready(node)?;
    }
    let link = sandbox.capture()?;
    without_agents(&mut sandbox)?;
    for family in FAMILIES {
        let (late_a, late_b) = (sandbox.pod("test/late-a")?.clone(), sandbox.pod("test/late-b")?.clone());
        answers(&sandbox, &late_a.place, sandbox.pod("test/known-b")?.at(family, HELD))?;
        answers(&sandbox, &late_b.place, sandbox.pod("test/known-a")?.at(family, HELD))?;
        answers(&sandbox, &sandbox.pod("test/known-a")?.place, late_b.at(family, HTTP))?;
        answers(&sandbox, sandbox.node_place(Node::B), late_a.at(family, HTTP))?;
    }
    ensure!(link.contains(MARKER.as_bytes())?, "this is what it costs");
    Ok(())
}
