//! The access log: one line per connection at its end (specification §16), to standard output.
//!
//! What happened, and to whom, is told by whoever carried the connection. A line is put together on the caller's
//! thread; how it is written without delaying a connection is for [`lines`].

use std::{
    fmt::{self, Write as _},
    io,
    net::SocketAddr,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use super::{
    Format,
    lines::{self, Lines, Writer},
};

/// What a line reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// `connection opened`, DEBUG.
    Opened,
    /// `connection complete`: INFO, or ERROR if [`Access::error`] is set.
    Complete,
    /// `connection failed`, ERROR: refused before the workload was known.
    Failed,
}

/// From which side the line is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Direction {
    /// The connection entered a pod of this node.
    Inbound,
    /// The connection left a pod of this node.
    Outbound,
}

/// One end of the connection. A value that is missing, or shows as nothing, is omitted from the line.
#[derive(Clone, Copy, Default)]
pub struct End<'a> {
    /// Address of the socket; for the destination of a tunnel, with the tunnel's port.
    pub addr: Option<SocketAddr>,
    /// Name of the workload.
    pub workload: Option<&'a dyn fmt::Display>,
    /// Its namespace.
    pub namespace: Option<&'a dyn fmt::Display>,
    /// SPIFFE ID that the certificate proved; only with mTLS.
    pub identity: Option<&'a dyn fmt::Display>,
    /// Name of its cluster.
    pub cluster: Option<&'a dyn fmt::Display>,
}

/// One line; the fields are named as in specification §16.
#[derive(Clone, Copy)]
pub struct Access<'a> {
    /// What this is about.
    pub event: Event,
    /// `src.*`: the client.
    pub src: End<'a>,
    /// `dst.*`: the server.
    pub dst: End<'a>,
    /// `dst.hbone_addr`: the target inside the tunnel, the CONNECT's authority.
    pub hbone_addr: Option<&'a dyn fmt::Display>,
    /// `dst.service`: name of the Service that was addressed.
    pub service: Option<&'a dyn fmt::Display>,
    /// `direction`.
    pub direction: Direction,
    /// `bytes_sent`: towards this side's remote peer (outbound: the request; inbound: the response).
    pub bytes_sent: u64,
    /// `bytes_recv`: from this side's remote peer.
    pub bytes_recv: u64,
    /// `duration`: from accept to the end; written in whole milliseconds, `12ms`.
    pub duration: Duration,
    /// `error`: what went wrong, for humans; a denial names the policy.
    pub error: Option<&'a dyn fmt::Display>,
    /// `reason`: how it ended, one of a closed list of words.
    pub reason: Option<&'a dyn fmt::Display>,
    /// `policy`: the object that decided: `namespace/name` of a PeerAuthentication, `namespace/name#rule` of an
    /// AuthorizationPolicy.
    pub policy: Option<&'a dyn fmt::Display>,
    /// `dry_run`: what the verdict would be if policies in dry-run were enforced, as in `deny explicit-deny test/new#0`.
    pub dry_run: Option<&'a dyn fmt::Display>,
    /// `audit`: the AUDIT rule that matched, `namespace/name#rule`.
    pub audit: Option<&'a dyn fmt::Display>,
    /// `trace_id`: trace that the connection belongs to, 32 hexadecimal digits; the same on both sides.
    pub trace_id: Option<&'a dyn fmt::Display>,
}

/// Which lines are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Detail {
    /// None.
    Off,
    /// Those at ERROR.
    Errors,
    /// Those at INFO too: every connection.
    #[default]
    Connections,
    /// `connection opened` too.
    Opened,
}

/// What the access log is to be.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// How lines look.
    pub format: Format,
    /// Which lines.
    pub detail: Detail,
    /// Lines that may wait to be written; more are dropped and counted. One takes about half a kilobyte.
    pub queue: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self { format: Format::Text, detail: Detail::default(), queue: 8192 }
    }
}

/// Pause after a batch, in which the next one gathers: a thread that waits for each line costs whoever sends it a system
/// call, and both a change of threads.
const GATHER: Duration = Duration::from_millis(10);

/// Where connections report; cheap to clone, one clone per worker.
#[derive(Clone, Debug)]
pub struct AccessLog {
    format: Format,
    detail: Detail,
    lines: Lines,
}

/// Starts an access log on standard output.
///
/// # Errors
/// Standard output could not be duplicated, or no thread could be started.
pub fn start(config: Config) -> io::Result<(AccessLog, Writer)> {
    // Past std's line buffer, which would make one system call per line.
    start_on(config, lines::past_std(&io::stdout())?)
}

/// Starts an access log on any writer.
///
/// # Errors
/// No thread could be started.
pub fn start_on(config: Config, out: impl io::Write + Send + 'static) -> io::Result<(AccessLog, Writer)> {
    let (lines, writer) = lines::start(lines::Config { name: "access log", queue: config.queue, gather: GATHER }, out)?;
    Ok((AccessLog { format: config.format, detail: config.detail, lines }, writer))
}

impl AccessLog {
    /// Puts a line into the queue, or drops it if the queue is full. Never blocks.
    pub fn record(&self, access: &Access<'_>) {
        if self.detail.covers(access) {
            self.lines.put(line(self.format, SystemTime::now(), access).into_bytes());
        }
    }

    /// How many lines were dropped so far: the queue was full, or they could not be written.
    pub fn dropped(&self) -> u64 {
        self.lines.dropped()
    }
}

impl Detail {
    fn covers(self, access: &Access<'_>) -> bool {
        match self {
            Self::Off => false,
            Self::Errors => access.level() == "error",
            Self::Connections => access.event != Event::Opened,
            Self::Opened => true,
        }
    }
}

impl Access<'_> {
    fn level(&self) -> &'static str {
        match self.event {
            Event::Opened => "debug",
            Event::Complete if self.error.is_none() => "info",
            Event::Complete | Event::Failed => "error",
        }
    }

    fn message(&self) -> &'static str {
        match self.event {
            Event::Opened => "connection opened",
            Event::Complete => "connection complete",
            Event::Failed => "connection failed",
        }
    }
}

/// The line with its newline.
fn line(format: Format, at: SystemTime, access: &Access<'_>) -> String {
    let mut line = Line { out: String::with_capacity(640), format };
    match format {
        Format::Text => {
            write_time(&mut line.out, at);
            for word in [access.level(), "access", access.message()] {
                line.out.push('\t');
                line.out.push_str(word);
            }
            line.out.push('\t');
        }
        Format::Json => {
            line.out.push_str("{\"time\":\"");
            write_time(&mut line.out, at);
            line.out.push('"');
            line.text("level", Some(&access.level()));
            line.text("scope", Some(&"access"));
            line.text("message", Some(&access.message()));
        }
    }
    line.addr("src.addr", access.src.addr);
    line.text("src.workload", access.src.workload);
    line.text("src.namespace", access.src.namespace);
    line.text("src.identity", access.src.identity);
    line.text("src.cluster", access.src.cluster);
    line.addr("dst.addr", access.dst.addr);
    line.text("dst.hbone_addr", access.hbone_addr);
    line.text("dst.service", access.service);
    line.text("dst.workload", access.dst.workload);
    line.text("dst.namespace", access.dst.namespace);
    line.text("dst.identity", access.dst.identity);
    line.text("dst.cluster", access.dst.cluster);
    let direction = match access.direction {
        Direction::Inbound => "inbound",
        Direction::Outbound => "outbound",
    };
    line.text("direction", Some(&direction));
    if access.event != Event::Opened {
        line.number("bytes_sent", access.bytes_sent);
        line.number("bytes_recv", access.bytes_recv);
        line.text("duration", Some(&format_args!("{}ms", access.duration.as_millis())));
    }
    line.text("trace_id", access.trace_id);
    line.text("reason", access.reason);
    line.text("policy", access.policy);
    line.text("dry_run", access.dry_run);
    line.text("audit", access.audit);
    line.text("error", access.error);
    match format {
        Format::Text => {}
        Format::Json => line.out.push('}'),
    }
    line.out.push('\n');
    line.out
}

/// A line in the making.
struct Line {
    out: String,
    format: Format,
}

impl Line {
    fn key(&mut self, key: &str) {
        match self.format {
            Format::Text => {
                if !self.out.ends_with('\t') {
                    self.out.push(' ');
                }
                self.out.push_str(key);
                self.out.push('=');
            }
            Format::Json => {
                // Keys are ours and need no escaping.
                self.out.push_str(",\"");
                self.out.push_str(key);
                self.out.push_str("\":");
            }
        }
    }

    fn addr(&mut self, key: &str, addr: Option<SocketAddr>) {
        let Some(addr) = addr else { return };
        let addr = SocketAddr::new(addr.ip().to_canonical(), addr.port());
        match self.format {
            Format::Text => {
                self.key(key);
                // Writing to a String cannot fail.
                let _ = write!(self.out, "{addr}");
            }
            Format::Json => self.text(key, Some(&addr)),
        }
    }

    fn number(&mut self, key: &str, number: u64) {
        self.key(key);
        let _ = write!(self.out, "{number}");
    }

    /// In quotes with JSON's escapes, in both formats: neither a quote nor a newline of a name can forge a field.
    fn text(&mut self, key: &str, value: Option<&dyn fmt::Display>) {
        let Some(value) = value else { return };
        let before = self.out.len();
        self.key(key);
        self.out.push('"');
        let start = self.out.len();
        // A Display that fails leaves what it wrote so far; ours do not fail.
        let _ = write!(Escaped(&mut self.out), "{value}");
        if self.out.len() == start {
            self.out.truncate(before);
        } else {
            self.out.push('"');
        }
    }
}

/// Writes into a JSON string.
struct Escaped<'a>(&'a mut String);

impl fmt::Write for Escaped<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let mut plain = 0;
        for (at, character) in text.char_indices() {
            let named = match character {
                '"' => "\\\"",
                '\\' => "\\\\",
                '\n' => "\\n",
                '\r' => "\\r",
                '\t' => "\\t",
                // Besides what JSON demands, what would move a terminal's cursor or break a reader's lines.
                c if c.is_control() || matches!(c, '\u{2028}' | '\u{2029}') => "",
                _ => continue,
            };
            self.0.push_str(&text[plain..at]);
            plain = at + character.len_utf8();
            match named {
                "" => write!(self.0, "\\u{:04x}", u32::from(character))?,
                named => self.0.push_str(named),
            }
        }
        self.0.push_str(&text[plain..]);
        Ok(())
    }
}

/// RFC 3339, UTC, microseconds.
fn write_time(out: &mut String, at: SystemTime) {
    let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    let at =
        time::OffsetDateTime::from_unix_timestamp(since.as_secs() as i64).unwrap_or(time::OffsetDateTime::UNIX_EPOCH);
    let _ = write!(
        out,
        "{:04}-{:02}-{:02}T{:02}:{:02}:{:02}.{:06}Z",
        at.year(),
        u8::from(at.month()),
        at.day(),
        at.hour(),
        at.minute(),
        at.second(),
        since.subsec_micros(),
    );
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, time::Instant};

    use super::*;
    use crate::telemetry::lines::testing::Gate;

    fn full<'a>() -> Access<'a> {
        Access {
            event: Event::Complete,
            src: End {
                addr: Some("10.1.0.5:40000".parse().expect("a literal")),
                workload: Some(&"nginx"),
                namespace: Some(&"test"),
                identity: Some(&"spiffe://cluster.local/ns/test/sa/nginx"),
                cluster: Some(&"Kubernetes"),
            },
            dst: End {
                addr: Some("[::ffff:10.1.0.9]:15008".parse().expect("a literal")),
                workload: Some(&"productpage-v1"),
                namespace: Some(&"default"),
                identity: Some(&"spiffe://cluster.local/ns/default/sa/productpage"),
                cluster: Some(&"Kubernetes"),
            },
            hbone_addr: Some(&"10.1.0.9:9080"),
            service: Some(&"productpage.default.svc.cluster.local"),
            direction: Direction::Outbound,
            bytes_sent: 77,
            bytes_recv: u64::MAX,
            duration: Duration::from_micros(12_900),
            error: None,
            reason: None,
            policy: None,
            dry_run: None,
            audit: None,
            trace_id: None,
        }
    }

    const KEYS: [&str; 16] = [
        "src.addr",
        "src.workload",
        "src.namespace",
        "src.identity",
        "src.cluster",
        "dst.addr",
        "dst.hbone_addr",
        "dst.service",
        "dst.workload",
        "dst.namespace",
        "dst.identity",
        "dst.cluster",
        "direction",
        "bytes_sent",
        "bytes_recv",
        "duration",
    ];

    fn json(access: &Access<'_>) -> serde_json::Map<String, serde_json::Value> {
        let text = line(Format::Json, SystemTime::now(), access);
        assert_eq!(text.matches('\n').count(), 1, "{text:?}");
        match serde_json::from_str(&text) {
            Ok(serde_json::Value::Object(map)) => map,
            other => panic!("{other:?} from {text:?}"),
        }
    }

    /// A reader of the text format: head, then `key=value` with values bare or as JSON strings.
    fn text(access: &Access<'_>) -> (Vec<String>, BTreeMap<String, String>) {
        let line = line(Format::Text, SystemTime::now(), access);
        let mut parts: Vec<&str> = line.strip_suffix('\n').expect("a whole line").splitn(5, '\t').collect();
        let mut rest = parts.pop().expect("the fields");
        let mut fields = BTreeMap::new();
        while !rest.is_empty() {
            let (key, after) = rest.split_once('=').expect("key=value");
            let value: String;
            if after.starts_with('"') {
                let mut stream = serde_json::Deserializer::from_str(after).into_iter::<String>();
                value = stream.next().expect("a value").expect("a JSON string");
                rest = &after[stream.byte_offset()..];
            } else {
                let end = after.find(' ').unwrap_or(after.len());
                value = after[..end].to_owned();
                rest = &after[end..];
            }
            rest = rest.strip_prefix(' ').unwrap_or(rest);
            assert!(fields.insert(key.to_owned(), value).is_none(), "{key} twice in {line}");
        }
        (parts.into_iter().map(str::to_owned).collect(), fields)
    }

    /// Specification §16, the access log.
    #[test]
    fn every_field_of_the_specification_is_there_under_its_name() {
        let map = json(&full());
        let mut keys: Vec<&str> = map.keys().map(String::as_str).collect();
        keys.sort_unstable();
        let mut expected: Vec<&str> = KEYS.into_iter().chain(["time", "level", "scope", "message"]).collect();
        expected.sort_unstable();
        assert_eq!(keys, expected);
        assert_eq!(map["level"], "info");
        assert_eq!(map["message"], "connection complete");
        assert_eq!(map["dst.addr"], "10.1.0.9:15008");
        assert_eq!(map["bytes_recv"], u64::MAX);
        assert_eq!(map["duration"], "12ms");
        assert_eq!(map["direction"], "outbound");

        let (head, fields) = text(&full());
        assert_eq!(head[1..], ["info", "access", "connection complete"]);
        assert_eq!(fields.len(), KEYS.len());
        for key in KEYS {
            let as_json = &map[key];
            let expected = as_json.as_str().map_or_else(|| as_json.to_string(), str::to_owned);
            assert_eq!(fields[key], expected, "{key}");
        }
    }

    /// Specification §16: ERROR plus `error` on failure; a denial names the policy.
    #[test]
    fn a_failure_is_an_error_with_its_cause() {
        let denied =
            Access { error: Some(&"explicitly denied by: default/deny-all"), reason: Some(&"denied"), ..full() };
        let map = json(&denied);
        assert_eq!(
            (&map["level"], &map["error"], &map["reason"]),
            (&"error".into(), &"explicitly denied by: default/deny-all".into(), &"denied".into())
        );
        let failed = Access { event: Event::Failed, src: End { addr: full().src.addr, ..End::default() }, ..denied };
        let (head, fields) = text(&failed);
        assert_eq!(head[1..], ["error", "access", "connection failed"]);
        assert!(!fields.contains_key("src.workload"), "{fields:?}");
        let opened = Access { event: Event::Opened, ..full() };
        let map = json(&opened);
        assert_eq!((&map["level"], &map["message"]), (&"debug".into(), &"connection opened".into()));
        assert!(!map.contains_key("bytes_sent") && !map.contains_key("duration"));
    }

    #[test]
    fn values_that_are_missing_or_empty_are_omitted() {
        let bare = Access {
            src: End { workload: Some(&""), ..End::default() },
            dst: End::default(),
            hbone_addr: None,
            service: None,
            ..full()
        };
        let map = json(&bare);
        let keys: Vec<&str> = map.keys().map(String::as_str).filter(|key| key.contains('.')).collect();
        assert!(keys.is_empty(), "{keys:?}");
        assert_eq!(text(&bare).1.len(), 4);
    }

    proptest::proptest! {
        /// Names come from manifests and certificates: none can forge a field or a line.
        #[test]
        fn any_text_survives_the_way_through_a_line(value in proptest::prelude::any::<String>(), other in ".*") {
            proptest::prop_assume!(!value.is_empty());
            let nasty = Access { service: Some(&value), error: Some(&other), ..full() };
            let map = json(&nasty);
            proptest::prop_assert_eq!(map["dst.service"].as_str(), Some(value.as_str()));
            let (_, fields) = text(&nasty);
            proptest::prop_assert_eq!(&fields["dst.service"], &value);
            proptest::prop_assert_eq!(fields.len(), KEYS.len() + usize::from(!other.is_empty()));
        }
    }

    #[test]
    fn control_characters_never_reach_a_terminal() {
        let nasty = Access { service: Some(&"\u{1b}[2J\u{9b}x\n\u{2028}\u{7f}"), ..full() };
        for format in [Format::Text, Format::Json] {
            let line = line(format, SystemTime::now(), &nasty);
            assert!(
                !line.trim_end_matches('\n').chars().any(|c| c.is_control() && c != '\t' || c == '\u{2028}'),
                "{line:?}"
            );
        }
    }

    #[test]
    fn time_is_rfc3339_in_utc() {
        let mut out = String::new();
        write_time(&mut out, UNIX_EPOCH + Duration::from_micros(1_709_210_096_000_042));
        assert_eq!(out, "2024-02-29T12:34:56.000042Z");
    }

    #[test]
    fn a_stuck_reader_costs_lines_but_never_the_caller() {
        let gate = Gate::default();
        let config = Config { queue: 10, ..Config::default() };
        let (log, writer) = start_on(config, gate.clone()).expect("a thread");
        let start = Instant::now();
        for _ in 0..1000 {
            log.record(&full());
        }
        assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
        let dropped = log.dropped();
        assert!(dropped > 900, "{dropped}");
        gate.open();
        assert_eq!(writer.finish(Duration::from_secs(10)).expect("the gate is open"), dropped);
        let written: usize = gate.writes().iter().map(|b| b.iter().filter(|b| **b == b'\n').count()).sum();
        assert_eq!(written as u64 + dropped, 1000);
    }

    #[test]
    fn what_is_queued_is_written_before_the_end_in_few_writes() {
        let gate = Gate::default();
        let (log, writer) =
            start_on(Config { format: Format::Json, ..Config::default() }, gate.clone()).expect("a thread");
        for bytes_sent in 0..500 {
            log.record(&Access { bytes_sent, ..full() });
        }
        gate.open();
        writer.finish(Duration::from_secs(10)).expect("the gate is open");
        assert_eq!(log.dropped(), 0);
        let writes = gate.writes();
        assert!(writes.len() <= 10, "{} writes", writes.len());
        let all = String::from_utf8(writes.concat()).expect("UTF-8");
        for (n, line) in all.lines().enumerate() {
            let line: serde_json::Value = serde_json::from_str(line).expect("JSON");
            assert_eq!(line["bytes_sent"], n);
        }
        assert_eq!(all.lines().count(), 500);
        // Whatever comes after the end is counted, not lost in silence.
        log.record(&full());
        assert_eq!(log.dropped(), 1);
    }

    #[test]
    fn the_end_does_not_wait_for_a_stuck_reader_for_ever() {
        let gate = Gate::default();
        let (log, writer) = start_on(Config { queue: 2, ..Config::default() }, gate.clone()).expect("a thread");
        for _ in 0..10 {
            log.record(&full());
        }
        let error = writer.finish(Duration::from_millis(50)).expect_err("the gate is shut");
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        gate.open();
    }

    #[test]
    fn detail_chooses_the_lines() {
        let failed = Access { error: Some(&"x"), ..full() };
        let opened = Access { event: Event::Opened, ..full() };
        for (detail, covers) in [
            (Detail::Off, [false, false, false]),
            (Detail::Errors, [true, false, false]),
            (Detail::Connections, [true, true, false]),
            (Detail::Opened, [true, true, true]),
        ] {
            assert_eq!([&failed, &full(), &opened].map(|access| detail.covers(access)), covers, "{detail:?}");
        }
    }
}
