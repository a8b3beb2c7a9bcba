//! One connection to a server, from plain data to a verdict (specification §5.3, §6.2, §8).
//!
//! What mode, peer and port decide is decided by the function that the kernel's programs call
//! ([`culvert_common::decide`]); what AuthorizationPolicies add is here. No second path leads to a verdict.

use std::{fmt, net::IpAddr, sync::Arc};

use culvert_common::{Answer, Authorization as Says, Direction, Inputs, Mode, PORT_HBONE, Peer, PodState, Reason};

use crate::model::{ObjectRef, SpiffeId};

use super::{
    Authorization, PeerAuth, RuleId, RuleRef, Snapshot, Workload,
    authorization::{Kind, Matched, rule::Facts},
};

/// Rules that a verdict names of those that could never match; the snapshot's warnings have all.
const NAMED: usize = 8;

/// One connection, as its server's side sees it.
#[derive(Clone, Copy, Debug)]
pub struct Connection<'a> {
    /// What protects the server.
    pub server: Server<'a>,
    /// Who connects, and how.
    pub client: Client<'a>,
    /// The TCP source address; `None` where nobody says, which matches no address block.
    pub source_ip: Option<IpAddr>,
    /// The workload's address, likewise.
    pub destination_ip: Option<IpAddr>,
    /// The workload's port ([PA.6]).
    pub port: u16,
}

/// What protects a server.
#[derive(Clone, Copy, Debug)]
pub struct Server<'a> {
    /// It is in the mesh: if not, nothing protects it ([PA.11], [AP.4]).
    pub enrolled: bool,
    /// Its effective PeerAuthentication.
    pub peer_auth: &'a PeerAuth,
    /// Its AuthorizationPolicies.
    pub authorization: &'a Authorization,
}

/// Who connects, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Client<'a> {
    /// In plaintext, as far as the mesh is concerned: without identity ([PA.10]).
    Plain,
    /// By a tunnel, with this identity.
    Tunnel(&'a SpiffeId),
    /// The kubelet of the server's node ([K.1]).
    Probe,
    /// The server's own pod, to its own address.
    SamePod,
}

/// The answer about one connection, with all that explains it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// Whether it may go on.
    pub allowed: bool,
    /// Why: one of `no-allow-policies`, `allow-match`, `no-allow-match`, `explicit-deny`, `strict-requires-mtls`,
    /// `policy-missing`, `server-not-enrolled`, `untrusted-trust-domain`, `loop`, `probe`, `same-pod`.
    pub reason: Reason,
    /// What decided, where a single object did.
    pub decided_by: Option<DecidedBy>,
    /// What the verdict would be if the policies in dry-run were enforced; only where there are such ([AP.6]).
    pub dry_run: Option<DryRun>,
    /// The oldest AUDIT policy that matches ([AP.5]).
    pub audit: Option<RuleRef>,
    /// Where policy did something else than it seems to say, one line each.
    pub warnings: Vec<Arc<str>>,
    /// The snapshot that it was made from.
    pub generation: u32,
}

/// The object that decided.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DecidedBy {
    /// A PeerAuthentication, by the mode that it sets.
    PeerAuthentication(ObjectRef),
    /// A rule of an AuthorizationPolicy: the first that matches, of the oldest policy ([C.2]).
    AuthorizationPolicy(RuleRef),
}

/// A verdict that is not enforced.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DryRun {
    /// As in [`Verdict::allowed`].
    pub allowed: bool,
    /// As in [`Verdict::reason`].
    pub reason: Reason,
    /// The rule that would decide.
    pub rule: Option<RuleRef>,
}

impl Verdict {
    /// Without anything that explains it.
    pub(super) fn new(allowed: bool, reason: Reason, generation: u32) -> Self {
        Self { allowed, reason, decided_by: None, dry_run: None, audit: None, warnings: Vec::new(), generation }
    }
}

impl Workload {
    /// What protects it.
    pub fn server(&self) -> Server<'_> {
        Server { enrolled: self.enrollment.enrolled, peer_auth: &self.peer_auth, authorization: &self.authorization }
    }
}

/// Judges one connection. The agent is taken to be alive, and the server's pod to be ready, since somebody asks.
pub fn decide(snapshot: &Snapshot, connection: &Connection<'_>) -> Verdict {
    let (server, port) = (connection.server, connection.port);
    let verdict = |allowed, reason| Verdict::new(allowed, reason, snapshot.generation);
    let (peer, identity) = match connection.client {
        Client::Plain => (Peer::Plain, None),
        Client::Tunnel(identity) => (Peer::Tunnel, Some(identity)),
        Client::Probe => (Peer::Probe, None),
        Client::SamePod => (Peer::SamePod, None),
    };
    match peer {
        Peer::SamePod | Peer::Probe => {}
        Peer::Plain | Peer::Tunnel | Peer::Agent if !server.enrolled => {
            return verdict(true, Reason::ServerNotEnrolled);
        }
        Peer::Plain | Peer::Tunnel | Peer::Agent => {}
    }
    // The handshake comes before everything that is asked for in a tunnel ([I.8]).
    if identity.is_some_and(|identity| !snapshot.mesh.trusts(&identity.trust_domain)) {
        return verdict(false, Reason::UntrustedTrustDomain);
    }
    let (mode, rule) = if server.enrolled { server.peer_auth.of_port(port) } else { (Mode::Permissive, RuleId(0)) };
    let kernel = culvert_common::decide(&Inputs {
        direction: Direction::Inbound,
        peer,
        state: PodState::Ready,
        agent_alive: true,
        port,
        mode,
        // What policies say is said below, of tunnels and of plaintext.
        authorization: if server.authorization.judges() { Says::Agent } else { Says::None },
        rule: rule.0,
        generation: snapshot.generation,
    });
    match (kernel.answer, kernel.reason) {
        (Answer::Refuse, reason) => {
            let object = snapshot.rule(RuleId(kernel.rule)).map(|rule| rule.object.clone());
            return Verdict { decided_by: object.map(DecidedBy::PeerAuthentication), ..verdict(false, reason) };
        }
        (_, reason @ (Reason::SamePod | Reason::Probe)) => return verdict(true, reason),
        // In plaintext to the tunnel's port: that is no way to an application.
        _ if port == PORT_HBONE => return verdict(false, Reason::Loop),
        (Answer::Pass | Answer::Agent, _) => {}
    }
    let authorization = server.authorization;
    let mut result = verdict(true, Reason::NoAllowPolicies);
    for policy in authorization.custom() {
        result.warnings.push(format!("{policy}: CUSTOM is not enforced at L4 [AP.7]").into());
    }
    if !authorization.judges() {
        return result;
    }
    let facts = Facts::new(identity, connection.source_ip, connection.destination_ip, port);
    let (deny, allow) = (authorization.first(Kind::Deny, &facts), authorization.first(Kind::Allow, &facts));
    let (reason, rule) = conclude(deny.as_ref(), authorization.has(Kind::Allow), allow.as_ref());
    (result.allowed, result.reason) = (allows(reason), reason);
    result.decided_by = rule.map(|rule| DecidedBy::AuthorizationPolicy(rule.name()));
    match (reason, rule) {
        (Reason::ExplicitDeny, Some(rule)) if !rule.assumed().is_empty() => {
            let assumed = rule.assumed().join(", ");
            let text =
                format!("{} denies more than requested: {assumed} cannot be evaluated at L4 [AP.14]", rule.name());
            result.warnings.push(text.into());
        }
        (Reason::NoAllowMatch, _) => {
            result.warnings.extend(authorization.never(Kind::Allow).take(NAMED).cloned());
        }
        _ => {}
    }
    if authorization.has(Kind::DryDeny) || authorization.has(Kind::DryAllow) {
        let (dry_deny, dry_allow) =
            (authorization.first(Kind::DryDeny, &facts), authorization.first(Kind::DryAllow, &facts));
        let (deny, allow) = (older(deny, dry_deny), older(allow, dry_allow));
        let some_allow = authorization.has(Kind::Allow) || authorization.has(Kind::DryAllow);
        let (reason, rule) = conclude(deny.as_ref(), some_allow, allow.as_ref());
        result.dry_run = Some(DryRun { allowed: allows(reason), reason, rule: rule.map(Matched::name) });
    }
    if authorization.has(Kind::Audit) {
        result.audit = authorization.first(Kind::Audit, &facts).map(|rule| rule.name());
    }
    result
}

/// Specification §6.2, steps 2 to 5: the reason, and the rule that decided.
pub(super) fn conclude<'m, 'a>(
    deny: Option<&'m Matched<'a>>,
    some_allow: bool,
    allow: Option<&'m Matched<'a>>,
) -> (Reason, Option<&'m Matched<'a>>) {
    match (deny, some_allow, allow) {
        (Some(rule), _, _) => (Reason::ExplicitDeny, Some(rule)),
        (None, false, _) => (Reason::NoAllowPolicies, None),
        (None, true, Some(rule)) => (Reason::AllowMatch, Some(rule)),
        (None, true, None) => (Reason::NoAllowMatch, None),
    }
}

fn allows(reason: Reason) -> bool {
    matches!(reason, Reason::NoAllowPolicies | Reason::AllowMatch)
}

fn older<'a>(one: Option<Matched<'a>>, other: Option<Matched<'a>>) -> Option<Matched<'a>> {
    match (one, other) {
        (Some(one), Some(other)) => Some(if other.is_older_than(&one) { other } else { one }),
        (one, other) => one.or(other),
    }
}

impl fmt::Display for DecidedBy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PeerAuthentication(object) => write!(f, "{object}"),
            Self::AuthorizationPolicy(rule) => write!(f, "{rule}"),
        }
    }
}

impl fmt::Display for DryRun {
    /// `deny explicit-deny test/rehearsal#0`
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", if self.allowed { "allow" } else { "deny" }, self.reason.as_str())?;
        match &self.rule {
            Some(rule) => write!(f, " {rule}"),
            None => Ok(()),
        }
    }
}

/// In words, for the people who read logs.
impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let reason = self.reason.as_str();
        match (self.reason, &self.decided_by) {
            (Reason::ExplicitDeny, Some(DecidedBy::AuthorizationPolicy(rule))) => {
                write!(f, "explicitly denied by: {}, rule {}", rule.policy, rule.rule)
            }
            (Reason::NoAllowMatch, _) => f.write_str("allow policies exist, but none allowed"),
            (_, Some(DecidedBy::PeerAuthentication(object))) => write!(f, "{reason} by PeerAuthentication {object}"),
            (_, Some(DecidedBy::AuthorizationPolicy(rule))) => {
                write!(f, "{reason} by AuthorizationPolicy {}, rule {}", rule.policy, rule.rule)
            }
            (_, None) => f.write_str(reason),
        }
    }
}
