//! What was seen lately, in bounded memory: how often, first and last. What it is about is for [`super::history`].
//!
//! [`Pending`] is where one thread counts what it sees, until it is full or somebody gathers it; [`Recent`] is where one
//! owner keeps what all threads have counted. Neither ever holds more than its capacity.

use std::{
    collections::{BTreeMap, HashMap},
    hash::Hash,
    sync::Arc,
    time::{Duration, Instant},
};

/// How often something was seen, and when.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen<A> {
    /// How often.
    pub times: u64,
    /// The first of these times.
    pub first: Instant,
    /// The last.
    pub last: Instant,
    /// What was known of it the last time.
    pub about: A,
}

impl<A> Seen<A> {
    /// Seen now, for the first time.
    pub fn now(times: u64, at: Instant, about: A) -> Self {
        Self { times, first: at, last: at, about }
    }

    /// Takes over what somebody else has seen of the same.
    pub fn add(&mut self, other: Self) {
        self.times += other.times;
        self.first = self.first.min(other.first);
        if other.last >= self.last {
            (self.last, self.about) = (other.last, other.about);
        }
    }
}

/// What one thread has seen since somebody gathered it.
#[derive(Debug)]
pub struct Pending<K, A> {
    capacity: usize,
    seen: HashMap<K, Seen<A>>,
}

impl<K: Eq + Hash, A> Pending<K, A> {
    /// For at most `capacity` different ones.
    pub fn new(capacity: usize) -> Self {
        Self { capacity, seen: HashMap::new() }
    }

    /// Counts it. True if there is no room for another one: it must be taken now.
    #[must_use]
    pub fn note(&mut self, key: K, seen: Seen<A>) -> bool {
        match self.seen.get_mut(&key) {
            Some(known) => known.add(seen),
            None => drop(self.seen.insert(key, seen)),
        }
        self.seen.len() >= self.capacity
    }

    /// All of it; it is empty afterwards.
    pub fn take(&mut self) -> HashMap<K, Seen<A>> {
        std::mem::take(&mut self.seen)
    }
}

/// The most recent ones of what was seen.
#[derive(Debug)]
pub struct Recent<K, A> {
    capacity: usize,
    seen: HashMap<Arc<K>, (u64, Seen<A>)>,
    /// By when it was seen last; the number tells those apart that were seen at one moment.
    order: BTreeMap<(Instant, u64), Arc<K>>,
    entered: u64,
}

impl<K: Clone + Eq + Hash, A> Recent<K, A> {
    /// For at most `capacity` different ones.
    pub fn new(capacity: usize) -> Self {
        Self { capacity, seen: HashMap::new(), order: BTreeMap::new(), entered: 0 }
    }

    /// Counts it. What was seen least recently goes where there are too many; it is returned.
    pub fn add(&mut self, key: K, seen: Seen<A>) -> Option<(K, Seen<A>)> {
        match self.seen.get_mut(&key) {
            Some((number, known)) => {
                let before = (known.last, *number);
                known.add(seen);
                let now = (known.last, *number);
                if now != before
                    && let Some(key) = self.order.remove(&before)
                {
                    self.order.insert(now, key);
                }
                None
            }
            None => {
                self.entered += 1;
                let key = Arc::new(key);
                self.order.insert((seen.last, self.entered), key.clone());
                self.seen.insert(key, (self.entered, seen));
                if self.seen.len() > self.capacity { self.pop() } else { None }
            }
        }
    }

    /// Drops what was not seen for longer than `keep`.
    pub fn forget(&mut self, now: Instant, keep: Duration) {
        while let Some(((last, _), _)) = self.order.first_key_value()
            && now.saturating_duration_since(*last) > keep
        {
            drop(self.pop());
        }
    }

    /// Takes out what was seen least recently.
    fn pop(&mut self) -> Option<(K, Seen<A>)> {
        let (_, key) = self.order.pop_first()?;
        let (_, seen) = self.seen.remove(&key)?;
        Some((Arc::unwrap_or_clone(key), seen))
    }

    /// Everything, what was seen last first.
    pub fn iter(&self) -> impl Iterator<Item = (&K, &Seen<A>)> {
        self.order.values().rev().filter_map(|key| Some((&**key, &self.seen.get(key)?.1)))
    }

    /// How many different ones there are.
    pub fn len(&self) -> usize {
        self.seen.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.seen.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    #[derive(Clone, Debug)]
    enum Step {
        Add { key: u8, times: u64, ago: u64 },
        Wait { seconds: u64 },
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            6 => (0..24u8, 1..5u64, 0..120u64).prop_map(|(key, times, ago)| Step::Add { key, times, ago }),
            1 => (0..2400u64).prop_map(|seconds| Step::Wait { seconds }),
        ]
    }

    proptest! {
        /// Never more than there is room for; what is kept is counted exactly; what goes is what was seen least
        /// recently, and is given back; what is older than an hour is gone. Compared with a list of everything.
        #[test]
        fn the_most_recent_are_kept_and_counted(capacity in 1..12usize, steps in prop::collection::vec(step(), 1..300)) {
            let start = Instant::now() + Duration::from_secs(86_400);
            let mut now = start;
            let mut recent = Recent::new(capacity);
            // By key: times, first, last, and the order in which it came.
            let mut model: Vec<(u8, u64, Instant, Instant)> = Vec::new();
            let (mut given, mut gone, mut expired) = (0, 0, 0);
            for step in steps {
                match step {
                    Step::Wait { seconds } => now += Duration::from_secs(seconds),
                    Step::Add { key, times, ago } => {
                        let at = now - Duration::from_secs(ago);
                        given += times;
                        let evicted = recent.add(key, Seen::now(times, at, ago));
                        match model.iter_mut().find(|known| known.0 == key) {
                            Some(known) => {
                                known.1 += times;
                                known.2 = known.2.min(at);
                                known.3 = known.3.max(at);
                            }
                            None => model.push((key, times, at, at)),
                        }
                        let expected = (model.len() > capacity).then(|| {
                            let oldest = model.iter().map(|known| known.3).min().expect("not empty");
                            let place = model.iter().position(|known| known.3 == oldest).expect("it is there");
                            model.remove(place)
                        });
                        prop_assert_eq!(
                            evicted.map(|(key, seen)| (key, seen.times, seen.first, seen.last)),
                            expected
                        );
                        gone += expected.map_or(0, |known| known.1);
                    }
                }
                recent.forget(now, HOUR);
                expired += model.iter().filter(|known| now - known.3 > HOUR).map(|known| known.1).sum::<u64>();
                model.retain(|known| now - known.3 <= HOUR);
                prop_assert!(recent.len() <= capacity);
                prop_assert_eq!(recent.len(), recent.order.len());
                let mut kept: Vec<_> = recent.iter().map(|(key, seen)| (*key, seen.times, seen.first, seen.last)).collect();
                prop_assert!(kept.windows(2).all(|pair| pair[0].3 >= pair[1].3), "what was seen last is first");
                kept.sort_unstable();
                let mut expected = model.clone();
                expected.sort_unstable();
                prop_assert_eq!(kept, expected);
            }
            let kept: u64 = recent.iter().map(|(_, seen)| seen.times).sum();
            prop_assert_eq!(kept + gone + expired, given);
        }

        /// What a thread holds is bounded, and every time is counted once.
        #[test]
        fn what_waits_is_bounded_and_every_time_is_counted(
            capacity in 1..8usize,
            keys in prop::collection::vec((0..16u8, 1..4u64), 0..100),
        ) {
            let now = Instant::now();
            let mut pending = Pending::new(capacity);
            let given: u64 = keys.iter().map(|(_, times)| times).sum();
            let mut taken = 0;
            for (key, times) in keys {
                let full = pending.note(key, Seen::now(times, now, ()));
                prop_assert!(pending.seen.len() <= capacity);
                if full {
                    taken += pending.take().values().map(|seen| seen.times).sum::<u64>();
                }
            }
            let rest = pending.take();
            prop_assert!(rest.len() < capacity);
            prop_assert_eq!(rest.values().map(|seen| seen.times).sum::<u64>() + taken, given);
            prop_assert!(pending.take().is_empty());
        }
    }

    #[test]
    fn the_latest_knows_best() {
        let at = Instant::now();
        let mut seen = Seen::now(1, at, "first");
        seen.add(Seen::now(1, at + HOUR, "last"));
        seen.add(Seen::now(1, at - Duration::from_secs(1), "late to tell"));
        assert_eq!((seen.times, seen.about, seen.last - seen.first), (3, "last", HOUR + Duration::from_secs(1)));
    }
}
