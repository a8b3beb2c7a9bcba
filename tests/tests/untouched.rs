//! What a pod of the mesh has as it had it before: the settings of its network ([E.5]; specification §3).

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use culvert_tests::sandbox::{Family, MeshPlan, Node, Plan, PodPlan, Sandbox, built, own_name};
use culvert_tests::{command, patience};

const HTTP: u16 = 9080;
const SOON: Duration = Duration::from_secs(10);

/// Every setting of a pod's network namespace, by path.
fn settings(sandbox: &Sandbox, pod: &str) -> Result<BTreeMap<PathBuf, String>> {
    sandbox.pod(pod)?.place.inside(|| {
        let (mut all, mut folders) = (BTreeMap::new(), vec![PathBuf::from("/proc/sys/net")]);
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(&folder).with_context(|| format!("list {}", folder.display()))? {
                let entry = entry?;
                if entry.file_type()?.is_dir() {
                    folders.push(entry.path());
                } else {
                    // Some cannot be read before they are set, and that is to stay so.
                    let value = fs::read(entry.path());
                    let text = value.map_or_else(|error| error.to_string(), |all| String::from_utf8_lossy(&all).into());
                    all.insert(entry.path(), text);
                }
            }
        }
        // Not a setting: it counts.
        all.remove(Path::new("/proc/sys/net/netfilter/nf_conntrack_count"));
        Ok(all)
    })
}

/// How many pods of node a have the inbound program.
fn enrolled(sandbox: &Sandbox) -> Result<usize> {
    let links = fs::read_dir(sandbox.pin_dir(Node::A).join("links")).context("list the links")?;
    Ok(links.filter_map(Result::ok).filter(|link| link.file_name().as_encoded_bytes().starts_with(b"inbound_")).count())
}

fn differences(before: &BTreeMap<PathBuf, String>, now: &BTreeMap<PathBuf, String>) -> Vec<String> {
    let paths = before.keys().chain(now.keys()).collect::<std::collections::BTreeSet<_>>();
    let differ = paths.into_iter().filter(|path| before.get(*path) != now.get(*path));
    differ.map(|path| format!("{}: {:?}, now {:?}", path.display(), before.get(path), now.get(path))).collect()
}

/// No setting of a pod's network is another one while it is in the mesh, nor after it has left.
#[test]
fn no_setting_of_a_pods_network_is_changed() -> Result<()> {
    let plan = Plan::empty(&own_name("untouched"))
        .pod(PodPlan::new(Node::A, "test", "client").label("istio.io/dataplane-mode", "none").http(&[HTTP]))
        .pod(PodPlan::new(Node::B, "test", "server").http(&[HTTP]));
    let mut sandbox = Sandbox::build(plan)?;
    sandbox.start_mesh(&MeshPlan::new(built("culvert")?))?;
    let (client, server) = ("test/client", sandbox.pod("test/server")?.at(Family::V4, HTTP));
    let answers = || {
        command::wait_for("the server answers", SOON * patience(), || {
            Ok((sandbox.http(client, server, "call")?.status == Some(200)).then_some(()))
        })
    };
    let becomes = |pods| {
        command::wait_for(&format!("{pods} pods are enrolled"), SOON * patience(), || {
            Ok((enrolled(&sandbox)? == pods).then_some(()))
        })
    };
    answers()?;
    let before = settings(&sandbox, client)?;
    ensure!(before.len() > 100, "{before:?}");
    let file = "pod-test-client.yaml";
    let outside = fs::read_to_string(sandbox.manifests().path().join(file))?;
    let inside: String =
        outside.lines().filter(|line| !line.contains("dataplane-mode")).map(|line| format!("{line}\n")).collect();
    ensure!(enrolled(&sandbox)? == 0 && inside != outside, "{outside}");

    sandbox.manifests().apply(file, &inside)?;
    becomes(1)?;
    answers()?;
    let differ = differences(&before, &settings(&sandbox, client)?);
    ensure!(differ.is_empty(), "in the mesh: {differ:#?}");

    sandbox.manifests().apply(file, &outside)?;
    becomes(0)?;
    answers()?;
    let differ = differences(&before, &settings(&sandbox, client)?);
    ensure!(differ.is_empty(), "after it has left: {differ:#?}");
    Ok(())
}
