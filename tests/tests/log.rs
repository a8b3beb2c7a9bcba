//! The log under stress: a reader that has stopped, and strangers who make it grow.

use std::fs::{self, File};
use std::io::{ErrorKind, Read};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use culvert_tests::sandbox::{Family, MeshPlan, Node, Plan, PodPlan, Sandbox, agent_process, built};
use culvert_tests::{command, patience};

const HTTP: u16 = 9080;
const LIMIT: Duration = Duration::from_secs(30);

/// The largest sample of a node's agent, by its name.
fn metric(sandbox: &Sandbox, node: Node, name: &str) -> Result<f64> {
    let mut metrics = sandbox.node_place(node).command(built("culvert")?)?;
    let got = metrics.args(["metrics", name, "-o", "json"]).output().context("culvert metrics")?;
    ensure!(got.status.success(), "{}", String::from_utf8_lossy(&got.stderr));
    let rows: serde_json::Value = serde_json::from_slice(&got.stdout)?;
    let values = rows.as_array().into_iter().flatten().filter_map(|row| row["value"].as_f64());
    values.reduce(f64::max).with_context(|| format!("{name}: {rows}"))
}

/// Standard error is a pipe, and whoever reads it has stopped, as a container runtime that is stuck. No worker and no sign of
/// life waits for it: connections go on, and what is lost is counted, and told once there is a reader again.
#[test]
fn a_log_that_nobody_reads_stops_nothing() -> Result<()> {
    let plan = Plan::empty("t-log-stuck")
        .pod(PodPlan::new(Node::A, "test", "client"))
        .pod(PodPlan::new(Node::B, "default", "far").http(&[HTTP]));
    let mut sandbox = Sandbox::build(plan)?;
    // Open for reading too, so that it is never closed; but nobody reads. Each agent has its own, by its process's number.
    let agent = sandbox.dir().join("culvert-with-a-pipe");
    let (binary, pipes) = (built("culvert")?, sandbox.dir().join("stderr"));
    let script = format!(
        "#!/bin/sh\n[ \"$1\" = agent ] || exec {0} \"$@\"\nmkfifo {1}-$$ && exec {0} \"$@\" 2<>{1}-$$\n",
        binary.display(),
        pipes.display()
    );
    fs::write(&agent, script)?;
    fs::set_permissions(&agent, fs::Permissions::from_mode(0o755))?;
    let mut mesh = MeshPlan::new(agent);
    mesh.agent_arguments = vec!["--log-level".to_owned(), "trace".to_owned()];
    sandbox.start_mesh(&mesh)?;
    let to = sandbox.pod("default/far")?.at(Family::V4, HTTP);
    for node in Node::ALL {
        command::wait_for(&format!("lines of the agent of {node} are lost"), LIMIT * patience(), || {
            sandbox.http("test/client", to, "text")?;
            Ok((metric(&sandbox, node, "culvert_log_lines_dropped")? > 0.0).then_some(()))
        })?;
    }
    for _ in 0..20 {
        let got = sandbox.http("test/client", to, "text")?;
        ensure!(got.status == Some(200), "nobody reads the log: {got:?}");
    }
    for node in Node::ALL {
        let silence = metric(&sandbox, node, "culvert_worker_silence_seconds")?;
        ensure!(silence < 5.0, "a worker of {node} has been silent for {silence} s");
    }

    let pipe = format!("{}-{}", pipes.display(), sandbox.pid(&agent_process(Node::A))?);
    let mut reader = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(pipe)?;
    let (mut text, mut some) = (Vec::new(), vec![0; 64 << 10]);
    let told = command::wait_for("what was lost is told", LIMIT * patience(), || {
        match reader.read(&mut some) {
            Ok(read) => text.extend_from_slice(&some[..read]),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => return Err(error).context("read the pipe"),
        }
        // The last line may be only half written.
        let (lines, _) = text.split_at(text.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1));
        let mut lines = lines.split(|byte| *byte == b'\n').map(String::from_utf8_lossy);
        Ok(lines.find(|line| line.contains("lines of the log were dropped")).map(|line| line.into_owned()))
    })?;
    let told: serde_json::Value = serde_json::from_str(&told).with_context(|| format!("lines are whole: {told}"))?;
    ensure!(told["dropped"].as_u64() > Some(0), "{told}");
    Ok(())
}

/// [I.12]: whoever reaches the CA's port can make it refuse, and must not fill its log with that.
#[test]
fn strangers_at_the_cas_port_cause_few_lines() -> Result<()> {
    const STRANGERS: usize = 2000;
    let mut sandbox = Sandbox::build(Plan::empty("t-log-ca"))?;
    sandbox.start_ca(&MeshPlan::new(built("culvert")?))?;
    let log = sandbox.log_path("ca");
    let failures = |text: &str| text.lines().filter(|line| line.contains("TLS handshake failed")).count();
    // Whoever waited for the CA was the first stranger.
    let first = || -> Result<usize> {
        let text = fs::read_to_string(&log)?;
        Ok(failures(&text))
    };
    command::wait_for("the first stranger is told", LIMIT * patience(), || Ok((first()? > 0).then_some(())))?;
    let before = first()?;
    sandbox.node_place(Node::A).inside(|| {
        let to = SocketAddr::new(Node::A.v4().into(), 15012);
        for _ in 0..STRANGERS {
            drop(TcpStream::connect_timeout(&to, LIMIT)?);
        }
        Ok(())
    })?;
    let mut lines = 0;
    command::wait_for("every stranger is told or held back, and that is told", LIMIT * patience(), || {
        let text = fs::read_to_string(&log)?;
        let held = text.lines().filter(|line| line.contains("held back") && line.contains("handshake-failed"));
        let suppressed = |line: &str| line.split("suppressed=").nth(1)?.split(' ').next()?.parse::<usize>().ok();
        let (told, held): (usize, Vec<usize>) = (failures(&text) - before, held.filter_map(suppressed).collect());
        lines = told + held.len();
        Ok((told + held.iter().sum::<usize>() >= STRANGERS).then_some(()))
    })?;
    println!("{STRANGERS} strangers caused {lines} lines");
    ensure!(lines < STRANGERS / 4, "{lines} lines");
    Ok(())
}
