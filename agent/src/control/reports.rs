//! What agents report: which generation of each policy they have in force, and on how many nodes that is so.
//!
//! Agents that have the same in force send the same digest, and what it stands for is asked of one of them. Who an agent is
//! is told by [`Identify`], which agents there should be by whoever watches the pods; what the counts mean to users is for
//! whoever writes the policies' status.
//!
//! Only the leader takes reports. A new one knows nothing, and hears from every agent within [`INTERVAL`].

#[cfg(test)]
#[expect(clippy::disallowed_methods, reason = "a test awaits what it has started, or ends with it")]
pub(crate) mod testkit;
#[cfg(test)]
#[expect(clippy::disallowed_methods, reason = "a test awaits what it has started, or ends with it")]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    convert::Infallible,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context as TaskContext, Poll},
    time::Duration,
};

use futures_util::future;
use tokio::{
    sync::{Notify, watch},
    time::Instant,
};
use tonic::{
    Request, Response, Status,
    codegen::{BoxFuture, Service, http},
    server::{Grpc, UnaryService},
};
use tonic_prost::ProstCodec;
use tracing::warn;

use super::leader::Leadership;
use crate::{
    ca::{
        bearer,
        caller::{Caller, Callers},
    },
    model::ObjectRef,
    report::wire::{self, Digest, Generations, ReportRequest, ReportResponse},
    telemetry::limit::{Limit, Limiter},
};

/// How often an agent reports if nothing changes.
pub(crate) const INTERVAL: Duration = Duration::from_secs(10);
/// After so many intervals without a report nobody knows what an agent has in force.
const STALE: u32 = 3;
/// The ledger is published no more often than this.
const PUBLISH: Duration = Duration::from_millis(200);
/// How long the agent that was asked what a digest stands for has to say it, before another one is asked.
const ASKED: Duration = Duration::from_secs(1);
/// Reports per second of one agent; as many at once.
const PER_SECOND: u32 = 10;
/// Reports of one agent that are read at once, each of [`wire::MAX_MESSAGE_BYTES`] at most.
const AT_ONCE: u32 = 2;
/// Lines of the log per second, of each kind.
const LINES_PER_SECOND: u32 = 20;

/// Who a token is of.
pub(crate) trait Identify: Send + Sync + 'static {
    /// The agent that has `token`.
    ///
    /// The error is what the caller gets to know: it is not one of the mesh's agents, or nobody can tell now.
    fn identify<'a>(&'a self, token: &'a str) -> future::BoxFuture<'a, Result<Caller, Status>>;
}

impl Identify for Callers {
    fn identify<'a>(&'a self, token: &'a str) -> future::BoxFuture<'a, Result<Caller, Status>> {
        Box::pin(async move { self.caller(token).await.map(|(caller, _)| caller).map_err(|denial| denial.status()) })
    }
}

/// The service, what it has heard, and the one task behind both.
///
/// `agents` are the pods of the agents that should report.
pub(super) fn reports(
    callers: Arc<dyn Identify>,
    leadership: watch::Receiver<Leadership>,
    agents: watch::Receiver<Arc<BTreeSet<ObjectRef>>>,
) -> (ReportService, watch::Receiver<Arc<Ledger>>, Keeper) {
    reports_every(INTERVAL, callers, leadership, agents)
}

fn reports_every(
    interval: Duration,
    callers: Arc<dyn Identify>,
    leadership: watch::Receiver<Leadership>,
    agents: watch::Receiver<Arc<BTreeSet<ObjectRef>>>,
) -> (ReportService, watch::Receiver<Arc<Ledger>>, Keeper) {
    let shared = Arc::new(Shared {
        callers,
        leadership: leadership.clone(),
        interval,
        state: Mutex::default(),
        news: Notify::new(),
        lines: Mutex::new(Limit::fixed(LINES_PER_SECOND).limiter()),
    });
    let (ledger, published) = watch::channel(Arc::default());
    (ReportService(shared.clone()), published, Keeper { shared, leadership, agents, ledger })
}

/// What agents have in force, at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Ledger {
    agents: usize,
    /// What some agents have in force, and how many.
    sets: BTreeMap<Digest, (Arc<Generations>, usize)>,
}

/// On how many nodes a version of an object is in force.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Count {
    /// Agents that have just this version in force.
    pub in_force: usize,
    /// Agents that should.
    pub agents: usize,
}

impl Ledger {
    /// How many agents have `generation` of the object in force. One that has not been heard of for three intervals has
    /// nothing in force, as far as anybody knows.
    pub(crate) fn count(&self, kind: &str, object: &ObjectRef, generation: i64) -> Count {
        let key = wire::key(kind, object);
        let having = self.sets.values().filter(|(set, _)| set.get(&*key) == Some(&generation));
        Count { in_force: having.map(|(_, agents)| agents).sum(), agents: self.agents }
    }
}

/// What service and keeper share.
struct Shared {
    callers: Arc<dyn Identify>,
    leadership: watch::Receiver<Leadership>,
    interval: Duration,
    state: Mutex<State>,
    /// What is published is not all that is known.
    news: Notify,
    lines: Mutex<Limiter>,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing panics while holding the lock, and what is there is whole after every statement.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lines(&self) -> MutexGuard<'_, Limiter> {
        // Whatever has panicked there, a limiter has no broken state.
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a line of this kind may be written now.
    fn tells(&self, kind: &'static str) -> bool {
        self.lines().admits(None, kind, std::time::Instant::now())
    }

    /// Who may report now. The message is read after that.
    async fn admit(self: &Arc<Self>, headers: &http::HeaderMap) -> Result<Admission, Status> {
        let token = bearer(headers).ok_or_else(|| Status::unauthenticated("no bearer token"))?;
        let caller = self.callers.identify(token).await?;
        if let Leadership::Follower { leader } = &*self.leadership.borrow() {
            return Err(elsewhere(leader.as_deref()));
        }
        if !self.state().enter(&caller.pod, Instant::now()) {
            if self.tells("too-many-reports") {
                warn!(agent = %caller.pod, node = %caller.node, "an agent reports more often than it may");
            }
            return Err(Status::resource_exhausted(format!("more than {PER_SECOND} reports per second")));
        }
        Ok(Admission { shared: self.clone(), caller })
    }
}

fn elsewhere(leader: Option<&str>) -> Status {
    let mut status = Status::failed_precondition("another replica leads");
    if let Some(leader) = leader.and_then(|leader| leader.parse().ok()) {
        status.metadata_mut().insert(wire::LEADER, leader);
    }
    status
}

/// An agent whose report is being read.
struct Admission {
    shared: Arc<Shared>,
    caller: Caller,
}

impl Admission {
    fn report(&self, request: &ReportRequest) -> Result<ReportResponse, Status> {
        let refused = |why: String| {
            if self.shared.tells("refused-report") {
                warn!(agent = %self.caller.pod, node = %self.caller.node, reason = why, "report refused");
            }
            Status::invalid_argument(why)
        };
        let digest = Digest::try_from(&*request.digest).map_err(|_| refused("the digest is not SHA-256".to_owned()))?;
        let set = if wire::digest(&request.objects) == digest {
            Some(wire::parse(&request.objects).map_err(|error| refused(format!("{error:#}")))?)
        } else if request.objects.is_empty() {
            None
        } else {
            // Others send this digest, and would be taken to have what this one says.
            return Err(refused("the digest is not that of the objects".to_owned()));
        };
        let taken = self.shared.state().take(&self.caller.pod, digest, set, Instant::now());
        if taken.news {
            self.shared.news.notify_one();
        }
        let interval_seconds = u32::try_from(self.shared.interval.as_secs()).unwrap_or(u32::MAX);
        Ok(ReportResponse { wanted: taken.wanted, interval_seconds })
    }
}

impl Drop for Admission {
    fn drop(&mut self) {
        self.shared.state().leave(&self.caller.pod);
    }
}

/// What is known, whether it is published or not.
#[derive(Default)]
struct State {
    /// This replica leads, as far as it has noticed.
    leads: bool,
    heard: HashMap<ObjectRef, Heard>,
    sets: HashMap<Digest, Arc<Generations>>,
    /// Who was asked what a digest stands for, and when.
    asked: HashMap<Digest, (ObjectRef, Instant)>,
    allowances: HashMap<ObjectRef, Allowance>,
}

/// An agent's last report.
struct Heard {
    digest: Digest,
    at: Instant,
}

/// What an agent may still send.
struct Allowance {
    reports: f64,
    filled: Instant,
    reading: u32,
}

/// What became of a report.
#[derive(Debug, PartialEq, Eq)]
struct Taken {
    /// The objects are to be sent.
    wanted: bool,
    /// It says what was not known.
    news: bool,
}

impl State {
    fn enter(&mut self, pod: &ObjectRef, now: Instant) -> bool {
        let most = f64::from(PER_SECOND);
        let full = || Allowance { reports: most, filled: now, reading: 0 };
        let allowance = self.allowances.entry(pod.clone()).or_insert_with(full);
        let filled = (now - std::mem::replace(&mut allowance.filled, now)).as_secs_f64() * most;
        allowance.reports = (allowance.reports + filled).min(most);
        let may = allowance.reports >= 1.0 && allowance.reading < AT_ONCE;
        if may {
            allowance.reports -= 1.0;
            allowance.reading += 1;
        }
        may
    }

    fn leave(&mut self, pod: &ObjectRef) {
        if let Some(allowance) = self.allowances.get_mut(pod) {
            allowance.reading -= 1;
        }
    }

    fn take(&mut self, pod: &ObjectRef, digest: Digest, set: Option<Generations>, now: Instant) -> Taken {
        let told = match set {
            // What is there already is the same.
            Some(set) if !self.sets.contains_key(&digest) => self.sets.insert(digest, Arc::new(set)).is_none(),
            Some(_) | None => false,
        };
        let before = self.heard.insert(pod.clone(), Heard { digest, at: now });
        let news = told || before.is_none_or(|before| before.digest != digest);
        Taken { wanted: !self.sets.contains_key(&digest) && self.ask(pod, digest, now), news }
    }

    /// Whether this agent is to be asked what its digest stands for.
    fn ask(&mut self, pod: &ObjectRef, digest: Digest, now: Instant) -> bool {
        match self.asked.get(&digest) {
            Some((asked, _)) if asked == pod => true,
            Some((_, at)) if now - *at < ASKED => false,
            Some(_) | None => {
                self.asked.insert(digest, (pod.clone(), now));
                true
            }
        }
    }

    /// Forgets what does not count any more, and says what does.
    fn ledger(&mut self, agents: &BTreeSet<ObjectRef>, interval: Duration, now: Instant) -> Ledger {
        let stale = interval * STALE;
        self.heard.retain(|pod, heard| {
            let silent = now - heard.at;
            // One that is not among them may just have come.
            silent < stale && (silent < interval || agents.contains(pod))
        });
        let used: BTreeSet<Digest> = self.heard.values().map(|heard| heard.digest).collect();
        self.sets.retain(|digest, _| used.contains(digest));
        self.asked.retain(|digest, _| used.contains(digest) && !self.sets.contains_key(digest));
        let full = Duration::from_secs(1);
        self.allowances.retain(|_, allowance| allowance.reading > 0 || now - allowance.filled < full);

        let mut ledger = Ledger { agents: agents.len(), ..Ledger::default() };
        let counting = self.heard.iter().filter(|(pod, _)| agents.contains(*pod));
        for set in counting.filter_map(|(_, heard)| Some((heard.digest, self.sets.get(&heard.digest)?))) {
            ledger.sets.entry(set.0).or_insert_with(|| (set.1.clone(), 0)).1 += 1;
        }
        ledger
    }

    /// When time alone changes what counts, at the latest.
    fn next(&self, interval: Duration, now: Instant) -> Instant {
        let stale = interval * STALE;
        self.heard.values().map(|heard| heard.at + stale).filter(|at| *at > now).min().unwrap_or(now + stale)
    }
}

/// Publishes the ledger.
pub(crate) struct Keeper {
    shared: Arc<Shared>,
    leadership: watch::Receiver<Leadership>,
    agents: watch::Receiver<Arc<BTreeSet<ObjectRef>>>,
    ledger: watch::Sender<Arc<Ledger>>,
}

impl fmt::Debug for Keeper {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Keeper").field("ledger", &self.ledger).finish_non_exhaustive()
    }
}

impl Keeper {
    /// Keeps the ledger as long as it is polled: as it is known, at most five times a second, and if it has changed.
    pub(crate) async fn run(mut self) -> Infallible {
        loop {
            let next = self.publish();
            self.shared.lines().tell(std::time::Instant::now());
            tokio::time::sleep(PUBLISH).await;
            tokio::select! {
                () = self.shared.news.notified() => {}
                // Whoever watches the pods, or leads, may have ended before.
                Ok(()) = self.agents.changed() => {}
                Ok(()) = self.leadership.changed() => {}
                () = tokio::time::sleep_until(next) => {}
            }
        }
    }

    /// Publishes what counts now; when that is to be done again, if nothing happens.
    fn publish(&mut self) -> Instant {
        let leads = *self.leadership.borrow_and_update() == Leadership::Leader;
        let agents = self.agents.borrow_and_update().clone();
        let (interval, now) = (self.shared.interval, Instant::now());
        let mut state = self.shared.state();
        if state.leads && !leads {
            *state = State { allowances: std::mem::take(&mut state.allowances), ..State::default() };
        }
        state.leads = leads;
        let ledger = state.ledger(&agents, interval, now);
        let next = state.next(interval, now);
        drop(state);
        self.ledger.send_if_modified(|published| {
            let differs = **published != ledger;
            if differs {
                *published = Arc::new(ledger);
            }
            differs
        });
        next
    }
}

/// `culvert.control.v1.Reports`, for the path [`wire::REPORT`].
#[derive(Clone)]
pub(crate) struct ReportService(Arc<Shared>);

impl ReportService {
    /// Path of its one method.
    pub(crate) const PATH: &str = wire::REPORT;
}

impl fmt::Debug for ReportService {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReportService").finish_non_exhaustive()
    }
}

impl Service<http::Request<tonic::body::Body>> for ReportService {
    type Response = http::Response<tonic::body::Body>;
    type Error = Infallible;
    type Future = BoxFuture<Self::Response, Self::Error>;

    fn poll_ready(&mut self, _: &mut TaskContext<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<tonic::body::Body>) -> Self::Future {
        let shared = self.0.clone();
        Box::pin(async move {
            if request.uri().path() != wire::REPORT {
                return Ok(Status::unimplemented("no such method").into_http());
            }
            let method = match shared.admit(request.headers()).await {
                Ok(admission) => Report(admission),
                Err(status) => return Ok(status.into_http()),
            };
            let codec = ProstCodec::<ReportResponse, ReportRequest>::default();
            let mut grpc = Grpc::new(codec)
                .max_decoding_message_size(wire::MAX_MESSAGE_BYTES)
                .max_encoding_message_size(wire::MAX_MESSAGE_BYTES);
            Ok(grpc.unary(method, request).await)
        })
    }
}

/// The one method of the service.
struct Report(Admission);

impl UnaryService<ReportRequest> for Report {
    type Response = ReportResponse;
    type Future = std::future::Ready<Result<Response<ReportResponse>, Status>>;

    fn call(&mut self, request: Request<ReportRequest>) -> Self::Future {
        std::future::ready(self.0.report(request.get_ref()).map(Response::new))
    }
}
