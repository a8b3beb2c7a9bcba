//! Orderly shutdown: one side says that it is time to end, and waits for everybody who still has something to finish.
//!
//! A [`Watch`] is both the way to learn of it and the proof that its holder is not done: a task holds a clone until it
//! has finished, and dropping the clone says so. What "finish" means is the holder's business ([H.4]).

use std::time::Duration;

use tokio::{sync::watch, time::Instant};

/// Makes both ends. Whatever must finish gets a clone of the [`Watch`]; the first one must be dropped too.
pub fn channel() -> (Signal, Watch) {
    let (sender, receiver) = watch::channel(None);
    (Signal { sender }, Watch { receiver })
}

/// Why it is time to finish.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// The agent ends, and nobody takes its place: nothing new comes.
    End,
    /// Another agent has taken over: what was on its way here still arrives.
    HandedOver,
}

/// What every [`Watch`] is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Order {
    /// The moment at which patience ends.
    pub deadline: Instant,
    /// Why.
    pub cause: Cause,
}

/// For the last frames and lines after the deadline, at which connections are cut.
const LAST_WORDS: Duration = Duration::from_millis(700);

/// The end that starts the draining.
#[derive(Debug)]
pub struct Signal {
    sender: watch::Sender<Option<Order>>,
}

/// The deadline passed with this many [`Watch`]es still held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unfinished(pub usize);

impl Signal {
    /// Tells every [`Watch`] to finish within `grace`, and waits until all are dropped; a little longer than that, so that
    /// what is cut at the deadline can be told.
    ///
    /// # Errors
    /// [`Unfinished`] after that. The caller may call again with more time, or end regardless.
    pub async fn drain(&mut self, cause: Cause, grace: Duration) -> Result<(), Unfinished> {
        let deadline = Instant::now() + grace;
        // Not `send`, which refuses if nobody watches any more.
        self.sender.send_replace(Some(Order { deadline, cause }));
        tokio::time::timeout_at(deadline + LAST_WORDS, self.sender.closed())
            .await
            .map_err(|_| Unfinished(self.sender.receiver_count()))
    }
}

/// The end that is told to finish; see the module.
#[derive(Clone, Debug)]
pub struct Watch {
    receiver: watch::Receiver<Option<Order>>,
}

impl Watch {
    /// Waits until it is time to finish, and returns the moment at which patience ends. At once if it has come
    /// already. Cancel safe.
    ///
    /// If the [`Signal`] was dropped, nobody will wait: that is time to finish with no patience at all.
    pub async fn started(&mut self) -> Instant {
        self.order().await.deadline
    }

    /// As [`Watch::started`], with the cause.
    pub async fn order(&mut self) -> Order {
        let at_once = || Order { deadline: Instant::now(), cause: Cause::End };
        match self.receiver.wait_for(Option::is_some).await {
            Ok(order) => order.unwrap_or_else(at_once),
            Err(_) => at_once(),
        }
    }

    /// Whether it is time to finish.
    pub fn is_draining(&self) -> bool {
        self.receiver.borrow().is_some() || self.receiver.has_changed().is_err()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn runtime() -> tokio::runtime::Runtime {
        tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime")
    }

    const STEP: Duration = Duration::from_millis(20);

    /// [H.4]
    #[test]
    fn draining_waits_for_every_holder() {
        runtime().block_on(async {
            let (mut signal, watch) = channel();
            let mut tasks = tokio::task::JoinSet::new();
            for n in 1..=3 {
                let mut watch = watch.clone();
                tasks.spawn(async move {
                    watch.started().await;
                    tokio::time::sleep(STEP * n).await;
                    drop(watch);
                });
            }
            assert!(!watch.is_draining());
            drop(watch);
            let start = Instant::now();
            assert_eq!(signal.drain(Cause::End, Duration::from_secs(60)).await, Ok(()));
            assert!(start.elapsed() >= STEP * 3, "{:?}", start.elapsed());
            tasks.join_all().await;
        });
    }

    /// [H.4]
    #[test]
    fn the_deadline_ends_the_waiting_and_counts_who_is_left() {
        runtime().block_on(async {
            let (mut signal, mut watch) = channel();
            let other = watch.clone();
            let start = Instant::now();
            assert_eq!(signal.drain(Cause::End, STEP).await, Err(Unfinished(2)));
            assert!(start.elapsed() >= STEP, "{:?}", start.elapsed());
            assert!(watch.is_draining());
            let order = watch.order().await;
            assert_eq!((order.cause, order.deadline), (Cause::End, watch.started().await));
            assert!(order.deadline >= start + STEP && order.deadline <= Instant::now());
            drop((watch, other));
            assert_eq!(signal.drain(Cause::End, Duration::ZERO).await, Ok(()));
        });
    }

    #[test]
    fn a_lost_signal_is_a_reason_to_finish() {
        runtime().block_on(async {
            let (signal, mut watch) = channel();
            drop(signal);
            assert!(watch.is_draining());
            watch.started().await;
        });
    }

    #[test]
    fn draining_with_nobody_left_is_over_at_once() {
        runtime().block_on(async {
            let (mut signal, watch) = channel();
            drop(watch);
            assert_eq!(signal.drain(Cause::End, Duration::from_secs(5)).await, Ok(()));
        });
    }
}
