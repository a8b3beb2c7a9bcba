//! Names and Services beside the agents: what CoreDNS answers and kube-proxy translates is as it was without them.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result, ensure};
use culvert_tests::command;
use culvert_tests::kind::stage::{Install, SYSTEM, Scene};
use culvert_tests::kind::{Cluster, ClusterPlan};
use culvert_tests::programs::{HttpResult, ResolveResult};
use culvert_tests::sandbox::Node;
use culvert_tests::tour::Stage as _;

use super::pods::{LEGACY, LIMIT, NGINX, SERVER, apply, ask, container, marker, pod, ready, service, spec, within};

const PLAIN: &str = "plain/server";
const PORT: u16 = 8080;

/// Names resolve from pods in the mesh and out of it, by CoreDNS's Service and its pods; a Service of a pod outside the mesh
/// leads to it, in plaintext, with the client's address.
pub(crate) fn names_and_services_outside_the_mesh_are_unharmed(scene: &mut Scene) -> Result<()> {
    within(scene, "plain", false, |scene| {
        serve(scene)?;
        names_resolve(scene)?;
        for client in [NGINX, LEGACY] {
            service_leads(scene, client)?;
        }
        Ok(())
    })
}

/// The same in clusters of their own with either of kube-proxy's ways, before an agent comes, while it is there, and after it has
/// gone; a client outside the mesh calls all the time, and notices nothing.
pub(crate) fn services_outside_the_mesh_do_not_notice_agents_come_and_go(scene: &mut Scene) -> Result<()> {
    for proxy_mode in ["nftables", "iptables"] {
        let plan = ClusterPlan { proxy_mode, ..ClusterPlan::for_test(proxy_mode) };
        let mut other = Scene::set(Cluster::create(plan)?)?;
        let image = scene.cluster.dir().join("culvert.tar");
        come_and_go(&mut other, image).with_context(|| format!("kube-proxy with {proxy_mode}: {}", other.state()))?;
        other.take_down()?;
    }
    Ok(())
}

fn come_and_go(scene: &mut Scene, image: std::path::PathBuf) -> Result<()> {
    within(scene, "plain", false, |scene| {
        serve(scene)?;
        let look = |scene: &Scene| {
            names_resolve(scene)?;
            [NGINX, LEGACY].iter().try_for_each(|client| service_leads(scene, client))
        };
        look(scene).context("before the mesh")?;
        let to = SocketAddr::new(scene.cluster_ip(PLAIN)?, PORT).to_string();
        scene.begin("steady", LEGACY, &["http-get", "--to", &to, "--count", "100000", "--interval-ms", "20"])?;
        scene.install(&Install::from_checkout(image))?;
        scene.enroll()?;
        look(scene).context("with the mesh")?;
        scene.cluster.kubectl(&["delete", "daemonset", "--namespace", SYSTEM, "culvert"])?;
        command::wait_for("the agents are gone", LIMIT, || {
            let pods = ["get", "pods", "--namespace", SYSTEM, "--selector=app=culvert", "--output=name"];
            Ok(scene.cluster.kubectl(&pods)?.is_empty().then_some(()))
        })?;
        look(scene).context("after the mesh")?;
        let text = scene.printed("steady")?;
        scene.end("steady")?;
        let whole = &text[..text.rfind('\n').map_or(0, |at| at + 1)];
        let results: Vec<HttpResult> = whole.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
        let failed: Vec<&HttpResult> = results.iter().filter(|result| result.status != Some(200)).collect();
        ensure!(results.len() > 100 && failed.is_empty(), "{} of {} failed: {failed:?}", failed.len(), results.len());
        Ok(())
    })
}

/// A server outside the mesh, and its Service.
fn serve(scene: &Scene) -> Result<()> {
    let node = &scene.node(Node::B)?.name;
    let program = ["http-serve", "--name=plain", &format!("--port={PORT}")];
    apply(scene, &[pod(PLAIN, spec(node, &[container("app", &program)]))?, service(PLAIN, PORT, None)?])?;
    ready(scene, PLAIN)
}

fn names_resolve(scene: &Scene) -> Result<()> {
    let servers = name_servers(scene)?;
    for client in [NGINX, LEGACY] {
        for of in [SERVER, PLAIN] {
            let (namespace, name) = of.split_once('/').context("namespace/name")?;
            let name = format!("{name}.{namespace}.svc.cluster.local");
            let expected = vec![scene.cluster_ip(of)?];
            for server in &servers {
                let what = format!("{client} resolves {name} by {server}");
                // CoreDNS hears of a new Service a moment later.
                command::wait_for(&what, LIMIT, || {
                    let answer: ResolveResult =
                        ask(scene, client, &["resolve", "--name", &name, "--server", &server.to_string()])?;
                    Ok((answer.addresses == expected).then_some(()))
                })?;
            }
        }
    }
    Ok(())
}

/// CoreDNS: its Service, and one of its pods.
fn name_servers(scene: &Scene) -> Result<[SocketAddr; 2]> {
    let pods = scene.cluster.get(&["pods", "--namespace=kube-system", "--selector=k8s-app=kube-dns"])?;
    let pod: IpAddr = pods["items"][0]["status"]["podIP"].as_str().context("CoreDNS's pod")?.parse()?;
    Ok([scene.cluster_ip("kube-system/kube-dns")?, pod].map(|server| SocketAddr::new(server, 53)))
}

fn service_leads(scene: &Scene, client: &str) -> Result<()> {
    let to = SocketAddr::new(scene.cluster_ip(PLAIN)?, PORT);
    // kube-proxy hears of a new Service a moment later.
    command::wait_for(&format!("{client} is served by the Service of {PLAIN}"), LIMIT, || {
        Ok((scene.call(client, to, "new")?.status == Some(200)).then_some(()))
    })?;
    let (capture, marker) = (scene.capture()?, marker("plain"));
    let result = scene.call(client, to, &marker)?;
    let seen = result.seen.clone().with_context(|| format!("{client} called {PLAIN}: {result:?}"))?;
    ensure!(seen.peer.ip() == scene.pod_ip(client)?, "{PLAIN} saw {}, not {client}", seen.peer);
    ensure!(capture.contains(marker.as_bytes())?, "a call of {client} to {PLAIN} was not in plaintext");
    Ok(())
}
