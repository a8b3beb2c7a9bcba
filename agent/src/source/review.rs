//! Manifests looked at once, for people: what of every object is wrong, and what does not do what it seems to.
//!
//! Decoding is the agent's own (`decode`, `folder`), so that a verdict here is what an agent would do. Here are the
//! rules between objects of kinds that no version enforces yet; what policies make of each other is for `policy`, and
//! [`crate::validate`] joins the two.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, io,
    path::{Path, PathBuf},
    sync::Arc,
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
    /// Name of the file; empty where an API server sends it.
    pub file: String,
    /// Line it starts in, from 1; 0 where it has no lines.
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

/// What is to be said of one object that an API server sends, each in one line: path of the field, what is wrong with
/// it, and the remedy.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Judged {
    /// What makes it invalid; empty where it is accepted.
    pub faults: Vec<String>,
    /// What is accepted, but does not do what it seems to, or is not enforced by this version.
    pub warnings: Vec<String>,
}

/// What an agent's decoding says of one object as an API server sends it, and no more: [`crate::validate::object`] has
/// what policies say, too. `system_namespace` is the one of ConfigMap `istio`, the mesh configuration.
pub fn judge(object: serde_json::Value, system_namespace: &str) -> Judged {
    let review = Review::of_object(object, system_namespace);
    review.objects.into_iter().next().map(Judged::from).unwrap_or_default()
}

impl From<Reviewed> for Judged {
    fn from(object: Reviewed) -> Self {
        let lines = |remarks: Vec<Remark>| remarks.into_iter().map(|remark| remark.message).collect();
        Self { faults: lines(object.faults), warnings: lines(object.warnings) }
    }
}

impl Review {
    /// Judges one object as an API server sends it, by itself: it stands in no file, in line 0, and what is in force is
    /// this object if it is valid. `system_namespace` as for [`Manifests::review`].
    pub fn of_object(object: serde_json::Value, system_namespace: &str) -> Self {
        let mesh_config = ObjectRef::new(system_namespace, "istio");
        let decoded = decode::value(&yaml::Node::from(object), &mesh_config);
        let remarks = |faults: &[Fault]| -> Vec<Remark> { faults.iter().map(|fault| remark("", fault)).collect() };
        let mut reviewed = Reviewed::new("", decoded.key.clone(), decoded.written, decoded.line);
        reviewed.warnings = remarks(&decoded.warnings);
        let notice = |message| Remark { file: String::new(), line: None, message };
        reviewed.warnings.extend(decoded.notices.into_iter().map(notice));
        let mut cluster = Cluster::default();
        match (decoded.result, decoded.key) {
            (Ok(object), Some(key)) => object.enter(&key, &mut cluster),
            (Ok(_), None) => {}
            (Err(invalid), _) => reviewed.faults = remarks(&invalid.faults),
        }
        Self { objects: vec![reviewed], view: View { cluster: Arc::new(cluster), ..View::default() } }
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

    /// What an agent would have in force that found them at its start. `system_namespace` is the one of ConfigMap
    /// `istio`, the mesh configuration.
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

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{super::kinds, *};

    /// As an API server sends it, with all that only API servers write.
    fn sent(group: &str, kind: &str, spec: serde_json::Value) -> serde_json::Value {
        json!({
            "apiVersion": format!("{group}/v1"), "kind": kind,
            "metadata": {
                "namespace": "shop", "name": "x", "generation": 3, "resourceVersion": "12", "generateName": "x-",
                "uid": "6e7f2d2a-4a1c-4b3e-9d5e-000000000000", "creationTimestamp": "2026-01-02T03:04:05Z",
                "deletionTimestamp": "2026-01-02T03:04:06Z", "deletionGracePeriodSeconds": 0,
                "selfLink": "/apis", "finalizers": ["example.org/a"],
                "annotations": {"kubectl.kubernetes.io/last-applied-configuration": "{}\n"},
                "ownerReferences": [{"apiVersion": "v1", "kind": "ConfigMap", "name": "a", "uid": "b"}],
                "managedFields": [{
                    "apiVersion": format!("{group}/v1"), "fieldsType": "FieldsV1", "manager": "kubectl",
                    "fieldsV1": {"f:spec": {".": {}, "f:mtls": {}}}, "operation": "Update",
                    "time": "2026-01-02T03:04:05Z", "subresource": "status",
                }],
            },
            "spec": spec,
            "status": {
                "conditions": [{"type": "Accepted", "status": "False", "message": "a"}], "observedGeneration": "2",
                "culvert": {"lastValid": {"generation": 1, "spec": {}}},
            },
        })
    }

    #[test]
    fn what_only_api_servers_write_is_no_fault() {
        for kind in kinds::istio() {
            let spec = match kind.name {
                "ServiceEntry" => json!({"hosts": ["a.example"], "resolution": "NONE",
                    "ports": [{"number": 443, "name": "tls", "protocol": "TLS"}]}),
                "DestinationRule" => json!({"host": "a.example"}),
                "VirtualService" => json!({"hosts": ["a.example"],
                    "http": [{"route": [{"destination": {"host": "a.example"}}]}]}),
                "Gateway" => json!({"servers": [{"port": {"number": 80, "name": "http", "protocol": "HTTP"},
                    "hosts": ["a.example"]}]}),
                "Sidecar" => json!({"egress": [{"hosts": ["./*"]}]}),
                "WorkloadEntry" => json!({"address": "10.0.0.1"}),
                "WorkloadGroup" => json!({"template": {}}),
                _ => json!({}),
            };
            let judged = judge(sent(kind.group, kind.name, spec), "istio-system");
            assert_eq!(judged.faults, Vec::<String>::new(), "{}", kind.name);
            assert_eq!(judged.warnings.is_empty(), kind.enforced, "{}: {:?}", kind.name, judged.warnings);
        }
    }

    #[test]
    fn an_object_that_an_api_server_sends_is_judged_without_lines() {
        let spec = json!({"rules": [{"to": [{"operation": {"ports": ["http"]}}]}]});
        let judged = judge(sent("security.istio.io", "AuthorizationPolicy", spec), "istio-system");
        assert_eq!(judged.faults.len(), 1, "{judged:?}");
        assert!(judged.faults[0].starts_with("spec.rules[0].to[0].operation.ports"), "{judged:?}");
        assert!(judged.faults[0].contains("; "), "with the remedy: {judged:?}");
        for json in [json!(null), json!([]), json!({}), json!({"apiVersion": "v1", "kind": 3}), json!("a")] {
            assert_eq!(judge(json.clone(), "istio-system").faults.len(), 1, "{json}");
        }
    }
}
