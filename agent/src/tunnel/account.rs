//! What the agent holds in memory for somebody; who that is, and who is refused for it, is the caller's.

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
    /// The account that this one is a part of.
    whole: Option<Arc<Account>>,
}

impl Account {
    /// `limit` is in bytes, and may change.
    pub fn new(limit: Arc<AtomicUsize>) -> Self {
        Self { used: AtomicUsize::new(0), limit, whole: None }
    }

    /// The account of one of those who share `whole`.
    pub fn part_of(whole: &Arc<Self>) -> Self {
        Self { used: AtomicUsize::new(0), limit: whole.limit.clone(), whole: Some(whole.clone()) }
    }

    /// Bytes that are held now.
    pub fn used(&self) -> usize {
        self.used.load(Ordering::Relaxed)
    }

    /// Whether more is held than may be. A part may have as much as it leaves free to all others: one alone half of the
    /// limit, three of them a quarter each, so that there is room for one more, however greedy they are.
    pub fn is_full(&self) -> bool {
        self.used() + self.whole.as_ref().map_or(0, |whole| whole.used()) > self.limit()
    }

    fn limit(&self) -> usize {
        self.limit.load(Ordering::Relaxed)
    }

    /// Counts `bytes` more.
    pub fn take(&self, bytes: usize) {
        self.used.fetch_add(bytes, Ordering::Relaxed);
        if let Some(whole) = &self.whole {
            whole.take(bytes);
        }
    }

    /// Undoes a [`take`](Self::take).
    pub fn give_back(&self, bytes: usize) {
        self.used.fetch_sub(bytes, Ordering::Relaxed);
        if let Some(whole) = &self.whole {
            whole.give_back(bytes);
        }
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

    /// What something costs for as long as it lasts.
    pub fn of(account: Arc<Account>, bytes: usize) -> Self {
        account.take(bytes);
        Self { account, held: AtomicUsize::new(bytes), cut: AtomicBool::new(false) }
    }

    /// Whether the stream was cut off because its owner held too much and it was one of those that do not read.
    pub fn was_cut(&self) -> bool {
        self.cut.load(Ordering::Relaxed)
    }

    /// Notes that the stream holds `bytes` now.
    pub fn hold(&self, bytes: usize) {
        let before = self.held.swap(bytes, Ordering::Relaxed);
        if bytes > before {
            self.account.take(bytes - before);
        } else if bytes < before {
            self.account.give_back(before - bytes);
        }
    }

    /// As [`hold`](Self::hold) for a stream that cannot be held back; true if it must be cut off.
    pub(super) fn set(&self, bytes: usize) -> bool {
        let more = bytes > self.held.load(Ordering::Relaxed);
        self.hold(bytes);
        let cut = more && bytes > INNOCENT && self.account.is_full();
        if cut {
            self.cut.store(true, Ordering::Relaxed);
        }
        cut
    }

    /// Whether the stream may hold more than it must: while at least half of the limit is free.
    pub fn may_grow(&self) -> bool {
        let account = self.account.whole.as_ref().unwrap_or(&self.account);
        account.used() < account.limit() / 2
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        self.account.give_back(self.held.load(Ordering::Relaxed));
    }
}

#[cfg(test)]
mod tests {
    use std::{cell::Cell, rc::Rc, time::Duration};

    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::{TcpListener, TcpStream},
    };

    use super::{
        super::{Config, Pool, server::Incoming, testing::*},
        *,
    };
    use crate::proxy::copy::{self, CopyOutcome, Counters, ResetOnClose};

    fn account(limit: usize) -> Arc<Account> {
        Arc::new(Account::new(Arc::new(AtomicUsize::new(limit))))
    }

    #[test]
    fn only_who_holds_much_is_cut_and_everything_is_given_back() {
        let account = account(1 << 20);
        let (greedy, modest) = (Charge::new(account.clone()), Charge::new(account.clone()));
        assert!(!greedy.set(900 << 10) && greedy.set((1 << 20) + 1) && greedy.was_cut());
        assert!(!modest.set(INNOCENT) && !modest.was_cut() && !modest.may_grow());
        assert_eq!(account.used(), (1 << 20) + 1 + INNOCENT);
        assert!(!greedy.set(0) && modest.may_grow());
        drop((greedy, modest));
        assert_eq!(account.used(), 0);
    }

    #[test]
    fn who_shares_an_account_leaves_room_for_one_more() {
        const PIECE: usize = 8 << 10;
        let whole = account(1 << 20);
        let mut held = Vec::new();
        let mut fill = |limit: usize| {
            let part = Arc::new(Account::part_of(&whole));
            let before = held.len();
            while !part.is_full() && held.len() - before < limit {
                held.push(Charge::of(part.clone(), PIECE));
            }
            held.len() - before
        };
        let pieces = (1 << 20) / PIECE;
        // Each goes one over before it is full.
        assert_eq!(fill(pieces), pieces / 2 + 1, "one alone has half");
        assert_eq!(fill(pieces), pieces / 4, "the next has half of what was left");
        assert!(fill(8) == 8, "a newcomer has room");
        assert!(!whole.is_full());
        drop(held);
        assert_eq!(whole.used(), 0);
    }

    async fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
        let addr = listener.local_addr().expect("address");
        let (near, far) = tokio::join!(TcpStream::connect(addr), listener.accept());
        (near.expect("connect"), far.expect("accept").0)
    }

    /// Not a byte lies between the tunnel and a socket that nobody reads which the account does not know of.
    #[test]
    fn what_a_stalled_socket_has_not_taken_is_counted() {
        const BLOCK: usize = 1 << 10;
        local(async {
            let tls = tls();
            let sent = Rc::new(Cell::new(0));
            let count = sent.clone();
            let handler = move |incoming: Incoming| {
                let count = count.clone();
                async move {
                    let Ok(mut stream) = incoming.accept(None) else { return };
                    while stream.write(&[7; BLOCK]).await.is_ok() {
                        count.set(count.get() + BLOCK);
                    }
                }
            };
            let server = Server::start(&tls, Config::default(), handler).await;
            let pool = Pool::new(Config::default());
            let mut stream = open(&pool, server.addr, &tls.client).await.expect("open");
            let account = account(64 << 20);
            stream.charge(Arc::new(Charge::new(account.clone())));
            let (near, _application) = pair().await;
            let counters = Counters::default();
            let copied = copy::bidirectional(ResetOnClose::new(near), stream, &counters);
            let stalled = until(|| {
                let delivered = counters.backward.load(Ordering::Relaxed) as usize;
                let between = sent.get().saturating_sub(delivered);
                // Of the block that is being written a part may have left.
                account.used() > 64 << 10 && account.used().abs_diff(between) <= BLOCK
            });
            tokio::select! {
                outcome = copied => panic!("{outcome:?}"),
                () = stalled => {}
            }
            assert_eq!(account.used(), 0, "given back with the stream");
        });
    }

    /// Nothing is cut between two sockets: less is taken from the one, and TCP holds back who sends.
    #[test]
    fn between_sockets_little_is_held_once_half_of_the_limit_is_used() {
        local(async {
            let account = account(1 << 20);
            let charge = Charge::new(account.clone());
            let ((mut client, near), (far, mut server)) = (pair().await, pair().await);
            let counters = Counters::default();
            let copied = copy::bidirectional_plain(ResetOnClose::new(near), ResetOnClose::new(far), &counters, &charge);
            let others = Charge::of(account.clone(), 1 << 19);
            let scenario = async {
                // Whoever writes is stalled when nothing more is taken from it.
                let stall = async |client: &mut TcpStream| {
                    let mut written = 0;
                    let block = vec![7; 64 << 10];
                    while let Ok(wrote) = tokio::time::timeout(Duration::from_millis(300), client.write(&block)).await {
                        written += wrote.expect("write");
                    }
                    written
                };
                let mut written = stall(&mut client).await;
                until(|| account.used() > 1 << 19).await;
                let scarce = account.used() - (1 << 19);
                assert!(scarce <= 4 << 10, "{scarce} bytes held");
                others.hold(0);
                let mut block = vec![0; 1 << 20];
                let mut got = 0;
                while got < written {
                    got += server.read(&mut block).await.expect("read");
                }
                until(|| account.used() == 0).await;
                written += stall(&mut client).await;
                until(|| account.used() > 0).await;
                assert!(account.used() <= 128 << 10, "{} bytes held", account.used());
                client.shutdown().await.expect("shutdown");
                while got < written {
                    got += server.read(&mut block).await.expect("read");
                }
                assert_eq!(server.read(&mut block).await.expect("EOF"), 0);
                server.shutdown().await.expect("shutdown");
            };
            let (outcome, ()) = tokio::join!(copied, scenario);
            assert!(matches!(outcome, CopyOutcome::Finished), "{outcome:?}");
            assert_eq!(account.used(), 0);
        });
    }
}
