//! What the files of a folder add up to: which version of each object is in force, and what is wrong.
//!
//! Knows texts, not the file system; reading and watching are in `file`. The rules are [C.6], [C.7] and [C.11].

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    panic::{self, AssertUnwindSafe},
    sync::Arc,
};

use crate::model::{Cluster, ObjectRef, PodUid};

use super::{
    Place, Places, Problem, View,
    contents::Slot,
    decode::{self, Key, Object},
    kinds::Kind,
    pool::Pool,
    put_place, yaml,
};

/// The files of a folder as they were last read, and what they add up to.
///
/// An update costs by the objects of the files that it brings, and not by those of the folder.
pub(super) struct Folder {
    /// The ConfigMap that is the mesh configuration.
    mesh_config: ObjectRef,
    files: BTreeMap<Arc<str>, File>,
    /// Every object that a file gives.
    known: HashMap<Key, Known>,
    /// Pods whose UIDs are not theirs alone.
    contested: BTreeMap<PodUid, BTreeSet<Key>>,
    /// What is wrong with objects because of other ones.
    conflicts: BTreeMap<Key, Vec<Problem>>,
    cluster: Arc<Cluster>,
    policies: Arc<Places>,
    authorization_policies: Arc<Places>,
    pool: Pool,
}

/// Name of a file, and which of the objects that it gives.
type Spot = (Arc<str>, usize);

/// An object that files give.
#[derive(Default)]
struct Known {
    spots: BTreeSet<Spot>,
    in_force: Option<InForce>,
}

/// The version of an object that is in force.
#[derive(Clone)]
struct InForce {
    object: Object,
    valid: bool,
}

#[derive(Clone, Default)]
struct File {
    /// Some version of it could be read.
    read: bool,
    given: Vec<Given>,
    problems: Vec<Problem>,
    notices: Vec<String>,
}

/// An object that a file gives, or gave.
#[derive(Clone)]
struct Given {
    key: Key,
    document: usize,
    line: usize,
    object: Object,
    /// From a valid manifest, not the restricting part of an invalid one.
    valid: bool,
    /// The file does not say it now, but nothing valid has taken its place.
    stale: bool,
}

/// What came of some objects: which version of each is in force, and what stands against the others.
#[derive(Default)]
struct Outcome {
    in_force: HashMap<Key, Spot>,
    contested: BTreeMap<PodUid, BTreeSet<Key>>,
    conflicts: BTreeMap<Key, Vec<Problem>>,
    /// Pods that were not asked about, and have a UID that one of these claims.
    others: Vec<Key>,
}

/// What was found under a file's name.
pub(super) enum Content {
    /// Its text.
    Text(String),
    /// It could not be read, and why.
    Unreadable(String),
    /// There is no such file any more.
    Gone,
}

impl Folder {
    pub(super) fn new(system_namespace: &str) -> Self {
        Self {
            mesh_config: ObjectRef::new(system_namespace, "istio"),
            files: BTreeMap::new(),
            known: HashMap::new(),
            contested: BTreeMap::new(),
            conflicts: BTreeMap::new(),
            cluster: Arc::default(),
            policies: Arc::default(),
            authorization_policies: Arc::default(),
            pool: Pool::default(),
        }
    }

    /// Names of the files that it holds something of.
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.files.keys().map(|name| &**name)
    }

    /// Takes in what was found under these names, and shows the whole.
    pub(super) fn update(&mut self, found: impl IntoIterator<Item = (String, Content)>) -> View {
        let mut touched = HashSet::new();
        for (name, content) in found {
            let name: Arc<str> = name.into();
            let file = match content {
                Content::Gone => None,
                Content::Unreadable(why) => Some(self.unreadable(&name, None, why)),
                Content::Text(text) => Some(self.file(&name, |this| Ok(this.read(&name, &yaml::documents(&text)?)))),
            };
            self.put(name, file, &mut touched);
        }
        self.settle(touched);
        self.pool.forget_unused();
        self.view()
    }

    /// Replaces what is held of a file, and names the objects that it gives or gave.
    fn put(&mut self, name: Arc<str>, file: Option<File>, touched: &mut HashSet<Key>) {
        for (given, index) in self.files.remove(&name).into_iter().flat_map(|file| file.given).zip(0..) {
            if let Some(known) = self.known.get_mut(&given.key) {
                known.spots.remove(&(name.clone(), index));
            }
            touched.insert(given.key);
        }
        let Some(file) = file else { return };
        for (given, index) in file.given.iter().zip(0..) {
            self.known.entry(given.key.clone()).or_default().spots.insert((name.clone(), index));
            touched.insert(given.key.clone());
        }
        self.files.insert(name, file);
    }

    /// What came of reading a file. A defect of ours that one file shows must not take the others away, on every node and
    /// at every start.
    fn file(&mut self, name: &str, read: impl FnOnce(&mut Self) -> Result<File, yaml::Fault>) -> File {
        match panic::catch_unwind(AssertUnwindSafe(|| read(self))) {
            Ok(Ok(file)) => file,
            Ok(Err(fault)) => self.unreadable(name, Some(fault.line), fault.to_string()),
            Err(_) => self.unreadable(name, None, "reading it failed by a defect of this program".to_owned()),
        }
    }

    /// [C.11]: keeps every object that the file gave before.
    fn unreadable(&self, name: &str, line: Option<usize>, message: String) -> File {
        let mut file = self.files.get(name).cloned().unwrap_or_default();
        file.given.iter_mut().for_each(|given| given.stale = true);
        let effect = match file.read {
            true => "what this file gave before stays in force",
            false => "what it says is not known",
        };
        let message = format!("{message} ({effect})");
        file.problems = vec![Problem { file: Some(name.to_owned()), document: None, line, object: None, message }];
        file.notices.clear();
        file
    }

    fn read(&mut self, name: &str, documents: &[yaml::Document]) -> File {
        let mut file = File { read: true, ..File::default() };
        let mut unknown = false;
        for (document, number) in documents.iter().zip(1..) {
            for decoded in decode::document(document, &self.mesh_config) {
                file.notices.extend(decoded.notices);
                let object = decoded.key.as_ref().map(|key| key.to_string());
                file.notices.extend(decoded.warnings.into_iter().map(|warning| {
                    let message = warning.to_string();
                    let (file, line) = (Some(name.to_owned()), Some(warning.line));
                    Problem { file, document: Some(number), line, object: object.clone(), message }.to_string()
                }));
                let line = decoded.line;
                let given = |key, object, valid, stale| Given { key, document: number, line, object, valid, stale };
                let invalid = match (decoded.result, decoded.key.clone()) {
                    (Ok(mut object), Some(key)) => {
                        // What says the same is the same: whoever asks what has changed, asks for pointers.
                        match self.known.get(&key).and_then(|known| known.in_force.as_ref()) {
                            Some(before) if before.object == object => object = before.object.clone(),
                            _ => {
                                if let Object::Pod(pod) = &mut object
                                    && let Some(pod) = Arc::get_mut(pod)
                                {
                                    self.pool.share(pod);
                                }
                            }
                        }
                        file.given.push(given(key, object, true, false));
                        continue;
                    }
                    (Ok(_), None) => continue,
                    (Err(invalid), _) => invalid,
                };
                let known = decoded.key.as_ref().and_then(|key| self.known.get(key));
                let before = known.and_then(|known| known.in_force.clone());
                let effect = match (decoded.key.clone(), before, invalid.restricting) {
                    (None, _, _) => {
                        unknown = true;
                        "what this file gave before stays in force"
                    }
                    (Some(key), Some(before), _) if before.valid => {
                        file.given.push(given(key, before.object, true, true));
                        "the version from before stays in force"
                    }
                    (Some(key), _, Some(object)) => {
                        file.given.push(given(key, object, false, true));
                        "until then, only the part that cannot open anything is in force"
                    }
                    (Some(_), _, None) => "it is not in force",
                };
                file.problems.extend(invalid.faults.into_iter().map(|fault| Problem {
                    file: Some(name.to_owned()),
                    document: Some(number),
                    line: Some(fault.line),
                    object: object.clone(),
                    message: format!("{fault} ({effect})"),
                }));
            }
        }
        if unknown {
            // Whatever the nameless object is, it may be one that the file gave before.
            let now: BTreeSet<Key> = file.given.iter().map(|given| given.key.clone()).collect();
            let before = self.files.get(name).into_iter().flat_map(|file| &file.given);
            let kept = before.filter(|given| !now.contains(&given.key)).cloned();
            file.given.extend(kept.map(|given| Given { stale: true, ..given }).collect::<Vec<_>>());
        }
        file
    }

    /// Decides anew about these objects, and those that have to do with them, and changes the cluster accordingly.
    fn settle(&mut self, mut touched: HashSet<Key>) {
        let mut outcome = loop {
            self.join_contenders(&mut touched);
            let outcome = self.decide(&touched);
            if outcome.others.is_empty() {
                break outcome;
            }
            touched.extend(outcome.others);
        };
        self.contested.retain(|_, keys| !keys.iter().any(|key| touched.contains(key)));
        self.contested.append(&mut outcome.contested);
        self.conflicts.retain(|key, _| !touched.contains(key));
        self.conflicts.append(&mut outcome.conflicts);
        let mut arrived = Vec::new();
        let cluster = Arc::make_mut(&mut self.cluster);
        for key in touched {
            let winner = outcome.in_force.get(&key);
            let given = winner.and_then(|(file, index)| self.files.get(file)?.given.get(*index));
            let place = winner.zip(given).map(|((file, _), given)| given.place(file));
            match key.kind {
                Kind::PeerAuthentication => put_place(&mut self.policies, &key.object, place),
                Kind::AuthorizationPolicy => put_place(&mut self.authorization_policies, &key.object, place),
                _ => {}
            }
            let Some(known) = self.known.get_mut(&key) else { continue };
            let object = given.map(|given| &given.object);
            let before = known.in_force.as_ref().map(|before| &before.object);
            if before != object {
                // All that goes before anything that comes: a pod may take over another one's UID.
                before.and_then(|before| Slot::of(&key, before)).into_iter().for_each(|slot| slot.clear(cluster));
                arrived.extend(object.map(|object| (key.clone(), object.clone())));
            }
            known.in_force = given.map(|given| InForce { object: given.object.clone(), valid: given.valid });
            if known.spots.is_empty() {
                self.known.remove(&key);
            }
        }
        arrived.into_iter().for_each(|(key, object)| object.enter(&key, cluster));
    }

    /// Adds the pods that contend with one of these for a UID.
    fn join_contenders(&self, keys: &mut HashSet<Key>) {
        loop {
            let before = keys.len();
            for contenders in self.contested.values() {
                if contenders.iter().any(|key| keys.contains(key)) {
                    keys.extend(contenders.iter().cloned());
                }
            }
            if keys.len() == before {
                return;
            }
        }
    }

    /// The first by file name and place in the file wins, and what is said now goes before what was.
    fn decide(&self, keys: &HashSet<Key>) -> Outcome {
        let mut outcome = Outcome::default();
        let mut uids: HashMap<&PodUid, &Key> = HashMap::new();
        let known = keys.iter().filter_map(|key| self.known.get(key));
        let spots = known.flat_map(|known| &known.spots);
        let mut all: Vec<_> =
            spots.filter_map(|spot| self.given(spot).map(|given| (given.stale, spot, given))).collect();
        all.sort_by_key(|(stale, spot, _)| (*stale, *spot));
        for (stale, spot, given) in all {
            let (file, key) = (&spot.0, &given.key);
            let mut conflict = |what: String| {
                outcome.conflicts.entry(key.clone()).or_default().push(Problem::at(file, given, what));
            };
            if let Some((first, Given { document, line, .. })) =
                outcome.in_force.get(key).and_then(|first| Some((&first.0, self.given(first)?)))
            {
                if !stale {
                    conflict(format!(
                        "is also in {first} document {document} (line {line}), and that one is in force; remove one of \
                         them"
                    ));
                }
                continue;
            }
            if let Object::Pod(pod) = &given.object {
                if let Some(other) = uids.get(&pod.uid) {
                    conflict(format!(
                        "metadata.uid: is also that of {other}, which is in force; every pod has its own"
                    ));
                    outcome.contested.entry(pod.uid.clone()).or_default().extend([(*other).clone(), key.clone()]);
                    continue;
                }
                uids.insert(&pod.uid, key);
                if let Some(holder) = self.cluster.pods.get(&pod.uid) {
                    let holder = Key { kind: Kind::Pod, object: holder.object.clone() };
                    if !keys.contains(&holder) {
                        outcome.others.push(holder);
                    }
                }
            }
            outcome.in_force.insert(key.clone(), spot.clone());
        }
        outcome
    }

    fn given(&self, (file, index): &Spot) -> Option<&Given> {
        self.files.get(file)?.given.get(*index)
    }

    fn view(&self) -> View {
        let of_files = self.files.values().flat_map(|file| &file.problems);
        let mut problems: Vec<Problem> = of_files.chain(self.conflicts.values().flatten()).cloned().collect();
        problems.sort();
        problems.dedup();
        let notices: BTreeSet<&String> = self.files.values().flat_map(|file| &file.notices).collect();
        let unread = self.files.iter().filter(|(_, file)| !file.read);
        View {
            cluster: self.cluster.clone(),
            problems,
            unread: unread.map(|(name, _)| name.to_string()).collect(),
            watched: BTreeMap::new(),
            notices: notices.into_iter().cloned().collect(),
            policies: self.policies.clone(),
            authorization_policies: self.authorization_policies.clone(),
        }
    }
}

impl Given {
    fn place(&self, file: &str) -> Place {
        let at = format!("{file} document {} (line {})", self.document, self.line);
        Place { at, generation: None, stale: self.stale }
    }
}

impl Problem {
    fn at(file: &str, given: &Given, message: String) -> Self {
        Self {
            file: Some(file.to_owned()),
            document: Some(given.document),
            line: Some(given.line),
            object: Some(given.key.to_string()),
            message,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// One document; small numbers choose among few names, so that things meet.
    #[derive(Clone, Debug)]
    enum Document {
        Pod { name: u8, uid: u8, ip: u8 },
        Namespace { name: u8, label: u8 },
        PeerAuthentication { name: u8, mode: &'static str },
        AuthorizationPolicy { name: u8, port: &'static str },
        Mesh { trust_domain: &'static str },
        Nameless,
    }

    impl Document {
        fn any() -> impl Strategy<Value = Self> {
            let few = 0u8..3;
            prop_oneof![
                4 => (few.clone(), few.clone(), 1u8..3).prop_map(|(name, uid, ip)| Self::Pod { name, uid, ip }),
                1 => (few.clone(), few.clone()).prop_map(|(name, label)| Self::Namespace { name, label }),
                2 => (few.clone(), prop::sample::select(vec!["STRICT", "PERMISSIVE", "WRONG"]))
                    .prop_map(|(name, mode)| Self::PeerAuthentication { name, mode }),
                2 => (few, prop::sample::select(vec!["80", "90", "no-port"]))
                    .prop_map(|(name, port)| Self::AuthorizationPolicy { name, port }),
                1 => prop::sample::select(vec!["a.example", "b.example"])
                    .prop_map(|trust_domain| Self::Mesh { trust_domain }),
                1 => Just(Self::Nameless),
            ]
        }

        fn text(&self) -> String {
            match self {
                Self::Pod { name, uid, ip } => format!(
                    "{{apiVersion: v1, kind: Pod, metadata: {{namespace: test, name: pod-{name}, uid: uid-{uid}}}, spec: \
                     {{nodeName: node-1, containers: [{{name: app, image: app}}]}}, status: {{podIP: 10.0.0.{ip}}}}}"
                ),
                Self::Namespace { name, label } => format!(
                    "{{apiVersion: v1, kind: Namespace, metadata: {{name: namespace-{name}, labels: {{a: b{label}}}}}}}"
                ),
                Self::PeerAuthentication { name, mode } => format!(
                    "{{apiVersion: security.istio.io/v1, kind: PeerAuthentication, metadata: {{namespace: test, name: \
                     policy-{name}}}, spec: {{mtls: {{mode: {mode}}}}}}}"
                ),
                Self::AuthorizationPolicy { name, port } => format!(
                    "{{apiVersion: security.istio.io/v1, kind: AuthorizationPolicy, metadata: {{namespace: test, name: \
                     policy-{name}}}, spec: {{action: DENY, rules: [{{to: [{{operation: {{ports: ['{port}']}}}}]}}]}}}}"
                ),
                Self::Mesh { trust_domain } => format!(
                    "{{apiVersion: v1, kind: ConfigMap, metadata: {{namespace: istio-system, name: istio}}, data: {{mesh: \
                     'trustDomain: {trust_domain}'}}}}"
                ),
                Self::Nameless => {
                    "{apiVersion: security.istio.io/v1, kind: PeerAuthentication, metadata: {}}".to_owned()
                }
            }
        }
    }

    #[derive(Clone, Debug)]
    enum Step {
        Write(u8, Vec<Document>),
        Break(u8),
        Remove(u8),
        Lose(u8),
    }

    impl Step {
        fn any() -> impl Strategy<Value = Self> {
            let file = 0u8..4;
            prop_oneof![
                6 => (file.clone(), prop::collection::vec(Document::any(), 0..5))
                    .prop_map(|(file, documents)| Self::Write(file, documents)),
                1 => file.clone().prop_map(Self::Break),
                2 => file.clone().prop_map(Self::Remove),
                1 => file.prop_map(Self::Lose),
            ]
        }

        fn news(&self) -> (String, Content) {
            let (file, content) = match self {
                Self::Write(file, documents) => {
                    let texts: Vec<String> = documents.iter().map(Document::text).collect();
                    (file, Content::Text(texts.join("\n---\n")))
                }
                Self::Break(file) => (file, Content::Text("a: [".to_owned())),
                Self::Remove(file) => (file, Content::Gone),
                Self::Lose(file) => (file, Content::Unreadable("cannot be read".to_owned())),
            };
            (format!("{file}.yaml"), content)
        }
    }

    /// The same files, of which nothing is known from before.
    fn anew(folder: &Folder) -> Folder {
        let mut anew = Folder::new("istio-system");
        let mut touched = HashSet::new();
        for (name, file) in &folder.files {
            anew.put(name.clone(), Some(file.clone()), &mut touched);
        }
        anew.settle(touched);
        anew
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(if cfg!(debug_assertions) { 500 } else { 5000 }))]

        /// What changes with some files is what a look at all of them says, and nothing is left of what is gone.
        #[test]
        fn the_parts_add_up_to_the_whole(updates in prop::collection::vec(prop::collection::vec(Step::any(), 1..3), 1..12)) {
            let mut folder = Folder::new("istio-system");
            for steps in updates {
                let view = folder.update(steps.iter().map(Step::news));
                let anew = anew(&folder);
                prop_assert_eq!(&view, &anew.view());
                prop_assert_eq!(&folder.contested, &anew.contested);
                let keys = |folder: &Folder| folder.known.keys().cloned().collect::<BTreeSet<_>>();
                prop_assert_eq!(keys(&folder), keys(&anew));
            }
        }
    }

    #[test]
    fn a_defect_that_one_file_shows_takes_nothing_away() {
        let mut folder = Folder::new("istio-system");
        let namespace = |name| Step::Write(name, vec![Document::Namespace { name, label: 1 }]).news();
        let before = folder.update([namespace(1), namespace(2)]);
        let mut touched = HashSet::new();
        let file = folder.file("1.yaml", |_| panic!("a test's own"));
        folder.put("1.yaml".into(), Some(file), &mut touched);
        folder.settle(touched);
        let after = folder.view();
        assert_eq!(after.cluster, before.cluster);
        let expected =
            "1.yaml: reading it failed by a defect of this program (what this file gave before stays in force)";
        assert_eq!(after.problems.iter().map(ToString::to_string).collect::<Vec<_>>(), [expected]);
    }

    /// A change of one object leaves the very same other ones, in the same file too.
    #[test]
    fn what_a_file_still_says_stays_the_same_object() {
        let mut folder = Folder::new("istio-system");
        let mut write = |ip| {
            let pods = [Document::Pod { name: 1, uid: 1, ip: 1 }, Document::Pod { name: 2, uid: 2, ip }];
            let namespace = Document::Namespace { name: 1, label: 1 };
            folder.update([Step::Write(1, pods.to_vec()).news(), Step::Write(2, vec![namespace]).news()])
        };
        let (first, second, third) = (write(2), write(3), write(3));
        let pod = |view: &View, uid: &str| view.cluster.pods[&PodUid(uid.into())].clone();
        assert!(Arc::ptr_eq(&pod(&first, "uid-1"), &pod(&second, "uid-1")));
        assert!(!Arc::ptr_eq(&pod(&first, "uid-2"), &pod(&second, "uid-2")));
        assert!(first.cluster.namespaces.same(&second.cluster.namespaces));
        assert!(second.cluster.pods.same(&third.cluster.pods) && second == third);
    }
}
