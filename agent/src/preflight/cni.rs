//! How pods get their network: the configuration of the node's CNI, where it can be seen.

use std::{fs, io, path::Path};

use serde::Deserialize;

use super::{CNI_CONFIGURATION, Finding};

const CHECK: &str = "cni";
/// Plugins whose pods have no veth.
const WITHOUT_VETH: [&str; 8] = ["dpdk", "host-device", "ipvlan", "macvlan", "ovs-dpdk", "sriov", "userspace", "vlan"];
/// Plugins that capture pods for another mesh.
const MESHES: [&str; 5] = ["consul-cni", "istio-cni", "kuma-cni", "linkerd-cni", "osm-cni"];

/// A configuration, or a list of them (CNI specification 1.1, section 1).
#[derive(Deserialize)]
struct Network {
    #[serde(default)]
    name: String,
    #[serde(rename = "type", default)]
    kind: Option<String>,
    #[serde(default)]
    plugins: Vec<Plugin>,
}

#[derive(Deserialize)]
struct Plugin {
    #[serde(rename = "type")]
    kind: String,
}

pub(super) fn look(dir: &Path) -> Finding {
    let unseen = || Finding::ok(CHECK, format!("cannot be told: {CNI_CONFIGURATION} is not visible here"));
    match first(dir) {
        Ok(Some((file, text))) => judge(&file, &text),
        Ok(None) => unseen(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => unseen(),
        Err(error) => Finding::ok(CHECK, format!("cannot be told: read {}: {error}", dir.display())),
    }
}

/// The file that container runtimes take: the first by name.
fn first(dir: &Path) -> io::Result<Option<(String, String)>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(dir)? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if [".conf", ".conflist", ".json"].iter().any(|end| name.ends_with(end)) {
            names.push(name);
        }
    }
    names.sort();
    let Some(name) = names.into_iter().next() else { return Ok(None) };
    let text = fs::read_to_string(dir.join(&name))?;
    Ok(Some((name, text)))
}

fn judge(file: &str, text: &str) -> Finding {
    let network: Network = match serde_json::from_str(text) {
        Ok(network) => network,
        Err(error) => {
            let remedy = "mend it: as long as it is so, pods get no network, or another file's";
            return Finding::warn(CHECK, format!("{file} is no CNI configuration: {error}"), remedy);
        }
    };
    let kinds: Vec<String> = network.kind.into_iter().chain(network.plugins.into_iter().map(|of| of.kind)).collect();
    let of = |known: &[&str]| kinds.iter().filter(|kind| known.contains(&kind.as_str())).cloned().collect::<Vec<_>>();
    let found = format!("{file}: {} ({})", network.name, kinds.join(", "));
    let (bare, meshes) = (of(&WITHOUT_VETH), of(&MESHES));
    if !meshes.is_empty() {
        let remedy = format!("take {} off this node: pods that both enroll are captured twice", meshes.join(", "));
        return Finding::warn(CHECK, found, remedy);
    }
    if !bare.is_empty() {
        let remedy = format!(
            "pods of {} have no veth: what packet and raw sockets in them send is not seen; do not give such pods of the mesh \
             NET_RAW",
            bare.join(", ")
        );
        return Finding::warn(CHECK, found, remedy);
    }
    if kinds.iter().any(|kind| kind.starts_with("multus")) {
        let remedy = "see that further networks of pods of the mesh have veths: what is sent by others is not seen";
        return Finding::warn(CHECK, found, remedy);
    }
    Finding::ok(CHECK, found)
}

#[cfg(test)]
mod tests {
    use super::{super::Status, *};

    #[test]
    fn networks_without_veths_and_other_meshes_are_told() {
        let list = |kinds: &[&str]| {
            let plugins: Vec<String> = kinds.iter().map(|kind| format!("{{\"type\": \"{kind}\"}}")).collect();
            format!("{{\"cniVersion\": \"1.0.0\", \"name\": \"net\", \"plugins\": [{}]}}", plugins.join(", "))
        };
        for (kinds, status, word) in [
            (&["ptp", "portmap"][..], Status::Ok, "net (ptp, portmap)"),
            (&["calico", "bandwidth"], Status::Ok, "calico"),
            (&["cilium-cni"], Status::Ok, "cilium-cni"),
            (&["ipvlan"], Status::Warn, "NET_RAW"),
            (&["bridge", "sriov"], Status::Warn, "sriov"),
            (&["ptp", "istio-cni"], Status::Warn, "captured twice"),
            (&["multus-shim"], Status::Warn, "further networks"),
        ] {
            let finding = judge("10-net.conflist", &list(kinds));
            assert_eq!(finding.status, status, "{finding:?}");
            assert!(format!("{} {}", finding.found, finding.remedy).contains(word), "{finding:?}");
        }
        assert_eq!(judge("10-net.conf", "{\"name\": \"net\", \"type\": \"macvlan\"}").status, Status::Warn);
        assert!(judge("10-net.conf", "{\"name\": ").found.starts_with("10-net.conf is no CNI configuration"));
    }

    #[test]
    fn the_first_file_by_name_counts() {
        let dir = tempfile::tempdir().expect("a folder");
        assert!(look(dir.path()).found.contains("cannot be told"));
        assert!(look(&dir.path().join("nothing")).found.contains("cannot be told"));
        for (name, kind) in [("20-b.conflist", "ipvlan"), ("10-a.conf", "bridge"), ("00-readme.txt", "none")] {
            fs::write(dir.path().join(name), format!("{{\"name\": \"net\", \"type\": \"{kind}\"}}")).expect("written");
        }
        assert_eq!(look(dir.path()).found, "10-a.conf: net (bridge)");
    }
}
