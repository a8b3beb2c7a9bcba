//! What every scenario ends with: each agent is asked for its capture proof, and a connection that nothing accounts for fails
//! the scenario, whatever it was about.

use std::fmt::Write as _;
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::Sandbox;
use super::ledger::Recorded;
use super::plan::Node;

/// Where an agent answers operators.
const ADMIN: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 15000);
/// How long an agent may take to look at its pods' sockets; only one that hangs takes it.
const PATIENCE: Duration = Duration::from_secs(30);

impl Sandbox {
    /// Fails if a pod has an established connection that is neither the mesh's nor a named exemption. Every sandbox asks
    /// this when it ends; call it where a state must be proved that does not last until then. Agents that do not run, are
    /// stopped, or do not answer yet have nothing to say.
    ///
    /// # Errors
    /// Such connections, with pod, peer and process; or an agent that should have answered and did not.
    pub fn prove_capture(&mut self) -> Result<()> {
        let mut found = String::new();
        for node in Node::ALL {
            let Some(proof) = self.proof_of(node).with_context(|| format!("capture proof of {node}"))? else {
                continue;
            };
            for stray in proof["strays"].as_array().context("a proof has strays")? {
                writeln!(found, "  {node}: {stray}")?;
            }
            for failure in proof["failures"].as_array().context("a proof has failures")? {
                writeln!(found, "  {node}: not looked at: {failure}")?;
            }
        }
        ensure!(found.is_empty(), "the capture proof found connections that nothing accounts for:\n{found}");
        Ok(())
    }

    /// The proof of a node's agent; `None` if none can give one.
    fn proof_of(&mut self, node: Node) -> Result<Option<Value>> {
        let own = format!("agent-{}", node.letter());
        let agents = self.processes.iter_mut().filter(|(name, _)| name.starts_with(&own));
        let able: Vec<_> =
            agents.filter_map(|(_, process)| process.check().ok().map(|()| process.record.clone())).collect();
        if able.is_empty() || able.iter().any(Recorded::is_stopped) {
            return Ok(None);
        }
        match self.nodes[super::index(node)].inside(ask)? {
            // An agent that ends closes what it has not answered.
            Answer::Cut if able.iter().all(Recorded::lives) => bail!("the agent gave no answer"),
            Answer::Nobody | Answer::Cut | Answer::NotYet => Ok(None),
            Answer::Proof(proof) => Ok(Some(proof)),
        }
    }
}

enum Answer {
    /// Nothing listens: the agent is starting, or ends.
    Nobody,
    /// The connection ended before an answer.
    Cut,
    /// The agent is starting.
    NotYet,
    Proof(Value),
}

fn ask() -> Result<Answer> {
    let patience = PATIENCE * crate::patience();
    let mut stream = match TcpStream::connect_timeout(&ADMIN, patience) {
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => return Ok(Answer::Nobody),
        other => other.with_context(|| format!("connect to {ADMIN}"))?,
    };
    stream.set_read_timeout(Some(patience))?;
    let request = format!("GET /capture_proof HTTP/1.1\r\nHost: {ADMIN}\r\nConnection: close\r\n\r\n");
    let mut answer = Vec::new();
    match stream.write_all(request.as_bytes()).and_then(|()| stream.read_to_end(&mut answer)) {
        Err(error) if error.kind() == ErrorKind::WouldBlock => bail!("no answer within {patience:?}"),
        // What came before the end counts.
        Ok(_) | Err(_) => {}
    }
    let answer = String::from_utf8_lossy(&answer);
    let Some((head, body)) = answer.split_once("\r\n\r\n") else { return Ok(Answer::Cut) };
    match head.split(' ').nth(1) {
        Some("200") => {}
        Some("503") if body.contains("is starting") => return Ok(Answer::NotYet),
        _ => bail!("the agent said {answer}"),
    }
    Ok(Answer::Proof(serde_json::from_str(body).with_context(|| format!("read the proof {body}"))?))
}
