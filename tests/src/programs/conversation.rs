//! What a client tells of one conversation that it held open.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

/// One conversation: numbered messages, each answered before the next.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Conversation {
    /// Messages that were answered rightly.
    pub messages: u64,
    /// From the first step to the last, milliseconds.
    pub millis: u64,
    /// The longest time that an answer took, milliseconds.
    pub slowest_ms: u64,
    /// Why it ended before its time.
    pub error: Option<String>,
}

impl Conversation {
    /// Notes an answer to what was sent at `sent`.
    pub fn answered(&mut self, sent: Instant) {
        self.messages += 1;
        self.slowest_ms = self.slowest_ms.max(millis(sent.elapsed()));
    }

    /// The end of a conversation that began at `begun`.
    #[must_use]
    pub fn finish(mut self, begun: Instant, result: anyhow::Result<()>) -> Self {
        self.millis = millis(begun.elapsed());
        self.error = result.err().map(|error| format!("{error:#}"));
        self
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
