//! What the agent says of itself: the set-up of its logs, the [`access`] log, [`readiness`], which connections are
//! [`open`], and which were refused ([`history`]).
//!
//! What is worth saying is decided where it happens. Logs go to standard error, the access log to standard output, and
//! nobody who says something waits for whoever reads it ([`lines`]).

use std::{fmt, io, os::fd::AsRawFd as _, str::FromStr, time::Duration};

use anyhow::Context;
use tracing_subscriber::{
    EnvFilter, Layer, Registry,
    filter::filter_fn,
    fmt::{MakeWriter, time::SystemTime},
    layer::SubscriberExt,
    reload,
};

pub mod access;
pub(crate) mod answering;
pub mod exposition;
pub mod history;
pub mod limit;
pub mod lines;
pub mod metrics;
pub mod open;
pub mod panics;
pub mod readiness;
pub mod recent;
pub mod tally;
pub mod trace;
pub mod traffic;

/// How lines look, of the log and of the access log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    /// For people.
    #[default]
    Text,
    /// One JSON object per line.
    Json,
}

impl FromStr for Format {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "text" => Ok(Self::Text),
            "json" => Ok(Self::Json),
            _ => Err(format!("log format {text:?} is not one of text, json")),
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Text => "text",
            Self::Json => "json",
        })
    }
}

/// Changes the level filter of a running agent.
#[derive(Clone, Debug)]
pub struct LogLevel {
    handle: reload::Handle<EnvFilter, Registry>,
}

impl LogLevel {
    /// The filter in force, as [`LogLevel::set`] takes it.
    ///
    /// # Errors
    /// The log has ended.
    pub fn get(&self) -> anyhow::Result<String> {
        self.handle.with_current(ToString::to_string).context("read the log level")
    }

    /// Puts another filter in force, written as for [`init`].
    ///
    /// # Errors
    /// The filter is not understood; the old one stays.
    pub fn set(&self, filter: &str) -> anyhow::Result<()> {
        self.handle.reload(parse_filter(filter)?).context("change the log level")
    }
}

/// The queue of the log. A line takes some hundred bytes.
const LINES: lines::Config = lines::Config { name: "log", queue: 4096, gather: Duration::ZERO };

/// The log of the process. Dropping it, as the unwinding of a panic does, waits for what is queued, a second at most.
#[derive(Debug)]
pub struct Log {
    level: LogLevel,
    lines: lines::Lines,
    writer: lines::Writer,
}

impl Log {
    /// Its level.
    pub fn level(&self) -> LogLevel {
        self.level.clone()
    }

    /// Where its lines are put in; for the number of those that were dropped.
    pub fn lines(&self) -> lines::Lines {
        self.lines.clone()
    }

    /// Writes what is queued; what is said later is lost. A reader that takes nothing for `patience` does not get it.
    pub fn finish(self, patience: Duration) {
        // Whom to tell? The log is the place for it.
        let _ = self.writer.finish(patience);
    }
}

/// Starts the log of the process, on standard error.
///
/// `filter` is a level (`info`), or levels by module: `warn,culvert::pods=debug`.
///
/// # Errors
/// The filter is not understood, no thread could be started, or this was called before.
pub fn init(format: Format, filter: &str) -> anyhow::Result<Log> {
    let out = lines::past_std(&io::stderr()).context("duplicate standard error")?;
    let (lines, writer) = lines::start(LINES, out).context("start the log")?;
    let each = lines.clone();
    let (subscriber, level) = subscriber(format, filter, move || each.clone())?;
    tracing::subscriber::set_global_default(subscriber).context("start the log")?;
    Ok(Log { level, lines, writer })
}

/// Says a last line on standard error, after [`Log::finish`]; nothing if its reader takes nothing for `patience`, since
/// that must not keep a process from its end.
pub fn last_word(line: &str, patience: Duration) {
    let mut poll = libc::pollfd { fd: io::stderr().as_raw_fd(), events: libc::POLLOUT, revents: 0 };
    let millis = i32::try_from(patience.as_millis()).unwrap_or(i32::MAX);
    // SAFETY: one valid pollfd, alive during the call. A pipe with room takes a page without waiting (pipe(7)).
    if unsafe { libc::poll(&raw mut poll, 1, millis) } == 1 {
        eprintln!("{line}");
    }
}

/// A filter; unlike [`EnvFilter`]'s own lenient parsing, a directive that is not understood is an error.
///
/// # Errors
/// One line that names the filter.
pub fn parse_filter(filter: &str) -> anyhow::Result<EnvFilter> {
    // A lone word that is no level would be taken for the name of a module, and silence everything else.
    for directive in filter.split(',').filter(|directive| !directive.contains(['=', '['])) {
        if directive.trim().parse::<tracing::level_filters::LevelFilter>().is_err() {
            anyhow::bail!("log level {directive:?} in {filter:?} is not one of off, error, warn, info, debug, trace");
        }
    }
    EnvFilter::builder().parse(filter).with_context(|| format!("log level {filter:?}"))
}

/// What is never logged, whatever the level: kube-client says each answer of an API server that it cannot read, in full, and an
/// answer may hold a Secret; and each failed request, of which whoever asked tells, once.
const NEVER: [&str; 2] = ["kube_client::client", "kube_client::client::builder"];

fn subscriber<W>(
    format: Format,
    filter: &str,
    writer: W,
) -> anyhow::Result<(impl tracing::Subscriber + Send + Sync + 'static, LogLevel)>
where
    W: for<'w> MakeWriter<'w> + Send + Sync + 'static,
{
    let (filter, handle) = reload::Layer::new(parse_filter(filter)?);
    let lines = tracing_subscriber::fmt::layer().with_ansi(false).with_timer(SystemTime).with_writer(writer);
    let lines = match format {
        Format::Text => lines.boxed(),
        Format::Json => lines.json().flatten_event(true).with_current_span(true).with_span_list(false).boxed(),
    };
    let lines = lines.with_filter(filter_fn(|of| !NEVER.contains(&of.target())));
    Ok((tracing_subscriber::registry().with(filter).with(lines), LogLevel { handle }))
}

#[cfg(test)]
#[expect(clippy::disallowed_methods, reason = "a test awaits what it has started, or ends with it")]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().expect("no test panics inside").extend(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl Lines {
        fn text(&self) -> String {
            String::from_utf8(self.0.lock().expect("no test panics inside").clone()).expect("UTF-8")
        }
    }

    fn logged(format: Format, filter: &str, log: impl FnOnce(&LogLevel)) -> String {
        let lines = Lines::default();
        let writer = lines.clone();
        let (subscriber, level) = subscriber(format, filter, move || writer.clone()).expect("a good filter");
        tracing::subscriber::with_default(subscriber, || log(&level));
        lines.text()
    }

    #[test]
    fn json_lines_parse_and_carry_their_fields() {
        let text = logged(Format::Json, "info", |_| {
            tracing::info!(pod = "a\"b\n", bytes = 7u64, "enrolled");
            tracing::debug!("not this one");
        });
        let lines: Vec<serde_json::Value> =
            text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
        assert_eq!(lines.len(), 1, "{text}");
        assert_eq!(lines[0]["message"], "enrolled");
        assert_eq!(lines[0]["pod"], "a\"b\n");
        assert_eq!(lines[0]["bytes"], 7);
        assert_eq!(lines[0]["level"], "INFO");
    }

    #[test]
    fn what_an_api_server_answered_is_never_logged() {
        let text = logged(Format::Text, "trace,kube_client=trace", |_| {
            tracing::warn!(target: "kube_client::client", "secret");
            tracing::error!(target: "kube_client::client::builder", "failed with secret");
            tracing::warn!(target: "kube_client::client::tls", "keeping stale roots");
        });
        assert!(text.contains("stale roots") && !text.contains("secret"), "{text}");
    }

    #[test]
    fn the_level_changes_while_running() {
        let text = logged(Format::Text, "info", |level| {
            tracing::debug!("one");
            level.set("debug").expect("a good filter");
            tracing::debug!("two");
            assert_eq!(level.get().expect("the log runs"), "debug");
            assert!(level.set("loud").is_err());
            tracing::debug!("three");
            level.set("off").expect("a good filter");
            tracing::error!("four");
        });
        assert!(!text.contains("one") && text.contains("two") && text.contains("three") && !text.contains("four"));
        assert!(!text.contains('\u{1b}'), "no colours in a file: {text:?}");
    }

    /// Whoever logs may be a worker, or the thread that gives the sign of life: neither may wait for a reader.
    #[test]
    fn a_log_that_nobody_reads_makes_nobody_wait() {
        let gate = lines::testing::Gate::default();
        let (lines, writer) = lines::start(lines::Config { queue: 10, ..LINES }, gate.clone()).expect("a thread");
        let each = lines.clone();
        let (subscriber, _) = subscriber(Format::Json, "info", move || each.clone()).expect("a good filter");
        let (done, ended) = std::sync::mpsc::channel();
        let worker = std::thread::spawn(move || {
            tracing::subscriber::with_default(subscriber, || (0..1000u64).for_each(|n| tracing::warn!(n, "line")));
            done.send(()).expect("the test waits");
        });
        let in_time = ended.recv_timeout(Duration::from_secs(20));
        let dropped = lines.dropped();
        gate.open();
        worker.join().expect("no panic");
        in_time.expect("it waited for the reader");
        assert!(dropped >= 900, "{dropped}");
        writer.finish(Duration::from_secs(20)).expect("the gate is open");
        let text = String::from_utf8(gate.writes().concat()).expect("UTF-8");
        let numbers: Vec<u64> = text
            .lines()
            .map(|line| serde_json::from_str::<serde_json::Value>(line).expect("whole lines")["n"].as_u64().expect("n"))
            .collect();
        // It takes what waits before it writes, and is held up then.
        assert_eq!(numbers.len() as u64 + dropped, 1000, "each is written, or counted");
        assert!(numbers.starts_with(&[0]) && numbers.is_sorted(), "{numbers:?}");
    }

    #[test]
    fn a_wrong_level_is_named() {
        for wrong in ["loud", "info,noisy", "culvert=loud", "info;debug"] {
            let error = format!("{:#}", parse_filter(wrong).expect_err(wrong));
            assert!(error.contains(wrong), "{error}");
            assert!(!error.contains('\n'), "{error}");
        }
        for right in ["info", "warn,culvert::pods=debug", "off", "culvert::tunnel=trace,error"] {
            parse_filter(right).expect(right);
        }
        assert!("xml".parse::<Format>().expect_err("no such format").contains("text, json"));
        assert_eq!(Format::Json.to_string().parse(), Ok(Format::Json));
    }
}
