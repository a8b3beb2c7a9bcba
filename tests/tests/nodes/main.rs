//! The mesh on real nodes: kubelets, containerd, kube-proxy and CoreDNS, as kind makes them, with the DaemonSet of `deploy/`.
//!
//! A cluster takes half a minute, so all scenarios of this file share one, one after the other; each leaves it as it was. What
//! runs here looks like Rust's own test harness, so that its results are counted with all others.
//!
//! | file | what of it |
//! |---|---|
//! | `support`, `pods` | agents and load; pods and calls |
//! | `life` | updates, restarts and crashes of agents and of nodes; the mesh removed |
//! | `newcomers` | pods that have just been made, also while their node's agent is away |
//! | `probes` | a kubelet's probes of STRICT pods, and other processes of its node |
//! | `host` | pods of the node's own network, static pods, the control plane's |
//! | `services` | CoreDNS and kube-proxy |
//! | `owners` | Jobs, init containers, native sidecars, StatefulSets |
//! | `capabilities` | the agent without one of its capabilities |

mod capabilities;
mod host;
mod life;
mod newcomers;
mod owners;
mod pods;
mod probes;
mod services;
mod support;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, anyhow};
use culvert_tests::interrupt;
use culvert_tests::kind::stage::{Install, Scene};
use culvert_tests::kind::{Cluster, ClusterPlan};
use culvert_tests::oci;
use culvert_tests::sandbox::built;

/// A scenario: its name, and what is done.
type Scenario = (&'static str, fn(&mut Scene) -> Result<()>);

const SCENARIOS: &[Scenario] = &[
    ("the_scenario_of_the_sandbox_is_the_same_on_real_nodes", support::the_scenario),
    (
        "a_new_pod_neither_says_nor_hears_what_policy_forbids",
        newcomers::a_new_pod_neither_says_nor_hears_what_policy_forbids,
    ),
    ("a_pod_of_the_mesh_starts_as_fast_as_another", newcomers::a_pod_of_the_mesh_starts_as_fast_as_another),
    (
        "strict_pods_answer_their_kubelet_and_nobody_else_of_the_node",
        probes::strict_pods_answer_their_kubelet_and_nobody_else_of_the_node,
    ),
    ("pods_of_the_nodes_network_are_left_alone", host::pods_of_the_nodes_network_are_left_alone),
    ("a_static_pod_is_in_the_mesh_as_others_are", host::a_static_pod_is_in_the_mesh_as_others_are),
    (
        "a_control_plane_pod_is_replaced_while_the_agent_is_stopped",
        host::a_control_plane_pod_is_replaced_while_the_agent_is_stopped,
    ),
    ("names_and_services_outside_the_mesh_are_unharmed", services::names_and_services_outside_the_mesh_are_unharmed),
    (
        "a_jobs_first_call_is_tunnelled_and_its_end_forgotten",
        owners::a_jobs_first_call_is_tunnelled_and_its_end_forgotten,
    ),
    (
        "init_containers_and_native_sidecars_are_in_the_mesh",
        owners::init_containers_and_native_sidecars_are_in_the_mesh,
    ),
    ("pods_of_a_stateful_set_call_each_other_by_tunnel", owners::pods_of_a_stateful_set_call_each_other_by_tunnel),
    ("an_update_under_load_loses_no_connection", life::update),
    ("between_two_agents_connections_are_refused_and_never_readable", life::gap),
    ("kubelet_and_containerd_are_restarted_unnoticed", life::daemons),
    ("a_deleted_daemonset_leaves_nodes_and_pods_as_they_were", life::leave),
    ("a_mesh_deleted_at_once_leaves_nodes_and_pods_as_they_were", life::remove),
    // Last: it replaces the agents.
    (
        "an_agent_without_one_of_its_capabilities_says_which",
        capabilities::an_agent_without_one_of_its_capabilities_says_which,
    ),
];

/// Those that take minutes: a node that comes back, and clusters of their own. Only with `cargo xtask test --full`.
const FULL: &[Scenario] = &[
    ("a_node_that_was_killed_comes_back_into_the_mesh", life::node),
    (
        "services_outside_the_mesh_do_not_notice_agents_come_and_go",
        services::services_outside_the_mesh_do_not_notice_agents_come_and_go,
    ),
];

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words = words(&arguments);
    let is_wanted = |name: &str| words.is_empty() || words.iter().any(|word| name.contains(word));
    let full = if culvert_tests::full() { FULL } else { &[] };
    let all = || SCENARIOS.iter().chain(full);
    let wanted: Vec<&Scenario> = all().filter(|(name, _)| is_wanted(name)).collect();
    if arguments.iter().any(|word| word == "--list") {
        wanted.iter().for_each(|(name, _)| println!("{name}: test"));
        return ExitCode::SUCCESS;
    }
    println!("\nrunning {} tests", wanted.len());
    let begun = Instant::now();
    let failed = if wanted.is_empty() { Vec::new() } else { play(&wanted) };
    if !failed.is_empty() {
        println!("\nfailures:");
        failed.iter().for_each(|name| println!("    {name}"));
    }
    let word = if failed.is_empty() { "ok" } else { "FAILED" };
    println!(
        "\ntest result: {word}. {} passed; {} failed; 0 ignored; 0 measured; {} filtered out; finished in {:.2}s\n",
        wanted.len() - failed.len(),
        failed.len(),
        all().count() - wanted.len(),
        begun.elapsed().as_secs_f64()
    );
    if failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// The words that are parts of names, as Rust's harness has it; whatever else is said is about its own ways.
fn words(arguments: &[String]) -> Vec<&str> {
    const WITH_VALUE: [&str; 4] = ["--test-threads", "--format", "--color", "-Z"];
    let mut words = Vec::new();
    let mut all = arguments.iter().map(String::as_str);
    while let Some(word) = all.next() {
        if WITH_VALUE.contains(&word) {
            all.next();
        } else if !word.starts_with('-') {
            words.push(word);
        }
    }
    words
}

/// Plays scenarios, and gives the names of those that failed.
fn play(wanted: &[&Scenario]) -> Vec<&'static str> {
    let all = || wanted.iter().map(|(name, _)| *name).collect();
    let mut scene = match raise() {
        Ok(scene) => scene,
        Err(error) => {
            println!("the cluster: {error:#}");
            return all();
        }
    };
    let mut failed = Vec::new();
    for (name, scenario) in wanted {
        let begun = Instant::now();
        // One that panics has failed, and the cluster is still to be taken away.
        // The one before may have brought other agents.
        let result = catch_unwind(AssertUnwindSafe(|| scene.look_again().and_then(|()| scenario(&mut scene))));
        let result = result.unwrap_or_else(|_| Err(anyhow!("it panicked; the reason is above")));
        match result.and_then(|()| interrupt::check()) {
            Ok(()) => println!("test {name} ... ok"),
            Err(error) => {
                println!("test {name} ... FAILED\n{error:#}\n{}", scene.state());
                failed.push(*name);
            }
        }
        eprintln!("  {name}: {:.1} s", begun.elapsed().as_secs_f64());
    }
    if let Err(error) = scene.take_down() {
        println!("the cluster could not be taken down: {error:#}");
        return all();
    }
    failed
}

/// A cluster with the scenario's pods, the mesh, and both of its namespaces in it.
fn raise() -> Result<Scene> {
    interrupt::catch()?;
    let cluster = Cluster::create(ClusterPlan::for_test("nodes"))?;
    let archive = cluster.dir().join("culvert.tar");
    let binary = oci::culvert::strip(&built("culvert")?, &cluster.dir().join("culvert"))?;
    oci::culvert::pack(&binary, concat!("culvert:", env!("CARGO_PKG_VERSION")), &archive)?;
    let scene = Scene::set(cluster)?;
    scene.install(&Install::from_checkout(archive).for_tests()).context("install the mesh")?;
    scene.enroll()?;
    Ok(scene)
}
