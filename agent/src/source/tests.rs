//! Manifests as users write them, right and wrong, through the whole of reading.

use proptest::prelude::*;

use crate::model::{MtlsMode, ObjectRef, PeerAuthentication, PodUid, SessionAffinity, TargetPort};

use super::{
    View, definitions,
    folder::{Content, Folder},
};

struct Texts(Folder);

impl Texts {
    fn new() -> Self {
        Self(Folder::new("istio-system"))
    }

    fn put(&mut self, name: &str, text: &str) -> View {
        self.0.update([(name.to_owned(), Content::Text(text.to_owned()))])
    }

    fn gone(&mut self, name: &str) -> View {
        self.0.update([(name.to_owned(), Content::Gone)])
    }
}

fn read(text: &str) -> View {
    let view = Texts::new().put("a.yaml", text);
    if view.problems.is_empty() {
        assert_eq!(definitions::refusals(text), [""; 0], "what decoding accepts, an API server accepts\n{text}");
    }
    view
}

/// The lines of a view's problems.
fn lines(view: &View) -> Vec<String> {
    view.problems.iter().map(ToString::to_string).collect()
}

fn policy<'a>(view: &'a View, namespace: &str, name: &str) -> Option<&'a PeerAuthentication> {
    view.cluster.peer_authentications.get(&ObjectRef::new(namespace, name)).map(|policy| &**policy)
}

/// A PeerAuthentication `test/strict` with this spec, indented by two.
fn peer_auth(spec: &str) -> String {
    format!(
        "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata:\n  name: strict\n  namespace: test\n{spec}"
    )
}

const STRICT: &str = "spec:\n  mtls:\n    mode: STRICT\n";
const POD: &str = "\
apiVersion: v1
kind: Pod
metadata:
  name: productpage
  uid: 0d1f6a0e-0001
  labels: {app: productpage}
  annotations: {sidecar.istio.io/inject: 'true', other.example/x: z}
  creationTimestamp: 2024-05-01T10:00:00Z
  ownerReferences:
  - {apiVersion: apps/v1, kind: ReplicaSet, name: productpage-7d4c, uid: u, controller: true}
spec:
  serviceAccountName: bookinfo
  nodeName: node-1
  containers:
  - name: main
    image: example
    resources: {limits: {cpu: 1, memory: 1Gi}}
    livenessProbe: {httpGet: {path: /, port: http}}
    ports:
    - {name: http, containerPort: 9080}
    - {name: dns, containerPort: 53, protocol: UDP}
status:
  phase: Running
  podIP: 10.0.0.1
  podIPs: [{ip: 10.0.0.1}, {ip: 'fd00::1'}]
  conditions: [{type: Ready, status: 'True'}]
";

#[test]
fn a_pod_is_read_with_all_that_counts() {
    let view = read(POD);
    assert_eq!(lines(&view), [""; 0]);
    let pod = &view.cluster.pods[&PodUid("0d1f6a0e-0001".into())];
    assert_eq!(pod.object, ObjectRef::new("default", "productpage"), "no namespace = default [C.11]");
    assert_eq!((&*pod.service_account, &*pod.node, pod.ready, pod.finished), ("bookinfo", "node-1", true, false));
    assert_eq!(pod.ips.len(), 2);
    assert_eq!(*pod.named_ports, [("http".to_owned(), 9080)].into());
    assert_eq!(pod.annotations.keys().collect::<Vec<_>>(), ["sidecar.istio.io/inject"]);
    assert_eq!(&*pod.workload_name, "productpage-7d4c");
}

#[test]
fn the_uid_of_a_static_pod_is_what_its_cgroup_is_named_by() {
    let pod = |uid: &str, annotations: &str| {
        let text = format!(
            "apiVersion: v1\nkind: Pod\nmetadata:\n  name: p\n{uid}  annotations: {{{annotations}}}\nspec: {{containers: []}}\n"
        );
        let view = read(&text);
        assert_eq!(lines(&view), [""; 0]);
        let pod = view.cluster.pods.values().next().expect("a pod");
        (pod.uid.0.to_string(), pod.mirror_uid.as_deref().map(str::to_owned))
    };
    let plain = |uid: &str| (uid.to_owned(), None);
    let (uid, hash) = ("  uid: aaa\n", "kubernetes.io/config.hash: bbb");
    assert_eq!(pod(uid, ""), plain("aaa"));
    assert_eq!(pod("", hash), plain("bbb"));
    let mirror = format!("{hash}, kubernetes.io/config.mirror: bbb");
    assert_eq!(pod(uid, &mirror), ("bbb".to_owned(), Some("aaa".to_owned())));
    assert_eq!(pod(uid, hash), plain("aaa"), "a pod of the API server cannot take another one's place");
    assert_eq!(pod("", ""), plain("default/p"));
}

#[test]
fn services_slices_nodes_and_namespaces_are_read() {
    let view = read(
        "apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec:
  clusterIP: 10.96.0.1
  selector: {app: web}
  sessionAffinity: ClientIP
  internalTrafficPolicy: Local
  ports:
  - {name: a, port: 80, targetPort: http}
  - {name: b, port: 81, targetPort: 8081}
  - {name: c, port: 82}
  - {name: u, port: 53, protocol: UDP}
---
apiVersion: v1
kind: Service
metadata: {name: headless, namespace: shop}
spec: {clusterIP: None, ports: [{port: 80}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web-1, namespace: shop, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
ports: [{name: a, port: 8080}]
endpoints:
- {addresses: [10.0.0.1], targetRef: {kind: Pod, name: p}, conditions: {ready: false}}
- {addresses: [192.0.2.1]}
---
apiVersion: v1
kind: Node
metadata: {name: node-1, labels: {topology.kubernetes.io/zone: z}}
status: {addresses: [{type: InternalIP, address: 192.168.0.1}, {type: Hostname, address: node-1}]}
---
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {istio.io/dataplane-mode: ambient}}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: web, namespace: shop}
",
    );
    assert_eq!(lines(&view), [""; 0]);
    let web = &view.cluster.services[&ObjectRef::new("shop", "web")];
    let targets: Vec<_> = web.ports.iter().map(|port| (port.port, port.target.clone())).collect();
    let number = TargetPort::Number;
    assert_eq!(targets, [(80, TargetPort::Name("http".into())), (81, number(8081)), (82, number(82))]);
    assert_eq!(web.session_affinity, SessionAffinity::ClientIp(std::time::Duration::from_secs(10800)));
    assert!(web.internal_traffic_local);
    assert!(view.cluster.services[&ObjectRef::new("shop", "headless")].cluster_ips.is_empty());
    let slice = &view.cluster.endpoint_slices[&ObjectRef::new("shop", "web-1")];
    assert_eq!(slice.endpoints[0].pod, Some((None, ObjectRef::new("shop", "p"))));
    assert_eq!((slice.endpoints[0].ready, slice.endpoints[1].ready), (false, true));
    assert_eq!(view.cluster.nodes["node-1"].addresses.len(), 1);
    assert_eq!(view.cluster.namespaces["shop"].labels.len(), 1);
}

/// A `List`, as `kubectl get -o yaml` prints it; faults of its items have the item's place.
#[test]
fn a_list_is_its_items() {
    let item = peer_auth(STRICT).replace('\n', "\n  ");
    let text = format!("apiVersion: v1\nkind: List\nmetadata: {{resourceVersion: ''}}\nitems:\n- {item}\n");
    let view = read(&text);
    assert_eq!(lines(&view), [""; 0]);
    assert_eq!(policy(&view, "test", "strict").map(|p| p.mode), Some(MtlsMode::Strict));
    let view = read(&text.replace("STRICT", "strict"));
    assert!(
        lines(&view)[0]
            .starts_with("a.yaml document 1 (line 12): PeerAuthentication test/strict: items[0].spec.mtls.mode")
    );
}

/// §1.2: every served version means the same; an empty document is nothing; `status` is somebody else's.
#[test]
fn served_versions_are_the_same() {
    for version in ["v1", "v1beta1"] {
        let text = peer_auth(STRICT).replace("/v1", &format!("/{version}"));
        let view = read(&format!("---\n# nothing\n---\n{text}status: {{conditions: []}}\n---\n"));
        assert_eq!(lines(&view), [""; 0]);
        assert_eq!(policy(&view, "test", "strict").map(|p| p.mode), Some(MtlsMode::Strict));
    }
}

/// §1.2, [C.11]: other kinds of Istio are accepted with a notice, and only where their metadata is right.
#[test]
fn kinds_that_are_not_enforced_are_named() {
    let sidecar = "apiVersion: networking.istio.io/v1beta1\nkind: Sidecar\nmetadata: {name: s}\nspec: {outboundTrafficPolicy: {}}\n";
    let view = read(sidecar);
    assert_eq!(lines(&view), [""; 0]);
    assert_eq!(view.notices, ["Sidecar default/s is accepted, but not enforced by this version"]);
    let view = read(&sidecar.replace("{name: s}", "{nam: s}"));
    assert!(lines(&view)[0].contains("metadata.nam: unknown field; did you mean name?"), "{:?}", lines(&view));
    assert_eq!(view.notices, [""; 0]);
}

/// Wrong manifests of every sort: one line with the place, the field, and the remedy; and no object.
#[test]
fn wrong_manifests_are_one_line_each() {
    let policy = |spec: &str| peer_auth(&format!("spec:\n{spec}"));
    for (text, expected) in [
        // §19: values of `mode`, [C.9].
        (policy("  mtls: {mode: DISABLED}\n"), "(line 7): PeerAuthentication test/strict: spec.mtls.mode: \"DISABLED\" is not a value of it; write one of UNSET, DISABLE, PERMISSIVE, STRICT"),
        (policy("  mtls:\n    mode: strict\n"), "(line 8): PeerAuthentication test/strict: spec.mtls.mode: \"strict\" is not a value"),
        (policy("  mtls: {mode: MUTUAL}\n"), "spec.mtls.mode: \"MUTUAL\" is not a value"),
        (policy("  mtls: {mode: off}\n"), "spec.mtls.mode: false is not a value"),
        // [C.3], [C.10]: unknown fields at every depth.
        (policy("  selector:\n    labels: {app: a}\n"), "(line 8): PeerAuthentication test/strict: spec.selector.labels: unknown field; known here: matchLabels"),
        (policy("  mTLS: {mode: STRICT}\n"), "spec.mTLS: unknown field; did you mean mtls?"),
        (policy("  mtls: {mod: STRICT}\n"), "spec.mtls.mod: unknown field; did you mean mode?"),
        (policy("  selector: {matchLabels: {app: 5}}\n"), "spec.selector.matchLabels.app: must be a string, not a number (5); put it in quotes"),
        (policy("  selector: {matchLabels: {app: }}\n"), "spec.selector.matchLabels.app: is empty"),
        (policy("  mtls: STRICT\n"), "spec.mtls: must be a mapping, not a string (\"STRICT\")"),
        (policy("  mtls: {mode: PERMISSIVE, mode: STRICT}\n"), "spec.mtls.mode: is given twice, first in line 7"),
        // [C.6]: version, group, kind, name.
        (peer_auth(STRICT).replace("/v1", "/v1alpha1"), "(line 1): PeerAuthentication test/strict: apiVersion: PeerAuthentication is not served as security.istio.io/v1alpha1; write security.istio.io/v1 or"),
        (peer_auth(STRICT).replace("security.", "securty."), "(line 1): apiVersion: securty.istio.io/v1 has no kind PeerAuthentication; did you mean security.istio.io/v1?"),
        (peer_auth(STRICT).replace("kind: Peer", "kind: Per"), "(line 2): kind: unknown kind PerAuthentication; did you mean PeerAuthentication?"),
        (peer_auth(STRICT).replace("name: strict", "name: Strict"), "(line 4): metadata.name: \"Strict\" is not a name"),
        (peer_auth(STRICT).replace("kind: PeerAuthentication\n", ""), "kind: is missing"),
        // §19: broken indentation.
        ("apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata:\nname: strict\nspec: {}\n".into(), "(line 4): name: unknown field; it belongs in metadata: indent it below"),
        ("- a\n- b\n".into(), "(line 1): an object must be a mapping, not a list"),
        ("apiVersion: v1\nkind: Namespace\nmetadata: {name: a, namespace: b}\n".into(), "metadata.namespace: a Namespace has no namespace; remove it"),
        // Built-in kinds.
        (POD.replace("nodeName", "nodename"), "spec.nodename: unknown field; did you mean nodeName?"),
        (POD.replace("containerPort: 9080", "containerport: 9080"), "spec.containers[0].ports[0].containerport: unknown field; did you mean containerPort?"),
        (POD.replace("10.0.0.1}", "10.0.0.999}"), "status.podIPs: \"10.0.0.999\" is not an IP address"),
        (POD.replace("2024-05-01T10:00:00Z", "yesterday"), "Pod default/productpage: cannot be read"),
        ("apiVersion: v1\nkind: Service\nmetadata: {name: s}\nspec:\n  ports:\n  - port: 99999\n".into(), "(line 6): Service default/s: spec.ports[0].port: 99999 is not a port"),
        ("apiVersion: v1\nkind: Service\nmetadata: {name: s}\nspec: {ports: [{port: 80, targetPort: '80'}]}\n".into(), "spec.ports[0].targetPort: is neither a port"),
        ("apiVersion: v1\nkind: Service\nmetadata: {name: s}\nspec: {sessionAffinity: ClientIp}\n".into(), "spec.sessionAffinity: \"ClientIp\" is unknown; write None or ClientIP"),
        ("apiVersion: v1\nkind: ConfigMap\nmetadata: {name: istio, namespace: istio-system}\ndata: {mesh: 'trustDomin: x'}\n".into(), "ConfigMap istio-system/istio: data.mesh: trustDomin: unknown field; did you mean trustDomain?"),
    ] {
        let view = read(&text);
        let found = lines(&view);
        assert!(found.iter().any(|line| line.contains(expected)), "expected {expected}\n{found:#?}\n{text}");
        assert_eq!(found.len(), 1, "{found:#?}");
        let cluster = &view.cluster;
        assert_eq!(cluster.pods.len() + cluster.services.len() + cluster.namespaces.len(), 0, "{text}");
        assert!(found.iter().all(|line| line.starts_with("a.yaml document 1 (line ") && !line.contains('\n')), "{found:?}");
        assert_eq!(cluster.mesh, crate::model::MeshConfig::default());
    }
}

/// §1.4
#[test]
fn zero_values_inherit() {
    for spec in ["", "spec: {}\n", "spec:\n", "spec: {mtls: {}}\n", "spec: {mtls: }\n", "spec: {mtls: {mode: UNSET}}\n"]
    {
        let view = read(&peer_auth(spec));
        assert_eq!(lines(&view), [""; 0], "{spec}");
        let policy = policy(&view, "test", "strict").expect("accepted");
        assert_eq!((policy.mode, policy.selector.len(), policy.selector_written_empty), (MtlsMode::Unset, 0, false));
    }
    for spec in ["spec: {selector: {}}\n", "spec: {selector: {matchLabels: {}}}\n"] {
        let view = read(&peer_auth(spec));
        assert!(policy(&view, "test", "strict").expect("accepted").selector_written_empty, "[C.4] {spec}");
    }
}

/// [PA.8], §5: ports, ages, revisions.
#[test]
fn a_whole_policy_is_read() {
    let view = read(&peer_auth(
        "  creationTimestamp: '2024-05-01T10:00:00Z'\n  labels: {istio.io/rev: canary}\nspec:\n  selector: {matchLabels: {app: a}}\n  \
         mtls: {mode: STRICT}\n  portLevelMtls:\n    8080: {mode: DISABLE}\n    '8081': {}\n    8082:\n",
    ));
    assert_eq!(lines(&view), [""; 0]);
    let policy = policy(&view, "test", "strict").expect("accepted");
    assert_eq!(policy.age.created, 1_714_557_600);
    assert_eq!(policy.revision.as_deref(), Some("canary"));
    let ports = [(8080, MtlsMode::Disable), (8081, MtlsMode::Unset), (8082, MtlsMode::Unset)];
    assert_eq!(policy.port_modes, ports.into());
    assert_eq!(
        read(&peer_auth(STRICT)).cluster.peer_authentications.values().next().expect("one").age.created,
        i64::MIN
    );
}

/// §5.5, §19, [PA.14], [C.7], [C.8]: what of an invalid policy applies where there was no valid one before.
#[test]
fn only_the_restricting_part_of_an_invalid_policy_applies() {
    use MtlsMode::{Disable, Permissive, Strict, Unset};
    let select = "  selector: {matchLabels: {app: a}}\n";
    for (spec, words, expected) in [
        // The mode applies, the ports do not.
        (
            "  mtls: {mode: STRICT}\n  portLevelMtls: {8080: {mode: DISABLE}}\n",
            "needs a selector",
            Some((Strict, vec![])),
        ),
        (
            "  selector: {}\n  mtls: {mode: DISABLE}\n  portLevelMtls: {8080: {mode: STRICT}}\n",
            "needs a selector",
            Some((Disable, vec![])),
        ),
        (
            &format!("{select}  mtls: {{mode: PERMISSIVE}}\n  portLevelMtls: {{}}\n"),
            "is empty",
            Some((Permissive, vec![])),
        ),
        (
            &format!("{select}  mtls: {{mode: STRICT, portLevelMtls: {{8080: {{mode: DISABLE}}}}}}\n"),
            "belongs one level up, in spec",
            Some((Strict, vec![])),
        ),
        (
            &format!("{select}  mtls: {{portLevelMtls: {{8080: {{mode: DISABLE}}}}}}\n"),
            "belongs one level up",
            Some((Unset, vec![])),
        ),
        // A wrong entry opens nothing, and does not take the rest away.
        (
            &format!(
                "{select}  mtls: {{mode: STRICT}}\n  portLevelMtls: {{8080: {{mode: off}}, 8081: {{mode: DISABLE}}}}\n"
            ),
            "8080.mode",
            Some((Strict, vec![])),
        ),
        (
            &format!(
                "{select}  portLevelMtls: {{70000: {{mode: STRICT}}, 8081: {{mode: STRICT}}, 8082: {{mode: DISABLE}}}}\n"
            ),
            "70000: is not a port",
            Some((Unset, vec![(8081, Strict)])),
        ),
        (&format!("{select}  portLevelMtls: {{http: {{mode: STRICT}}}}\n"), "http: is not a port", None),
        (
            &format!("{select}  mtls: {{mode: PERMISSIVE}}\n  portLevelMtls: {{0: {{mode: STRICT}}}}\n"),
            "0: is not a port",
            None,
        ),
        // §19: an unknown mode is nothing; the parent scope applies.
        ("  mtls: {mode: DISABLED}\n", "not a value", None),
        (
            &format!("{select}  mtls: {{mode: strict}}\n  portLevelMtls: {{8080: {{mode: PERMISSIVE}}}}\n"),
            "not a value",
            None,
        ),
        // What selects is wrong: the object is unknown as a whole.
        ("  selectr: {matchLabels: {app: a}}\n  mtls: {mode: STRICT}\n", "did you mean selector?", None),
        ("  selector: {matchLabels: {app: 1}}\n  mtls: {mode: STRICT}\n", "put it in quotes", None),
    ] {
        let view = read(&peer_auth(&format!("spec:\n{spec}")));
        let found = lines(&view);
        assert!(found.len() == 1 && found[0].contains(words), "{spec}\n{found:?}");
        let got = policy(&view, "test", "strict").map(|p| (p.mode, p.port_modes.clone().into_iter().collect()));
        assert_eq!(got, expected, "{spec}");
    }
}

/// [C.6]: an invalid object keeps the valid one from before, for as long as it stays, and whatever it does say.
#[test]
fn an_invalid_object_keeps_the_previous_one() {
    let mut texts = Texts::new();
    let mode = |view: &View| policy(view, "test", "strict").map(|policy| policy.mode);
    texts.put("b.yaml", POD);
    assert_eq!(mode(&texts.put("a.yaml", &peer_auth(STRICT))), Some(MtlsMode::Strict));
    for wrong in [
        "spec: {mtls: {mode: DISABLED}}\n",
        "spec: {mtls: {mode: PERMISSIVE}, portLevelMtls: {8080: {}}}\n",
        "spec: {mtls: {mode: PERMISSIVE, portLevelMtls: {8080: {}}}}\n",
        "spec: {mtls: {mode: PERMISSIVE}, more: 1}\n",
    ] {
        let view = texts.put("a.yaml", &peer_auth(wrong));
        assert_eq!(mode(&view), Some(MtlsMode::Strict), "{wrong}");
        assert!(lines(&view)[0].ends_with("(the version from before stays in force)"), "{:?}", lines(&view));
        assert_eq!(texts.0.update([]), view, "remembered across readings");
    }
    let unserved = peer_auth("spec: {mtls: {mode: PERMISSIVE}}\n").replace("/v1", "/v1alpha1");
    assert_eq!(mode(&texts.put("a.yaml", &unserved)), Some(MtlsMode::Strict));
    assert_eq!(mode(&texts.put("a.yaml", &peer_auth("spec: {mtls: {mode: DISABLE}}\n"))), Some(MtlsMode::Disable));
    texts.put("a.yaml", &peer_auth("spec: {mtls: {mode: DISABLED}}\n"));
    assert_eq!(mode(&texts.put("a.yaml", "")), None, "gone from the file");
    assert_eq!(mode(&texts.put("a.yaml", &peer_auth("spec: {mtls: {mode: DISABLED}}\n"))), None, "and forgotten");
}

/// [C.6] after [C.7]: what was only the restricting part is not a valid object from before.
#[test]
fn a_restricting_part_is_replaced_by_the_next_one() {
    let mut texts = Texts::new();
    let spec = |mode: &str| peer_auth(&format!("spec: {{mtls: {{mode: {mode}}}, portLevelMtls: {{8080: {{}}}}}}\n"));
    assert_eq!(
        policy(&texts.put("a.yaml", &spec("DISABLE")), "test", "strict").map(|p| p.mode),
        Some(MtlsMode::Disable)
    );
    assert_eq!(policy(&texts.put("a.yaml", &spec("STRICT")), "test", "strict").map(|p| p.mode), Some(MtlsMode::Strict));
}

/// [C.11]: a YAML error keeps every object that the file gave before.
#[test]
fn a_broken_file_keeps_what_it_gave() {
    let mut texts = Texts::new();
    let both = format!("{}---\n{POD}", peer_auth(STRICT));
    let whole = texts.put("a.yaml", &both).cluster;
    for broken in [&both[..both.len() - 20], "a: [1\n", "a: b: c\n"] {
        let view = texts.put("a.yaml", broken);
        assert_eq!(view.cluster, whole, "{broken}");
        assert!(lines(&view)[0].contains("stays in force"), "{:?}", lines(&view));
    }
    let view = texts.0.update([("a.yaml".into(), Content::Unreadable("not UTF-8".into()))]);
    assert_eq!(
        (view.cluster, lines(&texts.0.update([]))),
        (whole, vec!["a.yaml: not UTF-8 (what this file gave before stays in force)".to_owned()])
    );
    assert_eq!(*texts.gone("a.yaml").cluster, crate::model::Cluster::default());
}

/// [D.2]: what a file says of which no version could be read is not known, which is not the same as nothing.
#[test]
fn what_was_never_read_is_named() {
    let mut texts = Texts::new();
    assert_eq!(texts.put("b.yaml", POD).unread, [""; 0]);
    let view = texts.put("a.yaml", "a: [1\n");
    assert_eq!(view.unread, ["a.yaml"]);
    assert!(lines(&view)[0].ends_with("(what it says is not known)"), "{:?}", lines(&view));
    let view = texts.0.update([("a.yaml".into(), Content::Unreadable("Permission denied".into()))]);
    assert_eq!(view.unread, ["a.yaml"]);
    assert_eq!(texts.put("a.yaml", &peer_auth(STRICT)).unread, [""; 0]);
    // From then on it is known what it said.
    assert_eq!(texts.put("a.yaml", "a: [1\n").unread, [""; 0]);
    assert_eq!(texts.put("c.yaml", "a: [1\n").unread, ["c.yaml"]);
    assert_eq!(texts.gone("c.yaml").unread, [""; 0]);
}

/// §19: a document that has lost its name may be any of the file's objects, so none of them goes.
#[test]
fn a_nameless_document_takes_nothing_away() {
    let mut texts = Texts::new();
    texts.put("a.yaml", &peer_auth(STRICT));
    let flat = "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata:\nname: strict\nnamespace: test\n";
    for text in [
        format!("{flat}{STRICT}"),
        peer_auth(STRICT).replace("security.", "securty."),
        peer_auth(STRICT).replace("  name: strict\n", "  name: other\n  name: strict\n"),
    ] {
        let view = texts.put("a.yaml", &text);
        assert_eq!(policy(&view, "test", "strict").map(|p| p.mode), Some(MtlsMode::Strict), "{text}");
        assert!(lines(&view)[0].contains("what this file gave before stays in force"), "{:?}", lines(&view));
    }
}

/// [C.11]: the same object twice is an error that names both places; the first stays.
#[test]
fn an_object_given_twice_is_an_error() {
    let mut texts = Texts::new();
    texts.put("b.yaml", &peer_auth(STRICT));
    let view = texts.put("a.yaml", &format!("--- # first\n---\n{}", peer_auth("spec: {mtls: {mode: DISABLE}}\n")));
    assert_eq!(policy(&view, "test", "strict").map(|p| p.mode), Some(MtlsMode::Disable));
    let expected = "b.yaml document 1 (line 1): PeerAuthentication test/strict: is also in a.yaml document 2 (line 3)";
    assert!(lines(&view).len() == 1 && lines(&view)[0].starts_with(expected), "{:?}", lines(&view));
    let view = texts.gone("a.yaml");
    assert_eq!(policy(&view, "test", "strict").map(|p| p.mode), Some(MtlsMode::Strict));
    assert_eq!(lines(&view), [""; 0]);
    // Another kind, or another namespace, is another object.
    let other = peer_auth(STRICT).replace("namespace: test", "namespace: other");
    assert_eq!(lines(&texts.put("c.yaml", &other)), [""; 0]);
    // Two pods, one UID: the second would take the first one's place.
    let view = texts.put("d.yaml", &format!("{POD}---\n{}", POD.replace("name: productpage", "name: thief")));
    assert!(lines(&view)[0].contains("metadata.uid: is also that of Pod default/productpage"), "{:?}", lines(&view));
    assert_eq!(&*view.cluster.pods[&PodUid("0d1f6a0e-0001".into())].object.name, "productpage");
}

/// An object that moves to another file while the old one is broken is not given twice.
#[test]
fn what_is_said_now_goes_before_what_was() {
    let mut texts = Texts::new();
    texts.put("a.yaml", &peer_auth(STRICT));
    texts.put("a.yaml", "a: [");
    let view = texts.put("b.yaml", &peer_auth("spec: {mtls: {mode: DISABLE}}\n"));
    assert_eq!(policy(&view, "test", "strict").map(|p| p.mode), Some(MtlsMode::Disable));
    assert_eq!(view.problems.len(), 1, "{:?}", lines(&view));
}

/// §1.1: only the ConfigMap of the system namespace is the mesh configuration.
#[test]
fn the_mesh_configuration_is_read() {
    let map = |namespace: &str, mesh: &str| {
        format!(
            "apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: istio, namespace: {namespace}}}\ndata:\n  mesh: |\n    {mesh}\n"
        )
    };
    let mut texts = Texts::new();
    let view = texts.put("a.yaml", &map("istio-system", "trustDomain: example.org\n    enableTracing: true"));
    assert_eq!(view.cluster.mesh.trust_domain.as_str(), "example.org");
    assert_eq!(view.notices, ["ConfigMap istio-system/istio: not read by this version: enableTracing"]);
    let view = texts.put("a.yaml", &map("istio-system", "trustDomain: [x]"));
    assert_eq!(view.cluster.mesh.trust_domain.as_str(), "example.org", "[C.6]");
    assert_eq!(view.problems.len(), 1);
    let view = texts.put("a.yaml", &map("elsewhere", "trustDomain: other.org"));
    assert_eq!(view.cluster.mesh, crate::model::MeshConfig::default());
}

/// A policy with everything in it, for the property tests.
const FULL: &str = "  creationTimestamp: '2024-05-01T10:00:00Z'
spec:
  selector:
    matchLabels: {app: a}
  mtls:
    mode: STRICT
  portLevelMtls:
    8080:
      mode: STRICT
";

proptest! {
    /// Outside bytes: whatever one changes in a file, there is an answer, each problem is one line, and an object whose
    /// manifest is not valid never becomes looser than it was.
    #[test]
    fn a_broken_edit_opens_nothing(
        edits in proptest::collection::vec((any::<prop::sample::Index>(), 0usize..4, "[ -~\n]{0,3}"), 1..4),
    ) {
        let mut texts = Texts::new();
        let mut text = peer_auth(FULL);
        let before = texts.put("a.yaml", &text).cluster;
        for (at, remove, insert) in edits {
            let start = at.index(text.len());
            let end = (start + remove).min(text.len());
            text.replace_range(start..end, &insert);
        }
        let view = texts.put("a.yaml", &text);
        for line in lines(&view) {
            prop_assert!(line.starts_with("a.yaml") && !line.contains('\n'), "{}", line);
        }
        if !view.problems.is_empty() {
            let strict = |policy: &PeerAuthentication| {
                policy.mode == MtlsMode::Strict && policy.port_modes.get(&8080) == Some(&MtlsMode::Strict)
            };
            let kept = policy(&view, "test", "strict").is_some_and(strict);
            // An edit of the name makes another object; then this one is gone from the file.
            let renamed = lines(&view).iter().all(|line| !line.contains("ication test/strict:") && line.contains(": PeerAuth"));
            prop_assert!(kept || renamed, "{}\n{:?}\n{:?}", text, view, before);
        }
    }
}

/// An AuthorizationPolicy `test/p` with this spec, in flow style.
fn authz(spec: &str) -> String {
    format!(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: p, namespace: test}}\nspec: {spec}\n"
    )
}

/// [C.6]: an object that is wrong now leaves the one from before in force; it has its place, and says that it is stale.
#[test]
fn a_wrong_authorization_policy_keeps_the_valid_one_from_before() {
    let name = ObjectRef::new("test", "p");
    let right = authz("{action: DENY, rules: [{from: [{source: {namespaces: [a]}}]}]}");
    for wrong in [
        "{action: DENY, rules: [{from: [{source: {namespaces: [\"\"]}}]}]}",
        "{action: DENY, rules: [{from: [{source: {namespace: [b]}}]}]}",
        "{action: REFUSE}",
        "{action: DENY}",
        "[}",
    ] {
        let mut folder = Texts::new();
        let before = folder.put("a.yaml", &right);
        assert_eq!(lines(&before), [""; 0]);
        let after = folder.put("a.yaml", &authz(wrong));
        assert_eq!(after.cluster.authorization_policies, before.cluster.authorization_policies, "{wrong}");
        assert!(lines(&after)[0].contains("stays in force"), "{wrong}: {:?}", lines(&after));
        assert!(after.authorization_policies[&name].stale, "{wrong}");
        // Mended, it is news.
        let mended = folder.put("a.yaml", &authz("{}"));
        assert_ne!(mended.cluster.authorization_policies, before.cluster.authorization_policies);
        assert!(!mended.authorization_policies[&name].stale);
        assert_eq!(folder.gone("a.yaml").cluster.authorization_policies.len(), 0);
    }
}

/// [C.7], [C.8]: without one from before, what can only restrict is in force: a rule that cannot be read is one that
/// cannot be evaluated.
#[test]
fn of_a_wrong_authorization_policy_the_restricting_part_is_in_force() {
    let view = read(&authz("{action: DENY, rules: [{}, {from: [{source: {namespace: [b], namespaces: [c]}}]}]}"));
    assert!(lines(&view)[0].contains("only the part that cannot open anything is in force"), "{:?}", lines(&view));
    let policy = view.cluster.authorization_policies.values().next().expect("it is there");
    let unreadable: Vec<&[String]> = policy.rules.iter().map(|rule| &*rule.unreadable).collect();
    assert_eq!(unreadable, [&[][..], &["from[0].source.namespace".to_owned()]]);
    // What is no rule at all is one of which nothing can be evaluated, and the others stay where they are.
    let view = read(&authz(
        "{action: DENY, rules: [{to: [{operation: {ports: ['80']}}]}, 5, null, {when: [{key: a, values: 5}]}]}",
    ));
    let policy = view.cluster.authorization_policies.values().next().expect("it is there");
    let unreadable: Vec<String> = policy.rules.iter().map(|rule| rule.unreadable.join(" ")).collect();
    assert_eq!(unreadable, ["", "the rule itself", "the rule itself", "when[0].values"]);
    assert_eq!(policy.rules.iter().map(|rule| rule.to.is_some()).collect::<Vec<_>>(), [true, false, false, false]);
    // A fault that says nothing about a rule leaves nothing that could be relied on.
    for wrong in ["{selector: {labels: {a: b}}, rules: [{}]}", "{rules: {}}"] {
        assert_eq!(read(&authz(wrong)).cluster.authorization_policies.len(), 0, "{wrong}");
    }
}

/// [AP.2], [C.8]: one that selects pods and names targets as well is not valid; the pods get what can only restrict them.
#[test]
fn a_policy_for_pods_and_for_targets_restricts_the_pods() {
    let targets = "targetRefs: [{group: gateway.networking.k8s.io, kind: Gateway, name: waypoint}]";
    let policy = |selector: &str| {
        let view = read(&authz(&format!("{{{selector} {targets}, action: DENY, rules: [{{}}]}}")));
        let policy = view.cluster.authorization_policies.values().next().expect("it is there").clone();
        (view.problems.len(), policy.has_targets, policy.rules[0].unreadable.len())
    };
    assert_eq!(policy("selector: {matchLabels: {app: a}},"), (1, false, 1));
    assert_eq!(policy(""), (0, true, 0), "for a waypoint alone");
    // [C.4]: it selects nothing in particular.
    assert_eq!(policy("selector: {},"), (1, true, 0));
}
