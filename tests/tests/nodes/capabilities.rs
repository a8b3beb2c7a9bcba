//! Each capability of the agent's container is needed, and an agent that lacks one says which.

use anyhow::{Context, Result, ensure};
use culvert_tests::command;
use culvert_tests::kind::stage::{SYSTEM, Scene};
use serde_json::{Value, json};

use super::pods::{LIMIT, NGINX, SERVER};
use culvert_tests::tour::Stage as _;

const PATH: &str = "/spec/template/spec/containers/0/securityContext/capabilities/add";

/// An update of the DaemonSet that takes one of its capabilities away does not get past its first node: the new agent says what
/// it lacks, and the old one goes on.
pub(crate) fn an_agent_without_one_of_its_capabilities_says_which(scene: &mut Scene) -> Result<()> {
    let set = scene.cluster.get(&["daemonset", "--namespace", SYSTEM, "culvert"])?;
    let all = set.pointer(PATH).and_then(Value::as_array).context("the agent's capabilities")?.clone();
    ensure!(all.len() > 1, "the agent's capabilities are {all:?}");
    let judged = all.iter().try_for_each(|without| lacks(scene, &all, without));
    give(scene, &all)?;
    scene.rolled_out()?;
    judged
}

fn lacks(scene: &Scene, all: &[Value], without: &Value) -> Result<()> {
    let rest: Vec<Value> = all.iter().filter(|one| *one != without).cloned().collect();
    let name = without.as_str().context("a capability's name")?;
    give(scene, &rest)?;
    let mut said = String::new();
    command::wait_for(&format!("an agent says that it lacks {name}"), LIMIT, || {
        said = logs_without(scene, name)?;
        Ok(said.contains(&format!("without {name} ")).then_some(()))
    })
    .with_context(|| format!("it says {said}"))?;
    let to = std::net::SocketAddr::new(scene.pod_ip(SERVER)?, 9080);
    let result = scene.call(NGINX, to, "capabilities")?;
    ensure!(result.status == Some(200), "without {name} in the new agent, the old one did not go on: {result:?}");
    Ok(())
}

fn give(scene: &Scene, capabilities: &[Value]) -> Result<()> {
    let patch = json!([{ "op": "replace", "path": PATH, "value": capabilities }]).to_string();
    let patch = ["patch", "daemonset", "--namespace", SYSTEM, "culvert", "--type=json", "--patch", &patch];
    scene.cluster.kubectl(&patch).map(drop)
}

/// What agents say whose container lacks this one.
fn logs_without(scene: &Scene, name: &str) -> Result<String> {
    let pods = scene.cluster.get(&["pods", "--namespace", SYSTEM, "--selector=app=culvert"])?;
    let mut said = String::new();
    for pod in pods["items"].as_array().context("a list of pods")? {
        let has = pod["spec"]["containers"][0]["securityContext"]["capabilities"]["add"].as_array();
        if has.is_some_and(|has| has.iter().any(|one| one == name)) {
            continue;
        }
        let pod = pod["metadata"]["name"].as_str().context("a pod's name")?;
        let logs = ["logs", "--namespace", SYSTEM, "--container=agent", pod];
        // One that has not begun has said nothing yet.
        said += &scene.cluster.kubectl(&logs).unwrap_or_default();
    }
    Ok(said)
}
