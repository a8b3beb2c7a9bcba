//! Whose status is to be written, and when: what changes in a row is one write, and nothing is written that is there
//! already.
//!
//! Knows neither a server nor a clock: it is told what was heard, what became of a write and what time it is, and says
//! what is due.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use kube::core::DynamicObject;
use rand::Rng as _;
use serde_json::{Value as Json, json};
use tokio::time::Instant;
use tracing::{debug, info, warn};

use crate::{
    model::ObjectRef,
    source::kubernetes::Heard,
    telemetry::limit::{Limit, Limiter},
};

use super::{
    super::reports::Count,
    wanted::{Fields, LastValid, Present, Version, Wanted},
};

/// Quiet after a change before it is written.
const QUIET: Duration = Duration::from_secs(1);
/// Longest time that changes in a row put a write off.
const LATEST: Duration = Duration::from_secs(5);
/// How long a new version waits for all agents to have it, so that one write says it all.
const AGENTS: Duration = Duration::from_secs(3);
/// Between two writes of one object.
const INTERVAL: Duration = Duration::from_secs(30);
/// How long a new leader waits for reports before it writes that an agent has not: three of the agents' intervals.
const REPORTS: Duration = Duration::from_secs(30);
/// When it is looked again whether others still write what was left to them.
const AGAIN: Duration = Duration::from_secs(300);
/// First pause after an error, and the longest.
const PAUSE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));
/// Lines per second about objects that others write.
const LINES: u32 = 5;

/// Kind, as `kind` spells it, and name.
pub(super) type Key = (&'static str, ObjectRef);

/// How many agents have a generation of an object in force.
pub(super) type Counts<'a> = &'a dyn Fn(&str, &ObjectRef, i64) -> Count;

/// Every policy, and what is to become of its status.
pub(super) struct Keeper {
    system_namespace: String,
    started: Instant,
    objects: BTreeMap<Key, Object>,
    /// What came of lists that are not complete.
    lists: BTreeMap<&'static str, BTreeSet<ObjectRef>>,
    /// Kinds whose writes fail.
    troubles: BTreeMap<&'static str, Trouble>,
    limiter: Limiter,
}

struct Object {
    uid: String,
    api_version: String,
    version: Version,
    count: Count,
    wanted: Wanted,
    present: Present,
    /// What the object says to be others'.
    owned: Fields,
    /// What the server has refused since it is others', and when that is tried again.
    refused: Option<(Fields, Instant)>,
    /// What was said to be left to others.
    said: Fields,
    /// When this generation was heard of.
    heard: Instant,
    /// The first and the last change that is not written.
    since: Option<(Instant, Instant)>,
    /// Nothing but how many agents there are, and have it in force, is to be written.
    counts_only: bool,
    /// What was written, without what is others', and what the server made of it: that is not tried again.
    told: Option<(Wanted, Fields, Present)>,
    written: Option<Instant>,
    failures: u32,
    not_before: Option<Instant>,
    in_flight: bool,
}

struct Trouble {
    failures: u32,
    until: Instant,
    since: Instant,
}

/// An object that is to be written.
struct Candidate<'a> {
    /// When it is to be.
    due: Instant,
    /// When it can be: later, while writes of the kind fail.
    possible: Instant,
    key: &'a Key,
}

/// A write that is due.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Write {
    pub(super) key: Key,
    pub(super) api_version: String,
    uid: String,
    wanted: Wanted,
    others: Fields,
    status: Json,
}

impl Write {
    /// As server-side apply takes it. With the UID: of an object that has taken the name meanwhile the server says that
    /// it is another one.
    pub(super) fn patch(&self) -> Json {
        let (kind, ObjectRef { namespace, name }) = (&self.key.0, &self.key.1);
        json!({
            "apiVersion": self.api_version,
            "kind": kind,
            "metadata": {"namespace": **namespace, "name": **name, "uid": self.uid},
            "status": self.status,
        })
    }
}

/// What became of a write.
#[derive(Clone, Debug)]
pub(super) enum Outcome {
    /// The object as it is now.
    Written(Box<DynamicObject>),
    /// There is no such object any more, or it is another one; news of that come by themselves.
    Gone,
    /// Others write these, in the server's words.
    Refused(Fields, String),
    /// The server does not do it, or does not answer.
    Failed {
        error: String,
        /// What it asked for.
        after: Option<Duration>,
    },
}

impl Keeper {
    /// `system_namespace` is that of ConfigMap `istio`, the mesh configuration.
    pub(super) fn new(system_namespace: &str, now: Instant) -> Self {
        Self {
            system_namespace: system_namespace.to_owned(),
            started: now,
            objects: BTreeMap::new(),
            lists: BTreeMap::new(),
            troubles: BTreeMap::new(),
            limiter: Limit::fixed(LINES).limiter(),
        }
    }

    /// Takes in news of a kind.
    pub(super) fn hear(&mut self, kind: &'static str, heard: Heard<DynamicObject>, counts: Counts<'_>, now: Instant) {
        match heard {
            Heard::List => drop(self.lists.insert(kind, BTreeSet::new())),
            Heard::Listed(object) => {
                let name = self.take(kind, &object, counts, now);
                self.lists.entry(kind).or_default().insert(name);
            }
            Heard::Complete => {
                if let Some(listed) = self.lists.remove(kind) {
                    self.objects.retain(|(of, name), _| *of != kind || listed.contains(name));
                }
            }
            Heard::Applied(object) => drop(self.take(kind, &object, counts, now)),
            Heard::Deleted(object) => drop(self.objects.remove(&(kind, name(&object)))),
            Heard::NoSuchKind => {
                self.lists.remove(kind);
                self.objects.retain(|(of, _), _| *of != kind);
            }
            Heard::Well | Heard::Trouble(_) => {}
        }
    }

    /// Agents have reported.
    pub(super) fn recount(&mut self, counts: Counts<'_>, now: Instant) {
        for (key, object) in &mut self.objects {
            let count = object.version.count(key, counts);
            if object.count != count {
                object.count = count;
                object.revise(now);
            }
        }
    }

    fn take(&mut self, kind: &'static str, sent: &DynamicObject, counts: Counts<'_>, now: Instant) -> ObjectRef {
        let key = (kind, name(sent));
        let uid = sent.metadata.uid.clone().unwrap_or_default();
        // Another object of this name has no past.
        let mut before = self.objects.remove(&key).filter(|object| object.uid == uid);
        let last_valid = before.as_mut().and_then(|object| object.version.last_valid.take());
        let object = Object::of(sent, uid, before, last_valid, (&key, counts), (&self.system_namespace, now));
        let object = self.objects.entry(key.clone()).or_insert(object);
        object.revise(now);
        object.say(&key, "metadata.managedFields names them", &mut self.limiter, now);
        key.1
    }

    /// When something is due next; `None` while nothing is.
    pub(super) fn due(&self) -> Option<Instant> {
        let again = self.objects.values().filter_map(|object| object.refused.map(|(_, again)| again)).min();
        self.candidates().map(|candidate| candidate.possible).min().into_iter().chain(again).min()
    }

    fn candidates(&self) -> impl Iterator<Item = Candidate<'_>> {
        let in_flight: BTreeSet<&str> =
            self.objects.iter().filter(|(_, object)| object.in_flight).map(|(key, _)| key.0).collect();
        self.objects.iter().filter_map(move |(key, object)| {
            let due = object.due(self.started)?;
            match self.troubles.get(key.0) {
                None => Some(Candidate { possible: due, due, key }),
                // One at a time until one succeeds.
                Some(_) if in_flight.contains(key.0) => None,
                Some(trouble) => Some(Candidate { possible: due.max(trouble.until), due, key }),
            }
        })
    }

    /// The write that has been due longest; it counts as begun. `clock` as RFC 3339 has it.
    pub(super) fn next(&mut self, now: Instant, clock: &str) -> Option<Write> {
        for object in self.objects.values_mut() {
            if object.refused.is_some_and(|(_, again)| again <= now) {
                object.refused = None;
                object.settle(now);
            }
        }
        let possible = self.candidates().filter(|candidate| candidate.possible <= now);
        let key = possible.min_by_key(|candidate| (candidate.due, candidate.key))?.key.clone();
        let object = self.objects.get_mut(&key)?;
        object.in_flight = true;
        object.since = None;
        let wanted = object.wanted.clone();
        let others = object.others();
        let status = wanted.status(&object.present, others, clock);
        let (api_version, uid) = (object.api_version.clone(), object.uid.clone());
        Some(Write { key, api_version, uid, wanted, others, status })
    }

    /// A write has ended.
    pub(super) fn finish(&mut self, write: Write, outcome: Outcome, now: Instant) {
        let kind = write.key.0;
        match &outcome {
            Outcome::Failed { error, after } => self.fail(kind, &write.key.1, error, *after, now),
            Outcome::Written(_) | Outcome::Gone | Outcome::Refused(..) => {
                if let Some(trouble) = self.troubles.remove(kind) {
                    info!(kind, after = ?(now - trouble.since), "the status of policies is written again");
                }
            }
        }
        let Some(object) = self.objects.get_mut(&write.key).filter(|object| object.uid == write.uid) else { return };
        object.in_flight = false;
        let failures = std::mem::take(&mut object.failures);
        match outcome {
            Outcome::Written(answer) => {
                object.present = Present::of(&answer);
                object.owned = Fields::owned(&answer.metadata);
                object.told = Some((write.wanted, write.others, object.present.clone()));
                object.written = Some(now);
            }
            Outcome::Gone => object.not_before = Some(now + INTERVAL),
            Outcome::Refused(fields, error) => {
                let before = object.refused.map(|(fields, _)| fields).unwrap_or_default();
                object.refused = Some((before.and(fields), now + AGAIN));
                object.say(&write.key, &error, &mut self.limiter, now);
            }
            Outcome::Failed { after, .. } => {
                object.not_before = Some(now + pause(failures).max(after.unwrap_or_default()));
                object.failures = failures.saturating_add(1);
            }
        }
        object.settle(now);
    }

    fn fail(&mut self, kind: &'static str, object: &ObjectRef, error: &str, after: Option<Duration>, now: Instant) {
        let Some(trouble) = self.troubles.get_mut(kind) else {
            warn!(kind, %object, error, "the status of a policy could not be written: trying again");
            let until = now + pause(0).max(after.unwrap_or_default());
            self.troubles.insert(kind, Trouble { failures: 1, until, since: now });
            return;
        };
        debug!(kind, %object, error, "the status of a policy could not be written");
        // What was on its way with others has failed with them.
        if trouble.until <= now {
            trouble.until = now + pause(trouble.failures).max(after.unwrap_or_default());
            trouble.failures = trouble.failures.saturating_add(1);
        }
    }
}

fn name(object: &DynamicObject) -> ObjectRef {
    let meta = &object.metadata;
    ObjectRef::new(meta.namespace.as_deref().unwrap_or_default(), meta.name.as_deref().unwrap_or_default())
}

impl Version {
    fn count(&self, (kind, name): &Key, counts: Counts<'_>) -> Count {
        // Where there is none to enforce, this one is in force nowhere, and there are as many agents.
        counts(kind, name, self.to_enforce().unwrap_or(self.generation))
    }
}

impl Object {
    fn of(
        sent: &DynamicObject,
        uid: String,
        before: Option<Self>,
        last_valid: Option<LastValid>,
        (key, counts): (&Key, Counts<'_>),
        (system_namespace, now): (&str, Instant),
    ) -> Self {
        let version = Version::of(sent, last_valid, system_namespace);
        let count = version.count(key, counts);
        let api_version = sent.types.as_ref().map(|types| types.api_version.clone()).unwrap_or_default();
        let (present, owned) = (Present::of(sent), Fields::owned(&sent.metadata));
        match before {
            Some(before) => {
                let heard = if before.version.generation == version.generation { before.heard } else { now };
                Self { api_version, version, count, present, owned, heard, ..before }
            }
            None => Self {
                uid,
                api_version,
                wanted: version.wanted(count),
                version,
                count,
                present,
                owned,
                refused: None,
                said: Fields::default(),
                heard: now,
                since: None,
                counts_only: false,
                told: None,
                written: None,
                failures: 0,
                not_before: None,
                in_flight: false,
            },
        }
    }

    /// What is left to others.
    fn others(&self) -> Fields {
        self.refused.map_or(self.owned, |(fields, _)| self.owned.and(fields))
    }

    /// Whether there is something to write.
    fn differs(&self) -> bool {
        let others = self.others();
        let told = self
            .told
            .as_ref()
            .is_some_and(|(wanted, without, made)| (wanted, *without, made) == (&self.wanted, others, &self.present));
        !told && self.wanted.differs(&self.present, others)
    }

    /// What is wanted, from what is known.
    fn revise(&mut self, now: Instant) {
        let wanted = self.version.wanted(self.count);
        if wanted != self.wanted {
            self.wanted = wanted;
            self.since = self.since.map(|(first, _)| (first, now));
        }
        self.settle(now);
    }

    fn settle(&mut self, now: Instant) {
        self.since = self.differs().then(|| self.since.unwrap_or((now, now)));
        self.counts_only = !self.wanted.differs_in_more_than_counts(&self.present, self.others());
    }

    /// When it is to be written.
    fn due(&self, started: Instant) -> Option<Instant> {
        let (first, last) = self.since.filter(|_| !self.in_flight)?;
        let waits = self.version.is_valid() && self.count.in_force < self.count.agents;
        let settled = (last + QUIET).max(if waits { self.heard + AGENTS } else { last }).min(first + LATEST);
        // What the leader before has counted, nobody has had time to tell this one.
        let reports = (self.counts_only && !self.wanted.is_in_force()).then_some(started + REPORTS);
        let interval = self.written.map(|written| written + INTERVAL);
        [reports, interval, self.not_before].into_iter().flatten().chain([settled]).max()
    }

    /// Says once what is left to others.
    fn say(&mut self, (kind, name): &Key, why: &str, limiter: &mut Limiter, now: Instant) {
        let others = self.others();
        let is_news = others != self.said && others != Fields::default();
        self.said = others;
        if is_news && limiter.admits(None, "status of others", now.into_std()) {
            let Fields { generation, conditions, last_valid } = others;
            info!(
                kind, object = %name, observed_generation = generation, conditions, last_valid, why,
                "others write this in the status of a policy, and it is left to them"
            );
        }
    }
}

/// After that many failures in a row: half of it to all of it, so that not all come at once.
fn pause(failures: u32) -> Duration {
    let (first, most) = PAUSE;
    (first * 2u32.saturating_pow(failures.min(10))).min(most).mul_f64(rand::rng().random_range(0.5..=1.0))
}
