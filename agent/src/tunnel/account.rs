//! What tunnels hold in memory for somebody: bytes that have arrived and nobody has read yet.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicUsize, Ordering},
};

/// Below this a stream is not cut however much others hold, in bytes: it is not the one that does not read.
const INNOCENT: usize = 64 << 10;

/// The sum for one owner, whose streams may be on several threads.
#[derive(Debug)]
pub struct Account {
    used: AtomicUsize,
    limit: Arc<AtomicUsize>,
}

impl Account {
    /// `limit` is in bytes, and may change.
    pub fn new(limit: Arc<AtomicUsize>) -> Self {
        Self { used: AtomicUsize::new(0), limit }
    }

    /// Bytes that are held now.
    pub fn used(&self) -> usize {
        self.used.load(Ordering::Relaxed)
    }

    fn limit(&self) -> usize {
        self.limit.load(Ordering::Relaxed)
    }
}

/// One stream's part of an [`Account`]; given back when dropped.
#[derive(Debug)]
pub struct Charge {
    account: Arc<Account>,
    held: AtomicUsize,
    cut: AtomicBool,
}

impl Charge {
    /// Nothing yet.
    pub fn new(account: Arc<Account>) -> Self {
        Self { account, held: AtomicUsize::new(0), cut: AtomicBool::new(false) }
    }

    /// Whether the stream was cut off because its owner held too much and it was one of those that do not read.
    pub fn was_cut(&self) -> bool {
        self.cut.load(Ordering::Relaxed)
    }

    /// Notes that the stream holds `bytes` now; true if it must be cut off.
    pub(super) fn set(&self, bytes: usize) -> bool {
        let before = self.held.swap(bytes, Ordering::Relaxed);
        if bytes < before {
            self.account.used.fetch_sub(before - bytes, Ordering::Relaxed);
            return false;
        }
        let used = self.account.used.fetch_add(bytes - before, Ordering::Relaxed) + (bytes - before);
        let cut = bytes > INNOCENT && used > self.account.limit();
        if cut {
            self.cut.store(true, Ordering::Relaxed);
        }
        cut
    }

    /// Whether the stream's window may grow: while at least half of the limit is free.
    pub(super) fn may_grow(&self) -> bool {
        self.account.used() < self.account.limit() / 2
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        self.account.used.fetch_sub(self.held.load(Ordering::Relaxed), Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_who_holds_much_is_cut_and_everything_is_given_back() {
        let account = Arc::new(Account::new(Arc::new(AtomicUsize::new(1 << 20))));
        let (greedy, modest) = (Charge::new(account.clone()), Charge::new(account.clone()));
        assert!(!greedy.set(900 << 10) && greedy.set((1 << 20) + 1) && greedy.was_cut());
        assert!(!modest.set(INNOCENT) && !modest.was_cut() && !modest.may_grow());
        assert_eq!(account.used(), (1 << 20) + 1 + INNOCENT);
        assert!(!greedy.set(0) && modest.may_grow());
        drop((greedy, modest));
        assert_eq!(account.used(), 0);
    }
}
