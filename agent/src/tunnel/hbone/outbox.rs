//! Sealed records that wait for the socket, and the shape of those that carry a stream's bytes.

use std::cell::RefCell;

use super::{frame, tls};

/// Most records filled at once, by one call to the kernel.
pub(super) const RECORDS: usize = 8;
/// Most bytes of a stream in one record, so that frame and record fill each other exactly.
pub(super) const PAYLOAD: usize = tls::MAX_CONTENT - frame::HEADER;
/// What comes before them in a record.
pub(super) const LEAD: usize = tls::HEADER + frame::HEADER;
pub(super) const FULL_RECORD: usize = LEAD + PAYLOAD + tls::TRAILER;
/// Most bytes that streams may put before the socket takes them.
pub(super) const OUTBOX: usize = 2 * RECORDS * FULL_RECORD;

/// Sealed records on their way to the socket.
#[derive(Default)]
pub(super) struct Outbox {
    pub(super) buffer: Vec<u8>,
    pub(super) start: usize,
    pub(super) end: usize,
}

thread_local! {
    /// Buffers of outboxes that are empty: idle connections hold none.
    static SPARE: RefCell<Vec<Vec<u8>>> = const { RefCell::new(Vec::new()) };
}
/// Buffers that a thread keeps for its next busy connections.
const MAX_SPARE: usize = 16;

impl Outbox {
    pub(super) fn len(&self) -> usize {
        self.end - self.start
    }

    /// Makes room for `more` bytes behind what is there, and gives it.
    pub(super) fn space(&mut self, more: usize) -> &mut [u8] {
        if self.buffer.is_empty() {
            self.buffer = SPARE.with_borrow_mut(Vec::pop).unwrap_or_else(|| vec![0; OUTBOX + FULL_RECORD]);
        }
        if self.buffer.len() - self.end < more {
            self.buffer.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
            if self.buffer.len() - self.end < more {
                self.buffer.resize(self.end + more, 0);
            }
        }
        &mut self.buffer[self.end..]
    }

    pub(super) fn consume(&mut self, n: usize) {
        self.start += n;
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
            let buffer = std::mem::take(&mut self.buffer);
            if buffer.len() == OUTBOX + FULL_RECORD {
                SPARE.with_borrow_mut(|spare| {
                    if spare.len() < MAX_SPARE {
                        spare.push(buffer);
                    }
                });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Idle connections hold no buffer: it goes to the next busy one, and few are kept.
    #[test]
    fn an_empty_outbox_gives_its_buffer_to_the_next() {
        let busy = || {
            let mut outbox = Outbox::default();
            let at = outbox.space(FULL_RECORD).as_ptr();
            outbox.end = FULL_RECORD;
            (outbox, at)
        };
        let (mut first, at) = busy();
        first.consume(FULL_RECORD - 1);
        assert!(!first.buffer.is_empty(), "there is something left to send");
        first.consume(1);
        assert_eq!(first.buffer.capacity(), 0);
        assert_eq!(busy().1, at);
        let many: Vec<Outbox> = (0..MAX_SPARE + 4).map(|_| busy().0).collect();
        for mut outbox in many {
            outbox.consume(FULL_RECORD);
        }
        assert_eq!(SPARE.with_borrow(Vec::len), MAX_SPARE);
    }
}
