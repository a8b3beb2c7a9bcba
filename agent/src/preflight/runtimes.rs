//! Pods with a kernel of their own (Kata, gVisor), by the cluster's RuntimeClasses: the node's kernel sees none of their
//! sockets, so that nothing of them can be captured.

use std::{convert::Infallible, time::Duration};

use k8s_openapi::api::node::v1::RuntimeClass;
use kube::{Api, Client, ResourceExt as _, api::ListParams};
use tracing::{debug, warn};

use super::{Finding, Status};

const CHECK: &str = "runtimes";
/// For the API server's answer.
const ANSWER: Duration = Duration::from_secs(10);
/// Until it is asked again if it has not answered.
const AGAIN: Duration = Duration::from_secs(60);

/// Looks at the cluster's RuntimeClasses. That they cannot be listed is a warning.
pub async fn look(client: &Client) -> Finding {
    match ask(client).await {
        Ok(finding) => finding,
        Err(error) => Finding::warn(
            CHECK,
            format!("RuntimeClasses cannot be listed: {error}"),
            "let the service account list runtimeclasses in node.k8s.io (deploy/agent/rbac.yaml)",
        ),
    }
}

/// Says once, for an agent, whether there are any; asks until the API server answers.
pub async fn tell(client: Client) -> Infallible {
    loop {
        match ask(&client).await {
            Ok(Finding { check, status: Status::Warn | Status::Fail, found, remedy }) => {
                warn!(check, found, remedy, "preflight");
                break;
            }
            Ok(_) => break,
            Err(error) => debug!(error, "RuntimeClasses cannot be listed"),
        }
        tokio::time::sleep(AGAIN).await;
    }
    std::future::pending().await
}

async fn ask(client: &Client) -> Result<Finding, String> {
    let (classes, all) = (Api::<RuntimeClass>::all(client.clone()), ListParams::default());
    let list = match tokio::time::timeout(ANSWER, classes.list(&all)).await {
        Ok(Ok(list)) => list,
        Ok(Err(kube::Error::Api(status))) => return Err(status.message.clone()),
        Ok(Err(error)) => return Err(format!("{:#}", anyhow::Error::new(error))),
        Err(_) => return Err(format!("no answer within {} s", ANSWER.as_secs())),
    };
    Ok(judge(list.items.iter().map(|class| (class.name_any(), class.handler.clone()))))
}

/// `classes` are their names and handlers.
fn judge(classes: impl Iterator<Item = (String, String)>) -> Finding {
    let own_kernel: Vec<String> = classes
        .filter(|(_, handler)| has_own_kernel(handler))
        .map(|(name, handler)| if name == handler { name } else { format!("{name} ({handler})") })
        .collect();
    match own_kernel.is_empty() {
        true => Finding::ok(CHECK, "no RuntimeClass is of a runtime with a kernel of its own"),
        false => Finding::warn(
            CHECK,
            format!("RuntimeClass {}: the node's kernel does not see these pods' sockets", own_kernel.join(", ")),
            "keep such pods out of the mesh (label istio.io/dataplane-mode: none): what they send and get cannot be captured",
        ),
    }
}

/// As containerd's and CRI-O's handlers are called by those who install them: `kata`, `kata-qemu`, `runsc`, `gvisor`.
fn has_own_kernel(handler: &str) -> bool {
    ["kata", "runsc", "gvisor", "kuasar-vmm", "firecracker"].iter().any(|start| handler.starts_with(start))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runtimes_with_a_kernel_of_their_own_are_known_by_their_handlers() {
        let of = |classes: &[(&str, &str)]| {
            judge(classes.iter().map(|(name, handler)| ((*name).to_owned(), (*handler).to_owned())))
        };
        assert_eq!(of(&[]).status, Status::Ok);
        assert_eq!(of(&[("nvidia", "nvidia"), ("crun", "crun"), ("wasm", "spin")]).status, Status::Ok);
        let mixed = of(&[("nvidia", "nvidia"), ("safe", "kata-qemu"), ("gvisor", "runsc"), ("runsc", "runsc")]);
        assert_eq!(mixed.status, Status::Warn);
        assert!(mixed.found.starts_with("RuntimeClass safe (kata-qemu), gvisor (runsc), runsc: "), "{}", mixed.found);
    }
}
