//! PeerAuthentication at work: real agents, real packets, manifests dropped into the watched folder.
//!
//! | file | shows |
//! |---|---|
//! | `matrix` | §8 without DestinationRule: who may reach whom, by which way, in which mode; how a refusal looks |
//! | `changes` | policy that changes while connections are open ([D.1]), and agents that cannot answer |
//! | `folder` | wrong, half-written and deleted manifests ([C.6], [C.11]) |
//! | `enrolment` | running pods brought in and out (§2, [E.5]) |
//! | `probes` | the kubelet's connections, and everybody else's from the node ([K.1], [K.5]) |
//! | `services` | cluster IPs: endpoints, ports, affinity (§13), never plaintext |
//! | `support` | what they share |

mod changes;
mod enrolment;
mod folder;
mod matrix;
mod probes;
mod services;
mod support;
