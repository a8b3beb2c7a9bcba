//! Who gets a certificate from a running CA, who does not, and what is in it.

use std::{fs, os::unix::fs::PermissionsExt, path::Path};

use jsonwebtoken::{Algorithm, EncodingKey, Header};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, IsCa, Issuer, KeyPair, PKCS_ECDSA_P256_SHA256,
    PKCS_ECDSA_P384_SHA384, PKCS_ED25519, PKCS_RSA_SHA256, SanType,
};
use serde_json::{Value, json};
use tokio::io::AsyncReadExt;
use tonic::Code;
use x509_parser::prelude::{FromDer, GeneralName, ParsedExtension, X509Certificate};

use super::{
    testkit::{Lab, Running, SERVER_NAME, call, claims, id, mint, object, pod},
    *,
};
use crate::{identity::certificates, model::Pod};

const WEB: &str = "spiffe://cluster.local/ns/default/sa/web";

/// A CSR for `name` over `key`.
fn csr(key: &KeyPair, names: &[&str]) -> String {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.subject_alt_names = names.iter().map(|name| SanType::URI((*name).try_into().expect("ASCII"))).collect();
    params.serialize_request(key).expect("a request").pem().expect("PEM")
}

fn p256() -> KeyPair {
    KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).expect("a key")
}

fn request(wanted: &str) -> CertificateRequest {
    CertificateRequest {
        csr: csr(&p256(), &[wanted]),
        validity_duration: 3600,
        metadata: Some(wire::impersonate(wanted)),
    }
}

/// A CA, and a token that it accepts for `node-a`.
struct Setup {
    lab: Lab,
    ca: Running,
    token: String,
}

impl Setup {
    async fn new() -> Self {
        Self::with(|_| {}).await
    }

    async fn with(edit: impl FnOnce(&mut Config)) -> Self {
        let lab = Lab::new();
        let mut config = lab.config();
        edit(&mut config);
        let ca = lab.start_ca(config).await;
        let token = lab.token(&claims("node-a"));
        Self { lab, ca, token }
    }

    async fn call(&self, token: Option<&str>, request: CertificateRequest) -> Result<CertificateResponse, Status> {
        call(self.ca.address, &self.lab.root(), token, request).await
    }

    fn change(&self, edit: impl FnOnce(&mut Cluster)) {
        let mut cluster = Cluster::clone(&self.lab.cluster.borrow());
        edit(&mut cluster);
        self.lab.cluster.send_replace(Arc::new(cluster));
    }

    fn put(&self, pod: Pod) {
        self.change(|cluster| drop(cluster.pods.insert(pod.uid.clone(), Arc::new(pod))));
    }
}

impl Lab {
    fn token(&self, claims: &Value) -> String {
        mint(claims, Algorithm::ES256, &self.token_key)
    }

    /// Who may ask.
    fn callers(&self) -> Callers {
        let config = self.config();
        let tokens = Tokens::new(&self.path("token-key.pem"), config.token_audience, config.token_issuer);
        Callers::new(Box::new(tokens.expect("a key")), config.trusted_node_accounts, self.cluster.subscribe())
            .expect("an account")
    }
}

/// Claims with one value changed; `path` as in RFC 6901. `null` removes it.
fn edited(path: &str, value: Value) -> Value {
    let mut claims = claims("node-a");
    if value.is_null() {
        let (parent, name) = path.rsplit_once('/').expect("a path");
        claims.pointer_mut(parent).and_then(Value::as_object_mut).and_then(|map| map.remove(name)).expect("was there");
    } else {
        *claims.pointer_mut(path).expect("was there") = value;
    }
    claims
}

/// What waits for nobody.
fn at_once<T>(question: impl Future<Output = T>) -> T {
    question.now_or_never().expect("keys are asked, and nobody else")
}

fn now() -> u64 {
    Clock::default().unix_seconds()
}

/// [I.4], [I.12]: which tokens are believed, and why the others are not.
#[test]
fn tokens_are_believed_only_if_everything_agrees() {
    let lab = Lab::new();
    let callers = lab.callers();
    let caller = |token: &str| at_once(callers.caller(token)).map(|(caller, _)| caller);
    let agent = object("istio-system/agent-node-a");
    let accepted = Caller { pod: agent.clone(), node: "node-a".into() };
    assert_eq!(caller(&lab.token(&claims("node-a"))), Ok(accepted.clone()));
    assert_eq!(caller(&lab.token(&edited("/aud", json!(["x", "istio-ca"])))), Ok(accepted.clone()));
    assert_eq!(caller(&lab.token(&edited("/aud", json!("istio-ca")))), Ok(accepted.clone()));
    assert_eq!(caller(&lab.token(&edited("/nbf", Value::Null))), Ok(accepted.clone()));
    assert_eq!(caller(&lab.token(&edited("/exp", json!(now() - 3)))), Ok(accepted), "small leeway");

    let cases = [
        (edited("/aud", json!(["https://kubernetes.default.svc"])), Denial::Audience),
        (edited("/iss", json!("https://evil.example")), Denial::Issuer),
        (edited("/exp", json!(now() - 60)), Denial::Expired),
        (edited("/nbf", json!(now() + 60)), Denial::NotYetValid),
        (edited("/kubernetes.io/pod", Value::Null), Denial::NotBound),
        (edited("/kubernetes.io/node", Value::Null), Denial::NotBound),
        (edited("/kubernetes.io/pod/uid", json!("")), Denial::NotBound),
        (edited("/kubernetes.io", Value::Null), Denial::NotBound),
        (edited("/kubernetes.io/pod/uid", json!("uid-of-an-earlier-pod")), Denial::NoSuchPod(agent.clone())),
        (edited("/kubernetes.io/pod/uid", json!("uid-of-istio-system/agent-node-b")), Denial::NoSuchPod(agent.clone())),
        (edited("/kubernetes.io/pod/name", json!("other")), Denial::NoSuchPod(object("istio-system/other"))),
        (
            edited("/kubernetes.io/node/name", json!("node-b")),
            Denial::WrongNode { claimed: "node-b".into(), actual: "node-a".into() },
        ),
        (
            edited("/sub", json!("system:serviceaccount:default:web")),
            Denial::MalformedToken("sub and kubernetes.io disagree".into()),
        ),
    ];
    for (claims, denial) in cases {
        assert_eq!(caller(&lab.token(&claims)), Err(denial), "{claims}");
    }
    for (required, path) in [("exp", "/exp"), ("aud", "/aud"), ("iss", "/iss")] {
        let denial = caller(&lab.token(&edited(path, Value::Null))).expect_err(required);
        assert!(matches!(&denial, Denial::MalformedToken(why) if why.contains(required)), "{denial}");
    }
    let mut workload = edited("/kubernetes.io/serviceaccount/name", json!("web"));
    workload["sub"] = json!("system:serviceaccount:istio-system:web");
    assert_eq!(caller(&lab.token(&workload)), Err(Denial::NotTrusted(object("istio-system/web"))));

    for (broken, node) in [(true, false), (false, true)] {
        let ended =
            Pod { finished: broken, terminating: node, ..pod("istio-system/agent-node-a", "culvert", "node-a") };
        lab.cluster.send_replace(Arc::new(testkit::cluster(vec![ended])));
        assert_eq!(caller(&lab.token(&claims("node-a"))), Err(Denial::PodNotRunning(agent.clone())));
    }
    let impostor = pod("istio-system/agent-node-a", "default", "node-a");
    lab.cluster.send_replace(Arc::new(testkit::cluster(vec![impostor])));
    assert_eq!(caller(&lab.token(&claims("node-a"))), Err(Denial::NoSuchPod(agent)));
}

/// [I.12]: no key, no trust; and a token does not choose how it is verified.
#[test]
fn forged_tokens_are_refused() {
    let lab = Lab::new();
    let callers = lab.callers();
    let caller = |token: &str| at_once(callers.caller(token)).expect_err("refused");
    let good = lab.token(&claims("node-a"));
    let parts: Vec<&str> = good.split('.').collect();
    // {"alg":"none","typ":"JWT"}, {"alg":"None"}
    for header in ["eyJhbGciOiJub25lIiwidHlwIjoiSldUIn0", "eyJhbGciOiJOb25lIn0"] {
        assert!(matches!(caller(&format!("{header}.{}.", parts[1])), Denial::Algorithm(_)));
        assert!(matches!(caller(&format!("{header}.{}.{}", parts[1], parts[2])), Denial::Algorithm(_)));
    }
    // The public key as a shared secret.
    let secret = EncodingKey::from_secret(lab.token_key.public_key_pem().as_bytes());
    let token = jsonwebtoken::encode(&Header::new(Algorithm::HS256), &claims("node-a"), &secret).expect("a token");
    assert_eq!(caller(&token), Denial::Algorithm("HS256".into()));
    assert_eq!(caller(&mint(&claims("node-a"), Algorithm::ES256, &p256())), Denial::UnknownKey);
    let rsa = KeyPair::generate_for(&PKCS_RSA_SHA256).expect("a key");
    assert_eq!(caller(&mint(&claims("node-a"), Algorithm::RS256, &rsa)), Denial::UnknownKey);
    let other = lab.token(&edited("/kubernetes.io/node/name", json!("node-b")));
    let mixed = format!("{}.{}.{}", parts[0], other.split('.').nth(1).expect("claims"), parts[2]);
    assert_eq!(caller(&mixed), Denial::UnknownKey);
    for text in ["", "x", "a.b.c", "..", &"x".repeat(20_000)] {
        assert!(matches!(caller(text), Denial::MalformedToken(_) | Denial::Algorithm(_)), "{text:.20}");
    }
}

/// API servers sign with RSA as a rule, and with two keys while they rotate.
#[test]
fn any_of_several_keys_may_have_signed() {
    let lab = Lab::new();
    let (rsa, ec) = (KeyPair::generate_for(&PKCS_RSA_SHA256).expect("a key"), p256());
    let pem = format!("{}{}{}", ec.public_key_pem(), rsa.public_key_pem(), lab.token_key.public_key_pem());
    fs::write(lab.path("token-key.pem"), pem).expect("write");
    let callers = lab.callers();
    for (algorithm, key) in [(Algorithm::RS256, &rsa), (Algorithm::ES256, &ec), (Algorithm::ES256, &lab.token_key)] {
        at_once(callers.caller(&mint(&claims("node-a"), algorithm, key))).expect("accepted");
    }
}

/// [I.12]: a mistake in the configuration ends the start with one line that says what to do.
#[tokio::test]
async fn ca_does_not_start_without_a_usable_token_key() {
    let lab = Lab::new();
    let start = async |config: Config| {
        let error = Server::bind(config, lab.cluster.subscribe()).await.expect_err("refused");
        format!("{error:#}")
    };
    let error = start(Config { token_key: None, ..lab.config() }).await;
    assert!(error.contains("--token-key") && error.contains("no unauthenticated mode"), "{error}");
    let key = |content: &str| {
        fs::write(lab.path("bad.pem"), content).expect("write");
        Config { token_key: Some(lab.path("bad.pem")), ..lab.config() }
    };
    for (content, words) in [
        (p256().serialize_pem(), "private key"),
        (String::new(), "no PEM block"),
        (KeyPair::generate_for(&PKCS_ED25519).expect("a key").public_key_pem(), "neither RSA nor P-256"),
        (KeyPair::generate_for(&PKCS_ECDSA_P384_SHA384).expect("a key").public_key_pem(), "neither RSA nor P-256"),
    ] {
        let error = start(key(&content)).await;
        assert!(error.contains(words) && error.contains("bad.pem"), "{error}");
    }
    let error = start(Config { token_key: Some(lab.path("absent.pem")), ..lab.config() }).await;
    assert!(error.contains("absent.pem"), "{error}");
    for (config, words) in [
        (Config { trusted_node_accounts: BTreeSet::new(), ..lab.config() }, "trusted node account"),
        (Config { server_names: Vec::new(), ..lab.config() }, "server name"),
        (Config { server_names: vec!["a b\u{e9}".into()], ..lab.config() }, "not a DNS name"),
        (Config { cert_ttl: Duration::ZERO, ..lab.config() }, "lifetime"),
        (Config { max_cert_ttl: Duration::from_secs(60), ..lab.config() }, "lifetime"),
        (Config { token_issuer: String::new(), ..lab.config() }, "issuer"),
    ] {
        let error = start(config).await;
        assert!(error.contains(words), "{error}");
    }
}

/// [I.4] over the wire: the status, and no more than the category of the reason.
#[tokio::test]
async fn refusals_tell_the_client_their_category_alone() {
    let setup = Setup::new().await;
    let web = || request(WEB);
    setup.call(Some(&setup.token), web()).await.expect("the good case is good");
    let expired = setup.lab.token(&edited("/exp", json!(now() - 60)));
    let other_pod = setup.lab.token(&edited("/kubernetes.io/pod/uid", json!("uid")));
    let anonymous = CertificateRequest { metadata: None, ..web() };
    let (token, caller) = ("the token is not accepted", "the caller is not accepted");
    let identity = "the identity is not the caller's to ask for";
    for (name, bearer, request, message) in [
        ("no token", None, web(), token),
        ("expired", Some(&expired), web(), token),
        ("other pod", Some(&other_pod), web(), caller),
        ("no identity", Some(&setup.token), anonymous, identity),
        ("not an identity", Some(&setup.token), request("default/web"), identity),
        ("pod of another node", Some(&setup.token), request("spiffe://cluster.local/ns/test/sa/far"), identity),
        ("no pod", Some(&setup.token), request("spiffe://cluster.local/ns/test/sa/web"), identity),
        ("other trust domain", Some(&setup.token), request("spiffe://evil/ns/default/sa/web"), identity),
        (
            "the agent itself",
            Some(&setup.token),
            request("spiffe://cluster.local/ns/istio-system/sa/culvert"),
            identity,
        ),
    ] {
        let status = setup.call(bearer.map(String::as_str), request).await.expect_err(name);
        assert_eq!((status.code(), status.message()), (Code::Unauthenticated, message), "{name}");
    }
    // A token of the other node gets that node's identities and no others.
    let far = setup.lab.token(&claims("node-b"));
    setup.call(Some(&far), request("spiffe://cluster.local/ns/test/sa/far")).await.expect("its own pod");
    assert_eq!(setup.call(Some(&far), web()).await.expect_err("node-a's").code(), Code::Unauthenticated);
    setup.ca.stop().await;
}

/// [I.4]: which pods count for an identity.
#[tokio::test]
async fn identity_needs_a_pod_that_has_not_finished_on_the_node() {
    let setup = Setup::new().await;
    let new = || request("spiffe://cluster.local/ns/test/sa/new");
    let base = pod("test/new", "new", "node-a");
    for (name, change, allowed) in [
        ("running", base.clone(), true),
        ("terminating", Pod { terminating: true, ..base.clone() }, true),
        ("finished", Pod { finished: true, ..base.clone() }, false),
        ("host network", Pod { host_network: true, ..base.clone() }, false),
        ("not scheduled", Pod { node: "".into(), ..base.clone() }, false),
        ("other account", Pod { service_account: "default".into(), ..base.clone() }, false),
    ] {
        setup.put(change);
        assert_eq!(setup.call(Some(&setup.token), new()).await.is_ok(), allowed, "{name}");
    }
    setup.change(|cluster| *cluster = Cluster::default());
    let status = setup.call(Some(&setup.token), request(WEB)).await.expect_err("no snapshot, no pods");
    assert_eq!(status.code(), Code::Unauthenticated);
    setup.ca.stop().await;
}

/// A CSR is somebody else's text.
#[tokio::test]
async fn signing_requests_must_be_for_the_wanted_identity_by_their_own_key() {
    let setup = Setup::new().await;
    let key = p256();
    let with = |csr: String| CertificateRequest { csr, ..request(WEB) };
    let good = csr(&key, &[WEB]);
    let flipped = {
        let der = certificate_request_der(&good);
        let mut forged = der.clone();
        // The last byte belongs to the signature.
        *forged.last_mut().expect("not empty") ^= 1;
        pem("CERTIFICATE REQUEST", &forged)
    };
    let stolen = {
        // The name changed after signing: same length, so that the DER stays well-formed.
        let mut forged = certificate_request_der(&csr(&key, &["spiffe://cluster.local/ns/default/sa/wex"]));
        let at = forged.windows(3).position(|w| w == b"wex").expect("the name");
        forged[at + 2] = b'b';
        pem("CERTIFICATE REQUEST", &forged)
    };
    let mut dns = CertificateParams::new(vec!["evil.example".to_owned()]).expect("a name");
    dns.subject_alt_names.push(SanType::URI(WEB.try_into().expect("ASCII")));
    let dns = dns.serialize_request(&key).and_then(|csr| csr.pem()).expect("a request");
    for (name, csr, words) in [
        ("other identity", csr(&key, &["spiffe://cluster.local/ns/test/sa/client"]), "one SAN"),
        ("two identities", csr(&key, &[WEB, "spiffe://cluster.local/ns/test/sa/client"]), "one SAN"),
        ("no identity", csr(&key, &[]), "one SAN"),
        ("a DNS name too", dns, "one SAN"),
        ("forged signature", flipped, "not signed by its own key"),
        ("changed after signing", stolen, "not signed by its own key"),
        ("RSA", csr_with(&PKCS_RSA_SHA256), "P-256"),
        ("Ed25519", csr_with(&PKCS_ED25519), "P-256"),
        ("two requests", format!("{good}{good}"), "one PEM"),
        ("a certificate", setup.lab.root(), "one PEM"),
        ("nothing", String::new(), "one PEM"),
        ("not DER", pem("CERTIFICATE REQUEST", b"nothing"), "one PEM"),
    ] {
        let status = setup.call(Some(&setup.token), with(csr)).await.expect_err(name);
        assert_eq!(status.code(), Code::InvalidArgument, "{name}: {status}");
        assert!(status.message().contains(words), "{name}: {status}");
    }
    for good in [good, csr_with(&PKCS_ECDSA_P384_SHA384)] {
        setup.call(Some(&setup.token), with(good)).await.expect("accepted");
    }
    setup.ca.stop().await;
}

fn csr_with(algorithm: &'static rcgen::SignatureAlgorithm) -> String {
    csr(&KeyPair::generate_for(algorithm).expect("a key"), &[WEB])
}

fn certificate_request_der(text: &str) -> Vec<u8> {
    x509_parser::pem::Pem::iter_from_buffer(text.as_bytes()).next().expect("a block").expect("PEM").contents
}

fn pem(label: &str, der: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::new();
    for chunk in der.chunks(3) {
        let word = chunk.iter().fold(0u32, |word, byte| word << 8 | u32::from(*byte)) << (8 * (3 - chunk.len()));
        for i in 0..4 {
            let symbol = if i <= chunk.len() { ALPHABET[(word >> (18 - 6 * i) & 63) as usize] } else { b'=' };
            text.push(char::from(symbol));
        }
    }
    let lines: Vec<_> = text.as_bytes().chunks(64).map(|line| String::from_utf8_lossy(line).into_owned()).collect();
    format!("-----BEGIN {label}-----\n{}\n-----END {label}-----\n", lines.join("\n"))
}

/// [I.6], field by field; and what the CSR asks for beyond its key and name is ignored.
#[tokio::test]
async fn leaf_is_as_specified() {
    let setup = Setup::new().await;
    let key = p256();
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, "root");
    params.subject_alt_names = vec![SanType::URI(WEB.try_into().expect("ASCII"))];
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![rcgen::KeyUsagePurpose::KeyCertSign];
    let greedy = params.serialize_request(&key).and_then(|csr| csr.pem()).expect("a request");
    let mut serials = BTreeSet::new();
    for csr in [csr(&key, &[WEB]), greedy] {
        let before = now();
        let answer = setup.call(Some(&setup.token), CertificateRequest { csr, ..request(WEB) }).await.expect("signed");
        let [leaf, roots] = &answer.cert_chain[..] else { panic!("leaf and roots: {:?}", answer.cert_chain) };
        assert_eq!(*roots, setup.lab.root());
        let leaf = certificates(leaf.as_bytes()).expect("PEM");
        let (_, leaf) = X509Certificate::from_der(&leaf[0]).expect("DER");
        assert_eq!(leaf.version().0, 2, "v3");
        assert_eq!(leaf.subject().iter().count(), 0, "empty subject");
        assert_eq!(leaf.public_key().subject_public_key.data, key.public_key_raw());
        let (from, to) = (leaf.validity().not_before.timestamp(), leaf.validity().not_after.timestamp());
        let before = i64::try_from(before).expect("small");
        assert!((before - 120..=before - 118).contains(&from), "backdated by 2 minutes");
        assert!((before + 3599..=before + 3601).contains(&to), "the hour that was asked for");
        let names = leaf.subject_alternative_name().expect("once").expect("a SAN");
        assert!(names.critical);
        assert_eq!(names.value.general_names, [GeneralName::URI(WEB)]);
        let usage = leaf.key_usage().expect("once").expect("key usage");
        assert!(usage.critical);
        // Bits 0 and 2.
        assert_eq!(usage.value.flags, 0b101);
        let extended = leaf.extended_key_usage().expect("once").expect("extended key usage").value;
        assert!(extended.server_auth && extended.client_auth && !extended.any && extended.other.is_empty());
        assert!(
            !(extended.code_signing || extended.email_protection || extended.time_stamping || extended.ocsp_signing)
        );
        assert!(!leaf.is_ca());
        assert!(
            leaf.extensions()
                .iter()
                .any(|e| matches!(e.parsed_extension(), ParsedExtension::AuthorityKeyIdentifier(_)))
        );
        assert!(leaf.raw_serial().len() >= 16 && leaf.raw_serial()[0] & 0x80 == 0);
        assert!(serials.insert(leaf.raw_serial().to_vec()), "the same key, another serial number");
    }
    setup.ca.stop().await;
}

/// [I.6]: how long a certificate lives.
#[tokio::test]
async fn lifetime_is_the_default_the_wish_or_the_maximum() {
    let day = 24 * 3600;
    let setup = Setup::with(|config| config.max_cert_ttl = Duration::from_secs(2 * day)).await;
    for (asked, given) in [(0, day), (-5, day), (60, 60), (i64::MAX, 2 * day)] {
        let request = CertificateRequest { validity_duration: asked, ..request(WEB) };
        let answer = setup.call(Some(&setup.token), request).await.expect("signed");
        let left = lifetime(&answer.cert_chain[0]);
        assert!((given - 3..=given).contains(&left), "{asked}: {left}");
    }
    setup.ca.stop().await;
}

/// Seconds from now to NotAfter.
fn lifetime(pem: &str) -> u64 {
    let der = certificates(pem.as_bytes()).expect("PEM");
    let (_, cert) = X509Certificate::from_der(&der[0]).expect("DER");
    u64::try_from(cert.validity().not_after.timestamp()).expect("after 1970").saturating_sub(now())
}

/// A large message is refused before it is decoded, and the server goes on.
#[tokio::test]
async fn large_requests_are_refused() {
    let setup = Setup::new().await;
    let large = CertificateRequest { csr: "x".repeat(wire::MAX_MESSAGE_BYTES + 1), ..request(WEB) };
    let status = setup.call(Some(&setup.token), large).await.expect_err("too large");
    assert_eq!(status.code(), Code::OutOfRange, "{status}");
    setup.call(Some(&setup.token), request(WEB)).await.expect("goes on");
    setup.ca.stop().await;
}

/// Connections that say nothing hold up neither others nor the end.
#[tokio::test]
async fn silent_connections_are_dropped_and_do_not_delay_the_end() {
    let setup = Setup::new().await;
    let mut silent = TcpStream::connect(setup.ca.address).await.expect("connect");
    setup.call(Some(&setup.token), request(WEB)).await.expect("answered beside a silent connection");
    let start = tokio::time::Instant::now();
    let mut byte = [0];
    assert_eq!(timeout(HANDSHAKE_TIMEOUT * 2, silent.read(&mut byte)).await.expect("dropped").unwrap_or(0), 0);
    assert!(start.elapsed() + Duration::from_secs(1) > HANDSHAKE_TIMEOUT);
    let start = tokio::time::Instant::now();
    setup.ca.stop().await;
    assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
}

/// The server's certificate has all configured names and is renewed at half of its life.
#[tokio::test]
async fn server_certificate_is_renewed_while_running() {
    let lab = Lab::new();
    let ahead = Arc::new(std::sync::atomic::AtomicU64::new(0));
    let clock = {
        let ahead = ahead.clone();
        Clock::new(move || {
            std::time::SystemTime::now() + Duration::from_secs(ahead.load(std::sync::atomic::Ordering::Relaxed))
        })
    };
    let ca = lab.start_ca_at(lab.config(), clock.clone()).await;
    let leaf = async || {
        let mut roots = rustls::RootCertStore::empty();
        for root in certificates(lab.root().as_bytes()).expect("PEM") {
            roots.add(root).expect("a root");
        }
        let mut config = rustls::ClientConfig::builder_with_details(provider(), Arc::new(clock.clone()))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .expect("TLS 1.3")
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.alpn_protocols = vec![b"h2".to_vec()];
        let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
        let mut found = Vec::new();
        for name in [SERVER_NAME, "127.0.0.1"] {
            let tcp = TcpStream::connect(ca.address).await.expect("connect");
            let name = rustls::pki_types::ServerName::try_from(name).expect("a name");
            let tls = connector.connect(name, tcp).await.expect("verified");
            found.push(tls.get_ref().1.peer_certificates().expect("sent")[0].to_vec());
        }
        assert_eq!(found[0], found[1]);
        found.remove(0)
    };
    let first = leaf().await;
    ahead.store(11 * 3600, std::sync::atomic::Ordering::Relaxed);
    assert_eq!(leaf().await, first);
    ahead.store(13 * 3600, std::sync::atomic::Ordering::Relaxed);
    let second = leaf().await;
    assert_ne!(second, first);
    ahead.store(30 * 3600, std::sync::atomic::Ordering::Relaxed);
    assert_ne!(leaf().await, second, "valid long after the first has expired");
    ca.stop().await;
}

fn files(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(dir)
        .expect("a folder")
        .map(|entry| entry.expect("an entry").file_name().into_string().expect("UTF-8"))
        .collect();
    names.sort();
    names
}

const LAYOUT: [&str; 4] = ["ca-cert.pem", "ca-key.pem", "cert-chain.pem", "root-cert.pem"];

/// A root is made once: two starts at once and every later one agree on it.
#[test]
fn new_root_is_made_once_with_a_private_key_file() {
    let dir = tempfile::tempdir().expect("a folder");
    let ca = dir.path().join("new/ca");
    let open = || Authority::open(&ca, now()).expect("opens").roots_pem().to_owned();
    let roots: BTreeSet<String> =
        std::thread::scope(|scope| [(); 4].map(|()| scope.spawn(open)).map(|t| t.join().expect("no panic")).into());
    assert_eq!(roots.len(), 1);
    assert_eq!(open(), *roots.first().expect("one"));
    assert_eq!(files(&ca), LAYOUT);
    let mode = fs::metadata(ca.join("ca-key.pem")).expect("a file").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let years = lifetime(roots.first().expect("one")) / (365 * 24 * 3600);
    assert!((9..=10).contains(&years), "10 years");
}

/// A start that was killed half-way is finished or undone by the next.
#[test]
fn crash_while_making_a_root_is_repaired() {
    let dir = tempfile::tempdir().expect("a folder");
    let ca = dir.path();
    let root = Authority::open(ca, now()).expect("made").roots_pem().to_owned();
    // Killed between two renames: some files are in place, some are staged.
    for moved in 1..=LAYOUT.len() {
        for name in ["ca-cert.pem", "root-cert.pem", "cert-chain.pem", "ca-key.pem"].iter().take(moved) {
            fs::rename(ca.join(name), ca.join(format!(".new.{name}"))).expect("stage");
        }
        assert_eq!(Authority::open(ca, now()).expect("finished").roots_pem(), root);
        assert_eq!(files(ca), LAYOUT);
    }
    // Killed while staging: ca-cert.pem, the last, is missing.
    for name in LAYOUT {
        fs::remove_file(ca.join(name)).expect("remove");
    }
    fs::write(ca.join(".new.ca-key.pem"), "half").expect("write");
    assert_ne!(Authority::open(ca, now()).expect("made anew").roots_pem(), root);
    assert_eq!(files(ca), LAYOUT);
}

/// One line for each way in which a set can be wrong.
#[test]
fn unusable_sets_are_refused_with_the_file_and_the_remedy() {
    let (dir, other) = (tempfile::tempdir().expect("a folder"), tempfile::tempdir().expect("a folder"));
    let (ca, other) = (dir.path(), other.path());
    Authority::open(ca, now()).expect("made");
    Authority::open(other, now()).expect("made");
    let check = |words: &[&str], change: &dyn Fn()| {
        let saved = LAYOUT.map(|name| fs::read(ca.join(name)).expect("there"));
        change();
        let error = format!("{:#}", Authority::open(ca, now()).err().unwrap_or_else(|| panic!("{words:?}")));
        assert!(words.iter().all(|word| error.contains(word)), "{error:?} does not say {words:?}");
        for (name, content) in LAYOUT.iter().zip(saved) {
            fs::write(ca.join(name), content).expect("restore");
        }
        Authority::open(ca, now()).expect("restored");
    };
    let remove = |name: &str| fs::remove_file(ca.join(name)).expect("remove");
    let copy = |name: &str| assert!(fs::copy(other.join(name), ca.join(name)).expect("copy") > 0);
    check(&["has no ca-key.pem", "add it, or empty the folder"], &|| remove("ca-key.pem"));
    check(&["has no ca-cert.pem", "add it"], &|| remove("ca-cert.pem"));
    check(&["ca-key.pem is not the key of", "ca-cert.pem"], &|| copy("ca-key.pem"));
    check(&["does not begin with the certificate of"], &|| copy("cert-chain.pem"));
    check(&["does not lead to a root", "root-cert.pem"], &|| copy("root-cert.pem"));
    check(&["no usable private key in", "ca-key.pem"], &|| fs::write(ca.join("ca-key.pem"), "x").expect("write"));
    check(&["ca-cert.pem", "no PEM block CERTIFICATE"], &|| fs::write(ca.join("ca-cert.pem"), "x").expect("write"));
    let eleven_years = now() + 11 * 365 * 24 * 3600;
    let error = format!("{:#}", Authority::open(ca, eleven_years).expect_err("expired"));
    assert!(error.contains("has expired; replace the set"), "{error}");
    let error = format!("{:#}", Authority::open(ca, now() - 3600).expect_err("too early"));
    assert!(error.contains("not valid yet"), "{error}");
}

/// [I.6]: with an intermediate, the chain is sent with the leaf, and no leaf outlives it.
#[test]
fn intermediate_signs_and_leaves_end_with_it() {
    let dir = tempfile::tempdir().expect("a folder");
    let ca = |name: &str, ttl: u64| {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.not_before = time::OffsetDateTime::now_utc() - Duration::from_secs(60);
        params.not_after = time::OffsetDateTime::now_utc() + Duration::from_secs(ttl);
        params
    };
    let (root_key, key) = (p256(), p256());
    let root = ca("root", 365 * 24 * 3600);
    let root_pem = root.self_signed(&root_key).expect("signed").pem();
    let issuer = Issuer::new(root, root_key);
    let intermediate = ca("intermediate", 3600).signed_by(&key, &issuer).expect("signed").pem();
    for (name, text) in [
        ("ca-cert.pem", intermediate.clone()),
        ("ca-key.pem", key.serialize_pem()),
        ("root-cert.pem", root_pem.clone()),
        // Istio's own chains end with the root or do not.
        ("cert-chain.pem", format!("{intermediate}{root_pem}")),
    ] {
        fs::write(dir.path().join(name), text).expect("write");
    }
    let authority = Authority::open(dir.path(), now()).expect("opens");
    let spki = {
        use rcgen::PublicKeyData;
        p256().subject_public_key_info()
    };
    let signed = authority.sign(&id("default/web"), &spki, Duration::from_secs(24 * 3600), now()).expect("signed");
    let [leaf, sent, roots] = &signed.cert_chain[..] else { panic!("{:?}", signed.cert_chain) };
    assert_eq!(certificates(sent.as_bytes()).expect("PEM"), certificates(intermediate.as_bytes()).expect("PEM"));
    assert_eq!(*roots, root_pem);
    assert!(lifetime(leaf) <= 3600);
    let late =
        authority.sign(&id("default/web"), &spki, Duration::from_secs(60), now() + 3601).err().expect("too late");
    assert!(late.to_string().contains("has expired"), "{late}");

    fs::remove_file(dir.path().join("root-cert.pem")).expect("remove");
    let error = format!("{:#}", Authority::open(dir.path(), now()).expect_err("no root"));
    assert!(error.contains("has no root-cert.pem") && error.contains("add the root"), "{error}");
}
