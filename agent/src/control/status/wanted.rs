//! What the status of a policy is to say, what it says, and the patch that makes the one of the other.
//!
//! Knows one object at a moment; when something is written is for `keeper`, and by whom for `status`.

use std::sync::Arc;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ManagedFieldsEntry, ObjectMeta};
use kube::core::{DynamicObject, Status};
use serde_json::{Map, Value as Json, json};

use crate::source::review::{self, Judged};

use super::super::reports::Count;

/// The field manager of all that is written here.
pub(super) const MANAGER: &str = "culvert-control";
/// Where the last valid version is, as agents read it.
const LAST_VALID: &str = "/status/culvert/lastValid";
/// Most bytes of a spec that is copied: an object has room for 1.5 MiB at the API server, for the spec itself, its copy
/// and who owns each field of them.
const LARGEST_COPY: usize = 256 * 1024;
/// Most bytes of a condition's message (metav1.Condition).
const LONGEST_MESSAGE: usize = 32 * 1024;
/// Types of the conditions.
const ACCEPTED: &str = "Accepted";
const IN_FORCE: &str = "InForce";

/// A version that was valid.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct LastValid {
    pub(super) generation: i64,
    /// As it is written; `None` of one that is too large.
    written: Option<Arc<Json>>,
}

impl LastValid {
    fn of(generation: i64, spec: &Json) -> Self {
        let fits = serde_json::to_vec(spec).is_ok_and(|text| text.len() <= LARGEST_COPY);
        Self { generation, written: fits.then(|| Arc::new(json!({"generation": generation, "spec": spec}))) }
    }

    /// What an object carries; `None` if no agent would act on it.
    fn kept(object: &Json, generation: i64, system_namespace: &str) -> Option<Self> {
        let kept = object.pointer(LAST_VALID)?;
        let of = kept.get("generation")?.as_i64().filter(|of| *of < generation)?;
        let mut then = object.clone();
        *then.get_mut("spec")? = kept.get("spec")?.clone();
        let valid = review::judge(then, system_namespace).faults.is_empty();
        valid.then(|| Self { generation: of, written: Some(Arc::new(kept.clone())) })
    }
}

/// A version of an object, judged.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Version {
    pub(super) generation: i64,
    judged: Judged,
    /// The youngest valid one, this one included.
    pub(super) last_valid: Option<LastValid>,
    /// What is there as the last valid one where none is known that could replace it: perhaps another version of
    /// Culvert can read it.
    leftover: Option<Arc<Json>>,
}

impl Version {
    /// `before` is the youngest valid version that was known of this very object.
    pub(super) fn of(object: &DynamicObject, before: Option<LastValid>, system_namespace: &str) -> Self {
        let generation = object.metadata.generation.unwrap_or_default();
        // What came as JSON is JSON.
        let json = serde_json::to_value(object).unwrap_or_default();
        let mut judged = review::judge(json.clone(), system_namespace);
        if judged.faults.is_empty() {
            let empty = json!({});
            let last_valid = LastValid::of(generation, json.get("spec").unwrap_or(&empty));
            if last_valid.written.is_none() {
                judged.warnings.push(format!(
                    "spec: has more than {} KiB and is not kept as the last valid version, so that agents which start \
                     while a later one is not valid do not have it; divide it into several policies",
                    LARGEST_COPY / 1024
                ));
            }
            return Self { generation, judged, last_valid: Some(last_valid), leftover: None };
        }
        let kept = LastValid::kept(&json, generation, system_namespace);
        let last_valid = kept.into_iter().chain(before).max_by_key(|version| version.generation);
        let leftover = match last_valid {
            Some(_) => None,
            None => json.pointer(LAST_VALID).cloned().map(Arc::new),
        };
        Self { generation, judged, last_valid, leftover }
    }

    pub(super) fn is_valid(&self) -> bool {
        self.judged.faults.is_empty()
    }

    /// The generation that agents are to have in force; `None` if there is none that they could have all of.
    pub(super) fn to_enforce(&self) -> Option<i64> {
        self.last_valid.as_ref().map(|version| version.generation)
    }

    /// `count` is that of [`Version::to_enforce`].
    pub(super) fn wanted(&self, count: Count) -> Wanted {
        let condition = |type_, (status, reason, message): (&'static str, &'static str, String)| Condition {
            type_,
            status: status.into(),
            reason: reason.into(),
            message: bounded(message),
            generation: Some(self.generation),
            since: None,
        };
        let last_valid = match &self.last_valid {
            Some(last_valid) => last_valid.written.clone(),
            None => self.leftover.clone(),
        };
        Wanted {
            generation: self.generation,
            conditions: [condition(ACCEPTED, self.accepted()), condition(IN_FORCE, self.in_force(count))],
            last_valid,
        }
    }

    fn accepted(&self) -> (&'static str, &'static str, String) {
        match (&*self.judged.faults, &*self.judged.warnings) {
            ([], []) => ("True", "Accepted", String::new()),
            ([], warnings) => ("True", "AcceptedWithWarnings", warnings.join("\n")),
            ([first, others @ ..], _) => {
                // kubectl's tables show the first line.
                let first = format!("{first} ({})", self.instead());
                let lines: Vec<&str> = std::iter::once(&*first).chain(others.iter().map(String::as_str)).collect();
                ("False", "Invalid", lines.join("\n"))
            }
        }
    }

    /// What is in force of an object that is not valid.
    fn instead(&self) -> String {
        match &self.last_valid {
            Some(LastValid { generation, written: Some(_) }) => format!("generation {generation} stays in force"),
            Some(LastValid { generation, written: None }) => format!(
                "generation {generation} stays in force where it was; it is too large to be kept for agents that start"
            ),
            None => "only the part that cannot open anything is in force".to_owned(),
        }
    }

    fn in_force(&self, count: Count) -> (&'static str, &'static str, String) {
        let Count { in_force, agents } = count;
        let noun = if agents == 1 { "agent" } else { "agents" };
        match (agents, self.is_valid(), self.to_enforce()) {
            (0, _, _) => ("Unknown", "NoAgents", "no agent is known".to_owned()),
            (_, true, _) if in_force >= agents => {
                ("True", "AllAgents", format!("in force on {in_force} of {agents} {noun}"))
            }
            (_, true, _) => ("False", "Pending", format!("in force on {in_force} of {agents} {noun}")),
            (_, false, Some(generation)) => {
                ("False", "Invalid", format!("generation {generation} is in force on {in_force} of {agents} {noun}"))
            }
            (_, false, None) => ("False", "Invalid", "no version of it was valid".to_owned()),
        }
    }
}

/// Cut where a letter ends.
fn bounded(mut message: String) -> String {
    if message.len() > LONGEST_MESSAGE {
        message.truncate(message.floor_char_boundary(LONGEST_MESSAGE - 3));
        message.push_str("...");
    }
    message
}

/// A condition of the status, of a type of ours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Condition {
    pub(super) type_: &'static str,
    pub(super) status: Box<str>,
    pub(super) reason: Box<str>,
    pub(super) message: String,
    generation: Option<i64>,
    /// `lastTransitionTime`; what is wanted has none.
    pub(super) since: Option<Box<str>>,
}

impl Condition {
    fn read(json: &Json) -> Option<Self> {
        let text = |field: &str| json.get(field).and_then(Json::as_str).unwrap_or_default();
        let type_ = [ACCEPTED, IN_FORCE].into_iter().find(|type_| *type_ == text("type"))?;
        Some(Self {
            type_,
            status: text("status").into(),
            reason: text("reason").into(),
            message: text("message").to_owned(),
            generation: json.get("observedGeneration").and_then(Json::as_i64),
            since: json.get("lastTransitionTime").and_then(Json::as_str).map(Box::from),
        })
    }

    /// Whether it says what is wanted, since whenever. Older definitions of Istio do not know a condition's generation, and
    /// servers drop it.
    fn says(&self, wanted: &Self) -> bool {
        let Self { type_, status, reason, message, generation, since: _ } = self;
        (type_, status, reason, message) == (&wanted.type_, &wanted.status, &wanted.reason, &wanted.message)
            && (generation.is_none() || *generation == wanted.generation)
    }
}

/// What a status is to say.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Wanted {
    pub(super) generation: i64,
    pub(super) conditions: [Condition; 2],
    /// `status.culvert.lastValid`.
    pub(super) last_valid: Option<Arc<Json>>,
}

impl Wanted {
    pub(super) fn is_in_force(&self) -> bool {
        *self.conditions[1].status == *"True"
    }

    /// Whether what is there says anything else, as far as it is not `others`'.
    pub(super) fn differs(&self, present: &Present, others: Fields) -> bool {
        self.differs_in_more_than_counts(present, others)
            || !others.last_valid && !others.conditions && !present.has(&self.conditions[1])
    }

    /// The same of all but the condition that counts agents.
    pub(super) fn differs_in_more_than_counts(&self, present: &Present, others: Fields) -> bool {
        // Whoever writes there, nothing of it is touched.
        !others.last_valid
            && (present.last_valid.as_ref() != self.last_valid.as_deref()
                || !others.generation && present.generation != Some(self.generation)
                || !others.conditions && !present.has(&self.conditions[0]))
    }

    /// The status as server-side apply takes it: all that is ours; what is not in it any more, the server removes.
    /// `now` as RFC 3339 has it.
    pub(super) fn status(&self, present: &Present, others: Fields, now: &str) -> Json {
        let mut status = Map::new();
        if !others.generation {
            status.insert("observedGeneration".to_owned(), self.generation.into());
        }
        if !others.conditions {
            let conditions = self.conditions.iter().map(|wanted| {
                let before =
                    present.conditions.iter().find(|one| (one.type_, &one.status) == (wanted.type_, &wanted.status));
                let since = before.and_then(|condition| condition.since.as_deref()).unwrap_or(now);
                let Condition { type_, status, reason, message, generation, since: _ } = wanted;
                json!({
                    "type": type_, "status": status, "reason": reason, "message": message, "lastTransitionTime": since,
                    "observedGeneration": generation,
                })
            });
            status.insert("conditions".to_owned(), conditions.collect());
        }
        if let Some(last_valid) = &self.last_valid {
            status.insert("culvert".to_owned(), json!({"lastValid": **last_valid}));
        }
        Json::Object(status)
    }
}

/// What a status says, of what concerns us.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Present {
    generation: Option<i64>,
    conditions: Vec<Condition>,
    last_valid: Option<Json>,
}

impl Present {
    pub(super) fn of(object: &DynamicObject) -> Self {
        let status = object.data.get("status").unwrap_or(&Json::Null);
        let conditions = status.get("conditions").and_then(Json::as_array).into_iter().flatten();
        Self {
            generation: status.get("observedGeneration").and_then(Json::as_i64),
            conditions: conditions.filter_map(Condition::read).collect(),
            last_valid: object.data.pointer(LAST_VALID).cloned(),
        }
    }

    fn has(&self, condition: &Condition) -> bool {
        self.conditions.iter().any(|one| one.says(condition))
    }
}

/// Fields of a status that others write, and that are left to them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Fields {
    pub(super) generation: bool,
    pub(super) conditions: bool,
    pub(super) last_valid: bool,
}

impl Fields {
    /// Those that an object says to be others'. A list of conditions that is one value belongs to whoever wrote it; of
    /// one that is a map, only those of our types concern us.
    pub(super) fn owned(meta: &ObjectMeta) -> Self {
        let others = meta.managed_fields.iter().flatten().filter(|entry| entry.manager.as_deref() != Some(MANAGER));
        others.filter_map(|entry: &ManagedFieldsEntry| entry.fields_v1.as_ref()?.0.get("f:status")).fold(
            Self::default(),
            |all, status| {
                let conditions = status.get("f:conditions").and_then(Json::as_object);
                let ours = |key: &String| {
                    let key = key.strip_prefix("k:").and_then(|key| serde_json::from_str::<Json>(key).ok());
                    key.is_some_and(|key| [ACCEPTED, IN_FORCE].iter().any(|type_| key["type"] == *type_))
                };
                let conditions = conditions.is_some_and(|keys| keys.is_empty() || keys.keys().any(ours));
                all.and(Self {
                    generation: status.get("f:observedGeneration").is_some(),
                    conditions,
                    last_valid: false,
                })
            },
        )
    }

    /// Those for which the server has refused a patch since they are another manager's; `None` if that is not why.
    pub(super) fn refused(status: &Status) -> Option<Self> {
        let causes = status.details.iter().flat_map(|details| &details.causes);
        let mut fields = causes.filter(|cause| cause.reason == "FieldManagerConflict").peekable();
        fields.peek()?;
        Some(fields.fold(Self::default(), |all, cause| {
            let at = |field: &str| cause.field.starts_with(&format!(".status.{field}"));
            let known =
                Self { generation: at("observedGeneration"), conditions: at("conditions"), last_valid: at("culvert") };
            // Of what is not known, all is left.
            all.and(if known == Self::default() { Self { last_valid: true, ..known } } else { known })
        }))
    }

    pub(super) fn and(self, other: Self) -> Self {
        Self {
            generation: self.generation || other.generation,
            conditions: self.conditions || other.conditions,
            last_valid: self.last_valid || other.last_valid,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_with_warnings_says_them() {
        let warnings = vec!["spec.a: does nothing; remove it".to_owned(), "spec.b: does less; mend it".to_owned()];
        let judged = Judged { faults: Vec::new(), warnings };
        let version = Version { generation: 4, judged, last_valid: None, leftover: None };
        let [accepted, _] = version.wanted(Count { in_force: 0, agents: 1 }).conditions;
        assert_eq!((&*accepted.status, &*accepted.reason), ("True", "AcceptedWithWarnings"));
        assert_eq!(accepted.message, "spec.a: does nothing; remove it\nspec.b: does less; mend it");
    }

    #[test]
    fn a_message_is_cut_where_a_letter_ends() {
        assert_eq!(bounded("é".repeat(10)), "é".repeat(10));
        let cut = bounded("é".repeat(LONGEST_MESSAGE));
        assert!(cut.len() <= LONGEST_MESSAGE && cut.ends_with("é..."), "{}", cut.len());
    }
}
