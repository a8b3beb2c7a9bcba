//! A sandbox whose objects are in a real API server: what is applied to its manifests is there, with the server's own UIDs, and
//! what is built on the machine is named for these. And what its agents tell it, and do without it; each policy on it is `tour`'s.

use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use culvert_tests::apiserver::ApiServer;
use culvert_tests::programs::HttpResult;
use culvert_tests::sandbox::{
    Family, MeshPlan, Node, Plan, PodPlan, Sandbox, Source, agent_process, built, expect_no_traces, own_name, place_of,
};
use culvert_tests::{command, patience};
use serde_json::Value;

const POLICY: &str = "policy.yaml";

fn strict(name: &str) -> String {
    format!(
        "---\napiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {{name: {name}, namespace: test}}\n\
         spec: {{mtls: {{mode: STRICT}}}}\n"
    )
}

/// One for all, since it takes seconds to build: what is applied, changed, dropped from a file, deleted, and taken down.
#[test]
fn manifests_are_applied_to_an_api_server_as_to_a_folder() -> Result<()> {
    let instance = own_name("cluster");
    let plan = Plan::bookinfo(&instance).source(Source::Api);
    let mut sandbox = Sandbox::build(plan.clone())?;
    let kubectl = sandbox.kubectl().display().to_string();
    // As a user types it.
    let get =
        |arguments: &str| -> Result<String> { command::run("sh", &["-c", &format!("{kubectl} get {arguments}")]) };
    let field = |what: &str, path: &str| get(&format!("{what} -o 'jsonpath={path}'"));

    // The pods run, with the addresses that they have and the UIDs that their control groups are named for.
    for key in ["test/nginx", "default/productpage"] {
        let pod = sandbox.pod(key)?;
        let (namespace, name) = key.split_once('/').context("a namespace")?;
        let shown =
            field(&format!("pod -n {namespace} {name}"), "{.metadata.uid} {.status.phase} {.status.podIPs[*].ip}")?;
        ensure!(shown == format!("{} Running {} {}", pod.uid, pod.v4, pod.v6), "{key}: {shown}");
        let cgroup = pod.place.cgroup.display().to_string();
        ensure!(cgroup.contains(&pod.uid) || cgroup.contains(&pod.uid.replace('-', "_")), "{key}: {cgroup}");
        ensure!(pod.place.cgroup.is_dir(), "{cgroup} is there");
        // Another process knows the plan alone: `cargo xtask shell`.
        ensure!(place_of(&plan, key)?.cgroup == pod.place.cgroup, "{key}: a shell would run elsewhere");
        let file = fs::read_to_string(sandbox.manifests().path().join(format!("pod-{namespace}-{name}.yaml")))?;
        ensure!(file.contains(&format!("uid: {}\n", pod.uid)), "{file}");
    }
    let service = field("service -n default productpage", "{.spec.clusterIPs[*]}")?;
    ensure!(service == "10.96.0.10 fd00:10:96::a", "{service}");
    let slices: Value =
        serde_json::from_str(&get("endpointslices -n default -l kubernetes.io/service-name=productpage -o json")?)?;
    let target = &slices["items"][0]["endpoints"][0]["targetRef"]["uid"];
    ensure!(*target == *sandbox.pod("default/productpage")?.uid, "{target}");
    let node = field("node node-b", "{.status.addresses[0].address} {.spec.podCIDR}")?;
    ensure!(node == "172.30.0.2 10.244.2.0/24", "{node}");
    let agent = field("pod -n istio-system culvert-a", "{.spec.nodeName} {.spec.hostNetwork} {.status.podIP}")?;
    ensure!(agent == "node-a true 172.30.0.1", "{agent}");

    // A file is the objects that it describes, no more and no fewer.
    let policies = || field("peerauthentications -A", "{.items[*].metadata.name}");
    sandbox.manifests().apply(POLICY, &(strict("one") + &strict("two")))?;
    ensure!(policies()? == "one two", "{}", policies()?);
    sandbox.manifests().apply(POLICY, &(strict("two").replace("STRICT", "PERMISSIVE") + &strict("three")))?;
    ensure!(policies()? == "three two", "{}", policies()?);
    ensure!(field("peerauthentication -n test two", "{.spec.mtls.mode}")? == "PERMISSIVE", "it was changed");
    sandbox.manifests().delete(POLICY)?;
    sandbox.manifests().delete(POLICY)?;
    ensure!(policies()?.is_empty(), "{}", policies()?);
    // What the server refuses is an error in its words, and changes nothing.
    let wrong = strict("one").replace("STRICT", "[STRICT]");
    let refused = sandbox.manifests().apply(POLICY, &wrong).err().context("a mode is a word")?;
    ensure!(format!("{refused:#}").contains("spec.mtls.mode"), "{refused:#}");
    ensure!(policies()?.is_empty() && !sandbox.manifests().path().join(POLICY).exists(), "nothing was written");

    // A manifest that was read from the folder, changed, and applied again.
    let file = "pod-test-nginx.yaml";
    let text = fs::read_to_string(sandbox.manifests().path().join(file))?;
    sandbox.manifests().apply(file, &text.replace("    app: nginx\n", "    app: nginx\n    version: v2\n"))?;
    let label = || field("pod -n test nginx", "{.metadata.labels.version}|{.metadata.uid}");
    ensure!(label()? == format!("v2|{}", sandbox.pod("test/nginx")?.uid), "{}", label()?);
    sandbox.manifests().apply(file, &text)?;
    ensure!(label()?.starts_with('|'), "a label that is not written any more is gone: {}", label()?);

    // A pod comes, and goes.
    sandbox.add_pod(PodPlan::new(Node::B, "test", "late").http(&[8080]))?;
    let late = sandbox.pod("test/late")?.clone();
    ensure!(field("pod -n test late", "{.metadata.uid} {.status.podIP}")? == format!("{} {}", late.uid, late.v4));
    ensure!(late.place.cgroup.display().to_string().contains(&late.uid), "{}", late.place.cgroup.display());
    sandbox.delete_pod("test/late")?;
    ensure!(get("pods -n test -o name")? == "pod/legacy-app\npod/nginx\n", "{}", get("pods -n test -o name")?);

    sandbox.take_down()?;
    expect_no_traces(&instance)
}

const NGINX: &str = "test/nginx";
const PRODUCTPAGE: &str = "default/productpage";
/// Until an agent has heard of something and done what follows; after an error it may ask again only after half a minute.
const LIMIT: Duration = Duration::from_secs(60);

/// A mesh whose objects are in an API server, as `kubectl` shows and changes it.
struct Scene {
    sandbox: Sandbox,
}

impl Scene {
    fn api(&self) -> Result<&ApiServer> {
        self.sandbox.manifests().api().context("the sandbox has an API server")
    }

    fn call(&self, marker: &str) -> Result<HttpResult> {
        let to = self.sandbox.pod(PRODUCTPAGE)?.at(Family::V4, 9080);
        self.sandbox.http(NGINX, to, marker)
    }

    fn expect_answer(&self, when: &str) -> Result<()> {
        let got = self.call("answered")?;
        ensure!(got.status == Some(200), "{when}: {got:?}");
        Ok(())
    }

    /// The annotation of a pod ([E.4]); empty if it has none.
    fn annotation(&self, key: &str) -> Result<String> {
        let (namespace, name) = key.split_once('/').context("a namespace")?;
        let path = r"jsonpath={.metadata.annotations.ambient\.istio\.io/redirection}";
        self.api()?.kubectl(&["get", "pod", name, "--namespace", namespace, "--output", path])
    }

    fn expect_annotation(&self, key: &str, expected: &str) -> Result<()> {
        command::wait_for(&format!("{key} is annotated {expected:?}"), LIMIT * patience(), || {
            Ok((self.annotation(key)? == expected).then_some(()))
        })
    }

    /// What a kubelet reads of an agent.
    fn readiness(&self) -> Result<HttpAnswer> {
        let to = SocketAddr::new(Node::A.v4().into(), 15021);
        get(&self.sandbox, to, "/healthz/ready")
    }

    /// Of one kind, on node a.
    fn watch_up(&self, kind: &str) -> Result<Option<f64>> {
        let start = format!("culvert_api_watch_up{{kind=\"{kind}\"}} ");
        let metrics = self.sandbox.metrics(Node::A)?;
        metrics.lines().find_map(|line| line.strip_prefix(&*start)).map(|value| Ok(value.parse()?)).transpose()
    }
}

struct HttpAnswer {
    status: String,
    body: String,
}

fn get(sandbox: &Sandbox, to: SocketAddr, path: &str) -> Result<HttpAnswer> {
    let answer = sandbox.node_place(Node::A).inside(|| {
        let mut stream = TcpStream::connect_timeout(&to, LIMIT)?;
        stream.set_read_timeout(Some(LIMIT))?;
        write!(stream, "GET {path} HTTP/1.1\r\nhost: localhost\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    })?;
    let (head, body) = answer.split_once("\r\n\r\n").with_context(|| format!("no answer: {answer:?}"))?;
    Ok(HttpAnswer { status: head.lines().next().unwrap_or_default().to_owned(), body: body.to_owned() })
}

/// [E.4], [D.3]: agents with the rights of deploy/ tell the API server what became of their pods, and go on without it.
#[test]
fn agents_live_with_an_api_server_and_without_it() -> Result<()> {
    let mut sandbox = Sandbox::build(Plan::bookinfo(&own_name("agents-api")).source(Source::Api))?;
    sandbox.start_mesh(&MeshPlan::new(built("culvert")?))?;
    let mut scene = Scene { sandbox };
    scene.expect_answer("at first")?;

    // Who is in the mesh is told, by the label at any time.
    scene.expect_annotation(NGINX, "enabled")?;
    scene.expect_annotation(PRODUCTPAGE, "enabled")?;
    ensure!(scene.annotation("test/legacy-app")?.is_empty(), "it is outside the mesh");
    let label = |value: &str| {
        let label = format!("istio.io/dataplane-mode{value}");
        scene.api()?.kubectl(&["label", "pod", "nginx", "--namespace", "test", "--overwrite", &label])
    };
    label("=none")?;
    scene.expect_annotation(NGINX, "")?;
    label("-")?;
    scene.expect_annotation(NGINX, "enabled")?;

    // A pod that cannot be brought in is told of where its owner looks for it, and so is the end of it.
    scene.sandbox.place_pod(PodPlan::new(Node::A, "test", "placed"))?;
    scene.expect_annotation("test/placed", "pending")?;
    let described = |scene: &Scene, reason: &str| {
        command::wait_for(&format!("kubectl describe shows {reason}"), LIMIT * patience(), || {
            let text = scene.api()?.kubectl(&["describe", "pod", "placed", "--namespace", "test"])?;
            Ok(text.lines().find(|line| line.contains(reason)).map(str::to_owned))
        })
    };
    let event = described(&scene, "FailedEnrollment")?;
    ensure!(event.contains("Warning") && event.contains("no address") && event.contains("culvert"), "{event}");
    scene.sandbox.announce_pod("test/placed")?;
    scene.expect_annotation("test/placed", "enabled")?;
    described(&scene, "Enrolled")?;

    // Without the API server everything goes on, whoever looks sees that nothing new is heard, and a policy that is in force stays.
    scene.sandbox.manifests().apply(POLICY, &(strict("all")))?;
    let refused = |scene: &Scene| -> Result<bool> {
        let to = scene.sandbox.pod(NGINX)?.at(Family::V4, 8080);
        Ok(scene.sandbox.http("test/legacy-app", to, "plaintext")?.status.is_none())
    };
    command::wait_for("STRICT is in force", LIMIT * patience(), || Ok(refused(&scene)?.then_some(())))?;
    scene.api()?.kill()?;
    command::wait_for("the agent has noticed", LIMIT * patience(), || {
        Ok((scene.watch_up("Pod")? == Some(0.0) && scene.watch_up("PeerAuthentication")? == Some(0.0)).then_some(()))
    })?;
    let ready = scene.readiness()?;
    let remark = "source: Pod as last heard, since the API server cannot be heard: ";
    ensure!(ready.status.ends_with("200 OK") && ready.body.contains(remark), "{}\n{}", ready.status, ready.body);
    let parts = get(&scene.sandbox, SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 15000), "/readyz")?.body;
    ensure!(parts.contains("[-] api-server: Pod: "), "{parts}");
    let (lines, _) = scene.sandbox.agent_log(Node::A, 0)?;
    let library = lines.iter().find(|line| line.field("target").is_some_and(|target| target.starts_with("kube")));
    ensure!(library.is_none(), "a library tells it as well: {library:?}");
    let told = lines.iter().filter(|line| {
        line.message().starts_with("the API server cannot be heard") && line.field("kind").as_deref() == Some("Pod")
    });
    ensure!((1..=3).contains(&told.count()), "it is told once, and when the reason changes");
    scene.expect_answer("without the API server")?;
    ensure!(refused(&scene)?, "the policy is not in force any more");

    // And when it is back, what is written there counts.
    scene.api()?.start_again()?;
    scene.sandbox.manifests().delete(POLICY)?;
    command::wait_for("STRICT is gone", LIMIT * patience(), || Ok((!refused(&scene)?).then_some(())))?;
    command::wait_for("every kind is heard", LIMIT * patience(), || {
        let deaf = scene
            .sandbox
            .metrics(Node::A)?
            .lines()
            .any(|line| line.starts_with("culvert_api_watch_up{") && line.ends_with(" 0"));
        Ok((!deaf).then_some(()))
    })?;
    ensure!(scene.readiness()?.body == "ready\n", "{}", scene.readiness()?.body);
    Ok(())
}

impl Scene {
    /// As a kubelet does with a volume: what is published comes to the agents' file.
    fn project_roots(&self, expected: &str) -> Result<()> {
        let path = r"jsonpath={.data.root-cert\.pem}";
        command::wait_for("the roots are published", LIMIT * patience(), || {
            let roots =
                self.api()?.kubectl(&["get", "configmap", "istio-ca-root-cert", "-n", "istio-system", "-o", path])?;
            Ok((roots == expected).then_some(()))
        })?;
        Ok(fs::write(self.sandbox.root_certificate(), expected)?)
    }

    /// Waits until every certificate of both nodes was issued since, and calls all the while: each is answered.
    fn renewed(&self, since: &str, offsets: &mut [u64; 2], identities: usize) -> Result<()> {
        for (node, offset) in Node::ALL.into_iter().zip(offsets.iter_mut()) {
            let (mut renewed, from) = (0, *offset);
            command::wait_for(&format!("{node} has new certificates: {since}"), LIMIT * patience(), || {
                let got = self.call("rotation")?;
                ensure!(got.status == Some(200), "{since}: {got:?}");
                let (lines, end) = self.sandbox.agent_log(node, from)?;
                renewed = lines.iter().filter(|line| line.message() == "certificate ready").count();
                *offset = end;
                Ok((renewed >= identities).then_some(()))
            })?;
        }
        Ok(())
    }
}

/// Specification §4: from one root to another one while calls go on. First both are trusted, then the new one signs, then the old one
/// goes; none of the calls is lost.
#[test]
fn the_root_is_replaced_under_traffic() -> Result<()> {
    let mut sandbox = Sandbox::build(Plan::bookinfo(&own_name("rotation")).source(Source::Api))?;
    sandbox.start_mesh(&MeshPlan::new(built("culvert")?))?;
    let scene = Scene { sandbox };
    scene.sandbox.manifests().apply(POLICY, &strict("all").replace("namespace: test", "namespace: istio-system"))?;
    scene.expect_answer("at first")?;
    let api = scene.api()?;
    let secret = |name: &str, key: &str| -> Result<String> {
        let template = format!("go-template={{{{index .data \"{key}\" | base64decode}}}}");
        api.kubectl(&["get", "secret", name, "-n", "istio-system", "-o", &template])
    };
    let parts = ["ca-cert.pem", "ca-key.pem", "cert-chain.pem"];
    let old = parts.map(|part| secret("istio-ca-secret", part));
    let [old_cert, old_key, old_chain] = old;
    let (old_cert, old_key, old_chain) = (old_cert?, old_key?, old_chain?);
    let new = new_root()?;
    let put = |cert: &str, key: &str, chain: &str, roots: &str| -> Result<()> {
        let data = serde_json::json!({
            "ca-cert.pem": cert, "ca-key.pem": key, "cert-chain.pem": chain, "root-cert.pem": roots
        });
        let metadata = serde_json::json!({ "name": "cacerts", "namespace": "istio-system" });
        let secret =
            serde_json::json!({ "apiVersion": "v1", "kind": "Secret", "metadata": metadata, "stringData": data });
        api.apply(&secret.to_string()).map(drop)
    };
    let both = format!("{old_cert}{}", new.0);
    let mut offsets = [0; 2];
    for (node, offset) in Node::ALL.into_iter().zip(offsets.iter_mut()) {
        *offset = scene.sandbox.agent_log(node, 0)?.1;
    }

    put(&old_cert, &old_key, &old_chain, &both)?;
    scene.project_roots(&both)?;
    scene.renewed("both roots are trusted", &mut offsets, 1)?;
    put(&new.0, &new.1, &new.0, &format!("{}{old_cert}", new.0))?;
    scene.project_roots(&format!("{}{old_cert}", new.0))?;
    scene.renewed("the new root signs", &mut offsets, 1)?;
    put(&new.0, &new.1, &new.0, &new.0)?;
    scene.project_roots(&new.0)?;
    scene.renewed("the old root is gone", &mut offsets, 1)?;
    let (lines, _) = scene.sandbox.agent_log(Node::A, 0)?;
    let refused = lines.iter().find(|line| line.message().contains("handshake"));
    ensure!(refused.is_none(), "{refused:?}");
    scene.expect_answer("with the new root")
}

/// Allows callers of namespace test, at a port.
fn allow(port: &str) -> String {
    format!(
        "---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: front, namespace: default}}\nspec:\n  rules:\n  \
         - from: [{{source: {{namespaces: [test]}}}}]\n    to: [{{operation: {{ports: [\"{port}\"]}}}}]\n"
    )
}

/// [C.6], §1.5: what became of a policy stands in the policy, with on how many agents it is in force; and of an object with a wrong
/// version the last valid one is in force, also after the agents were started anew.
#[test]
fn a_policy_says_where_it_is_in_force() -> Result<()> {
    let mut sandbox = Sandbox::build(Plan::bookinfo(&own_name("in-force")).source(Source::Api))?;
    let plan = MeshPlan::new(built("culvert")?);
    sandbox.start_mesh(&plan)?;
    let mut scene = Scene { sandbox };
    let condition = |scene: &Scene, name: &str, field: &str| -> Result<String> {
        let path = format!("jsonpath={{.status.conditions[?(@.type=='{name}')].{field}}}");
        scene.api()?.kubectl(&["get", "authorizationpolicy", "front", "-n", "default", "-o", &path])
    };
    let until = |scene: &Scene, name: &str, field: &str, expected: &str| {
        let mut found = String::new();
        command::wait_for(&format!("{field} of {name} is {expected:?}"), LIMIT * patience(), || {
            found = condition(scene, name, field)?;
            Ok((found == expected).then_some(()))
        })
        .with_context(|| format!("found {found:?}"))
    };
    scene.api()?.apply(&allow("9080"))?;
    scene.api()?.kubectl(&["wait", "ap/front", "-n", "default", "--for=condition=InForce", "--timeout=60s"])?;
    until(&scene, "InForce", "message", "in force on 2 of 2 agents")?;
    scene.expect_answer("it is allowed")?;
    let wide = scene.api()?.kubectl(&["get", "ap", "front", "-n", "default", "-o", "wide"])?;
    println!("{wide}");
    ensure!(wide.contains("ACCEPTED") && wide.contains("True"), "{wide}");
    let described = scene.api()?.kubectl(&["describe", "ap", "front", "-n", "default"])?;
    ensure!(described.contains("in force on 2 of 2 agents") && described.contains("Last Valid"), "{described}");

    // A wrong version is refused when it is written; where nobody is asked it is stored. The part of it that could not open anything
    // would refuse everybody.
    let refused = scene.api()?.apply(&allow("http")).err().context("a port is a number")?;
    ensure!(format!("{refused:#}").contains("\"http\" is not a port; write a number"), "{refused:#}");
    scene.api()?.kubectl(&["delete", "validatingwebhookconfiguration", "culvert-validator"])?;
    scene.api()?.apply(&allow("http"))?;
    until(&scene, "Accepted", "reason", "Invalid")?;
    until(&scene, "InForce", "message", "generation 1 is in force on 2 of 2 agents")?;
    for arguments in [&["get", "ap", "-n", "default", "-o", "wide"][..], &["describe", "ap", "front", "-n", "default"]]
    {
        println!("# kubectl {}\n{}", arguments.join(" "), scene.api()?.kubectl(arguments)?);
    }
    scene.expect_answer("the last valid version is in force")?;
    for node in Node::ALL {
        scene.sandbox.stop(&agent_process(node))?;
        scene.sandbox.start_agent(&plan, node)?;
        scene.sandbox.wait_ready(node)?;
    }
    command::wait_for("calls are answered", LIMIT * patience(), || {
        Ok((scene.call("restarted")?.status == Some(200)).then_some(()))
    })?;

    // Of an agent that does not run nobody says that it has something in force.
    scene.sandbox.stop(&agent_process(Node::B))?;
    scene.api()?.apply(&allow("9081"))?;
    until(&scene, "InForce", "message", "in force on 1 of 2 agents")?;
    ensure!(condition(&scene, "InForce", "reason")? == "Pending");
    Ok(())
}

/// A self-signed root, and its key.
fn new_root() -> Result<(String, String)> {
    let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
    let mut params = rcgen::CertificateParams::default();
    params.distinguished_name.push(rcgen::DnType::CommonName, "the next root");
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    Ok((params.self_signed(&key)?.pem(), key.serialize_pem()))
}
