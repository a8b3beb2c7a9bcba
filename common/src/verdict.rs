//! The one verdict function: what becomes of a connection, from inputs that kernel and agent both can gather.
//!
//! `connect4/6`, `sk_lookup`, `sock_ops`, the agent and the tests call [`decide`]; there is no second path. Later inputs
//! (addresses, egress, names) are added to [`Inputs`], not beside it.

use crate::{PORT_HBONE, PORT_INBOUND, PORT_OUTBOUND};

/// Which way the connection goes, seen from the enrolled pod.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    /// The pod connects.
    Outbound = 0,
    /// The pod is connected to.
    Inbound = 1,
}

/// What is known of the other end, or of the socket itself.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Peer {
    /// An ordinary connection; inbound: plaintext, without identity.
    Plain = 0,
    /// Inbound by a verified tunnel.
    Tunnel = 1,
    /// A loopback address, or an address of the same pod.
    SamePod = 2,
    /// A socket that the agent marked as its own.
    Agent = 3,
    /// Opened by a process in the kubelet's cgroup of this node ([K.1], [K.5]).
    Probe = 4,
}

/// What the maps hold about the pod.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PodState {
    /// No entry: the address or the namespace is not known.
    Unknown = 0,
    /// Enrolled, but the agent has not finished setting it up.
    Pending = 1,
    /// Enrolled and served.
    Ready = 2,
}

/// Effective PeerAuthentication mode of a port (specification §5.2).
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Mode {
    /// Nothing usable was found: judged like [`Mode::Strict`], since a missing piece must deny ([PA.13]).
    Missing = 0,
    /// Tunnels and plaintext.
    Permissive = 1,
    /// Tunnels only.
    Strict = 2,
    /// Tunnels and plaintext ([PA.9]).
    Disable = 3,
}

impl Mode {
    /// From a byte of a map; any other value is [`Mode::Missing`].
    #[inline(always)]
    pub const fn from_u8(byte: u8) -> Self {
        match byte {
            1 => Self::Permissive,
            2 => Self::Strict,
            3 => Self::Disable,
            _ => Self::Missing,
        }
    }

    /// As PeerAuthentication spells it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Missing => "MISSING",
            Self::Permissive => "PERMISSIVE",
            Self::Strict => "STRICT",
            Self::Disable => "DISABLE",
        }
    }
}

impl PodState {
    /// From a byte of a map; any other value is [`PodState::Unknown`].
    #[inline(always)]
    pub const fn from_u8(byte: u8) -> Self {
        match byte {
            1 => Self::Pending,
            2 => Self::Ready,
            _ => Self::Unknown,
        }
    }
}

/// What to do with the connection.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Answer {
    /// Let it through untouched.
    Pass = 0,
    /// Refuse it: a reset for the peer, an errno for the pod itself.
    Refuse = 1,
    /// Hand it to the agent.
    Agent = 2,
}

/// Why: a closed list, the same words in maps, access log, metrics and documents.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Reason {
    /// Outbound, to be judged and carried by the agent.
    Captured = 0,
    /// A TCP connection to the tunnel port, for the agent's tunnel endpoint.
    TunnelPort = 1,
    /// No ALLOW policy selects the workload, and nothing forbids the connection.
    NoAllowPolicies = 2,
    /// Loopback, or the pod itself (specification §3).
    SamePod = 3,
    /// The agent's own socket.
    Agent = 4,
    /// A kubelet probe of this node ([K.1]).
    Probe = 5,
    /// Plaintext to a port whose effective mode is STRICT.
    StrictRequiresMtls = 6,
    /// To one of the reserved ports through the mesh ([K.2]).
    Loop = 7,
    /// The pod is enrolled and not ready yet ([K.4]).
    EnrolmentPending = 8,
    /// The agent has been silent for longer than [`crate::SILENT_AFTER_NS`] ([K.4]).
    AgentSilent = 9,
    /// An address in an enrolled pod's namespace that no map knows (specification §3).
    UnknownAddress = 10,
    /// The agent's listener for this pod is gone: killed, or not there yet ([K.4]).
    NoListener = 11,
    /// A map was full, or a helper failed, where the answer needed it.
    KernelCapacity = 12,
    /// A policy that this verdict refers to is not in the maps ([PA.13]).
    PolicyMissing = 13,
    /// The pod has no address of the family that it wants to connect with.
    NoAddressOfFamily = 14,
    /// Plaintext whose verdict needs more than the kernel holds.
    NeedsAgent = 15,
    /// A rule of an ALLOW policy matches, and nothing forbids the connection.
    AllowMatch = 16,
    /// ALLOW policies select the workload, and no rule of theirs matches.
    NoAllowMatch = 17,
    /// A rule of a DENY policy matches.
    ExplicitDeny = 18,
    /// The server is not in the mesh, so that nothing protects it ([AP.4]).
    ServerNotEnrolled = 19,
    /// The client's certificate is of a trust domain that is neither the mesh's nor an alias ([I.8]).
    UntrustedTrustDomain = 20,
    /// The first packet of a TCP connection left the pod, and no socket of the agent sent it: a raw or packet socket, or
    /// one that was made outside the node's cgroup.
    NotCaptured = 21,
    /// A packet left the pod with a source address that is not the pod's.
    ForeignSource = 22,
    /// A packet left the pod whose headers cannot be seen: fragments of TCP, extension headers, tags.
    HiddenHeader = 23,
    /// A packet left the pod that is neither TCP, UDP nor ICMP.
    Protocol = 24,
    /// UDP, where the mesh or the pod says that it is refused (specification §3).
    UdpRefused = 25,
    /// A pod that no agent has classified yet connects, or is connected to ([K.4]).
    PodUnknown = 26,
}

impl Reason {
    /// All of them, in the order of their numbers.
    pub const ALL: [Self; 27] = [
        Self::Captured,
        Self::TunnelPort,
        Self::NoAllowPolicies,
        Self::SamePod,
        Self::Agent,
        Self::Probe,
        Self::StrictRequiresMtls,
        Self::Loop,
        Self::EnrolmentPending,
        Self::AgentSilent,
        Self::UnknownAddress,
        Self::NoListener,
        Self::KernelCapacity,
        Self::PolicyMissing,
        Self::NoAddressOfFamily,
        Self::NeedsAgent,
        Self::AllowMatch,
        Self::NoAllowMatch,
        Self::ExplicitDeny,
        Self::ServerNotEnrolled,
        Self::UntrustedTrustDomain,
        Self::NotCaptured,
        Self::ForeignSource,
        Self::HiddenHeader,
        Self::Protocol,
        Self::UdpRefused,
        Self::PodUnknown,
    ];

    /// The word for logs, metrics and documents.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Captured => "captured",
            Self::TunnelPort => "tunnel-port",
            Self::NoAllowPolicies => "no-allow-policies",
            Self::SamePod => "same-pod",
            Self::Agent => "agent",
            Self::Probe => "probe",
            Self::StrictRequiresMtls => "strict-requires-mtls",
            Self::Loop => "loop",
            Self::EnrolmentPending => "enrolment-pending",
            Self::AgentSilent => "agent-silent",
            Self::UnknownAddress => "unknown-address",
            Self::NoListener => "no-listener",
            Self::KernelCapacity => "kernel-capacity",
            Self::PolicyMissing => "policy-missing",
            Self::NoAddressOfFamily => "no-address-of-family",
            Self::NeedsAgent => "needs-agent",
            Self::AllowMatch => "allow-match",
            Self::NoAllowMatch => "no-allow-match",
            Self::ExplicitDeny => "explicit-deny",
            Self::ServerNotEnrolled => "server-not-enrolled",
            Self::UntrustedTrustDomain => "untrusted-trust-domain",
            Self::NotCaptured => "not-captured",
            Self::ForeignSource => "foreign-source",
            Self::HiddenHeader => "hidden-header",
            Self::Protocol => "protocol",
            Self::UdpRefused => "udp-refused",
            Self::PodUnknown => "pod-unknown",
        }
    }

    /// From a byte of a map or an event; `None` for a number that this version does not know.
    pub const fn from_u8(byte: u8) -> Option<Self> {
        if (byte as usize) < Self::ALL.len() { Some(Self::ALL[byte as usize]) } else { None }
    }
}

/// What the verdict is made from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Inputs {
    /// Seen from the enrolled pod.
    pub direction: Direction,
    /// What is known of the other end.
    pub peer: Peer,
    /// What the maps hold about the pod.
    pub state: PodState,
    /// Whether the agent has given a sign of life within [`crate::SILENT_AFTER_NS`].
    pub agent_alive: bool,
    /// Destination port, host byte order: inbound, the workload's port ([PA.6]).
    pub port: u16,
    /// Effective mode of that port; not looked at for outbound connections.
    pub mode: Mode,
    /// What AuthorizationPolicies say of plaintext; not looked at for anything else.
    pub authorization: Authorization,
    /// The object that set [`Inputs::mode`]: an index into the snapshot's rules, 0 for none.
    pub rule: u32,
    /// Generation of the policy that [`Inputs::mode`] and [`Inputs::rule`] came from.
    pub generation: u32,
}

/// What AuthorizationPolicies say of a plaintext connection (specification §6.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Authorization {
    /// Nothing: no ALLOW policy selects the pod, and no DENY policy matches.
    None,
    /// This rule of an ALLOW policy matches, and no DENY policy does.
    Allow(u32),
    /// A DENY policy matches ([`Reason::ExplicitDeny`], by this rule), or no ALLOW policy does
    /// ([`Reason::NoAllowMatch`], by rule 0).
    Deny(Reason, u32),
    /// The agent is to be asked: the policies are more than the kernel holds.
    Agent,
    /// An entry is not there that should be: denied ([PA.13]).
    Missing,
}

impl Authorization {
    /// From what a map says: the number of a reason, and the rule. Whatever is not a verdict is [`Authorization::Missing`].
    #[inline(always)]
    pub const fn of(reason: u8, rule: u32) -> Self {
        if reason == Reason::NoAllowPolicies as u8 {
            Self::None
        } else if reason == Reason::AllowMatch as u8 {
            Self::Allow(rule)
        } else if reason == Reason::NoAllowMatch as u8 {
            Self::Deny(Reason::NoAllowMatch, rule)
        } else if reason == Reason::ExplicitDeny as u8 {
            Self::Deny(Reason::ExplicitDeny, rule)
        } else {
            Self::Missing
        }
    }
}

/// The answer, with all that is needed to explain it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// What to do.
    pub answer: Answer,
    /// Why.
    pub reason: Reason,
    /// The rule that decided, as in [`Inputs::rule`]; 0 where none did.
    pub rule: u32,
    /// The generation that it was decided by.
    pub generation: u32,
}

/// Decides one connection (specification §3, §5.3, §8).
///
/// Always inlined: in a kernel program it becomes a handful of compares.
#[inline(always)]
pub const fn decide(inputs: &Inputs) -> Verdict {
    let (answer, reason, rule) = judge(inputs);
    Verdict { answer, reason, rule, generation: inputs.generation }
}

#[inline(always)]
const fn judge(i: &Inputs) -> (Answer, Reason, u32) {
    // What never was subject to the mesh: decided before anything that can be missing.
    match i.peer {
        Peer::SamePod => return (Answer::Pass, Reason::SamePod, 0),
        Peer::Agent => return (Answer::Pass, Reason::Agent, 0),
        // A silent agent must not make the kubelet kill every pod of the node.
        Peer::Probe => {
            if matches!(i.direction, Direction::Inbound) {
                return (Answer::Pass, Reason::Probe, 0);
            }
        }
        Peer::Plain | Peer::Tunnel => {}
    }
    match i.state {
        PodState::Unknown => return (Answer::Refuse, Reason::UnknownAddress, 0),
        PodState::Pending => return (Answer::Refuse, Reason::EnrolmentPending, 0),
        PodState::Ready => {}
    }
    if !i.agent_alive {
        return (Answer::Refuse, Reason::AgentSilent, 0);
    }
    match i.direction {
        Direction::Outbound => (Answer::Agent, Reason::Captured, 0),
        Direction::Inbound => inbound(i),
    }
}

#[inline(always)]
const fn inbound(i: &Inputs) -> (Answer, Reason, u32) {
    let tunnelled = matches!(i.peer, Peer::Tunnel);
    if i.port == PORT_OUTBOUND || i.port == PORT_INBOUND || (tunnelled && i.port == PORT_HBONE) {
        return (Answer::Refuse, Reason::Loop, 0);
    }
    if i.port == PORT_HBONE {
        return (Answer::Agent, Reason::TunnelPort, 0);
    }
    if tunnelled {
        return (Answer::Pass, Reason::NoAllowPolicies, 0);
    }
    match i.mode {
        Mode::Missing => (Answer::Refuse, Reason::PolicyMissing, i.rule),
        Mode::Strict => (Answer::Refuse, Reason::StrictRequiresMtls, i.rule),
        // Both must pass ([PA.12]).
        Mode::Permissive | Mode::Disable => match i.authorization {
            Authorization::None => (Answer::Pass, Reason::NoAllowPolicies, i.rule),
            Authorization::Allow(rule) => (Answer::Pass, Reason::AllowMatch, rule),
            Authorization::Deny(reason, rule) => (Answer::Refuse, reason, rule),
            Authorization::Agent => (Answer::Agent, Reason::NeedsAgent, i.rule),
            Authorization::Missing => (Answer::Refuse, Reason::PolicyMissing, 0),
        },
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PLAIN: Inputs = Inputs {
        direction: Direction::Inbound,
        peer: Peer::Plain,
        state: PodState::Ready,
        agent_alive: true,
        port: 9080,
        mode: Mode::Permissive,
        authorization: Authorization::None,
        rule: 7,
        generation: 3,
    };

    fn check(inputs: Inputs, answer: Answer, reason: Reason) {
        let verdict = decide(&inputs);
        assert_eq!((verdict.answer, verdict.reason), (answer, reason), "{inputs:?}");
        assert_eq!(verdict.generation, inputs.generation);
    }

    /// Specification §5.3, the whole table.
    #[test]
    fn effective_mode_decides_plaintext_and_never_a_tunnel() {
        for (mode, answer, reason) in [
            (Mode::Strict, Answer::Refuse, Reason::StrictRequiresMtls),
            (Mode::Permissive, Answer::Pass, Reason::NoAllowPolicies),
            (Mode::Disable, Answer::Pass, Reason::NoAllowPolicies),
            (Mode::Missing, Answer::Refuse, Reason::PolicyMissing),
        ] {
            check(Inputs { mode, ..PLAIN }, answer, reason);
            assert_eq!(decide(&Inputs { mode, ..PLAIN }).rule, 7, "the deciding object is named");
            check(Inputs { mode, peer: Peer::Tunnel, ..PLAIN }, Answer::Pass, Reason::NoAllowPolicies);
        }
    }

    /// Specification §6.2 for plaintext; [PA.12]: a mode that refuses is not opened by a policy that allows.
    #[test]
    fn policies_decide_plaintext_that_the_mode_admits() {
        for (authorization, answer, reason, rule) in [
            (Authorization::None, Answer::Pass, Reason::NoAllowPolicies, 7),
            (Authorization::Allow(3), Answer::Pass, Reason::AllowMatch, 3),
            (Authorization::Deny(Reason::ExplicitDeny, 4), Answer::Refuse, Reason::ExplicitDeny, 4),
            (Authorization::Deny(Reason::NoAllowMatch, 0), Answer::Refuse, Reason::NoAllowMatch, 0),
            (Authorization::Agent, Answer::Agent, Reason::NeedsAgent, 7),
            (Authorization::Missing, Answer::Refuse, Reason::PolicyMissing, 0),
        ] {
            for mode in [Mode::Permissive, Mode::Disable] {
                let inputs = Inputs { authorization, mode, ..PLAIN };
                check(inputs, answer, reason);
                assert_eq!(decide(&inputs).rule, rule);
            }
            check(Inputs { authorization, mode: Mode::Strict, ..PLAIN }, Answer::Refuse, Reason::StrictRequiresMtls);
            check(Inputs { authorization, peer: Peer::Tunnel, ..PLAIN }, Answer::Pass, Reason::NoAllowPolicies);
        }
    }

    /// [PA.13]: a byte that is no verdict is a missing one.
    #[test]
    fn what_a_map_says_is_a_verdict_or_missing() {
        for reason in 0..=u8::MAX {
            let expected = match Reason::from_u8(reason) {
                Some(Reason::NoAllowPolicies) => Authorization::None,
                Some(Reason::AllowMatch) => Authorization::Allow(9),
                Some(reason @ (Reason::NoAllowMatch | Reason::ExplicitDeny)) => Authorization::Deny(reason, 9),
                _ => Authorization::Missing,
            };
            assert_eq!(Authorization::of(reason, 9), expected);
        }
    }

    /// [K.2]
    #[test]
    fn reserved_ports_are_a_loop_and_the_tunnel_port_is_the_tunnel() {
        for port in [PORT_OUTBOUND, PORT_INBOUND] {
            check(Inputs { port, ..PLAIN }, Answer::Refuse, Reason::Loop);
            check(Inputs { port, peer: Peer::Tunnel, ..PLAIN }, Answer::Refuse, Reason::Loop);
        }
        check(Inputs { port: PORT_HBONE, mode: Mode::Strict, ..PLAIN }, Answer::Agent, Reason::TunnelPort);
        check(Inputs { port: PORT_HBONE, peer: Peer::Tunnel, ..PLAIN }, Answer::Refuse, Reason::Loop);
    }

    /// [K.1]: probes are delivered in every mode, also while the agent cannot answer.
    #[test]
    fn probes_pass_in_every_state() {
        for state in [PodState::Unknown, PodState::Pending, PodState::Ready] {
            for agent_alive in [false, true] {
                let probe = Inputs { peer: Peer::Probe, mode: Mode::Strict, state, agent_alive, ..PLAIN };
                check(probe, Answer::Pass, Reason::Probe);
            }
        }
    }

    fn any_authorization() -> impl Strategy<Value = Authorization> {
        prop_oneof![
            any::<(u8, u32)>().prop_map(|(reason, rule)| Authorization::of(reason, rule)),
            Just(Authorization::Agent)
        ]
    }

    fn any_inputs() -> impl Strategy<Value = Inputs> {
        (
            prop_oneof![Just(Direction::Inbound), Just(Direction::Outbound)],
            prop_oneof![
                Just(Peer::Plain),
                Just(Peer::Tunnel),
                Just(Peer::SamePod),
                Just(Peer::Agent),
                Just(Peer::Probe)
            ],
            0u8..4,
            any::<bool>(),
            prop_oneof![Just(15001u16), Just(15006), Just(15008), any::<u16>()],
            0u8..5,
            any_authorization(),
            any::<(u32, u32)>(),
        )
            .prop_map(
                |(direction, peer, state, agent_alive, port, mode, authorization, (rule, generation))| Inputs {
                    direction,
                    peer,
                    state: PodState::from_u8(state),
                    agent_alive,
                    port,
                    mode: Mode::from_u8(mode),
                    authorization,
                    rule,
                    generation,
                },
            )
    }

    proptest! {
        /// [K.4]: whatever the policy, nothing of an enrolled pod passes while the agent is absent.
        #[test]
        fn nothing_ordinary_passes_without_a_live_agent(inputs in any_inputs()) {
            let subject = matches!(inputs.peer, Peer::Plain | Peer::Tunnel);
            let verdict = decide(&inputs);
            if subject && (!inputs.agent_alive || inputs.state != PodState::Ready) {
                prop_assert_eq!(verdict.answer, Answer::Refuse);
            }
        }

        /// Nothing leaves a pod except to itself, by the agent, or through the agent.
        #[test]
        fn outbound_is_never_passed(inputs in any_inputs()) {
            let free = matches!(inputs.peer, Peer::SamePod | Peer::Agent);
            if inputs.direction == Direction::Outbound && !free {
                prop_assert_ne!(decide(&inputs).answer, Answer::Pass);
            }
        }

        /// Every verdict carries the generation that it was made from.
        #[test]
        fn generation_is_carried(inputs in any_inputs()) {
            prop_assert_eq!(decide(&inputs).generation, inputs.generation);
        }
    }

    #[test]
    fn reasons_have_stable_numbers_and_distinct_words() {
        for (number, reason) in Reason::ALL.into_iter().enumerate() {
            assert_eq!(reason as usize, number);
            assert_eq!(Reason::from_u8(number as u8), Some(reason));
            assert_eq!(Reason::ALL.iter().filter(|other| other.as_str() == reason.as_str()).count(), 1);
        }
        assert_eq!(Reason::from_u8(Reason::ALL.len() as u8), None);
    }
}
