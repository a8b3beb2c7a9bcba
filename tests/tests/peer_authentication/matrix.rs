//! §8 without DestinationRule: clients, ways and modes; and how a refusal looks.

use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use culvert_common::Reason;
use culvert_tests::programs::Failure;
use culvert_tests::sandbox::{Family, Node, PodPlan};

use super::support::{
    LEGACY, NGINX, SERVER, Want, call, cluster, counted, end_of_log, for_server, has, line, marker, mesh, plan, policy,
    put, strict,
};

/// One set of policies, and what becomes of plaintext to the server's two ports.
struct Step {
    name: &'static str,
    policies: Vec<String>,
    /// What plaintext to 9080 and to 9090 gets.
    plain: [Want; 2],
}

const OPEN: [Want; 2] = [Want::Plain, Want::Plain];
const CLOSED: [Want; 2] = [Want::Refused, Want::Refused];

fn steps() -> Vec<Step> {
    let step = |name, policies, plain| Step { name, policies, plain };
    let mesh_wide = || strict("istio-system");
    let wide = |mode: &str| policy("default", "wide", &format!("{{mtls: {{mode: {mode}}}}}"));
    vec![
        step("no policy", vec![], OPEN),
        step("namespace STRICT [PA.2]", vec![strict("default")], CLOSED),
        step("workload PERMISSIVE [PA.3]", vec![strict("default"), for_server("mtls: {mode: PERMISSIVE}")], OPEN),
        step(
            "port 9080 PERMISSIVE under STRICT [PA.7]",
            vec![for_server("mtls: {mode: STRICT}, portLevelMtls: {9080: {mode: PERMISSIVE}}")],
            [Want::Plain, Want::Refused],
        ),
        step(
            "port 9080 STRICT under PERMISSIVE [PA.7]",
            vec![for_server("mtls: {mode: PERMISSIVE}, portLevelMtls: {9080: {mode: STRICT}}")],
            [Want::Refused, Want::Plain],
        ),
        step(
            "exception keyed by the service port [PA.6]",
            vec![strict("default"), for_server("portLevelMtls: {8081: {mode: PERMISSIVE}}")],
            CLOSED,
        ),
        step("mesh-wide STRICT [PA.1]", vec![mesh_wide()], CLOSED),
        step(
            "mesh-wide STRICT with selector {} (§20)",
            vec![policy("istio-system", "m", "{selector: {}, mtls: {mode: STRICT}}")],
            CLOSED,
        ),
        step(
            "mesh-wide STRICT with a real selector is ignored [PA.4]",
            vec![policy("istio-system", "m", "{selector: {matchLabels: {app: productpage}}, mtls: {mode: STRICT}}")],
            OPEN,
        ),
        step("namespace DISABLE under STRICT [PA.9]", vec![mesh_wide(), wide("DISABLE")], OPEN),
        step("workload DISABLE under STRICT [PA.9]", vec![mesh_wide(), for_server("mtls: {mode: DISABLE}")], OPEN),
        step(
            "port DISABLE under a workload's STRICT [PA.9]",
            vec![for_server("mtls: {mode: STRICT}, portLevelMtls: {9080: {mode: DISABLE}}")],
            [Want::Plain, Want::Refused],
        ),
        step(
            "workload UNSET with a DISABLE port under STRICT (§20)",
            vec![mesh_wide(), for_server("mtls: {mode: UNSET}, portLevelMtls: {9080: {mode: DISABLE}}")],
            [Want::Plain, Want::Refused],
        ),
        step(
            "mesh STRICT, namespace UNSET, workload UNSET with a PERMISSIVE port (§20)",
            vec![mesh_wide(), wide("UNSET"), for_server("mtls: {}, portLevelMtls: {9090: {mode: PERMISSIVE}}")],
            [Want::Refused, Want::Plain],
        ),
        step("another namespace's STRICT [PA.2]", vec![strict("test")], OPEN),
    ]
}

/// §8, the rows without DestinationRule, by cluster IP and pod IP, over IPv4 and IPv6. §5.2 gives the modes; [K.3] is
/// checked with each call; the tunnel serves in every mode (§5.3).
#[test]
fn each_mode_refuses_only_the_plaintext_that_it_forbids_by_every_way() -> Result<()> {
    let mut plan = plan("t-matrix");
    // Service port 8081 leads to 9080, so that "keyed by the service port" can be told from "keyed by the target".
    let service = plan.services.iter_mut().find(|s| s.key() == SERVER).context("bookinfo's service")?;
    service.ports.push(("other".to_owned(), 8081, 9080));
    let sandbox = mesh(plan)?;
    for Step { name, policies, plain } in steps() {
        put(&sandbox, &policies)?;
        // The recording starts afresh, so that a row is proven by its own traffic.
        let capture = sandbox.capture()?;
        for family in [Family::V4, Family::V6] {
            let pod = sandbox.pod(SERVER)?;
            let mut ways = vec![
                (cluster(&sandbox, SERVER, family, 9080)?, plain[0]),
                (pod.at(family, 9080), plain[0]),
                (pod.at(family, 9090), plain[1]),
            ];
            if family == Family::V4 {
                ways.push((cluster(&sandbox, SERVER, family, 8081)?, plain[0]));
            }
            for (to, plain) in ways {
                for (client, want) in [(NGINX, Want::Tunnel), (LEGACY, plain)] {
                    let marker = marker(name);
                    call(&sandbox, client, to, &marker, want).with_context(|| name.to_owned())?;
                    let readable = capture.contains(marker.as_bytes())?;
                    ensure!(readable == (want == Want::Plain), "{name}: {client} to {to}: readable: {readable}");
                }
            }
        }
    }
    Ok(())
}

/// §8, the rows whose server is not the mesh's or is the client itself; [PA.11]; [T.3].
#[test]
fn strict_concerns_servers_in_the_mesh_and_never_a_pod_itself() -> Result<()> {
    let other = PodPlan::new(Node::B, "test", "old-app").label("istio.io/dataplane-mode", "none");
    let sandbox = mesh(plan("t-rows").pod(other))?;
    put(&sandbox, &[strict("istio-system")])?;
    let capture = sandbox.capture()?;
    for family in [Family::V4, Family::V6] {
        let legacy = [sandbox.pod(LEGACY)?.at(family, 8080), cluster(&sandbox, LEGACY, family, 8080)?];
        for to in legacy {
            // From the other node, so that it crosses the link: mesh to non-mesh is plaintext.
            let marker = marker("to-legacy");
            call(&sandbox, SERVER, to, &marker, Want::Plain)?;
            ensure!(capture.contains(marker.as_bytes())?, "{to}: out of the mesh is plaintext, also from the mesh");
            call(&sandbox, "test/old-app", to, &marker, Want::Plain).context("non-mesh to non-mesh")?;
        }
        // Itself: by its own address untouched, by its Service with the policy of a tunnel.
        let own = sandbox.pod(SERVER)?.at(family, 9080);
        call(&sandbox, SERVER, own, &marker("itself"), Want::Plain).context("itself by its address")?;
        let own = cluster(&sandbox, SERVER, family, 9080)?;
        call(&sandbox, SERVER, own, &marker("itself"), Want::Tunnel).context("itself by its Service")?;
        // [T.3]: the same on one node.
        let near = sandbox.pod("default/ratings")?.at(family, 9080);
        call(&sandbox, NGINX, near, &marker("near"), Want::Tunnel)?;
        call(&sandbox, LEGACY, near, &marker("near"), Want::Refused)?;
        let near = cluster(&sandbox, "default/ratings", family, 9080)?;
        call(&sandbox, NGINX, near, &marker("near"), Want::Tunnel)?;
        call(&sandbox, LEGACY, near, &marker("near"), Want::Refused)?;
    }
    Ok(())
}

/// [PA.13], §5.3, §16: STRICT answers with a reset in milliseconds, counts it for the pod, and names the policy.
#[test]
fn a_strict_refusal_is_a_reset_that_is_counted_and_told_with_the_policys_name() -> Result<()> {
    let sandbox = mesh(plan("t-refusal"))?;
    put(&sandbox, &[strict("default")])?;
    let before = counted(&sandbox, SERVER, Reason::StrictRequiresMtls)?;
    let offset = end_of_log(&sandbox, Node::B)?;
    let ways: Vec<SocketAddr> = [Family::V4, Family::V6]
        .into_iter()
        .map(|family| Ok([sandbox.pod(SERVER)?.at(family, 9080), cluster(&sandbox, SERVER, family, 9080)?]))
        .collect::<Result<Vec<_>>>()?
        .concat();
    for to in &ways {
        let got = call(&sandbox, LEGACY, *to, "never seen", Want::Refused)?;
        ensure!(got.failure == Some(Failure::Refused), "{to}: the handshake itself is refused: {:?}", got.failure);
    }
    let after = counted(&sandbox, SERVER, Reason::StrictRequiresMtls)?;
    ensure!(after - before == ways.len() as u64, "{} refusals made {} counts", ways.len(), after - before);
    for family in [Family::V4, Family::V6] {
        let (from, to) = (sandbox.pod(LEGACY)?.at(family, 0).ip(), sandbox.pod(SERVER)?.at(family, 9080));
        let told = line(&sandbox, Node::B, offset, "the refusal", |l| {
            has(l, "reason", "strict-requires-mtls") && has(l, "dst.addr", &to.to_string())
        })?;
        let src = told.field("src.addr").and_then(|a| a.parse::<SocketAddr>().ok()).context("a source")?;
        ensure!(src.ip() == from && src.port() != 0, "{told:?}: source");
        ensure!(told.message() == "connection failed", "{told:?}");
        let error = told.field("error").unwrap_or_default();
        ensure!(error.contains("PeerAuthentication default/wide"), "{told:?}: the policy's name");
        ensure!(has(&told, "src.workload", "legacy-app") && told.field("src.identity").is_none(), "{told:?}");
        ensure!(has(&told, "dst.workload", "productpage") && has(&told, "direction", "inbound"), "{told:?}");
    }
    Ok(())
}
