//! A worker that expects work within moments looks for it again and again before it sleeps (busy polling).
//!
//! Waking a thread costs more than carrying a message: tens of microseconds on a virtual machine, whose processor has to be
//! woken too, and each message through the mesh wakes two workers. So a worker goes on looking for events for as long as
//! its last sleeps were short, as the kernel's `haltpoll` governor does for processors
//! (Documentation/virt/guest-halt-polling.rst): the time doubles with every sleep that was shorter than the limit, and one
//! long sleep ends it. Between two looks the processor is offered to others, so that only idle time is spent; and one worker
//! of an agent does it at a time, so that it is one processor's at most.
//!
//! What happens is told by [`worked`]; how a worker's runtime is made is for `worker`.

use std::{
    cell::{Cell, RefCell},
    future::poll_fn,
    sync::atomic::{AtomicBool, Ordering},
    task::{Poll, Waker},
    thread,
    time::{Duration, Instant},
};

use tokio::{
    runtime::{Builder, Runtime},
    task::JoinHandle,
};

/// The time after the first short sleep.
const FIRST: Duration = Duration::from_micros(10);

/// Whether a worker of this process polls now.
static POLLING: AtomicBool = AtomicBool::new(false);

thread_local! {
    static POLLER: Poller = const { Poller::new() };
}

/// One thread's.
struct Poller {
    /// Longest time to poll; zero for never.
    limit: Cell<Duration>,
    /// How long it polls now.
    window: Cell<Duration>,
    /// Counts what was done.
    work: Cell<u64>,
    /// [`Poller::work`] when it was last looked at.
    seen: Cell<u64>,
    /// When there was last something to do.
    idle_since: Cell<Option<Instant>>,
    /// When it began to sleep, while it does.
    asleep_since: Cell<Option<Instant>>,
    /// This thread is the one that polls.
    polls: Cell<bool>,
    /// Of a task that does nothing but keep the runtime from sleeping.
    keep_awake: RefCell<Option<Waker>>,
}

impl Poller {
    const fn new() -> Self {
        Self {
            limit: Cell::new(Duration::ZERO),
            window: Cell::new(Duration::ZERO),
            work: Cell::new(0),
            seen: Cell::new(0),
            idle_since: Cell::new(None),
            asleep_since: Cell::new(None),
            polls: Cell::new(false),
            keep_awake: RefCell::new(None),
        }
    }

    /// Nothing is left to do: whether to look again. If not, the thread sleeps.
    fn idle(&self, now: Instant) -> bool {
        if self.work.get() != self.seen.replace(self.work.get()) {
            self.idle_since.set(Some(now));
        }
        let idle_for = self.idle_since.get().map_or(Duration::MAX, |since| now.saturating_duration_since(since));
        if idle_for < self.window.get() && self.may_poll() {
            return true;
        }
        self.stop();
        self.asleep_since.set(Some(now));
        false
    }

    fn may_poll(&self) -> bool {
        if !self.polls.get() {
            self.polls.set(!POLLING.swap(true, Ordering::Relaxed));
        }
        self.polls.get()
    }

    fn stop(&self) {
        if self.polls.replace(false) {
            POLLING.store(false, Ordering::Relaxed);
        }
    }

    /// The sleep has ended: something happened, or a time has come.
    fn awake(&self, now: Instant) {
        let Some(since) = self.asleep_since.take() else { return };
        let limit = self.limit.get();
        let short = now.saturating_duration_since(since) <= limit;
        self.window.set(if short { (2 * self.window.get()).max(FIRST).min(limit) } else { Duration::ZERO });
        self.idle_since.set(Some(now));
    }
}

impl Drop for Poller {
    fn drop(&mut self) {
        self.stop();
    }
}

/// A connection had something to do on this thread.
#[inline]
pub fn worked() {
    POLLER.with(|poller| poller.work.set(poller.work.get().wrapping_add(1)));
}

/// Lets the runtime of `builder` poll; from when on, and for how long, says [`start`].
pub fn hook(builder: &mut Builder) -> &mut Builder {
    builder
        .on_thread_park(|| {
            POLLER.with(|poller| {
                if !poller.limit.get().is_zero() && poller.idle(Instant::now()) {
                    thread::yield_now();
                    // A task that is ready makes the runtime ask for events without waiting for them.
                    if let Some(waker) = &*poller.keep_awake.borrow() {
                        waker.wake_by_ref();
                    }
                }
            });
        })
        .on_thread_unpark(|| {
            POLLER.with(|poller| {
                if poller.asleep_since.get().is_some() {
                    poller.awake(Instant::now());
                }
            });
        })
}

/// Lets this thread, which is to run `runtime`, poll for at most `limit` from now on. The task that is returned is part of
/// it, and ends with the runtime.
#[expect(clippy::disallowed_methods, reason = "the runtime owns it, and who dropped the handle would end nothing")]
pub fn start(runtime: &Runtime, limit: Duration) -> JoinHandle<()> {
    POLLER.with(|poller| poller.limit.set(limit));
    // Of the runtime, and not of its set of local tasks: to wake one of those the kernel is asked.
    runtime.spawn(poll_fn(|cx| {
        POLLER.with(|poller| {
            poller.keep_awake.replace(Some(cx.waker().clone()));
        });
        Poll::Pending
    }))
}

#[cfg(test)]
#[expect(clippy::disallowed_methods, reason = "a test awaits what it has started, or ends with it")]
mod tests {
    use std::{
        hint,
        io::{Read as _, Write as _},
        net,
        sync::Mutex,
    };

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    /// The tests share what there is one of in a process.
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

    const LIMIT: Duration = Duration::from_micros(100);

    fn poller() -> Poller {
        let poller = Poller::new();
        poller.limit.set(LIMIT);
        poller
    }

    /// Sleeps from `now` on for `time`, and gives the end.
    fn sleep(poller: &Poller, now: Instant, time: Duration) -> Instant {
        assert!(!poller.idle(now), "it would poll");
        poller.awake(now + time);
        now + time
    }

    #[test]
    fn short_sleeps_make_it_poll_and_a_long_one_ends_it() {
        let _alone = ONE_AT_A_TIME.lock();
        let poller = poller();
        let mut now = Instant::now();
        let mut windows = Vec::new();
        for _ in 0..6 {
            now = sleep(&poller, now + LIMIT, Duration::from_micros(30));
            windows.push(poller.window.get().as_micros());
        }
        assert_eq!(windows, [10, 20, 40, 80, 100, 100]);
        let micros = Duration::from_micros;
        assert!(poller.idle(now + micros(99)) && !poller.idle(now + micros(100)), "for as long as the window is");
        poller.awake(now + micros(150));
        worked_on(&poller);
        let later = now + micros(1000);
        assert!(poller.idle(later) && poller.idle(later + micros(99)), "from the last work on");
        assert!(!poller.idle(later + micros(100)));
        poller.awake(later + micros(100) + LIMIT + micros(1));
        assert_eq!(poller.window.get(), Duration::ZERO);
        worked_on(&poller);
        assert!(!poller.idle(later + micros(300)));
    }

    fn worked_on(poller: &Poller) {
        poller.work.set(poller.work.get() + 1);
    }

    #[test]
    fn one_polls_at_a_time() {
        let _alone = ONE_AT_A_TIME.lock();
        let (one, other) = (poller(), poller());
        let now = Instant::now();
        for poller in [&one, &other] {
            poller.window.set(LIMIT);
            worked_on(poller);
        }
        assert!(one.idle(now) && !other.idle(now));
        drop(one);
        other.awake(now);
        assert!(other.idle(now));
    }

    /// What a peer answers within moments is found without a sleep.
    #[test]
    fn a_runtime_that_polls_hardly_sleeps() {
        const ROUNDS: u64 = 500;
        const TRIES: usize = 5;
        const THINKS: Duration = Duration::from_micros(200);
        let _alone = ONE_AT_A_TIME.lock();
        let listener = net::TcpListener::bind("127.0.0.1:0").expect("bind");
        let address = listener.local_addr().expect("address");
        let echo = thread::spawn(move || {
            for _ in 0..=TRIES {
                let (mut socket, _) = listener.accept().expect("accept");
                let mut byte = [0];
                while socket.read_exact(&mut byte).is_ok() {
                    // Longer than it takes the other end to go to sleep.
                    let read = Instant::now();
                    while read.elapsed() < THINKS {
                        hint::spin_loop();
                    }
                    socket.write_all(&byte).expect("the other end reads");
                }
            }
        });
        let sleeps = |limit: Duration| {
            let runtime = hook(&mut Builder::new_current_thread()).enable_all().build().expect("a runtime");
            let _part = start(&runtime, limit);
            runtime.block_on(async {
                let mut socket = tokio::net::TcpStream::connect(address).await.expect("connect");
                let mut byte = [0];
                for _ in 0..ROUNDS {
                    worked();
                    socket.write_all(&byte).await.expect("write");
                    socket.read_exact(&mut byte).await.expect("read");
                }
            });
            POLLER.with(Poller::stop);
            runtime.metrics().worker_park_count(0)
        };
        let slept = sleeps(Duration::ZERO);
        assert!(slept > ROUNDS / 5, "{slept} sleeps of one that does not poll");
        // So long that no machine is too slow. Workers of other tests poll as well, and then this one may not.
        let slept: Vec<u64> = (0..TRIES).map(|_| sleeps(Duration::from_secs(10))).collect();
        assert!(slept.iter().any(|slept| *slept < ROUNDS / 10), "{slept:?} sleeps");
        echo.join().expect("the echo ends");
    }
}
