//! The log under stress: strangers who make it grow.

use std::fs;
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use culvert_tests::sandbox::{MeshPlan, Node, Plan, Sandbox, built};
use culvert_tests::{command, patience};

const LIMIT: Duration = Duration::from_secs(30);

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
