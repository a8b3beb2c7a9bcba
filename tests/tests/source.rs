//! The API server as the source of the cluster's objects: a real one, that is changed, stopped, killed, and kept from answering
//! (specification §1, §17).

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use culvert::model::{Cluster, MtlsMode, ObjectRef};
use culvert::source::review::Manifests;
use culvert::source::{View, kubernetes};
use culvert_tests::apiserver::{ApiPlan, ApiServer};
use culvert_tests::{command, patience};
use nix::sys::signal::Signal;
use tokio::sync::{oneshot, watch};

/// Until what was done at the server is seen: pauses between attempts grow to half a minute.
const SEEN: Duration = Duration::from_secs(60);

/// The source, as an agent has it.
struct Watching {
    views: watch::Receiver<Arc<View>>,
    /// Every view that there was.
    seen: Arc<Mutex<Vec<Arc<View>>>>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Watching {
    fn start(kubeconfig: &Path) -> Result<Self> {
        let (kubeconfig, seen) = (kubeconfig.to_owned(), Arc::new(Mutex::new(Vec::new())));
        let (stop, stopped) = oneshot::channel();
        let (give, take) = std::sync::mpsc::channel();
        let record = seen.clone();
        let thread = thread::spawn(move || -> Result<()> {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(async {
                let (views, reading) =
                    kubernetes::watch(Some(&kubeconfig), "istio-system", kubernetes::Kinds::All).await?;
                let mut news = views.clone();
                give.send(views)?;
                let recording = async {
                    loop {
                        let view = news.borrow_and_update().clone();
                        record.lock().unwrap_or_else(PoisonError::into_inner).push(view);
                        if news.changed().await.is_err() {
                            return;
                        }
                    }
                };
                tokio::select! {
                    ended = reading => ended,
                    () = recording => Ok(()),
                    _ = stopped => Ok(()),
                }
            })
        });
        let views = take.recv_timeout(Duration::from_secs(30) * patience()).context("the source starts")?;
        Ok(Self { views, seen, stop: Some(stop), thread: Some(thread) })
    }

    fn now(&self) -> Arc<View> {
        self.views.borrow().clone()
    }

    fn until(&self, what: &str, holds: impl Fn(&View) -> bool) -> Result<Arc<View>> {
        let seen = command::wait_for(what, SEEN * patience(), || {
            let view = self.now();
            Ok(holds(&view).then_some(view))
        });
        seen.with_context(|| {
            let view = self.now();
            format!("{:?}, {:?}, {:?}", view.unread, view.watched, view.problems)
        })
    }

    /// Whether it holds of every view that was whole.
    fn always(&self, holds: impl Fn(&View) -> bool) -> bool {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.iter().filter(|view| view.unread.is_empty()).all(|view| holds(view))
    }
}

impl Drop for Watching {
    fn drop(&mut self) {
        drop(self.stop.take());
        let ended = self.thread.take().map(JoinHandle::join);
        if let Some(Ok(Err(error))) = ended {
            eprintln!("the source ended: {error:#}");
        }
    }
}

fn is_whole(view: &View) -> bool {
    view.unread.is_empty()
}

fn mode(view: &View, name: &str) -> Option<MtlsMode> {
    view.cluster.peer_authentications.get(&ObjectRef::new("shop", name)).map(|policy| policy.mode)
}

/// A definition that takes whatever is written.
fn definition(kind: &str, plural: &str) -> String {
    let version = |name: &str, storage: bool| {
        format!(
            "  - name: {name}\n    served: true\n    storage: {storage}\n    subresources: {{status: {{}}}}\n    schema: \
             {{openAPIV3Schema: {{type: object, x-kubernetes-preserve-unknown-fields: true}}}}\n"
        )
    };
    format!(
        "---\napiVersion: apiextensions.k8s.io/v1\nkind: CustomResourceDefinition\nmetadata: {{name: \
         {plural}.security.istio.io}}\nspec:\n  group: security.istio.io\n  scope: Namespaced\n  names: {{kind: {kind}, \
         plural: {plural}, singular: {}}}\n  versions:\n{}{}",
        kind.to_lowercase(),
        version("v1", true),
        version("v1beta1", false)
    )
}

/// Both, and that they are served.
fn define(server: &ApiServer) -> Result<()> {
    for (kind, plural) in
        [("PeerAuthentication", "peerauthentications"), ("AuthorizationPolicy", "authorizationpolicies")]
    {
        server.apply(&definition(kind, plural))?;
        let name = format!("customresourcedefinition/{plural}.security.istio.io");
        server.kubectl(&["wait", "--for=condition=Established", &name, "--timeout=60s"])?;
    }
    Ok(())
}

fn peer_authentication(name: &str, mode: &str) -> String {
    format!(
        "---\napiVersion: security.istio.io/v1beta1\nkind: PeerAuthentication\nmetadata: {{namespace: shop, name: \
         {name}}}\nspec: {{mtls: {{mode: {mode}}}}}\n"
    )
}

/// A server whose flags no test needs, with a namespace `shop`.
fn server(flags: &[&str]) -> Result<ApiServer> {
    let flags = flags.iter().map(|flag| (*flag).to_owned()).collect();
    let server = ApiServer::start_as(ApiPlan { controllers: false, flags, ..ApiPlan::default() })?;
    server.namespace("shop")?;
    Ok(server)
}

/// §1, one model from many sources: what is watched is what a folder of the same objects gives.
#[test]
fn an_api_server_and_a_folder_of_its_objects_are_the_same_cluster() -> Result<()> {
    let server = server(&[])?;
    define(&server)?;
    server.kubectl(&["create", "namespace", "istio-system"])?;
    server.kubectl(&["label", "namespace", "shop", "istio.io/dataplane-mode=ambient"])?;
    server.apply(
        "
apiVersion: v1
kind: Node
metadata: {name: node-1, labels: {topology.kubernetes.io/zone: z}}
---
apiVersion: v1
kind: ConfigMap
metadata: {namespace: istio-system, name: istio}
data: {mesh: 'trustDomain: shop.example'}
---
apiVersion: v1
kind: ConfigMap
metadata: {namespace: shop, name: istio}
data: {mesh: 'trustDomain: not-this.example'}
---
apiVersion: v1
kind: Service
metadata: {namespace: shop, name: web}
spec: {selector: {app: web}, ports: [{name: http, port: 80, targetPort: http}], sessionAffinity: ClientIP}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {namespace: shop, name: web-1, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
ports: [{name: http, port: 8080}]
endpoints: [{addresses: [10.244.1.5], targetRef: {kind: Pod, name: web, namespace: shop}, conditions: {ready: true}}]
---
apiVersion: v1
kind: Pod
metadata: {namespace: shop, name: web, labels: {app: web}}
spec:
  nodeName: node-1
  containers: [{name: app, image: example, ports: [{name: http, containerPort: 8080}]}]
---
apiVersion: v1
kind: Pod
metadata: {namespace: shop, name: waiting, annotations: {sidecar.istio.io/inject: 'false'}}
spec: {containers: [{name: app, image: example}]}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {namespace: shop, name: deny}
spec: {action: DENY, rules: [{from: [{source: {notNamespaces: [shop]}}], to: [{operation: {ports: ['8080']}}]}]}
",
    )?;
    server.apply(&peer_authentication("strict", "STRICT"))?;
    server.apply(&peer_authentication("wrong", "STRIKT"))?;
    let status = r#"{"status": {"phase": "Running", "podIP": "10.244.1.5", "podIPs": [{"ip": "10.244.1.5"}],
                     "conditions": [{"type": "Ready", "status": "True"}]}}"#;
    server.kubectl(&["patch", "pod", "web", "--namespace", "shop", "--subresource=status", "--patch", status])?;

    let watching = Watching::start(&server.admin())?;
    let whole = watching.until("the view is whole", is_whole)?;
    let folder = folder(&server)?;
    ensure!(*whole.cluster == *folder.cluster, "{:#?}\nis not\n{:#?}", whole.cluster, folder.cluster);
    ensure!(whole.cluster.pods.len() == 2 && whole.cluster.services.len() == 2, "{:#?}", whole.cluster);
    ensure!(whole.cluster.mesh.trust_domain.to_string() == "shop.example", "{:?}", whole.cluster.mesh);
    let places: Vec<String> = whole.policies.values().map(ToString::to_string).collect();
    ensure!(places == ["generation 1"], "{places:?}");
    let problems: Vec<String> = whole.problems.iter().map(ToString::to_string).collect();
    let begin = "PeerAuthentication shop/wrong: spec.mtls.mode: ";
    ensure!(problems.len() == 1 && problems[0].starts_with(begin), "{problems:?}");

    // Changes, one at a time, as users make them.
    server.kubectl(&["label", "namespace", "shop", "istio.io/dataplane-mode-"])?;
    server.apply(&peer_authentication("strict", "PERMISSIVE"))?;
    server.kubectl(&["delete", "pod", "waiting", "--namespace", "shop", "--grace-period=0", "--force"])?;
    server.kubectl(&["delete", "authorizationpolicy", "deny", "--namespace", "shop"])?;
    server.kubectl(&["delete", "configmap", "istio", "--namespace", "istio-system"])?;
    let folder = self::folder(&server)?;
    let same = |view: &View| *view.cluster == *folder.cluster;
    let changed = watching.until("the changes are seen", same)?;
    ensure!(
        changed.cluster.pods.len() == 1 && changed.cluster.mesh == Cluster::default().mesh,
        "{:#?}",
        changed.cluster
    );
    // And one that begins now sees them, too.
    let begun = Watching::start(&server.admin())?;
    begun.until("a new one sees the same", same)?;
    Ok(())
}

/// All objects of a server, as `kubectl get -o yaml` writes them, through the source of manifests.
fn folder(server: &ApiServer) -> Result<View> {
    let kinds = "namespaces,nodes,pods,services,endpointslices,configmaps,peerauthentications,authorizationpolicies";
    let text = server.kubectl(&["get", kinds, "--all-namespaces", "--output", "yaml"])?;
    Ok(Manifests::of("all.yaml", &text).view("istio-system"))
}

/// A definition that is not there means no objects; one that comes is noticed, and so is its end.
#[test]
fn a_kind_that_comes_and_goes_is_followed() -> Result<()> {
    let server = server(&[])?;
    let watching = Watching::start(&server.admin())?;
    watching.until("it is whole without any policy", is_whole)?;
    for round in 0..2 {
        define(&server)?;
        server.apply(&peer_authentication("strict", "STRICT"))?;
        watching.until("the policy is seen", |view| mode(view, "strict") == Some(MtlsMode::Strict))?;
        let definition = "customresourcedefinition/peerauthentications.security.istio.io";
        server.kubectl(&["delete", definition])?;
        watching.until("it went with its definition", |view| view.cluster.peer_authentications.is_empty())?;
        ensure!(watching.always(|view| view.cluster.namespaces.len() > 1), "round {round}: namespaces were gone");
    }
    Ok(())
}

/// What deploy/ gives an agent, as documents.
fn rights(server: &ApiServer) -> Result<Vec<serde_json::Value>> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/agent/rbac.yaml");
    let text = server.kubectl(&["create", "--dry-run=client", "--output", "json", "--filename", path])?;
    let documents =
        serde_json::Deserializer::from_str(&text).into_iter().collect::<Result<Vec<serde_json::Value>, _>>();
    let documents = documents.with_context(|| text.clone())?;
    ensure!(documents.len() == 5, "{text}");
    Ok(documents)
}

/// Who has them.
const AGENT: &str = "system:serviceaccount:istio-system:culvert";

/// Gives an agent its rights but those on one resource. Agents that are to have different rights have different names, which
/// what deploy/ has gets as an ending.
fn grant(server: &ApiServer, named: &str, without: Option<&str>) -> Result<()> {
    for mut document in rights(server)? {
        for rule in document["rules"].as_array_mut().into_iter().flatten() {
            if let Some(resources) = rule["resources"].as_array_mut() {
                resources.retain(|resource| resource.as_str() != without);
            }
        }
        if let Some(rules) = document["rules"].as_array_mut() {
            rules.retain(|rule| rule["resources"].as_array().is_some_and(|resources| !resources.is_empty()));
        }
        for name in ["/metadata/name", "/roleRef/name", "/subjects/0/name"] {
            if let Some(name) = document.pointer_mut(name) {
                *name = format!("{}{named}", name.as_str().context("a name")?).into();
            }
        }
        server.apply(&document.to_string())?;
    }
    Ok(())
}

/// Does it for each at the same time: nearly all of it is waiting.
fn for_each<T: Sync>(of: &[T], run: impl Fn(&T) -> Result<()> + Sync) -> Result<()> {
    thread::scope(|scope| {
        let all: Vec<_> = of.iter().map(|one| scope.spawn(|| run(one))).collect();
        all.into_iter().try_for_each(|one| one.join().map_err(|_| anyhow!("one of them panicked"))?)
    })
}

/// What it reads.
const READ: [&str; 9] = [
    "namespaces",
    "nodes",
    "pods",
    "services",
    "endpointslices",
    "authorizationpolicies",
    "peerauthentications",
    "customresourcedefinitions",
    "configmaps",
];

/// [D.2], [D.3]: without a right nothing is known, and the right is named; one that is taken away takes nothing that is known.
#[test]
fn a_missing_right_is_named_and_opens_nothing() -> Result<()> {
    let server = server(&[])?;
    define(&server)?;
    server.apply(&peer_authentication("strict", "STRICT"))?;
    server.kubectl(&["create", "namespace", "istio-system"])?;
    for_each(&READ, |resource| {
        let named = format!("-without-{resource}");
        grant(&server, &named, Some(resource))?;
        let agent = server.kubeconfig(&format!("{AGENT}{named}"), None)?;
        let watching = Watching::start(&agent)?;
        let missing = format!("cannot watch resource \"{resource}\"");
        let view = watching.until(&format!("{resource}: what is missing is named"), |view| {
            view.unread.iter().any(|one| one.contains(&missing))
        })?;
        ensure!(*view.cluster == Cluster::default(), "{resource}: half of it was shown: {:?}", view.cluster);
        grant(&server, &named, None)?;
        let view = watching.until(&format!("{resource}: with the right it is whole"), is_whole)?;
        ensure!(mode(&view, "strict") == Some(MtlsMode::Strict), "{:?}", view.cluster);
        Ok(())
    })?;
    grant(&server, "", None)?;
    let watching = Watching::start(&server.kubeconfig(AGENT, None)?)?;
    watching.until("it is whole", is_whole)?;

    // A watch that runs is not ended by the loss of a right; the next one is not begun.
    grant(&server, "", Some("peerauthentications"))?;
    server.kill()?;
    server.start_again()?;
    let deaf = |view: &View| {
        let error = view.watched["PeerAuthentication"].error.as_deref().unwrap_or_default();
        error.contains("cannot watch resource \"peerauthentications\"")
    };
    let view = watching.until("the lost right is named", deaf)?;
    ensure!(view.watched["PeerAuthentication"].errors > 0, "{:?}", view.watched);
    watching
        .until("the others are heard", |view| view.watched.values().filter(|one| one.error.is_some()).count() == 1)?;
    server.apply(&peer_authentication("strict", "DISABLE"))?;
    grant(&server, "", None)?;
    watching.until("with the right again, it is heard", |view| mode(view, "strict") == Some(MtlsMode::Disable))?;
    ensure!(watching.always(|view| mode(view, "strict").is_some()), "the policy was not in force for a while");
    Ok(())
}

/// [D.3]: however the server ends, and for however long, what is known stays, and what comes afterwards is heard of.
fn ends(how: &str, end: fn(&ApiServer) -> Result<()>) -> Result<(ApiServer, Watching)> {
    let server = server(&[])?;
    define(&server)?;
    server.apply(&peer_authentication("stays", "STRICT"))?;
    let watching = Watching::start(&server.admin())?;
    watching.until("it is whole", is_whole)?;
    end(&server)?;
    let deaf = |view: &View| view.watched.values().all(|one| one.error.is_some());
    watching.until(&format!("{how}: it is told of every kind"), deaf)?;
    server.start_again()?;
    server.apply(&peer_authentication(how, "STRICT"))?;
    watching.until(&format!("{how}: what came later is seen"), |view| mode(view, how) == Some(MtlsMode::Strict))?;
    let well = |view: &View| view.watched.values().all(|one| one.error.is_none());
    watching.until(&format!("{how}: every kind is heard again"), well)?;
    stays(&watching)?;
    Ok((server, watching))
}

fn stays(watching: &Watching) -> Result<()> {
    let stays = watching.always(|view| mode(view, "stays") == Some(MtlsMode::Strict));
    ensure!(stays, "the policy was not in force for a while");
    Ok(())
}

#[test]
fn a_server_that_is_stopped_takes_nothing_along() -> Result<()> {
    ends("stopped", ApiServer::stop)?;
    Ok(())
}

#[test]
fn a_server_that_is_killed_or_hangs_takes_nothing_along() -> Result<()> {
    let (server, watching) = ends("killed", ApiServer::kill)?;
    // One that has nothing in memory of before, and one that does not answer for a while.
    server.kill()?;
    server.start_again()?;
    server.signal(Signal::SIGSTOP)?;
    thread::sleep(Duration::from_secs(2));
    server.signal(Signal::SIGCONT)?;
    server.kubectl(&["delete", "peerauthentication", "killed", "--namespace", "shop"])?;
    watching.until("what went meanwhile is gone", |view| mode(view, "killed").is_none())?;
    stays(&watching)
}

/// What stands between the source and the server, and what it does to connections.
#[derive(Clone, Debug)]
enum Fault {
    None,
    /// They are closed at once.
    Closed,
    /// They are taken, and nothing is answered.
    Silent,
    /// Every request has this answer.
    Answer(Vec<u8>),
}

/// A port that leads to a server, with a fault that can be chosen.
struct Between {
    port: u16,
    fault: Arc<Mutex<Fault>>,
    open: Arc<Mutex<Vec<TcpStream>>>,
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Between {
    fn new(to: SocketAddr) -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let port = listener.local_addr()?.port();
        let (fault, open) = (Arc::new(Mutex::new(Fault::None)), Arc::new(Mutex::new(Vec::new())));
        let over = Arc::new(AtomicBool::new(false));
        let (chosen, streams, ended) = (fault.clone(), open.clone(), over.clone());
        let thread = thread::spawn(move || {
            thread::scope(|scope| {
                while let Ok((stream, _)) = listener.accept() {
                    if ended.load(Ordering::Relaxed) {
                        return;
                    }
                    let now = locked(&chosen).clone();
                    if let Ok(clone) = stream.try_clone() {
                        locked(&streams).push(clone);
                    }
                    let streams = streams.clone();
                    // Whatever becomes of one connection is the fault's effect.
                    scope.spawn(move || drop(serve(stream, to, now, &streams)));
                }
            });
        });
        Ok(Self { port, fault, open, over, thread: Some(thread) })
    }

    /// From now on; connections that there are end.
    fn set(&self, fault: Fault) {
        *locked(&self.fault) = fault;
        self.cut();
    }

    fn cut(&self) {
        for stream in locked(&self.open).drain(..) {
            // It may have ended already.
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

impl Drop for Between {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        // Wakes it up.
        let _ = TcpStream::connect((Ipv4Addr::LOCALHOST, self.port));
        self.cut();
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

fn locked<T>(of: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

fn serve(mut stream: TcpStream, to: SocketAddr, fault: Fault, open: &Mutex<Vec<TcpStream>>) -> Result<()> {
    match fault {
        Fault::Closed => stream.shutdown(Shutdown::Both)?,
        Fault::Silent => drop(stream.read_to_end(&mut Vec::new())?),
        Fault::Answer(answer) => {
            let mut head = Vec::new();
            let mut byte = [0];
            while !head.ends_with(b"\r\n\r\n") && stream.read(&mut byte)? == 1 {
                head.push(byte[0]);
            }
            stream.write_all(&answer)?;
            stream.shutdown(Shutdown::Both)?;
        }
        Fault::None => {
            let mut server = TcpStream::connect(to)?;
            locked(open).push(server.try_clone()?);
            let (mut from, mut back) = (server.try_clone()?, stream.try_clone()?);
            thread::scope(|scope| {
                scope.spawn(move || {
                    // Ends with either side.
                    let _ = std::io::copy(&mut from, &mut back);
                    let _ = back.shutdown(Shutdown::Both);
                });
                let _ = std::io::copy(&mut stream, &mut server);
                let _ = server.shutdown(Shutdown::Both);
            });
        }
    }
    Ok(())
}

/// kubectl as a server of plain HTTP, so that a fault can be put between.
struct Plain {
    child: std::process::Child,
    at: SocketAddr,
}

impl Plain {
    fn of(server: &ApiServer) -> Result<Self> {
        let mut proxy = server.kubectl_command(&server.admin())?;
        proxy.args(["proxy", "--port", "0"]).stdout(std::process::Stdio::piped());
        let mut child = proxy.spawn().context("start kubectl proxy")?;
        let out = child.stdout.take().context("its output")?;
        let mut line = String::new();
        std::io::BufRead::read_line(&mut std::io::BufReader::new(out), &mut line)?;
        // Starting to serve on 127.0.0.1:NNNNN
        let at = line.trim().rsplit(' ').next().and_then(|at| at.parse().ok());
        Ok(Self { child, at: at.with_context(|| format!("where kubectl proxy listens: {line:?}"))? })
    }
}

impl Drop for Plain {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn kubeconfig(dir: &Path, port: u16) -> Result<PathBuf> {
    let path = dir.join(format!("plain-{port}.kubeconfig"));
    let text = format!(
        "{{apiVersion: v1, kind: Config, current-context: c, clusters: [{{name: c, cluster: {{server: \
         'http://127.0.0.1:{port}'}}}}], users: [{{name: c, user: {{}}}}], contexts: [{{name: c, context: {{cluster: c, user: \
         c}}}}]}}"
    );
    fs::write(&path, text)?;
    Ok(path)
}

/// [D.3]: answers that are none, that are errors, that end half-way or never come: nothing that is known changes, each is told,
/// and afterwards all is as if it had not been, also where the server has forgotten what was known (410).
#[test]
fn no_answer_of_a_server_changes_what_is_in_force() -> Result<()> {
    // Without a cache of its own the server knows as much of the past as etcd.
    let server = server(&["--watch-cache-sizes=peerauthentications.security.istio.io#0"])?;
    define(&server)?;
    server.apply(&peer_authentication("stays", "STRICT"))?;
    let plain = Plain::of(&server)?;
    let http = |status: &str, head: &str, body: &str| {
        let text =
            format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\n{head}connection: close\r\n\r\n{body}", body.len());
        Fault::Answer(text.into_bytes())
    };
    let json = "content-type: application/json\r\n";
    let status = |code: u16, message: &str| {
        format!(
            r#"{{"kind":"Status","apiVersion":"v1","status":"Failure","message":"{message}","code":{code},"details":{{"retryAfterSeconds":1}}}}"#
        )
    };
    let half = r#"{"type":"ADDED","object":{"apiVersion":"v1","kind":"Pod","metadata":{"name":"#;
    let faults: Vec<(&str, Fault, &str)> = vec![
        ("closed", Fault::Closed, ""),
        (
            "429",
            http(
                "429 Too Many Requests",
                "retry-after: 1\r\n",
                &status(429, "too many requests, please try again later"),
            ),
            "too many requests",
        ),
        (
            "500",
            http("500 Internal Server Error", json, &status(500, "etcdserver: request timed out")),
            "etcdserver: request timed out (500)",
        ),
        (
            "503 of somebody else",
            http("503 Service Unavailable", "content-type: text/html\r\n", "<html>no</html>"),
            "503",
        ),
        (
            "403",
            http("403 Forbidden", json, &status(403, "pods is forbidden: User cannot list resource")),
            "cannot list resource (403)",
        ),
        ("no HTTP", Fault::Answer(b"SSH-2.0-OpenSSH_9.2\r\n".to_vec()), ""),
        ("an answer cut off", http("200 OK", json, half), ""),
        ("garbage", http("200 OK", json, "\u{1}\u{2}\u{3}{]\n"), ""),
    ];
    for_each(&faults, |(what, fault, expected)| {
        let between = Between::new(plain.at)?;
        let watching = Watching::start(&kubeconfig(server.dir(), between.port)?)?;
        let before = watching.until(&format!("{what}: it is whole"), is_whole)?;
        between.set(fault.clone());
        let told = |view: &View| {
            view.watched.values().all(|one| one.error.as_ref().is_some_and(|error| error.contains(expected)))
        };
        let view = watching.until(&format!("{what}: it is told"), told)?;
        ensure!(Arc::ptr_eq(&view.cluster, &before.cluster), "{what}: something changed: {:?}", view.cluster);
        between.set(Fault::None);
        let well = |view: &View| view.watched.values().all(|one| one.error.is_none());
        watching.until(&format!("{what}: it is heard again"), well)?;
        ensure!(
            watching.always(|view| mode(view, "stays") == Some(MtlsMode::Strict)),
            "{what}: the policy was not in force"
        );
        Ok(())
    })?;
    let between = Between::new(plain.at)?;
    let watching = Watching::start(&kubeconfig(server.dir(), between.port)?)?;
    watching.until("it is whole", is_whole)?;
    // It accepts, and says nothing; what changes meanwhile is forgotten before it speaks again.
    between.set(Fault::Silent);
    for mode in ["PERMISSIVE", "DISABLE"] {
        server.apply(&peer_authentication("changed", mode))?;
    }
    server.kubectl(&["delete", "peerauthentication", "changed", "--namespace", "shop"])?;
    server.apply(&peer_authentication("later", "STRICT"))?;
    server.compact()?;
    between.set(Fault::None);
    let view = watching.until("what came meanwhile is seen", |view| mode(view, "later") == Some(MtlsMode::Strict))?;
    ensure!(mode(&view, "changed").is_none(), "{:?}", view.cluster);
    stays(&watching)
}

/// A server that is not there at first is waited for; nothing is known until it is.
#[test]
fn a_server_that_comes_later_is_found() -> Result<()> {
    let server = server(&[])?;
    server.stop()?;
    let watching = Watching::start(&server.admin())?;
    let view = watching.now();
    ensure!(!view.unread.is_empty() && *view.cluster == Cluster::default(), "{view:?}");
    server.start_again()?;
    watching.until("it is whole", is_whole)?;
    Ok(())
}

/// A kubeconfig that leads nowhere is one line with the file.
#[test]
fn a_kubeconfig_that_cannot_be_used_is_one_line() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let of = |text: &str| -> Result<String> {
        let path = dir.path().join("kubeconfig");
        fs::write(&path, text)?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let client = runtime.block_on(kubernetes::client(Some(&path)));
        let error = client.err().map(|error| format!("{error:#}")).ok_or_else(|| anyhow!("{text:?} was taken"))?;
        ensure!(error.contains(&path.display().to_string()) && !error.contains('\n'), "{error}");
        Ok(error)
    };
    of("{")?;
    of("{apiVersion: v1, kind: Config, current-context: nowhere}")?;
    Ok(())
}
