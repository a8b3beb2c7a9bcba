//! Traces: one span for each side of a connection, exported over OTLP (gRPC) where a collector is configured.
//!
//! The client's side makes a trace and tells it to the server's in `traceparent` (specification §14.2), which joins it. A
//! span is handed over when its connection ends, through a bounded queue to a thread of its own; a collector that is slow
//! or gone costs spans, which are counted, and never delays a connection.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::Context as _;
use opentelemetry_proto::tonic::{
    collector::trace::v1::{ExportTraceServiceRequest, trace_service_client::TraceServiceClient},
    common::v1::{AnyValue, InstrumentationScope, KeyValue, any_value::Value},
    resource::v1::Resource,
    trace::v1::{ResourceSpans, ScopeSpans, Span as OtlpSpan, Status, span::SpanKind, status::StatusCode},
};
use tokio::{
    sync::{mpsc, oneshot},
    time::{Instant, timeout, timeout_at},
};
use tonic::transport::{Channel, Endpoint};
use tracing::{info, warn};

use super::{
    access::Direction,
    open::Facts,
    traffic::{Flag, Names},
};
use crate::policy::Workload;

/// Spans that may wait to be exported; more are dropped and counted. One takes less than half a kilobyte.
const QUEUE: usize = 8192;
/// Most spans in one request.
const BATCH: usize = 512;
/// How long spans gather before they are sent.
const GATHER: Duration = Duration::from_secs(1);
/// For the connection to the collector.
const CONNECT_PATIENCE: Duration = Duration::from_secs(2);
/// For its answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// For what is left when the agent ends.
const LAST_PATIENCE: Duration = Duration::from_millis(500);

/// Where a connection is in its trace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trace {
    /// Of the trace; not zero.
    pub id: u128,
    /// Of this side's span; not zero.
    pub span: u64,
    /// Of the other side's span, where that one told it; else zero.
    pub parent: u64,
}

impl Trace {
    /// A new trace.
    pub fn begin() -> Self {
        Self { id: rand::random::<u128>().max(1), span: rand::random::<u64>().max(1), parent: 0 }
    }

    /// Joins the trace of the other side (W3C Trace Context).
    pub fn join(id: u128, parent: u64) -> Self {
        Self { id, parent, ..Self::begin() }
    }
}

/// A connection that has ended.
#[derive(Debug)]
pub struct Span {
    /// Where it is in its trace.
    pub trace: Trace,
    /// What is known of it.
    pub facts: Arc<Facts>,
    /// When it began.
    pub begun: SystemTime,
    /// When it ended.
    pub ended: SystemTime,
    /// Bytes client → server, and server → client.
    pub bytes: (u64, u64),
    /// How it ended.
    pub flag: Flag,
    /// The word for how it ended.
    pub reason: &'static str,
    /// What went wrong, for humans.
    pub error: Option<String>,
}

/// Where connections hand their spans over. Cheap to clone; one clone per worker.
#[derive(Clone, Debug, Default)]
pub struct Tracer {
    queue: Option<mpsc::Sender<Span>>,
    counts: Arc<Counts>,
}

/// What became of spans.
#[derive(Debug, Default)]
pub struct Counts {
    exported: AtomicU64,
    dropped: AtomicU64,
}

impl Counts {
    /// Spans that a collector has taken.
    pub fn exported(&self) -> u64 {
        self.exported.load(Ordering::Relaxed)
    }

    /// Spans that were lost: the queue was full, or the collector did not take them.
    pub fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }
}

impl Tracer {
    /// Hands a span over, if anybody wants spans. Never blocks.
    pub fn end(&self, span: impl FnOnce() -> Span) {
        if let Some(queue) = &self.queue
            && queue.try_send(span()).is_err()
        {
            self.counts.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// What became of spans.
    pub fn counts(&self) -> Arc<Counts> {
        self.counts.clone()
    }
}

/// Where spans go, and who sends them.
#[derive(Clone, Debug)]
pub struct Config {
    /// `http://host:port` of a collector that speaks OTLP over gRPC.
    pub endpoint: String,
    /// Name of this node.
    pub node_name: String,
    /// Names of the cluster.
    pub names: Names,
}

/// The thread that exports. It ends when this is dropped, or [`Exporter::stop`]ped.
#[derive(Debug)]
pub struct Exporter {
    stop: Option<oneshot::Sender<()>>,
    thread: Option<thread::JoinHandle<()>>,
}

/// Checks the address of a collector.
///
/// # Errors
/// One line that says what is expected.
pub fn endpoint(text: &str) -> Result<String, &'static str> {
    let expected = "must be the address of a collector for OTLP over gRPC, as in http://otel-collector.monitoring:4317";
    let authority = text.strip_prefix("http://").ok_or(expected)?.trim_end_matches('/');
    let (host, port) = authority.rsplit_once(':').ok_or(expected)?;
    let right = !host.is_empty() && port.parse::<u16>().is_ok_and(|port| port != 0);
    match right && Endpoint::from_shared(text.to_owned()).is_ok() {
        true => Ok(format!("http://{authority}")),
        false => Err(expected),
    }
}

impl Exporter {
    /// Starts to export. A collector that is not there is not an error: it is tried again with each batch.
    ///
    /// # Errors
    /// The address is none, or the thread could not be made.
    pub fn start(config: Config) -> anyhow::Result<(Tracer, Self)> {
        let (queue, spans) = mpsc::channel(QUEUE);
        let (stop, stopped) = oneshot::channel::<()>();
        let tracer = Tracer { queue: Some(queue), counts: Arc::default() };
        let counts = tracer.counts();
        let endpoint = Endpoint::from_shared(config.endpoint.clone())
            .with_context(|| format!("address of the collector of spans {}", config.endpoint))?
            .connect_timeout(CONNECT_PATIENCE)
            .timeout(PATIENCE);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("build the runtime of the thread that exports spans")?;
        let thread = thread::Builder::new()
            .name("spans".into())
            .spawn(move || {
                runtime.block_on(async {
                    let client = TraceServiceClient::new(endpoint.connect_lazy());
                    Sender { config, client, counts, failing: AtomicBool::new(false) }.run(spans, stopped).await;
                });
            })
            .context("start the thread that exports spans")?;
        Ok((tracer, Self { stop: Some(stop), thread: Some(thread) }))
    }

    /// Sends what is left, for a moment, and waits for the end.
    pub fn stop(mut self) {
        self.end();
    }

    fn end(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            warn!("the thread that exports spans panicked");
        }
    }
}

impl Drop for Exporter {
    fn drop(&mut self) {
        self.end();
    }
}

struct Sender {
    config: Config,
    client: TraceServiceClient<Channel>,
    counts: Arc<Counts>,
    failing: AtomicBool,
}

impl Sender {
    async fn run(mut self, mut spans: mpsc::Receiver<Span>, mut stopped: oneshot::Receiver<()>) {
        let mut batch = Vec::with_capacity(BATCH);
        let deadline = loop {
            let gathered = async {
                if spans.recv_many(&mut batch, BATCH).await == 0 {
                    return;
                }
                let full = async {
                    loop {
                        let room = BATCH - batch.len();
                        if room == 0 || spans.recv_many(&mut batch, room).await == 0 {
                            break;
                        }
                    }
                };
                // The time is up, which is as good as a full batch.
                let _ = timeout(GATHER, full).await;
            };
            tokio::select! {
                // Only ever dropped.
                _ = &mut stopped => break Instant::now() + LAST_PATIENCE,
                () = gathered => {}
            }
            if batch.is_empty() {
                // Nobody can hand a span over any more.
                return;
            }
            let count = batch.len();
            let mut export = Box::pin(self.export(std::mem::take(&mut batch)));
            tokio::select! {
                biased;
                () = &mut export => {}
                _ = &mut stopped => {
                    let deadline = Instant::now() + LAST_PATIENCE;
                    if timeout_at(deadline, export).await.is_err() {
                        self.lost(count);
                    }
                    break deadline;
                }
            }
        };
        spans.close();
        while !batch.is_empty() || spans.recv_many(&mut batch, BATCH).await > 0 {
            let count = batch.len();
            if timeout_at(deadline, self.export(std::mem::take(&mut batch))).await.is_err() {
                self.lost(count);
            }
        }
    }

    fn lost(&self, spans: usize) {
        self.counts.dropped.fetch_add(spans as u64, Ordering::Relaxed);
    }

    async fn export(&mut self, batch: Vec<Span>) {
        let count = batch.len() as u64;
        let exported = match self.client.export(request(&self.config, batch)).await {
            Ok(answer) => {
                if self.failing.swap(false, Ordering::Relaxed) {
                    info!(endpoint = self.config.endpoint, "the collector takes spans again");
                }
                let rejected = answer.into_inner().partial_success.map_or(0, |partial| partial.rejected_spans);
                count.saturating_sub(u64::try_from(rejected).unwrap_or(0))
            }
            Err(status) => {
                if !self.failing.swap(true, Ordering::Relaxed) {
                    warn!(endpoint = self.config.endpoint, error = %status,
                        "the collector does not take spans; they are dropped and counted until it does");
                }
                0
            }
        };
        self.counts.exported.fetch_add(exported, Ordering::Relaxed);
        self.counts.dropped.fetch_add(count - exported, Ordering::Relaxed);
    }
}

fn request(config: &Config, batch: Vec<Span>) -> ExportTraceServiceRequest {
    let resource = Resource {
        attributes: vec![
            text("service.name", "culvert"),
            text("service.version", env!("CARGO_PKG_VERSION")),
            text("k8s.node.name", &config.node_name),
            text("k8s.cluster.name", &config.names.cluster),
        ],
        ..Resource::default()
    };
    let scope = InstrumentationScope { name: "culvert".into(), ..InstrumentationScope::default() };
    let spans = batch.iter().map(|span| otlp(span, &config.names)).collect();
    let scope_spans = vec![ScopeSpans { scope: Some(scope), spans, ..ScopeSpans::default() }];
    ExportTraceServiceRequest {
        resource_spans: vec![ResourceSpans { resource: Some(resource), scope_spans, ..ResourceSpans::default() }],
    }
}

fn otlp(span: &Span, names: &Names) -> OtlpSpan {
    let facts = &*span.facts;
    let mut attributes = vec![
        text("direction", if facts.direction == Direction::Outbound { "outbound" } else { "inbound" }),
        text("carried", facts.carried.as_str()),
        text("reason", span.reason),
        text("response_flags", span.flag.as_str()),
        number("bytes_received", span.bytes.0),
        number("bytes_sent", span.bytes.1),
    ];
    end(&mut attributes, "source", facts.src, facts.src_workload.as_deref());
    end(&mut attributes, "destination", facts.dst, facts.dst_workload.as_deref());
    for (name, identity) in [("source", &facts.src_identity), ("destination", &facts.dst_identity)] {
        attributes.extend(identity.iter().map(|of| text(&format!("{name}.principal"), &of.to_string())));
    }
    attributes.extend(facts.hbone_addr.iter().map(|addr| text("destination.hbone_addr", &addr.to_string())));
    attributes.extend(facts.service.iter().map(|of| text("destination.service", &names.hostname(of))));
    let failed = span.flag != Flag::None;
    OtlpSpan {
        trace_id: span.trace.id.to_be_bytes().into(),
        span_id: span.trace.span.to_be_bytes().into(),
        parent_span_id: match span.trace.parent {
            0 => Vec::new(),
            parent => parent.to_be_bytes().into(),
        },
        name: if facts.direction == Direction::Outbound { "tcp outbound" } else { "tcp inbound" }.into(),
        kind: if facts.direction == Direction::Outbound { SpanKind::Client } else { SpanKind::Server } as i32,
        start_time_unix_nano: nanoseconds(span.begun),
        end_time_unix_nano: nanoseconds(span.ended),
        attributes,
        status: Some(Status {
            code: if failed { StatusCode::Error } else { StatusCode::Unset } as i32,
            message: span.error.clone().filter(|_| failed).unwrap_or_default(),
        }),
        ..OtlpSpan::default()
    }
}

fn end(attributes: &mut Vec<KeyValue>, side: &str, addr: SocketAddr, workload: Option<&Workload>) {
    attributes.push(text(&format!("{side}.address"), &addr.ip().to_canonical().to_string()));
    attributes.push(number(&format!("{side}.port"), addr.port().into()));
    if let Some(workload) = workload {
        attributes.push(text(&format!("{side}.workload"), &workload.workload_name));
        attributes.push(text(&format!("{side}.namespace"), &workload.object.namespace));
        attributes.push(text(&format!("{side}.pod"), &workload.object.name));
    }
}

fn text(key: &str, value: &str) -> KeyValue {
    attribute(key, Value::StringValue(value.to_owned()))
}

fn number(key: &str, value: u64) -> KeyValue {
    attribute(key, Value::IntValue(i64::try_from(value).unwrap_or(i64::MAX)))
}

fn attribute(key: &str, value: Value) -> KeyValue {
    KeyValue { key: key.to_owned(), value: Some(AnyValue { value: Some(value) }), ..KeyValue::default() }
}

fn nanoseconds(at: SystemTime) -> u64 {
    u64::try_from(at.duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
#[expect(clippy::disallowed_methods, reason = "a test awaits what it has started, or ends with it")]
mod tests {
    use std::sync::Mutex;

    use opentelemetry_proto::tonic::collector::trace::v1::{
        ExportTraceServiceResponse,
        trace_service_server::{TraceService, TraceServiceServer},
    };
    use tonic::{Request, Response, transport::server::TcpIncoming};

    use super::*;

    #[derive(Clone, Default)]
    struct Collector {
        spans: Arc<Mutex<Vec<OtlpSpan>>>,
        resources: Arc<Mutex<Vec<Resource>>>,
    }

    #[tonic::async_trait]
    impl TraceService for Collector {
        async fn export(
            &self,
            request: Request<ExportTraceServiceRequest>,
        ) -> Result<Response<ExportTraceServiceResponse>, tonic::Status> {
            for of in request.into_inner().resource_spans {
                self.resources.lock().expect("no panic inside").extend(of.resource);
                let spans = of.scope_spans.into_iter().flat_map(|scope| scope.spans);
                self.spans.lock().expect("no panic inside").extend(spans);
            }
            Ok(Response::new(ExportTraceServiceResponse::default()))
        }
    }

    fn config(addr: SocketAddr) -> Config {
        Config { endpoint: format!("http://{addr}"), node_name: "node-a".into(), names: Names::default() }
    }

    fn span(trace: Trace, flag: Flag) -> Span {
        let addr = |last| SocketAddr::from(([10, 0, 0, last], 80));
        Span {
            trace,
            facts: Arc::new(Facts::new(Direction::Inbound, addr(1), addr(2))),
            begun: UNIX_EPOCH + Duration::from_secs(1),
            ended: UNIX_EPOCH + Duration::from_secs(3),
            bytes: (5, 7),
            flag,
            reason: "denied",
            error: Some("why".into()),
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 1)]
    async fn spans_reach_a_collector_with_their_ids() {
        let collector = Collector::default();
        let incoming = TcpIncoming::bind(([127, 0, 0, 1], 0).into()).expect("a free port");
        let addr = incoming.local_addr().expect("bound");
        let (stop, stopped) = oneshot::channel::<()>();
        let service = TraceServiceServer::new(collector.clone());
        let server =
            tokio::spawn(tonic::transport::Server::builder().serve_with_incoming_shutdown(service, incoming, async {
                let _ = stopped.await;
            }));
        let (tracer, exporter) = Exporter::start(config(addr)).expect("started");
        let trace = Trace::join(0xabc, 0xdef);
        for _ in 0..1000 {
            tracer.end(|| span(trace, Flag::Deny));
        }
        let counts = tracer.counts();
        while counts.exported() < 1000 {
            assert_eq!(counts.dropped(), 0);
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        tokio::task::spawn_blocking(move || exporter.stop()).await.expect("no panic");
        let spans = collector.spans.lock().expect("no panic inside").clone();
        assert_eq!(spans.len(), 1000);
        assert_eq!(spans[0].trace_id, 0xabc_u128.to_be_bytes());
        assert_eq!(spans[0].parent_span_id, 0xdef_u64.to_be_bytes());
        assert_eq!(spans[0].span_id, trace.span.to_be_bytes());
        assert_eq!(spans[0].kind, SpanKind::Server as i32);
        assert_eq!(spans[0].end_time_unix_nano - spans[0].start_time_unix_nano, 2_000_000_000);
        assert_eq!(spans[0].status.as_ref().map(|status| &*status.message), Some("why"));
        let node = text("k8s.node.name", "node-a");
        assert!(collector.resources.lock().expect("no panic inside")[0].attributes.contains(&node));
        drop(stop);
        server.await.expect("no panic").expect("no error");
    }

    /// A collector that accepts and never answers costs spans, and nobody waits for it.
    #[test]
    fn a_silent_collector_costs_spans_and_no_time() {
        let silent = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
        let (tracer, exporter) = Exporter::start(config(silent.local_addr().expect("bound"))).expect("started");
        let begun = std::time::Instant::now();
        for _ in 0..3 * QUEUE {
            tracer.end(|| span(Trace::begin(), Flag::None));
        }
        assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
        let counts = tracer.counts();
        assert!(counts.dropped() > 0);
        exporter.stop();
        assert_eq!((counts.exported(), counts.dropped()), (0, 3 * QUEUE as u64));
        // After the end nothing is lost in silence.
        tracer.end(|| span(Trace::begin(), Flag::None));
        assert_eq!(counts.dropped(), 3 * QUEUE as u64 + 1);
    }

    #[test]
    fn addresses_of_collectors_are_checked() {
        assert_eq!(endpoint("http://a.b:4317/"), Ok("http://a.b:4317".into()));
        assert_eq!(endpoint("http://[::1]:4317"), Ok("http://[::1]:4317".into()));
        for wrong in ["", "a:4317", "https://a:4317", "http://a", "http://:1", "http://a:0", "http://a b:1"] {
            assert!(endpoint(wrong).is_err(), "{wrong}");
        }
    }
}
