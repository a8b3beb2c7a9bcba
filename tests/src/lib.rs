//! Two Kubernetes nodes built from network namespaces and cgroups, and what is needed to play scenarios on them.
//!
//! | room | its one job |
//! |---|---|
//! | [`sandbox`] | build the nodes, pods, cgroups, manifests, tokens; start the CA and the agents; take everything away |
//! | [`programs`] | the unmodified programs that run inside pods, and the typed results they print |
//! | [`capture`] | record the link between the nodes and search it for a payload |
//! | [`interrupt`] | Ctrl-C as an ordinary error, so that everything built is also taken down |
//! | [`command`] | run a program of the system; say what it said when it fails |
//!
//! The scenarios themselves are in `tests/tests/`, one file per behaviour. They need root; a scenario that cannot run on
//! this machine fails and says why. The library has few dependencies because `xtask` is built from it first.

pub mod capture;
pub mod command;
pub mod interrupt;
pub mod programs;
pub mod sandbox;
