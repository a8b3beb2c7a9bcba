//! Objects in and out of a cluster.

use std::sync::Arc;

use crate::model::{Cluster, MeshConfig, ObjectRef, PodUid};

use super::decode::{Key, Object};

/// Where an object stands in a cluster.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Slot {
    Pod(PodUid),
    Namespace(Arc<str>),
    Node(Arc<str>),
    Service(ObjectRef),
    EndpointSlice(ObjectRef),
    PeerAuthentication(ObjectRef),
    AuthorizationPolicy(ObjectRef),
    Mesh,
}

impl Slot {
    /// Of this object; `None` if it is of no effect.
    pub(super) fn of(key: &Key, object: &Object) -> Option<Self> {
        let (reference, name) = (|| key.object.clone(), || key.object.name.clone());
        Some(match object {
            Object::Pod(pod) => Self::Pod(pod.uid.clone()),
            Object::Namespace(_) => Self::Namespace(name()),
            Object::Node(_) => Self::Node(name()),
            Object::Service(_) => Self::Service(reference()),
            Object::EndpointSlice(_) => Self::EndpointSlice(reference()),
            Object::PeerAuthentication(_) => Self::PeerAuthentication(reference()),
            Object::AuthorizationPolicy(_) => Self::AuthorizationPolicy(reference()),
            Object::Mesh(_) => Self::Mesh,
            Object::Inert => return None,
        })
    }

    /// Leaves it empty; the mesh configuration is the default one then.
    pub(super) fn clear(&self, cluster: &mut Cluster) {
        match self {
            Self::Pod(uid) => drop(cluster.pods.remove(uid)),
            Self::Namespace(name) => drop(cluster.namespaces.remove(name)),
            Self::Node(name) => drop(cluster.nodes.remove(name)),
            Self::Service(of) => drop(cluster.services.remove(of)),
            Self::EndpointSlice(of) => drop(cluster.endpoint_slices.remove(of)),
            Self::PeerAuthentication(of) => drop(cluster.peer_authentications.remove(of)),
            Self::AuthorizationPolicy(of) => drop(cluster.authorization_policies.remove(of)),
            Self::Mesh => cluster.mesh = MeshConfig::default(),
        }
    }
}

impl Object {
    /// Puts it where it stands in a cluster, in place of what was there.
    pub(super) fn enter(self, key: &Key, cluster: &mut Cluster) {
        let (object, name) = (key.object.clone(), key.object.name.clone());
        match self {
            Self::Pod(pod) => drop(cluster.pods.insert(pod.uid.clone(), pod)),
            Self::Namespace(namespace) => drop(cluster.namespaces.insert(name, namespace)),
            Self::Node(node) => drop(cluster.nodes.insert(name, node)),
            Self::Service(service) => drop(cluster.services.insert(object, service)),
            Self::EndpointSlice(slice) => drop(cluster.endpoint_slices.insert(object, slice)),
            Self::AuthorizationPolicy(policy) => drop(cluster.authorization_policies.insert(object, policy)),
            Self::PeerAuthentication(policy) => drop(cluster.peer_authentications.insert(object, policy)),
            Self::Mesh(mesh) => cluster.mesh = (*mesh).clone(),
            Self::Inert => {}
        }
    }
}
