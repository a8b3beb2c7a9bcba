//! Who API servers trust to be the webhook: `caBundle` in its configuration follows the CA's roots.
//!
//! The rights that it takes: `get` and `update` of the one ValidatingWebhookConfiguration.

use std::{convert::Infallible, sync::Arc, time::Duration};

use k8s_openapi::{ByteString, api::admissionregistration::v1::ValidatingWebhookConfiguration};
use kube::{
    Api, Client,
    api::PostParams,
    core::{ApiResource, DynamicObject},
};
use serde_json::{Value as Json, json};
use tokio::sync::watch;
use tracing::{info, warn};

/// How often the configuration is looked at, while the roots stay.
const TICK: Duration = Duration::from_secs(30);
/// And after an error: at an installation the configuration may come later than the replicas.
const AGAIN: Duration = Duration::from_secs(5);
/// For the API server's answer.
const ANSWER: Duration = Duration::from_secs(10);
/// How often a write is tried at once while others write the configuration, too.
const TRIES: usize = 4;

/// Keeps `caBundle` of every webhook in the ValidatingWebhookConfiguration `name` equal to `roots`, PEM, for as long as
/// it is polled: at once, when the roots change, and twice a minute, since others may write it. While the roots are
/// empty they are not known, and nothing is written. What fails is tried again, and never ends it. Dropping it leaves
/// nothing half done.
pub(in crate::control) async fn keep_trusted(
    client: Client,
    name: &str,
    mut roots: watch::Receiver<Arc<str>>,
) -> Infallible {
    // As it is: a type would drop the fields of an API server that is younger than it.
    let api = Api::all_with(client, &ApiResource::erase::<ValidatingWebhookConfiguration>(&()));
    let mut said = None;
    loop {
        let wanted = roots.borrow_and_update().clone();
        let mut next = TICK;
        if !wanted.is_empty() {
            let put = tokio::time::timeout(ANSWER, put(&api, name, &wanted)).await;
            let put = put.unwrap_or_else(|_| Err(format!("no answer within {} s", ANSWER.as_secs())));
            if put.is_err() {
                next = AGAIN;
            }
            tell(name, put, &mut said);
        }
        tokio::select! {
            () = tokio::time::sleep(next) => {}
            // Without a sender they stay as they are.
            Ok(()) = roots.changed() => {}
        }
    }
}

/// `said` is the error that was told last; one line when it begins, when it changes and when it ends.
fn tell(name: &str, put: Result<bool, String>, said: &mut Option<String>) {
    match put {
        Ok(written) => {
            let was_told = said.take().is_some();
            if written || was_told {
                info!(configuration = name, written, "API servers trust the webhook's certificate");
            }
        }
        Err(error) if said.as_ref() == Some(&error) => {}
        Err(error) => {
            warn!(configuration = name, error, "policies may be stored without being judged: trying again");
            *said = Some(error);
        }
    }
}

/// Whether anything had to be written. The error is one line.
async fn put(api: &Api<DynamicObject>, name: &str, roots: &str) -> Result<bool, String> {
    let of = |error: kube::Error| match error {
        kube::Error::Api(status) => status.message.clone(),
        error => error.to_string(),
    };
    for _ in 0..TRIES {
        let Some(mut found) = api.get_opt(name).await.map_err(of)? else {
            return Err(format!(
                "there is no ValidatingWebhookConfiguration {name}: create deploy/control/webhook.yaml"
            ));
        };
        if !put_roots(&mut found.data, roots) {
            return Ok(false);
        }
        // With the resourceVersion that was read, so that nothing that others wrote meanwhile is lost.
        match api.replace(name, &PostParams::default(), &found).await {
            Ok(_) => return Ok(true),
            Err(kube::Error::Api(status)) if status.code == 409 => {}
            Err(error) => return Err(of(error)),
        }
    }
    Err("others write the configuration all the time".to_owned())
}

/// Whether that changed anything.
fn put_roots(configuration: &mut Json, roots: &str) -> bool {
    let bundle = json!(ByteString(roots.as_bytes().to_vec()));
    let webhooks = configuration.get_mut("webhooks").and_then(Json::as_array_mut).into_iter().flatten();
    let mut changed = false;
    for client in webhooks.filter_map(|webhook| webhook.get_mut("clientConfig")?.as_object_mut()) {
        changed |= client.insert("caBundle".to_owned(), bundle.clone()).as_ref() != Some(&bundle);
    }
    changed
}

#[cfg(test)]
mod tests {
    use std::sync::{Mutex, MutexGuard};

    use bytes::Bytes;
    use http::{Method, Request, Response};
    use http_body_util::{BodyExt as _, Full};
    use kube::client::Body;

    use super::*;

    const NAME: &str = "culvert-validator";
    const PATH: &str = "/apis/admissionregistration.k8s.io/v1/validatingwebhookconfigurations/culvert-validator";

    /// What an API server has, and does.
    #[derive(Default)]
    struct Server {
        configuration: Option<Json>,
        forbids: bool,
        hangs: bool,
        /// Writes of others that come between a read and the next write.
        others: usize,
        reads: usize,
        writes: usize,
    }

    #[derive(Clone, Default)]
    struct Shared(Arc<Mutex<Server>>);

    impl Shared {
        fn lock(&self) -> MutexGuard<'_, Server> {
            self.0.lock().expect("no test panicked")
        }

        /// Reads and writes so far.
        fn asked(&self) -> (usize, usize) {
            let server = self.lock();
            (server.reads, server.writes)
        }

        fn bundles(&self) -> Vec<Json> {
            let server = self.lock();
            let webhooks = server.configuration.as_ref().and_then(|found| found["webhooks"].as_array());
            webhooks.into_iter().flatten().map(|webhook| webhook["clientConfig"]["caBundle"].clone()).collect()
        }

        fn client(&self) -> Client {
            let server = self.clone();
            let service = tower::service_fn(move |request: Request<Body>| {
                let server = server.clone();
                async move {
                    if server.lock().hangs {
                        std::future::pending::<()>().await;
                    }
                    let (head, body) = request.into_parts();
                    let body = body.collect().await?.to_bytes();
                    assert_eq!(head.uri.path(), PATH);
                    let (code, answer) = server.lock().answer(&head.method, &body);
                    let response = Response::builder().status(code).body(Full::new(Bytes::from(answer.to_string())));
                    Ok::<_, Box<dyn std::error::Error + Send + Sync>>(response?)
                }
            });
            Client::new(service, "default")
        }
    }

    impl Server {
        fn answer(&mut self, method: &Method, body: &[u8]) -> (u16, Json) {
            let status = |code: u16, message: &str| {
                let status = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "a",
                                    "code": code, "message": message});
                (code, status)
            };
            if self.forbids {
                return status(403, "User \"a\" cannot get resource");
            }
            if *method == Method::GET {
                self.reads += 1;
                return self.configuration.clone().map_or_else(|| status(404, "not found"), |found| (200, found));
            }
            assert_eq!(method, Method::PUT);
            let Some(found) = &mut self.configuration else { return status(404, "not found") };
            let version = |json: &Json| json["metadata"]["resourceVersion"].as_str().map(str::to_owned);
            let next = |found: &mut Json, version: Option<String>| {
                let version: u64 = version.expect("a version").parse().expect("a number");
                found["metadata"]["resourceVersion"] = json!((version + 1).to_string());
            };
            if self.others > 0 {
                self.others -= 1;
                let now = version(found);
                next(found, now);
            }
            let mut sent: Json = serde_json::from_slice(body).expect("JSON");
            if version(&sent) != version(found) {
                return status(409, "the object has been modified");
            }
            let now = version(found);
            next(&mut sent, now);
            *found = sent.clone();
            self.writes += 1;
            (200, sent)
        }
    }

    fn configuration() -> Json {
        let webhook = |name: &str| {
            let service = json!({"namespace": "istio-system", "name": "culvert-control", "path": "/validate"});
            json!({"name": name, "clientConfig": {"service": service}, "fieldOfTheFuture": {"a": 1}})
        };
        json!({
            "apiVersion": "admissionregistration.k8s.io/v1", "kind": "ValidatingWebhookConfiguration",
            "metadata": {"name": NAME, "resourceVersion": "7", "labels": {"a": "b"}},
            "webhooks": [webhook("a"), webhook("b")], "fieldOfTheFuture": "a",
        })
    }

    fn bundle(roots: &str) -> Json {
        json!(ByteString(roots.as_bytes().to_vec()))
    }

    /// Polls it for some of the paused clock's time.
    async fn for_seconds(seconds: u64, keeping: &mut (impl Future<Output = Infallible> + Unpin)) {
        drop(tokio::time::timeout(Duration::from_secs(seconds), keeping).await);
    }

    #[tokio::test(start_paused = true)]
    async fn the_bundle_follows_the_roots_and_nothing_else_is_touched() {
        let server = Shared::default();
        server.lock().configuration = Some(configuration());
        let (sender, roots) = watch::channel(Arc::<str>::from(""));
        let mut keeping = Box::pin(keep_trusted(server.client(), NAME, roots));
        for_seconds(100, &mut keeping).await;
        assert_eq!((server.asked(), server.bundles()), ((0, 0), vec![Json::Null; 2]), "no roots are known");
        sender.send_replace("one".into());
        for_seconds(1, &mut keeping).await;
        assert_eq!(server.bundles(), vec![bundle("one"); 2]);
        for_seconds(100, &mut keeping).await;
        assert_eq!(server.asked(), (4, 1), "looked at, and not written again");
        sender.send_replace("two".into());
        for_seconds(1, &mut keeping).await;
        assert_eq!((server.bundles(), server.asked()), (vec![bundle("two"); 2], (5, 2)));
        // Somebody else empties one, and the sender goes.
        drop(sender);
        if let Some(found) = &mut server.lock().configuration {
            found["webhooks"][1]["clientConfig"]["caBundle"] = json!("");
        }
        for_seconds(31, &mut keeping).await;
        assert_eq!((server.bundles(), server.asked()), (vec![bundle("two"); 2], (6, 3)));
        let mut expected = configuration();
        expected["metadata"]["resourceVersion"] = json!("10");
        for webhook in expected["webhooks"].as_array_mut().into_iter().flatten() {
            webhook["clientConfig"]["caBundle"] = bundle("two");
        }
        assert_eq!(server.lock().configuration, Some(expected));
    }

    #[tokio::test(start_paused = true)]
    async fn what_others_write_meanwhile_is_kept_and_the_write_tried_again() {
        let server = Shared::default();
        server.lock().configuration = Some(configuration());
        server.lock().others = TRIES - 1;
        let (_sender, roots) = watch::channel(Arc::<str>::from("one"));
        let mut keeping = Box::pin(keep_trusted(server.client(), NAME, roots));
        for_seconds(1, &mut keeping).await;
        assert_eq!((server.bundles(), server.asked()), (vec![bundle("one"); 2], (TRIES, 1)));
    }

    #[tokio::test(start_paused = true)]
    async fn what_fails_is_tried_again() {
        let server = Shared::default();
        let (_sender, roots) = watch::channel(Arc::<str>::from("one"));
        let mut keeping = Box::pin(keep_trusted(server.client(), NAME, roots));
        for_seconds(40, &mut keeping).await;
        server.lock().configuration = Some(configuration());
        server.lock().forbids = true;
        for_seconds(40, &mut keeping).await;
        server.lock().forbids = false;
        server.lock().hangs = true;
        for_seconds(35, &mut keeping).await;
        assert_eq!(server.asked().1, 0);
        server.lock().hangs = false;
        for_seconds(41, &mut keeping).await;
        assert_eq!(server.bundles(), vec![bundle("one"); 2]);
    }

    #[test]
    fn an_error_is_said_when_it_begins_and_when_it_is_another() {
        let mut said = None;
        tell(NAME, Err("a".to_owned()), &mut said);
        tell(NAME, Err("a".to_owned()), &mut said);
        assert_eq!(said.as_deref(), Some("a"));
        tell(NAME, Err("b".to_owned()), &mut said);
        assert_eq!(said.as_deref(), Some("b"));
        tell(NAME, Ok(false), &mut said);
        assert_eq!(said, None);
    }
}
