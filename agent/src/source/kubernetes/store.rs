//! What the objects of an API server add up to: which version of each is in force, and what is wrong with the others.
//!
//! Knows objects, not how they arrive. A list replaces all that was known of its kind, at once and when it is complete. Of
//! a version that is wrong, what was in force stays: of a policy the last valid one, which the cluster keeps for everybody, so that
//! a node that comes later agrees ([C.6]); of what only the API server and kubelets write, the one from before.

use std::{
    borrow::Borrow,
    collections::{BTreeMap, HashMap, HashSet},
    hash::{Hash, Hasher},
    sync::Arc,
};

use k8s_openapi::{
    api::{core::v1 as core, discovery::v1 as discovery},
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use kube::core::DynamicObject;

use crate::model::{Cluster, ObjectRef, Pod};

use super::{
    super::{
        Place, Places, Problem, View,
        contents::Slot,
        convert::{self, Wrong},
        decode::{self, Key, Object},
        kinds::Kind,
        pool::Pool,
        put_place, yaml,
    },
    follow::Heard,
};

/// Field of a policy: its last valid version, with its generation, for whoever keeps it there. It counts while the spec is
/// not valid.
const LAST_VALID: &str = "/status/culvert/lastValid";

/// An object as the API server sends it.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Sent {
    Pod(Box<core::Pod>),
    Namespace(Box<core::Namespace>),
    Node(Box<core::Node>),
    Service(Box<core::Service>),
    EndpointSlice(Box<discovery::EndpointSlice>),
    ConfigMap(Box<core::ConfigMap>),
    /// Of one of Istio's kinds.
    Policy(Kind, Box<DynamicObject>),
}

/// What the API server said of each object last.
pub(super) struct Store {
    /// The ConfigMap that is the mesh configuration.
    mesh_config: ObjectRef,
    cluster: Arc<Cluster>,
    policies: Arc<Places>,
    authorization_policies: Arc<Places>,
    /// The pods of the cluster by name: there they are by UID.
    pods: HashSet<ByName>,
    /// What is to be said of objects.
    remarks: BTreeMap<Key, Remarks>,
    /// What came of lists that are not complete.
    lists: HashMap<Kind, Vec<Decoded>>,
    pool: Pool,
}

/// A pod that is found by its name; a map with the names and UIDs beside the pods would be a tenth of what a pod costs.
struct ByName(Arc<Pod>);

impl Borrow<ObjectRef> for ByName {
    fn borrow(&self) -> &ObjectRef {
        &self.0.object
    }
}

impl Hash for ByName {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.0.object.hash(state);
    }
}

impl PartialEq for ByName {
    fn eq(&self, other: &Self) -> bool {
        self.0.object == other.0.object
    }
}

impl Eq for ByName {}

#[derive(Default)]
struct Remarks {
    problems: Vec<Problem>,
    notices: Vec<String>,
}

/// What came of an object.
struct Decoded {
    key: Key,
    /// `None`: of no effect, or refused, and nothing of it is in force.
    object: Option<Object>,
    place: Place,
    remarks: Remarks,
}

impl Store {
    /// `system_namespace` is that of ConfigMap `istio`, the mesh configuration.
    pub(super) fn new(system_namespace: &str) -> Self {
        Self {
            mesh_config: ObjectRef::new(system_namespace, "istio"),
            cluster: Arc::default(),
            policies: Arc::default(),
            authorization_policies: Arc::default(),
            pods: HashSet::new(),
            remarks: BTreeMap::new(),
            lists: HashMap::new(),
            pool: Pool::default(),
        }
    }

    /// Takes in news of a kind.
    pub(super) fn hear(&mut self, kind: Kind, heard: Heard<Sent>) {
        match heard {
            Heard::List => drop(self.lists.insert(kind, Vec::new())),
            Heard::Listed(sent) => {
                if let Some(decoded) = self.decode(sent) {
                    self.lists.entry(kind).or_default().push(decoded);
                }
            }
            Heard::Complete => {
                let list = self.lists.remove(&kind).unwrap_or_default();
                self.replace(kind, list);
            }
            Heard::NoSuchKind => {
                self.lists.remove(&kind);
                self.replace(kind, Vec::new());
            }
            Heard::Applied(sent) => {
                if let Some(decoded) = self.decode(sent) {
                    self.apply(decoded);
                }
            }
            Heard::Deleted(sent) => {
                let key = sent.key();
                self.remarks.remove(&key);
                self.clear(&key);
            }
            Heard::Well | Heard::Trouble(_) => {}
        }
    }

    /// The whole, as it is now.
    pub(super) fn view(&self) -> View {
        View {
            cluster: self.cluster.clone(),
            problems: self.remarks.values().flat_map(|remarks| &remarks.problems).cloned().collect(),
            notices: self.remarks.values().flat_map(|remarks| &remarks.notices).cloned().collect(),
            policies: self.policies.clone(),
            authorization_policies: self.authorization_policies.clone(),
            ..View::default()
        }
    }

    /// `None` for what is of no concern here.
    fn decode(&mut self, sent: Sent) -> Option<Decoded> {
        let key = sent.key();
        if key.kind == Kind::ConfigMap && key.object != self.mesh_config {
            return None;
        }
        let before = self.slot(&key).and_then(|slot| slot.get(&self.cluster));
        let generation = sent.meta().generation.unwrap_or_default();
        let place = Place { at: format!("generation {generation}"), generation: None, stale: false };
        let mut decoded = Decoded { key, object: None, place, remarks: Remarks::default() };
        match sent {
            Sent::Pod(pod) => decoded.take(
                before.clone(),
                convert::pod(&pod).map(|mut pod| {
                    self.pool.share(&mut pod);
                    Object::Pod(Arc::new(pod))
                }),
            ),
            Sent::Namespace(namespace) => {
                decoded.object = Some(Object::Namespace(Arc::new(convert::namespace(&namespace))));
            }
            Sent::Node(node) => decoded.object = Some(Object::Node(Arc::new(convert::node(&node)))),
            Sent::Service(service) => {
                let service = convert::service(&service).map(|service| Object::Service(Arc::new(service)));
                decoded.take(before.clone(), service);
            }
            Sent::EndpointSlice(slice) => decoded.take(
                before.clone(),
                convert::endpoint_slice(&slice).map(|slice| match slice {
                    Some(slice) => Object::EndpointSlice(Arc::new(slice)),
                    // Not of a Service: somebody else's.
                    None => Object::Inert,
                }),
            ),
            Sent::ConfigMap(map) => self.mesh(&mut decoded, json(&*map)),
            Sent::Policy(_, object) => self.policy(&mut decoded, json(&*object), generation, before.clone()),
        }
        // What says the same is the same: whoever asks what has changed, asks for pointers.
        if before.is_some() && before == decoded.object {
            decoded.object = before;
        }
        Some(decoded)
    }

    /// Of a mesh configuration that is wrong, nothing is in force; the one from before is, or the default one.
    fn mesh(&self, decoded: &mut Decoded, json: serde_json::Value) {
        let found = self.read(json);
        decoded.remarks.notices.extend(found.notices);
        match found.result {
            Ok(object) => decoded.object = Some(object),
            Err(invalid) => {
                decoded.object = Some(Object::Mesh(Arc::new(self.cluster.mesh.clone())));
                decoded.refuse(&invalid.faults, "the version from before stays in force");
            }
        }
    }

    /// [C.6], [C.7]: of a version that is not valid, the last valid one is in force: the younger of the one that the cluster keeps
    /// and of the one that this agent has had in force, `before`. If nobody knows of any, that part of it which cannot open anything.
    fn policy(&self, decoded: &mut Decoded, json: serde_json::Value, generation: i64, before: Option<Object>) {
        let kept = json.pointer(LAST_VALID).cloned();
        let found = self.read(json.clone());
        let key = decoded.key.to_string();
        decoded.remarks.notices.extend(found.warnings.iter().map(|warning| format!("{key}: {warning}")));
        decoded.remarks.notices.extend(found.notices);
        let invalid = match found.result {
            Ok(object) => {
                decoded.object = Some(object);
                decoded.place.generation = Some(generation);
                return;
            }
            Err(invalid) => invalid,
        };
        decoded.place.stale = true;
        let kept = kept.and_then(|kept| {
            // It was the version of an earlier time, or nobody was to write it.
            let of = kept.get("generation")?.as_i64().filter(|of| *of < generation)?;
            let mut json = json;
            *json.get_mut("spec")? = kept.get("spec")?.clone();
            Some((of, self.read(json).result.ok()?))
        });
        // Of one that is not younger than its past, the past is another object's, whose end was not heard of.
        let before = self.generation(&decoded.key).filter(|of| *of < generation).zip(before);
        let last_valid = kept.into_iter().chain(before).max_by_key(|(generation, _)| *generation);
        let effect = match (last_valid, invalid.restricting) {
            (Some((generation, object)), _) => {
                decoded.object = Some(object);
                decoded.place.generation = Some(generation);
                decoded.place.at = format!("generation {generation}");
                "the last valid version stays in force"
            }
            (None, Some(object)) => {
                decoded.object = Some(object);
                "until then, only the part that cannot open anything is in force"
            }
            (None, None) => "it is not in force",
        };
        decoded.refuse(&invalid.faults, effect);
    }

    fn read(&self, json: serde_json::Value) -> decode::Decoded {
        decode::value(&yaml::Node::from(json), &self.mesh_config)
    }

    fn apply(&mut self, mut decoded: Decoded) {
        if let Some(other) = self.other(&decoded) {
            let message =
                format!("metadata.uid: is also that of Pod {other}, which is in force; every pod has its own");
            let problem = decoded.problem(message);
            decoded.remarks.problems.push(problem);
            return self.say(decoded.key, decoded.remarks);
        }
        let Decoded { key, object, place, remarks } = decoded;
        self.say(key.clone(), remarks);
        let Some(object) = object.filter(|object| *object != Object::Inert) else { return self.clear(&key) };
        self.place(&key, Some(place));
        let before = self.slot(&key);
        if before.as_ref().and_then(|slot| slot.get(&self.cluster)).as_ref() == Some(&object) {
            return;
        }
        if before != Slot::of(&key, &object) {
            self.clear_slot(&key);
        }
        if let Object::Pod(pod) = &object {
            self.pods.replace(ByName(pod.clone()));
        }
        object.enter(&key, Arc::make_mut(&mut self.cluster));
    }

    /// Another pod that has the UID of this one. Only a kubelet's word for its static pods can make that happen.
    fn other(&self, decoded: &Decoded) -> Option<ObjectRef> {
        let Some(Object::Pod(pod)) = &decoded.object else { return None };
        let holder = self.cluster.pods.get(&pod.uid)?;
        (holder.object != decoded.key.object).then(|| holder.object.clone())
    }

    /// Where an object of this key is, if there is one.
    fn slot(&self, key: &Key) -> Option<Slot> {
        let (reference, name) = (|| key.object.clone(), || key.object.name.clone());
        Some(match key.kind {
            Kind::Pod => Slot::Pod(self.pods.get(&key.object)?.0.uid.clone()),
            Kind::Namespace => Slot::Namespace(name()),
            Kind::Node => Slot::Node(name()),
            Kind::Service => Slot::Service(reference()),
            Kind::EndpointSlice => Slot::EndpointSlice(reference()),
            Kind::PeerAuthentication => Slot::PeerAuthentication(reference()),
            Kind::AuthorizationPolicy => Slot::AuthorizationPolicy(reference()),
            Kind::ConfigMap => Slot::Mesh,
            Kind::ServiceAccount | Kind::NotEnforced(_) => return None,
        })
    }

    fn clear(&mut self, key: &Key) {
        self.place(key, None);
        self.clear_slot(key);
    }

    fn clear_slot(&mut self, key: &Key) {
        if let Some(slot) = self.slot(key).filter(|slot| slot.get(&self.cluster).is_some()) {
            slot.clear(Arc::make_mut(&mut self.cluster));
        }
        if key.kind == Kind::Pod {
            self.pods.remove(&key.object);
        }
    }

    /// Puts a whole list in the place of all that there is of a kind.
    fn replace(&mut self, kind: Kind, list: Vec<Decoded>) {
        let listed: HashSet<&Key> = list.iter().map(|decoded| &decoded.key).collect();
        let mut gone = Slot::all(kind, &self.cluster);
        if kind == Kind::ConfigMap {
            gone.push((Key { kind, object: self.mesh_config.clone() }, Slot::Mesh));
        }
        gone.retain(|(key, _)| !listed.contains(key));
        self.remarks.retain(|key, _| key.kind != kind || listed.contains(key));
        for (key, _) in gone {
            self.clear(&key);
        }
        list.into_iter().for_each(|decoded| self.apply(decoded));
        self.pool.forget_unused();
    }

    fn say(&mut self, key: Key, remarks: Remarks) {
        match remarks.problems.is_empty() && remarks.notices.is_empty() {
            true => drop(self.remarks.remove(&key)),
            false => drop(self.remarks.insert(key, remarks)),
        }
    }

    /// The generation of a policy that is in force, if all of it is: of one that never was valid, a part is.
    fn generation(&self, key: &Key) -> Option<i64> {
        let places = match key.kind {
            Kind::PeerAuthentication => &self.policies,
            Kind::AuthorizationPolicy => &self.authorization_policies,
            _ => return None,
        };
        places.get(&key.object)?.generation
    }

    fn place(&mut self, key: &Key, place: Option<Place>) {
        match key.kind {
            Kind::PeerAuthentication => put_place(&mut self.policies, &key.object, place),
            Kind::AuthorizationPolicy => put_place(&mut self.authorization_policies, &key.object, place),
            _ => {}
        }
    }
}

impl Decoded {
    fn take(&mut self, before: Option<Object>, result: Result<Object, Vec<Wrong>>) {
        match result {
            Ok(object) => self.object = Some(object),
            Err(wrong) => {
                let effect = match before {
                    Some(_) => "the version from before stays in force",
                    None => "it is not in force",
                };
                let lines = wrong.iter().map(|wrong| format!("{}: {} ({effect})", wrong.path, wrong.what));
                let problems: Vec<Problem> = lines.map(|line| self.problem(line)).collect();
                self.remarks.problems.extend(problems);
                self.object = before;
            }
        }
    }

    fn refuse(&mut self, faults: &[yaml::Fault], effect: &str) {
        let problems: Vec<Problem> = faults.iter().map(|fault| self.problem(format!("{fault} ({effect})"))).collect();
        self.remarks.problems.extend(problems);
    }

    fn problem(&self, message: String) -> Problem {
        Problem { file: None, document: None, line: None, object: Some(self.key.to_string()), message }
    }
}

impl Sent {
    fn meta(&self) -> &ObjectMeta {
        match self {
            Self::Pod(object) => &object.metadata,
            Self::Namespace(object) => &object.metadata,
            Self::Node(object) => &object.metadata,
            Self::Service(object) => &object.metadata,
            Self::EndpointSlice(object) => &object.metadata,
            Self::ConfigMap(object) => &object.metadata,
            Self::Policy(_, object) => &object.metadata,
        }
    }

    fn key(&self) -> Key {
        let kind = match self {
            Self::Pod(_) => Kind::Pod,
            Self::Namespace(_) => Kind::Namespace,
            Self::Node(_) => Kind::Node,
            Self::Service(_) => Kind::Service,
            Self::EndpointSlice(_) => Kind::EndpointSlice,
            Self::ConfigMap(_) => Kind::ConfigMap,
            Self::Policy(kind, _) => *kind,
        };
        let object = match kind.is_namespaced() {
            true => convert::object_ref(self.meta()),
            false => ObjectRef::new("", self.meta().name.as_deref().unwrap_or_default()),
        };
        Key { kind, object }
    }
}

/// What came as JSON is JSON.
fn json(object: &impl serde::Serialize) -> serde_json::Value {
    serde_json::to_value(object).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use crate::{
        model::{MtlsMode, PodUid},
        source::folder::{Content, Folder},
    };

    fn pod(name: &str, uid: &str, ip: &str) -> Sent {
        let pod = json!({
            "metadata": {"namespace": "test", "name": name, "uid": uid},
            "spec": {"nodeName": "node-1", "containers": [{"name": "app", "image": "app"}]},
            "status": {"podIP": ip}
        });
        Sent::Pod(serde_json::from_value(pod).expect("a pod"))
    }

    fn peer_authentication(name: &str, generation: i64, mode: &str, status: serde_json::Value) -> Sent {
        let object = json!({
            "apiVersion": "security.istio.io/v1", "kind": "PeerAuthentication",
            "metadata": {"namespace": "test", "name": name, "generation": generation},
            "spec": {"mtls": {"mode": mode}},
            "status": status
        });
        Sent::Policy(Kind::PeerAuthentication, serde_json::from_value(object).expect("an object"))
    }

    fn list(store: &mut Store, kind: Kind, objects: Vec<Sent>) -> View {
        store.hear(kind, Heard::List);
        for object in objects {
            store.hear(kind, Heard::Listed(object));
        }
        store.hear(kind, Heard::Complete);
        store.view()
    }

    fn mode(view: &View, name: &str) -> Option<MtlsMode> {
        view.cluster.peer_authentications.get(&ObjectRef::new("test", name)).map(|policy| policy.mode)
    }

    fn pods(view: &View) -> Vec<(String, String)> {
        view.cluster.pods.iter().map(|(uid, pod)| (uid.0.to_string(), pod.object.to_string())).collect()
    }

    /// [D.3]: a list that stops half-way changes nothing; one that is complete replaces everything.
    #[test]
    fn a_list_counts_when_it_is_complete() {
        let mut store = Store::new("istio-system");
        list(&mut store, Kind::Pod, vec![pod("a", "1", "10.0.0.1"), pod("b", "2", "10.0.0.2")]);
        store.hear(Kind::Pod, Heard::List);
        store.hear(Kind::Pod, Heard::Listed(pod("c", "3", "10.0.0.3")));
        let two = [("1".to_owned(), "test/a".to_owned()), ("2".to_owned(), "test/b".to_owned())];
        assert_eq!(pods(&store.view()), two);
        // It begins again.
        let view = list(&mut store, Kind::Pod, vec![pod("b", "2", "10.0.0.2")]);
        assert_eq!(pods(&view), [two[1].clone()]);
        assert_eq!(pods(&list(&mut store, Kind::Pod, Vec::new())), []);
    }

    /// A StatefulSet's pod keeps its name: the pod of the old UID is gone, whether its end was heard of or not.
    #[test]
    fn a_pod_that_comes_again_under_its_name_is_another_one() {
        let mut store = Store::new("istio-system");
        list(&mut store, Kind::Pod, vec![pod("a", "1", "10.0.0.1")]);
        let view = list(&mut store, Kind::Pod, vec![pod("a", "2", "10.0.0.2")]);
        assert_eq!(pods(&view), [("2".to_owned(), "test/a".to_owned())]);
        store.hear(Kind::Pod, Heard::Applied(pod("a", "3", "10.0.0.3")));
        assert_eq!(pods(&store.view()), [("3".to_owned(), "test/a".to_owned())]);
        store.hear(Kind::Pod, Heard::Deleted(pod("a", "3", "10.0.0.3")));
        assert_eq!(pods(&store.view()), []);
        assert!(store.pods.is_empty());
    }

    #[test]
    fn a_pod_cannot_take_the_uid_of_another_one() {
        let mut store = Store::new("istio-system");
        let view = list(&mut store, Kind::Pod, vec![pod("a", "1", "10.0.0.1"), pod("b", "1", "10.0.0.2")]);
        assert_eq!(pods(&view), [("1".to_owned(), "test/a".to_owned())]);
        let problems: Vec<String> = view.problems.iter().map(ToString::to_string).collect();
        assert_eq!(
            problems,
            ["Pod test/b: metadata.uid: is also that of Pod test/a, which is in force; every pod has its own"]
        );
        // Its own end is not the other one's.
        store.hear(Kind::Pod, Heard::Deleted(pod("b", "1", "10.0.0.2")));
        assert_eq!((pods(&store.view()).len(), store.view().problems.len()), (1, 0));
    }

    #[test]
    fn a_pod_that_cannot_be_read_stays_what_it_was() {
        let mut store = Store::new("istio-system");
        list(&mut store, Kind::Pod, vec![pod("a", "1", "10.0.0.1")]);
        store.hear(Kind::Pod, Heard::Applied(pod("a", "1", "no address")));
        let view = store.view();
        assert_eq!(
            view.cluster.pods[&PodUid("1".into())].ips,
            ["10.0.0.1".parse::<std::net::IpAddr>().expect("an address")]
        );
        assert!(
            view.problems[0].to_string().ends_with("(the version from before stays in force)"),
            "{:?}",
            view.problems
        );
    }

    /// [C.6], [C.7]: of a wrong version, what the cluster keeps as the last valid one is in force, also on a node that comes later.
    #[test]
    fn of_a_wrong_policy_the_last_valid_version_is_in_force() {
        let kept = json!({"culvert": {"lastValid": {"generation": 3, "spec": {"mtls": {"mode": "STRICT"}}}}});
        let broken = json!({"culvert": {"lastValid": {"generation": 3, "spec": {"mtls": {"mode": "NONE"}}}}});
        let younger = json!({"culvert": {"lastValid": {"generation": 3, "spec": {"mtls": {"mode": "DISABLE"}}}}});
        for (generation, written, status, expected, in_force) in [
            (1, "PERMISSIVE", json!({}), Some(MtlsMode::Permissive), Some(1)),
            (4, "STRIKT", kept.clone(), Some(MtlsMode::Strict), Some(3)),
            (5, "PERMISSIVE", kept, Some(MtlsMode::Permissive), Some(5)),
            (6, "STRIKT", broken, None, None),
            (3, "STRIKT", younger, None, None),
            (7, "STRIKT", json!({}), None, None),
        ] {
            let stale = in_force != Some(generation);
            let mut store = Store::new("istio-system");
            let written = peer_authentication("p", generation, written, status);
            let view = list(&mut store, Kind::PeerAuthentication, vec![written]);
            let context = format!("generation {generation}");
            // What of a wrong one is left says nothing of the mode.
            let found = mode(&view, "p").filter(|mode| *mode != MtlsMode::Unset);
            assert_eq!(found, expected, "{context}");
            assert_eq!(view.problems.is_empty(), !stale, "{context}: {:?}", view.problems);
            let place = view.policies.get(&ObjectRef::new("test", "p")).cloned();
            let at = |in_force| Place { at: format!("generation {in_force}"), generation: Some(in_force), stale };
            assert_eq!(place, in_force.map(at), "{context}");
        }
    }

    /// [C.6]: an agent that has had a valid version in force goes on with it, whatever the cluster keeps or does not.
    #[test]
    fn what_a_wrong_edit_finds_in_force_stays() {
        let older = json!({"culvert": {"lastValid": {"generation": 1, "spec": {"mtls": {"mode": "DISABLE"}}}}});
        let younger = json!({"culvert": {"lastValid": {"generation": 3, "spec": {"mtls": {"mode": "PERMISSIVE"}}}}});
        for (status, expected, in_force) in
            [(json!({}), MtlsMode::Strict, 2), (older, MtlsMode::Strict, 2), (younger, MtlsMode::Permissive, 3)]
        {
            let at = format!("generation {in_force}");
            let mut store = Store::new("istio-system");
            let strict = peer_authentication("p", 2, "STRICT", json!({}));
            list(&mut store, Kind::PeerAuthentication, vec![strict]);
            let heard = |store: &mut Store, generation, status| {
                let wrong = peer_authentication("p", generation, "STRIKT", status);
                store.hear(Kind::PeerAuthentication, Heard::Applied(wrong));
            };
            // Once, again, and listed anew.
            heard(&mut store, 4, status.clone());
            heard(&mut store, 5, status.clone());
            let wrong = peer_authentication("p", 5, "STRIKT", status);
            for view in [store.view(), list(&mut store, Kind::PeerAuthentication, vec![wrong])] {
                let place = &view.policies[&ObjectRef::new("test", "p")];
                assert_eq!((mode(&view, "p"), place.generation), (Some(expected), Some(in_force)));
                assert_eq!((&place.at, place.stale), (&at, true));
            }
        }
    }

    /// A part of a version that was never valid is not a version to go on with.
    #[test]
    fn the_part_that_cannot_open_anything_is_replaced_by_that_of_the_next_version() {
        let mut store = Store::new("istio-system");
        let ports = json!({
            "apiVersion": "security.istio.io/v1", "kind": "PeerAuthentication",
            "metadata": {"namespace": "test", "name": "p", "generation": 1},
            "spec": {"selector": {"matchLabels": {"app": "web"}}, "mtls": {"mode": "STRICT"},
                     "portLevelMtls": {"80": {"mode": "NONE"}}},
        });
        let ports = Sent::Policy(Kind::PeerAuthentication, serde_json::from_value(ports).expect("an object"));
        assert_eq!(mode(&list(&mut store, Kind::PeerAuthentication, vec![ports]), "p"), Some(MtlsMode::Strict));
        let wrong = peer_authentication("p", 2, "STRIKT", json!({}));
        store.hear(Kind::PeerAuthentication, Heard::Applied(wrong));
        assert_eq!(mode(&store.view(), "p"), None);
    }

    /// Another object of this name has no past.
    #[test]
    fn what_is_made_again_after_it_was_deleted_begins_anew() {
        let mut store = Store::new("istio-system");
        let strict = || peer_authentication("p", 1, "STRICT", json!({}));
        list(&mut store, Kind::PeerAuthentication, vec![strict()]);
        store.hear(Kind::PeerAuthentication, Heard::Deleted(strict()));
        let wrong = || peer_authentication("p", 1, "STRIKT", json!({}));
        store.hear(Kind::PeerAuthentication, Heard::Applied(wrong()));
        assert_eq!(mode(&store.view(), "p"), None);
        // While nothing was heard of it.
        list(&mut store, Kind::PeerAuthentication, vec![peer_authentication("p", 7, "STRICT", json!({}))]);
        assert_eq!(mode(&list(&mut store, Kind::PeerAuthentication, vec![wrong()]), "p"), None);
    }

    #[test]
    fn a_kind_that_goes_takes_its_objects_along() {
        let mut store = Store::new("istio-system");
        let strict = || peer_authentication("p", 1, "STRICT", json!({}));
        assert_eq!(mode(&list(&mut store, Kind::PeerAuthentication, vec![strict()]), "p"), Some(MtlsMode::Strict));
        store.hear(Kind::PeerAuthentication, Heard::NoSuchKind);
        let view = store.view();
        assert_eq!((mode(&view, "p"), view.policies.len()), (None, 0));
    }

    #[test]
    fn the_mesh_configuration_goes_back_to_the_default_one_when_it_is_gone() {
        let map = |text: &str| {
            let map = json!({"metadata": {"namespace": "istio-system", "name": "istio"}, "data": {"mesh": text}});
            Sent::ConfigMap(serde_json::from_value(map).expect("a ConfigMap"))
        };
        let mut store = Store::new("istio-system");
        let domain = |view: &View| view.cluster.mesh.trust_domain.to_string();
        assert_eq!(domain(&list(&mut store, Kind::ConfigMap, vec![map("trustDomain: a.example")])), "a.example");
        store.hear(Kind::ConfigMap, Heard::Applied(map("trustDomain: [")));
        assert_eq!((domain(&store.view()), store.view().problems.len()), ("a.example".to_owned(), 1));
        assert_eq!(domain(&list(&mut store, Kind::ConfigMap, Vec::new())), "cluster.local");
    }

    #[derive(Clone, Debug)]
    enum Step {
        Put {
            name: u8,
            uid: u8,
            ip: u8,
        },
        Remove(u8),
        Policy {
            name: u8,
            mode: &'static str,
        },
        NoPolicy(u8),
        /// All that there is, listed anew.
        List,
    }

    impl Step {
        fn any() -> impl Strategy<Value = Self> {
            let few = 0u8..4;
            prop_oneof![
                4 => (few.clone(), 1u8..4).prop_map(|(name, ip)| Self::Put { name, uid: 10 * name + ip, ip }),
                2 => few.clone().prop_map(Self::Remove),
                2 => (few.clone(), prop::sample::select(vec!["STRICT", "PERMISSIVE"]))
                    .prop_map(|(name, mode)| Self::Policy { name, mode }),
                1 => few.prop_map(Self::NoPolicy),
                1 => Just(Self::List),
            ]
        }
    }

    proptest! {
        /// One model, many sources: what was heard adds up to what a folder of the same objects does.
        #[test]
        fn the_store_knows_what_a_folder_of_the_same_objects_knows(steps in prop::collection::vec(Step::any(), 1..30)) {
            let mut store = Store::new("istio-system");
            let (mut present, mut policies) = (BTreeMap::new(), BTreeMap::new());
            for step in steps {
                match step {
                    Step::Put { name, uid, ip } => {
                        let sent = || pod(&name.to_string(), &uid.to_string(), &format!("10.0.0.{ip}"));
                        present.insert(name, sent());
                        store.hear(Kind::Pod, Heard::Applied(sent()));
                    }
                    Step::Remove(name) => {
                        if let Some(sent) = present.remove(&name) {
                            store.hear(Kind::Pod, Heard::Deleted(sent));
                        }
                    }
                    Step::Policy { name, mode } => {
                        let sent = peer_authentication(&name.to_string(), 1, mode, json!({}));
                        policies.insert(name, sent.clone());
                        store.hear(Kind::PeerAuthentication, Heard::Applied(sent));
                    }
                    Step::NoPolicy(name) => {
                        if let Some(sent) = policies.remove(&name) {
                            store.hear(Kind::PeerAuthentication, Heard::Deleted(sent));
                        }
                    }
                    Step::List => {
                        list(&mut store, Kind::Pod, present.values().cloned().collect());
                        list(&mut store, Kind::PeerAuthentication, policies.values().cloned().collect());
                    }
                }
                let text = |sent: &Sent| match sent {
                    Sent::Pod(pod) => json(&**pod).to_string(),
                    Sent::Policy(_, object) => json(&**object).to_string(),
                    _ => unreachable!("the steps have no others"),
                };
                let texts: Vec<String> = present.values().chain(policies.values()).map(text).collect();
                let folder = Folder::new("istio-system").update([("a.yaml".to_owned(), Content::Text(texts.join("\n---\n")))]);
                let view = store.view();
                prop_assert_eq!(&view.cluster, &folder.cluster);
                prop_assert_eq!(view.policies.keys().collect::<Vec<_>>(), folder.policies.keys().collect::<Vec<_>>());
            }
        }
    }
}
