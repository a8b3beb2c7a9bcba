//! The definitions of Istio's kinds on a real API server: it takes them, they take every manifest that Istio's own take, in
//! every served version, and refuse with a reason what no version could accept ([C.1], [C.6]).

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result, ensure};
use culvert::source::review::Manifests;
use culvert_tests::apiserver::{ApiPlan, ApiServer, assets};
use serde_json::{Value, json};

mod narrower;
mod refused;
mod support;

use support::{LOOSE, SHAPES, Shape, create, culvert, install, ours, shapes};

/// What is right for `culvert validate` is right for the API server, in every version that is served.
#[test]
fn every_shape_is_taken_in_every_served_version() -> Result<()> {
    let server = ours()?;
    for shape in shapes(SHAPES)? {
        let review = Manifests::of("shape.yaml", shape.text.clone()).review("istio-system");
        let faults: Vec<String> =
            review.objects.iter().flat_map(|of| of.faults.iter().map(ToString::to_string)).collect();
        ensure!(review.objects.len() == 1 && faults.is_empty(), "{}: {faults:?}", shape.name);
    }
    let wanted = Shape::in_all_versions(&shapes(SHAPES)?)?;
    let (taken, said) = create(&server, &wanted)?;
    let missed: Vec<&str> = wanted.iter().map(|shape| &*shape.name).filter(|name| !taken.contains(*name)).collect();
    ensure!(missed.is_empty(), "not taken: {missed:?}\n{said}");
    Ok(())
}

/// [C.6], [C.7]: what Istio's definitions take, ours take, also where it is invalid: the last valid version stays in force.
#[test]
fn what_only_decoding_can_refuse_is_taken() -> Result<()> {
    let server = ours()?;
    let wanted = Shape::in_all_versions(&shapes(LOOSE)?)?;
    let (taken, said) = create(&server, &wanted)?;
    let missed: Vec<&str> = wanted.iter().map(|shape| &*shape.name).filter(|name| !taken.contains(*name)).collect();
    ensure!(missed.is_empty(), "not taken: {missed:?}\n{said}");
    Ok(())
}

/// Istio's own definitions, beside ours on another server: every manifest that they take ours take, whatever it is; and no
/// schema of ours is narrower anywhere.
#[test]
fn what_istio_s_own_definitions_take_ours_take() -> Result<()> {
    let server = ours()?;
    let other = ApiServer::start_as(ApiPlan { controllers: false, ..ApiPlan::default() })?;
    install(&other, &assets::istio_definitions()?)?;

    let mut manifests = Shape::in_all_versions(&shapes(SHAPES)?)?;
    manifests.extend(Shape::in_all_versions(&shapes(LOOSE)?)?);
    manifests.extend(refused::all());
    let (by_istio, _) = create(&other, &manifests)?;
    let (by_ours, said) = create(&server, &manifests)?;
    // If they took nothing, the comparison would say nothing.
    ensure!(
        by_istio.len() * 2 > manifests.len(),
        "Istio's own take {} of {} manifests only",
        by_istio.len(),
        manifests.len()
    );
    let narrower: Vec<&String> = by_istio.difference(&by_ours).collect();
    ensure!(narrower.is_empty(), "Istio's own take {narrower:?}, and ours do not:\n{said}");

    let mut found = Vec::new();
    for of in culvert::source::istio_kinds() {
        let definition = |server: &ApiServer| -> Result<Value> {
            let all = server.kubectl(&["get", "customresourcedefinitions", "--output", "json"])?;
            let all: Value = serde_json::from_str(&all)?;
            let mut items = all["items"].as_array().into_iter().flatten();
            let one = items.find(|one| one["spec"]["names"]["kind"] == of.name && one["spec"]["group"] == of.group);
            one.cloned().with_context(|| format!("a definition of {}", of.name))
        };
        narrower::compare(&definition(&server)?, &definition(&other)?, &mut found);
    }
    ensure!(found.is_empty(), "{}", found.join("\n"));
    Ok(())
}

/// Where a cluster has definitions, ours neither replace them nor change anything of them.
#[test]
fn definitions_that_are_there_stay_as_they_are() -> Result<()> {
    let server = ApiServer::start_as(ApiPlan { controllers: false, ..ApiPlan::default() })?;
    let theirs = json!({
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": "peerauthentications.security.istio.io", "labels": {"app": "istio-pilot"}},
        "spec": {
            "group": "security.istio.io",
            "names": {"kind": "PeerAuthentication", "plural": "peerauthentications"},
            "scope": "Namespaced",
            "versions": [{
                "name": "v1",
                "served": true,
                "storage": true,
                "schema": {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": true}},
            }],
        },
    });
    server.kubectl_with(&["create", "--filename", "-"], &theirs.to_string())?;
    let shown =
        || server.kubectl(&["get", "crd/peerauthentications.security.istio.io", "--output", "jsonpath={.spec}"]);
    let before = shown()?;
    let refused = server.kubectl_with(&["create", "--filename", "-"], &culvert(&["crds"])?);
    let refused = format!("{:#}", refused.err().context("one is there already")?);
    ensure!(refused.matches("AlreadyExists").count() == 1, "{refused}");
    ensure!(shown()? == before, "it was changed");
    // The others were created all the same.
    let all = server.kubectl(&["get", "crd", "--output", "name"])?;
    ensure!(all.lines().count() == culvert::source::istio_kinds().count(), "{all}");
    Ok(())
}

/// Wrong spellings, places and values are refused when they are written, with the field and the remedy.
#[test]
fn what_no_version_could_accept_is_refused_with_a_reason() -> Result<()> {
    let server = ours()?;
    for (at, (case, path, words)) in refused::CASES.iter().enumerate() {
        let shape = refused::shape(at, case);
        let answer = server.kubectl_with(&["create", "--dry-run=server", "--filename", "-"], &shape.text);
        let said = format!("{:#}", answer.err().with_context(|| format!("taken: {}", shape.text))?);
        let placed = path.is_empty() || said.contains(&format!(" {path}: "));
        ensure!(placed && said.contains(words), "expected {path:?} and {words:?} of\n{}\n{said}", shape.text);
    }
    Ok(())
}

/// [C.1]: all versions mean the same: what is written in one is read in each other.
#[test]
fn an_object_is_the_same_in_every_version() -> Result<()> {
    let server = ours()?;
    server.namespace("versions")?;
    let written = Shape::in_all_versions(&shapes(SHAPES)?)?;
    let texts: Vec<&str> = written.iter().map(|shape| &*shape.text).collect();
    server.kubectl_with(&["create", "--namespace", "versions", "--filename", "-"], &texts.join("---\n"))?;
    // By kind and name without the version that it was written in: what each version shows of each of them.
    let mut shown: BTreeMap<(&str, String), BTreeSet<String>> = BTreeMap::new();
    let mut count = 0;
    for of in culvert::source::istio_kinds() {
        for version in of.versions {
            let what = format!("{}.{version}.{}", of.name.to_lowercase(), of.group);
            let got = server.kubectl(&["get", &what, "--namespace", "versions", "--output", "json"])?;
            let got: Value = serde_json::from_str(&got)?;
            for object in got["items"].as_array().context("a list")? {
                ensure!(object["apiVersion"] == format!("{}/{version}", of.group), "{object}");
                let name = object["metadata"]["name"].as_str().context("a name")?;
                let (name, _) = name.rsplit_once('-').context("the version in the name")?;
                shown.entry((of.name, name.to_owned())).or_default().insert(object["spec"].to_string());
                count += 1;
            }
        }
    }
    let expected: usize =
        shapes(SHAPES)?.iter().map(|shape| Ok(shape.kind()?.versions.len().pow(2))).sum::<Result<_>>()?;
    ensure!(count == expected, "{count} of {expected} are shown");
    for (of, specs) in &shown {
        ensure!(specs.len() == 1, "{of:?} differs between its versions: {specs:?}");
    }
    Ok(())
}

/// [C.7]: what controllers write stays, whoever they are; and `kubectl get` shows it.
#[test]
fn the_status_is_kept_and_shown() -> Result<()> {
    let server = ours()?;
    server.namespace("status")?;
    let policy = "apiVersion: security.istio.io/v1beta1\nkind: PeerAuthentication\nmetadata: {name: strict, namespace: status}\n\
                  spec: {selector: {matchLabels: {app: web}}, mtls: {mode: STRICT}, portLevelMtls: {8080: {mode: DISABLE}}}\n";
    server.apply(policy)?;
    let status = json!({
        "conditions": [{
            "type": "Accepted",
            "status": "False",
            "reason": "Invalid",
            "message": "the last valid version is in force",
            "lastTransitionTime": "2026-01-01T00:00:00Z",
            "observedGeneration": "2",
        }],
        "validationMessages": [{"type": {"name": "X", "code": "IST0101"}, "level": "ERROR", "documentationUrl": "u"}],
        "observedGeneration": 2,
        "addresses": [{"value": "240.240.0.1", "host": "a.example"}],
        "culvert": {"lastValid": {"generation": 1, "spec": {"mtls": {"mode": "STRICT"}}}},
    });
    let patch = json!({"status": status}).to_string();
    let of = ["--namespace", "status", "--subresource", "status", "--type", "merge", "--patch", &patch];
    server.kubectl(&[&["patch", "peerauthentication/strict"][..], &of[..]].concat())?;
    let got = server.kubectl(&["get", "pa/strict", "--namespace", "status", "--output", "json"])?;
    let got: Value = serde_json::from_str(&got)?;
    ensure!(got["status"] == status, "{}", got["status"]);
    // A status is not for whoever writes the policy.
    server.apply(&format!("{policy}status: {{conditions: []}}\n"))?;
    let got = server.kubectl(&[
        "get",
        "pa/strict",
        "--namespace",
        "status",
        "--output",
        "jsonpath={.status.conditions[0].type}",
    ])?;
    ensure!(got == "Accepted", "{got}");

    let narrow = server.kubectl(&["get", "pa", "--namespace", "status"])?;
    let words = |text: &str| text.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    ensure!(words(narrow.lines().next().unwrap_or_default()) == ["NAME", "MODE", "ACCEPTED", "AGE"], "{narrow}");
    ensure!(words(narrow.lines().nth(1).unwrap_or_default())[..3] == ["strict", "STRICT", "False"], "{narrow}");
    let wide = server.kubectl(&["get", "pa", "--namespace", "status", "--output", "wide"])?;
    for shown in [
        "SELECTOR",
        "PORTS",
        "MESSAGE",
        r#"{"app":"web"}"#,
        r#"{"8080":{"mode":"DISABLE"}}"#,
        "the last valid version is in force",
    ] {
        ensure!(wide.contains(shown), "no {shown} in\n{wide}");
    }
    // All kinds at once, by Istio's word for them.
    let all = server.kubectl(&["get", "istio-io", "--namespace", "status", "--output", "name"])?;
    ensure!(all.trim() == "peerauthentication.security.istio.io/strict", "{all}");
    Ok(())
}
