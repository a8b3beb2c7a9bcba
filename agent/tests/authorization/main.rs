//! AuthorizationPolicy from the text of a manifest to the verdict about a connection (specification §6): row by row, and
//! against a second evaluator that does it the slow way.

use std::net::IpAddr;

use culvert::{
    model::{PodUid, SpiffeId},
    policy::{self, Client, Connection, DecidedBy, Options, Snapshot, Verdict},
    source::{View, review::Manifests},
};

mod kernel;
mod oracle;
mod rows;
mod validity;

/// What every test has: two namespaces in the mesh, a root namespace, one that is out, and pods in them.
const CLUSTER: &str = "\
apiVersion: v1
kind: Namespace
metadata: {name: test, labels: {istio.io/dataplane-mode: ambient}}
---
apiVersion: v1
kind: Namespace
metadata: {name: default, labels: {istio.io/dataplane-mode: ambient}}
---
apiVersion: v1
kind: Namespace
metadata: {name: istio-system, labels: {istio.io/dataplane-mode: ambient}}
";

fn pod(namespace: &str, name: &str, labels: &str, [v4, v6]: [&str; 2]) -> String {
    format!(
        "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: {namespace}, uid: {namespace}.{name}, \
         labels: {{{labels}}}}}\nspec: {{nodeName: node-1, serviceAccountName: {name}, containers: [{{name: c, image: i}}]}}\n\
         status: {{podIP: \"{v4}\", podIPs: [{{ip: \"{v4}\"}}, {{ip: \"{v6}\"}}], phase: Running}}\n"
    )
}

fn mesh(text: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: ConfigMap\nmetadata: {{name: istio, namespace: istio-system}}\ndata:\n  mesh: '{text}'\n"
    )
}

/// A policy; `meta` and `spec` in flow style.
fn authz(namespace: &str, name: &str, meta: &str, spec: &str) -> String {
    format!(
        "---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\n\
         metadata: {{name: {name}, namespace: {namespace}{meta}}}\nspec: {spec}\n"
    )
}

fn view(policies: &[String]) -> View {
    let pods = [
        pod("test", "nginx", "app: nginx", ["10.0.0.1", "fd00::1:1"]),
        pod("default", "web", "app: web, tier: x", ["10.0.0.2", "fd00::1:2"]),
        pod("istio-system", "gateway", "app: gateway", ["10.0.0.3", "fd00::1:3"]),
        pod("outside", "legacy", "app: nginx", ["10.0.0.4", "fd00::1:4"]),
    ];
    let text = CLUSTER.to_owned() + &pods.concat() + &policies.concat();
    Manifests::of("manifests.yaml", text).view("istio-system")
}

fn compiled(policies: &[String]) -> Snapshot {
    policy::compile(&view(policies).cluster, &Options::default(), None)
}

/// A compiled cluster whose manifests are all valid.
fn valid(policies: &[String]) -> Snapshot {
    let view = view(policies);
    assert_eq!(view.problems, [], "{policies:?}");
    policy::compile(&view.cluster, &Options::default(), None)
}

/// A client of a test: an identity, as `trust domain/namespace/service account`, or plaintext; its address.
#[derive(Clone, Copy)]
struct From<'a>(Option<&'a str>, &'a str);

const PLAIN: From<'_> = From(None, "10.1.0.9");
const WEB: From<'_> = From(Some("cluster.local/default/web"), "10.0.0.2");

fn identity(text: &str) -> SpiffeId {
    let parts: Vec<&str> = text.split('/').collect();
    format!("spiffe://{}/ns/{}/sa/{}", parts[0], parts[1], parts[2]).parse().expect("an identity of a test")
}

fn judge(snapshot: &Snapshot, from: From<'_>, pod: &str, port: u16) -> Verdict {
    let workload = snapshot.workload(&PodUid(pod.into())).expect("a pod of the test");
    let identity = from.0.map(identity);
    let source: IpAddr = from.1.parse().expect("an address of a test");
    let same_family = |ip: &&IpAddr| ip.is_ipv4() == source.to_canonical().is_ipv4();
    let connection = Connection {
        server: workload.server(),
        client: identity.as_ref().map_or(Client::Plain, Client::Tunnel),
        source_ip: Some(source),
        destination_ip: workload.ips.iter().find(same_family).copied(),
        port,
    };
    policy::decide(snapshot, &connection)
}

/// `allow-match test/p#0`, `no-allow-match`: the reason, and what decided.
fn said(verdict: &Verdict) -> String {
    let by = match &verdict.decided_by {
        Some(DecidedBy::AuthorizationPolicy(rule)) => format!(" {rule}"),
        Some(DecidedBy::PeerAuthentication(object)) => format!(" {object}"),
        None => String::new(),
    };
    verdict.reason.as_str().to_owned() + &by
}

/// About nginx, on port 80.
fn nginx(snapshot: &Snapshot, from: From<'_>) -> String {
    said(&judge(snapshot, from, "test.nginx", 80))
}
