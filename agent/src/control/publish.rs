//! The roots for everybody: ConfigMap `istio-ca-root-cert` in every namespace (specification §4), as Istio publishes them.
//!
//! Written by the leader, and never against somebody else: where another manager has written other roots, they stay, and it is said.

use std::{
    collections::{BTreeMap, BTreeSet},
    convert::Infallible,
    sync::Arc,
    time::Duration,
};

use futures_util::{StreamExt as _, stream};
use k8s_openapi::api::core::v1::ConfigMap;
use kube::{
    Api, Client,
    api::{ListParams, Patch, PatchParams},
};
use serde_json::json;
use tokio::{sync::watch, time::Instant};
use tracing::{info, warn};

use crate::{ca::authority::Authority, source::View, source::kubernetes::describe};

use super::MANAGER;

/// Name of the ConfigMap.
const NAME: &str = "istio-ca-root-cert";
/// Its key.
const KEY: &str = "root-cert.pem";
/// How often it is looked whether all are as they should be.
const LOOK: Duration = Duration::from_secs(30);
/// After an error.
const AGAIN: Duration = Duration::from_secs(5);
/// Requests at a time.
const WRITERS: usize = 8;

/// Keeps the ConfigMaps for as long as it is polled; what fails is tried again.
pub(super) async fn keep(
    client: Client,
    mut views: watch::Receiver<Arc<View>>,
    mut authority: watch::Receiver<Arc<Authority>>,
) -> Infallible {
    let mut said = BTreeMap::new();
    // What the namespaces were said to have.
    let mut known: BTreeMap<String, String> = BTreeMap::new();
    let mut look_at = Instant::now();
    loop {
        let roots = authority.borrow_and_update().roots_pem().to_owned();
        let namespaces: BTreeSet<String> = namespaces(&views.borrow_and_update());
        let mut next = Instant::now() + LOOK;
        if Instant::now() >= look_at {
            match list(&client).await {
                Ok(found) => {
                    tell(&mut said, "", None);
                    known = found;
                }
                Err(error) => {
                    tell(&mut said, "", Some(error));
                    next = Instant::now() + AGAIN;
                }
            }
            look_at = next;
        }
        known.retain(|namespace, _| namespaces.contains(namespace));
        let missing: Vec<&String> = namespaces.iter().filter(|name| known.get(*name) != Some(&roots)).collect();
        let written: Vec<(String, Result<(), kube::Error>)> = stream::iter(missing)
            .map(|namespace| {
                let (client, roots) = (&client, &roots);
                async move { (namespace.clone(), write(client, namespace, roots).await) }
            })
            .buffer_unordered(WRITERS)
            .collect()
            .await;
        for (namespace, result) in written {
            match result {
                Ok(()) => {
                    tell(&mut said, &namespace, None);
                    known.insert(namespace, roots.clone());
                }
                // It goes, or is gone: nothing can be made in it.
                Err(kube::Error::Api(status))
                    if status.code == 404 || status.reason == "Forbidden" && is_ending(&status.message) => {}
                Err(error) => {
                    tell(&mut said, &namespace, Some(describe(&error)));
                    look_at = look_at.min(Instant::now() + AGAIN);
                }
            }
        }
        said.retain(|namespace, _| namespace.is_empty() || namespaces.contains(namespace));
        tokio::select! {
            () = tokio::time::sleep_until(look_at) => {}
            // Neither ends before this does.
            _ = authority.changed() => {}
            () = others(&mut views, &namespaces) => {}
        }
    }
}

/// Returns when there are other namespaces.
async fn others(views: &mut watch::Receiver<Arc<View>>, than: &BTreeSet<String>) {
    loop {
        if views.changed().await.is_err() {
            return std::future::pending().await;
        }
        if namespaces(&views.borrow_and_update()) != *than {
            return;
        }
    }
}

fn namespaces(view: &View) -> BTreeSet<String> {
    view.cluster.namespaces.keys().map(ToString::to_string).collect()
}

fn is_ending(message: &str) -> bool {
    message.contains("being terminated")
}

/// The roots that each namespace has.
async fn list(client: &Client) -> Result<BTreeMap<String, String>, String> {
    let mut params = ListParams::default().fields(&format!("metadata.name={NAME}")).limit(500);
    let mut found = BTreeMap::new();
    loop {
        let page = Api::<ConfigMap>::all(client.clone()).list(&params).await.map_err(|error| describe(&error))?;
        for map in page.items {
            let roots = map.data.and_then(|mut data| data.remove(KEY)).unwrap_or_default();
            found.insert(map.metadata.namespace.unwrap_or_default(), roots);
        }
        match page.metadata.continue_.filter(|token| !token.is_empty()) {
            Some(token) => params.continue_token = Some(token),
            None => return Ok(found),
        }
    }
}

async fn write(client: &Client, namespace: &str, roots: &str) -> Result<(), kube::Error> {
    let map = json!({
        "apiVersion": "v1", "kind": "ConfigMap",
        // By the label Istio's own tools know it.
        "metadata": {"name": NAME, "namespace": namespace, "labels": {"istio.io/config": "true"}},
        "data": {KEY: roots},
    });
    let api = Api::<ConfigMap>::namespaced(client.clone(), namespace);
    api.patch(NAME, &PatchParams::apply(MANAGER), &Patch::Apply(map)).await.map(drop)
}

/// One line when something begins to be wrong with a namespace, becomes another thing, and ends.
fn tell(said: &mut BTreeMap<String, String>, namespace: &str, error: Option<String>) {
    match error {
        Some(error) => {
            if said.get(namespace) != Some(&error) {
                warn!(namespace, error, "the roots cannot be published in ConfigMap {NAME}: trying again");
                said.insert(namespace.to_owned(), error);
            }
        }
        None => {
            if said.remove(namespace).is_some() {
                info!(namespace, "the roots are published again in ConfigMap {NAME}");
            }
        }
    }
}
