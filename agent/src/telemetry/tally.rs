//! What a worker counts beside its connections: handshakes and tunnels. One per worker, so that no two threads write the
//! same; a scrape adds them up.

use std::sync::{
    Arc, Mutex, PoisonError,
    atomic::{AtomicI64, AtomicU64, Ordering::Relaxed},
};

/// Which end of TLS we were.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Side {
    /// We opened the tunnel.
    Client,
    /// A tunnel came to one of our pods.
    Server,
}

/// How a handshake ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Handshake {
    /// The tunnel stands.
    Done,
    /// A certificate was refused, by us or by the peer, or the peer does not speak TLS.
    Tls,
    /// It took too long.
    Timeout,
    /// The peer does not speak HTTP/2 as it should.
    Http2,
    /// The TCP connection was lost.
    Lost,
}

impl Side {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Client, Self::Server];

    /// The value of the label `side`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Client => "client",
            Self::Server => "server",
        }
    }
}

impl Handshake {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Done, Self::Tls, Self::Timeout, Self::Http2, Self::Lost];

    /// The value of the label `result`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Done => "ok",
            Self::Tls => "tls-failure",
            Self::Timeout => "timeout",
            Self::Http2 => "h2-handshake-failure",
            Self::Lost => "lost",
        }
    }
}

/// One worker's counters.
#[derive(Debug, Default)]
pub struct Tally {
    handshakes: [[AtomicU64; Handshake::ALL.len()]; Side::ALL.len()],
    tunnels: [AtomicI64; Side::ALL.len()],
    mismatches: AtomicU64,
}

/// A tunnel connection that stands, until dropped.
#[derive(Debug)]
pub struct Standing {
    tally: Arc<Tally>,
    side: Side,
}

impl Tally {
    /// Counts the end of a handshake.
    pub fn handshake(&self, side: Side, result: Handshake) {
        self.handshakes[side as usize][result as usize].fetch_add(1, Relaxed);
    }

    /// Counts a tunnel connection for as long as it stands.
    pub fn stands(self: &Arc<Self>, side: Side) -> Standing {
        self.tunnels[side as usize].fetch_add(1, Relaxed);
        Standing { tally: self.clone(), side }
    }

    /// Counts a tunnel from the address of a pod with another identity ([I.11]).
    pub fn mismatch(&self) {
        self.mismatches.fetch_add(1, Relaxed);
    }
}

impl Drop for Standing {
    fn drop(&mut self) {
        self.tally.tunnels[self.side as usize].fetch_sub(1, Relaxed);
    }
}

/// The tallies of all workers. Clones are the same.
#[derive(Clone, Debug, Default)]
pub struct Tallies {
    all: Arc<Mutex<Vec<Arc<Tally>>>>,
}

/// The sums of all tallies.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sums {
    /// By [`Side::ALL`] and [`Handshake::ALL`].
    pub handshakes: [[u64; Handshake::ALL.len()]; Side::ALL.len()],
    /// Tunnel connections that stand, by [`Side::ALL`].
    pub tunnels: [u64; Side::ALL.len()],
    /// Tunnels from the address of a pod with another identity.
    pub mismatches: u64,
}

impl Tallies {
    /// A tally for a worker.
    pub fn tally(&self) -> Arc<Tally> {
        let tally = Arc::<Tally>::default();
        self.all.lock().unwrap_or_else(PoisonError::into_inner).push(tally.clone());
        tally
    }

    /// Adds them up.
    pub fn sums(&self) -> Sums {
        let mut sums = Sums::default();
        for tally in self.all.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            for side in Side::ALL {
                for result in Handshake::ALL {
                    sums.handshakes[side as usize][result as usize] +=
                        tally.handshakes[side as usize][result as usize].load(Relaxed);
                }
                sums.tunnels[side as usize] += u64::try_from(tally.tunnels[side as usize].load(Relaxed)).unwrap_or(0);
            }
            sums.mismatches += tally.mismatches.load(Relaxed);
        }
        sums
    }
}
