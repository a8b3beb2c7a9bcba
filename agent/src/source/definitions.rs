//! CustomResourceDefinitions of Istio's kinds, made from the very types that manifests are decoded into.
//!
//! They are for a cluster that has none: Istio's own, where a cluster has them, are used as they are. So these accept
//! whatever Istio's accept, in every served version, and refuse of the rest what an API server can see to be wrong; whether
//! an object is fit to be applied is for decoding. To create them, and never to replace what is there, is left to whoever
//! installs the mesh.

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use serde_json::{Map, Value as Json, json};

use super::{
    decode,
    kinds::{IstioKind, Kind, istio},
    schema::{Schema, kind, words},
};

/// What the types of a kind cannot say.
struct Details {
    name: &'static str,
    plural: &'static str,
    short: Option<&'static str>,
    about: &'static str,
    /// An object without `spec` is refused.
    needs_spec: bool,
    /// A CEL rule about the whole `spec`, and what it says.
    rule: Option<(&'static str, &'static str)>,
    columns: &'static [Column],
}

/// What `kubectl get` shows.
struct Column {
    name: &'static str,
    path: &'static str,
    /// With `-o wide` only.
    wide: bool,
    about: &'static str,
}

impl Column {
    const fn new(name: &'static str, path: &'static str, about: &'static str) -> Self {
        Self { name, path, wide: false, about }
    }

    const fn wide(name: &'static str, path: &'static str, about: &'static str) -> Self {
        Self { name, path, wide: true, about }
    }
}

const AGE: Column = Column::new("Age", ".metadata.creationTimestamp", "When it was created");
const ACCEPTED: Column = Column::new(
    "Accepted",
    ".status.conditions[?(@.type==\"Accepted\")].status",
    "Whether it is valid; if it is not, the last valid version of it stays in force",
);
const MESSAGE: Column = Column::wide(
    "Message",
    ".status.conditions[?(@.type==\"Accepted\")].message",
    "What is wrong with it, or what of it does not do what it seems to",
);
const SELECTOR: Column =
    Column::wide("Selector", ".spec.selector.matchLabels", "Labels of the pods it is about; empty: all in scope");

/// In the order of specification §1.2.
static DETAILS: [Details; 10] = [
    Details {
        name: "PeerAuthentication",
        plural: "peerauthentications",
        short: Some("pa"),
        about: "Whether pods take plaintext, mutual TLS, or both",
        needs_spec: false,
        rule: None,
        columns: &[
            Column::new("Mode", ".spec.mtls.mode", "Mode of the ports that are not named; empty: inherited"),
            ACCEPTED,
            AGE,
            SELECTOR,
            Column::wide("Ports", ".spec.portLevelMtls", "Modes of ports of the workload"),
            MESSAGE,
        ],
    },
    Details {
        name: "AuthorizationPolicy",
        plural: "authorizationpolicies",
        short: Some("ap"),
        about: "Who may connect to pods",
        needs_spec: false,
        rule: None,
        columns: &[
            Column::new("Action", ".spec.action", "What is done with what matches; empty: ALLOW"),
            ACCEPTED,
            AGE,
            SELECTOR,
            Column::wide("Dry run", ".metadata.annotations.istio\\.io/dry-run", "true: told, but not enforced"),
            MESSAGE,
        ],
    },
    Details {
        name: "RequestAuthentication",
        plural: "requestauthentications",
        short: Some("ra"),
        about: "Which tokens HTTP requests may bring",
        needs_spec: false,
        rule: None,
        columns: &[ACCEPTED, AGE, SELECTOR, MESSAGE],
    },
    Details {
        name: "Sidecar",
        plural: "sidecars",
        short: None,
        about: "What pods may connect to, and how they are reached",
        needs_spec: false,
        rule: None,
        columns: &[
            ACCEPTED,
            AGE,
            Column::wide("Selector", ".spec.workloadSelector.labels", "Labels of the pods it is about; empty: all"),
            Column::wide("Outbound", ".spec.outboundTrafficPolicy.mode", "What is done with unknown destinations"),
            MESSAGE,
        ],
    },
    Details {
        name: "ServiceEntry",
        plural: "serviceentries",
        short: Some("se"),
        about: "A service that Kubernetes does not know",
        needs_spec: true,
        rule: None,
        columns: &[
            Column::new("Hosts", ".spec.hosts", "Its names"),
            Column::new("Location", ".spec.location", "MESH_EXTERNAL (also where it is empty) or MESH_INTERNAL"),
            Column::new("Resolution", ".spec.resolution", "How its endpoints are found; empty: NONE"),
            ACCEPTED,
            AGE,
            Column::wide("Addresses", ".spec.addresses", "Its virtual addresses"),
            Column::wide("Exported to", ".spec.exportTo", "Namespaces that see it; empty: all"),
            MESSAGE,
        ],
    },
    Details {
        name: "WorkloadEntry",
        plural: "workloadentries",
        short: Some("we"),
        about: "A workload outside Kubernetes",
        needs_spec: true,
        rule: Some(("has(self.address) || has(self.network)", "address is missing; write an address")),
        columns: &[
            AGE,
            Column::new("Address", ".spec.address", "Where it is reached"),
            ACCEPTED,
            Column::wide("Service account", ".spec.serviceAccount", "Its identity"),
            Column::wide("Labels", ".spec.labels", "Its labels, as a pod has them"),
            MESSAGE,
        ],
    },
    Details {
        name: "DestinationRule",
        plural: "destinationrules",
        short: Some("dr"),
        about: "How clients connect to a service",
        needs_spec: false,
        rule: None,
        columns: &[
            Column::new("Host", ".spec.host", "The service"),
            ACCEPTED,
            AGE,
            Column::wide("TLS", ".spec.trafficPolicy.tls.mode", "TLS that clients start; empty: automatic"),
            Column::wide("Exported to", ".spec.exportTo", "Namespaces that see it; empty: all"),
            MESSAGE,
        ],
    },
    Details {
        name: "VirtualService",
        plural: "virtualservices",
        short: Some("vs"),
        about: "Where what is sent to a host goes",
        needs_spec: false,
        rule: None,
        columns: &[
            Column::new("Gateways", ".spec.gateways", "Where it applies; empty: to clients in the mesh"),
            Column::new("Hosts", ".spec.hosts", "What it is sent to"),
            ACCEPTED,
            AGE,
            Column::wide("Exported to", ".spec.exportTo", "Namespaces that see it; empty: all"),
            MESSAGE,
        ],
    },
    Details {
        name: "Gateway",
        plural: "gateways",
        short: Some("gw"),
        about: "What proxies at the mesh's edge listen on",
        needs_spec: false,
        rule: None,
        columns: &[
            ACCEPTED,
            AGE,
            Column::wide("Selector", ".spec.selector", "Labels of the proxies it is about"),
            MESSAGE,
        ],
    },
    Details {
        name: "WorkloadGroup",
        plural: "workloadgroups",
        short: Some("wg"),
        about: "What WorkloadEntries of one sort have in common",
        needs_spec: true,
        rule: None,
        columns: &[
            ACCEPTED,
            AGE,
            Column::wide("Service account", ".spec.template.serviceAccount", "Their identity"),
            MESSAGE,
        ],
    },
];

/// One definition for each of Istio's kinds, in the order of specification §1.2, each with all versions that are served.
pub fn definitions() -> Vec<CustomResourceDefinition> {
    let read = |definition| serde_json::from_value(definition).expect("a definition has the fields that the API knows");
    defined().map(|(of, details)| read(definition(of, details))).collect()
}

/// Istio's kinds with what their types cannot say.
fn defined() -> impl Iterator<Item = (IstioKind, &'static Details)> {
    istio().filter_map(|of| Some((of, DETAILS.iter().find(|details| details.name == of.name)?)))
}

fn definition(of: IstioKind, details: &Details) -> Json {
    let IstioKind { group, versions, name, .. } = of;
    let first = versions.first().copied().unwrap_or_default();
    let kind = Kind::find(&format!("{group}/{first}"), name).expect("the kind is in the table that it comes from");
    let shape = shape(decode::schema(kind), details);
    let columns: Vec<Json> = details.columns.iter().map(column).collect();
    let version = |version: &&str| {
        json!({
            "name": version,
            "served": true,
            // All versions mean the same, so nothing is converted.
            "storage": *version == first,
            "additionalPrinterColumns": columns,
            "schema": {"openAPIV3Schema": shape},
            "subresources": {"status": {}},
        })
    };
    let mut names = json!({
        "kind": name,
        "listKind": format!("{name}List"),
        "plural": details.plural,
        "singular": name.to_lowercase(),
        "categories": ["istio-io", group.replace('.', "-")],
    });
    if let Some(short) = details.short {
        names["shortNames"] = json!([short]);
    }
    json!({
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {
            "name": format!("{}.{group}", details.plural),
            "labels": {"app.kubernetes.io/part-of": "culvert"},
        },
        "spec": {
            "group": group,
            "names": names,
            "scope": "Namespaced",
            "versions": versions.iter().map(version).collect::<Vec<_>>(),
        },
    })
}

fn column(column: &Column) -> Json {
    let date = column.path == AGE.path;
    let mut shown = json!({
        "name": column.name,
        "jsonPath": column.path,
        "type": if date { "date" } else { "string" },
        "description": column.about,
    });
    if column.wide {
        shown["priority"] = json!(1);
    }
    shown
}

/// The schema of a whole object.
fn shape(schema: &Schema, details: &Details) -> Json {
    let spec = schema.field("spec").unwrap_or(&Json::Null);
    let mut spec = structural(schema, spec, Place { lax: false, bounded: true });
    spec["description"] = json!(details.about);
    if let Some((rule, message)) = details.rule {
        add_rules(&mut spec, vec![json!({"rule": rule, "message": message})]);
    }
    let status = json!({
        "type": "object",
        "description": "What controllers say of it: conditions, and what of it is in force",
        "x-kubernetes-preserve-unknown-fields": true,
    });
    let mut shape = json!({"type": "object", "properties": {"spec": spec, "status": status}});
    if details.needs_spec {
        shape["required"] = json!(["spec"]);
    }
    shape
}

/// Where a schema stands.
#[derive(Clone, Copy)]
struct Place {
    /// Below an `x-lax`.
    lax: bool,
    /// Every list and map around it says how much it may hold, which decides what a CEL rule may cost.
    bounded: bool,
}

/// A schema of the types as a structural one: without references, defaults and null (the API server takes null for
/// absent), and only of words that it knows.
fn structural(of: &Schema, schema: &Json, place: Place) -> Json {
    let chain: Vec<&Json> = of.chain(schema).collect();
    let last = chain.last().copied().unwrap_or(schema);
    // What is said where a type is used comes before what the type says of itself.
    let said = |word: &str| chain.iter().find_map(|schema| schema.get(word));
    let place = Place { lax: place.lax || said("x-lax").is_some(), ..place };
    let mut out = Map::new();
    let mut rules: Vec<Json> = Vec::new();
    if let Some(text) = said("description").and_then(Json::as_str) {
        // Paragraphs after the first are about the code.
        let first = text.split("\n\n").next().unwrap_or_default();
        out.insert("description".into(), json!(first.replace('\n', " ")));
    }
    let mut keep = |words: &[&str]| {
        for word in words {
            if let Some(value) = said(word).filter(|value| !value.is_null()) {
                out.insert((*word).to_owned(), value.clone());
            }
        }
    };
    match kind(last).filter(|_| words(last).is_none()) {
        Some("object") => {
            keep(&["minProperties", "maxProperties"]);
            out.insert("type".into(), json!("object"));
            object(of, &chain, place, &mut out, &mut rules);
        }
        Some("array") => {
            keep(&["minItems", "maxItems", "x-kubernetes-list-type", "x-kubernetes-list-map-keys"]);
            out.insert("type".into(), json!("array"));
            let below = Place { bounded: place.bounded && out.contains_key("maxItems"), ..place };
            let items = last.get("items").unwrap_or(&Json::Null);
            out.insert("items".into(), each(structural(of, items, below), said("x-each")));
        }
        Some("string") => {
            if said("format").and_then(Json::as_str) == Some("duration") {
                rules.push(json!({
                    "rule": "duration(self) >= duration('1ms')",
                    "message": "is not a duration of 1ms or more; write one like 10s or 1m30s",
                }));
            }
            keep(&["minLength", "maxLength"]);
            out.insert("type".into(), json!("string"));
        }
        Some("integer") => {
            if !place.lax {
                keep(&["minimum", "maximum"]);
            }
            // The formats that the API server knows; it warns of others.
            match said("format").and_then(Json::as_str) {
                Some(format @ ("int32" | "int64")) => {
                    out.insert("format".into(), json!(format));
                }
                Some("uint32") => {
                    out.entry("maximum").or_insert(json!(u32::MAX));
                }
                Some(_) | None => {}
            }
            out.insert("type".into(), json!("integer"));
        }
        Some("number") => {
            out.insert("format".into(), json!("double"));
            out.insert("type".into(), json!("number"));
        }
        Some("boolean") => {
            out.insert("type".into(), json!("boolean"));
        }
        Some(_) | None => match words(last) {
            Some(words) => {
                out.insert("enum".into(), json!(words));
                out.insert("type".into(), json!("string"));
            }
            // Anything.
            None => {
                out.insert("x-kubernetes-preserve-unknown-fields".into(), json!(true));
            }
        },
    }
    rules.extend(
        chain.iter().filter_map(|schema| schema.get("x-kubernetes-validations")?.as_array()).flatten().cloned(),
    );
    let mut out = Json::Object(out);
    if !place.lax {
        add_rules(&mut out, rules);
    }
    out
}

/// Fields or values of an object, and which of them may be together.
fn object(of: &Schema, chain: &[&Json], place: Place, out: &mut Map<String, Json>, rules: &mut Vec<Json>) {
    let said = |word: &str| chain.iter().find_map(|schema| schema.get(word));
    if let Some(properties) = said("properties").and_then(Json::as_object) {
        let fields = properties.iter().map(|(name, field)| (name.clone(), structural(of, field, place)));
        out.insert("properties".into(), Json::Object(fields.collect()));
    } else if let Some(values) = said("additionalProperties").filter(|values| values.is_object()) {
        let below = Place { bounded: place.bounded && out.contains_key("maxProperties"), ..place };
        out.insert("additionalProperties".into(), each(structural(of, values, below), said("x-each")));
    } else {
        out.insert("x-kubernetes-preserve-unknown-fields".into(), json!(true));
    }
    let names = |word: &str| said(word).and_then(Json::as_array).into_iter().flatten().filter_map(Json::as_str);
    let mut required: Vec<&str> = names("required").chain(names("x-required")).collect();
    required.sort_unstable();
    if !required.is_empty() {
        out.insert("required".into(), json!(required));
    }
    let groups = said("x-at-most-one").and_then(Json::as_array).into_iter().flatten();
    let groups: Vec<Vec<&str>> =
        groups.filter_map(Json::as_array).map(|names| names.iter().filter_map(Json::as_str).collect()).collect();
    if place.bounded {
        rules.extend(groups.iter().map(|names| {
            let count: Vec<String> = names.iter().map(|name| format!("(has(self.{name}) ? 1 : 0)")).collect();
            let message = format!("has more than one of {}; keep one", names.join(", "));
            json!({"rule": format!("{} <= 1", count.join(" + ")), "message": message})
        }));
    } else if !groups.is_empty() {
        // A CEL rule that may run any number of times costs more than the API server allows, so the schema says it, and
        // the message is the API server's.
        let mut pairs = Vec::new();
        for names in &groups {
            for (at, one) in names.iter().enumerate() {
                pairs.extend(names[at + 1..].iter().map(|two| json!({"required": [one, two]})));
            }
        }
        out.insert("not".into(), json!({"anyOf": pairs}));
    }
}

/// An item or a value, with what the list or map says of each.
fn each(mut item: Json, said: Option<&Json>) -> Json {
    for (word, value) in said.and_then(Json::as_object).into_iter().flatten() {
        match value.as_array().filter(|_| word == "x-kubernetes-validations") {
            Some(rules) => add_rules(&mut item, rules.clone()),
            None => item[word] = value.clone(),
        }
    }
    item
}

fn add_rules(schema: &mut Json, rules: Vec<Json>) {
    const WORD: &str = "x-kubernetes-validations";
    match schema.get_mut(WORD).and_then(Json::as_array_mut) {
        Some(there) => there.extend(rules),
        None if rules.is_empty() => {}
        None => schema[WORD] = Json::Array(rules),
    }
}

/// What a definition says against the objects of a text, as far as one can tell without CEL: fields that would be dropped,
/// wrong types and words, what is missing. Objects of kinds that have no definition are passed over.
#[cfg(test)]
pub(super) fn refusals(text: &str) -> Vec<String> {
    let mut said = Vec::new();
    for document in super::yaml::documents(text).expect("YAML") {
        let of = |name: &str| document.root.get(name).and_then(super::yaml::Node::as_str).unwrap_or_default();
        let (group, _) = of("apiVersion").split_once('/').unwrap_or_default();
        let kind = of("kind");
        let Some((_, details)) = defined().find(|(known, _)| (known.group, known.name) == (group, kind)) else {
            continue;
        };
        let found = Kind::find(of("apiVersion"), kind).expect("a version that is served");
        let mut shape = shape(decode::schema(found), details);
        for field in ["apiVersion", "kind", "metadata"] {
            shape["properties"][field] = json!({});
        }
        let (_, faults) = Schema::from(shape).check(&document.root);
        said.extend(faults.iter().map(ToString::to_string));
    }
    said
}

#[cfg(test)]
mod tests {
    use super::*;

    fn documents() -> Vec<Json> {
        defined().map(|(of, details)| definition(of, details)).collect()
    }

    /// Every schema below one, with its path.
    fn schemas<'a>(path: String, schema: &'a Json, found: &mut Vec<(String, &'a Json)>) {
        for (name, field) in schema.get("properties").and_then(Json::as_object).into_iter().flatten() {
            schemas(format!("{path}.{name}"), field, found);
        }
        for (word, shown) in [("items", "[]"), ("additionalProperties", "{}")] {
            if let Some(below) = schema.get(word) {
                schemas(format!("{path}{shown}"), below, found);
            }
        }
        found.push((path, schema));
    }

    fn all(document: &Json) -> Vec<(String, &Json)> {
        let mut found = Vec::new();
        schemas(String::new(), &document["spec"]["versions"][0]["schema"]["openAPIV3Schema"], &mut found);
        found
    }

    fn at<'a>(document: &'a Json, path: &str) -> &'a Json {
        all(document).into_iter().find(|(at, _)| at == path).map_or(&Json::Null, |(_, schema)| schema)
    }

    fn of(name: &str) -> Json {
        documents().into_iter().find(|document| document["spec"]["names"]["kind"] == name).expect("the kind")
    }

    /// §1.2: group, names and versions are Istio's, so that `kubectl get pa`, `istio-io` and old manifests work.
    #[test]
    fn every_kind_is_defined_with_its_names_and_all_served_versions() {
        let kinds: Vec<&str> = istio().map(|of| of.name).collect();
        let defined: Vec<&str> = DETAILS.iter().map(|details| details.name).collect();
        assert_eq!(kinds, defined, "one definition for each kind, in the same order");
        let shown: Vec<String> = definitions()
            .iter()
            .map(|crd| {
                let names = &crd.spec.names;
                let versions: Vec<String> =
                    crd.spec.versions.iter().map(|v| format!("{}={}", v.name, v.storage)).collect();
                format!(
                    "{} {} {} {}",
                    crd.metadata.name.as_deref().unwrap_or_default(),
                    names.short_names.as_ref().map_or("-".into(), |names| names.join(",")),
                    names.categories.as_ref().map_or("-".into(), |names| names.join(",")),
                    versions.join(",")
                )
            })
            .collect();
        let security = "istio-io,security-istio-io v1=true,v1beta1=false";
        let networking = "istio-io,networking-istio-io v1=true,v1beta1=false,v1alpha3=false";
        assert_eq!(
            shown,
            [
                format!("peerauthentications.security.istio.io pa {security}"),
                format!("authorizationpolicies.security.istio.io ap {security}"),
                format!("requestauthentications.security.istio.io ra {security}"),
                format!("sidecars.networking.istio.io - {networking}"),
                format!("serviceentries.networking.istio.io se {networking}"),
                format!("workloadentries.networking.istio.io we {networking}"),
                format!("destinationrules.networking.istio.io dr {networking}"),
                format!("virtualservices.networking.istio.io vs {networking}"),
                format!("gateways.networking.istio.io gw {networking}"),
                format!("workloadgroups.networking.istio.io wg {networking}"),
            ]
        );
        for crd in definitions() {
            let schemas: Vec<_> = crd.spec.versions.iter().map(|version| &version.schema).collect();
            assert!(schemas.iter().all(|schema| *schema == schemas[0]), "all versions mean the same [C.1]");
            assert!(crd.spec.versions.iter().all(|version| version.served && version.subresources.is_some()));
        }
    }

    /// What the API server would answer with an error or a warning, or drop in silence.
    #[test]
    fn the_schemas_are_structural_and_of_words_that_the_api_server_knows() {
        const WORDS: [&str; 21] = [
            "additionalProperties",
            "description",
            "enum",
            "format",
            "items",
            "maxItems",
            "maxLength",
            "maxProperties",
            "maximum",
            "minItems",
            "minLength",
            "minProperties",
            "minimum",
            "not",
            "properties",
            "required",
            "type",
            "x-kubernetes-list-map-keys",
            "x-kubernetes-list-type",
            "x-kubernetes-preserve-unknown-fields",
            "x-kubernetes-validations",
        ];
        for document in documents() {
            let name = document["metadata"]["name"].clone();
            for (path, schema) in all(&document) {
                for (word, _) in schema.as_object().expect("a schema is a mapping") {
                    assert!(WORDS.contains(&word.as_str()), "{name} {path}: {word}");
                }
                assert!(schema["type"].is_string(), "{name} {path} has no type, so that anything below it is kept");
                let known = ["int32", "int64", "double"];
                assert!(schema.get("format").is_none_or(|f| known.iter().any(|known| f == known)), "{name} {path}");
                let fields = schema.get("properties").and_then(Json::as_object);
                for required in schema.get("required").and_then(Json::as_array).into_iter().flatten() {
                    let required = required.as_str().expect("a name");
                    assert!(fields.is_some_and(|fields| fields.contains_key(required)), "{name} {path}: {required}");
                }
                for key in schema.get("x-kubernetes-list-map-keys").and_then(Json::as_array).into_iter().flatten() {
                    let required = schema["items"]["required"].as_array().expect("a key is always there");
                    assert!(required.contains(key), "{name} {path}: {key}");
                }
                for rule in schema.get("x-kubernetes-validations").and_then(Json::as_array).into_iter().flatten() {
                    let said: Vec<&str> = rule.as_object().expect("a rule").keys().map(String::as_str).collect();
                    assert_eq!(said, ["message", "rule"], "{name} {path}");
                    let text = rule["message"].as_str().expect("text");
                    assert!(!text.contains("  ") && !text.contains('\n'), "{name} {path}: {text}");
                }
            }
        }
    }

    /// A definition that was read by a client is the same: nothing in it is unknown to the API's types.
    #[test]
    fn nothing_of_a_definition_is_lost_in_the_api_s_own_types() {
        /// Numbers of a schema are floating ones there.
        fn floating(value: &Json) -> Json {
            match value {
                Json::Number(number) => json!(number.as_f64()),
                Json::Array(items) => items.iter().map(floating).collect(),
                Json::Object(fields) => fields.iter().map(|(name, field)| (name.clone(), floating(field))).collect(),
                Json::Null | Json::Bool(_) | Json::String(_) => value.clone(),
            }
        }
        for (document, typed) in documents().iter().zip(definitions()) {
            let read = serde_json::to_value(typed).expect("JSON");
            assert_eq!(floating(&read), floating(document));
        }
    }

    /// What controllers write stays, whoever they are; and of a `spec` every field that decoding knows.
    #[test]
    fn status_keeps_everything_and_spec_every_known_field() {
        for document in documents() {
            let status = at(&document, ".status");
            assert_eq!(status["x-kubernetes-preserve-unknown-fields"], true);
            let open = all(&document).into_iter().filter(|(path, schema)| {
                path != ".status" && schema.get("x-kubernetes-preserve-unknown-fields").is_some()
            });
            assert_eq!(open.map(|(path, _)| path).collect::<Vec<_>>(), [""; 0], "the types say all of a spec");
        }
        // [C.10]: the one unknown field that is taken with a warning.
        assert_eq!(at(&of("Sidecar"), ".spec.workloadSelector.matchLabels")["type"], "object");
    }

    /// [C.9], §1.4: words are spelled as Istio spells them, absent means absent, and nothing is filled in.
    #[test]
    fn the_types_are_what_the_schemas_say() {
        let peer = of("PeerAuthentication");
        let words = json!(["UNSET", "DISABLE", "PERMISSIVE", "STRICT"]);
        for path in [".spec.mtls.mode", ".spec.portLevelMtls{}.mode"] {
            assert_eq!((&at(&peer, path)["enum"], &at(&peer, path)["type"]), (&words, &json!("string")), "{path}");
        }
        assert_eq!(at(&peer, ".spec.mtls.mode")["description"], "The mode.");
        let entry = of("ServiceEntry");
        assert_eq!(at(&entry, "")["required"], json!(["spec"]));
        assert_eq!(at(&entry, ".spec")["required"], json!(["hosts"]));
        let port = at(&entry, ".spec.ports[].number");
        assert_eq!((&port["minimum"], &port["maximum"]), (&json!(1), &json!(65535)));
        assert_eq!(at(&entry, ".spec.endpoints[].ports{}")["maximum"], 65535);
        assert_eq!(at(&of("PeerAuthentication"), ".spec.selector.matchLabels{}")["maxLength"], 63);
        // As Istio's: any number.
        let gateway = of("Gateway");
        let lax = at(&gateway, ".spec.servers[].port.number");
        assert_eq!(lax.as_object().map(|schema| schema.keys().cloned().collect::<Vec<_>>()), Some(vec!["type".into()]));
        let rule = of("DestinationRule");
        let tcp = |field: &str| at(&rule, &format!(".spec.trafficPolicy.connectionPool.tcp.{field}")).clone();
        assert_eq!(tcp("idleTimeout"), json!({"type": "string"}), "0s turns it off");
        assert_eq!(tcp("connectTimeout")["x-kubernetes-validations"][0]["rule"], "duration(self) >= duration('1ms')");
        assert_eq!(tcp("maxConnections"), json!({"type": "integer", "format": "int32"}));
        assert_eq!(tcp("tcpKeepalive.probes"), json!({"type": "integer", "minimum": 0, "maximum": u32::MAX}));
    }

    /// The rule with a message where the API server can afford it, the schema's own word elsewhere.
    #[test]
    fn fields_that_exclude_each_other_are_said_so_everywhere() {
        let rule = of("DestinationRule");
        let near = at(&rule, ".spec.trafficPolicy.loadBalancer");
        assert_eq!(
            near["x-kubernetes-validations"][0],
            json!({
                "rule": "(has(self.simple) ? 1 : 0) + (has(self.consistentHash) ? 1 : 0) <= 1",
                "message": "has more than one of simple, consistentHash; keep one",
            })
        );
        assert!(near.get("not").is_none());
        let far = at(&rule, ".spec.subsets[].trafficPolicy.loadBalancer");
        assert_eq!(far["not"], json!({"anyOf": [{"required": ["simple", "consistentHash"]}]}));
        assert!(far.get("x-kubernetes-validations").is_none());
        let uri = of("VirtualService");
        let pairs = json!([["exact", "prefix"], ["exact", "regex"], ["prefix", "regex"]]);
        let said = at(&uri, ".spec.http[].match[].headers{}")["not"]["anyOf"].as_array().expect("pairs").iter();
        assert_eq!(json!(said.map(|pair| pair["required"].clone()).collect::<Vec<_>>()), pairs);
    }

    /// What `kubectl get` shows has Istio's columns, by their names, and an age; every column has a name of its own.
    #[test]
    fn istio_s_columns_are_there() {
        for (kind, wanted) in [
            ("PeerAuthentication", &["Mode", "Age"][..]),
            ("AuthorizationPolicy", &["Action", "Age"]),
            ("RequestAuthentication", &["Age"]),
            ("Sidecar", &["Age"]),
            ("ServiceEntry", &["Hosts", "Location", "Resolution", "Age"]),
            ("WorkloadEntry", &["Age", "Address"]),
            ("DestinationRule", &["Host", "Age"]),
            ("VirtualService", &["Gateways", "Hosts", "Age"]),
            ("Gateway", &["Age"]),
            ("WorkloadGroup", &["Age"]),
        ] {
            let columns = of(kind)["spec"]["versions"][0]["additionalPrinterColumns"].clone();
            let columns = columns.as_array().expect("columns");
            let names: Vec<&str> = columns.iter().filter_map(|column| column["name"].as_str()).collect();
            let narrow = columns.iter().filter(|column| column["priority"].is_null());
            let narrow: Vec<&str> = narrow.filter_map(|column| column["name"].as_str()).collect();
            let ours: Vec<&str> = narrow.iter().copied().filter(|name| wanted.contains(name)).collect();
            assert_eq!(ours, wanted, "{kind}");
            assert!(narrow.contains(&"Accepted") && names.contains(&"Message"), "{kind}");
            assert!(names.iter().all(|name| names.iter().filter(|other| other == &name).count() == 1), "{names:?}");
        }
    }
}
