//! From the body of a request to the body of its answer: `AdmissionReview` of `admission.k8s.io/v1`.
//!
//! Pure. Refused is an object that is invalid and was not invalid before; everything else is allowed, with what there
//! is to be said of it as warnings, which kubectl shows.

use serde::Deserialize;
use serde_json::{Value as Json, json};

use super::Judge;
use crate::source;

/// Most values of an object: decoding takes some hundred bytes for each, and a line for each that is wrong. What people
/// write has hundreds.
pub(super) const MAX_VALUES: usize = 50_000;
/// Most characters of one warning. API servers cut longer ones there once there are many; Kubernetes asks for 120 if
/// possible, but at the end of ours is the remedy.
const MAX_WARNING: usize = 256;
/// Most characters of all warnings: API servers drop what goes beyond.
const MAX_WARNINGS: usize = 4096;
/// Most characters of the message of a refusal.
const MAX_MESSAGE: usize = 8192;
/// Most characters of a name that is logged.
const MAX_NAME: usize = 256;
/// Most characters of why a body is no review.
pub(super) const MAX_WHY: usize = 256;

/// Why a body has no answer.
#[derive(Debug)]
pub(super) enum Unread {
    /// It is not an `AdmissionReview` of the version that the webhook's configuration names.
    NoReview(String),
    /// One of its objects has more than [`MAX_VALUES`] values.
    TooLarge,
}

/// The answer to a review.
#[derive(Debug)]
pub(super) struct Answer {
    /// The body.
    pub(super) json: String,
    /// What was refused, for the log.
    pub(super) refused: Option<Refused>,
}

/// An object that was not allowed.
#[derive(Debug)]
pub(super) struct Refused {
    /// Kind, namespace and name.
    pub(super) object: String,
    /// Who wrote it.
    pub(super) user: String,
    /// It would not have been stored anyway.
    pub(super) dry_run: bool,
    /// The first thing that is wrong.
    pub(super) fault: String,
    /// How many things are.
    pub(super) faults: usize,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Review {
    api_version: String,
    kind: String,
    request: Request,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Request {
    uid: String,
    operation: String,
    #[serde(default)]
    sub_resource: Option<String>,
    #[serde(default)]
    object: Option<Json>,
    #[serde(default)]
    old_object: Option<Json>,
    #[serde(default)]
    dry_run: Option<bool>,
    #[serde(default)]
    user_info: Option<UserInfo>,
}

#[derive(Deserialize)]
struct UserInfo {
    #[serde(default)]
    username: Option<String>,
}

/// Answers the review in `body`.
///
/// # Errors
/// There is no review in it that can be judged.
pub(super) fn answer(body: &[u8], judge: &Judge) -> Result<Answer, Unread> {
    let review: Review = serde_json::from_slice(body).map_err(|error| Unread::NoReview(error.to_string()))?;
    if (&*review.api_version, &*review.kind) != ("admission.k8s.io/v1", "AdmissionReview") {
        return Err(Unread::NoReview(format!("{} of {}", review.kind, review.api_version)));
    }
    let Request { uid, operation, sub_resource, object, old_object, dry_run, user_info } = review.request;
    // What goes away, or is a status or a scale, is not for us; nor is a kind that the configuration should not name.
    let is_written = matches!(&*operation, "CREATE" | "UPDATE") && sub_resource.unwrap_or_default().is_empty();
    let Some(object) = object.filter(|object| is_written && is_known(object)) else {
        return Ok(Answer { json: allowed(&uid, &[]), refused: None });
    };
    if [Some(&object), old_object.as_ref()].into_iter().flatten().any(|object| values(object) > MAX_VALUES) {
        return Err(Unread::TooLarge);
    }
    let subject = subject(&object);
    // Whoever changes nothing of the spec, as a controller that removes its finalizer, cannot mend it either: were that
    // refused, an object from before this webhook could never be deleted.
    let before = old_object.filter(|old| old.get("spec") == object.get("spec"));
    let mut judged = judge(object);
    if !judged.faults.is_empty() && before.is_some_and(|before| !judge(before).faults.is_empty()) {
        let faults = std::mem::take(&mut judged.faults);
        judged.warnings = faults.into_iter().chain(judged.warnings).collect();
    }
    let Some(fault) = judged.faults.first().map(|fault| clean(fault)) else {
        return Ok(Answer { json: allowed(&uid, &warnings(&subject, &judged.warnings)), refused: None });
    };
    let refused = Refused {
        object: cut(&subject, MAX_NAME),
        user: cut(&clean(&user_info.and_then(|user| user.username).unwrap_or_default()), MAX_NAME),
        dry_run: dry_run.unwrap_or_default(),
        fault: cut(&fault, MAX_MESSAGE),
        faults: judged.faults.len(),
    };
    let response = json!({
        "uid": uid,
        "allowed": false,
        // Without details: with them, kubectl would show the object's name in the place of the message.
        "status": {
            "status": "Failure", "code": 422, "reason": "Invalid", "message": message(&subject, &judged.faults)
        },
        "warnings": warnings(&subject, &judged.warnings),
    });
    Ok(Answer { json: reviewed(&response), refused: Some(refused) })
}

fn allowed(uid: &str, warnings: &[String]) -> String {
    reviewed(&json!({"uid": uid, "allowed": true, "warnings": warnings}))
}

fn reviewed(response: &Json) -> String {
    json!({"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "response": response}).to_string()
}

/// Whether agents read this kind in this version; of others there is nothing to be said.
fn is_known(object: &Json) -> bool {
    let text = |name: &str| object.get(name).and_then(Json::as_str).unwrap_or_default();
    let (group, version) = text("apiVersion").split_once('/').unwrap_or_default();
    source::istio_kinds()
        .any(|kind| (kind.group, kind.name) == (group, text("kind")) && kind.versions.contains(&version))
}

/// How many values there are in it, itself included.
fn values(json: &Json) -> usize {
    1 + match json {
        Json::Null | Json::Bool(_) | Json::Number(_) | Json::String(_) => 0,
        Json::Array(items) => items.iter().map(values).sum(),
        Json::Object(entries) => entries.values().map(values).sum(),
    }
}

/// Kind, namespace and name.
fn subject(object: &Json) -> String {
    let text = |path: &str| object.pointer(path).and_then(Json::as_str).unwrap_or_default();
    let (kind, namespace, name) = (text("/kind"), text("/metadata/namespace"), text("/metadata/name"));
    clean(&if namespace.is_empty() { format!("{kind} {name}") } else { format!("{kind} {namespace}/{name}") })
}

/// The name once, since kubectl shows only that of the file, and all faults, one in each line.
fn message(subject: &str, faults: &[String]) -> String {
    let mut message = format!("{subject}: ");
    let mut room = MAX_MESSAGE;
    for (fault, index) in faults.iter().zip(0..) {
        let fault = clean(fault);
        let length = fault.chars().count() + 1;
        if index > 0 && length > room {
            message.push_str(&format!("\nand {} more", faults.len() - index));
            break;
        }
        if index > 0 {
            message.push('\n');
        }
        message.push_str(&cut(&fault, room));
        room = room.saturating_sub(length);
    }
    message
}

/// As many as API servers pass on, each with the name of the object: kubectl shows none.
fn warnings(subject: &str, warnings: &[String]) -> Vec<String> {
    let mut room = MAX_WARNINGS;
    let named = |warning: &String| match warning.starts_with(subject) {
        true => cut(&clean(warning), MAX_WARNING),
        false => cut(&clean(&format!("{subject}: {warning}")), MAX_WARNING),
    };
    let fits = |warning: &String| {
        let left = room.checked_sub(warning.chars().count());
        room = left.unwrap_or_default();
        left.is_some()
    };
    warnings.iter().map(named).take_while(fits).collect()
}

/// At most `most` characters of it, the last of which says that there was more.
pub(super) fn cut(text: &str, most: usize) -> String {
    match text.char_indices().nth(most) {
        None => text.to_owned(),
        Some(_) => text.chars().take(most.saturating_sub(1)).chain(['…']).collect(),
    }
}

/// Without control characters, which API servers take in no warning and which terminals obey.
fn clean(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for c in text.chars() {
        match c.is_control() {
            true => safe.extend(c.escape_default()),
            false => safe.push(c),
        }
    }
    safe
}
