//! What policy costs: compiling a whole cluster, compiling it again after one change, and deciding one connection, with
//! 10 000 pods and 10 to 10 000 AuthorizationPolicies. The figures are in docs/performance.md.
//!
//! `cargo bench -p culvert --bench policy`
#![expect(clippy::expect_used, reason = "a benchmark says what it expected")]

use std::{fmt::Write as _, hint::black_box};

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use culvert::{
    model::SpiffeId,
    policy::{self, Before, Client, Connection, Options, Snapshot, Workload},
    source::{View, review::Manifests},
};

const SIZES: [usize; 4] = [10, 100, 1_000, 10_000];

/// How many policies; the fewest where it is only tried whether all of this still runs (`-- --test`).
fn sizes() -> &'static [usize] {
    if std::env::args().any(|argument| argument == "--test") { &SIZES[..1] } else { &SIZES }
}

const NAMESPACES: usize = 50;
/// In each of them.
const PODS: usize = 200;

/// Where the policies are that a pod does not have to care for.
#[derive(Clone, Copy)]
enum Spread {
    /// In all namespaces alike, each for one workload.
    Cluster,
    /// All of them for the one pod that is asked about, each for a principal of its own.
    OnePod,
}

/// A cluster of fifty namespaces, with two hundred pods in each, and `policies`.
fn cluster(policies: usize, spread: Spread) -> View {
    let mut text = String::new();
    for namespace in 0..NAMESPACES {
        write!(
            text,
            "---\napiVersion: v1\nkind: Namespace\nmetadata: {{name: n{namespace}, labels: {{istio.io/dataplane-mode: ambient}}}}\n"
        )
        .expect("a string");
        for pod in 0..PODS {
            write!(
                text,
                "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: p{pod}, namespace: n{namespace}, uid: u{namespace}-{pod}, labels: {{app: p{pod}}}}}\n\
                 spec: {{nodeName: node-a, serviceAccountName: p{pod}, containers: [{{name: c}}]}}\n\
                 status: {{phase: Running, podIP: 10.1.{namespace}.{pod}, podIPs: [{{ip: 10.1.{namespace}.{pod}}}]}}\n"
            )
            .expect("a string");
        }
    }
    for policy in 0..policies {
        let (namespace, pod) = match spread {
            Spread::Cluster => (policy % NAMESPACES, policy / NAMESPACES % PODS),
            Spread::OnePod => (0, 0),
        };
        write!(
            text,
            "---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: a{policy}, namespace: n{namespace}}}\n\
             spec:\n  selector: {{matchLabels: {{app: p{pod}}}}}\n  rules: [{{from: [{{source: {{principals: [cluster.local/ns/n{}/sa/c{policy}]}}}}]}}]\n",
            policy % NAMESPACES
        )
        .expect("a string");
    }
    let view = Manifests::of("cluster.yaml", text).view("istio-system");
    assert!(view.problems.is_empty(), "{:?}", view.problems);
    view
}

fn server(snapshot: &Snapshot) -> &Workload {
    let found = snapshot.workloads.values().find(|own| *own.object.namespace == *"n0" && *own.object.name == *"p0");
    found.expect("the pod is there")
}

fn compile(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("compile");
    group.sample_size(10);
    for &size in sizes() {
        let (view, options) = (cluster(size, Spread::Cluster), Options::default());
        group.bench_function(BenchmarkId::new("from nothing", size), |bencher| {
            bencher.iter(|| policy::compile(black_box(&view.cluster), &options, None));
        });
        let before = policy::compile(&view.cluster, &options, None);
        let mut changed = view.cluster.as_ref().clone();
        let key = changed.authorization_policies.keys().next().expect("a policy").clone();
        changed.authorization_policies.remove(&key);
        let last = Before { cluster: &view.cluster, snapshot: &before };
        group.bench_function(BenchmarkId::new("after one change", size), |bencher| {
            bencher.iter(|| policy::compile(black_box(&changed), &options, Some(last)));
        });
    }
    group.finish();
}

fn decide(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("decide");
    for (name, spread) in [("policies of the cluster", Spread::Cluster), ("policies of the pod", Spread::OnePod)] {
        for &size in sizes() {
            let view = cluster(size, spread);
            let snapshot = policy::compile(&view.cluster, &Options::default(), None);
            let server = server(&snapshot);
            // The last policy's, so that a list would have been walked to its end.
            let last = (size - 1) / NAMESPACES * NAMESPACES;
            let client: SpiffeId = format!("spiffe://cluster.local/ns/n0/sa/c{last}").parse().expect("an identity");
            group.bench_function(BenchmarkId::new(name, size), |bencher| {
                bencher.iter(|| {
                    policy::decide(
                        black_box(&snapshot),
                        &Connection {
                            server: server.server(),
                            client: Client::Tunnel(black_box(&client)),
                            source_ip: Some([10, 1, 0, 1].into()),
                            destination_ip: Some([10, 1, 0, 0].into()),
                            port: 9080,
                        },
                    )
                });
            });
        }
    }
    group.finish();
}

criterion_group!(policies, compile, decide);
criterion_main!(policies);
