//! Which manifests an offline command is about, and whose they are.

use std::path::{Path, PathBuf};

use clap::Args;

use crate::{
    model::ObjectRef,
    policy::Options,
    source::{
        View,
        review::{Manifests, Review},
    },
};

/// The files.
#[derive(Args, Clone, Debug)]
pub(super) struct Files {
    /// A manifest, a folder of them, or - for standard input; may be given several times
    #[arg(short = 'f', long = "filename", value_name = "PATH", required = true)]
    paths: Vec<PathBuf>,
}

impl Files {
    /// What is wrong with each object, and what an agent would have in force.
    pub(super) fn review(&self, of: &Of) -> anyhow::Result<Review> {
        Ok(Manifests::read(&self.paths)?.review(&of.system_namespace))
    }

    /// What an agent would have in force.
    pub(super) fn view(&self, of: &Of) -> anyhow::Result<View> {
        of.view(&self.paths)
    }

    /// Whether one of them is standard input, which cannot be anything else too.
    pub(super) fn has_standard_input(&self) -> bool {
        self.paths.iter().any(|path| path == Path::new("-"))
    }
}

/// Whose manifests they are.
#[derive(Args, Clone, Debug)]
pub(super) struct Of {
    /// Namespace of ConfigMap istio and of the mesh's own pods
    #[arg(long, value_name = "NAME", default_value = "istio-system")]
    system_namespace: String,
    /// Revision: objects labelled istio.io/rev with another one do not concern this mesh
    #[arg(long, value_name = "NAME", default_value = "default")]
    revision: String,
    /// Namespaces whose pods are never enrolled, separated by commas
    #[arg(long, value_name = "NAMES", value_delimiter = ',', default_value = "kube-system")]
    exclude_namespaces: Vec<String>,
}

impl Of {
    /// What an agent would have in force that found these files at its start.
    pub(super) fn view(&self, paths: &[PathBuf]) -> anyhow::Result<View> {
        Ok(Manifests::read(paths)?.view(&self.system_namespace))
    }

    /// As the agent of that mesh would compile them.
    pub(super) fn options(&self) -> Options {
        Options {
            revision: self.revision.clone(),
            exclude_namespaces: self.exclude_namespaces.iter().filter(|name| !name.is_empty()).cloned().collect(),
            own_accounts: [ObjectRef::new(&self.system_namespace, "culvert")].into(),
        }
    }
}
