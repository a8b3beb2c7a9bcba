//! The commands that look at a running agent, or change its log level.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use clap::{Args, Subcommand};
use http::{Method, StatusCode};
use serde_json::Value;

use super::{
    client::{self, Address},
    print,
    rows::{self, Filter},
    sheet::{Format, Sheet, Watch},
};
use crate::{
    admin::{
        dump::Dump,
        printable,
        process::{self, Process},
        strict::StrictDump,
        why::{self, Explanation, RefusalsDump},
    },
    config::parse_duration,
    telemetry::open::Proof,
};

/// How often `culvert ready --wait` asks.
const ASK_AGAIN: Duration = Duration::from_millis(200);

/// How long one answer may take: the place may be that of an agent that hangs, and the next time another one answers.
const READY_PATIENCE: Duration = Duration::from_secs(2);

/// A question to the agent.
#[derive(Debug, Subcommand)]
pub enum Look {
    /// Pods of the cluster as the agent knows them, in the mesh or not
    Workloads(Common),
    /// Services and how many of their endpoints connections can go to
    Services(Common),
    /// Policies in force, their scope, and how many pods each decides about
    Policies(Common),
    /// Certificates of the node's pods, and the roots
    Certificates(Common),
    /// Open connections of the node's pods, with their bytes so far
    Connections(Connections),
    /// Why connections were refused in the last hour, or what would happen to one now, and what would allow it
    Why(Why),
    /// How often the kernel passed, refused or handed over connections of the node's pods, by reason and rule
    Verdicts(Common),
    /// Reports of what was seen
    #[command(subcommand)]
    Report(Report),
    /// Whether the connections of the node's pods are the mesh's
    #[command(subcommand)]
    Capture(Capture),
    /// Metrics of the agent, by name
    Metrics(Metrics),
    /// Shows the agent's log level, or changes it at once
    Log(Log),
    /// For probes: whether the agent of this container serves the pods of its node; status 1 if not, also where another one does
    Ready(Ready),
}

/// What most questions have.
#[derive(Args, Clone, Debug)]
pub struct Common {
    /// Where the agent answers operators (its --admin-address)
    #[arg(long, value_name = "URL", env = "CULVERT_ADDRESS", default_value = "http://127.0.0.1:15000")]
    address: Address,
    #[command(flatten)]
    shown: Shown,
    /// Only what concerns this pod: NAME or NAMESPACE/NAME
    #[arg(long, value_name = "POD")]
    pod: Option<String>,
}

/// How it is shown.
#[derive(Args, Clone, Debug)]
struct Shown {
    /// How to show it
    #[arg(short, long, value_enum, value_name = "FORMAT", default_value = "table")]
    output: Format,
    /// Only of this namespace
    #[arg(short, long, value_name = "NAMESPACE")]
    namespace: Option<String>,
    /// Stay, and show each row that changes
    #[arg(short, long)]
    watch: bool,
    /// With --watch: how often to look
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = parse_duration)]
    interval: Duration,
}

/// `culvert connections`
#[derive(Args, Clone, Debug)]
pub struct Connections {
    #[command(flatten)]
    common: Common,
    /// Only this direction, seen from the pod of this node
    #[arg(long, value_name = "DIRECTION", value_parser = ["inbound", "outbound"])]
    direction: Option<String>,
    /// Addresses instead of names
    #[arg(long)]
    raw: bool,
}

/// `culvert why`
#[derive(Args, Clone, Debug)]
pub struct Why {
    #[command(flatten)]
    common: Common,
    /// What would happen now to a connection from this client: NAMESPACE/POD, a POD of --namespace (or of default), or an
    /// address
    #[arg(value_name = "CLIENT", requires = "server")]
    client: Option<String>,
    /// To this server: NAMESPACE/POD:PORT, POD:PORT, SERVICE.NAMESPACE.svc:PORT, ADDRESS:PORT or [ADDRESS]:PORT
    #[arg(value_name = "SERVER")]
    server: Option<String>,
}

/// `culvert report`
#[derive(Subcommand, Clone, Debug)]
pub enum Report {
    /// Which workloads of this node can go to STRICT by what was seen, which clients stand in the way, and the manifests
    Strict(Strict),
}

/// `culvert report strict`
#[derive(Args, Clone, Debug)]
pub struct Strict {
    /// Where the agent answers operators (its --admin-address)
    #[arg(long, value_name = "URL", env = "CULVERT_ADDRESS", default_value = "http://127.0.0.1:15000")]
    address: Address,
    #[command(flatten)]
    shown: Shown,
    /// Only clients that were seen within this time stand in the way
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    within: Option<Duration>,
    /// Prints only the manifests, for culvert validate -f - or kubectl apply -f -
    #[arg(long, conflicts_with_all = ["output", "watch"])]
    manifests: bool,
}

/// `culvert capture`
#[derive(Subcommand, Clone, Debug)]
pub enum Capture {
    /// Looks at every established TCP socket of the node's pods; shows those that are neither the mesh's nor exempt, and
    /// ends with status 1 if there are any
    Proof(Common),
}

/// `culvert metrics`
#[derive(Args, Clone, Debug)]
pub struct Metrics {
    /// Only metrics whose name contains one of these
    #[arg(value_name = "NAME")]
    names: Vec<String>,
    /// Where the agent answers Prometheus
    #[arg(long, value_name = "URL", env = "CULVERT_METRICS_URL", default_value = "http://127.0.0.1:15020")]
    address: Address,
    #[command(flatten)]
    shown: Shown,
}

/// `culvert log`
#[derive(Args, Clone, Debug)]
pub struct Log {
    /// Where the agent answers operators (its --admin-address)
    #[arg(long, value_name = "URL", env = "CULVERT_ADDRESS", default_value = "http://127.0.0.1:15000")]
    address: Address,
    /// Another level: error, warn, info, debug or trace, or per module as in info,culvert::tunnel=debug
    #[arg(long, value_name = "FILTER")]
    level: Option<String>,
}

/// `culvert ready`
#[derive(Args, Clone, Debug)]
pub struct Ready {
    /// Where the agent answers operators (its --admin-address)
    #[arg(long, value_name = "URL", env = "CULVERT_ADDRESS", default_value = "http://127.0.0.1:15000")]
    address: Address,
    /// The agent's process; without it, the agent in the cgroup of this command: in the same container, or unit of systemd
    #[arg(long, value_name = "PID")]
    pid: Option<u32>,
    /// Asks again until it is ready, for so long
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    wait: Option<Duration>,
}

impl Look {
    /// Asks, and shows the answer on standard output.
    ///
    /// # Errors
    /// One line, with the remedy where there is one.
    pub fn run(self) -> anyhow::Result<()> {
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().build().context("build the runtime")?;
        runtime.block_on(async {
            match &self {
                Self::Workloads(common) => common.dumped(rows::workloads).await,
                Self::Services(common) => common.dumped(rows::services).await,
                Self::Policies(common) => common.dumped(rows::policies).await,
                Self::Certificates(common) => common.dumped(rows::certificates).await,
                Self::Connections(of) => of.common.shown.show(async || of.sheet().await).await,
                Self::Why(why) => why.run().await,
                Self::Verdicts(common) => common.dumped(rows::verdicts).await,
                Self::Report(Report::Strict(strict)) => strict.run().await,
                Self::Capture(Capture::Proof(common)) => common.prove().await,
                Self::Metrics(of) => of.shown.show(async || of.sheet().await).await,
                Self::Log(log) => log.run().await,
                Self::Ready(ready) => ready.run().await,
            }
        })
    }
}

impl Common {
    async fn dumped(&self, make: fn(&Dump, &Filter) -> Sheet) -> anyhow::Result<()> {
        let filter = self.filter();
        self.shown
            .show(async || {
                let answer = client::ask(&self.address, Method::GET, "/config_dump").await?;
                let dump: Dump = serde_json::from_slice(&answer).with_context(|| foreign(&self.address))?;
                Ok(make(&dump, &filter))
            })
            .await
    }

    async fn prove(&self) -> anyhow::Result<()> {
        let filter = self.filter();
        let mut last = Proof::default();
        let show = self.shown.show_or(
            async || {
                let answer = client::ask(&self.address, Method::GET, "/capture_proof").await?;
                last = serde_json::from_slice(&answer).with_context(|| foreign(&self.address))?;
                Ok(rows::strays(&last, &filter))
            },
            "every connection is accounted for",
        );
        show.await?;
        for failure in &last.failures {
            eprintln!("culvert: could not look at {failure}");
        }
        let words: Vec<String> = last.accounted.iter().map(|(word, count)| format!("{count} {word}")).collect();
        eprintln!("{} pods, established sockets: {}", last.pods, words.join(", "));
        match (last.strays.len(), last.failures.len()) {
            (0, 0) => Ok(()),
            (strays, failures) => {
                anyhow::bail!("{strays} connections are not the mesh's, {failures} pods could not be looked at")
            }
        }
    }

    fn filter(&self) -> Filter {
        Filter { namespace: self.shown.namespace.clone(), pod: self.pod.clone() }
    }
}

fn foreign(address: &Address) -> String {
    format!(
        "the answer of {address} is not one that this version of culvert reads; is that an agent of the same version?"
    )
}

impl Shown {
    /// Shows what `ask` gives, once or for as long as somebody reads it.
    async fn show(&self, ask: impl AsyncFnMut() -> anyhow::Result<Sheet>) -> anyhow::Result<()> {
        self.show_or(ask, "nothing of that kind").await
    }

    /// The same; `nothing` says what it means that there is no row.
    async fn show_or(&self, mut ask: impl AsyncFnMut() -> anyhow::Result<Sheet>, nothing: &str) -> anyhow::Result<()> {
        let first = ask().await?;
        if !self.watch {
            if first.rows.is_empty() && matches!(self.output, Format::Table | Format::Wide) {
                eprintln!("{nothing}");
                return Ok(());
            }
            print(&first.show(self.output))?;
            return Ok(());
        }
        let mut watch = Watch::new(self.output);
        let mut sheet = Some(first);
        let mut lost = false;
        loop {
            if let Some(sheet) = sheet.take()
                && !print(&watch.next(&sheet))?
            {
                return Ok(());
            }
            tokio::time::sleep(self.interval).await;
            sheet = match ask().await {
                Ok(sheet) => {
                    lost = false;
                    Some(sheet)
                }
                // It may be restarting: what it says then is compared with what it said before.
                Err(error) => {
                    if !std::mem::replace(&mut lost, true) {
                        eprintln!("culvert: {error:#}; asking again until it answers");
                    }
                    None
                }
            };
        }
    }
}

impl Why {
    async fn run(&self) -> anyhow::Result<()> {
        match (&self.client, &self.server) {
            (Some(client), Some(server)) => self.explain(client, server).await,
            _ => self.refusals().await,
        }
    }

    async fn refusals(&self) -> anyhow::Result<()> {
        let (common, filter) = (&self.common, self.common.filter());
        let mut last = None;
        let show = common.shown.show_or(
            async || {
                let answer = client::ask(&common.address, Method::GET, "/refusals").await?;
                let dump: RefusalsDump = serde_json::from_slice(&answer).with_context(|| foreign(&common.address))?;
                let sheet = rows::refusals(&dump, &filter, now_ms());
                last = Some(dump);
                Ok(sheet)
            },
            "nothing of that kind was refused in the last hour",
        );
        show.await?;
        if let Some(dump) = last {
            eprintln!("seen since {} by the agent of {}", dump.since, printable(&dump.node));
            for line in rows::evicted(&dump, now_ms()) {
                eprintln!("culvert: {line}");
            }
        }
        Ok(())
    }

    async fn explain(&self, client: &str, server: &str) -> anyhow::Result<()> {
        let common = &self.common;
        why::client(client).and_then(|_| why::server(server)).map_err(|wrong| anyhow::anyhow!(wrong))?;
        let encoded = |text: &str| text.bytes().map(encoded).collect::<String>();
        let namespace = common.shown.namespace.as_deref().unwrap_or("default");
        let path = format!("/why?from={}&to={}&namespace={}", encoded(client), encoded(server), encoded(namespace));
        let ask = async || {
            let answer = client::ask(&common.address, Method::GET, &path).await?;
            serde_json::from_slice::<Vec<Explanation>>(&answer).with_context(|| foreign(&common.address))
        };
        if !common.shown.watch && matches!(common.shown.output, Format::Table | Format::Wide) {
            let answers = ask().await?;
            let told: Vec<String> = answers.iter().map(|answer| rows::explained(answer, now_ms())).collect();
            return print(&told.join("\n")).map(drop);
        }
        common.shown.show(async || Ok(rows::explanations(&ask().await?))).await
    }
}

impl Strict {
    async fn run(&self) -> anyhow::Result<()> {
        let path = match self.within {
            Some(within) => format!("/strict?within={}", within.as_secs()),
            None => "/strict".to_owned(),
        };
        let filter = Filter { namespace: self.shown.namespace.clone(), pod: None };
        let mut last = None;
        let mut ask = async || {
            let answer = client::ask(&self.address, Method::GET, &path).await?;
            let dump: StrictDump = serde_json::from_slice(&answer).with_context(|| foreign(&self.address))?;
            let sheet = rows::strict(&dump, &filter, now_ms());
            last = Some(dump);
            Ok(sheet)
        };
        if self.manifests {
            ask().await?;
        } else {
            self.shown.show_or(ask, "no workload of this node is in the mesh").await?;
        }
        let Some(dump) = last else { return Ok(()) };
        let manifests = rows::strict_manifests(&dump, &filter);
        let table = matches!(self.shown.output, Format::Table | Format::Wide);
        if !manifests.is_empty() && (table || self.manifests) {
            let head = if self.manifests { "" } else { "\n# For what is ready; --manifests prints nothing else.\n" };
            print(&format!("{head}{manifests}"))?;
        }
        dump.notes.iter().for_each(|note| eprintln!("{}", printable(note)));
        Ok(())
    }
}

impl Connections {
    async fn sheet(&self) -> anyhow::Result<Sheet> {
        let address = &self.common.address;
        let answer = client::ask(address, Method::GET, "/connections").await?;
        let records: Vec<Value> = serde_json::from_slice(&answer).with_context(|| foreign(address))?;
        rows::connections(&records, &self.common.filter(), self.direction.as_deref(), self.raw, now_ms())
            .with_context(|| foreign(address))
    }
}

impl Metrics {
    async fn sheet(&self) -> anyhow::Result<Sheet> {
        let answer = client::ask(&self.address, Method::GET, "/metrics").await?;
        let text = String::from_utf8_lossy(&answer);
        let filter = Filter { namespace: self.shown.namespace.clone(), pod: None };
        Ok(rows::metrics(&text, &self.names, &filter, self.shown.output == Format::Wide))
    }
}

impl Log {
    async fn run(&self) -> anyhow::Result<()> {
        let answer = match &self.level {
            None => client::ask(&self.address, Method::GET, "/logging").await?,
            Some(level) => {
                let encoded: String = level.bytes().map(encoded).collect();
                client::ask(&self.address, Method::POST, &format!("/logging?level={encoded}")).await?
            }
        };
        let level = String::from_utf8_lossy(&answer);
        print(&format!("{}\n", printable(level.trim_end()))).map(drop)
    }
}

impl Ready {
    async fn run(&self) -> anyhow::Result<()> {
        let until = self.wait.map(|wait| Instant::now() + wait);
        loop {
            match self.ask().await {
                Ok(()) => return print("ready\n").map(drop),
                Err(why) if until.is_none_or(|until| Instant::now() >= until) => return Err(why.context("not ready")),
                Err(_) => tokio::time::sleep(ASK_AGAIN).await,
            }
        }
    }

    /// The node's ports are answered by the agent that serves: an answer of another one than is meant says nothing about
    /// this one, which may be waiting for its turn.
    async fn ask(&self) -> anyhow::Result<()> {
        let (proc_root, address) = (Path::new("/proc"), &self.address);
        let (pid, meant) = match self.pid {
            Some(pid) => (pid, Process::of(proc_root, &pid.to_string()).with_context(|| format!("process {pid}"))?),
            None => Process::beside(proc_root)?,
        };
        let asked = tokio::time::timeout(READY_PATIENCE, client::answer(address, Method::GET, "/readyz")).await;
        let answer = asked.with_context(|| format!("{address} gave no answer within {READY_PATIENCE:?}"))??;
        let from = answer.headers().get(process::HEADER).with_context(|| foreign(address))?;
        anyhow::ensure!(
            from.as_bytes() == meant.to_string().as_bytes(),
            "the agent that answers at {address} is another one than process {pid}, which does not serve"
        );
        let said = String::from_utf8_lossy(answer.body());
        let missing: Vec<&str> = said.lines().filter_map(|line| line.strip_prefix("[-] waiting for: ")).collect();
        anyhow::ensure!(answer.status() == StatusCode::OK, "{}", printable(&missing.join(", ")));
        Ok(())
    }
}

/// Milliseconds since the epoch.
fn now_ms() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
}

/// A byte of a value in a query.
fn encoded(byte: u8) -> String {
    match byte {
        b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b',' | b':' => char::from(byte).to_string(),
        other => format!("%{other:02X}"),
    }
}
