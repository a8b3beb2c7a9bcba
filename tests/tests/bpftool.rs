//! The maps of a running agent, read by the real `bpftool`: the names that it prints are the ones that `docs/maps.md`
//! explains, and the other way round.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use culvert_common::{LAYOUT_VERSION, Reason};
use culvert_tests::command;
use culvert_tests::programs::AttackResult;
use culvert_tests::sandbox::{Family, MeshPlan, Node, Plan, PodPlan, Sandbox, built, own_name};
use serde_json::Value;

/// Maps of which `bpftool` can show whole entries; of the others it shows only the keys, or nothing.
const SHOWN: [&str; 17] = [
    "PODS",
    "POD_ADDRS",
    "MODES",
    "SOURCES",
    "PORTS",
    "AUTHORIZATION",
    "FLOWS",
    "OLDER",
    "VETHS",
    "UDP_PODS",
    "UDP_REFUSALS",
    "VERDICTS",
    "HEARTBEAT",
    "SETTINGS",
    "GATE",
    "GATE_LEVELS",
    "NODE_ADDRS",
];
/// A port whose connections are dropped, so that a handshake lasts.
const QUIET: u16 = 4444;

fn page() -> Result<String> {
    Ok(fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/maps.md"))?)
}

/// The maps, by what the kernel programs' source says.
fn declared() -> Result<Vec<String>> {
    let source = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../ebpf/src/maps.rs"))?;
    let names = source.lines().filter_map(|line| line.strip_prefix("pub(crate) static ")?.split(':').next());
    Ok(names.map(str::to_owned).collect())
}

/// The part of the page that is about one map.
fn section<'a>(page: &'a str, map: &str) -> Result<&'a str> {
    let (_, rest) = page.split_once(&format!("\n## {map}\n")).with_context(|| format!("docs/maps.md on {map}"))?;
    Ok(rest.split_once("\n## ").map_or(rest, |(section, _)| section))
}

/// Folders of a layout that a page names.
fn directories(page: &str) -> BTreeSet<String> {
    let after = page.split("/sys/fs/bpf/culvert/").skip(1);
    after.filter_map(|rest| Some(rest.split(['/', '`', '\n', ' ']).next()?.to_owned())).collect()
}

/// What is copied from any page works with this version.
#[test]
fn no_page_names_the_folder_of_another_layout() -> Result<()> {
    let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs");
    let mut named = 0;
    for entry in fs::read_dir(&docs).context("list docs")? {
        let path = entry?.path();
        if path.extension().is_none_or(|extension| extension != "md") {
            continue;
        }
        let page = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
        for directory in directories(&page) {
            ensure!(directory == format!("v{LAYOUT_VERSION}"), "{} names {directory}", path.display());
            named += 1;
        }
    }
    ensure!(named >= 2, "only {named} pages name the folder of the maps");
    Ok(())
}

#[test]
fn every_map_and_every_reason_is_explained() -> Result<()> {
    let (page, maps) = (page()?, declared()?);
    ensure!(maps.len() >= 10, "found only {maps:?}");
    for map in &maps {
        section(&page, map)?;
        ensure!(page.contains(&format!("| [{map}](#{})", map.to_lowercase())), "{map} is not in the list");
    }
    ensure!(directories(&page) == BTreeSet::from([format!("v{LAYOUT_VERSION}")]), "{:?}", directories(&page));
    let verdicts = section(&page, "VERDICTS")?;
    for reason in Reason::ALL {
        let row = format!("| {} | `{}` |", reason as u8, reason.as_str());
        ensure!(verdicts.contains(&row), "{row}");
    }
    Ok(())
}

/// Names of fields, at any depth.
fn names(value: &Value, into: &mut BTreeSet<String>) {
    match value {
        Value::Object(fields) => {
            for (name, field) in fields {
                into.insert(name.clone());
                names(field, into);
            }
        }
        Value::Array(items) => items.iter().for_each(|item| names(item, into)),
        _ => {}
    }
}

/// Every map of a running agent is dumped with field names, and these are the page's.
#[test]
fn what_bpftool_shows_is_what_the_page_explains() -> Result<()> {
    let mut sandbox = Sandbox::build(
        Plan::empty(&own_name("bpftool"))
            .pod(PodPlan::new(Node::A, "test", "server").http(&[9080]).probed(9080))
            .pod(PodPlan::new(Node::A, "test", "client").label("culvert.io/udp", "refuse")),
    )?;
    // Two modes, so that MODES has an entry; a policy that tells plaintext apart by address and port.
    sandbox.manifests().apply(
        "policy.yaml",
        "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: strict, namespace: test}\n\
         spec: {selector: {matchLabels: {app: server}}, mtls: {mode: STRICT}, portLevelMtls: {\"9090\": {mode: PERMISSIVE}}}\n\
         ---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: callers, namespace: test}\n\
         spec: {selector: {matchLabels: {app: server}}, rules: [{from: [{source: {ipBlocks: [10.244.0.0/16]}}], \
         to: [{operation: {ports: [\"9090\"]}}]}, {from: [{source: {principals: [\"*\"]}}]}]}\n",
    )?;
    sandbox.start_mesh(&MeshPlan::new(built("culvert")?))?;
    let server = sandbox.pod("test/server")?.clone();
    sandbox.http("test/client", server.at(Family::V4, 9080), "counted")?;
    let datagram = server.at(Family::V4, 8125).to_string();
    let _: AttackResult =
        sandbox.call("test/client", &["attack", "--way", "udp", "--to", &datagram, "--marker", "u"])?;
    // A probe that stays in its handshake: the kubelet asks a port whose packets are dropped.
    let drop = format!(
        "table inet quiet {{\nchain in {{\ntype filter hook input priority 0\ntcp dport {QUIET} drop\n}}\n}}\n"
    );
    let mut nft = server.place.command(command::find("nft")?)?;
    command::finish(nft.args(["-f", "-"]), Some(&drop))?;
    let mut probe = sandbox.kubelet_place(Node::A)?.command(built("culvert-pod")?)?;
    let to = server.at(Family::V4, QUIET).to_string();
    let mut probe = probe.args(["http-get", "--to", &to, "--timeout-ms", "120000"]).spawn()?;
    let dumped = dump_all(&sandbox);
    probe.kill()?;
    probe.wait()?;
    dumped
}

fn dump_all(sandbox: &Sandbox) -> Result<()> {
    let page = page()?;
    for map in declared()? {
        let pin = sandbox.pin_dir(Node::A).join(format!("v{LAYOUT_VERSION}")).join(&map);
        let pin = pin.to_str().context("a path of the sandbox")?;
        let shown: Value = serde_json::from_str(&command::run("bpftool", &["-j", "map", "show", "pinned", pin])?)?;
        ensure!(shown["name"] == map.as_str(), "{shown}");
        let kind = shown["type"].as_str().unwrap_or_default();
        ensure!(page.contains(&format!("](#{}) | {kind} |", map.to_lowercase())), "{map} is of type {kind}");
        if map == "LISTENERS" {
            let dump = command::run("bpftool", &["-j", "map", "dump", "pinned", pin])?;
            let dump: Value = serde_json::from_str(&dump)?;
            let keys = dump.as_array().context("a list of keys")?;
            ensure!(
                !keys.is_empty() && keys.iter().all(|entry| entry["key"].as_array().is_some_and(|k| k.len() == 16)),
                "{dump}"
            );
        }
        if !SHOWN.contains(&map.as_str()) {
            continue;
        }
        let entries = command::wait_for(&format!("{map} has an entry"), Duration::from_secs(10), || {
            let dump = command::run("bpftool", &["-j", "map", "dump", "pinned", pin])?;
            let dump: Value = serde_json::from_str(&dump).with_context(|| format!("{map}: {dump}"))?;
            Ok(dump.as_array().filter(|entries| !entries.is_empty()).cloned())
        })?;
        let section = section(&page, &map)?;
        let mut found = BTreeSet::new();
        for entry in &entries {
            let formatted = entry.get("formatted").unwrap_or(entry);
            ensure!(formatted.get("key").is_some(), "{map}: an entry without names: {entry}");
            names(formatted, &mut found);
        }
        let (example, table) = section.rsplit_once("```").context("an example")?;
        for name in &found {
            // As bpftool prints it in the example; and explained, unless it only holds others or is padding.
            ensure!(example.contains(&format!("\"{name}\":")), "{map}: {name} is not in the example");
            let holds = ["key", "value", "values", "_pad", "bytes", "data"].contains(&name.as_str());
            ensure!(holds || table.contains(&format!("`{name}`")), "{map}: {name} is not explained");
        }
        let explained = table.lines().filter_map(|line| line.strip_prefix("| `")?.split_once(" | "));
        for name in explained.flat_map(|(names, _)| names.split("`, `")).map(|name| name.trim_end_matches('`')) {
            ensure!(
                found.contains(name) || name == "reason",
                "{map}: {name} is explained, and bpftool does not show it"
            );
        }
    }
    Ok(())
}
