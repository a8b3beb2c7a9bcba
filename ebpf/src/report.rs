//! Counting verdicts and telling the agent about refusals, without waking it.

use aya_ebpf::bindings::{BPF_NOEXIST, BPF_RB_FORCE_WAKEUP, BPF_RB_NO_WAKEUP};
use culvert_common::{Direction, EventKind, FlowKey, Verdict, VerdictKey};

use crate::{
    context::now_ns,
    maps::{EVENTS, VERDICTS},
};

/// Counts a verdict for the pod of `netns_cookie` (0: no pod is known).
#[inline(always)]
pub(crate) fn count(netns_cookie: u64, direction: Direction, verdict: &Verdict) {
    let key = VerdictKey {
        netns_cookie,
        rule: verdict.rule,
        direction: direction as u8,
        answer: verdict.answer as u8,
        reason: verdict.reason as u8,
        _pad: 0,
    };
    match VERDICTS.get_ptr_mut(key) {
        // SAFETY: the slot belongs to this CPU. A program that runs for an arriving packet may interrupt one that runs for a
        // system call in the middle of this: one of the two is not counted then.
        Some(counter) => unsafe { *counter += 1 },
        None => {
            // A full map loses the count, never the verdict.
            let _ = VERDICTS.insert(key, 1u64, BPF_NOEXIST.into());
        }
    }
}

/// Counts a refusal and records it. A function of its own in the kernel too: it is called from many places.
#[inline(never)]
pub(crate) fn refused(netns_cookie: u64, direction: Direction, verdict: &Verdict, flow: &FlowKey) {
    count(netns_cookie, direction, verdict);
    send(&About { netns_cookie, direction, kind: EventKind::Refused, verdict, flow }, &Ended::default(), false);
}

/// What an event is about.
pub(crate) struct About<'a> {
    /// The enrolled pod's namespace.
    pub(crate) netns_cookie: u64,
    /// Seen from that pod.
    pub(crate) direction: Direction,
    pub(crate) kind: EventKind,
    pub(crate) verdict: &'a Verdict,
    pub(crate) flow: &'a FlowKey,
}

/// What only [`EventKind::Closed`] knows; see `culvert_common::Event`.
#[derive(Default)]
pub(crate) struct Ended {
    pub(crate) opened_ns: u64,
    pub(crate) received_bytes: u64,
    pub(crate) sent_bytes: u64,
}

/// Sends an event; wakes the agent only where it must act.
///
/// It is written where the agent will read it, word by word: on Linux 6.1 the verifier counts at least 32 bytes of
/// stack for each function on the way, and an event made on the stack, with a call to fill it, was more than there is.
#[inline(always)]
pub(crate) fn send(about: &About<'_>, ended: &Ended, wake: bool) {
    // A full buffer loses the record; the counter stands.
    let Some(mut entry) = EVENTS.reserve(0) else { return };
    let event = entry.as_mut_ptr();
    // SAFETY: `event` points at a reserved record, aligned to eight bytes; every field is written, so the reader finds no
    // byte of an earlier one. Volatile keeps the compiler from gathering the fields into a call.
    unsafe {
        (&raw mut (*event).src).write(about.flow.src);
        (&raw mut (*event).dst).write(about.flow.dst);
        (&raw mut (*event).netns_cookie).write_volatile(about.netns_cookie);
        (&raw mut (*event).at_ns).write_volatile(now_ns());
        (&raw mut (*event).opened_ns).write_volatile(ended.opened_ns);
        (&raw mut (*event).received_bytes).write_volatile(ended.received_bytes);
        (&raw mut (*event).sent_bytes).write_volatile(ended.sent_bytes);
        (&raw mut (*event).rule).write_volatile(about.verdict.rule);
        (&raw mut (*event).generation).write_volatile(about.verdict.generation);
        (&raw mut (*event).sport).write_volatile(about.flow.sport);
        (&raw mut (*event).dport).write_volatile(about.flow.dport);
        (&raw mut (*event).kind).write_volatile(about.kind as u8);
        (&raw mut (*event).direction).write_volatile(about.direction as u8);
        (&raw mut (*event).reason).write_volatile(about.verdict.reason as u8);
        (&raw mut (*event)._pad).write_volatile(0);
    }
    // Left to itself, the kernel wakes a reader only if this record is the next that it reads: not behind records that came
    // without a wake-up.
    entry.submit(if wake { BPF_RB_FORCE_WAKEUP.into() } else { BPF_RB_NO_WAKEUP.into() });
}
