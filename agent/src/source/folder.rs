//! What the files of a folder add up to: which version of each object is in force, and what is wrong.
//!
//! Knows texts, not the file system; reading and watching are in `file`. The rules are [C.6], [C.7] and [C.11].

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use crate::model::{Cluster, ObjectRef, PodUid};

use super::{
    Place, Problem, View,
    decode::{self, Key, Object},
    pool::Pool,
    yaml,
};

/// The files of a folder as they were last read.
pub(super) struct Folder {
    /// The ConfigMap that is the mesh configuration.
    mesh_config: ObjectRef,
    files: BTreeMap<String, File>,
    /// What the last view was made from.
    in_force: HashMap<Key, InForce>,
    pool: Pool,
}

/// The version of an object that is in force.
#[derive(Clone)]
struct InForce {
    object: Object,
    valid: bool,
}

#[derive(Default)]
struct File {
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
        let mesh_config = ObjectRef::new(system_namespace, "istio");
        Self { mesh_config, files: BTreeMap::new(), in_force: HashMap::new(), pool: Pool::default() }
    }

    /// Names of the files that it holds something of.
    pub(super) fn names(&self) -> impl Iterator<Item = &String> {
        self.files.keys()
    }

    /// Takes in what was found under these names, and shows the whole.
    pub(super) fn update(&mut self, found: impl IntoIterator<Item = (String, Content)>) -> View {
        for (name, content) in found {
            match content {
                Content::Gone => {
                    self.files.remove(&name);
                }
                Content::Unreadable(why) => self.unreadable(name, None, why),
                Content::Text(text) => match yaml::documents(&text) {
                    Ok(documents) => {
                        let file = self.read(&name, &documents);
                        self.files.insert(name, file);
                    }
                    Err(fault) => self.unreadable(name, Some(fault.line), fault.to_string()),
                },
            }
        }
        self.pool.forget_unused();
        self.view()
    }

    /// [C.11]: keeps every object that the file gave before.
    fn unreadable(&mut self, name: String, line: Option<usize>, message: String) {
        let file = self.files.entry(name.clone()).or_default();
        file.given.iter_mut().for_each(|given| given.stale = true);
        file.notices.clear();
        let message = format!("{message} (what this file gave before stays in force)");
        file.problems = vec![Problem { file: name, document: None, line, object: None, message }];
    }

    fn read(&mut self, name: &str, documents: &[yaml::Document]) -> File {
        let mut file = File::default();
        let mut unknown = false;
        for (document, number) in documents.iter().zip(1..) {
            for decoded in decode::document(document, &self.mesh_config) {
                file.notices.extend(decoded.notices);
                let object = decoded.key.as_ref().map(|key| key.to_string());
                file.notices.extend(decoded.warnings.into_iter().map(|warning| {
                    let message = warning.to_string();
                    let (file, line) = (name.to_owned(), Some(warning.line));
                    Problem { file, document: Some(number), line, object: object.clone(), message }.to_string()
                }));
                let line = decoded.line;
                let given = |key, object, valid, stale| Given { key, document: number, line, object, valid, stale };
                let invalid = match (decoded.result, decoded.key.clone()) {
                    (Ok(mut object), Some(key)) => {
                        if let Object::Pod(pod) = &mut object
                            && let Some(pod) = Arc::get_mut(pod)
                        {
                            self.pool.share(pod);
                        }
                        file.given.push(given(key, object, true, false));
                        continue;
                    }
                    (Ok(_), None) => continue,
                    (Err(invalid), _) => invalid,
                };
                let before = decoded.key.as_ref().and_then(|key| self.in_force.get(key)).cloned();
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
                    file: name.to_owned(),
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

    /// Joins all files: the first by file name and place in the file wins, and what is said now goes before what was.
    fn view(&mut self) -> View {
        let mut problems: Vec<Problem> = self.files.values().flat_map(|file| file.problems.iter().cloned()).collect();
        let mut in_force: HashMap<Key, &Given> = HashMap::new();
        let mut places: HashMap<Key, (&str, usize, usize)> = HashMap::new();
        let mut pods: HashMap<PodUid, Key> = HashMap::new();
        for stale in [false, true] {
            for (name, file) in &self.files {
                for given in file.given.iter().filter(|given| given.stale == stale) {
                    if let Some((first, document, line)) = places.get(&given.key) {
                        if !stale {
                            problems.push(Problem::at(name, given, format!(
                                "is also in {first} document {document} (line {line}), and that one is in force; remove \
                                 one of them"
                            )));
                        }
                        continue;
                    }
                    if let Object::Pod(pod) = &given.object {
                        if let Some(other) = pods.get(&pod.uid) {
                            problems.push(Problem::at(
                                name,
                                given,
                                format!(
                                    "metadata.uid: is also that of {other}, which is in force; every pod has its own"
                                ),
                            ));
                            continue;
                        }
                        pods.insert(pod.uid.clone(), given.key.clone());
                    }
                    places.insert(given.key.clone(), (name, given.document, given.line));
                    in_force.insert(given.key.clone(), given);
                }
            }
        }
        let mut cluster = Cluster::default();
        let (mut policies, mut authorization_policies) = (BTreeMap::new(), BTreeMap::new());
        let place = |key: &Key, given: &Given| {
            let (file, document, line) = *places.get(key)?;
            Some(Place { file: file.to_owned(), document, line, stale: given.stale })
        };
        for (key, given) in &in_force {
            let (object, name) = (key.object.clone(), key.object.name.clone());
            match &given.object {
                Object::Pod(pod) => drop(cluster.pods.insert(pod.uid.clone(), pod.clone())),
                Object::Namespace(namespace) => drop(cluster.namespaces.insert(name, namespace.clone())),
                Object::Node(node) => drop(cluster.nodes.insert(name, node.clone())),
                Object::Service(service) => drop(cluster.services.insert(object, service.clone())),
                Object::EndpointSlice(slice) => drop(cluster.endpoint_slices.insert(object, slice.clone())),
                Object::AuthorizationPolicy(policy) => {
                    authorization_policies.extend(place(key, given).map(|place| (object.clone(), place)));
                    cluster.authorization_policies.insert(object, policy.clone());
                }
                Object::PeerAuthentication(policy) => {
                    policies.extend(place(key, given).map(|place| (object.clone(), place)));
                    cluster.peer_authentications.insert(object, policy.clone());
                }
                Object::Mesh(mesh) => cluster.mesh = (**mesh).clone(),
                Object::Inert => {}
            }
        }
        let notices: BTreeSet<&String> = self.files.values().flat_map(|file| &file.notices).collect();
        let notices = notices.into_iter().cloned().collect();
        problems.sort();
        problems.dedup();
        self.in_force = in_force
            .into_iter()
            .map(|(key, given)| (key, InForce { object: given.object.clone(), valid: given.valid }))
            .collect();
        View { cluster: Arc::new(cluster), problems, notices, policies, authorization_policies }
    }
}

impl Problem {
    fn at(file: &str, given: &Given, message: String) -> Self {
        Self {
            file: file.to_owned(),
            document: Some(given.document),
            line: Some(given.line),
            object: Some(given.key.to_string()),
            message,
        }
    }
}
