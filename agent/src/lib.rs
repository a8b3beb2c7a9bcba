//! Culvert: a sidecarless service mesh for Linux nodes.
//!
//! Three flows, each in one direction, joined only in `app`:
//!
//! ```text
//! policy   kube | file ─► source ─► model ─► policy::compile ─► datapath ─► BPF maps
//! pods     source, cgroups, netns ─► pods ─► enroll ─┬─► datapath ─► BPF maps
//!                                                    └─► listen (sockets inside the pod)
//! bytes    socket ─► listen ─► proxy ─► tunnel ─► peer
//!                               └─ asks policy::decide, identity and dns
//! ```

pub mod model;
pub mod policy;
pub mod source;
