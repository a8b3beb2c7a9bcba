//! Tells the leader of `culvert control` which generation of each policy is in force on this node.
//!
//! A report is the digest of what is in force, repeated as often as the leader wants it; what the digest stands for is sent
//! when that is asked for. A replica that does not lead says which one does, and that one is asked from then on.
//!
//! Only an agent that is ready reports, so that of two on a node the one that serves does. Nothing here ends an agent or
//! keeps it from anything: policy is in force whether somebody counts it or not.

#[cfg(test)]
#[expect(clippy::disallowed_methods, reason = "a test awaits what it has started, or ends with it")]
mod tests;
pub(crate) mod wire;

use std::{convert::Infallible, path::PathBuf, sync::Arc, time::Duration};

use tokio::{sync::watch, time::Instant};
use tonic::{Code, Request};
use tracing::{debug, info, warn};

use self::wire::{Digest, ReportRequest, ReportResponse};
use crate::{
    dns,
    identity::{Dialer, Failed, Server},
    model::ObjectRef,
    source::{Places, View},
    telemetry::readiness::Ready,
};

/// How often it is looked whether the agent is ready.
const TICK: Duration = Duration::from_secs(1);
/// From a change until it is reported: several may come together.
const DEBOUNCE: Duration = Duration::from_millis(300);
/// Pause after the first failure, and the longest.
const PAUSE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));
/// Limits of the interval that the server may ask for, in seconds.
const INTERVAL: (u32, u32) = (1, 300);
/// Pauses and intervals are longer or shorter by this part, so that the agents of all nodes do not come at once.
const JITTER: f64 = 0.2;
/// How often a failure is said that comes and goes.
const SAY_AGAIN: Duration = Duration::from_secs(60);
/// Servers that are asked for one report: the one that led, the one that was configured, and the one that this one names.
const HOPS: usize = 3;

/// Where to report, and how each side shows who it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// `host:port` of any replica, IPv6 in brackets.
    pub address: String,
    /// PEM file with the roots that the replicas' certificates chain to. Read anew for each report.
    pub root_file: PathBuf,
    /// DNS name that each replica's certificate must have.
    pub server_name: String,
    /// File with the service account token of the agent. Read anew for each report.
    pub token_file: PathBuf,
}

/// The policies that kernel and workers of this node have in force.
#[derive(Clone, Debug, Default)]
pub struct InForce {
    policies: Arc<Places>,
    authorization_policies: Arc<Places>,
}

impl InForce {
    /// What `view` says is in force from now on. Receivers hear of it if a generation of it is another one; where no policy
    /// was touched, nothing is looked at.
    pub fn publish(in_force: &watch::Sender<Arc<Self>>, view: &View) {
        in_force.send_if_modified(|known| {
            if Arc::ptr_eq(&known.policies, &view.policies)
                && Arc::ptr_eq(&known.authorization_policies, &view.authorization_policies)
            {
                return false;
            }
            let (policies, authorization_policies) = (view.policies.clone(), view.authorization_policies.clone());
            let next = Self { policies, authorization_policies };
            let differs = !known.generations().eq(next.generations());
            *known = Arc::new(next);
            differs
        });
    }

    /// Kind, object and generation, always in the same order; only of what has one.
    fn generations(&self) -> impl Iterator<Item = (&'static str, &ObjectRef, i64)> {
        let kinds = [("AuthorizationPolicy", &self.authorization_policies), ("PeerAuthentication", &self.policies)];
        kinds.into_iter().flat_map(|(kind, places)| {
            places.iter().filter_map(move |(object, place)| Some((kind, object, place.generation?)))
        })
    }

    /// The text of a report.
    fn objects(&self) -> String {
        let mut text = String::new();
        for (kind, object, generation) in self.generations() {
            wire::line(&mut text, kind, object, generation);
        }
        text
    }
}

/// Reports for as long as it is polled; what fails is tried again, and never ends it.
pub async fn run(config: Config, ready: Ready, mut in_force: watch::Receiver<Arc<InForce>>) -> Infallible {
    let mut reporter = Reporter::new(config);
    let mut trouble = Trouble::default();
    let mut known: Option<(Arc<InForce>, Digest)> = None;
    loop {
        if !ready.is_ready() {
            tokio::time::sleep(TICK).await;
            continue;
        }
        let now = in_force.borrow_and_update().clone();
        let digest = match &known {
            Some((before, digest)) if Arc::ptr_eq(before, &now) => *digest,
            Some(_) | None => wire::digest(&now.objects()),
        };
        known = Some((now.clone(), digest));
        match reporter.report(&now, digest).await {
            Ok(interval) => {
                trouble.over();
                tokio::select! {
                    () = tokio::time::sleep(jitter(interval, rand::random())) => {}
                    Ok(()) = in_force.changed() => tokio::time::sleep(DEBOUNCE).await,
                }
            }
            Err(error) => tokio::time::sleep(trouble.pause(&error, Instant::now())).await,
        }
    }
}

/// Knows whom to report to.
struct Reporter {
    config: Config,
    configured: Dialer,
    /// Who leads, where another one has said so.
    leader: Option<(String, Dialer)>,
}

impl Reporter {
    fn new(config: Config) -> Self {
        let configured = dialer(&config, config.address.clone());
        Self { config, configured, leader: None }
    }

    /// Reports to the leader; after how long to report again.
    async fn report(&mut self, in_force: &InForce, digest: Digest) -> anyhow::Result<Duration> {
        let mut last = None;
        for _ in 0..HOPS {
            let to = self.leader.as_ref().map_or(&self.configured, |(_, dialer)| dialer);
            let failed = match tell(to, in_force, digest).await {
                Ok(interval) => return Ok(interval),
                Err(failed) => failed,
            };
            // Behind the configured address there may be another replica the next time.
            to.disconnect();
            let named = leader(&failed).filter(|named| self.leader.as_ref().is_none_or(|(known, _)| known != named));
            let led = self.leader.take().is_some();
            last = Some(failed.error);
            match named {
                Some(named) => {
                    debug!(leader = named, "another replica of culvert control leads");
                    self.leader = Some((named.clone(), dialer(&self.config, named)));
                }
                None if led => {}
                None => break,
            }
        }
        // Whoever was named last has not been asked.
        self.leader = None;
        Err(last.unwrap_or_else(|| anyhow::anyhow!("nobody was asked")))
    }
}

fn dialer(config: &Config, address: String) -> Dialer {
    Dialer::new(Server {
        name: "culvert control",
        address,
        root_file: config.root_file.clone(),
        server_name: config.server_name.clone(),
        token_file: config.token_file.clone(),
    })
}

/// One report to one server, with the objects if it wants them.
async fn tell(to: &Dialer, in_force: &InForce, digest: Digest) -> Result<Duration, Failed> {
    let mut request = ReportRequest { digest: digest.to_vec(), objects: String::new() };
    let mut response: ReportResponse = ask(to, request.clone()).await?;
    if response.wanted {
        request.objects = in_force.objects();
        response = ask(to, request).await?;
    }
    Ok(Duration::from_secs(response.interval_seconds.clamp(INTERVAL.0, INTERVAL.1).into()))
}

async fn ask(to: &Dialer, request: ReportRequest) -> Result<ReportResponse, Failed> {
    to.ask(wire::REPORT, wire::MAX_MESSAGE_BYTES, Request::new(request)).await
}

/// Who leads, if the answer is that another one does.
fn leader(failed: &Failed) -> Option<String> {
    let status = failed.status.as_ref().filter(|status| status.code() == Code::FailedPrecondition)?;
    let leader = status.metadata().get(wire::LEADER)?.to_str().ok()?;
    dns::host_port(leader).is_ok().then(|| leader.to_owned())
}

/// `random` is from [0, 1).
fn jitter(time: Duration, random: f64) -> Duration {
    time.mul_f64(1.0 - JITTER + 2.0 * JITTER * random)
}

/// What is the matter, and what was said of it.
#[derive(Default)]
struct Trouble {
    failures: u32,
    /// When a failure was last said.
    said: Option<Instant>,
    /// Its end is to be said too.
    open: bool,
}

impl Trouble {
    /// After a failure: how long to wait.
    fn pause(&mut self, error: &anyhow::Error, now: Instant) -> Duration {
        let error = format!("{error:#}");
        let may_say = self.said.is_none_or(|at| now - at >= SAY_AGAIN);
        if self.failures == 0 && may_say {
            (self.said, self.open) = (Some(now), true);
            warn!(error, "what is in force on this node cannot be reported, and does not count: trying on");
        } else {
            debug!(error, failures = self.failures, "what is in force on this node cannot be reported");
        }
        let doubled = PAUSE.0.saturating_mul(2u32.saturating_pow(self.failures));
        self.failures = self.failures.saturating_add(1);
        jitter(doubled.min(PAUSE.1), rand::random())
    }

    /// After a report that was heard.
    fn over(&mut self) {
        self.failures = 0;
        if std::mem::take(&mut self.open) {
            info!("what is in force on this node is reported again");
        }
    }
}
