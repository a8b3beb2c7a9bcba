//! One kind of objects at the API server: listed, watched, and asked again whatever happens.
//!
//! A list is a streaming one where the server has them (a watch that begins with all that there is), else pages; both are
//! consistent, so that what is known never goes back to what was. A watch that ends goes on from where it was; where the
//! server has forgotten that place (410), there is a new list.

use std::{fmt::Debug, future::Future, time::Duration};

use futures_util::{Stream, StreamExt as _};
use kube::{
    Api, Error, Resource, ResourceExt as _,
    api::{ListParams, WatchEvent, WatchParams},
    core::Status,
};
use rand::Rng as _;
use serde::de::DeserializeOwned;
use tokio::time::Instant;
use tracing::debug;

/// A watch is asked for anew after this long, so that it moves to a server that has come, in seconds.
const WATCH_SECONDS: u32 = 290;
/// A watch that ends after so long has ended because its time was over.
const WHOLE: Duration = Duration::from_secs(WATCH_SECONDS as u64 - 15);
/// How long one is kept that follows one that has ended earlier. Perhaps its server is about to end: that still takes new watches
/// for a while, and tells nothing new in them for up to a minute, when it cuts them; a later one goes to another server, or
/// fails. Perhaps it was only that this agent took too long to read.
const TRIAL: Duration = Duration::from_secs(6);
/// A watch of which nothing was heard for so long is dead: a server sends a bookmark about every minute.
const SILENCE: Duration = Duration::from_secs(150);
/// A watch that lasts so long without a word is one.
const SETTLED: Duration = Duration::from_secs(1);
/// For the first word of an answer: of a watch that comes at once. A server that is ending takes requests that it does not answer,
/// and ends the later.
const ANSWER: Duration = Duration::from_secs(10);
/// For a page of a list.
const LIST: Duration = Duration::from_secs(60);
/// Objects of a page.
const PAGE: u32 = 500;
/// First pause after an error, and the longest.
const PAUSE: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(30));
/// Where the list that a watch begins with ends (KEP-3157).
const INITIAL_END: &str = "k8s.io/initial-events-end";

/// News of one kind.
#[derive(Clone, Debug, PartialEq)]
pub enum Heard<K> {
    /// The whole list follows.
    List,
    /// One of the list.
    Listed(K),
    /// The list is complete: what was not in it is gone.
    Complete,
    /// New, or not what it was.
    Applied(K),
    /// Gone.
    Deleted(K),
    /// The cluster has no such kind, and so no object of it.
    NoSuchKind,
    /// The server answers again.
    Well,
    /// It does not, or with an error: one line.
    Trouble(String),
}

impl<K> Heard<K> {
    /// The same of another type of object.
    pub(super) fn map<T>(self, object: impl FnOnce(K) -> T) -> Heard<T> {
        match self {
            Self::List => Heard::List,
            Self::Listed(one) => Heard::Listed(object(one)),
            Self::Complete => Heard::Complete,
            Self::Applied(one) => Heard::Applied(object(one)),
            Self::Deleted(one) => Heard::Deleted(object(one)),
            Self::NoSuchKind => Heard::NoSuchKind,
            Self::Well => Heard::Well,
            Self::Trouble(error) => Heard::Trouble(error),
        }
    }
}

/// Which of the objects.
#[derive(Clone, Debug, Default)]
pub(super) struct Scope {
    fields: Option<String>,
}

impl Scope {
    /// Only the one with this name.
    pub(super) fn named(name: &str) -> Self {
        Self { fields: Some(format!("metadata.name={name}")) }
    }
}

/// Tells what the API server has of a kind, until `tell` says that nobody listens any more.
pub(super) async fn follow<K>(api: Api<K>, scope: Scope, tell: impl AsyncFn(Heard<K>) -> bool)
where
    K: Resource + Clone + DeserializeOwned + Debug,
{
    let mut follower = Follower { api, scope, tell, streams: true, at: None, failures: 0, until: None };
    loop {
        let begun = Instant::now();
        match follower.once().await {
            Ended::Unheard => return,
            Ended::InOrder if begun.elapsed() >= WHOLE => tokio::time::sleep(jitter(PAUSE.0)).await,
            Ended::InOrder => {
                debug!(of = follower.api.resource_url(), "the server ended a watch before its time");
                tokio::time::sleep(jitter(PAUSE.0)).await;
                follower.until = Some(Instant::now() + jitter(TRIAL));
            }
            Ended::Tried => {}
            // Nothing is wrong: the server keeps only so much.
            Ended::Expired => {
                follower.at = None;
                tokio::time::sleep(jitter(PAUSE.0)).await;
            }
            Ended::NoStreams => follower.streams = false,
            Ended::Failed { error, after } => {
                if !(follower.tell)(Heard::Trouble(error)).await {
                    return;
                }
                tokio::time::sleep(pause(follower.failures).max(after.unwrap_or_default())).await;
                follower.failures = follower.failures.saturating_add(1);
            }
        }
    }
}

/// How a turn with the server ended.
enum Ended {
    /// Nobody listens.
    Unheard,
    /// The server ended the watch, as it does from time to time.
    InOrder,
    /// We ended it, to begin another one.
    Tried,
    /// What was known last is too old for it.
    Expired,
    /// It has no streaming lists.
    NoStreams,
    Failed {
        error: String,
        /// What the server asked for.
        after: Option<Duration>,
    },
}

struct Follower<K, T> {
    api: Api<K>,
    scope: Scope,
    tell: T,
    /// Streaming lists are tried.
    streams: bool,
    /// The version that is known; `None` before the first list.
    at: Option<String>,
    /// In a row.
    failures: u32,
    /// When the next watch is to be replaced by another one.
    until: Option<Instant>,
}

impl<K, T> Follower<K, T>
where
    K: Resource + Clone + DeserializeOwned + Debug,
    T: AsyncFn(Heard<K>) -> bool,
{
    async fn once(&mut self) -> Ended {
        let turn = match self.at.clone() {
            Some(at) => self.resume(&at).await,
            None if self.streams => self.list_by_stream().await,
            None => self.list_by_pages().await,
        };
        match turn {
            Ok(ended) => ended,
            Err(Failure::Unheard) => Ended::Unheard,
            Err(Failure::Server(error)) => self.judge(&error),
            Err(Failure::Other(error)) => Ended::Failed { error, after: None },
        }
    }

    /// What an error means for the next turn.
    fn judge(&mut self, error: &Error) -> Ended {
        if let Error::Api(status) = error {
            // RFC 9110 §15.5.11; and a version from the future, which a server has that was set back.
            if status.code == 410 || status.message.contains("Too large resource version") {
                if self.at.is_some() {
                    return Ended::Expired;
                }
            } else if self.at.is_none() && self.streams && is_without_streams(status) {
                return Ended::NoStreams;
            }
        } else if matches!(error, Error::SerdeError(_)) {
            // Something was said and not understood: what is known may be less than it seems.
            self.at = None;
        }
        let after = match error {
            Error::Api(status) => status.details.as_ref().map(|details| details.retry_after_seconds),
            _ => None,
        };
        Ended::Failed {
            error: describe(error),
            after: after.map(|seconds| Duration::from_secs(u64::from(seconds).min(60))),
        }
    }

    async fn say(&self, heard: Heard<K>) -> Result<(), Failure> {
        if (self.tell)(heard).await { Ok(()) } else { Err(Failure::Unheard) }
    }

    async fn list_by_stream(&mut self) -> Result<Ended, Failure> {
        let params = WatchParams { send_initial_events: true, ..self.watch_params() };
        // Without a version: at least as new as the request.
        let stream = answer(ANSWER, self.api.watch(&params, "")).await?;
        let mut stream = std::pin::pin!(stream);
        self.say(Heard::List).await?;
        loop {
            match heard(&mut stream).await? {
                Some(WatchEvent::Added(object) | WatchEvent::Modified(object)) => {
                    self.say(Heard::Listed(object)).await?
                }
                Some(WatchEvent::Bookmark(mark)) if mark.metadata.annotations.contains_key(INITIAL_END) => {
                    self.complete(mark.metadata.resource_version).await?;
                    return self.watch(stream).await;
                }
                Some(WatchEvent::Bookmark(_) | WatchEvent::Deleted(_)) => {}
                Some(WatchEvent::Error(status)) => return Err(Error::Api(status).into()),
                None => return Err(Failure::Other("the server ended a list half-way".to_owned())),
            }
        }
    }

    async fn list_by_pages(&mut self) -> Result<Ended, Failure> {
        let mut params = ListParams { field_selector: self.scope.fields.clone(), ..ListParams::default() }.limit(PAGE);
        self.say(Heard::List).await?;
        loop {
            let page = answer(LIST, self.api.list(&params)).await?;
            for object in page.items {
                self.say(Heard::Listed(object)).await?;
            }
            match page.metadata.continue_.filter(|token| !token.is_empty()) {
                Some(token) => params.continue_token = Some(token),
                None => {
                    let version = page.metadata.resource_version.filter(|version| !version.is_empty());
                    let version = version.ok_or_else(|| Failure::Other("a list without a version".to_owned()))?;
                    self.complete(version.clone()).await?;
                    return self.resume(&version).await;
                }
            }
        }
    }

    async fn complete(&mut self, version: String) -> Result<(), Failure> {
        self.at = Some(version);
        self.failures = 0;
        self.say(Heard::Complete).await
    }

    async fn resume(&mut self, at: &str) -> Result<Ended, Failure> {
        let stream = answer(ANSWER, self.api.watch(&self.watch_params(), at)).await?;
        let mut stream = std::pin::pin!(stream);
        // A stream that is there says nothing yet: what ends at once, again and again, is no watch.
        match tokio::time::timeout(SETTLED, heard(&mut stream)).await {
            Err(_) => self.well().await?,
            Ok(first) => match first? {
                Some(WatchEvent::Error(status)) => return Err(Error::Api(status).into()),
                Some(event) => {
                    self.well().await?;
                    self.take(event).await?;
                }
                None => return Err(Failure::Other("the server ends each watch at once".to_owned())),
            },
        }
        self.watch(stream).await
    }

    async fn well(&mut self) -> Result<(), Failure> {
        self.failures = 0;
        self.say(Heard::Well).await
    }

    async fn watch(
        &mut self,
        mut stream: impl Stream<Item = Result<WatchEvent<K>, Error>> + Unpin,
    ) -> Result<Ended, Failure> {
        let until = self.until.take();
        loop {
            let next = heard(&mut stream);
            let next = match until {
                // Nothing is lost: what was not taken in is told by the next one.
                Some(until) => match tokio::time::timeout_at(until, next).await {
                    Ok(next) => next?,
                    Err(_) => return Ok(Ended::Tried),
                },
                None => next.await?,
            };
            match next {
                Some(event) => self.take(event).await?,
                None => return Ok(Ended::InOrder),
            }
        }
    }

    async fn take(&mut self, event: WatchEvent<K>) -> Result<(), Failure> {
        let (heard, version) = match event {
            WatchEvent::Added(object) | WatchEvent::Modified(object) => {
                let version = object.resource_version();
                (Some(Heard::Applied(object)), version)
            }
            WatchEvent::Deleted(object) => {
                let version = object.resource_version();
                (Some(Heard::Deleted(object)), version)
            }
            WatchEvent::Bookmark(mark) => (None, Some(mark.metadata.resource_version)),
            WatchEvent::Error(status) => return Err(Error::Api(status).into()),
        };
        if let Some(heard) = heard {
            self.say(heard).await?;
        }
        // Only what was taken in need not be heard again.
        if version.as_ref().is_some_and(|version| !version.is_empty()) {
            self.at = version;
        }
        Ok(())
    }

    fn watch_params(&self) -> WatchParams {
        WatchParams {
            field_selector: self.scope.fields.clone(),
            timeout: Some(WATCH_SECONDS),
            ..WatchParams::default()
        }
    }
}

enum Failure {
    Unheard,
    Server(Error),
    Other(String),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Server(error)
    }
}

async fn answer<R>(limit: Duration, request: impl Future<Output = Result<R, Error>>) -> Result<R, Failure> {
    match tokio::time::timeout(limit, request).await {
        Ok(result) => Ok(result?),
        Err(_) => Err(Failure::Other(format!("no answer within {} s", limit.as_secs()))),
    }
}

async fn heard<K>(
    stream: &mut (impl Stream<Item = Result<WatchEvent<K>, Error>> + Unpin),
) -> Result<Option<WatchEvent<K>>, Failure> {
    match tokio::time::timeout(SILENCE, stream.next()).await {
        Ok(next) => Ok(next.transpose()?),
        Err(_) => Err(Failure::Other(format!("nothing was heard for {} s", SILENCE.as_secs()))),
    }
}

/// Whether it is the request for a streaming list that was wrong, and not what was asked for.
fn is_without_streams(status: &Status) -> bool {
    matches!(status.code, 400 | 422) && status.message.contains("sendInitialEvents")
}

/// In one line, without what is only for debugging; the message of the server names a missing right with its verb.
pub(crate) fn describe(error: &Error) -> String {
    match error {
        Error::Api(status) => {
            let what = if status.message.is_empty() { &status.reason } else { &status.message };
            format!("{} ({})", what.replace('\n', " "), status.code)
        }
        other => {
            let mut text = String::new();
            let mut cause: Option<&dyn std::error::Error> = Some(other);
            while let Some(error) = cause {
                let said = error.to_string().replace('\n', " ");
                // Some say themselves what their cause says.
                if !text.contains(&said) {
                    if !text.is_empty() {
                        text.push_str(": ");
                    }
                    text.push_str(&said);
                }
                cause = error.source();
            }
            text
        }
    }
}

/// After that many failures in a row.
fn pause(failures: u32) -> Duration {
    jitter((PAUSE.0 * 2u32.saturating_pow(failures.min(10))).min(PAUSE.1))
}

/// Half of it to all of it, so that the agents of all nodes do not come at once.
fn jitter(pause: Duration) -> Duration {
    pause.mul_f64(rand::rng().random_range(0.5..=1.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_their_limit_and_are_never_the_same_for_all() {
        let (first, most) = PAUSE;
        assert!((0..100).all(|_| (first / 2..=first).contains(&pause(0))));
        assert!((0..100).all(|_| (most / 2..=most).contains(&pause(u32::MAX))));
        assert!((0..100).map(|_| pause(3)).collect::<std::collections::HashSet<_>>().len() > 10);
    }

    #[test]
    fn an_error_is_one_line_with_what_the_server_said() {
        let status = |code, message: &str| {
            Error::Api(Box::new(Status { code, message: message.to_owned(), ..Status::default() }))
        };
        let forbidden = "pods is forbidden: User \"culvert\" cannot list resource \"pods\"\nat the cluster scope";
        assert_eq!(
            describe(&status(403, forbidden)),
            "pods is forbidden: User \"culvert\" cannot list resource \"pods\" at the cluster scope (403)"
        );
        let refused = Error::Service(Box::new(std::io::Error::from(std::io::ErrorKind::ConnectionRefused)));
        assert_eq!(describe(&refused), "ServiceError: connection refused");
    }
}
