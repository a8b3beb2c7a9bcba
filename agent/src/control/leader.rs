//! Which of the replicas leads: the one that holds the Lease, and everybody by the Lease's own words.
//!
//! As client-go does it: whoever holds the Lease renews it every two seconds and gives up when ten have passed without
//! success; whoever does not takes it when fifteen have passed, by the own clock, since the Lease was last seen to change. So no two
//! lead at once as long as clocks run alike, whatever they show.
//!
//! The holder's identity is `<name>_<address>`, so that whoever asks a follower can be told whom to ask.

use std::{convert::Infallible, time::Duration};

use k8s_openapi::{
    api::coordination::v1::{Lease, LeaseSpec},
    apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta},
    jiff::Timestamp,
};
use kube::{Api, Client, api::PostParams};
use tokio::{sync::watch, time::Instant};
use tracing::{info, warn};

use crate::source::kubernetes::describe;

/// How long a Lease holds without being renewed.
const DURATION: Duration = Duration::from_secs(15);
/// Without a renewal for this time, the leader leads no more.
const DEADLINE: Duration = Duration::from_secs(10);
/// Between two attempts.
const RETRY: Duration = Duration::from_secs(2);
/// For one answer of the API server.
const ANSWER: Duration = Duration::from_secs(5);

/// Who leads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Leadership {
    /// This replica.
    Leader,
    /// Another one, or none.
    Follower {
        /// Where the leader answers, `host:port`, if there is one that says so.
        leader: Option<String>,
    },
}

/// Name and place of the Lease, and who we are.
#[derive(Clone, Debug)]
pub(super) struct Config {
    /// Namespace of the Lease.
    pub(super) namespace: String,
    /// Name of the Lease.
    pub(super) name: String,
    /// Name of this replica: unlike all others', the pod's.
    pub(super) replica: String,
    /// Where this replica answers, `host:port`.
    pub(super) address: String,
}

/// What keeps leadership up to date.
pub(super) struct Election {
    api: Api<Lease>,
    name: String,
    identity: String,
    said: watch::Sender<Leadership>,
    /// The Lease as it was last seen to change, and when.
    seen: Option<(Option<LeaseSpec>, Instant)>,
    /// When the request for the last renewal that succeeded was sent.
    renewed: Option<Instant>,
    told: Option<String>,
}

/// What is to be done about a Lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Move {
    /// It is ours: for longer.
    Renew,
    /// It is nobody's, or of somebody who is gone.
    Take,
    Wait,
}

impl Election {
    pub(super) fn new(client: Client, config: &Config) -> (Self, watch::Receiver<Leadership>) {
        let (said, leadership) = watch::channel(Leadership::Follower { leader: None });
        let api = Api::namespaced(client, &config.namespace);
        let identity = format!("{}_{}", config.replica, config.address);
        (Self { api, name: config.name.clone(), identity, said, seen: None, renewed: None, told: None }, leadership)
    }

    /// Takes part for as long as it is polled.
    pub(super) async fn run(&mut self) -> Infallible {
        loop {
            let begun = Instant::now();
            // Whatever the server does, leadership ends in time.
            let ends = self.renewed.map(|at| at + DEADLINE);
            let until = ends.map_or(begun + ANSWER, |ends| ends.min(begun + ANSWER));
            let error = match tokio::time::timeout_at(until, self.attempt(begun)).await {
                Ok(Ok(())) => None,
                Ok(Err(error)) => Some(describe(&error)),
                Err(_) => Some("the API server does not answer".to_owned()),
            };
            if error.is_some() && error != self.told {
                warn!(lease = self.name, error, "the Lease of the leader cannot be read or written: trying again");
            }
            self.told = error;
            if self.renewed.is_some_and(|at| at.elapsed() >= DEADLINE) {
                self.renewed = None;
                self.say(Leadership::Follower { leader: None });
            }
            let next = begun + RETRY;
            tokio::time::sleep_until(self.renewed.map_or(next, |at| next.min(at + DEADLINE))).await;
        }
    }

    /// Gives the Lease back, so that nobody waits for its end.
    pub(super) async fn release(&mut self) {
        if self.renewed.take().is_none() {
            return;
        }
        self.say(Leadership::Follower { leader: None });
        let released = async {
            let mut lease = self.api.get(&self.name).await?;
            if let Some(spec) = lease.spec.as_mut().filter(|spec| spec.holder_identity.as_ref() == Some(&self.identity))
            {
                spec.holder_identity = Some(String::new());
                spec.lease_duration_seconds = Some(1);
                self.api.replace(&self.name, &PostParams::default(), &lease).await?;
            }
            Ok::<_, kube::Error>(())
        };
        match tokio::time::timeout(ANSWER, released).await {
            Ok(Ok(())) => info!(lease = self.name, "the Lease of the leader is given back"),
            Ok(Err(error)) => warn!(error = describe(&error), "the Lease of the leader could not be given back"),
            Err(_) => warn!("the Lease of the leader could not be given back: the API server does not answer"),
        }
    }

    async fn attempt(&mut self, begun: Instant) -> Result<(), kube::Error> {
        let Some(lease) = self.api.get_opt(&self.name).await? else {
            let spec = self.spec(None);
            let metadata = ObjectMeta { name: Some(self.name.clone()), ..ObjectMeta::default() };
            return match self.api.create(&PostParams::default(), &Lease { metadata, spec: Some(spec) }).await {
                Ok(_) => self.lead(begun),
                // Another one was faster.
                Err(kube::Error::Api(status)) if status.code == 409 => Ok(()),
                Err(error) => Err(error),
            };
        };
        let spec = lease.spec.clone();
        if self.seen.as_ref().is_none_or(|(seen, _)| *seen != spec) {
            self.seen = Some((spec.clone(), begun));
        }
        let since = self.seen.as_ref().map_or(begun, |(_, since)| *since);
        match judge(spec.as_ref(), &self.identity, begun - since) {
            Move::Wait => {
                self.renewed = None;
                let holder = spec.and_then(|spec| spec.holder_identity).unwrap_or_default();
                let leader = holder.rsplit_once('_').map(|(_, address)| address.to_owned());
                self.say(Leadership::Follower { leader });
                Ok(())
            }
            Move::Renew | Move::Take => {
                let spec = self.spec(spec.as_ref());
                // With the version that was read: of two who try, one succeeds.
                let lease = Lease { metadata: lease.metadata, spec: Some(spec) };
                match self.api.replace(&self.name, &PostParams::default(), &lease).await {
                    Ok(_) => self.lead(begun),
                    Err(kube::Error::Api(status)) if status.code == 409 => Ok(()),
                    Err(error) => Err(error),
                }
            }
        }
    }

    fn lead(&mut self, begun: Instant) -> Result<(), kube::Error> {
        self.renewed = Some(begun);
        self.say(Leadership::Leader);
        Ok(())
    }

    fn say(&self, leadership: Leadership) {
        self.said.send_if_modified(|said| {
            let changed = *said != leadership;
            if changed {
                match &leadership {
                    Leadership::Leader => info!(lease = self.name, "this replica leads"),
                    Leadership::Follower { leader } => info!(lease = self.name, leader, "this replica does not lead"),
                }
                *said = leadership;
            }
            changed
        });
    }

    /// The Lease, held by us from now on.
    fn spec(&self, before: Option<&LeaseSpec>) -> LeaseSpec {
        let now = MicroTime(Timestamp::now());
        let ours = before.is_some_and(|before| before.holder_identity.as_ref() == Some(&self.identity));
        let transitions = before.and_then(|before| before.lease_transitions).unwrap_or_default();
        LeaseSpec {
            holder_identity: Some(self.identity.clone()),
            lease_duration_seconds: i32::try_from(DURATION.as_secs()).ok(),
            acquire_time: if ours { before.and_then(|before| before.acquire_time.clone()) } else { Some(now.clone()) },
            renew_time: Some(now),
            lease_transitions: Some(if ours || before.is_none() { transitions } else { transitions + 1 }),
            ..LeaseSpec::default()
        }
    }
}

/// `unchanged` is for how long the Lease was not seen to change.
fn judge(lease: Option<&LeaseSpec>, identity: &str, unchanged: Duration) -> Move {
    let holder = lease.and_then(|lease| lease.holder_identity.as_deref()).unwrap_or_default();
    let duration = lease.and_then(|lease| lease.lease_duration_seconds).and_then(|seconds| u64::try_from(seconds).ok());
    if holder == identity {
        Move::Renew
    } else if holder.is_empty() || unchanged > duration.map_or(DURATION, Duration::from_secs) {
        Move::Take
    } else {
        Move::Wait
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_is_taken_when_it_is_nobodys_or_was_not_renewed() {
        let held = |holder: &str| LeaseSpec {
            holder_identity: Some(holder.to_owned()),
            lease_duration_seconds: Some(15),
            ..LeaseSpec::default()
        };
        let second = Duration::from_secs;
        for (lease, unchanged, expected) in [
            (None, 0, Move::Take),
            (Some(held("")), 0, Move::Take),
            (Some(held("a")), 100, Move::Renew),
            (Some(held("b")), 0, Move::Wait),
            (Some(held("b")), 15, Move::Wait),
            (Some(held("b")), 16, Move::Take),
            // Of whoever gave it back and died before it was nobody's.
            (Some(LeaseSpec { lease_duration_seconds: Some(1), ..held("b") }), 2, Move::Take),
            (Some(LeaseSpec { lease_duration_seconds: None, ..held("b") }), 15, Move::Wait),
            (Some(LeaseSpec { lease_duration_seconds: Some(-1), ..held("b") }), 16, Move::Take),
        ] {
            assert_eq!(judge(lease.as_ref(), "a", second(unchanged)), expected, "{lease:?} {unchanged}");
        }
    }
}
