//! `run`: the user's scenario, as a table of expected against observed: on a sandbox of two nodes, or on a cluster (`cluster`).

mod cluster;

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use culvert_tests::interrupt;
use culvert_tests::sandbox::{MeshPlan, Node, Sandbox, Source, built, place_of};
use culvert_tests::tour::{self, Outcome, Row, Stage};

use crate::{build, say, setup};

/// The sandbox that `run` and `shell` mean if they are not told another.
const DEFAULT_NAME: &str = "run";

/// Arguments of `run`.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// End after the table, with status 0 if all is as expected
    #[arg(long)]
    once: bool,
    /// Name of the sandbox, or of the cluster; two at once need two names
    #[arg(long, default_value = DEFAULT_NAME)]
    name: String,
    /// What the nodes are
    #[arg(long, value_enum, default_value_t = Nodes::Sandbox)]
    cluster: Nodes,
    /// How many nodes a cluster has besides the one with its control plane
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=8))]
    workers: u8,
    /// Where agents have the cluster's objects from
    #[arg(long, value_enum, default_value_t = ObjectsFrom::Folder)]
    source: ObjectsFrom,
}

/// What the nodes are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Nodes {
    /// Network namespaces and cgroups: nothing of Kubernetes but its API
    Sandbox,
    /// A cluster that kind makes: real kubelets, containerd, kube-proxy
    Kind,
}

/// Where agents have the cluster's objects from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum ObjectsFrom {
    /// A folder of manifests
    Folder,
    /// A real API server, on node a; kubectl works against it
    Api,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    match arguments.cluster {
        Nodes::Sandbox => sandbox(arguments),
        Nodes::Kind => cluster::run(arguments),
    }
}

fn sandbox(arguments: &Arguments) -> Result<()> {
    let ready = setup::run(setup::For::Run)?;
    let source = match arguments.source {
        ObjectsFrom::Folder => {
            build::run(&ready)?;
            Source::Folder
        }
        ObjectsFrom::Api => {
            // Both at once, where neither is built yet.
            let api = setup::kubernetes(setup::Wanted::ApiServer)?;
            build::run(&ready)?;
            api.finish()?;
            Source::Api
        }
    };
    let api = if source == Source::Api { ", and an API server on node a" } else { "" };
    let step = say::step(&format!("build two nodes: network namespaces, cgroups, pods, a kubelet each{api}"));
    let mut sandbox = Sandbox::build(tour::plan(&arguments.name).source(source))?;
    step.done();
    let result = play(&mut sandbox, arguments);
    let step = say::step("take the sandbox down");
    sandbox.take_down()?;
    step.done();
    result
}

fn play(sandbox: &mut Sandbox, arguments: &Arguments) -> Result<()> {
    let step = say::step("start the CA and an agent per node, and wait until they are ready");
    let mut mesh = MeshPlan::new(built("culvert")?);
    mesh.cert_ttl = Some(tour::CERT_TTL.to_owned());
    sandbox.start_mesh(&mesh)?;
    step.done();
    println!(
        "\nProductpage (namespace default, node b, in the mesh) is called by Nginx (namespace test, node a, in the mesh) and\n\
         Legacy-app (namespace test, node a, out of the mesh) while its PeerAuthentication changes. Observed are the HTTP\n\
         result that the client got, the identity that the access log of the server's agent names (spiffe://cluster.local/…),\n\
         and whether the request was found, readable, in a recording of everything that crossed between the nodes.\n"
    );
    show(
        sandbox,
        arguments.once,
        |sandbox| try_next(sandbox, &arguments.name),
        |sandbox| {
            Node::ALL
                .into_iter()
                .try_for_each(|node| sandbox.expect_running(&culvert_tests::sandbox::agent_process(node)))
        },
    )
}

/// Plays the scenario and shows its table; unless it is for `once`, says what to try next and stays until Ctrl-C, or until what
/// `alive` looks at has ended.
fn show<S: Stage>(
    stage: &mut S,
    once: bool,
    try_next: impl Fn(&S) -> Result<String>,
    mut alive: impl FnMut(&mut S) -> Result<()>,
) -> Result<()> {
    let mut table = Table::default();
    let rows = tour::play(stage, |row| table.print(row))?;
    let wrong = rows.iter().filter(|r| !r.ok()).count();
    println!("\nscenario: {} as expected, {wrong} not", rows.len() - wrong);
    if !once {
        tour::leave_policy_to_edit(stage)?;
        println!("\n{}", try_next(stage)?);
        while !interrupt::requested() {
            alive(stage)?;
            thread::sleep(Duration::from_millis(200));
        }
        println!();
    }
    ensure!(wrong == 0, "{wrong} of {} rows are not as expected", rows.len());
    Ok(())
}

/// Three things to try; the namespace is STRICT at this moment.
fn try_next(sandbox: &Sandbox, name: &str) -> Result<String> {
    let page = sandbox.pod("default/productpage")?;
    let map = shortest_map(&sandbox.pin_dir(Node::B));
    let named = if name == DEFAULT_NAME { String::new() } else { format!("--name {name} ") };
    let edit = match sandbox.manifests().api() {
        None => format!("$EDITOR {}/{}", sandbox.manifests().path().display(), tour::POLICY_FILE),
        Some(_) => format!("{} edit peerauthentication -n default namespace", sandbox.kubectl().display()),
    };
    Ok(format!(
        "The sandbox stays up until Ctrl-C; default is STRICT now. In another terminal:\n  \
         cargo xtask shell {named}nginx            a shell in a pod; there: culvert-pod http-get --to {}:9080 (also from legacy-app)\n  \
         {edit}    change STRICT to PERMISSIVE, call again from legacy-app\n  \
         bpftool map dump pinned {}    what the kernel of node b decides by",
        page.v4,
        map.map_or_else(|| format!("{}/…", sandbox.pin_dir(Node::B).display()), |m| m.display().to_string()),
    ))
}

/// A pinned map of an agent: the one of pods if there is one of that name.
fn shortest_map(dir: &Path) -> Option<PathBuf> {
    let mut found = Vec::new();
    let mut dirs = vec![dir.to_owned()];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(dir).ok()?.flatten() {
            let path = entry.path();
            if path.is_dir() { dirs.push(path) } else { found.push(path) }
        }
    }
    let name = |p: &Path| p.file_name().map(|n| n.to_string_lossy().to_lowercase()).unwrap_or_default();
    found.sort();
    found.iter().find(|p| name(p) == "pods").or(found.first()).cloned()
}

/// The table, a line as soon as it is known.
#[derive(Default)]
struct Table {
    step: &'static str,
    started: bool,
}

impl Table {
    fn print(&mut self, row: &Row) {
        if !self.started {
            println!("{:<21} {:<24} {:<47} {:<47}", "", "", "expected", "observed");
            let columns = format!("{:<8} {:<20} link", "client", "server saw");
            println!("{:<21} {:<24} {columns:<47} {columns:<47}", "policy", "call");
            self.started = true;
        }
        let step = if self.step == row.step { "" } else { row.step };
        self.step = row.step;
        let (expected, observed) = (outcome(&row.expected), outcome(&row.observed));
        let mark = if row.ok() { "✓" } else { "✗" };
        println!("{step:<21} {:<24} {expected:<47} {observed:<47} {mark} {}", row.call, row.note);
    }
}

/// The three observations in columns; an identity without what all of them share.
fn outcome(outcome: &Outcome) -> String {
    let peer = outcome.peer.to_string();
    let peer = peer.strip_prefix("spiffe://cluster.local/").unwrap_or(&peer);
    let link = if outcome.readable { "readable" } else { "nothing readable" };
    format!("{:<8} {peer:<20} {link}", outcome.answer.to_string())
}

/// Arguments of `shell`.
#[derive(clap::Args)]
pub(crate) struct ShellArguments {
    /// Name of the sandbox
    #[arg(long, default_value = DEFAULT_NAME)]
    name: String,
    /// The pod: its name, or namespace/name
    pod: String,
    /// A command instead of a shell
    #[arg(trailing_var_arg = true)]
    command: Vec<String>,
}

/// `shell`: a shell as a process of a pod of the running sandbox, in its control group and its network namespace.
///
/// `ip netns exec` enters the namespace alone; to the mesh such a process is a stranger in the pod, and is refused.
pub(crate) fn shell(arguments: &ShellArguments) -> Result<()> {
    let place = place_of(&tour::plan(&arguments.name), &arguments.pod)?;
    if !place.cgroup.exists() {
        bail!("no sandbox named {} is up: start it with `cargo xtask run`", arguments.name);
    }
    let programs = built("culvert-pod")?;
    let words = if arguments.command.is_empty() { vec!["sh".to_owned()] } else { arguments.command.clone() };
    let mut shell = place.interactive(&words[0])?;
    let path = setup::path_with(programs.parent().unwrap_or(Path::new("/")))?;
    shell.args(&words[1..]).env("PATH", path).env("PS1", format!("{}# ", arguments.pod));
    let status = shell.status()?;
    std::process::exit(status.code().unwrap_or(1))
}
