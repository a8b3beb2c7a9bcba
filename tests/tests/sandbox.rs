//! The sandbox itself, without a mesh: what a later scenario shows is worth only as much as this ground.

use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use culvert_tests::command;
use culvert_tests::programs::{ExchangeResult, Failure, HttpResult, ShortResult};
use culvert_tests::sandbox::{
    Family, LinkPlan, MeshPlan, Node, Plan, PodPlan, Sandbox, ServicePlan, built, expect_no_traces, own_name, sweep,
    traces,
};

/// Tells the process that is to be killed which sandbox to build.
const CRASH_INSTANCE: &str = "CULVERT_CRASH_TEST_INSTANCE";
/// Tells it to start the mesh too.
const CRASH_MESH: &str = "CULVERT_CRASH_TEST_MESH";

fn family_name(family: Family) -> &'static str {
    match family {
        Family::V4 => "v4",
        Family::V6 => "v6",
    }
}

#[test]
fn without_a_mesh_every_path_is_plain_and_the_search_finds_it() -> Result<()> {
    let sandbox = Sandbox::build(Plan::bookinfo(&own_name("plain")))?;
    let capture = sandbox.capture()?;
    for family in [Family::V4, Family::V6] {
        let server = sandbox.pod("default/productpage")?.at(family, 9080);
        let cluster = SocketAddr::new(sandbox.cluster_ip("default/productpage", family)?, 9080);
        for client in ["test/nginx", "test/legacy-app"] {
            for (way, to) in [("cluster", cluster), ("pod", server)] {
                let marker = format!("plain-{}-{way}-{}", client.replace('/', "-"), family_name(family));
                let got = sandbox.http(client, to, &marker)?;
                let seen = got.seen.with_context(|| format!("{client} to {to}: {:?} {:?}", got.failure, got.error))?;
                // [K.3] is about the mesh; that it holds without one shows that the ground masquerades nothing.
                let source = sandbox.pod(client)?.at(family, seen.peer.port());
                ensure!(seen.peer == source, "{client} to {to}: the server saw {}", seen.peer);
                ensure!(seen.local == server, "{client} to {to}: arrived at {}", seen.local);
                ensure!(got.peer == Some(to), "{client} to {to}: the client sees {:?}", got.peer);
                ensure!(capture.contains(marker.as_bytes())?, "{client} to {to}: not found on the link");
            }
        }
    }
    ensure!(!capture.contains(b"a payload that nobody sent")?, "the search finds what is not there");
    ensure!(capture.frames_with_port(9080)? > 0, "no frame of the server's port");
    capture.clear()?;
    ensure!(!capture.contains(b"plain-test-nginx")?, "a cleared recording still has its frames");

    // Beside each other on one node: by cluster IP the answer must come back through the node that translated it.
    for family in [Family::V4, Family::V6] {
        let cluster = SocketAddr::new(sandbox.cluster_ip("default/ratings", family)?, 9080);
        for _ in 0..20 {
            let got = sandbox.http("test/nginx", cluster, "same-node")?;
            ensure!(got.status == Some(200), "same node by {cluster}: {} {:?}", got.brief(), got.error);
        }
        // A pod that calls itself by its own Service.
        let got = sandbox.http("default/ratings", cluster, "hairpin")?;
        ensure!(got.status == Some(200), "hairpin by {cluster}: {} {:?}", got.brief(), got.error);
    }
    ensure!(!capture.contains(b"same-node")?, "traffic of one node crossed the link");

    // A host process reaches pods and Services as well.
    let cluster = SocketAddr::new(sandbox.cluster_ip("default/productpage", Family::V4)?, 9080);
    let got: HttpResult = sandbox.call_on_node(Node::A, &["http-get", "--to", &cluster.to_string()])?;
    ensure!(got.status == Some(200), "from the node: {} {:?}", got.brief(), got.error);
    sandbox.take_down()?;
    expect_no_traces(&own_name("plain"))?;
    Ok(())
}

#[test]
fn kubelets_probe_from_their_own_cgroup_and_the_pod_sees_the_node() -> Result<()> {
    let sandbox = Sandbox::build(Plan::bookinfo(&own_name("probe")))?;
    for node in Node::ALL {
        let pods: Vec<_> = sandbox.pods().filter(|p| p.plan.node == node).collect();
        let results = command::wait_for("every pod was probed", Duration::from_secs(5), || {
            let results = sandbox.probes(node)?;
            Ok(pods.iter().all(|p| results.iter().any(|r| r.pod == p.plan.key())).then_some(results))
        })?;
        for result in results {
            ensure!(result.ok, "{}: {}", result.pod, result.said);
            let source = result.source_seen.context("the pod did not say whom it saw")?.ip();
            ensure!(source == node.pod_v4(1), "{}: probed from {source}", result.pod);
        }
        let members = fs::read_to_string(sandbox.kubelet_place(node)?.cgroup.join("cgroup.procs"))?;
        ensure!(members.lines().count() == 1, "processes of the kubelet's cgroup: {members:?}");
    }
    Ok(())
}

#[test]
fn programs_run_in_the_cgroup_of_their_container() -> Result<()> {
    let sandbox = Sandbox::build(Plan::bookinfo(&own_name("cgroup")))?;
    for (pod, layout) in [("test/nginx", "/kubepods.slice/"), ("default/productpage", "/kubepods/besteffort/pod")] {
        let place = &sandbox.pod(pod)?.place;
        ensure!(place.cgroup.to_string_lossy().contains(layout), "{}", place.cgroup.display());
        let out = command::finish(place.command("cat")?.arg("/proc/self/cgroup"), None)?;
        let own = out.lines().find_map(|l| l.strip_prefix("0::")).context("no cgroup2 line")?;
        ensure!(place.cgroup.ends_with(own.trim_start_matches('/')), "{pod}: a program ran in {own}");
        // The pause container beside it holds the sandbox's cgroup.
        let siblings = fs::read_dir(place.cgroup.parent().context("a pod")?)?
            .filter(|e| e.as_ref().is_ok_and(|e| e.path().is_dir() && !place.cgroup.ends_with(e.file_name())));
        ensure!(siblings.count() == 1, "{pod}: one pause container");
    }
    // A shell by name, as the user is told.
    let out = command::run(
        "ip",
        &["netns", "exec", &format!("culvert-{}-nginx", own_name("cgroup")), "ip", "-o", "address", "show", "eth0"],
    )?;
    ensure!(out.contains(&sandbox.pod("test/nginx")?.v4.to_string()), "ip netns exec shows {out}");
    Ok(())
}

#[test]
fn a_dead_owner_leaves_nothing_to_the_next_start() -> Result<()> {
    let instance = &own_name("crash");
    let spawn = || owner(instance, false);
    // Half-way: at several moments of building, and once when it is up.
    for millis in [60, 250, 600, 5000] {
        let mut child = spawn()?;
        let up = Path::new("/run").join(format!("culvert-{instance}/up"));
        let begun = std::time::Instant::now();
        while begun.elapsed() < Duration::from_millis(millis) && !up.exists() {
            std::thread::sleep(Duration::from_millis(5));
        }
        if millis == 5000 {
            ensure!(up.exists(), "the owner did not come up within 5 s");
            let refused = format!("{:#}", Sandbox::build(Plan::bookinfo(instance)).err().context("a second owner")?);
            ensure!(refused.contains(&format!("owned by process {}", child.id())), "{refused}");
        }
        child.kill()?;
        child.wait()?;
        Sandbox::build(Plan::bookinfo(instance))
            .with_context(|| format!("start after a crash at {millis} ms"))?
            .take_down()?;
        expect_no_traces(instance).with_context(|| format!("crash at {millis} ms"))?;
    }
    // `xtask down`: removal without a new start.
    let mut child = spawn()?;
    let begun = std::time::Instant::now();
    while traces(instance)?.len() < 20 && begun.elapsed() < Duration::from_secs(10) {
        std::thread::sleep(Duration::from_millis(5));
    }
    let up = sweep()?.up;
    ensure!(up.contains(&(instance.to_owned(), child.id())), "one that is up is left alone: {up:?}");
    child.kill()?;
    child.wait()?;
    // Another test's start may have removed it already.
    sweep()?;
    expect_no_traces(instance)?;
    Ok(())
}

/// Agents end neither with their owner nor by themselves, so they are what the next start has most to do with.
#[test]
fn a_dead_owner_of_a_mesh_leaves_nothing_to_the_next_start() -> Result<()> {
    let instance = &own_name("crash-mesh");
    let is_agent = |trace: &String| trace.contains("culvert agent") && trace.contains("--pin-dir /sys/fs/bpf/culvert-");
    for moment in ["starting", "ready"] {
        let mut child = owner(instance, true)?;
        let reached = Path::new("/run").join(format!("culvert-{instance}/{moment}"));
        let waited = command::wait_for(&format!("the owner's mesh is {moment}"), Duration::from_secs(60), || {
            ensure!(child.try_wait()?.is_none(), "the owner ended");
            Ok(reached.exists().then_some(()))
        });
        child.kill()?;
        child.wait()?;
        waited?;
        let left = traces(instance)?;
        ensure!(left.iter().filter(|trace| is_agent(trace)).count() == 2, "{moment}: both agents outlive it: {left:?}");
        ensure!(left.iter().any(|trace| trace.starts_with("/sys/fs/bpf/")) || moment == "starting", "{left:?}");
        Sandbox::build(Plan::bookinfo(instance))
            .with_context(|| format!("start after a crash while the mesh was {moment}"))?
            .take_down()?;
        expect_no_traces(instance).with_context(|| format!("crash while the mesh was {moment}"))?;
    }
    Ok(())
}

/// Starts a process that builds a sandbox, and the mesh on it if that is wanted, and waits to be killed.
fn owner(instance: &str, mesh: bool) -> Result<Child> {
    let mut owner = Command::new(std::env::current_exe()?);
    owner.env(CRASH_INSTANCE, instance).envs(mesh.then_some((CRASH_MESH, "1")));
    owner.args(["--exact", "owner_of_the_crash_test", "--ignored", "--nocapture"]);
    owner.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null());
    owner.spawn().context("start the owner")
}

#[test]
#[ignore = "not a test: the process that the tests of a dead owner kill"]
fn owner_of_the_crash_test() -> Result<()> {
    let mut sandbox = Sandbox::build(Plan::bookinfo(&std::env::var(CRASH_INSTANCE).context("started by hand")?))?;
    let reached = |sandbox: &Sandbox, moment: &str| fs::write(sandbox.dir().join(moment), "");
    reached(&sandbox, "up")?;
    if std::env::var_os(CRASH_MESH).is_some() {
        let mesh = MeshPlan::new(built("culvert")?);
        sandbox.start_ca(&mesh)?;
        for node in Node::ALL {
            sandbox.start_agent(&mesh, node)?;
        }
        reached(&sandbox, "starting")?;
        for node in Node::ALL {
            sandbox.wait_ready(node)?;
        }
        // A tunnel between the nodes, in use when its ends lose their owner.
        let to = sandbox.pod("default/productpage")?.at(Family::V4, 9080).to_string();
        let calls = ["http-get", "--to", &to, "--marker", "crash", "--count", "100000", "--interval-ms", "20"];
        sandbox.start_in_pod("traffic", "test/nginx", &calls)?;
        command::wait_for("a request is answered", Duration::from_secs(20), || {
            Ok(fs::read_to_string(sandbox.log_path("traffic"))?.contains("\"status\":200").then_some(()))
        })?;
        reached(&sandbox, "ready")?;
    }
    std::thread::sleep(Duration::from_secs(60));
    Ok(())
}

#[test]
fn sandboxes_do_not_disturb_each_other() -> Result<()> {
    let one = Sandbox::build(Plan::bookinfo(&own_name("one")))?;
    let two = Sandbox::build(Plan::bookinfo(&own_name("two")))?;
    let to = two.pod("default/productpage")?.at(Family::V4, 9080);
    ensure!(two.http("test/nginx", to, "two")?.status == Some(200), "the second is up");
    one.take_down()?;
    ensure!(two.http("test/nginx", to, "two")?.status == Some(200), "the second survives the first");
    Ok(())
}

#[test]
fn programs_of_the_transport_work_across_the_link_as_it_is_told_to_be() -> Result<()> {
    let mut plan = Plan::empty(&own_name("link"));
    plan.link = LinkPlan { mtu: 1400, loss_percent: 1, delay_ms: 0 };
    let plan = plan
        .pod(PodPlan::new(Node::A, "test", "client"))
        .pod(PodPlan::new(Node::B, "test", "server").program(&["exchange-serve", "--port=7000"]))
        .pod(PodPlan::new(Node::B, "test", "greeter").program(&["exchange-serve", "--port=7000", "--speak-first"]))
        .service(ServicePlan::new("test", "nobody", &[("tcp", 7000)]));
    let mut sandbox = Sandbox::build(plan)?;
    let server = sandbox.pod("test/server")?.at(Family::V4, 7000).to_string();
    let greeter = sandbox.pod("test/greeter")?.at(Family::V6, 7000).to_string();
    for (verb, to) in
        [("echo", &server), ("up", &server), ("down", &server), ("drain", &server), ("speak-first", &greeter)]
    {
        let got: ExchangeResult = sandbox.call("test/client", &["exchange", "--to", to, "--verb", verb])?;
        ensure!(got.failure.is_none(), "{verb}: {:?} {:?}", got.failure, got.error);
    }
    sandbox.start_in_pod("stall", "test/client", &["stall", "--to", &server, "--count", "3"])?;
    command::wait_for("three readers stall", Duration::from_secs(10), || {
        Ok(fs::read_to_string(sandbox.log_path("stall"))?.contains("\"held\":3").then_some(()))
    })?;
    let many: ShortResult = sandbox.call("test/client", &["short", "--to", &server, "--count", "300"])?;
    ensure!(many.ok == 300 && many.errors.is_empty(), "{many:?}");
    sandbox.stop("stall")?;

    // §13: a Service without ready endpoints refuses; a port that nobody serves refuses; both are results.
    let nobody = SocketAddr::new(sandbox.cluster_ip("test/nobody", Family::V4)?, 7000);
    for to in [nobody, sandbox.pod("test/server")?.at(Family::V4, 7001)] {
        let got = sandbox.http("test/client", to, "")?;
        ensure!(got.failure == Some(Failure::Refused), "{to}: {} {:?}", got.brief(), got.error);
    }
    sandbox.stop("test/server/0")?;
    let got = sandbox.http("test/client", sandbox.pod("test/server")?.at(Family::V4, 7000), "")?;
    ensure!(got.failure == Some(Failure::Refused), "a stopped server: {}", got.brief());
    Ok(())
}

#[test]
fn a_process_that_ended_is_an_error_with_its_log() -> Result<()> {
    let mut sandbox = Sandbox::build(Plan::empty(&own_name("ended")).pod(PodPlan::new(Node::A, "test", "client")))?;
    sandbox.start_in_pod("broken", "test/client", &["http-serve", "--name", "x", "--port", "none"]).ok();
    std::thread::sleep(Duration::from_millis(200));
    let error = format!("{:#}", sandbox.expect_running("broken").err().context("it ended")?);
    ensure!(error.contains("invalid value 'none'") || error.contains("runs no broken"), "{error}");
    Ok(())
}

#[test]
fn an_editor_that_writes_a_manifest_is_never_seen_half_way() -> Result<()> {
    let sandbox = Sandbox::build(Plan::empty(&own_name("folder")))?;
    let folder = sandbox.manifests();
    folder.apply("x.yaml", "first: 1\n")?;
    folder.apply("x.yaml", "second: 2\n")?;
    ensure!(fs::read_to_string(folder.path().join("x.yaml"))? == "second: 2\n");
    let strangers: Vec<_> = fs::read_dir(folder.path())?
        .filter_map(|e| Some(e.ok()?.file_name().to_string_lossy().into_owned()))
        .filter(|n| !n.ends_with(".yaml"))
        .collect();
    ensure!(strangers.is_empty(), "{strangers:?}");
    folder.delete("x.yaml")?;
    folder.delete("x.yaml")?;
    ensure!(!folder.path().join("x.yaml").exists());
    Ok(())
}

#[test]
fn a_delay_of_the_link_is_there_or_its_absence_is_said() -> Result<()> {
    let mut plan = Plan::empty(&own_name("delay"))
        .pod(PodPlan::new(Node::A, "test", "client"))
        .pod(PodPlan::new(Node::B, "test", "server").http(&[80]));
    plan.link.delay_ms = 40;
    match Sandbox::build(plan) {
        Ok(sandbox) => {
            let got = sandbox.http("test/client", sandbox.pod("test/server")?.at(Family::V4, 80), "")?;
            // There and back for the connection, there and back for the request.
            ensure!(got.status == Some(200) && got.millis >= 160, "{} after {} ms", got.brief(), got.millis);
        }
        Err(error) => {
            ensure!(format!("{error:#}").contains("CONFIG_NET_SCH_NETEM"), "{error:#}");
            expect_no_traces(&own_name("delay"))?;
        }
    }
    Ok(())
}
