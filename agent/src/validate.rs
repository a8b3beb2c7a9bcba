//! What is to be said of objects: what decoding them finds ([`crate::source::review`]), and what policies make of them
//! and of each other ([`policy::compile`]). `culvert validate` says it of manifests, the webhook of one object before
//! it is stored.

use std::collections::BTreeSet;

use serde_json::Value as Json;

use crate::{
    policy::{self, Options},
    source::review::{Judged, Remark, Review, Reviewed},
};

/// Every object with all that is to be said of it: of one that is accepted, also what policies say; no line twice.
pub fn judge(review: Review, options: &Options) -> Vec<Reviewed> {
    let snapshot = policy::compile(&review.view.cluster, options, None);
    let judged = |mut object: Reviewed| {
        if object.faults.is_empty() {
            let about = snapshot.warnings.iter().filter(|line| object.is_subject_of(line));
            let remark =
                |line: &String| Remark { file: object.file.clone(), line: Some(object.line), message: line.clone() };
            let remarks: Vec<Remark> = about.map(remark).collect();
            object.warnings.extend(remarks);
        }
        let mut said: BTreeSet<String> = object.faults.iter().map(ToString::to_string).collect();
        object.warnings.retain(|warning| said.insert(warning.to_string()));
        object
    };
    review.objects.into_iter().map(judged).collect()
}

/// What is to be said of one object as an API server sends it, where no other is known: what [`judge`] says of it, and
/// whether this version enforces it. `system_namespace` is the one of ConfigMap `istio`, the mesh configuration.
pub fn object(object: Json, system_namespace: &str, options: &Options) -> Judged {
    let judged = judge(Review::of_object(object, system_namespace), options);
    judged.into_iter().next().map(Judged::from).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::source::review::Manifests;

    /// The webhook and `culvert validate` say the same of one object, but for the places in the file.
    #[test]
    fn an_object_is_judged_as_the_manifest_with_it_is() {
        let of = |kind: &str, spec: Json| {
            let metadata = json!({"name": "x", "namespace": "shop"});
            json!({"apiVersion": "security.istio.io/v1", "kind": kind, "metadata": metadata, "spec": spec})
        };
        let rules = |operation: Json| json!({"rules": [{"to": [{"operation": operation}]}]});
        for (object, faults, warnings) in [
            (of("AuthorizationPolicy", rules(json!({"ports": ["80"]}))), 0, 0),
            (of("AuthorizationPolicy", rules(json!({"ports": ["http"], "portz": 1}))), 2, 0),
            (of("AuthorizationPolicy", rules(json!({"methods": ["GET"]}))), 0, 1),
            (of("PeerAuthentication", json!({"mtls": {"mode": "STRIKT"}})), 1, 0),
            (of("PeerAuthentication", json!({"selector": {"matchLabels": {}}})), 0, 1),
        ] {
            let (options, system) = (Options::default(), "istio-system");
            let judged = super::object(object.clone(), system, &options);
            let review = Manifests::of("a.yaml", object.to_string()).review(system);
            let manifest = judge(review, &options).into_iter().next().map(Judged::from).expect("one object");
            assert_eq!(judged, manifest, "{object}");
            assert_eq!((judged.faults.len(), judged.warnings.len()), (faults, warnings), "{object}: {judged:?}");
        }
    }
}
