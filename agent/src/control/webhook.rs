//! The validating webhook: an API server asks before it stores a policy, so that whoever writes a wrong one hears at
//! once where and what to do.
//!
//! What is asked and answered is in `review`, who API servers trust in `trusted`; here is the server around them: TLS,
//! limits, and one log line for each refusal, as long as they are not too many. The webhook's configuration has
//! failurePolicy Ignore: without an answer, or with an error for one, an object is stored, and agents judge it as ever.
//! So what cannot be judged is an error here, and nothing is guessed. Whoever reaches the port may ask: an answer
//! depends on the question alone.

mod review;
#[cfg(test)]
mod tests;
mod trusted;

use std::{net::SocketAddr, sync::Arc, time::Duration};

use anyhow::Context as _;
use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt as _, Full, LengthLimitError, Limited};
use hyper::body::{Body as _, Incoming};
use rustls::ServerConfig;
use serde_json::Value as Json;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    time::timeout,
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tracing::info;

use self::review::{Answer, Unread};
use crate::{ca::Restraint, source::review::Judged, telemetry::answering};

pub(super) use self::trusted::keep_trusted;

/// Where reviews are asked for.
const PATH: &str = "/validate";
/// Connections at a time. One more costs the oldest its place.
const CONNECTIONS: usize = 32;
/// For a TLS handshake, and for the head of a request.
const HEAD_PATIENCE: Duration = Duration::from_secs(5);
/// For one connection, from accept to the last byte: twice what the webhook's configuration has an API server wait.
const PATIENCE: Duration = Duration::from_secs(10);
/// Request line and headers, bytes.
const HEAD_BYTES: usize = 16 << 10;
/// Body of a request, bytes: what an API server takes itself. etcd's limit for an object is half of it, and a review of
/// a change has two.
const BODY_BYTES: usize = 3 << 20;

/// Says what is wrong with an object as an API server sends it.
pub(super) type Judge = dyn Fn(Json) -> Judged + Send + Sync;

/// Answers reviews until `shutdown` completes, and then finishes the answers that are under way, within 10 s; dropping
/// it gives them up. `tls` is to offer no HTTP/2.
///
/// # Errors
/// The listener is broken; a shortage of descriptors or memory is waited for.
pub(super) async fn serve(
    listener: TcpListener,
    tls: Arc<ServerConfig>,
    judge: Arc<Judge>,
    shutdown: impl Future<Output = ()>,
) -> anyhow::Result<()> {
    let webhook = Arc::new(Webhook {
        acceptor: TlsAcceptor::from(tls),
        judge,
        turn: Arc::new(Semaphore::new(1)),
        restraint: Restraint::new(),
    });
    let answered = answering::serve(listener, CONNECTIONS, PATIENCE, shutdown, |stream| {
        let webhook = webhook.clone();
        async move { webhook.connection(stream).await }
    });
    tokio::select! {
        result = answered => result.context("serve the validating webhook"),
        never = webhook.restraint.tell_on() => match never {},
    }
}

/// What answers a request.
struct Webhook {
    acceptor: TlsAcceptor,
    judge: Arc<Judge>,
    /// One object is judged at a time: a large one takes many times its size in memory meanwhile.
    turn: Arc<Semaphore>,
    restraint: Restraint,
}

impl Webhook {
    async fn connection(&self, stream: TcpStream) {
        let peer = stream.peer_addr().ok();
        if let Some(tls) = self.handshake(stream, peer).await {
            let answer = |request| async move { Ok(self.answer(request, peer).await) };
            answering::http1(tls, HEAD_PATIENCE, HEAD_BYTES, answer).await;
        }
    }

    async fn handshake(&self, stream: TcpStream, peer: Option<SocketAddr>) -> Option<TlsStream<TcpStream>> {
        match timeout(HEAD_PATIENCE, self.acceptor.accept(stream)).await {
            Ok(Ok(tls)) => return Some(tls),
            Ok(Err(error)) if self.restraint.admits("webhook-handshake-failed") => {
                info!(?peer, %error, "TLS handshake of the webhook failed");
            }
            Err(_) if self.restraint.admits("webhook-handshake-timeout") => {
                info!(?peer, "TLS handshake of the webhook took too long");
            }
            Ok(Err(_)) | Err(_) => {}
        }
        None
    }

    async fn answer(&self, request: Request<Incoming>, peer: Option<SocketAddr>) -> Response<Full<Bytes>> {
        match self.review(request).await {
            Ok(answer) => {
                if let Some(refused) = &answer.refused
                    && self.restraint.admits("webhook-refused")
                {
                    info!(
                        object = refused.object,
                        user = refused.user,
                        dry_run = refused.dry_run,
                        fault = refused.fault,
                        faults = refused.faults,
                        "an object was refused before it was stored"
                    );
                }
                response(StatusCode::OK, "application/json", answer.json)
            }
            Err(failed) => {
                if self.restraint.admits("webhook-failed") {
                    info!(?peer, reason = failed.text(), "the webhook was asked something that it cannot answer");
                }
                failed.response()
            }
        }
    }

    async fn review(&self, request: Request<Incoming>) -> Result<Answer, Failed> {
        if request.uri().path() != PATH {
            return Err(Failed::NoSuchPath);
        }
        if request.method() != Method::POST {
            return Err(Failed::NoSuchMethod);
        }
        let body = whole(request.into_body()).await?;
        // The semaphore is never closed.
        let turn = self.turn.clone().acquire_owned().await.map_err(|_| Failed::Defect)?;
        let judge = self.judge.clone();
        // Not here: what is made to be judged slowly must not make the CA slow.
        let judging = tokio::task::spawn_blocking(move || {
            let _turn = turn;
            review::answer(&body, &*judge)
        });
        // A panic; the hook has told and counted it.
        judging.await.map_err(|_| Failed::Defect)?.map_err(Failed::from)
    }
}

async fn whole(body: Incoming) -> Result<Bytes, Failed> {
    // Who says so before gets the answer before.
    if body.size_hint().lower() > BODY_BYTES as u64 {
        return Err(Failed::TooLarge);
    }
    match Limited::new(body, BODY_BYTES).collect().await {
        Ok(whole) => Ok(whole.to_bytes()),
        Err(error) if error.is::<LengthLimitError>() => Err(Failed::TooLarge),
        Err(error) => Err(Failed::NoReview(error.to_string())),
    }
}

/// Why there is no review.
#[derive(Debug)]
enum Failed {
    NoSuchPath,
    NoSuchMethod,
    TooLarge,
    NoReview(String),
    /// Of this program.
    Defect,
}

impl From<Unread> for Failed {
    fn from(unread: Unread) -> Self {
        match unread {
            Unread::NoReview(why) => Self::NoReview(why),
            Unread::TooLarge => Self::TooLarge,
        }
    }
}

impl Failed {
    fn status(&self) -> StatusCode {
        match self {
            Self::NoSuchPath => StatusCode::NOT_FOUND,
            Self::NoSuchMethod => StatusCode::METHOD_NOT_ALLOWED,
            Self::TooLarge => StatusCode::PAYLOAD_TOO_LARGE,
            Self::NoReview(_) => StatusCode::BAD_REQUEST,
            Self::Defect => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }

    /// One line, which may show a little of what was sent.
    fn text(&self) -> String {
        match self {
            Self::NoSuchPath => format!("there is only POST {PATH}"),
            Self::NoSuchMethod => format!("{PATH} takes POST"),
            Self::TooLarge => {
                format!(
                    "a review of more than {} MiB, or with an object of more than {} values, is not judged",
                    BODY_BYTES >> 20,
                    review::MAX_VALUES
                )
            }
            Self::NoReview(why) => {
                format!("not an AdmissionReview of admission.k8s.io/v1: {}", review::cut(why, review::MAX_WHY))
            }
            Self::Defect => "judging the object failed by a defect of this program".to_owned(),
        }
    }

    fn response(&self) -> Response<Full<Bytes>> {
        let mut response = response(self.status(), "text/plain; charset=utf-8", self.text() + "\n");
        if matches!(self, Self::NoSuchMethod) {
            response.headers_mut().insert(header::ALLOW, HeaderValue::from_static("POST"));
        }
        response
    }
}

fn response(status: StatusCode, kind: &'static str, body: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    response
}
