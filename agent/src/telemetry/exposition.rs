//! Serves the metrics: `GET /metrics` and `GET /stats/prometheus`, on a thread of its own.
//!
//! Whoever reaches the node reaches this, pods too. So a text is made at most once a second, answers are few at a time,
//! and nothing here waits long for anybody: if the thread that controls does not answer, its metrics are left out.

use std::{
    convert::Infallible,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::body::Incoming;
use tokio::{
    net::TcpListener,
    sync::{Mutex, mpsc, oneshot, watch},
    time::timeout,
};
use tracing::warn;

use super::{
    answering,
    metrics::{self, Question, Sources},
};

/// Connections at a time. One more costs the oldest its place.
const CONNECTIONS: usize = 16;
/// For the head of a request.
const HEAD_PATIENCE: Duration = Duration::from_secs(5);
/// Request line and headers, bytes.
const HEAD_BYTES: usize = 16 << 10;
/// For one connection, from accept to the last byte.
const PATIENCE: Duration = Duration::from_secs(60);
/// For the thread that controls to answer.
const CONTROL_PATIENCE: Duration = Duration::from_secs(2);
/// How long a text is good for everybody who asks.
const FRESH: Duration = Duration::from_secs(1);

const OPEN_METRICS: HeaderValue =
    HeaderValue::from_static("application/openmetrics-text; version=1.0.0; charset=utf-8");
const PROMETHEUS: HeaderValue = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");

/// The thread that serves. It ends when this is dropped, or [`Server::stop`]ped.
#[derive(Debug)]
pub struct Server {
    failed: Option<oneshot::Receiver<anyhow::Error>>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<thread::JoinHandle<()>>,
}

struct State {
    sources: Sources,
    control: mpsc::Sender<Question>,
    last: Mutex<Option<(Instant, Bytes)>>,
}

impl Server {
    /// Serves on what `listen` gives, from when `answers` is true until `relieved` resolves.
    ///
    /// # Errors
    /// No thread could be started.
    pub fn start(
        listen: impl FnOnce() -> anyhow::Result<TcpListener> + Send + 'static,
        mut answers: watch::Receiver<bool>,
        relieved: impl Future<Output = ()> + Send + 'static,
        sources: Sources,
        control: mpsc::Sender<Question>,
    ) -> anyhow::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("build the runtime of the metrics thread")?;
        let (stop, mut stopped) = oneshot::channel::<()>();
        let (report, failed) = oneshot::channel();
        let body = async move {
            let answering = tokio::select! {
                _ = &mut stopped => false,
                answering = answers.wait_for(|answers| *answers) => answering.is_ok(),
            };
            if !answering {
                return Ok(());
            }
            let state = Arc::new(State { sources, control, last: Mutex::default() });
            let serving = answering::serve(listen()?, CONNECTIONS, PATIENCE, relieved, |stream| {
                let state = state.clone();
                answering::http1(stream, HEAD_PATIENCE, HEAD_BYTES, move |request| answer(request, state.clone()))
            });
            tokio::select! {
                // Only ever dropped.
                _ = &mut stopped => return Ok(()),
                result = serving => result.context("the metrics server has ended")?,
            }
            // Whoever asks now is answered by the successor.
            let _ = stopped.await;
            Ok(())
        };
        let thread = thread::Builder::new()
            .name("metrics".into())
            .spawn(move || {
                if let Err(error) = runtime.block_on(body) {
                    // If nobody waits for it any more, the agent is ending.
                    let _ = report.send(error);
                }
            })
            .context("start the metrics thread")?;
        Ok(Self { failed: Some(failed), stop: Some(stop), thread: Some(thread) })
    }

    /// Resolves when it can serve no more; the first one that is asked for.
    pub fn failed(&mut self) -> impl Future<Output = anyhow::Error> + use<> {
        let failed = self.failed.take();
        async move {
            match failed {
                Some(failed) => failed.await.unwrap_or_else(|_| anyhow::anyhow!("the metrics thread has ended")),
                None => std::future::pending().await,
            }
        }
    }

    /// Ends it, and waits for the end.
    pub fn stop(mut self) {
        self.end();
    }

    fn end(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            warn!("the metrics thread panicked");
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.end();
    }
}

async fn answer(request: Request<Incoming>, state: Arc<State>) -> Result<Response<Full<Bytes>>, Infallible> {
    let plain = |status: StatusCode, text: &'static str| {
        let mut response = Response::new(Full::from(text));
        *response.status_mut() = status;
        response
    };
    Ok(match (request.method(), request.uri().path()) {
        (&Method::GET | &Method::HEAD, "/metrics" | "/stats/prometheus") => {
            let accepts = request.headers().get_all(header::ACCEPT).iter();
            let open_metrics = accepts
                .into_iter()
                .any(|value| value.to_str().is_ok_and(|value| value.contains("application/openmetrics-text")));
            let text = text(&state).await;
            let (body, kind) = match open_metrics {
                true => (text, OPEN_METRICS),
                false => (prometheus(&text).into(), PROMETHEUS),
            };
            let mut response = Response::new(Full::from(body));
            response.headers_mut().insert(header::CONTENT_TYPE, kind);
            response
        }
        (_, "/metrics" | "/stats/prometheus") => plain(StatusCode::METHOD_NOT_ALLOWED, "only GET and HEAD\n"),
        _ => plain(StatusCode::NOT_FOUND, "only /metrics and /stats/prometheus are here\n"),
    })
}

/// The text in the OpenMetrics format, at most [`FRESH`] old. Those who ask meanwhile wait for the one that makes it.
async fn text(state: &State) -> Bytes {
    let mut last = state.last.lock().await;
    if let Some((made, text)) = &*last
        && made.elapsed() < FRESH
    {
        return text.clone();
    }
    let (reply, answered) = oneshot::channel();
    let asked = async {
        state.control.send(Question::Node(reply)).await.ok()?;
        answered.await.ok()
    };
    let node = timeout(CONTROL_PATIENCE, asked).await.ok().flatten();
    // Writing into a String fails for want of memory only, which ends the process anyway.
    let text: Bytes = metrics::collect(&state.sources, node.as_deref()).encode().unwrap_or_default().into();
    *last = Some((Instant::now(), text.clone()));
    text
}

/// From OpenMetrics to Prometheus' own text format, in which a counter's name has its `_total` everywhere.
fn prometheus(open_metrics: &[u8]) -> String {
    let text = String::from_utf8_lossy(open_metrics);
    let mut out = String::with_capacity(text.len());
    let mut help = None;
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            help = rest.split_once(' ');
        } else if let Some((name, kind)) = line.strip_prefix("# TYPE ").and_then(|rest| rest.split_once(' ')) {
            let suffix = if kind == "counter" { "_total" } else { "" };
            if let Some((of, help)) = help.take().filter(|(of, _)| *of == name) {
                out += &format!("# HELP {of}{suffix} {help}\n");
            }
            out += &format!("# TYPE {name}{suffix} {kind}\n");
        } else if !line.starts_with('#') {
            out += line;
            out.push('\n');
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_older_format_has_total_in_the_name_of_the_family() {
        let open_metrics = b"# HELP a Words of a\n# TYPE a counter\na_total{b=\"# c\"} 1\n# HELP d Words\n# TYPE d gauge\nd 2\n# EOF\n";
        assert_eq!(
            prometheus(open_metrics),
            "# HELP a_total Words of a\n# TYPE a_total counter\na_total{b=\"# c\"} 1\n# HELP d Words\n# TYPE d gauge\nd 2\n"
        );
    }
}
