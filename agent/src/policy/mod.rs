//! From the cluster as it is to one compiled snapshot, and from the snapshot to an answer about one connection.
//!
//! Pure: no I/O, no clock, no randomness of its own. [`compile`] turns a [`Cluster`] into a [`Snapshot`];
//! [`Snapshot::route`] answers the client side (specification §13, §8) and [`decide()`] the server side (§5, §6, §8).
//! Carrying the answer out, and waiting where a tunnel is not ready yet ([T.1]), is for `proxy` and `datapath`.
//!
//! [`Cluster`]: crate::model::Cluster

use std::collections::BTreeSet;

use crate::model::ObjectRef;

mod authorization;
mod changes;
mod compile;
mod decide;
mod endpoints;
mod enrollment;
mod peer_auth;
mod route;
mod selecting;
mod snapshot;
#[cfg(test)]
pub(crate) mod testing;

pub use authorization::{
    Authorization, Decision, MAX_BLOCKS, MAX_CELLS, MAX_DECISIONS, RuleRef, Table, TooLarge, hints,
};
pub use changes::Before;
pub use compile::{Protection, Servers, compile};
pub use decide::{Client, Connection, DecidedBy, DryRun, Server, Verdict, decide};
pub use endpoints::{CompiledService, Endpoint};
pub use enrollment::{DATAPLANE_MODE, Enrollment, REVISION, SIDECAR_INJECT, enrollment};
pub use peer_auth::PeerAuth;
pub use route::{Choice, Route, RouteRefusal};
pub use snapshot::{Occupant, RuleId, RuleKind, RuleObject, Snapshot, Workload};

/// What the operator configured that changes the meaning of the cluster's objects.
#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    /// Revision of this agent ([C.5]); `default` where not set.
    pub revision: String,
    /// Namespaces whose pods are never enrolled, even with labels (specification §2, row 3).
    pub exclude_namespaces: BTreeSet<String>,
    /// Service accounts of the mesh's own pods, never enrolled either (row 3).
    pub own_accounts: BTreeSet<ObjectRef>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            revision: "default".into(),
            exclude_namespaces: ["kube-system".to_owned()].into(),
            own_accounts: [ObjectRef::new("istio-system", "culvert")].into(),
        }
    }
}
