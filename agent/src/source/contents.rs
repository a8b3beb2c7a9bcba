//! Objects in and out of a cluster.

use std::sync::Arc;

use crate::model::{Cluster, MeshConfig, ObjectRef, PodUid};

use super::{
    decode::{Key, Object},
    kinds::Kind,
};

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

    /// Those of a kind that are not empty.
    pub(super) fn all(kind: Kind, cluster: &Cluster) -> Vec<(Key, Self)> {
        let named = |name: &Arc<str>| Key { kind, object: ObjectRef { namespace: "".into(), name: name.clone() } };
        let of = |object: &ObjectRef| Key { kind, object: object.clone() };
        match kind {
            Kind::Pod => cluster.pods.iter().map(|(uid, pod)| (of(&pod.object), Self::Pod(uid.clone()))).collect(),
            Kind::Namespace => {
                cluster.namespaces.keys().map(|name| (named(name), Self::Namespace(name.clone()))).collect()
            }
            Kind::Node => cluster.nodes.keys().map(|name| (named(name), Self::Node(name.clone()))).collect(),
            Kind::Service => cluster.services.keys().map(|at| (of(at), Self::Service(at.clone()))).collect(),
            Kind::EndpointSlice => {
                cluster.endpoint_slices.keys().map(|at| (of(at), Self::EndpointSlice(at.clone()))).collect()
            }
            Kind::PeerAuthentication => {
                cluster.peer_authentications.keys().map(|at| (of(at), Self::PeerAuthentication(at.clone()))).collect()
            }
            Kind::AuthorizationPolicy => cluster
                .authorization_policies
                .keys()
                .map(|at| (of(at), Self::AuthorizationPolicy(at.clone())))
                .collect(),
            Kind::ConfigMap | Kind::ServiceAccount | Kind::NotEnforced(_) => Vec::new(),
        }
    }

    /// What stands there.
    pub(super) fn get(&self, cluster: &Cluster) -> Option<Object> {
        match self {
            Self::Pod(uid) => cluster.pods.get(uid).cloned().map(Object::Pod),
            Self::Namespace(name) => cluster.namespaces.get(name).cloned().map(Object::Namespace),
            Self::Node(name) => cluster.nodes.get(name).cloned().map(Object::Node),
            Self::Service(of) => cluster.services.get(of).cloned().map(Object::Service),
            Self::EndpointSlice(of) => cluster.endpoint_slices.get(of).cloned().map(Object::EndpointSlice),
            Self::PeerAuthentication(of) => {
                cluster.peer_authentications.get(of).cloned().map(Object::PeerAuthentication)
            }
            Self::AuthorizationPolicy(of) => {
                cluster.authorization_policies.get(of).cloned().map(Object::AuthorizationPolicy)
            }
            Self::Mesh => Some(Object::Mesh(Arc::new(cluster.mesh.clone()))),
        }
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
