//! Wrong manifests dropped into the watched folder: what was in force stays, and one line says what to do.

use std::fs::File;
use std::io::Write as _;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use culvert_tests::sandbox::{Family, Node, Sandbox};

use super::support::{
    Held, LEGACY, LOG_LIMIT, NGINX, SERVER, Want, call, end_of_log, for_server, marker, mesh, plan, policy, put, strict,
};
use culvert_tests::command;

/// How long a change that must not come is waited for: several times what one that comes needs.
const SETTLED: Duration = Duration::from_millis(700);

fn expect(sandbox: &Sandbox, plain: Want) -> Result<()> {
    let to = sandbox.pod(SERVER)?.at(Family::V4, 9080);
    call(sandbox, LEGACY, to, &marker("legacy"), plain)?;
    call(sandbox, NGINX, to, &marker("nginx"), Want::Tunnel)?;
    Ok(())
}

/// The warnings of the agent on the server's node since `offset`, once there is one.
fn warnings(sandbox: &Sandbox, offset: u64) -> Result<Vec<String>> {
    command::wait_for("a warning", LOG_LIMIT, || {
        let (lines, _) = sandbox.agent_log(Node::B, offset)?;
        let found: Vec<String> = lines
            .iter()
            .filter(|l| l.field("level").as_deref() == Some("WARN"))
            .map(culvert_tests::sandbox::LogLine::message)
            .collect();
        Ok((!found.is_empty()).then_some(found))
    })?;
    thread::sleep(SETTLED);
    let (lines, _) = sandbox.agent_log(Node::B, offset)?;
    let warnings = lines.iter().filter(|l| l.field("level").as_deref() == Some("WARN"));
    Ok(warnings.map(culvert_tests::sandbox::LogLine::message).collect())
}

/// [C.6], [C.10], [C.11], §19: the previous valid object stays in force, and one line names file, document, field and
/// remedy.
#[test]
fn a_wrong_manifest_leaves_the_previous_policy_in_force_and_says_where_it_is_wrong() -> Result<()> {
    let sandbox = mesh(plan("t-wrong"))?;
    let first = policy("test", "unrelated", "{mtls: {mode: PERMISSIVE}}");
    let good = strict("default");
    for (what, wrong, said) in [
        (
            "an unknown mode",
            policy("default", "wide", "{mtls: {mode: DISABLED}}"),
            vec!["document 2", "PeerAuthentication default/wide", "spec.mtls.mode", "DISABLE"],
        ),
        (
            "an unknown field",
            policy("default", "wide", "{mtls: {mode: DISABLE, portLevelMtls: {9080: {mode: DISABLE}}}}"),
            vec!["document 2", "PeerAuthentication default/wide", "spec.mtls.portLevelMtls"],
        ),
        (
            "a version that is not served",
            policy("default", "wide", "{mtls: {mode: DISABLE}}").replace("istio.io/v1\n", "istio.io/v1alpha1\n"),
            vec!["document 2", "v1alpha1", "v1"],
        ),
        ("a broken document", good.replace("mode: STRICT}}", "mode: DISABLE"), vec!["line"]),
        (
            "broken indentation",
            "---\napiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata:\nname: wide\nspec: {}\n"
                .to_owned(),
            vec!["document 2", "metadata"],
        ),
    ] {
        put(&sandbox, &[first.clone(), good.clone()])?;
        expect(&sandbox, Want::Refused).context("before")?;
        let offset = end_of_log(&sandbox, Node::B)?;
        sandbox.manifests().apply("policy.yaml", &[first.as_str(), &wrong].concat())?;
        let warnings = warnings(&sandbox, offset).with_context(|| what.to_owned())?;
        let [line] = warnings.as_slice() else { anyhow::bail!("{what}: not one line: {warnings:#?}") };
        for word in ["policy.yaml"].into_iter().chain(said) {
            ensure!(line.contains(word), "{what}: {word:?} is not in {line:?}");
        }
        ensure!(line.contains("in force"), "{what}: what holds meanwhile is not in {line:?}");
        expect(&sandbox, Want::Refused).with_context(|| format!("{what}: STRICT must stay in force"))?;
    }
    Ok(())
}

/// [C.11], [D.1]: half a file is not read, and deletes nothing; a whole one is; a deleted one is gone with its policy.
#[test]
fn a_half_written_file_changes_nothing_and_a_deleted_one_takes_its_policy_along() -> Result<()> {
    let mut sandbox = mesh(plan("t-half"))?;
    put(&sandbox, &[strict("default")])?;
    expect(&sandbox, Want::Refused)?;
    // An editor that writes in place: truncated, half, and only after a while whole.
    let path = sandbox.manifests().path().join("policy.yaml");
    let text = for_server("mtls: {mode: PERMISSIVE}") + &strict("default");
    let mut file = File::create(&path)?;
    thread::sleep(SETTLED);
    expect(&sandbox, Want::Refused).context("truncated")?;
    file.write_all(&text.as_bytes()[..text.len() / 3])?;
    thread::sleep(SETTLED);
    expect(&sandbox, Want::Refused).context("half written")?;
    file.write_all(&text.as_bytes()[text.len() / 3..])?;
    drop(file);
    let to = sandbox.pod(SERVER)?.at(Family::V4, 9080);
    command::wait_for("the whole file is in force", Duration::from_secs(1), || {
        Ok((sandbox.http(LEGACY, to, "")?.status == Some(200)).then_some(()))
    })?;
    // Deleted: the namespace's STRICT is gone with it, and the next one comes by another file.
    sandbox.manifests().apply("other.yaml", &policy("istio-system", "m", "{mtls: {mode: STRICT}}"))?;
    thread::sleep(SETTLED);
    expect(&sandbox, Want::Plain).context("the workload's own PERMISSIVE")?;
    let exchange = sandbox.pod(SERVER)?.at(Family::V4, 7000);
    let plain = Held::open(&mut sandbox, "plain", LEGACY, exchange)?;
    sandbox.manifests().delete("policy.yaml")?;
    plain.ended(&sandbox, Duration::from_secs(1)).context("only the mesh-wide STRICT is left")?;
    expect(&sandbox, Want::Refused)?;
    sandbox.manifests().delete("other.yaml")?;
    thread::sleep(SETTLED);
    expect(&sandbox, Want::Plain).context("no policy")
}
