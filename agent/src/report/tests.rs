//! An agent that reports, and replicas of the other side that come, lead and go.

use std::{fs, net::SocketAddr};

use tokio::{net::TcpListener, task::JoinHandle};

use super::*;
use crate::{
    control::{
        leader::Leadership,
        reports::testkit::{Lab, Replica, SERVER_NAME},
    },
    source::Place,
};

fn places(generations: &[(&str, Option<i64>)]) -> Arc<Places> {
    let place = |generation| Place { at: "anywhere".to_owned(), generation, stale: false };
    let of = |(name, generation): &(&str, Option<i64>)| (ObjectRef::new("test", name), place(*generation));
    Arc::new(generations.iter().map(of).collect())
}

fn view(generations: &[(&str, Option<i64>)]) -> View {
    View { policies: places(generations), ..View::default() }
}

#[test]
fn what_has_no_generation_is_not_reported() {
    let in_force = InForce {
        policies: places(&[("a", Some(2)), ("b", None)]),
        authorization_policies: places(&[("b", Some(1)), ("a", Some(7))]),
    };
    let text = "AuthorizationPolicy/test/a 7\nAuthorizationPolicy/test/b 1\nPeerAuthentication/test/a 2\n";
    assert_eq!(in_force.objects(), text);
}

#[test]
fn what_changes_nothing_in_force_is_not_published() {
    let (sender, mut receiver) = watch::channel(Arc::<InForce>::default());
    let mut publish = |view: &View| {
        InForce::publish(&sender, view);
        let changed = receiver.has_changed().expect("the sender lives");
        receiver.borrow_and_update();
        changed
    };
    let first = view(&[("a", Some(1)), ("b", None)]);
    assert!(publish(&first));
    assert!(!publish(&View { unread: vec!["x".to_owned()], ..first.clone() }), "the same policies");
    assert!(!publish(&view(&[("a", Some(1)), ("c", None)])), "no generation is another one");
    assert!(publish(&view(&[("a", Some(2))])));
    assert!(publish(&View { authorization_policies: places(&[("a", Some(2))]), ..View::default() }), "another kind");
    assert!(publish(&View::default()));
}

#[test]
fn pauses_double_to_their_limit_and_failures_are_said_once() {
    let (mut trouble, now) = (Trouble::default(), Instant::now());
    let error = anyhow::anyhow!("down");
    let within = |trouble: &mut Trouble, seconds: f64, after| {
        let pause = trouble.pause(&error, now + after).as_secs_f64();
        assert!((seconds * 0.8..=seconds * 1.2).contains(&pause), "{pause} is about {seconds}");
    };
    for seconds in [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0] {
        within(&mut trouble, seconds, Duration::ZERO);
    }
    assert!(trouble.open);
    trouble.over();
    assert!(!trouble.open);
    within(&mut trouble, 1.0, SAY_AGAIN - Duration::from_secs(1));
    assert!(!trouble.open, "it was said a moment ago, and so was its end");
    trouble.over();
    within(&mut trouble, 1.0, SAY_AGAIN);
    assert!(trouble.open);
}

/// An agent `a` that runs until it is dropped.
struct Agent {
    in_force: watch::Sender<Arc<InForce>>,
    ready: Ready,
    task: JoinHandle<()>,
}

impl Agent {
    fn start(lab: &Lab, address: SocketAddr) -> Self {
        fs::write(lab.dir.path().join("token"), "token-of-a\n").expect("write");
        let config = Config {
            address: address.to_string(),
            root_file: lab.dir.path().join("root.pem"),
            server_name: SERVER_NAME.to_owned(),
            token_file: lab.dir.path().join("token"),
        };
        let (in_force, told) = watch::channel(Arc::default());
        let ready = Ready::default();
        let task = tokio::spawn({
            let ready = ready.clone();
            async move { match run(config, ready, told).await {} }
        });
        Self { in_force, ready, task }
    }

    fn has(&self, generation: i64) {
        InForce::publish(&self.in_force, &view(&[("p", Some(generation))]));
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn here() -> SocketAddr {
    ([127, 0, 0, 1], 0).into()
}

async fn free() -> SocketAddr {
    let listener = TcpListener::bind(here()).await.expect("a free port");
    listener.local_addr().expect("bound")
}

async fn reported(replica: &mut Replica, generation: i64) {
    let policy = ObjectRef::new("test", "p");
    replica.until(|ledger| ledger.count("PeerAuthentication", &policy, generation).in_force == 1).await;
}

#[tokio::test]
async fn a_change_is_reported_at_once() {
    let lab = Lab::new();
    let mut replica = lab.replica_every(Duration::from_secs(60), here(), Leadership::Leader, &["a"]).await;
    let agent = Agent::start(&lab, replica.address);
    for generation in 1..4 {
        agent.has(generation);
        reported(&mut replica, generation).await;
    }
}

#[tokio::test]
async fn a_server_that_was_down_hears_what_is_in_force() {
    let lab = Lab::new();
    let address = free().await;
    let agent = Agent::start(&lab, address);
    agent.has(1);
    tokio::time::sleep(Duration::from_millis(200)).await;
    let mut replica = lab.replica(address, Leadership::Leader, &["a"]).await;
    reported(&mut replica, 1).await;
    agent.has(2);
    reported(&mut replica, 2).await;
    // It is another one now that knows nothing, as at the start of a new leader.
    replica.stop().await;
    let mut replica = lab.replica(address, Leadership::Leader, &["a"]).await;
    reported(&mut replica, 2).await;
}

#[tokio::test]
async fn reports_follow_the_leader_and_find_back_when_it_is_gone() {
    let lab = Lab::new();
    let mut second = lab.replica(here(), Leadership::Leader, &["a"]).await;
    let follows = Leadership::Follower { leader: Some(second.address.to_string()) };
    let mut first = lab.replica(here(), follows, &["a"]).await;
    let agent = Agent::start(&lab, first.address);
    agent.has(1);
    reported(&mut second, 1).await;
    // The second one is gone without a word, and the first one leads.
    first.leadership.send_replace(Leadership::Leader);
    second.stop().await;
    reported(&mut first, 1).await;
    // A leader that stops to be one says who is.
    let mut third = lab.replica(here(), Leadership::Leader, &["a"]).await;
    first.leadership.send_replace(Leadership::Follower { leader: Some(third.address.to_string()) });
    reported(&mut third, 1).await;
    agent.has(2);
    reported(&mut third, 2).await;
}

#[tokio::test]
async fn only_an_agent_that_is_ready_reports() {
    let lab = Lab::new();
    let mut replica = lab.replica(here(), Leadership::Leader, &["a"]).await;
    let agent = Agent::start(&lab, replica.address);
    let hold = agent.ready.hold("first pass");
    agent.has(1);
    tokio::time::sleep(Duration::from_secs(2)).await;
    let count = replica.ledger.borrow().count("PeerAuthentication", &ObjectRef::new("test", "p"), 1);
    assert_eq!(count.in_force, 0, "nothing was heard");
    drop(hold);
    reported(&mut replica, 1).await;
}

/// Whoever cannot prove its name gets no token.
#[tokio::test]
async fn a_server_of_other_roots_hears_nothing() {
    let (lab, other) = (Lab::new(), Lab::new());
    let replica = other.replica(here(), Leadership::Leader, &["a"]).await;
    let config = Config {
        address: replica.address.to_string(),
        root_file: lab.dir.path().join("root.pem"),
        server_name: SERVER_NAME.to_owned(),
        token_file: lab.dir.path().join("token"),
    };
    fs::write(lab.dir.path().join("token"), "token-of-a").expect("write");
    let mut reporter = Reporter::new(config);
    let in_force = InForce::default();
    let failed = reporter.report(&in_force, wire::digest(&in_force.objects())).await.expect_err("another root");
    assert!(format!("{failed:#}").starts_with("no connection to culvert control"), "{failed:#}");
}
