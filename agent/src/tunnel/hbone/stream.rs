//! What a connection knows of one of its streams: what has ended, what waits to be read, and the windows.

use std::{
    collections::VecDeque,
    sync::Arc,
    task::{Context, Waker},
};

use bytes::{Bytes, BytesMut};

use super::head::Head;
use crate::tunnel::{Charge, StreamError};

/// Most that one stream may be sent before its reader takes it, in bytes (§14.3).
pub(super) const MAX_STREAM_WINDOW: u32 = 4 << 20;
/// Where a stream's window starts. It doubles while the reader keeps up, so that only those who read hold much.
pub(super) const FIRST_STREAM_WINDOW: u32 = 256 << 10;
/// Bytes of a stream that wait before its further ones are copied: slices would keep whole reads in memory.
const MAX_SLICED: usize = 512 << 10;
/// Pieces smaller than this are copied together, for the same reason.
const SMALL: usize = 8 << 10;

/// What a connection knows of one stream.
pub(super) struct Entry {
    pub(super) read: Side,
    pub(super) write: Side,
    /// Received and not read.
    pub(super) queue: VecDeque<Bytes>,
    pub(super) tail: BytesMut,
    pub(super) queued: usize,
    /// Given to the reader, who has not passed it on.
    pub(super) held: usize,
    /// Since the peer was last given window, the reader has once had all that there was, and passed it on.
    pub(super) caught_up: bool,
    /// What the peer may still send, what the reader has passed on since we last told it, and what it may send at most.
    pub(super) recv_window: i64,
    pub(super) unreleased: u32,
    pub(super) max_window: u32,
    pub(super) send_window: i64,
    /// Client: the answer, and whether it has come.
    pub(super) answer: Option<Head>,
    pub(super) answered: bool,
    /// The peer did nothing with the request.
    pub(super) not_processed: bool,
    /// Handles to the stream that are still there.
    pub(super) handles: u8,
    pub(super) reader: Option<Waker>,
    pub(super) writer: Option<Waker>,
    pub(super) watcher: Option<Waker>,
    /// Whom what is queued counts for.
    pub(super) charge: Option<Arc<Charge>>,
}

/// One direction of a stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Side {
    Open,
    Ended,
    Cut(StreamError),
}

impl Entry {
    pub(super) fn new(send_window: i64, handles: u8) -> Self {
        Self {
            read: Side::Open,
            write: Side::Open,
            queue: VecDeque::new(),
            tail: BytesMut::new(),
            queued: 0,
            held: 0,
            caught_up: false,
            recv_window: FIRST_STREAM_WINDOW.into(),
            unreleased: 0,
            max_window: FIRST_STREAM_WINDOW,
            send_window,
            answer: None,
            answered: false,
            not_processed: false,
            handles,
            reader: None,
            writer: None,
            watcher: None,
            charge: None,
        }
    }

    pub(super) fn open(&self) -> bool {
        self.read == Side::Open || self.write == Side::Open
    }

    pub(super) fn wake(&mut self) {
        for waker in [&mut self.reader, &mut self.writer, &mut self.watcher] {
            if let Some(waker) = waker.take() {
                waker.wake();
            }
        }
    }

    /// Cuts what is still open. What has ended has ended: a peer that says all it has and then resets (because it does
    /// not want the rest of ours) has not truncated anything.
    pub(super) fn cut(&mut self, error: &StreamError) {
        if self.read == Side::Open {
            self.read = Side::Cut(error.clone());
            self.queue.clear();
            self.tail = BytesMut::new();
            self.queued = 0;
            self.account();
        }
        if self.write == Side::Open {
            self.write = Side::Cut(error.clone());
        }
        self.wake();
    }

    /// Tells the owner's account what is queued, and what the reader holds; true if that is too much.
    pub(super) fn account(&self) -> bool {
        self.charge.as_ref().is_some_and(|charge| charge.set(self.queued + self.held))
    }

    /// True if the stream must be cut off, since its owner holds too much.
    pub(super) fn push(&mut self, bytes: Bytes) -> bool {
        if bytes.is_empty() {
            return false;
        }
        self.queued += bytes.len();
        if bytes.len() < SMALL || self.queued > MAX_SLICED {
            self.tail.extend_from_slice(&bytes);
        } else {
            if !self.tail.is_empty() {
                self.queue.push_back(self.tail.split().freeze());
            }
            self.queue.push_back(bytes);
        }
        if let Some(reader) = self.reader.take() {
            reader.wake();
        }
        self.account()
    }

    /// The next bytes, which count as held until [`passed_on`](Self::passed_on).
    pub(super) fn pop(&mut self) -> Option<Bytes> {
        let bytes = match self.queue.pop_front() {
            Some(bytes) => bytes,
            None if self.tail.is_empty() => return None,
            None => std::mem::take(&mut self.tail).freeze(),
        };
        self.queued -= bytes.len();
        self.held += bytes.len();
        Some(bytes)
    }

    /// The reader has `n` bytes less of what it was given.
    pub(super) fn passed_on(&mut self, n: usize) {
        self.held -= n;
        self.caught_up |= self.queued + self.held == 0;
        self.account();
    }
}

/// Remembers who waits.
pub(super) fn register(place: &mut Option<Waker>, cx: &Context<'_>) {
    match place {
        Some(waker) if waker.will_wake(cx.waker()) => {}
        _ => *place = Some(cx.waker().clone()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tunnel::Account;

    /// A megabyte in frames of one byte must not cost a megabyte of frames.
    #[test]
    fn small_pieces_are_kept_together() {
        let mut entry = Entry::new(0, 2);
        let block = Bytes::from(vec![7; 128 << 10]);
        for at in 0..100_000 {
            entry.push(block.slice(at..at + 1));
        }
        assert!(entry.queue.is_empty());
        assert!(block.is_unique(), "nothing holds on to the block that was read");
        assert_eq!(entry.pop().map(|bytes| bytes.len()), Some(100_000));
        assert_eq!((entry.queued, entry.pop()), (0, None));
    }

    #[test]
    fn what_the_reader_holds_counts_until_it_is_passed_on() {
        let account = Arc::new(Account::new(Arc::new((1 << 20).into())));
        let mut entry = Entry::new(0, 2);
        entry.charge = Some(Arc::new(Charge::new(account.clone())));
        entry.push(vec![7; 100_000].into());
        assert!(entry.pop().is_some_and(|bytes| bytes.len() == 100_000));
        assert_eq!(account.used(), 100_000, "taken, and still held");
        entry.passed_on(60_000);
        assert_eq!((account.used(), entry.caught_up), (40_000, false));
        entry.passed_on(40_000);
        assert_eq!((account.used(), entry.caught_up), (0, true));
        entry.push(vec![7; 10].into());
        assert!(entry.pop().is_some() && !entry.push(vec![7; 100].into()));
        entry.cut(&StreamError::Reset(8));
        assert_eq!(account.used(), 10, "what was queued is dropped, what the reader holds is not");
    }

    #[test]
    fn order_is_kept_between_small_and_large_pieces() {
        let mut entry = Entry::new(0, 2);
        let bytes = Bytes::from((0..=255u8).cycle().take(3 << 20).collect::<Vec<_>>());
        let (mut at, mut size) = (0, 1);
        while at < bytes.len() {
            let end = (at + size).min(bytes.len());
            entry.push(bytes.slice(at..end));
            at = end;
            size = size * 7 % 30_011 + 1;
        }
        let mut got = Vec::new();
        while let Some(piece) = entry.pop() {
            got.extend_from_slice(&piece);
        }
        assert!(got == bytes);
    }
}
