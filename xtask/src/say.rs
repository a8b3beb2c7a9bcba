//! What xtask tells the user while it works: one line when a step begins, one when it has ended.

use std::time::Instant;

/// A step that takes time; dropping it unfinished says nothing, since the error that follows does.
pub(crate) struct Step(Instant);

/// Says what begins, and why.
pub(crate) fn step(what: &str) -> Step {
    eprintln!("• {what}");
    Step(Instant::now())
}

impl Step {
    /// Says that the step has ended, if it took long enough to be noticed.
    pub(crate) fn done(self) {
        let seconds = self.0.elapsed().as_secs_f64();
        if seconds > 1.0 {
            eprintln!("  done in {seconds:.0} s");
        }
    }
}

/// Says something good.
pub(crate) fn done(what: &str) {
    eprintln!("✓ {what}");
}

/// Says something that the user should know although nothing failed.
pub(crate) fn warn(what: &str) {
    eprintln!("! {what}");
}
