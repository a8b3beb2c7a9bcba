//! Asks the loaded programs what they would decide, without a connection (`BPF_PROG_TEST_RUN`): the same code on the same maps.

use std::{mem::offset_of, os::fd::AsFd as _};

use anyhow::{Context as _, ensure};
use aya::programs::SchedClassifier;
use culvert_common::{Addr, Asked};

use super::{Datapath, program, program_fd, sys};

/// Where a plaintext connection would arrive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arrival {
    /// At the application, if one listens.
    Passed,
    /// Nowhere: it is reset.
    Refused,
    /// At the listener with this socket cookie.
    Handed(u64),
}

/// `struct bpf_sk_lookup` (include/uapi/linux/bpf.h).
#[repr(C, align(8))]
#[derive(Default)]
struct SkLookupContext {
    cookie: u64,
    family: u32,
    protocol: u32,
    remote_ip4: u32,
    remote_ip6: [u32; 4],
    remote_port_be: u16,
    _pad: u16,
    local_ip4: u32,
    local_ip6: [u32; 4],
    local_port: u32,
    ingress_ifindex: u32,
    _tail: u32,
}
const _: () = assert!(size_of::<SkLookupContext>() == 72 && offset_of!(SkLookupContext, local_ip4) == 40);

impl Datapath {
    /// Answers each question with the verdict that `inbound` would give; nothing is counted or told.
    ///
    /// # Errors
    /// The kernel refused the program, or to run it.
    pub fn judge(&mut self, questions: &mut [Asked]) -> anyhow::Result<()> {
        const NAME: &str = "judge";
        if program_fd(&self.ebpf, NAME).is_err() {
            let judge: &mut SchedClassifier = program(&mut self.ebpf, NAME)?;
            judge.load().with_context(|| format!("the kernel refused program {NAME}"))?;
        }
        let judge = program_fd(&self.ebpf, NAME)?;
        for question in questions {
            let asked = *question;
            let answer = sys::test_run_packet(judge, &asked, question).context("run program judge")?;
            ensure!(answer == 0, "program judge could not read its packet");
        }
        Ok(())
    }

    /// What `inbound` itself does with the first packet of such a connection: it counts and tells as it always does.
    ///
    /// # Errors
    /// The kernel refused to run it: the listener that it chose is one of several on its port.
    pub fn arrival(&self, question: &Asked) -> anyhow::Result<Arrival> {
        const SK_DROP: u32 = 0;
        let mut context = SkLookupContext {
            protocol: libc::IPPROTO_TCP.unsigned_abs(),
            remote_port_be: question.sport.to_be(),
            local_port: question.dport.into(),
            ..SkLookupContext::default()
        };
        if question.src.is_v4() {
            let v4 = |addr: Addr| addr.to_be32x4()[3];
            context.family = libc::AF_INET.unsigned_abs();
            (context.remote_ip4, context.local_ip4) = (v4(question.src), v4(question.dst));
        } else {
            context.family = libc::AF_INET6.unsigned_abs();
            (context.remote_ip6, context.local_ip6) = (question.src.to_be32x4(), question.dst.to_be32x4());
        }
        let inbound = program_fd(&self.ebpf, "inbound")?;
        let answer = sys::test_run_context(inbound.as_fd(), &mut context).context("run program inbound")?;
        Ok(match (answer, context.cookie) {
            (SK_DROP, _) => Arrival::Refused,
            (_, 0) => Arrival::Passed,
            (_, listener) => Arrival::Handed(listener),
        })
    }
}
