//! One request to an agent, and its whole answer; with the remedy where there is none.

use std::{fmt, str::FromStr, time::Duration};

use anyhow::{Context as _, bail};
use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

/// Until the agent has accepted, and until its answer is complete.
const CONNECT_PATIENCE: Duration = Duration::from_secs(5);
const PATIENCE: Duration = Duration::from_secs(60);
/// Largest answer, in bytes: some hundred thousand workloads.
const MAX_ANSWER: usize = 512 << 20;

/// Where an agent answers: `http://HOST:PORT`, or only `HOST:PORT`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Address {
    authority: String,
}

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || "must be http://HOST:PORT, as in http://127.0.0.1:15000".to_owned();
        let authority = text.strip_prefix("http://").unwrap_or(text).trim_end_matches('/');
        let (host, port) = authority.rsplit_once(':').ok_or_else(wrong)?;
        let bracketed = host.starts_with('[') && host.ends_with(']');
        if host.is_empty() || host.contains([':', '/', '@', ' ']) && !bracketed || port.parse::<u16>().is_err() {
            return Err(wrong());
        }
        authority.parse::<http::uri::Authority>().map_err(|_| wrong())?;
        Ok(Self { authority: authority.to_owned() })
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "http://{}", self.authority)
    }
}

/// Nobody answers there: the agent does not run, or not where it was asked.
#[derive(Debug)]
pub(super) struct NotThere {
    address: Address,
    why: String,
}

impl fmt::Display for NotThere {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "no agent answers at {}: {}; start `culvert agent` on this node, run this command in the node's own network \
             namespace, or name another address with --address",
            self.address, self.why
        )
    }
}

impl std::error::Error for NotThere {}

/// Asks, and reads the whole answer; its status is a success.
///
/// # Errors
/// [`NotThere`]; the agent refused, in its own words; the answer broke off or took too long.
pub(super) async fn ask(address: &Address, method: Method, path: &str) -> anyhow::Result<Bytes> {
    let answer = answer(address, method, path).await?;
    match answer.status() {
        StatusCode::OK => Ok(answer.into_body()),
        status => {
            let said = String::from_utf8_lossy(answer.body());
            bail!("the agent at {address} refused {path} ({status}): {}", crate::admin::printable(said.trim()))
        }
    }
}

/// Asks, and reads the whole answer, whatever its status.
///
/// # Errors
/// [`NotThere`]; the answer broke off or took too long.
pub(super) async fn answer(address: &Address, method: Method, path: &str) -> anyhow::Result<Response<Bytes>> {
    let exchange = tokio::time::timeout(PATIENCE, exchange(address, method, path)).await;
    exchange.with_context(|| format!("{address}{path} gave no complete answer within {} s", PATIENCE.as_secs()))?
}

async fn exchange(address: &Address, method: Method, path: &str) -> anyhow::Result<Response<Bytes>> {
    let not_there = |why: String| NotThere { address: address.clone(), why };
    let stream = tokio::time::timeout(CONNECT_PATIENCE, TcpStream::connect(&address.authority))
        .await
        .unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into()))
        .map_err(|error| not_there(error.to_string()))?;
    let asking = || format!("ask {address}{path}");
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.with_context(asking)?;
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header(header::HOST, &address.authority)
        .header(header::USER_AGENT, concat!("culvert/", env!("CARGO_PKG_VERSION")))
        .body(Empty::<Bytes>::new())
        .with_context(asking)?;
    let answered = async {
        // Whoever closes without an answer is no agent, or one that does not want to be asked from here.
        let response = sender.send_request(request).await.map_err(|error| match std::error::Error::source(&error) {
            Some(source) => not_there(source.to_string()),
            None => not_there(error.to_string()),
        })?;
        let (head, body) = response.into_parts();
        let body = Limited::new(body, MAX_ANSWER).collect().await.map_err(anyhow::Error::from_boxed)?;
        drop(sender);
        anyhow::Ok(Response::from_parts(head, body.to_bytes()))
    };
    // The connection moves the bytes while the answer is awaited; what ends it early ends the answer too.
    let (answered, _) = tokio::join!(answered, connection);
    answered.map_err(|error| match error.is::<NotThere>() {
        true => error,
        false => error.context(asking()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_understood_or_refused() {
        for (text, shown) in [
            ("http://127.0.0.1:15000", "http://127.0.0.1:15000"),
            ("localhost:15000/", "http://localhost:15000"),
            ("[::1]:15000", "http://[::1]:15000"),
        ] {
            assert_eq!(text.parse::<Address>().expect(text).to_string(), shown);
        }
        for wrong in
            ["", "https://127.0.0.1:15000", "127.0.0.1", "::1:15000", "http://host:port", "a b:1", "http://x:1/y"]
        {
            assert!(wrong.parse::<Address>().is_err(), "{wrong}");
        }
    }
}
