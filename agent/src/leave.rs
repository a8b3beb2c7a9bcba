//! Whether an agent that ends leaves its node for good: whether the DaemonSet that it is of is deleted.
//!
//! An agent that ends leaves its programs behind, which refuse until another one serves. After `kubectl delete` or `helm
//! uninstall` no other one comes, so that they are to go with the last. Only what the API server says of the very DaemonSet
//! that this agent has seen counts; where it says nothing, nothing is known, and what refuses stays.
//!
//! The rights that it takes: `get`, `list` and `watch` of that DaemonSet.

use std::{convert::Infallible, time::Duration};

use anyhow::{Context as _, anyhow};
use k8s_openapi::api::apps::v1::DaemonSet as Object;
use kube::{Api, Client, api::DeleteParams};
use tokio::{sync::watch, time::Instant};
use tracing::{error, info, warn};

use crate::{
    model::ObjectRef,
    source::kubernetes::{Heard, describe, follow_named},
};

/// How long the API server is asked when the agent is told to end.
const PATIENCE: Duration = Duration::from_secs(5);
/// For one answer.
const ANSWER: Duration = Duration::from_secs(2);
/// After an error.
const AGAIN: Duration = Duration::from_millis(250);

/// What follows from the DaemonSet for an agent that ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is there, so that another agent comes.
    Stays,
    /// Nobody knows, and why: what refuses must stay.
    Unknown(String),
    /// It is deleted.
    Leaves,
}

/// The DaemonSet that an agent is of.
#[derive(Debug)]
pub struct DaemonSet {
    api: Api<Object>,
    of: ObjectRef,
    known: watch::Sender<Known>,
}

impl DaemonSet {
    /// `client` asks for one answer, `watcher` is silent for minutes.
    pub fn new(client: Client, of: ObjectRef) -> Self {
        let api = Api::namespaced(client, &of.namespace);
        Self { api, of, known: watch::Sender::new(Known::default()) }
    }

    /// Follows it for as long as this is polled.
    pub async fn follow(&self, watcher: Client) -> Infallible {
        let api = Api::namespaced(watcher, &self.of.namespace);
        follow_named(api, &self.of.name, async |heard| {
            let mut news = None;
            self.known.send_modify(|known| news = known.hear(heard));
            self.tell(news);
            true
        })
        .await;
        std::future::pending().await
    }

    /// What is to become of the node when this agent ends now. Takes five seconds at most.
    pub async fn verdict(&self) -> Verdict {
        let until = Instant::now() + PATIENCE;
        loop {
            let answer = tokio::time::timeout(ANSWER, self.api.get(&self.of.name)).await;
            let error = match answer {
                Ok(Ok(object)) => {
                    self.see(Some(&object));
                    return self.known.borrow().verdict();
                }
                Ok(Err(kube::Error::Api(status))) if status.is_not_found() && is_of(&status, &self.of.name) => {
                    self.see(None);
                    return self.known.borrow().verdict();
                }
                Ok(Err(error)) => describe(&error),
                Err(_) => format!("no answer within {} s", ANSWER.as_secs()),
            };
            // With the DaemonSet its agents' rights may have gone; what was heard before counts.
            if self.known.borrow().verdict() == Verdict::Leaves {
                return Verdict::Leaves;
            }
            if Instant::now() >= until {
                return Verdict::Unknown(error);
            }
            tokio::time::sleep(AGAIN).await;
        }
    }

    fn see(&self, object: Option<&Object>) {
        let mut news = None;
        self.known.send_modify(|known| news = known.see(object));
        self.tell(news);
    }

    fn tell(&self, news: Option<News>) {
        let daemonset = &self.of;
        match news {
            None => {}
            Some(News::Own(uid)) => info!(%daemonset, uid, "this agent is of this DaemonSet"),
            Some(News::Missing) => error!(
                %daemonset,
                "there is no such DaemonSet: an agent that ends leaves its programs behind, which refuse; correct --daemonset"
            ),
            Some(News::Deleted) => info!(
                %daemonset,
                "the DaemonSet is deleted: when this agent is told to end, the node's pods leave the mesh"
            ),
            Some(News::Another(uid)) => {
                info!(%daemonset, uid, "the DaemonSet was made anew: its agents will follow this one")
            }
            Some(News::Unheard(error)) => {
                warn!(%daemonset, error, "the API server cannot be heard: whether the DaemonSet is deleted is not known");
            }
        }
    }
}

/// What came of [`all`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Left {
    /// There was no DaemonSet.
    Nothing,
    /// It is gone, and its agents have ended.
    Ended,
    /// It is deleted, and so many agents had not ended in time.
    Draining(i32),
}

/// Deletes the agents' DaemonSet and waits until its agents have ended, at most `patience`.
///
/// The object stays until they have (foreground deletion), so that each of them can see that it is deleted, whatever else is
/// removed meanwhile.
///
/// # Errors
/// The API server does not answer, or refuses; one line, with the right that is missing.
pub async fn all(client: Client, of: &ObjectRef, patience: Duration) -> anyhow::Result<Left> {
    let until = Instant::now() + patience;
    let api: Api<Object> = Api::namespaced(client, &of.namespace);
    let doing = || format!("delete DaemonSet {of}");
    let there = api.get_opt(&of.name).await.map_err(|error| anyhow!(describe(&error))).with_context(doing)?;
    let Some(uid) = there.and_then(|object| object.metadata.uid) else { return Ok(Left::Nothing) };
    match api.delete(&of.name, &DeleteParams::foreground()).await {
        Err(kube::Error::Api(status)) if status.is_not_found() => return Ok(Left::Ended),
        deleted => deleted.map_err(|error| anyhow!(describe(&error))).with_context(doing)?,
    };
    let mut last = 0;
    loop {
        match tokio::time::timeout(ANSWER, api.get_opt(&of.name)).await {
            // Another one of the name is somebody else's wish.
            Ok(Ok(None)) => return Ok(Left::Ended),
            Ok(Ok(Some(object))) if object.metadata.uid.as_ref() != Some(&uid) => return Ok(Left::Ended),
            Ok(Ok(Some(object))) => {
                last = object.status.map_or(0, |status| status.current_number_scheduled);
            }
            // It is deleted; what the server says next counts.
            Ok(Err(_)) | Err(_) => {}
        }
        if Instant::now() >= until {
            return Ok(Left::Draining(last));
        }
        tokio::time::sleep(AGAIN).await;
    }
}

/// Whether an answer is about this object, and not about a path that a server does not have.
fn is_of(status: &kube::core::Status, name: &str) -> bool {
    status.details.as_ref().is_some_and(|details| details.name == name)
}

/// What is known of the DaemonSet.
#[derive(Clone, Debug, Default)]
struct Known {
    /// UID of the first that was seen.
    own: Option<String>,
    now: Option<Now>,
    /// Of a list that is not complete.
    listed: Option<Now>,
    /// It was told that nothing is heard.
    unheard: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Now {
    Absent,
    There { uid: String, ends: bool },
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum News {
    Own(String),
    Missing,
    Deleted,
    Another(String),
    Unheard(String),
}

impl Now {
    fn of(object: &Object) -> Self {
        let metadata = &object.metadata;
        Self::There { uid: metadata.uid.clone().unwrap_or_default(), ends: metadata.deletion_timestamp.is_some() }
    }

    fn is_gone(&self) -> bool {
        matches!(self, Self::Absent | Self::There { ends: true, .. })
    }
}

impl Known {
    fn hear(&mut self, heard: Heard<Object>) -> Option<News> {
        if let Heard::Trouble(error) = heard {
            return (!std::mem::replace(&mut self.unheard, true)).then_some(News::Unheard(error));
        }
        self.unheard = false;
        match heard {
            Heard::List => self.listed = Some(Now::Absent),
            Heard::Listed(object) => self.listed = Some(Now::of(&object)),
            Heard::Complete => return self.listed.take().and_then(|now| self.set(now)),
            Heard::Applied(object) => return self.set(Now::of(&object)),
            Heard::Deleted(_) => return self.set(Now::Absent),
            // Every API server has this kind: one that says otherwise says nothing of the object.
            Heard::NoSuchKind | Heard::Well | Heard::Trouble(_) => {}
        }
        None
    }

    /// The answer to a question for the object.
    fn see(&mut self, object: Option<&Object>) -> Option<News> {
        self.set(object.map_or(Now::Absent, Now::of))
    }

    fn set(&mut self, now: Now) -> Option<News> {
        let before = self.now.replace(now.clone());
        if before.as_ref() == Some(&now) {
            return None;
        }
        match (&self.own, now) {
            (None, Now::There { uid, .. }) => {
                self.own = Some(uid.clone());
                Some(News::Own(uid))
            }
            (None, Now::Absent) => Some(News::Missing),
            (Some(_), now) if now.is_gone() => {
                (!before.is_some_and(|before| before.is_gone())).then_some(News::Deleted)
            }
            (Some(own), Now::There { uid, .. }) if *own != uid => Some(News::Another(uid)),
            (Some(_), _) => None,
        }
    }

    fn verdict(&self) -> Verdict {
        match (&self.own, &self.now) {
            (None, Some(Now::Absent)) => {
                Verdict::Unknown("there is no DaemonSet of that name, and never was".to_owned())
            }
            (None, _) | (_, None) => Verdict::Unknown("nothing was heard of it".to_owned()),
            (Some(_), Some(now)) if now.is_gone() => Verdict::Leaves,
            (Some(_), Some(_)) => Verdict::Stays,
        }
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};

    use super::*;

    fn object(uid: &str, ends: bool) -> Object {
        let deletion_timestamp = ends.then_some(Time(k8s_openapi::jiff::Timestamp::UNIX_EPOCH));
        let metadata = ObjectMeta { uid: Some(uid.to_owned()), deletion_timestamp, ..ObjectMeta::default() };
        Object { metadata, ..Object::default() }
    }

    fn known(heard: Vec<Heard<Object>>) -> (Known, Vec<News>) {
        let mut known = Known::default();
        let news = heard.into_iter().filter_map(|heard| known.hear(heard)).collect();
        (known, news)
    }

    fn listed(objects: Vec<Object>) -> Vec<Heard<Object>> {
        let mut heard = vec![Heard::List];
        heard.extend(objects.into_iter().map(Heard::Listed));
        heard.push(Heard::Complete);
        heard
    }

    #[test]
    fn what_was_there_and_is_deleted_is_left() {
        let gone: [Vec<Heard<Object>>; 3] =
            [vec![Heard::Deleted(object("a", false))], vec![Heard::Applied(object("a", true))], listed(vec![])];
        for gone in gone {
            let (before, news) = known(listed(vec![object("a", false)]));
            assert_eq!((before.verdict(), news), (Verdict::Stays, vec![News::Own("a".to_owned())]));
            let (after, news) = known(listed(vec![object("a", false)]).into_iter().chain(gone).collect());
            assert_eq!((after.verdict(), news.last()), (Verdict::Leaves, Some(&News::Deleted)));
            // Said once, though it goes in two steps.
            let mut after = after;
            assert_eq!(after.hear(Heard::Deleted(object("a", true))), None);
        }
    }

    /// A list begins with nothing, and is no word before it is complete; an error says nothing of the object.
    #[test]
    fn what_is_not_known_is_not_left() {
        let unknown = |heard| matches!(known(heard).0.verdict(), Verdict::Unknown(_));
        assert!(unknown(vec![]));
        assert!(unknown(vec![Heard::List]));
        assert!(unknown(listed(vec![])), "it was never there: this agent is not of it");
        assert!(unknown(vec![Heard::Trouble("403".to_owned())]));
        let mut heard = listed(vec![object("a", false)]);
        heard.extend([Heard::Trouble("down".to_owned()), Heard::Trouble("down".to_owned()), Heard::List]);
        let (known, news) = known(heard);
        assert_eq!(known.verdict(), Verdict::Stays);
        assert_eq!(news[1..], [News::Unheard("down".to_owned())], "once");
    }

    #[test]
    fn a_daemonset_that_was_made_anew_has_agents_of_its_own() {
        let mut heard = listed(vec![object("a", false)]);
        heard.push(Heard::Deleted(object("a", false)));
        heard.push(Heard::Applied(object("b", false)));
        let (mut known, news) = known(heard);
        assert_eq!((known.verdict(), news.last()), (Verdict::Stays, Some(&News::Another("b".to_owned()))));
        known.hear(Heard::Deleted(object("b", false)));
        assert_eq!(known.verdict(), Verdict::Leaves);
    }

    /// Some proxies answer 404 to whatever they do not know.
    #[test]
    fn only_an_answer_about_the_very_object_counts() {
        let status = |details: serde_json::Value| -> kube::core::Status {
            let status = serde_json::json!({"code": 404, "reason": "NotFound", "details": details});
            serde_json::from_value(status).expect("a status")
        };
        assert!(is_of(&status(serde_json::json!({"name": "culvert", "kind": "daemonsets"})), "culvert"));
        assert!(!is_of(&status(serde_json::json!({})), "culvert"));
        assert!(!is_of(&status(serde_json::Value::Null), "culvert"));
    }
}
