//! The settings of `culvert preflight`: those of the agent that say where it is, read from where the agent reads them.

use std::path::PathBuf;

use super::{
    Invalid, Setting, Values,
    agent::{self, CGROUP_ROOT, IN_CLUSTER, KUBECONFIG, PIN_DIR, veth_filter},
};
use crate::preflight::{self, CNI_CONFIGURATION};

/// The table, of which everything is a setting of the agent too.
pub const SETTINGS: &[Setting] = &[KUBECONFIG, CGROUP_ROOT, PIN_DIR];

/// The configuration of `culvert preflight`.
#[derive(Clone, Debug)]
pub struct Config {
    /// What the agent would run with.
    pub node: preflight::Config,
    /// The API server that tells of the cluster: by `--kubeconfig`, or by the pod's service account; without either, none
    /// is asked.
    pub cluster: Option<Option<PathBuf>>,
}

/// Collects the values from the agent's environment and file; `flag` gives what was typed.
///
/// # Errors
/// The file that `--config` names cannot be read, or a value is wrong.
pub fn read(flag: impl Fn(&str) -> Option<String>) -> anyhow::Result<Config> {
    let typed = |name: &str| SETTINGS.iter().chain([&super::CONFIG]).any(|setting| setting.name == name);
    // The agent's file has more than these, and that is no mistake.
    let values = Values::collect(agent::SETTINGS, |name| typed(name).then(|| flag(name)).flatten())?;
    Ok(understand(values, std::env::var_os(IN_CLUSTER).is_some())?)
}

fn understand(mut values: Values, in_pod: bool) -> Result<Config, Invalid> {
    let (pin_dir, cgroup_root) = (values.optional("pin-dir"), values.optional("cgroup-root"));
    let kubeconfig: Option<PathBuf> = values.optional("kubeconfig");
    // An agent that reads a folder has no API server, wherever it runs.
    let cluster = (kubeconfig.is_some() || in_pod && !values.has("manifests")).then_some(kubeconfig);
    let (cni_configuration, veth_filter) = (CNI_CONFIGURATION.into(), veth_filter(&mut values));
    let node = (|| {
        Some(preflight::Config { pin_dir: pin_dir?, cgroup_root, veth_filter: veth_filter?, cni_configuration, in_pod })
    })();
    values.finish(node.map(|node| Config { node, cluster }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_agents_settings_count_and_none_of_its_others_is_missed() {
        let of = |given: &[(&'static str, &str)], in_pod| {
            let flag = |name: &str| given.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned());
            understand(Values::collect(agent::SETTINGS, flag).expect("collected"), in_pod).expect("understood")
        };
        let plain = of(&[], false);
        assert_eq!((plain.node.pin_dir, plain.node.cgroup_root), ("/sys/fs/bpf/culvert".into(), None));
        assert!(plain.cluster.is_none() && !plain.node.in_pod);
        assert_eq!(of(&[], true).cluster, Some(None));
        assert_eq!(of(&[("manifests", "/m")], true).cluster, None);
        assert_eq!(of(&[("kubeconfig", "/k")], false).cluster, Some(Some("/k".into())));
        assert_eq!(of(&[("cgroup-root", "/c")], false).node.cgroup_root, Some("/c".into()));
    }
}
