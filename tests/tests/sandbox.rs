//! The sandbox itself, without a mesh: what a later scenario shows is worth only as much as this ground.

use std::collections::BTreeSet;
use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use culvert_tests::command;
use culvert_tests::programs::{ExchangeResult, Failure, HttpResult, ShortResult};
use culvert_tests::sandbox::{
    Family, LinkPlan, Node, Plan, PodPlan, Sandbox, ServicePlan, cgroup2_mount, own_name, sweep,
};

/// Everything on the machine that bears the sandbox's name.
fn traces(instance: &str) -> Result<BTreeSet<String>> {
    let name = format!("culvert-{instance}");
    let mut found = BTreeSet::new();
    for dir in ["/run", "/run/netns", "/sys/fs/bpf", &cgroup2_mount()?.to_string_lossy()] {
        let Ok(entries) = fs::read_dir(dir) else { continue };
        for entry in entries {
            let path = entry?.path();
            let is_ours = path.file_name().is_some_and(|n| {
                let n = n.to_string_lossy();
                n == name || n.starts_with(&format!("{name}-"))
            });
            if is_ours {
                found.insert(path.to_string_lossy().into_owned());
            }
        }
    }
    for entry in fs::read_dir("/proc")? {
        let path = entry?.path();
        let Ok(cgroups) = fs::read_to_string(path.join("cgroup")) else { continue };
        if cgroups.contains(&format!("/{name}/")) {
            found.insert(path.to_string_lossy().into_owned());
        }
    }
    Ok(found)
}

/// Tells the process that is to be killed which sandbox to build.
const CRASH_INSTANCE: &str = "CULVERT_CRASH_TEST_INSTANCE";

/// Ended processes whose owner died are taken note of by the system's first process, which may need a moment.
fn expect_no_traces(instance: &str) -> Result<()> {
    let mut left = BTreeSet::new();
    command::wait_for("nothing is left behind", Duration::from_secs(5), || {
        left = traces(instance)?;
        Ok(left.is_empty().then_some(()))
    })
    .with_context(|| format!("left behind: {left:?}"))
}

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
    let owner = std::env::current_exe()?;
    let spawn = || {
        Command::new(&owner)
            .env(CRASH_INSTANCE, instance)
            .args(["--exact", "owner_of_the_crash_test", "--ignored", "--nocapture"])
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .spawn()
            .context("start the owner")
    };
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

#[test]
#[ignore = "not a test: the process that a_dead_owner_leaves_nothing_to_the_next_start kills"]
fn owner_of_the_crash_test() -> Result<()> {
    let sandbox = Sandbox::build(Plan::bookinfo(&std::env::var(CRASH_INSTANCE).context("started by hand")?))?;
    fs::write(sandbox.dir().join("up"), "")?;
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
