//! Readiness: a set of named holds, and the HTTP answer that a kubelet asks for.
//!
//! Whoever has something to do before the agent may be called ready takes a [`Hold`] and drops it when that is done.
//! Holds may be taken again later (while draining, or when a source is lost).

use std::{
    collections::BTreeMap,
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use super::answering;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

/// The set of holds; ready when it is empty. Clones are the same set.
#[derive(Clone, Debug, Default)]
pub struct Ready {
    holds: Arc<Mutex<Holds>>,
}

#[derive(Debug, Default)]
struct Holds {
    next: u64,
    names: BTreeMap<u64, String>,
    remarks: Vec<String>,
}

/// One reason not to be ready, until dropped.
#[derive(Debug)]
#[must_use = "dropping a hold satisfies it"]
pub struct Hold {
    ready: Ready,
    id: u64,
}

impl Ready {
    /// Takes a hold; the name is what an operator reads in the answer: `first full read of the manifests`.
    pub fn hold(&self, name: impl Into<String>) -> Hold {
        let mut holds = self.lock();
        let id = holds.next;
        holds.next += 1;
        holds.names.insert(id, name.into());
        Hold { ready: self.clone(), id }
    }

    /// Names of what is missing, oldest hold first; empty when ready.
    pub fn missing(&self) -> Vec<String> {
        self.lock().names.values().cloned().collect()
    }

    /// Whether nothing is missing.
    pub fn is_ready(&self) -> bool {
        self.lock().names.is_empty()
    }

    /// What is not as it should be, and no reason not to be ready; it is shown below the answer until there are other ones.
    pub fn remark(&self, remarks: Vec<String>) {
        self.lock().remarks = remarks;
    }

    /// What was last given to [`remark`](Self::remark).
    pub fn remarks(&self) -> Vec<String> {
        self.lock().remarks.clone()
    }

    fn lock(&self) -> MutexGuard<'_, Holds> {
        // Nothing panics while holding the lock, and the set is whole after every statement.
        self.holds.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.ready.lock().names.remove(&self.id);
    }
}

/// Connections answered at a time. One more costs the oldest its place, so that a kubelet is heard whoever else calls.
const CONNECTIONS: usize = 64;
/// For one connection, from accept to the last byte.
const PATIENCE: Duration = Duration::from_secs(5);
/// Request line and headers.
const HEAD_BYTES: usize = 8 << 10;

/// Answers `GET /healthz/ready`: 200, or 503 with what is missing, one name per line; both with what is not as it should be,
/// likewise; until `stop` completes. A
/// draining agent takes a hold and stops this last, so that it is seen to be not ready rather than gone.
///
/// One request per connection. A request that is too long, too slow or not understood is refused and harms no other.
///
/// # Errors
/// The listener is broken; a shortage of descriptors or memory is waited for.
pub async fn serve(listener: TcpListener, ready: Ready, stop: impl Future<Output = ()>) -> io::Result<()> {
    answering::serve(listener, CONNECTIONS, PATIENCE, stop, |stream| {
        let ready = ready.clone();
        async move {
            // As there: who went away needs no answer.
            let _ = answer(stream, &ready).await;
        }
    })
    .await
}

async fn answer(mut stream: TcpStream, ready: &Ready) -> io::Result<()> {
    let mut head = Vec::with_capacity(1024);
    let complete = loop {
        if head.windows(4).any(|window| window == b"\r\n\r\n") {
            break true;
        }
        if head.len() >= HEAD_BYTES || stream.read_buf(&mut head).await? == 0 {
            break false;
        }
    };
    let line = head.split(|byte| *byte == b'\r').next().unwrap_or_default();
    let parts: Vec<&[u8]> = line.split(|byte| *byte == b' ').collect();
    let (status, body, head_only) = match parts[..] {
        _ if head.is_empty() => return Ok(()),
        _ if !complete => {
            ("431 Request Header Fields Too Large", "request head is too long or cut off\n".into(), false)
        }
        [method, target, b"HTTP/1.1" | b"HTTP/1.0"] => {
            let path = target.split(|byte| *byte == b'?').next().unwrap_or_default();
            let missing = ready.missing();
            match (method, path) {
                (b"GET" | b"HEAD", b"/healthz/ready") => {
                    let (status, head) = match missing.is_empty() {
                        true => ("200 OK", "ready"),
                        false => ("503 Service Unavailable", "not ready, waiting for:"),
                    };
                    let lines = [head.to_owned()].into_iter().chain(missing).chain(ready.remarks());
                    (status, lines.map(|line| line + "\n").collect::<String>(), method == b"HEAD")
                }
                (_, b"/healthz/ready") => ("405 Method Not Allowed", "only GET and HEAD\n".into(), false),
                _ => ("404 Not Found", "only /healthz/ready is here\n".into(), false),
            }
        }
        _ => ("400 Bad Request", "not an HTTP/1.1 request\n".into(), false),
    };
    let allow = if status.starts_with("405") { "allow: GET, HEAD\r\n" } else { "" };
    let mut response = format!(
        "HTTP/1.1 {status}\r\ncontent-type: text/plain; charset=utf-8\r\ncontent-length: {}\r\n{allow}connection: close\r\n\r\n",
        body.len()
    );
    if !head_only {
        response.push_str(&body);
    }
    stream.write_all(response.as_bytes()).await?;
    stream.shutdown().await?;
    // Closing with unread bytes would be a reset that can overtake the answer.
    let mut rest = [0; 1024];
    let mut read = 0;
    while read < 64 << 10 {
        match stream.read(&mut rest).await? {
            0 => break,
            n => read += n,
        }
    }
    Ok(())
}

#[cfg(test)]
#[expect(clippy::disallowed_methods, reason = "a test awaits what it has started, or ends with it")]
mod tests {
    use std::net::SocketAddr;

    use super::*;

    async fn ask(addr: SocketAddr, request: &[u8]) -> String {
        let mut stream = TcpStream::connect(addr).await.expect("the server listens");
        stream.write_all(request).await.expect("the server reads");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.expect("an orderly end");
        answer
    }

    fn with_server<F: Future<Output = ()>>(scenario: impl FnOnce(SocketAddr, Ready) -> F) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(async {
            let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
            let addr = listener.local_addr().expect("bound");
            let ready = Ready::default();
            let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
            let server = tokio::spawn(serve(listener, ready.clone(), async {
                let _ = stopped.await;
            }));
            scenario(addr, ready).await;
            drop(stop);
            server.await.expect("no panic").expect("no error");
            assert!(TcpStream::connect(addr).await.is_err(), "the port is closed");
        });
    }

    const GET: &[u8] = b"GET /healthz/ready HTTP/1.1\r\nHost: x\r\n\r\n";

    #[test]
    fn the_answer_names_what_is_missing_until_nothing_is() {
        with_server(|addr, ready| async move {
            let read = ready.hold("first full read of the manifests");
            let roots = ready.hold("trust bundle");
            assert!(!ready.is_ready());
            let answer = ask(addr, GET).await;
            assert!(answer.starts_with("HTTP/1.1 503 "), "{answer}");
            assert!(answer.ends_with("waiting for:\nfirst full read of the manifests\ntrust bundle\n"), "{answer}");
            drop(read);
            assert_eq!(ready.missing(), ["trust bundle"]);
            drop(roots);
            assert!(ready.is_ready());
            let answer = ask(addr, GET).await;
            assert!(answer.starts_with("HTTP/1.1 200 OK\r\n") && answer.ends_with("\r\n\r\nready\n"), "{answer}");
            // And back.
            let _draining = ready.hold("draining");
            assert!(ask(addr, GET).await.starts_with("HTTP/1.1 503 "));
        });
    }

    #[test]
    fn two_holds_of_one_name_are_two() {
        let ready = Ready::default();
        let (a, b) = (ready.hold("x"), ready.hold("x"));
        drop(a);
        assert_eq!(ready.missing(), ["x"]);
        drop(b);
        assert!(ready.is_ready());
    }

    #[test]
    fn strange_requests_are_refused_and_harm_nobody() {
        with_server(|addr, _ready| async move {
            let long = [b"GET /healthz/ready HTTP/1.1\r\n".to_vec(), vec![b'x'; 20 << 10]].concat();
            for (request, status) in [
                (&b"GET / HTTP/1.1\r\n\r\n"[..], "404"),
                (b"POST /healthz/ready HTTP/1.1\r\ncontent-length: 0\r\n\r\n", "405"),
                (b"HEAD /healthz/ready HTTP/1.1\r\n\r\n", "200"),
                (b"GET /healthz/ready?verbose HTTP/1.0\r\n\r\n", "200"),
                (b"\x16\x03\x01\x02\x00\r\n\r\n", "400"),
                (b"GET /healthz/ready HTTP/2\r\n\r\n", "400"),
                (&long, "431"),
            ] {
                let answer = ask(addr, request).await;
                assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{status}: {answer}");
            }
            assert!(ask(addr, b"HEAD /healthz/ready HTTP/1.1\r\n\r\n").await.ends_with("\r\n\r\n"));
        });
    }

    #[test]
    fn clients_that_say_nothing_keep_nobody_out() {
        with_server(|addr, _ready| async move {
            let mut silent = Vec::new();
            for _ in 0..CONNECTIONS * 3 {
                silent.push(TcpStream::connect(addr).await.expect("backlog"));
                if silent.len() % 16 == 0 {
                    let answer = tokio::time::timeout(PATIENCE / 5, ask(addr, GET)).await.expect("answered at once");
                    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
                }
            }
            // The oldest lost their places.
            assert_eq!(silent[0].read(&mut [0]).await.expect("an orderly end"), 0);
            drop(silent);
        });
    }
}
