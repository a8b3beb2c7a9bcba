//! What kind's own network plugin does, which is in no module: on each node a configuration of the plugin `ptp` with the node's part of
//! the pods' addresses, and routes to the other nodes' parts.

use anyhow::{Context as _, Result};
use serde_json::json;

use super::{Cluster, NodeInfo, READY_LIMIT};
use crate::command;

/// The file that containerd is configured to wait for; a link is put in place whole.
const FILE: &str = "/etc/cni/net.d/10-kindnet.conflist";

/// Connects the nodes' pods, and waits until all nodes are ready. A node that was started again may have another address: then
/// this is to be done again.
pub(super) fn connect(cluster: &Cluster) -> Result<()> {
    let expected = cluster.plan.workers + 1;
    let nodes = command::wait_for("every node has its part of the pods' addresses", READY_LIMIT, || {
        // Until then it has none, which is an error there.
        Ok(cluster.nodes().ok().filter(|nodes| nodes.len() == expected))
    })?;
    for node in &nodes {
        for other in nodes.iter().filter(|other| other.name != node.name) {
            cluster.on_node(&node.name, &["ip", "route", "replace", &other.pods, "via", &other.ip], None)?;
        }
        let script = format!("mkdir -p /etc/cni/net.d && cat > {FILE}.new && mv {FILE}.new {FILE}");
        cluster
            .on_node(&node.name, &["sh", "-c", &script], Some(&configuration(node)))
            .with_context(|| format!("configure the network of {}", node.name))?;
    }
    let limit = format!("--timeout={}s", (READY_LIMIT * crate::patience()).as_secs());
    cluster.kubectl(&["wait", "--for=condition=Ready", "nodes", "--all", &limit]).map(drop)
}

fn configuration(node: &NodeInfo) -> String {
    json!({
        "cniVersion": "0.3.1",
        "name": "kindnet",
        "plugins": [
            {
                "type": "ptp",
                "ipMasq": false,
                "mtu": 1500,
                "ipam": {
                    "type": "host-local",
                    "dataDir": "/run/cni-ipam-state",
                    "routes": [{ "dst": "0.0.0.0/0" }],
                    "ranges": [[{ "subnet": node.pods }]]
                }
            },
            { "type": "portmap", "capabilities": { "portMappings": true } }
        ]
    })
    .to_string()
}
