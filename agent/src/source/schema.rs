//! Strict decoding: a document against the JSON schema of its kind, every unknown field and wrong type with its place.
//!
//! The schemas come from the types themselves (k8s-openapi's and ours), so they cannot say anything else than the types
//! do. `null` counts as absent, as it does in the API server. Fields of a `status` may be incomplete there too.

use std::{collections::BTreeSet, iter};

use schemars::{JsonSchema, generate::SchemaSettings};
use serde_json::{Map, Value as Json};

use super::{
    mesh::duration,
    yaml::{Fault, Key, Node, Value, join},
};

/// The schema of one kind, with the definitions it refers to.
pub(super) struct Schema {
    root: Json,
}

#[cfg(test)]
impl From<Json> for Schema {
    fn from(root: Json) -> Self {
        Self { root }
    }
}

/// Where a check is: the schema of the enclosing mapping gives better remedies.
#[derive(Clone, Copy)]
struct At<'a> {
    path: &'a str,
    /// Schema of the mapping that this value is a field of, and that mapping's path.
    parent: Option<(&'a Json, &'a str)>,
    /// Inside a `status`, where nothing is required.
    status: bool,
}

impl Schema {
    /// Of a type.
    pub(super) fn of<T: JsonSchema>() -> Self {
        let schema = SchemaSettings::draft2020_12().into_generator().into_root_schema_for::<T>();
        Self { root: schema.to_value() }
    }

    /// Of `T`, with `extra` as a further top-level field of any content.
    pub(super) fn with_free_field(mut self, extra: &str) -> Self {
        if let Some(properties) = self.root.get_mut("properties").and_then(Json::as_object_mut) {
            properties.insert(extra.to_owned(), Json::Object(Map::new()));
        }
        self
    }

    /// The document as JSON, and everything that is wrong with it; unknown and wrong fields are left out of the JSON.
    pub(super) fn check(&self, node: &Node) -> (Json, Vec<Fault>) {
        let mut faults = Vec::new();
        let json = self.value(node, &self.root, At { path: "", parent: None, status: false }, &mut faults);
        (json.unwrap_or(Json::Null), faults)
    }

    /// The schema of a field of the document, if there is one.
    pub(super) fn field(&self, name: &str) -> Option<&Json> {
        self.root.get("properties")?.get(name)
    }

    fn resolve<'a>(&'a self, schema: &'a Json) -> &'a Json {
        self.chain(schema).last().unwrap_or(schema)
    }

    /// A schema, and those that it refers to, one after the other; the last one says what a value is, and each of them
    /// may say more about it.
    pub(super) fn chain<'a>(&'a self, schema: &'a Json) -> impl Iterator<Item = &'a Json> {
        // Definitions do not refer to themselves at once; the bound is for a schema that would.
        iter::successors(Some(schema), move |schema| {
            if let Some(name) = schema.get("$ref").and_then(Json::as_str) {
                return name.strip_prefix('#').and_then(|pointer| self.root.pointer(pointer));
            }
            // `Option<T>`: T or null.
            let choices = schema.get("anyOf")?.as_array()?;
            choices.iter().find(|choice| choice.get("type").and_then(Json::as_str) != Some("null"))
        })
        .take(8)
    }

    /// `None` for a value that was wrong, or is null.
    fn value(&self, node: &Node, schema: &Json, at: At<'_>, faults: &mut Vec<Fault>) -> Option<Json> {
        let schema = self.resolve(schema);
        let mut wrong = |expected: &str| {
            let shown = scalar(node).map_or_else(|| node.kind().to_owned(), |text| format!("{} ({text})", node.kind()));
            let remedy = match (&node.value, expected) {
                (Value::Bool(_) | Value::Number(_), "a string") => "; put it in quotes",
                _ => "",
            };
            faults.push(fault(node.line, at.path, format!("must be {expected}, not {shown}{remedy}")));
            None
        };
        if schema.get("x-kubernetes-int-or-string").is_some() {
            return match &node.value {
                Value::Null => None,
                Value::Number(_) | Value::String(_) => Some(free(node)),
                Value::Bool(_) | Value::List(_) | Value::Map(_) => wrong("a number or a string"),
            };
        }
        if let Some(words) = words(schema) {
            return match &node.value {
                Value::Null => None,
                Value::String(text) if words.contains(&text.as_str()) => Some(free(node)),
                Value::String(_) | Value::Bool(_) | Value::Number(_) | Value::List(_) | Value::Map(_) => {
                    let text = scalar(node).unwrap_or_else(|| node.kind().to_owned());
                    let words = words.join(", ");
                    faults.push(fault(
                        node.line,
                        at.path,
                        format!("{text} is not a value of it; write one of {words}"),
                    ));
                    None
                }
            };
        }
        match (kind(schema), &node.value) {
            (_, Value::Null) => None,
            (Some("object"), Value::Map(entries)) => Some(self.object(node.line, entries, schema, at, faults)),
            (Some("object"), _) => wrong("a mapping"),
            (Some("array"), Value::List(items)) => {
                let items_schema = schema.get("items").unwrap_or(&Json::Bool(true));
                let mut list = Vec::with_capacity(items.len());
                for (index, item) in items.iter().enumerate() {
                    let path = format!("{}[{index}]", at.path);
                    if item.value == Value::Null {
                        faults.push(fault(item.line, &path, "is empty; write a value or remove it".to_owned()));
                        continue;
                    }
                    list.extend(self.value(item, items_schema, At { path: &path, parent: None, ..at }, faults));
                }
                Some(Json::Array(list))
            }
            (Some("array"), _) => wrong("a list"),
            (Some("string"), Value::String(text)) => match schema.get("format").and_then(Json::as_str) {
                Some("duration") if duration(text).is_none() => wrong("a duration like 10s or 1m30s"),
                Some(_) | None => Some(free(node)),
            },
            (Some("string"), _) => wrong("a string"),
            (Some("boolean"), Value::Bool(_)) => Some(free(node)),
            (Some("boolean"), _) => wrong("true or false"),
            (Some("integer"), Value::Number(number)) => {
                let bound = |name: &str| schema.get(name).and_then(Json::as_i64);
                let range = match schema.get("format").and_then(Json::as_str) {
                    Some("int32") => (i64::from(i32::MIN), i64::from(i32::MAX)),
                    Some("uint32") => (0, i64::from(u32::MAX)),
                    Some(_) | None => (i64::MIN, i64::MAX),
                };
                let (least, most) = (bound("minimum").unwrap_or(range.0), bound("maximum").unwrap_or(range.1));
                match number.as_i64() {
                    Some(n) if (least..=most).contains(&n) => Some(free(node)),
                    Some(_) | None if bound("minimum").is_some() && most < i64::MAX => {
                        wrong(&format!("a whole number from {least} to {most}"))
                    }
                    Some(_) | None => wrong("a whole number in range"),
                }
            }
            (Some("integer"), _) => wrong("a whole number"),
            (Some("number"), Value::Number(_)) => Some(free(node)),
            (Some("number"), _) => wrong("a number"),
            // A schema without a type takes anything.
            (Some(_) | None, _) => Some(free(node)),
        }
    }

    fn object(&self, line: usize, entries: &[(Key, Node)], schema: &Json, at: At<'_>, faults: &mut Vec<Fault>) -> Json {
        let properties = schema.get("properties").and_then(Json::as_object);
        let any = schema.get("additionalProperties").filter(|any| any.as_bool() != Some(false));
        let mut object = Map::new();
        let before = faults.len();
        for (key, node) in entries {
            let path = join(at.path, &key.name);
            let below = At {
                path: &path,
                parent: Some((schema, at.path)),
                status: at.status || (at.path.is_empty() && key.name == "status"),
            };
            match (properties.and_then(|p| p.get(&key.name)), any) {
                (Some(field), _) => {
                    if let Some(json) = self.value(node, field, below, faults) {
                        object.insert(key.name.clone(), json);
                    }
                }
                (None, Some(any)) => {
                    let takes_map = kind(self.resolve(any)) == Some("object");
                    if node.value == Value::Null && !takes_map && any.as_bool().is_none() {
                        let what = "is empty; write a value (\"\" for none) or remove it".to_owned();
                        faults.push(fault(node.line, &path, what));
                    } else if node.value == Value::Null && takes_map {
                        object.insert(key.name.clone(), Json::Object(Map::new()));
                    } else if let Some(json) = self.value(node, any, below, faults) {
                        object.insert(key.name.clone(), json);
                    }
                }
                (None, None) if properties.is_none() => {
                    object.insert(key.name.clone(), free(node));
                }
                (None, None) => {
                    let what = format!("unknown field; {}", self.remedy(&key.name, properties, at));
                    faults.push(fault(key.line, &path, what));
                }
            }
        }
        let exclusive = schema.get("x-at-most-one").and_then(Json::as_array).into_iter().flatten();
        for names in exclusive.filter_map(Json::as_array) {
            let mut given = entries.iter().filter(|(key, node)| {
                node.value != Value::Null && names.iter().any(|name| name.as_str() == Some(&key.name))
            });
            if let (Some((first, _)), Some((second, _))) = (given.next(), given.next()) {
                let what = format!("cannot stand beside {}; remove one of them", first.name);
                faults.push(fault(second.line, &join(at.path, &second.name), what));
            }
        }
        let required = schema.get("required").and_then(Json::as_array).into_iter().flatten();
        for name in required.filter_map(Json::as_str).filter(|name| !at.status && !object.contains_key(*name)) {
            let path = join(at.path, name);
            // What is there but wrong, misspelled or in the wrong place has its own line already, of this object.
            let said = |fault: &Fault| {
                let misspelled = fault.what.ends_with(&format!("did you mean {name}?"));
                let beside = entries.iter().any(|(key, _)| join(at.path, &key.name) == fault.path);
                fault.path == path || misspelled && beside || fault.what.contains(&belongs_in(name))
            };
            if !faults[before..].iter().any(said) {
                faults.push(fault(line, &path, "is missing; add it".to_owned()));
            }
        }
        Json::Object(object)
    }

    /// What to do about an unknown field: where it belongs, or the nearest name, or the names there are.
    fn remedy(&self, name: &str, properties: Option<&Map<String, Json>>, at: At<'_>) -> String {
        let names: BTreeSet<&str> = properties.into_iter().flat_map(Map::keys).map(String::as_str).collect();
        if let Some((parent, path)) = at.parent
            && parent.get("properties").and_then(|p| p.get(name)).is_some()
        {
            let place = if path.is_empty() { "the top level".to_owned() } else { path.to_owned() };
            return format!("it belongs one level up, in {place}");
        }
        // Broken indentation: `name` at the top level is a field of `metadata`.
        let holder = ["metadata", "spec"].into_iter().filter(|_| at.path.is_empty()).find(|field| {
            let schema = properties.and_then(|p| p.get(*field)).map(|schema| self.resolve(schema));
            schema.and_then(|schema| schema.get("properties")).and_then(|p| p.get(name)).is_some()
        });
        if let Some(holder) = holder {
            return format!("{}: indent it below", belongs_in(holder));
        }
        match nearest(name, names.iter().copied()) {
            Some(near) => format!("did you mean {near}?"),
            None if names.len() <= 12 => {
                format!("known here: {}", names.into_iter().collect::<Vec<_>>().join(", "))
            }
            None => "remove it".to_owned(),
        }
    }
}

/// The name that `name` was probably meant to be.
pub(super) fn nearest<'a>(name: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let lower = name.to_lowercase();
    let bound = (name.chars().count() / 3).clamp(1, 4);
    known
        .map(|candidate| (strsim::osa_distance(&lower, &candidate.to_lowercase()), candidate))
        .filter(|(distance, _)| *distance <= bound)
        .min()
        .map(|(_, candidate)| candidate)
}

/// The remedy for a field that lost its indentation.
pub(super) fn belongs_in(holder: &str) -> String {
    format!("it belongs in {holder}")
}

fn fault(line: usize, path: &str, what: String) -> Fault {
    Fault { line, path: path.to_owned(), what }
}

/// `type`, where there is one beside null.
pub(super) fn kind(schema: &Json) -> Option<&str> {
    match schema.get("type")? {
        Json::String(kind) => Some(kind),
        Json::Array(kinds) => kinds.iter().filter_map(Json::as_str).find(|kind| *kind != "null"),
        Json::Null | Json::Bool(_) | Json::Number(_) | Json::Object(_) => None,
    }
}

/// The values of an enumeration.
pub(super) fn words(schema: &Json) -> Option<Vec<&str>> {
    if let Some(values) = schema.get("enum").and_then(Json::as_array) {
        return Some(values.iter().filter_map(Json::as_str).collect());
    }
    let choices = schema.get("oneOf").and_then(Json::as_array)?;
    let values = choices.iter().flat_map(|choice| match (choice.get("const"), choice.get("enum")) {
        (Some(value), _) => vec![value],
        (None, Some(Json::Array(values))) => values.iter().collect(),
        _ => Vec::new(),
    });
    Some(values.filter_map(Json::as_str).collect())
}

/// The text of a scalar, for messages; cut where it is long.
fn scalar(node: &Node) -> Option<String> {
    let text = match &node.value {
        Value::Bool(value) => value.to_string(),
        Value::Number(number) => number.to_string(),
        Value::String(text) => format!("{:?}", text.chars().take(64).collect::<String>()),
        Value::Null | Value::List(_) | Value::Map(_) => return None,
    };
    Some(text)
}

/// A value that no schema speaks about.
pub(super) fn free(node: &Node) -> Json {
    match &node.value {
        Value::Null => Json::Null,
        Value::Bool(value) => Json::Bool(*value),
        Value::Number(number) => Json::Number(number.clone()),
        Value::String(text) => Json::String(text.clone()),
        Value::List(items) => Json::Array(items.iter().map(free).collect()),
        Value::Map(entries) => {
            Json::Object(entries.iter().map(|(key, value)| (key.name.clone(), free(value))).collect())
        }
    }
}
