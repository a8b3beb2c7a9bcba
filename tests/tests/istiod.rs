//! Agents with a real istiod as their CA (specification §4), as in a cluster that has Istio.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use culvert_tests::apiserver::assets;
use culvert_tests::sandbox::{Family, MeshPlan, Node, Plan, Sandbox, Source, built, own_name};
use culvert_tests::{command, patience};

/// Until istiod has started and published its root.
const LIMIT: Duration = Duration::from_secs(90);

/// Address, root, token and impersonation as §4 says; what the two ends of a tunnel then have is istiod's.
#[test]
#[ignore = "istiod is built by `cargo xtask test --full`"]
fn agents_get_their_certificates_from_istiod() -> Result<()> {
    let istiod = assets::istiod()?;
    ensure!(istiod.is_file(), "{} is not built: `cargo xtask test --full` does it", istiod.display());
    let mut sandbox = Sandbox::build(Plan::bookinfo(&own_name("istiod")).source(Source::Api))?;
    let admin = sandbox.manifests().api().context("the sandbox has an API server")?.admin();
    let mut command = sandbox.node_place(Node::A).command(&istiod)?;
    command
        .args(["discovery", "--namespace", "istio-system", "--domain", "cluster.local"])
        .args(["--secureGRPCAddr", ":15012", "--httpsAddr", ":15017", "--kubeconfig", &admin.display().to_string()])
        .envs([("POD_NAME", "istiod-1"), ("POD_NAMESPACE", "istio-system"), ("REVISION", "default")])
        .envs([("CLUSTER_ID", "Kubernetes"), ("PILOT_CERT_PROVIDER", "istiod"), ("PILOT_ENABLE_AMBIENT", "true")])
        // Whom it lets ask for others ([I.4]); its own default is ztunnel's account.
        .env("CA_TRUSTED_NODE_ACCOUNTS", "istio-system/culvert");
    sandbox.start("istiod", command)?;
    let roots = command::wait_for("istiod publishes its root", LIMIT * patience(), || {
        sandbox.expect_running("istiod")?;
        let api = sandbox.manifests().api().context("the sandbox has an API server")?;
        let path = r"jsonpath={.data.root-cert\.pem}";
        let get = ["get", "configmap", "istio-ca-root-cert", "-n", "istio-system", "--ignore-not-found", "-o", path];
        Ok(Some(api.kubectl(&get)?).filter(|roots| !roots.is_empty()))
    });
    let log = sandbox.log_path("istiod");
    fs::write(sandbox.root_certificate(), roots.with_context(|| fs::read_to_string(log).unwrap_or_default())?)?;
    let plan = MeshPlan::new(built("culvert")?);
    for node in Node::ALL {
        sandbox.start_agent(&plan, node)?;
    }
    for node in Node::ALL {
        sandbox.wait_ready(node)?;
    }
    let to = sandbox.pod("default/productpage")?.at(Family::V4, 9080);
    let got = sandbox.http("test/nginx", to, "istiod")?;
    ensure!(got.status == Some(200), "{got:?}");
    let (lines, _) = sandbox.agent_log(Node::A, 0)?;
    let ready = lines.iter().find(|line| line.message() == "certificate ready");
    ensure!(
        ready.is_some_and(|line| line.field("identity").is_some_and(|identity| identity.contains("/sa/"))),
        "{ready:?}"
    );
    // It was by a tunnel: whoever is outside the mesh is not let in once that is wanted.
    sandbox.manifests().apply(
        "policy.yaml",
        "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: all, namespace: istio-system}\n\
         spec: {mtls: {mode: STRICT}}\n",
    )?;
    command::wait_for("plaintext is refused", LIMIT * patience(), || {
        Ok(sandbox.http("test/legacy-app", to, "plaintext")?.status.is_none().then_some(()))
    })?;
    let got = sandbox.http("test/nginx", to, "strict")?;
    ensure!(got.status == Some(200), "{got:?}");
    Ok(())
}
