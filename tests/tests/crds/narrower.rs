//! Two schemas compared: where one could refuse what the other takes.

use serde_json::{Map, Value};

/// Says where `ours` is narrower than `theirs`, or has not a name or a version of it; both are definitions as the API server
/// gives them back.
pub(crate) fn compare(ours: &Value, theirs: &Value, found: &mut Vec<String>) {
    let kind = theirs["spec"]["names"]["kind"].as_str().unwrap_or_default();
    for names in ["shortNames", "categories"] {
        missing(&ours["spec"]["names"][names], &theirs["spec"]["names"][names], &format!("{kind}: {names}"), found);
    }
    for name in ["plural", "singular", "listKind"] {
        if ours["spec"]["names"][name] != theirs["spec"]["names"][name] {
            found.push(format!("{kind}: another {name}"));
        }
    }
    if ours["spec"]["scope"] != theirs["spec"]["scope"] {
        found.push(format!("{kind}: another scope"));
    }
    for version in theirs["spec"]["versions"].as_array().into_iter().flatten() {
        let name = version["name"].as_str().unwrap_or_default();
        let same = |own: &&Value| own["name"] == version["name"];
        let Some(own) = ours["spec"]["versions"].as_array().into_iter().flatten().find(same) else {
            found.push(format!("{kind}: no version {name}"));
            continue;
        };
        for what in ["served", "storage"] {
            if own[what] != version[what] {
                found.push(format!("{kind} {name}: {what} is {}", own[what]));
            }
        }
        let columns = |of: &Value| -> Value {
            of["additionalPrinterColumns"]
                .as_array()
                .into_iter()
                .flatten()
                .map(|column| column["name"].clone())
                .collect()
        };
        missing(&columns(own), &columns(version), &format!("{kind} {name}: columns"), found);
        let schema = |of: &Value| of["schema"]["openAPIV3Schema"].clone();
        let of = &format!("{kind} {name}: ");
        for part in ["spec", "status"] {
            let (own, their) = (schema(own)["properties"][part].clone(), schema(version)["properties"][part].clone());
            walk(&own, &their, &format!("{of}{part}"), found);
        }
        missing(&schema(version)["required"], &schema(own)["required"], &format!("{of}required"), found);
    }
}

/// Every element of `of` must be in `list`.
fn missing(list: &Value, of: &Value, what: &str, found: &mut Vec<String>) {
    let there = list.as_array().map(Vec::as_slice).unwrap_or_default();
    for one in of.as_array().into_iter().flatten().filter(|one| !there.contains(one)) {
        found.push(format!("{what}: {one} is on one side only"));
    }
}

fn walk(ours: &Value, theirs: &Value, path: &str, found: &mut Vec<String>) {
    let open = |schema: &Value| schema["x-kubernetes-preserve-unknown-fields"] == true;
    if open(ours) && ours.get("properties").is_none() {
        return;
    }
    if ours["type"] != theirs["type"] {
        found.push(format!("{path}: {} where they have {}", ours["type"], theirs["type"]));
        return;
    }
    if open(theirs) {
        found.push(format!("{path}: they keep any field"));
    }
    // Words: none of theirs may be missing.
    if !ours["enum"].is_null() {
        match theirs["enum"].is_null() {
            true => found.push(format!("{path}: they take any word")),
            false => missing(&ours["enum"], &theirs["enum"], path, found),
        }
    }
    missing(&theirs["required"], &ours["required"], &format!("{path}: required"), found);
    let rules = |schema: &Value| schema.get("x-kubernetes-validations").is_some();
    for (bound, least) in [
        ("minimum", true),
        ("minLength", true),
        ("minItems", true),
        ("minProperties", true),
        ("maximum", false),
        ("maxLength", false),
        ("maxItems", false),
        ("maxProperties", false),
    ] {
        let Some(own) = ours[bound].as_f64() else { continue };
        // They say it by a rule that ports are 1 to 65535, and so that a URL is not empty.
        let port = ours["minimum"].as_f64() == Some(1.0) && ours["maximum"].as_f64() == Some(65535.0);
        if port && rules(theirs) {
            continue;
        }
        let holds = theirs[bound].as_f64().is_some_and(|their| if least { own <= their } else { own >= their });
        if !holds {
            found.push(format!("{path}: {bound} {own}, and theirs is {}", theirs[bound]));
        }
    }
    if !ours["format"].is_null() && ours["format"] != theirs["format"] {
        found.push(format!("{path}: format {}, and theirs is {}", ours["format"], theirs["format"]));
    }
    if ours["x-kubernetes-list-type"] == "map"
        && (theirs["x-kubernetes-list-type"] != "map"
            || theirs["x-kubernetes-list-map-keys"] != ours["x-kubernetes-list-map-keys"])
    {
        found.push(format!("{path}: a list by keys"));
    }
    // What the rules say is compared by manifests; here, that they say anything at this place, or below or above it.
    let says =
        |schema: &Value| rules(schema) || ["oneOf", "allOf", "not"].iter().any(|word| schema.get(word).is_some());
    if says(ours) && !says(theirs) && !says(&theirs["items"]) && !says(&theirs["additionalProperties"]) {
        found.push(format!("{path}: a rule where they have none"));
    }
    let none = Map::new();
    let own = ours["properties"].as_object().unwrap_or(&none);
    for (name, their) in theirs["properties"].as_object().unwrap_or(&none) {
        let path = format!("{path}.{name}");
        match own.get(name) {
            Some(own) => walk(own, their, &path, found),
            None if open(ours) => {}
            None => found.push(format!("{path}: is dropped")),
        }
    }
    for (below, shown) in [("items", "[]"), ("additionalProperties", "{}")] {
        match (ours[below].is_object(), theirs[below].is_object()) {
            (true, true) => walk(&ours[below], &theirs[below], &format!("{path}{shown}"), found),
            (false, true) => found.push(format!("{path}{shown}: is dropped")),
            (_, false) => {}
        }
    }
}
