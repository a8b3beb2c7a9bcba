//! `run --cluster kind`: the user's scenario with real pods, on a cluster that kind makes.

use anyhow::Result;
use culvert_tests::kind::stage::{Install, SYSTEM, Scene};
use culvert_tests::kind::{Cluster, ClusterPlan};
use culvert_tests::sandbox::Node;

use super::Arguments;
use crate::{build, image, kind_image, say, setup};

pub(super) fn run(arguments: &Arguments) -> Result<()> {
    let ready = setup::run(setup::For::Run)?;
    // Both at once, where neither is built yet.
    let parts = setup::kubernetes(setup::Wanted::Nodes)?;
    build::run(&ready)?;
    parts.finish()?;
    kind_image::build()?;
    let image = image::for_tests()?;
    let mut plan = ClusterPlan::new(&arguments.name);
    plan.workers = arguments.workers.into();
    let step = say::step(&format!("make a cluster of {} nodes with kind", plan.workers + 1));
    let cluster = Cluster::create(plan)?;
    step.done();
    let mut scene = Scene::set(cluster)?;
    let result = play(&mut scene, &Install::from_checkout(image).for_tests(), arguments);
    let step = say::step("take the cluster down");
    scene.take_down()?;
    step.done();
    result
}

fn play(scene: &mut Scene, install: &Install, arguments: &Arguments) -> Result<()> {
    let step = say::step("install Culvert from deploy/, and wait until every node has it");
    scene.install(install)?;
    step.done();
    let step = say::step("label the namespaces default and test into the mesh");
    scene.enroll()?;
    step.done();
    println!(
        "\nProductpage (namespace default, node {}, in the mesh) is called by Nginx (namespace test, node {}, in the mesh) and\n\
         Legacy-app (namespace test, same node, out of the mesh) while its policies change. Observed are the HTTP result that the\n\
         client got, the identity that the access log of the server's agent names (spiffe://cluster.local/…), and whether the request\n\
         was found, readable, in a recording of everything that crossed between the nodes.\n",
        scene.node(Node::B)?.name,
        scene.node(Node::A)?.name,
    );
    // What of it ends, the cluster starts again.
    super::show(scene, arguments.once, |scene| Ok(try_next(scene)), |_| Ok(()))
}

/// Three things to try; the namespace is STRICT at this moment.
fn try_next(scene: &Scene) -> String {
    let kubectl = scene.cluster.kubectl_words();
    format!(
        "The cluster stays up until Ctrl-C; default is STRICT now. In another terminal:\n  \
         alias k='{kubectl}'\n  \
         k -n test exec legacy-app -- culvert-pod http-get --to $(k get service productpage -o 'jsonpath={{.spec.clusterIP}}'):9080\n  \
         k edit peerauthentication namespace    change STRICT to PERMISSIVE, call again\n  \
         k -n {SYSTEM} exec daemonset/culvert -- culvert workloads"
    )
}
