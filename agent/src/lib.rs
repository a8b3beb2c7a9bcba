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

pub mod app;
pub mod ca;
pub mod cli;
pub mod config;
pub mod connections;
pub mod datapath;
pub mod drain;
pub mod enroll;
pub mod identity;
pub mod listen;
pub mod model;
pub mod netns;
pub mod pods;
pub mod policy;
pub mod proxy;
pub mod source;
pub mod telemetry;
pub mod tunnel;
pub mod worker;
