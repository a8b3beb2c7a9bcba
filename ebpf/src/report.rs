//! Counting verdicts and telling the agent about refusals, without waking it.

use aya_ebpf::bindings::{BPF_ANY, BPF_NOEXIST, BPF_RB_NO_WAKEUP};
use culvert_common::{Direction, Event, EventKind, FlowKey, Verdict, VerdictKey};

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
        // SAFETY: the slot belongs to this CPU, and programs of these hooks do not nest on it.
        Some(counter) => unsafe { *counter += 1 },
        None => {
            // A full map loses the count, never the verdict.
            let _ = VERDICTS.insert(key, 1u64, BPF_NOEXIST.into());
        }
    }
}

/// Counts a refusal and records it. A function of its own in the kernel too: an event needs stack.
#[inline(never)]
pub(crate) fn refused(netns_cookie: u64, direction: Direction, verdict: &Verdict, flow: &FlowKey) {
    count(netns_cookie, direction, verdict);
    send(&event(netns_cookie, direction, EventKind::Refused, verdict, flow), false);
}

/// An event about `flow`; the caller fills in what else it knows.
#[inline(always)]
pub(crate) fn event(
    netns_cookie: u64,
    direction: Direction,
    kind: EventKind,
    verdict: &Verdict,
    flow: &FlowKey,
) -> Event {
    Event {
        src: flow.src,
        dst: flow.dst,
        netns_cookie,
        at_ns: now_ns(),
        opened_ns: 0,
        received_bytes: 0,
        sent_bytes: 0,
        rule: verdict.rule,
        generation: verdict.generation,
        sport: flow.sport,
        dport: flow.dport,
        kind: kind as u8,
        direction: direction as u8,
        reason: verdict.reason as u8,
        _pad: 0,
    }
}

/// Sends an event; wakes the agent only where it must act.
#[inline(always)]
pub(crate) fn send(event: &Event, wake: bool) {
    let flags = if wake { BPF_ANY } else { BPF_RB_NO_WAKEUP };
    // A full buffer loses the record; the counter stands.
    let _ = EVENTS.output(event, flags.into());
}
