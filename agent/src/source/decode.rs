//! One document of a manifest to the objects in it, or to what is wrong with them.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, LazyLock},
};

use k8s_openapi::api::{core::v1 as core, discovery::v1 as discovery};
use serde::de::DeserializeOwned;
use serde_json::Value as Json;

use crate::model::{
    AuthorizationPolicy, EndpointSlice, MeshConfig, Namespace, Node, ObjectRef, PeerAuthentication, Pod, Service,
    authorization::Rule,
};

use super::{
    api, authorization,
    convert::{self, Wrong},
    crd,
    kinds::Kind,
    mesh,
    schema::{Schema, belongs_in},
    yaml::{self, Document, Fault, Value, join},
};

/// What identifies an object: kind (with its group), namespace (empty for kinds without), name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Key {
    pub(super) kind: Kind,
    pub(super) object: ObjectRef,
}

impl std::fmt::Display for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.object.namespace.is_empty() {
            true => write!(f, "{} {}", self.kind.name(), self.object.name),
            false => write!(f, "{} {}", self.kind.name(), self.object),
        }
    }
}

/// An object that is fit to be applied.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Object {
    Pod(Arc<Pod>),
    Namespace(Arc<Namespace>),
    Node(Arc<Node>),
    Service(Arc<Service>),
    EndpointSlice(Arc<EndpointSlice>),
    PeerAuthentication(Arc<PeerAuthentication>),
    AuthorizationPolicy(Arc<AuthorizationPolicy>),
    Mesh(Arc<MeshConfig>),
    /// Of no effect.
    Inert,
}

/// What came of one object of a document.
#[derive(Debug)]
pub(super) struct Decoded {
    /// `None` if it cannot be told which object it is.
    pub(super) key: Option<Key>,
    /// Line it starts in.
    pub(super) line: usize,
    pub(super) result: Result<Object, Invalid>,
    /// What is accepted, but does not do what it seems to; with line and path.
    pub(super) warnings: Vec<Fault>,
    /// What is accepted but has no effect in this version.
    pub(super) notices: Vec<String>,
    /// What rules between objects look at, of a kind that is not enforced.
    pub(super) spec: Option<api::Spec>,
    /// As the document says it, right or wrong; empty where it does not.
    pub(super) written: Written,
}

/// Kind, namespace and name of an object as its document says them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Written {
    pub(super) kind: String,
    pub(super) namespace: String,
    pub(super) name: String,
}

impl Written {
    fn of(root: &yaml::Node) -> Self {
        let text = |node: Option<&yaml::Node>| node.and_then(yaml::Node::as_str).unwrap_or_default().to_owned();
        let metadata = root.get("metadata");
        let of = |name: &str| text(metadata.and_then(|metadata| metadata.get(name)));
        Self { kind: text(root.get("kind")), namespace: of("namespace"), name: of("name") }
    }
}

/// An object that is not to be applied.
#[derive(Debug)]
pub(super) struct Invalid {
    /// At least one; with line and path.
    pub(super) faults: Vec<Fault>,
    /// What to apply where there was no valid object before ([C.7]).
    pub(super) restricting: Option<Object>,
}

/// Decodes a document: no object if it is empty, several if it is a `List`.
///
/// `mesh_config` names the ConfigMap that is the mesh configuration.
pub(super) fn document(document: &Document, mesh_config: &ObjectRef) -> Vec<Decoded> {
    let root = &document.root;
    let api_version = root.get("apiVersion").and_then(yaml::Node::as_str);
    if root.value == Value::Null && document.faults.is_empty() {
        return Vec::new();
    }
    if (api_version, root.get("kind").and_then(yaml::Node::as_str)) != (Some("v1"), Some("List")) {
        return vec![written(root, "", &document.faults, mesh_config)];
    }
    let mut decoded = Vec::new();
    let (mut own, mut of_items) = (Vec::new(), Vec::new());
    for fault in &document.faults {
        if fault.path.starts_with("items[") { of_items.push(fault.clone()) } else { own.push(fault.clone()) }
    }
    if let Value::Map(entries) = &root.value {
        let unknown = entries.iter().filter(|(k, _)| !["apiVersion", "kind", "metadata", "items"].contains(&&*k.name));
        own.extend(unknown.map(|(key, _)| Fault {
            line: key.line,
            path: key.name.clone(),
            what: "unknown field; known here: apiVersion, items, kind, metadata".to_owned(),
        }));
    }
    match root.get("items").map(|items| (items, &items.value)) {
        Some((_, Value::List(items))) => {
            for (index, item) in items.iter().enumerate() {
                let prefix = format!("items[{index}]");
                let faults: Vec<_> =
                    of_items.iter().filter(|f| f.path.starts_with(&format!("{prefix}."))).cloned().collect();
                decoded.push(written(item, &prefix, &faults, mesh_config));
            }
        }
        None | Some((_, Value::Null)) => {}
        Some((node, _)) => own.push(Fault {
            line: node.line,
            path: "items".to_owned(),
            what: format!("must be a list, not {}", node.kind()),
        }),
    }
    if !own.is_empty() {
        decoded.push(Decoded::invalid(None, root.line, own));
    }
    decoded
}

impl Decoded {
    fn invalid(key: Option<Key>, line: usize, faults: Vec<Fault>) -> Self {
        Self::new(key, line, Err(Invalid { faults, restricting: None }))
    }

    fn new(key: Option<Key>, line: usize, result: Result<Object, Invalid>) -> Self {
        let written = Written::default();
        Self { key, line, result, warnings: Vec::new(), notices: Vec::new(), spec: None, written }
    }
}

/// Decodes one object that is not written in a document.
pub(super) fn value(root: &yaml::Node, mesh_config: &ObjectRef) -> Decoded {
    written(root, "", &[], mesh_config)
}

fn written(root: &yaml::Node, prefix: &str, faults: &[Fault], mesh_config: &ObjectRef) -> Decoded {
    Decoded { written: Written::of(root), ..object(root, prefix, faults, mesh_config) }
}

/// `prefix` is the path of the object in its document, and `faults` what reading the YAML found in it.
fn object(root: &yaml::Node, prefix: &str, faults: &[Fault], mesh_config: &ObjectRef) -> Decoded {
    let mut faults = faults.to_vec();
    // A key that is given twice makes everything below it doubtful.
    let doubtful = |path: &str| faults.iter().any(|fault| fault.path == join_path(prefix, path));
    let identified =
        !["apiVersion", "kind", "metadata", "metadata.name", "metadata.namespace"].map(doubtful).contains(&true);
    let at = |path: &str, what: String, line: usize| Fault { line, path: join_path(prefix, path), what };
    if !matches!(root.value, Value::Map(_)) {
        faults.push(at("", format!("an object must be a mapping, not {}", root.kind()), root.line));
        return Decoded::invalid(None, root.line, faults);
    }
    let text = |name: &str| root.get(name).and_then(|node| Some((node.as_str()?, node.line)));
    let (Some((api_version, version_line)), Some((kind, kind_line))) = (text("apiVersion"), text("kind")) else {
        let missing = if text("apiVersion").is_none() { "apiVersion" } else { "kind" };
        faults.push(at(
            missing,
            "is missing, or not text; every object says its apiVersion and kind".into(),
            root.line,
        ));
        return Decoded::invalid(None, root.line, faults);
    };
    let kind = match Kind::find(api_version, kind) {
        Ok(kind) => kind,
        Err(error) => {
            let line = if error.field == "kind" { kind_line } else { version_line };
            faults.push(at(error.field, error.what, line));
            let key = error.kind.filter(|_| identified).and_then(|kind| identity(root, kind).ok());
            return Decoded::invalid(key, root.line, faults);
        }
    };
    let (json, schema_faults) = schema(kind).check(root);
    faults.extend(schema_faults.into_iter().map(|fault| Fault { path: join_path(prefix, &fault.path), ..fault }));
    let key = match identity(root, kind) {
        Ok(key) => key,
        Err(Fault { line, path, what }) => {
            let path = join_path(prefix, &path);
            // A missing or misplaced metadata is one problem, not two.
            let metadata = join_path(prefix, "metadata");
            let said = |fault: &Fault| {
                fault.path == path || fault.path == metadata || fault.what.contains(&belongs_in("metadata"))
            };
            if !faults.iter().any(said) {
                faults.push(Fault { line, path, what });
            }
            return Decoded::invalid(None, root.line, faults);
        }
    };
    let mut found = Aside::default();
    if !faults.is_empty() && !matches!(kind, Kind::PeerAuthentication | Kind::AuthorizationPolicy) {
        // What the types would say of the rest is not worth a second line.
        return Decoded::invalid(Some(key).filter(|_| identified), root.line, faults);
    }
    let typed = typed(kind, &key, json, mesh_config, &mut found);
    let Aside { warnings, notices, spec } = found;
    let warnings: Vec<Fault> = warnings
        .into_iter()
        .map(|warning| Fault {
            line: line_of(root, &warning.path),
            path: join_path(prefix, &warning.path),
            what: warning.what,
        })
        .collect();
    let typed = match typed {
        Ok(object) if faults.is_empty() => {
            return Decoded { warnings, notices, spec, ..Decoded::new(Some(key), root.line, Ok(object)) };
        }
        typed => typed,
    };
    let schema_says = faults.len();
    // Sorted: those that begin with a path stand together.
    let said: BTreeSet<String> = faults.iter().map(|fault| fault.path.clone()).collect();
    let (mut restricting, wrong) = match typed {
        Ok(object) => (Some(object), Vec::new()),
        Err(refused) => (refused.restricting, refused.wrong),
    };
    for wrong in wrong {
        let line = line_of(root, &wrong.path);
        let path = join_path(prefix, &wrong.path);
        // The schema has said it already.
        if !said.range(path.clone()..).next().is_some_and(|fault| fault.starts_with(&path)) {
            faults.push(Fault { line, path, what: wrong.what });
        }
    }
    if schema_says > 0 {
        restricting = restricting.and_then(|object| restricting_part(object, &faults, schema_says, prefix));
    }
    let key = Some(key).filter(|_| identified);
    Decoded { warnings, ..Decoded::new(key, root.line, Err(Invalid { faults, restricting })) }
}

/// [C.7], [C.8]: what can only restrict; `object` is without the fields that the first `schema_says` faults are about.
fn restricting_part(object: Object, faults: &[Fault], schema_says: usize, prefix: &str) -> Option<Object> {
    match object {
        Object::PeerAuthentication(policy) => restricting_modes(&policy, faults, prefix),
        Object::AuthorizationPolicy(policy) => restricting_rules(&policy, &faults[..schema_says], prefix),
        Object::Pod(_)
        | Object::Namespace(_)
        | Object::Node(_)
        | Object::Service(_)
        | Object::EndpointSlice(_)
        | Object::Mesh(_)
        | Object::Inert => None,
    }
}

/// Of an AuthorizationPolicy whose faults are all about rules: the rest of it, and what is wrong counts as something that
/// cannot be evaluated (specification §6.4).
fn restricting_rules(policy: &AuthorizationPolicy, faults: &[Fault], prefix: &str) -> Option<Object> {
    let mut policy = policy.clone();
    let rules = join_path(prefix, "spec.rules");
    let mut wrong: BTreeMap<usize, Vec<&str>> = BTreeMap::new();
    for fault in faults {
        let (index, inside) = fault.path.strip_prefix(&rules)?.strip_prefix('[')?.split_once(']')?;
        wrong.entry(index.parse().ok()?).or_default().push(inside);
    }
    for (index, fields) in wrong {
        if fields.contains(&"") {
            // A rule that is no rule at all is not among those that could be read.
            let unreadable = vec!["the rule itself".to_owned()];
            policy.rules.insert(index.min(policy.rules.len()), Rule { unreadable, ..Rule::default() });
            continue;
        }
        let rule = policy.rules.get_mut(index)?;
        for field in fields {
            rule.unreadable.push(field.strip_prefix('.')?.to_owned());
        }
    }
    Some(Object::AuthorizationPolicy(Arc::new(policy)))
}

/// Of a PeerAuthentication whose faults are all about modes.
fn restricting_modes(policy: &PeerAuthentication, faults: &[Fault], prefix: &str) -> Option<Object> {
    let below = |fault: &Fault, path: &str| {
        fault.path.strip_prefix(&join_path(prefix, path)).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
    };
    if !faults.iter().all(|fault| below(fault, "spec.mtls") || below(fault, "spec.portLevelMtls")) {
        return None;
    }
    // §5.5: portLevelMtls inside mtls is a field that does not exist; the mode beside it is as good as any.
    if faults.iter().all(|fault| below(fault, "spec.mtls.portLevelMtls")) {
        let mut policy = policy.clone();
        policy.port_modes.retain(|_, mode| *mode == crate::model::MtlsMode::Strict);
        return Some(Object::PeerAuthentication(Arc::new(policy)));
    }
    convert::restricting(policy.clone()).map(|policy| Object::PeerAuthentication(Arc::new(policy)))
}

/// What is to be said of an object beside whether it is fit to be applied.
#[derive(Default)]
struct Aside {
    warnings: Vec<Wrong>,
    notices: Vec<String>,
    spec: Option<api::Spec>,
}

/// What the types, or the rules between fields, refuse.
struct Refused {
    wrong: Vec<Wrong>,
    restricting: Option<Object>,
}

impl From<Vec<Wrong>> for Refused {
    fn from(wrong: Vec<Wrong>) -> Self {
        Self { wrong, restricting: None }
    }
}

fn typed(kind: Kind, key: &Key, mut json: Json, mesh_config: &ObjectRef, aside: &mut Aside) -> Result<Object, Refused> {
    Ok(match kind {
        Kind::Pod => Object::Pod(Arc::new(convert::pod(&parse(json)?)?)),
        Kind::Namespace => Object::Namespace(Arc::new(convert::namespace(&parse(json)?))),
        Kind::Node => Object::Node(Arc::new(convert::node(&parse(json)?))),
        Kind::Service => Object::Service(Arc::new(convert::service(&parse(json)?)?)),
        Kind::EndpointSlice => match convert::endpoint_slice(&parse::<discovery::EndpointSlice>(json)?)? {
            Some(slice) => Object::EndpointSlice(Arc::new(slice)),
            None => {
                let what = "has no effect without the label kubernetes.io/service-name; add it";
                aside.warnings.push(Wrong::new("metadata.labels", what));
                Object::Inert
            }
        },
        Kind::ServiceAccount => {
            parse::<core::ServiceAccount>(json)?;
            Object::Inert
        }
        Kind::ConfigMap => {
            let map: core::ConfigMap = parse(json)?;
            match map.data.as_ref().and_then(|data| data.get("mesh")) {
                Some(text) if key.object == *mesh_config => {
                    let (mesh, unread) = mesh::parse(text)?;
                    if !unread.is_empty() {
                        aside.notices.push(format!("{key}: not read by this version: {}", unread.join(", ")));
                    }
                    Object::Mesh(Arc::new(mesh))
                }
                None if key.object == *mesh_config => {
                    let what = "is missing; write the mesh configuration there, or remove the ConfigMap";
                    return Err(vec![Wrong::new("data.mesh", what)].into());
                }
                Some(_) | None => Object::Inert,
            }
        }
        Kind::PeerAuthentication => {
            if let Some(object) = json.as_object_mut() {
                object.entry("spec").or_insert_with(|| Json::Object(serde_json::Map::new()));
            }
            match convert::peer_authentication(&parse(json)?) {
                Ok(policy) => Object::PeerAuthentication(Arc::new(policy)),
                Err(rejected) => {
                    let restricting = rejected.restricting.map(Object::PeerAuthentication);
                    return Err(Refused { wrong: rejected.wrong, restricting });
                }
            }
        }
        Kind::AuthorizationPolicy => {
            if let Some(object) = json.as_object_mut() {
                object.entry("spec").or_insert_with(|| Json::Object(serde_json::Map::new()));
            }
            match authorization::authorization_policy(&parse(json)?) {
                Ok(policy) => Object::AuthorizationPolicy(Arc::new(policy)),
                Err(rejected) => {
                    let restricting = Some(Object::AuthorizationPolicy(rejected.restricting));
                    return Err(Refused { wrong: rejected.wrong, restricting });
                }
            }
        }
        Kind::NotEnforced(_) => {
            let (group, name) = kind.not_enforced().unwrap_or_default();
            let (found, spec) = api::check(group, name, json);
            aside.warnings.extend(found.warnings);
            aside.spec = spec;
            if !found.wrong.is_empty() {
                return Err(found.wrong.into());
            }
            aside.notices.push(format!("{key} is accepted, but not enforced by this version"));
            Object::Inert
        }
    })
}

fn parse<T: DeserializeOwned>(json: Json) -> Result<T, Vec<Wrong>> {
    // The schema has checked names and types; what is left is text with a form of its own, such as a time.
    serde_json::from_value(json).map_err(|error| vec![Wrong::new("", format!("cannot be read: {error}"))])
}

/// Which object this is. The fault has the path within the object.
fn identity(root: &yaml::Node, kind: Kind) -> Result<Key, Fault> {
    let metadata = root.get("metadata");
    let line = metadata.map_or(root.line, |node| node.line);
    let fault = |path: &str, what: String| Fault { line, path: path.to_owned(), what };
    let text = |name: &str| {
        let node = metadata.and_then(|metadata| metadata.get(name)).filter(|node| node.value != Value::Null);
        node.map(|node| {
            node.as_str()
                .ok_or_else(|| fault(&join("metadata", name), format!("must be a string, not {}", node.kind())))
        })
        .transpose()
    };
    let name = text("name")?.filter(|name| !name.is_empty());
    let name = name.ok_or_else(|| {
        fault("metadata.name", "is missing; give the object a name, indented below metadata".to_owned())
    })?;
    if !is_name(name) {
        let what = format!("{name:?} is not a name; use lower-case letters, digits, '-' and '.', 253 at most");
        return Err(fault("metadata.name", what));
    }
    let namespace = text("namespace")?.filter(|namespace| !namespace.is_empty());
    let namespace = match (kind.is_namespaced(), namespace) {
        (true, namespace) => namespace.unwrap_or("default"),
        (false, None) => "",
        (false, Some(_)) => {
            let what = format!("a {} has no namespace; remove it", kind.name());
            return Err(fault("metadata.namespace", what));
        }
    };
    if !namespace.is_empty() && (!is_name(namespace) || namespace.contains('.') || namespace.len() > 63) {
        let what = format!("{namespace:?} is not a namespace; use lower-case letters, digits and '-', 63 at most");
        return Err(fault("metadata.namespace", what));
    }
    Ok(Key { kind, object: ObjectRef::new(namespace, name) })
}

/// RFC 1123 subdomain, as the API server demands it of names.
fn is_name(text: &str) -> bool {
    text.len() <= 253
        && text.split('.').all(|label| {
            let inner = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
            !label.is_empty() && label.chars().all(inner) && !label.starts_with('-') && !label.ends_with('-')
        })
}

/// Line of the innermost value on a path that exists.
fn line_of(root: &yaml::Node, path: &str) -> usize {
    if root.line == 0 {
        // What has no lines need not be looked through for each fault.
        return 0;
    }
    let mut node = root;
    for step in path.split(['.', '[']) {
        let step = step.trim_end_matches(']').trim_matches('"');
        let next = match (&node.value, step.parse::<usize>()) {
            (Value::List(items), Ok(index)) => items.get(index),
            _ => node.get(step),
        };
        match next {
            Some(next) => node = next,
            None => break,
        }
    }
    node.line
}

fn join_path(prefix: &str, path: &str) -> String {
    match (prefix.is_empty(), path.is_empty()) {
        (true, _) => path.to_owned(),
        (false, true) => prefix.to_owned(),
        (false, false) => format!("{prefix}.{path}"),
    }
}

/// Schema of a whole object.
pub(super) fn schema(kind: Kind) -> &'static Schema {
    macro_rules! of {
        ($type:ty) => {{
            static SCHEMA: LazyLock<Schema> = LazyLock::new(Schema::of::<$type>);
            &SCHEMA
        }};
    }
    match kind {
        Kind::Pod => of!(core::Pod),
        Kind::Namespace => of!(core::Namespace),
        Kind::Node => of!(core::Node),
        Kind::Service => of!(core::Service),
        Kind::EndpointSlice => of!(discovery::EndpointSlice),
        Kind::ServiceAccount => of!(core::ServiceAccount),
        Kind::ConfigMap => of!(core::ConfigMap),
        Kind::PeerAuthentication => {
            static SCHEMA: LazyLock<Schema> =
                LazyLock::new(|| Schema::of::<crd::Document<crd::PeerAuthenticationSpec>>().with_free_field("status"));
            &SCHEMA
        }
        Kind::AuthorizationPolicy => {
            static SCHEMA: LazyLock<Schema> =
                LazyLock::new(|| Schema::of::<crd::Document<crd::AuthorizationPolicySpec>>().with_free_field("status"));
            &SCHEMA
        }
        Kind::NotEnforced(_) => {
            let (group, name) = kind.not_enforced().unwrap_or_default();
            api::schema(group, name)
        }
    }
}
