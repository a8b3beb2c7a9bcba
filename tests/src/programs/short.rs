//! Many short connections: each opens, exchanges one line with an exchange server, and closes.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::exchange::{self, Verb};

/// What came of many short connections.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShortResult {
    /// Connections that did their exchange.
    pub ok: u64,
    /// How many failed, by the error's text.
    pub errors: BTreeMap<String, u64>,
    /// Duration of all, milliseconds.
    pub millis: u64,
}

pub(super) fn run(to: SocketAddr, count: u64, parallel: u32, limit: Duration) -> ShortResult {
    let start = Instant::now();
    let (begun, ok) = (AtomicU64::new(0), AtomicU64::new(0));
    let errors = Mutex::new(BTreeMap::new());
    thread::scope(|scope| {
        for _ in 0..parallel {
            scope.spawn(|| {
                while begun.fetch_add(1, Ordering::Relaxed) < count {
                    match exchange::call(to, Verb::Echo, 0, limit).error {
                        None => {
                            ok.fetch_add(1, Ordering::Relaxed);
                        }
                        Some(error) => {
                            let mut errors = errors.lock().expect("no thread panics while it counts");
                            *errors.entry(error).or_insert(0) += 1;
                        }
                    }
                }
            });
        }
    });
    ShortResult {
        ok: ok.into_inner(),
        errors: errors.into_inner().expect("no thread panics while it counts"),
        millis: u64::try_from(start.elapsed().as_millis()).unwrap_or(u64::MAX),
    }
}
