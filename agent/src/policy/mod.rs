//! From the cluster as it is to one compiled snapshot, and from the snapshot to an answer about one connection.
//!
//! Pure: no I/O, no clock, no randomness of its own. `compile` turns a [`Cluster`] into a [`Snapshot`];
//! [`Snapshot::route`] answers the client side (specification §13, §8) and [`Snapshot::decide`] the server side (§5, §8).

use std::{
    collections::{BTreeMap, HashMap},
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use culvert_common::Mode;

use crate::model::{Labels, MeshConfig, ObjectRef, PodUid, SpiffeId};

/// Index of the object that made a rule, 1-based; 0 is "no rule". Stable for an object while the agent runs, so that
/// the kernel's counters keep their meaning from one generation to the next.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RuleId(pub u32);

/// Whether a pod is in the mesh, and the row of specification §2 that decided.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Enrollment {
    /// In or out.
    pub enrolled: bool,
    /// The row of the table in specification §2, 1 to 16.
    pub row: u8,
    /// One line for humans.
    pub reason: String,
}

/// Effective PeerAuthentication of one pod (specification §5.2), a single unit ([PA.13]).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerAuth {
    /// Mode of every port that is not in [`PeerAuth::ports`].
    pub mode: Mode,
    /// The object that set it; 0 for the built-in PERMISSIVE.
    pub rule: RuleId,
    /// Ports whose mode differs from [`PeerAuth::mode`].
    pub ports: BTreeMap<u16, (Mode, RuleId)>,
}

/// One pod as the data path sees it.
#[derive(Clone, Debug, PartialEq)]
pub struct Workload {
    /// See [`PodUid`].
    pub uid: PodUid,
    /// Namespace and name of the pod.
    pub object: ObjectRef,
    /// Its identity ([I.2]).
    pub identity: SpiffeId,
    /// Its addresses; empty for hostNetwork pods, which are never identified by IP (§13).
    pub ips: Vec<IpAddr>,
    /// Its node.
    pub node: Arc<str>,
    /// In the mesh or not.
    pub enrollment: Enrollment,
    /// Effective PeerAuthentication; kept for pods outside the mesh too, where nothing enforces it ([PA.11]).
    pub peer_auth: PeerAuth,
    /// For telemetry (§16).
    pub workload_name: Arc<str>,
    /// For telemetry and selectors.
    pub labels: Labels,
}

/// What the client side does with a captured connection.
#[derive(Clone, Debug, PartialEq)]
pub enum Route {
    /// Through a tunnel to this pod.
    Tunnel {
        /// The server.
        workload: Arc<Workload>,
        /// Pod address and target port: the authority of the CONNECT (§14.2).
        target: SocketAddr,
        /// The Service that was addressed, if one was.
        service: Option<ObjectRef>,
    },
    /// Untouched bytes to this address: the server is outside the mesh (§8).
    Plaintext {
        /// Where to connect.
        target: SocketAddr,
        /// The server, if it is a pod we know.
        workload: Option<Arc<Workload>>,
        /// The Service that was addressed, if one was.
        service: Option<ObjectRef>,
    },
    /// Refused, with the reason.
    Refuse(RouteRefusal),
}

/// Why the client side refuses (closed list; the words are those of the access log).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RouteRefusal {
    /// The Service has no such port (§13).
    NoSuchServicePort,
    /// The Service has no eligible endpoint ([S.1]).
    NoEndpoint,
    /// Through the mesh to 15001, 15006 or 15008 of a pod ([K.2]).
    Loop,
}
