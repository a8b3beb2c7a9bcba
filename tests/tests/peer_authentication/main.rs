//! PeerAuthentication at work: real agents, real packets, manifests dropped into the watched folder.
//!
//! | file | shows |
//! |---|---|
//! | `matrix` | §8 without DestinationRule: who may reach whom, by which way, in which mode; how a refusal looks |
//! | `changes` | policy that changes while connections are open ([D.1]), and agents that cannot answer |
//! | `folder` | wrong, half-written and deleted manifests ([C.6], [C.11]) |
//! | `support` | what they share |

mod changes;
mod folder;
mod matrix;
mod support;
