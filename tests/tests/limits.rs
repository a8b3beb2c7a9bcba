//! What one pod takes, its neighbours keep: at a limit the pod that has reached it is refused, told with the reason, and
//! nobody else notices.

use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use culvert_tests::programs::{FloodResult, PacedResult};
use culvert_tests::sandbox::{Family, MeshPlan, Node, Plan, PodPlan, Sandbox, agent_process, built};
use culvert_tests::{command, full, patience, record};

const EXCHANGE: u16 = 7000;

/// On node a two clients in the mesh and one outside; on node b the server.
struct Scene {
    sandbox: Sandbox,
    server: SocketAddr,
    /// Counts what is run, for names.
    count: u32,
}

impl Scene {
    fn new(instance: &str, arguments: &[&str]) -> Result<Self> {
        let server = PodPlan::new(Node::B, "default", "far");
        let plan = Plan::empty(instance)
            .pod(PodPlan::new(Node::A, "test", "greedy"))
            .pod(PodPlan::new(Node::A, "test", "neighbour"))
            .pod(PodPlan::new(Node::A, "test", "outsider").label("istio.io/dataplane-mode", "none"))
            .pod(server.program(&["exchange-serve", &format!("--port={EXCHANGE}")]));
        let mut sandbox = Sandbox::build(plan)?;
        let mut mesh = MeshPlan::new(built("culvert")?);
        mesh.agent_arguments = arguments.iter().map(|&argument| argument.to_owned()).collect();
        sandbox.start_mesh(&mesh)?;
        let server = sandbox.pod("default/far")?.at(Family::V4, EXCHANGE);
        Ok(Self { sandbox, server, count: 0 })
    }

    fn until(&self, name: &str) -> PathBuf {
        self.sandbox.dir().join(format!("{name}-ends"))
    }

    /// Starts connections that are held, and waits until all were tried.
    fn flood(&mut self, pod: &str, to: SocketAddr, count: u64, more: &[&str]) -> Result<(String, FloodResult)> {
        self.count += 1;
        let (name, to, count) = (format!("flood-{}", self.count), to.to_string(), count.to_string());
        let until = self.until(&name);
        let until = until.to_str().context("a path that is text")?;
        let arguments = ["flood", "--to", &to, "--count", &count, "--until", until];
        self.sandbox.start_in_pod(&name, pod, &[&arguments[..], more].concat())?;
        let limit = Duration::from_secs(120) * patience();
        let tried = command::wait_for(&format!("{name} has tried all"), limit, || {
            self.sandbox.expect_running(&name)?;
            Ok(results::<FloodResult>(&self.sandbox, &name)?.into_iter().next())
        })?;
        println!("{pod}: {tried:?}");
        Ok((name, tried))
    }

    fn end(&mut self, flood: &str) -> Result<FloodResult> {
        fs::write(self.until(flood), "")?;
        self.sandbox.wait_end(flood, Duration::from_secs(60) * patience())?;
        results(&self.sandbox, flood)?.pop().context("its result")
    }

    /// A client that behaves, for so long.
    fn behaves(&mut self, pod: &str, rate: u32, time: Duration) -> Result<PacedResult> {
        self.count += 1;
        let (name, to, rate) = (format!("paced-{}", self.count), self.server.to_string(), rate.to_string());
        let until = self.until(&name);
        let until = until.to_str().context("a path that is text")?;
        self.sandbox.start_in_pod(&name, pod, &["paced", "--to", &to, "--rate", &rate, "--until", until])?;
        thread::sleep(time);
        fs::write(until, "")?;
        self.sandbox.wait_end(&name, Duration::from_secs(30) * patience())?;
        let result: PacedResult = results(&self.sandbox, &name)?.pop().context("its result")?;
        ensure!(result.errors.is_empty() && result.ok > 10, "{pod}: {result:?}");
        Ok(result)
    }

    /// Waits until an agent has told a refusal with this reason, and about whom.
    fn expect_told(&self, node: Node, reason: &str, field: &str, whom: &str) -> Result<()> {
        command::wait_for(&format!("the agent of {node} tells {reason}"), Duration::from_secs(10) * patience(), || {
            let (lines, _) = self.sandbox.agent_log(node, 0)?;
            let mut told = lines.iter().filter(|line| line.field("reason").as_deref() == Some(reason));
            match told.find(|line| line.field(field).is_none_or(|value| !value.starts_with(whom))) {
                Some(other) => bail!("{reason} was told of somebody else: {other:?}"),
                None => Ok(lines.iter().any(|line| line.field("reason").as_deref() == Some(reason)).then_some(())),
            }
        })
    }
}

fn results<T: serde::de::DeserializeOwned>(sandbox: &Sandbox, name: &str) -> Result<Vec<T>> {
    let text = fs::read_to_string(sandbox.log_path(name))?;
    let whole = &text[..text.rfind('\n').map_or(0, |at| at + 1)];
    whole.lines().map(|line| serde_json::from_str(line).with_context(|| format!("{name}: {line}"))).collect()
}

/// Resident memory in KiB, and open descriptors.
fn size_of(sandbox: &Sandbox, agent: &str) -> Result<(u64, usize)> {
    let pid = sandbox.pid(agent)?;
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let rss = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("VmRSS")?;
    let rss = rss.trim().trim_end_matches(" kB").parse()?;
    Ok((rss, fs::read_dir(format!("/proc/{pid}/fd"))?.count()))
}

/// The names of an agent's threads, in order.
fn threads_of(sandbox: &Sandbox, agent: &str) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for thread in fs::read_dir(format!("/proc/{}/task", sandbox.pid(agent)?))? {
        // One that has just ended is none.
        names.extend(fs::read_to_string(thread?.path().join("comm")).map(|name| name.trim_end().to_owned()).ok());
    }
    names.sort();
    Ok(names)
}

/// A pod that opens more connections than it may is refused; so is a peer that begins handshakes without end.
#[test]
fn a_greedy_pod_is_refused_and_its_neighbour_is_not() -> Result<()> {
    let limits = ["--max-connections-per-pod", "150", "--max-handshakes-per-peer", "20"];
    let mut scene = Scene::new("t-greedy", &limits)?;
    let time = Duration::from_secs(if full() { 20 } else { 4 });
    let alone = scene.behaves("test/neighbour", 50, time)?;

    let (greedy, tried) = scene.flood("test/greedy", scene.server, 1000, &[])?;
    ensure!(tried.held == 150 && tried.refused == 850, "{tried:?}");
    // Handshakes that do not go on, from outside the mesh.
    let tunnel = SocketAddr::new(scene.server.ip(), 15008);
    let (rude, _) = scene.flood("test/outsider", tunnel, 500, &["--silent"])?;
    let beside = scene.behaves("test/neighbour", 50, time)?;
    let rude = scene.end(&rude)?;
    ensure!(rude.alive.is_some_and(|alive| alive <= 20) && rude.held + rude.refused == 500, "{rude:?}");
    // What was open before the limit was reached is whole.
    let greedy = scene.end(&greedy)?;
    ensure!(greedy.alive == Some(150), "{greedy:?}");
    let began = Instant::now();
    loop {
        let (again, tried) = scene.flood("test/greedy", scene.server, 20, &[])?;
        scene.end(&again)?;
        if tried.refused == 0 {
            break;
        }
        ensure!(began.elapsed() < Duration::from_secs(20) * patience(), "there is no room again: {tried:?}");
    }

    let ip = |pod: &str| Ok::<_, anyhow::Error>(format!("{}:", scene.sandbox.pod(pod)?.v4));
    scene.expect_told(Node::A, "connection-limit", "src.addr", &ip("test/greedy")?)?;
    scene.expect_told(Node::B, "handshake-limit", "src.addr", &ip("test/outsider")?)?;
    record(&format!(
        "A neighbour's p99 (50 new connections/s): {} ms alone, {} ms beside a greedy pod and a flood of handshakes",
        alone.p99_us as f64 / 1000.0,
        beside.p99_us as f64 / 1000.0
    ))
}

/// Readers that never read hold what the limit of their pod allows, and no more.
#[test]
fn memory_for_a_pod_is_bounded() -> Result<()> {
    let mut scene = Scene::new("t-memory", &["--max-memory-per-pod", "4MiB"])?;
    let agent = agent_process(Node::A);
    scene.behaves("test/greedy", 20, Duration::from_secs(1))?;
    let before = size_of(&scene.sandbox, &agent)?.0;
    let to = scene.server.to_string();
    scene.sandbox.start_in_pod("stall", "test/greedy", &["stall", "--to", &to, "--count", "100"])?;
    let ip = format!("{}:", scene.sandbox.pod("test/greedy")?.v4);
    scene.expect_told(Node::A, "memory-limit", "src.addr", &ip)?;
    scene.behaves("test/neighbour", 20, Duration::from_secs(3))?;
    let after = size_of(&scene.sandbox, &agent)?.0;
    println!("{before} KiB before, {after} KiB with 100 readers that never read");
    // Without the limit they would hold 25 MiB.
    ensure!(after < before + (20 << 10), "{before} KiB before, {after} KiB after");
    Ok(())
}

/// The last descriptors are for those who have few.
#[test]
fn the_last_descriptors_are_for_the_modest() -> Result<()> {
    let mut scene = Scene::new("t-files", &["--max-open-files", "250", "--open-files-reserve", "60"])?;
    let (greedy, tried) = scene.flood("test/greedy", scene.server, 600, &[])?;
    ensure!(tried.held > 20 && tried.refused > 300, "{tried:?}");
    scene.behaves("test/neighbour", 20, Duration::from_secs(3))?;
    let ip = format!("{}:", scene.sandbox.pod("test/greedy")?.v4);
    scene.expect_told(Node::A, "open-files-limit", "src.addr", &ip)?;
    let (_, files) = size_of(&scene.sandbox, &agent_process(Node::A))?;
    ensure!(files <= 250, "{files} descriptors");
    let greedy = scene.end(&greedy)?;
    ensure!(greedy.alive == Some(greedy.held), "{greedy:?}");
    Ok(())
}

/// Many open connections cost what they cost, and not more with time.
#[test]
fn open_connections_do_not_grow() -> Result<()> {
    let (count, time) = if full() { (10_000, Duration::from_secs(600)) } else { (1500, Duration::from_secs(15)) };
    let mut scene = Scene::new("t-open", &[])?;
    let agents = Node::ALL.map(agent_process);
    scene.behaves("test/neighbour", 20, Duration::from_secs(1))?;
    // The start's text is given back after two seconds, and is not to be taken for connections' memory.
    thread::sleep(Duration::from_secs(4));
    let idle: Vec<_> = agents.iter().map(|agent| size_of(&scene.sandbox, agent)).collect::<Result<_>>()?;
    let threads: Vec<_> = agents.iter().map(|agent| threads_of(&scene.sandbox, agent)).collect::<Result<_>>()?;
    let (flood, tried) = scene.flood("test/greedy", scene.server, count, &[])?;
    ensure!(tried.held == count, "{tried:?}");
    thread::sleep(Duration::from_secs(2));
    let first: Vec<_> = agents.iter().map(|agent| size_of(&scene.sandbox, agent)).collect::<Result<_>>()?;
    let began = Instant::now();
    while began.elapsed() < time {
        thread::sleep(time / 5);
        for (agent, (rss, files)) in agents.iter().zip(&first) {
            let now = size_of(&scene.sandbox, agent)?;
            ensure!(now.0 < rss + (4 << 10), "{agent} had {rss} KiB and has {} KiB", now.0);
            ensure!(now.1 < files + 20, "{agent} had {files} descriptors and has {}", now.1);
        }
    }
    let ended = scene.end(&flood)?;
    ensure!(ended.alive == Some(count), "{ended:?}");
    let per = |at: usize| (first[at].0.saturating_sub(idle[at].0)) as f64 / count as f64;
    record(&format!(
        "{count} open connections for {} s without growth: {:.1} KiB each at the client's agent, {:.1} KiB at the server's",
        time.as_secs(),
        per(0),
        per(1)
    ))?;
    // And they cost nothing when they are gone. So many have needed a hundred tunnels, which are kept for five minutes.
    let kept = Duration::from_secs(if full() { 330 } else { 20 });
    command::wait_for("descriptors are given back", kept * patience(), || {
        let now = size_of(&scene.sandbox, &agents[0])?;
        Ok((now.1 < idle[0].1 + 20).then_some(()))
    })?;
    // No thread was made for any of them: every one has its owner and its name.
    for (agent, before) in agents.iter().zip(&threads) {
        // Those that only wait for more blocking work of the runtime end after ten seconds.
        command::wait_for(
            &format!("{agent} has the threads {before:?}"),
            Duration::from_secs(20) * patience(),
            || {
                let mut now = threads_of(&scene.sandbox, agent)?;
                for name in before {
                    if let Some(at) = now.iter().position(|other| other == name) {
                        now.swap_remove(at);
                    }
                }
                Ok(now.is_empty().then_some(()))
            },
        )?;
    }
    Ok(())
}
