//! Panics: told in one line with their place, and counted.
//!
//! A panic ends the task in which it happens; what else it ends is the business of the task's owner.

use std::{
    any::Any,
    panic::{self, PanicHookInfo},
    sync::{
        Once,
        atomic::{AtomicU64, Ordering},
    },
    thread,
};

use tracing::error;

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
        panic::set_hook(Box::new(move |info| {
            told(info);
            if cfg!(test) {
                // Who reads the output of a test wants its message.
                before(info);
            }
        }));
    });
}

fn told(info: &PanicHookInfo<'_>) {
    COUNT.fetch_add(1, Ordering::Relaxed);
    let place = info.location().map_or_else(|| "unknown".to_owned(), ToString::to_string);
    let current = thread::current();
    error!(place, thread = current.name().unwrap_or("unnamed"), message = message(info.payload()), "panic");
}

/// Only what is written in the source: a message that was made with values may show what belongs to a connection.
fn message(payload: &(dyn Any + Send)) -> &'static str {
    match payload.downcast_ref::<&'static str>() {
        Some(text) => text,
        None => "(made with values, not shown)",
    }
}

#[cfg(test)]
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
}
