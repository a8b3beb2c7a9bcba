//! The API server as a source: which kinds are watched, and when a view of them is whole.
//!
//! How one kind is listed and watched is in `follow`, what the objects add up to in `store`. Nothing is published before the
//! first list of every kind is complete ([D.2]); whatever the server answers later, what is known stays ([D.3]), and what
//! is wrong is told.
//!
//! Watched are the kinds that decide: of those that this version does not enforce, nothing is read here.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fmt::Debug,
    path::Path,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, anyhow};
use futures_util::{FutureExt as _, StreamExt as _, future::LocalBoxFuture, stream::FuturesUnordered};
use k8s_openapi::{
    api::{core::v1 as core, discovery::v1 as discovery},
    apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition,
};
use kube::{
    Api, Client, Config as ClientConfig, Resource,
    config::{KubeConfigOptions, Kubeconfig, KubeconfigError},
    core::{ApiResource, DynamicObject, GroupVersionKind},
};
use serde::de::DeserializeOwned;
use tokio::{
    sync::{mpsc, watch},
    time::Instant,
};
use tracing::{info, warn};

pub use self::follow::Heard;
pub(crate) use self::follow::describe;

use self::{
    follow::{Scope, follow},
    store::{Sent, Store},
};
use super::{View, Watched, kinds::Kind};

mod follow;
mod store;

/// Quiet after an event before a view is published: what one client writes in a row is one view.
const DEBOUNCE: Duration = Duration::from_millis(10);
/// Longest time that events in a row put a view off.
const MAX_DELAY: Duration = Duration::from_millis(500);
/// How long [`watch`] waits for the first lists before it returns without.
const FIRST_LISTS: Duration = Duration::from_secs(5);
/// For a connection to the API server, TLS included.
const CONNECT: Duration = Duration::from_secs(10);
/// Silence of the API server before an answer, or half-way through, after which there will be none.
const ANSWER: Duration = Duration::from_secs(10);
/// News that wait to be taken in; whoever brings more waits.
const QUEUE: usize = 256;

/// A client of the API server, by the current context of a kubeconfig file; without one, by the service account of the pod
/// that this runs in.
///
/// # Errors
/// The kubeconfig cannot be read, or this runs in no pod; with the remedy. That the server answers is not asked.
pub async fn client(kubeconfig: Option<&Path>) -> anyhow::Result<Client> {
    let mut config = config(kubeconfig).await?;
    config.read_timeout = Some(ANSWER);
    set_up(config)
}

/// [`client`], for watches: they are silent for minutes.
///
/// # Errors
/// As there.
pub async fn watcher(kubeconfig: Option<&Path>) -> anyhow::Result<Client> {
    let mut config = config(kubeconfig).await?;
    // Each watch has a connection of its own, to a server that takes new ones: one that is ending answers on those that it has,
    // and tells nothing new.
    config.headers.push((http::header::CONNECTION, http::HeaderValue::from_static("close")));
    set_up(config)
}

fn set_up(config: ClientConfig) -> anyhow::Result<Client> {
    Client::try_from(config).context("set up the client of the API server")
}

async fn config(kubeconfig: Option<&Path>) -> anyhow::Result<ClientConfig> {
    let mut config = match kubeconfig {
        Some(path) => {
            // Some errors show the place in the text, on lines of their own.
            let wrong = |error: KubeconfigError| {
                let text = format!("{:#}", anyhow::Error::new(error));
                anyhow!("the kubeconfig {}: {}", path.display(), text.lines().next().unwrap_or_default())
            };
            let file = Kubeconfig::read_from(path).map_err(wrong)?;
            ClientConfig::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await.map_err(wrong)?
        }
        None => ClientConfig::incluster()
            .context("find the API server: give --kubeconfig, or run in a pod that mounts a service account's token")?,
    };
    config.connect_timeout = Some(CONNECT);
    // Whoever asks sees each error, and tries again at a pace of its own.
    config.default_retry = false;
    Ok(config)
}

/// Which kinds are watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kinds {
    /// All that decide.
    All,
    /// Pods, namespaces and the mesh configuration: who may have which identity.
    Identities,
}

/// Watches the API server; `system_namespace` is that of ConfigMap `istio`, the mesh configuration. The view that is there at first
/// may lack everything: what has not been listed is named in [`View::unread`]. The future keeps the receiver up to date for as long
/// as it is polled, and ends when every receiver is gone. Dropping the future ends it as well.
///
/// Waits some seconds for the first lists, and then for nothing: a server that is down is asked until it answers. The future
/// does not fail.
///
/// # Errors
/// As [`client`].
pub async fn watch(
    kubeconfig: Option<&Path>,
    system_namespace: &str,
    kinds: Kinds,
) -> anyhow::Result<(watch::Receiver<Arc<View>>, impl Future<Output = anyhow::Result<()>> + use<>)> {
    let client = watcher(kubeconfig).await?;
    let (sender, receiver) = watch::channel(Arc::new(View::default()));
    let mut source = Source::new(client, system_namespace, kinds);
    source.publish(&sender);
    // Until the first lists are there, or for some time.
    let until = Instant::now() + FIRST_LISTS;
    while !receiver.borrow().unread.is_empty() && Instant::now() < until {
        let _ = tokio::time::timeout_at(until, source.step(&sender)).await;
    }
    let run = async move {
        loop {
            tokio::select! {
                () = sender.closed() => return Ok(()),
                () = source.step(&sender) => {}
            }
        }
    };
    Ok((receiver, run))
}

/// What is heard of one of the kinds.
type News = (&'static str, Kind, Heard<Sent>);

/// Everything that is watched, and what it has said.
struct Source {
    store: Store,
    news: mpsc::Receiver<News>,
    /// One for each kind; none of them ends before the source does.
    followers: FuturesUnordered<LocalBoxFuture<'static, ()>>,
    watched: BTreeMap<&'static str, Watched>,
    /// Errors that were logged, and since when a kind has one.
    told: HashMap<&'static str, (String, Instant)>,
    logged: BTreeSet<String>,
    /// When the first of the news that are not published came, and when the last did.
    since: Option<(Instant, Instant)>,
}

impl Source {
    fn new(client: Client, system_namespace: &str, kinds: Kinds) -> Self {
        let (sender, news) = mpsc::channel(QUEUE);
        let followers = FuturesUnordered::new();
        let mut watched = BTreeMap::new();
        macro_rules! watch {
            ($kind:expr, $api:expr, $scope:expr, $sent:expr) => {{
                let (name, sender) = ($kind.name(), sender.clone());
                watched.insert(name, Watched::default());
                followers.push(
                    follow($api, $scope, async move |heard| {
                        sender.send((name, $kind, heard.map(|object| $sent(Box::new(object))))).await.is_ok()
                    })
                    .boxed_local(),
                );
            }};
        }
        watch!(Kind::Pod, Api::<core::Pod>::all(client.clone()), Scope::default(), Sent::Pod);
        watch!(Kind::Namespace, Api::<core::Namespace>::all(client.clone()), Scope::default(), Sent::Namespace);
        let config_maps = Api::<core::ConfigMap>::namespaced(client.clone(), system_namespace);
        watch!(Kind::ConfigMap, config_maps, Scope::named("istio"), Sent::ConfigMap);
        if kinds == Kinds::All {
            watch!(Kind::Node, Api::<core::Node>::all(client.clone()), Scope::default(), Sent::Node);
            watch!(Kind::Service, Api::<core::Service>::all(client.clone()), Scope::default(), Sent::Service);
            watch!(
                Kind::EndpointSlice,
                Api::<discovery::EndpointSlice>::all(client.clone()),
                Scope::default(),
                Sent::EndpointSlice
            );
            for policy in &POLICIES {
                watched.insert(policy.definition, Watched::default());
                watched.insert(policy.kind.name(), Watched::default());
                let (kind, sender) = (policy.kind, sender.clone());
                let tell = async move |name, heard: Heard<DynamicObject>| {
                    let heard = heard.map(|object| Sent::Policy(kind, Box::new(object)));
                    sender.send((name, kind, heard)).await.is_ok()
                };
                followers.push(policies(client.clone(), policy, tell).boxed_local());
            }
        }
        let (told, logged) = (HashMap::new(), BTreeSet::new());
        Self { store: Store::new(system_namespace), news, followers, watched, told, logged, since: None }
    }

    /// Takes in the next of the news, or publishes what has come.
    async fn step(&mut self, sender: &watch::Sender<Arc<View>>) {
        let due = self.since.map(|(first, last)| (last + DEBOUNCE).min(first + MAX_DELAY));
        let timer = async {
            match due {
                Some(due) => tokio::time::sleep_until(due).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            () = timer => {
                self.since = None;
                self.publish(sender);
            }
            Some((name, kind, heard)) = self.news.recv() => {
                self.hear(name, kind, heard);
                let now = Instant::now();
                self.since = Some((self.since.map_or(now, |(first, _)| first), now));
            }
            // They end only when nobody hears them any more.
            Some(()) = self.followers.next() => {}
        }
    }

    fn hear(&mut self, name: &'static str, kind: Kind, heard: Heard<Sent>) {
        let watched = self.watched.entry(name).or_default();
        match &heard {
            Heard::Complete | Heard::NoSuchKind => {
                watched.listed = true;
                self.well(name);
            }
            Heard::Well => self.well(name),
            Heard::Trouble(error) => {
                watched.errors += 1;
                watched.error = Some(error.clone());
                match self.told.get_mut(name) {
                    Some((said, _)) if said == error => {}
                    Some((said, _)) => {
                        warn!(kind = name, error, "the API server cannot be heard");
                        said.clone_from(error);
                    }
                    None => {
                        warn!(kind = name, error, "the API server cannot be heard: what is known stays in force");
                        self.told.insert(name, (error.clone(), Instant::now()));
                    }
                }
            }
            Heard::List | Heard::Listed(_) | Heard::Applied(_) | Heard::Deleted(_) => {}
        }
        if name == kind.name() {
            self.store.hear(kind, heard);
        }
    }

    fn well(&mut self, name: &'static str) {
        if let Some(watched) = self.watched.get_mut(name) {
            watched.error = None;
        }
        if let Some((_, since)) = self.told.remove(name) {
            info!(kind = name, after = ?since.elapsed(), "the API server is heard again");
        }
    }

    fn publish(&mut self, sender: &watch::Sender<Arc<View>>) {
        let missing = self.watched.iter().filter(|(_, watched)| !watched.listed);
        let unread = missing.map(|(name, watched)| match &watched.error {
            Some(error) => format!("the API server's list of {name} ({error})"),
            None => format!("the API server's list of {name}"),
        });
        let unread: Vec<String> = unread.collect();
        let view = match unread.is_empty() {
            // Half a list is none: nothing is shown of what has come.
            false => View { unread, watched: self.watched.clone(), ..View::default() },
            true => View { watched: self.watched.clone(), ..self.store.view() },
        };
        let lines: BTreeSet<String> =
            view.problems.iter().map(ToString::to_string).chain(view.notices.iter().cloned()).collect();
        // A problem that was mended and comes again is news again.
        self.logged.retain(|line| lines.contains(line));
        for line in lines {
            if !self.logged.contains(&line) {
                warn!("{line}");
                self.logged.insert(line);
            }
        }
        sender.send_if_modified(|current| {
            if view.unread.is_empty() && !current.unread.is_empty() {
                let cluster = &view.cluster;
                info!(
                    pods = cluster.pods.len(),
                    services = cluster.services.len(),
                    peer_authentications = cluster.peer_authentications.len(),
                    authorization_policies = cluster.authorization_policies.len(),
                    problems = view.problems.len(),
                    "the API server's objects are listed"
                );
            }
            let changed = **current != view;
            if changed {
                *current = Arc::new(view);
            }
            changed
        });
    }
}

/// A kind of policy, and where the cluster defines it.
struct Policy {
    kind: Kind,
    group: &'static str,
    plural: &'static str,
    /// As [`Watched`] is told of the definition.
    definition: &'static str,
    /// Name of the CustomResourceDefinition.
    name: &'static str,
    /// Versions that mean the same (specification §1.2), the best first.
    versions: &'static [&'static str],
}

const POLICIES: [Policy; 2] = [
    Policy {
        kind: Kind::PeerAuthentication,
        group: "security.istio.io",
        plural: "peerauthentications",
        definition: "CustomResourceDefinition peerauthentications.security.istio.io",
        name: "peerauthentications.security.istio.io",
        versions: &["v1", "v1beta1"],
    },
    Policy {
        kind: Kind::AuthorizationPolicy,
        group: "security.istio.io",
        plural: "authorizationpolicies",
        definition: "CustomResourceDefinition authorizationpolicies.security.istio.io",
        name: "authorizationpolicies.security.istio.io",
        versions: &["v1", "v1beta1"],
    },
];

/// What a definition says of where its objects are.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Definition {
    /// Nothing yet.
    Unknown,
    /// There is none: the kind does not exist, and no object of it does.
    Absent,
    /// It is there, and its objects cannot be read in a way that this version knows.
    Unserved(String),
    Served(ApiResource),
}

impl Definition {
    fn of(policy: &Policy, definition: &CustomResourceDefinition) -> Self {
        let conditions = definition.status.as_ref().and_then(|status| status.conditions.as_deref()).unwrap_or_default();
        let holds = |name: &str| conditions.iter().any(|one| one.type_ == name && one.status == "True");
        if !holds("Established") {
            return Self::Unserved("its definition is not established yet".to_owned());
        }
        let served = |version: &&&str| definition.spec.versions.iter().any(|one| one.served && one.name == **version);
        match policy.versions.iter().find(served) {
            Some(version) => {
                let kind = GroupVersionKind::gvk(policy.group, version, policy.kind.name());
                Self::Served(ApiResource::from_gvk_with_plural(&kind, policy.plural))
            }
            None => Self::Unserved(format!("its definition serves none of {}", policy.versions.join(", "))),
        }
    }
}

/// Tells what the API server has of one object, until `tell` says that nobody listens any more.
pub async fn follow_named<K>(api: Api<K>, name: &str, tell: impl AsyncFn(Heard<K>) -> bool)
where
    K: Resource + Clone + DeserializeOwned + Debug,
{
    follow(api, Scope::named(name), tell).await;
}

/// Tells what the API server has of the kinds of policies, until `tell` says that nobody listens any more. What is told comes
/// with the name of the kind, as `kind` spells it, each object with its `apiVersion` and `kind`; what is told of a kind's
/// definition comes with the definition's name, and is never an object.
pub async fn follow_policies(client: Client, tell: impl AsyncFn(&'static str, Heard<DynamicObject>) -> bool) {
    let [first, second] = &POLICIES;
    tokio::join!(policies(client.clone(), first, &tell), policies(client, second, &tell));
}

/// Watches a kind of policy for as long as the cluster has it.
async fn policies(
    client: Client,
    policy: &'static Policy,
    tell: impl AsyncFn(&'static str, Heard<DynamicObject>) -> bool,
) {
    let (name, tell) = (policy.kind.name(), &tell);
    let (definitions, mut now) = watch::channel(Definition::Unknown);
    let listed = std::cell::RefCell::new(Definition::Absent);
    let definition = follow(
        Api::<CustomResourceDefinition>::all(client.clone()),
        Scope::named(policy.name),
        async move |heard: Heard<CustomResourceDefinition>| {
            match &heard {
                Heard::List => *listed.borrow_mut() = Definition::Absent,
                Heard::Listed(one) => *listed.borrow_mut() = Definition::of(policy, one),
                Heard::Complete => drop(definitions.send_replace(listed.borrow().clone())),
                Heard::Applied(one) => drop(definitions.send_replace(Definition::of(policy, one))),
                Heard::Deleted(_) | Heard::NoSuchKind => drop(definitions.send_replace(Definition::Absent)),
                Heard::Well | Heard::Trouble(_) => {}
            }
            // Of the definition itself nobody keeps anything.
            let heard = match heard {
                Heard::Complete => Heard::Complete,
                Heard::Trouble(error) => Heard::Trouble(error),
                _ => Heard::Well,
            };
            tell(policy.definition, heard).await
        },
    );
    let objects = async {
        loop {
            let at = now.borrow_and_update().clone();
            let wanted = async {
                match at.clone() {
                    Definition::Unknown => {}
                    Definition::Absent => drop(tell(name, Heard::NoSuchKind).await),
                    Definition::Unserved(why) => drop(tell(name, Heard::Trouble(why)).await),
                    Definition::Served(resource) => {
                        let api = Api::<DynamicObject>::all_with(client.clone(), &resource);
                        follow(api, Scope::default(), async move |heard: Heard<DynamicObject>| {
                            let heard = heard.map(|mut object| {
                                object.types.get_or_insert_with(|| kube::core::TypeMeta {
                                    api_version: resource.api_version.clone(),
                                    kind: resource.kind.clone(),
                                });
                                object
                            });
                            tell(name, heard).await
                        })
                        .await;
                    }
                }
                std::future::pending::<()>().await;
            };
            tokio::select! {
                () = wanted => {}
                changed = now.wait_for(|definition| *definition != at) => if changed.is_err() { return },
            }
        }
    };
    tokio::join!(definition, objects);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn definition(served: &[(&str, bool)], established: &str) -> CustomResourceDefinition {
        let versions: Vec<_> = served
            .iter()
            .map(|(name, served)| serde_json::json!({"name": name, "served": served, "storage": false}))
            .collect();
        serde_json::from_value(serde_json::json!({
            "metadata": {"name": POLICIES[0].name},
            "spec": {
                "group": "security.istio.io", "scope": "Namespaced", "versions": versions,
                "names": {"kind": "PeerAuthentication", "plural": "peerauthentications"}
            },
            "status": {"conditions": [{"type": "Established", "status": established}]}
        }))
        .expect("a definition")
    }

    /// Specification §1.2: of the versions that mean the same, the best that is served.
    #[test]
    fn a_definition_says_by_which_version_its_objects_are_read() {
        let of = |served: &[(&str, bool)], established| Definition::of(&POLICIES[0], &definition(served, established));
        for (served, expected) in [
            (&[("v1beta1", true), ("v1", true)][..], "security.istio.io/v1"),
            (&[("v1beta1", true), ("v1", false)], "security.istio.io/v1beta1"),
        ] {
            let Definition::Served(resource) = of(served, "True") else { panic!("{served:?} is served") };
            assert_eq!((&*resource.api_version, &*resource.plural), (expected, "peerauthentications"));
        }
        assert!(matches!(of(&[("v1", true)], "False"), Definition::Unserved(why) if why.contains("not established")));
        assert!(
            matches!(of(&[("v2", true)], "True"), Definition::Unserved(why) if why.contains("none of v1, v1beta1"))
        );
    }
}
