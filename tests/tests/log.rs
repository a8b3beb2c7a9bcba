//! The log under stress: a reader that has stopped, and strangers who make it grow.

use std::fs::{self, File};
use std::io::{ErrorKind, Read};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use culvert_tests::sandbox::{Family, MeshPlan, Node, Plan, PodPlan, Sandbox, built};
use culvert_tests::{command, patience};

const HTTP: u16 = 9080;
const LIMIT: Duration = Duration::from_secs(30);

/// Standard error is a pipe, and whoever reads it has stopped, as a container runtime that is stuck. Neither a worker nor the
/// sign of life waits for it; and what was said meanwhile is there when somebody reads again.
#[test]
fn a_log_that_nobody_reads_stops_nothing() -> Result<()> {
    /// The smallest that a pipe can be (fcntl(2)): an agent says more than that at its start.
    const PIPE_BYTES: i32 = 4096;
    let plan = Plan::empty("t-log-stuck")
        .pod(PodPlan::new(Node::A, "test", "client"))
        .pod(PodPlan::new(Node::B, "default", "far").http(&[HTTP]));
    let mut sandbox = Sandbox::build(plan)?;
    let mut pipes = Vec::new();
    for node in Node::ALL {
        let path = sandbox.dir().join(format!("stderr-{}", node.name()));
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).context("make a pipe")?;
        // Open for both, so that neither end is ever closed.
        let pipe = File::options().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(path)?;
        nix::fcntl::fcntl(&pipe, nix::fcntl::FcntlArg::F_SETPIPE_SZ(PIPE_BYTES)).context("make it small")?;
        pipes.push(pipe);
    }
    let agent = sandbox.dir().join("culvert-with-a-pipe");
    let (binary, stderr) = (built("culvert")?, sandbox.dir().join("stderr"));
    // An agent's third argument is the name of its node.
    let script = format!(
        "#!/bin/sh\n[ \"$1\" = agent ] || exec {0} \"$@\"\nexec {0} \"$@\" 2<>{1}-$3\n",
        binary.display(),
        stderr.display()
    );
    fs::write(&agent, script)?;
    fs::set_permissions(&agent, fs::Permissions::from_mode(0o755))?;
    let mut mesh = MeshPlan::new(agent);
    mesh.agent_arguments = vec!["--log-level".to_owned(), "trace".to_owned()];
    sandbox.start_mesh(&mesh)?;
    let to = sandbox.pod("default/far")?.at(Family::V4, HTTP);
    for _ in 0..10 {
        let got = sandbox.http("test/client", to, "text")?;
        ensure!(got.status == Some(200), "nobody reads the log: {got:?}");
    }

    for (node, mut pipe) in Node::ALL.into_iter().zip(pipes) {
        let (mut text, mut some) = (Vec::new(), vec![0; 64 << 10]);
        command::wait_for(&format!("the agent of {node} says that it is ready"), LIMIT * patience(), || {
            match pipe.read(&mut some) {
                Ok(read) => text.extend_from_slice(&some[..read]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) => return Err(error).context("read the pipe"),
            }
            let ready = String::from_utf8_lossy(&text).contains("\"message\":\"ready\"");
            // More than the pipe holds: it has been full.
            Ok((ready && text.len() > PIPE_BYTES as usize).then_some(()))
        })?;
        // The last line may be only half written.
        let whole = text.iter().rposition(|byte| *byte == b'\n').unwrap_or(0);
        for line in String::from_utf8_lossy(&text[..whole]).lines() {
            serde_json::from_str::<serde_json::Value>(line).with_context(|| format!("a line in pieces: {line}"))?;
        }
    }
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
    let (before, began) = (first()?, Instant::now());
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
    // Twenty a second, a second's worth at once, and one a second that tells of the others.
    let most = 25.0 * began.elapsed().as_secs_f64() + 50.0;
    ensure!((lines as f64) < most, "{lines} lines, where {most:.0} are the most");
    Ok(())
}
