//! The commands that judge connections by files of manifests: `culvert decide` and `culvert diff`. No agent, no kernel and
//! no rights are needed.
//!
//! They decode, compile and decide as the agent does ([`crate::source`], [`crate::policy`]).

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, BufRead, BufReader, BufWriter, Write},
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
};

use anyhow::Context as _;
use clap::{Args, Subcommand, ValueEnum};
use culvert_common::Reason;
use serde::{Deserialize, Serialize};

use super::{
    manifests::{Files, Of},
    sheet::{self, Column, Row, Sheet},
};
use crate::{
    admin::{printable, printable_json},
    model::{Cluster, Labels, SpiffeId, TrustDomain},
    policy::{self, Client, Connection, DecidedBy, Occupant, Options, Servers, Snapshot, Verdict, Workload},
    source::View,
};

/// A question about connections.
#[derive(Debug, Subcommand)]
pub enum Judge {
    /// Judges connections by manifests: allowed or denied, why, and by which rule
    Decide(Decide),
    /// Says which connections two sets of manifests judge differently, and by which rules
    Diff(Diff),
}

/// `culvert decide`
#[derive(Args, Clone, Debug)]
pub struct Decide {
    #[command(flatten)]
    manifests: Files,
    #[command(flatten)]
    of: Of,
    /// Connections as JSON lines, or an agent's access log in JSON; - for standard input
    #[arg(long, value_name = "FILE", required_unless_present = "dest_port", conflicts_with = "dest_port")]
    connections: Option<PathBuf>,
    #[command(flatten)]
    one: One,
    /// How to show it
    #[arg(short, long, value_enum, value_name = "FORMAT", default_value = "table")]
    output: Format,
}

/// `culvert diff`
#[derive(Args, Clone, Debug)]
pub struct Diff {
    /// The manifests before: a file or a folder
    old: PathBuf,
    /// The manifests after: a file or a folder
    new: PathBuf,
    #[command(flatten)]
    of: Of,
    /// Connections as JSON lines, or an agent's access log in JSON; - for standard input
    #[arg(long, value_name = "FILE")]
    connections: PathBuf,
    /// How to show it
    #[arg(short, long, value_enum, value_name = "FORMAT", default_value = "table")]
    output: Format,
}

/// One connection in flags.
#[derive(Args, Clone, Debug)]
struct One {
    /// Namespace of the client
    #[arg(long, value_name = "NAMESPACE", requires = "dest_port")]
    source_namespace: Option<String>,
    /// Service account of the client; default where only its namespace is given
    #[arg(long, value_name = "NAME", requires = "dest_port")]
    source_service_account: Option<String>,
    /// Address that the server sees
    #[arg(long, value_name = "IP", requires = "dest_port")]
    source_ip: Option<IpAddr>,
    /// Trust domain of the client; the mesh's where not given
    #[arg(long, value_name = "DOMAIN", requires = "dest_port")]
    source_trust_domain: Option<String>,
    /// Namespace of the server
    #[arg(long, value_name = "NAMESPACE", requires = "dest_port")]
    dest_namespace: Option<String>,
    /// Labels of the server, as key=value, separated by commas
    #[arg(long, value_name = "LABELS", value_delimiter = ',', requires = "dest_port")]
    dest_labels: Vec<String>,
    /// Address of the server's pod
    #[arg(long, value_name = "IP", requires = "dest_port")]
    dest_ip: Option<IpAddr>,
    /// The server pod's port
    #[arg(long, value_name = "PORT")]
    dest_port: Option<u16>,
    /// The server is not in the mesh
    #[arg(long, requires = "dest_port")]
    dest_not_enrolled: bool,
    /// The connection arrives by a tunnel of the mesh
    #[arg(long, requires = "dest_port")]
    tls: bool,
    /// It is a probe of the server's kubelet
    #[arg(long, requires = "dest_port")]
    probe: bool,
    /// It is the server's own pod that connects
    #[arg(long, requires = "dest_port")]
    same_pod: bool,
}

/// How answers are shown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum Format {
    /// For people
    #[default]
    Table,
    /// One JSON object in each line
    Json,
}

impl Judge {
    /// Answers on standard output. The status is 1 where a connection could not be understood, and 0 otherwise.
    ///
    /// # Errors
    /// One line, with the remedy: there is no answer.
    pub fn run(self) -> anyhow::Result<ExitCode> {
        match self {
            Self::Decide(decide) => decide.run(),
            Self::Diff(diff) => diff.run(),
        }
    }
}

// ---- Connections, as they are written.

/// A connection of the input.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct Written {
    #[serde(default)]
    source: Source,
    dest: Dest,
    #[serde(default)]
    tls: bool,
    #[serde(default)]
    probe: bool,
    #[serde(default)]
    same_pod: bool,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct Source {
    namespace: Option<String>,
    service_account: Option<String>,
    /// No policy asks for it.
    #[serde(rename = "labels")]
    _labels: Option<serde::de::IgnoredAny>,
    ip: Option<IpAddr>,
    trust_domain: Option<String>,
    enrolled: Option<bool>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct Dest {
    namespace: Option<String>,
    labels: Option<Labels>,
    ip: Option<IpAddr>,
    port: u16,
    enrolled: Option<bool>,
}

/// What is needed of a line of the access log (specification §16).
#[derive(Debug, Deserialize)]
struct Logged {
    #[serde(rename = "src.addr")]
    src: SocketAddr,
    #[serde(rename = "src.identity")]
    identity: Option<String>,
    #[serde(rename = "dst.addr")]
    dst: SocketAddr,
    #[serde(rename = "dst.hbone_addr")]
    hbone: Option<SocketAddr>,
    #[serde(rename = "dst.namespace")]
    namespace: Option<String>,
    #[serde(rename = "dst.workload")]
    workload: Option<String>,
    #[serde(default)]
    direction: Told,
    reason: Option<String>,
}

/// Who has told a line of the access log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Told {
    /// The server's side.
    #[default]
    Inbound,
    /// The client's side.
    Outbound,
}

/// A line of an agent's log that is none of the access log.
#[derive(Debug, Deserialize)]
struct Said {
    #[serde(rename = "level")]
    _level: String,
    #[serde(rename = "target")]
    _target: String,
}

/// Either.
enum Recorded {
    Written(Written),
    Logged(Logged),
}

impl Recorded {
    /// `None` for what an agent's log says besides.
    fn parse(line: &str) -> Result<Option<Self>, String> {
        let explain = |error: serde_json::Error| {
            let text = error.to_string();
            match text.rsplit_once(" at line 1 column ") {
                Some((what, column)) => format!("column {column}: {what}"),
                None => text,
            }
        };
        if line.contains("\"dst.addr\"") {
            return serde_json::from_str(line).map(|logged| Some(Self::Logged(logged))).map_err(explain);
        }
        match serde_json::from_str(line) {
            Ok(written) => Ok(Some(Self::Written(written))),
            Err(_) if serde_json::from_str::<Said>(line).is_ok() => Ok(None),
            Err(error) => Err(explain(error)),
        }
    }
}

impl One {
    fn written(&self) -> anyhow::Result<Option<Written>> {
        let Some(port) = self.dest_port else { return Ok(None) };
        let label = |text: &String| {
            let (key, value) =
                text.split_once('=').with_context(|| format!("--dest-labels: {text:?} is not key=value"))?;
            anyhow::Ok((key.to_owned(), value.to_owned()))
        };
        let labels: Labels = self.dest_labels.iter().map(label).collect::<anyhow::Result<_>>()?;
        Ok(Some(Written {
            source: Source {
                namespace: self.source_namespace.clone(),
                service_account: self.source_service_account.clone(),
                _labels: None,
                ip: self.source_ip,
                trust_domain: self.source_trust_domain.clone(),
                enrolled: None,
            },
            dest: Dest {
                namespace: self.dest_namespace.clone(),
                labels: (!labels.is_empty()).then_some(labels),
                ip: self.dest_ip,
                port,
                enrolled: Some(!self.dest_not_enrolled),
            },
            tls: self.tls,
            probe: self.probe,
            same_pod: self.same_pod,
        }))
    }
}

// ---- Manifests, and what they say of a connection.

/// Compiled manifests.
struct Mesh {
    cluster: Arc<Cluster>,
    options: Options,
    snapshot: Snapshot,
    /// Pods by namespace and name of their workload.
    by_workload: BTreeMap<(Arc<str>, Arc<str>), Arc<Workload>>,
}

impl Mesh {
    /// Says on standard error what is wrong with them.
    fn of(view: View, options: Options) -> Self {
        for problem in &view.problems {
            eprintln!("culvert: {}", printable(&problem.to_string()));
        }
        let snapshot = policy::compile(&view.cluster, &options, None);
        let by_workload = snapshot
            .workloads
            .values()
            .map(|known| ((known.object.namespace.clone(), known.workload_name.clone()), known.clone()))
            .collect();
        Self { cluster: view.cluster, options, snapshot, by_workload }
    }

    fn pod(&self, ip: IpAddr) -> Option<&Arc<Workload>> {
        match self.snapshot.workload_by_ip(ip)? {
            Occupant::One(pod) => Some(pod),
            Occupant::Ambiguous => None,
        }
    }
}

/// Judges one connection after the other by the same manifests.
struct Judging<'a> {
    mesh: &'a Mesh,
    servers: Servers<'a>,
}

/// A verdict, as it is shown.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Answer {
    decision: &'static str,
    reason: &'static str,
    /// `namespace/name` of the object that decided.
    #[serde(skip_serializing_if = "Option::is_none")]
    policy: Option<String>,
    /// Place of the rule in an AuthorizationPolicy, from 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    rule: Option<usize>,
    warnings: Vec<String>,
}

/// Where a connection goes from and to, for people.
struct Ends {
    from: String,
    to: String,
}

impl<'a> Judging<'a> {
    fn new(mesh: &'a Mesh) -> Self {
        Self { mesh, servers: Servers::of(&mesh.cluster, &mesh.options, &mesh.snapshot) }
    }

    fn judge(&mut self, recorded: &Recorded) -> Result<Answer, String> {
        match recorded {
            Recorded::Written(written) => self.written(written),
            Recorded::Logged(logged) => self.logged(logged),
        }
    }

    fn written(&mut self, of: &Written) -> Result<Answer, String> {
        if of.dest.port == 0 {
            return Err("dest.port: must be a port from 1 to 65535".to_owned());
        }
        let known = of.dest.ip.and_then(|ip| self.mesh.pod(ip));
        let known = known.filter(|pod| of.dest.namespace.as_ref().is_none_or(|own| **own == *pod.object.namespace));
        let Some(namespace) = of.dest.namespace.as_deref().or(known.map(|pod| &*pod.object.namespace)) else {
            return Err(
                "dest.namespace: is missing, and dest.ip is not the address of a pod of the manifests".to_owned()
            );
        };
        let labels = of.dest.labels.as_ref().or(known.map(|pod| &*pod.labels));
        let none = Labels::new();
        let protection = self.servers.protection(namespace, labels.unwrap_or(&none));
        let mut notes = Vec::new();
        let identity = if of.tls { Some(self.identity(&of.source)?) } else { None };
        if of.tls && of.source.enrolled == Some(false) {
            notes.push("a client that is not enrolled has no tunnel: judged as if it had".to_owned());
        }
        if of.source.ip.is_none() && protection.authorization.asks_for_source_ip() {
            notes.push("source.ip is not given, and policies ask for it: it matches no address block".to_owned());
        }
        if of.dest.ip.is_none() && protection.authorization.asks_for_destination_ip() {
            notes.push("dest.ip is not given, and policies ask for it: it matches no address block".to_owned());
        }
        let client = match (of.same_pod, of.probe, &identity) {
            (true, _, _) => Client::SamePod,
            (false, true, _) => Client::Probe,
            (false, false, Some(identity)) => Client::Tunnel(identity),
            (false, false, None) => Client::Plain,
        };
        let connection = Connection {
            server: protection.server(of.dest.enrolled.unwrap_or(true)),
            client,
            source_ip: of.source.ip,
            destination_ip: of.dest.ip,
            port: of.dest.port,
        };
        Ok(answer(&policy::decide(&self.mesh.snapshot, &connection), notes))
    }

    fn identity(&self, of: &Source) -> Result<SpiffeId, String> {
        let known = of.ip.and_then(|ip| self.mesh.pod(ip));
        let namespace = match (&of.namespace, known) {
            (Some(namespace), _) => namespace.as_str().into(),
            (None, Some(pod)) => pod.object.namespace.clone(),
            (None, None) => {
                return Err("source.namespace: is missing; who comes by a tunnel has an identity".to_owned());
            }
        };
        let same = known.filter(|pod| pod.object.namespace == namespace);
        let service_account = match (&of.service_account, same) {
            (Some(account), _) if !account.is_empty() => account.as_str().into(),
            (None, Some(pod)) => pod.identity.service_account.clone(),
            (Some(_) | None, _) => "default".into(),
        };
        let trust_domain = match &of.trust_domain {
            Some(domain) => TrustDomain::new(domain).map_err(|what| format!("source.trustDomain: {what}"))?,
            None => self.mesh.snapshot.mesh.trust_domain.clone(),
        };
        Ok(SpiffeId { trust_domain, namespace, service_account })
    }

    fn logged(&mut self, of: &Logged) -> Result<Answer, String> {
        let target = of.hbone.unwrap_or(of.dst);
        let of_workload = |pod: &&Arc<Workload>| {
            of.namespace.as_ref().is_none_or(|namespace| **namespace == *pod.object.namespace)
                && of.workload.as_ref().is_none_or(|name| **name == *pod.workload_name)
        };
        let pod = self.mesh.pod(target.ip()).filter(of_workload);
        let pod = pod.or_else(|| {
            let key = (of.namespace.as_deref()?.into(), of.workload.as_deref()?.into());
            self.mesh.by_workload.get(&key)
        });
        let Some(pod) = pod else {
            // §8: a server that is no pod is in no mesh, and enforces nothing.
            let nobodys = of.workload.is_none() && self.mesh.snapshot.workload_by_ip(target.ip()).is_none();
            if of.direction == Told::Outbound && nobodys {
                return Ok(Answer {
                    decision: "allow",
                    reason: Reason::ServerNotEnrolled.as_str(),
                    policy: None,
                    rule: None,
                    warnings: Vec::new(),
                });
            }
            return Err(format!(
                "the manifests have no pod with the address {}, nor one of that workload",
                target.ip()
            ));
        };
        let identity: Option<SpiffeId> = of.identity.as_deref().map(str::parse).transpose()?;
        let client = match (&identity, of.reason.as_deref()) {
            (_, Some("probe")) => Client::Probe,
            (Some(identity), _) => Client::Tunnel(identity),
            (None, _) => Client::Plain,
        };
        let connection = Connection {
            server: pod.server(),
            client,
            source_ip: Some(of.src.ip()),
            destination_ip: Some(target.ip()),
            port: target.port(),
        };
        Ok(answer(&policy::decide(&self.mesh.snapshot, &connection), Vec::new()))
    }
}

fn answer(verdict: &Verdict, notes: Vec<String>) -> Answer {
    let (policy, rule) = match &verdict.decided_by {
        Some(DecidedBy::PeerAuthentication(object)) => (Some(object.to_string()), None),
        Some(DecidedBy::AuthorizationPolicy(rule)) => (Some(rule.policy.to_string()), Some(rule.rule)),
        None => (None, None),
    };
    let mut warnings = notes;
    warnings.extend(verdict.warnings.iter().map(ToString::to_string));
    warnings.extend(verdict.dry_run.as_ref().map(|dry| format!("with policies in dry-run enforced: {dry} [AP.6]")));
    warnings.extend(verdict.audit.as_ref().map(|rule| format!("{rule}: AUDIT matches [AP.5]")));
    let decision = if verdict.allowed { "allow" } else { "deny" };
    Answer { decision, reason: verdict.reason.as_str(), policy, rule, warnings }
}

impl Answer {
    fn by(&self) -> String {
        match (&self.policy, self.rule) {
            (Some(policy), Some(rule)) => format!("{policy}#{rule}"),
            (Some(policy), None) => policy.clone(),
            (None, _) => String::new(),
        }
    }
}

impl Ends {
    fn of(recorded: &Recorded) -> Self {
        let join = |parts: [Option<&str>; 2]| parts.into_iter().flatten().collect::<Vec<_>>().join("/");
        match recorded {
            Recorded::Written(of) => {
                let address = |ip: Option<IpAddr>| ip.map_or_else(String::new, |ip| ip.to_string());
                let named = |name: String, ip| if name.is_empty() { address(ip) } else { name };
                let from = join([of.source.namespace.as_deref(), of.source.service_account.as_deref()]);
                let to = named(of.dest.namespace.clone().unwrap_or_default(), of.dest.ip);
                Self { from: named(from, of.source.ip), to: format!("{to}:{}", of.dest.port) }
            }
            Recorded::Logged(of) => {
                let from = of.identity.as_deref().map_or_else(|| of.src.ip().to_string(), str::to_owned);
                let to = join([of.namespace.as_deref(), of.workload.as_deref()]);
                Self { from, to: format!("{to}:{}", of.hbone.unwrap_or(of.dst).port()) }
            }
        }
    }
}

// ---- The commands.

/// What a bad line gives in its place.
#[derive(Serialize)]
struct Bad<'a> {
    error: &'a str,
    line: usize,
}

/// Calls `each` with every line that is a connection or should be one, its number from 1 and what it says. False if whoever
/// reads the answers has gone.
fn lines(
    path: &Path,
    mut each: impl FnMut(usize, &str, Result<Recorded, String>) -> anyhow::Result<bool>,
) -> anyhow::Result<()> {
    let shown = path.display();
    let mut input: Box<dyn BufRead> = match path == Path::new("-") {
        true => Box::new(io::stdin().lock()),
        false => {
            Box::new(BufReader::with_capacity(1 << 16, File::open(path).with_context(|| format!("read {shown}"))?))
        }
    };
    let (mut bytes, mut number) = (Vec::new(), 0);
    loop {
        bytes.clear();
        if input.read_until(b'\n', &mut bytes).with_context(|| format!("read {shown}"))? == 0 {
            return Ok(());
        }
        number += 1;
        let text = std::str::from_utf8(&bytes).map(str::trim);
        let recorded = match text {
            Ok("") => continue,
            Ok(text) => match Recorded::parse(text) {
                Ok(None) => continue,
                Ok(Some(recorded)) => Ok(recorded),
                Err(error) => Err(error),
            },
            Err(_) => Err("is not UTF-8 text".to_owned()),
        };
        if !each(number, text.unwrap_or_default(), recorded)? {
            return Ok(());
        }
    }
}

/// Standard output, for many lines.
struct Out(BufWriter<io::StdoutLock<'static>>);

impl Out {
    fn new() -> Self {
        Self(BufWriter::with_capacity(1 << 16, io::stdout().lock()))
    }

    /// False if nobody reads any more.
    fn line(&mut self, value: &impl Serialize) -> anyhow::Result<bool> {
        let mut text = serde_json::to_string(value).context("write an answer as JSON")?;
        text.push('\n');
        Self::went(self.0.write_all(printable_json(&text).as_bytes()))
    }

    fn end(mut self) -> anyhow::Result<bool> {
        Self::went(self.0.flush())
    }

    fn went(result: io::Result<()>) -> anyhow::Result<bool> {
        match result {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(false),
            Err(error) => Err(error).context("write to standard output"),
        }
    }
}

const DECISIONS: &[Column] = &[
    Column::new("LINE"),
    Column::new("FROM"),
    Column::new("TO"),
    Column::new("DECISION"),
    Column::new("REASON"),
    Column::new("POLICY"),
    Column::new("WARNINGS"),
];

const DIFFERENCES: &[Column] = &[
    Column::new("LINE"),
    Column::new("FROM"),
    Column::new("TO"),
    Column::new("OLD"),
    Column::new("BY"),
    Column::new("NEW"),
    Column::new("BY"),
];

fn row(number: usize, cells: Vec<String>) -> Row {
    Row { key: number.to_string(), cells, object: serde_json::Value::Null }
}

fn bad_row(number: usize, columns: usize, error: &str) -> Row {
    let mut cells = vec![number.to_string(), "error:".to_owned(), error.to_owned()];
    cells.resize(columns, String::new());
    row(number, cells)
}

fn table(columns: &'static [Column], rows: Vec<Row>) -> anyhow::Result<()> {
    super::print(&Sheet { columns, rows }.show(sheet::Format::Table)).map(drop)
}

fn status(bad: bool) -> ExitCode {
    if bad { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

impl Decide {
    fn run(self) -> anyhow::Result<ExitCode> {
        let one = self.one.written()?;
        anyhow::ensure!(
            !(self.manifests.has_standard_input() && self.connections.as_deref() == Some(Path::new("-"))),
            "both the manifests and the connections are standard input (-); name a file for one of them"
        );
        let mesh = Mesh::of(self.manifests.view(&self.of)?, self.of.options());
        let mut judging = Judging::new(&mesh);
        let (mut out, mut rows, mut bad) = (Out::new(), Vec::new(), false);
        let mut each = |number: usize, _: &str, recorded: Result<Recorded, String>| {
            let answer = recorded.and_then(|recorded| Ok((judging.judge(&recorded)?, recorded)));
            bad |= answer.is_err();
            let answer = answer.map_err(|error| printable(&error).into_owned());
            match (self.output, answer) {
                (Format::Json, Ok((answer, _))) => return out.line(&answer),
                (Format::Json, Err(error)) => return out.line(&Bad { error: &error, line: number }),
                (Format::Table, Ok((answer, recorded))) => {
                    let (ends, by) = (Ends::of(&recorded), answer.by());
                    let (decision, reason) = (answer.decision.to_owned(), answer.reason.to_owned());
                    let cells =
                        vec![number.to_string(), ends.from, ends.to, decision, reason, by, answer.warnings.join("; ")];
                    rows.push(row(number, cells));
                }
                (Format::Table, Err(error)) => rows.push(bad_row(number, DECISIONS.len(), &error)),
            }
            Ok(true)
        };
        match (one, &self.connections) {
            (Some(written), _) => drop(each(1, "", Ok(Recorded::Written(written)))?),
            (None, Some(path)) => lines(path, each)?,
            (None, None) => {
                anyhow::bail!("no connection: give --connections FILE, or --dest-port and what else is known")
            }
        }
        match self.output {
            Format::Json => drop(out.end()?),
            Format::Table => {
                // Let go of standard output before the table is written.
                drop(out);
                table(DECISIONS, rows)?;
            }
        }
        Ok(status(bad))
    }
}

/// A connection that two sets of manifests judge differently.
#[derive(Serialize)]
struct Difference<'a> {
    line: usize,
    /// As it was given.
    connection: serde_json::Value,
    old: &'a Answer,
    new: &'a Answer,
}

impl Diff {
    fn run(self) -> anyhow::Result<ExitCode> {
        let read = |path| anyhow::Ok(Mesh::of(self.of.view(&[path])?, self.of.options()));
        let (old, new) = (read(self.old)?, read(self.new)?);
        let (mut before, mut after) = (Judging::new(&old), Judging::new(&new));
        let (mut out, mut rows, mut bad) = (Out::new(), Vec::new(), false);
        lines(&self.connections, |number, text, recorded| {
            let answers = recorded.and_then(|recorded| {
                let old = before.judge(&recorded).map_err(|error| format!("by the old manifests: {error}"))?;
                let new = after.judge(&recorded).map_err(|error| format!("by the new manifests: {error}"))?;
                Ok((old, new, recorded))
            });
            let (old, new, recorded) = match answers {
                Ok(answers) => answers,
                Err(error) => {
                    bad = true;
                    let error = printable(&error);
                    return match self.output {
                        Format::Json => out.line(&Bad { error: &error, line: number }),
                        Format::Table => {
                            rows.push(bad_row(number, DIFFERENCES.len(), &error));
                            Ok(true)
                        }
                    };
                }
            };
            if old.decision == new.decision {
                return Ok(true);
            }
            match self.output {
                Format::Json => {
                    let connection = serde_json::from_str(text).context("a line that was read")?;
                    out.line(&Difference { line: number, connection, old: &old, new: &new })
                }
                Format::Table => {
                    let ends = Ends::of(&recorded);
                    let said = |answer: &Answer| format!("{} {}", answer.decision, answer.reason);
                    let cells =
                        vec![number.to_string(), ends.from, ends.to, said(&old), old.by(), said(&new), new.by()];
                    rows.push(row(number, cells));
                    Ok(true)
                }
            }
        })?;
        match self.output {
            Format::Json => drop(out.end()?),
            Format::Table => {
                drop(out);
                table(DIFFERENCES, rows)?;
            }
        }
        Ok(status(bad))
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::source::review::Manifests;

    #[derive(Parser)]
    struct Flags {
        #[command(flatten)]
        of: Of,
    }

    /// A line is a connection with one answer, or is refused with one line that says why.
    #[test]
    fn fuzzed_connections_are_judged_or_refused() {
        const MANIFESTS: &str = "
apiVersion: v1
kind: Namespace
metadata: {name: default, labels: {istio.io/dataplane-mode: ambient}}
---
apiVersion: v1
kind: Pod
metadata: {name: productpage, namespace: default, uid: p, labels: {app: productpage}}
spec: {nodeName: node-b, containers: [{name: c}]}
status: {phase: Running, podIP: 10.244.2.10, podIPs: [{ip: 10.244.2.10}]}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: from-test, namespace: default}
spec:
  selector: {matchLabels: {app: productpage}}
  rules: [{from: [{source: {namespaces: [test], notIpBlocks: [10.0.0.0/9]}}], to: [{operation: {ports: ['9080']}}]}]
";
        let of = Flags::parse_from(["decide"]).of;
        let mesh = Mesh::of(Manifests::of("manifests.yaml", MANIFESTS).view("istio-system"), of.options());
        assert_eq!(mesh.snapshot.workloads.len(), 1, "the manifests are valid");
        let judging = std::cell::RefCell::new(Judging::new(&mesh));
        crate::fuzz::run("connections", |bytes| {
            for line in bytes.split(|byte| *byte == b'\n').filter_map(|line| std::str::from_utf8(line).ok()) {
                let judge = |recorded| judging.borrow_mut().judge(&recorded);
                match Recorded::parse(line).and_then(|recorded| recorded.map(judge).transpose()) {
                    Ok(None) => {}
                    Ok(Some(answer)) => {
                        assert!(matches!(answer.decision, "allow" | "deny") && !answer.reason.is_empty())
                    }
                    // It may repeat what the line says, and is shown so.
                    Err(error) => assert!(!error.is_empty() && !printable(&error).contains('\n'), "{error:?}"),
                }
            }
        });
    }
}
