//! Where the cluster's objects come from: whole views of it, one after the other, on a watch channel.
//!
//! [`mod@file`] reads a watched folder of manifests, [`kubernetes`] watches an API server. Nothing after this module can
//! tell which source it was; what the objects add up to is for `policy`. [`definitions`] says the kinds' shapes to an
//! API server.

use std::{collections::BTreeMap, fmt, sync::Arc};

use tokio::sync::watch;

use crate::model::{Cluster, ObjectRef};

mod api;
mod authorization;
mod contents;
mod convert;
mod crd;
mod decode;
pub mod definitions;
pub mod file;
mod folder;
mod kinds;
pub mod kubernetes;
mod mesh;
mod pool;
pub mod review;
mod schema;
pub(crate) mod yaml;

pub use kinds::{IstioKind, istio as istio_kinds};

pub use crd::{
    AuthorizationAction, AuthorizationPolicy, AuthorizationPolicySpec, AuthorizationRule, ExtensionProvider, MutualTls,
    MutualTlsMode, PeerAuthentication, PeerAuthenticationSpec, PolicyTargetReference, RuleCondition, RuleFrom,
    RuleOperation, RuleSource, RuleTo, WorkloadSelector,
};

/// Everything that a source knows at one moment.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct View {
    /// The objects that are in force.
    pub cluster: Arc<Cluster>,
    /// What is wrong with what the users wrote, sorted by place.
    pub problems: Vec<Problem>,
    /// Names of files that are there, and of which no version could be read yet, or the lists that the API server has not
    /// given yet: what they say is not known, which is not the same as nothing ([D.2]).
    pub unread: Vec<String>,
    /// How each kind stands with the API server; empty where a folder is the source.
    pub watched: BTreeMap<&'static str, Watched>,
    /// What is accepted, but without effect in this version; one line each.
    pub notices: Vec<String>,
    /// Where the PeerAuthentications that are in force are written, by name.
    pub policies: Arc<Places>,
    /// Where the AuthorizationPolicies that are in force are written, by name.
    pub authorization_policies: Arc<Places>,
}

/// The clusters of views, for whoever needs no more; they follow for as long as the future is polled, which ends with the views.
pub fn clusters(
    mut views: watch::Receiver<Arc<View>>,
) -> (watch::Receiver<Arc<Cluster>>, impl Future<Output = ()> + use<>) {
    let (sender, clusters) = watch::channel(views.borrow_and_update().cluster.clone());
    let following = async move {
        while views.changed().await.is_ok() {
            let cluster = views.borrow_and_update().cluster.clone();
            sender.send_replace(cluster);
        }
    };
    (clusters, following)
}

/// Where objects of one kind are written, by name.
pub type Places = BTreeMap<ObjectRef, Place>;

/// Where an object is written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// File, document and line; or, of an object of the API server, its generation.
    pub at: String,
    /// Of an object of the API server: the generation that is in force. `None` where only a part of one is, and in a folder.
    pub generation: Option<i64>,
    /// Something else is written there now, which is invalid or unreadable, and this is what is in force meanwhile ([C.6]).
    pub stale: bool,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.at)
    }
}

/// Sets or removes the place of an object; where nothing changes, nothing is copied.
fn put_place(places: &mut Arc<Places>, object: &ObjectRef, place: Option<Place>) {
    if places.get(object) != place.as_ref() {
        let places = Arc::make_mut(places);
        match place {
            Some(place) => drop(places.insert(object.clone(), place)),
            None => drop(places.remove(object)),
        }
    }
}

/// How a kind of objects stands with the API server.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Watched {
    /// All objects of it were listed once.
    pub listed: bool,
    /// Why nothing new can be heard of it now; what is known of it stays in force.
    pub error: Option<String>,
    /// How often the server's answer was an error, or none came.
    pub errors: u64,
}

/// Something that a user wrote wrong, and the remedy.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Problem {
    /// Name of the file, within the folder; `None` for an object of the API server.
    pub file: Option<String>,
    /// Which document of the file, from 1; `None` if the file as a whole is meant.
    pub document: Option<usize>,
    /// Line of the file, from 1.
    pub line: Option<usize>,
    /// Kind, namespace and name, where they are known.
    pub object: Option<String>,
    /// Field path, what is wrong with it, the remedy, and what is in force meanwhile.
    pub message: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(file) = &self.file {
            f.write_str(file)?;
            if let Some(document) = self.document {
                write!(f, " document {document}")?;
            }
            if let Some(line) = self.line {
                write!(f, " (line {line})")?;
            }
            f.write_str(": ")?;
        }
        if let Some(object) = &self.object {
            write!(f, "{object}: ")?;
        }
        f.write_str(&self.message)
    }
}

#[cfg(test)]
mod tests;
