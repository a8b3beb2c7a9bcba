//! Which pods are in the mesh: the table of specification §2, row by row. What follows from it is for `enroll`.

use std::sync::Arc;

use crate::model::{Labels, Namespace, ObjectRef, Pod};

use super::Options;

/// Label of pods and namespaces that names the data plane.
pub const DATAPLANE_MODE: &str = "istio.io/dataplane-mode";
/// Label (pods), or annotation, that speaks about sidecars.
pub const SIDECAR_INJECT: &str = "sidecar.istio.io/inject";
/// Annotation that an injected sidecar leaves.
const SIDECAR_STATUS: &str = "sidecar.istio.io/status";
/// Label that names a control plane's revision.
pub const REVISION: &str = "istio.io/rev";
/// Label of namespaces that asks for injection.
const INJECTION: &str = "istio-injection";
/// Namespaces that only an explicit label brings in (row 10).
const SYSTEM_NAMESPACES: [&str; 4] = ["kube-system", "kube-public", "kube-node-lease", "local-path-storage"];

/// Whether a pod is in the mesh, and the row of specification §2 that decided.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Enrollment {
    /// In or out.
    pub enrolled: bool,
    /// The row of the table in specification §2, 1 to 16.
    pub row: u8,
    /// One line for humans.
    pub reason: Arc<str>,
    /// What was written but does not count ([E.1], [E.3]), one line each.
    pub warnings: Vec<String>,
}

/// Decides whether `pod` is in the mesh; the first row of specification §2 that applies decides.
///
/// `namespace` is the pod's, `None` where the source has none of that name: it counts as one without labels. The
/// annotation `ambient.istio.io/redirection` is status and is not read ([E.4]).
pub fn enrollment(pod: &Pod, namespace: Option<&Namespace>, options: &Options) -> Enrollment {
    let no_labels = Labels::new();
    let mut table = Table { pod, labels: namespace.map_or(&no_labels, |n| &n.labels), options, warnings: Vec::new() };
    let (row, enrolled, reason) = table.first_row();
    Enrollment { enrolled, row, reason: reason.into(), warnings: table.warnings }
}

struct Table<'a> {
    pod: &'a Pod,
    /// Of the namespace.
    labels: &'a Labels,
    options: &'a Options,
    warnings: Vec<String>,
}

impl Table<'_> {
    fn first_row(&mut self) -> (u8, bool, String) {
        let (pod, namespace) = (self.pod, &*self.pod.object.namespace);
        if pod.host_network {
            return (1, false, "the pod uses the node's network (hostNetwork)".into());
        }
        if pod.finished {
            return (2, false, "the pod has finished".into());
        }
        if self.options.exclude_namespaces.contains(namespace) {
            return (3, false, format!("namespace {namespace} is excluded by configuration"));
        }
        let account = ObjectRef { namespace: pod.object.namespace.clone(), name: pod.service_account.clone() };
        if self.options.own_accounts.contains(&account) {
            return (3, false, format!("the pod runs as {account}, an account of the mesh itself"));
        }
        if pod.annotations.contains_key(SIDECAR_STATUS) {
            return (4, false, format!("the pod has a sidecar (annotation {SIDECAR_STATUS})"));
        }
        if pod.has_proxy_container {
            return (4, false, "the pod has a sidecar (container istio-proxy)".into());
        }
        let pod_mode = self.dataplane_mode(&pod.labels, "pod");
        let namespace_mode = match pod_mode {
            Some(_) => None,
            None => self.dataplane_mode(self.labels, &format!("namespace {namespace}")),
        };
        match (pod_mode, namespace_mode) {
            (Some(false), _) => return (5, false, format!("pod label {DATAPLANE_MODE}=none")),
            (Some(true), _) => return (6, true, format!("pod label {DATAPLANE_MODE}=ambient")),
            (None, Some(true)) => return (7, true, format!("namespace label {DATAPLANE_MODE}=ambient")),
            (None, Some(false)) => return (8, false, format!("namespace label {DATAPLANE_MODE}=none")),
            (None, None) => {}
        }
        if let Some(kind) = self.injection_refused() {
            return (9, false, format!("pod {kind} {SIDECAR_INJECT}=false"));
        }
        if SYSTEM_NAMESPACES.contains(&namespace) {
            return (10, false, format!("namespace {namespace} belongs to the system"));
        }
        match self.labels.get(INJECTION).map(String::as_str) {
            Some("enabled") => return (11, true, format!("namespace label {INJECTION}=enabled")),
            Some(other) => return (12, false, format!("namespace label {INJECTION}={other:?} is not \"enabled\"")),
            None => {}
        }
        let revision = &self.options.revision;
        if let Some(wanted) = self.labels.get(REVISION) {
            let reason = format!("namespace label {REVISION}={wanted}, and this is revision {revision}");
            return (13, wanted == revision, reason);
        }
        if pod.labels.get(REVISION) == Some(revision) {
            return (14, true, format!("pod label {REVISION}={revision}"));
        }
        if pod.labels.get(SIDECAR_INJECT).is_some_and(|value| value == "true") {
            return (15, true, format!("pod label {SIDECAR_INJECT}=true"));
        }
        if pod.annotations.get(SIDECAR_INJECT).is_some_and(|value| value == "true") {
            self.warnings.push(format!(
                "annotation {SIDECAR_INJECT}: \"true\" does not opt in; make it a label, or use {DATAPLANE_MODE}=ambient"
            ));
        }
        (16, false, "no label of the pod or of its namespace asks for the mesh".into())
    }

    /// Rows 5 to 8: `Some(true)` for `ambient`, `Some(false)` for `none`; anything else counts as absent ([E.1]).
    fn dataplane_mode(&mut self, labels: &Labels, whose: &str) -> Option<bool> {
        match labels.get(DATAPLANE_MODE)?.as_str() {
            "ambient" => Some(true),
            "none" => Some(false),
            other => {
                self.warnings.push(format!(
                    "label {DATAPLANE_MODE}={other:?} of the {whose} is ignored; write \"ambient\" or \"none\""
                ));
                None
            }
        }
    }

    /// Row 9: the kind of metadata that says `false`; the annotation is read only where there is no such label.
    fn injection_refused(&mut self) -> Option<&'static str> {
        let (kind, value) = match (self.pod.labels.get(SIDECAR_INJECT), self.pod.annotations.get(SIDECAR_INJECT)) {
            (Some(value), _) => ("label", value),
            (None, Some(value)) => ("annotation", value),
            (None, None) => return None,
        };
        match value.as_str() {
            "false" => Some(kind),
            "true" => None,
            other => {
                self.warnings.push(format!(
                    "{kind} {SIDECAR_INJECT}={other:?} of the pod is ignored; write \"true\" or \"false\""
                ));
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{super::testing::pod, *};

    struct Case {
        row: u8,
        enrolled: bool,
        pod: Pod,
        namespace: Labels,
    }

    fn labels(text: &str) -> Labels {
        text.split_whitespace().filter_map(|pair| pair.split_once('=')).map(|(k, v)| (k.into(), v.into())).collect()
    }

    fn check(row: u8, enrolled: bool, namespace: &str, change: impl Fn(&mut Pod)) {
        let mut pod = pod("default", "productpage", "10.0.0.1");
        change(&mut pod);
        let case = Case { row, enrolled, pod, namespace: labels(namespace) };
        let result = decide(&case);
        assert_eq!((result.row, result.enrolled), (case.row, case.enrolled), "{}: {:?}", result.reason, case.pod);
        assert!(result.warnings.is_empty(), "{:?}", result.warnings);
    }

    fn decide(case: &Case) -> Enrollment {
        let namespace = Namespace { labels: case.namespace.clone(), ..Namespace::default() };
        enrollment(&case.pod, Some(&namespace), &Options::default())
    }

    const AMBIENT: &str = "istio.io/dataplane-mode=ambient";

    /// Specification §2, every row, against a namespace that would say the opposite where one can.
    #[test]
    fn each_row_of_the_table_decides() {
        check(1, false, AMBIENT, |p| {
            p.host_network = true;
            p.labels = labels(AMBIENT).into();
        });
        check(2, false, AMBIENT, |p| p.finished = true);
        check(3, false, AMBIENT, |p| {
            p.object.namespace = "kube-system".into();
            p.labels = labels(AMBIENT).into();
        });
        check(3, false, AMBIENT, |p| {
            p.object.namespace = "istio-system".into();
            p.service_account = "culvert".into();
        });
        check(4, false, AMBIENT, |p| p.annotations = labels("sidecar.istio.io/status={}"));
        check(4, false, AMBIENT, |p| p.has_proxy_container = true);
        check(5, false, AMBIENT, |p| p.labels = labels("istio.io/dataplane-mode=none").into());
        check(6, true, "istio.io/dataplane-mode=none", |p| p.labels = labels(AMBIENT).into());
        check(7, true, AMBIENT, |_| {});
        check(8, false, "istio.io/dataplane-mode=none istio-injection=enabled", |_| {});
        check(9, false, "istio-injection=enabled", |p| p.labels = labels("sidecar.istio.io/inject=false").into());
        check(9, false, "istio-injection=enabled", |p| p.annotations = labels("sidecar.istio.io/inject=false"));
        for system in ["kube-public", "kube-node-lease", "local-path-storage"] {
            check(10, false, "istio-injection=enabled", |p| p.object.namespace = system.into());
        }
        check(11, true, "istio-injection=enabled istio.io/rev=other", |_| {});
        check(12, false, "istio-injection=disabled istio.io/rev=default", |_| {});
        check(12, false, "istio-injection=true", |p| p.labels = labels("sidecar.istio.io/inject=true").into());
        check(13, true, "istio.io/rev=default", |_| {});
        check(13, false, "istio.io/rev=canary", |p| p.labels = labels("istio.io/rev=default").into());
        check(14, true, "", |p| p.labels = labels("istio.io/rev=default").into());
        check(15, true, "", |p| p.labels = labels("sidecar.istio.io/inject=true").into());
        check(16, false, "", |p| p.labels = labels("istio.io/rev=canary").into());
        check(16, false, "", |_| {});
    }

    /// [E.2]
    #[test]
    fn inject_false_speaks_about_sidecars_only() {
        check(7, true, AMBIENT, |p| p.labels = labels("sidecar.istio.io/inject=false").into());
        check(7, true, AMBIENT, |p| p.annotations = labels("sidecar.istio.io/inject=false"));
        check(9, false, "istio-injection=enabled", |p| p.labels = labels("sidecar.istio.io/inject=false").into());
    }

    /// Row 9: a label hides the annotation.
    #[test]
    fn the_inject_label_hides_the_annotation() {
        check(11, true, "istio-injection=enabled", |p| {
            p.labels = labels("sidecar.istio.io/inject=true").into();
            p.annotations = labels("sidecar.istio.io/inject=false");
        });
    }

    /// [E.4]
    #[test]
    fn redirection_status_is_not_intent() {
        check(16, false, "", |p| p.annotations = labels("ambient.istio.io/redirection=enabled"));
    }

    /// [E.1], [E.3], [C.9]
    #[test]
    fn odd_values_are_ignored_with_a_warning() {
        for (row, enrolled, namespace, pod_labels, annotations, word) in [
            (16, false, "istio.io/dataplane-mode=Ambient", "", "", "Ambient"),
            (7, true, AMBIENT, "istio.io/dataplane-mode=off", "", "off"),
            (11, true, "istio-injection=enabled", "sidecar.istio.io/inject=no", "sidecar.istio.io/inject=false", "no"),
            (16, false, "", "sidecar.istio.io/inject=True", "", "True"),
            (16, false, "", "", "sidecar.istio.io/inject=true", "does not opt in"),
        ] {
            let mut pod = pod("default", "productpage", "10.0.0.1");
            pod.labels = labels(pod_labels).into();
            pod.annotations = labels(annotations);
            let result = decide(&Case { row, enrolled, pod, namespace: labels(namespace) });
            assert_eq!((result.row, result.enrolled), (row, enrolled), "{namespace} {pod_labels} {annotations}");
            assert_eq!(result.warnings.len(), 1, "{:?}", result.warnings);
            assert!(result.warnings[0].contains(word), "{}", result.warnings[0]);
        }
    }

    #[test]
    fn a_namespace_that_is_not_listed_has_no_labels() {
        let result = enrollment(&pod("nowhere", "a", "10.0.0.1"), None, &Options::default());
        assert_eq!((result.row, result.enrolled), (16, false));
    }

    /// Rows 3, 13 and 14 read the options.
    #[test]
    fn options_change_the_table() {
        let options =
            Options { revision: "canary".into(), exclude_namespaces: ["default".into()].into(), ..Options::default() };
        let mut pod = pod("default", "a", "10.0.0.1");
        pod.labels = labels(AMBIENT).into();
        assert_eq!(enrollment(&pod, None, &options).row, 3);
        pod.object.namespace = "other".into();
        pod.labels = labels("istio.io/rev=canary").into();
        assert_eq!(enrollment(&pod, None, &options).row, 14);
    }
}
