//! The ledger by itself; then the service, asked by a client over loopback.

use proptest::prelude::*;
use tonic::{
    Code,
    client::Grpc as Client,
    codegen::http::uri::PathAndQuery,
    transport::{Channel, Endpoint},
};

use super::{
    testkit::{Replica, agent, agents},
    *,
};

const KIND: &str = "PeerAuthentication";

fn policy(name: &str) -> ObjectRef {
    ObjectRef::new("test", name)
}

/// The text for these generations, and its digest.
fn text(generations: &[(&str, i64)]) -> (String, Digest) {
    let mut text = String::new();
    for (name, generation) in generations {
        wire::line(&mut text, KIND, &policy(name), *generation);
    }
    let digest = wire::digest(&text);
    (text, digest)
}

/// A report with the objects.
fn tell(state: &mut State, name: &str, generations: &[(&str, i64)], now: Instant) -> Taken {
    let (text, digest) = text(generations);
    state.take(&agent(name), digest, Some(wire::parse(&text).expect("objects")), now)
}

fn count(ledger: &Ledger, name: &str, generation: i64) -> (usize, usize) {
    let count = ledger.count(KIND, &policy(name), generation);
    (count.in_force, count.agents)
}

#[test]
fn a_version_is_in_force_where_just_this_one_is() {
    let (mut state, now) = (State::default(), Instant::now());
    tell(&mut state, "a", &[("p", 1), ("q", 5)], now);
    tell(&mut state, "b", &[("p", 1)], now);
    tell(&mut state, "c", &[("p", 2)], now);
    tell(&mut state, "stranger", &[("p", 2)], now);
    let ledger = state.ledger(&agents(&["a", "b", "c", "silent"]), INTERVAL, now);
    assert_eq!(count(&ledger, "p", 1), (2, 4));
    assert_eq!(count(&ledger, "p", 2), (1, 4));
    assert_eq!(count(&ledger, "p", 3), (0, 4));
    assert_eq!(count(&ledger, "q", 5), (1, 4));
    assert_eq!(ledger.count("AuthorizationPolicy", &policy("p"), 1), Count { in_force: 0, agents: 4 });
    assert_eq!(ledger.count(KIND, &ObjectRef::new("other", "p"), 1), Count { in_force: 0, agents: 4 });
}

#[test]
fn an_agent_that_is_silent_for_three_intervals_does_not_count() {
    let (mut state, now) = (State::default(), Instant::now());
    let expected = agents(&["a", "b"]);
    tell(&mut state, "a", &[("p", 1)], now);
    tell(&mut state, "b", &[("p", 1)], now + INTERVAL);
    let late = now + INTERVAL * 3;
    assert_eq!(state.next(INTERVAL, now), late);
    assert_eq!(count(&state.ledger(&expected, INTERVAL, late - Duration::from_millis(1)), "p", 1), (2, 2));
    assert_eq!(count(&state.ledger(&expected, INTERVAL, late), "p", 1), (1, 2));
    assert_eq!(state.next(INTERVAL, late), late + INTERVAL);
    assert_eq!(count(&state.ledger(&expected, INTERVAL, late + INTERVAL), "p", 1), (0, 2));
    assert!(state.heard.is_empty() && state.sets.is_empty());
}

#[test]
fn a_pod_that_is_gone_does_not_count_and_is_forgotten() {
    let (mut state, now) = (State::default(), Instant::now());
    tell(&mut state, "a", &[("p", 1)], now);
    tell(&mut state, "b", &[("p", 2)], now);
    let ledger = state.ledger(&agents(&["a"]), INTERVAL, now);
    assert_eq!((count(&ledger, "p", 1), count(&ledger, "p", 2)), ((1, 1), (0, 1)));
    // It may be new, and those who watch the pods late.
    let ledger = state.ledger(&agents(&["a", "b"]), INTERVAL, now + INTERVAL / 2);
    assert_eq!(count(&ledger, "p", 2), (1, 2));
    state.ledger(&agents(&["a"]), INTERVAL, now + INTERVAL);
    assert_eq!((state.heard.len(), state.sets.len()), (1, 1));
}

#[test]
fn agents_with_the_same_in_force_share_a_set_until_none_has_it() {
    let (mut state, now) = (State::default(), Instant::now());
    let names: Vec<String> = (0..200).map(|number| format!("a{number}")).collect();
    let expected = Arc::new(names.iter().map(|name| agent(name)).collect());
    let (text, digest) = text(&[("p", 1)]);
    let first = state.take(&agent(&names[0]), digest, None, now);
    assert_eq!(first, Taken { wanted: true, news: true });
    let set = Some(wire::parse(&text).expect("objects"));
    assert_eq!(state.take(&agent(&names[0]), digest, set, now), Taken { wanted: false, news: true });
    for name in &names[1..] {
        assert_eq!(state.take(&agent(name), digest, None, now), Taken { wanted: false, news: true });
    }
    assert_eq!(state.take(&agent(&names[0]), digest, None, now), Taken { wanted: false, news: false }, "a repetition");
    let ledger = state.ledger(&expected, INTERVAL, now);
    assert_eq!((state.sets.len(), count(&ledger, "p", 1)), (1, (200, 200)));
    for (done, name) in names.iter().enumerate() {
        assert_eq!(state.sets.len(), 1 + usize::from(done > 0));
        tell(&mut state, name, &[("p", 2)], now);
        let ledger = state.ledger(&expected, INTERVAL, now);
        assert_eq!((count(&ledger, "p", 1).0, count(&ledger, "p", 2).0), (199 - done, done + 1));
    }
    assert_eq!(state.sets.len(), 1, "nobody has the old one");
}

#[test]
fn one_agent_at_a_time_is_asked_what_a_digest_stands_for() {
    let (mut state, now) = (State::default(), Instant::now());
    let (_, digest) = text(&[("p", 1)]);
    let mut wanted = |name, now| state.take(&agent(name), digest, None, now).wanted;
    assert!(wanted("a", now));
    assert!(!wanted("b", now));
    assert!(wanted("a", now), "it was asked, and comes without an answer");
    assert!(!wanted("b", now + ASKED - Duration::from_millis(1)));
    assert!(wanted("b", now + ASKED));
    assert!(!wanted("a", now + ASKED), "another one is asked now");
    let ledger = state.ledger(&agents(&["a", "b"]), INTERVAL, now + ASKED);
    assert_eq!(count(&ledger, "p", 1), (0, 2));
    tell(&mut state, "b", &[("p", 1)], now + ASKED);
    let ledger = state.ledger(&agents(&["a", "b"]), INTERVAL, now + ASKED);
    assert_eq!(count(&ledger, "p", 1), (2, 2));
    assert!(state.asked.is_empty());
}

#[test]
fn an_agent_may_report_ten_times_a_second_and_twice_at_once() {
    let (mut state, now) = (State::default(), Instant::now());
    let a = agent("a");
    let mut admitted = 0;
    while admitted < 100 && state.enter(&a, now) {
        state.leave(&a);
        admitted += 1;
    }
    assert_eq!(admitted, PER_SECOND);
    assert!(state.enter(&agent("b"), now), "another one has its own");
    assert!(!state.enter(&a, now + Duration::from_millis(50)));
    assert!(state.enter(&a, now + Duration::from_millis(101)));
    let later = now + Duration::from_secs(5);
    assert!(state.enter(&a, later));
    assert!(!state.enter(&a, later), "two are being read");
    state.leave(&a);
    assert!(state.enter(&a, later));
    state.ledger(&agents(&["a"]), INTERVAL, later + INTERVAL);
    assert_eq!(state.allowances.len(), 2, "while reports are being read");
    (0..2).for_each(|_| state.leave(&a));
    state.leave(&agent("b"));
    state.ledger(&agents(&["a"]), INTERVAL, later + INTERVAL);
    assert!(state.allowances.is_empty());
}

proptest! {
    /// Whatever is reported in whichever order, the counts are those that one gets by asking each agent.
    #[test]
    fn counts_are_what_the_agents_said_last(
        said in prop::collection::vec((0..5usize, prop::collection::btree_map(0..3usize, 0..3i64, 0..3), 0..20u64), 0..40)
    ) {
        let names = ["a", "b", "c", "d", "e"];
        let policies = ["p", "q", "r"];
        let expected = agents(&names[..4]);
        let (mut state, mut now) = (State::default(), Instant::now());
        let mut last = BTreeMap::new();
        for (who, what, seconds) in said {
            now += Duration::from_secs(seconds);
            let generations: Vec<_> = what.iter().map(|(policy, generation)| (policies[*policy], *generation)).collect();
            tell(&mut state, names[who], &generations, now);
            last.insert(who, (what, now));
            let ledger = state.ledger(&expected, INTERVAL, now);
            for (policy, generation) in (0..3).flat_map(|policy| (0..3).map(move |generation| (policy, generation))) {
                let has = last.iter().filter(|(who, (what, at))| {
                    **who < 4 && now - *at < INTERVAL * 3 && what.get(&policy) == Some(&generation)
                });
                prop_assert_eq!(count(&ledger, policies[policy], generation), (has.count(), 4));
            }
            prop_assert!(state.sets.len() <= state.heard.len());
        }
    }
}

async fn connect(replica: &Replica) -> Channel {
    let endpoint = Endpoint::from_shared(format!("http://{}", replica.address)).expect("an address");
    endpoint.connect().await.expect("connect")
}

async fn call(
    channel: &Channel,
    path: &'static str,
    name: &str,
    request: ReportRequest,
) -> Result<ReportResponse, Status> {
    let mut grpc = Client::new(channel.clone());
    grpc.ready().await.expect("ready");
    let mut request = Request::new(request);
    if !name.is_empty() {
        request.metadata_mut().insert("authorization", format!("Bearer token-of-{name}").parse().expect("a header"));
    }
    let codec = ProstCodec::<ReportRequest, ReportResponse>::default();
    grpc.unary(request, PathAndQuery::from_static(path), codec).await.map(Response::into_inner)
}

async fn report(channel: &Channel, name: &str, digest: &[u8], objects: &str) -> Result<ReportResponse, Status> {
    let request = ReportRequest { digest: digest.to_vec(), objects: objects.to_owned() };
    call(channel, wire::REPORT, name, request).await
}

#[tokio::test]
async fn what_a_digest_stands_for_is_wanted_once() {
    let mut replica = Replica::plain(Leadership::Leader, &["a", "b"]).await;
    let channel = connect(&replica).await;
    let (text, digest) = text(&[("p", 3)]);
    let answer = report(&channel, "a", &digest, "").await.expect("heard");
    assert_eq!(answer, ReportResponse { wanted: true, interval_seconds: 10 });
    assert!(!report(&channel, "a", &digest, &text).await.expect("heard").wanted);
    assert!(!report(&channel, "b", &digest, "").await.expect("heard").wanted);
    replica.until(|ledger| count(ledger, "p", 3) == (2, 2)).await;
    replica.agents.send_replace(agents(&["b"]));
    replica.until(|ledger| count(ledger, "p", 3) == (1, 1)).await;
}

#[tokio::test]
async fn nobody_reports_without_a_token_that_is_known() {
    let replica = Replica::plain(Leadership::Follower { leader: Some("here:1".to_owned()) }, &["a"]).await;
    let channel = connect(&replica).await;
    let (text, digest) = text(&[("p", 3)]);
    let refused = report(&channel, "", &digest, &text).await.expect_err("no token");
    assert_eq!((refused.code(), refused.metadata().get(wire::LEADER)), (Code::Unauthenticated, None));
    let mut request = Request::new(ReportRequest::default());
    request.metadata_mut().insert("authorization", "Bearer stolen".parse().expect("a header"));
    let mut grpc = Client::new(channel);
    grpc.ready().await.expect("ready");
    let codec = ProstCodec::<ReportRequest, ReportResponse>::default();
    let refused = grpc.unary(request, PathAndQuery::from_static(wire::REPORT), codec).await.expect_err("unknown");
    assert_eq!((refused.code(), refused.message()), (Code::Unauthenticated, "the token is not accepted"));
}

#[tokio::test]
async fn a_replica_that_does_not_lead_says_who_does() {
    let mut replica = Replica::plain(Leadership::Follower { leader: None }, &["a"]).await;
    let channel = connect(&replica).await;
    let (text, digest) = text(&[("p", 3)]);
    let refused = report(&channel, "a", &digest, &text).await.expect_err("it does not lead");
    assert_eq!((refused.code(), refused.metadata().get(wire::LEADER)), (Code::FailedPrecondition, None));
    replica.leadership.send_replace(Leadership::Follower { leader: Some("10.0.0.7:15012".to_owned()) });
    let refused = report(&channel, "a", &digest, &text).await.expect_err("it does not lead");
    assert_eq!(refused.metadata().get(wire::LEADER).expect("known now"), "10.0.0.7:15012");
    // It leads, and forgets when it does not any more.
    replica.leadership.send_replace(Leadership::Leader);
    assert!(!report(&channel, "a", &digest, &text).await.expect("it leads").wanted);
    replica.until(|ledger| count(ledger, "p", 3) == (1, 1)).await;
    replica.leadership.send_replace(Leadership::Follower { leader: None });
    replica.until(|ledger| count(ledger, "p", 3) == (0, 1)).await;
    replica.leadership.send_replace(Leadership::Leader);
    assert!(report(&channel, "a", &digest, "").await.expect("it leads").wanted, "a new leader knows nothing");
}

#[tokio::test]
async fn a_digest_of_something_else_is_refused() {
    let replica = Replica::plain(Leadership::Leader, &["a"]).await;
    let channel = connect(&replica).await;
    let ((text, _), (twice, of_twice)) = (text(&[("p", 3)]), text(&[("p", 3), ("p", 4)]));
    for (digest, objects, said) in [
        (&[1; 32][..], &*text, "not that of the objects"),
        (&[1; 31], "", "not SHA-256"),
        (&of_twice, &twice, "is there twice"),
    ] {
        let refused = report(&channel, "a", digest, objects).await.expect_err(said);
        assert_eq!(refused.code(), Code::InvalidArgument);
        assert!(refused.message().contains(said), "{refused}");
    }
    assert!(report(&channel, "a", &[1; 32], "").await.expect("heard").wanted, "nothing was believed");
}

#[tokio::test]
async fn what_is_too_much_is_refused() {
    let replica = Replica::plain(Leadership::Leader, &["a"]).await;
    let channel = connect(&replica).await;
    let huge = "x".repeat(wire::MAX_MESSAGE_BYTES);
    let refused = report(&channel, "a", &wire::digest(&huge), &huge).await.expect_err("too long");
    assert_eq!(refused.code(), Code::OutOfRange, "{refused}");
    let refused = call(&channel, "/culvert.control.v1.Reports/Other", "a", ReportRequest::default()).await;
    assert_eq!(refused.expect_err("no such method").code(), Code::Unimplemented);
    let mut answers = Vec::new();
    for _ in 0..30 {
        answers.push(report(&channel, "a", &[1; 32], "").await.map_err(|status| status.code()));
    }
    assert!(answers.contains(&Err(Code::ResourceExhausted)), "{answers:?}");
    assert!(report(&channel, "b", &[1; 32], "").await.is_ok(), "others have their own share");
}

/// Much news is a few ledgers.
#[tokio::test(start_paused = true)]
async fn the_ledger_is_published_five_times_a_second_at_most() {
    let (_leadership, leads) = watch::channel(Leadership::Leader);
    let (_agents, expected) = watch::channel(agents(&["a"]));
    struct Nobody;
    impl Identify for Nobody {
        fn identify<'a>(&'a self, _: &'a str) -> future::BoxFuture<'a, Result<Caller, Status>> {
            Box::pin(std::future::ready(Err(Status::unauthenticated("nobody"))))
        }
    }
    let (service, mut ledger, keeper) = reports(Arc::new(Nobody), leads, expected);
    let keeper = tokio::spawn(keeper.run());
    let shared = service.0;
    let begun = Instant::now();
    let mut published = 0;
    for generation in 0..1000 {
        tell(&mut shared.state(), "a", &[("p", generation)], Instant::now());
        shared.news.notify_one();
        tokio::time::sleep(Duration::from_millis(2)).await;
        published += usize::from(ledger.has_changed().expect("the keeper runs"));
        ledger.borrow_and_update();
    }
    let most = begun.elapsed().as_millis() / PUBLISH.as_millis() + 1;
    assert!((5..=most).contains(&(published as u128)), "{published} of {most}");
    ledger.wait_for(|ledger| count(ledger, "p", 999) == (1, 1)).await.expect("the last one too");
    // By time alone.
    ledger.wait_for(|ledger| count(ledger, "p", 999) == (0, 1)).await.expect("nobody repeats it");
    keeper.abort();
}
