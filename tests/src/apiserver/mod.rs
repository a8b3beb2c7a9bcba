//! A real API server for tests: etcd and kube-apiserver, if wanted with kube-controller-manager, and kubectl to ask them.
//!
//! Nothing here stands in for Kubernetes: the programs are built from its modules ([`assets`]), authorization is Node and RBAC,
//! every user has a certificate. There are no nodes: a pod that has a `nodeName` and whose status was written runs, as far as
//! anybody can tell from the API.
//!
//! ```no_run
//! # fn main() -> anyhow::Result<()> {
//! let server = culvert_tests::apiserver::shared()?;
//! server.namespace("orders")?;
//! server.apply("{apiVersion: v1, kind: ConfigMap, metadata: {name: c, namespace: orders}}")?;
//! # Ok(())
//! # }
//! ```
//!
//! What it puts on the machine is in a list, as a sandbox's: `/run/culvert-<instance>/` with certificates, kubeconfigs, logs, and
//! etcd's data below `/var/tmp`, which is on a disk where `/run` is memory. All of it goes when the [`ApiServer`] is dropped; its
//! processes are killed by the kernel when this process is, and the next start removes the rest.

pub mod assets;
mod nursery;
mod pki;

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::os::unix::process::ExitStatusExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::command;
use crate::interrupt;
use crate::patience;
use crate::sandbox::ledger::{Ledger, Recorded};
use crate::sandbox::{Place, base64url, sweep};
use assets::Assets;
use nursery::Nursery;
use pki::Authority;
pub(crate) use pki::write_secret;

/// How long it may take until the API server says that it is ready: 2 to 3 s on an idle machine.
const READY_LIMIT: Duration = Duration::from_secs(60);
/// How long it may take until the API server has ended after SIGTERM: it first ends its watches, which takes 2.6 s, and waits up
/// to a minute for requests that came meanwhile.
const STOP_LIMIT: Duration = Duration::from_secs(90);
/// How long controllers may take.
const CONTROLLERS_LIMIT: Duration = Duration::from_secs(30);
/// How long etcd may take to answer.
const ETCD_LIMIT: Duration = Duration::from_secs(10);
/// Issuer of service account tokens, as kubeadm has it.
const ISSUER: &str = "https://kubernetes.default.svc.cluster.local";
/// What the controllers do that tests need: service accounts, the cluster's root certificate in each namespace, the end of
/// namespaces, EndpointSlices, and of what is owned by what is gone. All of them would be 60.
const CONTROLLERS: &str = "serviceaccount-controller,root-ca-certificate-publisher-controller,namespace-controller,\
                           endpointslice-controller,garbage-collector-controller";

const ETCD: &str = "etcd";
const SERVER: &str = "kube-apiserver";
const MANAGER: &str = "kube-controller-manager";
/// The superuser of the tests.
const ADMIN: &str = "admin";
/// Whom RBAC's own bootstrap lets be the controllers.
const MANAGER_USER: &str = "system:kube-controller-manager";

/// What an API server shall be.
#[derive(Debug, Clone)]
pub struct ApiPlan {
    /// Its name on the machine: two at once need two.
    pub instance: String,
    /// Control group and network namespace of all its processes, and of kubectl; `None` is this process's own.
    pub place: Option<Place>,
    /// The address that it listens on.
    pub bind: IpAddr,
    /// The address by which kubeconfigs name it; the serving certificate has it.
    pub advertise: IpAddr,
    /// The port; `None` is one that is free.
    pub port: Option<u16>,
    /// Further addresses in the serving certificate.
    pub addresses: Vec<IpAddr>,
    /// Further names in the serving certificate.
    pub names: Vec<String>,
    /// Networks of cluster IPs, the first one's family is the cluster's first.
    pub services: String,
    /// Whether the controllers run that tests need.
    pub controllers: bool,
    /// Further flags of kube-apiserver, such as `--watch-cache-sizes=pods#0`.
    pub flags: Vec<String>,
}

impl Default for ApiPlan {
    /// On a free loopback port, with controllers, under a name of its own.
    fn default() -> Self {
        static NUMBER: AtomicU16 = AtomicU16::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        Self {
            instance: format!("api-{}-{number}", std::process::id()),
            place: None,
            bind: Ipv4Addr::LOCALHOST.into(),
            advertise: Ipv4Addr::LOCALHOST.into(),
            port: None,
            addresses: Vec::new(),
            names: Vec::new(),
            services: "10.96.0.0/16".to_owned(),
            controllers: true,
            flags: Vec::new(),
        }
    }
}

/// An API server that runs. Dropping it ends its processes and removes all that it put on the machine.
#[derive(Debug)]
pub struct ApiServer {
    plan: ApiPlan,
    assets: Assets,
    authority: Authority,
    ports: Ports,
    processes: Mutex<Vec<Process>>,
    nursery: Nursery,
    ledger: Ledger,
    data: PathBuf,
}

/// The same ports after a restart: kubeconfigs name them.
#[derive(Debug, Clone, Copy)]
struct Ports {
    server: u16,
    etcd: u16,
}

/// A program of the set that runs.
#[derive(Debug)]
struct Process {
    name: &'static str,
    child: Child,
}

impl ApiServer {
    /// Starts one on a free loopback port, with the controllers that tests need, and waits until it is ready.
    ///
    /// # Errors
    /// The programs are not built, or one of them ended or was not ready in time; the error shows the end of its log.
    pub fn start() -> Result<Self> {
        Self::start_as(ApiPlan::default())
    }

    /// Starts one as `plan` says, and waits until it is ready.
    ///
    /// # Errors
    /// As [`Self::start`]; or another owner has one of this name up.
    pub fn start_as(plan: ApiPlan) -> Result<Self> {
        let assets = Assets::find()?;
        sweep().context("remove what dead owners left")?;
        let ledger = Ledger::take(&plan.instance)?;
        let data = Path::new("/var/tmp").join(format!("culvert-{}", plan.instance));
        let (authority, ports, nursery) = match prepare(&plan, &ledger, &data) {
            Ok(prepared) => prepared,
            Err(error) => {
                ledger.remove().context("take down the half-built API server")?;
                return Err(error);
            }
        };
        let server = Self { plan, assets, authority, ports, processes: Mutex::default(), nursery, ledger, data };
        // An error drops `server`, which takes everything away.
        server.raise()?;
        Ok(server)
    }

    fn raise(&self) -> Result<()> {
        let mut addresses = vec![self.plan.bind, self.plan.advertise];
        addresses.extend([IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)]);
        addresses.extend(&self.plan.addresses);
        // Everywhere is nowhere to connect to.
        addresses.retain(|address| !address.is_unspecified());
        addresses.sort_unstable();
        addresses.dedup();
        let service = ["kubernetes", "kubernetes.default", "kubernetes.default.svc"];
        let mut names: Vec<String> = service.into_iter().chain(["localhost"]).map(str::to_owned).collect();
        names.extend(self.plan.names.iter().cloned());
        self.authority.serving(&addresses, &names)?;
        // Superusers are known by their group (RBAC's own bootstrap), controllers by their name.
        self.kubeconfig(ADMIN, Some("system:masters"))?;
        self.kubeconfig(MANAGER_USER, None)?;
        self.start_etcd()?;
        self.start_server()?;
        if self.plan.controllers {
            self.start_manager()?;
        }
        Ok(())
    }

    fn start_etcd(&self) -> Result<()> {
        let url = format!("http://{}:{}", Ipv4Addr::LOCALHOST, self.ports.etcd);
        let mut etcd = self.command(ETCD)?;
        etcd.arg("--data-dir").arg(self.data.join("etcd"));
        // What is lost with the machine nobody wants back; a killed process loses nothing by this.
        etcd.args(["--unsafe-no-fsync", "--log-level", "warn"]);
        etcd.args(["--listen-client-urls", &url, "--advertise-client-urls", &url]);
        etcd.args(["--listen-peer-urls", "http://127.0.0.1:0"]);
        self.launch(ETCD, etcd)
    }

    fn start_server(&self) -> Result<()> {
        let pki = self.authority.dir();
        let mut server = self.command(SERVER)?;
        server.arg(format!("--etcd-servers=http://{}:{}", Ipv4Addr::LOCALHOST, self.ports.etcd));
        server.arg(format!("--secure-port={}", self.ports.server));
        server.arg(format!("--bind-address={}", self.plan.bind));
        server.arg(format!("--advertise-address={}", self.plan.advertise));
        server.arg(format!("--service-cluster-ip-range={}", self.plan.services));
        server.arg(format!("--service-account-issuer={ISSUER}"));
        for (flag, file) in [
            ("--tls-cert-file", pki.join("kube-apiserver.crt")),
            ("--tls-private-key-file", pki.join("kube-apiserver.key")),
            ("--client-ca-file", self.authority.certificate()),
            ("--service-account-key-file", self.authority.accounts_public_key()),
            ("--service-account-signing-key-file", self.authority.accounts_key()),
        ] {
            server.arg(flag).arg(file);
        }
        // Without the first, whoever has a certificate may do everything.
        server.args(["--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction"]);
        server.args(["--allow-privileged=true", "--endpoint-reconciler-type=none"]);
        server.args(&self.plan.flags);
        self.launch(SERVER, server)?;
        self.wait_ready()
    }

    fn start_manager(&self) -> Result<()> {
        let mut manager = self.command(MANAGER)?;
        manager.arg("--kubeconfig").arg(self.kubeconfig_of(MANAGER_USER));
        manager.arg("--service-account-private-key-file").arg(self.authority.accounts_key());
        manager.arg("--root-ca-file").arg(self.authority.certificate());
        manager.arg(format!("--controllers={CONTROLLERS}"));
        manager.args(["--use-service-account-credentials=true", "--leader-elect=false"]);
        manager.args(["--bind-address=127.0.0.1", "--secure-port=0"]);
        self.launch(MANAGER, manager)?;
        let made = command::wait_for("controllers made the account of `default`", CONTROLLERS_LIMIT, || {
            self.expect_running(MANAGER)?;
            Ok(self.kubectl(&["get", "serviceaccount", "default", "--namespace", "default"]).is_ok().then_some(()))
        });
        made.with_context(|| self.end_of_log(MANAGER))
    }

    /// Waits until the API server says that it is ready, and has made the namespace `default`.
    fn wait_ready(&self) -> Result<()> {
        let ready = command::wait_for("kube-apiserver is ready", READY_LIMIT, || {
            self.expect_running(ETCD)?;
            self.expect_running(SERVER)?;
            let asked = self.kubectl(&["get", "--raw", "/readyz"]);
            let ready = asked.is_ok() && self.kubectl(&["get", "namespace", "default"]).is_ok();
            Ok(ready.then_some(()))
        });
        ready.with_context(|| self.end_of_log(SERVER))
    }

    /// Ends the API server as an orderly shutdown does (SIGTERM): its watches end cleanly. etcd keeps what there is.
    ///
    /// # Errors
    /// It does not run, or did not end in time; then it was killed.
    pub fn stop(&self) -> Result<()> {
        self.signal(Signal::SIGTERM)?;
        let mut server = self.take(SERVER)?;
        let ended = command::wait_for("kube-apiserver ends", STOP_LIMIT, || Ok(server.try_wait()?));
        if ended.is_err() {
            server.kill().and_then(|()| server.wait()).context("kill kube-apiserver, which did not end by itself")?;
        }
        ended.map(drop).with_context(|| self.end_of_log(SERVER))
    }

    /// Kills the API server (SIGKILL): its connections are cut. etcd keeps what there is.
    ///
    /// # Errors
    /// It does not run.
    pub fn kill(&self) -> Result<()> {
        let mut server = self.take(SERVER)?;
        server.kill().context("kill kube-apiserver")?;
        let status = server.wait().context("wait for kube-apiserver")?;
        ensure!(
            status.signal() == Some(Signal::SIGKILL as i32),
            "kube-apiserver ended with {status} before it was killed: {}",
            self.end_of_log(SERVER)
        );
        Ok(())
    }

    /// Starts the API server again on the same data and the same port, after [`Self::stop`] or [`Self::kill`], and waits until
    /// it is ready. It remembers no history: every watch from before gets 410.
    ///
    /// # Errors
    /// It runs already, ended, or was not ready in time.
    pub fn start_again(&self) -> Result<()> {
        ensure!(self.expect_running(SERVER).is_err(), "kube-apiserver runs already");
        self.start_server()
    }

    /// Sends a signal to the API server: SIGSTOP makes one that accepts connections and does not answer, until SIGCONT.
    ///
    /// # Errors
    /// It does not run.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        self.expect_running(SERVER)?;
        Recorded::of(self.pid()?, SERVER)?.signal(signal);
        Ok(())
    }

    /// Forgets the history of everything before the last change in etcd, and returns the revision of that change.
    ///
    /// A watch from before gets 410 only if it comes from etcd: the API server keeps a history of its own, unless
    /// `--watch-cache-sizes=<resource>#0` was among its flags.
    ///
    /// # Errors
    /// etcd did not answer, or refused.
    pub fn compact(&self) -> Result<i64> {
        let status = self.etcd("/v3/maintenance/status", &json!({}))?;
        // 64 bits are text in its JSON.
        let revision = status["header"]["revision"].as_str().and_then(|n| n.parse().ok());
        let revision: i64 = revision.with_context(|| format!("etcd's revision in {status}"))?;
        self.etcd("/v3/kv/compaction", &json!({ "revision": revision.to_string(), "physical": true }))?;
        Ok(revision)
    }

    /// Puts objects where the API server keeps them, each with its key, such as `/registry/pods/default/web`: thousands in seconds,
    /// where requests to it would take minutes. It serves and watches them like all others, and has checked nothing.
    ///
    /// # Errors
    /// etcd did not answer, or refused.
    pub fn store(&self, objects: &[(String, Value)]) -> Result<()> {
        // Not many in a transaction: a watcher takes for granted that no two changes have the same revision.
        let put = |(key, object): &(String, Value)| {
            let (key, value) = (base64url(key.as_bytes()), base64url(object.to_string().as_bytes()));
            self.etcd("/v3/kv/put", &json!({ "key": key, "value": value })).map(drop)
        };
        std::thread::scope(|scope| {
            let parts: Vec<_> = objects
                .chunks(objects.len().div_ceil(8).max(1))
                .map(|part| scope.spawn(move || part.iter().try_for_each(put)))
                .collect();
            parts.into_iter().try_for_each(|part| part.join().map_err(|_| anyhow!("a writer panicked"))?)
        })
    }

    /// Asks etcd through its HTTP gateway.
    fn etcd(&self, path: &str, body: &Value) -> Result<Value> {
        let to = SocketAddr::from((Ipv4Addr::LOCALHOST, self.ports.etcd));
        let body = body.to_string();
        let ask = || -> Result<String> {
            let limit = ETCD_LIMIT * patience();
            let mut stream = TcpStream::connect_timeout(&to, limit)?;
            stream.set_read_timeout(Some(limit))?;
            // Version 1.0 of the protocol has no chunks and ends with the connection.
            write!(stream, "POST {path} HTTP/1.0\r\nHost: {to}\r\nContent-Length: {}\r\n\r\n{body}", body.len())?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer)?;
            Ok(answer)
        };
        let answer = match &self.plan.place {
            Some(place) => place.inside(ask),
            None => ask(),
        };
        let answer = answer.with_context(|| format!("ask etcd for {path}"))?;
        let (head, body) = answer.split_once("\r\n\r\n").with_context(|| format!("etcd's answer {answer:?}"))?;
        ensure!(head.split(' ').nth(1) == Some("200"), "etcd answers {path} with {head}: {body}");
        serde_json::from_str(body).with_context(|| format!("etcd's answer {body:?}"))
    }

    /// Runs kubectl as a superuser and returns what it printed.
    ///
    /// # Errors
    /// It ended unsuccessfully; the error has what it said.
    pub fn kubectl(&self, arguments: &[&str]) -> Result<String> {
        self.kubectl_as(&self.admin(), arguments, None)
    }

    /// As [`Self::kubectl`], with `input` on its standard input.
    ///
    /// # Errors
    /// As there.
    pub fn kubectl_with(&self, arguments: &[&str], input: &str) -> Result<String> {
        self.kubectl_as(&self.admin(), arguments, Some(input))
    }

    /// Runs kubectl as the user of a kubeconfig.
    ///
    /// # Errors
    /// It ended unsuccessfully; the error has what it said.
    pub fn kubectl_as(&self, kubeconfig: &Path, arguments: &[&str], input: Option<&str>) -> Result<String> {
        let mut kubectl = self.kubectl_command(kubeconfig)?;
        kubectl.args(arguments);
        command::finish(&mut kubectl, input)
    }

    /// kubectl as the user of a kubeconfig, where the API server is: for a caller that reads its output as it comes.
    ///
    /// # Errors
    /// The place where it shall run is not there.
    pub fn kubectl_command(&self, kubeconfig: &Path) -> Result<Command> {
        let mut kubectl = self.command("kubectl")?;
        kubectl.arg("--kubeconfig").arg(kubeconfig);
        // What it has learnt of another server is not for this one; and what the user of this machine prefers is not for tests.
        kubectl.arg("--cache-dir").arg(self.data.join("kubectl"));
        kubectl.env("KUBECTL_KUBERC", "false");
        Ok(kubectl)
    }

    /// `kubectl apply` of manifests, as a superuser.
    ///
    /// # Errors
    /// The server refused one; the error has its words.
    pub fn apply(&self, manifests: &str) -> Result<String> {
        self.kubectl_with(&["apply", "--filename", "-"], manifests)
    }

    /// Makes a namespace for a test, and waits until pods can be made in it.
    ///
    /// # Errors
    /// There is one of that name, or the controllers do not make its service account.
    pub fn namespace(&self, name: &str) -> Result<()> {
        self.kubectl(&["create", "namespace", name])?;
        if !self.plan.controllers {
            self.kubectl(&["create", "serviceaccount", "default", "--namespace", name])?;
            return Ok(());
        }
        let made = command::wait_for(&format!("controllers prepared {name}"), CONTROLLERS_LIMIT, || {
            self.expect_running(MANAGER)?;
            Ok(self.kubectl(&["get", "serviceaccount", "default", "--namespace", name]).is_ok().then_some(()))
        });
        made.with_context(|| self.end_of_log(MANAGER))
    }

    /// Writes a kubeconfig for a user, known by a client certificate, who is in a group if one is given, and in
    /// `system:authenticated`; returns its file. What they may do is for RBAC to say.
    ///
    /// # Errors
    /// The certificate could not be made or written.
    pub fn kubeconfig(&self, user: &str, group: Option<&str>) -> Result<PathBuf> {
        self.authority.kubeconfig(&self.url(), user, group)?;
        Ok(self.kubeconfig_of(user))
    }

    /// A token of a service account for an audience, bound to a pod if one is named.
    ///
    /// # Errors
    /// There is no such account or pod.
    pub fn token(&self, namespace: &str, account: &str, audience: &str, pod: Option<&str>) -> Result<String> {
        let mut arguments = vec!["create", "token", account, "--namespace", namespace, "--audience", audience];
        if let Some(pod) = pod {
            arguments.extend(["--bound-object-kind", "Pod", "--bound-object-name", pod]);
        }
        Ok(self.kubectl(&arguments)?.trim().to_owned())
    }

    /// Kubeconfig of a superuser.
    pub fn admin(&self) -> PathBuf {
        self.kubeconfig_of(ADMIN)
    }

    fn kubeconfig_of(&self, user: &str) -> PathBuf {
        self.authority.kubeconfig_file(user)
    }

    /// Where it is reached: `https://…`.
    pub fn url(&self) -> String {
        format!("https://{}", SocketAddr::new(self.plan.advertise, self.ports.server))
    }

    /// File of the certificate that clients trust it by.
    pub fn root_certificate(&self) -> PathBuf {
        self.authority.certificate()
    }

    /// Its directory: certificates, kubeconfigs and logs.
    pub fn dir(&self) -> &Path {
        self.ledger.dir()
    }

    /// The programs that it consists of.
    pub fn assets(&self) -> &Assets {
        &self.assets
    }

    /// Number of the API server's process.
    ///
    /// # Errors
    /// It does not run.
    pub fn pid(&self) -> Result<u32> {
        let processes = self.processes();
        let server = processes.iter().find(|process| process.name == SERVER);
        Ok(server.context("kube-apiserver does not run")?.child.id())
    }

    /// A command that runs where the API server does.
    fn command(&self, program: &str) -> Result<Command> {
        let program = self.assets.program(program);
        match &self.plan.place {
            Some(place) => place.command(program),
            None => {
                let mut command = Command::new(program);
                command.stdin(Stdio::null());
                Ok(command)
            }
        }
    }

    fn launch(&self, name: &'static str, mut command: Command) -> Result<()> {
        let path = self.log_path(name);
        let log = File::options().create(true).append(true).open(&path);
        let log = log.with_context(|| format!("open {}", path.display()))?;
        command.stdout(Stdio::from(log.try_clone()?)).stderr(Stdio::from(log));
        let child = self.nursery.start(command)?;
        let record = Recorded::of(child.id(), name);
        let mut processes = self.processes();
        // One that ended by itself was still in the list.
        processes.retain(|process| process.name != name);
        processes.push(Process { name, child });
        drop(processes);
        self.ledger.started(record.with_context(|| self.end_of_log(name))?)
    }

    /// Takes a process out of the list of those that run.
    fn take(&self, name: &str) -> Result<Child> {
        let mut processes = self.processes();
        let at = processes.iter().position(|process| process.name == name);
        Ok(processes.remove(at.with_context(|| format!("{name} does not run"))?).child)
    }

    /// Fails, with the end of its log, if a process has ended.
    fn expect_running(&self, name: &str) -> Result<()> {
        let mut processes = self.processes();
        let process = processes.iter_mut().find(|process| process.name == name);
        let ended = process.with_context(|| format!("{name} does not run"))?.child.try_wait();
        drop(processes);
        match ended.with_context(|| format!("ask for the end of {name}"))? {
            None => Ok(()),
            Some(status) => bail!("{name} ended with {status}: {}", self.end_of_log(name)),
        }
    }

    fn processes(&self) -> MutexGuard<'_, Vec<Process>> {
        // Each change of the list is one step, so it is right also when a thread panicked beside it.
        self.processes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// File of what a program printed: `etcd`, `kube-apiserver` or `kube-controller-manager`.
    pub fn log_path(&self, program: &str) -> PathBuf {
        self.dir().join("logs").join(format!("{program}.log"))
    }

    /// The last lines of a program's log, for an error.
    fn end_of_log(&self, program: &str) -> String {
        let text = fs::read_to_string(self.log_path(program)).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        let end = lines[lines.len().saturating_sub(12)..].join("\n    ");
        format!("{program}; the end of its log:\n    {end}")
    }

    /// Ends everything and removes it.
    fn remove(&self) -> Result<()> {
        // Whoever asks goes before whom it asks. Nothing is to be kept, so nobody is given time to write.
        let ended: Vec<Process> = self.processes().drain(..).rev().collect();
        for mut process in ended {
            // One that has ended by itself cannot be killed any more.
            let _ = process.child.kill();
            process.child.wait().with_context(|| format!("wait for {}", process.name))?;
        }
        self.ledger.remove()
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        if let Err(error) = self.remove() {
            eprintln!("API server {}: {error:#}; the next start tries again", self.plan.instance);
        }
    }
}

/// What there is before the first process.
fn prepare(plan: &ApiPlan, ledger: &Ledger, data: &Path) -> Result<(Authority, Ports, Nursery)> {
    interrupt::check()?;
    let logs = ledger.dir().join("logs");
    fs::create_dir_all(&logs).with_context(|| format!("create {}", logs.display()))?;
    ledger.will_make_directory(data)?;
    fs::create_dir_all(data).with_context(|| format!("create {}", data.display()))?;
    let ports = || -> Result<Ports> {
        let server = match plan.port {
            Some(port) => port,
            None => free_port(plan.bind)?,
        };
        Ok(Ports { server, etcd: free_port(Ipv4Addr::LOCALHOST.into())? })
    };
    let ports = match &plan.place {
        Some(place) => place.inside(ports)?,
        None => ports()?,
    };
    Ok((Authority::create(&ledger.dir().join("pki"))?, ports, Nursery::open()?))
}

/// A port on which nobody listens, below those that the kernel gives to connections: between this look and the server's start no
/// connection of somebody else takes it.
fn free_port(address: IpAddr) -> Result<u16> {
    const FIRST: u16 = 20_000;
    const COUNT: u16 = 10_000;
    static NEXT: AtomicU16 = AtomicU16::new(0);
    // Processes that begin at the same moment begin at different ports.
    let own = u16::try_from(std::process::id().wrapping_mul(37) % u32::from(COUNT))?;
    for _ in 0..500 {
        let nth = NEXT.fetch_add(1, Ordering::Relaxed);
        let port = FIRST + own.wrapping_add(nth) % COUNT;
        if TcpListener::bind((address, port)).is_ok() {
            return Ok(port);
        }
    }
    bail!("no port of {address} from {FIRST} to {} is free", FIRST + COUNT - 1)
}

/// The one of this process, for all its tests: started by the first that asks, ended when the process ends by itself. A test makes
/// a [`ApiServer::namespace`] of its own in it, and does not stop it.
///
/// # Errors
/// As [`ApiServer::start`]; the next that asks tries again.
pub fn shared() -> Result<Arc<ApiServer>> {
    let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(server) = &*shared {
        return Ok(Arc::clone(server));
    }
    let server = Arc::new(ApiServer::start()?);
    // A static is never dropped, and whoever is not waited for stays as a zombie where no init reaps it.
    // SAFETY: the function takes nothing, does not unwind, and stays as long as the program.
    let arranged = unsafe { libc::atexit(end_shared) };
    ensure!(arranged == 0, "the end of the API server cannot be arranged");
    *shared = Some(Arc::clone(&server));
    Ok(server)
}

static SHARED: Mutex<Option<Arc<ApiServer>>> = Mutex::new(None);

extern "C" fn end_shared() {
    // Nothing is left to tell a panic to, and it must not cross into C.
    let _ = catch_unwind(AssertUnwindSafe(|| {
        let server = SHARED.lock().unwrap_or_else(PoisonError::into_inner).take();
        drop(server);
    }));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_that_are_given_out_are_free_and_differ() {
        let loopback = IpAddr::V4(Ipv4Addr::LOCALHOST);
        let first = free_port(loopback).expect("a port");
        let taken = TcpListener::bind((loopback, first)).expect("it is free");
        let more: Vec<u16> = (0..20).map(|_| free_port(loopback).expect("a port")).collect();
        assert!(!more.contains(&first) && more.iter().all(|port| (20_000..30_000).contains(port)), "{first}, {more:?}");
        drop(taken);
    }

    #[test]
    fn plans_without_a_name_get_different_ones() {
        let (one, two) = (ApiPlan::default(), ApiPlan::default());
        assert_ne!(one.instance, two.instance);
        assert!(one.bind.is_loopback() && one.advertise.is_loopback());
    }
}
