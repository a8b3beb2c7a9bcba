//! gRPC through tonic: one bidirectional stream, `culvert.test.Echo/Talk`, without generated code.

use std::convert::Infallible;
use std::future::{Ready, ready};
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context as TaskContext, Poll};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use culvert_tests::programs::Conversation;
use futures_util::{Stream, future::BoxFuture, stream};
use http::uri::PathAndQuery;
use tokio::sync::mpsc;
use tonic::server::StreamingService;
use tonic::transport::{Endpoint, Server};
use tonic::{Request, Response, Status, Streaming};
use tonic_prost::ProstCodec;
use tower::Service;

use super::Talk;

const METHOD: &str = "/culvert.test.Echo/Talk";

/// One message, either way.
#[derive(Clone, PartialEq, prost::Message)]
struct Line {
    #[prost(uint64, tag = "1")]
    number: u64,
    #[prost(string, tag = "2")]
    text: String,
}

pub(crate) fn serve(listen: SocketAddr) -> Result<()> {
    runtime()?
        .block_on(async { Server::builder().serve(listen, Echo).await.with_context(|| format!("serve on {listen}")) })
}

fn runtime() -> Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build().context("start a runtime")
}

/// The service: its one method sends every line back.
#[derive(Clone)]
struct Echo;

impl Service<http::Request<tonic::body::Body>> for Echo {
    type Response = http::Response<tonic::body::Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Self::Error>>;

    fn poll_ready(&mut self, _: &mut TaskContext<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<tonic::body::Body>) -> Self::Future {
        Box::pin(async move {
            if request.uri().path() != METHOD {
                return Ok(Status::unimplemented("no such method").into_http());
            }
            let mut grpc = tonic::server::Grpc::new(ProstCodec::<Line, Line>::default());
            Ok(grpc.streaming(Echo, request).await)
        })
    }
}

impl StreamingService<Line> for Echo {
    type Response = Line;
    type ResponseStream = Pin<Box<dyn Stream<Item = Result<Line, Status>> + Send>>;
    type Future = Ready<Result<Response<Self::ResponseStream>, Status>>;

    fn call(&mut self, request: Request<Streaming<Line>>) -> Self::Future {
        ready(Ok(Response::new(Box::pin(request.into_inner()))))
    }
}

pub(crate) fn talk(talk: &Talk) -> Result<Conversation> {
    let mut told = Conversation::default();
    let begun = Instant::now();
    let result = runtime()?.block_on(converse(talk, &mut told));
    Ok(told.finish(begun, result))
}

async fn converse(talk: &Talk, told: &mut Conversation) -> Result<()> {
    let endpoint = Endpoint::from_shared(format!("http://{}", talk.to))?.connect_timeout(talk.limit());
    let mut grpc = tonic::client::Grpc::new(endpoint.connect().await.context("connect")?);
    grpc.ready().await.context("wait for the connection")?;
    let (lines, queue) = mpsc::channel::<Line>(1);
    let queue = stream::unfold(queue, |mut queue| async move { queue.recv().await.map(|line| (line, queue)) });
    let codec = ProstCodec::<Line, Line>::default();
    let answer = grpc.streaming(Request::new(queue), PathAndQuery::from_static(METHOD), codec);
    let mut answers = tokio::time::timeout(talk.limit(), answer).await.context("no headers came")??.into_inner();
    let begun = Instant::now();
    while begun.elapsed() < talk.hold() {
        let line = Line { number: told.messages, text: talk.message(told.messages) };
        let sent = Instant::now();
        lines.send(line.clone()).await.context("the stream takes no more lines")?;
        let back = tokio::time::timeout(talk.limit(), answers.message()).await.context("no answer came")??;
        ensure!(back.as_ref() == Some(&line), "another line came back");
        told.answered(sent);
        tokio::time::sleep(talk.interval()).await;
    }
    // A half-close; the server's status must follow.
    drop(lines);
    let end =
        tokio::time::timeout(talk.limit(), answers.message()).await.context("the stream's end did not come")??;
    ensure!(end.is_none(), "a line after the end");
    Ok(())
}
