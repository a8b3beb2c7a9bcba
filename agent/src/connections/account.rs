//! The kernel's counters against what was told: a record may be lost where the buffer is full, and some refusals are only
//! counted. What nobody told of is found here.

use std::collections::{BTreeMap, HashMap};

use culvert_common::{Answer, Direction, Event, Reason, VerdictKey};

use crate::{datapath::NetnsCookie, model::ObjectRef};

/// What was told of.
#[derive(Debug, Default)]
pub(super) struct Account {
    refusals: BTreeMap<VerdictKey, Told>,
    /// Connections in plaintext that were seen, by the server's pod.
    plaintext: HashMap<NetnsCookie, u64>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Told {
    /// By records, and by [`Account::untold`].
    times: u64,
    /// Counted beyond that the last time that somebody looked.
    beyond: u64,
}

/// Whether this is the reason of a connection that was passed as ordinary plaintext.
pub(super) fn passed(reason: u8) -> bool {
    matches!(Reason::from_u8(reason), Some(Reason::NoAllowPolicies | Reason::AllowMatch))
}

impl Account {
    /// The kernel has sent a record of a verdict that it has counted.
    pub(super) fn told(&mut self, event: &Event) {
        if !passed(event.reason) {
            // Of pods that nobody knows there is one counter.
            let unknown = event.reason == Reason::PodUnknown as u8;
            let key = VerdictKey {
                netns_cookie: if unknown { 0 } else { event.netns_cookie },
                rule: event.rule,
                direction: event.direction,
                answer: Answer::Refuse as u8,
                reason: event.reason,
                _pad: 0,
            };
            self.refusals.entry(key).or_default().times += 1;
        }
    }

    /// A connection in plaintext that the kernel has counted was seen.
    pub(super) fn seen(&mut self, server: NetnsCookie) {
        *self.plaintext.entry(server).or_default() += 1;
    }

    /// Forgets what was seen of pods that are gone.
    pub(super) fn forget(&mut self, gone: impl Fn(NetnsCookie) -> bool) {
        self.plaintext.retain(|pod, _| !gone(*pod));
    }

    /// Refusals that were counted and that no record tells of: what was missing the last time that somebody asked, and
    /// still is. (A record is sent just after it was counted.) Each is given once.
    pub(super) fn untold(&mut self, counted: &[(VerdictKey, u64)]) -> Vec<(VerdictKey, u64)> {
        let counted: BTreeMap<VerdictKey, u64> =
            counted.iter().filter(|(key, _)| key.answer == Answer::Refuse as u8).copied().collect();
        // The counters of a pod that has left are gone.
        self.refusals.retain(|key, _| counted.contains_key(key));
        let mut untold = Vec::new();
        for (key, counted) in counted {
            let told = self.refusals.entry(key).or_default();
            // It began again, with a pod that has come back.
            told.times = told.times.min(counted);
            let beyond = counted - told.times;
            let missing = beyond.min(std::mem::replace(&mut told.beyond, beyond));
            if missing > 0 {
                told.times += missing;
                told.beyond -= missing;
                untold.push((key, missing));
            }
        }
        untold
    }

    /// Connections in plaintext that were counted and not seen, by the server's workload.
    pub(super) fn unseen(
        &mut self,
        counted: &[(VerdictKey, u64)],
        workload: impl Fn(NetnsCookie) -> Option<ObjectRef>,
    ) -> Vec<(ObjectRef, u64)> {
        let mut passes: HashMap<NetnsCookie, u64> = HashMap::new();
        for (key, times) in counted {
            let plaintext = key.answer == Answer::Pass as u8 && passed(key.reason);
            if plaintext && key.direction == Direction::Inbound as u8 {
                *passes.entry(NetnsCookie(key.netns_cookie)).or_default() += times;
            }
        }
        // The counters of a pod that has left are gone, and begin again when it comes back.
        self.plaintext.retain(|pod, seen| {
            let counted = passes.get(pod).copied();
            *seen = (*seen).min(counted.unwrap_or(0));
            counted.is_some()
        });
        let mut unseen: BTreeMap<ObjectRef, u64> = BTreeMap::new();
        for (pod, times) in passes {
            let missing = times - self.plaintext.get(&pod).copied().unwrap_or(0);
            if let (1.., Some(server)) = (missing, workload(pod)) {
                *unseen.entry(server).or_default() += missing;
            }
        }
        unseen.into_iter().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(answer: Answer, reason: Reason) -> VerdictKey {
        VerdictKey {
            netns_cookie: 7,
            rule: 3,
            direction: Direction::Inbound as u8,
            answer: answer as u8,
            reason: reason as u8,
            _pad: 0,
        }
    }

    fn event() -> Event {
        Event {
            netns_cookie: 7,
            rule: 3,
            direction: Direction::Inbound as u8,
            reason: Reason::StrictRequiresMtls as u8,
            ..Event::default()
        }
    }

    /// Each refusal that was counted is told of once: by its record, or as one without.
    #[test]
    fn a_refusal_without_a_record_is_found_once() {
        let mut account = Account::default();
        let key = key(Answer::Refuse, Reason::StrictRequiresMtls);
        account.told(&event());
        assert_eq!(account.untold(&[(key, 1)]), []);
        assert_eq!(account.untold(&[(key, 4)]), [], "its record may be on its way");
        account.told(&event());
        assert_eq!(account.untold(&[(key, 4)]), [(key, 2)]);
        assert_eq!(account.untold(&[(key, 4)]), []);
        assert_eq!(account.untold(&[(key, 9)]), []);
        assert_eq!(account.untold(&[(key, 12)]), [(key, 5)]);
        assert_eq!(account.untold(&[(key, 12)]), [(key, 3)]);
        // The pod leaves, and comes back.
        assert_eq!(account.untold(&[]), []);
        assert_eq!(account.untold(&[(key, 1)]), []);
        assert_eq!(account.untold(&[(key, 1)]), [(key, 1)]);
    }

    /// Their records say whose they are, and the counter does not.
    #[test]
    fn refusals_of_pods_that_nobody_knows_are_counted_together() {
        let mut account = Account::default();
        let (reason, netns_cookie) = (Reason::PodUnknown, 0);
        let key = VerdictKey { netns_cookie, rule: 0, ..key(Answer::Refuse, reason) };
        for netns_cookie in [7, 8] {
            account.told(&Event { netns_cookie, rule: 0, reason: reason as u8, ..event() });
        }
        for _ in 0..2 {
            assert_eq!(account.untold(&[(key, 2)]), []);
        }
    }

    #[test]
    fn plaintext_that_nobody_saw_is_missing() {
        let mut account = Account::default();
        let server = ObjectRef::new("test", "web");
        let counted = [
            (key(Answer::Pass, Reason::NoAllowPolicies), 3),
            (key(Answer::Pass, Reason::Probe), 90),
            (key(Answer::Refuse, Reason::StrictRequiresMtls), 5),
        ];
        let workload = |cookie: NetnsCookie| (cookie.0 == 7).then(|| server.clone());
        account.seen(NetnsCookie(7));
        assert_eq!(account.unseen(&counted, workload), [(server.clone(), 2)]);
        account.seen(NetnsCookie(7));
        account.seen(NetnsCookie(7));
        assert_eq!(account.unseen(&counted, workload), []);
        account.forget(|cookie| cookie.0 != 7);
        assert_eq!(account.unseen(&counted, workload), [], "it is still there");
        account.seen(NetnsCookie(8));
        account.forget(|cookie| cookie.0 == 8);
        assert_eq!(account.plaintext.len(), 1);
        // The pod leaves, and comes back.
        assert_eq!(account.unseen(&[], workload), []);
        assert_eq!(account.unseen(&counted[..1], workload), [(server.clone(), 3)]);
    }
}
