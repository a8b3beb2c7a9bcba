//! What is left of a sandbox on the machine, by its name: for tests of its removal, which its own list must not decide.

use std::collections::BTreeSet;
use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};

use super::{cgroup2_mount, command};

/// Everything on the machine that bears the sandbox's name: directories, namespaces, control groups, pins, processes.
///
/// # Errors
/// A folder could not be listed.
pub fn traces(instance: &str) -> Result<BTreeSet<String>> {
    let name = format!("culvert-{instance}");
    let mut found = BTreeSet::new();
    for dir in ["/run", "/run/netns", "/var/tmp", "/sys/fs/bpf", &cgroup2_mount()?.to_string_lossy()] {
        let Ok(entries) = fs::read_dir(dir) else { continue };
        for entry in entries {
            let path = entry?.path();
            let is_ours = path.file_name().is_some_and(|n| {
                let n = n.to_string_lossy();
                n == name || n.starts_with(&format!("{name}-"))
            });
            if is_ours {
                found.insert(path.to_string_lossy().into_owned());
            }
        }
    }
    for entry in fs::read_dir("/proc")? {
        let path = entry?.path();
        // A process that ends meanwhile is none.
        let cgroups = fs::read_to_string(path.join("cgroup")).unwrap_or_default();
        let arguments = fs::read(path.join("cmdline")).unwrap_or_default();
        let arguments = String::from_utf8_lossy(&arguments).replace('\0', " ");
        // The CA and the agents are told folders of the sandbox, wherever they were moved to.
        let told = [format!("/run/{name}/"), format!("/sys/fs/bpf/{name}-")];
        if cgroups.contains(&format!("/{name}/")) || told.iter().any(|folder| arguments.contains(folder)) {
            found.insert(format!("{} ({})", path.display(), arguments.trim()));
        }
    }
    Ok(found)
}

/// Waits a moment until nothing is left: ended processes whose owner died are taken note of by the system's first process.
///
/// # Errors
/// Something is left behind; the error names it.
pub fn expect_no_traces(instance: &str) -> Result<()> {
    let mut left = BTreeSet::new();
    command::wait_for("nothing is left behind", Duration::from_secs(5), || {
        left = traces(instance)?;
        Ok(left.is_empty().then_some(()))
    })
    .with_context(|| format!("left behind: {left:?}"))
}
