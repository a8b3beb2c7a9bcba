//! Panics: told in one line with their place, and counted.
//!
//! A panic ends the task in which it happens; what else it ends is the business of the task's owner.

use std::{
    any::Any,
    panic::{self, AssertUnwindSafe, PanicHookInfo},
    sync::{
        Mutex, Once,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::Instant,
};

use tokio::task::JoinError;
use tracing::{debug, error};

use super::limit::{Limit, Limiter};

/// Lines per second: whoever finds a way to make a task panic shall not fill the log too.
const LINES_PER_SECOND: u32 = 10;

static COUNT: AtomicU64 = AtomicU64::new(0);

/// Panics of this process since its start.
pub fn count() -> u64 {
    COUNT.load(Ordering::Relaxed)
}

/// Takes the place of the standard library's hook, whose lines no reader of the log expects. Safe to repeat.
pub fn install() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = panic::take_hook();
        let limiter = Mutex::new(Limit::fixed(LINES_PER_SECOND).limiter());
        panic::set_hook(Box::new(move |info| {
            told(info, &limiter);
            if cfg!(test) {
                // Who reads the output of a test wants its message.
                before(info);
            }
        }));
    });
}

/// Takes the end of a task, for its owner. A panic ends nothing else, and the hook has told and counted it; its message
/// may have been made with values, and is not told again.
pub fn ended(task: &'static str, ended: Result<(), JoinError>) {
    if let Err(error) = ended
        && error.is_panic()
    {
        debug!(task, "a task that panicked has ended; the others go on");
    }
}

/// Does what is to be done about one of many, on a thread that all depend on: a panic costs this one. What `one` has
/// changed before it panicked stays.
pub fn caught(one: impl FnOnce()) {
    // The hook has told and counted it.
    let _ = panic::catch_unwind(AssertUnwindSafe(one));
}

fn told(info: &PanicHookInfo<'_>, limiter: &Mutex<Limiter>) {
    let panics = COUNT.fetch_add(1, Ordering::Relaxed) + 1;
    // Where it cannot be had, this panic is one of the log.
    if let Ok(mut limiter) = limiter.try_lock() {
        let now = Instant::now();
        limiter.tell(now);
        if !limiter.admits(None, "panic", now) {
            return;
        }
    }
    let place = info.location().map_or_else(|| "unknown".to_owned(), ToString::to_string);
    let current = thread::current();
    error!(place, thread = current.name().unwrap_or("unnamed"), message = message(info.payload()), panics, "panic");
}

/// Only what is written in the source: a message that was made with values may show what belongs to a connection.
fn message(payload: &(dyn Any + Send)) -> &'static str {
    match payload.downcast_ref::<&'static str>() {
        Some(text) => text,
        None => "(made with values, not shown)",
    }
}

#[cfg(test)]
#[expect(clippy::disallowed_methods, reason = "a test awaits what it has started, or ends with it")]
mod tests {
    use super::*;

    #[test]
    fn panics_are_counted_and_what_values_made_is_not_shown() {
        install();
        let before = count();
        let secret = String::from("a key");
        let payload = thread::spawn(move || panic!("it is {secret}")).join().expect_err("it panicked");
        assert!(count() > before);
        assert_eq!(message(&*payload), "(made with values, not shown)");
        let payload = thread::spawn(|| panic!("only words")).join().expect_err("it panicked");
        assert_eq!(message(&*payload), "only words");
    }

    /// A thread that does one thing after another does the others, whichever panics.
    #[test]
    fn a_panic_about_one_of_many_costs_that_one() {
        install();
        let before = count();
        let mut done = Vec::new();
        for one in 0..5 {
            caught(|| {
                assert!(one % 2 == 0, "an odd one");
                done.push(one);
            });
        }
        assert_eq!(done, [0, 2, 4]);
        // Other tests of this process may panic at the same time.
        assert!(count() >= before + 2, "{} and {before}", count());
    }
}
