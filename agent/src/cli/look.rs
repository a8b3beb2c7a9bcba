//! The commands that look at a running agent, or change its log level.

use std::time::Duration;

use anyhow::Context as _;
use clap::{Args, Subcommand};
use http::Method;
use serde_json::Value;

use super::{
    client::{self, Address},
    print,
    rows::{self, Filter},
    sheet::{Format, Sheet, Watch},
};
use crate::{
    admin::{dump::Dump, printable},
    config::parse_duration,
    telemetry::open::Proof,
};

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
    /// Whether the connections of the node's pods are the mesh's
    #[command(subcommand)]
    Capture(Capture),
    /// Metrics of the agent, by name
    Metrics(Metrics),
    /// Shows the agent's log level, or changes it at once
    Log(Log),
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
                Self::Capture(Capture::Proof(common)) => common.prove().await,
                Self::Metrics(of) => of.shown.show(async || of.sheet().await).await,
                Self::Log(log) => log.run().await,
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

impl Connections {
    async fn sheet(&self) -> anyhow::Result<Sheet> {
        let address = &self.common.address;
        let answer = client::ask(address, Method::GET, "/connections").await?;
        let records: Vec<Value> = serde_json::from_slice(&answer).with_context(|| foreign(address))?;
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        let now_ms = u64::try_from(now.as_millis()).unwrap_or(u64::MAX);
        rows::connections(&records, &self.common.filter(), self.direction.as_deref(), self.raw, now_ms)
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

/// A byte of a value in a query.
fn encoded(byte: u8) -> String {
    match byte {
        b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b',' | b':' => char::from(byte).to_string(),
        other => format!("%{other:02X}"),
    }
}
