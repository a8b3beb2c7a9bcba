//! Whether a token is genuine, by the API server's own word: a TokenReview ([I.4]).
//!
//! The API server goes on accepting a token for up to twelve seconds after its pod is gone, since it remembers its answers. Nothing
//! follows from that here: whether the pod lives is asked of the pods that we watch, which know it within moments.

use std::time::Duration;

use futures_util::future::BoxFuture;
use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec, TokenReviewStatus, UserInfo};
use kube::{Api, Client, api::PostParams};
use tokio::{sync::Semaphore, time::timeout};

use crate::{
    ca::caller::{Bound, Denial, Vouch},
    model::{ObjectRef, PodUid},
    source::kubernetes::describe,
};

/// Reviews at a time: whoever reaches the port can cause one with any text that looks like a token.
const REVIEWS: usize = 32;
/// For a turn and an answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// Asks the API server.
pub(super) struct Reviews {
    api: Api<TokenReview>,
    audience: String,
    room: Semaphore,
}

impl Reviews {
    /// `audience` is the one that a token must be for.
    pub(super) fn new(client: Client, audience: String) -> Self {
        Self { api: Api::all(client), audience, room: Semaphore::new(REVIEWS) }
    }

    async fn review(&self, token: &str) -> Result<Bound, Denial> {
        if !looks_like_a_token(token) {
            return Err(Denial::MalformedToken("not three parts of base64url".to_owned()));
        }
        // The semaphore is never closed.
        let _room = self.room.acquire().await.map_err(|error| Denial::Unavailable(error.to_string()))?;
        let spec = TokenReviewSpec { token: token.to_owned(), audiences: Some(vec![self.audience.clone()]) };
        let review = TokenReview { spec, ..TokenReview::default() };
        let answer = self.api.create(&PostParams::default(), &review).await;
        let answer = answer.map_err(|error| Denial::Unavailable(describe(&error)))?;
        understand(answer.status.unwrap_or_default(), &self.audience)
    }
}

impl Vouch for Reviews {
    fn vouch<'a>(&'a self, token: &'a str) -> BoxFuture<'a, Result<Bound, Denial>> {
        Box::pin(async {
            let late = |_| Denial::Unavailable(format!("no answer within {} s", PATIENCE.as_secs()));
            timeout(PATIENCE, self.review(token)).await.map_err(late)?
        })
    }
}

/// A signed token has three parts (RFC 7515 §7.1); anything else need not be asked about.
fn looks_like_a_token(token: &str) -> bool {
    let part =
        |part: &str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte));
    token.split('.').count() == 3 && token.split('.').all(part)
}

fn understand(status: TokenReviewStatus, audience: &str) -> Result<Bound, Denial> {
    if !status.authenticated.unwrap_or_default() {
        let why = status.error.filter(|why| !why.is_empty());
        // It says nothing of a token for another audience.
        return Err(Denial::Rejected(why.unwrap_or_else(|| "it is not genuine, or for another audience".to_owned())));
    }
    // A server that does not know audiences answers without one (authentication/v1, TokenReviewStatus).
    if !status.audiences.unwrap_or_default().iter().any(|found| found == audience) {
        return Err(Denial::Audience);
    }
    let user = status.user.unwrap_or_default();
    let account = user.username.as_deref().and_then(|name| name.strip_prefix("system:serviceaccount:"));
    let Some((namespace, name)) = account.and_then(|account| account.split_once(':')) else {
        return Err(Denial::MalformedToken("not a service account's".to_owned()));
    };
    Ok(Bound {
        account: ObjectRef::new(namespace, name),
        pod: (extra(&user, "pod-name"), PodUid(extra(&user, "pod-uid").into())),
        node: extra(&user, "node-name"),
    })
}

/// What a bound token is bound to; empty where it is not (`authentication.kubernetes.io/…`, each a list of one).
fn extra(user: &UserInfo, name: &str) -> String {
    let values = user.extra.as_ref().and_then(|extra| extra.get(&format!("authentication.kubernetes.io/{name}")));
    match values.map(Vec::as_slice) {
        Some([value]) => value.clone(),
        _ => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn status() -> Value {
        json!({
            "authenticated": true,
            "audiences": ["istio-ca"],
            "user": {
                "username": "system:serviceaccount:istio-system:culvert",
                "extra": {
                    "authentication.kubernetes.io/pod-name": ["agent-a"],
                    "authentication.kubernetes.io/pod-uid": ["1-2-3"],
                    "authentication.kubernetes.io/node-name": ["node-a"],
                },
            },
        })
    }

    fn of(status: Value) -> Result<Bound, Denial> {
        understand(serde_json::from_value(status).expect("a status"), "istio-ca")
    }

    /// [I.4]
    #[test]
    fn an_answer_is_believed_only_for_our_audience_and_a_service_account() {
        let bound = of(status()).expect("genuine");
        let uid = PodUid("1-2-3".into());
        let expected = Bound {
            account: ObjectRef::new("istio-system", "culvert"),
            pod: ("agent-a".into(), uid),
            node: "node-a".into(),
        };
        assert_eq!(bound, expected);
        let changed = |pointer: &str, value: Value| {
            let mut status = status();
            *status.pointer_mut(pointer).expect("it is there") = value;
            of(status)
        };
        assert_eq!(changed("/audiences", json!([])), Err(Denial::Audience));
        assert_eq!(changed("/audiences", json!(["https://kubernetes.default.svc"])), Err(Denial::Audience));
        assert!(matches!(changed("/authenticated", json!(false)), Err(Denial::Rejected(_))));
        assert!(matches!(changed("/user/username", json!("admin")), Err(Denial::MalformedToken(_))));
        assert!(matches!(of(json!({})), Err(Denial::Rejected(_))));
        assert_eq!(
            of(json!({"authenticated": false, "error": "token has expired"})),
            Err(Denial::Rejected("token has expired".to_owned()))
        );
        // Of a token that is bound to nothing nothing is known.
        let unbound = changed("/user/extra", json!({})).expect("genuine");
        assert_eq!((unbound.pod.0, unbound.node), (String::new(), String::new()));
    }

    #[test]
    fn what_is_no_token_is_not_asked_about() {
        assert!(looks_like_a_token("eyJh.eyJp_-.c2ln"));
        for text in ["", "a", "a.b", "a..c", "a.b.c.d", "a.b.c d", "a.b.c\n", "a.b.ü"] {
            assert!(!looks_like_a_token(text), "{text:?}");
        }
    }
}
