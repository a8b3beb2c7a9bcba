//! Accepts on a port of the node and answers, a bounded number at a time and each within its time; what is asked and what
//! is answered is the caller's business.

use std::{collections::VecDeque, convert::Infallible, io, time::Duration};

use http::{Request, Response};
use hyper::{
    body::{Body, Incoming},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    task::{AbortHandle, JoinSet},
};

/// Pause after a failed accept, in which a shortage may pass.
const PAUSE: Duration = Duration::from_millis(50);

/// Hands every connection to `answer`, until `stop` completes; then finishes the answers that are under way. Dropping it
/// gives them up.
///
/// `places` connections at a time: one more costs the oldest its place, so that nobody who dawdles keeps others out. Each
/// gets `patience`, from accept to the last byte.
///
/// # Errors
/// The listener is broken; a shortage of descriptors or memory is waited for.
pub(crate) async fn serve<F>(
    listener: TcpListener,
    places: usize,
    patience: Duration,
    stop: impl Future<Output = ()>,
    answer: impl Fn(TcpStream) -> F,
) -> io::Result<()>
where
    F: Future<Output = ()> + Send + 'static,
{
    let mut connections = JoinSet::new();
    let mut by_age: VecDeque<AbortHandle> = VecDeque::new();
    let mut stop = std::pin::pin!(stop);
    loop {
        tokio::select! {
            () = &mut stop => break,
            Some(_) = connections.join_next(), if !connections.is_empty() => {}
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    by_age.retain(|connection| !connection.is_finished());
                    if by_age.len() >= places
                        && let Some(oldest) = by_age.pop_front()
                    {
                        oldest.abort();
                    }
                    let answered = tokio::time::timeout(patience, answer(stream));
                    // A client that went away or dawdled gets no answer, and nobody needs to know.
                    by_age.push_back(connections.spawn(async move { drop(answered.await) }));
                }
                Err(error) if is_passing(&error) => tokio::time::sleep(PAUSE).await,
                Err(error) => return Err(error),
            },
        }
    }
    drop(listener);
    while connections.join_next().await.is_some() {}
    Ok(())
}

/// Answers one request of HTTP/1.1, in TLS or not: its head must come within `head_patience` and in `head_bytes`.
pub(crate) async fn http1<S, F, B>(
    stream: S,
    head_patience: Duration,
    head_bytes: usize,
    answer: impl Fn(Request<Incoming>) -> F,
) where
    S: AsyncRead + AsyncWrite + Unpin,
    F: Future<Output = Result<Response<B>, Infallible>>,
    B: Body<Data: Send, Error: std::error::Error + Send + Sync> + 'static,
{
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(head_patience)
        .max_buf_size(head_bytes)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), service_fn(answer));
    // A client that went away gets no answer, and nobody needs to know.
    let _ = connection.await;
}

/// Whether an error of accept() concerns one connection, or a shortage that passes.
fn is_passing(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(
            libc::ECONNABORTED
                | libc::EINTR
                | libc::EMFILE
                | libc::ENFILE
                | libc::ENOBUFS
                | libc::ENOMEM
                | libc::EPROTO
                | libc::ENETDOWN
                | libc::EHOSTUNREACH
                | libc::ENETUNREACH
        )
    )
}
