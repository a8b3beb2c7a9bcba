//! What was measured, put together: medians, spread, ratios to plain; as a table and as JSON.

use std::collections::BTreeMap;
use std::fmt::Write;

use serde_json::{Value, json};

use super::measures::{BESIDE, CHANGED, WORKLOADS};
use super::{Peer, Sample};

/// Which way is good.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Better {
    More,
    Less,
    /// It explains another row.
    Neither,
}

/// What Culvert is to reach.
#[derive(Clone, Copy)]
enum Goal {
    None,
    /// Of plain's figure.
    Ratio(f64),
    /// By itself.
    Value(f64),
}

/// A line of the table.
pub(super) struct Row {
    pub(super) title: &'static str,
    measure: &'static str,
    figure: &'static str,
    /// Digits after the point.
    digits: usize,
    /// What the figure is multiplied with.
    scale: f64,
    pub(super) better: Better,
    goal: Goal,
}

const fn row(title: &'static str, measure: &'static str, figure: &'static str, digits: usize, better: Better) -> Row {
    Row { title, measure, figure, digits, scale: 1.0, better, goal: Goal::None }
}

impl Row {
    const fn ratio(self, goal: f64) -> Self {
        Self { goal: Goal::Ratio(goal), ..self }
    }

    const fn value(self, goal: f64) -> Self {
        Self { goal: Goal::Value(goal), ..self }
    }

    const fn millis(self) -> Self {
        Self { scale: 1e-3, ..self }
    }
}

use Better::{Less, More, Neither};

/// The goals are what the best node proxy of 2026 reaches in this kind of run.
const ROWS: &[Row] = &[
    row("bulk, 1 stream, Gbit/s", "bulk-1", "gbit_s", 2, More).ratio(0.37),
    row("bulk, 1 stream back, Gbit/s", "bulk-1-back", "gbit_s", 2, More).ratio(0.37),
    row("bulk, 8 streams, Gbit/s", "bulk-8", "gbit_s", 2, More).ratio(0.23),
    row("bulk, 8 streams back, Gbit/s", "bulk-8-back", "gbit_s", 2, More).ratio(0.23),
    row("proxy CPU s per GB, 1 stream", "bulk-1", "cpu_s_per_gb", 2, Less),
    row("proxy CPU s per GB, 1 stream back", "bulk-1-back", "cpu_s_per_gb", 2, Less),
    row("proxy CPU s per GB, 8 streams", "bulk-8", "cpu_s_per_gb", 2, Less),
    row("– of it in user space, %", "bulk-8", "user_percent", 0, Neither),
    row("proxy CPU s per GB, 8 streams back", "bulk-8-back", "cpu_s_per_gb", 2, Less),
    row("requests/s, 1 connection", "requests-1", "per_s", 0, More),
    row("requests/s, 16 connections", "requests-16", "per_s", 0, More).ratio(0.24),
    row("requests/s, 64 connections, answers of 16 KiB", "requests-64", "per_s", 0, More),
    row("proxy CPU ms per 1,000 requests, 1 connection", "requests-1", "cpu_ms_per_1000", 1, Less),
    row("proxy CPU ms per 1,000 requests, 16 connections", "requests-16", "cpu_ms_per_1000", 1, Less),
    row("– of it in user space, %", "requests-16", "user_percent", 0, Neither),
    row("proxy CPU ms per 1,000 requests, 64 connections", "requests-64", "cpu_ms_per_1000", 1, Less),
    row("proxy CPU ms per 1,000 requests, 4,000/s", "paced-4000", "cpu_ms_per_1000", 1, Less),
    row("1 connection, p50 µs", "requests-1", "p50_us", 0, Less).ratio(1.75),
    row("1 connection, p99 µs", "requests-1", "p99_us", 0, Less),
    row("1 connection, p99.9 µs", "requests-1", "p999_us", 0, Less),
    row("1,000 requests/s, p50 µs", "paced-1000", "p50_us", 0, Less),
    row("1,000 requests/s, p99 µs", "paced-1000", "p99_us", 0, Less),
    row("1,000 requests/s, p99.9 µs", "paced-1000", "p999_us", 0, Less),
    row("4,000 requests/s, p50 µs", "paced-4000", "p50_us", 0, Less),
    row("4,000 requests/s, p99 µs", "paced-4000", "p99_us", 0, Less).ratio(6.0),
    row("4,000 requests/s, p99.9 µs", "paced-4000", "p999_us", 0, Less),
    row("new connections/s, 16 at once", "connects-16", "per_s", 0, More).ratio(0.25),
    row("proxy CPU ms per 1,000 connections", "connects-16", "cpu_ms_per_1000", 0, Less),
    row("connection and request, 1 at a time, p50 µs", "connects-1", "p50_us", 0, Less),
    row("connection and request, 1 at a time, p99 µs", "connects-1", "p99_us", 0, Less),
    row("512 connections at once, connections/s", "burst-512", "per_s", 0, More),
    row("512 connections at once, p50 ms", "burst-512", "p50_us", 1, Less).millis(),
    row("512 connections at once, p99 ms", "burst-512", "p99_us", 1, Less).millis(),
    row("512 connections at once, p99.9 ms", "burst-512", "p999_us", 1, Less).millis().ratio(39.0),
    row("connections with an answer of 96 KiB, per s", "answers-96k", "per_s", 0, More).ratio(0.12),
    row("– proxy CPU ms per 1,000 of them", "answers-96k", "cpu_ms_per_1000", 0, Less),
    row("first contact with a pod, p50 µs", "first-contact", "p50_us", 0, Less).ratio(18.0),
    row("first contact with a pod, p99 µs", "first-contact", "p99_us", 0, Less),
    row("– proxy CPU ms per 1,000 of them", "first-contact", "cpu_ms_per_1000", 0, Less),
    row("same node: bulk, 1 stream, Gbit/s", "near-bulk-1", "gbit_s", 2, More),
    row("same node: requests/s, 16 connections", "near-requests-16", "per_s", 0, More),
    row("same node: 1 connection, p50 µs", "near-requests-1", "p50_us", 0, Less),
    row("same node: new connections/s, 16 at once", "near-connects-16", "per_s", 0, More),
    row("500 requests/s beside a stream of 1 Gbit/s, p50 µs", "beside-bulk", "p50_us", 0, Less),
    row("500 requests/s beside a stream of 1 Gbit/s, p99 µs", "beside-bulk", "p99_us", 0, Less),
    row("400 connections beside 6 stalled readers, done", "stalled", "done", 0, More).value(BESIDE as f64),
    row("– memory of all proxies meanwhile, MiB", "stalled", "memory_mib", 0, Less),
    row("memory at rest, per node, MiB", "memory", "idle_mib", 1, Less).value(16.0),
    row("memory per open connection and node, KiB", "memory", "per_connection_kib", 1, Less).value(6.2),
    row("memory per workload elsewhere, KiB", "workloads", "per_workload_kib", 2, Less).value(1.7),
    row("ready with 50,000 workloads elsewhere, s", "workloads", "ready_s", 2, Less),
    row("– without them, s", "workloads", "ready_s_without", 2, Less),
    row("change of a policy among 2,000, with 10,000 pods, until enforced, p50 ms", "changes", "p50_us", 1, Less)
        .millis(),
    row("– p99 ms", "changes", "p99_us", 1, Less).millis().value(50.0),
    row("– CPU of a node's agent for each, ms", "changes", "cpu_ms", 1, Less),
    row("change of a DENY of an address among them, until enforced, p50 ms", "changes", "deny_p50_us", 1, Less)
        .millis(),
    row("– p99 ms", "changes", "deny_p99_us", 1, Less).millis().value(50.0),
    row("– CPU of a node's agent for each, ms", "changes", "deny_cpu_ms", 1, Less),
];

// The titles say them.
const _: () = assert!(WORKLOADS == 50_000 && BESIDE == 400 && CHANGED.0 == 10_000 && CHANGED.1 == 2_000);

/// Where and when it was measured.
pub(super) struct Machine {
    pub(super) date: String,
    pub(super) kernel: String,
    pub(super) cores: usize,
    pub(super) processor: String,
    pub(super) minutes: f64,
    pub(super) versions: BTreeMap<Peer, String>,
}

/// What one peer reached in one row.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Cell {
    pub(super) median: f64,
    /// Half the range, percent of the median.
    spread: f64,
    /// To plain's median; of rows that plain has too, and not as 0.
    pub(super) ratio: Option<f64>,
    values: Vec<f64>,
    /// Connections that failed while it was measured, all rounds together.
    failed: f64,
}

pub(super) struct Report {
    pub(super) peers: Vec<Peer>,
    rounds: u16,
    /// Names of what was to be measured.
    measures: Vec<&'static str>,
    /// Every figure of every round.
    samples: Vec<Value>,
    machine: Machine,
    /// Rows that anybody has.
    pub(super) rows: Vec<(&'static Row, BTreeMap<Peer, Cell>)>,
}

impl Report {
    /// Of the samples of these measures.
    pub(super) fn of(
        samples: &[Sample],
        measures: Vec<&'static str>,
        peers: &[Peer],
        rounds: u16,
        machine: Machine,
    ) -> Self {
        let rows = ROWS.iter().filter_map(|row| {
            let cells = cells(row, samples, peers);
            (!cells.is_empty()).then_some((row, cells))
        });
        let raw = samples.iter().map(|sample| {
            json!({ "peer": sample.peer.to_string(), "round": sample.round, "measure": sample.measure,
                    "figures": sample.figures })
        });
        let (samples, rows) = (raw.collect(), rows.collect());
        Self { peers: peers.to_vec(), rounds, measures, samples, machine, rows }
    }

    /// For a terminal and for a page: the same lines.
    pub(super) fn table(&self) -> String {
        let mut out = String::from("| measure |");
        let mut rule = String::from("|---|");
        for peer in &self.peers {
            // A String takes every write.
            let _ = write!(out, " {peer} |");
            rule.push_str("---:|");
        }
        let _ = writeln!(out, " goal |\n{rule}---:|");
        for (row, cells) in &self.rows {
            let _ = write!(out, "| {} |", row.title);
            for peer in &self.peers {
                let _ = write!(out, " {} |", cells.get(peer).map_or_else(|| "–".to_owned(), |cell| cell.shown(row)));
            }
            let goal = match row.goal {
                Goal::None => String::new(),
                Goal::Ratio(goal) => format!("{goal}×"),
                Goal::Value(goal) => format!("{goal}"),
            };
            let _ = writeln!(out, " {goal} |");
        }
        out
    }

    /// The table with what one must know to read it.
    pub(super) fn markdown(&self) -> String {
        let m = &self.machine;
        let versions: Vec<String> = m.versions.iter().map(|(peer, version)| format!("{peer}: {version}")).collect();
        format!(
            "Measured {} UTC: {} rounds in turn, {:.0} minutes, {} cores ({}), Linux {}.\n{}.\n\n\
             The median of the rounds; ± is half their range, percent of the median; (×) is the ratio to plain; *failed* are\n\
             connections that failed meanwhile, all rounds together.\n\n{}",
            m.date,
            self.rounds,
            m.minutes,
            m.cores,
            m.processor,
            m.kernel,
            versions.join("; "),
            self.table()
        )
    }

    /// Rows in which Culvert has not reached its goal. One that was to be measured and has no figure has not reached it
    /// either; without plain there are no ratios.
    pub(super) fn below_goal(&self) -> Vec<String> {
        if !self.peers.contains(&Peer::Culvert) {
            return Vec::new();
        }
        let below = ROWS.iter().filter(|row| self.measures.contains(&row.measure)).filter_map(|row| {
            let cells = self
                .rows
                .iter()
                .find(|(of, _)| (of.measure, of.figure) == (row.measure, row.figure))
                .map(|(_, cells)| cells);
            let cell = cells.and_then(|cells| cells.get(&Peer::Culvert));
            let (got, goal) = match row.goal {
                Goal::None => return None,
                Goal::Ratio(_) if !self.peers.contains(&Peer::Plain) => return None,
                Goal::Ratio(goal) => (cell.and_then(|cell| cell.ratio), goal),
                Goal::Value(goal) => (cell.map(|cell| cell.median), goal),
            };
            let Some(got) = got else { return Some(format!("{}: no figure, and {goal} is wanted", row.title)) };
            let reached = if row.better == More { got >= goal } else { got <= goal };
            (!reached).then(|| format!("{}: {got:.2}, and {goal} is wanted", row.title))
        });
        below.collect()
    }

    pub(super) fn json(&self) -> Value {
        let m = &self.machine;
        let rows: Vec<Value> = self
            .rows
            .iter()
            .map(|(row, cells)| {
                let peers: BTreeMap<String, Value> = cells
                    .iter()
                    .map(|(peer, cell)| {
                        let value = json!({ "median": cell.median, "spread_percent": cell.spread,
                                            "ratio_to_plain": cell.ratio, "rounds": cell.values,
                                            "failed": cell.failed });
                        (peer.to_string(), value)
                    })
                    .collect();
                let better = match row.better {
                    More => "more",
                    Less => "less",
                    Neither => "neither",
                };
                json!({ "title": row.title, "measure": row.measure, "figure": row.figure, "better": better,
                        "peers": peers })
            })
            .collect();
        let versions: BTreeMap<String, &String> = m.versions.iter().map(|(peer, v)| (peer.to_string(), v)).collect();
        json!({ "date": m.date, "kernel": m.kernel, "cores": m.cores, "processor": m.processor, "rounds": self.rounds,
                "minutes": m.minutes, "versions": versions, "rows": rows, "samples": self.samples })
    }
}

fn cells(row: &Row, samples: &[Sample], peers: &[Peer]) -> BTreeMap<Peer, Cell> {
    let values = |peer: Peer| -> Vec<f64> {
        let mut rounds: Vec<(u16, f64)> = samples
            .iter()
            .filter(|s| s.peer == peer && s.measure == row.measure)
            .filter_map(|s| Some((s.round, s.figures.get(row.figure)? * row.scale)))
            .collect();
        rounds.sort_by_key(|&(round, _)| round);
        rounds.into_iter().map(|(_, value)| value).collect()
    };
    let plain = median(&values(Peer::Plain)).filter(|&plain| plain != 0.0);
    let cells = peers.iter().filter_map(|&peer| {
        let values = values(peer);
        let median = median(&values)?;
        let (low, high) = values.iter().fold((f64::MAX, f64::MIN), |(l, h), &v| (l.min(v), h.max(v)));
        let spread = if median == 0.0 { 0.0 } else { 50.0 * (high - low) / median };
        let ratio = plain.filter(|_| peer != Peer::Plain && row.better != Neither).map(|plain| median / plain);
        let of_measure = samples.iter().filter(|s| s.peer == peer && s.measure == row.measure);
        let failed = of_measure.filter_map(|s| s.figures.get("failed")).sum();
        Some((peer, Cell { median, spread, ratio, values, failed }))
    });
    cells.collect()
}

fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => None,
        n if n % 2 == 1 => Some(sorted[middle]),
        _ => Some((sorted[middle - 1] + sorted[middle]) / 2.0),
    }
}

impl Cell {
    fn shown(&self, row: &Row) -> String {
        let mut out = format!("{:.*}", row.digits, self.median);
        if self.values.len() > 1 {
            let _ = write!(out, " ±{:.0}%", self.spread);
        }
        if let Some(ratio) = self.ratio {
            let _ = write!(out, " ({ratio:.2}×)");
        }
        if self.failed > 0.0 {
            let _ = write!(out, ", {} failed", self.failed);
        }
        out
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(crate) fn report() -> Report {
        report_of(vec!["bulk-1"])
    }

    fn report_of(measures: Vec<&'static str>) -> Report {
        let sample = |peer, round, value| Sample {
            peer,
            round,
            measure: "bulk-1",
            figures: BTreeMap::from([
                ("gbit_s", value),
                ("cpu_s_per_gb", if peer == Peer::Plain { 0.0 } else { 2.0 }),
                ("failed", if peer == Peer::Culvert { f64::from(round) } else { 0.0 }),
                ("stolen_percent", 0.5),
            ]),
        };
        let samples = [
            sample(Peer::Plain, 0, 10.0),
            sample(Peer::Plain, 1, 12.0),
            sample(Peer::Plain, 2, 11.0),
            sample(Peer::Culvert, 0, 2.2),
            sample(Peer::Culvert, 1, 3.3),
        ];
        let machine = Machine {
            date: "2026-01-01 00:00".to_owned(),
            kernel: "6.12".to_owned(),
            cores: 2,
            processor: "one".to_owned(),
            minutes: 1.0,
            versions: BTreeMap::from([(Peer::Plain, "Linux".to_owned())]),
        };
        Report::of(&samples, measures, &[Peer::Plain, Peer::Culvert, Peer::Envoy], 3, machine)
    }

    #[test]
    fn medians_spread_and_ratios_are_those_of_the_rounds() {
        let table = report().table();
        let line = "| bulk, 1 stream, Gbit/s | 11.00 ±9% | 2.75 ±20% (0.25×), 1 failed | – | 0.37× |";
        assert!(table.lines().any(|l| l == line), "{table}");
        // Plain has no proxy: nothing can be a multiple of its 0.
        assert!(table.contains("| proxy CPU s per GB, 1 stream | 0.00 ±0% | 2.00 ±0%, 1 failed | – |  |"), "{table}");
        assert_eq!(report().below_goal(), ["bulk, 1 stream, Gbit/s: 0.25, and 0.37 is wanted"]);
    }

    #[test]
    fn what_was_to_be_measured_and_has_no_figure_is_below_its_goal() {
        let below = report_of(vec!["bulk-1", "stalled"]).below_goal();
        assert_eq!(below.len(), 2, "{below:?}");
        assert_eq!(below[1], "400 connections beside 6 stalled readers, done: no figure, and 400 is wanted");
        // What was not asked for is not missing.
        assert!(report_of(Vec::new()).below_goal().is_empty());
        // Nothing can be said of a ratio to what was not measured.
        let without_plain = Report { peers: vec![Peer::Culvert], ..report() };
        assert!(without_plain.below_goal().is_empty());
        let others = Report { peers: vec![Peer::Plain, Peer::Envoy], ..report_of(vec!["bulk-1", "stalled"]) };
        assert!(others.below_goal().is_empty());
    }

    #[test]
    fn the_file_has_every_figure_of_every_round() {
        let json = report().json();
        let samples = json["samples"].as_array().expect("a list");
        assert_eq!(samples.len(), 5);
        let last = &samples[4];
        assert_eq!((&last["peer"], &last["round"], &last["measure"]), (&json!("culvert"), &json!(1), &json!("bulk-1")));
        assert_eq!(last["figures"], json!({"gbit_s": 3.3, "cpu_s_per_gb": 2.0, "failed": 1.0, "stolen_percent": 0.5}));
        let row = &json["rows"][0];
        assert_eq!((&row["measure"], &row["peers"]["culvert"]["failed"]), (&json!("bulk-1"), &json!(1.0)));
    }

    #[test]
    fn every_row_names_a_measure() {
        for row in ROWS {
            assert!(super::super::MEASURES.iter().any(|m| m.name == row.measure), "{}", row.title);
        }
    }
}
