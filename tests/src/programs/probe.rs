//! A kubelet's probes: an HTTP GET to each pod from the node, each result a line of JSON in a file.

use std::fs::OpenOptions;
use std::io::Write;
use std::net::SocketAddr;
use std::path::Path;
use std::str::FromStr;
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::http;

/// One pod to probe: `namespace/name=address:port`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Probe {
    /// `namespace/name`.
    pub pod: String,
    /// Where its probe is answered.
    pub to: SocketAddr,
}

impl FromStr for Probe {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (pod, to) = text.split_once('=').ok_or("expected pod=address:port")?;
        let to = to.parse().map_err(|e| format!("{to}: {e}"))?;
        Ok(Self { pod: pod.to_owned(), to })
    }
}

impl std::fmt::Display for Probe {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}={}", self.pod, self.to)
    }
}

/// One result of a probe.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProbeResult {
    /// `namespace/name`.
    pub pod: String,
    /// Milliseconds since 1970 at the probe's end.
    pub at_ms: u64,
    /// Whether the answer was an HTTP status from 200 to 399, as a kubelet counts it.
    pub ok: bool,
    /// The status, or how it failed.
    pub said: String,
    /// The source address that the pod saw.
    pub source_seen: Option<SocketAddr>,
}

pub(super) fn run(probes: &[Probe], period: Duration, out: &Path) -> Result<()> {
    let mut file = OpenOptions::new()
        .create(true)
        .append(true)
        .open(out)
        .with_context(|| format!("open {} for the probes' results", out.display()))?;
    loop {
        for probe in probes {
            let result = http::get(probe.to, "/healthz", "probe", Duration::from_secs(1));
            let line = ProbeResult {
                pod: probe.pod.clone(),
                at_ms: SystemTime::now()
                    .duration_since(UNIX_EPOCH)
                    .ok()
                    .and_then(|d| u64::try_from(d.as_millis()).ok())
                    .unwrap_or(0),
                ok: result.status.is_some_and(|s| (200..400).contains(&s)),
                said: result.brief(),
                source_seen: result.seen.map(|s| s.peer),
            };
            file.write_all(format!("{}\n", serde_json::to_string(&line)?).as_bytes())
                .context("write a probe's result")?;
        }
        thread::sleep(period);
    }
}
