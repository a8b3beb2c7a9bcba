//! Pods that have just been made, in bursts, also while their node's agent hangs, is killed and starts: the first thing that they
//! do is to call, or to listen where somebody calls all the time who must not. Nothing of that may pass, and all of it works
//! afterwards without a restart.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use culvert_tests::capture::Capture;
use culvert_tests::kind::NodeInfo;
use culvert_tests::kind::stage::{POD_IMAGE, SYSTEM, Scene};
use culvert_tests::programs::{Failure, HammerResult, Heard, Word};
use culvert_tests::sandbox::Node;
use culvert_tests::{command, full, patience, record};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::de::DeserializeOwned;
use serde_json::Value;

const NAMESPACE: &str = "newcomers";
/// Where the known server listens, and where new ones do. No other scenario uses them: each frame with one of them is ours.
const CALLED: u16 = 7171;
const HAMMERED: u16 = 7272;
/// What new pods say, what the client outside the mesh says, and what one of the mesh says.
const FIRST_WORD: &str = "the-first-word-of-a-new-pod";
const FORBIDDEN: &str = "what-nobody-outside-may-say";
const ALLOWED: &str = "what-the-mesh-may-say";
/// New pods of each of both kinds at once: a node takes 110 pods, and starts some ten in a second.
const BURST: usize = 10;
/// How long a burst may take.
const LIMIT: Duration = Duration::from_secs(120);

/// Half of the bursts meet an agent that serves, and half one that hangs, is killed, and starts.
pub(crate) fn a_new_pod_neither_says_nor_hears_what_policy_forbids(scene: &mut Scene) -> Result<()> {
    let bursts = if full() { 1000_usize.div_ceil(BURST).next_multiple_of(2) } else { 2 };
    let newcomers = Newcomers::set(scene)?;
    let link = scene.cluster.capture(&newcomers.node.name)?;
    let mut total = Tally::default();
    for burst in 0..bursts {
        let trouble = burst % 2 == 1;
        let made = newcomers.burst(burst, trouble, &link, &mut total).with_context(|| {
            let agent = if trouble { "killed" } else { "alive" };
            format!("burst {burst}, with an agent that is {agent}; so far {total:?}")
        })?;
        // The last ones go with their namespace.
        if burst + 1 < bursts {
            newcomers.delete(&made)?;
        }
        link.clear()?;
    }
    ensure!(total.held > 0, "no new pod was ever held, so nothing was shown: {total:?}");
    ensure!(total.unanswered > 0, "nobody called a pod before it was known, so nothing was shown: {total:?}");
    record(&format!(
        "new pods: {0} called and {0} listened first, half of them without an agent: {1} first words held, {2} calls from outside \
         ({3} unanswered), 0 forbidden bytes; answered {4} ms (p50) and {5} ms (p99) after the first instruction beside an agent",
        bursts * BURST,
        total.held,
        total.tried,
        total.unanswered,
        quantile(&mut total.answered, 50),
        quantile(&mut total.answered, 99)
    ))?;
    newcomers.leave()
}

/// From the moment that the kubelet has taken a pod to its first instruction, in turn in the mesh and outside of it.
pub(crate) fn a_pod_of_the_mesh_starts_as_fast_as_another(scene: &mut Scene) -> Result<()> {
    let newcomers = Newcomers::set(scene)?;
    // A node takes 110 pods, and they stay until the end.
    let rounds = if full() { 40 } else { 5 };
    let mut starts: BTreeMap<bool, Vec<u64>> = BTreeMap::new();
    for round in 0..rounds {
        for meshed in [true, false] {
            let pod = if meshed { format!("in-{round}") } else { format!("out-{round}") };
            let label = if meshed { "{}" } else { "{istio.io/dataplane-mode: none}" };
            let server = newcomers.server;
            newcomers.create(&newcomers.pod(&pod, label, "", &words(server, true)))?;
            let one = newcomers.wait_for(&[pod])?.pop().context("one pod")?;
            // Whoever is outside is refused there, and says so as well.
            let first: Word = newcomers.first(&one, "app")?;
            starts.entry(meshed).or_default().push(first.at_ms.saturating_sub(newcomers.taken_ms(&one)?));
        }
    }
    let mut quantiles = |meshed| {
        let of = starts.entry(meshed).or_default();
        (quantile(of, 50), quantile(of, 99))
    };
    let ((in50, in99), (out50, out99)) = (quantiles(true), quantiles(false));
    record(&format!(
        "start of a pod, kubelet to first instruction, {rounds} each in turn: in the mesh {in50} ms (p50), {in99} ms (p99); outside \
         {out50} ms, {out99} ms"
    ))?;
    newcomers.leave()
}

/// What was seen of new pods.
#[derive(Debug, Default)]
struct Tally {
    /// First words that the gate refused.
    held: u64,
    /// Calls from outside the mesh, and those of them that nobody answered in any way.
    tried: u64,
    unanswered: u64,
    /// From the first instruction of a pod to its first answer, milliseconds; of those beside an agent that serves.
    answered: Vec<u64>,
}

/// A pod that has been made.
struct Made {
    name: String,
    uid: String,
    ip: String,
}

/// The namespace, with what new pods are to meet in it: a server and a client of the mesh, and a client that is none of it, all of
/// them on the other node.
struct Newcomers<'a> {
    scene: &'a Scene,
    node: NodeInfo,
    other: NodeInfo,
    server: SocketAddr,
}

impl<'a> Newcomers<'a> {
    fn set(scene: &'a Scene) -> Result<Self> {
        let (node, other) = (scene.node(Node::B)?.clone(), scene.node(Node::A)?.clone());
        let mut newcomers = Self { scene, node, other, server: SocketAddr::from(([0, 0, 0, 0], CALLED)) };
        newcomers.create(&format!(
            "apiVersion: v1\nkind: Namespace\nmetadata: {{name: {NAMESPACE}, labels: {{istio.io/dataplane-mode: ambient}}}}\n\
             ---\napiVersion: security.istio.io/v1\nkind: PeerAuthentication\n\
             metadata: {{namespace: {NAMESPACE}, name: strict}}\nspec: {{mtls: {{mode: STRICT}}}}\n"
        ))?;
        let all = newcomers.addresses()?;
        let outside = "{istio.io/dataplane-mode: none}";
        let hammer = format!("hammer, --marker={FORBIDDEN}, '--to={all}'");
        newcomers.create(
            &[
                newcomers.pod_on(&newcomers.other, "server", "{}", "", &format!("listen, --port={CALLED}")),
                newcomers.pod_on(&newcomers.other, "client", "{}", "", "pause"),
                newcomers.pod_on(&newcomers.other, "hammer", outside, "", &hammer),
            ]
            .concat(),
        )?;
        newcomers.wait_for(&["hammer".to_owned()])?;
        let annotated = |pod: &Value| pod["metadata"]["annotations"]["ambient.istio.io/redirection"] == "enabled";
        let known = newcomers.wait_until(&["server".to_owned(), "client".to_owned()], annotated)?;
        let server = known.iter().find(|pod| pod.name == "server").context("the server")?;
        newcomers.server.set_ip(server.ip.parse().context("the server's address")?);
        Ok(newcomers)
    }

    fn leave(self) -> Result<()> {
        let delete = ["delete", "namespace", NAMESPACE, "--timeout=120s"];
        self.scene.cluster.kubectl(&delete)?;
        self.scene.rolled_out()
    }

    fn burst(&self, burst: usize, trouble: bool, link: &Capture, total: &mut Tally) -> Result<Vec<String>> {
        let agent = trouble.then(|| self.agent()).transpose()?;
        if let Some(agent) = agent {
            kill(agent, Signal::SIGSTOP).context("stop the agent")?;
        }
        let (mut callers, mut servers, mut manifests) = (Vec::new(), Vec::new(), String::new());
        for nth in 0..BURST {
            let (caller, server) = (format!("caller-{burst}-{nth}"), format!("server-{burst}-{nth}"));
            // Of every other one an init container has the first word.
            let init = if nth % 2 == 0 { words(self.server, false) } else { String::new() };
            manifests += &self.pod(&caller, "{}", &init, &words(self.server, true));
            manifests += &self.pod(&server, "{}", "", &format!("listen, --port={HAMMERED}"));
            callers.push(caller);
            servers.push(server);
        }
        let before = self.hammered()?;
        self.create(&manifests)?;
        if let Some(agent) = agent {
            // It hangs until new pods have tried, and been held; the others come while it is dead, or starts.
            self.wait_for_some_held(&callers, link)?;
            kill(agent, Signal::SIGKILL).context("kill the agent")?;
            self.start_soon()?;
        }
        let (called, listening) = (self.wait_for(&callers)?, self.wait_for(&servers)?);
        // All of it works in the end: the callers are answered, and whoever listens answers the mesh.
        for pod in &called {
            command::wait_for(&format!("{} is answered", pod.name), LIMIT, || {
                let words: Vec<Word> = self.said(pod, "app")?;
                Ok(words.iter().any(|word| word.failure.is_none()).then_some(()))
            })?;
        }
        self.all_answer_the_mesh(&listening)?;
        self.judge(&called, &listening, link)?;
        for pod in &called {
            let init: Vec<Word> = self.said(pod, "init")?;
            let words = if init.is_empty() { self.said(pod, "app")? } else { init };
            total.held += words.iter().filter(|word| word.failure == Some(Failure::NotPermitted)).count() as u64;
            if let (false, Some(begun), Some(answered)) = (trouble, words.first(), words.last()) {
                total.answered.push(answered.at_ms + answered.millis - begun.at_ms);
            }
        }
        let now = self.hammered()?;
        total.tried += now.tried - before.tried;
        let timed_out = Failure::TimedOut.to_string();
        let unanswered = |result: &HammerResult| result.failed.get(&timed_out).copied().unwrap_or_default();
        total.unanswered += unanswered(&now) - unanswered(&before);
        Ok([callers, servers].concat())
    }

    /// Nothing that policy forbids was said or heard, by what the pods have seen and by what crossed the link.
    fn judge(&self, called: &[Made], listening: &[Made], link: &Capture) -> Result<()> {
        ensure!(!link.contains(FIRST_WORD.as_bytes())?, "a first word crossed the link readably");
        ensure!(!link.contains(FORBIDDEN.as_bytes())?, "the client outside the mesh has said something");
        let frames = link.frames_with_port(CALLED)?;
        ensure!(frames == 0, "{frames} frames of calls that were not captured crossed the link");
        let hammered = self.hammered()?;
        ensure!(hammered.connected.is_empty(), "the client outside the mesh was let in by {:?}", hammered.connected);
        ensure!(link.frames_with_port(HAMMERED)? > 0, "the client outside the mesh has not tried");
        for pod in listening {
            let heard: Vec<Heard> = self.said(pod, "app")?;
            let other = heard.iter().find(|heard| heard.line.as_deref().is_some_and(|line| line != ALLOWED));
            ensure!(other.is_none(), "{} has heard {other:?}", pod.name);
            ensure!(heard.iter().any(|heard| heard.line.is_some()), "{} has heard nothing at all", pod.name);
        }
        let server = self.made(&["server".to_owned()])?.pop().context("the server")?;
        let heard: Vec<Heard> = self.said(&server, "app")?;
        let peers: BTreeSet<String> =
            heard.iter().filter(|heard| heard.line.is_some()).filter_map(|h| Some(h.peer?.ip().to_string())).collect();
        for pod in called {
            ensure!(peers.contains(&pod.ip), "the server has not heard of {} at {}", pod.name, pod.ip);
        }
        Ok(())
    }

    fn all_answer_the_mesh(&self, listening: &[Made]) -> Result<()> {
        let mut left: BTreeSet<SocketAddr> =
            listening.iter().map(|pod| Ok(SocketAddr::new(pod.ip.parse()?, HAMMERED))).collect::<Result<_>>()?;
        command::wait_for("every new server answers the mesh", LIMIT, || {
            let to: Vec<String> = left.iter().map(ToString::to_string).collect();
            let (marker, to) = (format!("--marker={ALLOWED}"), format!("--to={}", to.join(",")));
            let limit = format!("--timeout-ms={}", 5000 * patience());
            let pod = format!("{NAMESPACE}/client");
            let exec = Scene::exec(&pod, &["hammer", "--rounds=1", &limit, &marker, &to])?;
            let printed = self.scene.cluster.kubectl(&exec)?;
            let result: HammerResult = last(&printed).context("the client's last word")?;
            left.retain(|server| !result.answered.contains_key(server));
            Ok(left.is_empty().then_some(()))
        })
        .with_context(|| format!("{} are left", left_names(listening)))
    }

    /// All addresses of the node's pods, with the port that new servers have.
    fn addresses(&self) -> Result<String> {
        let (base, bits) = self.node.pods.rsplit_once('/').context("addresses of pods")?;
        ensure!(bits == "24", "{}: a node of kind has 24 bits", self.node.pods);
        let (net, _) = base.rsplit_once('.').context("addresses of pods")?;
        // The first one is the node's own.
        Ok((2..255).map(|host| format!("{net}.{host}:{HAMMERED}")).collect::<Vec<_>>().join(","))
    }

    fn pod(&self, name: &str, labels: &str, init: &str, program: &str) -> String {
        self.pod_on(&self.node, name, labels, init, program)
    }

    fn pod_on(&self, node: &NodeInfo, name: &str, labels: &str, init: &str, program: &str) -> String {
        let container = |name: &str, program: &str| {
            format!("  - {{name: {name}, image: '{POD_IMAGE}', imagePullPolicy: Never, args: [{program}]}}\n")
        };
        let mut text = format!(
            "---\napiVersion: v1\nkind: Pod\nmetadata: {{namespace: {NAMESPACE}, name: {name}, labels: {labels}}}\nspec:\n\
             \x20 nodeName: {}\n  automountServiceAccountToken: false\n  enableServiceLinks: false\n\
             \x20 terminationGracePeriodSeconds: 1\n  tolerations: [{{operator: Exists}}]\n",
            node.name
        );
        if !init.is_empty() {
            let _ = write!(text, "  initContainers:\n{}", container("init", init));
        }
        text + "  containers:\n" + &container("app", program)
    }

    fn create(&self, manifests: &str) -> Result<()> {
        self.scene.cluster.kubectl_with(&["create", "--filename", "-"], manifests).map(drop)
    }

    fn delete(&self, pods: &[String]) -> Result<()> {
        let mut delete = vec!["delete", "pod", "--namespace", NAMESPACE, "--timeout=120s"];
        delete.extend(pods.iter().map(String::as_str));
        self.scene.cluster.kubectl(&delete).map(drop)
    }

    fn objects(&self, names: &[String]) -> Result<Vec<Value>> {
        let mut pods = self.scene.cluster.get(&["pods", "--namespace", NAMESPACE])?;
        let pods = pods["items"].as_array_mut().context("a list of pods")?;
        pods.retain(|pod| names.iter().any(|name| pod["metadata"]["name"] == **name));
        Ok(std::mem::take(pods))
    }

    fn made(&self, names: &[String]) -> Result<Vec<Made>> {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let made = |pod: &Value| Made {
            name: text(&pod["metadata"]["name"]),
            uid: text(&pod["metadata"]["uid"]),
            ip: text(&pod["status"]["podIP"]),
        };
        Ok(self.objects(names)?.iter().map(made).collect())
    }

    /// Waits until pods run, none of whose containers was ever started again.
    fn wait_for(&self, names: &[String]) -> Result<Vec<Made>> {
        self.wait_until(names, |_| true)
    }

    fn wait_until(&self, names: &[String], also: impl Fn(&Value) -> bool) -> Result<Vec<Made>> {
        command::wait_for("new pods run", LIMIT, || {
            // Asking costs more than what is asked about: kubectl is a process of its own, and so are they.
            thread::sleep(Duration::from_millis(200));
            let pods = self.objects(names)?;
            let statuses = |pod: &Value, of: &str| pod["status"][of].as_array().cloned().unwrap_or_default();
            for pod in &pods {
                let all = [statuses(pod, "containerStatuses"), statuses(pod, "initContainerStatuses")].concat();
                // Of one that the container runtime could not start nothing has run.
                let ran = |status: &&Value| {
                    status["restartCount"] != 0 && status["lastState"]["terminated"]["reason"] != "StartError"
                };
                let again = all.iter().find(ran);
                ensure!(again.is_none(), "a container was started again: {again:?}");
            }
            let runs = |pod: &&Value| pod["status"]["phase"] == "Running" && also(pod);
            Ok((pods.iter().filter(runs).count() == names.len()).then_some(()))
        })?;
        self.made(names)
    }

    /// Waits until one of `names` has been refused by the gate.
    fn wait_for_some_held(&self, names: &[String], link: &Capture) -> Result<()> {
        command::wait_for("a new pod is held", LIMIT, || {
            let frames = link.frames_with_port(CALLED)?;
            ensure!(frames == 0, "{frames} frames of calls crossed the link that nobody has captured or held");
            for pod in self.made(names)? {
                for container in ["init", "app"] {
                    let words: Vec<Word> = self.said(&pod, container)?;
                    ensure!(words.iter().all(|word| word.failure.is_some()), "{} is not held", pod.name);
                    if words.iter().any(|word| word.failure == Some(Failure::NotPermitted)) {
                        return Ok(Some(()));
                    }
                }
            }
            Ok(None)
        })
    }

    fn agent_pod(&self) -> Result<Value> {
        let on = format!("spec.nodeName={}", self.node.name);
        let get = ["pods", "--namespace", SYSTEM, "--selector=app=culvert", "--field-selector", &on];
        let mut pods = self.scene.cluster.get(&get)?;
        // One that was deleted by force is not listed, and one that is made anew has no successor yet.
        pods["items"].as_array_mut().and_then(Vec::pop).context("the agent's pod")
    }

    /// The node's agent, in this machine's numbers.
    fn agent(&self) -> Result<Pid> {
        let pod = self.agent_pod()?;
        let uid = pod["metadata"]["uid"].as_str().context("the agent's pod")?.replace('-', "_");
        for entry in fs::read_dir("/proc").context("list processes")? {
            let path = entry?.path();
            let Some(pid) = path.file_name().and_then(|name| name.to_str()?.parse().ok()) else { continue };
            // One that has just ended is not it.
            let read = |file: &str| fs::read(path.join(file)).unwrap_or_default();
            let is_agent = read("cmdline").split(|byte| *byte == 0).nth(1) == Some(b"agent");
            if is_agent && String::from_utf8_lossy(&read("cgroup")).contains(&uid) {
                return Ok(Pid::from_raw(pid));
            }
        }
        anyhow::bail!("no process of the agent of {}", self.node.name)
    }

    /// The kubelet starts an agent that has ended at once, but waits longer each time: one that it would wait with is made anew.
    fn start_soon(&self) -> Result<()> {
        let pod = self.agent_pod()?;
        if pod["status"]["containerStatuses"][0]["restartCount"] == 0 {
            return Ok(());
        }
        let name = pod["metadata"]["name"].as_str().context("the agent's pod")?;
        let delete = ["delete", "pod", "--namespace", SYSTEM, name, "--grace-period=0", "--force"];
        self.scene.cluster.kubectl(&delete).map(drop)
    }

    fn hammered(&self) -> Result<HammerResult> {
        command::wait_for("the client outside the mesh has tried", LIMIT, || {
            let pod = self.made(&["hammer".to_owned()])?.pop().context("the client outside the mesh")?;
            let said: Vec<HammerResult> = self.said_on(&self.other, &pod, "app")?;
            Ok(said.into_iter().next_back())
        })
    }

    fn first<T: DeserializeOwned>(&self, pod: &Made, container: &str) -> Result<T> {
        command::wait_for(&format!("{} has said something", pod.name), LIMIT, || {
            Ok(self.said(pod, container)?.into_iter().next())
        })
    }

    /// What a container has printed: the node's own file, read without asking the node.
    fn said<T: DeserializeOwned>(&self, pod: &Made, container: &str) -> Result<Vec<T>> {
        let node = if pod.name == "server" { &self.other } else { &self.node };
        self.said_on(node, pod, container)
    }

    fn said_on<T: DeserializeOwned>(&self, node: &NodeInfo, pod: &Made, container: &str) -> Result<Vec<T>> {
        let dir = root(node).join(format!("var/log/pods/{NAMESPACE}_{}_{}/{container}", pod.name, pod.uid));
        let mut files: Vec<PathBuf> = match fs::read_dir(&dir) {
            Ok(entries) => entries.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error).with_context(|| format!("list {}", dir.display())),
        };
        files.sort();
        let text = files.iter().map(fs::read_to_string).collect::<std::io::Result<String>>();
        let text = text.with_context(|| format!("read logs in {}", dir.display()))?;
        // As container runtimes write them: time, stream, whether it is the end of a line, and the line. The last may be half.
        let lines = text.rsplit_once('\n').map_or("", |(whole, _)| whole).lines();
        let lines = lines.map(|line| line.splitn(4, ' ').nth(3).context("a line of a container's log"));
        lines.map(|line| line.and_then(|line| Ok(serde_json::from_str(line)?))).collect()
    }

    /// When the kubelet has taken a pod: it makes this folder first. Milliseconds since 1970.
    fn taken_ms(&self, pod: &Made) -> Result<u64> {
        let dir = root(&self.node).join("var/lib/kubelet/pods").join(&pod.uid);
        let made: SystemTime =
            fs::metadata(&dir).and_then(|of| of.created()).with_context(|| dir.display().to_string())?;
        Ok(u64::try_from(made.duration_since(UNIX_EPOCH)?.as_millis())?)
    }
}

fn root(node: &NodeInfo) -> PathBuf {
    Path::new("/proc").join(node.pid.to_string()).join("root")
}

fn words(server: SocketAddr, stay: bool) -> String {
    let stay = if stay { ", --stay" } else { "" };
    format!("first-word, '--to={server}', --marker={FIRST_WORD}{stay}")
}

fn left_names(pods: &[Made]) -> String {
    pods.iter().map(|pod| pod.ip.as_str()).collect::<Vec<_>>().join(", ")
}

fn last<T: DeserializeOwned>(printed: &str) -> Option<T> {
    serde_json::from_str(printed.lines().next_back()?).ok()
}

fn quantile(values: &mut [u64], percent: usize) -> u64 {
    values.sort_unstable();
    values.get((values.len() * percent / 100).min(values.len().saturating_sub(1))).copied().unwrap_or_default()
}
