//! What the leader writes into the status of policies: whether a version is valid, on how many agents it is in force,
//! and the last version that was valid, which agents fall back to ([C.6]).
//!
//! What is wanted is in `wanted`, when it is due in `keeper`; here it is heard and written. Written is by server-side
//! apply, without force: what another manager has written is its own, and stays.
//!
//! The rights that it takes: `list` and `watch` of the policies and of their definitions, `patch` of their `status`.

use std::{collections::HashMap, convert::Infallible, sync::Arc, time::Duration};

use futures_util::{FutureExt as _, StreamExt as _, stream::FuturesUnordered};
use k8s_openapi::jiff::Timestamp;
use kube::{
    Api, Client, Error,
    api::{Patch, PatchParams},
    core::{ApiResource, DynamicObject, GroupVersionKind},
};
use tokio::{
    sync::{mpsc, watch},
    time::Instant,
};
use tracing::{info, warn};

use crate::{
    model::ObjectRef,
    source::kubernetes::{Heard, describe, follow_policies},
};

use self::{
    keeper::{Keeper, Outcome, Write},
    wanted::{Fields, MANAGER},
};
use super::reports::{Count, Ledger};

mod keeper;
#[cfg(test)]
mod tests;
mod wanted;

/// Writes that are on their way at once.
const IN_FLIGHT: usize = 8;
/// For the API server's answer.
const ANSWER: Duration = Duration::from_secs(10);
/// News that wait to be taken in; whoever brings more waits.
const QUEUE: usize = 256;

/// Keeps the status of every PeerAuthentication and AuthorizationPolicy, for as long as it is polled: as the leader
/// only. What fails is tried again. It can be dropped at any time: what was on its way is written or is not, and either
/// is right.
///
/// `watcher` is for what lasts, `client` for what is answered at once. `system_namespace` is that of ConfigMap `istio`, the mesh
/// configuration.
pub(super) async fn keep(
    client: Client,
    watcher: Client,
    system_namespace: &str,
    mut ledgers: watch::Receiver<Arc<Ledger>>,
) -> Infallible {
    let (sender, mut news) = mpsc::channel(QUEUE);
    let tell = async move |name, heard: Heard<DynamicObject>| sender.send((name, heard)).await.is_ok();
    let mut follow = Box::pin(follow_policies(watcher, tell).fuse());
    let mut keeper = Keeper::new(system_namespace, Instant::now());
    let mut ledger = ledgers.borrow_and_update().clone();
    let mut writes = FuturesUnordered::new();
    let mut heard = Troubles::default();
    let mut counted = true;
    loop {
        let due = keeper.due().filter(|_| writes.len() < IN_FLIGHT);
        let timer = async {
            match due {
                Some(due) => tokio::time::sleep_until(due).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = timer => {
                while writes.len() < IN_FLIGHT {
                    let Some(next) = keeper.next(Instant::now(), &clock()) else { break };
                    writes.push(write(client.clone(), next));
                }
            }
            Some((name, news)) = news.recv() => {
                heard.hear(name, &news);
                keeper.hear(name, news, &counts(&ledger), Instant::now());
            }
            changed = ledgers.changed(), if counted => {
                counted = changed.is_ok();
                ledger = ledgers.borrow_and_update().clone();
                keeper.recount(&counts(&ledger), Instant::now());
            }
            Some((write, outcome)) = writes.next() => keeper.finish(write, outcome, Instant::now()),
            // It ends only when nobody hears it any more.
            () = &mut follow => {}
        }
    }
}

fn counts(ledger: &Ledger) -> impl Fn(&str, &ObjectRef, i64) -> Count {
    |kind, object, generation| ledger.count(kind, object, generation)
}

/// Now, in whole seconds, as RFC 3339 has it.
fn clock() -> String {
    let now = Timestamp::now();
    Timestamp::from_second(now.as_second()).unwrap_or(now).to_string()
}

async fn write(client: Client, write: Write) -> (Write, Outcome) {
    let outcome = match resource(&write) {
        Some(resource) => {
            let api = Api::<DynamicObject>::namespaced_with(client, &write.key.1.namespace, &resource);
            let params = PatchParams { field_manager: Some(MANAGER.to_owned()), ..PatchParams::default() };
            let patch = Patch::Apply(write.patch());
            let answer = api.patch_status(&write.key.1.name, &params, &patch);
            match tokio::time::timeout(ANSWER, answer).await {
                Ok(Ok(object)) => Outcome::Written(Box::new(object)),
                Ok(Err(error)) => judge(&error),
                Err(_) => Outcome::Failed { error: format!("no answer within {} s", ANSWER.as_secs()), after: None },
            }
        }
        None => Outcome::Failed { error: format!("apiVersion {:?} has no group", write.api_version), after: None },
    };
    (write, outcome)
}

/// Where the object is, in the version by which it was read.
fn resource(write: &Write) -> Option<ApiResource> {
    let (group, version) = write.api_version.split_once('/')?;
    Some(ApiResource::from_gvk(&GroupVersionKind::gvk(group, version, write.key.0)))
}

/// What an error means for the object.
fn judge(error: &Error) -> Outcome {
    let mut after = None;
    if let Error::Api(status) = error {
        if status.code == 404 {
            return Outcome::Gone;
        }
        if status.code == 409 {
            return match Fields::refused(status) {
                Some(fields) => Outcome::Refused(fields, describe(error)),
                // Another object has taken the name.
                None => Outcome::Gone,
            };
        }
        let seconds = status.details.as_ref().map_or(0, |details| details.retry_after_seconds.min(60));
        after = Some(Duration::from_secs(u64::from(seconds)));
    }
    Outcome::Failed { error: describe(error), after }
}

/// Which kinds cannot be heard of, so that it is said once.
#[derive(Default)]
struct Troubles(HashMap<&'static str, Instant>);

impl Troubles {
    fn hear(&mut self, name: &'static str, heard: &Heard<DynamicObject>) {
        match heard {
            Heard::Trouble(error) => {
                self.0.entry(name).or_insert_with(|| {
                    warn!(kind = name, error, "the API server cannot be heard: the status of policies stays as it is");
                    Instant::now()
                });
            }
            Heard::Complete | Heard::Well | Heard::NoSuchKind => {
                if let Some(since) = self.0.remove(name) {
                    info!(kind = name, after = ?since.elapsed(), "the API server is heard again");
                }
            }
            Heard::List | Heard::Listed(_) | Heard::Applied(_) | Heard::Deleted(_) => {}
        }
    }
}
