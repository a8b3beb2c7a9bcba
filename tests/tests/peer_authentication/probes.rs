//! Connections from the node itself: the kubelet's, and everybody else's ([K.1], [K.5]).

use std::time::Duration;
use std::{fs, thread};

use anyhow::{Context, Result, ensure};
use culvert_common::Reason;
use culvert_tests::command;
use culvert_tests::programs::{HttpResult, Probe, ProbeResult};
use culvert_tests::sandbox::{Family, Node, Sandbox, built};

use super::support::{SERVER, Want, check, counted, end_of_log, line, mesh, now_ms, plan, put, strict};

fn get(sandbox: &Sandbox, place: &culvert_tests::sandbox::Place, family: Family) -> Result<HttpResult> {
    let to = sandbox.pod(SERVER)?.at(family, 9080).to_string();
    sandbox.call_at(place, &["http-get", "--to", &to])
}

/// Results of node b's kubelet about the server that began after `since`, once there are `count`.
fn probes(sandbox: &Sandbox, since: u64, count: usize) -> Result<Vec<ProbeResult>> {
    command::wait_for(&format!("{count} probes"), Duration::from_secs(10), || {
        let results = sandbox.probes(Node::B)?;
        let new: Vec<_> = results.into_iter().filter(|p| p.pod == SERVER && p.at_ms > since).collect();
        Ok((new.len() >= count).then_some(new))
    })
}

fn all_well(results: &[ProbeResult]) -> Result<()> {
    for result in results {
        ensure!(result.ok, "{result:?}");
        let source = result.source_seen.context("the pod said whom it saw")?;
        ensure!(source.ip() == Node::B.pod_v4(1), "a probe must come from the node's address: {result:?} [K.5]");
    }
    Ok(())
}

/// [K.1], [K.5]: in every mode, seen from the node's address as without a mesh; nobody else on any node is exempt.
#[test]
fn kubelets_reach_strict_pods_and_no_other_process_of_a_node_does() -> Result<()> {
    let sandbox = mesh(plan("t-probes"))?;
    all_well(&probes(&sandbox, now_ms(), 2)?).context("no policy")?;
    for node in Node::ALL {
        check(&get(&sandbox, sandbox.node_place(node), Family::V4)?, Want::Plain).context("no policy")?;
    }
    put(&sandbox, &[strict("istio-system")])?;
    let counted_before = counted(&sandbox, SERVER, Reason::Probe)?;
    all_well(&probes(&sandbox, now_ms(), 3)?).context("STRICT")?;
    ensure!(counted(&sandbox, SERVER, Reason::Probe)? >= counted_before + 3, "probes are counted as such");
    for family in [Family::V4, Family::V6] {
        let kubelet = get(&sandbox, &sandbox.kubelet_place(Node::B)?, family)?;
        check(&kubelet, Want::Plain).with_context(|| format!("the kubelet over {family:?}: {}", kubelet.brief()))?;
        for (who, place) in [
            ("another process of the node", sandbox.node_place(Node::B).clone()),
            ("a process of the other node", sandbox.node_place(Node::A).clone()),
            ("the kubelet of the other node", sandbox.kubelet_place(Node::A)?),
            ("another process in the agent's cgroup", sandbox.agent_place(Node::B)?),
        ] {
            let got = get(&sandbox, &place, family)?;
            check(&got, Want::Refused).with_context(|| format!("{who} over {family:?}: {}", got.brief()))?;
        }
    }
    Ok(())
}

/// [K.5]: systemd removes a service's cgroup when it stops and makes another one when it starts again.
#[test]
fn a_kubelet_that_restarts_in_a_new_cgroup_still_reaches_strict_pods() -> Result<()> {
    let mut sandbox = mesh(plan("t-kubelet"))?;
    put(&sandbox, &[strict("istio-system")])?;
    all_well(&probes(&sandbox, now_ms(), 1)?)?;
    let offset = end_of_log(&sandbox, Node::B)?;
    sandbox.stop("kubelet-b")?;
    let dir = sandbox.kubelet_place(Node::B)?.cgroup;
    let old = std::os::unix::fs::MetadataExt::ino(&fs::metadata(&dir)?);
    fs::remove_dir(&dir).with_context(|| format!("remove {}", dir.display()))?;
    line(&sandbox, Node::B, offset, "the kubelet's cgroup is gone", |l| l.message().contains("no kubelet's cgroup"))?;
    let place = sandbox.kubelet_place(Node::B)?;
    ensure!(std::os::unix::fs::MetadataExt::ino(&fs::metadata(&dir)?) != old, "a new cgroup");
    // A kubelet needs longer than this to start; the agent needs an inotify event.
    thread::sleep(Duration::from_millis(100));
    let since = now_ms();
    let probe = Probe { pod: SERVER.to_owned(), to: sandbox.pod(SERVER)?.at(Family::V4, 9080) };
    let mut kubelet = place.command(built("culvert-pod")?)?;
    kubelet.arg("kubelet").arg("--out").arg(sandbox.dir().join("probes-b.jsonl"));
    kubelet.args(["--probe", &probe.to_string()]);
    sandbox.start("kubelet-b", kubelet)?;
    all_well(&probes(&sandbox, since, 3)?)?;
    let got = get(&sandbox, sandbox.node_place(Node::B), Family::V4)?;
    check(&got, Want::Refused).context("others stay refused")
}
