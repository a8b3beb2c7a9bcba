//! Which programs a node of a kind cluster consists of, in which versions, and where they lie; building them is `xtask`'s.
//!
//! kube-apiserver, kube-controller-manager, etcd and kubectl are those of [`crate::apiserver`], of the same version.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::apiserver::assets::{self, Assets, KUBERNETES};

/// Version of containerd and its programs; tests/nodes/go.mod has the same one, and likewise below.
pub const CONTAINERD: &str = "2.3.7";
/// Version of runc.
pub const RUNC: &str = "1.4.3";
/// Version of the CNI plugins.
pub const CNI: &str = "1.9.1";
/// Version of CoreDNS.
pub const COREDNS: &str = "1.14.7";
/// Version of kind.
pub const KIND: &str = "0.33.0";

/// The module of kind, part of whose sources are files of the node's image.
pub const KIND_MODULE: &str = "sigs.k8s.io/kind";
/// Those files, in that module.
pub const KIND_FILES: &str = "images/base/files";

const GO_MOD: &str = include_str!("../../nodes/go.mod");
const GO_SUM: &str = include_str!("../../nodes/go.sum");
const MAINS: [&str; 2] = [include_str!("../../nodes/coredns/main.go"), include_str!("../../nodes/pause/main.go")];

/// One call of `go build`.
#[derive(Debug, Clone)]
pub struct GoBuild {
    /// Where the programs belong, below the folder of the set; ends with a slash if it is a folder.
    pub output: &'static str,
    /// What is built.
    pub packages: &'static [&'static str],
    /// Whether C is part of it.
    pub cgo: bool,
    /// Arguments besides the output and the packages.
    pub arguments: Vec<String>,
}

/// How all programs are built.
pub fn builds() -> Vec<GoBuild> {
    let linker = format!("-X github.com/containerd/containerd/v2/version.Version=v{CONTAINERD}");
    let arguments = arguments("urfave_cli_no_docs", &linker);
    let plain = |output, packages| GoBuild { output, packages, cgo: false, arguments: arguments.clone() };
    vec![
        plain(
            "",
            &[
                "k8s.io/kubernetes/cmd/kubelet",
                "k8s.io/kubernetes/cmd/kubeadm",
                "k8s.io/kubernetes/cmd/kube-proxy",
                "k8s.io/kubernetes/cmd/kube-scheduler",
                "github.com/containerd/containerd/v2/cmd/containerd",
                "github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2",
                "github.com/containerd/containerd/v2/cmd/ctr",
                "sigs.k8s.io/kind",
                "./coredns",
                "./pause",
            ],
        ),
        plain(
            "cni/",
            &[
                "github.com/containernetworking/plugins/plugins/main/loopback",
                "github.com/containernetworking/plugins/plugins/main/ptp",
                "github.com/containernetworking/plugins/plugins/meta/portmap",
                "github.com/containernetworking/plugins/plugins/ipam/host-local",
            ],
        ),
        // Static, so that it is the same in the node's image and for podman on this machine.
        GoBuild {
            output: "runc",
            packages: &["github.com/opencontainers/runc"],
            cgo: true,
            arguments: self::arguments(
                "seccomp,netgo,osusergo,urfave_cli_no_docs",
                &format!("-extldflags -static -X main.version={RUNC}"),
            ),
        },
    ]
}

/// Those of the API server, with more build tags and more for the linker.
fn arguments(tags: &str, linker: &str) -> Vec<String> {
    let mut arguments = assets::build_arguments();
    let mut more = |flag: &str, separator: &str, text: &str| {
        if let Some(value) = arguments.iter().position(|one| one == flag).and_then(|at| arguments.get_mut(at + 1)) {
            value.push_str(separator);
            value.push_str(text);
        }
    };
    more("-tags", ",", tags);
    more("-ldflags", " ", linker);
    arguments
}

/// The wrapper module, in the checkout that this library was built from.
pub fn module() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("nodes")
}

/// Names of the programs of a set, as files below its folder.
pub fn programs() -> Vec<String> {
    let file = |build: &GoBuild, package: &str| match build.output.ends_with('/') || build.output.is_empty() {
        true => format!("{}{}", build.output, package.rsplit('/').next().unwrap_or(package)),
        false => build.output.to_owned(),
    };
    builds()
        .iter()
        .flat_map(|build| build.packages.iter().map(|package| file(build, package)).collect::<Vec<_>>())
        .collect()
}

/// A complete set.
#[derive(Debug, Clone)]
pub struct Parts {
    dir: PathBuf,
    api: Assets,
}

impl Parts {
    /// The set that was built into the cache.
    ///
    /// # Errors
    /// Something is missing; the error is one line with the remedy.
    pub fn find() -> Result<Self> {
        let dir = Self::cached()?;
        if !Self::is_built()? {
            bail!("the programs of a Kubernetes node are not built: run `cargo xtask kind-image`");
        }
        Ok(Self { dir, api: Assets::find()? })
    }

    /// Where the built set lies, or will: its name says what it was built from and how.
    ///
    /// # Errors
    /// There is no cache directory.
    pub fn cached() -> Result<PathBuf> {
        let name = format!("nodes-{KUBERNETES}-{:016x}", Self::key());
        Ok(crate::cache().context("where built programs are kept")?.join("tools").join(name))
    }

    /// A number that differs where anything of the set does.
    pub fn key() -> u64 {
        let how = format!("{:?}", builds());
        assets::key(&[GO_MOD, GO_SUM, MAINS[0], MAINS[1], &how])
    }

    /// Whether the built set is there.
    ///
    /// # Errors
    /// As [`Self::cached`].
    pub fn is_built() -> Result<bool> {
        let dir = Self::cached()?;
        Ok(dir.join(KIND_FILES).is_dir() && programs().iter().all(|program| dir.join(program).is_file()))
    }

    /// The folder of kind's own files.
    pub fn kind_files(&self) -> PathBuf {
        self.dir.join(KIND_FILES)
    }

    /// File of a program, whichever set it is of.
    pub fn program(&self, name: &str) -> PathBuf {
        match assets::PROGRAMS.contains(&name) {
            true => self.api.program(name),
            false => self.dir.join(name),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_module_and_the_flags_say_the_same_versions() {
        for (module, version) in [
            ("k8s.io/kubernetes", KUBERNETES),
            ("github.com/containerd/containerd/v2", CONTAINERD),
            ("github.com/opencontainers/runc", RUNC),
            ("github.com/containernetworking/plugins", CNI),
            ("github.com/coredns/coredns", COREDNS),
            (KIND_MODULE, KIND),
        ] {
            let wanted = format!("{module} v{version}");
            let found = GO_MOD.lines().any(|line| {
                let line = line.trim().trim_start_matches("require ");
                line.trim_end_matches(" // indirect") == wanted
            });
            assert!(found, "no {wanted}");
        }
        for package in builds().iter().flat_map(|build| build.packages).filter(|package| !package.starts_with("./")) {
            assert!(GO_MOD.lines().any(|line| line.trim() == *package), "{package} is no tool of the module");
        }
    }

    #[test]
    fn programs_lie_where_they_are_built() {
        let programs = programs();
        for wanted in ["kubelet", "coredns", "pause", "cni/ptp", "cni/host-local", "runc", "kind"] {
            assert!(programs.iter().any(|program| program == wanted), "{wanted} is not in {programs:?}");
        }
        let runc = builds().pop().expect("the last one");
        let arguments = runc.arguments.join(" ");
        assert!(
            arguments.contains("notest,grpcnotrace,seccomp") && arguments.contains("-extldflags -static"),
            "{arguments}"
        );
    }
}
