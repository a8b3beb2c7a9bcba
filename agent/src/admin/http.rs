//! The answers on the loopback interface: one request per connection, few at a time, each within its time.
//!
//! A browser on the node could be made to ask by a page from anywhere. What a page sends carries `Origin` or says that it
//! comes from another site, and a name that was made to lead to this node is in `Host`: all three are refused.

use std::{
    convert::Infallible,
    io,
    net::IpAddr,
    path::Path,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, Method, Request, Response, StatusCode, header, uri::Authority};
use http_body_util::Full;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use serde::Serialize;
use tokio::{
    net::TcpListener,
    sync::{OwnedSemaphorePermit, Semaphore, watch},
};
use tracing::{debug, info, warn};

use super::{Handles, dump, printable, process, strict, why};
use crate::telemetry::{LogLevel, answering, readiness::Ready};

/// Connections at a time. One more costs the oldest its place.
const CONNECTIONS: usize = 32;
/// For the head of a request.
const HEAD_PATIENCE: Duration = Duration::from_secs(5);
/// For one connection, from accept to the last byte.
const PATIENCE: Duration = Duration::from_secs(60);
/// Request line and headers, bytes.
const HEAD_BYTES: usize = 16 << 10;
/// Large answers in memory at a time, and how long one more waits for its turn.
const LARGE: usize = 2;
const LARGE_PATIENCE: Duration = Duration::from_secs(10);

const HELP: &str = "\
culvert agent: what it believes, for the operators of this node

GET  /config_dump           workloads, services, policies, certificates (never keys), the kernel's maps, settings; JSON
GET  /connections           open connections of this node's pods with their bytes so far; JSON
GET  /capture_proof         sockets of this node's pods that are not the mesh's, and what accounts for the others; JSON
GET  /refusals              connections that were refused in the last hour, and what would allow them; JSON
GET  /why?from=A&to=B       what would happen to a connection: from=NAMESPACE/POD, to=NAMESPACE/POD:PORT, or addresses; JSON
GET  /strict?within=SECONDS workloads that can go to STRICT, clients that stand in the way, manifests; JSON
GET  /logging               the log level in force
POST /logging?level=FILTER  another log level, at once: info, or info,culvert::tunnel=debug
GET  /readyz                where each part of the agent stands; 503 while something is missing
GET  /help                  this text
";

/// What the answers are made from. Clones are the same.
#[derive(Clone)]
pub struct State {
    handles: watch::Receiver<Option<Arc<Handles>>>,
    ready: Ready,
    level: LogLevel,
    large: Arc<Semaphore>,
}

impl State {
    /// `handles` are `None` until the agent has started.
    pub fn new(handles: watch::Receiver<Option<Arc<Handles>>>, ready: Ready, level: LogLevel) -> Self {
        Self { handles, ready, level, large: Arc::new(Semaphore::new(LARGE)) }
    }
}

/// Answers until `stop` completes, and then finishes the answers that are under way; dropping it gives them up.
///
/// # Errors
/// The listener is broken; a shortage of descriptors or memory is waited for.
pub async fn serve(listener: TcpListener, state: State, stop: impl Future<Output = ()>) -> io::Result<()> {
    answering::serve(listener, CONNECTIONS, PATIENCE, stop, |stream| {
        let state = state.clone();
        answering::http1(stream, HEAD_PATIENCE, HEAD_BYTES, move |request| answer(request, state.clone()))
    })
    .await
}

/// A body that keeps its place among the large ones until it is sent or given up.
struct Held {
    bytes: Full<Bytes>,
    _place: Option<OwnedSemaphorePermit>,
}

impl Body for Held {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        Pin::new(&mut self.bytes).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.bytes.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.bytes.size_hint()
    }
}

const TEXT: &str = "text/plain; charset=utf-8";
const JSON: &str = "application/json";

fn response(
    status: StatusCode,
    kind: &'static str,
    bytes: Bytes,
    place: Option<OwnedSemaphorePermit>,
) -> Response<Held> {
    let mut response = Response::new(Held { bytes: Full::new(bytes), _place: place });
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, header::HeaderValue::from_static(kind));
    headers.insert(header::CACHE_CONTROL, header::HeaderValue::from_static("no-store"));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, header::HeaderValue::from_static("nosniff"));
    response
}

/// One line, or several, for people. Names in it come from the cluster.
fn text(status: StatusCode, text: &str) -> Response<Held> {
    let lines: Vec<_> = text.lines().map(printable).collect();
    response(status, TEXT, (lines.join("\n") + "\n").into(), None)
}

async fn answer(request: Request<Incoming>, state: State) -> Result<Response<Held>, Infallible> {
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let answer = route(request, state).await;
    debug!(%method, path, status = answer.status().as_u16(), "an operator asked");
    Ok(answer)
}

async fn route(request: Request<Incoming>, state: State) -> Response<Held> {
    if let Err(why) = is_local(request.headers()) {
        return text(StatusCode::FORBIDDEN, &why);
    }
    let reading = matches!(*request.method(), Method::GET | Method::HEAD);
    match request.uri().path() {
        "/" | "/help" if reading => text(StatusCode::OK, HELP),
        "/readyz" if reading => {
            let missing = state.ready.missing();
            let handles = state.handles.borrow().clone();
            let status = if missing.is_empty() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
            let mut response = text(status, &dump::readiness(&missing, handles.as_deref()));
            if let Some(process) = process::Process::of(Path::new("/proc"), "self")
                .ok()
                .and_then(|own| header::HeaderValue::try_from(own.to_string()).ok())
            {
                response.headers_mut().insert(process::HEADER, process);
            }
            response
        }
        "/logging" if reading => match state.level.get() {
            Ok(level) => text(StatusCode::OK, &level),
            Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, &format!("{error:#}")),
        },
        "/logging" if *request.method() == Method::POST => set_level(&state, request.uri().query()),
        "/config_dump" if reading => {
            large(&state, async |handles| Ok(handles), |handles| dump::Dump::of(&handles)).await
        }
        "/connections" if reading => {
            let list =
                async |handles: Arc<Handles>| match tokio::time::timeout(LARGE_PATIENCE, handles.connections.list())
                    .await
                {
                    Ok(records) => records,
                    Err(_) => anyhow::bail!("the agent did not look at its connections in time"),
                };
            large(&state, list, |records| records).await
        }
        "/capture_proof" if reading => {
            let prove =
                async |handles: Arc<Handles>| match tokio::time::timeout(LARGE_PATIENCE, handles.connections.prove())
                    .await
                {
                    Ok(proof) => proof,
                    Err(_) => anyhow::bail!("the agent did not look at its pods' sockets in time"),
                };
            large(&state, prove, |proof| proof).await
        }
        "/refusals" if reading => {
            let refused = async |handles: Arc<Handles>| {
                let refused = in_time(handles.connections.refused()).await?;
                Ok((handles, refused))
            };
            large(&state, refused, |(handles, refused)| {
                let looked = Looked::of(&handles);
                why::refusals(&looked.mesh(&handles), &refused, handles.started_at)
            })
            .await
        }
        "/strict" if reading => {
            let within = match value(request.uri().query(), "within").map(|text| text.parse().map(Duration::from_secs))
            {
                None => None,
                Some(Ok(within)) => Some(within),
                Some(Err(_)) => return text(StatusCode::BAD_REQUEST, "within must be a number of seconds"),
            };
            let seen = async |handles: Arc<Handles>| {
                let seen = in_time(handles.connections.strictness()).await?;
                Ok((handles, seen))
            };
            large(&state, seen, move |(handles, seen)| {
                let looked = Looked::of(&handles);
                strict::report(&looked.mesh(&handles), &seen, handles.started_at, within)
            })
            .await
        }
        "/why" if reading => explain(&state, request.uri().query()).await,
        path @ ("/" | "/help" | "/readyz" | "/logging" | "/config_dump" | "/connections" | "/capture_proof"
        | "/refusals" | "/strict" | "/why") => {
            let allow = if path == "/logging" { "GET, HEAD, POST" } else { "GET, HEAD" };
            let mut response = text(StatusCode::METHOD_NOT_ALLOWED, &format!("only {allow}"));
            response.headers_mut().insert(header::ALLOW, header::HeaderValue::from_static(allow));
            response
        }
        _ => text(StatusCode::NOT_FOUND, "not here; GET /help lists what is"),
    }
}

/// What the agent goes by at this moment, held while an answer is made from it.
struct Looked {
    snapshot: Arc<crate::policy::Snapshot>,
    view: Arc<crate::source::View>,
    states: Arc<std::collections::BTreeMap<crate::model::PodUid, crate::enroll::State>>,
}

impl Looked {
    fn of(handles: &Handles) -> Self {
        Self {
            snapshot: handles.snapshot.borrow().clone(),
            view: handles.views.borrow().clone(),
            states: handles.enrolled.borrow().clone(),
        }
    }

    fn mesh<'a>(&'a self, handles: &'a Handles) -> why::Mesh<'a> {
        why::Mesh {
            snapshot: &self.snapshot,
            view: &self.view,
            options: &handles.options,
            states: &self.states,
            node: &handles.node_name,
        }
    }
}

async fn in_time<T>(looked: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    match tokio::time::timeout(LARGE_PATIENCE, looked).await {
        Ok(found) => found,
        Err(_) => anyhow::bail!("the agent did not look at its connections in time"),
    }
}

/// What would happen to a connection: a question that names nobody is answered by what is wrong with it.
async fn explain(state: &State, query: Option<&str>) -> Response<Held> {
    let Some(handles) = state.handles.borrow().clone() else {
        let missing = state.ready.missing().join(", ");
        return text(StatusCode::SERVICE_UNAVAILABLE, &format!("the agent is starting, waiting for: {missing}"));
    };
    let refused = match in_time(handles.connections.refused()).await {
        Ok(refused) => refused,
        Err(error) => return text(StatusCode::SERVICE_UNAVAILABLE, &format!("{error:#}")),
    };
    let answer = || {
        let named = |name: &str| value(query, name).ok_or_else(|| format!("{name} is missing: /why?from=A&to=B:PORT"));
        let (from, to) = (why::client(&named("from")?)?, why::server(&named("to")?)?);
        let namespace = value(query, "namespace").unwrap_or_else(|| "default".to_owned());
        let looked = Looked::of(&handles);
        let mesh = looked.mesh(&handles);
        let (client, server) = (mesh.find(&from, &namespace, false)?, mesh.find(&to.0, &namespace, true)?);
        let all = why::explain(&mesh, &client, &server, to.1, &refused)?;
        serde_json::to_vec_pretty(&all).map_err(|error| error.to_string())
    };
    match answer() {
        Ok(mut json) => {
            json.push(b'\n');
            response(StatusCode::OK, JSON, json.into(), None)
        }
        Err(why) => text(StatusCode::BAD_REQUEST, &why),
    }
}

/// A value of a query, if it is there and can be decoded.
fn value(query: Option<&str>, name: &str) -> Option<String> {
    let pairs = query.unwrap_or_default().split('&');
    pairs.filter_map(|pair| pair.split_once('=')).find(|(of, _)| *of == name).and_then(|(_, value)| decoded(value))
}

/// An answer whose size is the cluster's, few at a time: what `gather` finds, made into a document by `make` on a thread of
/// the runtime's pool.
async fn large<G: Send + 'static, T: Serialize>(
    state: &State,
    gather: impl AsyncFnOnce(Arc<Handles>) -> anyhow::Result<G>,
    make: impl FnOnce(G) -> T + Send + 'static,
) -> Response<Held> {
    let Some(handles) = state.handles.borrow().clone() else {
        let missing = state.ready.missing().join(", ");
        return text(StatusCode::SERVICE_UNAVAILABLE, &format!("the agent is starting, waiting for: {missing}"));
    };
    let Ok(Ok(place)) = tokio::time::timeout(LARGE_PATIENCE, state.large.clone().acquire_owned()).await else {
        return text(StatusCode::SERVICE_UNAVAILABLE, "others are reading large answers; try again");
    };
    let found = match gather(handles).await {
        Ok(found) => found,
        Err(error) => return text(StatusCode::SERVICE_UNAVAILABLE, &format!("{error:#}")),
    };
    let made = tokio::task::spawn_blocking(move || (serde_json::to_vec_pretty(&make(found)), place)).await;
    match made {
        Ok((Ok(mut json), place)) => {
            json.push(b'\n');
            response(StatusCode::OK, JSON, json.into(), Some(place))
        }
        Ok((Err(error), _)) => text(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string()),
        Err(error) => {
            // A panic while looking must not end the agent, and must not stay unseen.
            warn!(%error, "an answer for operators could not be made");
            text(StatusCode::INTERNAL_SERVER_ERROR, "the answer could not be made; the agent's log says more")
        }
    }
}

fn set_level(state: &State, query: Option<&str>) -> Response<Held> {
    let level = query.unwrap_or_default().split('&').find_map(|pair| pair.strip_prefix("level="));
    let Some(level) = level.and_then(decoded) else {
        return text(
            StatusCode::BAD_REQUEST,
            "which level? POST /logging?level=info, or level=info,culvert::tunnel=debug",
        );
    };
    let before = state.level.get().unwrap_or_default();
    match state.level.set(&level).and_then(|()| state.level.get()) {
        Ok(now) => {
            info!(before, now, "log level changed");
            text(StatusCode::OK, &now)
        }
        Err(error) => text(StatusCode::BAD_REQUEST, &format!("{error:#}").replace('\n', " ")),
    }
}

/// A value of a query, percent-decoded; `None` if it is not.
fn decoded(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'%' => {
                let digits = [rest.next()?, rest.next()?];
                u8::from_str_radix(std::str::from_utf8(&digits).ok()?, 16).ok()?
            }
            byte => byte,
        });
    }
    String::from_utf8(bytes).ok()
}

/// Whether a request comes from a program of this node, and not from a page in a browser.
fn is_local(headers: &HeaderMap) -> Result<(), String> {
    let field = |name| headers.get(name).map(|value: &header::HeaderValue| String::from_utf8_lossy(value.as_bytes()));
    if let Some(origin) = field("origin") {
        return Err(format!("requests of web pages are refused (Origin: {origin})"));
    }
    if let Some(site) = field("sec-fetch-site").filter(|site| !matches!(&**site, "none" | "same-origin")) {
        return Err(format!("requests of web pages are refused (Sec-Fetch-Site: {site})"));
    }
    let host = field("host").unwrap_or_default();
    let name = host.parse::<Authority>().ok();
    let name = name.as_ref().map_or("", |authority| authority.host().trim_start_matches('[').trim_end_matches(']'));
    let local = name.eq_ignore_ascii_case("localhost") || name.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback());
    match local && headers.get_all(header::HOST).iter().count() == 1 {
        true => Ok(()),
        false => Err(format!("the host must be localhost or a loopback address, not {host:?}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        pairs
            .iter()
            .map(|(name, value)| (header::HeaderName::from_static(name), value.parse().expect("a value")))
            .collect()
    }

    #[test]
    fn only_programs_of_the_node_are_answered() {
        for host in ["127.0.0.1:15000", "localhost:15000", "LOCALHOST", "[::1]:15000", "127.9.9.9"] {
            is_local(&headers(&[("host", host)])).expect(host);
            is_local(&headers(&[("host", host), ("sec-fetch-site", "none")])).expect(host);
        }
        for host in
            ["", "evil.example:15000", "10.0.0.1:15000", "localhost.evil.example", "127.0.0.1.evil.example", "user@"]
        {
            assert!(is_local(&headers(&[("host", host)])).is_err(), "{host}");
        }
        assert!(is_local(&headers(&[])).is_err());
        for page in [("origin", "http://127.0.0.1:15000"), ("origin", "null"), ("sec-fetch-site", "cross-site")] {
            assert!(is_local(&headers(&[("host", "127.0.0.1:15000"), page])).is_err(), "{page:?}");
        }
    }

    #[test]
    fn queries_are_decoded() {
        assert_eq!(decoded("info%2Cculvert%3A%3Atunnel=debug").as_deref(), Some("info,culvert::tunnel=debug"));
        for wrong in ["%", "%4", "%zz", "%ff"] {
            assert_eq!(decoded(wrong), None, "{wrong}");
        }
    }
}
