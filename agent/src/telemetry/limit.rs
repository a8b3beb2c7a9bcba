//! How many lines a pod may cause: a token bucket for each pod and reason.
//!
//! Each thread that writes such lines has a limiter of its own, with its share of the limit. What is held back is counted
//! and told in one line; metrics count everything, whatever is told.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use tracing::warn;

use crate::{
    model::{ObjectRef, PodUid},
    policy::Workload,
};

/// How often what was held back is told.
const TELL: Duration = Duration::from_secs(1);

/// The limit, and what all limiters have held back. Clones are the same.
#[derive(Clone, Debug)]
pub struct Limit {
    /// Lines per second that one limiter lets through for each pod and reason; a second's worth at once. 0: all.
    per_second: u32,
    /// Where it comes from, if an operator can change it.
    setting: Option<&'static str>,
    suppressed: Arc<AtomicU64>,
}

impl Limit {
    /// `per_second` lines for each pod and reason, shared evenly by `threads`; 0 for no limit.
    pub fn new(per_second: u32, threads: u32) -> Self {
        Self {
            per_second: per_second.div_ceil(threads.max(1)),
            setting: Some("--log-limit"),
            suppressed: Arc::default(),
        }
    }

    /// `per_second` lines for each pod and reason, which no setting changes.
    pub fn fixed(per_second: u32) -> Self {
        Self { per_second, setting: None, suppressed: Arc::default() }
    }

    /// A limiter for a thread.
    pub fn limiter(&self) -> Limiter {
        Limiter { limit: self.clone(), buckets: HashMap::new(), told: Instant::now() }
    }

    /// Lines that were held back so far.
    pub fn suppressed(&self) -> u64 {
        self.suppressed.load(Ordering::Relaxed)
    }
}

/// One thread's buckets.
#[derive(Debug)]
pub struct Limiter {
    limit: Limit,
    buckets: HashMap<(Option<PodUid>, &'static str), Bucket>,
    told: Instant,
}

#[derive(Debug)]
struct Bucket {
    pod: Option<ObjectRef>,
    tokens: f64,
    filled: Instant,
    suppressed: u64,
}

impl Limiter {
    /// Whether a line about a pod of this node may be written now; `None` is for what no pod can be named for.
    pub fn admits(&mut self, pod: Option<&Workload>, reason: &'static str, now: Instant) -> bool {
        let most = f64::from(self.limit.per_second);
        if most == 0.0 {
            return true;
        }
        let bucket = self.buckets.entry((pod.map(|pod| pod.uid.clone()), reason)).or_insert_with(|| Bucket {
            pod: pod.map(|pod| pod.object.clone()),
            tokens: most,
            filled: now,
            suppressed: 0,
        });
        bucket.fill(most, now);
        if bucket.tokens < 1.0 {
            bucket.suppressed += 1;
            self.limit.suppressed.fetch_add(1, Ordering::Relaxed);
            return false;
        }
        bucket.tokens -= 1.0;
        true
    }

    /// From time to time: tells how many lines were held back, and forgets who has been quiet.
    pub fn tell(&mut self, now: Instant) {
        if now.saturating_duration_since(self.told) < TELL {
            return;
        }
        self.told = now;
        let most = f64::from(self.limit.per_second);
        self.buckets.retain(|(_, reason), bucket| {
            bucket.fill(most, now);
            match std::mem::take(&mut bucket.suppressed) {
                0 => bucket.tokens < most,
                suppressed => {
                    let pod = bucket.pod.as_ref().map(ObjectRef::to_string);
                    let setting = self.limit.setting;
                    warn!(pod, reason, suppressed, setting, "lines of this pod and reason were held back");
                    true
                }
            }
        });
    }
}

impl Bucket {
    fn fill(&mut self, most: f64, now: Instant) {
        let since = now.saturating_duration_since(self.filled);
        self.filled = now;
        self.tokens = (self.tokens + since.as_secs_f64() * most).min(most);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_reason_has_its_own_second_worth_of_lines() {
        let limit = Limit::new(10, 2);
        let mut limiter = limit.limiter();
        let start = Instant::now();
        let mut admitted = |reason, at: Instant| (0..100).filter(|_| limiter.admits(None, reason, at)).count();
        assert_eq!(admitted("a", start), 5, "a thread's share");
        assert_eq!(admitted("b", start), 5);
        assert_eq!(admitted("a", start + Duration::from_millis(400)), 2);
        assert_eq!(admitted("a", start + Duration::from_secs(60)), 5, "never more than a second's worth");
        assert_eq!(limit.suppressed(), 95 + 95 + 98 + 95);
        limiter.tell(start + Duration::from_secs(61));
        assert!(limiter.buckets.values().all(|bucket| bucket.suppressed == 0));
        limiter.tell(start + Duration::from_secs(63));
        assert!(limiter.buckets.is_empty(), "who is quiet is forgotten");
    }

    #[test]
    fn zero_is_no_limit() {
        let limit = Limit::new(0, 4);
        let mut limiter = limit.limiter();
        assert!((0..100_000).all(|_| limiter.admits(None, "a", Instant::now())));
        assert!(limiter.buckets.is_empty());
    }
}
