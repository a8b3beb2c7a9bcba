//! Answers what would become of a plaintext connection to a pod: the verdict of `inbound`, without the connection.
//!
//! It is attached nowhere. Whoever asks runs it on a packet of its own making, whose data is one [`Asked`]; nothing is counted
//! or told.

use core::mem::offset_of;

use aya_ebpf::programs::TcContext;
use culvert_common::{Addr, Answer, Asked, FlowKey, Peer, Reason, Verdict};

use crate::{
    context::{arriving, pod},
    inbound::owner,
};

/// The packet's data was not one question.
const NOT_ASKED: i32 = -1;

/// Answers in the packet.
#[inline(always)]
pub(crate) fn run(ctx: &TcContext) -> i32 {
    judge(ctx).unwrap_or(NOT_ASKED)
}

#[inline(always)]
fn judge(ctx: &TcContext) -> Option<i32> {
    let src: Addr = ctx.load(offset_of!(Asked, src)).ok()?;
    let dst: Addr = ctx.load(offset_of!(Asked, dst)).ok()?;
    let sport: u16 = ctx.load(offset_of!(Asked, sport)).ok()?;
    let dport: u16 = ctx.load(offset_of!(Asked, dport)).ok()?;
    let flow = FlowKey { src, dst, sport, dport, _pad: 0 };
    let verdict = match owner(flow.dst).and_then(|cookie| Some((cookie, pod(cookie)?))) {
        Some((cookie, pod)) => arriving(&pod, cookie, Peer::Plain, &flow),
        None => Verdict { answer: Answer::Refuse, reason: Reason::UnknownAddress, rule: 0, generation: 0 },
    };
    ctx.store(offset_of!(Asked, rule), &verdict.rule, 0).ok()?;
    ctx.store(offset_of!(Asked, generation), &verdict.generation, 0).ok()?;
    ctx.store(offset_of!(Asked, answer), &(verdict.answer as u8), 0).ok()?;
    ctx.store(offset_of!(Asked, reason), &(verdict.reason as u8), 0).ok()?;
    Some(0)
}
