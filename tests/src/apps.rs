//! Applications of others in the sandbox's pods: the distribution's PostgreSQL, Redis, nginx, sshd and their own clients,
//! unmodified, started as a container's process would be.
//!
//! A [`Stage`] has three pods: a client on node a and a server on node b, both in the mesh, and on node a an outsider
//! that is not. What is done from the client must be tunnelled; the same done by the outsider crosses the link readable,
//! which shows that the search would have found it. Their files are in the sandbox's own directory and go with it.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::capture::Capture;
use crate::command;
use crate::sandbox::{Family, LinkPlan, LogLine, MeshPlan, Node, Plan, PodPlan, Sandbox, built, own_name};
use crate::wire::Wire;

/// The client's pod.
pub const CLIENT: &str = "test/client";
/// The pod outside the mesh.
pub const OUTSIDER: &str = "test/outsider";
/// The server's pod.
pub const SERVER: &str = "default/server";

/// How long a program may run unless it is told otherwise.
const LIMIT: Duration = Duration::from_secs(60);
/// How long a server may take until it listens.
const LISTEN_LIMIT: Duration = Duration::from_secs(30);

/// A sandbox with the mesh, for one application.
#[derive(Debug)]
pub struct Stage {
    /// Where it is played.
    pub sandbox: Sandbox,
    /// The application's own port.
    pub port: u16,
    wire: Wire,
}

impl Stage {
    /// Two nodes with the mesh, and an empty folder for the application's files.
    ///
    /// # Errors
    /// The sandbox or the mesh did not come up.
    pub fn new(app: &str, port: u16) -> Result<Self> {
        Self::on_link(app, port, LinkPlan::default())
    }

    /// As [`Self::new`], with a link of some other kind.
    ///
    /// # Errors
    /// The sandbox or the mesh did not come up.
    pub fn on_link(app: &str, port: u16, link: LinkPlan) -> Result<Self> {
        let mut plan = Plan::empty(&own_name(app))
            .pod(PodPlan::new(Node::A, "test", "client"))
            .pod(PodPlan::new(Node::A, "test", "outsider").label("istio.io/dataplane-mode", "none"))
            .pod(PodPlan::new(Node::B, "default", "server"));
        plan.link = link;
        let mut sandbox = Sandbox::build(plan)?;
        sandbox.start_mesh(&MeshPlan::new(built("culvert")?))?;
        let wire = Wire::count(&sandbox, &[port])?;
        let stage = Self { sandbox, port, wire };
        fs::create_dir_all(stage.dir()).context("create the application's folder")?;
        Ok(stage)
    }

    /// The application's folder.
    pub fn dir(&self) -> PathBuf {
        self.sandbox.dir().join("app")
    }

    /// A file of that folder, as text for an argument.
    pub fn file(&self, name: &str) -> String {
        self.dir().join(name).display().to_string()
    }

    /// Writes a file of that folder.
    ///
    /// # Errors
    /// It could not be written.
    pub fn write(&self, name: &str, text: impl AsRef<[u8]>) -> Result<()> {
        let path = self.dir().join(name);
        fs::write(&path, text).with_context(|| format!("write {}", path.display()))
    }

    /// Gives the folder and all in it to a user, and to nobody else.
    ///
    /// # Errors
    /// There is no such user.
    pub fn give_to(&self, user: &str) -> Result<()> {
        let dir = self.dir();
        command::run("chown", &["-R", user, &dir.display().to_string()])?;
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o700)).context("close the application's folder")
    }

    /// The server's address for the application's port.
    ///
    /// # Errors
    /// Never: the pod is part of every stage.
    pub fn to(&self, family: Family) -> Result<SocketAddr> {
        Ok(self.sandbox.pod(SERVER)?.at(family, self.port))
    }

    /// Starts a server in the server's pod as root, and waits until it listens on `port`.
    ///
    /// # Errors
    /// It ended, or did not listen in time.
    pub fn serve<S: AsRef<str>>(&mut self, name: &str, words: &[S], port: u16) -> Result<()> {
        self.serve_in(name, SERVER, words, port)
    }

    /// As [`Self::serve`], by an ordinary user.
    ///
    /// # Errors
    /// It ended, or did not listen in time.
    pub fn serve_as<S: AsRef<str>>(&mut self, user: &str, name: &str, words: &[S], port: u16) -> Result<()> {
        let words: Vec<&str> = words.iter().map(AsRef::as_ref).collect();
        self.serve(name, &[&as_user(user)[..], &words].concat(), port)
    }

    /// As [`Self::serve`], in another pod.
    ///
    /// # Errors
    /// It ended, or did not listen in time.
    pub fn serve_in<S: AsRef<str>>(&mut self, name: &str, pod: &str, words: &[S], port: u16) -> Result<()> {
        let command = self.command(pod, words)?;
        self.sandbox.start(name, command)?;
        let place = self.sandbox.pod(pod)?.place.clone();
        command::wait_for(&format!("{name} listens on {port}"), LISTEN_LIMIT, || {
            self.sandbox.expect_running(name)?;
            let to = (Ipv4Addr::LOCALHOST, port).into();
            let open = place.inside(|| Ok(TcpStream::connect_timeout(&to, Duration::from_millis(200)).is_ok()))?;
            Ok(open.then_some(()))
        })
        .with_context(|| self.sandbox.end_of_log(name))
    }

    /// Runs a program in a pod to its end and returns what it printed.
    ///
    /// # Errors
    /// It ended unsuccessfully or not within a minute; the error has what it printed.
    pub fn run<S: AsRef<str>>(&self, pod: &str, words: &[S]) -> Result<String> {
        self.run_for(LIMIT, pod, words)
    }

    /// As [`Self::run`], with a limit of its own.
    ///
    /// # Errors
    /// It ended unsuccessfully or not in time; the error has what it printed.
    pub fn run_for<S: AsRef<str>>(&self, limit: Duration, pod: &str, words: &[S]) -> Result<String> {
        let seconds = (limit * crate::patience()).as_secs().to_string();
        let words: Vec<&str> = words.iter().map(AsRef::as_ref).collect();
        let program = found(words.first().context("no program")?)?;
        let all = [&["timeout", "--kill-after=2", &seconds, &program], &words[1..]].concat();
        let mut command = self.command(pod, &all)?;
        command.stdin(Stdio::null());
        let output = command.output().with_context(|| format!("start {}", words.join(" ")))?;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        if !output.status.success() {
            let slow =
                if output.status.code() == Some(124) { format!(" (stopped after {seconds} s)") } else { String::new() };
            bail!(
                "in {pod}, `{}` ended with {}{slow}: {} {}",
                words.join(" "),
                output.status,
                said.trim(),
                String::from_utf8_lossy(&output.stderr).trim()
            );
        }
        Ok(said)
    }

    fn command<S: AsRef<str>>(&self, pod: &str, words: &[S]) -> Result<Command> {
        let (program, arguments) = words.split_first().context("no program")?;
        let mut command = self.sandbox.pod(pod)?.place.command(found(program.as_ref())?)?;
        // A folder that every user may enter, and answers in the language that is read here.
        command.args(arguments.iter().map(AsRef::as_ref)).current_dir("/").env("LC_ALL", "C.UTF-8");
        Ok(command)
    }

    /// Everything so far was tunnelled, and ended well: the link carried no packet of the application's port, and both
    /// agents told the connections with both identities and, but for resets, without an error.
    ///
    /// # Errors
    /// It was not so.
    pub fn expect_tunnelled(&self) -> Result<()> {
        self.wire.expect_tunnelled()?;
        for (node, direction) in [(Node::A, "outbound"), (Node::B, "inbound")] {
            let lines = self.told(node, direction)?;
            for line in lines {
                let field = |name: &str| line.field(name).unwrap_or_default();
                // A program may close while bytes are under way to it; whether that hurt is its own client's to say.
                let own = field("reason") == "reset";
                ensure!(own || line.field("error").is_none(), "{node} told an error: {line:?}");
                ensure!(field("src.identity") == "spiffe://cluster.local/ns/test/sa/client", "{line:?}");
                ensure!(field("dst.identity") == "spiffe://cluster.local/ns/default/sa/server", "{line:?}");
            }
        }
        Ok(())
    }

    /// The lines of the application's connections that have ended; there must be one.
    fn told(&self, node: Node, direction: &str) -> Result<Vec<LogLine>> {
        let target = format!(":{}", self.port);
        command::wait_for(&format!("{node} tells a connection to port {}", self.port), Duration::from_secs(10), || {
            let (lines, _) = self.sandbox.agent_log(node, 0)?;
            let lines: Vec<LogLine> = lines
                .into_iter()
                .filter(|line| line.field("direction").as_deref() == Some(direction))
                .filter(|line| line.field("dst.hbone_addr").is_some_and(|addr| addr.ends_with(&target)))
                .collect();
            Ok((!lines.is_empty()).then_some(lines))
        })
    }

    /// What `ask` sends from the client's pod is not readable on the link, and what it sends from the outsider's is.
    ///
    /// # Errors
    /// It was not so; or `ask`, which gets the pod and a text to send, failed.
    pub fn expect_secret(&self, ask: impl Fn(&str, &str) -> Result<()>) -> Result<()> {
        let link = self.sandbox.capture()?;
        for (pod, readable) in [(CLIENT, false), (OUTSIDER, true)] {
            let marker = format!("readable-from-{}", pod.replace('/', "-"));
            link.clear()?;
            ask(pod, &marker)?;
            self.expect_readable(&link, &marker, readable)?;
            let direct = link.frames_with_port(self.port)? > 0;
            ensure!(direct == readable, "{pod}: frames of port {} crossed the link: {direct}", self.port);
        }
        Ok(())
    }

    fn expect_readable(&self, link: &Capture, marker: &str, readable: bool) -> Result<()> {
        ensure!(link.contains(marker.as_bytes())? == readable, "{marker:?} is readable on the link: {}", !readable);
        Ok(())
    }
}

/// The words that run what follows them as an ordinary user.
pub fn as_user(user: &str) -> [&str; 6] {
    ["setpriv", "--reuid", user, "--regid", user, "--clear-groups"]
}

/// The folder of PostgreSQL's programs; Debian has one per version, outside `PATH`.
///
/// # Errors
/// It is not installed.
pub fn postgres_programs() -> Result<PathBuf> {
    const ROOT: &str = "/usr/lib/postgresql";
    let entries = fs::read_dir(ROOT).with_context(|| format!("{ROOT}: is PostgreSQL installed?"))?;
    let mut folders: Vec<PathBuf> =
        entries.flatten().map(|entry| entry.path().join("bin")).filter(|dir| dir.join("initdb").is_file()).collect();
    folders.sort();
    folders.pop().with_context(|| format!("no PostgreSQL server below {ROOT}"))
}

fn found(program: &str) -> Result<String> {
    let path = if program.contains('/') { Path::new(program).to_owned() } else { command::find(program)? };
    Ok(path.display().to_string())
}
