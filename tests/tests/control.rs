//! `culvert control` at a real API server: who gets a certificate, where the root comes from and goes to, which of two replicas leads
//! (specification §4), and what it says of policies before and after they are stored (§1.5).

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use culvert_tests::apiserver::{self, ApiServer};
use culvert_tests::{command, patience, sandbox};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, IsCa, Issuer, KeyPair, PKCS_ECDSA_P256_SHA256,
    SanType,
};
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::{Certificate, ClientTlsConfig, Endpoint};
use tonic::{Code, Request, Status};
use tonic_prost::ProstCodec;

const RIGHTS: &str = include_str!("../../deploy/control/rbac.yaml");
const DEPLOYED: &str = include_str!("../../deploy/control/control.yaml");
/// Name of the server's certificate.
const SERVER_NAME: &str = "istiod.istio-system.svc";
const ROOTS: &str = "istio-ca-root-cert";
/// Until something that takes moments has happened.
const SOON: Duration = Duration::from_secs(20);
/// Until a status says it: one object is written twice a minute at most.
const SETTLED: Duration = Duration::from_secs(60);
/// Until a Lease that is not renewed any more is taken: fifteen seconds, and the pauses of both.
const TAKEN: Duration = Duration::from_secs(40);

/// A system namespace of its own at the API server of all tests, with the rights of deploy/, an agent on each of two nodes, and a pod
/// on each.
struct Cluster {
    /// A leader publishes its roots in all namespaces: two at once would each find the other's.
    _alone: MutexGuard<'static, ()>,
    server: Arc<ApiServer>,
    namespace: &'static str,
    folder: tempfile::TempDir,
}

/// The rights of deploy/ for a namespace; what belongs to none has the namespace's name.
fn rights(namespace: &str) -> String {
    let mut text = RIGHTS.replace("istio-system", namespace);
    text = text.replace("culvert-validator", namespace);
    for end in ["\nrules", "\nroleRef", "\nsubjects"] {
        text = text.replace(&format!("  name: culvert-control{end}"), &format!("  name: {namespace}{end}"));
    }
    text
}

/// A `culvert control` that runs.
struct Replica {
    name: String,
    child: Child,
    log: PathBuf,
    address: SocketAddr,
    webhook: SocketAddr,
    readiness: SocketAddr,
}

impl Drop for Replica {
    fn drop(&mut self) {
        // One that has ended is waited for only.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Cluster {
    fn new(namespace: &'static str) -> Result<Self> {
        static ONE: Mutex<()> = Mutex::new(());
        // A test that failed has ended like any other.
        let alone = ONE.lock().unwrap_or_else(PoisonError::into_inner);
        let server = apiserver::shared()?;
        server.namespace(namespace)?;
        server.apply(&rights(namespace))?;
        let cluster = Self { _alone: alone, server, namespace, folder: tempfile::tempdir()? };
        for (node, pod) in [("node-a", "web"), ("node-b", "far")] {
            cluster.pod(&format!("agent-{node}"), "culvert", node)?;
            cluster.pod(pod, pod, node)?;
        }
        Ok(cluster)
    }

    /// A pod that runs, as far as the API tells.
    fn pod(&self, name: &str, account: &str, node: &str) -> Result<()> {
        let namespace = self.namespace;
        // Two pods of one account are no error.
        self.server.apply(&format!(
            "{{apiVersion: v1, kind: ServiceAccount, metadata: {{namespace: {namespace}, name: {account}}}}}\n---\n\
             {{apiVersion: v1, kind: Pod, metadata: {{namespace: {namespace}, name: {name}}}, spec: {{nodeName: {node}, \
             serviceAccountName: {account}, containers: [{{name: c, image: c}}]}}}}\n"
        ))?;
        let running = r#"{"status": {"phase": "Running"}}"#;
        let patch = ["patch", "pod", name, "-n", namespace, "--subresource=status", "--type=merge", "--patch", running];
        self.server.kubectl(&patch).map(drop)
    }

    /// The token that a kubelet gives to the agent of a node.
    fn token(&self, node: &str) -> Result<String> {
        self.server.token(self.namespace, "culvert", "istio-ca", Some(&format!("agent-{node}")))
    }

    fn identity(&self, account: &str) -> String {
        format!("spiffe://cluster.local/ns/{}/sa/{account}", self.namespace)
    }

    /// Starts a replica; [`Self::wait_ready`] waits for it.
    fn start(&self, name: &str) -> Result<Replica> {
        let user = format!("system:serviceaccount:{}:culvert-control", self.namespace);
        let (address, webhook, readiness) = (free_address()?, free_address()?, free_address()?);
        let log = self.folder.path().join(format!("{name}.log"));
        let mut control = Command::new(sandbox::built("culvert")?);
        control
            .args(["control", "--log-format", "json", "--system-namespace", self.namespace])
            .args(["--pod-name", name, "--pod-ip", "127.0.0.1"])
            .args(["--listen", &address.to_string(), "--readiness-address", &readiness.to_string()])
            .args(["--webhook-listen", &webhook.to_string(), "--webhook-configuration", self.namespace])
            .args(["--server-names", &format!("{SERVER_NAME},127.0.0.1")])
            .args(["--trusted-node-accounts", &format!("{}/culvert", self.namespace)])
            .arg("--kubeconfig")
            .arg(self.server.kubeconfig(&user, None)?)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(&log)?);
        command::end_with_starter(&mut control);
        Ok(Replica { name: name.to_owned(), child: control.spawn()?, log, address, webhook, readiness })
    }

    fn started(&self, name: &str) -> Result<Replica> {
        let replica = self.start(name)?;
        replica.wait_ready()?;
        Ok(replica)
    }

    /// The roots in a namespace, if they are published.
    fn roots(&self, namespace: &str) -> Result<Option<String>> {
        let path = r"jsonpath={.data.root-cert\.pem}";
        let get = ["get", "configmap", ROOTS, "-n", namespace, "--ignore-not-found", "-o", path];
        Ok(Some(self.server.kubectl(&get)?).filter(|roots| !roots.is_empty()))
    }

    fn published(&self, namespace: &str) -> Result<String> {
        command::wait_for(&format!("the roots are in {namespace}"), SOON, || self.roots(namespace))
    }

    fn published_as(&self, namespace: &str, roots: &str) -> Result<()> {
        command::wait_for(&format!("these roots are in {namespace}"), SOON, || {
            Ok(self.roots(namespace)?.filter(|found| found == roots).map(drop))
        })
    }

    /// Asks a replica for a certificate, as an agent does that trusts `roots`.
    fn ask(&self, replica: &Replica, roots: &str, question: &Question<'_>) -> Result<Result<Vec<String>, Status>> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            let tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(roots)).domain_name(SERVER_NAME);
            let channel = Endpoint::from_shared(format!("https://{}", replica.address))?.tls_config(tls)?;
            let mut grpc = tonic::client::Grpc::new(channel.connect().await.context("connect to the CA")?);
            grpc.ready().await?;
            let mut request = Request::new(question.message()?);
            if let Some(token) = question.token {
                request.metadata_mut().insert("authorization", format!("Bearer {token}").parse()?);
            }
            let path = PathAndQuery::from_static("/istio.v1.auth.IstioCertificateService/CreateCertificate");
            let codec = ProstCodec::<CertificateRequest, CertificateResponse>::default();
            Ok(grpc.unary(request, path, codec).await.map(|response| response.into_inner().cert_chain))
        })
    }

    /// The certificate for `account`, as the agent of a node gets it.
    fn issue(&self, replica: &Replica, roots: &str, node: &str, account: &str) -> Result<Vec<String>> {
        let (token, wanted) = (self.token(node)?, self.identity(account));
        let answer = self.ask(replica, roots, &Question::of(&token, &wanted))?;
        answer.map_err(|status| anyhow::anyhow!("{status:?}")).with_context(|| replica.end_of_log())
    }

    /// The kinds of policy, which are there for all tests.
    fn define(&self) -> Result<()> {
        let definitions = command::finish(Command::new(sandbox::built("culvert")?).arg("crds"), None)?;
        self.server.kubectl_with(&["apply", "--server-side", "--filename", "-"], &definitions)?;
        self.server.kubectl(&["wait", "--for=condition=Established", "crd", "--all", "--timeout=60s"])?;
        command::wait_for("policies are served", SOON, || {
            Ok(self.server.kubectl(&["get", "authorizationpolicies,peerauthentications", "-A"]).is_ok().then_some(()))
        })
    }

    /// The webhook of deploy/, for objects of this namespace, at a replica: here no Service leads anywhere.
    fn ask_before(&self, replica: &Replica) -> Result<()> {
        let only = format!("namespaceSelector: {{matchLabels: {{kubernetes.io/metadata.name: {}}}}}", self.namespace);
        let webhook = sandbox::webhook_at(replica.webhook)?.replace("culvert-validator", self.namespace);
        self.server.apply(&webhook.replace("  sideEffects: None", &format!("  {only}\n  sideEffects: None")))?;
        replica.wait_logged("API servers trust the webhook's certificate")
    }

    /// What kubectl prints, on both streams, and whether it was content.
    fn kubectl(&self, arguments: &[&str], input: &str) -> Result<(bool, String)> {
        let mut kubectl = self.server.kubectl_command(&self.server.admin())?;
        kubectl.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = kubectl.spawn()?;
        child.stdin.take().context("kubectl's input")?.write_all(input.as_bytes())?;
        let output = child.wait_with_output()?;
        let text = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
        Ok((output.status.success(), text))
    }

    /// A policy that allows namespace `test`, to a port.
    fn allow(&self, name: &str, port: &str) -> String {
        format!(
            "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: {name}, namespace: {}}}\nspec:\n  rules:\n  \
             - from: [{{source: {{namespaces: [test]}}}}]\n    to: [{{operation: {{ports: [\"{port}\"]}}}}]\n",
            self.namespace
        )
    }

    /// A field of an AuthorizationPolicy.
    fn field(&self, name: &str, path: &str) -> Result<String> {
        let path = format!("jsonpath={path}");
        self.server.kubectl(&["get", "authorizationpolicy", name, "-n", self.namespace, "-o", &path])
    }

    fn until_field(&self, name: &str, path: &str, expected: &str) -> Result<()> {
        let mut found = String::new();
        command::wait_for(&format!("{path} of {name} is {expected:?}"), SETTLED, || {
            found = self.field(name, path)?;
            Ok((found == expected).then_some(()))
        })
        .with_context(|| format!("found {found:?}"))
    }

    fn leader(&self) -> Result<String> {
        let path = "jsonpath={.spec.holderIdentity}";
        self.server.kubectl(&[
            "get",
            "lease",
            "culvert-control",
            "-n",
            self.namespace,
            "--ignore-not-found",
            "-o",
            path,
        ])
    }

    fn wait_leader(&self, replica: &Replica, limit: Duration) -> Result<()> {
        command::wait_for(&format!("{} leads", replica.name), limit, || {
            Ok(self.leader()?.starts_with(&format!("{}_", replica.name)).then_some(()))
        })
    }
}

impl Replica {
    fn wait_ready(&self) -> Result<()> {
        let ready = command::wait_for(&format!("{} is ready", self.name), SOON, || {
            Ok(self.readiness().is_ok_and(|answer| answer.starts_with("HTTP/1.1 200")).then_some(()))
        });
        ready.with_context(|| self.end_of_log())
    }

    fn readiness(&self) -> Result<String> {
        let mut stream = TcpStream::connect_timeout(&self.readiness, Duration::from_secs(1))?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        write!(stream, "GET /healthz/ready HTTP/1.1\r\nhost: localhost\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        Ok(kill(Pid::from_raw(i32::try_from(self.child.id())?), signal)?)
    }

    fn log(&self) -> Result<String> {
        Ok(fs::read_to_string(&self.log)?)
    }

    fn wait_logged(&self, what: &str) -> Result<()> {
        let logged =
            command::wait_for(&format!("it logs {what:?}"), SOON, || Ok(self.log()?.contains(what).then_some(())));
        logged.with_context(|| self.end_of_log())
    }

    fn end_of_log(&self) -> String {
        let text = self.log().unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        format!("{}; the end of its log:\n    {}", self.name, lines[lines.len().saturating_sub(12)..].join("\n    "))
    }
}

/// An address of this machine on which nobody listens.
fn free_address() -> Result<SocketAddr> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?)
}

#[derive(Clone, PartialEq, prost::Message)]
struct CertificateRequest {
    #[prost(string, tag = "1")]
    csr: String,
    #[prost(int64, tag = "3")]
    validity_duration: i64,
    #[prost(message, optional, tag = "4")]
    metadata: Option<prost_types::Struct>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct CertificateResponse {
    #[prost(string, repeated, tag = "1")]
    cert_chain: Vec<String>,
}

/// What is asked for.
struct Question<'a> {
    token: Option<&'a str>,
    wanted: &'a str,
    /// The name in the signing request.
    name: &'a str,
}

impl<'a> Question<'a> {
    fn of(token: &'a str, wanted: &'a str) -> Self {
        Self { token: Some(token), wanted, name: wanted }
    }

    fn message(&self) -> Result<CertificateRequest> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = vec![SanType::URI(self.name.try_into()?)];
        let kind = Some(prost_types::value::Kind::StringValue(self.wanted.to_owned()));
        let fields = [("ImpersonatedIdentity".to_owned(), prost_types::Value { kind })].into();
        Ok(CertificateRequest {
            csr: params.serialize_request(&key)?.pem()?,
            validity_duration: 3600,
            metadata: Some(prost_types::Struct { fields }),
        })
    }
}

/// [I.4]: a genuine token for our audience, bound to a live pod of a trusted account, gets the identities of its node's pods; nobody
/// else gets anything, and the log says why.
#[test]
fn a_certificate_is_for_the_agent_of_the_node_that_the_identity_is_on() -> Result<()> {
    let cluster = Cluster::new("who-may")?;
    let replica = cluster.started("one")?;
    let roots = cluster.published(cluster.namespace)?;
    let chain = cluster.issue(&replica, &roots, "node-a", "web")?;
    ensure!(chain.len() == 2 && chain[1] == roots, "a leaf, and the roots that are published: {chain:?}");
    cluster.issue(&replica, &roots, "node-b", "far")?;

    let (token, web, far) = (cluster.token("node-a")?, cluster.identity("web"), cluster.identity("far"));
    let server = &cluster.server;
    let other_audience = server.token(cluster.namespace, "culvert", "istio-ca-2", Some("agent-node-a"))?;
    let unbound = server.token(cluster.namespace, "culvert", "istio-ca", None)?;
    let workload = server.token(cluster.namespace, "web", "istio-ca", Some("web"))?;
    let (head, rest) = token.split_once('.').context("a token has parts")?;
    let (_, signature) = rest.split_once('.').context("a token has three parts")?;
    let forged = format!("{head}.{}.{signature}", unbound.split('.').nth(1).context("claims")?);
    let foreign = web.replace("cluster.local", "elsewhere");
    let refused = Code::Unauthenticated;
    for (question, code, reason) in [
        (Question { token: None, ..Question::of("", &web) }, refused, "no bearer token"),
        (Question::of("nonsense", &web), refused, "not three parts"),
        (Question::of(&forged, &web), refused, "the API server does not accept the token"),
        (Question::of(&other_audience, &web), refused, "the API server does not accept the token"),
        (Question::of(&unbound, &web), refused, "not bound to a pod and a node"),
        (Question::of(&workload, &web), refused, "is not a trusted node account"),
        (Question::of(&token, &far), refused, "no running pod of the caller's node has"),
        (Question::of(&token, &foreign), refused, "is not of our trust domain"),
        (Question { name: &far, ..Question::of(&token, &web) }, Code::InvalidArgument, "must have one SAN"),
    ] {
        let status =
            cluster.ask(&replica, &roots, &question)?.err().with_context(|| format!("not refused: {reason}"))?;
        ensure!(status.code() == code, "{reason}: {status:?}");
        replica.wait_logged(reason)?;
    }
    ensure!(!replica.log()?.contains(&token), "a token is in the log");

    // The API server goes on accepting the token of a pod that is gone for some seconds; the CA does not.
    server.kubectl(&["delete", "pod", "agent-node-a", "-n", cluster.namespace, "--grace-period=0", "--force"])?;
    let gone = Instant::now();
    command::wait_for("the token of a pod that is gone is refused", SOON, || {
        let answer = cluster.ask(&replica, &roots, &Question::of(&token, &web))?;
        Ok(answer.is_err_and(|status| status.code() == Code::Unauthenticated).then_some(()))
    })?;
    println!("refused {} ms after the pod was gone", gone.elapsed().as_millis());
    replica.wait_logged("the cluster has no pod")?;

    // Who cannot ask says so, and the agent knows that it may come again.
    let token = cluster.token("node-b")?;
    server.kubectl(&["delete", "clusterrolebinding", cluster.namespace])?;
    let status = command::wait_for("tokens cannot be verified", SOON, || {
        // A decision of the authorizer is remembered for moments.
        let answer = cluster.ask(&replica, &roots, &Question::of(&token, &far))?;
        Ok(answer.err().filter(|status| status.code() == Code::Unavailable))
    })?;
    ensure!(status.message().contains("cannot be verified"), "{status:?}");
    replica.wait_logged("cannot create resource \\\"tokenreviews\\\"")
}

/// Two that start together make one root; it is in every namespace, in new ones too, whoever leads; and while one is killed the other
/// goes on issuing.
#[test]
fn two_replicas_have_one_root_and_one_leader() -> Result<()> {
    let cluster = Cluster::new("two-replicas")?;
    let (one, two) = (cluster.start("one")?, cluster.start("two")?);
    one.wait_ready()?;
    two.wait_ready()?;
    let roots = cluster.published(cluster.namespace)?;
    cluster.published_as("default", &roots)?;
    for replica in [&one, &two] {
        let chain = cluster.issue(replica, &roots, "node-a", "web")?;
        ensure!(chain.last() == Some(&roots), "{} has another root", replica.name);
    }
    let made =
        [&one, &two].map(|replica| replica.log().unwrap_or_default().matches("made a new self-signed root").count());
    ensure!(made.iter().sum::<usize>() == 1, "made {made:?} times");
    let leads =
        |replica: &Replica| Ok::<_, anyhow::Error>(cluster.leader()?.starts_with(&format!("{}_", replica.name)));
    command::wait_for("one leads", SOON, || Ok((leads(&one)? || leads(&two)?).then_some(())))?;
    let (leader, mut other) = if leads(&one)? { (one, two) } else { (two, one) };

    let namespace = |name: &str| cluster.server.namespace(name);
    namespace("two-replicas-new")?;
    cluster.published_as("two-replicas-new", &roots)?;
    cluster.server.kubectl(&["delete", "configmap", ROOTS, "-n", "two-replicas-new"])?;

    // Killed, it leads until its Lease has ended. Certificates are issued all the while.
    leader.signal(Signal::SIGKILL)?;
    let killed = Instant::now();
    let dead = leader.name.clone();
    drop(leader);
    while !leads(&other)? {
        ensure!(killed.elapsed() < TAKEN * patience(), "{dead} was killed and still leads: {}", other.end_of_log());
        cluster.issue(&other, &roots, "node-b", "far")?;
        std::thread::sleep(Duration::from_millis(500));
    }
    println!("another replica leads {:.1} s after the leader was killed", killed.elapsed().as_secs_f64());
    // What was removed by hand is put back by whoever leads now.
    cluster.published_as("two-replicas-new", &roots)?;

    // One that is told to end gives leadership away first.
    let next = cluster.started("three")?;
    let ended = Instant::now();
    other.signal(Signal::SIGTERM)?;
    let status = other.child.wait()?;
    ensure!(status.success(), "it ended with {status}: {}", other.end_of_log());
    cluster.wait_leader(&next, SOON)?;
    ensure!(other.log()?.contains("the Lease of the leader is given back"), "{}", other.end_of_log());
    println!("another replica leads {:.1} s after the leader was told to end", ended.elapsed().as_secs_f64());
    ensure!(cluster.issue(&next, &roots, "node-a", "web")?.last() == Some(&roots), "the root is the cluster's");
    Ok(())
}

/// What somebody else writes into the ConfigMap of the roots stays there, and it is said; one that was removed is put back.
#[test]
fn roots_of_somebody_else_are_left_alone() -> Result<()> {
    let cluster = Cluster::new("others-roots")?;
    cluster.server.kubectl(&[
        "create",
        "configmap",
        ROOTS,
        "-n",
        cluster.namespace,
        "--from-literal=root-cert.pem=theirs",
    ])?;
    let replica = cluster.started("one")?;
    replica.wait_logged("the roots cannot be published")?;
    let log = replica.log()?;
    ensure!(log.contains("conflict with") && log.contains("kubectl-create"), "{}", replica.end_of_log());
    // One that an earlier leader has left was there before.
    cluster.server.kubectl(&["delete", "configmap", ROOTS, "-n", "default", "--ignore-not-found"])?;
    command::wait_for("what was removed is put back", SETTLED, || Ok(cluster.roots("default")?.map(drop)))?;
    ensure!(cluster.roots(cluster.namespace)?.as_deref() == Some("theirs"), "they are somebody else's");
    Ok(())
}

/// A set as an operator plugs it in: an intermediate, with the roots that are to be trusted.
struct PluggedIn {
    ca_cert: String,
    ca_key: String,
    root: String,
}

impl PluggedIn {
    fn make() -> Result<Self> {
        let authority = |name: &str| {
            let mut params = CertificateParams::default();
            params.distinguished_name = DistinguishedName::new();
            params.distinguished_name.push(DnType::CommonName, name);
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            params
        };
        let (root_key, key) =
            (KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?, KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?);
        let params = authority("their root");
        let root = params.self_signed(&root_key)?.pem();
        let ca_cert = authority("their intermediate").signed_by(&key, &Issuer::new(params, root_key))?.pem();
        Ok(Self { ca_cert, ca_key: key.serialize_pem(), root })
    }

    fn secret(&self, namespace: &str, roots: &str) -> String {
        let data = [
            ("ca-cert.pem", self.ca_cert.clone()),
            ("ca-key.pem", self.ca_key.clone()),
            ("root-cert.pem", roots.to_owned()),
            ("cert-chain.pem", format!("{}{}", self.ca_cert, self.root)),
        ];
        let data: serde_json::Map<String, serde_json::Value> =
            data.into_iter().map(|(name, text)| (name.to_owned(), text.into())).collect();
        let metadata = serde_json::json!({ "name": "cacerts", "namespace": namespace });
        serde_json::json!({ "apiVersion": "v1", "kind": "Secret", "metadata": metadata, "stringData": data })
            .to_string()
    }
}

/// From a root that was made to one that is plugged in, with both trusted meanwhile; a set that cannot be used changes nothing.
#[test]
fn another_root_is_taken_over_without_a_restart() -> Result<()> {
    let cluster = Cluster::new("other-root")?;
    let replica = cluster.started("one")?;
    let old = cluster.published(cluster.namespace)?;
    let theirs = PluggedIn::make()?;
    let both = format!("{old}{}", theirs.root);

    // A key that is not the certificate's.
    let wrong = PluggedIn { ca_key: PluggedIn::make()?.ca_key, ..PluggedIn::make()? };
    cluster.server.apply(&wrong.secret(cluster.namespace, &both))?;
    replica.wait_logged("is not the key of")?;
    ensure!(cluster.issue(&replica, &old, "node-a", "web")?.last() == Some(&old), "what was before stays in use");
    ensure!(!replica.log()?.contains("PRIVATE KEY"), "a key is in the log");

    cluster.server.apply(&theirs.secret(cluster.namespace, &both))?;
    cluster.published_as("default", &both)?;
    // Whoever has only the old root cannot verify a CA with the new one any more; whoever has both can.
    let chain = cluster.issue(&replica, &both, "node-a", "web")?;
    ensure!(chain.len() == 3 && chain.last() == Some(&both), "leaf, intermediate, both roots: {chain:?}");
    ensure!(chain[1].trim() == theirs.ca_cert.trim(), "the intermediate has signed it");

    // Taken away while it runs: the key stays in use, and it is said.
    cluster.server.kubectl(&["delete", "secret", "cacerts", "istio-ca-secret", "-n", cluster.namespace])?;
    replica.wait_logged("put it back")?;
    cluster.issue(&replica, &both, "node-b", "far")?;
    Ok(())
}

/// A wrong policy is refused when it is written, with the place and the remedy; one that does less than it seems to has a warning; and
/// where the webhook does not answer, it is stored.
#[test]
fn a_wrong_policy_is_refused_when_it_is_written() -> Result<()> {
    let cluster = Cluster::new("webhook")?;
    cluster.define()?;
    let replica = cluster.started("one")?;
    cluster.ask_before(&replica)?;
    let apply = ["apply", "--filename", "-"];
    for arguments in [&apply[..], &["apply", "--dry-run=server", "--filename", "-"]] {
        let (taken, text) = cluster.kubectl(arguments, &cluster.allow("wrong", "http"))?;
        println!("# kubectl {}\n{text}", arguments.join(" "));
        ensure!(!taken && text.contains("spec.rules[0].to[0].operation.ports[0]"), "{text}");
        ensure!(
            text.contains("AuthorizationPolicy webhook/wrong") && text.contains("validation.culvert.dev"),
            "{text}"
        );
    }
    let layer7 = cluster.allow("layer7", "80").replace("ports: [\"80\"]", "methods: [GET]");
    let (taken, text) = cluster.kubectl(&apply, &layer7)?;
    println!("# kubectl apply\n{text}");
    ensure!(taken && text.contains("Warning: ") && text.contains("methods"), "{text}");
    let (taken, text) = cluster.kubectl(&apply, &cluster.allow("right", "80"))?;
    ensure!(taken && !text.contains("Warning"), "{text}");

    // In an editor it is the same.
    let edit = |change: &str| -> Result<(bool, String)> {
        let mut kubectl = cluster.server.kubectl_command(&cluster.server.admin())?;
        kubectl.args(["edit", "authorizationpolicy", "right", "-n", cluster.namespace]);
        let output = kubectl.env("KUBE_EDITOR", format!("sed -i {change}")).output()?;
        Ok((output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned()))
    };
    let (edited, text) = edit("s/\"80\"/\"81\"/")?;
    ensure!(edited && cluster.field("right", "{.spec.rules[0].to[0].operation.ports[0]}")? == "81", "{text}");
    let (edited, text) = edit("s/\"81\"/\"http\"/")?;
    ensure!(!edited && text.contains("no valid changes were saved"), "{text}");

    // Another root: API servers trust the new certificate within moments.
    let theirs = PluggedIn::make()?;
    cluster.server.apply(&theirs.secret(cluster.namespace, &theirs.root))?;
    replica.wait_logged("were changed: the new ones are in use")?;
    command::wait_for("the webhook answers with a certificate of the new root", SOON, || {
        Ok((!cluster.kubectl(&apply, &cluster.allow("wrong", "http"))?.0).then_some(()))
    })?;

    // While nobody answers it is stored; what is stored can lose a label whatever is wrong with it, and not get worse.
    replica.signal(Signal::SIGSTOP)?;
    let (taken, text) = cluster.kubectl(&apply, &cluster.allow("wrong", "http"))?;
    replica.signal(Signal::SIGCONT)?;
    ensure!(taken, "{text}");
    let (labelled, text) = cluster.kubectl(&["label", "ap", "wrong", "-n", cluster.namespace, "a=b"], "")?;
    ensure!(labelled && text.contains("Warning: "), "{text}");
    let (taken, text) = cluster.kubectl(&apply, &cluster.allow("wrong", "https"))?;
    ensure!(!taken, "another wrong spec is refused: {text}");
    cluster.server.kubectl(&["delete", "validatingwebhookconfiguration", cluster.namespace]).map(drop)
}

/// [C.6]: the last valid version is in the object, whoever leads; other managers' conditions are theirs.
#[test]
fn the_status_of_a_policy_has_the_last_valid_version() -> Result<()> {
    let cluster = Cluster::new("last-valid")?;
    cluster.define()?;
    let one = cluster.started("one")?;
    cluster.wait_leader(&one, SOON)?;
    let (generation, accepted) =
        ("{.status.culvert.lastValid.generation}", "{.status.conditions[?(@.type=='Accepted')].reason}");
    cluster.server.apply(&cluster.allow("kept", "80"))?;
    cluster.until_field("kept", generation, "1")?;
    cluster.until_field("kept", accepted, "Accepted")?;
    // Faster than the status is written: what the leader has seen is the last valid version.
    cluster.server.apply(&cluster.allow("kept", "81"))?;
    std::thread::sleep(Duration::from_millis(500));
    cluster.server.apply(&cluster.allow("kept", "http"))?;
    cluster.until_field("kept", accepted, "Invalid")?;
    cluster.until_field("kept", generation, "2")?;
    let ports = "{.status.culvert.lastValid.spec.rules[0].to[0].operation.ports[0]}";
    ensure!(cluster.field("kept", ports)? == "81", "{}", cluster.field("kept", ports)?);
    let message = cluster.field("kept", "{.status.conditions[?(@.type=='Accepted')].message}")?;
    ensure!(
        message.contains("spec.rules[0].to[0].operation.ports[0]") && message.contains("generation 2 stays"),
        "{message}"
    );

    // Another one leads: what is there is not written again.
    let version = cluster.field("kept", "{.metadata.resourceVersion}")?;
    drop(one);
    let two = cluster.started("two")?;
    cluster.wait_leader(&two, TAKEN)?;
    cluster.server.apply(&cluster.allow("later", "80"))?;
    cluster.until_field("later", generation, "1")?;
    ensure!(cluster.field("kept", "{.metadata.resourceVersion}")? == version, "it was written again");

    // istiod's conditions stay istiod's.
    cluster.server.apply(&cluster.allow("shared", "80"))?;
    let status = serde_json::json!({
        "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
        "metadata": {"name": "shared", "namespace": cluster.namespace},
        "status": {"conditions": [{"type": "ZtunnelAccepted", "status": "True", "reason": "Accepted", "message": "attached"}]}
    });
    let istiod = [
        "apply",
        "--server-side",
        "--force-conflicts",
        "--subresource=status",
        "--field-manager=istiod",
        "--filename",
        "-",
    ];
    cluster.server.kubectl_with(&istiod, &status.to_string())?;
    cluster.until_field("shared", generation, "1")?;
    cluster.server.apply(&cluster.allow("shared", "81"))?;
    cluster.until_field("shared", generation, "2")?;
    let types = cluster.field("shared", "{.status.conditions[*].type}")?;
    ensure!(types == "ZtunnelAccepted", "{types}");
    Ok(())
}

/// deploy/control is taken by a server as it is, and its pods also where the strictest Pod Security Standard is enforced.
#[test]
fn what_is_deployed_is_taken_where_pods_are_restricted() -> Result<()> {
    let server = apiserver::shared()?;
    let namespace = "restricted";
    server.namespace(namespace)?;
    server.kubectl(&["label", "namespace", namespace, "pod-security.kubernetes.io/enforce=restricted"])?;
    server.apply(&rights(namespace))?;
    let objects = DEPLOYED.replace("istio-system", namespace);
    server.apply(&objects)?;
    let path = "jsonpath={.spec.template.spec}";
    let spec = server.kubectl(&["get", "deployment", "culvert-control", "-n", namespace, "-o", path])?;
    let mut spec: serde_json::Value = serde_json::from_str(&spec)?;
    let pod = |spec: &serde_json::Value| {
        let metadata = serde_json::json!({ "name": "control", "namespace": namespace });
        serde_json::json!({ "apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec }).to_string()
    };
    let create = ["create", "--dry-run=server", "--filename", "-"];
    server.kubectl_with(&create, &pod(&spec))?;
    // It is enforced.
    spec["containers"][0]["securityContext"]["allowPrivilegeEscalation"] = true.into();
    let refused = server.kubectl_with(&create, &pod(&spec)).err().context("privileges may not grow")?;
    ensure!(format!("{refused:#}").contains("PodSecurity"), "{refused:#}");
    Ok(())
}

/// What is missing at the start is said by readiness and the log, and waited for.
#[test]
fn a_start_without_rights_names_them() -> Result<()> {
    let cluster = Cluster::new("no-rights")?;
    cluster.server.kubectl(&["delete", "rolebinding", cluster.namespace, "-n", cluster.namespace])?;
    let replica = cluster.start("one")?;
    replica.wait_logged("cannot get resource \\\"secrets\\\"")?;
    let answer = replica.readiness()?;
    ensure!(answer.starts_with("HTTP/1.1 503") && answer.contains("the CA's key and certificates"), "{answer}");
    cluster.server.apply(&rights(cluster.namespace))?;
    replica.wait_ready()
}
