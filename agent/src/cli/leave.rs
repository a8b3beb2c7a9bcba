//! `culvert leave`: the cluster leaves the mesh. What a pre-delete hook of Helm runs, before the rights of the agents go.

use std::{path::PathBuf, time::Duration};

use anyhow::Context as _;
use clap::{Args, Subcommand};

use super::print;
use crate::{
    config::{agent::object_name, parse_duration},
    leave::{self, Left},
    model::ObjectRef,
    source::kubernetes,
};

/// Something to be done to the cluster.
#[derive(Debug, Subcommand)]
pub enum InCluster {
    /// Deletes the agents' DaemonSet and waits for their end; each takes its node's pods out of the mesh
    Leave(Leave),
}

/// `culvert leave`
#[derive(Args, Clone, Debug)]
pub struct Leave {
    /// The agents' DaemonSet
    #[arg(long, value_name = "NAMESPACE/NAME", default_value = "istio-system/culvert", value_parser = object_name)]
    daemonset: ObjectRef,
    /// How to reach the API server; the service account of the pod unless set
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
    /// How long to wait for agents that drain; what is still open then goes on, and they end by themselves
    #[arg(long, value_name = "DURATION", default_value = "240s", value_parser = parse_duration)]
    wait: Duration,
}

impl InCluster {
    /// Does it, and says on standard output what was done.
    ///
    /// # Errors
    /// The API server cannot be asked, or does not allow it: one line.
    pub fn run(self) -> anyhow::Result<()> {
        let Self::Leave(Leave { daemonset, kubeconfig, wait }) = self;
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().build().context("build the runtime")?;
        let left = runtime.block_on(async {
            let client = kubernetes::client(kubeconfig.as_deref()).await?;
            leave::all(client, &daemonset, wait).await
        })?;
        let told = match left {
            Left::Nothing => format!("there is no DaemonSet {daemonset}: nothing to do\n"),
            Left::Ended => format!("DaemonSet {daemonset} is deleted, and its agents have ended\n"),
            Left::Draining(agents) => format!(
                "DaemonSet {daemonset} is deleted; after {} s {agents} of its agents still drain, and end by themselves\n",
                wait.as_secs()
            ),
        };
        print(&told).map(drop)
    }
}
