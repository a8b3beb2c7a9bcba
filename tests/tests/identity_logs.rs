//! What is secret about identities stays out of every log, however much is logged.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use culvert_tests::command;
use culvert_tests::sandbox::{Family, MeshPlan, Node, Plan, PodPlan, Sandbox, built};

const HTTP: u16 = 9080;
const LOGS: [&str; 3] = ["ca", "agent-a", "agent-b"];
const LIMIT: Duration = Duration::from_secs(60);

/// What a process has logged since `from`.
fn said(sandbox: &Sandbox, process: &str, from: usize) -> Result<String> {
    let bytes = fs::read(sandbox.log_path(process))?;
    Ok(String::from_utf8_lossy(&bytes[from.min(bytes.len())..]).into_owned())
}

fn wait_said(sandbox: &Sandbox, process: &str, from: usize, words: &str, times: usize) -> Result<()> {
    command::wait_for(&format!("{process} says {words:?} {times} times"), LIMIT, || {
        Ok((said(sandbox, process, from)?.matches(words).count() >= times).then_some(()))
    })
}

/// Puts another text into a file at once, as a kubelet does: nobody reads half of it.
fn replace(file: &Path, text: &str) -> Result<()> {
    let next = file.with_extension("next");
    fs::write(&next, text)?;
    fs::rename(&next, file).with_context(|| format!("replace {}", file.display()))
}

/// [I.3], [I.4]: through a start, a renewal, a token that the CA refuses, and connections by what was renewed.
#[test]
fn no_log_has_a_token_or_a_key_even_at_trace() -> Result<()> {
    let plan = Plan::empty("t-secrets")
        .pod(PodPlan::new(Node::A, "test", "client"))
        .pod(PodPlan::new(Node::B, "default", "far").http(&[HTTP]));
    let mut sandbox = Sandbox::build(plan)?;
    let trace = || vec!["--log-level".to_owned(), "trace".to_owned()];
    let mesh = MeshPlan {
        cert_ttl: Some("10s".to_owned()),
        agent_arguments: trace(),
        ca_arguments: trace(),
        ..MeshPlan::new(built("culvert")?)
    };
    sandbox.start_mesh(&mesh)?;
    let answered = |sandbox: &Sandbox| {
        let to = sandbox.pod("default/far")?.at(Family::V4, HTTP);
        command::wait_for("the server answers", LIMIT, || {
            Ok((sandbox.http("test/client", to, "secrets")?.status == Some(200)).then_some(()))
        })
    };
    answered(&sandbox)?;
    for agent in &LOGS[1..] {
        wait_said(&sandbox, agent, 0, "certificate ready", 2)?;
    }

    let file = sandbox.dir().join("token-a");
    let good = fs::read_to_string(&file)?;
    let mut claims = sandbox.agent_claims(Node::A);
    claims.audience = "somebody-else".to_owned();
    let refused = sandbox.signer().sign(&claims)?;
    replace(&file, &refused)?;
    wait_said(&sandbox, "ca", 0, "certificate refused", 1)?;
    wait_said(&sandbox, "agent-a", 0, "Unauthenticated", 1)?;
    replace(&file, &good)?;
    let now = said(&sandbox, "agent-a", 0)?.len();
    wait_said(&sandbox, "agent-a", now, "certificate ready", 1)?;
    answered(&sandbox)?;

    let other = fs::read_to_string(sandbox.dir().join("token-b"))?;
    let key = fs::read_to_string(sandbox.dir().join("ca/ca-key.pem"))?;
    let mut secrets = vec!["PRIVATE KEY"];
    for token in [&good, &other, &refused] {
        secrets.extend([token.trim(), token.trim().rsplit('.').next().context("a signature")?]);
    }
    secrets.extend(key.lines().filter(|line| !line.starts_with('-')));
    ensure!(secrets.len() >= 9 && secrets.iter().all(|secret| secret.len() > 8), "{} secrets", secrets.len());
    for process in LOGS {
        let log = said(&sandbox, process, 0)?;
        ensure!(log.to_ascii_lowercase().contains("trace"), "{process} does not log at trace");
        for (number, secret) in secrets.iter().enumerate() {
            ensure!(!log.contains(secret), "the log of {process} has secret {number}");
        }
    }
    Ok(())
}
