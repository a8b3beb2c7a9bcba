//! Every word that follows `reason=`: what it means and what to do about it, for `culvert verdicts` and for `docs/reasons.md`.
//!
//! The words themselves belong to those who say them: [`Reason`], [`RouteRefusal`], [`Limit`] and the ends of
//! [`crate::proxy`]. Each is matched here without a wildcard, so that a new one cannot do without an explanation.

use culvert_common::Reason;

use crate::{limits::Limit, policy::RouteRefusal, proxy::Failure};

/// A word, explained.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Told {
    /// As in the access log's field `reason`.
    pub word: &'static str,
    /// What becomes of the connection.
    pub result: &'static str,
    /// In which case.
    pub means: &'static str,
    /// What to do if that is not what one wants; empty if there is nothing to be done.
    pub remedy: &'static str,
}

const ALLOWED: &str = "allowed";
const REFUSED: &str = "refused";
const ENDED: &str = "ended";
const HANDED: &str = "handed to the agent";

/// Of a verdict.
pub fn of_verdict(reason: Reason) -> Told {
    let (result, means, remedy) = match reason {
        Reason::Captured => (HANDED, "outbound: the agent judges and carries it", ""),
        Reason::TunnelPort => (HANDED, "a connection to port 15008: the agent's end of a tunnel", ""),
        Reason::NoAllowPolicies => (
            ALLOWED,
            "no ALLOW policy selects the pod, and no DENY policy matches",
            "write an ALLOW policy for the pod",
        ),
        Reason::SamePod => (ALLOWED, "the pod connects to itself", ""),
        Reason::Agent => (ALLOWED, "the agent's own socket", ""),
        Reason::Probe => (ALLOWED, "a probe of the kubelet of the server's node", ""),
        Reason::StrictRequiresMtls => (
            REFUSED,
            "plaintext to a port whose mode is STRICT",
            "bring the client into the mesh, or except the port in the PeerAuthentication that is named; `culvert report \
             strict` lists the clients that stand in the way",
        ),
        Reason::Loop => {
            (REFUSED, "through the mesh to 15001, 15006 or 15008 of a pod", "connect to the application's own port")
        }
        Reason::EnrolmentPending => (
            REFUSED,
            "the pod is to be in the mesh and is not ready yet",
            "it goes by itself; if it stays, `culvert workloads -o wide` says what is wrong",
        ),
        Reason::AgentSilent => (
            REFUSED,
            "the node's agent has given no sign of life for ten seconds",
            "start the agent; if it runs, it hangs or has no processor: see its log",
        ),
        Reason::UnknownAddress => (
            REFUSED,
            "an address in the pod's namespace that its manifest does not have",
            "compare `status.podIPs` of the pod with the addresses of its interfaces",
        ),
        Reason::NoListener => {
            (REFUSED, "the agent's listener for the pod is gone: it was killed, or is not there yet", "start the agent")
        }
        Reason::KernelCapacity => (
            REFUSED,
            "a map of the kernel was full where the answer needed it",
            "`kernel.maps` of `/config_dump` shows which; fewer pods on the node, or policies that name fewer addresses",
        ),
        Reason::PolicyMissing => (
            REFUSED,
            "a policy that is referred to has not arrived",
            "it goes by itself once the policy is there; see the agent's log",
        ),
        Reason::NoAddressOfFamily => (
            REFUSED,
            "the pod has no address of the family that it connects with",
            "give the pod addresses of both families, or connect with the one that it has",
        ),
        Reason::NeedsAgent => (HANDED, "plaintext whose verdict needs more than the kernel holds", ""),
        Reason::AllowMatch => (
            ALLOWED,
            "the rule of an ALLOW policy that is named matches, and no DENY policy does",
            "narrow that rule, or write a DENY policy",
        ),
        Reason::NoAllowMatch => (
            REFUSED,
            "ALLOW policies select the pod, and no rule of theirs matches",
            "add the client to one of them; a client in plaintext has no identity, so bring it into the mesh or allow its \
             address with `ipBlocks`",
        ),
        Reason::ExplicitDeny => (
            REFUSED,
            "the rule of a DENY policy that is named matches",
            "narrow that rule; no ALLOW policy goes before it",
        ),
        Reason::ServerNotEnrolled => (
            ALLOWED,
            "the server is not in the mesh: no policy protects it",
            "bring it into the mesh: `culvert workloads -o wide` says why it is not",
        ),
        Reason::UntrustedTrustDomain => (
            REFUSED,
            "the client's certificate is of a trust domain that is neither the mesh's nor an alias",
            "add it to `trustDomainAliases` of the mesh configuration",
        ),
        Reason::NotCaptured => (
            REFUSED,
            "a first packet of TCP left the pod, and no captured socket sent it: a raw or packet socket, or one made outside \
             the node's cgroup",
            "connect with an ordinary socket, from a process of the pod",
        ),
        Reason::ForeignSource => (
            REFUSED,
            "a packet left the pod with a source address that is not the pod's",
            "let the application bind to the pod's addresses only",
        ),
        Reason::HiddenHeader => (
            REFUSED,
            "a packet left the pod whose headers cannot be seen: fragments of TCP, extension headers, tags",
            "send TCP without them",
        ),
        Reason::Protocol => (
            REFUSED,
            "a packet left the pod that is neither TCP, UDP nor ICMP",
            "take the pod out of the mesh if it needs that protocol",
        ),
        Reason::UdpRefused => (
            REFUSED,
            "UDP, where the mesh or the pod says that it is refused",
            "label the pod `culvert.io/udp: allow`, or set `--udp=allow`",
        ),
        Reason::PodUnknown => (
            REFUSED,
            "no agent has said yet what the pod is, so it is held in both directions",
            "start the agent; if it runs, its log names the pods that are held, and why",
        ),
    };
    Told { word: reason.as_str(), result, means, remedy }
}

/// Of the client's side, where there is nowhere to go.
fn of_route(refusal: RouteRefusal) -> Told {
    let (means, remedy) = match refusal {
        RouteRefusal::NoSuchServicePort => ("the Service has no such port", "connect to a port that it has"),
        RouteRefusal::NoEndpoint => (
            "the Service has no endpoint that is ready, or none on the node where only those count",
            "`culvert services` counts its endpoints; see its selector and the readiness of its pods",
        ),
        RouteRefusal::Loop => {
            ("through the mesh to 15001, 15006 or 15008 of a pod", "connect to the application's own port")
        }
        RouteRefusal::AmbiguousAddress => (
            "two pods, or two Services, have the address, so it identifies nobody",
            "remove the manifest that is wrong: mostly one of a pod that is gone",
        ),
        RouteRefusal::NotInRegistry => (
            "nobody known has the address, and `outboundTrafficPolicy` is REGISTRY_ONLY",
            "add what is missing to the manifests, or set ALLOW_ANY in the mesh configuration",
        ),
    };
    Told { word: refusal.as_str(), result: REFUSED, means, remedy }
}

const ROUTES: [RouteRefusal; 5] = [
    RouteRefusal::NoSuchServicePort,
    RouteRefusal::NoEndpoint,
    RouteRefusal::Loop,
    RouteRefusal::AmbiguousAddress,
    RouteRefusal::NotInRegistry,
];

/// Of a limit; which setting it is, [`Limit::setting`] knows.
fn of_limit(limit: Limit) -> Told {
    let (result, means, remedy) = match limit {
        Limit::Connections => (
            REFUSED,
            "the pod has as many connections as it may; of connections to it, the client's address has",
            "let the application close what it does not use, or raise `max-connections-per-pod`",
        ),
        Limit::Memory => (
            "refused, or ended",
            "the agent holds as many bytes for the pod as it may, since its readers do not read",
            "see which application does not read, or raise `max-memory-per-pod`",
        ),
        Limit::Handshakes => (
            REFUSED,
            "the peer's address has as many tunnels as it may in which nothing was asked for",
            "a peer that only connects is broken or hostile; else raise `max-handshakes-per-peer`",
        ),
        Limit::OpenFiles => (
            REFUSED,
            "only the reserve of open files is left, and the pod has more than its share",
            "raise the agent's limit of open files (`LimitNOFILE`, `max-open-files`)",
        ),
    };
    Told { word: limit.as_str(), result, means, remedy }
}

const LIMITS: [Limit; 4] = [Limit::Connections, Limit::Memory, Limit::Handshakes, Limit::OpenFiles];

/// Of what went wrong on the way.
fn of_failure(failure: Failure) -> Told {
    let (result, means, remedy) = match failure {
        Failure::Connect => (
            REFUSED,
            "the other side's port 15008, or the application, refused or did not answer",
            "is the other node's agent ready; does the application listen",
        ),
        Failure::NetworkPolicy => (
            REFUSED,
            "the other side's port 15008 did not answer in time: something drops the packets",
            "let NetworkPolicies and firewalls pass TCP to port 15008 between pods",
        ),
        Failure::TlsFailure => (
            REFUSED,
            "TLS failed: no certificate, one that has expired or is of another root or trust domain, or no TLS at all",
            "`error` says what; compare the roots of both sides with `culvert certificates`, and the clocks of both nodes",
        ),
        Failure::H2HandshakeFailure => (
            REFUSED,
            "the peer does not speak HTTP/2 as it must, or broke its rules",
            "`error` says what; is something else than a mesh at port 15008",
        ),
        Failure::IdentityError => (
            REFUSED,
            "there is no valid certificate for the pod, or the peer's names nobody",
            "`culvert certificates -o wide` says what the CA answered last",
        ),
        Failure::Refused => (
            REFUSED,
            "the other side of the tunnel refused; `error` has its status",
            "see the log of the other node's agent, at the same time",
        ),
        Failure::Denied => (
            REFUSED,
            "the other side of the tunnel refused by its policy, with 401",
            "`culvert why` on the server's node names the policy",
        ),
        Failure::Reset => (ENDED, "one of the two applications reset it; `error` says which", ""),
        Failure::TunnelLost => (
            ENDED,
            "the tunnel that carried it is gone: the other agent was killed, or the network between the nodes failed",
            "see the log of the other node's agent, and the link",
        ),
        Failure::Limit(limit) => return of_limit(limit),
        Failure::Drained => (
            ENDED,
            "it was still open when the time to drain was over",
            "raise `drain-deadline` if connections need longer, or let applications end them on GOAWAY",
        ),
        Failure::NoRoute(refusal) => return of_route(refusal),
        Failure::UnknownWorkload => (
            REFUSED,
            "the pod is not in the manifests, or not any more",
            "is the pod being deleted; else see `culvert workloads`",
        ),
    };
    Told { word: failure.as_str(), result, means, remedy }
}

const FAILURES: [Failure; 11] = [
    Failure::Connect,
    Failure::NetworkPolicy,
    Failure::TlsFailure,
    Failure::H2HandshakeFailure,
    Failure::IdentityError,
    Failure::Refused,
    Failure::Denied,
    Failure::Reset,
    Failure::TunnelLost,
    Failure::Drained,
    Failure::UnknownWorkload,
];

/// Connections that are no verdict's and did not fail.
const OTHERS: [Told; 3] = [
    Told {
        word: "tunnelled",
        result: ALLOWED,
        means: "outbound: it went through a tunnel, and both sides ended it in order",
        remedy: "",
    },
    Told {
        word: "plaintext",
        result: ALLOWED,
        means: "outbound: it went as it is, since the server is not in the mesh, and both sides ended it in order",
        remedy: "bring the server into the mesh",
    },
    Told {
        word: "agent-port",
        result: REFUSED,
        means: "a process of a pod dialled a listener of the agent's that is not for applications",
        remedy: "connect to the application's own port",
    },
];

/// The page: every word, with meaning and remedy, as `docs/reasons.md` has it.
pub fn markdown() -> String {
    let mut page = String::from(
        "# Reasons\n\nThis page is made from the words themselves. Each connection that ended has one in the access log's \
         field `reason`; metrics have\nthe same words as label `reason`, `culvert why`, `culvert verdicts`, `culvert decide` and \
         `culvert diff` show them. Where a policy\ndecided, the field `policy` names it: `namespace/name` of a \
         PeerAuthentication, `namespace/name#rule` of an AuthorizationPolicy, rules\ncounted from 0. What would allow one \
         particular connection, `culvert why` says.\n",
    );
    page += "\n## Verdicts\n\nOf policy, and of the kernel programs by themselves; the number is the one in [maps](maps.md#verdicts).\n";
    page += "\n| number | reason | the connection is | means | if that is not what you want |\n|---|---|---|---|---|\n";
    for reason in Reason::ALL {
        page += &format!("| {} {}", reason as u8, row(&of_verdict(reason)));
    }
    let ways = [
        ("Nowhere to go", "Of the client's side, before anything leaves the node.", ROUTES.map(of_route).to_vec()),
        (
            "Limits",
            "What one pod, or one peer, may take of the agent: [settings](configuration.md).",
            LIMITS.map(of_limit).to_vec(),
        ),
        ("On the way", "What kept a connection from being carried, or ended it.", FAILURES.map(of_failure).to_vec()),
        ("Without a verdict of their own", "", OTHERS.to_vec()),
    ];
    for (title, about, told) in ways {
        page += &format!("\n## {title}\n\n");
        if !about.is_empty() {
            page += &format!("{about}\n\n");
        }
        page += "| reason | the connection is | means | if that is not what you want |\n|---|---|---|---|\n";
        told.iter().for_each(|told| page += &row(told));
    }
    page
}

fn row(told: &Told) -> String {
    let remedy = if told.remedy.is_empty() { "–" } else { told.remedy };
    format!("| `{}` | {} | {} | {remedy} |\n", told.word, told.result, told.means)
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, env, fs, path::Path};

    use super::*;

    /// `CULVERT_WRITE_DOCS=1 cargo test -p culvert the_page_of_reasons` writes it anew.
    #[test]
    fn the_page_of_reasons_is_up_to_date() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/reasons.md");
        if env::var_os("CULVERT_WRITE_DOCS").is_some() {
            fs::write(&path, markdown()).expect("written");
        }
        let page = fs::read_to_string(&path).expect("docs/reasons.md is there");
        assert!(
            page == markdown(),
            "docs/reasons.md differs from the words; `CULVERT_WRITE_DOCS=1 cargo test -p culvert the_page_of_reasons` \
             writes it anew"
        );
    }

    /// What is refused has a remedy, and each word is explained once for each who says it.
    #[test]
    fn every_word_is_explained_once_and_every_refusal_has_a_remedy() {
        let verdicts = Reason::ALL.map(of_verdict);
        let (routes, limits, failures) = (ROUTES.map(of_route), LIMITS.map(of_limit), FAILURES.map(of_failure));
        for told in verdicts.iter().chain(&routes).chain(&limits).chain(&failures).chain(&OTHERS) {
            assert!(told.result != REFUSED || !told.remedy.is_empty(), "{}", told.word);
            assert!(!told.means.contains(['|', '\n']) && !told.remedy.contains(['|', '\n']), "{}", told.word);
            assert!(markdown().contains(&row(told)), "{} is not on the page", told.word);
        }
        for (kind, of) in [("verdicts", &verdicts[..]), ("routes", &routes), ("limits", &limits), ("others", &OTHERS)] {
            let words: BTreeSet<&str> = of.iter().map(|told| told.word).collect();
            assert_eq!(words.len(), of.len(), "{kind}");
        }
        // An answer of the other side is one word, with two meanings.
        let words: BTreeSet<&str> = failures.iter().map(|told| told.word).collect();
        assert_eq!(words.len(), failures.len() - 1);
    }
}
