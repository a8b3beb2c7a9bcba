//! What one pod takes, its neighbours keep: at a limit the pod that has reached it is refused, told with the reason, and
//! nobody else notices.

use std::fs;
use std::io;
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use culvert_tests::programs::{FloodResult, PacedResult};
use culvert_tests::sandbox::{Family, MeshPlan, Node, Plan, PodPlan, Sandbox, agent_process, built};
use culvert_tests::{command, full, patience, record};
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection, RootCertStore};

const EXCHANGE: u16 = 7000;

/// On node a two clients in the mesh and one outside; on node b a server in the mesh and one outside.
struct Scene {
    sandbox: Sandbox,
    server: SocketAddr,
    /// Counts what is run, for names.
    count: u32,
}

impl Scene {
    fn new(instance: &str, arguments: &[&str]) -> Result<Self> {
        Self::with(instance, Node::ALL.map(|node| (node, arguments)))
    }

    /// With arguments for the agent of each node.
    fn with(instance: &str, arguments: [(Node, &[&str]); 2]) -> Result<Self> {
        let serve = ["exchange-serve", &format!("--port={EXCHANGE}")];
        let server = PodPlan::new(Node::B, "default", "far");
        let elsewhere = PodPlan::new(Node::B, "test", "elsewhere").label("istio.io/dataplane-mode", "none");
        let plan = Plan::empty(instance)
            .pod(PodPlan::new(Node::A, "test", "greedy"))
            .pod(PodPlan::new(Node::A, "test", "neighbour"))
            .pod(PodPlan::new(Node::A, "test", "outsider").label("istio.io/dataplane-mode", "none"))
            .pod(server.program(&serve))
            .pod(elsewhere.program(&serve));
        let mut sandbox = Sandbox::build(plan)?;
        let mut mesh = MeshPlan::new(built("culvert")?);
        sandbox.start_ca(&mesh)?;
        for (node, arguments) in arguments {
            mesh.agent_arguments = arguments.iter().map(|&argument| argument.to_owned()).collect();
            sandbox.start_agent(&mesh, node)?;
        }
        for node in Node::ALL {
            sandbox.wait_ready(node)?;
        }
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

    /// Starts a client that makes connections to the server at this rate, of which each goes on for so long.
    fn paced(&mut self, pod: &str, rate: u32, live: Duration) -> Result<String> {
        self.count += 1;
        let (name, to, rate) = (format!("paced-{}", self.count), self.server.to_string(), rate.to_string());
        let (until, live) = (self.until(&name), live.as_millis().to_string());
        let until = until.to_str().context("a path that is text")?;
        let arguments = ["paced", "--to", &to, "--rate", &rate, "--live-ms", &live, "--until", until];
        self.sandbox.start_in_pod(&name, pod, &arguments)?;
        Ok(name)
    }

    fn end_paced(&mut self, name: &str) -> Result<PacedResult> {
        fs::write(self.until(name), "")?;
        self.sandbox.wait_end(name, Duration::from_secs(30) * patience())?;
        results(&self.sandbox, name)?.pop().context("its result")
    }

    /// A client that behaves, for so long.
    fn behaves(&mut self, pod: &str, rate: u32, time: Duration) -> Result<PacedResult> {
        let name = self.paced(pod, rate, Duration::ZERO)?;
        thread::sleep(time);
        let result = self.end_paced(&name)?;
        ensure!(result.errors.is_empty() && result.ok > 10, "{pod}: {result:?}");
        Ok(result)
    }

    /// Starts connections that ask for bytes and never read them, and waits until all were tried.
    fn stall(&mut self, pod: &str, to: SocketAddr, count: u32) -> Result<()> {
        let arguments = ["stall", "--to", &to.to_string(), "--count", &count.to_string()];
        self.sandbox.start_in_pod("stall", pod, &arguments)?;
        command::wait_for("all that stall were tried", Duration::from_secs(60) * patience(), || {
            self.sandbox.expect_running("stall")?;
            Ok(fs::read_to_string(self.sandbox.log_path("stall"))?.contains("held").then_some(()))
        })
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

/// The memory of its own in KiB, and open descriptors.
fn size_of(sandbox: &Sandbox, agent: &str) -> Result<(u64, usize)> {
    let descriptors = fs::read_dir(format!("/proc/{}/fd", sandbox.pid(agent)?))?.count();
    Ok((sandbox.own_memory(agent)?, descriptors))
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
    let (greedy, tried) = scene.flood("test/greedy", scene.server, 1000, &[])?;
    ensure!(tried.held == 150 && tried.refused == 850, "{tried:?}");
    // Handshakes that do not go on, from outside the mesh.
    let tunnel = SocketAddr::new(scene.server.ip(), 15008);
    let (rude, _) = scene.flood("test/outsider", tunnel, 500, &["--silent"])?;
    scene.behaves("test/neighbour", 50, Duration::from_secs(if full() { 20 } else { 3 }))?;
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
    scene.expect_told(Node::B, "handshake-limit", "src.addr", &ip("test/outsider")?)
}

/// New connections a second of a neighbour, of a greedy pod, and handshakes of a peer that nobody believes.
const RATE: u32 = 50;
const GREED: u32 = 100;
const HANDSHAKES: u32 = 50;

/// Who is refused again and again, connection after connection and handshake after handshake, costs a neighbour the machine's
/// time, and no connection. Rounds alone and rounds beside them take turns, so that a slow moment of the machine is in both.
#[test]
fn a_neighbour_is_served_beside_those_who_are_refused() -> Result<()> {
    let mut scene = Scene::new("t-beside", &["--max-connections-per-pod", "100"])?;
    let (rounds, time) = if full() { (15, Duration::from_secs(4)) } else { (5, Duration::from_millis(1500)) };
    let (outsider, tunnel) =
        (scene.sandbox.pod("test/outsider")?.place.clone(), SocketAddr::new(scene.server.ip(), 15008));
    scene.behaves("test/neighbour", RATE, Duration::from_secs(1))?;
    let (mut alone, mut beside) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        alone.push(scene.behaves("test/neighbour", RATE, time)?);
        let stop = AtomicBool::new(false);
        let (result, handshakes) = thread::scope(|scope| {
            let rude = scope.spawn(|| outsider.inside(|| handshakes(tunnel, &stop)));
            let result = (|| {
                let greedy = scene.paced("test/greedy", GREED, Duration::from_millis(1500))?;
                // Until it has as many as it may.
                thread::sleep(Duration::from_millis(1200));
                let result = scene.behaves("test/neighbour", RATE, time)?;
                Ok::<_, anyhow::Error>((result, scene.end_paced(&greedy)?))
            })();
            stop.store(true, Ordering::Relaxed);
            (result, rude.join())
        });
        let (of_neighbour, of_greedy) = result?;
        let handshakes = handshakes.map_err(|_| anyhow::anyhow!("a thread panicked"))??;
        ensure!(of_greedy.ok > 50 && of_greedy.failures.values().sum::<u64>() > 10, "{of_greedy:?}");
        ensure!(handshakes > 20, "{handshakes} handshakes");
        beside.push(of_neighbour);
    }
    let ip = format!("{}:", scene.sandbox.pod("test/greedy")?.v4);
    scene.expect_told(Node::A, "connection-limit", "src.addr", &ip)?;
    let median = |of: &[PacedResult], value: fn(&PacedResult) -> u64| {
        let mut all: Vec<u64> = of.iter().map(value).collect();
        all.sort_unstable();
        all[all.len() / 2] as f64 / 1000.0
    };
    let p50 = [&alone, &beside].map(|of| median(of, |result| result.p50_us));
    let p99 = [&alone, &beside].map(|of| median(of, |result| result.p99_us));
    record(&format!(
        "A neighbour's new connections ({RATE}/s), medians of {rounds} rounds: p50 {} ms and p99 {} ms alone, {} and {} beside a \
         pod that is refused ({GREED}/s) and handshakes that fail ({HANDSHAKES}/s)",
        p50[0], p99[0], p50[1], p99[1]
    ))?;
    // All of them, clients and servers too, share the machine's cores: what is bounded is that nobody stands in a queue
    // behind those who are refused.
    ensure!(p50[1] < 5.0 * p50[0] + 20.0 * f64::from(patience()), "half of its connections take {p50:?} ms");
    ensure!(p99[1] < 5.0 * p99[0] + 200.0 * f64::from(patience()), "its slow connections take {p99:?} ms");
    Ok(())
}

/// TLS handshakes that end with an alert, since the server's certificate is not believed; how many.
fn handshakes(to: SocketAddr, stop: &AtomicBool) -> Result<u64> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_root_certificates(RootCertStore::empty())
        .with_no_client_auth();
    let config = Arc::new(config);
    let mut count = 0;
    while !stop.load(Ordering::Relaxed) {
        let mut tcp = TcpStream::connect(to)?;
        tcp.set_read_timeout(Some(Duration::from_secs(10) * patience()))?;
        let mut tls = ClientConnection::new(config.clone(), ServerName::IpAddress(to.ip().into()))?;
        match tls.complete_io(&mut tcp) {
            Err(error) if error.kind() == io::ErrorKind::InvalidData => count += 1,
            other => bail!("a handshake that was to fail: {other:?}"),
        }
        thread::sleep(Duration::from_secs(1) / HANDSHAKES);
    }
    Ok(count)
}

/// Readers that never read hold what the limit of their pod allows, and no more.
#[test]
fn memory_for_a_pod_is_bounded() -> Result<()> {
    let mut scene = Scene::new("t-memory", &["--max-memory-per-pod", "4MiB"])?;
    let agent = agent_process(Node::A);
    scene.behaves("test/greedy", 20, Duration::from_secs(1))?;
    let before = size_of(&scene.sandbox, &agent)?.0;
    scene.stall("test/greedy", scene.server, 100)?;
    let ip = format!("{}:", scene.sandbox.pod("test/greedy")?.v4);
    scene.expect_told(Node::A, "memory-limit", "src.addr", &ip)?;
    scene.behaves("test/neighbour", 20, Duration::from_secs(3))?;
    let after = size_of(&scene.sandbox, &agent)?.0;
    println!("{before} KiB before, {after} KiB with 100 readers that never read");
    // Without the limit they would hold 25 MiB.
    ensure!(after < before + (20 << 10), "{before} KiB before, {after} KiB after");
    scene.sandbox.expect_running("stall")
}

/// The same for connections out of the mesh, which no window bounds: what nobody reads stays with its sender.
#[test]
fn memory_for_plaintext_is_bounded() -> Result<()> {
    let mut scene = Scene::new("t-plain", &["--max-memory-per-pod", "4MiB"])?;
    let agent = agent_process(Node::A);
    scene.behaves("test/greedy", 20, Duration::from_secs(1))?;
    let before = size_of(&scene.sandbox, &agent)?.0;
    let elsewhere = scene.sandbox.pod("test/elsewhere")?.at(Family::V4, EXCHANGE);
    // Together they cost 3.5 MiB, without what they hold.
    scene.stall("test/greedy", elsewhere, 450)?;
    let began = Instant::now();
    loop {
        let (further, tried) = scene.flood("test/greedy", elsewhere, 4, &[])?;
        scene.end(&further)?;
        if tried.held == 0 {
            break;
        }
        ensure!(began.elapsed() < Duration::from_secs(30) * patience(), "what they hold is not counted: {tried:?}");
    }
    let ip = format!("{}:", scene.sandbox.pod("test/greedy")?.v4);
    scene.expect_told(Node::A, "memory-limit", "src.addr", &ip)?;
    scene.behaves("test/neighbour", 20, Duration::from_secs(3))?;
    let after = size_of(&scene.sandbox, &agent)?.0;
    println!("{before} KiB before, {after} KiB with 450 readers that never read");
    ensure!(after < before + (20 << 10), "{before} KiB before, {after} KiB after");
    scene.sandbox.expect_running("stall")
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

/// Those of a server's node are shared by its clients: one takes what there is to take, and the next is served.
#[test]
fn the_last_descriptors_of_a_server_are_for_modest_clients() -> Result<()> {
    let few = ["--max-open-files", "250", "--open-files-reserve", "60"];
    let mut scene = Scene::with("t-served", [(Node::A, &[]), (Node::B, &few)])?;
    let (greedy, tried) = scene.flood("test/greedy", scene.server, 600, &[])?;
    ensure!(tried.held > 20 && tried.refused > 300, "{tried:?}");
    let ip = format!("{}:", scene.sandbox.pod("test/greedy")?.v4);
    scene.expect_told(Node::B, "open-files-limit", "src.addr", &ip)?;
    scene.behaves("test/neighbour", 20, Duration::from_secs(3))?;
    let greedy = scene.end(&greedy)?;
    ensure!(greedy.alive == Some(greedy.held), "{greedy:?}");
    let (lines, _) = scene.sandbox.agent_log(Node::B, 0)?;
    let exhausted = lines.iter().find(|line| line.message() == "accept failed");
    ensure!(exhausted.is_none(), "the reserve was used up: {exhausted:?}");
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
