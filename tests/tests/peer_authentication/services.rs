//! Calls to a Service's cluster IP (§13): always of the mesh, never passed through to the address itself.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use anyhow::{Context, Result, ensure};
use culvert_tests::sandbox::{Family, Node, Sandbox, ServicePlan};

use super::support::{
    LEGACY, NGINX, SERVER, Want, call, cluster, edit_pod, end_of_log, has, line, marker, mesh, plan, policy, put,
    server, service,
};

const BACK_A: &str = "default/back-a";
const BACK_B: &str = "default/back-b";

fn ip(last: u8) -> IpAddr {
    Ipv4Addr::new(10, 96, 7, last).into()
}

fn apply(sandbox: &Sandbox, services: &[String]) -> Result<()> {
    sandbox.manifests().apply("more-services.yaml", &services.concat())?;
    // The policies stay as they were; `put` waits until both agents have seen the folder.
    put(sandbox, &[])
}

fn refused_because(sandbox: &Sandbox, to: SocketAddr, reason: &str) -> Result<()> {
    let offset = end_of_log(sandbox, Node::A)?;
    call(sandbox, NGINX, to, &marker(reason), Want::Refused).with_context(|| reason.to_owned())?;
    line(sandbox, Node::A, offset, reason, |l| has(l, "reason", reason) && has(l, "direction", "outbound"))?;
    Ok(())
}

/// [S.1], §13: refused at once, with the reason, and not passed on to whatever the node makes of the address.
#[test]
fn a_service_without_endpoint_or_without_that_port_refuses() -> Result<()> {
    let sandbox = mesh(plan("t-noep").service(ServicePlan::new("default", "nobody", &[("tcp", 9080)])))?;
    for family in [Family::V4, Family::V6] {
        refused_because(&sandbox, cluster(&sandbox, "default/nobody", family, 9080)?, "no-endpoint")?;
        refused_because(&sandbox, cluster(&sandbox, SERVER, family, 9081)?, "no-such-service-port")?;
        // A port of the pod that is none of the Service's.
        refused_because(&sandbox, cluster(&sandbox, SERVER, family, 7000)?, "no-such-service-port")?;
    }
    // A pod that is no longer ready is no endpoint, although the node would still translate to it.
    edit_pod(&sandbox, SERVER, &[("{type: Ready, status: \"True\"}", "{type: Ready, status: \"False\"}")])?;
    put(&sandbox, &[])?;
    refused_because(&sandbox, cluster(&sandbox, SERVER, Family::V4, 9080)?, "no-endpoint")?;
    // Its address still reaches it.
    call(&sandbox, NGINX, sandbox.pod(SERVER)?.at(Family::V4, 9080), &marker("pod"), Want::Tunnel)?;
    Ok(())
}

/// §13, [PA.9], [I.10]: whatever the mode, and whichever way the port is named, a cluster IP is a tunnel to a mesh pod.
#[test]
fn a_cluster_ip_is_tunnelled_in_every_mode_and_finds_named_target_ports() -> Result<()> {
    let sandbox = mesh(plan("t-named").pod(server(Node::B, "default", "back-a")))?;
    let named = |last: u8, port: &str| {
        service(
            "named",
            ip(last),
            &format!("selector: {{app: productpage}}, ports: [{{name: web, port: 80, targetPort: {port}}}]"),
        )
    };
    apply(&sandbox, &[named(1, "web")])?;
    // No container port has the name yet: the pod is no endpoint.
    let to = SocketAddr::new(ip(1), 80);
    refused_because(&sandbox, to, "no-endpoint")?;
    edit_pod(
        &sandbox,
        SERVER,
        &[("    image: culvert-pod\n", "    image: culvert-pod\n    ports: [{name: web, containerPort: 9080}]\n")],
    )?;
    for mode in ["PERMISSIVE", "DISABLE", "STRICT"] {
        put(&sandbox, &[policy("default", "wide", &format!("{{mtls: {{mode: {mode}}}}}"))])?;
        let capture = sandbox.capture()?;
        for to in [to, cluster(&sandbox, SERVER, Family::V4, 9080)?, cluster(&sandbox, SERVER, Family::V6, 9080)?] {
            let marker = marker(mode);
            let got = call(&sandbox, NGINX, to, &marker, Want::Tunnel)?;
            ensure!(got.peer == Some(to), "the client sees {:?}, not the cluster IP it asked for", got.peer);
            ensure!(!capture.contains(marker.as_bytes())?, "{mode}: {to} is readable on the link");
        }
        ensure!(capture.frames_with_port(15008)? > 0, "no tunnel crossed the link");
    }
    Ok(())
}

/// §13: `ClientIP` keeps a client with its endpoint and spreads clients; without it every endpoint is chosen, also those
/// outside the mesh, in plaintext.
#[test]
fn endpoints_are_chosen_at_random_unless_affinity_keeps_a_client() -> Result<()> {
    let with_tier = |node, name| server(node, "default", name).label("tier", "back");
    let outside = with_tier(Node::B, "back-c").label("istio.io/dataplane-mode", "none");
    let sandbox =
        mesh(plan("t-affinity").pod(with_tier(Node::A, "back-a")).pod(with_tier(Node::B, "back-b")).pod(outside))?;
    let rest = "selector: {tier: back}, ports: [{port: 80, targetPort: 9080}]";
    apply(
        &sandbox,
        &[service("any", ip(2), rest), service("sticky", ip(3), &format!("{rest}, sessionAffinity: ClientIP"))],
    )?;
    let served = |client: &str, last: u8| -> Result<BTreeSet<String>> {
        (0..24)
            .map(|_| {
                let got = call(&sandbox, client, SocketAddr::new(ip(last), 80), "x", Want::Tunnel)?;
                Ok(got.seen.context("the server says who it is")?.server)
            })
            .collect()
    };
    // Each is missed by 24 calls once in 16 000 runs.
    let any = served(NGINX, 2)?;
    ensure!(any.len() == 3, "three endpoints: {any:?}");
    for client in [NGINX, SERVER, BACK_A, BACK_B] {
        let sticky = served(client, 3)?;
        ensure!(sticky.len() == 1, "{client} was sent to {sticky:?}");
    }
    // An endpoint outside the mesh is reached as it is; its plaintext is on the link, and only its.
    let capture = sandbox.capture()?;
    for _ in 0..12 {
        let marker = marker("any");
        let got = call(&sandbox, NGINX, SocketAddr::new(ip(2), 80), &marker, Want::Tunnel)?;
        let outside = got.seen.context("the server says who it is")?.server == "back-c";
        ensure!(capture.contains(marker.as_bytes())? == outside, "back-c is outside: {outside}");
    }
    // Clients outside the mesh are none of its business.
    call(&sandbox, LEGACY, cluster(&sandbox, SERVER, Family::V4, 9080)?, "x", Want::Plain)?;
    Ok(())
}
