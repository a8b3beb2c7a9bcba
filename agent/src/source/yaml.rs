//! YAML text to documents whose every value knows its line. What the values mean is for `decode`.
//!
//! Plain scalars are read as the Kubernetes API server's YAML library reads them (YAML 1.1: `yes` and `on` are
//! booleans), so that a folder of manifests means what the same files mean to `kubectl`. Merge keys (`<<`) and tags
//! other than the core schema's are refused. The size, the nesting, and what aliases may expand to are bounded.

use std::{borrow::Cow, fmt};

use saphyr_parser::{Event, Parser, ScalarStyle, Tag};

/// Most levels of lists and mappings inside each other; Kubernetes' own types need fewer than 30.
const MAX_DEPTH: usize = 64;

/// Most values that one file may expand to, aliases included: a file of the largest size needs fewer.
const MAX_VALUES: usize = 4_000_000;

/// Most values that the aliases of one file may add: a guard against documents that unfold exponentially.
const MAX_ALIASED: usize = 100_000;

/// One document of a file.
#[derive(Debug, PartialEq)]
pub(super) struct Document {
    /// The whole document; [`Value::Null`] for an empty one.
    pub(super) root: Node,
    /// What is wrong with it although it could be read: keys given twice.
    pub(super) faults: Vec<Fault>,
}

/// What is wrong, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Fault {
    /// Line in the file, from 1.
    pub(super) line: usize,
    /// Path of the field, as in `spec.ports[0].name`; empty for the document itself.
    pub(super) path: String,
    /// What is wrong, and the remedy.
    pub(super) what: String,
}

/// Path and what is wrong; not the line.
impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.path.is_empty() {
            true => f.write_str(&self.what),
            false => write!(f, "{}: {}", self.path, self.what),
        }
    }
}

/// A value and the line it starts in.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Node {
    /// From 1.
    pub(super) line: usize,
    pub(super) value: Value,
}

#[derive(Clone, Debug, PartialEq)]
pub(super) enum Value {
    Null,
    Bool(bool),
    Number(serde_json::Number),
    String(String),
    List(Vec<Node>),
    Map(Vec<(Key, Node)>),
}

/// Key of a mapping.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Key {
    pub(super) name: String,
    pub(super) line: usize,
}

impl From<serde_json::Value> for Node {
    /// Without lines: all of it stands in line 0.
    fn from(json: serde_json::Value) -> Self {
        use serde_json::Value as Json;
        let value = match json {
            Json::Null => Value::Null,
            Json::Bool(value) => Value::Bool(value),
            Json::Number(value) => Value::Number(value),
            Json::String(value) => Value::String(value),
            Json::Array(items) => Value::List(items.into_iter().map(Self::from).collect()),
            Json::Object(entries) => {
                Value::Map(entries.into_iter().map(|(name, value)| (Key { name, line: 0 }, value.into())).collect())
            }
        };
        Self { line: 0, value }
    }
}

impl Node {
    /// The member of that name, if this is a mapping that has one.
    pub(super) fn get(&self, name: &str) -> Option<&Node> {
        match &self.value {
            Value::Map(entries) => entries.iter().find(|(key, _)| key.name == name).map(|(_, value)| value),
            Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) | Value::List(_) => None,
        }
    }

    /// The text, if this is one.
    pub(super) fn as_str(&self) -> Option<&str> {
        match &self.value {
            Value::String(text) => Some(text),
            Value::Null | Value::Bool(_) | Value::Number(_) | Value::List(_) | Value::Map(_) => None,
        }
    }

    /// What it is, for messages.
    pub(super) fn kind(&self) -> &'static str {
        match &self.value {
            Value::Null => "nothing",
            Value::Bool(_) => "a boolean",
            Value::Number(_) => "a number",
            Value::String(_) => "a string",
            Value::List(_) => "a list",
            Value::Map(_) => "a mapping",
        }
    }

    /// How many values it holds, itself included.
    fn size(&self) -> usize {
        1 + match &self.value {
            Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => 0,
            Value::List(items) => items.iter().map(Node::size).sum(),
            Value::Map(entries) => entries.iter().map(|(_, value)| value.size()).sum(),
        }
    }
}

/// Reads one document that maps names to texts, numbers, booleans or lists of these; a list becomes its items separated
/// by commas. A value of another shape is `None`, a key without a value is left out.
///
/// # Errors
/// Text that is not YAML, keys given twice, more than one document, or a document that is not a mapping: one line.
pub(crate) fn mapping(text: &str) -> anyhow::Result<Vec<(String, Option<String>)>> {
    let mut documents = documents(text).map_err(|fault| anyhow::anyhow!("line {}: {}", fault.line, fault.what))?;
    let Some(document) = documents.pop() else { return Ok(Vec::new()) };
    anyhow::ensure!(documents.is_empty(), "holds more than one document: keep one");
    if let Some(fault) = document.faults.first() {
        anyhow::bail!("line {}: {}: {}", fault.line, fault.path, fault.what);
    }
    match document.root.value {
        Value::Null => Ok(Vec::new()),
        Value::Map(entries) => Ok(entries
            .into_iter()
            .filter(|(_, node)| node.value != Value::Null)
            .map(|(key, node)| (key.name, setting(&node)))
            .collect()),
        _ => anyhow::bail!(
            "line {}: is {}, not a mapping of settings to values",
            document.root.line,
            document.root.kind()
        ),
    }
}

fn setting(node: &Node) -> Option<String> {
    match &node.value {
        Value::String(text) => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        Value::Bool(flag) => Some(flag.to_string()),
        Value::List(items) => items
            .iter()
            .map(|item| item.as_str().map(str::to_owned))
            .collect::<Option<Vec<_>>>()
            .map(|all| all.join(",")),
        Value::Null | Value::Map(_) => None,
    }
}

/// Reads all documents of a file.
///
/// # Errors
/// Text that is not YAML, or that exceeds a bound: nothing of the file can be relied on.
pub(super) fn documents(text: &str) -> Result<Vec<Document>, Fault> {
    let mut loader = Loader::default();
    let mut documents = Vec::new();
    for event in Parser::new_from_str(text) {
        let (event, span) = event.map_err(|error| Fault {
            line: error.marker().line(),
            path: String::new(),
            what: format!("not YAML: {}", error.info()),
        })?;
        if let Some(document) = loader.event(event, span.start.line())? {
            documents.push(document);
        }
    }
    Ok(documents)
}

/// All documents of a file of ours.
#[cfg(test)]
pub(crate) fn json(text: &str) -> Vec<serde_json::Value> {
    documents(text).expect("YAML").into_iter().map(|document| super::schema::free(&document.root)).collect()
}

#[derive(Default)]
struct Loader {
    open: Vec<Open>,
    root: Option<Node>,
    faults: Vec<Fault>,
    /// By anchor number of the parser; numbers are never used again within a stream.
    anchors: std::collections::HashMap<usize, Node>,
    values: usize,
    aliased: usize,
}

/// A collection whose end has not come yet.
struct Open {
    line: usize,
    anchor: usize,
    members: Members,
}

enum Members {
    List(Vec<Node>),
    /// The key that waits for its value is beside the entries.
    Map(Vec<(Key, Node)>, std::collections::HashSet<String>, Option<Key>),
}

impl Loader {
    fn event(&mut self, event: Event<'_>, line: usize) -> Result<Option<Document>, Fault> {
        match event {
            Event::Nothing | Event::StreamStart | Event::StreamEnd => {}
            Event::DocumentStart(_) => self.root = Some(Node { line, value: Value::Null }),
            Event::DocumentEnd => {
                let root = self.root.take();
                let faults = std::mem::take(&mut self.faults);
                return Ok(root.map(|root| Document { root, faults }));
            }
            Event::Alias(anchor) => {
                // An anchor inside itself has no value yet: such a document has no end.
                let Some(node) = self.anchors.get(&anchor) else {
                    return Err(self.fault(line, "an alias (*) refers to a value that contains it".into()));
                };
                self.aliased += node.size();
                if self.aliased > MAX_ALIASED {
                    let what = format!("aliases (*) expand to more than {MAX_ALIASED} values; write them out");
                    return Err(self.fault(line, what));
                }
                let node = node.clone();
                self.take(node)?;
            }
            Event::Scalar(text, style, anchor, tag) => {
                let value = scalar(&text, style, tag.as_deref()).map_err(|what| self.fault(line, what))?;
                let is_key = matches!(self.open.last(), Some(Open { members: Members::Map(_, _, None), .. }));
                if is_key && style == ScalarStyle::Plain && text == "<<" {
                    let what = "merge keys (<<) are not supported; write the fields out".to_owned();
                    return Err(self.fault(line, what));
                }
                self.anchored(anchor, Node { line, value })?;
            }
            Event::SequenceStart(anchor, tag) => self.open(line, anchor, tag, Members::List(Vec::new()))?,
            Event::MappingStart(anchor, tag) => {
                self.open(line, anchor, tag, Members::Map(Vec::new(), std::collections::HashSet::new(), None))?;
            }
            Event::SequenceEnd | Event::MappingEnd => {
                if let Some(Open { line, anchor, members }) = self.open.pop() {
                    let value = match members {
                        Members::List(items) => Value::List(items),
                        Members::Map(entries, _, _) => Value::Map(entries),
                    };
                    self.anchored(anchor, Node { line, value })?;
                }
            }
        }
        Ok(None)
    }

    fn open(&mut self, line: usize, anchor: usize, tag: Option<Cow<'_, Tag>>, members: Members) -> Result<(), Fault> {
        if let Some(tag) = tag.filter(|tag| !tag.is_yaml_core_schema()) {
            return Err(self.fault(line, format!("the tag {tag} is not known; remove it")));
        }
        if self.open.len() >= MAX_DEPTH {
            let what = format!("nested deeper than {MAX_DEPTH} levels");
            return Err(self.fault(line, what));
        }
        self.open.push(Open { line, anchor, members });
        Ok(())
    }

    fn anchored(&mut self, anchor: usize, node: Node) -> Result<(), Fault> {
        // 0 is "no anchor".
        if anchor != 0 {
            self.anchors.insert(anchor, node.clone());
        }
        self.take(node)
    }

    /// Puts a finished value where it belongs.
    fn take(&mut self, node: Node) -> Result<(), Fault> {
        self.values += 1;
        if self.values > MAX_VALUES {
            let what = format!("more than {MAX_VALUES} values in one file; split it");
            return Err(self.fault(node.line, what));
        }
        match self.open.last_mut().map(|open| &mut open.members) {
            None => self.root = Some(node),
            Some(Members::List(items)) => items.push(node),
            Some(Members::Map(_, _, waiting @ None)) => {
                let name = match &node.value {
                    Value::String(text) => text.clone(),
                    Value::Number(number) => number.to_string(),
                    Value::Bool(value) => value.to_string(),
                    Value::Null | Value::List(_) | Value::Map(_) => {
                        let what = format!("a key must be text, not {}", node.kind());
                        return Err(self.fault(node.line, what));
                    }
                };
                *waiting = Some(Key { name, line: node.line });
            }
            Some(Members::Map(entries, seen, waiting)) => {
                if let Some(key) = waiting.take() {
                    if seen.insert(key.name.clone()) {
                        entries.push((key, node));
                    } else {
                        let first = entries.iter().find(|(k, _)| k.name == key.name).map_or(0, |(k, _)| k.line);
                        let what = format!("is given twice, first in line {first}; remove one of them");
                        let path = join(&self.path(), &key.name);
                        self.faults.push(Fault { line: key.line, path, what });
                    }
                }
            }
        }
        Ok(())
    }

    /// Path of the innermost open collection.
    fn path(&self) -> String {
        self.open.iter().fold(String::new(), |path, open| match &open.members {
            Members::List(items) => format!("{path}[{}]", items.len()),
            Members::Map(_, _, Some(key)) => join(&path, &key.name),
            Members::Map(_, _, None) => path,
        })
    }

    fn fault(&self, line: usize, what: String) -> Fault {
        Fault { line, path: self.path(), what }
    }
}

/// `path.name`; a name that is not a word of letters is put in quotes.
pub(super) fn join(path: &str, name: &str) -> String {
    let plain = !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '-');
    let name = if plain { Cow::Borrowed(name) } else { Cow::Owned(format!("{name:?}")) };
    if path.is_empty() { name.into_owned() } else { format!("{path}.{name}") }
}

fn scalar(text: &str, style: ScalarStyle, tag: Option<&Tag>) -> Result<Value, String> {
    match tag {
        Some(tag) if !tag.is_yaml_core_schema() && tag.handle != "!" => {
            Err(format!("the tag {tag} is not known; remove it"))
        }
        Some(tag) if tag.handle == "!" && !tag.suffix.is_empty() => {
            Err(format!("the tag {tag} is not known; remove it"))
        }
        Some(tag) if tag.suffix == "str" || tag.handle == "!" => Ok(Value::String(text.to_owned())),
        Some(_) => Ok(plain(text)),
        None if style == ScalarStyle::Plain => Ok(plain(text)),
        None => Ok(Value::String(text.to_owned())),
    }
}

/// A plain scalar as YAML 1.1 has it.
fn plain(text: &str) -> Value {
    match text {
        "" | "~" | "null" | "Null" | "NULL" => return Value::Null,
        "true" | "True" | "TRUE" | "yes" | "Yes" | "YES" | "on" | "On" | "ON" | "y" | "Y" => return Value::Bool(true),
        "false" | "False" | "FALSE" | "no" | "No" | "NO" | "off" | "Off" | "OFF" | "n" | "N" => {
            return Value::Bool(false);
        }
        _ => {}
    }
    match number(text) {
        Some(number) => Value::Number(number),
        None => Value::String(text.to_owned()),
    }
}

fn number(text: &str) -> Option<serde_json::Number> {
    let (negative, digits) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    if !digits.starts_with(|c: char| c.is_ascii_digit() || c == '.') {
        return None;
    }
    let digits = digits.replace('_', "");
    // What follows a prefix has no sign of its own.
    let unsigned = |text: &str, radix: u32| match text.starts_with(['+', '-']) {
        true => None,
        false => i128::from_str_radix(text, radix).ok(),
    };
    let integer = match digits.as_bytes() {
        [b'0', b'x' | b'X', ..] => unsigned(&digits[2..], 16),
        [b'0', b'o' | b'O', ..] => unsigned(&digits[2..], 8),
        [b'0', b'b' | b'B', ..] => unsigned(&digits[2..], 2),
        [b'0', rest @ ..] if !rest.is_empty() => unsigned(&digits[1..], 8),
        _ => digits.parse().ok(),
    };
    if let Some(integer) = integer {
        let integer = if negative { -integer } else { integer };
        return match (i64::try_from(integer), u64::try_from(integer)) {
            (Ok(signed), _) => Some(signed.into()),
            (_, Ok(unsigned)) => Some(unsigned.into()),
            _ => serde_json::Number::from_f64(integer as f64),
        };
    }
    let shape = digits.chars().all(|c| c.is_ascii_digit() || matches!(c, '.' | 'e' | 'E' | '+' | '-'));
    let value: f64 = if shape { digits.parse().ok()? } else { return None };
    serde_json::Number::from_f64(if negative { -value } else { value })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn one(text: &str) -> Document {
        let mut documents = documents(text).expect("YAML");
        assert_eq!(documents.len(), 1, "{documents:?}");
        documents.remove(0)
    }

    fn value(text: &str) -> Value {
        one(&format!("key: {text}\n")).root.get("key").expect("key").value.clone()
    }

    #[test]
    fn plain_scalars_are_read_as_the_api_server_reads_them() {
        let number = |n: i64| Value::Number(n.into());
        for (text, expected) in [
            ("80", number(80)),
            ("-1", number(-1)),
            ("0x50", number(80)),
            ("0o120", number(80)),
            ("0120", number(80)),
            ("8_080", number(8080)),
            ("1.5", Value::Number(serde_json::Number::from_f64(1.5).expect("finite"))),
            ("1e3", Value::Number(serde_json::Number::from_f64(1000.0).expect("finite"))),
            ("yes", Value::Bool(true)),
            ("off", Value::Bool(false)),
            ("~", Value::Null),
            ("", Value::Null),
            ("STRICT", Value::String("STRICT".into())),
            ("'80'", Value::String("80".into())),
            ("!!str 80", Value::String("80".into())),
            ("10.0.0.1", Value::String("10.0.0.1".into())),
            ("2024-01-01T00:00:00Z", Value::String("2024-01-01T00:00:00Z".into())),
            (".", Value::String(".".into())),
            ("1Gi", Value::String("1Gi".into())),
            ("0x", Value::String("0x".into())),
            ("0-5", Value::String("0-5".into())),
            ("0x-5", Value::String("0x-5".into())),
            ("-0x-80000000000000000000000000000000", Value::String("-0x-80000000000000000000000000000000".into())),
            ("18446744073709551615", Value::Number(u64::MAX.into())),
        ] {
            assert_eq!(value(text), expected, "{text}");
        }
    }

    #[test]
    fn documents_and_values_have_their_lines() {
        let documents = documents("# a comment\n---\na: 1\nb:\n  - c: 2\n---\n---\nd: 3\n").expect("YAML");
        assert_eq!(documents.len(), 3);
        let b = documents[0].root.get("b").expect("b");
        let Value::List(items) = &b.value else { panic!("{b:?}") };
        assert_eq!(items[0].get("c").map(|node| node.line), Some(5));
        assert_eq!(documents[1].root.value, Value::Null);
        assert_eq!(documents[2].root.get("d").map(|node| node.line), Some(8));
    }

    #[test]
    fn a_key_given_twice_is_a_fault_with_both_lines() {
        let document = one("a:\n  - x: 1\n  - b: 1\n    c: 2\n    b: 3\n");
        let what = "is given twice, first in line 3; remove one of them".to_owned();
        assert_eq!(document.faults, [Fault { line: 5, path: "a[1].b".into(), what }]);
        assert_eq!(one("80: a\n'80': b\n").faults.len(), 1, "as JSON, they are the same key");
    }

    #[test]
    fn aliases_work_and_are_bounded() {
        let document = one("a: &x {k: v}\nb: *x\n");
        assert_eq!(document.root.get("a").map(|n| &n.value), document.root.get("b").map(|n| &n.value));
        let mut bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n".to_owned();
        for n in 1..12 {
            let items = vec![format!("*a{}", n - 1); 10].join(", ");
            bomb += &format!("a{n}: &a{n} [{items}]\n");
        }
        let fault = documents(&bomb).expect_err("a bomb");
        assert!(fault.what.contains("aliases"), "{fault:?}");
        assert!(documents("a: &a [*a]\n").is_err(), "a value inside itself");
    }

    #[test]
    fn what_is_not_understood_is_an_error_with_its_line() {
        for (text, line, word) in [
            ("a: 1\nb: [1\nc: 2\n", 3, "not YAML"),
            ("a: 1\n b: 2\n", 2, "not YAML"),
            ("a: 1\nb: !secret x\n", 2, "tag"),
            ("a: &x {b: 1}\nc:\n  <<: *x\n", 3, "merge"),
            ("? [1, 2]\n: 3\n", 1, "key must be text"),
            ("a: *nothing\n", 1, "not YAML"),
        ] {
            let fault = documents(text).expect_err(text);
            assert!(fault.what.contains(word), "{text}: {fault:?}");
            assert_eq!(fault.line, line, "{text}: {fault:?}");
        }
        let deep = "[".repeat(100) + &"]".repeat(100);
        assert!(documents(&deep).expect_err("deep").what.contains("deeper"));
    }

    #[test]
    fn json_is_yaml() {
        let document = one("{\n\t\"a\": {\"b\": [1, true, null, \"x\\n\"]},\n\t\"c\": \"d\"\n}\n");
        assert_eq!(document.root.get("c").and_then(Node::as_str), Some("d"));
    }

    proptest! {
        /// Outside bytes: an answer for every text, never a panic.
        #[test]
        fn any_text_gives_an_answer(text in "[-a-c:&*\\[\\]{}#!<>|'\" \n\t0-9.,?%]{0,80}") {
            let _ = documents(&text);
        }
    }
}
