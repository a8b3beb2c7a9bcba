//! When to fetch which certificate ([I.7]): at first need, at half life, after a failure with growing pauses, and those
//! first that a connection waits for.
//!
//! One task, owned by whoever awaits [`Renewal::run`]; it spawns nothing. The table that it keeps is read by
//! [`super::Identities`].

use std::{
    collections::{BTreeSet, HashMap},
    path::PathBuf,
    sync::{
        Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use futures_util::{StreamExt, stream::FuturesUnordered};
use tokio::{
    sync::{Notify, watch},
    time::{Instant, sleep_until},
};
use tracing::{error, info, warn};

use super::{
    Clock,
    certificate::{Answer, Certificate},
    client::{CaClient, Failed},
    files::{self, Watch},
    trust::Trust,
};
use crate::model::SpiffeId;

/// Fetches under way at once.
const MAX_FETCHES: usize = 8;
/// Of them, those that no connection waits for; the rest is kept free for those that one does.
const MAX_BACKGROUND_FETCHES: usize = 6;
/// Longest pause before the wall clock is looked at again: it may be set, or the machine may have slept.
const MAX_SLEEP: Duration = Duration::from_secs(60);
/// Pause between a change of the certificate folder and reading it, since a certificate and its key are two files.
const SETTLE: Duration = Duration::from_millis(100);
/// How often it is looked whether the CA's own roots are others.
const LOOK_AT_ROOTS: Duration = Duration::from_secs(10);
/// Within this time, each at another moment, agents then renew: the roots come to all nodes at once.
const SPREAD: Duration = Duration::from_secs(10);
/// Largest pause between two attempts, before ±20 %: the largest with them is 150 s ([I.7]).
const MAX_BACKOFF: Duration = Duration::from_secs(125);

/// Largest pause while a connection waits for the certificate, which it does for [`WAIT`](super::WAIT): it shall see an
/// attempt of its own, so that a CA that is back is noticed with the first connections.
const WAITED_PAUSE: Duration = Duration::from_millis(2500);

/// Where answers come from.
pub(super) enum Origin {
    Ca(Box<CaClient>),
    Files(PathBuf),
}

impl Origin {
    /// The roots that the CA is trusted by, as its file has them; `None` where there is no CA, or the file cannot be read.
    async fn roots(&self) -> Option<Vec<u8>> {
        match self {
            Self::Ca(client) => client.roots().await.ok(),
            Self::Files(_) => None,
        }
    }

    async fn fetch(&self, identity: SpiffeId) -> (SpiffeId, Result<Answer, Failed>) {
        let answer = match self {
            Self::Ca(client) => client.request(&identity).await,
            Self::Files(dir) => files::read(dir, &identity).await.map_err(Failed::from),
        };
        (identity, answer)
    }
}

/// When an identity is fetched next.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Next {
    /// As soon as there is room.
    Now,
    /// After a failure: at `at`, or already at `waited` while a connection waits.
    At {
        /// After the whole pause.
        at: Instant,
        /// After [`WAITED_PAUSE`], if that is sooner.
        waited: Instant,
    },
    /// At this second since the epoch: half life.
    Renew(u64),
    /// When the certificate folder changes.
    OnChange,
}

/// What we hold for one wanted identity.
pub(super) struct Entry {
    pub(super) certificate: Option<Arc<Certificate>>,
    pub(super) last_error: Option<Arc<str>>,
    /// Connections that wait for the certificate.
    waiting: usize,
    fetching: bool,
    next: Next,
    /// Something changed while it was being fetched.
    again: bool,
    pub(super) failures: u32,
    /// The first pause of the row of failures.
    first_pause: Duration,
    unreachable: bool,
    expiry_logged: bool,
}

impl Entry {
    fn new() -> Self {
        Self {
            certificate: None,
            last_error: None,
            waiting: 0,
            fetching: false,
            next: Next::Now,
            again: false,
            failures: 0,
            first_pause: Duration::ZERO,
            unreachable: false,
            expiry_logged: false,
        }
    }

    /// Seconds since the epoch at which it is renewed, if that is known.
    pub(super) fn renews_at(&self) -> Option<u64> {
        match self.next {
            Next::Renew(at) => Some(at),
            Next::Now | Next::At { .. } | Next::OnChange => None,
        }
    }

    /// `None` = due.
    fn due_in(&self, now: Instant, unix: u64) -> Option<Duration> {
        let pause = match self.next {
            Next::Now => Duration::ZERO,
            Next::At { waited, .. } if self.waiting > 0 => waited.saturating_duration_since(now),
            Next::At { at, .. } => at.saturating_duration_since(now),
            Next::Renew(at) => Duration::from_secs(at.saturating_sub(unix)),
            Next::OnChange => Duration::MAX,
        };
        (!pause.is_zero()).then_some(pause)
    }
}

/// The table, and what tells of its changes.
pub(super) struct Table {
    entries: RwLock<HashMap<SpiffeId, Entry>>,
    /// Counts changes; waiting connections look again.
    pub(super) changes: watch::Sender<u64>,
    /// Tells the task that there is something to do.
    pub(super) wake: Notify,
    /// Certificates that were had, and attempts that failed.
    pub(super) fetched: AtomicU64,
    /// See [`Table::fetched`].
    pub(super) failed: AtomicU64,
}

impl Table {
    pub(super) fn new() -> Self {
        Self {
            entries: RwLock::new(HashMap::new()),
            changes: watch::channel(0).0,
            wake: Notify::new(),
            fetched: AtomicU64::new(0),
            failed: AtomicU64::new(0),
        }
    }

    pub(super) fn read(&self) -> RwLockReadGuard<'_, HashMap<SpiffeId, Entry>> {
        self.entries.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, HashMap<SpiffeId, Entry>> {
        self.entries.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the table's identities equal to `set`. Keys of those that are gone are dropped with the last connection.
    pub(super) fn want(&self, set: &BTreeSet<SpiffeId>) {
        {
            let mut entries = self.write();
            entries.retain(|identity, _| {
                let keep = set.contains(identity);
                if !keep {
                    info!(%identity, "identity no longer needed");
                }
                keep
            });
            for identity in set {
                entries.entry(identity.clone()).or_insert_with(Entry::new);
            }
        }
        self.changes.send_modify(|count| *count += 1);
        self.wake.notify_one();
    }

    /// Counts a connection that waits for `identity`, until the guard is dropped.
    pub(super) fn wait_for(&self, identity: &SpiffeId) -> Waiting<'_> {
        let mut counted = false;
        if let Some(entry) = self.write().get_mut(identity) {
            entry.waiting += 1;
            counted = true;
        }
        self.wake.notify_one();
        Waiting { table: self, identity: identity.clone(), counted }
    }

    /// Marks the next identity to fetch as being fetched: one that a connection waits for, else one without a
    /// certificate, else any that is due.
    fn take_due(&self, now: Instant, unix: u64, under_way: usize) -> Option<SpiffeId> {
        let mut entries = self.write();
        let (identity, entry) = entries
            .iter_mut()
            .filter(|(_, entry)| !entry.fetching && entry.due_in(now, unix).is_none())
            .min_by_key(|(_, entry)| (entry.waiting == 0, entry.certificate.is_some(), entry.failures))?;
        let room = if entry.waiting > 0 { MAX_FETCHES } else { MAX_BACKGROUND_FETCHES };
        if under_way >= room {
            return None;
        }
        entry.fetching = true;
        Some(identity.clone())
    }

    /// How long nothing becomes due; also tells, once, of certificates that have expired.
    fn pause(&self, now: Instant, unix: u64) -> Duration {
        let mut pause = MAX_SLEEP;
        for (identity, entry) in self.write().iter_mut() {
            if let Some(certificate) = &entry.certificate {
                if unix >= certificate.expires_at && !entry.expiry_logged {
                    entry.expiry_logged = true;
                    error!(%identity, serial = %certificate.serial, last_error = entry.last_error.as_deref(),
                        "certificate has expired and no new one could be had; connections of this identity are refused");
                }
                if !entry.expiry_logged {
                    pause = pause.min(Duration::from_secs(certificate.expires_at.saturating_sub(unix).max(1)));
                }
            }
            if !entry.fetching {
                // One that is due and not taken waits for room, which the end of a fetch makes.
                pause = pause.min(entry.due_in(now, unix).unwrap_or(MAX_SLEEP));
            }
        }
        pause
    }

    /// Everything is fetched again, or only what failed.
    pub(super) fn reload(&self, all: bool) {
        for entry in self.write().values_mut().filter(|entry| all || entry.failures > 0) {
            entry.again = entry.fetching;
            entry.next = Next::Now;
        }
        self.wake.notify_one();
    }

    fn identities(&self) -> BTreeSet<SpiffeId> {
        self.read().keys().cloned().collect()
    }
}

/// See [`Table::wait_for`].
pub(super) struct Waiting<'a> {
    table: &'a Table,
    identity: SpiffeId,
    counted: bool,
}

impl Waiting<'_> {
    /// Counts the connection if its identity has come to be wanted since.
    pub(super) fn again(&mut self) {
        if !self.counted && self.table.read().contains_key(&self.identity) {
            *self = self.table.wait_for(&self.identity);
        }
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        if self.counted
            && let Some(entry) = self.table.write().get_mut(&self.identity)
        {
            // The entry may be a later one with the same name, which did not count this connection.
            entry.waiting = entry.waiting.saturating_sub(1);
        }
    }
}

/// The task that fetches and renews.
pub struct Renewal {
    pub(super) origin: Origin,
    pub(super) table: Arc<Table>,
    pub(super) trust: Arc<Trust>,
    pub(super) clock: Clock,
    pub(super) watch: Option<Watch>,
}

impl Renewal {
    /// Keeps the wanted identities' certificates fresh until `shutdown` ends. Requests under way are then dropped.
    pub async fn run(mut self, shutdown: impl Future<Output = ()>) {
        let mut shutdown = std::pin::pin!(shutdown);
        let mut fetches = FuturesUnordered::new();
        let mut reload_at: Option<Instant> = None;
        let (mut roots, mut look_at) = (self.origin.roots().await, Instant::now() + LOOK_AT_ROOTS);
        loop {
            if let Some(watch) = &self.watch {
                watch.cover(&self.table.identities());
            }
            if reload_at.is_some_and(|at| at <= Instant::now()) {
                reload_at = None;
                if let Some(watch) = &mut self.watch {
                    watch.drain();
                }
                self.table.reload(true);
            }
            if look_at <= Instant::now() {
                look_at = Instant::now() + LOOK_AT_ROOTS;
                let found = self.origin.roots().await;
                // A root that is to come is learnt before the first certificate that it signs is met.
                if found.is_some() && found != roots {
                    let after = SPREAD.mul_f64(rand::random());
                    info!(?after, "the CA's roots have changed: all certificates are renewed");
                    reload_at = Some(Instant::now() + after);
                    roots = found;
                }
            }
            while let Some(identity) = self.table.take_due(Instant::now(), self.clock.unix_seconds(), fetches.len()) {
                fetches.push(self.origin.fetch(identity));
            }
            if fetches.is_empty()
                && let Origin::Ca(client) = &self.origin
            {
                // Hours may pass until the next request.
                client.disconnect();
            }
            let now = Instant::now();
            let mut until = now + self.table.pause(now, self.clock.unix_seconds());
            if let Some(at) = reload_at {
                until = until.min(at);
            }
            if matches!(self.origin, Origin::Ca(_)) {
                until = until.min(look_at);
            }
            tokio::select! {
                () = &mut shutdown => return,
                Some((identity, answer)) = fetches.next(), if !fetches.is_empty() => {
                    finish(&self.origin, &self.table, &self.trust, &self.clock, identity, answer);
                }
                () = changed(&mut self.watch), if reload_at.is_none() => reload_at = Some(Instant::now() + SETTLE),
                () = self.table.wake.notified() => {}
                () = sleep_until(until) => {}
            }
        }
    }
}

async fn changed(watch: &mut Option<Watch>) {
    match watch {
        Some(watch) => watch.changed().await,
        None => std::future::pending().await,
    }
}

/// Puts the end of a fetch into the table.
fn finish(
    origin: &Origin,
    table: &Table,
    trust: &Trust,
    clock: &Clock,
    identity: SpiffeId,
    answer: Result<Answer, Failed>,
) {
    let unix = clock.unix_seconds();
    let checked = answer.and_then(|answer| Ok(Certificate::check(&identity, answer, unix)?));
    if checked.is_ok() { &table.fetched } else { &table.failed }.fetch_add(1, Ordering::Relaxed);
    let mut entries = table.write();
    let Some(entry) = entries.get_mut(&identity) else { return };
    entry.fetching = false;
    let again = std::mem::take(&mut entry.again);
    match checked {
        Ok((certificate, bundle)) => {
            let roots = bundle.len();
            if trust.set_bundle(bundle) {
                info!(roots, "trust bundle replaced");
            }
            entry.failures = 0;
            entry.last_error = None;
            entry.unreachable = false;
            entry.next = match origin {
                Origin::Ca(_) => Next::Renew(renew_at(unix, certificate.expires_at, rand::random())),
                Origin::Files(_) => Next::OnChange,
            };
            let same = entry.certificate.as_ref().is_some_and(|old| old.leaf() == certificate.leaf());
            if !same {
                info!(%identity, serial = %certificate.serial, valid_for_s = certificate.expires_at - unix,
                    renews_in_s = entry.renews_at().map(|at| at - unix), "certificate ready");
                entry.certificate = Some(Arc::new(certificate));
                entry.expiry_logged = false;
            }
            // The CA is there again: nobody sits out a pause that began when it was not.
            for other in entries.values_mut().filter(|other| other.unreachable) {
                other.unreachable = false;
                if !other.fetching {
                    other.next = Next::Now;
                }
            }
        }
        Err(Failed { error, unreachable, .. }) => {
            entry.failures = entry.failures.saturating_add(1);
            if entry.failures == 1 {
                entry.first_pause = Duration::from_millis(500 + rand::random_range(0..=500));
            }
            let pause = backoff(entry.first_pause, entry.failures, rand::random());
            entry.unreachable = unreachable;
            entry.next = match origin {
                Origin::Ca(_) => {
                    let now = Instant::now();
                    Next::At { at: now + pause, waited: now + pause.min(WAITED_PAUSE) }
                }
                Origin::Files(_) => Next::OnChange,
            };
            let held = entry.certificate.as_ref().filter(|certificate| unix < certificate.expires_at);
            warn!(%identity, error = format!("{error:#}"), failures = entry.failures,
                old_certificate_valid_for_s = held.map(|certificate| certificate.expires_at - unix),
                retry_in_ms = matches!(entry.next, Next::At { .. }).then(|| u64::try_from(pause.as_millis()).unwrap_or(u64::MAX)),
                "cannot get a certificate");
            entry.last_error = Some(format!("{error:#}").into());
        }
    }
    if again && let Some(entry) = entries.get_mut(&identity) {
        entry.next = Next::Now;
    }
    drop(entries);
    table.changes.send_modify(|count| *count += 1);
}

/// Half of what is left of the lifetime, ±3 % of it; at least a second from now. `random` is from [0, 1).
///
/// From now and not from NotBefore, which is backdated: of a lifetime of a minute that would be the whole.
fn renew_at(unix: u64, expires_at: u64, random: f64) -> u64 {
    let left = Duration::from_secs(expires_at.saturating_sub(unix));
    let share = 0.5 * (0.97 + 0.06 * random);
    unix + left.mul_f64(share).as_secs().max(1)
}

/// Pause before the attempt after failure number `failures` (from 1): `first`, then doubling, ±20 %. `random` is from
/// [0, 1).
fn backoff(first: Duration, failures: u32, random: f64) -> Duration {
    if failures <= 1 {
        return first;
    }
    let doubled = first.saturating_mul(1 << (failures - 1).min(20));
    doubled.min(MAX_BACKOFF).mul_f64(0.8 + 0.4 * random)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(text: &str) -> SpiffeId {
        format!("spiffe://cluster.local/ns/test/sa/{text}").parse().expect("valid")
    }

    /// [I.7]
    #[test]
    fn pauses_start_below_a_second_double_and_stay_under_150_seconds() {
        let first = Duration::from_millis(700);
        assert_eq!(backoff(first, 1, 0.9), first);
        for (failures, low, high) in
            [(2, 1.12, 1.68), (3, 2.24, 3.36), (8, 71.6, 107.6), (9, 100.0, 150.0), (99, 100.0, 150.0)]
        {
            let (shortest, longest) = (backoff(first, failures, 0.0), backoff(first, failures, 0.999));
            assert!((shortest.as_secs_f64() - low).abs() < 0.1, "{failures}: {shortest:?}");
            assert!((longest.as_secs_f64() - high).abs() < 0.2 && longest <= Duration::from_secs(150), "{longest:?}");
        }
        assert!(backoff(first, u32::MAX, 0.999) <= Duration::from_secs(150));
    }

    /// [I.7]
    #[test]
    fn renewal_is_at_half_life_with_a_few_percent_of_jitter() {
        let (now, day) = (1_700_000_000, 86_400);
        assert_eq!(renew_at(now, now + day, 0.5) - now, day / 2);
        assert_eq!(renew_at(now, now + day, 0.0) - now, 41_904);
        assert!((44_490..44_500).contains(&(renew_at(now, now + day, 0.999) - now)));
        assert_eq!(renew_at(now, now + 1, 0.5) - now, 1, "never at once");
        assert_eq!(renew_at(now, now - 5, 0.5) - now, 1, "nor in the past");
    }

    /// [I.7]
    #[tokio::test(start_paused = true)]
    async fn an_identity_that_a_connection_waits_for_goes_first_and_finds_room() {
        let table = Table::new();
        let set: BTreeSet<_> = (0..20).map(|i| id(&format!("a{i:02}"))).collect();
        table.want(&set);
        let now = Instant::now();
        let mut under_way = 0;
        while table.take_due(now, 0, under_way).is_some() {
            under_way += 1;
        }
        assert_eq!(under_way, MAX_BACKGROUND_FETCHES, "background fetches leave room");
        let free = set.iter().find(|id| !table.read()[*id].fetching).expect("14 are left").clone();
        let waiting = table.wait_for(&free);
        assert_eq!(table.take_due(now, 0, under_way), Some(free.clone()));
        assert_eq!(table.take_due(now, 0, under_way + 1), None);
        assert_eq!(table.read()[&free].waiting, 1);
        drop(waiting);
        assert_eq!(table.read()[&free].waiting, 0);
    }

    /// [I.7]: the pause of one identity is not another's.
    #[tokio::test(start_paused = true)]
    async fn a_failed_identity_waits_its_pause_and_no_longer() {
        let table = Table::new();
        table.want(&[id("a"), id("b")].into());
        let first = table.take_due(Instant::now(), 0, 0).expect("due");
        let failed = Failed { error: anyhow::anyhow!("refused"), unreachable: false, status: None };
        let origin = Origin::Ca(Box::new(CaClient::new(super::super::CaConfig {
            address: "127.0.0.1:1".into(),
            root_file: "/nonexistent".into(),
            server_name: "ca".into(),
            token_file: "/nonexistent".into(),
            cluster_id: "Kubernetes".into(),
            ttl: Duration::from_secs(60),
        })));
        let (trust, clock) = (Trust::new(Vec::new(), Clock::default()), Clock::default());
        finish(&origin, &table, &trust, &clock, first.clone(), Err(failed));
        let other = table.take_due(Instant::now(), 0, 0).expect("the other one is due");
        assert_ne!(other, first);
        assert_eq!(table.take_due(Instant::now(), 0, 1), None);
        let pause = table.pause(Instant::now(), 0);
        assert!(pause >= Duration::from_millis(500) && pause <= Duration::from_secs(1), "{pause:?}");
        tokio::time::advance(pause).await;
        assert_eq!(table.take_due(Instant::now(), 0, 1), Some(first.clone()));
        assert_eq!(table.read()[&first].last_error.as_deref(), Some("refused"));

        // After many failures the pause is long, unless a connection waits.
        for _ in 0..12 {
            let failed = Failed { error: anyhow::anyhow!("refused"), unreachable: false, status: None };
            finish(&origin, &table, &trust, &clock, first.clone(), Err(failed));
        }
        tokio::time::advance(WAITED_PAUSE).await;
        assert_eq!(table.take_due(Instant::now(), 0, 1), None);
        let waiting = table.wait_for(&first);
        assert_eq!(table.take_due(Instant::now(), 0, 1), Some(first.clone()));
        drop(waiting);
    }
}
