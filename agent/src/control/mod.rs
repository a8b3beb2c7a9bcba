//! `culvert control`: the cluster's part, of which there are replicas. No data path.
//!
//! | room | its one job | who does it |
//! |---|---|---|
//! | `callers` | whether a token is genuine, by the API server's word | every replica |
//! | `roots` | the CA's key and certificates, in Secrets | every replica |
//! | `leader` | which replica leads | |
//! | `publish` | the roots in every namespace | the leader |
//! | `reports` | which policies the agents have in force | the leader |
//! | `status` | what became of each policy, in its status | the leader |
//! | `webhook` | whether a policy is right, before it is stored | every replica; that API servers trust it, the leader |
//!
//! The CA that answers is [`crate::ca`]'s, the one of `culvert ca`. Nothing is answered before the API server's objects are listed
//! and a key is there; what is not there yet is said by readiness.

mod callers;
pub(crate) mod leader;
mod publish;
pub(crate) mod reports;
mod roots;
mod status;
mod webhook;

use std::{collections::BTreeSet, convert::Infallible, net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use anyhow::{Context as _, anyhow};
use tokio::{net::TcpListener, sync::watch};

use self::{
    callers::Reviews,
    leader::{Election, Leadership},
    reports::{ReportService, reports},
    roots::Roots,
};
use crate::{
    ca::{self, ServerCertificate, Terms, authority::Authority, caller::Callers},
    identity::Clock,
    model::{Cluster, ObjectRef},
    policy,
    source::{self, View, kubernetes},
    telemetry::readiness::{self, Ready},
    validate,
};

/// In whose name objects are applied.
const MANAGER: &str = "culvert-control";
/// Name of the Lease of the leader.
const LEASE: &str = "culvert-control";

/// What [`run`] needs to know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Kubeconfig of the API server; without one, the service account of the pod that this runs in.
    pub kubeconfig: Option<PathBuf>,
    /// Namespace of ConfigMap `istio`, of the Secrets of the CA and of the Lease.
    pub system_namespace: String,
    /// Where the CA answers; Istio's port is 15012.
    pub listen: SocketAddr,
    /// Where the validating webhook answers; Istio's port is 15017.
    pub webhook: SocketAddr,
    /// Name of the ValidatingWebhookConfiguration whose `caBundle` is kept; default `culvert-validator`.
    pub webhook_configuration: String,
    /// Where readiness answers.
    pub readiness: SocketAddr,
    /// Name of this replica, unlike all others': its pod's.
    pub replica: String,
    /// Where other replicas' clients reach this one, `host:port`.
    pub address: String,
    /// Audience that a token must have; default `istio-ca`.
    pub token_audience: String,
    /// Service accounts of node agents; default `istio-system/culvert`.
    pub trusted_node_accounts: BTreeSet<ObjectRef>,
    /// DNS names and IP addresses of the server certificate; default `istiod.istio-system.svc`.
    pub server_names: Vec<String>,
    /// Lifetime of a certificate where the request asks for none; default 24 h.
    pub cert_ttl: Duration,
    /// Longest lifetime; a request for more gets this. Default 2160 h.
    pub max_cert_ttl: Duration,
}

/// Serves until `shutdown` ends, then gives leadership back and lets open requests finish.
///
/// # Errors
/// The configuration cannot be used, or an address is taken: one line that says what to change. What the API server does is no
/// reason to end.
pub async fn run(config: Config, shutdown: impl Future<Output = ()>) -> anyhow::Result<()> {
    let terms = Terms { cert_ttl: config.cert_ttl, max_cert_ttl: config.max_cert_ttl }.check()?;
    // Before anything is asked for, so that a wrong address is said at once.
    let listeners = Listeners { ca: ca::bind(config.listen).await?, webhook: ca::bind(config.webhook).await? };
    let readiness = ca::bind(config.readiness).await?;
    let client = kubernetes::client(config.kubeconfig.as_deref()).await?;
    let watcher = kubernetes::watcher(config.kubeconfig.as_deref()).await?;
    let ready = Ready::default();
    let (stopping, stop) = watch::channel(());
    let (ended, until_end) = watch::channel(());
    let replica = Replica { config, terms, client, watcher, ready: ready.clone(), stop };
    let mut serving = std::pin::pin!(replica.serve(listeners));
    let mut answering = std::pin::pin!(readiness::serve(readiness, ready.clone(), until(until_end)));
    let mut shutdown = std::pin::pin!(shutdown);
    let result = tokio::select! {
        () = &mut shutdown => {
            let _ending = ready.hold("it ends");
            drop(stopping);
            tokio::select! {
                result = &mut serving => result,
                result = &mut answering => result.context("answer for readiness"),
            }
        }
        result = &mut serving => result.and_then(|()| Err(anyhow!("it has ended by itself"))),
        result = &mut answering => {
            result.context("answer for readiness").and_then(|()| Err(anyhow!("the answers for readiness have ended")))
        }
    };
    drop(ended);
    result
}

/// Completes when the sender is dropped.
async fn until(mut end: watch::Receiver<()>) {
    // Closed at the end; never sent to.
    let _ = end.changed().await;
}

/// Where it is asked.
struct Listeners {
    ca: TcpListener,
    webhook: TcpListener,
}

/// What one replica has.
struct Replica {
    config: Config,
    terms: Terms,
    /// For what is answered at once.
    client: kube::Client,
    /// For watches.
    watcher: kube::Client,
    ready: Ready,
    /// Ends when the replica is to end.
    stop: watch::Receiver<()>,
}

impl Replica {
    async fn serve(self, listeners: Listeners) -> anyhow::Result<()> {
        let listed = self.ready.hold("the API server's objects");
        let key = self.ready.hold("the CA's key and certificates");
        let Config { kubeconfig, system_namespace, .. } = &self.config;
        let (views, reading) =
            kubernetes::watch(kubeconfig.as_deref(), system_namespace, kubernetes::Kinds::Identities).await?;
        let working = async {
            let mut begun = views.clone();
            let roots = Roots::new(self.client.clone(), system_namespace, Clock::default());
            let start = async {
                let opened = roots.open().await;
                drop(key);
                // Closed only with the source, whose end is told below.
                let _ = begun.wait_for(|view| view.unread.is_empty()).await;
                drop(listed);
                opened
            };
            tokio::select! {
                (authority, keeping) = start => self.answer(listeners, views.clone(), authority, keeping).await,
                () = until(self.stop.clone()) => Ok(()),
            }
        };
        tokio::select! {
            result = working => result,
            result = reading => result.and_then(|()| Err(anyhow!("the source of the cluster's objects has ended"))),
        }
    }

    /// Serves with a key and all objects.
    async fn answer(
        &self,
        listeners: Listeners,
        views: watch::Receiver<Arc<View>>,
        authority: watch::Receiver<Arc<Authority>>,
        keeping: impl Future<Output = Infallible>,
    ) -> anyhow::Result<()> {
        let Self { config, terms, client, watcher, .. } = self;
        let clock = Clock::default();
        let (clusters, forwarding) = source::clusters(views.clone());
        let reviews = Reviews::new(client.clone(), config.token_audience.clone());
        let callers = Callers::new(Box::new(reviews), config.trusted_node_accounts.clone(), clusters)?;
        let callers = Arc::new(callers);
        let certificate = || ServerCertificate::new(authority.clone(), config.server_names.clone(), clock.clone());
        let server =
            ca::Server::new(listeners.ca, certificate()?, authority.clone(), callers.clone(), *terms, clock.clone())?;
        let tls = Arc::new(ca::server_tls(Arc::new(certificate()?), &clock, b"http/1.1")?);
        let namespace = config.system_namespace.clone();
        let judge = Arc::new(move |object| validate::object(object, &namespace, &policy::Options::default()));
        let reviewing = webhook::serve(listeners.webhook, tls, judge, until(self.stop.clone()));

        let (mut election, leadership) = Election::new(
            client.clone(),
            &leader::Config {
                namespace: config.system_namespace.clone(),
                name: LEASE.to_owned(),
                replica: config.replica.clone(),
                address: config.address.clone(),
            },
        );
        let electing = async {
            tokio::select! {
                never = election.run() => match never {},
                () = until(self.stop.clone()) => election.release().await,
            }
        };
        let (agents, counting) = mapped(views.clone(), |view| agents(&view.cluster, &config.trusted_node_accounts));
        let (service, ledgers, keeper) = reports(callers, leadership.clone(), agents);
        let (roots, rooting) = mapped(authority.clone(), |authority| Arc::<str>::from(authority.roots_pem()));
        let work = || {
            let publishing = publish::keep(client.clone(), views.clone(), authority.clone());
            let status = status::keep(client.clone(), watcher.clone(), &config.system_namespace, ledgers.clone());
            let trusted = webhook::keep_trusted(client.clone(), &config.webhook_configuration, roots.clone());
            async {
                tokio::select! {
                    never = publishing => never,
                    never = status => never,
                    never = trusted => never,
                }
            }
        };
        let serving = async {
            let issuing = server.serve_beside(ReportService::PATH, service, until(self.stop.clone()));
            let (issued, reviewed, ()) = tokio::join!(issuing, reviewing, electing);
            issued.and(reviewed)
        };
        tokio::select! {
            result = serving => result,
            never = keeping => match never {},
            never = keeper.run() => match never {},
            never = counting => match never {},
            never = rooting => match never {},
            never = while_leading(leadership, work) => match never {},
            () = forwarding => Err(anyhow!("the source of the cluster's objects has ended")),
        }
    }
}

/// The pods of the agents that there should be: those that run under a trusted account.
fn agents(cluster: &Cluster, trusted: &BTreeSet<ObjectRef>) -> Arc<BTreeSet<ObjectRef>> {
    let agents = cluster.pods.values().filter(|pod| {
        let account = ObjectRef { namespace: pod.object.namespace.clone(), name: pod.service_account.clone() };
        trusted.contains(&account) && !pod.finished && !pod.terminating
    });
    Arc::new(agents.map(|pod| pod.object.clone()).collect())
}

/// What something says of the newest value, told when it says something else; it follows for as long as the future is polled.
fn mapped<T, M: PartialEq>(
    mut values: watch::Receiver<T>,
    map: impl Fn(&T) -> M,
) -> (watch::Receiver<M>, impl Future<Output = Infallible>) {
    let (sender, receiver) = watch::channel(map(&values.borrow_and_update()));
    let following = async move {
        while values.changed().await.is_ok() {
            let new = map(&values.borrow_and_update());
            sender.send_if_modified(|known| {
                let changed = *known != new;
                if changed {
                    *known = new;
                }
                changed
            });
        }
        std::future::pending().await
    };
    (receiver, following)
}

/// Does the leader's work while this replica leads: it is begun anew each time, and dropped where it is when leadership ends.
async fn while_leading<W: Future<Output = Infallible>>(
    mut leadership: watch::Receiver<Leadership>,
    work: impl Fn() -> W,
) -> Infallible {
    loop {
        if *leadership.borrow_and_update() == Leadership::Leader {
            tokio::select! {
                never = work() => match never {},
                changed = leadership.changed() => if changed.is_err() { return std::future::pending().await },
            }
        } else if leadership.changed().await.is_err() {
            return std::future::pending().await;
        }
    }
}
