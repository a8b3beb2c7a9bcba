use std::{fs, path::Path};

use proptest::prelude::*;
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{PrivateKeyDer, ServerName},
};
use serde_json::json;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    sync::oneshot,
};
use tokio_rustls::TlsConnector;

use super::*;
use crate::{
    identity::provider,
    policy::Options,
    source::{istio_kinds, yaml},
    validate,
};

const NAME: &str = "culvert-control.istio-system.svc";

fn judged(object: Json) -> Judged {
    validate::object(object, "istio-system", &Options::default())
}

/// A server that listens, and who trusts it.
struct Lab {
    address: SocketAddr,
    connector: TlsConnector,
}

impl Lab {
    /// Runs a server with this judge for as long as `test` takes, and ends it in order.
    async fn with(judge: impl Fn(Json) -> Judged + Send + Sync + 'static, test: impl AsyncFnOnce(&Lab)) {
        let made = rcgen::generate_simple_self_signed([NAME.to_owned()]).expect("a certificate");
        let certificate = made.cert.der().clone();
        let key = PrivateKeyDer::try_from(made.signing_key.serialize_der()).expect("a key");
        let server = ServerConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .expect("TLS")
            .with_no_client_auth()
            .with_single_cert(vec![certificate.clone()], key)
            .expect("a certificate");
        let mut roots = RootCertStore::empty();
        roots.add(certificate).expect("a root");
        let client = ClientConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .expect("TLS")
            .with_root_certificates(roots)
            .with_no_client_auth();
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let lab =
            Lab { address: listener.local_addr().expect("bound"), connector: TlsConnector::from(Arc::new(client)) };
        let (stop, stopped) = oneshot::channel::<()>();
        let served = serve(listener, Arc::new(server), Arc::new(judge), async { drop(stopped.await) });
        let (served, ()) = tokio::join!(served, async {
            test(&lab).await;
            drop(stop);
        });
        served.expect("served");
    }

    /// Status and body of the answer to what is sent as it is.
    async fn send(&self, request: &[u8]) -> (u16, String) {
        let tcp = TcpStream::connect(self.address).await.expect("connect");
        let name = ServerName::try_from(NAME).expect("a name");
        let mut tls = self.connector.connect(name, tcp).await.expect("TLS");
        tls.write_all(request).await.expect("sent");
        tls.flush().await.expect("sent");
        let mut answer = Vec::new();
        // Who closes without a word of TLS has answered nevertheless.
        let _ = tls.read_to_end(&mut answer).await;
        let answer = String::from_utf8(answer).expect("text");
        let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
        let status = head.split(' ').nth(1).unwrap_or_default().parse().unwrap_or_else(|_| panic!("{head}"));
        (status, body.to_owned())
    }

    async fn post(&self, path: &str, body: &[u8]) -> (u16, String) {
        let head = format!("POST {path} HTTP/1.1\r\nHost: {NAME}\r\nContent-Length: {}\r\n\r\n", body.len());
        self.send(&[head.as_bytes(), body].concat()).await
    }

    /// The response to a review.
    async fn review(&self, request: Json) -> Json {
        let uid = request["uid"].clone();
        let (status, body) = self.post("/validate?timeout=5s", review(request).to_string().as_bytes()).await;
        assert_eq!(status, 200, "{body}");
        let answer: Json = serde_json::from_str(&body).expect("JSON");
        assert_eq!(
            (&answer["apiVersion"], &answer["kind"]),
            (&json!("admission.k8s.io/v1"), &json!("AdmissionReview"))
        );
        assert_eq!(answer["response"]["uid"], uid, "echoed");
        answer["response"].clone()
    }
}

fn review(request: Json) -> Json {
    json!({"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "request": request})
}

fn object(kind: &str, spec: Json) -> Json {
    let metadata = json!({"namespace": "shop", "name": "x", "uid": "a", "generation": 1, "resourceVersion": "3",
        "creationTimestamp": "2026-01-02T03:04:05Z", "managedFields": [{"manager": "kubectl", "operation": "Apply",
        "fieldsType": "FieldsV1", "fieldsV1": {"f:spec": {}}, "time": "2026-01-02T03:04:05Z"}]});
    json!({"apiVersion": "security.istio.io/v1", "kind": kind, "metadata": metadata, "spec": spec})
}

fn authorization(operation: Json) -> Json {
    object("AuthorizationPolicy", json!({"rules": [{"to": [{"operation": operation}]}]}))
}

fn right() -> Json {
    authorization(json!({"ports": ["80"]}))
}

fn create(object: Json) -> Json {
    json!({"uid": "705ab4f5", "operation": "CREATE", "userInfo": {"username": "admin"}, "object": object,
        "oldObject": null, "dryRun": false})
}

fn update(old: Json, object: Json) -> Json {
    json!({"uid": "705ab4f6", "operation": "UPDATE", "object": object, "oldObject": old})
}

#[tokio::test]
async fn a_wrong_object_is_refused_with_the_place_and_the_remedy() {
    Lab::with(judged, async |lab| {
        let right = lab.review(create(right())).await;
        assert_eq!(right, json!({"uid": "705ab4f5", "allowed": true, "warnings": []}));
        let wrong = authorization(json!({"ports": ["http"], "portz": ["80"]}));
        let mut dry = create(wrong.clone());
        dry["dryRun"] = json!(true);
        for asked in [create(wrong.clone()), dry] {
            let answer = lab.review(asked).await;
            assert_eq!(answer["allowed"], false);
            assert_eq!((&answer["status"]["code"], &answer["status"]["reason"]), (&json!(422), &json!("Invalid")));
            let message = answer["status"]["message"].as_str().expect("a message");
            let lines: Vec<&str> = message.lines().collect();
            assert_eq!(lines.len(), 2, "{message}");
            assert!(lines[0].starts_with("AuthorizationPolicy shop/x: spec.rules[0].to[0].operation."), "{message}");
            assert!(message.contains("spec.rules[0].to[0].operation.ports[0]: "), "{message}");
            assert!(message.contains("did you mean ports?"), "{message}");
        }
        let seven = lab.review(create(authorization(json!({"methods": ["GET"]})))).await;
        assert_eq!(seven["allowed"], true);
        let warning = seven["warnings"][0].as_str().expect("a warning");
        assert!(warning.starts_with("AuthorizationPolicy shop/x") && warning.contains("[AP.13]"), "{warning}");
    })
    .await;
}

/// Else nobody could remove the finalizer of an object from before the webhook; but nobody makes one wrong or more so.
#[tokio::test]
async fn an_invalid_object_can_change_its_metadata_only() {
    Lab::with(judged, async |lab| {
        let wrong = |mode: &str| object("PeerAuthentication", json!({"mtls": {"mode": mode}}));
        let mut freed = wrong("STRIKT");
        freed["metadata"]["labels"] = json!({"a": "b"});
        let answer = lab.review(update(wrong("STRIKT"), freed)).await;
        assert_eq!(answer["allowed"], true, "{answer}");
        let warning = answer["warnings"][0].as_str().expect("a warning");
        assert!(warning.starts_with("PeerAuthentication shop/x: spec.mtls.mode: "), "{warning}");
        for (old, new, allowed) in [
            (wrong("STRIKT"), wrong("STRICT"), true),
            (wrong("STRICT"), wrong("STRIKT"), false),
            (wrong("STRIKT"), wrong("STRIKTER"), false),
        ] {
            assert_eq!(lab.review(update(old, new.clone())).await["allowed"], allowed, "{new}");
        }
        // Valid before: what makes it invalid is in the metadata, and can be left away.
        let entry = |labels: Json| {
            let spec = json!({"hosts": ["a.example"], "addresses": ["10.0.0.1"], "resolution": "DNS",
                "ports": [{"number": 80, "name": "http", "protocol": "HTTP"}]});
            json!({"apiVersion": "networking.istio.io/v1", "kind": "ServiceEntry", "spec": spec,
                "metadata": {"namespace": "shop", "name": "x", "labels": labels}})
        };
        assert_eq!(lab.review(update(entry(json!({})), entry(json!({"a": 1})))).await["allowed"], false);
    })
    .await;
}

#[tokio::test]
async fn what_is_not_for_us_is_allowed_unseen() {
    Lab::with(
        |object| panic!("{object} was judged"),
        async |lab| {
            let wrong = || authorization(json!({"ports": ["http"]}));
            let delete = json!({"uid": "a", "operation": "DELETE", "object": null, "oldObject": wrong()});
            let mut status = update(wrong(), wrong());
            status["subResource"] = json!("status");
            let mut young = create(wrong());
            young["object"]["apiVersion"] = json!("security.istio.io/v9");
            let mut filter = create(wrong());
            filter["object"]["kind"] = json!("EnvoyFilter");
            for asked in [delete, status, young, filter] {
                let answer = lab.review(asked.clone()).await;
                assert_eq!((&answer["allowed"], &answer["warnings"]), (&json!(true), &json!([])), "{asked}");
            }
        },
    )
    .await;
}

#[tokio::test]
async fn what_is_no_review_is_an_error() {
    Lab::with(judged, async |lab| {
        let text = |json: Json| json.to_string().into_bytes();
        let mut older = review(create(right()));
        older["apiVersion"] = json!("admission.k8s.io/v1beta1");
        for body in [
            b"".to_vec(),
            b"{".to_vec(),
            b"\xff\0".to_vec(),
            text(json!([])),
            text(json!({"apiVersion": "v1", "kind": "Pod"})),
            text(older),
            text(review(json!({"uid": 1}))),
            [vec![b'['; 100_000], vec![b']'; 100_000]].concat(),
        ] {
            let (status, answer) = lab.post("/validate", &body).await;
            assert_eq!(status, 400, "{answer}");
            assert!(answer.starts_with("not an AdmissionReview of admission.k8s.io/v1: "), "{answer}");
            assert!(answer.len() < 1024, "{answer}");
        }
        assert_eq!(lab.post("/", b"{}").await.0, 404);
        assert_eq!(lab.send(b"GET /validate HTTP/1.1\r\nHost: a\r\n\r\n").await.0, 405);
        // Another one is answered as ever.
        assert_eq!(lab.review(create(right())).await["allowed"], true);
    })
    .await;
}

#[tokio::test]
async fn what_is_too_large_is_not_read() {
    Lab::with(judged, async |lab| {
        let head = format!("POST /validate HTTP/1.1\r\nHost: a\r\nContent-Length: {}\r\n\r\n", BODY_BYTES + 1);
        assert_eq!(lab.send(head.as_bytes()).await.0, 413, "at once");
        let head = format!("POST /validate HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n{:x}\r\n", 4 << 20);
        assert_eq!(lab.send(&[head.as_bytes(), &vec![b' '; BODY_BYTES + 1]].concat()).await.0, 413);
        let many = authorization(json!({"ports": vec!["80"; review::MAX_VALUES]}));
        assert_eq!(lab.post("/validate", review(create(many)).to_string().as_bytes()).await.0, 413);
        // The largest that is read, whatever is wrong with it.
        let most = authorization(json!({"ports": vec!["http"; review::MAX_VALUES - 100]}));
        let answer = lab.review(create(most)).await;
        let message = answer["status"]["message"].as_str().expect("a message");
        assert!(message.len() < 20_000 && message.contains("\nand 49"), "{} bytes", message.len());
    })
    .await;
}

#[tokio::test]
async fn a_defect_is_an_error_and_ends_nothing_else() {
    let judge = |object: Json| match object["metadata"]["name"].as_str() {
        Some("panics") => panic!("a defect of a test"),
        _ => judged(object),
    };
    Lab::with(judge, async |lab| {
        let mut asked = create(right());
        asked["object"]["metadata"]["name"] = json!("panics");
        assert_eq!(lab.post("/validate", review(asked).to_string().as_bytes()).await.0, 500);
        assert_eq!(lab.review(create(right())).await["allowed"], true);
    })
    .await;
}

#[tokio::test]
async fn who_speaks_no_tls_is_not_answered() {
    Lab::with(judged, async |lab| {
        let mut plain = TcpStream::connect(lab.address).await.expect("connect");
        plain.write_all(b"POST /validate HTTP/1.1\r\nHost: a\r\n\r\n").await.expect("sent");
        let mut answer = Vec::new();
        let _ = plain.read_to_end(&mut answer).await;
        assert!(!answer.starts_with(b"HTTP"), "{answer:?}");
        assert_eq!(lab.review(create(right())).await["allowed"], true);
    })
    .await;
}

/// API servers drop all warnings beyond a bound, and one that has control characters.
#[test]
fn warnings_are_as_api_servers_take_them() {
    let judge = |_: Json| Judged {
        faults: Vec::new(),
        warnings: [vec!["a\nb\u{1b}".to_owned()], vec!["ä".repeat(1000); 100]].concat(),
    };
    let body = review(create(right())).to_string();
    let answer = review::answer(body.as_bytes(), &judge).expect("answered");
    let answer: Json = serde_json::from_str(&answer.json).expect("JSON");
    let warnings: Vec<&str> =
        answer["response"]["warnings"].as_array().into_iter().flatten().filter_map(Json::as_str).collect();
    assert_eq!(warnings[0], "AuthorizationPolicy shop/x: a\\nb\\u{1b}");
    assert!(warnings.len() == 16, "{}", warnings.len());
    assert!(warnings[1..].iter().all(|warning| warning.chars().count() == 256 && warning.ends_with("ä…")));
    assert!(warnings.iter().map(|warning| warning.chars().count()).sum::<usize>() <= 4096);
}

/// Any JSON, of the words that decoding looks for.
fn any_json() -> impl Strategy<Value = Json> {
    let word = prop::sample::select(vec![
        "apiVersion",
        "kind",
        "metadata",
        "name",
        "namespace",
        "spec",
        "status",
        "rules",
        "to",
        "from",
        "operation",
        "ports",
        "source",
        "ipBlocks",
        "mtls",
        "mode",
        "STRICT",
        "80",
        "selector",
        "matchLabels",
        "shop",
        "security.istio.io/v1",
        "PeerAuthentication",
        "AuthorizationPolicy",
        "10.0.0.0/33",
        "ä\u{0}\u{202e}",
        "",
    ]);
    let leaf = prop_oneof![
        Just(Json::Null),
        any::<bool>().prop_map(Json::from),
        any::<i64>().prop_map(Json::from),
        any::<f64>().prop_map(Json::from),
        word.clone().prop_map(Json::from),
    ];
    leaf.prop_recursive(6, 48, 5, move |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Json::from),
            prop::collection::vec((word.clone(), inner), 0..6).prop_map(|entries| {
                Json::Object(entries.into_iter().map(|(name, value)| (name.to_owned(), value)).collect())
            }),
        ]
    })
}

/// An answer is one for this review, and says why if it is no.
fn check(answer: &Answer, uid: &str) {
    let json: Json = serde_json::from_str(&answer.json).expect("JSON");
    let response = &json["response"];
    assert_eq!(response["uid"], uid);
    assert_eq!(response["allowed"], answer.refused.is_none());
    assert_eq!(response["status"]["message"].is_string(), answer.refused.is_some());
}

proptest! {
    #[test]
    fn whatever_the_objects_are_they_have_an_answer(object in any_json(), old in any_json(), spec in any_json()) {
        let written = |spec: &Json, kind: usize| {
            let kind = istio_kinds().nth(kind % istio_kinds().count()).expect("a kind");
            let metadata = json!({"name": "x", "namespace": "shop"});
            json!({"apiVersion": format!("{}/v1", kind.group), "kind": kind.name, "metadata": metadata, "spec": spec})
        };
        let kind = object.to_string().len();
        let (new, same) = (written(&spec, kind), written(&old, kind));
        for (old, object) in [(&old, &object), (&old, &new), (&same, &new)] {
            let asked = review(update(old.clone(), object.clone())).to_string();
            check(&review::answer(asked.as_bytes(), &judged).expect("an answer"), "705ab4f6");
        }
        // As the whole body: an answer or an error.
        drop(review::answer(object.to_string().as_bytes(), &judged));
    }
}

/// A body from the network never panics the server; what is answered is an answer to it.
#[test]
fn fuzzed_reviews_are_answered() {
    crate::fuzz::run("admission", |bytes| {
        // What is not read may be no text.
        let asked = serde_json::from_slice::<Json>(bytes);
        if let (Ok(answer), Ok(asked)) = (review::answer(bytes, &judged), asked) {
            check(&answer, asked["request"]["uid"].as_str().expect("a uid"));
        }
    });
}

/// Names of `deploy/crds/` are those of the definitions, resource and group.
#[test]
fn the_configuration_asks_for_every_kind_that_is_defined() {
    let deploy = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy");
    let text = fs::read_to_string(deploy.join("control/webhook.yaml")).expect("the configuration");
    let configuration = yaml::json(&text).remove(0);
    let texts = |json: &Json| -> Vec<String> {
        json.as_array().into_iter().flatten().map(|text| text.as_str().expect("text").to_owned()).collect()
    };
    let webhook = &configuration["webhooks"][0];
    let mut asked = Vec::new();
    for rule in webhook["rules"].as_array().expect("rules") {
        let group = texts(&rule["apiGroups"]).remove(0);
        let mut served: Vec<_> = istio_kinds().filter(|kind| kind.group == group).map(|kind| kind.versions).collect();
        served.dedup();
        assert_eq!(served, [texts(&rule["apiVersions"])], "every version that agents read");
        assert_eq!(texts(&rule["operations"]), ["CREATE", "UPDATE"]);
        asked.extend(texts(&rule["resources"]).into_iter().map(|resource| format!("{resource}.{group}.yaml")));
    }
    let files = fs::read_dir(deploy.join("crds")).expect("definitions");
    let mut defined: Vec<String> =
        files.map(|file| file.expect("listed").file_name().into_string().expect("text")).collect();
    asked.sort();
    defined.sort();
    assert_eq!(asked, defined);
    assert_eq!(webhook["clientConfig"]["service"]["path"], PATH);
    let (failure, effects) = (&webhook["failurePolicy"], &webhook["sideEffects"]);
    assert_eq!((failure, effects, &webhook["timeoutSeconds"]), (&json!("Ignore"), &json!("None"), &json!(5)));
    assert_eq!(texts(&webhook["admissionReviewVersions"]), ["v1"]);
}
