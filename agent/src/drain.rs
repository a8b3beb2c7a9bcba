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

/// The end that starts the draining.
#[derive(Debug)]
pub struct Signal {
    sender: watch::Sender<Option<Instant>>,
}

/// The deadline passed with this many [`Watch`]es still held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unfinished(pub usize);

impl Signal {
    /// Tells every [`Watch`] to finish, and waits until all are dropped, for at most `grace`.
    ///
    /// # Errors
    /// [`Unfinished`] at the deadline. The caller may call again with more time, or end regardless.
    pub async fn drain(&mut self, grace: Duration) -> Result<(), Unfinished> {
        let deadline = Instant::now() + grace;
        // Not `send`, which refuses if nobody watches any more.
        self.sender.send_replace(Some(deadline));
        tokio::time::timeout_at(deadline, self.sender.closed())
            .await
            .map_err(|_| Unfinished(self.sender.receiver_count()))
    }
}

/// The end that is told to finish; see the module.
#[derive(Clone, Debug)]
pub struct Watch {
    receiver: watch::Receiver<Option<Instant>>,
}

impl Watch {
    /// Waits until it is time to finish, and returns the moment at which patience ends. At once if it has come
    /// already. Cancel safe.
    ///
    /// If the [`Signal`] was dropped, nobody will wait: that is time to finish with no patience at all.
    pub async fn started(&mut self) -> Instant {
        match self.receiver.wait_for(Option::is_some).await {
            Ok(deadline) => deadline.unwrap_or_else(Instant::now),
            Err(_) => Instant::now(),
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
            assert_eq!(signal.drain(Duration::from_secs(60)).await, Ok(()));
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
            assert_eq!(signal.drain(STEP).await, Err(Unfinished(2)));
            assert!(start.elapsed() >= STEP, "{:?}", start.elapsed());
            assert!(watch.is_draining());
            let deadline = watch.started().await;
            assert!(deadline >= start + STEP && deadline <= Instant::now());
            drop((watch, other));
            assert_eq!(signal.drain(Duration::ZERO).await, Ok(()));
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
            assert_eq!(signal.drain(Duration::from_secs(5)).await, Ok(()));
        });
    }
}
