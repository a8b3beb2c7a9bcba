//! The mesh at work on the sandbox: real agents, real packets.

use std::{net::SocketAddr, time::Duration};

use anyhow::{Context, Result, ensure};
use culvert_tests::command;
use culvert_tests::sandbox::{Family, MeshPlan, Node, Plan, Sandbox, built};

fn mesh(instance: &str) -> Result<Sandbox> {
    let mut sandbox = Sandbox::build(Plan::bookinfo(instance))?;
    sandbox.start_mesh(&MeshPlan::new(built("culvert")?))?;
    Ok(sandbox)
}

/// Specification §8, first row: mesh to mesh is a tunnel, and the server sees the client itself ([K.3]).
#[test]
fn a_connection_between_mesh_pods_is_tunnelled_and_keeps_its_addresses() -> Result<()> {
    let sandbox = mesh("t-first")?;
    let capture = sandbox.capture()?;
    for family in [Family::V4, Family::V6] {
        let server = sandbox.pod("default/productpage")?.at(family, 9080);
        let cluster = SocketAddr::new(sandbox.cluster_ip("default/productpage", family)?, 9080);
        for (way, to) in [("cluster", cluster), ("pod", server)] {
            let marker = format!("secret-of-{way}-{family:?}");
            let got = sandbox.http("test/nginx", to, &marker)?;
            let seen = got.seen.with_context(|| format!("{to}: {:?} {:?}", got.failure, got.error))?;
            ensure!(seen.peer.ip() == sandbox.pod("test/nginx")?.at(family, 1).ip(), "{to}: saw {}", seen.peer);
            ensure!(seen.local == server, "{to}: arrived at {}", seen.local);
            ensure!(got.peer == Some(to), "{to}: the client sees {:?}", got.peer);
            ensure!(!capture.contains(marker.as_bytes())?, "{to}: readable on the link");
        }
    }
    ensure!(capture.frames_with_port(15008)? > 0, "no tunnel crossed the link");
    let mut told = Vec::new();
    let four = command::wait_for("the server's agent told four connections", Duration::from_secs(3), || {
        let (lines, _) = sandbox.agent_log(Node::B, 0)?;
        told = lines.into_iter().filter(|l| l.field("direction").as_deref() == Some("inbound")).collect();
        // On a slow machine a tunnel may have been tried twice, and the first one has its own line; the kubelet's first
        // probe may be older than the agent.
        told.retain(|line| line.field("message").as_deref() == Some("connection complete"));
        told.retain(|line| line.field("dst.hbone_addr").is_some());
        Ok((told.len() == 4).then_some(()))
    });
    four.with_context(|| format!("it told {told:?}"))?;
    for line in &told {
        ensure!(line.field("src.identity").as_deref() == Some("spiffe://cluster.local/ns/test/sa/nginx"), "{line:?}");
        ensure!(line.field("reason").as_deref() == Some("no-allow-policies"), "{line:?}");
    }
    Ok(())
}
