//! Tells the cluster what became of this node's pods: the annotation by which peers know that a pod takes tunnels ([E.4]), and
//! an Event on a pod that could not be brought into the mesh.
//!
//! Only an agent that is ready tells anything, so that of two on a node the one that serves does. Nothing is written that is
//! there already, and nothing is fought over: what somebody else changes back is written again after a while. An agent that
//! leaves its node for good takes back what it told ([`withdraw`]).
//!
//! The rights that it takes: `patch` of `pods/status`, `create` and `patch` of `events` in `events.k8s.io`.

use std::{
    collections::{BTreeMap, HashMap},
    convert::Infallible,
    sync::Arc,
    time::Duration,
};

use k8s_openapi::api::core::v1 as core;
use kube::{
    Api, Client,
    api::{Patch, PatchParams},
    runtime::events::{Event, EventType, Recorder, Reporter},
};
use serde_json::json;
use tokio::{
    sync::watch,
    time::{Instant, MissedTickBehavior, interval},
};
use tracing::{debug, warn};

use crate::{
    enroll,
    model::{ObjectRef, Pod, PodUid},
    source::{self, View},
    telemetry::readiness::Ready,
};

/// The annotation ([E.4]).
const ANNOTATION: &str = "ambient.istio.io/redirection";
/// Its values: the pod takes tunnels; its connections are refused until it can.
const ENABLED: &str = "enabled";
const PENDING: &str = "pending";
/// How often it is looked whether there is something to tell.
const TICK: Duration = Duration::from_secs(1);
/// How long a pod may fail to be enrolled before that is an Event: until its address is known, every new one does.
const PATIENCE: Duration = Duration::from_secs(10);
/// When what was written is written again, if it did not take effect or somebody undid it.
const AGAIN: Duration = Duration::from_secs(30);
/// For the API server's answer.
const ANSWER: Duration = Duration::from_secs(10);
/// How long an agent that leaves tries to take back what it told.
const WITHDRAW: Duration = Duration::from_secs(8);
/// Most bytes of an Event's note (the API server's limit).
const NOTE: usize = 1024;

/// Where each pod of the node stands.
pub type States = Arc<BTreeMap<PodUid, enroll::State>>;

/// Tells for as long as it is polled; what fails is tried again, and never ends it.
pub async fn run(
    client: Client,
    node_name: String,
    ready: Ready,
    views: watch::Receiver<Arc<View>>,
    states: watch::Receiver<States>,
) -> Infallible {
    let reporter = Reporter { controller: "culvert".to_owned(), instance: Some(node_name.clone()) };
    let recorder = Recorder::new(client.clone(), reporter);
    let mut told = Told { node_name, ..Told::default() };
    let mut said = None;
    let mut tick = interval(TICK);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        if !ready.is_ready() {
            continue;
        }
        let (view, now) = (views.borrow().clone(), states.borrow().clone());
        for news in told.news(&view, &now, Instant::now()) {
            let error = match tokio::time::timeout(ANSWER, write(&client, &recorder, &news)).await {
                Ok(Ok(())) => continue,
                // Gone meanwhile, or another pod of that name.
                Ok(Err(kube::Error::Api(status))) if matches!(status.code, 404 | 409) => continue,
                Ok(Err(kube::Error::Api(status))) => status.message.clone(),
                Ok(Err(error)) => error.to_string(),
                Err(_) => format!("no answer within {} s", ANSWER.as_secs()),
            };
            // The rest would fail alike; it comes again.
            match said.as_ref() == Some(&error) {
                true => debug!(pod = %news.pod, error, "the API server could not be told what became of a pod"),
                false => {
                    warn!(pod = %news.pod, error, "the API server could not be told what became of a pod: trying again")
                }
            }
            said = Some(error);
            break;
        }
    }
}

/// Removes the annotation from the node's pods, whoever wrote it: nobody will take their tunnels any more. `states` are those
/// that an annotation was told of. What fails is tried again for some seconds, and no longer: the agent is about to end.
///
/// # Errors
/// Some pods have it still, and why.
pub async fn withdraw(
    client: &Client,
    node_name: &str,
    views: &watch::Receiver<Arc<View>>,
    states: &States,
) -> anyhow::Result<()> {
    let cluster = views.borrow().cluster.clone();
    let told = |pod: &&Arc<Pod>| pod.annotations.contains_key(ANNOTATION) || states.contains_key(&pod.uid);
    let own = cluster.pods.values().filter(|pod| *pod.node == *node_name).filter(told);
    let mut left: Vec<(Arc<str>, ObjectRef)> = own.map(|pod| (object_uid(pod), pod.object.clone())).collect();
    let until = Instant::now() + WITHDRAW;
    while let Some((uid, pod)) = left.last().cloned() {
        let patched = tokio::time::timeout_at(until, annotate(client, (&uid, &pod), None)).await;
        let error = match patched {
            Ok(Ok(())) => {
                left.pop();
                continue;
            }
            // Gone meanwhile, or another pod of that name.
            Ok(Err(kube::Error::Api(status))) if matches!(status.code, 404 | 409) => {
                left.pop();
                continue;
            }
            // With its rights nobody comes back.
            Ok(Err(kube::Error::Api(status))) if matches!(status.code, 401 | 403) => {
                anyhow::bail!("{} pods of the node keep their annotation: {}", left.len(), status.message);
            }
            Ok(Err(error)) => source::kubernetes::describe(&error),
            Err(_) => format!("no answer within {} s", WITHDRAW.as_secs()),
        };
        anyhow::ensure!(Instant::now() < until, "{} pods of the node keep their annotation: {error}", left.len());
        tokio::time::sleep(TICK).await;
    }
    Ok(())
}

/// `metadata.uid` of a pod's object.
fn object_uid(pod: &Pod) -> Arc<str> {
    pod.mirror_uid.as_ref().unwrap_or(&pod.uid.0).clone()
}

async fn annotate(client: &Client, (uid, pod): (&str, &ObjectRef), value: Option<&str>) -> Result<(), kube::Error> {
    let pods = Api::<core::Pod>::namespaced(client.clone(), &pod.namespace);
    // With the UID: a pod that has taken the name meanwhile is another one, and the server says so.
    let patch = json!({"metadata": {"uid": uid, "annotations": {ANNOTATION: value}}});
    pods.patch_status(&pod.name, &PatchParams::default(), &Patch::Merge(patch)).await.map(drop)
}

async fn write(client: &Client, recorder: &Recorder, news: &News) -> Result<(), kube::Error> {
    match &news.what {
        What::Annotation(value) => annotate(client, (&news.object_uid, &news.pod), *value).await,
        What::Failed(note) => {
            recorder.publish(&event(EventType::Warning, "FailedEnrollment", note), &reference(news)).await
        }
        What::Entered => {
            let note = "the pod is in the mesh; its connections are not refused any more";
            recorder.publish(&event(EventType::Normal, "Enrolled", note), &reference(news)).await
        }
    }
}

fn event(type_: EventType, reason: &str, note: &str) -> Event {
    let mut note = note.to_owned();
    note.truncate(note.floor_char_boundary(NOTE));
    Event { type_, reason: reason.to_owned(), note: Some(note), action: "Enroll".to_owned(), secondary: None }
}

fn reference(news: &News) -> core::ObjectReference {
    core::ObjectReference {
        api_version: Some("v1".to_owned()),
        kind: Some("Pod".to_owned()),
        namespace: Some(news.pod.namespace.to_string()),
        name: Some(news.pod.name.to_string()),
        uid: Some(news.uid.0.to_string()),
        ..core::ObjectReference::default()
    }
}

/// Something to tell of a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
struct News {
    /// By which the kubelet's own Events name it too.
    uid: PodUid,
    object_uid: Arc<str>,
    pod: ObjectRef,
    what: What,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum What {
    /// Its annotation is to be this; `None`: not there.
    Annotation(Option<&'static str>),
    /// It could not be brought into the mesh, and why.
    Failed(String),
    /// It is in the mesh, after it was said that it is not.
    Entered,
}

/// What was told, and when.
#[derive(Default)]
struct Told {
    node_name: String,
    annotations: HashMap<PodUid, (Option<&'static str>, Instant)>,
    failures: HashMap<PodUid, Failure>,
}

struct Failure {
    since: Instant,
    /// Why, as it was told.
    told: Option<String>,
}

impl Told {
    /// What there is to tell now; it counts as told.
    fn news(&mut self, view: &View, states: &States, now: Instant) -> Vec<News> {
        let own = |pod: &&Arc<Pod>| *pod.node == *self.node_name && !pod.finished;
        let pods: HashMap<&PodUid, &Arc<Pod>> =
            view.cluster.pods.values().filter(own).map(|pod| (&pod.uid, pod)).collect();
        self.annotations.retain(|uid, _| pods.contains_key(uid));
        self.failures.retain(|uid, _| pods.contains_key(uid));
        let mut news = Vec::new();
        for (uid, pod) in pods {
            let state = states.get(uid);
            let mut tell = |what| {
                news.push(News { uid: uid.clone(), object_uid: object_uid(pod), pod: pod.object.clone(), what });
            };
            let wanted = state.map(|state| match state {
                enroll::State::Enrolled(_) => ENABLED,
                enroll::State::Failed(_) => PENDING,
            });
            if pod.annotations.get(ANNOTATION).map(String::as_str) == wanted {
                self.annotations.remove(uid);
            } else if self.annotations.get(uid).is_none_or(|(value, at)| *value != wanted || now - *at >= AGAIN) {
                self.annotations.insert(uid.clone(), (wanted, now));
                tell(What::Annotation(wanted));
            }
            match state {
                Some(enroll::State::Failed(why)) => {
                    let failure = self.failures.entry(uid.clone()).or_insert(Failure { since: now, told: None });
                    if now - failure.since >= PATIENCE && failure.told.as_ref() != Some(why) {
                        failure.told = Some(why.clone());
                        tell(What::Failed(why.clone()));
                    }
                }
                Some(enroll::State::Enrolled(_)) => {
                    if self.failures.remove(uid).is_some_and(|failure| failure.told.is_some()) {
                        tell(What::Entered);
                    }
                }
                None => drop(self.failures.remove(uid)),
            }
        }
        news.sort_by(|a, b| a.pod.cmp(&b.pod));
        news
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{datapath::NetnsCookie, model::Cluster, policy::testing};

    fn pod(name: &str, annotation: Option<&str>) -> Pod {
        let annotations = annotation.map(|value| (ANNOTATION.to_owned(), value.to_owned()));
        Pod {
            node: "node-1".into(),
            annotations: annotations.into_iter().collect(),
            ..testing::pod("test", name, "10.0.0.1")
        }
    }

    fn view(pods: Vec<Pod>) -> View {
        let mut cluster = Cluster::default();
        for pod in pods {
            cluster.pods.insert(pod.uid.clone(), Arc::new(pod));
        }
        View { cluster: Arc::new(cluster), ..View::default() }
    }

    fn states(of: &[(&Pod, enroll::State)]) -> States {
        Arc::new(of.iter().map(|(pod, state)| (pod.uid.clone(), state.clone())).collect())
    }

    fn what(news: Vec<News>) -> Vec<(String, What)> {
        news.into_iter().map(|news| (news.pod.name.to_string(), news.what)).collect()
    }

    fn enrolled() -> enroll::State {
        enroll::State::Enrolled(NetnsCookie(1))
    }

    fn told() -> Told {
        Told { node_name: "node-1".to_owned(), ..Told::default() }
    }

    /// [E.4]
    #[test]
    fn the_annotation_is_as_the_pod_stands_and_written_once() {
        let (mut told, now) = (told(), Instant::now());
        let new = |annotation| {
            let elsewhere = Pod { node: "node-2".into(), ..pod("elsewhere", Some(ENABLED)) };
            let ended = Pod { finished: true, ..pod("ended", Some(ENABLED)) };
            view(vec![pod("in", annotation), pod("left", Some(ENABLED)), pod("out", None), elsewhere, ended])
        };
        let stands = states(&[(&pod("in", None), enrolled())]);
        let expected =
            [("in".to_owned(), What::Annotation(Some(ENABLED))), ("left".to_owned(), What::Annotation(None))];
        assert_eq!(what(told.news(&new(None), &stands, now)), expected);
        assert_eq!(what(told.news(&new(None), &stands, now)), []);
        // It did not take effect, or was undone.
        assert_eq!(what(told.news(&new(Some("other")), &stands, now + AGAIN)), expected);
        let written = view(vec![pod("in", Some(ENABLED)), pod("left", None), pod("out", None)]);
        assert_eq!(what(told.news(&written, &stands, now + AGAIN)), []);
        // Undone after it was seen: at once, and then no more for a while.
        assert_eq!(what(told.news(&new(None), &stands, now + AGAIN)).len(), 2);
        assert_eq!(what(told.news(&new(None), &stands, now + AGAIN)), []);
    }

    #[test]
    fn a_failure_that_stays_is_an_event_and_so_is_its_end() {
        let (mut told, now) = (told(), Instant::now());
        let view = view(vec![pod("in", Some(PENDING))]);
        let failed = |why: &str| states(&[(&pod("in", None), enroll::State::Failed(why.to_owned()))]);
        assert_eq!(what(told.news(&view, &failed("no address"), now)), []);
        let events = |news: Vec<News>| -> Vec<What> {
            news.into_iter().map(|news| news.what).filter(|what| !matches!(what, What::Annotation(_))).collect()
        };
        // It has its address now: nobody need hear that it had none.
        assert_eq!(events(told.news(&view, &states(&[(&pod("in", None), enrolled())]), now + PATIENCE)), []);
        assert_eq!(events(told.news(&view, &failed("full"), now)), []);
        let late = now + PATIENCE;
        assert_eq!(events(told.news(&view, &failed("full"), late)), [What::Failed("full".to_owned())]);
        assert_eq!(events(told.news(&view, &failed("full"), late)), []);
        assert_eq!(events(told.news(&view, &failed("denied"), late)), [What::Failed("denied".to_owned())]);
        assert_eq!(events(told.news(&view, &states(&[(&pod("in", None), enrolled())]), late)), [What::Entered]);
        assert_eq!(events(told.news(&view, &states(&[(&pod("in", None), enrolled())]), late)), []);
    }

    /// The API server knows the object of a static pod by another UID than the kubelet knows the pod by.
    #[test]
    fn a_static_pod_is_written_to_by_the_uid_of_its_object() {
        let mirror = Pod { mirror_uid: Some("object".into()), ..pod("static", None) };
        let stands = states(&[(&mirror, enrolled())]);
        let news = told().news(&view(vec![mirror.clone(), pod("left", Some(ENABLED))]), &stands, Instant::now());
        let uids: Vec<_> = news.iter().map(|news| (&*news.object_uid, &*news.uid.0)).collect();
        let left = pod("left", None).uid;
        assert_eq!(uids, [(&*left.0, &*left.0), ("object", &*mirror.uid.0)]);
    }

    #[test]
    fn a_note_is_cut_where_a_letter_ends() {
        let note = event(EventType::Warning, "FailedEnrollment", &"ä".repeat(NOTE)).note.expect("a note");
        assert_eq!((note.len(), note.chars().count()), (NOTE, NOTE / 2));
        let note =
            event(EventType::Warning, "FailedEnrollment", &format!("a{}", "ä".repeat(NOTE))).note.expect("a note");
        assert_eq!(note.len(), NOTE - 1);
    }
}
