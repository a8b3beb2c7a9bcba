use std::{cell::RefCell, rc::Rc};

use kube::core::Status;
use proptest::prelude::*;
use serde_json::{Value as Json, json};

use super::{wanted::Present, *};
use crate::control::reports::Count;

const KIND: &str = "PeerAuthentication";
const CLOCK: &str = "2026-01-02T03:04:05Z";

/// Of a generation.
type Counting = Box<dyn Fn(i64) -> Count>;

/// A keeper, a clock of its own, and an API server that does as it is told.
struct Bench {
    keeper: Keeper,
    now: Instant,
    /// Objects as the server has them.
    objects: std::collections::BTreeMap<&'static str, Json>,
    counts: Rc<RefCell<Counting>>,
}

impl Bench {
    /// A leader that has had time for every report, and agents that have everything in force.
    fn new() -> Self {
        let mut bench = Self::just_elected();
        bench.pass(100.0);
        bench
    }

    fn just_elected() -> Self {
        let now = Instant::now();
        let counts: Counting = Box::new(|_| Count { in_force: 2, agents: 2 });
        Self {
            keeper: Keeper::new("istio-system", now),
            now,
            objects: std::collections::BTreeMap::new(),
            counts: Rc::new(RefCell::new(counts)),
        }
    }

    /// The next leader, of the same cluster, who knows only what is in it.
    fn elect(&mut self) {
        self.keeper = Keeper::new("istio-system", self.now);
        self.hear(Heard::List);
        for object in self.objects.clone().into_values() {
            self.hear(Heard::Listed(typed(object)));
        }
        self.hear(Heard::Complete);
    }

    fn pass(&mut self, seconds: f64) {
        self.now += Duration::from_secs_f64(seconds);
    }

    fn counts(&mut self, of: impl Fn(i64) -> Count + 'static) {
        *self.counts.borrow_mut() = Box::new(of);
        let counts = self.counts.clone();
        self.keeper.recount(&|_, _, generation| counts.borrow()(generation), self.now);
    }

    fn in_force(&mut self, in_force: usize, agents: usize) {
        self.counts(move |_| Count { in_force, agents });
    }

    fn hear(&mut self, heard: Heard<DynamicObject>) {
        let counts = self.counts.clone();
        self.keeper.hear(KIND, heard, &|_, _, generation| counts.borrow()(generation), self.now);
    }

    /// A user writes the spec.
    fn put(&mut self, name: &'static str, spec: Json) {
        let object = self.objects.entry(name).or_insert_with(|| {
            json!({
                "apiVersion": "security.istio.io/v1", "kind": KIND,
                "metadata": {"namespace": "shop", "name": name, "uid": format!("uid-{name}"), "generation": 0},
            })
        });
        let generation = object["metadata"]["generation"].as_i64().expect("a number");
        object["metadata"]["generation"] = (generation + 1).into();
        object["spec"] = spec;
        self.tell(name);
    }

    fn edit(&mut self, name: &'static str, edit: impl FnOnce(&mut Json)) {
        edit(self.objects.get_mut(name).expect("an object"));
        self.tell(name);
    }

    fn tell(&mut self, name: &'static str) {
        let object = typed(self.objects[name].clone());
        self.hear(Heard::Applied(object));
    }

    /// Seconds until something is due.
    fn due(&self) -> Option<f64> {
        let due = self.keeper.due()?.saturating_duration_since(self.now);
        Some(due.as_nanos().div_ceil(1_000_000) as f64 / 1000.0)
    }

    fn next(&mut self) -> Option<Write> {
        self.keeper.next(self.now, CLOCK)
    }

    /// What is due now, written as a server does that knows only one manager.
    fn write(&mut self) -> Option<Json> {
        let write = self.next()?;
        let name = self.objects.keys().copied().find(|name| **name == *write.key.1.name).expect("an object");
        let status = write.patch()["status"].clone();
        self.objects.get_mut(name).expect("an object")["status"] = status.clone();
        let answer = typed(self.objects[name].clone());
        self.keeper.finish(write, Outcome::Written(Box::new(answer)), self.now);
        self.tell(name);
        Some(status)
    }

    /// The status after everything has been written that is to be.
    fn settled(&mut self, name: &'static str) -> Json {
        while let Some(due) = self.due() {
            self.pass(due);
            assert!(self.write().is_some(), "what is due is written");
        }
        self.objects[name]["status"].clone()
    }

    fn refuse(&mut self, fields: &[&str]) {
        let write = self.next().expect("something is due");
        self.keeper.finish(write, judge(&conflict(fields)), self.now);
    }
}

fn typed(object: Json) -> DynamicObject {
    serde_json::from_value(object).expect("an object")
}

fn conflict(fields: &[&str]) -> Error {
    let causes: Vec<_> = fields
        .iter()
        .map(|field| json!({"reason": "FieldManagerConflict", "message": "conflict with \"istiod\"", "field": field}))
        .collect();
    api_error(json!({
        "code": 409, "reason": "Conflict", "details": {"causes": causes},
        "message": "Apply failed with 1 conflict: conflict with \"istiod\": .status.conditions",
    }))
}

fn api_error(status: Json) -> Error {
    Error::Api(Box::new(serde_json::from_value::<Status>(status).expect("a Status")))
}

fn mode(mode: &str) -> Json {
    json!({"mtls": {"mode": mode}})
}

fn condition<'a>(status: &'a Json, type_: &str) -> &'a Json {
    let conditions = status["conditions"].as_array().expect("conditions");
    conditions.iter().find(|condition| condition["type"] == type_).expect("the condition")
}

/// Status, reason and message.
fn said(status: &Json, type_: &str) -> (String, String, String) {
    let condition = condition(status, type_);
    let text = |field: &str| condition[field].as_str().expect("text").to_owned();
    (text("status"), text("reason"), text("message"))
}

fn three(status: &str, reason: &str, message: &str) -> (String, String, String) {
    (status.to_owned(), reason.to_owned(), message.to_owned())
}

#[test]
fn a_valid_version_is_accepted_and_kept() {
    let mut bench = Bench::new();
    bench.put("p", mode("STRICT"));
    let status = bench.settled("p");
    assert_eq!(said(&status, "Accepted"), three("True", "Accepted", ""));
    assert_eq!(said(&status, "InForce"), three("True", "AllAgents", "in force on 2 of 2 agents"));
    assert_eq!(status["observedGeneration"], 1);
    for type_ in ["Accepted", "InForce"] {
        assert_eq!(condition(&status, type_)["observedGeneration"], 1);
        assert_eq!(condition(&status, type_)["lastTransitionTime"], CLOCK);
    }
    assert_eq!(status["culvert"], json!({"lastValid": {"generation": 1, "spec": {"mtls": {"mode": "STRICT"}}}}));
}

/// What agents read of it is what they take for the last valid version, whatever it is: no spec at all denies all
/// traffic.
#[test]
fn a_version_without_a_spec_is_kept_as_an_empty_one() {
    let mut bench = Bench::new();
    bench.put("p", json!(null));
    bench.edit("p", |object| drop(object.as_object_mut().expect("an object").remove("spec")));
    assert_eq!(bench.settled("p")["culvert"]["lastValid"], json!({"generation": 1, "spec": {}}));
}

#[test]
fn a_wrong_version_says_each_fault_and_what_is_in_force_instead() {
    let mut bench = Bench::new();
    let wrong = json!({"mtls": {"mode": "STRIKT"}, "portLevelMtls": {"80": {"mode": "NONE"}}});
    bench.put("p", wrong.clone());
    let status = bench.settled("p");
    let (accepted, reason, message) = said(&status, "Accepted");
    let lines: Vec<&str> = message.lines().collect();
    assert_eq!((&*accepted, &*reason, lines.len()), ("False", "Invalid", 2), "{message}");
    assert!(lines[0].starts_with("spec.mtls.mode: ") && lines[0].contains("; "), "{message}");
    assert!(lines[0].ends_with(" (only the part that cannot open anything is in force)"), "{message}");
    assert!(lines[1].starts_with("spec.portLevelMtls"), "{message}");
    assert_eq!(said(&status, "InForce"), three("False", "Invalid", "no version of it was valid"));
    assert!(status.get("culvert").is_none());
    // Mended, and wrong again.
    bench.put("p", mode("STRICT"));
    assert_eq!(said(&bench.settled("p"), "Accepted").0, "True");
    bench.put("p", wrong);
    bench.counts(|generation| Count { in_force: if generation == 2 { 2 } else { 0 }, agents: 3 });
    let status = bench.settled("p");
    assert!(said(&status, "Accepted").2.contains("(generation 2 stays in force)"), "{status}");
    assert_eq!(said(&status, "InForce"), three("False", "Invalid", "generation 2 is in force on 2 of 3 agents"));
    assert_eq!(status["culvert"]["lastValid"], json!({"generation": 2, "spec": mode("STRICT")}));
    assert_eq!(status["observedGeneration"], 3);
}

#[test]
fn agents_are_counted() {
    let mut bench = Bench::new();
    bench.in_force(1, 2);
    bench.put("p", mode("STRICT"));
    for (counts, expected) in [
        ((1, 2), three("False", "Pending", "in force on 1 of 2 agents")),
        ((2, 2), three("True", "AllAgents", "in force on 2 of 2 agents")),
        ((1, 1), three("True", "AllAgents", "in force on 1 of 1 agent")),
        ((0, 0), three("Unknown", "NoAgents", "no agent is known")),
    ] {
        bench.in_force(counts.0, counts.1);
        assert_eq!(said(&bench.settled("p"), "InForce"), expected);
    }
}

/// [C.6]: of what a leader has seen and of what is kept, the younger one.
#[test]
fn a_leader_that_has_seen_a_younger_valid_version_keeps_that_one() {
    let mut bench = Bench::new();
    bench.put("p", mode("DISABLE"));
    bench.settled("p");
    // Nothing is written between these.
    bench.put("p", mode("STRICT"));
    bench.put("p", mode("STRIKT"));
    assert_eq!(bench.objects["p"]["status"]["culvert"]["lastValid"]["generation"], 1);
    assert_eq!(bench.settled("p")["culvert"]["lastValid"], json!({"generation": 2, "spec": mode("STRICT")}));
    // The next leader knows it from there.
    bench.elect();
    assert_eq!(bench.due(), None);
    bench.put("p", mode("NONE"));
    assert_eq!(bench.settled("p")["culvert"]["lastValid"]["generation"], 2);
}

/// Another object of the name has no past, and what no agent would take counts for nothing.
#[test]
fn only_what_was_a_version_of_this_object_is_kept() {
    let mut bench = Bench::new();
    bench.put("p", mode("STRICT"));
    bench.settled("p");
    bench.objects.remove("p");
    bench.put("p", mode("STRIKT"));
    bench.edit("p", |object| object["metadata"]["uid"] = "another".into());
    assert!(bench.settled("p").get("culvert").is_none());
    for (kept, expected) in [
        (json!({"generation": 1, "spec": mode("STRICT")}), "generation 1 stays in force"),
        (json!({"generation": 2, "spec": mode("STRICT")}), "only the part"),
        (json!({"generation": 1, "spec": mode("NONE")}), "only the part"),
        (json!({"generation": "1", "spec": mode("STRICT")}), "only the part"),
        (json!("nothing"), "only the part"),
    ] {
        let mut bench = Bench::new();
        bench.put("p", mode("STRICT"));
        bench.objects.get_mut("p").expect("an object")["status"] = json!({"culvert": {"lastValid": kept}});
        bench.keeper = Keeper::new("istio-system", bench.now);
        bench.put("p", mode("STRIKT"));
        let status = bench.settled("p");
        assert!(said(&status, "Accepted").2.contains(expected), "{kept}: {status}");
        assert_eq!(status["culvert"]["lastValid"], kept, "another version of Culvert may know what it is");
    }
}

/// etcd takes 1.5 MiB.
#[test]
fn a_spec_that_is_too_large_is_not_copied_and_that_is_said() {
    let mut bench = Bench::new();
    bench.put("p", mode("STRICT"));
    bench.settled("p");
    let ports: serde_json::Map<_, _> =
        (1..12_000).map(|port: u16| (port.to_string(), json!({"mode": "STRICT"}))).collect();
    let large = json!({"selector": {"matchLabels": {"app": "web"}}, "portLevelMtls": ports});
    bench.put("p", large);
    let status = bench.settled("p");
    let (accepted, reason, message) = said(&status, "Accepted");
    assert_eq!((&*accepted, &*reason), ("True", "AcceptedWithWarnings"), "{message}");
    assert!(message.contains("256 KiB"), "{message}");
    assert!(status.get("culvert").is_none(), "an older one is not the last one");
    bench.put("p", mode("STRIKT"));
    let status = bench.settled("p");
    assert!(said(&status, "Accepted").2.contains("generation 2 stays in force where it was"), "{status}");
    assert!(status.get("culvert").is_none());
}

#[test]
fn the_time_of_a_condition_is_that_of_its_last_change_of_status() {
    let mut bench = Bench::new();
    bench.in_force(1, 2);
    bench.put("p", mode("STRICT"));
    bench.settled("p");
    let before = "2020-01-01T00:00:00Z";
    bench.edit("p", |object| {
        for at in [0, 1] {
            object["status"]["conditions"][at]["lastTransitionTime"] = before.into();
        }
    });
    assert_eq!(bench.due(), None, "when it was is nothing to write");
    bench.in_force(2, 2);
    bench.put("p", mode("PERMISSIVE"));
    let status = bench.settled("p");
    assert_eq!(condition(&status, "Accepted")["lastTransitionTime"], before);
    assert_eq!(condition(&status, "Accepted")["observedGeneration"], 2);
    assert_eq!(condition(&status, "InForce")["lastTransitionTime"], CLOCK);
}

#[test]
fn what_changes_in_a_row_is_one_write() {
    let mut bench = Bench::new();
    bench.put("p", mode("STRICT"));
    assert_eq!(bench.due(), Some(1.0));
    assert!(bench.next().is_none(), "it is not due yet");
    bench.pass(0.8);
    bench.put("p", mode("PERMISSIVE"));
    assert_eq!(bench.due(), Some(1.0));
    // At the latest five seconds after the first change.
    for _ in 0..5 {
        bench.pass(0.8);
        bench.put("p", mode("STRICT"));
    }
    assert_eq!(bench.due(), Some(0.2));
    bench.pass(0.2);
    assert_eq!(bench.write().expect("a write")["observedGeneration"], 7);
    assert_eq!(bench.due(), None);
}

#[test]
fn a_new_version_waits_for_all_agents_and_not_long() {
    let mut bench = Bench::new();
    bench.counts(|generation| Count { in_force: if generation == 1 { 2 } else { 0 }, agents: 2 });
    bench.put("p", mode("STRICT"));
    assert_eq!(bench.due(), Some(1.0), "they have it");
    bench.settled("p");
    bench.pass(60.0);
    bench.put("p", mode("PERMISSIVE"));
    assert_eq!(bench.due(), Some(3.0), "they have not");
    bench.pass(1.5);
    bench.in_force(2, 2);
    assert_eq!(bench.due(), Some(1.0), "they have now");
    assert_eq!(said(&bench.settled("p"), "InForce").1, "AllAgents");
    // One never comes.
    bench.in_force(1, 2);
    bench.pass(60.0);
    bench.put("p", mode("STRICT"));
    bench.pass(3.0);
    let status = bench.write().expect("a write");
    assert_eq!(said(&status, "InForce").1, "Pending");
}

#[test]
fn an_object_is_written_at_most_every_thirty_seconds() {
    let mut bench = Bench::new();
    bench.put("p", mode("STRICT"));
    bench.pass(1.0);
    assert!(bench.write().is_some());
    bench.pass(10.0);
    bench.put("p", mode("PERMISSIVE"));
    bench.put("q", mode("STRICT"));
    assert_eq!(bench.due(), Some(1.0));
    bench.pass(1.0);
    bench.write().expect("the other object's");
    assert_eq!(bench.due(), Some(19.0));
    bench.pass(18.9);
    assert!(bench.next().is_none());
    bench.pass(0.1);
    assert_eq!(bench.write().expect("a write")["observedGeneration"], 2);
    // What goes back to what is written is no write.
    bench.in_force(1, 2);
    bench.pass(20.0);
    bench.in_force(2, 2);
    assert_eq!(bench.due(), None);
}

/// A restart, or another leader, writes nothing where everything is said, and nobody had time to report to it.
#[test]
fn a_new_leader_writes_nothing_that_is_there() {
    let mut bench = Bench::new();
    bench.put("p", mode("STRICT"));
    bench.put("q", mode("STRIKT"));
    bench.settled("p");
    bench.elect();
    assert_eq!(bench.due(), None);
    // It has not heard of any agent, then of some, then of all.
    bench.in_force(0, 0);
    bench.elect();
    assert!(bench.due().is_some_and(|due| due > 25.0), "{:?}", bench.due());
    bench.in_force(1, 2);
    bench.pass(20.0);
    assert!(bench.next().is_none());
    bench.in_force(2, 2);
    assert_eq!(bench.due(), None);
    // What only it knows is not put off.
    bench.put("p", mode("PERMISSIVE"));
    assert_eq!(bench.due(), Some(1.0));
    // An agent that has not reported by then is missing.
    bench.settled("p");
    bench.elect();
    bench.in_force(1, 2);
    bench.pass(31.0);
    assert_eq!(said(&bench.write().expect("a write"), "InForce").1, "Pending");
}

#[test]
fn what_others_change_is_written_again() {
    let mut bench = Bench::new();
    bench.put("p", mode("STRICT"));
    bench.settled("p");
    bench.edit("p", |object| object["status"] = json!({}));
    assert_eq!(bench.due(), Some(30.0));
    assert_eq!(said(&bench.settled("p"), "Accepted").0, "True");
}

/// A definition may drop a field that it does not know: the server's answer is as good as it gets.
#[test]
fn what_the_server_makes_of_a_write_is_not_written_again() {
    let mut bench = Bench::new();
    bench.put("p", mode("STRICT"));
    bench.pass(1.0);
    let write = bench.next().expect("a write");
    let mut status = write.patch()["status"].clone();
    status.as_object_mut().expect("a status").remove("observedGeneration");
    bench.objects.get_mut("p").expect("an object")["status"] = status;
    let answer = typed(bench.objects["p"].clone());
    bench.keeper.finish(write, Outcome::Written(Box::new(answer)), bench.now);
    bench.tell("p");
    assert_eq!(bench.due(), None);
}

#[test]
fn news_that_are_older_than_an_answer_cause_no_write() {
    let mut bench = Bench::new();
    bench.put("p", mode("STRICT"));
    let old = bench.objects["p"].clone();
    bench.pass(1.0);
    bench.write().expect("a write");
    bench.hear(Heard::Applied(typed(old)));
    bench.pass(0.5);
    assert!(bench.next().is_none());
    bench.tell("p");
    assert_eq!(bench.due(), None);
}

#[test]
fn what_changes_while_a_write_is_on_its_way_is_the_next_one() {
    let mut bench = Bench::new();
    bench.put("p", mode("STRICT"));
    bench.pass(1.0);
    let write = bench.next().expect("a write");
    bench.put("p", mode("PERMISSIVE"));
    assert_eq!(bench.due(), None, "one of an object at a time");
    bench.pass(2.0);
    let mut answer = bench.objects["p"].clone();
    answer["status"] = write.patch()["status"].clone();
    bench.keeper.finish(write, Outcome::Written(Box::new(typed(answer))), bench.now);
    assert_eq!(bench.due(), Some(30.0));
    assert_eq!(bench.settled("p")["observedGeneration"], 2);
}

/// Never a fight: what another manager has in there stays, and the last valid version is written all the same.
#[test]
fn a_conflict_leaves_to_others_what_is_theirs() {
    let mut bench = Bench::new();
    bench.put("p", mode("STRICT"));
    bench.pass(1.0);
    bench.refuse(&[".status.conditions"]);
    bench.pass(1.0);
    let status = bench.write().expect("a write");
    assert_eq!(status["culvert"]["lastValid"]["generation"], 1);
    assert_eq!(status["observedGeneration"], 1);
    assert!(status.get("conditions").is_none());
    // Agents that come and go are none of it; a new version is.
    bench.in_force(1, 2);
    assert!(bench.due().is_some_and(|due| due > 290.0), "{:?}", bench.due());
    bench.pass(60.0);
    bench.put("p", mode("PERMISSIVE"));
    bench.pass(3.0);
    assert_eq!(bench.write().expect("a write")["culvert"]["lastValid"]["generation"], 2);
    // After a while it is tried again.
    bench.pass(300.0);
    assert!(bench.next().is_none());
    bench.pass(1.0);
    assert!(bench.write().expect("a write").get("conditions").is_some());
    // In the last valid version too: the whole is left alone.
    bench.pass(30.0);
    bench.put("p", mode("STRICT"));
    bench.pass(3.0);
    bench.refuse(&[".status.culvert.lastValid.generation"]);
    bench.put("p", mode("DISABLE"));
    assert_eq!(bench.due(), Some(300.0));
    bench.pass(300.0);
    assert!(bench.next().is_none());
    bench.pass(1.0);
    assert_eq!(bench.write().expect("a write")["culvert"]["lastValid"]["generation"], 4);
}

/// So that not each new leader asks for each object whether it may.
#[test]
fn what_an_object_says_to_be_others_is_not_tried() {
    let managed = |manager: &str, fields: Json| {
        json!([{"manager": manager, "operation": "Apply", "subresource": "status", "fieldsType": "FieldsV1",
                "apiVersion": "security.istio.io/v1", "fieldsV1": {"f:status": fields}}])
    };
    let list = json!({"f:conditions": {}});
    let map = |type_: &str| json!({"f:conditions": {(format!("k:{{\"type\":\"{type_}\"}}")): {".": {}}}});
    for (manager, fields, ours) in [
        ("istiod", list.clone(), false),
        (MANAGER, list, true),
        ("istiod", map("Reconciled"), true),
        ("istiod", map("Accepted"), false),
        ("kubectl-edit", json!({"f:validationMessages": {}}), true),
    ] {
        let mut bench = Bench::new();
        bench.put("p", mode("STRICT"));
        bench.edit("p", |object| object["metadata"]["managedFields"] = managed(manager, fields.clone()));
        bench.pass(1.0);
        let status = bench.write().expect("a write");
        assert_eq!(status.get("conditions").is_some(), ours, "{manager} {fields}");
        assert_eq!(status["culvert"]["lastValid"]["generation"], 1);
        assert_eq!(bench.due(), None, "{manager} {fields}");
        // Who gives it up has given it up.
        bench.edit("p", |object| object["metadata"]["managedFields"] = json!([]));
        assert!(bench.settled("p").get("conditions").is_some());
    }
}

#[test]
fn answers_mean_what_the_server_says() {
    let of = |status| judge(&api_error(status));
    assert!(matches!(of(json!({"code": 404, "reason": "NotFound"})), Outcome::Gone));
    let other = json!({"code": 409, "reason": "Conflict", "message": "Precondition failed: UID in precondition: a"});
    assert!(matches!(of(other), Outcome::Gone));
    let fields = |fields: &[&str]| match judge(&conflict(fields)) {
        Outcome::Refused(fields, _) => (fields.generation, fields.conditions, fields.last_valid),
        outcome => panic!("{outcome:?}"),
    };
    assert_eq!(fields(&[".status.conditions"]), (false, true, false));
    assert_eq!(fields(&[".status.observedGeneration", ".status.conditions"]), (true, true, false));
    assert_eq!(fields(&[".status.culvert.lastValid.spec.mtls.mode"]), (false, false, true));
    assert_eq!(fields(&[".status"]), (false, false, true));
    let forbidden = "peerauthentications.security.istio.io \"p\" is forbidden: User \"culvert\" cannot patch resource \
                     \"peerauthentications/status\"";
    let Outcome::Failed { error, after } = of(json!({"code": 403, "message": forbidden})) else { panic!() };
    assert_eq!((&*error, after), (&*format!("{forbidden} (403)"), Some(Duration::ZERO)));
    let busy = json!({"code": 429, "message": "busy", "details": {"retryAfterSeconds": 7}});
    assert!(matches!(of(busy), Outcome::Failed { after: Some(after), .. } if after.as_secs() == 7));
}

/// Older definitions of Istio do not know a condition's generation, and the server drops it.
#[test]
fn a_condition_without_its_generation_says_enough() {
    let mut bench = Bench::new();
    bench.put("p", mode("STRICT"));
    bench.settled("p");
    bench.edit("p", |object| {
        for at in [0, 1] {
            drop(object["status"]["conditions"][at].as_object_mut().expect("fields").remove("observedGeneration"));
        }
    });
    bench.elect();
    assert_eq!(bench.due(), None);
    bench.put("p", mode("PERMISSIVE"));
    assert_eq!(bench.due(), Some(1.0));
}

/// While a right is missing, one object at a time is tried, ever more seldom, and each gets its turn.
#[test]
fn errors_are_tried_again_with_pauses_and_one_at_a_time() {
    let mut bench = Bench::new();
    for name in ["a", "b", "c"] {
        bench.put(name, mode("STRICT"));
    }
    bench.pass(1.0);
    let failed = || Outcome::Failed { error: "cannot patch".to_owned(), after: None };
    let writes: Vec<Write> = std::iter::from_fn(|| bench.next()).collect();
    assert_eq!(writes.len(), 3);
    for write in writes {
        bench.keeper.finish(write, failed(), bench.now);
    }
    let mut pauses = Vec::new();
    let mut tried = std::collections::BTreeSet::new();
    for _ in 0..20 {
        let due = bench.due().expect("it is tried again");
        bench.pass(due);
        let write = bench.next().expect("it is due");
        assert!(bench.next().is_none(), "one at a time");
        tried.insert(write.key.1.name.clone());
        bench.keeper.finish(write, failed(), bench.now);
        pauses.push(due);
    }
    assert!((0.5..=1.0).contains(&pauses[0]), "{pauses:?}");
    assert!(pauses.iter().skip(8).all(|pause| (30.0..=60.0).contains(pause)), "{pauses:?}");
    assert_eq!(tried.len(), 3);
    // It works again.
    for name in ["a", "b", "c"] {
        assert_eq!(bench.settled(name)["observedGeneration"], 1);
    }
    // What the server asks for.
    bench.put("d", mode("STRICT"));
    bench.pass(1.0);
    let write = bench.next().expect("it is due");
    let after = Some(Duration::from_secs(17));
    bench.keeper.finish(write, Outcome::Failed { error: "busy".to_owned(), after }, bench.now);
    assert_eq!(bench.due(), Some(17.0));
}

/// One that the server does not take keeps it from no other one, and is tried ever more seldom.
#[test]
fn an_object_that_fails_by_itself_has_pauses_of_its_own() {
    let mut bench = Bench::new();
    bench.put("z", mode("STRICT"));
    bench.pass(1.0);
    let mut pauses = Vec::new();
    for other in ["a", "b", "c", "d", "e", "f", "g", "h"] {
        let write = bench.next().expect("it is due");
        assert_eq!(*write.key.1.name, *"z");
        bench.keeper.finish(write, Outcome::Failed { error: "too large".to_owned(), after: None }, bench.now);
        bench.put(other, mode("STRICT"));
        bench.pass(1.0);
        bench.write().expect("the other one's");
        assert_eq!(bench.objects[other]["status"]["observedGeneration"], 1);
        let pause = bench.due().expect("it is tried again");
        bench.pass(pause);
        pauses.push(pause);
    }
    assert!(pauses[0] <= 1.0 && pauses[7] >= 29.0, "{pauses:?}");
}

#[test]
fn what_is_gone_is_not_written() {
    let mut bench = Bench::new();
    bench.put("a", mode("STRICT"));
    bench.put("b", mode("STRICT"));
    let gone = typed(bench.objects.remove("a").expect("an object"));
    bench.hear(Heard::Deleted(gone));
    bench.pass(1.0);
    let write = bench.next().expect("a write");
    assert_eq!(*write.key.1.name, *"b");
    bench.keeper.finish(write, Outcome::Gone, bench.now);
    // A list without it.
    bench.hear(Heard::List);
    assert!(bench.due().is_some());
    bench.hear(Heard::Complete);
    assert_eq!(bench.due(), None);
    bench.put("b", mode("STRICT"));
    bench.hear(Heard::NoSuchKind);
    assert_eq!(bench.due(), None);
}

#[test]
fn a_patch_names_the_object_and_the_version_by_which_it_is_served() {
    let mut bench = Bench::new();
    bench.put("p", mode("STRICT"));
    bench.edit("p", |object| object["apiVersion"] = "security.istio.io/v1beta1".into());
    bench.pass(1.0);
    let write = bench.next().expect("a write");
    let patch = write.patch();
    assert_eq!(patch["apiVersion"], "security.istio.io/v1beta1");
    assert_eq!(patch["metadata"], json!({"namespace": "shop", "name": "p", "uid": "uid-p"}));
    let resource = resource(&write).expect("a group");
    assert_eq!((&*resource.version, &*resource.plural), ("v1beta1", "peerauthentications"));
    let policy = ApiResource::from_gvk(&GroupVersionKind::gvk("security.istio.io", "v1", "AuthorizationPolicy"));
    assert_eq!(policy.plural, "authorizationpolicies");
    assert!(clock().ends_with('Z') && clock().len() == CLOCK.len(), "{}", clock());
}

#[derive(Clone, Debug)]
enum Step {
    Valid,
    Wrong,
    /// Time passes, and what is due is written.
    Pass(u8),
    /// Another leader.
    Elect,
    Counts(usize),
}

proptest! {
    /// [C.6]: whatever is edited, written or lost, and whoever leads: what is kept is the youngest valid version that
    /// the cluster kept or the leader has seen.
    #[test]
    fn what_is_kept_is_the_youngest_valid_version_that_was_seen(steps in prop::collection::vec(
        prop_oneof![
            3 => Just(Step::Valid),
            3 => Just(Step::Wrong),
            3 => (0u8..70).prop_map(Step::Pass),
            1 => Just(Step::Elect),
            1 => (0usize..3).prop_map(Step::Counts),
        ],
        1..40,
    )) {
        let mut bench = Bench::new();
        let (mut generation, mut seen) = (0, None);
        for step in steps {
            match step {
                Step::Valid => {
                    generation += 1;
                    seen = Some(generation);
                    let labels = json!({"g": generation.to_string()});
                    bench.put("p", json!({"mtls": {"mode": "STRICT"}, "selector": {"matchLabels": labels}}));
                }
                Step::Wrong => {
                    generation += 1;
                    bench.put("p", mode("STRIKT"));
                }
                Step::Pass(seconds) => {
                    for _ in 0..seconds {
                        bench.pass(1.0);
                        while bench.write().is_some() {}
                    }
                }
                Step::Elect => {
                    // The new one has what is there: what is written, or the very version that is valid.
                    let object = bench.objects.get("p");
                    let valid = object.filter(|object| object["spec"]["mtls"]["mode"] == "STRICT");
                    let kept = object.map(|object| &object["status"]["culvert"]["lastValid"]["generation"]);
                    seen = valid.map(|_| generation).or(kept.and_then(Json::as_i64));
                    bench.elect();
                }
                Step::Counts(in_force) => bench.in_force(in_force, 2),
            }
        }
        if generation > 0 {
            let status = bench.settled("p");
            prop_assert_eq!(status["culvert"]["lastValid"]["generation"].as_i64(), seen);
            if let Some(seen) = seen {
                let label = &status["culvert"]["lastValid"]["spec"]["selector"]["matchLabels"]["g"];
                prop_assert_eq!(label, &json!(seen.to_string()));
            }
            let present = Present::of(&typed(bench.objects["p"].clone()));
            prop_assert!(present != Present::default());
            prop_assert_eq!(status["observedGeneration"].as_i64(), Some(generation));
        }
    }
}
