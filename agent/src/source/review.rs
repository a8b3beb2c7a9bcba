//! Manifests looked at once, for people: what of every object is wrong, and what does not do what it seems to.
//!
//! Decoding is the agent's own (`decode`, `folder`), so that a verdict here is what an agent would do. Here are the
//! rules between objects of kinds that no version enforces yet; what policies make of each other is for `policy`.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, io,
    path::{Path, PathBuf},
};

use anyhow::Context as _;

use crate::model::{Cluster, ObjectRef};

use super::{
    Problem, View,
    api::{FullHost, Spec, full_host, networking::DestinationRuleSpec},
    decode::{self, Written},
    file::{manifest_name, read_bounded},
    folder::{Content, Folder},
    yaml::{self, Fault},
};

/// Texts of manifests, by the name to show.
pub struct Manifests(BTreeMap<String, Content>);

/// What was found in manifests.
#[derive(Debug)]
pub struct Review {
    /// Every object, in the order of files and lines; a file that cannot be read is one without kind and name.
    pub objects: Vec<Reviewed>,
    /// What an agent would have in force.
    pub view: View,
}

/// One object of a manifest.
#[derive(Clone, Debug)]
pub struct Reviewed {
    /// `kind` as it is written; empty where it cannot be told.
    pub kind: String,
    /// Namespace; `default` where none is written, empty for kinds without and where it cannot be told.
    pub namespace: String,
    /// `metadata.name`; empty where it cannot be told.
    pub name: String,
    /// Name of the file.
    pub file: String,
    /// Line it starts in, from 1.
    pub line: usize,
    /// What makes it invalid; empty where it is accepted.
    pub faults: Vec<Remark>,
    /// What is accepted, but does not do what it seems to.
    pub warnings: Vec<Remark>,
}

/// A place, what is wrong with it, and the remedy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Remark {
    /// Name of the file.
    pub file: String,
    /// From 1; `None` where the file as a whole is meant.
    pub line: Option<usize>,
    /// Path of the field, what is wrong with it, and the remedy.
    pub message: String,
}

impl fmt::Display for Remark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            Some(line) => write!(f, "{}:{line}: {}", self.file, self.message),
            None => write!(f, "{}: {}", self.file, self.message),
        }
    }
}

impl Manifests {
    /// Reads the files, and of each folder the files that an agent would read; `-` is standard input.
    ///
    /// What cannot be read as text is found by [`Manifests::review`], since it is a fault of the manifests.
    ///
    /// # Errors
    /// A path that is not there, or a folder that cannot be listed or has no manifest.
    pub fn read(paths: &[PathBuf]) -> anyhow::Result<Self> {
        let mut texts = BTreeMap::new();
        for path in paths {
            if path == Path::new("-") {
                let text = io::read_to_string(io::stdin().lock()).context("read standard input")?;
                texts.insert("-".to_owned(), Content::Text(text));
                continue;
            }
            let shown = |path: &Path| path.display().to_string();
            let meta = std::fs::metadata(path).with_context(|| format!("read {}", shown(path)))?;
            if !meta.is_dir() {
                texts.insert(shown(path), content(path));
                continue;
            }
            let before = texts.len();
            for entry in std::fs::read_dir(path).with_context(|| format!("list {}", shown(path)))? {
                let name = entry.with_context(|| format!("list {}", shown(path)))?.file_name();
                let file = path.join(&name);
                if manifest_name(&name).is_some() && !file.is_dir() {
                    texts.insert(shown(&file), content(&file));
                }
            }
            anyhow::ensure!(
                texts.len() > before,
                "{} has no manifest: no file whose name ends in .yaml, .yml or .json; name another folder, or a file",
                shown(path)
            );
        }
        Ok(Self(texts))
    }

    /// One text.
    pub fn of(name: impl Into<String>, text: impl Into<String>) -> Self {
        Self([(name.into(), Content::Text(text.into()))].into())
    }

    /// What an agent would have in force that found them at its start. `system_namespace` is the one of ConfigMap `istio`,
    /// the mesh configuration.
    pub fn view(self, system_namespace: &str) -> View {
        Folder::new(system_namespace).update(self.0)
    }

    /// Judges every object. `system_namespace` is the one of ConfigMap `istio`, the mesh configuration.
    pub fn review(self, system_namespace: &str) -> Review {
        let mesh_config = ObjectRef::new(system_namespace, "istio");
        let mut objects = Vec::new();
        let mut specs = Vec::new();
        let mut found = BTreeMap::new();
        for (file, content) in &self.0 {
            let documents = match content {
                Content::Text(text) => yaml::documents(text),
                Content::Unreadable(_) | Content::Gone => continue,
            };
            // A file that is no YAML is among the view's problems.
            for document in documents.unwrap_or_default() {
                for decoded in decode::document(&document, &mesh_config) {
                    if let Some(spec) = decoded.spec {
                        specs.push((objects.len(), spec));
                    }
                    let shown = decoded.key.as_ref().map(ToString::to_string);
                    found.insert((file.clone(), decoded.line, shown), objects.len());
                    objects.push(Reviewed::new(file, decoded.key, decoded.written, decoded.line));
                    let Some(object) = objects.last_mut() else { continue };
                    object.warnings.extend(decoded.warnings.iter().map(|fault| remark(file, fault)));
                    if let Err(invalid) = &decoded.result {
                        object.faults.extend(invalid.faults.iter().map(|fault| remark(file, fault)));
                    }
                }
            }
        }
        let view = self.view(system_namespace);
        for problem in &view.problems {
            let place = |line| (problem.file.clone().unwrap_or_default(), line, problem.object.clone());
            match problem.line.and_then(|line| found.get(&place(line))) {
                // Its own decoding has said the rest.
                Some(index) if objects[*index].faults.is_empty() => objects[*index].faults.push(problem.into()),
                Some(_) => {}
                None if problem.document.is_some() => {}
                None => {
                    let line = problem.line.unwrap_or(1);
                    let mut file =
                        Reviewed::new(problem.file.as_deref().unwrap_or_default(), None, Written::default(), line);
                    file.faults.push(problem.into());
                    objects.push(file);
                }
            }
        }
        between(&mut objects, &specs, &view.cluster);
        objects.sort_by(|a, b| (&a.file, a.line).cmp(&(&b.file, b.line)));
        Review { objects, view }
    }
}

fn content(path: &Path) -> Content {
    match read_bounded(path) {
        Ok(Some((text, _))) => Content::Text(text),
        Ok(None) => Content::Unreadable("is not a file".to_owned()),
        Err(error) => Content::Unreadable(format!("cannot be read: {error}")),
    }
}

impl Reviewed {
    fn new(file: &str, key: Option<decode::Key>, written: Written, line: usize) -> Self {
        let Written { kind, namespace, name } = written;
        let namespace = key.map_or(namespace, |key| key.object.namespace.to_string());
        Self { kind, namespace, name, file: file.to_owned(), line, faults: Vec::new(), warnings: Vec::new() }
    }

    /// Whether a line is about this object: such lines begin with its kind and its name.
    pub fn is_subject_of(&self, line: &str) -> bool {
        let name = match self.namespace.is_empty() {
            true => format!("{} {}", self.kind, self.name),
            false => format!("{} {}/{}", self.kind, self.namespace, self.name),
        };
        line.strip_prefix(&name).is_some_and(|rest| rest.starts_with([':', ' ']))
    }
}

fn remark(file: &str, fault: &Fault) -> Remark {
    Remark { file: file.to_owned(), line: Some(fault.line), message: fault.to_string() }
}

impl From<&Problem> for Remark {
    fn from(problem: &Problem) -> Self {
        let message = problem.message.trim_end_matches(" (what it says is not known)").to_owned();
        Self { file: problem.file.clone().unwrap_or_default(), line: problem.line, message }
    }
}

/// Specification §19, the rows about a DestinationRule and what it names.
fn between(objects: &mut [Reviewed], specs: &[(usize, Spec)], cluster: &Cluster) {
    let entries: Vec<_> = specs
        .iter()
        .filter_map(|(index, spec)| match spec {
            Spec::ServiceEntry(entry) => Some((*index, entry)),
            Spec::DestinationRule(_) => None,
        })
        .collect();
    let named: BTreeMap<usize, String> =
        entries.iter().map(|(index, _)| (*index, objects[*index].name.clone())).collect();
    for (index, rule) in specs.iter().filter_map(|(index, spec)| match spec {
        Spec::DestinationRule(rule) => Some((*index, rule)),
        Spec::ServiceEntry(_) => None,
    }) {
        let object = &mut objects[index];
        let namespace = object.namespace.clone();
        let mut warn = |message: String| {
            object.warnings.push(Remark { file: object.file.clone(), line: Some(object.line), message });
        };
        match full_host(&rule.host, &namespace) {
            FullHost::Service { name, namespace: of } => {
                let service = cluster.services.get(&ObjectRef::new(of, name));
                if service.is_none() && !rule.host.contains('.') {
                    let elsewhere: BTreeSet<&str> =
                        cluster.services.keys().filter(|key| *key.name == *name).map(|key| &*key.namespace).collect();
                    if let Some(other) = elsewhere.first() {
                        warn(format!(
                            "spec.host: {name:?} means {name}.{of}.svc, the rule's own namespace, which has no such \
                             Service; for the one of namespace {other} write {name}.{other}.svc.cluster.local [DR.1]"
                        ));
                    }
                }
                for port in service.iter().flat_map(|service| &service.ports) {
                    let protocol = port.name.split('-').next().unwrap_or_default();
                    if matches!(protocol, "https" | "tls") {
                        tls_in_tls(rule, port.port, &format!("Service {of}/{name}"), &mut warn);
                    }
                }
            }
            FullHost::Other(host) => {
                for (entry, spec) in entries.iter().filter(|(_, spec)| spec.has_host(host)) {
                    let name = named.get(entry).map(String::as_str).unwrap_or_default();
                    for port in spec.tls_ports() {
                        tls_in_tls(rule, port, &format!("ServiceEntry {name}"), &mut warn);
                    }
                }
            }
        }
    }
}

/// [SE.5]
fn tls_in_tls(rule: &DestinationRuleSpec, port: u16, of: &str, warn: &mut impl FnMut(String)) {
    if let Some(path) = rule.originates_tls(port) {
        warn(format!(
            "{path}: starts TLS inside the application's own TLS on port {port} of {of}; remove tls, or give the port \
             protocol HTTP [SE.5]"
        ));
    }
}
